"""Which texts are brought forth from which: the directions of a target, and the rows that a decoder reads for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm2vec.text.templates import template_named
from llm2vec.types import ReconstructionTarget, TokenBatch


class Reconstruction(NamedTuple):
    """A reconstruction: whose memory, whose text, and its name in the log."""

    name: str
    source: str
    goal: str


def directions_of(target: ReconstructionTarget, template: str | None) -> tuple[Reconstruction, ...]:
    """The reconstructions of a target, in pairs; the first of a pair starts at the query and is weighted by alpha.

    Args:
        target: as a config has it.
        template: where its two forms are two questions, a text is read in the one that the direction asks for.
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
        return Reconstruction("q2r", "query:prefix", "query:rest"), Reconstruction(
            "d2r", "positive:prefix", "positive:rest"
        )
    return {"self": of_itself, "counterpart": of_counterpart, "both": (*of_itself, *of_counterpart)}[target]


def contexts_of(side: TokenBatch) -> tuple[Tensor, list[int]]:
    """Which tokens [N] of a side's texts stand up to the end of their text, and how many do: all, without a text."""
    lengths = side["lengths"]
    if not len(side["target_mask"]):  # of a plan that knows lengths alone
        return side["target_mask"], lengths
    marked_BT = pad_sequence(side["target_mask"].split(lengths), batch_first=True)
    place_T = torch.arange(marked_BT.shape[1], device=marked_BT.device)
    length_B = torch.tensor(lengths, device=marked_BT.device)
    end_B = (marked_BT * (place_T + 1)).amax(dim=1)
    end_B = torch.where(end_B == 0, length_B, end_B)
    is_token_BT = place_T < length_B.unsqueeze(1)
    return (place_T < end_B.unsqueeze(1))[is_token_BT], end_B.tolist()


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


def last_of(lengths: Sequence[int], read: Sequence[int]) -> Tensor:
    """Index of the last so many tokens of each row, rows laid end to end."""
    rows = zip(torch.arange(sum(lengths)).split(list(lengths)), read, strict=True)
    return torch.cat([row[-n:] for row, n in rows])
