"""Compared recipes: which runs a folder of configs means, their order, what is done again, failures, and the table."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
from eval_stubs import write_retrieval
from helpers import family_tokenizer, tiny_model, write_jsonl

from llm2vec.commands import report
from llm2vec.commands.train import stage_2
from llm2vec.compare import execution
from llm2vec.compare import runs as compare_runs
from llm2vec.compare.execution import clear, do_all, is_finished
from llm2vec.compare.halving import halve
from llm2vec.compare.recipes import Halving, read_set
from llm2vec.compare.record import TrialOutcome, read_record, write_record
from llm2vec.compare.runs import FINISHED_FILE, Planner, Run, Trial
from llm2vec.compare.table import (
    HELD_AGAINST,
    along_picture,
    difference_table,
    failure_lines,
    outcome_table,
    own_keys,
    rank_picture,
    write_comparison,
)  # fmt: skip
from llm2vec.model.chain import INCOMPLETE_MARKER
from llm2vec.model.settings import SETTINGS_FILE
from llm2vec.model.vault import MODULES_FILE
from llm2vec.reports.results import ndcg_at_10
from llm2vec.table import Table, escape_markdown
from llm2vec.types import RunEnds, UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments/compare.py"


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def change(file: Path, **keys: Any) -> None:
    write(file, {**json.loads(file.read_text(encoding="utf-8")), **keys})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base that was trained with a template, data, a retrieval set, and three recipes, one from a library."""
    tiny_model("llama", True).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    write(tmp_path / "base" / SETTINGS_FILE, {"template": "llama3"})
    rows = [
        {"query": row.query.text, "positive": row.positive.text, "negative": row.negatives[0].text}
        for row in reference.examples(24, 1)
    ]
    write_jsonl(tmp_path / "data/nq.jsonl", rows)
    write_retrieval(tmp_path / "eval/MySet")
    shared = {
        "recipes": "../library",
        "all": {
            "model_name_or_path": str(tmp_path / "base"),
            "dataset_file_path": str(tmp_path / "data"),
            "sources": ["nq"],
            "max_seq_length": 128,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "stage_I": {"max_steps": 3, "learning_rate": 1e-3},
        "stage_II": {"max_steps": 2, "loss_scale": 20},
    }
    write(tmp_path / "set/shared.json", shared)
    options = {
        "tasks": ["MySet"],
        "local_data_dir": str(tmp_path / "eval"),
        "task_to_instructions_fp": str(write(tmp_path / "instructions.json", {"MySet": "find it"})),
        "torch_dtype": "float32",
    }
    write(tmp_path / "set/evaluation.json", options)
    for name, scale in (("two_stages", {}), ("two_stages_cold", {"loss_scale": 50})):
        write(tmp_path / f"set/{name}/1_stage_I.json", {"alpha": 0.5})
        write(tmp_path / f"set/{name}/2_stage_II.json", scale)
    write(tmp_path / "library/one_stage/1_stage_II.json", {"template": "echo", "pooling_mode": "mean"})
    return tmp_path


def trials_of(folder: Path, seeds: tuple[int, ...] = (7,)) -> dict[tuple[str, int | None], Trial]:
    trials = Planner(read_set(folder / "set"), folder / "out").trials(seeds)
    return {(trial.recipe, trial.seed): trial for trial in trials}


def unique_runs(trials: Iterable[Trial]) -> list[Run]:
    return list({run.name: run for trial in trials for run in trial.runs}.values())


def config_of(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(run.arguments[0]).read_text(encoding="utf-8"))
    return content


# --- which runs a folder means ---


def test_recipes_come_from_the_set_and_its_library(folder: Path) -> None:
    found = read_set(folder / "set")
    assert [recipe.name for recipe in found.recipes] == ["one_stage", "two_stages", "two_stages_cold"]
    assert [stage.stage for stage in found.recipes[1].stages] == ["stage_I", "stage_II"]
    write(folder / "set/one_stage/1_stage_II.json", {"template": "plain"})
    assert read_set(folder / "set").recipes[0].stages[0].keys == {"template": "plain"}, "the set's own goes first"


def test_a_runs_config_is_shared_keys_then_the_stages_then_its_own(folder: Path) -> None:
    """And the place in the chain says what it starts from and where it writes."""
    trial = trials_of(folder)["two_stages_cold", 7]
    first, second = trial.training
    assert (first.command, second.command) == ("stage-1", "stage-2")
    assert (first.parent, second.parent, trial.evaluation.parent) == (None, first, second)
    keys = config_of(first)
    assert (keys["alpha"], keys["max_steps"], keys["max_seq_length"], keys["seed"]) == (0.5, 3, 128, 7)
    assert Path(keys["output_dir"]) == first.folder and first.num_steps == 3
    keys = config_of(second)
    assert (keys["loss_scale"], keys["max_steps"]) == (50, 2), "the recipe's own key goes over the stage's"
    assert keys["model_name_or_path"] == str(first.folder)
    options = list(trial.evaluation.arguments)
    assert options[options.index("--base_model_name_or_path") + 1] == str(second.folder)
    assert options[options.index("--tasks") + 1] == "MySet"
    assert sorted(file.name for file in (folder / "out/configs").iterdir()) == sorted(
        f"{run.name}.json" for run in unique_runs(list(trials_of(folder).values())) if run.num_steps
    )


def test_a_stage_that_two_recipes_have_in_common_is_one_run(folder: Path) -> None:
    trials = trials_of(folder, (7, 8))
    assert trials["two_stages", 7].training[0] == trials["two_stages_cold", 7].training[0]
    assert trials["two_stages", 7].training[0] != trials["two_stages", 8].training[0]
    runs = unique_runs(list(trials.values()))
    assert len(runs) == 2 * (1 + 3 + 3), "Stage I once, three Stage II, three evaluations; two seeds"
    for i, run in enumerate(runs):
        assert run.parent is None or run.parent in runs[:i], "parents come first"


def test_settings_of_the_bases_own_training_do_not_bind_recipes(folder: Path) -> None:
    """The base names the template it was trained with; the recipe with another one starts from a copy without it."""
    write(folder / "base" / MODULES_FILE, [])  # as a checkpoint of ours has; by it a copy was no model of ours
    base = Path(config_of(trials_of(folder)["one_stage", 7].training[0])["model_name_or_path"])
    assert base.parent == folder / "out"
    names = {file.name for file in (folder / "base").iterdir()}
    assert {file.name for file in base.iterdir()} == names - {SETTINGS_FILE, MODULES_FILE}
    (folder / "base" / SETTINGS_FILE).unlink()
    base = Path(config_of(trials_of(folder)["one_stage", 7].training[0])["model_name_or_path"])
    assert base == folder / "base"


@pytest.mark.parametrize(
    ("file", "keys", "renamed"),
    [
        ("set/two_stages/2_stage_II.json", {"lora_r": 4}, {"two_stages": [1]}),
        ("set/two_stages/1_stage_I.json", {"alpha": 0.1}, {"two_stages": [0, 1]}),
        (
            "set/shared.json",
            {"stage_II": {"max_steps": 1}},
            {"one_stage": [0], "two_stages": [1], "two_stages_cold": [1]},
        ),
        ("set/evaluation.json", {"batch_size": 8}, {}),
    ],
)
def test_a_change_renames_the_runs_it_concerns_and_no_other(
    folder: Path, file: str, keys: dict[str, Any], renamed: dict[str, list[int]]
) -> None:
    before = trials_of(folder)
    assert trials_of(folder) == before
    change(folder / file, **keys)
    after = trials_of(folder)
    for (recipe, seed), trial in after.items():
        old = before[recipe, seed]
        pairs = zip(trial.training, old.training, strict=True)
        changed = [i for i, (new_run, old_run) in enumerate(pairs) if new_run.name != old_run.name]
        assert changed == renamed.get(recipe, [])
        evaluated_anew = bool(changed) or file == "set/evaluation.json"
        assert (trial.evaluation.name != old.evaluation.name) is evaluated_anew


def test_other_data_or_another_base_are_other_runs(folder: Path) -> None:
    before = trials_of(folder)["two_stages", 7]
    write_jsonl(folder / "data/nq.jsonl", [{"query": "a", "positive": "b", "negative": "c"}] * 24)
    other_data = trials_of(folder)["two_stages", 7]
    assert not {run.name for run in before.runs} & {run.name for run in other_data.runs}
    evaluations = {other_data.evaluation.name}
    write_jsonl(folder / "eval/MySet/corpus.jsonl", [{"_id": 1, "text": "x"}])
    evaluations.add(trials_of(folder)["two_stages", 7].evaluation.name)
    write(folder / "instructions.json", {"MySet": "find all of it"})
    other_task = trials_of(folder)["two_stages", 7]
    assert len({*evaluations, other_task.evaluation.name}) == 3
    assert other_task.training == other_data.training
    tiny_model("llama", True, seed=1).save_pretrained(folder / "base")
    assert trials_of(folder)["two_stages", 7].training[0].name != other_data.training[0].name


def test_other_texts_behind_the_same_ids_are_other_runs(folder: Path) -> None:
    elsewhere = str(folder / "elsewhere.jsonl")
    table = {"a": {"file": "nq.jsonl", "instruction": "", "documents": {"file": elsewhere}}}
    write(folder / "data/sources.json", table)
    shared = json.loads((folder / "set/shared.json").read_text(encoding="utf-8"))
    keys = {key: value for key, value in shared["all"].items() if key != "sources"}
    change(folder / "set/shared.json", all={**keys, "sources_file": str(folder / "data/sources.json")})
    names = set()
    for text in ("b", "c"):
        write_jsonl(folder / "elsewhere.jsonl", [{"id": "b", "text": text}])  # beside the folder of the data
        names.add(trials_of(folder)["two_stages", 7].training[0].name)
    assert len(names) == 2


def test_more_processes_are_other_runs_where_they_make_a_larger_batch(folder: Path) -> None:
    def name(num_processes: int) -> str:
        return Planner(read_set(folder / "set"), folder / "out", num_processes).trials([7])[0].training[0].name

    assert name(1) == trials_of(folder)["one_stage", 7].training[0].name
    assert len({name(1), name(2), name(4)}) == 3
    shared = json.loads((folder / "set/shared.json").read_text(encoding="utf-8"))
    change(folder / "set/shared.json", all={**shared["all"], "total_batch_size": 4})
    assert name(1) == name(2)


def test_a_base_on_the_hub_has_its_commit_from_the_first_start_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of it was fetched it has no commit here; runs named without would all be done again."""
    fetched: set[str] = set()
    monkeypatch.setattr(compare_runs, "find_file", lambda path, name: fetched.add(path))
    monkeypatch.setattr(compare_runs, "revision_of", lambda path: "0123abc" if path in fetched else path)
    shared = json.loads((folder / "set/shared.json").read_text(encoding="utf-8"))
    change(folder / "set/shared.json", all={**shared["all"], "model_name_or_path": "somebody/base"})
    first = Planner(read_set(folder / "set"), folder / "out")
    assert first.base_revision == "0123abc"
    assert first.trials([7]) == Planner(read_set(folder / "set"), folder / "out").trials([7])


def test_the_schema_that_a_file_names_decides_nothing(folder: Path) -> None:
    """It is for editors: runs keep their names, and their configs are without it."""
    before = trials_of(folder)
    for file in ("shared.json", "two_stages/1_stage_I.json"):
        change(folder / "set" / file, **{"$schema": "config.schema.json"})
    assert trials_of(folder) == before
    assert "$schema" not in config_of(before["two_stages", 7].training[0])


def test_a_hidden_folder_is_no_recipe(folder: Path) -> None:
    write(folder / "set/.ipynb_checkpoints/1_stage_II-checkpoint.json", {})
    assert ".ipynb_checkpoints" not in {recipe.name for recipe in read_set(folder / "set").recipes}


def test_a_sweep_makes_a_recipe_of_each_combination_that_concerns_it(folder: Path) -> None:
    sweep = {"stage_II": {"loss_scale": [20, 30]}, "stage_I": {"alpha": [0.1, 0.9]}}
    change(folder / "set/shared.json", sweep=sweep)
    trials = trials_of(folder)
    both = [
        f"two_stages,stage_II.loss_scale={scale},stage_I.alpha={alpha}" for scale in (20, 30) for alpha in (0.1, 0.9)
    ]
    alone = ["one_stage,stage_II.loss_scale=20", "one_stage,stage_II.loss_scale=30"]
    assert set(both) | set(alone) <= {name for name, _ in trials} and len(trials) == 4 + 4 + 2
    configs = [[config_of(run) for run in trials[name, 7].training] for name in both]
    assert [(first["alpha"], second["loss_scale"]) for first, second in configs] == [
        (0.1, 20), (0.9, 20), (0.1, 30), (0.9, 30),
    ]  # fmt: skip
    assert len({trials[name, 7].training[0].name for name in both}) == 2, "Stage I is trained once for each alpha"
    assert own_keys(read_set(folder / "set").recipes)[both[0]] == "stage_I: alpha 0.1; then stage_II: loss_scale 20"


def test_a_sweeps_recipe_is_held_against_the_baseline_with_its_values() -> None:
    scores = {
        "anchor,stage_II.loss_scale=20,stage_I.alpha=0.1": 9.0, "baseline,stage_II.loss_scale=20": 4.0,
        "baseline,stage_II.loss_scale=30": 6.0, "anchor,stage_II.loss_scale=30,stage_I.alpha=0.1": 8.0,
    }  # fmt: skip
    table = difference_table([TrialOutcome(name, 1, {"X": score}) for name, score in scores.items()], {})
    assert table is not None
    assert {str(row[0]).split(",")[1]: row[2] for row in table.rows} == {
        "stage_II.loss_scale=20": 5.0,
        "stage_II.loss_scale=30": 2.0,
    }


def test_a_set_says_what_others_are_held_against(folder: Path) -> None:
    shared = json.loads((folder / "set/shared.json").read_text(encoding="utf-8"))
    assert read_set(folder / "set").reference == "baseline"
    write(folder / "set/shared.json", shared | {"reference": "two_stages"})
    assert read_set(folder / "set").reference == "two_stages"
    outcomes = [TrialOutcome(name, 1, {"X": score}) for name, score in (("anchor", 4.0), ("other", 9.0))]
    table = difference_table(outcomes, {HELD_AGAINST: "anchor"})
    assert table is not None and table.header[0] == "Less anchor" and table.rows[0][:3] == ["other", "1", 5.0]
    write(folder / "set/shared.json", shared | {"reference": "nothing"})
    with pytest.raises(UserError, match="reference is 'nothing'; a recipe of the set is needed"):
        read_set(folder / "set")


def test_scores_are_drawn_against_the_rank_before_the_last_stage() -> None:
    outcomes = [
        TrialOutcome(name, seed, {"X": score + seed}, rank=rank + seed)
        for name, score, rank in (("mine", 20.0, 30.0), ("other", 10.0, 50.0)) for seed in (1, 3)
    ]  # fmt: skip
    picture = rank_picture([*outcomes, TrialOutcome("baseline", 1, {"X": 5.0})])
    assert picture is not None
    (axes,) = picture.figure.axes
    dots = {text.get_text(): text.xy for text in axes.texts}  # type: ignore[attr-defined]
    assert {name: tuple(xy) for name, xy in dots.items()} == {"mine": (32.0, 22.0), "other": (52.0, 12.0)}
    assert rank_picture(outcomes[:2]) is None, "one recipe has nothing to be held against"


def test_a_model_can_be_scored_as_it_is(folder: Path) -> None:
    """Once, whatever the seeds; null takes an option of the set out."""
    options = {"base_model_name_or_path": "mteb/baseline-bm25s", "torch_dtype": None}
    write(folder / "set/bm25/evaluation.json", options)
    trials = trials_of(folder, (7, 8))
    assert ("bm25", 7) not in trials
    trial = trials["bm25", None]
    assert trial.training == () and trial.evaluation.parent is None
    assert "--torch_dtype" not in trial.evaluation.arguments and "mteb/baseline-bm25s" in trial.evaluation.arguments


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("set/shared.json", None, r"shared\.json: cannot be read"),
        ("set/shared.json", "{", r"shared\.json: not valid JSON"),
        ("set/shared.json", {"all": {"model_name_or_path": "x/y"}, "stage_3": {}}, "unknown section 'stage_3'"),
        ("set/shared.json", {"all": {}}, "all.model_name_or_path must name the base"),
        ("set/shared.json", {"all": {"model_name_or_path": "a/b/c"}}, "there is no base model a/b/c"),
        ("set/shared.json", {"all": {"model_name_or_path": "x/y"}, "recipes": "../no"}, r"no such folder"),
        (
            "set/shared.json",
            {"all": {"model_name_or_path": "x/y"}, "recipes": 5},
            "recipes is 5; it must name a folder",
        ),
        (
            "set/shared.json",
            {"all": {"model_name_or_path": "x/y", "seed": 1}},
            r"shared\.json: seed follows from the set",
        ),
        ("set/shared.json", {"lm": {"model_name_or_path": "x/y"}}, "model_name_or_path follows from the set"),
        *(
            ("set/shared.json", {"all": {"model_name_or_path": "x/y"}, "sweep": sweep}, said)
            for sweep, said in (
                ([1], "sweep must be an object of sections"),
                ({"stage_3": {"alpha": [1]}}, "sweep has the unknown section 'stage_3'; allowed: all, stage_I"),
                ({"stage_II": {"seed": [1]}}, "seed follows from the set"),
                ({"stage_II": {"loss_scale": 20}}, "sweep.stage_II.loss_scale is 20; a list of numbers or words"),
                ({"stage_II": {"template": ["../x"]}}, r"sweep.stage_II.template is \['../x'\]; a list of numbers or"),
            )
        ),
        *(
            ("set/shared.json", {"all": {"model_name_or_path": "x/y"}, "sweep": sweep, "halving": halving}, said)
            for sweep, halving, said in (
                ({}, {"metric": "eval_loss", "rungs": [0.5]}, "halving must be an object .*, beside a sweep"),
                ({"lm": {"alpha": [1]}}, [0.5], "halving must be an object of metric, rungs and factor"),
                ({"lm": {"alpha": [1]}}, {"rung": [0.5]}, "halving must be an object of metric, rungs and factor"),
                ({"lm": {"alpha": [1]}}, {"rungs": [0.5]}, "halving.metric is None; name a figure of an evaluation"),
                ({"lm": {"alpha": [1]}}, {"metric": "eval_loss", "rungs": [0.5, 0.2]}, "halving.rungs is .0.5, 0.2.;"),
                ({"lm": {"alpha": [1]}}, {"metric": "eval_loss", "rungs": [5]}, "halving.rungs is .5.; shares of the"),
                ({"lm": {"alpha": [1]}}, {"metric": "eval_loss", "rungs": [0.5], "factor": 1}, "halving.factor is 1;"),
            )
        ),
        ("set/evaluation.json", {}, "tasks must list at least one task"),
        ("set/evaluation.json", {"tasks": "MySet"}, "tasks must list at least one task"),
        ("set/evaluation.json", {"tasks": ["MySet"], "task": "x"}, "unknown option 'task'"),
        ("set/evaluation.json", {"tasks": ["MySet"], "local_data_dir": "no"}, "there is no folder no"),
        ("set/evaluation.json", {"tasks": ["MySet"], "local_data_dir": 5}, "local_data_dir is 5; a string is needed"),
        ("set/two_stages/3_stage_III.json", {}, r"the name must be <number>_<stage>\.json; stages: stage_I, "),
        ("set/two_stages/notes.json", {}, r"the name must be <number>_<stage>\.json"),
        ("set/two_stages/2_lm.json", {}, r"2_stage_II\.json: 2_lm\.json has the same number"),
        ("set/two_stages/4_lm.json", {}, r"numbered \[1, 2, 4\]; 1, 2, \.\.\. without a gap"),
        ("set/two_stages/2_stage_II.json", {"seed": 1}, "seed follows from the set"),
        ("set/two_stages/2_stage_II.json", {"alpha": 1}, r"2_stage_II\.json, over .*shared\.json: alpha has no effect"),
        ("set/two_stages/2_stage_II.json", {"lora_alfa": 1}, "unknown key 'lora_alfa'; did you mean 'lora_alpha'"),
        ("set/two_stages/evaluation.json", {"base_model_name_or_path": "x/y"}, "not both"),
        ("set/empty/readme.txt", "", "not neither"),
        ("data/nq.jsonl", None, r"lacks nq\.jsonl"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(folder: Path, file: str, content: Any, said: str) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        write(folder / file, content)
    with pytest.raises(UserError, match=said) as error:
        trials_of(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "out/runs").exists()


# --- successive halving ---


@pytest.fixture
def searched(folder: Path) -> Path:
    """Three rates of Stage II, 8 steps each, of which two go on after 2 and one after 4."""
    shared = json.loads((folder / "set/shared.json").read_text(encoding="utf-8"))
    evaluation = {"num_eval_rows": 4, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    write(
        folder / "set/shared.json",
        {
            "recipes": "../library",
            "all": shared["all"],
            "stage_I": shared["stage_I"],
            "stage_II": {
                "max_steps": 8, "warmup_steps": 2, "lr_scheduler_type": "cosine", "lora_dropout": 0.3, **evaluation,
            },
            "sweep": {"stage_II": {"learning_rate": [1e-5, 3e-2, 1e-3]}},
            "halving": {"metric": "eval_loss", "rungs": [0.25, 0.5], "factor": 2},
        },
    )  # fmt: skip
    shutil.rmtree(folder / "set/two_stages_cold")
    return folder


def in_this_process(of: Sequence[tuple[str, Run]]) -> dict[str, str]:
    """Does runs of Stage II as `Runner` does; Stage I is taken as it is."""
    for run in dict.fromkeys(run for _, run in of):
        if run.command == "stage-2" and not is_finished(run):
            clear(run)
            with suppress(RunEnds):  # nothing is left to do
                stage_2(run.arguments)
            (run.folder / run.marker).touch()
    return {}


def losses_of(run: Run) -> dict[int, float]:
    entries = map(json.loads, (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}


def adapter_of(run: Run) -> bytes:
    return (run.folder / "adapter_model.safetensors").read_bytes()


def test_who_comes_through_has_the_weights_of_a_run_that_was_never_stopped(searched: Path) -> None:
    """To the bit, dropout and a schedule over all steps included; a set without halving then finishes the others."""
    recipes = read_set(searched / "set")
    assert recipes.halving == Halving("eval_loss", (0.25, 0.5), 2)
    trials, whole = (
        [trial for trial in Planner(recipes, searched / out).trials([7]) if trial.recipe.startswith("one_stage")]
        for out in ("out", "whole")
    )
    runs, never_stopped = ([trial.training[0] for trial in of] for of in (trials, whole))
    in_this_process([("", run) for run in never_stopped])
    at_end = {trial.recipe: losses_of(trial.training[0]) for trial in whole}
    first = sorted(at_end, key=lambda recipe: at_end[recipe][2])
    last = sorted(first[:2], key=lambda recipe: at_end[recipe][4])
    reached = {last[0]: 8, last[1]: 4, first[2]: 2}
    for start in (1, 2):  # started again, nothing is done twice, and all comes to the same
        halved = halve(trials, recipes.halving, Path("shared.json"), in_this_process)
        (winner,) = halved.trials
        in_this_process([("", winner.training[0])])
        for trial, run, other in zip(trials, runs, never_stopped, strict=True):
            wanted = {step: loss for step, loss in losses_of(other).items() if step <= reached[trial.recipe]}
            assert losses_of(run) == wanted, f"{trial.recipe}, start {start}"
        assert halved.table is not None and halved.table.header == ["Recipe", "25 %", "50 %", "Fell at"]
        assert halved.table.rows == [
            [last[0], *[f"{at_end[last[0]][step]:.6g}" for step in (2, 4)], None],
            [last[1], *[f"{at_end[last[1]][step]:.6g}" for step in (2, 4)], "50 %"],
            [first[2], f"{at_end[first[2]][2]:.6g}", None, "25 %"],
        ]
    place = trials.index(winner)
    assert adapter_of(runs[place]) == adapter_of(never_stopped[place])
    kept = sorted(path.name for path in winner.training[0].folder.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"], "it went on from each"
    in_this_process([("", run) for run in runs])
    assert list(map(adapter_of, runs)) == list(map(adapter_of, never_stopped)), "those that fell, finished afterwards"


def test_seeds_are_ranked_together_and_a_failure_is_no_rank(searched: Path) -> None:
    """Higher is better but for losses; of equals the first goes on; a recipe that is alone is not touched."""
    trials = Planner(read_set(searched / "set"), searched / "out").trials([7, 8])
    figures = {"1e-05": {7: 1.0, 8: 5.0}, "0.03": {7: 4.0, 8: 2.0}, "0.001": {7: 9.0, 8: 9.0}}
    done: list[tuple[str, str]] = []

    def do(of: Sequence[tuple[str, Run]]) -> dict[str, str]:
        failed = {}
        for recipe, run in of:
            done.append((recipe, run.name.rpartition("-")[0]))
            rate = recipe.rpartition("=")[2]
            if recipe.startswith("one_stage") and rate == "0.001" and done[-1][1] == "stage_II-seed8-at4":
                failed[run.name] = "no luck"
            figure = figures[rate][config_of(run)["seed"]]
            write_jsonl(run.folder / "log.jsonl", [{"step": run.num_steps, "eval_x": figure}])
        return failed

    found = halve(trials, Halving("eval_x", (0.25, 0.5), 2), Path("shared.json"), do)
    one, two = (f"{recipe}_stage{'s' * (recipe == 'two')},stage_II.learning_rate=" for recipe in ("one", "two"))
    assert [trial.recipe for trial in found.trials] == [f"{one}1e-05"] * 2 + [f"{one}0.001"] * 2 + [f"{two}0.001"] * 2
    assert list(found.failures.values()) == ["no luck"] * 2, "of both seeds"
    assert (f"{one}0.03", "stage_II-seed8-at2") in done and (f"{one}0.03", "stage_II-seed7-at4") not in done
    assert (f"{two}0.001", "stage_I-seed7") in done, "what the last stage starts from"
    assert found.table is not None and [row[1:] for row in found.table.rows if str(row[0]).startswith(one)] == [
        ["3", "3", None], ["9", None, "failed"], ["3", None, "25 %"],
    ]  # fmt: skip
    alone = [trial for trial in trials if trial.recipe == f"{one}0.03"]
    assert halve(alone, Halving("eval_x", (0.25,), 2), Path("shared.json"), do).trials == alone


@pytest.mark.parametrize(
    ("keys", "rungs", "said"),
    [
        ({"eval_strategy": "no"}, (0.5,), "halving needs runs that evaluate and can go on, and one_stage,.* does not"),
        ({"resume": "never"}, (0.5,), "halving needs runs that evaluate and can go on"),
        ({"eval_steps": 3}, (0.5,), "halving.rungs: 0.5 of the 8 steps .* is step 4; .* a multiple of eval_steps, 3"),
        ({}, (0.99,), "is step 8; it must lie before the last one"),
        ({}, (0.5,), "halving.metric is 'eval_x', which .* did not measure at step 4; it measured eval_loss."),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    searched: Path, keys: dict[str, Any], rungs: tuple[float, ...], said: str
) -> None:
    shared = json.loads((searched / "set/shared.json").read_text(encoding="utf-8"))
    change(searched / "set/shared.json", stage_II={**shared["stage_II"], **keys})
    trials = Planner(read_set(searched / "set"), searched / "out").trials([7])

    def do(of: Sequence[tuple[str, Run]]) -> dict[str, str]:
        assert not keys, "nothing runs before it is said"
        for _, run in of:
            write_jsonl(run.folder / "log.jsonl", [{"step": run.num_steps, "eval_loss": 1.0}])
        return {}

    with pytest.raises(UserError, match=said) as error:
        halve(trials, Halving("eval_x", rungs, 2), Path("shared.json"), do)
    assert "\n" not in str(error.value)


# --- doing runs ---


def chain(folder: Path, *steps: int, name: str = "run") -> list[Run]:
    runs: list[Run] = []
    for i, num_steps in enumerate(steps):
        parent = runs[-1] if runs else None
        runs.append(Run(f"{name}{i}", "x.py", (), folder / f"{name}{i}", parent, num_steps))
    return runs


def test_long_chains_go_first_and_parents_before_children(tmp_path: Path) -> None:
    runs = [*chain(tmp_path, 5, name="short"), *chain(tmp_path, 1, 9, name="long"), *chain(tmp_path, 7, name="mid")]
    order: list[str] = []
    assert do_all(runs, lambda run, worker: order.append(run.name), 1) == {}
    assert order == ["long0", "long1", "mid0", "short0"]


def test_no_more_runs_at_a_time_than_workers_and_each_has_its_own(tmp_path: Path) -> None:
    at_work: set[int] = set()
    most, lock = [0], threading.Lock()

    def do(run: Run, worker: int) -> None:
        with lock:
            assert worker not in at_work and worker < 2
            at_work.add(worker)
            most[0] = max(most[0], len(at_work))
        time.sleep(0.01)
        with lock:
            at_work.remove(worker)

    runs = [run for i in range(6) for run in chain(tmp_path, 1, 1, name=f"r{i}_")]
    assert do_all(runs, do, 2) == {}
    assert most == [2]


def test_a_failure_stops_its_own_chain_only(tmp_path: Path) -> None:
    bad, good = chain(tmp_path, 1, 1, 1, name="bad"), chain(tmp_path, 1, 1, name="good")
    done: list[str] = []

    def do(run: Run, worker: int) -> None:
        if run.name == "bad1":
            raise UserError("no luck")
        done.append(run.name)

    assert do_all([*bad, *good], do, 2) == {"bad1": "no luck", "bad2": "no luck"}
    assert sorted(done) == ["bad0", "good0", "good1"]


def finish(run: Run, seconds: float) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / FINISHED_FILE).touch()
    os.utime(run.folder / FINISHED_FILE, (seconds, seconds))


def test_a_run_is_done_again_if_it_was_cut_short_or_its_parent_is_newer(tmp_path: Path) -> None:
    first, second = chain(tmp_path, 1, 1)
    assert not is_finished(first)
    finish(first, 100)
    assert is_finished(first) and not is_finished(second)
    finish(second, 200)
    assert is_finished(second)
    finish(first, 300)
    assert not is_finished(second)
    (first.folder / INCOMPLETE_MARKER).touch()
    assert not is_finished(first)
    (first.folder / "log.jsonl").touch()
    clear(first)
    assert list(first.folder.iterdir()) == []


def test_a_run_that_a_signal_stops_on_its_way_has_not_come_to_the_next_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends well, too, and its folder holds the model of the rung before."""
    monkeypatch.setattr(execution, "PROGRAM", ("-c", "pass"))
    (run,) = (replace(run, command="stage-2", stop=4, is_resumable=True) for run in chain(tmp_path, 4))
    recorded = {"config": {"stop_after_n_steps": 2, "training": {}}, "step": 2}
    write(run.folder / "run.json", recorded)
    with (tmp_path / "lock").open("w") as lock:
        runner = execution.Runner([("mine", run)], tmp_path, workers=1, processes=1, lock=lock.fileno(), say=print)
        with pytest.raises(UserError, match="was stopped by a signal"):
            runner.do(run, 0)
        write(run.folder / "run.json", {**recorded, "step": 4})
        runner.do(run, 0)


def test_a_run_that_the_system_kills_is_said_to_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last line tells nothing: it is that of a step that went well."""
    monkeypatch.setattr(execution, "PROGRAM", ("-c", "import os; print('fine', flush=True); os.kill(os.getpid(), 9)"))
    (run,) = chain(tmp_path, 4)
    with (tmp_path / "lock").open("w") as lock:
        runner = execution.Runner([("mine", run)], tmp_path, workers=1, processes=1, lock=lock.fileno(), say=print)
        with pytest.raises(UserError, match=r"was killed \(SIGKILL; often for want of memory\); see \S+\.log$"):
            runner.do(run, 0)


def test_scores_of_an_interrupted_evaluation_are_kept_and_old_ones_are_not(tmp_path: Path) -> None:
    run = Run("evaluation", "x.py", (), tmp_path / "e", is_resumable=True)
    write(run.folder / "results/m/r/A.json", {})
    clear(run)
    assert (run.folder / "results/m/r/A.json").is_file()
    finish(run, 1)
    clear(run)
    assert list(run.folder.iterdir()) == []


# --- the table ---


def write_scores(run: Run, scores: dict[str, float]) -> None:
    for task, score in scores.items():
        entry = {"main_score": score / 100, "hf_subset": "default", "languages": ["eng-Latn"]}
        content = {"dataset_revision": "d", "task_name": task, "mteb_version": "2", "scores": {"test": [entry]}}
        write(run.folder / f"results/model/revision/{task}.json", content)


def test_an_outcome_is_read_from_what_the_runs_left(tmp_path: Path) -> None:
    """Tokens and minutes of all stages together, from their logs. The first was killed and went on from step 5: what
    the library calls its runtime is that of the second start alone."""
    first, second = chain(tmp_path, 1, 1)
    evaluation = Run("e", "x.py", (), tmp_path / "e", second)
    logs = {
        first: [
            {"step": 5, "tokens": 100.0, "tokens_per_second": 2.5, "eval_effective_rank": 3.0},
            {"step": 10, "tokens": 50.0, "tokens_per_second": 2.5},
            {"step": 10, "eval_effective_rank": 7.0},
            {"step": 10, "train_runtime": 20.0},
        ],
        second: [{"step": 4, "train_runtime": 30.0, "eval_effective_rank": 9.0}],
    }
    for run, entries in logs.items():
        write_jsonl(run.folder / "log.jsonl", entries)
    write_scores(evaluation, {"NFCorpus": 30.0, "SciFact": 60.0})
    trial = Trial("mine", 42, (first, second), evaluation)

    def outcome_of(trial: Trial, failures: dict[str, str]) -> TrialOutcome:
        return write_record(tmp_path / "record", [trial], failures, {"mine": "stage_II"}, {"Seeds": "42"})[0]

    for run in (first, second):
        write(run.folder / "run.json", {})
    outcome = outcome_of(trial, {})
    assert outcome.scores == {"NFCorpus": pytest.approx(30), "SciFact": pytest.approx(60)}
    assert outcome.minutes == pytest.approx(1.5)
    assert outcome.tokens is None, "one log does not say"
    assert outcome.steps == 4, "of the last stage"
    assert outcome.rank == 7.0, "the last before Stage II"
    assert read_record(tmp_path / "record") == ([outcome], {"mine": "stage_II"}, {"Seeds": "42"}, None)
    last = [{"step": 4, "tokens": 8.0, "tokens_per_second": 0.4}, {"step": 6, "train_runtime": 30.0}]
    write_jsonl(second.folder / "log.jsonl", last)
    whole = outcome_of(trial, {})
    assert whole.tokens == 150 + 8 * 6 / 4, "the last two steps have no entry"
    assert whole.minutes == pytest.approx((60 + 20 * 6 / 4) / 60)
    assert outcome_of(trial, {"run1": "no luck", "e": "no luck"}).failure == "no luck"
    assert "holds no results" in str(outcome_of(Trial("mine", 42, (), first), {}).failure)
    with pytest.raises(UserError, match="holds no trials"):
        read_record(tmp_path / "record")


OUTCOMES = [
    TrialOutcome("a", 42, {"X": 10.0, "Y": 30.0}, 2e6, 4.0),
    TrialOutcome("a", 43, {"X": 20.0, "Y": 40.0}, 4e6, 6.0),
    TrialOutcome("b", 42, {"X": 50.0, "Y": 70.0}, 1e6, 1.0),
    TrialOutcome("b", 43, {}, failure="no luck; see b.log"),
    TrialOutcome("c", 42, {}, failure="no luck; see c.log"),
    TrialOutcome("d", None, {"X": 90.0, "Y": 50.0}),
]


def test_a_record_keeps_scores_along_the_last_stage_and_of_queries(tmp_path: Path) -> None:
    """And what is made of it is made of nothing else."""
    trials = []
    for recipe, lead in (("baseline", 0), ("mine", 1)):
        for seed in (1, 2):
            (run,) = chain(tmp_path / f"{recipe}{seed}", 8)
            write(run.folder / "run.json", {})
            write_jsonl(run.folder / "log.jsonl", [{"step": 8, "tokens": 1.0}, {"step": 8, "train_runtime": 6.0}])
            end = Run("e", "eval", (), tmp_path / f"{recipe}{seed}/e", run)
            early = Run("f", "eval", (), tmp_path / f"{recipe}{seed}/f", run)
            hits = {f"q{i}": {"d0": 1.0, "d1": 2.0 if i > 5 + lead * seed else 0.0} for i in range(12)}
            judged = {f"q{i}": {"d0": 1} for i in range(12)}
            value = statistics.fmean(ndcg_at_10(hits, judged).values())
            write_scores(end, {"MySet": 100 * value, "STS16": 10.0 + lead})
            write_scores(early, {"STS16": 9.0})
            write(end.folder / "predictions/model/revision/MySet_predictions.json", {"default": {"test": hits}})
            lines = [{"query-id": query, "corpus-id": "d0", "score": 1} for query in hits]
            write_jsonl(tmp_path / "qrels.jsonl", lines)
            trials.append(Trial(recipe, seed, (run,), end, {0: early, 4: early}, {"MySet": tmp_path / "qrels.jsonl"}))
    search = Table(["Recipe", "Fell at"], [["mine", None], ["other", "25 %"]], "Successive halving", "eval_loss")
    outcomes = write_record(tmp_path / "record", trials, {}, {}, {}, search)
    assert [outcome.failure for outcome in outcomes] == [None] * 4
    assert outcomes[0].along == {0: {"STS16": 9.0}, 4: {"STS16": 9.0}} and len(outcomes[0].queries["MySet"]) == 12
    table = difference_table(outcomes, {})
    assert table is not None
    (row,) = table.rows
    step = 100 * (1 - 1 / math.log2(3)) / 12  # one query more has its document first and not second
    assert row[:2] == ["mine", "2"] and row[2] == pytest.approx((1 + 1.5 * step) / 2, abs=1e-2)
    assert row[3] == pytest.approx(2 * (step / 2) / 2**0.5 / 2**0.5, abs=1e-2), "the two seeds differ by one query"
    assert row[4] == pytest.approx(1.5 * step, abs=1e-2) and row[5] < row[4] < row[6]  # type: ignore[operator]
    for name in ("first", "again"):
        write_comparison(tmp_path / name, *read_record(tmp_path / "record"))
    assert read_record(tmp_path / "record")[-1] == search
    assert "Successive halving" in (tmp_path / "first/comparison.md").read_text(encoding="utf-8")
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["along.png", "comparison.html", "comparison.json", "comparison.md"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("along", [(0, 50, 100), (0,)])
def test_the_end_of_a_curve_stands_at_the_last_step(along: tuple[int, ...]) -> None:
    """Also where it is no multiple of `save_steps`, and where no checkpoint lies before it."""
    outcome = TrialOutcome("mine", 42, {"X": 9.0}, along={step: {"X": float(step)} for step in along}, steps=128)
    picture = along_picture([outcome])
    assert picture is not None
    (line,) = picture.figure.axes[0].lines
    assert list(line.get_xdata()) == [*along, 128] and list(line.get_ydata()) == [*along, 9.0]


def test_the_table_by_hand() -> None:
    table = outcome_table(OUTCOMES)
    header, rows = table.header, table.rows
    assert header == ["Recipe", "X", "Y", "Mean of 2", "Lowest", "Highest", "Seeds", "Tokens, millions", "Minutes"]
    assert rows == [
        ["d", 90.0, 50.0, 70.0, None, None, None, None, None],
        ["b", 50.0, 70.0, 60.0, None, None, "1 of 2: failed", 1.0, 1.0],
        ["a", 15.0, 35.0, 25.0, 20.0, 30.0, "2", 3.0, 5.0],
        ["c", None, None, None, None, None, "0 of 1: failed", None, None],
    ]
    assert failure_lines(OUTCOMES) == ["b, seed 43: no luck; see b.log", "c, seed 42: no luck; see c.log"]
    table = outcome_table([TrialOutcome("a", 1, {"X": 1.0}), TrialOutcome("a", 2, {"X": 2.0})])
    header, rows = table.header, table.rows
    assert header[:4] == ["Recipe", "X", "Lowest", "Highest"] and rows[0][:4] == ["a", 1.5, 1.0, 2.0]


def test_recipes_without_a_common_task_have_no_mean() -> None:
    table = outcome_table([TrialOutcome("a", 1, {"X": 1.0}), TrialOutcome("b", 1, {"Y": 2.0})])
    header, rows = table.header, table.rows
    assert header == ["Recipe", "X", "Y", "Lowest", "Highest", "Seeds", "Tokens, millions", "Minutes"]
    assert [row[:3] for row in rows] == [["a", 1.0, None], ["b", None, 2.0]]


def test_what_was_not_trained_takes_no_task_out_of_the_mean() -> None:
    trained, words = TrialOutcome("a", 1, {"X": 1.0, "Y": 3.0}), TrialOutcome("bm25", None, {"X": 9.0})
    table = outcome_table([words, trained])
    assert table.header[:4] == ["Recipe", "X", "Y", "Mean of 2"]
    assert [row[:4] for row in table.rows] == [["a", 1.0, 3.0, 2.0], ["bm25", 9.0, None, None]]


def test_nothing_but_failures_is_a_table_too() -> None:
    table = outcome_table([TrialOutcome("a", 1, {}, failure="no")])
    header, rows = table.header, table.rows
    assert header[:2] == ["Recipe", "Lowest"] and rows[0][0] == "a"


def test_page_markdown_and_json(folder: Path) -> None:
    recipes = read_set(folder / "set").recipes
    page = write_comparison(folder / "out", OUTCOMES, own_keys(recipes), {"Base model": "tiny | small"})
    assert {file.name for file in (folder / "out").iterdir()} == {f"comparison.{e}" for e in ("html", "md", "json")}
    html, text = page.read_text(encoding="utf-8"), (folder / "out/comparison.md").read_text(encoding="utf-8")
    for said in ("no luck; see b.log", "two_stages_cold", "stage_I: alpha 0.5; then stage_II: loss_scale 50"):
        assert said in html and escape_markdown(said) in text
    assert "| b | 50.00 | 70.00 | 60.00 | - | - | 1 of 2: failed | 1.00 | 1.00 |" in text
    content = json.loads((folder / "out/comparison.json").read_text(encoding="utf-8"))
    assert [trial["recipe"] for trial in content["trials"]] == [outcome.recipe for outcome in OUTCOMES]
    assert content["facts"] == {"Base model": "tiny | small"}


# --- the script ---


def compare(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder / "set"), "--output_dir", str(folder / "out"), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipes", "three_stages"], "--recipes: there is no 'three_stages'; there are one_stage, two_stages"),
        (["--workers", "0"], "--workers is 0; give a number above 0."),
        (["--seeds", "1", "1"], "--seeds are 1 1; give each once."),
    ],
)
def test_wrong_options_are_one_sentence(folder: Path, options: list[str], said: str) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    with pytest.raises(UserError, match=f"^{said}"):
        main([str(folder / "set"), "--output_dir", str(folder / "out"), *options])


def test_two_comparisons_do_not_work_in_one_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    with (folder / "out/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        main = runpy.run_path(str(SCRIPT))["main"]
        with pytest.raises(UserError, match="another comparison, or a run of an earlier one, is at work here"):
            main([str(folder / "set"), "--output_dir", str(folder / "out")])
    assert not (folder / "out/configs").exists()


def test_a_run_that_outlives_its_comparison_keeps_others_out(folder: Path) -> None:
    """Killed, a comparison leaves its runs behind; another start would remove the folder that they write."""
    write(folder / "program.py", "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    options = [str(folder / "set"), "--output_dir", str(folder / "out"), "--recipes", "one_stage"]
    started = f"""
from llm2vec.commands.compare import main
from llm2vec.compare import execution
execution.PROGRAM = ({str(folder / "program.py")!r},)
main({options})
"""
    comparison = subprocess.Popen([sys.executable, "-c", started], stdout=subprocess.DEVNULL)
    pid = ""
    while comparison.poll() is None and not pid.endswith("\n"):
        time.sleep(0.1)
        pid = "".join(log.read_text() for log in (folder / "out").glob("logs/*.log"))
    comparison.kill()
    comparison.wait()
    try:
        with pytest.raises(UserError, match="a run of an earlier one, is at work here"):
            runpy.run_path(str(SCRIPT))["main"](options)
    finally:
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.slow
def test_two_recipes_from_end_to_end(folder: Path) -> None:
    """Trained and scored; nothing is done twice; a changed recipe and a failing one are seen."""
    chosen = ["--recipes", "one_stage", "two_stages", "--workers", "2"]
    ended = compare(folder, *chosen)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 trials of 2 recipes: 5 runs, 2 at a time" in ended.stdout
    content = json.loads((folder / "out/comparison.json").read_text(encoding="utf-8"))
    assert [(trial["recipe"], trial["failure"]) for trial in content["trials"]] == [
        ("one_stage", None),
        ("two_stages", None),
    ]
    assert all(0 <= trial["scores"]["MySet"] <= 100 and trial["minutes"] > 0 for trial in content["trials"])

    again = compare(folder, *chosen)
    assert again.returncode == 0 and again.stdout.count("is there already") == 5

    change(folder / "set/two_stages/2_stage_II.json", lora_r=4)
    write(folder / "library/one_stage/1_stage_II.json", {"template": "qwen2"})  # whose tokens the base does not have
    changed = compare(folder, *chosen)
    assert changed.returncode == 1
    assert changed.stdout.count("is there already") == 1, "Stage I"
    log = re.search(r"one_stage, seed 42: llm2vec stage-2 failed \((.+)\); see (\S+)", changed.stdout)
    assert log is not None and "<|im_start|>" in log[1]
    assert "<|im_start|>" in Path(log[2]).read_text(encoding="utf-8")
    assert re.search(r"^one_stage .* 0 of 1: failed", changed.stdout, re.MULTILINE)
    assert re.search(r"^two_stages .* 1 ", changed.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_search_from_end_to_end(searched: Path) -> None:
    """What falls is in the table, on the page and in the record; nothing is done twice."""
    options = ["--recipes", *[f"one_stage,stage_II.learning_rate={rate}" for rate in ("1e-05", "0.001")]]
    ended = compare(searched, *options, "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    scores, halving = map(json.loads, ended.stdout.splitlines())
    assert len(scores["rows"]) == 1 and [row["Fell at"] for row in halving["rows"]] == [None, "25 %"]
    assert "2 trials of 2 recipes: 2 runs" in ended.stderr and "1 trials of 1 recipes: 2 runs" in ended.stderr
    report.main([str(searched / "out/record"), "--output_dir", str(searched / "again")])
    for page in ("out/comparison.md", "again/comparison.md"):
        assert "Successive halving" in (searched / page).read_text(encoding="utf-8")
    again = compare(searched, *options)
    assert again.returncode == 0 and again.stdout.count("is there already") == 4
