"""Running text in blocks: texts are tokenised, laid end to end and cut into blocks of one length, the rest dropped.

Texts come from a file of one's own, from the training sources (query and positive as one text) or from a dataset of
the hub. They are checked before a model loads and cut once, into Arrow tables that all ranks map into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llm2vec.data.lines import lines_of_text
from llm2vec.data.reading import Reading
from llm2vec.data.records import load_from_hub
from llm2vec.data.rows import ROWS_VERSION, place_stamp, read_rows
from llm2vec.data.sources import Source, find_files
from llm2vec.data.tables import cached_table, check_unchanged, stamp_of
from llm2vec.files import check_unicode, json_lines
from llm2vec.processes import rank_zero_first
from llm2vec.types import UserError

#: What the name of a file of texts ends in.
TEXT_SUFFIXES = (".txt", ".jsonl")

#: Texts that go through the tokenizer at once.
TEXTS_AT_ONCE = 1000


class SourceTexts(NamedTuple):
    """The texts of one source."""

    name: str  #: of the source
    file: Path  #: what it was read from
    table: Any  #: a `datasets.Dataset`
    columns: tuple[str, ...]  #: which of its columns a text is made of, joined by a blank line
    stamp: str = ""  #: the file's, taken before it was read; empty where it is no file of the user's
    held_out: Any = None  #: another table of the same columns that is never trained on, if the source brings one
    reading: Reading = Reading()  #: how the source is read, and its part of the mixture


class Block(NamedTuple):
    """Consecutive tokens of a source; `epoch` and `row` say for which epoch it was asked and which of all it is."""

    ids: list[int]
    epoch: int
    row: int


def texts_of_file(file: Path) -> SourceTexts:
    """A `.txt` file, a text a line, or a JSONL file of objects with `text`; a `UserError` says which line is
    neither."""
    from datasets import Features, Value

    if not file.is_file():
        raise UserError(f"dataset_file_path: {file} is not there.")
    arguments = {"file": str(file.resolve()), "stamp": stamp_of(file), "version": ROWS_VERSION}
    table, _ = cached_table(_generate_texts, Features({"text": Value("string")}), arguments)
    return SourceTexts(file.stem, file, table, ("text",), str(arguments["stamp"]))


def texts_of_sources(folder: Path, sources: Sequence[Source]) -> list[SourceTexts]:
    """The training sources, each row's query and positive as one text; a missing file or a bad line is a
    `UserError`."""
    files = find_files(folder, sources)
    places = [(source.located(folder), file, place_stamp(file)) for source, file in zip(sources, files, strict=True)]
    return [
        SourceTexts(
            source.name,
            place,
            read_rows(place, 0, reading=source.reading)[0],
            ("query", "positive"),
            stamp,
            reading=source.reading,
        )
        for source, place, stamp in places
    ]


def texts_of_hub(name: str, configuration: str | None) -> SourceTexts:
    """A dataset of the hub with a column `text`: its `train` split, and `validation` as held-out texts if it has
    one. A `UserError` where it cannot be loaded, or has no such split or column."""
    with rank_zero_first():
        splits = load_from_hub(name, "dataset_name", configuration)
    table = splits.get("train")
    if table is None or "text" not in table.column_names:
        raise UserError(f"dataset_name: {name!r} has no split `train` with a column `text`.")
    files = table.cache_files
    return SourceTexts(
        f"{name}/{configuration or 'default'}",
        Path(files[0]["filename"]) if files else Path(name),
        table,
        ("text",),
        held_out=splits.get("validation"),
    )


class TextBlocks(Dataset[Block]):
    """Blocks of all sources' texts, by one running index that goes on from epoch to epoch. `tables` are each source's,
    as `cut_into_blocks` makes them; `held_out` makes those that are never trained on, None = there are none.
    """

    def __init__(
        self, texts: Sequence[SourceTexts], tables: Sequence[Any], held_out: Callable[[], Sequence[Any]] | None = None
    ) -> None:
        self.drawn_anew = True
        self.files = [source.file for source in texts]
        self.stamps = [source.stamp for source in texts]
        self.sources = [Source(source.name, source.file.name, (), source.reading) for source in texts]
        self.sizes = [len(table) for table in tables]
        self._texts = texts
        self._tables = tables
        self._held_out = held_out
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])

    def held_out(self) -> TextBlocks:
        """The blocks that these leave out, as blocks of their own, or a `UserError` where there are none; all ranks
        call this together."""
        if self._held_out is None:
            names = ", ".join(source.name for source in self.sources)
            raise UserError(f"num_eval_rows is 0, and {names} brings no texts for evaluation; hold some blocks out.")
        return TextBlocks(self._texts, self._held_out())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Block:
        """Block `index` modulo their number, for the epoch that the index lies in."""
        epoch, row = divmod(int(index), len(self))
        which = int(np.searchsorted(self._starts, row, side="right")) - 1
        return Block(self._tables[which][row - int(self._starts[which])]["ids"], epoch, row)

    def place(self, index: int) -> tuple[str, int]:
        """The file of a block, and which of its blocks it is, counted from 1."""
        row = int(index) % len(self)
        which = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.sources[which].file, row - int(self._starts[which]) + 1

    def lengths(self, indices: NDArray[np.int64], most: int | None = None) -> NDArray[np.int64]:
        """Places of some blocks in a batch, each as long as the others."""
        return np.ones(len(indices), dtype=np.int64)


def open_blocks(
    texts: Sequence[SourceTexts],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    max_rows: int | None = None,
    num_held_out: int = 0,
) -> TextBlocks:
    """All sources' texts in blocks of `length` tokens, by a fast tokenizer; of each source at most `max_rows`.

    `num_held_out` blocks at the end of each source belong to `held_out()` instead; with 0 those of the texts that every
    source itself holds out, if they do. A `UserError` where a source's texts do not fill a block beside those.
    """
    tables = [cut_into_blocks(source.table, source.columns, tokenizer, length) for source in texts]
    for source, table in zip(texts, tables, strict=True):
        if len(table) <= num_held_out:
            raise UserError(
                f"max_seq_length: the texts of {source.file} fill {len(table)} blocks of {length} tokens, of which "
                f"{num_held_out} are held out (num_eval_rows); make blocks shorter, or bring more text."
            )
    sizes = [len(table) - num_held_out for table in tables]
    held_out: Callable[[], Sequence[Any]] | None = None
    if num_held_out:
        held_out = partial(_ends_of, tables, sizes)
    elif all(source.held_out is not None for source in texts):
        held_out = partial(_cut_held_out, texts, tokenizer, length)
    most = [
        min(size, max_rows or size, source.reading.max_rows or size) for size, source in zip(sizes, texts, strict=True)
    ]
    kept = [table.select(range(size)) for table, size in zip(tables, most, strict=True)]
    return TextBlocks(texts, kept, held_out)


def _ends_of(tables: Sequence[Any], starts: Sequence[int]) -> list[Any]:
    return [table.select(range(start, len(table))) for table, start in zip(tables, starts, strict=True)]


def _cut_held_out(texts: Sequence[SourceTexts], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Any]:
    return [cut_into_blocks(source.held_out, source.columns, tokenizer, length) for source in texts]


def cut_into_blocks(table: Any, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Any:
    """A table's texts as a `datasets.Dataset` of blocks, `ids`: built once for its arguments, then mapped.

    Texts without any character but blanks are left out. Each text stands behind the tokenizer's BOS, if there is one
    (also where the tokenizer does not write it by itself), and nothing else stands between two texts. A `UserError`
    where they do not fill a block.
    """
    from datasets import Features, List, Value

    arguments = {
        "texts": table,
        "columns": "\n".join(columns),
        "tokenizer": _bare(tokenizer),
        "bos": -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "length": length,
    }
    return cached_table(_generate_blocks, Features({"ids": List(Value("int32"))}), arguments)[0]


def _bare(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's rules, without the padding and truncation that some call may have left on it."""
    rules = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rules.no_padding()
    rules.no_truncation()
    return str(rules.to_str())


def _generate_texts(file: str, stamp: str, version: int) -> Iterator[dict[str, str]]:
    lines = (text for _, text in lines_of_text(Path(file)))
    empty = True
    for text in filter(None, lines if file.endswith(".txt") else _texts_of_objects(Path(file))):
        empty = False
        yield {"text": text}
    check_unchanged(Path(file), stamp)
    if empty:
        raise UserError(f"dataset_file_path: {file} holds no text.")


def _texts_of_objects(file: Path) -> Iterator[str]:
    for where, row in json_lines(file):
        if not isinstance(row.get("text"), str):
            raise UserError(f"{where}: a JSON object with a string `text` is needed.")
        yield check_unicode(row["text"], "text", where).strip()


def _generate_blocks(texts: Any, columns: str, tokenizer: str, bos: int, length: int) -> Iterator[dict[str, list[int]]]:
    rules = Tokenizer.from_str(tokenizer)
    rules.encode_special_tokens = True  # "</s>" inside a text stays text
    rest: list[int] = []
    empty = True
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        rows = texts[start : start + TEXTS_AT_ONCE]
        parts_of_each = zip(*(rows[name] for name in columns.split("\n")), strict=True)
        joined = ["\n\n".join(part or "" for part in parts) for parts in parts_of_each]  # a dataset may hold nulls
        for encoding in rules.encode_batch([text for text in joined if text.strip()], add_special_tokens=False):
            rest += [bos] * (bos >= 0)
            rest += encoding.ids
        whole = len(rest) - len(rest) % length
        empty = empty and not whole
        yield from ({"ids": rest[i : i + length]} for i in range(0, whole, length))
        rest = rest[whole:]
    if empty:
        raise UserError(
            f"max_seq_length is {length}, but a source's {len(texts)} texts have {len(rest)} tokens in all; make "
            "blocks shorter, or bring more text."
        )
