"""The evaluation report: what its tables hold for made-up results, in all four forms, and what bad input says."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llm2vec.reports.comparisons import EvaluatedRun, Interval
from llm2vec.reports.evaluation import build_report
from llm2vec.reports.page import Page
from llm2vec.reports.paper import read_paper
from llm2vec.reports.results import PARTS, read_results
from llm2vec.table import Cell, Table
from llm2vec.types import UserError
from tests.reports.test_results import keep_predictions, write_qrels, write_results

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "report.py"
PAPER = read_paper()
ONE, EIGHT, QWEN = "LLaMA-3.2-1B-Instruct", "LLaMA-3.1-8B-Instruct", "Qwen2.5-1.5B-Instruct"
PNG_START = b"\x89PNG\r\n\x1a\n"

MakeRun = Callable[[str, Mapping[str, float]], EvaluatedRun]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run whose results went through a folder, from its name and its scores x 100."""

    def make(name: str, scores: Mapping[str, float]) -> EvaluatedRun:
        return EvaluatedRun(name, read_results(write_results(tmp_path / name, scores, name=f"org__{name}")))

    return make


def shifted(run: str, by: float, model: str = ONE) -> dict[str, float]:
    return {task: score + by for task, score in PAPER.expected[model][run].items()}


def subset(run: str, by: float) -> dict[str, float]:
    return {task: score for task, score in shifted(run, by).items() if task in PAPER.subset}


def table(report: Page, title: str) -> Table:
    title = f"({title})" if title.startswith("Table") else title
    (found,) = [one for one in report.tables if title in one.title]
    return found


def row(found: Table, name: str) -> dict[str, Cell]:
    """The first cell of each column name, of the row with this name."""
    (cells,) = [cells for cells in found.rows if cells[0] == name]
    return dict(reversed(list(zip(found.header, cells, strict=True))))


def test_the_papers_own_scores_reproduce_the_paper(make_run: MakeRun) -> None:
    """Fed with Tables 14 and 15, the report prints Table 1; a model at a time, nothing is near or off."""
    for model in PAPER.expected:
        runs = [make_run(f"{arm}-{model}", PAPER.expected[model][arm]) for arm in ("anchor", "baseline")]
        runs = [EvaluatedRun(run.name.partition("-")[0], run.results) for run in runs]
        report = build_report(runs, PAPER, model, {})
        verdicts = [check["verdict"] for checks in report.data["checks"].values() for check in checks.values()]
        assert set(verdicts) <= {"within", "not judged", None}
        assert verdicts.count("within") >= 3 * 56 + 2 * 8
        by_category = table(report, "Table 1")
        assert row(by_category, "anchor")["Avg"] == pytest.approx(PAPER.printed(1, model, "anchor", "Avg"), abs=0.011)
        assert row(by_category, "anchor - baseline")["Avg"] == f"{report.data['comparisons'][0]['difference']:+.2f}"


def test_table_1_has_values_paper_difference_and_verdict(make_run: MakeRun) -> None:
    report = build_report(
        [make_run("anchor", shifted("anchor", 0.5)), make_run("baseline", shifted("baseline", -1))], PAPER, ONE, {}
    )
    found = table(report, "Table 1")
    assert [cells[0] for cells in found.rows] == [
        *("anchor", "anchor, paper", "anchor, difference", "anchor, verdict"),
        *("baseline", "baseline, paper", "baseline, difference", "baseline, verdict"),
        *(
            "anchor - baseline",
            "anchor - baseline, paper",
            "anchor - baseline, difference",
            "anchor - baseline, verdict",
        ),
    ]
    assert row(found, "anchor")["Retr"] == pytest.approx(53.10, abs=0.006)
    assert row(found, "anchor, paper")["Retr"] == 52.60 and row(found, "anchor, difference")["Retr"] == "+0.50"
    assert (
        row(found, "anchor - baseline")["Avg"] == "+2.75" and row(found, "anchor - baseline, paper")["Avg"] == "+1.25"
    )
    # 0.5 is within for 15 and fewer tasks, near for 56; 1 is off for 56; 1.5 too, on the delta
    assert [row(found, f"{name}, verdict")["Avg"] for name in ("anchor", "baseline", "anchor - baseline")] == [
        "near",
        "off",
        "off",
    ]
    assert row(found, "anchor, verdict")["Retr"] == "within" and row(found, "baseline, verdict")["Retr"] == "near"
    (off,) = [sentence for sentence in report.sentences if sentence.startswith("Off the paper in MTEB by category")]
    assert "baseline Avg (-1.00)" in off and "anchor - baseline Avg (+1.50)" in off and "anchor Avg" not in off
    assert row(table(report, "Beside the paper"), "MTEB by task (Table 14)") == {
        **{"Verdicts": "MTEB by task (Table 14)", "within": "168", "near": "0", "off": "0", "not judged": "0"}
    }


def test_table_14_lists_every_task_by_category(make_run: MakeRun) -> None:
    report = build_report(
        [make_run("anchor", shifted("anchor", 3)), make_run("baseline", shifted("baseline", 0))], PAPER, ONE, {}
    )
    found = table(report, "Table 14")
    assert found.header == [
        "Task",
        *(n for name in ("anchor", "baseline", "anchor - baseline") for n in (name, "paper", "verdict")),
    ]
    names = [cells[0] for cells in found.rows]
    assert [name for name in names if name in PAPER.tasks] == list(PAPER.tasks)
    assert names[15] == "Mean of Retr (15)" and names[-2:] == ["Mean of Summ (1)", "Mean of 56"] and len(names) == 64
    assert row(found, "FEVER") == {
        **{"Task": "FEVER", "anchor": pytest.approx(91.48), "paper": 88.48, "verdict": "near"},
        **{"baseline": pytest.approx(88.48), "anchor - baseline": "+3.00"},
    }
    assert row(found, "Mean of 56")["anchor"] == pytest.approx(65.24, abs=0.006)


def test_no_mean_of_a_part_is_shown(make_run: MakeRun) -> None:
    scores = shifted("anchor", 0)
    del scores["FEVER"], scores["SICK-R"]
    report = build_report([make_run("anchor", scores), make_run("baseline", shifted("baseline", 0))], PAPER, ONE, {})
    by_category = table(report, "Table 1")
    assert row(by_category, "anchor") == {
        "": "anchor",
        **{"Retr": "14/15", "Rerank": pytest.approx(56.65, abs=0.006), "Clust": pytest.approx(44.75, abs=0.006)},
        **{"PairClass": pytest.approx(85.48, abs=0.006), "Class": pytest.approx(72.47, abs=0.006)},
        **{"STS": "9/10", "Summ": pytest.approx(30.87, abs=0.006), "Avg": "54/56"},
    }
    assert (
        row(by_category, "anchor, verdict")["Avg"] is None and row(by_category, "anchor - baseline")["Avg"] == "54/56"
    )
    assert row(table(report, "Table 14"), "Mean of 56")["anchor"] == "54/56"
    assert row(table(report, "Table 8"), "anchor")["mean"] == "14/15"  # SICK-R is in it
    assert row(table(report, "Table 11"), "anchor")["mean"] == "13/14"
    assert "anchor (org/anchor): 54 of 56 tasks, so there is no mean of 56; missing: FEVER, SICK-R." in report.sentences
    assert [cells[0] for cells in table(report, "Table 2").rows][-1] == "baseline (this evaluation)"
    assert report.data["comparisons"][0]["num_units"] == 54


def test_few_tasks_are_named_by_what_is_there(make_run: MakeRun) -> None:
    report = build_report(
        [make_run("a", {"NFCorpus": 31, "Mine": 50}), make_run("b", {"NFCorpus": 30})], PAPER, None, {}
    )
    assert (
        "a (org/a): 1 of 56 tasks, 1 other task, so there is no mean of 56; missing: all but NFCorpus."
        in report.sentences
    )
    assert "a - b: +1.00 over NFCorpus, the one task both have, too few for an interval." in report.sentences
    assert report.data["comparisons"] == [] and row(table(report, "by task"), "Mine")["b"] is None


def test_cells_the_paper_contradicts_are_marked_and_not_judged(make_run: MakeRun) -> None:
    runs = [make_run("anchor", shifted("anchor", 0, EIGHT)), make_run("baseline", shifted("baseline", 0, EIGHT))]
    report = build_report(runs, PAPER, EIGHT, {})
    found = table(report, "Table 1")
    assert (
        row(found, "baseline, paper")["Clust"] == "46.64*" and row(found, "baseline, verdict")["Clust"] == "not judged"
    )
    assert row(found, "anchor - baseline, paper")["Clust"] == "-0.61*"
    assert row(found, "anchor - baseline, verdict")["Clust"] == "not judged"
    assert row(found, "baseline, verdict")["Avg"] == "within" == row(found, "anchor, verdict")["Clust"]
    assert "printed 46.64, from Table 15 45.69" in found.note
    assert row(table(report, "Beside the paper"), "MTEB by category (Table 1)")["not judged"] == "6"
    assert row(table(report, "Table 11"), "anchor")["verdict"] == "within"  # against 14 tasks, not 15
    assert row(table(report, "Table 11"), "LLaMA2Vec") == {
        **{"Run": "LLaMA2Vec", "mean": None, "paper": 56.4, "difference": None, "verdict": None}
    }


def test_ablation_tables_and_figures_take_what_the_runs_provide(make_run: MakeRun, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss_contrastive": 2}\n{"step": 2, "loss_contrastive": 1}\n')
    runs = [make_run("anchor", shifted("anchor", 0)), make_run("baseline", shifted("baseline", 0))]
    runs += [make_run("only_d2q", shifted("anchor", -1)), make_run("alpha_0.5", subset("anchor", -0.3))]
    runs += [make_run("stage_I", subset("baseline", -5)), make_run("base", subset("baseline", -18))]
    runs += [make_run("baseline_3000_steps", subset("baseline", 0))]
    runs += [
        make_run(f"{name}@{step}", subset(name, -100 / step)) for name in ("anchor", "baseline") for step in (25, 50)
    ]
    report = build_report(runs, PAPER, ONE, {"anchor": log})
    ablation = table(report, "Table 3")
    assert (
        row(ablation, "only_d2q, paper")["Avg"] == "61.38*"
        and row(ablation, "only_d2q, verdict")["Avg"] == "not judged"
    )
    assert row(table(report, "Table 4"), "alpha_0.5")["difference"] == "+0.01"
    assert row(table(report, "Table 4"), "alpha_0.8")["mean"] is None
    assert row(table(report, "Table 5"), "baseline_3000_steps")["difference"] == "+0.21"
    assert row(table(report, "Table 9"), "baseline@25")["verdict"] == "off"
    assert row(table(report, "Table 9"), "anchor@25")["difference"] == f"{65.19 - 4 - 59.31:+.2f}"
    assert row(table(report, "Table 10"), "stage_I")["paper"] == 59.11
    assert row(table(report, "Table 8"), "anchor")["paper"] == pytest.approx(65.19, abs=0.006)
    assert [cells[0] for cells in table(report, "Table 1").rows if str(cells[0]).startswith("anchor@")] == []

    figures = {picture.name: picture.figure for picture in report.pictures}
    assert set(figures) == {"early_stage.png", "by_stage.png", "losses.png"}
    (early,) = figures["early_stage.png"].axes
    lines = {str(line.get_label()): list(line.get_ydata()) for line in early.lines}  # type: ignore[arg-type]
    assert list(lines) == [
        f"{who}, {arm}"
        for who in ("measured", "paper")
        for arm in ("Baseline (Stage II only)", "Anchor (Stage I + II)")
    ]
    assert lines["paper, Anchor (Stage I + II)"] == pytest.approx([59.31, 61.92, 63.31, 64.4, 64.84])
    assert lines["measured, Anchor (Stage I + II)"] == pytest.approx([61.19, 63.19], abs=0.01)
    (stages,) = figures["by_stage.png"].axes
    heights = [round(bar.get_height(), 1) for bar in stages.patches if bar.get_height()]  # type: ignore[attr-defined]
    assert heights == pytest.approx([46.0, 59.0, 64.0, 65.2, 46.2, 59.1, 64.0, 65.2], abs=0.06)


def test_runs_of_another_model_are_compared_with_one_another_only(make_run: MakeRun) -> None:
    runs = [make_run("mine", shifted("anchor", 1)), make_run("theirs", shifted("anchor", 0))]
    report = build_report(runs, PAPER, None, {})
    assert table(report, "by task").header == ["Task", "mine", "theirs", "mine - theirs"]
    assert all(check["printed"] is None for checks in report.data["checks"].values() for check in checks.values())
    assert [c["label"] for c in report.data["comparisons"]] == ["mine - theirs"]
    assert "paper's own" not in report.markdown()
    assert not [one for one in report.tables if one.title == "Beside the paper"]


def test_interval_of_the_papers_own_scores_stands_beside(make_run: MakeRun) -> None:
    report = build_report(
        [make_run("anchor", shifted("anchor", 0)), make_run("baseline", shifted("baseline", 0))], PAPER, ONE, {}
    )
    found = {name: value for name, value in report.data["comparisons"][0].items() if name in Interval._fields}
    interval = Interval(**found)
    assert interval.difference == pytest.approx(1.25, abs=0.006) and interval.low > 0.5 and interval.num_ahead == 38
    assert f"The paper's own scores, anchor - baseline: {interval.sentence('tasks')}." in report.sentences


def test_different_data_and_broken_files_are_said(make_run: MakeRun) -> None:
    baseline = make_run("baseline", shifted("baseline", 0))
    baseline.results.data_revisions["FEVER"] = "d2"
    scores = {**shifted("anchor", 0), **dict.fromkeys(PARTS[:3], 40.0)}
    del scores["CQADupstackRetrieval"]
    anchor = make_run("anchor", scores)
    report = build_report([anchor, baseline], PAPER, ONE, {})
    text = report.markdown()
    assert "anchor and baseline were scored on different revisions of the data of FEVER:" in text
    assert "anchor, CQADupstackRetrieval: parts without a score: CQADupstackGisRetrieval, " in text
    assert "counted as missing" in text and "missing: CQADupstackRetrieval." in text


def test_every_form_holds_the_same_and_escapes_what_comes_from_data(make_run: MakeRun, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|*x*"
    run = make_run("plain", {**shifted("anchor", 0), "My<b>Task": 12.34})
    other = EvaluatedRun(evil, make_run("anchor", shifted("anchor", -2)).results)
    report = build_report([run, other], PAPER, None, {})
    page = report.write(tmp_path / "out/report.html")
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json", "report.md"]
    html, markdown = page.read_text(), page.with_name("report.md").read_text()
    assert (
        "<script" not in html and "<b>" not in html and "&lt;script&gt;alert(1)" in html and "My&lt;b&gt;Task" in html
    )
    assert "http" not in html and '<td class="number">12.34</td>' in html
    assert not re.search(r"(?<!\\)<", markdown) and "\\<script\\>alert(1)\\</script\\>\\|\\*x\\*" in markdown
    lines = markdown.splitlines()
    for header in (line for line in lines if line.startswith("| Task")):
        rule = lines[lines.index(header) + 1]
        assert rule.count("|") == header.replace("\\|", "").count("|") == 5
    data = json.loads(page.with_name("report.json").read_text())
    assert data == json.loads(json.dumps(report.data)) and data["runs"]["plain"]["scores"][
        "My<b>Task"
    ] == pytest.approx(12.34)
    assert data["comparisons"][0]["difference"] == pytest.approx(2)
    assert report.markdown() == markdown
    for form in (html, markdown):
        assert "62.24" in form and "60.24" in form and "+2.00" in form


def test_report_refuses_what_it_cannot_tell_apart(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("anchor", {"NFCorpus": 30.0})
    with pytest.raises(UserError, match="names: anchor is given more than once"):
        build_report([run, run], PAPER, None, {})
    with pytest.raises(UserError, match="paper_model: the paper has no GPT"):
        build_report([run], PAPER, "GPT", {})
    with pytest.raises(UserError, match="the paper has no mine of"):
        build_report([EvaluatedRun("mine", run.results)], PAPER, ONE, {})
    with pytest.raises(UserError, match=r"none: cannot be read"):
        build_report([run], PAPER, None, {"anchor": tmp_path / "none"})
    folder = write_results(tmp_path / "cut", {"NFCorpus": 30.0})
    (folder / "NFCorpus.json").write_text("{")
    with pytest.raises(UserError, match=r"not one score to report; cut, NFCorpus: NFCorpus\.json is cut off"):
        build_report([EvaluatedRun("cut", read_results(folder))], PAPER, None, {})


def test_runs_without_a_task_of_the_papers_make_a_report_too(make_run: MakeRun, tmp_path: Path) -> None:
    """Nothing of it stands beside the paper, so there are no verdicts to count."""
    runs = [make_run("anchor", {"MyOwn": 30.0}), make_run("baseline", {"MyOwn": 20.0})]
    report = build_report(runs, PAPER, ONE, {})
    assert "Beside the paper" not in {one.title for one in report.tables}
    assert report.write(tmp_path / "out/report.html").is_file()
    both = build_report([make_run("a", {"MyOwn": 1.0, "Other": 2.0}), make_run("b", {"MyOwn": 1.0})], PAPER, None, {})
    assert "verdict" not in both.tables[0].note


def test_checkpoints_on_the_way_need_the_whole_subset(make_run: MakeRun) -> None:
    with pytest.raises(
        UserError, match=r"not one mean that a table could show; anchor@25 \(org/anchor@25\): 1 of 15 tasks"
    ):
        build_report([make_run("anchor@25", {"NFCorpus": 30.0})], PAPER, None, {})


def test_too_few_queries_are_said_with_their_task(make_run: MakeRun) -> None:
    runs = [EvaluatedRun(name, make_run(name, {"Docs": 50.0}).results, {"Docs": {"q": 50.0}}) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"a - b on Docs: An interval needs 10 or more tasks or queries, here .* 1\."):
        build_report(runs, PAPER, None, {})


def test_a_folder_that_cannot_be_made_is_one_sentence(make_run: MakeRun, tmp_path: Path) -> None:
    report = build_report([make_run("a", {"MyOwn": 30.0})], PAPER, None, {})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"The folder .*file cannot be made \(File exists\)"):
        report.write(tmp_path / "file/report.html")


def report_script(*arguments: str | Path) -> None:
    runpy.run_path(str(SCRIPT))["main"]([str(argument) for argument in arguments])


def test_the_script_from_folders_to_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = {
        "a": {f"q{i}": {"x": 2.0, "y": 1.0} for i in range(12)},
        "b": {f"q{i}": {"x": 1.0, "y": 2.0} for i in range(12)},
    }
    qrels = write_qrels(tmp_path / "qrels.jsonl", [(f"q{i}", "x", 1) for i in range(12)])
    for name, score in (("a", 100.0), ("b", 63.093)):
        write_results(tmp_path / name, {"Docs": score})
        (tmp_path / f"{name}-kept").mkdir()
        keep_predictions(tmp_path / f"{name}-kept", "Docs", queries[name])
    folders = [tmp_path / name for name in ("a", "b")]
    kept: list[str | Path] = [
        "--predictions",
        *(tmp_path / f"{name}-kept" for name in ("a", "b")),
        "--qrels",
        f"Docs={qrels}",
    ]
    report_script(*folders, "--names", "a", "b", *kept, "--output_dir", tmp_path / "out")
    out = capsys.readouterr().out
    assert "a - b on Docs: +36.91, 95% interval +36.91 to +36.91 (paired bootstrap over 12 queries" in out
    assert f"report: {tmp_path / 'out' / 'report.html'}" in out and (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--names", "a", "b"], "--names: 2 given for 1 RESULTS"),
        (["--qrels", "Docs=x"], "--predictions and --qrels go together"),
        (["--qrels", "Docs"], "--qrels: expected NAME=FILE, got Docs"),
        (["--losses", "anchor=x", "anchor=y"], "--losses: anchor is given more than once"),
        (["--losses", "stage_2=x"], "losses: no stage stage_2; choose from bm25, base, stage_I"),
        (["--predictions", "p", "--qrels", "Other=x"], "--qrels: org/model has no score of Other"),
    ],
)
def test_bad_arguments_of_the_script(tmp_path: Path, arguments: list[str], said: str) -> None:
    write_results(tmp_path, {"Docs": 50.0})
    with pytest.raises(UserError, match=said):
        report_script(tmp_path, *arguments, "--output_dir", tmp_path / "out")


def test_the_script_says_one_sentence_and_ends_with_2(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: There is no results folder {tmp_path / 'none'}.\n"
