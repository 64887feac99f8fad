"""A queue of jobs in a folder, for any number of processes that share nothing else.

    jobs.json        the jobs of this start
    claims/JOB       made by the process that does the job; says which process that is
    done/JOB         the job is done
    failed/JOB       the job cannot be done; holds the sentence that says why

One process calls `prepare`, then every process calls `claim_or_wait` and `finish` (or `fail`) until there is nothing
left. A process that dies leaves its claim: the job is not taken again in this start (it may well kill the next one,
too), but the next `prepare` frees it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec.files import write_json
from llm2vec.types import UserError

LOCK_FILE = ".lock"

#: A claim without content is of a process that died between making and writing it, once it is as old as this.
SECONDS_TO_WRITE_A_CLAIM = 60.0


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: Different for every job; names a file.
        size: What the work amounts to, in any unit; larger jobs are handed out first.
        after: Names of the jobs that must be done before it; names that are no job of the queue count as done.
        details: What else the worker needs to know.
    """

    name: str
    size: float
    after: tuple[str, ...] = ()
    details: dict[str, str | int] = field(default_factory=dict)


class JobQueue:
    """The jobs of a folder, as one process sees them."""

    def __init__(self, folder: Path) -> None:
        """Open a queue that `prepare` has made."""
        self.folder = folder
        jobs = [Job(**{**job, "after": tuple(job["after"])}) for job in json.loads(_jobs_file(folder).read_text())]
        self.jobs = {job.name: job for job in sorted(jobs, key=lambda job: (-job.size, job.name))}

    @classmethod
    def prepare(cls, folder: Path, jobs: Sequence[Job], done: Collection[str] = ()) -> JobQueue:
        """Make a queue, or take up one that an earlier start left.

        Claims of other processes that still run on this machine are kept; all others are freed, those of other
        machines included.

        Args:
            folder: Where the queue lies.
            jobs: All jobs of this start.
            done: Names of those that are done already.

        Returns:
            The queue.
        """
        for kind in ("claims", "done", "failed"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for claim in (folder / "claims").iterdir():
            if not (claim.name in {job.name for job in jobs} - set(done) and _of_another_live_process(claim)):
                claim.unlink(missing_ok=True)
        for marker in [*(folder / "done").iterdir(), *(folder / "failed").iterdir()]:
            marker.unlink(missing_ok=True)
        for name in done:
            (folder / "done" / name).touch()
        write_json(_jobs_file(folder), [dataclasses.asdict(job) for job in jobs])
        return cls(folder)

    def claim(self) -> Job | None:
        """The largest job that is free and may begin, now this process's; None if there is none at this moment."""
        done = self._names("done")
        taken = done | self._names("failed") | self._names("claims")
        for name, job in self.jobs.items():
            if name in taken or not self._unmet(job) <= done:
                continue
            try:
                file = os.open(self.folder / "claims" / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except (FileExistsError, FileNotFoundError):  # taken, or all is done and the folder is gone
                continue
            with os.fdopen(file, "w") as claim:
                claim.write(json.dumps(_process(os.getpid())))
            return job
        return None

    def claim_or_wait(self, seconds: float = 0.5) -> Job | None:
        """The next job for this process, waiting for one that others' work may make ready.

        Args:
            seconds: Between two looks.

        Returns:
            The job; None if there will be none any more.
        """
        while (job := self.claim()) is None:
            open_jobs = self.jobs.keys() - self._names("done") - self._names("failed")
            if open_jobs <= self._names("claims") or not self._held(open_jobs):
                return None
            time.sleep(seconds)
        return job

    def wait(self, seconds: float = 0.5) -> None:
        """Return when no process works on a job any more."""
        while self._held(self.jobs.keys() - self._names("done") - self._names("failed")):
            time.sleep(seconds)

    def finish(self, job: Job) -> None:
        """Mark a job as done."""
        (self.folder / "done" / job.name).touch()

    def fail(self, job: Job, reason: str) -> None:
        """Mark a job as one that cannot be done."""
        (self.folder / "failed" / job.name).write_text(reason, encoding="utf-8")

    def failures(self) -> dict[str, str]:
        """Job -> why it could not be done."""
        return {name: (self.folder / "failed" / name).read_text(encoding="utf-8") for name in self._names("failed")}

    def unfinished(self) -> list[str]:
        """Jobs that are neither done nor failed: their process is gone, or what they wait for is not done."""
        ended = self._names("done") | self._names("failed")
        return [name for name in self.jobs if name not in ended]

    def num_done(self) -> int:
        """How many jobs are done."""
        return len(self.jobs.keys() & self._names("done"))

    def _unmet(self, job: Job) -> set[str]:
        return set(job.after) & self.jobs.keys()

    def _names(self, kind: str) -> set[str]:
        folder = self.folder / kind
        return {file.name for file in folder.iterdir()} if folder.is_dir() else set()

    def _held(self, names: Collection[str]) -> bool:
        """Whether one of these jobs is in the hands of a process that runs, or of another machine."""
        claims = [self.folder / "claims" / name for name in names]
        return any(_of_another_live_process(claim, elsewhere=True) for claim in claims)


@contextmanager
def alone_in(folder: Path, work: str) -> Iterator[int]:
    """Hold a folder that two starts at a time would write over each other's files in; it is made if missing.

    Args:
        folder: where the files go.
        work: what is done there, for the message.

    Yields:
        The lock's file descriptor. A program that is started with it (`pass_fds`) holds the folder, too, and goes on
        doing so when this process is killed.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise UserError(f"{folder} cannot be made or written to ({error.strerror}).") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the last process that holds the file open
        except BlockingIOError:
            raise UserError(f"{folder}: another {work} is at work here; wait, or give another output folder.") from None
        yield lock.fileno()


def _jobs_file(folder: Path) -> Path:
    return folder / "jobs.json"


def _process(pid: int) -> dict[str, str | int]:
    """What tells a process from all others: a number alone is given out again after the process has ended."""
    try:
        # The name in brackets may hold blanks; the start time is the 20th field after it.
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        began = ""  # no such process, or no /proc
    return {"host": socket.gethostname(), "pid": pid, "began": began}


def _of_another_live_process(claim: Path, *, elsewhere: bool = False) -> bool:
    """Whether a claim is of a process that still runs, this one aside; `elsewhere` is the answer for other hosts."""
    try:
        holder, age = claim.read_text(), time.time() - claim.stat().st_mtime
    except FileNotFoundError:
        return False
    if not holder:
        return age < SECONDS_TO_WRITE_A_CLAIM
    process = json.loads(holder)
    if process["host"] != socket.gethostname():
        return elsewhere
    if process["pid"] == os.getpid() or _process(process["pid"]) != process:
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    return not _is_zombie(process["pid"])


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and only its parent has not asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
