"""The losses of the method, as weighted sums: the weights hold the division by what the whole optimiser step holds.

They know vectors, labels and weights; no model, tokenizer or rank. The two large ones are cross-entropies over a
product with a large matrix (of the vocabulary, of the documents). Neither holds that product: it is made block by
block, and the gradient of a block with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Entries of a block of logits: 32 MiB in float32, about what a CPU's last cache holds. On a GPU a block is larger, to
#: keep the matrix units busy, and still a small part of memory.
BLOCK_ENTRIES = 2**23
BLOCK_ENTRIES_CUDA = 2**27


class CrossEntropy(NamedTuple):
    """A weighted sum of cross-entropies, and what it is made of."""

    loss: Tensor  #: the weighted sum, float32 at least; what is differentiated
    terms: Tensor  #: [N] each row's cross-entropy, without gradient
    hits: Tensor  #: [N] whether each row's largest logit is its target's, without gradient


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor | None,
    term_weight_N: Tensor,
    block_rows: int | None = None,
    adjust: Callable[[slice, Tensor], None] | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    teacher_ND: Tensor | None = None,
) -> CrossEntropy:
    """Sum over N of term_weight * -log softmax(hidden @ weight.T + bias)[target], without ever holding [N, V].

    With a teacher, what each row imitates is a distribution, p = softmax(teacher @ weight.T + bias), and its term is
    the divergence sum over V of p * (log p - log softmax(hidden @ weight.T + bias)), in two blocks for one.

    Memory is one block of logits and the gradients of `hidden` and `weight`, whatever N times V is. The gradients are
    made with the loss, so nothing is computed twice. The softmax runs in float32 at least, and the gradient of `weight`
    is summed over the blocks in that precision. Over no rows the sum is 0, and its gradients are zeros.

    Args:
        hidden_ND: states, in the dtype that the product shall be computed in. A row may hold several, [N, G * D], end
            to end: its softmax is then over the columns of the first, those of the second, ..., G * V.
        weight_VD: the vocabulary projection, or documents.
        target_N: column of each row's target; None beside a teacher.
        term_weight_N: weight of each row's term; no gradient flows to it.
        block_rows: rows a block; None = as many as make a block of moderate size.
        adjust: changes the logits of some rows, [rows, G * V], where they stand: -inf leaves a column out, never a
            row's target, and what is added is a constant to the gradient. None = they stay.
        bias_V: added to the product.
        softcap: bound that the logits x, bias included, are bent under, softcap * tanh(x / softcap); None = no bound.
        teacher_ND: the teacher's states; no gradient flows to them. None = there is no teacher.
    """
    # The products below that write into a given tensor do not heed autocast by themselves.
    if torch.is_autocast_enabled(hidden_ND.device.type):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(hidden_ND.device.type))
    if teacher_ND is not None:
        teacher_ND = teacher_ND.to(hidden_ND.dtype)
    if block_rows is None:
        states = hidden_ND.shape[1] // weight_VD.shape[1]
        block_rows = rows_of_a_block(states * len(weight_VD), hidden_ND.device.type)
    arguments = (hidden_ND, weight_VD, target_N, term_weight_N, block_rows, adjust, bias_V, softcap, teacher_ND)
    return CrossEntropy(*_LinearCrossEntropy.apply(*arguments))


def rows_of_a_block(num_columns: int, device: str) -> int:
    """How many rows of logits are made at a time on a `cuda` device, or another."""
    return max(64, (BLOCK_ENTRIES_CUDA if device == "cuda" else BLOCK_ENTRIES) // num_columns)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and its gradients, one block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor | None,
        term_weight_N: Tensor,
        block_rows: int,
        adjust: Callable[[slice, Tensor], None] | None,
        bias_V: Tensor | None,
        softcap: float | None,
        teacher_ND: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Products run in the states' dtype, which is fast; softmax and sums in `exact`, as half precision is coarse.
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        product_weight_VD, width = weight_VD.to(hidden_ND.dtype), weight_VD.shape[1]
        hidden_ND = hidden_ND.contiguous()  # so that a row's states can be seen as rows
        terms_N = hidden_ND.new_empty(len(hidden_ND), dtype=exact)
        hits_N = torch.empty(len(hidden_ND), dtype=torch.bool, device=hidden_ND.device)
        # Each row's gradient is final once its block is done; the weight's is a sum over all blocks, so it begins at 0.
        into_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        into_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if ctx.needs_input_grad[1] else None
        into_bias_V = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and ctx.needs_input_grad[6] else None
        # Weights of 1 / (tokens of a step) would leave half precision's range in the products below. So they are
        # divided by the largest of them here, and `backward` multiplies by it. The floor is for weights of 0, and for
        # no rows at all.
        largest_weight = F.pad(term_weight_N.to(exact).abs(), (0, 1), value=torch.finfo(exact).tiny).max()
        relative_N = term_weight_N.to(exact) / largest_weight
        # In half precision, adding to the float32 gradient of the weight costs as much as a product does, so several
        # blocks are added at once.
        at_once = block_rows if exact == hidden_ND.dtype else 4 * block_rows
        for start in range(0, len(hidden_ND), at_once):
            gradients = []
            for first in range(start, min(start + at_once, len(hidden_ND)), block_rows):
                rows = slice(first, min(first + block_rows, start + at_once, len(hidden_ND)))
                states = hidden_ND[rows].view(-1, width)
                logits, slope = _logits(states, product_weight_VD, bias_V, softcap, exact)
                logits = logits.view(rows.stop - rows.start, -1)
                if adjust is not None:
                    adjust(rows, logits)
                target = None if target_N is None else target_N[rows]
                taught = None
                if teacher_ND is not None:
                    taught = _logits(teacher_ND[rows], product_weight_VD, bias_V, softcap, exact)[0].softmax(dim=1)
                terms_N[rows], hits_N[rows], total = _softmax_terms(logits, target, taught)
                if any(ctx.needs_input_grad):
                    # d loss / d logit = weight * (softmax - 1 at the target), or less what the teacher has there. The
                    # logits, no longer needed, become it.
                    into_logits = logits.mul_((relative_N[rows] / total).unsqueeze(1))
                    if taught is not None:
                        into_logits.sub_(taught.mul_(relative_N[rows].unsqueeze(1)))
                    elif target is not None:
                        into_logits.scatter_add_(1, target.unsqueeze(1), -relative_N[rows].unsqueeze(1))
                    if slope is not None:
                        into_logits.mul_(slope)
                    if into_bias_V is not None:
                        into_bias_V += into_logits.sum(dim=0)
                    gradients.append(into_logits.to(hidden_ND.dtype))
            if not gradients:
                continue
            # The chain rule through logits = hidden @ weight.T. No more than these blocks' gradient is ever held.
            rows = slice(start, start + at_once)
            into_logits = (gradients[0] if len(gradients) == 1 else torch.cat(gradients)).view(-1, len(weight_VD))
            if into_hidden_ND is not None:
                torch.mm(into_logits, product_weight_VD, out=into_hidden_ND[rows].view(-1, width))
            if into_weight_VD is not None:
                _add_product(into_weight_VD, into_logits.T, hidden_ND[rows].view(-1, width))
        ctx.save_for_backward(into_hidden_ND, into_weight_VD, into_bias_V, largest_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(terms_N, hits_N)
        return (terms_N * term_weight_N).sum(), terms_N, hits_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # `forward` made the gradients. Missing are the factor it took out and the gradient of the loss itself.
        into_hidden_ND, into_weight_VD, into_bias_V, largest_weight = ctx.saved_tensors
        scale = gradients[0] * largest_weight
        into_hidden = None if into_hidden_ND is None else into_hidden_ND * scale
        into_weight = None if into_weight_VD is None else into_weight_VD.mul_(scale).to(ctx.weight_dtype)
        into_bias = None if into_bias_V is None else (into_bias_V * scale).to(ctx.bias_dtype)
        return into_hidden, into_weight, None, None, None, None, into_bias, None, None


def _logits(
    states: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, exact: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A block of logits in `exact`, and the derivative of their bend, if they are bent."""
    logits = (states @ weight_VD.T).to(exact)
    if bias_V is not None:
        logits.add_(bias_V)
    if softcap is None:
        return logits, None
    share = logits.div_(softcap).tanh_()
    return share * softcap, share.square_().neg_().add_(1)  # 1 - tanh^2


def _softmax_terms(logits: Tensor, target: Tensor | None, taught: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy with a target or divergence from what is taught, hit and sum of exponentials of a block's rows.

    The block is overwritten with its exponentials. A second one of its size would double the memory of the loss.
    """
    # Less the largest, no exponential overflows; read before, as the logits are then gone.
    largest = logits.amax(dim=1, keepdim=True)
    if taught is None:
        assert target is not None, "a target or a teacher"
        of_target = logits.gather(1, target.unsqueeze(1))[:, 0]
        hit = of_target == largest[:, 0]
    else:
        of_target = torch.einsum("nv,nv->n", taught, logits) + torch.special.entr(taught).sum(dim=1)
        hit = logits.argmax(dim=1) == taught.argmax(dim=1)
    total = logits.sub_(largest).exp_().sum(dim=1)
    return largest[:, 0] + total.log() - of_target, hit, total


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the total's precision."""
    # torch's fused form takes one dtype for all three.
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def info_nce(
    query_BD: Tensor,
    document_ND: Tensor,
    label_B: Tensor,
    loss_scale: float,
    weight_B: Tensor,
    adjust: Callable[[slice, Tensor], None] | None = None,
) -> CrossEntropy:
    """Sum over B queries of weight * -log softmax(loss_scale * cosine)[label] (paper Eq. 6), in float32 at least.

    Args:
        query_BD: unit vectors; or several a row, end to end, as in `linear_cross_entropy`.
        document_ND: unit vectors of the whole pool.
        label_B: row of each query's positive in the pool.
        loss_scale: 1 / temperature; the paper's temperature 0.05 is a scale of 20.
        weight_B: weight of each query's term.
        adjust: of `linear_cross_entropy`: leaves out documents that are no negatives of a query, or makes some harder.
    """
    return linear_cross_entropy(query_BD * loss_scale, document_ND, label_B, weight_B, adjust=adjust)


def distillation(
    query_BD: Tensor, document_BGD: Tensor, teacher_BG: Tensor, loss_scale: float, weight_B: Tensor
) -> Tensor:
    """Sum over B queries of weight * -sum softmax(teacher) log softmax(loss_scale * cosine), over its G own documents.

    As in Li et al. 2024 (arXiv 2409.15700): a reranker's scores of a query's positive and hard negatives say how much
    better each is. No gradient flows to the teacher.

    Args:
        query_BD: unit vectors.
        document_BGD: unit vectors of each query's positive and hard negatives.
        teacher_BG: the teacher's scores of the same documents, as logits.
        loss_scale: 1 / temperature of the student.
        weight_B: weight of each query's term.
    """
    student_BG = loss_scale * (query_BD.unsqueeze(1) * document_BGD).sum(dim=-1)
    terms_B = -(teacher_BG.to(student_BG.dtype).softmax(dim=1) * student_BG.log_softmax(dim=1)).sum(dim=1)
    return (terms_B * weight_B).sum()


def orthogonality(unit_ND: Tensor) -> tuple[Tensor, Tensor]:
    """How far from spread out unit vectors are: the squared mean of their cosines, and the mean square's excess.

    Global orthogonal regularisation, the spread-out term (Zhang et al. 2017, arXiv 1708.06320): over all ordered pairs
    of two, (mean c)^2 and relu(mean c^2 - 1 / D). Both are 0 in the mean for directions drawn at random. Of fewer than
    two vectors both are 0. No [N, N] is made where N is more than D.
    """
    pairs = max(1, len(unit_ND) * (len(unit_ND) - 1))
    own_N = (unit_ND * unit_ND).sum(dim=1)  # 1, or 0 of a zero vector
    mean = ((unit_ND.sum(dim=0) ** 2).sum() - own_N.sum()) / pairs
    # Of U U^T and U^T U the sum of squares is the same.
    gram = unit_ND.T @ unit_ND if len(unit_ND) > unit_ND.shape[1] else unit_ND @ unit_ND.T
    square = ((gram * gram).sum() - (own_N * own_N).sum()) / pairs
    return mean**2, (square - 1 / unit_ND.shape[1]).relu()


def cosent(cosine_P: Tensor, label_P: Tensor, loss_scale: float) -> Tensor:
    """log(1 + sum of exp(loss_scale * (cosine_b - cosine_a)) over all pairs a, b where label_a > label_b).

    CoSENT (Huang et al. 2024): the order of the cosines of P pairs of texts follows that of their labels. Sorted by
    label, the inner sums are tails of one another, so no [P, P] is made.
    """
    label_P, order = label_P.sort()
    logit_P = loss_scale * cosine_P[order]
    tails = torch.cat([(-logit_P).flip(0).logcumsumexp(dim=0).flip(0), logit_P.new_full((1,), -torch.inf)])
    above_P = torch.searchsorted(label_P, label_P, right=True)  # where the higher labels begin
    return torch.cat([logit_P.new_zeros(1), logit_P + tails[above_P]]).logsumexp(dim=0)


def unit(vectors_BD: Tensor) -> Tensor:
    """Vectors of length one, in float32 at least: their products are cosines."""
    return F.normalize(vectors_BD.to(torch.promote_types(vectors_BD.dtype, torch.float32)), dim=-1)
