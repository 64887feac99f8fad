"""A new Stage I objective is its own file and a line elsewhere: docs/guides/recipe.md, followed literally."""

from __future__ import annotations

import filecmp
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from forked_runs import assert_same_to_the_bit, log_of, make_data
from helpers import family_tokenizer, tiny_model

from llm2vec.data.collation import CollateSides
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.training.step import backward_step

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guides/recipe.md").read_text(encoding="utf-8").split("## A new objective")[1]
#: The guide's class, where it goes, and its line of the table.
((PLACE, CODE),) = re.findall(r'```py title="(.*?)"\n(.*?)```', GUIDE, re.DOTALL)
((LINE),) = re.findall(r"```py\n(.*?)```", GUIDE, re.DOTALL)
TABLE = "llm2vec/objectives/stage_one.py"

RUNS = """
import json, sys
from llm2vec.__main__ import main

for argv in json.loads(sys.argv[1]):
    main(argv)
"""


def changed(package: Path) -> tuple[set[str], set[str]]:
    """Files that `package` has beside this checkout's, and those that differ from it."""
    files = {str(file.relative_to(package.parent)) for file in package.rglob("*") if "__pycache__" not in file.parts}
    files = {file for file in files if (package.parent / file).is_file()}
    new = {file for file in files if not (ROOT / file).exists()}
    return new, {f for f in files - new if not filecmp.cmp(ROOT / f, package.parent / f, shallow=False)}


def test_the_guide_followed_literally(tmp_path: Path) -> None:
    """It trains by the command, goes on from a checkpoint as if nothing had been, and is planned."""
    package = tmp_path / "llm2vec"
    shutil.copytree(ROOT / "llm2vec", package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / PLACE).write_text(CODE, encoding="utf-8")
    table = (tmp_path / TABLE).read_text(encoding="utf-8")
    (tmp_path / TABLE).write_text(table.replace("STAGE_ONE = {\n", f"STAGE_ONE = {{\n{LINE}"), encoding="utf-8")
    assert changed(package) == ({PLACE}, {TABLE})
    assert LINE.count("\n") == 1

    keys = make_data(tmp_path) | {"objective": "bag_of_tokens", "max_steps": 4, "logging_steps": 1}
    configs = {"whole": {}, "cut": {"stop_after_n_steps": 2}, "rest": {}}
    for name, more in configs.items():
        output = str(tmp_path / name.replace("rest", "cut"))
        (tmp_path / f"{name}.json").write_text(json.dumps(keys | more | {"output_dir": output}), encoding="utf-8")
    commands = [["stage-1", str(tmp_path / f"{name}.json")] for name in configs]
    commands.append(["plan", str(tmp_path / "whole.json"), "--stage", "stage_I"])
    done = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_same_to_the_bit(tmp_path / "cut", tmp_path / "whole")
    losses = [entry["loss_bag"] for entry in log_of(tmp_path / "whole") if "loss_bag" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "memory      of a process" in done.stdout and "useful operations in 4 steps" in done.stdout


@pytest.fixture(scope="module")
def bag_of_tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The guide's class."""
    file = tmp_path_factory.mktemp("own") / Path(PLACE).name
    file.write_text(CODE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("bag_of_tokens", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BagOfTokens


def test_the_guides_loss_is_that_of_one_row_at_a_time(bag_of_tokens: Any) -> None:
    """However the step is cut."""
    model: Any = reference.exact(tiny_model("llama", True, initializer_range=0.2))
    settings = EncoderSettings(pooling_mode="last", attention="causal", template="llama3")
    rows = reference.examples(5)
    collate = CollateSides(row_tokenizer(family_tokenizer("llama"), settings), bag_of_tokens.sides)
    terms = []
    for query, positive in zip(collate.rows(rows, "query"), collate.rows(rows, "positive"), strict=True):
        scores = model.get_output_embeddings().weight @ reference.embedding(model.base_model, query)
        wanted = [token for token, target in zip(positive.ids, positive.target, strict=True) if target]
        terms += [torch.logsumexp(scores, dim=0) - scores[token] for token in wanted]
    loss = sum(terms[1:], terms[0]) / len(terms)
    loss.backward()
    expected = reference.gradients(model)
    objective, batch = bag_of_tokens(model, settings), collate(rows)
    for max_tokens in (None, 40):
        parts = backward_step(objective, batch, objective.count(batch), max_tokens=max_tokens)
        torch.testing.assert_close(parts["loss"], loss.detach(), rtol=1e-9, atol=0)
        reference.assert_same_gradients(reference.gradients(model), expected)
