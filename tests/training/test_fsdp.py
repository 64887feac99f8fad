"""Processes that share the weights among them (FSDP2) train and save what one process does."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import reference
import torch
import torch.distributed as dist
from forked_runs import make_data, run, said, shard_on_cpu
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llm2vec import LLM2Vec
from llm2vec.training.config.arguments import training_arguments
from llm2vec.training.config.file import load_config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.model import plan_sharding
from llm2vec.training.trainer import EmbedderTrainer
from llm2vec.types import Stage, UserError

ROOT = Path(__file__).parents[2]
STAGE_I_PARTS = ("loss_q2d", "loss_d2q")
SHARDED = {"fsdp": True, "save_only_model": True}
RUN: dict[str, Any] = {
    "max_seq_length": 64,
    "total_batch_size": 8,
    "optim": "sgd",  # a step is then as exact as its gradient
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


class Outcome(NamedTuple):
    """What a run leaves behind."""

    log: list[dict[str, float]]
    folder: Path

    @property
    def weights(self) -> dict[str, Tensor]:
        (file,) = self.folder.glob("*model.safetensors")
        return load_file(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two base models, one of them with tied embeddings, and one source of 32 ragged rows."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, tied in (("base", False), ("tied", True)):
        tiny_model("llama", True, initializer_range=0.1, tie_word_embeddings=tied).save_pretrained(folder / name)
        family_tokenizer("llama").save_pretrained(folder / name)
    rows = reference.examples(32, 1, seed=1)
    write_jsonl(
        folder / "words.jsonl",
        [{"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text} for r in rows],
    )
    sources = {"words": {"file": "words.jsonl", "instruction": "find the answer"}}
    (folder / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    return folder


def train(stage: str, folder: Path, name: str, processes: int = 1, base: str = "base", **keys: Any) -> Outcome:
    """One run of a script in `processes` processes, started here as torchrun would."""
    config = {
        "model_name_or_path": str(folder / base),
        "output_dir": str(folder / name),
        "sources_file": str(folder / "sources.json"),
        **RUN,
        **keys,
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    torch.multiprocessing.spawn(run_rank, (processes, f"run_{stage}.py", file), nprocs=processes)
    lines = (folder / name / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return Outcome([json.loads(line) for line in lines], folder / name)


def run_rank(process: int, processes: int, script: str, file: Path) -> None:
    """What each process runs: the script itself, taking down what it holds of the weights."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "RANK": str(process), "LOCAL_RANK": str(process)}
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        rendezvous = f"file://{file.with_suffix('.rendezvous')}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=process, world_size=processes)
    else:
        os.environ.pop("WORLD_SIZE", None)
        os.environ.pop("LOCAL_RANK")
    observe(file.with_suffix(f".{process}"))
    shard_on_cpu()
    sys.argv = [script, str(file)]
    runpy.run_path(str(ROOT / "experiments" / script), run_name="__main__")


def observe(file: Path) -> None:
    """Take down in this process what it holds of the weights."""
    step = EmbedderTrainer.training_step

    def observed_step(self: EmbedderTrainer, model: nn.Module, *arguments: Any) -> Tensor:
        loss = step(self, model, *arguments)
        whole = sum(p.numel() for p in model.parameters())
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        units = sum(isinstance(module, FSDPModule) for module in model.modules())
        file.write_text(json.dumps([held, whole, units]), encoding="utf-8")
        return loss

    EmbedderTrainer.training_step = observed_step  # type: ignore[method-assign]


def holdings(outcome: Outcome, processes: int) -> list[list[int]]:
    """For each process: parameters it held between steps, all parameters, and modules gathered one at a time."""
    folder = outcome.folder
    return [json.loads((folder.parent / f"{folder.name}.{p}").read_text(encoding="utf-8")) for p in range(processes)]


def losses(outcome: Outcome) -> list[float]:
    return [entry["loss"] for entry in outcome.log if "loss" in entry]


def assert_same_run(actual: Outcome, expected: Outcome, *parts: str) -> None:
    """The same figures at each step to 1e-5, a share of them; the same tensors and nearly the same weights."""
    entries = [[entry for entry in run.log if "loss" in entry] for run in (actual, expected)]
    assert [e["step"] for e in entries[0]] == [e["step"] for e in entries[1]] != []
    assert len({round(entry["loss"], 3) for entry in entries[1]}) > 2  # a flat curve would prove nothing
    for one, other in zip(*entries, strict=True):
        for part in ("loss", "grad_norm", *parts):
            assert one[part] == pytest.approx(other[part], rel=1e-5), (part, one["step"])
    assert_same_weights(actual.weights, expected.weights)


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Outcome:
    """Stage I in one process, eight rows at once."""
    outcome = train("stage_I", folder, "plain")
    base = load_file(folder / "base/model.safetensors")
    assert max(float((outcome.weights[name] - weight).abs().max()) for name, weight in base.items()) > 1e-3
    return outcome


# --- training and saving ---


def test_two_processes_with_half_the_weights_each_equal_one(folder: Path, plain: Outcome) -> None:
    """Loss, gradient norm and weights; each process holds about half, and a layer is gathered by itself."""
    two = train("stage_I", folder, "two", 2, **SHARDED)
    assert_same_run(two, plain, *STAGE_I_PARTS)
    for held, whole, units in holdings(two, 2):
        assert held == pytest.approx(whole / 2, rel=0.01)
        assert units == 3  # two layers, and the rest
    models = [LLM2Vec.from_pretrained(str(run.folder)) for run in (two, plain)]
    texts = ["hello world", "who wrote it"]
    one, other = (torch.as_tensor(model.encode(texts, show_progress_bar=False)) for model in models)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, {"per_device_train_batch_size": 2, "gradient_checkpointing": True}),
        (2, {"tokens_per_microbatch": 64}),
        (2, {"fsdp_config": {"reshard_after_forward": False}}),
        (4, {"per_device_train_batch_size": 1, "tokens_per_microbatch": 64, "gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_the_layout_changes_nothing(processes: int, layout: dict[str, Any], folder: Path, plain: Outcome) -> None:
    """Processes, accumulation, micro-batches of some tokens, recomputing, and when weights are let go."""
    name = "-".join(map(str, [processes, *layout]))
    assert_same_run(train("stage_I", folder, name, processes, **SHARDED, **layout), plain, *STAGE_I_PARTS)


@pytest.mark.slow
def test_tied_embeddings_stay_tied(folder: Path) -> None:
    """They get both gradients and are written once."""
    one = train("stage_I", folder, "tied-one", base="tied")
    two = train("stage_I", folder, "tied-two", 2, base="tied", **SHARDED)
    assert_same_run(two, one, *STAGE_I_PARTS)
    assert "lm_head.weight" not in two.weights


@pytest.mark.slow
def test_plain_language_modelling(folder: Path) -> None:
    assert_same_run(train("lm", folder, "lm-two", 2, **SHARDED), train("lm", folder, "lm-one"), "loss_lm")


@pytest.mark.slow
def test_stage_II_over_all_parameters(folder: Path) -> None:
    """Vectors are compared over all processes, with the gradient cached over micro-batches."""
    keys = {"use_peft": False, "tokens_per_microbatch": 128, "learning_rate": 0.05}
    one = train("stage_II", folder, "II-one", **keys)
    two = train("stage_II", folder, "II-two", 2, **SHARDED, **keys)
    assert_same_run(two, one, "loss_contrastive", "in_batch_accuracy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "keys", "parts"),
    [
        ("stage_II", {}, ("loss_contrastive", "in_batch_accuracy")),
        ("stage_II", {"use_dora": True, "tokens_per_microbatch": 128}, ("loss_contrastive",)),
        ("stage_II", {"template": "gritlm", "pooling_mode": "mean"}, ("loss_contrastive",)),
        ("stage_I", {"trainable": "lora"}, STAGE_I_PARTS),
    ],
    ids=["stage II", "DoRA", "added tokens", "stage I"],
)
def test_lora_over_a_shared_base(stage: str, keys: dict[str, Any], parts: tuple[str, ...], folder: Path) -> None:
    """The frozen base is shared out, the adapter too, which is all that is written."""
    one, two = (forked(stage, folder, "-".join([stage, *keys]), processes, keys) for processes in (1, 2))
    assert_same_run(two, one, *parts)
    assert any("lora_B" in weight for weight in two.weights)
    assert LLM2Vec.from_pretrained(two.folder).encode(["who wrote it"], show_progress_bar=False).isfinite().all()
    for held, whole, units in holdings(two, 2):
        assert held == pytest.approx(whole / 2, rel=0.02) and units == 3


def forked(stage: str, folder: Path, name: str, processes: int, keys: dict[str, Any]) -> Outcome:
    """A run of LoRA in processes that begin with all imports done."""
    output = folder / f"{name}-{processes}"
    shared = SHARDED if processes > 1 else {}
    config = RUN | {"model_name_or_path": str(folder / "base"), "sources_file": str(folder / "sources.json")}
    said_keys = config | {"lora_dropout": 0.0} | shared | keys
    codes = run(f"run_{stage}.py", output, said_keys, processes, lambda rank: observe(folder / f"{output.name}.{rank}"))
    assert codes == [0] * processes, said(output)
    lines = (output / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return Outcome([json.loads(line) for line in lines], output)


@pytest.mark.slow
def test_held_out_rows_and_checkpoints_on_the_way(folder: Path) -> None:
    """Figures on held-out rows, and a whole checkpoint at `save_steps`; training goes on undisturbed by both."""
    keys = {"num_eval_rows": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    one = train("stage_I", folder, "held-one", **keys, save_only_model=True)
    two = train("stage_I", folder, "held-two", 2, **SHARDED, **keys)
    assert_same_run(two, one, *STAGE_I_PARTS)
    figures = [[entry["eval_loss"] for entry in run.log if "eval_loss" in entry] for run in (two, one)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) and len(figures[0]) >= 2
    half = [load_file(run.folder / "checkpoint-2/model.safetensors") for run in (two, one)]
    assert_same_weights(*half)
    assert not torch.equal(half[1]["lm_head.weight"], one.weights["lm_head.weight"])
    assert not list(two.folder.rglob("*.bin"))


@pytest.mark.slow
def test_adam(folder: Path) -> None:
    """Its state is shared too; what it makes of a gradient near zero is as inexact as that gradient."""
    keys = {"optim": "adamw_torch_fused", "learning_rate": 1e-3}
    one = train("stage_I", folder, "adam-one", **keys)
    two = train("stage_I", folder, "adam-two", 2, **SHARDED, **keys)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.slow
def test_bfloat16_means_float32_weights_and_steps_in_bfloat16(folder: Path, plain: Outcome) -> None:
    """Close to float32, not equal to it; and written as float32."""
    two = train("stage_I", folder, "bf16", 2, **SHARDED, bf16=True)
    assert losses(two) == pytest.approx(losses(plain), rel=0.01)
    assert losses(two) != pytest.approx(losses(plain), rel=1e-6)
    assert {weight.dtype for weight in two.weights.values()} == {torch.float32}


def test_numbers_that_go_into_the_model_are_not_rounded() -> None:
    """The step's count of tokens, by which losses are divided, would be off by up to 1 in 256 in bfloat16."""
    args: Any = SimpleNamespace(fsdp_plugin_args={}, bf16=True)
    plan_sharding(args, tiny_model("qwen2", True))
    assert args.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "Qwen2DecoderLayer"
    policy = args.fsdp_plugin_args["mixed_precision_policy"]
    assert not policy.cast_forward_inputs and policy.output_dtype is None
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


# --- what is refused ---


def test_layers_that_are_not_there_are_named() -> None:
    args: Any = SimpleNamespace(fsdp_plugin_args={"transformer_cls_names_to_wrap": "LlamaLayer"}, bf16=False)
    with pytest.raises(UserError, match=r"LlamaForCausalLM has no layers of class 'LlamaLayer'; name theirs"):
        plan_sharding(args, tiny_model("llama", True))


def refusal(folder: Path, stage: Stage = "stage_I", **keys: Any) -> str:
    """What `load_config` says against a run."""
    file = folder / "config.json"
    content = {"model_name_or_path": "x", "output_dir": str(folder / "out"), "dataset_file_path": "data", **keys}
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(file, stage)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fsdp": "full_shard auto_wrap"}, "fsdp is 'full_shard auto_wrap'; write true"),
        ({"fsdp": False, "fsdp_config": {}}, "fsdp_config has no effect without fsdp"),
        (SHARDED | {"fsdp_config": {"version": 1}}, "fsdp_config: version is 1; only FSDP2 is supported"),
        (SHARDED | {"fsdp_config": {"cpu_offload": True}}, "fsdp_config: 'cpu_offload' is not supported; allowed: "),
        (SHARDED | {"fsdp_config": "fsdp.json"}, "fsdp_config is 'fsdp.json'; an object is needed"),
        (SHARDED | {"load_best_model_at_end": True}, "load_best_model_at_end cannot be used with fsdp"),
        (SHARDED | {"fp16": True}, "fp16 cannot be used with fsdp; use bf16"),
        (SHARDED | {"bf16": True, "torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16', but with fsdp bf16 means"),
        (
            SHARDED | {"nano_beir": "x", "eval_strategy": "steps", "num_eval_rows": 8},
            "nano_beir cannot run with fsdp",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, **keys)


def test_what_is_refused_ends_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(tmp_path, "stage_II", **SHARDED, load_in="4bit")
    assert "load_in cannot be used with fsdp" in message
    monkeypatch.setattr(sys, "argv", ["run_stage_II.py", str(tmp_path / "config.json")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "experiments/run_stage_II.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_one_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    file = tmp_path / "config.json"
    keys = {"model_name_or_path": "x", "output_dir": str(tmp_path), "dataset_file_path": "data", "use_cpu": True}
    file.write_text(json.dumps(keys | SHARDED), encoding="utf-8")
    with pytest.raises(UserError, match=r"fsdp needs several processes; start with torchrun"):
        training_arguments(load_config(file, "stage_I"))


def test_processes_without_gpus_are_refused(tmp_path: Path) -> None:
    """accelerate would train a whole copy on each of them, and say nothing."""

    def setup(rank: int) -> None:
        del EmbedderTrainer.create_accelerator_and_postprocess  # what shards on CPUs in tests

    keys = make_data(tmp_path) | {"fsdp": True}
    assert run("run_stage_I.py", tmp_path / "out", keys, 2, setup) == [2, 2]
    assert said(tmp_path / "out").endswith(
        "error: fsdp shares the weights among GPUs, and this run has none; take fsdp out.\n"
    )
