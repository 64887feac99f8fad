"""What a step keeps for its backward pass, reckoned from the model's shapes before its weights are there.

Counted tensor by tensor, as the packed passes keep them (`packing`, `packed_attention`), for layers made as Llama's
are: Mistral, Qwen 2 and 3, Gemma and others with the same seven projections. Compiled layers keep less. CPU and CUDA
differ in attention: a CPU computes it in float32, text by text, and copies its output for the projection behind it;
CUDA's variable-length kernel, in half precision, keeps queries, keys and values, its output (which the projection reads
as it is) and a log-sum-exp. Fused layers (`model.fused_layers`) keep what goes into a norm and into a gated product.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainingArguments

from llm2vec.model.packed_attention import varlen_takes
from llm2vec.model.packing import attention_dropout, inner_decoder, narrowing_layer, shares_prefix
from llm2vec.planning.work import width_of_queries
from llm2vec.training.recomputation import tokens_run
from llm2vec.types import Pass

#: A layer's projections, each with what it reads: those with the same word read the same tensor.
PROJECTIONS = {
    "q_proj": "stream", "k_proj": "stream", "v_proj": "stream", "o_proj": "attended",
    "gate_proj": "middle", "up_proj": "middle", "down_proj": "product",
}  # fmt: skip

#: `load_in` -> bits of a weight: in 4 bits a block of 64 shares a scale of 8 bits, 256 of those one of 32.
BITS_OF_BASE = {None: None, "8bit": 8.0, "4bit": 4 + 8 / 64 + 32 / (64 * 256)}


@dataclass(frozen=True)
class Numbers:
    """What a run computes with."""

    stream: int  #: bytes of a number between the layers
    compute: int  #: bytes of a number that a matrix product gives
    device: str  #: `cpu` or `cuda`
    fused: bool = False  #: whether layers run fused
    bits: float | None = None  #: of a weight of the frozen layers (`load_in`); None = as they stand

    @classmethod
    def of(
        cls, args: TrainingArguments, model: nn.Module, device: str, fused: bool = False, bits: float | None = None
    ) -> Numbers:
        """As the training arguments and the weights' dtype have it."""
        weights = next(model.parameters()).dtype.itemsize
        half = args.bf16 or args.fp16
        return cls(2 if half and args.fsdp else weights, 2 if half else weights, device, fused, bits)

    @property
    def casts(self) -> bool:
        """Whether each product casts what it reads (autocast over float32 weights)."""
        return self.stream != self.compute and not self.fused

    @property
    def shares(self) -> tuple[torch.device, torch.dtype]:
        """What decides whether a prefix can be shared."""
        return torch.device(self.device), torch.bfloat16 if self.compute == 2 else torch.float32


class Kept(NamedTuple):
    """Bytes that a layer keeps for each token."""

    whole: float  #: where it runs at all tokens
    pair: float  #: further, for each pair of a token and one of its text
    #: in the last layer, where all but keys and values runs at the closing tokens alone.
    narrow: float
    recomputed: float  #: where it is recomputed: its input


class _Attended(NamedTuple):
    """Bytes that attention keeps for each token."""

    query: float  #: of its query and output
    key: float  #: of its key and value
    pair: float = 0.0  #: further, for each pair
    copied: bool = True  #: whether its output is copied for the projection behind it


def is_known(model: Any) -> bool:
    """Whether the model's layers are of the kind that is reckoned with here."""
    return set(PROJECTIONS) <= _modules(model).keys()


def reckoned_bytes(model: Any, numbers: Numbers, passes: Sequence[Pass], num_recomputed: int = 0) -> float:
    """Bytes that a forward pass keeps for its backward pass, weights and their gradients left out.

    The model, with or without head and adapter, is in training mode; its weights may be on the meta device. The passes
    run at once, and the first `num_recomputed` layers are recomputed.
    """
    targets = sum(p.targets for p in passes if p.kind != "read")
    of_targets = targets * model.config.hidden_size * numbers.compute  # their gradient, which comes with the loss
    return of_targets + sum(kept_by_pass(model, numbers, p, num_recomputed) for p in passes)


@functools.lru_cache(maxsize=2)
def frozen_form(model: Any) -> Any:
    """A model's decoder as it runs where nothing of it is trained: without an adapter, on the meta device."""
    inner = inner_decoder(model)
    inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner  # of an adapter below a head
    with torch.device("meta"):
        return type(inner)(inner.config).to(next(inner.parameters()).dtype).requires_grad_(False).train()


def kept_by_a_layer(model: Any, numbers: Numbers, p: Pass) -> float:
    """Bytes that one whole layer keeps in a pass: they come back while it is recomputed."""
    return tokens_run(model, p, *numbers.shares) * kept_by_layer(model, numbers, p).whole


def working(model: Any, numbers: Numbers, p: Pass) -> float:
    """Bytes that a layer needs for a moment beside what it keeps, at the projection behind the MLP.

    In the backward pass these are gradients of what the MLP multiplied, less what the projection had kept and is done
    with; under LoRA, in the forward pass, also what its adapter made on the way to what it keeps. And twice the stream.
    """
    projection = _modules(model)["down_proj"]
    of_product = _inputs(numbers, {"down_proj": projection}, copied=True)
    width: int = projection.in_features
    at_most = 3 * width * numbers.compute - of_product
    if isinstance(projection, LoraLayer):
        half, drops = numbers.compute == 2, _drops(projection)
        made = numbers.compute + 4 * (half and (drops or numbers.casts)) + 4 * (drops and numbers.casts)
        at_most = max(at_most, width * made)
    return tokens_run(model, p, *numbers.shares) * (at_most + 2 * model.config.hidden_size * numbers.stream)


def kept_by_layer(model: Any, numbers: Numbers, p: Pass) -> Kept:
    """What one of the model's layers keeps in a pass."""
    modules = _modules(model)
    hidden: int = model.config.hidden_size
    projections = {name: modules[name] for name in PROJECTIONS}
    widths = {"q_norm": modules["q_proj"].out_features, "k_norm": modules["k_proj"].out_features}
    norms = {
        name: _norm(module, widths.get(name, hidden), numbers, numbers.fused)
        for name, module in modules.items()
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
    }
    attended = _attention(model, numbers, p)
    whole = sum(norms.values()) + attended.query + attended.key
    whole += _inputs(numbers, projections, attended.copied)
    # Gate, up and, where it is a tensor of its own, what the activation makes of the gate.
    whole += (3 - numbers.fused) * modules["gate_proj"].out_features * numbers.compute
    keys_and_values = {name: projections[name] for name in ("k_proj", "v_proj")}
    narrow = norms["input_layernorm"] + norms.get("k_norm", 0) + attended.key
    narrow += _inputs(numbers, keys_and_values, attended.copied)
    return Kept(whole, attended.pair, narrow, hidden * numbers.stream)


def kept_by_pass(model: Any, numbers: Numbers, p: Pass, num_recomputed: int = 0) -> float:
    """Bytes that a pass keeps; arguments as in `reckoned_bytes`."""
    if p.kind == "read":
        return 0.0
    if p.kind == "frozen":
        return kept_by_pass(frozen_form(model), numbers, p._replace(kind="trained"), num_recomputed) + (
            0 if num_recomputed else sum(p.lengths) * _below_the_first_adapter(frozen_form(model), numbers)
        )
    decoder = inner_decoder(model)
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    kept = kept_by_layer(model, numbers, p)
    tokens, num_whole = tokens_run(model, p, *numbers.shares), len(decoder.layers) - num_recomputed
    whole = tokens * kept.whole + sum(length**2 for length in p.lengths) * kept.pair
    total = num_recomputed * tokens * kept.recomputed + num_whole * whole
    if p.closing_only and num_whole and narrowing_layer(model) is not None:
        total += tokens * kept.narrow + len(p.lengths) * (kept.whole - kept.narrow) - whole
    if not num_recomputed and not any(w.requires_grad for w in model.get_input_embeddings().parameters()):
        total -= tokens * _below_the_first_adapter(model, numbers)
    states = len(p.lengths) if p.closing_only else tokens
    sine_and_cosine = 2 * numbers.stream * width_of_queries(model.config) / heads
    return total + tokens * sine_and_cosine + states * _norm(decoder.norm, hidden, numbers)


def _modules(model: Any) -> dict[str, Any]:
    """A layer's modules by the last part of their names; of an adapted projection the adapted one."""
    modules: dict[str, Any] = {}
    for name, module in inner_decoder(model).layers[0].named_modules():
        modules.setdefault(name.rpartition(".")[2], module)
    return modules


def _norm(module: Any, width: int, numbers: Numbers, fused: bool = False) -> float:
    """A norm keeps its input, in float32 where it is not fused, and then what a trained weight is multiplied with."""
    if fused:
        return width * numbers.stream + 4
    return width * (4 + (numbers.stream if module.weight.requires_grad else 0)) + 4


def _attention(model: Any, numbers: Numbers, p: Pass) -> _Attended:
    """As `packed_attention.attend` computes it."""
    modules = _modules(model)
    queries, keys = modules["q_proj"].out_features, modules["k_proj"].out_features
    heads: int = model.config.num_attention_heads
    dropout = attention_dropout(model) > 0
    if numbers.device == "cuda" and numbers.compute == 2 and not dropout:
        wide = keys if varlen_takes("enable_gqa") else queries  # without, keys are copied for each head
        return _Attended(2 * queries * 2 + 4 * heads, 2 * wide * 2, copied=False)
    if numbers.device == "cpu" and dropout:  # torch's plain products: scores, and twice what dropout makes of them
        return _Attended(4 * queries, 4 * 2 * queries, 4 * 3 * heads)
    size = 4 if numbers.device == "cpu" else numbers.compute
    if p.repeated and shares_prefix(model, p.attention, *numbers.shares):  # with as many heads each, too
        return _Attended(2 * queries * size + 4 * heads, 2 * queries * size, copied=size != numbers.compute)
    return _Attended(2 * queries * size + 4 * heads, 2 * keys * size)


def _inputs(numbers: Numbers, projections: Mapping[str, Any], copied: bool) -> float:
    """What projections keep of what they read: it itself, once for those that read the same, or copies of their own.

    `copied`: whether attention's output is copied for `o_proj`, which else reads what is counted there.
    """
    once: dict[str, int] = {}
    total = 0
    for name, projection in projections.items():
        width = projection.in_features
        if isinstance(projection, LoraLayer):
            total += _adapter_input(projection, numbers)
            whole = numbers.stream if not numbers.fused else numbers.compute
            is_shared = not numbers.casts and numbers.stream == 4 and not _drops(projection)
            if is_shared and (copied or name != "o_proj"):
                once[PROJECTIONS[name]] = whole * width
        elif projection.weight.requires_grad:
            if numbers.casts and PROJECTIONS[name] in ("stream", "middle"):
                total += width * numbers.compute
            elif copied or name != "o_proj":
                once[PROJECTIONS[name]] = width * numbers.compute
    return total + sum(once.values())


def _adapter_input(projection: Any, numbers: Numbers) -> int:
    """A LoRA adapter's copies: its input cast, a dropout's noise (a byte on CUDA) and result; and its inner numbers."""
    (inner,) = projection.lora_A.values()
    size = numbers.compute if numbers.stream != numbers.compute else inner.weight.dtype.itemsize
    noise = _noise(projection, numbers) if _drops(projection) else 0
    is_cast = noise or numbers.casts or numbers.stream == 2
    return int(size * (inner.out_features + (projection.in_features if is_cast else 0)) + noise)


def _below_the_first_adapter(model: Any, numbers: Numbers) -> float:
    """What the first layer keeps less than the others where the embeddings are frozen: no gradient goes to them."""
    modules = _modules(model)
    readers = [modules[name] for name, read in PROJECTIONS.items() if read == "stream"]
    noises = [_noise(m, numbers) for m in readers if isinstance(m, LoraLayer) and _drops(m)]
    return _norm(modules["input_layernorm"], model.config.hidden_size, numbers) + sum(noises)


def _noise(projection: Any, numbers: Numbers) -> int:
    """What a dropout draws for an adapter's input."""
    return int(projection.in_features * (1 if numbers.device == "cuda" else 4))


def _drops(projection: Any) -> bool:
    (dropout,) = projection.lora_dropout.values()
    return isinstance(dropout, nn.Dropout) and dropout.p > 0
