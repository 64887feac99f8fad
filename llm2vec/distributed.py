"""Rank, world size and the few collectives the package needs; all are the identity in a single process.

No device is named here: tensors stay where they are, so the same lines run under gloo on CPU and NCCL on CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of this run; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process in the run; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_rank() -> int:
    """Index of this process among those of its machine, as torchrun tells; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


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

    Args:
        seconds: how long a collective waits for a process. accelerate, which forms the group otherwise, hands this on
            for GPUs only.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the body on rank 0 before the others, so that one process builds a file the others only read."""
    if world_size() > 1 and rank() != 0:
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and rank() == 0:
            dist.barrier()


@contextmanager
def first_of_each_machine_first() -> Iterator[None]:
    """Run the body on one process of each machine before that machine's others; inside may be `rank_zero_first`."""
    is_first = local_rank() == 0
    if world_size() > 1 and not is_first:
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and is_first:
            dist.barrier()


def shut_down() -> None:
    """Wait for all ranks and leave the process group; a process that just exits can abort in its network threads."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_of_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone, or did not come within the group's time."""
    if world_size() == 1:
        return False
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text
        for sign in ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
    )
