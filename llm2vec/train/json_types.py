"""Whether a value read from JSON has the type that a field is annotated with.

Used by `config_file` for each key of a run's config.
"""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Literal

from llm2vec.types import UserError


def check_type(value: Any, hint: Any, where: str) -> None:
    """Refuse a JSON value that does not have the annotated type; a whole number passes for a float."""
    if not _fits(value, hint):
        choices = [c for h in (typing.get_args(hint) or (hint,)) for c in _choices(h)] or _choices(hint)
        allowed = f"allowed: {', '.join(map(repr, choices))}" if choices else f"a {_name(hint)} is needed"
        raise UserError(f"{where} is {value!r}; {allowed}.")


def _choices(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else []


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    if hint in (bool, str):
        return isinstance(value, hint)
    # Enumerations and dictionaries of TrainingArguments: transformers itself knows what they may hold.
    return isinstance(value, str | dict | list)


def _name(hint: Any) -> str:
    names = {bool: "true or false", int: "whole number", float: "number", str: "string", type(None): "null"}
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return " or ".join(
        names.get(option, "list" if typing.get_origin(option) is list else "value") for option in options
    )
