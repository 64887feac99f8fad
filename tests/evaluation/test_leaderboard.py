"""What the leaderboard needs: a table of instructions for each benchmark, what was trained on, results it can take."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from pathlib import Path
from typing import Any

import mteb
import pytest
from datasets import Dataset, DatasetDict
from eval_stubs import CALM, STORM, FakeModel, evaluated, make_sentence_transformer, write_hub_layout
from helpers import write_jsonl

from llm2vec.commands.evaluate import main
from llm2vec.evaluation.files import parts_of
from llm2vec.evaluation.jobs import Request
from llm2vec.evaluation.models import load_encoder
from llm2vec.evaluation.mteb_adapter import LLM2VecEncoder, benchmark_tasks, find_task
from llm2vec.evaluation.provenance import TRAINING_SETS
from llm2vec.evaluation.run import evaluate_all, expand
from llm2vec.types import UserError

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "test_configs/mteb"
ROWS = re.findall(
    r"^\| \[\S+\]\((\S+\.json)\) \| (.+?) \| (\d+)", (TABLES / "README.md").read_text("utf-8"), re.MULTILINE
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"

pytestmark = pytest.mark.filterwarnings("ignore:The task .* is superseded")


def table_of(file: str) -> dict[str, str]:
    table: dict[str, str] = json.loads((TABLES / file).read_text(encoding="utf-8"))
    return table


# --- instructions ---


@pytest.mark.parametrize(("file", "benchmark", "number"), ROWS, ids=[row[0] for row in ROWS])
def test_a_table_covers_its_benchmark_and_nothing_else(file: str, benchmark: str, number: str) -> None:
    names = benchmark_tasks(benchmark)
    assert names is not None and len(names) == int(number)
    parts = [part.metadata.name for name in names for part in parts_of(find_task(name, benchmark=benchmark))]
    assert set(table_of(file)) == {*names, *parts}


def test_every_table_is_listed_and_a_task_has_one_instruction() -> None:
    assert {row[0] for row in ROWS} == {file.name for file in TABLES.glob("*.json")} and len(ROWS) == 7
    first: dict[str, str] = {}
    for file, *_ in ROWS:
        for task, instruction in table_of(file).items():
            assert instruction == first.setdefault(task, instruction), (file, task)
            assert re.fullmatch(r"\S.*[^\s.:]:", instruction), (file, task)


# --- training data ---


def test_every_source_has_its_sets_by_mtebs_names() -> None:
    known = json.loads(TRAINING_SETS.read_text(encoding="utf-8"))
    sources = [json.loads(file.read_text()) for file in (ROOT / "llm2vec/data").glob("*_sources.json")]
    assert set(known) == set().union(*sources)
    for task in {name for names in known.values() for name in names}:
        assert mteb.get_task(task).metadata.name == task
    assert {"MSMARCO", "NQ", "FEVER", "HotpotQA", "QuoraRetrieval"} <= set().union(*known.values())


def trained_on(folder: Path, *sources: str) -> None:
    """Write the record of a run."""
    data = [{"source": name, "rows": 2, "file": f"{name}.jsonl"} for name in sources]
    (folder / "run.json").write_text(json.dumps({"config": {"stage": "stage_II"}, "data": data}))


def test_tasks_of_the_training_data_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that mteb derives from a set; none is, where the run has other data or no record."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    for name in ("FEVERHardNegatives", "ArguAna"):
        write_hub_layout(tmp_path / "data" / find_task(name).metadata.dataset["path"])
    request = Request(
        evaluated("not loaded"),
        expand(["FEVERHardNegatives", "ArguAna"]),
        str(tmp_path / "out"),
        str(tmp_path / "data"),
    )
    for sources, said in ((("fever", "mine"), True), (("mine",), False), ((), False)):
        trained_on(tmp_path / "model", *sources)
        encoder = LLM2VecEncoder(FakeModel(), [tmp_path / "model"], {})  # type: ignore[arg-type]
        assert encoder.mteb_model_meta.training_datasets == ({"FEVER"} if said else set() if sources else None)
        monkeypatch.setattr("llm2vec.evaluation.run.load_encoder", lambda _, encoder=encoder: encoder)
        caplog.clear()
        with caplog.at_level(logging.INFO, "llm2vec"):
            evaluate_all(request)
        assert ("1 of 2 tasks are of sets that" in caplog.text) == said
        assert ("not zero-shot (FEVERHardNegatives)" in caplog.text) == said


# --- submission ---


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = make_sentence_transformer(tmp_path)
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prompts": {"STS12": "alike: "}}))
    (folder / "llm2vec_config.json").write_text("{}")  # one of ours: else it would be run by us
    data = [{"source": "msmarco_passage", "rows": 2, "file": "msmarco_passage.jsonl"}]
    first = {"config": {"stage": "stage_I"}, "data": data, "parent": {"model_name_or_path": "meta-llama/Llama-3.2-1B"}}
    (folder / "run.json").write_text(json.dumps({"stages": [first, {"config": {"stage": "stage_II"}, "data": data}]}))
    return folder


def test_a_dry_submission(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """mteb's own loader reads the results, its own command commits them, and the draft is Python that says the same."""
    rows = {"sentence1": [CALM, STORM, "x"], "sentence2": ["calm blue lake", "a room", "y"], "score": [4.0, 1.0, 2.0]}

    def load_data(self: Any, num_proc: int | None = None, **kwargs: Any) -> None:
        self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_dict(rows)), True

    monkeypatch.setattr(type(mteb.get_task("STS12")), "load_data", load_data)
    monkeypatch.setattr(type(mteb.get_task("STS13")), "load_data", load_data)
    words = ["--model", str(exported), "--tasks", "STS12", "STS13", "--output_dir", str(tmp_path / "out")]
    with caplog.at_level(logging.INFO, "llm2vec"):
        main([*words, "--submission", f"me/anchor-1b@{COMMIT}", "--device", "cpu"])
    assert "by sentence-transformers, with its own prompts" in caplog.text
    assert "prompts: the export has none for 1 tasks, such as STS13" in caplog.text
    cache = mteb.ResultCache(tmp_path / "out/submission")
    (found,) = cache.load_results(models=["me/anchor-1b"], include_remote=False).model_results
    assert found.model_name == "me/anchor-1b" and found.model_revision == COMMIT
    made = json.loads(next((tmp_path / "out/results").rglob("STS12.json")).read_text())
    scores = {result.task_name: result.get_score() for result in found.task_results}
    assert set(scores) == {"STS12", "STS13"} and scores["STS12"] == made["scores"]["test"][0]["main_score"]
    assert {result.dataset_revision for result in found.task_results} == {
        mteb.get_task(name).metadata.revision for name in scores
    }
    # As `submit_results` does, but that the repository of results is an empty one here.
    remote = cache.remote_repo_path
    remote.mkdir()
    person = [part for key in ("name", "email") for part in ("-c", f"user.{key}=me")]
    for command in (["init", "-q"], [*person, "commit", "-q", "--allow-empty", "-m", "empty"]):
        subprocess.run(["git", *command], cwd=remote, check=True)
    for key in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{key}_NAME", "me")
        monkeypatch.setenv(f"GIT_{key}_EMAIL", "me@example.org")
    monkeypatch.setattr(mteb.ResultCache, "download_from_remote", lambda self: None)
    submitted = cache.submit_results("me/anchor-1b")
    assert submitted["status"] == "ready_for_submission" and submitted["result_count"] == 2
    shown = subprocess.run(
        ["git", "show", "--name-only", "--format="], cwd=remote, check=True, capture_output=True, text=True
    )
    files = {"STS12.json", "STS13.json", "model_meta.json", "run_settings.jsonl"}
    assert set(shown.stdout.split()) == {f"results/me__anchor-1b/{COMMIT}/{name}" for name in files}
    names: dict[str, Any] = {}
    exec((tmp_path / "out/submission/anchor_1b.py").read_text(), names)
    entry = names["anchor_1b"]
    assert (entry.name, entry.revision, entry.adapted_from) == ("me/anchor-1b", COMMIT, "meta-llama/Llama-3.2-1B")
    assert entry.get_training_datasets() >= {"MSMARCO", "NanoMSMARCORetrieval"} and entry.public_training_data is True
    assert entry.openness == {
        "open weights": True, "open license": False, "open training code": False, "open training data": True,
        "paper": False, "model card": True,
    }  # fmt: skip
    assert entry.n_parameters and entry.embed_dim == 32 and entry.max_tokens == 64 and entry.use_instructions
    assert "To fill in: license, languages, release_date, public_training_code, citation." in entry_text(tmp_path)
    assert entry.is_zero_shot_on(["STS12"]) and not entry.is_zero_shot_on(["NanoMSMARCORetrieval"])


def entry_text(folder: Path) -> str:
    return (folder / "out/submission/anchor_1b.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--submission", "anchor-1b"], "give ORG/NAME@COMMIT"),
        (["--submission", f"me/x@{COMMIT}", "--max_length", "9"], "--max_length cannot stand beside --submission"),
        (["--submission", f"me/x@{COMMIT}", "--local_data_dir", "."], "--local_data_dir cannot stand beside"),
        (["--submission", f"me/x@{COMMIT}"], "export it with its table of instructions"),
    ],
)
def test_what_the_leaderboard_could_not_repeat_is_refused(words: list[str], reason: str, tmp_path: Path) -> None:
    """A training output has no form that mteb loads, and flags of ours would be lost on the way."""
    write_jsonl(tmp_path / "model/corpus.jsonl", [])
    with pytest.raises(UserError, match=re.escape(reason)):
        main(["--model", str(tmp_path / "model"), "--task_name", "STS12", *words])


def test_an_export_is_run_by_us_unless_it_is_submitted(exported: Path) -> None:
    encoder = load_encoder(evaluated(str(exported), as_published=True, device="cpu"))
    assert encoder.mteb_model_meta.framework[0] == "Sentence Transformers"
