"""A run's JSON file, read and checked: `load_config` makes a `Config` of it.

An unknown key is an error that names the nearest known one. So is a wrong type, a value that is not allowed, or two
keys that contradict each other (`rules`). All of that is found before any weights load.

A value is checked against the same piece of JSON Schema that `llm2vec schema` prints, so an editor that reads the
schema says of a value what the loader will say.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from llm2vec.files import as_path, in_short, read_object
from llm2vec.training.config import KEYS, LORA_STAGES, Config
from llm2vec.training.config.rules import contradictions
from llm2vec.types import Stage, UserError

logger = logging.getLogger(__name__)

#: Keys of older TrainingArguments, and of upstream LLM2Vec's scripts, that changed nothing about a result: accepted,
#: and said to be without effect.
WITHOUT_EFFECT = (
    "overwrite_output_dir", "logging_dir", "save_safetensors", "include_tokens_per_second", "past_index",
    "use_legacy_prediction_loop", "half_precision_backend", "fp16_backend", "use_ipex", "jit_mode_eval",
    "tpu_metrics_debug", "ray_scope", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
    "group_by_length", "use_fast_tokenizer", "low_cpu_mem_usage", "overwrite_cache", "preprocessing_num_workers",
)  # fmt: skip

#: Keys of older TrainingArguments that still mean what they meant, and their names today.
RENAMED = {"evaluation_strategy": "eval_strategy"}

#: Keys of the same that did matter, and what to write instead.
REPLACED = {
    "warmup_ratio": "`warmup_steps` with a fraction below 1",
    "per_gpu_train_batch_size": "`per_device_train_batch_size`",
    "no_cuda": "`use_cpu`",
    "adafactor": '`optim`: "adafactor"',
    "fp16_opt_level": "`fp16`",
    "train_file": "`dataset_file_path`",
    "validation_file": "`num_eval_rows` (blocks that are held out of the training texts)",
    "validation_split_percentage": "`num_eval_rows` (a number of blocks)",
}

#: Keys of upstream's word tasks, which are not here.
OF_WORD_TASKS = ("model_class", "classifier_dropout", "merge_subwords", "retroactive_labels", "task", "peft_addr")

REQUIRED = ("model_name_or_path", "output_dir")

#: Our keys that begin otherwise in a stage. SimCSE's rows are texts alone.
OF_STAGE: dict[Stage, dict[str, Any]] = {
    "mntp": {"bidirectional": True, "pooling_mode": "mean"},
    "simcse": {"num_hard_negatives": 0},
}

#: What an editor reads to know the keys. No key itself: it enters no record and no hash.
SCHEMA_KEY = "$schema"


def load_config(path: str | Path, stage: Stage) -> Config:
    """Read and check a run's JSON file; a `UserError` says what is wrong, with file and key. The stage whose script
    reads it decides `use_peft`'s default and which keys would have no effect."""
    return _config_of(read_object(Path(path), str(path)), stage, str(path))


def checked_config(config: Config) -> Config:
    """A config that was put together in Python, read as a file of the same keys is; `stage` must be among them. A
    `UserError` says what is wrong, with the key."""
    stage = config.stage
    if stage is None or stage not in get_args(Stage):
        raise UserError(f"Config: stage is {stage!r}; allowed: {', '.join(map(repr, get_args(Stage)))}.")
    own = {name: value for name, value in vars(config).items() if name != "training"}
    begun = {name: getattr(Config, name, None) for name in own}
    of_stage = begun | OF_STAGE.get(stage, {})
    written = {name: value for name, value in own.items() if value not in (begun[name], of_stage[name])}
    keys = {name: os.fspath(value) if isinstance(value, os.PathLike) else value
            for name, value in {**written, **config.training}.items()}  # fmt: skip
    return _config_of(keys, stage, "Config")


def _config_of(content: dict[str, Any], stage: Stage, path: str) -> Config:
    content = _with_current_names(content, path)
    own = {field.name for field in dataclasses.fields(Config)}
    values: dict[str, Any] = {"stage": stage, "training": {}}
    for key, value in content.items():
        if key in KEYS:
            _check_value(key, value, stage, path)
            (values if key in own else values["training"])[key] = value
        elif key in WITHOUT_EFFECT:
            anew = key == "overwrite_output_dir" and value is True
            then = "; to train anew, remove output_dir or name another" if anew else ""
            logger.warning("%s: %s: there is no such option any more; it has no effect%s.", path, key, then)
        elif key in REPLACED:
            raise UserError(f"{path}: {key}: this option is gone; write {REPLACED[key]} instead.")
        elif key != SCHEMA_KEY:
            nearest = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.6)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            if key in OF_WORD_TASKS:
                hint = ", of upstream's word tasks, which are not here; the decoder for one is `l2v.model`."
            raise UserError(f"{path}: unknown key {key!r}{hint}")
    for required in REQUIRED:
        if not content.get(required):
            raise UserError(f"{path}: {required} must be set.")
    values = {**OF_STAGE.get(stage, {}), **values}
    if values.get("use_peft") is None:
        values["use_peft"] = stage in LORA_STAGES or values.get("trainable", "full") != "full"
    if values["stage"] != stage:
        raise UserError(f"{path}: stage is {values['stage']!r}, but the script that reads it is that of {stage}.")
    config = Config(**values)
    for sentence in contradictions(config, content):
        raise UserError(f"{path}: {sentence}")
    return config


def _with_current_names(content: dict[str, Any], path: str) -> dict[str, Any]:
    """The keys under the names that the current transformers gives them."""
    for key in content:
        if RENAMED.get(key) in content:
            raise UserError(f"{path}: {key} and {RENAMED[key]} are the same option; write it once.")
    return {RENAMED.get(key, key): value for key, value in content.items()}


# --- one key's value ---

#: What a JSON value is to Python, to JSON Schema, and in a message.
_KINDS = {
    bool: ("boolean", "true or false"),
    int: ("integer", "whole number"),
    float: ("number", "number"),
    str: ("string", "string"),
    list: ("array", "list"),
    dict: ("object", "JSON object"),
    types.NoneType: ("null", "null"),
}

#: A `Key`'s bounds, JSON Schema's names of them, and when a number keeps them.
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": ("minimum", operator.ge),
    "above": ("exclusiveMinimum", operator.gt),
    "at_most": ("maximum", operator.le),
    "below": ("exclusiveMaximum", operator.lt),
}


def _check_value(key: str, value: Any, stage: Stage, where: str) -> None:
    """Refuse what a key may not hold; a whole number passes for a number."""
    known, schema = KEYS[key], key_schemas()[key]
    if stage not in known.stages:
        raise UserError(f"{where}: {key} has no effect in {stage}; it belongs to {known.stages[0]}.")
    if known.refused and value != getattr(TrainingArguments, key, None):
        raise UserError(f"{where}: {key} is not supported: {known.refused}; take it out.")
    choices = [choice for choice in schema.get("enum", ()) if choice is not None]
    entries = schema.get("items", {}).get("enum")
    if not _has_type(value, schema):
        names = dict(_KINDS.values())
        needed = f"a {' or '.join(names[kind] for kind in schema['type'])} is needed"
    elif choices and value not in schema["enum"]:
        needed = f"allowed: {', '.join(choices if 'type' in schema else map(repr, choices))}"
    elif entries and value is not None and not all(entry in entries for entry in value):
        needed = f"allowed in the list: {', '.join(map(repr, entries))}"
    elif bad := next((text for text in _strings_in(value) if not _can_be_written(text)), None):
        value, needed = bad, "text that UTF-8 can write is needed, without NUL"
    elif value is not None and not all(keeps(value, schema[w]) for w, keeps in _BOUNDS.values() if w in schema):
        needed = known.range
    else:
        for text in _strings_in(value) if known.is_path else ():
            as_path(text, f"{where}: {key}")
        return
    raise UserError(f"{where}: {key} is {in_short(value)}; {needed}.")


def _strings_in(value: Any) -> Iterator[str]:
    """All strings of a value, keys of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for entry in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings_in(entry)


def _can_be_written(text: str) -> bool:
    return "\x00" not in text and text.encode(errors="ignore").decode() == text


def _has_type(value: Any, schema: dict[str, Any]) -> bool:
    if "type" not in schema:
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False  # Python reads them, JSON does not have them
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return False  # more than any library counts to
    if isinstance(value, list) and not all(_has_type(entry, schema.get("items", {})) for entry in value):
        return False
    kind, _ = _KINDS.get(type(value), ("", ""))
    return kind in schema["type"] or (kind == "integer" and "number" in schema["type"])


@functools.cache
def key_schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of every key's value."""
    hints = {**typing.get_type_hints(TrainingArguments), **typing.get_type_hints(Config)}
    # What transformers annotates otherwise than we take it; of `fsdp`, `rules` says more.
    hints |= {"fsdp": Any} | {name: dict | None for name in hints if name.endswith("_checkpointing_kwargs")}
    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(TrainingArguments)}
    schemas = {}
    for name, key in KEYS.items():
        schema = _schema_of(hints[name])
        if key.pattern:
            schema["pattern"] = key.pattern
        if allowed := key.choices or choices.get(name):
            schema["enum"] = [*allowed, *([None] if "null" in schema["type"] else [])]
        bounds = {word: getattr(key, bound) for bound, (word, _) in _BOUNDS.items()}
        schemas[name] = schema | {word: bound for word, bound in bounds.items() if bound is not None}
    return schemas


def _schema_of(hint: Any) -> dict[str, Any]:
    """The JSON Schema of a type, `{}` where transformers alone knows what it takes."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds: dict[str, None] = {}  # in the order of the annotation
    choices: list[Any] = []
    schema: dict[str, Any] = {}
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is Literal:
            choices += typing.get_args(option)
        elif origin in _KINDS:
            kinds[_KINDS[origin][0]] = None
        elif isinstance(origin, type) and issubclass(origin, Enum):
            kinds["string"] = None
        else:
            return {}
        if origin is list:
            schema["items"] = _schema_of(typing.get_args(option)[0])
    if choices and kinds.keys() <= {"null"}:
        return {"enum": [*choices, *([None] if kinds else [])]}
    kinds |= {_KINDS[type(choice)][0]: None for choice in choices}
    return schema | {"type": list(kinds)}
