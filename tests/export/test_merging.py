"""Merged checkpoints are what arithmetic says, pass `verify`, and go together or are refused."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from verify_folders import BIDIRECTIONAL, CAUSAL_MEAN, save_adapter, save_base

from llm2vec import LLM2Vec
from llm2vec.choice import ModelChoice
from llm2vec.commands.models.merge import main
from llm2vec.export import merging
from llm2vec.export.merging import between, write_merged
from llm2vec.types import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of one shape, one pooled otherwise, one wider; and an adapter."""
    folder = tmp_path_factory.mktemp("merging")
    base = save_base(folder / "base", BIDIRECTIONAL)
    save_adapter(folder / "adapter", base, BIDIRECTIONAL)
    save_base(folder / "other_base", BIDIRECTIONAL, seed=1)
    save_base(folder / "mean_base", CAUSAL_MEAN)
    save_base(folder / "wide", BIDIRECTIONAL, intermediate_size=96)
    return folder


def weights(folder: Path, *adapters: Path) -> dict[str, Tensor]:
    model = LLM2Vec.from_pretrained(folder, list(adapters), merge_peft=True).model
    return {name: weight.detach().double() for name, weight in model.named_parameters()}


def test_the_mean_of_a_base_and_its_adapter(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A quarter of what the adapter does; verified as it is written."""
    base, adapter = made / "base", made / "adapter"
    code = main([str(tmp_path / "out"), str(base), f"{base}+{adapter}", "--weights", "3", "1"])
    assert code == 0 and " ok" in capsys.readouterr().out
    start, end, found = weights(base), weights(base, adapter), load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == start.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight.double(), 0.75 * start[name] + 0.25 * end[name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(start[name], end[name]) for name in start)
    run = json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))
    assert run["merged"] == {"how": "mean", "models": {str(base): 0.75, f"{base}+{adapter}": 0.25}}
    loaded = LLM2Vec.from_pretrained(tmp_path / "out")
    assert loaded.settings.attention == "bidirectional" and loaded.settings.parent_adapters is None


def test_slerp_turns_by_a_share_of_the_angle() -> None:
    """Between tensors of one length: the angle to each end is its share of the whole, and the length stays."""
    one, other = torch.randn(2, 40, dtype=torch.float64)
    one, other = one / one.norm(), other / other.norm()
    whole = np.arccos(float(one @ other))
    for share in (0.0, 0.25, 1.0):
        found = between(one.view(5, 8), other.view(5, 8), share).flatten()
        assert float(found.norm()) == pytest.approx(1.0, abs=1e-12)
        assert float(one @ found) == pytest.approx(np.cos(share * whole), abs=1e-12)
        assert float(other @ found) == pytest.approx(np.cos((1 - share) * whole), abs=1e-12)
    assert torch.equal(between(one, 3 * one, 0.5), 2 * one)


def test_slerp_of_two_checkpoints(made: Path, tmp_path: Path) -> None:
    write_merged([ModelChoice(str(made / name)) for name in ("base", "other_base")], "slerp", [1, 1], tmp_path / "out")
    one, other = weights(made / "base"), weights(made / "other_base")
    for name, weight in load_file(tmp_path / "out/model.safetensors").items():
        torch.testing.assert_close(weight.double(), between(one[name], other[name], 0.5), rtol=1e-6, atol=1e-7)


def test_of_many_models_two_are_in_memory_at_a_time(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Tensor]] = []
    still_there: list[int] = []

    def load(choice: ModelChoice) -> LLM2Vec:
        still_there.append(sum(weight() is not None for weight in loaded))
        model = LLM2Vec.from_pretrained(choice.opened(), merge_peft=True)
        loaded.append(weakref.ref(next(model.model.parameters())))
        return model

    monkeypatch.setattr(merging, "_loaded", load)
    names = ["base", "other_base", "base", "other_base"]
    write_merged([ModelChoice(str(made / name)) for name in names], "mean", None, tmp_path / "out")
    assert still_there == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["base"], "mean is of two or more models, and there are 1."),
        (["base", "base", "base", "--how", "slerp"], "slerp is of two models, and there are 3."),
        (["base", "base", "--weights", "1"], "--weights: 2 numbers are needed, none below 0 and not all 0."),
        (["base", "base", "--weights", "0", "0"], "--weights: 2 numbers are needed"),
        (["base", "mean_base"], "pooling_mode is 'last' in "),
        (["base", "wide"], "wide is not of the shape of "),
    ],
)
def test_what_does_not_go_together(arguments: list[str], sentence: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        main([str(tmp_path / "out"), *(str(made / a) if (made / a).is_dir() else a for a in arguments)])
    assert sentence in str(error.value) and not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").touch()
    models: list[Any] = [ModelChoice(str(made / "base"))] * 2
    with pytest.raises(UserError, match="holds files; name a folder that is not there, or is empty"):
        write_merged(models, "mean", None, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]
