"""What compared recipes came to: their scores and what training cost, as one table, beside a page, Markdown and JSON.

Whatever was measured is shown, whoever is ahead; a recipe that failed is in the table, too.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llm2vec.compare.runs import Recipe, Trial
from llm2vec.files import write_json, write_text
from llm2vec.reports.logs import read_log
from llm2vec.reports.page import make_folder, write_page
from llm2vec.reports.results import read_results
from llm2vec.table import Cell, Table
from llm2vec.train.log import LOG_FILE
from llm2vec.types import UserError

_TITLE = "Recipes on the same data"
_NOTE = (
    "Scores x 100, mean over seeds; lowest and highest: of single seeds, over the mean of the tasks. Tokens: those of "
    "the training rows, templates and second copies included, over all stages. Minutes: of training alone, over all "
    "stages, beside whatever else ran at the time. Both are means over seeds; a stage that several recipes have in "
    "common counts for each."
)
_OWN_NOTE = "Keys that a recipe sets itself, stage after stage; all others are shared."


@dataclass(frozen=True)
class TrialOutcome:
    """What one recipe came to with one seed."""

    recipe: str
    seed: int | None  #: None without training
    scores: dict[str, float]  #: Task -> main score x 100; empty after a failure
    #: Of the training rows, over all stages, and the minutes of training; None where the logs do not say.
    tokens: float | None = None
    minutes: float | None = None
    failure: str | None = None  #: Why there is no score; None = there is
    runs: tuple[str, ...] = ()  #: Folders of its stages and of its scores


def outcome_of(trial: Trial, failures: Mapping[str, str]) -> TrialOutcome:
    """What a trial's runs left, all of which are done or failed (name of a run -> why)."""
    folders = tuple(str(run.folder) for run in trial.runs)
    outcome = TrialOutcome(trial.recipe, trial.seed, {}, runs=folders)
    if reason := next((failures[run.name] for run in trial.runs if run.name in failures), None):
        return replace(outcome, failure=reason)
    try:
        scores = read_results(trial.evaluation.folder).scores
    except UserError as error:
        return replace(outcome, failure=str(error))
    costs = [_costs(run.folder / LOG_FILE) for run in trial.training]
    tokens, minutes = _all_of([cost[0] for cost in costs]), _all_of([cost[1] for cost in costs])
    return replace(outcome, scores=scores, tokens=tokens, minutes=minutes)


def _costs(file: Path) -> tuple[float | None, float | None]:
    """Tokens and minutes of a run; None where its log does not say.

    The steps behind the last multiple of `logging_steps` have no entry: they are taken to be like the others.
    """
    log = read_log(file) if file.is_file() else []
    with_tokens = [entry for entry in log if "tokens" in entry]
    seconds = [entry["train_runtime"] for entry in log if "train_runtime" in entry]
    tokens = None
    if with_tokens:
        steps = max(entry["step"] for entry in log), max(entry["step"] for entry in with_tokens)
        tokens = sum(entry["tokens"] for entry in with_tokens) * steps[0] / steps[1]
    return tokens, sum(seconds) / 60 if seconds else None


def outcome_table(outcomes: Sequence[TrialOutcome]) -> Table:
    """A row a recipe, the highest mean of the tasks that all have first, and what has none last.

    Scores are x 100 and None where there is none.
    """
    by_recipe: dict[str, list[TrialOutcome]] = {}
    for outcome in outcomes:
        by_recipe.setdefault(outcome.recipe, []).append(outcome)
    tasks = list(dict.fromkeys(task for outcome in outcomes for task in outcome.scores))
    common = [task for task in tasks if all(task in o.scores for o in outcomes if o.failure is None)]
    with_mean = len(tasks) > 1 and bool(common)
    header = ["Recipe", *tasks, *[f"Mean of {len(common)}"] * with_mean]
    header += ["Lowest", "Highest", "Seeds", "Tokens, millions", "Minutes"]
    rows: list[tuple[float, list[Cell]]] = []
    for recipe, of_seeds in by_recipe.items():
        scored = [outcome for outcome in of_seeds if outcome.failure is None]
        means = [statistics.fmean(outcome.scores[task] for task in common) for outcome in scored if common]
        row: list[Cell] = [recipe]
        row += [_mean([outcome.scores.get(task) for outcome in scored]) for task in tasks]
        row += [_mean(means)] * with_mean
        row += [min(means), max(means)] if len(means) > 1 else [None, None]
        seeds = None if of_seeds[0].seed is None else str(len(scored))
        row.append(f"{len(scored)} of {len(of_seeds)}: failed" if len(scored) < len(of_seeds) else seeds)
        tokens = _mean([outcome.tokens for outcome in scored])
        row += [None if tokens is None else tokens / 1e6, _mean([outcome.minutes for outcome in scored])]
        rows.append((statistics.fmean(means) if means else -float("inf"), row))
    return Table(header, [row for _, row in sorted(rows, key=lambda pair: -pair[0])], "Scores", _NOTE)


def _all_of(values: Sequence[float | None], combine: Callable[[list[float]], float] = sum) -> float | None:
    """Their sum, or what else they are combined to; None where one is missing, or all are."""
    known = [value for value in values if value is not None]
    return combine(known) if known and len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    return _all_of(values, statistics.fmean)


def failure_lines(outcomes: Sequence[TrialOutcome]) -> list[str]:
    """A line for each trial that failed."""
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    return [f"{o.recipe}{'' if o.seed is None else f', seed {o.seed}'}: {o.failure}" for o in failed]


def own_keys_table(recipes: Sequence[Recipe]) -> Table:
    """What each recipe sets itself."""
    rows: list[list[Cell]] = []
    for recipe in recipes:
        own = [(s.stage, ", ".join(f"{key} {json.dumps(v)}" for key, v in s.keys.items())) for s in recipe.stages]
        stages = [f"{stage}: {keys}" if keys else stage for stage, keys in own]
        rows.append([recipe.name, "; then ".join(stages) or f"scores {recipe.evaluation['base_model_name_or_path']}"])
    title = "What each recipe sets itself"
    return Table(["Recipe", "Stages and own keys"], rows, title, _OWN_NOTE, num_names=2)


def write_comparison(
    folder: Path, outcomes: Sequence[TrialOutcome], recipes: Sequence[Recipe], facts: Mapping[str, str]
) -> Path:
    """Write `comparison.md`, `comparison.json` and, last, `comparison.html`, the path of which is returned.

    Args:
        folder: Where to write.
        outcomes: Of all trials.
        recipes: Their recipes.
        facts: What else a reader should know.
    """
    scores, own = outcome_table(outcomes), own_keys_table(recipes)
    failures = failure_lines(outcomes)
    make_folder(folder)
    content = {"facts": dict(facts), "trials": [asdict(outcome) for outcome in outcomes]}
    write_json(folder / "comparison.json", content)
    blocks = [f"# {_TITLE}", scores.markdown(), scores.note, *(f"- {line}" for line in failures)]
    blocks += [f"## {own.title}", own.markdown(), own.note]
    blocks.append("\n".join(f"- {name}: {text}" for name, text in facts.items()))
    write_text(folder / "comparison.md", "\n\n".join(blocks) + "\n")
    return write_page(folder / "comparison.html", _TITLE, [scores, own], sentences=failures, facts=facts)
