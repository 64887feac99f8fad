"""Rows laid end to end without padding, and the attention that keeps them apart.

A packed batch is one row of all tokens, with positions that start again at 0 for every text. Attention runs text by
text through one function registered with transformers, so every model family that uses its attention interface is
served; everything else in a decoder works token by token and needs no change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from llm2vec.types import Attention

_NAME = "llm2vec_packed"


def _attend_text_by_text(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    text_lengths: Sequence[int] = (),
    **_: Any,  # the library hands every attention function all that any of them takes
) -> tuple[Tensor, None]:
    """[1, heads, tokens, head size] -> [1, tokens, heads, head size], each text attending to itself only."""
    output = torch.empty_like(query)
    grouped = query.shape[1] != key.shape[1]
    start = 0
    for length in text_lengths:
        span = slice(start, start + length)
        output[:, :, span] = F.scaled_dot_product_attention(
            query[:, :, span],
            key[:, :, span],
            value[:, :, span],
            dropout_p=dropout,
            is_causal=bool(is_causal) and length > 1,
            scale=scaling,
            enable_gqa=grouped,
        )
        start += length
    return output.transpose(1, 2), None


def can_pack(model: Any, longest: int) -> bool:
    """Whether packed attention gives what the model's own would, for texts of up to `longest` tokens.

    It does where the scores are plain scaled products: no logit capping, and no sliding window shorter than a text.
    """
    config = model.config
    window = getattr(config, "sliding_window", None)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return not capped and (window is None or window >= longest)


def packed_hidden_states(
    model: Any, attention: Attention, ids: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """Last layer's states after the final norm of all texts' tokens, [tokens, D], text after text."""
    lengths = [len(text) for text in ids]
    flat = torch.tensor([[token for text in ids for token in text]], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device)
    with _packed_attention(model):
        output = model(
            input_ids=flat,
            position_ids=positions,
            is_causal=attention == "causal",
            use_cache=False,
            text_lengths=lengths,
        )
    states: Tensor = output.last_hidden_state[0]
    return states


@contextmanager
def _packed_attention(model: Any) -> Iterator[None]:
    AttentionInterface.register(_NAME, _attend_text_by_text)  # here, as importing this file must change nothing
    previous = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = previous
