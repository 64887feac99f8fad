"""Scores of the checkpoints of one training set-up, their names and their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

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
