"""A comparison from end to end: plan every run, do them, keep the record, write the tables."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm2vec.compare.execution import Runner, do_all, num_cores
from llm2vec.compare.halving import Halved, halve
from llm2vec.compare.recipes import SHARED_FILE, read_set
from llm2vec.compare.record import TrialOutcome, write_record
from llm2vec.compare.runs import Planner, Run, Trial
from llm2vec.compare.table import HELD_AGAINST, own_keys, write_comparison
from llm2vec.table import Table
from llm2vec.types import UserError


@dataclass(frozen=True)
class RecipeComparison:
    """What came of a set of recipes."""

    trials: list[Trial]  #: Without those that fell in a search
    outcomes: list[TrialOutcome]  #: One a trial, in the same order
    page: Path
    halving: Table | None = None  #: All trials of a search by successive halving


def compare_recipes(
    folder: Path,
    output_dir: Path,
    *,
    seeds: Sequence[int],
    lock: int,
    say: Callable[[str], None],
    recipes: Sequence[str] | None = None,
    workers: int | None = None,
    processes: int = 1,
) -> RecipeComparison:
    """Do what of a set of configs has not been done yet, each recipe with each seed, and write record and tables.

    Args:
        folder: the set.
        output_dir: where everything goes; held by `lock`, a file descriptor.
        say: takes a line at the start, and one when a run has ended.
        recipes: only these; None = all of the set.
        workers: runs at a time; None = one a GPU, or one a core.
        processes: of a training run.

    Raises:
        UserError: a config is wrong, data are missing, or there is no recipe of a name. A run that fails raises
            nothing: its outcome says so.
    """
    workers = workers or max(1, (torch.cuda.device_count() or num_cores()) // processes)
    planner = Planner(read_set(folder), output_dir, processes)
    planned = planner.trials(seeds)
    known = sorted({trial.recipe for trial in planned})
    if unknown := [name for name in recipes or () if name not in known]:
        raise UserError(f"--recipes: there is no {unknown[0]!r}; there are {', '.join(known)}.")
    trials = [trial for trial in planned if recipes is None or trial.recipe in recipes]
    chosen = {trial.recipe for trial in trials}
    said = f"{len(trials)} trials of {len(chosen)} recipes"

    def do(of: Sequence[tuple[str, Run]]) -> dict[str, str]:
        runs = list({run.name: run for _, run in of}.values())
        say(f"{said}: {len(runs)} runs, {workers} at a time")
        runner = Runner(of, output_dir, workers=workers, processes=processes, lock=lock, say=say)
        return do_all(runs, runner.do, workers)

    search = planner.recipe_set.halving
    halved = Halved(trials) if search is None else halve(trials, search, folder / SHARED_FILE, do)
    going = [trial for trial in halved.trials if not any(run.name in halved.failures for run in trial.training)]
    said = f"{len(going)} trials of {len({trial.recipe for trial in going})} recipes"
    failures = halved.failures | do([(trial.recipe, run) for trial in going for run in trial.runs])
    own = own_keys([recipe for recipe in planner.recipe_set.recipes if recipe.name in chosen])
    facts = {
        "Base model": planner.recipe_set.shared["all"]["model_name_or_path"],
        HELD_AGAINST: planner.recipe_set.reference,
        "Seeds": ", ".join(map(str, seeds)),
        "Runs at a time": str(workers),
        "Processes of a training run": str(processes),
        "Machine": _machine(),
        "Date": time.strftime("%Y-%m-%d"),
        "Command": shlex.join(["llm2vec", *sys.argv[1:]]),
    }
    outcomes = write_record(output_dir / "record", halved.trials, failures, own, facts, halved.table)
    page = write_comparison(output_dir, outcomes, own, facts, halved.table)
    return RecipeComparison(halved.trials, outcomes, page, halved.table)


def _machine() -> str:
    """Processor, cores and cards, in words."""
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = f"{os.cpu_count()} cores of {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return ", ".join([cores, *cards])
