"""What `benchmarks/unmoved.py` says of two recordings: nothing moved, or what did."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.unmoved import all_starts, compare_recordings, findings, tidy

RECORDED: dict[str, Any] = {
    "machine": {"torch": "2.13"},
    "found": {
        "lm_x1": {"exit": [0], "model.safetensors": {"a": "float32 [2] 12"}, "log.jsonl": [{"loss": 1.5, "step": 1}]},
        "plan": {"exit": [0], "printed": {"8 steps": ""}},
    },
}


def compared(change: Callable[[dict[str, Any]], Any], folder: Path) -> int:
    after = copy.deepcopy(RECORDED)
    change(after)
    for name, content in (("before", RECORDED), ("after", after)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return compare_recordings(folder / "before", folder / "after")


def test_equal_recordings_are_said_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(lambda _: None, tmp_path) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["equal", "equal"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda found: found["lm_x1"]["model.safetensors"].update(a="float32 [2] 13"),
            'lm_x1 > model.safetensors > a: "float32 [2] 12" -> "float32 [2] 13"',
        ),
        (lambda found: found["lm_x1"]["log.jsonl"][0].update(loss=1.25), "lm_x1 > log.jsonl > 0 > loss: 1.5 -> 1.25"),
        (lambda found: found["lm_x1"].update(more="x"), 'lm_x1 > more: nothing -> "x"'),
        (lambda found: found["plan"].update(printed={"9 steps": ""}), 'plan > printed > 8 steps: "" -> nothing'),
        (lambda found: found.pop("plan"), 'plan > printed > 8 steps: "" -> nothing'),
    ],
)
def test_a_planted_difference_is_seen(
    change: Callable[[dict[str, Any]], Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(lambda recorded: change(recorded["found"]), tmp_path) == 1
    printed = capsys.readouterr().out.splitlines()
    assert line in printed
    assert sum("DIFFERENT" in row for row in printed) == 1


def test_a_start_that_fails_in_both_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = copy.deepcopy(RECORDED)
    failed["found"]["plan"] = {"failed": ["1", "error"]}
    (tmp_path / "one").write_text(json.dumps(failed), encoding="utf-8")
    assert compare_recordings(tmp_path / "one", tmp_path / "one") == 1
    assert "FAILED IN BOTH" in capsys.readouterr().out


def test_times_and_paths_are_left_out() -> None:
    said = tidy({"loss": 1.0, "train_runtime": 3.0, "at": ["/tmp/x/out", 2]}, {"/tmp/x": "WORK"})
    assert said == {"loss": 1.0, "at": ["WORK/out", 2]}


def test_a_changed_bit_of_a_tensor_changes_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    start = next(start for start in all_starts(tmp_path) if start.name == "lm_x1")
    (tmp_path / "said").mkdir()
    (tmp_path / "out/lm_x1").mkdir(parents=True)
    for ending in ("out", "err"):
        (tmp_path / f"said/lm_x1.0.{ending}").touch()
    kept = []
    for value in (1.0, 1.0, 1.0 + 2**-23):
        save_file({"w": torch.tensor([value]), "same": torch.ones(2)}, "out/lm_x1/model.safetensors")
        kept.append(findings(start, [0], {})["model.safetensors"])
    assert kept[0] == kept[1]
    assert kept[0]["same"] == kept[2]["same"] and kept[0]["w"] != kept[2]["w"]
