"""Cosine similarity, where upstream has it."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2vec.objectives.losses import unit


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """Cosine [A, B] of every row of `a` [A, D] with every row of `b` [B, D]; a vector [D] counts as one row."""
    a, b = (torch.atleast_2d(torch.as_tensor(rows)) for rows in (a, b))
    return unit(a) @ unit(b).T
