"""Templates: how an instruction and a text become one row of tokens, as ordered segments.

A template is data. It is chosen by the `template` key (config, checkpoint, call), never by a model's name; where no
key is given, `infer_template` reads the tokenizer's special tokens. To add one, add a row to `TEMPLATES`. Any row goes
with a memory behind it: `llama3+memory_8` writes eight added tokens there, and they alone are pooled; `memory_8` is
`plain+memory_8`.

A template has a form for queries and one for documents; turn templates write both alike. Where a form fixes what stands
between instruction and text, it writes that as a literal and `instruction_join` has no say; where it leaves it open, it
has a `join` segment. A form without an `instruction` segment leaves the instruction out. A form that writes the text
twice costs twice the text's tokens, and each copy gets half the room.

Under `last` pooling a row's embedding is the state of its closing token. Turn templates close with their end-of-turn
token always; `mistral` and `plain` have none of their own, so they append the tokenizer's EOS, and only under `last`
pooling, where something reads it (upstream LLM2Vec does the same). The rows of published methods write what the
method writes, whatever the pooling; one that ends in the text cannot be pooled by `last`.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, get_args

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from llm2vec.types import PoolingMode, TextSide, UserError

SegmentKind = Literal[
    "bos", "eos", "special", "marker", "literal", "instruction", "join", "text", "examples", "answer"
]  # fmt: skip


class Segment(NamedTuple):
    """One piece of a template."""

    #: `bos` / `eos`: that token of the tokenizer (a missing BOS is left out); `special`: the special token written in
    #: `value`; `marker`: a control token where the tokenizer has `value` as one, else that text with a space towards
    #: the content; `literal`: the text in `value`; `instruction`, `text`: the row's own; `join`: `instruction_join`,
    #: where there is an instruction; `examples`: where few-shot examples stand; `answer`: an example's
    kind: SegmentKind
    value: str = ""  #: the token or text of a `special`, `marker` or `literal`
    pooled: bool = False  #: whether mean pooling without the instruction counts its positions
    truncate: bool = False  #: whether it gives way when a row is too long; all else is kept
    only_last_pooling: bool = False  #: written under `last` pooling only
    only_with_instruction: bool = False  #: written only where the row has an instruction
    apart: bool = False  #: whether it is tokenised apart from what stands before it, as the method's released code does


class Template(NamedTuple):
    """A row of the table."""

    query: tuple[Segment, ...]  #: segments of a query, and of every text of a symmetric task
    document: tuple[Segment, ...]  #: segments of a document
    added_tokens: tuple[str, ...] = ()  #: special tokens that training adds to a base without them
    example: tuple[Segment, ...] = ()  #: segments of one few-shot example; empty = the template has no place for them
    #: whether the two forms are two questions about any text: the document's form asks for the text itself, the
    #: query's for what goes with it
    asks: bool = False


_BOS = Segment("bos")
_INSTRUCTION = Segment("instruction")
_TEXT = Segment("text", pooled=True, truncate=True)
_UNREAD_TEXT = Segment("text", truncate=True)
_CONTENT = (_INSTRUCTION, Segment("join"), _TEXT)
_EOS = Segment("eos", pooled=True)
_EOS_IF_LAST = Segment("eos", pooled=True, only_last_pooling=True)


def _token(value: str, pooled: bool = False) -> Segment:
    return Segment("special", value, pooled)


def _as_segment(part: Segment | str) -> Segment:
    return Segment("literal", part) if isinstance(part, str) else part


def _if_asked(part: Segment | str) -> Segment:
    return _as_segment(part)._replace(only_with_instruction=True)


def _apart(part: Segment | str) -> Segment:
    return _as_segment(part)._replace(apart=True)


def _form(*parts: Segment | str) -> tuple[Segment, ...]:
    """Segments in order; a string is a literal."""
    return tuple(map(_as_segment, parts))


def _one_form(*parts: Segment | str) -> Template:
    return Template(_form(*parts), _form(*parts))


_INSTRUCT = (_if_asked("Instruct: "), _INSTRUCTION, _if_asked("\n"))
_ICL_QUERY = (_if_asked(_token("<instruct>")), _INSTRUCTION, _if_asked("\n"), _token("<query>"))
#: The eight-token blocks of `llara`: what a document's embedding is read from, and a query's.
_SUMMARY_TOKENS = tuple(f"<s{i}>" for i in range(1, 9))
_PREDICTION_TOKENS = tuple(f"<s{i}>" for i in range(9, 17))

# fmt: off
TEMPLATES: dict[str, Template] = {
    "llama3": _one_form(
        _BOS, _token("<|start_header_id|>"), "user", _token("<|end_header_id|>"), "\n\n",
        *_CONTENT, _token("<|eot_id|>", pooled=True),
    ),
    "qwen2": _one_form(_token("<|im_start|>"), "user\n", *_CONTENT, _token("<|im_end|>", pooled=True)),
    "gemma": _one_form(_BOS, _token("<start_of_turn>"), "user\n", *_CONTENT, _token("<end_of_turn>", pooled=True)),
    "mistral": _one_form(
        _BOS, Segment("marker", "[INST]"), *_CONTENT, Segment("marker", "[/INST]", pooled=True), _EOS_IF_LAST
    ),
    "plain": _one_form(_BOS, *_CONTENT, _EOS_IF_LAST),
    # Echo embeddings (arXiv 2402.15449): every token of the second copy has seen the whole text. `mean` and `last`.
    # Instruction with its comma, phrases and texts are each tokenised apart.
    "echo": Template(
        query=_form(
            _BOS, _if_asked("Instruct:"), _apart(_INSTRUCTION), _if_asked(","), _if_asked(_apart("\n")),
            "Query:", _apart(_UNREAD_TEXT), _apart("\nQuery again:"), _apart(_TEXT), _EOS,
        ),
        document=_form(
            _BOS, "Document:", _apart(_UNREAD_TEXT), _apart("\nDocument again:"), _apart(_TEXT), _EOS
        ),
    ),
    # E5-Mistral (arXiv 2401.00368).
    "e5_mistral": Template(
        query=_form(_BOS, *_INSTRUCT, "Query: ", _TEXT, _EOS),
        document=_form(_BOS, _TEXT, _EOS),
    ),
    # Qwen3 Embedding (arXiv 2506.05176): no space after the second colon.
    "qwen3_embedding": Template(
        query=_form(_BOS, *_INSTRUCT, "Query:", _TEXT, _EOS),
        document=_form(_BOS, _TEXT, _EOS),
    ),
    # RepLLaMA (arXiv 2310.08319): one task, so no instruction.
    "repllama": Template(
        query=_form(_BOS, "query: ", _TEXT, _EOS),
        document=_form(_BOS, "passage: ", _TEXT, _EOS),
    ),
    # bge-en-icl (arXiv 2409.15700); zero-shot where a row has no examples.
    "bge_en_icl": Template(
        query=_form(_BOS, Segment("examples"), *_ICL_QUERY, _TEXT, "\n", _token("<response>"), _EOS),
        document=_form(_BOS, _TEXT, _EOS),
        added_tokens=("<instruct>", "<query>", "<response>"),
        example=_form(
            *_ICL_QUERY, _UNREAD_TEXT, "\n", _token("<response>"), Segment("answer", truncate=True), "\n\n"
        ),
    ),
    # GritLM (arXiv 2402.09906): its markers are plain text, and nothing closes the row.
    "gritlm": _one_form(
        _BOS, _if_asked("<|user|>\n"), _INSTRUCTION, _if_asked("\n"), "<|embed|>\n", _TEXT
    ),
    # LLaMA2Vec (arXiv 2312.15503) in the form of its released code: a query is asked for what follows it, a document
    # for its summary, and `mean` reads the eight added tokens alone. Quotation mark, text and phrase are apart.
    "llara": Template(
        query=_form(
            _BOS, '"', _apart(_UNREAD_TEXT), _apart('", predict the following passage within eight words: '),
            *(_token(token, pooled=True) for token in _PREDICTION_TOKENS),
        ),
        document=_form(
            _BOS, '"', _apart(_UNREAD_TEXT), _apart('", summarize the above passage within eight words: '),
            *(_token(token, pooled=True) for token in _SUMMARY_TOKENS),
        ),
        added_tokens=(*_SUMMARY_TOKENS, *_PREDICTION_TOKENS),
        asks=True,
    ),
}
# fmt: on

#: A row of the table, and how many tokens stand behind it.
_WITH_MEMORY = re.compile(r"(?:(\w+)\+)?memory_([1-9]\d{0,2})")
#: What a name of a template looks like, for the schema of configs.
TEMPLATE_NAME = rf"^(?:(?:{'|'.join(TEMPLATES)})(?:\+memory_[1-9]\d{{0,2}})?|memory_[1-9]\d{{0,2}})$"


def template_named(name: str) -> Template:
    """A row of the table, with a memory behind it where the name says so; a `UserError` where there is none."""
    if isinstance(name, str) and name in TEMPLATES:
        return TEMPLATES[name]
    memory = _WITH_MEMORY.fullmatch(name) if isinstance(name, str) else None
    if memory is None or (memory[1] or "plain") not in TEMPLATES:
        raise UserError(f"template is {name!r}; allowed: {', '.join(TEMPLATES)}, and with K added tokens +memory_K.")
    row, tokens = TEMPLATES[memory[1] or "plain"], tuple(f"<memory_{i + 1}>" for i in range(int(memory[2])))

    def form(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        # Nothing reads a closing token that only `last` pooling writes.
        before = (segment._replace(pooled=False) for segment in segments if not segment.only_last_pooling)
        return (*before, *(_token(token, pooled=True) for token in tokens))

    return row._replace(query=form(row.query), document=form(row.document), added_tokens=(*row.added_tokens, *tokens))


def segments_of(template: str, pooling_mode: PoolingMode, side: TextSide = "query") -> tuple[Segment, ...]:
    """The segments that `template` writes under `pooling_mode` for one side.

    A `UserError` where there is no such template, or `last` pooling has no closing token to read.
    """
    form = getattr(template_named(template), side)
    segments = tuple(s for s in form if pooling_mode == "last" or not s.only_last_pooling)
    if pooling_mode == "last" and not (segments[-1].kind in ("eos", "special") and segments[-1].pooled):
        raise UserError(
            f"pooling_mode is 'last', but template {template!r} writes no closing token to read; "
            "use mean, weighted_mean or first."
        )
    return segments


def forms_of(
    template: str, pooling_mode: PoolingMode
) -> tuple[dict[TextSide, tuple[Segment, ...]], tuple[Segment, ...]]:
    """What `segments_of` gives for each side; and the segments of a few-shot example."""
    forms = {side: segments_of(template, pooling_mode, side) for side in get_args(TextSide)}
    return forms, template_named(template).example


def leaves_join_open(template: str) -> bool:
    """Whether `instruction_join` decides anything under a template."""
    return any(segment.kind == "join" for form in template_named(template)[:2] for segment in form)


def infer_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of the family that the tokenizer's special tokens belong to.

    A tokenizer with the turn tokens of exactly one family gets that family's template; one without any turn token and
    without a chat format is a base model's and gets `plain`. Any other is a `UserError`.
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


def add_template_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Add the special tokens of a template that the tokenizer lacks; the new tokens' ids, in the template's order.

    A special token that is there already is used as it is. An ordinary one of that name, which any text may contain, is
    a `UserError`.
    """
    vocabulary, known = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    new = []
    for token in template_named(template).added_tokens:
        token_id = vocabulary.get(token)
        if token_id is None:
            new.append(token)
        elif token_id not in known or not known[token_id].special:
            raise UserError(
                f"template: {template!r} adds the token {token!r}, but the base's vocabulary has it already as an "
                "ordinary token; choose another template or base."
            )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in new]


def bare_instruction(instruction: str, join: str | None) -> str:
    """The instruction as it stands in a row before `join`; None = before a template's own characters.

    What brings its own punctuation replaces the instruction's closing `:` or `;`, so that the tables of training (no
    colon) and of evaluation (colon) render alike. A blank join leaves the instruction as it is.
    """
    instruction = instruction.strip()
    return instruction.rstrip(":; ") if join is None or join.strip() else instruction
