"""Rows held out from training are never trained on, and what is logged of them is the objective's loss on them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM, TrainingArguments

from llm2vec.data.collation import CollateSides
from llm2vec.data.order import OneSourceBlocks
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.training.config import Config
from llm2vec.training.rows import row_orders
from llm2vec.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [Source(name, f"{name}.jsonl", (Instruction(f"find {name}"),)) for name in ("one", "two")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources of 12 rows each, and a base model."""
    for name in ("one", "two"):
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [
                {"query": f"{name} {i} {r.query.text}", "positive": r.positive.text, "negative": r.negatives[0].text}
                for i, r in enumerate(reference.examples(12, 1))
            ],
        )
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    return tmp_path


def test_the_two_parts_share_no_row_and_miss_none(folder: Path) -> None:
    rows = TrainingRows(folder, SOURCES, num_held_out=4)
    held_out = rows.held_out()
    assert rows.sizes == [8, 8] and held_out.sizes == [4, 4]
    trained = [rows[i].query.text for i in range(len(rows))]
    kept = [held_out[i].query.text for i in range(len(held_out))]
    assert [text.split()[:2] for text in kept] == [[n, str(i)] for n in ("one", "two") for i in range(8, 12)]
    assert not set(trained) & set(kept) and len({*trained, *kept}) == 24
    assert held_out[5].query.instruction == "find two"


def test_max_rows_counts_rows_that_are_trained_on(folder: Path) -> None:
    assert TrainingRows(folder, SOURCES, max_rows=10, num_held_out=4).sizes == [8, 8]
    assert TrainingRows(folder, SOURCES, max_rows=3, num_held_out=4).sizes == [3, 3]


def test_holding_out_everything_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"num_eval_rows is 12, but .*one.jsonl has only 12 rows"):
        TrainingRows(folder, SOURCES, num_held_out=12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_eval_rows": 4, "eval_strategy": "epoch"}, "num_eval_rows is 4, fewer than the 8 rows of an evaluation"),
        ({"max_train_samples": 7}, "max_train_samples is 7, fewer than the 8 rows of one batch"),
    ],
    ids=str,
)
def test_a_number_of_rows_below_a_batch_is_named_by_its_key(folder: Path, changes: dict[str, Any], words: str) -> None:
    args = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=4,
        eval_strategy=changes.pop("eval_strategy", "no"),
        use_cpu=True,
    )
    config = Config("base", **changes)
    rows = TrainingRows(folder, SOURCES, max_rows=config.max_train_samples, num_held_out=config.num_eval_rows)
    with pytest.raises(UserError) as error:
        row_orders(config, args, rows, num_processes=2)
    assert words in str(error.value) and "source" not in str(error.value)


def test_logged_figures_are_the_loss_on_the_held_out_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of 0 they equal a computation by hand, micro-batch by micro-batch."""
    (folder / "sources.json").write_text(
        json.dumps({s.name: {"file": s.file, "instruction": s.instructions[0].text} for s in SOURCES}), "utf-8"
    )
    config: dict[str, Any] = {
        "model_name_or_path": str(folder / "base"),
        "sources_file": str(folder / "sources.json"),
        "output_dir": str(folder / "out"),
        "max_seq_length": 64,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.0,
        "max_steps": 2,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "num_eval_rows": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (folder / "run.json").write_text(json.dumps(config), "utf-8")
    script = str(ROOT / "experiments/run_stage_I.py")
    monkeypatch.setattr(sys, "argv", [script, str(folder / "run.json")])
    runpy.run_path(script, run_name="__main__")
    lines = (folder / "out" / "log.jsonl").read_text("utf-8").splitlines()
    logged, again = (entry for entry in map(json.loads, lines) if "eval_loss" in entry)
    assert again["eval_loss"] == logged["eval_loss"], "a loader that is kept has the same batches once more"

    settings = EncoderSettings(
        pooling_mode="last", max_length=64, template="llama3", instruction_join="; ", attention="causal"
    )
    objective = BidirectionalReconstruction(AutoModelForCausalLM.from_pretrained(folder / "base"), settings).eval()
    collate = CollateSides(row_tokenizer(family_tokenizer("llama"), settings), ("query", "positive"))
    held_out = TrainingRows(folder, SOURCES, num_negatives=0, num_held_out=4).held_out()
    order = list(OneSourceBlocks(held_out, 2, 42))
    parts = []
    with torch.no_grad():
        for start in range(0, 8, 2):
            batch = collate([held_out[i] for i in order[start : start + 2]])
            parts.append(objective(batch, objective.count(batch)).parts)
    for name in ("loss", "loss_q2d", "loss_d2q"):
        by_hand = torch.stack([part[name] for part in parts]).mean().item()
        assert logged[f"eval_{name}"] == pytest.approx(by_hand, rel=1e-5)
    assert logged["eval_loss_q2d"] != pytest.approx(logged["eval_loss_d2q"], rel=1e-3)
