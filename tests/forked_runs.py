"""Runs of the training scripts in processes of their own, which a test may kill; and what two runs must have in common.

Processes are forked, so that they begin with all imports done.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file

import llm2vec.cli
from llm2vec.training.log import LOG_FILE
from llm2vec.training.trainer import EmbedderTrainer

SCRIPTS = Path(__file__).parents[1] / "experiments"

#: Figures that say how long something took.
TIMED = (
    "tokens_per_second", "waiting_for_data", "train_runtime", "train_samples_per_second", "train_steps_per_second",
)  # fmt: skip

#: Called in each process before the script, with its rank.
Setup = Callable[[int], None]


def make_data(folder: Path, num_rows: int = 40) -> dict[str, Any]:
    """Keys of a short run over ragged rows and a base model with a head, both written to `folder`."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(folder / "base")
    family_tokenizer("llama").save_pretrained(folder / "base")
    rows = reference.examples(num_rows, 1, seed=1)
    write_jsonl(
        folder / "words.jsonl",
        [{"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text} for r in rows],
    )
    sources = {"words": {"file": "words.jsonl", "instruction": "find the answer"}}
    (folder / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    return {
        "model_name_or_path": str(folder / "base"),
        "sources_file": str(folder / "sources.json"),
        "max_seq_length": 64,
        "total_batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 7,
        "logging_steps": 3,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def run(
    script: str, output: Path, keys: dict[str, Any], processes: int = 1, setup: Setup = lambda rank: None
) -> list[int]:
    """Run a script; returns the exit codes of its processes, negative ones being signals. What they say goes to
    `<output>.<rank>.txt`."""
    file = output.with_suffix(".json")
    file.write_text(json.dumps({**keys, "output_dir": str(output)}), encoding="utf-8")
    output.with_suffix(".rendezvous").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_run_rank, args=(script, file, rank, processes, setup)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode or 0 for process in started]


def said(output: Path, rank: int = 0) -> str:
    """What a process of the last run said."""
    return output.with_suffix(f".{rank}.txt").read_text(encoding="utf-8")


def _run_rank(script: str, file: Path, rank: int, processes: int, setup: Setup) -> None:
    out = os.open(file.with_suffix(f".{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    logging.getLogger().handlers.clear()  # pytest's, which the fork has brought
    torch.set_num_threads(1)
    llm2vec.cli.SECONDS_BEHIND_THE_FIRST = 1.0  # torchrun, which ends the others, is not there
    code = 0
    try:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        if processes > 1:
            own = {
                "WORLD_SIZE": processes,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": 0,
            }
            os.environ |= {name: str(value) for name, value in own.items()}
            rendezvous = f"file://{file.with_suffix('.rendezvous')}"
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
        shard_on_cpu()
        setup(rank)
        sys.argv = [script, str(file)]
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code)


def shard_on_cpu() -> None:
    """Let `fsdp` shard CPU processes in this process; accelerate knows it on GPUs only, and the trainer refuses."""
    create = EmbedderTrainer.create_accelerator_and_postprocess

    def create_and_shard(self: EmbedderTrainer) -> None:
        create(self)
        plan = self.args.fsdp_plugin_args
        if plan is not None and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plan)
            for state in (PartialState(), self.accelerator.state):  # each has its own record of it
                state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    EmbedderTrainer.create_accelerator_and_postprocess = create_and_shard  # type: ignore[method-assign]


def kill_within(step: int) -> Setup:
    """SIGKILL in the middle of an optimiser step, when its gradient is there."""

    def setup(rank: int) -> None:
        look = EmbedderTrainer._get_grad_norm

        def look_and_die(self: EmbedderTrainer, *arguments: Any, **keywords: Any) -> Any:
            if self.state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return look(self, *arguments, **keywords)

        EmbedderTrainer._get_grad_norm = look_and_die  # type: ignore[method-assign]

    return setup


def signal_within(step: int, number: signal.Signals, only_rank: int = 0) -> Setup:
    """A signal in the middle of an optimiser step, to one process."""

    def setup(rank: int) -> None:
        look = EmbedderTrainer.training_step

        def look_and_signal(self: EmbedderTrainer, *arguments: Any, **keywords: Any) -> Any:
            if self.state.global_step == step - 1 and rank == only_rank:
                os.kill(os.getpid(), number)
            return look(self, *arguments, **keywords)

        EmbedderTrainer.training_step = look_and_signal  # type: ignore[method-assign]

    return setup


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    """The weights that a run wrote at its end."""
    return load_file(next(output.glob("*model.safetensors")))


def log_of(output: Path) -> list[dict[str, Any]]:
    """The log's entries, without the figures that say how long something took."""
    lines = (output / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def assert_same_to_the_bit(actual: Path, expected: Path) -> None:
    """Weights and log."""
    one, other = weights_of(actual), weights_of(expected)
    assert one.keys() == other.keys()
    for name, weight in other.items():
        assert weight.dtype == one[name].dtype and torch.equal(one[name], weight), name
    assert log_of(actual) == log_of(expected)
