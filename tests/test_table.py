"""A table in its three forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import write_jsonl

from llm2vec.__main__ import main
from llm2vec.cli import Printer
from llm2vec.table import Table, escape_markdown


def test_text_is_aligned_and_numbers_have_two_decimals() -> None:
    table = Table(["Run", "Score"], [["anchor", 46.0], ["x", None], ["y", "1/2"]])
    assert table.text().splitlines() == [
        "Run     Score",
        "-------------",
        "anchor  46.00",
        "x           -",
        "y         1/2",
    ]
    assert Table(["A", "B", "C"], [["x", "y", 1.0]], num_names=2).text().splitlines()[-1] == "x  y  1.00"


def test_markdown_keeps_cells_apart() -> None:
    assert Table(["A", "B"], [["x|y", 1.0]]).markdown() == "| A | B |\n| --- | ---: |\n| x\\|y | 1.00 |"
    words = Table(["*A*", "B"], [["`x`", "<b>"]], num_names=2)
    assert words.markdown() == "| *A* | B |\n| --- | --- |\n| `x` | <b> |"
    assert words.markdown(escape_markdown).splitlines()[::2] == [r"| \*A\* | B |", r"| \`x\` | \<b\> |"]


def test_html_marks_the_best_and_escapes() -> None:
    table = Table(["<Run>", "A", "B"], [["a&b", 1.0, 3.0], ["within", 2.0, "-"]], marks_best=True)
    assert table.html().splitlines() == [
        "<table>",
        '<tr><th>&lt;Run&gt;</th><th class="number">A</th><th class="number">B</th></tr>',
        '<tr><td>a&amp;b</td><td class="number">1.00</td><td class="number">3.00</td></tr>',
        '<tr><td class="within">within</td><td class="number best">2.00</td><td class="number">-</td></tr>',
        "</table>",
    ], "the only number of a column is not marked"


def test_a_table_without_rows_has_a_header() -> None:
    assert Table(["A", "B"], []).text() == "A  B\n----"


def test_a_record_has_numbers_as_numbers() -> None:
    rows = [["a", "1,024", "0.0100", 46.123, "3 (10.0%)", "-", None], ["1,000", "-7", "nan", None, "ok", "12", 1.0]]
    table = Table(["name", "n", "p", "score", "mined", "gap", "none"], rows, "T", "why")
    first = {"name": "a", "n": 1024, "p": 0.01, "score": 46.123, "mined": "3 (10.0%)", "gap": None, "none": None}
    second = {"name": "1,000", "n": -7, "p": "nan", "score": None, "mined": "ok", "gap": 12, "none": 1.0}
    assert table.record() == {"title": "T", "rows": [first, second], "note": "why"}


def test_a_command_prints_its_tables_alone_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(["Run", "Score"], [["anchor", 46.0]])
    out = Printer(as_json=False)
    out.say("first", "second")
    out.table(table)
    out.table(table, text="as said")
    assert capsys.readouterr() == (f"first\nsecond\n{table.text()}\nas said\n", "")
    out = Printer(as_json=True)
    out.say("first", "second")
    out.table(table, text="as said")
    printed, said = capsys.readouterr()
    assert said == "first\nsecond\n" and json.loads(printed) == table.record() and printed.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["check-data", "compare", "eval", "hold-out", "mine", "report", "search query", "search demo", "verify"]
)
def test_commands_of_tables_take_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = command.split()
    with pytest.raises(SystemExit, match="0"):
        main([name, *rest, "--help"])
    assert "--json" in capsys.readouterr().out


def test_a_table_is_json_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check-data` on two rows: standard output is the table alone."""
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": "n"} for i in range(2)]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    (tmp_path / "sources.json").write_text('{"mine": {"file": "mine.jsonl", "instruction": "Find it"}}')
    main(["check-data", str(tmp_path), "--sources_file", str(tmp_path / "sources.json"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(row["source"], row["rows"]) for row in found["rows"]] == [("mine", 2), ("all", 2)]
