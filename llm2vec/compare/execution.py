"""Doing the runs of a comparison: several at a time, each after the one that it starts from, in processes of their own.

What has been done and has not changed since is not done again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llm2vec.compare.runs import EVALUATION_COMMAND, FINISHED_FILE, Run
from llm2vec.model.chain import open_folder, read_run
from llm2vec.training.log import LOG_FILE
from llm2vec.training.resume import is_over
from llm2vec.types import UserError

#: What a run starts, behind Python's name.
PROGRAM = ("-m", "llm2vec")


def is_finished(run: Run) -> bool:
    """Whether a run has ended well and what it started from has not been made anew since."""
    try:
        if run.marker == FINISHED_FILE:  # of one that was stopped on its way, the log is asked for alone
            open_folder(str(run.folder))  # refuses one that was cut short
        made = (run.folder / run.marker).stat().st_mtime_ns
        return run.parent is None or (run.parent.folder / run.parent.marker).stat().st_mtime_ns <= made
    except (UserError, OSError):
        return False


def clear(run: Run) -> None:
    """Make way for a run that is not finished; scores and checkpoints of an interrupted one are kept."""
    if not run.is_resumable or (run.folder / run.marker).is_file():
        shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True, exist_ok=True)


def do_all(runs: Sequence[Run], do: Callable[[Run, int], None], num_workers: int) -> dict[str, str]:
    """Do runs, several at a time, each after its parent; those with most steps before the end of a chain go first.

    Each of `runs` stands behind its parent. `do` is given a run and the number of a worker (0, 1, ...) that no other
    run has at that time; its `UserError` says that the run failed. Returns name of a run -> why it failed; one whose
    parent failed has its parent's reason.
    """
    to_go = {run.name: run.num_steps for run in runs}  # the steps of the longest chain from it on
    for run in reversed(runs):
        if run.parent is not None:
            through = run.parent.num_steps + to_go[run.name]
            to_go[run.parent.name] = max(to_go[run.parent.name], through)
    waiting = sorted(runs, key=lambda run: -to_go[run.name])  # stable, and a parent has no fewer than its child
    under_way: dict[Future[None], tuple[Run, int]] = {}
    failed: dict[str, str] = {}
    done: set[str] = set()
    free = list(range(num_workers))
    with ThreadPoolExecutor(num_workers) as pool:
        while waiting or under_way:
            for run in list(waiting):
                if run.parent is not None and run.parent.name in failed:
                    failed[run.name] = failed[run.parent.name]
                    waiting.remove(run)
                elif free and (run.parent is None or run.parent.name in done):
                    worker = free.pop(0)
                    under_way[pool.submit(do, run, worker)] = run, worker
                    waiting.remove(run)
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run, worker = under_way.pop(future)
                free.append(worker)
                try:
                    future.result()
                    done.add(run.name)
                except UserError as error:
                    failed[run.name] = str(error)
    return failed


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Runner:
    """Starts runs as processes, their output in log files, and says how far it all is.

    Args:
        runs: what is done, each with the recipe that it is of.
        workers: runs at a time, which share the machine.
        processes: of a training run, through torchrun.
        lock: file descriptor of the comparison's lock, which the runs hold too: while one of them lives, no other
            comparison begins anew what it writes.
        say: takes a line when a run has ended.
    """

    def __init__(
        self, runs: Sequence[tuple[str, Run]], output_dir: Path, *, workers: int, processes: int, lock: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.workers, self.processes, self.lock, self.say = workers, processes, lock, say
        self.recipes_of: dict[str, dict[str, None]] = {}  # name of a run -> those it is of, in order
        for recipe, run in runs:
            self.recipes_of.setdefault(run.name, {})[recipe] = None
        self.num_ended = 0
        self.logs = output_dir / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def do(self, run: Run, worker: int) -> None:
        """Do a run unless it has been done. A `UserError` where it failed or was stopped; the log says why."""
        if is_finished(run):
            return self._tell(run, "is there already")
        clear(run)
        started, log = time.monotonic(), self.logs / f"{run.name}.log"
        command, environment = self._command(run), self._environment(worker)
        with log.open("w") as out, self._bar(run) as bar:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, pass_fds=[self.lock]
            )
            while not has_ended(process):
                bar.update(last_step(run.folder / LOG_FILE) - bar.n)
        code = process.returncode
        if not code and run.command != EVALUATION_COMMAND and not is_over(read_run(run.folder), run.stop):
            self._tell(run, f"was stopped; see {log}")
            raise UserError(f"llm2vec {run.command} was stopped by a signal")
        if code:
            self._tell(run, f"failed; see {log}")
            raise UserError(f"llm2vec {run.command} {_end(code, log)}; see {log}")
        (run.folder / run.marker).touch()
        self._tell(run, f"{(time.monotonic() - started) / 60:.1f} minutes")

    def _bar(self, run: Run) -> tqdm[Any]:
        """A training run's steps and the time left; none where several runs share the screen."""
        whose = ", ".join(self.recipes_of[run.name])
        without = self.workers > 1 or not run.num_steps or None  # None: off where there is no terminal
        return tqdm(total=run.num_steps, desc=f"{run.command} of {whose}", unit="step", leave=False, disable=without)

    def _command(self, run: Run) -> list[str]:
        """The run's command line; an evaluation starts its processes itself."""
        command, processes = [*PROGRAM, run.command, *run.arguments], self.processes
        if processes > 1 and run.command == EVALUATION_COMMAND:
            command += ["--workers", str(processes)]
        elif processes > 1:
            command[:0] = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        return [sys.executable, *command]

    def _environment(self, worker: int) -> dict[str, str]:
        """The worker's share of the machine."""
        threads = max(1, num_cores() // (self.workers * self.processes))
        settings = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        if devices := [device for device in visible.split(",") if device]:
            first = worker * self.processes
            own = [devices[i % len(devices)] for i in range(first, first + self.processes)]
            settings["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
        return {**os.environ, **settings}

    def _tell(self, run: Run, what: str) -> None:
        """One line on a run that has ended."""
        self.num_ended += 1
        whose = ", ".join(self.recipes_of[run.name])
        kind = run.name.rpartition("-")[0]
        self.say(f"[{self.num_ended:>3} of {len(self.recipes_of)}] {kind:<18} {whose}: {what}")


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended, after waiting a little."""
    try:
        process.wait(timeout=0.5)
        return True
    except subprocess.TimeoutExpired:
        return False


def last_step(steps_file: Path) -> int:
    """The step of a run's newest log entry; 0 before the first."""
    lines = steps_file.read_text(encoding="utf-8").splitlines(keepends=True) if steps_file.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last one may just be written
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _end(code: int, log: Path) -> str:
    """How a run failed: what killed it, else its own error message, else what it said last."""
    if code < 0:
        by = signal.Signals(-code)
        return f"was killed ({by.name}{'; often for want of memory' if by == signal.SIGKILL else ''})"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
    return f"failed ({said.removeprefix('error: ')})"
