"""What a row is compared with: directions, masks of false negatives, and weights of hard ones, block by block.

A direction names two sides. `qd` compares a query with all documents, `qq` with the other queries, `dq` its positive
with all queries, and `dd` with the documents of other rows. The chosen ones are columns of one softmax a row; or `qd`
and `dq` of one each.

A negative is false if it would answer the query. It leaves the softmax, and whichever rank holds it does not matter:

    text     it is a copy of the positive (`mask_false_negatives`)
    known    it is another positive of the same query (`mask_known_positives`)
    guide    g(query, it) > g(query, positive) - margin, where g is the cosine of the model itself or of a stronger
             one's stored vectors (GISTEmbed, Solatorio 2024, arXiv 2402.16829; Qwen3-Embedding's is the model itself
             at a margin of -0.1)

Nothing here holds a whole matrix of scores: a mask is made when `losses.info_nce` comes to its block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm2vec.data.collation import CollateSides
from llm2vec.distributed import gather_with_gradient
from llm2vec.objectives.losses import unit
from llm2vec.processes import rank, world_size
from llm2vec.types import Direction, Example, Hardened, InstructedText, MarginKind, Partition, TextFacts


@dataclass(frozen=True)
class ContrastiveKeys:
    """The keys of a config that say how rows are compared; their defaults are InfoNCE as in the paper. `Config` says
    what each means. Here is what it leaves out:

    Attributes:
        positive_margin: additive margin (Yang et al. 2019, arXiv 1902.08564).
        hardness_weight: of a negative's own cosine in the direction `qd` (Lan et al. 2025, arXiv 2503.04812).
        guide_margin: above 0 it leaves out more.
        guide_margin_kind: `relative` is a share of the positive's absolute cosine.
        gor_weight: `losses.orthogonality` of queries, of positives, and of each place of a hard negative: the mean over
            these columns (EmbeddingGemma, arXiv 2509.20354, has their sum).
        teacher_cosine_weight: likewise a mean over columns (EmbedDistill, Kim et al. 2023, arXiv 2301.12005).
        teacher_similarity_weight: of `losses.distillation` of the teacher's cosines.
        teacher_projection: of the model's unit vectors.

    Example:
        >>> ContrastiveKeys(directions=("qd", "dq"), partition="per_direction").softmaxes
        (('qd',), ('dq',))
    """

    directions: Sequence[Direction] | None = None
    partition: Partition = "joint"
    positive_margin: float = 0.0
    hardness_weight: float = 0.0
    hardness_of: Hardened = "hard_negatives"
    guide: str | None = None
    guide_margin: float = 0.0
    guide_margin_kind: MarginKind = "absolute"
    contrastive_weight: float = 1.0
    cosent_weight: float = 0.0
    gor_weight: float = 0.0
    gor_mean_weight: float = 0.0
    teacher_vectors: str | None = None
    teacher_cosine_weight: float = 1.0
    teacher_mse_weight: float = 0.0
    teacher_similarity_weight: float = 0.0
    teacher_projection: bool = False

    @property
    def spreads(self) -> bool:
        """Whether vectors are pushed apart whatever they are compared with."""
        return bool(self.gor_weight or self.gor_mean_weight)

    @property
    def draws_near(self) -> bool:
        """Whether vectors are drawn to a teacher's."""
        return self.teacher_vectors is not None and self.teacher_cosine_weight + self.teacher_mse_weight > 0

    @property
    def learns_similarity(self) -> bool:
        """Whether a teacher's cosines of a query with its row's documents are imitated."""
        return self.teacher_vectors is not None and self.teacher_similarity_weight > 0

    @property
    def softmaxes(self) -> tuple[tuple[Direction, ...], ...]:
        """The directions of each softmax of a row; the first has `qd`."""
        directions = sorted(self.directions or ("qd",), key=("qd", "dq", "qq", "dd").index)
        return (tuple(directions),) if self.partition == "joint" else tuple((direction,) for direction in directions)


@dataclass(frozen=True)
class SideTexts:
    """What is known of the queries, or of the documents, of all ranks, in the order of their vectors."""

    row_N: Tensor  #: the row, counted over all ranks, that each belongs to
    own_B: Tensor  #: where the query, or the positive, of each of this rank's rows stands
    #: what tells documents' texts apart; of a query that of its positive. None = no text is masked
    answer_N: Tensor | None = None
    #: the same of queries' texts; of a document that of the query it is positive of, -1 for hard negatives
    asked_N: Tensor | None = None
    guide_ND: Tensor | None = None  #: the guide's unit vectors


@dataclass(frozen=True)
class Pool:
    """The texts that all ranks hold at once, and this rank's rows among them."""

    sides: dict[str, SideTexts]  #: queries, `q`, and documents, `d`
    #: hashes of further positives of each own query, padded with -1; None = they are not masked
    known_BP: Tensor | None
    own_only_B: Tensor | None  #: which own rows are compared with their own documents only; None = none

    @classmethod
    def of(cls, facts: TextFacts, num_rows: int, num_documents: int, device: torch.device) -> Pool:
        """For this rank's rows, as many on every rank; what is known of their texts (`RowFacts`) is gathered. The
        documents are the rows' positives, then as many hard negatives for each."""
        row_B = torch.arange(num_rows, device=device)
        rows_of_ranks = num_rows * torch.arange(world_size(), device=device).unsqueeze(1)
        row_of_own = torch.cat([row_B, row_B.repeat_interleave(num_documents // num_rows - 1)])

        def known(name: str, *sides: str) -> Tensor | None:
            found = [facts[side][name] for side in sides if name in facts.get(side, {})]
            return torch.cat(found) if found else None

        def gathered(values: Tensor | None) -> Tensor | None:
            return None if values is None else gather_with_gradient(values)

        documents = "positive", "negative"
        answered_B, asked_B = known("hash", "positive"), known("hash", "query")
        asked_of_own = None
        if asked_B is not None:
            asked_of_own = torch.cat([asked_B, asked_B.new_full((num_documents - num_rows,), -1)])
        guide_BD, guide_of_own = known("guide", "query"), known("guide", *documents)
        return cls(
            {
                "q": SideTexts(
                    (rows_of_ranks + row_B).flatten(),
                    rank() * num_rows + row_B,
                    gathered(answered_B),
                    gathered(asked_B),
                    gathered(None if guide_BD is None else unit(guide_BD)),
                ),
                "d": SideTexts(
                    (rows_of_ranks + row_of_own).flatten(),
                    rank() * num_documents + row_B,
                    gathered(known("hash", *documents)),
                    gathered(asked_of_own),
                    gathered(None if guide_of_own is None else unit(guide_of_own)),
                ),
            },
            facts.get("query", {}).get("known"),
            facts.get("query", {}).get("own_only"),
        )


@dataclass
class Softmax:
    """One softmax a row: whose vectors its columns are products of, and what is done to their logits."""

    directions: Sequence[Direction]  #: whose columns it has; the first has the positive
    how: ContrastiveKeys  #: what is masked, and what weighs more
    pool: Pool
    loss_scale: float  #: 1 / temperature
    #: share of each row's negatives that are left out as false ones; filled while the loss is made. None =
    #: nothing tells of any
    masked_B: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.lefts = [side for side in "qd" if any(d[0] == side for d in self.directions)]
        self.rights = [side for side in "dq" if any(d[1] == side for d in self.directions)]
        self.label_B = self.pool.sides[self.rights[0]].own_B
        documents = self.pool.sides["d"]
        masks = self.how.guide is not None or documents.answer_N is not None
        self.masked_B = torch.zeros(len(self.label_B), device=self.label_B.device) if masks else None

    @property
    def adjust(self) -> Callable[[slice, Tensor], None] | None:
        """For `losses.info_nce`; None = every logit stays."""
        how = self.how
        plain = len(self.directions) == 1 and not how.positive_margin and not how.hardness_weight
        return None if plain and self.masked_B is None and self.pool.own_only_B is None else self._adjust

    def _adjust(self, rows: slice, logits: Tensor) -> None:
        """`logits` are [rows, left sides * columns of all right sides]."""
        positive_B1 = logits.gather(1, self.label_B[rows].unsqueeze(1))
        limit_B1 = self._limit(rows, positive_B1 / self.loss_scale)
        positive_B1 = positive_B1 - self.loss_scale * self.how.positive_margin
        row_B1 = self.pool.sides["q"].row_N[self.pool.sides["q"].own_B[rows]].unsqueeze(1)
        masked_B, negatives_B = logits.new_zeros(2, len(logits))
        of_lefts = logits.view(len(logits), len(self.lefts), -1)
        widths = [len(self.pool.sides[right].row_N) for right in self.rights]
        for i, left in enumerate(self.lefts):
            for right, block in zip(self.rights, of_lefts[:, i].split(widths, dim=1), strict=True):
                if left + right not in self.directions:
                    block.fill_(-torch.inf)
                    continue
                own_B1 = self.pool.sides[right].own_B[rows].unsqueeze(1)
                same_row = self.pool.sides[right].row_N == row_B1
                negative = ~same_row if left == right else torch.ones_like(same_row).scatter_(1, own_B1, False)
                if self.pool.own_only_B is not None:
                    negative &= same_row | ~self.pool.own_only_B[rows].unsqueeze(1)
                false = self._false(rows, left, right, block, limit_B1) & negative
                negatives_B += negative.sum(dim=1)
                masked_B += false.sum(dim=1)
                if left + right == "qd" and self.how.hardness_weight:
                    of = {"hard_negatives": same_row, "in_batch_negatives": ~same_row, "all_negatives": negative}
                    harder = of[self.how.hardness_of].to(block.dtype)
                    block.addcmul_(block, harder, value=self.how.hardness_weight / self.loss_scale)
                block.masked_fill_(false | ~negative, -torch.inf)
                if left != right:  # the pair of query and positive, which a joint softmax has in `qd` and in `dq`
                    block.scatter_(1, own_B1, positive_B1)
        if self.masked_B is not None:
            self.masked_B[rows] = (masked_B / negatives_B.clamp(min=1)).to(self.masked_B)

    def _limit(self, rows: slice, own_cosine_B1: Tensor) -> Tensor:
        """The guide's score [rows, 1] above which a negative is a false one."""
        query, document = self.pool.sides["q"], self.pool.sides["d"]
        if query.guide_ND is not None and document.guide_ND is not None:
            guides = query.guide_ND[query.own_B[rows]], document.guide_ND[document.own_B[rows]]
            own_cosine_B1 = (guides[0] * guides[1]).sum(dim=1, keepdim=True)
        share = own_cosine_B1.abs() if self.how.guide_margin_kind == "relative" else 1.0
        return own_cosine_B1 - share * self.how.guide_margin

    def _false(self, rows: slice, left: str, right: str, block: Tensor, limit_B1: Tensor) -> Tensor:
        """Which columns [rows, N] would answer the row's query."""
        texts, query, document = self.pool.sides[right], self.pool.sides["q"], self.pool.sides["d"]
        false = torch.zeros_like(block, dtype=torch.bool)
        if texts.answer_N is not None and document.answer_N is not None:
            false |= texts.answer_N == document.answer_N[document.own_B[rows]].unsqueeze(1)
            # Another row's query of the same text stands for the same answer; so do, if those are told, its positives.
            known = self.pool.known_BP
            if texts.asked_N is not None and query.asked_N is not None and (right == "q" or known is not None):
                false |= texts.asked_N == query.asked_N[query.own_B[rows]].unsqueeze(1)
            for known_B in () if known is None else known[rows].unbind(1):
                false |= texts.answer_N == known_B.unsqueeze(1)
        if self.how.guide is not None and texts.guide_ND is not None:
            of_left = self.pool.sides[left]
            assert of_left.guide_ND is not None, "a guide tells of all sides"
            false |= of_left.guide_ND[of_left.own_B[rows]] @ texts.guide_ND.T > limit_B1
        elif self.how.guide is not None:
            false |= block > self.loss_scale * limit_B1
        return false


@dataclass(frozen=True)
class RowFacts:
    """What an objective is told of a batch's texts beside their tokens; the collator asks for it side by side."""

    #: tell each text's `hash`, so that a copy of a query's positive is no negative of it
    mask_false_negatives: bool = False
    with_scores: bool = False  #: tell the teacher's `score` of each document
    #: sources whose queries are compared with their own row's documents only (`own_only`), as Li et al. 2024 do
    #: outside retrieval (arXiv 2409.15700)
    own_negatives_only: frozenset[str] = frozenset()
    #: tell hashes, and the queries' other positives (`known`), which are no negatives either
    mask_known_positives: bool = False
    #: gives texts their vectors of a stronger model, [texts, D], to be told as `guide`
    guide: Callable[[Sequence[InstructedText]], Tensor] | None = None
    teacher: Callable[[Sequence[InstructedText]], Tensor] | None = None  #: likewise, as `teacher`

    def __call__(self, rows: Sequence[Example], side: str) -> dict[str, Tensor]:
        """Facts of one side's texts, each [texts, ...], in row order; K negatives a row become K * B texts, row by
        row."""
        facts: dict[str, Tensor] = {}
        if side.partition(":")[0] not in ("query", "positive", "negative"):
            return facts
        texts = CollateSides.texts(rows, side)
        if self.mask_false_negatives or self.mask_known_positives:
            facts["hash"] = torch.tensor([hash_of(text) for text in texts])
        if self.guide is not None:
            facts["guide"] = self.guide(texts)
        if self.teacher is not None:
            facts["teacher"] = self.teacher(texts)
        if side == "query" and self.own_negatives_only:
            facts["own_only"] = torch.tensor([row.source in self.own_negatives_only for row in rows])
        if side == "query" and self.mask_known_positives:
            known = [[hash_of(text) for text in row.others] for row in rows]
            most = max(map(len, known))
            facts["known"] = torch.tensor([of_row + [-1] * (most - len(of_row)) for of_row in known]).long()
        if side != "query" and self.with_scores:
            of_side = slice(1, None) if side == "negative" else slice(1)
            facts["score"] = torch.tensor([score for row in rows for score in row.scores[of_side]])
        return facts


def hash_of(text: InstructedText) -> int:
    """63 bits of instruction and text, the same in every process: a pool of a million documents has a collision once
    in 18 million times."""
    content = f"{len(text.instruction)} {text.instruction}{text.text}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
