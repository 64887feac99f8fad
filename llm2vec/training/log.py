"""What runs beside the trainer's loop: the figures of its steps, the log, the progress bar, and the end of the run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm2vec.distributed import sum_over_ranks
from llm2vec.files import read_object, write_json, write_text
from llm2vec.processes import rank
from llm2vec.training.resume import FIGURES_FILE, file_of_rank, last_checkpoint
from llm2vec.training.step import add_up
from llm2vec.types import RunEnds

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"


class StepFindings(NamedTuple):
    """What the processes know together of a step whose gradient is complete."""

    bad_loss: bool  #: the loss of some process is not finite
    bad_gradient: bool  #: the gradient's norm is not finite
    stop: bool  #: some process was asked to stop


#: What of `StepFigures` is written as it is.
_COUNTS = (
    "_num_steps", "_num_skipped", "skipped_in_a_row", "_num_tokens", "_waited", "_total_loss", "_total_steps",
)  # fmt: skip
#: What a checkpoint holds of them; `StepFigures.save` writes it.
_FIGURES = {"sums": {str: [(float, str)]}, **dict.fromkeys((*_COUNTS, "_seconds"), float)}


class StepFigures:
    """Figures of this process's steps since the last entry of the log; `entry` adds them up over all processes.

    Those of the step under way are held apart until it is known whether the step is taken or skipped. All of it is
    written with each checkpoint, as the next entry of the log must not depend on whether the run was interrupted.
    """

    def __init__(self) -> None:
        self._step: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0
        self._num_skipped = 0
        self.skipped_in_a_row = 0  #: steps, since the last one that was taken
        self._num_tokens = 0.0
        self._unread: list[Tensor] = []  # numbers of tokens; to read them is to wait for the device
        self._waited = 0.0
        self._seconds = 0.0  # of this entry, before this process began
        self._since: float | None = None
        self._total_loss = 0.0
        self._total_steps = 0

    def start(self) -> None:
        """The first step begins; nothing where one has."""
        if self._since is None:
            self._since = time.monotonic() - self._seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the time in which the step has no rows yet."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around time that is not spent on training tokens."""
        started = time.monotonic()
        yield
        if self._since is not None:
            self._since += time.monotonic() - started

    def add_tokens(self, number: Tensor) -> None:
        """Tokens of the step, of all processes."""
        self._unread.append(number)

    def _read_tokens(self) -> None:
        self._num_tokens += sum(map(float, self._unread))
        self._unread = []

    def add(self, parts: dict[str, Tensor]) -> None:
        """A micro-batch's loss parts."""
        self._step = add_up([self._step, parts])

    def findings(self, norm: Any, is_asked_to_stop: bool, device: torch.device) -> StepFindings:
        """What any process found of the step under way.

        One sum over all processes and one wait for the device, as every step pays for it. All must come to the same
        decision: a process that skipped or stopped alone would leave the others waiting. `norm` is that of the whole
        gradient.
        """
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor, under FSDP
        flags = [~self._step["loss"].isfinite(), ~whole.isfinite(), torch.tensor(is_asked_to_stop, device=device)]
        return StepFindings(*(number > 0 for number in sum_over_ranks(torch.stack(flags).float()).tolist()))

    def keep_step(self) -> None:
        """The step is taken."""
        self._sums = add_up([self._sums, self._step])
        self._num_steps += 1
        self.skipped_in_a_row = 0
        self._step = {}

    def drop_step(self) -> None:
        """The step is skipped: its figures belong to no mean."""
        self._num_skipped += 1
        self.skipped_in_a_row += 1
        self._step = {}

    def complete(self, logs: dict[str, float]) -> None:
        """Put what happened into an entry of the library's log, whose losses count skipped steps too."""
        if "loss" in logs:  # an entry of a step, and not of an evaluation
            entry = self.entry()
            if "loss" not in entry:  # no step was taken since the last one
                del logs["loss"]
            logs.update(entry)
        elif "train_loss" in logs and (loss := self.mean_loss()) is not None:
            logs["train_loss"] = loss

    def entry(self) -> dict[str, float]:
        """Means over the steps taken since the last entry, and what else happened since; the next entry begins.

        Without any such step there are no means.
        """
        now = time.monotonic()  # once, so that no time falls between two entries
        seconds = now - (self._since or 0.0)
        entry = self._means()
        self._read_tokens()
        entry["tokens"] = self._num_tokens
        entry["tokens_per_second"] = self._num_tokens / seconds
        entry["waiting_for_data"] = self._waited / seconds
        if self._num_skipped:
            entry["skipped_steps"] = self._num_skipped
        self._num_skipped, self._num_tokens, self._waited, self._since = 0, 0.0, 0.0, now
        return entry

    def mean_loss(self) -> float | None:
        """Over all steps of the run that were taken; None where none was."""
        self._means()
        return self._total_loss / self._total_steps if self._total_steps else None

    def _means(self) -> dict[str, float]:
        if not self._num_steps:
            return {}
        # Each rank has its share of a figure, and shares add up. They meet here only, and not at every step.
        sums = sum_over_ranks(torch.stack(list(self._sums.values())).float())
        means = dict(zip(self._sums, (sums / self._num_steps).tolist(), strict=True))
        self._total_loss += means["loss"] * self._num_steps
        self._total_steps += self._num_steps
        self._sums, self._num_steps = {}, 0
        return means

    def save(self, checkpoint: Path) -> None:
        """Write it all, to be read by the same process of the resumed run."""
        # JSON holds floats exactly, so the resumed run's entries are the same to the bit.
        sums = {name: [value.item(), str(value.dtype).removeprefix("torch.")] for name, value in self._sums.items()}
        seconds = 0.0 if self._since is None else time.monotonic() - self._since
        self._read_tokens()
        counts = {name: getattr(self, name) for name in _COUNTS}
        write_json(checkpoint / file_of_rank(FIGURES_FILE, rank()), {"sums": sums, **counts, "_seconds": seconds})

    def load(self, checkpoint: Path, device: torch.device) -> None:
        """Go on from what `save` wrote."""
        content = read_object(checkpoint / file_of_rank(FIGURES_FILE, rank()), shape=_FIGURES)
        self._sums = {
            name: torch.tensor(value, dtype=getattr(torch, dtype), device=device)
            for name, (value, dtype) in content["sums"].items()
        }
        for name in (*_COUNTS, "_seconds"):
            setattr(self, name, content[name])


class JsonLog(TrainerCallback):
    """Appends every log entry to `log.jsonl` in the output folder, one JSON object a line.

    The file is a copy of the run's own record, so a resumed run has each step once. Where it cannot be written, on a
    full disk, the run ends (RunEnds).
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called before the first step: the file begins with what the checkpoint knows, or empty."""
        file = Path(str(args.output_dir), LOG_FILE)
        if state.is_world_process_zero:
            with _or_end(file, state.global_step):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, "".join(map(_line, state.log_history)))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called where an entry was put at the end of the run's record."""
        file = Path(str(args.output_dir), LOG_FILE)
        if state.is_world_process_zero:
            with _or_end(file, state.global_step), file.open("a", encoding="utf-8") as out:
                out.write(_line(state.log_history[-1]))

    def note_skipped(
        self, args: TrainingArguments, state: TrainerState, what: str, rows: Iterable[tuple[str, int]]
    ) -> None:
        """An entry for the step under way, which is skipped; it goes into the file and to no other tracker.

        `what` is not finite, the loss or the gradient; `rows` are file and place of each of the step's rows.
        """
        step = state.global_step + 1
        places: dict[str, list[int]] = {}
        for file, place in rows:
            places.setdefault(file, []).append(place)
        entry: Any = {"step": step, "skipped": f"the {what} is not finite", "rows": places}
        state.log_history.append(entry)
        self.on_log(args, state, TrainerControl())
        logger.warning("step %s is skipped: its %s is not finite; %s names its rows", f"{step:,}", what, LOG_FILE)


@contextmanager
def _or_end(file: Path, step: int) -> Iterator[None]:
    """Around the writing of a run's file."""
    try:
        yield
    except OSError as error:
        raise RunEnds(f"{file} could not be written ({error}). {last_checkpoint(file.parent, step)}", code=1) from error


def _line(entry: dict[str, Any]) -> str:
    return json.dumps({"step": entry["step"], **entry}) + "\n"


def drop_entries_after(file: Path, step: int) -> None:
    """Take the lines of later steps out of a JSONL file of a run that goes on from `step`; nothing without the file.
    `RunEnds` where it cannot be written."""
    if not file.is_file():
        return
    with _or_end(file, step):
        lines = file.read_text(encoding="utf-8").splitlines()
        write_text(file, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # cut short by what ended the run
        return float("inf")


class ProgressToStop(ProgressCallback):
    """The library's progress bar, but as long as the run really is: to `stop_after_n_steps`, if that is given."""

    def __init__(self, stop_after_n_steps: int | None) -> None:
        super().__init__()
        self.stop_after_n_steps = stop_after_n_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called before the first step."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and self.stop_after_n_steps is not None:
            self.training_bar.total = min(state.max_steps, self.stop_after_n_steps)
            self.training_bar.refresh()


class EndOfRun(TrainerCallback):
    """Ends a run after its last step; or, with a checkpoint, after the step at which a process was asked to stop.

    A checkpoint at the end of an epoch is written after what else the end of an epoch brings (an evaluation), as a run
    that goes on from it begins with the next epoch. Where the run stops after so many steps, the schedule's horizon
    stays where it is, and the last weights are saved, but no checkpoint that is not due.
    """

    def __init__(self, stop_after_n_steps: int | None) -> None:
        self.is_asked_for = False  #: whether a process was asked to stop
        self.steps_per_epoch = 1  #: optimiser steps
        self._stop_after_n_steps = stop_after_n_steps
        self._save_at_epoch_end = False

    def is_reached(self, state: TrainerState) -> bool:
        """Whether all steps are done."""
        return state.global_step >= min(state.max_steps, self._stop_after_n_steps or state.max_steps)

    def is_stopped(self, state: TrainerState) -> bool:
        """Whether a process was asked to stop, with steps left to do."""
        return self.is_asked_for and not self.is_reached(state)

    def _ends_epoch(self, state: TrainerState) -> bool:
        return state.global_step % self.steps_per_epoch == 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called after each optimiser step."""
        if self.is_reached(state):
            control.should_training_stop = True
        if self.is_stopped(state):
            control.should_training_stop = control.should_save = True
        self._save_at_epoch_end = control.should_save and self._ends_epoch(state)
        control.should_save = control.should_save and not self._save_at_epoch_end

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called at the end of an epoch, and where a run stops within one, which is no end of an epoch."""
        control.should_save = control.should_save or self._save_at_epoch_end
        # A stop within an epoch breaks the loop, which then does as if the epoch were over; it has saved already.
        if self.is_stopped(state) and not self._ends_epoch(state):
            control.should_evaluate = control.should_save = False
