"""Pure bfloat16: plain AdamW loses small updates, and the optimiser that the docs name for it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

WIDTH, STEPS, LEARNING_RATE = 64, 300, 4e-5


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), learning_rate=LEARNING_RATE, report_to="none", use_cpu=True, **options)


def distance_left(args: TrainingArguments, dtype: torch.dtype) -> float:
    """Share of the way to a nearby target that is left after training, with weights of a language model's size."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float, rows: int = WIDTH) -> Tensor:
        return torch.randn(rows, WIDTH, generator=generator) * scale

    start, way = normal(0.02), normal(0.002)
    weight = torch.nn.Parameter(start.clone().to(dtype))
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = optimizer_class([weight], **options)
    for _ in range(STEPS):
        inputs = normal(1.0, rows=32).to(dtype)
        difference = inputs @ weight.T - inputs @ (start + way).to(dtype).T
        difference.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((weight.detach().float() - (start + way)).norm() / way.norm())


def test_compensated_updates_keep_what_bfloat16_rounds_away(tmp_path: Path) -> None:
    """At the paper's learning rate of 4e-5, an update is smaller than half a bfloat16 step of most weights."""
    plain = arguments(tmp_path)
    compensated = arguments(tmp_path, optim="stable_adamw", optim_args="kahan_sum=True")
    exact = distance_left(plain, torch.float32)
    assert distance_left(plain, torch.bfloat16) > exact + 0.3
    assert distance_left(compensated, torch.bfloat16) < exact + 0.05
