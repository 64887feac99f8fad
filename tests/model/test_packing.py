"""Packed texts get the states they would get alone, for every family and neighbour, and no work is done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import reference
import torch
from helpers import MODELS, family_tokenizer, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.ernie4_5 import Ernie4_5Config, Ernie4_5Model
from transformers.models.gemma2 import Gemma2Config, Gemma2Model
from transformers.models.glm import GlmConfig, GlmModel
from transformers.models.granite import GraniteConfig, GraniteModel
from transformers.models.helium import HeliumConfig, HeliumModel
from transformers.models.olmo import OlmoConfig, OlmoModel
from transformers.models.smollm3 import SmolLM3Config, SmolLM3Model

from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import attach_lora, hidden_states
from llm2vec.model.packed_attention import NAME
from llm2vec.model.packing import can_pack, checkpoint_contexts, packed, packed_hidden_states
from llm2vec.model.pooling import embed
from llm2vec.model.proofs import check_attention, check_packing
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.text.batches import pack_rows, positions_of, select_rows, shared_prefix, starts_of
from llm2vec.text.tokenization import Row
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.types import Attention, InstructedText, PoolingMode, TokenBatch, UserError

IDS = [[5, 9, 12, 7, 30, 8], [11], [6, 6, 21, 40], [14, 13]]
#: Three texts that begin alike, then two that begin alike in another way.
SHARED_IDS = [[5, 9, 12, 7], [5, 9, 3], [5, 9, 8, 8, 1], [4, 4, 9], [4, 6, 2]]
SHARED = [(3, 2), (2, 1)]


def embeddings_of(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> Tensor:
    table: nn.Module = model.get_input_embeddings()
    return table(torch.tensor([token for text in ids for token in text]))


def lengths_of(ids: Sequence[Sequence[int]]) -> list[int]:
    return [len(text) for text in ids]


def states_alone(model: PreTrainedModel, attention: Attention, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each text's states [T, D] in a pass of its own, by the model's own attention."""
    return [hidden_states(model, attention, torch.ones(1, len(i)), input_ids=torch.tensor([i]))[0] for i in ids]


def tokens_reaching(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[int]]]:
    """For each named module, how many tokens reach it in each of its calls."""
    seen: dict[str, list[int]] = {name: [] for name in modules}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name].append(args[0].shape[:-1].numel())

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


counted = contextmanager(tokens_reaching)


# --- rows to a batch ---


def row(ids: list[int], pooled: str, target: str = "") -> Row:
    """`1` marks a position."""
    return Row(ids, [mark == "1" for mark in pooled], [mark == "1" for mark in target or "0" * len(ids)])


def test_pack_rows_by_hand() -> None:
    batch = pack_rows([row([1, 2, 3, 4], "0001", "0110"), row([1, 2, 9], "011", "001")])
    assert batch["input_ids"].tolist() == [1, 2, 3, 4, 1, 2, 9]
    assert batch["lengths"] == [4, 3]
    assert batch["pool_mask"].tolist() == [False, False, False, True, False, True, True]
    assert batch["target_mask"].tolist() == [False, True, True, False, False, False, True]
    assert batch["num_targets"] == [2, 1]
    assert (batch["num_context"], batch["num_different"]) == ([3, 3], [2, 1])
    assert batch["prefix"] == 1  # the second row pools over its second token
    assert batch["closed"]
    other = pack_rows([row([1, 2], "10"), row([5, 7, 5, 5, 8], "00001", "11010")])
    assert not other["closed"]
    # A text without a mark is context to its end; a token that stands twice is one.
    assert (other["num_context"], other["num_different"]) == ([2, 4], [0, 2])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row([1, 2, 3], "001")], 0),  # nobody to share with
        ([row([1, 2, 3], "001"), row([1, 2, 4], "001")], 2),
        ([row([1, 2, 3], "001"), row([1, 2, 3], "001")], 2),  # the same text twice: what is pooled stays its own
        ([row([1, 2, 3, 4], "0001"), row([1, 2, 3], "001"), row([1, 2, 9, 9], "0001")], 2),
        ([row([1, 2, 3], "011"), row([1, 2, 4], "001")], 1),  # one pools over its second token
        ([row([1, 2, 3], "111"), row([1, 2, 4], "001")], 0),
        ([row([7, 2], "01"), row([1, 2], "01")], 0),
    ],
)
def test_shared_prefix_by_hand(rows: list[Row], expected: int) -> None:
    assert shared_prefix(rows) == expected
    assert shared_prefix(rows[::-1]) == expected


def test_select_rows_equals_packing_those_rows() -> None:
    """But for the prefix, which may be shorter than what the chosen rows alone would share."""
    rows = [row([1, 2, 3, 4], "0001", "0110"), row([1, 2, 9], "001", "010"), row([1, 5], "01", "00")]
    side = pack_rows(rows)
    for chosen in ([2, 0], [1], [0, 1], [0, 1, 2], [1, 1]):
        actual, expected = select_rows(side, chosen), pack_rows([rows[i] for i in chosen])
        assert actual.pop("prefix") == (1 if len(chosen) > 1 else 0) <= expected.pop("prefix")
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            same = torch.equal(actual[name], value) if isinstance(value, Tensor) else actual[name] == value
            assert same, name


def test_starts_and_positions_by_hand() -> None:
    assert starts_of([3, 1, 2]).tolist() == [0, 3, 4]
    assert positions_of([3, 1, 2]).tolist() == [0, 1, 2, 0, 0, 1]


# --- states ---


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", list(MODELS))
@torch.no_grad()
def test_packed_states_equal_those_of_each_text_alone(family: str, attention: Attention) -> None:
    """All of them and the closing ones alone. Guards against vacuity: the same tokens as one text have other states."""
    model = reference.exact(tiny_model(family, initializer_range=0.3))
    alone = states_alone(model, attention, IDS)
    embeddings = embeddings_of(model, IDS)
    states = packed_hidden_states(model, attention, lengths_of(IDS), embeddings)
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-9, atol=1e-9)
    closing = packed_hidden_states(model, attention, lengths_of(IDS), embeddings, closing_only=True)
    torch.testing.assert_close(closing, torch.stack([text[-1] for text in alone]), rtol=1e-9, atol=1e-9)
    as_one_text = packed_hidden_states(model, attention, [len(embeddings)], embeddings)
    assert (states - as_one_text)[len(IDS[0]) :].abs().max() > 1e-2


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped", "equal"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", list(MODELS))
@torch.no_grad()
def test_a_shared_prefix_does_not_matter(family: str, attention: Attention, kv_heads: int) -> None:
    """Two runs with a prefix each. Where it is computed once, the copies that were left out are zeros."""
    model = reference.exact(tiny_model(family, initializer_range=0.3, num_key_value_heads=kv_heads))
    alone = states_alone(model, attention, SHARED_IDS)
    arguments = model, attention, lengths_of(SHARED_IDS), embeddings_of(model, SHARED_IDS)
    states = packed_hidden_states(*arguments, prefixes=SHARED).split(lengths_of(SHARED_IDS))
    prefixes = [2, 2, 2, 1, 1]
    for i, (text, expected, prefix) in enumerate(zip(states, alone, prefixes, strict=True)):
        torch.testing.assert_close(text[prefix:], expected[prefix:], rtol=1e-9, atol=1e-9)
        left_out = attention == "causal" and i not in (0, 3)
        assert text[:prefix].any() != left_out
    closing = packed_hidden_states(*arguments, prefixes=SHARED, closing_only=True)
    torch.testing.assert_close(closing, torch.stack([text[-1] for text in alone]), rtol=1e-9, atol=1e-9)
    wrong = packed_hidden_states(*arguments, prefixes=[(3, 2), (2, 2)], closing_only=True)
    assert (wrong - closing).abs().max() > 1e-2 or attention == "bidirectional"


@pytest.mark.parametrize("closing_only", [False, True])
def test_gradients_reach_a_texts_own_tokens_and_its_prefix(closing_only: bool) -> None:
    """That of one text's last state: its tokens, the shared prefix, and nothing of the neighbours'."""
    model = reference.exact(tiny_model("llama", initializer_range=0.3))
    ids = [[5, 9, 7], [5, 9, 11], [5, 9, 12, 8]]
    states = packed_hidden_states(
        model, "causal", [3, 3, 4], embeddings_of(model, ids), prefixes=[(3, 2)], closing_only=closing_only
    )
    states[1 if closing_only else 5].sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert {token for token in (5, 7, 8, 9, 11, 12) if gradient[token].any()} == {5, 9, 11}


def unpackable(kind: str) -> PreTrainedModel:
    """A model that must run padded: a window shorter than some texts, or capped scores."""
    if kind == "window":
        return tiny_model("mistral", initializer_range=0.3, sliding_window=3).double()
    fields: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_logit_softcapping": 0.5}
    model = Gemma2Model(Gemma2Config(vocab_size=64, initializer_range=0.3, sliding_window=64, **fields)).double().eval()
    model.set_attn_implementation("eager")  # the only one that caps
    return model


@pytest.mark.parametrize("kind", ["window", "capped"])
def test_a_model_that_cannot_be_packed_runs_padded_and_gives_the_same(kind: str) -> None:
    """Values and gradients of every text alone; what packing would have computed is something else."""
    model = unpackable(kind)
    assert not can_pack(model, 6)
    for closing_only in (False, True):
        states = packed_hidden_states(
            model, "causal", lengths_of(IDS), embeddings_of(model, IDS), closing_only=closing_only
        )
        alone = states_alone(model, "causal", IDS)
        expected = torch.stack([text[-1] for text in alone]) if closing_only else torch.cat(alone)
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
        weight = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).reshape(states.shape)
        found = []
        for output in (states, expected):
            (output * weight).sum().backward()
            found.append(reference.gradients(model))
        reference.assert_same_gradients(*found, relative=1e-4)
    model.config.sliding_window, model.config.attn_logit_softcapping = None, None  # and so the guard is off
    wrong = packed_hidden_states(model, "causal", lengths_of(IDS), embeddings_of(model, IDS))
    assert (wrong - torch.cat(alone)).abs().max() > 1e-3


def test_a_window_shorter_than_a_text_and_capped_scores_are_not_packed() -> None:
    """A window that no text reaches is no hindrance."""
    model = tiny_model("mistral", sliding_window=4)
    assert can_pack(model, 4) and not can_pack(model, 5)
    model.config.sliding_window, model.config.attn_logit_softcapping = None, 50.0
    assert not can_pack(model, 1)


RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1, "expand": 2},
}  # fmt: skip
OTHER: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},  # a sink in each head
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},  # layers under another name
}


@pytest.mark.parametrize("family", [*RECURRENT, *OTHER])
@torch.no_grad()
def test_families_that_do_more_than_attend_run_padded(family: str) -> None:
    """Convolutions and recurrences would run on into the next text, and packed attention knows no sinks."""
    config = AutoConfig.for_model(family, **{**SMALL, **RECURRENT.get(family, {}), **OTHER.get(family, {})})
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    assert not can_pack(model, 6)
    states = packed_hidden_states(model, "causal", lengths_of(IDS), embeddings_of(model, IDS), closing_only=True)
    expected = torch.stack([text[-1] for text in states_alone(model, "causal", IDS)])
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_family_that_attends_in_a_way_of_its_own_is_refused(attention: Attention) -> None:
    """Doge leaves keys out by their values, which its config does not say."""
    config = AutoConfig.for_model("doge", **{**SMALL, "keep_window_size": 2})
    torch.manual_seed(0)
    with pytest.raises(UserError, match="DogeModel computes more than attention over the text's own tokens"):
        check_packing(AutoModel.from_config(config), attention)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_families_that_are_trained_pass(family: str, attention: Attention, dtype: torch.dtype) -> None:
    """Also where the texts' states are the more alike for random weights, and mode and gradients stay."""
    model = tiny_model(family).to(dtype).train()
    check_packing(model, attention)
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text"])
def test_layers_that_only_read_forwards_cannot_be_bidirectional(family: str) -> None:
    """Their attention obeys, so only their layers' kind tells."""
    model = AutoModel.from_config(AutoConfig.for_model(family, **{**SMALL, **RECURRENT[family]})).eval()
    check_attention(model, "causal")
    with pytest.raises(UserError, match="read from left to right only"):
        check_attention(model, "bidirectional")


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: GraniteModel(GraniteConfig(**SMALL, residual_multiplier=0.3, attention_multiplier=0.2)),
        lambda: OlmoModel(OlmoConfig(**SMALL, clip_qkv=0.1)),
        lambda: HeliumModel(HeliumConfig(**SMALL)),
        lambda: Ernie4_5Model(Ernie4_5Config(**SMALL)),
        lambda: GlmModel(GlmConfig(**SMALL, partial_rotary_factor=0.5)),
        lambda: SmolLM3Model(SmolLM3Config(**SMALL, no_rope_layers=[1, 1, 1, 0])),
    ],
    ids=["scaled_residual", "clipped_heads", "interleaved_rotary", "ernie", "partial_rotary", "no_rotary"],
)
@torch.no_grad()
def test_a_layer_whose_parts_are_named_alike_but_work_otherwise(make: Callable[[], PreTrainedModel]) -> None:
    """Families with Llama's module names and another computation: the closing states are still the model's own."""
    model = make().double().eval()
    states = packed_hidden_states(model, "causal", lengths_of(IDS), embeddings_of(model, IDS), closing_only=True)
    expected = torch.stack([text[-1] for text in states_alone(model, "causal", IDS)])
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


# --- the model is left as it was ---


@torch.no_grad()
def test_the_model_is_left_as_it_was() -> None:
    """Attention and last layer are switched for the call only, also when the call fails."""
    model = tiny_model("llama")
    before = model.config._attn_implementation, dict(vars(model.layers[-1]))
    embeddings = embeddings_of(model, IDS)
    packed_hidden_states(model, "causal", lengths_of(IDS), embeddings, closing_only=True)
    assert (model.config._attn_implementation, vars(model.layers[-1])) == before
    with pytest.raises(RuntimeError):
        packed_hidden_states(model, "causal", lengths_of(IDS), embeddings[:, 1:], closing_only=True)
    assert (model.config._attn_implementation, vars(model.layers[-1])) == before
    with packed(model), packed(model):
        assert model.config._attn_implementation == NAME
    assert (model.config._attn_implementation, vars(model.layers[-1])) == before


@torch.no_grad()
def test_a_forward_that_others_put_on_the_last_layer_stays_and_is_called() -> None:
    """As the library does it for a model spread over devices: it moves a layer's inputs to the layer's own."""
    model = reference.exact(tiny_model("llama", initializer_range=0.3))
    last, calls = model.layers[-1], []
    original = last.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    last.forward = wrapped
    for number in (1, 2):
        states = packed_hidden_states(model, "causal", lengths_of(IDS), embeddings_of(model, IDS), closing_only=True)
        assert last.forward is wrapped
        assert len(calls) == number
    last.forward = original
    expected = torch.stack([text[-1] for text in states_alone(model, "causal", IDS)])
    torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-9)


def test_activations_are_recomputed_as_they_were_packed() -> None:
    """Prefix shared and last layer narrowed: the same gradients; each layer runs twice; without `context_fn`,
    recomputing is found out to do something else."""
    model = reference.exact(tiny_model("llama", initializer_range=0.3))
    arguments = model, "causal", lengths_of(SHARED_IDS)

    def gradients() -> dict[str, Tensor]:
        states = packed_hidden_states(*arguments, embeddings_of(model, SHARED_IDS), prefixes=SHARED, closing_only=True)
        weight = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).reshape(states.shape)
        (states * weight).sum().backward()
        return reference.gradients(model)

    expected = gradients()
    model.train()
    mlps = {"first": model.layers[0].mlp, "last": model.layers[-1].mlp}
    enable_checkpointing(model, {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, model)})
    with counted(mlps) as seen:
        reference.assert_same_gradients(gradients(), expected, relative=1e-12)
    num_tokens = sum(lengths_of(SHARED_IDS)) - 2 * 2 - 1
    assert seen == {"first": [num_tokens] * 2, "last": [len(SHARED_IDS)] * 2}
    assert model.config._attn_implementation != NAME
    enable_checkpointing(model, {"use_reentrant": False})
    with pytest.raises(Exception, match=r"checkpoint|layout"):
        gradients()


def test_recomputing_leaves_a_padded_pass_alone() -> None:
    """The context of a pass that was not packed is none."""
    model = tiny_model("llama")
    for context in checkpoint_contexts(model):
        with context:
            assert model.config._attn_implementation != NAME
    with packed(model):
        contexts = checkpoint_contexts(model)
    with contexts[1]:
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation != NAME


# --- sides to embeddings, and the work it takes ---


def sides_of(family: str, settings: EncoderSettings, instruction: str = "find the answer") -> dict[str, TokenBatch]:
    """Queries under one instruction, and documents under none."""
    renderer = row_tokenizer(family_tokenizer(family), settings)
    rows = reference.examples(6)
    queries = [InstructedText(instruction, r.query.text) for r in rows]
    return {
        "query": pack_rows(renderer.rows(queries)),
        "positive": pack_rows(renderer.rows([InstructedText("", r.positive.text) for r in rows])),
    }


def settings_of(pooling_mode: PoolingMode = "last", attention: Attention = "causal") -> EncoderSettings:
    return EncoderSettings(pooling_mode=pooling_mode, attention=attention)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling_mode", ["last", "mean", "weighted_mean", "first"])
def test_embeddings_of_all_sides_equal_each_text_alone(pooling_mode: PoolingMode, attention: Attention) -> None:
    model = reference.exact(tiny_model("llama", initializer_range=0.3))
    settings = settings_of(pooling_mode, attention)
    sides = sides_of("llama", settings)
    vectors = embed(model, settings, sides)
    assert vectors.keys() == sides.keys()
    for name, side in sides.items():
        for i in range(6):
            alone = embed(model, settings, {"text": select_rows(side, [i])})["text"]
            torch.testing.assert_close(vectors[name][i : i + 1], alone, rtol=1e-9, atol=1e-9)
        if (pooling_mode, attention) != ("first", "causal"):  # there, all texts begin alike
            assert (vectors[name][0] - vectors[name][1]).abs().max() > 0.01


def test_a_prefix_is_computed_once_and_the_last_mlp_at_closing_tokens() -> None:
    """Tokens that reach each layer, by hand; and what they would be without either."""
    model = tiny_model("llama")
    settings = settings_of()
    sides = sides_of("llama", settings)
    modules = {
        "first": model.layers[0].self_attn.q_proj, "first_mlp": model.layers[0].mlp, "last": model.layers[1].mlp,
        "last_query": model.layers[1].self_attn.q_proj, "last_key": model.layers[1].self_attn.k_proj,
        "norm": model.norm,
    }  # fmt: skip
    total = sum(sum(side["lengths"]) for side in sides.values())
    repeated = sum(5 * side["prefix"] for side in sides.values())
    assert sides["query"]["prefix"] > sides["positive"]["prefix"] > 0  # header and instruction, header alone
    assert repeated > 0.4 * total
    with counted(modules) as seen:
        embed(model, settings, sides)
    kept = total - repeated
    assert seen == {
        "first": [kept], "first_mlp": [kept], "last_key": [kept], "last": [12], "last_query": [12], "norm": [12]
    }  # fmt: skip
    with counted(modules) as seen:
        embed(model, settings_of("mean"), sides)
    assert {name: calls for name, calls in seen.items() if calls != [kept]} == {}
    with counted(modules) as seen:
        embed(model, settings_of("last", "bidirectional"), sides)
    assert seen["first"] == [total] and seen["last"] == [12]


def test_with_dropout_no_prefix_is_shared() -> None:
    """Each text's copy of it would have drawn its own numbers; in evaluation there are none to draw."""
    model = attach_lora(tiny_model("llama"), r=2, alpha=4, dropout=0.1)
    first = {"first": model.get_base_model().layers[0].mlp}
    settings = settings_of()
    sides = sides_of("llama", settings)
    total = sum(sum(side["lengths"]) for side in sides.values())
    for training in (True, False):
        model.train(training)
        with counted(first) as seen:
            embed(model, settings, sides)
        assert (seen["first"] == [total]) == training
    model = tiny_model("llama", attention_dropout=0.1).train()
    with counted({"first": model.layers[0].mlp, "last": model.layers[1].mlp}) as seen:
        embed(model, settings, sides)
    assert seen == {"first": [total], "last": [total]}


def test_a_template_without_closing_token_reads_the_last_pooled_one() -> None:
    """Rows that do not end where they are pooled are pooled from all states."""
    model = reference.exact(tiny_model("llama", initializer_range=0.3))
    batch = pack_rows([row([5, 9, 7, 3], "0010"), row([5, 9, 8], "001")])
    assert not batch["closed"]
    vectors = embed(model, settings_of(), {"text": batch})["text"]
    alone = states_alone(model, "causal", [[5, 9, 7, 3], [5, 9, 8]])
    torch.testing.assert_close(vectors, torch.stack([alone[0][2], alone[1][2]]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooling_mode", ["last", "mean", "weighted_mean", "first"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_encode_equals_the_padded_forward_pass(pooling_mode: str, padding_side: str) -> None:
    """`encode` packs; `forward` pads."""
    model = LLM2Vec(tiny_model("llama"), family_tokenizer("llama3"), pooling_mode)
    model.tokenizer.padding_side = padding_side
    texts = [["find:", "hello world"], ["", "a much longer text of many more words than the other"], ["", "x"]]
    with torch.no_grad():
        padded = model.eval()(model.tokenize(texts))
    torch.testing.assert_close(model.encode(texts, show_progress_bar=False), padded, rtol=0, atol=1e-5)
