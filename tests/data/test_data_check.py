"""`experiments/check_data.py`: what it counts, what test sets it finds, and when it complains."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llm2vec.data.check import LEAST_WORDS, OVERLAP_WORDS, TestTexts, check_source, language_of
from llm2vec.data.sources import Source
from llm2vec.types import UserError

SCRIPT = Path(__file__).parents[2] / "experiments" / "check_data.py"
SOURCE = Source("faq", "faq.jsonl", ())
LONG = " ".join(f"word{i}" for i in range(40))


def write(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "faq.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def row(query: str, positive: str, *negatives: str) -> dict[str, Any]:
    return {"query": query, "positive": positive, "negative": list(negatives)}


def characters(texts: Any) -> list[int]:
    return [len(text) for text in texts]


def test_counts(tmp_path: Path) -> None:
    rows = [
        row("a b", "c", "d"),
        row("a b", "c", "e"),  # twice
        row("a b", "x"),  # the query again, no negative
        row("same", "same ", "n"),
        row("q", "p", "n", "p"),
        "not json",
        {"query": "q", "positive": ""},
        {"query": "q", "positive": "p", "negative": [1]},
    ]
    report = check_source(SOURCE, write(tmp_path, rows), characters)
    assert (report.rows, report.bad, report.duplicates, report.repeated_queries) == (5, 3, 1, 2)
    assert (report.query_is_positive, report.positive_is_negative, report.without_negative) == (1, 1, 1)
    assert [error.split(":")[0] for error in report.errors] == [f"faq.jsonl, line {n}" for n in (6, 7, 8)]
    assert report.tokens == {"query": [3, 3, 3, 4, 1], "positive": [1, 1, 1, 5, 1], "negative": [1, 1, 1, 1]}


def test_sample_is_bounded(tmp_path: Path) -> None:
    report = check_source(SOURCE, write(tmp_path, [row(f"q{i}", "p") for i in range(9000)]), characters)
    assert 2000 <= len(report.tokens["query"]) <= 3000


def test_memory_is_some_bytes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is held beside the rows' hashes does not grow with them: a source may have tens of millions."""
    monkeypatch.setattr("llm2vec.data.check.SAMPLE", 10)
    peaks = []
    check_source(SOURCE, write(tmp_path, [row("q", "p")]), characters)  # loads what it loads once
    for number in (2_000, 22_000):
        folder = write(tmp_path / str(number), [row(f"query {i}", "p") for i in range(number)])
        tracemalloc.start()
        check_source(SOURCE, folder, characters)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 0 < peaks[1] - peaks[0] < 100 * 20_000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LONG, True),
        (LONG.upper().replace(" ", ",  "), True),
        ("before " + " ".join(LONG.split()[5 : 5 + OVERLAP_WORDS]) + " behind", True),
        ("before " + " ".join(LONG.split()[5 : 4 + OVERLAP_WORDS]) + " behind", False),
        ("a short but whole test text", True),
        ("a short but whole test text and more", False),
        ("Paris", False),
    ],
)
def test_finds_test_texts(tmp_path: Path, text: str, found: bool) -> None:
    folder = tmp_path / "sets" / "nfcorpus"
    folder.mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(json.dumps({"_id": "1", "text": LONG}) + "\n", encoding="utf-8")
    (folder / "queries.tsv").write_text("id\ttext\n1\tA short, but whole test text.\n2\tParis\n", encoding="utf-8")
    test_texts = TestTexts([folder])
    assert test_texts.sizes == {"nfcorpus": 2}
    assert test_texts.found_in(["something else", text]) == ({"nfcorpus"} if found else set())
    assert LEAST_WORDS > 1


def test_reads_parquet_and_nested_json(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "sts"
    folder.mkdir()
    pq.write_table(pa.table({"sentence1": [LONG]}), folder / "test.parquet")
    (folder / "more.json").write_text(json.dumps({"rows": [{"x": ["one two three four five six"]}]}), encoding="utf-8")
    assert TestTexts([folder]).found_in([LONG]) == {"sts"}
    assert TestTexts([folder]).found_in(["one two three four five six"]) == {"sts"}


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"--test_sets: .*a\.parquet: not a whole Parquet file"):
        TestTexts([tmp_path])


def test_a_parquet_file_damaged_within_is_named(tmp_path: Path) -> None:
    """Wherever the damage is, whatever the library calls it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"some text {i} of many words" for i in range(300)]}), file)
    whole = file.read_bytes()
    assert whole.startswith(b"PAR1")
    refused = 0
    for place in range(4, len(whole) - 8, 29):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            TestTexts([tmp_path])
        except UserError as error:
            refused += 1
            assert f"--test_sets: {file}: not a whole Parquet file (" in str(error) and "\n" not in str(error)
    assert refused > 20


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    long = "one two three four five " * 10_000
    (tmp_path / "a.csv").write_text(f"id,text\n1,{long}\n", encoding="utf-8")
    assert TestTexts([tmp_path]).found_in([long]) == {tmp_path.name}


def test_ideographs_are_words(tmp_path: Path) -> None:
    folder = tmp_path / "t2"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"q": "北京是中华人民共和国的首都和直辖市"}) + "\n", encoding="utf-8")
    assert TestTexts([folder]).found_in(["你知道吗,北京是中华人民共和国的首都和直辖市。"]) == {"t2"}


def test_languages(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    rows = [
        row("Wo liegt die Hauptstadt von Frankreich?", "The capital of France is called Paris and lies on a river.")
    ]
    report = check_source(SOURCE, write(tmp_path, rows), characters)
    assert report.languages["query"].most_common(1)[0][0] == "de"
    assert report.languages["positive"].most_common(1)[0][0] == "en"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    table = {"faq": {"file": "faq.jsonl", "instruction": "Find it"}}
    (tmp_path / "sources.json").write_text(json.dumps(table), encoding="utf-8")
    return write(tmp_path / "data", [row("what is up", "the sky", "the ground")] * 3)


def check(folder: Path, *arguments: str, expect: int = 0) -> str:
    command = [sys.executable, str(SCRIPT), str(folder), "--sources_file", "sources.json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def test_script_records_hashes_and_sees_changes(folder: Path) -> None:
    out = check(folder)
    assert "faq" in out and "2" in out
    recorded = json.loads((folder / "hashes.json").read_text(encoding="utf-8"))
    assert recorded["faq"]["rows"] == 3
    check(folder)
    write(folder, [row("what is up", "the sky", "the ground")] * 4)
    said = check(folder, expect=1)
    assert "faq: changed since it was first checked (3 rows" in said
    assert f"now); if that was on purpose, delete {folder / 'hashes.json'}, which is then written anew." in said
    assert json.loads((folder / "hashes.json").read_text(encoding="utf-8")) == recorded
    (folder / "hashes.json").unlink()
    check(folder)
    assert json.loads((folder / "hashes.json").read_text(encoding="utf-8"))["faq"]["rows"] == 4


def test_script_finds_overlap(folder: Path) -> None:
    sets = folder.parent / "toy"
    sets.mkdir()
    (sets / "q.jsonl").write_text(json.dumps({"text": "the one and only test query"}) + "\n", encoding="utf-8")
    write(folder, [row("The one and only test query?", "p"), row("q", "p")])
    assert "toy (1 texts): faq 1 (50.00%)" in check(folder, "--test_sets", str(sets))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sources", "nothing"], "'nothing' is not known; known: faq"),
        (["--test_sets", "nowhere"], "--test_sets: nowhere is not a folder"),
        (["--test_sets", "data"], "--test_sets: data holds no text of 5 words or more"),
        (["--max_length", "0"], "error: --max_length is 0; give a number above 0."),
    ],
)
def test_bad_commands(folder: Path, arguments: list[str], sentence: str) -> None:
    assert sentence in check(folder, *arguments, expect=2)


def test_an_empty_file_is_a_problem(folder: Path) -> None:
    (folder / "faq.jsonl").write_bytes(b"")
    assert "faq: its file has no rows." in check(folder, expect=1)


def test_missing_files(folder: Path) -> None:
    (folder / "faq.jsonl").unlink()
    """Of the released archive it is said where they are to be had, of one's own it is not known."""
    assert "data lacks faq.jsonl.\n" in check(folder, expect=2)
    command = [sys.executable, str(SCRIPT), str(folder), "--sources", "nq"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "lacks nq.jsonl; the training archive (echo-data" in done.stderr


def test_a_record_that_cannot_be_written_is_said(folder: Path) -> None:
    """Data may be shared and read-only; everything else is printed all the same."""
    (folder / "hashes.json").mkdir()
    out = check(folder)
    assert "hashes.json cannot be written (Is a directory): later changes will not be seen" in out and "faq " in out


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "faq.jsonl").mkdir()
    with pytest.raises(UserError, match=r"faq\.jsonl: cannot be read \(Is a directory\)"):
        check_source(SOURCE, tmp_path, characters)


def test_bad_record(folder: Path) -> None:
    (folder / "hashes.json").write_text("[]", encoding="utf-8")
    assert "hashes.json: a JSON object is needed" in check(folder, expect=2)


def test_language_function_is_found_once() -> None:
    assert language_of() is language_of()
