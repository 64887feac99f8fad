"""A set of recipes on the same data, end to end: train, evaluate, one table.

    llm2vec compare train_configs/comparison/quickstart --seeds 42 43        # what `make compare` runs
    llm2vec compare train_configs/comparison/llama3.2_1b --processes 8

The set is a folder of configs (`llm2vec/compare/runs.py` says which). A recipe's stages wait for each other; runs that
do not are done at the same time, `--workers` of them. What has been done and has not changed since is not done again.
A run that fails stops its own recipe only, and the exit code is then 1. Everything goes below --output_dir:

    runs/, evaluations/     checkpoints and scores, a folder a run
    configs/, logs/         the whole config and the output of each run
    comparison.html, .md, .json
    record/                 all that these are made of, as text: llm2vec report RECORD makes them again
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llm2vec import cli
from llm2vec.types import UserError

if TYPE_CHECKING:
    from llm2vec.compare.runs import Planner, Trial


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser("compare", __doc__)
    parser.add_argument("folder", type=Path, help="the set of configs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="each recipe is trained with each of them")
    parser.add_argument("--recipes", nargs="+", help="only these (default: all of the set)")
    parser.add_argument("--workers", type=cli.positive, help="runs at a time (default: one a GPU, or one a core)")
    parser.add_argument("--processes", type=cli.positive, default=1, help="of a training run, through torchrun")
    parser.add_argument("--output_dir", type=Path, help="default: output/comparison/ and the folder's name")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds are {' '.join(map(str, args.seeds))}; give each once.")
    args.output_dir = args.output_dir or Path("output/comparison", args.folder.resolve().name)
    return args


def main(argv: Sequence[str]) -> int:
    """Plan, run, report; returns the exit code: 1 where a run failed."""
    started, args = time.monotonic(), _parse_args(argv)
    from llm2vec.files import alone_in

    with alone_in(args.output_dir, "comparison, or a run of an earlier one,") as lock:
        return _compare(args, started, lock)


def _compare(args: argparse.Namespace, started: float, lock: int) -> int:
    """The same, in a folder that nobody else works in."""
    import torch  # seconds, and what follows needs it

    from llm2vec.compare.execution import Runner, do_all, num_cores
    from llm2vec.compare.record import write_record
    from llm2vec.compare.runs import unique_runs
    from llm2vec.compare.table import failure_lines, outcome_table, own_keys, write_comparison

    workers = args.workers or max(1, (torch.cuda.device_count() or num_cores()) // args.processes)
    planner, trials = _plan(args)
    runs = unique_runs(trials)
    num_recipes = len({trial.recipe for trial in trials})
    print(f"{len(trials)} trials of {num_recipes} recipes: {len(runs)} runs, {workers} at a time")
    runner = Runner(
        trials, args.output_dir, workers=workers, processes=args.processes, lock=lock, say=partial(print, flush=True)
    )
    failures = do_all(runs, runner.do, workers)
    facts = {
        "Base model": planner.recipes.shared["all"]["model_name_or_path"],
        "Seeds": ", ".join(map(str, args.seeds)),
        "Runs at a time": str(workers),
        "Processes of a training run": str(args.processes),
        "Machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs",
    }
    chosen = [recipe for recipe in planner.recipes.recipes if recipe.name in {t.recipe for t in trials}]
    own = own_keys(chosen)
    outcomes = write_record(args.output_dir / "record", trials, failures, own, facts)
    report = write_comparison(args.output_dir, outcomes, own, facts)
    print("", outcome_table(outcomes).text(), "", *failure_lines(outcomes), sep="\n")
    print(f"report: {report}    ({(time.monotonic() - started) / 60:.1f} minutes)")
    return 1 if failure_lines(outcomes) else 0


def _plan(args: argparse.Namespace) -> tuple[Planner, list[Trial]]:
    """The trials that were asked for; every config is read, and nothing runs yet."""
    from llm2vec.compare.runs import Planner, read_set

    planner = Planner(read_set(args.folder), args.output_dir, args.processes)
    trials = planner.trials(args.seeds)
    known = sorted({trial.recipe for trial in trials})
    if unknown := [name for name in args.recipes or () if name not in known]:
        raise UserError(f"--recipes: there is no {unknown[0]!r}; there are {', '.join(known)}.")
    return planner, [trial for trial in trials if args.recipes is None or trial.recipe in args.recipes]
