"""From packed texts to their vectors: one pass through the decoder for all sides of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm2vec.model.packing import packed_hidden_states
from llm2vec.model.pooling import pool_packed
from llm2vec.model.settings import EncoderSettings
from llm2vec.types import Pass, TokenBatch, UserError


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
    if embeddings is None:
        embeddings = model.get_input_embeddings()(torch.cat([side["input_ids"] for side in sides.values()]))
    run = embedding_pass(model, settings, sides)
    states = packed_hidden_states(
        model, run.attention, run.lengths, embeddings, prefixes=run.prefixes, closing_only=run.closing_only
    )
    if run.closing_only:
        counts = [len(side["lengths"]) for side in sides.values()]
        return dict(zip(sides, states.split(counts), strict=True))
    of_sides = states.split([sum(side["lengths"]) for side in sides.values()])
    return {
        name: pool_packed(states_ND, side["lengths"], side["pool_mask"], settings.pooling_mode)
        for (name, side), states_ND in zip(sides.items(), of_sides, strict=True)
    }


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
    """Refuse vectors that nothing can be compared with.

    Raises:
        UserError: a number is not finite; names the first such vector's text.
    """
    finite_B = torch.isfinite(vectors_BD).all(dim=1)
    if not finite_B.all():
        text = texts[int(finite_B.int().argmin())]
        raise UserError(
            f"The vector of {text[:40]!r} has a number that is not finite: the model's weights are damaged, or their "
            "dtype is too narrow for what it computes."
        )


def drops_out(model: nn.Module) -> bool:
    """Whether some module of a model drops out activations now."""
    return model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
