"""A language model's own answers to the queries of training data, as texts for Stage I to tell (LLM2Vec-Gen).

    llm2vec answers my_data output/answers --sources_file my_data/sources.json --model Qwen/Qwen3-0.6B
    llm2vec answers my_data output/answers --server http://localhost:8000/v1 --name Qwen/Qwen3-0.6B

A query is put to the model as it stands, in a turn of its chat template and without thinking, and the likeliest answer
is written down, cut off at `--most_tokens`; queries that get none are left out. OUT has a file of rows for each source,
`query` and `positive` (the answer), and their table `sources.json`: train with `dataset_file_path: OUT`,
`sources_file: OUT/sources.json` and `alpha: 1`. A start that was killed is gone on with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llm2vec import cli
from llm2vec.choice import ModelChoice
from llm2vec.commands.data import add_source_flags, chosen_sources, named_writer, parse_with_server, writer_of
from llm2vec.data.sources import Source, entry_of
from llm2vec.files import alone_in, remove, write_json, write_json_lines

ANSWERS_FOLDER = ".answers"


def main(argv: Sequence[str]) -> None:
    """Answer source by source, and say how many queries have an answer."""
    args = _parse_args(argv)
    sources = chosen_sources(args)
    with alone_in(args.out, "answering"):
        for source in sources:
            _answer(args, source, args.out / ANSWERS_FOLDER)
        # Who answers is written in no row: documents of a source are the model's own now, and so no negatives either.
        written = [s._replace(reading=s.reading._replace(num_negatives=0)) for s in sources]
        write_json(args.out / "sources.json", {s.name: entry_of(s, f"{s.name}.jsonl") for s in written})
        remove(args.out / ANSWERS_FOLDER)


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser("answers", __doc__)
    add_source_flags(parser)
    parser.add_argument("out", type=cli.path, metavar="OUT", help="folder to write")
    writer = parser.add_mutually_exclusive_group(required=True)
    writer.add_argument("--model", type=ModelChoice.parse, help="the base that will be trained, best an instruct one")
    parser.add_argument("--most", type=cli.positive, help="rows of a source, from the start; default: all")
    parser.add_argument("--most_tokens", type=cli.positive, default=500, help="of an answer (500)")
    return parse_with_server(parser, writer, argv)


def _answer(args: argparse.Namespace, source: Source, work: Path) -> None:
    """A source's rows, each query once."""
    from llm2vec.corpus.writers import ANSWER, write_in_parts  # seconds to import, with torch
    from llm2vec.data.rows import TrainingRows

    rows = TrainingRows(args.folder, [source], num_negatives=0, max_rows=args.most)
    queries = list(dict.fromkeys(rows[i].query.text for i in range(len(rows))))
    task = ANSWER._replace(most_tokens=args.most_tokens)
    answers = write_in_parts(lambda: writer_of(args, task), task, queries, work / source.name, named_writer(args))
    found = [{"query": query, "positive": a} for query, a in zip(queries, answers, strict=True) if a]
    write_json_lines(args.out / f"{source.name}.jsonl", found)
    print(f"{source.name}: {len(found):,} of {len(queries):,} queries have an answer")
