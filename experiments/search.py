"""Search in your own texts with a trained model.

    python experiments/search.py index notes/ output/notes-index --model output/stage_II/...
    python experiments/search.py query output/notes-index "when do we meet" --top_k 5
    python experiments/search.py query output/notes-index < questions.txt      # a query a line
    python experiments/search.py demo "wait until a predicate becomes true"    # after `make quickstart`

`index` reads the .md, .py, .rst and .txt files below a folder, in passages of whole paragraphs, or a JSONL file of
objects with `text`, perhaps `title` and `id`. `query` loads the model that made the index and refuses any other; it
prints the cosine similarity, where a passage stands, and its first line. `demo` indexes the docstrings of the installed
packages with the quickstart's Anchor model and searches there: a tiny model, which has seen most of these in training.
"""

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from llm2vec.choice import ModelChoice, add_model_flags, chosen_model
from llm2vec.cli import user_errors_in_one_sentence
from llm2vec.corpus.rows import check_unicode
from llm2vec.corpus.text_index import Hit, TextIndex, build_index
from llm2vec.llm2vec import LLM2Vec
from llm2vec.probes.reconstruction import printable
from llm2vec.quickstart.docstrings import Settings, installed_roots, read_passages, source_files, without_duplicates
from llm2vec.types import UserError

DEMO_MODEL = Path("output/quickstart/anchor")
DEMO_TEXTS = Path("cache/docstrings/passages.jsonl")
DEMO_INDEX = Path("output/quickstart/docstring-index")
DEMO_SOURCES = Path("train_configs/quickstart/sources.json")

#: Characters of a passage's first line that are printed.
LINE_CHARACTERS = 100


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="make an index, or make it anew")
    index.add_argument("source", type=Path, help="folder of text files, or a .jsonl file")
    index.add_argument("index", type=Path, help="folder to write")
    add_model_flags(index, torch_dtype=True)
    index.add_argument("--batch_size", type=int, default=32, help="rows of 128 tokens a forward pass")
    query = commands.add_parser("query", help="search in an index")
    query.add_argument("index", type=Path)
    query.add_argument("text", nargs="?", help="default: a query a line from standard input")
    query.add_argument("--instruction", default="", help="put before the query, as in the model's training")
    add_model_flags(query, required=False)  # where the model lies now, if it was moved
    demo = commands.add_parser("demo", help="search in the docstrings of the installed packages")
    demo.add_argument("text", nargs="?", help="as for query")
    for command in (query, demo):
        command.add_argument("--top_k", type=int, default=10, help="passages a query (10)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot be, before anything loads."""
    for option in ("top_k", "batch_size"):
        if getattr(args, option, 1) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}; give a number above 0.")
    if getattr(args, "text", None) is not None:
        check_unicode(args.text, "TEXT")
        if not args.text.strip():
            raise UserError("The query is empty.")
    if args.command == "query" and args.peft and args.model is None:
        raise UserError("--peft is given without --model; give both, or neither.")


def make_index(args: argparse.Namespace) -> None:
    """The command `index`."""
    index = build_index(args.source, args.index, chosen_model(args), args.batch_size)
    print(f"{args.index}: {len(index):,} passages")


def query(args: argparse.Namespace) -> None:
    """The command `query`."""
    index = TextIndex(args.index)
    moved = (
        None if args.model is None else dataclasses.replace(chosen_model(args), torch_dtype=index.encoder.torch_dtype)
    )
    answer(index, index.load_model(moved), args.text, args.top_k, args.instruction)


def demo(args: argparse.Namespace) -> None:
    """The command `demo`: the index is made once for a model."""
    if not DEMO_MODEL.is_dir():
        raise UserError(f"There is no model {DEMO_MODEL}; run `make quickstart` first.")
    encoder = ModelChoice(str(DEMO_MODEL))
    if not is_made_by(encoder):
        write_docstrings()
        build_index(DEMO_TEXTS, DEMO_INDEX, encoder)
    index = TextIndex(DEMO_INDEX)
    instruction = json.loads(DEMO_SOURCES.read_text(encoding="utf-8"))["docstrings"]["instruction"]
    answer(index, index.load_model(), args.text, args.top_k, instruction)


def is_made_by(encoder: ModelChoice) -> bool:
    """Whether the demo's index is there, whole, and of this model."""
    try:
        return TextIndex(DEMO_INDEX).revision == encoder.revision()
    except UserError:
        return False


def write_docstrings() -> None:
    """The docstrings of the installed packages without their summaries, named by file and line."""
    print("reading the docstrings of the installed packages ...", file=sys.stderr)
    settings = Settings()
    passages = without_duplicates(read_passages(source_files(installed_roots()), settings)[0], settings)
    rows = [{"id": f"{passage.file}:{passage.line}", "text": passage.body} for passage in passages]
    DEMO_TEXTS.parent.mkdir(parents=True, exist_ok=True)
    DEMO_TEXTS.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def answer(index: TextIndex, model: LLM2Vec, text: str | None, top_k: int, instruction: str) -> None:
    """Print what is found for one query, or for each line of standard input: at once where somebody types."""
    if text is not None:
        return show(index.search(model, [text], top_k, instruction)[0])
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # which `check_unicode` names; in some locales Python does not
    lines = (check_unicode(line.strip(), f"standard input, line {i}") for i, line in enumerate(sys.stdin, start=1))
    rounds: Iterable[list[str]] = ([line] for line in lines) if sys.stdin.isatty() else [list(lines)]
    answered = 0
    for queries in rounds:
        asked = [line for line in queries if line]
        answered += len(asked)
        for line, hits in zip(asked, index.search(model, asked, top_k, instruction) if asked else [], strict=True):
            print(f"\n{printable(line)}")
            show(hits)
    if not answered:
        raise UserError("There is no query: none is given, and standard input is empty.")


def show(hits: Sequence[Hit]) -> None:
    """A line a passage, without the control characters that a terminal would obey."""
    width = max(len(hit.passage.where) for hit in hits)
    for score, passage in hits:
        first = (passage.title or passage.text).strip().partition("\n")[0]
        print(printable(f"{score:7.4f}  {passage.where:<{width}}  {first.expandtabs()[:LINE_CHARACTERS]}"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    check_args(args)
    {"index": make_index, "query": query, "demo": demo}[args.command](args)


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
