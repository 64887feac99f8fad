"""Training rows: which sources there are, how their files are read, and in which order rows come.

A source is one JSONL file, one object a line with `query`, `positive` and `negative` (a string or a list), the
layout of the released training archive; rows of one text may be lines of a plain text file. Files are checked line by
line, once, into Arrow tables that all ranks map into memory. Nothing here knows a tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset, Sampler

from llm2vec.data.tables import cached_table, check_unchanged, stamp_of
from llm2vec.files import check_unicode, parse_object, read_object
from llm2vec.types import Example, InstructedText, SymmetricInstructions, TextSide, UserError

#: Where the released training archive is to be had.
ARCHIVE_HINT = (
    "the training archive (echo-data, 14 files, 3.6 GB) is linked from "
    "https://github.com/jakespringer/echo-embeddings#training; unpack it there, or list the `sources` you have"
)


#: How a table's rows are made of lines. Raise it when that changes, so that no table made the older way is taken up.
ROWS_VERSION = 3


class Instruction(NamedTuple):
    """An instruction, and whether the documents of its rows carry it too."""

    text: str
    symmetric: bool = False


class Source(NamedTuple):
    """A file of rows. Row i of a source is read under instruction i modulo their number."""

    name: str
    file: str
    instructions: tuple[Instruction, ...]


_WIKIPEDIA_QUESTION = Instruction("Given a question, retrieve Wikipedia passages that answer the question")
_WIKIPEDIA = Instruction("Retrieve Wikipedia passages that answer the question")
_CHINESE = Instruction("Given a Chinese search query, retrieve web passages that answer the question")

#: The 14 sources of the paper with their instructions (Table 6).
E5_INSTRUCTIONS: dict[str, tuple[Instruction, ...]] = {
    "allnli": (
        Instruction("Given a premise, retrieve a hypothesis that is entailed by the premise"),
        Instruction("Retrieve semantically similar text", symmetric=True),
    ),
    "dureader": (_CHINESE,),
    "eli5_question_answer": (
        Instruction("Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum"),
    ),
    "fever": (Instruction("Given a claim, retrieve documents that support or refute the claim"),),
    "hotpot_qa": (Instruction("Given a multi-hop question, retrieve documents that can help answer the question"),),
    "miracl": (_WIKIPEDIA_QUESTION,),
    "mrtydi": (_WIKIPEDIA_QUESTION,),
    "msmarco_passage": (Instruction("Given a web search query, retrieve relevant passages that answer the query"),),
    "msmarco_document": (Instruction("Given a web search query, retrieve relevant documents that answer the query"),),
    "nq": (_WIKIPEDIA_QUESTION,),
    "quora_duplicates": (
        Instruction(
            "Given a question, retrieve questions that are semantically equivalent to the given question",
            symmetric=True,
        ),
        Instruction("Find questions that have the same meaning as the input question", symmetric=True),
    ),
    "squad": (_WIKIPEDIA,),
    "t2ranking": (_CHINESE,),
    "trivia_qa": (_WIKIPEDIA,),
}


def e5_sources() -> list[Source]:
    """The released archive: one `<source>.jsonl` for each of the paper's 14 sources."""
    return [Source(name, f"{name}.jsonl", instructions) for name, instructions in E5_INSTRUCTIONS.items()]


def read_sources_file(path: Path) -> list[Source]:
    """One's own sources from a JSON table: name -> {"file", "instruction", "symmetric"}.

    `instruction` may be empty, or a list (rows take them in turn); `symmetric` (default false) puts it on the
    documents too.

    Raises:
        UserError: the file is missing, no JSON object, or an entry has an unknown key or a wrong type.
    """
    table = read_object(path, f"sources_file: {path}")
    if not table:
        raise UserError(f"sources_file: {path} must hold an object that maps source names to tables.")
    return [_read_source(path, name, entry) for name, entry in table.items()]


def _read_source(path: Path, name: str, entry: Any) -> Source:
    where = f"sources_file: {path}, source {name!r}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: an object with file, instruction and symmetric is needed.")
    unknown = sorted(set(entry) - {"file", "instruction", "symmetric"})
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known: file, instruction, symmetric.")
    file, symmetric = entry.get("file"), entry.get("symmetric", False)
    texts = entry.get("instruction", "")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(file, str) or not file:
        raise UserError(f"{where}: `file` must name a JSONL file.")
    if not isinstance(symmetric, bool):
        raise UserError(f"{where}: `symmetric` must be true or false.")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: `instruction` must be a string or a list of strings.")
    return Source(name, file, tuple(Instruction(text, symmetric) for text in texts))


def select_sources(sources: Sequence[Source], names: Sequence[str] | None) -> list[Source]:
    """The named sources, in the table's order; all of them for None.

    Raises:
        UserError: an unknown name, or none at all.
    """
    known = [source.name for source in sources]
    if names is not None and not names:
        raise UserError(f"sources: the list is empty; leave the key out for all of them: {', '.join(known)}.")
    for name in names or ():
        if name not in known:
            raise UserError(f"sources: {name!r} is not known; known: {', '.join(known)}.")
    return [source for source in sources if names is None or source.name in names]


class SourceRows(Protocol):
    """Rows by one running index, source after source, as far as their order goes.

    Attributes:
        sources: where they are from.
        sizes: rows of each source.
        drawn_anew: whether a row is drawn anew in each epoch; row i of epoch e is then asked for as e * len(rows) + i,
            so that it does not matter which process asks.
    """

    sources: list[Source]
    sizes: list[int]
    drawn_anew: bool

    def lengths(
        self, indices: np.ndarray[Any, np.dtype[np.int64]], most: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """About how long some rows are, all of one source; `most` = what a text counts at most."""
        ...


class TrainingRows(Dataset[Example]):
    """All rows of all sources, by one running index.

    Args:
        folder: where the sources' files lie.
        sources: what to read; all files must be there.
        num_negatives: hard negatives a row (the first that many); 0 = none are read.
        symmetric_instructions: `documented` puts a symmetric instruction on documents too (paper Table 6), which
            then take a query's form, `as_released` on queries only.
        max_rows: most rows of each source, from the start of its file; None = all.
        num_held_out: rows at the end of each source's file that belong to `held_out()` instead.
        with_scores: read a teacher's scores too; every row must have them.
        texts_alone: rows of one text that is its own positive: a line of a `.txt` file, or the `positive` of a JSONL
            file's row.

    Raises:
        UserError: a file is missing, or a line is no valid row (file, line number, what is wrong).
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        *,
        num_negatives: int = 1,
        symmetric_instructions: SymmetricInstructions = "documented",
        max_rows: int | None = None,
        num_held_out: int = 0,
        with_scores: bool = False,
        texts_alone: bool = False,
    ) -> None:
        self.drawn_anew = False
        self.files = find_files(folder, sources)
        self.sources = list(sources)
        self.symmetric_instructions = symmetric_instructions
        self._tables = [read_rows(file, num_negatives, with_scores, texts_alone) for file in self.files]
        for file, table in zip(self.files, self._tables, strict=True):
            if len(table) <= num_held_out:
                raise UserError(f"num_eval_rows is {num_held_out}, but {file} has only {len(table)} rows.")
        self._num_held_out = num_held_out
        available = [len(table) - num_held_out for table in self._tables]
        self._select([0] * len(available), [n if max_rows is None else min(n, max_rows) for n in available])

    def _select(self, first_rows: list[int], sizes: list[int]) -> None:
        self._first_rows = first_rows
        self.sizes = sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def held_out(self) -> TrainingRows:
        """The rows at the end of each file that these leave out, as rows of their own."""
        rows = copy.copy(self)
        first = [len(table) - self._num_held_out for table in self._tables]
        rows._select(first, [self._num_held_out] * len(first))
        return rows

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        """Row `index` of the running count, with the instruction its source gives it."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        source, i = self.sources[which], int(index - self._starts[which]) + self._first_rows[which]
        row = self._tables[which][i]
        instruction = source.instructions[i % len(source.instructions)]
        shared = instruction.symmetric and self.symmetric_instructions == "documented"
        document_instruction = instruction.text if shared else ""
        document_side: TextSide = "query" if shared else "document"
        return Example(
            source.name,
            InstructedText(instruction.text, row["query"]),
            InstructedText(document_instruction, row["positive"], document_side),
            tuple(InstructedText(document_instruction, text, document_side) for text in row["negative"]),
            tuple(row.get("scores", ())),
        )

    def place(self, index: int) -> tuple[str, int]:
        """The file of a row, and its line there, counted from 1; blank lines of a text file do not count."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[which].file, int(index - self._starts[which]) + self._first_rows[which] + 1

    def lengths(
        self, indices: np.ndarray[Any, np.dtype[np.int64]], most: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Characters of the texts of some rows, all of one source; `most` = what a text counts at most."""
        which = int(np.searchsorted(self._starts, indices[0], side="right")) - 1
        places = indices - self._starts[which] + self._first_rows[which]
        columns = self._tables[which].with_format("arrow")[places]
        total = np.zeros(len(indices), dtype=np.int64)
        for name in ("query", "positive", "negative"):
            # A chunk a row; their texts are not copied together, which may be more than one array can hold.
            texts = pc.list_flatten(columns[name]) if name == "negative" else columns[name]
            characters = pc.utf8_length(texts).to_numpy().reshape(len(indices), -1)
            total += (characters if most is None else characters.clip(max=most)).sum(axis=1)
        return total


def find_files(folder: Path, sources: Sequence[Source]) -> list[Path]:
    """The sources' files in `folder`.

    Raises:
        UserError: the folder or a file is not there; says what was looked for and, of the paper's sources, where to
            get it.
    """
    files = [folder / source.file for source in sources]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        what = f"lacks {', '.join(missing)}" if folder.is_dir() else f"is not a folder (wanted: {', '.join(missing)})"
        raise UserError(f"dataset_file_path: {folder} {what}{archive_hint(sources)}.")
    return files


def archive_hint(sources: Sequence[Source]) -> str:
    """The end of a sentence that says where the sources' files are to be had; empty for one's own."""
    of_archive = {(source.name, source.file) for source in e5_sources()}
    return f"; {ARCHIVE_HINT}" if {(source.name, source.file) for source in sources} <= of_archive else ""


def read_rows(file: Path, num_negatives: int, with_scores: bool = False, texts_alone: bool = False) -> Any:
    """A source's rows as an Arrow-backed `datasets.Dataset` with `query`, `positive`, `negative` (a list) and, if
    asked for, `scores` (a list); arguments as in `TrainingRows`.

    Built once for a file's path and stamp (`cached_tables.stamp_of`), then mapped; rank 0 builds, the others wait.

    Raises:
        UserError: a line is no valid row.
    """
    from datasets import Features, List, Value

    features = Features({"query": Value("string"), "positive": Value("string"), "negative": List(Value("string"))})
    if with_scores:
        features["scores"] = List(Value("float64"))
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty; leave its source out of `sources` or fetch it again.")
    arguments = {
        "file": str(file.resolve()),
        "num_negatives": num_negatives,
        "with_scores": with_scores,
        "texts_alone": texts_alone,
        "stamp": stamp_of(file),
        "version": ROWS_VERSION,
    }
    return cached_table(_generate_rows, features, arguments)


def _generate_rows(
    file: str, num_negatives: int, with_scores: bool, texts_alone: bool, stamp: str, version: int
) -> Iterator[dict[str, Any]]:
    empty = True
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            if not texts_alone:
                row = parse_row(line, num_negatives, where, with_scores)
            else:
                text = parse_line(line, where) if file.endswith(".txt") else parse_row(line, 0, where)["positive"]
                if not text:
                    continue
                row = {"query": text, "positive": text, "negative": []}
            empty = False
            yield row
    check_unchanged(Path(file), stamp)
    if empty:
        raise UserError(f"{file} holds no text.")


def parse_line(line: bytes, where: str) -> str:
    """A line of plain text, without the blanks around it and a byte order mark; empty if it has nothing else.

    Raises:
        UserError: not UTF-8; begins with `where`.
    """
    try:
        return line.decode("utf-8-sig").strip()
    except ValueError as error:
        raise UserError(f"{where}: not valid UTF-8 ({error}).") from error


def parse_row(line: bytes, num_negatives: int | None, where: str, with_scores: bool = False) -> dict[str, Any]:
    """One line of a source as `query`, `positive` and `negative` (the first `num_negatives` of them, or all for None);
    with a teacher, `scores` too: the positive's, then those negatives'.

    Raises:
        UserError: not JSON, no object, a field missing, empty or no text, too few negatives, or scores that are
            missing, no numbers or not as many as the negatives; begins with `where`.
    """
    row = parse_object(line, where)
    for field in ("query", "positive"):
        _check_text(row.get(field), field, field in row, where)
    negatives = row.get("negative", [])
    negatives = [negatives] if isinstance(negatives, str) else negatives
    if not isinstance(negatives, list):
        raise UserError(f"{where}: `negative` must be a string or a list of strings.")
    num_negatives = len(negatives) if num_negatives is None else num_negatives
    if len(negatives) < num_negatives:
        raise UserError(
            f"{where}: {len(negatives)} hard negatives, but num_hard_negatives is {num_negatives}"
            f"{'' if 'negative' in row else ' (the field `negative` is missing)'}."
        )
    for text in negatives[:num_negatives]:
        _check_text(text, "negative", True, where)
    parsed = {"query": row["query"], "positive": row["positive"], "negative": negatives[:num_negatives]}
    if with_scores:
        parsed["scores"] = _scores(row, len(negatives), where)[: 1 + num_negatives]
    return parsed


def _scores(row: dict[str, Any], num_negatives: int, where: str) -> list[float]:
    """A teacher's score of the positive and of every negative of a row."""
    for field in ("pos_score", "neg_scores"):
        if field not in row:
            raise UserError(f"{where}: the field `{field}` is missing, which distillation_weight needs.")
    of_negatives = row["neg_scores"]
    if not isinstance(of_negatives, list) or len(of_negatives) != num_negatives:
        raise UserError(
            f"{where}: `neg_scores` must be a list of as many numbers as the row has negatives ({num_negatives})."
        )
    scores: list[float] = [row["pos_score"], *of_negatives]
    for score in scores:
        if type(score) not in (int, float) or not abs(score) < 1e300:
            raise UserError(f"{where}: {score!r} is no score; `pos_score` and `neg_scores` must hold finite numbers.")
    return [float(score) for score in scores]


def _check_text(text: Any, field: str, present: bool, where: str) -> None:
    if not present:
        raise UserError(f"{where}: the field `{field}` is missing.")
    if not isinstance(text, str):
        raise UserError(f"{where}: `{field}` must be text, not a {type(text).__name__}.")
    if not text.strip():
        raise UserError(f"{where}: `{field}` is empty.")
    check_unicode(text, field, where)


def block_order(sizes: Sequence[int], block_size: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Row indices of one epoch: blocks of `block_size` rows, each from one source, in random order.

    Rows are shuffled within their source and cut into blocks, incomplete blocks are dropped, and the blocks are
    shuffled. A pure function of its arguments.

    Args:
        sizes: rows of each source; row indices run through the sources in this order.
        block_size: rows a block.
        seed: of the run.
        epoch: counted from 0.
    """
    generator = np.random.default_rng([seed, epoch])
    blocks = []
    start = 0
    for size in sizes:
        order = start + generator.permutation(size)
        blocks.append(order[: size - size % block_size].reshape(-1, block_size))
        start += size
    stacked = np.concatenate(blocks)
    return stacked[generator.permutation(len(stacked))].reshape(-1)


def deal(lengths: np.ndarray[Any, np.dtype[np.int64]], num_ranks: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Places of a group's rows, dealt so that each rank gets equally many rows and nearly equal sums of lengths.

    The longest rows go first, one to each rank in a round, the longest of a round to the rank that holds least.

    Args:
        lengths: of the group's rows, a multiple of `num_ranks` in number.
        num_ranks: how many ranks share the group: consecutive places of the result are the first rank's, and so on.
    """
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, num_ranks)
    held = np.zeros(num_ranks, dtype=np.int64)
    for dealt in rounds:
        dealt[np.argsort(held, kind="stable")] = dealt.copy()
        held += lengths[dealt]
    return rounds.T.reshape(-1)


class OneSourceBlocks(Sampler[int]):
    """Yields `block_order` for the current epoch, so that consecutive `block_size` rows share a source.

    Args:
        rows: whose sizes decide the blocks.
        block_size: rows a block.
        seed: of the run.
        num_ranks: ranks that share the rows; among several, each group of rows that they hold at once is dealt so
            that none waits long for the one with the longest texts.
        rows_a_rank: how many consecutive rows go to one rank before the next one's begin; None = its share of a block.
        max_characters: what a text counts at most when rows are dealt, as longer ones are cut; None = all of it.

    Raises:
        UserError: a source has fewer rows than a block.
    """

    def __init__(
        self,
        rows: SourceRows,
        block_size: int,
        seed: int,
        *,
        num_ranks: int = 1,
        rows_a_rank: int | None = None,
        max_characters: int | None = None,
    ) -> None:
        for source, size in zip(rows.sources, rows.sizes, strict=True):
            if size < block_size:
                raise UserError(
                    f"source {source.name!r} has {size} rows, fewer than the {block_size} of one batch; "
                    "leave it out of `sources` or make the batch smaller."
                )
        self.rows = rows
        self.sizes = rows.sizes
        self.block_size = block_size
        self.num_ranks = num_ranks
        self.group_size = num_ranks * (rows_a_rank or block_size // num_ranks)
        self.max_characters = max_characters
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields; the trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(size - size % self.block_size for size in self.sizes)

    def __iter__(self) -> Iterator[int]:
        return self.rows_from(0)

    def rows_from(self, place: int) -> Iterator[int]:
        """The order from a place on at which a step begins; the rows before it are not looked at."""
        order = block_order(self.sizes, self.block_size, self.seed, self.epoch)[place:]
        first = self.epoch * sum(self.sizes) if self.rows.drawn_anew else 0
        if self.num_ranks == 1:
            return map(int, first + order)  # a list of so many integers would take four times the array's memory
        dealt = chain.from_iterable(map(self._dealt, order.reshape(-1, self.group_size)))
        return (first + index for index in dealt)

    def _dealt(self, group: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
        dealt: list[int] = group[deal(self.rows.lengths(group, self.max_characters), self.num_ranks)].tolist()
        return dealt
