"""The scripts as people start them: stage to stage at a folder, and one sentence for what is wrong.

Few real processes, because each costs seconds; the other runs execute the script file inside this one.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file
from torch import Tensor

import llm2vec
from llm2vec import LLM2Vec
from llm2vec.__main__ import COMMANDS, help_text, start
from llm2vec.cli import QUIET, parser, positive, positive_float
from llm2vec.model.chain import INCOMPLETE_MARKER, RUN_FILE, open_chain
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings
from llm2vec.training.config import Config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.model import open_tokenizer
from llm2vec.types import UserError

ROOT = Path(__file__).parents[1]


def script(stage: str) -> str:
    return str(ROOT / f"experiments/run_{stage}.py")


def make_base(folder: Path) -> None:
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(folder)
    family_tokenizer("llama").save_pretrained(folder)


def make_data(folder: Path, num_rows: int = 24) -> None:
    """The layout of the released archive, of which two sources are there."""
    rows = reference.examples(num_rows, 1)
    for source in ("nq", "quora_duplicates"):
        write_jsonl(
            folder / f"{source}.jsonl",
            [{"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text} for r in rows],
        )


def config(folder: Path, **keys: Any) -> dict[str, Any]:
    """Keys of a run of three steps over base and data in `folder`."""
    return {
        "model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "dataset_name": "E5",
        "dataset_file_path": str(folder / "data"),
        "sources": ["nq", "quora_duplicates"],
        "max_seq_length": 192,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | keys


def write_config(file: Path, keys: dict[str, Any]) -> str:
    file.write_text(json.dumps(keys), encoding="utf-8")
    return str(file)


def run_here(stage: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script in this process, with its one argument."""
    monkeypatch.setattr(sys, "argv", [script(stage), file])
    runpy.run_path(script(stage), run_name="__main__")


def encode(base: Path, adapter: Path | None = None) -> Tensor:
    model = LLM2Vec.from_pretrained(str(base), adapter and str(adapter))
    vectors = model.encode([["find it", "who wrote it"], "hello world"], show_progress_bar=False, device="cpu")
    assert isinstance(vectors, Tensor)
    return vectors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    make_data(tmp_path / "data")
    return tmp_path


# --- what works ---


def test_stage_I_then_stage_II_then_encode(folder: Path) -> None:
    """Two processes that meet at a folder, and the two folders together as an embedder."""
    stages = {
        "stage_I": config(folder, output_dir=str(folder / "I"), alpha=0.2),
        "stage_II": config(folder, output_dir=str(folder / "II"), model_name_or_path=str(folder / "I"), lora_r=4),
    }
    for stage, keys in stages.items():
        file = write_config(folder / f"{stage}.json", keys)
        finished = subprocess.run(
            [sys.executable, script(stage), file], capture_output=True, text=True, timeout=300, cwd=folder
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        output = Path(keys["output_dir"])
        assert {SETTINGS_FILE, RUN_FILE, LOG_FILE, "tokenizer.json"} <= {file.name for file in output.iterdir()}
        steps = [json.loads(line) for line in (output / LOG_FILE).read_text(encoding="utf-8").splitlines()]
        assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2, 3]
        for said in ("3 of a schedule over 3", "48 rows of 2 source(s)", "template llama3"):
            assert said in finished.stderr
    run = json.loads((folder / "II" / RUN_FILE).read_text(encoding="utf-8"))
    assert run["parent"]["model_name_or_path"] == str(folder / "I")
    assert run["config"]["loss_scale"] == 20
    assert [source["rows"] for source in run["data"]] == [24, 24]
    assert all(len(source["sha256"]) == 64 for source in run["data"])
    base, first, both = encode(folder / "base"), encode(folder / "I"), encode(folder / "I", folder / "II")
    assert (first - base).abs().max() > 1e-4
    assert (both - first).abs().max() > 1e-5
    assert torch.equal(encode(folder / "II"), both)


def test_plain_language_modelling_makes_a_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls, and the folder serves as the base of Stage I."""
    keys = config(folder, output_dir=str(folder / "lm"), max_steps=20, learning_rate=1e-2)
    run_here("lm", write_config(folder / "lm.json", keys), monkeypatch)
    log = [json.loads(line) for line in (folder / "lm" / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    losses = [entry["loss_lm"] for entry in log if "loss_lm" in entry]
    assert losses[-1] < 0.8 * losses[0]
    keys = config(folder, model_name_or_path=str(folder / "lm"))
    run_here("stage_I", write_config(folder / "I.json", keys), monkeypatch)
    assert (encode(folder / "out") - encode(folder / "lm")).abs().max() > 1e-4


def test_flash_attention_without_a_gpu_is_said_and_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The released configs ask for it everywhere; a laptop runs them all the same, to the same weights."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, implementation in (("flash", "flash_attention_2"), ("sdpa", "sdpa")):
        caplog.clear()
        keys = config(folder, output_dir=str(folder / name), attn_implementation=implementation, max_steps=1)
        run_here("stage_I", write_config(folder / f"{name}.json", keys), monkeypatch)
        said = [r for r in caplog.records if r.levelno >= logging.WARNING and "flash_attention_2" in r.getMessage()]
        assert ["using sdpa" in record.getMessage() for record in said] == [True] * (name == "flash")
    flash, sdpa = (load_file(folder / name / "model.safetensors") for name in ("flash", "sdpa"))
    assert all(torch.equal(flash[name], tensor) for name, tensor in sdpa.items())


# --- what does not ---


def assert_one_sentence(stderr: str, *words: str) -> None:
    """The last line is `error: ...`, alone of its kind, with all the words; no traceback."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: "), stderr
    assert sum("error: " in line for line in lines) == 1, stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in lines[-1], f"{word!r} is not in {lines[-1]!r}"


def test_an_error_as_a_process(folder: Path) -> None:
    """Exit code 2 and the sentence, on stderr."""
    file = write_config(folder / "run.json", config(folder, alhpa=0.3))
    finished = subprocess.run(
        [sys.executable, script("stage_I"), file], capture_output=True, text=True, timeout=300, cwd=folder
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert_one_sentence(finished.stderr, file, "unknown key 'alhpa'", "did you mean 'alpha'?")
    assert not (folder / "out").exists()


def break_line(folder: Path) -> None:
    file = folder / "data/nq.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[6] = '{"query": "who wrote it"}'
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def cut_base(folder: Path) -> None:
    file = folder / "base/model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def mark_base(folder: Path) -> None:
    (folder / "base" / INCOMPLETE_MARKER).touch()


def drop_source(folder: Path) -> None:
    (folder / "data/quora_duplicates.jsonl").unlink()


@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
@pytest.mark.parametrize(
    ("keys", "damage", "words"),
    [
        ({"learning_rat": 1}, None, ["unknown key 'learning_rat'", "did you mean 'learning_rate'?"]),
        ({"pooling_mode": "middle"}, None, ["pooling_mode is 'middle'", "allowed: ", "weighted_mean"]),
        ({"dataset_file_path": "/nowhere/data"}, None, ["dataset_file_path", "/nowhere/data", "nq.jsonl"]),
        ({}, drop_source, ["dataset_file_path", "quora_duplicates.jsonl"]),
        ({}, break_line, ["nq.jsonl, line 7", "`positive` is missing"]),
        ({"sources": ["nq", "squat"]}, None, ["sources: 'squat' is not known", "squad"]),
        ({"per_device_train_batch_size": 25}, None, ["'nq' has 24 rows", "25"]),
        ({"total_batch_size": 6}, None, ["total_batch_size is 6", "no multiple of the 4 rows"]),
        ({"model_name_or_path": "/nowhere/base"}, None, ["/nowhere/base", "folder"]),
        ({"model_name_or_path": "nobody/nothing-at-all"}, None, ["nobody/nothing-at-all"]),
        ({}, cut_base, ["model_name_or_path", "could not be loaded"]),
        ({}, mark_base, ["cut short while it was written"]),
        ({"template": "mistral_v9"}, None, ["template is 'mistral_v9'", "allowed: llama3"]),
        ({"max_seq_length": 8}, None, ["max_length is 8", "template and the instruction"]),
        ({"peft_model_name_or_path": "/nowhere/adapter"}, None, ["/nowhere/adapter", "folder"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else next(iter(value), "") if isinstance(value, dict) else "",
)
def test_an_error_is_one_sentence_and_leaves_no_folder(
    stage: str,
    keys: dict[str, Any],
    damage: Any,
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if damage is not None:
        damage(folder)
    file = write_config(folder / "run.json", config(folder, **keys))
    with pytest.raises(SystemExit) as stopped:
        run_here(stage, file, monkeypatch)
    assert stopped.value.code == 2
    assert_one_sentence(capfd.readouterr().err, *words)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"adam_beta1": 2}, ["training arguments", "Invalid beta parameter"]),
        ({"lr_scheduler_kwargs": {"foo": 1}}, ["training arguments", "'foo'"]),
        ({"dataloader_num_workers": -1}, ["training arguments", "num_workers"]),
        ({"save_strategy": "best"}, ["training arguments", "metric_for_best_model"]),
        (
            {"eval_strategy": "steps", "eval_steps": 1, "num_eval_rows": 4, "save_strategy": "best",
             "metric_for_best_model": "foo"},
            ["metric_for_best_model is 'foo'", "it measures eval_loss, "],
        ),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_the_library_refuses_late_is_one_sentence(
    keys: dict[str, Any],
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Where it makes something of the training arguments, not where it reads them."""
    with pytest.raises(SystemExit) as stopped:
        run_here("stage_II", write_config(folder / "run.json", config(folder, **keys)), monkeypatch)
    assert stopped.value.code == 2
    assert_one_sentence(capfd.readouterr().err, *words)


@pytest.mark.parametrize("place", ["base/config.json", "base/config.json/out", "/proc/out"])
def test_an_output_folder_that_cannot_be_is_found_before_the_training(
    place: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = config(folder, output_dir=str(folder / place), model_name_or_path="/nowhere/base")  # not even looked for
    with pytest.raises(SystemExit) as stopped:
        run_here("stage_II", write_config(folder / "run.json", keys), monkeypatch)
    assert stopped.value.code == 2
    assert_one_sentence(capfd.readouterr().err, f"output_dir: {folder / place} cannot be written to (")


@pytest.mark.parametrize("arguments", [[], ["a.json", "b.json"], ["missing.json"]], ids=str)
def test_a_wrong_call_is_one_sentence(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script("stage_I"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script("stage_I"), run_name="__main__")
    assert stopped.value.code == 2
    word = "missing.json: cannot be read" if arguments == ["missing.json"] else "usage: torchrun"
    assert_one_sentence(capfd.readouterr().err, word)


# --- the commands ---

# Prints for each command its help and what heavy library that has loaded; the CPU seconds of it all; and whether what
# reads files loads torch.
HELP = """
import contextlib, io, json, resource, sys
from llm2vec.__main__ import COMMANDS, main

found = {}
for name in ("", *COMMANDS):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([name, "--help"] if name else ["--help"])
    loaded = [heavy for heavy in ("torch", "transformers", "datasets", "mteb", "matplotlib") if heavy in sys.modules]
    found[name] = [said.getvalue(), loaded]
used = resource.getrusage(resource.RUSAGE_SELF)
import llm2vec.data.check, llm2vec.reports.evaluation
print(json.dumps([found, used.ru_utime + used.ru_stime, "torch" in sys.modules]))
"""


def test_help_of_every_command_is_there_at_once(tmp_path: Path) -> None:
    """Nothing heavy is loaded for it, so all of it together takes less than a second of CPU; three are allowed."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    found, seconds, loads_torch = json.loads(done.stdout)
    assert seconds < 3
    assert not loads_torch, "check-data and report read files"
    overview, _ = found.pop("")
    for name, (said, loaded) in found.items():
        assert not loaded, f"llm2vec {name} --help loads {loaded}"
        module, function = import_module(f"llm2vec.commands.{COMMANDS[name].module}"), COMMANDS[name].function
        doc = module.__doc__ if function == "main" else inspect.getdoc(getattr(module, function))
        assert said.startswith(f"usage: llm2vec {name}") and doc and doc.splitlines()[0] in said
        assert f"    {name} " in overview and COMMANDS[name].line in overview


def test_every_module_of_commands_is_a_command() -> None:
    folder = ROOT / "llm2vec/commands"
    files = [file.relative_to(folder).with_suffix("") for file in folder.rglob("*.py") if file.stem != "__init__"]
    modules = {".".join(file.parts) for file in files}
    assert modules == {command.module for command in COMMANDS.values()}


@pytest.mark.parametrize(("name", "said"), [("chek-data", "did you mean 'check-data'? "), ("xyz", "")])
def test_an_unknown_command_is_one_sentence(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["llm2vec", name])
    with pytest.raises(SystemExit) as stopped:
        start()
    assert stopped.value.code == 2
    assert_one_sentence(capfd.readouterr().err, f"there is no command '{name}'; {said}llm2vec --help lists them.")


def test_the_commands_are_listed_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["llm2vec", *words])
        start()
        assert capfd.readouterr().out == help_text() + "\n"
    monkeypatch.setattr(sys, "argv", ["llm2vec", "--version"])
    start()
    assert capfd.readouterr().out == f"llm2vec {llm2vec.__version__}\n"


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (positive, "0", "is 0; give a number above 0."),
        (positive, "1.5", "is '1.5'; give a whole number above 0."),
        (positive_float, "inf", "is inf; give a number above 0."),
        (positive_float, "-2", "is -2; give a number above 0."),
        (positive_float, "much", "is 'much'; give a number above 0."),
    ],
)
def test_a_number_that_is_none_is_told_with_its_flag(read: Callable[[str], float], text: str, said: str) -> None:
    flags = parser("plan", "What a run will be.")
    flags.add_argument("--card_memory_gb", type=read)
    with pytest.raises(UserError, match=f"^{re.escape(f'--card_memory_gb {said}')}$"):
        flags.parse_args(["--card_memory_gb", text])
    assert flags.parse_args(["--card_memory_gb", "3"]).card_memory_gb == 3


def test_a_wrong_flag_is_one_sentence() -> None:
    """Without the list of all flags, and no beginning of a flag is taken for it."""
    flags = parser("plan", "What a run will be.")
    flags.add_argument("--utilisation", type=float)
    with pytest.raises(UserError, match=r"^--utilisation: invalid float value: 'a'; see llm2vec plan --help\.$"):
        flags.parse_args(["--utilisation", "a"])
    with pytest.raises(UserError, match=r"^unrecognized arguments: --util 1; see llm2vec plan --help\.$"):
        flags.parse_args(["--util", "1"])


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.py")), ids=lambda file: file.stem)
def test_help_says_what_a_script_is_for(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its header, and nothing is begun."""
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    monkeypatch.syspath_prepend(str(file.parent))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(file), run_name="__main__")
    assert stopped.value.code == 0
    said = capfd.readouterr().out
    assert said.strip() and not said.startswith("None")


def test_a_checkpoint_cut_short_is_not_trained_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stage II from a Stage I folder that lost its end on the way."""
    keys = config(folder, output_dir=str(folder / "I"), max_steps=1)
    run_here("stage_I", write_config(folder / "I.json", keys), monkeypatch)
    weights = folder / "I/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        keys = config(folder, model_name_or_path=str(folder / "I"))
        run_here("stage_II", write_config(folder / "II.json", keys), monkeypatch)
    assert stopped.value.code == 2
    size = weights.stat().st_size
    assert_one_sentence(
        capfd.readouterr().err, str(folder / "I"), f"model.safetensors is {size} bytes long instead of {size + 100}"
    )
    assert not (folder / "out").exists()


def test_another_template_than_the_parents_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = config(folder, output_dir=str(folder / "I"), max_steps=1)
    run_here("stage_I", write_config(folder / "I.json", keys), monkeypatch)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        keys = config(folder, model_name_or_path=str(folder / "I"), template="plain")
        run_here("stage_II", write_config(folder / "II.json", keys), monkeypatch)
    assert stopped.value.code == 2
    assert_one_sentence(capfd.readouterr().err, "template is 'plain'", "was trained with 'llama3'")


@pytest.mark.parametrize(
    ("template", "join", "said"), [("llama3", ": ", 1), ("llama3", "; ", 0), ("e5_mistral", " ", 0)]
)
def test_another_join_than_the_parents_is_said(
    tmp_path: Path, template: str, join: str, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the template leaves it open."""
    settings = EncoderSettings("last", 64, template=template, instruction_join="; ", attention="causal")
    save_checkpoint(tmp_path, tiny_model("llama"), family_tokenizer("llama"), settings)
    open_tokenizer(Config(str(tmp_path), instruction_join=join), open_chain(str(tmp_path)))
    assert caplog.text.count(f"instruction_join is '{join}', but {tmp_path} was trained with '; '") == said


BARS = """
import os, llm2vec
before = dict(os.environ)
import llm2vec.__main__
assert dict(os.environ) == before, "in library use nothing is switched off"
llm2vec.__main__.run_command(lambda _: None)
from datasets import are_progress_bars_disabled as of_datasets
from huggingface_hub.utils import are_progress_bars_disabled as of_hub
from tqdm.auto import tqdm
from transformers.utils import logging
print(of_datasets(), of_hub(), not logging.is_progress_bar_enabled(), not tqdm([]).leave)
"""


@pytest.mark.slow  # imports
@pytest.mark.parametrize(("verbose", "off"), [("0", True), ("1", False)])
def test_bars_of_other_libraries_are_off_in_commands(verbose: str, off: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in QUIET} | {
        "LLM2VEC_VERBOSE": verbose
    }
    done = subprocess.run([sys.executable, "-c", BARS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(off)] * 4, done.stderr
