"""Records: what a file, a saved data set or a data set of the hub holds, one after the other, each with its place.

Nothing is known here of what the columns mean; `reading` makes rows of them.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from llm2vec.files import parse_object
from llm2vec.types import UserError, first_line, in_one_sentence

#: What `save_to_disk` of `datasets` leaves in a folder: of one split, or of several.
SAVED_FILES = ("state.json", "dataset_dict.json")
#: Records that are turned into Python objects at once.
AT_ONCE = 1000
#: Characters of a cell of a CSV file; Python's own limit of 131,072 is less than a long document has.
LARGEST_CELL = 1 << 30

#: Columns and their values. A line of JSONL comes as it stands, so that one can go on behind a bad one (`parsed`).
Record: TypeAlias = bytes | Mapping[str, Any]
#: Its place, to begin a message with (`faq.csv, row 3`), and the record.
Placed: TypeAlias = tuple[str, Record]


def parsed(record: Record, where: str) -> Mapping[str, Any]:
    """The columns of a record; a `UserError`, which begins with `where`, if a line is no JSON object."""
    return parse_object(record, where) if isinstance(record, bytes) else record


def records_of_file(file: Path, columns: Sequence[str] = (), name: str = "") -> Iterator[Placed]:
    """The records of a file whose name ends in `.jsonl.gz`, `.parquet`, `.csv`, `.tsv` or `.arrow`; any other is JSONL.

    Rows of a table are counted from 1 (a CSV file's header is none), and an empty cell of a CSV file is null.

    `columns` are those that are wanted, where all of them are there; empty = all. Only Parquet files are faster for it.
    `name` is the file's in messages; empty = its path. A `UserError` where the file cannot be read, or is not what its
    name says.
    """
    name = name or str(file)
    reader = next((read for form, read in _READERS.items() if file.name.endswith(form)), _lines)
    try:
        if file.is_char_device() or file.is_block_device():  # /dev/zero has no end
            raise UserError(f"{name}: cannot be read (it is a device).")
        yield from reader(file, columns, name)
    except (OSError, EOFError) as error:
        if reason := getattr(error, "strerror", None):
            raise UserError(f"{name}: cannot be read ({reason}).") from error
        raise UserError(f"{name}: not a whole {_kind(file)} file ({first_line(error)}).") from error  # of gzip


def _kind(file: Path) -> str:
    return {".gz": "gzip", ".parquet": "Parquet", ".arrow": "Arrow"}.get(file.suffix, file.suffix[1:].upper())


def records_of_table(table: Any, columns: Sequence[str] = (), name: str = "") -> Iterator[Placed]:
    """The same of a `datasets.Dataset`."""
    if columns and set(columns) <= set(table.column_names):
        table = table.select_columns(list(columns))
    return _numbered((batch.to_pylist() for batch in table.with_format("arrow").iter(AT_ONCE)), name)


def _numbered(batches: Iterable[Sequence[Mapping[str, Any]]], name: str) -> Iterator[Placed]:
    rows = (row for batch in batches for row in batch)
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))


def _lines(file: Path, columns: Sequence[str], name: str) -> Iterator[Placed]:
    with gzip.open(file) if file.name.endswith(".jsonl.gz") else file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield f"{name}, line {number}", line


def _cells(file: Path, columns: Sequence[str], name: str) -> Iterator[Placed]:
    """Of CSV and TSV files. By Python's own reader: others guess types, and read the text "NA" as nothing."""
    csv.field_size_limit(LARGEST_CELL)
    place = name
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            header = next(rows, [])
            if len(set(header)) < len(header):
                twice = next(column for column in header if header.count(column) > 1)
                raise UserError(f"{name}: the header names the column {twice!r} twice.")
            for number, cells in enumerate(rows, start=1):
                place = f"{name}, row {number}"
                if len(cells) != len(header):
                    raise UserError(f"{place}: {len(cells)} cells, but the header names {len(header)} columns.")
                yield place, {column: cell or None for column, cell in zip(header, cells, strict=True)}
    except UnicodeDecodeError as error:
        raise UserError(f"{place} or behind it: not valid UTF-8 ({error}).") from error
    except csv.Error as error:
        raise UserError(f"{place} or behind it: not valid {_kind(file)} ({error}).") from error


def _batches(file: Path, columns: Sequence[str], name: str) -> Iterator[Placed]:
    """Of Parquet and Arrow files."""
    import pyarrow as pa  # comes with datasets

    damages = (pa.ArrowException, OSError, UnicodeDecodeError)  # what is damaged where decides which
    with in_one_sentence(lambda why: f"{name}: not a whole {_kind(file)} file ({why}).", damages):
        found = (_parquet if file.suffix == ".parquet" else _arrow)(file, columns)
        yield from _numbered((batch.to_pylist() for batch in found), name)


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        wanted = list(columns) if columns and set(columns) <= set(table.schema_arrow.names) else None
        yield from table.iter_batches(AT_ONCE, columns=wanted)


def _arrow(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as content:
        is_file = content.read(6) == b"ARROW1"  # else a stream, as datasets writes it
        content.seek(0)
        reader = pa.ipc.open_file(content) if is_file else pa.ipc.open_stream(content)
        yield from map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader


_READERS = {".csv": _cells, ".tsv": _cells, ".parquet": _batches, ".arrow": _batches}


# --- data sets ---


def load_from_hub(path: str, where: str, config: str | None = None, **arguments: Any) -> Any:
    """`datasets.load_dataset`, by a name on the hub or of a folder in the hub's layout; its code is never run. A
    `UserError` begins with `where`."""
    from datasets import load_dataset

    # Not found, out of reach, no such configuration: each raises types of its own.
    with in_one_sentence(lambda why: f"{where}: {path!r} could not be loaded from the hub ({why})."):
        return load_dataset(path, config, **arguments)


def is_saved(folder: Path) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return any((folder / name).is_file() for name in SAVED_FILES)


def load_saved(folder: Path, split: str | None) -> Any:
    """A data set that `save_to_disk` wrote, or one of its splits (None = `train`); else a `UserError`."""
    from datasets import DatasetDict, load_from_disk

    # A file that is missing or damaged: each raises types of its own.
    with in_one_sentence(lambda why: f"{folder}: not a data set that save_to_disk wrote ({why})."):
        table = load_from_disk(str(folder))
    if not isinstance(table, DatasetDict):
        return table
    split = split or "train"
    if split not in table:
        raise UserError(f"{folder}: there is no split {split!r}; there are {', '.join(table)}.")
    return table[split]
