"""Training rows: the rows of the sources, read once into Arrow tables that all ranks map into memory.

A source is a file or a data set in any of the forms of `records`; the released training archive's is a JSONL file, an
object a line with `query`, `positive` and `negative` (a string or a list). Rows of one text may be lines of a plain
text file. Nothing here knows a tokenizer.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch.utils.data import Dataset

from llm2vec.data.lines import lines_of_text
from llm2vec.data.reading import Reading, opened, rows_of
from llm2vec.data.sources import Source, find_files
from llm2vec.data.tables import cached_table, check_unchanged, stamp_of
from llm2vec.processes import rank_zero_first
from llm2vec.types import Example, InstructedText, SymmetricInstructions, TextSide, UserError

#: How a table's rows are made of records. Raise it when that changes, so that no table made the older way is taken up.
ROWS_VERSION = 4


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
        drawn_anew: whether something is drawn of a row in each epoch, so that it is asked for with the epoch's number.

    A `UserError` where a file is missing, or a line is no valid row (file, line number, what is wrong).
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
        drawn_anew: bool = False,
    ) -> None:
        self.drawn_anew = drawn_anew or any(source.reading.draw_positives for source in sources)
        self.files = find_files(folder, sources)
        self.stamps = [place_stamp(file) for file in self.files]
        self.sources = [source.located(folder) for source in sources]
        self.symmetric_instructions = symmetric_instructions
        for source in self.sources:
            if "score" in source.reading.roles and source.reading.least_score is None and not with_scores:
                raise UserError(
                    f"source {source.name!r}: its pairs have a score, so its table must say by `least_score` from "
                    "which score on a pair is a positive one."
                )
        read = [
            read_rows(file, num_negatives, with_scores, texts_alone, source.reading)
            for file, source in zip(self.files, self.sources, strict=True)
        ]
        self._tables = [table for table, _ in read]
        #: What was left out of each source, by a word for it.
        self.left_out: list[dict[str, int]] = [counts for _, counts in read]
        for file, table in zip(self.files, self._tables, strict=True):
            if len(table) <= num_held_out:
                raise UserError(f"num_eval_rows is {num_held_out}, but {file} has only {len(table)} rows.")
        self._num_held_out = num_held_out
        most = [min(n for n in (max_rows, source.reading.max_rows, 2**62) if n is not None) for source in sources]
        self._select([0] * len(most), [min(len(t) - num_held_out, n) for t, n in zip(self._tables, most, strict=True)])

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
        """Row `index` of the running count, with the instruction its source gives it.

        Where rows are drawn anew, the count goes on from epoch to epoch.
        """
        draw = int(index) if self.drawn_anew else 0
        epoch, index = divmod(int(index), len(self)) if self.drawn_anew else (0, index)
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        source, i = self.sources[which], int(index - self._starts[which]) + self._first_rows[which]
        row = self._tables[which][i]
        instruction = source.instructions[i % len(source.instructions)]
        shared = instruction.symmetric and self.symmetric_instructions == "documented"
        document_instruction = instruction.text if shared else ""
        document_side: TextSide = "query" if shared else "document"
        positives = row.get("positives") or [row["positive"]]
        positive = positives.pop((epoch + i) % len(positives))

        def documents(texts: list[str]) -> tuple[InstructedText, ...]:
            return tuple(InstructedText(document_instruction, text, document_side) for text in texts)

        return Example(
            source.name,
            InstructedText(instruction.text, row["query"]),
            documents([positive])[0],
            documents(row["negative"]),
            tuple(row.get("scores", ())),
            documents(positives),
            draw,
        )

    def place(self, index: int) -> tuple[str, int]:
        """The file of a row, and its line or row there, counted from 1."""
        index = int(index) % len(self)
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = self._tables[which][int(index - self._starts[which]) + self._first_rows[which]]
        return self.sources[which].file, int(row["row"])

    def lengths(self, indices: NDArray[np.int64], most: int | None = None) -> NDArray[np.int64]:
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


def place_stamp(place: Path) -> str:
    """The stamp of a source's file or folder; empty for a data set on the hub, which has none on this machine."""
    return stamp_of(place) if place.exists() else ""


def _stamp_or_name(place: Path, reading: Reading) -> str:
    """The same; of a data set on the hub, what its library knows it by. All ranks call this together."""
    if not (stamp := place_stamp(place)):
        with rank_zero_first():
            stamp = str(opened(place, reading)._fingerprint)
    return stamp


def read_rows(
    file: Path,
    num_negatives: int,
    with_scores: bool = False,
    texts_alone: bool = False,
    reading: Reading = Reading(),  # noqa: B008  # it cannot be changed
) -> tuple[Any, dict[str, int]]:
    """A source's rows as an Arrow-backed `datasets.Dataset`, and what was left out. Arguments as in `TrainingRows`.

    Columns: `row` (its number in the file), `query`, `positive`, `negative` (a list); if asked for `scores` (a list);
    where the reading draws from them `positives` (a list).

    Built once for a file's path and stamp (`tables.stamp_of`), then mapped; rank 0 builds, the others wait. A
    `UserError` where a record is no valid row.
    """
    from datasets import Features, List, Value

    features = Features({name: Value("string") for name in ("query", "positive")})
    features |= {"row": Value("int64"), "negative": List(Value("string"))}
    if with_scores:
        features["scores"] = List(Value("float64"))
    if reading.draw_positives and not texts_alone:
        features["positives"] = List(Value("string"))
    if file.is_file() and file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty; leave its source out of `sources` or fetch it again.")
    arguments = {
        "file": str(file.resolve() if file.exists() else file),
        "num_negatives": num_negatives,
        "with_scores": with_scores,
        "texts_alone": texts_alone,
        "reading": json.dumps(reading._replace(max_rows=None, weight=1.0, batch_size=None)),  # which change no row
        "stamps": tuple(_stamp_or_name(*place) for place in ((file, reading), *reading.texts)),
        "version": ROWS_VERSION,
    }
    return cached_table(_generate_rows, features, arguments)


def _generate_rows(
    file: str,
    num_negatives: int,
    with_scores: bool,
    texts_alone: bool,
    reading: str,
    stamps: Sequence[str],
    version: int,
) -> Generator[dict[str, Any], None, dict[str, int]]:
    left_out: Counter[str] = Counter()
    rows: Iterator[dict[str, Any]]
    empty = True
    place, how = Path(file), Reading(*json.loads(reading))
    if texts_alone and file.endswith(".txt"):
        rows = ({"row": n, "positive": text, "negative": []} for n, text in lines_of_text(place) if text)
    else:
        rows = rows_of(place, how, num_negatives, with_scores, left_out=left_out)
        if how.draw_positives and not texts_alone:
            of_records = (list(of_record) for _, of_record in groupby(rows, itemgetter("row")))
            rows = ({**some[0], "positives": [row["positive"] for row in some]} for some in of_records)
    for row in rows:
        empty = False
        yield {**row, "query": row["positive"]} if texts_alone else row
    for there, stamp in zip((place, *(text for text, _ in how.texts)), stamps, strict=True):
        if there.exists():
            check_unchanged(there, stamp)
    counts = {what: number for what, number in left_out.items() if number}
    if empty:
        why = f"; left out are {', '.join(f'{number:,} {what}' for what, number in counts.items())}" if counts else ""
        raise UserError(f"{file} holds no {'text' if texts_alone else 'row'}{why}.")
    return counts
