"""What the benchmark measures on: random Llamas, and rows of random tokens with the lengths of real texts.

    case = Case(Shape(), rows=8)
    batch = packed_batch(case, 0, ("query", "positive"))

The same weights and the same rows every time. How fast a step is does not depend on what the tokens say.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llm2vec.model.backbone import attach_lora
from llm2vec.quickstart.tiny import train_tokenizer
from llm2vec.text.batches import pack_rows
from llm2vec.text.tokenization import Row
from llm2vec.types import Batch, TokenBatch

#: Of the weights, and of what is computed with them; `autocast` is float32 weights computed with in bfloat16.
Precision = Literal["float32", "bfloat16", "autocast"]


LORA_R = 16
LORA_ALPHA = 32
#: A chat header such as Llama-3's: the same tokens in front of every text, and one behind it.
HEADER = (1, 2, 3, 4, 5)
CLOSING = 6
LONGEST_ROW = 512
QUERY_LENGTH = (24.0, 12.0)
DOCUMENT_LENGTH = (170.0, 90.0)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class Shape:
    """Sizes of a random Llama, or of the one in the folder `base`; the default is that of docs/performance.md."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1408
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 32_000
    base: str = ""

    @classmethod
    def of(cls, folder: str) -> Shape:
        """Of a Llama in a folder; any model that is built as Llama is goes."""
        c = AutoConfig.from_pretrained(folder)
        kv_heads = c.num_key_value_heads
        sizes = (c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads, kv_heads, c.vocab_size)
        return cls(*sizes, folder)

    @property
    def projections(self) -> list[tuple[int, int]]:
        """Input and output width of a layer's seven matrices."""
        d, kv, m = self.hidden, self.hidden * self.kv_heads // self.heads, self.intermediate
        return [(d, d), (d, kv), (d, kv), (d, d), (d, m), (d, m), (m, d)]

    def config(self) -> LlamaConfig:
        """The same for transformers; input and output embeddings are not tied."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=False,
        )


@dataclass(frozen=True)
class Case:
    """One thing to be measured, the same for all its variants.

    Attributes:
        shape: of the model.
        rows: queries of a batch, each with a positive (and in Stage II a negative).
        precision: of weights and computation.
        device: `cpu` or `cuda`.
        batches: how many different ones; round i runs number i.
        document_length: mean and standard deviation, tokens of a row; deviation 0 makes all equally long.
        max_tokens: tokens that the packed steps run at once; None = the whole batch.
        folder: a model that `write_model` wrote, for what loads its model from a folder.
    """

    shape: Shape
    rows: int = 8
    precision: Precision = "float32"
    device: str = "cpu"
    batches: int = 1
    document_length: tuple[float, float] = DOCUMENT_LENGTH
    max_tokens: int | None = None
    folder: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def computing(self) -> AbstractContextManager[Any]:
        """Within it, the forward pass runs in the case's precision."""
        return torch.autocast(self.device, torch.bfloat16) if self.precision == "autocast" else nullcontext()


class InHalf:
    """An objective as the trainer calls it under `bf16`: its passes in autocast; the loss between vectors, and what is
    differentiated, outside of it."""

    def __init__(self, objective: Any, computing: AbstractContextManager[Any]) -> None:
        self.module = objective
        self._computing = computing

    def __call__(self, batch: Batch, totals: dict[str, Tensor]) -> Any:
        with self._computing:
            return self.module(batch, totals)


def random_words() -> list[str]:
    """3,000 words to make texts and a tokenizer of."""
    generator = random.Random(0)
    return ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(3000)]


def random_pairs(number: int, length: tuple[float, float], instruction: str = "") -> tuple[tuple[str, str], ...]:
    """[instruction, text] pairs; a word is nearly a token."""
    generator = random.Random(number)
    words = random_words()
    lengths = [random_length(generator, length, 3, LONGEST_ROW - 32) for _ in range(number)]
    return tuple((instruction, " ".join(generator.choices(words, k=of_text))) for of_text in lengths)


def write_model(folder: Path, shape: Shape, *, with_head: bool = False) -> None:
    """A random decoder, and a tokenizer, in a folder."""
    random_model(shape, with_head=with_head).save_pretrained(folder)
    words = [f" {word}" for word in random_words()]
    train_tokenizer(words, min(8000, shape.vocabulary)).save_pretrained(folder)


def random_model(shape: Shape, *, with_head: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A Llama in training mode: the shape's base, or a random one with the same weights every time."""
    if shape.base:
        loaded: Any = AutoModelForCausalLM if with_head else AutoModel
        return loaded.from_pretrained(shape.base, dtype=dtype).to(device).train()
    model_class: Any = LlamaForCausalLM if with_head else LlamaModel
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return model_class(shape.config()).to(dtype).train()


def random_lora(case: Case) -> Any:
    """The decoder with a LoRA adapter on all projections that is not zero; adapter and base in one dtype."""
    base = random_model(case.shape, with_head=False, device=case.device, dtype=case.dtype)
    model = attach_lora(base, r=LORA_R, alpha=LORA_ALPHA, dropout=0.0)
    fill_lora(model, case)
    return model.train()


def fill_lora(model: Any, case: Case) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.empty(parameter.shape).normal_(std=0.02, generator=generator).to(parameter.device)
    model.to(case.dtype)


def random_length(generator: random.Random, length: tuple[float, float], lowest: int, highest: int) -> int:
    """A lognormal length of that mean and standard deviation, cut to the bounds."""
    mean, deviation = length
    variance = math.log(1 + (deviation / mean) ** 2)
    drawn = generator.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))
    return max(lowest, min(highest, round(drawn)))


def random_rows(case: Case, side: str, index: int) -> list[Row]:
    """Rows of one side of batch number `index`: header, random text, closing token. Number -1 is tiny."""
    generator = random.Random(f"{side} {index}")
    rows = []
    words = list(range(CLOSING + 1, case.shape.vocabulary))  # no new numbers for each text: a pool's would be 30 MB
    shortest = len(HEADER) + 2
    length = QUERY_LENGTH if side == "query" else case.document_length
    for _ in range(case.rows if index >= 0 else 2):
        tokens = random_length(generator, length, shortest, LONGEST_ROW) if index >= 0 else shortest + 2
        text = generator.choices(words, k=tokens - shortest + 1)
        around = [False] * len(HEADER)
        rows.append(
            Row(
                [*HEADER, *text, CLOSING],
                [*around, *[True] * (len(text) + 1)],
                [*around, *[True] * len(text), False],
            )
        )
    return rows


def packed_batch(case: Case, index: int, sides: Sequence[str]) -> Batch:
    """The sides of batch number `index`, each laid end to end."""
    batch: Batch = {}
    for side in sides:
        packed = pack_rows(random_rows(case, side, index))
        moved = {name: v.to(case.device) if isinstance(v, Tensor) else v for name, v in packed.items()}
        batch[side] = cast(TokenBatch, moved)
    return batch


def batch_indices(case: Case) -> list[int]:
    """Of all batches; the tiny one stands last, where -1 finds it."""
    return [*range(case.batches), -1]
