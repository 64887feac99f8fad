"""A set of recipes on the same data, end to end: train, evaluate, one table.

    llm2vec compare train_configs/comparison/quickstart --seeds 42 43        # what `make compare` runs
    llm2vec compare train_configs/comparison/llama3.2_1b --processes 8

The set is a folder of configs (`llm2vec/compare/recipes.py` says which; its `sweep` tries values of keys,
`halving` only the best of them to the end). A recipe's
stages wait for each other; runs that do not are done at the same time, `--workers` of them. What has been done and has
not changed since is not done again. A run that fails stops its own recipe only, and the exit code is then 1. Everything
goes below --output_dir:

    runs/, evaluations/     checkpoints and scores, a folder a run
    configs/, logs/         the whole config and the output of each run
    comparison.html, .md, .json
    record/                 all that these are made of, as text: llm2vec report RECORD makes them again
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from llm2vec import cli
from llm2vec.types import UserError


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser("compare", __doc__, prints_tables=True)
    parser.add_argument("folder", type=cli.path, help="the set of configs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="each recipe is trained with each (42)")
    parser.add_argument("--recipes", nargs="+", help="only these (default: all of the set)")
    parser.add_argument("--workers", type=cli.positive, help="runs at a time (default: one a GPU, or one a core)")
    parser.add_argument("--processes", type=cli.positive, default=1, help="of a training run, through torchrun")
    parser.add_argument("--output_dir", type=cli.path, help="default: output/comparison/ and the folder's name")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds are {' '.join(map(str, args.seeds))}; give each once.")
    args.output_dir = args.output_dir or Path("output/comparison", args.folder.resolve().name)
    return args


def main(argv: Sequence[str]) -> int:
    """Plan, run, report; returns the exit code: 1 where a run failed."""
    started, args = time.monotonic(), _parse_args(argv)
    out = cli.Printer(args.json)
    from llm2vec.files import alone_in

    with alone_in(args.output_dir, "comparison, or a run of an earlier one,") as lock:
        from llm2vec.compare.comparison import compare_recipes  # with torch: seconds
        from llm2vec.compare.table import failure_lines, outcome_table

        found = compare_recipes(
            args.folder,
            args.output_dir,
            seeds=args.seeds,
            lock=lock,
            say=out.say,
            recipes=args.recipes,
            workers=args.workers,
            processes=args.processes,
        )
    failed = failure_lines(found.outcomes)
    out.say("")
    for table in filter(None, [outcome_table(found.outcomes), found.halving]):
        out.table(table)
    out.say("", *failed)
    out.say(f"report: {found.page}    ({(time.monotonic() - started) / 60:.1f} minutes)")
    return 1 if failed else 0
