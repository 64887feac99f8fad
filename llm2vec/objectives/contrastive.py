"""Stage II and the baseline: InfoNCE with in-batch positives and hard negatives of all ranks (paper Eq. 6).

score = cosine(query, document), document over all ranks' positives and all ranks' hard negatives
loss  = - log softmax(loss_scale * score)[own positive]

What may be added, each by itself: other comparisons, masks and weights in the softmax, and terms beside it
(`negatives.ContrastiveKeys`); and the loss is the mean over several truncations of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from llm2vec.distributed import gather_with_gradient
from llm2vec.model.backbone import Backbone
from llm2vec.model.pooling import embed, embedding_pass
from llm2vec.model.settings import EncoderSettings
from llm2vec.objectives.losses import cosent, distillation, info_nce, orthogonality, unit
from llm2vec.objectives.negatives import ContrastiveKeys, Pool, Softmax
from llm2vec.processes import world_size
from llm2vec.types import Batch, Objective, Output, Pass, TextFacts, UserError


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
        how: what else rows are compared by.
        teacher_width: numbers of a teacher's vectors.

    Raises:
        UserError: a truncation is longer than the vectors, or they and the teacher's differ in size without a
            projection between them.
    """

    needs_head = False

    def __init__(
        self,
        model: Backbone,
        settings: EncoderSettings,
        loss_scale: float = 20.0,
        *,
        matryoshka_dims: Sequence[int] | None = None,
        distillation_weight: float = 0.0,
        how: ContrastiveKeys = ContrastiveKeys(),  # noqa: B008  # frozen
        teacher_width: int | None = None,
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
        self.how = how
        # By a teacher's vectors alone each text stands for itself, and goes through the model once.
        beside = distillation_weight, how.cosent_weight, how.spreads, how.learns_similarity
        self.contrasts = bool(how.contrastive_weight or any(beside))
        self.projection: nn.Linear | None = None
        if teacher_width is not None and how.teacher_projection:
            self.projection = nn.Linear(model.config.hidden_size, teacher_width, device=model.device)
        elif how.draws_near and teacher_width is not None:
            for size in matryoshka_dims or [model.config.hidden_size]:
                if size != teacher_width:
                    raise UserError(
                        f"teacher_vectors: they have {teacher_width} numbers, and the model's {size}; set "
                        "teacher_projection to true."
                    )

    def passes(self, batch: Batch) -> tuple[Pass, ...]:
        """One, of all sides' texts."""
        return (embedding_pass(self.model, self.settings, batch),)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Queries of this batch."""
        return {"contrastive": torch.tensor(float(len(batch["query"]["lengths"])))}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """Vectors [rows, D], not normalised, of the sides `query`, `positive` and, with hard negatives, `negative`;
        and what the batch knows of their texts (`RowFacts`).

        The loss lies between vectors, so there are no parts but those of a teacher's vectors: `loss`, and detached
        `loss_teacher_cosine` and `loss_teacher_mse`. Where these are all the loss there is, nothing `contrasts`.
        """
        facts = {side: tokens["facts"] for side, tokens in batch.items() if tokens.get("facts")}
        vectors = embed(self.model, self.settings, batch)
        if not totals or not self.how.draws_near:
            return Output({}, vectors, facts)
        with torch.autocast(vectors["query"].device.type, enabled=False):
            return Output(self._imitation(vectors, facts, totals["contrastive"]), vectors, facts)

    def _imitation(self, vectors: dict[str, Tensor], facts: TextFacts, total: Tensor) -> dict[str, Tensor]:
        """How far each text's vector is from the teacher's; shares of the step's mean over rows."""
        student_ND = torch.cat(list(vectors.values()))
        exact = torch.promote_types(student_ND.dtype, torch.float32)
        teacher_ND = unit(torch.cat([facts[side]["teacher"] for side in vectors]).to(exact))
        cosines, squares = [], []
        for size in self.matryoshka_dims or [student_ND.shape[1]]:
            own_ND = unit(student_ND[:, :size])
            if self.projection is not None:
                weight, bias = (weights.to(own_ND) for weights in (self.projection.weight, self.projection.bias))
                own_ND = nn.functional.linear(own_ND, weight[:, :size], bias)
            cosines.append((1 - (unit(own_ND) * teacher_ND).sum(dim=1)).sum())
            squares.append((own_ND - teacher_ND).square().mean(dim=1).sum())
        share = len(vectors["query"]) / len(student_ND) / total.to(student_ND.device, exact)
        cosine, square = share * torch.stack(cosines).mean(), share * torch.stack(squares).mean()
        return {
            "loss": self.how.teacher_cosine_weight * cosine + self.how.teacher_mse_weight * square,
            "loss_teacher_cosine": cosine.detach(),
            "loss_teacher_mse": square.detach(),
        }

    def contrast(self, vectors: dict[str, Tensor], facts: TextFacts, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss parts of B queries, B positives and K * B negatives; B is the same on every rank.

        Args:
            vectors: of each side, row by row.
            facts: of each side's texts (`RowFacts`).
            totals: queries in the whole optimiser step.

        Returns:
            `loss`, and detached, where they apply: `loss_contrastive`, `in_batch_accuracy` (share of queries whose
            positive has the highest logit of their softmax), `masked_negatives` (share of a row's negatives that are
            left out as false ones), `loss_distillation`, `loss_cosent`, `loss_teacher_similarity`, `gor_mean` and
            `gor_square`. These rows' share of the step's mean over queries; of truncations, the mean.
        """
        of_side = {side: unit(of_texts) for side, of_texts in vectors.items()}
        documents = torch.cat([of_side[side] for side in ("positive", "negative") if side in of_side])
        own = {"q": of_side["query"], "d": documents}
        # Rank by rank; of documents its positives, then its negatives. Queries are exchanged only if they are compared.
        needs_queries = self.how.spreads or any(d[1] == "q" for softmax in self.how.softmaxes for d in softmax)
        gathered = {side: gather_with_gradient(own[side]) for side in ("d", *(("q",) if needs_queries else ()))}
        pool = Pool.of(facts, len(own["q"]), len(documents), documents.device)
        if self.matryoshka_dims is None:
            return self._parts(own, gathered, pool, facts, totals)
        of_cuts = [self._parts(_cut(own, d), _cut(gathered, d), pool, facts, totals) for d in self.matryoshka_dims]
        return {name: torch.stack([part[name] for part in of_cuts]).mean() for name in of_cuts[0]}

    def _parts(
        self,
        own: dict[str, Tensor],
        gathered: dict[str, Tensor],
        pool: Pool,
        facts: TextFacts,
        totals: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Loss parts between unit vectors of one size: this rank's queries and documents, and those of all ranks."""
        total = totals["contrastive"].to(own["q"])
        softmaxes = [Softmax(directions, self.how, pool, self.loss_scale) for directions in self.how.softmaxes]
        weight_B = (1 / total / len(softmaxes)).expand(len(own["q"]))
        found = []
        for softmax in softmaxes:
            left = torch.cat([own[side][: len(weight_B)] for side in softmax.lefts], dim=1)
            right = torch.cat([gathered[side] for side in softmax.rights])
            found.append(info_nce(left, right, softmax.label_B, self.loss_scale, weight_B, softmax.adjust))
        contrastive = torch.stack([one.loss for one in found]).sum()
        parts = {
            "loss": self.how.contrastive_weight * contrastive,
            "loss_contrastive": contrastive.detach(),
            "in_batch_accuracy": found[0].hits.sum() / total,
        }
        masked = [softmax.masked_B for softmax in softmaxes if softmax.masked_B is not None]
        if masked:
            parts["masked_negatives"] = torch.cat(masked).sum().to(total) / total / len(masked)
        for name, weight, term in self._terms(own, gathered, facts, total):
            parts["loss"] = parts["loss"] + weight * term
            parts[name] = term.detach()
        return parts

    def _terms(
        self, own: dict[str, Tensor], gathered: dict[str, Tensor], facts: TextFacts, total: Tensor
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value of each term beside the softmax; a term of the whole pool counts by its rows."""
        num_rows, how = len(own["q"]), self.how
        share = num_rows / total
        weight_B = (1 / total).expand(num_rows)
        taught = how.learns_similarity
        if taught or self.distillation_weight or how.cosent_weight:
            document_BGD = _own_group(own["d"][:num_rows], own["d"][num_rows:])
        if taught:
            teachers = {side: unit(of_side["teacher"].to(own["q"])) for side, of_side in facts.items()}
            taught_BGD = _own_group(teachers["positive"], teachers.get("negative", teachers["positive"][:0]))
            taught_BG = self.loss_scale * (teachers["query"].unsqueeze(1) * taught_BGD).sum(dim=-1)
            similarity = distillation(own["q"], document_BGD, taught_BG, self.loss_scale, weight_B)
            yield "loss_teacher_similarity", how.teacher_similarity_weight, similarity
        if self.distillation_weight or how.cosent_weight:
            of_positives = facts["positive"]["score"]
            score_BG = _own_group(of_positives, facts.get("negative", {}).get("score", of_positives[:0]))
        if self.distillation_weight:
            imitation = distillation(own["q"], document_BGD, score_BG, self.loss_scale, weight_B)
            yield "loss_distillation", self.distillation_weight, imitation
        if how.cosent_weight:
            cosine_BG = (own["q"].unsqueeze(1) * document_BGD).sum(dim=-1)
            pairs = gather_with_gradient(cosine_BG.flatten()), gather_with_gradient(score_BG.flatten())
            yield "loss_cosent", how.cosent_weight, share * cosent(*pairs, self.loss_scale)
        if how.spreads:
            columns = [gathered["q"], *_columns(gathered["d"], num_rows, len(own["d"]))]
            means, squares = zip(*map(orthogonality, columns), strict=True)
            yield "gor_mean", how.gor_mean_weight, share * torch.stack(means).mean()
            yield "gor_square", how.gor_weight, share * torch.stack(squares).mean()


def _cut(vectors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The first so many numbers of each vector, as unit vectors."""
    return {side: unit(of_side[:, :size]) for side, of_side in vectors.items()}


def _own_group(positive: Tensor, negative: Tensor) -> Tensor:
    """[B, ...] and [K * B, ...] -> [B, 1 + K, ...]."""
    own = negative.reshape(len(positive), len(negative) // len(positive), *negative.shape[1:])
    return torch.cat([positive.unsqueeze(1), own], dim=1)


def _columns(document_ND: Tensor, num_rows: int, num_documents: int) -> Iterator[Tensor]:
    """The positives of all ranks, and then the first, second, ... hard negatives of their rows.

    `num_rows` and `num_documents` are those of one rank.
    """
    of_ranks = document_ND.view(world_size(), num_documents, -1)
    yield of_ranks[:, :num_rows].flatten(0, 1)
    negatives = num_documents // num_rows - 1
    for place in range(negatives):
        yield of_ranks[:, num_rows + place :: negatives].flatten(0, 1)
