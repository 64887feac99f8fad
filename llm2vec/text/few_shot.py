"""Few-shot examples in training: other rows of a micro-batch, shown before a query (arXiv 2409.15700).

Which rows are shown is drawn from the seed and the micro-batch's own texts, so it depends neither on worker processes
nor on what was drawn before, and a micro-batch made of other rows draws anew. Examples get what a row's own text leaves
of its length (`RowTokenizer.rows`); the paper's code keeps 512 tokens free for the query instead, so that it never
shows any at a length of 512.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import pairwise

from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import Demonstration, Example, InstructedText, UserError

#: Draws for each example wanted, then a query gets fewer: those of a row that tells the answer are thrown away, and
#: where one label answers nearly all rows, most are.
MOST_DRAWS = 64


def with_examples(rows: Sequence[Example], most: int, seed: int) -> list[InstructedText]:
    """The query of each row of a micro-batch with 0 to `most` examples before it, each number as likely as the others.

    A row is never its own example, nor is one with the same query or the same positive, which would tell the answer; so
    there are fewer where few other rows may be shown. `seed` is the run's.
    """
    texts = "\n".join(f"{len(row.query.text)} {row.query.text} {row.positive.text}" for row in rows)
    digest = hashlib.sha256(f"{seed} {texts}".encode()).hexdigest()
    queries = []
    for i, row in enumerate(rows):
        generator = random.Random(f"{digest} {i}")
        wanted = generator.randint(0, most)
        chosen: list[int] = []
        for _ in range(MOST_DRAWS * wanted):
            place = generator.randrange(len(rows))
            other = rows[place]
            tells = other.query.text == row.query.text or other.positive.text == row.positive.text
            if place not in chosen and not tells:
                chosen.append(place)
                if len(chosen) == wanted:
                    break
        queries.append(row.query._replace(examples=tuple(_demonstration(rows[place]) for place in chosen)))
    return queries


def check_examples_fit(rows: Sequence[Example], tokenizer: RowTokenizer) -> None:
    """Refuse a template without a place for examples, and a length under which no query has room for one.

    Of the sampled rows each is shown as the next one's example, if that is of the same source.
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
