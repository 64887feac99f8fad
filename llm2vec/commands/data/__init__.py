"""Commands about training data; what they share of their command lines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm2vec import cli
from llm2vec.data.sources import Source, archive_hint, e5_sources, read_sources_file, select_sources
from llm2vec.types import UserError

if TYPE_CHECKING:
    from llm2vec.corpus.writers import Write, Writing


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Let a command line name a folder and sources in it; `chosen_sources` reads it."""
    parser.add_argument("folder", type=cli.path, metavar="DATA", help="where the sources' files lie")
    table = "table of sources; default: the released archive's; hub, nemotron: ready ones"
    parser.add_argument("--sources_file", type=cli.path, help=table)
    parser.add_argument("--sources", nargs="+", help="only these")


def chosen_sources(args: argparse.Namespace) -> list[Source]:
    """The sources that a command line names, whose files must be there, or all whose files are; of the others it is
    said. A `UserError` where a named one is missing, or `out` would be written over what is read."""
    table = e5_sources() if args.sources_file is None else read_sources_file(args.sources_file)
    sources = select_sources(table, args.sources)
    there = [source for source in sources if not source.missing(args.folder)]
    missing = list(dict.fromkeys(file for source in sources for file in source.missing(args.folder)))
    if missing and (args.sources or not there):
        names = ", ".join(missing)
        what = f"lacks {names}" if args.folder.is_dir() else f"is not a folder (wanted: {names})"
        raise UserError(f"{args.folder} {what}{archive_hint(sources)}.")
    if missing:
        cli.Printer(vars(args).get("json", False)).say(f"not there: {', '.join(missing)}")
    out: Path | None = vars(args).get("out")
    if out is not None:
        read = [args.folder, args.sources_file or args.folder, *(source.place(args.folder) for source in there)]
        written = [out, out / "sources.json", *(out / f"{source.name}.jsonl" for source in there)]
        if both := sorted({path.resolve() for path in read} & {path.resolve() for path in written}):
            raise UserError(f"OUT: {both[0]} is read here, and would be written over; name another folder.")
    return there


def parse_with_server(
    parser: argparse.ArgumentParser, writer: argparse._MutuallyExclusiveGroup, argv: Sequence[str]
) -> argparse.Namespace:
    """Arguments of a command whose texts a server may write: `--server`, one of `writer`'s flags, and its `--name`. A
    `UserError` where one of the two stands without the other, or another flag is wrong."""
    writer.add_argument("--server", metavar="URL", help="a server with OpenAI's interface, up to /v1; needs --name")
    parser.add_argument("--name", help="of the server's model")
    args = parser.parse_args(argv)
    if (args.server is None) != (args.name is None):
        parser.error("--server and --name go together")
    return args


def named_writer(args: argparse.Namespace) -> dict[str, str | None]:
    """Who writes, as `parse_with_server` read it, to be compared with who wrote before."""
    models = {flag: getattr(args, flag) for flag in ("model", "anchors") if hasattr(args, flag)}
    return {"server": args.server, "name": args.name, **{flag: one and one.place for flag, one in models.items()}}


def writer_of(args: argparse.Namespace, task: Writing) -> Write:
    """Who writes, opened: a server, a Stage I checkpoint (`--anchors`), or a causal language model."""
    from llm2vec.corpus import writers  # with torch: seconds

    if args.server is not None:
        return writers.write_by_server(args.server, args.name, task)
    if getattr(args, "anchors", None) is not None:
        return writers.write_by_anchors(args.anchors)
    return writers.write_by_model(args.model, task)
