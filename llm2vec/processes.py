"""The processes of a run: which one this is, who goes first, how all stop and how they leave.

Nothing here loads torch, so that what reads a file or prints its help starts at once: a process that is one of several
has loaded it already. Alone, a process has rank 0 of 1.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import Any

#: How long a process waits for one that works alone: on a table, a checkpoint, sums over one. A step's collectives end
#: much sooner (`ddp_timeout`), as there a process that does not come hangs.
PATIENCE = timedelta(days=7)

#: What an error of a collective says whose partner is gone; torch has no type for all of them.
SIGNS_OF_A_LOST_PROCESS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
)


def world_size() -> int:
    """Number of processes of this run; 1 without torch.distributed."""
    group = _group()
    return group.get_world_size() if group else 1


def rank() -> int:
    """Index of this process in the run; 0 without torch.distributed."""
    group = _group()
    return group.get_rank() if group else 0


def local_rank() -> int:
    """Index of this process among those of its machine, as torchrun tells; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_process() -> bool:
    """Whether this is the process that speaks for all; as torchrun tells, so also before they have met."""
    return os.environ.get("RANK", "0") == "0"


def rank_zero_first() -> AbstractContextManager[None]:
    """Run the body on rank 0 before the others, so that one process builds a file the others only read."""
    return _before_others(rank() == 0)


def first_of_each_machine_first() -> AbstractContextManager[None]:
    """Run the body on one process of each machine before that machine's others; inside may be `rank_zero_first`."""
    return _before_others(local_rank() == 0)


@contextmanager
def _before_others(goes_first: bool) -> Iterator[None]:
    _patient_group()  # formed by all, before one begins its work
    if not goes_first:
        wait_for_all()
    try:
        yield
    finally:
        if goes_first:
            wait_for_all()


def wait_for_all() -> None:
    """Wait until all processes have come here, however long one of them works; one that is gone is an error.

    The first call, too, must not follow what only some of them do.
    """
    if (group := _patient_group()) is not None:
        sys.modules["torch.distributed"].barrier(group)


def _patient_group() -> Any:
    """The same processes, over the CPU and without the step's timeout; None for a single one."""
    dist = _group()
    return _patient(dist, dist.group.WORLD) if dist is not None and dist.get_world_size() > 1 else None


@cache
def _patient(dist: Any, world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def shut_down() -> None:
    """Wait for all ranks and leave the process group; a process that just exits can abort in its network threads."""
    if group := _group():
        group.barrier()
        group.destroy_process_group()


def is_of_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone, or did not come within the group's time."""
    group = _group()
    if group is None or group.get_world_size() == 1:
        return False
    return isinstance(error, group.DistError) or any(sign in str(error) for sign in SIGNS_OF_A_LOST_PROCESS)


def _group() -> Any:
    """`torch.distributed` where this process is in a group, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


# --- how a run is stopped ---

#: The first one asks a run to stop after its step, the second ends the process at once. `EmbedderTrainer` asks all
#: ranks once a step whether any of them was signalled, so that they save the same step.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes the first stop signal, `received`, while it is entered, as a context manager in the main thread."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: it was set by a program in C that Python runs in, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)  # as a shell reports a process that a signal ended
        self.received = signal.Signals(number)
        if is_first_process():
            said = f"{self.received.name}: the step will be finished and saved; a second one ends at once.\n"
            os.write(2, said.encode())  # past the buffers, which the interrupted code may be writing to


def leave_process_group(worker_id: int) -> None:
    """In a worker of a data loader: out of reach of signals to the whole group (Ctrl-C, torchrun, Slurm).

    A worker that dies takes the run with it, before it can save. The run itself still ends its workers by their ids,
    and a worker ends by itself once the run is gone.
    """
    os.setpgid(0, 0)
