"""Two processes compute what one process computes: values, gradients, loss curves and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import reference
import torch
import torch.distributed as dist
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm2vec import processes as processes_module
from llm2vec.data.collation import CollateSides
from llm2vec.distributed import gather_with_gradient, max_over_ranks, sum_over_ranks
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import LORA_MODULES, attach_lora
from llm2vec.model.packing import checkpoint_contexts
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.negatives import RowFacts, hash_of
from llm2vec.processes import first_of_each_machine_first, rank, rank_zero_first, world_size
from llm2vec.text import batches
from llm2vec.text.templates import add_template_tokens
from llm2vec.training.log import LOG_FILE
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.training.step import backward_step, loss_parts, number_of_pieces, split_batch
from llm2vec.types import Batch

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2
#: The first rank's rows are the shorter ones.
ROWS = sorted(reference.examples(8, 1), key=lambda row: sum(len(text.text.split()) for text in row[1:3]))
VECTORS = torch.arange(24, dtype=torch.float64).reshape(6, 4).sin()
SETTINGS = EncoderSettings(pooling_mode="last", attention="causal")


class Step(NamedTuple):
    """What one optimiser step of an objective yields, and in how many pieces it was taken and had to be."""

    parts: dict[str, Tensor]
    gradients: dict[str, Tensor]
    pieces: tuple[int, int]


def stage_one() -> tuple[nn.Module, CollateSides]:
    model = reference.exact(tiny_model("llama", True, initializer_range=0.2))
    collate = CollateSides(row_tokenizer(family_tokenizer("llama"), SETTINGS), ("query", "positive"))
    return BidirectionalReconstruction(model, SETTINGS), collate


#: What rivals of Stage I add: states of a memory, a teacher, a rest, a bag, a map, and what is trained.
PRETEXTS: dict[str, dict[str, Any]] = {
    "kl_lora": {"trainable": "lora", "decoder": "frozen", "target_loss": "kl"},
    "gen_tokens": {
        "trainable": "tokens", "decoder": "frozen", "alpha": 1.0, "projection": "linear", "imitation_weight": 0.7,
    },
    "next_copy": {"target": "next", "decoder": "frozen", "target_loss": "kl"},
    "bag_modelling": {"target": "self", "target_loss": "bag", "lm_weight": 1.0},
}  # fmt: skip


def pretext(name: str) -> tuple[nn.Module, Callable[[Any], Batch]]:
    """One of them, over a memory of two states."""
    torch.manual_seed(0)
    keys = dict(PRETEXTS[name])
    trainable = keys.pop("trainable", "full")
    tokenizer = family_tokenizer("llama")
    new, settings = add_template_tokens(tokenizer, "memory_2"), EncoderSettings("mean", template="memory_2")
    model: Any = tiny_model("llama", True, tokenizer=tokenizer, initializer_range=0.2)
    if trainable != "full":
        modules = LORA_MODULES if trainable == "lora" else ()
        model.requires_grad_(False)
        model.model = attach_lora(model.model, r=4, alpha=8, dropout=0.0, modules=modules, new_tokens=new)
        for weight_name, parameter in model.named_parameters():
            if "lora_B" in weight_name:
                nn.init.normal_(parameter, std=0.3)
    objective = BidirectionalReconstruction(
        reference.exact(model), settings, bottleneck="states", bos_id=1, teacher_width=4, **keys
    )
    sides = BidirectionalReconstruction.sides_of("memory_2", {"target": keys.get("target", "counterpart")})
    sides_of = CollateSides(row_tokenizer(tokenizer, settings), sides, facts=RowFacts(teacher=some_vectors))

    def collate(rows: Any) -> Batch:
        with mock.patch.object(batches, "LEAST_PART", 2):  # the rows here are a few words long
            return sides_of(rows)

    return objective.train().double(), collate


def some_vectors(texts: Any) -> Tensor:
    """Four numbers for each text."""
    return torch.tensor([[hash_of(text) >> 9 * i & 511 for i in range(4)] for text in texts]).double().sin()


def stage_two(checkpointing: bool = False) -> tuple[nn.Module, CollateSides]:
    torch.manual_seed(0)
    decoder = tiny_model("llama", initializer_range=0.2)
    model = reference.exact(attach_lora(decoder, r=4, alpha=8, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    if checkpointing:
        enable_checkpointing(model, {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, decoder)})
    collate = CollateSides(row_tokenizer(family_tokenizer("llama"), SETTINGS), ("query", "positive", "negative"))
    return ContrastiveLearning(model, SETTINGS).train(), collate


#: Objectives, and the most tokens at once. The budgets are such that the second rank needs more pieces.
STEPS: dict[str, tuple[Callable[[], tuple[nn.Module, Callable[[Any], Batch]]], int | None]] = {
    "stage_I": (stage_one, None),
    "stage_I_in_pieces": (stage_one, 45),
    **{name: (partial(pretext, name), None) for name in PRETEXTS},
    **{f"{name}_in_pieces": (partial(pretext, name), 38) for name in PRETEXTS},
    "stage_II": (stage_two, None),
    "stage_II_in_pieces": (stage_two, 70),
    "stage_II_in_pieces_recomputed": (partial(stage_two, checkpointing=True), 70),
    "stage_II_row_by_row": (stage_two, 1),
}


def own_rows(rows: Any) -> Any:
    """This rank's share of a list or tensor: consecutive rows, as the trainer deals them out."""
    share = len(rows) // world_size()
    return rows[rank() * share : (rank() + 1) * share]


def weighted(gathered: Tensor, of_rank: int) -> Tensor:
    """A loss over gathered rows that weighs every entry differently on each rank."""
    weight = torch.arange(gathered.numel(), dtype=gathered.dtype).reshape(gathered.shape).cos() + of_rank
    return (gathered**3 * weight).sum()


def take_step(name: str, wrap: bool) -> Step:
    """One step over this rank's rows, by the trainer's rule: totals of all ranks, loss times ranks, the wrapper."""
    make, max_tokens = STEPS[name]
    objective, collate = make()
    batch: Batch = collate(own_rows(ROWS))
    totals = {part: sum_over_ranks(count) for part, count in objective.count(batch).items()}
    model: Any = DistributedDataParallel(objective) if wrap else objective  # kept: its hooks die with it
    no_sync = model.no_sync if wrap else nullcontext
    parts = backward_step(model, batch, totals, max_tokens=max_tokens, scale=world_size(), no_sync=no_sync)
    figures = loss_parts(model, batch, totals, max_tokens)
    for part, value in parts.items():
        torch.testing.assert_close(figures[part], value, rtol=1e-12, atol=0)
    tokens = [sum(sum(side["lengths"]) for side in collate([row]).values()) for row in own_rows(ROWS)]
    pieces = len(split_batch(batch, max_tokens)), number_of_pieces(tokens, max_tokens or sum(tokens))
    return Step({part: sum_over_ranks(value) for part, value in parts.items()}, reference.gradients(objective), pieces)


def work(process: int, folder: Path) -> None:
    """What each spawned process runs; its findings go to a file of its own."""
    os.environ["LOCAL_RANK"] = str(process)
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=process, world_size=NUM_RANKS)
    rows = own_rows(VECTORS).clone().requires_grad_()
    gathered = gather_with_gradient(rows)
    weighted(gathered, process).backward()
    own = torch.tensor([1.0 + process, 10.0])
    summed = sum_over_ranks(own)
    with rank_zero_first():
        first = not (folder / "built").exists()
        if process == 0:
            time.sleep(0.3)
            (folder / "built").touch()
    findings = {
        "world": (world_size(), rank()),
        "gathered": gathered.detach(),
        "gathered_gradient": rows.grad,
        "sum": (own, summed),
        "max": max_over_ranks(3 - process),
        "found_nothing_built": first,
        "wrapped": {name: take_step(name, wrap=True)._asdict() for name in STEPS},
        "bare": {name: take_step(name, wrap=False)._asdict() for name in STEPS},
    }
    torch.save(findings, folder / f"{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (folder,), nprocs=NUM_RANKS)
    return [torch.load(folder / f"{process}.pt") for process in range(NUM_RANKS)]


# --- the collectives ---


def test_one_process_is_the_identity() -> None:
    rows = VECTORS.clone().requires_grad_()
    assert (world_size(), rank()) == (1, 0)
    assert gather_with_gradient(rows) is rows
    summed = sum_over_ranks(rows)
    assert torch.equal(summed, rows) and summed is not rows and not summed.requires_grad
    with rank_zero_first():
        pass


def test_a_machines_first_process_comes_before_its_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of two processes, here threads: the run's first, the other machine's first, then the others."""
    here, barrier, came = threading.local(), threading.Barrier(4, timeout=60), list[int]()
    monkeypatch.setattr(processes_module, "world_size", lambda: 4)
    monkeypatch.setattr(processes_module, "rank", lambda: here.rank)
    monkeypatch.setattr(processes_module, "local_rank", lambda: here.rank % 2)
    monkeypatch.setattr(processes_module, "_patient_group", lambda: None)
    monkeypatch.setattr(processes_module, "wait_for_all", barrier.wait)

    def process(number: int) -> None:
        here.rank = number
        with first_of_each_machine_first(), rank_zero_first():
            time.sleep(0.05 * (number % 2 == 0))  # or the order may be chance
            came.append(number)

    threads = [threading.Thread(target=process, args=(number,)) for number in (3, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert came[:2] == [0, 2] and sorted(came[2:]) == [1, 3]


def test_ranks_know_themselves(ranks: list[dict[str, Any]]) -> None:
    assert [found["world"] for found in ranks] == [(2, 0), (2, 1)]


def test_gathered_rows_and_their_gradient_equal_one_process(ranks: list[dict[str, Any]]) -> None:
    """Rows come in rank order; a row's gradient is the sum of what both ranks' losses give it."""
    rows = VECTORS.clone().requires_grad_()
    (weighted(rows, 0) + weighted(rows, 1)).backward()
    assert rows.grad is not None
    for found in ranks:
        assert torch.equal(found["gathered"], VECTORS)
    actual = torch.cat([found["gathered_gradient"] for found in ranks])
    torch.testing.assert_close(actual, rows.grad, rtol=1e-12, atol=0)
    alone = VECTORS.clone().requires_grad_()
    weighted(alone, 0).backward()  # what rank 0 would keep if gradients did not travel
    assert not torch.allclose(actual[:3], alone.grad[:3], rtol=0.01)


def test_sum_over_ranks_adds_and_leaves_its_input_alone(ranks: list[dict[str, Any]]) -> None:
    for process, found in enumerate(ranks):
        own, summed = found["sum"]
        assert own.tolist() == [1.0 + process, 10.0]
        assert summed.tolist() == [3.0, 20.0]


def test_max_over_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [found["max"] for found in ranks] == [3, 3]
    assert max_over_ranks(5) == 5


def test_rank_zero_goes_first(ranks: list[dict[str, Any]]) -> None:
    assert [found["found_nothing_built"] for found in ranks] == [True, False]


# --- the objectives ---


@pytest.mark.parametrize("name", list(STEPS))
def test_a_step_of_two_ranks_equals_one_process_with_all_rows(name: str, ranks: list[dict[str, Any]]) -> None:
    """Loss parts summed over ranks, and every parameter's averaged gradient on both ranks; and those of one pass."""
    expected = take_step(name, wrap=False)
    whole = take_step("_".join(name.split("_")[:2]), wrap=False)
    for found in ranks:
        step = Step(**found["wrapped"][name])
        assert step.parts.keys() == expected.parts.keys()
        for part, value in expected.parts.items():
            torch.testing.assert_close(step.parts[part], value, rtol=1e-9, atol=0)
        reference.assert_same_gradients(step.gradients, expected.gradients)
        reference.assert_same_gradients(step.gradients, whole.gradients)
    taken, needed = zip(*(found["wrapped"][name]["pieces"] for found in ranks), strict=True)
    assert taken == (max(needed),) * 2
    if "pieces" in name:
        assert 1 < needed[0] < needed[1]
    assert (max(needed) > 1) == ("pieces" in name or "row_by_row" in name)


@pytest.mark.parametrize("name", list(STEPS))
def test_without_the_wrapper_ranks_would_drift_apart(name: str, ranks: list[dict[str, Any]]) -> None:
    """The guard of the test above: what a rank computes by itself is not the step's gradient."""
    with pytest.raises(AssertionError, match="apart"):
        reference.assert_same_gradients(
            ranks[0]["bare"][name]["gradients"], ranks[1]["bare"][name]["gradients"], relative=0.01
        )


# --- the entry points ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and one source of 32 ragged rows."""
    folder = tmp_path_factory.mktemp("entry")
    tiny_model("llama", True, initializer_range=0.1).save_pretrained(folder / "base")
    family_tokenizer("llama").save_pretrained(folder / "base")
    rows = reference.examples(32, 1, seed=1)
    write_jsonl(
        folder / "words.jsonl",
        [{"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text} for r in rows],
    )
    sources = {"words": {"file": "words.jsonl", "instruction": "find the answer"}}
    (folder / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    return folder


class Outcome(NamedTuple):
    """What a run leaves behind."""

    log: list[dict[str, float]]
    weights: dict[str, Tensor]


def train(stage: str, folder: Path, name: str, processes: int = 1, **keys: Any) -> Outcome:
    """One run of a script, under torchrun where there are several processes."""
    config = {
        "model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / name),
        "sources_file": str(folder / "sources.json"),
        "max_seq_length": 64,
        # SGD, because a step is then as exact as its gradient. Adam divides a gradient by its own size, so that
        # float32 rounding in one next to zero would show in the weight.
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **keys,
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "experiments" / f"run_{stage}.py"), str(file)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = (folder / name / LOG_FILE).read_text(encoding="utf-8").splitlines()
    log = [entry for entry in map(json.loads, lines) if "loss" in entry]
    weights = "adapter_model" if (folder / name / "adapter_model.safetensors").exists() else "model"
    return Outcome(log, load_file(folder / name / f"{weights}.safetensors"))


def assert_same_run(actual: Outcome, expected: Outcome, parts: tuple[str, ...]) -> None:
    """The same curve of loss, its parts and gradient norm, and the same weights, both to 1e-6."""
    assert [entry["step"] for entry in actual.log] == [entry["step"] for entry in expected.log] == [1, 2, 3, 4]
    assert len({round(entry["loss"], 3) for entry in expected.log}) == 4  # a flat curve would prove nothing
    for one, other in zip(actual.log, expected.log, strict=True):
        for part in ("loss", "grad_norm", *parts):
            assert one[part] == pytest.approx(other[part], rel=1e-6, abs=1e-6), (part, one["step"])
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(actual.weights[name], weight, rtol=0, atol=1e-6, msg=name)


STAGE_I_PARTS = ("loss_q2d", "loss_d2q")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Outcome:
    """Stage I in one process, eight rows at once."""
    outcome = train("stage_I", folder, "plain", per_device_train_batch_size=8, total_batch_size=8)
    base = load_file(folder / "base/model.safetensors")
    moved = max(float((outcome.weights[name] - weight).abs().max()) for name, weight in base.items())
    assert moved > 1e-3
    return outcome


def test_torchrun_equals_python(folder: Path, plain: Outcome) -> None:
    """Stage I on two processes, two micro-batches of two rows each, in pieces, recomputing activations."""
    layout = {"per_device_train_batch_size": 2, "total_batch_size": 8, "gradient_checkpointing": True}
    layout |= {"tokens_per_microbatch": 64}
    assert_same_run(train("stage_I", folder, "two", 2, **layout), plain, STAGE_I_PARTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, {"per_device_train_batch_size": 2}),
        (1, {"per_device_train_batch_size": 8, "gradient_checkpointing": True}),
        (1, {"per_device_train_batch_size": 1, "gradient_checkpointing": True}),
        (2, {"per_device_train_batch_size": 4}),
        (2, {"per_device_train_batch_size": 1}),
        (2, {"tokens_per_microbatch": 64}),
        (2, {"per_device_train_batch_size": 2, "tokens_per_microbatch": 64, "gradient_checkpointing": True}),
        (4, {"per_device_train_batch_size": 2}),
    ],
    ids=str,
)
def test_stage_I_does_not_depend_on_the_layout(
    processes: int, layout: dict[str, Any], folder: Path, plain: Outcome
) -> None:
    """Processes, accumulation and recomputing are one equivalence class."""
    name = "-".join(map(str, [processes, *layout.values()]))
    assert_same_run(train("stage_I", folder, name, processes, total_batch_size=8, **layout), plain, STAGE_I_PARTS)


@pytest.mark.slow
def test_stage_II_does_not_depend_on_the_layout(folder: Path) -> None:
    """With the same pool of documents: one process of eight rows, two of four, and either in pieces, recomputing
    activations."""
    keys = {"total_batch_size": 8, "lora_dropout": 0.0, "lora_r": 4, "learning_rate": 0.1}
    one = train("stage_II", folder, "II-one", per_device_train_batch_size=8, **keys)
    assert max(float(weight.abs().max()) for name, weight in one.weights.items() if "lora_B" in name) > 1e-3
    pieces = {"tokens_per_microbatch": 64, "gradient_checkpointing": True}
    for processes, further in ((2, {}), (2, pieces), (1, pieces)):
        layout = {"per_device_train_batch_size": 8 // processes, **further}
        two = train("stage_II", folder, f"II-{processes}-{len(further)}", processes, **layout, **keys)
        assert_same_run(two, one, ("loss_contrastive", "in_batch_accuracy"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
def test_batches_of_a_sources_own_do_not_depend_on_the_layout(stage: str, folder: Path) -> None:
    """Two sources, of which one has batches of half the rows: on two processes as on one."""
    table = {name: {"file": "words.jsonl", **entry} for name, entry in (("a", {}), ("b", {"batch_size": 4}))}
    (folder / "mixed.json").write_text(json.dumps(table), encoding="utf-8")
    keys = {"sources_file": str(folder / "mixed.json"), "total_batch_size": 8}
    keys |= {"lora_dropout": 0.0, "lora_r": 4, "learning_rate": 0.1} if stage == "stage_II" else {}
    one = train(stage, folder, f"{stage}-own-one", per_device_train_batch_size=8, **keys)
    two = train(stage, folder, f"{stage}-own-two", 2, per_device_train_batch_size=4, tokens_per_microbatch=64, **keys)
    assert_same_run(two, one, STAGE_I_PARTS if stage == "stage_I" else ("loss_contrastive", "in_batch_accuracy"))


@pytest.mark.slow
def test_every_rank_sees_another_order_in_the_second_epoch(folder: Path) -> None:
    """Two epochs on two processes equal two epochs on one, so `set_epoch` reaches the order on every rank."""
    keys = {"total_batch_size": 16, "max_steps": -1, "num_train_epochs": 2}
    one = train("stage_I", folder, "epochs-one", per_device_train_batch_size=16, **keys)
    two = train("stage_I", folder, "epochs-two", 2, per_device_train_batch_size=8, **keys)
    assert_same_run(two, one, STAGE_I_PARTS)
