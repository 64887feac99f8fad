"""The report on a training set-up: what the tables hold, what the figures draw, what the page escapes, read back."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from llm2vec.reports.comparisons import EvaluatedRun
from llm2vec.reports.evaluation import build_report
from llm2vec.reports.figures import STAGE_COLOURS, by_stage_figure, early_stage_figure, losses_figure
from llm2vec.reports.logs import read_log
from llm2vec.reports.page import Page
from llm2vec.reports.paper import read_paper
from llm2vec.reports.results import Results
from llm2vec.reports.scores import Score, ScoredStage, in_order
from llm2vec.types import UserError

WHAT = "Docs nDCG@10"
NOTE = "Seed 1; 30,506 training pairs."
PNG_START = b"\x89PNG\r\n\x1a\n"


def finished() -> list[Score]:
    return [
        Score("anchor", 600, 46.0),
        Score("baseline", 600, 41.0),
        Score("control", 600, 50.0),
        Score("base", None, 2.0),
        Score("bm25", None, 61.94),
    ]


def curves() -> list[Score]:
    stages: list[ScoredStage] = ["anchor", "baseline", "control"]
    return [Score(stage, step, 10 * i + step / 10) for i, stage in enumerate(stages) for step in (100, 0, 50)]


def run_of(name: str, **scores: float) -> EvaluatedRun:
    return EvaluatedRun(name, Results(name, "r", Path(name), scores, {}, {}, ("2",)))


def report(along: list[Score], losses: dict[ScoredStage, Path], **facts: str) -> Page:
    """A report on runs that have one task, which is none of the paper's."""
    runs = [run_of(score.stage, Docs=score.value) for score in finished()]
    runs += [run_of(f"{score.stage}@{score.step}", Docs=score.value) for score in along]
    return build_report(runs, read_paper(), None, dict(losses), title="A <title>", note=NOTE, facts=facts)


def write_report(folder: Path, along: list[Score], losses: dict[ScoredStage, Path], **facts: str) -> Path:
    return report(along, losses, **facts).write(folder / "report.html")


def write_log(path: Path, entries: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_scores_go_by_series_stage_and_step() -> None:
    scores = [Score("anchor", 50, 1), Score("anchor", 0, 2), Score("bm25", None, 3), Score("base", None, 4, "paper")]
    assert [score.value for score in in_order(scores)] == [3, 2, 1, 4]


def test_runs_on_tasks_of_ones_own_have_a_row_each() -> None:
    found = report(curves(), {})
    scores, along = found.tables
    names = ["Anchor (Stage I + II)", "Baseline (Stage II only)", "Control", "Base model", "BM25"]
    assert scores.header == ["Trained with", "Docs"] and [row[0] for row in scores.rows] == names
    assert [row[1] for row in scores.rows] == [46, 41, 50, 2, 61.94] and scores.marks_best
    assert along.header == ["Trained with", "Step", "Docs"] and along.rows[3] == ["Baseline (Stage II only)", "100", 20]
    assert "anchor - baseline: +5.00 over Docs, the one task both have, too few for an interval." in found.sentences
    assert not [one for one in found.sentences if "of 56 tasks" in one]


def test_a_mean_is_over_the_tasks_that_all_have() -> None:
    runs = [run_of("mine", A=10.0, B=20.0, C=60.0), run_of("theirs", A=20.0, B=40.0)]
    (table,) = build_report(runs, read_paper(), None, {}).tables
    assert table.header == ["Trained with", "A", "B", "C", "Mean of 2"]
    assert table.rows == [["mine", 10, 20, 60, 15], ["theirs", 20, 40, None, 30]]
    found = build_report([run_of("mine", A=10.0), run_of("theirs", B=20.0)], read_paper(), None, {})
    assert found.tables[0].rows == [["mine", 10, None], ["theirs", None, 20]] and not found.pictures
    assert found.sentences == ["mine and theirs have no task in common."]


def test_early_stage_draws_each_stage_by_step() -> None:
    (axes,) = early_stage_figure([*curves(), Score("bm25", None, 60.0)], WHAT).axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn) == ["Baseline (Stage II only)", "Control", "Anchor (Stage I + II)"]
    assert list(drawn["Control"].get_xdata()) == [0, 50, 100]
    assert list(drawn["Control"].get_ydata()) == pytest.approx([20, 25, 30])
    assert axes.get_ylabel() == "Docs nDCG@10 x 100" and axes.get_xlabel() == "Stage II optimiser step"


def test_early_stage_tells_series_apart() -> None:
    (axes,) = early_stage_figure([Score("anchor", 50, 40.0, "mine"), Score("anchor", 50, 10.0, "paper")], WHAT).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[40], [10]]
    assert [line.get_label() for line in axes.lines] == ["mine, Anchor (Stage I + II)", "paper, Anchor (Stage I + II)"]
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()


def test_by_stage_draws_the_last_of_each_stage_and_bm25() -> None:
    (axes,) = by_stage_figure([*finished(), Score("anchor", 300, 99.0)], WHAT).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([2, 41, 50, 46])
    colours = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert colours == [STAGE_COLOURS[stage] for stage in ("base", "baseline", "control", "anchor")]
    assert [text.get_text() for text in axes.texts] == ["2.0", "41.0", "50.0", "46.0"]
    assert [line.get_label() for line in axes.lines] == ["BM25: 61.9"]
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == ["Base model", "Baseline\n(Stage II only)", "Control", "Anchor\n(Stage I + II)"]


def test_by_stage_groups_series() -> None:
    (axes,) = by_stage_figure([*finished(), Score("anchor", None, 30.0, "paper")], WHAT).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["", "paper"]


def test_losses_are_smoothed_over_the_raw_log() -> None:
    stage_1 = [{"step": float(i), "loss_q2d": 5.0, "loss_d2q": 4.0} for i in range(10)]
    stage_2 = [{"step": float(i), "loss_contrastive": float(i % 2)} for i in range(100)]
    left, right = losses_figure({"stage_I": stage_1, "baseline": stage_2}).axes
    assert {line.get_label(): list(line.get_ydata()) for line in left.lines} == {
        "EBQ2D: query to document": [5.0] * 10,
        "EBD2Q: document to query": [4.0] * 10,
    }
    raw, smooth = right.lines
    assert list(raw.get_ydata())[:3] == [0, 1, 0]
    # five values each, fewer at the ends
    assert list(smooth.get_ydata())[:4] == pytest.approx([1 / 3, 1 / 2, 2 / 5, 3 / 5])
    assert list(smooth.get_ydata())[-1] == pytest.approx(2 / 3)
    assert "nats" in left.get_ylabel() and "nats" in right.get_ylabel()


def test_losses_with_nothing_logged_say_so() -> None:
    left, right = losses_figure({"anchor": [{"step": 1.0, "loss_contrastive": 2.0}]}).axes
    assert [text.get_text() for text in left.texts] == ["not logged"] and not right.texts


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "not valid JSON"),
        ("[1]", "a JSON object is needed"),
        ("3", "a JSON object is needed"),
        ('{"loss": 1}', "expected an object of numbers with the key step"),
        ('{"step": 1, "loss": null}', "expected an object of numbers"),
        ('{"step": "x"}', "expected an object of numbers"),
    ],
)
def test_bad_log_lines_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"log\.jsonl, line 2: {said}"):
        read_log(path)


def test_lines_of_skipped_steps_are_left_out(tmp_path: Path) -> None:
    """As `JsonLog.note_skipped` writes them."""
    skipped = {"step": 2, "skipped": "the loss is not finite", "rows": {"nq.jsonl": [3, 4]}}
    lines = [{"step": 1, "loss": 2}, skipped, {"step": 3, "loss": 1}]
    path = write_log(tmp_path / "log.jsonl", lines)  # type: ignore[arg-type]
    assert [entry["step"] for entry in read_log(path)] == [1, 3]


def test_a_log_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(PNG_START)
    with pytest.raises(UserError, match=r"log\.jsonl, line 1: not valid JSON"):
        read_log(tmp_path / "log.jsonl")


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be read \(No such file"):
        read_log(tmp_path / "log.jsonl")


def test_write_report(tmp_path: Path) -> None:
    losses: dict[ScoredStage, Path] = {
        "stage_I": write_log(tmp_path / "1", [{"step": 1, "loss_q2d": 8, "loss_d2q": 7}, {"step": 9, "loss_q2d": 3}]),
        "anchor": write_log(
            tmp_path / "2", [{"step": 5, "loss_contrastive": 1, "in_batch_accuracy": 0.5, "tokens_per_second": 1234.5}]
        ),
    }
    path = write_report(tmp_path / "a" / "b", curves(), losses, Control="plain <b>text</b> &", **{"<i>&": "x"})
    names = ["by_stage.png", "early_stage.png", "losses.png", "report.html"]
    assert sorted(file.name for file in path.parent.iterdir()) == [*names, "report.json", "report.md"]
    assert all((path.parent / name).read_bytes().startswith(PNG_START) for name in names[:3])
    page = path.read_text(encoding="utf-8")
    assert "<title>A &lt;title&gt;</title>" in page and "plain &lt;b&gt;text&lt;/b&gt; &amp;" in page
    assert "&lt;i&gt;&amp;" in page and "<i>" not in page and "<b>" not in page
    assert page.count(NOTE) == 1
    assert '<td class="number best">61.94</td>' in page and "control - baseline: +9.00" in page
    assert "8.00 to 3.00" in page and ">50.00<" in page and "1,234" in page
    assert "http" not in page  # nothing is loaded from elsewhere

    before = {name: (path.parent / name).read_bytes() for name in names}
    write_report(path.parent, curves(), losses, Control="plain <b>text</b> &", **{"<i>&": "x"})
    assert {name: (path.parent / name).read_bytes() for name in names} == before


class Outline(HTMLParser):
    """Refuses tags that do not close in order; counts tables, and those that a narrow screen can scroll."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.num_tables = self.num_scrolled = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.num_tables += 1
            self.num_scrolled += self.open[-1] == "scroll"
        if tag not in ("meta", "img"):
            self.open.append("scroll" if ("class", "scroll") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() in (tag, "scroll")


def test_the_page_is_whole_and_its_tables_scroll_on_a_phone(tmp_path: Path) -> None:
    page = Outline()
    page.feed(write_report(tmp_path, curves(), {}, Control="x").read_text(encoding="utf-8"))
    assert page.open == [] and page.num_tables == page.num_scrolled == 3
    assert 'name="viewport" content="width=device-width' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_write_report_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    path = write_report(tmp_path, [], {})
    names = ["by_stage.png", "report.html", "report.json", "report.md"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    page = path.read_text(encoding="utf-8")
    assert NOTE in page and page.count("<img") == 1


def test_report_uses_no_global_state_of_pyplot() -> None:
    code = "import llm2vec.reports.evaluation, sys; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
