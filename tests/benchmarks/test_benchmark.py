"""The benchmark compares like with like, counts what it says, and runs from end to end."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from helpers import tiny_model
from torch import Tensor, nn

from benchmarks.growth import GrowthPoint, growth_figure, growth_lines
from benchmarks.inputs import Case, Shape, random_model, random_pairs, random_rows, write_model
from benchmarks.measure import (
    Line,
    Meter,
    Reading,
    Readings,
    Runnable,
    Variant,
    lines_table,
    measure_step,
    ratios,
    take_turns,
)
from benchmarks.pretexts import ANCHOR, RECIPES, PretextCase, keys_of, pretext_step
from benchmarks.reference import pad, release_stage_I_loss, release_stage_II_loss
from benchmarks.sections import QUICK, lowest_cosine, peaks
from benchmarks.variants import (
    LOSS_SCALE,
    packed_stage_I,
    packed_stage_II,
    release_stage_I,
    release_stage_II,
    sentence_transformers_stage_II,
    training_flops,
)
from llm2vec.text.tokenization import Row

ROOT = Path(__file__).parents[2]
SHAPE = Shape(layers=2, hidden=32, intermediate=64, heads=4, kv_heads=2, vocabulary=600)
CASE = Case(SHAPE, rows=3, batches=2, document_length=(30.0, 15.0))


# --- The release-style steps are the objectives' losses ---


def target_ids(rows: Sequence[Row]) -> list[list[int]]:
    return [[token for token, wanted in zip(row.ids, row.target, strict=True) if wanted] for row in rows]


def test_release_style_stage_I_is_algorithm_1() -> None:
    """Loss and every gradient, in float64, with rows of different lengths and checkpointing on."""
    model = reference.exact(tiny_model("llama", True, initializer_range=0.2)).train()
    case = replace(CASE, shape=replace(SHAPE, vocabulary=int(model.config.vocab_size)))
    queries, documents = random_rows(case, "query", 0), random_rows(case, "positive", 0)
    assert len({len(row.ids) for row in documents}) > 1
    expected = reference.stage_one(model, list(zip(queries, documents, strict=True)), 0.2)
    expected.loss.backward()
    gradients = reference.gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = [[[row.ids for row in rows] for rows in (queries, documents)], [target_ids(queries), target_ids(documents)]]
    query, document, query_text, document_text = (pad(side, "cpu", left=True) for sides in ids for side in sides)
    loss = release_stage_I_loss(model, query, document, query_text, document_text, 0.2)
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-9, atol=0)
    reference.assert_same_gradients(reference.gradients(model), gradients)


def test_release_style_stage_II_is_equation_6() -> None:
    model = reference.exact(tiny_model("llama", initializer_range=0.2)).train()
    case = replace(CASE, shape=replace(SHAPE, vocabulary=int(model.config.vocab_size)))
    sides = [random_rows(case, side, 0) for side in ("query", "positive", "negative")]
    step = [(query, positive, [negative]) for query, positive, negative in zip(*sides, strict=True)]
    expected = reference.stage_two(model, step, LOSS_SCALE)
    expected.backward()
    gradients = reference.gradients(model)
    padded = [pad([row.ids for row in side], "cpu", left=True) for side in sides]
    loss = release_stage_II_loss(model, padded, LOSS_SCALE)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    reference.assert_same_gradients(reference.gradients(model), gradients)


# --- All variants of a case do the same work ---


def gradients_of(work: Runnable, index: int) -> list[Tensor]:
    """In the order of the parameters; what holds the model names them differently."""
    assert work.model is not None
    work.model.zero_grad(set_to_none=True)
    work.step(index)
    return list(reference.gradients(work.model).values())


def assert_same_work(actual: Runnable, expected: Runnable) -> None:
    """Counts and gradients of every batch, the second one after the first."""
    assert (actual.flops, actual.tokens) == (expected.flops, expected.tokens)
    for index in range(CASE.batches):
        ours, theirs = gradients_of(actual, index), gradients_of(expected, index)
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).abs().max() <= 1e-4 * other.abs().max()
            assert other.abs().max() > 0


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_packed_stage_I_does_the_release_styles_work(max_tokens: int | None) -> None:
    assert_same_work(packed_stage_I(replace(CASE, max_tokens=max_tokens)), release_stage_I(CASE))


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_packed_stage_II_does_the_release_styles_work(max_tokens: int | None) -> None:
    assert_same_work(packed_stage_II(replace(CASE, max_tokens=max_tokens)), release_stage_II(CASE))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pretexts_step_is_its_recipes(recipe: str) -> None:
    """It trains what the recipe trains, and the text itself takes as many tokens as the counterpart."""
    work = pretext_step(PretextCase(CASE, keys_of(recipe)))
    work.step(0)
    assert work.model is not None
    trained = {name: w.grad for name, w in work.model.named_parameters() if w.grad is not None}
    assert any(gradient.abs().max() > 0 for gradient in trained.values())
    assert all("lora" in name or "tokens" in name for name in trained) == recipe.endswith(("lora", "tokens"))
    anchors = pretext_step(PretextCase(CASE, keys_of(ANCHOR)))
    assert len(work.tokens) == len(work.flops) == CASE.batches
    assert (work.tokens == anchors.tokens) == (recipe in (ANCHOR, "target_self"))


def test_sentence_transformers_step_does_the_same_work(tmp_path: Path) -> None:
    write_model(tmp_path, SHAPE)
    rival = sentence_transformers_stage_II(replace(CASE, folder=str(tmp_path)))
    assert_same_work(rival, release_stage_II(CASE))


def test_bfloat16_cases_hold_and_compute_bfloat16() -> None:
    for work in (
        packed_stage_II(replace(CASE, precision="bfloat16")),
        release_stage_I(replace(CASE, precision="bfloat16")),
    ):
        assert work.model is not None
        assert {parameter.dtype for parameter in work.model.parameters()} == {torch.bfloat16}
        assert all(bool(gradient.isfinite().all()) for gradient in gradients_of(work, 0))


# --- What is counted ---


def test_rows_have_the_lengths_of_real_texts_and_repeat() -> None:
    case = Case(SHAPE, rows=4000)
    for side, mean in (("query", 24), ("positive", 170)):
        rows = random_rows(case, side, 0)
        lengths = [len(row.ids) for row in rows]
        assert np.mean(lengths) == pytest.approx(mean, rel=0.05)
        assert max(lengths) <= 512
        assert all(len(row.ids) == len(row.pooled) == len(row.target) and row.pooled[-1] for row in rows)
        assert all(sum(row.target) == len(row.ids) - 6 for row in rows)
        assert rows == random_rows(case, side, 0) != random_rows(case, side, 1)
    assert {len(row.ids) for row in random_rows(replace(case, document_length=(64, 0)), "positive", 0)} == {64}


def test_matrix_entries_are_those_of_the_model() -> None:
    layer = random_model(SHAPE, with_head=True).model.layers[0]
    matrices = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in matrices] == SHAPE.projections


def test_useful_flops_by_hand() -> None:
    """One layer of width 2 with an MLP of width 3, over texts of one and two tokens: 1 + 3 attended pairs."""
    shape = Shape(layers=1, hidden=2, intermediate=3, heads=1, kv_heads=1, vocabulary=5)
    weights = 4 * 2 * 2 + 3 * 2 * 3
    attention = 3 * (2 * 2 + 2 * 2) * 4  # forward and twice that backward; a product and a sum for each of two widths
    assert training_flops(shape, [1, 2]) == 6 * weights * 3 + attention
    assert training_flops(shape, [1, 2], num_targets=2) == 6 * weights * 3 + attention + 6 * 2 * 5 * 2
    lora = 4 * (2 + 2) + 3 * (2 + 3)
    assert training_flops(shape, [1, 2], lora_r=1) == (4 * weights + 6 * lora) * 3 + attention


def test_texts_and_cosines() -> None:
    pairs = random_pairs(50, (24, 12), "find it")
    assert len(pairs) == 50 and {instruction for instruction, _ in pairs} == {"find it"}
    assert 15 < np.mean([len(text.split()) for _, text in pairs]) < 33
    one = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    other = np.array([[3.0, 0.0], [2.0, 2.0]], dtype=np.float32)
    readings = {"ours": [reading(vectors=one)], "theirs": [reading(vectors=other)]}
    assert lowest_cosine(readings) == pytest.approx(0.5**0.5)


# --- Measuring ---


def reading(seconds: float = 1.0, memory: int = 0, vectors: np.ndarray | None = None) -> Reading:
    return Reading(seconds, memory, memory, 10.0, 5, vectors)


def test_memory_is_that_of_the_step_alone() -> None:
    """A high-water mark set before the step, and what another step held, do not count."""
    sizes = [60_000_000, 20_000_000]

    def step(index: int) -> None:
        torch.ones(sizes[index], dtype=torch.uint8)

    before = torch.ones(150_000_000, dtype=torch.uint8)
    del before
    meter = Meter("cpu")
    meter.start()
    work = Runnable(step, "cpu", [2.0], [3], repeats=2)
    for index in (0, 1):
        found = measure_step(work, meter, index)
        assert found.memory == pytest.approx(sizes[index], rel=0.15)
        assert (found.flops, found.tokens, found.vectors) == (2.0, 3, None)


def idle(case: str) -> Runnable:
    """Variants for a worker: `case` says what becomes of it. Its one-thread setting is handed back as a vector."""
    order: list[int] = []

    def step(index: int) -> Tensor:
        order.append(index)
        if case == "killed" and len(order) == 2:
            os.kill(os.getpid(), 9)
        if case == "memory" and len(order) == 2:
            raise MemoryError
        if case == "broken":
            raise KeyError("what went wrong")
        return torch.tensor([*order, torch.get_num_threads()], dtype=torch.float32)

    return Runnable(step, "cpu", [1.0], [1])


def leaves_holes(_: None) -> Runnable:
    """Never more than 80 MB in use: what comes last would fit into the holes that are left, were it not larger."""

    def step(index: int) -> None:
        torch.ones(30_000_000, dtype=torch.uint8)  # once one of a size is freed, the C library keeps what is smaller
        blocks: list[Tensor | None] = [torch.ones(2_000_000, dtype=torch.uint8) for _ in range(40)]
        blocks[::2] = [None] * 20
        blocks += [torch.ones(3_000_000, dtype=torch.uint8) for _ in range(10)]

    return Runnable(step, "cpu", [1.0], [1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the variable is the GNU C library's")
def test_peaks_are_of_what_is_in_use() -> None:
    readings, lost = peaks({"holes": Variant(leaves_holes, None)})
    assert readings["holes"][0].memory == pytest.approx(80e6, rel=0.1) and not lost
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ


@pytest.mark.slow
def test_variants_take_turns_and_a_lost_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = ("well", "killed", "memory")
    readings, lost = take_turns({name: Variant(idle, name) for name in names}, rounds=2)
    assert [list(r.vectors) for r in readings["well"] if r.vectors is not None] == [[0, 0, 1], [0, 0, 1, 1]]
    assert readings["killed"] == readings["memory"] == []
    assert lost == {"killed": "its process ended with code -9", "memory": "it ran out of memory"}
    assert ratios(readings, "killed", "well", "seconds") == []


@pytest.mark.slow
def test_a_fault_in_a_step_is_raised_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="what went wrong"):
        take_turns({"broken": Variant(idle, "broken")}, rounds=1)


def test_ratios_are_taken_within_a_round() -> None:
    readings: Readings = {"a": [reading(2.0, 30), reading(9.0, 10)], "b": [reading(1.0, 10), reading(3.0, 10)]}
    assert ratios(readings, "a", "b", "seconds") == [2.0, 3.0]
    assert ratios(readings, "a", "b", "memory") == [3.0, 1.0]
    assert ratios(readings, "b", "a", "rate") == [2.0, 3.0]
    assert ratios(readings, "b", "a", "speed") == [2.0, 3.0]


def test_table() -> None:
    lines = [
        Line("fast", [2.5, 1.0, 3.0], at_least=2.0, note="well"),
        Line("small", [0.2], at_most=0.15),
        Line("many", [1234.6, 1000.0], digits=0),
        Line("lost", [], at_least=3),
    ]
    assert lines_table(lines).splitlines()[2:] == [
        "| fast | 2.50 (1.00, 3.00) | at least 2: reached | well |",
        "| small | 0.20 | at most 0.15: missed |  |",
        "| many | 1,117 (1,000, 1,235) |  |  |",
        "| lost | not measured | at least 3 |  |",
    ]


def test_growth_is_listed_and_drawn(tmp_path: Path) -> None:
    points = [
        GrowthPoint("rows", rows, name, [reading(1.0 / rows), reading(2.0 / rows)], [reading(memory=10**6 * rows)])
        for rows in (4, 8)
        for name in ("packed", "release-style")
    ]
    assert growth_lines(points)[0].values == [20.0, 10.0]
    assert growth_lines(points)[2].note == "8 MB"
    points.append(GrowthPoint("rows", 16, "release-style", [], []))
    assert len(growth_figure(points, {}).axes) == 2
    figure = growth_figure(points, {1: [10.0, 12.0], 2: [20.0, 18.0]})
    upper, over_processes, lower, _ = figure.axes
    assert [list(line.get_xdata()) for line in upper.lines] == [[4, 8], [4, 8]]
    assert list(lower.lines[0].get_ydata()) == [4.0, 8.0]
    assert [list(line.get_ydata()) for line in over_processes.lines] == [[11.0, 19.0], [11.0, 22.0]]
    figure.savefig(tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").stat().st_size > 1000


# --- The script ---


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.benchmark", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_script_measures_and_writes_everything(tmp_path: Path) -> None:
    out, plot = tmp_path / "table.md", tmp_path / "growth.png"
    finished = run_benchmark("--quick", "--pool", "70", "--out", str(out), "--plot", str(plot))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert out.read_text(encoding="utf-8") == finished.stdout
    assert "1 thread(s)" in finished.stdout
    rows = [line for line in finished.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    of_growth = 2 * sum(len(values) for values in QUICK.growth.values())
    assert len(rows) == 3 + 6 + 2 + 4 + of_growth + len(QUICK.processes) + 1
    assert "not measured" not in finished.stdout
    cosines = [float(line.split("lowest cosine ")[1].split()[0]) for line in rows if "lowest cosine" in line]
    assert len(cosines) == 2 and min(cosines) > 0.99999
    assert plot.stat().st_size > 1000


@pytest.mark.slow
def test_the_script_measures_one_section() -> None:
    finished = run_benchmark("--quick", "--only", "stage_I")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("| Stage I, float32, 2 rows") == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "stage_III"], ["--only", "'stage_III'", "stage_I, stage_II, encode, growth, processes"]),
        (["--device", "tpu"], ["--device is 'tpu'", "cpu, cuda"]),
        (["--rounds", "0"], ["--rounds is 0"]),
        (["--max-tokens", "-1"], ["--max-tokens is -1"]),
        (["--only", "encode", "--plot", "x.svg"], ["--plot", "--only growth"]),
        (["--plot", "x.txt"], ["--plot", ".svg or .png"]),
    ],
)
def test_a_wrong_option_is_one_sentence(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "benchmarks/benchmark.py"), run_name="__main__")
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmarks/benchmark.py"), run_name="__main__")
    assert "no CUDA device" in capsys.readouterr().err
