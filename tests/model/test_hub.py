"""A hub that is out of reach costs scripts that look at names a moment, and runs that load a model no attempt."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers.utils.hub
from huggingface_hub import constants

from llm2vec import hub
from llm2vec.hub import find_file, without_waiting_for_the_hub
from llm2vec.planning.plan import Conditions, make_plan
from llm2vec.types import UserError

VERIFY = Path(__file__).parents[2] / "experiments/verify.py"
EXPORT = Path(__file__).parents[2] / "experiments/export.py"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine that is not told to stay offline, and has no network; lists the addresses that are asked for."""
    addresses: list[str] = []

    def no_route(method: str, address: str, **_: object) -> None:
        addresses.append(address)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "http_backoff", no_route)
    return addresses


def test_a_silent_hub_is_asked_once_and_left_alone(asked: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with without_waiting_for_the_hub():
        assert not constants.HF_HUB_OFFLINE, "nothing was looked for yet"
        assert find_file("nobody/nothing", "config.json") is None
        assert find_file("nobody/else", "config.json") is None
        assert constants.HF_HUB_OFFLINE
    assert asked == [constants.ENDPOINT]
    assert not constants.HF_HUB_OFFLINE, "it counts as offline within only"
    (record,) = caplog.records
    assert "does not answer (no route to host); only folders and cached files are found" in record.getMessage()


def test_a_hub_that_answers_is_used(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers."""
    monkeypatch.setattr(hub, "http_backoff", lambda _, address, **__: asked.append(address))
    monkeypatch.setattr(transformers.utils.hub, "cached_file", lambda path, name, **_: f"{path}/{name}")
    with without_waiting_for_the_hub():
        assert find_file("somebody/model", "config.json") == "somebody/model/config.json"
        assert find_file("somebody/else", "config.json") == "somebody/else/config.json"
        assert not constants.HF_HUB_OFFLINE
    assert asked == [constants.ENDPOINT]


def test_folders_and_runs_ask_for_nothing(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on this machine needs no hub; a run that loads a model has its client's patience."""
    with without_waiting_for_the_hub():
        assert find_file(str(tmp_path), "config.json") is None
    monkeypatch.setattr(transformers.utils.hub, "cached_file", lambda *_, **__: None)
    assert find_file("nobody/nothing", "config.json") is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with without_waiting_for_the_hub():
        assert find_file("nobody/nothing", "config.json") is None
    assert asked == []


def plan(folder: Path) -> None:
    config = folder / "config.json"
    keys = {"model_name_or_path": "nobody/nothing", "output_dir": str(folder), "dataset_file_path": "data"}
    config.write_text(json.dumps(keys), encoding="utf-8")
    make_plan(config, Conditions(stage="stage_I"))


def verify(folder: Path) -> None:
    runpy.run_path(str(VERIFY))["main"](["nobody/nothing", "nobody/else"])


def export(folder: Path) -> None:
    runpy.run_path(str(EXPORT))["main"](["nobody/nothing", str(folder / "out")])


@pytest.mark.parametrize("script", [plan, verify, export], ids=lambda script: script.__name__)
def test_scripts_do_not_wait(script: Callable[[Path], None], asked: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody/nothing"):
        script(tmp_path)
    assert asked == [constants.ENDPOINT]
