"""What a step keeps for its backward pass: measured, and held to a budget by recomputing some of the layers.

`tokens_per_microbatch` is the first thing to turn, as smaller micro-batches cost next to nothing. Where a micro-batch
cannot be smaller (one long row, a large base model), recomputing as few layers as needed is cheaper than all of them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm2vec.model.backbone import enable_checkpointing
from llm2vec.model.packing import checkpoint_contexts, inner_decoder
from llm2vec.types import Batch, UserError


def kept_bytes(objective: nn.Module, batch: Batch) -> int:
    """Bytes that the forward pass of a batch keeps for its backward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in objective.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inner: Any = objective
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(batch, inner.count(batch))
    return sum(kept.values())


def layers_to_recompute(bytes_per_layer: float, kept_per_layer: float, num_layers: int, budget: float) -> int:
    """The fewest layers to recompute so that what all layers keep, and one of them recomputed, fits the budget.

    Args:
        bytes_per_layer: what a layer keeps.
        kept_per_layer: what is left of it when it is recomputed: its input.
        num_layers: of the model.
        budget: bytes.

    Raises:
        UserError: not even with all layers recomputed.
    """
    total = num_layers * bytes_per_layer
    if total <= budget:
        return 0
    # While a layer is recomputed, it holds its whole share once more.
    number = math.ceil((total + bytes_per_layer - budget) / (bytes_per_layer - kept_per_layer))
    if number > num_layers:
        least = num_layers * kept_per_layer + bytes_per_layer
        raise UserError(
            f"activation_memory_gb is {budget / 1e9:g}, but with all layers recomputed the activations take "
            f"{least / 1e9:.1f} GB; make tokens_per_microbatch smaller."
        )
    return number


def bytes_per_token(objective: nn.Module, small: Batch, large: Batch) -> float:
    """What a further token keeps: the slope between two batches, so that what does not grow with tokens cancels."""
    tokens = [sum(sum(side["lengths"]) for side in batch.values()) for batch in (small, large)]
    return (kept_bytes(objective, large) - kept_bytes(objective, small)) / (tokens[1] - tokens[0])


def fit_activations(objective: Any, decoder: Any, small: Batch, large: Batch, tokens: int, budget_gb: float) -> str:
    """Recompute as many of the decoder's layers as the budget asks for, and say so.

    Args:
        objective: the objective around the decoder.
        decoder: the model without head, plain or with an adapter on it.
        small: some rows to measure with, on the model's device.
        large: more of them.
        tokens: of a micro-batch.
        budget_gb: for what the layers keep, in 10^9 bytes.
    """
    number, line = fit(objective, decoder, bytes_per_token(objective, small, large), tokens, budget_gb)
    if number:
        enable_checkpointing(decoder, {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, decoder)})
        for layer in inner_decoder(decoder).layers[number:]:
            layer.gradient_checkpointing = False
    return line


def fit(objective: Any, decoder: Any, per_token: float, tokens: int, budget_gb: float) -> tuple[int, str]:
    """How many layers to recompute, and a line that says so; `per_token` = bytes that a token keeps in all layers.

    Raises:
        UserError: not even recomputing all of them is enough.
    """
    num_layers = len(inner_decoder(decoder).layers)
    bytes_per_layer = per_token * tokens / num_layers
    # Stage I runs its tokens twice, encoded and generated, so a layer has two inputs of about this size.
    passes = 1 if objective.contrasts else 2
    element = next(decoder.parameters()).element_size()
    kept_per_layer = float(passes * tokens * decoder.config.hidden_size * element)
    number = layers_to_recompute(bytes_per_layer, kept_per_layer, num_layers, budget_gb * 1e9)
    return number, (
        f"activations {bytes_per_layer * num_layers / 1e9:.2f} GB for {tokens:,} tokens at once, of "
        f"{budget_gb:g} GB; {number} of {num_layers} layers are recomputed"
    )
