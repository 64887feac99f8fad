"""The paper's tables, filled in with the scores of runs, the paper's own value and a verdict beside each.

A mean is shown only where every one of its tasks is there; otherwise the cell says how many are ("54/56"). A star marks
a cell of the paper that its other cells contradict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llm2vec.reports.comparisons import Check, EvaluatedRun, pairs
from llm2vec.reports.paper import BEIR, COLUMNS, SUBSET, Paper, mean_of
from llm2vec.reports.scores import STAGE_NAMES
from llm2vec.table import Cell, Table

#: Titles of the tables that list one mean a run.
_MEANS = {
    4: "Weight of EBQ2D (Table 4)",
    5: "Stage I or more of Stage II (Table 5)",
    9: "Early Stage II (Table 9)",
    10: "After each training stage (Table 10)",
}


class PaperTable(NamedTuple):
    """A table, and the comparisons with the paper that it holds, each under a name."""

    table: Table
    checks: dict[str, Check]


class _Line(NamedTuple):
    """What a row of Table 1 or a column of Table 14 shows: a run, or the difference of two."""

    label: str
    values: Mapping[str, float]  #: Task -> score x 100, or task -> difference
    #: What the paper calls it: a run's name, or delta; empty where the paper has no such difference.
    name: str
    sign: str = ""  #: Format of a number, "+" for differences


def paper_tables(runs: Sequence[EvaluatedRun], paper: Paper, model: str | None) -> list[PaperTable]:
    """Every table of the paper that the runs, of different names, provide a number for.

    `model` is the paper's that they are compared with; None compares them with one another only.
    """
    finished = [run for run in runs if "@" not in run.name]
    if has_own_tasks_only(runs, paper):
        along = [run for run in runs if "@" in run.name]
        parts = (("Scores", finished), ("Scores along training", along))
        return [PaperTable(_own_table(title, part), {}) for title, part in parts if part]
    objectives = [run for run in finished if run.name in paper.tables[3].get(model or "", {})]
    if not any(run.name.startswith("only_") for run in objectives):
        objectives = []
    tables = [
        _column_table(1, "MTEB by category (Table 1)", finished, paper, model),
        _task_table(finished, paper, model),
        _column_table(3, "Objectives of Stage I (Table 3)", objectives, paper, model),
        _means_table(8, "The 15-task subset (Table 8)", SUBSET, runs, paper, model),
    ]
    for number, title in _MEANS.items():
        known = [run for run in runs if run.name in paper.tables[number].get(model or "", {})]
        tables.append(_means_table(number, title, SUBSET, known, paper, model))
    tables.append(_means_table(11, "BEIR, 14 tasks (Table 11)", BEIR, finished, paper, model))
    return [table for table in [*tables, _comparators(finished, paper)] if table is not None]


def has_own_tasks_only(runs: Sequence[EvaluatedRun], paper: Paper) -> bool:
    """Whether there are scores, and none is of a task that the paper has."""
    scored = {task for run in runs for task in run.scores}
    return bool(scored) and not scored & set(paper.tasks)


def common_tasks(runs: Sequence[EvaluatedRun]) -> list[str]:
    """The tasks that all runs have."""
    first = runs[0].scores if runs else {}
    return [task for task in first if all(task in run.scores for run in runs)]


def _own_table(title: str, runs: Sequence[EvaluatedRun]) -> Table:
    """Scores of tasks that the paper has not: a row a run, and the mean of the tasks that all have."""
    tasks, common = list(dict.fromkeys(task for run in runs for task in run.scores)), common_tasks(runs)
    with_step, with_mean = any("@" in run.name for run in runs), len(tasks) > 1 and bool(common)
    rows: list[list[Cell]] = []
    for run in runs:
        stage, _, step = run.name.partition("@")
        row: list[Cell] = [STAGE_NAMES.get(stage, stage), *[step] * with_step]  # type: ignore[call-overload]
        row += [run.scores.get(task) for task in tasks]
        rows.append(row + ([mean_of(run.scores, common)] if with_mean else []))
    header = ["Trained with", *["Step"] * with_step, *tasks, *[f"Mean of {len(common)}"] * with_mean]
    return Table(header, rows, title, "Main scores x 100; the highest of a column is bold.", marks_best=True)


def _lines(runs: Sequence[EvaluatedRun]) -> list[_Line]:
    """The runs, then their differences."""
    lines = [_Line(run.name, run.scores, run.name) for run in runs]
    for run, other in pairs(runs):
        name = "delta" if (run.name, other.name) == ("anchor", "baseline") else ""
        lines.append(_Line(f"{run.name} - {other.name}", _differences(run.scores, other.scores), name, "+"))
    return lines


def _differences(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {task: first[task] - second[task] for task in first if task in second}


def _column_table(
    number: int, title: str, runs: Sequence[EvaluatedRun], paper: Paper, model: str | None
) -> PaperTable | None:
    """Tables 1 and 3: a block a run, a column a category; then the differences between runs."""
    if not any(task in run.scores for run in runs for task in paper.tasks):
        return None
    rows: list[list[Cell]] = []
    checks: dict[str, Check] = {}
    for line in _lines(runs):
        row = [_check(number, model, line.name, column, line.values, paper) for column in COLUMNS]
        rows.append([line.label, *(_whole(line.values, paper.tasks_of(column), line.sign) for column in COLUMNS)])
        if any(check.printed is not None for check in row):
            rows.append([f"{line.label}, paper", *(_printed(check, line.sign) for check in row)])
            rows.append([f"{line.label}, difference", *(_shown(check.difference, "+") for check in row)])
            rows.append([f"{line.label}, verdict", *(check.verdict for check in row)])
        checks |= {f"{line.label} {column}": check for column, check in zip(COLUMNS, row, strict=True)}
    marks = [found.sentence() for found in paper.inconsistencies if (found.table, found.model) == (number, model)]
    note = "Scores x 100; Avg is the mean over the 56 tasks, not over the categories."
    return PaperTable(Table(["", *COLUMNS], rows, title, " ".join([note, *marks])), checks)


def _task_table(runs: Sequence[EvaluatedRun], paper: Paper, model: str | None) -> PaperTable | None:
    """Tables 14 and 15: a row a task, by category, with the category's mean below."""
    scored = {task for run in runs for task in run.scores}
    if not scored:
        return None
    expected = dict(paper.expected.get(model or "", {}))
    if expected:
        expected["delta"] = _differences(expected["anchor"], expected["baseline"])
    lines = [(line, expected.get(line.name)) for line in _lines(runs)]
    rows: list[list[Cell]] = []
    checks: dict[str, Check] = {}

    def add_means(label: str, tasks: Sequence[str]) -> None:
        row: list[Cell] = [label]
        for line, printed in lines:
            row.append(_whole(line.values, tasks, line.sign))
            row += [] if printed is None else [_whole(printed, tasks, line.sign), ""]
        rows.append(row)

    for column, tasks in {**paper.columns, "": tuple(sorted(scored - set(paper.tasks)))}.items():
        for task in (task for task in tasks if task in scored):
            row: list[Cell] = [task]
            for line, printed in lines:
                check = Check(line.values.get(task), None if printed is None else printed.get(task), 1)
                row.append(_shown(check.measured, line.sign))
                row += [] if printed is None else [_printed(check, line.sign), check.verdict]
                checks[f"{line.label} {task}"] = check
            rows.append(row)
        if column and scored.intersection(tasks):
            add_means(f"Mean of {column} ({len(tasks)})", tasks)
    if scored.intersection(paper.tasks):
        add_means("Mean of 56", paper.tasks)
    header, note = ["Task"], "Main scores x 100."
    for line, printed in lines:
        header += [line.label] if printed is None else [line.label, "paper", "verdict"]
    if len(header) > 1 + len(lines):
        note += " Means have their verdict in the table by category."
    number = next((f" (Table {n})" for n in (14, 15) if model in paper.tables[n]), "")
    return PaperTable(Table(header, rows, f"MTEB by task{number}", note), checks)


def _means_table(
    number: int, title: str, group: str, runs: Sequence[EvaluatedRun], paper: Paper, model: str | None
) -> PaperTable | None:
    """Tables 4, 5, 8, 9, 10 and 11: one mean a run."""
    tasks = paper.tasks_of(group)
    known = {run.name: run.scores for run in runs}
    if not any(mean_of(scores, tasks) is not None for scores in known.values()):
        return None
    expected = paper.expected.get(model or "", {})
    rows: list[list[Cell]] = []
    checks: dict[str, Check] = {}
    note = f"Mean of {len(tasks)} tasks x 100."
    for name in dict.fromkeys([*paper.tables.get(number, {}).get(model or "", {}), *known]):
        check = _check(number, model, name, group, known.get(name, {}), paper)
        if check.printed is None and number in (8, 11) and name in expected:
            check = check._replace(printed=mean_of(expected[name], tasks))
            note = f"Mean of {len(tasks)} tasks x 100; where the paper prints none, it is that of its scores by task."
        mean = _whole(known[name], tasks, "") if name in known else None
        rows.append([name, mean, _printed(check, ""), _shown(check.difference, "+"), check.verdict])
        checks[name] = check
    return PaperTable(Table(["Run", "mean", "paper", "difference", "verdict"], rows, title, note), checks)


def _comparators(runs: Sequence[EvaluatedRun], paper: Paper) -> PaperTable | None:
    """Table 2 as context: published models, and the runs that have all 56 tasks."""
    whole = [run for run in runs if mean_of(run.scores, paper.tasks) is not None]
    if not whole:
        return None
    rows: list[list[Cell]] = [[name, *(row[column] for column in COLUMNS)] for name, row in paper.comparators.items()]
    for run in whole:
        rows.append([f"{run.name} (this evaluation)", *(mean_of(run.scores, paper.tasks_of(c)) for c in COLUMNS)])
    notes = ["Published scores as the paper prints them, for context only; nothing is judged by them."]
    notes += [found.sentence() for found in paper.inconsistencies if found.table == 2]
    return PaperTable(Table(["Model", *COLUMNS], rows, "Published models (Table 2)", " ".join(notes)), {})


def _check(number: int, model: str | None, name: str, group: str, values: Mapping[str, float], paper: Paper) -> Check:
    tasks, doubt = paper.tasks_of(group), paper.doubt(number, model, name, group)
    printed = paper.printed(number, model, name, group)
    return Check(mean_of(values, tasks), printed, len(tasks), doubt.sentence() if doubt else "")


def _whole(values: Mapping[str, float], tasks: Sequence[str], sign: str) -> Cell:
    """The mean, or how many of its tasks are there."""
    mean = mean_of(values, tasks)
    return f"{sum(task in values for task in tasks)}/{len(tasks)}" if mean is None else _shown(mean, sign)


def _printed(check: Check, sign: str) -> Cell:
    """The paper's value, with a star where it is in doubt."""
    in_doubt = check.printed is not None and check.doubt
    return f"{check.printed:{sign}.2f}*" if in_doubt else _shown(check.printed, sign)


def _shown(value: float | None, sign: str) -> Cell:
    """A number as it is, or with its sign, and without one for a zero that is a trace of rounding."""
    return value if value is None or not sign else f"{round(value, 2) + 0.0:{sign}.2f}"
