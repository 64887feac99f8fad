"""Evaluated runs beside one another: which are compared, by how much one is ahead, and what makes that doubtful."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llm2vec.reports.intervals import MIN_UNITS, Interval, paired_interval
from llm2vec.reports.paper import Paper
from llm2vec.reports.results import Results
from llm2vec.types import UserError


@dataclass(frozen=True)
class EvaluatedRun:
    """One set of results under the name the paper's tables know it by, or any other.

    Attributes:
        name: For instance `anchor`, `baseline` or `anchor@25`.
        results: What was read.
        query_scores: Task -> query -> score x 100, of tasks whose predictions were kept.
    """

    name: str
    results: Results
    query_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """Task -> main score x 100."""
        return self.results.scores


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two runs.

    Attributes:
        label: which runs, on what.
        unit: what was drawn again: "tasks", "queries".
        interval: the difference, and where it lies.
    """

    label: str
    unit: str
    interval: Interval


def pairs(runs: Sequence[EvaluatedRun]) -> list[tuple[EvaluatedRun, EvaluatedRun]]:
    """Which runs are compared: each with the one named baseline or, if none is, with the last one.

    Checkpoints along the way (`anchor@25`) are left to Table 9.
    """
    finished = [run for run in runs if "@" not in run.name]
    reference = next((run for run in finished if run.name == "baseline"), finished[-1] if finished else None)
    return [(run, reference) for run in finished if reference is not None and run is not reference]


def compare_runs(runs: Sequence[EvaluatedRun], paper: Paper) -> list[Comparison]:
    """An interval for each pair over the tasks that both have, and over queries where both have scores of them.

    Raises:
        UserError: two runs have scores of different queries, or of too few.
    """
    return [comparison for pair in pairs(runs) for comparison in _compare(*pair, paper)]


def comparison_sentences(
    comparisons: Sequence[Comparison], runs: Sequence[EvaluatedRun], paper: Paper, model: str | None
) -> list[str]:
    """The comparisons in words, those that cannot be made, the paper's own, and runs scored on different data.

    Args:
        comparisons: of `compare_runs`.
        runs: the runs that were compared.
        paper: the paper's data.
        model: which of the paper's models the runs are compared with; None = none.
    """
    sentences = [f"{c.label}: {c.interval.sentence(c.unit)}." for c in comparisons]
    sentences += [sentence for pair in pairs(runs) for sentence in _too_few(*pair, paper)]
    return sentences + _paper_interval(paper, model) + _different_data(runs)


def _common_tasks(run: EvaluatedRun, other: EvaluatedRun, paper: Paper) -> list[str]:
    """The tasks of the 56 that both have; any others if there is none of these."""
    common = set(run.scores) & set(other.scores)
    return sorted(common & set(paper.tasks) or common)


def _compare(run: EvaluatedRun, other: EvaluatedRun, paper: Paper) -> list[Comparison]:
    """Over the tasks that both have, and over the queries of tasks where both have scores of single queries."""
    tasks, label = _common_tasks(run, other, paper), f"{run.name} - {other.name}"
    found = []
    if len(tasks) >= MIN_UNITS:
        mine, theirs = ({task: one.scores[task] for task in tasks} for one in (run, other))
        found.append(Comparison(label, "tasks", paired_interval((mine, theirs))))
    queries = {
        task: (of, other.query_scores[task]) for task, of in run.query_scores.items() if task in other.query_scores
    }
    for task, both in queries.items():
        try:
            found.append(Comparison(f"{label} on {task}", "queries", paired_interval(both)))
        except UserError as error:
            raise UserError(f"{label} on {task}: {error}") from None
    if len(queries) > 1:
        interval = paired_interval(*queries.values())
        found.append(Comparison(f"{label}, mean of these {len(queries)} tasks", "queries, tasks fixed", interval))
    return found


def _too_few(run: EvaluatedRun, other: EvaluatedRun, paper: Paper) -> list[str]:
    tasks = _common_tasks(run, other, paper)
    if len(tasks) >= MIN_UNITS:
        return []
    if not tasks:
        return [f"{run.name} and {other.name} have no task in common."]
    mean = statistics.fmean(run.scores[task] - other.scores[task] for task in tasks)
    over = f"the {len(tasks)} tasks both have" if len(tasks) > 1 else f"{tasks[0]}, the one task both have"
    return [f"{run.name} - {other.name}: {mean:+.2f} over {over}, too few for an interval."]


def _paper_interval(paper: Paper, model: str | None) -> list[str]:
    """The same bootstrap over the paper's own scores, to judge a run's by."""
    if model not in paper.expected:
        return []
    interval = paired_interval((paper.expected[model]["anchor"], paper.expected[model]["baseline"]))
    return [f"The paper's own scores, anchor - baseline: {interval.sentence('tasks')}."]


def _different_data(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Differences mean little where two runs were scored on different data."""
    sentences = []
    for run, other in pairs(runs):
        mine, theirs = run.results.data_revisions, other.results.data_revisions
        if tasks := [task for task in mine if task in theirs and mine[task] != theirs[task]]:
            said = f"{run.name} and {other.name} were scored on different revisions of the data of {', '.join(tasks)}"
            sentences.append(f"{said}: their differences there are not the model's alone.")
    return sentences
