"""The one Trainer: one-source batches, losses as means over the whole optimiser step, loss parts in the log.

It knows no loss: an objective says how many terms each part of a micro-batch holds and computes the parts
(`types.Objective`). It knows no checkpoint format: it is handed a function that writes one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llm2vec.distributed import sum_over_ranks
from llm2vec.sharding import shard_on_cpu
from llm2vec.step import add_up, backward_step, loss_parts
from llm2vec.types import Batch, Reduction

LOG_FILE = "log.jsonl"


class EmbedderTrainer(Trainer):
    """transformers' Trainer around an objective.

    Args:
        objective: module with `count` and `forward` as in `types.Objective`.
        args: training arguments.
        rows: the training rows.
        collate: rows of a micro-batch -> Batch.
        sampler: order of the rows; consecutive rows fill one micro-batch of one process after the other.
        reduction: `token_mean`: every loss part is a mean over the terms of the whole optimiser step; or
            `micro_batch_mean`: a mean over micro-batches of each micro-batch's mean.
        save_to: writes the model into a folder, which it makes; called on the main process, with the objective's
            weights where those lie spread over the processes (FSDP), else with None.
        stop_after_n_steps: end here, whatever the schedule's horizon.
        held_out: rows and their order for the figures logged as `eval_...`; None = no evaluation.
        probe: further figures to log with those; called on every rank.
        max_tokens: most tokens that go through the model at once (`step.backward_step`); None = a whole micro-batch.
    """

    # The objective divides by what the whole step holds, so the loop must not divide by the accumulation again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        objective: nn.Module,
        args: TrainingArguments,
        rows: Dataset[Any],
        collate: Callable[[list[Any]], Batch],
        sampler: Sampler[int],
        *,
        reduction: Reduction,
        save_to: Callable[[Path, dict[str, Tensor] | None], None],
        stop_after_n_steps: int | None,
        held_out: tuple[Dataset[Any], Sampler[int]] | None = None,
        probe: Callable[[], dict[str, float]] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        args._n_gpu = min(args.n_gpu, 1)  # several cards mean torchrun here; DataParallel would split the in-batch pool
        eval_rows, eval_sampler = held_out if held_out is not None else (None, None)
        super().__init__(model=objective, args=args, train_dataset=rows, eval_dataset=eval_rows, data_collator=collate)
        self.model_accepts_loss_kwargs = True
        self._sampler = sampler
        self._eval_sampler = eval_sampler
        self._probe = probe
        self._reduction = reduction
        self._save_to = save_to
        self._max_tokens = max_tokens
        self._parts: dict[str, Tensor] = {}
        self._num_tokens = 0.0
        self._waited = 0.0
        self._last_log: tuple[float, int] | None = None
        self.add_callback(StopAfter(stop_after_n_steps))
        self.add_callback(JsonLog())
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressToStop(stop_after_n_steps))

    def create_accelerator_and_postprocess(self) -> None:
        """Called by the trainer: FSDP holds on the CPU too."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and not self.is_fsdp_enabled:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        return self._eval_sampler

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The objective's loss parts on the held-out rows: a mean over micro-batches, each rank taking its share."""
        started = time.monotonic()
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        sums: dict[str, Tensor] = {}
        num_batches = 0
        for batch in self.get_eval_dataloader():
            names, counts = zip(*self._objective().count(batch).items(), strict=True)
            totals = dict(zip(names, sum_over_ranks(torch.stack(counts).to(self.args.device)).unbind(), strict=True))
            sums = add_up([sums, loss_parts(self.model_wrapped, batch, totals, self._max_tokens)])
            num_batches += 1
        further = self._probe() if self._probe is not None else {}
        self.model_wrapped.train(was_training)
        values = sum_over_ranks(torch.stack(list(sums.values())).float()) / num_batches
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in zip(sums, values.tolist(), strict=True)}
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in further.items()}
        self.log(metrics)
        # Takes back the wish to evaluate, or a step that ends an epoch would do so twice.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._last_log is not None:  # this time was not spent on training tokens
            self._last_log = (self._last_log[0] + time.monotonic() - started, self._last_log[1])
        return metrics

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """An optimiser step's micro-batches, and how many loss terms they hold on all ranks together."""
        if self._last_log is None:
            self._last_log = (time.monotonic(), self.state.global_step)
        asked = time.monotonic()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.monotonic() - asked
        if not batches:
            return batches, None
        counts = [{**self._objective().count(b), "tokens": _num_tokens(b)} for b in batches]
        names = list(counts[0])
        totals = sum_over_ranks(torch.stack([torch.stack([c[n].to(device) for c in counts]).sum() for n in names]))
        by_name = dict(zip(names, totals.unbind(), strict=True))
        self._num_tokens += float(by_name.pop("tokens"))
        return batches, by_name

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Add a micro-batch's gradient, in pieces of `max_tokens`; always through the wrapped model, or ranks would
        drift apart."""
        assert num_items_in_batch is not None, "get_batch_samples counts every step's terms"
        model.train()
        batch: Batch = self._prepare_inputs(inputs)  # type: ignore[assignment]
        num_processes = self.accelerator.num_processes
        totals = num_items_in_batch
        if self._reduction == "micro_batch_mean":
            shares = self.current_gradient_accumulation_steps * num_processes
            totals = {name: count * shares for name, count in self._objective().count(batch).items()}
        # The wrapper averages gradients over ranks, while shares add up.
        parts = backward_step(
            model,
            batch,
            totals,
            max_tokens=self._max_tokens,
            scale=num_processes,
            backward=self.accelerator.backward,
            # Under FSDP, gradients that wait for the others would lie whole on every process.
            no_sync=lambda: nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model),
        )
        self._parts = add_up([self._parts, {name: value for name, value in parts.items() if name != "loss"}])
        return parts["loss"] * num_processes  # the loop averages over ranks what it logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what happened since the last entry: the loss parts' means, tokens, and the share of time without rows."""
        if "loss" in logs and self._parts and self._last_log is not None:
            then, step_then = self._last_log
            self._last_log = (time.monotonic(), self.state.global_step)
            num_steps = self.state.global_step - step_then
            sums = sum_over_ranks(torch.stack(list(self._parts.values())).float())
            logs.update(dict(zip(self._parts, (sums / num_steps).tolist(), strict=True)))
            seconds = self._last_log[0] - then
            logs["tokens"] = self._num_tokens
            logs["tokens_per_second"] = self._num_tokens / seconds
            logs["waiting_for_data"] = self._waited / seconds
            self._parts, self._num_tokens, self._waited = {}, 0.0, 0.0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self._save_to(Path(output_dir or str(self.args.output_dir)), state_dict)

    def _objective(self) -> Any:
        return self.accelerator.unwrap_model(self.model)


def _num_tokens(batch: Batch) -> Tensor:
    """Real tokens of a micro-batch, all sides."""
    return torch.tensor(float(sum(sum(side["lengths"]) for side in batch.values())))


class StopAfter(TrainerCallback):
    """Ends the run after a number of optimiser steps, leaving the schedule's horizon where it is."""

    def __init__(self, num_steps: int | None) -> None:
        self.num_steps = num_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer."""
        if self.num_steps is not None and state.global_step >= self.num_steps:
            control.should_training_stop = True


class JsonLog(TrainerCallback):
    """Appends every log entry to `log.jsonl` in the output folder, one JSON object a line."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer: a run from step 0 starts a new file."""
        if state.is_world_process_zero and state.global_step == 0:
            Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
            Path(str(args.output_dir), LOG_FILE).write_text("", encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Called by the trainer."""
        if state.is_world_process_zero and logs:
            with Path(str(args.output_dir), LOG_FILE).open("a", encoding="utf-8") as out:
                out.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class ProgressToStop(ProgressCallback):
    """The library's progress bar, but as long as the run really is."""

    def __init__(self, stop_after_n_steps: int | None) -> None:
        super().__init__()
        self.stop_after_n_steps = stop_after_n_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and self.stop_after_n_steps is not None:
            self.training_bar.total = min(state.max_steps, self.stop_after_n_steps)
            self.training_bar.refresh()
