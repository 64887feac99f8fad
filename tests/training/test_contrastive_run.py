"""Stage II with everything on, as a run: what is logged, and what is refused before training."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
from helpers import family_tokenizer, tiny_model, write_jsonl

from llm2vec.training.config.file import load_config
from llm2vec.training.log import LOG_FILE
from llm2vec.types import Example, UserError
from tests.objectives.contrastive_loops import (
    NUM_NEGATIVES,
    ROOT,
    rows_with_copies,
)


def rows_of_files() -> list[Example]:
    """The rows with copies but for those that a file's reader leaves out: a negative that is its own row's positive."""
    other = reference.examples(1, 1, seed=5)[0].negatives[0]
    return [
        row._replace(negatives=tuple(other if text.text == row.positive.text else text for text in row.negatives))
        for row in rows_with_copies()
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model, and two sources of rows with scores in which texts repeat."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    rows = [
        {
            "query": row.query.text,
            "positive": row.positive.text,
            "negative": [text.text for text in row.negatives],
            "pos_score": row.scores[0],
            "neg_scores": row.scores[1:],
        }
        for row in rows_of_files()
    ]
    for source in ("words", "alone"):
        write_jsonl(tmp_path / f"{source}.jsonl", rows)
    table = {source: {"file": f"{source}.jsonl", "instruction": "find it"} for source in ("words", "alone")}
    (tmp_path / "sources.json").write_text(json.dumps(table), encoding="utf-8")
    return tmp_path


def run_script(folder: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> list[dict[str, float]]:
    """Stage II in this process; returns its log."""
    config = {
        "model_name_or_path": str(folder / "base"), "output_dir": str(folder / "out"),
        "sources_file": str(folder / "sources.json"), "num_hard_negatives": NUM_NEGATIVES,
        "max_seq_length": 128, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "lora_r": 4,
        "num_train_epochs": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True,
    } | keys  # fmt: skip
    file = folder / "run.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run_stage_II.py", str(file)])
    runpy.run_path(str(ROOT / "experiments/run_stage_II.py"), run_name="__main__")
    lines = (folder / "out" / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def test_everything_on_trains_and_is_logged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three negatives a row, in pieces: the loss is made of its parts, and copies are masked in each source."""
    log = run_script(
        folder,
        monkeypatch,
        matryoshka_dims=[8, 32],
        mask_false_negatives=True,
        own_negatives_only=["alone"],
        distillation_weight=0.5,
        tokens_per_microbatch=200,
    )
    assert len(log) == 8
    for entry in log:
        expected = entry["loss_contrastive"] + 0.5 * entry["loss_distillation"]
        assert entry["loss"] == pytest.approx(expected, abs=2e-4)  # the library rounds it
    shares = {round(entry["masked_negatives"], 4) for entry in log}
    rows = rows_of_files()
    positives = [row.positive.text for row in rows]
    everything = [text for row in rows for text in (row.positive.text, *(n.text for n in row.negatives))]
    in_pool = sum((everything.count(text) - 1) / 31 for text in positives) / 8
    assert shares == {round(in_pool, 4), 0.0}  # of the source whose queries see their own row alone
    assert sum(entry["loss"] for entry in log[-4:]) < sum(entry["loss"] for entry in log[:4])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"matryoshka_dims": [64]}, "matryoshka_dims: 64 is more than the model's hidden size, 32."),
        (
            {"own_negatives_only": ["worlds"]},
            "own_negatives_only: 'worlds' is not among the sources of this run: words",
        ),
        ({"own_negatives_only": ["alone"], "sources": ["words"]}, "'alone' is not among the sources"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_before_training(
    keys: dict[str, Any],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_script(folder, monkeypatch, **keys)
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"matryoshka_dims": []}, "matryoshka_dims is []; different sizes above 0 are needed"),
        ({"matryoshka_dims": [8, 0]}, "different sizes above 0 are needed"),
        ({"matryoshka_dims": [8, 8]}, "different sizes above 0 are needed"),
        ({"matryoshka_dims": 8}, "matryoshka_dims is 8"),
        ({"distillation_weight": -0.5}, "distillation_weight is -0.5; 0 or more is needed"),
        (
            {"distillation_weight": 1, "num_hard_negatives": 0},
            "distillation_weight is set, but num_hard_negatives is 0",
        ),
        ({"own_negatives_only": ["a"], "num_hard_negatives": 0}, "own_negatives_only is set, but num_hard_negatives"),
        ({"own_negatives_only": []}, "name at least one source, or leave the key out"),
        ({"directions": ["qd", "qx"]}, "directions is ['qd', 'qx']; allowed in the list: 'qd', 'dq', 'qq', 'dd'."),
        ({"directions": ["qd", ["dq"]]}, "directions is ['qd', ['dq']]; allowed in the list: 'qd', 'dq', 'qq', 'dd'."),
        ({"directions": ["dq"]}, "directions is ['dq']; 'qd' is needed"),
        ({"directions": ["qd", "qd"]}, "directions is ['qd', 'qd']; 'qd' is needed, and each"),
        (
            {"teacher_vectors": "v", "teacher_projection": True, "teacher_cosine_weight": 0, "gor_weight": 1},
            "teacher_projection has no effect while teacher_cosine_weight and teacher_mse_weight are 0",
        ),
        (
            {"contrastive_weight": 0, "gor_weight": 1},
            "every other term but those that only spread vectors out (gor_weight, gor_mean_weight)",
        ),
        ({"mask_false_negatives": 1}, "mask_false_negatives is 1"),
        ({"contrastive_weight": 0}, "contrastive_weight is 0, and so is the weight of every other term"),
        (
            {"contrastive_weight": 0, "teacher_vectors": "v", "teacher_cosine_weight": 0},
            "contrastive_weight is 0, and so is the weight of every other term",
        ),
        ({"dataset_name": "Wiki1M"}, "dataset_name is 'Wiki1M', which has no queries"),
        ({"simcse_dropout": 0.3}, "simcse_dropout has no effect in stage_II; it belongs to simcse"),
    ],
    ids=str,
)
def test_a_wrong_key_is_one_sentence(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    config = {"model_name_or_path": "m", "output_dir": str(tmp_path / "o"), "dataset_file_path": "d", **keys}
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(file, "stage_II")
    assert str(error.value).startswith(str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["matryoshka_dims", "mask_false_negatives", "own_negatives_only", "distillation_weight"]
)
def test_the_keys_belong_to_stage_II(key: str, tmp_path: Path) -> None:
    values: dict[str, Callable[[], Any]] = {"matryoshka_dims": lambda: [8], "own_negatives_only": lambda: ["a"]}
    value = values.get(key, lambda: True if key.startswith("mask") else 1.0)()
    file = tmp_path / "run.json"
    config = {"model_name_or_path": "m", "output_dir": "o", "dataset_file_path": "d", key: value}
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=f"{key} has no effect in stage_I; it belongs to stage_II"):
        load_config(file, "stage_I")
    assert getattr(load_config(file, "stage_II"), key) == value
