"""An embedder in one command: what it trains, what it refuses, and all of it on a tiny base."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import pytest
import reference
from helpers import family_tokenizer, tiny_model, write_jsonl

from llm2vec.commands import embedder, search
from llm2vec.compare.recipes import read_set
from llm2vec.compare.runs import Planner
from llm2vec.data.sources import read_sources_file
from llm2vec.files import ORIGIN_FILE, read_object, write_json
from llm2vec.quickstart import contest
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
    contest.write_set(folder / "out", str(folder / "base"), task, data, args.rows)
    found = read_set(folder / "out/set")
    assert [recipe.name for recipe in found.recipes] == ["anchor", "base", "baseline", "bm25"]
    trials = {trial.recipe: trial for trial in Planner(found, folder / "out/comparison").trials([42])}
    stage_1, stage_2 = trials["anchor"].training
    assert (stage_1.num_steps, stage_2.num_steps) == (4, 4) and stage_1.is_resumable and stage_2.is_resumable
    assert "mteb/baseline-bm25s" in trials["bm25"].evaluation.arguments
    assert "--torch_dtype" not in trials["bm25"].evaluation.arguments
    read = {recipe: "--settings" in trial.evaluation.arguments for recipe, trial in trials.items()}
    assert read == {"anchor": True, "base": True, "baseline": True, "bm25": False}
    # As many tokens of a text as the exported model reads, whatever was trained on.
    assert read_object(folder / "out/set/reading.json") == {"doc_max_length": contest.ROW_TOKENS}


def test_another_base_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each known base is fetched once, and none is taken for another that an earlier start has fetched."""
    made: list[str] = []

    def make(name: str, out: Path) -> None:
        made.append(name)
        out.mkdir()
        write_json(out / "config.json", {"model": name})

    monkeypatch.setattr("llm2vec.quickstart.base.make_base", make)
    names = ["smollm2-135m", "gemma3-270m", "smollm2-135m"]
    folders = [contest.base_folder(name, tmp_path) for name in names]
    assert [read_object(Path(folder, "config.json"))["model"] for folder in folders] == names
    assert made == names[:2]


def test_rows_of_another_form_are_trained_on_from_where_they_were_written(folder: Path) -> None:
    """A CSV file is split into JSONL, which the table of sources names; another instruction is another table."""
    rows = [json.loads(line) for line in (folder / "mine.jsonl").read_text(encoding="utf-8").splitlines()]
    with (folder / "mine.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    flags = ["--data", str(folder / "mine.csv"), "--queries", "10", "--output_dir", str(folder / "out")]
    for instruction in ("find it", "find them"):
        args = embedder._parse_args([*flags, "--instruction", instruction])
        task, data = embedder._data(args, args.output_dir)
        (source,) = read_sources_file(data / "sources.json")
        assert not source.missing(data / "train") and source.instructions[0].text == instruction
        assert read_object(data / "eval/instructions.json") == {task: instruction}


def test_the_printed_search_asks_as_the_model_was_trained(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder, "train_and_export", lambda *_: folder / "out/model")
    monkeypatch.setattr(embedder, "_search", lambda *_: None)
    assert embedder.main(options(folder)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: llm2vec ")]
    command, *flags = shlex.split(line.removeprefix("next: llm2vec "))
    assert command == "search" and search._parse_args(flags).instruction == "find it"


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
