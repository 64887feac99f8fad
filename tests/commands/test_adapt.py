"""From a folder of texts to an embedder in one command: its pairs, its recipes, what it refuses, and all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import family_tokenizer, tiny_model

from llm2vec.commands import adapt
from llm2vec.commands.data import queries
from llm2vec.compare.recipes import read_set
from llm2vec.compare.runs import Planner
from llm2vec.files import read_object
from llm2vec.types import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, and texts: sections with headings, docstrings, and one that says nothing."""
    tiny_model("llama", True).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "docs").mkdir()
    for i in range(160):
        rest = f"It holds red{i} and blue{i} and many other words that nobody else has, up to the number{i} at its end."
        (tmp_path / f"docs/a{i}.md").write_text(f"# The red{i} house of blue{i}\n\n{rest}\n", encoding="utf-8")
    summary = "Return the red{i} of a green{i} box."
    docstrings = [
        f'def f{i}():\n    """{summary.format(i=i)}\n\n    {"The green box " * 6}{i}."""\n' for i in range(160, 180)
    ]
    (tmp_path / "docs/code.py").write_text("\n".join(docstrings), encoding="utf-8")
    (tmp_path / "docs/short.txt").write_text("Nothing.\n", encoding="utf-8")
    return tmp_path


def options(folder: Path, *more: str) -> list[str]:
    out = ["--output_dir", str(folder / "out"), "--base", str(folder / "base")]
    return [str(folder / "docs"), *out, "--queries", "8", "--rows", "64", *more]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_titles_are_queries_and_leave_their_passages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A heading, a docstring's summary, a row's title; a text without one gives no passage."""
    queries.main([str(folder / "docs"), str(folder / "pairs"), "--titles"])
    pairs = {row["query"]: row["positive"] for row in lines(folder / "pairs/pairs.jsonl")}
    assert pairs["The red3 house of blue3"].startswith("It holds red3 and blue3")
    assert pairs["Return the red161 of a green161 box."].startswith("The green box The green")
    assert len(pairs) == 180 == len(lines(folder / "pairs/passages.jsonl"))
    assert "180 passages, 180 queries written, 180 lead back" in capsys.readouterr().out
    rows = [{"title": f"the name of {i}", "text": f"a text of {i} words"} for i in range(3)] + [{"text": "no title"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    queries.main([str(folder / "rows.jsonl"), str(folder / "pairs2"), "--titles"])
    assert lines(folder / "pairs2/pairs.jsonl")[0] == {"query": "the name of 0", "positive": "a text of 0 words"}
    assert len(lines(folder / "pairs2/passages.jsonl")) == 3


def test_each_step_is_done_once_and_anew_for_other_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = adapt._parse_args(options(folder))
    split = adapt._data(args)
    train = lines(split / "train/pairs.jsonl")
    held = lines(split / "eval/HeldOut-pairs/queries.jsonl")
    assert len(held) == 8 and all(len(row["negative"]) == 2 for row in train)
    assert not {row["query"] for row in train} & {row["text"] for row in held}
    for name in ("queries", "mine", "hold_out"):
        monkeypatch.setattr(f"llm2vec.commands.data.{name}.main", lambda *_: pytest.fail("done again"))
    assert adapt._data(args) == split
    monkeypatch.undo()
    for name in ("queries", "mine"):  # what is held out, and under which instruction, asks for no new queries
        monkeypatch.setattr(f"llm2vec.commands.data.{name}.main", lambda *_: pytest.fail("done again"))
    fewer = adapt._data(adapt._parse_args([*options(folder), "--queries", "4", "--instruction", "Find its text"]))
    assert fewer.parent == split.parent and len(lines(fewer / "eval/HeldOut-pairs/queries.jsonl")) == 4
    assert json.loads((fewer / "eval/instructions.json").read_text()) == {"HeldOut-pairs": "Find its text"}
    assert json.loads((fewer / "sources.json").read_text())["pairs"]["instruction"] == ["Find its text"]
    monkeypatch.undo()
    (folder / "docs/a0.md").unlink()
    assert adapt._data(args).parent != split.parent
    assert adapt._rates(str(folder / "base"))[1] == round(0.2 / 32, 6)


def test_what_is_trained_is_an_ordinary_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pre-stages, in the configs that their commands read; MNTP's texts are all passages."""
    monkeypatch.setattr(adapt, "train_and_export", lambda *_: None)
    assert adapt.main(options(folder, "--pre_stage", "reconstruction", "mntp")) == 1
    trials = Planner(read_set(folder / "out/set"), folder / "out/comparison").trials([42])
    commands = {trial.recipe: [run.command for run in trial.training] for trial in trials}
    assert commands == {
        "baseline": ["stage-2"], "reconstruction": ["stage-1", "stage-2"], "mntp": ["mntp", "stage-2"],
        "base": [], "bm25": [],
    }  # fmt: skip
    (mntp,) = [json.loads(Path(t.training[0].arguments[0]).read_text()) for t in trials if t.recipe == "mntp"]
    assert mntp["dataset_file_path"].endswith("pairs/passages.jsonl") and mntp["sources_file"] is None


def test_an_instruction_may_look_like_a_flag(folder: Path) -> None:
    args = adapt._parse_args(options(folder, "--instruction=-find-it"))
    assert read_object(adapt._data(args) / "eval/instructions.json") == {"HeldOut-pairs": "-find-it"}


def test_only_files_that_are_read_decide_which_data_are_used(folder: Path) -> None:
    """Whatever else lies in DATA may come and go: rows of other programs, and all that is hidden."""
    args = adapt._parse_args(options(folder))
    before = adapt._content_of(args.folder)
    (folder / "docs/.git").mkdir()
    for name in ("log.jsonl", ".notes.md", ".git/readme.txt", "picture.png"):
        (folder / "docs" / name).write_text("new\n", encoding="utf-8")
    assert adapt._content_of(args.folder) == before
    (folder / "docs/a0.md").write_text("# other\n", encoding="utf-8")
    assert adapt._content_of(args.folder) != before


def test_an_output_folder_inside_the_texts_is_refused(folder: Path) -> None:
    """Its reports and model cards would be texts of the next start."""
    docs = folder / "docs"
    for inside in (docs, docs / "out/deep"):
        with pytest.raises(UserError, match=r"--output_dir: .* lies inside .*docs, so .*; name a folder outside"):
            adapt.main([str(docs), "--base", str(folder / "base"), "--output_dir", str(inside)])
    assert not (docs / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--server", "http://x/v1"], "--server and --name go together"),
        (["--pre_stage", "simcse"], "--pre_stage: invalid choice: 'simcse'"),
        (["--base", "nowhere/at/all"], "'nowhere/at/all' is neither a folder nor the name of a repository"),
        (["--queries", "500"], "no source in .* has the 2500 different queries that holding out 500 takes"),
    ],
)
def test_a_mistake_is_one_sentence(folder: Path, wrong: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adapt.main(options(folder, *wrong))


def test_too_many_queries_to_hold_out_are_said_before_anything_is_mined(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2vec.commands.data.mine.main", lambda *_: pytest.fail("mined"))
    with pytest.raises(
        UserError, match="185 different queries that holding out 37 takes; there are 180: hold out fewer"
    ):
        adapt._data(adapt._parse_args([*options(folder), "--queries", "37"]))


def test_too_few_pairs_are_said_before_anything_is_trained(folder: Path) -> None:
    for file in sorted((folder / "docs").glob("*.md"))[:140]:
        file.unlink()
    with pytest.raises(UserError, match=r"docs: \d+ pairs are left to train on, and a step takes 32; give more texts"):
        adapt.main(options(folder))


def test_a_folder_without_texts(folder: Path) -> None:
    with pytest.raises(UserError, match=r"none: a folder of text files or a \.jsonl file is needed"):
        adapt.main([str(folder / "none"), *options(folder)[1:]])
    (folder / "empty").mkdir()
    (folder / "empty/a.txt").write_text("Nothing.\n", encoding="utf-8")
    with pytest.raises(UserError, match="empty has no text with a title"):
        adapt.main([str(folder / "empty"), *options(folder)[1:]])


@pytest.mark.slow
def test_all_of_it(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained with every pre-stage, scored beside BM25 and the base, exported; the second start finds it all done."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = options(folder, "--pre_stage", "reconstruction", "mntp")
    assert adapt.main(flags) == 0
    said = capsys.readouterr().out
    for recipe in ("bm25", "base", "baseline", "reconstruction", "mntp"):
        assert f"\n{recipe} " in said
    assert (folder / "out/model/modules.json").is_file()
    assert adapt.main(flags) == 0
    assert capsys.readouterr().out.count("is there already") == 10
