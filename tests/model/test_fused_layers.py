"""Fused layers give what the library's layers give, in value and in every gradient, and round no worse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference
import torch
from helpers import MODELS, tiny_model
from torch import Tensor

from llm2vec.model import fused_layers
from llm2vec.model.backbone import attach_lora
from llm2vec.model.fused_layers import fuse, fused_decoders, why_not
from llm2vec.model.packing import checkpoint_contexts, inner_decoder, packed_hidden_states
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.types import Attention

#: Three texts that begin alike, then two that begin alike in another way.
IDS = [[5, 9, 12, 7], [5, 9, 3], [5, 9, 8, 8, 1], [4, 4, 9], [4, 6, 2]]
SHARED = [(3, 2), (2, 1)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused functions that ran, by name."""
    seen: list[str] = []
    run = fused_layers._run

    def noted(function: Callable[..., Any], *arguments: Any) -> Any:
        seen.append(function.__name__)
        return run(function, *arguments)

    monkeypatch.setattr(fused_layers, "_run", noted)
    return seen


def gradients_of(model: Any, attention: Attention, closing_only: bool) -> dict[str, Tensor]:
    """Of a weighted sum of the packed states; `states` are they themselves."""
    model.zero_grad()
    embeddings = model.get_input_embeddings()(torch.tensor([token for text in IDS for token in text]))
    states = packed_hidden_states(
        model, attention, [len(text) for text in IDS], embeddings, prefixes=SHARED, closing_only=closing_only
    )
    weight = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).reshape(states.shape)
    (states.double() * weight).sum().backward()
    return {"states": states.detach().double(), **reference.gradients(model)}


@pytest.mark.parametrize("closing_only", [False, True], ids=["all", "closing"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", list(MODELS))
def test_values_and_gradients_are_the_librarys(
    family: str, attention: Attention, closing_only: bool, runs: list[str]
) -> None:
    model = reference.exact(tiny_model(family, initializer_range=0.3)).train()
    expected = gradients_of(model, attention, closing_only)
    assert not runs
    fuse(inner_decoder(model))
    # Norms of the library compute in float32, whatever the model's precision.
    found = gradients_of(model, attention, closing_only)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6 * float(value.abs().max()), msg=name)
    kernels = {"_norm", "_add_and_norm", "_rotate", "_gated"} - ({"_gated"} if family == "gemma" else set())
    assert {name for name in runs if not name.endswith("_backward")} == kernels


def test_recomputed_layers_and_adapters(runs: list[str]) -> None:
    """Each fused function runs once more for every layer that is recomputed; the gradients stay."""
    model: Any = attach_lora(tiny_model("llama", initializer_range=0.3).requires_grad_(False), r=4, alpha=8, dropout=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    fuse(inner_decoder(model.train()))
    expected = gradients_of(model, "causal", True)
    once = runs.count("_gated")
    enable_checkpointing(model, {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, model)})
    found = gradients_of(model, "causal", True)
    assert runs.count("_gated") == 3 * once  # once before, and now twice
    reference.assert_same_gradients(found, expected, relative=1e-6)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_is_no_further_off_than_the_librarys(weights: torch.dtype) -> None:
    """Under autocast, and with half-precision weights, against float64 of the same weights."""
    half = tiny_model("llama", initializer_range=0.2, num_hidden_layers=4, hidden_size=64).train().to(weights)
    exact = reference.exact(tiny_model("llama", initializer_range=0.2, num_hidden_layers=4, hidden_size=64)).train()
    exact.load_state_dict(half.state_dict())
    truth = gradients_of(exact, "causal", True)

    def off() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
            found = gradients_of(half, "causal", True)
        return {name: float((found[name].double() - t).norm() / t.norm()) for name, t in truth.items()}

    stock = off()
    fuse(half)
    fused = off()
    # On a CPU the library's queries stay in float32 up to the product, as they do on no GPU.
    assert 1e-3 < max(stock.values()) < 0.2
    assert max(fused.values()) <= 1.1 * max(stock.values())
    assert sum(fused.values()) <= 1.3 * sum(stock.values())


def test_dropped_attention_and_other_families_run_as_the_library_has_them(runs: list[str]) -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    fuse(model)
    gradients_of(model, "causal", True)
    assert model in fused_decoders and not runs


@pytest.mark.slow
def test_compiled_functions_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's CPU backend; the same code makes the kernels of a GPU."""
    compiled = fused_layers._compiled
    monkeypatch.setattr(fused_layers, "_run", lambda function, *arguments: compiled(function)(*arguments))
    assert why_not(torch.device("cpu")) is None
    doubled = lambda function, *arguments: tuple(2 * made for made in fused_layers._tensors(function(*arguments)))  # noqa: E731
    monkeypatch.setattr(fused_layers, "_run", doubled)
    assert why_not(torch.device("cpu")) == "norm gives other numbers when compiled"
