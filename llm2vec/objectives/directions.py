"""Which texts are brought forth from which: the directions of a target, and the rows that a decoder reads for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm2vec.text.templates import template_named
from llm2vec.types import ReconstructionTarget


class Reconstruction(NamedTuple):
    """A reconstruction: whose memory, whose text, and its name in the log."""

    name: str
    source: str
    goal: str


def directions_of(target: ReconstructionTarget, template: str | None) -> tuple[Reconstruction, ...]:
    """The reconstructions of a target, in pairs; the first of a pair starts at the query and is weighted by alpha.

    Where a template's two forms are two questions, a text is read in the one that the direction asks for.
    """
    asks = template is not None and template_named(template).asks
    itself, other = (":document", ":query") if asks else ("", "")
    of_itself = (
        Reconstruction("q2q", f"query{itself}", f"query{itself}"),
        Reconstruction("d2d", f"positive{itself}", f"positive{itself}"),
    )
    of_counterpart = (
        Reconstruction("q2d", f"query{other}", f"positive{other}"),
        Reconstruction("d2q", f"positive{other}", f"query{other}"),
    )
    if target == "next":
        queries = Reconstruction("q2r", "query:prefix", "query:rest")
        return queries, Reconstruction("d2r", "positive:prefix", "positive:rest")
    return {"self": of_itself, "counterpart": of_counterpart, "both": (*of_itself, *of_counterpart)}[target]


def woven_rows(parts: Sequence[Sequence[int]], left_out: int) -> tuple[Tensor, list[int]]:
    """Rows made of parts that stand one behind the other, each with a piece for every row.

    Args:
        parts: lengths of the pieces of each part; a row whose piece of the last part is empty has no place.
        left_out: how many tokens at a row's end are none of it.

    Returns:
        Index of the rows' tokens, row after row, and how many each row has.
    """
    first, pieces = 0, []
    for lengths in parts:
        pieces.append((first + torch.arange(sum(lengths))).split(list(lengths)))
        first += sum(lengths)
    rows = [torch.cat(row)[: -left_out or None] for row in zip(*pieces, strict=True) if len(row[-1])]
    return torch.cat(rows), [len(row) for row in rows]


def first_of(lengths: Sequence[int], read: Sequence[int]) -> Tensor:
    """Index of the first so many tokens of each row, rows laid end to end."""
    rows = zip(torch.arange(sum(lengths)).split(list(lengths)), read, strict=True)
    return torch.cat([row[:n] for row, n in rows])


def last_of(lengths: Sequence[int], read: Sequence[int]) -> Tensor:
    """Index of the last so many tokens of each row, rows laid end to end."""
    rows = zip(torch.arange(sum(lengths)).split(list(lengths)), read, strict=True)
    return torch.cat([row[-n:] for row, n in rows])
