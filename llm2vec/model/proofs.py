"""What a decoder proves when it is loaded: that it attends as asked, and that texts can be laid end to end.

A library that ignores a flag, or a family that computes in another way than its config says, would give other vectors
without a word. A forward pass over a few tokens shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llm2vec.model.backbone import Backbone, hidden_states
from llm2vec.model.packed_attention import HUB_KERNELS, IN_HALF
from llm2vec.model.packing import ATTENTION_LAYERS, packed_hidden_states
from llm2vec.types import Attention, UserError, first_line


def check_decoder(model: Backbone, attention: Attention) -> None:
    """Prove both, where the model will run: `check_attention`, then `check_packing`. A `UserError` as of these, or
    where a kernel of the hub does not take this model, or this card."""
    try:
        check_attention(model, attention)
        check_packing(model, attention)
    except Exception as error:
        name = model.config._attn_implementation
        if isinstance(error, UserError) or name not in HUB_KERNELS:
            raise
        raise UserError(f"attn_implementation: {name} cannot run here: {first_line(error)}") from error


def check_attention(model: Backbone, attention: Attention) -> None:
    """Prove that the model attends as asked: change the last of four tokens and look at the first one's state. A
    `UserError` where a state is not finite; the first state moves under causal attention, or stays under bidirectional
    attention; or the latter was asked of a model some of whose layers only ever read forwards."""
    forward_only = set(getattr(model.config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if attention == "bidirectional" and forward_only:
        raise UserError(
            f"attention: bidirectional was asked for, but {type(model).__name__} has layers ({min(forward_only)}) that "
            "read from left to right only; it can embed with causal attention."
        )
    rows = probe_tokens(model, 4).repeat(4, 1)
    rows[:, -1] = probe_tokens(model, 8)[4:]
    with probing(model) as exact:
        state_BTD = hidden_states(model, attention, torch.ones_like(rows), input_ids=rows).float()
    moved = (state_BTD[1:, 0] - state_BTD[:1, 0]).norm(dim=-1).max()
    own = (state_BTD[1:, -1] - state_BTD[:1, -1]).norm(dim=-1).max()
    if not state_BTD.isfinite().all():
        raise UserError(f"{type(model).__name__} gives states that are not finite: its weights are damaged.")
    # Under causal attention the rows' first states are the same sums; half precision gets some room for kernels
    # that differ by row.
    tolerance = 1e-5 if exact else 5e-3
    if (moved <= tolerance * own) != (attention == "causal"):
        raise UserError(
            f"attention: {attention} was asked for, but {type(model).__name__} with "
            f"attn_implementation={model.config._attn_implementation!r} does not attend that way."
        )


def check_packing(model: Backbone, attention: Attention) -> None:
    """Prove that a text has the states packed behind another that it has alone, by the model's own attention. A
    `UserError` where it has not."""
    own, other = probe_tokens(model, 9).split([5, 4])
    with probing(model) as exact:
        alone = [
            hidden_states(model, attention, torch.ones_like(ids)[None], input_ids=ids[None])[0] for ids in (own, other)
        ]
        embeddings = model.get_input_embeddings()(torch.cat([other, own]))
        lengths = [len(other), len(own)]
        behind = [packed_hidden_states(model, attention, lengths, embeddings)[len(other) :]]
        if exact and embeddings.device.type == "cuda":  # the kernel that trains under autocast is another one
            with torch.autocast("cuda", torch.bfloat16):
                behind.append(packed_hidden_states(model, attention, lengths, embeddings)[len(other) :])
    apart = (alone[0][-1] - alone[1][-1]).float().norm()
    for states, is_exact in zip(behind, (exact, False), strict=False):
        # Half precision gets room for kernels that round otherwise.
        if (states - alone[0]).float().norm(dim=-1).max() > (1e-3 if is_exact else 0.1) * apart:
            raise UserError(
                f"{type(model).__name__} computes more than attention over the text's own tokens, in a way that is not "
                "known here: its texts cannot be laid end to end, so it cannot be used."
            )


@contextmanager
def probing(model: Backbone) -> Iterator[bool]:
    """For a short pass that proves something: no dropout, no graph. Yields whether it computes in float32 or better."""
    was_training = model.training
    model.eval()  # torch's mode without dropout
    weight = next(model.parameters())
    # FlashAttention computes in half precision only; training float32 weights with it means autocast, so the probe too.
    flash = model.config._attn_implementation in IN_HALF
    rounds = flash and weight.dtype == torch.float32
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, torch.bfloat16, enabled=rounds):
            yield weight.dtype in (torch.float32, torch.float64) and not flash
    finally:
        model.train(was_training)


def probe_tokens(model: Backbone, number: int) -> Tensor:
    """So many tokens [T], no two alike, on the model's device."""
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    vocabulary, device = embedding.shape[0], embedding.device
    return (torch.arange(number, device=device) * 7 + 11) % vocabulary
