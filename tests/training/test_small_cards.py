"""Adapters that peft knows beside plain LoRA, bases in few bits, 8-bit optimisers: what runs, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_runs import make_data
from helpers import tiny_model
from peft import PeftModel
from transformers import AutoConfig, AutoModel, TrainerCallback
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS, _TORCHAO_OPTIMIZERS

from llm2vec import LLM2Vec
from llm2vec.model.backbone import attach_lora, load_backbone
from llm2vec.model.chain import Chain, open_chain
from llm2vec.planning.plan import model_of_shapes
from llm2vec.reports.logs import read_log
from llm2vec.training import model as model_of_a_run
from llm2vec.training.config import Config
from llm2vec.training.config.file import load_config
from llm2vec.training.stages import run_stage, train_stage
from llm2vec.types import Stage, UserError

TEXTS = ["who wrote it", "the red one"]

#: What a config says -> what peft's own file says, and a weight that is there.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, {"use_dora": True}, "lora_magnitude_vector"),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}, "lora_A"),
    "gaussian": ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}, "lora_A"),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {"init_lora_weights": "orthogonal"}, "lora_A"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cards")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, Any]:
    return make_data(folder, 16) | {"max_steps": 2, "save_strategy": "no"}


def write(folder: Path, keys: dict[str, Any], **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(keys | {"output_dir": str(folder / "out")} | changes), encoding="utf-8")
    return file


def refusal(folder: Path, keys: dict[str, Any], stage: Stage = "stage_II", **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        train_stage(stage, write(folder, keys, **changes))
    assert not (folder / "out").exists() and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_begins_without_effect(kind: str) -> None:
    said = {"init" if key == "init_lora_weights" else key: value for key, value in ADAPTERS[kind][0].items()}
    model = tiny_model("llama", initializer_range=0.2)
    ids = torch.arange(12)[None]
    before = model(ids).last_hidden_state
    adapted = attach_lora(model, r=4, alpha=8, dropout=0.0, **said)  # type: ignore[arg-type]
    torch.testing.assert_close(adapted(ids).last_hidden_state, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_plan_makes_it_without_weights(kind: str, keys: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(write(tmp_path, keys, **ADAPTERS[kind][0]), "stage_II")
    shape = AutoConfig.from_pretrained(config.model_name_or_path)
    names = [name for name, weight in model_of_shapes(config, shape, [], []).named_parameters() if weight.is_meta]
    assert any(ADAPTERS[kind][2] in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_trained_adapter_is_peft_s(kind: str, folder: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    """Its file says how it is read; peft alone, and merged weights, give the vectors of `LLM2Vec`."""
    changes, said, weight = ADAPTERS[kind]
    train_stage("stage_II", write(tmp_path, keys, **changes))
    written = json.loads((tmp_path / "out/adapter_config.json").read_text(encoding="utf-8"))
    assert written.items() >= said.items()
    ours = LLM2Vec.from_pretrained(tmp_path / "out")
    assert any(weight in name for name, _ in ours.named_parameters())
    vectors = ours.encode(TEXTS, show_progress_bar=False)
    base = AutoModel.from_pretrained(folder / "base", use_safetensors=True)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    for text, vector in zip(TEXTS, vectors, strict=True):
        batch = ours.tokenize([text])
        alone = stock(input_ids=batch["input_ids"]).last_hidden_state[0, -1]
        torch.testing.assert_close(alone, vector, rtol=1e-4, atol=1e-5)
    merged = LLM2Vec.from_pretrained(tmp_path / "out", merge_peft=True)
    torch.testing.assert_close(merged.encode(TEXTS, show_progress_bar=False), vectors, rtol=1e-4, atol=1e-4)
    plain = load_backbone(open_chain(str(folder / "base")))
    assert not torch.equal(plain(batch["input_ids"]).last_hidden_state[0, -1], vectors[-1])


@pytest.mark.parametrize(
    ("stage", "changes", "sentence"),
    [
        ("stage_I", {"use_dora": True}, "use_dora has no effect without a LoRA adapter (use_peft); take it out."),
        ("stage_II", {"use_peft": False, "use_rslora": True}, "use_rslora has no effect without a LoRA adapter"),
        ("lm", {"load_in": "4bit"}, "load_in has no effect without a LoRA adapter"),
        (
            "stage_II",
            {"init_lora_weights": "pissa"},
            "init_lora_weights is 'pissa'; allowed: 'gaussian', 'orthogonal'.",
        ),
        ("stage_II", {"init_lora_weights": "orthogonal", "lora_r": 3}, "but lora_r is 3; an even one is needed."),
        ("stage_II", {"load_in": "2bit"}, "load_in is '2bit'; allowed: '8bit', '4bit'."),
        ("stage_II", {"load_in": "4bit", "fsdp": True}, "load_in cannot be used with fsdp"),
        ("stage_II", {"load_in": "4bit", "peft_model_name_or_path": "a"}, "merging peft_model_name_or_path would"),
        (
            "stage_I",
            {"attn_implementation": "kernels-community/flash-attn3", "bf16": False},
            "attn_implementation is 'kernels-community/flash-attn3', which computes in half precision; set bf16.",
        ),
        ("stage_II", {"load_in": "4bit", "torch_compile": True}, "load_in and torch_compile cannot be used together"),
        (
            "stage_II",
            {"load_in": "4bit", "torch_dtype": "auto"},
            "torch_dtype is 'auto', but load_in '4bit' computes in a type that must be named;",
        ),
        ("stage_II", {"load_in": "4bit"}, "load_in is '4bit', which needs an NVIDIA GPU, and there is none;"),
    ],
)
def test_what_does_not_go_together(
    stage: Stage, changes: dict[str, Any], sentence: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    assert sentence in refusal(tmp_path, keys, stage, **changes)


def test_few_bits_without_bitsandbytes_and_over_an_adapter(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write(tmp_path, keys, load_in="8bit"), "stage_II")
    gpu, chain = torch.device("cuda", 0), open_chain(config.model_name_or_path)
    over_an_adapter: Any = SimpleNamespace(adapters=("adapter",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"load_in is '8bit', which needs bitsandbytes: pip install bitsandbytes."):
        model_of_a_run._placed(config, chain, gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"load_in: .* is an adapter, and merging it would round"):
        model_of_a_run._placed(config, over_an_adapter, gpu)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"load_in": "8bit"}, {"load_in_8bit": True}),
        (
            {"load_in": "4bit", "bf16": True},
            {
                "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16",
            },
        ),
        ({"load_in": "4bit"}, {"bnb_4bit_compute_dtype": "float32"}),
        ({"load_in": "4bit", "fp16": True}, {"bnb_4bit_compute_dtype": "float16"}),
        ({"load_in": "4bit", "bf16": True, "torch_dtype": "auto"}, {"bnb_4bit_compute_dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_few_bits_are_asked_for_as_transformers_has_them(
    changes: dict[str, Any], expected: dict[str, Any], keys: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The base goes to this process's own card. Nothing is loaded: that needs the card."""
    config = load_config(write(tmp_path, keys, **changes), "stage_II")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    asked = model_of_a_run._placed(config, open_chain(config.model_name_or_path), torch.device("cuda", 1))
    assert asked["device_map"] == {"": torch.device("cuda", 1)}
    assert asked["quantization_config"].to_dict().items() >= expected.items()


@pytest.mark.slow
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_base_of_few_bits_is_trained_over(
    load_in: str, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """By bitsandbytes' own code for CPUs, which users are not let to. It is near the run over the base as it is."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    placed, kinds = model_of_a_run._placed, []

    def on_the_cpu(config: Config, chain: Chain, device: torch.device) -> dict[str, Any]:
        return {**placed(config, chain, torch.device("cuda", 0)), "device_map": {"": device}}

    class Kinds(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            kinds.extend(map(type, model.modules()))

    train_stage("stage_II", write(tmp_path, keys, output_dir=str(tmp_path / "plain"), logging_steps=1))
    monkeypatch.setattr(model_of_a_run, "_placed", on_the_cpu)
    run_stage(load_config(write(tmp_path, keys, load_in=load_in, logging_steps=1), "stage_II"), [Kinds()])
    quantised = bitsandbytes.nn.Linear4bit if load_in == "4bit" else bitsandbytes.nn.Linear8bitLt
    assert kinds.count(quantised) == 2 * 7, "all products of the two layers, and nothing else"
    losses = [read_log(tmp_path / name / "log.jsonl")[0]["loss"] for name in ("plain", "out")]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.3)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]
    config = load_config(tmp_path / "config.json", "stage_II")
    few_bits = on_the_cpu(config, open_chain(config.model_name_or_path), torch.device("cpu"))["quantization_config"]
    loaded = [LLM2Vec.from_pretrained(tmp_path / "out", **more) for more in ({}, {"quantization_config": few_bits})]
    cosines = torch.cosine_similarity(*(model.encode(TEXTS, show_progress_bar=False) for model in loaded))
    assert (cosines > 0.7).all() and (cosines < 1 - 1e-6).all(), f"{cosines}: random weights of 32 columns"


@pytest.mark.slow
@pytest.mark.parametrize("name", [optim.value for optim in (*_BITSANDBYTES_OPTIMIZERS, *_TORCHAO_OPTIMIZERS)])
def test_optimisers_of_few_bits_reach_the_library(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """Each is let through; where its package is missing, one sentence names it."""
    package = "bitsandbytes" if name in [optim.value for optim in _BITSANDBYTES_OPTIMIZERS] else "torchao"
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=f"training arguments: .*{package}"):
        train_stage("stage_II", write(tmp_path, keys, optim=name))
