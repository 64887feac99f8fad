"""Hard negatives for your rows: find them, drop those that may be answers, and let a reranker read the rest.

    llm2vec mine my_data output/mined --sources_file my_data/sources.json --model bm25
    llm2vec mine my_data output/mined --sources_file my_data/sources.json --model output/stage_II/... --negatives 7
    llm2vec mine copies output/mined --sources_file hub --sources squad --corpus passages.jsonl \\
        --model sentence-transformers/all-MiniLM-L6-v2 --rerank cross-encoder/ms-marco-MiniLM-L6-v2

Candidates are the texts of the source, and of `--corpus`; for bm25, those that share a word with the query. Texts of a
query's other positives are never its negatives. A candidate must score at least 5 % below the lowest of them
(`--relative_margin`). OUT holds the new rows, their table `sources.json`, and `report.json`; train with
`dataset_file_path: OUT` and `sources_file: OUT/sources.json`. With a reranker rows have `pos_score` and `neg_scores`
too, which `distillation_weight` reads. A start that was killed is gone on with.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm2vec import cli
from llm2vec.choice import add_model_flags, chosen_model
from llm2vec.commands.data import add_source_flags, chosen_sources
from llm2vec.data.sources import entry_of
from llm2vec.files import alone_in, json_lines, remove, write_json
from llm2vec.table import Cell, Table

if TYPE_CHECKING:
    from llm2vec.corpus.mining import MiningReport

#: Mined rows that are shown of each source.
EXAMPLES = 3


def main(argv: Sequence[str]) -> None:
    """Mine, and say what was found."""
    args = _parse_args(argv)
    out = cli.Printer(args.json)
    sources = chosen_sources(args)
    from llm2vec.corpus.mining import WORK_FOLDER, Rules, mine  # seconds to import, with torch
    from llm2vec.corpus.retrievers import open_reranker, open_retriever
    from llm2vec.corpus.rows import open_corpus

    rules = Rules(
        args.negatives, args.skip, args.depth, args.relative_margin, args.absolute_margin, args.most_score
    )  # fmt: skip
    corpus = None if args.corpus is None else open_corpus(args.corpus)
    retriever = open_retriever(chosen_model(args))
    rescore, rescored_by = (None, "") if args.rerank is None else open_reranker(args.rerank)
    with alone_in(args.out, "mining"):
        reports = [
            mine(
                source, args.folder, args.out, retriever, rules, corpus=corpus, rescore=rescore, rescored_by=rescored_by
            )
            for source in sources
        ]
        remove(args.out / WORK_FOLDER)
        mined = [source._replace(reading=source.reading._replace(num_negatives=None)) for source in sources]
        write_json(args.out / "sources.json", {s.name: entry_of(s, f"{s.name}.jsonl") for s in mined})
        write_json(args.out / "report.json", [dataclasses.asdict(report) for report in reports])
    _say(reports, args.out, out)


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser("mine", __doc__, prints_tables=True)
    add_source_flags(parser)
    parser.add_argument("out", type=cli.path, metavar="OUT", help="folder to write")
    add_model_flags(parser, torch_dtype=True, which="bm25, random, or a model or adapter: folder or hub name")
    parser.add_argument("--corpus", help="further documents: a .jsonl or .parquet file with `text`, or a hub data set")
    parser.add_argument(
        "--rerank",
        metavar="MODEL",
        help="a cross-encoder, a stronger embedder of sentence-transformers, or SERVER/v1#MODEL; reads all candidates",
    )
    parser.add_argument("--negatives", type=cli.positive, default=7, help="of a row (7); rows with fewer are left out")
    parser.add_argument("--depth", type=cli.positive, default=100, help="best candidates that are looked at (100)")
    parser.add_argument("--skip", type=int, default=0, help="best candidates that are passed over (0)")
    parser.add_argument(
        "--relative_margin", type=float, default=0.05,
        help="a negative scores lower than the positive by this share of it (0.05)",
    )  # fmt: skip
    parser.add_argument("--absolute_margin", type=float, help="the same as a number")
    parser.add_argument("--most_score", type=float, help="a negative's highest score")
    args = parser.parse_args(argv)
    if not 0 <= args.skip <= args.depth - args.negatives:
        parser.error("argument --skip: it must lie between 0 and --depth less --negatives")
    return args


def _say(reports: Sequence[MiningReport], folder: Path, out: cli.Printer) -> None:
    rows: list[list[Cell]] = []
    for report in reports:
        shares = (report.mined / max(1, report.rows), report.too_near / max(1, report.candidates))
        numbers = [f"{report.documents:,}", f"{report.rows:,}", f"{report.mined:,} ({shares[0]:.1%})"]
        scores = [f"{report.positive_score:.3f}", f"{report.negative_score:.3f}"]
        rows.append([report.source, *numbers, f"{shares[1]:.1%}", *scores])
    header = ["source", "documents", "rows", "mined", "too near", "positive", "negatives"]
    out.table(Table(header, rows))
    out.say(
        "too near: candidates that lie too little below the positive; positive, negatives: mean scores of mined rows"
    )
    for report in reports:
        for _, (_, row) in zip(range(EXAMPLES), json_lines(folder / f"{report.source}.jsonl"), strict=False):
            texts = (("", row["query"]), ("+", row["positive"]), ("-", row["negative"][0]))
            lines = [f"{mark:>3} {' '.join(text.split())[:100]}" for mark, text in texts]
            out.say(cli.plain("\n".join(["", *lines])))
