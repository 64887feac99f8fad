"""A table of cells: as text for a terminal, as Markdown, as HTML. Knows nothing of what the cells mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

#: A word, a number, which is shown with two decimals, or None for what is missing, which is shown as a dash.
Cell: TypeAlias = str | float | None

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

    Attributes:
        header: the name of each column.
        rows: as many cells in each row as there are columns.
        title: heading of the table; `text`, `markdown` and `html` leave it to what stands around them.
        note: remark below the table; left out by them too.
        num_names: so many columns at the left hold words. The others hold numbers and stand to the right.
        marks_best: whether the highest number of each column is bold in HTML.

    Example:
        >>> print(Table(["Run", "Score"], [["anchor", 46.0], ["baseline", None]]).text())
        Run       Score
        ---------------
        anchor    46.00
        baseline      -
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    num_names: int = 1
    marks_best: bool = False

    def text(self) -> str:
        """Aligned plain text."""
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = ["  ".join(map(self._aligned, range(len(line)), line, widths)).rstrip() for line in lines]
        return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])

    def markdown(self, escape: Callable[[str], str] = escape_bars) -> str:
        """A Markdown table, its cells escaped."""
        header, *rows = ([escape(cell) for cell in line] for line in self._lines())
        rule = ["---" if i < self.num_names else "---:" for i in range(len(header))]
        return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])

    def html(self) -> str:
        """An HTML table, its cells escaped, with the classes that `reports/page.html.jinja` gives a style."""
        heads = (f"<th{self._classes(i)}>{escape(name)}</th>" for i, name in enumerate(self.header))
        lines = [f"<tr>{''.join(heads)}</tr>"]
        best = [self._best(i) for i in range(len(self.header))]
        for row in self.rows:
            cells = (
                f"<td{self._classes(i, cell, cell is not None and cell == best[i])}>{escape(shown(cell))}</td>"
                for i, cell in enumerate(row)
            )
            lines.append(f"<tr>{''.join(cells)}</tr>")
        return "\n".join(["<table>", *lines, "</table>"])

    def _lines(self) -> list[list[str]]:
        return [list(self.header), *([shown(cell) for cell in row] for row in self.rows)]

    def _aligned(self, column: int, cell: str, width: int) -> str:
        return cell.ljust(width) if column < self.num_names else cell.rjust(width)

    def _best(self, column: int) -> float | None:
        """The highest number of a column that holds more than one."""
        numbers = [cell for row in self.rows if isinstance(cell := row[column], float)]
        return max(numbers) if self.marks_best and len(numbers) > 1 else None

    def _classes(self, column: int, cell: Cell = None, is_best: bool = False) -> str:
        names = ["number"] * (column >= self.num_names) + ["best"] * is_best
        names += [word for word in _COLOURED if word == cell]
        return f' class="{" ".join(names)}"' if names else ""


def shown(cell: Cell) -> str:
    """A cell as text: a number with two decimals, a dash for what is missing."""
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:.2f}"
