"""Sources, their files and the order of rows, on small files written by each test."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_jsonl
from torch.utils.data import BatchSampler

from llm2vec.data.lines import check_row
from llm2vec.data.order import OneSourceBlocks, block_order
from llm2vec.data.reading import Reading
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source, e5_sources, read_sources_file, select_sources
from llm2vec.files import parse_object
from llm2vec.types import Example, InstructedText, UserError

TABLES = Path(__file__).parents[3] / "shared/paper/tables.json"


def raw_rows(name: str, count: int) -> list[dict[str, Any]]:
    """`count` rows that say where they come from, with two negatives each."""
    return [
        {"query": f"{name} q{i}", "positive": f"{name} d{i}", "negative": [f"{name} n{i}", f"{name} m{i}"]}
        for i in range(count)
    ]


def make_sources(folder: Path, sizes: dict[str, int]) -> list[Source]:
    """A file of `sizes[name]` rows for each source."""
    for name, size in sizes.items():
        write_jsonl(folder / f"{name}.jsonl", raw_rows(name, size))
    return [Source(name, f"{name}.jsonl", (Instruction(f"find {name}"),)) for name in sizes]


def rows_of(folder: Path, **sizes: int) -> TrainingRows:
    return TrainingRows(folder, make_sources(folder, sizes))


# The paper's sources


def test_the_release_has_14_sources_and_16_instructions() -> None:
    """One file each, named after the source; NLI and Quora have two instructions."""
    sources = e5_sources()
    assert len(sources) == 14
    assert sum(len(source.instructions) for source in sources) == 16
    assert [source.file for source in sources] == [f"{source.name}.jsonl" for source in sources]
    assert {s.name for s in sources if len(s.instructions) == 2} == {"allnli", "quora_duplicates"}


@pytest.mark.skipif(not TABLES.is_file(), reason="needs the paper's tables beside the project")
def test_instructions_are_those_of_table_6() -> None:
    """Word for word and in the paper's order."""
    table = json.loads(TABLES.read_text(encoding="utf-8"))["table_6"]["datasets"]
    assert {source.name: [i.text for i in source.instructions] for source in e5_sources()} == {
        entry["file_stem"]: entry["instructions"] for entry in table.values()
    }


def test_symmetric_instructions_are_those_of_similarity() -> None:
    """NLI's second instruction and both of Quora compare like with like; all others retrieve."""
    symmetric = [(source.name, i.text) for source in e5_sources() for i in source.instructions if i.symmetric]
    assert symmetric == [
        ("allnli", "Retrieve semantically similar text"),
        (
            "quora_duplicates",
            "Given a question, retrieve questions that are semantically equivalent to the given question",
        ),
        ("quora_duplicates", "Find questions that have the same meaning as the input question"),
    ]


def test_selecting_sources_keeps_the_order_of_the_table() -> None:
    assert [s.name for s in select_sources(e5_sources(), ["squad", "allnli"])] == ["allnli", "squad"]
    assert select_sources(e5_sources(), None) == e5_sources()


def test_selecting_an_unknown_source_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"sources: 'msmarco' is not known; known: allnli, dureader, .*trivia_qa\."):
        select_sources(e5_sources(), ["squad", "msmarco"])


def test_selecting_nothing_is_an_error() -> None:
    """An empty list would train on no rows at all."""
    with pytest.raises(UserError, match="sources"):
        select_sources(e5_sources(), [])


# Rows


def test_count_and_items(tmp_path: Path) -> None:
    """The running index goes through the files in order; first, border, middle and last row are where they belong."""
    rows = rows_of(tmp_path, a=3, b=5, c=1)
    assert len(rows) == 9
    assert rows.sizes == [3, 5, 1]
    expected = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2), ("b", 3), ("b", 4), ("c", 0)]
    assert [rows[index] for index in range(9)] == [
        Example(
            name,
            InstructedText(f"find {name}", f"{name} q{i}"),
            InstructedText("", f"{name} d{i}", "document"),
            (InstructedText("", f"{name} n{i}", "document"),),
        )
        for name, i in expected
    ]
    with pytest.raises(IndexError):
        rows[9]


@pytest.mark.parametrize(("num_negatives", "expected"), [(0, []), (1, ["a n1"]), (2, ["a n1", "a m1"])])
def test_the_first_negatives_are_read(tmp_path: Path, num_negatives: int, expected: list[str]) -> None:
    rows = TrainingRows(tmp_path, make_sources(tmp_path, {"a": 2}), num_negatives=num_negatives)
    assert [negative.text for negative in rows[1].negatives] == expected


def test_a_negative_may_be_one_string(tmp_path: Path) -> None:
    """As in the released archive."""
    write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "positive": "d", "negative": "n"}])
    rows = TrainingRows(tmp_path, [Source("a", "a.jsonl", (Instruction(""),))])
    documents = [InstructedText("", text, "document") for text in "dn"]
    assert rows[0] == Example("a", InstructedText("", "q"), documents[0], (documents[1],))


def test_negatives_need_not_be_there_where_none_are_read(tmp_path: Path) -> None:
    """Stage I reads none."""
    write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "positive": "d"}])
    rows = TrainingRows(tmp_path, [Source("a", "a.jsonl", (Instruction("find"),))], num_negatives=0)
    assert rows[0] == Example("a", InstructedText("find", "q"), InstructedText("", "d", "document"), ())


def test_max_rows_bounds_each_source(tmp_path: Path) -> None:
    """From the start of each file; a shorter file is read whole."""
    rows = TrainingRows(tmp_path, make_sources(tmp_path, {"a": 5, "b": 1}), max_rows=2)
    assert [rows[i].query.text for i in range(len(rows))] == ["a q0", "a q1", "b q0"]


def test_texts_come_back_as_written(tmp_path: Path) -> None:
    """Unicode, line breaks, quotes and blanks, through the file and the table."""
    text = ' 東京\n"naïve"\t👩‍👩‍👧 \\ e\u0301\u2028'
    write_jsonl(tmp_path / "a.jsonl", [{"query": text, "positive": text, "negative": text}])
    as_released = Reading(keep_equal_negatives=True)
    row = TrainingRows(tmp_path, [Source("a", "a.jsonl", (Instruction(""),), as_released)])[0]
    assert row.query.text == row.positive.text == row.negatives[0].text == text


def test_instructions_take_turns_by_row(tmp_path: Path) -> None:
    """Row i is read under instruction i modulo their number, counted within its source."""
    make_sources(tmp_path, {"first": 3, "second": 4})
    sources = [
        Source("first", "first.jsonl", (Instruction("find it"),)),
        Source("second", "second.jsonl", (Instruction("even"), Instruction("odd"))),
    ]
    rows = TrainingRows(tmp_path, sources)
    assert [rows[i].query.instruction for i in range(7)] == ["find it"] * 3 + ["even", "odd", "even", "odd"]


@pytest.mark.parametrize(("choice", "on_documents"), [("documented", "same"), ("as_released", "")])
def test_symmetric_instructions(tmp_path: Path, choice: Any, on_documents: str) -> None:
    """`documented` puts a symmetric instruction on positives and negatives of its own rows, `as_released` never."""
    make_sources(tmp_path, {"a": 2})
    source = Source("a", "a.jsonl", (Instruction("retrieve"), Instruction("same", symmetric=True)))
    rows = TrainingRows(tmp_path, [source], symmetric_instructions=choice)
    assert [rows[0].query.instruction, rows[1].query.instruction] == ["retrieve", "same"]
    assert [rows[0].positive.instruction, rows[0].negatives[0].instruction] == ["", ""]
    assert [rows[1].positive.instruction, rows[1].negatives[0].instruction] == [on_documents, on_documents]


# One's own sources


def write_table(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_sources_file(tmp_path: Path) -> None:
    """A name, a file, no, one or several instructions, on one side or both."""
    table = {
        "bare": {"file": "x.jsonl"},
        "one": {"file": "sub/y.jsonl", "instruction": "find", "symmetric": True},
        "many": {"file": "z.jsonl", "instruction": ["find", "same"]},
        "mixed": {"file": "z.jsonl", "instruction": ["find", "same"], "symmetric": [False, True]},
    }
    assert read_sources_file(write_table(tmp_path / "s.json", table)) == [
        Source("bare", "x.jsonl", (Instruction(""),)),
        Source("one", "sub/y.jsonl", (Instruction("find", True),)),
        Source("many", "z.jsonl", (Instruction("find"), Instruction("same"))),
        Source("mixed", "z.jsonl", (Instruction("find"), Instruction("same", True))),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([], "a JSON object is needed"),
        ({}, "must hold an object"),
        ({"a": "x.jsonl"}, "source 'a': an object with file, instruction and symmetric is needed"),
        ({"a": {"file": "x", "instructions": "y"}}, "source 'a': unknown key 'instructions'; known: file, instruction"),
        ({"a": {}}, "source 'a': `file` must name a JSONL file"),
        ({"a": {"file": ""}}, "source 'a': `file` must name a JSONL file"),
        ({"a": {"file": 3}}, "source 'a': `file` must name a JSONL file"),
        ({"a": {"file": "x", "symmetric": "yes"}}, "source 'a': `symmetric` must be true or false"),
        ({"a": {"file": "x", "symmetric": [True, False]}}, "or a list of these, one for each instruction"),
        ({"a": {"file": "x", "instruction": ["y", "z"], "symmetric": [True, 1]}}, "`symmetric` must be true or"),
        ({"a": {"file": "x", "instruction": []}}, "source 'a': `instruction` must be a string or a list of strings"),
        ({"a": {"file": "x", "instruction": [1]}}, "source 'a': `instruction` must be a string or a list of strings"),
        ({"b": {"file": "x"}, "a": {"file": "x", "instruction": None}}, "source 'a': `instruction` must be a string"),
    ],
)
def test_a_wrong_sources_file_names_file_source_and_key(tmp_path: Path, content: Any, message: str) -> None:
    path = write_table(tmp_path / "s.json", content)
    with pytest.raises(UserError) as error:
        read_sources_file(path)
    assert str(error.value).startswith(f"sources_file: {path}")
    assert message in str(error.value)


def test_a_missing_sources_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sources_file: .*none\.json: cannot be read \(No such file"):
        read_sources_file(tmp_path / "none.json")


# What is wrong with a file


GOOD = b'{"query": "q", "positive": "d", "negative": ["n"]}'
BAD_LINES = {
    "cut": (b'{"query": "q", "positive"', "not valid JSON"),
    "blank": (b"", "not valid JSON"),
    "two values": (GOOD + GOOD, "not valid JSON"),
    "latin-1": (b'{"query": "caf\xe9", "positive": "d", "negative": "n"}', "not valid JSON ('utf-8' codec"),
    "half a surrogate pair": (b'{"query": "a \\ud83d b", "positive": "d", "negative": "n"}', "`query`"),
    "list": (b'["q", "d", "n"]', "a JSON object is needed, not a list"),
    "string": (b'"q"', "a JSON object is needed, not a str"),
    "null": (b"null", "a JSON object is needed, not a NoneType"),
    "no query": (b'{"positive": "d", "negative": "n"}', "the field `query` is missing"),
    "no positive": (b'{"query": "q", "negative": "n"}', "the field `positive` is missing"),
    "no negative": (b'{"query": "q", "positive": "d"}', "the field `negative` is missing"),
    "empty query": (b'{"query": "", "positive": "d", "negative": "n"}', "`query` is empty"),
    "blank positive": (b'{"query": "q", "positive": " \\n\\t", "negative": "n"}', "`positive` is empty"),
    "empty negative": (b'{"query": "q", "positive": "d", "negative": ""}', "`negative` is empty"),
    "number": (b'{"query": 3, "positive": "d", "negative": "n"}', "`query` must be text, not a int"),
    "null query": (b'{"query": null, "positive": "d", "negative": "n"}', "`query` must be text, not a NoneType"),
    "list of positives": (b'{"query": "q", "positive": ["d"], "negative": "n"}', "`positive` must be text, not a list"),
    "negative object": (
        b'{"query": "q", "positive": "d", "negative": {"text": "n"}}',
        "`negative` must be a string or",
    ),
    "negative number": (b'{"query": "q", "positive": "d", "negative": [1]}', "`negative` must be text, not a int"),
    "no negatives": (
        b'{"query": "q", "positive": "d", "negative": []}',
        "0 hard negatives, but num_hard_negatives is 1; set it to 0, or find more by `llm2vec mine`.",
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_wrong_line_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    """Found when the data is opened, on line 3 of a file whose other lines are good."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([GOOD, GOOD, line, GOOD]) + b"\n")
    with pytest.raises(UserError) as error:
        TrainingRows(tmp_path, [Source("a", "a.jsonl", (Instruction(""),))])
    assert str(error.value).startswith(f"{file.resolve()}, line 3: ")
    assert message in str(error.value)


def test_too_few_negatives_says_how_many(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: 2 hard negatives, but num_hard_negatives is 3"):
        TrainingRows(tmp_path, make_sources(tmp_path, {"a": 1}), num_negatives=3)


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_row_is_one_line(line: bytes, message: str) -> None:
    """Parsed alone, it says the same, so a tool that writes rows can check them so."""
    assert check_row(parse_object(GOOD, "here"), 1, "here") == {"query": "q", "positive": "d", "negative": ["n"]}
    with pytest.raises(UserError) as error:
        check_row(parse_object(line, "here"), 1, "here")
    assert str(error.value).startswith("here: ")
    assert message in str(error.value)


def test_an_error_is_not_remembered(tmp_path: Path) -> None:
    """Once the line is mended the same call reads the file."""
    source = Source("a", "a.jsonl", (Instruction(""),))
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n{\n")
    with pytest.raises(UserError, match="line 2"):
        TrainingRows(tmp_path, [source])
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + GOOD + b"\n")
    assert len(TrainingRows(tmp_path, [source])) == 2


def test_missing_files_are_listed(tmp_path: Path) -> None:
    """All at once, with the folder that was searched; and where the archive is to be had, if they are the archive's."""
    sources = make_sources(tmp_path, {"a": 1, "nq": 1, "fever": 1})
    for name in ("a", "nq"):
        (tmp_path / f"{name}.jsonl").unlink()
    with pytest.raises(UserError) as error:
        TrainingRows(tmp_path, sources)
    assert str(error.value) == f"dataset_file_path: {tmp_path} lacks a.jsonl, nq.jsonl."
    with pytest.raises(UserError) as error:
        TrainingRows(tmp_path, sources[1:])
    assert f"dataset_file_path: {tmp_path} lacks nq.jsonl; " in str(error.value)
    assert "https://" in str(error.value)


def test_a_missing_folder_lists_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        TrainingRows(tmp_path / "none", e5_sources())
    assert f"{tmp_path / 'none'} is not a folder (wanted: allnli.jsonl, " in str(error.value)
    assert all(source.file in str(error.value) for source in e5_sources())
    assert "https://" in str(error.value)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    """Named when the data is opened, as one that is missing is."""
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.jsonl"):
        TrainingRows(tmp_path, [Source("a", "a.jsonl", (Instruction(""),))])


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """Even when its size stays: the table on disk is not stale."""
    source = Source("a", "a.jsonl", (Instruction(""),))
    file = write_jsonl(tmp_path / "a.jsonl", raw_rows("old", 2))
    before = TrainingRows(tmp_path, [source])
    write_jsonl(file, raw_rows("new", 2))
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    after = TrainingRows(tmp_path, [source])
    assert [before[0].query.text, after[0].query.text] == ["old q0", "new q0"]


def test_tables_of_other_settings_do_not_mix(tmp_path: Path) -> None:
    """Two files of one name, and two numbers of negatives of one file, are tables of their own."""
    here, there = tmp_path / "here", tmp_path / "there"
    sources = make_sources(here, {"a": 1})
    write_jsonl(there / "a.jsonl", raw_rows("other", 1))
    assert TrainingRows(here, sources)[0].query.text == "a q0"
    assert TrainingRows(there, sources)[0].query.text == "other q0"
    assert len(TrainingRows(here, sources, num_negatives=2)[0].negatives) == 2
    assert len(TrainingRows(here, sources, num_negatives=1)[0].negatives) == 1


# Order


SIZES = [13, 4, 22]


def source_of(index: int) -> int:
    """Which of SIZES a running index falls into."""
    return int(np.searchsorted(np.cumsum(SIZES), index, side="right"))


def test_block_order_is_a_function_of_seed_and_epoch() -> None:
    """Equal arguments give equal orders, whatever the global generators did; another seed or epoch another."""
    reference = block_order(SIZES, 4, seed=1, epoch=0)
    np.random.seed(5)
    assert np.array_equal(block_order(SIZES, 4, seed=1, epoch=0), reference)
    assert not np.array_equal(block_order(SIZES, 4, seed=1, epoch=1), reference)
    assert not np.array_equal(block_order(SIZES, 4, seed=2, epoch=0), reference)
    assert not np.array_equal(block_order(SIZES, 4, seed=1, epoch=2), block_order(SIZES, 4, seed=2, epoch=1))


def test_block_order_leaves_the_global_generator_alone() -> None:
    np.random.seed(0)
    before = repr(np.random.get_state())
    block_order(SIZES, 4, seed=1, epoch=0)
    assert repr(np.random.get_state()) == before


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_blocks_hold_one_source_and_each_row_once(block_size: int) -> None:
    """Every complete block of every source is there, none twice, and the rows of a block are of one source."""
    blocks = block_order(SIZES, block_size, seed=0, epoch=0).reshape(-1, block_size)
    assert all(len({source_of(index) for index in block}) == 1 for block in blocks)
    assert len(np.unique(blocks)) == blocks.size
    assert Counter(source_of(block[0]) for block in blocks) == {
        which: size // block_size for which, size in enumerate(SIZES)
    }


def test_blocks_are_shuffled_and_rows_change_partners() -> None:
    """Sources alternate, and the next epoch puts other rows together (and leaves others out)."""
    first, second = (block_order([40, 43], 4, seed=0, epoch=epoch).reshape(-1, 4) for epoch in (0, 1))
    sources = [int(block[0] >= 40) for block in first]
    assert sources not in (sorted(sources), sorted(sources, reverse=True))
    assert not {frozenset(block.tolist()) for block in first} & {frozenset(block.tolist()) for block in second}
    left_out = [set(range(83)) - set(epoch.ravel().tolist()) for epoch in (first, second)]
    assert [len(rows) for rows in left_out] == [3, 3]
    assert left_out[0] != left_out[1]


def test_the_order_is_the_recorded_one() -> None:
    """So that a change of it, and with it of every published run, is noticed."""
    assert block_order([5, 4], 2, seed=42, epoch=0).tolist() == [7, 5, 4, 2, 3, 1, 8, 6]


@pytest.mark.parametrize(
    ("per_device", "processes", "accumulation"), [(12, 1, 1), (1, 1, 12), (6, 2, 1), (3, 2, 2), (2, 3, 2), (1, 4, 3)]
)
def test_a_step_holds_the_same_rows_however_it_is_split(
    tmp_path: Path, per_device: int, processes: int, accumulation: int
) -> None:
    """Blocks of 12: whatever processes and accumulation share them, each step has the rows of the whole batch."""
    rows = rows_of(tmp_path, a=40, b=26)
    block_size = per_device * processes * accumulation
    micro_batches = list(BatchSampler(OneSourceBlocks(rows, block_size, seed=3), per_device, drop_last=True))
    per_step = processes * accumulation
    steps = [
        sorted(index for micro_batch in micro_batches[i : i + per_step] for index in micro_batch)
        for i in range(0, len(micro_batches), per_step)
    ]
    assert steps == [sorted(block) for block in block_order([40, 26], 12, seed=3, epoch=0).reshape(-1, 12).tolist()]
    assert all(len({rows[index].source for index in step}) == 1 for step in steps)


def test_sampler_follows_the_epoch(tmp_path: Path) -> None:
    """Its length is what it yields; set_epoch chooses the order; iterating twice repeats it."""
    sampler = OneSourceBlocks(rows_of(tmp_path, a=7, b=9), 3, seed=1)
    first = list(sampler)
    assert len(sampler) == len(first) == 15
    assert first == list(sampler) == block_order([7, 9], 3, seed=1, epoch=0).tolist()
    sampler.set_epoch(4)
    assert list(sampler) == block_order([7, 9], 3, seed=1, epoch=4).tolist() != first


def test_a_source_smaller_than_a_batch_is_an_error(tmp_path: Path) -> None:
    """Instead of never being drawn; one that just fills a batch is fine."""
    rows = rows_of(tmp_path, a=8, b=3)
    assert len(OneSourceBlocks(rows, 3, seed=0)) == 9
    with pytest.raises(UserError, match=r"source 'b' has 3 rows, fewer than the 4 of one batch; leave it out"):
        OneSourceBlocks(rows, 4, seed=0)
