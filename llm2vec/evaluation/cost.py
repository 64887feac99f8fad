"""What an evaluation costs: texts and tokens of a task from mteb's bundled statistics, hours at a measured speed.

The statistics count characters, and a token is taken to be `CHARACTERS_A_TOKEN` of them, for the tasks and for the
sample that is timed alike: with another tokenizer the tokens are off, the hours are not. Equal texts count once. Of
a set's texts only the mean length is known, so that cutting it at the model's length overestimates sets in which few
texts are long.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm2vec.table import Cell, Table
from llm2vec.types import CHARACTERS_A_TOKEN

#: What template and instruction add to a text.
INSTRUCTION_TOKENS = 16
#: Where mteb does not say how long a model's texts may be.
MAX_TOKENS = 512


class Cost(NamedTuple):
    """Different texts that are encoded, and tokens of those."""

    texts: int
    tokens: float


def task_cost(task: Any, max_tokens: float = MAX_TOKENS) -> Cost | None:
    """Cost of one of mteb's tasks (not of an aggregate); None where mteb has no statistics of it, or of no texts.

    Its data need not be loaded. A model cuts a text to `max_tokens`.
    """
    if task.metadata.descriptive_stats is None:
        return None
    total = Cost(0, 0.0)
    for split, statistics in _splits(task):
        for side, texts in statistics.items():
            if not (isinstance(texts, Mapping) and texts.get("average_text_length")):
                continue
            if task.metadata.type == "Summarization" and side == "text_statistics":
                continue  # the summaries are compared with one another, not with their text
            number = texts.get("unique_texts") or round(texts["total_text_length"] / texts["average_text_length"])
            if split not in task.eval_splits:  # a classifier is trained on samples of each label, drawn several times
                labels = (statistics.get("label_statistics") or {}).get("unique_labels", 2)
                number = min(number, int(task.n_experiments * task.samples_per_label * labels))
            bare = texts["average_text_length"] / CHARACTERS_A_TOKEN
            tokens = min(bare + (0 if side.startswith("documents") else INSTRUCTION_TOKENS), max_tokens)
            total = Cost(total.texts + number, total.tokens + number * tokens)
    return total if total.texts else None


def num_documents(task: Any) -> int:
    """Size of the corpus a retrieval task searches, without reading it where possible; 0 for all other tasks."""
    if task.metadata.type != "Retrieval" or task.is_aggregate:
        return 0
    if task.data_loaded:
        return sum(len(split["corpus"]) for splits in task.dataset.values() for split in splits.values())
    own = Path(task.metadata.dataset["path"]) / "corpus.jsonl"
    if own.is_file():
        with own.open("rb") as lines:
            return sum(1 for _ in lines)
    if task.metadata.descriptive_stats is None:
        return 0
    return sum(statistics.get("num_documents", 0) for _, statistics in _splits(task))


def measure_speed(encode: Callable[[list[str]], object], english: str, max_tokens: float, batch_size: int) -> float:
    """Tokens a second of a model, at `CHARACTERS_A_TOKEN`, on four batches of texts of mixed lengths.

    The texts carry no instruction and are cut from `english`, some thousand characters.
    """
    lengths = [200 + 150 * (number % 9) for number in range(4 * batch_size)]
    starts = [97 * number % max(1, len(english) - length) for number, length in enumerate(lengths)]
    texts = [english[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    encode(texts[:2])  # the first call moves the model to its device and compiles what is compiled
    began = time.monotonic()
    encode(texts)
    tokens = sum(min(len(text) / CHARACTERS_A_TOKEN, max_tokens) for text in texts)
    return tokens / (time.monotonic() - began)


def longest(sizes: Sequence[float], num_workers: int) -> float:
    """What the busiest of several workers has to do when each takes the largest job left."""
    loads = [0.0] * num_workers
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return max(loads)


def cost_table(costs: Mapping[str, Cost | None], speed: float, jobs: Sequence[float], num_workers: int) -> Table:
    """A table of tasks with their texts, tokens and hours, at `speed` tokens a second of one worker.

    `jobs` are the tokens of each job that workers can take.
    """
    known = [cost for cost in costs.values() if cost is not None]
    whole = Cost(sum(cost.texts for cost in known), math.fsum(cost.tokens for cost in known))
    rows: list[list[Cell]] = []
    for name, cost in [*costs.items(), (f"{len(known)} tasks", whole)]:
        figures: list[Cell] = ["?", "?", "?"]
        if cost is not None:
            figures = [f"{cost.texts:,}", cost.tokens / 1e6, f"{cost.tokens / speed / 3600:.3f}"]
        rows.append([name, *figures])
    if num_workers > 1:
        hours = longest(jobs, num_workers) / speed / 3600
        rows.append([f"on {num_workers} workers of that speed", "", "", f"{hours:.3f}"])
    note = (
        f"Encoding only, at {speed:,.0f} tokens a second, measured here on a short sample; a token is taken to be "
        f"{CHARACTERS_A_TOKEN} characters, equal texts are counted once."
    )
    if len(known) < len(costs):
        note = f"{len(costs) - len(known)} tasks without statistics in mteb (?) are not in the sum.\n{note}"
    return Table(["task", "texts", "M tokens", "hours"], rows, note=note)


def _splits(task: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Split -> statistics of what is encoded of it: of the task's subsets only, where they are counted apart."""
    every = task.metadata.descriptive_stats
    wanted = [*task.eval_splits, *(["train"] if task.metadata.type == "Classification" else [])]
    for split in dict.fromkeys(wanted):
        apart = every.get(split, {}).get("hf_subset_descriptive_stats") or {}
        chosen = [apart[subset] for subset in task.hf_subsets if subset in apart]
        for statistics in chosen or ([every[split]] if split in every else []):
            yield split, statistics
