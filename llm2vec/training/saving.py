"""Checkpoints that are written whole or not at all, and what FSDP needs to write and read one.

A checkpoint is written aside, under a hidden name. First its folder is made, then every process writes its files, then
the sums are taken and the folder gets its name. After each of these the processes tell each other whether it worked:
where one could not write, all of them end, with a sentence that says how much room was needed. So a folder called
`checkpoint-N` is whole, and a run that is killed leaves at most a hidden folder, which the next start removes.

FSDP2 gives every process a share of the weights and of the optimiser's state. The weights are gathered and written
once. The optimiser's state, which is larger, is written share by share.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from llm2vec.distributed import max_over_ranks
from llm2vec.files import file_error, remove
from llm2vec.model.checkpoint import write_sums
from llm2vec.processes import is_of_lost_process, rank, wait_for_all
from llm2vec.training.resume import checkpoint_folder, checkpoints_in, file_of_rank, last_checkpoint
from llm2vec.types import RunEnds, UserError, first_line

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a run, and its last weights; called on all processes."""

    def __init__(self, args: TrainingArguments) -> None:
        self.output_dir = Path(str(args.output_dir))
        self._writes_common_files: bool = args.should_save
        self._limit = args.save_total_limit

    def remove_unfinished(self) -> None:
        """Remove what a killed run left half written."""
        for folder in self.output_dir.glob(".checkpoint-*") if rank() == 0 else ():
            remove(folder)

    def write(self, state: TrainerState, optimizer: Any, write_files: Callable[[Path], None]) -> None:
        """Write the checkpoint of the step that was just done, of which `write_files` writes what is this process's
        into the folder it is given; `state` is written too, and learns where the best checkpoint is. `RunEnds` where a
        process could not write: it tells by the optimiser how much room was needed, and leaves nothing of it.
        """
        folder = checkpoint_folder(self.output_dir, state.global_step)
        aside = folder.with_name(f".{folder.name}")
        # No process may write before the folder is there, nor take sums before all have written.
        parts: list[tuple[bool, Callable[[], None]]] = [
            (rank() == 0, lambda: _make_empty(aside)),
            (True, lambda: write_files(aside)),
            (self._writes_common_files, lambda: _write_record(state, aside, folder)),
            (self._writes_common_files, lambda: self._publish(aside, folder, state)),
        ]
        try:
            for is_mine, write in parts:
                self._on_all_or_none(folder, state, optimizer, write if is_mine else lambda: None, with_state=True)
        except RunEnds:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        # Machines without a shared disk each wrote their own processes' files, of which one folder holds a part only.
        if max_over_ranks(int(not folder.is_dir())):
            logger.warning("%s is not seen by all machines: no run can go on from it; share the output folder.", folder)
            shutil.rmtree(aside, ignore_errors=True)

    def write_last(self, state: TrainerState, optimizer: Any, write_model: Callable[[], None]) -> None:
        """Write the trained model into the output folder itself, or raise `RunEnds` as `write` does."""
        self._on_all_or_none(self.output_dir, state, optimizer, write_model, with_state=False)

    def _on_all_or_none(
        self, folder: Path, state: TrainerState, optimizer: Any, write: Callable[[], None], *, with_state: bool
    ) -> None:
        """Write a part of what `folder` is to hold; where one process cannot, all raise `RunEnds`."""
        error = None
        try:
            write()
        except Exception as caught:
            if not isinstance(caught, (RuntimeError, RunEnds)) and file_error(caught) is None:
                raise
            error = caught
        wait_for_all()  # a slow disk is no process that hangs
        failed = max_over_ranks(0 if error is None else 1 + rank())  # 0 = none; else one of them can be named
        if not failed:
            return
        reason = f"on process {failed - 1}" if error is None else first_line(error)
        # The output folder itself may be what was lost.
        place = next(path for path in (self.output_dir, *self.output_dir.parents) if path.exists())
        raise RunEnds(
            f"{folder} could not be written ({reason}). It takes about {num_bytes(optimizer, with_state):,} bytes, and "
            f"{shutil.disk_usage(place).free:,} are free there. {last_checkpoint(self.output_dir, state.global_step)}",
            code=1,
        ) from error

    def _publish(self, aside: Path, folder: Path, state: TrainerState) -> None:
        """Give a written checkpoint its sums and its name, and older ones away."""
        write_sums(aside)
        if folder.exists():  # cut short, or from before the run went back to an earlier one
            remove(folder)
        aside.rename(folder)
        self._remove_old(folder, state)

    def _remove_old(self, newest: Path, state: TrainerState) -> None:
        """Keep as many checkpoints as the limit says, the newest and the best one among them.

        Those of later steps, left by a run that went back, do not count.
        """
        kept = {newest, Path(state.best_model_checkpoint or newest)}
        others = [f for f in checkpoints_in(self.output_dir, up_to=state.global_step) if f not in kept]
        surplus = len(others) + len(kept) - self._limit if self._limit else 0
        for folder in others[: max(0, surplus)]:
            remove(folder)


def num_bytes(optimizer: Any, with_state: bool) -> int:
    """About what the trained weights take on disk, and with them the optimiser's state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in parameters for value in optimizer.state[p].values()] if with_state else []
    return sum(t.numel() * t.element_size() for t in (*parameters, *states) if isinstance(t, Tensor))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_record(state: TrainerState, aside: Path, folder: Path) -> None:
    """The trainer's record, which names the best checkpoint by the place that it will have."""
    best = checkpoint_folder(folder.parent, state.best_global_step or 0)
    if best == folder or best.is_dir():
        state.best_model_checkpoint = str(best)
    state.save_to_json(str(aside / TRAINER_STATE_NAME))


@contextmanager
def of_state(checkpoint: str | None) -> Iterator[None]:
    """Around what the libraries read of a checkpoint's state: what is cut short, of another form, or more than numbers
    becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except UnpicklingError as error:  # its text advises to open the file all the same
        raise UserError(
            f"{checkpoint}: the state of the optimiser, the schedule or the random numbers holds more than numbers, so "
            "it was not written by a run and is not opened; use another checkpoint."
        ) from error
    except Exception as error:  # of another form, cut short: each a type of its own
        if checkpoint is None or (isinstance(error, RuntimeError) and is_of_lost_process(error)):
            raise
        raise UserError(
            f"{checkpoint}: its weights, or the state of the optimiser, the schedule or the random numbers, are not "
            f"this run's ({first_line(error)}); use another checkpoint."
        ) from error


# --- under FSDP ---


def model_weights(state: dict[str, Tensor], model: Any, part: Any) -> dict[str, Tensor]:
    """The part of an objective's gathered state that is its model's, or that of a part of it, under its own names.

    Weights that are tied come as copies; here they are one tensor again, so that they are written once.
    """
    path = next(name for name, module in model.named_modules() if module is part)
    prefix = f"model.{path}." if path else "model."
    own = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
    tied: dict[str, str] = part.all_tied_weights_keys or {}
    return own | {name: own[source] for name, source in tied.items() if source in own}


def save_shares(folder: Path, optimizer: Optimizer, schedule: Any, with_schedule: bool) -> None:
    """Write this process's share of the optimiser's state, and if asked the schedule's, which all have in common."""
    state = optimizer.state_dict()
    shares = {
        i: {name: value.to_local() if isinstance(value, DTensor) else value for name, value in values.items()}
        for i, values in state["state"].items()
    }
    torch.save({**state, "state": shares}, folder / file_of_rank(OPTIMIZER_NAME, rank()))
    if with_schedule:
        torch.save(schedule.state_dict(), folder / SCHEDULER_NAME)


def load_shares(folder: Path, optimizer: Optimizer, schedule: Any) -> None:
    """Put back what `save_shares` wrote, into an optimiser over the same weights and as many processes."""
    # A run's own files, whose SHA-256 were compared before; `weights_only` reads tensors and numbers and runs no code.
    state = torch.load(folder / file_of_rank(OPTIMIZER_NAME, rank()), map_location="cpu", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread = {
        i: {name: _spread_like(parameters[i], value) for name, value in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})
    # The same holds of the schedule's file.
    schedule.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def _spread_like(parameter: Any, value: Any) -> Any:
    """A process's share of a tensor that has the parameter's form; anything else (a step counter) as it is."""
    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.dim()):
        return value
    if value.shape != parameter.to_local().shape:
        return value
    form: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
    value = value.to(parameter.device)
    return DTensor.from_local(value, parameter.device_mesh, parameter.placements, run_check=False, **form)
