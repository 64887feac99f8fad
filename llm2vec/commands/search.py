"""Search in your own texts with a trained model.

    llm2vec search index notes/ output/notes-index --model output/stage_II/...
    llm2vec search query output/notes-index "when do we meet" --top_k 5
    llm2vec search query output/notes-index < questions.txt      # a query a line
    llm2vec search demo "wait until a predicate becomes true"    # after `make quickstart`

`index` reads the .md, .py, .rst and .txt files below a folder, in passages of whole paragraphs, or a JSONL file of
objects with `text`, perhaps `title` and `id`. `query` loads the model that made the index and refuses any other; it
prints the cosine similarity, where a passage stands, and its first line. `demo` searches the quickstart's held-out
docstrings with its Anchor model, which is tiny. In Python: `llm2vec.corpus.index.TextIndex`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llm2vec import cli
from llm2vec.choice import ModelChoice, add_model_flags, chosen_model
from llm2vec.files import check_unicode
from llm2vec.table import Cell, Table
from llm2vec.types import UserError

DEMO_MODEL, DEMO_INDEX = Path("output/quickstart/anchor"), Path("output/quickstart/docstring-index")
DEMO_TEXTS = Path("cache/docstrings/eval/DocstringRetrieval/corpus.jsonl")
DEMO_SOURCES = Path("train_configs/quickstart/sources.json")


def main(argv: Sequence[str]) -> None:
    """Index, or search."""
    args = _parse_args(argv)
    if args.command == "demo":
        args.index, args.model = _demo_index(), None
        args.instruction = json.loads(DEMO_SOURCES.read_text(encoding="utf-8"))["docstrings"]["instruction"]
    from llm2vec.corpus.index import TextIndex, build_index  # with torch: seconds

    if args.command == "index":
        print(f"{args.index}: {build_index(args.source, args.index, chosen_model(args), args.batch_size):,} passages")
        return
    out = cli.Printer(args.json)
    index = TextIndex(args.index)
    moved = None if args.model is None else replace(chosen_model(args), torch_dtype=index.model.torch_dtype)
    model = index.load_model(moved)
    for query in [args.text] if args.text is not None else _queries():
        (hits,) = index.search(model, [query], args.top_k, args.instruction)
        width = max(len(hit.where) for hit in hits)
        lines = [f"\n{query}"] if args.text is None else []
        for hit in hits:
            first = (hit.title or hit.text).strip().partition("\n")[0].expandtabs()[:100]
            lines.append(f"{hit.score:7.4f}  {hit.where:<{width}}  {first}")
        rows: list[list[Cell]] = [[hit.score, hit.where, hit.title or None, hit.text] for hit in hits]
        out.table(Table(["score", "where", "title", "text"], rows, query, num_names=4), cli.plain("\n".join(lines)))


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser("search", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="make an index, or make it anew")
    index.add_argument("source", type=cli.path, help="folder of text files, or a .jsonl file")
    index.add_argument("index", type=cli.path, help="folder to write")
    add_model_flags(index, torch_dtype=True)
    index.add_argument("--batch_size", type=cli.positive, default=32, help="rows of 128 tokens a forward pass (32)")
    query = commands.add_parser("query", help="search in an index")
    query.add_argument("index", type=cli.path)
    query.add_argument("--instruction", default="", help="put before the query, as in the model's training")
    add_model_flags(query, required=False)  # where it lies now, if it was moved
    for command in (query, commands.add_parser("demo", help="search in the quickstart's held-out docstrings")):
        command.add_argument("text", nargs="?", help="default: a query a line from standard input")
        cli.add_json_flag(command)
        command.add_argument("--top_k", type=cli.positive, default=10, help="passages a query (10)")
    args = parser.parse_args(argv)
    if getattr(args, "text", None) is not None and not check_unicode(args.text, "TEXT", "command line").strip():
        raise UserError("The query is empty.")
    if args.command == "query":
        check_unicode(args.instruction, "--instruction", "command line")
        if args.peft and args.model is None:
            raise UserError("--peft is given without --model; give both, or neither.")
    return args


def _queries() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # which `check_unicode` names; in some locales Python does not
    found = False
    for number, line in enumerate(sys.stdin, start=1):
        if query := check_unicode(line.strip(), "query", f"standard input, line {number}"):
            found = True
            yield query
    if not found:
        raise UserError("There is no query: none is given, and standard input is empty.")


def _demo_index() -> Path:
    """The quickstart's held-out docstrings by its model, indexed once for a model."""
    if not DEMO_MODEL.is_dir():
        raise UserError(f"There is no model {DEMO_MODEL}; run `make quickstart` first.")
    from llm2vec.corpus.index import TextIndex, build_index  # with torch: seconds

    choice = ModelChoice(str(DEMO_MODEL))
    with suppress(UserError):  # not there yet, or cut short
        if TextIndex(DEMO_INDEX).revision == choice.revision():
            return DEMO_INDEX
    build_index(DEMO_TEXTS, DEMO_INDEX, choice)
    return DEMO_INDEX
