"""Training pairs from raw text: its passages, and a query for each, written by a model (doc2query) or taken from it.

    llm2vec queries my_docs output/pairs --model HuggingFaceTB/SmolLM2-135M-Instruct --most 2000
    llm2vec queries my_docs output/pairs --anchors output/stage_I/...
    llm2vec queries my_docs output/pairs --server http://localhost:8000/v1 --name Qwen/Qwen3-8B
    llm2vec queries my_docs output/pairs --titles

DATA is a folder of .md, .py, .rst and .txt files, cut into passages of whole paragraphs, or a JSONL file of objects
with `text`. With `--titles` no model writes: the query is a row's `title`, a passage's heading or first sentence, or a
docstring's summary, and the passage is what follows it; passages without one are left out.

A query stays if BM25 finds its passage among the first `--keep_top` (round trip) and it is no copy of its words; it
comes once. OUT has `passages.jsonl`, all passages; `pairs.jsonl`, rows of `query` and `positive`; and `sources.json`,
their table. A start that was killed is gone on with. docs/guides/adapt.md goes on from here.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm2vec import cli
from llm2vec.choice import ModelChoice
from llm2vec.commands.data import named_writer, parse_with_server, writer_of
from llm2vec.corpus.passages import SUFFIXES, passages_of
from llm2vec.files import alone_in, remove, write_json, write_json_lines
from llm2vec.types import UserError

QUERIES_FOLDER = ".queries"


def main(argv: Sequence[str]) -> None:
    """Cut, write, filter; say how many are left."""
    args = _parse_args(argv)
    titles = _titles(args.folder) if args.titles else {}
    passages = list(titles) if args.titles else list(dict.fromkeys(row["text"] for row in passages_of(args.folder)))
    if args.titles and not titles:
        raise UserError(f"{args.folder} has no text with a title, or with a first sentence and more behind it.")
    if not passages:
        raise UserError(f"{args.folder} has no text: no line, or no text file ({', '.join(SUFFIXES)}) that holds any.")
    chosen = sorted(random.Random(args.seed).sample(range(len(passages)), min(args.most or 2**62, len(passages))))
    with alone_in(args.out, "query writing"):
        written = _write(args, passages, chosen, args.out / QUERIES_FOLDER, titles)
        kept = _round_trip(written, chosen, passages, args.keep_top, args.out / QUERIES_FOLDER)
        if not kept:
            raise UserError(f"no query of {len(written)} leads back to its passage; see {args.out / QUERIES_FOLDER}.")
        write_json_lines(args.out / "passages.jsonl", ({"id": str(i), "text": text} for i, text in enumerate(passages)))
        write_json_lines(args.out / "pairs.jsonl", ({"query": query, "positive": text} for query, text in kept))
        entry = {"file": "pairs.jsonl", "instruction": args.instruction, "num_negatives": 0}
        write_json(args.out / "sources.json", {"pairs": entry})
        remove(args.out / QUERIES_FOLDER)
    print(f"{args.out}: {len(passages):,} passages, {len(written):,} queries written, {len(kept):,} lead back and stay")


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser("queries", __doc__)
    parser.add_argument("folder", type=cli.path, metavar="DATA", help="folder of text files, or a .jsonl file")
    parser.add_argument("out", type=cli.path, metavar="OUT", help="folder to write")
    writer = parser.add_mutually_exclusive_group(required=True)
    writer.add_argument("--model", type=ModelChoice.parse, help="a causal language model, best an instruct one")
    writer.add_argument("--anchors", type=ModelChoice.parse, metavar="STAGE_I", help="a Stage I checkpoint")
    writer.add_argument("--titles", action="store_true", help="titles and first sentences of the texts themselves")
    parser.add_argument("--most", type=cli.positive, help="queries to write, for passages that are drawn; default: all")
    parser.add_argument("--keep_top", type=cli.positive, default=10, help="how far a passage is looked for (10)")
    parser.add_argument("--instruction", default="Given a question, retrieve the passage that answers it")
    parser.add_argument("--seed", type=int, default=42, help="of the draw (42)")
    return parse_with_server(parser, writer, argv)


def _titles(source: Path) -> dict[str, str]:
    """What follows a title or a first sentence, and that title; of Python files by their docstrings."""
    from llm2vec.quickstart.docstrings import read_passages, source_files, split_docstring, without_duplicates

    files = source_files({source.name: source}) if source.is_dir() else []
    found = [(passage.body, passage.query) for passage in without_duplicates(read_passages(files)[0])]
    for row in passages_of(source, suffixes=[suffix for suffix in SUFFIXES if suffix != ".py"]):
        pair = (row["title"], row["text"]) if row["title"] else split_docstring(row["text"].lstrip("# "))
        found += [(pair[1], pair[0])] if pair else []
    titles: dict[str, str] = {}
    for text, title in found:
        titles.setdefault(text, title)
    return titles


def _write(
    args: argparse.Namespace, passages: Sequence[str], chosen: Sequence[int], work: Path, titles: Mapping[str, str]
) -> list[str]:
    """A query for each chosen passage, part by part."""
    if titles:
        remove(work)
        work.mkdir(parents=True)
        return [titles[passages[i]] for i in chosen]
    from llm2vec.corpus.writers import QUERY, write_in_parts  # seconds to import, with torch

    some = [passages[i] for i in chosen]
    return write_in_parts(lambda: writer_of(args, QUERY), QUERY, some, work, named_writer(args))


def _round_trip(
    queries: Sequence[str], chosen: Sequence[int], passages: Sequence[str], keep_top: int, work: Path
) -> list[tuple[str, str]]:
    """The queries whose passage BM25 finds among the first, each once, with their passages."""
    import torch
    from datasets import Dataset

    from llm2vec.corpus.mining import SCORED_AT_ONCE
    from llm2vec.corpus.retrievers import LexicalRetriever
    from llm2vec.data.sources import Instruction

    retriever, nothing = LexicalRetriever(), Instruction("")
    retriever.prepare(Dataset.from_dict({"text": list(passages)}), nothing, work)
    kept: dict[str, str] = {}
    # A copy of the passage's own words would lead back, too.
    pairs = [(query, i) for query, i in zip(queries, chosen, strict=True) if query and query not in passages[i]]
    for start in range(0, len(pairs), SCORED_AT_ONCE):
        some = pairs[start : start + SCORED_AT_ONCE]
        blocks = retriever.scores([query for query, _ in some], nothing, work)
        scores_QN = torch.cat([scores for _, scores in blocks], dim=1)
        for (query, i), scores_N in zip(some, scores_QN, strict=True):
            if scores_N[i] > 0 and int((scores_N > scores_N[i]).sum()) < keep_top:
                kept.setdefault(query, passages[i])
    return list(kept.items())
