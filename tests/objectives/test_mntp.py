"""Masked next-token prediction: the loss, what is masked, the blocks, upstream's config, and the chain of adapters."""

from __future__ import annotations

import dataclasses
import json
import pickle
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import reference
import torch
from helpers import WORDS, family_tokenizer, tiny_model, write_jsonl
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llm2vec.data.blocks import (
    Block,
    SourceTexts,
    cut_into_blocks,
    open_blocks,
    texts_of_file,
    texts_of_hub,
    texts_of_sources,
)
from llm2vec.data.order import OneSourceBlocks
from llm2vec.data.sources import Source
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import attach_lora
from llm2vec.model.chain import RUN_FILE, open_folder
from llm2vec.model.packing import checkpoint_contexts
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.mntp import MaskedNextTokenPrediction, MaskTokens, add_mask_token, mask_token_id, mask_tokens
from llm2vec.training.config import KEYS
from llm2vec.training.config.file import load_config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.training.step import backward_step, loss_parts, split_batch
from llm2vec.types import InstructedText, UserError

ROOT = Path(__file__).parents[2]

#: Upstream LLM2Vec's configuration of this stage, key by key.
UPSTREAM = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "dataset_name": "wikitext",
    "dataset_config_name": "wikitext-103-raw-v1",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "do_train": True,
    "do_eval": True,
    "max_seq_length": 512,
    "mask_token_type": "blank",
    "data_collator_type": "default",
    "mlm_probability": 0.2,
    "overwrite_output_dir": True,
    "output_dir": "output/mlm/Meta-Llama-3-8B-Instruct",
    "evaluation_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 200,
    "stop_after_n_steps": 1000,
    "lora_r": 16,
    "gradient_checkpointing": True,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
}


def sentences(number: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, 12))) for _ in range(number)]


def blocks_of(*lengths: int, seed: int = 0) -> list[Block]:
    """Random blocks; real ones all have the same length, which nothing here may depend on."""
    generator = np.random.default_rng(seed)
    return [Block(generator.integers(0, 250, n).tolist(), 0, row) for row, n in enumerate(lengths)]


def make(family: str = "llama", probability: float = 0.4) -> tuple[MaskedNextTokenPrediction, MaskTokens]:
    """A float64 objective with an adapter below the frozen head, and what masks its blocks."""
    model = tiny_model(family, True, initializer_range=0.2)
    model.requires_grad_(False)
    model.model = attach_lora(model.model, r=4, alpha=8, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    collate = mask_tokens(family_tokenizer(family), probability=probability)
    return MaskedNextTokenPrediction(reference.exact(model)), collate


# --- the loss ---


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma"])
def test_loss_and_every_adapter_gradient_equal_one_token_at_a_time(family: str) -> None:
    """In one pass, in a few micro-batches and block by block; recomputing activations too. Nothing else trains."""
    objective, collate = make(family)
    blocks = blocks_of(9, 14, 5, 11, 8)
    masked = collate.all_rows(blocks)
    assert any(row.ids[i] != block.ids[i] for row, block in zip(masked, blocks, strict=True) for i in range(5))
    loss = reference.masked_next_token(objective.model, masked, [block.ids for block in blocks])
    loss.backward()
    expected = reference.gradients(objective)
    assert expected and all("lora_" in name for name in expected)
    batch = collate(blocks)
    totals = objective.count(batch)
    assert totals["mntp"] == sum(sum(row.target) for row in masked) > 10
    for max_tokens in (None, 20, 1):
        parts = backward_step(objective, batch, totals, max_tokens=max_tokens)
        assert parts["loss"] == parts["loss_mntp"] == loss_parts(objective, batch, totals, max_tokens)["loss"]
        torch.testing.assert_close(parts["loss"], loss.detach(), rtol=1e-9, atol=0)
        reference.assert_same_gradients(reference.gradients(objective), expected)
    assert len(split_batch(batch, 20)) > 1
    decoder = objective.model.base_model
    enable_checkpointing(
        objective.model.train(), {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, decoder)}
    )
    backward_step(objective, batch, totals)
    reference.assert_same_gradients(reference.gradients(objective), expected)


def test_a_masked_token_hears_of_what_follows_it_and_not_of_other_blocks() -> None:
    """Attention is bidirectional within a block, and the token before the masked one is what speaks."""
    objective, _ = make()
    plain = MaskTokens(95, 250, frozenset(), 0.3)
    blocks = blocks_of(10, 10)
    batch = plain(blocks)
    batch["text"]["target_mask"][:] = False
    batch["text"]["target_mask"][3] = True
    batch["text"]["num_predicted"] = [1, 0]

    def loss(position: int | None) -> Tensor:
        text = {**batch["text"], "input_ids": batch["text"]["input_ids"].clone()}
        if position is not None:
            text["input_ids"][position] = (text["input_ids"][position] + 7) % 250
        return loss_parts(objective, {"text": text}, {"mntp": torch.tensor(1.0)})["loss"]

    same = loss(None)
    assert all(abs(loss(position) - same) > 1e-6 for position in (0, 2, 3, 9))
    assert all(loss(position) == same for position in (10, 15, 19))


def test_a_piece_without_a_masked_token_has_a_loss_of_zero() -> None:
    objective, collate = make(probability=1e-9)
    batch = collate(blocks_of(6, 6))
    parts = backward_step(objective, batch, {"mntp": torch.tensor(3.0)}, max_tokens=1)
    assert parts["loss"] == 0
    assert not any(p.grad is not None and p.grad.any() for p in objective.parameters())


# --- what is masked ---


@pytest.mark.parametrize(("scheme", "shares"), [("default", (0.8, 0.1, 0.1)), ("all_mask", (1.0, 0.0, 0.0))])
@pytest.mark.parametrize("probability", [0.2, 0.8])
def test_shares_of_what_is_chosen(scheme: Any, shares: tuple[float, ...], probability: float) -> None:
    """About as many as asked for, each special token and each block's first spared; the rest stays as it was."""
    spared = frozenset({0, 1})
    collate = MaskTokens(999, 1000, spared, probability, scheme, seed=3)
    (block,) = blocks_of(20000)
    row = collate.masked(block)
    ids, masked, chosen = np.array(block.ids), np.array(row.ids), np.array(row.target)
    assert not chosen[0] and not chosen[np.isin(ids, [0, 1])].any()
    assert chosen.mean() == pytest.approx(probability * (1 - np.isin(ids, [0, 1]).mean()), abs=0.01)
    assert (masked == ids)[~chosen].all()
    is_mask, is_kept = masked[chosen] == 999, masked[chosen] == ids[chosen]
    found = (is_mask.mean(), (~is_mask & ~is_kept).mean(), is_kept.mean())
    assert found == pytest.approx(shares, abs=0.01)
    assert scheme == "all_mask" or len(set(masked[chosen & (masked != 999) & (masked != ids)])) > 100


def test_masking_depends_on_seed_epoch_and_block_alone() -> None:
    """Not on the batch; another of the three masks otherwise."""
    collate = mask_tokens(family_tokenizer("llama"), seed=1)
    blocks = blocks_of(50, 50, 50)
    alone = [collate.masked(block) for block in blocks]
    together = collate(blocks)["text"]
    assert together["input_ids"].tolist() == [token for row in alone for token in row.ids]
    assert together["target_mask"].tolist() == [chosen for row in alone for chosen in row.target]
    assert together["labels"].tolist() == [token for block in blocks for token in block.ids]
    same_ids = blocks[0]
    others = [
        collate.masked(same_ids._replace(epoch=1)),
        collate.masked(same_ids._replace(row=1)),
        mask_tokens(family_tokenizer("llama"), seed=2).masked(same_ids),
    ]
    assert all(other.target != alone[0].target for other in others)


def test_workers_and_ranks_do_not_change_what_is_masked(tmp_path: Path) -> None:
    """Through the sampler, over two epochs, with and without worker processes that outlive an epoch."""
    tokenizer = family_tokenizer("llama")
    (tmp_path / "a.txt").write_text("\n".join(sentences(60)), encoding="utf-8")
    rows = open_blocks([texts_of_file(tmp_path / "a.txt")], tokenizer, 16)
    collate = mask_tokens(tokenizer)

    def epochs(num_workers: int) -> list[list[tuple[int, ...]]]:
        sampler = OneSourceBlocks(rows, 4, 0)
        loader = DataLoader(
            rows, 4, sampler=sampler, collate_fn=collate, num_workers=num_workers, persistent_workers=num_workers > 0
        )
        found = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            found.append([tuple(batch["text"]["input_ids"].tolist()) for batch in loader])
        return found

    alone = epochs(0)
    assert epochs(2) == alone
    assert not set(alone[0]) & set(alone[1])
    orders = [OneSourceBlocks(rows, 4, 0, num_ranks=num_ranks) for num_ranks in (1, 2)]
    for order in orders:
        order.set_epoch(1)
    assert sorted(orders[0]) == sorted(orders[1])
    assert {rows[i].epoch for i in orders[1]} == {1}


@pytest.mark.parametrize("family", ["llama", "mistral", "mistral_sentencepiece", "qwen2"])
def test_mask_tokens_by_type(family: str) -> None:
    """The blank is the token `_`, `eos` the EOS; the tokenizer's own mask token goes before either."""
    tokenizer = family_tokenizer(family)
    assert tokenizer.convert_ids_to_tokens(mask_token_id(tokenizer, "blank")) == "_"
    assert mask_token_id(tokenizer, "eos") == tokenizer.eos_token_id
    assert add_mask_token(tokenizer, "blank") == add_mask_token(tokenizer, "eos") == []
    assert add_mask_token(tokenizer, "mask") == [len(tokenizer) - 1] == [mask_token_id(tokenizer, "mask")]
    assert tokenizer.mask_token == "<mask>" and add_mask_token(tokenizer, "mask") == []
    assert mask_token_id(tokenizer, "blank") == len(tokenizer) - 1
    spared = mask_tokens(tokenizer, "mask").spared
    assert {tokenizer.eos_token_id, tokenizer.mask_token_id} <= spared
    assert tokenizer.get_vocab()["Ġred" if family != "mistral_sentencepiece" else "▁red"] not in spared


def test_an_ordinary_token_is_not_taken_for_a_mask() -> None:
    tokenizer = family_tokenizer("plain")
    tokenizer.add_tokens(["<mask>"])
    with pytest.raises(UserError, match="ordinary token"):
        add_mask_token(tokenizer, "mask")


# --- the blocks ---


def texts_of(*lines: str | None) -> SourceTexts:
    return SourceTexts("lines", Path("lines.txt"), datasets.Dataset.from_dict({"text": list(lines)}), ("text",))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral_sentencepiece"])
def test_blocks_by_hand(family: str) -> None:
    """Each text behind a BOS where there is one, end to end, cut, the rest dropped; never read as special tokens. Blank
    texts and nulls are left out."""
    tokenizer = family_tokenizer(family)
    lines = ["who wrote it", "  ", "hello world </s> <|eot_id|>", None, "the red answer"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stream = []
    for line in (lines[0], lines[2], lines[4]):
        stream += bos + tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    table = cut_into_blocks(texts_of(*lines).table, ("text",), tokenizer, 7)
    assert [row["ids"] for row in table] == [stream[i : i + 7] for i in range(0, len(stream) - 6, 7)]
    assert len(stream) % 7
    special = set(tokenizer.all_special_ids) - set(bos)
    assert not special & {token for row in table for token in row["ids"]}


def test_text_that_spans_several_reads_is_not_cut_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = family_tokenizer("llama")
    lines = sentences(23)
    whole = cut_into_blocks(texts_of(*lines).table, ("text",), tokenizer, 9)
    monkeypatch.setattr("llm2vec.data.blocks.TEXTS_AT_ONCE", 5)
    again = cut_into_blocks(texts_of(*lines, "").table, ("text",), tokenizer, 9)
    assert [row["ids"] for row in again] == [row["ids"] for row in whole]


def test_text_files_and_training_rows(tmp_path: Path) -> None:
    """A line of .txt, a `text` of .jsonl, and a row's query and positive are a text each."""
    lines = ["who wrote it", "hello world"]
    (tmp_path / "a.txt").write_text("\n".join([lines[0], "", lines[1], ""]), encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", [{"text": line, "title": "x"} for line in lines])
    assert texts_of_file(tmp_path / "a.txt").table["text"][:] == lines
    assert texts_of_file(tmp_path / "b.jsonl").table["text"][:] == lines
    write_jsonl(tmp_path / "c.jsonl", [{"query": "who", "positive": "it", "negative": []}] * 4)
    (rows,) = texts_of_sources(tmp_path, [Source("c", "c.jsonl", ())])
    tokenizer = family_tokenizer("llama")
    blocks = open_blocks([rows], tokenizer, 2)
    once = [tokenizer.bos_token_id, *tokenizer("who\n\nit", add_special_tokens=False)["input_ids"]]
    assert [token for i in range(len(blocks)) for token in blocks[i].ids] == once * 4
    assert blocks.files == [tmp_path / "c.jsonl"] and [source.name for source in blocks.sources] == ["c"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"fine\n\xff\xfe\n", ["a.txt, line 2", "UTF-8"]),
        ("a.jsonl", b'{"text": "fine"}\n{"txt": "x"}\n', ["a.jsonl, line 2", "`text`"]),
        ("a.jsonl", b'{"text": "fine"}\nfine\n', ["a.jsonl, line 2", "not valid JSON"]),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "x \\ud83d y"}\n', ["a.jsonl, line 2", "half a surrogate pair"]),
        ("a.txt", b"\n \n", ["a.txt holds no text"]),
        ("a.txt", b"", ["a.txt holds no text"]),
        ("a.txt", None, ["a.txt is not there"]),
    ],
)
def test_a_bad_text_file_is_named(tmp_path: Path, name: str, content: bytes | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        texts_of_file(tmp_path / name)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_blocks_of_several_sources_and_those_held_out() -> None:
    """One running index; what is held out is the end of each source and is nowhere in the rest."""
    tokenizer = family_tokenizer("llama")
    sources = [texts_of(*sentences(20, seed=seed))._replace(name=str(seed)) for seed in range(2)]
    every = open_blocks(sources, tokenizer, 8)
    kept = open_blocks(sources, tokenizer, 8, num_held_out=3)
    held_out = kept.held_out()
    assert held_out.sizes == [3, 3] and kept.sizes == [size - 3 for size in every.sizes]
    ids = [every[i].ids for i in range(len(every))]
    first = every.sizes[0]
    assert [held_out[i].ids for i in range(6)] == ids[first - 3 : first] + ids[-3:]
    assert [kept[i].ids for i in range(len(kept))] == ids[: first - 3] + ids[first:-3]
    assert kept[len(kept) + 2] == kept[2]._replace(epoch=1) == Block(ids[2], 1, 2)
    assert open_blocks(sources, tokenizer, 8, max_rows=2).sizes == [2, 2]
    with pytest.raises(UserError, match="no texts for evaluation"):
        every.held_out()
    with pytest.raises(UserError, match=r"20 texts have [0-9]+ tokens in all"):
        open_blocks(sources, tokenizer, 4096)
    with pytest.raises(UserError, match="blocks of 8 tokens, of which 500 are held out"):
        open_blocks(sources, tokenizer, 8, num_held_out=500)


def test_a_hub_dataset_as_upstream_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its train split is trained on, its validation split held out; what cannot be read is one sentence."""
    asked: list[Any] = []
    splits = {"train": datasets.Dataset.from_dict({"text": sentences(30)})}

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load)
    tokenizer = family_tokenizer("llama")
    with pytest.raises(UserError, match="no texts for evaluation"):
        open_blocks([texts_of_hub("wikitext", None)], tokenizer, 8).held_out()
    splits["validation"] = datasets.Dataset.from_dict({"text": sentences(9, seed=1)})
    blocks = open_blocks([texts_of_hub("wikitext", "wikitext-103-raw-v1")], tokenizer, 8)
    assert asked == [("wikitext", None), ("wikitext", "wikitext-103-raw-v1")]
    assert len(pickle.loads(pickle.dumps(blocks)).held_out()) > 0, "as it goes to worker processes"
    assert blocks.sources[0].name == "wikitext/wikitext-103-raw-v1"
    assert 0 < len(blocks.held_out()) < len(blocks)
    splits["validation"] = datasets.Dataset.from_dict({"text": ["who"]})
    short = open_blocks([texts_of_hub("wikitext", None)], tokenizer, 8)
    assert short.sizes == blocks.sizes, "without evaluation, a split that fills no block matters to nobody"
    with pytest.raises(UserError, match=r"1 texts have [0-9]+ tokens in all"):
        short.held_out()
    splits["train"] = datasets.Dataset.from_dict({"title": ["x"]})
    with pytest.raises(UserError, match="no split `train` with a column `text`"):
        texts_of_hub("wikitext", None)
    monkeypatch.undo()
    with pytest.raises(UserError, match="dataset_name: 'nobody/no-texts' could not be loaded") as error:
        texts_of_hub("nobody/no-texts", None)
    assert "\n" not in str(error.value)


# --- the config ---


def write_config(file: Path, keys: dict[str, Any]) -> str:
    file.write_text(json.dumps(keys), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("changes", [{}, {"data_collator_type": "all_mask", "mlm_probability": 0.8}], ids=str)
def test_upstreams_config_is_read_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = load_config(write_config(tmp_path / "c.json", UPSTREAM | changes), "mntp")
    assert config.hub_dataset == "wikitext" and config.dataset_config_name == "wikitext-103-raw-v1"
    assert config.bidirectional and config.use_peft and config.pooling_mode == "mean"
    assert config.training["eval_strategy"] == "steps" and config.training["eval_steps"] == 100
    assert (config.lora_r, config.stop_after_n_steps, config.max_seq_length) == (16, 1000, 512)
    assert config.mlm_probability == changes.get("mlm_probability", 0.2)


def test_the_resolved_config_is_read_back(tmp_path: Path) -> None:
    """What a run stores loads to the same config."""
    config = load_config(write_config(tmp_path / "c.json", UPSTREAM), "mntp")
    stored = dataclasses.asdict(config)
    flat = {**stored.pop("training"), **stored}
    flat = {key: value for key, value in flat.items() if "mntp" in KEYS[key].stages}
    assert load_config(write_config(tmp_path / "again.json", flat), "mntp") == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mlm_probability": 0}, "mlm_probability is 0; it must be above 0"),
        ({"mlm_probability": 1.5}, "mlm_probability is 1.5"),
        ({"max_seq_length": 1}, "max_seq_length is 1, but a masked token is predicted from the one before it"),
        ({"mask_token_type": "underscore"}, "allowed: 'blank', 'eos', 'mask'"),
        ({"data_collator_type": "some_mask"}, "allowed: 'default', 'all_mask'"),
        ({"bidirectional": False}, "bidirectional is false, but mntp"),
        ({"sources_file": "sources.json"}, "sources_file has no effect beside a hub dataset"),
        ({"dataset_name": "E5", "dataset_file_path": "data", "num_eval_rows": 9}, "dataset_config_name has no effect"),
        ({"eval_strategy": "steps"}, "evaluation_strategy and eval_strategy are the same option"),
        ({"alpha": 0.2}, "alpha has no effect in mntp"),
    ],
    ids=str,
)
def test_a_wrong_key_is_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path / "c.json", UPSTREAM | changes), "mntp")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# --- the chain of adapters ---


def run(stage: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script in this process, with its one argument."""
    script = str(ROOT / f"experiments/run_{stage}.py")
    monkeypatch.setattr(sys, "argv", [script, file])
    runpy.run_path(script, run_name="__main__")


def encode(base: Path, *adapters: Path, listed: bool = True) -> Tensor:
    names = [str(adapter) for adapter in adapters]
    model = LLM2Vec.from_pretrained(str(base), names if listed else names[0])
    assert model.settings.attention == "bidirectional" and model.settings.pooling_mode == "mean"
    vectors = model.encode([["find it", "who wrote it"], "hello world"], show_progress_bar=False, device="cpu")
    assert isinstance(vectors, Tensor)
    return vectors


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]


def make_files(folder: Path) -> None:
    """A base, texts, and rows of one source."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(folder / "base")
    family_tokenizer("llama").save_pretrained(folder / "base")
    (folder / "texts.txt").write_text("\n".join(sentences(200)), encoding="utf-8")
    write_jsonl(
        folder / "data/nq.jsonl",
        [
            {"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text}
            for r in reference.examples(16, 1)
        ],
    )


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_upstreams_config_runs_with_its_hub_dataset(
    dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only model, output and sizes are others: it evaluates on the validation split and stops where it says."""
    make_files(tmp_path)
    splits = {
        "train": datasets.Dataset.from_dict({"text": sentences(300)}),
        "validation": datasets.Dataset.from_dict({"text": sentences(80, seed=1)}),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(splits))
    keys = UPSTREAM | {
        "model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "out"), "max_seq_length": 64,
        "per_device_train_batch_size": 4, "eval_steps": 1, "stop_after_n_steps": 2, "torch_dtype": dtype,
        "bf16": dtype is None, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    run("mntp", write_config(tmp_path / "c.json", keys), monkeypatch)
    assert [entry["step"] for entry in log_of(tmp_path / "out") if "eval_loss_mntp" in entry] == [1, 2]
    record = json.loads((tmp_path / "out" / RUN_FILE).read_text(encoding="utf-8"))
    assert record["data"][0]["source"] == "wikitext/wikitext-103-raw-v1"


@pytest.mark.parametrize(("mask_token_type", "stage"), [("blank", "stage_II"), ("mask", "stage_II"), ("eos", "simcse")])
def test_mntp_then_another_adapter_then_loaded_both_ways(
    mask_token_type: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same vectors by the list of adapters and by upstream's way; any other order or number is refused."""
    make_files(tmp_path)
    base = tmp_path / "base"
    upstream = UPSTREAM | {"model_name_or_path": str(base), "output_dir": str(tmp_path / "mntp")}
    for key in ("dataset_name", "dataset_config_name", "torch_dtype"):
        del upstream[key]
    small = {"per_device_train_batch_size": 4, "max_seq_length": 64, "num_eval_rows": 4, "eval_steps": 2,
             "max_steps": 6, "stop_after_n_steps": 4, "logging_steps": 1, "learning_rate": 0.02, "lora_r": 4,
             "dataset_file_path": str(tmp_path / "texts.txt"), "mask_token_type": mask_token_type,
             "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 4}  # fmt: skip
    run("mntp", write_config(tmp_path / "mntp.json", upstream | small), monkeypatch)
    mntp = tmp_path / "mntp"
    log = log_of(mntp)
    losses = [entry["loss_mntp"] for entry in log if "loss_mntp" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert [entry["step"] for entry in log if "eval_loss_mntp" in entry] == [2, 4]
    recorded = open_folder(str(mntp)).settings
    assert recorded["parent_adapters"] == [] and recorded["template"] is None
    assert (mntp / "adapter_model.safetensors").is_file() and not (mntp / "model.safetensors").exists()
    written = LLM2Vec.from_pretrained(str(mntp))
    trained = {
        name.split(".lora_A")[0].split(".")[-1] for name, _ in written.model.named_parameters() if "lora_A" in name
    }
    assert {"q_proj", "down_proj"} <= trained

    supervised = tmp_path / "supervised"
    keys = {
        "model_name_or_path": str(base), "peft_model_name_or_path": str(mntp), "bidirectional": True,
        "pooling_mode": "mean", "dataset_file_path": str(tmp_path / "data"), "sources": ["nq"],
        "output_dir": str(supervised), "per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 0.02,
        "lora_r": 4, "max_seq_length": 160, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    run(stage, write_config(tmp_path / "second.json", keys), monkeypatch)
    both = encode(base, mntp, supervised)
    assert torch.equal(encode(mntp, supervised, listed=False), both)
    assert (both - encode(base, mntp)).abs().max() > 1e-4
    for wrong in ([supervised, mntp], [supervised], [mntp, mntp, supervised]):
        with pytest.raises(UserError, match="was trained on top of"):
            encode(base, *wrong)
    with pytest.raises(UserError, match="was trained on top of"):
        encode(base, supervised, listed=False)
    moved = mntp.rename(tmp_path / "elsewhere")
    assert torch.equal(encode(base, moved, supervised), both)
    run_record = json.loads((supervised / RUN_FILE).read_text(encoding="utf-8"))
    assert len(run_record["parent_weights"]) == 1 and len(run_record["parent_weights"][0]) == 64


def test_rows_shorter_than_a_probes_instruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks hold no instruction, so there may be little room for one; what is written loads and saves again."""
    make_files(tmp_path)
    keys = {
        "model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "out"), "max_seq_length": 16,
        "dataset_file_path": str(tmp_path / "texts.txt"), "per_device_train_batch_size": 4, "max_steps": 1,
        "lora_r": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    run("mntp", write_config(tmp_path / "c.json", keys), monkeypatch)
    model = LLM2Vec.from_pretrained(tmp_path / "out")
    model.save(tmp_path / "again")
    assert LLM2Vec.from_pretrained(tmp_path / "again").max_length == 16


def test_a_row_of_the_next_stage_is_rendered_by_its_own_template(tmp_path: Path) -> None:
    """MNTP fixes no template: what it wrote is read with the one its tokenizer suggests."""
    settings = EncoderSettings("mean", 32, template=None)
    renderer = row_tokenizer(family_tokenizer("llama"), settings)
    assert renderer.template == "llama3"
    assert renderer.rows([InstructedText("", "hello")])
