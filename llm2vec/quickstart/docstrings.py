"""The quickstart's corpus: docstrings of the installed Python packages as a small retrieval problem.

The query is a docstring's summary sentence, the positive is the rest of that docstring, the hard negative is the
rest of a neighbour's docstring from the same file. Nothing is downloaded and nothing is imported or executed: files
are parsed with `ast`. Whole files are held out, so no text of a held-out file is ever trained on. What comes out
depends on the Python version and on the installed packages; `manifest.json` names both.

Run by `experiments/make_docstrings.py`; `write_corpus` lists the files it writes.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import logging
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import distributions
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llm2vec.data.held_out import json_lines_of, retrieval_files
from llm2vec.files import sha256, write_json, write_text
from llm2vec.types import UserError, in_one_sentence

logger = logging.getLogger(__name__)

TRAIN_FILE = "train/docstrings.jsonl"
EVAL_FOLDER = "eval/DocstringRetrieval"
RECORD_FILE = "manifest.json"

#: Folders whose docstrings are not prose about an interface: tests, copies of other packages, demonstrations, and
#: packages installed inside the standard library's own folder.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_testing", "_vendor", "vendor", "idlelib", "turtledemo", "site-packages"}
    | {"dist-packages", "__pycache__"}
)

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(:])")
_RULE_LINE = re.compile(r"\s*[^\w\s]{3,}\s*")  # a heading's underline, a table's border
_SIGNATURE_LINE = re.compile(r"[\w.]+\(.*\)(\s*->.*)?")  # compiled functions repeat theirs as the first line
_EXAMPLE_LINE = re.compile(r"\s*(>>>|```|In \[1\]:)")
_EXAMPLE_HEADING = re.compile(r"\W*\bexamples?\W*$", re.IGNORECASE)
_FIELD_LIST = re.compile(r"[:@]|(Args|Arguments|Parameters|Returns|Raises|Usage)\s*:|Parameters\b")  # no summary at all
_LEGAL = re.compile(r"copyright|licen[cs]e[ds]? under|all rights reserved|spdx-", re.IGNORECASE)
_WORD = re.compile(r"\w+")


#: Words of a query, and of the shortest body, between blanks; most characters of a body.
QUERY_WORDS = range(4, 41)
LEAST_BODY_WORDS = 15
MOST_BODY_CHARACTERS = 700
#: Of two bodies that agree in this many characters from the start, the later one is dropped.
PREFIX_CHARACTERS = 100
#: Files held out, in thousands of all files.
HELD_OUT_PER_MILLE = 25


class Passage(NamedTuple):
    """One docstring cut in two. `file` is `<root label>/<path below the root>`, `line` that of the definition."""

    file: str
    line: int
    query: str
    body: str


def installed_roots() -> dict[str, Path]:
    """Label and folder of the standard library and of the installed packages."""
    paths = {label: Path(sysconfig.get_paths()[label]) for label in ("stdlib", "purelib", "platlib")}
    return {label: path for label, path in paths.items() if label != "platlib" or path != paths["purelib"]}


def source_files(roots: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """Every Python file worth reading, none hidden, as (`<label>/<relative path>`, path), sorted by that name."""
    found: list[tuple[str, Path]] = []
    for label, root in roots.items():
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if not (name in SKIPPED_FOLDERS or name.startswith("."))]
            paths = [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(".")]
            found += [(f"{label}/{path.relative_to(root).as_posix()}", path) for path in paths]
    return sorted(found)


def read_docstrings(path: Path) -> list[tuple[int, str]]:
    """Line and docstring of a file's module, classes, functions and methods, in order, without running any of it.

    A SyntaxError or ValueError where the file is not valid for the running Python, or does not decode as it declares
    itself.
    """
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:  # a docstring worth a pair spans lines; saves the parsing
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        module = ast.parse(source)
    return list(_docstrings_below(module, line=1))


def _docstrings_below(node: ast.Module | ast.ClassDef, line: int) -> Iterator[tuple[int, str]]:
    """The docstring of a module or class, then those of what its body defines; function bodies are not entered."""
    if docstring := ast.get_docstring(node):
        yield line, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings_below(child, child.lineno)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(child)):
            yield child.lineno, docstring


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Summary sentence and rest of a docstring: blanks collapsed, code examples left out, capped at a word's end.

    None where they make no pair: too short, too long or no summary, a legal notice, or a body that repeats the
    summary and so would be found by string search alone.
    """
    prose = _prose(docstring)
    summary, _, rest = prose.partition("\n\n")
    query, *more = _SENTENCE_END.split(" ".join(summary.split()), maxsplit=1)
    body = _EXAMPLE_HEADING.sub("", " ".join([*more, *rest.split()]))
    if len(body) > MOST_BODY_CHARACTERS:
        body = body[: MOST_BODY_CHARACTERS + 1].rpartition(" ")[0] or body[:MOST_BODY_CHARACTERS]
    if len(query.split()) not in QUERY_WORDS or len(body.split()) < LEAST_BODY_WORDS:
        return None
    if _FIELD_LIST.match(query) or _LEGAL.search(docstring):
        return None
    return None if normalised(query) in normalised(body) else (query, body)


def _prose(docstring: str) -> str:
    """The docstring without signature, heading underlines, and everything from its first code example on."""
    lines = [line for line in docstring.splitlines() if not _RULE_LINE.fullmatch(line)]
    if lines and _SIGNATURE_LINE.fullmatch(lines[0].strip()):
        del lines[0]
    return "\n".join(takewhile(lambda line: not _EXAMPLE_LINE.match(line), lines)).strip()


def normalised(text: str) -> str:
    """The words alone, lower case, one blank apart: what counts as the same text."""
    return " ".join(_WORD.findall(text.casefold()))


def read_passages(files: Iterable[tuple[str, Path]]) -> tuple[list[Passage], Counter[str]]:
    """Passages of `source_files`, in order, and counts: `files`, `unreadable_files`, `docstrings`, `passages`."""
    passages: list[Passage] = []
    counts: Counter[str] = Counter()
    for name, path in tqdm(list(files), desc="reading docstrings", unit="file", disable=None):
        counts["files"] += 1
        try:
            docstrings = read_docstrings(path)
        except (SyntaxError, ValueError, RecursionError, OSError) as error:
            logger.debug("skipped %s: %s", path, error)
            counts["unreadable_files"] += 1
            continue
        counts["docstrings"] += len(docstrings)
        pairs = [(line, split_docstring(docstring)) for line, docstring in docstrings]
        passages += [Passage(name, line, *pair) for line, pair in pairs if pair is not None]
    counts["passages"] = len(passages)
    return passages, counts


def without_duplicates(passages: Iterable[Passage]) -> list[Passage]:
    """Keep the first of all passages that share a query or a body's beginning, over both splits together.

    A copy in the held-out files of something trained on would be a leak, two documents that answer one query would
    make the single relevance judgement wrong.
    """
    queries: set[str] = set()
    bodies: set[str] = set()
    kept: list[Passage] = []
    for passage in passages:
        query, body = normalised(passage.query), normalised(passage.body)[:PREFIX_CHARACTERS]
        if query not in queries and body not in bodies:
            kept.append(passage)
        queries.add(query)  # of dropped ones too, or a third copy could pass by its other half
        bodies.add(body)
    return kept


def is_held_out(file: str) -> bool:
    """Whether a file belongs to the held-out split; a pure function of its name."""
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def training_rows(passages: Iterable[Passage]) -> list[dict[str, str]]:
    """Rows of passages sorted by file; the negative is the body that follows in the same file, round about.

    A file's only passage has no neighbour and gives no row.
    """
    rows: list[dict[str, str]] = []
    for _, group in groupby(passages, key=lambda passage: passage.file):
        in_file = list(group)
        if len(in_file) > 1:
            neighbours = in_file[1:] + in_file[:1]
            pairs = zip(in_file, neighbours, strict=True)
            rows += [{"query": one.query, "positive": one.body, "negative": other.body} for one, other in pairs]
    return rows


def held_out_files(passages: Iterable[Passage]) -> dict[str, str]:
    """The held-out passages as a retrieval set: relative path -> content."""
    named = {f"{passage.file}:{passage.line}": passage for passage in passages}
    corpus = {f"d/{name}": passage.body for name, passage in named.items()}
    queries = {f"q/{name}": passage.query for name, passage in named.items()}
    return retrieval_files(corpus, queries, [(f"q/{name}", f"d/{name}") for name in named])


def write_corpus(output_dir: Path, roots: Mapping[str, Path]) -> dict[str, Any]:
    """Write training rows, held-out retrieval task and manifest, or reuse them where nothing they depend on changed.

    Files below `output_dir`: `train/docstrings.jsonl`, `eval/DocstringRetrieval/{corpus,queries}.jsonl`,
    `eval/DocstringRetrieval/qrels/test.jsonl`, `eval/DocstringRetrieval/README.md`, `manifest.json` (last).

    `roots` are as of `installed_roots`; too little in them is a `UserError`. Returns the manifest: `made_from` (a
    hash of this file, whose rules they are, Python version, versions of the distributions), `counts`, `sha256`.
    """
    with in_one_sentence(lambda why: f"{output_dir} cannot be made ({why}).", OSError):
        output_dir.mkdir(parents=True, exist_ok=True)
    made_from = _made_from(roots)
    if (manifest := _reusable(output_dir, made_from)) is not None:
        logger.info("%s is up to date and is reused", output_dir)
        return manifest
    gc.disable()  # syntax trees are millions of objects without cycles: searching them doubles the time
    try:
        read, counts = read_passages(source_files(roots))
    finally:
        gc.enable()
    passages = without_duplicates(read)
    held_out = [passage for passage in passages if is_held_out(passage.file)]
    rows = training_rows(passage for passage in passages if not is_held_out(passage.file))
    if not rows or not held_out:
        found = f"{len(rows)} training and {len(held_out)} held-out rows"
        raise UserError(f"{found} from {list(roots)}: install packages with more docstrings.")
    files = {TRAIN_FILE: json_lines_of(rows)}
    files |= {f"{EVAL_FOLDER}/{name}": content for name, content in held_out_files(held_out).items()}
    manifest = {
        "made_from": made_from,
        "counts": {**counts, "distinct_passages": len(passages), "training_rows": len(rows), "held_out": len(held_out)},
        "sha256": {name: hashlib.sha256(content.encode()).hexdigest() for name, content in files.items()},
    }
    (output_dir / RECORD_FILE).unlink(missing_ok=True)  # until all is written, nothing vouches for the files
    for name, content in files.items():
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(output_dir / name, content)
    write_json(output_dir / RECORD_FILE, manifest)
    return manifest


def _made_from(roots: Mapping[str, Path]) -> dict[str, Any]:
    """Everything the corpus depends on, as JSON values."""
    found = distributions(path=[str(root) for root in roots.values()])
    named = {(one.metadata["Name"], one.version) for one in found if one.metadata["Name"]}  # a broken one has no name
    return {
        "rules": sha256(Path(__file__)),
        "python": platform.python_version(),
        "distributions": dict(sorted(named)),
    }


def _reusable(output_dir: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a corpus made from the same things whose files are all there and unchanged, else None."""
    if not (output_dir / RECORD_FILE).is_file():
        return None
    manifest: dict[str, Any] = json.loads((output_dir / RECORD_FILE).read_text(encoding="utf-8"))
    files = {output_dir / name: expected for name, expected in manifest["sha256"].items()}
    unchanged = all(file.is_file() and sha256(file) == expected for file, expected in files.items())
    return manifest if manifest["made_from"] == made_from and unchanged else None
