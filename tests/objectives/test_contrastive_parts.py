"""What can be added to Stage II, each part and all together, equals loops over pairs, however a step is cut."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm2vec.distributed import sum_over_ranks
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.losses import distillation, info_nce, linear_cross_entropy, unit
from llm2vec.objectives.negatives import ContrastiveKeys, Pool, Softmax, hash_of
from llm2vec.processes import rank, world_size
from llm2vec.training.step import backward_step, loss_parts, split_batch
from llm2vec.types import Example, InstructedText, TextFacts, UserError
from tests.objectives.contrastive_loops import (
    EACH,
    SETTINGS,
    Parts,
    Reference,
    assert_same_figures,
    make,
    rows_with_copies,
)
from tests.objectives.test_losses import Largest, Problem, blocked, gradients, plain, problem


@pytest.mark.parametrize("name", list(EACH))
def test_loss_and_every_gradient_equal_the_loops(name: str) -> None:
    """In one pass, and with the gradient cached: in a few micro-batches, and row by row."""
    parts = EACH[name]
    objective, collate = make(parts)
    rows = rows_with_copies()
    expected = Reference(objective, collate.tokenizer, rows, parts).figures()
    expected["loss"].backward()
    expected_gradients = reference.gradients(objective)
    batch = collate(rows)
    totals = objective.count(batch)
    third = sum(sum(side["lengths"]) for side in batch.values()) // 3
    for max_tokens in (None, third, 1):
        assert len(split_batch(batch, max_tokens)) == (1 if max_tokens is None else 8 if max_tokens == 1 else 4)
        actual = backward_step(objective, batch, totals, max_tokens=max_tokens)
        assert_same_figures(actual, expected)
        reference.assert_same_gradients(reference.gradients(objective), expected_gradients)
        figures = loss_parts(objective, batch, totals, max_tokens)
        assert figures.keys() == actual.keys()
        assert not any(value.requires_grad for value in (*figures.values(), *actual.values()))


@pytest.mark.parametrize("name", [name for name in EACH if name != "none"])
def test_every_part_changes_the_loss_and_the_gradient(name: str) -> None:
    """The guard of the test above."""
    found = []
    for parts in (EACH[name], EACH["none"]):
        objective, collate = make(parts)
        batch = collate(rows_with_copies())
        loss = backward_step(objective, batch, objective.count(batch))["loss"]
        found.append((loss, reference.gradients(objective)))
    (loss, of_part), (without, of_none) = found
    assert abs(loss / without - 1) > 1e-3
    with pytest.raises(AssertionError, match="apart"):
        # A projection to a teacher's vectors has gradients of its own.
        reference.assert_same_gradients({name: of_part[name] for name in of_none}, of_none, relative=0.01)


# --- two ranks ---


def own_rows(rows: list[Example]) -> list[Example]:
    share = len(rows) // world_size()
    return rows[rank() * share : (rank() + 1) * share]


def take_step(name: str, max_tokens: int | None, wrap: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Figures summed over ranks and averaged gradients of a step over all rows, this rank's share of them here."""
    objective, collate = make(EACH[name])
    batch = collate(own_rows(rows_with_copies()))
    totals = {part: sum_over_ranks(count) for part, count in objective.count(batch).items()}
    model: Any = DistributedDataParallel(objective) if wrap else objective
    further: dict[str, Any] = {"no_sync": model.no_sync} if wrap else {}
    parts = backward_step(model, batch, totals, max_tokens=max_tokens, scale=world_size(), **further)
    return {part: sum_over_ranks(value) for part, value in parts.items()}, reference.gradients(objective)


def work(process: int, folder: Path) -> None:
    """What each spawned process runs; its findings go to a file of its own."""
    os.environ["LOCAL_RANK"] = str(process)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=process, world_size=2)
    findings = {(name, max_tokens): take_step(name, max_tokens, True) for name in EACH for max_tokens in (None, 100)}
    torch.save(findings, folder / f"{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{process}.pt") for process in range(2)]


@pytest.mark.parametrize("max_tokens", [None, 100])
@pytest.mark.parametrize("name", list(EACH))
def test_two_ranks_equal_one_process(name: str, max_tokens: int | None, ranks: list[dict[Any, Any]]) -> None:
    """A copy of a query's positive is left out whichever rank holds it: rows 0 and 5 lie on different ones."""
    parts, expected = take_step(name, None, False)
    for found in ranks:
        figures, of_rank = found[name, max_tokens]
        assert figures.keys() == parts.keys()
        for part, value in parts.items():
            torch.testing.assert_close(figures[part], value, rtol=1e-6 if part == "masked_negatives" else 1e-9, atol=0)
        reference.assert_same_gradients(of_rank, expected)


# --- what is left out ---


def between(parts: Parts, total: float | None = None, **vectors: Any) -> dict[str, Tensor]:
    """The objective's loss parts over given vectors and facts in place of a model's."""
    objective = ContrastiveLearning(nn.Module(), SETTINGS, 1.0, distillation_weight=parts.weight)  # type: ignore[arg-type]
    held = {name: torch.as_tensor(rows) for name, rows in vectors.items()}
    held = {n: t.double() if t.is_floating_point() else t for n, t in held.items()}
    facts: TextFacts = {"query": {}, "positive": {}, "negative": {}}
    for name in [name for name in held if name not in facts]:  # such as `query_own_only`
        side, _, fact = name.partition("_")
        facts[side][fact] = held.pop(name)
    return objective.contrast(held, facts, {"contrastive": torch.tensor(total or float(len(held["query"])))})


def test_copies_of_the_positive_by_hand() -> None:
    """All cosines zero but one's own, so the loss counts the documents a query sees."""
    axes = torch.eye(8)
    vectors = {"query": axes[:2], "positive": axes[:2], "negative": axes[2:6]}
    hashes = {"positive_hash": [7, 8], "negative_hash": [9, 7, 7, 10]}
    parts = between(Parts(mask=True), **vectors, **hashes)
    losses = [math.log(math.e + 3) - 1, math.log(math.e + 5) - 1]
    assert parts["loss"].item() == pytest.approx(sum(losses) / 2)
    assert parts["masked_negatives"].item() == pytest.approx((2 / 5 + 0) / 2)
    alone = between(Parts(), **vectors, **hashes, query_own_only=[True, False])
    losses = [math.log(math.e + 1) - 1, math.log(math.e + 5) - 1]
    assert alone["loss"].item() == pytest.approx(sum(losses) / 2)
    assert alone["masked_negatives"].item() == pytest.approx((1 / 2 + 0) / 2)
    half = between(Parts(), 4.0, **vectors, **hashes, query_own_only=[True, False])  # one of two micro-batches
    assert half["masked_negatives"].item() == pytest.approx(alone["masked_negatives"].item() / 2)


def test_a_query_may_have_no_negative_left() -> None:
    """Every other document is a copy: no loss, no gradient and no NaN."""
    axes = torch.eye(4)
    parts = between(Parts(), query=axes[:2], positive=axes[[2, 2]], positive_hash=[5, 5])
    assert parts["loss"].item() == pytest.approx(0, abs=1e-12)
    assert parts["masked_negatives"] == parts["in_batch_accuracy"] == 1
    single = between(Parts(), query=axes[:1], positive=axes[1:2], positive_hash=[5])
    assert single["loss"].item() == single["masked_negatives"].item() == 0


def test_accuracy_is_among_the_documents_that_are_left() -> None:
    """Another row's copy of the positive scores higher by rounding; a foreign document does where there is no mask."""
    vectors: dict[str, Any] = {
        "query": [[1.0, 0, 0], [0, 1, 0]], "positive": [[1.0, 0.1, 0], [0, 1, 0]],
        "negative": [[0.0, 0, 1], [1, 0, 0]],
    }  # fmt: skip
    assert between(Parts(), **vectors)["in_batch_accuracy"] == 0.5
    assert between(Parts(), **vectors, query_own_only=[True, True])["in_batch_accuracy"] == 1
    assert between(Parts(), **vectors, positive_hash=[1, 2], negative_hash=[3, 1])["in_batch_accuracy"] == 1


def test_without_facts_nothing_is_masked() -> None:
    """The ordinary loss does not even ask."""
    pool = Pool.of({}, 2, 4, torch.device("cpu"))
    assert Softmax(("qd",), ContrastiveKeys(), pool, 20.0).adjust is None
    assert Softmax(("qd", "qq"), ContrastiveKeys(), pool, 20.0).adjust is not None
    objective, collate = make(Parts())
    assert all(not side["facts"] for side in collate(rows_with_copies()).values())
    assert objective(collate(rows_with_copies()), {}).facts == {}


def test_hash_tells_instruction_and_text_apart() -> None:
    texts = [
        InstructedText(*pair) for pair in (("", "ab"), ("a", "b"), ("ab", ""), ("", "a b"), ("1 ", ""), ("", "1 "))
    ]
    hashes = [hash_of(text) for text in texts]
    assert len(set(hashes)) == len(texts)
    assert all(0 <= value < 2**63 for value in hashes)
    assert max(hash_of(InstructedText("", str(i))) for i in range(100)) > 2**62
    assert hash_of(InstructedText("a", "b", "document")) == hash_of(InstructedText("a", "b", "query"))


def test_facts_follow_their_rows_into_the_pieces() -> None:
    """One entry a text, in the order of the texts, K negatives a row; pieces keep them with their tokens."""
    _, collate = make(EACH["all"])
    rows = rows_with_copies()
    batch = collate(rows)
    assert batch["query"]["facts"]["own_only"].tolist() == [row.source == "alone" for row in rows]
    assert batch["positive"]["facts"]["hash"].tolist() == [hash_of(row.positive) for row in rows]
    assert batch["negative"]["facts"]["hash"].tolist() == [hash_of(text) for row in rows for text in row.negatives]
    assert batch["positive"]["facts"]["score"].tolist() == [row.scores[0] for row in rows]
    assert batch["negative"]["facts"]["score"].tolist() == [score for row in rows for score in row.scores[1:]]
    for piece in split_batch(batch, 100):
        for name, side in piece.items():
            for ids, *facts in zip(side["input_ids"].split(side["lengths"]), *side["facts"].values(), strict=True):
                places = [i for i, other in enumerate(batch[name]["input_ids"].split(batch[name]["lengths"]))
                          if torch.equal(ids, other)]  # fmt: skip
                assert facts in [[values[i] for values in batch[name]["facts"].values()] for i in places]


# --- the losses ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block_rows", [1, 5, None])
def test_several_states_a_row_are_one_softmax(block_rows: int | None, dtype: torch.dtype) -> None:
    """Two states end to end, against the logits of both beside one another; what is added to them is a constant."""
    p = problem(rows=13, columns=29, width=12, dtype=dtype)
    weight_VD = p.weight_VD.detach()[:, :6].contiguous().requires_grad_()
    target_N = p.target_N + 29 * (torch.arange(13) % 2)
    added_NV = torch.rand(13, 58, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def add(rows: slice, logits: Tensor) -> None:
        logits += added_NV[rows].to(logits)

    found = linear_cross_entropy(p.hidden_ND, weight_VD, target_N, p.term_weight_N, block_rows, adjust=add)
    actual = torch.autograd.grad(found.loss, (p.hidden_ND, weight_VD))
    states, exact = p.hidden_ND.detach().double().requires_grad_(), weight_VD.detach().double().requires_grad_()
    logits_NV = torch.cat([states[:, :6] @ exact.T, states[:, 6:] @ exact.T], dim=1) + added_NV
    loss = (torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none") * p.term_weight_N).sum()
    expected = torch.autograd.grad(loss, (states, exact))
    tolerance = 1e-11 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(found.loss.double(), loss, rtol=tolerance, atol=0)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("block_rows", [1, 2, 5, 12, 13, 14, None])
def test_leaving_columns_out_does_not_depend_on_the_block(block_rows: int | None) -> None:
    """Value and both gradients are those of logits of minus infinity, however many rows are done at once."""
    p = problem(rows=13, columns=29)
    generator = torch.Generator().manual_seed(1)
    out_NV = (torch.rand(13, 29, generator=generator) < 0.3).scatter(1, p.target_N.unsqueeze(1), False)
    asked: list[int] = []

    def leave_out(rows: slice, logits: Tensor) -> None:
        asked.extend(range(*rows.indices(13)))
        logits.masked_fill_(out_NV[rows], -torch.inf)

    def with_all_logits(p: Problem) -> Tensor:
        logits_NV = (p.hidden_ND @ p.weight_VD.T).masked_fill(out_NV, -torch.inf)
        return -(logits_NV.log_softmax(dim=1).gather(1, p.target_N.unsqueeze(1))[:, 0] * p.term_weight_N).sum()

    def ours(p: Problem) -> Tensor:
        found = linear_cross_entropy(*p, block_rows=block_rows, adjust=leave_out)
        logits_NV = (p.hidden_ND @ p.weight_VD.T).masked_fill(out_NV, -torch.inf)
        assert found.hits.tolist() == (logits_NV.argmax(dim=1) == p.target_N).tolist()
        return found.loss

    actual, expected = gradients(p, ours), gradients(p, with_all_logits)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-15)
    assert asked == list(range(13))
    assert abs(actual[0] / gradients(p, plain)[0] - 1) > 0.01
    assert torch.equal(gradients(p, blocked(block_rows))[0], gradients(p, blocked(block_rows))[0])


def test_no_mask_is_larger_than_a_block() -> None:
    """Nor does the masked share compare all queries with all documents."""
    hash_N = torch.randint(50, (3000,), generator=torch.Generator().manual_seed(0))
    facts = {"positive": {"hash": hash_N[:1500]}, "negative": {"hash": hash_N[1500:]}}
    softmax = Softmax(("qd",), ContrastiveKeys(), Pool.of(facts, 1500, 3000, torch.device("cpu")), 1.0)
    p = problem(rows=1500, columns=3000, width=4)
    with Largest() as largest:
        linear_cross_entropy(
            p.hidden_ND, p.weight_VD, softmax.label_B, p.term_weight_N, 64, softmax.adjust
        ).loss.backward()
    assert largest.entries == 64 * 3000
    expected = [(int((hash_N == value).sum()) - 1) / 2999 for value in hash_N[:1500]]
    assert softmax.masked_B is not None and softmax.masked_B.tolist() == pytest.approx(expected)


def test_distillation_by_hand() -> None:
    """Cosines 1 and 0 at a scale of 2, a teacher that gives the positive three quarters; no gradient to the teacher."""
    query_BD = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    document_BGD = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    teacher_BG = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    log_z = math.log(math.exp(2) + 1)
    loss = distillation(query_BD, document_BGD, teacher_BG.detach(), 2.0, torch.tensor([0.5]))
    assert loss.item() == pytest.approx(0.5 * -(0.75 * (2 - log_z) + 0.25 * (0 - log_z)), rel=1e-12)
    facts = {"positive_score": [3.0], "negative_score": [1.0]}
    parts = between(Parts(weight=2.0), query=[[1.0, 0]], positive=[[1.0, 0]], negative=[[0.0, 1]], **facts)
    assert parts["loss"].item() == pytest.approx((parts["loss_contrastive"] + 2 * parts["loss_distillation"]).item())


def test_the_best_student_is_the_teacher() -> None:
    """The gradient of the term is zero where the student's scores are the teacher's."""
    query_BD, document_BGD = unit(torch.randn(3, 8, dtype=torch.float64)), unit(torch.randn(3, 4, 8).double())
    document_BGD.requires_grad_()
    teacher_BG = 20 * torch.einsum("bd,bgd->bg", query_BD, document_BGD).detach()
    distillation(query_BD, document_BGD, teacher_BG + 5, 20.0, torch.ones(3).double()).backward()
    assert document_BGD.grad is not None and document_BGD.grad.abs().max() < 1e-12


def test_a_truncation_of_all_numbers_is_the_plain_loss() -> None:
    """And the mean over two truncations is the mean of their losses."""
    rows = rows_with_copies()
    found = {}
    for dims in (None, [32], [8], [8, 32]):
        objective, collate = make(Parts(dims=dims))
        batch = collate(rows)
        found[str(dims)] = loss_parts(objective, batch, objective.count(batch))["loss"].item()
    assert found["[32]"] == pytest.approx(found["None"], rel=1e-12)
    assert found["[8, 32]"] == pytest.approx((found["[8]"] + found["[32]"]) / 2, rel=1e-12)
    assert abs(found["[8]"] / found["[32]"] - 1) > 0.01
    query_BD, document_ND = torch.randn(3, 8).double(), torch.randn(5, 8).double()
    label_B, weight_B = torch.arange(3), torch.ones(3).double()
    cut = info_nce(unit(unit(query_BD)[:, :4]), unit(unit(document_ND)[:, :4]), label_B, 20.0, weight_B)
    expected = info_nce(unit(query_BD[:, :4]), unit(document_ND[:, :4]), label_B, 20.0, weight_B)
    torch.testing.assert_close(cut.loss, expected.loss, rtol=1e-12, atol=0)


def test_a_truncation_beyond_the_hidden_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"matryoshka_dims: 33 is more than the model's hidden size, 32\."):
        make(Parts(dims=[8, 33]))


@pytest.mark.parametrize("name", list(EACH))
def test_half_precision_vectors(name: str) -> None:
    """Losses are computed in float32 at least, whatever the vectors come in."""
    objective, collate = make(EACH[name])
    batch = collate(rows_with_copies())
    totals = objective.count(batch)
    output = objective(batch, totals)
    exact = objective.contrast(output.vectors, output.facts, totals)
    half = {side: vectors.bfloat16() for side, vectors in output.vectors.items()}
    parts = objective.contrast(half, output.facts, totals)
    for part, value in parts.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[part].double(), rtol=0.1, atol=0.02)
