"""Token sets: a text's memory brings forth the tokens of a text all at once, in no order (`target_loss: bag`).

Source: Li et al. 2024, arXiv 2312.15503 (LLaMA2Vec), section 3, in the form of its released code. A text is read with a
block of K tokens behind it, and the block's states are its memory:

    score[v]    = max over the block's positions k of head(state[k])[v]
    loss of row = - mean over the different tokens v of the target of log softmax(score)[v]

There, a text is read twice, once with a block that asks for a summary and once with one that asks for what follows
(template `llara`). EBAE is the first block's loss on the text's own tokens (`target: self`), EBAR the second's on those
of its counterpart (`both` are trained), each with weight 0.05 beside a next-token loss of the text (`lm_weight: 1`).
The paper's own form has one token a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm2vec.objectives.head import Head
from llm2vec.objectives.losses import BLOCK_ENTRIES, BLOCK_ENTRIES_CUDA
from llm2vec.text.batches import targets_of
from llm2vec.types import TokenBatch

#: Weight of a bag's loss, where a next-token loss has weight 1 (the released code's).
BAG_WEIGHT = 0.05


def token_set_loss(
    block_RKD: Tensor, head: Head, targets: Sequence[Tensor], share: Tensor, block_rows: int | None = None
) -> Tensor:
    """Sum over R rows of `share` times a block's loss on its target; rows without a target count nothing.

    The scores of only some rows' blocks are held at a time, in the forward pass and in the backward pass, which
    computes them again: they are few beside those of a next-token loss on the same texts.

    Args:
        block_RKD: states of the rows' blocks, K positions each.
        head: over the states.
        targets: for each row, the different tokens of its target.
        share: 1 / rows with a target in the whole optimiser step.
        block_rows: rows whose scores [rows, K, V] are held at once; None = as many as make a block of moderate size.
    """
    if block_rows is None:
        entries = BLOCK_ENTRIES_CUDA if block_RKD.device.type == "cuda" else BLOCK_ENTRIES
        block_rows = max(1, entries // (block_RKD.shape[1] * len(head.weight_VD)))
    losses = [
        checkpoint(
            _loss_of_rows,
            block_RKD[start : start + block_rows],
            head,
            targets[start : start + block_rows],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, len(block_RKD), block_rows)
    ]
    return torch.stack(losses).sum() * share


def _loss_of_rows(block_RKD: Tensor, head: Head, targets: Sequence[Tensor]) -> Tensor:
    """The sum of some rows' losses; the softmax is taken in float32 at least."""
    score_RV = head.logits(block_RKD).max(dim=1).values
    log_share_RV = score_RV.to(torch.promote_types(score_RV.dtype, torch.float32)).log_softmax(dim=1)
    terms = [-log_share_RV[row, target].mean() for row, target in enumerate(targets) if len(target)]
    return torch.stack(terms).sum() if terms else log_share_RV.sum() * 0


def token_sets(side: TokenBatch) -> list[Tensor]:
    """For each row, the different tokens among its targets, in order. Their number is known, so no device is asked."""
    sets = []
    for tokens, number in zip(targets_of(side).split(side["num_targets"]), side["num_different"], strict=True):
        ordered = tokens.sort().values
        is_new = ordered.diff(prepend=ordered.new_full((1,), -1)) != 0
        sets.append(ordered[is_new.nonzero_static(size=number).squeeze(1)])
    return sets
