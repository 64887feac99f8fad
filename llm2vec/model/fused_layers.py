"""Norms, rotary positions and gated products as one kernel each: what a GPU's memory is slow at.

Apart from its matrix products, a layer reads and writes the same numbers again and again: a norm alone makes seven
passes over its input. Here each of these steps is an autograd function of two pure functions, forward and backward.
`torch.compile` makes one kernel of each of them on CUDA; elsewhere they run as they stand, which is what the tests
compare. All compute in float32 at least and round once, where the library rounds several times. Under autocast a norm
gives half precision, so the projections behind it share one copy.

    norm          y = x / sqrt(mean(x^2) + eps) * (offset + weight)
    add_and_norm  the same of x = stream + branch, which is given back too
    rotate        y = x * cos + (-x2, x1) * sin
    gated         y = silu(gate) * up

A LoRA adapter's output is scaled where it is narrow, and added by the product that makes it wide (`project`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from llm2vec.types import first_line

#: Norms that are known here, by their class, and what their weight is added to.
_OFFSETS = {"LlamaRMSNorm": 0, "MistralRMSNorm": 0, "Qwen2RMSNorm": 0, "Qwen3RMSNorm": 0, "GemmaRMSNorm": 1}

#: Decoders whose packed passes run fused (`packing` looks here), each as the module that holds its layers.
fused_decoders: WeakSet[nn.Module] = WeakSet()


def fuse(decoder: nn.Module, on: bool = True) -> None:
    """Packed passes of a decoder, which is the module that holds the layers, run fused from now on, or no longer."""
    (fused_decoders.add if on else fused_decoders.discard)(decoder)


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot be made on a device, or are wrong there; None = they can, and are right.

    Each is compiled once, forward and backward, and compared with the same function run as it stands: half a minute at
    the first start on a machine, seconds at later ones.
    """
    generator = torch.Generator().manual_seed(0)
    x, branch, gradient = torch.randn(3, 24, 64, generator=generator).to(device)
    weight, eps = torch.ones(64, device=device), 1e-5
    y, scale = _norm(x, weight, eps, 0, torch.float32)
    half = x.bfloat16()
    heads = half.view(24, 4, 16)
    tries: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (_norm, (x, weight, eps, 0, torch.bfloat16)),
        (_norm_backward, (gradient.bfloat16(), x, weight, scale, 0, True)),
        (_add_and_norm, (x, half, weight, eps, 0, torch.bfloat16)),
        (_add_and_norm_backward, (gradient, gradient.bfloat16(), x, weight, scale, 0, True, torch.bfloat16)),
        (_rotate, (heads, y[:, :16], y[:, 16:32])),
        (_gated, (half, branch.bfloat16())),
        (_gated_backward, (gradient.bfloat16(), half, branch.bfloat16())),
    ]
    try:
        for function, arguments in tries:
            pairs = zip(_tensors(_run(function, *arguments)), _tensors(function(*arguments)), strict=True)
            for made, expected in pairs:
                if not torch.allclose(made.float(), expected.float(), rtol=0.02, atol=0.02):
                    return f"{function.__name__.strip('_')} gives other numbers when compiled"
    except Exception as error:  # no compiler, no Triton, a card it does not know: each a type of its own
        return first_line(error)
    return None


def _tensors(made: Any) -> list[Tensor]:
    return [tensor for tensor in (made if isinstance(made, tuple) else (made,)) if tensor is not None]


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm makes of [..., D], in the precision of the products behind it; as the library does where unknown."""
    known = _settings_of(module)
    if known is None:
        return module(x)
    made: Tensor = _Norm.apply(x, module.weight, *known, _precision(x, x.dtype))
    return made


def add_and_norm(module: nn.Module, stream: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """stream + branch, and what a norm makes of it."""
    known = _settings_of(module)
    if known is None:
        total = stream + branch
        return total, module(total)
    dtype = _precision(stream, torch.promote_types(stream.dtype, branch.dtype))
    total, normed = _AddAndNorm.apply(stream, branch, module.weight, *known, dtype)
    return total, normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [1, heads, tokens, head size], each token's turned by its position; cos and sin [1, tokens, head size]."""
    turned: Tensor = _Rotate.apply(x.squeeze(0).transpose(0, 1), cos.squeeze(0), sin.squeeze(0))
    return turned.transpose(0, 1).unsqueeze(0)


def gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """What an MLP makes of [..., D]; fused where its gate is SiLU's."""
    if not type(mlp.act_fn).__name__.lower().startswith("silu"):
        return mlp(x)
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return project(down, _Gated.apply(project(gate, x), project(up, x)))


def project(module: Any, x: Tensor) -> Tensor:
    """What a projection makes of [..., D], with its adapter if it has a plain LoRA."""
    name = _adapter_of(module)
    if name is None:
        return module(x)
    wide: Tensor = module.base_layer(x)
    narrow = module.lora_A[name](module.lora_dropout[name](x)) * module.scaling[name]
    upwards = module.lora_B[name].weight.T
    return torch.addmm(wide.flatten(0, -2), narrow.flatten(0, -2), upwards).view_as(wide)


def _adapter_of(module: Any) -> str | None:
    """The adapter of a projection that has one which is no more than two matrices, and computes in one precision."""
    if type(module) is not LoraLinear or module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    (name,) = module.active_adapters
    if name not in module.lora_A or name in module.lora_variant or module.lora_B[name].bias is not None:
        return None
    narrow: Any = module.lora_A[name].weight
    is_one = torch.is_autocast_enabled(narrow.device.type) or narrow.dtype == module.base_layer.weight.dtype
    return name if is_one else None


def _settings_of(module: nn.Module) -> tuple[float, int] | None:
    """A norm's eps and what its weight is added to; None = it is not known here."""
    offset = _OFFSETS.get(type(module).__name__)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return None if offset is None or eps is None else (eps, offset)


def _precision(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the product behind a norm computes in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


# --- the functions, each one kernel ---


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function: compiled on CUDA, for any number of tokens; as it stands elsewhere."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if tensors[0].device.type != "cuda":
        return function(*arguments)
    for tensor in tensors:
        if len(tensor) > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(function)(*arguments)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor, weight: Tensor, eps: float, offset: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exact = _exact(x)
    scale = torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps)
    return (exact * scale * (_exact(weight) + offset)).to(dtype), scale


def _norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, offset: int, for_weight: bool
) -> tuple[Tensor, Tensor | None]:
    unit, exact = _exact(x) * scale, _exact(gradient)
    into_unit = exact * (_exact(weight) + offset)
    into_x = (into_unit - unit * (into_unit * unit).mean(dim=-1, keepdim=True)) * scale
    into_weight = (exact * unit).sum(dim=0).to(weight.dtype) if for_weight else None
    return into_x.to(x.dtype), into_weight


def _add_and_norm(
    stream: Tensor, branch: Tensor, weight: Tensor, eps: float, offset: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total = stream + branch
    return total, *_norm(total, weight, eps, offset, dtype)


def _add_and_norm_backward(
    of_total: Tensor, of_normed: Tensor, total: Tensor, weight: Tensor, scale: Tensor, offset: int, for_weight: bool,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    through, into_weight = _norm_backward(of_normed, total, weight, scale, offset, for_weight)
    into_total = of_total + through
    return into_total, into_total.to(branch_dtype), into_weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    exact = _exact(x)
    first, second = exact.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (exact * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    exact = _exact(gate)
    return (exact * torch.sigmoid(exact) * _exact(up)).to(gate.dtype)


def _gated_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    exact, into = _exact(gate), _exact(gradient)
    share = torch.sigmoid(exact)
    into_gate = into * _exact(up) * share * (1 + exact * (1 - share))
    return into_gate.to(gate.dtype), (into * exact * share).to(up.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: int, dtype: torch.dtype) -> Tensor:
        rows = x.flatten(0, -2)
        normed, scale = _run(_norm, rows, weight, eps, offset, dtype)
        ctx.save_for_backward(rows, weight, scale)
        ctx.offset, ctx.shape = offset, x.shape
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        gradient = gradients[0].reshape(rows.shape)
        made = _run(_norm_backward, gradient, rows, weight, scale, ctx.offset, ctx.needs_input_grad[1])
        return made[0].view(ctx.shape), made[1], None, None, None


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, branch: Tensor, weight: Tensor, eps: float, offset: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows, shape = (stream.flatten(0, -2), branch.flatten(0, -2)), stream.shape
        total, normed, scale = _run(_add_and_norm, *rows, weight, eps, offset, dtype)
        ctx.save_for_backward(total, weight, scale)
        ctx.offset, ctx.shape, ctx.branch_dtype = offset, shape, branch.dtype
        return total.view(shape), normed.view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        of_total, of_normed = (gradient.reshape(total.shape) for gradient in gradients)
        arguments = (of_total, of_normed, total, weight, scale, ctx.offset, ctx.needs_input_grad[2], ctx.branch_dtype)
        into_stream, into_branch, into_weight = _run(_add_and_norm_backward, *arguments)
        return into_stream.view(ctx.shape), into_branch.view(ctx.shape), into_weight, None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _run(_rotate, x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _run(_rotate, gradients[0], cos, -sin), None, None  # turned back


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _run(_gated, gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        rows = (tensor.reshape(-1, gate.shape[-1]) for tensor in (gradients[0], gate, up))
        into_gate, into_up = _run(_gated_backward, *rows)
        return into_gate.view(gate.shape), into_up.view(gate.shape)
