"""The report on one training set-up: its checkpoints' scores, its losses, its embedding space, as one static page.

Whatever was measured is shown, whoever is ahead. Nothing here runs a model or reads a checkpoint. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec.reports.figures import (
    LOSSES_CAPTION,
    Picture,
    by_stage_figure,
    early_stage_figure,
    losses_figure,
    space_pictures,
)
from llm2vec.reports.logs import read_log, read_spaces, space_table, training_table
from llm2vec.reports.page import write_page
from llm2vec.reports.scores import Score, ScoredStage, score_table, verdicts
from llm2vec.table import Table

_BY_STAGE_CAPTION = (
    "Score after each training stage. Bars: mean over seeds; dots, where there is more than one seed: single seeds; "
    "dashed: BM25 on the same task."
)
_EARLY_STAGE_CAPTION = (
    "Score against Stage II step. Lines: mean over seeds; bands, where there is more than one seed: lowest to highest."
)


@dataclass(frozen=True)
class TrainingReport:
    """What a reader must know to judge the numbers; every caption names the seeds and the row counts.

    Attributes:
        title: heading of the page.
        seeds: of the runs.
        rows: what was counted -> how many, e.g. {"training pairs": 30000, "held-out queries": 700}.
        facts: anything else worth a line: what the control is, machine, versions, hours.

    Example:
        >>> report = TrainingReport("Small Anchor", seeds=(42,), rows={"training pairs": 30000})
        >>> report.write(Path("output/report"), scores, [], {"anchor": Path("output/anchor/log.jsonl")})
    """

    title: str
    seeds: tuple[int, ...]
    rows: Mapping[str, int]
    facts: Mapping[str, str] = field(default_factory=dict)

    def sentence(self) -> str:
        """Seeds and row counts in one line."""
        seeds = f"Seed{'s' * (len(self.seeds) != 1)} {', '.join(map(str, self.seeds))}"
        return "; ".join([seeds, *(f"{count:,} {name}" for name, count in self.rows.items())]) + "."

    def write(
        self,
        folder: Path,
        scores: Sequence[Score],
        curves: Sequence[Score],
        losses: Mapping[ScoredStage, Path],
    ) -> Path:
        """Write `report.html`, with its figures inside, and the figures beside it as PNG files.

        Args:
            folder: Where to write; made if missing.
            scores: Finished checkpoints, for the table and `by_stage.png`.
            curves: Checkpoints along Stage II, for `early_stage.png`; empty leaves that figure out.
            losses: Log file (JSON lines) of each stage, for `losses.png`; empty leaves that figure out. Where runs
                logged diagnostics of their embeddings, there is a section on these too.

        Returns:
            The path of `report.html`, which is written last.

        Raises:
            UserError: There are no scores, checkpoints have no task in common, a log cannot be read, or the folder
                cannot be made.
        """
        logs = {stage: read_log(path) for stage, path in losses.items()}
        spaces = read_spaces(losses)
        said = self.sentence()
        pictures = [Picture("by_stage.png", by_stage_figure(scores), f"{_BY_STAGE_CAPTION} {said}")]
        tables: list[Table] = []
        if any(score.step is not None for score in curves):
            caption = f"{_EARLY_STAGE_CAPTION} {said}"
            pictures.append(Picture("early_stage.png", early_stage_figure(curves), caption))
            tables.append(score_table(curves, "Scores along Stage II"))
        if logs:
            pictures.append(Picture("losses.png", losses_figure(logs), f"{LOSSES_CAPTION} {said}"))
            tables.append(training_table(logs))
        blocks: list[Table | Picture] = [score_table(scores, "Scores", marks_best=True), *pictures, *tables]
        if spaces:
            blocks += [space_table(spaces, "Embedding space"), *space_pictures(spaces)]
        return write_page(
            folder / "report.html", self.title, blocks, note=said, sentences=verdicts(scores), facts=self.facts
        )
