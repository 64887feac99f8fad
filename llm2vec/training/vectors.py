"""Vectors of another, stronger model for the texts of a run: a guide's or a teacher's.

    llm2vec encode run.json output/vectors --model STRONGER

writes them, a folder for each instruction and side of the texts, with the files of every encoding:

    VECTORS/**/part-*.parquet   `id`: 16 hexadecimal digits, `negatives.hash_of` instruction and text; `vector`
    VECTORS/**/_manifest.json   whose vectors they are (may be missing where another program wrote them)

They are read once, into an Arrow table that all processes map into memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from llm2vec.data.tables import cached_table, stamp_of
from llm2vec.files import read_object
from llm2vec.objectives.negatives import hash_of
from llm2vec.training.config import Config
from llm2vec.types import Example, InstructedText, TextSide, UserError, in_one_sentence


class StoredVectors:
    """The vectors of a folder's Parquet files, in it or below it, by text; each has `width` numbers.

    A `UserError` where there are no such files, or they are of different models or widths, or of an encoding that was
    not finished.

    Example:
        >>> vectors = StoredVectors(Path("output/vectors"))
        >>> vectors([InstructedText("", "hello world")]).shape
        torch.Size([1, 384])
    """

    def __init__(self, folder: Path) -> None:
        from datasets import Features, List, Value

        found = {path: path.relative_to(folder).parts for path in sorted(folder.rglob("*.parquet"))}
        files = [path for path, parts in found.items() if not any(part.startswith(".") for part in parts)]
        if not files:
            raise UserError(f"{folder} holds no Parquet files of vectors; write them by `llm2vec encode CONFIG`.")
        self.folder = folder
        self.width = _one("width", {_width(file): file for file in files})
        manifests = {file.parent / "_manifest.json" for file in files}
        said = {path: read_object(path) for path in sorted(manifests) if path.is_file()}
        if unfinished := [path.parent for path, content in said.items() if content.get("complete") is not True]:
            raise UserError(f"{unfinished[0]}: not all of it is encoded yet; start its encoding again.")
        if models := {content.get("settings", {}).get("model"): path.parent for path, content in said.items()}:
            _one("model", models)
        features = Features({"hash": Value("int64"), "vector": List(Value("float32"), length=self.width)})
        arguments = {"files": "\n".join(map(str, files)), "stamps": "\n".join(map(stamp_of, files))}
        self._table = cached_table(_generate_vectors, features, arguments)[0].with_format("numpy")
        hash_N = self._table.with_format("arrow")["hash"]
        self._hash_N = np.concatenate([chunk.to_numpy() for chunk in hash_N.chunks])
        self._order_N = np.argsort(self._hash_N, kind="stable")

    def __call__(self, texts: Sequence[InstructedText]) -> Tensor:
        """Their vectors [texts, width], in float32. A `UserError` where one is missing."""
        place_N, is_there_N = self._find(texts)
        if not is_there_N.all():
            missing = texts[int(is_there_N.argmin())].text
            raise UserError(f"{self.folder} holds no vector of {missing[:60]!r}; encode the run's texts.")
        return torch.from_numpy(np.stack(self._table[place_N]["vector"]).astype(np.float32))

    def missing(self, texts: Sequence[InstructedText]) -> list[InstructedText]:
        """Those that have no vector."""
        return [text for text, is_there in zip(texts, self._find(texts)[1], strict=True) if not is_there]

    def check(self, rows: Iterable[Example]) -> None:
        """Refuse rows with a text that has no vector. A `UserError` says how many texts, and one of them."""
        number, first = 0, None
        for row in rows:
            if missing := self.missing([row.query, row.positive, *row.negatives, *row.others]):
                first = first or missing[0]
                number += len(missing)
        if first is not None:
            raise UserError(
                f"{self.folder} lacks the vectors of {number:,} of the run's texts, such as {first.text[:60]!r}; "
                "encode the same rows under the same instructions."
            )

    def _find(self, texts: Sequence[InstructedText]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Where the texts' vectors stand, and whether they do."""
        wanted_N = np.array([hash_of(text) for text in texts], dtype=np.int64)
        at_N = np.searchsorted(self._hash_N, wanted_N, sorter=self._order_N)
        place_N = self._order_N[np.minimum(at_N, len(self._order_N) - 1)]
        return place_N, self._hash_N[place_N] == wanted_N


def stored_vectors(folder: str | None) -> StoredVectors | None:
    """The vectors that a key names, opened once in a process while they stay as they are; None where it names none, or
    the model itself."""
    return None if folder in (None, "self") else _opened(Path(str(folder)), stamp_of(Path(str(folder))))


@functools.lru_cache(maxsize=2)  # a guide's and a teacher's
def _opened(folder: Path, stamp: str) -> StoredVectors:
    return StoredVectors(folder)


def folders_of_vectors(config: Config) -> list[str]:
    """The folders that its keys name."""
    return sorted({config.guide, config.teacher_vectors} - {None, "self"})  # type: ignore[arg-type]


def check_vectors(config: Config, rows: Any) -> None:
    """Refuse a run that lacks a vector which its config wants: a `UserError` with the folder, how many texts, and
    one of them."""
    for folder in folders_of_vectors(config):
        if (vectors := stored_vectors(folder)) is not None:
            vectors.check(all_rows(config, rows))


def all_rows(config: Config, rows: Any) -> Iterator[Example]:
    """The training rows, and those that are held out of them."""
    for of_kind in (rows, rows.held_out()) if config.num_eval_rows else (rows,):
        yield from (of_kind[i] for i in range(len(of_kind)))


def texts_to_encode(rows: Iterable[Example]) -> dict[tuple[TextSide, str], dict[str, str]]:
    """All texts of rows: by side and instruction, the id and the text of each once."""
    found: dict[tuple[TextSide, str], dict[str, str]] = {}
    for row in rows:
        for text in (row.query, row.positive, *row.negatives, *row.others):
            found.setdefault((text.side, text.instruction), {})[f"{hash_of(text):016x}"] = text.text
    return found


def _one(what: str, found: dict[Any, Path]) -> Any:
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise UserError(f"{one} and {other} hold vectors of another {what} each ({first} and {second}); encode anew.")
    return next(iter(found))


def _width(file: Path) -> int:
    with in_one_sentence(lambda why: f"{file}: not a whole Parquet file ({why}).", (pa.ArrowException, OSError)):
        schema = pq.read_schema(file)
    if not {"id", "vector"} <= set(schema.names) or not pa.types.is_fixed_size_list(schema.field("vector").type):
        raise UserError(f"{file}: the columns `id` and `vector`, of lists of one size, are needed.")
    return int(schema.field("vector").type.list_size)


def _generate_vectors(files: str, stamps: str) -> Iterator[dict[str, Any]]:
    for file in files.split("\n"):
        for batch in pq.ParquetFile(file).iter_batches(columns=["id", "vector"]):
            vectors = batch["vector"].flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
            for name, vector in zip(batch["id"].to_pylist(), vectors.astype(np.float32), strict=True):
                try:
                    yield {"hash": int(name, 16), "vector": vector}
                except ValueError:
                    raise UserError(f"{file}: the id {name!r} is no hash of a text, 16 hexadecimal digits.") from None
