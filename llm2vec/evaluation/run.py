"""Any model on any set of tasks, by any number of processes: what is left to do, who does it, what came out.

OUTPUT_DIR/results/MODEL/REVISION/TASK.json     one file a task, written whole or not at all
OUTPUT_DIR/queue/MODEL/REVISION/                the jobs, while there are any: see `corpus.queue`
    worker-N/                                   what mteb writes for one worker; finished files move to results/
    shards/JOB.safetensors                      hits in one shard of a big corpus
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch.distributed as dist

from llm2vec.corpus.queue import JobQueue, beside, take_gpu
from llm2vec.evaluation import mteb_adapter
from llm2vec.evaluation.cost import MAX_TOKENS, cost_table, measure_speed, task_cost
from llm2vec.evaluation.files import parts_of
from llm2vec.evaluation.jobs import Request, jobs_of, leaves_of, plan, prepare, work
from llm2vec.evaluation.models import load_encoder
from llm2vec.evaluation.scores import TaskScore, kept_score, score_aggregate
from llm2vec.files import alone_in, write_text
from llm2vec.processes import PATIENCE
from llm2vec.table import Table
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

#: Table 8 of the paper (arXiv 2509.03020): the tasks of its ablations.
SUBSET15 = (
    "SciFact", "ArguAna", "NFCorpus", "StackOverflowDupQuestions", "SciDocsRR", "BiorxivClusteringS2S",
    "MedrxivClusteringS2S", "TwentyNewsgroupsClustering", "SprintDuplicateQuestions", "Banking77Classification",
    "EmotionClassification", "MassiveIntentClassification", "STS17", "SICK-R", "STSBenchmark",
)  # fmt: skip


class Outcome(NamedTuple):
    """Scores of the tasks, in the order asked for, and a sentence for each thing that is missing."""

    scores: dict[str, TaskScore]
    problems: list[str]


def expand(words: Sequence[str]) -> dict[str, str]:
    """Tasks that words stand for, each once, in this order: task -> the benchmark that defines it.

    A word is `subset15` (Table 8 of the paper), `mteb56` (MTEB(eng, v1)), `beir14` (BEIR without MSMARCO), a benchmark
    of mteb, or a task.
    """
    tasks: dict[str, str] = {}
    for word in words:
        benchmark, names = mteb_adapter.BENCHMARK, [word]
        if word == "subset15":
            names = list(SUBSET15)
        elif word == "mteb56":
            names = mteb_adapter.benchmark_tasks(mteb_adapter.BENCHMARK) or []
        elif word == "beir14":
            names = [name for name in mteb_adapter.benchmark_tasks("BEIR") or [] if name != "MSMARCO"]
        elif (of_benchmark := mteb_adapter.benchmark_tasks(word)) is not None:
            benchmark, names = word, of_benchmark
        for name in names:
            tasks.setdefault(name, benchmark)
    return tasks


def evaluate_all(request: Request, num_workers: int = 1) -> Outcome | None:
    """Do an evaluation, or what is left of it; what came out, or None on other ranks than the first.

    Under torchrun every rank calls this and is a worker, and `num_workers` stays 1; otherwise this process is one and
    starts the others. A `UserError` where a name is unknown, or the model cannot be loaded.
    """
    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if num_ranks > 1 and num_workers > 1:
        raise UserError("Under torchrun the ranks are the workers; leave out --workers.")
    _prepare_process(int(os.environ.get("LOCAL_RANK", 0)), request.model.device)
    # Before the model, which takes longer to load. The other ranks find theirs when they need them.
    names = list(request.tasks) if rank == 0 else list(request.tasks)[:1]
    tasks = {name: request.find(name) for name in names}
    encoder = load_encoder(request.model)
    meta = encoder.mteb_model_meta
    root = Path(request.output_dir)
    of_revision = mteb_adapter.result_file(meta, next(iter(tasks.values())), root).parent
    folder = root / "queue" / of_revision.relative_to(root / "results")
    with alone_in(folder, "evaluation of this model") if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            _say_where(request, encoder, tasks)
            prepare(folder, plan(request, encoder, tasks))
        if num_ranks > 1:  # no rank begins before the first has made the queue; nothing else is ever exchanged
            dist.init_process_group("gloo", timeout=PATIENCE)
            dist.barrier()
            dist.destroy_process_group()
        queue = JobQueue(folder)
        num_workers = min(num_workers, len(queue.unfinished()))
        with beside(num_workers, folder, _worker, request, folder):
            work(request, encoder, queue, rank)
            if rank != 0:
                return None
            queue.wait()
        outcome = collect(meta, tasks, request.output_dir, queue)
    for done in (folder, folder.parent, folder.parent.parent):
        with contextlib.suppress(OSError):  # jobs are left; or another model's or revision's queue lies there
            done.rmdir()
    return outcome


def dry_run(request: Request, num_workers: int) -> Table:
    """A table that says what an evaluation would cost, at the speed of the model here; no data are read."""
    _prepare_process(0, request.model.device)
    tasks = {name: request.find(name) for name in request.tasks}
    encoder = load_encoder(request.model)
    max_tokens = encoder.mteb_model_meta.max_tokens or MAX_TOKENS

    def encode(texts: list[str]) -> object:
        return mteb_adapter.encode_documents(encoder, texts, request.batch_size)

    speed = measure_speed(encode, mteb_adapter.descriptions(), max_tokens, request.batch_size)
    leaves = leaves_of(tasks)
    costs = {name: task_cost(leaf, max_tokens) for name, leaf in leaves.items()}
    jobs = [job.size for leaf in leaves.values() for job in jobs_of(leaf, mteb_adapter.is_dense(encoder), max_tokens)]
    return cost_table(costs, speed, jobs, num_workers)


def collect(meta: Any, tasks: Mapping[str, Any], output_dir: str, queue: JobQueue) -> Outcome:
    """Aggregates from their parts, the scores of all tasks, and what is missing; an empty queue is cleared."""
    _merge_run_settings(meta, tasks, output_dir, queue.folder)
    scores: dict[str, TaskScore] = {}
    for name, task in tasks.items():
        parts = parts_of(task)
        if parts and all(kept_score(meta, part, output_dir) is not None for part in parts):
            score_aggregate(meta, task, output_dir)
        if (score := kept_score(meta, task, output_dir)) is not None:
            scores[name] = score
    problems = list(queue.failures().values())
    if unfinished := queue.unfinished():
        problems.append(
            f"{len(unfinished)} of {len(queue.jobs)} jobs are not done, because a worker ended before its time: "
            f"{', '.join(unfinished[:5])}{' ...' * (len(unfinished) > 5)}; start again to go on."
        )
    if not problems:
        queue.clear()
    return Outcome(scores, problems)


def _say_where(request: Request, encoder: Any, tasks: Mapping[str, Any]) -> None:
    """Where results go, which of other revisions lie there, which tasks have no instruction, which were trained on."""
    folder = mteb_adapter.result_file(encoder.mteb_model_meta, next(iter(tasks.values())), request.output_dir).parent
    logger.info("Results go to %s", folder)
    others = sorted({file.parent.name for file in folder.parent.glob("*/*.json")} - {folder.name})
    if others:
        logger.info("Not used: results of %d other revisions of this name (%s)", len(others), ", ".join(others))
    if isinstance(encoder, mteb_adapter.LLM2VecEncoder):
        leaves = leaves_of(tasks).values()
        for leaf in leaves:
            encoder.instruction(leaf.metadata, None)
        if request.model.instructions_file is None:
            encoder.say_foreign(leaf.metadata.name for leaf in leaves)
    if request.model.as_published:
        bare = [name for name in leaves_of(tasks) if name not in encoder.model.prompts]
        if bare:
            logger.warning("prompts: the export has none for %d tasks, such as %s", len(bare), bare[0])
    # mteb counts what sets were made from each other: MSMARCO is seen by who trained on NanoMSMARCO.
    seen = [name for name in tasks if name in (encoder.mteb_model_meta.get_training_datasets() or ())]
    if seen:
        logger.info(
            "Trained on: %d of %d tasks are of sets that %s was trained on, so its scores there are not zero-shot (%s)",
            len(seen), len(tasks), encoder.mteb_model_meta.name, ", ".join(seen),
        )  # fmt: skip


def _prepare_process(worker: int, device: str | None) -> None:
    """Give a process its GPU, and keep its progress readable."""
    datasets.disable_progress_bars()  # there would be one for each block of a corpus
    take_gpu(worker, device)


def _worker(worker: int, request: Request, folder: Path) -> None:
    """What another process than the first does."""
    _prepare_process(worker, request.model.device)
    work(request, load_encoder(request.model), JobQueue(folder), worker)


def _merge_run_settings(meta: Any, tasks: Mapping[str, Any], output_dir: str, folder: Path) -> None:
    """What mteb notes about each run, a line a task: one file from all workers'; not a worker's to write."""
    target = mteb_adapter.result_file(meta, next(iter(tasks.values())), output_dir).with_name("run_settings.jsonl")
    lines: dict[tuple[str, ...], str] = {}
    for file in [target, *sorted(folder.glob("worker-*/results/**/run_settings.jsonl"))]:
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            entry = json.loads(line)
            lines[(entry["task"], *entry["splits"], *entry["subsets"])] = line
    if lines:
        write_text(target, "".join(f"{line}\n" for line in lines.values()))
