"""What can be added to Stage II, each part and all together, equals loops over pairs, however a step is cut."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import reference
import torch
import torch.distributed as dist
from helpers import family_tokenizer, tiny_model, write_jsonl
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm2vec import LLM2Vec
from llm2vec.data.collation import CollateSides
from llm2vec.data.lines import parse_row
from llm2vec.data.rows import read_rows
from llm2vec.distributed import sum_over_ranks
from llm2vec.model.backbone import attach_lora
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.losses import distillation, info_nce, linear_cross_entropy, unit
from llm2vec.objectives.negatives import ContrastiveKeys, Pool, RowFacts, Softmax, hash_of
from llm2vec.processes import rank, world_size
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.training.config.file import load_config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.step import backward_step, loss_parts, split_batch
from llm2vec.types import Example, Hardened, InstructedText, MarginKind, TextFacts, UserError
from tests.objectives.test_losses import Largest, Problem, blocked, gradients, plain, problem

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


@pytest.mark.parametrize("name", list(EACH))
def test_loss_and_every_gradient_equal_the_loops(name: str) -> None:
    """In one pass, and with the gradient cached: in a few micro-batches, and row by row."""
    parts = EACH[name]
    objective, collate = make(parts)
    rows = rows_with_copies()
    expected = Reference(objective, collate.tokenizer, rows, parts).figures()
    expected["loss"].backward()
    expected_gradients = reference.gradients(objective)
    batch = collate(rows)
    totals = objective.count(batch)
    third = sum(sum(side["lengths"]) for side in batch.values()) // 3
    for max_tokens in (None, third, 1):
        assert len(split_batch(batch, max_tokens)) == (1 if max_tokens is None else 8 if max_tokens == 1 else 4)
        actual = backward_step(objective, batch, totals, max_tokens=max_tokens)
        assert_same_figures(actual, expected)
        reference.assert_same_gradients(reference.gradients(objective), expected_gradients)
        figures = loss_parts(objective, batch, totals, max_tokens)
        assert figures.keys() == actual.keys()
        assert not any(value.requires_grad for value in (*figures.values(), *actual.values()))


@pytest.mark.parametrize("name", [name for name in EACH if name != "none"])
def test_every_part_changes_the_loss_and_the_gradient(name: str) -> None:
    """The guard of the test above."""
    found = []
    for parts in (EACH[name], EACH["none"]):
        objective, collate = make(parts)
        batch = collate(rows_with_copies())
        loss = backward_step(objective, batch, objective.count(batch))["loss"]
        found.append((loss, reference.gradients(objective)))
    (loss, of_part), (without, of_none) = found
    assert abs(loss / without - 1) > 1e-3
    with pytest.raises(AssertionError, match="apart"):
        # A projection to a teacher's vectors has gradients of its own.
        reference.assert_same_gradients({name: of_part[name] for name in of_none}, of_none, relative=0.01)


NEUTRAL = {
    "a margin that masks nothing": ContrastiveKeys(guide="self", guide_margin=-3.0),
    "relative": ContrastiveKeys(guide="self", guide_margin=-1e6, guide_margin_kind="relative"),
    "weights of 0": ContrastiveKeys(
        hardness_of="all_negatives", positive_margin=0.0, gor_weight=0.0, cosent_weight=0.0
    ),
    "one direction by itself": ContrastiveKeys(("qd",), "per_direction"),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_at_its_neutral_value_a_key_changes_no_bit(name: str) -> None:
    """Of the loss, and of any gradient, in float32."""
    leaves = [leaf.detach().float().requires_grad_() for leaf in columns()]
    for one, other in zip(ours(ContrastiveKeys(), leaves), ours(NEUTRAL[name], leaves), strict=True):
        assert torch.equal(one, other)


# --- two ranks ---


def own_rows(rows: list[Example]) -> list[Example]:
    share = len(rows) // world_size()
    return rows[rank() * share : (rank() + 1) * share]


def take_step(name: str, max_tokens: int | None, wrap: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Figures summed over ranks and averaged gradients of a step over all rows, this rank's share of them here."""
    objective, collate = make(EACH[name])
    batch = collate(own_rows(rows_with_copies()))
    totals = {part: sum_over_ranks(count) for part, count in objective.count(batch).items()}
    model: Any = DistributedDataParallel(objective) if wrap else objective
    further: dict[str, Any] = {"no_sync": model.no_sync} if wrap else {}
    parts = backward_step(model, batch, totals, max_tokens=max_tokens, scale=world_size(), **further)
    return {part: sum_over_ranks(value) for part, value in parts.items()}, reference.gradients(objective)


def work(process: int, folder: Path) -> None:
    """What each spawned process runs; its findings go to a file of its own."""
    os.environ["LOCAL_RANK"] = str(process)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=process, world_size=2)
    findings = {(name, max_tokens): take_step(name, max_tokens, True) for name in EACH for max_tokens in (None, 100)}
    torch.save(findings, folder / f"{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{process}.pt") for process in range(2)]


@pytest.mark.parametrize("max_tokens", [None, 100])
@pytest.mark.parametrize("name", list(EACH))
def test_two_ranks_equal_one_process(name: str, max_tokens: int | None, ranks: list[dict[Any, Any]]) -> None:
    """A copy of a query's positive is left out whichever rank holds it: rows 0 and 5 lie on different ones."""
    parts, expected = take_step(name, None, False)
    for found in ranks:
        figures, of_rank = found[name, max_tokens]
        assert figures.keys() == parts.keys()
        for part, value in parts.items():
            torch.testing.assert_close(figures[part], value, rtol=1e-6 if part == "masked_negatives" else 1e-9, atol=0)
        reference.assert_same_gradients(of_rank, expected)


# --- what is left out ---


def between(parts: Parts, total: float | None = None, **vectors: Any) -> dict[str, Tensor]:
    """The objective's loss parts over given vectors and facts in place of a model's."""
    objective = ContrastiveLearning(nn.Module(), SETTINGS, 1.0, distillation_weight=parts.weight)  # type: ignore[arg-type]
    held = {name: torch.as_tensor(rows) for name, rows in vectors.items()}
    held = {n: t.double() if t.is_floating_point() else t for n, t in held.items()}
    facts: TextFacts = {"query": {}, "positive": {}, "negative": {}}
    for name in [name for name in held if name not in facts]:  # such as `query_own_only`
        side, _, fact = name.partition("_")
        facts[side][fact] = held.pop(name)
    return objective.contrast(held, facts, {"contrastive": torch.tensor(total or float(len(held["query"])))})


def test_copies_of_the_positive_by_hand() -> None:
    """All cosines zero but one's own, so the loss counts the documents a query sees."""
    axes = torch.eye(8)
    vectors = {"query": axes[:2], "positive": axes[:2], "negative": axes[2:6]}
    hashes = {"positive_hash": [7, 8], "negative_hash": [9, 7, 7, 10]}
    parts = between(Parts(mask=True), **vectors, **hashes)
    losses = [math.log(math.e + 3) - 1, math.log(math.e + 5) - 1]
    assert parts["loss"].item() == pytest.approx(sum(losses) / 2)
    assert parts["masked_negatives"].item() == pytest.approx((2 / 5 + 0) / 2)
    alone = between(Parts(), **vectors, **hashes, query_own_only=[True, False])
    losses = [math.log(math.e + 1) - 1, math.log(math.e + 5) - 1]
    assert alone["loss"].item() == pytest.approx(sum(losses) / 2)
    assert alone["masked_negatives"].item() == pytest.approx((1 / 2 + 0) / 2)
    half = between(Parts(), 4.0, **vectors, **hashes, query_own_only=[True, False])  # one of two micro-batches
    assert half["masked_negatives"].item() == pytest.approx(alone["masked_negatives"].item() / 2)


def test_a_query_may_have_no_negative_left() -> None:
    """Every other document is a copy: no loss, no gradient and no NaN."""
    axes = torch.eye(4)
    parts = between(Parts(), query=axes[:2], positive=axes[[2, 2]], positive_hash=[5, 5])
    assert parts["loss"].item() == pytest.approx(0, abs=1e-12)
    assert parts["masked_negatives"] == parts["in_batch_accuracy"] == 1
    single = between(Parts(), query=axes[:1], positive=axes[1:2], positive_hash=[5])
    assert single["loss"].item() == single["masked_negatives"].item() == 0


def test_accuracy_is_among_the_documents_that_are_left() -> None:
    """Another row's copy of the positive scores higher by rounding; a foreign document does where there is no mask."""
    vectors: dict[str, Any] = {
        "query": [[1.0, 0, 0], [0, 1, 0]], "positive": [[1.0, 0.1, 0], [0, 1, 0]],
        "negative": [[0.0, 0, 1], [1, 0, 0]],
    }  # fmt: skip
    assert between(Parts(), **vectors)["in_batch_accuracy"] == 0.5
    assert between(Parts(), **vectors, query_own_only=[True, True])["in_batch_accuracy"] == 1
    assert between(Parts(), **vectors, positive_hash=[1, 2], negative_hash=[3, 1])["in_batch_accuracy"] == 1


def test_without_facts_nothing_is_masked() -> None:
    """The ordinary loss does not even ask."""
    pool = Pool.of({}, 2, 4, torch.device("cpu"))
    assert Softmax(("qd",), ContrastiveKeys(), pool, 20.0).adjust is None
    assert Softmax(("qd", "qq"), ContrastiveKeys(), pool, 20.0).adjust is not None
    objective, collate = make(Parts())
    assert all(not side["facts"] for side in collate(rows_with_copies()).values())
    assert objective(collate(rows_with_copies()), {}).facts == {}


def test_hash_tells_instruction_and_text_apart() -> None:
    texts = [
        InstructedText(*pair) for pair in (("", "ab"), ("a", "b"), ("ab", ""), ("", "a b"), ("1 ", ""), ("", "1 "))
    ]
    hashes = [hash_of(text) for text in texts]
    assert len(set(hashes)) == len(texts)
    assert all(0 <= value < 2**63 for value in hashes)
    assert max(hash_of(InstructedText("", str(i))) for i in range(100)) > 2**62
    assert hash_of(InstructedText("a", "b", "document")) == hash_of(InstructedText("a", "b", "query"))


def test_facts_follow_their_rows_into_the_pieces() -> None:
    """One entry a text, in the order of the texts, K negatives a row; pieces keep them with their tokens."""
    _, collate = make(EACH["all"])
    rows = rows_with_copies()
    batch = collate(rows)
    assert batch["query"]["facts"]["own_only"].tolist() == [row.source == "alone" for row in rows]
    assert batch["positive"]["facts"]["hash"].tolist() == [hash_of(row.positive) for row in rows]
    assert batch["negative"]["facts"]["hash"].tolist() == [hash_of(text) for row in rows for text in row.negatives]
    assert batch["positive"]["facts"]["score"].tolist() == [row.scores[0] for row in rows]
    assert batch["negative"]["facts"]["score"].tolist() == [score for row in rows for score in row.scores[1:]]
    for piece in split_batch(batch, 100):
        for name, side in piece.items():
            for ids, *facts in zip(side["input_ids"].split(side["lengths"]), *side["facts"].values(), strict=True):
                places = [i for i, other in enumerate(batch[name]["input_ids"].split(batch[name]["lengths"]))
                          if torch.equal(ids, other)]  # fmt: skip
                assert facts in [[values[i] for values in batch[name]["facts"].values()] for i in places]


# --- the losses ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block_rows", [1, 5, None])
def test_several_states_a_row_are_one_softmax(block_rows: int | None, dtype: torch.dtype) -> None:
    """Two states end to end, against the logits of both beside one another; what is added to them is a constant."""
    p = problem(rows=13, columns=29, width=12, dtype=dtype)
    weight_VD = p.weight_VD.detach()[:, :6].contiguous().requires_grad_()
    target_N = p.target_N + 29 * (torch.arange(13) % 2)
    added_NV = torch.rand(13, 58, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def add(rows: slice, logits: Tensor) -> None:
        logits += added_NV[rows].to(logits)

    found = linear_cross_entropy(p.hidden_ND, weight_VD, target_N, p.term_weight_N, block_rows, adjust=add)
    actual = torch.autograd.grad(found.loss, (p.hidden_ND, weight_VD))
    states, exact = p.hidden_ND.detach().double().requires_grad_(), weight_VD.detach().double().requires_grad_()
    logits_NV = torch.cat([states[:, :6] @ exact.T, states[:, 6:] @ exact.T], dim=1) + added_NV
    loss = (torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none") * p.term_weight_N).sum()
    expected = torch.autograd.grad(loss, (states, exact))
    tolerance = 1e-11 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(found.loss.double(), loss, rtol=tolerance, atol=0)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("block_rows", [1, 2, 5, 12, 13, 14, None])
def test_leaving_columns_out_does_not_depend_on_the_block(block_rows: int | None) -> None:
    """Value and both gradients are those of logits of minus infinity, however many rows are done at once."""
    p = problem(rows=13, columns=29)
    generator = torch.Generator().manual_seed(1)
    out_NV = (torch.rand(13, 29, generator=generator) < 0.3).scatter(1, p.target_N.unsqueeze(1), False)
    asked: list[int] = []

    def leave_out(rows: slice, logits: Tensor) -> None:
        asked.extend(range(*rows.indices(13)))
        logits.masked_fill_(out_NV[rows], -torch.inf)

    def with_all_logits(p: Problem) -> Tensor:
        logits_NV = (p.hidden_ND @ p.weight_VD.T).masked_fill(out_NV, -torch.inf)
        return -(logits_NV.log_softmax(dim=1).gather(1, p.target_N.unsqueeze(1))[:, 0] * p.term_weight_N).sum()

    def ours(p: Problem) -> Tensor:
        found = linear_cross_entropy(*p, block_rows=block_rows, adjust=leave_out)
        logits_NV = (p.hidden_ND @ p.weight_VD.T).masked_fill(out_NV, -torch.inf)
        assert found.hits.tolist() == (logits_NV.argmax(dim=1) == p.target_N).tolist()
        return found.loss

    actual, expected = gradients(p, ours), gradients(p, with_all_logits)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-15)
    assert asked == list(range(13))
    assert abs(actual[0] / gradients(p, plain)[0] - 1) > 0.01
    assert torch.equal(gradients(p, blocked(block_rows))[0], gradients(p, blocked(block_rows))[0])


def test_no_mask_is_larger_than_a_block() -> None:
    """Nor does the masked share compare all queries with all documents."""
    hash_N = torch.randint(50, (3000,), generator=torch.Generator().manual_seed(0))
    facts = {"positive": {"hash": hash_N[:1500]}, "negative": {"hash": hash_N[1500:]}}
    softmax = Softmax(("qd",), ContrastiveKeys(), Pool.of(facts, 1500, 3000, torch.device("cpu")), 1.0)
    p = problem(rows=1500, columns=3000, width=4)
    with Largest() as largest:
        linear_cross_entropy(
            p.hidden_ND, p.weight_VD, softmax.label_B, p.term_weight_N, 64, softmax.adjust
        ).loss.backward()
    assert largest.entries == 64 * 3000
    expected = [(int((hash_N == value).sum()) - 1) / 2999 for value in hash_N[:1500]]
    assert softmax.masked_B is not None and softmax.masked_B.tolist() == pytest.approx(expected)


def test_distillation_by_hand() -> None:
    """Cosines 1 and 0 at a scale of 2, a teacher that gives the positive three quarters; no gradient to the teacher."""
    query_BD = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    document_BGD = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    teacher_BG = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    log_z = math.log(math.exp(2) + 1)
    loss = distillation(query_BD, document_BGD, teacher_BG.detach(), 2.0, torch.tensor([0.5]))
    assert loss.item() == pytest.approx(0.5 * -(0.75 * (2 - log_z) + 0.25 * (0 - log_z)), rel=1e-12)
    facts = {"positive_score": [3.0], "negative_score": [1.0]}
    parts = between(Parts(weight=2.0), query=[[1.0, 0]], positive=[[1.0, 0]], negative=[[0.0, 1]], **facts)
    assert parts["loss"].item() == pytest.approx((parts["loss_contrastive"] + 2 * parts["loss_distillation"]).item())


def test_the_best_student_is_the_teacher() -> None:
    """The gradient of the term is zero where the student's scores are the teacher's."""
    query_BD, document_BGD = unit(torch.randn(3, 8, dtype=torch.float64)), unit(torch.randn(3, 4, 8).double())
    document_BGD.requires_grad_()
    teacher_BG = 20 * torch.einsum("bd,bgd->bg", query_BD, document_BGD).detach()
    distillation(query_BD, document_BGD, teacher_BG + 5, 20.0, torch.ones(3).double()).backward()
    assert document_BGD.grad is not None and document_BGD.grad.abs().max() < 1e-12


def test_a_truncation_of_all_numbers_is_the_plain_loss() -> None:
    """And the mean over two truncations is the mean of their losses."""
    rows = rows_with_copies()
    found = {}
    for dims in (None, [32], [8], [8, 32]):
        objective, collate = make(Parts(dims=dims))
        batch = collate(rows)
        found[str(dims)] = loss_parts(objective, batch, objective.count(batch))["loss"].item()
    assert found["[32]"] == pytest.approx(found["None"], rel=1e-12)
    assert found["[8, 32]"] == pytest.approx((found["[8]"] + found["[32]"]) / 2, rel=1e-12)
    assert abs(found["[8]"] / found["[32]"] - 1) > 0.01
    query_BD, document_ND = torch.randn(3, 8).double(), torch.randn(5, 8).double()
    label_B, weight_B = torch.arange(3), torch.ones(3).double()
    cut = info_nce(unit(unit(query_BD)[:, :4]), unit(unit(document_ND)[:, :4]), label_B, 20.0, weight_B)
    expected = info_nce(unit(query_BD[:, :4]), unit(document_ND[:, :4]), label_B, 20.0, weight_B)
    torch.testing.assert_close(cut.loss, expected.loss, rtol=1e-12, atol=0)


def test_a_truncation_beyond_the_hidden_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"matryoshka_dims: 33 is more than the model's hidden size, 32\."):
        make(Parts(dims=[8, 33]))


@pytest.mark.parametrize("name", list(EACH))
def test_half_precision_vectors(name: str) -> None:
    """Losses are computed in float32 at least, whatever the vectors come in."""
    objective, collate = make(EACH[name])
    batch = collate(rows_with_copies())
    totals = objective.count(batch)
    output = objective(batch, totals)
    exact = objective.contrast(output.vectors, output.facts, totals)
    half = {side: vectors.bfloat16() for side, vectors in output.vectors.items()}
    parts = objective.contrast(half, output.facts, totals)
    for part, value in parts.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[part].double(), rtol=0.1, atol=0.02)


# --- others' implementations of the same formulas ---


def columns(width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Six queries with a positive and two hard negatives each."""
    generator = torch.Generator().manual_seed(5)
    query_BD, positive_BD, negative_BKD = (
        torch.randn(*shape, width, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((6,), (6,), (6, 2))
    )
    return query_BD, positive_BD, negative_BKD


def ours(
    how: ContrastiveKeys, leaves: Sequence[Tensor], facts: TextFacts | None = None, scale: float = 20.0
) -> list[Tensor]:
    """The loss and its gradients."""
    objective = ContrastiveLearning(nn.Module(), SETTINGS, 20.0, how=how)  # type: ignore[arg-type]
    sides = {"query": leaves[0], "positive": leaves[1], **({"negative": leaves[2].flatten(0, 1)} if leaves[2:] else {})}
    loss = objective.contrast(sides, facts or {}, {"contrastive": torch.tensor(6.0)})["loss"]
    return [loss, *torch.autograd.grad(loss, leaves)]


def theirs(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return [loss, *torch.autograd.grad(loss, leaves)]


def assert_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for actual, expected in zip(one, other, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


LONG_NAMES = {"qd": "query_to_doc", "dq": "doc_to_query", "qq": "query_to_query", "dd": "doc_to_doc"}


@pytest.mark.parametrize(
    "how",
    [
        ContrastiveKeys(),
        ContrastiveKeys(ALL_DIRECTIONS),
        ContrastiveKeys(("qd", "qq")),
        ContrastiveKeys(("qd", "dd")),
        ContrastiveKeys(("qd", "dq")),
        ContrastiveKeys(("qd", "dq"), "per_direction"),
        *(ContrastiveKeys(ALL_DIRECTIONS, hardness_weight=5.0, hardness_of=of) for of in get_args(Hardened)),
    ],
    ids=str,
)
def test_directions_and_hardness_are_sentence_transformers(how: ContrastiveKeys) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    query_BD, positive_BD, negative_BKD = leaves = columns()
    directions: Any = tuple(LONG_NAMES[name] for name in how.directions or ("qd",))
    hardness = {"hardness_mode": how.hardness_of, "hardness_strength": how.hardness_weight}
    loss = losses.MultipleNegativesRankingLoss(
        None, directions=directions, partition_mode=how.partition, **(hardness if how.hardness_weight else {})
    )
    value = loss.compute_loss_from_embeddings([query_BD, positive_BD, *negative_BKD.unbind(1)], None)
    assert_equal(ours(how, leaves), theirs(value, leaves))


@pytest.mark.parametrize("margin", [0.15, -0.1])
@pytest.mark.parametrize("kind", get_args(MarginKind))
def test_the_guide_is_gist(kind: Any, margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pairs alone: GIST compares positives with positives, and we a positive with all documents of other rows.

    Where the guide's own pair is nearer than 1 + margin, GIST compares a text with itself; here it never is.
    """
    gist = pytest.importorskip("sentence_transformers.sentence_transformer.losses.gist_embed")
    monkeypatch.setattr(gist, "embed_columns", lambda model, features: model)
    leaves, (query_BD, positive_BD, _) = columns()[:2], columns(4)
    guides = [(query_BD + 0.5 * positive_BD).detach(), positive_BD.detach()]
    assert unit(guides[0]).mul(unit(guides[1])).sum(dim=1).max() < 0.9
    loss = gist.GISTEmbedLoss.__new__(gist.GISTEmbedLoss)
    nn.Module.__init__(loss)
    values = {
        "model": list(leaves), "guide": guides, "temperature": 0.05, "margin_strategy": kind, "margin": margin,
        "contrast_anchors": True, "contrast_positives": True, "gather_across_devices": False, "must_retokenize": False,
        "similarity_fct": nn.CosineSimilarity(dim=-1), "cross_entropy_loss": nn.CrossEntropyLoss(),
    }  # fmt: skip
    for name, value in values.items():
        setattr(loss, name, value)
    how = ContrastiveKeys(("qd", "qq", "dd"), guide="stored", guide_margin=margin, guide_margin_kind=kind)
    facts: TextFacts = {"query": {"guide": guides[0]}, "positive": {"guide": guides[1]}}
    found = ours(how, leaves, facts)
    assert_equal(found, theirs(loss([], None), leaves))
    assert found[0] < ours(ContrastiveKeys(("qd", "qq", "dd")), leaves)[0]  # it masks something


def test_spreading_out_is_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    for width in (4, 9):  # fewer numbers than vectors, and more
        leaves = columns(width)
        value = losses.GlobalOrthogonalRegularizationLoss(None, mean_weight=0.3, second_moment_weight=2.0)
        found = value.compute_loss_from_embeddings([leaves[0], leaves[1], *leaves[2].unbind(1)])
        how = ContrastiveKeys(contrastive_weight=0.0, gor_mean_weight=0.3, gor_weight=2.0)
        assert_equal(ours(how, leaves), theirs(found["gor_mean"] + found["gor_second_moment"], leaves))


@pytest.mark.parametrize("metric", ["cosine", "mse"])
def test_a_teachers_vectors_are_sentence_transformers(metric: str) -> None:
    """Of unit vectors; a projection of theirs has the same weights."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    how = replace(TEACHER, contrastive_weight=0.0, teacher_cosine_weight=float(metric == "cosine"),
                  teacher_mse_weight=float(metric == "mse"), teacher_similarity_weight=0.0)  # fmt: skip
    objective, collate = make(Parts(how=how))
    batch = collate(rows_with_copies())
    loss = loss_parts(objective, batch, objective.count(batch))["loss"]
    output = objective(batch, {})
    assert output.parts == {}
    students = {side: unit(vectors) for side, vectors in output.vectors.items()}
    teachers = {side: unit(facts["teacher"]) for side, facts in output.facts.items()}
    of_columns = [
        [of["query"], of["positive"], *of["negative"].unflatten(0, (8, NUM_NEGATIVES)).unbind(1)]
        for of in (students, teachers)
    ]
    theirs = losses.EmbedDistillLoss(None, metric)
    theirs.projection = objective.projection
    expected = theirs.compute_loss_from_embeddings(*of_columns)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)  # the vectors are stored in float32


def test_a_teacher_of_another_size_needs_a_projection() -> None:
    with pytest.raises(UserError, match=r"teacher_vectors: they have 5 numbers, and the model's 32; set teacher_proj"):
        make(Parts(how=replace(TEACHER, teacher_projection=False)))


def test_cosent_is_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    leaves = columns()[:2]
    label_B = torch.tensor([0.1, 0.7, 0.7, -0.2, 1.0, 0.1], dtype=torch.float64)
    value = losses.CoSENTLoss(None).compute_loss_from_embeddings(list(leaves), label_B)
    how = ContrastiveKeys(contrastive_weight=0.0, cosent_weight=1.0)
    assert_equal(ours(how, leaves, {"positive": {"score": label_B}}), theirs(value, leaves))


# --- encoding ---


@pytest.mark.parametrize("normalize", [False, True])
def test_encode_cuts_then_normalises(normalize: bool) -> None:
    model = LLM2Vec(tiny_model("llama"), family_tokenizer("llama"), "last", normalize=normalize, template="llama3")
    texts = ["hello world", "who wrote it", "hello world"]
    whole, cut = (model.encode(texts, show_progress_bar=False, device="cpu", truncate_dim=d) for d in (None, 8))
    assert isinstance(whole, Tensor) and isinstance(cut, Tensor)
    assert (whole.shape, cut.shape) == ((3, 32), (3, 8))
    torch.testing.assert_close(cut, unit(whole[:, :8]) if normalize else whole[:, :8])
    full = model.encode(texts, show_progress_bar=False, device="cpu", truncate_dim=32)
    assert isinstance(full, Tensor) and torch.equal(full, whole)
    for wrong in (0, 33, -1):
        with pytest.raises(UserError, match=f"truncate_dim is {wrong}; it must lie between 1 and the hidden size 32"):
            model.encode(texts, truncate_dim=wrong)


# --- rows with a teacher's scores ---


def line(**fields: Any) -> bytes:
    return json.dumps({"query": "q", "positive": "d", "negative": ["n", "m"]} | fields).encode()


def test_scores_are_read_with_as_many_negatives_as_asked_for() -> None:
    whole = line(pos_score=2, neg_scores=[0.5, -1])
    assert parse_row(whole, 2, "here", True)["scores"] == [2.0, 0.5, -1.0]
    assert parse_row(whole, 1, "here", True) == {"query": "q", "positive": "d", "negative": ["n"], "scores": [2.0, 0.5]}
    assert "scores" not in parse_row(whole, 2, "here")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the field `pos_score` is missing, which distillation_weight needs"),
        ({"pos_score": 1.0}, "the field `neg_scores` is missing, which distillation_weight needs"),
        ({"pos_score": 1.0, "neg_scores": [1.0]}, "as many numbers as the row has negatives (2)"),
        ({"pos_score": 1.0, "neg_scores": 1.0}, "`neg_scores` must be a list"),
        ({"pos_score": None, "neg_scores": [1.0, 2.0]}, "None is no score"),
        ({"pos_score": True, "neg_scores": [1.0, 2.0]}, "True is no score"),
        ({"pos_score": 1.0, "neg_scores": [1.0, "2"]}, "'2' is no score"),
        ({"pos_score": math.nan, "neg_scores": [1.0, 2.0]}, "nan is no score"),
        ({"pos_score": 10**400, "neg_scores": [1.0, 2.0]}, "is no score"),
    ],
    ids=str,
)
def test_bad_scores_are_an_error_with_file_and_line(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = json.loads(line(pos_score=2, neg_scores=[0.5, -1]))
    file = write_jsonl(tmp_path / "a.jsonl", [good, json.loads(line(**fields))])
    with pytest.raises(UserError) as error:
        read_rows(file, 2, with_scores=True)
    assert str(error.value).startswith(f"{file}, line 2: ")
    assert message in str(error.value)
    assert len(read_rows(file, 2)[0]) == 2  # nobody asks for them
    assert read_rows(write_jsonl(tmp_path / "b.jsonl", [good]), 1, with_scores=True)[0][0]["scores"] == [2.0, 0.5]


# --- the script ---


def rows_of_files() -> list[Example]:
    """The rows with copies but for those that a file's reader leaves out: a negative that is its own row's positive."""
    other = reference.examples(1, 1, seed=5)[0].negatives[0]
    return [
        row._replace(negatives=tuple(other if text.text == row.positive.text else text for text in row.negatives))
        for row in rows_with_copies()
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model, and two sources of rows with scores in which texts repeat."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    rows = [
        {
            "query": row.query.text,
            "positive": row.positive.text,
            "negative": [text.text for text in row.negatives],
            "pos_score": row.scores[0],
            "neg_scores": row.scores[1:],
        }
        for row in rows_of_files()
    ]
    for source in ("words", "alone"):
        write_jsonl(tmp_path / f"{source}.jsonl", rows)
    table = {source: {"file": f"{source}.jsonl", "instruction": "find it"} for source in ("words", "alone")}
    (tmp_path / "sources.json").write_text(json.dumps(table), encoding="utf-8")
    return tmp_path


def run_script(folder: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> list[dict[str, float]]:
    """Stage II in this process; returns its log."""
    config = {
        "model_name_or_path": str(folder / "base"), "output_dir": str(folder / "out"),
        "sources_file": str(folder / "sources.json"), "num_hard_negatives": NUM_NEGATIVES,
        "max_seq_length": 128, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "lora_r": 4,
        "num_train_epochs": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True,
    } | keys  # fmt: skip
    file = folder / "run.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run_stage_II.py", str(file)])
    runpy.run_path(str(ROOT / "experiments/run_stage_II.py"), run_name="__main__")
    lines = (folder / "out" / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def test_everything_on_trains_and_is_logged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three negatives a row, in pieces: the loss is made of its parts, and copies are masked in each source."""
    log = run_script(
        folder,
        monkeypatch,
        matryoshka_dims=[8, 32],
        mask_false_negatives=True,
        own_negatives_only=["alone"],
        distillation_weight=0.5,
        tokens_per_microbatch=200,
    )
    assert len(log) == 8
    for entry in log:
        expected = entry["loss_contrastive"] + 0.5 * entry["loss_distillation"]
        assert entry["loss"] == pytest.approx(expected, abs=2e-4)  # the library rounds it
    shares = {round(entry["masked_negatives"], 4) for entry in log}
    rows = rows_of_files()
    positives = [row.positive.text for row in rows]
    everything = [text for row in rows for text in (row.positive.text, *(n.text for n in row.negatives))]
    in_pool = sum((everything.count(text) - 1) / 31 for text in positives) / 8
    assert shares == {round(in_pool, 4), 0.0}  # of the source whose queries see their own row alone
    assert sum(entry["loss"] for entry in log[-4:]) < sum(entry["loss"] for entry in log[:4])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"matryoshka_dims": [64]}, "matryoshka_dims: 64 is more than the model's hidden size, 32."),
        (
            {"own_negatives_only": ["worlds"]},
            "own_negatives_only: 'worlds' is not among the sources of this run: words",
        ),
        ({"own_negatives_only": ["alone"], "sources": ["words"]}, "'alone' is not among the sources"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_before_training(
    keys: dict[str, Any],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_script(folder, monkeypatch, **keys)
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"matryoshka_dims": []}, "matryoshka_dims is []; different sizes above 0 are needed"),
        ({"matryoshka_dims": [8, 0]}, "different sizes above 0 are needed"),
        ({"matryoshka_dims": [8, 8]}, "different sizes above 0 are needed"),
        ({"matryoshka_dims": 8}, "matryoshka_dims is 8"),
        ({"distillation_weight": -0.5}, "distillation_weight is -0.5; 0 or more is needed"),
        (
            {"distillation_weight": 1, "num_hard_negatives": 0},
            "distillation_weight is set, but num_hard_negatives is 0",
        ),
        ({"own_negatives_only": ["a"], "num_hard_negatives": 0}, "own_negatives_only is set, but num_hard_negatives"),
        ({"own_negatives_only": []}, "name at least one source, or leave the key out"),
        ({"mask_false_negatives": 1}, "mask_false_negatives is 1"),
        ({"dataset_name": "Wiki1M"}, "dataset_name is 'Wiki1M', which has no queries"),
        ({"simcse_dropout": 0.3}, "simcse_dropout has no effect in stage_II; it belongs to simcse"),
    ],
    ids=str,
)
def test_a_wrong_key_is_one_sentence(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    config = {"model_name_or_path": "m", "output_dir": str(tmp_path / "o"), "dataset_file_path": "d", **keys}
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(file, "stage_II")
    assert str(error.value).startswith(str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["matryoshka_dims", "mask_false_negatives", "own_negatives_only", "distillation_weight"]
)
def test_the_keys_belong_to_stage_II(key: str, tmp_path: Path) -> None:
    values: dict[str, Callable[[], Any]] = {"matryoshka_dims": lambda: [8], "own_negatives_only": lambda: ["a"]}
    value = values.get(key, lambda: True if key.startswith("mask") else 1.0)()
    file = tmp_path / "run.json"
    config = {"model_name_or_path": "m", "output_dir": "o", "dataset_file_path": "d", key: value}
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=f"{key} has no effect in stage_I; it belongs to stage_II"):
        load_config(file, "stage_I")
    assert getattr(load_config(file, "stage_II"), key) == value
