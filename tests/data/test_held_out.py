"""Queries held out of training data: nothing of them is trained on, and what they make is a retrieval set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import write_jsonl

from llm2vec.commands.data.hold_out import main
from llm2vec.data import held_out
from llm2vec.data.held_out import hold_out
from llm2vec.data.reading import Reading
from llm2vec.data.sources import Instruction, Source, read_sources_file
from llm2vec.types import UserError

BIG, SMALL = (
    Source(name, f"{name}.jsonl", (Instruction(f"find a {name}"), Instruction("or this"))) for name in ("big", "small")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 rows over 30 queries; a row's negative is the positive of the query after it; a source of 4 rows."""
    rows = [{"query": f"q{i // 2}", "positive": f"d{i}", "negative": [f"d{(i + 2) % 60}", f"n{i}"]} for i in range(60)]
    write_jsonl(tmp_path / "data/big.jsonl", rows)
    write_jsonl(tmp_path / "data/small.jsonl", [{"query": f"s{i}", "positive": f"d{i}"} for i in range(4)])
    return tmp_path


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_no_row_that_remains_shows_a_held_out_text(folder: Path) -> None:
    found = hold_out(folder / "data", [BIG, SMALL], folder / "out", num_queries=5, seed=1)
    task = folder / "out/eval/HeldOut-big"
    queries, corpus = (
        {line["_id"]: line["text"] for line in lines(task / f"{n}.jsonl")} for n in ("queries", "corpus")
    )
    judged = {(queries[line["query-id"]], corpus[line["corpus-id"]]) for line in lines(task / "qrels/test.jsonl")}
    assert len(queries) == 5 and judged == {(q, f"d{2 * int(q[1:]) + i}") for q in queries.values() for i in (0, 1)}
    secret = {text for pair in judged for text in pair}
    kept = [*lines(folder / "out/train/big.jsonl"), *lines(folder / "out/train/small.jsonl")]
    assert kept and not any(secret & {row["query"], row["positive"], *row["negative"]} for row in kept)
    assert {row["query"] for row in lines(folder / "data/big.jsonl")} - set(queries.values()) >= {
        row["query"] for row in kept if row["query"].startswith("q")
    }
    dropped = 60 + 4 - len(kept)
    assert sum(one.dropped for one in found) == dropped >= 10
    assert [(one.source, one.queries) for one in found] == [("big", 5), ("small", 0)], "one is too small"
    assert len(corpus) == found[0].documents == len(set(corpus.values()))
    instructions = json.loads((folder / "out/eval/instructions.json").read_text(encoding="utf-8"))
    assert instructions == {"HeldOut-big": "find a big"}


def test_each_source_has_a_file_of_its_own_and_none_is_written_over(tmp_path: Path) -> None:
    """Of a source outside the data's folder, of two that share a file, and of one named like another's file."""
    rows = [{"a": f"a{i}", "b": f"b{i}", "c": f"c{i}"} for i in range(20)]
    of_ab, of_cb = (Reading(columns=(("query", (name,)), ("positive", ("b",)))) for name in ("a", "c"))
    outside, shared = tmp_path / "outside.jsonl", tmp_path / "data/x.jsonl"
    for file in (outside, shared):
        write_jsonl(file, rows)
    sources = [
        Source(name, file, (Instruction("find"),), reading)
        for name, file, reading in [
            ("first", "x.jsonl", of_ab), ("x", "x.jsonl", of_cb), ("far", str(outside), of_ab),
            ("up", "../outside.jsonl", of_cb),
        ]
    ]  # fmt: skip
    hold_out(shared.parent, sources, tmp_path / "out/split", num_queries=2, seed=1)
    assert lines(outside) == lines(shared) == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out", "outside.jsonl"]
    written = read_sources_file(tmp_path / "out/split/sources.json")
    assert [(one.name, one.file) for one in written] == [(one.name, f"{one.name}.jsonl") for one in sources]
    for source in written:
        kept = lines(source.place(tmp_path / "out/split/train"))
        letter = "a" if source.name in ("first", "far") else "c"
        assert 20 > len(kept) >= 12 and {row["query"][0] for row in kept} == {letter}


def test_blanks_around_a_text_hide_no_held_out_one(tmp_path: Path) -> None:
    """Training strips them, so a row that differs by them alone shows the same text."""
    plain = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"p{(i + 1) % 20}"} for i in range(20)]
    blank = [
        {"query": f"q{i} ", "positive": f"z{i}", "negative": f"\tp{i}"} for i in range(0, 20, 2)
    ] + [{"query": f"y{i}", "positive": f"p{i}\n", "negative": f"n{i}"} for i in range(20)]  # fmt: skip
    write_jsonl(tmp_path / "data/big.jsonl", [*plain, *blank])
    write_jsonl(tmp_path / "data/small.jsonl", [{"query": f"s{i}", "positive": f" p{i}"} for i in range(20)])
    hold_out(tmp_path / "data", [BIG, SMALL], tmp_path / "out", num_queries=8, seed=1)
    task = tmp_path / "out/eval/HeldOut-big"
    queries, corpus = ([line["text"] for line in lines(task / f"{n}.jsonl")] for n in ("queries", "corpus"))
    assert len(queries) == len({text.strip() for text in queries}) == 8
    assert len(corpus) == len({text.strip() for text in corpus})
    names = {line["_id"]: line["text"].strip() for n in ("queries", "corpus") for line in lines(task / f"{n}.jsonl")}
    judged = {(names[line["query-id"]], names[line["corpus-id"]]) for line in lines(task / "qrels/test.jsonl")}
    pairs = {(row["query"].strip(), row["positive"].strip()) for row in [*plain, *blank]}
    assert judged == {pair for pair in pairs if pair[0] in queries}, "a query's pairs, with blanks or without"
    secret = {text for pair in judged for text in pair}
    for name in ("big", "small"):
        kept = lines(tmp_path / f"out/train/{name}.jsonl")
        assert kept and not any(
            secret & {text.strip() for text in (row["query"], row["positive"], *row["negative"])} for row in kept
        )


def test_the_draw_depends_on_the_seed_alone(folder: Path) -> None:
    drawn = []
    for i, seed in enumerate((1, 1, 2)):
        hold_out(folder / "data", [BIG], folder / f"out{i}", num_queries=5, seed=seed)
        drawn.append((folder / f"out{i}/eval/HeldOut-big/queries.jsonl").read_text(encoding="utf-8"))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_mistake_is_one_sentence_and_nothing_is_written(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no source in .* has the 75 different queries that holding out 15 takes"):
        hold_out(folder / "data", [BIG, SMALL], folder / "out", num_queries=15, seed=1)
    with (folder / "data/small.jsonl").open("a") as file:
        file.write('{"query": "x"}\n')
    with pytest.raises(UserError, match=r"small\.jsonl, line 5: the field `positive` is missing"):
        hold_out(folder / "data", [BIG, SMALL], folder / "out", num_queries=5, seed=1)
    assert not (folder / "out").exists()
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        hold_out(folder / "data", [BIG], folder, num_queries=5, seed=1)


def test_a_killed_split_leaves_nothing_in_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(held_out, "_write_set", killed)
        with pytest.raises(KeyboardInterrupt):
            hold_out(folder / "data", [BIG], folder / "out", num_queries=5, seed=1)
    assert not (folder / "out").exists()
    assert hold_out(folder / "data", [BIG], folder / "out", num_queries=5, seed=1)[0].queries == 5
    assert sorted(path.name for path in folder.iterdir()) == ["data", "out"]


def test_the_command_says_what_became_of_each_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {source.name: {"file": source.file} for source in (BIG, SMALL)}
    table["absent"] = {"file": "absent.jsonl"}
    (folder / "table.json").write_text(json.dumps(table))
    options = ["--sources_file", str(folder / "table.json"), "--queries", "5"]
    main([str(folder / "data"), str(folder / "out"), *options])
    said = capsys.readouterr().out
    assert "not there: absent.jsonl" in said and "nothing held out of small: fewer than 25 different queries" in said
    assert said.count("big ") == 1
