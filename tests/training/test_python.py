"""`llm2vec.train(Config(...), rows)`: the commands' run, started from Python over rows that are in no file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from forked_runs import make_data
from safetensors.torch import load_file
from transformers import TrainerCallback

from llm2vec import Config, LLM2Vec, train
from llm2vec.training.stages import train_stage
from llm2vec.types import Stage, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("python")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, Any]:
    """Of a file, with the rows in another; the tokenizer's own template."""
    return make_data(folder) | {"total_batch_size": 4, "max_steps": 3, "logging_steps": 1, "save_strategy": "no"}


@pytest.fixture(scope="module")
def rows(folder: Path, keys: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "words.jsonl").read_text(encoding="utf-8").splitlines()]


def config_of(keys: dict[str, Any], named: Stage, output: Path, **changes: Any) -> Config:
    """The keys of a file as Python writes them, without where its rows are."""
    own = {field.name for field in dataclasses.fields(Config)}
    ours = {key: value for key, value in keys.items() if key in own and key != "sources_file"}
    training = {key: value for key, value in keys.items() if key not in own} | {"output_dir": output}
    return dataclasses.replace(Config(**ours, stage=named, training=training), **changes)


class Steps(TrainerCallback):
    """Counts the steps it is told of."""

    def __init__(self) -> None:
        self.number = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.number += 1


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return dict(load_file(file))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "given"),
    [("stage_I", iter), ("stage_II", list), ("stage_II", Dataset.from_list), ("simcse", list), ("mntp", list)],
)
def test_the_weights_are_those_of_the_command(
    stage: Stage, given: Callable[[Any], Iterable[Any]], folder: Path, keys: dict[str, Any], rows: list[Any]
) -> None:
    name = f"{stage}-{given.__name__}"
    file = folder / f"{name}.json"
    file.write_text(json.dumps(keys | {"output_dir": str(folder / name)}), encoding="utf-8")
    train_stage(stage, file)
    steps = Steps()
    config = config_of(keys, stage, folder / f"{name}-python")
    model, figures = train(config, given(rows), instruction="find the answer", callbacks=[steps])
    expected, found = weights(folder / name), weights(folder / f"{name}-python")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert steps.number == 3
    assert [entry["step"] for entry in figures if "loss" in entry] == [1, 2, 3]
    assert isinstance(model, LLM2Vec)
    saved = LLM2Vec.from_pretrained(folder / name)
    assert torch.equal(*(m.encode(["the red one"], show_progress_bar=False) for m in (model, saved)))


def test_a_finished_run_is_returned_as_it_is(folder: Path, keys: dict[str, Any], rows: list[Any]) -> None:
    """A cell of a notebook may run twice; with other rows it is another run."""
    config = config_of(keys, "stage_II", folder / "twice")
    _, first = train(config, rows)
    steps = Steps()
    _, second = train(config, (row for row in rows), callbacks=[steps])
    assert second == first and steps.number == 0
    with pytest.raises(UserError, match=r"belongs to another run"):
        train(config, rows[:-1])


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"query": "red", "negative": "blue"}, "line 2: the field `positive` is missing"),
        ({"query": "red", "positive": " ", "negative": "blue"}, "line 2: `positive` is empty."),
        ({"query": "red", "positive": 7, "negative": "blue"}, "line 2: `positive` must be text, not a int."),
        ({"query": "\ud800", "positive": "a", "negative": "b"}, "line 2: `query` holds half a surrogate pair"),
        ({"query": b"red", "positive": "a"}, "rows, row 2: .* is no row of text"),
        ("red", "rows, row 2: 'red' is no row of text"),
    ],
)
def test_a_bad_row_is_named(
    bad: Any, sentence: str, tmp_path: Path, keys: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match=sentence):
        train(config_of(keys, "stage_II", tmp_path / "out"), [rows[0], bad])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stage": None}, "Config: stage is None; allowed: 'stage_I', 'stage_II', 'lm', 'simcse', 'mntp'."),
        ({"alpha": 0.5}, "Config: alpha has no effect in stage_II; it belongs to stage_I."),
        ({"lora_r": 0}, "Config: lora_r is 0; it must be above 0"),
        ({"lora_modules": ("q_proj",)}, "Config: lora_modules is ('q_proj',); a list or null is needed."),
        ({"training": {"output_dir": "x", "learning_rat": 1}}, "Config: unknown key 'learning_rat'; did you mean"),
        ({"training": {}}, "Config: output_dir must be set."),
        ({"sources_file": "s.json"}, "Config: sources_file says where rows are, and rows are given too;"),
    ],
)
def test_a_bad_key_is_named(changes: dict[str, Any], sentence: str, keys: dict[str, Any], rows: list[Any]) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        train(config_of(keys, "stage_II", Path("output/never"), **changes), rows)


def test_no_rows_and_an_instruction_for_none_are_refused(keys: dict[str, Any]) -> None:
    config = config_of(keys, "stage_II", Path("output/never"))
    with pytest.raises(UserError, match=r"rows: there are none"):
        train(config, [])
    with pytest.raises(UserError, match=r"instruction is that of the rows that are given, and none are"):
        train(config, instruction="find the answer")
    with pytest.raises(UserError, match=r"Config: dataset_file_path must name the folder"):
        train(config)


def test_the_door_loads_no_torch() -> None:
    assert list(inspect.signature(train).parameters)[:2] == ["config", "rows"]
    import llm2vec.training.config  # which puts no module in its place

    assert train is llm2vec.train and Config is llm2vec.training.config.Config
    code = "import sys, llm2vec; from llm2vec import train; assert callable(train) and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
