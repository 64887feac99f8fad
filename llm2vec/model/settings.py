"""How texts become vectors: everything that decides a text's embedding beside the weights, and its renderer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from llm2vec.files import read_object
from llm2vec.text.probe_texts import probe_ids
from llm2vec.text.templates import infer_template, segments_of
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import POOLING_ALIASES, Attention, InstructionMask, PoolingMode, UserError

logger = logging.getLogger(__name__)

SETTINGS_FILE = "llm2vec_config.json"
#: All that upstream writes there. A folder of ours says its template and attention too.
UPSTREAMS_KEYS = {"pooling_mode", "max_length", "doc_max_length", "skip_instruction"}
#: What the folders of upstream LLM2Vec do not say, and do.
UPSTREAMS_RULE: dict[str, Any] = {"instruction_mask": "counted"}


@dataclass(frozen=True)
class EncoderSettings:
    """How texts become vectors. The defaults are upstream LLM2Vec's, except `doc_max_length`. The paper's, on a Llama 3
    model, are `EncoderSettings("last", 512, template="llama3", attention="causal")`.
    """

    pooling_mode: PoolingMode = "mean"  #: `last`, `mean`, `weighted_mean` or `first`
    max_length: int = 512  #: most tokens of a row, template included
    doc_max_length: int | None = None  #: most tokens of the text alone; None = as many as fit (upstream: 400)
    skip_instruction: bool = True  #: whether the instruction is left out of the pooled positions
    template: str | None = None  #: key of `templates.TEMPLATES`; None = inferred from the tokenizer
    instruction_join: str = " "  #: what stands between instruction and text, in the templates that leave it open
    attention: Attention = "bidirectional"  #: `causal` or `bidirectional`
    normalize: bool = False  #: whether `encode` returns unit vectors
    #: for an adapter checkpoint, the adapters merged into the base below it, innermost first
    parent_adapters: tuple[str, ...] | None = None
    #: how the instruction is left out: `offsets`, or `counted` for a model of upstream LLM2Vec (`RowTokenizer`)
    instruction_mask: InstructionMask = "offsets"

    def __post_init__(self) -> None:
        mode = POOLING_ALIASES.get(self.pooling_mode) if isinstance(self.pooling_mode, str) else None
        if mode is None:
            raise UserError(f"pooling_mode is {self.pooling_mode!r}; allowed: {', '.join(POOLING_ALIASES)}.")
        object.__setattr__(self, "pooling_mode", mode)
        if self.template is not None:
            segments_of(self.template, mode)  # refuses an unknown one, and `last` where no closing token is written
        for name, words in (("attention", get_args(Attention)), ("instruction_mask", get_args(InstructionMask))):
            if getattr(self, name) not in words:
                raise UserError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(words)}.")
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

    def written(self) -> dict[str, Any]:
        """As a file or a result's name holds them; `instruction_mask` only where it is upstream's."""
        fields = dataclasses.asdict(self)
        if self.instruction_mask == "offsets":
            del fields["instruction_mask"]  # so that folders and results of before the key stay what they are
        return fields


def read_settings(file: Path) -> dict[str, Any]:
    """What an `llm2vec_config.json` says: the settings that are written there, of values that they may have.

    One that upstream LLM2Vec wrote, which holds none but its keys, has upstream's `instruction_mask`. A `UserError`
    where it is no JSON object of settings.
    """
    written = read_object(file)
    known = [field.name for field in dataclasses.fields(EncoderSettings)]
    unknown = sorted(set(written) - set(known))
    if unknown:
        raise UserError(f"{file}: unknown key {unknown[0]!r}; known: {', '.join(known)}.")
    try:
        EncoderSettings(**written)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return {**written, **UPSTREAMS_RULE} if written and written.keys() <= UPSTREAMS_KEYS else written


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
        instruction_mask=settings.instruction_mask,
        reconstruct_instruction=reconstruct_instruction,
    )


def with_template(settings: EncoderSettings, tokenizer: PreTrainedTokenizerBase) -> EncoderSettings:
    """Settings with their template named; an inferred one is said."""
    if settings.template is not None:
        return settings
    template = infer_template(tokenizer)
    logger.warning("template: none is set; %r is inferred from the tokenizer's special tokens.", template)
    return dataclasses.replace(settings, template=template)


def check_rendering(path: str, recorded: Sequence[Sequence[int]] | None, tokenizer: RowTokenizer) -> None:
    """Refuse, by a `UserError`, a checkpoint whose texts would now become other tokens than in training: the probe
    texts' ids, where its `run.json` has them `recorded`."""
    if recorded is not None and recorded != probe_ids(tokenizer):
        raise UserError(
            f"{path}: the tokenizer renders the checkpoint's probe texts to other token ids than in training; its "
            "files were changed, or another version of the tokenizers library reads them differently."
        )


def set_attention(config: Any, attention: Attention) -> None:
    """Write the attention into a model's config, in the two words that engines know; a plain call then obeys it.

    Gemma 3 and 4 have a meaning of their own for `use_bidirectional_attention`, and obey `is_causal`.
    """
    for name in ("is_causal", "use_bidirectional_attention"):
        if attention == "causal" and getattr(config, name, None) is not None:
            setattr(config, name, name == "is_causal")
    if attention == "bidirectional":
        config.is_causal = False
        if not config.model_type.startswith(("gemma3", "gemma4")):
            config.use_bidirectional_attention = True
