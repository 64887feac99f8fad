"""A report in the forms it is shown in: as Markdown, and as one HTML file that loads nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llm2vec.files import whole, write_json, write_text
from llm2vec.reports.figures import Picture
from llm2vec.table import Table, escape_markdown
from llm2vec.types import in_one_sentence

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # names in a report come from other people's results
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Page:
    """What a report shows, in this order: a remark, sentences, tables and figures, and how it came about.

    Example:
        >>> Page("Scores", [table], facts={"Seed": "42"}).write(Path("output/report.html"))
    """

    title: str
    blocks: list[Table | Picture]
    note: str = ""
    sentences: list[str] = field(default_factory=list)
    facts: Mapping[str, str] = field(default_factory=dict)  #: name -> text: how the numbers came about
    data: dict[str, Any] | None = None  #: the same for programs

    @property
    def tables(self) -> list[Table]:
        """The tables alone."""
        return [block for block in self.blocks if isinstance(block, Table)]

    @property
    def pictures(self) -> list[Picture]:
        """The figures alone."""
        return [block for block in self.blocks if isinstance(block, Picture)]

    def markdown(self) -> str:
        """As Markdown; figures are linked."""
        blocks = [f"# {self.title}", *map(escape_markdown, self.sentences)]
        for table in self.tables:
            blocks += [f"## {table.title}", table.markdown(escape_markdown), escape_markdown(table.note)]
        for name, _, caption in self.pictures:
            said = escape_markdown(caption)
            blocks.append(f"![{said}]({name})\n\n{said}")
        facts = (f"- {escape_markdown(name)}: {escape_markdown(text)}" for name, text in self.facts.items())
        return "\n\n".join([*blocks, "## How it was made", "\n".join(facts)]) + "\n"

    def write(self, file: Path) -> Path:
        """Write the HTML, and beside it the figures as PNG files and, where there are `data`, .md and .json.

        `file` has the figures inside, is written last, and is returned. All text is escaped.
        """
        with in_one_sentence(lambda why: f"The folder {file.parent} cannot be made ({why}).", OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
        if self.data is not None:
            write_text(file.with_suffix(".md"), self.markdown())
            write_json(file.with_suffix(".json"), self.data)
        images = {}
        for picture in self.pictures:
            content = picture.png()
            images[picture.name] = base64.b64encode(content).decode()
            with whole(file.with_name(picture.name)) as aside:
                aside.write_bytes(content)
        write_text(file, _TEMPLATES.get_template("page.html.jinja").render(page=self, images=images))
        return file
