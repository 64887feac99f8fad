"""SimCSE: a text's positive is itself under other dropout; and upstream LLM2Vec's configuration files run unchanged."""

from __future__ import annotations

import json
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file
from torch import Tensor, nn

from llm2vec import LLM2Vec
from llm2vec.data.collation import CollateSides
from llm2vec.model import packing
from llm2vec.model.backbone import attach_lora, hidden_states
from llm2vec.model.chain import RUN_FILE
from llm2vec.model.packing import checkpoint_contexts, packed_hidden_states
from llm2vec.model.pooling import embed
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.training.config import Config
from llm2vec.training.config.file import load_config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.model import set_attention_dropout
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.training.rows import open_texts
from llm2vec.training.step import backward_step, seeded, split_batch
from llm2vec.types import Example, InstructedText, Output, UserError

ROOT = Path(__file__).parents[2]
SETTINGS = EncoderSettings(pooling_mode="mean", attention="bidirectional", template="plain")
SENTENCES = ["hello world", "who wrote it", "find the answer", "red green blue", "the question", "hello red world",
             "green", "who find the blue"]  # fmt: skip


def pairs(sentences: list[str]) -> list[Example]:
    texts = [InstructedText("", sentence) for sentence in sentences]
    return [Example("lines", text, text, ()) for text in texts]


def make(
    dropout: float, lora_dropout: float = 0.0, checkpointing: bool = False, settings: EncoderSettings = SETTINGS
) -> tuple[ContrastiveLearning, CollateSides]:
    """A float64 objective in training mode over a random model with a LoRA adapter whose B is not zero."""
    torch.manual_seed(0)
    decoder = tiny_model("llama", initializer_range=0.2)
    model = reference.exact(attach_lora(decoder, r=4, alpha=8, dropout=lora_dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    set_attention_dropout(model, dropout)
    if checkpointing:
        enable_checkpointing(model, {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, decoder)})
    collate = CollateSides(row_tokenizer(family_tokenizer("llama"), settings), ("query", "positive"))
    return ContrastiveLearning(model, settings).train(), collate  # type: ignore[arg-type]


def vectors_of(objective: ContrastiveLearning, collate: CollateSides, sentences: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return embed(objective.model, objective.settings, collate(pairs(sentences)))


# --- dropout ---


@pytest.mark.parametrize("pooling_mode", ["mean", "last"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize(("dropout", "lora_dropout"), [(0.3, 0.0), (0.0, 0.3), (0.3, 0.05)])
def test_every_text_of_a_batch_draws_its_own_mask(
    dropout: float, lora_dropout: float, attention: Any, pooling_mode: Any
) -> None:
    """Query and positive are the same text, and so are the rows: all vectors differ in training, none in evaluation.

    A text's first token shows it too: where prefixes were shared, or one mask drawn for all, it would be the same.
    """
    settings = EncoderSettings(pooling_mode=pooling_mode, attention=attention, template="plain")
    objective, collate = make(dropout, lora_dropout, settings=settings)
    sentences = ["hello world"] * 3
    vectors = torch.cat(list(vectors_of(objective, collate, sentences).values()))
    assert len(vectors) == 6
    for i, one in enumerate(vectors):
        assert all((one - other).abs().max() > 1e-3 for other in vectors[:i])
    objective.eval()
    vectors = torch.cat(list(vectors_of(objective, collate, sentences).values()))
    torch.testing.assert_close(vectors, vectors[:1].expand_as(vectors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_packed_attention_drops_out_as_the_models_own_does(attention: Any) -> None:
    """One text under one seed: the same states; with another seed, or without dropout, others."""
    model = reference.exact(tiny_model("llama", initializer_range=0.2, num_key_value_heads=4)).train()
    set_attention_dropout(model, 0.3)
    ids = torch.tensor([[5, 9, 200, 7, 31, 8]])
    embeddings: Tensor = model.get_input_embeddings()(ids)[0].detach()  # type: ignore[operator]
    with torch.no_grad():
        torch.manual_seed(3)
        own = hidden_states(model, attention, torch.ones_like(ids), input_ids=ids)[0]
        torch.manual_seed(3)
        ours = packed_hidden_states(model, attention, [6], embeddings)
        others = packed_hidden_states(model, attention, [6], embeddings)
        set_attention_dropout(model, 0.0)
        without = packed_hidden_states(model, attention, [6], embeddings)
    torch.testing.assert_close(ours, own, rtol=1e-9, atol=1e-9)
    assert (others - own).abs().max() > 1e-2 and (without - own).abs().max() > 1e-2


def test_the_configuration_goes_on_saying_what_the_base_has(tmp_path: Path) -> None:
    """A later stage that starts from the saved model trains without this dropout."""
    model = tiny_model("llama")
    set_attention_dropout(model, 0.3)
    assert packing.attention_dropout(model.train()) == 0.3
    assert packing.attention_dropout(model.eval()) == 0
    assert model.config.attention_dropout == 0
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["attention_dropout"] == 0
    set_attention_dropout(nn.Linear(2, 2), 0.0)
    with pytest.raises(UserError, match="simcse_dropout: the attention of Linear has no dropout; set it to 0"):
        set_attention_dropout(nn.Linear(2, 2), 0.3)


# --- the loss ---


def test_without_dropout_it_is_the_loop() -> None:
    """Each text once as a query and once as a document, in one pass and row by row; the loss is not zero."""
    objective, collate = make(0.0)
    rows = collate.tokenizer.rows([row.query for row in pairs(SENTENCES)])
    expected = reference.stage_two(objective.model, [(row, row, []) for row in rows], 20.0, "bidirectional", "mean")
    expected.backward()
    expected_gradients = reference.gradients(objective)
    assert expected > 0.01
    batch = collate(pairs(SENTENCES))
    for max_tokens in (None, 40, 1):
        parts = backward_step(objective, batch, objective.count(batch), max_tokens=max_tokens)
        torch.testing.assert_close(parts["loss"], expected.detach(), rtol=1e-9, atol=0)
        reference.assert_same_gradients(reference.gradients(objective), expected_gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dropout", "lora_dropout"), [(0.3, 0.0), (0.3, 0.05)])
def test_a_cached_gradient_is_that_of_one_pass_with_the_same_masks(
    dropout: float, lora_dropout: float, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pieces in one graph, each embedded under its piece's seed; recomputing draws the same masks again."""
    objective, collate = make(dropout, lora_dropout, checkpointing)
    batch = collate(pairs(SENTENCES))
    totals = objective.count(batch)
    pieces = split_batch(batch, 20)
    seeds = list(range(5, 5 + len(pieces)))
    assert len(pieces) > 2

    def whole_step(of_pieces: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        outputs: list[Output] = []
        for piece, seed in zip(pieces, of_pieces, strict=True):
            with seeded(seed, piece):
                outputs.append(objective(piece, totals))
        joined = {side: torch.cat([output.vectors[side] for output in outputs]) for side in batch}
        loss = objective.contrast(joined, {}, totals)["loss"]
        loss.backward()
        return loss.detach(), reference.gradients(objective)

    loss, expected = whole_step(seeds)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: torch.tensor(seeds))
        parts = backward_step(objective, batch, totals, max_tokens=20)
    torch.testing.assert_close(parts["loss"], loss, rtol=1e-11, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)
    _, other = whole_step(seeds[::-1])
    with pytest.raises(AssertionError, match="apart"):
        reference.assert_same_gradients(other, expected, relative=0.01)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.05])
def test_recomputing_activations_does_not_matter(lora_dropout: float) -> None:
    found = []
    for checkpointing in (False, True):
        objective, collate = make(0.3, lora_dropout, checkpointing)
        batch = collate(pairs(SENTENCES))
        torch.manual_seed(11)
        backward_step(objective, batch, objective.count(batch))
        found.append(reference.gradients(objective))
    reference.assert_same_gradients(*found)


# --- the texts ---


def config_of(path: Path, **keys: Any) -> Config:
    return Config(model_name_or_path="m", dataset_file_path=str(path), stage="simcse", **keys)


def test_a_text_file_is_a_sentence_a_line(tmp_path: Path) -> None:
    """Blank lines are none; blanks around a sentence go, and a byte order mark; two of the rows are held out."""
    file = tmp_path / "wiki1m_for_simcse.txt"
    file.write_text('\ufeffhello world \n\n  red "green" {blue}\n\t\nüber\nfind the answer', encoding="utf-8")
    rows = open_texts(config_of(file))
    assert [row.query.text for row in map(rows.__getitem__, range(len(rows)))] == [
        "hello world", 'red "green" {blue}', "über", "find the answer"
    ]  # fmt: skip
    assert all(rows[i].query == rows[i].positive == InstructedText("", rows[i].query.text) for i in range(4))
    assert all(rows[i].negatives == () for i in range(4))
    held = open_texts(config_of(file, num_eval_rows=2, max_train_samples=1))
    assert [held[i].query.text for i in range(len(held))] == ["hello world"]
    assert [held.held_out()[i].query.text for i in range(2)] == ["über", "find the answer"]


def test_rows_give_their_documents(tmp_path: Path) -> None:
    """No instruction, whatever the source says; both sides in the same form."""
    for name in ("nq", "quora_duplicates"):
        row = {"query": "who wrote it", "positive": f"{name} text", "negative": "other"}
        write_jsonl(tmp_path / f"{name}.jsonl", [row, row])
    rows = open_texts(config_of(tmp_path, sources=["nq", "quora_duplicates"], symmetric_instructions="as_released"))
    assert [rows[i].query.text for i in range(4)] == ["nq text"] * 2 + ["quora_duplicates text"] * 2
    assert all(rows[i].query == rows[i].positive and not rows[i].query.instruction for i in range(4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "dataset_file_path: .*/a.txt is not there; Wiki1M is the file"),
        (b"fine\n\xff\n", "a.txt, line 2: not valid"),
        (b"\n \n\t\n", "a.txt holds no text"),
    ],
)
def test_a_bad_text_file_is_one_sentence(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_texts(config_of(tmp_path / "a.txt"))


# --- upstream's configuration files ---

#: The values of upstream LLM2Vec's train_configs/simcse and train_configs/supervised, for any of its bases.
SHARED = {
    "bidirectional": True, "pooling_mode": "mean", "remove_unused_columns": False, "gradient_accumulation_steps": 1,
    "do_train": True, "disable_tqdm": False, "overwrite_output_dir": True, "logging_steps": 50, "save_steps": 200,
    "save_only_model": True, "stop_after_n_steps": 1000, "lora_r": 16, "gradient_checkpointing": True,
    "torch_dtype": "bfloat16", "attn_implementation": "flash_attention_2", "seed": 42,
}  # fmt: skip
SIMCSE = SHARED | {
    "simcse_dropout": 0.3, "dataset_name": "Wiki1M", "learning_rate": 3e-5, "loss_scale": 20,
    "per_device_train_batch_size": 128, "max_seq_length": 128,
}  # fmt: skip
SUPERVISED = SHARED | {
    "dataset_name": "E5", "learning_rate": 2e-4, "num_train_epochs": 3, "warmup_steps": 300,
    "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64, "max_seq_length": 512,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model, an adapter as MNTP leaves one, sentences and rows."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = attach_lora(tiny_model("llama", initializer_range=0.2), r=4, alpha=8, dropout=0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(tmp_path / "mntp"))
    (tmp_path / "wiki1m_for_simcse.txt").write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    rows = reference.examples(80, 1)
    for source in ("nq", "squad"):
        write_jsonl(
            tmp_path / "echo-data" / f"{source}.jsonl",
            [{"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text} for r in rows],
        )
    return tmp_path


def run_script(name: str, folder: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "run.json"
    here = {
        "model_name_or_path": str(folder / "base"), "peft_model_name_or_path": str(folder / "mntp"),
        "output_dir": str(folder / "out"), "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    file.write_text(json.dumps(keys | here), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [name, str(file)])
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))  # as where the script is started
    runpy.run_path(str(ROOT / "experiments" / name), run_name="__main__")


@pytest.mark.parametrize(
    ("script", "keys", "data"),
    [
        ("run_simcse.py", SIMCSE, {"dataset_file_path": "wiki1m_for_simcse.txt"}),
        ("run_supervised.py", SUPERVISED, {"dataset_file_path": "echo-data", "sources": ["nq", "squad"]}),
    ],
    ids=["simcse", "supervised"],
)
def test_upstreams_files_run_and_their_chain_loads(
    script: str, keys: dict[str, Any], data: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key as upstream has it, but for paths and the device; the new adapter lies on the merged one."""
    torch.manual_seed(5)
    run_script(
        script, folder, keys | data | {"dataset_file_path": str(folder / data["dataset_file_path"])}, monkeypatch
    )
    settings = json.loads((folder / "out" / SETTINGS_FILE).read_text(encoding="utf-8"))
    assert (settings["pooling_mode"], settings["attention"]) == ("mean", "bidirectional")
    assert settings["parent_adapters"] == [str(folder / "mntp")]
    run = json.loads((folder / "out" / RUN_FILE).read_text(encoding="utf-8"))
    assert run["config"]["loss_scale"] == 20
    assert run["config"]["num_hard_negatives"] == (0 if script == "run_simcse.py" else 1)
    weights = load_file(folder / "out" / "adapter_model.safetensors")
    assert any(float(weight.abs().max()) > 0 for name, weight in weights.items() if "lora_B" in name)
    chain = [str(folder / "mntp"), str(folder / "out")]
    whole = LLM2Vec.from_pretrained(str(folder / "base"), chain)
    assert torch.isfinite(torch.as_tensor(whole.encode(SENTENCES, show_progress_bar=False, device="cpu"))).all()
    with pytest.raises(UserError, match="was trained on top of"):
        LLM2Vec.from_pretrained(str(folder / "base"), chain[1:])
    log = (folder / "out" / LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert "train_loss" in json.loads(log[-1])


def test_simcse_learns_to_tell_sentences_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss down, and different sentences further apart than before, in the vectors that `encode` gives."""
    (folder / "eight.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    keys = {
        "dataset_file_path": str(folder / "eight.txt"), "pooling_mode": "mean", "bidirectional": True,
        "template": "plain", "per_device_train_batch_size": 8, "max_steps": 30, "learning_rate": 3e-3,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "max_seq_length": 64,
        "mask_false_negatives": True, "matryoshka_dims": [16, 32], "tokens_per_microbatch": 64,
    }  # fmt: skip
    run_script("run_simcse.py", folder, keys, monkeypatch)
    log = [json.loads(line) for line in (folder / "out" / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert {entry["masked_negatives"] for entry in log if "loss" in entry} == {0.0}

    def mean_cosine(adapters: list[Path]) -> float:
        model = LLM2Vec.from_pretrained(
            str(folder / "base"), [str(path) for path in adapters], pooling_mode="mean", template="plain"
        )
        vectors = torch.as_tensor(model.encode(SENTENCES, show_progress_bar=False, device="cpu"))
        unit = nn.functional.normalize(vectors, dim=-1)
        return float((unit @ unit.T).fill_diagonal_(0).mean())

    assert mean_cosine([folder / "mntp", folder / "out"]) < mean_cosine([folder / "mntp"]) - 0.05


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"simcse_dropout": 1.0}, r"simcse_dropout is 1.0; it must lie in \[0, 1\)"),
        ({"simcse_dropout": -0.1}, r"simcse_dropout is -0.1; it must lie in \[0, 1\)"),
        ({"simcse_dropout": 0, "lora_dropout": 0}, "simcse_dropout is 0 and no other dropout is on"),
        ({"simcse_dropout": 0, "use_peft": False}, "simcse_dropout is 0 and no other dropout is on"),
        ({"num_hard_negatives": 1}, "num_hard_negatives has no effect in simcse; it belongs to stage_II"),
        ({"distillation_weight": 1.0}, "distillation_weight has no effect in simcse"),
        ({"dataset_name": "E5"}, "dataset_name is 'E5', but dataset_file_path is a.txt"),
        ({"dataset_name": "Wiki1M", "dataset_file_path": "d"}, "dataset_name is 'Wiki1M', but dataset_file_path is d"),
        ({"sources": ["nq"]}, "sources has no effect where dataset_file_path is a text file"),
        ({"sources_file": "s.json"}, "sources_file has no effect where dataset_file_path is a text file"),
    ],
    ids=str,
)
def test_a_wrong_key_is_one_sentence(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    config = {"model_name_or_path": "m", "output_dir": "o", "dataset_file_path": "a.txt"} | keys
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(file, "simcse")


def test_a_key_that_is_null_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    keys = {"model_name_or_path": "m", "output_dir": "o", "dataset_file_path": "a.txt", "sources_file": None}
    file.write_text(json.dumps(keys), encoding="utf-8")
    assert load_config(file, "simcse").sources_file is None


def test_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model_name_or_path": "m", "output_dir": "o", "dataset_file_path": "a.txt"}))
    config = load_config(file, "simcse")
    assert (config.simcse_dropout, config.loss_scale, config.use_peft, config.bidirectional) == (0.3, 20, True, False)
