"""Every case of `cases` holds; run as it is run by hand, in a process of its own, as it forks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.cases import IMPORTED

ROOT = Path(__file__).parents[2]


def test_what_it_imports_beforehand_is_there() -> None:
    """A module that moves would stop it before its first case, and it is rarely run."""
    assert all(map(importlib.util.find_spec, IMPORTED))


@pytest.mark.slow
def test_every_case_holds() -> None:
    """Some 4,000 cases, about 15 minutes on a free core. What it prints goes to docs/reliability.md."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.attack.attack"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-2000:]}"
