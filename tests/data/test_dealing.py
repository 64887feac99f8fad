"""Rows that several ranks hold at once are dealt by length, and nothing but the sharing changes by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from helpers import write_jsonl
from torch.utils.data import BatchSampler

from llm2vec.data.order import OneSourceBlocks, block_order, deal
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source

SIZES = {"a": 120, "b": 70}


@pytest.fixture
def rows(tmp_path: Path) -> TrainingRows:
    """Two sources of ragged rows with one negative each, and a character of several bytes."""
    generator = np.random.default_rng(0)
    for name, size in SIZES.items():
        lengths = generator.lognormal(4, 0.6, (size, 3)).astype(int) + 1
        lines = [{"query": "q" * q, "positive": "é" * p, "negative": ["n" * n]} for q, p, n in lengths.tolist()]
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
    return TrainingRows(tmp_path, [Source(name, f"{name}.jsonl", (Instruction("find"),)) for name in SIZES])


def characters(rows: TrainingRows, index: int) -> int:
    example = rows[index]
    return sum(len(text.text) for text in (example.query, example.positive, *example.negatives))


def test_lengths_are_characters_of_all_texts(rows: TrainingRows, tmp_path: Path) -> None:
    """In any order, of either source, held out or not; with a bound on what a text counts."""
    indices = np.array([150, 121, 189])
    assert rows.lengths(indices).tolist() == [characters(rows, int(i)) for i in indices]
    assert rows.lengths(indices, 7).tolist() == [21] * 3
    apart = TrainingRows(tmp_path, rows.sources, num_negatives=0, num_held_out=20)
    for part in (apart, apart.held_out()):
        assert part.lengths(np.array([3])).tolist() == [characters(part, 3)]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_sums_are_nearly_equal(num_ranks: int) -> None:
    """As many places for each rank, every place once, and the fullest rank at most a few percent above the mean."""
    lengths = np.random.default_rng(1).lognormal(5, 0.5, 16 * num_ranks).astype(np.int64)
    places = deal(lengths, num_ranks)
    assert sorted(places.tolist()) == list(range(len(lengths)))
    sums = lengths[places].reshape(num_ranks, -1).sum(axis=1)
    undealt = lengths.reshape(num_ranks, -1).sum(axis=1)
    assert sums.max() / sums.mean() < 1.04
    assert sums.max() - sums.min() < 0.5 * (undealt.max() - undealt.min())


def test_equal_lengths_leave_the_first_round_in_order() -> None:
    """Ties are broken by place, so the order is one of the arguments alone."""
    assert deal(np.full(6, 3), 2).tolist() == [0, 2, 4, 1, 3, 5]


def test_one_rank_gets_the_order_as_it_was(rows: TrainingRows) -> None:
    sampler = OneSourceBlocks(rows, 12, seed=3, num_ranks=1, rows_a_rank=4)
    assert list(sampler) == block_order(list(SIZES.values()), 12, seed=3, epoch=0).tolist()


@pytest.mark.parametrize(("num_ranks", "rows_a_rank", "accumulation"), [(2, 4, 1), (2, 2, 3), (4, 3, 1), (3, 2, 2)])
def test_ranks_hold_the_same_rows_together_as_without_dealing(
    num_ranks: int, rows_a_rank: int, accumulation: int, rows: TrainingRows
) -> None:
    """Through the trainer's own way of sharing out batches: the same pools, and each rank's part about as long."""
    at_once = num_ranks * rows_a_rank
    block_size = at_once * accumulation

    def held(**arguments: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Rows as [pools, ranks, rows of a rank]."""
        sampler = OneSourceBlocks(rows, block_size, 3, **arguments)
        batches = BatchSampler(sampler, rows_a_rank, drop_last=True)
        shards = [list(BatchSamplerShard(batches, num_ranks, rank)) for rank in range(num_ranks)]
        return np.array(shards).transpose(1, 0, 2)

    plain, dealt = held(), held(num_ranks=num_ranks, rows_a_rank=rows_a_rank)
    assert dealt.shape == plain.shape and not np.array_equal(dealt, plain)
    assert np.array_equal(np.sort(dealt.reshape(-1, at_once)), np.sort(plain.reshape(-1, at_once)))

    def largest_share(pools: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
        sums = np.array([[rows.lengths(part).sum() for part in pool] for pool in pools])
        return float((sums.max(axis=1) / sums.mean(axis=1)).mean())

    assert largest_share(dealt) - 1 < 0.5 * (largest_share(plain) - 1)


def test_dealing_follows_the_epoch(rows: TrainingRows) -> None:
    sampler = OneSourceBlocks(rows, 8, seed=1, num_ranks=2)
    first = list(sampler)
    assert first == list(sampler) and len(first) == len(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
