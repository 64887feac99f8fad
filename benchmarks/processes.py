"""How training speed grows with the number of processes: Stage I by the ordinary script, under torchrun.

    speeds = speed_over_processes(plan.shape, (1, 2), rows=8, rounds=3, on_cpu=True)
    lines = process_lines(speeds, rows=8)

Each process has one thread (or one card) and as many rows a step as the others, so that twice as many do twice the work
in the same time where exchanging gradients costs nothing. Run by `benchmarks/benchmark.py`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.inputs import DOCUMENT_LENGTH, INSTRUCTION, LONGEST_ROW, QUERY_LENGTH, Shape, random_pairs, write_model
from benchmarks.measure import Line
from llm2vec.types import UserError

SCRIPT = Path(__file__).parents[1] / "experiments/run_stage_I.py"
#: Steps of a run; the first ones, which warm libraries up, do not count.
NUM_STEPS, NUM_WARM_UP = 6, 2


def speed_over_processes(
    shape: Shape, counts: Sequence[int], *, rows: int, rounds: int, on_cpu: bool
) -> dict[int, list[float]]:
    """Tokens a second of a training run with so many processes, in each round; the runs take turns.

    Args:
        shape: of the model.
        counts: numbers of processes.
        rows: of a process, a step.
        rounds: how often all of them run.
        on_cpu: not on an accelerator, even where there is one.

    Raises:
        UserError: a run failed.
    """
    speeds: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "base", shape, with_head=True)
        _write_rows(folder, rows * NUM_STEPS * max(counts))
        for turn in range(rounds):
            for count in counts:
                output = folder / f"{count}-{turn}"
                speeds[count].append(_speed_of_run(folder, output, count, rows, on_cpu))
    return speeds


def process_lines(speeds: dict[int, list[float]], rows: int) -> list[Line]:
    """The speeds as lines of the table, each compared with the first."""
    first = next(iter(speeds))
    lines = []
    for count, of_count in speeds.items():
        share = [speed * first / (count * alone) for speed, alone in zip(of_count, speeds[first], strict=True)]
        beside = "" if count == first else f"of {count} times one's speed: {min(share):.2f} to {max(share):.2f}"
        title = f"Stage I as trained, {count} process(es), {rows} rows each: tokens a second"
        lines.append(Line(title, of_count, digits=0, note=beside))
    return lines


def _write_rows(folder: Path, number: int) -> None:
    queries, documents = (random_pairs(number, length) for length in (QUERY_LENGTH, DOCUMENT_LENGTH))
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as out:
        for (_, query), (_, document) in zip(queries, documents, strict=True):
            out.write(json.dumps({"query": query, "positive": document}) + "\n")
    sources = {"rows": {"file": "rows.jsonl", "instruction": INSTRUCTION}}
    (folder / "sources.json").write_text(json.dumps(sources), encoding="utf-8")


def _speed_of_run(folder: Path, output: Path, count: int, rows: int, on_cpu: bool) -> float:
    config: dict[str, Any] = {
        "model_name_or_path": str(folder / "base"),
        "sources_file": str(folder / "sources.json"),
        "output_dir": str(output),
        "template": "plain",
        "max_seq_length": LONGEST_ROW,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-5,
        "max_steps": NUM_STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": not on_cpu,
        "use_cpu": on_cpu,
    }
    file = output.with_suffix(".json")
    file.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    ended = subprocess.run([*command, str(SCRIPT), str(file)], env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{SCRIPT} with {count} process(es) failed: {ended.stderr.strip()[-500:]}")
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry]
    return statistics.median(speeds[NUM_WARM_UP:])
