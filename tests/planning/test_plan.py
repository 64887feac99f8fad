"""Plans: the run's own lines, every shipped config, what is assumed where something is missing, warnings, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from transformers import GPT2Config, PretrainedConfig

from benchmarks.shapes import SHAPES
from llm2vec.commands import plan as plan_command
from llm2vec.commands.plan import card_of
from llm2vec.compare.recipes import read_set
from llm2vec.model.vault import Folder
from llm2vec.planning import plan as plan_module
from llm2vec.planning.gpus import CARDS, Card
from llm2vec.planning.plan import Conditions, Plan, make_plan, stage_of
from llm2vec.planning.words import as_the_run_says, num_checkpoints, report, warnings_of
from llm2vec.training import run as run_module
from llm2vec.training.run import Schedule
from llm2vec.training.stages import stage_parts
from llm2vec.types import Stage, UserError
from tests.training import test_config, test_vectors

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments/plan.py"
CONFIGS = ROOT / "train_configs"
SETS = sorted(path.parent for path in (CONFIGS / "comparison").glob("*/shared.json"))
ASSUMED = {"tokens_query": 24, "tokens_document": 170}
RECORD = json.loads((ROOT / "results/simulation.json").read_text(encoding="utf-8"))
#: Config -> bytes of a process's step, by `benchmarks.simulate`, over the assumed lengths on eight cards.
SIMULATED = {name: of_step["peak"] for of_step in RECORD.values() for name in of_step["configs"]}
#: How the lines of a plan without data begin.
HEADS = (
    "model", "assumed", "steps", "rows", "tokens", "trainable", "precision", "output", "work", "memory", "disk",
)  # fmt: skip


@functools.cache
def _model(part: str, *keys: Any) -> Any:
    """A model of a base's shape, made once; `keys` is what decides about it."""
    config, *tokens = _ASKED[part, *keys]
    return _MODEL_OF_SHAPES(config, SHAPES[part][0], *tokens)


_ASKED: dict[Any, Any] = {}
_MODEL_OF_SHAPES = plan_module.model_of_shapes


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's `config.json` files, by the names of the bases."""

    def shape(folder: Folder) -> PretrainedConfig:
        return next(shape for part, (shape, _) in SHAPES.items() if part in folder.path)

    def model_of_shapes(config: Any, shape: PretrainedConfig, new_tokens: Any, trained: Any) -> Any:
        part = next(part for part, (known, _) in SHAPES.items() if known is shape)
        adapter = config.use_peft and (config.lora_r, config.lora_dropout)
        key = (part, stage_parts(config).kind(config).needs_head, config.torch_dtype, adapter, config.stage == "simcse")
        _ASKED[key] = (config, new_tokens, trained)
        return _model(*key)

    # Where neither models nor data of an earlier run lie.
    (tmp_path / "train_configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_module, "config_of", shape)
    monkeypatch.setattr(plan_module, "model_of_shapes", model_of_shapes)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and data that are really there."""
    path = tmp_path_factory.mktemp("files")
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(path / "base")
    family_tokenizer("llama").save_pretrained(path / "base")
    rows = reference.under_one_instruction(reference.examples(24, 1))
    content = [
        {"query": row.query.text, "positive": row.positive.text, "negative": row.negatives[0].text} for row in rows
    ]
    for source in ("nq", "quora_duplicates"):
        write_jsonl(path / f"data/{source}.jsonl", content)
    lines = "\n".join(row.positive.text for row in rows)
    (path / "lines.txt").write_text(lines * 4, encoding="utf-8")
    return path


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    """A base to change, and the data, whose tables are built once."""
    shutil.copytree(files / "base", tmp_path / "base")
    for name in ("data", "lines.txt"):
        (tmp_path / name).symlink_to(files / name)
    return tmp_path


def write(folder: Path, **keys: Any) -> Path:
    """A config of a short run over what is in `folder`; None takes a key out."""
    every = {
        "model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "dataset_file_path": str(folder / "data"),
        "sources": ["nq", "quora_duplicates"],
        "template": "llama3",
        "max_seq_length": 128,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | keys
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in every.items() if value is not None}), encoding="utf-8")
    return path


def planned(folder: Path, conditions: Conditions | None = None, /, **keys: Any) -> Plan:
    return make_plan(write(folder, **keys), conditions or Conditions(stage="stage_II"))


# --- plan and run say the same ---

STAGES: dict[str, dict[str, Any]] = {
    "stage_I": {"alpha": 0.2, "gradient_accumulation_steps": 2},
    "stage_I token sets": {
        "template": "llara",
        "pooling_mode": "mean",
        "bottleneck": "states",
        "target": "both",
        "target_loss": "bag",
        "alpha": 0.5,
        "lm_weight": 1.0,
    },
    "stage_I kl": {
        "template": "memory_4",
        "pooling_mode": "mean",
        "bottleneck": "states",
        "target": "next",
        "target_loss": "kl",
        "decoder": "frozen",
        "trainable": "lora",
    },
    "stage_II": {"loss_scale": 20, "num_train_epochs": 3, "max_steps": -1, "stop_after_n_steps": 2},
    "stage_II micro-batches": {
        "one_source_per": "micro_batch",
        "gradient_accumulation_steps": 5,
        "num_train_epochs": 3,
        "max_steps": -1,
    },
    "stage_II grit": {"lm_weight": 1.0, "torch_dtype": "bfloat16", "own_negatives_only": ["nq"]},
    "stage_II few-shot": {"template": "bge_en_icl", "examples_per_query": 2, "lora_r": 4},
    "lm": {"tokens_per_microbatch": 128},
    "simcse": {"dataset_file_path": "lines.txt", "dataset_name": "Wiki1M", "sources": None},
    "mntp": {"dataset_file_path": "lines.txt", "sources": None, "template": None, "max_seq_length": 16},
}


class _Begun(Exception):
    """The run has said what it will do."""


@pytest.mark.parametrize("name", STAGES)
def test_a_plan_says_what_the_run_says(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Line for line, from the script itself, which is stopped before it trains."""

    def begin(*_: Any, **__: Any) -> None:
        raise _Begun

    monkeypatch.setattr(run_module, "plan_sharding", begin)
    stage: Any = name.split()[0]
    monkeypatch.chdir(folder)
    path = write(folder, **STAGES[name])
    caplog.set_level(logging.INFO)
    script = ROOT / f"experiments/run_{stage}.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(path)])
    with pytest.raises(_Begun):
        runpy.run_path(str(script), run_name="__main__")
    said = [record.getMessage() for record in caplog.records if record.name == "llm2vec.training.run"]
    said = said[next(i for i, line in enumerate(said) if line.startswith("model ")) :]
    plan = make_plan(path, Conditions(stage=stage))
    assert as_the_run_says(plan) == said
    of_rows = stage not in ("simcse", "mntp")  # whose texts have no sides
    assert len(said) == 8 + plan.objective.contrasts + of_rows
    assert plan.memory is not None and plan.memory.most > 0


def test_rows_that_fill_no_whole_step_are_counted(folder: Path) -> None:
    """As the trainer takes them: 12 micro-batches, 5 a step."""
    keys = STAGES["stage_II micro-batches"]
    assert planned(folder, **keys).schedule == Schedule(9, 9, 3)
    assert any("steps       9 of a schedule over 9 (3 an epoch)" in line for line in report(planned(folder, **keys)))


def test_the_budgets_line_is_worded_alike(folder: Path) -> None:
    """Measured there, reckoned here; the words are those of one function."""
    plan = planned(folder, Conditions(stage="stage_I"), tokens_per_microbatch=200, activation_memory_gb=0.0008)
    assert plan.recomputation.startswith("activations 0.00 GB for 200 tokens at once, of 0.0008 GB; ")
    assert any(plan.recomputation in line for line in report(plan))


# --- shipped configs ---


def conditions_for(keys: dict[str, Any], stage: Stage | None, name: str) -> Conditions:
    processes = 8 if keys.get("total_batch_size") == 512 or name in SIMULATED else 1
    return Conditions(processes, CARDS["A100-80GB"], stage=stage, **ASSUMED)


def stored_vectors(keys: dict[str, Any], folder: Path) -> dict[str, str]:
    """Stand-ins for the stronger models' vectors that a config names."""
    named = [key for key in ("guide", "teacher_vectors") if key in keys]
    if named and not (folder / "vectors").is_dir():
        test_vectors.write(folder / "vectors", {"0" * 16: [1.0, 0.0]})
    return dict.fromkeys(named, str(folder / "vectors"))


def assert_complete(plan: Plan) -> None:
    """A plan that says everything a plan can say without data."""
    lines = report(plan)
    begins = [line.split()[0] for line in lines]
    for head in (
        "model",
        "assumed",
        "steps",
        "rows",
        "tokens",
        "trainable",
        "precision",
        "output",
        "work",
        "memory",
        "disk",
    ):
        assert head in begins, head
    assert ("negatives" in begins) == (plan.config.stage in ("stage_II", "simcse"))
    assert not any("nan" in line or "inf " in line for line in lines)
    assert plan.memory is not None and plan.memory.most > plan.memory.parts[0].size


def assert_as_simulated(plan: Plan, name: str) -> None:
    """The plan's memory lies within 15 % of the simulation's, where the step was simulated."""
    assert plan.memory is not None
    assert abs(plan.memory.most / SIMULATED.get(name, plan.memory.most) - 1) < 0.15, name


def test_the_simulations_table_is_that_of_its_record() -> None:
    """In docs/performance.md: each row's figures of memory."""
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    rows = {tuple(cell.strip() for cell in line.split("|")[1:10]) for line in text.splitlines() if line.startswith("|")}
    told = {row[0].strip("`"): row[5:8] for row in rows if len(row) == 9 and row[0].startswith("`")}
    assert len(told) == 8
    for name, figures in told.items():
        of_step = next(of_step for of_step in RECORD.values() if name in of_step["configs"])
        planned, simulated = of_step["planned"] / 1e9, of_step["peak"] / 1e9
        assert figures == (f"{planned:.1f}", f"{simulated:.1f}", f"{planned / simulated:.2f}")


@pytest.mark.parametrize("path", test_config.SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_config_is_planned(path: Path, hub: None, tmp_path: Path) -> None:
    """Without data, tokenizer or weights, and with the stage told by the keys or, for `lm`, by the flag."""
    stage, name = test_config.stage_of(path), f"{path.parent.name}/{path.stem}"
    keys = json.loads(path.read_text(encoding="utf-8"))
    if stage == "lm":
        with pytest.raises(UserError, match="--stage"):
            stage_of(path)
    if vectors := stored_vectors(keys, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(keys | vectors), encoding="utf-8")
    plan = make_plan(path, conditions_for(keys, stage if stage == "lm" else None, name))
    assert plan.config.stage == stage
    assert_complete(plan)
    assert (name in SIMULATED) == (stage != "simcse" and "quickstart" not in name)  # tiny, or with another attention
    assert_as_simulated(plan, name)
    published = next(number for part, (_, number) in SHAPES.items() if part in str(keys))
    weights = [weight for weight in plan.model.parameters() if not plan.config.use_peft or not weight.requires_grad]
    head = 0 if plan.objective.needs_head else _untied_head(plan.model.config)
    assert sum(weight.numel() for weight in weights) == published - head


def _untied_head(shape: Any) -> int:
    """Parameters of a head that the model was planned without."""
    return 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_every_compared_recipe_is_planned(folder: Path, hub: None, tmp_path: Path) -> None:
    recipes = read_set(folder)
    count = 0
    for recipe in recipes.recipes:
        for stage, own, _ in recipe.stages:
            keys = {
                **recipes.shared["all"],
                **recipes.shared.get(stage, {}),
                **own,
                "output_dir": str(tmp_path / "out"),
            }
            path = tmp_path / "config.json"
            path.write_text(json.dumps(keys | stored_vectors(keys, tmp_path)), encoding="utf-8")
            name = f"{folder.name}/{recipe.name}" if stage == "stage_I" else ""
            plan = make_plan(path, conditions_for(keys, stage, name))
            assert_complete(plan)
            assert_as_simulated(plan, name)
            count += 1
    assert count > (5 if folder.name == "negatives" else 15)


# --- figures by hand ---


def shipped(path: str, conditions: Conditions) -> Plan:
    return make_plan(CONFIGS / path, conditions)


@pytest.mark.parametrize(
    ("path", "weights", "hidden", "vocabulary", "attention", "hours"),
    [
        ("stage_I/MetaLlama3.2_1b_q2d_d2q.json", 16 * 60_817_408, 2048, 128_256, 16 * 2048, 0.58),
        ("stage_I/MetaLlama3.1_8b_q2d_d2q.json", 32 * 218_103_808, 4096, 128_256, 32 * 4096, 3.9),
    ],
)
def test_operations_and_hours_of_stage_I(
    path: str, weights: int, hidden: int, vocabulary: int, attention: int, hours: float, hub: None
) -> None:
    """6 x weights x tokens of both passes, the head at the targets, attention; 8 A100 at half their 312 TFLOP/s."""
    plan = shipped(path, Conditions(8, CARDS["A100-80GB"], 0.5, **ASSUMED))
    pairs = 2 * (24 * 25 / 2 + 170 * 171 / 2)
    a_row = 6 * weights * 2 * (24 + 170) + 6 * hidden * vocabulary * (24 + 170) + 12 * attention * pairs
    assert plan.flops_a_step == pytest.approx(512 * a_row, rel=1e-9)
    assert plan.tokens_a_step == 512 * (24 + 170)
    reckoned = 2000 * 512 * a_row / (8 * 312e12 * 0.5) / 3600
    assert reckoned == pytest.approx(hours, rel=0.02)
    assert f"time        about {reckoned:.1f} h in 2,000 steps on 8 x A100-80GB" in "\n".join(report(plan))


def test_operations_of_stage_II(hub: None) -> None:
    """4 x frozen weights and 6 x adapter a token."""
    path = "baseline/MetaLlama3.2_1b_baseline_stage2.json"
    plan = shipped(path, Conditions(8, CARDS["A100-80GB"], **ASSUMED))
    adapter = 16 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
    tokens, pairs = 24 + 2 * 170, 24 * 25 / 2 + 2 * 170 * 171 / 2
    a_row = (4 * 16 * 60_817_408 + 6 * adapter) * tokens + 12 * 16 * 2048 * pairs
    assert plan.flops_a_step == pytest.approx(512 * a_row, rel=1e-9)
    trained = sum(weight.numel() for weight in plan.model.parameters() if weight.requires_grad)
    assert trained == adapter


def test_the_overviews_hours_and_memory(hub: None) -> None:
    """What `docs/reproduce/index.md` says of every model's stages is what the plan says, in its digits."""
    page = (ROOT / "docs/reproduce/index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(.+)` \| [^|]+ \| (\S+), (\S+) \| (\S+), (\S+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for name, *said in rows:
        plans = [
            shipped(path, Conditions(8, CARDS["A100-80GB"], **ASSUMED))
            for path in (f"stage_I/{name}_q2d_d2q.json", f"stage_II/{name}_stage1_2000steps_stage2.json")
        ]
        work = [(plan.steps or 0) * plan.flops_a_step for plan in plans]
        hours = [f"{flops / (8 * 312e12 * plans[0].conditions.utilisation) / 3600:.1f}" for flops in work]
        memory = [f"{plan.memory.most / 1e9:.0f}" for plan in plans if plan.memory is not None]
        assert said == [*hours, *memory], name


def test_one_small_cards_memory(hub: None, tmp_path: Path) -> None:
    """What `docs/guides/small_cards.md` says of Stage I of 1B, row by row."""
    page = (ROOT / "docs/guides/small_cards.md").read_text(encoding="utf-8")
    keys = json.loads((CONFIGS / "stage_I/MetaLlama3.2_1b_q2d_d2q.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `(\{.*\})` \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    reckoned = []
    for changed, _ in rows:
        file = tmp_path / "small.json"
        file.write_text(json.dumps({**keys, **json.loads(changed)}), encoding="utf-8")
        memory = make_plan(file, Conditions(1, CARDS["RTX-4090"], stage="stage_I", **ASSUMED)).memory
        reckoned.append(memory and f"{memory.most / 1e9:.1f}")
    assert [said for _, said in rows] == reckoned


@pytest.mark.parametrize(("seconds", "said"), [(0.123, "0.12 s"), (123.4, "123 s"), (7200.0, "2.0 h")])
def test_time_is_written_out(seconds: float, said: str, folder: Path) -> None:
    """Without powers of ten, however long."""
    plan = planned(folder)
    tflops = 3 * plan.flops_a_step / (0.4e12 * seconds)
    conditions = Conditions(card=Card("card", 24, tflops_float32=tflops))
    lines = report(dataclasses.replace(plan, conditions=conditions))
    assert any(line.startswith(f"time        about {said} in 3 steps on 1 x card") for line in lines)


@pytest.mark.parametrize(
    ("keys", "peak"),
    [({}, 19.5), ({"tf32": True}, 156), ({"bf16": True}, 312), ({"bf16": True, "tf32": True}, 312)],
)
def test_the_peak_is_that_of_the_runs_precision(
    keys: dict[str, Any], peak: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", lambda _: None)
    plan = planned(folder, Conditions(stage="stage_II", card=CARDS["A100-80GB"]), **keys)
    assert f"({peak:g} TFLOP/s each)" in "\n".join(report(plan))
    own = card_of(SimpleNamespace(card=None, card_memory_gb=80.0, card_tflops=150.0))
    assert "(150 TFLOP/s each)" in "\n".join(report(dataclasses.replace(plan, conditions=Conditions(card=own))))


def test_memory_by_part(hub: None) -> None:
    """Llama-3.2-1B in float32 over eight processes: 4 bytes a weight, its gradient, its buckets; 8 of Adam."""
    path = "stage_I/MetaLlama3.2_1b_q2d_d2q.json"
    plan = shipped(path, Conditions(8, CARDS["A100-80GB"], **ASSUMED))
    assert plan.memory is not None
    parts = {part.name: part.size for part in plan.memory.parts}
    number = SHAPES["Llama-3.2-1B"][1]
    assert parts["weights"] == parts["gradients"] == parts["buckets"] == 4 * number
    assert parts["optimiser state"] == 8 * number
    assert parts["half-precision weights"] == 2 * 16 * 60_817_408  # the layers' matrices, once for both passes
    alone = shipped(path, Conditions(1, CARDS["A100-80GB"], **ASSUMED))
    assert alone.memory is not None and "buckets" not in {part.name for part in alone.memory.parts}


def test_activations_follow_the_bound_on_tokens(folder: Path) -> None:
    def activations(**keys: Any) -> float:
        plan = planned(folder, per_device_train_batch_size=8, **keys)
        assert plan.memory is not None
        return next(part.size for part in plan.memory.parts if part.name == "activations")

    whole = activations()
    longest = max(max(texts.tokens_of_rows) for texts in planned(folder).by_source)
    cut = activations(tokens_per_microbatch=256)
    assert cut < whole
    assert cut < activations(tokens_per_microbatch=512) <= 2 * cut
    assert longest < 256
    assert activations(gradient_checkpointing=True) < 0.2 * whole


@pytest.mark.parametrize(
    ("lengths", "bound", "at_once"),
    [
        ((194,) * 16, 8192, 6208 + 194),  # 12,416 tokens in two pieces, to a row
        ((194,) * 16, 16_384, 12_416),
        ((94, 294) * 8, 8192, 12_416 / 2 + 800 + 294),  # two deviations are 1,600 tokens
        ((194,) * 16, 6208, 6208),
        ((94, 294) * 8, 6208, 6208),  # some step has just as many tokens as two pieces hold
    ],
)
def test_pieces_are_balanced(lengths: tuple[int, ...], bound: int, at_once: float, folder: Path) -> None:
    """By hand, of 64 rows."""
    plan = planned(folder, per_device_train_batch_size=8, max_seq_length=256, tokens_per_microbatch=bound)
    step = plan_module._step_of(plan, plan.all_rows._replace(tokens_of_rows=lengths), 0, 64)  # sources have fewer rows
    assert step.scale * sum(lengths) == pytest.approx(at_once)
    assert step.accumulates == (bound < 12_416)


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_steps": 20}, 5),
        ({"save_steps": 30}, 4),  # 30, 60, 90, and the last step
        ({"save_steps": 30, "stop_after_n_steps": 70}, 2),
        ({"save_steps": 0.25}, 4),
        ({"save_steps": 10, "save_total_limit": 3}, 3),
        ({"save_strategy": "epoch"}, 9),  # 12 steps an epoch
    ],
)
def test_number_of_checkpoints(keys: dict[str, Any], number: int, folder: Path) -> None:
    plan = planned(folder, **{"save_strategy": "steps", "max_steps": 100, **keys})
    assert plan.schedule is not None
    assert num_checkpoints(plan) == number


def test_disk_is_what_checkpoints_hold(folder: Path) -> None:
    plan = planned(folder, save_strategy="steps", save_steps=1)
    adapter = 4 * sum(weight.numel() for weight in plan.model.parameters() if weight.requires_grad)
    (line,) = [line for line in report(plan) if line.startswith("disk")]
    total = (3 * 3 * adapter + adapter) / 1e6  # three checkpoints with Adam's two moments, and the last weights
    assert total > 0.1
    assert line.startswith(f"disk        {total:.2f} MB: 3 checkpoint(s) of {3 * adapter / 1e6:.2f} MB")


# --- what is missing ---


def test_without_data_the_lengths_are_assumed(folder: Path) -> None:
    path = write(folder, dataset_file_path=str(folder / "none"), max_seq_length=256)
    with pytest.raises(
        UserError, match=r"dataset_file_path: .*none is not a folder.* --tokens_query and --tokens_document"
    ):
        make_plan(path, Conditions(stage="stage_II"))
    plan = make_plan(path, Conditions(stage="stage_II", **ASSUMED))
    lines = report(plan)
    assert "assumed     24 tokens a query and 170 a document, as rows or tokenizer are not at hand" in lines
    assert plan.tokens_a_step == 4 * (24 + 2 * 170)
    assert any(line.startswith("steps       3 of a schedule over 3, warm-up") for line in lines)


def test_assumed_lengths_are_cut_as_the_run_cuts(folder: Path) -> None:
    keys = {"dataset_file_path": str(folder / "none"), "max_seq_length": 100}
    plan = planned(folder, Conditions(stage="stage_II", **ASSUMED), **keys)
    assert plan.assumption.startswith("24 tokens a query and 100 a document (cut at max_seq_length), as rows")
    assert plan.tokens_a_step == 4 * (24 + 2 * 100)
    assert (
        plan.memory
        == planned(folder, Conditions(stage="stage_II", tokens_query=24, tokens_document=100), **keys).memory
    )
    assert planned(folder, Conditions(stage="lm", **ASSUMED), **keys).tokens_a_step == 4 * 100


def test_without_data_a_schedule_of_epochs_is_not_known(folder: Path) -> None:
    keys = {"dataset_file_path": str(folder / "none"), "max_steps": -1, "num_train_epochs": 3, "save_steps": 2}
    conditions = Conditions(stage="stage_II", card=CARDS["L4"], **ASSUMED)
    plan = planned(folder, conditions, save_strategy="steps", stop_after_n_steps=7, **keys)
    assert (plan.schedule, plan.steps, num_checkpoints(plan)) == (None, 7, 3)
    lines = report(plan)
    assert "steps       at most 7 of 3 epoch(s) of rows that are not there to be counted" in lines
    assert any(line.startswith("work") and line.endswith("operations in 7 steps") for line in lines)
    assert any(line.startswith("time") and " in 7 steps on 1 x L4 (30.3 TFLOP/s each)" in line for line in lines)
    plan = planned(folder, conditions, save_strategy="steps", **keys)
    assert (plan.schedule, plan.steps, num_checkpoints(plan)) == (None, None, None)
    assert any(line.startswith("work") and line.endswith("operations a step") for line in report(plan))


def test_without_a_tokenizer_rows_are_counted_and_lengths_assumed(folder: Path) -> None:
    for file in (folder / "base").glob("*token*"):
        file.unlink()
    path = write(folder)
    with pytest.raises(UserError, match="has no tokenizer that can be read here"):
        make_plan(path, Conditions(stage="stage_II"))
    plan = make_plan(path, Conditions(stage="stage_II", **ASSUMED))
    assert plan.schedule == Schedule(3, 3, 12)


def test_without_the_base_another_of_its_shape_serves(folder: Path) -> None:
    """As before a Stage II whose Stage I has not run."""
    path = write(folder, model_name_or_path="output/stage_I/to-come")
    with pytest.raises(UserError, match=r"'output/stage_I/to-come' has no config.json .* --base"):
        make_plan(path, Conditions(stage="stage_II"))
    plan = make_plan(path, Conditions(stage="stage_II", base=str(folder / "base")))
    there = planned(folder)
    assert plan.memory == there.memory
    assert report(plan)[0].startswith("model       output/stage_I/to-come, ")


def test_a_family_with_unknown_layers_is_one_sentence(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_head=4, n_layer=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a gpt2 cannot be planned, its layers are not known here"):
        make_plan(CONFIGS / "stage_I/MetaLlama3.2_1b_q2d_d2q.json", Conditions(base=str(tmp_path), **ASSUMED))


def test_adapters_that_are_not_there_yet_change_nothing_and_are_named(folder: Path) -> None:
    plan = planned(folder, peft_model_name_or_path="output/mntp/to-come")
    assert plan.memory == planned(folder).memory
    assert next(warnings_of(plan)).startswith("the adapter output/mntp/to-come is not there; ")


def test_blocks_of_text_need_no_lengths(folder: Path) -> None:
    keys = {"dataset_file_path": str(folder / "none.txt"), "sources": None, "max_seq_length": 64}
    plan = planned(folder, Conditions(stage="mntp"), **keys)
    assert plan.tokens_a_step == 4 * 64
    assert plan.assumption == "blocks of 64 tokens"


def test_weights_are_not_read(folder: Path) -> None:
    (folder / "base/model.safetensors").unlink()
    plan = planned(folder)
    assert {weight.device.type for weight in plan.model.parameters()} == {"meta"}
    torch.testing.assert_close(plan.tokens_a_step, planned(folder).tokens_a_step)


# --- warnings ---

WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "schedule": ({"max_steps": 100, "stop_after_n_steps": 50}, "stops after 50 (stop_after_n_steps)"),
    "warm-up": ({"warmup_steps": 5}, "warm-up takes 5 steps and the run 3"),
    "cut": ({"max_seq_length": 70}, "of the texts are cut at max_seq_length 70"),
    "long rows": ({"tokens_per_microbatch": 80, "max_seq_length": 80}, "is 80, but there are rows of"),
    "left out": ({"per_device_train_batch_size": 20}, "4 of nq's 24 rows are left out of an epoch"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "accumulation over 2 micro-batches adds no negatives"),
    "symmetric": ({}, "in quora_duplicates queries and documents are texts of one kind"),
    "held out": ({"num_eval_rows": 4}, "num_eval_rows holds 4 rows of each source back, but eval_strategy is no"),
    "bfloat16": ({"torch_dtype": "bfloat16", "use_peft": False}, "AdamW loses updates"),
    "optimiser": ({"optim": "ademamix"}, "the state of optim ademamix is counted as AdamW's"),
    "compiled": ({"torch_compile": True}, "compiled layers keep less"),
    "no state": ({}, "a run cut short starts anew"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warning(name: str, folder: Path) -> None:
    keys, words = WARNINGS[name]
    (found,) = [warning for warning in warnings_of(planned(folder, **keys)) if words in warning]
    assert found.endswith(".")


def test_nothing_to_warn_of(folder: Path) -> None:
    keys = {"save_strategy": "steps", "mask_false_negatives": True, "eval_strategy": "no"}
    assert list(warnings_of(planned(folder, **keys))) == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_peft": True, "torch_dtype": "bfloat16"}, "AdamW loses updates"),  # adapters are float32
        ({"torch_dtype": "bfloat16", "optim": "stable_adamw", "optim_args": "kahan_sum=True"}, "AdamW loses updates"),
        ({"stop_after_n_steps": 3}, "learning rate"),
        ({"gradient_accumulation_steps": 1}, "adds no negatives"),
        ({"sources": ["nq"]}, "texts of one kind"),
    ],
)
def test_no_warning(keys: dict[str, Any], words: str, folder: Path) -> None:
    assert not any(words in warning for warning in warnings_of(planned(folder, **keys)))


def test_an_output_folder_that_is_there(folder: Path) -> None:
    (folder / "out").mkdir()
    assert not any("is there" in warning for warning in warnings_of(planned(folder)))
    (folder / "out/log.jsonl").write_text("", encoding="utf-8")
    assert any("another one is refused" in warning for warning in warnings_of(planned(folder)))
    assert any("are removed" in warning for warning in warnings_of(planned(folder, resume="never")))


def test_an_output_folder_that_cannot_be_written(folder: Path) -> None:
    (folder / "file").touch()
    found = list(warnings_of(planned(folder, output_dir=str(folder / "file/out"))))
    assert f"output_dir: {folder / 'file/out'} cannot be written to (Not a directory)." in found


def test_a_card_that_is_too_small(folder: Path) -> None:
    most = planned(folder, Conditions(stage="stage_II", card=Card("big", 80))).memory
    assert most is not None
    for share, words in ((0.5, "does not fit tiny's"), (1.05, "fills tiny's")):
        card = Card("tiny", share * most.most / 1e9)
        warnings = list(warnings_of(planned(folder, Conditions(stage="stage_II", card=card))))
        assert any(words in warning and "tokens_per_microbatch" in warning for warning in warnings)
    for processes, words in ((1, "optim adamw_8bit"), (2, "fsdp shares the weights")):
        card = Card("tiny", 0.1 * most.most / 1e9)
        warnings = list(warnings_of(planned(folder, Conditions(processes, card, stage="stage_I"))))
        assert sum(said in warning for warning in warnings for said in ("adamw_8bit", "fsdp")) == 1
        assert any(words in warning for warning in warnings), "a run of one process refuses fsdp"
    roomy = Card("roomy", 2 * most.most / 1e9)
    assert not any(
        "roomy" in warning for warning in warnings_of(planned(folder, Conditions(stage="stage_II", card=roomy)))
    )


def test_a_program_reads_the_numbers_of_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a person reads goes to stderr, and says the same."""
    config = write(folder, max_steps=3, output_dir=str(folder / "file/out"))
    (folder / "file").touch()
    plan = make_plan(config, Conditions(stage="stage_II", card=CARDS["A100-80GB"]))
    capsys.readouterr()  # of the rows, which are read once
    plan_command.main([str(config), "--stage", "stage_II", "--card", "A100-80GB", "--json"])
    printed = capsys.readouterr()
    figures, memory, warnings = map(json.loads, printed.out.splitlines())
    assert plan.memory is not None
    values = {row["Figure"]: row["Value"] for row in figures["rows"]}
    assert [values[name] for name in ("steps", "tokens a step", "useful operations a step")] == [
        3, plan.tokens_a_step, plan.flops_a_step,
    ]  # fmt: skip
    assert values["seconds"] == pytest.approx(3 * plan.flops_a_step / (19.5e12 * 0.4))
    sizes = [row["Bytes"] for row in memory["rows"]]
    assert sizes == [*(part.size for part in plan.memory.parts if part.size), plan.memory.most]
    assert [row["Warning"] for row in warnings["rows"]] == list(warnings_of(plan)) != []
    assert printed.err == "\n".join(report(plan)) + "\n"


# --- refusals, and the script ---


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"learnin_rate": 1}, "did you mean 'learning_rate'"),
        ({"total_batch_size": 10}, "no multiple of the 4 rows"),
        ({"per_device_train_batch_size": 30}, "fewer than the 30 of one batch"),
        ({"sources": ["nqq"]}, "'nqq' is not known"),
        ({"matryoshka_dims": [64]}, "more than the model's hidden size"),
        ({"lora_modules": ["nothing"]}, "lora_modules"),
        ({"eval_strategy": "steps", "num_eval_rows": 3}, "num_eval_rows is 3, fewer than the 4 rows"),
        ({"num_hard_negatives": 2}, "num_hard_negatives is 2"),
        ({"fsdp": True, "use_peft": False}, "fsdp needs several processes"),
        ({"activation_memory_gb": 1e-6, "tokens_per_microbatch": 128}, "make tokens_per_microbatch smaller"),
    ],
)
def test_what_the_run_would_refuse_is_refused(
    keys: dict[str, Any], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as refused:
        planned(folder, **keys)
    assert words in str(refused.value)
    if keys.get("activation_memory_gb") is not None:
        return  # measured there, reckoned here
    script = ROOT / "experiments/run_stage_II.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(folder / "config.json")])
    said: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", said.append)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    assert f"error: {refused.value}\n" in said


def script_says(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The script's exit code and output, standard error behind it."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    code = 0
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_script(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(folder, loss_scale=20, template=None))
    before = sorted(file.name for file in folder.iterdir())
    code, said = script_says([path, "--card", "H200", "--num_processes", "2"], monkeypatch, capsys)
    assert code == 0
    for words in ("template llama3", "x 2 process(es)", "of 141 GB (H200)", "at a utilisation of 40%", "warning     "):
        assert words in said
    assert sorted(file.name for file in folder.iterdir()) == before, "nothing is written"
    code, said = script_says([path, "--card_memory_gb", "24", "--card_tflops", "100"], monkeypatch, capsys)
    assert code == 0 and "of 24 GB (card)" in said and "(100 TFLOP/s each)" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--card", "H300"], "--card 'H300' is not known; known: B200"),
        (["--card", "H200", "--card_memory_gb", "3"], "leave --card_memory_gb and --card_tflops out"),
        (["--card_tflops", "3"], "--card_tflops needs --card_memory_gb"),
        (["--card_memory_gb", "-3"], "--card_memory_gb is -3"),
        (["--card_memory_gb", "nan"], "--card_memory_gb is nan"),
        (["--card_memory_gb", "80", "--card_tflops", "inf"], "--card_tflops is inf"),
        (["--utilisation", "40"], "--utilisation is 40"),
        (["--num_processes", "0"], "--num_processes is 0"),
        (["--tokens_query", "3"], "--tokens_query and --tokens_document are given together"),
    ],
)
def test_wrong_flags(
    arguments: list[str], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = script_says([str(write(folder, loss_scale=20)), *arguments], monkeypatch, capsys)
    assert code == 2 and said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("keys", "stage"),
    [
        ({"alpha": 0.3}, "stage_I"),
        ({"target_loss": "bag"}, "stage_I"),
        ({"loss_scale": 20}, "stage_II"),
        ({"loss_scale": 20, "dataset_name": "Wiki1M"}, "simcse"),
        ({"simcse_dropout": 0.1}, "simcse"),
        ({"num_hard_negatives": 3}, "stage_II"),
        ({"mlm_probability": 0.3}, "mntp"),
        ({"dataset_name": "wikitext"}, "mntp"),
        ({"stage": "lm"}, "lm"),
        ({"stage": "simcse", "loss_scale": 20}, "simcse"),
    ],
)
def test_stage_by_its_keys(keys: dict[str, Any], stage: Stage, folder: Path) -> None:
    assert stage in get_args(Stage)
    assert stage_of(write(folder, **keys)) == stage


def test_no_stage_by_the_keys(folder: Path) -> None:
    with pytest.raises(UserError, match="no key tells which script it is for"):
        stage_of(write(folder))
    with pytest.raises(UserError, match="cannot be read"):
        make_plan(folder / "none.json", Conditions())
