"""Processes that share the work of this one: each says what it has to say in a log of its own, and takes a GPU."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


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
