"""Vectors of a corpus: the right ones, all of them, once, whatever stopped in between; and what is refused."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import WORDS, family_tokenizer, tiny_model, write_jsonl

from llm2vec.choice import ModelChoice
from llm2vec.commands.encode import main as encode_by_command
from llm2vec.corpus import encoding as corpus_encoding
from llm2vec.corpus import rows as corpus_rows
from llm2vec.corpus.encoding import (
    MANIFEST_FILE,
    CorpusEncoding,
    ShardEncoder,
    encode_corpus,
    encode_locally,
    part_name,
)
from llm2vec.corpus.rows import cut_into_shards, open_corpus
from llm2vec.files import sha256, write_json
from llm2vec.llm2vec import LLM2Vec
from llm2vec.types import UserError

SCRIPT = Path(__file__).parents[2] / "experiments/encode_corpus.py"
NUM_ROWS = 23


def make_rows(number: int) -> list[dict[str, Any]]:
    """Texts of 1 to 30 words."""
    random = np.random.default_rng(0)
    return [{"id": f"d/{i}", "text": " ".join(random.choice(WORDS, random.integers(1, 31)))} for i in range(number)]


ROWS = make_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a corpus as JSONL."""
    folder = tmp_path_factory.mktemp("corpus")
    LLM2Vec(tiny_model("llama"), family_tokenizer("llama"), template="llama3").save(folder / "model")
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LLM2Vec:
    return LLM2Vec.from_pretrained(str(folder / "model"))


@pytest.fixture
def encoding(folder: Path, tmp_path: Path) -> CorpusEncoding:
    """The corpus in three shards."""
    encoder = ModelChoice(str(folder / "model")).resolved()
    corpus = open_corpus(str(folder / "rows.jsonl"))
    return CorpusEncoding(corpus, tmp_path / "out", encoder, encoder.revision(), shard_rows=10)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that were encoded, in order."""
    shards: list[int] = []
    encode = ShardEncoder.__call__

    def count(self: ShardEncoder, shard: int) -> int:
        shards.append(shard)
        return encode(self, shard)

    monkeypatch.setattr(ShardEncoder, "__call__", count)
    return shards


def read(output: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Ids and vectors of all shards, as pyarrow reads a folder."""
    table = pq.read_table(output)
    vectors = table["vector"].combine_chunks()
    return table["id"].to_pylist(), vectors.flatten().to_numpy().reshape(len(table), -1)


def content(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.iterdir() if file.name != ".lock"}


def direct(model: LLM2Vec, texts: list[Any], **options: Any) -> np.ndarray[Any, Any]:
    """Each text encoded alone."""
    return np.concatenate([np.asarray(model.encode([t], show_progress_bar=False, **options)) for t in texts])


# --- what comes out ---


def test_every_row_has_the_vector_of_its_text(encoding: CorpusEncoding, model: LLM2Vec) -> None:
    assert encode_corpus(encoding, encode_locally) == NUM_ROWS
    ids, vectors = read(encoding.output)
    assert ids == [row["id"] for row in ROWS]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, direct(model, [row["text"] for row in ROWS], side="document"), atol=1e-6)
    parts = sorted(encoding.output.glob("part-*"))
    assert [pq.read_metadata(part).num_rows for part in parts] == [10, 10, 3]
    assert pq.read_schema(parts[0]) == pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), 32))])
    assert {path.name for path in encoding.output.iterdir()} == {*(p.name for p in parts), MANIFEST_FILE}


def test_the_manifest_says_what_was_encoded_and_how(encoding: CorpusEncoding, folder: Path) -> None:
    encode_corpus(encoding, encode_locally)
    manifest = json.loads((encoding.output / MANIFEST_FILE).read_text(encoding="utf-8"))
    for number, (rows, shard) in enumerate(zip((10, 10, 3), manifest["shards"], strict=True)):
        assert shard.pop("sha256") == sha256(encoding.output / f"part-0000{number}.parquet")
        assert len(shard.pop("texts")) == 64
        assert shard == {"file": f"part-0000{number}.parquet", "rows": rows}
    assert manifest["complete"] is True and manifest["dimension"] == 32
    settings = manifest["settings"]
    assert settings["model"] == encoding.encoder.revision() and settings["side"] == "document"
    (file,) = settings["input"]
    assert file["file"] == "rows.jsonl" and file["size"] == (folder / "rows.jsonl").stat().st_size
    assert len(file["sha256"]) == 64


def test_side_and_instruction_are_those_of_encode(encoding: CorpusEncoding, model: LLM2Vec) -> None:
    encode_corpus(dataclasses.replace(encoding, side="query", instruction="find it"), encode_locally)
    entries = [["find it", row["text"]] for row in ROWS]
    np.testing.assert_allclose(read(encoding.output)[1], direct(model, entries, side="query"), atol=1e-6)


def test_float16_is_float32_rounded(encoding: CorpusEncoding, tmp_path: Path) -> None:
    encode_corpus(encoding, encode_locally)
    half = dataclasses.replace(encoding, output=tmp_path / "half", dtype="float16")
    encode_corpus(half, encode_locally)
    vectors = read(half.output)[1]
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, read(encoding.output)[1].astype(np.float16))


def test_all_kinds_of_input_give_the_same_files(
    encoding: CorpusEncoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file or several, JSONL or Parquet, or a dataset of the hub, which is a stand-in here."""
    encode_corpus(encoding, encode_locally)
    expected = {name: data for name, data in content(encoding.output).items() if name != MANIFEST_FILE}
    write_jsonl(tmp_path / "lines/a.jsonl", ROWS[:4])
    write_jsonl(tmp_path / "lines/b.jsonl", ROWS[4:])
    renamed = pa.table({"n": list(range(NUM_ROWS)), "_id": [r["id"] for r in ROWS], "body": [r["text"] for r in ROWS]})
    pq.write_table(renamed, tmp_path / "rows.parquet", row_group_size=7)
    columns = {"id_column": "_id", "text_column": "body"}
    corpora = [open_corpus(str(tmp_path / "lines")), open_corpus(str(tmp_path / "rows.parquet"), **columns)]

    def load(name: str, subset: str | None, **options: Any) -> Any:
        from datasets import Dataset

        assert (name, subset, options) == ("a/b", "corpus", {"split": "all", "revision": "sha", "streaming": True})
        return Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(corpus_rows, "_hub_revision", lambda name: "sha")
    monkeypatch.setattr("datasets.load_dataset", load)
    corpora.append(open_corpus("a/b", subset="corpus", split="all"))
    for number, corpus in enumerate(corpora):
        other = dataclasses.replace(encoding, corpus=corpus, output=tmp_path / f"out{number}")
        encode_corpus(other, encode_locally)
        found = content(other.output)
        del found[MANIFEST_FILE]
        assert found == expected


def test_whole_numbers_are_ids_too(encoding: CorpusEncoding, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"id": 7, "text": ""}, {"id": "x", "text": "é"}])
    encode_corpus(dataclasses.replace(encoding, corpus=open_corpus(str(file))), encode_locally)
    assert read(encoding.output)[0] == ["7", "x"]


def test_rows_without_ids_are_numbered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    write_jsonl(tmp_path / "rows/a.jsonl", [{"body": "a"}, {"body": "b"}])
    write_jsonl(tmp_path / "rows/b.jsonl", [{"body": "c", "id": "not read"}])
    corpus = open_corpus(str(tmp_path / "rows"), text_column="body")
    assert list(corpus.rows()) == [("0", "a"), ("1", "b"), ("2", "c")]
    assert "has no column 'id': rows are named by their numbers, from 0" in caplog.text
    assert corpus.identity()["id_column"] is None
    pq.write_table(pa.table({"body": ["x", "y"]}), tmp_path / "rows.parquet")
    assert [*open_corpus(str(tmp_path / "rows.parquet"), text_column="body").rows()] == [("0", "x"), ("1", "y")]
    with pytest.raises(UserError, match="there is no column 'name'; there are body"):
        list(open_corpus(str(tmp_path / "rows"), text_column="body", id_column="name").rows())


# --- stopping and going on ---


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def stop_after(monkeypatch: pytest.MonkeyPatch, num_shards: int) -> Callable[[], None]:
    """Make the writing of a shard stop half-way; returns what lets it go on."""
    write, seen = pq.write_table, []

    def half(table: pa.Table, file: Path, **options: Any) -> None:
        write(table, file, **options)
        if "vector" in table.column_names:
            seen.append(file)
            if len(seen) > num_shards:
                file.write_bytes(file.read_bytes()[:-40])
                raise Killed

    monkeypatch.setattr(corpus_encoding.pq, "write_table", half)
    return lambda: monkeypatch.setattr(corpus_encoding.pq, "write_table", write)


def test_a_second_start_does_only_what_is_missing(
    encoding: CorpusEncoding, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataclasses.replace(encoding, output=tmp_path / "whole")
    encode_corpus(whole, encode_locally)
    encoded.clear()
    go_on = stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        encode_corpus(encoding, encode_locally)
    done, stopped = encoded
    assert [file.name for file in encoding.output.glob("part-*")] == [f"part-0000{done}.parquet"]
    assert len(list(encoding.output.glob(".part-*"))) == 1
    before = (encoding.output / f"part-0000{done}.parquet").stat()
    go_on()
    encoded.clear()
    assert (
        encode_corpus(encoding, encode_locally)
        == NUM_ROWS - pq.read_metadata(encoding.output / f"part-0000{done}.parquet").num_rows
    )
    assert set(encoded) == {0, 1, 2} - {done} and stopped in encoded
    assert (encoding.output / f"part-0000{done}.parquet").stat() == before
    assert content(encoding.output) == content(whole.output)
    encoded.clear()
    assert encode_corpus(encoding, encode_locally) == 0 and encoded == []


def test_what_a_killed_process_left_in_the_queue_holds_nobody_up(
    encoding: CorpusEncoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim on every shard, whose process is gone."""
    go_on = stop_after(monkeypatch, 0)
    with pytest.raises(Killed):
        encode_corpus(encoding, encode_locally)
    go_on()
    for shard in ("00000", "00001", "00002"):
        (encoding.output / ".queue/claims" / shard).write_text("1")
    assert encode_corpus(encoding, encode_locally) == NUM_ROWS


def test_a_part_that_is_cut_short_or_lost_is_made_anew(encoding: CorpusEncoding, encoded: list[int]) -> None:
    encode_corpus(encoding, encode_locally)
    before = content(encoding.output)
    (encoding.output / "part-00000.parquet").write_bytes(before["part-00000.parquet"][:-100])
    (encoding.output / "part-00002.parquet").unlink()
    encoded.clear()
    assert encode_corpus(encoding, encode_locally) == 13
    assert sorted(encoded) == [0, 2] and content(encoding.output) == before


@pytest.mark.parametrize("place", [".", ".input"])
@pytest.mark.parametrize("damage", ["a bit", "zeros", "swapped"])
def test_a_damaged_part_is_made_anew(
    place: str, damage: str, encoding: CorpusEncoding, tmp_path: Path, encoded: list[int], monkeypatch: Any
) -> None:
    """Of the vectors that are done, or of the texts that are not; readable or not. All is as if nothing had been."""
    whole = dataclasses.replace(encoding, output=tmp_path / "whole")
    encode_corpus(whole, encode_locally)
    go_on = stop_after(monkeypatch, 2 if place == "." else 0)
    with pytest.raises(Killed):
        encode_corpus(encoding, encode_locally)
    go_on()
    one, other, *_ = sorted((encoding.output / place).glob("part-*"))
    before = bytearray(one.read_bytes())
    if damage == "swapped":
        one.write_bytes(other.read_bytes())
        other.write_bytes(before)
    else:
        middle = len(before) // 2
        before[middle : middle + (1 if damage == "a bit" else 50)] = (
            bytes([before[middle] ^ 1]) if damage == "a bit" else bytes(50)
        )
        one.write_bytes(before)
    encode_corpus(encoding, encode_locally)
    assert content(encoding.output) == content(whole.output)


def test_a_kill_while_the_manifest_is_written_is_no_hindrance(
    encoding: CorpusEncoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text, under a hidden name, and no manifest: all begins again, and nothing is left of it."""

    def die(*_: Any) -> None:
        (encoding.output / f".{MANIFEST_FILE}.1").write_text("{", encoding="utf-8")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(corpus_encoding, "write_json", die)
        with pytest.raises(Killed):
            encode_corpus(encoding, encode_locally)
    assert encode_corpus(encoding, encode_locally) == NUM_ROWS
    assert all(name.startswith(("part-", "_manifest")) for name in content(encoding.output))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"settings": []}, "settings is []; an object is needed"),
        ({"shards": [{"file": "part-00000.parquet", "rows": "10"}]}, r"shards[0].texts is missing"),
        ({"shards": 3}, "shards is 3; a list is needed"),
        ({"complete": None}, "complete is None; true or false is needed"),
    ],
)
def test_a_manifest_of_another_form_is_named(encoding: CorpusEncoding, changed: dict[str, Any], said: str) -> None:
    encode_corpus(encoding, encode_locally)
    file = encoding.output / MANIFEST_FILE
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | changed)
    with pytest.raises(UserError) as error:
        encode_corpus(encoding, encode_locally)
    assert str(error.value).startswith(f"{file}: ") and said in str(error.value)


def test_texts_that_were_removed_in_part_are_cut_anew(encoding: CorpusEncoding, encoded: list[int]) -> None:
    """As by a start that was killed while it tidied up; later a part is lost."""
    encode_corpus(encoding, encode_locally)
    before = content(encoding.output)
    (encoding.output / "part-00002.parquet").unlink()
    (encoding.output / ".input").mkdir()
    (encoding.output / ".input/part-00000.parquet").write_bytes(b"left over")
    encoded.clear()
    assert encode_corpus(encoding, encode_locally) > 0
    assert encoded == [2] and content(encoding.output) == before


def test_a_start_that_died_over_the_input_begins_again(
    encoding: CorpusEncoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(corpus_encoding, "write_json", die)
        with pytest.raises(Killed):
            encode_corpus(encoding, encode_locally)
    (encoding.output / ".input.writing").mkdir()
    (encoding.output / ".input/part-00000.parquet").write_bytes(b"half")
    assert encode_corpus(encoding, encode_locally) == NUM_ROWS
    assert read(encoding.output)[0] == [row["id"] for row in ROWS]


def test_the_batch_size_may_change(encoding: CorpusEncoding, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        encode_corpus(encoding, encode_locally)
    go_on()
    assert encode_corpus(dataclasses.replace(encoding, batch_size=1), encode_locally) > 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"side": "query"}, "side ('document' there, 'query' now)"),
        ({"instruction": "find it"}, "instruction ('' there, 'find it' now)"),
        ({"shard_rows": 5, "dtype": "float16"}, "shard_rows (10 there, 5 now), dtype ('float32' there,"),
        ({"revision": "0123"}, "'0123' now)"),
    ],
)
def test_another_setting_is_refused(encoding: CorpusEncoding, changed: dict[str, Any], said: str) -> None:
    encode_corpus(encoding, encode_locally)
    before = content(encoding.output)
    with pytest.raises(UserError, match="holds vectors that differ in ") as error:
        encode_corpus(dataclasses.replace(encoding, **changed), encode_locally)
    assert said in str(error.value)
    assert content(encoding.output) == before


def test_another_input_is_refused(encoding: CorpusEncoding, tmp_path: Path) -> None:
    encode_corpus(encoding, encode_locally)
    file = write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:-1], {"id": "d/22", "text": "other"}])
    with pytest.raises(UserError, match="differ in the input's content"):
        encode_corpus(dataclasses.replace(encoding, corpus=open_corpus(str(file))), encode_locally)


def test_two_starts_do_not_work_in_one_folder(encoding: CorpusEncoding) -> None:
    encoding.output.mkdir()
    with (encoding.output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another encoding is at work here"):
            encode_corpus(encoding, encode_locally)


def test_a_worker_with_another_model_does_not_work(encoding: CorpusEncoding) -> None:
    with pytest.raises(UserError, match="holds another model here than where the encoding was started"):
        encode_corpus(dataclasses.replace(encoding, revision="0123"), encode_locally)


# --- what is refused ---


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "The input has no rows."),
        ('{"id": 1, "text": "a"}\n{"id": 2, "text": 3}\n', "rows.jsonl, line 2: 'text' must be a string, not a int."),
        ('{"id": 1, "text": null}\n', "rows.jsonl, line 1: 'text' must be a string, not null."),
        ('{"id": 1, "body": "a"}\n', "rows.jsonl, line 1: there is no column 'text'; there are id, body."),
        ('{"id": 1, "text": "a"}\n{"text": "a"}\n', "rows.jsonl, line 2: there is no column 'id'; there are text."),
        ('{"id": 1.5, "text": "a"}\n', "'id' must be a string or a whole number, not a float."),
        ('{"id": true, "text": "a"}\n', "'id' must be a string or a whole number, not a bool."),
        ('{"id": 1, "text": "a"\n', "rows.jsonl, line 1: not valid JSON"),
        ('{"id": 1, "text": "a"}\n\n', "rows.jsonl, line 2: not valid JSON"),
        ("[1]\n", "rows.jsonl, line 1: a JSON object is needed, not a list."),
        ('{"id": 1, "text": "\\ud800"}\n', "rows.jsonl, line 1: `text` holds half a surrogate pair"),
        (
            "".join(f'{{"id": "{name}", "text": "a"}}\n' for name in "abcdefghijklba"),
            "The id 'a' comes twice, in rows 1 and 14 of the input (2 ids come more than once)",
        ),
        ('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n', "The id '1' comes twice, in rows 1 and 2"),
    ],
)
def test_a_malformed_input_is_refused_before_the_model_loads(
    encoding: CorpusEncoding, tmp_path: Path, lines: str, said: str, encoded: list[int]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(UserError) as error:
        encode_corpus(dataclasses.replace(encoding, corpus=open_corpus(str(file))), encode_locally)
    assert said in str(error.value)
    assert encoded == [] and {path.name for path in encoding.output.glob("*")} <= {".lock"}


def test_ids_may_be_more_than_two_gigabytes(
    encoding: CorpusEncoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow gives up on that much of its type `string`, after the whole input was read."""
    count, types = corpus_rows.pc.value_counts, []

    def noting(ids: pa.ChunkedArray) -> Any:
        types.append(ids.type)
        return count(ids)

    monkeypatch.setattr(corpus_rows.pc, "value_counts", noting)
    assert cut_into_shards(encoding.corpus.rows(), tmp_path / "shards", 7, part_name)
    assert types == [pa.large_string()]


def test_a_malformed_parquet_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"

    def said_of(table: pa.Table) -> str:
        pq.write_table(table, file)
        with pytest.raises(UserError) as error:
            list(open_corpus(str(file)).rows())
        return str(error.value)

    assert "rows.parquet, row 2: 'text' must be a string, not null." in said_of(
        pa.table({"id": [1, 2], "text": ["", None]})
    )
    assert "rows.parquet, row 1: 'text' must be a string, not a int." in said_of(pa.table({"id": [1], "text": [5]}))
    assert "row 1: there is no column 'text'; there are id, a, b." in said_of(pa.table({"id": [1], "a": [5], "b": [5]}))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a whole Parquet file"):
        list(open_corpus(str(file)).rows())
    pq.write_table(pa.table({"id": range(2000), "text": [f"text {i}" for i in range(2000)]}), file)
    content = bytearray(file.read_bytes())
    content[len(content) // 4 : len(content) // 2] = b"\xff" * (len(content) // 2 - len(content) // 4)
    file.write_bytes(content)  # pages that cannot be decompressed
    with pytest.raises(UserError, match=r"rows\.parquet: not a whole Parquet file"):
        list(open_corpus(str(file)).rows())


def test_an_input_that_is_not_there_is_refused(tmp_path: Path, folder: Path) -> None:
    for name in (str(tmp_path / "nothing"), "nothing.jsonl", "a/b/c"):
        with pytest.raises(UserError, match=f"There is no file or folder {name}"):
            open_corpus(name)
    with pytest.raises(UserError, match="no such dataset was found on the hub"):
        open_corpus("nobody/nothing")  # the tests are offline
    with pytest.raises(UserError, match="are for datasets of the hub"):
        open_corpus(str(folder / "rows.jsonl"), split="train")
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match=r"a \.jsonl or a \.parquet file is needed"):
        open_corpus(str(tmp_path / "a.csv"))
    (tmp_path / "folder.jsonl").mkdir()
    for names in ([], ["a.jsonl", "b.parquet"]):
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(UserError, match=r"a folder of either \.jsonl or \.parquet files"):
            open_corpus(str(tmp_path))


def test_a_folder_with_other_content_is_refused_and_left_alone(encoding: CorpusEncoding) -> None:
    encoding.output.mkdir()
    (encoding.output / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds 'thesis\.tex' and no _manifest\.json"):
        encode_corpus(encoding, encode_locally)
    assert [path.name for path in encoding.output.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        encode_corpus(dataclasses.replace(encoding, output=encoding.output / "thesis.tex"), encode_locally)


def test_a_folder_that_cannot_be_made_is_one_sentence(encoding: CorpusEncoding, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/vectors cannot be made or written to \(Not a directory\)"):
        encode_corpus(dataclasses.replace(encoding, output=tmp_path / "file/vectors"), encode_locally)


@pytest.mark.parametrize(
    ("dtype", "number", "said"),
    [
        ("float16", 1e5, "has a number that is too large for float16; use --dtype float32"),
        ("float32", np.nan, "has a number that is not finite"),
        ("float16", np.inf, "has a number that is not finite"),
    ],
)
def test_a_vector_that_cannot_be_stored_is_refused(
    encoding: CorpusEncoding, monkeypatch: pytest.MonkeyPatch, dtype: Any, number: float, said: str
) -> None:
    encode = LLM2Vec.encode

    def with_one_wrong(self: LLM2Vec, sentences: list[str], *arguments: Any, **options: Any) -> Any:
        vectors = encode(self, sentences, *arguments, **options)
        if ROWS[12]["text"] in sentences:
            vectors[sentences.index(ROWS[12]["text"]), 3] = number
        return vectors

    monkeypatch.setattr(LLM2Vec, "encode", with_one_wrong)
    with pytest.raises(UserError, match=f"The vector of id 'd/12' {said}"):
        encode_corpus(dataclasses.replace(encoding, dtype=dtype), encode_locally)
    assert sorted(path.name for path in encoding.output.glob("part-*")) == ["part-00000.parquet", "part-00002.parquet"]


# --- the script ---


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [str(folder / "rows.jsonl"), str(output), "--model", str(folder / "model"), "--shard_rows", "10", *more]


def test_the_script_does_the_same(encoding: CorpusEncoding, folder: Path, tmp_path: Path, capsys: Any) -> None:
    runpy.run_path(str(SCRIPT))["main"](arguments(folder, tmp_path / "script"))
    assert "complete; 23 rows encoded in" in capsys.readouterr().err
    encode_corpus(encoding, encode_locally)
    assert content(tmp_path / "script") == content(encoding.output)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--shard_rows", "0"], "--shard_rows is 0; give a number above 0."),
        (["--num_workers", "-1"], "--num_workers is -1; give a number above 0."),
        (["--instruction", "\udcff"], "command line: `--instruction` holds half a surrogate pair"),
        (["--split", "train"], "--subset and --split are for datasets of the hub"),
        (["--peft", "a/b/c"], "'a/b/c' is neither a folder nor the name of a repository"),
    ],
)
def test_what_is_wrong_is_one_sentence(folder: Path, tmp_path: Path, more: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        runpy.run_path(str(SCRIPT))["main"](arguments(folder, tmp_path / "script", *more))
    assert str(error.value).startswith(said)
    assert not (tmp_path / "script").exists()


def config_of_run(folder: Path) -> Path:
    """Of rows with an instruction for their queries."""
    write_jsonl(folder / "a.jsonl", [{"query": "who is red", "positive": "it is red", "negative": "not red"}])
    write_json(folder / "sources.json", {"a": {"file": "a.jsonl", "instruction": "find it"}})
    config = {"model_name_or_path": "m", "sources_file": str(folder / "sources.json"), "output_dir": "out"}
    write_json(folder / "run.json", config)
    return folder / "run.json"


@pytest.mark.parametrize(
    "flag", [("--side", "query"), ("--text_column", "body"), ("--id_column", "n"), ("--subset", "s"), ("--split", "s")]
)
def test_a_config_has_its_own_sides_and_columns(flag: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    command = [str(config_of_run(tmp_path)), str(tmp_path / "out"), "--model", str(folder / "model"), *flag]
    with pytest.raises(UserError, match=rf"^{flag[0]}: the texts of .*run\.json have their own; leave it out\.$"):
        encode_by_command(command)
    assert not (tmp_path / "out").exists()


def test_an_instruction_stands_in_place_of_a_config_s(folder: Path, tmp_path: Path, model: LLM2Vec) -> None:
    """Before queries alone: a document of the rows has none, and gets none."""
    command = [str(config_of_run(tmp_path)), str(tmp_path / "out"), "--model", str(folder / "model")]
    encode_by_command([*command, "--instruction", "tell of it"])
    documents, queries = (read(tmp_path / "out" / name)[1] for name in ("00.document", "01.query"))
    np.testing.assert_allclose(documents, direct(model, ["it is red", "not red"], side="document"), atol=1e-6)
    np.testing.assert_allclose(queries, direct(model, [["tell of it", "who is red"]], side="query"), atol=1e-6)


def test_a_folder_that_parquet_cannot_name_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="command line: `output` holds half a surrogate pair, or is not UTF-8"):
        runpy.run_path(str(SCRIPT))["main"](arguments(folder, tmp_path / "\udcff"))


@pytest.mark.parametrize("more", [["--side", "neither"], ["--dtype", "int8"], ["--engine", "spark"]])
def test_an_unknown_word_is_refused(folder: Path, tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(UserError, match=f"^{more[0]}: invalid choice: '{more[1]}' .*; see llm2vec encode --help"):
        runpy.run_path(str(SCRIPT))["main"](arguments(folder, tmp_path / "script", *more))


# --- several processes, for real ---

# Runs the script, and dies by SIGKILL in the middle of the file of the shard that it is to die at.
KILLED = """
import os, runpy, signal, sys
import pyarrow.parquet as pq

write, seen, die_at = pq.write_table, [], int(sys.argv[1])

def write_or_die(table, file, **options):
    write(table, file, **options)
    if "vector" in table.column_names:
        seen.append(file)
        if len(seen) == die_at:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

pq.write_table = write_or_die
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_process_costs_nothing_but_time(
    encoding: CorpusEncoding, folder: Path, tmp_path: Path, encoded: list[int]
) -> None:
    """kill -9 twice; the files are those of a start that nobody disturbed, byte for byte."""
    script = [str(SCRIPT), *arguments(folder, tmp_path / "killed")]
    for num_done in (0, 1):
        killed = subprocess.run([sys.executable, "-c", KILLED, "2" if num_done else "1", *script], capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        assert len(list((tmp_path / "killed").glob("part-*"))) == num_done
        assert len(list((tmp_path / "killed").glob(".part-*"))) == num_done + 1
    runpy.run_path(str(SCRIPT))["main"](script[1:])
    assert len(encoded) == 2
    encode_corpus(encoding, encode_locally)
    assert content(tmp_path / "killed") == content(encoding.output)


@pytest.mark.slow
def test_two_workers_write_what_one_writes(
    encoding: CorpusEncoding, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = dataclasses.replace(encoding, output=tmp_path / "two", shard_rows=1)

    def let_the_other_begin(worker: int) -> None:
        assert worker == 0  # this process's; the other one imports the function as it is
        while not list(two.output.glob("part-*")):
            time.sleep(0.001)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_encoding, "take_gpu", let_the_other_begin)
        encode_corpus(two, encode_locally, 2)
    assert len(encoded) < NUM_ROWS
    encode_corpus(dataclasses.replace(two, output=tmp_path / "one"), encode_locally, 1)
    assert content(two.output) == content(tmp_path / "one")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """Ray on this machine, with two cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray = pytest.importorskip("ray")
        pytest.importorskip("ray.data")
        ray.init(num_cpus=2, include_dashboard=False)
        yield ray
        ray.shutdown()


@pytest.mark.slow
def test_ray_loses_nothing_when_a_worker_is_killed(
    ray_cluster: Any, encoding: CorpusEncoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, one of them killed with SIGKILL over shard 3: the local engine's files, byte for byte."""
    from llm2vec.corpus import ray as corpus_encoding_ray

    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    encoding = dataclasses.replace(encoding, shard_rows=2)
    marker = tmp_path / "victim"

    class Stuck(corpus_encoding_ray._Worker):
        def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
            if batch["shard"][0] == 3 and not marker.exists():
                write_json(marker, os.getpid())
                time.sleep(3600)
            return super().__call__(batch)

    def kill() -> None:
        while not marker.exists():
            time.sleep(0.01)
        os.kill(json.loads(marker.read_text()), signal.SIGKILL)

    monkeypatch.setattr(corpus_encoding_ray, "_Worker", Stuck)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert encode_corpus(encoding, corpus_encoding_ray.encode_on_ray, 2) == NUM_ROWS
    assert not killer.is_alive()
    whole = dataclasses.replace(encoding, output=tmp_path / "whole")
    encode_corpus(whole, encode_locally)
    assert content(encoding.output) == content(whole.output)
    assert read(encoding.output)[0] == [row["id"] for row in ROWS]


@pytest.mark.slow
def test_ray_goes_on_where_the_local_engine_stopped(
    ray_cluster: Any, encoding: CorpusEncoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2vec.corpus.ray import encode_on_ray

    go_on = stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        encode_corpus(encoding, encode_locally)
    go_on()
    (done,) = encoding.output.glob("part-*")
    before = done.stat()
    assert encode_corpus(encoding, encode_on_ray) in (13, 20)
    assert done.stat() == before and read(encoding.output)[0] == [row["id"] for row in ROWS]


@pytest.mark.slow
def test_ray_says_why_a_worker_does_not_start(ray_cluster: Any, encoding: CorpusEncoding) -> None:
    from llm2vec.corpus.ray import encode_on_ray

    with pytest.raises(UserError, match=r"workers could not start .*another model here"):
        encode_corpus(dataclasses.replace(encoding, revision="0123"), encode_on_ray)


def test_ray_is_asked_for_where_it_is_missing(encoding: CorpusEncoding, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2vec.corpus.ray import encode_on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r'--engine ray needs Ray: pip install -e "\.\[ray\]"'):
        encode_corpus(encoding, encode_on_ray)


def test_the_script_asks_for_ray_before_it_writes(
    encoding: CorpusEncoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    texts = write_jsonl(tmp_path / "ray.jsonl", [{"text": "hello"}])
    output = tmp_path / "by_ray"
    script = runpy.run_path(str(Path(__file__).parents[2] / "experiments/encode_corpus.py"))
    with pytest.raises(UserError, match="--engine ray needs Ray"):
        script["main"]([str(texts), str(output), "--model", encoding.encoder.base, "--engine", "ray"])
    assert not output.exists()
