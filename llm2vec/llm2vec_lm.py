"""Plain next-token loss: what a base model is pre-trained with, and the equal-compute control to Stage I."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2vec.backbone import hidden_states
from llm2vec.losses import vocabulary_cross_entropy_sum
from llm2vec.types import Batch


class LanguageModelling(nn.Module):
    """Next-token prediction over blocks of text.

    Args:
        model: decoder with its language-model head; all of it is trained.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Target tokens: every marked token but a row's first position."""
        return {"lm": batch["text"]["target_mask"][:, 1:].sum(dtype=torch.float32)}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` and detached `loss_lm` of a micro-batch with the side `text`, as shares of the step's token mean."""
        ids_BT, target_mask_BT = batch["text"]["input_ids"], batch["text"]["target_mask"].bool()
        hidden_BTD = hidden_states(self.model.base_model, "causal", batch["text"]["attention_mask"], input_ids=ids_BT)
        logits_NV = self.model.get_output_embeddings()(hidden_BTD[:, :-1][target_mask_BT[:, 1:]])
        loss = vocabulary_cross_entropy_sum(logits_NV, ids_BT[:, 1:][target_mask_BT[:, 1:]]) / totals["lm"]
        return {"loss": loss, "loss_lm": loss.detach()}
