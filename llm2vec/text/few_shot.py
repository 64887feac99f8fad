"""Few-shot examples in training: other rows of a micro-batch, shown before a query (arXiv 2409.15700).

Which rows are shown is drawn from the seed and the micro-batch's own texts, so it depends neither on worker processes
nor on what was drawn before, and a micro-batch made of other rows draws anew. Examples get what a row's own text leaves
of its length (`RowTokenizer.rows`); the paper's code keeps 512 tokens free for the query instead, so that it never
shows any at a length of 512.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise

from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import Demonstration, Example, InstructedText, UserError


def with_examples(rows: Sequence[Example], most: int, seed: int) -> list[InstructedText]:
    """Each row's query with 0 to `most` examples before it, each number as likely as the others.

    A row is never its own example, nor is one with the same query or the same positive, which would tell the answer.

    Args:
        rows: of one micro-batch.
        most: examples a query; fewer where there are fewer other rows.
        seed: of the run.
    """
    texts = "\n".join(f"{len(row.query.text)} {row.query.text} {row.positive.text}" for row in rows)
    digest = hashlib.sha256(f"{seed} {texts}".encode()).hexdigest()
    of_query = _places(row.query.text for row in rows)
    of_positive = _places(row.positive.text for row in rows)
    of_both = _places((row.query.text, row.positive.text) for row in rows)
    queries = []
    for i, row in enumerate(rows):
        barred = of_query[row.query.text], of_positive[row.positive.text], of_both[row.query.text, row.positive.text]
        num_others = _others_before(len(rows), *barred)
        generator = random.Random(f"{digest} {i}")
        chosen = generator.sample(range(num_others), min(generator.randint(0, most), num_others))
        # Of the rows that may be shown only those drawn are looked up: all of them, for each row, would be a list as
        # long as the micro-batch.
        places = [bisect_left(range(len(rows)), n + 1, key=lambda i: _others_before(i + 1, *barred)) for n in chosen]
        queries.append(row.query._replace(examples=tuple(_demonstration(rows[place]) for place in places)))
    return queries


def _places(keys: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    """Where each key stands, in rising order."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        places[key].append(i)
    return places


def _others_before(end: int, of_query: Sequence[int], of_positive: Sequence[int], of_both: Sequence[int]) -> int:
    """How many of the places before `end` have neither a row's query nor its positive."""
    with_one = bisect_right(of_query, end - 1) + bisect_right(of_positive, end - 1)
    return end - with_one + bisect_right(of_both, end - 1)


def check_examples_fit(rows: Sequence[Example], tokenizer: RowTokenizer) -> None:
    """Refuse a length under which no query has room for an example.

    Args:
        rows: a sample, each shown as the next one's example if it is of the same source.
        tokenizer: renders them.

    Raises:
        UserError: the template has no place for examples, or not one of the sampled queries has room for one.
    """
    if not tokenizer.takes_examples:
        raise UserError(
            f"examples_per_query: template {tokenizer.template!r} has no place for few-shot examples; "
            "choose another template or take the key out."
        )
    pairs = [(a, b) for a, b in pairwise(rows) if a.source == b.source]
    bare = tokenizer.rows([row.query for _, row in pairs])
    shown = tokenizer.rows([row.query._replace(examples=(_demonstration(other),)) for other, row in pairs])
    if pairs and all(len(a.ids) == len(b.ids) for a, b in zip(bare, shown, strict=True)):
        raise UserError(
            f"examples_per_query: not one of {len(pairs)} sampled queries has room for an example within "
            f"max_seq_length {tokenizer.max_length}; raise it, or take examples_per_query out."
        )


def _demonstration(row: Example) -> Demonstration:
    return Demonstration(row.query.instruction, row.query.text, row.positive.text)
