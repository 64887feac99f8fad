"""Tables of scored checkpoints: one static page with their figures, and the same table for a terminal.

Whatever was measured is shown, whoever is ahead. Nothing here runs a model or reads a checkpoint: a script hands over
plain scores and loss logs. The pieces of a page serve `evaluation_report.py`, too. Needs matplotlib.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TypeAlias

from matplotlib.figure import Figure

from llm2vec.reports.embedding_figures import TABLE_NOTE, read_spaces, space_figures, space_table
from llm2vec.reports.figures import (
    STAGE_NAMES,
    Run,
    Score,
    Stage,
    by_stage_figure,
    common_columns,
    curve,
    early_stage_figure,
    losses_figure,
    metric_name,
    png,
    read_log,
    run_means,
)
from llm2vec.types import UserError

Cell: TypeAlias = str | float | None

BY_STAGE_CAPTION = (
    "Score after each training stage. Bars: mean over seeds; dots, where there is more than one seed: single seeds; "
    "dashed: BM25 on the same task."
)
EARLY_STAGE_CAPTION = (
    "Score against Stage II step. Lines: mean over seeds; bands, where there is more than one seed: lowest to highest."
)
LOSSES_CAPTION = (
    "Training loss. Faint: as logged; strong: moving average over a twenty-fifth of the log. Losses compare only "
    "between runs of the same batch size and temperature. One log a stage, so one seed."
)
_NUMBER = ' class="number"'
#: Cells of these words have a colour of their own.
_COLOURED = ("within", "near", "off")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left; }
th { border-bottom: 2px solid #888; } td.number, th.number { text-align: right; } td.best { font-weight: 700; }
figure { margin: 2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.9rem; } .scroll { overflow-x: auto; }
td.within { color: #00704f; } td.near { color: #8a6200; } td.off { color: #b3261e; font-weight: 700; }
"""


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
    header = ["Model", "Trained with", "Step", *(f"{task} {metric_name(metric)}" for task, metric in columns)]
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
    return text_table(header, rows, num_names=2)


def text_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, num_names: int) -> str:
    """Aligned plain text: the first `num_names` columns to the left, the others to the right."""
    lines = [header, *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts: list[str] = []
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line[:num_names], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(line[num_names:], widths[num_names:], strict=True)]
        texts.append("  ".join([*names, *numbers]).rstrip())
    return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])


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
        losses: Log file (JSON lines) of each stage, for `losses.png`; empty leaves that figure out. Where runs logged
            diagnostics of their embeddings, there is a section on these too.
        context: Title, seeds, row counts, facts.

    Returns:
        The path of `report.html`, which is written last.

    Raises:
        UserError: There are no scores, checkpoints have no task in common, a log cannot be read, or the folder cannot
            be made.
    """
    logs = {stage: read_log(path) for stage, path in losses.items()}
    spaces = read_spaces(losses)
    tables = [
        section(
            "Scores",
            html_table(*score_table(scores), mark_best=True),
            "Scores x 100; the highest of a column is bold.",
        )
    ]
    figures = {"by_stage.png": (by_stage_figure(scores), BY_STAGE_CAPTION)}
    if any(score.step is not None for score in curves):
        figures["early_stage.png"] = (early_stage_figure(curves), EARLY_STAGE_CAPTION)
        tables.append(
            section("Scores along Stage II", html_table(*score_table(curves), mark_best=False), "Scores x 100.")
        )
    if logs:
        figures["losses.png"] = (losses_figure(logs), LOSSES_CAPTION)
        tables.append(
            section("Training", html_table(*_training_table(logs), mark_best=False), "Speed: median of the log.")
        )
    make_folder(folder)
    body = tables[0] + _html_figures(folder, figures, context.sentence()) + "".join(tables[1:])
    if spaces:
        body += section("Embedding space", html_table(*space_table(spaces), mark_best=False), TABLE_NOTE)
        body += _html_figures(folder, space_figures(spaces))
    html = page(context.title, context.sentence(), verdicts(scores), body, context.facts)
    write_whole(folder / "report.html", html.encode())
    return folder / "report.html"


def _html_figures(folder: Path, figures: Mapping[str, tuple[Figure, str]], remark: str = "") -> str:
    """Figures as part of a page, each with its caption and a remark; and beside the page as PNG files, by name."""
    images = ""
    for name, (figure, caption) in figures.items():
        content = png(figure)
        write_whole(folder / name, content)
        images += html_figure(content, f"{caption} {remark}".strip())
    return images


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


def shown(cell: Cell) -> str:
    """A cell as text: two decimals, and a dash for what is missing."""
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:.2f}"


def _training_table(logs: Mapping[Stage, Sequence[Mapping[str, float]]]) -> tuple[list[str], list[list[Cell]]]:
    """A row a log: last step, first and last of each loss part, last accuracy x 100, median speed."""
    parts = {"loss_q2d": "EBQ2D", "loss_d2q": "EBD2Q", "loss_contrastive": "InfoNCE"}
    header = ["Trained with", "Steps", *(f"{name}, first to last" for name in parts.values())]
    header += ["Last in-batch accuracy x 100", "Tokens per second"]
    rows: list[list[Cell]] = []
    for stage, log in logs.items():
        row: list[Cell] = [STAGE_NAMES[stage], f"{max(entry['step'] for entry in log):,.0f}" if log else None]
        for key in parts:
            _, values = curve(log, key)
            row.append(f"{values[0]:.2f} to {values[-1]:.2f}" if values else None)
        _, accuracy = curve(log, "in_batch_accuracy")
        _, speed = curve(log, "tokens_per_second")
        rows.append(
            [*row, 100 * accuracy[-1] if accuracy else None, f"{statistics.median(speed):,.0f}" if speed else None]
        )
    return header, rows


def make_folder(folder: Path) -> None:
    """Make a folder that a report goes to, where it is missing.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({error.strerror}).") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that a reader never meets half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def section(title: str, body: str, note: str) -> str:
    """A heading, what stands under it (HTML) and a remark."""
    return f'<h2>{escape(title)}</h2>\n<div class="scroll">{body}</div>\n<p class="note">{escape(note)}</p>\n'


def html_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, mark_best: bool) -> str:
    """A table with columns of numbers to the right and, if asked for, each column's highest number in bold."""
    numbers = [[cell for cell in column if isinstance(cell, float)] for column in zip(*rows, strict=True)]
    best = [max(column) if mark_best and len(column) > 1 else None for column in numbers]
    heads = [f"<th{_NUMBER * bool(n)}>{escape(name)}</th>" for name, n in zip(header, numbers, strict=True)]
    lines = ["<table>", f"<tr>{''.join(heads)}</tr>"]
    for row in rows:
        cells = ""
        for cell, column, highest in zip(row, numbers, best, strict=True):
            is_best = cell is not None and cell == highest
            number = ["number"] * (bool(column) or cell is None)
            names = " ".join([*number, *["best"] * is_best, *[word for word in _COLOURED if word == cell]])
            cells += f'<td class="{names}">{escape(shown(cell))}</td>' if names else f"<td>{escape(shown(cell))}</td>"
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def html_figure(png: bytes, caption: str) -> str:
    """The image inside the page, so that the page can be passed on alone."""
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>\n'


def page(title: str, note: str, sentences: Sequence[str], body: str, facts: Mapping[str, str]) -> str:
    """A whole page that loads nothing from elsewhere; all but `body` is escaped."""
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="note">{escape(note)}</p>\n'
        + "".join(f"<p>{escape(sentence)}</p>\n" for sentence in sentences)
        + body
        + (f"<h2>How it was made</h2>\n<table>{lines}</table>\n" if lines else "")
        + "</body>\n</html>\n"
    )
