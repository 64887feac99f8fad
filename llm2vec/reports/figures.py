"""Figures of scored checkpoints, and the scores they are drawn from.

The figures are those of the paper: score against Stage II step (its Figure 2), score by training stage (Figure 3) and
loss curves (Figure 4). Whatever was measured is drawn, whoever is ahead. Nothing here runs a model or reads a
checkpoint; `report.py` and `evaluation_report.py` put the figures on a page. Needs matplotlib.
"""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llm2vec.types import UserError

Stage = Literal["bm25", "base", "stage_I", "baseline", "control", "only_d2q", "only_q2d", "anchor"]
Run: TypeAlias = tuple[str, Stage, int | None]  # model, stage, step: what repeats with other seeds share

STAGE_NAMES: dict[Stage, str] = {
    "bm25": "BM25",
    "base": "Base model",
    "stage_I": "Stage I only",
    "baseline": "Baseline (Stage II only)",
    "control": "Control",
    "only_d2q": "OnlyD2Q (alpha 0)",
    "only_q2d": "OnlyQ2D (alpha 1)",
    "anchor": "Anchor (Stage I + II)",
}
#: Okabe and Ito's palette, which colour-blind readers can tell apart.
STAGE_COLOURS: dict[Stage, str] = {
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
_METRIC_NAMES = {"ndcg_at_10": "nDCG@10", "cosine_spearman": "Spearman"}


@dataclass(frozen=True)
class Score:
    """One score of one checkpoint. Scores of a run that differ in `seed` are repeats and are averaged."""

    model: str
    stage: Stage
    #: Optimiser step of the stage; None where there is none, as for BM25 and the base model.
    step: int | None
    task: str
    metric: str
    #: A fraction, -1 to 1; shown x 100.
    value: float
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse a score already multiplied by 100 and a stage no figure knows."""
        if self.stage not in get_args(Stage):
            raise UserError(f"stage is {self.stage!r}: choose one of {', '.join(get_args(Stage))}.")
        if not -1 <= self.value <= 1:  # false for NaN, too
            raise UserError(f"{self.task} {self.metric} of {self.model} is {self.value}: give a fraction from -1 to 1.")


def common_columns(scores: Iterable[Score]) -> list[tuple[str, str]]:
    """The (task, metric) pairs that every run with every seed has, in order of first appearance.

    Means over different sets of tasks cannot be compared, so only these enter means and figures.

    Raises:
        UserError: No pair is common to all.
    """
    found: dict[tuple[str, Stage, int | None, int | None], set[tuple[str, str]]] = {}
    order: dict[tuple[str, str], None] = {}
    for score in scores:
        found.setdefault((score.model, score.stage, score.step, score.seed), set()).add((score.task, score.metric))
        order[score.task, score.metric] = None
    columns = [column for column in order if all(column in present for present in found.values())]
    if not columns:
        raise UserError("There is no task that all checkpoints have a score of: evaluate them on the same tasks.")
    return columns


def run_means(scores: Sequence[Score]) -> dict[Run, list[float]]:
    """Each run's mean over the common columns, x 100, one value a seed; runs by model, stage, step."""
    columns = set(common_columns(scores))
    values: dict[Run, dict[int | None, list[float]]] = {}
    for score in scores:
        if (score.task, score.metric) in columns:
            run = values.setdefault((score.model, score.stage, score.step), {})
            run.setdefault(score.seed, []).append(100 * score.value)
    means = {run: [statistics.fmean(of_seed) for of_seed in seeds.values()] for run, seeds in values.items()}
    models = list(dict.fromkeys(score.model for score in scores))
    stages = get_args(Stage)
    order = sorted(means, key=lambda run: (models.index(run[0]), stages.index(run[1]), run[2] or 0))
    return {run: means[run] for run in order}


def read_log(path: Path) -> list[dict[str, float]]:
    """A loss log: one JSON object a line with `step` and any of the loss parts and rates.

    Raises:
        UserError: The file cannot be read, or a line is not an object of numbers with a step; names file and line.
    """
    entries: list[dict[str, float]] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"Cannot read the log {path}: {error.strerror}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entries.append({"step": entry["step"], **{key: float(value) for key, value in entry.items()}})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"{path}, line {number}: expected a JSON object of numbers with the key step ({error})."
            raise UserError(message) from None
    return entries


def early_stage_figure(curves: Sequence[Score]) -> Figure:
    """Score against Stage II step, one line a stage and model: mean over seeds, band from lowest to highest."""
    figure, (axes,) = _new_figure(1)
    curves = [score for score in curves if score.step is not None]
    means = run_means(curves)
    models = list(dict.fromkeys(model for model, _, _ in means))
    for model, stage in dict.fromkeys((model, stage) for model, stage, _ in means):
        points = {step: values for (m, s, step), values in means.items() if (m, s) == (model, stage)}
        steps = [step for step in points if step is not None]
        label = STAGE_NAMES[stage] if len(models) == 1 else f"{model}, {STAGE_NAMES[stage]}"
        style = _LINE_STYLES[models.index(model) % len(_LINE_STYLES)]
        line = [statistics.fmean(values) for values in points.values()]
        axes.plot(steps, line, style, color=STAGE_COLOURS[stage], marker="o", markersize=4, label=label)
        low, high = [min(values) for values in points.values()], [max(values) for values in points.values()]
        axes.fill_between(steps, low, high, color=STAGE_COLOURS[stage], alpha=0.15, linewidth=0)
    finish(axes, "Early Stage II", "Stage II optimiser step", _score_label(curves))
    whole_steps(axes)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def by_stage_figure(scores: Sequence[Score]) -> Figure:
    """Bars by training stage, grouped by model; dots are the single seeds, a dashed line is BM25.

    Of several steps of one stage the last one counts.
    """
    figure, (axes,) = _new_figure(1)
    last = {(model, stage): values for (model, stage, _), values in run_means(scores).items()}
    lexical = [values for (_, stage), values in last.items() if stage == "bm25"]
    bars = {key: values for key, values in last.items() if key[1] != "bm25"}
    models = list(dict.fromkeys(model for model, _ in bars))
    stages = [stage for stage in get_args(Stage) if any(stage == key[1] for key in bars)]
    for (model, stage), values in bars.items():
        position, mean = models.index(model) * (len(stages) + 1) + stages.index(stage), statistics.fmean(values)
        axes.bar(position, mean, width=0.8, color=STAGE_COLOURS[stage])
        top = (position, max(mean, *values, 0))
        axes.annotate(f"{mean:.1f}", top, (0, 5), textcoords="offset points", ha="center")
        if len(values) > 1:
            axes.plot([position] * len(values), values, "o", color="black", markersize=3, alpha=0.6)
    for values in lexical[:1]:
        value = statistics.fmean(values)
        axes.axhline(value, color=STAGE_COLOURS["bm25"], linestyle="--", linewidth=1, label=f"BM25: {value:.1f}")
    if len(models) > 1:  # a group a model; colours name the stages
        axes.set_xticks([i * (len(stages) + 1) + (len(stages) - 1) / 2 for i in range(len(models))], models)
        for stage in stages:
            axes.bar(0, 0, color=STAGE_COLOURS[stage], label=STAGE_NAMES[stage])
    else:
        axes.set_xticks(range(len(stages)), [STAGE_NAMES[stage].replace(" (", "\n(") for stage in stages])
    finish(axes, "After each training stage", "", _score_label(scores))
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def losses_figure(logs: Mapping[Stage, Sequence[Mapping[str, float]]]) -> Figure:
    """Left, both reconstruction losses of Stage I; right, the contrastive losses of Stage II."""
    figure, (left, right) = _new_figure(2)
    reconstructing = [stage for stage in logs if any(curve(logs[stage], key)[0] for key in _DIRECTIONS)]
    for index, stage in enumerate(reconstructing):
        suffix = f" ({STAGE_NAMES[stage]})" if len(reconstructing) > 1 else ""
        for key, (label, colour) in _DIRECTIONS.items():
            _plot_smoothed(left, *curve(logs[stage], key), label + suffix, colour, _LINE_STYLES[index % 4])
    for stage, log in logs.items():
        _plot_smoothed(right, *curve(log, "loss_contrastive"), STAGE_NAMES[stage], STAGE_COLOURS[stage], "-")
    finish(left, "Stage I: reconstruction", "Stage I optimiser step", "cross-entropy, nats per token")
    finish(right, "Stage II: contrastive", "Stage II optimiser step", "InfoNCE, nats per query")
    for axes in (left, right):
        whole_steps(axes)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
        else:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="#777777")
    return figure


def metric_name(metric: str) -> str:
    """How a metric of mteb is written in tables and on axes."""
    return _METRIC_NAMES.get(metric, metric)


def _score_label(scores: Sequence[Score]) -> str:
    """What a figure's score axis shows."""
    columns = common_columns(scores)
    task, metric = columns[0]
    return f"{task}, {metric_name(metric)} x 100" if len(columns) == 1 else f"mean of {len(columns)} tasks x 100"


def curve(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the entries that hold `key`."""
    entries = [entry for entry in log if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


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


def _new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with its own canvas: no window system and no global state of pyplot."""
    figure = Figure(figsize=(7.5 if panels == 1 else 11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels with units, a light grid behind, no box."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def whole_steps(axes: Axes) -> None:
    """Ticks at whole numbers of optimiser steps."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))


def png(figure: Figure) -> bytes:
    """The figure as PNG, without the date and version that would make equal figures differ."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
