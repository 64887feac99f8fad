"""A table of cells: as text for a terminal, as Markdown, as HTML. Knows nothing of what the cells mean."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

#: A word, a number, which is shown with two decimals, or None for what is missing, which is shown as a dash.
Cell: TypeAlias = str | float | None

#: A count that a table shows with commas.
_COUNT = re.compile(r"-?\d{1,3}(,?\d{3})*")

#: Cells of these words have a colour of their own on a page.
_COLOURED = ("within", "near", "off")


def escape_bars(text: str) -> str:
    """Text that may hold Markdown of ours: only what would end a cell is escaped."""
    return text.replace("|", r"\|")


def escape_markdown(text: str) -> str:
    """Text from data in Markdown: no character of it starts a cell, a link or a tag."""
    return "".join(f"\\{character}" if character in "\\|<>[]*_`" else character for character in text)


@dataclass(frozen=True)
class Table:
    """Cells in rows, under a header.

    Example:
        >>> print(Table(["Run", "Score"], [["anchor", 46.0], ["baseline", None]]).text())
        Run       Score
        ---------------
        anchor    46.00
        baseline      -
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    #: Heading, and a remark below; `text`, `markdown` and `html` leave them to what stands around them.
    title: str = ""
    note: str = ""
    #: So many columns at the left hold words. The others hold numbers and stand to the right.
    num_names: int = 1
    #: Whether the highest number of each column is bold in HTML.
    marks_best: bool = False

    def text(self) -> str:
        """Aligned plain text."""
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [f"<{width}" if i < self.num_names else f">{width}" for i, width in enumerate(widths)]
        texts = ["  ".join(map(format, line, aligned)).rstrip() for line in lines]
        return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])

    def markdown(self, escape: Callable[[str], str] = escape_bars) -> str:
        """A Markdown table, its cells escaped."""
        header, *rows = ([escape(cell) for cell in line] for line in self._lines())
        rule = ["---" if i < self.num_names else "---:" for i in range(len(header))]
        return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])

    def record(self) -> dict[str, Any]:
        """For programs: title, note, and an object a row, column to cell.

        A missing cell is None. What stands in a column of numbers and is one, such as `1,024` or `0.0100`, is a number.
        """
        rows = [dict(zip(self.header, row, strict=True)) for row in self.rows]
        for row in rows:
            row |= {name: number_of(row[name]) for name in self.header[self.num_names :]}
        return {"title": self.title, "rows": rows, "note": self.note}

    def html(self) -> str:
        """An HTML table, its cells escaped, with the classes that `reports/page.html.jinja` gives a style."""
        lines = [[f"<th{self._classes(i)}>{escape(name)}</th>" for i, name in enumerate(self.header)]]
        lines += [[f"<td{self._classes(i, c)}>{escape(shown(c))}</td>" for i, c in enumerate(row)] for row in self.rows]
        return "\n".join(["<table>", *(f"<tr>{''.join(line)}</tr>" for line in lines), "</table>"])

    def _lines(self) -> list[list[str]]:
        return [list(self.header), *([shown(cell) for cell in row] for row in self.rows)]

    def _classes(self, column: int, cell: Cell = None) -> str:
        names = ["number"] * (column >= self.num_names) + [word for word in _COLOURED if word == cell]
        if self.marks_best and isinstance(cell, float):
            numbers = [other for row in self.rows if isinstance(other := row[column], float)]
            names += ["best"] * (len(numbers) > 1 and cell == max(numbers))
        return f' class="{" ".join(names)}"' if names else ""


def shown(cell: Cell) -> str:
    """A cell as text: a number with two decimals, a dash for what is missing."""
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:.2f}"


def number_of(cell: Cell) -> Cell:
    """A cell as a number where it is one, however it is written."""
    if not isinstance(cell, str):
        return cell
    if _COUNT.fullmatch(cell):
        return int(cell.replace(",", ""))
    with suppress(ValueError):
        if math.isfinite(number := float(cell)):
            return number
    return None if cell == "-" else cell
