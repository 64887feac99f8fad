"""A run's start up to its first batches, without a model; every process prints what it took, as a line of JSON.

torchrun --nproc_per_node=2 tests/first_batches.py ARCHIVE OUTPUT_DIR
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from pathlib import Path

import psutil
from torch.utils.data import DataLoader

from llm2vec.cli import user_errors_in_one_sentence
from llm2vec.processes import rank, world_size
from llm2vec.training.config.arguments import training_arguments
from llm2vec.training.config.file import load_config
from llm2vec.training.rows import open_rows, row_orders
from llm2vec.training.run import provenance

ROWS_AT_ONCE = 16
NUM_BATCHES = 200


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, so that nobody shares it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])  # type: ignore[index]


def unshared_bytes() -> int:
    """Memory that only this process holds, mapped or not."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return 1024 * sum(int(kb) for kb in re.findall(r"Private_(?:Clean|Dirty):\s+(\d+) kB", rollup))


def read_bytes() -> int:
    """What this process has read by calls; mapped pages do not count."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split("rchar: ")[1].split()[0])


def mapped_tables() -> list[str]:
    """Files of Arrow tables in this process's memory."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return sorted({line.split()[-1] for line in maps if line.endswith(".arrow")})


def main(archive: Path, output_dir: Path) -> None:
    """Open the rows, take the provenance, draw batches."""
    output_dir.mkdir(parents=True, exist_ok=True)
    keys = {
        "model_name_or_path": "a-model",
        "dataset_file_path": str(archive),
        "output_dir": str(output_dir),
        "per_device_train_batch_size": ROWS_AT_ONCE,
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    file = output_dir / f"config_{psutil.Process().pid}.json"
    file.write_text(json.dumps(keys), encoding="utf-8")
    config = load_config(file, "stage_II")
    args = training_arguments(config)
    assert args.device is not None  # joins the processes
    anonymous, read, begun = anonymous_bytes(), read_bytes(), time.perf_counter()
    rows = open_rows(config, num_negatives=1)
    opened = time.perf_counter()
    sampler, _ = row_orders(config, args, rows, world_size())
    run = provenance(config, args, rows, []) if rank() == 0 else None
    hashed = time.perf_counter()
    batches = iter(DataLoader(rows, ROWS_AT_ONCE, sampler=sampler, collate_fn=list))
    next(batches)
    to_first_batch = time.time() - psutil.Process().create_time()
    cpu = sum(psutil.Process().cpu_times()[:2])
    drawn = 1 + sum(1 for _ in itertools.islice(batches, NUM_BATCHES - 1))
    figures = {
        "rank": rank(),
        "rows": len(rows),
        "batches": drawn,
        "seconds_to_first_batch": round(to_first_batch, 2),
        "cpu_seconds_to_first_batch": round(cpu, 2),
        "seconds_to_open": round(opened - begun, 2),
        "seconds_to_hash": round(hashed - opened, 2),
        "read_bytes": read_bytes() - read,
        "anonymous_bytes_before": anonymous,
        "anonymous_bytes": anonymous_bytes(),
        "unshared_bytes": unshared_bytes(),
        "mapped": mapped_tables(),
        "sha256": [entry["sha256"] for entry in run["data"]] if run else None,
    }
    (output_dir / f"figures_{rank()}.json").write_text(json.dumps(figures), encoding="utf-8")
    figures |= {"mapped": len(figures["mapped"]), "sha256": None}  # type: ignore[arg-type]
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main(*map(Path, sys.argv[1:3]))
