"""What the benchmark compares, on which shapes, and the goals: each function here measures a section of its table.

    lines = stage_I(Options(rounds=5), CPU)

Plans say what a kind of device is measured with. Run by `benchmarks/benchmark.py`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from benchmarks import variants
from benchmarks.inputs import (
    DOCUMENT_LENGTH,
    INSTRUCTION,
    QUERY_LENGTH,
    Case,
    Precision,
    Shape,
    random_pairs,
    write_model,
)
from benchmarks.measure import Line, Readings, Variant, ratios, take_turns
from benchmarks.variants import EncodeCase

logger = logging.getLogger(__name__)

SMALL = Shape()
LARGE_1B = Shape(layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocabulary=128_256)
TINY = Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=4, vocabulary=8_000)
#: Mean and standard deviation of the tokens of a document where it does not matter how many they are.
SHORT_DOCUMENT = (40.0, 20.0)
#: Bytes of a block above which freed memory goes back to the system at once, where memory is measured.
GIVE_BACK_ABOVE = 2**20
NO_RIVAL = "sentence-transformers is not installed here"


class Must(NamedTuple):
    """Goals of one comparison with the release-style step; None = none is set."""

    times: float | None = None
    of_peak: float | None = None
    memory: float | None = None


class Sizes(NamedTuple):
    """What is measured on a kind of device, and the goals that hold there; None = no goal is set."""

    shape: Shape
    #: (rows, vocabulary, precision) and its goals.
    stage_I: dict[tuple[int, int, Precision], Must]
    #: Most tokens that go through the packed step at once.
    stage_I_tokens: int
    #: Precision -> times the release-style step.
    stage_II: dict[Precision, float | None]
    stage_II_rows: int
    #: Rows of the step whose memory shows what caching saves: what it holds does not grow with them.
    cached_rows: int
    cache_tokens: int
    #: Queries and documents to encode; for each dtype, times sentence-transformers, queries and documents.
    texts: tuple[int, int]
    encode: dict[Literal["float32", "bfloat16"], tuple[float | None, float | None]]
    #: Axis -> values; `growth_rows` is the batch where rows are not the axis.
    growth: dict[str, tuple[int, ...]]
    growth_rows: int
    #: Of a step of Stage I whose pretexts are compared.
    pretext_rows: int = 4
    #: Numbers of processes to train with; on GPUs, those that there are cards for.
    processes: tuple[int, ...] = (1, 2)
    #: Times sentence-transformers' step.
    stage_II_rival: float | None = None
    #: Gradient caching: memory against the release-style step, time against the packed one, memory of a large pool.
    cached_memory: float | None = None
    cached_time: float | None = None
    pool_memory: float | None = None

    def describe(self, rounds: int) -> str:
        """The shape of the models, in a sentence."""
        shape = self.shape
        model = f"The model in {shape.base}" if shape.base else "Random Llama"
        return (
            f"{model}, {shape.layers} layers, hidden size {shape.hidden}, intermediate {shape.intermediate}, "
            f"{shape.heads} heads ({shape.kv_heads} for keys and values), V = {shape.vocabulary:,} where not said; "
            f"{rounds} round(s)."
        )


CPU = Sizes(
    SMALL,
    {
        (8, 32_000, "float32"): Must(2.0, 0.80),
        (16, 32_000, "float32"): Must(2.5),
        (16, 32_000, "bfloat16"): Must(2.6),
        (8, 128_000, "float32"): Must(1.9),
    },
    stage_I_tokens=4096,
    stage_II={"float32": 2.5, "bfloat16": 2.7},
    stage_II_rows=8,
    cached_rows=64,
    cache_tokens=1000,
    texts=(192, 512),
    encode={"float32": (3, 1.7), "bfloat16": (3, 1.7)},
    growth={
        "rows": (4, 8, 16, 32),
        "tokens of a document": (64, 128, 256, 512),
        "vocabulary": (8_000, 32_000, 128_000),
    },
    growth_rows=8,
    stage_II_rival=1.5,
    cached_memory=0.05,
    cached_time=1.35,
    pool_memory=1.1,
)
#: With --large: in Stage I the release-style step holds some 20 GB, in Stage II 10.
LARGE = CPU._replace(stage_I={**CPU.stage_I, (32, 128_000, "float32"): Must(2.7, None, 0.15)}, cached_rows=256)
CUDA = Sizes(
    LARGE_1B,
    {(64, 128_256, "autocast"): Must(None, 0.40)},
    stage_I_tokens=8192,
    stage_II={"autocast": None},
    stage_II_rows=64,
    cached_rows=256,
    cache_tokens=8192,
    texts=(1024, 2048),
    encode={"bfloat16": (None, None)},
    growth={"rows": (8, 16, 32, 64), "tokens of a document": (64, 128, 256, 512), "vocabulary": (32_000, 128_256)},
    growth_rows=32,
    processes=(1, 2, 4, 8),
)
QUICK = Sizes(
    TINY, {(2, 8_000, "float32"): Must()}, stage_I_tokens=200, stage_II={"float32": None}, stage_II_rows=2,
    cached_rows=4, cache_tokens=200, texts=(4, 4), encode={"float32": (None, None)},
    growth={"rows": (1, 2), "vocabulary": (8_000, 9_000)}, growth_rows=1,
)  # fmt: skip


def of_base(folder: str) -> Sizes:
    """Of a real model, in float32 on a CPU: both stages, no goals."""
    shape = Shape.of(folder)
    measured_I: dict[tuple[int, int, Precision], Must] = {(8, shape.vocabulary, "float32"): Must()}
    plan = CPU._replace(shape=shape, stage_I=measured_I, stage_II={"float32": None}, cached_rows=8)
    return plan._replace(stage_II_rival=None, cached_memory=None, cached_time=None)


@dataclass(frozen=True)
class Options:
    """How it is measured: where, how often, and at how many tokens at once (None = what the plan says)."""

    device: str = "cpu"
    rounds: int = 5
    max_tokens: int | None = None


def measured(title: str, named: dict[str, Variant], rounds: int) -> tuple[Readings, str]:
    """The readings of all variants, and a note on those whose process did not survive."""
    logger.info("%s", title)
    readings, lost = take_turns(named, rounds)
    return readings, "; ".join(f"{name}: {why}" for name, why in lost.items())


def peaks(named: dict[str, Variant]) -> tuple[Readings, str]:
    """One step of each variant for its memory alone, in processes whose peak is what is in use and not what was.

    The C library otherwise keeps freed blocks for later, of which a process that makes tensors of ever other sizes has
    twice what it needs. Giving them back at once costs time, so nothing is timed here.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(GIVE_BACK_ABOVE)  # read by the workers when they start
    try:
        readings, lost = take_turns(named, rounds=1, warm_up=False)
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return readings, "; ".join(f"{name}: {why}" for name, why in lost.items())


def against_release(title: str, named: dict[str, Variant], readings: Readings, lost: str, must: Must) -> list[Line]:
    """Time, share of the matrix products' speed, and memory of the packed step beside the release-style one's."""
    memory, lost_for_memory = peaks({name: named[name] for name in ("packed", "release")})
    share = ratios(readings, "release", "matrix product", "rate")
    release_share = f"release-style {np.median(share):.2f}" if share else lost
    return [
        Line(f"{title}: times the release-style step", ratios(readings, "release", "packed", "seconds"), must.times,
             note=lost),
        Line(f"{title}: useful FLOPs over the matrix products' (MFU)",
             ratios(readings, "packed", "matrix product", "rate"), must.of_peak, note=release_share),
        Line(f"{title}: peak memory above the weights, release-style = 1",
             ratios(memory, "packed", "release", "memory"), at_most=must.memory,
             note=lost_for_memory or megabytes(memory, "packed", "release")),
    ]  # fmt: skip


def megabytes(readings: Readings, *names: str, figure: str = "memory") -> str:
    """Highest memory of each variant; nothing if one of them did not survive."""
    if not all(readings[name] for name in names):
        return ""
    figures = [max(getattr(reading, figure) for reading in readings[name]) / 1e6 for name in names]
    return f"{' against '.join(f'{value:,.0f}' for value in figures)} MB"


def stage_I(options: Options, plan: Sizes) -> list[Line]:
    """The packed step against the release-style one."""
    lines = []
    for (rows, vocabulary, precision), must in plan.stage_I.items():
        title = f"Stage I, {precision}, {rows} rows, V = {vocabulary:,}"
        shape = replace(plan.shape, vocabulary=vocabulary)
        most = options.max_tokens or plan.stage_I_tokens
        case = Case(shape, rows, precision, options.device, options.rounds, max_tokens=most)
        named = {
            "packed": Variant(variants.packed_stage_I, case),
            "release": Variant(variants.release_stage_I, case),
            "matrix product": Variant(variants.matrix_product, case),
        }
        readings, lost = measured(title, named, options.rounds)
        lines += against_release(title, named, readings, lost, must)
    return lines


def stage_II(options: Options, plan: Sizes) -> list[Line]:
    """The packed step, and the same with cached gradients, against the release's and sentence-transformers'."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        rival = find_spec("sentence_transformers") is not None
        if rival and not plan.shape.base:
            write_model(Path(folder), plan.shape)
        for precision, times in plan.stage_II.items():
            title = f"Stage II, LoRA, {precision}, {plan.stage_II_rows} rows"
            model = plan.shape.base or folder
            case = Case(plan.shape, plan.stage_II_rows, precision, options.device, options.rounds, folder=model)
            named = {
                "packed": Variant(variants.packed_stage_II, case),
                "cached": Variant(variants.packed_stage_II, replace(case, max_tokens=plan.cache_tokens)),
                "release": Variant(variants.release_stage_II, case),
                "matrix product": Variant(variants.matrix_product, case),
            }
            if rival:
                named["sentence-transformers"] = Variant(variants.sentence_transformers_stage_II, case)
            readings, lost = measured(title, named, options.rounds)
            lines += against_release(title, named, readings, lost, Must(times))
            rival_times = ratios(readings, "sentence-transformers", "packed", "seconds") if rival else []
            cached_times = ratios(readings, "cached", "packed", "seconds")
            lines += [
                Line(f"{title}: times sentence-transformers' step", rival_times, plan.stage_II_rival,
                     note="" if rival else NO_RIVAL),
                Line(f"{title}, cached gradients: time, packed step = 1", cached_times, at_most=plan.cached_time,
                     note=f"at most {plan.cache_tokens:,} tokens at once"),
                _cached_memory(case, plan),
            ]  # fmt: skip
    return lines


def _cached_memory(case: Case, plan: Sizes) -> Line:
    """What gradient caching saves, over a batch that is many micro-batches long."""
    title = f"Stage II, LoRA, {case.precision}, {plan.cached_rows} rows, cached gradients"
    many = replace(case, rows=plan.cached_rows, batches=1)
    named = {
        "cached": Variant(variants.packed_stage_II, replace(many, max_tokens=plan.cache_tokens)),
        "release": Variant(variants.release_stage_II, many),
    }
    logger.info("%s", title)
    readings, lost = peaks(named)
    return Line(
        f"{title}: peak memory above the weights, release-style = 1",
        ratios(readings, "cached", "release", "memory"),
        at_most=plan.cached_memory,
        note=lost or megabytes(readings, "cached", "release"),
    )


def large_pool(options: Options, plan: Sizes, queries: int) -> list[Line]:
    """Memory of a gradient-cached step with a large pool of in-batch negatives against one with 64 queries.

    Over short documents, as a micro-batch has as many tokens whatever the length, and a large pool takes long. Both
    pools' micro-batches are as large: 64 rows fill seven or eight, and by chance not to the brim.
    """
    mean, deviation = SHORT_DOCUMENT
    title = f"Stage II, cached gradients, {queries:,} queries, documents of {mean:.0f} tokens"
    small = Case(
        plan.shape, 64, next(iter(plan.stage_II)), options.device,
        document_length=(mean, deviation), max_tokens=plan.cache_tokens,
    )  # fmt: skip
    large = replace(small, rows=queries, max_tokens=variants.largest_micro_batch(small))
    named = {
        "small": Variant(variants.packed_stage_II, small),
        "large": Variant(variants.packed_stage_II, large),
    }
    logger.info("%s", title)
    readings, lost = peaks(named)
    return [
        Line(f"{title}: peak memory of the process, 64 queries = 1",
             ratios(readings, "large", "small", "whole_memory"), at_most=plan.pool_memory,
             note=lost or megabytes(readings, "large", "small", figure="whole_memory")),
        Line(f"{title}: peak memory above weights and batch, 64 queries = 1",
             ratios(readings, "large", "small", "memory"), note=lost or megabytes(readings, "large", "small")),
    ]  # fmt: skip


def encode(options: Options, plan: Sizes) -> list[Line]:
    """`LLM2Vec.encode` against sentence-transformers, over the same texts."""
    queries, documents = plan.texts
    kinds = {
        f"{queries:,} queries with an instruction": random_pairs(queries, QUERY_LENGTH, INSTRUCTION),
        f"{documents:,} documents": random_pairs(documents, DOCUMENT_LENGTH),
    }
    titles = [(f"Encoding, {dtype}, {name}", dtype, name, must)
              for dtype, goals in plan.encode.items() for name, must in zip(kinds, goals, strict=True)]  # fmt: skip
    if find_spec("sentence_transformers") is None:
        return [Line(f"{title}: times sentence-transformers", [], note=NO_RIVAL) for title, *_ in titles]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), plan.shape)
        for title, dtype, name, must in titles:
            case = EncodeCase(folder, plan.shape, kinds[name], dtype, options.device)
            named = {
                "ours": Variant(variants.encode_ours, case),
                "theirs": Variant(variants.encode_sentence_transformers, case),
                "matrix product": Variant(variants.matrix_product, Case(plan.shape, 1, dtype, options.device)),
            }
            readings, lost = measured(title, named, options.rounds)
            note = lost or f"{readings['ours'][0].tokens:,} tokens; lowest cosine {lowest_cosine(readings):.7f}"
            times = ratios(readings, "theirs", "ours", "seconds")
            of_peak = {one: ratios(readings, one, "matrix product", "rate") for one in ("ours", "theirs")}
            lines += [
                Line(f"{title}: times sentence-transformers", times, must, note=note),
                Line(
                    f"{title}: useful FLOPs over the matrix products'",
                    of_peak["ours"],
                    note=f"sentence-transformers {np.median(of_peak['theirs']):.2f}" if of_peak["theirs"] else lost,
                ),
            ]
    return lines


def lowest_cosine(readings: Readings) -> float:
    """Of each text's two vectors."""
    ours, theirs = (readings[name][0].vectors for name in ("ours", "theirs"))
    assert ours is not None and theirs is not None
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / lengths).min())
