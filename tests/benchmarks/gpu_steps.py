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
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import hub_kernels
from transformers.utils import import_utils

from benchmarks.gpu_check import SIDES, Setting, objective_of, run_part, run_step
from benchmarks.inputs import Shape, packed_batch
from benchmarks.variants import SETTINGS
from llm2vec import LLM2Vec
from llm2vec.corpus.queue import take_gpu
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model import fused_layers, packed_attention
from llm2vec.model.fused_layers import fuse
from llm2vec.model.packing import inner_decoder
from llm2vec.model.proofs import check_packing
from llm2vec.objectives.language_modelling import LanguageModelling
from llm2vec.objectives.mntp import MaskedNextTokenPrediction
from llm2vec.quickstart.tiny import train_tokenizer
from llm2vec.training.config.arguments import training_arguments
from llm2vec.training.config.file import load_config
from llm2vec.training.model import decoder_of, load_model
from llm2vec.training.step import split_batch
from llm2vec.types import UserError

fakecuda.install()
fused_layers._compiled = lambda function: function  # there is no such card to compile for
SETTING = Setting(
    "cuda", Shape(layers=2, hidden=32, intermediate=64, heads=4, kv_heads=2, vocabulary=2_000), 6, (400,), (8,), 8
)
MODELLING = {"LM": LanguageModelling, "MNTP": MaskedNextTokenPrediction}
#: Of Stage I, what its objective is made with.
PRETEXTS: dict[str, dict[str, Any]] = {
    "Stage I and LM": {"lm_weight": 0.5}, "Stage I, bag": {"target_loss": "bag"},
    "Stage I, kl": {"target_loss": "kl", "decoder": "frozen", "bos_id": 1},
    "Stage I, imitating": {"imitation_weight": 1.0, "teacher_width": 8},
}  # fmt: skip


def waits_of_step(stage: str) -> dict[str, object]:
    """What the host waits for in a step of several micro-batches, and how many there are."""
    case = SETTING.case(max_tokens=300 if stage in MODELLING else 500)
    batch = packed_batch(case, 0, SIDES.get(stage, ("text",) if stage in MODELLING else SIDES["Stage I"]))
    objective = objective_of("Stage II" if stage == "Stage II" else "Stage I", case)
    if stage in MODELLING:
        objective = MODELLING[stage](objective.model)
        batch["text"]["labels"] = batch["text"]["input_ids"].clone()
    elif stage in PRETEXTS:
        objective = BidirectionalReconstruction(objective.model, SETTINGS, **PRETEXTS[stage])
        if "teacher_width" in PRETEXTS[stage]:
            for side in batch.values():
                side["facts"] = {"teacher": torch.ones(len(side["lengths"]), 8, device="cuda")}
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


def kernel_of_the_hub() -> dict[str, object]:
    """An embedder by a slow kernel of the hub, against torch's: texts' vectors, passes, and what its folder says of it.

    The proof at loading runs the kernel on padded rows, too.
    """
    name, calls = "kernels-community/flash-attn2", []

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float | None = None, causal: bool = False,
    ) -> Any:  # fmt: skip
        calls.append(len(cu_seqlens_q) - 1)
        ends, window = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), (-1, 0 if causal else -1)
        return varlen_attn(q, k, v, *ends, scale=softmax_scale, window_size=window, enable_gqa=True)

    def equally_long(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Any:
        ends = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * q.shape[1]
        flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
        return varlen(*flat, ends, ends, q.shape[1], q.shape[1], softmax_scale, causal).view(q.shape)

    kernel = SimpleNamespace(flash_attn_func=equally_long, flash_attn_varlen_func=varlen)
    with (
        patch.object(import_utils, "is_kernels_available", lambda: True),
        patch.object(hub_kernels, "is_kernels_available", lambda: True),
        patch.object(hub_kernels, "get_kernel", lambda *_, **__: kernel),
        tempfile.TemporaryDirectory() as folder,
    ):
        write_base(Path(folder), hidden_size=64, intermediate_size=96, num_key_value_heads=2)
        how: dict[str, Any] = {"enable_bidirectional": False, "torch_dtype": "bfloat16", "template": "plain"}
        vectors = []
        for attention in ("sdpa", name):
            embedder = LLM2Vec.from_pretrained(f"{folder}/base", attn_implementation=attention, **how)
            at_load = list(calls)
            vectors.append(embedder.encode(["hello", "find the answer user hello", "user"]))
        try:
            LLM2Vec.from_pretrained(f"{folder}/base", attn_implementation=name)
        except UserError as error:
            refused = str(error)
        embedder.save(f"{folder}/saved")
        told = Path(folder, "saved", "config.json").read_text(encoding="utf-8")
    return {
        "at_load": at_load, "encoding": calls[len(at_load) :], "told": "kernels" in told, "refused": refused,
        "lowest cosine": float(torch.nn.functional.cosine_similarity(*vectors).min()),
    }  # fmt: skip


def where_encoding_computes() -> list[list[str]]:
    """Devices of an embedder's weights behind `encode`: from a CPU, from the card where the caller put it, and told."""
    case, seen = SETTING.case(), []
    embedder = LLM2Vec(objective_of("Stage I", case).model.model.cpu(), tokenizer_of_tests(), template="plain")
    for place, device in (("cpu", None), ("cuda:1", None), ("cuda:1", "cuda:0")):
        embedder.to(place).encode(["hello"], show_progress_bar=False, device=device)
        seen.append(sorted({str(weight.device) for weight in embedder.parameters()}))
    return seen


def tokenizer_of_tests() -> Any:
    """A tokenizer of a few words."""
    return train_tokenizer(("user hello find the answer" for _ in range(9)), 400)


def write_base(folder: Path, **smaller: int) -> Path:
    """A base in half precision, and a config that starts from it, in float32.

    It has 48 million parameters that are 0, or is smaller and random.
    """
    tokenizer = tokenizer_of_tests()
    shape = LlamaConfig(
        vocab_size=16_000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    shape.update(smaller)
    with torch.device("cpu" if smaller else "meta"):
        model = LlamaForCausalLM(shape).bfloat16()
    if not smaller:
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
    "steps": lambda: {stage: waits_of_step(stage) for stage in (*SIDES, *MODELLING, *PRETEXTS)},
    "training": waits_of_training,
    "kernels_of_probe": kernels_of_probe,
    "kernel_of_the_hub": kernel_of_the_hub,
    "where_encoding_computes": where_encoding_computes,
    "loading": loading,
    "placement": placement,
}
found = {name: FINDINGS[name]() for name in sys.argv[1:] or FINDINGS}
sys.stdout.write("\n" + json.dumps(found) + "\n")
