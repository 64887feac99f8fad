"""How the records of a source become training rows: which column is which, and what is left out.

All forms meet here. What lies behind (tables, blocks, order, plans, checks, hold-outs) sees rows alone.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from llm2vec.data.lines import check_row, check_text
from llm2vec.data.records import Placed, is_saved, load_from_hub, load_saved, parsed, records_of_file, records_of_table
from llm2vec.data.tables import arrow_file, content_hash, copies_cache
from llm2vec.types import UserError

#: What a column may be, and whether several columns may be it together.
ROLES = {
    "query": False, "positive": True, "negative": True, "pos_score": False, "neg_scores": True, "score": False,
    "text": False, "label": False,
}  # fmt: skip
#: Of these, those whose values are numbers; a CSV file has them as text.
SCORES = ("pos_score", "neg_scores", "score")


#: Is told of a bad record.
OnError: TypeAlias = Callable[[UserError], None] | None
#: What a record is read as.
Read = TypeVar("Read")


class Reading(NamedTuple):
    """How a source's records are read; the defaults are those of the released archive's form."""

    hub: bool = False  #: whether the source is a data set of the hub, or a folder in the hub's layout
    config: str | None = None  #: its configuration; None = its only or default one
    split: str | None = None  #: of a data set; None = `train`
    revision: str | None = None  #: of a hub data set: a commit, branch or tag; None = the newest
    #: what each role of `ROLES` is called; empty = by the roles' own names
    columns: tuple[tuple[str, tuple[str, ...]], ...] = ()
    num_negatives: int | None = None  #: hard negatives of a row, at most; None = as many as are asked for
    least_score: float | None = None  #: pairs with a lower `score` are left out
    keep_equal_negatives: bool = False  #: whether a negative that is the row's positive stays
    max_rows: int | None = None  #: most rows, from the start; None = all
    weight: float = 1.0  #: how often an epoch takes its rows: 1 = each once, 0.5 = half of them
    #: whether a record of several positives is one row, which takes them in turns from epoch to epoch, and not a
    #: row of each
    draw_positives: bool = False
    #: where the texts are whose ids stand in the place of positives and negatives, and how that is read (the roles of
    #: its columns are `id` and `text`); None = the rows hold the texts
    documents: tuple[str, Reading] | None = None
    queries: tuple[str, Reading] | None = None  #: the same of queries
    batch_size: int | None = None  #: rows of a batch from this source; None = as many as the run's batches have

    @property
    def texts(self) -> list[tuple[Path, Reading]]:
        """Where there are texts behind ids: of documents, then of queries."""
        there = [texts for texts in (self.documents, self.queries) if texts is not None]
        return [(Path(place), Reading(*how)) for place, how in there]  # from JSON they come as lists

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """`columns`, by role."""
        return dict(self.columns)


def opened(place: Path, reading: Reading) -> Any:
    """The `datasets.Dataset` of a source that is a data set; all processes call this together. A `UserError` where it
    is not there or out of reach, or lacks the split."""
    if not reading.hub:
        return load_saved(place, reading.split)
    load = partial(load_from_hub, str(place), "sources_file", reading.config, split=reading.split or "train")
    if place.is_dir():
        # Of a folder, datasets knows the last part of its name: it would take another one's rows, or older ones.
        return load(cache_dir=copies_cache(place))
    try:
        return load(revision=reading.revision)
    except UserError as error:
        copied = f"a copy in the folder {place} of the data's folder is read without network"
        raise UserError(f"{str(error).removesuffix('.')}; {copied}.") from error


def records_of(place: Path, reading: Reading, name: str = "") -> Iterator[Placed]:
    """The records of a source's file or data set, whichever `place` is; `name` as in `records_of_file`."""
    columns = [column for names in reading.roles.values() for column in names]
    if not reading.hub and not is_saved(place):
        return records_of_file(place, columns, name)
    return records_of_table(opened(place, reading), columns, _named(place, reading, name))


def _named(place: Path, reading: Reading, name: str = "") -> str:
    details = ", ".join(detail for detail in (reading.config, reading.split) if detail)
    return f"{name or place}{f' ({details})' if details else ''}"


def rows_of(
    place: Path,
    reading: Reading,
    num_negatives: int | None,
    with_scores: bool | None = False,
    *,
    name: str = "",
    left_out: Counter[str] | None = None,
    on_error: OnError = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a source, the first `max_rows` of them: `row` (the record's number, from 1), `query`, `positive`,
    `negative` (a list) and, if asked for, `scores`. A record of several positives makes a row of each.

    Args:
        place: its file or data set.
        num_negatives: of a row, where `reading` does not say fewer; None = all there are.
        with_scores: whether `scores` are read: the positive's, then those of the negatives; None = where a row has any.
        name: of the source's file in messages; empty = its path.
        left_out: counts what is left out, by a word for it.
        on_error: is told of a bad record, which is then passed over; None = it is raised.

    Raises:
        UserError: a record is no row (place, what is wrong), or the source cannot be read.
    """
    counts = Counter[str]() if left_out is None else left_out
    fewest = min((number for number in (reading.num_negatives, num_negatives) if number is not None), default=None)
    reading = reading._replace(num_negatives=fewest)
    of_source = _rows_of_labels if "label" in reading.roles else _rows_of_pairs
    return islice(of_source(records_of(place, reading, name), reading, with_scores, counts, on_error), reading.max_rows)


def _rows_of_pairs(
    records: Iterator[Placed], reading: Reading, with_scores: bool | None, counts: Counter[str], on_error: OnError
) -> Iterator[dict[str, Any]]:
    documents, queries = (
        texts and _Texts(Path(texts[0]), Reading(*texts[1])) for texts in (reading.documents, reading.queries)
    )
    behind = {"query": queries, "positive": documents, "negative": documents}

    def read(record: bytes | Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        row = in_roles(record, reading, where)
        row |= {role: texts.of(row[role], where, role) for role, texts in behind.items() if texts and role in row}
        return list(_rows_of(row, reading, with_scores, where, counts))

    for number, _, rows in _sound(records, read, on_error):
        yield from ({"row": number, **row} for row in rows)


def _sound(
    records: Iterator[Placed], read: Callable[[bytes | Mapping[str, Any], str], Read], on_error: OnError
) -> Iterator[tuple[int, str, Read]]:
    """What is read of each record, with its number and place; `on_error` as in `rows_of`."""
    for number, (where, record) in enumerate(records, start=1):
        try:
            found = read(record, where)
        except UserError as error:
            _tell(error, on_error)
        else:
            yield number, where, found


def _tell(error: UserError, on_error: OnError) -> None:
    if on_error is None:
        raise error
    on_error(error)


def _rows_of(
    row: dict[str, Any], reading: Reading, with_scores: bool | None, where: str, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    if "score" in reading.roles:
        score = row.pop("score")
        if type(score) not in (int, float) or not abs(score) < 1e300:
            raise UserError(f"{where}: {score!r} is no score; a finite number is needed.")
        if reading.least_score is not None and score < reading.least_score:
            counts["pairs below least_score"] += 1
            return
        row |= {"pos_score": score, "neg_scores": []}
    several = isinstance(row.get("positive"), list) and "positive" in reading.roles
    positives: list[Any] = row["positive"] if several else [row.get("positive")]
    if not positives:
        raise UserError(f"{where}: the list of positives is empty.")
    if not reading.keep_equal_negatives:
        row, dropped = _without_equals(row, positives)
        counts["negatives that are their positive"] += dropped
        if dropped and len(row["negative"]) < (reading.num_negatives or 0):
            counts["rows that then had too few"] += 1
            return
    with_scores = "pos_score" in row if with_scores is None else with_scores
    for positive in positives:
        yield check_row({**row, "positive": positive} if several else row, reading.num_negatives, where, with_scores)


def in_roles(record: bytes | Mapping[str, Any], reading: Reading, where: str) -> dict[str, Any]:
    """A record by the roles of its columns; a `UserError` where it is no record, or lacks one."""
    found = dict(parsed(record, where))
    if reading.columns:
        named = {}
        for role, columns in reading.columns:
            for column in columns:
                if column not in found:
                    raise UserError(
                        f"{where}: there is no column {column!r}, which the table names as the {role}; "
                        f"there are {', '.join(found) or 'none'}."
                    )
            values = [found[column] for column in columns]
            named[role] = values[0] if len(columns) == 1 else _flat(values)
        found = named
    if not isinstance(record, bytes):
        for role in SCORES:
            if role in found:
                found[role] = _as_number(found[role])
    if found.get("negative", "") is None:
        found["negative"] = []
    return found


def _flat(values: Sequence[Any]) -> list[Any]:
    """The values of several columns as one list; what is null is none."""
    return [one for value in values if value is not None for one in (value if isinstance(value, list) else [value])]


def _as_number(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_number(one) for one in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # which the check refuses


def _without_equals(row: dict[str, Any], positives: Sequence[Any]) -> tuple[dict[str, Any], int]:
    """A row without the negatives that are a positive, and how many they were; what is no row is left as it is."""
    negatives, scores = row.get("negative"), row.get("neg_scores")
    listed = [negatives] if isinstance(negatives, str) else negatives
    if not isinstance(listed, list):
        return row, 0
    own = {text.strip() for text in positives if isinstance(text, str)}
    kept = [i for i, text in enumerate(listed) if not isinstance(text, str) or text.strip() not in own]
    if len(kept) == len(listed):
        return row, 0
    found = {**row, "negative": [listed[i] for i in kept]}
    if isinstance(scores, list) and len(scores) == len(listed):
        found["neg_scores"] = [scores[i] for i in kept]
    return found, len(listed) - len(kept)


# --- texts behind ids ---


class _Texts:
    """The texts of a corpus by their ids, which are compared as strings. The texts lie in a mapped Arrow file, in
    memory are the ids and the numbers of their rows. A `UserError` where a column is missing, or an id has two texts.
    """

    def __init__(self, place: Path, reading: Reading) -> None:
        import pyarrow as pa
        from datasets import config

        self._name, self._numbers, again = _named(place, reading), dict[str, int](), list[tuple[int, str, str]]()
        folder = Path(config.HF_DATASETS_CACHE)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:  # what is mapped stays when its name is gone
            file = Path(aside) / "texts.arrow"
            with arrow_file(file, pa.schema([("text", pa.string())])) as writer:
                for number, (where, record) in enumerate(records_of(place, reading)):
                    row = in_roles(record, reading, where)
                    name, text = _id(row["id"], where, "id"), row["text"]
                    if self._numbers.setdefault(name, number) != number:
                        again.append((number, name, where))
                    text = " ".join(filter(None, text)) if isinstance(text, list) else text  # a title and its text
                    if not isinstance(text, str | None):
                        raise UserError(f"{where}: the text is of type {type(text).__name__}; a string is needed.")
                    writer.write({"text": text})
            self._texts = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()["text"]
        for number, name, where in again:
            if self._texts[number] != self._texts[self._numbers[name]]:
                raise UserError(f"{where}: the id {name!r} has another text above; an id can have one text.")

    def of(self, value: Any, where: str, role: str) -> Any:
        """The text behind an id, or those behind a list of ids; an id may stand in an object, under `id`."""
        if isinstance(value, list):
            return [self.of(one, where, role) for one in value]
        name = _id(value.get("id") if isinstance(value, Mapping) else value, where, role)
        if name not in self._numbers:
            raise UserError(f"{where}: `{role}` names the id {name!r}, which {self._name} does not have.")
        text = self._texts[self._numbers[name]].as_py()
        if not (text or "").strip():
            raise UserError(f"{where}: `{role}` names the id {name!r}, whose text in {self._name} is empty.")
        return text


def _id(value: Any, where: str, role: str) -> str:
    if not isinstance(value, str | int):
        raise UserError(f"{where}: {value!r} under `{role}` is no id; a string or a whole number is needed.")
    return str(value)


def content_of(place: Path, reading: Reading) -> str:
    """What tells the content of a source from what it was: a SHA-256, or what its library knows a hub data set by; of
    the texts behind its ids, too."""
    found = [
        content_hash(where) if where.exists() else opened(where, how)._fingerprint
        for where, how in ((place, reading), *reading.texts)
    ]
    return " ".join(found)


# --- labelled texts ---


def _rows_of_labels(
    records: Iterator[Placed], reading: Reading, with_scores: bool | None, counts: Counter[str], on_error: OnError
) -> Iterator[dict[str, Any]]:
    """Each text as a query; the next one of its label, in a shuffled circle, is its positive; texts of other labels,
    drawn, are its negatives (None = one). All texts are held in memory."""

    def read(record: bytes | Mapping[str, Any], where: str) -> tuple[Any, str]:
        row = in_roles(record, reading, where)
        if not isinstance(row["label"], str | int):
            raise UserError(f"{where}: the label is {row['label']!r}; a string or a whole number is needed.")
        check_text(row["text"], "text", where)
        return row["label"], row["text"]

    found: dict[tuple[Any, str], tuple[int, str]] = {}
    for number, where, labelled in _sound(records, read, on_error):
        if labelled in found:
            counts["texts that come twice"] += 1
        found.setdefault(labelled, (number, where))
    texts = list(found)
    circles: dict[Any, list[int]] = {}
    for i, (label, _) in enumerate(texts):
        circles.setdefault(label, []).append(i)
    if len(circles) < 2:
        if found or on_error is None:
            place = next(iter(found.values()), ("", "a labelled source"))[1]
            _tell(UserError(f"{place}: there are no two labels."), on_error)
        return
    draw = random.Random(0)
    positive_of: dict[int, int] = {}
    for circle in circles.values():
        draw.shuffle(circle)
        positive_of.update(zip(circle, [*circle[1:], circle[0]], strict=True))
    for i, (label, text) in enumerate(texts):
        if positive_of[i] == i:
            counts["texts that are alone under their label"] += 1
            continue
        negatives: list[int] = []
        while len(negatives) < (1 if reading.num_negatives is None else reading.num_negatives):
            drawn = draw.randrange(len(texts))
            if texts[drawn][0] != label:
                negatives.append(drawn)
        row = {"query": text, "positive": texts[positive_of[i]][1], "negative": [texts[j][1] for j in negatives]}
        number, where = found[label, text]
        yield {"row": number, **check_row(row, None, where, bool(with_scores))}
