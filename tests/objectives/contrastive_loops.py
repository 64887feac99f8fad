"""Stage II with whatever can be added to it, as loops over one pair at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import reference
import torch
from helpers import family_tokenizer, tiny_model
from torch import Tensor, nn

from llm2vec.data.collation import CollateSides
from llm2vec.model.backbone import attach_lora
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.negatives import ContrastiveKeys, RowFacts, hash_of
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import Example, InstructedText

ROOT = Path(__file__).parents[2]
SETTINGS = EncoderSettings(pooling_mode="last", attention="causal")
NUM_NEGATIVES = 3
#: Low, so that every document weighs in the loss.
LOSS_SCALE = 3.0


class Parts(NamedTuple):
    """Which parts are on."""

    dims: list[int] | None = None
    mask: bool = False
    own_only: tuple[str, ...] = ()
    weight: float = 0.0
    known: bool = False
    stored: bool = False
    how: ContrastiveKeys = ContrastiveKeys()


ALL_DIRECTIONS: Any = ("qd", "dq", "qq", "dd")
EVERYTHING = ContrastiveKeys(
    ALL_DIRECTIONS, "joint", 0.1, 0.8, "all_negatives", "stored", 0.1, "relative", 0.9, 0.3, 2.0, 1.5
)
TEACHER = ContrastiveKeys(
    teacher_vectors="stored",
    teacher_cosine_weight=0.8,
    teacher_mse_weight=1.5,
    teacher_similarity_weight=0.6,
    teacher_projection=True,
)
EACH = {
    "none": Parts(),
    "matryoshka": Parts(dims=[4, 16, 32]),
    "mask": Parts(mask=True),
    "own_only": Parts(own_only=("alone",)),
    "distillation": Parts(weight=0.7),
    "all": Parts([5, 32], True, ("alone",), 1.5),
    "known": Parts(known=True),
    "self": Parts(how=ContrastiveKeys(guide="self", guide_margin=-0.1)),
    "self, relative": Parts(how=ContrastiveKeys(guide="self", guide_margin=0.3, guide_margin_kind="relative")),
    "guide": Parts(stored=True, how=ContrastiveKeys(guide="stored", guide_margin=-0.2)),
    "joint": Parts(mask=True, how=ContrastiveKeys(ALL_DIRECTIONS)),
    "joint, dd": Parts(own_only=("alone",), how=ContrastiveKeys(("qd", "dd"))),
    "joint, qq": Parts(known=True, how=ContrastiveKeys(("qq", "qd"), guide="self", guide_margin=-0.3)),
    "per_direction": Parts(mask=True, own_only=("alone",), how=ContrastiveKeys(("dq", "qd"), "per_direction")),
    "positive_margin": Parts(how=ContrastiveKeys(positive_margin=0.2)),
    "harder own": Parts(how=ContrastiveKeys(hardness_weight=5.0)),
    "harder others": Parts(how=ContrastiveKeys(hardness_weight=2.0, hardness_of="in_batch_negatives")),
    "cosent": Parts(how=ContrastiveKeys(contrastive_weight=0.0, cosent_weight=0.5)),
    "gor": Parts(how=ContrastiveKeys(gor_weight=2.0, gor_mean_weight=0.5)),
    "teacher": Parts(how=TEACHER),
    "teacher, cut": Parts([8, 32], how=replace(TEACHER, teacher_cosine_weight=0.0, teacher_similarity_weight=0.0)),
    "everything": Parts([8, 32], True, ("alone",), 0.5, True, True, EVERYTHING),
}


def rows_with_copies() -> list[Example]:
    """Eight rows with three negatives each, a teacher's scores, and texts that stand in several places."""
    rows = reference.examples(8, NUM_NEGATIVES)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-12, 12, (8, 1 + NUM_NEGATIVES), generator=generator) / 4
    rows = [row._replace(scores=tuple(score)) for row, score in zip(rows, scores.tolist(), strict=True)]
    first, other = rows[0].positive, rows[1].positive

    def put(i: int, **places: InstructedText) -> None:
        negatives = list(rows[i].negatives)
        for place, text in places.items():
            if place == "positive":
                rows[i] = rows[i]._replace(positive=text)
            else:
                negatives[int(place[-1])] = text
        rows[i] = rows[i]._replace(negatives=tuple(negatives))

    put(3, at_1=rows[3].positive)  # among its own hard negatives
    put(5, positive=first, at_0=first)  # another row's positive, and a hard negative beside it
    put(6, at_2=first, at_0=other)
    put(7, positive=InstructedText("find it", other.text))  # under another instruction: no copy
    rows[4] = rows[4]._replace(query=rows[2].query)  # one query with two positives
    rows[0] = rows[0]._replace(others=(rows[4].negatives[1], rows[7].positive))
    rows[6] = rows[6]._replace(others=(rows[2].positive,))
    return [row._replace(source="alone" if i in (1, 3, 6) else "words") for i, row in enumerate(rows)]


def make(parts: Parts, dtype: torch.dtype = torch.float64) -> tuple[ContrastiveLearning, CollateSides]:
    """An objective over a random model with a LoRA adapter whose B is not zero, and what makes its batches."""
    torch.manual_seed(0)
    model = reference.exact(attach_lora(tiny_model("llama", initializer_range=0.2), r=4, alpha=8, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    objective = ContrastiveLearning(
        model.to(dtype),  # type: ignore[arg-type]
        SETTINGS,
        LOSS_SCALE,
        matryoshka_dims=parts.dims,
        distillation_weight=parts.weight,
        how=parts.how,
        teacher_width=5 if parts.how.teacher_vectors else None,
    ).to(dtype)

    def stored(texts: Sequence[InstructedText]) -> Tensor:
        return torch.tensor([guide_vector(text) for text in texts])

    facts = RowFacts(
        parts.mask,
        parts.weight + parts.how.cosent_weight > 0,
        frozenset(parts.own_only),
        parts.known,
        stored if parts.stored else None,
        stored if parts.how.teacher_vectors else None,
    )
    collate = CollateSides(
        row_tokenizer(family_tokenizer("llama"), SETTINGS), ("query", "positive", "negative"), facts=facts
    )
    return objective.train(), collate


def guide_vector(text: InstructedText) -> list[float]:
    """What a stronger model is taken to say of a text: five numbers, mostly of one direction."""
    generator = torch.Generator().manual_seed(hash_of(text))
    return (torch.randn(5, generator=generator) + 1).tolist()


# --- one pair at a time ---


def same(one: InstructedText, other: InstructedText) -> bool:
    return (one.instruction, one.text) == (other.instruction, other.text)


def guided(one: InstructedText, two: InstructedText) -> float:
    """Cosine of the stronger model's vectors."""
    return float(reference.cosine(*(torch.tensor(guide_vector(text)).double() for text in (one, two))))


class Reference:
    """The same figures from loops over queries and documents; every text goes through the model alone."""

    def __init__(
        self, objective: ContrastiveLearning, renderer: RowTokenizer, rows: Sequence[Example], parts: Parts
    ) -> None:
        def vector(text: InstructedText) -> Tensor:
            return reference.embedding(objective.model, renderer.rows([text])[0])

        self.projection = objective.projection

        self.rows, self.parts, self.how = rows, parts, parts.how
        self.queries = [vector(row.query) for row in rows]
        self.groups = [[(text, vector(text)) for text in (row.positive, *row.negatives)] for row in rows]

    def figures(self) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for size in self.parts.dims or [len(self.queries[0])]:
            for name, value in self.of_size(size).items():
                found.setdefault(name, []).append(value)
        return {name: sum(values[1:], values[0]) / len(values) for name, values in found.items()}

    def of_size(self, size: int) -> dict[str, Tensor]:
        def cosine(one: Tensor, other: Tensor) -> Tensor:
            return reference.cosine(one[:size], other[:size])

        terms, masked, imitations, pairs = [], [], [], []
        for i, row in enumerate(self.rows):
            own = [cosine(self.queries[i], document) for _, document in self.groups[i]]
            softmaxes = [self.softmax(i, directions, cosine, own[0]) for directions in self.softmaxes()]
            terms += [sum(term for term, _ in softmaxes) / len(softmaxes)]
            masked += [sum(share for _, share in softmaxes) / len(softmaxes)]
            teacher = [math.exp(s) / sum(map(math.exp, row.scores)) for s in row.scores]
            normaliser = (LOSS_SCALE * torch.stack(own)).logsumexp(0)
            imitations += [-sum(t * (LOSS_SCALE * c - normaliser) for t, c in zip(teacher, own, strict=True))]
            pairs += zip(row.scores, own, strict=True)
        figures = {"loss_contrastive": torch.stack(terms).mean()}
        loss = self.how.contrastive_weight * figures["loss_contrastive"]
        if self.parts.weight:
            figures["loss_distillation"] = torch.stack(imitations).mean()
            loss = loss + self.parts.weight * figures["loss_distillation"]
        if self.parts.mask or self.parts.known or self.how.guide:
            figures["masked_negatives"] = torch.tensor(sum(masked) / len(masked), dtype=torch.float64)
        if self.how.cosent_weight:
            terms = [torch.exp(LOSS_SCALE * (d - c)) for x, c in pairs for y, d in pairs if x > y]
            figures["loss_cosent"] = torch.log(1 + sum(terms))
            loss = loss + self.how.cosent_weight * figures["loss_cosent"]
        if self.how.spreads:
            columns = [self.queries, *([group[k][1] for group in self.groups] for k in range(1 + NUM_NEGATIVES))]
            means, squares = [], []
            for column in columns:
                cosines = [cosine(a, b) for i, a in enumerate(column) for j, b in enumerate(column) if i != j]
                means.append((sum(cosines) / len(cosines)) ** 2)
                squares.append((sum(c**2 for c in cosines) / len(cosines) - 1 / size).relu())
            figures["gor_mean"], figures["gor_square"] = sum(means) / len(means), sum(squares) / len(squares)
            loss = loss + self.how.gor_mean_weight * figures["gor_mean"] + self.how.gor_weight * figures["gor_square"]
        if self.how.teacher_vectors:
            loss = loss + self.taught(figures, size, cosine)
        return figures | {"loss": loss}

    def taught(self, figures: dict[str, Tensor], size: int, cosine: Any) -> Tensor:
        """The weighted terms of a teacher, each of them put among the figures."""
        far, squares, imitations = [], [], []
        assert self.projection is not None
        for row, query, group in zip(self.rows, self.queries, self.groups, strict=True):
            for text, vector in [(row.query, query), *group]:
                teacher = torch.tensor(guide_vector(text)).double()
                short = vector[:size] / vector[:size].norm()
                student = sum(short[k] * self.projection.weight[:, k] for k in range(size)) + self.projection.bias
                far.append(1 - reference.cosine(student, teacher))
                squares.append(sum((student - teacher / teacher.norm()) ** 2) / 5)
            own = LOSS_SCALE * torch.stack([cosine(query, document) for _, document in group])
            of_teacher = [LOSS_SCALE * guided(row.query, text) for text, _ in group]
            shares = torch.tensor(of_teacher, dtype=torch.float64).softmax(0)
            imitations.append(-(shares * (own - own.logsumexp(0))).sum())
        terms = {"cosine": sum(far) / len(far), "mse": sum(squares) / len(squares)}
        weights = {name: getattr(self.how, f"teacher_{name}_weight") for name in ("cosine", "mse", "similarity")}
        if weights["similarity"]:
            terms["similarity"] = sum(imitations) / len(imitations)
        figures |= {f"loss_teacher_{name}": term for name, term in terms.items()}
        return sum(weights[name] * term for name, term in terms.items())

    def softmaxes(self) -> list[tuple[str, ...]]:
        directions = tuple(self.how.directions or ("qd",))
        return [directions] if self.how.partition == "joint" else [(direction,) for direction in directions]

    def softmax(self, i: int, directions: Sequence[str], cosine: Any, positive: Tensor) -> tuple[Tensor, float]:
        """-log of the positive's share, and the share of the negatives that are left out."""
        row, how = self.rows[i], self.how
        own = LOSS_SCALE * (positive - how.positive_margin)
        logits: list[Tensor] = []
        kept = masked = 0
        for left, right in directions:
            query = (row.query, self.queries[i]) if left == "q" else self.groups[i][0]
            for j, other in enumerate(self.rows):
                texts = [(other.query, self.queries[j])] if right == "q" else self.groups[j]
                for place, (text, vector) in enumerate(texts):
                    if left == right and i == j:
                        continue
                    if left != right and (i, 0) == (j, place):
                        logits.append(own)
                        continue
                    if row.source in self.parts.own_only and i != j:
                        continue
                    score = cosine(query[1], vector)
                    if self.is_false(i, j, place, right, query[0], text, score.item(), positive.item()):
                        masked += 1
                        continue
                    kept += 1
                    harder = {"hard_negatives": i == j, "in_batch_negatives": i != j, "all_negatives": True}
                    hardness = how.hardness_weight if left + right == "qd" and harder[how.hardness_of] else 0.0
                    logits.append(LOSS_SCALE * score + hardness * score.detach())
        return torch.stack(logits).logsumexp(0) - own, masked / max(1, kept + masked)

    def is_false(
        self, i: int, j: int, place: int, right: str, left: InstructedText, text: InstructedText, s: float, own: float
    ) -> bool:
        row, other = self.rows[i], self.rows[j]
        if self.parts.mask or self.parts.known:
            if same(text if right == "d" else other.positive, row.positive):
                return True
            if right == "q" and same(other.query, row.query):
                return True
        if self.parts.known and place == 0 and same(other.query, row.query):
            return True
        if self.parts.known and any(same(known, text if right == "d" else other.positive) for known in row.others):
            return True
        if self.how.guide is None:
            return False
        if self.how.guide == "stored":
            s, own = guided(left, text), guided(row.query, row.positive)
        return s > own - self.how.guide_margin * (abs(own) if self.how.guide_margin_kind == "relative" else 1)


def assert_same_figures(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() - {"in_batch_accuracy"} == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-6 if name == "masked_negatives" else 1e-9
        torch.testing.assert_close(actual[name].double(), value.detach().double(), rtol=tolerance, atol=0)
