"""Plain language modelling equals the mean over tokens, one at a time, for every family."""

from __future__ import annotations

from functools import partial

import pytest
import reference
import torch
from helpers import MODELS, family_tokenizer, tiny_model

from llm2vec.data.collation import CollateSides
from llm2vec.model.packing import checkpoint_contexts
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.language_modelling import LanguageModelling
from llm2vec.text.batches import pack_rows
from llm2vec.training.config import Config
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.training.stages import STAGES
from llm2vec.training.step import backward_step, loss_parts, split_batch
from llm2vec.types import InstructedText

ROWS = reference.examples(5)


def make(family: str = "llama") -> tuple[LanguageModelling, CollateSides]:
    model = reference.exact(tiny_model(family, True, initializer_range=0.2, tie_word_embeddings=family == "gemma"))
    settings = EncoderSettings(pooling_mode="last", attention="causal")
    return LanguageModelling(model), CollateSides(row_tokenizer(family_tokenizer(family), settings), ("text",))


@pytest.mark.parametrize("family", list(MODELS))
def test_loss_and_every_gradient_equal_one_token_at_a_time(family: str) -> None:
    """In one pass, in a few micro-batches and row by row; recomputing activations too."""
    objective, collate = make(family)
    rows = collate.tokenizer.rows(collate.texts(ROWS, "text"))
    loss = reference.language_modelling(objective.model, rows)
    loss.backward()
    expected = reference.gradients(objective)
    batch = collate(ROWS)
    totals = objective.count(batch)
    assert totals["lm"] == sum(sum(row.target[1:]) for row in rows)
    calls: list[int] = []
    objective.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for max_tokens in (None, 45, 1):
        parts = backward_step(objective, batch, totals, max_tokens=max_tokens)
        assert parts["loss"] == parts["loss_lm"] == loss_parts(objective, batch, totals, max_tokens)["loss"]
        torch.testing.assert_close(parts["loss"], loss.detach(), rtol=1e-9, atol=0)
        reference.assert_same_gradients(reference.gradients(objective), expected)
    num_calls = [len(split_batch(batch, max_tokens)) for max_tokens in (None, 45, 1)]
    assert num_calls[0] == 1 < num_calls[1] < num_calls[2] == 5
    assert len(calls) == 2 * sum(num_calls)
    context_fn = partial(checkpoint_contexts, objective.model.base_model)
    enable_checkpointing(objective.model.train(), {"use_reentrant": False, "context_fn": context_fn})
    backward_step(objective, batch, totals)
    assert len(calls) == 2 * sum(num_calls) + 2
    reference.assert_same_gradients(reference.gradients(objective), expected)


def test_a_text_does_not_predict_its_neighbours_first_token() -> None:
    """The loss of two texts, in either order, is the sum of each alone."""
    objective, collate = make()
    totals = {"lm": torch.tensor(7.0)}
    alone = [loss_parts(objective, collate([row]), totals)["loss"] for row in ROWS[:2]]
    assert min(alone) > 0.1
    for rows in (ROWS[:2], ROWS[1::-1]):
        both = loss_parts(objective, collate(rows), totals)["loss"]
        torch.testing.assert_close(both, alone[0] + alone[1], rtol=1e-11, atol=0)


def test_a_texts_first_token_is_no_target_even_where_it_is_marked() -> None:
    """There is nothing in its text to predict it from, and the token before it is a neighbour's."""
    objective, collate = make()
    rows = [row._replace(target=[True] * len(row.ids)) for row in collate.tokenizer.rows(collate.texts(ROWS, "text"))]
    batch = {"text": pack_rows(rows)}
    totals = objective.count(batch)
    assert totals["lm"] == sum(len(row.ids) - 1 for row in rows)
    with torch.no_grad():
        expected = reference.language_modelling(objective.model, rows)
    torch.testing.assert_close(loss_parts(objective, batch, totals)["loss"], expected, rtol=1e-9, atol=0)


def test_the_control_closes_no_text() -> None:
    """A closing token would take a text's last place, and no loss reads it."""
    tokenizer, settings = family_tokenizer("llama"), EncoderSettings("last", 6, template="llama3", attention="causal")
    collate = STAGES["lm"].collate(Config("base", stage="lm"), tokenizer, settings, 0)
    query = InstructedText("", "red")
    rows = [ROWS[0]._replace(query=query, positive=InstructedText("", text)) for text in ("hello", "hello " * 9)]
    short, long = (tokenizer.convert_ids_to_tokens(collate([row])["text"]["input_ids"].tolist()) for row in rows)
    assert short == ["<|begin_of_text|>", "red", "ĊĊ", "hello"]
    assert long == [*short, "Ġhello", "Ġhello"]
