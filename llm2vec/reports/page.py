"""A report's page: one HTML file that loads nothing from elsewhere, and its figures beside it as PNG files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llm2vec.files import whole, write_text
from llm2vec.reports.figures import Picture
from llm2vec.table import Table
from llm2vec.types import UserError

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # names in a report come from other people's results
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write_page(
    file: Path,
    title: str,
    blocks: Sequence[Table | Picture],
    *,
    note: str = "",
    sentences: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a page, its folder too if that is missing; returns `file`, which is written last. All text is escaped.

    Args:
        file: The page.
        title: Its heading.
        blocks: Tables, each with its title and note, and figures, in this order.
        note: A remark below the heading.
        sentences: What the page says first, a paragraph each.
        facts: Name -> text: how the numbers came about, at the end.

    Raises:
        UserError: The folder cannot be made.
    """
    make_folder(file.parent)
    images = {}
    for block in blocks:
        if isinstance(block, Picture):
            content = block.png()
            images[block.name] = base64.b64encode(content).decode()
            with whole(file.with_name(block.name)) as aside:
                aside.write_bytes(content)
    said = {"title": title, "note": note, "sentences": sentences, "facts": facts or {}}
    write_text(file, _TEMPLATES.get_template("page.html.jinja").render(blocks=blocks, images=images, **said))
    return file


def make_folder(folder: Path) -> None:
    """Make a folder that a report goes to, where it is missing.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({error.strerror}).") from error
