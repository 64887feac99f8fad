"""What a worker process of a test does; a module, so that the new process can import it."""

from __future__ import annotations

import sys
import time


def say_and_wait(worker: int, seconds: float) -> None:
    """Print its number, and stay."""
    sys.stdout.write(f"this is worker {worker}\n")
    sys.stdout.flush()
    time.sleep(seconds)
