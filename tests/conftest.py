"""What every test runs under: offline, a datasets cache of its own, one thread, a fixed seed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

# Before any import of torch, transformers or datasets: each reads its part once, at import.
_DATASETS_CACHE = tempfile.TemporaryDirectory(prefix="llm2vec-tests-")
os.environ["HF_DATASETS_CACHE"] = _DATASETS_CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from llm2vec.training import step  # noqa: E402

pytest_plugins = ["verify_folders"]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same state of torch's generator, whatever ran before it."""
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache() -> Iterator[None]:
    """Removes the datasets cache when the session ends."""
    yield
    _DATASETS_CACHE.cleanup()


@pytest.fixture
def every_piece_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient caching embeds every piece twice, as it does where there are many."""
    monkeypatch.setattr(step, "MOST_PIECES_WITH_A_GRAPH", 0)
