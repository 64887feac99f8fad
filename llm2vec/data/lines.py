"""A training row, or a line of plain text: checked by the same rules wherever it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm2vec.files import check_unicode
from llm2vec.types import UserError


def parse_line(line: bytes, where: str) -> str:
    """A line of plain text, without the blanks around it and a byte order mark; empty if it has nothing else. A
    `UserError`, which begins with `where`, if it is no UTF-8."""
    try:
        return line.decode("utf-8-sig").strip()
    except ValueError as error:
        raise UserError(f"{where}: not valid UTF-8 ({error}).") from error


def lines_of_text(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file of plain text as of `parse_line`, each with its number from 1."""
    with file.open("rb") as lines:  # which end at line feeds alone; Unicode breaks lines in more places
        for number, line in enumerate(lines, start=1):
            yield number, parse_line(line, f"{file}, line {number}")


def check_row(
    row: Mapping[str, Any], num_negatives: int | None, where: str, with_scores: bool = False
) -> dict[str, Any]:
    """A row as `query`, `positive` and `negative` (the first `num_negatives` of them, or all for None); with a teacher,
    `scores` too: the positive's, then those negatives'.

    Raises:
        UserError: a field is missing, empty or no text, there are too few negatives, or scores are missing, no numbers
            or not as many as the negatives; begins with `where`.
    """
    for field in ("query", "positive"):
        if field not in row:
            there = f"; there are {', '.join(row)}" if row else ""
            raise UserError(f"{where}: the field `{field}` is missing{there}.")
        check_text(row[field], field, where)
    negatives = row.get("negative", [])
    negatives = [negatives] if isinstance(negatives, str) else negatives
    if not isinstance(negatives, list):
        raise UserError(f"{where}: `negative` must be a string or a list of strings.")
    num_negatives = len(negatives) if num_negatives is None else num_negatives
    if len(negatives) < num_negatives:
        raise UserError(
            f"{where}: {len(negatives)} hard negatives, but num_hard_negatives is {num_negatives}"
            f"{'' if 'negative' in row else ' (the field `negative` is missing)'}; "
            f"set it to {len(negatives)}, or find more by `llm2vec mine`."
        )
    for text in negatives[:num_negatives]:
        check_text(text, "negative", where)
    parsed = {"query": row["query"], "positive": row["positive"], "negative": negatives[:num_negatives]}
    if with_scores:
        parsed["scores"] = _scores(row, len(negatives), where)[: 1 + num_negatives]
    return parsed


def _scores(row: Mapping[str, Any], num_negatives: int, where: str) -> list[float]:
    """A teacher's score of the positive and of every negative of a row."""
    for field in ("pos_score", "neg_scores"):
        if field not in row:
            raise UserError(
                f"{where}: the field `{field}` is missing, which distillation_weight needs, and cosent_weight."
            )
    of_negatives = row["neg_scores"]
    if not isinstance(of_negatives, list) or len(of_negatives) != num_negatives:
        raise UserError(
            f"{where}: `neg_scores` must be a list of as many numbers as the row has negatives ({num_negatives})."
        )
    scores: list[float] = [row["pos_score"], *of_negatives]
    for score in scores:
        if type(score) not in (int, float) or not abs(score) < 1e300:
            raise UserError(f"{where}: {score!r} is no score; `pos_score` and `neg_scores` must hold finite numbers.")
    return [float(score) for score in scores]


def check_text(text: Any, field: str, where: str) -> None:
    """A `UserError`, which begins with `where`, if what a field holds is no text, or none but blanks."""
    if not isinstance(text, str):
        raise UserError(f"{where}: `{field}` must be text, not a {type(text).__name__}.")
    if not text.strip():
        raise UserError(f"{where}: `{field}` is empty.")
    check_unicode(text, field, where)
