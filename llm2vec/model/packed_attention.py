"""Attention over texts laid end to end in one row, each attending to itself and to the prefix it shares with others.

One function, `attend`, is registered with transformers under `NAME` and serves every decoder that uses its attention
interface. It reads how the texts lie from a `Layout`, which the caller hands to the model as the argument `layout`:

    CUDA, half precision     torch's variable-length FlashAttention, or a kernel of the hub: one for all texts
    CPU, a shared prefix     torch's fused CPU kernel twice a text, joined by the log-sum-exp (`_SharedPrefix`)
    anything else            torch's scaled_dot_product_attention text by text
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_flash_attention_utils import _flash_attention_forward, lazy_import_flash_attention
from transformers.utils import import_utils

from llm2vec.types import AttnImplementation, UserError, in_one_sentence

logger = logging.getLogger(__name__)

#: What this attention is called in a model's config while a packed pass runs.
NAME = "llm2vec_packed"

#: FlashAttention from the hub, which transformers fetches by the package `kernels`: foreign code, so by its name alone.
#: Each name is there by itself: what a model attends by is looked up here, and None = no kernel of these.
HUB_KERNELS = {name: name for name in get_args(AttnImplementation) if "/" in name}
#: Attention that knows no float32 and runs on CUDA alone.
IN_HALF = {"flash_attention_2", *HUB_KERNELS}

# The kernels behind scaled_dot_product_attention on a CPU. Called directly, they also give the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Group(NamedTuple):
    """Texts that stand one after the other behind the prefix they share."""

    prefix: int  #: tokens of the shared prefix, which stands once in front of the first text; 0 = none
    lengths: tuple[int, ...]  #: each text's own tokens


class _Span(NamedTuple):
    """Where one text's queries and keys stand, and where its prefix's keys do (empty without one)."""

    query: slice
    key: slice
    prefix: slice


class _Indices(NamedTuple):
    """A layout as tensors."""

    closing: Tensor  #: index [texts] of each text's last token
    keys: Tensor  #: index of each text's keys, its prefix's first, text after text
    query_ends: Tensor  #: ends of the texts' queries, int32 [texts + 1] from 0
    key_ends: Tensor  #: the same of their keys, prefix included


@dataclass(frozen=True, eq=False)
class Layout:
    """How texts lie in a packed row.

    >>> Layout((Group(prefix=2, lengths=(3, 1)),)).closing  # two shared tokens, then three and one
    tensor([4, 5])
    """

    groups: tuple[Group, ...]  #: in the order in which they stand
    closing_only: bool = False  #: the queries are the last token of each text alone; keys and values are all tokens
    kernel: str | None = None  #: of `HUB_KERNELS`, for CUDA; None = torch's
    _moved: dict[torch.device, _Indices] = field(default_factory=dict)

    @cached_property
    def spans(self) -> list[_Span]:
        """One a text; a shared prefix counts as a text of its own where its tokens have queries too."""
        spans = []
        key = query = 0
        for group in self.groups:
            prefix = slice(key, key + group.prefix)
            key += group.prefix
            if group.prefix and not self.closing_only:
                spans.append(_Span(slice(query, query + group.prefix), prefix, slice(0, 0)))
                query += group.prefix
            for length in group.lengths:
                width = 1 if self.closing_only else length
                spans.append(_Span(slice(query, query + width), slice(key, key + length), prefix))
                query, key = query + width, key + length
        return spans

    @cached_property
    def closing(self) -> Tensor:
        """Index [texts] of each text's last token."""
        ends = [span.key.stop - 1 for span in Layout(self.groups, closing_only=True).spans]
        return torch.tensor(ends)

    @cached_property
    def has_prefix(self) -> bool:
        """Whether any texts share a prefix."""
        return any(group.prefix for group in self.groups)

    def on(self, device: torch.device) -> _Indices:
        """The layout's tensors on a device; moved once, as every layer asks for them (`place` moves several)."""
        if device not in self._moved:
            place(device, [], [self])
        return self._moved[device]

    def _indices(self) -> _Indices:
        queries = [_size(span.query) for span in self.spans]
        ends = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (queries, self._key_lengths)]
        keys = torch.cat([torch.arange(s.start, s.stop) for span in self.spans for s in (span.prefix, span.key)])
        return _Indices(self.closing, keys, *ends)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a text."""
        return max(span.query.stop - span.query.start for span in self.spans), max(self._key_lengths)

    @cached_property
    def _key_lengths(self) -> list[int]:
        return [_size(span.prefix) + _size(span.key) for span in self.spans]


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Whole numbers of the host's memory on a device; to a GPU in one copy, for which nobody waits."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    flat = torch.cat([tensor.flatten().long() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in parts]


def place(device: torch.device, tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """Tensors of indices on a device, and the layouts' own (`Layout.on`), by one copy (`send`)."""
    flat = [*tensors, *(index for layout in layouts for index in layout._indices())]
    sent = send(flat, device)
    for i, layout in enumerate(layouts):
        first = len(tensors) + i * len(_Indices._fields)
        layout._moved[device] = _Indices(*sent[first : first + len(_Indices._fields)])
    return sent[: len(tensors)]


# Not compiled: it loops over texts, whose number and lengths are different in every batch.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    layout: Layout | None = None,
    **_: Any,  # the library hands every attention function all that any of them takes
) -> tuple[Tensor, None]:
    """[1, heads, queries or tokens, head size] -> [1, queries, heads, head size].

    The queries are those of all tokens, or of the closing ones where the layout says so.
    """
    if layout is None:
        raise UserError(f"{type(module).__name__} hands no arguments on to its attention; its family cannot be packed.")
    dtype = value.dtype  # queries and keys may be in float32, where rotation has made them so
    if dropout == 0 and _runs_varlen(query.device, query.dtype, query.shape[-1], layout.kernel):
        return _attend_varlen(query, key, value, layout, bool(is_causal), scaling), None
    if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # The half-precision backward of the CPU kernel is slower than float32's, and less exact. The mode decides, not
        # whether there is a graph: of a cached gradient's two passes only the second has one, and both must give the
        # same vectors.
        precision = torch.float32 if module.training else dtype
        query, key, value = query.to(precision), key.to(precision), value.to(precision)
    if layout.has_prefix:
        output = _SharedPrefix.apply(query, *_same_heads(query, key, value), layout, bool(is_causal), scaling)
    else:
        with torch.autocast("cpu", enabled=False):  # which would round queries, keys and values again
            output = torch.cat(list(_text_by_text(query, key, value, layout, bool(is_causal), scaling, dropout)), dim=2)
    return output.transpose(1, 2).to(dtype), None


def can_share_prefix(
    device: torch.device, dtype: torch.dtype, dropout: float, head_size: int, kernel: str | None = None
) -> bool:
    """Whether attention over a shared prefix is there for tensors of this kind, by torch or by a kernel of the hub."""
    return dropout == 0 and (device.type == "cpu" or _runs_varlen(device, dtype, head_size, kernel))


def _text_by_text(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool, scaling: float | None, dropout: float
) -> Iterator[Tensor]:
    # Split, not sliced: the gradient of a slice is a whole row of zeros with the slice's in it, one for every text.
    widths = [_size(span.query) for span in layout.spans]
    lengths = [_size(span.key) for span in layout.spans]
    for q, k, v in zip(query.split(widths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        is_causal, grouped = causal and q.shape[2] > 1, query.shape[1] != key.shape[1]
        yield F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal, scale=scaling, enable_gqa=grouped)


class _SharedPrefix(torch.autograd.Function):
    """Each text attends to its prefix's keys and, causally, to its own; the two are joined exactly.

    Softmax over both sets of keys is the mean of the two outputs, each weighted by exp of its log-sum-exp. The
    kernel's backward takes output and log-sum-exp from outside, so it is called with the joint ones. Then each set's
    gradient is its share of the whole, and the prefix gets the sum over all texts that share it.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool, scaling: float | None
    ) -> Tensor:
        # Laid out as [tokens, heads, head size], which the caller asks for: its transpose back then moves nothing.
        output = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        exact = torch.promote_types(query.dtype, torch.float32)  # as the kernel gives it, also in half precision
        log_sum = query.new_empty(query.shape[:3], dtype=exact)
        for span in layout.spans:
            # A closing token alone sees all of its text. The kernel would take it for the first one and mask the rest.
            own = causal and _size(span.query) > 1
            q = query[:, :, span.query]
            output[:, :, span.query], log_sum[:, :, span.query] = _flash(
                q, key[:, :, span.key], value[:, :, span.key], 0.0, own, scale=scaling
            )
        # All texts behind one prefix at once: to all of them, all of it is past.
        for queries, prefix in _sharing(layout):
            there, there_sum = _flash(
                query[:, :, queries], key[:, :, prefix], value[:, :, prefix], 0.0, False, scale=scaling
            )
            joint = torch.logaddexp(log_sum[:, :, queries], there_sum)  # of both sets of keys
            here_share = (log_sum[:, :, queries] - joint).exp_().unsqueeze(-1)
            there_share = (there_sum - joint).exp_().unsqueeze(-1)
            output[:, :, queries] = output[:, :, queries] * here_share + there * there_share
            log_sum[:, :, queries] = joint
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.layout, ctx.causal, ctx.scaling = layout, causal, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        into = [torch.zeros_like(tensor) for tensor in (query, key, value)]

        def add(queries: slice, keys: slice, causal: bool) -> None:
            places = (queries, keys, keys)
            parts = _flash_backward(
                gradients[0][:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                output[:, :, queries], log_sum[:, :, queries], 0.0, causal, scale=ctx.scaling,
            )  # fmt: skip
            # Added, as a query has two sets of keys, and a prefix's keys many texts.
            for total, place, part in zip(into, places, parts, strict=True):
                total[:, :, place] += part

        for span in ctx.layout.spans:
            add(span.query, span.key, ctx.causal and _size(span.query) > 1)
        for queries, prefix in _sharing(ctx.layout):
            add(queries, prefix, False)
        return (*into, None, None, None)


def _sharing(layout: Layout) -> list[tuple[slice, slice]]:
    """Queries of all texts behind one prefix, and that prefix's keys; the texts of a group stand side by side."""
    groups = ((prefix, list(spans)) for prefix, spans in groupby(layout.spans, lambda span: span.prefix))
    return [(slice(spans[0].query.start, spans[-1].query.stop), prefix) for prefix, spans in groups if _size(prefix)]


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool, scaling: float | None
) -> Tensor:
    """A variable-length kernel, torch's or the layout's; a text's keys are its prefix's and its own.

    Where there are more keys than queries, the kernel takes the queries for the last ones, which they are.
    """
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    is_grouped = query.shape[1] != key.shape[1] and layout.kernel is None and varlen_takes("enable_gqa")
    grouped: dict[str, Any] = {"enable_gqa": True} if is_grouped else {}
    if layout.kernel is None and not grouped:
        key, value = _same_heads(query, key, value)
    q, k, v = (tensor.squeeze(0).transpose(0, 1).to(half) for tensor in (query, key, value))
    indices = layout.on(query.device)
    if layout.has_prefix:  # it cannot read a prefix from elsewhere, so each text gets a copy of its keys and values
        k, v = k.index_select(0, indices.keys), v.index_select(0, indices.keys)
    ends = (indices.query_ends, indices.key_ends)
    if layout.kernel is not None:
        lengths: dict[str, Any] = dict(zip(("max_length_q", "max_length_k"), layout.longest, strict=True))
        lengths |= {"cu_seq_lens_q": ends[0], "cu_seq_lens_k": ends[1], "attn_implementation": layout.kernel}
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        by_row: Tensor = _flash_attention_forward(q, k, v, None, 0, causal, softmax_scale=scaling, **lengths)
        return by_row
    from torch.nn.attention.varlen import varlen_attn  # older versions of torch lack it

    window = (-1, 0) if causal else (-1, -1)
    output = varlen_attn(q, k, v, *ends, *layout.longest, scale=scaling, window_size=window, **grouped)
    assert isinstance(output, Tensor), "no log-sum-exp was asked for"
    return output.unsqueeze(0)


def _runs_varlen(device: torch.device, dtype: torch.dtype, head_size: int, kernel: str | None = None) -> bool:
    """FlashAttention computes in half precision, and torch's heads of up to 256 numbers, a multiple of 8; what a kernel
    of the hub takes was tried at loading."""
    half = device.type == "cuda" and (dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda"))
    return half and (kernel is not None or (head_size % 8 == 0 and head_size <= 256 and _varlen_is_there()))


@cache
def _varlen_is_there() -> bool:
    """Whether torch's variable-length kernel can run on this machine's GPU; where it cannot, that is said, once."""
    if not varlen_takes("scale", "window_size"):
        missing = f"torch {torch.__version__} has no varlen_attn with a scale (2.11 has)"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        missing = f"{torch.cuda.get_device_name()} is older than its kernel (compute capability 8.0)"
    else:
        return True
    logger.warning("variable-length attention: %s; texts attend one after the other, which is slower.", missing)
    return False


@cache
def varlen_takes(*names: str) -> bool:
    """Whether there is a variable-length kernel with these parameters: 2.10's has fewer, before there was none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return set(names) <= inspect.signature(varlen_attn).parameters.keys()


def load_kernel(name: str) -> None:
    """Fetch and load a kernel of `HUB_KERNELS`, as transformers does, which keeps it; say so. A `UserError` where it
    has another name, or there is no CUDA device, no package `kernels`, or none on the hub for this torch."""
    if name not in HUB_KERNELS:
        raise UserError(f"attn_implementation is {name!r}; known kernels of the hub: {', '.join(sorted(HUB_KERNELS))}.")
    least, below = import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION
    if not torch.cuda.is_available():
        raise UserError(f"attn_implementation: {name} needs a CUDA device, and there is none.")
    if not import_utils.is_kernels_available():
        raise UserError(f'attn_implementation: {name} needs kernels: pip install "kernels>={least},<{below}".')
    # Out of reach, no build for this torch, a kernel of another kind: each raises its own type.
    with in_one_sentence(lambda why: f"attn_implementation: {name} could not be loaded: {why}"):
        lazy_import_flash_attention(name)
    logger.info("attention   %s, code of the Hugging Face hub, as attn_implementation asks", name)


def _same_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with as many heads as the query: these kernels know no grouped ones."""
    times = query.shape[1] // key.shape[1]
    if times == 1:
        return key, value
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def _size(part: slice) -> int:
    size: int = part.stop - part.start
    return size
