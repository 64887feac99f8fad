"""What the package's training steps are measured against: the release's way, and that of sentence-transformers.

The release pads on the left, runs each side of a batch through the decoder by itself, checkpoints every layer and
takes the cross-entropy over all logits in float32. One thing is done right here that the release does wrong: without
position ids, its decoder reads rows at positions that depend on their padding. With them, loss and gradients are those
of `BidirectionalReconstruction` and `ContrastiveLearning`, which a test proves, so that only the cost differs.

Used by `variants.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


class PaddedSide(NamedTuple):
    """One side of a batch, padded: `input_ids`, `attention_mask` and `position_ids`, each [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def pad(ids: Sequence[Sequence[int]], device: str, *, left: bool) -> PaddedSide:
    """Token rows padded to the longest of them; positions count real tokens only."""
    width = max(len(row) for row in ids)
    filled = [[*[0] * (width - len(row)), *row] if left else [*row, *[0] * (width - len(row))] for row in ids]
    real = [[*[0] * (width - len(row)), *[1] * len(row)] if left else [*[1] * len(row), *[0] * (width - len(row))]
            for row in ids]  # fmt: skip
    mask_BT = torch.tensor(real, device=device)
    return PaddedSide(torch.tensor(filled, device=device), mask_BT, (mask_BT.cumsum(dim=1) - 1).clamp(min=0))


def release_stage_I_loss(
    model: Any,
    query: PaddedSide,
    document: PaddedSide,
    query_text: PaddedSide,
    document_text: PaddedSide,
    alpha: float,
) -> Tensor:
    """The loss of Stage I in four padded passes.

    Args:
        model: decoder with its head.
        query, document: whole rows, padded on the left: what is encoded.
        query_text, document_text: their target tokens, padded on the left: what is reconstructed.
        alpha: weight of the direction query to document.
    """
    q2d = full_logits_loss(model, last_token(model.base_model, query), document_text)
    d2q = full_logits_loss(model, last_token(model.base_model, document), query_text)
    return alpha * q2d + (1 - alpha) * d2q


def release_stage_II_loss(model: Any, sides: Sequence[PaddedSide], loss_scale: float) -> Tensor:
    """InfoNCE of queries, positives and negatives (in this order), a padded pass each.

    Args:
        model: decoder without head.
        sides: padded on the left; a row of each side for every query.
        loss_scale: 1 / temperature.
    """
    query_BD, *documents = (F.normalize(_at_least_float32(last_token(model, side)), dim=-1) for side in sides)
    score_BN = query_BD @ torch.cat(documents).T
    label_B = torch.arange(len(query_BD), device=query_BD.device)
    return F.cross_entropy(score_BN * loss_scale, label_B)


def last_token(decoder: Any, side: PaddedSide) -> Tensor:
    """The last token's final state [B, D] of rows that are padded on the left."""
    output = decoder(
        input_ids=side.input_ids,
        attention_mask=side.attention_mask,
        position_ids=side.position_ids,
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state[:, -1]
    return states


def full_logits_loss(model: Any, anchor_BD: Tensor, text: PaddedSide) -> Tensor:
    """Mean cross-entropy of the texts' tokens behind their anchors, over logits of every position.

    Column 0 holds the anchors, the columns behind it the texts, padded on the left. So a text's first token stands
    beside its anchor only in the longest row, and what predicts it is found by label instead of by shifting.
    """
    token_BTD = model.get_input_embeddings()(text.input_ids)
    ones_B1 = torch.ones_like(text.attention_mask[:, :1])
    hidden_BTD = model.base_model(
        inputs_embeds=torch.cat([anchor_BD.unsqueeze(1).to(token_BTD.dtype), token_BTD], dim=1),
        attention_mask=torch.cat([ones_B1, text.attention_mask], dim=1),
        position_ids=torch.cat([ones_B1 - 1, text.position_ids + 1], dim=1),
        use_cache=False,
    ).last_hidden_state
    logits_BTV = _at_least_float32(model.get_output_embeddings()(hidden_BTD))
    return F.cross_entropy(logits_BTV.flatten(0, 1), next_tokens(text).flatten(), ignore_index=IGNORED)


def next_tokens(text: PaddedSide) -> Tensor:
    """What each column of [anchor ; padding ; text] predicts, [B, T + 1]; `IGNORED` at padding and at the end."""
    rows, width = text.input_ids.shape
    label_BT = text.input_ids.new_full((rows, width + 1), IGNORED)
    first_B = width - text.attention_mask.sum(dim=1)
    label_BT[:, 0] = text.input_ids[torch.arange(rows, device=first_B.device), first_B]
    label_BT[:, 1:-1] = text.input_ids[:, 1:].masked_fill(text.attention_mask[:, :-1] == 0, IGNORED)
    return label_BT


def sentence_transformer(folder: str, dtype: torch.dtype, device: str) -> Any:
    """A model folder under sentence-transformers, the closing token's state being the embedding."""
    # Here and not above: a machine without sentence-transformers can measure everything else.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(folder, max_seq_length=512, model_kwargs={"dtype": dtype})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(modules=[transformer, pooling], device=device)


def sentence_transformers_loss(model: Any, loss_scale: float) -> nn.Module:
    """The InfoNCE of sentence-transformers over such a model."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss: nn.Module = MultipleNegativesRankingLoss(model, scale=loss_scale)
    return loss


def features(side: PaddedSide) -> dict[str, Tensor]:
    """One column of a batch as sentence-transformers' trainer hands it to a loss, which writes into it."""
    return {"input_ids": side.input_ids, "attention_mask": side.attention_mask}


def _at_least_float32(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
