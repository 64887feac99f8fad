"""Self-reconstruction: each anchor rebuilds its own text, through the same code and with the same guarantees."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model

from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.training.step import backward_step, loss_parts, split_batch

ROWS = reference.examples(6)


def make(alpha: float, family: str = "llama", **settings: Any) -> tuple[BidirectionalReconstruction, CollateSides]:
    model = reference.exact(tiny_model(family, True, initializer_range=0.2))
    encoder = EncoderSettings(**({"pooling_mode": "last", "attention": "causal"} | settings))
    collate = CollateSides(row_tokenizer(family_tokenizer(family), encoder), ("query", "positive"))
    return BidirectionalReconstruction(model, encoder, alpha, "self"), collate


@pytest.mark.parametrize(
    ("alpha", "family", "settings"),
    [
        (0.2, "llama", {}),
        (0.0, "llama", {}),
        (1.0, "qwen2", {}),
        (0.5, "mistral", {"attention": "bidirectional", "pooling_mode": "mean"}),
    ],
    ids=["mix", "only_documents", "only_queries", "bidirectional_mean"],
)
def test_loss_and_every_gradient_equal_one_token_at_a_time(alpha: float, family: str, settings: dict[str, Any]) -> None:
    """In one pass, in a few micro-batches, and row by row; an unused direction leaves no figure."""
    objective, collate = make(alpha, family, **settings)
    queries, positives = (collate.rows(ROWS, side) for side in ("query", "positive"))
    encoder = objective.settings
    expected = reference.self_reconstruction(
        objective.model, queries, positives, alpha, encoder.attention, encoder.pooling_mode
    )
    expected.loss.backward()
    gradients = reference.gradients(objective)
    batch = collate(ROWS)
    totals = objective.count(batch)
    assert totals.keys() == {"q2q", "d2d", "anchors"}
    for max_tokens in (None, 70, 1):
        parts = backward_step(objective, batch, totals, max_tokens=max_tokens)
        names = {"loss", *(["loss_q2q"] if alpha > 0 else []), *(["loss_d2d"] if alpha < 1 else [])}
        assert parts.keys() == names | {"anchor_norm", "embedding_norm"}
        torch.testing.assert_close(parts["loss"], expected.loss.detach(), rtol=1e-9, atol=0)
        for name in names - {"loss"}:
            by_hand = expected.q2d if name == "loss_q2q" else expected.d2q
            torch.testing.assert_close(parts[name], by_hand.detach(), rtol=1e-9, atol=0)
        reference.assert_same_gradients(reference.gradients(objective), gradients)
    assert len(split_batch(batch, 70)) > 1


def test_a_text_does_not_hear_of_its_counterpart() -> None:
    """Another positive leaves the queries' share as it was, where the counterpart's target would feel it."""
    objective, collate = make(0.5)
    row = ROWS[0]
    other = row._replace(positive=row.positive._replace(text="blue world"))
    totals = objective.count(collate([row]))
    parts = [loss_parts(objective, collate([r]), totals) for r in (row, other)]
    torch.testing.assert_close(parts[0]["loss_q2q"], parts[1]["loss_q2q"], rtol=1e-11, atol=0)
    assert abs(parts[0]["loss_d2d"] - parts[1]["loss_d2d"]) > 1e-3
