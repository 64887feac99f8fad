"""Stage II equals InfoNCE pair by pair, trains the adapter alone, and does not care how rows are padded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model
from torch import Tensor

from llm2vec import llm2vec_contrastive
from llm2vec.backbone import LORA_MODULES, attach_lora, enable_checkpointing
from llm2vec.checkpoint import EncoderSettings
from llm2vec.llm2vec import row_tokenizer
from llm2vec.llm2vec_contrastive import ContrastiveLearning
from llm2vec.run import CollateSides, Side
from llm2vec.types import Batch, Example, TokenBatch


def make(
    family: str = "llama", *, loss_scale: float = 20.0, num_negatives: int = 1, randomise: bool = True, **settings: Any
) -> tuple[ContrastiveLearning, CollateSides]:
    """A float64 objective over a random model with a LoRA adapter whose B is not zero, and what makes its batches."""
    model = tiny_model(family, initializer_range=0.2)
    adapted = reference.exact(attach_lora(model, r=4, alpha=8, dropout=0.0))
    if randomise:
        randomise_b(adapted)
    encoder = EncoderSettings(**({"pooling_mode": "last", "attention": "causal"} | settings))
    sides: tuple[Side, ...] = ("query", "positive", "negative") if num_negatives else ("query", "positive")
    collate = CollateSides(row_tokenizer(family_tokenizer(family), encoder), sides)
    return ContrastiveLearning(adapted, encoder, loss_scale).eval(), collate


def randomise_b(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def run(objective: ContrastiveLearning, batch: Batch) -> dict[str, Tensor]:
    parts = objective(batch, objective.count(batch))
    parts["loss"].backward()
    return parts


class Vectors(ContrastiveLearning):
    """The objective over given vectors in place of a model's."""

    def __init__(self, loss_scale: float = 1.0, **vectors: list[list[float]]) -> None:
        super().__init__(torch.nn.Module(), EncoderSettings(), loss_scale)
        self.vectors = {side: torch.tensor(rows, dtype=torch.float64) for side, rows in vectors.items()}
        self.batch: Batch = {side: {"input_ids": rows} for side, rows in self.vectors.items()}

    def embed(self, side: TokenBatch) -> Tensor:
        return side["input_ids"]

    def run(self) -> dict[str, Tensor]:
        return self(self.batch, self.count(self.batch))


# --- the loss and its gradient ---


@pytest.mark.parametrize("num_negatives", [0, 1, 2])
@pytest.mark.parametrize(
    ("family", "loss_scale", "settings"),
    [
        ("llama", 20.0, {}),
        ("llama", 50.0, {"attention": "bidirectional", "pooling_mode": "mean"}),
        ("qwen2", 20.0, {"skip_instruction": False, "pooling_mode": "mean"}),
    ],
    ids=["anchor", "release_scale_bidirectional_mean", "mean_with_instruction"],
)
def test_loss_and_every_adapter_gradient_equal_the_double_loop(
    family: str, loss_scale: float, settings: dict[str, Any], num_negatives: int
) -> None:
    objective, collate = make(family, loss_scale=loss_scale, num_negatives=num_negatives, **settings)
    rows = reference.examples(6, num_negatives)
    parts = run(objective, collate(rows))
    actual = reference.gradients(objective)
    assert sum("lora_B" in name for name in actual) == sum("lora_A" in name for name in actual) == 14
    renderer = collate.tokenizer
    step = [
        (renderer.rows([row.query])[0], renderer.rows([row.positive])[0], renderer.rows(row.negatives)) for row in rows
    ]
    assert all(len(negatives) == num_negatives for _, _, negatives in step)
    attention, pooling_mode = objective.settings.attention, objective.settings.pooling_mode
    expected = reference.stage_two(objective.model, step, loss_scale, attention, pooling_mode)
    expected.backward()
    torch.testing.assert_close(parts["loss"].detach(), expected.detach(), rtol=1e-9, atol=0)
    reference.assert_same_gradients(actual, reference.gradients(objective))


def test_every_hard_negative_is_seen_by_every_query() -> None:
    """By hand: all cosines zero but one's own, so the loss counts the documents."""
    axes = torch.eye(8).tolist()
    objective = Vectors(query=axes[:2], positive=axes[:2], negative=axes[2:6])
    by_hand = -1.0 + math.log(math.e + 1 + 4)  # own positive, the other positive, four negatives
    assert objective.run()["loss"].item() == pytest.approx(by_hand, rel=1e-12)
    near = Vectors(query=axes[:2], positive=axes[:2], negative=[axes[2], axes[0], axes[4], axes[5]])
    losses = [-1.0 + math.log(2 * math.e + 4), by_hand]  # the first query meets its copy, whosever negative it is
    assert near.run()["loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-12)


def test_length_of_a_vector_does_not_matter_and_the_scale_does() -> None:
    short = Vectors(query=[[1, 0], [1, 1]], positive=[[1, 2], [0, 1]])
    long = Vectors(query=[[9, 0], [3, 3]], positive=[[2, 4], [0, 0.1]])
    sharp = Vectors(query=[[1, 0], [1, 1]], positive=[[1, 2], [0, 1]], loss_scale=20.0)
    torch.testing.assert_close(long.run()["loss"], short.run()["loss"], rtol=1e-12, atol=0)
    assert abs(sharp.run()["loss"] - short.run()["loss"]) > 0.1


# --- what is logged ---


def test_in_batch_accuracy_by_hand() -> None:
    """Three queries: the first finds its positive, the second another's, the third a hard negative."""
    objective = Vectors(
        query=[[1, 0, 0], [1, 0, 0], [0, 0, 1]],
        positive=[[1, 0.1, 0], [0, 1, 0], [0, 1, 1]],
        negative=[[0, 1, 0], [0, 1, 0], [0, 0, 1]],
    )
    parts = objective.run()
    assert parts["in_batch_accuracy"].item() == pytest.approx(1 / 3)
    assert set(parts) == {"loss", "loss_contrastive", "in_batch_accuracy"}
    assert parts["loss_contrastive"] == parts["loss"]
    assert not parts["loss_contrastive"].requires_grad
    half = objective(objective.batch, {"contrastive": torch.tensor(6.0)})  # one of two micro-batches of a step
    for name, value in parts.items():
        torch.testing.assert_close(half[name], value / 2)


def test_labels_start_at_this_ranks_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second of two ranks, the own positives are the columns behind the first rank's."""
    axes = torch.eye(8, dtype=torch.float64)
    first_rank = {"positive": axes[4:6], "negative": axes[6:8]}
    objective = Vectors(query=axes[:2].tolist(), positive=axes[:2].tolist(), negative=axes[2:4].tolist())
    sides = iter(["positive", "negative"])
    monkeypatch.setattr(llm2vec_contrastive, "rank", lambda: 1)
    monkeypatch.setattr(
        llm2vec_contrastive, "gather_with_gradient", lambda rows: torch.cat([first_rank[next(sides)], rows])
    )
    parts = objective.run()
    assert parts["in_batch_accuracy"] == 1
    assert parts["loss"].item() == pytest.approx(-1.0 + math.log(math.e + 7), rel=1e-12)


# --- the adapter ---


def test_only_the_adapter_trains() -> None:
    """After a step of SGD every base weight is the same to the bit and every adapter weight has moved."""
    objective, collate = make()
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    run(objective, collate(reference.examples(4, 1)))
    trained = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    assert trained == [name for name in before if "lora_" in name]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == set(LORA_MODULES)
    torch.optim.SGD(objective.parameters(), lr=1.0).step()
    for name, parameter in objective.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_a_fresh_adapter_changes_nothing() -> None:
    """Embeddings equal the base's to the bit, until B is no longer zero."""
    objective, collate = make(randomise=False)
    query = collate(reference.examples(5, 1))["query"]
    with torch.no_grad():
        fresh = objective.embed(query)
        with objective.model.disable_adapter():
            base = objective.embed(query)
        assert torch.equal(fresh, base)
        randomise_b(objective.model)
        assert not torch.allclose(objective.embed(query), base, rtol=0.01)


# --- what must not matter ---


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling_mode", ["last", "mean"])
def test_padding_side_does_not_matter(attention: str, pooling_mode: str) -> None:
    objective, collate = make(attention=attention, pooling_mode=pooling_mode)
    rows: list[Example] = reference.examples(6, 1)
    right = collate(rows)
    parts = run(objective, right)
    expected = reference.gradients(objective)
    collate.tokenizer.padding_side = "left"
    left = collate(rows)
    assert all(not torch.equal(left[side]["input_ids"], right[side]["input_ids"]) for side in right)
    padded = run(objective, left)
    torch.testing.assert_close(padded["loss"], parts["loss"], rtol=1e-10, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)


def test_activation_checkpointing_does_not_matter() -> None:
    """Same loss and gradients; a layer's second forward pass shows that recomputing really is on."""
    objective, collate = make()
    batch = collate(reference.examples(6, 1))
    objective.train()
    calls: list[int] = []
    layer = objective.model.get_base_model().layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    parts = run(objective, batch)
    expected = reference.gradients(objective)
    assert len(calls) == 3
    enable_checkpointing(objective.model, {"use_reentrant": False})
    again = run(objective, batch)
    assert len(calls) == 3 + 6
    torch.testing.assert_close(again["loss"], parts["loss"], rtol=1e-12, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)
