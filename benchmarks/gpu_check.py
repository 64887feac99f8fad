"""Is everything right and fast on this machine's GPU? One script, at most ten minutes, nothing to download.

    python -m benchmarks.gpu_check --out gpu-check              # writes gpu-check.json and gpu-check.md
    python -m benchmarks.gpu_check --base FOLDER                # and a short Stage I and II of a real base
    python -m benchmarks.gpu_check --device cpu --tiny          # does it run: every part, small, on a CPU

It needs torch, transformers, peft and accelerate; sentence-transformers is compared with where it is installed. A part
that fails is written down, and the next one runs. docs/performance.md says what the figures mean, and has a place for
tables of other machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, TrainingArguments

from benchmarks import variants
from benchmarks.inputs import (
    INSTRUCTION,
    Case,
    InHalf,
    Shape,
    packed_batch,
    random_lora,
    random_model,
    random_pairs,
    write_model,
)
from benchmarks.measure import Meter, processor
from benchmarks.sections import LARGE_1B, TINY
from benchmarks.variants import LOSS_SCALE, SETTINGS, EncodeCase
from llm2vec.cli import run_command
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import attach_lora, load_tokenizer
from llm2vec.model.fused_layers import fuse, why_not
from llm2vec.model.packed_attention import Group, Layout, attend, load_kernel
from llm2vec.model.packing import inner_decoder
from llm2vec.model.settings import row_tokenizer, with_template
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.planning.activations import Numbers
from llm2vec.planning.gpus import CARDS
from llm2vec.planning.memory import Step, memory_of
from llm2vec.planning.work import useful_flops
from llm2vec.table import Table
from llm2vec.text.batches import pack_rows
from llm2vec.training.config import Config
from llm2vec.training.model import decoder_of
from llm2vec.training.step import backward_step, split_batch
from llm2vec.training.trainer import EmbedderTrainer
from llm2vec.types import Batch, InstructedText, UserError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "sentence-transformers")
SIDES = {"Stage I": ("query", "positive"), "Stage II": ("query", "positive", "negative")}
#: A part's name -> the part.
PARTS: dict[str, Callable[[Setting], Iterator[Figure]]] = {}


@dataclass(frozen=True)
class Figure:
    """One line of the table; `passed` is None where nothing is asked of the figure."""

    measure: str
    value: float
    unit: str = ""
    must: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: str
    shape: Shape
    rows: int  #: of a step
    tokens: tuple[int, ...]  #: at once, in the Stage I step
    pools: tuple[int, ...]  #: rows of a step with cached gradients
    texts: int  #: that are encoded
    base: Path | None = None
    precision: Any = "autocast"
    kernel: str | None = None  #: of the hub, whose attention is compared in place of torch's

    def case(self, **changes: Any) -> Case:
        """For `benchmarks.inputs`."""
        return replace(Case(self.shape, self.rows, self.precision, self.device), **changes)


@dataclass
class Part:
    """What became of a part."""

    name: str
    seconds: float = 0.0
    error: str = ""
    figures: list[Figure] = field(default_factory=list)


def part(function: Callable[[Setting], Iterator[Figure]]) -> Callable[[Setting], Iterator[Figure]]:
    """Register a part under its name."""
    PARTS[function.__name__] = function
    return function


def at_most(measure: str, value: float, most: float, unit: str = "") -> Figure:
    """A figure that has a bound."""
    return Figure(measure, value, unit, f"at most {most:g}", value <= most)


def objective_of(stage: str, case: Case) -> Any:
    """A stage's objective over a random model."""
    if stage == "Stage II":
        return ContrastiveLearning(random_lora(case), SETTINGS, LOSS_SCALE)
    model = random_model(case.shape, with_head=True, device=case.device, dtype=case.dtype)
    return BidirectionalReconstruction(model, SETTINGS, variants.ALPHA)


def run_step(objective: Any, batch: Batch, case: Case) -> Tensor:
    """Forward and backward of a batch; its loss."""
    called: Any = InHalf(objective, case.computing())
    return backward_step(called, batch, objective.count(batch), max_tokens=case.max_tokens)["loss"]


def off(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error of several tensors."""
    pairs = zip(found, truth, strict=True)
    exact = ((one.detach().double(), right.detach().double()) for one, right in pairs)
    return max(float((one - right).norm() / right.norm()) for one, right in exact)


def gradients(objective: nn.Module) -> list[Tensor]:
    """Of all weights that are trained, taken off them."""
    taken = [weight.grad.clone() for weight in objective.parameters() if weight.grad is not None]
    objective.zero_grad()
    return taken


# --- the parts ---


@part
def attention(s: Setting) -> Iterator[Figure]:
    """Packed attention in bfloat16 against a mask in float64: output and the gradients of query, key and value."""
    if s.kernel is not None:
        load_kernel(s.kernel)
    groups = (Group(37, (100, 1, 300)), Group(0, (64, 129)))
    layout_mask = _visible(groups).to(s.device)
    for size in (64, 128, 256):
        for closing in (False, True):
            heads = [torch.randn(1, n, len(layout_mask), size, device=s.device).bfloat16() for n in (8, 2, 2)]
            layout = Layout(groups, closing, s.kernel)
            rows = layout.on(torch.device(s.device)).closing if closing else torch.arange(len(layout_mask))
            made = []
            for exact in (False, True):
                q, k, v = (h.double().requires_grad_() if exact else h.clone().requires_grad_() for h in heads)
                chosen = q[:, :, rows.to(q.device)]
                if exact:
                    mask = layout_mask[rows.to(q.device)]
                    output = nn.functional.scaled_dot_product_attention(chosen, k, v, attn_mask=mask, enable_gqa=True)
                    output = output.transpose(1, 2)
                else:
                    output, _ = attend(nn.Module(), chosen, k, v, None, is_causal=True, layout=layout)
                weight = torch.linspace(-1, 1, output.numel(), device=s.device).reshape(output.shape)
                made.append([output, *torch.autograd.grad((output * weight.to(output)).sum(), (q, k, v))])
            # Two roundings to 8 bits, of shares and of the output, are 0.4 % each where they meet at random.
            yield at_most(f"head size {size}{', closing tokens' if closing else ''}", off(*made), 0.02)


@part
def fused(s: Setting) -> Iterator[Figure]:
    """Whether the fused kernels can be made here."""
    if reason := why_not(torch.device(s.device)):
        raise UserError(reason)
    yield Figure("fused kernels are made and right", 1)


@part
def parity(s: Setting) -> Iterator[Figure]:
    """Gradients of a step in bfloat16, fused and not, against float32 text by text."""
    for stage, sides in SIDES.items():
        case = s.case(shape=replace(s.shape, layers=2), rows=min(s.rows, 8))
        batch = packed_batch(case, 0, sides)
        objective = objective_of(stage, case)
        run_step(objective, batch, replace(case, precision="float32"))
        truth, errors = gradients(objective), {}
        for on in (False, True):
            fuse(inner_decoder(decoder_of(objective.model)), on)
            run_step(objective, batch, case)
            errors[on] = off(gradients(objective), truth)
        yield at_most(f"{stage}: gradients, relative error", errors[False], 0.15)
        yield at_most(f"{stage}: the same, fused", errors[True], max(1.3 * errors[False], 0.02))


@part
def speed(s: Setting) -> Iterator[Figure]:
    """Whole steps, optimiser included: time, share of the card's peak, memory beside the plan's."""
    for stage, sides in SIDES.items():
        for tokens in s.tokens:
            for on in (False, True):
                case = s.case(max_tokens=tokens)
                objective = objective_of(stage, case)
                decoder = inner_decoder(decoder_of(objective.model))
                fuse(decoder, on)
                yield from _timed(
                    s, f"{stage}, {tokens:,} tokens at once{', fused' if on else ''}", objective, case, sides, on
                )
                del objective, decoder
                _forget(s)


def _timed(s: Setting, title: str, objective: Any, case: Case, sides: Sequence[str], on: bool) -> Iterator[Figure]:
    batch = packed_batch(case, 0, sides)
    optimiser = torch.optim.AdamW([w for w in objective.parameters() if w.requires_grad], lr=1e-5)
    meter, times = Meter(s.device), []
    for turn in range(5):
        if turn == 2:
            meter.reset()
        start = meter.now()
        run_step(objective, batch, case)
        optimiser.step()
        optimiser.zero_grad()
        times.append(meter.now() - start)
    seconds, tokens = statistics.median(times[2:]), sum(sum(side["lengths"]) for side in batch.values())
    yield Figure(f"{title}: tokens a second", tokens / seconds)
    name = processor(s.device)
    known = (card.tflops for card in CARDS.values() if all(word in name for word in card.name.split("-")))
    peak = next(known, None)
    if s.device == "cuda" and peak is not None:
        yield Figure(
            f"{title}: of the peak (MFU)",
            useful_flops(objective.model, objective.passes(batch)) / seconds / peak / 1e12,
        )
    arguments = TrainingArguments("unused", bf16=True, use_cpu=s.device == "cpu", report_to="none")
    pieces = split_batch(batch, case.max_tokens)
    texts = (tokens_of := len(batch["query"]["lengths"])) * 3, 2 * tokens_of
    numbers = Numbers.of(arguments, objective.model, s.device, on)
    planned = Step(objective.passes(batch), 1 / len(pieces), 0, len(pieces) > 1, texts if objective.contrasts else None)
    most = memory_of(objective.model, arguments, numbers, planned, 1).most
    if s.device == "cuda":
        held, kept = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        yield Figure(f"{title}: memory", held / 1e9, "GB")
        yield Figure(f"{title}: memory kept by the allocator", kept / 1e9, "GB")
        yield at_most(f"{title}: memory, the plan's = 1", held / most, 1.1)
    else:
        yield Figure(f"{title}: memory by the plan", most / 1e9, "GB")


@part
def waiting(s: Setting) -> Iterator[Figure]:
    """How often the host waits for the card within a step, and the share of the step in which the card does nothing."""
    for stage, sides in SIDES.items():
        case = s.case(max_tokens=s.tokens[0])
        batch, objective = packed_batch(case, 0, sides), objective_of(stage, case)
        run_step(objective, batch, case)
        pieces = len(split_batch(batch, case.max_tokens))
        if s.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run_step(objective, batch, case)
            torch.cuda.set_sync_debug_mode("default")
            number = sum("synchroniz" in str(warning.message) for warning in seen)
            yield at_most(f"{stage}: waits a micro-batch", number / pieces, 2)
        activity = torch.profiler.ProfilerActivity
        kinds = [activity.CPU, *([activity.CUDA] if s.device == "cuda" else [])]
        meter = Meter(s.device)
        with torch.profiler.profile(activities=kinds) as profile:
            start = meter.now()
            run_step(objective, batch, case)
            seconds = meter.now() - start
        busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
        if s.device == "cuda":
            yield Figure(f"{stage}: share of the step without a kernel", max(0.0, 1 - busy / seconds))
            slow = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:8]
            for event in slow:
                yield Figure(f"{stage}: {event.key[:60]}", event.self_device_time_total / 1e6 / seconds, "of the step")
        else:
            yield Figure(f"{stage}: a profiled step", seconds, "s")
        _forget(s)


@part
def large_steps(s: Setting) -> Iterator[Figure]:
    """A contrastive step with cached gradients over many rows; how long it takes to cut it."""
    for rows in s.pools:
        case = s.case(rows=rows, max_tokens=max(s.tokens), document_length=(40.0, 20.0))
        batch, objective = packed_batch(case, 0, SIDES["Stage II"]), objective_of("Stage II", case)
        fuse(inner_decoder(objective.model))
        meter = Meter(s.device)
        start = meter.now()
        pieces = list(split_batch(batch, case.max_tokens))
        cut = meter.now() - start
        meter.start()
        start = meter.now()
        run_step(objective, batch, case)
        seconds = meter.now() - start
        yield Figure(f"{rows:,} rows, {len(pieces)} micro-batches", seconds, "s")
        yield at_most(f"{rows:,} rows: cutting them, share of the step", cut / seconds, 0.1)
        yield Figure(f"{rows:,} rows: memory above weights and batch", (meter.peak() - meter.base) / 1e9, "GB")
        del batch, objective, pieces
        _forget(s)


@part
def encode(s: Setting) -> Iterator[Figure]:
    """`LLM2Vec.encode`, beside sentence-transformers' where that is installed."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), s.shape)
        dtype: Any = "bfloat16" if s.device == "cuda" else "float32"
        case = EncodeCase(folder, s.shape, random_pairs(s.texts, (170.0, 90.0), INSTRUCTION), dtype, s.device)
        rivals = {"encode": variants.encode_ours}
        if find_spec("sentence_transformers") is not None:
            rivals["sentence-transformers"] = variants.encode_sentence_transformers
        vectors, meter = [], Meter(s.device)
        for name, set_up in rivals.items():
            work = set_up(case)
            work.step(0)
            start = meter.now()
            made = work.step(0)
            yield Figure(f"{name}: tokens a second", work.tokens[0] / (meter.now() - start))
            assert made is not None
            vectors.append(made.float().cpu())
        if len(vectors) == 2:
            cosine = float(nn.functional.cosine_similarity(vectors[0], vectors[1]).min())
            yield Figure("lowest cosine of a text's two vectors", cosine, "", "at least 0.999", cosine >= 0.999)


@part
def resume(s: Setting) -> Iterator[Figure]:
    """Six steps, and six that are stopped after three and go on: the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        whole = _train(s, Path(folder, "whole"), None)
        _train(s, Path(folder, "cut"), None, steps=3)
        saved = next(Path(folder, "cut").glob("checkpoint-3"))
        started = time.monotonic()
        again = _train(s, Path(folder, "cut"), saved)
        yield Figure("from the checkpoint to the end", time.monotonic() - started, "s")
        apart = off([again], [whole])
        yield at_most("weights after going on, relative difference", apart, 1e-3 if s.device == "cuda" else 0)


def _train(s: Setting, folder: Path, start: Path | None, steps: int = 6) -> Tensor:
    case = s.case(shape=replace(s.shape, layers=2), rows=4, device="cpu")
    objective = objective_of("Stage I", replace(case, device=s.device))
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, save_strategy="steps", save_steps=3, report_to="none",
        disable_tqdm=True, use_cpu=s.device == "cpu", bf16=s.device == "cuda", remove_unused_columns=False,
        learning_rate=1e-3, logging_steps=1, dataloader_pin_memory=s.device == "cuda",
    )  # fmt: skip

    def save(place: Path, weights: Any) -> None:
        place.mkdir(parents=True, exist_ok=True)
        save_model(objective, str(place / "model.safetensors"))

    def load(place: Path) -> None:
        load_model(objective, place / "model.safetensors")

    rows: Any = list(range(24))
    trainer = EmbedderTrainer(
        objective, arguments, Config("", stop_after_n_steps=steps), rows, partial(_rows, case), _InOrder(24),
        save_to=save, load_from=load,
    )  # fmt: skip
    trainer.train(None if start is None else str(start))
    return torch.cat([weight.detach().flatten().float().cpu() for weight in objective.parameters()])


def _rows(case: Case, numbers: Sequence[int]) -> Batch:
    return packed_batch(case, numbers[0], SIDES["Stage I"])


class _InOrder(Sampler[int]):
    """0, 1, 2, ..."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        return self.rows_from(0)

    def rows_from(self, place: int) -> Iterator[int]:
        """As the trainer asks for a step's rows."""
        return iter(range(place, self.number))

    def set_epoch(self, epoch: int) -> None:
        """All epochs are alike."""


@part
def several_cards(s: Setting) -> Iterator[Figure]:
    """Two or more processes, by DDP and by FSDP2: loss and gradient of one process that holds all rows."""
    number = 2 if s.device == "cpu" else torch.cuda.device_count()
    if number < 2:
        yield Figure("cards", number)
        return
    case = s.case(shape=replace(s.shape, layers=2), rows=4 * number, precision="float32")
    objective, batch = objective_of("Stage I", case), packed_batch(case, 0, SIDES["Stage I"])
    loss = float(run_step(objective, batch, case))
    norm = float(torch.stack([g.norm() for g in gradients(objective)]).norm())
    command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={number}", "-m", "benchmarks.gpu_check"]
    more = ["--worker", "--device", s.device, *(["--tiny"] if s.shape == TINY else [])]
    ended = subprocess.run([sys.executable, "-m", *command, *more], capture_output=True, text=True, timeout=240)
    if ended.returncode:
        raise UserError(f"{number} processes: {ended.stderr.strip()[-400:]}")
    for line in ended.stdout.strip().splitlines()[-2:]:
        found = json.loads(line)
        way = found["way"]
        yield at_most(f"{way}, {number} processes: loss, relative difference", abs(found["loss"] / loss - 1), 1e-4)
        yield at_most(f"{way}, {number} processes: gradient's norm, the same", abs(found["norm"] / norm - 1), 1e-3)
        yield Figure(f"{way}, {number} processes: a step", found["seconds"], "s")


def work(s: Setting) -> None:
    """A process of `several_cards`: its share of the rows, both ways; the first one prints what was found."""
    dist.init_process_group("gloo" if s.device == "cpu" else "nccl")
    if s.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    for way in ("ddp", "fsdp"):
        found = _shared_step(s, way)
        if dist.get_rank() == 0:
            print(json.dumps({"way": way, **found}))
    dist.destroy_process_group()


def _shared_step(s: Setting, way: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, number = dist.get_rank(), dist.get_world_size()
    case = s.case(shape=replace(s.shape, layers=2), rows=4 * number, precision="float32")
    objective = objective_of("Stage I", case)
    batch = packed_batch(case, 0, SIDES["Stage I"])
    totals = {name: count.to(s.device) for name, count in objective.count(batch).items()}
    if way == "ddp":
        wrapped: Any = nn.parallel.DistributedDataParallel(objective)
    else:
        mesh = init_device_mesh(s.device, (number,))
        for layer in inner_decoder(objective.decoder).layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(objective, mesh=mesh)
    for _ in range(2):
        wrapped.zero_grad()
        start = Meter(s.device).now()
        share = _share(batch, rank, number)
        loss = backward_step(wrapped, share, totals, scale=number)["loss"]
        seconds = Meter(s.device).now() - start
    dist.all_reduce(loss)
    grads = [weight.grad for weight in objective.parameters() if weight.grad is not None]
    squares = torch.stack([(g.full_tensor() if hasattr(g, "full_tensor") else g).square().sum() for g in grads]).sum()
    return {"loss": float(loss), "norm": float(squares.sqrt()), "seconds": seconds}


def _share(batch: Batch, rank: int, number: int) -> Batch:
    from llm2vec.text.batches import select_rows

    rows = len(batch["query"]["lengths"])
    return {name: select_rows(side, range(rank, rows, number)) for name, side in batch.items()}


@part
def real_base(s: Setting) -> Iterator[Figure]:
    """A short Stage I and Stage II of a base that is given: their losses fall. Under --tiny, of a random one."""
    if s.base is not None:
        yield from _both_stages(s, s.base)
    elif s.shape == TINY:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), s.shape, with_head=True)
            yield from _both_stages(s, Path(folder))
    else:
        yield Figure("no --base was given", 0)


def _both_stages(s: Setting, base: Path) -> Iterator[Figure]:
    tokenizer = load_tokenizer(str(base))
    renderer = row_tokenizer(tokenizer, with_template(SETTINGS, tokenizer))
    texts = [
        InstructedText("", f"{f.__name__}: {f.__doc__}")
        for f in vars(torch).values()
        if getattr(f, "__doc__", None) and hasattr(f, "__name__")
    ][:64]
    queries = pack_rows(renderer.rows([InstructedText(INSTRUCTION, text.text.partition(":")[0]) for text in texts]))
    documents = pack_rows(renderer.rows([text._replace(text=text.text[:600]) for text in texts]))
    batch: Batch = {
        name: {key: v.to(s.device) if isinstance(v, Tensor) else v for key, v in side.items()}  # type: ignore[misc]
        for name, side in (("query", queries), ("positive", documents))
    }
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    model.to(s.device)  # type: ignore[arg-type]
    model.train()
    case = s.case(max_tokens=4096)
    stage_one = BidirectionalReconstruction(model, SETTINGS, variants.ALPHA)
    for name, make, rate in (
        ("Stage I", lambda: stage_one, 4e-5),
        ("Stage II", lambda: ContrastiveLearning(_adapted(model), SETTINGS, LOSS_SCALE), 2e-4),
    ):
        objective = make()
        fuse(inner_decoder(decoder_of(model)), s.device == "cuda")
        optimiser = torch.optim.AdamW([w for w in objective.parameters() if w.requires_grad], lr=rate)
        losses = []
        for _ in range(12 if s.device == "cuda" else 3):
            losses.append(float(run_step(objective, batch, case)))
            optimiser.step()
            optimiser.zero_grad()
        share = losses[-1] / losses[0]
        yield Figure(f"{name}: loss at the end, at the beginning = 1", share, "", "below 1", share < 1)


def _adapted(model: Any) -> Any:
    decoder: Any = decoder_of(model)
    return attach_lora(decoder.requires_grad_(False), r=16, alpha=32, dropout=0.0).train()


# --- the script ---


def _visible(groups: Sequence[Group]) -> Tensor:
    """Which token sees which: its own text's and its prefix's, up to itself."""
    blocks = []
    for prefix, lengths in groups:
        size = prefix + sum(lengths)
        block, start = torch.zeros(size, size, dtype=torch.bool), prefix
        block[:prefix, :prefix] = torch.ones(prefix, prefix).tril().bool()
        for length in lengths:
            block[start : start + length, :prefix] = True
            block[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
            start += length
        blocks.append(block)
    return torch.block_diag(*blocks).bool()


def _forget(s: Setting) -> None:
    if s.device == "cuda":
        torch.cuda.empty_cache()


def machine(s: Setting) -> dict[str, str]:
    """What the figures are of."""
    found = {"date": date.today().isoformat(), "device": processor(s.device), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if s.device == "cuda":
        properties, driver = torch.cuda.get_device_properties(0), "not known"
        if (tool := shutil.which("nvidia-smi")) is not None:
            asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(asked, capture_output=True, text=True).stdout.partition("\n")[0]
        found |= {
            "cards": str(torch.cuda.device_count()), "memory": f"{properties.total_memory / 1e9:.0f} GB",
            "capability": f"{properties.major}.{properties.minor}", "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())), "driver": driver,
        }  # fmt: skip
    return found


def run_part(name: str, s: Setting) -> Part:
    """Run a part to its end, or to what it fails at."""
    done, started = Part(name), time.monotonic()
    torch.manual_seed(0)
    try:
        for figure in PARTS[name](s):
            done.figures.append(figure)
    except Exception as error:  # whatever it is, the others are to run
        done.error = str(error) if isinstance(error, UserError) else traceback.format_exc(limit=-3)
    done.seconds = time.monotonic() - started
    _forget(s)
    return done


def markdown(found: dict[str, str], parts: Sequence[Part]) -> str:
    """The table, and what it is of."""
    words = {True: "yes", False: "**no**", None: ""}
    rows = []
    for p in parts:
        rows += [[p.name, f.measure, f"{f.value:,.4g} {f.unit}".strip(), f.must, words[f.passed]] for f in p.figures]
        if p.error:
            rows.append([p.name, p.error.strip().splitlines()[-1].replace("|", "/"), "", "", "**failed**"])
    head = "; ".join(f"{name} {value}" for name, value in found.items())
    return f"{head}\n\n{Table(['part', 'measure', 'figure', 'must', 'held'], rows, num_names=2).markdown()}\n"


def main(argv: Sequence[str]) -> int:
    """Run all parts, write both files, say what did not hold; exit code 1 where something did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does every part run")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--base", type=Path, help="folder of a real base, for real_base")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="the files' name, without .json and .md")
    parser.add_argument("--kernel", help="FlashAttention of the hub by its name, for attention")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    names = given.only.split(",")
    if unknown := set(names) - PARTS.keys():
        raise UserError(f"--only: {min(unknown)!r} is not known; allowed: {', '.join(PARTS)}.")
    s = Setting(given.device, LARGE_1B, 64, (8192, 16_384), (512, 8192), 2048, given.base, kernel=given.kernel)
    if given.tiny:
        s = Setting(given.device, TINY, 4, (400,), (8, 16), 8, given.base, kernel=given.kernel)
    if given.worker:
        work(s)
        return 0
    found, parts = machine(s), []
    for name in names:
        parts.append(run_part(name, s))
        bad = [f for f in parts[-1].figures if f.passed is False]
        print(
            f"{name}: {'failed' if parts[-1].error else 'missed' if bad else 'done'}, {parts[-1].seconds:.0f} s",
            flush=True,
        )
        given.out.with_suffix(".json").write_text(json.dumps({**found, "parts": list(map(asdict, parts))}, indent=1))
        given.out.with_suffix(".md").write_text(markdown(found, parts), encoding="utf-8")
    print(markdown(found, parts))
    return int(any(p.error or any(f.passed is False for f in p.figures) for p in parts))


if __name__ == "__main__":
    run_command(main)
