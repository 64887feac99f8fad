"""Pooling against values worked out by hand, for every mode and both sides of padding."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from llm2vec.model.pooling import pool, pool_packed
from llm2vec.types import PoolingMode

NAN = float("nan")
MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)

#: Rows of two-dimensional states and their pool mask; the unmarked ones inside a row are a header or an instruction.
ROWS: list[tuple[list[tuple[float, float]], list[int]]] = [
    ([(9.0, -9.0), (1.0, 10.0), (9.0, -9.0), (2.0, 20.0), (6.0, 60.0)], [0, 1, 0, 1, 1]),
    ([(5.0, -3.0)], [1]),
    ([(4.0, 0.0), (8.0, 16.0), (7.0, 7.0)], [1, 1, 0]),
]

#: By hand, for the three rows. Weighted: (1*1 + 2*2 + 3*6) / 6; 5; (1*4 + 2*8) / 3. Likewise the second dimension.
EXPECTED: dict[PoolingMode, list[list[float]]] = {
    "last": [[6.0, 60.0], [5.0, -3.0], [8.0, 16.0]],
    "first": [[1.0, 10.0], [5.0, -3.0], [4.0, 0.0]],
    "mean": [[3.0, 30.0], [5.0, -3.0], [6.0, 8.0]],
    "weighted_mean": [[23 / 6, 230 / 6], [5.0, -3.0], [20 / 3, 32 / 3]],
}


def padded(side: str, fill: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """ROWS as hidden states [3, 6, 2] and mask [3, 6], with `fill` in the padding, which even the longest row has."""
    length = 6
    hidden_BTD = torch.full((len(ROWS), length, 2), fill, dtype=dtype)
    mask_BT = torch.zeros(len(ROWS), length, dtype=torch.bool)
    for i, (states, marked) in enumerate(ROWS):
        span = slice(0, len(states)) if side == "right" else slice(length - len(states), length)
        hidden_BTD[i, span] = torch.tensor(states, dtype=dtype)
        mask_BT[i, span] = torch.tensor(marked, dtype=torch.bool)
    return hidden_BTD, mask_BT


@pytest.mark.parametrize("fill", [0.0, 1e30, NAN, float("inf")])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_values_by_hand(mode: PoolingMode, side: str, fill: float) -> None:
    """The marked positions alone decide the vector: neither where padding stands nor what it holds, NaN included."""
    hidden_BTD, mask_BT = padded(side, fill)
    torch.testing.assert_close(
        pool(hidden_BTD, mask_BT, mode), torch.tensor(EXPECTED[mode], dtype=torch.float64), rtol=1e-15, atol=0.0
    )


@pytest.mark.parametrize("mode", MODES)
def test_integer_mask_means_the_same(mode: PoolingMode) -> None:
    """A mask of 0 and 1 (an attention mask) pools as the boolean one does."""
    hidden_BTD, mask_BT = padded("right", 0.0)
    assert torch.equal(pool(hidden_BTD, mask_BT.long(), mode), pool(hidden_BTD, mask_BT, mode))


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_left_alone(mode: PoolingMode) -> None:
    """Neither states nor mask are changed in place."""
    hidden_BTD, mask_BT = padded("left", 3.0)
    hidden_before, mask_before = hidden_BTD.clone(), mask_BT.clone()
    pool(hidden_BTD, mask_BT, mode)
    assert torch.equal(hidden_BTD, hidden_before)
    assert torch.equal(mask_BT, mask_before)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_reaches_unmarked_positions(mode: PoolingMode, side: str) -> None:
    """The gradient is exactly zero there, even where padding holds NaN, and non-zero somewhere in every row."""
    hidden_BTD, mask_BT = padded(side, NAN)
    hidden_BTD.requires_grad_()
    pool(hidden_BTD, mask_BT, mode).sum().backward()
    assert hidden_BTD.grad is not None
    assert torch.equal(hidden_BTD.grad[~mask_BT], torch.zeros_like(hidden_BTD.grad[~mask_BT]))
    assert hidden_BTD.grad.abs().sum(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_mean_is_the_float32_mean_rounded(dtype: torch.dtype) -> None:
    """512 states with an exact float32 mean: a sum in half precision would lose its digits or overflow."""
    generator = torch.Generator().manual_seed(0)
    # Multiples of 4 up to 1020 have 8 significant bits, so both dtypes hold them, and float32 holds their sum.
    hidden_BTD = (torch.randint(0, 256, (2, 512, 8), generator=generator) * 4).to(dtype)
    mask_BT = torch.ones(2, 512, dtype=torch.bool)
    exact_BD = hidden_BTD.double().sum(dim=1) / 512
    pooled_BD = pool(hidden_BTD, mask_BT, "mean")
    assert pooled_BD.dtype == dtype
    assert torch.equal(pooled_BD, exact_BD.float().to(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept(mode: PoolingMode, dtype: torch.dtype) -> None:
    """The vector has the dtype of the states, and half precision is computed as float32 would be."""
    hidden_BTD, mask_BT = padded("right", NAN, dtype)
    pooled_BD = pool(hidden_BTD, mask_BT, mode)
    assert pooled_BD.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(pooled_BD, pool(hidden_BTD.to(wide), mask_BT, mode).to(dtype))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_does_not_depend_on_its_batch(mode: PoolingMode) -> None:
    """Each row alone gives the vector it has among others."""
    hidden_BTD, mask_BT = padded("right", 0.0)
    alone = [pool(hidden_BTD[i : i + 1], mask_BT[i : i + 1], mode)[0] for i in range(len(ROWS))]
    torch.testing.assert_close(torch.stack(alone), pool(hidden_BTD, mask_BT, mode), rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_pool_to_the_values_by_hand(mode: PoolingMode) -> None:
    """Row after row, without padding; and the gradient reaches the marked positions alone."""
    states = [state for states, _ in ROWS for state in states]
    mask_N = torch.tensor([mark for _, marks in ROWS for mark in marks], dtype=torch.bool)
    states_ND = torch.tensor(states, dtype=torch.float64, requires_grad=True)
    lengths = [len(states) for states, _ in ROWS]
    pooled = pool_packed(states_ND, lengths, mask_N, mode)
    torch.testing.assert_close(pooled, torch.tensor(EXPECTED[mode], dtype=torch.float64), rtol=1e-15, atol=0.0)
    pooled.sum().backward()
    assert states_ND.grad is not None
    reached = states_ND.grad.any(dim=1)
    assert not reached[~mask_N].any()
    assert int(reached.sum()) == (len(ROWS) if mode in ("last", "first") else int(mask_N.sum()))


def test_packed_lengths_decide_whose_state_is_whose() -> None:
    """Cut elsewhere, the same states pool to other vectors."""
    states_ND = torch.arange(6.0).reshape(6, 1)
    marked_N = torch.ones(6, dtype=torch.bool)
    assert pool_packed(states_ND, [2, 1, 3], marked_N, "last").tolist() == [[1.0], [2.0], [5.0]]
    assert pool_packed(states_ND, [3, 1, 2], marked_N, "last").tolist() == [[2.0], [3.0], [5.0]]
