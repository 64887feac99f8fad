"""What a step asks of the model: tokens of rows, counted in a sample of them or assumed; and operations.

Nothing is computed: an objective tells from a batch's lengths what it runs through the decoder (`Objective.passes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llm2vec.data.collation import Collate
from llm2vec.model.packing import inner_decoder
from llm2vec.model.settings import EncoderSettings
from llm2vec.training.config import Config
from llm2vec.training.rows import Rows, sample_of
from llm2vec.training.stages import stage_parts
from llm2vec.training.step import tokens_of_rows
from llm2vec.types import Attention, Batch, Objective, Pass, PassKind, TokenBatch

#: Rows of each source whose tokens are counted for the memory they take.
ROWS_OF_A_SOURCE = 32
#: By how many standard deviations a process's share of a step is taken to be longer than in the mean.
DEVIATIONS = 2.0


class Sample(NamedTuple):
    """Some rows of a source."""

    passes: tuple[Pass, ...]  #: of them all at once
    tokens_of_rows: tuple[int, ...]  #: of each row, all sides

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(self.tokens_of_rows)

    def tokens_of(self, num_rows: int) -> float:
        """Tokens that so many rows of the source hardly exceed."""
        mean, deviation = float(np.mean(self.tokens_of_rows)), float(np.std(self.tokens_of_rows))
        return num_rows * mean + DEVIATIONS * num_rows**0.5 * deviation


def counted(objective: Objective, rows: Rows, collate: Collate) -> list[Sample]:
    """A sample over all sources, and then one of each source."""
    samples, first = [_sample(objective, collate(sample_of(rows)))], 0
    for size in rows.sizes:
        chosen = np.random.default_rng(0).choice(size, min(size, ROWS_OF_A_SOURCE), replace=False)
        samples.append(_sample(objective, collate([rows[first + int(i)] for i in sorted(chosen)])))
        first += size
    return samples


def assumed(objective: Objective, settings: EncoderSettings, config: Config, query: int, document: int) -> list[Sample]:
    """The same where each query and each document is taken to have so many tokens."""
    return [_sample(objective, assumed_batch(config, settings, query, document))] * 2


def _sample(objective: Objective, batch: Batch) -> Sample:
    return Sample(objective.passes(batch), tuple(tokens_of_rows(batch)))


def assumed_batch(config: Config, settings: EncoderSettings, query: int, document: int, num_rows: int = 16) -> Batch:
    """A batch of the stage's sides with nothing but lengths in it, all of a text's tokens its targets.

    Each query has `query` tokens, each document `document`.
    """
    parts = stage_parts(config)
    if parts.rows == "blocks":
        masked = round(config.mlm_probability * config.max_seq_length)
        return {"text": _lengths(settings, num_rows, config.max_seq_length, masked)}
    batch = {}
    for side in parts.sides(dataclasses.replace(config, template=settings.template)):
        name, _, part = side.partition(":")
        texts = num_rows * (config.num_hard_negatives if name == "negative" else 1)
        tokens = query if name == "query" and parts.rows == "pairs" else document  # `texts` are their own positives
        if name == "text":
            tokens = min(query + document, config.max_seq_length)
        if part in ("prefix", "rest"):
            tokens = max(1, tokens // 2)
        batch[side] = _lengths(settings, texts, tokens, tokens)
    return batch


def _lengths(settings: EncoderSettings, num_texts: int, tokens: int, targets: int) -> TokenBatch:
    nothing = torch.zeros(0, dtype=torch.long)
    return {
        "input_ids": nothing,
        "lengths": [tokens] * num_texts,
        "pool_mask": nothing,
        "target_mask": nothing,
        "num_targets": [targets] * num_texts,
        "num_predicted": [targets] * num_texts,
        "num_different": [targets] * num_texts,
        "num_context": [tokens] * num_texts,
        "prefix": 0,
        "closed": settings.pooling_mode == "last",
    }


def useful_flops(model: Any, passes: Sequence[Pass]) -> float:
    """Floating-point operations that a training step of these passes cannot do without.

    A matrix costs 2 per weight and token forward, 2 for its inputs' gradient and 2 for its own, which a frozen one
    does not need. Attention costs its two products of each token with those it attends to, forward and twice that
    backward. Padding, recomputation and logits that no loss reads are not useful. What a shared prefix and a last
    layer at the closing tokens save is still counted, so that the figure depends on the texts alone. A pass that is
    only read has no backward pass. The model's weights may be on the meta device.
    """
    layers = inner_decoder(model).layers
    matrices = [module.weight for module in layers.modules() if isinstance(module, nn.Linear)]
    is_adapted = not all(weight.requires_grad for weight in matrices)
    total = 0.0
    for p in passes:
        # An adapter is off in a pass that is not trained.
        run = [w for w in matrices if p.kind == "trained" or not (is_adapted and w.requires_grad)]
        total += p.tokens * sum(_flops_of(weight, p.kind) for weight in run)
        pairs = sum(_pairs(length, p.attention) for length in p.lengths)
        total += (4.0 if p.kind == "read" else 12.0) * len(layers) * width_of_queries(model.config) * pairs
        if p.targets:
            total += p.targets * _flops_of(model.get_output_embeddings().weight, p.kind)
    return total


def width_of_queries(config: Any) -> int:
    """Numbers of all heads of a token's query together."""
    heads: int = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _flops_of(weight: Tensor, kind: PassKind) -> float:
    if kind == "read":
        return 2.0 * weight.numel()
    return (6.0 if kind == "trained" and weight.requires_grad else 4.0) * weight.numel()


def _pairs(length: int, attention: Attention) -> float:
    return length * (length + 1) / 2 if attention == "causal" else float(length**2)
