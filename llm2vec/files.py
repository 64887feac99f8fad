"""Files: JSON and JSONL read with one sentence for what is wrong, files written aside and renamed, sums, locks.

The standard library's JSON takes the last of two equal keys without a word, and gives up on deep nesting with an error
that no caller expects. Both are refused here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from filelock import lock_descriptor

from llm2vec.types import UserError, first_line, in_one_sentence

logger = logging.getLogger(__name__)

#: What `checked` compares JSON with.
Shape: TypeAlias = Any

_NAMES: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "an object", list: "a list",
    None: "null",
}  # fmt: skip

#: Measures of the embedding space along training, which the probes write into a run's folder and reports read.
DIAGNOSTICS_FILE = "diagnostics.jsonl"

#: In a base model's folder: where its weights are from. What it says travels into the `run.json` of what is trained.
ORIGIN_FILE = "origin.json"

#: In the folder of a comparison's record: what all its trials have in common.
COMPARISON_RECORD = "record.json"


def parse_json(text: bytes | str, where: str) -> Any:
    """What a piece of JSON says, of UTF-8 where it is bytes; a byte order mark in front of these does not count.

    A `UserError`, which begins with `where` (file, or file and line), where it is no JSON, no UTF-8, nested too deeply,
    or writes a key twice.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply).") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error


def parse_object(text: bytes | str, where: str, shape: Shape = None) -> dict[str, Any]:
    """The same for a JSON object, of the shape that `checked` takes, if one is given; anything else is a
    `UserError`."""
    content = parse_json(text, where)
    if not isinstance(content, dict):
        raise UserError(f"{where}: a JSON object is needed, not a {type(content).__name__}.")
    if shape is not None:
        checked(content, shape, where)
    return content


def read_object(file: Path, where: str | None = None, shape: Shape = None) -> dict[str, Any]:
    """The object in a file, which must be readable; `where` begins a message in place of the file's name."""
    where = str(file) if where is None else where
    with _opened(file, where) as content:
        return parse_object(content.read(), where, shape)


@contextmanager
def _opened(file: Path, where: str) -> Iterator[BinaryIO]:
    try:
        if file.is_char_device() or file.is_block_device():  # /dev/zero has no end
            raise UserError(f"{where}: cannot be read (it is a device).")
        with file.open("rb") as content:
            yield content
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or first_line(error)}).") from error


def checked(content: Any, shape: Shape, where: str) -> Any:
    """What a file of our own says, if it has the shape that its writer gives it; the shape stands beside the writer.

    Args:
        content: JSON, parsed.
        shape: `int`, `float` (whole numbers too), `str`, `bool`, `dict`, `list`, `object` (anything); `None` for null;
            a tuple of shapes, one of which must fit; `[shape]`, a list of such; `{str: shape}`, an object whose values
            are such; `{"a": shape, "b?": shape}`, an object with `a` and perhaps `b`, whatever else is in it.
        where: a message begins with it.

    Raises:
        UserError: it has not, so it was not written by this project, or was changed since.
    """
    if (wrong := _misfit(content, shape, "")) is not None:
        raise UserError(f"{where}: {wrong}")
    return content


def _misfit(content: Any, shape: Shape, key: str) -> str | None:
    """What does not fit, in words that end a message."""
    options = shape if isinstance(shape, tuple) else (shape,)
    kinds = [type(one) if isinstance(one, dict | list) else one for one in options]
    found = next((one for one, kind in zip(options, kinds, strict=True) if _is_a(content, kind)), options)
    if found is options:
        return f"{key or 'it'} is {in_short(content)}; {' or '.join(_NAMES[kind] for kind in kinds)} is needed."
    inside: dict[str, tuple[Any, Shape]] = {}
    if isinstance(found, list):
        inside = {f"{key}[{i}]": (value, found[0]) for i, value in enumerate(content)}
    elif isinstance(found, dict) and str in found:
        inside = {f"{key}.{name}": (value, found[str]) for name, value in content.items()}
    elif isinstance(found, dict):
        missing = [name for name in found if not name.endswith("?") and name not in content]
        if missing:
            return f"{f'{key}.{missing[0]}'.lstrip('.')} is missing."
        named = {name.removesuffix("?"): one for name, one in found.items()}
        inside = {f"{key}.{name}": (content[name], one) for name, one in named.items() if name in content}
    misfits = (_misfit(value, one, name.lstrip(".")) for name, (value, one) in inside.items())
    return next((wrong for wrong in misfits if wrong is not None), None)


def _is_a(content: Any, kind: Any) -> bool:
    if kind is None or content is None:
        return kind in (None, object) and content is None
    if isinstance(content, bool):
        return kind in (bool, object)
    return isinstance(content, (int, float) if kind is float else kind)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is written twice")
    return content


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def files_hash(folder: Path, files: Iterable[Path], tail_bytes: int | None = None) -> str:
    """A short hash (16 hexadecimal digits) of files: their names (below the folder: their paths), sizes and content.

    Of a safetensors file, only `tail_bytes` at its end are read; None = all.
    """
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            size = content.seek(0, os.SEEK_END)
            read = size if tail_bytes is None or file.suffix != ".safetensors" else min(size, tail_bytes)
            content.seek(size - read)
            name = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name
            digest.update(f"{name} {size}\n".encode())
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def data_revision(folder: Path) -> str:
    """Hash of all files of a local data set."""
    return "local-" + files_hash(folder, sorted(file for file in folder.rglob("*") if file.is_file()))


def json_hash(content: Any) -> str:
    """A short hash of anything that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def as_path(text: str, where: str) -> Path:
    """A user's words as a path; nothing need be there.

    A `UserError`, which begins with `where`, such as `config.json: output_dir`, where no file can have this name: too
    long, a loop of links, a NUL, or half a surrogate pair.
    """
    path = Path(text)
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL, or what UTF-8 cannot write
        if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = getattr(error, "strerror", error)
            raise UserError(f"{where} is {in_short(text)}; no file can have that name ({reason}).".lstrip()) from error
    return path


def in_short(value: Any) -> str:
    """A value as it stands in a message, cut where it is long."""
    said = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
    return said if len(said) <= 60 else f"{said[:57]}..."


def file_error(error: BaseException) -> str | None:
    """What an error says of a file that cannot be read or written, in a sentence; None where it is of another kind.

    On a full disk Python raises an OSError, safetensors a type of its own, tokenizers a bare `Exception`, and torch a
    RuntimeError that names its writer.
    """
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        reason = error.strerror or first_line(error)
        return f"{' -> '.join(names)}: {reason}." if names else f"A file could not be read or written ({reason})."
    text = first_line(error)
    if type(error) is Exception or type(error).__module__.startswith("safetensors"):
        said = re.search(r"(?:I/O error: )?(.*) \(os error \d+\)", text)
        return said and f"A file could not be read or written ({said[1].rpartition(': ')[2]})."
    if isinstance(error, RuntimeError) and re.search("PytorchStream|inline_container", text):
        return "A file could not be written (its disk is full, or broken)."
    return None


def remove(place: Path) -> None:
    """Remove a file or a folder with all in it; of a link, the link only."""
    if place.is_symlink() or not place.is_dir():
        place.unlink(missing_ok=True)
    else:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A hidden path beside `file` to write to. It becomes `file` when the body ends, and goes where the body fails."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield aside
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, which is not there yet, or empty: a new hidden one beside it, which gets its name."""
    aside = folder.with_name(f".{folder.name.lstrip('.')}.writing") / folder.name  # `alone_beside` may lock its parent
    shutil.rmtree(aside, ignore_errors=True)  # of a start that was killed
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):
            aside.parent.rmdir()


def write_text(file: Path, text: str) -> None:
    """Write text in UTF-8, aside and renamed."""
    with whole(file) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Write indented JSON, aside and renamed."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(file: Path, rows: Iterable[Any]) -> None:
    """Write a line of JSON for each row, aside and renamed; the rows may come one at a time."""
    with whole(file) as aside, aside.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_lines(file: Path, *, shape: Shape = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place (`FILE, line 3`) to begin a message with.

    Lines of blanks are passed over; `shape` of each object is as `checked` takes it. A `UserError` where the file
    cannot be read, or a line is no such object.
    """
    with _opened(file, str(file)) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, parse_object(line, where, shape)


def check_unicode(text: str, field: str, where: str) -> str:
    """The text itself, unless it holds half a surrogate pair, which JSON can write and UTF-8 cannot: a `UserError`.

    Bytes on the command line or the standard input that are not UTF-8 come to Python in the same form.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            near = text[max(0, error.start - 20) : error.start + 20]
            raise UserError(f"{where}: `{field}` holds half a surrogate pair, or is not UTF-8: {near!r}.") from error
    return text


# --- who writes to a folder ---

#: In a folder, while a process writes to it.
LOCK_FILE = ".lock"

#: What a disk answers that keeps no locks, as Lustre does that was mounted without `flock`.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def alone_in(folder: Path, work: str) -> Iterator[int]:
    """Hold a folder that two starts at a time would write over each other's files in; it is made if missing.

    The lock is `flock`'s: it dies with its process, and machines that share the folder see each other's where their
    file system passes locks on. NFS and Lustre do, unless mounted with `local_lock` or `localflock`. Of a run of
    several processes, one holds it for all. `work` is what is done there, for the `UserError` where another holds it.

    Yields the lock's file descriptor. A program that is started with it (`pass_fds`) holds the folder, too, and goes on
    doing so when this process is killed.
    """
    is_new, file = not folder.exists(), folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(file)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(f"{folder} cannot be made or written to ({error.strerror}).") from error
        logger.warning("%s: this disk keeps no locks, so nothing stops a second %s here", folder, work)
        lock = os.open(file, os.O_RDWR)
    if lock is None:
        raise UserError(f"{folder}: another {work} is at work here; wait, or give another output folder.")
    try:
        yield lock
    finally:
        os.close(lock)
        with suppress(OSError):
            if (last := try_lock(file)) is not None:  # else a program that was given it goes on
                file.unlink()
                os.close(last)
            if is_new:
                folder.rmdir()  # where nothing was written


@contextmanager
def alone_beside(place: Path, work: str) -> Iterator[int]:
    """As `alone_in`, for a file or folder that is written elsewhere and put in its place at the end."""
    aside = place.with_name(f".{place.name}.writing")
    with in_one_sentence(lambda why: f"{place} could not be written ({why}).", OSError):
        aside.mkdir(parents=True, exist_ok=True)
    try:
        with alone_in(aside, work) as lock:
            yield lock
    finally:
        with suppress(OSError):  # another start is at work there
            aside.rmdir()


def try_lock(file: Path) -> int | None:
    """Lock a file until the descriptor is closed or its last process ends; None if another process has locked it."""
    while True:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if not lock_descriptor(descriptor, blocking=False):
                os.close(descriptor)
                return None
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it before has taken it away


def is_locked(file: Path) -> bool:
    """Whether a process has locked a file."""
    if not file.is_file():
        return False
    lock = try_lock(file)
    if lock is not None:
        os.close(lock)
    return lock is None
