"""What the benchmark measures: each function here sets one variant up and hands back a step that is ready to run.

All variants of a case get the same rows and the same random weights: packed training steps (the package's own), the
release's and those of sentence-transformers (`reference.py`), encoding by both libraries, and plain matrix
products, whose speed is the ceiling of all of them. Rows are random token ids with the lengths of real queries and
documents; how fast a step is does not depend on what the tokens say.

Run by `benchmarks/benchmark.py` through `measure.py`, each in a process of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from benchmarks.measure import Meter, Runnable
from benchmarks.reference import (
    PaddedSide,
    features,
    pad,
    release_stage_I_loss,
    release_stage_II_loss,
    sentence_transformer,
    sentence_transformers_loss,
)
from llm2vec.llm2vec import LLM2Vec, as_instructed
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import LORA_MODULES, attach_lora, enable_checkpointing
from llm2vec.model.settings import EncoderSettings
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.quickstart.tiny import train_tokenizer
from llm2vec.text.batches import pack_rows
from llm2vec.text.tokenization import Row, render_instruction
from llm2vec.train.step import backward_step, split_batch
from llm2vec.types import Batch, TokenBatch

#: Of the weights, and of what is computed with them; `autocast` is float32 weights computed with in bfloat16.
Precision = Literal["float32", "bfloat16", "autocast"]

ALPHA = 0.2
LOSS_SCALE = 20.0
LORA_R, LORA_ALPHA = 16, 32
SETTINGS = EncoderSettings(pooling_mode="last", template="plain", attention="causal")
#: A chat header such as Llama-3's: the same tokens in front of every text, and one behind it.
HEADER, CLOSING = (1, 2, 3, 4, 5), 6
LONGEST_ROW = 512
QUERY_LENGTH = (24.0, 12.0)
DOCUMENT_LENGTH = (170.0, 90.0)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
ENCODE_BATCH = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a random Llama; the default is the one that docs/performance.md speaks of."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1408
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 32_000

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


@dataclass(frozen=True)
class EncodeCase:
    """[instruction, text] pairs, and the model that encodes them: its folder and its sizes."""

    folder: str
    shape: Shape
    pairs: tuple[tuple[str, str], ...]
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"


def _packed_step(case: Case, objective: Any, sides: Sequence[str]) -> Callable[[int], None]:
    batches = [packed_batch(case, i, sides) for i in _indices(case)]

    def step(i: int) -> None:
        with case.computing():
            backward_step(objective, batches[i], objective.count(batches[i]), max_tokens=case.max_tokens)

    return step


def _backward(case: Case, loss_of: Callable[[int], Tensor]) -> Callable[[int], None]:
    """A step from the loss of a batch."""

    def step(i: int) -> None:
        with case.computing():
            loss = loss_of(i)
        loss.backward()

    return step


# --- Stage I ---


def packed_stage_I(case: Case) -> Runnable:
    """The package's step."""
    model = random_model(case.shape, with_head=True, device=case.device, dtype=case.dtype)
    objective = BidirectionalReconstruction(model, SETTINGS, ALPHA)
    return _stage_I_work(case, _packed_step(case, objective, ("query", "positive")), model)


def release_stage_I(case: Case) -> Runnable:
    """Four passes padded on the left, checkpointed, with full logits."""
    model = random_model(case.shape, with_head=True, device=case.device, dtype=case.dtype)
    enable_checkpointing(model, {"use_reentrant": False})
    batches = []
    for i in _indices(case):
        query, document = (random_rows(case, side, i) for side in ("query", "positive"))
        whole = [pad([row.ids for row in side], case.device, left=True) for side in (query, document)]
        texts = [pad([_target_ids(row) for row in side], case.device, left=True) for side in (query, document)]
        batches.append((whole[0], whole[1], texts[0], texts[1]))

    step = _backward(case, lambda i: release_stage_I_loss(model, *batches[i], alpha=ALPHA))
    return _stage_I_work(case, step, model)


def _stage_I_work(case: Case, step: Callable[[int], None], model: Any) -> Runnable:
    flops, tokens = [], []
    for i in range(case.batches):
        rows = [*random_rows(case, "query", i), *random_rows(case, "positive", i)]
        encoded, targets = [len(row.ids) for row in rows], [sum(row.target) for row in rows]
        flops.append(training_flops(case.shape, [*encoded, *targets], num_targets=sum(targets)))
        tokens.append(sum(encoded))
    return Runnable(step, case.device, flops, tokens, model)


# --- Stage II ---

_TRIPLE = ("query", "positive", "negative")


def packed_stage_II(case: Case) -> Runnable:
    """The package's step; with `max_tokens`, its gradients are cached."""
    model = random_lora(case)
    objective = ContrastiveLearning(model, SETTINGS, LOSS_SCALE)
    return _stage_II_work(case, _packed_step(case, objective, _TRIPLE), model)


def largest_micro_batch(case: Case) -> int:
    """Tokens of the largest one that `packed_stage_II` makes of its first batch."""
    pieces = split_batch(packed_batch(replace(case, device="cpu"), 0, _TRIPLE), case.max_tokens)
    return max(sum(sum(side["lengths"]) for side in piece.values()) for piece in pieces)


def release_stage_II(case: Case) -> Runnable:
    """Three passes padded on the left, checkpointed."""
    model = random_lora(case)
    enable_checkpointing(model, {"use_reentrant": False})
    batches = _padded_triples(case, left=True)
    return _stage_II_work(case, _backward(case, lambda i: release_stage_II_loss(model, batches[i], LOSS_SCALE)), model)


def sentence_transformers_stage_II(case: Case) -> Runnable:
    """What sentence-transformers' trainer runs: its loss over a batch padded on the right, and backward."""
    model = sentence_transformer(case.folder, case.dtype, case.device)
    model.add_adapter(
        LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=list(LORA_MODULES), bias="none")
    )
    _fill_lora(model, case)
    model.train()
    loss_of = sentence_transformers_loss(model, LOSS_SCALE)
    batches = _padded_triples(case, left=False)
    step = _backward(case, lambda i: loss_of([features(side) for side in batches[i]], None))
    return _stage_II_work(case, step, model)


def _padded_triples(case: Case, *, left: bool) -> list[list[PaddedSide]]:
    """The sides of each batch, padded."""

    def padded(side: str, index: int) -> PaddedSide:
        return pad([row.ids for row in random_rows(case, side, index)], case.device, left=left)

    return [[padded(side, i) for side in _TRIPLE] for i in _indices(case)]


def _stage_II_work(case: Case, step: Callable[[int], None], model: Any) -> Runnable:
    flops, tokens = [], []
    for i in range(case.batches):
        lengths = [len(row.ids) for side in _TRIPLE for row in random_rows(case, side, i)]
        flops.append(training_flops(case.shape, lengths, lora_r=LORA_R))
        tokens.append(sum(lengths))
    return Runnable(step, case.device, flops, tokens, model)


# --- Encoding ---


def encode_ours(case: EncodeCase) -> Runnable:
    """`LLM2Vec.encode`."""
    model = LLM2Vec.from_pretrained(
        case.folder,
        enable_bidirectional=False,
        pooling_mode="last",
        template="llama3",
        instruction_join="; ",
        torch_dtype=case.dtype,
    )
    lengths = [len(row.ids) for row in model.row_tokenizer.rows(as_instructed(case.pairs))]

    def step(_: int) -> Tensor:
        vectors = model.encode(case.pairs, batch_size=ENCODE_BATCH, show_progress_bar=False, device=case.device)
        return torch.as_tensor(vectors)

    return _encoding_work(case, step, lengths)


def encode_sentence_transformers(case: EncodeCase) -> Runnable:
    """`SentenceTransformer.encode`, over the same characters."""
    model = sentence_transformer(case.folder, getattr(torch, case.dtype), case.device)
    header = "<|start_header_id|>user<|end_header_id|>\n\n"
    texts = [f"{header}{render_instruction(i, '; ')}{text}<|eot_id|>" for i, text in case.pairs]
    lengths = [len(ids) for ids in model.tokenizer(texts)["input_ids"]]

    def step(_: int) -> Tensor:
        vectors: Tensor = model.encode(texts, batch_size=ENCODE_BATCH, convert_to_tensor=True, show_progress_bar=False)
        return vectors

    return _encoding_work(case, step, lengths)


def _encoding_work(case: EncodeCase, step: Callable[[int], Tensor], lengths: Sequence[int]) -> Runnable:
    forward = training_flops(case.shape, lengths) / 3  # of a training step's three thirds
    return Runnable(step, case.device, [forward], [sum(lengths)])


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


# --- The ceiling ---


def matrix_product(case: Case) -> Runnable:
    """The fastest of a cube and the two products of the model's MLP, in the dtype that the case computes in."""
    dtype = torch.float32 if case.precision == "float32" else torch.bfloat16
    cube, d, m = 4 * case.shape.hidden, case.shape.hidden, case.shape.intermediate
    meter = Meter(case.device)

    def product(rows: int, inner: int, columns: int) -> tuple[float, Callable[[], Any], float]:
        left, right = (torch.randn(size, device=case.device).to(dtype) for size in ((rows, inner), (inner, columns)))
        out = torch.empty(rows, columns, device=case.device, dtype=dtype)
        flops = 2.0 * rows * inner * columns
        times = []
        for _ in range(4):
            start = meter.now()
            torch.mm(left, right, out=out)
            times.append(meter.now() - start)
        return flops / min(times), lambda: torch.mm(left, right, out=out), flops

    rate, run, flops = max((product(cube, *sizes) for sizes in ((cube, cube), (d, m), (m, d))), key=lambda p: p[0])
    number = max(1, round(0.05 * rate / flops))  # long enough that reading the clock costs nothing

    def step(_: int) -> None:
        for _ in range(number):
            run()

    return Runnable(step, case.device, [number * flops], [0], repeats=5)


def training_flops(shape: Shape, lengths: Sequence[int], *, num_targets: int = 0, lora_r: int | None = None) -> float:
    """Floating-point operations that a training step over these texts cannot do without.

    A matrix costs 2 per weight and token forward, 2 for its inputs' gradient and 2 for its own, which a frozen one does
    not need. Attention costs its two products of each token with itself and those before it, forward and twice that
    backward. Padding, recomputation and logits that no loss reads are not useful. What a shared prefix and a last layer
    at the closing tokens save is still counted, so that the figure depends on the texts alone.

    Args:
        shape: of the model.
        lengths: tokens of every text of every pass; the anchor in front of a reconstruction counts as one.
        num_targets: positions that the vocabulary projection is needed at.
        lora_r: rank of a LoRA adapter on all projections, the rest being frozen; None = everything is trained.
    """
    body = shape.layers * sum(rows * columns for rows, columns in shape.projections)
    per_token = 6.0 * body
    if lora_r is not None:
        per_token = 4.0 * body + 6.0 * shape.layers * lora_r * sum(sum(sizes) for sizes in shape.projections)
    head = 6.0 * shape.hidden * shape.vocabulary * num_targets
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return per_token * sum(lengths) + head + 12.0 * shape.layers * shape.hidden * pairs


# --- Models and rows ---


def random_model(shape: Shape, *, with_head: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A random Llama in training mode; the same weights every time."""
    model_class: Any = LlamaForCausalLM if with_head else LlamaModel
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return model_class(shape.config()).to(dtype).train()


def random_lora(case: Case) -> Any:
    """The decoder with a LoRA adapter on all projections that is not zero; adapter and base in one dtype."""
    base = random_model(case.shape, with_head=False, device=case.device, dtype=case.dtype)
    model = attach_lora(base, r=LORA_R, alpha=LORA_ALPHA, dropout=0.0)
    _fill_lora(model, case)
    return model.train()


def _fill_lora(model: Any, case: Case) -> None:
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


def _target_ids(row: Row) -> list[int]:
    return [token for token, wanted in zip(row.ids, row.target, strict=True) if wanted]


def packed_batch(case: Case, index: int, sides: Sequence[str]) -> Batch:
    """The sides of batch number `index`, each laid end to end."""
    batch: Batch = {}
    for side in sides:
        packed = pack_rows(random_rows(case, side, index))
        moved = {name: v.to(case.device) if isinstance(v, Tensor) else v for name, v in packed.items()}
        batch[side] = cast(TokenBatch, moved)
    return batch


def _indices(case: Case) -> list[int]:
    """Of all batches; the tiny one stands last, where -1 finds it."""
    return [*range(case.batches), -1]
