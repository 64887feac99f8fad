"""Every figure of the embedding space equals a slow loop, whatever the ranks, and measuring changes no training."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file
from torch import Tensor

from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source
from llm2vec.files import DIAGNOSTICS_FILE
from llm2vec.llm2vec import LLM2Vec
from llm2vec.probes import diagnostics
from llm2vec.probes.diagnostics import (
    NUM_BINS,
    EmbeddingDiagnostics,
    RowTexts,
    effective_rank,
    histogram,
    mean_cosine,
    measure,
    uniformity,
)
from llm2vec.training.config.file import load_config
from llm2vec.types import Example, RunEnds, Stage, UserError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SOURCES = [
    Source("one", "one.jsonl", (Instruction("find the answer"), Instruction(""))),
    Source("<script>", "two.jsonl", (Instruction("find it", symmetric=True),)),
]
NUM_HELD_OUT = 6


# --- slow and obvious ---


def dot(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def squared_distance(x: list[float], y: list[float]) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def log_mean_potential(points: list[list[float]]) -> float:
    pairs = [(x, y) for i, x in enumerate(points) for y in points[:i]]
    return math.log(mean([math.exp(-2 * squared_distance(x, y)) for x, y in pairs]))


def entropy_rank(points: list[list[float]]) -> float:
    matrix = np.array(points)
    singular = np.linalg.svd(matrix - matrix.mean(axis=0), compute_uv=False)
    shares = [s / singular.sum() for s in singular.tolist()]
    return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0))


def counts(values: list[float]) -> list[int]:
    edges = [-1 + 2 * i / NUM_BINS for i in range(1, NUM_BINS)]
    bins = [sum(value >= edge for edge in edges) for value in values]
    return [bins.count(i) for i in range(NUM_BINS)]


def by_hand(vectors: list[list[float]], rows: RowTexts) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Figures and histograms, one pair of texts at a time."""
    query, positive, negative = rows.query_B.tolist(), rows.positive_B.tolist(), rows.negative_BK.tolist()
    documents = sorted(set(positive))
    own = [dot(vectors[q], vectors[p]) for q, p in zip(query, positive, strict=True)]
    hard = [[dot(vectors[q], vectors[n]) for n in of_row] for q, of_row in zip(query, negative, strict=True)]
    others = [[dot(vectors[q], vectors[d]) for d in documents if d != p] for q, p in zip(query, positive, strict=True)]
    pairs = [(x, y) for i, x in enumerate(documents) for y in documents[:i]]
    figures = {
        "alignment": mean([squared_distance(vectors[q], vectors[p]) for q, p in zip(query, positive, strict=True)]),
        "cosine_positive": mean(own),
        "cosine_hard_negative": mean([cosine for of_row in hard for cosine in of_row]),
        "beats_hard_negatives": mean([float(o > max(of_row)) for o, of_row in zip(own, hard, strict=True)]),
        "uniformity_query": log_mean_potential([vectors[q] for q in set(query)]),
        "uniformity_document": log_mean_potential([vectors[d] for d in documents]),
        "effective_rank": entropy_rank([vectors[d] for d in documents]),
        "anisotropy": mean([dot(vectors[x], vectors[y]) for x, y in pairs]),
        "cosine_random": mean([cosine for of_row in others for cosine in of_row]),
        "recall_at_1": mean([float(o > max(of_row)) for o, of_row in zip(own, others, strict=True)]),
    }
    histograms = {
        "positive": counts(own),
        "hard_negative": counts([cosine for of_row in hard for cosine in of_row]),
        "random": counts([cosine for of_row in others for cosine in of_row]),
    }
    return figures, histograms


# --- the figures ---


def random_rows(num_rows: int, dimensions: int, num_negatives: int) -> tuple[Tensor, RowTexts]:
    """Unit vectors, uneven as a model's are; queries lean to their positives, some texts belong to several rows."""
    generator = torch.Generator().manual_seed(num_rows + dimensions)
    points = torch.randn(4 * num_rows, dimensions, dtype=torch.float64, generator=generator)
    points = points * torch.linspace(0.2, 1, dimensions, dtype=torch.float64) + 0.3
    query_B = torch.arange(num_rows)
    positive_B = num_rows + torch.arange(num_rows) % (num_rows - 2)  # the last two rows have the first two's
    points[query_B] += points[positive_B]
    query_B[-3] = 0  # another row with this query has another positive
    negative_BK = torch.randint(num_rows, 4 * num_rows, (num_rows, num_negatives), generator=generator)
    negative_BK[negative_BK == positive_B.unsqueeze(1)] = 3 * num_rows
    return F.normalize(points, dim=1), RowTexts(query_B, positive_B, negative_BK)


@pytest.mark.parametrize(("num_rows", "dimensions", "num_negatives"), [(12, 5, 1), (9, 16, 3)])
@pytest.mark.parametrize("block_rows", [4, 512])
def test_every_figure_equals_a_slow_loop(
    num_rows: int, dimensions: int, num_negatives: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "BLOCK_ROWS", block_rows)
    vectors_ND, rows = random_rows(num_rows, dimensions, num_negatives)
    figures, histograms = measure(vectors_ND, rows)
    expected, expected_histograms = by_hand(vectors_ND.tolist(), rows)
    assert figures == pytest.approx(expected, rel=1e-12)
    assert histograms == expected_histograms
    assert 0 < expected["recall_at_1"] < 1 and 0 < expected["beats_hard_negatives"] < 1  # else they would prove little


def test_some_rows_are_measured_as_if_there_were_no_others() -> None:
    vectors_ND, rows = random_rows(12, 5, 2)
    part = slice(2, 9)
    figures, histograms = measure(vectors_ND, rows.of(part))
    expected, expected_histograms = by_hand(vectors_ND.tolist(), RowTexts(*(of_all[part] for of_all in rows)))
    assert figures == pytest.approx(expected, rel=1e-12)
    assert histograms == expected_histograms


def test_rows_without_hard_negatives_have_no_figures_of_them() -> None:
    vectors_ND, rows = random_rows(8, 4, 1)
    figures, _ = measure(vectors_ND, rows)
    without, histograms_without = measure(vectors_ND, rows._replace(negative_BK=rows.negative_BK[:, :0]))
    of_negatives = {"cosine_hard_negative", "beats_hard_negatives"}
    assert figures.keys() - without.keys() == of_negatives
    assert without == {name: value for name, value in figures.items() if name not in of_negatives}
    assert set(histograms_without) == {"positive", "random"}


def test_known_spaces() -> None:
    """Axes, an axis both ways, one point; and a cloud in three of ten dimensions."""
    axes = torch.eye(6, dtype=torch.float64)
    assert uniformity(axes) == pytest.approx(-4) and mean_cosine(axes) == pytest.approx(0, abs=1e-15)
    assert effective_rank(axes) == pytest.approx(5)  # centring takes one dimension
    both_ways = torch.stack([axes[0], -axes[0]])
    assert uniformity(both_ways) == pytest.approx(-8) and mean_cosine(both_ways) == pytest.approx(-1)
    assert effective_rank(both_ways) == pytest.approx(1)
    point = axes[:1].expand(4, 6)
    assert uniformity(point) == pytest.approx(0) and mean_cosine(point) == pytest.approx(1)
    assert effective_rank(point) == 0
    assert effective_rank(point + 1e-8 * axes[:4]) == 0  # as float32 rounding leaves it
    turn, _ = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))
    assert effective_rank(torch.randn(5000, 3, dtype=torch.float64) @ turn[:3]) == pytest.approx(3, rel=1e-3)


def test_a_draw_is_lost() -> None:
    """A positive no closer than what it is compared with does not beat it: where all is one point, nothing is found."""
    point = torch.eye(3, dtype=torch.float64)[:1].expand(6, 3)
    figures, _ = measure(point, RowTexts(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4], [5]])))
    assert figures["recall_at_1"] == figures["beats_hard_negatives"] == 0


def test_without_two_texts_there_are_no_pairs() -> None:
    vectors_ND, rows = random_rows(8, 4, 1)
    same = RowTexts(rows.query_B[:3], rows.positive_B[:1].expand(3), rows.negative_BK[:3])
    figures, histograms = measure(vectors_ND, same)
    assert set(figures) == {
        *("alignment", "cosine_positive", "cosine_hard_negative", "beats_hard_negatives", "uniformity_query"),
    }
    assert set(histograms) == {"positive", "hard_negative"}
    figures, _ = measure(vectors_ND, RowTexts(same.query_B[:1], same.positive_B[:1], same.negative_BK[:1]))
    assert "uniformity_query" not in figures


def test_a_histogram_has_both_ends_and_leaves_out_what_is_no_number() -> None:
    found = histogram(torch.tensor([[-1, -1 - 1e-12, 1, 1 + 1e-12], [0, 1e-12, -1e-12, math.nan]]).double())
    assert (found[0], found[NUM_BINS - 1], found[NUM_BINS // 2], found[NUM_BINS // 2 - 1]) == (2, 2, 2, 1)
    assert len(found) == NUM_BINS and sum(found) == 7


def test_a_broken_model_is_measured_too() -> None:
    """Not a number in, not a number out; the run goes on."""
    vectors_ND, rows = random_rows(8, 4, 1)
    vectors_ND[rows.positive_B[0]] = math.nan
    figures, histograms = measure(vectors_ND, rows)
    assert all(math.isnan(figures[name]) for name in ("alignment", "uniformity_document", "effective_rank"))
    assert figures["uniformity_query"] == pytest.approx(uniformity(vectors_ND[rows.query_B.unique()]))
    assert sum(histograms["positive"]) < 8 and figures["recall_at_1"] < 1


# --- of a model, over held-out rows ---


def write_sources(folder: Path) -> None:
    """Two sources of 18 rows: ragged texts, some of which belong to several rows."""
    for seed, source in enumerate(SOURCES):
        rows = [
            {
                "query": row.query.text,
                "positive": row.positive.text,
                "negative": [text.text for text in row.negatives],
            }
            for row in reference.examples(18, 2, seed=seed)
        ]
        rows[-1]["positive"] = rows[-3]["positive"]
        rows[-2]["query"] = rows[-4]["query"]
        write_jsonl(folder / source.file, rows)
    table = {s.name: {"file": s.file, "instruction": [one.text for one in s.instructions]} for s in SOURCES}
    table["<script>"]["symmetric"] = True  # type: ignore[assignment]
    (folder / "sources.json").write_text(json.dumps(table), encoding="utf-8")


def held_out(folder: Path, sources: list[Source] = SOURCES, num_negatives: int = 2) -> TrainingRows:
    return TrainingRows(folder, sources, num_negatives=num_negatives, num_held_out=NUM_HELD_OUT).held_out()


def tiny_embedder() -> LLM2Vec:
    """Under a template that tells a query without an instruction from a document."""
    model = tiny_model("llama", initializer_range=0.2)
    return LLM2Vec(model, family_tokenizer("llama"), "last", template="qwen3_embedding", attention="causal")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    return tmp_path


def by_hand_of(model: LLM2Vec, examples: list[Example]) -> tuple[dict[str, float], dict[str, list[int]]]:
    """The slow figures of rows, each text encoded by itself in the form its side asks for."""
    texts = [text for row in examples for text in (row.query, row.positive, *row.negatives)]
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    encoded = [model.encode([[t.instruction, t.text]], show_progress_bar=False, side=t.side) for t in place]
    vectors = F.normalize(torch.cat([torch.as_tensor(one) for one in encoded]).double(), dim=1).tolist()
    rows = RowTexts(
        torch.tensor([place[row.query] for row in examples]),
        torch.tensor([place[row.positive] for row in examples]),
        torch.tensor([[place[text] for text in row.negatives] for row in examples]),
    )
    return by_hand(vectors, rows)


def test_a_model_on_held_out_rows_over_all_and_by_source(folder: Path) -> None:
    rows, model, file = held_out(folder), tiny_embedder(), folder / "made" / DIAGNOSTICS_FILE
    assert {text.side for row in map(rows.__getitem__, range(12)) for text in row[1:3]} == {"query", "document"}
    figures = EmbeddingDiagnostics(model, rows, CPU, file)(7)
    examples = [rows[i] for i in range(len(rows))]
    expected, histograms = by_hand_of(model, examples)
    line: dict[str, Any] = {"step": 7, "all": histograms, "sources": {}}
    for number, source in enumerate(SOURCES):
        own, line["sources"][source.name] = by_hand_of(
            model, examples[number * NUM_HELD_OUT : (number + 1) * NUM_HELD_OUT]
        )
        expected |= {f"{name}/{source.name}": value for name, value in own.items()}
    # Cosines near 0 are sums of float32 numbers near 1: their error is absolute, and differs by processor.
    assert figures == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert json.loads(file.read_text(encoding="utf-8")) == line
    assert figures["alignment"] == pytest.approx(2 - 2 * figures["cosine_positive"])


def test_one_source_is_all(folder: Path) -> None:
    figures = EmbeddingDiagnostics(tiny_embedder(), held_out(folder, SOURCES[:1]), CPU, folder / "file")(0)
    assert len(figures) == 10 and not any("/" in name for name in figures)


def test_each_evaluation_adds_a_line_to_a_file_begun_anew(folder: Path) -> None:
    file = folder / DIAGNOSTICS_FILE
    file.write_text("of an earlier run\n", encoding="utf-8")
    probe = EmbeddingDiagnostics(tiny_embedder(), held_out(folder), CPU, file)
    assert file.read_text(encoding="utf-8") == "of an earlier run\n"  # kept until there is something new
    for step in (0, 5):
        probe(step)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line.pop("step") for line in lines] == [0, 5] and lines[0] == lines[1]


def test_a_file_that_cannot_be_written_ends_the_run_in_a_sentence(folder: Path) -> None:
    (folder / DIAGNOSTICS_FILE).mkdir()
    probe = EmbeddingDiagnostics(tiny_embedder(), held_out(folder), CPU, folder / DIAGNOSTICS_FILE)
    with pytest.raises(RunEnds, match=rf"{DIAGNOSTICS_FILE} could not be written \(.*Is a directory") as end:
        probe(3)
    assert end.value.code == 1


def test_generators_stay_as_they_were(folder: Path) -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    EmbeddingDiagnostics(tiny_embedder(), held_out(folder), CPU, folder / "file")(0)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index, union-attr]


def measure_on_a_rank(process: int, folder: Path) -> None:
    """What each spawned process runs; blocks are small, so that both have several."""
    os.environ |= {"HF_DATASETS_CACHE": str(folder / f"cache-{process}")}
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=process, world_size=2)
    model, encoded = tiny_embedder(), []
    encode: Callable[..., Any] = model.encode

    def counted(texts: list[list[str]], *arguments: Any, **further: Any) -> Any:
        encoded.extend(texts)
        return encode(texts, *arguments, **further)

    model.encode = counted  # type: ignore[method-assign]
    diagnostics.BLOCK_TEXTS = 8
    figures = EmbeddingDiagnostics(model, held_out(folder), CPU, folder / f"{process}.jsonl")(3)
    (folder / f"{process}.json").write_text(json.dumps([figures, len(encoded)]), encoding="utf-8")
    dist.destroy_process_group()


def test_two_ranks_measure_what_one_process_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; each encodes about half of the texts, and the first one writes."""
    torch.multiprocessing.spawn(measure_on_a_rank, (folder,), nprocs=2)
    monkeypatch.setattr(diagnostics, "BLOCK_TEXTS", 8)
    rows = held_out(folder)
    expected = EmbeddingDiagnostics(tiny_embedder(), rows, CPU, folder / "alone.jsonl")(3)
    found = [json.loads((folder / f"{process}.json").read_text(encoding="utf-8")) for process in range(2)]
    assert [figures for figures, _ in found] == [expected, expected]
    texts = {text for i in range(len(rows)) for text in (rows[i].query, rows[i].positive, *rows[i].negatives)}
    assert sum(number for _, number in found) == len(texts) and all(number > 8 for _, number in found)
    assert (folder / "0.jsonl").read_bytes() == (folder / "alone.jsonl").read_bytes()
    assert not (folder / "1.jsonl").exists()


# --- in a run ---


def config_for(folder: Path, name: str, **keys: Any) -> Path:
    content = {
        "model_name_or_path": str(folder / "base"),
        "sources_file": str(folder / "sources.json"),
        "output_dir": str(folder / name),
        "max_seq_length": 64,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.01,
        "max_steps": 4,
        "logging_steps": 1,
        "num_eval_rows": NUM_HELD_OUT,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **keys,
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def run(script: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The log, without what depends on time, and the weights of a run."""
    monkeypatch.setattr(sys, "argv", [script, str(file)])
    runpy.run_path(str(ROOT / "experiments" / script), run_name="__main__")
    lines = (file.with_suffix("") / "log.jsonl").read_text(encoding="utf-8").splitlines()
    timed = ("per_second", "runtime", "waiting")
    log = [{k: v for k, v in json.loads(line).items() if not any(word in k for word in timed)} for line in lines]
    (weights,) = file.with_suffix("").glob("*.safetensors")
    return log, load_file(weights)


@pytest.mark.parametrize(
    ("script", "keys", "num_figures"),
    [
        ("run_stage_I.py", {}, 8),
        ("run_stage_II.py", {"lora_dropout": 0.3, "num_hard_negatives": 2}, 10),
        ("run_lm.py", {}, 8),
        ("run_simcse.py", {"lora_dropout": 0.3}, 8),
    ],
)
def test_training_is_the_same_to_the_bit(
    script: str, keys: dict[str, Any], num_figures: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without diagnostics; what is logged beside them, too."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(folder / "base")
    family_tokenizer("llama").save_pretrained(folder / "base")
    plain_log, plain = run(script, config_for(folder, "plain", **keys), monkeypatch)
    log, weights = run(script, config_for(folder, "measured", embedding_diagnostics=True, **keys), monkeypatch)
    evaluations = [entry for entry in log if "eval_alignment" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4]
    added = {key for entry in evaluations for key in entry} - {key for entry in plain_log for key in entry}
    assert len(added) == 3 * num_figures and {"eval_recall_at_1/one", "eval_recall_at_1/<script>"} < added
    assert [{k: v for k, v in entry.items() if k not in added} for entry in log] == plain_log
    assert all(torch.equal(weights[name], weight) for name, weight in plain.items()) and len(weights) == len(plain)
    lines = (folder / "measured" / DIAGNOSTICS_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]
    assert not (folder / "plain" / DIAGNOSTICS_FILE).exists()
    assert len({entry["eval_uniformity_query"] for entry in evaluations}) == 3  # the model in training, not a copy


@pytest.mark.parametrize(
    ("keys", "stage", "sentence"),
    [
        ({"eval_strategy": "no"}, "stage_II", "embedding_diagnostics is true, but it is taken of held-out rows"),
        ({"eval_strategy": "no", "num_eval_rows": 0}, "stage_I", "set eval_strategy, and num_eval_rows to 2 or more."),
        ({"num_eval_rows": 1}, "stage_II", "set eval_strategy, and num_eval_rows to 2 or more."),
        ({"embedding_diagnostics": "yes"}, "stage_II", "embedding_diagnostics is 'yes'; a true or false is needed"),
        ({"fsdp": True, "save_only_model": True}, "stage_I", "embedding_diagnostics cannot run with fsdp"),
        ({}, "mntp", "embedding_diagnostics has no effect in mntp; it belongs to stage_II."),
    ],
)
def test_what_cannot_be_measured_is_refused(keys: dict[str, Any], stage: Stage, sentence: str, folder: Path) -> None:
    file = config_for(folder, "wrong", **({"embedding_diagnostics": True} | keys))
    with pytest.raises(UserError) as error:
        load_config(file, stage)
    assert sentence in str(error.value) and "\n" not in str(error.value)
