"""Folders of small embedders that `verify` compares, and the command; fixtures of its two test files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import family_tokenizer, tiny_model

from llm2vec.choice import ModelChoice
from llm2vec.commands.models.verify import main as verify_command
from llm2vec.export.export import Export, export
from llm2vec.model.backbone import attach_lora, load_backbone
from llm2vec.model.chain import open_chain
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.text.probe_texts import probe_ids

BIDIRECTIONAL = EncoderSettings("last", 64, template="llama3", instruction_join="; ", attention="bidirectional")
CAUSAL_MEAN = EncoderSettings("mean", 64, template="llama3", instruction_join="; ", attention="causal")


def save_base(folder: Path, settings: EncoderSettings, seed: int = 0, family: str = "llama", **overrides: Any) -> str:
    """A Stage I folder."""
    model = tiny_model(family, True, seed=seed, initializer_range=0.1, tie_word_embeddings=False, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones, leaving out the last norm would change nothing but lengths
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    tokenizer = family_tokenizer(family)
    save_checkpoint(folder, model, tokenizer, settings, {"probe_ids": probe_ids(row_tokenizer(tokenizer, settings))})
    return str(folder)


def save_adapter(folder: Path, base: str, settings: EncoderSettings, *, with_lm_head: bool = False) -> str:
    """A Stage II folder: an adapter that does something; with a head, its keys fit no other class of the model."""
    model: Any = load_backbone(open_chain(base), with_lm_head=with_lm_head)
    torch.manual_seed(0)  # a module's fixture is made before a test's own seed is set
    adapted = attach_lora(model, r=4, alpha=8, dropout=0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    settings = dataclasses.replace(settings, parent_adapters=())
    save_checkpoint(folder, adapted, family_tokenizer("llama"), settings)
    return str(folder)


def save_export(folder: Path, base: str, adapter: str | None = None, dtype: str = "float32") -> Path:
    """A folder for stock libraries."""
    export(Export(ModelChoice(base, (adapter,) if adapter else ()), dtype=dtype), folder)
    return folder


def save_all(folder: Path) -> Path:
    """A bidirectional base with an adapter, a causal mean-pooled base, exports of both, and one of other weights."""
    base = save_base(folder / "base", BIDIRECTIONAL)
    adapter = save_adapter(folder / "adapter", base, BIDIRECTIONAL)
    save_export(folder / "exported", base, adapter)
    save_export(folder / "mean_exported", save_base(folder / "mean_base", CAUSAL_MEAN))
    save_export(folder / "other", save_base(folder / "other_base", BIDIRECTIONAL, seed=1))
    return folder


def change_json(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(change(content) or content), encoding="utf-8")


def failures(printed: str) -> dict[str, str]:
    """Way -> the cause that was named."""
    causes: dict[str, str] = {}
    for line in printed.splitlines():
        if line.startswith("FAIL: "):
            way, cause, _ = line.removeprefix("FAIL: ").split(": ", 2)
            kind = way.split(" /")[0].split(" http")[0]
            assert kind not in causes, "a way is given one cause"
            causes[kind] = cause
    return causes


def causal_reload(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["is_causal"], config["use_bidirectional_attention"]

    change_json(folder / "config.json", change)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of `save_all`."""
    return save_all(tmp_path_factory.mktemp("made"))


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    return shutil.copytree(made / "exported", tmp_path / "damaged")


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command: arguments -> exit code and what it printed."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = verify_command(list(map(str, arguments)))
        return code, capsys.readouterr().out

    return run
