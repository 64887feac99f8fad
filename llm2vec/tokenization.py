"""Texts to token rows: ids, attention mask, pool mask and target mask, by a template's segments.

Three rules hold here and nowhere else:
- special tokens are written as ids; the text of a user is never read as control tokens (`<|eot_id|>` inside a text
  stays text);
- text that stands side by side (header, instruction, text) is tokenised in one go, as the model's own chat format
  would be, and the masks come from character offsets;
- only `truncate` segments are cut, so the closing token always survives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from llm2vec.templates import Segment, segments_of
from llm2vec.types import InstructedText, PoolingMode, TokenBatch, UserError


class Row(NamedTuple):
    """One tokenised text; the three lists have the same length."""

    ids: list[int]
    pooled: list[bool]
    target: list[bool]


class _Piece(NamedTuple):
    """A special token, or a run of text and where in it the row's instruction and text stand (character offsets)."""

    token_id: int | None = None
    pooled: bool = False
    run: str = ""
    instruction_start: int = 0
    text_start: int = 0
    text_end: int = 0


#: Ids of a run and the characters each covers.
_Encoded: TypeAlias = tuple[list[int], list[tuple[int, int]]]


class RowTokenizer:
    """Renders instructed texts by one template.

    Args:
        tokenizer: a fast tokenizer (offsets are needed).
        template: key of `TEMPLATES`.
        pooling_mode: decides whether the closing token of `plain` and `mistral` is written, and, under `first`,
            that the whole row is pooled over.
        max_length: most tokens in a row, template included.
        text_max_length: most tokens of the text alone; None = as many as fit.
        instruction_join: what stands between instruction and text.
        skip_instruction: whether header and instruction are left out of the pool mask (irrelevant under `last`).
        reconstruct_instruction: whether the instruction is part of the target mask, beside the text.
        padding_side: "right" or "left"; embeddings do not depend on it.

    Raises:
        UserError: the tokenizer is slow or lacks a token the template writes.
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
        reconstruct_instruction: bool = False,
        padding_side: str = "right",
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"The tokenizer {type(tokenizer).__name__} has no fast version, which is needed here.")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.text_max_length = text_max_length
        self.instruction_join = instruction_join
        self.pool_everything = pooling_mode == "first" or not skip_instruction
        self.reconstruct_instruction = reconstruct_instruction
        self.padding_side = padding_side
        self._segments = segments_of(template, pooling_mode)
        self._special_ids = self._resolve_special_ids()
        self.closing_token_id = self._special_ids.get(self._segments[-1])

    def __call__(self, texts: Sequence[InstructedText]) -> TokenBatch:
        """Tokenise and pad: `input_ids`, `attention_mask`, `pool_mask`, `target_mask`, each int64 or bool [B, T]."""
        return self.pad(self.rows(texts))

    def rows(self, texts: Sequence[InstructedText]) -> list[Row]:
        """Tokenise without padding, one Row a text, in order.

        Raises:
            UserError: a row's template and instruction alone fill `max_length`.
        """
        pieces = [self._pieces(text) for text in texts]
        runs = [piece.run for row in pieces for piece in row if piece.token_id is None]
        encoded: Iterator[_Encoded] = iter(())
        if runs:
            output = self.tokenizer(
                runs, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
            )
            encoded = zip(output["input_ids"], output["offset_mapping"], strict=True)
        return [
            self._assemble([(p, ([], []) if p.token_id is not None else next(encoded)) for p in row], text)
            for row, text in zip(pieces, texts, strict=True)
        ]

    def pad(self, rows: Sequence[Row]) -> TokenBatch:
        """Pad rows to the longest of them, on `padding_side`."""
        length = max(len(row.ids) for row in rows)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        shape = (len(rows), length)
        batch: TokenBatch = {
            "input_ids": torch.full(shape, pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "pool_mask": torch.zeros(shape, dtype=torch.bool),
            "target_mask": torch.zeros(shape, dtype=torch.bool),
        }
        for i, row in enumerate(rows):
            n = len(row.ids)
            span = slice(0, n) if self.padding_side == "right" else slice(length - n, length)
            batch["input_ids"][i, span] = torch.tensor(row.ids, dtype=torch.long)
            batch["attention_mask"][i, span] = 1
            batch["pool_mask"][i, span] = torch.tensor(row.pooled, dtype=torch.bool)
            batch["target_mask"][i, span] = torch.tensor(row.target, dtype=torch.bool)
        return batch

    def _resolve_special_ids(self) -> dict[Segment, int]:
        """Ids of the template's special tokens; a BOS the tokenizer does not have, and a marker that is ordinary
        text to it, are left out."""
        ids: dict[Segment, int] = {}
        for segment in self._segments:
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
            raise UserError(f"template {self.template!r} needs {what}, which the tokenizer does not have.")
        return token_id

    def _pieces(self, text: InstructedText) -> list[_Piece]:
        """The row as special tokens and the runs of text between them."""
        contents = {
            "text": text.text.strip(),
            "instruction": render_instruction(text.instruction, self.instruction_join),
        }
        pieces: list[_Piece] = []
        run = _Piece()
        seen_text = False
        for segment in self._segments:
            if segment in self._special_ids:
                pieces += [run] if run.run else []
                pieces.append(_Piece(self._special_ids[segment], segment.pooled))
                run = _Piece()
                continue
            start = len(run.run)
            run = run._replace(run=run.run + (contents.get(segment.kind) or _fixed_text(segment, seen_text)))
            if segment.kind == "instruction":
                run = run._replace(instruction_start=start)
            elif segment.kind == "text":
                seen_text = True
                run = run._replace(text_start=start, text_end=len(run.run))
            elif not seen_text:  # a header: what is tokenised with it begins after it
                end = len(run.run)
                run = run._replace(instruction_start=end, text_start=end, text_end=end)
        return [*pieces, run] if run.run else pieces

    def _assemble(self, parts: Sequence[tuple[_Piece, _Encoded]], text: InstructedText) -> Row:
        """Ids and masks of a whole row, with the text cut to what the rest leaves."""
        ids: list[int] = []
        classes: list[str] = []
        for piece, (run_ids, offsets) in parts:
            if piece.token_id is not None:
                ids.append(piece.token_id)
                classes.append("s" if piece.pooled else "f")
                continue
            ids.extend(run_ids)
            classes.extend(_token_class(piece, start, end) for start, end in offsets)
        if not ids:  # an empty text under a template that writes nothing: one token must be there to pool over
            ids, classes = [self._require(self.tokenizer.eos_token_id, "an end-of-sequence token")], ["s"]
        kept = sum(c != "t" for c in classes)
        room = self.max_length - kept
        if room < (1 if text.text.strip() else 0):
            raise UserError(
                f"max_length is {self.max_length}, but the template and the instruction {text.instruction!r} alone "
                f"take {kept} tokens; shorten the instruction or raise the limit."
            )
        if self.text_max_length is not None:
            room = min(room, self.text_max_length)
        ids, classes = _cut_text(ids, classes, room)
        pooled = [self.pool_everything or c in "ts" for c in classes]
        if not any(pooled):  # an empty text under a template without a suffix: the header is all there is
            pooled = [True] * len(ids)
        wanted = "it" if self.reconstruct_instruction else "t"
        return Row(ids, pooled, [c in wanted for c in classes])


def render_instruction(instruction: str, join: str) -> str:
    """Instruction and what joins it to the text; empty without an instruction.

    A join that brings its own punctuation replaces the instruction's closing `:` or `;`, so that the tables of
    training (no colon) and of evaluation (colon) render alike. A blank join leaves the instruction as it is.
    """
    instruction = instruction.strip()
    if not instruction:
        return ""
    return (instruction.rstrip(":; ") if join.strip() else instruction) + join


def _fixed_text(segment: Segment, seen_text: bool) -> str:
    """The characters that a segment writes by itself."""
    if segment.kind == "marker":  # text to this tokenizer, so it stands off from the content by a space
        return f" {segment.value}" if seen_text else f"{segment.value} "
    return segment.value


def _token_class(piece: _Piece, start: int, end: int) -> str:
    """What a token belongs to: t(ext) if it reaches into it, s(uffix), i(nstruction) or f(ixed header)."""
    end = max(end, start + 1)  # some tokenizers add a prefix space that covers no character
    if end > piece.text_start and start < piece.text_end:
        return "t"
    if start >= piece.text_end and piece.text_end > 0:
        return "s"
    return "i" if end > piece.instruction_start else "f"


def _cut_text(ids: list[int], classes: list[str], room: int) -> tuple[list[int], list[str]]:
    """Keep the first `room` text tokens and everything that is not text."""
    num_text = 0
    keep = []
    for i, c in enumerate(classes):
        num_text += c == "t"
        if c != "t" or num_text <= room:
            keep.append(i)
    return [ids[i] for i in keep], [classes[i] for i in keep]


#: Short texts that show a change of template, tokenizer or library: instruction, accents, spaces, a look-alike token.
PROBE_TEXTS = (
    InstructedText("", "The quick brown fox."),
    InstructedText("Given a question, retrieve passages that answer it:", "who wrote Emma?"),
    InstructedText("", "  Naïve café, 東京 1234567\n\tdef f(x): return x "),
    InstructedText("Retrieve semantically similar text", "</s> <|eot_id|> <|im_end|> [INST]"),
)


def probe_ids(tokenizer: RowTokenizer) -> list[list[int]]:
    """Token ids of the probe texts: stored with a checkpoint, compared when it is loaded."""
    return [row.ids for row in tokenizer.rows(PROBE_TEXTS)]
