"""What a run says of itself: the lines of `log.jsonl`, and the figures that one process gathers between two of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm2vec.distributed import sum_over_ranks
from llm2vec.files import write_json
from llm2vec.train.resume import last_checkpoint
from llm2vec.train.step import add_up
from llm2vec.types import RunEnds

LOG_FILE = "log.jsonl"


class StepFigures:
    """Figures of this process's steps since the last entry of the log; `entry` adds them up over all processes.

    Those of the step under way are held apart until it is known whether the step is taken or skipped. All of it can be
    written and read back, so that an entry does not depend on whether the run was interrupted since the one before.

    Attributes:
        skipped_in_a_row: steps skipped since the last one that was taken.
    """

    def __init__(self) -> None:
        self._step: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0
        self._num_skipped = 0
        self.skipped_in_a_row = 0
        self._num_tokens = 0.0
        self._waited = 0.0
        self._seconds = 0.0  # before this process began
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

    def add_tokens(self, number: float) -> None:
        """Tokens of the step, of all processes."""
        self._num_tokens += number

    def add(self, parts: dict[str, Tensor]) -> None:
        """A micro-batch's loss parts."""
        self._step = add_up([self._step, parts])

    @property
    def step_loss(self) -> Tensor:
        """The loss of the step under way, this process's share."""
        return self._step["loss"]

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

    def entry(self) -> dict[str, float]:
        """Means over the steps taken since the last entry, and what else happened since; the next entry begins.

        Without any such step there are no means.
        """
        now = time.monotonic()
        seconds = now - (self._since or 0.0)
        entry = self._means()
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
        sums = sum_over_ranks(torch.stack(list(self._sums.values())).float())
        means = dict(zip(self._sums, (sums / self._num_steps).tolist(), strict=True))
        self._total_loss += means["loss"] * self._num_steps
        self._total_steps += self._num_steps
        self._sums, self._num_steps = {}, 0
        return means

    def save(self, file: Path) -> None:
        """Write it all, to be read by the same process of the resumed run; JSON holds floats exactly."""
        content = {
            "sums": {
                name: [value.item(), str(value.dtype).removeprefix("torch.")] for name, value in self._sums.items()
            },
            "_num_steps": self._num_steps,
            "_num_skipped": self._num_skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "_num_tokens": self._num_tokens,
            "_waited": self._waited,
            "_seconds": 0.0 if self._since is None else time.monotonic() - self._since,
            "_total_loss": self._total_loss,
            "_total_steps": self._total_steps,
        }
        write_json(file, content)

    def load(self, file: Path, device: torch.device) -> None:
        """Go on from what `save` wrote."""
        content = json.loads(file.read_text(encoding="utf-8"))
        self._sums = {
            name: torch.tensor(value, dtype=getattr(torch, dtype), device=device)
            for name, (value, dtype) in content.pop("sums").items()
        }
        for name, value in content.items():
            setattr(self, name, value)


class JsonLog(TrainerCallback):
    """Appends every log entry to `log.jsonl` in the output folder, one JSON object a line.

    The file is a copy of the run's own record, so a resumed run has each step once. Where it cannot be written, on a
    full disk, the run ends (RunEnds).
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer: the file begins with what the checkpoint knows, or empty."""
        file = Path(str(args.output_dir), LOG_FILE)
        if state.is_world_process_zero:
            with _or_end(file, state.global_step):
                file.parent.mkdir(parents=True, exist_ok=True)
                aside = file.with_name(f".{file.name}")
                aside.write_text("".join(map(_line, state.log_history)), encoding="utf-8")
                aside.replace(file)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer, which has put the entry at the end of its record."""
        file = Path(str(args.output_dir), LOG_FILE)
        if state.is_world_process_zero:
            with _or_end(file, state.global_step), file.open("a", encoding="utf-8") as out:
                out.write(_line(state.log_history[-1]))


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

    Raises:
        RunEnds: it cannot be written.
    """
    if not file.is_file():
        return
    with _or_end(file, step):
        lines = file.read_text(encoding="utf-8").splitlines()
        aside = file.with_name(f".{file.name}")
        aside.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step), encoding="utf-8")
        aside.replace(file)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # cut short by what ended the run
        return float("inf")
