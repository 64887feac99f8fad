"""Which model: one spelling on every command line, and nothing loaded before a model is opened."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from llm2vec.choice import ModelChoice, add_model_flags, chosen_model
from llm2vec.types import UserError


def chosen(*words: str, positional: bool = False, required: bool = True) -> ModelChoice:
    """What a command line of these words names."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_model_flags(parser, positional=positional, required=required, torch_dtype=True)
    if positional:
        parser.add_argument("out")
    return chosen_model(parser.parse_args([*words]))


def test_a_model_is_named_in_one_way_on_every_command_line() -> None:
    """By our flags, by the release's, and as an argument with its adapters behind it."""
    expected = ModelChoice("base", ("inner", "outer"), "bfloat16")
    dtype = ["--torch_dtype", "bfloat16"]
    assert chosen("--model", "base", "--peft", "inner", "outer", *dtype) == expected
    released = ["--base_model_name_or_path", "base", "--peft_model_name_or_path", "inner", "outer"]
    assert chosen(*released, *dtype) == expected
    for words in (
        ["base+inner+outer", "OUT"],
        ["base+inner", "OUT", "--peft", "outer"],
        ["base", "OUT", "--peft", "inner", "outer"],
        ["--model", "base", "OUT", "--peft", "inner", "outer"],
        ["--peft", "inner", "outer", "--model", "base", "OUT"],
        ["OUT", *released],
    ):
        assert chosen(*words, *dtype, positional=True) == expected, words
    assert chosen("--model", "base") == ModelChoice("base", (), "float32")


def test_a_choice_reads_back_from_one_word(tmp_path: Path) -> None:
    folder = tmp_path / "a+b"
    assert ModelChoice.parse(str(folder)).adapters == ("b",)
    folder.mkdir()
    assert ModelChoice.parse(str(folder)) == ModelChoice(str(folder)), "a folder may have a plus in its name"
    choice = ModelChoice("base", ("inner", "outer"))
    assert choice.place == "base+inner+outer" and ModelChoice.parse(choice.place) == choice


def test_no_model_or_two_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chosen()
    assert "--model/--base_model_name_or_path" in capsys.readouterr().err
    with pytest.raises(UserError, match="give a model: MODEL, or --model MODEL"):
        chosen("OUT", positional=True)
    with pytest.raises(UserError, match="give MODEL or --model, not both"):
        chosen("base", "OUT", "--model", "base", positional=True)


def test_a_command_line_is_read_without_torch() -> None:
    code = "import sys, llm2vec.choice; print(*{'torch', 'transformers', 'peft'} & {*sys.modules})"
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not read.stdout.strip()
