"""Forward and backward of a batch in pieces of at most so many tokens; the gradient does not depend on the cut.

Losses that stand in each row alone are summed over the pieces. A contrastive loss couples all rows, so its gradient is
cached (Gao et al. 2021, arXiv 2101.06983):

    1. embed every piece without a graph, and keep the vectors
    2. the loss between all vectors gives each vector's gradient
    3. embed every piece again, with the same random numbers, and carry its vectors' gradients into the weights

Memory is the activations of one piece, and the vectors.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2vec.distributed import max_over_ranks, sum_over_ranks
from llm2vec.text.batches import num_tokens, select_rows
from llm2vec.types import Batch, Objective, Output, TextFacts

#: Up to this many pieces, gradient caching keeps the last one's graph instead of embedding it twice.
MOST_PIECES_WITH_A_GRAPH = 8


def backward_step(
    objective: Objective,
    batch: Batch,
    totals: dict[str, Tensor],
    *,
    max_tokens: int | None = None,
    scale: float = 1.0,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """Add the gradient of a batch's loss to the parameters' `.grad`.

    Args:
        objective: plain, or wrapped for several processes.
        batch: what this process holds at once.
        totals: number of terms of each loss part in the whole optimiser step.
        max_tokens: most tokens that go through the model at once, at least a row; None = the whole batch.
        scale: factor on the gradient, not on the figures returned.
        backward: differentiates a scalar.
        no_sync: entered around every micro-batch but the last, so that gradients are exchanged once.

    Returns:
        Loss parts, detached: `loss` and the objective's figures.
    """
    inner: Objective = getattr(objective, "module", objective)  # DDP's wrapper passes on no methods
    pieces = split_batch(batch, max_tokens)
    if not inner.contrasts or len(pieces) == 1:
        # One pass a piece: rows whose loss needs no others, or all rows at once.
        shares: list[dict[str, Tensor]] = []
        for i, piece in enumerate(pieces):
            with nullcontext() if i == len(pieces) - 1 else no_sync():
                output = objective(piece, totals)
                between = inner.contrast(output.vectors, output.facts, totals) if inner.contrasts else {}
                losses = [parts["loss"] for parts in (output.parts, between) if "loss" in parts]
                backward(torch.stack(losses).sum() * scale)
                shares += [output.parts, between]
        return add_up(shares)
    # Both times that a piece is embedded, dropout must drop the same units.
    seeds = draw_seeds(len(pieces))
    # The last piece's graph is kept and differentiated first, which saves embedding that piece again. Of many pieces
    # that is a small saving, and the memory is better spent on their vectors.
    keep = len(pieces) <= MOST_PIECES_WITH_A_GRAPH
    held = _Held(batch)
    for i, (piece, seed) in enumerate(zip(pieces, seeds, strict=True)):
        kept = keep and i == len(pieces) - 1
        with seeded(seed, piece), no_sync() if kept else torch.no_grad():
            # Without totals the rows' own losses are left out. They come with the pass that differentiates them.
            output = objective(piece, totals if kept else {})
        held.add(piece, output)
    between, gradients = _gradients_of_vectors(inner, held, totals)
    shares = [between]
    if keep:  # `output` is the last piece's
        of_last = {side: gradient[-held.lengths[side][-1] :] for side, gradient in gradients.items()}
        with no_sync():
            backward(_surrogate(output, of_last) * scale)
        shares.append(add_up([output.parts]))
        seeds.pop()
    of_pieces = {side: iter(gradient.split(held.lengths[side])) for side, gradient in gradients.items()}
    del output, held  # frees the last piece's graph, and vectors that nobody reads any more
    for i, (seed, piece) in enumerate(zip(seeds, pieces, strict=not keep)):
        # The last backward of the step exchanges the gradients of all of them.
        with seeded(seed, piece), nullcontext() if i == len(seeds) - 1 else no_sync():
            output = objective(piece, totals)
            backward(_surrogate(output, {side: next(cut) for side, cut in of_pieces.items()}) * scale)
            shares.append(add_up([output.parts]))
    return add_up(shares)


def _surrogate(output: Output, gradients: dict[str, Tensor]) -> Tensor:
    """A scalar whose value means nothing; its gradient is the vectors' cached one and that of the rows' own loss."""
    # d/dw sum(vector * g) = g * dvector/dw where g is a constant: the chain rule with the cached gradient in it.
    products = [(output.vectors[side] * gradient).sum() for side, gradient in gradients.items()]
    return torch.stack([*products, *(value for name, value in output.parts.items() if name == "loss")]).sum()


def loss_parts(
    objective: Objective, batch: Batch, totals: dict[str, Tensor], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """The figures of `backward_step` alone: nothing is differentiated."""
    inner: Objective = getattr(objective, "module", objective)
    with torch.no_grad():
        held, shares = _Held(batch), []
        for piece in split_batch(batch, max_tokens):
            output = objective(piece, totals)
            held.add(piece, output)
            shares.append(output.parts)
        between = inner.contrast(held.vectors, held.facts, totals) if inner.contrasts else {}
        return add_up([*shares, between])


def mean_parts(
    objective: Objective, batches: Iterable[Batch], device: torch.device, max_tokens: int | None = None
) -> dict[str, float]:
    """Loss parts of held-out micro-batches, of which each rank has its own: a mean over them, not over their terms."""
    inner: Objective = getattr(objective, "module", objective)
    sums: dict[str, Tensor] = {}
    number = 0
    for batch in batches:
        totals, _ = count_terms(inner, [batch], device)
        sums = add_up([sums, loss_parts(objective, batch, totals, max_tokens)])
        number += 1
    means = sum_over_ranks(torch.stack(list(sums.values())).float()) / number
    return dict(zip(sums, means.tolist(), strict=True))


def count_terms(
    objective: Objective, batches: Sequence[Batch], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """How many terms of each loss part, and how many tokens, batches hold on all ranks; one sum over the ranks."""
    counts = [{**objective.count(batch), "tokens": torch.tensor(float(num_tokens(batch)))} for batch in batches]
    sums = [torch.stack([count[name] for count in counts]).sum() for name in counts[0]]
    if device.type == "cuda" and all(number.device.type == "cpu" for number in sums):
        # From pinned memory, so that the host need not wait until they are there.
        of_rank = torch.stack(sums).pin_memory().to(device, non_blocking=True)
    else:
        of_rank = torch.stack([number.to(device) for number in sums])
    totals = dict(zip(counts[0], sum_over_ranks(of_rank).unbind(), strict=True))
    return totals, totals.pop("tokens")


def split_batch(batch: Batch, max_tokens: int | None) -> Pieces | list[Batch]:
    """Rows of a batch in pieces of about equally many tokens, at most `max_tokens`; as many pieces on every rank.

    A row that is longer than that goes alone.
    """
    if max_tokens is None:
        return [batch]
    tokens = tokens_of_rows(batch)
    # A model whose weights lie spread over the ranks must be called equally often on all of them.
    number = max_over_ranks(number_of_pieces(tokens, max_tokens))
    if number == 1:
        return [batch]
    return Pieces(batch, balanced(tokens, number))


class Pieces:
    """The pieces of a batch. Each is put together when its turn comes, so a large batch lies in memory once."""

    def __init__(self, batch: Batch, rows_of_pieces: Sequence[Sequence[int]]) -> None:
        self._batch = batch
        self._rows_of_pieces = rows_of_pieces

    def __len__(self) -> int:
        return len(self._rows_of_pieces)

    def __iter__(self) -> Iterator[Batch]:
        num_rows = _num_rows(self._batch)
        ends = {name: list(accumulate(side["lengths"])) for name, side in self._batch.items()}
        for rows in self._rows_of_pieces:
            piece: Batch = {}
            for name, side in self._batch.items():
                per_row = len(side["lengths"]) // num_rows  # a side with K texts a row keeps them together
                texts = [row * per_row + k for row in rows for k in range(per_row)]
                piece[name] = select_rows(side, texts, ends[name])
            yield piece


def number_of_pieces(tokens: Sequence[int], max_tokens: int) -> int:
    """How many balanced pieces it takes so that none has more than `max_tokens`; a row longer than that goes alone."""
    most = max(max_tokens, max(tokens))

    def fit(number: int) -> bool:
        return max(sum(tokens[row] for row in piece) for piece in balanced(tokens, number)) <= most

    # Found by halving, as there may be thousands of pieces. That each row alone fits ends the search.
    fewest = -(-sum(tokens) // most)
    return fewest + bisect_left(range(fewest, len(tokens)), True, key=fit)


def balanced(tokens: Sequence[int], number: int) -> list[list[int]]:
    """Row indices in `number` pieces of nearly equal token counts, none empty: the longest first, into the emptiest."""
    pieces: list[list[int]] = [[] for _ in range(number)]
    heap = [(0, i) for i in range(number)]  # tokens so far, and which piece
    for row in sorted(range(len(tokens)), key=lambda row: -tokens[row]):
        filled, i = heapq.heappop(heap)
        pieces[i].append(row)
        heapq.heappush(heap, (filled + tokens[row], i))
    return [sorted(piece) for piece in pieces]


def add_up(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Shares of the same figures, added; detached."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value.detach() if name in total else value.detach()
    return total


class _Held:
    """Vectors and facts of all pieces' rows, each written into its place when its piece is done.

    Put together at the end, thousands of small tensors would take their memory twice, and leave holes behind.
    """

    def __init__(self, batch: Batch) -> None:
        self.vectors: dict[str, Tensor] = {}  #: of each side, detached; its rows in the order of the pieces
        self.facts: TextFacts = {}  #: of each side, likewise
        self.lengths: dict[str, list[int]] = {}  #: of each side, how many vectors each piece has
        self._num_rows = _num_rows(batch)
        self._filled = 0

    def add(self, piece: Batch, output: Output) -> None:
        """The next piece's."""
        rows = _num_rows(piece)
        facts = [(self.facts.setdefault(side, {}), of_piece) for side, of_piece in output.facts.items()]
        for of_all, of_piece in [(self.vectors, output.vectors), *facts]:
            for name, values in of_piece.items():
                per_row = len(values) // rows  # K hard negatives a row
                if name not in of_all:  # width and dtype are known from the first piece on
                    of_all[name] = values.new_empty(per_row * self._num_rows, *values.shape[1:])
                of_all[name][per_row * self._filled : per_row * (self._filled + rows)] = values.detach()
        for side, vectors in output.vectors.items():
            self.lengths.setdefault(side, []).append(len(vectors))
        self._filled += rows


def _gradients_of_vectors(
    inner: Objective, held: _Held, totals: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss parts between the vectors, and the gradient of each side's vectors.

    The parts are detached, as their graph would hold the vectors in memory.
    """
    leaves = {side: vectors.requires_grad_() for side, vectors in held.vectors.items()}
    with torch.enable_grad():
        between = inner.contrast(leaves, held.facts, totals)
        gradients = dict(zip(leaves, torch.autograd.grad(between["loss"], list(leaves.values())), strict=True))
    return add_up([between]), gradients


def _num_rows(batch: Batch) -> int:
    """As many as the first side has texts; others may have several a row."""
    return len(batch[next(iter(batch))]["lengths"])


def tokens_of_rows(batch: Batch) -> list[int]:
    """Of each row, all sides."""
    of_sides = [np.reshape(side["lengths"], (_num_rows(batch), -1)).sum(axis=1) for side in batch.values()]
    tokens: list[int] = np.sum(of_sides, axis=0).tolist()
    return tokens


def draw_seeds(number: int) -> list[int]:
    """So many, from the CPU's generator."""
    return torch.randint(2**62, (number,)).tolist()


@contextmanager
def seeded(seed: int, batch: Batch) -> Iterator[None]:
    """Random numbers from `seed` within, on the CPU and the batch's device; after it they go on as if nothing had been.

    With a seed a piece, no state of the generators needs to be copied from the device and back.
    """
    device = batch[next(iter(batch))]["input_ids"].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
