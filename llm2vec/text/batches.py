"""Rows laid end to end: a packed batch, parts of it, and where its texts begin; rows in batches. No model is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, compress, count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2vec.text.tokenization import Row, RowTokenizer
from llm2vec.types import Batch, InstructedText, TokenBatch

#: What `encode` counts as a row of its batch size. A pass over many more tokens falls out of a CPU's caches, and a
#: batch of long rows out of a GPU's memory.
TOKENS_PER_ROW = 128

#: Batches that are tokenised ahead of the model.
ROWS_AHEAD = 8

#: Fewest tokens of a text before a cut, and behind it (LLM2Comp, arXiv 2511.17129).
LEAST_PART = 10


def pack_rows(rows: Sequence[Row]) -> TokenBatch:
    """Tokenised rows laid end to end."""
    return {
        "input_ids": torch.tensor([token for row in rows for token in row.ids], dtype=torch.long),
        "lengths": [len(row.ids) for row in rows],
        "pool_mask": torch.tensor([pooled for row in rows for pooled in row.pooled], dtype=torch.bool),
        "target_mask": torch.tensor([target for row in rows for target in row.target], dtype=torch.bool),
        "num_targets": [sum(row.target) for row in rows],
        "num_predicted": [sum(row.target[1:]) for row in rows],
        "num_different": [len(set(compress(row.ids, row.target))) for row in rows],
        "num_context": [max(compress(count(1), row.target), default=len(row.ids)) for row in rows],
        "prefix": shared_prefix(rows),
        "closed": all(row.pooled[-1] for row in rows),
    }


def shared_prefix(rows: Sequence[Row]) -> int:
    """Number of tokens that all rows begin with and none of them pools over; 0 for a single row."""
    if len(rows) < 2:  # nobody to share it with
        return 0
    first = rows[0]
    # Who shares a prefix gets no states of it, so pooling must not read any.
    most = min(row.pooled.index(True) for row in rows)
    return next((i for i in range(most) if any(row.ids[i] != first.ids[i] for row in rows)), most)


def shared_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two rows begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def cut_row(row: Row, key: Sequence[int]) -> tuple[Row, Row]:
    """A row whose text breaks off, and the rest of the text, which is all target; of a template that writes its text
    once.

    The ids stay those of the whole text. `key` decides the place, any as likely as another; a text with fewer than
    `LEAST_PART` tokens on either side of every place is not cut, and its rest has no target.
    """
    places = list(compress(range(len(row.ids)), row.target))
    if len(places) < 2 * LEAST_PART:
        return row, Row(row.ids[-1:], [True], [False])
    cut = int(np.random.default_rng(key).integers(LEAST_PART, len(places) - LEAST_PART + 1))
    gone = set(places[cut:])
    kept = [i not in gone for i in range(len(row.ids))]
    rest = [row.ids[i] for i in places[cut:]]
    prefix = Row(list(compress(row.ids, kept)), list(compress(row.pooled, kept)), list(compress(row.target, kept)))
    return prefix, Row(rest, [True] * len(rest), [True] * len(rest))


def select_rows(side: TokenBatch, chosen: Sequence[int], ends: Sequence[int] | None = None) -> TokenBatch:
    """The `chosen` rows of a packed side, in the order given.

    `ends` says where each of the side's texts ends, for a caller that selects thousands of times; else it is summed
    up.
    """
    if ends is None:
        ends = list(accumulate(side["lengths"]))

    def pick(flat: Tensor) -> Tensor:
        return torch.cat([flat[ends[i] - side["lengths"][i] : ends[i]] for i in chosen])

    selected: Any = {"closed": side["closed"]}
    selected["prefix"] = side["prefix"] if len(chosen) > 1 else 0  # some of the texts may share more, never less
    selected |= {name: pick(flat) for name, flat in side.items() if isinstance(flat, Tensor)}
    selected |= {name: [of[i] for i in chosen] for name, of in side.items() if isinstance(of, list)}  # one a text
    if "facts" in side:
        facts = side["facts"].items()  # a list as an index would be sent to the device, which the host waits for
        selected["facts"] = {name: torch.cat([values[i : i + 1] for i in chosen]) for name, values in facts}
    whole: TokenBatch = selected
    return whole


def targets_of(side: TokenBatch) -> Tensor:
    """The side's target tokens, text after text. Their number is known, so no device is asked for it."""
    (index,) = side["target_mask"].nonzero_static(size=sum(side["num_targets"])).unbind(1)
    return side["input_ids"][index]


def num_tokens(batch: Batch) -> int:
    """Tokens of a batch, all sides."""
    return sum(sum(side["lengths"]) for side in batch.values())


def starts_of(lengths: Sequence[int]) -> Tensor:
    """Index of each text's first token in the packed row."""
    return torch.tensor([0, *lengths]).cumsum(0)[:-1]


def positions_of(lengths: Sequence[int]) -> Tensor:
    """Position of each token in its text, from 0; all texts at once, as a loop over thousands would be slow."""
    number_of = np.asarray(lengths, dtype=np.int64)
    starts = np.repeat(number_of.cumsum() - number_of, number_of)
    return torch.from_numpy(np.arange(len(starts)) - starts)


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row indices, longest rows first, in batches of at most `max_tokens` tokens (at least a row)."""
    batches: list[list[int]] = []
    filled = max_tokens
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if filled + lengths[i] > max_tokens:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += lengths[i]
    return batches


def longest_first(texts: Sequence[InstructedText]) -> list[int]:
    """Places of texts by their number of characters."""
    return sorted(range(len(texts)), key=lambda i: -len(texts[i].instruction) - len(texts[i].text))


def batches_ahead(
    rows: RowTokenizer, texts: Sequence[InstructedText], batch_size: int
) -> Iterator[tuple[list[int], list[Row]]]:
    """Texts, longest first, in batches of `batch_size * TOKENS_PER_ROW` tokens: their places and rows.

    While some batches are with the model, the next are tokenised.
    """
    order, at_once = longest_first(texts), batch_size * ROWS_AHEAD
    slabs = [order[start : start + at_once] for start in range(0, len(order), at_once)]
    with ThreadPoolExecutor(max_workers=1) as background:
        pending = [background.submit(rows.rows, [texts[i] for i in slab]) for slab in slabs[:1]]
        for number, slab in enumerate(slabs):
            tokenised = pending.pop().result()
            if number + 1 < len(slabs):
                pending.append(background.submit(rows.rows, [texts[i] for i in slabs[number + 1]]))
            for batch in token_batches([len(row.ids) for row in tokenised], batch_size * TOKENS_PER_ROW):
                yield [slab[i] for i in batch], [tokenised[i] for i in batch]
