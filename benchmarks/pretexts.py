"""What each pretext of Stage I costs beside Anchor: tokens run, operations, time and memory of a step.

    python -m benchmarks.benchmark --only pretexts --rounds 3

Named as the recipes of `train_configs/comparison/lab`, whose keys they have. A step is forward and backward over the
same texts; the optimiser's, which depends on what is trained alone, is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device

from benchmarks import variants
from benchmarks.inputs import HEADER, LORA_ALPHA, LORA_R, Case, batch_indices, random_model, random_rows
from benchmarks.measure import Line, Runnable, Variant, ratios
from benchmarks.sections import Options, Sizes, measured, peaks
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import LORA_MODULES, attach_lora
from llm2vec.model.settings import EncoderSettings
from llm2vec.planning.work import useful_flops
from llm2vec.text.batches import cut_row, pack_rows
from llm2vec.text.templates import template_named
from llm2vec.text.tokenization import Row
from llm2vec.types import POOLING_ALIASES

LAB = Path(__file__).parents[1] / "train_configs/comparison/lab"
ANCHOR = "target_counterpart"
#: Recipes of the lab that differ in what a step runs, or in what is trained.
RECIPES = (
    ANCHOR, "target_self", "target_both", "target_next", "loss_self_ce", "loss_self_bag", "loss_next_ce",
    "loss_next_kl", "loss_counterpart_kl", "decoder_self_frozen", "decoder_self_lora", "decoder_self_tokens",
)  # fmt: skip


class PretextCase(NamedTuple):
    """A recipe's keys, and what they are measured over."""

    case: Case
    keys: dict[str, Any]


def keys_of(recipe: str) -> dict[str, Any]:
    """What a recipe of the lab says of its Stage I, without its number of steps."""
    keys: dict[str, Any] = json.loads((LAB / recipe / "1_stage_I.json").read_text(encoding="utf-8"))
    return {name: value for name, value in keys.items() if name != "max_steps"}


def pretext_step(of: PretextCase) -> Runnable:
    """A recipe's step over a random Llama."""
    case, keys = of.case, dict(of.keys)
    template, trainable = keys.pop("template", "plain"), keys.pop("trainable", "full")
    settings = EncoderSettings(POOLING_ALIASES[keys.pop("pooling_mode", "last")], attention="causal", template=template)
    model = random_model(case.shape, with_head=True, device=case.device, dtype=case.dtype)
    added = len(template_named(template).added_tokens)
    block = list(range(case.shape.vocabulary - added, case.shape.vocabulary))  # ids that stand for the added tokens
    if trainable != "full":
        modules = LORA_MODULES if trainable == "lora" else ()
        model.requires_grad_(False)
        model.model = attach_lora(
            model.model, r=LORA_R, alpha=LORA_ALPHA, dropout=0.0, modules=modules, new_tokens=block
        )
    objective = BidirectionalReconstruction(model, settings, bos_id=HEADER[0], **keys).train()
    sides = BidirectionalReconstruction.sides_of(template, {"target": keys.get("target", "counterpart")})
    batches: list[Any] = [
        send_to_device({side: pack_rows(list(_rows(case, side, i, block))) for side in sides}, case.device)
        for i in batch_indices(case)
    ]
    passes = [objective.passes(batch) for batch in batches[:-1]]
    return Runnable(
        variants.step_over(case, objective, batches),
        case.device,
        flops=[useful_flops(model, of_batch) for of_batch in passes],
        tokens=[sum(p.tokens for p in of_batch) for of_batch in passes],
        model=objective,
        own_clock=case.device == "cpu" and torch.get_num_threads() == 1,
    )


def _rows(case: Case, side: str, index: int, block: list[int]) -> Iterator[Row]:
    """A side's rows, with a block of added tokens in place of the closing token where there is one."""
    name, _, part = side.partition(":")
    for number, row in enumerate(random_rows(case, name, index)):
        if block:
            pooled = [False] * (len(row.ids) - 1) + [True] * len(block)
            row = Row([*row.ids[:-1], *block], pooled, [*row.target[:-1], *[False] * len(block)])
        yield row if not part else cut_row(row, (index + 1, number))[part == "rest"]


def pretexts(options: Options, plan: Sizes) -> list[Line]:
    """Every recipe against Anchor: time of a step, and beside it what it runs and holds."""
    case = Case(plan.shape, plan.pretext_rows, "float32", options.device, options.rounds)
    named = {recipe: Variant(pretext_step, PretextCase(case, keys_of(recipe))) for recipe in RECIPES}
    readings, lost = measured("pretexts of Stage I", named, options.rounds)
    memory, no_memory = peaks(named)
    lines = []
    for recipe in RECIPES:
        tokens, flops = (
            sum(getattr(r, figure) for r in readings[recipe]) / sum(getattr(r, figure) for r in readings[ANCHOR])
            for figure in ("tokens", "flops")
        )
        held = ratios(memory, recipe, ANCHOR, "memory")
        note = f"tokens run {tokens:.2f}, operations {flops:.2f}" + "".join(f", memory {one:.2f}" for one in held)
        times = ratios(readings, recipe, ANCHOR, "seconds")
        lines.append(Line(f"Stage I, `{recipe}`: time of a step, Anchor's = 1", times, note=lost or no_memory or note))
    return lines
