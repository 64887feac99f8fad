"""Exact search over a stream of blocks: the order of hits, ties above all, and what merging and memory have to hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llm2vec.corpus import search
from llm2vec.corpus.search import FREE, blocks, from_keys, merge, rerank, to_keys, top_k
from llm2vec.types import UserError


def dot(queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
    return queries_QD @ documents_ND.T


def stream(documents_ND: Tensor, ranges: list[range]) -> Iterator[tuple[int, Tensor]]:
    for block in ranges:
        yield block.start, documents_ND[block.start : block.stop]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 16)
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", 5)


def few_values(rows: int, dimensions: int = 3) -> Tensor:
    """Vectors of small whole numbers: most scores are those of many documents."""
    return torch.randint(-2, 3, (rows, dimensions)).float()


def test_keys_sort_like_scores_and_give_them_back() -> None:
    scores = torch.tensor([[-float("inf"), -1.5, -1e-40, 0.0, 1e-40, 0.1, 3.0, float("inf")]])
    keys = to_keys(scores, 7)
    assert torch.equal(keys.argsort(dim=1), torch.arange(8)[None])
    back, numbers = from_keys(keys)
    assert torch.equal(back, scores) and torch.equal(numbers, torch.arange(7, 15)[None])


def test_among_equal_scores_the_earlier_document_is_first() -> None:
    keys = merge([to_keys(torch.tensor([[1.0, 2.0, 0.0, 1.0]]), 4), to_keys(torch.tensor([[1.0, -0.0]]), 0)], 6)
    assert from_keys(keys)[1].tolist() == [[5, 0, 4, 7, 1, 6]]


def test_the_last_document_number_fits() -> None:
    last = search.MAX_DOCUMENTS - 2
    assert from_keys(to_keys(torch.tensor([[-3.0, 5.0]]), last))[1].tolist() == [[last, last + 1]]


def test_hits_equal_a_stable_sort_of_all_scores(small_blocks: None) -> None:
    queries, documents = few_values(12), few_values(157)
    scores, numbers = from_keys(top_k(queries, stream(documents, blocks(157)), dot, 40))
    best = dot(queries, documents).sort(dim=1, descending=True, stable=True)
    assert torch.equal(numbers, best.indices[:, :40]) and torch.equal(scores, best.values[:, :40])
    assert (scores[:, 1:] == scores[:, :-1]).float().mean() > 0.8, "the test needs ties"


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 10, 25])
def test_merged_shards_are_the_single_pass_bit_for_bit(small_blocks: None, num_shards: int) -> None:
    for queries, documents in ((few_values(12), few_values(157)), (torch.randn(12, 32), torch.randn(157, 32))):
        whole = top_k(queries, stream(documents, blocks(157)), dot, 40)
        parts = [
            top_k(queries, stream(documents, blocks(157, shard, num_shards)), dot, 40) for shard in range(num_shards)
        ]
        assert torch.equal(merge(parts, 40), whole)
        assert torch.equal(merge(parts[::-1], 40), whole), "whichever comes first"


def test_shards_hold_whole_blocks_each_once_and_in_order(small_blocks: None) -> None:
    for documents in (0, 1, 16, 17, 160):
        for num_shards in (1, 3, 4, 20):
            held = [block for shard in range(num_shards) for block in blocks(documents, shard, num_shards)]
            assert held == blocks(documents)
    assert [len(block) for block in blocks(40)] == [16, 16, 8]


def test_a_small_corpus_leaves_places_free() -> None:
    keys = top_k(torch.ones(1, 2), [(0, torch.ones(3, 2))], dot, 5)
    assert keys[0, 3:].tolist() == [FREE, FREE] and from_keys(keys)[1].tolist() == [[0, 1, 2, -1, -1]]
    assert from_keys(top_k(torch.ones(1, 2), [], dot, 2))[1].tolist() == [[-1, -1]]


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match="not a number"):
        top_k(torch.ones(1, 1), [(0, torch.tensor([[float("nan")]]))], dot, 1)
    with pytest.raises(UserError, match="not a number"):
        list(rerank(torch.ones(1, 1), torch.tensor([[float("nan")]]), dot, [(0, "q", ["d"])], {"d": 0}, 1))


def test_candidates_are_scored_and_cut_in_their_order(small_blocks: None) -> None:
    queries, documents = few_values(13), few_values(9)
    names = {f"d{row}": row for row in range(9)}
    listed = ["d3", "d0", "d8", "d5"]
    candidates = [(row, f"q{row}{twin}", listed) for row in range(13) for twin in "ab"]
    results = dict(rerank(queries, documents, dot, candidates, names, 3))
    assert len(results) == 26
    for row, name, _ in candidates:
        scores = {d: float(queries[row] @ documents[names[d]]) for d in listed}
        kept = sorted(listed, key=lambda d: (-scores[d], listed.index(d)))[:3]
        assert results[name] == {d: scores[d] for d in kept}
    everything = dict(rerank(queries, documents, dot, [(12, "q", listed)], names, 4))
    assert list(everything["q"]) == listed


def test_one_block_is_held_at_a_time() -> None:
    """40,960 documents that a generator makes; none of their vectors outlives its block."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def corpus() -> Iterator[tuple[int, Tensor]]:
        nonlocal most
        for block in blocks(40_960):
            vectors = torch.randn(len(block), 16)
            alive.add(vectors)
            most = max(most, len(alive))
            yield block.start, vectors

    keys = top_k(torch.randn(20, 16), corpus(), dot, 100)
    assert keys.shape == (20, 100) and most == 2, "the block at work and the one being made"


@pytest.mark.gpu
def test_a_gpu_finds_the_same_hits() -> None:
    queries, documents = few_values(3000), few_values(20_000)
    on_cpu = top_k(queries, stream(documents, blocks(20_000)), dot, 1000)
    on_gpu = top_k(queries.cuda(), stream(documents, blocks(20_000)), dot, 1000)
    assert torch.equal(on_gpu.cpu(), on_cpu)
