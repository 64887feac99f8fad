"""Vectors of a whole corpus, in shards, by any number of processes; what a killed start has done is kept.

    OUTPUT/part-00000.parquet   columns `id` (string) and `vector` (fixed-size list), rows in the input's order
    OUTPUT/_manifest.json       settings, model, input files and their hashes, shards and their rows, `complete`
    OUTPUT/.input/              while there are shards to encode: their ids and texts
    OUTPUT/.sums/               meanwhile: the SHA-256 of each finished part, which the manifest has in the end
    OUTPUT/.queue/              while local processes work: who does which shard, and what they say

A shard is one call of `LLM2Vec.encode`, which sorts its texts by length. Its file is written aside and renamed, and
depends on nothing but its rows and the settings: whoever encodes it, and how often, writes the same file. That is all
that an engine needs to know: `encode_locally` here, `encode_on_ray` in `ray`.

The manifest's name begins with `_` so that pandas, pyarrow and datasets read the folder as one table.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llm2vec.choice import ModelChoice
from llm2vec.corpus.queue import Job, JobQueue, beside, take_gpu
from llm2vec.corpus.retrievers import encoder_of
from llm2vec.corpus.rows import Corpus, cut_into_shards
from llm2vec.files import LOCK_FILE, alone_in, read_object, remove, sha256, write_json, write_text
from llm2vec.types import TextSide, UserError, VectorDtype

logger = logging.getLogger(__name__)


MANIFEST_FILE = "_manifest.json"
INPUT_FOLDER, QUEUE_FOLDER, SUMS_FOLDER = ".input", ".queue", ".sums"
#: What the manifest says, as far as it is read again. `texts` is the sum of a shard's texts, `sha256` of its vectors.
MANIFEST = {
    "settings": dict,
    "encoder": dict,
    "shards": [{"file": str, "rows": int, "texts": str, "sha256?": str}],
    "complete": bool,
}


@dataclass(frozen=True)
class CorpusEncoding:
    """What is encoded, how, and where the vectors go."""

    corpus: Corpus  #: the rows
    output: Path  #: folder of the shards; where several machines work, one that all of them see
    encoder: ModelChoice  #: the model; `resolved`, so that a process in another folder finds it
    revision: str  #: the encoder's; a worker that finds another one refuses to work
    side: TextSide = "document"  #: the template's form that the texts take
    #: put before every text; empty = none, as it must be for a model that has prompts of its own (`is_foreign`)
    instruction: str = ""
    shard_rows: int = 10_000  #: rows of every shard but the last
    dtype: VectorDtype = "float32"  #: of the vectors in the files
    batch_size: int = 32  #: rows of 128 tokens; decides speed and memory, so it may change between two starts

    def identity(self) -> dict[str, Any]:
        """Everything that decides the files."""
        return {
            "model": self.revision,
            "torch_dtype": self.encoder.torch_dtype,
            "side": self.side,
            "instruction": self.instruction,
            "shard_rows": self.shard_rows,
            "dtype": self.dtype,
            **self.corpus.identity(),
        }


#: Encodes the shards of these numbers by so many workers (None = one a GPU, or one); returns a sentence a problem.
Engine = Callable[[CorpusEncoding, Sequence[int], int | None], list[str]]


def part_name(shard: int) -> str:
    """File name of a shard, from 0; of its texts and of its vectors alike."""
    return f"part-{shard:05d}.parquet"


def encode_corpus(encoding: CorpusEncoding, engine: Engine, num_workers: int | None = None) -> int:
    """Encode what is still missing of a corpus by an engine, `encode_locally` or `encode_on_ray`, with so many workers
    (None = one a GPU, or one); returns the rows that this start has encoded. A `UserError` where the output folder
    holds anything else, the input is malformed, or a shard could not be encoded."""
    _check_is_ours(encoding.output)
    with alone_in(encoding.output, "encoding"):
        sizes, missing = _open_output(encoding)
        logger.info("%d shards of %d rows in all, %d of them to encode", len(sizes), sum(sizes), len(missing))
        problems = engine(encoding, missing, num_workers) if missing else []
        if problems:
            raise UserError(" ".join(problems))
        _close_output(encoding)
    return sum(sizes[shard] for shard in missing)


class ShardEncoder:
    """A loaded model that encodes shards of a corpus, one after the other. A `UserError` where the model cannot be
    loaded, or is another one than where the encoding was started."""

    def __init__(self, encoding: CorpusEncoding) -> None:
        if encoding.encoder.revision() != encoding.revision:
            raise UserError(f"{encoding.encoder.base} holds another model here than where the encoding was started.")
        self.encoding = encoding
        self._encode = encoder_of(encoding.encoder, encoding.batch_size)

    def __call__(self, shard: int) -> int:
        """Write the file of one shard; returns its rows. A vector that is not finite is a `UserError`."""
        encoding = self.encoding
        rows = pq.read_table(encoding.output / INPUT_FOLDER / part_name(shard))
        vectors_ND = self._encode(rows["text"].to_pylist(), encoding.instruction, encoding.side)
        _write_part(encoding.output / part_name(shard), rows["id"], vectors_ND.float().cpu().numpy(), encoding.dtype)
        return len(rows)


def encode_locally(encoding: CorpusEncoding, shards: Sequence[int], num_workers: int | None) -> list[str]:
    """An engine: this process and `num_workers - 1` others on this machine, a GPU each where there are any.

    A shard whose process dies is left for the next start: it may well kill the next process, too.
    """
    folder = encoding.output / QUEUE_FOLDER
    files = {shard: encoding.output / INPUT_FOLDER / part_name(shard) for shard in shards}
    jobs = [Job(f"{shard:05d}", file.stat().st_size, details={"shard": shard}) for shard, file in files.items()]
    # A worker that has outlived an earlier start may still be at a shard; doing it twice does no harm.
    shutil.rmtree(folder, ignore_errors=True)
    queue = JobQueue.prepare(folder, jobs)
    num_workers = min(num_workers or torch.cuda.device_count() or 1, len(jobs))
    with beside(num_workers, folder, _work, encoding, num_workers):
        _work(0, encoding, num_workers)
        queue.wait()
    problems = list(queue.failures().values())
    if unfinished := queue.unfinished():
        problems.append(
            f"{len(unfinished)} of {len(jobs)} shards are not done, because a worker ended before its time (see "
            f"{folder}/worker-*.log); start again to go on."
        )
    return problems


def _open_output(encoding: CorpusEncoding) -> tuple[list[int], list[int]]:
    """Rows of each shard and the shards that are missing, whose texts are then in the input folder."""
    manifest, identity = _read_manifest(encoding.output), encoding.identity()
    missing: list[int] | None = None
    folder, texts, sums = encoding.output / INPUT_FOLDER, {}, []
    if manifest is not None:
        _check_identity(encoding.output, manifest["settings"], identity)
        sums = _sums_of_parts(encoding.output, manifest)
        whole = _have_sums({encoding.output / part_name(shard): sum_ for shard, sum_ in enumerate(sums)})
        missing = [shard for shard, is_whole in enumerate(whole) if not is_whole]
        texts = {folder / part_name(shard): manifest["shards"][shard]["texts"] for shard in missing}
    if manifest is None or not all(_have_sums(texts)):
        shutil.rmtree(folder, ignore_errors=True)  # nothing vouches for it, or some of it was removed or changed
        sizes = cut_into_shards(encoding.corpus.rows(), folder, encoding.shard_rows, part_name)
        shards = [
            {"file": part_name(shard), "rows": rows, "texts": sha256(folder / part_name(shard))}
            for shard, rows in enumerate(sizes)
        ]
        for shard, sum_ in zip(shards, sums, strict=False):
            shard["sha256"] = sum_
        manifest = {"settings": identity, "encoder": dataclasses.asdict(encoding.encoder), "shards": shards}
        write_json(encoding.output / MANIFEST_FILE, {**manifest, "complete": False})
    sizes = [shard["rows"] for shard in manifest["shards"]]
    return sizes, list(range(len(sizes))) if missing is None else missing


def _close_output(encoding: CorpusEncoding) -> None:
    """Say in the manifest that all is there, and remove what is not needed any more."""
    manifest = _read_manifest(encoding.output)
    assert manifest is not None
    vectors = pq.read_schema(encoding.output / part_name(0)).field("vector").type
    sums = _sums_of_parts(encoding.output, manifest)
    shards = [{**shard, "sha256": sum_} for shard, sum_ in zip(manifest["shards"], sums, strict=True)]
    closed = {**manifest, "shards": shards, "complete": True, "dimension": vectors.list_size}
    write_json(encoding.output / MANIFEST_FILE, closed)
    for folder in (INPUT_FOLDER, QUEUE_FOLDER, SUMS_FOLDER):
        shutil.rmtree(encoding.output / folder, ignore_errors=True)
    for aside in (*encoding.output.glob(".part-*"), *encoding.output.glob(f".{MANIFEST_FILE}.*")):
        remove(aside)  # of processes that were killed


def _read_manifest(output: Path) -> dict[str, Any] | None:
    file = output / MANIFEST_FILE
    return read_object(file, shape=MANIFEST) if file.is_file() else None


def _check_identity(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to put vectors of another encoding beside those that are there."""
    changed = [key for key in now if before.get(key) != now[key]]
    if not changed:
        return
    short = [f"{key} ({before.get(key)!r} there, {now[key]!r} now)" for key in changed if key != "input"]
    if "input" in changed:
        short.append("the input's content")
    raise UserError(f"{output} holds vectors that differ in {', '.join(short)}; give another folder, or remove it.")


def _check_is_ours(output: Path) -> None:
    """Refuse a folder with other content and no manifest, before anything is written to it."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; give a folder that is new or empty.")
    if not output.is_dir() or (output / MANIFEST_FILE).is_file():
        return
    ours = (INPUT_FOLDER, f"{INPUT_FOLDER}.writing", LOCK_FILE)
    names = sorted(path.name for path in output.iterdir())
    if other := [name for name in names if name not in ours and not name.startswith(f".{MANIFEST_FILE}.")]:
        raise UserError(f"{output} holds {other[0]!r} and no {MANIFEST_FILE}; give a folder that is new or empty.")


def _sums_of_parts(output: Path, manifest: dict[str, Any]) -> list[str]:
    """The recorded sum of each shard's file; empty where it was never finished."""
    beside = [output / SUMS_FOLDER / part_name(shard) for shard in range(len(manifest["shards"]))]
    noted = [file.read_text(encoding="ascii", errors="replace") if file.is_file() else "" for file in beside]
    # A note is newer than the manifest, where a part was made anew.
    return [note or shard.get("sha256", "") for note, shard in zip(noted, manifest["shards"], strict=True)]


def _have_sums(expected: Mapping[Path, str]) -> list[bool]:
    """Whether each file has the sum that it should have; one that is there and has another is said."""

    def has_sum(file: Path) -> bool:
        is_whole = file.is_file() and sha256(file) == expected[file]
        if file.is_file() and not is_whole:
            logger.warning("%s is cut short or changed; it is made anew", file)
        return is_whole

    with ThreadPoolExecutor() as pool:  # a sum is taken outside the interpreter's lock
        return list(pool.map(has_sum, expected))


def _write_part(file: Path, ids: Any, vectors_ND: np.ndarray[Any, Any], dtype: VectorDtype) -> None:
    with np.errstate(over="ignore"):  # refused below
        stored = vectors_ND.astype(dtype)
    finite = np.isfinite(stored).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        reason = "too large for float16; use --dtype float32" if np.isfinite(vectors_ND[row]).all() else "not finite"
        raise UserError(f"The vector of id {ids[row].as_py()!r} has a number that is {reason}.")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
    # Not the process's number: on several machines two may have the same.
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    # Hardly two numbers are alike, so a dictionary of them only makes the file larger.
    pq.write_table(pa.table({"id": ids, "vector": vectors}), aside, compression="zstd", use_dictionary=False)
    sum_ = sha256(aside)
    aside.replace(file)
    (file.parent / SUMS_FOLDER).mkdir(exist_ok=True)
    write_text(file.parent / SUMS_FOLDER / file.name, sum_)


def _work(worker: int, encoding: CorpusEncoding, num_workers: int) -> None:
    """Encode shards until there are none left."""
    take_gpu(worker)
    if num_workers > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // num_workers))
    encode, queue = ShardEncoder(encoding), JobQueue(encoding.output / QUEUE_FOLDER)

    def encode_shard(job: Job) -> None:
        started = time.monotonic()
        rows = encode(int(job.details["shard"]))
        seconds, done = time.monotonic() - started, queue.num_done() + 1
        logger.info("shard %s: %d rows in %.1f s (%d of %d done)", job.name, rows, seconds, done, len(queue.jobs))

    queue.work(encode_shard)
