"""Upstream's names of experiments: settings written into a folder's name, and read back from it."""

from __future__ import annotations

import re
from typing import Any

from llm2vec.types import UserError

#: Setting -> its mark in a name, in upstream's order, and its type.
_MARKS: dict[str, tuple[str, type]] = {
    "model_name": ("m-", str),
    "pooling_mode": ("p-", str),
    "train_batch_size": ("b-", int),
    "max_seq_length": ("l-", int),
    "bidirectional": ("bidirectional-", bool),
    "epochs": ("e-", int),
    "seed": ("s-", int),
    "warmup_steps": ("w-", int),
    "lr": ("lr-", float),
    "lora_r": ("lora_r-", int),
}


def generate_experiment_id(
    name: str,
    split: str,
    model_name: str,
    pooling_mode: str,
    train_batch_size: int,
    max_seq_length: int,
    bidirectional: bool,
    epochs: int,
    seed: int,
    warmup_steps: int,
    lr: float,
    lora_r: int,
) -> str:
    """`NAME_SPLIT_m-MODEL_p-mean_b-64_...`: a name that tells the settings; one of another type is left out."""
    settings = {key: value for key, value in locals().items() if key in _MARKS}
    written = [f"_{_MARKS[key][0]}{value}" for key, value in settings.items() if type(value) is _MARKS[key][1]]
    return f"{name}_{split}{''.join(written)}"


def parse_experiment_id(experiment_id: str) -> dict[str, Any]:
    """The settings in such a name, by upstream's keys (`model_name_or_path` for the model); any other is a
    `UserError`.

    Folders before and behind it are passed over.
    """
    marks = "".join(f"_{mark}(?P<{key}>[\\w./-]+?)" for key, (mark, _) in _MARKS.items())
    found = re.fullmatch(rf"(?:[\w./-]*/)?(?P<name>[\w.-]+?){marks}(?:/[\w./-]*)?", experiment_id)
    if found is None:
        raise UserError(f"{experiment_id!r} is no name that generate_experiment_id makes.")
    values = found.groupdict()
    parsed = {key: (values[key] == "True" if kind is bool else kind(values[key])) for key, (_, kind) in _MARKS.items()}
    return {"name": values["name"], "model_name_or_path": parsed.pop("model_name"), **parsed}
