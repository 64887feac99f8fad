"""Rows of a corpus, `id` and `text`: of JSONL or Parquet files, or of a dataset on the hub; read once, in order.

Every row is checked as it is read, whatever it comes from. `cut_into_shards` copies the rows to one Parquet file a
shard: shards can then be encoded anywhere and in any order, and nothing wrong is found after hours of encoding.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm2vec.data.records import load_from_hub, parsed, records_of_file
from llm2vec.files import check_unicode, sha256, whole_folder
from llm2vec.types import UserError, in_one_sentence

logger = logging.getLogger(__name__)

#: Schema of a shard's file of texts.
TEXTS = pa.schema([("id", pa.string()), ("text", pa.string())])


class CorpusRow(NamedTuple):
    """One text and its name."""

    id: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Where rows are read from."""

    files: tuple[Path, ...] = ()  #: JSONL or Parquet files, read one after the other; none for a dataset of the hub
    dataset: str | None = None  #: name of a dataset on the hub
    subset: str | None = None  #: its configuration; None = its only or default one
    split: str | None = None  #: its split
    revision: str | None = None  #: its commit
    text_column: str = "text"  #: name of the column of texts
    #: name of the column of ids, strings or whole numbers; None = ids are the rows' numbers, from 0
    id_column: str | None = "id"

    def identity(self) -> dict[str, Any]:
        """Everything that decides the rows: names, sizes and hashes of files, or a dataset's commit."""
        columns = {"text_column": self.text_column, "id_column": self.id_column}
        if self.dataset is not None:
            hub = {"dataset": self.dataset, "subset": self.subset, "split": self.split, "revision": self.revision}
            return {"input": hub, **columns}
        files = [{"file": file.name, "size": file.stat().st_size, "sha256": sha256(file)} for file in self.files]
        return {"input": files, **columns}

    def rows(self) -> Iterator[CorpusRow]:
        """All rows, checked. A `UserError` says where a file is not what its name says, or a row lacks a column or
        holds no text."""
        for number, (where, row) in enumerate(self.unchecked_rows()):
            for column in (self.id_column, self.text_column):
                if column is not None and column not in row:
                    raise UserError(f"{where}: there is no column {column!r}; there are {', '.join(row) or 'none'}.")
            name, text = number if self.id_column is None else row[self.id_column], row[self.text_column]
            if not isinstance(name, str | int) or isinstance(name, bool):
                raise UserError(
                    f"{where}: {self.id_column!r} must be a string or a whole number, not {_type_name(name)}."
                )
            if not isinstance(text, str):
                raise UserError(f"{where}: {self.text_column!r} must be a string, not {_type_name(text)}.")
            yield CorpusRow(
                check_unicode(str(name), self.id_column or "id", where), check_unicode(text, self.text_column, where)
            )

    def unchecked_rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Where each row stands, for a message, and its columns."""
        wanted = [column for column in (self.id_column, self.text_column) if column is not None]
        if self.dataset is not None:
            # As a stream: the copy that datasets would keep is made here, shard by shard.
            where, arguments = "the corpus", {"split": self.split, "revision": self.revision, "streaming": True}
            rows = load_from_hub(self.dataset, where, self.subset, **arguments)
            for number, row in enumerate(rows, start=1):
                yield f"{self.dataset}, split {self.split}, row {number}", row
        for file in self.files:
            yield from ((where, parsed(record, where)) for where, record in records_of_file(file, wanted))


def open_corpus(
    name: str,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    subset: str | None = None,
    split: str | None = None,
) -> Corpus:
    """The corpus of a `.jsonl` or `.parquet` file, a folder of files of one of these kinds, or a dataset on the hub, of
    which a `subset` and a `split` (None = `train`) may be given; at most the first row is read.

    Without an `id_column` it is `id` if the first row has it, else the rows' numbers. A `UserError` where there is
    nothing of this name, or `subset` or `split` is given for files.
    """
    path = Path(name)
    if path.exists():
        if subset is not None or split is not None:
            raise UserError(f"--subset and --split are for datasets of the hub; {name} is on this machine.")
        corpus = Corpus(_find_files(path))
    elif path.suffix in (".jsonl", ".parquet") or len(path.parts) > 2 or path.is_absolute():
        raise UserError(f"There is no file or folder {name}.")
    else:
        corpus = Corpus(dataset=name, subset=subset, split=split or "train", revision=_hub_revision(name))
    if id_column is None:
        _, first = next(corpus.unchecked_rows(), ("", {"id": None}))
        id_column = "id" if "id" in first else None
        if id_column is None:
            logger.info("%s has no column 'id': rows are named by their numbers, from 0", name)
    return dataclasses.replace(corpus, text_column=text_column, id_column=id_column)


def cut_into_shards(
    rows: Iterable[CorpusRow], folder: Path, shard_rows: int, file_name: Callable[[int], str]
) -> list[int]:
    """Copy rows, in order, to a folder that is not there yet, `shard_rows` a file, whose name comes of its number from
    0; returns how many each has. A `UserError` where there are no rows, or an id comes twice.

    The folder is written aside and renamed. Memory holds one shard, and at the end all ids.
    """
    sizes: list[int] = []
    remaining = iter(rows)
    with whole_folder(folder) as aside:
        while shard := list(islice(remaining, shard_rows)):
            table = pa.Table.from_pylist([row._asdict() for row in shard], schema=TEXTS)
            pq.write_table(table, aside / file_name(len(sizes)), compression="zstd")
            sizes.append(len(shard))
        if not sizes:
            raise UserError("The input has no rows.")
        _check_ids([aside / file_name(number) for number in range(len(sizes))])
    return sizes


def _check_ids(files: Iterable[Path]) -> None:
    ids = pa.chunked_array([chunk for file in files for chunk in pq.read_table(file, columns=["id"])["id"].chunks])
    ids = ids.cast(pa.large_string())  # of strings, Arrow counts no more than 2 GB of different ones
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        name = twice.field("values")[0]
        first, second, *_ = pc.indices_nonzero(pc.equal(ids, name)).to_pylist()
        raise UserError(
            f"The id {name.as_py()!r} comes twice, in rows {first + 1} and {second + 1} of the input "
            f"({len(twice):,} ids come more than once); every id must be different."
        )


def _find_files(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        if path.suffix not in (".jsonl", ".parquet"):
            raise UserError(f"{path}: a .jsonl or a .parquet file is needed.")
        return (path,)
    files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith((".", "_"))]
    found = {suffix: [f for f in files if f.suffix == suffix] for suffix in (".jsonl", ".parquet")}
    if bool(found[".jsonl"]) == bool(found[".parquet"]):
        raise UserError(
            f"{path}: a folder of either .jsonl or .parquet files is needed; there are {len(found['.jsonl'])} and "
            f"{len(found['.parquet'])}."
        )
    return tuple(found[".jsonl"] or found[".parquet"])


def _hub_revision(name: str) -> str:
    from huggingface_hub import HfApi

    nothing = f"There is no file or folder {name}, and no such dataset was found on the hub"
    with in_one_sentence(lambda why: f"{nothing} ({why})."):  # not found, no access, out of reach, no possible name
        return str(HfApi().dataset_info(name).sha)


def _type_name(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
