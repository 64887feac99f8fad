"""The report: what the tables hold, what the figures draw, what the page escapes. The drawn values are read back."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from llm2vec.reports.figures import STAGE_COLOURS, by_stage_figure, early_stage_figure, losses_figure
from llm2vec.reports.logs import read_log
from llm2vec.reports.scores import Score, ScoredStage, common_columns, run_means, score_table, verdicts
from llm2vec.reports.training import TrainingReport
from llm2vec.types import UserError

REPORT = TrainingReport("A <title>", (1, 2), {"training pairs": 30506}, {"Control": "plain <b>text</b> & more"})
PNG_START = b"\x89PNG\r\n\x1a\n"


def score(stage: ScoredStage, value: float, step: int | None = None, seed: int | None = None, **names: str) -> Score:
    columns = {"model": "tiny", "task": "Docs", "metric": "ndcg_at_10"} | names
    return Score(columns["model"], stage, step, columns["task"], columns["metric"], value, seed)


def finished() -> list[Score]:
    return [
        score("anchor", 0.45, 600, seed=1),
        score("anchor", 0.47, 600, seed=2),
        score("baseline", 0.40, 600, seed=1),
        score("baseline", 0.42, 600, seed=2),
        score("control", 0.50, 600, seed=1),
        score("base", 0.02),
        score("bm25", 0.6194, model="BM25"),
    ]


def curves() -> list[Score]:
    stages: list[ScoredStage] = ["anchor", "baseline", "control"]
    return [score(stage, i / 10 + step / 1000, step, seed=1) for i, stage in enumerate(stages) for step in (100, 0, 50)]


def write_log(path: Path, entries: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_score_refuses_percentages_nan_and_unknown_stages() -> None:
    with pytest.raises(UserError, match=r"is 45\.0: give a fraction"):
        score("anchor", 45.0)
    with pytest.raises(UserError, match="is nan"):
        score("anchor", float("nan"))
    with pytest.raises(UserError, match="stage is 'Anchor': choose one of bm25, base, stage_I"):
        score("Anchor", 0.4)  # type: ignore[arg-type]


def test_means_are_over_the_tasks_all_have_and_keep_seeds_apart() -> None:
    scores = [
        score("anchor", 0.4, seed=1),
        score("anchor", 0.8, seed=1, task="STS", metric="cosine_spearman"),
        score("anchor", 0.5, seed=2),
        score("anchor", 0.7, seed=2, task="STS", metric="cosine_spearman"),
        score("anchor", 0.9, seed=2, task="Extra"),
        score("baseline", 0.2),
        score("baseline", 0.4, task="STS", metric="cosine_spearman"),
    ]
    assert common_columns(scores) == [("Docs", "ndcg_at_10"), ("STS", "cosine_spearman")]
    means = run_means(scores)
    assert list(means) == [("tiny", "baseline", None), ("tiny", "anchor", None)]
    assert means["tiny", "anchor", None] == pytest.approx([60, 60])
    assert means["tiny", "baseline", None] == pytest.approx([30])
    table = score_table(scores)
    rows = table.rows
    assert table.header[3:] == [
        *["Docs nDCG@10", "STS Spearman", "Extra nDCG@10", "Mean of 2", "Seeds", "Lowest", "Highest"],
    ]
    assert rows[0] == ["tiny", "Baseline (Stage II only)", "", *map(pytest.approx, (20.0, 40.0)), None, 30, "1", 30, 30]
    assert rows[1][3:] == [*map(pytest.approx, (45.0, 75.0, 90.0, 60.0)), "2", pytest.approx(60), pytest.approx(60)]


def test_checkpoints_without_a_common_task_are_refused() -> None:
    with pytest.raises(UserError, match="no task that all"):
        run_means([score("anchor", 0.4), score("baseline", 0.4, task="STS")])
    with pytest.raises(UserError, match="no task that all"):
        score_table([])


def test_the_table_for_a_terminal_is_aligned_and_times_100() -> None:
    lines = score_table(finished()).text().splitlines()
    assert lines[0].split()[:3] == ["Model", "Trained", "with"] and set(lines[1]) == {"-"}
    assert [line.split("  ")[0].strip() for line in lines[2:]] == ["tiny", "tiny", "tiny", "tiny", "BM25"]
    assert lines[-2].split()[-4:] == ["46.00", "2", "45.00", "47.00"]
    assert lines[-1].split()[-4:] == ["61.94", "1", "61.94", "61.94"]
    assert len({len(line) for line in lines}) == 1


def test_verdicts_say_it_whoever_is_ahead() -> None:
    assert verdicts(finished()) == [
        "tiny: Anchor 46.00, baseline 41.00: Anchor is ahead by 5.00 (2 and 2 runs).",
        "tiny: Anchor 46.00, control 50.00: Anchor is behind by 4.00 (2 and 1 runs).",
    ]
    single = [score("anchor", 0.4), score("baseline", 0.4)]
    assert verdicts(single) == ["tiny: Anchor 40.00, baseline 40.00: Anchor is level (one run each, so no spread)."]
    assert verdicts([score("anchor", 0.4)]) == []


def test_early_stage_draws_each_stage_by_step() -> None:
    (axes,) = early_stage_figure([*curves(), score("bm25", 0.6)]).axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn) == ["Baseline (Stage II only)", "Control", "Anchor (Stage I + II)"]
    assert list(drawn["Control"].get_xdata()) == [0, 50, 100]
    assert list(drawn["Control"].get_ydata()) == pytest.approx([20, 25, 30])
    assert axes.get_ylabel() == "Docs, nDCG@10 x 100" and axes.get_xlabel() == "Stage II optimiser step"


def test_early_stage_is_named_by_what_it_draws() -> None:
    """A score that belongs to no step is not drawn, whatever tasks it is of."""
    (axes,) = early_stage_figure([*curves(), score("bm25", 0.6, task="Other")]).axes
    assert axes.get_ylabel() == "Docs, nDCG@10 x 100"


def test_early_stage_band_spans_the_seeds_and_models_are_told_apart() -> None:
    scores = [score("anchor", value, 50, seed) for seed, value in ((1, 0.3), (2, 0.5))]
    (axes,) = early_stage_figure([*scores, score("anchor", 0.1, 50, 1, model="other")]).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([40]), pytest.approx([10])]
    assert axes.collections[0].get_datalim(axes.transData).height == pytest.approx(20)
    assert [line.get_label() for line in axes.lines] == ["tiny, Anchor (Stage I + II)", "other, Anchor (Stage I + II)"]
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()


def test_by_stage_draws_bars_seeds_and_bm25() -> None:
    (axes,) = by_stage_figure([*finished(), score("anchor", 0.99, 300, seed=1)]).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([2, 41, 50, 46])
    colours = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert colours == [STAGE_COLOURS[stage] for stage in ("base", "baseline", "control", "anchor")]
    assert [text.get_text() for text in axes.texts] == ["2.0", "41.0", "50.0", "46.0"]
    dots = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [pytest.approx([40, 42]), pytest.approx([45, 47])]
    assert [line.get_label() for line in axes.lines if line.get_linestyle() == "--"] == ["BM25: 61.9"]
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == ["Base model", "Baseline\n(Stage II only)", "Control", "Anchor\n(Stage I + II)"]


def test_by_stage_groups_models() -> None:
    (axes,) = by_stage_figure([*finished(), score("anchor", 0.3, model="other")]).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["tiny", "other"]


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
    scores = [*finished(), score("anchor", 0.1, model="<i>&")]
    path = REPORT.write(tmp_path / "a" / "b", scores, curves(), losses)
    names = ["by_stage.png", "early_stage.png", "losses.png", "report.html"]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    assert all((path.parent / name).read_bytes().startswith(PNG_START) for name in names[:3])
    page = path.read_text(encoding="utf-8")
    assert "<title>A &lt;title&gt;</title>" in page and "plain &lt;b&gt;text&lt;/b&gt; &amp; more" in page
    assert "&lt;i&gt;&amp;" in page and "<i>" not in page and "<b>" not in page
    assert page.count("Seeds 1, 2; 30,506 training pairs.</figcaption>") == 3
    assert '<td class="number best">61.94</td>' in page and "Anchor is behind by 4.00" in page
    assert "8.00 to 3.00" in page and ">50.00<" in page and "1,234" in page
    assert "http" not in page  # nothing is loaded from elsewhere

    before = {name: (path.parent / name).read_bytes() for name in names}
    REPORT.write(path.parent, scores, curves(), losses)
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
    page.feed(REPORT.write(tmp_path, finished(), curves(), {}).read_text(encoding="utf-8"))
    assert page.open == [] and page.num_tables == page.num_scrolled == 3
    assert 'name="viewport" content="width=device-width' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_write_report_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    path = TrainingReport("Title", (7,), {}).write(tmp_path, finished(), [], {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["by_stage.png", "report.html"]
    page = path.read_text(encoding="utf-8")
    assert "Seed 7." in page and "How it was made" not in page and page.count("<img") == 1


def test_report_uses_no_global_state_of_pyplot() -> None:
    code = "import llm2vec.reports.training, sys; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
