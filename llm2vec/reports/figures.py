"""Figures of the reports: scores, losses, and the embedding space along training. Needs matplotlib.

Those of the paper are score against Stage II step (its Figure 2), score by training stage (Figure 3) and loss curves
(Figure 4). Whatever was measured is drawn, whoever is ahead.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from llm2vec.reports.logs import Histograms, Space, curve, first_and_last, shortened
from llm2vec.reports.scores import STAGE_NAMES, Score, ScoredStage, in_order

#: Okabe and Ito's palette, which colour-blind readers can tell apart.
STAGE_COLOURS: dict[ScoredStage, str] = {
    "bm25": "#333333",
    "base": "#999999",
    "stage_I": "#E69F00",
    "baseline": "#0072B2",
    "control": "#009E73",
    "only_d2q": "#56B4E9",
    "only_q2d": "#CC79A7",
    "anchor": "#D55E00",
}
_DIRECTIONS = {"loss_q2d": ("EBQ2D: query to document", "#CC79A7"), "loss_d2q": ("EBD2Q: document to query", "#56B4E9")}
_LINE_STYLES = ("-", "--", ":", "-.")
_LINE_COLOURS = tuple(dict.fromkeys(STAGE_COLOURS.values()))[2:]
LOSSES_CAPTION = (
    "Training loss. Faint: as logged; strong: moving average over a twenty-fifth of the log. Losses compare only "
    "between runs of the same batch size and temperature. One log a stage, so one seed."
)
_SPACE_CAPTION = (
    "Embeddings of rows held out of the training files{count}. Hollow: first evaluation; filled: last. Left: mean "
    "squared distance of a query and its positive, against how evenly documents are spread; a run that improves both "
    "goes down and to the left. Right: how many dimensions the documents make use of, at most the vectors' size and "
    "one less than there are documents. One run a line, so no spread."
)
_SIMILARITIES_CAPTION = (
    "Cosine of held-out queries with their positives, with their hard negatives and with other rows' documents (all of "
    "them, not a sample), at the first and the last evaluation. Each histogram is of its own pairs and adds up to "
    "100 %; dashed: their means, to the width of a bin."
)
_KINDS = {
    "random": ("other rows' documents", "#999999"),
    "hard_negative": ("hard negatives", "#D55E00"),
    "positive": ("positives", "#0072B2"),
}


class Picture(NamedTuple):
    """A figure with its caption, and the name of its PNG file."""

    name: str
    figure: Figure
    caption: str

    def png(self) -> bytes:
        """The figure as PNG, without the date and version that would make equal figures differ."""
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", metadata={"Software": None})
        return stream.getvalue()


def early_stage_figure(curves: Sequence[Score], what: str) -> Figure:
    """Score (`what` it is of names the axis) against Stage II step, a line for each stage and series."""
    figure, axes = _new_axes()
    curves = in_order(score for score in curves if score.step is not None)
    series = list(dict.fromkeys(score.series for score in curves))
    for name, stage in dict.fromkeys((score.series, score.stage) for score in curves):
        points = [(s.step, s.value) for s in curves if (s.series, s.stage) == (name, stage)]
        label = STAGE_NAMES[stage] if len(series) == 1 else f"{name}, {STAGE_NAMES[stage]}"
        style = _LINE_STYLES[series.index(name) % len(_LINE_STYLES)]
        axes.plot(*zip(*points, strict=True), style, color=STAGE_COLOURS[stage], marker="o", markersize=4, label=label)
    _finish(axes, "Early Stage II", "Stage II optimiser step", f"{what} x 100")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def along_figure(lines: Mapping[str, Mapping[int, Sequence[float]]], label: str) -> Figure:
    """Score against step, one line a recipe: mean over seeds, band from lowest to highest.

    `lines`: recipe -> step -> score with each seed; `label` is the score axis'.
    """
    figure, axes = _new_axes()
    for index, (recipe, points) in enumerate(lines.items()):
        steps = sorted(points)
        of_steps = [points[step] for step in steps]
        colour = _LINE_COLOURS[index % len(_LINE_COLOURS)]
        style = _LINE_STYLES[index // len(_LINE_COLOURS) % len(_LINE_STYLES)]
        line = [float(np.mean(values)) for values in of_steps]
        axes.plot(steps, line, style, color=colour, marker="o", markersize=4, label=recipe)
        low, high = [min(values) for values in of_steps], [max(values) for values in of_steps]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    _finish(axes, "Along the last stage", "optimiser step", label)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def points_figure(points: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Figure:
    """A dot for each recipe with its name: mean over seeds, bars from lowest to highest. Recipe -> (x, y) a seed."""
    figure, axes = _new_axes()
    for index, (recipe, of_seeds) in enumerate(points.items()):
        xs, ys = zip(*of_seeds, strict=True)
        x, y = float(np.mean(xs)), float(np.mean(ys))
        colour = _LINE_COLOURS[index % len(_LINE_COLOURS)]
        axes.plot([x], [y], color=colour, marker="o")
        axes.plot([min(xs), max(xs)], [y, y], [x, x], [min(ys), max(ys)], color=colour, linewidth=1)
        axes.annotate(recipe, (x, y), (5, 4), textcoords="offset points", fontsize=8)
    _finish(axes, "Before and after the last stage", x_label, y_label)
    return figure


def by_stage_figure(scores: Sequence[Score], what: str) -> Figure:
    """Bars by training stage, grouped by series; a dashed line is BM25. Of several steps of a stage the last counts."""
    figure, axes = _new_axes()
    last = {(score.series, score.stage): score.value for score in in_order(scores)}
    bars = {key: value for key, value in last.items() if key[1] != "bm25"}
    series = list(dict.fromkeys(name for name, _ in bars))
    stages = [stage for stage in get_args(ScoredStage) if any(stage == key[1] for key in bars)]
    for (name, stage), value in bars.items():
        position = series.index(name) * (len(stages) + 1) + stages.index(stage)
        axes.bar(position, value, width=0.8, color=STAGE_COLOURS[stage])
        top = (position, max(value, 0))
        axes.annotate(f"{value:.1f}", top, (0, 5), textcoords="offset points", ha="center")
    for value in [value for (_, stage), value in last.items() if stage == "bm25"][:1]:
        axes.axhline(value, color=STAGE_COLOURS["bm25"], linestyle="--", linewidth=1, label=f"BM25: {value:.1f}")
    if len(series) > 1:  # a group a series; colours name the stages
        axes.set_xticks([i * (len(stages) + 1) + (len(stages) - 1) / 2 for i in range(len(series))], series)
        for stage in stages:
            axes.bar(0, 0, color=STAGE_COLOURS[stage], label=STAGE_NAMES[stage])
    else:
        axes.set_xticks(range(len(stages)), [STAGE_NAMES[stage].replace(" (", "\n(") for stage in stages])
    _finish(axes, "After each training stage", "", f"{what} x 100")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def losses_figure(logs: Mapping[ScoredStage, Sequence[Mapping[str, float]]]) -> Figure:
    """Left, both reconstruction losses of Stage I; right, the contrastive losses of Stage II."""
    figure = _new_figure(11, 4.4)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    reconstructing = [stage for stage in logs if any(curve(logs[stage], key)[0] for key in _DIRECTIONS)]
    for index, stage in enumerate(reconstructing):
        suffix = f" ({STAGE_NAMES[stage]})" if len(reconstructing) > 1 else ""
        for key, (label, colour) in _DIRECTIONS.items():
            _plot_smoothed(left, *curve(logs[stage], key), label + suffix, colour, _LINE_STYLES[index % 4])
    for stage, log in logs.items():
        _plot_smoothed(right, *curve(log, "loss_contrastive"), STAGE_NAMES[stage], STAGE_COLOURS[stage], "-")
    _finish(left, "Stage I: reconstruction", "Stage I optimiser step", "cross-entropy, nats per token")
    _finish(right, "Stage II: contrastive", "Stage II optimiser step", "InfoNCE, nats per query")
    for axes in (left, right):
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
        else:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="#777777")
    return figure


def space_pictures(spaces: Mapping[ScoredStage, Space]) -> list[Picture]:
    """Paths, similarities of all runs, and similarities by source where a run has several."""
    if not spaces:
        return []
    drawn = {stage: space.shapes for stage, space in spaces.items() if space.shapes}
    rows = sorted({sum(shapes[-1].all.get("positive", [])) for shapes in drawn.values()})
    count = f" ({' or '.join(f'{number:,}' for number in rows)} rows)" if rows else ""
    pictures = [Picture("embedding_space.png", paths_figure(spaces), _SPACE_CAPTION.format(count=count))]
    if drawn:
        ends = {STAGE_NAMES[stage]: first_and_last(shapes) for stage, shapes in drawn.items()}
        lines = {name: [(one.step, one.all) for one in of_run] for name, of_run in ends.items()}
        pictures.append(Picture("similarities.png", similarities_figure(lines), _SIMILARITIES_CAPTION))
    for stage, shapes in drawn.items():
        if sources := shapes[-1].sources:
            ends_of = first_and_last(shapes)
            lines = {name: [(one.step, one.sources.get(name, {})) for one in ends_of] for name in sources}
            caption = f"{STAGE_NAMES[stage]}, by source; drawn as the figure of all sources above."
            pictures.append(Picture(f"similarities_{stage}.png", similarities_figure(lines), caption))
    return pictures


def paths_figure(spaces: Mapping[ScoredStage, Space]) -> Figure:
    """Left, alignment against uniformity as a path over the steps; right, effective rank by step of Stage I and II."""
    groups: dict[str, list[ScoredStage]] = {}
    for stage in spaces:
        groups.setdefault("Stage I" if stage == "stage_I" else "Stage II", []).append(stage)
    figure = _new_figure(11, 4.4)
    grid = figure.add_gridspec(len(groups), 2)
    path, ranks = figure.add_subplot(grid[:, 0]), [figure.add_subplot(grid[i, 1]) for i in range(len(groups))]
    for stage, space in spaces.items():
        _plot_path(path, space.log, "eval_uniformity_document", "eval_alignment", stage)
    _finish(path, "Alignment and uniformity", "uniformity of documents (lower: more even)", "alignment (lower: closer)")
    for axes, (name, stages) in zip(ranks, groups.items(), strict=True):
        for stage in stages:
            _plot_path(axes, spaces[stage].log, "step", "eval_effective_rank", stage)
        _finish(axes, f"Dimensions in use, {name}", f"{name} optimiser step", "effective rank")
        if axes.lines:
            axes.set_ylim(0, 1.12 * max(1, axes.dataLim.y1))
    if path.lines:
        path.legend(frameon=False, fontsize=9)
    return figure


def similarities_figure(lines: Mapping[str, Sequence[tuple[int, Histograms]]]) -> Figure:
    """Histograms of cosines: a line of panels a name, a panel a step; all panels share the range of cosines."""
    columns = max(len(panels) for panels in lines.values())
    figure = _new_figure(11, 0.9 + 1.7 * len(lines))
    grid = figure.subplots(len(lines), columns, squeeze=False, sharex=True, sharey="row")
    for axes_of_line, (name, panels) in zip(grid, lines.items(), strict=True):
        for axes in axes_of_line[len(panels) :]:
            axes.set_visible(False)
        for axes, (step, histograms) in zip(axes_of_line, panels, strict=False):
            _draw_histograms(axes, histograms)
            axes.set_title(f"{shortened(name)}, step {step:,}", loc="left", fontsize=10, parse_math=False)
        axes_of_line[0].set_ylim(bottom=0)
        axes_of_line[0].set_ylabel("% of pairs")
    everything = [histograms for panels in lines.values() for _, histograms in panels]
    grid[0, 0].set_xlim(*_occupied(everything))
    for axes in grid[-1]:
        axes.set_xlabel("cosine")
    drawn = [_KINDS[kind] for kind in _KINDS if any(kind in histograms for histograms in everything)]
    handles = [Patch(facecolor=colour, alpha=0.6, label=label) for label, colour in drawn]
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


def _plot_path(axes: Axes, log: Sequence[Mapping[str, float]], x_key: str, y_key: str, stage: ScoredStage) -> None:
    """A line through the evaluations that have both, hollow where it begins and filled where it ends."""
    points = [(entry[x_key], entry[y_key]) for entry in log if x_key in entry and y_key in entry]
    if not points:
        return
    x, y = zip(*points, strict=True)
    colour = STAGE_COLOURS[stage]
    axes.plot(x, y, "-", color=colour, marker=".", markersize=4, linewidth=1.4, label=STAGE_NAMES[stage])
    axes.plot(x[:1], y[:1], "o", color=colour, markerfacecolor="white", markersize=8)
    axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=8)


def _plot_smoothed(
    axes: Axes, steps: Sequence[float], values: Sequence[float], label: str, colour: str, style: str
) -> None:
    """The values faintly, and over them their centred moving average; windows shrink at both ends."""
    if not values:
        return
    window = np.ones(len(values) // 25 | 1)  # odd, so that the average is centred
    smooth = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
    if len(window) > 1:
        axes.plot(steps, values, style, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, style, color=colour, linewidth=1.8, label=label)


def _new_figure(width: float, height: float) -> Figure:
    """A figure in inches: no window system and no global state of pyplot."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _new_axes() -> tuple[Figure, Axes]:
    figure = _new_figure(7.5, 4.4)
    return figure, figure.add_subplot()


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels with units, a light grid behind, no box, ticks at whole numbers of optimiser steps."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if x_label.endswith("step"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))


def _occupied(histograms: Sequence[Histograms]) -> tuple[float, float]:
    """The range of cosines that any bin with a pair covers, a little wider."""
    counts = [np.array(of_kind) for one in histograms for of_kind in one.values() if sum(of_kind)]
    lows = [np.flatnonzero(of_kind)[0] / len(of_kind) for of_kind in counts]
    highs = [(np.flatnonzero(of_kind)[-1] + 1) / len(of_kind) for of_kind in counts]
    return max(-1.0, 2 * min(lows, default=0) - 1.02), min(1.0, 2 * max(highs, default=1) - 0.98)
