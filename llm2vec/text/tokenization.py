"""Texts to token rows: ids, attention mask, pool mask and target mask, by a template's segments.

Four rules hold here and nowhere else:
- special tokens are written as ids and never read in the text of a user (`<|eot_id|>` inside a text stays text; an
  added token that the tokenizer does not call special, as Qwen's `<tool_call>`, is one token there as anywhere);
- text that stands side by side (header, instruction, text) is tokenised in one go, as the model's own chat format
  would be, and the masks come from character offsets; but for the segments that a template has `apart`;
- only `truncate` segments are cut, so the closing token always survives, and so does a phrase that a token of the text
  reaches over. Where a form writes the text twice, each copy gets half the room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from llm2vec.text.long_texts import beginning_of, encode_in_parts
from llm2vec.text.templates import Segment, SegmentKind, bare_instruction, forms_of, template_named
from llm2vec.types import InstructedText, InstructionMask, PoolingMode, TextSide, UserError

#: Most tokens of a few-shot example's query, and of its answer (released code of arXiv 2409.15700).
EXAMPLE_PART = 256


class Row(NamedTuple):
    """One tokenised text; the three lists have the same length."""

    ids: list[int]
    pooled: list[bool]
    target: list[bool]


class _Span(NamedTuple):
    """Characters of a run that one segment (its index in the form) has written."""

    start: int
    end: int
    segment: int


class _Run(NamedTuple):
    """Text that is tokenised in one go; `cut` is the part of it that gives way, at most one."""

    text: str = ""
    spans: tuple[_Span, ...] = ()
    cut: _Span | None = None


class _Special(NamedTuple):
    """A special token and its segment."""

    token_id: int
    segment: int


class _Tokens(NamedTuple):
    """Ids, and for each the index of the segment it belongs to."""

    ids: list[int]
    owners: list[int]


_Form: TypeAlias = tuple[Segment, ...]
_Piece: TypeAlias = _Special | _Run
#: A row's or an example's pieces, and their tokens.
_Written: TypeAlias = tuple[Sequence[_Piece], _Tokens]


class RowTokenizer:
    """Renders instructed texts by one template.

    Args:
        tokenizer: a fast tokenizer (offsets are needed).
        template: key of `TEMPLATES`.
        pooling_mode: decides whether the closing token of `plain` and `mistral` is written, and, under `first`,
            that the whole row is pooled over.
        max_length: most tokens in a row, template included.
        text_max_length: most tokens of the text alone (of each copy, where a form writes two); None = as many as fit.
        instruction_join: what stands between instruction and text, in the templates that leave it open.
        skip_instruction: False = the whole row is pooled over, whatever the template says (irrelevant under `last`).
        instruction_mask: what is pooled where the instruction is not. `offsets`: tokens by the characters they stand
            for. `counted`: as many of the last as the text with its closing makes alone, as upstream LLM2Vec does.
        reconstruct_instruction: whether the instruction is part of the target mask, beside the text.

    Raises:
        UserError: the tokenizer is slow or lacks a token the template writes, or the template has no closing token
            for `last` pooling.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        pooling_mode: PoolingMode,
        max_length: int,
        *,
        text_max_length: int | None = None,
        instruction_join: str = "; ",
        skip_instruction: bool = True,
        instruction_mask: InstructionMask = "offsets",
        reconstruct_instruction: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"The tokenizer {type(tokenizer).__name__} has no fast version, which is needed here.")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.text_max_length = text_max_length
        self.instruction_join = instruction_join
        self.pool_everything = pooling_mode == "first" or not skip_instruction
        self.counts_positions = instruction_mask == "counted" and not self.pool_everything
        self.target_kinds: tuple[SegmentKind, ...] = ("instruction", "join") if reconstruct_instruction else ()
        self._forms, self._example = forms_of(template, pooling_mode)
        self._special_ids = self._resolve_special_ids((*self._forms["query"], *self._forms["document"], *self._example))
        self.closing_token_id = self._special_ids.get(self._forms["query"][-1])

    @property
    def sides(self) -> tuple[TextSide, ...]:
        """The sides that are written differently: one alone where the template has one form."""
        return ("query",) if self._forms["query"] == self._forms["document"] else ("query", "document")

    @property
    def takes_examples(self) -> bool:
        """Whether the template has a place for few-shot examples."""
        return bool(self._example)

    def __call__(self, texts: Sequence[InstructedText]) -> dict[str, Tensor]:
        """Tokenise and pad: `input_ids`, `attention_mask`, `pool_mask`, `target_mask`, each int64 or bool [B, T]."""
        return self.pad(self.rows(texts))

    def rows(self, texts: Sequence[InstructedText]) -> list[Row]:
        """Tokenise without padding, one Row a text, in order.

        The target is the text, its last copy where there are two. Few-shot examples are added, in order, while the
        row stays within `max_length` with its own text as it is; each of their parts is cut to `EXAMPLE_PART` tokens. A
        `UserError` where a row's template and instruction alone fill `max_length`, there are examples and no place for
        them, or a text holds half a surrogate pair.
        """
        forms = [self._forms[text.side] for text in texts]
        pieces = [
            self._pieces(form, self._contents(form, text.instruction, text.text))
            for form, text in zip(forms, texts, strict=True)
        ]
        shown = [
            self._pieces(self._example, self._contents(self._example, e.instruction, e.query, e.answer))
            for text in texts
            for e in text.examples
        ]
        tokens = self._tokenise([*pieces, *shown])
        written = zip([*pieces, *shown], tokens, strict=True)
        own = [next(written) for _ in texts]
        rows = [
            self._assemble(form, row, text, [next(written) for _ in text.examples])
            for form, row, text in zip(forms, own, texts, strict=True)
        ]
        return list(map(self._pool_counted, forms, pieces, tokens, rows)) if self.counts_positions else rows

    def opening(self, instruction: str, side: TextSide = "query") -> tuple[list[int], str]:
        """What stands before a row's (first) text: ids, then the characters that are tokenised in one go with it."""
        form = self._forms[side]
        pieces = self._pieces(form, self._contents(form, instruction, "x"))
        at, run, cut = next((i, p, p.cut) for i, p in enumerate(pieces) if isinstance(p, _Run) and p.cut is not None)
        (before,) = self._tokenise([pieces[:at]])
        return before.ids, run.text[: cut.start]

    def pad(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Pad rows to the longest of them, on the tokenizer's `padding_side`; embeddings do not depend on it."""

        def padded(lists: Iterator[Sequence[int]], filler: int = 0) -> Tensor:
            return pad_sequence(list(map(torch.tensor, lists)), True, filler, self.tokenizer.padding_side)

        return {
            "input_ids": padded((row.ids for row in rows), self.tokenizer.pad_token_id or 0),
            "attention_mask": padded([1] * len(row.ids) for row in rows),
            "pool_mask": padded(row.pooled for row in rows),
            "target_mask": padded(row.target for row in rows),
        }

    def _resolve_special_ids(self, segments: _Form) -> dict[Segment, int]:
        """Ids of the template's special tokens; a BOS the tokenizer does not have, and a marker that is ordinary
        text to it, are left out."""
        ids: dict[Segment, int] = {}
        for segment in segments:
            token_id: int | None
            if segment.kind == "bos":
                token_id = self.tokenizer.bos_token_id
            elif segment.kind == "eos":
                token_id = self._require(self.tokenizer.eos_token_id, "an end-of-sequence token")
            elif segment.kind == "special":
                token_id = self._require(self._added_id(segment.value), repr(segment.value))
            elif segment.kind == "marker":
                token_id = self._added_id(segment.value)
            else:
                continue
            if token_id is not None:
                ids[segment] = token_id
        return ids

    def _added_id(self, token: str) -> int | None:
        matches = [i for i, added in self.tokenizer.added_tokens_decoder.items() if str(added) == token]
        return matches[0] if matches else None

    def _require(self, token_id: int | None, what: str) -> int:
        if token_id is None:
            remedy = (
                "; training adds it, so load a model that was trained under this template"
                if what in map(repr, template_named(self.template).added_tokens)
                else ""
            )
            raise UserError(f"template {self.template!r} needs {what}, which the tokenizer does not have{remedy}.")
        return token_id

    def _contents(self, form: _Form, instruction: str, text: str, answer: str = "") -> dict[str, str]:
        """What the segments without characters of their own write, by kind."""
        open_join = any(segment.kind == "join" for segment in form)
        instruction = bare_instruction(instruction, self.instruction_join if open_join else None)
        join = self.instruction_join if instruction else ""
        return {"instruction": instruction, "join": join, "text": text.strip(), "answer": answer.strip()}

    def _pieces(self, form: _Form, contents: Mapping[str, str]) -> list[_Piece]:
        """The row as special tokens and the runs of text between them."""
        pieces: list[_Piece] = []
        run, seen_text = _Run(), False
        for index, segment in enumerate(form):
            if segment.only_with_instruction and not contents["instruction"]:
                continue
            token_id = self._special_ids.get(segment)
            if token_id is not None or segment.apart or segment.kind == "examples":
                pieces += [run] if run.text else []
                run = _Run()
            if token_id is not None:
                pieces.append(_Special(token_id, index))
                continue
            seen_text = seen_text or segment.kind == "text"
            text = run.text + (contents.get(segment.kind) or _fixed_text(segment, seen_text))
            span = _Span(len(run.text), len(text), index)
            run = _Run(text, (*run.spans, span), span if segment.truncate else run.cut)
        return [self._shortened(piece) for piece in ([*pieces, run] if run.text else pieces)]

    def _shortened(self, piece: _Piece) -> _Piece:
        """A run that ends with a text much longer than what is kept of it, without what cannot matter."""
        if not isinstance(piece, _Run) or piece.cut is None or piece.cut.end < len(piece.text):
            return piece
        text = beginning_of(piece.text, piece.cut.start, max(self.max_length, EXAMPLE_PART), self.tokenizer)
        cut = piece.cut._replace(end=len(text))
        return _Run(text, (*piece.spans[:-1], cut), cut)

    def _tokenise(self, rows: Sequence[Sequence[_Piece]]) -> list[_Tokens]:
        """Tokens of each row's pieces; all runs go through the tokenizer at once."""
        encoded = encode_in_parts(
            self.tokenizer, [piece.text for row in rows for piece in row if isinstance(piece, _Run)]
        )
        tokens = []
        for row in rows:
            ids: list[int] = []
            owners: list[int] = []
            for piece in row:
                if isinstance(piece, _Special):
                    ids.append(piece.token_id)
                    owners.append(piece.segment)
                    continue
                run_ids, offsets = next(encoded)
                ids.extend(run_ids)
                owners.extend(_owner(piece, start, end) for start, end in offsets)
            tokens.append(_Tokens(ids, owners))
        return tokens

    def _assemble(self, form: _Form, row: _Written, text: InstructedText, examples: Sequence[_Written]) -> Row:
        """Ids and masks of a whole row, with the text cut to what the rest leaves."""
        _, tokens = row
        if not tokens.ids:  # an empty text under a template that writes nothing: one token must be there to pool over
            return Row([self._require(self.tokenizer.eos_token_id, "an end-of-sequence token")], [True], [False])
        if len(tokens.ids) > self.max_length or _longest(form, tokens) > (self.text_max_length or self.max_length):
            tokens = self._parted(row)
        copies = [i for i, segment in enumerate(form) if segment.truncate]
        kept = sum(owner not in copies for owner in tokens.owners)
        room = (self.max_length - kept) // len(copies)
        if room < (1 if text.text.strip() else 0):
            alone = f"and the instruction {text.instruction!r} alone take" if text.instruction else "alone takes"
            remedy = ", or shorten the instruction" if text.instruction else ""
            raise UserError(
                f"max_length is {self.max_length}, but the template {alone} {kept} tokens; raise the limit "
                f"(max_seq_length in a config){remedy}."
            )
        room = min(room, self.text_max_length or room)
        ids, owners = _cut(tokens, form, room)
        if examples:
            ids, owners = self._with_examples(form, _Tokens(ids, owners), examples)
        pooled_of = [self.pool_everything or segment.pooled for segment in form]
        pooled = [pooled_of[owner] for owner in owners]
        if not any(pooled):  # an empty text under a template without a suffix: the header is all there is
            pooled = [True] * len(ids)
        target_of = [i == copies[-1] or segment.kind in self.target_kinds for i, segment in enumerate(form)]
        return Row(ids, pooled, [target_of[owner] for owner in owners])

    def _pool_counted(self, form: _Form, pieces: Sequence[_Piece], tokens: _Tokens, row: Row) -> Row:
        """A row that pools as many of its last tokens more, or fewer, as its text makes alone and not in the row."""
        runs = [(piece, piece.cut) for piece in pieces if isinstance(piece, _Run) and piece.cut is not None]
        if not runs or not form[runs[-1][1].segment].pooled:
            return row
        run, cut = runs[-1]
        ((alone, _),) = encode_in_parts(self.tokenizer, [run.text[cut.start :]])
        behind = {span.segment for span in run.spans if span.segment >= cut.segment}
        more = len(alone) - sum(owner in behind for owner in tokens.owners)
        first = min(len(row.ids) - sum(row.pooled) - more, len(row.ids) - 1)
        return row._replace(pooled=[i >= first for i in range(len(row.ids))])

    def _parted(self, row: _Written) -> _Tokens:
        """The tokens of a row that is to be cut; where one of the text's covers the phrase behind it, of both apart."""
        pieces, tokens = row
        split = [_split(piece) for piece in pieces]
        behind = {span.segment for _, *rest in split for part in rest for span in part.spans}
        return tokens if behind <= set(tokens.owners) else self._tokenise([list(chain(*split))])[0]

    def _with_examples(self, form: _Form, row: _Tokens, examples: Sequence[_Written]) -> _Tokens:
        """A row with as many of its examples as fit, at their place."""
        place = next((i for i, segment in enumerate(form) if segment.kind == "examples"), None)
        if place is None:
            raise UserError(f"template {self.template!r} has no place for few-shot examples; take them out.")
        prefix: list[int] = []
        for example in examples:
            is_cut = _longest(self._example, example[1]) > EXAMPLE_PART
            ids = _cut(self._parted(example) if is_cut else example[1], self._example, EXAMPLE_PART).ids
            if len(row.ids) + len(prefix) + len(ids) > self.max_length:
                break
            prefix += ids
        at = sum(owner < place for owner in row.owners)
        return _Tokens(
            [*row.ids[:at], *prefix, *row.ids[at:]], [*row.owners[:at], *[place] * len(prefix), *row.owners[at:]]
        )


def _fixed_text(segment: Segment, seen_text: bool) -> str:
    """The characters that a segment writes by itself."""
    if segment.kind == "marker":  # text to this tokenizer, so it stands off from the content by a space
        return f" {segment.value}" if seen_text else f"{segment.value} "
    return segment.value


def _owner(run: _Run, start: int, end: int) -> int:
    """The segment that a token belongs to: the text if it reaches into it, else the last one it reaches into."""
    end = max(end, start + 1)  # some tokenizers add a prefix space that covers no character
    if run.cut is not None and end > run.cut.start and start < run.cut.end:
        return run.cut.segment
    touched = [span.segment for span in run.spans if end > span.start and start < span.end]
    return touched[-1] if touched else run.spans[-1].segment


def _split(piece: _Piece) -> tuple[_Piece, *tuple[_Run, ...]]:
    """A run that goes on behind its text as two; any other piece as it is."""
    if isinstance(piece, _Special) or piece.cut is None or piece.cut.end == len(piece.text):
        return (piece,)
    end = piece.cut.end
    before = tuple(span for span in piece.spans if span.end <= end)
    behind = tuple(_Span(s.start - end, s.end - end, s.segment) for s in piece.spans if s.end > end)
    return _Run(piece.text[:end], before, piece.cut), _Run(piece.text[end:], behind)


def _longest(form: _Form, tokens: _Tokens) -> int:
    """Most tokens of a segment that gives way."""
    return max(tokens.owners.count(i) for i, segment in enumerate(form) if segment.truncate)


def _cut(tokens: _Tokens, form: _Form, room: int) -> _Tokens:
    """Keep the first `room` tokens of each segment that gives way and everything else."""
    left = {i: room for i, segment in enumerate(form) if segment.truncate}
    if len(tokens.ids) <= room:
        return tokens
    keep = []
    for i, owner in enumerate(tokens.owners):
        if owner in left:
            left[owner] -= 1
        if left.get(owner, 0) >= 0:
            keep.append(i)
    return _Tokens([tokens.ids[i] for i in keep], [tokens.owners[i] for i in keep])
