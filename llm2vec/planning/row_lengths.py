"""How many tokens a run's rows have: counted in a sample of them, or assumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from llm2vec.data.collation import Collate
from llm2vec.model.settings import EncoderSettings
from llm2vec.planning.work import Work, work_of
from llm2vec.train.config import Config
from llm2vec.train.rows import Rows, sample_of
from llm2vec.train.stages import sides_of
from llm2vec.types import Batch, TokenBatch

#: Rows of each source whose tokens are counted for the memory they take.
ROWS_OF_A_SOURCE = 32
#: By how many standard deviations a process's share of a step is taken to be longer than in the mean.
DEVIATIONS = 2.0


class Texts(NamedTuple):
    """Some rows of a source.

    Attributes:
        work: that they ask of the model.
        tokens_of_rows: of each row, all sides.
    """

    work: Work
    tokens_of_rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(self.tokens_of_rows)

    def tokens_of(self, num_rows: int) -> float:
        """Tokens that so many rows of the source hardly exceed."""
        return num_rows * float(np.mean(self.tokens_of_rows)) + DEVIATIONS * num_rows**0.5 * float(
            np.std(self.tokens_of_rows)
        )


def counted(objective: Any, settings: EncoderSettings, rows: Rows, collate: Collate) -> list[Texts]:
    """A sample over all sources, and then one of each source."""
    return [_texts(objective, settings, batch) for batch in _batches(rows, collate)]


def assumed(objective: Any, settings: EncoderSettings, config: Config, query: int, document: int) -> list[Texts]:
    """The same where each query and each document is taken to have so many tokens."""
    return [_texts(objective, settings, assumed_batch(config, settings, query, document))] * 2


def _texts(objective: Any, settings: EncoderSettings, batch: Batch) -> Texts:
    num_rows = len(batch[next(iter(batch))]["lengths"])
    of_sides = [np.reshape(side["lengths"], (num_rows, -1)).sum(axis=1) for side in batch.values()]
    return Texts(work_of(objective, settings, batch), tuple(np.sum(of_sides, axis=0).tolist()))


def _batches(rows: Rows, collate: Collate) -> Iterator[Batch]:
    yield collate(sample_of(rows))
    first = 0
    for size in rows.sizes:
        chosen = np.random.default_rng(0).choice(size, min(size, ROWS_OF_A_SOURCE), replace=False)
        yield collate([rows[first + int(i)] for i in sorted(chosen)])
        first += size


def assumed_batch(config: Config, settings: EncoderSettings, query: int, document: int, num_rows: int = 16) -> Batch:
    """A batch of the stage's sides with nothing but lengths in it, all of a text's tokens its targets.

    Args:
        config: of the run.
        settings: how texts become vectors.
        query: tokens of each query.
        document: tokens of each document.
        num_rows: how many rows.
    """
    if config.stage == "mntp":
        masked = round(config.mlm_probability * config.max_seq_length)
        return {"text": _lengths(settings, num_rows, config.max_seq_length, masked)}
    if config.stage == "stage_I" and config.objective == "token_set":
        lengths = {"query_self": query, "query_next": query, "positive_self": document, "positive_next": document}
    else:
        text = min(query + document, config.max_seq_length)
        of_sides = {"query": query, "positive": document, "negative": document, "text": text}
        if config.stage == "simcse":
            of_sides["query"] = document  # each text is its own positive
        lengths = {side: of_sides[side] for side in sides_of(config)}
    times = {"negative": config.num_hard_negatives}
    return {side: _lengths(settings, num_rows * times.get(side, 1), n, n) for side, n in lengths.items()}


def _lengths(settings: EncoderSettings, num_texts: int, tokens: int, targets: int) -> TokenBatch:
    nothing = torch.zeros(0, dtype=torch.long)
    return {
        "input_ids": nothing,
        "lengths": [tokens] * num_texts,
        "pool_mask": nothing,
        "target_mask": nothing,
        "num_targets": [targets] * num_texts,
        "prefix": 0,
        "closed": settings.pooling_mode == "last",
    }
