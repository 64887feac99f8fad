"""The embedding space along training, as a run's diagnostics logged it: figures and a table for the reports.

Reads the figures from a run's `log.jsonl` and the histograms from the `diagnostics.jsonl` beside it (what they are is
in `diagnostics.py`); runs that logged none are left out. Needs matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from llm2vec.probes.diagnostics import DIAGNOSTICS_FILE
from llm2vec.reports.figures import STAGE_COLOURS, STAGE_NAMES, Stage, finish, read_log, whole_steps
from llm2vec.types import UserError

Histograms: TypeAlias = dict[str, list[int]]  # positive, hard_negative, random -> counts in equal bins from -1 to 1

SPACE_CAPTION = (
    "Embeddings of rows held out of the training files{count}. Hollow: first evaluation; filled: last. Left: mean "
    "squared distance of a query and its positive, against how evenly documents are spread; a run that improves both "
    "goes down and to the left. Right: how many dimensions the documents make use of, at most the vectors' size and "
    "one less than there are documents. One run a line, so no spread."
)
SIMILARITIES_CAPTION = (
    "Cosine of held-out queries with their positives, with their hard negatives and with other rows' documents (all of "
    "them, not a sample), at the first and the last evaluation. Each histogram is of its own pairs and adds up to "
    "100 %; dashed: their means, to the width of a bin."
)
TABLE_NOTE = (
    "On rows held out of the training files, which are no test of other data. Uniformity and effective rank: of "
    "documents. Cosines: means; alignment is 2 - 2 x that of positives. Hard negatives beaten: share of rows, x 100, "
    "whose positive is closer to the query than each of their hard negatives. Recall@1: the same against all other "
    "documents of the line's rows; it falls as these grow in number."
)
_KINDS = {
    "random": ("other rows' documents", "#999999"),
    "hard_negative": ("hard negatives", "#D55E00"),
    "positive": ("positives", "#0072B2"),
}
#: Figure of the log -> its column, and what it is multiplied with.
_COLUMNS = {
    "uniformity_document": ("Uniformity", 1),
    "effective_rank": ("Effective rank", 1),
    "cosine_positive": ("Cosine of positives", 1),
    "cosine_hard_negative": ("Cosine of hard negatives", 1),
    "beats_hard_negatives": ("Hard negatives beaten", 100),
    "recall_at_1": ("Recall@1", 100),
}


class Shapes(NamedTuple):
    """Histograms of one evaluation: over all rows, and by source where there are several."""

    step: int
    all: Histograms
    sources: dict[str, Histograms]


class Space(NamedTuple):
    """What a run logged of its embedding space: its evaluations in the log, and the histograms of the same steps."""

    log: list[dict[str, float]]
    shapes: list[Shapes]


def read_spaces(logs: Mapping[Stage, Path]) -> dict[Stage, Space]:
    """What the runs logged, those that did; the histograms lie beside each log.

    Raises:
        UserError: a file cannot be read, or a line is not what diagnostics write.
    """
    spaces: dict[Stage, Space] = {}
    for stage, path in logs.items():
        evaluations = [entry for entry in read_log(path) if "eval_alignment" in entry]
        if not evaluations:
            continue
        steps = {entry["step"] for entry in evaluations}
        file = path.with_name(DIAGNOSTICS_FILE)
        by_step = {one.step: one for one in (read_shapes(file) if file.is_file() else [])}
        spaces[stage] = Space(evaluations, [one for step, one in sorted(by_step.items()) if step in steps])
    return spaces


def read_shapes(path: Path) -> list[Shapes]:
    """The lines of a `diagnostics.jsonl`.

    Raises:
        UserError: the file cannot be read, or a line is not a step with histograms; names file and line.
    """
    shapes = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"Cannot read the diagnostics {path}: {error.strerror}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            sources = {str(name): _histograms(one) for name, one in entry["sources"].items()}
            shapes.append(Shapes(int(entry["step"]), _histograms(entry["all"]), sources))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: expected a step and histograms of all and sources ({error})."
            ) from None
    return shapes


def _histograms(entry: dict[str, Any]) -> Histograms:
    return {kind: [int(count) for count in entry[kind]] for kind in _KINDS if kind in entry}


def space_figures(spaces: Mapping[Stage, Space]) -> dict[str, tuple[Figure, str]]:
    """File name -> figure and caption: paths, similarities of all runs, and by source where there are several."""
    if not spaces:
        return {}
    drawn = {stage: space.shapes for stage, space in spaces.items() if space.shapes}
    rows = sorted({sum(shapes[-1].all.get("positive", [])) for shapes in drawn.values()})
    count = f" ({' or '.join(f'{number:,}' for number in rows)} rows)" if rows else ""
    figures = {"embedding_space.png": (paths_figure(spaces), SPACE_CAPTION.format(count=count))}
    if drawn:
        lines = {STAGE_NAMES[stage]: _first_and_last(shapes) for stage, shapes in drawn.items()}
        figures["similarities.png"] = (
            similarities_figure({name: [(s.step, s.all) for s in ends] for name, ends in lines.items()}),
            SIMILARITIES_CAPTION,
        )
    for stage, shapes in drawn.items():
        ends = _first_and_last(shapes)
        if ends[-1].sources:
            by_source = {name: [(s.step, s.sources.get(name, {})) for s in ends] for name in ends[-1].sources}
            caption = f"{STAGE_NAMES[stage]}, by source; drawn as the figure of all sources above."
            figures[f"similarities_{stage}.png"] = (similarities_figure(by_source), caption)
    return figures


def space_table(spaces: Mapping[Stage, Space]) -> tuple[list[str], list[list[str | float | None]]]:
    """Header and rows: each run's first and last evaluation over all rows, and its last by source."""
    keys = [key for key in _COLUMNS if any(f"eval_{key}" in entry for s in spaces.values() for entry in s.log)]
    rows: list[list[str | float | None]] = []
    for stage, space in spaces.items():
        last = space.log[-1]
        sources = [key.partition("/")[2] for key in last if key.startswith("eval_alignment/")]
        lines = [(entry, "all", "") for entry in _first_and_last(space.log)]
        lines += [(last, source, f"/{source}") for source in sources]
        for entry, source, suffix in lines:
            values = [(entry.get(f"eval_{key}{suffix}"), _COLUMNS[key][1]) for key in keys]
            cells = [None if value is None else factor * value for value, factor in values]
            rows.append([_short(stage), _cut(source), f"{entry['step']:,.0f}", *cells])
    return ["Trained with", "Source", "Step", *(_COLUMNS[key][0] for key in keys)], rows


def paths_figure(spaces: Mapping[Stage, Space]) -> Figure:
    """Left, alignment against uniformity as a path over the steps; right, effective rank by step of Stage I and II."""
    groups: dict[str, list[Stage]] = {}
    for stage in spaces:
        groups.setdefault("Stage I" if stage == "stage_I" else "Stage II", []).append(stage)
    figure = _new_figure(4.4)
    grid = figure.add_gridspec(len(groups), 2)
    path, ranks = figure.add_subplot(grid[:, 0]), [figure.add_subplot(grid[i, 1]) for i in range(len(groups))]
    for stage, space in spaces.items():
        _plot_path(path, space.log, "eval_uniformity_document", "eval_alignment", stage)
    finish(path, "Alignment and uniformity", "uniformity of documents (lower: more even)", "alignment (lower: closer)")
    for axes, (name, stages) in zip(ranks, groups.items(), strict=True):
        for stage in stages:
            _plot_path(axes, spaces[stage].log, "step", "eval_effective_rank", stage)
        finish(axes, f"Dimensions in use, {name}", f"{name} optimiser step", "effective rank")
        if axes.lines:
            axes.set_ylim(0, 1.12 * max(1, axes.dataLim.y1))
        whole_steps(axes)
    if path.lines:
        path.legend(frameon=False, fontsize=9)
    return figure


def similarities_figure(lines: Mapping[str, Sequence[tuple[int, Histograms]]]) -> Figure:
    """Histograms of cosines: a line of panels a name, a panel a step; all panels share the range of cosines."""
    columns = max(len(panels) for panels in lines.values())
    figure = _new_figure(0.9 + 1.7 * len(lines))
    grid = figure.subplots(len(lines), columns, squeeze=False, sharex=True, sharey="row")
    for axes_of_line, (name, panels) in zip(grid, lines.items(), strict=True):
        for axes in axes_of_line[len(panels) :]:
            axes.set_visible(False)
        for axes, (step, histograms) in zip(axes_of_line, panels, strict=False):
            _draw_histograms(axes, histograms)
            axes.set_title(f"{_cut(name)}, step {step:,}", loc="left", fontsize=10, parse_math=False)
        axes_of_line[0].set_ylim(bottom=0)
        axes_of_line[0].set_ylabel("% of pairs")
    everything = [histograms for panels in lines.values() for _, histograms in panels]
    grid[0, 0].set_xlim(*_occupied(everything))
    for axes in grid[-1]:
        axes.set_xlabel("cosine")
    handles = [
        Patch(facecolor=colour, alpha=0.6, label=label)
        for kind, (label, colour) in _KINDS.items()
        if any(kind in histograms for histograms in everything)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _draw_histograms(axes: Axes, histograms: Histograms) -> None:
    """Each kind's share of pairs in each bin, and a line at its mean."""
    for kind, (label, colour) in _KINDS.items():
        counts = np.array(histograms.get(kind, []))
        if not counts.sum():
            continue
        edges = np.linspace(-1, 1, len(counts) + 1)
        share = 100 * counts / counts.sum()
        axes.stairs(share, edges, fill=True, facecolor=to_rgba(colour, 0.3), edgecolor=colour, linewidth=1, label=label)
        axes.axvline(float(share @ (edges[:-1] + edges[1:])) / 200, color=colour, linestyle="--", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_path(axes: Axes, log: Sequence[Mapping[str, float]], x_key: str, y_key: str, stage: Stage) -> None:
    """A line through the evaluations that have both, hollow where it begins and filled where it ends."""
    points = [(entry[x_key], entry[y_key]) for entry in log if x_key in entry and y_key in entry]
    if not points:
        return
    x, y = zip(*points, strict=True)
    colour = STAGE_COLOURS[stage]
    axes.plot(x, y, "-", color=colour, marker=".", markersize=4, linewidth=1.4, label=STAGE_NAMES[stage])
    axes.plot(x[:1], y[:1], "o", color=colour, markerfacecolor="white", markersize=8)
    axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=8)


def _new_figure(height: float) -> Figure:
    """As wide as a page, `height` inches high, with its own canvas."""
    figure = Figure(figsize=(11, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _occupied(histograms: Sequence[Histograms]) -> tuple[float, float]:
    """The range of cosines that any bin with a pair covers, a little wider."""
    counts = [np.array(of_kind) for one in histograms for of_kind in one.values() if sum(of_kind)]
    lows = [-1 + 2 * np.flatnonzero(of_kind)[0] / len(of_kind) for of_kind in counts]
    highs = [-1 + 2 * (np.flatnonzero(of_kind)[-1] + 1) / len(of_kind) for of_kind in counts]
    return max(-1.0, min(lows, default=-1) - 0.02), min(1.0, max(highs, default=1) + 0.02)


def _cut(name: str, most: int = 40) -> str:
    """A name that leaves room for what stands beside it."""
    return name if len(name) <= most else f"{name[: most - 3]}..."


def _short(stage: Stage) -> str:
    """A stage's name without its explanation."""
    return STAGE_NAMES[stage].partition(" (")[0].removesuffix(" only")


def _first_and_last(entries: Sequence[Any]) -> list[Any]:
    return list(entries) if len(entries) == 1 else [entries[0], entries[-1]]
