"""Evaluated runs beside the paper (verdicts with a stated tolerance) and beside one another (intervals).

Everything is x 100. The interval comes from a paired bootstrap: what is drawn again, tasks or queries, is drawn for
both runs alike, so that what makes a task hard for both cancels. It knows nothing of the spread between training runs
of the same recipe, which only further seeds can show.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm2vec.reports.paper import Paper
from llm2vec.reports.results import Results
from llm2vec.types import UserError, needs_extra

Verdict = Literal["within", "near", "off", "not judged"]

#: A score of one task may differ from the paper's by this much and be within; see `TOLERANCES`.
TASK_TOLERANCE = 2.0
TOLERANCES = (
    f"Within: at most {TASK_TOLERANCE:g} / sqrt(n) points from the paper, n being the number of tasks averaged "
    f"({TASK_TOLERANCE:.2f} for one task, {TASK_TOLERANCE / math.sqrt(15):.2f} for 15, "
    f"{TASK_TOLERANCE / math.sqrt(56):.2f} for 56). Near: at most twice that. Off: further away. Why these: from one "
    "of the paper's models to the next, the difference of Anchor and baseline on the same task varies by 2.0 points "
    "(standard deviation, Tables 14 and 15); that is the only spread the paper shows, as it gives one run a row, and "
    "independent deviations shrink with the root of their number. For the mean of 56, within is then just under a "
    "quarter of the smallest gain the paper reports (1.12), and near just under half of it: a run that is near still "
    "lies nearer to its own row than to the other."
)

NUM_RESAMPLES = 10_000
LEVEL = 0.95
#: With fewer tasks or queries a bootstrap interval is much too narrow, and none is given.
MIN_UNITS = 10
#: Resamples are drawn in batches of about this many numbers, so that 10,000 of many queries fit into memory.
_BATCH = 2_000_000


class Check(NamedTuple):
    """A measured value beside the paper's; either may be missing."""

    measured: float | None
    printed: float | None
    num_tasks: int
    doubt: str = ""  #: Why the paper's value is not held against a run; empty where it is

    @property
    def difference(self) -> float | None:
        """Measured minus printed."""
        return None if self.measured is None or self.printed is None else self.measured - self.printed

    @property
    def verdict(self) -> Verdict | None:
        """How far off; None where either value is missing."""
        if self.difference is None:
            return None
        if self.doubt:
            return "not judged"
        # The paper rounds to two decimals, and so is the difference: no verdict hangs on the digits behind.
        tolerance, distance = TASK_TOLERANCE / math.sqrt(self.num_tasks), round(abs(self.difference), 2)
        return "within" if distance <= tolerance else "near" if distance <= 2 * tolerance else "off"


class Interval(NamedTuple):
    """A difference of two runs and where it lies when the units (tasks or queries) are drawn again."""

    difference: float
    low: float
    high: float
    num_units: int
    num_ahead: int  #: How many of the units the first run is ahead on

    def sentence(self, unit: str) -> str:
        """The interval in words."""
        return (
            f"{self.difference:+.2f}, {LEVEL:.0%} interval {self.low:+.2f} to {self.high:+.2f} (paired bootstrap over "
            f"{self.num_units:,} {unit}, {NUM_RESAMPLES:,} resamples); ahead on {self.num_ahead:,} of them"
        )


def paired_interval(*tasks: tuple[Mapping[str, float], Mapping[str, float]], seed: int = 0) -> Interval:
    """The mean over tasks of the first run's mean less the second's, and its percentile interval.

    Each task is a pair: unit (query) -> score of the first run, and of the second. Units are drawn again within each
    task; the tasks are fixed. A single pair has no tasks to keep apart: its units may be tasks, too. A `UserError`
    where the units of a pair differ, there are fewer than `MIN_UNITS`, or scipy is not there.

    Example:
        >>> paired_interval((anchor, baseline)).sentence("tasks")   # NFCorpus -> 35.0, ...
    """
    with needs_extra("An interval needs scipy", "eval"):
        from scipy.stats import bootstrap  # comes with mteb
    differences: list[NDArray[np.float64]] = []
    for first, second in tasks:
        if alone := sorted(first.keys() ^ second.keys()):
            raise UserError(f"Only one of the two runs has {', '.join(alone[:5])} ({len(alone)} in all).")
        if len(first) < MIN_UNITS:
            raise UserError(f"An interval needs {MIN_UNITS} or more tasks or queries, here there are {len(first)}.")
        differences.append(np.array([first[unit] - second[unit] for unit in sorted(first)], dtype=np.float64))
    units = np.concatenate(differences)
    found = bootstrap(
        differences, _mean_of_means, n_resamples=NUM_RESAMPLES, batch=max(1, _BATCH // len(units)),
        confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    difference = float(_mean_of_means(*differences))
    return Interval(difference, float(found.low), float(found.high), len(units), int((units > 0).sum()))


def _mean_of_means(*groups: NDArray[np.float64], axis: int = -1) -> Any:
    return np.mean([group.mean(axis=axis) for group in groups], axis=0)


@dataclass(frozen=True)
class EvaluatedRun:
    """One set of results under the name the paper's tables know it by (`anchor`, `anchor@25`), or any other."""

    name: str
    results: Results
    #: Task -> query -> score x 100, of tasks whose predictions were kept.
    query_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """Task -> main score x 100."""
        return self.results.scores


class Comparison(NamedTuple):
    """A paired comparison of two runs."""

    label: str  #: which runs, on what
    unit: str  #: what was drawn again: tasks, queries
    interval: Interval


def pairs(runs: Sequence[EvaluatedRun]) -> list[tuple[EvaluatedRun, EvaluatedRun]]:
    """Which runs are compared: each with the one named baseline or, if none is, with the last one.

    Checkpoints along the way (`anchor@25`) are left to Table 9.
    """
    finished = [run for run in runs if "@" not in run.name]
    reference = next((run for run in finished if run.name == "baseline"), finished[-1] if finished else None)
    return [(run, reference) for run in finished if reference is not None and run is not reference]


def compare_runs(runs: Sequence[EvaluatedRun], paper: Paper) -> list[Comparison]:
    """An interval for each pair over the tasks that both have, and over queries where both have scores of them. Scores
    of different queries, or of too few, are a `UserError`."""
    found = []
    for run, other in pairs(runs):
        tasks, label = _common_tasks(run, other, paper), f"{run.name} - {other.name}"
        if len(tasks) >= MIN_UNITS:
            mine, theirs = ({task: one.scores[task] for task in tasks} for one in (run, other))
            found.append(Comparison(label, "tasks", paired_interval((mine, theirs))))
        common = [task for task in run.query_scores if task in other.query_scores]
        queries = {task: (run.query_scores[task], other.query_scores[task]) for task in common}
        for task, both in queries.items():
            try:
                found.append(Comparison(f"{label} on {task}", "queries", paired_interval(both)))
            except UserError as error:
                raise UserError(f"{label} on {task}: {error}") from None
        if len(queries) > 1:
            interval = paired_interval(*queries.values())
            found.append(Comparison(f"{label}, mean of these {len(queries)} tasks", "queries, tasks fixed", interval))
    return found


def _common_tasks(run: EvaluatedRun, other: EvaluatedRun, paper: Paper) -> list[str]:
    """The tasks of the 56 that both have; any others if there is none of these."""
    common = set(run.scores) & set(other.scores)
    return sorted(common & set(paper.tasks) or common)


def comparison_sentences(
    comparisons: Sequence[Comparison], runs: Sequence[EvaluatedRun], paper: Paper, model: str | None
) -> list[str]:
    """The comparisons in words, those that cannot be made, the paper's own, and runs scored on different data."""
    sentences = [f"{c.label}: {c.interval.sentence(c.unit)}." for c in comparisons]
    different = []
    for run, other in pairs(runs):
        tasks = _common_tasks(run, other, paper)
        if not tasks:
            sentences.append(f"{run.name} and {other.name} have no task in common.")
        elif len(tasks) < MIN_UNITS:
            mean = statistics.fmean(run.scores[task] - other.scores[task] for task in tasks)
            over = f"the {len(tasks)} tasks both have" if len(tasks) > 1 else f"{tasks[0]}, the one task both have"
            sentences.append(f"{run.name} - {other.name}: {mean:+.2f} over {over}, too few for an interval.")
        mine, theirs = run.results.data_revisions, other.results.data_revisions
        if differing := [task for task in mine if task in theirs and mine[task] != theirs[task]]:
            different.append(
                f"{run.name} and {other.name} were scored on different revisions of the data of "
                f"{', '.join(differing)}: their differences there are not the model's alone."
            )
    if model in paper.expected:  # the same bootstrap over the paper's own scores, to judge a run's by
        interval = paired_interval((paper.expected[model]["anchor"], paper.expected[model]["baseline"]))
        sentences.append(f"The paper's own scores, anchor - baseline: {interval.sentence('tasks')}.")
    return sentences + different
