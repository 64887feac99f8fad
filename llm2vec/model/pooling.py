"""From hidden states to vectors: four pure reductions over a pool mask, and the pass of a batch that ends in one.

Which positions count (closing token, text without instruction, ...) is the template's business and arrives as the
mask; padding may stand on either side. Nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llm2vec.model.packing import packed_hidden_states
from llm2vec.model.settings import EncoderSettings
from llm2vec.text.batches import pack_rows
from llm2vec.text.tokenization import Row
from llm2vec.types import Pass, PoolingMode, Precision, TokenBatch, UserError, needs_extra


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
        # The largest comes first where the last mark is counted, or the first one stands.
        index_B = (mask_BT.cumsum(dim=1) if pooling_mode == "last" else mask_BT.int()).argmax(dim=1)
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
    """`pool` for texts of so many tokens each that stand one after the other, without padding: [texts, D]."""
    hidden_BTD = pad_sequence(states_ND.split(list(lengths)), batch_first=True)
    pool_mask_BT = pad_sequence(pool_mask_N.split(list(lengths)), batch_first=True)
    return pool(hidden_BTD, pool_mask_BT, pooling_mode)


def embed(
    model: Any, settings: EncoderSettings, sides: Mapping[str, TokenBatch], embeddings: Tensor | None = None
) -> dict[str, Tensor]:
    """Embeddings [texts, D] of each side's texts, in the model's dtype, not normalised; one pass for all sides.

    Args:
        model: decoder without head, plain or with an adapter on it.
        settings: attention and pooling.
        sides: packed texts.
        embeddings: token embeddings [N, D] of all sides' tokens, one side after the other, where they are known.
    """
    run = embedding_pass(model, settings, sides)
    states = states_of(model, run, sides, embeddings)
    if run.closing_only:
        return states
    return {
        name: pool_packed(states[name], side["lengths"], side["pool_mask"], settings.pooling_mode)
        for name, side in sides.items()
    }


def states_of(
    model: Any, run: Pass, sides: Mapping[str, TokenBatch], embeddings: Tensor | None = None
) -> dict[str, Tensor]:
    """States after the final norm of each side's tokens, or [texts, D] where the pass reads closing tokens alone.

    `run` is the pass over the sides' texts; behind a prefix that it shares, states are what they are without. The other
    arguments are those of `embed`.
    """
    if embeddings is None:
        embeddings = model.get_input_embeddings()(torch.cat([side["input_ids"] for side in sides.values()]))
    states = packed_hidden_states(
        model, run.attention, run.lengths, embeddings, prefixes=run.prefixes, closing_only=run.closing_only
    )
    counts = [len(side["lengths"]) if run.closing_only else sum(side["lengths"]) for side in sides.values()]
    return dict(zip(sides, states.split(counts), strict=True))


def embed_tokenised(model: Any, settings: EncoderSettings, rows: Sequence[Row], device: torch.device) -> Tensor:
    """Embeddings [B, D] of tokenised rows, float32 on the CPU."""
    batch = send_to_device(pack_rows(rows), device)
    return embed(model, settings, {"text": batch})["text"].float().cpu()


def embedding_pass(model: nn.Module, settings: EncoderSettings, sides: Mapping[str, TokenBatch]) -> Pass:
    """The one pass that `embed` runs; of the sides only lengths are read."""
    # Dropout draws other numbers for each text's copy of a prefix, so then there is no one prefix to share.
    shared = () if drops_out(model) else tuple((len(side["lengths"]), side["prefix"]) for side in sides.values())
    return Pass(
        tuple(length for side in sides.values() for length in side["lengths"]),
        settings.attention,
        shared,
        settings.pooling_mode == "last" and all(side["closed"] for side in sides.values()),
    )


def check_finite(vectors_BD: Tensor, texts: Sequence[str]) -> None:
    """Refuse, by a `UserError` with the first such text, vectors that nothing can be compared with: a number is not
    finite."""
    finite_B = torch.isfinite(vectors_BD).all(dim=1)
    if not finite_B.all():
        text = texts[int(finite_B.int().argmin())]
        raise UserError(
            f"The vector of {text[:40]!r} has a number that is not finite: the model's weights are damaged, or their "
            "dtype is too narrow for what it computes."
        )


def quantiser(precision: Precision) -> Callable[[Tensor], np.ndarray[Any, np.dtype[Any]]]:
    """sentence-transformers' quantiser of vectors [N, D], int8 and uint8 over their own range. A `UserError` where that
    is not installed, or knows no such precision."""
    if precision not in get_args(Precision):
        raise UserError(f"precision is {precision!r}; allowed: {', '.join(get_args(Precision))}.")
    with needs_extra("precision needs sentence-transformers, 6 or newer", "eval"):
        from sentence_transformers.util.quantization import quantize_embeddings
    return lambda vectors: np.asarray(quantize_embeddings(vectors.numpy(), precision))


def drops_out(model: nn.Module) -> bool:
    """Whether some module of a model drops out activations now."""
    return model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
