"""The two losses of the method, as sums: who calls them divides by what the whole optimiser step holds.

They know vectors, logits and labels; no model, tokenizer or rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def vocabulary_cross_entropy_sum(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Sum over N target tokens of -log p(target), in float32 at least (paper Eq. 3 and 4)."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(dtype), target_N, reduction="sum")


def similarity(query_BD: Tensor, document_ND: Tensor) -> Tensor:
    """Cosine of every query with every document, [B, N], in float32 at least."""
    dtype = torch.promote_types(query_BD.dtype, torch.float32)
    return F.normalize(query_BD.to(dtype), dim=-1) @ F.normalize(document_ND.to(dtype), dim=-1).T


def info_nce_sum(score_BN: Tensor, label_B: Tensor, loss_scale: float) -> Tensor:
    """Sum over B queries of -log softmax(loss_scale * score)[label] (paper Eq. 6).

    Args:
        score_BN: cosine of each query with each document of the pool.
        label_B: column of each query's positive.
        loss_scale: 1 / temperature; the paper's temperature 0.05 is a scale of 20.
    """
    return F.cross_entropy(score_BN * loss_scale, label_B, reduction="sum")
