"""Stage II and the baseline: InfoNCE with in-batch positives and hard negatives of all ranks (paper Eq. 6).

score = cosine(query, document), document over all ranks' positives and all ranks' hard negatives
loss  = - log softmax(loss_scale * score)[own positive]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm2vec.backbone import Backbone
from llm2vec.checkpoint import EncoderSettings
from llm2vec.distributed import gather_with_gradient, rank
from llm2vec.llm2vec import embed
from llm2vec.losses import info_nce_sum, similarity
from llm2vec.types import Batch, TokenBatch


class ContrastiveLearning(nn.Module):
    """The Stage II objective over a decoder without head, usually with a LoRA adapter on it.

    Args:
        model: the decoder.
        settings: how a text becomes its embedding.
        loss_scale: 1 / temperature; 20 is the paper's temperature of 0.05.
    """

    def __init__(self, model: Backbone, settings: EncoderSettings, loss_scale: float = 20.0) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.loss_scale = loss_scale

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Queries of this micro-batch."""
        mask = batch["query"]["input_ids"]
        return {"contrastive": torch.tensor(float(len(mask)), device=mask.device)}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss parts of a micro-batch with the sides `query`, `positive` and, with hard negatives, `negative`.

        Args:
            batch: B queries, B positives and K * B negatives; B is the same on every rank.
            totals: queries in the whole optimiser step.

        Returns:
            `loss`, and detached `loss_contrastive` and `in_batch_accuracy` (share of queries whose positive scores
            highest): this micro-batch's share of the step's mean over queries.
        """
        query_BD = self.embed(batch["query"])
        document_ND = gather_with_gradient(self.embed(batch["positive"]))
        if "negative" in batch:
            document_ND = torch.cat([document_ND, gather_with_gradient(self.embed(batch["negative"]))])
        score_BN = similarity(query_BD, document_ND)
        label_B = rank() * len(query_BD) + torch.arange(len(query_BD), device=query_BD.device)
        loss = info_nce_sum(score_BN, label_B, self.loss_scale) / totals["contrastive"]
        num_correct = (score_BN.detach().argmax(dim=1) == label_B).sum()
        return {
            "loss": loss,
            "loss_contrastive": loss.detach(),
            "in_batch_accuracy": num_correct / totals["contrastive"],
        }

    def embed(self, side: TokenBatch) -> Tensor:
        """Embedding [B, D] of each row, not normalised."""
        return embed(self.model, self.settings, side)
