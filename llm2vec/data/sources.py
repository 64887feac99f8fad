"""Sources of training rows: a table of names, files and instructions; the paper's, or one's own.

The paper's 14 sources (Table 6 of arXiv 2509.03020) are `e5_sources.json` beside this file. Its form is that of
`sources_file`, so a table of one's own may begin as a copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm2vec.files import read_object
from llm2vec.types import UserError

#: The released training archive: one file for each of the paper's sources.
E5_TABLE = Path(__file__).with_name("e5_sources.json")

#: Where the released training archive is to be had.
ARCHIVE_HINT = (
    "the training archive (echo-data, 14 files, 3.6 GB) is linked from "
    "https://github.com/jakespringer/echo-embeddings#training; unpack it there, or list the `sources` you have"
)


class Instruction(NamedTuple):
    """An instruction, and whether the documents of its rows carry it too."""

    text: str
    symmetric: bool = False


class Source(NamedTuple):
    """A file of rows. Row i of a source is read under instruction i modulo their number.

    Example:
        Source("faq", "faq.jsonl", (Instruction("Given a question, retrieve its answer"),))
    """

    name: str
    file: str
    instructions: tuple[Instruction, ...]


def e5_sources() -> list[Source]:
    """The released archive: one `<source>.jsonl` for each of the paper's 14 sources."""
    return read_sources_file(E5_TABLE)


def read_sources_file(path: Path) -> list[Source]:
    """Sources from a JSON table: name -> {"file", "instruction", "symmetric"}.

    `instruction` may be empty, or a list (rows take them in turn). `symmetric` (default false) puts it on the
    documents too; beside a list of instructions it may be a list as long.

    Raises:
        UserError: the file is missing, no JSON object, or an entry has an unknown key or a wrong type.
    """
    table = read_object(path, f"sources_file: {path}")
    if not table:
        raise UserError(f"sources_file: {path} must hold an object that maps source names to tables.")
    return [_read_source(f"sources_file: {path}, source {name!r}", name, entry) for name, entry in table.items()]


def _read_source(where: str, name: str, entry: Any) -> Source:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: an object with file, instruction and symmetric is needed.")
    unknown = sorted(set(entry) - {"file", "instruction", "symmetric"})
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known: file, instruction, symmetric.")
    file, texts, symmetric = entry.get("file"), entry.get("instruction", ""), entry.get("symmetric", False)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(file, str) or not file:
        raise UserError(f"{where}: `file` must name a JSONL file.")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: `instruction` must be a string or a list of strings.")
    of_each = symmetric if isinstance(symmetric, list) else [symmetric] * len(texts)
    if len(of_each) != len(texts) or not all(isinstance(value, bool) for value in of_each):
        raise UserError(f"{where}: `symmetric` must be true or false, or a list of these, one for each instruction.")
    return Source(name, file, tuple(map(Instruction, texts, of_each)))


def select_sources(sources: Sequence[Source], names: Sequence[str] | None) -> list[Source]:
    """The named sources, in the table's order; all of them for None.

    Raises:
        UserError: an unknown name, or none at all.
    """
    known = [source.name for source in sources]
    if names is not None and not names:
        raise UserError(f"sources: the list is empty; leave the key out for all of them: {', '.join(known)}.")
    for name in names or ():
        if name not in known:
            raise UserError(f"sources: {name!r} is not known; known: {', '.join(known)}.")
    return [source for source in sources if names is None or source.name in names]


def find_files(folder: Path, sources: Sequence[Source]) -> list[Path]:
    """The sources' files in `folder`.

    Raises:
        UserError: the folder or a file is not there; says what was looked for and, of the paper's sources, where to
            get it.
    """
    files = [folder / source.file for source in sources]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        what = f"lacks {', '.join(missing)}" if folder.is_dir() else f"is not a folder (wanted: {', '.join(missing)})"
        raise UserError(f"dataset_file_path: {folder} {what}{archive_hint(sources)}.")
    return files


def sources_there(folder: Path, table: Path | None, names: Sequence[str] | None) -> tuple[list[Source], list[str]]:
    """The sources whose files lie in `folder`, and the files that do not.

    Args:
        folder: where to look.
        table: of one's own sources; None = the released archive's.
        names: which; None = all that are there.

    Raises:
        UserError: a source asked for by name has no file, or none has.
    """
    sources = select_sources(e5_sources() if table is None else read_sources_file(table), names)
    there = [source for source in sources if (folder / source.file).is_file()]
    missing = [source.file for source in sources if source not in there]
    if missing and (names or not there):
        raise UserError(f"{folder} lacks {', '.join(missing)}{archive_hint(sources)}.")
    return there, missing


def archive_hint(sources: Sequence[Source]) -> str:
    """The end of a sentence that says where the sources' files are to be had; empty for one's own."""
    of_archive = {(source.name, source.file) for source in e5_sources()}
    return f"; {ARCHIVE_HINT}" if {(source.name, source.file) for source in sources} <= of_archive else ""
