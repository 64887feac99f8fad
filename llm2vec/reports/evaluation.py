"""The report on evaluated runs: what is missing, who is ahead by how much, and the paper's tables beside the runs.

From results and the paper's data to one report, and from there to a terminal, Markdown, JSON and a static HTML page
with its figures. Whatever was measured is shown, whoever is ahead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args

from llm2vec.reports import figures
from llm2vec.reports.comparisons import (
    TOLERANCES,
    Check,
    EvaluatedRun,
    Verdict,
    compare_runs,
    comparison_sentences,
)
from llm2vec.reports.figures import Picture
from llm2vec.reports.logs import read_log, read_spaces, space_table, training_table
from llm2vec.reports.page import Page
from llm2vec.reports.paper import SUBSET, Paper, mean_of
from llm2vec.reports.paper_tables import common_tasks, has_own_tasks_only, paper_tables
from llm2vec.reports.scores import Score, ScoredStage
from llm2vec.table import Table
from llm2vec.types import UserError

#: What keeps today's scores from being the paper's even for equal weights.
_MTEB_CHANGED = (
    "mteb has changed since the paper: reranking ties, pair classification (best of five similarities), the sample of "
    "ToxicConversations, seeded clustering, and in most retrieval tasks a document that equals its query now counts."
)
_FIGURE_STAGES = ("base", "stage_I", "baseline", "anchor")


def build_report(
    runs: Sequence[EvaluatedRun],
    paper: Paper,
    paper_model: str | None,
    losses: Mapping[str, Path],
    *,
    title: str = "Evaluation on MTEB",
    note: str = "",
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Page:
    """The page that compares the runs with one another and with the paper; its `data` are the same for programs.

        >>> runs = [EvaluatedRun(name, read_results(Path("results", name))) for name in ("anchor", "baseline")]
        >>> print(build_report(runs, read_paper(), "LLaMA-3.2-1B-Instruct", losses={}).markdown())

    Runs that the paper knows by name are compared with its `paper_model`; None: with none. `losses` are the training
    log of each stage, for figures of the losses and, where diagnostics were logged, of the embedding space. `note`
    and `facts` are what else is to be said. A `UserError` where two runs share a name, the paper lacks the model or
    all of the names, or a log cannot be read.
    """
    names = [run.name for run in runs]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"names: {', '.join(twice)} is given more than once; every run needs a name of its own.")
    if unknown := sorted(losses.keys() - set(get_args(ScoredStage))):
        raise UserError(f"losses: no stage {', '.join(unknown)}; choose from {', '.join(get_args(ScoredStage))}.")
    if paper_model is not None:
        paper.check_names(paper_model, names)
    of_paper = paper_tables(runs, paper, paper_model)
    if not of_paper:
        problems = [f"{run.name}, {task}: {why}" for run in runs for task, why in run.results.problems.items()]
        partial = [_coverage(run, paper) for run in runs if run.scores]
        missing = "mean that a table could show" if partial else "score to report"
        raise UserError("; ".join([f"There is not one {missing}", *partial, *problems]) + ".")
    comparisons = compare_runs(runs, paper)
    sentences = []
    for run in runs:
        sentences += [] if has_own_tasks_only(runs, paper) else [f"{_coverage(run, paper)}."]
        sentences += [f"{run.name}, {task}: {why}; counted as missing." for task, why in run.results.problems.items()]
    sentences += comparison_sentences(comparisons, runs, paper, paper_model)
    tables, checks = [table for table, _ in of_paper], {table.title: checks for table, checks in of_paper}
    for name, of_table in checks.items():
        off = [f"{cell} ({check.difference:+.2f})" for cell, check in of_table.items() if check.verdict == "off"]
        sentences += [f"Off the paper in {name}: {', '.join(off)}."] * bool(off)
    if (beside := _verdict_table(checks)).rows:
        tables.append(beside)
    logs = {cast(ScoredStage, stage): read_log(path) for stage, path in losses.items()}
    tables += [training_table(logs)] if logs else []
    if spaces := read_spaces(cast(Mapping[ScoredStage, Path], losses)):
        tables.append(space_table(spaces, "Embedding space along training"))
    pictures = _pictures(runs, paper, paper_model)
    if logs:
        caption = figures.LOSSES_CAPTION + (" (Figure 4 of the paper.)" if paper_model else "")
        pictures.append(Picture("losses.png", figures.losses_figure(logs), caption))
    pictures += figures.space_pictures(spaces)
    facts = {**facts, **_facts(runs, paper, paper_model, bool(comparisons))}
    shown = ("model", "revision", "mteb_versions", "scores", "problems")
    data = {
        "paper_model": paper_model,
        "runs": {run.name: {name: getattr(run.results, name) for name in shown} for run in runs},
        "comparisons": [{"label": c.label, "unit": c.unit, **c.interval._asdict()} for c in comparisons],
        "checks": {
            name: {
                cell: {**check._asdict(), "difference": check.difference, "verdict": check.verdict}
                for cell, check in of_table.items()
                if check.measured is not None
            }
            for name, of_table in checks.items()
        },
        "sentences": sentences,
        "facts": facts,
    }  # scores x 100 and not rounded
    note = note or (f"Compared with {paper_model} of the paper." if paper_model else "")
    blocks: list[Table | Picture] = [tables[0], *pictures, *tables[1:]]
    return Page(title, blocks, note, sentences, facts, data)


def _coverage(run: EvaluatedRun, paper: Paper) -> str:
    """How much of the benchmark a run has, and what is missing."""
    tasks, whole = (paper.subset, SUBSET) if "@" in run.name else (paper.tasks, "Avg")
    present, mean = [task for task in tasks if task in run.scores], mean_of(run.scores, tasks)
    said = f"{run.name} ({run.results.model}): {len(present)} of {len(tasks)} tasks"
    said += " of the subset" if whole == SUBSET else ""
    others = len(set(run.scores) - set(paper.tasks))
    said += f", {others} other task{'s' * (others > 1)}" * bool(others)
    if mean is not None:
        said += f", mean {mean:.2f}"
    elif present:
        missing = [task for task in tasks if task not in run.scores]
        listed = ", ".join(missing) if len(missing) <= len(present) else f"all but {', '.join(present)}"
        said += f", so there is no mean of {len(tasks)}; missing: {listed}"
    return said


def _verdict_table(checks: Mapping[str, Mapping[str, Check]]) -> Table:
    """How many comparisons of each table have which verdict."""
    words = get_args(Verdict)
    counts = {title: Counter(check.verdict for check in of_table.values()) for title, of_table in checks.items()}
    rows = [[title, *(str(n[word]) for word in words)] for title, n in counts.items() if any(n[w] for w in words)]
    return Table(["Verdicts", *words], rows, "Beside the paper", TOLERANCES)


def _facts(runs: Sequence[EvaluatedRun], paper: Paper, model: str | None, has_intervals: bool) -> dict[str, str]:
    facts = {
        f"Run {run.name}": f"{run.results.model}, revision {run.results.revision}, "
        f"mteb {', '.join(run.results.mteb_versions)}"
        for run in runs
        if "@" not in run.name
    }
    if has_intervals:
        facts["Intervals"] = (
            "Paired percentile bootstrap, seed 0. They say what other tasks or queries would change, not what another "
            "training seed would."
        )
    if model is not None:
        found = [one.sentence() for one in paper.inconsistencies if one.model == model]
        facts["The paper, where it contradicts itself"] = " ".join([*found, *paper.remarks])
        facts["Since the paper"] = _MTEB_CHANGED
    return facts


def _pictures(runs: Sequence[EvaluatedRun], paper: Paper, model: str | None) -> list[Picture]:
    """The paper's Figures 2 and 3, its own points beside the runs'; or the same figures of tasks of one's own."""
    tasks, what, label = paper.subset, "Mean of Table 8's 15 tasks", "15-task subset, mean main score"
    names: tuple[str, ...] = _FIGURE_STAGES
    if is_own := has_own_tasks_only(runs, paper):
        tasks, names = tuple(common_tasks(runs)), get_args(ScoredStage)
        what = label = ", ".join(tasks) if len(tasks) == 1 else f"Mean of {len(tasks)} tasks"
    means = {run.name: mean for run in runs if tasks and (mean := mean_of(run.scores, tasks)) is not None}
    pictures: list[Picture] = []
    if along := _stage_scores("measured", {name: mean for name, mean in means.items() if "@" in name}):
        drawn = {score.stage for score in along}
        printed = _stage_scores("paper", paper.tables[9].get(model or "", {}))
        printed = [score for score in printed if score.stage in drawn]
        figure = figures.early_stage_figure(along + printed, label)
        source = "" if is_own else " (Figure 2 of the paper)"
        caption = f"{what} against Stage II step{source}. One run a line: no spread."
        pictures.append(Picture("early_stage.png", figure, caption))
    stages = _stage_scores("measured", {name: mean for name, mean in means.items() if name in names})
    if len(stages) > 1:
        printed = _stage_scores("paper", paper.tables[10].get(model or "", {}))
        figure = figures.by_stage_figure(stages + printed, label)
        caption = f"{what} after each training stage{'.' if is_own else ' (Figure 3 of the paper).'}"
        pictures.append(Picture("by_stage.png", figure, caption))
    return pictures


def _stage_scores(series: str, means: Mapping[str, Any]) -> list[Score]:
    """Points of a figure from means by run name, `anchor@25` being Anchor after 25 steps."""
    names = {name: name.partition("@") for name in means}
    return [
        Score(cast(ScoredStage, stage), int(step) if step else None, means[name], series)
        for name, (stage, _, step) in names.items()
        if stage in get_args(ScoredStage) and (step.isdecimal() or not step)
    ]
