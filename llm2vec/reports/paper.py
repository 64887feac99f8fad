"""The paper's tables as data: what it prints for which run, and which of its cells contradict each other.

The numbers lie in `data/paper/*.json`, a file a table with its source and caption, and in
`data/expected/*.json`, a file a model with the score of every task (Tables 14 and 15). Scores are x 100.

Runs have the same names everywhere: `baseline` (Stage II alone), `anchor` (Stage I + II), `base` (untrained),
`stage_I` (Stage I alone), `only_d2q` and `only_q2d` (alpha 0 and 1), `alpha_0.5`, `alpha_0.8`, `baseline_3000_steps`,
and `anchor@25` for a checkpoint after 25 steps of Stage II.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from llm2vec.files import read_object
from llm2vec.types import UserError

#: The paper's numbers, as this project ships them.
PAPER_DATA = Path(__file__).with_name("data")

#: The columns of Tables 1 to 3.
COLUMNS = ("Retr", "Rerank", "Clust", "PairClass", "Class", "STS", "Summ", "Avg")
#: Groups of tasks that are no column: Table 8's subset of 15 tasks and Table 11's 14 retrieval tasks.
SUBSET, BEIR = "Subset", "BEIR"

#: A row of Tables 1 to 3, column -> score, or one score.
Printed: TypeAlias = dict[str, float] | float


@dataclass(frozen=True)
class Inconsistency:
    """A cell of the paper that other cells contradict."""

    table: int
    model: str
    run: str | None
    column: str
    printed: float
    against: str  #: What contradicts it, and what that gives
    computed: float
    #: Whether a run is judged by the cell all the same, because the fault is known to lie elsewhere.
    judged: bool
    note: str

    def sentence(self) -> str:
        """The contradiction in words."""
        cell = " ".join([self.model, *([self.run] if self.run else []), self.column])
        said = f"Table {self.table}, {cell}: printed {self.printed:.2f}, from {self.against} {self.computed:.2f}"
        return f"{said}. {self.note}" + ("" if self.judged else " Not held against a run.")


@dataclass(frozen=True)
class Paper:
    """Everything read from the data files."""

    columns: dict[str, tuple[str, ...]]  #: column -> its tasks, in the order of the tables; no Avg
    subset: tuple[str, ...]  #: the 15 tasks of Table 8
    #: table number -> model -> run -> row of scores or one score; Table 2 has no runs.
    tables: dict[int, dict[str, dict[str, Printed]]]
    comparators: dict[str, dict[str, float]]  #: the rows of Table 2
    #: model -> run -> task -> score, of Tables 14 and 15.
    expected: dict[str, dict[str, dict[str, float]]]
    #: cells of the paper that its other cells contradict.
    inconsistencies: tuple[Inconsistency, ...]
    remarks: tuple[str, ...]  #: oddities that contradict nothing

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The 56 tasks, column by column."""
        return tuple(task for tasks in self.columns.values() for task in tasks)

    @property
    def models(self) -> tuple[str, ...]:
        """The models of Table 1."""
        return tuple(self.tables[1])

    def tasks_of(self, group: str) -> tuple[str, ...]:
        """The tasks of a column, of Avg (all 56), of `SUBSET` or of `BEIR` (retrieval without MSMARCO)."""
        if group == BEIR:
            return tuple(task for task in self.columns["Retr"] if task != "MSMARCO")
        return {"Avg": self.tasks, SUBSET: self.subset, **self.columns}[group]

    def printed(self, table: int, model: str | None, run: str, column: str) -> float | None:
        """What a table prints; None where it has no such model, run or column."""
        row = self.tables.get(table, {}).get(model or "", {}).get(run)
        return row.get(column) if isinstance(row, dict) else row

    def doubt(self, table: int, model: str | None, run: str, column: str) -> Inconsistency | None:
        """The contradiction that keeps a cell from being held against a run, if there is one."""
        runs = ("anchor", "baseline") if run == "delta" else (run,)
        cells = [(table, model, one, column) for one in runs]
        found = (one for one in self.inconsistencies if (one.table, one.model, one.run, one.column) in cells)
        return next((one for one in found if not one.judged), None)

    def check_names(self, model: str, names: Sequence[str]) -> None:
        """Refuse, by a `UserError`, a model that the paper does not have, and names of which it has none."""
        if model not in self.models:
            raise UserError(f"paper_model: the paper has no {model}; choose one of {', '.join(self.models)}.")
        known = {run: None for models in self.tables.values() for run in models.get(model, {}) if run != "delta"}
        if not known.keys() & set(names):
            finished = ", ".join(name for name in known if "@" not in name)
            along = " (anchor@25 for a checkpoint after 25 steps)" if any("@" in name for name in known) else ""
            said = f"names: the paper has no {' or '.join(names)} of {model}"
            raise UserError(f"{said}; choose from {finished}{along}, or leave paper_model out.")


def mean_of(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    """Mean score over `tasks`; None unless every one of them is there, as a partial mean cannot be compared."""
    return statistics.fmean(scores[task] for task in tasks) if all(task in scores for task in tasks) else None


def read_paper(folder: Path = PAPER_DATA) -> Paper:
    """Read the data files, in `paper` and `expected`; a `UserError` where one is not what it should be."""

    def read(path: Path) -> dict[str, Any]:
        return read_object(path, f"The paper's data file {path}")

    numbers = (1, 2, 3, 4, 5, 8, 9, 10, 11, 14, 15)
    tables = {number: read(folder / "paper" / f"table_{number}.json") for number in numbers}
    expected = [read(path) for path in sorted((folder / "expected").glob("*.json"))]
    doubts = read(folder / "paper" / "inconsistencies.json")
    try:
        return Paper(
            columns={k: tuple(tasks) for k, tasks in read(folder / "paper" / "categories.json")["columns"].items()},
            subset=tuple(task for tasks in tables.pop(8)["columns"].values() for task in tasks),
            comparators=tables.pop(2)["models"],
            tables={number: table["models"] for number, table in tables.items()},
            expected={file["model"]: {run: file[run] for run in ("baseline", "anchor")} for file in expected},
            inconsistencies=tuple(Inconsistency(**cell) for cell in doubts["cells"]),
            remarks=tuple(doubts["remarks"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: the paper's data files are not as this project ships them ({error!r}).") from None
