"""Token sets out of blocks of added tokens: by hand, in two passes as in one row with a mask, and as a stage."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from torch import Tensor

from llm2vec import LLM2Vec
from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives import token_set as llm2vec_token_set
from llm2vec.objectives.head import Head
from llm2vec.objectives.token_set import token_set_loss
from llm2vec.text.batches import pack_rows
from llm2vec.text.templates import add_template_tokens
from llm2vec.text.tokenization import Row
from llm2vec.training.log import LOG_FILE
from llm2vec.training.step import backward_step, loss_parts, split_batch
from llm2vec.types import Batch, UserError

ROOT = Path(__file__).parents[2]
ROWS = reference.examples(5)
BLOCK = 8


SIDES = ("query:document", "query:query", "positive:document", "positive:query")


def make(
    family: str = "plain", model_family: str = "llama", **model: Any
) -> tuple[BidirectionalReconstruction, CollateSides]:
    """A float64 objective whose vocabulary holds the template's added tokens, and what makes its batches."""
    tokenizer = family_tokenizer(family)
    assert len(add_template_tokens(tokenizer, "llara")) == 2 * BLOCK
    settings = EncoderSettings("mean", 256, template="llara", attention="causal")
    decoder = tiny_model(model_family, True, tokenizer=tokenizer, initializer_range=0.2, **model)
    assert {*SIDES} == {*BidirectionalReconstruction.sides_of("llara", {"target": "both"})}
    collate = CollateSides(row_tokenizer(tokenizer, settings), SIDES)
    objective = BidirectionalReconstruction(
        reference.exact(decoder), settings, 0.5, "both", bottleneck="states", target_loss="bag", lm_weight=1.0
    )
    return objective, collate


def both(parts: dict[str, Tensor], of: str) -> Tensor:
    """EBAE or EBAR: the mean over queries and documents, of which there are as many."""
    first, second = {"self": ("q2q", "d2d"), "next": ("q2d", "d2q")}[of]
    return (parts[f"loss_{first}"] + parts[f"loss_{second}"]) / 2


def rows_of(collate: CollateSides) -> list[tuple[Row, Row, Row, Row]]:
    sides = [collate.rows(ROWS, side) for side in collate.sides]
    return list(zip(*sides, strict=True))


# --- the loss and its gradient ---


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_every_gradient_equal_one_token_at_a_time(tied: bool) -> None:
    """In one pass, in a few micro-batches and row by row."""
    objective, collate = make(tie_word_embeddings=tied)
    expected = reference.token_sets(objective.model, rows_of(collate))
    (expected.lm + 0.05 * expected.itself + 0.05 * expected.following).backward()
    gradients = reference.gradients(objective)
    batch = collate(ROWS)
    totals = objective.count(batch)
    assert {totals[name].item() for name in ("q2q", "d2d", "q2d", "d2q")} == {len(ROWS)}
    half = sum(sum(side["lengths"]) for side in batch.values()) * 2 // 3
    for max_tokens in (None, half, 1):
        parts = backward_step(objective, batch, totals, max_tokens=max_tokens)
        of_directions = {"loss_q2q", "loss_d2d", "loss_q2d", "loss_d2q"}
        assert parts.keys() == {"loss", "loss_lm", "anchor_norm", "embedding_norm"} | of_directions
        torch.testing.assert_close(parts["loss_lm"], expected.lm.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(both(parts, "self"), expected.itself.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(both(parts, "next"), expected.following.detach(), rtol=1e-9, atol=0)
        reference.assert_same_gradients(reference.gradients(objective), gradients)
        figures = loss_parts(objective, batch, totals, max_tokens)
        torch.testing.assert_close(figures["loss"], parts["loss"], rtol=1e-12, atol=0)
    assert 1 < len(split_batch(batch, half)) < 5 == len(split_batch(batch, 1))


def test_two_passes_equal_one_row_with_a_mask() -> None:
    """The released layout: text, block 1, block 2; the second block's positions start again and it does not see the
    first. Loss and gradient are those of two ordinary causal passes."""
    objective, collate = make()
    itself, following, lm = [], [], []
    head = objective.model.get_output_embeddings().weight
    for query_1, query_2, document_1, document_2 in rows_of(collate):
        for first, second, other in ((query_1, query_2, document_1), (document_1, document_2, query_1)):
            shared = first.target.index(False, first.target.index(True))  # all that stands before the prompts
            assert first.ids[:shared] == second.ids[:shared] and first.ids[shared:] != second.ids[shared:]
            tails = len(first.ids) - shared, len(second.ids) - shared
            ids = first.ids + second.ids[shared:]
            positions = [*range(len(first.ids)), *range(shared, len(second.ids))]
            visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            visible[len(first.ids) :, shared : len(first.ids)] = False
            mask = torch.zeros(len(ids), len(ids), dtype=torch.float64).masked_fill(~visible, torch.finfo(float).min)
            states = objective.model.base_model(
                input_ids=torch.tensor([ids]),
                attention_mask=mask[None, None],
                position_ids=torch.tensor([positions]),
                use_cache=False,
            ).last_hidden_state[0]
            assert tails[0] > BLOCK < tails[1]
            own, others = (
                {token for token, wanted in zip(row.ids, row.target, strict=True) if wanted} for row in (first, other)
            )
            block_1, block_2 = states[len(first.ids) - BLOCK : len(first.ids)], states[-BLOCK:]
            itself.append(reference.block_loss(objective.model, block_1, own))
            following.append(reference.block_loss(objective.model, block_2, others))
            for position in range(1, len(first.ids)):
                if first.target[position]:
                    logits = head @ states[position - 1]
                    lm.append(torch.logsumexp(logits, dim=0) - logits[first.ids[position]])
    means = [sum(terms[1:], terms[0]) / len(terms) for terms in (lm, itself, following)]
    loss = means[0] + 0.05 * means[1] + 0.05 * means[2]
    loss.backward()
    gradients = reference.gradients(objective)
    batch = collate(ROWS)
    parts = backward_step(objective, batch, objective.count(batch))
    torch.testing.assert_close(parts["loss"], loss.detach(), rtol=1e-9, atol=0)
    reference.assert_same_gradients(reference.gradients(objective), gradients)


def test_weights_of_the_parts() -> None:
    objective, collate = make()
    batch = collate(ROWS)
    parts = loss_parts(objective, batch, objective.count(batch))
    by_hand = parts["loss_lm"] + 0.05 * both(parts, "self") + 0.05 * both(parts, "next")
    torch.testing.assert_close(parts["loss"], by_hand, rtol=1e-12, atol=0)
    assert abs(both(parts, "self") - both(parts, "next")) > 1e-3


def test_rows_built_by_hand() -> None:
    """Any closing block does: the last positions pooled, whatever wrote them. Its length is the objective's."""
    objective, _ = make()
    objective.slots = 2

    def side(*texts: tuple[list[int], list[int]]) -> Any:
        return pack_rows(
            [
                Row(text + block, [False] * len(text) + [True] * len(block), [True] * len(text) + [False] * len(block))
                for text, block in texts
            ]
        )

    batch: Batch = {
        "query:document": side(([3, 4, 4, 5], [90, 91])),
        "query:query": side(([3, 4, 4, 5], [92, 93])),
        "positive:document": side(([7, 8], [90, 91])),
        "positive:query": side(([7, 8], [92, 93])),
    }
    parts = loss_parts(objective, batch, objective.count(batch))
    rows = [
        Row(text + block, [i >= len(text) for i in range(len(text) + 2)], [i < len(text) for i in range(len(text) + 2)])
        for text in ([3, 4, 4, 5], [7, 8])
        for block in ([90, 91], [92, 93])
    ]
    expected = reference.token_sets(objective.model, [tuple(rows)])  # type: ignore[list-item]
    torch.testing.assert_close(both(parts, "self"), expected.itself.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(both(parts, "next"), expected.following.detach(), rtol=1e-9, atol=0)


# --- the block's loss alone ---


def random_blocks(num_rows: int = 5, vocabulary: int = 40) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(num_rows, BLOCK, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64).requires_grad_()
    targets = [torch.randperm(vocabulary, generator=generator)[: 1 + row] for row in range(num_rows)]
    return blocks, head, targets


@pytest.mark.parametrize("block_rows", [1, 2, 5, None])
def test_how_many_rows_are_held_at_once_does_not_matter(block_rows: int | None) -> None:
    blocks, head, targets = random_blocks()
    share = torch.tensor(1 / 7, dtype=torch.float64)
    whole = (blocks @ head.T).max(dim=1).values.log_softmax(dim=1)
    expected = sum(-whole[row, target].mean() for row, target in enumerate(targets)) / 7
    by_hand = torch.autograd.grad(expected, (blocks, head))
    loss = token_set_loss(blocks, Head(head), targets, share, block_rows)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, gradient in zip(torch.autograd.grad(loss, (blocks, head)), by_hand, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)


def test_scores_of_all_rows_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the backward pass is the blocks and the head, and no pass makes more scores than a block's."""
    blocks, head, targets = random_blocks(num_rows=12)
    monkeypatch.setattr(llm2vec_token_set, "BLOCK_ENTRIES", 3 * BLOCK * 40)
    seen: list[int] = []
    real = llm2vec_token_set._loss_of_rows

    def watched(block_RKD: Tensor, *rest: Any) -> Tensor:
        seen.append(len(block_RKD))
        return real(block_RKD, *rest)

    monkeypatch.setattr(llm2vec_token_set, "_loss_of_rows", watched)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = token_set_loss(blocks, Head(head), [t[:40] for t in targets], torch.tensor(1 / 12))
    assert max(kept, default=0) <= max(blocks.numel(), head.numel())
    loss.backward()
    assert seen == [3] * 8  # four blocks, forward and again backward


def test_rows_without_a_target_count_nothing() -> None:
    blocks, head, targets = random_blocks()
    share = torch.tensor(0.25)
    nothing = torch.tensor([], dtype=torch.long)
    loss = token_set_loss(blocks, Head(head), [*targets[:2], nothing, *targets[3:]], share, 1)
    apart = token_set_loss(blocks[[0, 1, 3, 4]], Head(head), [*targets[:2], *targets[3:]], share)
    torch.testing.assert_close(loss, apart, rtol=1e-12, atol=0)
    torch.autograd.backward(loss)
    assert not blocks.grad[2].any() and blocks.grad[1].any()


# --- the stage ---


@pytest.mark.parametrize("template", ["plain", "e5_mistral", "echo"])
def test_a_template_without_blocks_is_refused(template: str) -> None:
    settings = EncoderSettings("mean", 256, template=template, attention="causal")
    with pytest.raises(UserError, match="pools as many tokens as a text has"):
        keys = {"bottleneck": "states", "target": "both"}
        BidirectionalReconstruction.check_rendering(row_tokenizer(family_tokenizer("plain"), settings), keys)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (
            {
                "template": "llara",
                "pooling_mode": "mean",
                "bottleneck": "states",
                "target": "both",
                "target_loss": "bag",
                "alpha": 0.5,
                "lm_weight": 1.0,
            },
            ("loss_q2q", "loss_d2d", "loss_q2d", "loss_d2q", "loss_lm"),
        ),
        ({"target": "self"}, ("loss_q2q", "loss_d2d")),
    ],
    ids=["token_set", "self"],
)
def test_stage_I_with_another_objective(
    keys: dict[str, Any], names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses fall, and the folder embeds."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    write_jsonl(
        tmp_path / "data/nq.jsonl",
        [{"query": r.query.text, "positive": r.positive.text} for r in reference.examples(16)],
    )
    config = {
        "model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "out"), "sources": ["nq"],
        "dataset_file_path": str(tmp_path / "data"), "max_seq_length": 192, "max_steps": 12,
        "per_device_train_batch_size": 16, "learning_rate": 5e-3, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **keys,
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(config), encoding="utf-8")
    script = str(ROOT / "experiments/run_stage_I.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "c.json")])
    runpy.run_path(script, run_name="__main__")
    log = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    for name in names:
        values = [entry[name] for entry in log if name in entry]
        assert len(values) == 12 and values[-1] < values[0]
    model = LLM2Vec.from_pretrained(str(tmp_path / "out"))
    assert model.encode(["hello"], show_progress_bar=False, device="cpu").isfinite().all()
