"""A run's JSON file, read and checked: `load_config` makes a `Config` of it.

A key that is neither ours nor one of transformers' TrainingArguments is an error that names the nearest known key, and
so are a wrong type (`json_types`), a value that is not allowed and two keys that contradict each other
(`config_checks`); all of that is found before any weights load. Used by the scripts, `plan` and `compare_runs`.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import typing
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from llm2vec.files import read_object
from llm2vec.train.config import LORA_STAGES, Config
from llm2vec.train.config_checks import check_config
from llm2vec.train.json_types import check_type
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

#: What keys of TrainingArguments take, where their annotation says something else.
TYPES: dict[str, Any] = {"fsdp": Any}


def load_config(path: str | Path, stage: Stage) -> Config:
    """Read and check a run's JSON file.

    Args:
        path: the file.
        stage: which script reads it; decides `use_peft`'s default and which keys would have no effect.

    Raises:
        UserError: what is wrong, with file and key.
    """
    content = _with_current_names(read_object(Path(path), str(path)), path)
    own = {f.name for f in dataclasses.fields(Config)} - {"training"}
    foreign = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    values: dict[str, Any] = {"stage": stage, "training": {}}
    for key, value in content.items():
        where = f"{path}: {key}"
        if key in WITHOUT_EFFECT and key not in foreign:
            logger.warning("%s: there is no such option any more; it has no effect.", where)
        elif key in REPLACED and key not in foreign:
            raise UserError(f"{where}: this option is gone; write {REPLACED[key]} instead.")
        elif key in own:
            check_type(value, typing.get_type_hints(Config)[key], where)
            values[key] = value
        elif key in foreign:
            check_type(value, TYPES.get(key) or typing.get_type_hints(TrainingArguments)[key], where)
            choices = foreign[key].metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise UserError(f"{where} is {value!r}; allowed: {', '.join(choices)}.")
            values["training"][key] = value
        else:
            nearest = difflib.get_close_matches(key, [*own, *foreign], n=1, cutoff=0.6)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise UserError(f"{path}: unknown key {key!r}{hint}")
    for required in ("model_name_or_path", "output_dir"):
        if not content.get(required):
            raise UserError(f"{path}: {required} must be set.")
    if stage == "mntp":
        values = {"bidirectional": True, "pooling_mode": "mean", **values}
    values.setdefault("use_peft", None)
    if values["use_peft"] is None:
        values["use_peft"] = stage in LORA_STAGES
    if values["stage"] != stage:
        raise UserError(f"{path}: stage is {values['stage']!r}, but the script that reads it is that of {stage}.")
    config = Config(**values)
    check_config(config, content, stage, path)
    return config


def _with_current_names(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The keys under the names that the current transformers gives them."""
    for key in content:
        if RENAMED.get(key) in content:
            raise UserError(f"{path}: {key} and {RENAMED[key]} are the same option; write it once.")
    return {RENAMED.get(key, key): value for key, value in content.items()}
