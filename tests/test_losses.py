"""Both losses against the slow, obvious formula: Python's own floats in loops, one term at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llm2vec.losses import info_nce_sum, similarity, vocabulary_cross_entropy_sum


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


@pytest.mark.parametrize("scale", [1.0, 20.0, 50.0])
@pytest.mark.parametrize("labels", [[0, 1, 2], [3, 4, 5], [6, 0, 6]])
def test_info_nce_equals_the_loop(scale: float, labels: list[int]) -> None:
    """Paper Eq. 6 over 3 queries and a pool of 7 documents, wherever in the pool the positives stand."""
    query_BD, document_ND = random_vectors(3, 5), random_vectors(7, 5)
    expected = math.fsum(
        loop_minus_log_softmax([scale * cosine for cosine in row], label)
        for row, label in zip(loop_cosine(query_BD, document_ND), labels, strict=True)
    )
    loss = info_nce_sum(similarity(query_BD, document_ND), torch.tensor(labels), scale)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_temperature_005_is_scale_20() -> None:
    """The paper's temperature of 0.05 divides what the scale of 20 multiplies."""
    score_BN = random_vectors(4, 9)
    label_B = torch.tensor([0, 3, 8, 1])
    expected = torch.nn.functional.nll_loss((score_BN / 0.05).log_softmax(dim=1), label_B, reduction="sum")
    torch.testing.assert_close(info_nce_sum(score_BN, label_B, 20.0), expected, rtol=1e-12, atol=0.0)


def test_vocabulary_cross_entropy_equals_the_loop() -> None:
    """Paper Eq. 3 and 4: the sum over target tokens of -log p, not their mean."""
    logits_NV = random_vectors(6, 11) * 3
    targets = [0, 10, 4, 4, 7, 1]
    expected = math.fsum(
        loop_minus_log_softmax(row, target) for row, target in zip(logits_NV.tolist(), targets, strict=True)
    )
    loss = vocabulary_cross_entropy_sum(logits_NV, torch.tensor(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_similarity_equals_the_loop_and_ignores_length() -> None:
    query_BD, document_ND = random_vectors(4, 6), random_vectors(3, 6)
    expected_BN = torch.tensor(loop_cosine(query_BD, document_ND), dtype=torch.float64)
    torch.testing.assert_close(similarity(query_BD, document_ND), expected_BN, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(similarity(query_BD * 1e4, document_ND * 1e-4), expected_BN, rtol=1e-12, atol=1e-15)


def test_similarity_of_a_zero_vector_is_zero() -> None:
    """Not NaN, which would spread to every weight in one step."""
    assert torch.equal(similarity(torch.zeros(1, 4), torch.randn(2, 4)), torch.zeros(1, 2))


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """Sums over micro-batches, divided once, are the mean over the step."""
    score_BN, label_B = random_vectors(6, 8), torch.tensor([0, 1, 2, 3, 4, 5])
    logits_NV, target_N = random_vectors(6, 9), torch.tensor([8, 0, 3, 3, 1, 2])
    nce = [info_nce_sum(score_BN[part], label_B[part], 20.0) for part in (slice(0, 1), slice(1, 6))]
    ce = [vocabulary_cross_entropy_sum(logits_NV[part], target_N[part]) for part in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(sum(nce), info_nce_sum(score_BN, label_B, 20.0), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(sum(ce), vocabulary_cross_entropy_sum(logits_NV, target_N), rtol=1e-12, atol=0.0)


def test_gradients_equal_finite_differences() -> None:
    """Of both losses and of the cosine, in float64."""
    query_BD, document_ND = random_vectors(3, 4).requires_grad_(), random_vectors(5, 4).requires_grad_()
    logits_NV = random_vectors(4, 6).requires_grad_()
    label_B, target_N = torch.tensor([4, 0, 2]), torch.tensor([5, 0, 0, 3])
    assert torch.autograd.gradcheck(lambda q, d: info_nce_sum(similarity(q, d), label_B, 20.0), (query_BD, document_ND))
    assert torch.autograd.gradcheck(lambda x: vocabulary_cross_entropy_sum(x, target_N), (logits_NV,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_promoted(dtype: torch.dtype) -> None:
    """Half-precision vectors and logits give what their float32 copies give, to the bit, and the gradient returns."""
    query_BD = torch.randn(3, 8).to(dtype).requires_grad_()
    document_ND = torch.randn(5, 8).to(dtype)
    logits_NV = (torch.randn(4, 33) * 30).to(dtype).requires_grad_()
    label_B, target_N = torch.tensor([0, 1, 2]), torch.tensor([32, 0, 5, 5])
    score_BN = similarity(query_BD, document_ND)
    loss = vocabulary_cross_entropy_sum(logits_NV, target_N)
    assert score_BN.dtype == loss.dtype == torch.float32
    assert torch.equal(score_BN, similarity(query_BD.float(), document_ND.float()))
    assert torch.equal(loss, vocabulary_cross_entropy_sum(logits_NV.float(), target_N))
    (info_nce_sum(score_BN, label_B, 20.0) + loss).backward()
    for leaf in (query_BD, logits_NV):
        assert leaf.grad is not None and leaf.grad.dtype == dtype and leaf.grad.abs().sum() > 0


def test_float64_is_not_demoted() -> None:
    """Proofs of equality run in float64 through the same lines."""
    assert similarity(random_vectors(2, 3), random_vectors(2, 3)).dtype == torch.float64
    assert vocabulary_cross_entropy_sum(random_vectors(2, 3), torch.tensor([0, 1])).dtype == torch.float64


def test_large_logits_do_not_overflow() -> None:
    """A certain wrong answer costs its margin, a certain right one nothing."""
    logits_NV = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]])
    assert vocabulary_cross_entropy_sum(logits_NV, torch.tensor([1, 0])).item() == 1000.0
    assert info_nce_sum(torch.tensor([[1.0, -1.0]]), torch.tensor([1]), 500.0).item() == 1000.0
