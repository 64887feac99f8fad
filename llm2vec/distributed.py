"""The few collectives that the package needs; all are the identity in a single process.

No device is named here: tensors stay where they are, so the same lines run under gloo on CPU and NCCL on CUDA.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm2vec.processes import rank, world_size


class _Gather(torch.autograd.Function):
    """All ranks' rows, end to end; the gradient of a row is the sum over ranks of its gradients there."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank computes its own queries' loss over the gathered pool, so a row's true gradient is a sum over
        # ranks. all_reduce instead of reduce_scatter because older gloo has only the former.
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]


def gather_with_gradient(rows: Tensor) -> Tensor:
    """[B, D] of every rank -> [world_size * B, D], in rank order; B must be the same everywhere.

    Summed over ranks, the gradient equals that of one process that holds all rows.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over ranks, without gradient; the input is left alone."""
    summed = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(summed)
    return summed


def max_over_ranks(value: int) -> int:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    # NCCL takes tensors of its own device only, gloo any.
    device = torch.accelerator.current_accelerator() if dist.get_backend() != "gloo" else None
    largest = torch.tensor(value, device=device or "cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def join_on_cpu(seconds: int) -> None:
    """Form the group of the processes that torchrun started, by gloo; nothing for one process, or where there is one.

    A collective waits so many `seconds` for a process. accelerate, which forms the group otherwise, hands this on for
    GPUs only.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
