"""Successive halving: the recipes of a sweep go part of the way, and only the best of them go on.

A rung is a share of the last stage's steps. At each, the recipes that a sweep made of one are ranked by a held-out
figure, and one in `factor` goes on, from its own checkpoint (Jamieson and Talwalkar 2016, arXiv 1502.07943). A rung is
the run itself, stopped early: its schedule is that of all steps, so who comes through has the weights of a run that
was never stopped, and a set without `halving` afterwards only finishes what fell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llm2vec.compare.recipes import Halving
from llm2vec.compare.runs import Run, Trial
from llm2vec.files import read_object, write_json
from llm2vec.reports.logs import read_log
from llm2vec.table import Table
from llm2vec.training.log import LOG_FILE
from llm2vec.types import UserError

#: Does runs, each with the recipe that asks for it; returns name of a run -> why it failed.
DoRuns = Callable[[Sequence[tuple[str, Run]]], dict[str, str]]


@dataclass
class Halved:
    """What a search came to."""

    trials: list[Trial]  #: Those that go to the end, and those that failed on the way
    failures: dict[str, str] = field(default_factory=dict)  #: Name of a run -> why it failed
    table: Table | None = None  #: Every trial of a sweep, its figure at each rung, and where it fell


def halve(trials: Sequence[Trial], halving: Halving, file: Path, do: DoRuns) -> Halved:
    """Take a sweep's trials from rung to rung; those that no sweep made are not touched. A `UserError`, which begins
    with `file`, where a run cannot be stopped at a rung, or no evaluation measures the metric."""
    of: dict[str, list[Trial]] = {}
    for trial in trials:
        if "," in trial.recipe and trial.training:
            of.setdefault(trial.recipe, []).append(trial)
    alive = list(of)
    rungs = {
        (trial.recipe, trial.seed, share): _rung(trial, share, file)
        for recipe in _contested(alive) for trial in of[recipe] for share in halving.rungs
    }  # fmt: skip
    figures: dict[str, list[float]] = {recipe: [] for recipe in _contested(alive)}
    fell: dict[str, str] = {}
    failures: dict[str, str] = {}
    for share in halving.rungs:
        racing = _contested(alive)
        at_rung = {recipe: [rungs[recipe, trial.seed, share] for trial in of[recipe]] for recipe in racing}
        before = {recipe: [run for trial in of[recipe] for run in trial.training[:-1]] for recipe in racing}
        failed = do([(recipe, run) for recipe in racing for run in before[recipe] + at_rung[recipe]])
        for recipe, runs in at_rung.items():
            if reasons := [failed[run.name] for run in runs if run.name in failed]:
                failures |= {trial.training[-1].name: reasons[0] for trial in of[recipe]}
                fell[recipe] = "failed"
            else:
                figures[recipe].append(statistics.fmean(_figure(run, halving.metric, file) for run in runs))
        for sweep in dict.fromkeys(map(_sweep_of, racing)):
            ranked = [recipe for recipe in racing if _sweep_of(recipe) == sweep and recipe not in fell]
            ranked.sort(key=lambda recipe: _rank(figures[recipe][-1], halving))  # of equals, the first goes on
            fell |= dict.fromkeys(ranked[math.ceil(len(ranked) / halving.factor) :], _percent(share))
        alive = [recipe for recipe in alive if recipe not in fell]
    through = [trial for trial in trials if fell.get(trial.recipe, "failed") == "failed"]
    return Halved(through, failures, _table(halving, figures, fell) if figures else None)


def _sweep_of(recipe: str) -> str:
    """The recipe of which a sweep made this one."""
    return recipe.partition(",")[0]


def _contested(recipes: Sequence[str]) -> list[str]:
    """Those that are not alone of their sweep."""
    sweeps = [_sweep_of(recipe) for recipe in recipes]
    return [recipe for recipe in recipes if sweeps.count(_sweep_of(recipe)) > 1]


def _rung(trial: Trial, share: float, file: Path) -> Run:
    """A trial's last training run, stopped at a share of its steps, with a checkpoint there."""
    run = trial.training[-1]
    keys, step = read_object(Path(run.arguments[0])), round(share * run.num_steps)
    every = keys.get("eval_steps", keys.get("logging_steps", 500))
    if keys.get("eval_strategy") != "steps" or keys.get("resume", "auto") != "auto":
        raise UserError(
            f"{file}: halving needs runs that evaluate and can go on, and {trial.recipe} does not: set eval_strategy "
            'to "steps", eval_steps and num_eval_rows, and leave resume out.'
        )
    if not 0 < step < run.num_steps or type(every) is not int or step % every:
        raise UserError(
            f"{file}: halving.rungs: {share:g} of the {run.num_steps} steps (max_steps) of {trial.recipe} is step "
            f"{step}; it must lie before the last one, and be a multiple of eval_steps, {every}."
        )
    stop = {"stop_after_n_steps": step, "save_strategy": "steps", "save_steps": step, "save_only_model": False}
    head, _, tail = run.name.rpartition("-")
    name = f"{head}-at{step}-{tail}"
    config = Path(run.arguments[0]).with_name(f"{name}.json")
    write_json(config, {**keys, **stop})
    return replace(run, name=name, arguments=(str(config),), num_steps=step, stop=step, marker=f".finished-at-{step}")


def _figure(rung: Run, metric: str, file: Path) -> float:
    """What a run's evaluation at a rung measured."""
    entries = [entry for entry in read_log(rung.folder / LOG_FILE) if entry["step"] == rung.num_steps]
    measured = {key: value for entry in entries for key, value in entry.items() if key.startswith("eval_")}
    if metric not in measured:
        raise UserError(
            f"{file}: halving.metric is {metric!r}, which {rung.folder} did not measure at step {rung.num_steps}; it "
            f"measured {', '.join(sorted(measured)) or 'nothing'}."
        )
    return measured[metric]


def _rank(figure: float, halving: Halving) -> float:
    """Smaller is better, whatever the metric; what is no number goes last."""
    return math.inf if math.isnan(figure) else figure if halving.lower_is_better else -figure


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _table(halving: Halving, figures: dict[str, list[float]], fell: dict[str, str]) -> Table:
    """Who came farthest first, and among them the best."""
    order = sorted(figures, key=lambda r: (-len(figures[r]), r in fell, [_rank(f, halving) for f in figures[r][-1:]]))
    header = ["Recipe", *map(_percent, halving.rungs), "Fell at"]
    missing: list[str | None] = [None] * len(halving.rungs)
    rows = [[r, *([f"{f:.6g}" for f in figures[r]] + missing)[: len(missing)], fell.get(r)] for r in order]
    return Table(
        header, rows, "Successive halving",
        f"{halving.metric} of held-out rows, mean over seeds; at each rung the "
        f"{'lowest' if halving.lower_is_better else 'highest'} 1 in {halving.factor} of a recipe's sweep went on.",
    )  # fmt: skip
