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

from llm2vec.distributed import gather_with_gradient
from llm2vec.model.backbone import Backbone
from llm2vec.model.pooling import embed, embedding_pass
from llm2vec.model.settings import EncoderSettings
from llm2vec.objectives.losses import CrossEntropy, distillation, info_nce, unit
from llm2vec.processes import rank, world_size
from llm2vec.types import Batch, Example, InstructedText, Objective, Output, Pass, TextFacts, UserError


class ContrastiveLearning(nn.Module, Objective):
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

    Raises:
        UserError: a truncation is longer than the vectors.
    """

    contrasts = True
    needs_head = False

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
        if matryoshka_dims is not None and max(matryoshka_dims) > model.config.hidden_size:
            raise UserError(
                f"matryoshka_dims: {max(matryoshka_dims)} is more than the model's hidden size, "
                f"{model.config.hidden_size}."
            )
        self.model = model
        self.settings = settings
        self.loss_scale = loss_scale
        self.matryoshka_dims = matryoshka_dims
        self.distillation_weight = distillation_weight

    def passes(self, batch: Batch) -> tuple[Pass, ...]:
        """One, of all sides' texts."""
        return (embedding_pass(self.model, self.settings, batch),)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Queries of this batch."""
        return {"contrastive": torch.tensor(float(len(batch["query"]["lengths"])))}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """Vectors [rows, D], not normalised, of the sides `query`, `positive` and, with hard negatives, `negative`;
        and what the batch knows of their texts (`RowFacts`).

        All of the loss lies between vectors, so there are no parts.
        """
        facts = {side: tokens["facts"] for side, tokens in batch.items() if tokens.get("facts")}
        return Output({}, embed(self.model, self.settings, batch), facts)

    def contrast(self, vectors: dict[str, Tensor], facts: TextFacts, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss parts of B queries, B positives and K * B negatives; B is the same on every rank.

        Args:
            vectors: of each side, row by row.
            facts: of each side's texts (`RowFacts`).
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
        negatives = Negatives.of(facts, len(query_BD), len(own), query_BD.device)
        if self.matryoshka_dims is None:
            parts = self._parts(query_BD, own, pool_ND, negatives, facts, totals)
        else:
            of_cuts = [
                self._parts(unit(query_BD[:, :d]), unit(own[:, :d]), unit(pool_ND[:, :d]), negatives, facts, totals)
                for d in self.matryoshka_dims
            ]
            parts = {name: torch.stack([part[name] for part in of_cuts]).mean() for name in of_cuts[0]}
        if negatives.hash_N is not None:
            share_B = negatives.masked_share(negatives.hash_N)
            parts["masked_negatives"] = share_B.sum().to(query_BD) / totals["contrastive"].to(query_BD)
        return parts

    def _parts(
        self,
        query_BD: Tensor,
        own: Tensor,
        pool_ND: Tensor,
        negatives: Negatives,
        facts: TextFacts,
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
            teacher_BG = _own_group(facts["positive"]["score"], facts["negative"]["score"])
            document_BGD = _own_group(own[: len(query_BD)], own[len(query_BD) :])
            imitation = distillation(query_BD, document_BGD, teacher_BG, self.loss_scale, weight_B)
            parts["loss"] = parts["loss"] + self.distillation_weight * imitation
            parts["loss_distillation"] = imitation.detach()
        return parts


@dataclass(frozen=True)
class Negatives:
    """Which documents of the gathered pool each of this rank's queries is compared with.

    Attributes:
        label_B: each query's positive, as a row of the pool.
        row_N: the row, counted over all ranks, that each document belongs to.
        own: this rank's documents in the pool.
        hash_N: what tells the documents' texts apart; None = copies of a positive stay negatives.
        own_only_B: which queries see only their own row's documents; None = none.
    """

    label_B: Tensor
    row_N: Tensor
    own: slice
    hash_N: Tensor | None
    own_only_B: Tensor | None

    @classmethod
    def of(cls, facts: TextFacts, num_queries: int, num_documents: int, device: torch.device) -> Negatives:
        """For this rank's queries and documents, as many on every rank; the documents' hashes are gathered.

        Args:
            facts: of this rank's rows (`RowFacts`).
            num_queries: of this rank.
            num_documents: of this rank: the queries' positives, then as many hard negatives for each.
            device: of what is returned.
        """
        row_B = torch.arange(num_queries, device=device)
        row_of_own = torch.cat([row_B, row_B.repeat_interleave(num_documents // num_queries - 1)])
        first_rows = num_queries * torch.arange(world_size(), device=device)
        start = rank() * num_documents
        documents = [facts[side] for side in ("positive", "negative") if side in facts]
        hashes = [of_side["hash"] for of_side in documents if "hash" in of_side]
        return cls(
            label_B=start + row_B,
            row_N=(first_rows.unsqueeze(1) + row_of_own).flatten(),
            own=slice(start, start + num_documents),
            hash_N=gather_with_gradient(torch.cat(hashes)) if hashes else None,
            own_only_B=facts.get("query", {}).get("own_only"),
        )

    @property
    def left_out(self) -> Callable[[slice], Tensor] | None:
        """For `losses.info_nce`: the documents that some queries' softmax leaves out; None = no query's does."""
        return None if self.hash_N is None and self.own_only_B is None else self._left_out

    def _left_out(self, queries: slice) -> Tensor:
        """[queries, N]."""
        label_B1 = self.label_B[queries].unsqueeze(1)
        out_BN = torch.zeros(len(label_B1), len(self.row_N), dtype=torch.bool, device=label_B1.device)
        if self.hash_N is not None:
            out_BN |= self.hash_N == self.hash_N[label_B1]
        if self.own_only_B is not None:
            out_BN |= self.own_only_B[queries].unsqueeze(1) & (self.row_N != self.row_N[label_B1])
        return out_BN.scatter_(1, label_B1, False)

    def masked_share(self, hash_N: Tensor) -> Tensor:
        """Share [B] of a query's negatives that are copies of its positive, without ever holding [B, N]."""
        hash_B, ordered_N = hash_N[self.label_B], hash_N.sort().values
        copies_B = torch.searchsorted(ordered_N, hash_B, right=True) - torch.searchsorted(ordered_N, hash_B) - 1
        share_B = copies_B / max(1, len(hash_N) - 1)
        if self.own_only_B is None:
            return share_B
        own = hash_N[self.own]
        negative_BK = own[len(hash_B) :].reshape(len(hash_B), -1)
        share_of_own_B = (negative_BK == hash_B.unsqueeze(1)).sum(dim=1) / max(1, negative_BK.shape[1])
        return torch.where(self.own_only_B, share_of_own_B, share_B)


@dataclass(frozen=True)
class RowFacts:
    """What an objective is told of a batch's texts beside their tokens; the collator asks for it side by side.

    Attributes:
        mask_false_negatives: tell each document's `hash`, so that a copy of a query's positive is no negative of it.
        with_scores: tell the teacher's `score` of each document.
        own_negatives_only: sources whose queries are compared with their own row's documents only (`own_only`), as
            Li et al. 2024 do outside retrieval (arXiv 2409.15700).
    """

    mask_false_negatives: bool = False
    with_scores: bool = False
    own_negatives_only: frozenset[str] = frozenset()

    def __call__(self, rows: Sequence[Example], side: str) -> dict[str, Tensor]:
        """Facts of one side's texts, each [texts], in row order; K negatives a row become K * B texts, row by row."""
        facts: dict[str, Tensor] = {}
        if side == "query":
            if self.own_negatives_only:
                facts["own_only"] = torch.tensor([row.source in self.own_negatives_only for row in rows])
            return facts
        if self.mask_false_negatives:
            texts = [text for row in rows for text in (row.negatives if side == "negative" else (row.positive,))]
            facts["hash"] = torch.tensor([hash_of(text) for text in texts])
        if self.with_scores:
            of_side = slice(1, None) if side == "negative" else slice(1)
            facts["score"] = torch.tensor([score for row in rows for score in row.scores[of_side]])
        return facts


def hash_of(text: InstructedText) -> int:
    """63 bits of instruction and text, the same in every process: a pool of a million documents has a collision once
    in 18 million times."""
    content = f"{len(text.instruction)} {text.instruction}{text.text}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def _own_group(positive: Tensor, negative: Tensor) -> Tensor:
    """[B, ...] and [K * B, ...] -> [B, 1 + K, ...]."""
    return torch.cat([positive.unsqueeze(1), negative.unflatten(0, (len(positive), -1))], dim=1)
