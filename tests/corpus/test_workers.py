"""Processes that share this one's work: their logs, and how they end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from worker_stub import say_and_wait

from llm2vec.corpus.queue import beside


def test_others_are_waited_for_and_what_they_print_is_in_their_logs(tmp_path: Path) -> None:
    with beside(3, tmp_path, say_and_wait, 0.0):
        assert not list(tmp_path.glob("worker-0*"))
    logs = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    assert logs == {f"worker-{i}.log": f"this is worker {i}\n" for i in (1, 2)}


def test_others_end_where_this_one_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, began = tmp_path / "worker-1.log", time.monotonic()
    with pytest.raises(KeyboardInterrupt), beside(2, tmp_path, say_and_wait, 3600.0):
        while not (log.is_file() and log.read_text(encoding="utf-8")):
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 600
    assert "Worker 1 ended early (exit code -15)" in caplog.text
