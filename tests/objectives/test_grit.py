"""Contrastive learning and language modelling in one step: the sum of both, however the step is cut or shared."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm2vec import LLM2Vec
from llm2vec.data.collation import CollateSides
from llm2vec.distributed import sum_over_ranks
from llm2vec.model.backbone import attach_lora
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.language_modelling import ContrastiveLanguageModelling, LanguageModelling
from llm2vec.processes import rank, world_size
from llm2vec.training.config.file import load_config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.step import backward_step, loss_parts, split_batch
from llm2vec.types import UserError

ROOT = Path(__file__).parents[2]
ROWS = reference.examples(6, 1)
WEIGHT = 0.7
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "bidirectional_mean": ("llama", False, {"attention": "bidirectional", "pooling_mode": "mean"}),
    "its_template": ("mistral", False, {"attention": "bidirectional", "pooling_mode": "mean", "template": "gritlm"}),
    "causal_last": ("qwen2", False, {}),
    "adapter": ("llama", True, {"attention": "bidirectional", "pooling_mode": "mean"}),
}


def make(name: str, dropout: float = 0.0) -> tuple[ContrastiveLanguageModelling, CollateSides]:
    """A float64 objective over all parameters, or over an adapter below the frozen head, and its batches."""
    family, lora, changes = CASES[name]
    torch.manual_seed(0)
    model = tiny_model(family, True, initializer_range=0.2)
    if lora:
        model.requires_grad_(False)
        model.model = attach_lora(model.model, r=4, alpha=8, dropout=dropout)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.3)
    model = reference.exact(model)
    settings = EncoderSettings(**({"pooling_mode": "last", "attention": "causal"} | changes))
    plain = EncoderSettings("mean", template="plain")
    tokenizer = family_tokenizer(family)
    collate = CollateSides(
        row_tokenizer(tokenizer, settings),
        ("query", "positive", "negative", "text"),
        text_tokenizer=row_tokenizer(tokenizer, plain),
    )
    contrastive = ContrastiveLearning(model.base_model, settings, 20.0)
    return ContrastiveLanguageModelling(contrastive, LanguageModelling(model), WEIGHT), collate


def by_hand(name: str, objective: ContrastiveLanguageModelling, collate: CollateSides) -> tuple[Tensor, Tensor]:
    """Both losses, one row and one token at a time."""
    changes = CASES[name][2]
    queries, positives, negatives, texts = (collate.rows(ROWS, side) for side in collate.sides)
    step = [(q, p, [n]) for q, p, n in zip(queries, positives, negatives, strict=True)]
    contrastive = reference.stage_two(
        objective.model.base_model,
        step,
        20.0,
        changes.get("attention", "causal"),
        changes.get("pooling_mode", "last"),
    )
    return contrastive, reference.language_modelling(objective.model, texts)


@pytest.mark.parametrize("name", list(CASES))
def test_loss_and_every_gradient_are_the_sum_of_both(name: str) -> None:
    """The chunked joint gradient equals the whole batch's: in one pass, in a few micro-batches and row by row."""
    objective, collate = make(name)
    contrastive, lm = by_hand(name, objective, collate)
    (contrastive + WEIGHT * lm).backward()
    expected = reference.gradients(objective)
    assert ("lm_head.weight" in {key.removeprefix("model.") for key in expected}) != CASES[name][1]
    batch = collate(ROWS)
    totals = objective.count(batch)
    third = sum(sum(side["lengths"]) for side in batch.values()) // 3
    for max_tokens in (None, third, 1):
        parts = backward_step(objective, batch, totals, max_tokens=max_tokens)
        assert parts.keys() == {"loss", "loss_lm", "loss_contrastive", "in_batch_accuracy"}
        torch.testing.assert_close(parts["loss_contrastive"], contrastive.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(parts["loss_lm"], lm.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(parts["loss"], (contrastive + WEIGHT * lm).detach(), rtol=1e-9, atol=0)
        reference.assert_same_gradients(reference.gradients(objective), expected)
        figures = loss_parts(objective, batch, totals, max_tokens)
        torch.testing.assert_close(figures["loss"], parts["loss"], rtol=1e-12, atol=0)
    assert 1 < len(split_batch(batch, third)) < 6 == len(split_batch(batch, 1))


def test_attention_is_each_losses_own() -> None:
    """Bidirectional where texts are embedded and causal where they are modelled, within one step."""
    objective, collate = make("bidirectional_mean")
    attended: list[bool] = []
    layer = objective.model.base_model.layers[0]
    layer.register_forward_pre_hook(lambda _, __, kwargs: attended.append(kwargs["is_causal"]), with_kwargs=True)
    batch = collate(ROWS)
    backward_step(objective, batch, objective.count(batch))
    assert attended == [False, True]


@pytest.mark.usefixtures("every_piece_twice")
def test_the_text_is_computed_once() -> None:
    """A pass that only embeds leaves it out, as one with a graph goes through it."""
    objective, collate = make("bidirectional_mean")
    tokens: list[int] = []
    lm = objective._objectives[1]
    lm.register_forward_pre_hook(lambda _, args: tokens.append(sum(args[0]["text"]["lengths"])))
    batch = collate(ROWS)
    backward_step(objective, batch, objective.count(batch), max_tokens=1)
    assert len(tokens) == len(ROWS) and sum(tokens) == sum(batch["text"]["lengths"])


@pytest.mark.usefixtures("every_piece_twice")
def test_dropout_draws_the_same_for_the_vectors_in_both_passes() -> None:
    """Else the gradient would be cached at other vectors than those that carry it into the weights."""
    objective, collate = make("adapter", dropout=0.3)
    objective.train()
    batch = collate(ROWS)
    seen: list[Tensor] = []
    contrastive = objective._objectives[0]
    contrastive.register_forward_hook(lambda _, __, output: seen.append(output.vectors["query"]))
    backward_step(objective, batch, objective.count(batch), max_tokens=1)
    first = [vectors for vectors in seen if not vectors.requires_grad]
    again = [vectors for vectors in seen if vectors.requires_grad][-len(first) :]
    assert len(first) >= len(ROWS) - 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first[0], make("adapter")[0].eval()(batch, {}).vectors["query"][:1])


def test_the_models_weights_have_one_name() -> None:
    objective, _ = make("adapter")
    assert all(name.startswith("model.") for name in objective.state_dict())
    objective.eval()
    assert not objective.model.base_model.training
    objective.train()
    assert objective.model.base_model.training


# --- two processes ---


def take_step(max_tokens: int | None, wrap: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step over this rank's rows, by the trainer's rule."""
    objective, collate = make("adapter")
    share = len(ROWS) // world_size()
    batch = collate(ROWS[rank() * share : (rank() + 1) * share])
    totals = {part: sum_over_ranks(count) for part, count in objective.count(batch).items()}
    model: Any = DistributedDataParallel(objective) if wrap else objective
    no_sync = {"no_sync": model.no_sync} if wrap else {}
    parts = backward_step(model, batch, totals, max_tokens=max_tokens, scale=world_size(), **no_sync)
    return {part: sum_over_ranks(value) for part, value in parts.items()}, reference.gradients(objective)


def work(process: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(process)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=process, world_size=2)
    torch.save({max_tokens: take_step(max_tokens, True) for max_tokens in (None, 200)}, folder / f"{process}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_process_with_all_rows(tmp_path: Path) -> None:
    """The mix does not depend on how many they are: both losses and the gradient are the same."""
    parts, gradients = take_step(None, False)
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    for process in range(2):
        for found_parts, found_gradients in torch.load(tmp_path / f"{process}.pt").values():
            for name, value in parts.items():
                torch.testing.assert_close(found_parts[name], value, rtol=1e-9, atol=0)
            reference.assert_same_gradients(found_gradients, gradients)


# --- the script ---


@pytest.mark.parametrize("use_peft", [True, False])
def test_stage_II_with_a_language_modelling_loss(
    use_peft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both losses fall and are logged; what is saved is the adapter, or the model with its head."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    write_jsonl(
        tmp_path / "data/nq.jsonl",
        [{"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text}
         for r in reference.examples(16, 1)],
    )  # fmt: skip
    keys = {
        "model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "out"), "sources": ["nq"],
        "dataset_file_path": str(tmp_path / "data"), "bidirectional": True, "pooling_mode": "mean",
        "template": "gritlm", "lm_weight": 1.0, "use_peft": use_peft, "max_seq_length": 128, "max_steps": 8,
        "per_device_train_batch_size": 8, "tokens_per_microbatch": 200, "learning_rate": 5e-3, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "mask_false_negatives": True,
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(keys), encoding="utf-8")
    script = str(ROOT / "experiments/run_stage_II.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "c.json")])
    runpy.run_path(script, run_name="__main__")
    log = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    losses = [entry for entry in log if "loss_lm" in entry]
    assert losses[-1]["loss_lm"] < losses[0]["loss_lm"]
    assert losses[0]["loss"] == pytest.approx(losses[0]["loss_contrastive"] + losses[0]["loss_lm"], rel=1e-3)
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    weights = load_file(tmp_path / "out" / name)
    assert ("lm_head.weight" in weights) != use_peft
    model = LLM2Vec.from_pretrained(str(tmp_path / "out"))
    assert model.settings.attention == "bidirectional" and model.settings.template == "gritlm"
    assert model.encode(["hello"], show_progress_bar=False, device="cpu").isfinite().all()


def test_a_weight_below_zero_is_refused(tmp_path: Path) -> None:
    keys = {"model_name_or_path": "x", "output_dir": "y", "dataset_file_path": "z", "lm_weight": -1}
    (tmp_path / "c.json").write_text(json.dumps(keys), encoding="utf-8")
    with pytest.raises(UserError, match="lm_weight is -1; 0 or more"):
        load_config(tmp_path / "c.json", "stage_II")
