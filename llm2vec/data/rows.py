"""Training rows: the lines of the sources' files, read once into Arrow tables that all ranks map into memory.

A source is one JSONL file, one object a line with `query`, `positive` and `negative` (a string or a list), the
layout of the released training archive; rows of one text may be lines of a plain text file. Nothing here knows a
tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset

from llm2vec.data.lines import parse_line, parse_row
from llm2vec.data.sources import Source, find_files
from llm2vec.data.tables import cached_table, check_unchanged, stamp_of
from llm2vec.types import Example, InstructedText, SymmetricInstructions, TextSide, UserError

#: How a table's rows are made of lines. Raise it when that changes, so that no table made the older way is taken up.
ROWS_VERSION = 3


class TrainingRows(Dataset[Example]):
    """All rows of all sources, by one running index.

    Args:
        folder: where the sources' files lie.
        sources: what to read; all files must be there.
        num_negatives: hard negatives a row (the first that many); 0 = none are read.
        symmetric_instructions: `documented` puts a symmetric instruction on documents too (paper Table 6), which
            then take a query's form, `as_released` on queries only.
        max_rows: most rows of each source, from the start of its file; None = all.
        num_held_out: rows at the end of each source's file that belong to `held_out()` instead.
        with_scores: read a teacher's scores too; every row must have them.
        texts_alone: rows of one text that is its own positive: a line of a `.txt` file, or the `positive` of a JSONL
            file's row.

    Raises:
        UserError: a file is missing, or a line is no valid row (file, line number, what is wrong).
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        *,
        num_negatives: int = 1,
        symmetric_instructions: SymmetricInstructions = "documented",
        max_rows: int | None = None,
        num_held_out: int = 0,
        with_scores: bool = False,
        texts_alone: bool = False,
    ) -> None:
        self.drawn_anew = False
        self.files = find_files(folder, sources)
        self.stamps = [stamp_of(file) for file in self.files]
        self.sources = list(sources)
        self.symmetric_instructions = symmetric_instructions
        self._tables = [read_rows(file, num_negatives, with_scores, texts_alone) for file in self.files]
        for file, table in zip(self.files, self._tables, strict=True):
            if len(table) <= num_held_out:
                raise UserError(f"num_eval_rows is {num_held_out}, but {file} has only {len(table)} rows.")
        self._num_held_out = num_held_out
        available = [len(table) - num_held_out for table in self._tables]
        self._select([0] * len(available), [n if max_rows is None else min(n, max_rows) for n in available])

    def _select(self, first_rows: list[int], sizes: list[int]) -> None:
        self._first_rows = first_rows
        self.sizes = sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def held_out(self) -> TrainingRows:
        """The rows at the end of each file that these leave out, as rows of their own."""
        rows = copy.copy(self)
        first = [len(table) - self._num_held_out for table in self._tables]
        rows._select(first, [self._num_held_out] * len(first))
        return rows

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        """Row `index` of the running count, with the instruction its source gives it."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        source, i = self.sources[which], int(index - self._starts[which]) + self._first_rows[which]
        row = self._tables[which][i]
        instruction = source.instructions[i % len(source.instructions)]
        shared = instruction.symmetric and self.symmetric_instructions == "documented"
        document_instruction = instruction.text if shared else ""
        document_side: TextSide = "query" if shared else "document"
        return Example(
            source.name,
            InstructedText(instruction.text, row["query"]),
            InstructedText(document_instruction, row["positive"], document_side),
            tuple(InstructedText(document_instruction, text, document_side) for text in row["negative"]),
            tuple(row.get("scores", ())),
        )

    def place(self, index: int) -> tuple[str, int]:
        """The file of a row, and its line there, counted from 1; blank lines of a text file do not count."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[which].file, int(index - self._starts[which]) + self._first_rows[which] + 1

    def lengths(
        self, indices: np.ndarray[Any, np.dtype[np.int64]], most: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Characters of the texts of some rows, all of one source; `most` = what a text counts at most."""
        which = int(np.searchsorted(self._starts, indices[0], side="right")) - 1
        places = indices - self._starts[which] + self._first_rows[which]
        columns = self._tables[which].with_format("arrow")[places]
        total = np.zeros(len(indices), dtype=np.int64)
        for name in ("query", "positive", "negative"):
            # A chunk a row; their texts are not copied together, which may be more than one array can hold.
            texts = pc.list_flatten(columns[name]) if name == "negative" else columns[name]
            characters = pc.utf8_length(texts).to_numpy().reshape(len(indices), -1)
            total += (characters if most is None else characters.clip(max=most)).sum(axis=1)
        return total


def read_rows(file: Path, num_negatives: int, with_scores: bool = False, texts_alone: bool = False) -> Any:
    """A source's rows as an Arrow-backed `datasets.Dataset` with `query`, `positive`, `negative` (a list) and, if
    asked for, `scores` (a list); arguments as in `TrainingRows`.

    Built once for a file's path and stamp (`cached_tables.stamp_of`), then mapped; rank 0 builds, the others wait.

    Raises:
        UserError: a line is no valid row.
    """
    from datasets import Features, List, Value

    features = Features({"query": Value("string"), "positive": Value("string"), "negative": List(Value("string"))})
    if with_scores:
        features["scores"] = List(Value("float64"))
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty; leave its source out of `sources` or fetch it again.")
    arguments = {
        "file": str(file.resolve()),
        "num_negatives": num_negatives,
        "with_scores": with_scores,
        "texts_alone": texts_alone,
        "stamp": stamp_of(file),
        "version": ROWS_VERSION,
    }
    return cached_table(_generate_rows, features, arguments)


def _generate_rows(
    file: str, num_negatives: int, with_scores: bool, texts_alone: bool, stamp: str, version: int
) -> Iterator[dict[str, Any]]:
    empty = True
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            if not texts_alone:
                row = parse_row(line, num_negatives, where, with_scores)
            else:
                text = parse_line(line, where) if file.endswith(".txt") else parse_row(line, 0, where)["positive"]
                if not text:
                    continue
                row = {"query": text, "positive": text, "negative": []}
            empty = False
            yield row
    check_unchanged(Path(file), stamp)
    if empty:
        raise UserError(f"{file} holds no text.")
