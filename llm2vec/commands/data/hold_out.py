"""Hold queries out of training data: files to train on, and a retrieval set of each source to evaluate on.

    llm2vec hold-out cache/echo-data cache/split --queries 100
    llm2vec hold-out my/folder cache/split --sources_file my_sources.json

Then train with `dataset_file_path: OUT/train` and `sources_file: OUT/sources.json`, and evaluate with `--local_data_dir
OUT/eval --tasks HeldOut-<source> --task_to_instructions_fp OUT/eval/instructions.json`. OUT/train has <source>.jsonl of
each source. No row that remains shows a held-out query or its positive.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm2vec import cli
from llm2vec.commands.data import add_source_flags, chosen_sources
from llm2vec.data.held_out import TRAINED_FOR_ONE_HELD_OUT, hold_out
from llm2vec.table import Cell, Table


def main(argv: Sequence[str]) -> None:
    """Split and say what became of each source."""
    parser = cli.parser("hold-out", __doc__, prints_tables=True)
    add_source_flags(parser)
    parser.add_argument("out", type=cli.path, metavar="OUT", help="folder to write; must not be there, or be empty")
    parser.add_argument("--queries", type=cli.positive, default=100, help="held out of each source (default 100)")
    parser.add_argument("--seed", type=int, default=42, help="of the draw (default 42)")
    args = parser.parse_args(argv)
    out = cli.Printer(args.json)
    splits = hold_out(args.folder, chosen_sources(args), args.out, args.queries, args.seed)
    rows: list[list[Cell]] = [[split.source, *(f"{number:,}" for number in split[1:])] for split in splits]
    out.table(Table(["source", "rows left", "rows out", "queries", "documents"], rows))
    if small := [split.source for split in splits if not split.queries]:
        fewest = args.queries * (1 + TRAINED_FOR_ONE_HELD_OUT)
        out.say(f"nothing held out of {', '.join(small)}: fewer than {fewest:,} different queries")
