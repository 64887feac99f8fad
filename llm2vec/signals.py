"""SIGTERM and SIGINT: the first asks a run to stop after its step, the second ends the process at once.

`EmbedderTrainer` asks all ranks once a step whether any of them was signalled, so that they save the same step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes the stop signals while it is entered, as a context manager in the main thread.

    Attributes:
        received: the first one; None = none yet.
    """

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
        if os.environ.get("RANK", "0") == "0":
            said = f"{self.received.name}: the step will be finished and saved; a second one ends at once.\n"
            os.write(2, said.encode())  # past the buffers, which the interrupted code may be writing to


def leave_process_group(worker_id: int) -> None:
    """In a worker of a data loader: out of reach of signals to the whole group (Ctrl-C, torchrun, Slurm).

    A worker that dies takes the run with it, before it can save. The run itself still ends its workers by their ids,
    and a worker ends by itself once the run is gone.
    """
    os.setpgid(0, 0)
