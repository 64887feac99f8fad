"""The quickstart's own decisions: what is made anew, what is reused, who may write; no script is run here."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from llm2vec.__main__ import COMMANDS
from llm2vec.files import alone_in
from llm2vec.quickstart.docstrings import TRAIN_FILE
from llm2vec.training.config.file import load_config
from llm2vec.types import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments/quickstart.py"


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script's functions, in a folder where a base model was made from text of the hash `today`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    Path("train_configs").symlink_to(ROOT / "train_configs")
    config = dataclasses.asdict(load_config(Path("train_configs/quickstart/pretrain.json"), "lm"))
    write("output/quickstart/base/run.json", {"config": config, "data": [{"sha256": "today"}]})
    write("output/quickstart/init/config.json", {})
    write("cache/docstrings/manifest.json", {"sha256": {TRAIN_FILE: "today", "other": "of another file"}})
    functions: dict[str, Any] = runpy.run_path(str(SCRIPT))["main"].__globals__
    done: list[str] = []
    functions["run_script"] = lambda script, *_: done.append(script)
    functions["train"] = lambda script, name, *_, **__: done.append(name)
    return {**functions, "done": done}


def write(file: str, content: Any) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(content, default=str), encoding="utf-8")


def test_a_base_of_todays_text_and_config_is_reused(quickstart: dict[str, Any]) -> None:
    quickstart["make_base"](1)
    assert quickstart["done"] == [] and Path("output/quickstart/init").is_dir()


@pytest.mark.parametrize("data", ["of yesterday", "of another file"])
def test_other_text_makes_tokenizer_and_base_anew(quickstart: dict[str, Any], data: str) -> None:
    run = json.loads(Path("output/quickstart/base/run.json").read_text(encoding="utf-8"))
    write("output/quickstart/base/run.json", {**run, "data": [{"sha256": data}]})
    quickstart["make_base"](1)
    assert quickstart["done"] == ["make_tiny_model.py", "pretrain"]
    assert not Path("output/quickstart/init").exists(), "make_tiny_model.py writes over nothing"


@pytest.mark.parametrize("key", ["template", "total_batch_size", "max_seq_length"])
def test_another_config_makes_the_base_anew(quickstart: dict[str, Any], key: str) -> None:
    run = json.loads(Path("output/quickstart/base/run.json").read_text(encoding="utf-8"))
    write("output/quickstart/base/run.json", {**run, "config": {**run["config"], key: 1}})
    assert not quickstart["base_is_up_to_date"]()


def test_two_quickstarts_do_not_write_one_folder(quickstart: dict[str, Any]) -> None:
    with (
        alone_in(Path("output/quickstart"), "quickstart"),
        pytest.raises(UserError, match="another quickstart is at work here"),
    ):
        quickstart["main"]([])
    assert quickstart["done"] == []


@pytest.mark.parametrize(("content", "step"), [('{"step": 5}\n{"step": 1', 5), ('{"st', 0), ("", 0)])
def test_a_line_that_is_just_written_does_not_count_yet(
    quickstart: dict[str, Any], tmp_path: Path, content: str, step: int
) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    assert quickstart["last_step"](tmp_path / "log.jsonl") == step
    assert quickstart["last_step"](tmp_path / "none.jsonl") == 0


def test_everything_is_made_in_order(quickstart: dict[str, Any]) -> None:
    quickstart["main"].__globals__["evaluate_and_report"] = lambda _: quickstart["done"].append("report")
    quickstart["main"]([])
    done = quickstart["done"]
    assert done[0] == "make_docstrings.py" and done[-1] == "report"
    assert sorted(done[1:-1]) == ["baseline", "control", "control_lm", "stage_I", "stage_II"]
    assert done.index("stage_I") < done.index("stage_II") and done.index("control_lm") < done.index("control")


def test_the_last_screen_says_who_is_ahead_and_what_to_try(quickstart: dict[str, Any]) -> None:
    """Whoever it is; and its commands are there."""
    scores = {"bm25": 64.0, "base": 4.0, "stage_I": 9.5, "baseline": 20.0, "control": 18.0, "anchor": 19.0}
    said = quickstart["last_words"](scores)
    assert said[0].startswith("After Stage II: baseline 20.0, anchor 19.0, control 18.0.")
    assert "from 4.0 to 9.5" in said[1] and "BM25 has 64.0" in said[2]
    tried = [line.split("llm2vec ")[-1].split()[0] for line in said[said.index("Try next:") + 1 :]]
    assert tried == ["search", "export", "embedder"] and set(tried) <= set(COMMANDS)
