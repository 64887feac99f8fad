"""What is settled before a run asks for its device, and where layers run fused."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model

from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import attach_lora
from llm2vec.model.fused_layers import fuse, fused_decoders
from llm2vec.model.packing import inner_decoder
from llm2vec.model.settings import EncoderSettings
from llm2vec.training import model as model_module
from llm2vec.training.config import Config
from llm2vec.training.model import fuses, prepare_device, set_attention_dropout
from llm2vec.types import UserError

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def config(training: dict[str, Any] | None = None, **keys: Any) -> Config:
    return Config("base", training=training or {}, **keys)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALLOCATOR, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_a_gpu_that_torch_cannot_use_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would train on the CPU without a word; who means that says so."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    prepare_device(config())
    monkeypatch.setattr(model_module, "NVIDIA_DEVICE", tmp_path)
    with pytest.raises(UserError, match="has an NVIDIA GPU, but torch"):
        prepare_device(config())
    with pytest.raises(UserError, match="has an NVIDIA GPU, but torch"):
        prepare_device(config({"use_cpu": False}))
    prepare_device(config({"use_cpu": True}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    prepare_device(config())


def test_segments_of_memory_grow_unless_it_is_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_device(config())
    assert {os.environ[name] for name in ALLOCATOR} == {"expandable_segments:True"}
    monkeypatch.delenv(ALLOCATOR[0])
    monkeypatch.setenv(ALLOCATOR[1], "max_split_size_mb:512")
    prepare_device(config())
    assert ALLOCATOR[0] not in os.environ and os.environ[ALLOCATOR[1]] == "max_split_size_mb:512"


def test_where_layers_run_fused() -> None:
    model = tiny_model("llama").train()
    assert fuses(config(), model, "cuda") and not fuses(config(), model, "cpu")
    assert not fuses(config(fused_layers="off"), model, "cuda")
    assert not fuses(config({"torch_compile": True}), model, "cuda")
    assert fuses(config(), attach_lora(tiny_model("qwen2"), r=4, alpha=8, dropout=0.1), "cuda")
    set_attention_dropout(model, 0.1)
    assert not fuses(config(), model, "cuda")


def test_a_frozen_copy_decodes_fused_where_its_model_runs_fused() -> None:
    for on in (True, False):
        model = tiny_model("llama", True)
        fuse(inner_decoder(model), on)
        objective = BidirectionalReconstruction(model, EncoderSettings("last", template="llama3"), decoder="frozen")
        assert (inner_decoder(objective.decoding_model) in fused_decoders) is on


@pytest.mark.parametrize("reason", [None, "no compiler was found"])
def test_what_is_said_of_it(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine that cannot make the kernels trains as before."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(model_module, "why_not", lambda device: reason)
    model = attach_lora(tiny_model("llama"), r=4, alpha=8, dropout=0.1)
    model_module._fuse(config({"bf16": True}), model, torch.device("cpu"))
    assert (inner_decoder(model) in fused_decoders) is (reason is None)
    casts = {m.cast_input_dtype_enabled for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")}
    assert casts == {reason is not None}
    assert ("run fused" if reason is None else reason) in caplog.text
