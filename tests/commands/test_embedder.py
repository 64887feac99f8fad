"""An embedder in one command: what it trains, what it refuses, and all of it on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference
from helpers import family_tokenizer, tiny_model, write_jsonl

from llm2vec.commands import embedder
from llm2vec.compare.recipes import read_set
from llm2vec.compare.runs import Planner
from llm2vec.files import ORIGIN_FILE
from llm2vec.types import UserError

ORIGIN = {"model": "maker/tiny", "from": "a box", "weights": "rounded to 4 bits", "license": "mit"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base that says where it is from, and rows of one's own."""
    tiny_model("llama", True).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / ORIGIN_FILE).write_text(json.dumps(ORIGIN))
    rows = [
        {"query": row.query.text, "positive": row.positive.text, "negative": row.negatives[0].text}
        for row in reference.examples(80, 1)
    ]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    return tmp_path


def options(folder: Path) -> list[str]:
    data = ["--data", str(folder / "mine.jsonl"), "--instruction", "find it", "--queries", "10"]
    return [*data, "--base", str(folder / "base"), "--rows", "64", "--output_dir", str(folder / "out")]


def test_what_is_trained_is_an_ordinary_comparison(folder: Path) -> None:
    args = embedder._parse_args(options(folder))
    task, data = embedder._data(args, args.output_dir)
    assert (task, len((data / "eval" / task / "queries.jsonl").read_text().splitlines())) == ("HeldOut-mine", 10)
    assert embedder._data(args, args.output_dir) == (task, data), "the same rows are split once"
    embedder.write_set(folder / "out", str(folder / "base"), task, data, args.rows)
    found = read_set(folder / "out/set")
    assert [recipe.name for recipe in found.recipes] == ["anchor", "base", "baseline", "bm25"]
    trials = {trial.recipe: trial for trial in Planner(found, folder / "out/comparison").trials([42])}
    stage_1, stage_2 = trials["anchor"].training
    assert (stage_1.num_steps, stage_2.num_steps) == (4, 4) and stage_1.is_resumable and stage_2.is_resumable
    assert "mteb/baseline-bm25s" in trials["bm25"].evaluation.arguments
    assert "--torch_dtype" not in trials["bm25"].evaluation.arguments


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--data", "x.jsonl"], "--data and --instruction go together"),
        (["--data", "x.jsonl", "--instruction", "find it"], r"--data: there is no file x\.jsonl"),
        (["--rows", "0"], "--rows is 0"),
    ],
)
def test_a_mistake_is_said_before_anything_is_fetched(wrong: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        embedder.main(wrong)


def test_too_few_rows_to_hold_out_of(folder: Path) -> None:
    with pytest.raises(UserError, match="different queries that holding out 40 takes"):
        embedder.main([*options(folder), "--queries", "40"])


@pytest.mark.slow
def test_all_of_it(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, scored, exported and searched; the second start finds everything done."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert embedder.main(options(folder)) == 0
    said = capsys.readouterr().out
    for recipe in ("bm25", "base", "baseline", "anchor"):
        assert f"\n{recipe} " in said
    assert said.count("\n    0.") + said.count("\n    1.") + said.count("\n    -0.") == 15, "five documents a query"
    card = (folder / "out/model/README.md").read_text(encoding="utf-8")
    prompts = json.loads((folder / "out/model/config_sentence_transformers.json").read_text(encoding="utf-8"))[
        "prompts"
    ]
    assert "find it" in prompts["query"] and "find it" not in prompts["document"]
    assert "maker/tiny" in card and "whose weights were rounded to 4 bits (a box)" in card
    runs = [
        json.loads(file.read_text(encoding="utf-8")) for file in (folder / "out/comparison/runs").glob("*/run.json")
    ]
    assert len(runs) == 3 and all(run["origin"] == ORIGIN for run in runs), "it travels along the chain"
    assert embedder.main(options(folder)) == 0
    assert capsys.readouterr().out.count("is there already") == 7
