"""What training runs logged, for the reports: losses, and the embedding space along training, read and as tables.

From a run's `log.jsonl`, and the histograms in the `diagnostics.jsonl` beside it (`probes/diagnostics.py` says what
they are). Runs that logged no diagnostics have no space.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from llm2vec.files import DIAGNOSTICS_FILE, json_lines
from llm2vec.reports.scores import STAGE_NAMES, ScoredStage
from llm2vec.table import Cell, Table
from llm2vec.types import UserError

#: positive, hard_negative, random -> counts in equal bins of the cosine from -1 to 1.
Histograms: TypeAlias = dict[str, list[int]]

#: Beyond it, a figure's axis cannot be drawn.
LARGEST_NUMBER = 1e30

_LOSSES = {"loss_q2d": "EBQ2D", "loss_d2q": "EBD2Q", "loss_contrastive": "InfoNCE"}
#: Figure of the log -> its column, and what it is multiplied with.
_COLUMNS = {
    "uniformity_document": ("Uniformity", 1),
    "effective_rank": ("Effective rank", 1),
    "anisotropy": ("Anisotropy", 1),
    "anchor_norm": ("Norm of anchors", 1),
    "embedding_norm": ("Norm of embeddings", 1),
    "cosine_positive": ("Cosine of positives", 1),
    "cosine_hard_negative": ("Cosine of hard negatives", 1),
    "beats_hard_negatives": ("Hard negatives beaten", 100),
    "recall_at_1": ("Recall@1", 100),
}
_SPACE_NOTE = (
    "On rows held out of the training files, which are no test of other data. Uniformity, effective rank and "
    "anisotropy (mean cosine of two): of documents. Cosines: means; alignment is 2 - 2 x that of positives. Hard "
    "negatives beaten: share of rows, x 100, whose positive is closer to the query than each of their hard negatives. "
    "Recall@1: the same against all other documents of the line's rows; it falls as these grow in number."
)


class Shapes(NamedTuple):
    """Histograms of one evaluation: over all rows, and by source where there are several."""

    step: int
    all: Histograms
    sources: dict[str, Histograms]


class Space(NamedTuple):
    """What a run logged of its embedding space: its evaluations in the log, and the histograms of the same steps."""

    log: list[dict[str, float]]
    shapes: list[Shapes]


def read_log(path: Path) -> list[dict[str, float]]:
    """A loss log: one JSON object a line with `step` and any of the loss parts and rates; skipped steps are left out. A
    `UserError` names file and line of anything else."""
    entries: list[dict[str, float]] = []
    for where, entry in json_lines(path):
        if "skipped" in entry:  # whose line names rows, not figures
            continue
        try:
            if any(abs(value) > LARGEST_NUMBER for value in entry.values()):
                raise ValueError(f"none above {LARGEST_NUMBER:g}")
            entries.append({"step": entry["step"], **{key: float(value) for key, value in entry.items()}})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{where}: expected an object of numbers with the key step ({error}).") from None
    return entries


def curve(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the entries that hold `key`."""
    entries = [entry for entry in log if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def read_spaces(logs: Mapping[ScoredStage, Path]) -> dict[ScoredStage, Space]:
    """What the runs logged of their embedding space, those that did; the histograms lie beside each log. Errors are
    as of `read_log` and `read_shapes`."""
    spaces: dict[ScoredStage, Space] = {}
    for stage, path in logs.items():
        evaluations = [entry for entry in read_log(path) if "eval_alignment" in entry]
        if not evaluations:
            continue
        steps = {entry["step"] for entry in evaluations}
        file = path.with_name(DIAGNOSTICS_FILE)
        # A run that was resumed may have written a step twice: the last line counts.
        by_step = {one.step: one for one in (read_shapes(file) if file.is_file() else [])}
        spaces[stage] = Space(evaluations, [one for step, one in sorted(by_step.items()) if step in steps])
    return spaces


def read_shapes(path: Path) -> list[Shapes]:
    """The lines of a `diagnostics.jsonl`; a `UserError` names file and line of what is no step with histograms."""
    shape = {"step": int, "all": {str: [int]}, "sources": {str: {str: [int]}}}
    return [Shapes(one["step"], one["all"], one["sources"]) for _, one in json_lines(path, shape=shape)]


def training_table(logs: Mapping[ScoredStage, Sequence[Mapping[str, float]]]) -> Table:
    """A row a log: last step, first and last of each loss part, last accuracy x 100, median speed."""
    header = ["Trained with", "Steps", *(f"{name}, first to last" for name in _LOSSES.values())]
    header += ["Last in-batch accuracy x 100", "Tokens per second"]
    rows: list[list[Cell]] = []
    for stage, log in logs.items():
        row: list[Cell] = [STAGE_NAMES[stage], f"{max(entry['step'] for entry in log):,.0f}" if log else None]
        for key in _LOSSES:
            _, values = curve(log, key)
            row.append(f"{values[0]:.2f} to {values[-1]:.2f}" if values else None)
        _, accuracy = curve(log, "in_batch_accuracy")
        _, speed = curve(log, "tokens_per_second")
        row += [100 * accuracy[-1] if accuracy else None, f"{statistics.median(speed):,.0f}" if speed else None]
        rows.append(row)
    return Table(header, rows, "Training", "Speed: median of the log.")


def space_table(spaces: Mapping[ScoredStage, Space], title: str) -> Table:
    """Each run's first and last evaluation over all rows, and its last by source."""
    keys = [key for key in _COLUMNS if any(f"eval_{key}" in entry for s in spaces.values() for entry in s.log)]
    rows: list[list[Cell]] = []
    for stage, space in spaces.items():
        last, name = space.log[-1], STAGE_NAMES[stage].partition(" (")[0].removesuffix(" only")
        sources = [key.partition("/")[2] for key in last if key.startswith("eval_alignment/")]
        lines = [(entry, "all", "") for entry in first_and_last(space.log)]
        for entry, source, suffix in [*lines, *((last, source, f"/{source}") for source in sources)]:
            values = [(entry.get(f"eval_{key}{suffix}"), _COLUMNS[key][1]) for key in keys]
            cells = [None if value is None else factor * value for value, factor in values]
            rows.append([name, shortened(source), f"{entry['step']:,.0f}", *cells])
    header = ["Trained with", "Source", "Step", *(_COLUMNS[key][0] for key in keys)]
    return Table(header, rows, title, _SPACE_NOTE)


def first_and_last(entries: Sequence[Any]) -> list[Any]:
    """Both ends of a list, or its only entry."""
    return [*entries[:1], *entries[1:][-1:]]


def shortened(name: str) -> str:
    """A name of at most 40 characters, to leave room for what stands beside it."""
    return name if len(name) <= 40 else f"{name[:37]}..."
