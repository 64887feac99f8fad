"""The order of rows in an epoch: blocks of one source, shuffled; among several ranks, dealt by length.

A step has one number of places, on which resume, micro-batches and ranks rest. A source whose batches are smaller
leaves some of them empty (`NO_ROW`), equally many in each micro-batch of each rank.

Sources may be mixed by weights: of each, an epoch takes so many blocks. Where these are not all of a source's, they
come from a stream of its rows, shuffled again and again, so that every row is seen equally often over the epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from llm2vec.data.sources import Source
from llm2vec.types import UserError

#: In an order, a place without a row.
NO_ROW = -1


class SourceRows(Protocol):
    """Rows by one running index, source after source, as far as their order goes."""

    sources: list[Source]  #: where they are from
    sizes: list[int]  #: rows of each source
    #: whether a row is drawn anew in each epoch; row i of epoch e is then asked for as e * len(rows) + i, so that
    #: it does not matter which process asks
    drawn_anew: bool

    def lengths(self, indices: NDArray[np.int64], most: int | None = None) -> NDArray[np.int64]:
        """About how long some rows are, all of one source; `most` = what a text counts at most."""
        ...


def block_order(
    sizes: Sequence[int],
    block_size: int,
    seed: int,
    epoch: int,
    taken: Sequence[int] | None = None,
    filled: Sequence[int] | None = None,
    cells: int = 1,
) -> NDArray[np.int64]:
    """Row indices of one epoch: blocks of `block_size` places, each with rows of one source, in random order.

    Rows are shuffled within their source and cut into blocks, incomplete blocks are dropped, and the blocks are
    shuffled. A pure function of its arguments. No block holds a row twice.

    Args:
        sizes: rows of each source; row indices run through the sources in this order.
        block_size: places a block.
        seed: of the run.
        epoch: counted from 0.
        taken: blocks of each source that the epoch takes, more or fewer than it has; None = all that each has.
        filled: places of a block that each source fills with rows, the others are `NO_ROW`; None = all.
        cells: parts of a block, one after the other, that hold equally many rows; divides `block_size` and `filled`.
    """
    generator = np.random.default_rng([seed, epoch])
    blocks = []
    start = 0
    for which, size in enumerate(sizes):
        rows_a_block = block_size if filled is None else filled[which]
        there = size // rows_a_block
        number = there if taken is None else taken[which]
        if number == there:
            cut = generator.permutation(size)[: there * rows_a_block].reshape(-1, rows_a_block)
        else:
            first, last = epoch * number, (epoch + 1) * number  # of the source's stream of blocks
            shuffles = range(first // there, (last - 1) // there + 1)
            parts = [np.random.default_rng([seed, which, shuffle, 1]).permutation(size) for shuffle in shuffles]
            stream = np.concatenate([part[: there * rows_a_block].reshape(-1, rows_a_block) for part in parts])
            cut = stream[first - shuffles.start * there :][:number]
        blocks.append(_spread(start + cut, block_size, cells))
        start += size
    stacked = np.concatenate(blocks)
    return stacked[generator.permutation(len(stacked))].reshape(-1)


def _spread(blocks: NDArray[np.int64], block_size: int, cells: int) -> NDArray[np.int64]:
    """Blocks of rows as blocks of `block_size` places: equally many rows in each cell, behind them empty places."""
    if blocks.shape[1] == block_size:
        return blocks
    places = np.full((len(blocks), cells, block_size // cells), NO_ROW)
    places[:, :, : blocks.shape[1] // cells] = blocks.reshape(len(blocks), cells, -1)
    return places.reshape(len(blocks), block_size)


class Slots(Dataset[Any]):
    """Rows by the places of an order: None for `NO_ROW`, which `without_empty` takes out of a batch."""

    def __init__(self, rows: Dataset[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]  # torch's class does not say that it has one

    def __getitem__(self, index: int) -> Any:
        return None if index == NO_ROW else self.rows[index]


def without_empty(collate: Callable[[list[Any]], Any], examples: Sequence[Any]) -> Any:
    """What `collate` makes of a batch of `Slots`."""
    return collate([example for example in examples if example is not None])


def blocks_taken(
    sizes: Sequence[int],
    block_size: int,
    weights: Sequence[float],
    temperature: float,
    filled: Sequence[int] | None = None,
) -> list[int]:
    """Blocks of each source that an epoch takes; at least one of each.

    A source's share of the rows grows with its rows to the power of 1 / temperature, times its weight. A weight of 1 at
    temperature 1 is all its whole blocks; at a higher temperature an epoch is as long, and small sources have more.

    Args:
        sizes: rows of each source.
        block_size: places a block.
        weights: of each source.
        temperature: 1 = shares by size; infinite = equal shares.
        filled: places of a block that each source fills; None = all.
    """
    filled = filled or [block_size] * len(sizes)
    there = [size // rows for size, rows in zip(sizes, filled, strict=True)]
    if temperature == 1:
        return [max(1, round(weight * number)) for weight, number in zip(weights, there, strict=True)]
    shares = [(size / max(sizes)) ** (1 / temperature) for size in sizes]
    parts = [rows / block_size for rows in filled]  # of a block
    scale = sum(number * part for number, part in zip(there, parts, strict=True)) / sum(shares)
    wanted = zip(weights, shares, parts, strict=True)
    return [max(1, round(weight * scale * share / part)) for weight, share, part in wanted]


def deal(lengths: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """Places of a group's rows, dealt so that each rank gets equally many rows and nearly equal sums of lengths.

    The longest rows go first, one to each rank in a round, the longest of a round to the rank that holds least.

    The lengths are those of the group's rows, a multiple of `num_ranks` in number. Consecutive places of the result are
    the first rank's, and so on.
    """
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, num_ranks)
    held = np.zeros(num_ranks, dtype=np.int64)
    for dealt in rounds:
        dealt[np.argsort(held, kind="stable")] = dealt.copy()
        held += lengths[dealt]
    return rounds.T.reshape(-1)


class OneSourceBlocks(Sampler[int]):
    """Yields `block_order` for the current epoch, so that consecutive `block_size` rows share a source.

    Args:
        rows: whose sizes decide the blocks.
        block_size: places a block.
        seed: of the run.
        num_ranks: ranks that share the rows; among several, each group of rows that they hold at once is dealt so
            that none waits long for the one with the longest texts.
        rows_a_rank: how many consecutive places go to one rank before the next one's begin; None = its share of a
            block.
        max_characters: what a text counts at most when rows are dealt, as longer ones are cut; None = all of it.
        weights: of each source in the mixture (`blocks_taken`); None = 1.
        temperature: of the mixture.
        own: rows of each source's blocks, where they are fewer than places; None = as many.

    Raises:
        UserError: a source has fewer rows than its blocks, or its blocks cannot be shared out.
    """

    def __init__(
        self,
        rows: SourceRows,
        block_size: int,
        seed: int,
        *,
        num_ranks: int = 1,
        rows_a_rank: int | None = None,
        max_characters: int | None = None,
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        own: Sequence[int | None] | None = None,
    ) -> None:
        places_a_rank = rows_a_rank or block_size // num_ranks
        self.cells = block_size // places_a_rank
        #: Rows of a block of each source.
        self.filled = [number or block_size for number in own or [None] * len(rows.sizes)]
        for source, size, filled in zip(rows.sources, rows.sizes, self.filled, strict=True):
            if filled > block_size or filled % self.cells:
                raise UserError(
                    f"source {source.name!r}: its batch_size is {filled}, but must be at most the run's {block_size} "
                    f"and a multiple of the {self.cells} part(s) into which processes and accumulation cut a batch."
                )
            if size < filled:
                raise UserError(
                    f"source {source.name!r} has {size} rows, fewer than the {filled} of one batch; leave it out of "
                    "`sources`, make the batch smaller, or give the source a `batch_size` of its own in its table."
                )
        self.rows = rows
        self.sizes = rows.sizes
        #: Blocks of each source that an epoch takes.
        self.taken = blocks_taken(rows.sizes, block_size, weights or [1.0] * len(rows.sizes), temperature, self.filled)
        self.block_size = block_size
        self.num_ranks = num_ranks
        self.group_size = num_ranks * places_a_rank
        self.max_characters = max_characters
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields; the trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Places of an epoch, empty ones too."""
        return sum(self.taken) * self.block_size

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(number * filled for number, filled in zip(self.taken, self.filled, strict=True))

    def __iter__(self) -> Iterator[int]:
        return self.rows_from(0)

    def rows_from(self, place: int) -> Iterator[int]:
        """The order from a place on at which a step begins; the rows before it are not looked at."""
        order = block_order(self.sizes, self.block_size, self.seed, self.epoch, self.taken, self.filled, self.cells)[
            place:
        ]
        first = self.epoch * sum(self.sizes) if self.rows.drawn_anew else 0
        if self.num_ranks == 1:  # a list of so many integers would take four times the array's memory
            return map(int, np.where(order == NO_ROW, NO_ROW, first + order))
        dealt = chain.from_iterable(map(self._dealt, order.reshape(-1, self.group_size)))
        return (index if index == NO_ROW else first + index for index in dealt)

    def _dealt(self, group: NDArray[np.int64]) -> list[int]:
        rows = group[group != NO_ROW]
        dealt = rows[deal(self.rows.lengths(rows, self.max_characters), self.num_ranks)]
        places: list[int] = _spread(dealt[None], len(group), self.num_ranks)[0].tolist()
        return places
