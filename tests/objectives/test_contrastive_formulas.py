"""Stage II's keys against others' implementations of the same formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from helpers import tiny_model
from torch import Tensor, nn

from llm2vec.model.settings import EncoderSettings
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.losses import unit
from llm2vec.objectives.negatives import ContrastiveKeys
from llm2vec.training.step import backward_step, loss_parts
from llm2vec.types import Hardened, MarginKind, TextFacts, UserError
from tests.objectives.contrastive_loops import (
    ALL_DIRECTIONS,
    NUM_NEGATIVES,
    SETTINGS,
    TEACHER,
    Parts,
    make,
    rows_with_copies,
)


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


def test_by_a_teacher_alone_no_rows_are_compared() -> None:
    """So each text passes once, in pieces too; the gradient is that beside a softmax of no weight."""
    how = replace(TEACHER, contrastive_weight=0.0, teacher_similarity_weight=0.0)
    of_ways = []
    for max_tokens, compares in ((None, False), (64, False), (None, True)):
        objective, collate = make(Parts(how=how))
        assert not objective.contrasts
        objective.contrasts = compares
        batch = collate(rows_with_copies())
        figures = backward_step(objective, batch, objective.count(batch), max_tokens=max_tokens)
        assert ("in_batch_accuracy" in figures) is compares
        of_ways.append([figures["loss"], *(p.grad for p in objective.parameters() if p.grad is not None)])
    for found in of_ways[:2]:
        torch.testing.assert_close(found, of_ways[2])
    for changed in ({"contrastive_weight": 0.1}, {"teacher_similarity_weight": 0.1}, {"gor_weight": 1.0}):
        assert make(Parts(how=replace(how, **changed)))[0].contrasts


def test_a_teacher_of_another_size_needs_a_projection() -> None:
    with pytest.raises(UserError, match=r"teacher_vectors: they have 5 numbers, and the model's 32; set teacher_proj"):
        make(Parts(how=replace(TEACHER, teacher_projection=False)))
    model, settings, how = tiny_model("llama"), EncoderSettings("last"), ContrastiveKeys(teacher_vectors="v")
    for dims in ([8, 32], [8]):
        with pytest.raises(UserError, match=r"they have 32 numbers, and the model's 8; set teacher_projection to true"):
            ContrastiveLearning(model, settings, matryoshka_dims=dims, how=how, teacher_width=32)
    ContrastiveLearning(model, settings, matryoshka_dims=[8], how=how, teacher_width=8)


def test_cosent_is_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    leaves = columns()[:2]
    label_B = torch.tensor([0.1, 0.7, 0.7, -0.2, 1.0, 0.1], dtype=torch.float64)
    value = losses.CoSENTLoss(None).compute_loss_from_embeddings(list(leaves), label_B)
    how = ContrastiveKeys(contrastive_weight=0.0, cosent_weight=1.0)
    assert_equal(ours(how, leaves, {"positive": {"score": label_B}}), theirs(value, leaves))


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
