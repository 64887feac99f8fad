"""Whether a model gives the same vectors however it is loaded; where not, which step differs.

    llm2vec verify output/stage_I+output/stage_II output/exported
    llm2vec verify output/exported http://localhost:8000 --dtype bfloat16

The same texts go through every way, and each is compared with the first: token ids, then vectors. A way is

    PATH                    a checkpoint (packed and padded), an adapter folder (the same, and merged) or an export
                            (ours, sentence-transformers, transformers)
    PATH+ADAPTER            an adapter on a base; further ones follow, innermost first
    KIND:PATH[+ADAPTER]     one way alone: ours, padded, merged, st (sentence-transformers) or transformers
    http://HOST:PORT        an OpenAI-compatible server (vLLM, text-embeddings-inference, llama.cpp); #MODEL behind it
                            where it serves several

Where a way differs, the first differing token is said. Then single changes are tried (template, closing token,
attention, pooling, adapter, norm), and the one that gives the other way's vectors is named.

The reference stays loaded while each other way is, so there must be room for two models. Exit code 0: all agree; 1: one
does not, and why is said; 2: one could not be asked, or the command is wrong.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from llm2vec import cli
from llm2vec.hub import without_waiting_for_the_hub
from llm2vec.model.backbone import DTYPES
from llm2vec.model.settings import EncoderSettings
from llm2vec.table import Table
from llm2vec.types import InstructedText, UserError
from llm2vec.verify.causes import find_cause, first_differing_token
from llm2vec.verify.compare import (
    Answer,
    Parity,
    ask_server,
    ask_way,
    bundled_texts,
    compare_answers,
    read_compared_texts,
)
from llm2vec.verify.loaded import open_way
from llm2vec.verify.ways import LABELS, Choice, Rendering, choices_of, rendering_of

_HEADER = ["Way", "Of", "Texts", "Token ids", "Least cosine", "Mean", "Needed", "Largest diff.", "Lengths", ""]


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.parser("verify", __doc__)
    parser.add_argument("ways", nargs="+", metavar="WAY", help="the first is the reference")
    parser.add_argument("--texts", type=Path, help="a text a line, or .jsonl of text, instruction, side (default: own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is loaded here")
    parser.add_argument("--threshold", type=float, help="least cosine (default: 0.9999; 0.999 with half precision)")
    args = parser.parse_args(argv)
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold}; a cosine above 0 and up to 1 is needed.")
    return args


def main(argv: Sequence[str]) -> int:
    """Ask the reference, then every other way; returns the exit code."""
    args = _parse_args(argv)
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()  # such as of the text that is longer than a row
    with without_waiting_for_the_hub():
        return _compare_ways(args)


def _compare_ways(args: argparse.Namespace) -> int:
    """Compare all ways with the first and print what was found; returns the exit code."""
    choices = _all_choices(args.ways)
    rendering = rendering_of(choices)
    dtype = DTYPES[args.dtype]
    first = None if choices[0].kind == "server" else open_way(choices[0], dtype, rendering)
    limit = first or (rendering.rows if rendering else EncoderSettings())
    texts = read_compared_texts(args.texts) if args.texts else bundled_texts(limit.max_length)
    asked = list(texts.values())
    reference = ask_way(first, asked) if first else ask_server(choices[0], asked, rendering)
    print(f"reference: {reference.name}, {args.dtype}, {len(texts)} texts", flush=True)
    rows: list[list[str]] = []
    lines = _refusals(reference, texts)
    unanswered: list[str] = []
    for choice in choices[1:]:
        try:
            row, found = _compare_way(reference, choice, texts, dtype, rendering, args.threshold)
        except UserError as error:
            unanswered.append(f"not compared: {error}")
            continue
        rows.append(row)
        lines += found
    print(Table(_HEADER, rows, num_names=2).text(), *lines, *unanswered, sep="\n")
    return 1 if any(row[-1] == "FAIL" for row in rows) else 2 if unanswered else 0


def _all_choices(arguments: Sequence[str]) -> list[Choice]:
    """The ways of all arguments, each once; what does not apply is said.

    Raises:
        UserError: there is one way only.
    """
    choices: list[Choice] = []
    for argument in arguments:
        found, notes = choices_of(argument)
        choices += [choice for choice in found if choice not in choices]
        for note in notes:
            print(f"note: {note}")
    if len(choices) < 2:
        raise UserError(f"{arguments[0]} can be loaded in one way only; give another way to compare it with.")
    return choices


def _compare_way(
    reference: Answer,
    choice: Choice,
    texts: dict[str, InstructedText],
    dtype: torch.dtype,
    rendering: Rendering | None,
    threshold: float | None,
) -> tuple[list[str], list[str]]:
    """A way's row of the table, and lines on what it refuses and why it differs; what was loaded for it is let go."""
    asked = list(texts.values())
    if choice.kind == "server":
        answer = ask_server(choice, asked, rendering)
    else:
        answer = ask_way(open_way(choice, dtype, rendering), asked)
    parity = compare_answers(reference, answer, threshold)
    lines = _refusals(answer, texts)
    if differing := first_differing_token(reference, parity, list(texts)):
        lines.append(f"token ids: {differing}")
    if not parity.passes:
        cause, words = find_cause(reference, parity, asked)
        lines.append(f"FAIL: {answer.name}: {cause}: {words}")
    return _table_row(parity), lines


def _refusals(answer: Answer, texts: dict[str, InstructedText]) -> list[str]:
    """A line for each text that a server does not take."""
    names = list(texts)
    return [f"note: {answer.name} refuses the text {names[i]!r}: {why}" for i, why in answer.refused.items()]


def _table_row(parity: Parity) -> list[str]:
    """A way under `_HEADER`."""
    differ, shown = len(parity.differing_ids), parity.compared_ids
    return [
        LABELS[parity.answer.choice.kind],
        parity.answer.choice.place,
        str(len(parity.compared)),
        "not shown" if not shown else f"{differ} of {shown} differ" if differ else "equal",
        f"{parity.cosines.min():.6f}",
        f"{parity.cosines.mean():.6f}",
        f"{parity.threshold:g}",
        f"{parity.largest:.1e}",
        " - ".join(dict.fromkeys(f"{length:.3g}" for length in parity.lengths)),
        "ok" if parity.passes else "FAIL",
    ]
