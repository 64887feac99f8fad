"""What compared recipes came to: their scores and what training cost, as tables and a figure, on one page.

Whatever was measured is shown, whoever is ahead; a recipe that failed is in the table, too.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from llm2vec.compare.recipes import REFERENCE, Recipe
from llm2vec.compare.record import TrialOutcome
from llm2vec.reports.comparisons import MIN_UNITS, Interval, paired_interval
from llm2vec.reports.figures import Picture, along_figure, points_figure
from llm2vec.reports.page import Page
from llm2vec.table import Cell, Table

_TITLE = "Recipes on the same data"
_NOTE = (
    "Scores x 100, mean over seeds; lowest and highest: of single seeds, over the mean of the tasks. Tokens: those of "
    "the training rows, templates and second copies included, over all stages. A text counts once, however "
    "often it passes the model (in Stage I twice, in language modelling once): as many tokens are not as much work. "
    "Minutes: of training alone, by its log, over all stages, beside whatever else ran at the time. Both are means "
    "over seeds; a stage that several recipes have in common counts for each."
)
_OWN_NOTE = "Keys that a recipe sets itself, stage after stage; all others are shared."
#: The fact that names the recipe which others are held against.
HELD_AGAINST = "Held against"
_DIFFERENCE_NOTE = (
    "Tasks: mean over the tasks that both have and the seeds that both were trained with, and twice its standard error "
    "over these seeds. Queries: mean nDCG@10 of the retrieval sets whose rankings were kept, each query's mean over "
    "the seeds, with its 95 % interval (paired bootstrap over queries, sets fixed). The interval knows nothing of the "
    "spread between seeds, and the standard error nothing of that between tasks. Two standard errors over so few seeds "
    "are no 95 %: chance alone lies outside them in 30 % of cases with two seeds, in 18 % with three."
)
_ALONG_CAPTION = (
    "Score against the step of the last stage, mean of {tasks}. Lines: mean over seeds; bands: lowest to highest seed."
)
_RANK_CAPTION = (
    "Mean score after the last stage against the effective rank of embeddings of held-out texts before it. A dot a "
    "recipe: mean over seeds; bars: lowest to highest seed."
)


def outcome_table(outcomes: Sequence[TrialOutcome]) -> Table:
    """A row a recipe, the highest mean of the tasks that all trained ones have first, and what has none last.

    Scores are x 100 and None where there is none.
    """
    by_recipe: dict[str, list[TrialOutcome]] = {}
    for outcome in outcomes:
        by_recipe.setdefault(outcome.recipe, []).append(outcome)
    tasks = list(dict.fromkeys(task for outcome in outcomes for task in outcome.scores))
    # What was not trained is there for scale: where it lacks tasks (BM25 compares no sentences), it has no mean.
    scored = [outcome for outcome in outcomes if outcome.failure is None]
    trained = [outcome for outcome in scored if outcome.seed is not None] or scored
    common = [task for task in tasks if all(task in outcome.scores for outcome in trained)]
    with_mean = len(tasks) > 1 and bool(common)
    header = ["Recipe", *tasks, *[f"Mean of {len(common)}"] * with_mean]
    header += ["Lowest", "Highest", "Seeds", "Tokens, millions", "Minutes"]
    rows: list[tuple[float, list[Cell]]] = []
    for recipe, of_seeds in by_recipe.items():
        scored = [outcome for outcome in of_seeds if outcome.failure is None]
        whole = [outcome for outcome in scored if common and outcome.scores.keys() >= set(common)]
        means = [statistics.fmean(outcome.scores[task] for task in common) for outcome in whole]
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


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing, or all are."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


class Difference(NamedTuple):
    """What one recipe has more than another, trained with the same seeds."""

    num_seeds: int
    tasks: float  #: mean over tasks and seeds, x 100
    error: float | None  #: twice its standard error over seeds; None of one seed
    queries: Interval | None  #: of nDCG@10 x 100 over queries; None where too few rankings were kept
    of_all_tasks: bool  #: whether the queries are those of all tasks

    def verdict(self) -> str:
        """In a word: `yes` or `no` where the interval leaves 0 out, else `open`. Seeds decide; of one, the queries, if
        they are those of all tasks."""
        if self.error is not None:
            low, high = self.tasks - self.error, self.tasks + self.error
        elif self.queries is not None and self.of_all_tasks:
            _, low, high, *_ = self.queries
        else:
            return "open"
        return "yes" if low > 0 else "no" if high < 0 else "open"


def by_seed(outcomes: Sequence[TrialOutcome]) -> dict[str, dict[int | None, TrialOutcome]]:
    """Recipe -> seed -> outcome, of trials that did not fail."""
    scored: dict[str, dict[int | None, TrialOutcome]] = {}
    for outcome in outcomes:
        if outcome.failure is None:
            scored.setdefault(outcome.recipe, {})[outcome.seed] = outcome
    return scored


def difference_table(outcomes: Sequence[TrialOutcome], facts: Mapping[str, str]) -> Table | None:
    """Each recipe less the one that the facts name, trained with the same seeds; None where there is no other."""
    scored, name = by_seed(outcomes), facts.get(HELD_AGAINST, REFERENCE)
    rows: list[list[Cell]] = []
    for recipe, own in scored.items():
        reference = _reference(recipe, list(scored), name)
        if reference not in (None, recipe) and (found := difference_of(own, scored[reference])) is not None:
            rows.append([recipe, str(found.num_seeds), *found[1:3], *(found.queries or (None,) * 3)[:3]])
    header = [f"Less {name}", "Seeds", "Tasks", "2 SE", "Queries", "Lowest", "Highest"]
    return Table(header, rows, "Differences", _DIFFERENCE_NOTE) if rows else None


def _reference(recipe: str, names: Sequence[str], reference: str) -> str | None:
    """Which variant of the reference a recipe is held against: of a sweep, the one with the values that it has, too."""
    own = set(recipe.split(",")[1:])
    fits = [name for name in names if name.split(",")[0] == reference and own.issuperset(name.split(",")[1:])]
    return max(fits, key=len, default=None)


def difference_of(
    own: Mapping[int | None, TrialOutcome], reference: Mapping[int | None, TrialOutcome]
) -> Difference | None:
    """One recipe less another, each seed -> outcome; None where they have no seed or no task in common."""
    # What was not trained has no seed, and is held against every one.
    seeds = sorted({*own, *reference} - {None}, key=int) or [None]  # type: ignore[arg-type]  # None is taken out
    pairs = [(own.get(seed, own.get(None)), reference.get(seed, reference.get(None))) for seed in seeds]
    both = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
    shown = [outcome for pair in both for outcome in pair]
    tasks = [task for task in shown[0].scores if all(task in outcome.scores for outcome in shown)] if shown else []
    if not tasks:
        return None
    of_seeds = [statistics.fmean(mine.scores[task] - other.scores[task] for task in tasks) for mine, other in both]
    error = 2 * statistics.stdev(of_seeds) / len(both) ** 0.5 if len(both) > 1 else None
    sets = [task for task in shown[0].queries if all(task in outcome.queries for outcome in shown)]
    queries = [
        (_over_seeds([mine.queries[task] for mine, _ in both]), _over_seeds([other.queries[task] for _, other in both]))
        for task in sets
    ]
    enough = bool(queries) and min(len(mine) for mine, _ in queries) >= MIN_UNITS
    interval = paired_interval(*queries) if enough else None
    return Difference(len(both), statistics.fmean(of_seeds), error, interval, set(sets) == set(tasks))


def _over_seeds(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {query: statistics.fmean(scores[query] for scores in of_seeds) for query in of_seeds[0]}


def along_picture(outcomes: Sequence[TrialOutcome]) -> Picture | None:
    """Scores along the last stage, its end included; None where there are none."""
    with_steps = [outcome for outcome in outcomes if outcome.along and outcome.steps]
    if not with_steps:
        return None
    tasks = list(next(iter(with_steps[0].along.values())))
    lines: dict[str, dict[int, list[float]]] = {}
    for outcome in with_steps:
        line = lines.setdefault(outcome.recipe, {})
        for step, scores in {**outcome.along, outcome.steps: outcome.scores}.items():
            line.setdefault(step, []).append(statistics.fmean(scores[task] for task in tasks))
    caption = _ALONG_CAPTION.format(tasks=", ".join(tasks))
    return Picture("along.png", along_figure(lines, f"mean of {len(tasks)} tasks x 100"), caption)


def rank_picture(outcomes: Sequence[TrialOutcome]) -> Picture | None:
    """Scores against the effective rank before the last stage; None where fewer than two recipes logged it."""
    points: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        if outcome.rank is not None and outcome.scores:
            points.setdefault(outcome.recipe, []).append((outcome.rank, statistics.fmean(outcome.scores.values())))
    if len(points) < 2:
        return None
    figure = points_figure(points, "effective rank of held-out texts before the last stage", "score after it x 100")
    return Picture("rank.png", figure, _RANK_CAPTION)


def failure_lines(outcomes: Sequence[TrialOutcome]) -> list[str]:
    """A line for each trial that failed."""
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    return [f"{o.recipe}{'' if o.seed is None else f', seed {o.seed}'}: {o.failure}" for o in failed]


def own_keys(recipes: Sequence[Recipe]) -> dict[str, str]:
    """Recipe -> what it sets itself, in words."""
    said = {}
    for recipe in recipes:
        own = [(s.stage, ", ".join(f"{key} {json.dumps(v)}" for key, v in s.keys.items())) for s in recipe.stages]
        stages = [f"{stage}: {keys}" if keys else stage for stage, keys in own]
        by = f" by {recipe.evaluation['settings']}" if "settings" in recipe.evaluation else ""
        said[recipe.name] = "; then ".join(stages) or f"scores {recipe.evaluation['base_model_name_or_path']}{by}"
    return said


def write_comparison(
    folder: Path, outcomes: Sequence[TrialOutcome], own: Mapping[str, str], facts: Mapping[str, str],
    halving: Table | None = None,
) -> Path:  # fmt: skip
    """Write `comparison.md`, `comparison.json` and, last, `comparison.html`, the path of which is returned; `along.png`
    too, where checkpoints were scored, and `rank.png`, where ranks were logged. `own` is what `own_keys` says, and
    `halving` the table of a search."""
    keys = Table(["Recipe", "Stages and own keys"], list(own.items()), "What each recipe sets itself", _OWN_NOTE, 2)
    shown = [outcome_table(outcomes), halving, difference_table(outcomes, facts), along_picture(outcomes)]
    shown += [rank_picture(outcomes), keys]
    blocks: list[Table | Picture] = [block for block in shown if block is not None]
    data = {"facts": dict(facts), "trials": [asdict(outcome) for outcome in outcomes]}
    return Page(_TITLE, blocks, "", failure_lines(outcomes), facts, data).write(folder / "comparison.html")
