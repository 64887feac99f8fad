"""One model of several checkpoints: the weighted mean of their weights, or a point between two on the sphere.

Averages along a run (model soups, arXiv 2203.05482) and between runs from one base. Run by `llm2vec merge`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm2vec.choice import ModelChoice
from llm2vec.files import alone_in
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.text.probe_texts import probe_ids
from llm2vec.types import MergeKind, UserError

#: Below this sine of the angle between two weights, slerp is the straight line.
_SMALLEST_SINE = 1e-6


def write_merged(models: Sequence[ModelChoice], how: MergeKind, shares: Sequence[float] | None, out: Path) -> None:
    """Write a full checkpoint in float32 to a folder that is empty or not there. Two models are in memory at a time.

    The `models` are two or more (`slerp`: two) of one family and size, whose texts become vectors in the same way;
    `shares` are theirs, in any scale, or equal; else a `UserError`. Adapters are merged into their bases first, so
    that the mean is exactly that of what they do.
    """
    given = [1.0] * len(models) if shares is None else list(shares)
    if len(models) < 2 or (how == "slerp" and len(models) > 2):
        raise UserError(
            f"{how} is of {'two' if how == 'slerp' else 'two or more'} models, and there are {len(models)}."
        )
    if len(given) != len(models) or min(given) < 0 or not 0 < sum(given) < float("inf"):
        raise UserError(f"--weights: {len(models)} numbers are needed, none below 0 and not all 0.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds files; name a folder that is not there, or is empty.")
    parts = [share / sum(given) for share in given]
    merged = _loaded(models[0])
    with torch.no_grad():
        for weight in merged.model.parameters() if how == "mean" else ():
            weight.mul_(parts[0])
        for choice, part in zip(models[1:], parts[1:], strict=True):
            other = dict(_checked(_loaded(choice), choice, merged, models[0]).model.named_parameters())
            for name, weight in merged.model.named_parameters():
                if how == "mean":
                    weight.add_(other[name], alpha=part)
                else:
                    weight.copy_(between(weight, other[name], part))
            del other  # before the next is loaded
    run = {
        "probe_ids": probe_ids(merged.row_tokenizer),
        "merged": {"how": how, "models": {choice.place: part for choice, part in zip(models, parts, strict=True)}},
    }
    with alone_in(out, "merge"):
        save_checkpoint(out, merged.model, merged.tokenizer, merged.settings, run)


def between(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two tensors as vectors (Shoemake 1985): the direction turns from `one` (`share` 0) to
    `other` (1) at an even pace. Where they point the same way, or against each other, it is the straight line."""
    a, b = one.double().flatten(), other.double().flatten()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    if sine < _SMALLEST_SINE:
        return torch.lerp(one, other, share)
    turned = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / sine
    return turned.view_as(one).to(one.dtype)


def _loaded(choice: ModelChoice) -> LLM2Vec:
    return LLM2Vec.from_pretrained(choice.opened(), merge_peft=True)


def _checked(other: LLM2Vec, choice: ModelChoice, first: LLM2Vec, named: ModelChoice) -> LLM2Vec:
    """A model that goes with the first."""
    for field in dataclasses.fields(first.settings):
        one, two = (getattr(model.settings, field.name) for model in (first, other))
        if one != two:
            raise UserError(f"{field.name} is {one!r} in {named.place} and {two!r} in {choice.place}.")
    shapes, others = ({n: tuple(w.shape) for n, w in m.model.named_parameters()} for m in (first, other))
    if shapes != others:
        name = min(n for n in {*shapes, *others} if shapes.get(n) != others.get(n))
        raise UserError(f"{choice.place} is not of the shape of {named.place}: {name} differs, or is in one alone.")
    return other
