"""Passages of texts of one's own: of the text files below a folder, or of the rows of a JSONL file."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Collection, Iterator
from itertools import groupby
from pathlib import Path

from llm2vec.files import check_unicode, json_lines
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

#: What the name of a text file ends in, in small letters or capitals.
SUFFIXES = (".md", ".py", ".rst", ".txt")
#: A passage is at most so long. Much longer ones are about several things, which one vector tells apart badly.
PASSAGE_CHARACTERS = 1000


def passages_of(
    source: Path, most: int = PASSAGE_CHARACTERS, suffixes: Collection[str] = SUFFIXES
) -> Iterator[dict[str, str]]:
    """`where`, `title` and `text` of each passage of a folder of text files with these `suffixes`, or of the objects
    with `text` in a JSONL file. A text file's passages have at most so many characters. A `UserError` where there is no
    such folder or file, or a row has no text."""
    if source.is_file() and source.suffix == ".jsonl":
        yield from _rows(source)
        return
    if not source.is_dir():
        raise UserError(f"{source}: a folder of text files or a .jsonl file is needed.")
    for file in text_files(source, suffixes):
        where = file.relative_to(source).as_posix()
        try:
            content = file.read_text(encoding="utf-8-sig") if file.is_file() else None
        except (UnicodeDecodeError, OSError):  # no permission
            content = None
        if content is None:  # a link to nowhere, a pipe, a device
            logger.warning("%r cannot be read or is not UTF-8, and is left out", where)
            continue
        yield from ({"where": f"{where}:{line}", "title": "", "text": part} for line, part in _cut(content, most))


def text_files(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """What `passages_of` reads of a folder, sorted: all below it with these suffixes, but nothing hidden (.git)."""
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _rows(file: Path) -> Iterator[dict[str, str]]:
    """The same of a JSONL file's objects."""
    for number, (line, row) in enumerate(json_lines(file), start=1):
        name, title, text = row.get("id", row.get("_id")), row.get("title") or "", row.get("text")
        if not isinstance(text, str) or not isinstance(title, str):
            raise UserError(f"{line}: `text` must be a string, and `title` too where there is one.")
        if not isinstance(name, str | int | None) or isinstance(name, bool):
            raise UserError(f"{line}: `id` must be a string or a whole number, not {name!r}.")
        where = f"{file.name}:{number}" if name is None else str(name)
        check_unicode(where + title + text, "text", line)
        yield {"where": where, "title": title, "text": text}


def _cut(text: str, most: int) -> Iterator[tuple[int, str]]:
    """Passages of whole paragraphs, as many as fit, and the line each begins on; longer ones are cut between words."""
    begins, held = 1, ""
    for is_blank, lines in groupby(enumerate(text.split("\n"), start=1), lambda line: not line[1].strip()):
        if is_blank:
            continue
        numbers, paragraph = zip(*lines, strict=True)
        joined = "\n".join(line.rstrip() for line in paragraph)
        for part in [joined] if len(joined) <= most else textwrap.wrap(joined, most):
            if held and len(held) + 2 + len(part) <= most:
                held += f"\n\n{part}"
                continue
            if held:
                yield begins, held
            begins, held = numbers[0], part
    if held:
        yield begins, held
