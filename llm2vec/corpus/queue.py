"""A queue of jobs in a folder, for any number of processes that share nothing else.

    jobs.json        the jobs of this start
    claims/JOB       a process has begun the job; holds its number
    locks/JOB        locked by that process for as long as it is at work
    done/JOB         the job is done
    failed/JOB       the job cannot be done; holds the sentence that says why

One process calls `prepare`, then every process calls `work`; `beside` starts others on this machine. A lock dies with
its process and the claim stays: a job that is begun, not ended and not locked has lost its process. It is not handed
out again in this start, as it may well kill the next process too. The next `prepare` frees it.

Where machines share a folder on a file system that passes no locks on (`files.alone_in` says which), a start takes up
jobs that another machine is still at. Such a job is done twice, which costs time and changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec.files import LOCK_FILE, is_locked, remove, try_lock, write_json
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

JOBS_FILE = "jobs.json"


@dataclass(frozen=True)
class Job:
    """One piece of work."""

    name: str  #: Different for every job; names a file
    size: float  #: What the work amounts to, in any unit; larger jobs are handed out first
    #: Names of the jobs that must be done before it; names that are no job of the queue count as done
    after: tuple[str, ...] = ()
    details: dict[str, str | int] = field(default_factory=dict)  #: What else the worker needs to know


class JobQueue:
    """The jobs of a folder, as one process sees them.

    Example:
        queue = JobQueue.prepare(folder, [Job("a", 2.0), Job("b", 1.0, after=("a",))])
        queue.work(lambda job: print(job.name))     # in as many processes as there are: JobQueue(folder).work(...)
    """

    def __init__(self, folder: Path) -> None:
        """Open a queue that `prepare` has made."""
        self.folder = folder
        rows = json.loads((folder / JOBS_FILE).read_text(encoding="utf-8"))
        jobs = [Job(**{**row, "after": tuple(row["after"])}) for row in rows]
        self.jobs = {job.name: job for job in sorted(jobs, key=lambda job: (-job.size, job.name))}
        self._locks: dict[str, int] = {}  # descriptors, of the jobs at hand

    @classmethod
    def prepare(cls, folder: Path, jobs: Sequence[Job], done: Collection[str] = ()) -> JobQueue:
        """Make a queue of all jobs of this start, or take up one that an earlier start left. Jobs that a process is
        still at stay its own; those that are named in `done` are done already."""
        for kind in ("claims", "locks", "done", "failed"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for marker in [*(folder / "done").iterdir(), *(folder / "failed").iterdir()]:
            marker.unlink(missing_ok=True)
        kept = {job.name for job in jobs} - set(done)
        for claim in (folder / "claims").iterdir():
            if not (claim.name in kept and is_locked(folder / "locks" / claim.name)):
                claim.unlink(missing_ok=True)
        for name in done:
            (folder / "done" / name).touch()
        write_json(folder / JOBS_FILE, [dataclasses.asdict(job) for job in jobs])
        return cls(folder)

    def work(self, do: Callable[[Job], None]) -> None:
        """Do jobs until there are none left, or the process that started this one is gone. One that `do` ends with a
        `UserError` has failed, and does not stop the others."""
        parent = multiprocessing.parent_process()
        while (parent is None or parent.is_alive()) and (job := self.claim_or_wait()) is not None:
            try:
                do(job)
            except UserError as error:
                logger.warning("%s", error)
                self.fail(job, str(error))
            else:
                self.finish(job)
            finally:
                self._let_go(job)

    def claim(self) -> Job | None:
        """The largest job that is free and may begin, now this process's; None if there is none at this moment."""
        done = self._names("done")
        taken = done | self._names("failed") | self._names("claims")
        for name, job in self.jobs.items():
            if name in taken or not set(job.after) & self.jobs.keys() <= done:
                continue
            try:
                lock = try_lock(self.folder / "locks" / name)
            except FileNotFoundError:  # all is done and the folder is gone
                return None
            if lock is None:
                continue
            try:
                # Under the lock: what is claimed is locked, as long as its process lives.
                with (self.folder / "claims" / name).open("x") as claim:
                    claim.write(str(os.getpid()))
            except (FileExistsError, FileNotFoundError):  # begun and ended meanwhile
                os.close(lock)
                continue
            self._locks[name] = lock
            return job
        return None

    def claim_or_wait(self, seconds: float = 0.5) -> Job | None:
        """The next job for this process, waiting for one that others' work may make ready, so many seconds between two
        looks; None if there will be none any more."""
        while (job := self.claim()) is None:
            open_jobs = self.jobs.keys() - self._names("done") - self._names("failed")
            if open_jobs <= self._names("claims"):
                return None
            if not self._is_any_held():
                return self.claim()  # what was ended between the two looks may have made one ready
            time.sleep(seconds)
        return job

    def wait(self, seconds: float = 0.5) -> None:
        """Return when no process works on a job any more."""
        while self._is_any_held():
            time.sleep(seconds)

    def finish(self, job: Job) -> None:
        """Mark a job as done."""
        (self.folder / "done" / job.name).touch()
        self._let_go(job)

    def fail(self, job: Job, reason: str) -> None:
        """Mark a job as one that cannot be done."""
        (self.folder / "failed" / job.name).write_text(reason, encoding="utf-8")
        self._let_go(job)

    def failures(self) -> dict[str, str]:
        """Job -> why it could not be done."""
        return {name: (self.folder / "failed" / name).read_text(encoding="utf-8") for name in self._names("failed")}

    def unfinished(self) -> list[str]:
        """Jobs that are neither done nor failed: their process is gone, or what they wait for is not done."""
        ended = self._names("done") | self._names("failed")
        return [name for name in self.jobs if name not in ended]

    def clear(self) -> None:
        """Remove all that lies in the folder but its lock: every job is done."""
        for path in self.folder.iterdir():
            if path.name != LOCK_FILE:
                remove(path)

    def num_done(self) -> int:
        """How many jobs are done."""
        return len(self.jobs.keys() & self._names("done"))

    def _names(self, kind: str) -> set[str]:
        folder = self.folder / kind
        return {file.name for file in folder.iterdir()} if folder.is_dir() else set()

    def _is_any_held(self) -> bool:
        """Whether another process is at a job."""
        open_jobs = self._names("claims") - self._names("done") - self._names("failed") - self._locks.keys()
        return any(is_locked(self.folder / "locks" / name) for name in open_jobs)

    def _let_go(self, job: Job) -> None:
        if (lock := self._locks.pop(job.name, None)) is not None:
            os.close(lock)


@contextmanager
def beside(num_workers: int, folder: Path, run: Callable[..., None], *arguments: object) -> Iterator[None]:
    """While the body works, `num_workers - 1` other processes call `run(worker, *arguments)`.

    They are waited for when the body ends, and ended where it fails. What one says, and what any library prints, goes
    to `FOLDER/worker-N.log`. A new process must be able to import `run`, and `arguments` to be pickled; this process is
    worker 0.
    """
    processes = []
    try:
        for worker in range(1, num_workers):
            log = folder / f"worker-{worker}.log"
            process = multiprocessing.get_context("spawn").Process(target=_life, args=(log, run, worker, *arguments))
            process.start()
            processes.append(process)
            logger.info("Worker %d (process %s) writes to %s", worker, process.pid, log)
        yield
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for worker, process in enumerate(processes, start=1):
            process.join()
            if process.exitcode:
                logger.warning("Worker %d ended early (exit code %d); see its log", worker, process.exitcode)


def take_gpu(worker: int, device: str | None = None) -> None:
    """Make a GPU this process's, so that what is moved to "cuda" goes there: the device named, or one by turns."""
    import torch  # seconds, which a queue need not wait for

    if device is None and torch.cuda.is_available():
        torch.cuda.set_device(worker % torch.cuda.device_count())
    elif device is not None and device.startswith("cuda:"):
        torch.cuda.set_device(device)


def _life(log: Path, run: Callable[..., None], worker: int, *arguments: object) -> None:
    with log.open("a", encoding="utf-8") as out:
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(out.fileno(), sys.stderr.fileno())
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("llm2vec").setLevel(logging.INFO)
    run(worker, *arguments)
