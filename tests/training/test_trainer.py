"""The trainer: which rows a step sees, what the log says, when it stops, and what its checkpoints are."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainingArguments

from llm2vec import llm2vec_q2d_d2q
from llm2vec.data.order import OneSourceBlocks, block_order
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model import packing
from llm2vec.model import pooling as embed_module
from llm2vec.model.chain import open_folder
from llm2vec.model.settings import SETTINGS_FILE
from llm2vec.text.batches import pack_rows, starts_of
from llm2vec.text.tokenization import Row
from llm2vec.training.config import Config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.run import steps_an_epoch
from llm2vec.training.trainer import EmbedderTrainer
from llm2vec.types import Batch, Example, InstructedText, Output, Reduction, RunEnds

ROOT = Path(__file__).parents[2]


class Toy(nn.Module):
    """A quadratic loss over the rows' numbers, so that every figure can be worked out by hand."""

    contrasts = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.totals: list[float] = []
        self.weights: list[float] = []

    def count(self, batch: Batch) -> dict[str, Tensor]:
        return {"rows": torch.tensor(float(len(batch["side"]["lengths"])))}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        side = batch["side"]
        numbers = side["input_ids"][starts_of(side["lengths"])]
        self.seen.append(numbers.tolist())
        self.totals.append(float(totals["rows"]))
        self.weights.append(self.weight.item())
        squares = ((self.weight - numbers) ** 2).sum() / totals["rows"]
        parts = {"loss": squares, "loss_squares": squares.detach(), "number": numbers.sum() / totals["rows"]}
        return Output(parts, {})


class Numbered(Sampler[int]):
    """0, 1, 2, ... in the first epoch, shifted by one in the next."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return self.rows_from(0)

    def rows_from(self, place: int) -> Iterator[int]:
        return iter([(i + self.epoch) % self.length for i in range(place, self.length)])


def collate(rows: list[int]) -> Batch:
    """A row is its number, two or three times."""
    return {
        "side": pack_rows([Row(*([value] * (2 + number % 2) for value in (number, True, True))) for number in rows])
    }


def run(
    folder: Path,
    *,
    num_rows: int = 12,
    sampler: Sampler[int] | None = None,
    reduction: Reduction = "token_mean",
    stop_after_n_steps: int | None = None,
    save_to: Callable[[Path, dict[str, Tensor] | None], None] = lambda folder, weights: None,
    max_tokens: int | None = None,
    held_out: tuple[Any, Sampler[int]] | None = None,
    max_skipped_steps: int = 5,
    **arguments: Any,
) -> tuple[Toy, EmbedderTrainer, list[dict[str, Any]]]:
    """Train the toy; returns it, its trainer, and the log."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "optim": "sgd",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "num_train_epochs": 1,
    }
    toy = Toy()
    trainer = EmbedderTrainer(
        toy,
        TrainingArguments(str(folder), **(defaults | arguments)),
        Config(
            "toy",
            reduction=reduction,
            stop_after_n_steps=stop_after_n_steps,
            tokens_per_microbatch=max_tokens,
            max_skipped_steps=max_skipped_steps,
        ),
        list(range(num_rows)),
        collate,
        sampler or Numbered(num_rows),
        save_to=save_to,
        load_from=lambda folder: None,
        held_out=held_out,
    )
    trainer.train()
    lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return toy, trainer, [json.loads(line) for line in lines]


def entries(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of the steps, without the summary at the end."""
    return [entry for entry in log if "loss" in entry]


# --- rows ---


def test_a_step_takes_consecutive_rows_and_divides_by_all_of_them(tmp_path: Path) -> None:
    """Two micro-batches of two rows: each is told that the step holds four."""
    toy, trainer, _ = run(tmp_path, gradient_accumulation_steps=2)
    assert toy.seen == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert toy.totals == [4.0] * 6
    assert trainer.state.global_step == 3
    first, second = toy.weights[0], toy.weights[2]
    assert toy.weights == [first, first, second, second, toy.weights[4], toy.weights[4]]
    gradient = sum(2 * (first - number) for number in (0, 1, 2, 3)) / 4
    assert second == pytest.approx(first - 0.01 * gradient, rel=1e-6)


def test_micro_batch_mean_divides_each_micro_batch_by_itself(tmp_path: Path) -> None:
    toy, _, _ = run(tmp_path, gradient_accumulation_steps=2, reduction="micro_batch_mean")
    assert toy.totals == [4.0] * 6  # two rows of its own, times two micro-batches


def test_every_epoch_has_the_order_its_sampler_gives_it(tmp_path: Path) -> None:
    toy, _, _ = run(tmp_path, num_train_epochs=3, num_rows=4)
    assert toy.seen == [[0, 1], [2, 3], [1, 2], [3, 0], [2, 3], [0, 1]]


def test_rows_come_in_the_order_of_seed_and_epoch(tmp_path: Path) -> None:
    """With the real sampler: `block_order` of epoch 0, then of epoch 1, which differs."""
    write_jsonl(tmp_path / "a.jsonl", [{"query": f"q{i}", "positive": "p"} for i in range(12)])
    rows = TrainingRows(tmp_path, [Source("a", "a.jsonl", (Instruction("find the answer"),))], num_negatives=0)
    toy, _, _ = run(tmp_path / "out", num_train_epochs=2, sampler=OneSourceBlocks(rows, 4, seed=3))
    epochs = [block_order([12], 4, 3, epoch).tolist() for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert [number for seen in toy.seen for number in seen] == epochs[0] + epochs[1]


def test_rows_that_fill_no_whole_step_make_one_more(tmp_path: Path) -> None:
    """As the run and the plan say it, and as the trainer does it: six micro-batches, four a step."""
    toy, trainer, log = run(tmp_path, gradient_accumulation_steps=4, num_train_epochs=2, num_rows=12)
    assert steps_an_epoch(trainer.args, 12, 1) == trainer.state.global_step / 2 == 2
    assert toy.totals == [8.0] * 4 + [4.0] * 2 + [8.0] * 4 + [4.0] * 2
    assert log[-1]["step"] == 4


def test_a_step_knows_its_rows(tmp_path: Path) -> None:
    """The last of an epoch may have fewer."""
    _, trainer, _ = run(tmp_path, gradient_accumulation_steps=4, num_rows=12)
    rows = []
    for step in range(4):
        trainer.state.global_step = step
        trainer._sampler.set_epoch(step // 2)  # type: ignore[attr-defined]
        rows.append(trainer._rows_of_step())
    assert rows == [[*range(8)], [8, 9, 10, 11], [*range(1, 9)], [9, 10, 11, 0]]


def test_an_error_without_a_text_ends_the_run_by_its_name(tmp_path: Path) -> None:
    def broken(folder: Path, weights: dict[str, Tensor] | None) -> None:
        raise OSError

    with pytest.raises(RunEnds, match=r"checkpoint-2 could not be written \(OSError\)") as end:
        run(tmp_path, save_to=broken, save_strategy="steps", save_steps=2)
    assert end.value.code == 1


def test_an_output_folder_that_is_lost_ends_the_run_in_a_sentence(tmp_path: Path) -> None:
    """A disk that went away, say; how much is free on it cannot be asked any more."""

    def lost(folder: Path, weights: dict[str, Tensor] | None) -> None:
        shutil.rmtree(tmp_path / "out")
        raise OSError("Stale file handle")

    with pytest.raises(RunEnds, match=r"checkpoint-2 could not be written \(Stale file handle\)") as end:
        run(tmp_path / "out", save_to=lost, save_strategy="steps", save_steps=2)
    assert end.value.code == 1


# --- the log ---


def test_log_by_hand(tmp_path: Path) -> None:
    """Two steps an entry: means over them of what two micro-batches each add up to."""
    toy, _, log = run(tmp_path, gradient_accumulation_steps=2, logging_steps=2, num_rows=16)
    steps = [toy.seen[i] + toy.seen[i + 1] for i in range(0, 8, 2)]
    losses = [
        sum((weight - number) ** 2 for number in numbers) / 4
        for numbers, weight in zip(steps, toy.weights[::2], strict=True)
    ]
    means = [sum(numbers) / 4 for numbers in steps]
    assert [entry["step"] for entry in entries(log)] == [2, 4]
    for i, entry in enumerate(entries(log)):
        assert entry["loss"] == pytest.approx((losses[2 * i] + losses[2 * i + 1]) / 2, rel=1e-6)
        assert entry["loss_squares"] == pytest.approx(entry["loss"], rel=1e-6)
        assert entry["number"] == pytest.approx((means[2 * i] + means[2 * i + 1]) / 2, rel=1e-6)
        assert {"grad_norm", "learning_rate", "epoch", "tokens_per_second"} <= entry.keys()
    assert losses[0] != pytest.approx(losses[1], rel=0.01)


def test_tokens_per_second_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tokens since the last entry over the seconds since then; here the clock moves ten seconds a look, of which
    there are three a step: before and after the rows are fetched, and at the entry."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("llm2vec.training.log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    _, _, log = run(tmp_path, num_rows=8, gradient_accumulation_steps=2)
    looks = [entry["tokens_per_second"] for entry in entries(log)]
    assert looks[-1] == pytest.approx(10 / 30)  # four rows of 2, 3, 2 and 3 tokens
    assert all(look > 0 for look in looks)


def test_waiting_for_data_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the time that went by while rows were fetched; here the clock moves there, three seconds a row,
    and in the model, one second a row."""
    now = [0.0]
    monkeypatch.setattr("llm2vec.training.log.time", SimpleNamespace(monotonic=lambda: now[0]))
    module, quick_collate, quick_forward = sys.modules[__name__], collate, Toy.forward

    def slow_collate(rows: list[int]) -> Batch:
        now[0] += 3 * len(rows)
        return quick_collate(rows)

    def slow_forward(self: Toy, batch: Batch, totals: dict[str, Tensor]) -> Output:
        now[0] += len(batch["side"]["lengths"])
        return quick_forward(self, batch, totals)

    monkeypatch.setattr(module, "collate", slow_collate)
    monkeypatch.setattr(Toy, "forward", slow_forward)
    _, _, log = run(tmp_path, num_rows=16, gradient_accumulation_steps=2)
    # The loader is one batch of two rows ahead: six rows for the first step of four, two for the last.
    waits = [6 * 3, 4 * 3, 4 * 3, 2 * 3]
    assert [entry["waiting_for_data"] for entry in entries(log)] == pytest.approx([w / (w + 4) for w in waits])


@pytest.mark.parametrize("reduction", ["token_mean", "micro_batch_mean"])
@pytest.mark.parametrize(("max_tokens", "most_rows"), [(7, 2), (4, 2), (1, 1)])
def test_pieces_of_a_micro_batch_change_nothing(
    tmp_path: Path, max_tokens: int, most_rows: int, reduction: Reduction
) -> None:
    """The log and the weights of a run without them; the objective sees fewer rows at once."""
    keys: dict[str, Any] = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_rows": 16, "reduction": reduction,
        "held_out": (list(range(8)), Numbered(8)), "eval_strategy": "steps", "eval_steps": 1,
        "per_device_eval_batch_size": 4,
    }  # fmt: skip
    whole, _, whole_log = run(tmp_path / "whole", **keys)
    cut, _, cut_log = run(tmp_path / "cut", max_tokens=max_tokens, **keys)
    timed = {
        "tokens_per_second",
        "waiting_for_data",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
    }
    assert len(cut_log) == len(whole_log)
    for one, other in zip(cut_log, whole_log, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - timed:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    assert {"loss", "loss_squares", "number"} <= entries(cut_log)[0].keys()
    assert len(entries(cut_log)) == 2 <= sum("eval_loss_squares" in entry for entry in cut_log)
    assert cut.weight.item() == pytest.approx(whole.weight.item(), rel=1e-6) != 0
    assert {len(rows) for rows in whole.seen} == {4}
    assert max(len(rows) for rows in cut.seen) == most_rows
    assert sorted(number for rows in cut.seen for number in rows) == sorted(
        number for rows in whole.seen for number in rows
    )
    assert set(cut.totals) == set(whole.totals)


def test_a_run_starts_its_log_anew(tmp_path: Path) -> None:
    run(tmp_path)
    _, _, log = run(tmp_path, num_rows=4)
    assert [entry["step"] for entry in entries(log)] == [1, 2]


def test_held_out_rows_are_run_once_where_a_step_ends_an_epoch(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 2, "num_rows": 8}
    _, _, log = run(tmp_path, held_out=(list(range(4)), Numbered(4)), **keys)
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4, 6, 8]


# --- the end ---


def test_stopping_early_leaves_the_schedule_alone(tmp_path: Path) -> None:
    """The first steps of a run cut at four are those of the whole run, learning rate included."""
    keys: dict[str, Any] = {"max_steps": 10, "num_rows": 20, "lr_scheduler_type": "linear", "warmup_steps": 2}
    _, whole, whole_log = run(tmp_path / "whole", **keys)
    _, cut, cut_log = run(tmp_path / "cut", stop_after_n_steps=4, **keys)
    assert (whole.state.global_step, cut.state.global_step) == (10, 4)
    for one, other in zip(entries(cut_log), entries(whole_log)[:4], strict=True):
        assert all(one[name] == other[name] for name in ("step", "loss", "number", "learning_rate"))
    rates = [entry["learning_rate"] for entry in entries(whole_log)]
    assert rates == pytest.approx(
        [0.01 * rate for rate in (0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)]
    )


def test_stopping_between_two_entries_of_the_log(tmp_path: Path) -> None:
    _, trainer, log = run(tmp_path, stop_after_n_steps=3, logging_steps=2)
    assert trainer.state.global_step == 3
    assert [entry["step"] for entry in entries(log)] == [2]


def test_saving_is_left_to_the_function_given(tmp_path: Path) -> None:
    """It is called with the folder that becomes each checkpoint, and with the output folder at the end."""
    saved: list[Path] = []

    def save_to(folder: Path, weights: dict[str, Tensor] | None) -> None:
        assert weights is None  # they lie spread over no processes
        folder.mkdir(exist_ok=True)
        saved.append(folder)

    _, trainer, _ = run(tmp_path, save_to=save_to, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer.save_model()
    assert saved == [tmp_path / f".checkpoint-{step}" for step in (2, 4, 6)] + [tmp_path]
    assert sorted(path.name for path in tmp_path.glob("*check*")) == [f"checkpoint-{step}" for step in (2, 4, 6)]
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.safetensors"))


# --- the real objectives, through the scripts ---


def run_script(stage: str, config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training script in this process; returns its output folder."""
    file = folder / f"{config['output_dir']}.json"
    output = folder / config["output_dir"]
    file.write_text(json.dumps({**config, "output_dir": str(output)}), encoding="utf-8")
    script = str(ROOT / f"experiments/run_{stage}.py")
    monkeypatch.setattr(sys, "argv", [script, str(file)])
    runpy.run_path(script, run_name="__main__")
    return output


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Keys of a short run over 24 rows and a base model with a head of its own."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    rows = reference.examples(24, 1)
    write_jsonl(
        tmp_path / "words.jsonl",
        [{"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text} for r in rows],
    )
    (tmp_path / "sources.json").write_text(json.dumps({"words": {"file": "words.jsonl"}}), encoding="utf-8")
    return {
        "model_name_or_path": str(tmp_path / "base"),
        "sources_file": str(tmp_path / "sources.json"),
        "max_seq_length": 64,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 2,
        "save_steps": 2,
        "save_only_model": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def read_log(folder: Path) -> list[dict[str, Any]]:
    return entries([json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()])


def embed(base: Path, adapter: Path | None = None) -> Tensor:
    model = LLM2Vec.from_pretrained(str(base), None if adapter is None else str(adapter))
    vectors = model.encode([["find it", "who wrote it"], "hello world"], show_progress_bar=False, device="cpu")
    assert isinstance(vectors, Tensor)
    return vectors


def test_stage_I_logs_the_mix_of_its_parts(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = read_log(run_script("stage_I", {**data, "output_dir": "I", "alpha": 0.3}, tmp_path, monkeypatch))
    assert [entry["step"] for entry in log] == [2, 4]
    for entry in log:
        assert entry["loss_q2d"] != pytest.approx(entry["loss_d2q"], rel=1e-3)
        assert entry["loss"] == pytest.approx(0.3 * entry["loss_q2d"] + 0.7 * entry["loss_d2q"], rel=1e-5)
        assert entry["tokens_per_second"] > 0
    assert log[1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
def test_tokens_per_microbatch_changes_nothing_but_memory(
    stage: str, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same curve of either stage, held-out figures included; more and smaller passes through the model."""
    passes: list[int] = []
    original = packing.packed_hidden_states

    def counted(model: Any, attention: Any, lengths: Any, *arguments: Any, **keywords: Any) -> Tensor:
        passes.append(sum(lengths))
        return original(model, attention, lengths, *arguments, **keywords)

    for module in (embed_module, llm2vec_q2d_d2q):
        monkeypatch.setattr(module, "packed_hidden_states", counted)
    keys = {**data, "optim": "sgd", "num_eval_rows": 8, "eval_strategy": "steps", "eval_steps": 3, "lora_r": 4}
    keys |= {"save_strategy": "no", "lora_dropout": 0.0, "learning_rate": 0.1, "logging_steps": 1}
    del keys["per_device_train_batch_size"]
    logs, largest = [], []
    for name, budget in (("whole", {}), ("cut", {"tokens_per_microbatch": 64})):
        passes.clear()
        output = run_script(stage, {**keys, "total_batch_size": 8, "output_dir": name, **budget}, tmp_path, monkeypatch)
        lines = (output / LOG_FILE).read_text(encoding="utf-8").splitlines()
        kinds = [(kind, entry) for entry in map(json.loads, lines) for kind in ("loss", "eval_loss") if kind in entry]
        logs.append({(entry["step"], kind): entry for kind, entry in kinds})
        largest.append(max(passes))
    assert largest[1] <= 64 < largest[0] / 2
    assert logs[0].keys() == logs[1].keys() >= {*((step, "loss") for step in range(1, 5)), (3, "eval_loss")}
    for one, other in zip(logs[0].values(), logs[1].values(), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"tokens_per_second", "waiting_for_data", "epoch"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    steps = [entry for (_, kind), entry in logs[0].items() if kind == "loss"]
    assert len({round(entry["loss"], 3) for entry in steps}) == 4  # a flat curve would prove nothing
    assert all(0 <= entry["waiting_for_data"] <= 1 for entry in steps)


def test_checkpoints_along_the_way_load_and_carry_on(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """checkpoint-N of either stage embeds, and Stage II starts from a checkpoint-N of Stage I."""
    first = run_script("stage_I", {**data, "output_dir": "I"}, tmp_path, monkeypatch)
    assert {folder.name for folder in first.iterdir() if folder.is_dir()} == {"checkpoint-2", "checkpoint-4"}
    assert torch.equal(embed(first / "checkpoint-4"), embed(first))
    assert (embed(first / "checkpoint-2") - embed(first)).abs().max() > 1e-3
    halfway = first / "checkpoint-2"
    keys = {**data, "model_name_or_path": str(halfway), "output_dir": "II", "lora_r": 4}
    second = run_script("stage_II", keys, tmp_path, monkeypatch)
    log = read_log(second)
    assert [entry["step"] for entry in log] == [2, 4]
    assert all(entry["loss"] == pytest.approx(entry["loss_contrastive"], rel=1e-5) for entry in log)
    assert all(0 <= entry["in_batch_accuracy"] <= 1 for entry in log)
    assert torch.equal(embed(halfway, second / "checkpoint-4"), embed(halfway, second))
    assert (embed(halfway, second / "checkpoint-2") - embed(halfway, second)).abs().max() > 1e-4
    assert torch.equal(embed(second), embed(halfway, second))
    assert (second / "checkpoint-2" / SETTINGS_FILE).exists()
    expected = {"pooling_mode": "last", "template": "llama3", "instruction_join": "; ", "attention": "causal"}
    for folder in (first, halfway, second, second / "checkpoint-2"):
        assert open_folder(str(folder)).settings.items() >= expected.items()


def test_in_batch_accuracy_reaches_one_where_it_can(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows seen again and again: the figure rises as the loss falls."""
    rows = [
        Example("w", InstructedText("", w), InstructedText("", f"the {w}"), ()) for w in ("red", "hello", "find", "who")
    ]
    write_jsonl(tmp_path / "words.jsonl", [{"query": r.query.text, "positive": r.positive.text} for r in rows])
    keys = {"max_steps": 40, "num_hard_negatives": 0, "lora_dropout": 0.0, "save_strategy": "no", "output_dir": "II"}
    log = read_log(run_script("stage_II", {**data, **keys}, tmp_path, monkeypatch))
    assert log[-1]["in_batch_accuracy"] == 1
    assert log[-1]["loss"] < 0.1 * log[0]["loss"]
