"""All ways beside the first: the table of `llm2vec verify`, and the lines under it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm2vec.cli import Printer
from llm2vec.model.backbone import DTYPES
from llm2vec.model.settings import EncoderSettings
from llm2vec.table import Table
from llm2vec.types import UserError
from llm2vec.verify.causes import find_cause, first_differing_token
from llm2vec.verify.compare import Answer, Parity, ask_server, ask_way, bundled_texts, compare_answers, read_own_texts
from llm2vec.verify.loaded import open_way
from llm2vec.verify.ways import LABELS, Choice, choices_of, rendering_of

_HEADER = ["Way", "Of", "Texts", "Token ids", "Least cosine", "Mean", "Needed", "Largest diff.", "Lengths", "Verdict"]


def compare_ways(
    ways: Sequence[str], texts_file: Path | None, dtype: str, threshold: float | None, out: Printer
) -> int:
    """Ask the reference, which is the first, then every other way, and print how they compare.

    Arguments as on the command line. The exit code: 1 if a way differs, else 2 if one could not be asked, else 0. A
    `UserError` where there is one way only, or the reference cannot be asked.
    """
    choices: list[Choice] = []
    for argument in ways:
        found, notes = choices_of(argument)
        choices += [choice for choice in found if choice not in choices]
        for note in notes:
            out.say(f"note: {note}")
    if len(choices) < 2:
        raise UserError(f"{ways[0]} can be loaded in one way only; give another way to compare it with.")
    rendering = rendering_of(choices)
    first = None if choices[0].kind == "server" else open_way(choices[0], DTYPES[dtype], rendering)
    limit = first or (rendering.rows if rendering else EncoderSettings())
    texts = read_own_texts(texts_file) if texts_file else bundled_texts(limit.max_length)
    names, asked = list(texts), list(texts.values())
    reference = ask_way(first, asked) if first else ask_server(choices[0], asked, rendering)
    out.say(f"reference: {reference.name}, {dtype}, {len(texts)} texts")
    rows: list[list[str]] = []
    lines = _refusals(reference, names)
    unanswered: list[str] = []
    for choice in choices[1:]:
        try:
            if choice.kind == "server":
                answer = ask_server(choice, asked, rendering)
            else:
                answer = ask_way(open_way(choice, DTYPES[dtype], rendering), asked)
            parity = compare_answers(reference, answer, threshold)
        except UserError as error:
            unanswered.append(f"not compared: {error}")
            continue
        rows.append(_row_of(parity))
        lines += _refusals(answer, names)
        if differing := first_differing_token(reference, parity, names):
            lines.append(f"token ids: {differing}")
        if not parity.passes:
            lines.append(f"FAIL: {answer.name}: {find_cause(reference, parity, asked)}")
        del answer, parity  # what is loaded is let go before the next way is
    out.table(Table(_HEADER, rows, num_names=2))
    if lines or unanswered:
        out.say(*lines, *unanswered)
    return 1 if any(row[-1] == "FAIL" for row in rows) else 2 if unanswered else 0


def _refusals(answer: Answer, names: Sequence[str]) -> list[str]:
    """A line for each text that a server does not take."""
    return [f"note: {answer.name} refuses the text {names[i]!r}: {why}" for i, why in answer.refused.items()]


def _row_of(parity: Parity) -> list[str]:
    """A way under `_HEADER`."""
    differ, shown = len(parity.differing_ids), parity.compared_ids
    return [
        LABELS[parity.answer.choice.kind],
        parity.answer.choice.model.place,
        str(len(parity.compared)),
        "not shown" if not shown else f"{differ} of {shown} differ" if differ else "equal",
        f"{parity.cosines.min():.6f}",
        f"{parity.cosines.mean():.6f}",
        f"{parity.threshold:g}",
        f"{parity.largest:.1e}",
        " - ".join(dict.fromkeys(f"{length:.3g}" for length in parity.lengths)),
        "ok" if parity.passes else "FAIL",
    ]
