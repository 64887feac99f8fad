"""What an objective makes of a batch, as passes through the decoder, and how many operations those take.

Nothing is computed: passes are read off the batch's lengths. `plan` reckons with them before a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.embed import drops_out
from llm2vec.model.packing import inner_decoder
from llm2vec.model.settings import EncoderSettings
from llm2vec.objectives.mntp import MaskedNextTokenPrediction
from llm2vec.objectives.token_set import TokenSetPrediction
from llm2vec.types import Attention, Batch, TokenBatch


class Pass(NamedTuple):
    """Texts that run through the decoder together.

    Attributes:
        lengths: tokens of each text.
        attention: of each text within itself.
        prefixes: of each side, how many texts it has and how many tokens they all begin with.
        closing_only: only the states of the texts' last tokens are read.
    """

    lengths: tuple[int, ...]
    attention: Attention
    prefixes: tuple[tuple[int, int], ...] = ()
    closing_only: bool = False

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(self.lengths)

    @property
    def repeated(self) -> int:
        """Tokens that need not run where each shared prefix runs once."""
        return sum((number - 1) * prefix for number, prefix in self.prefixes)


class Work(NamedTuple):
    """What a batch asks of the model.

    Attributes:
        passes: through the decoder.
        targets: states that are multiplied with the vocabulary.
    """

    passes: tuple[Pass, ...]
    targets: int = 0


def work_of(objective: Any, settings: EncoderSettings, batch: Batch) -> Work:
    """The passes that an objective runs over a batch; of the batch only lengths and counts are read."""
    drops = drops_out(objective.model)
    if isinstance(objective, BidirectionalReconstruction):
        used = [d for d, weight in zip(objective.directions, objective.weights, strict=True) if weight > 0]
        sources = {d.source: batch[d.source] for d in used}
        targets = tuple(n for d in used for n in batch[d.goal]["num_targets"] if n)
        return Work((_embedding(settings, list(sources.values()), drops), Pass(targets, "causal")), sum(targets))
    if isinstance(objective, TokenSetPrediction):
        reading = Pass(tuple(n for side in batch.values() for n in side["lengths"]), "causal")
        modelled = sum(sum(batch[name]["num_targets"]) for name in ("query_self", "positive_self"))
        return Work((reading,), modelled + sum(int(side["pool_mask"].sum()) for side in batch.values()))
    embedded = [side for name, side in batch.items() if name != "text"]
    passes = [_embedding(settings, embedded, drops)] if embedded else []
    if "text" not in batch:
        return Work(tuple(passes))
    attention: Attention = "bidirectional" if isinstance(objective, MaskedNextTokenPrediction) else "causal"
    text = Pass(tuple(batch["text"]["lengths"]), attention)
    return Work((*passes, text), sum(batch["text"]["num_targets"]))


def _embedding(settings: EncoderSettings, sides: Sequence[TokenBatch], drops: bool) -> Pass:
    """The one pass that embeds all sides (`llm2vec.embed`)."""
    return Pass(
        tuple(length for side in sides for length in side["lengths"]),
        settings.attention,
        () if drops else tuple((len(side["lengths"]), side["prefix"]) for side in sides),
        settings.pooling_mode == "last" and all(side["closed"] for side in sides),
    )


def useful_flops(model: Any, work: Work) -> float:
    """Floating-point operations that a training step of this work cannot do without.

    A matrix costs 2 per weight and token forward, 2 for its inputs' gradient and 2 for its own, which a frozen one
    does not need. Attention costs its two products of each token with those it attends to, forward and twice that
    backward. Padding, recomputation and logits that no loss reads are not useful. What a shared prefix and a last
    layer at the closing tokens save is still counted, so that the figure depends on the texts alone.

    Args:
        model: with or without head and adapter; its weights may be on the meta device.
        work: of the step.
    """
    layers = inner_decoder(model).layers
    per_token = sum((_flops_of(m.weight) for m in layers.modules() if isinstance(m, nn.Linear)), 0.0)
    pairs = sum(_pairs(length, p.attention) for p in work.passes for length in p.lengths)
    head = model.get_output_embeddings() if work.targets else None
    of_head = 0.0 if head is None else _flops_of(head.weight) * work.targets
    attention = 12.0 * len(layers) * width_of_queries(model.config)
    return per_token * sum(p.tokens for p in work.passes) + of_head + attention * pairs


def width_of_queries(config: Any) -> int:
    """Numbers of all heads of a token's query together."""
    heads: int = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _flops_of(weight: Tensor) -> float:
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()


def _pairs(length: int, attention: Attention) -> float:
    return length * (length + 1) / 2 if attention == "causal" else float(length**2)
