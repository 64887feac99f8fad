"""How the rows of a micro-batch become a batch: each side's texts, tokenised and packed.

`Collate` is what a run and a plan ask of a collator; `CollateSides` is that of the objectives over pairs of texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainingArguments

from llm2vec.text.batches import cut_row, pack_rows
from llm2vec.text.few_shot import check_examples_fit, with_examples
from llm2vec.text.tokenization import Row, RowTokenizer
from llm2vec.types import Batch, Example, InstructedText, UserError


class Collate(Protocol):
    """What makes the rows of a micro-batch into a batch."""

    @property
    def cut_at(self) -> int | None:
        """The length to which longer rows are cut; None = none is cut."""
        ...

    def all_rows(self, examples: Sequence[Any], /) -> list[Row]:
        """The tokenised rows of all sides."""
        ...

    def __call__(self, examples: list[Any], /) -> Batch:
        """Each side as a TokenBatch."""
        ...


@dataclasses.dataclass(frozen=True)
class CollateSides:
    """Examples of a micro-batch to its tokenised sides."""

    tokenizer: RowTokenizer  #: renders the rows
    #: what the objective reads of a row: `query`, `positive`, `negative`, `text` (query and positive as one).
    #: `query:document` is the query in the template's form for documents, and so on; `query:prefix` and
    #: `query:rest` are the query cut at a place that is drawn anew in each epoch
    sides: tuple[str, ...]
    examples_per_query: int = 0  #: most few-shot examples before a query
    seed: int = 0  #: of the run; decides which examples, and where texts are cut
    #: what else to tell of a side's texts, by name, each [texts]; None = nothing
    facts: Callable[[Sequence[Example], str], dict[str, Tensor]] | None = None
    text_tokenizer: RowTokenizer | None = None  #: renders the side `text` in place of `tokenizer`; None = it does not

    def __call__(self, examples: list[Example]) -> Batch:
        """Each side as a TokenBatch; K negatives a row become K * B rows, row by row. A side without texts is none."""
        batch: Batch = {side: pack_rows(rows) for side in self.sides if (rows := self.rows(examples, side))}
        if self.facts is not None:
            for side, tokens in batch.items():
                tokens["facts"] = self.facts(examples, side)
        return batch

    @property
    def cut_at(self) -> int:
        """The length to which longer rows are cut."""
        return self.tokenizer.max_length

    def all_rows(self, examples: Sequence[Example]) -> list[Row]:
        """The tokenised texts of all sides."""
        return [row for side in self.sides for row in self.rows(examples, side)]

    def rows(self, examples: Sequence[Example], side: str) -> list[Row]:
        """The tokenised texts of one side, in row order."""
        if side == "query" and self.examples_per_query:
            return self.tokenizer.rows(with_examples(examples, self.examples_per_query, self.seed))
        tokenizer = (self.text_tokenizer or self.tokenizer) if side == "text" else self.tokenizer
        name, _, part = side.partition(":")
        if part not in ("prefix", "rest"):
            return tokenizer.rows(self.texts(examples, side))
        rows = zip(tokenizer.rows(self.texts(examples, name)), examples, strict=True)
        cut = [cut_row(row, (self.seed, example.draw, name == "query")) for row, example in rows]
        return [prefix if part == "prefix" else rest for prefix, rest in cut]

    @staticmethod
    def texts(examples: Sequence[Example], side: str) -> list[InstructedText]:
        """The texts of one side, in row order."""
        if side == "negative":
            return [text for example in examples for text in example.negatives]
        if side == "text":
            return [InstructedText("", f"{e.query.text}\n\n{e.positive.text}") for e in examples]
        name, _, form = side.partition(":")
        texts = [getattr(example, name) for example in examples]
        return [text._replace(side=form) for text in texts] if form else texts


def check_examples(args: TrainingArguments, rows: Any, collate: CollateSides) -> None:
    """Refuse few-shot examples that no query would ever get: a process holds one row at a time, or they do not fit."""
    if not collate.examples_per_query:
        return
    if args.per_device_train_batch_size < 2:
        raise UserError(
            "examples_per_query: per_device_train_batch_size is 1, but examples are the other rows of a process's "
            "micro-batch; 2 or more are needed."
        )
    starts = range(0, len(rows) - 1, max(1, len(rows) // 128))  # about 256 rows, in neighbours
    check_examples_fit([rows[i] for start in starts for i in (start, start + 1)], collate.tokenizer)
