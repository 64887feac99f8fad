"""What users of upstream's `LLM2Vec` meet here: attributes to write, its decoder's methods, and what is gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, device
from transformers import AutoModel

from llm2vec.model.settings import row_tokenizer
from llm2vec.types import UserError

PAGE = "docs/migration.md has a table of all"
#: What upstream's class has and ours has not: what takes its place.
GONE = {
    **dict.fromkeys(
        ("prepare_for_tokenization", "_convert_to_str", "_skip_instruction"),
        "a template writes what stands around a text",
    ),
    **dict.fromkeys(("_encode", "_text_length"), "`encode` goes by `tokenize` and `forward`"),
    "get_pooling": "llm2vec.model.pooling.pool(states, pool_mask, mode) pools",
}
#: Upstream's methods that are its decoder's.
OF_DECODER = ("gradient_checkpointing_enable", "resize_token_embeddings")


def setting(name: str) -> Any:
    """A property over a setting of an encoder; once written, texts are rendered and pooled by the new one."""

    def write(encoder: Any, value: Any) -> None:
        encoder.settings = dataclasses.replace(encoder.settings, **{name: value})
        encoder.row_tokenizer = row_tokenizer(encoder.tokenizer, encoder.settings)

    return property(lambda encoder: getattr(encoder.settings, name), write)


def refuse_overrides(encoder: type) -> None:
    """Refuse, by a `UserError`, a subclass that overrides a step of upstream's which nothing here calls."""
    for name in GONE.keys() & set(dir(encoder)):
        raise UserError(f"{encoder.__name__} overrides {name}, which nothing here calls: {GONE[name]}; {PAGE}.")


def model_class(config_class_name: str, enable_bidirectional: bool) -> Any:
    """Upstream's class for a model's config (`LlamaConfig`); a ValueError, as upstream's, where a family has none."""
    from llm2vec.models import bidirectional_class  # four families' code

    return bidirectional_class(config_class_name) if enable_bidirectional else AutoModel


def batch_to_device(batch: Mapping[str, Any], target_device: device | str) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: v.to(target_device) if isinstance(v, Tensor) else v for name, v in batch.items()}
