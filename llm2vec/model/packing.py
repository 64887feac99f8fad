"""A decoder run over texts laid end to end, without padding.

A packed batch is one row of all tokens, with positions that start again at 0 for every text. Attention keeps the texts
apart (`packed_attention`). Everything else in a decoder works token by token and needs no change.

Two more things are saved. A prefix that all texts of a side begin with (header and instruction) runs once, where
attention is causal. And where only closing tokens are read, the last layer runs at those alone. On a GPU, what a layer
does besides its products can run fused (`fused_layers`).

Models whose layers do more than attend by scaled products run padded instead, with the same results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llm2vec.model.backbone import hidden_states, one_pass
from llm2vec.model.fused_layers import add_and_norm, fused_decoders, gated_mlp, norm, project, rotate
from llm2vec.model.packed_attention import HUB_KERNELS, NAME, Group, Layout, attend, can_share_prefix, place
from llm2vec.text.batches import positions_of
from llm2vec.types import Attention

# On a CPU, oneDNN keeps what it compiles for a product's sizes: 1.5 MB a pass in bfloat16. Each packed pass has another
# number of tokens, so after a thousand it would keep gigabytes. torch reads these at its first such product.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")

#: Decoder layers that can run at some positions only, and fused. They attend with all of a head rotated by halves,
#: then run an MLP, each behind its norm and added to the stream as it is. Others with parts of the same names scale the
#: stream (Granite), clip the heads (OLMo) or rotate otherwise (GLM, Helium, Ernie). They run as the library has them.
_PLAIN_LAYERS = {
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "GemmaDecoderLayer",
}  # fmt: skip

#: Newer versions of transformers checkpoint a layer's `forward`, older ones its call.
_CHECKPOINTS_FORWARD = GradientCheckpointingLayer.__call__ is nn.Module.__call__


def shares_prefix(model: Any, attention: Attention, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a pass over states of this kind runs a prefix that all texts begin with once."""
    dropout, kernel = attention_dropout(model), HUB_KERNELS.get(model.config._attn_implementation)
    return attention == "causal" and can_share_prefix(device, dtype, dropout, head_size(model), kernel)


def can_pack(model: Any, longest: int) -> bool:
    """Whether packed attention gives what the model's own would, for texts of up to `longest` tokens.

    It does where every layer attends, by plain scaled products: no recurrence or convolution, which would run on into
    the next text; no logit capping and no attention sinks; no sliding window or chunk shorter than a text.
    """
    # Sinks, and layers that do not attend, show in the modules; the rest in the config.
    config = model.config
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(inner_decoder(model), "layers", ())]
    if not attentions or any(attention is None or hasattr(attention, "sinks") for attention in attentions):
        return False
    if not ATTENTION_LAYERS.issuperset(getattr(config, "layer_types", None) or ()):
        return False
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return not capped and all(window is None or window >= longest for window in windows)


def packed_hidden_states(
    model: Any,
    attention: Attention,
    lengths: Sequence[int],
    embeddings: Tensor,
    *,
    prefixes: Sequence[tuple[int, int]] = (),
    closing_only: bool = False,
) -> Tensor:
    """Last layer's states after the final norm, text after text.

    Args:
        model: decoder without head, plain or with an adapter on it.
        attention: of each text within itself.
        lengths: tokens of each text.
        embeddings: [tokens, D], text after text.
        prefixes: for each run of texts, how many there are and how many tokens they all begin with; the runs cover
            all texts, or there are none. A prefix is computed once where attention is causal.
        closing_only: return the states of the texts' last tokens alone.

    Returns:
        [tokens, D], or [texts, D] with `closing_only`. Where a prefix was shared, the later texts' copies of it are
        zeros: ask for states behind a shared prefix only.
    """
    assert min(lengths) > 0, "a text without tokens"
    if not can_pack(model, max(lengths)):
        return _padded_hidden_states(model, attention, lengths, embeddings, closing_only)
    shared = prefixes if prefixes and shares_prefix(model, attention, embeddings.device, embeddings.dtype) else ()
    kept, groups = _without_repeats(lengths, shared or [(len(lengths), 0)])
    positions = positions_of(lengths)
    narrow = closing_only and narrowing_layer(model) is not None
    layout = Layout(tuple(groups), kernel=HUB_KERNELS.get(model.config._attn_implementation))
    closing = replace(layout, closing_only=True, _moved={}) if narrow else None
    if kept is not None:  # each token keeps the position that it has in its text
        positions = positions[kept]
    # All that the pass asks a layout for, in one copy; and not inside a compiled layer, for which it would be new code.
    flat = [positions] if kept is None else [positions, kept]
    positions, *rest = place(embeddings.device, flat, [layout] if closing is None else [layout, closing])
    if rest:
        embeddings = embeddings.index_select(0, rest[0])
    with packed(model):
        output = model(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            is_causal=attention == "causal",
            use_cache=False,
            layout=layout,
            # The library hands what it does not know on to every layer. Only the last one looks at this.
            closing=closing,
        )
    states: Tensor = output.last_hidden_state.squeeze(0)  # `[0]` would have a gradient of its own size
    if narrow:
        return states
    if closing_only:
        return states.index_select(0, layout.on(states.device).closing)
    if not rest:
        return states
    # Back to where the tokens stand when every text has a copy of its prefix.
    return states.new_zeros(sum(lengths), states.shape[1]).index_copy(0, rest[0], states)


def _without_repeats(lengths: Sequence[int], runs: Sequence[tuple[int, int]]) -> tuple[Tensor | None, list[Group]]:
    """Index of the tokens that stay when each run's prefix stands once (None = all), and the groups they form."""
    if not any(prefix for _, prefix in runs):
        return None, [Group(0, tuple(lengths))]
    groups, parts = [], []
    text = start = 0
    for number, prefix in runs:
        of_run = lengths[text : text + number]
        groups.append(Group(prefix, tuple(length - prefix for length in of_run)))
        for i, length in enumerate(of_run):
            parts.append(torch.arange(start + (prefix if i else 0), start + length))
            start += length
        text += number
    return torch.cat(parts), groups


def _padded_hidden_states(
    model: Any, attention: Attention, lengths: Sequence[int], embeddings: Tensor, closing_only: bool
) -> Tensor:
    """The same by the model's own attention over right-padded rows."""
    rows_BTD = pad_sequence(embeddings.split(list(lengths)), batch_first=True)
    length_B = torch.tensor(lengths, device=embeddings.device)
    mask_BT = torch.arange(rows_BTD.shape[1], device=embeddings.device) < length_B.unsqueeze(1)
    states_BTD = hidden_states(model, attention, mask_BT.long(), inputs_embeds=rows_BTD)
    if closing_only:
        return states_BTD[torch.arange(len(lengths), device=embeddings.device), length_B - 1]
    return states_BTD[mask_BT]


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Within it, the model's attention is packed, its last layer can be narrowed, and layers run fused where that was
    asked for; all need a `layout`.

    The library looks up the attention in the model's config at every pass; a pass cannot choose its own. So the config
    is changed and put back, and no other thread may run the model meanwhile (`one_pass`). It does not stay changed, as
    the model may be the user's own, who also calls it without a layout.
    """
    with one_pass(model):
        previous = model.config._attn_implementation
        if previous == NAME:  # inside another one
            yield
            return
        AttentionInterface.register(NAME, attend)  # here, so that the library knows the name once it is in use
        fused = inner_decoder(model) in fused_decoders and attention_dropout(model) == 0
        layers = [layer for layer in inner_decoder(model).layers if fused and _is_plain(layer)]
        last = narrowing_layer(model)
        replaced = layers if layers or last is None else [last]
        model.config._attn_implementation = NAME
        for layer in replaced:
            # On these layers, as others of their class must stay as they are.
            layer.forward = partial(_forward, layer, type(layer).forward, fused, layer is last)
        try:
            yield
        finally:
            model.config._attn_implementation = previous
            for layer in replaced:
                del layer.forward


def compile_layers(model: Any, *, backend: str = "inductor", mode: str | None = None) -> None:
    """Compile every layer of the decoder for rows of any length, by torch.compile's `backend` and `mode`; attention
    over packed rows stays outside. The model may have a head or an adapter; its weights keep their names."""
    for layer in inner_decoder(model).layers:
        layer.compile(dynamic=True, backend=backend, mode=mode)


def checkpoint_contexts(model: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch.utils.checkpoint's `context_fn`: what was packed in the forward pass is recomputed packed, and what
    ran without the adapter again without."""
    was_packed = model.config._attn_implementation == NAME
    was_off = any(layer.disable_adapters for layer in adapter_layers(model))
    return nullcontext(), _again(model, was_packed, was_off)


@contextmanager
def _again(model: Any, was_packed: bool, was_off: bool) -> Iterator[None]:
    with packed(model) if was_packed else nullcontext(), adapter_off(model) if was_off else nullcontext():
        yield


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within it, a model with an adapter computes what its base does; nothing happens to which weights are trained.

    peft's own form also freezes the adapter meanwhile, and this one is entered in the middle of a backward pass.
    """
    layers = adapter_layers(model)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_layers(model: Any) -> list[Any]:
    """The modules of a model that have an adapter of peft."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class _Parts(NamedTuple):
    """How a plain layer does what is no matrix product: as the library does, or fused."""

    norm: Callable[[Any, Tensor], Tensor]
    add_and_norm: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]  #: heads [1, heads, tokens, head size]
    mlp: Callable[[Any, Tensor], Tensor]
    project: Callable[[Any, Tensor], Tensor]


def _add_then_norm(module: Any, stream: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    total = stream + branch
    return total, module(total)


def _rotate_plainly(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # The library rotates queries and keys at the same positions, while these may stand at different ones.
    rotated: Tensor = apply_rotary_pos_emb(heads, heads, cos, sin)[0]
    return rotated


def _call(module: Any, x: Tensor) -> Tensor:
    made: Tensor = module(x)
    return made


_PLAIN = _Parts(_call, _add_then_norm, _rotate_plainly, _call, _call)
_FUSED = _Parts(norm, add_and_norm, rotate, gated_mlp, project)


def _forward(
    layer: Any,
    forward: Any,
    fused: bool,
    narrows: bool,
    stream: Tensor,
    *,
    closing: Layout | None,
    layout: Layout,
    **arguments: Any,
) -> Tensor:
    """A decoder layer's forward: fused or not; where it `narrows`, at the tokens that `closing` names alone."""
    closing = closing if narrows else None
    if closing is None and not fused:
        states: Tensor = forward(layer, stream, layout=layout, **arguments)
        return states
    run = partial(_run_plain_layer, layer, _FUSED if fused else _PLAIN, closing, layout, arguments)
    # Where the library checkpoints a layer's `forward`, that is what stands here, so the checkpoint is made here too.
    if _CHECKPOINTS_FORWARD and layer.gradient_checkpointing and layer.training:
        recomputed: Tensor = layer._gradient_checkpointing_func(run, stream)
        return recomputed
    return run(stream)


def _run_plain_layer(
    layer: Any, parts: _Parts, closing: Layout | None, layout: Layout, arguments: dict[str, Any], stream: Tensor
) -> Tensor:
    """A decoder layer; at the closing tokens alone if they are given, as only attention looks at others."""
    normed = parts.norm(layer.input_layernorm, stream)
    ends = None if closing is None else closing.on(stream.device).closing
    attended = _attend(layer.self_attn, parts, normed, ends, closing or layout, **arguments)
    stream = stream if ends is None else stream.index_select(1, ends)
    stream, normed = parts.add_and_norm(layer.post_attention_layernorm, stream, attended)
    return stream + parts.mlp(layer.mlp, normed)


def _attend(
    attention: Any,
    parts: _Parts,
    normed: Tensor,
    ends: Tensor | None,
    layout: Layout,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    is_causal: bool,
    **_: Any,  # what else the decoder hands its layers: masks and caches, of which a packed pass has none
) -> Tensor:
    """The attention block's output at all tokens, or at `ends`: their queries over every token's keys and values."""
    cos, sin = position_embeddings

    def heads(projection: Any, qk_norm: Any, states: Tensor) -> Tensor:
        split = parts.project(projection, states).unflatten(-1, (-1, attention.head_dim))
        return (split if qk_norm is None else parts.norm(qk_norm, split)).transpose(1, 2)

    def at_ends(states: Tensor) -> Tensor:
        return states if ends is None else states.index_select(1, ends)

    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    query = heads(attention.q_proj, query_norm, at_ends(normed))
    key, value = heads(attention.k_proj, key_norm, normed), heads(attention.v_proj, None, normed)
    query, key = parts.rotate(query, at_ends(cos), at_ends(sin)), parts.rotate(key, cos, sin)
    attended = attend(attention, query, key, value, None, 0.0, attention.scaling, is_causal, layout)[0]
    return parts.project(attention.o_proj, attended.flatten(2))


def narrowing_layer(model: Any) -> Any:
    """The decoder's last layer, if it is of those that `_forward` knows; else None."""
    layer = inner_decoder(model).layers[-1]
    return layer if _is_plain(layer) and attention_dropout(model) == 0 else None


def is_plain(model: Any) -> bool:
    """Whether all of the decoder's layers are of those that can run fused."""
    return all(_is_plain(layer) for layer in inner_decoder(model).layers)


def _is_plain(layer: Any) -> bool:
    known = any(kind.__name__ in _PLAIN_LAYERS for kind in type(layer).__mro__)  # FSDP makes a class below the layer's
    # accelerate puts a `forward` on an instance too, where a model is spread over devices. That one must stay.
    own = vars(layer).get("forward")
    return known and (own is None or (isinstance(own, partial) and own.func is _forward))


def inner_decoder(model: Any) -> Any:
    """The module that holds the layers, under an adapter or a head."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return model if hasattr(model, "layers") else model.base_model


def attention_dropout(model: Any) -> float:
    """How likely a model in training mode drops an attention weight out; 0 in evaluation."""
    attention = getattr(inner_decoder(model).layers[0], "self_attn", None)
    of_config = getattr(model.config, "attention_dropout", 0.0)
    return float(getattr(attention, "attention_dropout", of_config)) if model.training else 0.0


def head_size(model: Any) -> int:
    """Numbers of one head of a query."""
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


#: Names in `config.layer_types` of layers that attend: to all tokens, or to a window or chunk of them.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
