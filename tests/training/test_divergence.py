"""Steps whose loss or gradient is not finite are skipped, said, and end the run where they come one after the other."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked_runs import Setup, assert_same_to_the_bit, kill_within, log_of, make_data, run, said, weights_of
from torch import Tensor

from llm2vec.data.order import OneSourceBlocks
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Source
from llm2vec.training.trainer import EmbedderTrainer
from llm2vec.types import Batch, Output, RunEnds
from tests.training import test_trainer
from tests.training.test_trainer import Toy, entries


def diverge(monkeypatch: pytest.MonkeyPatch, numbers: set[int], how: str) -> None:
    """Make the toy's loss, or only its gradient, no number where a micro-batch holds one of the rows."""
    forward = Toy.forward

    def diverging(self: Toy, batch: Batch, totals: dict[str, Tensor]) -> Output:
        output = forward(self, batch, totals)
        if not numbers & {int(number) for number in self.seen[-1]}:
            return output
        loss = output.parts["loss"]
        if how == "infinite loss with a finite gradient":
            loss = loss + math.inf
        elif how == "loss":
            loss = loss * math.nan
        else:
            loss = loss + (self.weight - self.weight.detach()).abs().sqrt()  # 0, with an infinite slope
        return Output({**output.parts, "loss": loss}, {})

    monkeypatch.setattr(Toy, "forward", diverging)


def adam_by_hand(steps: list[list[int]], rates: list[float], skipped: set[int]) -> float:
    """The toy's weight after Adam's steps over rows (Kingma and Ba 2015, algorithm 1), some of them left out."""
    weight, first, second, taken = 0.0, 0.0, 0.0, 0
    for i, (rows, rate) in enumerate(zip(steps, rates, strict=True)):
        if i in skipped:
            continue
        taken += 1
        gradient = sum(2 * (weight - row) for row in rows) / len(rows)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight -= rate * (first / (1 - 0.9**taken)) / (math.sqrt(second / (1 - 0.999**taken)) + 1e-8)
    return weight


@pytest.mark.parametrize("how", ["loss", "gradient", "infinite loss with a finite gradient"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e9])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_skipped_step_leaves_weights_and_optimiser_alone(
    how: str, max_grad_norm: float, optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedule and the rows go on; figures are means over the steps that were taken."""
    diverge(monkeypatch, {5}, how)
    keys: dict[str, Any] = {"gradient_accumulation_steps": 2, "num_rows": 16, "optim": optim}
    keys |= {"max_grad_norm": max_grad_norm, "learning_rate": 0.1, "logging_steps": 2, "weight_decay": 0.0}
    toy, trainer, log = test_trainer.run(tmp_path, **keys)
    steps = [list(range(i, i + 4)) for i in (0, 4, 8, 12)]
    assert [sorted(a + b) for a, b in zip(toy.seen[::2], toy.seen[1::2], strict=True)] == steps
    assert toy.weight.item() == pytest.approx(adam_by_hand(steps, [0.1, 0.075, 0.05, 0.025], {1}), rel=1e-5)
    assert next(iter(trainer.optimizer.state.values()))["step"] == 3
    skipped = [entry for entry in log if "skipped" in entry]
    what = "gradient" if how == "gradient" else "loss"
    assert skipped == [{"step": 2, "skipped": f"the {what} is not finite", "rows": {"rows": [4, 5, 6, 7]}}]
    first, second = entries(log)
    assert (first["number"], first["skipped_steps"]) == (1.5, 1) and "grad_norm" not in first
    assert second["number"] == 11.5 and "skipped_steps" not in second
    losses = [sum((toy.weights[2 * i] - row) ** 2 for row in steps[i]) / 4 for i in (0, 2, 3)]
    assert first["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert second["loss"] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-6)
    assert log[-1]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert trainer.state.global_step == 4


def test_without_any_step_there_are_no_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverge(monkeypatch, {2, 3}, "loss")
    _, _, log = test_trainer.run(tmp_path, num_rows=6)
    middle = next(entry for entry in log if entry["step"] == 2 and "skipped" not in entry)
    assert middle["skipped_steps"] == 1 and not {"loss", "number", "grad_norm"} & middle.keys()
    assert all(math.isfinite(value) for entry in log for value in entry.values() if isinstance(value, float))


def test_so_many_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, with one that is fine between, do not."""
    diverge(monkeypatch, {2, 6, 8, 10}, "gradient")
    keys: dict[str, Any] = {"num_rows": 20, "save_strategy": "steps", "save_steps": 2, "max_skipped_steps": 3}
    with pytest.raises(RunEnds) as end:
        test_trainer.run(tmp_path, save_to=lambda folder, _: folder.mkdir(exist_ok=True), **keys)
    assert end.value.code == 1
    assert "3 steps in a row, up to step 6," in str(end.value)
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-4'}." in str(end.value)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in log if "skipped" in entry] == [2, 4, 5, 6]


# --- loss scaling ---


def scale_the_loss(monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """Training as float16 does it, with torch's own scaler, on the CPU."""
    scaler = torch.amp.GradScaler("cpu")
    create = EmbedderTrainer.create_accelerator_and_postprocess

    def with_scaler(self: EmbedderTrainer) -> None:
        create(self)
        self.accelerator.scaler = scaler
        self.accelerator.native_amp = True
        monkeypatch.setattr(type(self.accelerator), "mixed_precision", "fp16")

    monkeypatch.setattr(EmbedderTrainer, "create_accelerator_and_postprocess", with_scaler)
    return scaler


def overflow(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A gradient so large that it overflows under the loss scale."""
    forward = Toy.forward

    def large(self: Toy, batch: Batch, totals: dict[str, Tensor]) -> Output:
        output = forward(self, batch, totals)
        # The value stays what it was, and so does the scaled loss, which must not overflow itself.
        slope = (self.weight - self.weight.detach()) * factor
        return Output({**output.parts, "loss": output.parts["loss"] + slope}, {})

    monkeypatch.setattr(Toy, "forward", large)


def test_the_scaler_finds_its_scale_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More skips in a row than the limit, while the scale comes down; none is counted."""
    scaler = scale_the_loss(monkeypatch)
    overflow(monkeypatch, 3e35)
    toy, _, log = test_trainer.run(tmp_path, num_rows=20, learning_rate=1e-36)
    assert 1 < scaler.get_scale() < 2**11
    changes = [one != other for one, other in zip(toy.weights, [*toy.weights[1:], toy.weight.item()], strict=True)]
    assert changes.count(False) >= 5 and changes[-1]
    assert not any("skipped" in entry or "skipped_steps" in entry for entry in log)


def test_a_gradient_that_no_scale_helps_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the scale is 1."""
    scaler = scale_the_loss(monkeypatch)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 4.0})
    diverge(monkeypatch, set(range(40)), "gradient")
    with pytest.raises(RunEnds, match="5 steps in a row, up to step 7,"):
        test_trainer.run(tmp_path, num_rows=40)


def test_a_loss_that_is_no_number_is_counted_at_any_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = scale_the_loss(monkeypatch)
    diverge(monkeypatch, {2}, "infinite loss with a finite gradient")
    toy, _, log = test_trainer.run(tmp_path, num_rows=6)
    assert toy.weights[1] == toy.weights[2]
    assert [entry["step"] for entry in log if "skipped" in entry] == [2]
    assert scaler.get_scale() == 2**16


@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["counted", "the scaler's affair"])
def test_the_schedule_waits_where_the_scaler_skips(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows no difference between a scale that is too large and a gradient that is no number."""
    scaler = scale_the_loss(monkeypatch)
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
    diverge(monkeypatch, {2}, "gradient")
    _, _, log = test_trainer.run(tmp_path, num_rows=8, lr_scheduler_type="linear", learning_rate=0.1)
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates == pytest.approx([0.1, 0.075, 0.075, 0.05])
    assert [entry["step"] for entry in log if "skipped" in entry] == ([2] if scale == 1 else [])


# --- the scripts ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file lie."""
    return tmp_path_factory.mktemp("divergence")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, Any]:
    """Keys of a run of 7 steps, 5 an epoch, with a checkpoint every second."""
    return make_data(folder)


def bad_once(step: int, only_rank: int = 0, kill_in: int | None = None) -> Setup:
    """In this step, one process's gradient is no number."""

    def setup(rank: int) -> None:
        train = EmbedderTrainer.training_step

        def training_step(self: EmbedderTrainer, *arguments: Any, **keywords: Any) -> Any:
            bad = rank == only_rank and self.state.global_step + 1 == step
            backward = Accelerator.backward
            self.accelerator.backward = lambda loss: backward(self.accelerator, loss * math.nan if bad else loss)
            return train(self, *arguments, **keywords)

        EmbedderTrainer.training_step = training_step  # type: ignore[method-assign]
        if kill_in is not None:
            kill_within(kill_in)(rank)

    return setup


def rows_of_step(folder: Path, step: int) -> list[int]:
    """Lines of the rows of a step of the first epoch, from the sampler itself."""
    rows = TrainingRows(folder, [Source("words", "words.jsonl", ())], num_negatives=0)
    order = list(OneSourceBlocks(rows, 8, seed=42))
    return sorted(index + 1 for index in order[8 * (step - 1) : 8 * step])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_rows_of_a_skipped_step_are_named(processes: int, folder: Path, keys: dict[str, Any]) -> None:
    """By file and line, those of all processes; where one process's gradient is bad, all skip."""
    output = folder / f"named-{processes}"
    setup = bad_once(3, only_rank=processes - 1)
    assert run("run_stage_I.py", output, keys, processes, setup) == [0] * processes, said(output)
    skipped = [entry for entry in log_of(output) if "skipped" in entry]
    assert [entry["step"] for entry in skipped] == [3]
    assert sorted(skipped[0]["rows"]["words.jsonl"]) == rows_of_step(folder, 3)
    assert "step 3 is skipped: its gradient is not finite" in said(output)
    assert all(torch.isfinite(weight).all() for weight in weights_of(output).values())


def test_a_run_with_skipped_steps_is_resumed_to_the_bit(folder: Path, keys: dict[str, Any]) -> None:
    whole, cut = folder / "whole", folder / "cut"
    assert run("run_stage_I.py", whole, keys, setup=bad_once(4)) == [0]
    assert run("run_stage_I.py", cut, keys, setup=bad_once(4, kill_in=6)) == [-signal.SIGKILL]
    assert run("run_stage_I.py", cut, keys) == [0]
    assert "from step 4" in said(cut)
    assert_same_to_the_bit(cut, whole)
