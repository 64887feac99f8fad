"""The report on one training set-up: its checkpoints' scores, its losses, its embedding space, as one static page.

Whatever was measured is shown, whoever is ahead. Nothing here runs a model or reads a checkpoint. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llm2vec.reports import figures
from llm2vec.reports.figures import Picture
from llm2vec.reports.logs import read_log, read_spaces, space_table, training_table
from llm2vec.reports.page import Page
from llm2vec.reports.scores import Score, ScoredStage, score_table, verdicts
from llm2vec.table import Table


def write_training_report(
    folder: Path,
    title: str,
    what: str,
    scores: Sequence[Score],
    curves: Sequence[Score],
    losses: Mapping[ScoredStage, Path],
    *,
    said: str,
    facts: Mapping[str, str],
) -> Path:
    """Write `report.html`, with its figures inside, and the figures beside it as PNG files; returns the page.

    Args:
        folder: where to write; made if missing.
        title: the page's heading.
        what: the scores are of: task and metric.
        scores: finished checkpoints, for the table and `by_stage.png`.
        curves: checkpoints along Stage II, for `early_stage.png`; empty leaves that figure out.
        losses: log file of each stage, for `losses.png`; empty leaves that figure out. Where runs logged diagnostics
            of their embeddings, there is a section on these too.
        said: seeds and numbers of rows, under the title and every caption.
        facts: what else is worth a line: what the control is, machine, versions.

    Raises:
        UserError: a log cannot be read, or the folder cannot be made.
    """
    caption = f"Score after each training stage; dashed: BM25. {said}"
    pictures = [Picture("by_stage.png", figures.by_stage_figure(scores, what), caption)]
    tables: list[Table] = []
    if curves:
        along = figures.early_stage_figure(curves, what)
        pictures.append(Picture("early_stage.png", along, f"Score against Stage II step. {said}"))
        tables.append(score_table(curves, what, "Scores along Stage II"))
    if logs := {stage: read_log(path) for stage, path in losses.items()}:
        pictures.append(Picture("losses.png", figures.losses_figure(logs), f"{figures.LOSSES_CAPTION} {said}"))
        tables.append(training_table(logs))
    blocks: list[Table | Picture] = [score_table(scores, what, "Scores", marks_best=True), *pictures, *tables]
    if spaces := read_spaces(losses):
        blocks += [space_table(spaces, "Embedding space"), *figures.space_pictures(spaces)]
    return Page(title, blocks, said, verdicts(scores), facts).write(folder / "report.html")
