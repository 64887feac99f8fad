"""Any model: how it is told apart, what it is called, where its prompts come from, and what it costs to run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import mteb
import pytest
import torch
from datasets import Dataset
from eval_stubs import CALM, STORM, evaluated, make_sentence_transformer
from helpers import family_tokenizer, tiny_model
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from llm2vec.choice import ModelChoice
from llm2vec.evaluation import models as eval_models
from llm2vec.evaluation.cost import Cost, longest, num_documents, task_cost
from llm2vec.evaluation.models import EvaluatedModel, kind_of, load_encoder
from llm2vec.evaluation.mteb_adapter import LLM2VecEncoder, find_task
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.settings import EncoderSettings
from llm2vec.types import UserError

ROOT = Path(__file__).parents[2]


def encode(encoder: Any, task: str, side: PromptType | None, texts: list[str]) -> torch.Tensor:
    inputs = DataLoader(Dataset.from_dict({"text": texts}), batch_size=2)  # type: ignore[arg-type]
    place = {"task_metadata": mteb.get_task(task).metadata, "hf_split": "test", "hf_subset": "default"}
    return torch.as_tensor(encoder.encode(inputs, **place, prompt_type=side, batch_size=4))


def test_models_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules.json").touch()
    assert kind_of(evaluated(str(tmp_path))) == "sentence-transformers"
    assert kind_of(evaluated(str(tmp_path), ("adapter",))) == "llm2vec"
    (tmp_path / "llm2vec_config.json").touch()
    assert kind_of(evaluated(str(tmp_path))) == "llm2vec", "one of ours, exported"
    for name in ("BAAI/bge-large-en-v1.5", "intfloat/e5-mistral-7b-instruct", "GritLM/GritLM-7B", "BAAI/bge-en-icl"):
        assert kind_of(evaluated(name)) == "mteb"
    assert kind_of(evaluated("McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised")) == "llm2vec"
    files = {"hkunlp/instructor-xl": {"modules.json"}, "me/ours": {"llm2vec_config.json", "modules.json"}}
    monkeypatch.setattr(eval_models, "find_file", lambda path, name: name if name in files.get(path, ()) else None)
    assert kind_of(evaluated("hkunlp/instructor-xl")) == "sentence-transformers"
    assert kind_of(evaluated("me/ours")) == kind_of(evaluated("meta-llama/Llama-3.2-1B")) == "llm2vec"


def test_a_published_chain_is_loaded_as_its_two_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    def from_pretrained(base: str, **options: Any) -> None:
        loaded.append((base, options["peft_model_name_or_path"], options["template"]))
        raise UserError("enough")

    monkeypatch.setattr(eval_models.LLM2Vec, "from_pretrained", from_pretrained)
    table = str(ROOT / "test_configs/mteb/task_to_instructions.json")
    for name in (name for name in mteb.models.model_implementations.MODEL_REGISTRY if "/LLM2Vec-" in name):
        with pytest.raises(UserError, match="enough"):
            load_encoder(evaluated(name, instructions_file=table))
        base, adapters, template = loaded[-1]
        assert template is None and adapters == [name] and name.startswith(f"{base}-") and base.endswith("-mntp")
    assert len(loaded) == 8
    llama31 = "McGill-NLP/LLM2Vec-Meta-Llama-31-8B-Instruct-mntp"
    monkeypatch.setattr(eval_models, "kind_of", lambda _: "llm2vec")
    for choice, template in (
        (evaluated(llama31), "plain"),  # as docs/migration.md says
        (evaluated(f"{llama31}-supervised"), "plain"),
        (evaluated(llama31, (f"{llama31}-supervised",)), "plain"),
        (evaluated(llama31, ("output/mine",)), None),
        (evaluated(f"{llama31}-supervised", template="llama3"), "llama3"),
        (evaluated("output/mine", template="qwen2"), "qwen2"),
    ):
        with pytest.raises(UserError, match="enough"):
            load_encoder(choice)
        assert loaded[-1][2] == template


def test_local_sentence_transformers_do_not_collide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (make_sentence_transformer(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1)))
    table = tmp_path / "prompts.json"
    table.write_text('{"STS12": "p: "}')
    with caplog.at_level(logging.INFO, "llm2vec"):
        metas = [
            load_encoder(choice).mteb_model_meta
            for choice in (
                evaluated(str(first)),
                evaluated(str(second)),
                evaluated(str(first), max_length=32),
                evaluated(str(first), torch_dtype="bfloat16"),
                evaluated(str(first), instructions_file=str(table)),
            )
        ]
    assert {meta.name for meta in metas} == {"a/model", "b/model"} and len({meta.revision for meta in metas}) == 5
    assert [meta.max_tokens for meta in metas] == [64, 64, 32, 64, 64]
    assert "a/model, loaded by sentence-transformers, with its own prompts; revision" in caplog.text
    assert f"prompts of {table}" in caplog.text
    assert load_encoder(evaluated(str(first))).mteb_model_meta.revision == metas[0].revision


def test_a_table_replaces_a_models_own_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, table = make_sentence_transformer(tmp_path), tmp_path / "prompts.json"
    table.write_text(
        json.dumps({"NFCorpus": "find: ", "SciFact": "see: ", "SciFact-document": "fact: ", "STS12": "sts: "})
    )
    plain = SentenceTransformer(str(folder), device="cpu")
    own, prompted = (load_encoder(evaluated(str(folder), instructions_file=file)) for file in (None, str(table)))
    query, document = PromptType.query, PromptType.document

    def expected(prompt: str) -> torch.Tensor:
        return torch.as_tensor(plain.encode([prompt + text for text in (CALM, STORM)]))

    for encoder, task, side, prompt in (
        (own, "NFCorpus", query, "own: "),
        (own, "NFCorpus", document, ""),
        (own, "STS12", None, ""),
        (prompted, "NFCorpus", query, "find: "),
        (prompted, "NFCorpus", document, ""),
        (prompted, "SciFact", document, "fact: "),
        (prompted, "STS12", None, "sts: "),
        (prompted, "ArguAna", query, "own: "),
    ):
        assert torch.allclose(encode(encoder, task, side, [CALM, STORM]), expected(prompt), atol=1e-5), (task, side)
    assert caplog.text.count("No prompt is given for task ArguAna: using the model's own") == 1


def test_a_table_before_a_model_that_has_no_prompts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, table = make_sentence_transformer(tmp_path), tmp_path / "prompts.json"
    table.write_text('{"STS12": "p: "}')
    said = f"instructions of {table} are put before the texts of {folder}, which has no prompts of its own"
    load_encoder(evaluated(str(folder), instructions_file=str(table)))
    assert said not in caplog.text
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config | {"prompts": {"query": ""}}))
    load_encoder(evaluated(str(folder)))
    assert said not in caplog.text
    load_encoder(evaluated(str(folder), instructions_file=str(table)))
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize(
    "option",
    [
        {"max_length": 32},
        {"torch_dtype": "float16"},
        {"instructions_file": "x"},
        {"attn_implementation": "sdpa"},
        {"template": "plain"},
        {"settings_file": "x"},
    ],
)
def test_an_option_without_effect_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(option))} has no effect on BAAI/bge-large-en-v1.5"):
        load_encoder(evaluated("BAAI/bge-large-en-v1.5", **option))


@pytest.mark.parametrize("option", ["template", "settings_file"])
def test_how_texts_are_read_has_no_effect_on_sentence_transformers(option: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").touch()
    with pytest.raises(UserError, match=rf"^{option} has no effect on .*sentence-transformers decides"):
        load_encoder(evaluated(str(tmp_path), **{option: "plain"}))


def test_a_bare_base_is_read_by_the_settings_it_is_given(tmp_path: Path) -> None:
    """Its vectors are those of `from_pretrained` with the same words, and its revision tells the two ways apart."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    settings = {"pooling_mode": "last", "attention": "causal", "doc_max_length": 4, "skip_instruction": False}
    (tmp_path / "how.json").write_text(json.dumps({**settings, "template": "llama3"}), encoding="utf-8")
    asked = {"instructions_file": str(ROOT / "test_configs/mteb/task_to_instructions.json"), "max_length": 32}
    bare, given = (
        load_encoder(EvaluatedModel(ModelChoice(str(tmp_path / "base"), torch_dtype="float32"), **asked, **how))
        for how in ({}, {"settings_file": str(tmp_path / "how.json")})
    )
    assert bare.model.settings == EncoderSettings(template="llama3", max_length=32)
    assert given.model.settings == EncoderSettings(**settings, template="llama3", max_length=32)
    assert bare.mteb_model_meta.revision != given.mteb_model_meta.revision


def test_a_model_that_cannot_be_had_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"mteb knows the model BAAI/bge-small-en-v1\.5 but cannot load it: "):
        load_encoder(evaluated("BAAI/bge-small-en-v1.5"))
    monkeypatch.setattr(eval_models, "kind_of", lambda _: "sentence-transformers")
    with pytest.raises(UserError, match="sentence-transformers cannot load no/such-model: "):
        load_encoder(evaluated("no/such-model"))


def test_vectors_are_those_of_our_own_encode(tmp_path: Path) -> None:
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path)
    family_tokenizer("llama").save_pretrained(tmp_path)
    model = LLM2Vec.from_pretrained(str(tmp_path), pooling_mode="last", enable_bidirectional=False)
    encoder = LLM2VecEncoder(model, [tmp_path], {"NFCorpus": "find it:"})
    texts = [CALM, STORM, "a", f"{CALM} {STORM} {CALM}", "wind"]
    for side, instruction in ((PromptType.query, "find it:"), (PromptType.document, "")):
        expected = model.encode([[instruction, text] for text in texts], batch_size=4)
        assert torch.equal(encode(encoder, "NFCorpus", side, texts), torch.as_tensor(expected))


# --- cost ---


def test_costs_come_from_mtebs_statistics() -> None:
    cost = task_cost(find_task("NFCorpus"))
    documents = 3593 * 1590.783925130746 / 4
    queries = 323 * (21.764705882352942 / 4 + 16)
    assert cost is not None and cost.texts == 3593 + 323 and cost.tokens == pytest.approx(documents + queries)
    short = task_cost(find_task("NFCorpus"), max_tokens=20)
    assert short is not None and short.tokens == pytest.approx(3593 * 20 + 323 * 20)
    assert task_cost(find_task("CQADupstackRetrieval")) is None


def test_only_what_is_encoded_counts() -> None:
    sizes = {
        name: task_cost(find_task(name)) for name in ("SummEval", "Banking77Classification", "MTOPIntentClassification")
    }
    assert all(sizes.values())
    assert sizes["SummEval"].texts == 1100 + 1548  # type: ignore[union-attr]
    assert sizes["Banking77Classification"].texts == 3080 + 10 * 8 * 77  # type: ignore[union-attr]
    assert sizes["MTOPIntentClassification"].texts < 15_000  # type: ignore[union-attr]


def test_a_retrieval_task_on_a_split_named_train_trains_nothing() -> None:
    """All of NanoBEIR lies in splits of that name; every text is encoded."""
    task = find_task("NanoSciFactRetrieval")
    cost = task_cost(task)
    assert task.eval_splits == ["train"] and cost is not None
    assert cost.texts == num_documents(task) + 50


def test_a_task_without_texts_has_no_known_cost() -> None:
    assert task_cost(find_task("FSDD")) is None  # spoken digits


def test_the_size_of_a_corpus_is_known_before_it_is_read(tmp_path: Path) -> None:
    assert num_documents(find_task("MSMARCO")) == 8_841_823 and num_documents(find_task("SciDocsRR")) == 0
    (tmp_path / "MySet").mkdir()
    (tmp_path / "MySet/corpus.jsonl").write_text("{}\n" * 7)
    assert num_documents(find_task("MySet", tmp_path)) == 7
    assert task_cost(find_task("MySet", tmp_path)) is None


def test_workers_take_the_largest_job_left() -> None:
    assert longest([5, 4, 3, 3, 3], 2) == 10 and longest([5, 4], 4) == 5 and longest([], 3) == 0
    assert Cost(1, 2.0) == (1, 2.0)
