"""The NanoBEIR probe scores what it says, with instructions on queries only, and fails in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl

from llm2vec.llm2vec import LLM2Vec
from llm2vec.probes.nano_beir import INSTRUCTIONS, NanoBeirProbe
from llm2vec.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SETS = {"msmarco": "NanoMSMARCO", "nq": "NanoNQ"}
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sets in the hub's layout: in the first, every query is its document; in the second, its document is last."""
    configs = []
    for subset in ("corpus", "queries", "qrels"):
        configs += [f"- config_name: {subset}", "  data_files:"]
        for split in SETS.values():
            configs += [f"  - split: {split}", f"    path: {subset}/{split}.jsonl"]
    (tmp_path / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", ""]), encoding="utf-8")
    for split in SETS.values():
        documents = [{"_id": f"d{i}", "text": f"text number {i} of many"} for i in range(12)]
        queries = [{"_id": f"q{i}", "text": documents[i]["text"]} for i in range(3)]
        for subset in ("corpus", "queries", "qrels"):
            (tmp_path / subset).mkdir(exist_ok=True)
        write_jsonl(tmp_path / "corpus" / f"{split}.jsonl", documents)
        write_jsonl(tmp_path / "queries" / f"{split}.jsonl", queries)
        relevant = [{"query-id": f"q{i}", "corpus-id": f"d{i}" if split == "NanoMSMARCO" else "d11"} for i in range(3)]
        write_jsonl(tmp_path / "qrels" / f"{split}.jsonl", relevant)
    return tmp_path


class Recording(LLM2Vec):
    """Vectors that depend on the text alone, so that a query finds the document of the same words."""

    seen: list[tuple[str, str]]

    def encode(self, sentences: Any, *_: Any, **__: Any) -> Any:
        self.seen += [(instruction, text) for instruction, text in sentences]
        number = torch.tensor([float(text.split()[2]) for _, text in sentences])
        return torch.stack([torch.cos(number / 12), torch.sin(number / 12)], dim=1)


def recording() -> Recording:
    model = Recording(tiny_model("llama", False, torch.float32), family_tokenizer("llama"), "last")
    model.seen = []
    return model


def test_scores_of_each_set_and_their_mean(folder: Path) -> None:
    """Found at rank 1: nDCG 1. Ranked behind the first ten: nDCG 0."""
    scores = NanoBeirProbe(recording(), str(folder), list(SETS), 4, CPU)()
    assert scores == pytest.approx({
        "nano_msmarco_ndcg_at_10": 1.0, "nano_nq_ndcg_at_10": 0.0, "nano_beir_ndcg_at_10": 0.5,
    })  # fmt: skip


def test_queries_carry_the_instruction_and_documents_none(folder: Path) -> None:
    model = recording()
    NanoBeirProbe(model, str(folder), ["nq"], 4, CPU)()
    with_instruction = [text for instruction, text in model.seen if instruction]
    assert {instruction for instruction, _ in model.seen} == {"", INSTRUCTIONS["nq"]}
    assert len(with_instruction) == 3 and len(model.seen) == 15


def test_ranks_share_the_sets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2 takes every second set; the others' scores come from the sum over ranks."""
    monkeypatch.setattr("llm2vec.probes.nano_beir.rank", lambda: 1)
    monkeypatch.setattr("llm2vec.probes.nano_beir.world_size", lambda: 2)
    added: list[Sequence[float]] = []

    def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
        added.append(values.tolist())
        return values + torch.tensor([1.0, 0.0])

    monkeypatch.setattr("llm2vec.probes.nano_beir.sum_over_ranks", sum_over_ranks)
    scores = NanoBeirProbe(recording(), str(folder), list(SETS), 4, CPU)()
    assert added == [[0.0, 0.0]]
    assert scores["nano_msmarco_ndcg_at_10"] == 1.0


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nano_beir: .*nowhere.* cannot be read .*local copy"):
        NanoBeirProbe(recording(), str(tmp_path / "nowhere"), ["nq"], 4, CPU)


def test_instructions_are_those_of_the_papers_table() -> None:
    """Without the colon that the evaluation's table has, as training writes them."""
    assert len(INSTRUCTIONS) == 13
    assert INSTRUCTIONS["nq"] == "Given a question, retrieve Wikipedia passages that answer the question"
    assert not [text for text in INSTRUCTIONS.values() if text.endswith(":")]
