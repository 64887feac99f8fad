"""`make test-lowest` installs what setup.py calls the oldest, `make test` what it allows; the version is one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import llm2vec

ROOT = Path(__file__).parents[1]


def requirements() -> dict[str, Requirement]:
    """Name -> what setup.py asks of it, extras included."""
    (call,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    extras: dict[str, list[str]] = ast.literal_eval(given["extras_require"])
    lines = [*ast.literal_eval(given["install_requires"]), *(line for extra in extras.values() for line in extra)]
    return {found.name: found for found in map(Requirement, lines)}


REQUIREMENTS = requirements()
LOWEST = {name: bound.version for name, r in REQUIREMENTS.items() for bound in r.specifier if bound.operator == ">="}


def pinned(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", sorted(set(LOWEST) - {"torch", "ray"}))
def test_the_lowest_versions_are_the_lower_bounds(name: str) -> None:
    """The first release of each bound; torch and ray come in builds that not every machine has."""
    assert Version(pinned("constraints-lowest.txt")[name]) == Version(LOWEST[name])


@pytest.mark.parametrize("name", sorted(name for name, r in REQUIREMENTS.items() if r.specifier))
def test_the_tested_versions_are_allowed(name: str) -> None:
    assert REQUIREMENTS[name].specifier.contains(pinned("constraints.txt")[name])


def test_the_next_minor_release_of_transformers_is_not_allowed_before_it_is_tested() -> None:
    """The trainer overrides hooks that are transformers' own business."""
    tested = Version(pinned("constraints.txt")["transformers"])
    allowed = REQUIREMENTS["transformers"].specifier
    assert allowed.contains(f"{tested.major}.{tested.minor}.99")
    assert not allowed.contains(f"{tested.major}.{tested.minor + 1}.0")


def test_one_version_everywhere() -> None:
    version = llm2vec.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
