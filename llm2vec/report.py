"""Tables and figures of scored checkpoints: one static page, its figures, and the same table for a terminal.

The figures are those of the paper: score against Stage II step (its Figure 2), score by training stage (Figure 3) and
loss curves (Figure 4). Whatever was measured is shown, whoever is ahead. Nothing here runs a model or reads a
checkpoint: a script hands over plain scores and loss logs. Needs matplotlib.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llm2vec.types import UserError

Stage = Literal["bm25", "base", "stage_I", "baseline", "control", "anchor"]
Cell: TypeAlias = str | float | None
Run: TypeAlias = tuple[str, Stage, int | None]  # model, stage, step: what repeats with other seeds share

STAGE_NAMES: dict[Stage, str] = {
    "bm25": "BM25",
    "base": "Base model",
    "stage_I": "Stage I only",
    "baseline": "Baseline (Stage II only)",
    "control": "Control",
    "anchor": "Anchor (Stage I + II)",
}
#: Okabe and Ito's palette, which colour-blind readers can tell apart.
STAGE_COLOURS: dict[Stage, str] = {
    "bm25": "#333333",
    "base": "#999999",
    "stage_I": "#E69F00",
    "baseline": "#0072B2",
    "control": "#009E73",
    "anchor": "#D55E00",
}
_DIRECTIONS = {"loss_q2d": ("EBQ2D: query to document", "#CC79A7"), "loss_d2q": ("EBD2Q: document to query", "#56B4E9")}
_LINE_STYLES = ("-", "--", ":", "-.")
_METRIC_NAMES = {"ndcg_at_10": "nDCG@10", "cosine_spearman": "Spearman"}
_NUMBER = ' class="number"'

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left; }
th { border-bottom: 2px solid #888; } td.number, th.number { text-align: right; } td.best { font-weight: 700; }
figure { margin: 2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.9rem; } .scroll { overflow-x: auto; }
"""


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


@dataclass(frozen=True)
class Context:
    """What a reader must know to judge the numbers; every caption names the seeds and the row counts."""

    title: str
    seeds: tuple[int, ...]
    #: What was counted -> rows, e.g. {"training pairs": 30000, "held-out queries": 700}.
    rows: Mapping[str, int]
    #: Anything else worth a line: what the control is, machine, versions, hours.
    facts: Mapping[str, str] = field(default_factory=dict)

    def sentence(self) -> str:
        """Seeds and row counts in one line."""
        seeds = f"Seed{'s' * (len(self.seeds) != 1)} {', '.join(map(str, self.seeds))}"
        return "; ".join([seeds, *(f"{count:,} {name}" for name, count in self.rows.items())]) + "."


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


def score_table(scores: Sequence[Score]) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows, one a run: model, stage, step, each task (mean over seeds), mean of the tasks, seeds, range.

    Returns:
        The header, and rows of names, scores x 100 and None where a score is missing.
    """
    columns = list(dict.fromkeys((score.task, score.metric) for score in scores))
    common = common_columns(scores)
    values: dict[tuple[Run, tuple[str, str]], list[float]] = {}
    for score in scores:
        key = (score.model, score.stage, score.step), (score.task, score.metric)
        values.setdefault(key, []).append(100 * score.value)
    means = run_means(scores)
    repeated = any(len(of_seeds) > 1 for of_seeds in means.values())
    header = ["Model", "Trained with", "Step", *(f"{task} {_metric_name(metric)}" for task, metric in columns)]
    header += [f"Mean of {len(common)}"] * (len(columns) > 1) + ["Seeds", "Lowest", "Highest"] * repeated
    rows: list[list[Cell]] = []
    for run, of_seeds in means.items():
        model, stage, step = run
        row: list[Cell] = [model, STAGE_NAMES[stage], "" if step is None else f"{step:,}"]
        row += [statistics.fmean(values[run, column]) if (run, column) in values else None for column in columns]
        row += [statistics.fmean(of_seeds)] * (len(columns) > 1)
        row += [str(len(of_seeds)), min(of_seeds), max(of_seeds)] * repeated
        rows.append(row)
    return header, rows


def terminal_table(scores: Sequence[Score]) -> str:
    """The table as plain text: names to the left, numbers to the right, scores x 100."""
    header, rows = score_table(scores)
    lines = [header, *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts: list[str] = []
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        texts.append("  ".join([*names, *numbers]).rstrip())
    return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])


def read_log(path: Path) -> list[dict[str, float]]:
    """A loss log: one JSON object a line with `step` and any of the loss parts and rates.

    Raises:
        UserError: A line is not an object of numbers with a step; names file and line.
    """
    entries: list[dict[str, float]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
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
    means = run_means([score for score in curves if score.step is not None])
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
    _finish(axes, "Early Stage II", "Stage II optimiser step", _score_label(curves))
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
    _finish(axes, "After each training stage", "", _score_label(scores))
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def losses_figure(logs: Mapping[Stage, Sequence[Mapping[str, float]]]) -> Figure:
    """Left, both reconstruction losses of Stage I; right, the contrastive losses of Stage II."""
    figure, (left, right) = _new_figure(2)
    reconstructing = [stage for stage in logs if any(_curve(logs[stage], key)[0] for key in _DIRECTIONS)]
    for index, stage in enumerate(reconstructing):
        suffix = f" ({STAGE_NAMES[stage]})" if len(reconstructing) > 1 else ""
        for key, (label, colour) in _DIRECTIONS.items():
            _plot_smoothed(left, *_curve(logs[stage], key), label + suffix, colour, _LINE_STYLES[index % 4])
    for stage, log in logs.items():
        _plot_smoothed(right, *_curve(log, "loss_contrastive"), STAGE_NAMES[stage], STAGE_COLOURS[stage], "-")
    _finish(left, "Stage I: reconstruction", "Stage I optimiser step", "cross-entropy, nats per token")
    _finish(right, "Stage II: contrastive", "Stage II optimiser step", "InfoNCE, nats per query")
    for axes in (left, right):
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
        else:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="#777777")
    return figure


def write_report(
    folder: Path,
    scores: Sequence[Score],
    curves: Sequence[Score],
    losses: Mapping[Stage, Path],
    context: Context,
) -> Path:
    """Write `report.html`, with its figures inside, and the figures beside it as PNG files.

    Args:
        folder: Where to write; made if missing.
        scores: Finished checkpoints, for the table and `by_stage.png`.
        curves: Checkpoints along Stage II, for `early_stage.png`; empty leaves that figure out.
        losses: Log file (JSON lines) of each stage, for `losses.png`; empty leaves that figure out.
        context: Title, seeds, row counts, facts.

    Returns:
        The path of `report.html`, which is written last.

    Raises:
        UserError: There are no scores, checkpoints have no task in common, or a log cannot be read.
    """
    logs = {stage: read_log(path) for stage, path in losses.items()}
    tables = [
        _section(
            "Scores",
            _html_table(*score_table(scores), mark_best=True),
            "Scores x 100; the highest of a column is bold.",
        )
    ]
    figures = {"by_stage.png": (by_stage_figure(scores), _BY_STAGE_CAPTION)}
    if any(score.step is not None for score in curves):
        figures["early_stage.png"] = (early_stage_figure(curves), _EARLY_STAGE_CAPTION)
        tables.append(
            _section("Scores along Stage II", _html_table(*score_table(curves), mark_best=False), "Scores x 100.")
        )
    if logs:
        figures["losses.png"] = (losses_figure(logs), _LOSSES_CAPTION)
        tables.append(
            _section("Training", _html_table(*_training_table(logs), mark_best=False), "Speed: median of the log.")
        )
    folder.mkdir(parents=True, exist_ok=True)
    images: list[str] = []
    for name, (figure, caption) in figures.items():
        content = _png(figure)
        _replace(folder / name, content)
        images.append(_html_figure(content, f"{caption} {context.sentence()}"))
    page = _page(context, verdicts(scores), tables[0] + "".join(images) + "".join(tables[1:]))
    _replace(folder / "report.html", page.encode())
    return folder / "report.html"


def verdicts(scores: Sequence[Score]) -> list[str]:
    """One sentence for each model and each of baseline and control: who is ahead of whom, by how much, on what."""
    last = {(model, stage): values for (model, stage, _), values in run_means(scores).items()}
    sentences: list[str] = []
    for (model, stage), values in last.items():
        anchor = last.get((model, "anchor"))
        if anchor is None or stage not in ("baseline", "control"):
            continue
        mine, other = statistics.fmean(anchor), statistics.fmean(values)
        ahead = "level" if mine == other else "ahead" if mine > other else "behind"
        gap = f"{ahead} by {abs(mine - other):.2f}" if mine != other else ahead
        runs = (
            f"{len(anchor)} and {len(values)} runs" if len(anchor) + len(values) > 2 else "one run each, so no spread"
        )
        name = STAGE_NAMES[stage].partition(" (")[0].lower()
        sentences.append(f"{model}: Anchor {mine:.2f}, {name} {other:.2f}: Anchor is {gap} ({runs}).")
    return sentences


_BY_STAGE_CAPTION = (
    "Score after each training stage. Bars: mean over seeds; dots, where there is more than one seed: single seeds; "
    "dashed: BM25 on the same task."
)
_EARLY_STAGE_CAPTION = (
    "Score against Stage II step. Lines: mean over seeds; bands, where there is more than one seed: lowest to highest."
)
_LOSSES_CAPTION = (
    "Training loss. Faint: as logged; strong: moving average over a twenty-fifth of the log. Losses compare only "
    "between runs of the same batch size and temperature. One log a stage, so one seed."
)


def _metric_name(metric: str) -> str:
    return _METRIC_NAMES.get(metric, metric)


def _score_label(scores: Sequence[Score]) -> str:
    """What a figure's score axis shows."""
    columns = common_columns(scores)
    task, metric = columns[0]
    return f"{task}, {_metric_name(metric)} x 100" if len(columns) == 1 else f"mean of {len(columns)} tasks x 100"


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:.2f}"


def _curve(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
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


def _training_table(logs: Mapping[Stage, Sequence[Mapping[str, float]]]) -> tuple[list[str], list[list[Cell]]]:
    """A row a log: last step, first and last of each loss part, last accuracy x 100, median speed."""
    parts = {"loss_q2d": "EBQ2D", "loss_d2q": "EBD2Q", "loss_contrastive": "InfoNCE"}
    header = ["Trained with", "Steps", *(f"{name}, first to last" for name in parts.values())]
    header += ["In-batch accuracy x 100", "Tokens per second"]
    rows: list[list[Cell]] = []
    for stage, log in logs.items():
        row: list[Cell] = [STAGE_NAMES[stage], f"{max(entry['step'] for entry in log):,.0f}" if log else None]
        for key in parts:
            _, values = _curve(log, key)
            row.append(f"{values[0]:.2f} to {values[-1]:.2f}" if values else None)
        _, accuracy = _curve(log, "in_batch_accuracy")
        _, speed = _curve(log, "tokens_per_second")
        rows.append(
            [*row, 100 * accuracy[-1] if accuracy else None, f"{statistics.median(speed):,.0f}" if speed else None]
        )
    return header, rows


def _new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with its own canvas: no window system and no global state of pyplot."""
    figure = Figure(figsize=(7.5 if panels == 1 else 11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels with units, a light grid behind, no box."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if x_label:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))


def _png(figure: Figure) -> bytes:
    """The figure as PNG, without the date and version that would make equal figures differ."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that a reader never meets half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _section(title: str, body: str, note: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<div class="scroll">{body}</div>\n<p class="note">{escape(note)}</p>\n'


def _html_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, mark_best: bool) -> str:
    """A table with numbers to the right and, if asked for, each column's highest number in bold."""
    numbers = [[cell for cell in column if isinstance(cell, float)] for column in zip(*rows, strict=True)]
    best = [max(column) if mark_best and len(column) > 1 else None for column in numbers]
    heads = [f"<th{_NUMBER * bool(n)}>{escape(name)}</th>" for name, n in zip(header, numbers, strict=True)]
    lines = ["<table>", f"<tr>{''.join(heads)}</tr>"]
    for row in rows:
        cells = ""
        for cell, highest in zip(row, best, strict=True):
            number = (
                "" if isinstance(cell, str) else f' class="number{" best" * (cell is not None and cell == highest)}"'
            )
            cells += f"<td{number}>{escape(_shown(cell))}</td>"
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _html_figure(png: bytes, caption: str) -> str:
    """The image inside the page, so that the page can be passed on alone."""
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>\n'


def _page(context: Context, sentences: Sequence[str], body: str) -> str:
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in context.facts.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(context.title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f'<h1>{escape(context.title)}</h1>\n<p class="note">{escape(context.sentence())}</p>\n'
        + "".join(f"<p>{escape(sentence)}</p>\n" for sentence in sentences)
        + body
        + (f"<h2>How it was made</h2>\n<table>{facts}</table>\n" if facts else "")
        + "</body>\n</html>\n"
    )
