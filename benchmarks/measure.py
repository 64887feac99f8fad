"""Times and memory of several variants of one thing, side by side: worker processes, turns, and the table.

    readings = take_turns({"ours": Variant(set_up, case), "theirs": ...}, rounds=5)
    print(lines_table([Line("times theirs", ratios(readings, "theirs", "ours", "seconds"), at_least=2.0)]))

Each variant lives in a process of its own, so that its peak memory is its own. Within a round every variant runs once
while the others wait asleep, and whatever is compared is compared within a round: absolute times mean nothing on a
shared machine. `benchmarks/benchmark.py` says what is measured; `variants.py` sets it up.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import platform
import re
import resource
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from llm2vec.table import Table
from llm2vec.types import UserError

VERSIONED = ("torch", "transformers", "peft", "sentence-transformers")


@dataclass
class Runnable:
    """A variant that is ready to run.

    Attributes:
        step: does batch number i, forward and backward. Number -1 is a tiny batch: it runs once before memory is
            counted, so that libraries which load at first use do not count as a step's memory.
        device: where it computes.
        flops: useful floating-point operations of each batch; a single figure where all are alike.
        tokens: tokens of each batch's rows, likewise.
        model: whose gradients are dropped before each step, outside the timed part.
        repeats: runs of a step of which the fastest counts.
        own_clock: count the process's own time on a CPU and not the clock's, so that others on the core are not
            measured too; for a step that takes one thread.
    """

    step: Callable[[int], Tensor | None]
    device: str
    flops: list[float]
    tokens: list[int]
    model: nn.Module | None = None
    repeats: int = 1
    own_clock: bool = False


class Variant(NamedTuple):
    """A set-up function and what it is called with in the worker's process; both travel there by pickle."""

    set_up: Callable[[Any], Runnable]
    case: Any


class Reading(NamedTuple):
    """One step of one variant."""

    seconds: float
    #: Peak memory of the step above what the process held before its first one, gradients included; bytes.
    memory: int
    #: Peak of the whole process (of the whole allocator on a GPU); bytes.
    whole_memory: int
    flops: float
    tokens: int
    #: What the step returned, where it returned vectors.
    vectors: np.ndarray[Any, np.dtype[np.float32]] | None

    @property
    def rate(self) -> float:
        """Useful floating-point operations a second."""
        return self.flops / self.seconds

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


#: Variant -> its readings by round; empty where its process did not survive.
Readings = dict[str, list[Reading]]


class Meter:
    """Clock and memory of a device: the one place where CPU and GPU are measured differently.

    On the CPU memory is the process's resident set, whose high-water mark Linux lets a process set back; elsewhere
    it can only grow (`ru_maxrss`). On a GPU it is what torch's allocator handed out.
    """

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.base = 0

    def start(self) -> None:
        """Give freed memory back and take what is left, weights and batches, as the base."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self.reset()
        self.base = self.peak()

    def now(self) -> float:
        """Seconds, once everything that was asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset(self) -> None:
        """Set the high-water mark back to what is in use."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the mark stays the highest so far
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """The high-water mark in bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        with contextlib.suppress(OSError):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                return int(found[1]) * 1024
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_step(work: Runnable, meter: Meter, index: int) -> Reading:
    """Run a step of `work` as often as it asks, and read clock and memory of the fastest run."""
    readings = []
    flops, tokens = work.flops[index % len(work.flops)], work.tokens[index % len(work.tokens)]
    for _ in range(work.repeats):
        if work.model is not None:
            work.model.zero_grad(set_to_none=True)
        gc.collect()
        meter.reset()
        now = time.process_time if work.own_clock else meter.now
        start = now()
        result = work.step(index)
        seconds = now() - start
        peak = meter.peak()
        vectors = None if result is None else result.float().cpu().numpy()
        readings.append(Reading(seconds, max(0, peak - meter.base), peak, flops, tokens, vectors))
    return min(readings, key=lambda reading: reading.seconds)


class WorkerLost(RuntimeError):
    """A worker's process is gone, or ran out of memory."""


class Worker:
    """A process that holds one variant and runs a step of it when told."""

    def __init__(self, variant: Variant) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, variant), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, index: int) -> Reading:
        """One step over batch number `index`; the first call waits for the set-up, too.

        Raises:
            WorkerLost: the process was killed or ran out of memory.
            RuntimeError: the step failed; the message is its traceback.
        """
        try:
            self._connection.send(index)
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=10)
            raise WorkerLost(f"its process ended with code {self._process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        reading: Reading = answer
        return reading

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, variant: Variant) -> None:
    """A worker's life: set up, then a reading for each number that arrives, until the other end is closed."""
    warnings.simplefilter("ignore")  # of the libraries, once a worker; progress bars likewise
    transformers_logging.disable_progress_bar()
    try:
        try:
            work = variant.set_up(variant.case)
            meter = Meter(work.device)
            if work.model is not None:
                work.step(-1)
                work.model.zero_grad(set_to_none=True)
            meter.start()
            while True:
                connection.send(measure_step(work, meter, connection.recv()))
        except (EOFError, BrokenPipeError):
            return
        except Exception as error:
            connection.send(_as_sent(error))
    except (BrokenPipeError, KeyboardInterrupt):  # whoever asked is gone
        return


def _as_sent(error: Exception) -> Exception:
    """What the parent raises: want of memory is a result of a benchmark, everything else a fault in it."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return WorkerLost("it ran out of memory")
    return RuntimeError(traceback.format_exc())


def worker_environment(threads: int) -> dict[str, str]:
    """Variables that must stand before a worker imports torch: its threads, and that idle ones sleep."""
    number = str(threads)
    return {
        "OMP_NUM_THREADS": number,
        "MKL_NUM_THREADS": number,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


def take_turns(
    variants: Mapping[str, Variant], rounds: int, *, warm_up: bool = True
) -> tuple[Readings, dict[str, str]]:
    """Run every variant once a round, after one round that does not count; who begins changes from round to round.

    Args:
        variants: by name; those that compare with one another.
        rounds: how many count; round i runs batch number i.
        warm_up: False leaves out the round that does not count, for what takes long and is asked for its memory.

    Returns:
        The readings, and for each variant whose process did not survive why; such a one has no readings.
    """
    readings: Readings = {name: [] for name in variants}
    lost: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, variant in variants.items():
            workers[name] = Worker(variant)
            stack.callback(workers[name].close)
        for turn in range(-1 if warm_up else 0, rounds):
            names = list(workers)
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                if name in lost:
                    continue
                try:
                    reading = workers[name].run(max(turn, 0))
                except WorkerLost as error:
                    lost[name] = str(error)
                    readings[name] = []
                    continue
                if turn >= 0:
                    readings[name].append(reading)
    return readings, lost


def ratios(readings: Readings, above: str, below: str, figure: str) -> list[float]:
    """`figure` (an attribute of `Reading`) of one variant over that of another, round by round."""
    pairs = zip(readings[above], readings[below], strict=False)  # a lost variant has no rounds
    return [getattr(one, figure) / getattr(other, figure) for one, other in pairs]


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        measure: what was measured.
        values: its figure in each round; none = it could not be measured, and `note` says why.
        at_least: the goal, where more is better.
        at_most: the goal, where less is better.
        digits: behind the point.
        note: anything a reader should know beside the figure.
    """

    measure: str
    values: Sequence[float]
    at_least: float | None = None
    at_most: float | None = None
    digits: int = 2
    note: str = ""

    @property
    def figure(self) -> str:
        """Median, and in brackets the lowest and the highest."""
        if not self.values:
            return "not measured"
        median, low, high = (
            f"{value:,.{self.digits}f}"
            for value in (statistics.median(self.values), min(self.values), max(self.values))
        )
        return f"{median} ({low}, {high})" if len(self.values) > 1 else median

    @property
    def must(self) -> str:
        """The goal, and whether the median reaches it."""
        goal = self.at_least if self.at_least is not None else self.at_most
        if goal is None:
            return ""
        said = f"{'at least' if self.at_least is not None else 'at most'} {goal:g}"
        if not self.values:
            return said
        median = statistics.median(self.values)
        reached = median >= goal if self.at_least is not None else median <= goal
        return f"{said}: {'reached' if reached else 'missed'}"


def lines_table(lines: Sequence[Line]) -> str:
    """The lines as a Markdown table."""
    rows = [[line.measure, line.figure, line.must, line.note] for line in lines]
    return Table(["measure", "median (lowest, highest)", "must", "beside it"], rows, num_names=4).markdown()


def surroundings(device: str, threads: int) -> str:
    """Date, processor, thread count and versions, in one paragraph."""
    versions = []
    for package in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    where = f"{processor(device)}, {threads} thread(s)"
    return (
        f"Measured on {date.today().isoformat()}: {where}; Python {platform.python_version()}, {', '.join(versions)}."
    )


def processor(device: str) -> str:
    """The name of the GPU, or of the CPU as Linux knows it.

    Raises:
        UserError: there is no such device.
    """
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device is {device!r}, but torch finds no CUDA device here.")
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return found[1].strip()
    return platform.processor() or platform.machine()
