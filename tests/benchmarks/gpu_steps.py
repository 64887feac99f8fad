"""What a GPU would be asked for, on a CUDA device made of CPU memory; `test_gpu_paths.py` starts it and judges it."""

from __future__ import annotations

from benchmarks import fakecuda  # before torch

# isort: split
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_check import SIDES, Setting, objective_of, run_part, run_step
from benchmarks.inputs import Shape, packed_batch
from llm2vec.corpus.workers import take_gpu
from llm2vec.model import fused_layers, packed_attention
from llm2vec.model.fused_layers import fuse
from llm2vec.model.packing import inner_decoder
from llm2vec.model.proofs import check_packing
from llm2vec.quickstart.tiny import train_tokenizer
from llm2vec.training.config.arguments import training_arguments
from llm2vec.training.config.file import load_config
from llm2vec.training.model import decoder_of, load_model
from llm2vec.training.step import split_batch

fakecuda.install()
fused_layers._compiled = lambda function: function  # there is no such card to compile for
SETTING = Setting(
    "cuda", Shape(layers=2, hidden=32, intermediate=64, heads=4, kv_heads=2, vocabulary=2_000), 6, (400,), (8,), 8
)


def waits_of_step(stage: str) -> dict[str, object]:
    """What the host waits for in a step of several micro-batches, and how many there are."""
    case = SETTING.case(max_tokens=500)
    batch, objective = packed_batch(case, 0, SIDES[stage]), objective_of(stage, case)
    fuse(inner_decoder(decoder_of(objective.model)))
    run_step(objective, batch, case)
    with fakecuda.waits() as seen:
        run_step(objective, batch, case)
    return {"waits": Counter(map(" in ".join, seen)), "pieces": len(split_batch(batch, case.max_tokens))}


def waits_of_training() -> dict[str, object]:
    """The same of the trainer's loop, over twelve optimiser steps of one micro-batch each that are all logged."""
    with fakecuda.waits() as seen:
        part = run_part("resume", SETTING)
    return {"waits": Counter(map(" in ".join, seen)), "part": asdict(part)}


def kernels_of_probe() -> int:
    """How often the kernel ran in the proof that texts can be laid end to end, by a model of float32 weights."""
    case, calls = SETTING.case(), []
    attend = packed_attention._attend_varlen

    def counted(*arguments: object) -> object:
        calls.append(1)
        return attend(*arguments)  # type: ignore[arg-type]

    model = inner_decoder(objective_of("Stage I", case).model)
    with patch.object(packed_attention, "_attend_varlen", counted):
        check_packing(model, "causal")
    return len(calls)


def write_base(folder: Path) -> Path:
    """A base of 48 million parameters in half precision, and a config that starts from it, in float32."""
    tokenizer = train_tokenizer(("user hello find the answer" for _ in range(9)), 400)
    shape = LlamaConfig(
        vocab_size=16_000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(shape).bfloat16()
    model.to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    file = folder / "config.json"
    keys = {"model_name_or_path": str(folder / "base"), "output_dir": str(folder / "out"), "template": "plain"}
    file.write_text(json.dumps({**keys, "sources_file": "none.json", "alpha": 0.2}), encoding="utf-8")
    return file


def own_memory() -> int:
    """Bytes of this process's own, without those of the device and without pages of files, which processes share."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    size = next(line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(size) * 1024 - int(torch.ops.fakecuda.memory())


def loading() -> dict[str, object]:
    """Most host memory while a model is loaded onto a device, and what its weights take."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(write_base(Path(folder)), "stage_I")
        sizes, done = [own_memory()], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                sizes.append(own_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        # What a proof computes is not what loading takes.
        with patch("llm2vec.training.model.check_decoder"), patch("llm2vec.training.model.check_head"):
            model, *_ = load_model(config, torch.device("cuda", 0), with_lm_head=True)
        done.set()
        watcher.join()
    weights = sum(weight.nbytes for weight in model.parameters())
    return {
        "host": max(sizes) - sizes[0],
        "weights": weights,
        "devices": sorted({str(w.device) for w in model.parameters()}),
    }


def placement() -> dict[str, object]:
    """Where the process with LOCAL_RANK 3 of 8 computes; and the processes of an evaluation."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    chosen: list[str] = []
    os.environ |= {"LOCAL_RANK": "3", "RANK": "3", "WORLD_SIZE": "8"}
    torch.distributed.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    with (
        patch.object(torch.cuda, "device_count", lambda: 8),
        patch.object(torch.cuda, "set_device", lambda device: chosen.append(str(device))),
        tempfile.TemporaryDirectory() as folder,
    ):
        file = Path(folder, "config.json")
        keys = {"model_name_or_path": "base", "output_dir": folder, "sources_file": "none.json", "total_batch_size": 16}
        file.write_text(json.dumps(keys), encoding="utf-8")
        args = training_arguments(load_config(file, "stage_I"))
        for worker in (0, 3, 9):
            take_gpu(worker)
        take_gpu(2, "cuda:5")
        take_gpu(2, "cpu")
        return {"device": str(args.device), "rows": args.per_device_train_batch_size, "chosen": chosen}


#: What is looked at; `placement` leaves a process group behind, so it comes last.
FINDINGS = {
    "parts": lambda: [asdict(run_part(name, SETTING)) for name in ("attention", "parity", "large_steps")],
    "steps": lambda: {stage: waits_of_step(stage) for stage in SIDES},
    "training": waits_of_training,
    "kernels_of_probe": kernels_of_probe,
    "loading": loading,
    "placement": placement,
}
found = {name: FINDINGS[name]() for name in sys.argv[1:] or FINDINGS}
sys.stdout.write("\n" + json.dumps(found) + "\n")
