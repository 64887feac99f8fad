"""The words the whole package speaks: texts, rows, batches, modes, and what an objective promises.

Nothing here imports anything else of the package. Shapes are written as suffixes: B rows, T tokens, D hidden
size, V vocabulary, N documents of a gathered pool.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

from torch import Tensor

PoolingMode = Literal["last", "mean", "weighted_mean", "first"]
Attention = Literal["causal", "bidirectional"]
AttnImplementation = Literal["eager", "sdpa", "flash_attention_2"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
Reduction = Literal["token_mean", "micro_batch_mean"]
SymmetricInstructions = Literal["documented", "as_released"]

#: Spellings of the released configs and of upstream LLM2Vec, and the mode each one means.
POOLING_ALIASES: dict[str, PoolingMode] = {
    **{mode: mode for mode in get_args(PoolingMode)},
    "eos_token": "last",
    "last_token": "last",
    "bos_token": "first",
}


class UserError(ValueError):
    """Something a user wrote is wrong; the message is one sentence that says what and how to mend it."""


class InstructedText(NamedTuple):
    """A text and the instruction it is read under; an empty instruction means none."""

    instruction: str
    text: str


class Example(NamedTuple):
    """One training row. `negatives` holds one or more hard negatives; every row of a source has as many."""

    source: str
    query: InstructedText
    positive: InstructedText
    negatives: tuple[InstructedText, ...]


#: One tokenised side: `input_ids`, `attention_mask`, `pool_mask`, `target_mask`, each [B, T].
TokenBatch: TypeAlias = dict[str, Tensor]

#: What the collator yields: a TokenBatch for each of "query", "positive" and (Stage II) "negative".
Batch: TypeAlias = dict[str, TokenBatch]


@runtime_checkable
class Objective(Protocol):
    """A module that turns a micro-batch into loss parts.

    The trainer divides nothing itself: it asks `count` how many terms each part of each micro-batch holds, sums
    those over the whole optimiser step and all ranks, and hands the totals back to `forward`. So a loss is a mean
    over the step however the step was cut.
    """

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Number of loss terms (tokens, rows) this micro-batch adds to each loss part, as float scalars."""
        ...

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss parts: `loss` (what is differentiated) and any number of detached figures for the log.

        Every value is this micro-batch's share: shares summed over a step's micro-batches and ranks give the
        figure of the step.
        """
        ...
