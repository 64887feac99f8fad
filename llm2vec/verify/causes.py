"""Why two ways disagree: one step of a way is changed, and if it then gives the other's vectors, that step is named.

A text's vector is made in steps: token ids, hidden states (weights, adapter, attention, final norm), pooling, length.
The reference is computed again, text by text without padding, with one step changed, then with two; then the other way
is, where it is loaded here. A cause is named only where that gives the other's vectors, on every text compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from llm2vec.model.backbone import hidden_states
from llm2vec.model.packing import inner_decoder
from llm2vec.model.pooling import pool
from llm2vec.text.tokenization import Row
from llm2vec.types import Attention, InstructedText, PoolingMode
from llm2vec.verify.compare import Answer, Parity
from llm2vec.verify.loaded import LocalWay
from llm2vec.verify.tokens import TokenDifference, guessed_rows, token_differences, with_ids

#: Texts that changes are tried on, those that differ most; what passes has to hold on all.
NUM_TRIED = 6

UNKNOWN = "weights or something else"


class Finding(NamedTuple):
    """A cause of a difference.

    Attributes:
        cause: `template`, `EOS`, `BOS`, `truncation`, `control tokens`, `attention`, `pooling`, `adapter`, `norm`,
            `batching`, `precision`, or `UNKNOWN`, which no recomputation stands behind.
        words: what was found, and what proves it.
    """

    cause: str
    words: str


@dataclass(frozen=True)
class Change:
    """A step of a way done otherwise; what is None or False stays as the way does it.

    Attributes:
        cause: what it is called; empty for token ids that are known, which are named by how they differ.
        words: what is done, to follow "with".
        rows: other token rows, one a text.
        attention: the other kind.
        pooling: mode, and whether over every token, whatever the template marks.
        without_adapter: with the adapter switched off.
        without_final_norm: states from before the final norm.
    """

    cause: str
    words: str
    rows: tuple[Row, ...] | None = None
    attention: Attention | None = None
    pooling: tuple[PoolingMode, bool] | None = None
    without_adapter: bool = False
    without_final_norm: bool = False

    @property
    def step(self) -> str:
        """What is changed: two changes of one step exclude each other."""
        return "rows" if self.rows is not None else self.cause


class Recomputation:
    """A way's vectors, one text at a time without padding, with some steps changed; states are kept.

    Args:
        way: a loaded way.
        texts: what was compared.
    """

    def __init__(self, way: LocalWay, texts: Sequence[InstructedText]) -> None:
        self.way = way
        self.texts = list(texts)
        self.rows = way.rows(texts, None)
        self._states: dict[tuple[tuple[int, ...], Attention, bool], tuple[Tensor, Tensor]] = {}

    def vectors(self, chosen: Sequence[int], changes: Sequence[Change] = ()) -> Tensor:
        """[chosen, D], not normalised."""
        attention, pooling = self.way.attention, (self.way.pooling_mode, False)
        rows: Sequence[Row] = self.rows
        for change in changes:
            rows, attention = change.rows or rows, change.attention or attention
            pooling = change.pooling or pooling
        adapter_off = any(change.without_adapter for change in changes)
        before_norm = any(change.without_final_norm for change in changes)
        mode, everywhere = pooling
        made = []
        for i in chosen:
            states_TD = self._states_of(rows[i].ids, attention, adapter_off)[before_norm]
            mask_T = torch.tensor(rows[i].pooled) | everywhere
            made.append(pool(states_TD.unsqueeze(0), mask_T.unsqueeze(0), mode)[0])
        return torch.stack(made)

    @torch.no_grad()
    def _states_of(self, ids: Sequence[int], attention: Attention, adapter_off: bool) -> tuple[Tensor, Tensor]:
        """States [T, D] after and before the final norm, float32 on the CPU."""
        key = (tuple(ids), attention, adapter_off)
        if key not in self._states:
            model = self.way.model
            seen: list[Tensor] = []
            row = torch.tensor([list(ids)], device=next(model.parameters()).device)
            hook = inner_decoder(model).norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            with _adapter_off(model) if adapter_off else nullcontext():
                after = hidden_states(model, attention, torch.ones_like(row), input_ids=row)
            hook.remove()
            self._states[key] = after[0].float().cpu(), seen[0][0].float().cpu()
        return self._states[key]


def find_causes(
    reference: tuple[LocalWay | None, Answer], other: tuple[LocalWay | None, Parity], texts: dict[str, InstructedText]
) -> list[Finding]:
    """Say why a way disagrees with the reference.

    Args:
        reference: the loaded way (None = a server) and its answer.
        other: the same of a way that does not pass.
        texts: what both were asked, by name.

    Returns:
        What was proven; one finding of `weights or something else` if nothing was.
    """
    (way, answer), (other_way, parity) = reference, other
    if answer.vectors.shape != parity.answer.vectors.shape:
        sizes = f"{answer.vectors.shape[1]} and {parity.answer.vectors.shape[1]}"
        return [Finding(UNKNOWN, f"the vectors have {sizes} numbers, so this is another model")]
    if (parity.cosines >= parity.threshold).all():
        shortest, longest = parity.lengths
        words = f"the same directions, but lengths from {shortest:.4g} to {longest:.4g}: nothing makes unit vectors"
        return [Finding("norm", words)]
    names = [list(texts)[i] for i in parity.compared]
    mine = _Side(way, answer, parity.compared, texts)
    theirs = _Side(other_way, parity.answer, parity.compared, texts)
    differences = _token_differences(mine, theirs, names)
    is_half = answer.is_half or parity.answer.is_half
    return (
        _dead_adapter(theirs, mine)
        # First where rounding is at work, as a difference that small may look like anything.
        or (_rounding(mine, theirs, parity, is_half) if is_half and not differences else [])
        or _batching(theirs, mine, parity)
        or _changed(mine, theirs, parity, differences)
        or _changed(theirs, mine, parity, differences)
        or _rounding(mine, theirs, parity, is_half)
        or [_unexplained(mine, theirs, differences)]
    )


class _Side:
    """One of the two ways, and what it answered to the texts that both take."""

    def __init__(
        self, way: LocalWay | None, answer: Answer, compared: Sequence[int], texts: dict[str, InstructedText]
    ) -> None:
        self.way = way
        self.name = answer.name
        self.ids = [answer.ids[i] for i in compared]
        self.sent = None if answer.sent is None else [answer.sent[i] for i in compared]
        self.vectors = answer.vectors[compared]
        asked = list(texts.values())
        # Other models than decoders, which sentence-transformers loads too, have other steps.
        opens = way is not None and hasattr(inner_decoder(way.model), "norm")
        self.recomputed = Recomputation(way, [asked[i] for i in compared]) if way is not None and opens else None


def _dead_adapter(*sides: _Side) -> list[Finding]:
    """An adapter that changes nothing when it is switched off."""
    off = Change("adapter", "", without_adapter=True)
    for side in sides:
        if side.way is None or side.recomputed is None or not has_adapter(side.way.model):
            continue
        everything = range(len(side.ids))
        if torch.equal(side.recomputed.vectors(everything), side.recomputed.vectors(everything, [off])):
            return [Finding("adapter", f"dead: switching off the adapter of {side.name} changes no vector")]
    return []


def _batching(theirs: _Side, mine: _Side, parity: Parity) -> list[Finding]:
    """A way that agrees as soon as its texts are computed one at a time."""
    for side, target in ((theirs, mine), (mine, theirs)):
        if side.recomputed is None:
            continue
        least = _least_cosine(side.recomputed.vectors(range(len(side.ids))), target.vectors)
        if least >= parity.threshold:
            words = f"one text at a time, {side.name} gives the vectors of {target.name} (least cosine {least:.6f})"
            return [Finding("batching", f"{words}; in a batch it does not")]
    return []


def _changed(base: _Side, target: _Side, parity: Parity, differences: Sequence[TokenDifference]) -> list[Finding]:
    """The one or two changes under which `base` gives the vectors of `target`."""
    if base.recomputed is None:
        return []
    order = parity.cosines.argsort().tolist()
    tried = order[:NUM_TRIED]
    changes = list(_changes(base, target))
    for size in (1, 2):
        found = []
        for combination in combinations(changes, size):
            if len({change.step for change in combination}) < size:
                continue
            least = _least_cosine(base.recomputed.vectors(tried, combination), target.vectors[tried])
            if least >= parity.threshold:
                found.append((least, combination))
        for _, combination in sorted(found, key=lambda pair: -pair[0]):
            least = _least_cosine(base.recomputed.vectors(order, combination), target.vectors[order])
            if least >= parity.threshold:
                return _findings(base, target, combination, least, differences)
    return []


def _findings(
    base: _Side,
    target: _Side,
    combination: Sequence[Change],
    least: float,
    differences: Sequence[TokenDifference],
) -> list[Finding]:
    """What is said of changes that were proven."""
    named: list[tuple[str, str]] = []
    for change in combination:
        named += [(change.cause, "")] if change.cause else [(d.cause, f"{d.words}; ") for d in differences]
    words = " and ".join(change.words for change in combination)
    proof = f"with {words}, {base.name} gives the vectors of {target.name} (least cosine {least:.6f})"
    return [Finding(cause, difference + proof) for cause, difference in dict.fromkeys(named)]


def _rounding(mine: _Side, theirs: _Side, parity: Parity, is_half: bool) -> list[Finding]:
    """Weights that were rounded; with half precision at work, also a difference no larger than rounding makes."""
    for base, target in ((mine, theirs), (theirs, mine)):
        if base.way is None or base.recomputed is None:
            continue
        everything, own = range(len(base.ids)), next(base.way.model.parameters()).dtype
        if own == torch.float32:
            rounded = _recomputed_in(base, torch.bfloat16, torch.float32).vectors(everything)
            least = _least_cosine(rounded, target.vectors)
            if least >= parity.threshold:
                words = f"with its weights rounded to bfloat16, {base.name} gives the vectors of {target.name}"
                return [Finding("precision", f"{words} (least cosine {least:.6f})")]
        if is_half:
            other = _recomputed_in(base, torch.bfloat16 if own == torch.float32 else torch.float32).vectors(everything)
            moved = _least_cosine(other, base.recomputed.vectors(everything))
            if 1 - parity.cosines.min() <= 2 * (1 - moved):  # twice, as both may be rounded
                words = f"between float32 and bfloat16 {base.name} itself moves as much (least cosine {moved:.6f})"
                return [Finding("precision", words)]
    return []


def _recomputed_in(side: _Side, *dtypes: torch.dtype) -> Recomputation:
    """A side's way with its weights cast to one dtype after the other."""
    assert side.way is not None
    assert side.recomputed is not None
    cast = replace(side.way, model=copy.deepcopy(side.way.model))
    for parameter in cast.model.parameters():  # not the buffers: positions' frequencies stay in float32
        for dtype in dtypes:
            parameter.data = parameter.to(dtype)
    return Recomputation(cast, side.recomputed.texts)


def _unexplained(mine: _Side, theirs: _Side, differences: Sequence[TokenDifference]) -> Finding:
    tried = mine.recomputed is not None or theirs.recomputed is not None
    words = "no change of one or two steps explains it" if tried else "neither side's steps could be taken apart here"
    return Finding(UNKNOWN, "; ".join([words, *(difference.words for difference in differences)]))


def _changes(base: _Side, target: _Side) -> Iterator[Change]:
    """All single changes of a way that its other side might come from."""
    assert base.way is not None
    assert base.recomputed is not None
    way, rows = base.way, base.recomputed.rows
    differ = any(ids not in (None, row.ids) for row, ids in zip(rows, target.ids, strict=True))
    if differ:
        shown = [row if ids is None else with_ids(row, ids) for row, ids in zip(rows, target.ids, strict=True)]
        yield Change("", "those token ids", rows=tuple(shown))
    if target.recomputed is not None:
        words = f"the tokens, and those of them pooled over, of {target.name}"
        yield Change("" if differ else "pooling", words, rows=tuple(target.recomputed.rows))
    if None in target.ids:
        for cause, words, guess in guessed_rows(way, base.recomputed.texts, target.sent, target.ids):
            yield Change(cause, words, rows=tuple(guess))
    attention: Attention = "bidirectional" if way.attention == "causal" else "causal"
    yield Change("attention", f"{attention} attention", attention=attention)
    for everywhere in (False, True):
        for mode in get_args(PoolingMode):
            where = "every token" if everywhere else "the same tokens"
            if (mode, everywhere) != (way.pooling_mode, False):
                yield Change("pooling", f"{mode} pooling over {where}", pooling=(mode, everywhere))
    if has_adapter(way.model):
        yield Change("adapter", "its adapter switched off", without_adapter=True)
    yield Change("norm", "the states from before the final norm", without_final_norm=True)


def _token_differences(mine: _Side, theirs: _Side, names: Sequence[str]) -> list[TokenDifference]:
    """How the two sides' token ids differ, as far as both show them."""
    loaded = [side for side in (mine, theirs) if side.way is not None]
    if not loaded or loaded[0].way is None:
        return []
    cut = [
        any(
            side.way and ids is not None and len(ids) >= side.way.max_length
            for side, ids in zip(loaded, row, strict=False)
        )
        for row in zip(*(side.ids for side in loaded), strict=True)
    ]
    return token_differences(mine.ids, theirs.ids, names, cut, loaded[0].way.tokenizer)


def has_adapter(model: Any) -> bool:
    """Whether a model carries an adapter that is not merged, put on by peft or by transformers."""
    return isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def _least_cosine(first_ND: Tensor, second_ND: Tensor) -> float:
    return float(F.cosine_similarity(first_ND.double(), second_ND.double(), dim=-1).min())
