"""Stage I equals Algorithm 1, whatever the batch looks like, and hears of a text only through its anchor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments

from llm2vec.backbone import enable_checkpointing
from llm2vec.checkpoint import EncoderSettings
from llm2vec.llm2vec import row_tokenizer
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction, LLM2Vec_q2d_d2q, pack_left
from llm2vec.run import CollateSides
from llm2vec.tokenization import Row
from llm2vec.trainer import LOG_FILE, EmbedderTrainer
from llm2vec.types import Batch, Example, InstructedText, Reduction, TokenBatch

ROWS = reference.examples(8)


def make(
    alpha: float = 0.2, family: str = "llama", *, tied: bool = False, **settings: Any
) -> tuple[BidirectionalReconstruction, CollateSides]:
    """A float64 objective over a random model whose layers all matter, and what makes its batches."""
    model = reference.exact(tiny_model(family, True, tie_word_embeddings=tied, initializer_range=0.2))
    reconstruct_instruction = settings.pop("reconstruct_instruction", False)
    encoder = EncoderSettings(**({"pooling_mode": "last", "attention": "causal", "template": None} | settings))
    renderer = row_tokenizer(family_tokenizer(family), encoder, reconstruct_instruction=reconstruct_instruction)
    return BidirectionalReconstruction(model, encoder, alpha), CollateSides(renderer, ("query", "positive"))


def totals_of(objective: BidirectionalReconstruction, batches: list[Batch]) -> dict[str, Tensor]:
    counts = [objective.count(batch) for batch in batches]
    return {name: torch.stack([count[name] for count in counts]).sum() for name in counts[0]}


def run_step(objective: BidirectionalReconstruction, batches: list[Batch]) -> dict[str, Tensor]:
    """Loss parts of a step of several micro-batches, summed; gradients are left on the parameters."""
    totals = totals_of(objective, batches)
    parts: dict[str, Tensor] = {}
    for batch in batches:
        share = objective(batch, totals)
        share["loss"].backward()
        for name, value in share.items():
            parts[name] = parts.get(name, torch.zeros_like(value)) + value.detach()
    return parts


def row_pairs(collate: CollateSides, rows: list[Example]) -> list[tuple[Row, Row]]:
    queries = collate.tokenizer.rows([row.query for row in rows])
    positives = collate.tokenizer.rows([row.positive for row in rows])
    return list(zip(queries, positives, strict=True))


def widen(side: TokenBatch, left: int, right: int) -> TokenBatch:
    """The same rows with more padding; the padding's ids are those of real words."""
    rows = len(side["input_ids"])

    def padded(name: str, value: Tensor) -> Tensor:
        filler = 7 if name == "input_ids" else 0
        return torch.cat([value.new_full((rows, left), filler), value, value.new_full((rows, right), filler)], dim=1)

    return {name: padded(name, value) for name, value in side.items()}


@contextmanager
def changed_encoding(objective: BidirectionalReconstruction, row: int, position: int) -> Iterator[None]:
    """Adds to one position's final state, in passes that read token ids only (those that make anchors)."""

    def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("input_ids") is not None:
            output.last_hidden_state = output.last_hidden_state.clone()
            output.last_hidden_state[row, position] += torch.linspace(-1, 1, output.last_hidden_state.shape[-1])

    handle = objective.model.base_model.register_forward_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# --- the loss and its gradient ---


@pytest.mark.parametrize(
    ("alpha", "family", "options"),
    [
        (0.2, "llama", {}),
        (0.0, "llama", {}),
        (1.0, "llama", {}),
        (0.2, "llama", {"tied": True}),
        (0.2, "qwen2", {"attention": "bidirectional"}),
        (0.2, "mistral", {"pooling_mode": "mean", "reconstruct_instruction": True}),
        (0.2, "gemma", {"tied": True}),
    ],
    ids=["mix", "only_d2q", "only_q2d", "tied", "bidirectional", "mean_and_instruction_target", "gemma"],
)
def test_loss_and_every_gradient_equal_algorithm_1(alpha: float, family: str, options: dict[str, Any]) -> None:
    objective, collate = make(alpha, family, **options)
    tied = options.get("tied", False)
    embeddings = objective.model.get_input_embeddings().weight
    assert (objective.model.get_output_embeddings().weight is embeddings) == tied
    parts = run_step(objective, [collate(ROWS)])
    actual = reference.gradients(objective)
    attention, pooling_mode = objective.settings.attention, objective.settings.pooling_mode
    expected = reference.stage_one(objective.model, row_pairs(collate, ROWS), alpha, attention, pooling_mode)
    expected.loss.backward()
    assert parts["loss"].dtype == torch.float64
    torch.testing.assert_close(parts["loss"], expected.loss.detach(), rtol=1e-9, atol=0)
    if alpha > 0:
        torch.testing.assert_close(parts["loss_q2d"], expected.q2d.detach(), rtol=1e-9, atol=0)
    if alpha < 1:
        torch.testing.assert_close(parts["loss_d2q"], expected.d2q.detach(), rtol=1e-9, atol=0)
    reference.assert_same_gradients(actual, reference.gradients(objective))


def test_the_two_directions_differ_and_are_mixed_by_alpha() -> None:
    objective, collate = make(0.2)
    parts = run_step(objective, [collate(ROWS)])
    assert abs(parts["loss_q2d"] - parts["loss_d2q"]) > 0.01
    mixed = 0.2 * parts["loss_q2d"] + 0.8 * parts["loss_d2q"]
    torch.testing.assert_close(parts["loss"], mixed, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("alpha", "num_passes", "names"),
    [(0.0, 2, {"loss", "loss_d2q"}), (1.0, 2, {"loss", "loss_q2d"}), (0.2, 4, {"loss", "loss_q2d", "loss_d2q"})],
)
def test_an_unused_direction_is_not_computed(alpha: float, num_passes: int, names: set[str]) -> None:
    objective, collate = make(alpha)
    calls = []
    objective.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    batch = collate(ROWS)
    assert set(objective(batch, objective.count(batch))) == names
    assert len(calls) == num_passes


def test_the_anchor_predicts_the_first_token_and_each_token_the_next() -> None:
    """By hand: a decoder that passes its input on, so a state's logits are the head's row of one known token."""
    vocabulary = 6
    table = nn.Embedding.from_pretrained(torch.eye(vocabulary, dtype=torch.float64))
    head = nn.Linear(vocabulary, vocabulary, bias=False, dtype=torch.float64)

    def identity(input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=table(input_ids) if inputs_embeds is None else inputs_embeds)

    model = SimpleNamespace(base_model=identity, get_input_embeddings=lambda: table, get_output_embeddings=lambda: head)
    objective = BidirectionalReconstruction(nn.Module(), EncoderSettings(pooling_mode="last", attention="causal"))
    object.__setattr__(objective, "model", model)
    anchor = torch.eye(vocabulary, dtype=torch.float64)[[5, 4]]
    side = {
        "input_ids": torch.tensor([[0, 2, 3, 1, 5], [0, 3, 5, 0, 0]]),
        "target_mask": torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool),
    }
    logits = head.weight.T  # row t: logits after token t
    by_hand = sum(
        torch.logsumexp(logits[before], 0) - logits[before, after] for before, after in [(5, 2), (2, 3), (3, 1), (4, 3)]
    )
    torch.testing.assert_close(objective.reconstruct(anchor, side), by_hand, rtol=1e-12, atol=0)


def test_pack_left_keeps_order_and_length() -> None:
    ids = torch.tensor([[9, 1, 2, 8], [3, 9, 9, 4], [9, 9, 5, 9]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 0]])
    packed, packed_mask = pack_left(ids, mask)
    assert packed.tolist() == [[1, 2], [3, 4], [5, 0]]
    assert packed_mask.tolist() == [[True, True], [True, True], [True, False]]


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
        ids, mask = batch[side]["input_ids"][0], batch[side]["target_mask"][0]
        assert tokenizer.decode(ids[mask]).strip() == expected
        closing = batch[side]["pool_mask"][0].nonzero().max()
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
    q2d, d2q = ([objective(b, counts[0])[name] for b in batches] for name in ("loss_q2d", "loss_d2q"))
    assert abs(q2d[0] - q2d[1]) > 1e-3
    assert d2q[0] == d2q[1]


# --- what must not matter ---


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize(("side", "left", "right"), [("left", 0, 0), ("right", 0, 5), ("right", 4, 3), ("left", 6, 0)])
def test_padding_does_not_matter(attention: str, side: str, left: int, right: int) -> None:
    """Neither its side nor its amount nor what it holds moves the loss or a gradient."""
    objective, collate = make(attention=attention)
    parts = run_step(objective, [collate(ROWS)])
    expected = reference.gradients(objective)
    collate.tokenizer.padding_side = side
    batch = {name: widen(rows, left, right) for name, rows in collate(ROWS).items()}
    assert all(not torch.equal(batch[n]["input_ids"], collate(ROWS)[n]["input_ids"]) or side == "left" for n in batch)
    padded = run_step(objective, [batch])
    torch.testing.assert_close(padded["loss"], parts["loss"], rtol=1e-11, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)


@pytest.mark.parametrize("layout", [(4, 4), (2, 2, 2, 2), (1, 5, 2), (1,) * 8], ids=str)
def test_how_a_step_is_cut_and_ordered_does_not_matter(layout: tuple[int, ...]) -> None:
    """One batch of eight equals any micro-batches of the same rows, in any order, in loss parts and gradient."""
    objective, collate = make()
    whole = run_step(objective, [collate(ROWS)])
    expected = reference.gradients(objective)
    rows = iter([ROWS[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)])
    batches = [collate([next(rows) for _ in range(size)]) for size in layout]
    lengths = {int(batch["positive"]["target_mask"].sum()) / len(batch["positive"]["target_mask"]) for batch in batches}
    assert len(lengths) > 1  # unequal micro-batches: a mean of their means would be another number
    cut = run_step(objective, batches)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-11, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)


def test_activation_checkpointing_does_not_matter() -> None:
    """Same loss and gradients; a layer's second forward pass shows that recomputing really is on."""
    objective, collate = make()
    calls: list[int] = []
    objective.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    objective.train()
    parts = run_step(objective, [collate(ROWS)])
    expected = reference.gradients(objective)
    assert len(calls) == 4
    enable_checkpointing(objective.model, {"use_reentrant": False})
    again = run_step(objective, [collate(ROWS)])
    assert len(calls) == 4 + 8
    torch.testing.assert_close(again["loss"], parts["loss"], rtol=1e-12, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), expected)


def test_a_batch_is_left_as_it_was() -> None:
    objective, collate = make()
    batch, untouched = collate(ROWS), collate(ROWS)
    run_step(objective, [batch])
    for side, tensors in untouched.items():
        assert batch[side].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(batch[side][name], tensor), (side, name)


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
        ROWS,
        collate,
        SequentialSampler(ROWS),
        reduction=reduction,
        save_to=lambda folder: None,
        stop_after_n_steps=None,
    ).train()
    entry = json.loads((tmp_path / LOG_FILE).read_text(encoding="utf-8").splitlines()[0])
    assert entry["loss_q2d"] == pytest.approx(by_hand["q2d"], rel=1e-6)
    assert entry["loss_d2q"] == pytest.approx(by_hand["d2q"], rel=1e-6)
    assert entry["loss"] == pytest.approx(0.2 * by_hand["q2d"] + 0.8 * by_hand["d2q"], rel=1e-6)


# --- only through the anchor ---


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_target_hears_of_the_source_only_through_its_anchor(attention: str) -> None:
    """Of all final states of the encoding pass, a change to the closing token's alone reaches the loss."""
    objective, collate = make(1.0, attention=attention)
    batch = collate(ROWS[:3])
    totals = objective.count(batch)
    untouched = objective(batch, totals)["loss"]
    num_heard = 0
    for row, length in enumerate(batch["query"]["attention_mask"].sum(dim=1)):
        for position in range(batch["query"]["input_ids"].shape[1]):
            with changed_encoding(objective, row, position):
                change = (objective(batch, totals)["loss"] - untouched).abs()
            if position == length - 1:
                assert change > 1e-6
                num_heard += 1
            else:
                assert change == 0
    assert num_heard == 3


def test_rows_do_not_hear_of_one_another() -> None:
    """A row's share and anchor are the same beside any neighbour."""
    objective, collate = make()
    row = ROWS[0]
    totals = {"q2d": torch.tensor(10.0), "d2q": torch.tensor(10.0)}
    alone = objective(collate([row]), totals)["loss"]
    anchor = objective.anchor(collate([row])["query"])[0]
    for neighbour in ROWS[1:5]:
        both = objective(collate([row, neighbour]), totals)["loss"]
        other = objective(collate([neighbour]), totals)["loss"]
        assert other > 0
        torch.testing.assert_close(both - other, alone, rtol=1e-11, atol=0)
        beside = objective.anchor(collate([row, neighbour])["query"])
        torch.testing.assert_close(beside[0], anchor, rtol=1e-10, atol=1e-12)
        assert (beside[1] - anchor).abs().max() > 0.01


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut_at_the_anchor"])
def test_gradient_reaches_the_embedding_table_through_the_anchor(cut: bool) -> None:
    """A word that stands in the query alone gets gradient under EBQ2D, and none once the anchor is detached."""
    objective, collate = make(1.0)
    row = Example("words", InstructedText("", "green question"), InstructedText("", "hello world"), ())
    batch = collate([row])
    if cut:
        anchor = objective.anchor
        objective.anchor = lambda side: anchor(side).detach()
    objective(batch, objective.count(batch))["loss"].backward()
    table = objective.model.get_input_embeddings().weight.grad
    only_in_query = set(batch["query"]["input_ids"][0].tolist()) - set(batch["positive"]["input_ids"][0].tolist())
    assert len(only_in_query) == 2
    for token in only_in_query:
        assert (table[token].abs().max() > 1e-6) == (not cut)
    hello = batch["positive"]["input_ids"][0, batch["positive"]["target_mask"][0]][0]
    assert table[hello].abs().max() > 1e-6  # the decoder's own input, in either case


def test_generation_is_causal_even_where_encoding_is_not() -> None:
    """A target token never sees itself: the first token's loss is the same whatever follows it."""
    objective, collate = make(1.0, attention="bidirectional")
    totals = {"q2d": torch.tensor(1.0), "d2q": torch.tensor(1.0)}
    query = InstructedText("", "who wrote it")

    def loss(text: str) -> Tensor:
        return objective(collate([Example("words", query, InstructedText("", text), ())]), totals)["loss"]

    first, both = loss("the"), loss("the answer")
    rows = row_pairs(collate, [Example("words", query, InstructedText("", "the answer"), ())])
    terms = reference.reconstruction_terms(objective.model, *rows[0], attention="bidirectional")
    torch.testing.assert_close(first, terms[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(both - first, terms[1], rtol=1e-10, atol=0)
