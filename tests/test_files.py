"""What a user's words, a file of our own and a library's error become: a path, a shape, one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import family_tokenizer, tiny_model
from safetensors.torch import save_file

from llm2vec import LLM2Vec
from llm2vec.files import alone_in, as_path, checked, file_error, is_locked, read_object
from llm2vec.types import UserError, in_one_sentence, needs_extra


@pytest.mark.parametrize(
    ("content", "shape", "said"),
    [
        (3, str, "it is 3; a string is needed"),
        (True, int, "it is True; a whole number is needed"),
        (None, (int, str), "it is None; a whole number or a string is needed"),
        ({"a": 1}, {"b": int}, "b is missing"),
        ({"a": {"b": [1, "x"]}}, {"a": {"b": [float]}}, r"a.b[1] is 'x'; a number is needed"),
        ({"a": {"x": 1}}, {"a": {str: str}}, "a.x is 1; a string is needed"),
        ({"a": []}, {"a?": (dict, None)}, "a is []; an object or null is needed"),
        ("x" * 500, int, "..."),
    ],
)
def test_what_does_not_fit_is_named(content: Any, shape: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        checked(content, shape, "file.json")
    assert str(error.value).startswith("file.json: ") and said in str(error.value) and len(str(error.value)) < 150


def test_an_error_of_a_library_is_one_sentence() -> None:
    """Its first line goes into it; a sentence of ours stays as it is, and an error of another type is none."""
    with pytest.raises(UserError, match=r"^file: cut short\.$"), in_one_sentence(lambda why: f"file: {why}."):
        raise RuntimeError("cut short\nat byte 3")
    with pytest.raises(UserError, match=r"^ours$"), in_one_sentence(lambda why: f"file: {why}."):
        raise UserError("ours")
    with (
        pytest.raises(UserError, match=r"^No such file or directory\.$"),
        in_one_sentence(lambda why: f"{why}.", OSError),
    ):
        Path("/no/such/file").read_bytes()
    with pytest.raises(KeyError), in_one_sentence(lambda why: f"file: {why}.", (OSError, ValueError)):
        raise KeyError
    with (
        pytest.raises(UserError, match=r'^This needs x: pip install -e "\.\[eval\]"\.$'),
        needs_extra("This needs x", "eval"),
    ):
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401


@pytest.mark.parametrize(
    ("content", "shape"),
    [
        (1, float), (None, (int, None)), ({}, {"a?": int}), ({"a": 1, "z": []}, {"a": int}), ([], [int]),
        ({"a": None}, {str: object}), (2.5, object),
    ],
)  # fmt: skip
def test_what_fits_is_handed_on(content: Any, shape: Any) -> None:
    assert checked(content, shape, "file.json") is content


@pytest.mark.parametrize("text", ["x" * 300, "a/" * 3000, "nul\x00", "half \ud800", "loop"])
def test_what_can_be_no_path_is_one_sentence(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"run\.json: output_dir is .*; no file can have that name \(.*\)\.$"):
        as_path(text, "run.json: output_dir")
    assert as_path("not there", "x") == Path("not there")


def test_a_device_is_not_read_to_its_end() -> None:
    with pytest.raises(UserError, match=r"/dev/zero: cannot be read \(it is a device\)"):
        read_object(Path("/dev/zero"))


def test_what_libraries_say_of_a_full_disk() -> None:
    """As each of them says it of /dev/full, or of a folder that is not there; other errors are none of a file."""
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left") as python:  # noqa: SIM117
        with full.open("w", buffering=1) as out:
            out.write("x\n")
    with pytest.raises(Exception, match="os error") as tokenizers:
        family_tokenizer("llama3").backend_tokenizer.save("/nowhere/at/all")
    with pytest.raises(Exception, match="os error") as safetensors:
        save_file({"x": torch.zeros(3)}, "/nowhere/at/all")
    with pytest.raises(RuntimeError) as pytorch:
        torch.save(torch.zeros(10_000), full)
    for error in (python, tokenizers, safetensors, pytorch):
        said = file_error(error.value)
        assert said is not None and said.endswith(".") and "\n" not in said, error.value
    for other in (ValueError("x"), RuntimeError("CUDA out of memory"), Exception("something else")):
        assert file_error(other) is None


def test_a_lock_goes_with_what_it_is_in(tmp_path: Path) -> None:
    """Nothing is left of a folder that nobody wrote to; what was there stays."""
    with alone_in(tmp_path / "new/below", "work"):
        assert is_locked(tmp_path / "new/below/.lock")
    assert not (tmp_path / "new/below").exists()
    (tmp_path / "file").touch()
    with alone_in(tmp_path, "work"):
        pass
    assert [path.name for path in tmp_path.iterdir() if path.name != "new"] == ["file"]


PROGRAM = """
import sys
from llm2vec.cli import run_command
def main(argv):
    for _ in range(20_000):
        print("hélló")
    if argv:
        open(argv[0])
run_command(main)
"""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_that_is_closed_or_knows_ascii_alone(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    started = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    whole = subprocess.run([sys.executable, "-c", PROGRAM], **started, check=False)
    assert whole.returncode == 0 and whole.stderr == b""
    assert whole.stdout.splitlines()[0] == (b"h\\xe9ll\\xf3" if encoding == "ascii" else "hélló".encode())
    cut = subprocess.Popen([sys.executable, "-c", PROGRAM], **started)
    assert cut.stdout is not None and cut.stderr is not None
    cut.stdout.readline()
    cut.stdout.close()
    assert cut.wait() == 141 and cut.stderr.read() == b""
    cut.stderr.close()
    missing = subprocess.run([sys.executable, "-c", PROGRAM, "no such file"], **started, check=False)
    assert missing.returncode == 2 and missing.stderr == b"error: no such file: No such file or directory.\n"


@pytest.fixture(scope="module")
def model() -> LLM2Vec:
    return LLM2Vec(tiny_model("llama"), family_tokenizer("llama"), template="llama3", attention="causal")


@pytest.mark.parametrize(
    "given",
    [
        {"sentences": None}, {"sentences": 1}, {"sentences": b"x"}, {"sentences": {"a": "b"}},
        {"sentences": ["x", None]}, {"sentences": np.array(3)}, {"sentences": np.array([1])},
        {"batch_size": 1.5}, {"batch_size": None}, {"batch_size": "3"}, {"batch_size": True}, {"truncate_dim": "4"},
        {"truncate_dim": 4.0}, {"device": "evil"}, {"device": "meta"}, {"device": "cuda:99"}, {"device": -1},
        {"side": []},
    ],
    ids=str,
)  # fmt: skip
def test_what_encode_does_not_take_is_one_sentence(given: dict[str, Any], model: LLM2Vec) -> None:
    with pytest.raises(UserError) as error:
        model.encode(**{"sentences": ["hello"], "show_progress_bar": False, **given})
    assert "\n" not in str(error.value)
