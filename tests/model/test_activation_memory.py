"""Activations are measured as they are, and a budget recomputes as few layers as it must; compiled layers agree."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, cast

import every_objective
import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model
from torch import Tensor

from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.packing import compile_layers
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.training.config import Config
from llm2vec.training.config.arguments import training_arguments
from llm2vec.training.config.file import checked_config
from llm2vec.training.model import decoder_of, load_model
from llm2vec.training.recomputation import (
    bytes_per_token,
    fit_activations,
    layers_to_recompute,
    measured_bytes,
)
from llm2vec.training.run import _fit_activations
from llm2vec.training.stages import stage_parts
from llm2vec.training.step import backward_step
from llm2vec.types import Batch, UserError

ROWS = reference.examples(12)
LAYERS = 4


def make() -> tuple[BidirectionalReconstruction, Batch, Batch]:
    """An objective over four layers, a few rows and more of them."""
    model = reference.exact(tiny_model("llama", True, num_hidden_layers=LAYERS, initializer_range=0.2)).train()
    settings = EncoderSettings(pooling_mode="last", attention="causal", template="llama3")
    collate = CollateSides(row_tokenizer(family_tokenizer("llama"), settings), ("query", "positive"))
    return BidirectionalReconstruction(model, settings), collate(ROWS[:6]), collate(ROWS)


class SimpleRows(list[Any]):
    """Rows of one source, as far as a run's start asks for them."""

    @property
    def sizes(self) -> list[int]:
        return [len(self)]


def run(objective: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    parts = backward_step(objective, batch, objective.count(batch))
    return parts["loss"], reference.gradients(objective)


def calls_of(layer: Any, objective: Any, batch: Batch) -> int:
    """How often a layer's MLP runs in a step."""
    calls: list[int] = []
    handle = layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    run(objective, batch)
    handle.remove()
    return len(calls)


def test_weights_are_not_counted_and_each_tensor_is_once() -> None:
    """By hand: y = (x w)^2 keeps x for the gradient of w, and x w twice over for the square, in one storage."""

    class Square(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8, 8))

        def count(self, batch: Any) -> dict[str, Tensor]:
            return {}

        def forward(self, batch: Any, totals: Any) -> Tensor:
            product = batch["x"] @ self.weight
            return product * product

    x = torch.ones(5, 8)
    square: Any = Square()
    assert measured_bytes(square, {"x": x}) == 2 * x.nbytes  # type: ignore[typeddict-item]


def test_what_is_measured_is_not_held() -> None:
    """A card has room for a layer at work, not for all that a run keeps: x^2, x^4 ... are gone when the pass ends."""
    made: list[Any] = []

    class Squares(torch.nn.Module):
        def count(self, batch: Any) -> dict[str, Tensor]:
            return {}

        def forward(self, batch: Any, totals: Any) -> None:
            x = batch["x"]
            for _ in range(10):
                made.append(weakref.ref(x.untyped_storage()))
                x = x * x

    squares: Any = Squares()
    x = torch.ones(5, 8).requires_grad_()
    assert measured_bytes(squares, {"x": x}) == 10 * x.nbytes  # type: ignore[typeddict-item]
    assert sum(storage() is not None for storage in made) == 1  # x itself


def test_memory_grows_with_tokens_and_shrinks_with_recomputed_layers() -> None:
    objective, small, large = make()
    whole = bytes_per_token(objective, small, large)
    budget = 0.75 * whole * 1000 / 1e9
    line = fit_activations(objective, objective.decoder, [(small, large)], 1000, budget)
    recomputed = [layer.gradient_checkpointing for layer in objective.decoder.layers]
    assert 0 < sum(recomputed) < LAYERS and recomputed == sorted(recomputed, reverse=True)
    assert f"{sum(recomputed)} of {LAYERS} layers are recomputed" in line
    left = bytes_per_token(objective, small, large)
    # What the recomputed layers still keep is their input; the rest of the saving is real.
    assert left < whole * (1 - 0.7 * sum(recomputed) / LAYERS)
    one_layer = whole / LAYERS  # comes back while a layer is recomputed
    assert (left + one_layer) * 1000 / 1e9 <= budget * 1.05


def test_a_large_budget_recomputes_nothing() -> None:
    objective, small, large = make()
    line = fit_activations(objective, objective.decoder, [(small, large)], 1000, 100.0)
    assert "0 of 4 layers" in line
    assert calls_of(objective.decoder.layers[0], objective, large) == 2


def test_results_do_not_depend_on_the_budget() -> None:
    objective, small, large = make()
    loss, gradients = run(objective, large)
    whole = bytes_per_token(objective, small, large)
    fit_activations(objective, objective.decoder, [(small, large)], 1000, 0.75 * whole * 1000 / 1e9)
    assert calls_of(objective.decoder.layers[0], objective, large) == 4
    assert calls_of(objective.decoder.layers[-1], objective, large) == 2
    again, same = run(objective, large)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    reference.assert_same_gradients(same, gradients)


def test_the_source_whose_tokens_keep_most_decides() -> None:
    """Whichever comes first. Rows of long instructions keep less a token: an instruction is not decoded."""
    per_source = []
    for instruction in ("", "find the answer to it who wrote the red green blue calm water " * 4):
        rows = [row._replace(query=row.query._replace(instruction=instruction)) for row in ROWS]
        objective, _, _ = make()
        collate = CollateSides(row_tokenizer(family_tokenizer("llama"), objective.settings), ("query", "positive"))
        per_source.append((collate(rows[:6]), collate(rows)))
    kept = [bytes_per_token(objective, *batches) for batches in per_source]
    assert kept[0] > 1.1 * kept[1]
    for order in (per_source, per_source[::-1]):
        line = fit_activations(objective, objective.decoder, order, 1000, 100.0)
        assert line.startswith(f"activations {kept[0] * 1000 / 1e9:.2f} GB")


def test_a_run_measures_what_its_steps_will_keep(tmp_path: Path) -> None:
    """A model is loaded without dropout, whose masks, and what else training keeps, belong to the budget."""
    tiny_model("llama", num_hidden_layers=LAYERS).save_pretrained(tmp_path)
    family_tokenizer("llama").save_pretrained(tmp_path)
    training = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none"}
    keys: dict[str, Any] = {"simcse_dropout": 0.3, "tokens_per_microbatch": 1_000_000, "dataset_file_path": "x"}
    config = checked_config(Config(str(tmp_path), stage="simcse", activation_memory_gb=1e3, training=training, **keys))
    model, tokenizer, settings = load_model(config, torch.device("cpu"), with_lm_head=False)
    parts, rows = stage_parts(config), cast(Any, SimpleRows(ROWS))
    objective = parts.objective(config, model, settings, tokenizer)
    collate = parts.collate(config, tokenizer, settings, 0)
    (line,) = _fit_activations(config, training_arguments(config), objective, rows, collate)
    objective.model.train()
    batches = [(collate(ROWS[:1]), collate(ROWS[:8]))]
    assert line == fit_activations(objective, decoder_of(objective.model), batches, 1_000_000, 1e3)


def test_weights_of_another_precision_are_measured_as_they_will_be() -> None:
    """FSDP2 computes with bfloat16 copies of float32 weights, before which the budget is measured."""
    _, small, large = make()
    model = tiny_model("llama", True, num_hidden_layers=LAYERS).train()
    settings = EncoderSettings(pooling_mode="last", attention="causal", template="llama3")
    objective = BidirectionalReconstruction(model, settings)
    as_run = bytes_per_token(objective, small, large, torch.bfloat16)
    assert bytes_per_token(objective, small, large) > 1.2 * as_run
    assert {weight.dtype for weight in objective.parameters()} == {torch.float32}
    assert as_run == bytes_per_token(objective.bfloat16(), small, large)


@pytest.mark.parametrize("kind", every_objective.KINDS)
def test_a_budget_that_fits_with_all_layers_recomputed_is_not_refused(kind: str) -> None:
    """What is left then is measured, and a layer comes back while it is recomputed."""
    objective, batch_of = every_objective.make(kind, num_hidden_layers=LAYERS)
    small, large = batch_of(8), batch_of(24)
    whole = bytes_per_token(objective, small, large)
    objective, _ = every_objective.make(kind, recomputes=True, num_hidden_layers=LAYERS)
    needed = (bytes_per_token(objective, small, large) + whole / LAYERS) * 1000 / 1e9
    objective, _ = every_objective.make(kind, num_hidden_layers=LAYERS)
    line = fit_activations(objective, decoder_of(objective.model), [(small, large)], 1000, needed)
    assert f"{LAYERS} of {LAYERS} layers are recomputed" in line
    left = bytes_per_token(objective, small, large)  # those of a frozen copy, too
    assert (left + whole / LAYERS) * 1000 / 1e9 == pytest.approx(needed, rel=1e-3)


@pytest.mark.parametrize(("budget", "number"), [(40.0, 0), (39.9, 2), (33.0, 2), (32.0, 2), (31.9, 3), (14.0, 4)])
def test_number_of_layers_by_hand(budget: float, number: int) -> None:
    """Four layers of 10, of which 1 is left when recomputed, and 10 come back for the layer at work."""
    assert layers_to_recompute(10.0, 1.0, 4, budget) == number


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(UserError, match="make tokens_per_microbatch smaller"):
        layers_to_recompute(10.0, 1.0, 4, 13.9)


def test_compiled_layers_give_the_same_loss_and_gradients() -> None:
    """Traced by dynamo without code generation, in float64, over batches of several sizes."""
    objective, small, large = make()
    expected = [run(objective, batch) for batch in (small, large)]
    names = list(objective.state_dict())
    compile_layers(objective.model, backend="eager")
    assert list(objective.state_dict()) == names
    for batch, (loss, gradients) in zip((small, large), expected, strict=True):
        again, same = run(objective, batch)
        torch.testing.assert_close(again, loss, rtol=1e-10, atol=0)
        reference.assert_same_gradients(same, gradients)
