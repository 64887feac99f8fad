"""Print the JSON Schema of a training config, by which an editor completes and checks keys.

    llm2vec schema > train_configs/config.schema.json

A config names it, relative to itself: "$schema": "../config.schema.json". It holds the keys of this project with type,
range, default and meaning, and TrainingArguments' keys of the installed transformers.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from collections.abc import Sequence
from typing import Any

from llm2vec import cli


def main(argv: Sequence[str]) -> None:
    """Print it."""
    cli.parser("schema", __doc__).parse_args(argv)
    print(schema_text(config_schema()), end="")


def schema_text(schema: dict[str, Any]) -> str:
    """A schema as a file, a key a line."""
    keys = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in schema["properties"].items())
    around = json.dumps({**schema, "properties": {}}, indent=2)
    return around.replace('"properties": {}', f'"properties": {{\n{keys}\n  }}') + "\n"


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a whole config."""
    from dataclasses import MISSING, fields

    from transformers import TrainingArguments  # with torch: seconds, which --help does not wait for

    from llm2vec.training.config import KEYS, Config
    from llm2vec.training.config.file import RENAMED, REQUIRED, SCHEMA_KEY, WITHOUT_EFFECT, key_schemas

    meanings = {field.name: field.metadata.get("help", "") for field in fields(TrainingArguments)} | meanings_of(Config)
    defaults = {field.name: {"default": field.default} for field in fields(Config) if field.default is not MISSING}
    every = len(KEYS["stage"].stages)
    properties: dict[str, Any] = {SCHEMA_KEY: {"type": "string"}}
    for name, key in KEYS.items():
        if key.refused is None:
            read_by = f" Read by {', '.join(key.stages)}." if len(key.stages) < every else ""
            properties[name] = {
                "description": meanings[name] + read_by,
                **key_schemas()[name],
                **defaults.get(name, {}),
            }
    for name, today in RENAMED.items():
        properties[name] = {"description": f"Today `{today}`.", **key_schemas()[today], "deprecated": True}
    for name in WITHOUT_EFFECT:
        properties.setdefault(name, {"description": "Has no effect any more.", "deprecated": True})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A training run",
        "type": "object",
        "required": list(REQUIRED),
        "additionalProperties": False,
        "properties": properties,
    }


def meanings_of(described: type) -> dict[str, str]:
    """What stands below each field of a class, by the field's name."""
    (definition,) = ast.parse(inspect.getsource(described)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }
