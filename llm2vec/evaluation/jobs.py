"""The jobs of an evaluation: what is left to do, cut into pieces, and how a worker does one.

A job is a task (a part of CQADupstackRetrieval counts as one) or, for a corpus above `SHARD_DOCUMENTS`, a shard of
it, and a last one that merges the hits and has mteb score them. The jobs do not depend on the number of workers, and
neither does any score.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm2vec.corpus import search
from llm2vec.corpus.queue import Job, JobQueue
from llm2vec.evaluation.cost import MAX_TOKENS, num_documents, task_cost
from llm2vec.evaluation.files import load_data, parts_of
from llm2vec.evaluation.models import EvaluatedModel
from llm2vec.evaluation.mteb_adapter import BENCHMARK, find_task, is_dense, result_file
from llm2vec.evaluation.scores import evaluate, kept_score
from llm2vec.evaluation.search import CorpusSearch
from llm2vec.files import json_hash, whole
from llm2vec.types import CHARACTERS_A_TOKEN, UserError

logger = logging.getLogger(__name__)

#: Documents of a shard; corpora above this are sharded.
SHARD_DOCUMENTS = 128 * search.BLOCK
#: Characters of a document, for the order of jobs only, where nothing is known about a corpus but its size.
DOCUMENT_CHARACTERS = 400


@dataclass(frozen=True)
class Request:
    """One evaluation."""

    model: EvaluatedModel  #: The model
    #: Task -> the benchmark that defines its splits and languages, from `expand`.
    tasks: Mapping[str, str]
    output_dir: str  #: Where results go
    local_data_dir: str | None = None  #: Where data sets are read from; None = the hub
    batch_size: int = 32  #: Texts a forward pass
    #: Whether rankings are kept, under OUTPUT_DIR/predictions/MODEL/REVISION.
    save_predictions: bool = False

    def find(self, name: str) -> Any:
        """A task of this request, or a part of one; its data are not read."""
        return find_task(name, self.local_data_dir, self.tasks.get(name, BENCHMARK))

    def rankings(self, of_revision: Path) -> Path:
        """Where they are kept; the folder given ends in the names of model and revision, too."""
        return Path(self.output_dir, "predictions", *of_revision.parts[-2:])


def leaves_of(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Tasks by name, with the parts of an aggregate in its place, each once."""
    return {leaf.metadata.name: leaf for task in tasks.values() for leaf in parts_of(task) or [task]}


def plan(request: Request, encoder: Any, tasks: Mapping[str, Any]) -> list[Job]:
    """The jobs that are left: those of tasks without a result of use."""
    meta, leaves = encoder.mteb_model_meta, leaves_of(tasks)
    left = {name: leaf for name, leaf in leaves.items() if kept_score(meta, leaf, request.output_dir) is None}
    files = {name: result_file(meta, leaf, request.output_dir) for name, leaf in leaves.items() if name not in left}
    bare = [n for n, f in files.items() if not (request.rankings(f.parent) / leaves[n].prediction_file_name).is_file()]
    if request.save_predictions and bare:
        logger.warning(
            "--save_predictions: the scores of %d of %d tasks, such as %s, lie here without their rankings; another "
            "--output_dir has both made", len(bare), len(leaves), bare[0],
        )  # fmt: skip
    return [job for leaf in left.values() for job in jobs_of(leaf, is_dense(encoder), meta.max_tokens or MAX_TOKENS)]


def jobs_of(task: Any, can_shard: bool, max_tokens: float = MAX_TOKENS) -> list[Job]:
    """The jobs of one task; sizes are in tokens."""
    name, documents = task.metadata.name, num_documents(task)
    cost = task_cost(task, max_tokens)
    size = cost.tokens if cost is not None else documents * DOCUMENT_CHARACTERS / CHARACTERS_A_TOKEN
    num_shards = math.ceil(documents / SHARD_DOCUMENTS)
    if not can_shard or num_shards < 2:
        return [Job(name, size, details={"task": name})]
    # Shards of other data must not be taken for these.
    stem = f"{name}.{json_hash(task.metadata.revision)}"
    shards = [
        Job(f"{stem}.{i}-of-{num_shards}", size / num_shards, details={"task": name, "shard": i, "of": num_shards})
        for i in range(num_shards)
    ]
    names = tuple(shard.name for shard in shards)
    return [*shards, Job(name, size / num_shards, after=names, details={"task": name})]


def prepare(folder: Path, jobs: Sequence[Job]) -> JobQueue:
    """Make the queue, or go on with the one of an earlier start, whose finished shards are kept."""
    shards = {job.name for job in jobs if _shard_file(folder, job.name).is_file()}
    if shards:
        logger.info("Going on with %d shards that an earlier start has searched", len(shards))
    return JobQueue.prepare(folder, jobs, shards)


def work(request: Request, encoder: Any, queue: JobQueue, worker: int) -> None:
    """Do jobs until there are none left; a task that cannot be done is noted and does not stop the others.

    The first worker, 0, shows its progress on a terminal.
    """
    task: Any = None

    def do(job: Job) -> None:
        nonlocal task
        name = str(job.details["task"])
        logger.info("%s (%d of %d jobs done)", job.name, queue.num_done(), len(queue.jobs))
        if task is None or task.metadata.name != name:
            task = None  # its data go before the next task's come
            task = request.find(name)
        load_data(task)
        if "shard" not in job.details:
            return _score(request, encoder, task, job, queue.folder, worker)
        keys = search_shard(encoder, task, int(job.details["shard"]), int(job.details["of"]), request.batch_size)
        file = _shard_file(queue.folder, job.name)
        file.parent.mkdir(exist_ok=True)
        with whole(file) as aside:
            save_file(keys, aside)

    queue.work(do)


def search_shard(encoder: Any, task: Any, shard: int, num_shards: int, batch_size: int) -> dict[str, torch.Tensor]:
    """Search one shard, from 0, of a retrieval task whose data are loaded: search -> keys of hits, a row a query."""
    task.convert_v1_dataset_format_to_v2(None)
    keys = {}
    encode_kwargs: Any = {"batch_size": batch_size, "show_progress_bar": False}
    for subset in task.hf_subsets:
        for split in task.eval_splits:
            data = task.dataset[subset][split]
            # As mteb does before it searches.
            judged = [row for row, query in enumerate(data["queries"]["id"]) if data["relevant_docs"].get(query)]
            queries = data["queries"].select(judged)
            found = CorpusSearch(encoder, queries, data["corpus"], task.metadata, split, subset, encode_kwargs)
            keys[found.name] = found.keys(max(task.k_values), shard, num_shards)
    return keys


def _score(request: Request, encoder: Any, task: Any, job: Job, folder: Path, worker: int) -> None:
    """Have mteb score a task in this worker's own cache, and move the result to where it belongs."""
    # A worker of an earlier start may still be at work under the same number.
    meta, own = encoder.mteb_model_meta, folder / f"worker-{worker}-{os.getpid()}"
    target, made = result_file(meta, task, request.output_dir), result_file(meta, task, own)
    made.parent.mkdir(parents=True, exist_ok=True)
    made.unlink(missing_ok=True)
    if target.is_file():
        shutil.copy(target, made)  # splits and languages that it has are not made anew
    shards = [_shard_file(folder, name) for name in job.after]
    found = _merged([load_file(shard) for shard in shards]) if shards else None
    evaluate(
        encoder, [task], own, batch_size=request.batch_size, show_progress_bar=worker == 0 and sys.stderr.isatty(),
        found=found, prediction_folder=request.rankings(folder) if request.save_predictions else None,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    for file in (made, made.with_name("model_meta.json")):
        with whole(target.with_name(file.name)) as aside:
            shutil.copy(file, aside)
    for shard in shards:
        shard.unlink(missing_ok=True)


def _merged(shards: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    if any(shard.keys() != shards[0].keys() for shard in shards):
        raise UserError("The shards of a corpus were searched with different data; remove the queue and start again.")
    return {name: search.merge([shard[name] for shard in shards], shards[0][name].shape[1]) for name in shards[0]}


def _shard_file(folder: Path, job: str) -> Path:
    return folder / "shards" / f"{job}.safetensors"
