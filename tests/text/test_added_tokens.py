"""Tokens that a template adds to its base: rows made, trained, saved and restored exactly; few-shot rows drawn."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from peft import PeftModel
from tokenizers import AddedToken
from torch import Tensor
from transformers import TrainingArguments

from llm2vec.data.collation import CollateSides
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import attach_lora, load_backbone, load_tokenizer
from llm2vec.model.chain import open_chain
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.model.pooling import embed
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.text.few_shot import check_examples_fit, with_examples
from llm2vec.text.probe_texts import probe_ids
from llm2vec.text.templates import add_template_tokens
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.training.config import Config
from llm2vec.training.model import add_token_rows, load_model
from llm2vec.training.run import run_training
from llm2vec.types import Example, InstructedText, UserError

CPU = torch.device("cpu")
SPECIAL = ["<instruct>", "<query>", "<response>"]


def save_base(folder: Path, **overrides: Any) -> Path:
    """A base model with a head, which knows none of the added tokens."""
    tokenizer = family_tokenizer("mistral")
    tokenizer.chat_template = None
    options = {"initializer_range": 0.2, "tie_word_embeddings": False, **overrides}
    save_checkpoint(folder, tiny_model("mistral", True, tokenizer=tokenizer, **options), tokenizer, None)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def config_of(base: Path, template: str = "bge_en_icl", **changes: Any) -> Config:
    pooling = "mean" if template == "llara" else "last"
    keys: dict[str, Any] = {"use_peft": True, "lora_r": 4, "training": {"output_dir": "out", "seed": 3}, **changes}
    return Config(str(base), template=template, pooling_mode=pooling, max_seq_length=128, **keys)


def table(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight.detach()


# The tokenizer


@pytest.mark.parametrize(("template", "names"), [("bge_en_icl", SPECIAL), ("llara", [f"<s{i}>" for i in range(1, 17)])])
def test_tokens_are_added_once(template: str, names: list[str]) -> None:
    """In the template's order, behind the vocabulary; what is there is used as it is."""
    tokenizer = family_tokenizer("plain")
    before = len(tokenizer)
    assert add_template_tokens(tokenizer, template) == list(range(before, before + len(names)))
    assert tokenizer.convert_ids_to_tokens(list(range(before, len(tokenizer)))) == names
    assert add_template_tokens(tokenizer, template) == []
    assert add_template_tokens(tokenizer, "llama3") == []


def test_a_special_token_of_the_base_is_used() -> None:
    """Only the others are new."""
    tokenizer = family_tokenizer("plain")
    tokenizer.add_tokens([AddedToken("<query>", special=True, normalized=False)], special_tokens=True)
    query = tokenizer.convert_tokens_to_ids("<query>")
    assert add_template_tokens(tokenizer, "bge_en_icl") == [query + 1, query + 2]
    (row,) = RowTokenizer(tokenizer, "bge_en_icl", "last", 32).rows([InstructedText("find", "hello")])
    assert row.ids.count(query) == 1


@pytest.mark.parametrize("token", [AddedToken("<query>", special=False), "red"])
def test_an_ordinary_token_of_the_base_is_refused(token: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text may hold it, so it could not mark anything."""
    from llm2vec.text import templates

    tokenizer = family_tokenizer("plain")
    if isinstance(token, AddedToken):
        tokenizer.add_tokens([token])
    else:
        row = templates.TEMPLATES["bge_en_icl"]._replace(added_tokens=(token,))
        monkeypatch.setitem(templates.TEMPLATES, "bge_en_icl", row)
    with pytest.raises(UserError, match=r"^template: 'bge_en_icl' adds the token '.*', but the base's vocabulary has"):
        add_template_tokens(tokenizer, "bge_en_icl")


def test_tokens_survive_saving(tmp_path: Path) -> None:
    """As special tokens, which the text of a user never becomes."""
    tokenizer = family_tokenizer("mistral")
    add_template_tokens(tokenizer, "bge_en_icl")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert add_template_tokens(loaded, "bge_en_icl") == []
    text = InstructedText("find <query>", "hello <response> <instruct>")
    rows = [RowTokenizer(t, "bge_en_icl", "last", 128).rows([text]) for t in (tokenizer, loaded)]
    assert rows[0] == rows[1]
    assert [rows[0][0].ids.count(loaded.convert_tokens_to_ids(token)) for token in SPECIAL] == [1, 1, 1]


# The model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 10])
def test_new_rows_start_near_the_mean(tied: bool, spare: int) -> None:
    """In embedding and head, each its own; other rows stay; rows that a padded table has already are used."""
    tokenizer = family_tokenizer("mistral")
    size = len(tokenizer)
    model = tiny_model("mistral", True, vocab_size=size + spare, tie_word_embeddings=tied)
    before = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    ids = add_template_tokens(tokenizer, "bge_en_icl")
    add_token_rows(model, ids, seed=0)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == tied
    assert len(tables[0]) == model.config.vocab_size == max(size + spare, size + 3)
    for old, new in zip(before, tables, strict=True):
        assert torch.equal(new[:size], old[:size]) and torch.equal(new[size + 3 :], old[size + 3 :])
        spread, mean = torch.std_mean(old[:size], dim=0)
        offset = (new[ids] - mean) / spread
        assert offset.abs().max() < 0.5 and 0.05 < offset.std() < 0.2
        assert len(new[ids].unique(dim=0)) == 3
    again = tiny_model("mistral", True, vocab_size=size + spare, tie_word_embeddings=tied)
    add_token_rows(again, ids, seed=0)
    assert torch.equal(table(again), table(model))
    add_token_rows(again, ids, seed=1)
    assert not torch.equal(table(again), table(model))


def test_training_adds_what_the_template_needs(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To tokenizer and model, and says so; under LoRA the new rows are trainable and no others."""
    with caplog.at_level(logging.INFO):
        model, tokenizer, settings = load_model(config_of(base), CPU, with_lm_head=False)
    assert "added tokens: <instruct>, <query>, <response>" in caplog.text
    assert len(table(model)) == len(tokenizer)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (rows,) = (p for name, p in trainable.items() if "trainable_tokens" in name)
    assert rows.shape == (3, 32) and all("lora" in name or "trainable_tokens" in name for name in trainable)
    batch = CollateSides(row_tokenizer(tokenizer, settings), ("query",))([example(0), example(1)])
    embed(model, settings, batch)["query"].sum().backward()
    assert rows.grad is not None and rows.grad.abs().sum(dim=1).gt(0).all()


def test_a_template_without_added_tokens_changes_nothing(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model, tokenizer, _ = load_model(config_of(base, "e5_mistral"), CPU, with_lm_head=False)
    assert "added tokens" not in caplog.text
    assert len(table(model)) == len(tokenizer) == len(load_tokenizer(str(base)))
    assert not any("trainable_tokens" in name for name, _ in model.named_parameters())


def test_a_base_without_the_tokens_cannot_be_evaluated(base: Path) -> None:
    with pytest.raises(UserError, match=r"needs '<instruct>', which the tokenizer does not have; training adds it"):
        LLM2Vec.from_pretrained(str(base), template="bge_en_icl", pooling_mode="last", enable_bidirectional=False)


def disturb(model: torch.nn.Module) -> None:
    """Give everything that is trained another value, as training would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


TEXTS = [["find it", "who wrote it"], "hello world", ["find the answer", "red"]]


@pytest.mark.parametrize("template", ["bge_en_icl", "llara"])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("spare", [0, 40])
def test_an_adapter_brings_its_tokens(template: str, merge: bool, spare: int, tmp_path: Path) -> None:
    """Base and adapter give the vectors of the trained model exactly; the adapter holds the new rows alone."""
    size = len(family_tokenizer("mistral")) + spare
    base = save_base(tmp_path / "base", vocab_size=size)
    model, tokenizer, settings = load_model(config_of(base, template), CPU, with_lm_head=False)
    disturb(model)
    trained = LLM2Vec(model, tokenizer, **dataclasses.asdict(settings))
    vectors = trained.encode(TEXTS, show_progress_bar=False, device="cpu")
    save_checkpoint(tmp_path / "adapter", model, tokenizer, settings, {"probe_ids": probe_ids(trained.row_tokenizer)})
    weights = tmp_path / "adapter/adapter_model.safetensors"
    assert weights.stat().st_size < table(model).numel() * 4 + 200_000
    expected = table(model).clone()
    for arguments in ((str(base), str(tmp_path / "adapter")), (str(tmp_path / "adapter"),)):
        loaded = LLM2Vec.from_pretrained(*arguments, merge_peft=merge)
        assert torch.equal(table(loaded.model), expected)
        difference = loaded.encode(TEXTS, show_progress_bar=False, device="cpu") - vectors
        assert abs(difference).max() < (1e-5 if merge else 1e-7)
    loaded.save(tmp_path / "merged", merge_before_save=True)
    whole = LLM2Vec.from_pretrained(str(tmp_path / "merged"))
    assert torch.equal(table(whole.model), expected)


def test_the_adapter_holds_no_table(base: Path, tmp_path: Path) -> None:
    """peft would save the whole embedding because it has grown."""
    from safetensors import safe_open

    model, tokenizer, settings = load_model(config_of(base), CPU, with_lm_head=False)
    save_checkpoint(tmp_path, model, tokenizer, settings)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        others = [name for name in file.keys() if "lora_" not in name]  # noqa: SIM118
        assert [tuple(file.get_tensor(name).shape) for name in others] == [(3, 32)]


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_on_top_of_an_adapter(tied: bool, tmp_path: Path) -> None:
    """The adapter's tokens are merged with it, below a new adapter and under a head; nothing is added again."""
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    model, tokenizer, settings = load_model(config_of(base), CPU, with_lm_head=False)
    disturb(model)
    save_checkpoint(tmp_path / "adapter", model, tokenizer, settings)
    expected = table(model).clone()
    stacked = config_of(base, peft_model_name_or_path=str(tmp_path / "adapter"))
    second, of_second, settings = load_model(stacked, CPU, with_lm_head=False)
    assert torch.equal(table(second), expected) and len(of_second) == len(tokenizer)
    assert isinstance(second, PeftModel) and not any("trainable_tokens" in n for n, _ in second.named_parameters())
    disturb(second)
    save_checkpoint(tmp_path / "second", second, of_second, settings)
    chain = [str(tmp_path / "adapter"), str(tmp_path / "second")]
    vectors = LLM2Vec(second, of_second, **dataclasses.asdict(settings)).encode(TEXTS, show_progress_bar=False)
    loaded = LLM2Vec.from_pretrained(str(base), chain)
    torch.testing.assert_close(loaded.encode(TEXTS, show_progress_bar=False), vectors, rtol=0, atol=1e-6)
    with_head = load_backbone(open_chain(str(base), (chain[0],)), with_lm_head=True)
    assert torch.equal(table(with_head), expected)
    assert len(with_head.get_output_embeddings().weight) == len(expected)


def test_full_training_saves_the_rows(base: Path, tmp_path: Path) -> None:
    """With their head, in the model itself; the next stage finds nothing to add."""
    model, tokenizer, settings = load_model(config_of(base, "llara", use_peft=False), CPU, with_lm_head=True)
    save_checkpoint(tmp_path, model, tokenizer, settings)
    next_model, next_tokenizer, _ = load_model(config_of(tmp_path, "llara"), CPU, with_lm_head=False)
    assert torch.equal(table(next_model), table(model)) and len(next_tokenizer) == len(tokenizer)
    assert not any("trainable_tokens" in name for name, _ in next_model.named_parameters())
    kept = load_backbone(open_chain(str(tmp_path)), with_lm_head=True)
    assert torch.equal(kept.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_lora_without_new_tokens_is_as_before() -> None:
    model = attach_lora(tiny_model("mistral"), r=2, alpha=4, dropout=0.0)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)


# Few-shot examples in training


def example(i: int, query: str | None = None, positive: str | None = None) -> Example:
    words = ("red", "green", "blue", "hello", "world", "find", "the", "who")
    query, positive = query or f"who wrote {words[i % 8]} {i}", positive or f"the answer {i}"
    return Example(
        "words",
        InstructedText("find it", query),
        InstructedText("", positive, "document"),
        (InstructedText("", f"{words[(i + 1) % 8]} {i}", "document"),),
    )


ROWS = [example(i) for i in range(8)]
LONG_ROWS = [example(i, positive=f"the answer {i}" + " red" * 40) for i in range(8)]


def test_examples_are_other_rows_of_the_batch() -> None:
    """With their positive as the answer; no row shows itself, none shows another twice, queries stay as they are."""
    for seed in range(20):
        for row, query in zip(ROWS, with_examples(ROWS, 5, seed), strict=True):
            assert query._replace(examples=()) == row.query
            shown = [(e.instruction, e.query, e.answer) for e in query.examples]
            assert len(shown) == len(set(shown)) <= 5
            others = [(r.query.instruction, r.query.text, r.positive.text) for r in ROWS if r is not row]
            assert set(shown) <= set(others)


def test_the_number_of_examples_is_uniform() -> None:
    """From 0 to the most, each as likely; so is each row as an example."""
    queries = [query for seed in range(300) for query in with_examples(ROWS, 3, seed)]
    counts = [sum(len(q.examples) == n for q in queries) / len(queries) for n in range(4)]
    assert counts == pytest.approx([0.25] * 4, abs=0.03)
    shown = [e.query for q in queries for e in q.examples]
    assert [shown.count(row.query.text) / len(shown) for row in ROWS] == pytest.approx([1 / 8] * 8, abs=0.02)


def test_examples_depend_on_seed_and_batch_alone() -> None:
    """Not on what was drawn before, so not on the worker that draws."""
    first = with_examples(ROWS, 5, 0)
    with_examples(ROWS[:4], 5, 0)
    assert with_examples(ROWS, 5, 0) == first
    assert with_examples(ROWS, 5, 1) != first
    assert with_examples(ROWS[::-1], 5, 0)[::-1] != first


def test_a_row_that_tells_the_answer_is_not_shown() -> None:
    """The same query, or another with the same positive."""
    query, positive = example(0).query.text, example(0).positive.text
    rows = [example(0), example(1, query=query), example(2, positive=positive), example(3)]
    for seed in range(20):
        assert {e.query for e in with_examples(rows, 3, seed)[0].examples} <= {rows[3].query.text}


@pytest.mark.parametrize(("queries", "positives"), [(40, 40), (40, 2), (3, 40), (7, 5), (1, 1)])
def test_rows_are_drawn_from_those_that_do_not_tell(queries: int, positives: int) -> None:
    """Each as if from a list of them, whatever repeats: a few labels as positives, the same query again."""
    rows = [example(i, query=f"query {i % queries}", positive=f"answer {i % positives}") for i in range(40)]
    for row, query in zip(rows, with_examples(rows, 60, 0), strict=True):
        others = {(r.query.text, r.positive.text) for r in rows}
        others = {(q, a) for q, a in others if q != row.query.text and a != row.positive.text}
        assert {(e.query, e.answer) for e in query.examples} <= others
    shown = [with_examples(rows, 1, seed)[0].examples for seed in range(2000)]
    counts = Counter((e.query, e.answer) for examples in shown for e in examples)
    allowed = [(r.query.text, r.positive.text) for r in rows]
    allowed = [(q, a) for q, a in allowed if q != "query 0" and a != "answer 0"]
    expected = {pair: 1000 * count / len(allowed) for pair, count in Counter(allowed).items()}
    assert counts.keys() == expected.keys()
    assert all(abs(counts[pair] - mean) < 5 * mean**0.5 + 1 for pair, mean in expected.items())


class CountedText(str):
    """A text that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        CountedText.compared += 1
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def test_a_large_micro_batch_is_not_compared_row_by_row() -> None:
    """A process may hold thousands of rows."""
    rows = [example(i, query=CountedText(f"query {i}"), positive=CountedText(f"answer {i % 3}")) for i in range(600)]
    CountedText.compared = 0
    with_examples(rows, 3, 0)
    assert 0 < CountedText.compared < 20 * len(rows)


def test_a_single_row_has_no_examples() -> None:
    assert with_examples(ROWS[:1], 5, 0) == [ROWS[0].query]


def collator(max_length: int = 128, most: int = 3, template: str = "bge_en_icl") -> CollateSides:
    tokenizer = family_tokenizer("mistral")
    add_template_tokens(tokenizer, template)
    renderer = RowTokenizer(tokenizer, template, "last", max_length)
    return CollateSides(renderer, ("query", "positive"), most, 0)


def test_the_collator_shows_examples_to_queries_only() -> None:
    collate, bare = collator(), collator(most=0)
    batch, without = collate(ROWS), bare(ROWS)
    assert batch["positive"]["lengths"] == without["positive"]["lengths"]
    assert sum(batch["query"]["lengths"]) > sum(without["query"]["lengths"])
    expected = collate.tokenizer.rows(with_examples(ROWS, 3, 0))
    assert batch["query"]["lengths"] == [len(row.ids) for row in expected]
    assert batch["query"]["input_ids"].tolist() == [i for row in expected for i in row.ids]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: collator(60), r"not one of 7 sampled queries has room for an example within max_seq_length 60;"),
        (lambda: collator(template="e5_mistral"), r"template 'e5_mistral' has no place for few-shot examples;"),
    ],
)
def test_examples_that_never_come_are_refused(make: Callable[[], CollateSides], message: str) -> None:
    check_examples_fit(LONG_ROWS, collator().tokenizer)
    check_examples_fit(ROWS, collator(60).tokenizer)
    with pytest.raises(UserError, match=f"^examples_per_query: {message}"):
        check_examples_fit(LONG_ROWS, make().tokenizer)


def training(base: Path, tmp_path: Path, **changes: Any) -> Config:
    """Train one step of Stage II under few-shot examples, or fail before it."""
    write_jsonl(
        tmp_path / "words.jsonl",
        [{"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text} for r in LONG_ROWS],
    )
    keys = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    keys |= {"report_to": "none", "remove_unused_columns": False, "save_strategy": "no", "seed": 3}
    batch = changes.pop("per_device_train_batch_size", None)
    keys |= {} if batch is None else {"per_device_train_batch_size": batch}
    config = dataclasses.replace(config_of(base, training=keys), examples_per_query=3, **changes)
    rows = TrainingRows(tmp_path, [Source("words", "words.jsonl", (Instruction("find it"),))])
    args = TrainingArguments(**keys)  # type: ignore[arg-type]
    model, tokenizer, settings = load_model(config, CPU, with_lm_head=False)
    objective = ContrastiveLearning(model, settings)
    collate = CollateSides(row_tokenizer(tokenizer, settings), ("query", "positive", "negative"), 3, args.seed)
    run_training(config, args, objective, rows, collate, tokenizer, settings)
    return config


def test_a_step_with_examples(base: Path, tmp_path: Path) -> None:
    """From config to a checkpoint that loads by itself; the rows of the added tokens have moved."""
    config = training(base, tmp_path)
    loaded = LLM2Vec.from_pretrained(str(base), str(config.output_dir))
    fresh, _, _ = load_model(config, CPU, with_lm_head=False)
    ids = loaded.tokenizer.convert_tokens_to_ids(SPECIAL)
    moved = (table(loaded.model) - table(fresh)).abs().amax(dim=1)
    assert (moved[ids] > 0).all() and moved.count_nonzero() == 3
    recorded = json.loads((config.output_dir / "run.json").read_text())
    assert recorded["probe_ids"] == probe_ids(loaded.row_tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_length": 60}, "has room for an example within max_seq_length 60"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size is 1"),
    ],
)
def test_training_does_not_start_where_no_example_would_come(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^examples_per_query: .*{message}"):
        training(base, tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_settings_of_an_adapter_name_its_template(base: Path) -> None:
    _, _, settings = load_model(config_of(base), CPU, with_lm_head=False)
    assert settings == EncoderSettings(
        pooling_mode="last",
        max_length=128,
        template="bge_en_icl",
        instruction_join="; ",
        attention="causal",
        parent_adapters=(),
    )
