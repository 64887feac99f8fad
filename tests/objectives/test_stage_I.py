"""Stage I equals Algorithm 1, whatever the batch looks like, and hears of a text only through its anchor."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments

from llm2vec import llm2vec_q2d_d2q
from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction, LLM2Vec_q2d_d2q
from llm2vec.model import packing
from llm2vec.model.packing import checkpoint_contexts
from llm2vec.model.pooling import embed
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.text.tokenization import Row
from llm2vec.training.config import Config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.training.step import add_up, backward_step, loss_parts, split_batch
from llm2vec.training.trainer import EmbedderTrainer
from llm2vec.types import AnchorProjection, Attention, Batch, Example, InstructedText, PoolingMode, Reduction

ROWS = reference.examples(8)


class InOrder(SequentialSampler):
    """Rows as they stand, in every epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""


def make(
    alpha: float = 0.2,
    family: str = "llama",
    *,
    model: dict[str, Any] | None = None,
    projection: AnchorProjection = "none",
    **settings: Any,
) -> tuple[BidirectionalReconstruction, CollateSides]:
    """A float64 objective over a random model whose layers all matter, and what makes its batches."""
    decoder = reference.exact(tiny_model(family, True, initializer_range=0.2, **(model or {})))
    reconstruct_instruction = settings.pop("reconstruct_instruction", False)
    encoder = EncoderSettings(**({"pooling_mode": "last", "attention": "causal", "template": None} | settings))
    renderer = row_tokenizer(family_tokenizer(family), encoder, reconstruct_instruction=reconstruct_instruction)
    objective = BidirectionalReconstruction(decoder, encoder, alpha, projection=projection)
    return objective, CollateSides(renderer, ("query", "positive"))


def totals_of(objective: BidirectionalReconstruction, batches: list[Batch]) -> dict[str, Tensor]:
    counts = [objective.count(batch) for batch in batches]
    return {name: torch.stack([count[name] for count in counts]).sum() for name in counts[0]}


def run_step(
    objective: BidirectionalReconstruction, batches: list[Batch], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Loss parts of a step of several batches, summed; gradients are left on the parameters."""
    totals = totals_of(objective, batches)
    return add_up([backward_step(objective, batch, totals, max_tokens=max_tokens) for batch in batches])


def row_pairs(collate: CollateSides, rows: list[Example]) -> list[tuple[Row, Row]]:
    queries = collate.tokenizer.rows([row.query for row in rows])
    positives = collate.tokenizer.rows([row.positive for row in rows])
    return list(zip(queries, positives, strict=True))


def anchors(objective: BidirectionalReconstruction, batch: Batch) -> Tensor:
    """Those of the queries [B, D]."""
    return embed(objective.decoder, objective.settings, {"query": batch["query"]})["query"]


# --- the loss and its gradient ---


CASES: dict[str, tuple[float, str, dict[str, Any]]] = {
    "mix": (0.2, "llama", {}),
    "only_d2q": (0.0, "llama", {}),
    "only_q2d": (1.0, "llama", {}),
    "tied": (0.2, "llama", {"model": {"tie_word_embeddings": True}}),
    "bidirectional": (0.2, "qwen2", {"attention": "bidirectional"}),
    "mean_and_instruction_target": (0.2, "mistral", {"pooling_mode": "mean", "reconstruct_instruction": True}),
    "gemma": (0.2, "gemma", {"model": {"tie_word_embeddings": True}}),
    "equal_heads": (0.2, "qwen3", {"model": {"num_key_value_heads": 4}}),
    "bidirectional_mean": (0.2, "llama", {"attention": "bidirectional", "pooling_mode": "mean"}),
    "shared_prefix": (0.2, "llama", {"shared": True, "model": {"num_key_value_heads": 4}}),
    "shared_prefix_mean": (0.2, "qwen2", {"shared": True, "pooling_mode": "mean"}),
    "shared_prefix_gemma": (0.5, "gemma", {"shared": True, "model": {"tie_word_embeddings": False}}),
}


@pytest.mark.parametrize(("alpha", "family", "options"), CASES.values(), ids=CASES)
def test_loss_and_every_gradient_equal_algorithm_1(alpha: float, family: str, options: dict[str, Any]) -> None:
    """In one pass, in a few micro-batches, and row by row."""
    options = dict(options)
    rows = reference.under_one_instruction(ROWS) if options.pop("shared", False) else ROWS
    objective, collate = make(alpha, family, **options)
    tied = options.get("model", {}).get("tie_word_embeddings", False)
    embeddings = objective.model.get_input_embeddings().weight
    assert (objective.model.get_output_embeddings().weight is embeddings) == tied
    attention, pooling_mode = objective.settings.attention, objective.settings.pooling_mode
    expected = reference.stage_one(objective.model, row_pairs(collate, rows), alpha, attention, pooling_mode)
    expected.loss.backward()
    expected_gradients = reference.gradients(objective)
    batch = collate(rows)
    header_alone = collate(ROWS)["query"]["prefix"]
    assert 0 < header_alone <= batch["query"]["prefix"]
    assert (batch["query"]["prefix"] > header_alone) == (rows is not ROWS)
    for max_tokens, num_pieces in ((None, 1), (70, None), (1, 8)):
        pieces = split_batch(batch, max_tokens)
        assert len(pieces) == num_pieces or (num_pieces is None and 1 < len(pieces) < 8)
        parts = run_step(objective, [batch], max_tokens)
        assert parts["loss"].dtype == torch.float64
        torch.testing.assert_close(parts["loss"], expected.loss.detach(), rtol=1e-9, atol=0)
        if alpha > 0:
            torch.testing.assert_close(parts["loss_q2d"], expected.q2d.detach(), rtol=1e-9, atol=0)
        if alpha < 1:
            torch.testing.assert_close(parts["loss_d2q"], expected.d2q.detach(), rtol=1e-9, atol=0)
        reference.assert_same_gradients(reference.gradients(objective), expected_gradients)


@pytest.mark.parametrize("max_tokens", [None, 70, 1])
@pytest.mark.parametrize("projection", ["scaled", "linear"])
def test_projected_anchors_equal_the_reference_in_loss_and_every_gradient(
    projection: AnchorProjection, max_tokens: int | None
) -> None:
    objective, collate = make(0.2, projection=projection)
    table = objective.model.get_input_embeddings().weight.detach().clone()
    length = sum((row * row).sum().sqrt() for row in table) / len(table)
    if projection == "linear":
        learnt = objective.projection
        assert isinstance(learnt, torch.nn.Linear) and torch.equal(learnt.weight, torch.eye(len(table[0])).double())
        reference.randomise(learnt)

    def project(anchor_D: Tensor) -> Tensor:
        if projection == "linear":
            return learnt.weight @ anchor_D + learnt.bias
        return anchor_D * length / (anchor_D * anchor_D).sum().sqrt()

    rows = row_pairs(collate, ROWS)
    expected = reference.stage_one(objective.model, rows, 0.2, project=project)
    expected.loss.backward()
    gradients = reference.gradients(objective)
    assert ("projection.weight" in gradients) == (projection == "linear")
    parts = run_step(objective, [collate(ROWS)], max_tokens)
    torch.testing.assert_close(parts["loss"], expected.loss.detach(), rtol=1e-9, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), gradients)


def test_how_long_anchors_are_beside_embeddings_is_logged() -> None:
    """Raw anchors, over all rows of the step, whatever becomes of them."""
    objective, collate = make(0.2, projection="scaled")
    batch = collate(ROWS)
    anchors_BD = embed(objective.decoder, objective.settings, batch)
    lengths = torch.cat([of_side.norm(dim=1) for of_side in anchors_BD.values()])
    targets = torch.cat([side["input_ids"][side["target_mask"]] for side in batch.values()])
    embeddings = objective.model.get_input_embeddings()(targets)
    for max_tokens in (None, 70):
        parts = run_step(objective, [batch], max_tokens)
        torch.testing.assert_close(parts["anchor_norm"], lengths.mean().detach())
        torch.testing.assert_close(parts["embedding_norm"], embeddings.norm(dim=1).mean().detach())


def test_the_two_directions_differ_and_are_mixed_by_alpha() -> None:
    objective, collate = make(0.2)
    parts = run_step(objective, [collate(ROWS)])
    assert abs(parts["loss_q2d"] - parts["loss_d2q"]) > 0.01
    mixed = 0.2 * parts["loss_q2d"] + 0.8 * parts["loss_d2q"]
    torch.testing.assert_close(parts["loss"], mixed, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("alpha", "sources", "goals", "names"),
    [
        (0.0, ["positive"], ["query"], {"loss", "loss_d2q"}),
        (1.0, ["query"], ["positive"], {"loss", "loss_q2d"}),
        (0.2, ["query", "positive"], ["query", "positive"], {"loss", "loss_q2d", "loss_d2q"}),
    ],
)
def test_an_unused_direction_is_not_computed(
    alpha: float, sources: list[str], goals: list[str], names: set[str]
) -> None:
    """Two passes for both directions together, and the tokens in them are those that are needed, no more."""
    objective, collate = make(alpha)
    passes: list[int] = []
    layer = objective.decoder.layers[0]
    layer.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[:-1].numel()))
    batch = collate(ROWS)
    assert objective(batch, objective.count(batch)).parts.keys() == names | {"anchor_norm", "embedding_norm"}
    encoded = sum(sum(batch[side]["lengths"]) - 7 * batch[side]["prefix"] for side in sources)
    assert passes == [encoded, sum(sum(batch[side]["num_targets"]) for side in goals)]


def test_the_anchor_predicts_the_first_token_and_each_token_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a decoder that passes its input on shows what stands at which position, and how it attends."""
    seen: list[tuple[Attention, list[int]]] = []

    def identity(decoder: Any, attention: Attention, lengths: list[int], inputs_ND: Tensor) -> Tensor:
        seen.append((attention, lengths))
        return inputs_ND

    monkeypatch.setattr(llm2vec_q2d_d2q, "packed_hidden_states", identity)
    settings = EncoderSettings(pooling_mode="last", attention="bidirectional")
    objective = BidirectionalReconstruction(nn.Module(), settings)
    objective.model.base_model = None
    one_hot = torch.eye(8, dtype=torch.float64)
    states = objective.decode(one_hot[[7, 6, 5]], one_hot[[2, 3, 1, 4]], [3, 0, 1])
    assert states.argmax(dim=1).tolist() == [7, 2, 3, 5]  # 7 predicts 2, 2 predicts 3, 3 predicts 1; 5 predicts 4
    assert seen == [("causal", [3, 1])]  # the row without targets has no place


def test_the_name_of_the_release_is_this_objective() -> None:
    assert LLM2Vec_q2d_d2q is BidirectionalReconstruction


# --- what is a target ---


@pytest.mark.parametrize(("reconstruct_instruction", "target"), [(False, "who wrote it"), (True, "find; who wrote it")])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma"])
def test_targets_are_the_text_and_never_the_closing_token(
    family: str, reconstruct_instruction: bool, target: str
) -> None:
    """The instruction is a target only where the setting says so; template and closing token never are."""
    objective, collate = make(family=family, instruction_join="; ", reconstruct_instruction=reconstruct_instruction)
    row = Example("words", InstructedText("find", "who wrote it"), InstructedText("", "the red answer"), ())
    batch = collate([row])
    tokenizer = collate.tokenizer.tokenizer
    for side, expected in (("query", target), ("positive", "the red answer")):
        ids, mask = batch[side]["input_ids"], batch[side]["target_mask"]
        assert tokenizer.decode(ids[mask]).strip() == expected
        closing = batch[side]["pool_mask"].nonzero().max()
        assert closing == len(ids) - 1
        assert not mask[closing]
    counts = objective.count(batch)
    assert counts["q2d"] == batch["positive"]["target_mask"].sum() == 3
    assert counts["d2q"] == batch["query"]["target_mask"].sum() == (3 if not reconstruct_instruction else 5)


def test_the_instruction_changes_the_anchor_but_is_no_target() -> None:
    objective, collate = make()
    one = Example("words", InstructedText("find the answer", "who wrote it"), InstructedText("", "hello world"), ())
    other = one._replace(query=InstructedText("find it", "who wrote it"))
    batches = [collate([one]), collate([other])]
    counts = [objective.count(batch) for batch in batches]
    assert counts[0] == counts[1]
    q2d, d2q = ([loss_parts(objective, b, counts[0])[name] for b in batches] for name in ("loss_q2d", "loss_d2q"))
    assert abs(q2d[0] - q2d[1]) > 1e-3
    torch.testing.assert_close(d2q[0], d2q[1], rtol=1e-12, atol=0)


# --- what must not matter ---


@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("layout", [(4, 4), (2, 2, 2, 2), (1, 5, 2), (1,) * 8], ids=str)
def test_how_a_step_is_cut_and_ordered_does_not_matter(layout: tuple[int, ...], max_tokens: int | None) -> None:
    """One batch of eight equals any batches of the same rows, in any order, in loss parts and gradient."""
    objective, collate = make()
    whole = run_step(objective, [collate(ROWS)])
    expected = reference.gradients(objective)
    rows = iter([ROWS[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)])
    batches = [collate([next(rows) for _ in range(size)]) for size in layout]
    means = {sum(batch["positive"]["num_targets"]) / len(batch["positive"]["num_targets"]) for batch in batches}
    assert len(means) > 1  # unequal batches: a mean of their means would be another number
    cut = run_step(objective, batches, max_tokens)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-11, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)


def test_a_prefix_that_is_not_shared_does_not_matter() -> None:
    """Told that there is none, the same loss and gradient; with one token too many, another."""
    objective, collate = make()
    batch = collate(reference.under_one_instruction(ROWS))
    parts = run_step(objective, [batch])
    expected = reference.gradients(objective)
    apart: Batch = {name: {**side, "prefix": 0} for name, side in batch.items()}
    alone = run_step(objective, [apart])
    torch.testing.assert_close(alone["loss"], parts["loss"], rtol=1e-11, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)
    too_long: Batch = {name: {**side, "prefix": side["prefix"] + 1} for name, side in batch.items()}
    assert abs(run_step(objective, [too_long])["loss"] / parts["loss"] - 1) > 1e-4


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 70])
def test_activation_checkpointing_does_not_matter(max_tokens: int | None, shared: bool) -> None:
    """Same loss and gradients; a layer's second forward pass shows that recomputing really is on."""
    objective, collate = make()
    batch = collate(reference.under_one_instruction(ROWS) if shared else ROWS)
    num_passes = 2 * len(split_batch(batch, max_tokens))
    calls: list[int] = []
    objective.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    objective.train()
    parts = run_step(objective, [batch], max_tokens)
    expected = reference.gradients(objective)
    assert len(calls) == num_passes
    arguments = {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, objective.decoder)}
    enable_checkpointing(objective.model, arguments)
    again = run_step(objective, [batch], max_tokens)
    assert len(calls) == num_passes + 2 * num_passes
    torch.testing.assert_close(again["loss"], parts["loss"], rtol=1e-12, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)


@pytest.mark.parametrize(("attention", "pooling_mode"), [("causal", "last"), ("bidirectional", "mean")])
def test_a_model_that_cannot_be_packed_gives_the_same(
    attention: Attention, pooling_mode: PoolingMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passes run padded, and loss and gradient are those of the packed ones."""
    objective, collate = make(attention=attention, pooling_mode=pooling_mode)
    batch = collate(reference.under_one_instruction(ROWS))
    parts = run_step(objective, [batch], 90)
    expected = reference.gradients(objective)
    calls: list[int] = []
    padded = packing._padded_hidden_states
    monkeypatch.setattr(packing, "_padded_hidden_states", lambda *a, **k: (calls.append(1), padded(*a, **k))[1])
    objective.decoder.config.attn_logit_softcapping = 50.0  # which a Llama has not, so nothing else changes
    again = run_step(objective, [batch], 90)
    assert len(calls) == 2 * len(split_batch(batch, 90)) > 2
    torch.testing.assert_close(again["loss"], parts["loss"], rtol=1e-11, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)


@pytest.mark.parametrize("empty", [("positive",), ("query", "positive")], ids=str)
def test_a_micro_batch_without_targets_has_a_loss_of_zero(empty: tuple[str, ...]) -> None:
    """Of one direction, or of both: as if its rows were not there, and every weight has a gradient to exchange."""
    objective, collate = make()
    batch = collate([row._replace(**{side: InstructedText("find", "") for side in empty}) for row in ROWS[:2]])
    parts = run_step(objective, [batch])
    assert all(torch.isfinite(value) for value in parts.values())
    assert parts["loss_q2d"] == 0 and (parts["loss_d2q"] == 0) == (len(empty) == 2)
    assert parts["loss"] == 0.8 * parts["loss_d2q"]
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert len(empty) < 2 or not parameter.grad.any(), name
    alone = run_step(objective, [collate(ROWS[2:])])
    beside = run_step(objective, [batch, collate(ROWS[2:])])
    losses = {name for name in alone if name.startswith("loss")}
    assert len(losses) == 3
    assert len(empty) < 2 or all(torch.equal(beside[name], alone[name]) for name in losses)


def test_a_batch_is_left_as_it_was() -> None:
    objective, collate = make()
    batch, untouched = collate(ROWS), collate(ROWS)
    run_step(objective, [batch], 50)
    for side, values in untouched.items():
        assert batch[side].keys() == values.keys()
        for name, value in values.items():
            same = torch.equal(batch[side][name], value) if isinstance(value, Tensor) else batch[side][name] == value
            assert same, (side, name)


# --- reduction ---


@pytest.mark.parametrize("reduction", ["token_mean", "micro_batch_mean"])
def test_reduction_by_hand(reduction: Reduction, tmp_path: Path) -> None:
    """Two unequal micro-batches of one step: the mean over all tokens, or the mean of both means."""
    objective, collate = make()
    halves = [ROWS[:4], ROWS[4:]]
    terms: dict[str, list[list[float]]] = {"q2d": [], "d2q": []}
    with torch.no_grad():
        for half in halves:
            pairs = row_pairs(collate, half)
            q2d = [t.item() for q, p in pairs for t in reference.reconstruction_terms(objective.model, q, p)]
            d2q = [t.item() for q, p in pairs for t in reference.reconstruction_terms(objective.model, p, q)]
            terms["q2d"].append(q2d)
            terms["d2q"].append(d2q)
    by_hand = {}
    for name, (first, second) in terms.items():
        of_all = sum(first + second) / len(first + second)
        of_means = (sum(first) / len(first) + sum(second) / len(second)) / 2
        assert abs(of_all / of_means - 1) > 1e-3  # else the two reductions could not be told apart
        by_hand[name] = of_all if reduction == "token_mean" else of_means
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    EmbedderTrainer(
        objective,
        args,
        Config("toy", reduction=reduction),
        ROWS,
        collate,
        InOrder(ROWS),
        save_to=lambda folder, weights: None,
        load_from=lambda folder: None,
    ).train()
    entry = json.loads((tmp_path / LOG_FILE).read_text(encoding="utf-8").splitlines()[0])
    assert entry["loss_q2d"] == pytest.approx(by_hand["q2d"], rel=1e-6)
    assert entry["loss_d2q"] == pytest.approx(by_hand["d2q"], rel=1e-6)
    assert entry["loss"] == pytest.approx(0.2 * by_hand["q2d"] + 0.8 * by_hand["d2q"], rel=1e-6)


# --- only through the anchor ---


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_target_hears_of_the_source_only_through_its_anchor(
    attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two queries and one document: another loss, and the same once both have one and the same anchor."""
    objective, collate = make(1.0, attention=attention)
    document = InstructedText("", "hello world")
    batches = [collate([Example("w", InstructedText("", text), document, ())]) for text in ("who wrote it", "red")]
    totals = objective.count(batches[0])
    losses = [loss_parts(objective, batch, totals)["loss"] for batch in batches]
    assert abs(losses[0] - losses[1]) > 1e-3
    anchor = torch.linspace(-1, 1, 32, dtype=torch.float64).unsqueeze(0)
    monkeypatch.setattr(llm2vec_q2d_d2q, "embed", lambda *_: {"query": anchor})
    losses = [loss_parts(objective, batch, totals)["loss"] for batch in batches]
    assert losses[0] == losses[1]


def test_rows_do_not_hear_of_one_another() -> None:
    """A row's share and anchor are the same beside any neighbour."""
    objective, collate = make()
    row = ROWS[0]
    totals = {"q2d": torch.tensor(10.0), "d2q": torch.tensor(10.0), "anchors": torch.tensor(2.0)}

    def loss(rows: list[Example]) -> Tensor:
        return loss_parts(objective, collate(rows), totals)["loss"]

    alone, anchor = loss([row]), anchors(objective, collate([row]))[0]
    for neighbour in ROWS[1:5]:
        other = loss([neighbour])
        assert other > 0
        for rows, place in (([row, neighbour], 0), ([neighbour, row], 1)):
            torch.testing.assert_close(loss(rows) - other, alone, rtol=1e-11, atol=0)
            beside = anchors(objective, collate(rows))
            torch.testing.assert_close(beside[place], anchor, rtol=1e-10, atol=1e-12)
            assert (beside[1 - place] - anchor).abs().max() > 0.01


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut_at_the_anchor"])
def test_gradient_reaches_the_embedding_table_through_the_anchor(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that stands in the query alone gets gradient under EBQ2D, and none once the anchor is detached."""
    objective, collate = make(1.0)
    row = Example("words", InstructedText("", "green question"), InstructedText("", "hello world"), ())
    batch = collate([row])
    if cut:
        monkeypatch.setattr(llm2vec_q2d_d2q, "embed", lambda *a: {side: v.detach() for side, v in embed(*a).items()})
    run_step(objective, [batch])
    table = objective.model.get_input_embeddings().weight.grad
    only_in_query = set(batch["query"]["input_ids"].tolist()) - set(batch["positive"]["input_ids"].tolist())
    assert len(only_in_query) == 2
    for token in only_in_query:
        assert (table[token].abs().max() > 1e-6) == (not cut)
    hello = batch["positive"]["input_ids"][batch["positive"]["target_mask"]][0]
    assert table[hello].abs().max() > 1e-6  # the decoder's own input, in either case


def test_generation_is_causal_even_where_encoding_is_not() -> None:
    """A target token never sees itself: the first token's loss is the same whatever follows it."""
    objective, collate = make(1.0, attention="bidirectional")
    totals = {"q2d": torch.tensor(1.0), "d2q": torch.tensor(1.0), "anchors": torch.tensor(1.0)}
    query = InstructedText("", "who wrote it")

    def loss(text: str) -> Tensor:
        return loss_parts(objective, collate([Example("words", query, InstructedText("", text), ())]), totals)["loss"]

    first, both = loss("the"), loss("the answer")
    rows = row_pairs(collate, [Example("words", query, InstructedText("", "the answer"), ())])
    terms = reference.reconstruction_terms(objective.model, *rows[0], attention="bidirectional")
    torch.testing.assert_close(first, terms[0].detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(both - first, terms[1].detach(), rtol=1e-10, atol=0)
