"""The embedding space in the reports: what is read, drawn and listed, and what names from data do to a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import StepPatch

from llm2vec.reports.comparisons import EvaluatedRun
from llm2vec.reports.evaluation import build_report
from llm2vec.reports.figures import STAGE_COLOURS, paths_figure, similarities_figure, space_pictures
from llm2vec.reports.logs import Shapes, read_shapes, read_spaces, space_table
from llm2vec.reports.paper import read_paper
from llm2vec.reports.results import Results, read_results
from llm2vec.reports.scores import ScoredStage
from llm2vec.training.log import drop_entries_after
from llm2vec.types import UserError
from tests.reports.test_results import write_results

EVIL = "<script>alert('$x$')</script>"
ROOT = Path(__file__).parents[2]
PNG_START = b"\x89PNG\r\n\x1a\n"


def histograms(shift: int = 0) -> dict[str, list[int]]:
    """100 bins of which a few hold pairs."""

    def counts(**places: int) -> list[int]:
        return [places.get(f"b{i}", 0) for i in range(100)]

    return {
        "positive": counts(**{f"b{80 + shift}": 3, f"b{81 + shift}": 1}),
        "hard_negative": counts(b70=2, b72=2),
        "random": counts(b50=10, b60=30),
    }


def evaluation(step: int, sources: Sequence[str] = ()) -> dict[str, float]:
    """A line of a log; figures of different steps and sources differ."""
    entry: dict[str, float] = {"step": step, "eval_loss": 1.0}
    for number, suffix in enumerate(["", *(f"/{source}" for source in sources)]):
        entry |= {
            f"eval_alignment{suffix}": 1 - step / 1000 + number / 10,
            f"eval_uniformity_document{suffix}": -1 - step / 100,
            f"eval_effective_rank{suffix}": 10 + step / 10,
            f"eval_cosine_positive{suffix}": 0.5 - step / 2000 - number * 0.03,
            f"eval_recall_at_1{suffix}": 0.25,
        }
    return entry


def write_run(folder: Path, sources: Sequence[str] = (), steps: Sequence[int] = (0, 20, 40)) -> Path:
    """A run's log with diagnostics beside it; returns the log."""
    folder.mkdir(parents=True)
    log = [{"step": 5, "loss": 2.0}, *(evaluation(step, sources) for step in steps)]
    lines = [
        {"step": step, "all": histograms(step // 10), "sources": {source: histograms() for source in sources}}
        for step in steps
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "log.jsonl"


def write_report(folder: Path, losses: dict[ScoredStage, Path]) -> Path:
    run = EvaluatedRun("anchor", Results("anchor", "r", folder, {"Docs": 40.0}, {}, {}, ("2",)))
    return build_report([run], read_paper(), None, dict(losses)).write(folder / "report.html")


def stairs(axes: Axes) -> dict[str, np.ndarray[Any, Any]]:
    """What a panel draws of each kind of pairs."""
    patches = [
        patch for patch in axes.patches if isinstance(patch, StepPatch) and not patch.get_label().startswith("_")
    ]
    return {patch.get_label(): np.asarray(patch.get_data().values) for patch in patches}


def test_runs_without_diagnostics_are_left_out(tmp_path: Path) -> None:
    measured = write_run(tmp_path / "anchor")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "eval_loss": 2}\n', encoding="utf-8")
    spaces = read_spaces({"baseline": tmp_path / "log.jsonl", "anchor": measured})
    assert list(spaces) == ["anchor"]
    assert [entry["step"] for entry in spaces["anchor"].log] == [0, 20, 40]
    assert [one.step for one in spaces["anchor"].shapes] == [0, 20, 40]
    assert space_pictures({}) == []


def test_histograms_of_other_runs_and_repeated_steps_are_not_drawn(tmp_path: Path) -> None:
    """A file may hold a step twice, where a run was resumed, or steps that the log does not know."""
    log = write_run(tmp_path / "anchor", steps=(0, 20))
    with (tmp_path / "anchor" / "diagnostics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 20, "all": histograms(5), "sources": {}}) + "\n")
        file.write(json.dumps({"step": 30, "all": histograms(), "sources": {}}) + "\n")
    (space,) = read_spaces({"anchor": log}).values()
    assert space.shapes == [Shapes(0, histograms(), {}), Shapes(20, histograms(5), {})]


def test_a_log_without_histograms_still_has_its_path(tmp_path: Path) -> None:
    log = write_run(tmp_path / "anchor")
    log.with_name("diagnostics.jsonl").unlink()
    spaces = read_spaces({"anchor": log})
    ((name, _, caption),) = space_pictures(spaces)
    assert name == "embedding_space.png" and "held out of the training files. Hollow" in caption


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json", "not valid JSON"),
        ("[]", "a JSON object is needed"),
        ('{"step": 1}', r"all is missing"),
        ('{"step": 1, "all": [], "sources": 3}', r"all is \[\]; an object is needed"),
        ('{"step": null, "all": {}, "sources": {}}', r"step is None; a whole number is needed"),
        (
            '{"step": 1, "all": {"positive": ["x"]}, "sources": {}}',
            r"all\.positive\[0\] is 'x'; a whole number is needed",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, said: str) -> None:
    log = write_run(tmp_path / "anchor")
    file = log.with_name("diagnostics.jsonl")
    file.write_text(f"{json.dumps({'step': 0, 'all': {}, 'sources': {}})}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"diagnostics\.jsonl, line 2: {said}") as error:
        read_spaces({"anchor": log})
    assert "\n" not in str(error.value)


def test_diagnostics_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_shapes(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"bytes\.jsonl, line 1: not valid JSON"):
        read_shapes(tmp_path / "bytes.jsonl")


def test_a_run_goes_on_behind_a_line_that_lacks_its_end(tmp_path: Path) -> None:
    """A process can be killed between a line's last brace and its end; the next line must not stand on the same."""
    file = tmp_path / "diagnostics.jsonl"
    lines = [json.dumps({"step": step, "all": {"random": [1, 0]}, "sources": {}}) for step in (5, 10, 15)]
    file.write_text(f"{lines[0]}\n{lines[1]}")
    drop_entries_after(file, 10)
    with file.open("a") as out:
        out.write(f"{lines[2]}\n")
    assert [one.step for one in read_shapes(file)] == [5, 10, 15]
    drop_entries_after(file, 5)
    assert [one.step for one in read_shapes(file)] == [5]


def test_paths_begin_hollow_and_end_filled(tmp_path: Path) -> None:
    spaces = read_spaces({stage: write_run(tmp_path / stage) for stage in ("stage_I", "baseline", "anchor")})
    path, rank_I, rank_II = paths_figure(spaces).axes
    drawn = {line.get_label(): line for line in path.lines}
    line = drawn["Anchor (Stage I + II)"]
    assert list(line.get_xdata()) == pytest.approx([-1, -1.2, -1.4])
    assert list(line.get_ydata()) == pytest.approx([1, 0.98, 0.96])
    assert to_hex(line.get_color()) == STAGE_COLOURS["anchor"].lower()
    first, last = path.lines[-2:]
    assert list(first.get_xdata()) == [-1] and to_hex(first.get_markerfacecolor()) == "#ffffff"
    assert list(last.get_xdata()) == [-1.4] and to_hex(last.get_markerfacecolor()) == STAGE_COLOURS["anchor"].lower()
    assert rank_I.lines[0].get_label() == "Stage I only" and len(rank_I.lines) == 3
    assert len(rank_II.lines) == 6 and list(rank_II.lines[0].get_ydata()) == pytest.approx([10, 12, 14])
    assert (rank_I.get_xlabel(), rank_II.get_xlabel()) == ("Stage I optimiser step", "Stage II optimiser step")


def test_histograms_are_shares_of_their_own_pairs(tmp_path: Path) -> None:
    figure = similarities_figure({"one": [(0, histograms()), (40, histograms(4))], "two $x$": [(0, {})]})
    first, last, empty, unused = figure.axes
    assert [axes.get_title("left") for axes in (first, last, empty)] == [
        *("one, step 0", "one, step 40", "two $x$, step 0"),
    ]
    assert not unused.get_visible()
    shares = stairs(last)
    assert {label: values.sum() for label, values in shares.items()} == pytest.approx(
        {"positives": 100, "hard negatives": 100, "other rows' documents": 100}
    )
    assert shares["positives"][84] == 75 and shares["other rows' documents"][60] == 75
    # bin 84 lies from 0.68 to 0.70, bin 85 above it
    means = sorted(line.get_xdata()[0] for line in last.lines)
    assert means[-1] == pytest.approx(0.75 * 0.69 + 0.25 * 0.71)
    assert first.get_xlim() == pytest.approx((-0.02, 0.74))  # bins 50 to 85 of 100, a little wider
    assert not stairs(empty)
    assert [text.get_text() for text in figure.legends[0].texts] == [
        *("other rows' documents", "hard negatives", "positives"),
    ]


def test_each_run_with_several_sources_has_a_figure_of_them(tmp_path: Path) -> None:
    runs = {"anchor": write_run(tmp_path / "anchor", ("a", EVIL)), "baseline": write_run(tmp_path / "baseline")}
    figures = {picture.name: picture for picture in space_pictures(read_spaces(runs))}  # type: ignore[arg-type]
    assert list(figures) == ["embedding_space.png", "similarities.png", "similarities_anchor.png"]
    _, figure, caption = figures["similarities_anchor.png"]
    assert [axes.get_title("left") for axes in figure.axes] == [
        f"{source}, step {step}" for source in ("a", EVIL) for step in (0, 40)
    ]
    assert caption.startswith("Anchor (Stage I + II), by source;")
    assert "held out of the training files (4 rows). Hollow" in figures["embedding_space.png"].caption


def test_the_table_has_both_ends_of_all_and_the_last_of_each_source(tmp_path: Path) -> None:
    runs: dict[ScoredStage, Path] = {"anchor": write_run(tmp_path / "anchor", ("a", "b"))}
    table = space_table(read_spaces(runs), "Embedding space")
    rows = table.rows
    assert table.header == [
        *("Trained with", "Source", "Step", "Uniformity", "Effective rank", "Cosine of positives", "Recall@1"),
    ]
    assert [row[1:3] for row in rows] == [["all", "0"], ["all", "40"], ["a", "40"], ["b", "40"]]
    assert rows[0][3:] == pytest.approx([-1, 10, 0.5, 25]) and rows[3][3:] == pytest.approx([-1.4, 14, 0.42, 25])


def test_the_page_escapes_what_comes_from_data(tmp_path: Path) -> None:
    runs: dict[ScoredStage, Path] = {"anchor": write_run(tmp_path / "anchor", ("a", EVIL))}
    page = write_report(tmp_path / "out", runs)
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;alert(&#x27;$x$&#x27;)&lt;/script&gt;" in html
    assert "<h2>Embedding space along training</h2>" in html and html.count("<img") == 4
    names = ["embedding_space.png", "similarities.png", "similarities_anchor.png"]
    assert all((page.parent / name).read_bytes().startswith(PNG_START) for name in names)


def test_the_evaluation_report_shows_it_too(tmp_path: Path) -> None:
    """From the logs that `--losses` names, as page, Markdown and for the terminal."""
    log = write_run(tmp_path / "anchor", ("a", EVIL))
    runs = [EvaluatedRun("mine", read_results(write_results(tmp_path / "results", {"NFCorpus": 30.0})))]
    report = build_report(runs, read_paper(), None, {"anchor": log})
    assert "Embedding space along training" in report.markdown()
    html = report.write(tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html and html.count("<img") == 4
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert markdown.count("<") == markdown.count("\\<") and r"\<script\>" in markdown
    assert (tmp_path / "out" / "similarities_anchor.png").is_file()


def test_a_page_without_diagnostics_says_nothing_of_them(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss_contrastive": 2}\n', encoding="utf-8")
    page = write_report(tmp_path / "out", {"anchor": tmp_path / "log.jsonl"})
    assert "Embedding space" not in page.read_text(encoding="utf-8")
    assert not list(page.parent.glob("similarities*"))


def test_lines_of_a_file_are_read_in_order(tmp_path: Path) -> None:
    file = write_run(tmp_path / "anchor", ("a",)).with_name("diagnostics.jsonl")
    shapes = read_shapes(file)
    assert [one.step for one in shapes] == [0, 20, 40] and shapes[1].sources == {"a": histograms()}
