"""Templates: how an instruction and a text become one row of tokens, as ordered segments.

A template is data. It is chosen by the `template` key (config, checkpoint, call), never by a model's name; where no
key is given, `infer_template` reads the tokenizer's special tokens. To add one, add a row to `TEMPLATES`.

Every template ends in a closing token whose state is the embedding under `last` pooling. Turn templates close with
their end-of-turn token always; `mistral` and `plain` have none of their own, so they append the tokenizer's EOS, and
only under `last` pooling, where something reads it (upstream LLM2Vec does the same).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from llm2vec.types import PoolingMode, UserError

SegmentKind = Literal["bos", "eos", "special", "marker", "literal", "instruction", "text"]


class Segment(NamedTuple):
    """One piece of a template.

    Attributes:
        kind: `bos` / `eos`: that token of the tokenizer (a missing BOS is left out); `special`: the special token
            written in `value`; `marker`: a control token where the tokenizer has `value` as one, else that text
            with a space towards the content; `literal`: the text in `value`; `instruction`, `text`: the row's own.
        value: the token or text of a `special`, `marker` or `literal`.
        pooled: whether mean pooling without the instruction counts its positions.
        truncate: whether it gives way when a row is too long; all else is kept.
        only_last_pooling: written under `last` pooling only.
    """

    kind: SegmentKind
    value: str = ""
    pooled: bool = False
    truncate: bool = False
    only_last_pooling: bool = False


_INSTRUCTION = Segment("instruction")
_TEXT = Segment("text", pooled=True, truncate=True)

TEMPLATES: dict[str, tuple[Segment, ...]] = {
    "llama3": (
        Segment("bos"),
        Segment("special", "<|start_header_id|>"),
        Segment("literal", "user"),
        Segment("special", "<|end_header_id|>"),
        Segment("literal", "\n\n"),
        _INSTRUCTION,
        _TEXT,
        Segment("special", "<|eot_id|>", pooled=True),
    ),
    "qwen2": (
        Segment("special", "<|im_start|>"),
        Segment("literal", "user\n"),
        _INSTRUCTION,
        _TEXT,
        Segment("special", "<|im_end|>", pooled=True),
    ),
    "gemma": (
        Segment("bos"),
        Segment("special", "<start_of_turn>"),
        Segment("literal", "user\n"),
        _INSTRUCTION,
        _TEXT,
        Segment("special", "<end_of_turn>", pooled=True),
    ),
    "mistral": (
        Segment("bos"),
        Segment("marker", "[INST]"),
        _INSTRUCTION,
        _TEXT,
        Segment("marker", "[/INST]", pooled=True),
        Segment("eos", pooled=True, only_last_pooling=True),
    ),
    "plain": (
        Segment("bos"),
        _INSTRUCTION,
        _TEXT,
        Segment("eos", pooled=True, only_last_pooling=True),
    ),
}


def segments_of(template: str, pooling_mode: PoolingMode) -> tuple[Segment, ...]:
    """The segments that `template` writes under `pooling_mode`.

    Raises:
        UserError: no such template.
    """
    if template not in TEMPLATES:
        raise UserError(f"template is {template!r}; allowed: {', '.join(TEMPLATES)}.")
    return tuple(s for s in TEMPLATES[template] if pooling_mode == "last" or not s.only_last_pooling)


def infer_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of the family that the tokenizer's special tokens belong to.

    A tokenizer with the turn tokens of exactly one family gets that family's template; one without any turn token
    and without a chat format is a base model's and gets `plain`.

    Raises:
        UserError: turn tokens of several families, or a chat format that none of our templates writes.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    chat_format = str(tokenizer.chat_template or "")
    turns = {
        "llama3": "<|eot_id|>" in special and "<|start_header_id|>" in special,
        "qwen2": "<|im_start|>" in special and "<|im_end|>" in special,
        "gemma": "<start_of_turn>" in special and "<end_of_turn>" in special,
        # Mistral before v0.3 writes [INST] as text, so only its chat format tells it from a base model.
        "mistral": "[INST]" in special or "[INST]" in chat_format,
    }
    found = [name for name, present in turns.items() if present]
    if len(found) == 1:
        return found[0]
    if not found and not chat_format:
        return "plain"
    reason = f"turn tokens of {' and '.join(found)}" if found else "a chat format of an unknown family"
    raise UserError(
        f"template: the tokenizer has {reason}, so the template cannot be inferred; "
        f"set `template` to one of {', '.join(TEMPLATES)}."
    )
