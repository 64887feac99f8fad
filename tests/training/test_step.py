"""A step in micro-batches has the gradient of the whole, dropout included, and the memory of one micro-batch."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import attach_lora
from llm2vec.model.packing import checkpoint_contexts
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.training import step
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.training.step import add_up, backward_step, balanced, loss_parts, number_of_pieces, seeded, split_batch
from llm2vec.types import Batch, Output, TextFacts, TokenBatch

SETTINGS = EncoderSettings(pooling_mode="last", attention="causal")

#: Tokens of each row, and a budget that may be below a row's.
TOKENS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
BUDGETS = st.integers(1, 200)


def contrastive(dropout: float = 0.0, checkpointing: bool = False) -> tuple[ContrastiveLearning, CollateSides]:
    """Stage II in float64, in training mode, over an adapter that does something."""
    decoder = tiny_model("llama", initializer_range=0.2)
    model = reference.exact(attach_lora(decoder, r=4, alpha=8, dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    if checkpointing:
        enable_checkpointing(model, {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, decoder)})
    collate = CollateSides(row_tokenizer(family_tokenizer("llama"), SETTINGS), ("query", "positive", "negative"))
    return ContrastiveLearning(model, SETTINGS).train(), collate


def reconstruction() -> tuple[BidirectionalReconstruction, CollateSides]:
    model = reference.exact(tiny_model("llama", True, initializer_range=0.2))
    collate = CollateSides(row_tokenizer(family_tokenizer("llama"), SETTINGS), ("query", "positive"))
    return BidirectionalReconstruction(model, SETTINGS), collate


# --- which rows go together ---


@given(TOKENS, BUDGETS)
def test_pieces_hold_every_row_once_and_stay_within_the_budget(tokens: list[int], budget: int) -> None:
    """No piece is empty or above the budget, unless it is one row that is longer by itself."""
    number = number_of_pieces(tokens, budget)
    pieces = balanced(tokens, number)
    assert sorted(row for piece in pieces for row in piece) == list(range(len(tokens)))
    assert all(pieces) and len(pieces) == number
    assert all(piece == sorted(piece) for piece in pieces)
    most = max(budget, max(tokens))
    assert all(sum(tokens[row] for row in piece) <= most for piece in pieces)
    assert number >= sum(tokens) / most
    assert number == 1 or max(sum(tokens[row] for row in piece) for piece in balanced(tokens, number - 1)) > most


@given(TOKENS, BUDGETS, st.integers(0, 10))
def test_more_pieces_than_needed_stay_within_the_budget_too(tokens: list[int], budget: int, more: int) -> None:
    """Another rank may need more of them."""
    number = min(number_of_pieces(tokens, budget) + more, len(tokens))
    most = max(budget, max(tokens))
    assert all(sum(tokens[row] for row in piece) <= most and piece for piece in balanced(tokens, number))


@given(TOKENS, st.integers(1, 40))
def test_pieces_are_nearly_balanced(tokens: list[int], number: int) -> None:
    """Two pieces differ by at most the longest row; the largest has at most 4/3 of the best possible (Graham 1969)."""
    number = min(number, len(tokens))
    sums = [sum(tokens[row] for row in piece) for piece in balanced(tokens, number)]
    assert max(sums) - min(sums) <= max(tokens)
    longest_first = sorted(tokens, reverse=True)
    pigeonhole = longest_first[number - 1] + longest_first[number] if len(tokens) > number else 0
    at_least = max(sum(tokens) / number, longest_first[0], pigeonhole)
    if number == 1 or len(tokens) <= number:
        assert max(sums) == at_least
    else:
        assert max(sums) <= sum(tokens) / number + longest_first[0] * (1 - 1 / number) + 1e-9


def test_balanced_by_hand() -> None:
    assert balanced([5, 3, 9, 1], 2) == [[2], [0, 1, 3]]
    assert balanced([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]
    assert number_of_pieces([5, 3, 9, 1], 18) == 1
    assert number_of_pieces([5, 3, 9, 1], 9) == number_of_pieces([5, 3, 9, 1], 1) == 2
    assert number_of_pieces([5, 5, 5, 5], 9) == 4


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 3), st.integers(1, 120))
def test_a_row_keeps_its_sides_and_all_its_negatives(num_rows: int, num_negatives: int, budget: int) -> None:
    """Joined again, the pieces are the batch's texts, each with the mask it had; K negatives follow their row."""
    collate = CollateSides(RENDERER, ("query", "positive", "negative") if num_negatives else ("query", "positive"))
    rows = reference.examples(num_rows, num_negatives, seed=num_rows)
    batch = collate(rows)
    pieces = split_batch(batch, budget)
    expected = [texts_of(collate([row])) for row in rows]
    found = []
    for piece in pieces:
        in_piece = len(piece["query"]["lengths"])
        assert in_piece > 0
        of_sides = texts_of(piece)
        for i in range(in_piece):
            per_row = {side: len(texts) // in_piece for side, texts in of_sides.items()}
            found.append({side: texts[i * per_row[side] : (i + 1) * per_row[side]] for side, texts in of_sides.items()})
        tokens = sum(sum(side["lengths"]) for side in piece.values())
        assert tokens <= budget or in_piece == 1 or tokens <= max(map(num_tokens, expected))
    assert len(found) == len(expected)
    assert sorted(map(repr, found)) == sorted(map(repr, expected))
    assert split_batch(batch, None) == [batch]


RENDERER = row_tokenizer(family_tokenizer("llama"), SETTINGS)


def texts_of(batch: Batch) -> dict[str, list[tuple[Any, ...]]]:
    """Each side's texts: ids, pooled and target positions, number of targets."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for name, side in batch.items():
        flat = [side[key].split(side["lengths"]) for key in ("input_ids", "pool_mask", "target_mask")]  # type: ignore[literal-required]
        parts = [[tensor.tolist() for tensor in tensors] for tensors in flat]
        found[name] = list(zip(*parts, side["num_targets"], strict=True))
        assert side["closed"] and side["prefix"] < min(side["lengths"])
    return found


def num_tokens(texts: dict[str, list[tuple[Any, ...]]]) -> int:
    return sum(len(text[0]) for side in texts.values() for text in side)


def test_pieces_are_as_many_as_the_neediest_rank_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose weights lie spread over ranks must be called equally often everywhere."""
    collate = CollateSides(RENDERER, ("query", "positive"))
    batch = collate(reference.examples(6))
    monkeypatch.setattr(step, "max_over_ranks", lambda number: number + 2)
    for budget in (10_000, 60):
        own = number_of_pieces([num_tokens(texts_of(collate([row]))) for row in reference.examples(6)], budget)
        assert len(split_batch(batch, budget)) == min(own + 2, 6)


# --- the cached gradient ---


@contextmanager
def same_seeds(seeds: list[int]) -> Iterator[None]:
    """`torch.randint` draws these where a step draws its pieces' seeds."""
    original = torch.randint
    torch.randint = lambda *args, **kwargs: torch.tensor(seeds)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randint = original


@pytest.mark.parametrize("keep", [False, True], ids=["every_piece_twice", "last_piece_once"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_dropout_it_is_the_gradient_of_one_pass_with_the_same_masks(
    checkpointing: bool, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pieces in one graph, each embedded under its piece's seed, against a step in pieces."""
    monkeypatch.setattr(step, "MOST_PIECES_WITH_A_GRAPH", 8 if keep else 0)
    objective, collate = contrastive(dropout=0.3, checkpointing=checkpointing)
    batch = collate(reference.examples(6, 2))
    totals = objective.count(batch)
    pieces = split_batch(batch, 120)
    assert len(pieces) > 2
    seeds = list(range(11, 11 + len(pieces)))

    def whole_step(of_pieces: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        outputs: list[Output] = []
        for piece, seed in zip(pieces, of_pieces, strict=True):
            with seeded(seed, piece):
                outputs.append(objective(piece, totals))
        vectors = {side: torch.cat([output.vectors[side] for output in outputs]) for side in batch}
        loss = objective.contrast(vectors, {}, totals)["loss"]
        loss.backward()
        return loss.detach(), reference.gradients(objective)

    loss, expected = whole_step(seeds)
    calls: list[int] = []
    objective.model.get_base_model().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with same_seeds(seeds):
        parts = backward_step(objective, batch, totals, max_tokens=120)
    assert len(calls) == len(pieces) * (3 if checkpointing else 2) - keep
    torch.testing.assert_close(parts["loss"], loss, rtol=1e-11, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)
    other_loss, other = whole_step(seeds[::-1])  # with other masks, another gradient
    assert abs(other_loss / loss - 1) > 1e-4
    with pytest.raises(AssertionError, match="apart"):
        reference.assert_same_gradients(other, expected, relative=0.01)


@pytest.mark.usefixtures("every_piece_twice")
def test_both_passes_draw_the_same_numbers_and_each_piece_its_own() -> None:
    """Vectors of the second pass equal the first's to the bit; two steps and two pieces differ in their masks."""
    objective, collate = contrastive(dropout=0.3)
    row = reference.examples(1, 1)[0]
    batch = collate([row] * 3)  # three times the same, so that only dropout tells them apart
    seen: list[Tensor] = []
    objective.register_forward_hook(lambda module, args, output: seen.append(output.vectors["query"].detach()[0]))
    for _ in range(2):
        backward_step(objective, batch, objective.count(batch), max_tokens=1)
    assert len(seen) == 2 * 2 * 3
    for i in (0, 1, 2, 6, 7, 8):
        assert torch.equal(seen[i], seen[i + 3])
    distinct = [seen[i] for i in (0, 1, 2, 6, 7, 8)]
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(distinct) for other in distinct[:i])


def test_random_numbers_go_on_as_if_nothing_was_drawn() -> None:
    """Within `seeded` a seed decides; outside, the generator's state is as before."""
    _, collate = contrastive()
    batch = collate(reference.examples(2, 1))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, batch):
        first = torch.rand(4)
    with seeded(1, batch):
        assert torch.equal(torch.rand(4), first)
    with seeded(2, batch):
        assert not torch.equal(torch.rand(4), first)
    assert torch.equal(torch.rand(3), expected)


class Mixed(nn.Module):
    """Rows' numbers as vectors, a loss that stands in each row alone and one between the vectors."""

    contrasts = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.asked_for_parts: list[bool] = []

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        numbers = batch["side"]["input_ids"].double()
        vectors = numbers.unsqueeze(1) * self.weight + self.weight**2
        self.asked_for_parts.append(bool(totals))
        if not totals:
            return Output({}, {"side": vectors})
        alone = (vectors**2).sum() / totals["rows"]
        return Output({"loss": alone, "loss_alone": alone.detach()}, {"side": vectors})

    def contrast(self, vectors: dict[str, Tensor], facts: TextFacts, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        products = vectors["side"] @ vectors["side"].T
        loss = products.logsumexp(dim=1).sum() / totals["rows"]
        return {"loss": loss, "loss_between": loss.detach()}


def mixed_batch(num_rows: int) -> Batch:
    ids = torch.arange(num_rows) % 5
    ones = torch.ones(num_rows, dtype=torch.bool)
    return {
        "side": {
            "input_ids": ids, "lengths": [1] * num_rows, "pool_mask": ones, "target_mask": ones,
            "num_targets": [1] * num_rows, "num_predicted": [0] * num_rows, "num_different": [1] * num_rows,
            "num_context": [1] * num_rows, "prefix": 0, "closed": True,
        }
    }  # fmt: skip


@pytest.mark.usefixtures("every_piece_twice")
def test_losses_of_both_kinds_go_together() -> None:
    """One objective with parts and vectors: in pieces, the figures and gradient of one pass."""
    batch, totals = mixed_batch(7), {"rows": torch.tensor(7.0)}
    found = []
    for max_tokens in (None, 3, 1):
        objective = Mixed()
        parts = backward_step(objective, batch, totals, max_tokens=max_tokens)
        pieces = len(split_batch(batch, max_tokens))
        # The pass that only embeds asks for no loss, as the one with a graph computes it.
        assert objective.asked_for_parts == ([True] if pieces == 1 else [False] * pieces + [True] * pieces)
        assert parts["loss"].item() == pytest.approx((parts["loss_alone"] + parts["loss_between"]).item())
        figures = loss_parts(objective, batch, totals, max_tokens)
        assert figures.keys() == parts.keys()
        found.append((parts["loss"], figures["loss"], objective.weight.grad))
    for values in found[1:]:
        for value, expected in zip(values, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


# --- how a step is taken ---


@pytest.mark.parametrize("make", [reconstruction, contrastive])
@pytest.mark.parametrize("max_tokens", [None, 80])
def test_scale_is_a_factor_of_the_gradient_alone(make: Any, max_tokens: int | None) -> None:
    objective, collate = make()
    batch = collate(reference.examples(6, 1))
    totals = objective.count(batch)
    parts = backward_step(objective, batch, totals, max_tokens=max_tokens)
    expected = {name: 3 * gradient for name, gradient in reference.gradients(objective).items()}
    scaled = backward_step(objective, batch, totals, max_tokens=max_tokens, scale=3.0)
    reference.assert_same_gradients(reference.gradients(objective), expected)
    assert scaled.keys() == parts.keys()
    for name, value in parts.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-12, atol=0)
        assert not value.requires_grad


@pytest.mark.usefixtures("every_piece_twice")
@pytest.mark.parametrize("make", [reconstruction, contrastive])
def test_gradients_are_added_and_exchanged_with_the_last_piece(make: Any) -> None:
    """`backward` differentiates every piece; all but the last under `no_sync`; what `.grad` held stays in it."""
    objective, collate = make()
    batch = collate(reference.examples(6, 1))
    totals = objective.count(batch)
    num_pieces = len(split_batch(batch, 60))
    events: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        events.append("enter")
        yield
        events.append("leave")

    def backward(loss: Tensor) -> None:
        events.append("backward")
        assert loss.shape == ()
        loss.backward()

    for _ in range(2):
        backward_step(objective, batch, totals, max_tokens=60, backward=backward, no_sync=no_sync)
    assert num_pieces > 2
    assert events == 2 * [*["enter", "backward", "leave"] * (num_pieces - 1), "backward"]
    twice = reference.gradients(objective)
    backward_step(objective, batch, totals, no_sync=lambda: pytest.fail("one piece is the last one"))
    once = reference.gradients(objective)
    reference.assert_same_gradients(twice, {name: 2 * gradient for name, gradient in once.items()})


@pytest.mark.parametrize("make", [reconstruction, contrastive])
def test_loss_parts_are_the_figures_of_a_step(make: Any) -> None:
    """And nothing is differentiated for them."""
    objective, collate = make()
    batch = collate(reference.examples(6, 1))
    totals = objective.count(batch)
    for max_tokens in (None, 80):
        figures = loss_parts(objective, batch, totals, max_tokens)
        assert all(parameter.grad is None for parameter in objective.parameters())
        parts = backward_step(objective, batch, totals, max_tokens=max_tokens)
        objective.zero_grad()
        assert figures.keys() == parts.keys()
        for name, value in parts.items():
            torch.testing.assert_close(figures[name], value, rtol=1e-12, atol=0)
            assert not figures[name].requires_grad


def test_add_up_by_hand() -> None:
    one, two = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)
    total = add_up([{"a": one, "b": two}, {}, {"a": two}])
    assert {name: value.item() for name, value in total.items()} == {"a": 3.0, "b": 2.0}
    assert not total["a"].requires_grad


# --- memory ---


class Live:
    """Counts the entries of all tensors that a graph holds, weights left out, and the most of them at once."""

    def __init__(self, objective: nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
        self.now = 0
        self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        """For `saved_tensors_hooks`."""
        if tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        held = Held(tensor)
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        weakref.finalize(held, self._let_go, tensor.numel())
        return held

    def _let_go(self, entries: int) -> None:
        self.now -= entries


class Held:
    """A tensor for as long as its graph lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def most_held(objective: Any, batch: Batch, max_tokens: int | None) -> int:
    """Most entries that the graphs of a step hold at once."""
    live = Live(objective)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: getattr(held, "tensor", held)):
        backward_step(objective, batch, objective.count(batch), max_tokens=max_tokens)
    assert live.now == 0
    objective.zero_grad()
    return live.most


@pytest.mark.parametrize("make", [reconstruction, contrastive])
def test_a_graph_does_not_grow_with_the_rows(make: Any) -> None:
    """Four times the rows in pieces of as many tokens: the same memory, but for the vectors of the pool; in one pass,
    four times as much. And a piece takes no more than its share of the whole."""
    objective, collate = make()
    few, many = (collate(reference.under_one_instruction(reference.examples(n, 1, seed=3))) for n in (16, 64))
    assert most_held(objective, many, 200) < 1.25 * most_held(objective, few, 200)
    whole = most_held(objective, many, None)
    assert whole > 3 * most_held(objective, few, None)
    num_pieces = len(split_batch(many, 200))
    assert num_pieces > 8
    assert most_held(objective, many, 200) < 2 * whole / num_pieces


@pytest.mark.usefixtures("every_piece_twice")
def test_the_pass_without_a_graph_holds_nothing() -> None:
    """When a contrastive step compares the vectors of all pieces, no activation of any has been kept."""
    objective, collate = contrastive()
    batch = collate(reference.examples(12, 1))
    live = Live(objective)
    calls: list[int] = []
    seen: list[tuple[int, int]] = []
    original = objective.contrast

    def contrast(*arguments: Any) -> dict[str, Tensor]:
        seen.append((len(calls), live.most))
        return original(*arguments)

    objective.register_forward_hook(lambda *_: calls.append(1))
    objective.contrast = contrast  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: getattr(held, "tensor", held)):
        backward_step(objective, batch, objective.count(batch), max_tokens=100)
    num_pieces = len(split_batch(batch, 100))
    assert num_pieces > 3
    assert seen == [(num_pieces, 0)]
    assert len(calls) == 2 * num_pieces and live.most > 0 == live.now


@pytest.mark.usefixtures("every_piece_twice")
def test_the_pass_with_graphs_holds_gradients_and_no_vectors() -> None:
    """When the first piece is embedded again, the pool's vectors are gone: of each text one vector's memory is left."""
    objective, collate = contrastive()
    batch = collate(reference.examples(12, 1))
    vectors: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    original = objective.contrast

    def contrast(of_all: dict[str, Tensor], facts: TextFacts, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        vectors.extend(weakref.ref(of_all[side]) for side in batch)
        return original(of_all, facts, totals)

    objective.register_forward_hook(lambda *_: alive.extend(vector() is not None for vector in vectors))
    objective.contrast = contrast  # type: ignore[method-assign]
    backward_step(objective, batch, objective.count(batch), max_tokens=100)
    assert len(vectors) == 3 and len(alive) >= 3 * 3
    assert not any(alive)


def test_cutting_a_batch_costs_what_its_rows_are() -> None:
    """Eight times the rows, little more than eight times the work; going over all rows for each piece would be 64."""

    def seconds(num_rows: int) -> float:
        lengths = [20 + 7 * i % 50 for i in range(num_rows)]
        ids, mask = torch.zeros(sum(lengths), dtype=torch.long), torch.ones(sum(lengths), dtype=torch.bool)
        side: TokenBatch = {
            "input_ids": ids, "lengths": lengths, "pool_mask": mask, "target_mask": mask, "num_targets": lengths,
            "num_predicted": lengths, "num_different": lengths, "num_context": lengths, "prefix": 0, "closed": True,
        }  # fmt: skip
        start = time.process_time()
        assert sum(len(piece["query"]["lengths"]) for piece in split_batch({"query": side}, 100)) == num_rows
        return time.process_time() - start

    few, many = (min(seconds(rows) for _ in range(3)) for rows in (2_500, 20_000))
    assert many < 40 * few
