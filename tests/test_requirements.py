"""`make test-lowest` installs what setup.py calls the oldest, and `make test` what it allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
BOUNDS = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', (ROOT / "setup.py").read_text(encoding="utf-8")))


def pinned(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", sorted(set(BOUNDS) - {"torch", "ray"}))
def test_the_lowest_versions_are_the_lower_bounds(name: str) -> None:
    """The first release of each bound; torch and ray come in builds that not every machine has."""
    assert Version(pinned("constraints-lowest.txt")[name]) == Version(BOUNDS[name])


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_the_tested_versions_are_allowed(name: str) -> None:
    assert Version(pinned("constraints.txt")[name]) >= Version(BOUNDS[name])
