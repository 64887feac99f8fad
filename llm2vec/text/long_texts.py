"""Texts far longer than what is kept of them, cut before they are tokenised: a line of 100 MB would take 18 GB.

The tokens that are kept are those of the whole text. What this rests on: where one of a text's tokens ends, the text up
to there has these tokens and no others. That holds for BPE, Unigram and WordPiece. And a token is no longer than the
longest of the vocabulary. So among as many places in a row as that one has characters, a token of the whole text ends
at one. Where the text up to every one of these places begins with the same tokens, so does the whole text.

Where that is not found (digits grouped from the right), or looking would take more than the text itself, it is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from llm2vec.files import check_unicode

#: Ids of a text, and the characters that each token covers.
Encoded = tuple[list[int], list[tuple[int, int]]]

#: Characters above which it is worth a look.
LONG = 100_000
#: Tokens behind the last one that counts, so that what a normaliser does at a text's end is not looked at.
MARGIN = 16
#: Characters that go through a tokenizer at once: 0.6 GB in its memory.
CHARACTERS_AT_ONCE = 1 << 20


def beginning_of(text: str, start: int, most: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of a text that has the same first tokens by a fast tokenizer, or the text itself.

    Tokens before the character `start` all count; `most` do of the part that begins there, which gives way.
    """
    if len(text) <= LONG:
        return text
    longest = max(map(len, tokenizer.get_vocab()))
    end = start + 4 * (most + MARGIN) + longest
    while longest * end < len(text):
        ends = range(end - longest + 1, end + 1)
        encodings = encode_in_parts(tokenizer, [text[:place] for place in ends])
        ids, offsets = next(encodings)
        before = sum(first < start for first, _ in offsets)
        counted = before + most
        widest = max((last - first for first, last in offsets), default=0)
        if len(ids) >= counted + MARGIN and widest <= longest:
            begins = ids[:counted], offsets[:counted]
            if all((other[:counted], places[:counted]) == begins for other, places in encodings):
                return text[:end]
        end *= 2
    return text


def encode_in_parts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[Encoded]:
    """Ids and offsets of each text; no special token is read or written. Half a surrogate pair is a `UserError`."""
    for part in in_parts(texts):
        try:
            output = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
        except TypeError:
            for text in part:
                check_unicode(text, "text", "a row")
            raise
        yield from zip(output["input_ids"], output["offset_mapping"], strict=True)


def in_parts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in turn, as many at once as have `CHARACTERS_AT_ONCE`, or one."""
    seen = 0

    def part(text: str) -> int:
        nonlocal seen
        seen += len(text)
        return (seen - 1) // CHARACTERS_AT_ONCE

    return (list(together) for _, together in groupby(texts, part))
