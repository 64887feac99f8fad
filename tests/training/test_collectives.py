"""Processes meet equally often, in the same order, and wait for one that has long work of its own."""

from __future__ import annotations

import faulthandler
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked_runs import Setup, make_data, run, said
from torch.utils._python_dispatch import TorchDispatchMode

from llm2vec.processes import rank_zero_first, wait_for_all
from llm2vec.training import step as step_module


class Recorded(TorchDispatchMode):
    """Writes each collective to a file: its name, and the form of the tensors it is given."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._out = file.open("w", buffering=1, encoding="utf-8")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("c10d.") and "wait" not in str(func):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self._out.write(f"{func} {[(list(t.shape), str(t.dtype)) for t in tensors]}\n")
        return func(*args, **(kwargs or {}))


def recording(folder: Path, name: str) -> Setup:
    """The second of two processes needs a micro-batch more than the first; what both exchange is written down."""

    def setup(rank: int) -> None:
        faulthandler.dump_traceback_later(120, exit=True)  # where they differ, one of them may wait for ever
        needed = step_module.number_of_pieces
        step_module.number_of_pieces = lambda tokens, most: needed(tokens, most) + rank
        Recorded(folder / f"{name}.{rank}.collectives").__enter__()

    return setup


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collectives")


@pytest.mark.parametrize(
    ("name", "script", "keys"),
    [
        ("sharded", "run_stage_I.py", {"fsdp": True}),
        ("replicated", "run_stage_I.py", {}),
        ("cached", "run_stage_II.py", {"use_peft": True, "lora_r": 4}),
    ],
    ids=["fsdp", "ddp", "cached gradients"],
)
def test_ragged_micro_batches_exchange_alike(name: str, script: str, keys: dict[str, Any], folder: Path) -> None:
    shared = make_data(folder) | {"max_steps": 2, "save_strategy": "no", "save_only_model": True}
    shared |= {"total_batch_size": 16, "tokens_per_microbatch": 128, "logging_steps": 1, "max_seq_length": 64}
    output = folder / name
    assert run(script, output, shared | keys, 2, recording(folder, name)) == [0, 0], said(output) + said(output, 1)
    one, other = ((folder / f"{name}.{rank}.collectives").read_text(encoding="utf-8").splitlines() for rank in (0, 1))
    assert one == other and len(one) > 10


def _late(process: int, folder: Path, seconds: float) -> None:
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(seconds=seconds), rank=process, world_size=2
    )  # fmt: skip
    wait_for_all()
    with rank_zero_first():
        if process == 0:
            time.sleep(2 * seconds)
            (folder / "table").touch()
        assert (folder / "table").exists()
    if process == 0:  # as where it alone saves
        time.sleep(2 * seconds)
    wait_for_all()
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


def test_long_work_of_one_process_outlasts_no_timeout(tmp_path: Path) -> None:
    """Neither a table that the first one builds, nor what it saves."""
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=_late, args=(process, tmp_path, 1.0)) for process in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
