"""Sources mixed by weights: what an epoch takes of each, and that every row comes equally often."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_jsonl

from llm2vec.data.order import NO_ROW, OneSourceBlocks, block_order, blocks_taken
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import read_sources_file
from llm2vec.training.rows import describe_mixture
from llm2vec.types import UserError

SIZES, BLOCK = [21, 8, 50], 4


def test_neutral_values_are_the_order_of_old() -> None:
    """To the bit: weights of 1 at temperature 1, and whole sources that are named so."""
    there = blocks_taken(SIZES, BLOCK, [1, 1, 1], 1)
    assert there == [5, 2, 12]
    for epoch in range(3):
        assert np.array_equal(block_order(SIZES, BLOCK, 7, epoch), block_order(SIZES, BLOCK, 7, epoch, there))


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [
        ([2, 0.5, 1], 1, [10, 1, 12]),
        ([1, 1, 1], 1e9, [6, 6, 6]),
        ([1, 3, 1], 1e9, [6, 19, 6]),
        # 21^.5, 8^.5 and 50^.5, of 19 blocks in all
        ([1, 1, 1], 2, [6, 4, 9]),
        ([0.001, 1, 1], 1, [1, 2, 12]),
    ],
)
def test_shares_by_hand(weights: list[float], temperature: float, expected: list[int]) -> None:
    assert blocks_taken(SIZES, BLOCK, weights, temperature) == expected


def test_every_row_comes_equally_often() -> None:
    """A source of which an epoch takes 3 of 2 blocks, and one of which it takes 3 of 5: after 10 epochs all rows that a
    shuffle keeps were seen as often, none twice in a block, and an epoch depends on nothing but seed and number."""
    taken = [3, 3, 12]
    seen: Counter[int] = Counter()
    for epoch in range(10):
        order = block_order(SIZES, BLOCK, 7, epoch, taken)
        assert len(order) == sum(taken) * BLOCK
        blocks = order.reshape(-1, BLOCK)
        assert all(len(set(block)) == BLOCK for block in blocks.tolist())
        starts = np.searchsorted(np.cumsum(SIZES), blocks, side="right")
        assert (starts == starts[:, :1]).all() and Counter(starts[:, 0].tolist()) == dict(enumerate(taken))
        assert np.array_equal(order, block_order(SIZES, BLOCK, 7, epoch, taken))
        seen.update(order.tolist())
    assert {seen[row] for row in range(21, 29)} == {15}  # 8 rows, 2 blocks a shuffle, 30 blocks in all
    assert sum(seen[row] for row in range(21)) == 10 * 3 * BLOCK and max(seen[row] for row in range(21)) <= 6
    assert not np.array_equal(block_order(SIZES, BLOCK, 7, 0, taken), block_order(SIZES, BLOCK, 8, 0, taken))


def rows_of(folder: Path, **entries: dict[str, Any]) -> TrainingRows:
    for name in entries:
        rows = [{"query": f"{name}{i}", "positive": [f"d{i}", f"e{i}", f"f{i}"], "negative": "n"} for i in range(12)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    columns = {"columns": {"query": "query", "positive": "positive", "negative": "negative"}}
    table = {name: {"file": f"{name}.jsonl", **columns, **entry} for name, entry in entries.items()}
    (folder / "sources.json").write_text(json.dumps(table), encoding="utf-8")
    return TrainingRows(folder, read_sources_file(folder / "sources.json"))


def test_caps_and_what_is_said(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, a={"max_rows": 8}, b={"weight": 0.5})
    assert rows.sizes == [8, 36]
    weights = [source.reading.weight for source in rows.sources]
    order = OneSourceBlocks(rows, BLOCK, 1, weights=weights)
    assert len(order) == len(list(order)) == 8 + 16
    assert describe_mixture(order) == [
        "mixture     a 33.3%, b 66.7% (0.44 times its rows) of an epoch's 24 rows"
    ]  # fmt: skip


def test_drawn_positives_take_turns(tmp_path: Path) -> None:
    """One row of each record; from epoch to epoch another positive, and in an epoch not the same place of all lists."""
    rows = rows_of(tmp_path, a={"positives": "drawn"}, b={})
    assert rows.sizes == [12, 36] and rows.drawn_anew
    order = OneSourceBlocks(rows, BLOCK, 1)
    drawn: dict[str, set[str]] = {}
    for epoch in range(3):
        order.set_epoch(epoch)
        indices = list(order)
        of_epoch = {rows[i].query.text: rows[i].positive.text for i in indices if rows[i].source == "a"}
        assert len(of_epoch) == 12 and {text[0] for text in of_epoch.values()} == set("def")
        assert all(query[1:] == positive[1:] for query, positive in of_epoch.items())
        assert all(rows.place(i)[1] <= 12 for i in indices)
        for query, positive in of_epoch.items():
            drawn.setdefault(query, set()).add(positive)
    assert all(len(positives) == 3 for positives in drawn.values())


# A batch size of a source's own


@pytest.mark.parametrize(("num_ranks", "rows_a_rank", "cells"), [(1, None, 1), (1, 4, 2), (2, 4, 2), (2, 2, 4)])
def test_a_smaller_batch_leaves_places_empty(
    num_ranks: int, rows_a_rank: int | None, cells: int, tmp_path: Path
) -> None:
    """In each micro-batch of each rank equally many. Every row comes once an epoch, a block has rows of one source, and
    the blocks are those of a run whose batches are as small."""
    rows = rows_of(tmp_path, a={"batch_size": 4, "max_rows": 6}, b={})
    own = [source.reading.batch_size for source in rows.sources]
    order = OneSourceBlocks(rows, 8, 3, num_ranks=num_ranks, rows_a_rank=rows_a_rank, own=own)
    assert order.taken == [1, 4] and order.num_rows == 36 and len(order) == 40 and order.cells == cells
    for epoch in range(2):
        order.set_epoch(epoch)
        places = np.array(list(order))
        assert list(order.rows_from(16)) == places[16:].tolist()
        real = places[places != NO_ROW]
        assert len(set(real.tolist())) == 36
        for block in places.reshape(-1, 8):
            held = block[block != NO_ROW]
            assert len({index < 6 for index in held.tolist()}) == 1 and len(held) == (4 if held[0] < 6 else 8)
            assert {int((cell != NO_ROW).sum()) for cell in block.reshape(cells, -1)} == {len(held) // cells}
    alone = rows_of(tmp_path, a={"batch_size": 4})
    order = OneSourceBlocks(alone, 8, 3, num_ranks=num_ranks, rows_a_rank=rows_a_rank, own=[4])
    small = OneSourceBlocks(alone, 4, 3, num_ranks=num_ranks, rows_a_rank=rows_a_rank and 4 // cells)
    assert [index for index in order if index != NO_ROW] == list(small)


def test_shares_of_sources_with_batches_of_their_own() -> None:
    """Of rows, not of steps."""
    assert blocks_taken(SIZES, BLOCK, [1, 1, 1], 1, [4, 2, 1]) == [5, 4, 50]
    # 20, 8 and 50 rows in equal shares of 26
    assert blocks_taken(SIZES, BLOCK, [1, 1, 1], 1e9, [2, 2, 1]) == [13, 13, 26]


def test_what_is_said_of_batches_of_their_own(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, a={"batch_size": 2, "max_rows": 3}, b={})
    assert describe_mixture(OneSourceBlocks(rows, 4, 1, own=[2, None])) == [
        "mixture     a 5.3% in batches of 2, b 94.7% of an epoch's 38 rows"
    ]
    for own, ranks in ((8, 1), (3, 2)):
        with pytest.raises(
            UserError, match=rf"source 'a': its batch_size is {own}, but must be at most the run's 4 and"
        ):
            OneSourceBlocks(rows, 4, 1, num_ranks=ranks, own=[own, None])
    with pytest.raises(
        UserError, match=r"source 'a' has 3 rows, fewer than the 4 of one batch; .* a `batch_size` of its"
    ):
        OneSourceBlocks(rows, 4, 1, own=[None, 2])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a whole number above 0"),
        ({"weight": 0}, "`weight` must be a number above 0, at most 1,000"),
        ({"weight": "2"}, "`weight` must be a number"),
        ({"max_rows": 0}, "`max_rows` must be a whole number above 0"),
        ({"positives": "all"}, "`positives` must be"),
    ],
    ids=str,
)
def test_a_wrong_mixture_is_said(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, a=keys)


def test_a_source_smaller_than_a_batch_is_refused_at_any_weight(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, a={"max_rows": 3, "weight": 10})
    with pytest.raises(UserError, match="source 'a' has 3 rows, fewer than the 4 of one batch"):
        OneSourceBlocks(rows, BLOCK, 1, weights=[10])
