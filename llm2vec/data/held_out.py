"""Queries held out of training data, as a retrieval set for each source, and what remains to train on.

    OUT/train/<source>.jsonl                         rows that show no text of a held-out pair, without
                                                     the blanks around their texts
    OUT/sources.json                                 the table of these files
    OUT/eval/HeldOut-<source>/                       corpus, queries and judgements in the hub's layout
    OUT/eval/instructions.json                       the sources' instructions, by those names

The corpus of a set is its queries' positives and hard negatives.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm2vec.data.reading import rows_of
from llm2vec.data.sources import Source, entry_of, find_files
from llm2vec.files import whole_folder, write_json, write_json_lines, write_text
from llm2vec.types import UserError

#: A source keeps at least so many queries to train on for each that is held out; a smaller one is not held out from.
TRAINED_FOR_ONE_HELD_OUT = 4

_DATASET_CARD = """---
configs:
- config_name: default
  data_files:
  - split: test
    path: qrels/test.jsonl
- config_name: corpus
  data_files:
  - split: corpus
    path: corpus.jsonl
- config_name: queries
  data_files:
  - split: queries
    path: queries.jsonl
---
"""


class SourceSplit(NamedTuple):
    """What became of a source's rows."""

    source: str  #: its name
    trained: int  #: rows that remain
    dropped: int  #: rows that would show a held-out text
    queries: int  #: held out; 0 where the source is too small
    documents: int  #: in the corpus of its set


def hold_out(folder: Path, sources: Sequence[Source], out: Path, num_queries: int, seed: int) -> list[SourceSplit]:
    """Split the sources' files below `folder`; see above for what is written to `out`.

    `num_queries` are held out of each source, drawn by `seed` and the source's name. A `UserError` where `out` holds
    something, a file is missing, a line is no row, or no source is large enough.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder.")
    files, sources = find_files(folder, sources), [source.located(folder) for source in sources]
    rows = {
        source: list(map(_stripped, rows_of(file, source.reading, None, None)))
        for source, file in zip(sources, files, strict=True)
    }
    chosen = {source: _draw(of_source, num_queries, f"{seed} {source.name}") for source, of_source in rows.items()}
    if not any(chosen.values()):
        fewest = num_queries * (1 + TRAINED_FOR_ONE_HELD_OUT)
        raise UserError(
            f"no source in {folder} has the {fewest} different queries that holding out {num_queries} takes."
        )
    held = {source: [row for row in rows[source] if row["query"] in chosen[source]] for source in sources}
    secret = {row[side] for of_source in held.values() for row in of_source for side in ("query", "positive")}
    splits = []
    with whole_folder(out) as aside:
        (aside / "train").mkdir()
        for source in sources:
            kept = [row for row in rows[source] if secret.isdisjoint((row["query"], row["positive"], *row["negative"]))]
            # By the source's name: two sources may share a file, and a file may lie outside the data's folder.
            write_json_lines(aside / "train" / f"{source.name}.jsonl", map(as_record, kept))
            documents = dict.fromkeys(text for row in held[source] for text in (row["positive"], *row["negative"]))
            if held[source]:
                _write_set(aside / "eval" / set_name(source), held[source], list(documents))
            dropped = len(rows[source]) - len(kept)
            splits.append(SourceSplit(source.name, len(kept), dropped, len(chosen[source]), len(documents)))
        instructions = {set_name(source): source.instructions[0].text for source in sources if held[source]}
        write_json(aside / "eval" / "instructions.json", instructions)
        write_json(aside / "sources.json", {one.name: entry_of(one, f"{one.name}.jsonl") for one in sources})
    return splits


def set_name(source: Source) -> str:
    """The task that a source's held-out queries make."""
    return f"HeldOut-{source.name}"


def as_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `reading.rows_of` in the form of a JSONL file."""
    record = {field: row[field] for field in ("query", "positive", "negative")}
    if "scores" in row:
        record |= {"pos_score": row["scores"][0], "neg_scores": row["scores"][1:]}
    return record


def _stripped(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the blanks around its texts, as training reads them: by these alone no text differs."""
    query, positive, *negatives = (text.strip() for text in (row["query"], row["positive"], *row["negative"]))
    return {**row, "query": query, "positive": positive, "negative": negatives}


def _draw(rows: Sequence[Mapping[str, Any]], num_queries: int, seed: str) -> set[str]:
    queries = list(dict.fromkeys(row["query"] for row in rows))
    if len(queries) < num_queries * (1 + TRAINED_FOR_ONE_HELD_OUT):
        return set()
    return set(random.Random(seed).sample(queries, num_queries))


def _write_set(folder: Path, rows: Sequence[Mapping[str, Any]], documents: Sequence[str]) -> None:
    name_of = {text: f"d{i}" for i, text in enumerate(documents)}
    queries = {text: f"q{i}" for i, text in enumerate(dict.fromkeys(row["query"] for row in rows))}
    judged = dict.fromkeys((queries[row["query"]], name_of[row["positive"]]) for row in rows)
    files = retrieval_files({name: text for text, name in name_of.items()}, {q: t for t, q in queries.items()}, judged)
    (folder / "qrels").mkdir(parents=True)
    for name, content in files.items():
        write_text(folder / name, content)


def retrieval_files(
    corpus: Mapping[str, str], queries: Mapping[str, str], judged: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """A retrieval set in the hub's layout, relative path -> content. Texts are given by their ids, and each of `judged`
    is the id of a query and that of a document that answers it."""
    judgements = [{"query-id": query, "corpus-id": document, "score": 1} for query, document in judged]
    return {
        "corpus.jsonl": json_lines_of({"_id": name, "title": "", "text": text} for name, text in corpus.items()),
        "queries.jsonl": json_lines_of({"_id": name, "text": text} for name, text in queries.items()),
        "qrels/test.jsonl": json_lines_of(judgements),
        "README.md": _DATASET_CARD,
    }


def json_lines_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as the lines of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
