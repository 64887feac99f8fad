"""Scores of tasks: made where none is kept, read where one is, and told apart from those that are of no use.

    tasks = load_tasks(["SciFact", "MyOwnSet"], local_data_dir="cache/eval")
    encoder = LLM2VecEncoder(model, ["output/stage_I", "output/stage_II"], load_instructions(PATH))
    scores = evaluate(encoder, tasks, "results")        # {"SciFact": {"metric": "ndcg_at_10", "main_score": 0.7, ...}}

The tasks are loaded once for any number of models. Tasks, models and results here are mteb's, but mteb is not imported:
only the adapter does that.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np
from torch import Tensor

from llm2vec.evaluation.files import Task, load_data, parts_of
from llm2vec.evaluation.mteb_adapter import find_task, is_dense, kept_result, result_file, run_task
from llm2vec.evaluation.search import StreamingSearch

logger = logging.getLogger(__name__)

Meta: TypeAlias = Any  #: the `ModelMeta` of a model
Result: TypeAlias = Any  #: a `TaskResult` of mteb


class TaskScore(TypedDict):
    """The result of one task; scores run from 0 to 1 (correlations from -1)."""

    metric: str
    main_score: float
    scores: dict[str, dict[str, float]]
    result_file: str


def load_tasks(task_names: Sequence[str], local_data_dir: str | Path | None = None) -> list[Task]:
    """Find tasks by name and read their data, for `evaluate`; errors as in `find_task` and `load_data`."""
    tasks = [find_task(name, local_data_dir) for name in task_names]
    for task in tasks:
        load_data(task)
    return tasks


def evaluate(
    model: Any,
    tasks: Iterable[Task],
    output_dir: str | Path,
    *,
    batch_size: int = 32,
    show_progress_bar: bool = False,
    found: Mapping[str, Tensor] | None = None,
    prediction_folder: Path | None = None,
) -> dict[str, TaskScore]:
    """Score a model, an `LLM2VecEncoder` or any other that mteb takes, on tasks from `load_tasks`. Results for this
    revision and this data in `output_dir`, `results/<model>/<revision>/<task>.json`, are not made anew.

    `batch_size` texts go through at once. `found` are merged hits from `jobs.search_shard` of the only task; without
    them the search is made here. Rankings and other predictions are kept in `prediction_folder`, if one is given. mteb
    seeds the process's generators whenever it makes a task or scores one.
    """
    meta = model.mteb_model_meta
    if is_dense(model):
        model = StreamingSearch(model, found)
    scores: dict[str, TaskScore] = {}
    for task in tasks:
        for part in (task, *parts_of(task)):
            # Some tasks draw samples from a generator they keep: a second model would be given other samples.
            part.rng_state, part.np_rng = random.Random(part.seed), np.random.default_rng(part.seed)
        is_useless = any(_kept_result(meta, part, output_dir)[1] for part in (task, *parts_of(task)))
        result = run_task(
            model,
            task,
            output_dir,
            "always" if is_useless else "only-missing",
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress_bar},
            prediction_folder=prediction_folder,
        )
        scores[task.metadata.name] = _task_score(task, result, result_file(meta, task, output_dir))
    return scores


def kept_score(meta: Meta, task: Task, output_dir: str | Path) -> TaskScore | None:
    """The score of a task in `output_dir`; None, and said, if it cannot be read or is of other data."""
    kept, _ = _kept_result(meta, task, output_dir)
    if kept is None or kept.get_missing_evaluations(task):
        return None
    return _task_score(task, kept, result_file(meta, task, output_dir))


def score_aggregate(meta: Meta, task: Task, output_dir: str | Path) -> None:
    """Write the result of an aggregate from those of its parts, which must lie in `output_dir`."""
    result_file(meta, task, output_dir).unlink(missing_ok=True)
    run_task(meta, task, output_dir, "only-cache")


def _task_score(task: Task, result: Result, file: Path) -> TaskScore:
    """What the task asks for: another benchmark may have put more splits and languages into the same file."""
    # Rounded as mteb rounds in its files, so that a score read back equals the score when it was made.
    scores = {
        split: {
            subset["hf_subset"]: round(float(subset["main_score"]), 6)
            for subset in subsets
            if task.is_aggregate or subset["hf_subset"] in task.hf_subsets
        }
        for split, subsets in result.scores.items()
        if split in task.eval_splits
    }
    values = [score for subsets in scores.values() for score in subsets.values()]
    return {
        "metric": task.metadata.main_score,
        "main_score": sum(values) / len(values),
        "scores": scores,
        "result_file": str(file),
    }


def _kept_result(meta: Meta, task: Task, output_dir: str | Path) -> tuple[Result | None, bool]:
    """The kept result of a task, and whether one is of no use; mteb would return old data's and fail on a torn one."""
    name = task.metadata.name
    try:
        kept = kept_result(meta, task, output_dir)
    except (ValueError, KeyError):
        logger.warning("The kept result of %s cannot be read and is made anew", name)
        return None, True
    if kept is not None and kept.dataset_revision != task.metadata.revision:
        logger.warning("The kept result of %s is of other data and is made anew", name)
        return None, True
    return kept, False
