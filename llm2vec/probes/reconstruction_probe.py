"""How much of a held-out text an anchor tells: loss and token accuracy of its reconstruction, beside two references.

A decoder guesses much of a text from the words before alone. So every text is decoded three times, by the same weights:

    own      from the anchor of its counterpart
    other    from the anchor of another row of the same source: what anchors say of the source as a whole
    random   from a random direction of the own anchor's norm: what the decoder knows without any anchor

`other` less `own` is what the anchor says about its own text. `llm2vec reconstruct --score` prints the table;
`reconstruction_probe` in a Stage I config logs the figures in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm2vec.data.collation import CollateSides
from llm2vec.distributed import sum_over_ranks
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.probes.reconstruction import embed_rows, score_targets, target_ids
from llm2vec.processes import rank, world_size
from llm2vec.table import Table
from llm2vec.text.batches import token_batches
from llm2vec.text.tokenization import Row, RowTokenizer
from llm2vec.types import Example, UserError

ANCHORS = ("own", "other", "random")

#: Tokens of a pass; no gradient is kept, so it need not follow the training's memory.
TOKENS_AT_ONCE = 4096


class Figure(NamedTuple):
    """The reconstruction of a group of target tokens."""

    direction: str  #: as in the training log: q2d, d2q (or q2q, d2d)
    group: str  #: what the tokens have in common: `all`, `source` or `position`
    name: str  #: of the source, or the positions in their text, from 1: 1, 2, 3-4, 5-8, ..
    tokens: int  #: how many there are
    loss: dict[str, float]  #: mean -log p in nats, for each of `ANCHORS`
    #: share of tokens that are the decoder's likeliest, for each of `ANCHORS`.
    accuracy: dict[str, float]


class ReconstructionProbe:
    """Scores an objective's reconstructions of held-out rows; every rank takes its share and learns all figures.

    The figures do not depend on the number of ranks, nor on what goes through the model together. Of each source two
    rows are needed. `seed` decides the references: who gets whose anchor, and the random directions. An instruction
    that leaves no room for a text is a `UserError`.
    """

    def __init__(
        self, objective: BidirectionalReconstruction, tokenizer: RowTokenizer, rows: Sequence[Example], seed: int = 42
    ) -> None:
        self.objective = objective
        self.seed = seed
        examples = [rows[i] for i in range(len(rows))]
        self.sources = list(dict.fromkeys(example.source for example in examples))
        self._source_of = [self.sources.index(example.source) for example in examples]
        self._order, self._other = _cycles(self._source_of, self.sources, seed)
        collate = CollateSides(tokenizer, (), seed=seed)
        sides = dict.fromkeys(side for d in objective.directions for side in (d.source, d.goal))
        self._rows: dict[str, list[Row]] = {side: collate.rows(examples, side) for side in sides}
        self._targets = {side: [target_ids(row) for row in rows] for side, rows in self._rows.items()}
        longest = max(len(ids) for targets in self._targets.values() for ids in targets)
        self._num_buckets = int(_bucket(torch.tensor(longest))) + 1

    def __call__(self) -> dict[str, float]:
        """Loss and accuracy of each direction from each anchor, by the names they have in the training log."""
        return {
            f"reconstruction_{figure.direction}_{name}_{anchor}": values[anchor]
            for figure in self.figures()
            if figure.group == "all"
            for name, values in (("loss", figure.loss), ("accuracy", figure.accuracy))
            for anchor in ANCHORS
        }

    @torch.no_grad()
    def figures(self) -> list[Figure]:
        """The figures of each direction: of all tokens, by source and by position; on every rank."""
        # [source, bucket, anchor, (tokens, loss, hits)] of each direction
        tables = torch.stack([self._sums(number) for number in range(len(self.objective.directions))])
        if world_size() > 1:
            tables = sum_over_ranks(tables.to(next(self.objective.parameters()).device)).cpu()
        found = []
        for direction, table in zip(self.objective.directions, tables, strict=True):
            groups = [("all", "all", table.sum(dim=(0, 1)))]
            groups += [("source", self.sources[i], table[i].sum(dim=0)) for i in range(table.shape[0])]
            groups += [("position", _bucket_name(i), table[:, i].sum(dim=0)) for i in range(table.shape[1])]
            for group, name, sums in groups:
                if sums.any():  # [anchor, (tokens, loss, hits)]
                    tokens, loss, hits = sums.unbind(dim=1)
                    means = [dict(zip(ANCHORS, (values / tokens).tolist(), strict=True)) for values in (loss, hits)]
                    found.append(Figure(direction.name, group, name, round(tokens[0].item()), *means))
        return found

    def _sums(self, number: int) -> Tensor:
        """What this rank's share adds to a direction's table, in float64."""
        direction = self.objective.directions[number]
        targets = self._targets[direction.goal]
        sums = torch.zeros(len(self.sources), self._num_buckets, len(ANCHORS), 3, dtype=torch.float64)
        first, last = (len(self._order) * r // world_size() for r in (rank(), rank() + 1))
        share = self._order[first:last]
        anchors = self._anchors(direction.source, sorted({*share, *(self._other[i] for i in share)}))
        for batch in token_batches([len(ANCHORS) * len(targets[i]) for i in share], TOKENS_AT_ONCE):
            chosen = [share[k] for k in batch]
            own_BKD = torch.stack([anchors[i] for i in chosen])
            other_BKD = torch.stack([anchors[self._other[i]] for i in chosen])
            random_BKD = self._random_like(own_BKD, [(number, i) for i in chosen])
            goals = [targets[i] for i in chosen]
            scored = score_targets(self.objective, torch.cat([own_BKD, other_BKD, random_BKD]), goals * len(ANCHORS))
            loss_NA = scored.terms.unflatten(0, (len(ANCHORS), -1)).T.cpu().double()
            hit_NA = scored.hits.unflatten(0, (len(ANCHORS), -1)).T.cpu().double()
            source_N = torch.tensor([self._source_of[i] for i, goal in zip(chosen, goals, strict=True) for _ in goal])
            bucket_N = torch.cat([_bucket(torch.arange(1, len(goal) + 1)) for goal in goals])
            values = torch.stack([torch.ones_like(loss_NA), loss_NA, hit_NA], dim=-1)
            sums.index_put_((source_N, bucket_N), values, accumulate=True)
        return sums

    def _anchors(self, side: str, chosen: Sequence[int]) -> dict[int, Tensor]:
        """The anchors [K, D] of some rows' texts."""
        rows = self._rows[side]
        anchors: dict[int, Tensor] = {}
        for batch in token_batches([len(rows[i].ids) for i in chosen], TOKENS_AT_ONCE):
            of_batch = [chosen[k] for k in batch]
            anchor_BKD = embed_rows(self.objective, [rows[i] for i in of_batch])
            anchors |= zip(of_batch, anchor_BKD.unbind(), strict=True)
        return anchors

    def _random_like(self, anchor_BKD: Tensor, keys: Sequence[tuple[int, int]]) -> Tensor:
        """Random directions with the anchors' norms; a row's is the same whatever the others are."""
        shape = anchor_BKD.shape[1:]
        drawn = np.stack([np.random.default_rng([self.seed, *key]).standard_normal(shape) for key in keys])
        unit_BKD = torch.from_numpy(drawn / np.linalg.norm(drawn, axis=2, keepdims=True))
        return unit_BKD.to(anchor_BKD) * anchor_BKD.norm(dim=2, keepdim=True)


def _cycles(source_of: Sequence[int], sources: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """All rows, each source's shuffled into a circle, and for each row the one before it in its circle."""
    order: list[int] = []
    other = [0] * len(source_of)
    for number, name in enumerate(sources):
        members = list(compress(range(len(source_of)), (source == number for source in source_of)))
        if len(members) < 2:
            raise UserError(f"source {name!r} has one held-out row; another row's anchor needs two or more.")
        circle = np.random.default_rng([seed, number]).permutation(members).tolist()
        for i, member in enumerate(circle):
            other[member] = circle[i - 1]
        order += circle
    return order, other


def _bucket(position: Tensor) -> Tensor:
    """Number of the bucket of positions counted from 1: 1, 2, 3-4, 5-8, 9-16, ..."""
    return torch.bucketize(position, 2 ** torch.arange(32))


def _bucket_name(bucket: int) -> str:
    first, last = 2**bucket // 2 + 1, 2**bucket
    return str(last) if first >= last else f"{first}-{last}"


def as_table(figures: Sequence[Figure]) -> str:
    """Figures for a terminal, a table for each direction: nats a token, and shares of tokens that are the likeliest.

    `gain` is the loss from `other` less that from `own`.
    """
    tables = []
    for direction in dict.fromkeys(figure.direction for figure in figures):
        of_direction = [figure for figure in figures if figure.direction == direction]
        one_source = sum(figure.group == "source" for figure in of_direction) == 1
        losses, shares = ([f"{what}, {name}" for name in ANCHORS] for what in ("loss", "%"))
        rows = []
        for figure in of_direction:
            if one_source and figure.group == "source":
                continue
            label = figure.name if figure.group == "all" else f"{figure.group} {figure.name}"
            loss, accuracy = ([values[anchor] for anchor in ANCHORS] for values in (figure.loss, figure.accuracy))
            numbers = [f"{value:.3f}" for value in (*loss, loss[1] - loss[0])]
            rows.append([label, f"{figure.tokens:,}", *numbers, *(f"{100 * share:.1f}" for share in accuracy)])
        tables.append(Table([direction, "tokens", *losses, "gain", *shares], rows).text())
    return "\n\n".join(tables)
