"""Scores of the checkpoints of one training set-up: their order, a table, who is ahead.

Whatever was measured is shown, whoever is ahead. Knows no file and no figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from llm2vec.table import Cell, Table

#: What was trained before a score was taken. Tables and figures list them in this order.
ScoredStage = Literal["bm25", "base", "stage_I", "baseline", "control", "only_d2q", "only_q2d", "anchor"]

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


class Score(NamedTuple):
    """One score of one checkpoint, of one run: on a task, or a mean over the tasks that all have."""

    stage: ScoredStage
    step: int | None  #: optimiser step of the stage; None where there is none, as for BM25
    value: float  #: x 100
    series: str = ""  #: whose it is, where figures tell several apart: `measured`, `paper`


def in_order(scores: Iterable[Score]) -> list[Score]:
    """Scores by series, stage and step; the series as they come."""
    scores = list(scores)
    series, stages = list(dict.fromkeys(score.series for score in scores)), get_args(ScoredStage)
    return sorted(scores, key=lambda s: (series.index(s.series), stages.index(s.stage), s.step or 0))


def score_table(scores: Iterable[Score], what: str, title: str = "", *, marks_best: bool = False) -> Table:
    """A row a checkpoint; `what` they are scores of heads the column."""
    rows: list[list[Cell]] = [
        [STAGE_NAMES[score.stage], "" if score.step is None else f"{score.step:,}", score.value]
        for score in in_order(scores)
    ]
    note = "Scores x 100; the highest of a column is bold." if marks_best else "Scores x 100."
    return Table(["Trained with", "Step", what], rows, title, note, marks_best=marks_best)


def verdicts(scores: Sequence[Score]) -> list[str]:
    """A sentence each for baseline and control: whether Anchor is ahead of them, and by how much."""
    last = {score.stage: score.value for score in in_order(scores)}
    sentences = []
    for stage in ("baseline", "control"):
        if "anchor" in last and stage in last:
            ahead = last["anchor"] - last[stage]
            gap = "level" if not ahead else f"{'ahead' if ahead > 0 else 'behind'} by {abs(ahead):.2f}"
            both = f"Anchor {last['anchor']:.2f}, {stage} {last[stage]:.2f}"
            sentences.append(f"{both}: Anchor is {gap} (one run each, so no spread).")
    return sentences
