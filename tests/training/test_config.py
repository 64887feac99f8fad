"""Configs: every shipped one is read, the released ones run unchanged, and a mistake is named before anything loads."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers
from transformers import TrainingArguments

from llm2vec.commands.schema import config_schema, meanings_of, schema_text
from llm2vec.data.sources import read_sources_file
from llm2vec.model.backbone import LORA_MODULES
from llm2vec.text.templates import TEMPLATES, template_named
from llm2vec.training.config import KEYS, LIBRARY_KEYS, LORA_STAGES, Config
from llm2vec.training.config import arguments as config_module
from llm2vec.training.config.arguments import training_arguments
from llm2vec.training.config.file import REPLACED, WITHOUT_EFFECT, checked_config, load_config
from llm2vec.types import POOLING_ALIASES, AttnImplementation, Stage, UserError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "train_configs"
SCHEMA = CONFIGS / "config.schema.json"
#: Of the installed version; older and newer ones know others.
ARGUMENTS = {field.name for field in dataclasses.fields(TrainingArguments)}
#: Those of the comparison are parts of configs; tests/compare/test_shipped_sets.py puts them together.
SHIPPED = sorted(
    path
    for path in CONFIGS.rglob("*.json")
    if path.name not in ("sources.json", SCHEMA.name) and CONFIGS / "comparison" not in path.parents
)
SOURCE_TABLES = sorted(CONFIGS.rglob("sources.json"))
PAPER = [path for path in SHIPPED if path.parent.name in ("stage_I", "stage_II", "baseline")]

#: A config of the paper's release, word for word.
RELEASED = """{
"model_name_or_path": "x", "bidirectional": false, "pooling_mode": "eos_token", "dataset_name": "E5",
"dataset_file_path": "cache/echo-data", "remove_unused_columns": false, "learning_rate": 4e-5, "num_train_epochs": 3,
"warmup_steps": 300, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 32,
"gradient_accumulation_steps": 2, "do_train": true, "disable_tqdm": false, "max_seq_length": 512,
"overwrite_output_dir": true, "output_dir": "output/x", "logging_steps": 1, "save_steps": 1000,
"save_only_model": true, "gradient_checkpointing": true, "torch_dtype": "bfloat16",
"attn_implementation": "flash_attention_2", "seed": 42
}"""


def stage_of(path: Path) -> Stage:
    """Which script a shipped config is for, by its folder or the end of its name."""
    exact: dict[str, Stage] = {
        "stage_I": "stage_I",
        "stage_II": "stage_II",
        "baseline": "stage_II",
        "control": "stage_II",
        "control_lm": "lm",
        "pretrain": "lm",
        "mntp": "mntp",
        "simcse": "simcse",
        "supervised": "stage_II",
    }
    endings: dict[str, Stage] = {
        "_stage_I": "stage_I",
        "_q2d_d2q": "stage_I",
        "_stage_II": "stage_II",
        "_stage2": "stage_II",
        "_lm": "lm",
    }
    for name in (path.parent.name, path.stem):
        if name in exact:
            return exact[name]
    for ending, stage in endings.items():
        if path.stem.endswith(ending):
            return stage
    raise AssertionError(f"{path}: neither folder nor name says which stage this config is for")


def write(folder: Path, content: dict[str, Any] | str, **changes: Any) -> Path:
    """A config file; `changes` go over `content`, and None takes a key out."""
    if not isinstance(content, str):
        content = json.dumps({key: value for key, value in (content | changes).items() if value is not None})
    path = folder / "config.json"
    path.write_text(content, encoding="utf-8")
    return path


def minimal(folder: Path) -> dict[str, Any]:
    """The keys that every config must have."""
    return {
        "model_name_or_path": "x",
        "output_dir": str(folder / "output"),
        "dataset_file_path": str(folder / "data"),
    }


def error_of(path: Path, stage: Stage = "stage_II") -> str:
    """What load_config says against a file; nothing but that file may be there before or after."""
    with pytest.raises(UserError) as error:
        load_config(path, stage)
    assert [file.name for file in path.parent.iterdir()] in ([path.name], [])
    message = str(error.value)
    assert message.startswith(f"{path}: "), "the file is named first"
    assert "\n" not in message, "one sentence"
    return message


# Shipped configs


def test_there_are_configs_of_every_kind() -> None:
    """The parametrised tests below run on something."""
    assert {stage_of(path) for path in SHIPPED} == set(get_args(Stage))
    assert len(PAPER) == 15
    assert SOURCE_TABLES


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_config_is_read(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without an error, a warning, or a file name that points nowhere."""
    config = load_config(path, stage_of(path))
    assert not caplog.records
    assert config.template is None or template_named(config.template)
    assert config.sources_file is None or ROOT / config.sources_file in SOURCE_TABLES
    assert config.use_peft is (stage_of(path) in LORA_STAGES or config.trainable != "full")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_config_is_read_from_python_as_from_its_file(path: Path) -> None:
    config = load_config(path, stage_of(path))
    assert checked_config(config) == config
    unfilled = dataclasses.replace(config, use_peft=None)
    assert checked_config(unfilled) == config


@pytest.mark.parametrize("path", SOURCE_TABLES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_sources_file_is_read(path: Path) -> None:
    assert read_sources_file(path)


def test_no_two_shipped_configs_write_to_one_folder() -> None:
    """Or the second run would overwrite the first."""
    folders = [load_config(path, stage_of(path)).output_dir for path in SHIPPED]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_the_papers_configs_hold_the_papers_numbers(path: Path) -> None:
    """Every hyperparameter that the paper states, in every config of its five models."""
    stage = stage_of(path)
    config = load_config(path, stage)
    training = config.training
    assert training["learning_rate"] == (4e-5 if stage == "stage_I" else 2e-4)
    assert config.stop_after_n_steps == (2000 if stage == "stage_I" else 1000)
    assert config.total_batch_size == 512
    assert "per_device_train_batch_size" not in training and config.tokens_per_microbatch >= 2048
    assert training["warmup_steps"] == 300
    assert config.max_seq_length == 512
    assert not config.bidirectional
    assert POOLING_ALIASES[config.pooling_mode] == "last"
    assert config.dataset_name == "E5" and config.sources is None and config.max_train_samples is None
    assert config.checkpointing is None
    if stage == "stage_I":
        assert config.alpha == 0.2
    else:
        assert config.loss_scale == 1 / 0.05
        assert config.lora_r == 16
        assert config.num_hard_negatives == 1


# Keys and their schema


def test_every_key_says_what_it_means() -> None:
    """Below its field; and what is known of transformers' keys is of keys that there are."""
    assert meanings_of(Config).keys() == {field.name for field in dataclasses.fields(Config)}
    later = {"activation_checkpointing", "activation_checkpointing_kwargs", "enable_jit_checkpoint"}
    assert LIBRARY_KEYS.keys() <= ARGUMENTS | later


@pytest.mark.skipif(
    f"transformers=={transformers.__version__}\n" not in (ROOT / "constraints.txt").read_text(encoding="utf-8"),
    reason="another transformers knows other keys",
)
def test_the_schema_is_that_of_the_keys() -> None:
    """After a change: `llm2vec schema > train_configs/config.schema.json`."""
    assert schema_text(config_schema()) == SCHEMA.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_config_names_the_schema(path: Path) -> None:
    named = json.loads(path.read_text(encoding="utf-8"))["$schema"]
    assert (path.parent / named).resolve() == SCHEMA.resolve()


def test_shipped_configs_fit_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    configs = {path: json.loads(path.read_text(encoding="utf-8")) for path in SHIPPED}
    assert configs
    assert not {str(path): error.message for path, config in configs.items() for error in validator.iter_errors(config)}


def test_what_the_loader_refuses_the_schema_refuses() -> None:
    """By type, range, choice, name and want."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    good = {"model_name_or_path": "x", "output_dir": "y"}
    jsonschema.validate(good | {"alpha": 1, "template": None, "overwrite_output_dir": True}, schema)
    wrong: list[dict[str, Any]] = [
        {"alpha": "0.2"}, {"alpha": 1.5}, {"loss_scale": 0}, {"template": "x"}, {"objective": None}, {"alhpa": 0.2},
        {"sources": [1]}, {"seed": -1}, {"data_seed": 1}, {"log_level": "loud"},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | change, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"output_dir": "y"}, schema)


def test_what_names_the_schema_is_no_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is read by editors alone, and no record holds it."""
    plain = load_config(write(tmp_path, minimal(tmp_path)), "stage_I")
    named = load_config(write(tmp_path, minimal(tmp_path), **{"$schema": "../config.schema.json"}), "stage_I")
    assert named == plain and "$schema" not in dataclasses.asdict(named) and not caplog.records


def test_help_on_the_schema_loads_no_torch() -> None:
    code = "import sys; from llm2vec.__main__ import main\n"
    code += "try: main(['schema', '--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "train_configs/config.schema.json" in said and said.endswith("False\n")


# Released configs


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run arguments on every machine."""
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
def test_released_config_runs_unchanged(
    tmp_path: Path, stage: Stage, caplog: pytest.LogCaptureFixture, no_tensorboard: None
) -> None:
    """Each key arrives with its value; the one that the libraries dropped is named once."""
    text = RELEASED if stage == "stage_I" else RELEASED[:-2] + ', "stop_after_n_steps": 200, "lora_r": 16}'
    config = load_config(write(tmp_path, text), stage)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'config.json'}: overwrite_output_dir: there is no such option any more; it has no effect; "
        "to train anew, remove output_dir or name another."
    ]
    expected = Config(
        model_name_or_path="x",
        pooling_mode="eos_token",
        dataset_file_path="cache/echo-data",
        torch_dtype="bfloat16",
        attn_implementation="flash_attention_2",
        use_peft=stage == "stage_II",
        stop_after_n_steps=200 if stage == "stage_II" else None,
        lora_r=16,
        training=config.training,
    )
    assert config == expected
    assert config.checkpointing == {"use_reentrant": False}
    args = training_arguments(config)
    assert args.learning_rate == 4e-5
    assert args.num_train_epochs == 3
    assert args.get_warmup_steps(8790) == 300
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (32, 2)
    assert (args.logging_steps, args.save_steps, args.save_only_model, args.seed) == (1, 1000, True, 42)
    assert args.output_dir == "output/x"
    assert not args.bf16, "pure bfloat16, as in the release"


@pytest.mark.parametrize("key", [key for key in WITHOUT_EFFECT if key not in ARGUMENTS])
def test_a_key_without_effect_is_accepted_and_said(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(write(tmp_path, minimal(tmp_path), **{key: "anything"}), "stage_I")
    assert key not in config.training
    assert f": {key}: " in caplog.text and "no effect" in caplog.text


@pytest.mark.parametrize("key", [key for key in REPLACED if key not in ARGUMENTS])
def test_a_replaced_key_names_its_successor(tmp_path: Path, key: str) -> None:
    """And the successor exists."""
    message = error_of(write(tmp_path, minimal(tmp_path), **{key: 1}), "stage_I")
    assert f": {key}: this option is gone; write " in message
    successor = re.search(r"write `(\w+)`", message)
    assert successor is not None
    assert successor[1] in {*ARGUMENTS, *(field.name for field in dataclasses.fields(Config))}


# Files and keys


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("", "line 1 column 1"),
        ('{"seed": 42,}', "line 1 column 1"),
        ('{"seed": 42\n"alpha": 0.2}', "line 2 column 1"),
        ("{'seed': 42}", "line 1 column 2"),
        ('{"seed": 42', "line 1 column 12"),
    ],
)
def test_a_syntax_error_says_where(tmp_path: Path, content: str, where: str) -> None:
    """In JSON's own words, with line and column."""
    message = error_of(write(tmp_path, content))
    assert ": not valid JSON (" in message
    assert where in message


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("null", "NoneType"), ('"x"', "str"), ("3", "int")])
def test_a_config_is_an_object(tmp_path: Path, content: str, kind: str) -> None:
    assert error_of(write(tmp_path, content)).endswith(f": a JSON object is needed, not a {kind}.")


def test_a_file_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes('{"template": "é"}'.encode("latin-1"))
    assert "not valid JSON ('utf-8' codec" in error_of(tmp_path / "config.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in error_of(tmp_path / "none.json")


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path, "stage_I")


@pytest.mark.parametrize("key", ["learning_rate", "alpha"])
def test_a_key_written_twice_is_an_error(tmp_path: Path, key: str) -> None:
    """JSON readers take the last one in silence; which of two values was meant only the writer knows."""
    text = json.dumps(minimal(tmp_path))[:-1] + f', "{key}": 0.1, "{key}": 0.2}}'
    message = error_of(write(tmp_path, text), "stage_I")
    assert key in message and "twice" in message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learnig_rate", "learning_rate"),
        ("max_seq_len", "max_seq_length"),
        ("lora_module", "lora_modules"),
        ("pooling", "pooling_mode"),
        ("stop_after_steps", "stop_after_n_steps"),
        ("batch_size", "total_batch_size"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    """Among our keys and those of TrainingArguments."""
    message = error_of(write(tmp_path, minimal(tmp_path), **{key: 1}), "stage_I")
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{nearest}'?" in message


@pytest.mark.parametrize("key", ["model_class", "merge_subwords", "retroactive_labels"])
def test_a_key_of_upstreams_word_tasks_is_said_to_be_one(key: str, tmp_path: Path) -> None:
    """It resembles others that mean something else."""
    message = error_of(write(tmp_path, minimal(tmp_path), **{key: "custom"}))
    assert f"unknown key '{key}', of upstream's word tasks, which are not here" in message and "mean" not in message


def test_a_key_like_no_other_gets_no_suggestion(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, minimal(tmp_path), zzzz=1))
    assert message.endswith("unknown key 'zzzz'.")


def test_training_is_no_key(tmp_path: Path) -> None:
    """The field that gathers TrainingArguments cannot be smuggled in."""
    assert "unknown key 'training'" in error_of(write(tmp_path, minimal(tmp_path), training={}))


@pytest.mark.parametrize("key", ["model_name_or_path", "output_dir"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_required_key_is_asked_for(tmp_path: Path, key: str, value: str | None) -> None:
    assert error_of(write(tmp_path, minimal(tmp_path), **{key: value})).endswith(f": {key} must be set.")


def test_data_must_come_from_somewhere(tmp_path: Path) -> None:
    """From a folder, or from a sources file whose folder it then is."""
    path = write(tmp_path, minimal(tmp_path), dataset_file_path=None)
    assert "dataset_file_path must name the folder" in error_of(path)
    write(tmp_path, minimal(tmp_path), dataset_file_path=None, sources_file="s.json")
    assert load_config(path, "stage_I").sources_file == "s.json"


# Values


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("torch_dtype", "fp16", "'auto', 'bfloat16', 'float16', 'float32'"),
        ("attn_implementation", "flash", ", ".join(map(repr, get_args(AttnImplementation)))),
        ("symmetric_instructions", "both", "'documented', 'as_released'"),
        ("reduction", "mean", "'token_mean', 'micro_batch_mean'"),
        ("one_source_per", "batch", "'step', 'micro_batch'"),
        ("dataset_name", "MEDI", "'E5', 'Wiki1M'"),
        ("loss_class", "InfoNCE", "'HardNegativeNLLLoss'"),
        ("pooling_mode", "cls", "last, mean, weighted_mean, first, eos_token, last_token, bos_token"),
        ("template", "llama-3", f"{', '.join(TEMPLATES)}, and with K added tokens +memory_K"),
        ("log_level", "loud", "detail, debug, info, warning, error, critical, passive"),
    ],
)
def test_a_bad_choice_lists_the_allowed_ones(tmp_path: Path, key: str, value: str, allowed: str) -> None:
    message = error_of(write(tmp_path, minimal(tmp_path), **{key: value}))
    assert message.endswith(f": {key} is '{value}'; allowed: {allowed}.")


@pytest.mark.parametrize("mode", POOLING_ALIASES)
def test_every_pooling_spelling_is_accepted(tmp_path: Path, mode: str) -> None:
    assert load_config(write(tmp_path, minimal(tmp_path), pooling_mode=mode), "stage_I").pooling_mode == mode


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("bidirectional", "false", "true or false"),
        ("bidirectional", 0, "true or false"),
        ("use_peft", "yes", "true or false or null"),
        ("max_seq_length", 512.0, "whole number"),
        ("max_seq_length", "512", "whole number"),
        ("lora_r", True, "whole number"),
        ("doc_max_length", [400], "whole number or null"),
        ("alpha", "0.2", "number"),
        ("alpha", True, "number"),
        ("template", 3, "string or null"),
        ("sources", "squad", "list or null"),
        ("sources", ["squad", 1], "list or null"),
        ("peft_model_name_or_path", {"a": 1}, "string or list or null"),
        ("model_name_or_path", ["x"], "string"),
        ("learning_rate", "4e-5", "number"),
        ("seed", "42", "whole number"),
        ("seed", 4.2, "whole number"),
        ("save_only_model", "true", "true or false"),
        ("per_device_train_batch_size", 32.0, "whole number"),
        ("gradient_checkpointing_kwargs", "x", "a JSON object or null is needed"),
        ("lr_scheduler_type", ["cosine"], "a string is needed"),
    ],
)
def test_a_wrong_type_says_which_is_needed(tmp_path: Path, key: str, value: Any, needed: str) -> None:
    """For our keys and for those of TrainingArguments alike."""
    message = error_of(write(tmp_path, minimal(tmp_path), **{key: value}), "stage_I")
    assert f": {key} is {value!r}; " in message
    assert needed in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("alpha", 1), ("learning_rate", 1), ("num_train_epochs", 3), ("num_train_epochs", 0.5), ("sources", ["nq"])],
)
def test_a_fitting_value_arrives_as_written(tmp_path: Path, key: str, value: Any) -> None:
    """A whole number passes for a number."""
    config = load_config(write(tmp_path, minimal(tmp_path), **{key: value}), "stage_I")
    assert getattr(config, key, config.training.get(key)) == value


def test_null_means_unset_where_it_may(tmp_path: Path) -> None:
    text = json.dumps({**minimal(tmp_path), "template": None, "use_peft": None, "doc_max_length": None})
    config = load_config(write(tmp_path, text), "stage_II")
    assert (config.template, config.use_peft, config.doc_max_length) == (None, True, None)


@pytest.mark.parametrize(
    ("key", "value", "stage", "sentence"),
    [
        ("alpha", -0.1, "stage_I", "must lie between 0 and 1"),
        ("alpha", 1.1, "stage_I", "must lie between 0 and 1"),
        ("loss_scale", 0, "stage_II", "must be above 0"),
        ("lora_dropout", 1.0, "stage_II", "must lie in [0, 1)"),
        ("lora_dropout", -0.1, "stage_II", "must lie in [0, 1)"),
        ("num_hard_negatives", -1, "stage_II", "0 or more is needed"),
        ("max_seq_length", 0, "stage_II", "must be above 0"),
        ("doc_max_length", 0, "stage_II", "must be above 0"),
        ("lora_r", 0, "stage_II", "must be above 0"),
        ("lora_alpha", -1, "stage_II", "must be above 0"),
        ("max_train_samples", 0, "stage_II", "must be above 0"),
        ("total_batch_size", 0, "stage_II", "must be above 0"),
        ("tokens_per_microbatch", 0, "stage_II", "must be above 0"),
        ("activation_memory_gb", 0, "stage_II", "must be above 0"),
        ("stop_after_n_steps", 0, "stage_II", "must be above 0"),
        ("per_device_train_batch_size", 0, "stage_II", "must be above 0"),
        ("gradient_accumulation_steps", 0, "stage_II", "must be above 0"),
        ("sources", [], "stage_II", "leave the key out for all"),
        ("lora_modules", [], "stage_II", "leave the key out for all"),
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, key: str, value: Any, stage: Stage, sentence: str) -> None:
    message = error_of(write(tmp_path, minimal(tmp_path), **{key: value}), stage)
    assert f"{key} is {value}" in message
    assert sentence in message


@pytest.mark.parametrize("key", ["alpha", "loss_scale", "learning_rate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_no_numbers(tmp_path: Path, key: str, value: float) -> None:
    """Python's JSON reads them; a run with one would fail hours later or not at all."""
    stage: Stage = "stage_I" if key == "alpha" else "stage_II"
    message = error_of(write(tmp_path, minimal(tmp_path), **{key: value}), stage)
    assert message.endswith(f": {key} is {value}; a number is needed.")


@pytest.mark.parametrize(
    ("key", "value"),
    [("alpha", 0), ("alpha", 1), ("lora_dropout", 0), ("num_hard_negatives", 0), ("max_seq_length", 1)],
)
def test_the_borders_of_a_range_are_allowed(tmp_path: Path, key: str, value: Any) -> None:
    """Alpha 0 and 1 are the paper's one-sided ablations; no hard negative is plain in-batch InfoNCE."""
    stage: Stage = "stage_I" if key == "alpha" else "stage_II"
    assert getattr(load_config(write(tmp_path, minimal(tmp_path), **{key: value}), stage), key) == value


# Keys against each other


@pytest.mark.parametrize(
    ("changes", "stage", "sentence"),
    [
        (
            {"total_batch_size": 512, "gradient_accumulation_steps": 2},
            "stage_I",
            "total_batch_size and gradient_accumulation_steps are both set",
        ),
        ({"eval_strategy": "steps"}, "stage_I", "eval_strategy is set, but num_eval_rows is 0"),
        ({"nano_beir": "x"}, "stage_II", "nano_beir is set, but eval_strategy is not"),
        ({"use_peft": True}, "stage_I", "use_peft: stage_I says what it trains by `trainable`"),
        ({"use_peft": True}, "lm", "use_peft: lm trains all parameters"),
        (
            {"max_steps": 100, "stop_after_n_steps": 200},
            "stage_II",
            "stop_after_n_steps is 200, beyond the horizon of max_steps 100",
        ),
        (
            {"tokens_per_microbatch": 511},
            "stage_I",
            "tokens_per_microbatch is 511, less than the 512 tokens that one text may have (max_seq_length).",
        ),
        (
            {"tokens_per_microbatch": 100, "max_seq_length": 101},
            "stage_II",
            "tokens_per_microbatch is 100, less than the 101 tokens that one text may have (max_seq_length).",
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "stage_I",
            "use_reentrant: true is not supported; packed rows are recomputed by the other kind, so leave it out.",
        ),
        ({"activation_memory_gb": 2.0}, "stage_I", "activation_memory_gb needs tokens_per_microbatch"),
        (
            {"activation_memory_gb": 2.0, "tokens_per_microbatch": 512, "gradient_checkpointing": True},
            "stage_II",
            "takes the place of gradient_checkpointing",
        ),
        ({"num_train_epochs": 0}, "stage_II", "num_train_epochs is 0, so there is no step to do"),
        ({"num_train_epochs": -1, "max_steps": 0}, "stage_I", "num_train_epochs is -1, so there is no step to do"),
        ({"eval_on_start": True}, "stage_II", "eval_on_start is true, but eval_strategy is not set"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "num_eval_rows": 8},
            "simcse",
            "metric_for_best_model is 'loss', which tells nothing in simcse",
        ),
        (
            {
                "save_strategy": "best",
                "metric_for_best_model": "eval_in_batch_accuracy",
                "eval_strategy": "steps",
                "num_eval_rows": 8,
            },
            "simcse",
            "metric_for_best_model is 'eval_in_batch_accuracy', which tells nothing in simcse",
        ),
        ({"experiment_id": "/home"}, "stage_II", "experiment_id is '/home'; the name of a folder below output_dir"),
        ({"experiment_id": "a/../.."}, "stage_I", "experiment_id is 'a/../..'; the name of a folder below output_dir"),
    ],
)
def test_keys_that_contradict_each_other(tmp_path: Path, changes: dict[str, Any], stage: Stage, sentence: str) -> None:
    assert sentence in error_of(write(tmp_path, minimal(tmp_path), **changes), stage)


def test_a_run_does_not_write_over_what_it_starts_from(tmp_path: Path) -> None:
    changes = {"model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "x" / ".." / "base")}
    assert "base, which the run starts from and would write over" in error_of(
        write(tmp_path, minimal(tmp_path), **changes), "stage_II"
    )
    for key in ("model_name_or_path", "peft_model_name_or_path"):
        for place in ("base", "base/checkpoint-1", "base/checkpoint-1/adapter"):
            ours = {"output_dir": str(tmp_path / "base"), key: str(tmp_path / "x" / ".." / place), "resume": "never"}
            message = error_of(write(tmp_path, minimal(tmp_path), **ours), "stage_II")
            assert f"{place}, which the run starts from and would write over" in message
            beside = write(tmp_path, minimal(tmp_path), **ours | {key: str(tmp_path / "base" / "init")})
            assert load_config(beside, "stage_II").resume == "never"
    below = write(tmp_path, minimal(tmp_path), **changes, experiment_id="run")
    assert load_config(below, "stage_II").output_dir.resolve() == tmp_path / "base" / "run"


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"eval_strategy": "no"}, "stage_I"),
        ({"use_peft": False}, "stage_I"),
        ({"use_peft": False}, "stage_II"),
        ({"max_steps": 200, "stop_after_n_steps": 200}, "stage_II"),
        ({"max_steps": -1, "stop_after_n_steps": 200}, "stage_II"),
        ({"num_train_epochs": 0, "max_steps": 10}, "stage_II"),
        ({"experiment_id": "a/..b"}, "stage_II"),
        ({"eval_on_start": True, "eval_strategy": "steps", "num_eval_rows": 8}, "stage_II"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "num_eval_rows": 8}, "stage_II"),
        ({"metric_for_best_model": "eval_nano_mean", "save_strategy": "best"}, "simcse"),
        ({"data_seed": None, "label_smoothing_factor": 0, "train_sampling_strategy": "random"}, "stage_I"),
        ({"seed": 2**32 - 1, "learning_rate": 0.0}, "stage_I"),
        ({"tokens_per_microbatch": 512}, "stage_I"),
        ({"tokens_per_microbatch": 100, "max_seq_length": 100}, "stage_II"),
        ({"activation_memory_gb": 2, "tokens_per_microbatch": 512}, "stage_II"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, "stage_I"),
    ],
)
def test_keys_that_agree(tmp_path: Path, changes: dict[str, Any], stage: Stage) -> None:
    """The harmless half of each pair above is read as written."""
    config = load_config(write(tmp_path, minimal(tmp_path), **changes), stage)
    for key, value in changes.items():
        assert config.training.get(key, getattr(config, key, None)) == value


@pytest.mark.parametrize(("key", "value"), [("seed", -1), ("seed", 2**32), ("learning_rate", -1e-4), ("resume", "")])
def test_values_that_would_be_refused_late(tmp_path: Path, key: str, value: Any) -> None:
    """By numpy, by the optimiser, or in words about another thing."""
    assert f": {key} is {value!r}; " in error_of(write(tmp_path, minimal(tmp_path), **{key: value}), "stage_II")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_seed", 0), ("train_sampling_strategy", "group_by_length"), ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0), ("use_liger_kernel", True), ("auto_find_batch_size", True),
        ("accelerator_config", {"split_batches": True}), ("deepspeed", "zero3.json"), ("parallelism_config", {}),
        ("push_to_hub", True), ("hub_token", "hf_secret"), ("ignore_data_skip", True),
        pytest.param("enable_jit_checkpoint", True, marks=pytest.mark.skipif(
            "enable_jit_checkpoint" not in ARGUMENTS, reason="the key came later")),
    ],
)  # fmt: skip
def test_what_the_trainer_does_not_serve_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    """Some would be ignored, others break a run; every one of the table is here."""
    message = error_of(write(tmp_path, minimal(tmp_path), **{key: value}), "stage_II")
    assert f": {key} is not supported: {KEYS[key].refused}; take it out." in message and "hf_secret" not in message
    assert sum(known.refused is not None for known in LIBRARY_KEYS.values()) == 13


KEYS_OF_STAGES = {
    "objective": "reconstruction",
    "target": "self",
    "target_loss": "bag",
    "bottleneck": "states",
    "decoder": "frozen",
    "decoder_bos": True,
    "trainable": "lora",
    "projection": "linear",
    "lm_weight": 1.0,
    "dataset_config_name": "wikitext-103-raw-v1",
    "mask_token_type": "eos",
    "mlm_probability": 0.8,
    "data_collator_type": "all_mask",
    "alpha": 0.5,
    "reconstruct_instruction": True,
    "reconstruction_probe": False,
    "embedding_diagnostics": False,
    "loss_scale": 50.0,
    "num_hard_negatives": 1,
    "examples_per_query": 5,
    "matryoshka_dims": [8, 32],
    "mask_false_negatives": True,
    "mask_known_positives": True,
    "guide": "self",
    "guide_margin": 0.0,
    "guide_margin_kind": "absolute",
    "directions": ["qd", "dq"],
    "partition": "joint",
    "positive_margin": 0.1,
    "hardness_weight": 5.0,
    "hardness_of": "hard_negatives",
    "contrastive_weight": 2.0,
    "cosent_weight": 1.0,
    "gor_weight": 1.0,
    "gor_mean_weight": 1.0,
    "teacher_vectors": "vectors",
    "imitation_weight": 1.0,
    "teacher_cosine_weight": 1.0,
    "teacher_mse_weight": 0.0,
    "teacher_similarity_weight": 0.0,
    "teacher_projection": False,
    "own_negatives_only": ["nq"],
    "distillation_weight": 0.5,
    "simcse_dropout": 0.2,
}


def test_every_key_of_few_stages_is_tried_below() -> None:
    assert KEYS_OF_STAGES.keys() == {name for name, key in KEYS.items() if len(key.stages) < len(get_args(Stage))}


@pytest.mark.parametrize("stage", ["stage_I", "stage_II", "lm"])
@pytest.mark.parametrize("key", KEYS_OF_STAGES)
def test_a_key_of_another_stage_is_refused(tmp_path: Path, key: str, stage: Stage) -> None:
    """It would be ignored; where it is at home it is read."""
    together = {"teacher_vectors", "imitation_weight"} if stage == "stage_I" else {key}  # each needs the other there
    keys = {name: KEYS_OF_STAGES[name] for name in {key} | (together if key in together else set())}
    path = write(tmp_path, minimal(tmp_path), **keys)
    if stage in KEYS[key].stages:
        assert getattr(load_config(path, stage), key) == KEYS_OF_STAGES[key]
    else:
        assert f"{key} has no effect in {stage}; it belongs to {KEYS[key].stages[0]}." in error_of(path, stage)


# What the keys mean


@pytest.mark.parametrize(("stage", "expected"), [("stage_I", False), ("stage_II", True), ("lm", False)])
def test_lora_is_the_default_of_stage_ii_alone(tmp_path: Path, stage: Stage, expected: bool) -> None:
    assert load_config(write(tmp_path, minimal(tmp_path)), stage).use_peft is expected


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    """A config with the required keys alone is the method as the paper states it."""
    config = load_config(write(tmp_path, minimal(tmp_path)), "stage_II")
    assert (config.alpha, config.loss_scale, config.lora_r, config.max_seq_length) == (0.2, 1 / 0.05, 16, 512)
    assert not config.bidirectional and not config.reconstruct_instruction
    assert POOLING_ALIASES[config.pooling_mode] == "last"
    assert config.reduction == "token_mean" and config.symmetric_instructions == "documented"
    assert config.lora_modules is None and len(LORA_MODULES) == 7


def test_output_dir_and_adapters(tmp_path: Path) -> None:
    """An experiment's folder lies below output_dir; one adapter or several become a list."""
    config = load_config(write(tmp_path, minimal(tmp_path)), "stage_II")
    assert (config.output_dir, config.adapters) == (tmp_path / "output", [])
    path = write(tmp_path, minimal(tmp_path), experiment_id="a1", peft_model_name_or_path="one")
    config = load_config(path, "stage_II")
    assert (config.output_dir, config.adapters) == (tmp_path / "output/a1", ["one"])
    path = write(tmp_path, minimal(tmp_path), peft_model_name_or_path=["one", "two"])
    assert load_config(path, "stage_II").adapters == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"gradient_checkpointing": False}, None),
        ({"gradient_checkpointing": True}, {"use_reentrant": False}),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False, "debug": True}},
            {"use_reentrant": False, "debug": True},
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": False}},
            {"use_reentrant": False, "preserve_rng_state": False},
        ),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, None),
        pytest.param(
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
            {"use_reentrant": False},
            marks=pytest.mark.skipif("activation_checkpointing" not in ARGUMENTS, reason="its name came later"),
        ),
    ],
)
def test_activation_checkpointing(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any] | None, no_tensorboard: None
) -> None:
    """Switched on where the model is loaded, so the trainer never hears of it."""
    config = load_config(write(tmp_path, minimal(tmp_path), **changes), "stage_I")
    assert config.checkpointing == expected
    assert not training_arguments(config).gradient_checkpointing


@pytest.fixture
def recorded_arguments(monkeypatch: pytest.MonkeyPatch, no_tensorboard: None) -> Iterator[list[dict[str, Any]]]:
    """What TrainingArguments would be made of: with several processes in the environment, the real one joins them."""
    calls: list[dict[str, Any]] = []

    class Recorder(TrainingArguments):
        def __init__(self, **values: Any) -> None:
            calls.append(values)

    monkeypatch.setattr(config_module, "TrainingArguments", Recorder)
    yield calls


@pytest.mark.parametrize(
    ("per_device", "processes", "accumulation"),
    [(64, "8", 1), (32, "8", 2), (16, "8", 4), (8, "8", 8), (1, "8", 64), (32, "4", 4), (512, "1", 1), (64, None, 8)],
)
def test_accumulation_follows_from_the_total_batch(
    tmp_path: Path,
    per_device: int,
    processes: str | None,
    accumulation: int,
    monkeypatch: pytest.MonkeyPatch,
    recorded_arguments: list[dict[str, Any]],
) -> None:
    """512 rows a step on any number of processes."""
    path = write(tmp_path, minimal(tmp_path), total_batch_size=512, per_device_train_batch_size=per_device)
    config = load_config(path, "stage_I")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    training_arguments(config)
    assert [call["gradient_accumulation_steps"] for call in recorded_arguments] == [accumulation]
    assert per_device * int(processes or 1) * accumulation == 512


@pytest.mark.parametrize(("processes", "per_device"), [(None, 512), ("1", 512), ("2", 256), ("8", 64)])
def test_without_a_batch_size_each_process_holds_its_whole_share(
    tmp_path: Path,
    processes: str | None,
    per_device: int,
    monkeypatch: pytest.MonkeyPatch,
    recorded_arguments: list[dict[str, Any]],
) -> None:
    """So that there is nothing to accumulate, and the pool of a contrastive step is the whole batch."""
    config = load_config(write(tmp_path, minimal(tmp_path), total_batch_size=512), "stage_I")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    training_arguments(config)
    (values,) = recorded_arguments
    assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == (per_device, 1)


def test_without_any_batch_size_the_library_decides(tmp_path: Path, recorded_arguments: list[dict[str, Any]]) -> None:
    training_arguments(load_config(write(tmp_path, minimal(tmp_path)), "stage_I"))
    assert not {"per_device_train_batch_size", "gradient_accumulation_steps"} & recorded_arguments[0].keys()


@pytest.mark.parametrize(
    ("processes", "total", "at_once"), [("3", 512, "510 rows that 3"), ("8", 4, "8 rows that 8"), ("3", 8, "6 rows")]
)
def test_a_total_batch_that_cannot_be_shared_out_is_an_error(
    tmp_path: Path,
    processes: str,
    total: int,
    at_once: str,
    monkeypatch: pytest.MonkeyPatch,
    recorded_arguments: list[dict[str, Any]],
) -> None:
    """Where no batch size is written, too."""
    config = load_config(write(tmp_path, minimal(tmp_path), total_batch_size=total), "stage_I")
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(UserError, match=f"total_batch_size is {total}, no multiple of the {at_once}"):
        training_arguments(config)
    assert not recorded_arguments


@pytest.mark.parametrize(("processes", "at_once"), [("3", 96), ("32", 1024)])
def test_a_total_batch_that_does_not_divide_is_an_error(
    tmp_path: Path,
    processes: str,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
    recorded_arguments: list[dict[str, Any]],
) -> None:
    """Instead of a batch of another size than was asked for."""
    path = write(tmp_path, minimal(tmp_path), total_batch_size=512, per_device_train_batch_size=32)
    config = load_config(path, "stage_I")
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(UserError) as error:
        training_arguments(config)
    assert str(error.value) == (
        f"total_batch_size is 512, no multiple of the {at_once} rows that {processes} process(es) with "
        "per_device_train_batch_size 32 hold at once."
    )
    assert not recorded_arguments


def test_without_a_total_batch_the_accumulation_is_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded_arguments: list[dict[str, Any]]
) -> None:
    config = load_config(write(tmp_path, minimal(tmp_path), gradient_accumulation_steps=3), "stage_I")
    monkeypatch.setenv("WORLD_SIZE", "8")
    training_arguments(config)
    assert recorded_arguments[0]["gradient_accumulation_steps"] == 3


@pytest.mark.parametrize("written", [{}, {"use_cpu": False}])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_without_a_gpu_a_run_is_the_cpus(
    tmp_path: Path,
    recorded_arguments: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    written: dict[str, Any],
    has_gpu: bool,
) -> None:
    """Else several processes would each believe to be alone, whether the key's default is written or not."""
    monkeypatch.setattr(config_module.torch.accelerator, "is_available", lambda: has_gpu)
    training_arguments(load_config(write(tmp_path, minimal(tmp_path), **written), "stage_II"))
    (values,) = recorded_arguments
    assert (values["use_cpu"], values["dataloader_pin_memory"]) == (not has_gpu, has_gpu)


def test_run_arguments_that_are_ours(tmp_path: Path, recorded_arguments: list[dict[str, Any]]) -> None:
    """Rows are read by our collator, no unused parameter is searched for, and nothing is reported to nobody."""
    config = load_config(write(tmp_path, minimal(tmp_path), remove_unused_columns=True, experiment_id="e"), "stage_I")
    training_arguments(config)
    (values,) = recorded_arguments
    assert values["remove_unused_columns"] is False
    assert values["ddp_find_unused_parameters"] is False
    assert values["report_to"] == "none"
    assert values["output_dir"] == str(tmp_path / "output/e")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"bf16": True, "fp16": True}, "bf16"),
        ({"optim": "adamw_none"}, "adamw_none"),
        ({"lr_scheduler_type": "none"}, "none"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_what_transformers_refuses_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], word: str, no_tensorboard: None
) -> None:
    """A user's mistake, so no traceback; and still nothing is written."""
    path = write(tmp_path, minimal(tmp_path), **changes)
    with pytest.raises(UserError) as error:
        training_arguments(load_config(path, "stage_I"))
    assert str(error.value).startswith("training arguments: ")
    assert word in str(error.value) and "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_reading_a_config_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A config that is fine makes no folder either; that is the run's business."""
    with caplog.at_level(logging.INFO):
        load_config(write(tmp_path, minimal(tmp_path)), "stage_I")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert not caplog.records


def test_the_resolved_config_is_read_back(tmp_path: Path) -> None:
    """What a run stores (its fields, the TrainingArguments keys beside them) loads to the same config."""
    config = load_config(write(tmp_path, minimal(tmp_path), alpha=0.5, seed=7, save_steps=10), "stage_I")
    stored = dataclasses.asdict(config)
    flat = {**stored.pop("training"), **stored}
    flat = {key: value for key, value in flat.items() if "stage_I" in KEYS[key].stages}
    assert load_config(write(tmp_path, json.dumps(flat)), "stage_I") == config


def test_a_file_may_say_whose_it_is(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, minimal(tmp_path), stage="lm"), "lm").stage == "lm"
    with pytest.raises(UserError, match="stage is 'lm', but the script that reads it is that of stage_II"):
        load_config(write(tmp_path, minimal(tmp_path), stage="lm"), "stage_II")


def test_a_reporter_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llm2vec.training.config.arguments.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    config = load_config(write(tmp_path, minimal(tmp_path), report_to="wandb", use_cpu=True), "stage_I")
    with pytest.raises(UserError, match=r"report_to: 'wandb' is not installed here; .*choose from none, tensorboard"):
        training_arguments(config)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_loss", False), ("loss_contrastive", False), ("eval_alignment", False), ("uniformity_query", False),
        ("eval_recall_at_1", True), ("effective_rank", True),
    ],
)  # fmt: skip
def test_the_best_checkpoint_has_the_better_figure(metric: str, greater: bool, tmp_path: Path) -> None:
    """transformers would ask whether the name ends in `loss`; a direction that is written out stands."""
    training = {"output_dir": str(tmp_path), "metric_for_best_model": metric, "use_cpu": True}
    assert training_arguments(Config("base", training=training)).greater_is_better is greater
    given = Config("base", training={**training, "greater_is_better": not greater})
    assert training_arguments(given).greater_is_better is not greater
