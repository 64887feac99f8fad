"""Retrieval and reranking through our search: the scores of mteb's own search, equal texts once, bounded memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mteb
import pytest
import torch
from datasets import Dataset
from eval_stubs import FakeModel
from mteb.mocks.mock_tasks import reranking, retrieval
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.types import PromptType
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from llm2vec.corpus import search
from llm2vec.evaluation.jobs import search_shard
from llm2vec.evaluation.mteb_adapter import LLM2VecEncoder
from llm2vec.evaluation.scores import evaluate
from llm2vec.evaluation.search import StreamingSearch
from llm2vec.types import UserError

MOCKS = (
    retrieval.MockRetrievalTask,
    retrieval.MockRetrievalDialogTask,
    retrieval.MockMultilingualRetrievalTask,
    retrieval.MockInstructionRetrieval,
    reranking.MockRerankingTask,
    reranking.MockMultilingualRerankingTask,
    reranking.MockInstructionReranking,
)


class RandomEncoder:
    """A random unit vector for each different text; remembers what it encoded."""

    def __init__(self, dimensions: int = 24) -> None:
        self.dimensions = dimensions
        self.seen: list[tuple[str, list[str]]] = []
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": "test/random", "revision": "1", "similarity_fn_name": ScoringFunction.COSINE}
        )

    def encode(self, inputs: DataLoader[Any], *, prompt_type: PromptType, **rest: Any) -> Tensor:
        texts = [text for batch in inputs for text in batch["text"]]
        self.seen.append((prompt_type.value, texts))
        generators = [torch.Generator().manual_seed(random.Random(text).getrandbits(60)) for text in texts]
        return normalize(torch.stack([torch.randn(self.dimensions, generator=g) for g in generators]), dim=-1)

    def similarity(self, queries: Tensor, documents: Tensor) -> Tensor:
        return queries @ documents.T

    similarity_pairwise = similarity


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 64)
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", 4)


@pytest.fixture
def corpus() -> Dataset:
    return Dataset.from_list([{"id": f"d{i}", "title": "T" * (i % 2), "text": f"document {i}"} for i in range(300)])


@pytest.fixture
def queries() -> Dataset:
    """15 queries of 5 texts."""
    return Dataset.from_list([{"id": f"q{i}", "text": f"query {i % 5}"} for i in range(15)])


def ask(searcher: Any, queries: Dataset, corpus: Dataset, **options: Any) -> dict[str, dict[str, float]]:
    metadata = mteb.get_task("NFCorpus").metadata
    place = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {"batch_size": 8}}
    searcher.index(corpus, **place)
    return searcher.search(queries, **place, **options)


def assert_same(ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> None:
    assert ours.keys() == theirs.keys()
    for query, scores in ours.items():
        assert scores == pytest.approx(theirs[query], abs=1e-6), query


@pytest.mark.parametrize("mock", MOCKS, ids=lambda mock: mock.__name__)
def test_mock_tasks_score_as_through_mtebs_own_search(mock: Callable[[], Any], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    encoder = LLM2VecEncoder(FakeModel(), [tmp_path], {})  # type: ignore[arg-type]
    plain, streaming = (
        mteb.evaluate(model, mock(), cache=None, co2_tracker=False, show_progress_bar=False).task_results[0].scores
        for model in (encoder, StreamingSearch(encoder))
    )
    assert streaming == plain and plain["test"]


def test_hits_are_those_of_mtebs_own_search(small_blocks: None, queries: Dataset, corpus: Dataset) -> None:
    ours, theirs = StreamingSearch(RandomEncoder()), SearchEncoderWrapper(RandomEncoder())  # type: ignore[arg-type]
    assert_same(ask(ours, queries, corpus, top_k=20), ask(theirs, queries, corpus, top_k=20))
    assert_same(ask(ours, queries, corpus, top_k=1000), ask(theirs, queries, corpus, top_k=1000))


def test_candidates_score_as_in_mtebs_own_search(small_blocks: None, queries: Dataset, corpus: Dataset) -> None:
    draw = random.Random(0)
    ranked = {f"q{i}": draw.sample([f"d{j}" for j in range(250)], 40) for i in range(14)} | {"q14": []}
    del ranked["q3"]
    encoder = RandomEncoder()
    ours, theirs = StreamingSearch(encoder), SearchEncoderWrapper(RandomEncoder())  # type: ignore[arg-type]
    for k in (10, 1000):
        assert_same(
            ask(ours, queries, corpus, top_k=k, top_ranked=ranked),
            ask(theirs, queries, corpus, top_k=k, top_ranked=ranked),
        )
    encoded = {text for side, texts in encoder.seen if side == "document" for text in texts}
    assert len(encoded) == len({d for listed in ranked.values() for d in listed}), "only what is listed"


@pytest.mark.parametrize("listed", [["d1", "d300", "d999"], ["d300"]], ids=str)
def test_a_candidate_that_the_corpus_lacks_is_named(queries: Dataset, corpus: Dataset, listed: list[str]) -> None:
    with pytest.raises(UserError, match="corpus lacks documents that are listed for reranking: d300"):
        ask(StreamingSearch(RandomEncoder()), queries, corpus, top_k=2, top_ranked={"q0": listed})  # type: ignore[arg-type]


def test_equal_queries_are_encoded_once_and_answered_each(queries: Dataset, corpus: Dataset) -> None:
    for ranked in (None, {f"q{i}": ["d1", f"d{i + 2}"] for i in range(15)}):
        encoder = RandomEncoder()
        results = ask(StreamingSearch(encoder), queries, corpus, top_k=10, top_ranked=ranked)  # type: ignore[arg-type]
        assert [len(texts) for side, texts in encoder.seen if side == "query"] == [5]
        assert results["q0"]["d1" if ranked else next(iter(results["q5"]))] == next(iter(results["q5"].values()))
        results["q0"].clear()
        assert results["q5"], "mteb removes entries in place"


def test_vectors_are_scored_where_the_model_computes(
    queries: Dataset, corpus: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where that was asked for on a machine with a GPU."""
    encoder: Any = RandomEncoder()
    encoder.model = nn.Linear(1, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(ask(StreamingSearch(encoder), queries, corpus, top_k=3)) == len(queries)
    assert ask(StreamingSearch(encoder), queries, corpus, top_k=1, top_ranked={"q0": ["d1"]})["q0"]


@pytest.mark.parametrize("num_shards", [1, 3, 9])
def test_shards_give_the_hits_of_a_single_pass(
    small_blocks: None, queries: Dataset, corpus: Dataset, num_shards: int, tmp_path: Path
) -> None:
    def task(corpus: Dataset = corpus) -> Any:
        made = retrieval.MockRetrievalTask()
        relevant = {f"q{i}": {f"d{i}": 1} for i in range(10)}  # the others are not judged: mteb leaves them out
        rows = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
        made.dataset = {"default": {split: dict(rows) for split in made.eval_splits}}
        made.data_loaded = True
        return made

    encoder: Any = RandomEncoder()
    shards = [search_shard(encoder, task(), shard, num_shards, batch_size=8) for shard in range(num_shards)]
    found = {name: search.merge([shard[name] for shard in shards], 1000) for name in shards[0]}
    assert {tuple(keys.shape) for keys in found.values()} == {(5, 1000)}
    encoder.seen.clear()
    merged = evaluate(encoder, [task()], tmp_path / "a", found=found)
    assert not encoder.seen, "the merge encodes nothing"
    single = evaluate(encoder, [task()], tmp_path / "b")
    assert [score["scores"] for score in merged.values()] == [score["scores"] for score in single.values()]
    with pytest.raises(UserError, match="changed while it was searched"):
        evaluate(encoder, [task(corpus.select(range(299)))], tmp_path / "c", found=found)


@pytest.mark.slow
def test_two_million_documents_need_no_more_memory_than_the_first_blocks(tmp_path: Path) -> None:
    """Memory of the process's own, files that the system may drop aside, at each block of a corpus on disk."""
    used: list[int] = []

    class Stub(RandomEncoder):
        def encode(self, inputs: DataLoader[Any], *, prompt_type: PromptType, **rest: Any) -> Tensor:
            used.append(own_memory())
            rows = torch.arange(len(inputs.dataset), dtype=torch.float32) + len(used)  # type: ignore[arg-type]
            return torch.stack([rows.sin(), rows.cos(), (2 * rows).sin(), (3 * rows).cos()], dim=1)

    def rows() -> Iterator[dict[str, str]]:
        for i in range(2_000_000):
            yield {"id": f"d{i}", "title": "", "text": f"document {i}"}

    corpus = Dataset.from_generator(rows, cache_dir=str(tmp_path))
    queries = Dataset.from_list([{"id": f"q{i}", "text": f"query {i}"} for i in range(50)])
    results = ask(StreamingSearch(Stub()), queries, corpus, top_k=1000)  # type: ignore[arg-type]
    assert {len(hits) for hits in results.values()} == {1000}
    early, late = max(used[5:50]), max(used[50:])
    assert len(used) == 1 + len(search.blocks(2_000_000)) and late - early < 32 << 20


def own_memory() -> int:
    """Bytes of memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")
