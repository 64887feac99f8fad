"""The one Trainer: batches of one source, losses as means over the whole optimiser step, loss parts in the log.

It is transformers' Trainer with some methods overridden. This is that Trainer's loop; a star marks what stands here:

    train*                            reads the weights of a checkpoint; the parent's does the rest:
      _get_dataloader*                rows in the order of _get_train_sampler*
      _init_training_state*           from which step on
      create_optimizer*, create_scheduler*, _load_optimizer_and_scheduler*, _load_rng_state*
      for each epoch: _run_epoch*
        for each optimiser step:
          get_batch_samples*          its micro-batches, and how many loss terms they hold on all processes
          for each micro-batch: training_step*, which is step.backward_step
          _get_grad_norm*             the gradient is complete and clipped: is the step taken, is it the last?
          optimizer.step, lr_scheduler.step, EndOfRun.on_step_end*
          where due: log*; evaluate* and _determine_best_metric*; _save_checkpoint*
      log*, _load_best_model*         the end

It knows no loss: an objective says how many terms each part of a micro-batch holds, and computes the parts
(`types.Objective`). It knows no checkpoint format: it is given functions that write and read one, and `saving` sees to
it that what is written is whole.

A run goes on from a checkpoint as if it had never stopped. transformers' Trainer restores optimiser, schedule, random
numbers and the place in the data; added here are the figures since the last entry of the log, and the sampler's epoch.

A step whose loss or gradient is not finite is skipped: weights and optimiser state stay, while the schedule and the
rows go on. In float16, an overflow is first of all the loss scale's affair (`_is_left_to_the_scaler`); the schedule
waits at every step that the scaler skips.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from llm2vec.data.order import NO_ROW, Slots, without_empty
from llm2vec.processes import leave_process_group
from llm2vec.training.config import Config
from llm2vec.training.config.arguments import of_arguments
from llm2vec.training.log import LOG_FILE, EndOfRun, JsonLog, ProgressToStop, StepFigures
from llm2vec.training.resume import last_checkpoint, step_of
from llm2vec.training.saving import CheckpointWriter, load_shares, of_state, save_shares
from llm2vec.training.step import backward_step, count_terms, mean_parts
from llm2vec.types import Batch, Objective, RunEnds, UserError

logger = logging.getLogger(__name__)


class EmbedderTrainer(Trainer):
    """transformers' Trainer around an objective.

    Args:
        config: of the run. Under its `reduction` `token_mean`, every loss part is a mean over the terms of the whole
            optimiser step; under `micro_batch_mean`, a mean over micro-batches of each micro-batch's mean.
        collate: rows of a micro-batch -> Batch.
        sampler: order of the rows, as `data.order.OneSourceBlocks` gives it. Consecutive rows fill one micro-batch of
            one process after the other.
        save_to: writes the model into a folder, which it makes. It is called on the main process, with the objective's
            weights where those lie spread over the processes (FSDP), else with None.
        load_from: reads what `save_to` wrote back into the objective's model; called on every rank.
        held_out: rows and their order for the figures logged as `eval_...`; None = no evaluation.
        probes: each tells further figures to log with those, given the optimiser step; called on every rank.
        place_of: the file, and the place in it, of a row by its index.
        should_stop: whether this process was asked to stop; asked once a step.
        callbacks: beside the run's own.

    Raises:
        UserError: the library refuses an argument, or weights shall be shared out (`fsdp`) where there are no GPUs.
    """

    # The objective divides by what the whole step holds, so the loop must not divide by the accumulation again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        objective: Objective,
        args: TrainingArguments,
        config: Config,
        rows: Dataset[Any],
        collate: Callable[[list[Any]], Batch],
        sampler: Sampler[int],
        *,
        save_to: Callable[[Path, dict[str, Tensor] | None], None],
        load_from: Callable[[Path], None],
        held_out: tuple[Dataset[Any], Sampler[int]] | None = None,
        probes: Sequence[Callable[[int], dict[str, float]]] = (),
        place_of: Callable[[int], tuple[str, int]] = lambda row: ("rows", row),
        should_stop: Callable[[], bool] = lambda: False,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        # Several cards mean torchrun here. DataParallel, which the library would choose, splits the in-batch pool.
        args._n_gpu = min(args.n_gpu, 1)
        # That filter waits for the device at every micro-batch; here a whole step is looked at, once.
        args.logging_nan_inf_filter = False
        eval_rows, eval_sampler = held_out or (None, None)
        slots, make_batch = Slots(rows), partial(without_empty, collate)
        with of_arguments():
            super().__init__(cast(nn.Module, objective), args, make_batch, slots, eval_rows, callbacks=list(callbacks))
        if args.fsdp_plugin_args is not None and not self.is_fsdp_enabled:
            # accelerate knows FSDP on GPUs only; on CPUs it would train whole copies without a word.
            raise UserError("fsdp shares the weights among GPUs, and this run has none; take fsdp out.")
        self.model_accepts_loss_kwargs = True
        self._config = config
        self._sampler = sampler
        self._eval_sampler = eval_sampler
        self._probes = probes
        self._save_to = save_to
        self._load_from = load_from
        self._place_of = place_of
        self._should_stop = should_stop
        self._checkpoints = CheckpointWriter(args)
        self._figures = StepFigures()
        self._json_log = JsonLog()
        self._end = EndOfRun(config.stop_after_n_steps)
        self.weights_of_step: int | None = None  #: that of the best checkpoint, once it is loaded at the end
        self.add_callback(self._end)
        self.add_callback(self._json_log)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressToStop(config.stop_after_n_steps))

    @property
    def is_stopped(self) -> bool:
        """Whether a process was asked to stop, with steps left to do."""
        return self._end.is_stopped(self.state)

    # --- the start ---

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train; where a checkpoint's folder is given, from there on. What is none that a run wrote is a
        `UserError`."""
        self._checkpoints.remove_unfinished()
        if resume_from_checkpoint is not None:
            # Here and not in `_load_from_checkpoint`, which comes after FSDP has spread the weights.
            with of_state(resume_from_checkpoint):
                self._load_from(Path(resume_from_checkpoint))
                self._figures.load(Path(resume_from_checkpoint), self.args.device)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Called where a run goes on, and empty: it would look for the objective's weights; `train` has read them."""

    def _init_training_state(self, max_steps: int, *arguments: Any) -> Any:
        """Called once, to read a checkpoint's record."""
        with of_state(arguments[2]):
            begun = super()._init_training_state(max_steps, *arguments)
        # The record also says how often the run before logged and saved. What is asked for now counts.
        self.state.compute_steps(self.args, max_steps)
        return begun

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> Any:
        """Called once, before the first epoch."""
        with of_arguments():
            return super().create_optimizer(*arguments, **keywords)

    def create_scheduler(self, *arguments: Any, **keywords: Any) -> Any:
        """Called once, after the optimiser is there."""
        with of_arguments():
            return super().create_scheduler(*arguments, **keywords)

    def _get_dataloader(self, *arguments: Any, **keywords: Any) -> DataLoader[Any]:
        """Called to train, and at each evaluation: the library's loader, whose workers outlive a signal to stop."""
        with of_arguments():
            loader: Any = super()._get_dataloader(*arguments, **keywords)
        loader.device = None  # `_moved` does it; where rows are skipped, accelerate's loader would wait for it
        rows_only = loader.base_dataloader  # accelerate's loader hands on what this one yields
        rows_only.worker_init_fn = partial(_begin_worker, rows_only.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        return self._eval_sampler

    # --- a step ---

    def _run_epoch(self, **arguments: Any) -> None:  # type: ignore[override]
        """Called for each epoch that is left, by keyword."""
        # accelerate tells the sampler the epoch, but not where it skips rows that several processes share.
        self._sampler.set_epoch(arguments["epoch"])  # type: ignore[attr-defined]
        self._end.steps_per_epoch = arguments["num_update_steps_per_epoch"]
        if self._end.is_reached(self.state):  # a run that goes on from its last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """Called as a step begins: its micro-batches, and how many loss terms they hold on all ranks together."""
        self._figures.start()
        with self._figures.waiting():
            batches, _ = super().get_batch_samples(map(self._moved, epoch_iterator), num_batches, device)
        if not batches:
            return batches, None
        totals, tokens = count_terms(self._objective(), batches, device)
        self._figures.add_tokens(tokens)
        return batches, totals

    def _moved(self, batch: Batch) -> Batch:
        """A batch on the device; from pinned memory, nobody waits for it."""
        return cast(Batch, send_to_device(batch, self.args.device, non_blocking=self.args.dataloader_pin_memory))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Called for each micro-batch: add its gradient, in pieces of `tokens_per_microbatch`.

        `model` is the objective in its wrapper for several processes; called past it, their weights would drift apart.
        """
        assert num_items_in_batch is not None, "get_batch_samples counts every step's terms"
        model.train()
        batch: Batch = self._prepare_inputs(inputs)  # type: ignore[assignment]
        num_processes = self.accelerator.num_processes
        totals = num_items_in_batch
        if self._config.reduction == "micro_batch_mean":
            shares = self.current_gradient_accumulation_steps * num_processes
            totals = {name: count * shares for name, count in self._objective().count(batch).items()}
        parts = backward_step(
            cast(Objective, model),
            batch,
            totals,
            max_tokens=self._config.tokens_per_microbatch,
            # The wrapper averages gradients over ranks; but each rank's is a share, and shares add up.
            scale=num_processes,
            backward=self.accelerator.backward,
            # Under FSDP, gradients that wait for the others would lie whole on every process.
            no_sync=lambda: nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model),
        )
        self._figures.add(parts)
        return parts["loss"] * num_processes  # the loop averages over ranks

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Called when a step's gradient is complete and clipped: is the step taken, is it the last one?

        The norm that is returned goes to the log; None where it is not finite. The optimiser's step comes next.
        """
        norm: Any = super()._get_grad_norm(model, grad_norm)
        found = self._figures.findings(norm, self._should_stop(), self.args.device)
        self._end.is_asked_for = self._end.is_asked_for or found.stop
        if found.bad_loss or (found.bad_gradient and not self._is_left_to_the_scaler()):
            self._skip_step(model, "loss" if found.bad_loss else "gradient")
        else:
            self._figures.keep_step()
        return None if found.bad_loss or found.bad_gradient else norm

    def _is_left_to_the_scaler(self) -> bool:
        """Whether float16's loss scale may be at fault, which the scaler lowers with each step that it skips itself."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _skip_step(self, model: nn.Module, what: str) -> None:
        """Leave weights and optimiser as they are, and say so; too many such steps in a row end the run."""
        model.zero_grad()  # the optimiser's step comes all the same; without gradients it changes nothing
        self._figures.drop_step()
        self._json_log.note_skipped(self.args, self.state, what, map(self._place_of, self._rows_of_step()))
        if self._figures.skipped_in_a_row >= self._config.max_skipped_steps:
            raise RunEnds(
                f"{self._figures.skipped_in_a_row} steps in a row, up to step {self.state.global_step + 1:,}, had a "
                f"loss or a gradient that is not finite; {LOG_FILE} names their rows. "
                f"{last_checkpoint(self._checkpoints.output_dir, self.state.global_step)}",
                code=1,
            )

    def _rows_of_step(self) -> list[int]:
        """Indices of the rows of the step under way, of all processes: consecutive ones of the sampler's order."""
        per_step = self.get_total_train_batch_size(self.args)
        first = self.state.global_step % self._end.steps_per_epoch * per_step
        order = self._sampler.rows_from(first)  # type: ignore[attr-defined]
        return [row for row in itertools.islice(order, per_step) if row != NO_ROW]

    # --- between steps ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called every `logging_steps`, after an evaluation, and at the end."""
        self._figures.complete(logs)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Called every `eval_steps`: loss parts on the held-out rows, which the ranks share, and probes' figures."""
        with self._figures.paused():
            was_training = self.model_wrapped.training
            self.model_wrapped.eval()
            objective = cast(Objective, self.model_wrapped)
            loader = self.get_eval_dataloader()
            loader.iteration = 0  # which accelerate counts on in a loader that is kept, and orders rows by
            batches = map(self._moved, loader)
            figures = mean_parts(objective, batches, self.args.device, self._config.tokens_per_microbatch)
            for probe in self._probes:
                figures |= probe(self.state.global_step)
            self.model_wrapped.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        # Takes back the wish to evaluate, or a step that ends an epoch would do so twice.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Called after an evaluation: is it the best one? With `save_strategy` "best", only such steps are saved."""
        try:
            is_best = super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            known = ", ".join(name for name in metrics if name.startswith("eval_"))
            raise UserError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}, which no evaluation of this run "
                f"measures; it measures {known}."
            ) from error
        return is_best or (self.is_stopped and self.control.should_save)  # or a stop would leave no checkpoint

    # --- saving and loading ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Called where a checkpoint is due, after what is logged and evaluated at that step."""
        self._checkpoints.write(self.state, self.optimizer, self._write_files)

    def _write_files(self, folder: Path) -> None:
        """What this process writes of a checkpoint."""
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model or self.is_stopped:  # who stops a run means to go on
            if self.is_fsdp_enabled:
                save_shares(folder, self.optimizer, self.lr_scheduler, self.args.should_save)  # type: ignore[arg-type]
            else:
                self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self._figures.save(folder)

    def save_last(self) -> None:
        """Write the model into the output folder; where it cannot be written, `RunEnds` says so."""
        self._checkpoints.write_last(self.state, self.optimizer, self.save_model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Called by `save_model`, with the gathered weights under FSDP."""
        if self.args.should_save:
            self._save_to(Path(output_dir or str(self.args.output_dir)), state_dict)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Called before the first epoch, also where there is no checkpoint."""
        with of_state(checkpoint):
            if self.is_fsdp_enabled and checkpoint is not None:
                load_shares(Path(checkpoint), self.optimizer, self.lr_scheduler)  # type: ignore[arg-type]
            else:
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called at the first epoch's beginning, or where its rows go on."""
        with of_state(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """Called after the last step, where `load_best_model_at_end` asks for it."""
        best = Path(str(self.state.best_model_checkpoint))
        self._load_from(best)
        self.weights_of_step = step_of(best)

    def _objective(self) -> Objective:
        return self.accelerator.unwrap_model(self.model)


def _begin_worker(begin: Callable[[int], None] | None, worker_id: int) -> None:
    leave_process_group(worker_id)
    if begin is not None:
        begin(worker_id)
