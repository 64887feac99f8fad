"""Why two ways disagree: where their token ids part, and which single change explains it.

A vector is made in steps: token ids (template, closing token), hidden states (weights, attention, adapter, last norm),
pooling. One way's vectors are computed again, text by text without padding, with one step changed. Where they then are
the other way's on every text, that step is named. Nothing is named without this proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec.model.backbone import hidden_states
from llm2vec.model.packing import adapter_layers, adapter_off, inner_decoder
from llm2vec.model.pooling import pool
from llm2vec.text.batches import shared_start
from llm2vec.text.tokenization import Row
from llm2vec.types import Attention, InstructedText, PoolingMode
from llm2vec.verify.compare import Answer, Parity
from llm2vec.verify.loaded import LocalWay

UNKNOWN = "weights or something else"


class Change(NamedTuple):
    """A single change to a way."""

    cause: str
    words: str  #: what is done, to follow "with"
    rows: Sequence[Row | None]  #: the token rows then; None = not known
    options: Mapping[str, Any] = MappingProxyType({})  #: of `vector_of`


@torch.no_grad()
def vector_of(
    way: LocalWay,
    row: Row,
    *,
    attention: Attention | None = None,
    pooling: PoolingMode | None = None,
    everywhere: bool = False,
    with_adapter: bool = True,
    last_norm: bool = True,
) -> Tensor:
    """The vector [D] of a token row that is read alone, float32 on the CPU, not normalised: as the way makes it, but
    for what is given. `everywhere` pools over every token, whatever the row says."""
    before_norm: list[Tensor] = []
    ids_1T = torch.tensor([row.ids], device=next(way.model.parameters()).device)
    hook = inner_decoder(way.model).norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    with nullcontext() if with_adapter else adapter_off(way.model):
        states_1TD = hidden_states(way.model, attention or way.attention, torch.ones_like(ids_1T), input_ids=ids_1T)
    hook.remove()
    chosen_1TD = (states_1TD if last_norm else before_norm[0]).float().cpu()
    return pool(chosen_1TD, torch.tensor([row.pooled]) | everywhere, pooling or way.pooling_mode)[0]


def find_cause(reference: Answer, parity: Parity, texts: Sequence[InstructedText]) -> str:
    """Why a way that does not pass disagrees with the reference, on the texts that both were asked: a cause, and behind
    a colon what was found and proves it.

    The cause is that of a `Change`, or `UNKNOWN`, which no computation stands behind.
    """
    sides = (reference, parity.answer)
    sizes = [side.vectors.shape[1] for side in sides]
    if sizes[0] != sizes[1]:
        return f"{UNKNOWN}: the vectors have {sizes[0]} and {sizes[1]} numbers, so this is another model"
    if (parity.cosines >= parity.threshold).all():
        lengths = "from {:.4g} to {:.4g}".format(*parity.lengths)
        return f"norm: the same directions, but lengths {lengths}: nothing makes unit vectors"
    compared = [texts[i] for i in parity.compared]
    # Other models than decoders, which sentence-transformers loads too, have other steps.
    ways = [side.way if side.way and hasattr(inner_decoder(side.way.model), "norm") else None for side in sides]
    rows = [way.rows(compared) if way else None for way in ways]
    for side, way, own in zip(sides, ways, rows, strict=True):
        if way and own and adapter_layers(way.model):
            pairs = ((vector_of(way, row), vector_of(way, row, with_adapter=False)) for row in own)
            if all(torch.equal(on, off) for on, off in pairs):
                return f"adapter: dead: switching off the adapter of {side.name} changes no vector"
    order = parity.cosines.argsort().tolist()  # the worst first, where a wrong change fails soonest
    for side, way, own, target, theirs in zip(sides, ways, rows, sides[::-1], rows[::-1], strict=True):
        if way is None or own is None:
            continue
        shown: Sequence[Row | None] = theirs or [
            with_ids(row, target.ids[i]) for row, i in zip(own, parity.compared, strict=True)
        ]
        for change in _changes(way, own, target.name, shown, is_loaded=theirs is not None):
            least = _least_cosine(way, change, target.vectors[parity.compared], order, parity.threshold)
            if least is not None:
                words = f"with {change.words}, {side.name} gives the vectors of {target.name}"
                return f"{change.cause}: {words} (least cosine {least:.6f})"
    return f"{UNKNOWN}: {'no single change explains it' if any(ways) else 'no side can be taken apart into its steps'}"


def _changes(
    way: LocalWay, rows: Sequence[Row], target: str, shown: Sequence[Row | None], *, is_loaded: bool
) -> Iterator[Change]:
    """All single changes by which a way might come to a target's vectors; `shown`: the target's token rows."""
    yield Change("batching", "one text at a time in place of a batch", rows)
    pairs = [(own.ids, row.ids) for own, row in zip(rows, shown, strict=True) if row]
    if differing := [pair for pair in pairs if pair[0] != pair[1]]:
        yield Change(_name_of(differing), f"the token ids of {target}", shown)
    elif is_loaded:
        yield Change("pooling", f"pooling over the tokens that {target} pools over", shown)
    other: Attention = "bidirectional" if way.attention == "causal" else "causal"
    yield Change("attention", f"{other} attention", rows, {"attention": other})
    for where, everywhere in (("the same tokens", False), ("every token", True)):
        for mode in get_args(PoolingMode):
            words = f"{mode} pooling over {where}"
            yield Change("pooling", words, rows, {"pooling": mode, "everywhere": everywhere})
    if adapter_layers(way.model):
        yield Change("adapter", "its adapter switched off", rows, {"with_adapter": False})
    yield Change("norm", "the states from before the last norm", rows, {"last_norm": False})


def _least_cosine(
    way: LocalWay, change: Change, target_ND: Tensor, order: Sequence[int], threshold: float
) -> float | None:
    """The least cosine of all texts whose rows are known; None where there are none, or as soon as one is too low."""
    least = None
    for i in order:
        if (row := change.rows[i]) is not None:
            vector = vector_of(way, row, **change.options).double()
            cosine = float(F.cosine_similarity(vector, target_ND[i].double(), dim=0))
            if not cosine >= threshold:
                return None
            least = cosine if least is None else min(least, cosine)
    return least


def with_ids(row: Row, ids: list[int] | None) -> Row | None:
    """A row with the ids that a server shows. Behind where they part from the row's, every token is pooled over."""
    if not ids:
        return None
    start = shared_start(row.ids, ids)
    pooled = [*row.pooled[:start], *[True] * (len(ids) - start)]
    return Row(ids, pooled if any(pooled) else [True] * len(ids), [False] * len(ids))


def first_differing_token(reference: Answer, parity: Parity, names: Sequence[str]) -> str | None:
    """Text, position and both tokens where the ids of two ways part first; None where none do."""
    if not parity.differing_ids:
        return None
    text, *others = parity.differing_ids
    ids = [side.ids[text] or [] for side in (parity.answer, reference)]
    at = shared_start(*ids)
    tokenizer = next((side.way.tokenizer for side in (reference, parity.answer) if side.way), None)
    theirs, ours = (
        "the end" if at >= len(row) else repr(tokenizer.decode([row[at]]) if tokenizer else row[at]) for row in ids
    )
    more = f", and {len(others)} more text(s) differ" if others else ""
    return f"{parity.answer.name}: text {names[text]!r}, position {at}: {theirs} instead of {ours}{more}"


def _name_of(pairs: Sequence[tuple[list[int], list[int]]]) -> str:
    """What to call the difference that most texts show, from their ids in one way and in the other."""

    def name(ours: list[int], theirs: list[int]) -> str:
        if theirs[:-1] == ours[:-1] or theirs == ours[:-1] or theirs[:-1] == ours:
            return "closing token"
        return "truncation" if shared_start(ours, theirs) >= min(len(ours), len(theirs)) - 1 else "template"

    return Counter(name(*pair) for pair in pairs).most_common(1)[0][0]
