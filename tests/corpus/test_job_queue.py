"""The queue in a folder: who gets which job, and what becomes of the job of a process that is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm2vec.corpus.queue import Job, JobQueue
from llm2vec.files import alone_in
from llm2vec.types import UserError


def in_another_process(action: Callable[[], None]) -> int:
    """Run an action in a fork that then ends without tidying up; its process id."""
    process = multiprocessing.get_context("fork").Process(target=lambda: (action(), os._exit(0)))
    process.start()
    process.join()
    assert process.pid is not None
    return process.pid


# Claims a job, says so, and does nothing more.
HOLD = """
import sys
from pathlib import Path
from typing import Any
from llm2vec.corpus.queue import JobQueue
print(JobQueue(Path(sys.argv[1])).claim().name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def neighbour(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts another process that takes the first job of the queue and keeps it."""
    started = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def drain(queue: JobQueue) -> list[str]:
    names = []
    while (job := queue.claim_or_wait(0.01)) is not None:
        names.append(job.name)
        queue.finish(job)
    return names


def test_the_longest_goes_first_and_names_settle_ties(tmp_path: Path) -> None:
    queue = JobQueue.prepare(tmp_path, [Job("b", 1), Job("c", 9), Job("a", 1), Job("d", 0.5)])
    assert drain(queue) == ["c", "a", "b", "d"]
    assert queue.unfinished() == [] and queue.num_done() == 4


def test_a_job_waits_for_those_it_depends_on(tmp_path: Path) -> None:
    jobs = [Job("merge", 9, after=("x", "y", "done in an earlier start")), Job("x", 2), Job("y", 1)]
    assert drain(JobQueue.prepare(tmp_path, jobs)) == ["x", "y", "merge"]
    assert drain(JobQueue.prepare(tmp_path, jobs, done={"x", "y"})) == ["merge"]


def test_jobs_are_the_same_for_every_process(tmp_path: Path) -> None:
    job = Job("x", 2.5, after=("y",), details={"task": "STS12", "shard": 3})
    JobQueue.prepare(tmp_path, [job])
    assert JobQueue(tmp_path).jobs == {"x": job}


def test_no_job_is_handed_out_twice(tmp_path: Path) -> None:
    JobQueue.prepare(tmp_path, [Job(f"job {i}", i % 5) for i in range(120)])
    taken: list[list[str]] = [[] for _ in range(8)]

    def take(number: int) -> None:
        queue = JobQueue(tmp_path)
        while (job := queue.claim()) is not None:
            taken[number].append(job.name)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [name for each in taken for name in each]
    assert len(names) == len(set(names)) == 120


def test_one_waits_for_what_another_will_make_possible(tmp_path: Path, neighbour: Any) -> None:
    queue = JobQueue.prepare(tmp_path, [Job("first", 1), Job("second", 1, after=("first",))])
    neighbour()
    threading.Timer(0.3, lambda: queue.finish(queue.jobs["first"])).start()
    began = time.monotonic()
    job = queue.claim_or_wait(0.05)
    assert job is not None and job.name == "second" and time.monotonic() - began > 0.25


def test_what_is_ended_between_two_looks_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process ends its job and lets go of it after this one has looked for a free one."""
    jobs = [Job("first", 1), Job("second", 1, after=("first",))]
    other, queue = JobQueue.prepare(tmp_path, jobs), JobQueue(tmp_path)
    job, is_any_held = other.claim(), queue._is_any_held
    assert job is not None

    def ends_first() -> bool:
        other.finish(job)
        return is_any_held()

    monkeypatch.setattr(queue, "_is_any_held", ends_first)
    second = queue.claim_or_wait(0.01)
    assert second is not None and second.name == "second"


def test_a_dead_process_costs_its_job_and_the_next_start_takes_it(tmp_path: Path) -> None:
    jobs = [Job("a", 3), Job("b", 2), Job("after a", 1, after=("a",))]
    JobQueue.prepare(tmp_path, jobs)
    in_another_process(lambda: JobQueue(tmp_path).claim() and None)
    queue = JobQueue(tmp_path)
    assert drain(queue) == ["b"], "not the job that may have killed the other process, nor what needs it"
    queue.wait(0.01)
    assert queue.unfinished() == ["a", "after a"]
    assert drain(JobQueue.prepare(tmp_path, jobs[::2])) == ["a", "after a"]


def test_a_job_of_a_process_that_runs_stays_its_own(tmp_path: Path, neighbour: Any) -> None:
    jobs = [Job("a", 3), Job("b", 2)]
    JobQueue.prepare(tmp_path, jobs)
    process = neighbour()
    queue = JobQueue.prepare(tmp_path, jobs)
    assert drain(queue) == ["b"]
    waiting = threading.Thread(target=queue.wait, args=(0.02,))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    process.kill()
    waiting.join(5)
    assert not waiting.is_alive() and queue.unfinished() == ["a"]
    assert drain(JobQueue.prepare(tmp_path, jobs)) == ["a", "b"], "its lock has died with it"


def test_a_process_that_has_ended_and_is_not_waited_for_holds_nothing(tmp_path: Path, neighbour: Any) -> None:
    queue = JobQueue.prepare(tmp_path, [Job("a", 1)])
    process = neighbour()
    process.send_signal(signal.SIGKILL)  # and so it is a zombie
    while queue._is_any_held():
        time.sleep(0.01)
    assert process.returncode is None and queue.claim_or_wait(0.01) is None


def test_a_job_is_let_go_of_however_it_ends(tmp_path: Path) -> None:
    """Also where the process lives on and starts again, as a notebook does."""
    jobs = [Job("a", 3), Job("b", 2), Job("c", 1)]

    def do(job: Job) -> None:
        if job.name == "a":
            raise UserError("The hub is unreachable.")
        if job.name == "b":
            raise KeyboardInterrupt

    queue = JobQueue.prepare(tmp_path, jobs)
    with pytest.raises(KeyboardInterrupt):
        queue.work(do)
    assert queue.failures() == {"a": "The hub is unreachable."} and queue.unfinished() == ["b", "c"]
    assert drain(JobQueue.prepare(tmp_path, jobs)) == ["a", "b", "c"]


def test_a_failure_is_told_and_tried_again_at_the_next_start(tmp_path: Path) -> None:
    jobs = [Job("a", 2), Job("b", 1), Job("c", 1, after=("a",))]
    queue = JobQueue.prepare(tmp_path, jobs)
    job = queue.claim()
    assert job is not None
    queue.fail(job, "The hub is unreachable.")
    assert drain(queue) == ["b"] and queue.unfinished() == ["c"]
    assert queue.failures() == {"a": "The hub is unreachable."}
    assert drain(JobQueue.prepare(tmp_path, jobs)) == ["a", "b", "c"]


def test_a_folder_that_is_gone_means_that_all_is_done(tmp_path: Path) -> None:
    queue = JobQueue.prepare(tmp_path / "queue", [Job("a", 1)])
    for file in sorted((tmp_path / "queue").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert queue.claim_or_wait(0.01) is None


def test_a_queue_is_looked_at_once_however_many_jobs_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(f"job {i:04}", 1) for i in range(2000)]
    queue = JobQueue.prepare(tmp_path, jobs, done=[job.name for job in jobs[:-1]])
    looks, names = [], queue._names
    monkeypatch.setattr(queue, "_names", lambda kind: _Watched(names(kind), looks))
    assert queue.unfinished() == ["job 1999"]
    job = queue.claim()
    assert job is not None and job.name == "job 1999"
    assert len(looks) < 10


class _Watched(set[str]):
    """A set that notes each union that is made of it: those copy the names of all jobs."""

    def __init__(self, names: set[str], looks: list[str]) -> None:
        super().__init__(names)
        self.looks = looks

    def __or__(self, other: object) -> set[str]:  # type: ignore[override]
        self.looks.append("union")
        return _Watched(set(self) | set(other), self.looks)  # type: ignore[call-overload]


def test_a_folder_is_held_by_the_programs_that_were_given_its_lock(tmp_path: Path) -> None:
    with alone_in(tmp_path, "work") as lock:
        program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    try:
        with pytest.raises(UserError, match="another work is at work here"), alone_in(tmp_path, "work"):
            pass
    finally:
        program.kill()
        program.wait()
    with alone_in(tmp_path, "work"):
        pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.* cannot be made or written to"), alone_in(folder, "work"):
            pass
