"""Files an evaluation reads: a table of instructions, copies of data sets, a retrieval set of one's own.

Tasks here are mteb's, but mteb is not imported: only the adapter does that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from llm2vec.data.tables import copies_cache
from llm2vec.files import check_unicode, data_revision, json_lines, read_object
from llm2vec.types import UserError, in_one_sentence

Task: TypeAlias = Any  #: an `AbsTask` of mteb

RETRIEVAL_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.jsonl")
#: Largest grade of a judgement: trec_eval makes a list as long as the largest one, or crashes.
LARGEST_GRADE = 1000


class RetrievalSet(NamedTuple):
    """Documents, judged queries, and query -> document -> relevance."""

    corpus: list[dict[str, str]]
    queries: list[dict[str, str]]
    relevant: dict[str, dict[str, int]]


def load_instructions(path: str | Path) -> dict[str, str]:
    """The table of instructions in a file, task name -> instruction (a string); a `UserError` where it is none."""
    return read_object(Path(path), f"The instructions {path}", {str: str})


def parts_of(task: Task) -> list[Task]:
    """The tasks an aggregate (CQADupstackRetrieval) is the mean of; none for any other task."""
    return list(task.metadata.tasks) if task.is_aggregate else []


def load_data(task: Task) -> None:
    """Read the data of a task, or of all its parts; a `UserError` where a set is missing, unreachable or malformed."""
    for part in parts_of(task) or [task]:
        _load_part(part)


def _load_part(part: Task) -> None:
    path, failed = part.metadata.dataset["path"], f"Task {part.metadata.name}: cannot load the data set"
    advice = "" if Path(path).is_dir() else f"; without the hub, give a copy of it as <local_data_dir>/{path}"
    # An unreachable hub, a missing file and rows of another form each raise a type of their own.
    with in_one_sentence(lambda why: f"{failed} {path} ({why}){advice}."), _own_cache(Path(path)):
        part.load_data()


@contextmanager
def _own_cache(copy: Path) -> Iterator[None]:
    """Within it, `datasets` keeps what it makes of a folder for this folder as it is now. Else it knows a folder by its
    last name, and gives the rows of another one, or of an earlier state."""
    from datasets import config  # seconds

    shared = config.HF_DATASETS_CACHE
    if copy.is_dir():
        config.HF_DATASETS_CACHE = Path(copies_cache(copy))
    try:
        yield
    finally:
        config.HF_DATASETS_CACHE = shared


def use_local_data(task: Task, folder: Path) -> None:
    """Point a task at copies of its data sets, which must be there. Their content makes the revision: nothing else
    can vouch for it."""
    from datasets import get_dataset_config_names  # seconds

    leaves = parts_of(task) or [task]
    copies = [folder / part.metadata.dataset["path"] for part in leaves]
    if missing := [str(path) for path in copies if not path.is_dir()]:
        raise UserError(f"Task {task.metadata.name} needs data that is not there: looked for {', '.join(missing)}.")
    for part, path in zip(leaves, copies, strict=True):
        _set_dataset(part, path=str(path.resolve()), revision=data_revision(path))
        if part.fast_loading and set(part.hf_subsets) <= set(get_dataset_config_names(str(path.resolve()))):
            part.fast_loading = False  # it reads all languages at once, which a copy of one does not hold
    if task.is_aggregate:
        _set_dataset(task, revision="+".join(part.metadata.revision for part in leaves))


def _set_dataset(task: Task, **values: str) -> None:
    task.metadata = task.metadata.model_copy(update={"dataset": {**task.metadata.dataset, **values}})


def retrieval_set_of(folder: Path) -> RetrievalSet:
    """Read corpus.jsonl (`_id`, `text`, perhaps `title`), queries.jsonl and qrels/test.jsonl.

    A `UserError` where a file is missing, a line is malformed, or there is nothing to score.
    """
    if missing := [name for name in RETRIEVAL_FILES if not (folder / name).is_file()]:
        raise UserError(f"The retrieval set {folder} lacks {', '.join(missing)}.")
    documents, queries, judgements = (folder / name for name in RETRIEVAL_FILES)
    relevant = read_judgements(judgements)
    corpus = list(_read_texts(documents, ("title", "text")))
    judged = [row for row in _read_texts(queries, ("text",)) if row["id"] in relevant]
    if not corpus or not judged:
        raise UserError(f"The retrieval set {folder} has {len(corpus)} documents and {len(judged)} judged queries.")
    if not any(score > 0 for query in judged for score in relevant[query["id"]].values()):
        raise UserError(f"The retrieval set {folder} has no query with a relevant document: no score is above 0.")
    return RetrievalSet(corpus, judged, relevant)


def _read_texts(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The `id` of each row and its texts; an absent title is empty, as mteb needs it."""
    seen: set[str] = set()
    shape = {"_id": object, "text": str, **({"title?": (str, None)} if "title" in keys else {})}
    for where, row in json_lines(path, shape=shape):
        text = {"id": check_unicode(str(row["_id"]), "_id", where)}
        if text["id"] in seen:
            raise UserError(f"{where}: the _id {text['id']!r} is there twice.")
        seen.add(text["id"])
        yield text | {key: check_unicode(row.get(key) or "", key, where) for key in keys}


def read_judgements(path: Path) -> dict[str, dict[str, int]]:
    """Query -> document -> grade, of JSON lines with query-id, corpus-id and score; a bad line is a `UserError`."""
    relevant: dict[str, dict[str, int]] = {}
    for where, row in json_lines(path, shape=dict.fromkeys(("query-id", "corpus-id", "score"), object)):
        query, document = (check_unicode(str(row[key]), key, where) for key in ("query-id", "corpus-id"))
        score = row["score"]
        if not isinstance(score, int | float) or score != score // 1 or abs(score) > LARGEST_GRADE:
            allowed = f"a whole number, not above {LARGEST_GRADE:,}"
            raise UserError(f"{where}: `score` must be {allowed}, not {json.dumps(score)[:40]}.")
        relevant.setdefault(query, {})[document] = int(score)
    return relevant
