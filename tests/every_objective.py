"""One of each objective over a tiny model, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import reference
from helpers import family_tokenizer, tiny_model

from llm2vec.data.blocks import Block
from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import LORA_MODULES, attach_lora
from llm2vec.model.packing import checkpoint_contexts
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.language_modelling import ContrastiveLanguageModelling, LanguageModelling
from llm2vec.objectives.mntp import MaskedNextTokenPrediction, mask_tokens
from llm2vec.text.templates import add_template_tokens
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.types import Batch, Objective

#: Keys of Stage I.
STAGE_ONE: dict[str, dict[str, Any]] = {
    "alpha 0": {"alpha": 0.0},
    "alpha 0.2": {},
    "self": {"target": "self"},
    "llara": {"target": "both", "bottleneck": "states", "target_loss": "bag", "alpha": 0.5, "lm_weight": 1.0},
    "states": {"bottleneck": "states"},
    "frozen": {"bottleneck": "states", "decoder": "frozen"},
    "kl": {"bottleneck": "states", "decoder": "frozen", "target_loss": "kl"},
    "kl below an adapter": {"bottleneck": "states", "decoder": "frozen", "target_loss": "kl", "trainable": "lora"},
    "next": {"target": "next", "bottleneck": "states", "alpha": 0.0},
    "next kl": {"target": "next", "bottleneck": "states", "decoder": "frozen", "target_loss": "kl", "alpha": 0.0},
    "bag": {"target": "self", "bottleneck": "states", "target_loss": "bag"},
    "both": {"target": "both"},
    "tokens": {
        "target": "self", "bottleneck": "states", "decoder": "frozen", "projection": "linear", "trainable": "tokens",
    },
    "with language modelling": {"lm_weight": 1.0},
}  # fmt: skip
KINDS = (*STAGE_ONE, "contrastive", "with dropout", "grit", "lm", "mntp")


def make(kind: str, *, recomputes: bool = False, **shape: Any) -> tuple[Objective, Callable[[int], Batch]]:
    """An objective in training mode, and a batch of so many rows; rows of a side begin with the same tokens."""
    tokenizer = family_tokenizer("llama")
    keys = dict(STAGE_ONE.get(kind, {}))
    trainable = keys.pop("trainable", "full")
    template = "llara" if kind == "llara" else "llama3+memory_2" if "bottleneck" in keys else "llama3"
    new = add_template_tokens(tokenizer, template)
    model: Any = tiny_model("llama", True, tokenizer=tokenizer if new else None, **shape).train()
    if recomputes:
        contexts = partial(checkpoint_contexts, model.base_model)
        enable_checkpointing(model, {"use_reentrant": False, "context_fn": contexts})
    pooling: Any = "mean" if kind == "llara" else "last"
    settings = EncoderSettings(pooling_mode=pooling, attention="causal", template=template)
    renderer = row_tokenizer(tokenizer, settings)
    rows = reference.under_one_instruction(reference.examples(24, 1))

    def of_sides(*sides: Any) -> Callable[[int], Batch]:
        return lambda number: CollateSides(renderer, sides)(rows[:number])

    if kind in STAGE_ONE:
        if trainable != "full":
            modules = LORA_MODULES if trainable == "lora" else ()
            model.requires_grad_(False)
            model.model = attach_lora(model.model, r=2, alpha=4, dropout=0.0, modules=modules, new_tokens=new)
        sides = BidirectionalReconstruction.sides_of(template, {"target": keys.get("target", "counterpart")})
        bos_id = tokenizer.bos_token_id
        return BidirectionalReconstruction(model, settings, **keys, bos_id=bos_id).train(), of_sides(*sides)
    if kind == "mntp":
        blocks = [Block(list(range(20 + i, 40 + i)), 0, i) for i in range(len(rows))]
        return MaskedNextTokenPrediction(model), lambda number: mask_tokens(tokenizer)(blocks[:number])
    if kind == "lm":
        return LanguageModelling(model), of_sides("text")
    decoder = model.base_model
    if kind == "with dropout":
        decoder = attach_lora(decoder.requires_grad_(False), r=2, alpha=4, dropout=0.1)
    contrastive = ContrastiveLearning(decoder, settings).train()
    if kind == "grit":
        objective = ContrastiveLanguageModelling(contrastive, LanguageModelling(model))
        return objective, of_sides("query", "positive", "negative", "text")
    return contrastive, of_sides("query", "positive", "negative")
