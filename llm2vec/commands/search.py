"""Search in your own texts with a trained model.

    llm2vec search index notes/ output/notes-index --model output/stage_II/...
    llm2vec search query output/notes-index "when do we meet" --top_k 5
    llm2vec search query output/notes-index < questions.txt      # a query a line
    llm2vec search demo "wait until a predicate becomes true"    # after `make quickstart`

`index` reads the .md, .py, .rst and .txt files below a folder, in passages of whole paragraphs, or a JSONL file of
objects with `text`, perhaps `title` and `id`. `query` loads the model that made the index and refuses any other; it
prints the cosine similarity, where a passage stands, and its first line. `demo` searches the quickstart's held-out
docstrings with its Anchor model, which is tiny.

An index is two files: `texts.jsonl`, and `vectors.safetensors`, whose header names the model and the texts' sum.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from llm2vec import cli
from llm2vec.choice import ModelChoice, add_model_flags, chosen_model
from llm2vec.corpus.passages import PASSAGE_CHARACTERS, SUFFIXES, passages_of
from llm2vec.files import alone_in, check_unicode, parse_object, sha256, whole, write_text
from llm2vec.table import Cell, Table
from llm2vec.types import TextSide, UserError, in_one_sentence

if TYPE_CHECKING:
    from torch import Tensor

    from llm2vec.llm2vec import LLM2Vec

logger = logging.getLogger(__name__)

VECTORS_FILE, TEXTS_FILE = "vectors.safetensors", "texts.jsonl"
#: What the header of the vectors says: sums of the texts and of the vectors, and the model, as JSON, and its revision.
ABOUT = {"texts", "vectors", "revision", "model"}
MADE_BY = {"base": str, "adapters": [str], "torch_dtype": str}
#: A line of the texts.
PASSAGE = {"where": str, "title": str, "text": str}
#: A token stands for at least about so many, in prose and in code: so a passage is read to its end.
LEAST_CHARACTERS_A_TOKEN = 3

DEMO_MODEL, DEMO_INDEX = Path("output/quickstart/anchor"), Path("output/quickstart/docstring-index")
DEMO_TEXTS = Path("cache/docstrings/eval/DocstringRetrieval/corpus.jsonl")
DEMO_SOURCES = Path("train_configs/quickstart/sources.json")


class Hit(NamedTuple):
    """A passage that was found: its cosine similarity, where it stands, its title (may be empty) and its text."""

    score: float
    where: str
    title: str
    text: str


def main(argv: Sequence[str]) -> None:
    """Index, or search."""
    args = _parse_args(argv)
    if args.command == "index":
        print(f"{args.index}: {build_index(args.source, args.index, chosen_model(args), args.batch_size):,} passages")
        return
    if args.command == "demo":
        args.index, args.model = _demo_index(), None
        args.instruction = json.loads(DEMO_SOURCES.read_text(encoding="utf-8"))["docstrings"]["instruction"]
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


def build_index(source: Path, folder: Path, choice: ModelChoice, batch_size: int = 32) -> int:
    """Index a folder of text files or a JSONL file; an index that is there is replaced. Returns the number of passages.

    Vectors keep about as many bits as the model computes with: float32 for float32 weights, float16 (11 significant
    bits, where bfloat16 has 8) for the others. A `UserError` where `folder` holds anything but an index or cannot be
    written, or source or model cannot be read.
    """
    if folder.exists() and not _may_be_index(folder):
        raise UserError(f"{folder} is there and is no index; give a folder that is not there yet.")
    with alone_in(folder, "indexing"):
        return _build_index(source, folder, choice, batch_size)


def _may_be_index(folder: Path) -> bool:
    """Whether a folder is an index, or empty, whatever hidden files a killed start has left."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else ["it is a file"]
    return any(name.lstrip(".").startswith(VECTORS_FILE) for name in names) or all(n.startswith(".") for n in names)


def _build_index(source: Path, folder: Path, choice: ModelChoice, batch_size: int) -> int:
    from llm2vec.model.settings import EncoderSettings  # with torch: seconds

    settings = EncoderSettings(**choice.opened().settings)
    choice = choice.resolved()
    tokens = min(settings.max_length, settings.doc_max_length or settings.max_length)
    rows = list(passages_of(source, min(PASSAGE_CHARACTERS, LEAST_CHARACTERS_A_TOKEN * tokens)))
    if not rows:
        raise UserError(f"{source} has no text: no line, or no text file ({', '.join(SUFFIXES)}) that holds any.")
    logger.info("%d passages of %s", len(rows), source)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    about = {
        "revision": choice.revision(),
        "model": json.dumps(asdict(choice)),
        "texts": hashlib.sha256(lines.encode()).hexdigest(),  # so that the files of two indexes never pass for one
    }
    texts = [f"{row['title']} {row['text']}".strip() for row in rows]  # as in an evaluation
    vectors_ND = _unit_vectors(choice.load(), texts, "document", batch_size).cpu().contiguous()
    stored_ND = vectors_ND if choice.torch_dtype == "float32" else vectors_ND.half()
    from safetensors.torch import save_file

    with in_one_sentence(lambda why: f"{folder} cannot be written to ({why}).", OSError):
        for aside in (*folder.glob(f".{VECTORS_FILE}.*"), *folder.glob(f".{TEXTS_FILE}.*")):  # a killed start's
            aside.unlink()
        with whole(folder / VECTORS_FILE) as aside:
            save_file({"vectors": stored_ND}, aside, metadata={**about, "vectors": _sum_of(stored_ND)})
            write_text(folder / TEXTS_FILE, lines)
    return len(rows)


class TextIndex:
    """An index that `build_index` has written. A `UserError` where there is none, or its files are cut short or of two
    indexes.

        index = TextIndex(Path("output/docs-index"))
        index.search(index.load_model(), ["which key is it when memory runs out"], k=3)
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not (folder / VECTORS_FILE).is_file() or not (folder / TEXTS_FILE).is_file():
            raise UserError(f"{folder} is no index: it does not hold both {VECTORS_FILE} and {TEXTS_FILE}.")
        where = f"{folder / VECTORS_FILE}"
        with (
            in_one_sentence(lambda why: f"{where} cannot be read ({why}); make the index again.", SafetensorError),
            safe_open(folder / VECTORS_FILE, framework="pt") as vectors,
        ):
            about = vectors.metadata() or {}
            if not about.keys() >= ABOUT:
                raise UserError(f"{where} is of another program or version; make the index again.")
            self._vectors_ND = vectors.get_tensor("vectors")
        if about["texts"] != sha256(folder / TEXTS_FILE):
            raise UserError(f"{folder}: the vectors are not of this {TEXTS_FILE}; make the index again.")
        self._lines = (folder / TEXTS_FILE).read_bytes().splitlines()
        if about["vectors"] != _sum_of(self._vectors_ND) or self._vectors_ND.shape[:-1] != (len(self._lines),):
            raise UserError(f"{where} is not what was written; make the index again.")
        made_by = parse_object(about["model"], where, MADE_BY)
        self.model = ModelChoice(made_by["base"], tuple(made_by["adapters"]), made_by["torch_dtype"])
        self.folder, self.revision = folder, about["revision"]

    def load_model(self, choice: ModelChoice | None = None) -> LLM2Vec:
        """The model that made the index, from where it lay then, or `choice`. A `UserError` where it is another one, or
        was trained further since."""
        choice = choice or self.model
        if choice.revision() != self.revision:
            raise UserError(
                f"{self.folder} was made by another model than {choice.place} is now (or by other settings or another "
                "dtype of it), so vectors do not compare; make the index again."
            )
        return choice.load()

    def search(self, model: LLM2Vec, queries: Sequence[str], k: int, instruction: str = "") -> list[list[Hit]]:
        """The k best passages for each query, or all; among equal scores the earlier one of the index first."""
        from llm2vec.corpus.search import blocks, hits_of, top_k

        vectors_QD = _unit_vectors(model, [[instruction, query] for query in queries], "query")
        vectors_QD = vectors_QD.to(next(model.parameters()).device)  # which that has moved the model to
        ranges = blocks(len(self._lines))
        documents = ((block.start, self._vectors_ND[block.start : block.stop]) for block in ranges)
        keys = top_k(vectors_QD, documents, lambda q_QD, d_ND: q_QD @ d_ND.float().T, min(k, len(self._lines))).cpu()
        return [[Hit(score, **self._passage(number)) for number, score in hits] for hits in hits_of(keys)]

    def _passage(self, number: int) -> dict[str, str]:
        passage = parse_object(self._lines[number], f"{self.folder / TEXTS_FILE}, line {number + 1}", PASSAGE)
        return {key: passage[key] for key in PASSAGE}


def _sum_of(vectors_ND: Tensor) -> str:
    """SHA-256 of all numbers."""
    import torch

    return hashlib.sha256(vectors_ND.flatten().view(torch.uint8).numpy().data).hexdigest()


def _unit_vectors(model: LLM2Vec, entries: list[str] | list[list[str]], side: TextSide, batch_size: int = 32) -> Tensor:
    from torch.nn.functional import normalize

    progress = side == "document"
    vectors_ND = model.encode(entries, batch_size, show_progress_bar=progress, convert_to_tensor=True, side=side)
    return normalize(cast("Tensor", vectors_ND), dim=-1)


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
    choice = ModelChoice(str(DEMO_MODEL))
    with suppress(UserError):  # not there yet, or cut short
        if TextIndex(DEMO_INDEX).revision == choice.revision():
            return DEMO_INDEX
    build_index(DEMO_TEXTS, DEMO_INDEX, choice)
    return DEMO_INDEX
