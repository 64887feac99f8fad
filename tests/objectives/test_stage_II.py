"""Stage II equals InfoNCE pair by pair, trains the adapter alone, and does not care how a step is cut."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model
from torch import Tensor

from llm2vec.data.collation import CollateSides
from llm2vec.model import packing
from llm2vec.model.backbone import LORA_MODULES, attach_lora
from llm2vec.model.packing import checkpoint_contexts
from llm2vec.model.pooling import embed
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives import contrastive as llm2vec_contrastive
from llm2vec.objectives import negatives as llm2vec_negatives
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.training.step import backward_step, loss_parts, split_batch
from llm2vec.types import Batch


def make(
    family: str = "llama",
    *,
    loss_scale: float = 20.0,
    num_negatives: int = 1,
    randomise: bool = True,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[ContrastiveLearning, CollateSides]:
    """A float64 objective over a random model with a LoRA adapter whose B is not zero, and what makes its batches."""
    decoder = tiny_model(family, initializer_range=0.2, **(model or {}))
    adapted = reference.exact(attach_lora(decoder, r=4, alpha=8, dropout=0.0))
    if randomise:
        randomise_b(adapted)
    encoder = EncoderSettings(**({"pooling_mode": "last", "attention": "causal"} | settings))
    sides = ("query", "positive", "negative") if num_negatives else ("query", "positive")
    collate = CollateSides(row_tokenizer(family_tokenizer(family), encoder), sides)
    return ContrastiveLearning(adapted, encoder, loss_scale).eval(), collate


def randomise_b(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def run(objective: ContrastiveLearning, batch: Batch, max_tokens: int | None = None) -> dict[str, Tensor]:
    return backward_step(objective, batch, objective.count(batch), max_tokens=max_tokens)


def between(loss_scale: float = 1.0, total: float | None = None, **vectors: list[list[float]]) -> dict[str, Tensor]:
    """The objective's loss parts over given vectors in place of a model's."""
    objective = ContrastiveLearning(torch.nn.Module(), EncoderSettings(), loss_scale)
    of_sides = {side: torch.tensor(rows, dtype=torch.float64) for side, rows in vectors.items()}
    return objective.contrast(of_sides, {}, {"contrastive": torch.tensor(total or float(len(vectors["query"])))})


# --- the loss and its gradient ---


@pytest.mark.parametrize("num_negatives", [0, 1, 2])
@pytest.mark.parametrize(
    ("family", "loss_scale", "shared", "settings"),
    [
        ("llama", 20.0, False, {}),
        ("llama", 50.0, False, {"attention": "bidirectional", "pooling_mode": "mean"}),
        ("qwen2", 20.0, False, {"skip_instruction": False, "pooling_mode": "mean"}),
        ("qwen3", 20.0, True, {"model": {"num_key_value_heads": 4}}),
        ("mistral", 20.0, True, {"pooling_mode": "mean"}),
        ("gemma", 20.0, True, {"attention": "bidirectional"}),
    ],
    ids=[
        "anchor", "release_scale_bidirectional_mean", "mean_with_instruction", "shared_prefix_equal_heads",
        "shared_prefix_mean", "gemma_bidirectional",
    ],
)  # fmt: skip
def test_loss_and_every_adapter_gradient_equal_the_double_loop(
    family: str, loss_scale: float, shared: bool, settings: dict[str, Any], num_negatives: int
) -> None:
    """In one pass, and with the gradient cached: in a few micro-batches, and row by row."""
    objective, collate = make(family, loss_scale=loss_scale, num_negatives=num_negatives, **settings)
    rows = reference.examples(6, num_negatives)
    rows = reference.under_one_instruction(rows) if shared else rows
    renderer = collate.tokenizer
    step = [
        (renderer.rows([row.query])[0], renderer.rows([row.positive])[0], renderer.rows(row.negatives)) for row in rows
    ]
    assert all(len(negatives) == num_negatives for _, _, negatives in step)
    attention, pooling_mode = objective.settings.attention, objective.settings.pooling_mode
    expected = reference.stage_two(objective.model, step, loss_scale, attention, pooling_mode)
    expected.backward()
    expected_gradients = reference.gradients(objective)
    assert sum("lora_B" in name for name in expected_gradients) == 14 == len(expected_gradients) // 2
    batch = collate(rows)
    assert (batch["query"]["prefix"] > 0) == objective.settings.skip_instruction or pooling_mode == "last"
    third = sum(sum(side["lengths"]) for side in batch.values()) // 3
    for max_tokens, num_pieces in ((None, 1), (third, None), (1, 6)):
        pieces = split_batch(batch, max_tokens)
        assert len(pieces) == num_pieces or (num_pieces is None and 1 < len(pieces) < 6)
        parts = run(objective, batch, max_tokens)
        torch.testing.assert_close(parts["loss"], expected.detach(), rtol=1e-9, atol=0)
        reference.assert_same_gradients(reference.gradients(objective), expected_gradients)
        assert loss_parts(objective, batch, objective.count(batch), max_tokens).keys() == parts.keys()


def test_pieces_by_themselves_would_have_another_loss() -> None:
    """The guard of the test above: rows of a piece alone lack the other pieces' documents."""
    objective, collate = make()
    batch = collate(reference.examples(6, 1))
    parts = run(objective, batch)
    expected = reference.gradients(objective)
    totals = objective.count(batch)
    alone = [backward_step(objective, piece, totals)["loss"] for piece in split_batch(batch, 100)]
    assert sum(alone) < 0.9 * parts["loss"]
    with pytest.raises(AssertionError, match="apart"):
        reference.assert_same_gradients(reference.gradients(objective), expected, relative=0.05)


def test_every_hard_negative_is_seen_by_every_query() -> None:
    """By hand: all cosines zero but one's own, so the loss counts the documents."""
    axes = torch.eye(8).tolist()
    by_hand = -1.0 + math.log(math.e + 1 + 4)  # own positive, the other positive, four negatives
    far = between(query=axes[:2], positive=axes[:2], negative=axes[2:6])
    assert far["loss"].item() == pytest.approx(by_hand, rel=1e-12)
    near = between(query=axes[:2], positive=axes[:2], negative=[axes[2], axes[0], axes[4], axes[5]])
    losses = [-1.0 + math.log(2 * math.e + 4), by_hand]  # the first query meets its copy, whosever negative it is
    assert near["loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-12)


def test_length_of_a_vector_does_not_matter_and_the_scale_does() -> None:
    short = between(query=[[1, 0], [1, 1]], positive=[[1, 2], [0, 1]])
    long = between(query=[[9, 0], [3, 3]], positive=[[2, 4], [0, 0.1]])
    sharp = between(query=[[1, 0], [1, 1]], positive=[[1, 2], [0, 1]], loss_scale=20.0)
    torch.testing.assert_close(long["loss"], short["loss"], rtol=1e-12, atol=0)
    assert abs(sharp["loss"] - short["loss"]) > 0.1


# --- what is logged ---


def test_in_batch_accuracy_by_hand() -> None:
    """Three queries: the first finds its positive, the second another's, the third a hard negative."""
    vectors: dict[str, list[list[float]]] = {
        "query": [[1, 0, 0], [1, 0, 0], [0, 0, 1]],
        "positive": [[1, 0.1, 0], [0, 1, 0], [0, 1, 1]],
        "negative": [[0, 1, 0], [0, 1, 0], [0, 0, 1]],
    }
    parts = between(**vectors)
    assert parts["in_batch_accuracy"].item() == pytest.approx(1 / 3)
    assert set(parts) == {"loss", "loss_contrastive", "in_batch_accuracy"}
    assert parts["loss_contrastive"] == parts["loss"]
    half = between(total=6.0, **vectors)  # one of two micro-batches of a step
    for name, value in parts.items():
        torch.testing.assert_close(half[name], value / 2)


def test_figures_carry_no_graph() -> None:
    objective, collate = make()
    batch = collate(reference.examples(4, 1))
    output = objective(batch, objective.count(batch))
    assert output.parts == {}
    assert {side: vectors.shape for side, vectors in output.vectors.items()} == dict.fromkeys(batch, (4, 32))
    parts = objective.contrast(output.vectors, {}, objective.count(batch))
    assert {name for name, value in parts.items() if value.requires_grad} == {"loss"}
    assert not any(value.requires_grad for value in run(objective, batch).values())


def test_labels_start_at_this_ranks_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second of two ranks, the own positives are the columns behind all of the first rank's documents."""
    axes = torch.eye(8, dtype=torch.float64)
    first_rank = axes[4:8]
    monkeypatch.setattr(llm2vec_negatives, "rank", lambda: 1)
    monkeypatch.setattr(llm2vec_contrastive, "gather_with_gradient", lambda rows: torch.cat([first_rank, rows]))
    parts = between(query=axes[:2].tolist(), positive=axes[:2].tolist(), negative=axes[2:4].tolist())
    assert parts["in_batch_accuracy"] == 1
    assert parts["loss"].item() == pytest.approx(-1.0 + math.log(math.e + 7), rel=1e-12)


# --- the adapter ---


def test_only_the_adapter_trains() -> None:
    """After a step of SGD every base weight is the same to the bit and every adapter weight has moved."""
    objective, collate = make()
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    run(objective, collate(reference.examples(4, 1)), 100)
    trained = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    assert trained == [name for name in before if "lora_" in name]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == set(LORA_MODULES)
    torch.optim.SGD(objective.parameters(), lr=1.0).step()
    for name, parameter in objective.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_a_fresh_adapter_changes_nothing() -> None:
    """Embeddings equal the base's to the bit, until B is no longer zero."""
    objective, collate = make(randomise=False)
    sides = {"query": collate(reference.examples(5, 1))["query"]}

    def vectors() -> Tensor:
        return embed(objective.model, objective.settings, sides)["query"]

    with torch.no_grad():
        fresh = vectors()
        with objective.model.disable_adapter():
            base = vectors()
        assert torch.equal(fresh, base)
        randomise_b(objective.model)
        assert not torch.allclose(vectors(), base, rtol=0.01)


# --- what must not matter ---


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_the_order_of_rows_does_not_matter(max_tokens: int | None) -> None:
    """Nor does a row's place decide with which others it goes through the model."""
    objective, collate = make(num_negatives=2)
    rows = reference.examples(6, 2)
    parts = run(objective, collate(rows))
    expected = reference.gradients(objective)
    again = run(objective, collate([rows[i] for i in (4, 1, 5, 0, 3, 2)]), max_tokens)
    for name, value in parts.items():
        torch.testing.assert_close(again[name], value, rtol=1e-11, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)


@pytest.mark.usefixtures("every_piece_twice")
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling_mode", ["last", "mean"])
def test_a_model_that_cannot_be_packed_gives_the_same(
    attention: str, pooling_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, collate = make(attention=attention, pooling_mode=pooling_mode)
    batch = collate(reference.under_one_instruction(reference.examples(6, 1)))
    parts = run(objective, batch, 150)
    expected = reference.gradients(objective)
    calls: list[int] = []
    padded = packing._padded_hidden_states
    monkeypatch.setattr(packing, "_padded_hidden_states", lambda *a, **k: (calls.append(1), padded(*a, **k))[1])
    objective.model.config.attn_logit_softcapping = 50.0  # which a Llama has not, so nothing else changes
    again = run(objective, batch, 150)
    assert len(calls) == 2 * len(split_batch(batch, 150)) > 2
    torch.testing.assert_close(again["loss"], parts["loss"], rtol=1e-10, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)


@pytest.mark.usefixtures("every_piece_twice")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 110])
def test_activation_checkpointing_does_not_matter(max_tokens: int | None, shared: bool) -> None:
    """Same loss and gradients; a layer's further forward passes show that recomputing really is on.

    A cached gradient takes one pass without a graph, one with, and now one more.
    """
    objective, collate = make()
    rows = reference.examples(6, 1)
    batch = collate(reference.under_one_instruction(rows) if shared else rows)
    num_pieces = len(split_batch(batch, max_tokens))
    passes = 1 if num_pieces == 1 else 2
    objective.train()
    calls: list[int] = []
    decoder = objective.model.get_base_model()
    decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    parts = run(objective, batch, max_tokens)
    expected = reference.gradients(objective)
    assert len(calls) == passes * num_pieces
    enable_checkpointing(objective.model, {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, decoder)})
    calls.clear()
    again = run(objective, batch, max_tokens)
    assert len(calls) == (passes + 1) * num_pieces
    torch.testing.assert_close(again["loss"], parts["loss"], rtol=1e-12, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)
