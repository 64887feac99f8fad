"""The cache of tables: what it is known by, that files are not read twice, and what an archive of many rows takes."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import write_jsonl
from make_archive import write_archive

from llm2vec.data import rows as data
from llm2vec.data import tables as cached_tables
from llm2vec.data.blocks import texts_of_file
from llm2vec.data.order import OneSourceBlocks
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source
from llm2vec.data.tables import BLOCK_BYTES, HASHES_FOLDER, SIZES_FILE, TABLES_FOLDER, content_hash, stamp_of
from llm2vec.types import UserError

SCRIPT = Path(__file__).parents[1] / "first_batches.py"
SOURCE = Source("a", "a.jsonl", (Instruction(""),))


def write_rows(file: Path, count: int, word: str = "old") -> Path:
    return write_jsonl(file, [{"query": f"{word} {i:06}", "positive": "d", "negative": ["n"]} for i in range(count)])


def overwrite(file: Path, old: bytes, new: bytes) -> None:
    """Other content of the same size under the same time stamp."""
    stat = file.stat()
    content = file.read_bytes()
    assert len(old) == len(new) and old in content
    file.write_bytes(content.replace(old, new))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


# --- what a table is known by ---


def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    """Many file systems and copying tools keep time stamps; blocks of the content tell."""
    file = write_rows(tmp_path / "a.jsonl", 3)
    assert TrainingRows(tmp_path, [SOURCE])[1].query.text == "old 000001"
    overwrite(file, b"old", b"new")
    assert TrainingRows(tmp_path, [SOURCE])[1].query.text == "new 000001"


def test_running_text_of_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    assert texts_of_file(file).table[1]["text"] == "two"
    overwrite(file, b"two", b"six")
    assert texts_of_file(file).table[1]["text"] == "six"


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 5 * BLOCK_BYTES + 7, 40 * BLOCK_BYTES])
def test_a_stamp_looks_at_both_ends_and_between(tmp_path: Path, size: int) -> None:
    """Of a small file, at every byte; of a large one at its first and last and about every other thirtieth."""
    file = tmp_path / "file"
    content = bytes(size)
    file.write_bytes(content)
    stat, stamp = file.stat(), stamp_of(file)
    places = {0, size // 2, size - 1} if size <= 5 * BLOCK_BYTES + 7 else {0, 13 * BLOCK_BYTES + 1, size - 1}
    for place in places if size else ():
        file.write_bytes(content[:place] + b"x" + content[place + 1 :])
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert stamp_of(file) != stamp
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert stamp_of(file) == stamp


def test_other_rules_make_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache does not see the code that reads lines, so its version is part of what it knows a table by."""
    write_rows(tmp_path / "a.jsonl", 2)
    first = data.read_rows(tmp_path / "a.jsonl", 1)[0].cache_files
    assert data.read_rows(tmp_path / "a.jsonl", 1)[0].cache_files == first
    monkeypatch.setattr(data, "ROWS_VERSION", data.ROWS_VERSION + 1)
    assert data.read_rows(tmp_path / "a.jsonl", 1)[0].cache_files != first


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of half a file, or of two, is not kept."""
    file = write_rows(tmp_path / "a.jsonl", 3)
    size = file.stat().st_size
    rows_of: Callable[..., Iterator[Any]] = data.rows_of

    def read_and_grow(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        for row in rows_of(*arguments, **keywords):
            if file.stat().st_size == size:
                with file.open("ab") as out:
                    out.write(file.read_bytes())
            yield row

    monkeypatch.setattr(data, "rows_of", read_and_grow)
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read; start again when it is complete"):
        TrainingRows(tmp_path, [SOURCE])
    monkeypatch.undo()
    write_rows(file, 5)
    assert len(TrainingRows(tmp_path, [SOURCE])) == 5


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may become larger than a few blocks."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_sentence(tmp_path: Path, cache: Path, request: pytest.FixtureRequest) -> None:
    """That names the cache; once there is room, the same call works."""
    write_rows(tmp_path / "a.jsonl", 3000)
    request.getfixturevalue("small_disk")
    with pytest.raises(UserError, match=rf"HF_DATASETS_CACHE: no table could be written to {cache} \(File too large\)"):
        TrainingRows(tmp_path, [SOURCE])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert len(TrainingRows(tmp_path, [SOURCE])) == 3000


def table_files(cache: Path) -> list[Path]:
    """Arrow and JSON of the one table in the cache."""
    files = [path for path in (cache / TABLES_FOLDER).rglob("*") if path.suffix in (".arrow", ".json")]
    assert len(files) == 2
    return files


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
@pytest.mark.parametrize("kind", [".arrow", ".json"])
def test_a_damaged_table_is_built_anew(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], kind: str
) -> None:
    """With a word; a run that has mapped the old one keeps it, and an undamaged one is left as it is."""
    write_rows(tmp_path / "a.jsonl", 3000)
    before = TrainingRows(tmp_path, [SOURCE])
    (file,) = (path for path in table_files(cache) if path.suffix == kind)
    stamp = file.stat().st_mtime_ns
    assert len(TrainingRows(tmp_path, [SOURCE])) == 3000
    assert file.stat().st_mtime_ns == stamp and not caplog.records
    aside = file.with_name("copy")  # or the mapped pages would change with the file, whoever wrote to it
    aside.write_bytes(file.read_bytes())
    damage(aside)
    aside.replace(file) if aside.is_file() else file.unlink()
    again = TrainingRows(tmp_path, [SOURCE])
    assert "is damaged: it is built anew" in caplog.text
    assert [again[i].query.text for i in (0, 1500, 2999)] == ["old 000000", "old 001500", "old 002999"]
    assert before[2999] == again[2999]
    caplog.clear()
    assert len(TrainingRows(tmp_path, [SOURCE])) == 3000 and not caplog.records


def test_a_table_that_was_never_finished_is_built_anew(tmp_path: Path, cache: Path) -> None:
    """The sizes of its files are written last; nothing is left lying about."""
    write_rows(tmp_path / "a.jsonl", 30)
    TrainingRows(tmp_path, [SOURCE])
    (sizes,) = (cache / TABLES_FOLDER).rglob(SIZES_FILE)
    (table, _) = sorted(table_files(cache), key=lambda path: path.suffix)
    stamp = table.stat().st_mtime_ns
    sizes.unlink()
    assert len(TrainingRows(tmp_path, [SOURCE])) == 30
    assert table.stat().st_mtime_ns != stamp
    assert sizes.is_file()
    assert len([path for path in (cache / TABLES_FOLDER).iterdir() if path.is_dir()]) == 1


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read \(No such file or directory\)"):
        stamp_of(tmp_path / "none.jsonl")


# --- hashes of whole files ---


def test_a_hash_is_of_the_content_and_is_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken once for a stamp, whoever asks; a changed file has another."""
    file = write_rows(tmp_path / "a.jsonl", 100)
    true = hashlib.sha256(file.read_bytes()).hexdigest()
    taken: list[Any] = []
    digest: Callable[..., Any] = hashlib.file_digest

    def counted(*arguments: Any) -> Any:
        taken.append(arguments)
        return digest(*arguments)

    monkeypatch.setattr(cached_tables.hashlib, "file_digest", counted)  # type: ignore[attr-defined]
    assert [content_hash(file) for _ in range(3)] == [true] * 3
    assert len(taken) == 1
    overwrite(file, b"old", b"new")
    assert content_hash(file) == hashlib.sha256(file.read_bytes()).hexdigest() != true
    assert len(taken) == 2
    assert len(list((cache / HASHES_FOLDER).iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "cut", "digit", "letter"])
def test_a_damaged_kept_hash_is_taken_anew(damage: str, tmp_path: Path, cache: Path) -> None:
    """Else a run would be refused whose data have not changed, and another would record a wrong sum."""
    file = write_rows(tmp_path / "a.jsonl", 3)
    true = content_hash(file)
    (kept,) = (cache / HASHES_FOLDER).iterdir()
    whole = kept.read_bytes()
    other = b"0" if whole[:1] != b"0" else b"1"
    kept.write_bytes({"": b"", "cut": whole[:30], "digit": other + whole[1:], "letter": b"\xff" + whole[1:]}[damage])
    assert content_hash(file) == true and kept.read_bytes() == whole


def test_a_hash_that_cannot_be_kept_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "a.jsonl", 3)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", file)  # no folder can be made in a file
    with pytest.raises(UserError, match=r"HF_DATASETS_CACHE: .* cannot be written \(Not a directory\)"):
        content_hash(file)


def test_equal_stamps_of_two_files_do_not_mix(tmp_path: Path) -> None:
    """Where files differ only between the blocks that a stamp looks at, their paths tell them apart."""
    content = bytearray(100 * BLOCK_BYTES)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(content)
    content[3 * BLOCK_BYTES] = 1
    other.write_bytes(content)
    os.utime(other, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    assert stamp_of(one) == stamp_of(other)
    assert [content_hash(f) for f in (one, other)] == [hashlib.sha256(f.read_bytes()).hexdigest() for f in (one, other)]


# --- many rows ---


def test_the_order_of_rows_is_not_a_list(tmp_path: Path) -> None:
    """Plain integers, one at a time, as samplers give them."""
    write_rows(tmp_path / "a.jsonl", 8)
    order = iter(OneSourceBlocks(TrainingRows(tmp_path, [SOURCE]), 2, seed=0))
    assert type(next(order)) is int
    assert len(list(order)) == 7
    assert not hasattr(order, "__len__") and not hasattr(order, "__length_hint__")


def first_batches(archive: Path, output: Path, *caches: Path, processes: int = 1) -> list[dict[str, Any]]:
    """What each process of a start says; with two caches, the processes are on two machines."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29_700 + os.getpid() % 200),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(archive), str(output)],
            env=environment
            | {"HF_DATASETS_CACHE": str(caches[rank % len(caches)])}
            | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in started:
        _, said = process.communicate(timeout=900)
        assert process.returncode == 0, said[-3000:]
    return [json.loads((output / f"figures_{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


def grown(figures: dict[str, Any]) -> int:
    """Memory of its own that a process took between its imports and its last batch."""
    return int(figures["anonymous_bytes"] - figures["anonymous_bytes_before"])


@pytest.mark.slow
def test_many_rows(tmp_path: Path) -> None:
    """200,000 rows, 0.5 GB: tables are built once a machine, mapped by all, read by nobody again; what a process holds
    does not grow with the rows but for their order, eight bytes a row."""
    many, few, cache = tmp_path / "many", tmp_path / "few", tmp_path / "cache"
    files = write_archive(many, 200_000)
    write_archive(few, 6_000)
    size = sum(file.stat().st_size for file in files)
    true = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    first = first_batches(many, tmp_path / "first", cache, processes=2)
    assert first[0]["rows"] == first[1]["rows"] > 199_900
    assert 2 * size < first[0]["read_bytes"] < 2.2 * size + 5e7, "for the tables, and for the hashes"
    assert first[1]["read_bytes"] < 5e7, "the second process reads what the first one built"
    built = {path: Path(path).stat().st_mtime_ns for path in first[0]["mapped"]}
    assert len(built) == len(files)

    again = first_batches(many, tmp_path / "again", cache, processes=2)
    assert [figures["mapped"] for figures in again] == [first[0]["mapped"]] * 2
    assert all(figures["read_bytes"] < 5e7 for figures in again), "neither the files nor the tables"
    assert {path: Path(path).stat().st_mtime_ns for path in built} == built
    assert first[0]["sha256"] == again[0]["sha256"] == true

    first_batches(few, tmp_path / "few-first", cache)
    (small,) = first_batches(few, tmp_path / "few-again", cache)
    allowed = 8 * again[0]["rows"] + 8e6
    assert all(abs(grown(figures) - grown(small)) < allowed for figures in again)
    assert allowed < size / 20, "or it would say nothing"

    apart = first_batches(few, tmp_path / "apart", tmp_path / "here", tmp_path / "there", processes=2)
    assert not set(apart[0]["mapped"]) & set(apart[1]["mapped"]), "machines without a cache in common build one each"
    assert [figures["rows"] for figures in apart] == [small["rows"]] * 2
