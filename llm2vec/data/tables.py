"""Arrow tables in the cache of `datasets` (`HF_DATASETS_CACHE`): built once from a file, then mapped into memory.

A table is built under a lock, by the first process of the run while the others wait; machines that do not share the
cache build one each, by their first process. The cache knows a table by everything that decides it: the arguments of
the function that makes its rows, among them the file's path and its stamp. So a file that has changed is read anew.

With a table lie the sizes of its files, written last: one that was never finished, or was cut short, is built anew. Its
content is not read again, as `datasets` does not either: a bit that rots on the disk would be trained on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec.files import sha256, write_json, write_text
from llm2vec.processes import first_of_each_machine_first, local_rank, rank_zero_first
from llm2vec.types import UserError, in_one_sentence

logger = logging.getLogger(__name__)

#: Evenly spaced blocks of a file that its stamp looks into, and the bytes of each.
NUM_BLOCKS = 16
BLOCK_BYTES = 1 << 16

#: Rows that go into an Arrow file at once.
WRITTEN_AT_ONCE = 10_000

#: Folders in the cache: a table in each folder of the first; the hashes of files in the second; in the third what
#: `datasets` makes of copies of the hub's data sets.
TABLES_FOLDER = "llm2vec-tables"
HASHES_FOLDER = "llm2vec-file-hashes"
COPIES_FOLDER = "llm2vec-copies"

#: In a table's folder: file -> bytes, and what the function that made its rows counted.
SIZES_FILE, COUNTS_FILE = "SIZES", "COUNTS"


def stamp_of(file: Path) -> str:
    """What tells a file's content from what it was, without reading all of it: size, time stamp and a few blocks; of a
    folder, the same of each file in it. A `UserError` where it cannot be read."""
    digest = hashlib.sha256()
    if file.is_dir():
        for path in _files_in(file):
            digest.update(f"{path.relative_to(file)} {stamp_of(path)}\n".encode())
        return digest.hexdigest()
    with in_one_sentence(lambda why: f"{file} cannot be read ({why}).", OSError), file.open("rb") as content:
        stat = file.stat()
        for start in np.linspace(0, max(0, stat.st_size - BLOCK_BYTES), NUM_BLOCKS, dtype=np.int64):
            content.seek(int(start))
            digest.update(content.read(BLOCK_BYTES))
    return f"{stat.st_size} bytes, {stat.st_mtime_ns} ns, {digest.hexdigest()}"


def _files_in(folder: Path) -> list[Path]:
    """What a data set's folder holds; `datasets` and the hub's client keep files of their own beside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def check_unchanged(file: Path, stamp: str) -> None:
    """To be called after the last line of a file was read: a `UserError` where it is not what it was when its stamp
    was taken, so that what was read may be of two files."""
    if stamp_of(file) != stamp:
        raise UserError(f"{file} changed while it was read; start again when it is complete.")


def copies_cache(folder: Path) -> str:
    """Where `datasets` may keep what it makes of a folder in the hub's layout, as long as nothing in it changes."""
    from datasets import config

    name = hashlib.sha256(f"{folder.resolve()}\n{stamp_of(folder)}".encode()).hexdigest()[:32]
    return str(Path(config.HF_DATASETS_CACHE) / COPIES_FOLDER / name)


def cached_table(
    generate: Callable[..., Iterator[dict[str, Any]]], features: Any, arguments: dict[str, Any]
) -> tuple[Any, dict[str, int]]:
    """The `datasets.Dataset` of a function's rows, from the cache if it is there; all ranks call this together.

    Beside it, what the function counted: as a generator may return something at its end, it may return counts.
    `features` are `datasets.Features` of a row. None of the arguments may be a list: `datasets` would take its items
    for shards and call `generate` once for each. A `UserError` of `generate`, or where the table cannot be written.
    """
    from datasets import Dataset, config
    from datasets.exceptions import DatasetGenerationError
    from datasets.fingerprint import Hasher
    from filelock import FileLock

    folder = Path(config.HF_DATASETS_CACHE) / TABLES_FOLDER / Hasher.hash((generate, features, arguments))
    counts: dict[str, int] = {}

    def build_or_map() -> Any:
        return Dataset.from_generator(
            _counting, features=features, gen_kwargs={"generate": generate, "counts": counts, **arguments},
            cache_dir=str(folder),
        )  # fmt: skip

    # A machine's others come after its first: what they built without the lock, it would remove as unfinished.
    with first_of_each_machine_first(), rank_zero_first():
        try:
            if local_rank() != 0:
                return build_or_map(), {}  # the first process speaks for all
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                _remove_if_not_whole(folder)
                table = build_or_map()
                if not (folder / SIZES_FILE).is_file():
                    write_json(folder / COUNTS_FILE, counts)
                    write_json(folder / SIZES_FILE, _sizes_of(folder))
                return table, json.loads((folder / COUNTS_FILE).read_bytes())
        except (DatasetGenerationError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, UserError):
                raise cause from None
            if isinstance(cause, OSError):
                reason = cause.strerror or cause
                raise UserError(
                    f"HF_DATASETS_CACHE: no table could be written to {config.HF_DATASETS_CACHE} ({reason})."
                ) from error
            raise


def _counting(
    generate: Callable[..., Generator[dict[str, Any], None, dict[str, int] | None]],
    counts: dict[str, int],
    **arguments: Any,
) -> Iterator[dict[str, Any]]:
    """A function's rows; what it returns at its end goes into `counts`."""
    counts.update((yield from generate(**arguments)) or {})


def _sizes_of(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {str(path.relative_to(folder)): path.stat().st_size for path in files if path.suffix != ".lock"}
    return {name: size for name, size in sorted(named.items()) if name != SIZES_FILE}


def _remove_if_not_whole(folder: Path) -> None:
    """Remove a table that is not as it was built, with a word; and what is left of one that was never finished."""
    if not folder.is_dir():
        return
    if (folder / SIZES_FILE).is_file():
        if json.loads((folder / SIZES_FILE).read_bytes()) == _sizes_of(folder):
            return
        logger.warning("%s, a table of the cache, is damaged: it is built anew", folder)
    aside = tempfile.mkdtemp(dir=folder.parent)  # a run that has mapped the table keeps it
    shutil.rmtree(folder.rename(Path(aside) / folder.name).parent)


@contextmanager
def arrow_file(file: Path, schema: Any) -> Iterator[Any]:
    """The writer of an Arrow file, of `datasets`: its `write` takes a row. They are written a batch at a time."""
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(schema=schema, path=str(file), writer_batch_size=WRITTEN_AT_ONCE) as writer:
        yield writer
        writer.finalize()


def content_hash(file: Path, stamp: str = "") -> str:
    """SHA-256 of a file's content, in hexadecimal digits; taken once for its path and stamp (of now, if none is given),
    then kept in the cache. Of a folder, that of its files' names and hashes. A `UserError` where the file cannot be
    read or changed meanwhile, or the cache cannot be written."""
    from datasets import config

    if file.is_dir():
        hashes = "".join(f"{path.relative_to(file)} {content_hash(path)}\n" for path in _files_in(file))
        return hashlib.sha256(hashes.encode()).hexdigest()
    stamp = stamp or stamp_of(file)
    name = hashlib.sha256(f"{file.resolve()}\n{stamp}".encode()).hexdigest()
    kept = Path(config.HF_DATASETS_CACHE) / HASHES_FOLDER / name
    if kept.is_file():
        said = kept.read_bytes()[:64].decode("ascii", "replace")
        if kept.read_bytes() == _sealed(name, said):
            return said
        logger.warning("%s, a file's kept SHA-256, is damaged: it is taken anew", kept)
    found = sha256(file)
    check_unchanged(file, stamp)
    with in_one_sentence(lambda why: f"HF_DATASETS_CACHE: {kept.parent} cannot be written ({why}).", OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, _sealed(name, found).decode())
    return found


def hash_of_read(file: Path, stamp: str) -> str:
    """The same of a file that was read, given its stamp from before (may be empty: nothing is known of it); a
    `UserError` where the file is not what was read."""
    found = content_hash(file, stamp)
    if stamp:
        check_unchanged(file, stamp)
    return found


def _sealed(name: str, found: str) -> bytes:
    """What is kept of a hash: its digits, and their own hash."""
    return f"{found} {hashlib.sha256(f'{name} {found}'.encode()).hexdigest()}".encode()
