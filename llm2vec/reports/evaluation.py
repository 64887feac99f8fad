"""The report on evaluated runs: what is missing, who is ahead by how much, and the paper's tables beside the runs.

From results that were read (`results.py`) and the paper's data (`paper.py`) to one report, and from there to a
terminal, Markdown, JSON and a static HTML page with its figures: early Stage II (the paper's Figure 2), score by
training stage (Figure 3) and loss curves (Figure 4). Whatever was measured is shown, whoever is ahead.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from matplotlib.figure import Figure

from llm2vec.reports.embedding_figures import TABLE_NOTE, read_spaces, space_figures, space_table
from llm2vec.reports.figures import Score, Stage, by_stage_figure, early_stage_figure, losses_figure, png, read_log
from llm2vec.reports.intervals import MIN_UNITS, TOLERANCES, Interval, Verdict, compare_units, compare_within_tasks
from llm2vec.reports.page import (
    LOSSES_CAPTION,
    html_figure,
    html_table,
    make_folder,
    page,
    section,
    shown,
    text_table,
    write_whole,
)
from llm2vec.reports.paper import SUBSET, Paper, mean_of
from llm2vec.reports.paper_tables import Run, Table, pairs, paper_tables
from llm2vec.types import UserError

TITLE = "Evaluation on MTEB"
#: What keeps today's scores from being the paper's even for equal weights.
_MTEB_CHANGED = (
    "mteb has changed since the paper: reranking ties, pair classification (best of five similarities), the sample of "
    "ToxicConversations, seeded clustering, and in most retrieval tasks a document that equals its query now counts."
)
_FIGURE_STAGES = ("base", "stage_I", "baseline", "anchor")
_FIGURE_TASK, _FIGURE_METRIC = "15-task subset", "mean main score"


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two runs."""

    label: str
    #: What was drawn again: "tasks", "queries of NFCorpus", ...
    unit: str
    interval: Interval


@dataclass(frozen=True)
class EvaluationReport:
    """Everything that is shown, before it is given a form."""

    sentences: list[str]
    comparisons: list[Comparison]
    tables: list[Table]
    #: File name -> figure and caption.
    figures: dict[str, tuple[Figure, str]]
    #: What goes below the tables: how the numbers came about.
    facts: dict[str, str]
    runs: tuple[Run, ...]
    paper_model: str | None


def build_report(
    runs: Sequence[Run], paper: Paper, paper_model: str | None, losses: Mapping[str, Path]
) -> EvaluationReport:
    """Compare the runs with one another and with the paper.

    Args:
        runs: Runs of different names; those the paper knows are compared with it.
        paper: The paper's data.
        paper_model: Which of the paper's models the runs are compared with; None: with none.
        losses: Training log of each stage, for the figure of the losses, and for those of the embedding space where
            the run logged its diagnostics; empty leaves them out.

    Raises:
        UserError: Two runs share a name, the paper lacks the model or all of the names, or a log is of no
            stage or cannot be read.
    """
    names = [run.name for run in runs]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"names: {', '.join(twice)} is given more than once; every run needs a name of its own.")
    if unknown := sorted(losses.keys() - set(get_args(Stage))):
        raise UserError(f"losses: no stage {', '.join(unknown)}; choose from {', '.join(get_args(Stage))}.")
    if paper_model is not None:
        paper.check_names(paper_model, names)
    tables = paper_tables(runs, paper, paper_model)
    if not tables:
        problems = [f"{run.name}, {task}: {why}" for run in runs for task, why in run.results.problems.items()]
        partial = [_describe(run, paper)[0].removesuffix(".") for run in runs if run.scores]
        missing = "mean that a table could show" if partial else "score to report"
        raise UserError("; ".join([f"There is not one {missing}", *partial, *problems]) + ".")
    comparisons = [comparison for pair in pairs(runs) for comparison in _compare(*pair, paper)]
    sentences = [sentence for run in runs for sentence in _describe(run, paper)]
    sentences += [f"{c.label}: {c.interval.sentence(c.unit)}." for c in comparisons]
    sentences += [sentence for pair in pairs(runs) for sentence in _too_few(*pair, paper)]
    sentences += _paper_interval(paper, paper_model) + _different_data(runs) + _far_off(tables)
    if (beside := _verdict_table(tables)).rows:
        tables.append(beside)
    spaces = read_spaces(cast(Mapping[Stage, Path], losses))
    if spaces:
        tables.append(Table("Embedding space along training", *space_table(spaces), TABLE_NOTE, {}))
    return EvaluationReport(
        sentences=sentences,
        comparisons=comparisons,
        tables=tables,
        figures=_figures(runs, paper, paper_model, losses) | space_figures(spaces),
        facts=_facts(runs, paper, paper_model),
        runs=tuple(runs),
        paper_model=paper_model,
    )


def write_evaluation_report(report: EvaluationReport, folder: Path) -> Path:
    """Write `report.md`, `report.json`, the figures as PNG files and, last, `report.html` with the figures inside.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: The folder cannot be made.
    """
    make_folder(folder)
    write_whole(folder / "report.md", as_markdown(report).encode())
    write_whole(folder / "report.json", (json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n").encode())
    images = ""
    for name, (figure, caption) in report.figures.items():
        content = png(figure)
        write_whole(folder / name, content)
        images += html_figure(content, caption)
    sections = [section(t.title, html_table(t.header, t.rows, mark_best=False), t.note) for t in report.tables]
    note = f"Compared with {report.paper_model} of the paper." if report.paper_model else ""
    html = page(TITLE, note, report.sentences, sections[0] + images + "".join(sections[1:]), report.facts)
    write_whole(folder / "report.html", html.encode())
    return folder / "report.html"


def as_text(report: EvaluationReport) -> str:
    """The report for a terminal."""
    blocks = ["\n".join(report.sentences)]
    blocks += [f"{t.title}\n{text_table(t.header, t.rows, num_names=1)}\n{t.note}" for t in report.tables]
    return "\n\n".join(blocks)


def as_markdown(report: EvaluationReport) -> str:
    """The report as Markdown; figures are linked."""
    blocks = [f"# {TITLE}", *(_escaped(sentence) for sentence in report.sentences)]
    for table in report.tables:
        lines = [[_escaped(name) for name in table.header], ["---", *["---:"] * (len(table.header) - 1)]]
        lines += [[_escaped(shown(cell)) for cell in row] for row in table.rows]
        blocks += [f"## {table.title}", "\n".join(f"| {' | '.join(line)} |" for line in lines), _escaped(table.note)]
    blocks += [
        f"![{_escaped(caption)}]({name})\n\n{_escaped(caption)}" for name, (_, caption) in report.figures.items()
    ]
    blocks += [
        "## How it was made",
        "\n".join(f"- {_escaped(name)}: {_escaped(text)}" for name, text in report.facts.items()),
    ]
    return "\n\n".join(blocks) + "\n"


def as_json(report: EvaluationReport) -> dict[str, Any]:
    """The report as plain data, scores x 100 and not rounded."""
    runs = {
        run.name: {
            "model": run.results.model,
            "revision": run.results.revision,
            "mteb_versions": run.results.mteb_versions,
            "scores": run.scores,
            "problems": run.results.problems,
        }
        for run in report.runs
    }
    checks = {
        table.title: {
            name: {**check._asdict(), "difference": check.difference, "verdict": check.verdict}
            for name, check in table.checks.items()
            if check.measured is not None
        }
        for table in report.tables
    }
    comparisons = [{"label": c.label, "unit": c.unit, **c.interval._asdict()} for c in report.comparisons]
    facts = {"sentences": report.sentences, "facts": report.facts}
    return {"paper_model": report.paper_model, "runs": runs, "comparisons": comparisons, "checks": checks, **facts}


def _escaped(text: str) -> str:
    """Text from data in Markdown: no character of it starts a cell, a link or a tag."""
    for character in "\\|<>[]*_`":
        text = text.replace(character, f"\\{character}")
    return text


def _describe(run: Run, paper: Paper) -> list[str]:
    """How much of the benchmark a run has, what is missing, and which files gave no score."""
    tasks, whole = (paper.subset, SUBSET) if "@" in run.name else (paper.tasks, "Avg")
    present, mean = [task for task in tasks if task in run.scores], mean_of(run.scores, tasks)
    said = f"{run.name} ({run.results.model}): {len(present)} of {len(tasks)} tasks"
    said += " of the subset" if whole == SUBSET else ""
    others = len(set(run.scores) - set(paper.tasks))
    said += f", {others} other task{'s' * (others > 1)}" * bool(others)
    if not present:
        sentences = [f"{said}."]
    elif mean is not None:
        sentences = [f"{said}, mean {mean:.2f}."]
    else:
        missing = [task for task in tasks if task not in run.scores]
        listed = ", ".join(missing) if len(missing) <= len(present) else f"all but {', '.join(present)}"
        sentences = [f"{said}, so there is no mean of {len(tasks)}; missing: {listed}."]
    return sentences + [f"{run.name}, {task}: {why}; counted as missing." for task, why in run.results.problems.items()]


def _common_tasks(run: Run, other: Run, paper: Paper) -> list[str]:
    """The tasks of the 56 that both have; any others if there is none of these."""
    common = set(run.scores) & set(other.scores)
    return sorted(common & set(paper.tasks) or common)


def _compare(run: Run, other: Run, paper: Paper) -> list[Comparison]:
    """Over the tasks that both have, and over the queries of tasks where both have scores of single queries."""
    tasks, label = _common_tasks(run, other, paper), f"{run.name} - {other.name}"
    found = []
    if len(tasks) >= MIN_UNITS:
        sides = ({task: one.scores[task] for task in tasks} for one in (run, other))
        found.append(Comparison(label, "tasks", compare_units(*sides)))
    queries = {
        task: (of, other.query_scores[task]) for task, of in run.query_scores.items() if task in other.query_scores
    }
    for task, both in queries.items():
        try:
            found.append(Comparison(f"{label} on {task}", "queries", compare_units(*both)))
        except UserError as error:
            raise UserError(f"{label} on {task}: {error}") from None
    if len(queries) > 1:
        interval = compare_within_tasks(list(queries.values()))
        found.append(Comparison(f"{label}, mean of these {len(queries)} tasks", "queries, tasks fixed", interval))
    return found


def _too_few(run: Run, other: Run, paper: Paper) -> list[str]:
    tasks = _common_tasks(run, other, paper)
    if len(tasks) >= MIN_UNITS:
        return []
    if not tasks:
        return [f"{run.name} and {other.name} have no task in common."]
    mean = statistics.fmean(run.scores[task] - other.scores[task] for task in tasks)
    over = f"the {len(tasks)} tasks both have" if len(tasks) > 1 else f"{tasks[0]}, the one task both have"
    return [f"{run.name} - {other.name}: {mean:+.2f} over {over}, too few for an interval."]


def _paper_interval(paper: Paper, model: str | None) -> list[str]:
    """The same bootstrap over the paper's own scores, to judge a run's by."""
    if model not in paper.expected:
        return []
    interval = compare_units(paper.expected[model]["anchor"], paper.expected[model]["baseline"])
    return [f"The paper's own scores, anchor - baseline: {interval.sentence('tasks')}."]


def _different_data(runs: Sequence[Run]) -> list[str]:
    """Differences mean little where two runs were scored on different data."""
    sentences = []
    for run, other in pairs(runs):
        mine, theirs = run.results.data_revisions, other.results.data_revisions
        if tasks := [task for task in mine if task in theirs and mine[task] != theirs[task]]:
            said = f"{run.name} and {other.name} were scored on different revisions of the data of {', '.join(tasks)}"
            sentences.append(f"{said}: their differences there are not the model's alone.")
    return sentences


def _far_off(tables: Sequence[Table]) -> list[str]:
    sentences = []
    for table in tables:
        off = [f"{name} ({c.difference:+.2f})" for name, c in table.checks.items() if c.verdict == "off"]
        sentences += [f"Off the paper in {table.title}: {', '.join(off)}."] * bool(off)
    return sentences


def _verdict_table(tables: Sequence[Table]) -> Table:
    header = ["Verdicts", *get_args(Verdict)]
    counts = [(table.title, Counter(check.verdict for check in table.checks.values())) for table in tables]
    judged = [(title, count) for title, count in counts if any(verdict for verdict in count)]
    rows = [[title, *(str(count[verdict]) for verdict in get_args(Verdict))] for title, count in judged]
    return Table("Beside the paper", header, [list(row) for row in rows], TOLERANCES, {})


def _facts(runs: Sequence[Run], paper: Paper, model: str | None) -> dict[str, str]:
    facts = {
        f"Run {run.name}": f"{run.results.model}, revision {run.results.revision}, "
        f"mteb {', '.join(run.results.mteb_versions)}"
        for run in runs
    }
    facts["Intervals"] = (
        "Paired percentile bootstrap, seed 0. They say what other tasks or queries would change, not what another "
        "training seed would."
    )
    if model is not None:
        found = [one.sentence() for one in paper.inconsistencies if one.model == model]
        facts["The paper, where it contradicts itself"] = " ".join([*found, *paper.remarks])
        facts["Since the paper"] = _MTEB_CHANGED
    return facts


def _figures(
    runs: Sequence[Run], paper: Paper, model: str | None, losses: Mapping[str, Path]
) -> dict[str, tuple[Figure, str]]:
    """The paper's Figures 2, 3 and 4, as far as the runs and logs go; the paper's own points beside them."""
    means = {run.name: mean for run in runs if (mean := mean_of(run.scores, paper.subset)) is not None}
    figures: dict[str, tuple[Figure, str]] = {}
    if along := _stage_scores("measured", {name: mean for name, mean in means.items() if "@" in name}):
        drawn = {score.stage for score in along}
        printed = _stage_scores("paper", paper.tables[9].get(model or "", {}))
        printed = [score for score in printed if score.stage in drawn]
        caption = (
            "Mean of Table 8's 15 tasks against Stage II step (the paper's Figure 2). One run a line, so no spread."
        )
        figures["early_stage.png"] = (early_stage_figure(along + printed), caption)
    stages = _stage_scores("measured", {name: mean for name, mean in means.items() if name in _FIGURE_STAGES})
    if len(stages) > 1:
        printed = _stage_scores("paper", paper.tables[10].get(model or "", {}))
        caption = "Mean of Table 8's 15 tasks after each training stage (the paper's Figure 3)."
        figures["by_stage.png"] = (by_stage_figure(stages + printed), caption)
    if losses:
        logs = {cast(Stage, stage): read_log(path) for stage, path in losses.items()}
        figures["losses.png"] = (losses_figure(logs), f"{LOSSES_CAPTION} (The paper's Figure 4.)")
    return figures


def _stage_scores(model: str, means: Mapping[str, Any]) -> list[Score]:
    """Points of a figure from means by run name, `anchor@25` being Anchor after 25 steps."""
    scores = []
    for name, mean in means.items():
        stage, _, step = name.partition("@")
        if stage in get_args(Stage) and (step.isdecimal() or not step):
            at = int(step) if step else None
            scores.append(Score(model, stage, at, _FIGURE_TASK, _FIGURE_METRIC, mean / 100))  # type: ignore[arg-type]
    return scores
