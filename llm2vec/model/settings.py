"""How texts become vectors: everything that decides a text's embedding beside the weights, and its renderer."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import get_args

from transformers import PreTrainedTokenizerBase

from llm2vec.text.templates import infer_template, segments_of
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import POOLING_ALIASES, Attention, PoolingMode, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderSettings:
    """How texts become vectors. The defaults are upstream LLM2Vec's, except `doc_max_length`.

    Attributes:
        pooling_mode: `last`, `mean`, `weighted_mean` or `first`.
        max_length: most tokens of a row, template included.
        doc_max_length: most tokens of the text alone; None = as many as fit (upstream: 400).
        skip_instruction: whether the instruction is left out of the pooled positions.
        template: key of `templates.TEMPLATES`; None = inferred from the tokenizer.
        instruction_join: what stands between instruction and text, in the templates that leave it open.
        attention: `causal` or `bidirectional`.
        normalize: whether `encode` returns unit vectors.
        parent_adapters: for an adapter checkpoint, the adapters merged into the base below it, innermost first.
    """

    pooling_mode: PoolingMode = "mean"
    max_length: int = 512
    doc_max_length: int | None = None
    skip_instruction: bool = True
    template: str | None = None
    instruction_join: str = " "
    attention: Attention = "bidirectional"
    normalize: bool = False
    parent_adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        mode = POOLING_ALIASES.get(self.pooling_mode) if isinstance(self.pooling_mode, str) else None
        if mode is None:
            raise UserError(f"pooling_mode is {self.pooling_mode!r}; allowed: {', '.join(POOLING_ALIASES)}.")
        object.__setattr__(self, "pooling_mode", mode)
        if self.template is not None:
            segments_of(self.template, mode)  # refuses an unknown one, and `last` where no closing token is written
        if self.attention not in get_args(Attention):
            raise UserError(f"attention is {self.attention!r}; allowed: {', '.join(get_args(Attention))}.")
        for name in ("max_length", "doc_max_length"):
            value = getattr(self, name)
            open_ended = value is None and name == "doc_max_length"
            if not open_ended and (type(value) is not int or value < 1):
                raise UserError(f"{name} is {value!r}; a whole number above 0 is needed.")
        for name in ("skip_instruction", "normalize"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name} is {getattr(self, name)!r}; true or false is needed.")
        if not isinstance(self.instruction_join, str):
            raise UserError(f"instruction_join is {self.instruction_join!r}; a string is needed.")
        if self.parent_adapters is not None:
            paths = self.parent_adapters
            if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
                raise UserError(f"parent_adapters is {paths!r}; a list of paths is needed.")
            object.__setattr__(self, "parent_adapters", tuple(self.parent_adapters))


def row_tokenizer(
    tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings, *, reconstruct_instruction: bool = False
) -> RowTokenizer:
    """The one renderer of training, evaluation and export, from an encoder's settings."""
    return RowTokenizer(
        tokenizer,
        settings.template or infer_template(tokenizer),
        settings.pooling_mode,
        settings.max_length,
        text_max_length=settings.doc_max_length,
        instruction_join=settings.instruction_join,
        skip_instruction=settings.skip_instruction,
        reconstruct_instruction=reconstruct_instruction,
    )


def with_template(settings: EncoderSettings, tokenizer: PreTrainedTokenizerBase) -> EncoderSettings:
    """Settings with their template named; an inferred one is said."""
    if settings.template is not None:
        return settings
    template = infer_template(tokenizer)
    logger.warning("template: none is set; %r is inferred from the tokenizer's special tokens.", template)
    return dataclasses.replace(settings, template=template)
