"""Both losses against the slow, obvious formula, and the product they are taken of, which is never held at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm2vec.objectives.losses import BLOCK_ENTRIES, CrossEntropy, info_nce, linear_cross_entropy, unit


def loop_cosine(query_BD: Tensor, document_ND: Tensor) -> list[list[float]]:
    """Cosine of every query with every document, by the definition."""
    table = []
    for q in query_BD.tolist():
        norm_q = math.sqrt(math.fsum(x * x for x in q))
        table.append(
            [
                math.fsum(x * y for x, y in zip(q, d, strict=True)) / norm_q / math.sqrt(math.fsum(y * y for y in d))
                for d in document_ND.tolist()
            ]
        )
    return table


def loop_minus_log_softmax(scores: list[float], label: int) -> float:
    """-log(exp(s_label) / sum exp(s))."""
    return -math.log(math.exp(scores[label]) / math.fsum(math.exp(s) for s in scores))


def random_vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Problem(NamedTuple):
    """States, projection, targets and term weights, all different from one another."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    term_weight_N: Tensor


def problem(rows: int = 13, columns: int = 29, width: int = 6, dtype: torch.dtype = torch.float64) -> Problem:
    """A random problem whose leaves want a gradient; targets repeat, and the softmax is far from flat."""
    generator = torch.Generator().manual_seed(rows + columns)
    hidden_ND = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(columns, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target_N = torch.randint(columns, (rows,), generator=generator)
    return Problem(hidden_ND, weight_VD, target_N, torch.rand(rows, generator=generator, dtype=torch.float64) / rows)


def plain(p: Problem) -> Tensor:
    """The formula with all logits at once, the softmax in float32 at least."""
    logits_NV = p.hidden_ND @ p.weight_VD.T
    exact = torch.promote_types(logits_NV.dtype, torch.float32)
    terms_N = F.cross_entropy(logits_NV.to(exact), p.target_N, reduction="none")
    return (terms_N * p.term_weight_N).sum()


def gradients(p: Problem, loss: Callable[[Problem], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Value, and gradients with respect to states and projection, of three times the loss."""
    value = loss(p)
    (3 * value).backward()
    assert p.hidden_ND.grad is not None and p.weight_VD.grad is not None
    into = p.hidden_ND.grad.clone(), p.weight_VD.grad.clone()
    p.hidden_ND.grad = p.weight_VD.grad = None
    return value.detach(), *into


@pytest.mark.parametrize("block_rows", [1, 5, 13, None])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("biased", [False, True])
def test_bias_and_softcap_equal_the_plain_formula(biased: bool, softcap: float | None, block_rows: int | None) -> None:
    """Value, terms, hits and all gradients, also where no gradient of the bias is asked for."""
    p = problem()
    bias_V = torch.randn(29, dtype=torch.float64, requires_grad=biased)
    leaves = [p.hidden_ND, p.weight_VD, *[bias_V] * biased]

    logits_NV = p.hidden_ND @ p.weight_VD.T + bias_V
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    terms_N = F.cross_entropy(logits_NV, p.target_N, reduction="none")
    expected = torch.autograd.grad(3 * (terms_N * p.term_weight_N).sum(), leaves)
    found = linear_cross_entropy(*p, block_rows=block_rows, bias_V=bias_V, softcap=softcap)
    torch.testing.assert_close(found.terms, terms_N.detach(), rtol=1e-11, atol=0)
    assert found.hits.tolist() == (logits_NV.argmax(dim=1) == p.target_N).tolist()
    for actual, wanted in zip(torch.autograd.grad(3 * found.loss, leaves), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-15)


def test_bias_and_softcap_in_half_precision_are_near() -> None:
    """Softmax, bend and the bias's gradient are taken in float32; the bias's gradient has the bias's dtype."""
    p = problem()
    bias_V = torch.randn(29, dtype=torch.float64)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [t.detach().to(torch.bfloat16).to(dtype).requires_grad_() for t in (*p[:2], bias_V)]
        found = linear_cross_entropy(
            *leaves[:2], p.target_N, p.term_weight_N.to(leaves[0]), bias_V=leaves[2], softcap=2.0
        )
        results.append((found.loss, *torch.autograd.grad(found.loss, leaves)))
    assert [t.dtype for t in results[1]] == [torch.float32, *[torch.bfloat16] * 3]
    for exact, half in zip(*results, strict=True):
        assert (exact - half).abs().max() < 0.02 * exact.abs().max()


def blocked(block_rows: int | None) -> Callable[[Problem], Tensor]:
    return lambda p: linear_cross_entropy(*p, block_rows=block_rows).loss


# --- the formula ---


@pytest.mark.parametrize("scale", [1.0, 20.0, 50.0])
@pytest.mark.parametrize("labels", [[0, 1, 2], [3, 4, 5], [6, 0, 6]])
def test_info_nce_equals_the_loop(scale: float, labels: list[int]) -> None:
    """Paper Eq. 6 over 3 queries and a pool of 7 documents, wherever in the pool the positives stand."""
    query_BD, document_ND = random_vectors(3, 5), random_vectors(7, 5)
    weights = [0.5, 0.25, 2.0]
    cosines = loop_cosine(query_BD, document_ND)
    terms = [loop_minus_log_softmax([scale * c for c in row], i) for row, i in zip(cosines, labels, strict=True)]
    loss, terms_B, hits_B = info_nce(
        unit(query_BD), unit(document_ND), torch.tensor(labels), scale, torch.tensor(weights)
    )
    assert loss.item() == pytest.approx(math.fsum(t * w for t, w in zip(terms, weights, strict=True)), rel=1e-12)
    assert terms_B.tolist() == pytest.approx(terms, rel=1e-12)
    assert hits_B.tolist() == [max(row) == row[i] for row, i in zip(cosines, labels, strict=True)]


def test_temperature_005_is_scale_20() -> None:
    """The paper's temperature of 0.05 divides what the scale of 20 multiplies."""
    query_BD, document_ND = unit(random_vectors(4, 6)), unit(random_vectors(9, 6))
    label_B = torch.tensor([0, 3, 8, 1])
    expected = F.nll_loss((query_BD @ document_ND.T / 0.05).log_softmax(dim=1), label_B, reduction="sum")
    loss = info_nce(query_BD, document_ND, label_B, 20.0, torch.ones(4)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)


def test_linear_cross_entropy_equals_the_loop() -> None:
    """Paper Eq. 3 and 4: the weighted sum over target tokens of -log p, each term, and whether it is the largest."""
    p = problem(rows=6, columns=11)
    logits = (p.hidden_ND @ p.weight_VD.T).tolist()
    terms = [loop_minus_log_softmax(row, target) for row, target in zip(logits, p.target_N.tolist(), strict=True)]
    loss, terms_N, hits_N = linear_cross_entropy(*p)
    assert loss.item() == pytest.approx(math.fsum(t * w for t, w in zip(terms, p.term_weight_N.tolist(), strict=True)))
    assert terms_N.tolist() == pytest.approx(terms, rel=1e-12)
    assert hits_N.tolist() == [max(r) == r[t] for r, t in zip(logits, p.target_N.tolist(), strict=True)]
    assert loss.requires_grad and not terms_N.requires_grad and not hits_N.requires_grad


@pytest.mark.parametrize("block_rows", [1, 2, 5, 12, 13, 14, None])
@pytest.mark.parametrize(("rows", "columns"), [(13, 29), (1, 29), (13, 1), (1, 1)])
def test_blocks_do_not_matter(rows: int, columns: int, block_rows: int | None) -> None:
    """Value and both gradients are those of the plain formula, however many rows are done at once; also one row."""
    p = problem(rows, columns)
    for actual, expected in zip(gradients(p, blocked(block_rows)), gradients(p, plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-15)
        assert columns == 1 or expected.abs().max() > 1e-3


def test_gradients_equal_finite_differences() -> None:
    """Of both losses, in float64, entry by entry and with respect to either side of the product."""
    p = problem(rows=4, columns=6, width=3)
    label_B = torch.tensor([4, 0, 2, 1])
    losses: list[Callable[[Problem], Tensor]] = [
        blocked(3),
        lambda p: info_nce(unit(p.hidden_ND), unit(p.weight_VD), label_B, 20.0, p.term_weight_N).loss,
    ]
    for loss in losses:
        _, *analytical = gradients(p, loss)
        for leaf, gradient in zip((p.hidden_ND, p.weight_VD), analytical, strict=True):
            numerical = torch.zeros_like(gradient)
            for i in range(leaf.numel()):
                values = []
                for step in (1e-6, -1e-6):
                    with torch.no_grad():
                        leaf.view(-1)[i] += step
                        values.append(float(loss(p)))
                        leaf.view(-1)[i] -= step
                numerical.view(-1)[i] = 3 * (values[0] - values[1]) / 2e-6
            torch.testing.assert_close(gradient, numerical, rtol=1e-6, atol=1e-8)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """Weights of one over the whole step's terms: sums over micro-batches are the mean over the step."""
    p = problem(rows=6)
    cut = [linear_cross_entropy(p.hidden_ND[s], p.weight_VD, *(t[s] for t in p[2:])) for s in (slice(4), slice(4, 6))]
    whole = linear_cross_entropy(*p)
    torch.testing.assert_close(cut[0].loss + cut[1].loss, whole.loss, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(torch.cat([cut[0].terms, cut[1].terms]), whole.terms, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("side", ["hidden", "weight"])
def test_a_side_that_wants_no_gradient_gets_none(side: str) -> None:
    """Frozen states or a frozen projection: the other side's gradient is the same as ever."""
    p = problem()
    _, into_hidden, into_weight = gradients(p, plain)
    frozen, trained, expected = (p.hidden_ND, p.weight_VD, into_weight)
    if side == "weight":
        frozen, trained, expected = (p.weight_VD, p.hidden_ND, into_hidden)
    frozen.requires_grad_(False)
    (3 * linear_cross_entropy(*p).loss).backward()
    torch.testing.assert_close(trained.grad, expected, rtol=1e-11, atol=1e-15)
    assert frozen.grad is None


def test_without_gradient_the_value_is_the_same() -> None:
    p = problem()
    with torch.no_grad():
        value = linear_cross_entropy(*p, block_rows=4).loss
    assert not value.requires_grad
    torch.testing.assert_close(value, plain(p).detach(), rtol=1e-12, atol=0.0)


def test_a_weight_of_zero_takes_its_row_out() -> None:
    """Some weights zero: as if those rows were not there. All of them zero: no loss and no gradient, and no NaN."""
    p = problem(rows=6)
    some = p._replace(term_weight_N=p.term_weight_N * torch.tensor([1, 0, 1, 0, 0, 1]))
    kept = torch.tensor([0, 2, 5])
    loss, into_hidden, into_weight = gradients(some, blocked(4))
    expected = linear_cross_entropy(p.hidden_ND[kept], p.weight_VD, p.target_N[kept], p.term_weight_N[kept]).loss
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0.0)
    assert [bool(row.any()) for row in into_hidden] == [True, False, True, False, False, True]
    torch.testing.assert_close(into_weight, gradients(some, plain)[2], rtol=1e-11, atol=1e-15)
    none = p._replace(term_weight_N=torch.zeros(6, dtype=torch.float64))
    for value in gradients(none, blocked(4)):
        assert torch.equal(value, torch.zeros_like(value))


def test_the_loss_of_no_rows_is_zero_and_connected() -> None:
    p = problem(rows=6)
    none = p._replace(hidden_ND=p.hidden_ND[:0], target_N=p.target_N[:0], term_weight_N=p.term_weight_N[:0])
    loss, terms_N, hits_N = linear_cross_entropy(*none)
    assert loss == 0 and len(terms_N) == len(hits_N) == 0
    loss.backward()
    for leaf in (p.hidden_ND, p.weight_VD):
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_the_gradient_is_not_to_be_taken_twice() -> None:
    """It is made with the loss and used up; a second backward pass is refused rather than wrong."""
    p = problem()
    loss = linear_cross_entropy(*p).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_large_logits_do_not_overflow() -> None:
    """A certain wrong answer costs its margin, a certain right one nothing."""
    hidden_ND, weight_VD = torch.tensor([[1000.0], [1000.0]]), torch.tensor([[1.0], [0.0]])
    loss, terms_N, hits_N = linear_cross_entropy(hidden_ND, weight_VD, torch.tensor([1, 0]), torch.ones(2))
    assert (loss.item(), terms_N.tolist(), hits_N.tolist()) == (1000.0, [1000.0, 0.0], [False, True])
    against = info_nce(torch.ones(1, 1), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]), 500.0, torch.ones(1))
    assert against.loss.item() == 1000.0


# --- precision ---


def distance(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("block_rows", [7, 16, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_plain_path(dtype: torch.dtype, block_rows: int) -> None:
    """Against the truth of the same half-precision numbers in float64; dtypes come back as they went in."""
    p = problem(rows=200, columns=300, width=32, dtype=dtype)
    truth = gradients(_in(torch.float64, p), plain)
    ours, theirs = gradients(p, blocked(block_rows)), gradients(p, plain)
    assert [t.dtype for t in ours] == [torch.float64, dtype, dtype]
    for name, exact, own, other in zip(("value", "hidden", "weight"), truth, ours, theirs, strict=True):
        assert distance(own, exact) <= 1.05 * distance(other, exact) + 1e-6, name
        assert distance(other, exact) > 1e-6 or name == "value"  # the plain path does round
        assert distance(own, exact) < 0.02, name


def test_float16_gradients_of_a_large_step_do_not_vanish() -> None:
    """Weights of one over a million tokens lie below float16's range; the gradient with respect to float32 does not."""
    p = problem(rows=20, columns=30, width=8, dtype=torch.float32)
    small = p._replace(term_weight_N=torch.full((20,), 1e-9))
    _, _, truth = gradients(small, plain)
    half = linear_cross_entropy(small.hidden_ND.half(), *small[1:])
    (3 * half.loss).backward()
    assert p.weight_VD.grad is not None
    assert distance(p.weight_VD.grad, truth) < 0.01


@pytest.mark.parametrize("block_rows", [7, 64])
def test_under_autocast_the_product_is_in_half_precision_and_the_sums_are_not(block_rows: int) -> None:
    """float32 weights: their gradient is float32 and no worse than what autocast makes of the plain formula."""
    p = problem(rows=64, columns=96, width=32, dtype=torch.float32)
    truth = gradients(_in(torch.float64, p), plain)
    in_float32 = gradients(p, blocked(block_rows))

    def under_autocast(loss: Callable[[Problem], Tensor]) -> Callable[[Problem], Tensor]:
        def value(problem: Problem) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss(problem)

        return value

    ours, theirs = gradients(p, under_autocast(blocked(block_rows))), gradients(p, under_autocast(plain))
    assert ours[1].dtype == ours[2].dtype == torch.float32
    for exact, own, other, single in zip(truth, ours, theirs, in_float32, strict=True):
        assert distance(own, exact) <= 1.05 * distance(other, exact) + 1e-5
        assert distance(single, exact) < 1e-5
    assert distance(ours[1], truth[1]) > 1e-4  # so the product was in half precision


def _in(dtype: torch.dtype, p: Problem) -> Problem:
    return p._replace(
        hidden_ND=p.hidden_ND.detach().to(dtype).requires_grad_(),
        weight_VD=p.weight_VD.detach().to(dtype).requires_grad_(),
    )


def test_float64_is_not_demoted_and_half_precision_is_promoted() -> None:
    p = problem(rows=2)
    assert linear_cross_entropy(*p).loss.dtype == unit(p.hidden_ND).dtype == torch.float64
    half = p.hidden_ND.bfloat16()
    assert unit(half).dtype == torch.float32
    assert torch.equal(unit(half), unit(half.float()))
    assert linear_cross_entropy(half, *p[1:]).terms.dtype == torch.float32


# --- memory ---


class Largest(TorchDispatchMode):
    """Records the most entries of any tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


@pytest.mark.parametrize(("dtype", "blocks"), [(torch.float64, 1), (torch.float32, 1), (torch.bfloat16, 4)])
def test_no_tensor_is_larger_than_a_block_or_an_input(dtype: torch.dtype, blocks: int) -> None:
    """Forward and backward; half precision puts the gradients of four blocks together. The plain formula, watched in
    the same way, makes all the logits."""
    p = problem(rows=400, columns=300, width=5, dtype=dtype)
    with Largest() as ours:
        linear_cross_entropy(*p, block_rows=10).loss.backward()
    with Largest() as theirs:
        plain(p).backward()
    assert 10 * 300 <= ours.entries <= blocks * 10 * 300
    assert theirs.entries >= 400 * 300


def test_blocks_are_bounded_without_being_told() -> None:
    """A vocabulary of a real model's size: a block has some rows even so, and never many entries."""
    rows, columns = 3000, 100_000
    p = problem(rows=rows, columns=columns, width=1, dtype=torch.float32)
    with Largest() as largest, torch.no_grad():
        result: CrossEntropy = linear_cross_entropy(p.hidden_ND[:200], p.weight_VD, p.target_N[:200], torch.ones(200))
    assert len(result.terms) == 200
    assert 64 * columns <= largest.entries <= BLOCK_ENTRIES
    assert largest.entries < 200 * columns


# --- cosine ---


def test_products_of_unit_vectors_are_cosines_whatever_the_lengths() -> None:
    query_BD, document_ND = random_vectors(4, 6), random_vectors(3, 6)
    expected_BN = torch.tensor(loop_cosine(query_BD, document_ND), dtype=torch.float64)
    for longer, shorter in ((1.0, 1.0), (1e4, 1e-4)):
        actual_BN = unit(query_BD * longer) @ unit(document_ND * shorter).T
        torch.testing.assert_close(actual_BN, expected_BN, rtol=1e-12, atol=1e-15)


def test_a_zero_vector_has_no_direction() -> None:
    """Zeros, not NaN, which would spread to every weight in one step."""
    assert torch.equal(unit(torch.zeros(1, 4)), torch.zeros(1, 4))
