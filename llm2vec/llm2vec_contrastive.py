"""Stage II and the baseline: InfoNCE with in-batch positives and hard negatives of all ranks (paper Eq. 6).

score = cosine(query, document), document over all ranks' positives and all ranks' hard negatives
loss  = - log softmax(loss_scale * score)[own positive]

What may be added, each by itself: documents that are no negatives of a query leave its softmax (copies of its positive;
all but its own, for sources without in-batch negatives); a teacher's scores of the query's own documents are imitated;
and the loss is the mean over several truncations of the vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm2vec.backbone import Backbone
from llm2vec.checkpoint import EncoderSettings
from llm2vec.distributed import gather_with_gradient, rank, world_size
from llm2vec.llm2vec import embed
from llm2vec.losses import CrossEntropy, distillation, info_nce, unit
from llm2vec.types import Batch, Example, InstructedText, Output, UserError


class ContrastiveLearning(nn.Module):
    """The Stage II objective over a decoder without head, usually with a LoRA adapter on it.

    Which documents a query is compared with is the batch's business (`RowFacts`).

    Args:
        model: the decoder.
        settings: how a text becomes its embedding.
        loss_scale: 1 / temperature; 20 is the paper's temperature of 0.05.
        matryoshka_dims: the loss is the mean over the vectors' first so many numbers, normalised again (Kusupati et
            al. 2022, arXiv 2205.13147); None = the vectors as they are.
        distillation_weight: of the term that imitates a teacher (`losses.distillation`); the batch must hold its
            scores.
    """

    contrasts = True

    def __init__(
        self,
        model: Backbone,
        settings: EncoderSettings,
        loss_scale: float = 20.0,
        *,
        matryoshka_dims: Sequence[int] | None = None,
        distillation_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.loss_scale = loss_scale
        self.matryoshka_dims = matryoshka_dims
        self.distillation_weight = distillation_weight

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Queries of this batch."""
        return {"contrastive": torch.tensor(float(len(batch["query"]["lengths"])))}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """Vectors [rows, D], not normalised, of the sides `query`, `positive` and, with hard negatives, `negative`;
        and what the batch knows of their texts, as `query_...`, `positive_...` and `negative_...`.

        All of the loss lies between vectors, so there are no parts.
        """
        facts = {f"{side}_{name}": fact for side in batch for name, fact in batch[side].get("facts", {}).items()}
        return Output({}, embed(self.model, self.settings, batch), facts)

    def contrast(self, vectors: dict[str, Tensor], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss parts of B queries, B positives and K * B negatives; B is the same on every rank.

        Args:
            vectors: of each side, row by row; and facts of the texts (`RowFacts`).
            totals: queries in the whole optimiser step.

        Returns:
            `loss`, and detached, where they apply: `loss_contrastive`, `in_batch_accuracy` (share of queries whose
            positive scores highest), `loss_distillation`, `masked_negatives` (share of a query's negatives that its
            softmax leaves out, as they are copies of its positive). These rows' share of the step's mean over queries;
            of truncations, the mean.
        """
        query_BD = unit(vectors["query"])
        own = torch.cat([unit(vectors[side]) for side in ("positive", "negative") if side in vectors])
        pool_ND = gather_with_gradient(own)  # rank by rank: its positives, then its negatives
        negatives = Negatives.of(vectors, len(query_BD), len(own), query_BD.device)
        if self.matryoshka_dims is None:
            parts = self._parts(query_BD, own, pool_ND, negatives, vectors, totals)
        else:
            cuts = [[unit(full[:, :size]) for full in (query_BD, own, pool_ND)] for size in self.matryoshka_dims]
            of_cuts = [self._parts(*cut, negatives, vectors, totals) for cut in cuts]
            parts = {name: torch.stack([part[name] for part in of_cuts]).mean() for name in of_cuts[0]}
        if "positive_hash" in vectors:
            parts["masked_negatives"] = negatives.masked_share().sum() / totals["contrastive"].to(query_BD)
        return parts

    def _parts(
        self,
        query_BD: Tensor,
        own: Tensor,
        pool_ND: Tensor,
        negatives: Negatives,
        facts: dict[str, Tensor],
        totals: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Loss parts between unit vectors of one size."""
        total = totals["contrastive"].to(query_BD)
        weight_B = (1 / total).expand(len(query_BD))
        found: CrossEntropy = info_nce(
            query_BD, pool_ND, negatives.label_B, self.loss_scale, weight_B, negatives.left_out
        )
        parts = {
            "loss": found.loss,
            "loss_contrastive": found.loss.detach(),
            "in_batch_accuracy": found.hits.sum() / total,
        }
        if self.distillation_weight:
            teacher_BG = _own_group(facts["positive_score"], facts["negative_score"])
            document_BGD = _own_group(own[: len(query_BD)], own[len(query_BD) :])
            imitation = distillation(query_BD, document_BGD, teacher_BG, self.loss_scale, weight_B)
            parts["loss"] = parts["loss"] + self.distillation_weight * imitation
            parts["loss_distillation"] = imitation.detach()
        return parts


@dataclass(frozen=True)
class Negatives:
    """Which documents of a pool each of this rank's queries is compared with.

    Attributes:
        label_B: each query's positive, as a row of the pool.
        row_N: the row, counted over all ranks, that each document belongs to.
        first_row: this rank's first row in that count.
        hash_N: what tells the documents' texts apart; None = copies of a positive stay negatives.
        own_only_B: which queries see only their own row's documents; None = none.
    """

    label_B: Tensor
    row_N: Tensor
    first_row: int
    hash_N: Tensor | None = None
    own_only_B: Tensor | None = None

    @classmethod
    def of(cls, facts: dict[str, Tensor], num_queries: int, num_documents: int, device: torch.device) -> Negatives:
        """For a rank with `num_queries` rows, each with the same share of `num_documents`; collective."""
        row_B = torch.arange(num_queries, device=device)
        row_of_own = torch.cat([row_B, row_B.repeat_interleave(num_documents // num_queries - 1)])
        firsts = num_queries * torch.arange(world_size(), device=device)
        hashes = [facts[name] for name in ("positive_hash", "negative_hash") if name in facts]
        return cls(
            label_B=rank() * num_documents + row_B,
            row_N=(firsts.unsqueeze(1) + row_of_own).flatten(),
            first_row=rank() * num_queries,
            hash_N=gather_with_gradient(torch.cat(hashes)) if hashes else None,
            own_only_B=facts.get("query_own_only"),
        )

    @property
    def left_out(self) -> Callable[[slice], Tensor] | None:
        """For `losses.info_nce`: the documents, [queries, N], that some queries' softmax leaves out."""
        return None if self.hash_N is None and self.own_only_B is None else self._left_out

    def _left_out(self, queries: slice) -> Tensor:
        label_B1 = self.label_B[queries].unsqueeze(1)
        out_BN = torch.zeros(len(label_B1), len(self.row_N), dtype=torch.bool, device=label_B1.device)
        if self.hash_N is not None:
            out_BN |= self.hash_N == self.hash_N[label_B1]
        if self.own_only_B is not None:
            out_BN |= self.own_only_B[queries].unsqueeze(1) & (self.row_N != self.row_N[label_B1])
        return out_BN.scatter_(1, label_B1, False)

    def masked_share(self) -> Tensor:
        """Share [B] of the negatives that a query would see which are copies of its positive."""
        assert self.hash_N is not None
        hash_B, ordered_N = self.hash_N[self.label_B], self.hash_N.sort().values
        copies_B = torch.searchsorted(ordered_N, hash_B, right=True) - torch.searchsorted(ordered_N, hash_B) - 1
        share_B = copies_B / max(1, len(ordered_N) - 1)
        if self.own_only_B is None:
            return share_B
        own = self.hash_N[self.row_N ...]
        return torch.where(self.own_only_B, ..., share_B)
