"""The paper's data: every aggregate is computed again from the cells; the misfits are exactly those listed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from llm2vec.reports.comparisons import TASK_TOLERANCE, Check
from llm2vec.reports.paper import BEIR, COLUMNS, PAPER_DATA, SUBSET, mean_of, read_paper
from llm2vec.types import UserError

TABLE = Path(__file__).parents[2] / "test_configs/mteb/task_to_instructions.json"
SHARED = Path(__file__).parents[2] / "shared" / "paper" / "tables.json"
PAPER = read_paper()
ONE, THREE, EIGHT = "LLaMA-3.2-1B-Instruct", "LLaMA-3.2-3B-Instruct", "LLaMA-3.1-8B-Instruct"
#: Two decimals of a delta, and of the means it is taken of; anything beyond is a misfit.
LIMIT = 0.011

Misfit = tuple[int, str, str | None, str]


def printed(table: int, model: str, run: str, column: str) -> float:
    value = PAPER.printed(table, model, run, column)
    assert value is not None
    return value


def computed(model: str, run: str, group: str) -> float:
    mean = mean_of(PAPER.expected[model][run], PAPER.tasks_of(group))
    assert mean is not None
    return mean


def of_own_columns(row: Any) -> float:
    return sum(row[column] * len(PAPER.columns[column]) for column in COLUMNS[:-1]) / 56


def misfits() -> dict[Misfit, float]:
    """Every cell that another part of the paper contradicts, and what it should be by that part."""
    found: dict[Misfit, float] = {}

    def compare(table: int, model: str, run: str | None, column: str, cell: float, other: float) -> None:
        if abs(other - cell) > LIMIT:
            found[table, model, run, column] = other

    for model in PAPER.expected:
        for run in ("baseline", "anchor"):
            for column in COLUMNS:
                compare(1, model, run, column, printed(1, model, run, column), computed(model, run, column))
    for table in (1, 3):
        for model, rows in PAPER.tables[table].items():
            for run, row in rows.items():
                assert isinstance(row, dict)
                if run != "delta" and (table, model, run, "Avg") not in found:
                    compare(table, model, run, "Avg", row["Avg"], of_own_columns(row))
    for model, row in PAPER.comparators.items():
        compare(2, model, None, "Avg", row["Avg"], of_own_columns(row))
    compare(11, EIGHT, "anchor", BEIR, printed(11, EIGHT, "anchor", BEIR), computed(EIGHT, "anchor", "Retr"))
    return found


def test_the_benchmark_has_its_56_tasks_in_7_columns() -> None:
    assert [len(PAPER.columns[column]) for column in COLUMNS[:-1]] == [15, 4, 11, 3, 12, 10, 1]
    assert len(set(PAPER.tasks)) == 56 == len(PAPER.tasks_of("Avg"))
    assert len(set(PAPER.subset)) == 15 and set(PAPER.subset) < set(PAPER.tasks)
    subset = json.loads((PAPER_DATA / "paper" / "table_8.json").read_text())["columns"]
    assert all(set(tasks) <= set(PAPER.columns[column]) for column, tasks in subset.items())
    assert len(PAPER.tasks_of(BEIR)) == 14 and "MSMARCO" not in PAPER.tasks_of(BEIR)
    assert all(set(row) == set(PAPER.tasks) for runs in PAPER.expected.values() for row in runs.values())
    assert set(PAPER.tasks) <= set(json.loads(TABLE.read_text()))


@pytest.mark.parametrize("path", sorted(PAPER_DATA.glob("paper/*.json")) + sorted(PAPER_DATA.glob("expected/*.json")))
def test_every_file_names_its_source(path: Path) -> None:
    content = json.loads(path.read_text())
    assert "arXiv 2509.03020" in content["source"] and content["caption"]
    if path.stem.startswith("table_"):
        assert f"Table {path.stem.removeprefix('table_')}" in content["source"]


def test_the_misfits_are_exactly_the_known_ones() -> None:
    """A changed cell shows here; so does an inconsistency that is listed but not there."""
    found = misfits()
    listed = {(one.table, one.model, one.run, one.column): one for one in PAPER.inconsistencies}
    assert found.keys() == listed.keys()
    for key, one in listed.items():
        assert one.computed == pytest.approx(found[key], abs=0.0051)
        row = PAPER.comparators[one.model]["Avg"] if one.run is None else printed(*key)  # type: ignore[arg-type]
        assert row == one.printed


def test_deltas_and_averages_are_those_of_the_printed_scores() -> None:
    for model in PAPER.models:
        for column in COLUMNS:
            difference = printed(1, model, "anchor", column) - printed(1, model, "baseline", column)
            assert printed(1, model, "delta", column) == pytest.approx(difference, abs=1e-9)
    for model in PAPER.expected:
        table = 14 if model in PAPER.tables[14] else 15
        for run in ("baseline", "anchor"):
            assert printed(table, model, run, "") == pytest.approx(computed(model, run, "Avg"), abs=LIMIT)
            assert printed(table, model, run, "") == printed(1, model, run, "Avg")


def test_rows_that_stand_in_two_tables_are_equal() -> None:
    assert PAPER.comparators["Anchor-LLaMA-3.1-8B-Instruct"] == PAPER.tables[1][EIGHT]["anchor"]
    for run in ("baseline", "anchor"):
        assert PAPER.tables[3][ONE][run] == PAPER.tables[1][ONE][run]


def test_subset_and_beir_means_come_from_the_scores_by_task() -> None:
    for table, model, run in (
        *((4, ONE, "anchor"), (5, ONE, "baseline"), (5, ONE, "anchor")),
        *((10, model, run) for model in (ONE, THREE) for run in ("baseline", "anchor")),
    ):
        assert printed(table, model, run, SUBSET) == pytest.approx(computed(model, run, SUBSET), abs=0.00501)
    assert printed(11, EIGHT, "anchor", BEIR) == pytest.approx(computed(EIGHT, "anchor", BEIR), abs=0.00501)


def test_what_the_text_claims_holds_in_the_tables() -> None:
    gains = {model: printed(1, model, "delta", "Avg") for model in PAPER.models}
    assert gains == dict(zip(PAPER.models, (1.25, 1.35, 1.22, 1.12, 1.24), strict=True))
    assert all(printed(1, ONE, "delta", column) > 0 for column in COLUMNS)
    assert max(PAPER.comparators, key=lambda model: PAPER.comparators[model]["Avg"]).startswith("Anchor")
    assert max(PAPER.tables[4][ONE], key=lambda run: printed(4, ONE, run, "")) == "anchor"
    for model in PAPER.tables[9]:
        for step in (25, 50, 75, 100, 125):
            assert printed(9, model, f"anchor@{step}", "") > printed(9, model, f"baseline@{step}", "")


def test_the_tolerances_have_the_reasons_the_report_gives() -> None:
    gains = [{t: runs["anchor"][t] - runs["baseline"][t] for t in PAPER.tasks} for runs in PAPER.expected.values()]
    variances = [statistics.variance(of_model[task] for of_model in gains) for task in PAPER.tasks]
    assert round(math.sqrt(statistics.fmean(variances)), 1) == TASK_TOLERANCE == 2.0
    smallest = min(printed(1, model, "delta", "Avg") for model in PAPER.models)
    assert Check(smallest / 4, 0, 56).verdict == "near" and Check(smallest / 4 - 0.02, 0, 56).verdict == "within"
    assert Check(smallest / 2, 0, 56).verdict == "off" and Check(smallest / 2 - 0.03, 0, 56).verdict == "near"


def test_doubtful_cells_and_their_deltas_are_not_judged() -> None:
    qwen = "Qwen2.5-1.5B-Instruct"
    doubt = PAPER.doubt(1, qwen, "baseline", "PairClass")
    assert doubt is not None and "printed 84.41, from Table 14 82.97" in doubt.sentence()
    assert PAPER.doubt(1, qwen, "delta", "PairClass") == doubt
    assert PAPER.doubt(1, qwen, "baseline", "Avg") is None  # listed, but the fault lies in the other cell
    assert PAPER.doubt(1, qwen, "anchor", "PairClass") is None and PAPER.doubt(1, ONE, "delta", "Retr") is None
    assert PAPER.doubt(11, EIGHT, "anchor", BEIR) is None


def test_a_mean_is_whole_or_not_there() -> None:
    assert mean_of({"a": 1.0, "b": 2.0, "c": 9.0}, ("a", "b")) == 1.5
    assert mean_of({"a": 1.0}, ("a", "b")) is None


def test_unknown_models_and_runs_are_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"paper_model: the paper has no Llama; choose one of LLaMA-3\.2-1B-Instruct"):
        PAPER.check_names("Llama", ["anchor"])
    with pytest.raises(
        UserError, match=r"names: the paper has no mine of Mistral-7B; choose from baseline, anchor, or"
    ):
        PAPER.check_names("Mistral-7B", ["mine"])
    with pytest.raises(UserError, match="anchor@25 for a checkpoint"):
        PAPER.check_names(ONE, ["mine"])
    PAPER.check_names(ONE, ["mine", "anchor@25"])


def test_missing_and_broken_data_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(PAPER_DATA, folder)
    (folder / "paper" / "table_9.json").write_text('{"models"')
    with pytest.raises(UserError, match=r"table_9\.json: not valid JSON"):
        read_paper(folder)
    (folder / "paper" / "table_9.json").write_text("{}")
    with pytest.raises(UserError, match="not as this project ships them"):
        read_paper(folder)
    (folder / "paper" / "table_9.json").unlink()
    with pytest.raises(UserError, match=r"table_9\.json: cannot be read"):
        read_paper(folder)


@pytest.mark.skipif(not SHARED.is_file(), reason="the transcription of the paper is not beside the project")
def test_the_files_hold_what_the_transcription_holds() -> None:
    tables = json.loads(SHARED.read_text())
    assert [tables["table_8"]["tasks"], tables["table_2"]["models"]] == [list(PAPER.subset), PAPER.comparators]
    for model, runs in tables["table_1"]["models"].items():
        rows = {"baseline": runs["baseline"], "anchor": runs["anchor"], "delta": runs["delta_printed"]}
        assert PAPER.tables[1][model] == rows
    for number in (14, 15):
        for model, runs in tables[f"table_{number}"]["models"].items():
            assert PAPER.expected[model] == {run: runs[run] for run in ("baseline", "anchor")}
            assert PAPER.tables[number][model] == {run: runs["average_printed"][run] for run in ("baseline", "anchor")}
    names = {"Baseline": "baseline", "OnlyD2Q": "only_d2q", "OnlyQ2D": "only_q2d", "Anchor": "anchor"}
    assert PAPER.tables[3][ONE] == {names[name]: row for name, row in tables["table_3"]["models"].items()}
    for model, rows in tables["table_9"]["models"].items():
        flat = {f"{names[name]}@{step}": score for name, row in rows.items() for step, score in row.items()}
        assert PAPER.tables[9][model] == flat
    assert sorted(PAPER.tables[4][ONE].values()) == sorted(tables["table_4"]["alpha_to_score"].values())
    assert list(PAPER.tables[5][ONE].values()) == [row["score"] for row in tables["table_5"]["rows"]]
    for size, model in (("1B", ONE), ("3B", THREE)):
        assert list(PAPER.tables[10][model].values()) == [row[size] for row in tables["table_10"]["rows"].values()]
    assert list(PAPER.tables[11][EIGHT].values()) == [row["BEIR"] for row in tables["table_11"]["rows"].values()]


def test_a_cell_that_is_judged_does_not_hide_one_that_is_not() -> None:
    """A difference has two cells, and either may be in doubt."""
    cell = next(one for one in PAPER.inconsistencies if one.table == 1)
    cells = [
        dataclasses.replace(cell, run=run, judged=judged) for run, judged in (("anchor", True), ("baseline", False))
    ]
    for listed in (cells, cells[::-1]):
        paper = dataclasses.replace(PAPER, inconsistencies=tuple(listed))
        assert paper.doubt(1, cell.model, "delta", cell.column) == cells[1]
        assert paper.doubt(1, cell.model, "anchor", cell.column) is None
