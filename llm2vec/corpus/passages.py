"""Passages to search in: of the text files below a folder, or the lines of a JSONL file; each knows where it stands."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

from llm2vec.corpus.rows import check_unicode
from llm2vec.files import parse_object
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

#: What the name of a text file ends in.
SUFFIXES = (".md", ".py", ".rst", ".txt")


class Passage(NamedTuple):
    """A text and where it stands.

    Attributes:
        where: `path:line` below the folder; of a JSONL file's row its id, or `file:line` where it has none.
        text: the text.
        title: stands before it when it is embedded.
    """

    where: str
    text: str
    title: str = ""

    @property
    def embedded(self) -> str:
        """What the model reads: title and text joined by a blank, as in an evaluation."""
        return f"{self.title} {self.text}".strip()


class _Piece(NamedTuple):
    """A text that begins on a line, counted from 1."""

    line: int
    text: str


def read_passages(source: Path, max_characters: int) -> list[Passage]:
    """All passages of a folder of text files, in the order of their paths, or of a JSONL file.

    Args:
        source: a folder, or a JSONL file of objects with `text`, perhaps `title` and perhaps `id` (or `_id`).
        max_characters: of a passage of a text file; rows of a JSONL file are left whole.

    Raises:
        UserError: there is no such folder or file, there is no text in it, or a line is malformed.
    """
    if source.is_dir():
        passages = list(_folder_passages(source, max_characters))
        expected = f"text in a file that ends in {', '.join(SUFFIXES)}"
    elif source.is_file() and source.suffix == ".jsonl":
        passages, expected = list(_jsonl_passages(source)), "line"
    elif source.exists():
        raise UserError(f"{source}: a folder of text files or a .jsonl file is needed.")
    else:
        raise UserError(f"There is no folder or file {source}.")
    if not passages:
        raise UserError(f"{source} has no {expected}.")
    return passages


def cut_into_passages(text: str, max_characters: int) -> Iterator[tuple[int, str]]:
    """A text in passages of whole paragraphs, as many as fit; longer ones are cut between lines, or between words.

    Args:
        text: paragraphs with blank lines between them.
        max_characters: of a passage.

    Yields:
        The line that a passage begins on, counted from 1, and the passage; never an empty one.
    """
    lines = enumerate(text.split("\n"), start=1)
    paragraphs = (list(group) for is_blank, group in groupby(lines, lambda line: not line[1].strip()) if not is_blank)
    pieces = (_joined(_pieces(paragraph, max_characters), "\n", max_characters) for paragraph in paragraphs)
    yield from _joined(chain.from_iterable(pieces), "\n\n", max_characters)


def _folder_passages(folder: Path, max_characters: int) -> Iterator[Passage]:
    not_read = []
    for file in _text_files(folder):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError):  # a link to nowhere, no permission
            not_read.append(_printable(file))
            continue
        where = _printable(file.relative_to(folder))
        yield from (Passage(f"{where}:{line}", part) for line, part in cut_into_passages(text, max_characters))
    if not_read:
        logger.warning(
            "%d files cannot be read or are not UTF-8 and are left out, such as %s", len(not_read), not_read[0]
        )


def _printable(path: Path) -> str:
    """A path's name; bytes that are not UTF-8, which file names may hold, as question marks."""
    return path.as_posix().encode("utf-8", "replace").decode()


def _text_files(folder: Path) -> list[Path]:
    """Text files at any depth, but not below a folder whose name begins with a dot (.git, .venv)."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if name.endswith(SUFFIXES)]
    return sorted(files)


def _jsonl_passages(file: Path) -> Iterator[Passage]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            row = parse_object(line, where)
            if "text" not in row:
                raise UserError(f"{where}: there is no `text`; there are {', '.join(row) or 'no keys'}.")
            key = next((key for key in ("id", "_id") if row.get(key) is not None), None)
            name = f"{_printable(Path(file.name))}:{number}" if key is None else _name(row[key], key, where)
            yield Passage(name, _text(row["text"], "text", where), _text(row.get("title") or "", "title", where))


def _name(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UserError(f"{where}: `{key}` must be a string or a whole number, not a {type(value).__name__}.")
    return check_unicode(str(value), where)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: `{key}` must be a string, not a {type(value).__name__}.")
    return check_unicode(value, where)


def _pieces(lines: Iterable[tuple[int, str]], max_characters: int) -> Iterator[_Piece]:
    """Lines of a paragraph; one that is too long in several pieces."""
    for number, line in lines:
        if len(line) <= max_characters:
            yield _Piece(number, line.rstrip())
        else:
            yield from (_Piece(number, part) for part in textwrap.wrap(line, max_characters))


def _joined(pieces: Iterable[_Piece], joint: str, max_characters: int) -> Iterator[_Piece]:
    """Consecutive pieces joined, as many as fit into `max_characters`."""
    held: _Piece | None = None
    for piece in pieces:
        if held is not None and len(held.text) + len(joint) + len(piece.text) <= max_characters:
            held = _Piece(held.line, f"{held.text}{joint}{piece.text}")
            continue
        if held is not None:
            yield held
        held = piece
    if held is not None:
        yield held
