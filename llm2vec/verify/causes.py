"""Why two ways disagree: where their token ids part, and which single change explains it.

A vector is made in steps: token ids (template, closing token), hidden states (weights, attention, adapter, last norm),
pooling. One way's vectors are computed again, text by text without padding, with one step changed. Where they then are
the other way's on every text, that step is named. Nothing is named without this proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from llm2vec.model.backbone import hidden_states
from llm2vec.model.packing import inner_decoder
from llm2vec.model.pooling import pool
from llm2vec.text.tokenization import Row
from llm2vec.types import Attention, InstructedText, PoolingMode
from llm2vec.verify.compare import Answer, Parity
from llm2vec.verify.loaded import LocalWay
from llm2vec.verify.ways import shared_start

UNKNOWN = "weights or something else"


class Change(NamedTuple):
    """A single change: its cause, what is done (to follow "with"), and a text's vector under it, None = not known."""

    cause: str
    words: str
    vector: Callable[[int], Tensor | None]


class Recomputation:
    """A loaded way's vectors, one text at a time without padding.

    Args:
        way: a decoder, loaded in any way.
        texts: what was compared.
    """

    def __init__(self, way: LocalWay, texts: Sequence[InstructedText]) -> None:
        self.way = way
        self.rows = way.rows(texts)
        self.adapted = [module for module in way.model.modules() if isinstance(module, BaseTunerLayer)]

    @torch.no_grad()
    def vector(
        self,
        text: int,
        *,
        row: Row | None = None,
        attention: Attention | None = None,
        pooling: PoolingMode | None = None,
        everywhere: bool = False,
        without_adapter: bool = False,
        without_norm: bool = False,
    ) -> Tensor:
        """The vector [D] of a text, float32 on the CPU, not normalised; what is not given stays as the way does it.

        Args:
            text: its number.
            row: another token row.
            attention: the other kind.
            pooling: another mode.
            everywhere: over every token, whatever the template says.
            without_adapter: with the adapter switched off.
            without_norm: from the states before the last norm.
        """
        row = row or self.rows[text]
        model, before_norm = self.way.model, list[Tensor]()
        ids_1T = torch.tensor([row.ids], device=next(model.parameters()).device)
        hook = inner_decoder(model).norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
        for module in self.adapted:
            module.enable_adapters(not without_adapter)
        states_1TD = hidden_states(model, attention or self.way.attention, torch.ones_like(ids_1T), input_ids=ids_1T)
        for module in self.adapted:
            module.enable_adapters(True)
        hook.remove()
        pool_mask_1T = torch.tensor([row.pooled]) | everywhere
        chosen_1TD = (before_norm[0] if without_norm else states_1TD).float().cpu()
        return pool(chosen_1TD, pool_mask_1T, pooling or self.way.pooling_mode)[0]

    def changes(self, target: Answer, target_rows: Sequence[Row | None], *, is_loaded: bool) -> Iterator[Change]:
        """All single changes that another way's vectors might come from.

        Args:
            target: what the other way answered.
            target_rows: its token rows.
            is_loaded: whether these say which tokens it pools over.
        """
        yield Change("batching", "one text at a time in place of a batch", self.vector)
        pairs = [(own.ids, row.ids) for own, row in zip(self.rows, target_rows, strict=True) if row]

        def with_row(text: int) -> Tensor | None:
            row = target_rows[text]
            return None if row is None else self.vector(text, row=row)

        if differing := [pair for pair in pairs if pair[0] != pair[1]]:
            yield Change(_name_of(differing), f"the token ids of {target.name}", with_row)
        elif is_loaded:
            yield Change("pooling", f"pooling over the tokens that {target.name} pools over", with_row)
        other: Attention = "bidirectional" if self.way.attention == "causal" else "causal"
        yield Change("attention", f"{other} attention", partial(self.vector, attention=other))
        for where, everywhere in (("the same tokens", False), ("every token", True)):
            for mode in get_args(PoolingMode):
                pooled = partial(self.vector, pooling=mode, everywhere=everywhere)
                yield Change("pooling", f"{mode} pooling over {where}", pooled)
        if self.adapted:
            yield Change("adapter", "its adapter switched off", partial(self.vector, without_adapter=True))
        yield Change("norm", "the states from before the last norm", partial(self.vector, without_norm=True))

    def has_dead_adapter(self) -> bool:
        """Whether there is an adapter, and switching it off changes no vector."""
        pairs = ((self.vector(i), self.vector(i, without_adapter=True)) for i in range(len(self.rows)))
        return bool(self.adapted) and all(torch.equal(on, off) for on, off in pairs)


def find_cause(reference: Answer, parity: Parity, texts: Sequence[InstructedText]) -> str:
    """Why a way disagrees with the reference: a cause, and behind a colon what was found and proves it.

    The cause is that of a `Change`, or `weights or something else`, which no computation stands behind.

    Args:
        reference: what the first way answered.
        parity: of a way that does not pass.
        texts: what both were asked.
    """
    sides = (reference, parity.answer)
    sizes = [side.vectors.shape[1] for side in sides]
    if sizes[0] != sizes[1]:
        return f"{UNKNOWN}: the vectors have {sizes[0]} and {sizes[1]} numbers, so this is another model"
    if (parity.cosines >= parity.threshold).all():
        shortest, longest = parity.lengths
        lengths = f"from {shortest:.4g} to {longest:.4g}"
        return f"norm: the same directions, but lengths {lengths}: nothing makes unit vectors"
    compared = [texts[i] for i in parity.compared]
    # Other models than decoders, which sentence-transformers loads too, have other steps.
    steps: list[Recomputation | None] = [
        Recomputation(side.way, compared) if side.way and hasattr(inner_decoder(side.way.model), "norm") else None
        for side in sides
    ]
    for side, base in zip(sides, steps, strict=True):
        if base and base.has_dead_adapter():
            return f"adapter: dead: switching off the adapter of {side.name} changes no vector"
    order = parity.cosines.argsort().tolist()  # the worst first, where a wrong change fails soonest
    for side, base, target, loaded in zip(sides, steps, sides[::-1], steps[::-1], strict=True):
        if base is None:
            continue
        shown = [with_ids(row, target.ids[i]) for row, i in zip(base.rows, parity.compared, strict=True)]
        for change in base.changes(target, loaded.rows if loaded else shown, is_loaded=loaded is not None):
            least = _least_cosine(change, target.vectors[parity.compared], order, parity.threshold)
            if least is not None:
                words = f"with {change.words}, {side.name} gives the vectors of {target.name}"
                return f"{change.cause}: {words} (least cosine {least:.6f})"
    return f"{UNKNOWN}: {'no single change explains it' if any(steps) else 'no side can be taken apart into its steps'}"


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


def _least_cosine(change: Change, target_ND: Tensor, order: Sequence[int], threshold: float) -> float | None:
    """The least cosine of all texts whose vector is known; None as soon as one lies below the threshold."""
    least = 2.0
    for i in order:
        if (vector := change.vector(i)) is not None:
            least = min(least, float(F.cosine_similarity(vector.double(), target_ND[i].double(), dim=0)))
            if not least >= threshold:
                return None
    return least if least <= 1.5 else None
