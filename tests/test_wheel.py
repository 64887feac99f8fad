"""`pip wheel .` gives a package that works outside any clone: its data are in it, and its commands find them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import family_tokenizer, tiny_model, write_jsonl

ROOT = Path(__file__).parents[1]

# Runs commands one after the other in one process, as torch takes seconds to import; prints what each of them printed.
COMMANDS = """
import contextlib, io, json, sys
from llm2vec.__main__ import main
from llm2vec.cli import set_up_logging

set_up_logging()
said = []
for words in json.loads(sys.stdin.read()):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(words)
    assert not code, (words, code)
    said.append(out.getvalue())
import llm2vec
print(json.dumps([llm2vec.__file__, said]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked; made from a copy, as setuptools leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("llm2vec", "test_configs/mteb"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(site: Path) -> None:
    def files(package: Path) -> set[str]:
        found = (file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        return {str(file.relative_to(package)) for file in found}

    assert files(site / "llm2vec") == files(ROOT / "llm2vec")
    (script,) = site.glob("*.dist-info/entry_points.txt")
    assert "llm2vec = llm2vec.__main__:start" in script.read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_commands_run_outside_any_clone(site: Path, tmp_path: Path) -> None:
    """With a model and data of one's own; the instructions and the paper's tables are the package's."""
    tiny_model("llama", True).save_pretrained(tmp_path / "model")
    family_tokenizer("llama").save_pretrained(tmp_path / "model")
    row = {"query": "who wrote it", "positive": "she wrote it", "negative": "nobody did"}
    write_jsonl(tmp_path / "data/nq.jsonl", [row] * 8)
    keys = {
        "model_name_or_path": "model",
        "output_dir": "out",
        "dataset_name": "E5",
        "dataset_file_path": "data",
        "sources": ["nq"],
        "alpha": 0.2,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    write_jsonl(tmp_path / "sets/MySet/corpus.jsonl", [{"_id": "a", "text": "she wrote it"}])
    write_jsonl(tmp_path / "sets/MySet/queries.jsonl", [{"_id": "q", "text": "who wrote it"}])
    write_jsonl(tmp_path / "sets/MySet/qrels/test.jsonl", [{"query-id": "q", "corpus-id": "a", "score": 1}])
    evaluation = ["--model", "model", "--local_data_dir", "sets", "--tasks", "MySet"]
    commands = [
        ["check-data", "data", "--sources", "nq"],
        ["plan", "config.json"],
        ["stage-1", "config.json"],
        ["export", "out", "exported"],
        ["eval", *evaluation, "--dry_run"],
        ["eval", *evaluation, "--device", "cpu"],
        ["report", "results", "--names", "anchor", "--paper_model", "LLaMA-3.2-1B-Instruct"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    file, (_, plan, _, export, dry_run, scores, report) = json.loads(done.stdout)
    assert Path(file).is_relative_to(site)
    assert "nq   " in done.stderr and (tmp_path / "data/hashes.json").is_file()
    assert "template llama3" in plan
    assert "gives the checkpoint's vectors" in export and (tmp_path / "exported/modules.json").is_file()
    assert "MySet" in dry_run and "MySet" in scores
    assert "MySet" in report and (tmp_path / "output/report/report.html").is_file()


@pytest.mark.slow
def test_its_ten_lines_of_training_run(site: Path, tmp_path: Path) -> None:
    """Those of docs/guides/python.md, over a model of one's own."""
    page = (ROOT / "docs/guides/python.md").read_text(encoding="utf-8")
    lines = page.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 10
    for part in (tiny_model("llama", True), family_tokenizer("llama")):
        part.save_pretrained(tmp_path / "output/quickstart/stage_I")
    lines += f"import llm2vec; assert llm2vec.__file__.startswith({str(site)!r})"
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "tensor([[" in done.stdout and (tmp_path / "output/python/adapter_model.safetensors").is_file()
