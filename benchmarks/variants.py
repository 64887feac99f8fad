"""What the benchmark measures: each function here sets one variant up and hands back a step that is ready to run.

All variants of a case get the same rows and the same random weights (`inputs.py`): packed training steps (the package's
own), the release's and those of sentence-transformers (`reference.py`), encoding by both libraries, and plain matrix
products, whose speed is the ceiling of all of them.

Run by `benchmarks/benchmark.py` through `measure.py`, each in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor

from benchmarks.inputs import (
    LORA_ALPHA,
    LORA_R,
    Case,
    InHalf,
    Shape,
    batch_indices,
    fill_lora,
    packed_batch,
    random_lora,
    random_model,
    random_rows,
)
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
from llm2vec.llm2vec import LLM2Vec
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import LORA_MODULES
from llm2vec.model.settings import EncoderSettings
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.text.entries import as_instructed
from llm2vec.text.templates import bare_instruction
from llm2vec.text.tokenization import Row
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.training.step import backward_step, split_batch
from llm2vec.types import Batch

ALPHA = 0.2
LOSS_SCALE = 20.0
SETTINGS = EncoderSettings(pooling_mode="last", template="plain", attention="causal")
ENCODE_BATCH = 32


@dataclass(frozen=True)
class EncodeCase:
    """[instruction, text] pairs, and the model that encodes them: its folder and its sizes."""

    folder: str
    shape: Shape
    pairs: tuple[tuple[str, str], ...]
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"


def _packed_step(case: Case, objective: Any, sides: Sequence[str]) -> Callable[[int], None]:
    return step_over(case, objective, [packed_batch(case, i, sides) for i in batch_indices(case)])


def step_over(case: Case, objective: Any, batches: Sequence[Batch]) -> Callable[[int], None]:
    """A step of an objective over one of some packed batches."""

    def step(i: int) -> None:
        called: Any = InHalf(objective, case.computing())
        backward_step(called, batches[i], objective.count(batches[i]), max_tokens=case.max_tokens)

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
    for i in batch_indices(case):
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
    fill_lora(model, case)
    model.train()
    loss_of = sentence_transformers_loss(model, LOSS_SCALE)
    batches = _padded_triples(case, left=False)
    step = _backward(case, lambda i: loss_of([features(side) for side in batches[i]], None))
    return _stage_II_work(case, step, model)


def _padded_triples(case: Case, *, left: bool) -> list[list[PaddedSide]]:
    """The sides of each batch, padded."""

    def padded(side: str, index: int) -> PaddedSide:
        return pad([row.ids for row in random_rows(case, side, index)], case.device, left=left)

    return [[padded(side, i) for side in _TRIPLE] for i in batch_indices(case)]


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
    openings = (f"{header}{bare_instruction(i, '; ')}; " if i else header for i, _ in case.pairs)
    texts = [f"{opening}{text}<|eot_id|>" for opening, (_, text) in zip(openings, case.pairs, strict=True)]
    lengths = [len(ids) for ids in model.tokenizer(texts)["input_ids"]]

    def step(_: int) -> Tensor:
        vectors: Tensor = model.encode(texts, batch_size=ENCODE_BATCH, convert_to_tensor=True, show_progress_bar=False)
        return vectors

    return _encoding_work(case, step, lengths)


def _encoding_work(case: EncodeCase, step: Callable[[int], Tensor], lengths: Sequence[int]) -> Runnable:
    forward = training_flops(case.shape, lengths) / 3  # of a training step's three thirds
    return Runnable(step, case.device, [forward], [sum(lengths)])


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


def _target_ids(row: Row) -> list[int]:
    return [token for token, wanted in zip(row.ids, row.target, strict=True) if wanted]
