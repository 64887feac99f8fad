"""Packed texts get the states they would get alone, for every family, attention and neighbour."""

from __future__ import annotations

import pytest
import torch
from helpers import family_tokenizer, tiny_model

from llm2vec.backbone import hidden_states
from llm2vec.llm2vec import LLM2Vec
from llm2vec.packing import can_pack, packed_hidden_states
from llm2vec.types import Attention

IDS = [[5, 9, 12, 7, 30, 8], [11], [6, 6, 21, 40], [14, 13]]
CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
@torch.no_grad()
def test_packed_states_equal_those_of_each_text_alone(family: str, attention: Attention) -> None:
    """Also guards against vacuity: the same tokens as one text have other states."""
    model = tiny_model(family, False, torch.float64, initializer_range=0.3).eval()
    packed = packed_hidden_states(model, attention, IDS, CPU)
    alone = [hidden_states(model, attention, torch.ones(1, len(ids)), input_ids=torch.tensor([ids]))[0] for ids in IDS]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-6, atol=1e-6)
    as_one_text = packed_hidden_states(model, attention, [[token for ids in IDS for token in ids]], CPU)
    assert (packed - as_one_text)[len(IDS[0]) :].abs().max() > 1e-2


@torch.no_grad()
def test_the_model_is_left_as_it_was() -> None:
    """The attention is switched for the call only, also when the call fails."""
    model = tiny_model("llama", False, torch.float32).eval()
    before = model.config._attn_implementation
    packed_hidden_states(model, "causal", IDS, CPU)
    assert model.config._attn_implementation == before
    with pytest.raises(IndexError):
        packed_hidden_states(model, "causal", [[10**6]], CPU)
    assert model.config._attn_implementation == before


@torch.no_grad()
def test_gradients_reach_every_packed_token() -> None:
    """Packing is differentiable: the gradient of a text's last state reaches that text's tokens and no other's."""
    model = tiny_model("llama", False, torch.float64, initializer_range=0.3).eval()
    with torch.enable_grad():
        packed_hidden_states(model, "causal", [[5, 9], [11, 7]], CPU)[1].sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert [bool(gradient[token].any()) for token in (5, 9, 11, 7)] == [True, True, False, False]


def test_a_window_shorter_than_a_text_and_capped_scores_are_not_packed() -> None:
    """Where packed attention would compute something else, the padded path is taken."""
    model = tiny_model("mistral", False, torch.float32, sliding_window=4)
    assert can_pack(model, 4) and not can_pack(model, 5)
    model.config.sliding_window, model.config.attn_logit_softcapping = None, 50.0
    assert not can_pack(model, 1)


@pytest.mark.parametrize("pooling_mode", ["last", "mean", "weighted_mean", "first"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_encode_equals_the_padded_forward_pass(pooling_mode: str, padding_side: str) -> None:
    """`encode` packs on the CPU; `forward` pads."""
    model = LLM2Vec(tiny_model("llama", False, torch.float32), family_tokenizer("llama3"), pooling_mode)
    model.row_tokenizer.padding_side = padding_side
    texts = [["find:", "hello world"], ["", "a much longer text of many more words than the other"], ["", "x"]]
    with torch.no_grad():
        padded = model.eval()(model.tokenize(texts))
    torch.testing.assert_close(model.encode(texts, show_progress_bar=False), padded, rtol=0, atol=1e-5)
