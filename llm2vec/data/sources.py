"""Sources of training rows: a table of names, files and instructions; the paper's, a ready one, or one's own.

The paper's 14 sources (Table 6 of arXiv 2509.03020) are `e5_sources.json` beside this file, data sets of the hub that
need no preparation `hub_sources.json`. Their form is that of `sources_file`, so one's own may begin as a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm2vec.data.reading import ROLES, SCORES, Reading
from llm2vec.data.records import is_saved
from llm2vec.files import read_object
from llm2vec.types import UserError

#: The released training archive: one file for each of the paper's sources.
E5_TABLE = Path(__file__).with_name("e5_sources.json")

#: Ready tables that `sources_file` may name in the place of a file.
READY_TABLES = {name: E5_TABLE.with_name(f"{name}_sources.json") for name in ("hub", "nemotron")}

#: What an entry of a table may say.
KEYS_OF_SOURCE = (
    "file", "instruction", "symmetric", "hub", "config", "split", "revision", "columns", "num_negatives", "least_score",
    "keep_equal_negatives", "max_rows", "weight", "positives", "licence", "documents", "queries",
    "batch_size",
)  # fmt: skip
#: What the plain ones of these must be: in words, and as a test.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("config", "split", "revision", "licence"), ("a string", lambda v: isinstance(v, str))),
    "num_negatives": ("a whole number, 0 or more", lambda v: v is None or (type(v) is int and v >= 0)),
    **dict.fromkeys(("max_rows", "batch_size"), ("a whole number above 0", lambda v: type(v) is int and v > 0)),
    "keep_equal_negatives": ("true or false", lambda v: isinstance(v, bool)),
    "weight": ("a number above 0, at most 1,000", lambda v: type(v) in (int, float) and 0 < v <= 1000),
    "positives": ('"each" (a row of each) or "drawn" (one an epoch, in turns)', lambda v: v in ("each", "drawn")),
}
#: What `documents` and `queries` of an entry may say: where the texts behind ids are, and in which columns.
KEYS_OF_TEXTS = ("file", "hub", "config", "split", "revision", "id", "text")

#: Where the released training archive is to be had.
ARCHIVE_HINT = (
    "the training archive (echo-data, 14 files, 3.6 GB) is linked from "
    "https://github.com/jakespringer/echo-embeddings#training; unpack it there, or list the `sources` you have"
)


class Instruction(NamedTuple):
    """An instruction, and whether the documents of its rows carry it too."""

    text: str
    symmetric: bool = False


class Source(NamedTuple):
    """Where rows are. Row i of a source is read under instruction i modulo their number.

    Example:
        Source("faq", "faq.jsonl", (Instruction("Given a question, retrieve its answer"),))
    """

    name: str  #: of the source
    file: str  #: a file, or a folder that `save_to_disk` wrote, below the data's folder; or a name on the hub
    instructions: tuple[Instruction, ...]  #: of its rows, in turns
    reading: Reading = Reading()  #: how its records become rows
    licence: str = ""  #: what a table says of it

    def place(self, folder: Path) -> Path:
        """Its file or folder; of a data set that is no folder below this one, its name on the hub."""
        return _place(folder, self.file, self.reading)

    def located(self, folder: Path) -> Source:
        """The same, with the places of the texts behind its ids; once that is known, it is known of no other folder."""
        documents, queries = (
            texts and (str(_place(folder, *texts)), texts[1])
            for texts in (self.reading.documents, self.reading.queries)
        )
        return self._replace(reading=self.reading._replace(documents=documents, queries=queries))

    def missing(self, folder: Path) -> list[str]:
        """Its files that are not there, as far as can be told without asking the hub."""
        needed = ((self.file, self.reading), self.reading.documents, self.reading.queries)
        places = [(texts[0], _place(folder, *texts)) for texts in needed if texts and not texts[1].hub]
        return [file for file, place in places if not (place.is_file() or is_saved(place))]


def _place(folder: Path, file: str, reading: Reading) -> Path:
    local = folder / file
    return Path(file) if reading.hub and not local.is_dir() else local


def e5_sources() -> list[Source]:
    """The released archive: one `<source>.jsonl` for each of the paper's 14 sources."""
    return read_sources_file(E5_TABLE)


def read_sources_file(path: Path) -> list[Source]:
    """Sources from a JSON table, name -> {"file", "instruction", "symmetric", ...}, or a ready one (`READY_TABLES`).

    `instruction` may be empty, or a list (rows take them in turn). `symmetric` (default false) puts it on the
    documents too; beside a list of instructions it may be a list as long. `hub` names a data set in the place of
    `file`. What else there is says how records become rows (`Reading`); docs/guides/data.md has examples. A `UserError`
    where the file is missing or no JSON object, or an entry has an unknown key or a wrong type.
    """
    table = read_object(table_file(path), f"sources_file: {path}")
    if not table:
        raise UserError(f"sources_file: {path} must hold an object that maps source names to tables.")
    return [_read_source(f"sources_file: {path}, source {name!r}", name, entry) for name, entry in table.items()]


def table_file(path: Path) -> Path:
    """The file of a table of sources: the path itself, or that of the ready table of this name."""
    return path if path.exists() else READY_TABLES.get(str(path), path)


def entry_of(source: Source, file: str) -> dict[str, Any]:
    """What a table says of a source's rows that were written to a JSONL file, in the fields' own names: all that was
    not followed when they were written."""
    texts, symmetric = ([instruction[i] for instruction in source.instructions] for i in (0, 1))
    kept = {key: getattr(source.reading, key) for key in ("num_negatives", "weight", "batch_size")}
    return {
        "file": file, "instruction": texts, "symmetric": symmetric,
        **{key: value for key, value in kept.items() if value != Reading._field_defaults[key]},
        "keep_equal_negatives": source.reading.keep_equal_negatives,
        **({"licence": source.licence} if source.licence else {}),
    }  # fmt: skip


def _read_source(where: str, name: str, entry: Any) -> Source:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: an object with file, instruction and symmetric is needed.")
    unknown = sorted(set(entry) - set(KEYS_OF_SOURCE))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(KEYS_OF_SOURCE)}.")
    if not name or name.startswith(".") or {"/", "\\"} & set(name):
        raise UserError(
            f"{where}: the name of a source must not be empty, begin with a dot or hold a slash; files are named by it."
        )
    file, (hub, config, split, revision) = _file(where, entry)
    texts, symmetric = entry.get("instruction", ""), entry.get("symmetric", False)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: `instruction` must be a string or a list of strings.")
    of_each = symmetric if isinstance(symmetric, list) else [symmetric] * len(texts)
    if len(of_each) != len(texts) or not all(isinstance(value, bool) for value in of_each):
        raise UserError(f"{where}: `symmetric` must be true or false, or a list of these, one for each instruction.")
    reading = _reading(where, entry)._replace(hub=hub, config=config, split=split, revision=revision)
    return Source(name, file, tuple(map(Instruction, texts, of_each)), reading, entry.get("licence", ""))


def _file(where: str, entry: dict[str, Any]) -> tuple[str, tuple[bool, str | None, str | None, str | None]]:
    """The file or hub name of an entry; whether it is the latter, its configuration, split and revision. What has a
    rule is checked."""
    file = entry.get("hub", entry.get("file"))
    if not isinstance(file, str) or not file or ("hub" in entry and "file" in entry):
        raise UserError(f"{where}: `file` must name a JSONL file or one of another form, or `hub` a data set.")
    for key, (words, fits) in _RULES.items():
        if key in entry and not fits(entry[key]):
            raise UserError(f"{where}: `{key}` must be {words}.")
        if key in ("config", "revision") and key in entry and "hub" not in entry:
            raise UserError(f"{where}: `{key}` is for a data set of the hub.")
    return file, ("hub" in entry, entry.get("config"), entry.get("split"), entry.get("revision"))


def _texts(where: str, key: str, entry: Any) -> tuple[str, Reading] | None:
    """Where the texts behind ids are, by an entry's `documents` or `queries`."""
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise UserError(f'{where}: `{key}` must be an object, such as {{"file": "corpus.jsonl", "id": "_id"}}.')
    if unknown := sorted(set(entry) - set(KEYS_OF_TEXTS)):
        raise UserError(f"{where}: {key}: unknown key {unknown[0]!r}; known: {', '.join(KEYS_OF_TEXTS)}.")
    file, place = _file(f"{where}: {key}", entry)
    name, text = entry.get("id", "id"), entry.get("text", "text")
    texts = tuple([text] if isinstance(text, str) else text if isinstance(text, list) else ())
    if not isinstance(name, str) or not texts or not all(isinstance(one, str) for one in texts):
        raise UserError(f"{where}: {key}: `id` must name a column, and `text` a column or a list of them.")
    return file, Reading(*place, columns=(("id", (name,)), ("text", texts)))


def _reading(where: str, entry: dict[str, Any]) -> Reading:
    columns = entry.get("columns", {})
    if not isinstance(columns, dict):
        raise UserError(f'{where}: `columns` must be an object, such as {{"query": "anchor"}}.')
    roles = {role: tuple([names] if isinstance(names, str) else names) for role, names in columns.items()
             if isinstance(names, str | list)}  # fmt: skip
    for role, names in columns.items():
        if role not in ROLES:
            raise UserError(f"{where}: columns: {role!r} is no role of a column; known: {', '.join(ROLES)}.")
        if role not in roles or not names or not all(isinstance(one, str) for one in roles[role]):
            raise UserError(f"{where}: columns: {role} must name a column{' or a list of them' * ROLES[role]}.")
        if len(roles[role]) > 1 and not ROLES[role]:
            raise UserError(
                f"{where}: columns: {role} names {len(names)} columns ({', '.join(names)}); it can be one alone."
            )
    named = [name for names in roles.values() for name in names]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise UserError(f"{where}: columns: {twice!r} is named twice; a column can have one role.")
    if roles and set(roles) != {"text", "label"} and (not {"query", "positive"} <= set(roles) or "label" in roles):
        raise UserError(
            f"{where}: columns must name query and positive, or text and label alone; it names {', '.join(roles)}."
        )
    if "score" in roles and {"negative", *SCORES[:2]} & set(roles):
        raise UserError(f"{where}: columns: score is of a pair, so there can be no negative, pos_score or neg_scores.")
    most, least = entry.get("num_negatives"), entry.get("least_score")
    if least is not None and (type(least) not in (int, float) or "score" not in roles):
        raise UserError(f"{where}: `least_score` must be a number, beside a `score` in columns.")
    if "score" in roles or (roles and not {"negative", "label"} & set(roles)):
        most = 0  # there are none
    documents, queries = (_texts(where, key, entry.get(key)) for key in ("documents", "queries"))
    if "label" in roles and (documents or queries):
        raise UserError(f"{where}: labelled texts have no ids, so there can be no documents or queries.")
    return Reading(
        columns=tuple(roles.items()), num_negatives=most, least_score=least,
        keep_equal_negatives=entry.get("keep_equal_negatives", False), max_rows=entry.get("max_rows"),
        weight=entry.get("weight", 1.0), draw_positives=entry.get("positives") == "drawn",
        documents=documents, queries=queries, batch_size=entry.get("batch_size"),
    )  # fmt: skip


def select_sources(sources: Sequence[Source], names: Sequence[str] | None) -> list[Source]:
    """The named sources, in the table's order; all of them for None. An unknown name, or none at all, is a
    `UserError`."""
    known = [source.name for source in sources]
    if names is not None and not names:
        raise UserError(f"sources: the list is empty; leave the key out for all of them: {', '.join(known)}.")
    for name in names or ():
        if name not in known:
            raise UserError(f"sources: {name!r} is not known; known: {', '.join(known)}.")
    return [source for source in sources if names is None or source.name in names]


def find_files(folder: Path, sources: Sequence[Source]) -> list[Path]:
    """The sources' files in `folder`; of a data set of the hub that is not there, its name. A `UserError` where the
    folder or a file is not there, which says what was looked for and, of the paper's sources, where to get it."""
    if missing := list(dict.fromkeys(Path(file).name for source in sources for file in source.missing(folder))):
        what = f"lacks {', '.join(missing)}" if folder.is_dir() else f"is not a folder (wanted: {', '.join(missing)})"
        raise UserError(f"dataset_file_path: {folder} {what}{archive_hint(sources)}.")
    return [source.place(folder) for source in sources]


def archive_hint(sources: Sequence[Source]) -> str:
    """The end of a sentence that says where the sources' files are to be had; empty for one's own."""
    of_archive = {(source.name, source.file) for source in e5_sources()}
    return f"; {ARCHIVE_HINT}" if {(source.name, source.file) for source in sources} <= of_archive else ""
