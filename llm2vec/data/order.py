"""The order of rows in an epoch: blocks of one source, shuffled; among several ranks, dealt by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from llm2vec.data.sources import Source
from llm2vec.types import UserError


class SourceRows(Protocol):
    """Rows by one running index, source after source, as far as their order goes.

    Attributes:
        sources: where they are from.
        sizes: rows of each source.
        drawn_anew: whether a row is drawn anew in each epoch; row i of epoch e is then asked for as e * len(rows) + i,
            so that it does not matter which process asks.
    """

    sources: list[Source]
    sizes: list[int]
    drawn_anew: bool

    def lengths(
        self, indices: np.ndarray[Any, np.dtype[np.int64]], most: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """About how long some rows are, all of one source; `most` = what a text counts at most."""
        ...


def block_order(sizes: Sequence[int], block_size: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Row indices of one epoch: blocks of `block_size` rows, each from one source, in random order.

    Rows are shuffled within their source and cut into blocks, incomplete blocks are dropped, and the blocks are
    shuffled. A pure function of its arguments.

    Args:
        sizes: rows of each source; row indices run through the sources in this order.
        block_size: rows a block.
        seed: of the run.
        epoch: counted from 0.
    """
    generator = np.random.default_rng([seed, epoch])
    blocks = []
    start = 0
    for size in sizes:
        order = start + generator.permutation(size)
        blocks.append(order[: size - size % block_size].reshape(-1, block_size))
        start += size
    stacked = np.concatenate(blocks)
    return stacked[generator.permutation(len(stacked))].reshape(-1)


def deal(lengths: np.ndarray[Any, np.dtype[np.int64]], num_ranks: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Places of a group's rows, dealt so that each rank gets equally many rows and nearly equal sums of lengths.

    The longest rows go first, one to each rank in a round, the longest of a round to the rank that holds least.

    Args:
        lengths: of the group's rows, a multiple of `num_ranks` in number.
        num_ranks: how many ranks share the group: consecutive places of the result are the first rank's, and so on.
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
        block_size: rows a block.
        seed: of the run.
        num_ranks: ranks that share the rows; among several, each group of rows that they hold at once is dealt so
            that none waits long for the one with the longest texts.
        rows_a_rank: how many consecutive rows go to one rank before the next one's begin; None = its share of a block.
        max_characters: what a text counts at most when rows are dealt, as longer ones are cut; None = all of it.

    Raises:
        UserError: a source has fewer rows than a block.
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
    ) -> None:
        for source, size in zip(rows.sources, rows.sizes, strict=True):
            if size < block_size:
                raise UserError(
                    f"source {source.name!r} has {size} rows, fewer than the {block_size} of one batch; "
                    "leave it out of `sources` or make the batch smaller."
                )
        self.rows = rows
        self.sizes = rows.sizes
        self.block_size = block_size
        self.num_ranks = num_ranks
        self.group_size = num_ranks * (rows_a_rank or block_size // num_ranks)
        self.max_characters = max_characters
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields; the trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(size - size % self.block_size for size in self.sizes)

    def __iter__(self) -> Iterator[int]:
        return self.rows_from(0)

    def rows_from(self, place: int) -> Iterator[int]:
        """The order from a place on at which a step begins; the rows before it are not looked at."""
        order = block_order(self.sizes, self.block_size, self.seed, self.epoch)[place:]
        first = self.epoch * sum(self.sizes) if self.rows.drawn_anew else 0
        if self.num_ranks == 1:
            return map(int, first + order)  # a list of so many integers would take four times the array's memory
        dealt = chain.from_iterable(map(self._dealt, order.reshape(-1, self.group_size)))
        return (first + index for index in dealt)

    def _dealt(self, group: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
        dealt: list[int] = group[deal(self.rows.lengths(group, self.max_characters), self.num_ranks)].tolist()
        return dealt
