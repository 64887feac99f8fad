"""What a step keeps for its backward pass: measured, and held to a budget by recomputing some of the layers.

`tokens_per_microbatch` is the first thing to turn, as smaller micro-batches cost next to nothing. Where a micro-batch
cannot be smaller (one long row, a large base model), recomputing as few layers as needed is cheaper than all of them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm2vec.model.packing import checkpoint_contexts, inner_decoder, shares_prefix
from llm2vec.text.batches import num_tokens
from llm2vec.types import Batch, Objective, Pass, UserError


def measured_bytes(objective: Objective, batch: Batch, dtype: torch.dtype | None = None) -> int:
    """Bytes that the forward pass of a batch keeps for its backward pass, weights left out.

    They are only counted: nothing is kept, as a card may have no room for all of it. `dtype` is that of the weights
    which the steps compute with, where it is another one (FSDP2's mixed precision).
    """
    module: Any = objective
    parameters = {
        name: weight if dtype is None else weight.detach().to(dtype).requires_grad_(weight.requires_grad)
        for name, weight in module.named_parameters()
    }
    weights = {weight.untyped_storage().data_ptr() for weight in parameters.values()}
    seen: dict[int, Any] = {}  # address -> the storage, if it is still there; another may follow it
    kept: list[int] = []

    def note(tensor: Tensor) -> Any:  # what is held in its place: None
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in weights and (address not in seen or seen[address]() is not storage):
            seen[address] = weakref.ref(storage)
            kept.append(storage.nbytes())

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda held: held):
        if dtype is None:
            objective(batch, objective.count(batch))
        else:
            torch.func.functional_call(module, parameters, (batch, objective.count(batch)))
    return sum(kept)


def layers_to_recompute(bytes_per_layer: float, kept_per_layer: float, num_layers: int, budget: float) -> int:
    """The fewest layers to recompute so that what all layers keep, and one of them recomputed, fits the budget of
    bytes. A layer keeps `bytes_per_layer`, or its input alone, `kept_per_layer`, where it is recomputed. A `UserError`
    where not even recomputing all of them is enough."""
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


def bytes_per_token(objective: Objective, small: Batch, large: Batch, dtype: torch.dtype | None = None) -> float:
    """What a further token keeps: the slope between two batches, so that what does not grow with tokens cancels."""
    kept = measured_bytes(objective, large, dtype) - measured_bytes(objective, small, dtype)
    return kept / (num_tokens(large) - num_tokens(small))


def tokens_run(model: Any, run: Pass, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of a pass that go through the layers: those of a shared prefix once, where that is done."""
    return run.tokens - (run.repeated if shares_prefix(model, run.attention, device, dtype) else 0)


def fit_activations(
    objective: Objective,
    decoder: Any,
    batches: Sequence[tuple[Batch, Batch]],
    tokens: int,
    budget_gb: float,
    dtype: torch.dtype | None = None,
) -> str:
    """Recompute as many of the decoder's layers as the budget (10^9 bytes) for a micro-batch of so many tokens asks
    for, and say so.

    `batches` are some rows to measure with and more of them, on the model's device, of each source: what a token keeps
    depends on how often it is run, so on how long texts and instructions are. The source that keeps most counts.
    `dtype` is that of `measured_bytes`.
    """
    weight = next(decoder.parameters())
    computed = dtype or weight.dtype
    a_token = []  # bytes that it keeps in all layers, and how often it goes through them
    for small, large in batches:
        kept = [p for p in objective.passes(large) if p.kind != "read"]
        run = sum(tokens_run(decoder, p, weight.device, computed) for p in kept)
        a_token.append((bytes_per_token(objective, small, large, dtype), run / num_tokens(large)))
    number, line = fit(decoder, *max(a_token), tokens, budget_gb, computed.itemsize)
    for run in (decoder, *(copy.base_model for copy in objective.copies)) if number else ():
        recompute_first(run, number)
    return line


def recompute_first(decoder: Any, number: int) -> None:
    """Recompute the decoder's first so many layers in the backward pass."""
    enable_checkpointing(decoder, {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, decoder)})
    for layer in inner_decoder(decoder).layers[number:]:
        layer.gradient_checkpointing = False


def fit(decoder: Any, per_token: float, runs: float, tokens: int, budget_gb: float, element: int) -> tuple[int, str]:
    """How many layers to recompute, and a line that says so; a `UserError` where not even all of them are enough.

    A token keeps `per_token` bytes in all layers and goes through them `runs` times, both in the mean of a batch;
    `tokens` are those of a micro-batch, `budget_gb` 10^9 bytes, `element` the bytes of a number between the layers.
    """
    num_layers = len(inner_decoder(decoder).layers)
    bytes_per_layer = per_token * tokens / num_layers
    kept_per_layer = runs * tokens * decoder.config.hidden_size * element  # a recomputed layer's input
    number = layers_to_recompute(bytes_per_layer, kept_per_layer, num_layers, budget_gb * 1e9)
    return number, (
        f"activations {bytes_per_layer * num_layers / 1e9:.2f} GB for {tokens:,} tokens at once, of "
        f"{budget_gb:g} GB; {number} of {num_layers} layers are recomputed"
    )


def enable_checkpointing(model: Any, arguments: dict[str, Any]) -> None:
    """Recompute activations in the backward pass; `arguments` go to torch.utils.checkpoint."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:  # its name before transformers 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
