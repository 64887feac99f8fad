"""What a step is reckoned to keep and hold is what it keeps and holds: tensor by tensor, and as a process's memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import every_objective
import pytest
import reference
import torch
from helpers import WORDS, family_tokenizer, tiny_model, write_jsonl
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from benchmarks.inputs import Shape
from benchmarks.variants import training_flops as bench_flops
from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model import packed_attention
from llm2vec.model.backbone import attach_lora
from llm2vec.model.packing import checkpoint_contexts, packed_hidden_states
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.losses import linear_cross_entropy
from llm2vec.objectives.token_set import token_set_loss
from llm2vec.planning.activations import Numbers, kept_by_layer, reckoned_bytes
from llm2vec.planning.memory import Step, memory_of
from llm2vec.planning.plan import Conditions, make_plan
from llm2vec.planning.work import useful_flops
from llm2vec.text import batches
from llm2vec.training.model import set_attention_dropout
from llm2vec.training.recomputation import enable_checkpointing, measured_bytes, tokens_run
from llm2vec.training.step import backward_step, split_batch
from llm2vec.types import Batch, Pass

ROOT = Path(__file__).parents[2]
ROWS = reference.examples(24, 1)
LAYERS = 4
TEMPLATES = {"llama": "llama3", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen2", "gemma": "gemma"}


@pytest.fixture(autouse=True)
def short_texts_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows here are a few words long."""
    monkeypatch.setattr(batches, "LEAST_PART", 2)


def arguments(**keys: Any) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, **keys)


def make(
    stage: str,
    dtype: torch.dtype = torch.float32,
    *,
    family: str = "llama",
    dropout: float = 0.05,
    settings: EncoderSettings | None = None,
    **shape: Any,
) -> tuple[Any, CollateSides]:
    """Stage I over all weights, or Stage II over an adapter; wide enough for what is not counted not to matter."""
    first = stage == "stage_I"
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8}
    model: Any = tiny_model(family, first, dtype, **(sizes | shape))
    if not first:
        model = attach_lora(model.requires_grad_(False), r=4, alpha=8, dropout=dropout)
    settings = settings or EncoderSettings(pooling_mode="last", attention="causal", template=TEMPLATES[family])
    sides: Any = ("query", "positive") if first else ("query", "positive", "negative")
    objective = BidirectionalReconstruction(model, settings) if first else ContrastiveLearning(model, settings)
    return objective.train(), CollateSides(row_tokenizer(family_tokenizer(family), settings), sides)


# --- which passes ---


def passes_run(objective: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What an objective hands to `packed_hidden_states`: lengths, attention, prefixes, and whether closings alone."""
    called: list[tuple[Any, ...]] = []

    def noted(model: Any, attention: Any, lengths: Any, embeddings: Tensor, **options: Any) -> Tensor:
        prefixes = tuple(tuple(run) for run in options.get("prefixes", ()))
        called.append((tuple(lengths), attention, prefixes, options.get("closing_only", False)))
        return packed_hidden_states(model, attention, lengths, embeddings, **options)

    for module in (
        "model.pooling",
        "llm2vec_q2d_d2q",
        "objectives.language_modelling",
    ):
        monkeypatch.setattr(f"llm2vec.{module}.packed_hidden_states", noted)
    objective(batch, objective.count(batch))
    return called


@pytest.mark.parametrize("kind", every_objective.KINDS)
def test_passes_are_those_that_the_objective_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch_of = every_objective.make(kind)
    batch = batch_of(6)
    passes = objective.passes(batch)
    assert [tuple(p)[:4] for p in passes] == passes_run(objective, batch, monkeypatch)
    shares = any(prefix for p in passes for _, prefix in p.prefixes)
    without = {"llara", "with language modelling"}
    assert shares == (kind in {*every_objective.STAGE_ONE, "contrastive", "grit"} - without)
    assert sum(p.targets for p in passes) == states_scored(objective, batch, monkeypatch)


def states_scored(objective: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many states an objective multiplies with the vocabulary, or hands to the loss that does."""
    scored: list[int] = []

    def counted(states_ND: Tensor, *arguments: Any, **more: Any) -> Any:
        scored.append(len(states_ND) * (1 if more.get("teacher_ND") is None else 2))
        return linear_cross_entropy(states_ND, *arguments, **more)

    def of_blocks(block_RKD: Tensor, *arguments: Any) -> Tensor:
        scored.append(block_RKD.shape[0] * block_RKD.shape[1])
        return token_set_loss(block_RKD, *arguments)

    monkeypatch.setattr("llm2vec.objectives.head.linear_cross_entropy", counted)
    monkeypatch.setattr("llm2vec.llm2vec_q2d_d2q.token_set_loss", of_blocks)
    objective(batch, objective.count(batch))
    return sum(scored)


def test_useful_operations_are_those_of_the_benchmark() -> None:
    """For a Llama with as many key heads as query heads, causal: both reckon the same."""
    shape = Shape(layers=3, hidden=64, intermediate=176, heads=4, kv_heads=4, vocabulary=300)
    model = AutoModelForCausalLM.from_config(shape.config())
    lengths, targets = (5, 9, 30), (4, 20)
    passes = (Pass(lengths, "causal"), Pass(targets, "causal", targets=sum(targets)))
    assert useful_flops(model, passes) == bench_flops(shape, [*lengths, *targets], num_targets=sum(targets))
    adapted = attach_lora(model.base_model.requires_grad_(False), r=4, alpha=8, dropout=0.0)
    expected = bench_flops(shape, lengths, lora_r=4)
    assert useful_flops(adapted, (Pass(lengths, "causal"),)) == expected


# --- what is kept ---

PRECISIONS = {
    "float32": (torch.float32, False),
    "bf16 autocast": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}


def assert_kept_as_reckoned(
    objective: Any,
    collate: CollateSides,
    *,
    autocast: bool = False,
    recomputed: int = 0,
    tolerance: float = 0.01,
) -> None:
    """Bytes that further rows keep; what does not depend on rows (copies of weights, the head's gradient) cancels."""
    small, large = collate(ROWS[:8]), collate(ROWS)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        counted = [measured_bytes(objective, batch) for batch in (small, large)]
    numbers = Numbers.of(arguments(bf16=autocast), objective.model, "cpu")
    reckoned = [
        reckoned_bytes(objective.model, numbers, objective.passes(batch), recomputed) for batch in (small, large)
    ]
    if recomputed == LAYERS:  # sines and cosines are arguments of a recomputed layer: there, but no saved tensors
        width = 2 * 4 * objective.model.config.head_dim
        for i, batch in enumerate((small, large)):
            run = sum(tokens_run(objective.decoder, p, *numbers.shares) for p in objective.passes(batch))
            reckoned[i] -= width * run
    assert reckoned[1] - reckoned[0] == pytest.approx(counted[1] - counted[0], rel=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("stage", "dropout"), [("stage_I", 0.0), ("stage_II", 0.0), ("stage_II", 0.05)])
def test_a_token_keeps_what_is_counted(stage: str, dropout: float, precision: str) -> None:
    """Grouped-query heads, shared prefixes, the last layer at the closing tokens."""
    dtype, autocast = PRECISIONS[precision]
    assert_kept_as_reckoned(*make(stage, dtype, dropout=dropout, num_key_value_heads=2), autocast=autocast)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
def test_other_families_keep_what_is_counted(family: str, stage: str) -> None:
    assert_kept_as_reckoned(*make(stage, family=family, num_key_value_heads=2))


@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
def test_mean_pooling_and_bidirectional_attention(stage: str) -> None:
    """All states are read and no prefix is shared."""
    settings = EncoderSettings(pooling_mode="mean", attention="bidirectional", template="llama3")
    assert_kept_as_reckoned(*make(stage, settings=settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_drops_out(dtype: torch.dtype) -> None:
    """SimCSE on a CPU keeps the scores, too."""
    settings = EncoderSettings(pooling_mode="mean", attention="bidirectional", template="llama3")
    objective, collate = make("stage_II", dtype, settings=settings)
    set_attention_dropout(objective.model, 0.3)
    assert_kept_as_reckoned(objective, collate)


@pytest.mark.parametrize("number", [2, LAYERS])
def test_recomputed_layers_keep_their_input(number: int) -> None:
    objective, collate = make("stage_I")
    contexts = {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, objective.decoder)}
    enable_checkpointing(objective.decoder, contexts)
    for layer in objective.decoder.layers[number:]:
        layer.gradient_checkpointing = False
    assert_kept_as_reckoned(objective, collate, recomputed=number, tolerance=0.02)


class _KeepsLikeVarlen(torch.autograd.Function):
    """Saves what torch's variable-length kernel saves (torch/nn/attention/varlen.py), and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, log_sum = torch.zeros_like(query), torch.zeros(query.shape[1], query.shape[0])
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("adapted", [False, True])
def test_what_the_cuda_path_keeps(
    adapted: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Its own code around a stand-in for the kernel; a dropout's noise, a byte there, cannot be seen on a CPU."""
    monkeypatch.setattr(packed_attention, "_runs_varlen", lambda *_: True)
    kernel = "torch.nn.attention.varlen.varlen_attn"
    monkeypatch.setattr(kernel, lambda query, key, value, *_, **__: _KeepsLikeVarlen.apply(query, key, value))
    packed_attention.varlen_takes.cache_clear()  # which parameters it has is asked once
    request.addfinalizer(packed_attention.varlen_takes.cache_clear)
    lengths = (12, 13, 15, 9)
    counted = []
    for num_layers in (2, 3):
        shape = {"num_hidden_layers": num_layers, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8}
        model: Any = tiny_model("llama", dtype=torch.bfloat16, **shape).train()
        if adapted:
            model = attach_lora(model.requires_grad_(False), r=4, alpha=8, dropout=0.0)
        objective = _OnePass(model, lengths)
        counted.append(measured_bytes(objective, {}))
    p = Pass(lengths, "causal")
    kept = kept_by_layer(model, Numbers(2, 2, "cuda"), p).whole
    assert counted[1] - counted[0] == sum(lengths) * kept


class _OnePass(nn.Module):
    """A causal pass over texts of given lengths."""

    def __init__(self, model: nn.Module, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.lengths = model, lengths

    def count(self, batch: Any) -> dict[str, Tensor]:
        return {}

    def forward(self, batch: Any, totals: Any) -> Tensor:
        embeddings = self.model.get_input_embeddings()(torch.arange(sum(self.lengths)))
        return packed_hidden_states(self.model, "causal", self.lengths, embeddings)


def test_cuda_shares_prefixes_in_half_precision_only() -> None:
    objective, _ = make("stage_II", torch.bfloat16, dropout=0.0)

    def run(p: Pass, numbers: Numbers) -> int:
        return tokens_run(objective.model, p, *numbers.shares)

    p = Pass((9, 9), "causal", ((2, 4),))
    assert run(p, Numbers(2, 2, "cuda")) == 14
    assert run(p, Numbers(4, 4, "cuda")) == 18
    assert run(p, Numbers(4, 4, "cpu")) == 14
    assert run(p._replace(attention="bidirectional"), Numbers(4, 4, "cpu")) == 18


# --- what is held at once ---


class LiveTensors(TorchDispatchMode):
    """Bytes of all tensors that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: Any = WeakIdKeyDictionary()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = weakref.ref(storage, partial(self._remove, storage.nbytes()))
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def _remove(self, size: int, _: Any) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, output)
        return output


class _Autocast(nn.Module):
    """As accelerate wraps an objective."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.module = objective

    def forward(self, *arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(*arguments)


def most_alive(objective: Any, batch: Batch, max_tokens: int | None, *, autocast: bool = False) -> int:
    """The most bytes of tensors that are alive at once in the second of two optimiser steps."""
    optimiser = torch.optim.AdamW([w for w in objective.parameters() if w.requires_grad], lr=1e-4, foreach=False)
    wrapped = _Autocast(objective) if autocast else objective
    live = LiveTensors()
    for model in (objective, *objective.copies):
        for weight in model.parameters():
            live.add(weight)
    for _ in range(2):
        with live:
            live.most = live.now
            backward_step(wrapped, batch, objective.count(batch), max_tokens=max_tokens)
            optimiser.step()
            optimiser.zero_grad()
    return live.most


@pytest.mark.parametrize(
    ("stage", "precision", "checkpointing", "max_tokens", "shape"),
    [
        ("stage_I", "float32", False, None, {}),
        ("stage_I", "float32", False, 500, {"tie_word_embeddings": True}),
        ("stage_I", "float32", True, 500, {}),
        ("stage_I", "bfloat16", True, None, {}),
        ("stage_I", "bf16 autocast", False, 500, {}),
        ("stage_II", "float32", False, 500, {}),
        ("stage_II", "bf16 autocast", False, None, {}),
        ("stage_II", "bf16 autocast", True, 500, {}),
        ("stage_II", "bfloat16", True, None, {}),
    ],
)
def test_most_at_once_is_the_most_that_is_alive(
    stage: str, precision: str, checkpointing: bool, max_tokens: int | None, shape: dict[str, Any]
) -> None:
    """Over the second optimiser step, tensor by tensor."""
    dtype, autocast = PRECISIONS[precision]
    objective, collate = make(stage, dtype, num_key_value_heads=8, **shape)
    model = objective.model
    if checkpointing:
        decoder = objective.decoder if stage == "stage_I" else model
        enable_checkpointing(model, {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, decoder)})
    batch = collate(ROWS)
    pieces = split_batch(batch, max_tokens)
    assert (len(pieces) > 1) == (max_tokens is not None)
    most = most_alive(objective, batch, max_tokens, autocast=autocast)
    args = arguments(bf16=autocast)
    numbers = Numbers.of(args, model, "cpu")
    steps = [Step(objective.passes(piece), 1.0, checkpointing * LAYERS, len(pieces) > 1, None) for piece in pieces]
    assert max(memory_of(model, args, numbers, step, 1).most for step in steps) == pytest.approx(most, rel=0.1)


#: Wide enough for what is not counted not to matter.
WIDE = {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8}


@pytest.mark.parametrize("kind", every_objective.STAGE_ONE)
def test_a_token_of_every_pretext_keeps_what_is_counted(kind: str) -> None:
    """A frozen decoder, a teacher, a projection, states of a text's own and those of its rest."""
    objective, batch_of = every_objective.make(kind, **WIDE)
    numbers = Numbers.of(arguments(), objective.model, "cpu")
    small, large = batch_of(8), batch_of(24)
    counted = measured_bytes(objective, large) - measured_bytes(objective, small)
    reckoned = [reckoned_bytes(objective.model, numbers, objective.passes(batch)) for batch in (small, large)]
    assert reckoned[1] - reckoned[0] == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("kind", every_objective.STAGE_ONE)
def test_most_at_once_of_every_pretext(kind: str, recomputes: bool) -> None:
    """Over the second optimiser step of micro-batches, tensor by tensor; the frozen copy's weights with it."""
    objective, batch_of = every_objective.make(kind, recomputes=recomputes, **WIDE)
    most = most_alive(objective, batch_of(24), 500)
    numbers = Numbers.of(arguments(), objective.model, "cpu")
    pieces = split_batch(batch_of(24), 500)
    steps = [Step(objective.passes(piece), 1.0, recomputes * LAYERS, len(pieces) > 1, None) for piece in pieces]
    reckoned = max(memory_of(objective.model, arguments(), numbers, step, 1).most for step in steps)
    assert reckoned == pytest.approx(most, rel=0.1)


@pytest.mark.parametrize("kind", ["frozen", "kl", "kl below an adapter", "next kl"])
def test_weights_that_a_pass_casts(kind: str) -> None:
    """Those of a frozen decoder are cast, too, and kept for its backward pass; those of a teacher are not kept."""
    objective, batch_of = every_objective.make(kind, **WIDE | {"hidden_size": 256, "intermediate_size": 704})
    most, pieces = most_alive(objective, batch_of(24), 100, autocast=True), split_batch(batch_of(24), 100)
    args = arguments(bf16=True)
    numbers = Numbers.of(args, objective.model, "cpu")
    steps = [Step(objective.passes(piece), 1.0, 0, True, None) for piece in pieces]
    reckoned = max(memory_of(objective.model, args, numbers, step, 1).most for step in steps)
    assert reckoned == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("kind", every_objective.STAGE_ONE)
def test_operations_of_every_pretext(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch counts them, where nothing is saved that a plan counts all the same."""
    for module in ("packing", "packed_attention"):
        monkeypatch.setattr(f"llm2vec.model.{module}.can_share_prefix", lambda *_: False, raising=False)
    monkeypatch.setattr("llm2vec.model.packing.narrowing_layer", lambda _: None)
    objective, batch_of = every_objective.make(kind, **WIDE)
    batch = batch_of(24)
    with FlopCounterMode(display=False) as counter:
        backward_step(objective, batch, objective.count(batch))
    assert useful_flops(objective.model, objective.passes(batch)) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_processes_that_share_the_weights() -> None:
    """The table of docs/multi_gpu.md, of Llama-3.1-8B on eight cards, in GB."""
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).train()
    args = arguments(bf16=True, fsdp=True)
    numbers = Numbers.of(args, model, "cuda")
    assert (numbers.stream, numbers.compute, numbers.casts) == (2, 2, False)
    settings = EncoderSettings(pooling_mode="last", attention="causal", template="llama3")
    side: Any = {"lengths": [100] * 4, "num_targets": [90] * 4, "prefix": 0, "closed": True}
    passes = BidirectionalReconstruction(model, settings).passes({"query": side, "positive": side})
    step = Step(passes, 1.0, 0, True, None)
    parts = {part.name: part.size / 1e9 for part in memory_of(model, args, numbers, step, 8).parts}
    shared = parts["weights"] + parts["gradients"] + parts["optimiser state"]
    assert shared == pytest.approx(16.1, abs=0.05)
    assert parts["gathered weights"] == pytest.approx(3.0, abs=0.05)
    assert parts["gathered gradients"] == pytest.approx(4.2, abs=0.05)
    with_more = memory_of(model, args, numbers, step, 16)
    assert {p.name: p.size for p in with_more.parts}["weights"] == pytest.approx(parts["weights"] * 1e9 / 2)
    by_copies = {p.name for p in memory_of(model, arguments(bf16=True), numbers, step, 8).parts}
    assert "buckets" in by_copies and "gathered weights" not in by_copies


# --- a process's memory, measured ---

#: Runs a training script and prints the most memory it held above what it held before the model was loaded.
MEASURED_RUN = """
import runpy, sys
from llm2vec.training import model as run_model
from benchmarks.measure import Meter

meter, load = Meter("cpu"), run_model.load_backbone

def load_and_note(*arguments, **options):
    meter.start()
    return load(*arguments, **options)

run_model.load_backbone = load_and_note
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("held", meter.peak() - meter.base)
"""


def measured_run(stage: str, config: Path) -> int:
    """Bytes; the C library gives freed memory back at once, so that they are those of tensors."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    finished = subprocess.run(
        [sys.executable, "-c", MEASURED_RUN, str(ROOT / f"experiments/run_{stage}.py"), str(config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return int(finished.stdout.split("held ")[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose weights and activations are hundreds of megabytes, one of next to nothing, and rows."""
    path = tmp_path_factory.mktemp("measured")
    for name, sizes in {"large": (6, 384, 1024, 8000), "tiny": (2, 32, 64, 400)}.items():
        layers, hidden, intermediate, vocabulary = sizes
        shape = LlamaConfig(
            num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, vocab_size=vocabulary,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(shape).save_pretrained(path / name)
        family_tokenizer("llama").save_pretrained(path / name)
    generator = random.Random(0)

    def text(length: float) -> str:
        return " ".join(generator.choices(WORDS, k=max(4, round(generator.lognormvariate(length, 0.4)))))

    rows = [{"query": text(3), "positive": text(5), "negative": text(5)} for _ in range(32)]
    write_jsonl(path / "data/nq.jsonl", rows)
    return path


#: Of Stage I: what a step runs besides Anchor's two passes, or in their place.
PRETEXTS: dict[str, dict[str, Any]] = {
    "divergence on the rest, below an adapter": {
        "target": "next", "target_loss": "kl", "decoder": "frozen", "trainable": "lora", "alpha": 0.0,
    },
    "divergence of the counterpart, a copy": {"target_loss": "kl", "decoder": "frozen"},
    "itself in no order": {"target": "self", "target_loss": "bag"},
    "itself, tokens alone": {"target": "self", "decoder": "frozen", "trainable": "tokens", "projection": "linear"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
def test_a_process_takes_what_the_plan_says(folder: Path, stage: str, checkpointing: bool) -> None:
    """Within 15 %."""
    assert 0.85 < planned_to_measured(folder, stage, gradient_checkpointing=checkpointing) < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("pretext", PRETEXTS)
def test_a_pretext_takes_what_the_plan_says(folder: Path, pretext: str) -> None:
    """Within 15 %. What a budget leaves to keep is measured in `tests/model/test_activation_memory.py`."""
    keys = {"template": "llama3+memory_4", "pooling_mode": "mean", "bottleneck": "states", **PRETEXTS[pretext]}
    assert 0.85 < planned_to_measured(folder, "stage_I", **keys) < 1.15


def planned_to_measured(folder: Path, stage: str, **changed: Any) -> float:
    """A process's memory, above a run of a tiny model over the same rows, which stands for libraries and data."""
    measured, planned = {}, {}
    for base in ("large", "tiny"):
        keys = {
            "model_name_or_path": str(folder / base),
            "output_dir": str(folder / "run"),
            "resume": "never",
            "dataset_name": "E5",
            "dataset_file_path": str(folder / "data"),
            "sources": ["nq"],
            "template": "llama3",
            "per_device_train_batch_size": 12,
            "tokens_per_microbatch": 1024,
            "learning_rate": 1e-4,
            "max_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **changed,
        }
        file = folder / "run.json"
        file.write_text(json.dumps(keys), encoding="utf-8")
        plan = make_plan(file, Conditions(stage=stage))  # type: ignore[arg-type]
        assert plan.memory is not None
        planned[base] = plan.memory.most
        measured[base] = measured_run(stage, file)
        recomputed = plan.recomputation or "nothing is recomputed"
        sys.stdout.write(
            f"{stage} {changed}, {base}: planned {planned[base]}, measured {measured[base]}; {recomputed}\n"
        )
    return (planned["large"] - planned["tiny"]) / (measured["large"] - measured["tiny"])
