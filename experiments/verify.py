"""Whether a model gives the same vectors however it is loaded; where not, which step differs.

    python experiments/verify.py output/stage_I+output/stage_II output/exported
    python experiments/verify.py output/exported http://localhost:8000 --dtype bfloat16

The same texts go through every way, and each is compared with the first: token ids, then vectors. A way is

    PATH                    a checkpoint (packed and padded), an adapter folder (the same, and merged) or an export
                            (ours, sentence-transformers, transformers)
    PATH+ADAPTER            an adapter on a base; further ones follow, innermost first
    KIND:PATH[+ADAPTER]     one way alone: ours, padded, merged, st (sentence-transformers) or transformers
    http://HOST:PORT        an OpenAI-compatible server (vLLM, text-embeddings-inference, llama.cpp); #MODEL behind it
                            where it serves several

The reference stays loaded while each other way is, so there must be room for two models. Exit code 0: all agree; 1: one
does not, and why is said; 2: one could not be asked, or the command is wrong.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from llm2vec.cli import user_errors_in_one_sentence
from llm2vec.hub import without_waiting_for_the_hub
from llm2vec.model.backbone import DTYPES
from llm2vec.model.settings import EncoderSettings
from llm2vec.reports.page import text_table
from llm2vec.types import InstructedText, UserError
from llm2vec.verify.causes import find_causes
from llm2vec.verify.compare import Answer, Parity, ask_server, ask_way, bundled_texts, compare, read_texts
from llm2vec.verify.loaded import LocalWay, open_way
from llm2vec.verify.ways import Choice, choices_of, rendering_of


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("ways", nargs="+", metavar="WAY", help="the first is the reference")
    parser.add_argument("--texts", type=Path, help="a text a line, or .jsonl of text, instruction, side (default: own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is loaded here")
    parser.add_argument("--threshold", type=float, help="least cosine (default: 0.9999; 0.999 with half precision)")
    args = parser.parse_args(argv)
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold}; a cosine above 0 and up to 1 is needed.")
    return args


def all_choices(arguments: Sequence[str]) -> list[Choice]:
    """The ways of all arguments, each once; what does not apply is said."""
    choices: list[Choice] = []
    for argument in arguments:
        found, notes = choices_of(argument)
        choices += [choice for choice in found if choice not in choices]
        for note in notes:
            print(f"note: {note}")
    if len(choices) < 2:
        raise UserError(f"{arguments[0]} can be loaded in one way only; give another way to compare it with.")
    return choices


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and compare; returns the exit code."""
    args = parse_args(argv)
    with without_waiting_for_the_hub():
        return compare_ways(args)


def compare_ways(args: argparse.Namespace) -> int:
    """Ask the reference, then every other way; returns the exit code."""
    choices = all_choices(args.ways)
    rendering = rendering_of(choices)

    def load(choice: Choice) -> LocalWay | None:
        return None if choice.kind == "server" else open_way(choice, DTYPES[args.dtype], rendering)

    def ask(way: LocalWay | None, choice: Choice) -> Answer:
        asked = list(texts.values())
        return ask_server(choice, asked, rendering) if way is None else ask_way(way, asked)

    first = load(choices[0])
    limit = first or (rendering.rows if rendering else EncoderSettings())
    texts = read_texts(args.texts) if args.texts else bundled_texts(limit.max_length)
    reference = ask(first, choices[0])
    print(f"reference: {reference.name}, {args.dtype}, {len(texts)} texts", flush=True)
    parities: list[Parity] = []
    lines = refusals(reference, texts)
    unanswered: list[str] = []
    for choice in choices[1:]:
        way = None  # before the next is loaded
        try:
            way = load(choice)
            answer = ask(way, choice)
            parity = compare(reference, answer, args.threshold)
        except UserError as error:
            unanswered.append(f"not compared: {error}")
            continue
        parities.append(parity)
        lines += refusals(answer, texts)
        if not parity.passes:
            found = find_causes((first, reference), (way, parity), texts)
            lines += [f"FAIL: {answer.name}: {finding.cause}: {finding.words}" for finding in found]
    print(table(parities), *lines, *unanswered, sep="\n")
    return 1 if not all(parity.passes for parity in parities) else 2 if unanswered else 0


def refusals(answer: Answer, texts: dict[str, InstructedText]) -> list[str]:
    """A line for each text that a server does not take."""
    names = list(texts)
    return [f"note: {answer.name} refuses the text {names[i]!r}: {why}" for i, why in answer.refused.items()]


def table(parities: Sequence[Parity]) -> str:
    """A row a way."""
    header = ["Way", "Of", "Texts", "Token ids", "Least cosine", "Mean", "Needed", "Largest diff.", "Lengths", ""]
    rows = []
    for parity in parities:
        differ, shown = len(parity.differing_ids), parity.compared_ids
        rows.append(
            [
                parity.answer.label,
                parity.answer.place,
                str(len(parity.compared)),
                "not shown" if not shown else f"{differ} of {shown} differ" if differ else "equal",
                f"{parity.cosines.min():.6f}",
                f"{parity.cosines.mean():.6f}",
                f"{parity.threshold:g}",
                f"{parity.largest:.1e}",
                " - ".join(dict.fromkeys(f"{length:.3g}" for length in parity.lengths)),
                "ok" if parity.passes else "FAIL",
            ]
        )
    return text_table(header, rows, num_names=2)


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
        transformers_logging.set_verbosity_error()  # such as of the text that is longer than a row
        raise SystemExit(main())
