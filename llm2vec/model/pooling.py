"""Four pure reductions of hidden states over a pool mask.

Which positions count (closing token, text without instruction, ...) is the template's business and arrives as the
mask; padding may stand on either side. Nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm2vec.types import PoolingMode


def pool(hidden_BTD: Tensor, pool_mask_BT: Tensor, pooling_mode: PoolingMode) -> Tensor:
    """One vector a row, from the positions that `pool_mask_BT` marks.

    Args:
        hidden_BTD: hidden states after the model's final norm.
        pool_mask_BT: 1 at the pooled positions; every row has at least one.
        pooling_mode: `last` or `first` marked position, `mean` over the marked positions, or `weighted_mean` with
            weights 1..n over the n marked positions (SGPT, arXiv 2202.08904).

    Returns:
        [B, D] in the dtype of the hidden states. Means are taken in float32 at least, as the sum over hundreds of
        half-precision states would lose digits.
    """
    mask_BT = pool_mask_BT.to(torch.bool)
    if pooling_mode in ("last", "first"):
        positions_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)
        if pooling_mode == "last":
            index_B = positions_BT.masked_fill(~mask_BT, -1).amax(dim=1)
        else:
            index_B = positions_BT.masked_fill(~mask_BT, mask_BT.shape[1]).amin(dim=1)
        return hidden_BTD[torch.arange(len(index_B), device=index_B.device), index_B]
    dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
    weight_BT = mask_BT.to(dtype)
    if pooling_mode == "weighted_mean":
        weight_BT = weight_BT * weight_BT.cumsum(dim=1)
    weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True)
    # Masked positions are zeroed, not only weighted by zero: padding may hold anything, NaN included.
    masked_BTD = hidden_BTD.to(dtype).masked_fill(~mask_BT.unsqueeze(-1), 0.0)
    return torch.einsum("btd,bt->bd", masked_BTD, weight_BT).to(hidden_BTD.dtype)


def pool_packed(states_ND: Tensor, lengths: Sequence[int], pool_mask_N: Tensor, pooling_mode: PoolingMode) -> Tensor:
    """`pool` for texts that stand one after the other, without padding.

    Args:
        states_ND: hidden states of all texts' tokens.
        lengths: tokens of each text.
        pool_mask_N: 1 at the pooled positions; every text has at least one.
        pooling_mode: as in `pool`.

    Returns:
        [texts, D].
    """
    hidden_BTD = pad_sequence(states_ND.split(list(lengths)), batch_first=True)
    pool_mask_BT = pad_sequence(pool_mask_N.split(list(lengths)), batch_first=True)
    return pool(hidden_BTD, pool_mask_BT, pooling_mode)
