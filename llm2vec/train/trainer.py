"""The one Trainer: one-source batches, losses as means over the whole optimiser step, loss parts in the log.

It knows no loss: an objective says how many terms each part of a micro-batch holds and computes the parts
(`types.Objective`). It knows no checkpoint format: it is handed functions that write and read one.

A run goes on from a checkpoint as if it had never stopped: transformers' Trainer restores optimiser, schedule, random
numbers and the place in the data; here are the figures since the last entry of the log, and the epoch of the sampler.

A step whose loss or gradient is not finite is skipped: the weights and the optimiser's state stay as they are, while
the schedule and the rows go on. In float16, a gradient that overflows is the loss scale's affair: the scaler skips the
step and makes the scale smaller, and it counts here only once the scale has come down to 1. The schedule waits at every
step that the scaler skips, counted or not.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from llm2vec.distributed import max_over_ranks, sum_over_ranks
from llm2vec.model.checkpoint import write_sums
from llm2vec.processes import leave_process_group, rank
from llm2vec.train.log import LOG_FILE, JsonLog, StepFigures
from llm2vec.train.resume import (
    FIGURES_FILE,
    checkpoint_folder,
    checkpoints_in,
    file_of_rank,
    last_checkpoint,
    remove_checkpoint,
    step_of,
)
from llm2vec.train.sharding import load_own_share, own_share, shard_on_cpu
from llm2vec.train.step import add_up, backward_step, loss_parts
from llm2vec.types import Batch, Reduction, RunEnds, UserError, first_line

__all__ = ["LOG_FILE", "EmbedderTrainer"]

logger = logging.getLogger(__name__)

#: What writing to a full or broken disk raises, from Python, torch and safetensors; and comparing what was written.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, RunEnds)


class EmbedderTrainer(Trainer):
    """transformers' Trainer around an objective.

    Args:
        objective: module with `count` and `forward` as in `types.Objective`.
        args: training arguments.
        rows: the training rows.
        collate: rows of a micro-batch -> Batch.
        sampler: order of the rows, as `data.OneSourceBlocks` gives it; consecutive rows fill one micro-batch of one
            process after the other.
        reduction: `token_mean`: every loss part is a mean over the terms of the whole optimiser step; or
            `micro_batch_mean`: a mean over micro-batches of each micro-batch's mean.
        save_to: writes the model into a folder, which it makes; called on the main process, with the objective's
            weights where those lie spread over the processes (FSDP), else with None.
        stop_after_n_steps: end here, whatever the schedule's horizon.
        held_out: rows and their order for the figures logged as `eval_...`; None = no evaluation.
        probes: each tells further figures to log with those, given the optimiser step; called on every rank.
        max_tokens: most tokens that go through the model at once (`step.backward_step`); None = a whole micro-batch.
        load_from: reads what `save_to` wrote back into the objective's model; called on every rank.
        place_of: the file, and the place in it, of a row by its index.
        should_stop: whether this process was asked to stop; asked once a step.
        max_skipped_steps: so many skipped steps in a row end the run.

    Attributes:
        weights_of_step: the step of the best checkpoint, once its weights are loaded (`load_best_model_at_end`).
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
        probes: Sequence[Callable[[int], dict[str, float]]] = (),
        max_tokens: int | None = None,
        load_from: Callable[[Path], None] | None = None,
        place_of: Callable[[int], tuple[str, int]] = lambda row: ("rows", row),
        should_stop: Callable[[], bool] = lambda: False,
        max_skipped_steps: int = 5,
    ) -> None:
        args._n_gpu = min(args.n_gpu, 1)  # several cards mean torchrun here; DataParallel would split the in-batch pool
        args.logging_nan_inf_filter = False  # it waits for the device at every micro-batch; steps are looked at here
        eval_rows, eval_sampler = held_out if held_out is not None else (None, None)
        with _of_arguments():
            super().__init__(
                model=objective, args=args, train_dataset=rows, eval_dataset=eval_rows, data_collator=collate
            )
        self.model_accepts_loss_kwargs = True
        self._sampler = sampler
        self._eval_sampler = eval_sampler
        self._probes = probes
        self._reduction = reduction
        self._save_to = save_to
        self._max_tokens = max_tokens
        self._load_from = load_from
        self._place_of = place_of
        self._should_stop = should_stop
        self._max_skipped_steps = max_skipped_steps
        self._stop_after_n_steps = stop_after_n_steps
        self._steps_per_epoch = 1
        self._figures = StepFigures()
        self._json_log = JsonLog()
        self._is_asked_to_stop = False
        self.weights_of_step: int | None = None
        self.add_callback(StopAfter(stop_after_n_steps))
        self.add_callback(StopWhenAsked(self))
        self.add_callback(self._json_log)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressToStop(stop_after_n_steps))

    def create_accelerator_and_postprocess(self) -> None:
        """Called by the trainer: FSDP holds on the CPU too."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and not self.is_fsdp_enabled:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    @property
    def _is_over(self) -> bool:
        return self.state.global_step >= min(self.state.max_steps, self._stop_after_n_steps or self.state.max_steps)

    @property
    def is_stopped(self) -> bool:
        """Whether a process was asked to stop, with steps left to do."""
        return self._is_asked_to_stop and not self._is_over

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train, from a checkpoint's folder on if one is given; its weights are read before they may be spread.

        Raises:
            UserError: the checkpoint is not named by its folder, or not one that a run wrote.
        """
        if isinstance(resume_from_checkpoint, bool):
            raise UserError(f"resume_from_checkpoint is {resume_from_checkpoint}; a checkpoint's folder is needed.")
        for unfinished in Path(str(self.args.output_dir)).glob(".checkpoint-*") if rank() == 0 else ():
            shutil.rmtree(unfinished)
        if resume_from_checkpoint is not None:
            assert self._load_from is not None
            folder = Path(resume_from_checkpoint)
            self._load_from(folder)
            self._figures.load(folder / file_of_rank(FIGURES_FILE, rank()), self.args.device)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except UnpicklingError as error:  # its text advises to open the file all the same
            raise UserError(
                f"{resume_from_checkpoint}: the state of the optimiser, the schedule or the random numbers holds more "
                "than numbers, so it was not written by a run and is not opened; use another checkpoint."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Called by the trainer, which would look for the objective's own weights; `train` has read the model's."""

    def _load_best_model(self) -> None:
        """Called by the trainer at the end, where `load_best_model_at_end` asks for it."""
        assert self._load_from is not None
        best = Path(str(self.state.best_model_checkpoint))
        self._load_from(best)
        self.weights_of_step = step_of(best)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Called by the trainer after an evaluation; with `save_strategy` "best" it saves just where this is true, and
        would forget the checkpoint of a run that stops."""
        try:
            is_best = super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            known = ", ".join(name for name in metrics if name.startswith("eval_"))
            raise UserError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}, which no evaluation of this run "
                f"measures; it measures {known}."
            ) from error
        return is_best or (self.is_stopped and self.control.should_save)

    def _init_training_state(self, max_steps: int, *arguments: Any) -> Any:
        """Called by the trainer, which would log and save as often as before, whatever is asked for now."""
        begun = super()._init_training_state(max_steps, *arguments)
        self.state.compute_steps(self.args, max_steps)
        return begun

    def _run_epoch(self, **arguments: Any) -> None:  # type: ignore[override]
        """Called by the trainer, by keyword. A run that goes on from its last step has none left; and the sampler of a
        loader that skips rows among several processes is not told the epoch otherwise."""
        self._sampler.set_epoch(arguments["epoch"])  # type: ignore[attr-defined]
        self._steps_per_epoch = arguments["num_update_steps_per_epoch"]
        if self._is_over:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> Any:
        """Called by the trainer."""
        with _of_arguments():
            return super().create_optimizer(*arguments, **keywords)

    def create_scheduler(self, *arguments: Any, **keywords: Any) -> Any:
        """Called by the trainer."""
        with _of_arguments():
            return super().create_scheduler(*arguments, **keywords)

    def _get_dataloader(self, *arguments: Any, **keywords: Any) -> DataLoader[Any]:
        """Called by the trainer, to train and to evaluate: its loader, with workers that outlive a signal to stop."""
        with _of_arguments():
            loader: Any = super()._get_dataloader(*arguments, **keywords)
        rows_only = loader.base_dataloader  # accelerate's loader hands on what this one yields
        rows_only.worker_init_fn = partial(_begin_worker, rows_only.worker_init_fn)
        return loader

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
        with self._figures.paused():
            was_training = self.model_wrapped.training
            self.model_wrapped.eval()  # torch's mode without dropout; no code is evaluated
            sums: dict[str, Tensor] = {}
            num_batches = 0
            for batch in self.get_eval_dataloader():
                names, counts = zip(*self._objective().count(batch).items(), strict=True)
                totals = dict(
                    zip(names, sum_over_ranks(torch.stack(counts).to(self.args.device)).unbind(), strict=True)
                )
                sums = add_up([sums, loss_parts(self.model_wrapped, batch, totals, self._max_tokens)])
                num_batches += 1
            further = {name: value for probe in self._probes for name, value in probe(self.state.global_step).items()}
            self.model_wrapped.train(was_training)
            values = sum_over_ranks(torch.stack(list(sums.values())).float()) / num_batches
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in zip(sums, values.tolist(), strict=True)}
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in further.items()}
        self.log(metrics)
        # Takes back the wish to evaluate, or a step that ends an epoch would do so twice.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """An optimiser step's micro-batches, and how many loss terms they hold on all ranks together."""
        self._figures.start()
        with self._figures.waiting():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = [{**self._objective().count(b), "tokens": _num_tokens(b)} for b in batches]
        names = list(counts[0])
        totals = sum_over_ranks(torch.stack([torch.stack([c[n].to(device) for c in counts]).sum() for n in names]))
        by_name = dict(zip(names, totals.unbind(), strict=True))
        self._figures.add_tokens(float(by_name.pop("tokens")))
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
        self._figures.add(parts)
        return parts["loss"] * num_processes  # the loop averages over ranks

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Called by the trainer when a step's gradient is complete; None where it is not finite.

        All processes learn together whether the step is skipped and whether it is the last: one sum over them, and one
        wait for the device.
        """
        norm: Any = super()._get_grad_norm(model, grad_norm)
        local_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        flags = [~self._figures.step_loss.isfinite(), ~local_norm.isfinite()]
        asked = torch.tensor(self._should_stop(), device=self.args.device)
        bad_loss, bad_norm, stop = sum_over_ranks(torch.stack([*flags, asked]).float()).tolist()
        self._is_asked_to_stop = self._is_asked_to_stop or stop > 0
        if bad_loss or (bad_norm and not self._scaler_skips()):
            self._skip_step(model, "loss" if bad_loss else "gradient")
        else:
            self._figures.keep_step()
        return None if bad_loss or bad_norm else norm

    def _scaler_skips(self) -> bool:
        """Whether a gradient that is not finite may be the loss scale's fault."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _skip_step(self, model: nn.Module, what: str) -> None:
        """Leave weights and optimiser as they are: without gradients, its step changes nothing."""
        model.zero_grad()
        self._figures.drop_step()
        step = self.state.global_step + 1
        rows: dict[str, list[int]] = {}
        for file, place in map(self._place_of, self._rows_of_step()):
            rows.setdefault(file, []).append(place)
        entry: Any = {"step": step, "skipped": f"the {what} is not finite", "rows": rows}
        self.state.log_history.append(entry)
        self._json_log.on_log(self.args, self.state, self.control)
        logger.warning("step %s is skipped: its %s is not finite; %s names its rows", f"{step:,}", what, LOG_FILE)
        if self._figures.skipped_in_a_row >= self._max_skipped_steps:
            last = last_checkpoint(self._output_dir, self.state.global_step)
            raise RunEnds(
                f"{self._figures.skipped_in_a_row} steps in a row, up to step {step:,}, had a loss or a gradient that "
                f"is not finite; {LOG_FILE} names their rows. {last}",
                code=1,
            )

    def _rows_of_step(self) -> list[int]:
        """Indices of the rows of the step under way, of all processes: consecutive ones of the sampler's order."""
        within = self.state.global_step % self._steps_per_epoch
        per_step = self.get_total_train_batch_size(self.args)
        order = self._sampler.rows_from(within * per_step)  # type: ignore[attr-defined]
        return list(itertools.islice(order, per_step))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what happened since the last entry: the loss parts' means, tokens, and the share of time without rows."""
        if "loss" in logs:
            entry = self._figures.entry()
            if "loss" not in entry:  # no step was taken since
                del logs["loss"]
            logs.update(entry)
        elif "train_loss" in logs and (loss := self._figures.mean_loss()) is not None:
            logs["train_loss"] = loss
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Called by the trainer: write a checkpoint beside its place, sum it up, rename it; or leave nothing."""
        folder = checkpoint_folder(self._output_dir, self.state.global_step)
        aside = folder.with_name(f".{folder.name}")
        try:
            # No process writes before the folder is there.
            self._on_all_or_none(lambda: _make_anew(aside) if rank() == 0 else None, folder)
            self._on_all_or_none(lambda: self._write_checkpoint(aside, folder), folder)
            self._on_all_or_none(lambda: self._publish(aside, folder) if self.args.should_save else None, folder)
        except RunEnds:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if max_over_ranks(int(not folder.is_dir())):
            logger.warning("%s is not seen by all machines: no run can go on from it; share the output folder.", folder)
            shutil.rmtree(aside, ignore_errors=True)

    def save_last(self) -> None:
        """Write the model into the output folder.

        Raises:
            RunEnds: it could not be written.
        """
        self._on_all_or_none(self.save_model, self._output_dir, with_state=False)

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def _on_all_or_none(self, write: Callable[[], None], folder: Path, *, with_state: bool = True) -> None:
        """Write a part of what `folder` is to hold, on all processes.

        Raises:
            RunEnds: one of them could not, on all of them.
        """
        error: Exception | None = None
        try:
            write()
        except WRITE_ERRORS as caught:
            error = caught
        failed = max_over_ranks(0 if error is None else 1 + rank())
        if not failed:
            return
        reason = f"on process {failed - 1}" if error is None else first_line(error)
        place = next(path for path in (self._output_dir, *self._output_dir.parents) if path.exists())  # it may be lost
        free = shutil.disk_usage(place).free
        raise RunEnds(
            f"{folder} could not be written ({reason}). It takes about {self._num_bytes(with_state):,} bytes, and "
            f"{free:,} are free there. {last_checkpoint(self._output_dir, self.state.global_step)}",
            code=1,
        ) from error

    def _write_checkpoint(self, aside: Path, folder: Path) -> None:
        """All files of a checkpoint but the sums."""
        self.save_model(str(aside), _internal_call=True)
        if not self.args.save_only_model or self.is_stopped:
            self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))
            self._figures.save(aside / file_of_rank(FIGURES_FILE, rank()))
        if self.args.should_save:
            best = checkpoint_folder(folder.parent, self.state.best_global_step or 0)
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(aside / TRAINER_STATE_NAME))

    def _publish(self, aside: Path, folder: Path) -> None:
        write_sums(aside)
        if folder.exists():  # cut short, or from before the run went back to an earlier one
            remove_checkpoint(folder)
        aside.rename(folder)
        self._remove_old_checkpoints(folder)

    def _remove_old_checkpoints(self, newest: Path) -> None:
        """Keep `save_total_limit` checkpoints, the newest and the best one among them. Those of later steps, left by a
        run that went back, do not count."""
        limit = self.args.save_total_limit
        kept = {newest, Path(self.state.best_model_checkpoint or newest)}
        others = [f for f in checkpoints_in(newest.parent, up_to=self.state.global_step) if f not in kept]
        for folder in others[: max(0, len(others) + len(kept) - limit)] if limit else ():
            remove_checkpoint(folder)

    def _num_bytes(self, with_state: bool) -> int:
        """About what the trained weights take, and the optimiser's state."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]
        states = [value for p in parameters for value in self.optimizer.state[p].values()]  # type: ignore[union-attr]
        written = [*parameters, *states] if with_state else parameters
        return sum(t.numel() * t.element_size() for t in written if isinstance(t, Tensor))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Called by the trainer; state that lies spread over the processes (FSDP) is written by each of them."""
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        torch.save(own_share(self.optimizer), Path(output_dir, file_of_rank(OPTIMIZER_NAME, rank())))  # type: ignore[arg-type]
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))  # type: ignore[union-attr]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Called by the trainer, also where there is no checkpoint."""
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        share = torch.load(
            Path(checkpoint, file_of_rank(OPTIMIZER_NAME, rank())), map_location="cpu", weights_only=True
        )
        load_own_share(self.optimizer, share)  # type: ignore[arg-type]
        schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)  # type: ignore[union-attr]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self._save_to(Path(output_dir or str(self.args.output_dir)), state_dict)

    def _objective(self) -> Any:
        return self.accelerator.unwrap_model(self.model)


@contextmanager
def _of_arguments() -> Iterator[None]:
    """Around what the library makes of training arguments alone, to say in one sentence what it refuses.

    Raises:
        UserError: it does.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training arguments: {first_line(error)}") from error


def _begin_worker(begin: Callable[[int], None] | None, worker_id: int) -> None:
    leave_process_group(worker_id)
    if begin is not None:
        begin(worker_id)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


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


class StopWhenAsked(TrainerCallback):
    """Ends the run after the step at which a process was asked to, with a checkpoint.

    A checkpoint at the end of an epoch is written after what else the end of an epoch brings; a run that goes on from
    there begins with the next epoch.
    """

    def __init__(self, trainer: EmbedderTrainer) -> None:
        self.trainer = trainer
        self.save_at_epoch_end = False

    def _ends_epoch(self, state: TrainerState) -> bool:
        return state.global_step % self.trainer._steps_per_epoch == 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer."""
        if self.trainer.is_stopped:
            control.should_training_stop = control.should_save = True
        self.save_at_epoch_end = control.should_save and self._ends_epoch(state)
        control.should_save = control.should_save and not self.save_at_epoch_end

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer, also where a run stops within an epoch."""
        control.should_save = control.should_save or self.save_at_epoch_end
        if self.trainer.is_stopped and not self._ends_epoch(state):
            control.should_evaluate = control.should_save = False


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
