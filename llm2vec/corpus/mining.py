"""Hard negatives: for each row of a source, the documents that score high for its query and do not answer it.

    OUT/<source>.jsonl        rows with `negative` and, where a reranker read them, `pos_score` and `neg_scores`
    OUT/report.json           what was found and dropped
    OUT/.mining/<source>/     meanwhile: documents, what the retriever made of them, and finished parts of the rows;
                              of a source that is done, its settings and report

A candidate that scores nearly as high as the positive may well be an answer that nobody marked. So it must lie below
the lowest of the query's positives by a margin (NV-Retriever, arXiv 2407.15831): s <= s+ - |s+| * relative, and s <= s+
- absolute. sentence-transformers' `mine_hard_negatives` has the same rules over vectors in memory.

Rows are worked on in parts. A part depends on nothing but the documents and the settings, so a start that was killed
and one that was not write the same files.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from llm2vec.corpus.retrievers import Retriever
from llm2vec.corpus.rows import Corpus
from llm2vec.corpus.search import FREE, hits_of, merge, to_keys
from llm2vec.data.reading import content_of, rows_of
from llm2vec.data.sources import Source
from llm2vec.data.tables import arrow_file
from llm2vec.files import json_hash, json_lines, read_object, remove, whole, write_json, write_json_lines
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

#: Rows of a part, and queries whose scores are held at once.
PART_ROWS = 1024
SCORED_AT_ONCE = 64
#: Rows that are read at once.
BATCH = 10_000
WORK_FOLDER = ".mining"

#: Scores of (query, document) pairs.
Rescore = Callable[[list[tuple[str, str]]], list[float]]


@dataclass(frozen=True)
class Rules:
    """Which candidates become negatives.

    Example:
        >>> Rules(negatives=1).chosen([(5, 0.99), (7, 0.9)], positive=1.0)
        [(7, 0.9)]
    """

    negatives: int = 7  #: of a row; a row that has fewer is left out
    skip: int = 0  #: so many of the best candidates are passed over
    depth: int = 100  #: candidates that are looked at, the best ones
    #: a candidate lies below the positive by this share of the positive's score; 0 = it may come up to it. None =
    #: no bound
    relative_margin: float | None = 0.05
    absolute_margin: float | None = None  #: the same as a number
    most_score: float | None = None  #: a candidate's highest score; None = no bound

    def chosen(self, candidates: Sequence[tuple[int, float]], positive: float) -> list[tuple[int, float]]:
        """Those of the candidates (document, score) that lie far enough below the positive, best first."""
        bounds = [self.most_score] if self.most_score is not None else []
        if self.relative_margin is not None:
            bounds.append(positive - abs(positive) * self.relative_margin)
        if self.absolute_margin is not None:
            bounds.append(positive - self.absolute_margin)
        return [(document, score) for document, score in candidates if all(score <= bound for bound in bounds)]


@dataclass
class MiningReport:
    """What was mined of a source; scores are the reranker's where there is one."""

    source: str
    documents: int
    rows: int = 0  #: that were read
    mined: int = 0  #: that have their negatives
    candidates: int = 0  #: that were looked at
    too_near: int = 0  #: of these, not far enough below the positive
    positive_score: float = 0.0  #: mean over mined rows
    negative_score: float = 0.0  #: mean over their negatives


def mine(
    source: Source,
    folder: Path,
    out: Path,
    retriever: Retriever,
    rules: Rules,
    *,
    corpus: Corpus | None = None,
    rescore: Rescore | None = None,
    rescored_by: str = "",
) -> MiningReport:
    """Write `OUT/<source>.jsonl` for the rows of a source, whose file lies in `folder`; a killed start is gone on with.
    A `UserError` where a record is no row, or `out` holds what was mined otherwise.

    The retriever finds candidates, under the source's first instruction, among the source's own positives and negatives
    and in `corpus`; `rescore`, a reranker of the revision `rescored_by`, scores them and the positives anew.
    """
    source = source.located(folder)
    place, work, mined = source.place(folder), out / WORK_FOLDER / source.name, out / f"{source.name}.jsonl"
    settings = {
        "source": content_of(place, source.reading),
        "reading": json.loads(json.dumps(source.reading)),
        "instruction": list(source.instructions[0]),
        "retriever": retriever.revision,
        "reranker": rescored_by,
        "rules": asdict(rules),
        "corpus": None if corpus is None else corpus.identity(),
    }
    if (work / "settings.json").is_file():
        if read_object(work / "settings.json") != json.loads(json.dumps(settings)):
            raise UserError(f"{out} holds a mining of {source.name} with other settings; give another folder.")
        if (work / "report.json").is_file() and mined.is_file():
            return MiningReport(**read_object(work / "report.json"))
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _gather(source, place, corpus, work)
        write_json(work / "settings.json", settings)
    from datasets import Dataset  # seconds

    documents, rows = (Dataset.from_file(str(work / name)) for name in ("documents.arrow", "rows.arrow"))
    logger.info("%s: %s documents", source.name, f"{len(documents):,}")
    retriever.prepare(documents, source.instructions[0], work)
    positives_of = _positives_of(rows)
    parts = [work / f"part-{first:010d}.jsonl" for first in range(0, len(rows), PART_ROWS)]
    for number, part in enumerate(parts):
        if part.is_file():
            continue
        last = min((number + 1) * PART_ROWS, len(rows))
        groups = (rows[i : min(i + SCORED_AT_ONCE, last)] for i in range(number * PART_ROWS, last, SCORED_AT_ONCE))
        found = (_mine_rows(some, documents, positives_of, source, retriever, rules, rescore, work) for some in groups)
        write_json_lines(part, itertools.chain.from_iterable(found))
        logger.info("%s: %s of %s rows have been looked at", source.name, f"{last:,}", f"{len(rows):,}")
    report = _close(mined, parts, MiningReport(source.name, len(documents)), rescore is not None)
    write_json(work / "report.json", asdict(report))
    for path in work.iterdir():
        if path.name not in ("report.json", "settings.json"):
            remove(path)
    return report


def _gather(source: Source, place: Path, corpus: Corpus | None, work: Path) -> None:
    """Write all different documents, and the rows with their positive's number among them."""
    numbers: dict[int, int] = {}  # of a text's hash: the texts themselves would fill the memory

    def number(text: str) -> int:
        name = _hash(text)
        if name not in numbers:
            numbers[name] = len(numbers)
            documents.write({"text": text})
        return numbers[name]

    with arrow_file(work / "documents.arrow", pa.schema([("text", pa.string())])) as documents:
        schema = pa.schema([("query", pa.string()), ("positive", pa.int64())])
        with arrow_file(work / "rows.arrow", schema) as rows:
            for row in rows_of(place, source.reading, None):
                rows.write({"query": row["query"], "positive": number(row["positive"])})
                for text in row["negative"]:
                    number(text)
        for corpus_row in corpus.rows() if corpus is not None else ():
            number(corpus_row.text)


def _hash(text: str) -> int:
    return int(json_hash(text), 16)


def _positives_of(rows: Any) -> dict[int, array[int]]:
    """Numbers of all positives of a query, by the hash of its text."""
    found: dict[int, array[int]] = {}
    for batch in rows.iter(BATCH):
        for query, positive in zip(batch["query"], batch["positive"], strict=True):
            found.setdefault(_hash(query), array("q")).append(positive)
    return found


def _mine_rows(
    rows: dict[str, list[Any]],
    documents: Any,
    positives_of: dict[int, array[int]],
    source: Source,
    retriever: Retriever,
    rules: Rules,
    rescore: Rescore | None,
    work: Path,
) -> Iterator[dict[str, Any]]:
    """Of each row, its texts and what was found: `record` (None where it has too few), and figures for the report."""
    queries, own = rows["query"], [list(dict.fromkeys(positives_of[_hash(query)])) for query in rows["query"]]
    k = rules.depth + max(map(len, own))
    keys_QK = torch.full((len(queries), k), FREE, dtype=torch.int64)
    of_own: list[dict[int, float]] = [{} for _ in queries]
    for first, scores_QN in retriever.scores(queries, source.instructions[0], work):
        scores_QN = scores_QN.cpu()
        keys_QK = merge([keys_QK, to_keys(scores_QN, first)], k)
        for scores_N, numbers, found in zip(scores_QN, own, of_own, strict=True):
            found.update({n: float(scores_N[n - first]) for n in numbers if first <= n < first + len(scores_N)})
    for row, (candidates, positives) in enumerate(zip(hits_of(keys_QK), of_own, strict=True)):
        near = (hit for hit in candidates if hit[0] not in positives and hit[1] > retriever.floor)
        others = list(itertools.islice(near, rules.skip, rules.depth))
        number = rows["positive"][row]
        texts = _texts(documents, [number, *(document for document, _ in others)])
        if rescore is not None:
            own_texts = _texts(documents, list(positives))
            read = [
                (queries[row], text) for text in (*own_texts.values(), *(texts[document] for document, _ in others))
            ]
            scores = rescore(read)
            positives = dict(zip(own_texts, scores, strict=False))
            others = [(document, score) for (document, _), score in zip(others, scores[len(positives) :], strict=True)]
            others.sort(key=lambda hit: -hit[1])
        far = rules.chosen(others, min(positives.values()))
        taken = far[: rules.negatives]
        yield {
            "query": queries[row],
            "positive": texts[number],
            "negative": [texts[document] for document, _ in taken],
            "pos_score": positives[number],
            "neg_scores": [score for _, score in taken],
            "candidates": len(others),
            "too_near": len(others) - len(far),
            "is_mined": len(taken) == rules.negatives,
        }


def _texts(documents: Any, numbers: Sequence[int]) -> dict[int, str]:
    return dict(zip(numbers, documents[list(numbers)]["text"], strict=True)) if numbers else {}


def _close(file: Path, parts: Sequence[Path], report: MiningReport, with_scores: bool) -> MiningReport:
    """Put the parts together, without what is only told."""
    positive, negative = 0.0, 0.0
    with whole(file) as aside, aside.open("w", encoding="utf-8") as out:
        for part in parts:
            for _, found in json_lines(part):
                report.rows += 1
                report.candidates += found["candidates"]
                report.too_near += found["too_near"]
                if not found["is_mined"]:
                    continue
                report.mined += 1
                positive += found["pos_score"]
                negative += sum(found["neg_scores"]) / len(found["neg_scores"])
                fields = ("query", "positive", "negative", *(("pos_score", "neg_scores") if with_scores else ()))
                out.write(json.dumps({name: found[name] for name in fields}, ensure_ascii=False) + "\n")
    if not report.mined:
        raise UserError(
            f"source {report.source!r}: no row has enough negatives below its positive; ask for fewer by --negatives, "
            "look at more by --depth, or give a smaller --relative_margin."
        )
    report.positive_score, report.negative_score = positive / report.mined, negative / report.mined
    return report
