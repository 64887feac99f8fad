"""What is in a folder of training rows: a report a source, and texts that test sets hold too.

Reads every record in a stream, by the same rules as training (`reading.rows_of`), but goes on behind a bad one and
counts it. Languages (an extra: `pip install -e ".[data]"`) and tokens are read off an evenly spaced sample.

Run by `llm2vec check-data`. Loads no torch.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec.data.reading import content_of, records_of, rows_of
from llm2vec.data.records import LARGEST_CELL, records_of_file
from llm2vec.data.sources import Source
from llm2vec.data.tables import content_hash
from llm2vec.files import parse_json, read_object, sha256, write_json
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

#: Rows of a source whose languages and tokens are looked at.
SAMPLE = 2000
#: Words of a run that two texts must share to overlap where neither is the other (13, as in GPT-3's data report).
OVERLAP_WORDS = 13
#: Shorter test texts ("Paris") are met everywhere by chance; whole or in part, they are not looked for.
LEAST_WORDS = 5
#: Bad lines that a report quotes.
SHOWN = 3

TEXT_FILES = (".jsonl", ".json", ".tsv", ".csv", ".parquet")

CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass
class SourceReport:
    """What a source's file holds."""

    name: str  #: of the source
    sha256: str = ""  #: of its file or folder (and of the texts behind its ids); empty for a data set on the hub
    num_bytes: int = 0
    rows: int = 0  #: that training would take
    bad: int = 0  #: records that it would not
    errors: list[str] = field(default_factory=list)  #: the first of them
    duplicates: int = 0  #: rows whose query and positive an earlier row has
    repeated_queries: int = 0  #: rows whose query an earlier row has
    query_is_positive: int = 0  #: rows in which the two texts are the same
    positive_is_negative: int = 0  #: the same of the positive and a negative
    without_negative: int = 0  #: rows with which `num_hard_negatives: 1` cannot train
    beaten: int = 0  #: rows with scores, in which a negative's is above the positive's
    left_out: Counter[str] = field(default_factory=Counter)  #: what its table leaves out, by a word for it
    tokens: dict[str, list[int]] = field(default_factory=dict)  #: of the sampled texts, by field
    #: Of the sampled texts, by field; empty without the language identifier.
    languages: dict[str, Counter[str]] = field(default_factory=dict)
    #: Rows that share a text with a test set, by test set; a row counts once for each.
    overlap: Counter[str] = field(default_factory=Counter)


class TestTexts:
    """The texts of test sets, to find them in training rows: whole, or by `OVERLAP_WORDS` words in a row.

    Case, punctuation and white space do not count. Each folder is a test set, named after it: all text in its JSONL,
    JSON, CSV, TSV and Parquet files. A `UserError` where one is not there or holds no text.
    """

    __test__ = False  # pytest: not a test, whatever its name says

    def __init__(self, folders: Sequence[Path]) -> None:
        self.sizes: dict[str, int] = {}
        # A test set is a bit: millions of runs of words, each with a set of names, would be gigabytes.
        self._known: dict[int, int] = {}
        for number, folder in enumerate(folders):
            if not folder.is_dir():
                raise UserError(f"--test_sets: {folder} is not a folder.")
            name = folder.name
            if name in self.sizes:
                raise UserError(f"--test_sets: {folder} and another folder are both called {name!r}; rename one.")
            texts = {text: None for text in map(_words, texts_of_folder(folder)) if len(text) >= LEAST_WORDS}
            if not texts:
                raise UserError(
                    f"--test_sets: {folder} holds no text of {LEAST_WORDS} words or more in its "
                    f"{', '.join(TEXT_FILES)} files."
                )
            self.sizes[name] = len(texts)
            for part in chain.from_iterable(map(_whole_and_runs, texts)):
                self._known[part] = self._known.get(part, 0) | 1 << number

    def found_in(self, texts: Iterable[str]) -> set[str]:
        """Names of the test sets that share a text, or `OVERLAP_WORDS` words in a row, with any of these."""
        found = 0
        for part in chain.from_iterable(_whole_and_runs(_words(text)) for text in texts):
            found |= self._known.get(part, 0)
        return {name for number, name in enumerate(self.sizes) if found >> number & 1}


def check_source(
    source: Source, folder: Path, count_tokens: CountTokens, test_texts: TestTexts | None = None
) -> SourceReport:
    """Read one source's file below a folder to its end, which must go, and look for test sets' texts in it."""
    report, place, source = SourceReport(source.name), source.place(folder), source.located(folder)
    pairs, queries = array("q"), array("q")  # hashes, 8 bytes each: a set of so many takes nine times that
    sample: dict[str, list[str]] = {"query": [], "positive": [], "negative": []}
    every = max(1, sum(1 for _ in records_of(place, source.reading, place.name)) // SAMPLE)

    def note(error: UserError) -> None:
        report.bad += 1
        report.errors += [str(error)] if len(report.errors) < SHOWN else []

    # A negative that is the positive is counted in a row that keeps it.
    reading = source.reading._replace(keep_equal_negatives=True)
    for row in rows_of(place, reading, None, None, name=place.name, left_out=report.left_out, on_error=note):
        query, positive, negatives = row["query"], row["positive"], row["negative"]
        report.rows += 1
        pairs.append(hash((query, positive)))
        queries.append(hash(query))
        report.query_is_positive += query.strip() == positive.strip()
        report.positive_is_negative += positive.strip() in (text.strip() for text in negatives)
        report.without_negative += not negatives
        report.beaten += row.get("scores", [0])[0] < max(row.get("scores", [])[1:], default=-math.inf)
        if (row["row"] - 1) % every == 0:
            sample["query"].append(query)
            sample["positive"].append(positive)
            sample["negative"] += negatives[:1]
        if test_texts is not None:
            report.overlap.update(test_texts.found_in([query, positive, *negatives]))
    if place.is_file():
        report.sha256, report.num_bytes = sha256(place), place.stat().st_size
    elif place.is_dir():
        report.sha256 = content_hash(place)
        report.num_bytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    if report.sha256 and source.reading.texts:  # which change rows as the file does
        report.sha256 = content_of(place, source.reading)
    report.duplicates = len(pairs) - len(np.unique(pairs))
    report.repeated_queries = len(queries) - len(np.unique(queries))
    report.tokens = {name: count_tokens(texts) for name, texts in sample.items() if texts}
    if language_of() is not None:
        report.languages = {name: Counter(map(language_of(), texts)) for name, texts in sample.items() if texts}  # type: ignore[arg-type]
    return report


def record_hashes(reports: Sequence[SourceReport], record: Path) -> list[str]:
    """Compare the files' hashes with a record, source -> {sha256, bytes, rows}, and add the files that are new to it.

    Returns what differs, a sentence a file; the record of such a file is left as it is. Where none can be written, as
    beside data that is shared and read-only, that is said and no more. A `UserError` where it is no such object.
    """
    known = read_object(record, shape={str: {"sha256": str}}) if record.is_file() else {}
    found = {r.name: {"sha256": r.sha256, "bytes": r.num_bytes, "rows": r.rows} for r in reports if r.sha256}
    if found.keys() - known.keys():
        try:
            write_json(record, {**known, **found, **known})  # what is known stays, and stays first
        except OSError as error:
            logger.warning("%s cannot be written (%s): later changes will not be seen", record, error.strerror)
    return [
        f"{name}: changed since it was first checked ({known[name].get('rows')} rows of "
        f"{known[name].get('bytes')} bytes then, {now['rows']} of {now['bytes']} now); if that was on purpose, delete "
        f"{record}, which is then written anew."
        for name, now in found.items()
        if name in known and known[name]["sha256"] != now["sha256"]
    ]


@cache
def language_of() -> Callable[[str], str] | None:
    """A function from a text to its ISO 639-1 language code; None where py3langid is not installed."""
    try:
        import py3langid  # an extra, with a model of 5 MB
    except ImportError:
        return None
    return lambda text: str(py3langid.classify(text[:2000])[0])


def texts_of_folder(folder: Path) -> Iterator[str]:
    """Every string in the data files of a test set, whatever the fields are called; a `UserError` where one is no
    such file."""
    for file in sorted(folder.rglob("*")):
        if file.suffix not in TEXT_FILES or not file.is_file():
            continue
        if file.suffix == ".parquet":
            yield from _strings(record for _, record in records_of_file(file, name=f"--test_sets: {file}"))
        elif file.suffix in (".csv", ".tsv"):
            csv.field_size_limit(LARGEST_CELL)
            with file.open(encoding="utf-8", errors="replace", newline="") as lines:
                for cells in csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ","):
                    yield from cells
        elif file.suffix == ".json":
            yield from _strings(parse_json(file.read_bytes(), f"--test_sets: {file}"))
        else:
            for where, line in records_of_file(file, name=f"--test_sets: {file}"):
                yield from _strings(parse_json(line, where))  # type: ignore[arg-type]  # of JSONL, a line as it stands


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        yield from _strings(content.values())
    elif isinstance(content, Iterable):
        for part in content:
            yield from _strings(part)


def _words(text: str) -> tuple[str, ...]:
    """Words in lower case; each ideograph or kana is one, as those are written without spaces."""
    return tuple(re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower()))


def _whole_and_runs(words: tuple[str, ...]) -> Iterator[int]:
    yield hash(words)
    yield from (hash(words[i : i + OVERLAP_WORDS]) for i in range(len(words) - OVERLAP_WORDS + 1))
