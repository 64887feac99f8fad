"""Stage I: bidirectional reconstruction through the anchor (EBQ2D and EBD2Q; paper section 3.1, Algorithm 1).

    anchor(x)   state of x's closing token, after the final norm                              [B, D]
    EBQ2D       [anchor(query) ; Embed(document)] -> decoder -> lm_head -> CE on the document
    EBD2Q       [anchor(document) ; Embed(query)] -> decoder -> lm_head -> CE on the query
    loss        alpha * CE_q2d + (1 - alpha) * CE_d2q                                         (Eq. 5)

The decoder sees the anchor at position 0, where a token's embedding would stand, and the text behind it: what it
knows of the other side, it knows from the anchor. Gradient flows through the anchors into the encoding pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2vec.backbone import hidden_states
from llm2vec.checkpoint import EncoderSettings
from llm2vec.llm2vec import embed
from llm2vec.losses import vocabulary_cross_entropy_sum
from llm2vec.types import Batch, TokenBatch


class BidirectionalReconstruction(nn.Module):
    """The Stage I objective over a causal language model.

    Args:
        model: decoder with its language-model head; all of it is trained.
        settings: how a text becomes its anchor.
        alpha: weight of EBQ2D; 0 is the paper's OnlyD2Q, 1 its OnlyQ2D, and then the other pass is not run.
    """

    def __init__(self, model: PreTrainedModel, settings: EncoderSettings, alpha: float = 0.2) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.alpha = alpha

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Target tokens of each direction: those of the positive for q2d, of the query for d2q."""
        return {
            "q2d": batch["positive"]["target_mask"].sum(dtype=torch.float32),
            "d2q": batch["query"]["target_mask"].sum(dtype=torch.float32),
        }

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss parts of a micro-batch with the sides `query` and `positive`.

        Args:
            batch: both sides, tokenised.
            totals: target tokens of each direction in the whole optimiser step.

        Returns:
            `loss`, and detached `loss_q2d` and `loss_d2q` where their pass ran: this micro-batch's share of the
            step's mean over tokens.
        """
        parts: dict[str, Tensor] = {}
        loss = totals["q2d"].new_zeros(())
        if self.alpha > 0:
            q2d = self.reconstruct(self.anchor(batch["query"]), batch["positive"]) / totals["q2d"]
            parts["loss_q2d"] = q2d.detach()
            loss = loss + self.alpha * q2d
        if self.alpha < 1:
            d2q = self.reconstruct(self.anchor(batch["positive"]), batch["query"]) / totals["d2q"]
            parts["loss_d2q"] = d2q.detach()
            loss = loss + (1 - self.alpha) * d2q
        return {"loss": loss, **parts}

    def anchor(self, side: TokenBatch) -> Tensor:
        """Embedding [B, D] of each row: the prefix its counterpart is generated from."""
        return embed(self.model.base_model, self.settings, side)

    def reconstruct(self, anchor_BD: Tensor, side: TokenBatch) -> Tensor:
        """Summed cross-entropy of generating `side`'s target tokens from the anchors (Eq. 3 and 4).

        Position 0 holds the anchor and predicts the first target token; the last target token is not an input.
        """
        target_BT, target_mask_BT = pack_left(side["input_ids"], side["target_mask"])
        token_BTD = self.model.get_input_embeddings()(target_BT[:, :-1])
        inputs_BTD = torch.cat([anchor_BD.unsqueeze(1).to(token_BTD.dtype), token_BTD], dim=1)
        # Generation is causal whatever the attention of the encoding pass.
        hidden_BTD = hidden_states(self.model.base_model, "causal", target_mask_BT.long(), inputs_embeds=inputs_BTD)
        logits_NV = self.model.get_output_embeddings()(hidden_BTD[target_mask_BT])
        return vocabulary_cross_entropy_sum(logits_NV, target_BT[target_mask_BT])


#: The name under which the paper's release imports Stage I.
LLM2Vec_q2d_d2q = BidirectionalReconstruction


def pack_left(ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Marked tokens of each row moved to its start, in order, and the mask of where they now stand.

    Returns:
        ids [B, M] and bool mask [B, M], M the largest number of marked tokens in a row; unmarked places hold 0.
    """
    length_B = mask_BT.sum(dim=1)
    packed_mask_BM = torch.arange(int(length_B.max()), device=ids_BT.device) < length_B.unsqueeze(1)
    packed_BM = torch.zeros_like(packed_mask_BM, dtype=ids_BT.dtype)
    packed_BM[packed_mask_BM] = ids_BT[mask_BT.bool()]
    return packed_BM, packed_mask_BM
