"""How the token rows of two ways differ, and which rows a server that shows none may have made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llm2vec.text.tokenization import Row
from llm2vec.types import InstructedText
from llm2vec.verify.loaded import LocalWay
from llm2vec.verify.ways import shared_start

#: The most tokens of a row that is not to be cut.
_NO_LIMIT = 1 << 20


class RowGuess(NamedTuple):
    """Token rows as a server might have made them.

    Attributes:
        cause: what the difference is called.
        words: what is done, to follow "with".
        rows: one a text.
    """

    cause: str
    words: str
    rows: list[Row]


class TokenDifference(NamedTuple):
    """One kind of difference between the token ids of two ways.

    Attributes:
        cause: `EOS`, `BOS`, `truncation`, `control tokens` or `template`.
        words: the first place of the first text that shows it.
    """

    cause: str
    words: str


def token_differences(
    ours: Sequence[list[int] | None],
    theirs: Sequence[list[int] | None],
    names: Sequence[str],
    cut: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
) -> list[TokenDifference]:
    """Name how token ids differ, text by text; the kind that most texts show comes first.

    Args:
        ours: ids of the reference's rows; None = not shown.
        theirs: of the other way.
        names: of the texts.
        cut: which texts fill a row of one of the two.
        tokenizer: shows the tokens.
    """

    def show(ids: Sequence[int], at: int) -> str:
        return repr(tokenizer.decode([ids[at]])) if at < len(ids) else "the end"

    pairs = [
        (a, b, name, full) for a, b, name, full in zip(ours, theirs, names, cut, strict=True) if a and b and a != b
    ]
    ends = {b[-1] for b, full in zip(theirs, cut, strict=True) if b and not full}
    closing = ends.pop() if len(ends) == 1 else None
    kinds: dict[str, list[tuple[str, str]]] = {}
    for a, b, name, full in sorted(pairs, key=lambda pair: pair[3]):
        cause, words = _cut_difference(a, b, closing, show) if full else (None, "")
        if cause is None:
            cause, words = _difference(a, b, tokenizer, show)
        if not (full and kinds and cause == "template"):  # what is cut is shifted by what is wrong with all texts
            kinds.setdefault(cause, []).append((name, words))
    return [
        TokenDifference(cause, f"{of[0][1]} (text {of[0][0]!r}{f', and {len(of) - 1} more' if len(of) > 1 else ''})")
        for cause, of in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]


def _cut_difference(
    ours: list[int], theirs: list[int], closing: int | None, show: Callable[[Sequence[int], int], str]
) -> tuple[str | None, str]:
    """The kind of difference of a text that fills a row; None where it is the same as in other texts."""
    at = shared_start(ours, theirs)
    if at < min(len(ours), len(theirs)) - 1:
        return None, ""
    if ours[-1] == theirs[-1]:
        return "truncation", f"cut to {len(theirs)} tokens, where the reference has {len(ours)}"
    if closing is None or theirs[-1] == closing:
        return None, ""
    return "truncation", f"cut at the end, so that {show(ours, -1)} is lost and the row ends with {show(theirs, -1)}"


def _difference(
    ours: list[int],
    theirs: list[int],
    tokenizer: PreTrainedTokenizerBase,
    show: Callable[[Sequence[int], int], str],
) -> tuple[str, str]:
    """The kind of difference between two rows of ids, and its words."""
    if theirs == ours[:-1]:
        return "EOS", f"the closing token {show(ours, -1)} is missing"
    if theirs == [*ours, ours[-1]]:
        return "EOS", f"the closing token {show(ours, -1)} stands twice"
    if theirs[:-1] == ours[:-1]:
        return "EOS", f"the row closes with {show(theirs, -1)} instead of {show(ours, -1)}"
    if theirs == ours[1:]:
        return "BOS", f"the opening token {show(ours, 0)} is missing"
    if theirs == [ours[0], *ours]:
        return "BOS", f"the opening token {show(ours, 0)} stands twice"
    at = shared_start(ours, theirs)
    words = f"position {at} holds {show(theirs, at)} instead of {show(ours, at)}"
    special = [sum(token in tokenizer.added_tokens_decoder for token in ids) for ids in (ours, theirs)]
    if special[0] != special[1] and tokenizer.decode(ours) == tokenizer.decode(theirs):
        return "control tokens", f"text that looks like a control token is read otherwise: {words}"
    return "template", words


def with_ids(row: Row, ids: list[int]) -> Row:
    """Other ids, pooled over as the row's are where both begin or end alike, and everywhere between."""
    start = shared_start(row.ids, ids)
    most = min(len(row.ids), len(ids)) - start
    end = min(shared_start(row.ids[::-1], ids[::-1]), most)
    tail = len(row.pooled) - end
    between = [True] * (len(ids) - start - end)
    pooled = [*row.pooled[:start], *between, *row.pooled[tail:]]
    return Row(ids, pooled if any(pooled) else [True] * len(ids), [False] * len(ids))


def guessed_rows(
    way: LocalWay, texts: Sequence[InstructedText], sent: Sequence[str] | None, shown: Sequence[list[int] | None]
) -> Iterator[RowGuess]:
    """Rows that a server may have made of what it was sent; those that it shows stay as they are.

    Args:
        way: whose rows they should have been.
        texts: what was asked.
        sent: the strings that went to the server; None = only texts went there.
        shown: the ids that the server shows; None = not shown.
    """
    rows = way.rows(texts, None)
    ids_of, whole = ([row.ids for row in way.rows(texts, limit)] for limit in (None, _NO_LIMIT))
    last = [ids[-1] for ids in ids_of]
    guesses = [
        ("truncation", "texts that are not cut", whole),
        ("truncation", "rows cut at the end, closing token and all", [ids[: way.max_length] for ids in whole]),
        ("EOS", "no closing token", [ids[:-1] for ids in ids_of]),
        ("EOS", "the closing token twice", [[*ids, ids[-1]] for ids in ids_of]),
        ("BOS", "no opening token", [ids[1:] for ids in ids_of]),
        ("BOS", "the opening token twice", [[ids[0], *ids] for ids in ids_of]),
    ]
    for token in sorted(set(way.tokenizer.all_special_ids) - set(last)):
        words = f"{way.tokenizer.decode([token])!r} as the closing token"
        guesses.append(("EOS", words, [[*ids[:-1], token] for ids in ids_of]))
    if sent is not None:
        bare = way.tokenizer(list(sent), truncation=True, max_length=way.max_length)["input_ids"]
        control = [_with_control_tokens(way.tokenizer, ids, string) for ids, string in zip(ids_of, sent, strict=True)]
        guesses.append(("template", "the rows that the tokenizer writes by itself", bare))
        guesses.append(("control tokens", "text that looks like a control token read as one", control))
    for cause, words, made in guesses:
        if cause == "truncation":  # which concerns the rows that are cut; the others are as shown
            made = [ids if known is None else known for ids, known in zip(made, shown, strict=True)]
        if all(ids and known in (None, ids) for ids, known in zip(made, shown, strict=True)):
            yield RowGuess(cause, words, [with_ids(row, ids) for row, ids in zip(rows, made, strict=True)])


def _with_control_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], string: str) -> list[int]:
    """A row in which the string's look-alikes have become control tokens."""
    text, control = (
        tokenizer(string, add_special_tokens=False, split_special_tokens=split)["input_ids"] for split in (True, False)
    )
    at = next((i for i in range(len(ids)) if ids[i : i + len(text)] == text), None)
    return ids if at is None or not text else [*ids[:at], *control, *ids[at + len(text) :]]
