"""The report on one training set-up: its checkpoints' scores, its losses, its embedding space, as one static page.

Whatever was measured is shown, whoever is ahead. Nothing here runs a model or reads a checkpoint. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec.reports import figures
from llm2vec.reports.figures import Picture
from llm2vec.reports.logs import read_log, read_spaces, space_table, training_table
from llm2vec.reports.page import write_page
from llm2vec.reports.scores import Score, ScoredStage, score_table, verdicts
from llm2vec.table import Table

_BY_STAGE_CAPTION = "Score after each training stage. Bars: mean over seeds; dots: single seeds; dashed: BM25."
_EARLY_STAGE_CAPTION = "Score against Stage II step. Lines: mean over seeds; bands: lowest to highest seed."


@dataclass(frozen=True)
class TrainingReport:
    """What a reader must know to judge the numbers; every caption names the seeds and the row counts.

    Example:
        >>> report = TrainingReport("Small Anchor", seeds=(42,), rows={"training pairs": 30000})
        >>> report.write(Path("output/report"), scores, [], {"anchor": Path("output/anchor/log.jsonl")})
    """

    title: str
    seeds: tuple[int, ...]
    #: What was counted -> how many, e.g. {"training pairs": 30000, "held-out queries": 700}.
    rows: Mapping[str, int]
    #: Anything else worth a line: what the control is, machine, versions, hours.
    facts: Mapping[str, str] = field(default_factory=dict)

    def sentence(self) -> str:
        """Seeds and row counts in one line."""
        seeds = f"Seed{'s' * (len(self.seeds) != 1)} {', '.join(map(str, self.seeds))}"
        return "; ".join([seeds, *(f"{count:,} {name}" for name, count in self.rows.items())]) + "."

    def write(
        self, folder: Path, scores: Sequence[Score], curves: Sequence[Score], losses: Mapping[ScoredStage, Path]
    ) -> Path:
        """Write `report.html`, with its figures inside, and the figures beside it as PNG files; returns the page.

        Args:
            folder: Where to write; made if missing.
            scores: Finished checkpoints, for the table and `by_stage.png`.
            curves: Checkpoints along Stage II, for `early_stage.png`; empty leaves that figure out.
            losses: Log file (JSON lines) of each stage, for `losses.png`; empty leaves that figure out. Where runs
                logged diagnostics of their embeddings, there is a section on these too.

        Raises:
            UserError: There are no scores, checkpoints have no task in common, a log cannot be read, or the folder
                cannot be made.
        """
        said = self.sentence()
        pictures = [Picture("by_stage.png", figures.by_stage_figure(scores), f"{_BY_STAGE_CAPTION} {said}")]
        tables: list[Table] = []
        if any(score.step is not None for score in curves):
            along = figures.early_stage_figure(curves)
            pictures.append(Picture("early_stage.png", along, f"{_EARLY_STAGE_CAPTION} {said}"))
            tables.append(score_table(curves, "Scores along Stage II"))
        if logs := {stage: read_log(path) for stage, path in losses.items()}:
            pictures.append(Picture("losses.png", figures.losses_figure(logs), f"{figures.LOSSES_CAPTION} {said}"))
            tables.append(training_table(logs))
        blocks: list[Table | Picture] = [score_table(scores, "Scores", marks_best=True), *pictures, *tables]
        if spaces := read_spaces(losses):
            blocks += [space_table(spaces, "Embedding space"), *figures.space_pictures(spaces)]
        return write_page(
            folder / "report.html", self.title, blocks, note=said, sentences=verdicts(scores), facts=self.facts
        )
