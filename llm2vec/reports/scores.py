"""Scores of checkpoints of one training set-up: what is comparable, means over seeds, a table, who is ahead.

Whatever was measured is shown, whoever is ahead. Knows no file and no figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from llm2vec.table import Cell, Table
from llm2vec.types import UserError

#: What was trained before a score was taken. Tables and figures list them in this order.
ScoredStage = Literal["bm25", "base", "stage_I", "baseline", "control", "only_d2q", "only_q2d", "anchor"]
#: Model, stage, step: what runs that differ by their seed share.
RunKey: TypeAlias = tuple[str, ScoredStage, int | None]

STAGE_NAMES: dict[ScoredStage, str] = {
    "bm25": "BM25",
    "base": "Base model",
    "stage_I": "Stage I only",
    "baseline": "Baseline (Stage II only)",
    "control": "Control",
    "only_d2q": "OnlyD2Q (alpha 0)",
    "only_q2d": "OnlyQ2D (alpha 1)",
    "anchor": "Anchor (Stage I + II)",
}
_METRIC_NAMES = {"ndcg_at_10": "nDCG@10", "cosine_spearman": "Spearman"}


@dataclass(frozen=True)
class Score:
    """One score of one checkpoint. Scores of a run that differ in `seed` are repeats and are averaged.

    Example:
        >>> Score("Llama-3.2-1B", "anchor", 2000, "NFCorpus", "ndcg_at_10", 0.35, seed=42)
    """

    model: str
    stage: ScoredStage
    #: Optimiser step of the stage; None where there is none, as for BM25 and the base model.
    step: int | None
    task: str
    #: mteb's name of the metric.
    metric: str
    #: A fraction, -1 to 1; shown x 100.
    value: float
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse a score already multiplied by 100 and a stage no figure knows."""
        if self.stage not in get_args(ScoredStage):
            raise UserError(f"stage is {self.stage!r}: choose one of {', '.join(get_args(ScoredStage))}.")
        if not -1 <= self.value <= 1:  # false for NaN, too
            raise UserError(f"{self.task} {self.metric} of {self.model} is {self.value}: give a fraction from -1 to 1.")


def common_columns(scores: Iterable[Score]) -> list[tuple[str, str]]:
    """The (task, metric) pairs that every run with every seed has, in order of first appearance.

    Means over different sets of tasks cannot be compared, so only these enter means and figures.

    Raises:
        UserError: No pair is common to all.
    """
    found: dict[Any, dict[tuple[str, str], None]] = {}
    for score in scores:
        found.setdefault((score.model, score.stage, score.step, score.seed), {})[score.task, score.metric] = None
    first, *others = found.values() or [{}]
    columns = [column for column in first if all(column in of_run for of_run in others)]
    if not columns:
        raise UserError("There is no task that all checkpoints have a score of: evaluate them on the same tasks.")
    return columns


def run_means(scores: Sequence[Score]) -> dict[RunKey, list[float]]:
    """Each run's mean over the common columns, x 100, one value a seed; runs by model, stage, step."""
    columns = set(common_columns(scores))
    values: dict[RunKey, dict[int | None, list[float]]] = {}
    for score in scores:
        if (score.task, score.metric) in columns:
            run = values.setdefault((score.model, score.stage, score.step), {})
            run.setdefault(score.seed, []).append(100 * score.value)
    means = {run: [statistics.fmean(of_seed) for of_seed in seeds.values()] for run, seeds in values.items()}
    models = list(dict.fromkeys(score.model for score in scores))
    stages = get_args(ScoredStage)
    order = sorted(means, key=lambda run: (models.index(run[0]), stages.index(run[1]), run[2] or 0))
    return {run: means[run] for run in order}


def score_table(scores: Sequence[Score], title: str = "", *, marks_best: bool = False) -> Table:
    """A row a run: model, stage, step, each task (mean over seeds), mean of the tasks, seeds, range.

    Scores are x 100 and None where there is none.
    """
    common, means = common_columns(scores), run_means(scores)
    values: dict[tuple[str, str], dict[RunKey, list[float]]] = {}
    for score in scores:
        of_task = values.setdefault((score.task, score.metric), {})
        of_task.setdefault((score.model, score.stage, score.step), []).append(100 * score.value)
    repeated = any(len(of_seeds) > 1 for of_seeds in means.values())
    header = ["Model", "Trained with", "Step", *(f"{task} {metric_name(metric)}" for task, metric in values)]
    header += [f"Mean of {len(common)}"] * (len(values) > 1) + ["Seeds", "Lowest", "Highest"] * repeated
    rows: list[list[Cell]] = []
    for run, of_seeds in means.items():
        model, stage, step = run
        row: list[Cell] = [model, STAGE_NAMES[stage], "" if step is None else f"{step:,}"]
        row += [statistics.fmean(of_task[run]) if run in of_task else None for of_task in values.values()]
        row += [statistics.fmean(of_seeds)] * (len(values) > 1)
        row += [str(len(of_seeds)), min(of_seeds), max(of_seeds)] * repeated
        rows.append(row)
    note = "Scores x 100; the highest of a column is bold." if marks_best else "Scores x 100."
    return Table(header, rows, title, note, num_names=2, marks_best=marks_best)


def verdicts(scores: Sequence[Score]) -> list[str]:
    """One sentence for each model and each of baseline and control: who is ahead of whom, by how much, on what."""
    last = {(model, stage): values for (model, stage, _), values in run_means(scores).items()}
    sentences: list[str] = []
    for (model, stage), values in last.items():
        anchor = last.get((model, "anchor"))
        if anchor is None or stage not in ("baseline", "control"):
            continue
        mine, other = statistics.fmean(anchor), statistics.fmean(values)
        gap = "level" if mine == other else f"{'ahead' if mine > other else 'behind'} by {abs(mine - other):.2f}"
        is_single = len(anchor) == len(values) == 1
        runs = "one run each, so no spread" if is_single else f"{len(anchor)} and {len(values)} runs"
        sentences.append(f"{model}: Anchor {mine:.2f}, {stage} {other:.2f}: Anchor is {gap} ({runs}).")
    return sentences


def metric_name(metric: str) -> str:
    """How a metric of mteb is written in tables and on axes."""
    return _METRIC_NAMES.get(metric, metric)
