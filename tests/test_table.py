"""A table in its three forms."""

from __future__ import annotations

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
