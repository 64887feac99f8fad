"""Packed attention against a mask written out token by token, in all of its ways of computing it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import modeling_flash_attention_utils
from transformers.integrations import hub_kernels
from transformers.utils import import_utils

from llm2vec.model import packed_attention
from llm2vec.model.backbone import available_attention
from llm2vec.model.packed_attention import HUB_KERNELS, Group, Layout, attend, can_share_prefix
from llm2vec.types import UserError

CPU = torch.device("cpu")

#: Texts of one own token, single texts, groups without a prefix between groups with one.
LAYOUTS = [
    (Group(0, (4,)),),
    (Group(0, (3, 1, 5)),),
    (Group(2, (3,)),),
    (Group(3, (2, 1, 4)),),
    (Group(2, (1, 3)), Group(0, (2, 5)), Group(4, (1, 1, 6))),
    (Group(0, (1,)), Group(1, (1, 1)), Group(0, (2,))),
]
SHARING = [groups for groups in LAYOUTS if any(group.prefix for group in groups)]


class Token(NamedTuple):
    """One place of a packed row: its group, its text (-1 = the shared prefix), its position in that text."""

    group: int
    text: int
    position: int


def tokens_of(groups: tuple[Group, ...]) -> list[Token]:
    """The packed row, token by token."""
    tokens = []
    for g, group in enumerate(groups):
        tokens += [Token(g, -1, i) for i in range(group.prefix)]
        tokens += [Token(g, t, group.prefix + i) for t, length in enumerate(group.lengths) for i in range(length)]
    return tokens


def visible(groups: tuple[Group, ...], causal: bool) -> Tensor:
    """Which token (column) each token (row) sees: its own text's and its prefix's, up to itself where causal."""

    def sees(one: Token, other: Token) -> bool:
        together = one.group == other.group and other.text in (one.text, -1)
        return together and (not causal or other.position <= one.position)

    tokens = tokens_of(groups)
    return torch.tensor([[sees(one, other) for other in tokens] for one in tokens])


def closing_of(groups: tuple[Group, ...]) -> list[int]:
    """Index of each text's last token."""
    tokens = tokens_of(groups)
    return [i for i, t in enumerate(tokens) if t.text >= 0 and (i + 1 == len(tokens) or tokens[i + 1][:2] != t[:2])]


def heads(groups: tuple[Group, ...], kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Random query, key and value of four heads over the row's tokens."""
    length = len(tokens_of(groups))
    return tuple(
        (torch.randn(1, n, length, 8, dtype=torch.float64) * 2).to(dtype).requires_grad_()
        for n in (4, kv_heads, kv_heads)
    )


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """torch's attention under an explicit mask, in the shape that `attend` returns."""
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2)


def attend_to(q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool, scaling: float | None = None) -> Tensor:
    output, _ = attend(torch.nn.Module(), q, k, v, None, 0.0, scaling, causal, layout)
    return output


def gradients(output: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Of a sum in which every entry has a weight of its own."""
    return list(torch.autograd.grad((output.double() * weights_of(output)).sum(), leaves))


def weights_of(output: Tensor) -> Tensor:
    return torch.arange(output.numel(), dtype=torch.float64, device=output.device).cos().reshape(output.shape)


def assert_same(actual: Tensor, expected: Tensor, leaves: tuple[Tensor, ...], tolerance: float) -> None:
    """Value and every leaf's gradient, relative to the largest entry."""
    all_actual, all_expected = ([output, *gradients(output, leaves)] for output in (actual, expected))
    for one, other in zip(all_actual, all_expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()
        assert other.abs().max() > 1e-3


# --- how texts lie ---


def test_layout_by_hand() -> None:
    """Two texts behind a prefix of two, then one text alone: where queries, keys and prefixes stand."""
    layout = Layout((Group(2, (3, 1)), Group(0, (4,))))
    assert [tuple((s.start, s.stop) for s in span) for span in layout.spans] == [
        ((0, 2), (0, 2), (0, 0)),  # the prefix itself
        ((2, 5), (2, 5), (0, 2)),
        ((5, 6), (5, 6), (0, 2)),
        ((6, 10), (6, 10), (6, 6)),
    ]
    assert layout.closing.tolist() == [4, 5, 9]
    assert layout.has_prefix
    closing, keys, query_ends, key_ends = layout.on(CPU)
    assert closing.tolist() == [4, 5, 9]
    assert keys.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9]
    assert (query_ends.tolist(), key_ends.tolist()) == ([0, 2, 5, 6, 10], [0, 2, 7, 10, 14])
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert layout.on(CPU).keys is keys  # every layer asks
    assert layout.longest == (4, 5)


def test_layout_of_closing_tokens_by_hand() -> None:
    """A query a text and none for the prefix; keys are all tokens as before."""
    layout = Layout((Group(2, (3, 1)), Group(0, (4,))), closing_only=True)
    assert [tuple((s.start, s.stop) for s in span) for span in layout.spans] == [
        ((0, 1), (2, 5), (0, 2)),
        ((1, 2), (5, 6), (0, 2)),
        ((2, 3), (6, 10), (6, 6)),
    ]
    assert layout.closing.tolist() == [4, 5, 9]
    closing, keys, query_ends, key_ends = layout.on(CPU)
    assert closing.tolist() == [4, 5, 9]
    assert keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9]
    assert (query_ends.tolist(), key_ends.tolist()) == ([0, 1, 2, 3], [0, 5, 8, 12])
    assert layout.longest == (1, 5)
    assert not Layout((Group(0, (3, 1)),)).has_prefix


@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
def test_closing_tokens_are_the_texts_last_ones(groups: tuple[Group, ...]) -> None:
    assert Layout(groups).closing.tolist() == Layout(groups, closing_only=True).closing.tolist() == closing_of(groups)


# --- attention ---


@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped", "equal"])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_equals_an_explicit_mask(groups: tuple[Group, ...], causal: bool, kv_heads: int, scaling: float | None) -> None:
    """Value and gradient of queries, keys and values in float64."""
    q, k, v = leaves = heads(groups, kv_heads)
    expected = masked(q, k, v, visible(groups, causal), scaling)
    assert_same(attend_to(q, k, v, Layout(groups), causal, scaling), expected, leaves, 1e-12)


@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_closing_queries_alone_equal_their_rows_of_the_mask(groups: tuple[Group, ...], causal: bool) -> None:
    q, k, v = leaves = heads(groups)
    ends = closing_of(groups)
    expected = masked(q[:, :, ends], k, v, visible(groups, causal)[ends], None)
    actual = attend_to(q[:, :, ends], k, v, Layout(groups, closing_only=True), causal)
    assert_same(actual, expected, leaves, 1e-12)


@pytest.mark.parametrize("groups", SHARING, ids=str)
def test_a_shared_prefix_in_float32(groups: tuple[Group, ...]) -> None:
    """Against float64 of the same numbers, also where nearly all the weight falls to one of the two softmaxes that are
    joined: no further off than torch's own kernel under the mask."""
    single = heads(groups, dtype=torch.float32)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in single)
    mask = visible(groups, True)
    for factor in (1.0, 6.0):

        def outputs_of(leaves: tuple[Tensor, ...], packed: bool, factor: float = factor) -> list[Tensor]:
            q, k, v = leaves
            output = (
                attend_to(q * factor, k, v, Layout(groups), True) if packed else masked(q * factor, k, v, mask, None)
            )
            return [output, *gradients(output, leaves)]

        of_all = zip(outputs_of(exact, False), outputs_of(single, False), outputs_of(single, True), strict=True)
        for truth, plain, packed in of_all:
            assert (packed - truth).norm() <= 3 * (plain - truth).norm() + 1e-6 * truth.norm()
            assert truth.norm() > 1e-3


def test_the_prefix_makes_a_difference() -> None:
    """The guard of the tests above: other groups over the same tokens attend otherwise, in value and gradient."""
    groups = (Group(3, (2, 1, 4)),)
    q, k, v = leaves = heads(groups)
    right = attend_to(q, k, v, Layout(groups), True)
    of_right = [right, *gradients(right, leaves)]
    wrong = [(Group(0, (3, 2, 1, 4)),), (Group(2, (3, 1, 4)),), (Group(3, (3, 4)),)]
    for layout, causal in [*((Layout(other), True) for other in wrong), (Layout(groups), False)]:
        output = attend_to(q, k, v, layout, causal)
        for one, other in zip([output, *gradients(output, leaves)], of_right, strict=True):
            assert (one - other).abs().max() > 0.01 * other.abs().max()


def test_a_text_does_not_hear_of_its_neighbours() -> None:
    """Gradient of one text's output: none outside the text and its prefix."""
    groups = (Group(2, (1, 3)), Group(4, (1, 2)))
    q, k, v = heads(groups)
    second_text = slice(3, 6)
    attend_to(q, k, v, Layout(groups), True)[:, second_text].sum().backward()
    for leaf, heard in ((q, {3, 4, 5}), (k, {0, 1, 3, 4, 5}), (v, {0, 1, 3, 4, 5})):
        assert leaf.grad is not None
        assert {i for i in range(leaf.shape[2]) if leaf.grad[:, :, i].any()} == heard


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [LAYOUTS[1], LAYOUTS[4]], ids=str)
def test_half_precision_on_a_cpu_is_float32_rounded(groups: tuple[Group, ...], dtype: torch.dtype) -> None:
    """Of the same numbers: the output to the bit, and gradients in the inputs' dtype."""
    half = heads(groups, dtype=dtype)
    single = tuple(leaf.detach().float().requires_grad_() for leaf in half)
    output, exact = attend_to(*half, Layout(groups), True), attend_to(*single, Layout(groups), True)
    assert output.dtype == dtype
    assert torch.equal(output, exact.to(dtype))
    for one, other in zip(gradients(output, half), gradients(exact, single), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize("groups", [LAYOUTS[1], LAYOUTS[4]], ids=str)
def test_autocast_on_a_cpu_does_not_undo_that(groups: tuple[Group, ...]) -> None:
    """torch would round attention's inputs again, with a prefix or without; here they stay float32, as above."""
    q, k, v = heads(groups, dtype=torch.float32)
    expected = attend_to(q, k, v.bfloat16(), Layout(groups), True)  # as rotary positions leave them under autocast
    with torch.autocast("cpu", torch.bfloat16):
        output = attend_to(q, k, v.bfloat16(), Layout(groups), True)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


def test_a_shared_prefix_costs_no_precision() -> None:
    """In bfloat16, against float64 of the same numbers: two softmaxes, joined, are as good as the one of a mask."""
    groups = (Group(16, (40, 25, 60)),)
    q, k, v = (torch.randn(1, 4, len(tokens_of(groups)), 16).bfloat16() for _ in range(3))
    q = 4 * q
    mask = visible(groups, True)
    truth = masked(q.double(), k.double(), v.double(), mask, None)
    joined = attend(torch.nn.Module().eval(), q, k, v, None, is_causal=True, layout=Layout(groups))[0]
    errors = [(found.double() - truth).norm().item() for found in (joined, masked(q, k, v, mask, None))]
    assert 0 < errors[0] < 1.3 * errors[1]


def test_dropout_is_applied_text_by_text() -> None:
    """Where attention drops out there is no joining of a prefix, and `can_share_prefix` says so beforehand."""
    groups = (Group(0, (5, 5)),)
    q, k, v = heads(groups)
    assert can_share_prefix(CPU, torch.float64, 0.0, 5) and not can_share_prefix(CPU, torch.float64, 0.1, 5)
    outputs = [
        attend(torch.nn.Module(), q, k, v, None, dropout, None, True, Layout(groups))[0] for dropout in (0.0, 0.5, 0.5)
    ]
    assert all((outputs[i] - outputs[j]).abs().max() > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_without_a_layout_it_refuses() -> None:
    """A decoder that does not hand it on would otherwise let texts see one another."""
    q, k, v = heads(LAYOUTS[0])
    with pytest.raises(UserError, match="hands no arguments on to its attention"):
        attend(torch.nn.Module(), q, k, v, None)


# --- the variable-length kernel ---


def slow_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's kernel computes, by its documentation: a causal mask is aligned to the end of queries and keys.

    It refuses what the kernel refuses (FlashAttention's `mha_varlen_fwd`, and torch's wrapper); dtypes aside, as the
    tests compare in float64.
    """
    assert query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0), "heads"
    assert query.dtype == key.dtype == value.dtype, "one dtype"
    for tensor in (query, key, value):
        assert tensor.dim() == 3 and tensor.stride(-1) == 1, "numbers of a head lie together"
        assert tensor.shape[-1] % 8 == 0 and tensor.shape[-1] <= 256, "head size"
    for ends, longest, tensor in ((cu_seq_q, max_q, query), (cu_seq_k, max_k, key)):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.device == tensor.device, "ends"
        assert ends[0] == 0 and ends[-1] == len(tensor) and type(longest) is int, "ends"
        assert ends.diff().min() > 0 and ends.diff().max() == longest, "the longest"
    assert len(cu_seq_q) == len(cu_seq_k) and key.shape == value.shape
    assert window_size in ((-1, 0), (-1, -1))
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q, k, v = (
            tensor[ends[i] : ends[i + 1]].transpose(0, 1)
            for tensor, ends in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
        )
        k, v = (tensor.repeat_interleave(len(q) // len(k), dim=0) for tensor in (k, v))
        num_queries, num_keys = q.shape[1], k.shape[1]
        scores = q @ k.transpose(1, 2) * (scale if scale is not None else q.shape[-1] ** -0.5)
        if window_size[1] == 0:
            behind = torch.ones_like(scores[0], dtype=torch.bool).triu(num_keys - num_queries + 1)
            scores = scores.masked_fill(behind, -torch.inf)
        outputs.append((scores.softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def varlen_without_groups(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """torch 2.11's parameters."""
    return slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.fixture(params=[slow_varlen, varlen_without_groups], ids=["2.13", "2.11"])
def varlen_calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The CUDA branch on any device, with a slow kernel; a list that grows with each call of it."""
    calls: list[int] = []

    @functools.wraps(request.param)
    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        made: Tensor = request.param(*args, **kwargs)
        return made

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    monkeypatch.setattr(packed_attention, "_runs_varlen", lambda *_: True)
    packed_attention.varlen_takes.cache_clear()
    yield calls
    packed_attention.varlen_takes.cache_clear()


@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
@pytest.mark.parametrize("closing_only", [False, True], ids=["all", "closing"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped", "equal"])
def test_keys_and_lengths_for_the_variable_length_kernel(
    groups: tuple[Group, ...], closing_only: bool, causal: bool, kv_heads: int, varlen_calls: list[int]
) -> None:
    """Gathered keys, cumulative lengths and the window say the same as the mask, in value and gradient."""
    q, k, v = leaves = heads(groups, kv_heads)
    rows = closing_of(groups) if closing_only else list(range(q.shape[2]))
    expected = masked(q[:, :, rows], k, v, visible(groups, causal)[rows], 0.3)
    actual = attend_to(q[:, :, rows], k, v, Layout(groups, closing_only), causal, 0.3)
    assert varlen_calls == [1]
    assert_same(actual, expected, leaves, 1e-12)


# --- kernels of the hub ---


def flash_attn2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    """FlashAttention 2's parameters, and what it refuses (`slow_varlen`)."""
    assert (dropout_p, window_size, softcap, alibi_slopes, block_table) == (0.0, (-1, -1), 0.0, None, None)
    ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    window = (-1, 0 if causal else -1)
    return slow_varlen(q, k, v, *ends, scale=softmax_scale, window_size=window, enable_gqa=True)


def flash_attn3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: Any = None, seqused_k: Any = None, softmax_scale: float | None = None, causal: bool = False,
    qv: Any = None, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, num_splits: int = 1,
    deterministic: bool = False, sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashAttention 3's: no dropout, and the log-sum-exp beside the output."""
    ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn2(q, k, v, *ends, 0.0, softmax_scale, causal, window_size), torch.zeros(1)


def flash_attn4(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    seqused_q: Any = None, seqused_k: Any = None, page_table: Any = None, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int | None, int | None] = (None, None), learnable_sink: Any = None,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashAttention 4's: it finds the longest text itself, as its first versions did."""
    assert cu_seqlens_q is not None and cu_seqlens_k is not None and window_size == (None, None)
    longest = (int(ends.diff().max()) for ends in (cu_seqlens_q, cu_seqlens_k))
    return flash_attn2(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, 0.0, softmax_scale, causal), torch.zeros(1)


KERNELS = {f"kernels-community/flash-attn{2 + i}": f for i, f in enumerate((flash_attn2, flash_attn3, flash_attn4))}


def offer(monkeypatch: pytest.MonkeyPatch, get: Callable[..., Any]) -> None:
    """A machine with a GPU and the package `kernels`, which gets them by this function; transformers knows none yet."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels of the hub on any device, slow ones; which of them were called."""
    calls: list[str] = []

    def get(name: str, **how: Any) -> Any:
        assert how.get("allow_all_kernels") is False

        @functools.wraps(KERNELS[name])
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return KERNELS[name](*args, **kwargs)

        return SimpleNamespace(flash_attn_varlen_func=counted, flash_attn_func=None)

    offer(monkeypatch, get)
    monkeypatch.setattr(packed_attention, "_runs_varlen", lambda *_: True)
    return calls


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
@pytest.mark.parametrize("closing_only", [False, True], ids=["all", "closing"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped", "equal"])
def test_a_kernel_of_the_hub_equals_an_explicit_mask(
    name: str, groups: tuple[Group, ...], closing_only: bool, causal: bool, kv_heads: int, kernel_calls: list[str]
) -> None:
    """By transformers' own way to it, in value and gradient; each has other parameters and gives other things back."""
    q, k, v = leaves = heads(groups, kv_heads)
    rows = closing_of(groups) if closing_only else list(range(q.shape[2]))
    expected = masked(q[:, :, rows], k, v, visible(groups, causal)[rows], 0.3)
    actual = attend_to(q[:, :, rows], k, v, Layout(groups, closing_only, name), causal, 0.3)
    assert kernel_calls == [name]
    assert_same(actual, expected, leaves, 1e-12)


def test_each_kernel_that_can_be_asked_for_is_tried_here() -> None:
    assert set(KERNELS) == set(HUB_KERNELS)


def test_a_kernel_is_loaded_and_said(kernel_calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "llm2vec"):
        assert available_attention("kernels-community/flash-attn3") == "kernels-community/flash-attn3"
    assert "attention   kernels-community/flash-attn3, code of the Hugging Face hub" in caplog.text


def out_of_reach(name: str, **how: Any) -> Any:
    """As the hub's client does where it may not ask and has no copy."""
    raise FileNotFoundError(f"{name} is not there, and outgoing traffic has been disabled")


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        (
            "evil/kernel",
            "",
            "attn_implementation is 'evil/kernel'; known kernels of the hub: kernels-c",
        ),
        ("kernels-community/flash-attn2", "torch.cuda.is_available", "flash-attn2 needs a CUDA device, and there is"),
        ("kernels-community/flash-attn2", "is_kernels_available", 'needs kernels: pip install "kernels>='),
        ("kernels-community/flash-attn2", "the hub", "flash-attn2 could not be loaded: .*outgoing traffic"),
        ("kernels-community/flash-attn2", "the function", "flash-attn2 could not be loaded: "),
    ],
    ids=lambda value: value or "name",
)
def test_a_kernel_that_cannot_be_had_is_a_sentence(
    name: str, missing: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never another attention in its place."""
    offer(monkeypatch, out_of_reach if missing == "the hub" else lambda *_, **__: SimpleNamespace())
    if missing == "torch.cuda.is_available":
        monkeypatch.setattr(missing, lambda: False)
    if missing == "is_kernels_available":
        monkeypatch.setattr(import_utils, missing, lambda: False)
    with pytest.raises(UserError, match=said):
        available_attention(name)


def rounded_as_flash(half: tuple[Tensor, ...], rows: list[int], mask: Tensor) -> list[Tensor]:
    """Output, and `gradients` of it, in float32 but for what FlashAttention rounds: shares, their gradient, results."""
    times = half[0].shape[1] // half[1].shape[1]
    query, key, value = (leaf.detach().float() for leaf in half)
    q, k, v = query[:, :, rows], key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scale = q.shape[-1] ** -0.5
    share = (q @ k.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    output = (share.bfloat16().float() @ v).bfloat16()
    into = weights_of(output.transpose(1, 2)).bfloat16().float().transpose(1, 2)
    into_share = into @ v.mT
    delta = (into * output.float()).sum(-1, keepdim=True)
    into_scores = (share * (into_share - delta)).bfloat16().float() * scale
    into_query = torch.zeros_like(query).index_add(2, torch.tensor(rows, device=q.device), into_scores @ k)
    of_heads = (into_scores.mT @ q, share.bfloat16().float().mT @ into)
    into_key, into_value = (made.unflatten(1, (-1, times)).sum(2).bfloat16() for made in of_heads)
    return [output.transpose(1, 2), into_query.bfloat16(), into_key, into_value]


@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
def test_the_roundings_stand_around_the_truth(groups: tuple[Group, ...]) -> None:
    """What the real kernel is measured by, on a GPU, is itself near, and not exact."""
    half = tuple(leaf.detach().bfloat16().requires_grad_() for leaf in heads(groups))
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in half)
    mask, rows = visible(groups, True), list(range(half[0].shape[2]))
    truth = masked(*exact, mask, None)
    for right, one in zip([truth, *gradients(truth, exact)], rounded_as_flash(half, rows, mask), strict=True):
        assert 1e-5 < (one.double() - right).norm() / right.norm() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [*LAYOUTS, (Group(37, (100, 1, 300)), Group(0, (64, 129)))], ids=str)
@pytest.mark.parametrize("closing_only", [False, True], ids=["all", "closing"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_the_real_kernel_equals_an_explicit_mask(groups: tuple[Group, ...], closing_only: bool, causal: bool) -> None:
    """bfloat16 on a CUDA device against float64 of the same numbers: no further off than its roundings make it."""
    half = tuple(leaf.detach().repeat(1, 1, 1, 8).bfloat16().cuda().requires_grad_() for leaf in heads(groups))
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in half)
    assert packed_attention._runs_varlen(half[0].device, torch.bfloat16, half[0].shape[-1])
    rows = closing_of(groups) if closing_only else list(range(half[0].shape[2]))
    mask = visible(groups, causal).cuda()[rows]
    truth = masked(exact[0][:, :, rows], *exact[1:], mask, None)
    packed = attend_to(half[0][:, :, rows], *half[1:], Layout(groups, closing_only), causal)
    assert packed.dtype == torch.bfloat16
    of_truth, of_packed = ([output, *gradients(output, leaves)] for output, leaves in ((truth, exact), (packed, half)))
    for right, one, other in zip(of_truth, of_packed, rounded_as_flash(half, rows, mask), strict=True):
        scale = right.norm()
        assert (one.double() - right).norm() <= 2 * (other.double() - right).norm() + 2e-3 * scale
        assert (one.double() - right).norm() < 0.03 * scale


@pytest.mark.gpu
def test_a_prefix_is_shared_on_a_gpu_in_half_precision_alone() -> None:
    cuda = torch.device("cuda")
    assert can_share_prefix(cuda, torch.bfloat16, 0.0, 64) and can_share_prefix(cuda, torch.float16, 0.0, 64)
    assert not can_share_prefix(cuda, torch.float32, 0.0, 64) and not can_share_prefix(cuda, torch.bfloat16, 0.1, 64)
    with torch.autocast("cuda", torch.bfloat16):
        assert can_share_prefix(cuda, torch.float32, 0.0, 64)


@pytest.mark.parametrize(("head_size", "fits"), [(8, True), (80, True), (256, True), (12, False), (264, False)])
def test_heads_that_the_kernel_does_not_take_go_text_by_text(head_size: int, fits: bool) -> None:
    """It would raise where it is called."""
    assert can_share_prefix(torch.device("cuda"), torch.bfloat16, 0.0, head_size) is fits


def varlen_of_torch_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    """Its parameters; it always scales by the root of the head's size."""
    raise NotImplementedError


@pytest.mark.parametrize(
    ("where", "replacement"),
    [("importlib.util.find_spec", lambda name: None), ("torch.nn.attention.varlen.varlen_attn", varlen_of_torch_2_10)],
    ids=["none", "2.10"],
)
def test_a_torch_without_the_kernel_is_said_once(
    where: str, replacement: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then half precision on a GPU goes text by text, and shares no prefix."""

    def forget() -> None:
        packed_attention._varlen_is_there.cache_clear()
        packed_attention.varlen_takes.cache_clear()

    forget()
    with monkeypatch.context() as patch:
        patch.setattr(where, replacement)
        for _ in range(2):
            assert not can_share_prefix(torch.device("cuda"), torch.bfloat16, 0.0, 64)
    forget()
    assert len(caplog.records) == 1
    assert f"torch {torch.__version__} has no varlen_attn with a scale (2.11 has)" in caplog.records[0].getMessage()
    assert can_share_prefix(torch.device("cuda"), torch.bfloat16, 0.0, 64)
