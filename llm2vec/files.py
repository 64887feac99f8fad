"""JSON that a user or another program wrote: one way to read it, one sentence when it cannot be.

The standard library takes the last of two equal keys without a word, and gives up on deep nesting with an error that
no caller expects. Both are refused here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm2vec.types import UserError


def parse_json(text: bytes | str, where: str) -> Any:
    """What a piece of JSON says; a byte order mark in front of bytes does not count.

    Args:
        text: the JSON; bytes are UTF-8.
        where: file, or file and line; a message begins with it.

    Raises:
        UserError: it is no JSON, no UTF-8, nested too deeply, or writes a key twice.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply).") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error


def parse_object(text: bytes | str, where: str) -> dict[str, Any]:
    """The same for a JSON object.

    Raises:
        UserError: as `parse_json`, or it is something else.
    """
    content = parse_json(text, where)
    if not isinstance(content, dict):
        raise UserError(f"{where}: a JSON object is needed, not a {type(content).__name__}.")
    return content


def read_object(file: Path, where: str | None = None) -> dict[str, Any]:
    """The object in a file; `where` begins a message in place of the file's name.

    Raises:
        UserError: as `parse_object`, or the file cannot be read.
    """
    where = str(file) if where is None else where
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}).") from error
    return parse_object(content, where)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is written twice")
    return content
