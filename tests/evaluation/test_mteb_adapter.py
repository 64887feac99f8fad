"""The mteb adapter: which text carries which instruction, what is read from where, and when an old score is reused.

Real task objects of mteb run on a few rows each with a small deterministic model; nothing is fetched. One module,
because importing mteb takes seconds.
"""

from __future__ import annotations

import json
import logging
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import mteb
import pytest
import torch
from datasets import Dataset, DatasetDict
from eval_stubs import CALM, STORM, FakeModel, write_hub_layout, write_readme, write_retrieval
from helpers import write_jsonl
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from torch.utils.data import DataLoader

from llm2vec.evaluation import mteb_adapter
from llm2vec.evaluation.files import RETRIEVAL_FILES, load_instructions, parts_of, retrieval_set_of
from llm2vec.evaluation.mteb_adapter import LLM2VecEncoder
from llm2vec.evaluation.scores import evaluate, load_tasks
from llm2vec.model import chain
from llm2vec.model.chain import model_name, revision_of
from llm2vec.types import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments/mteb_eval_custom.py"
TABLE = ROOT / "test_configs/mteb/task_to_instructions.json"
INSTRUCTIONS: dict[str, str] = json.loads(TABLE.read_text(encoding="utf-8"))

# 20 of the benchmark's tasks have a successor, which mteb says at every run.
pytestmark = pytest.mark.filterwarnings("ignore:The task .* is superseded")


class LoggingEncoder(LLM2VecEncoder):
    """Keeps (task, prompt type, instructions the model saw, texts it saw, rows returned) of every call."""

    log: list[tuple[str, str | None, set[str], int, int]]

    def encode(self, inputs: DataLoader[Any], *, prompt_type: PromptType | None = None, **rest: Any) -> Any:  # type: ignore[override]
        vectors = super().encode(inputs, prompt_type=prompt_type, **rest)
        seen = self.model.calls[-1]
        self.log.append(
            (
                rest["task_metadata"].name,
                prompt_type and prompt_type.value,
                {instruction for instruction, _ in seen},
                len(seen),
                len(vectors),
            )
        )
        return vectors


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and no arrow files outside the test's own folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "output" / "stage_I"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def make_encoder(checkpoint: Path) -> Callable[..., LoggingEncoder]:
    def make(instructions: dict[str, str] = INSTRUCTIONS, **settings: Any) -> LoggingEncoder:
        encoder = LoggingEncoder(FakeModel(**settings), [checkpoint], instructions)  # type: ignore[arg-type]
        encoder.log = []
        return encoder

    return make


# --- tasks in memory: mteb's own objects, rows of ours ---


def retrieval_rows(ranked: bool = False) -> RetrievalSplitData:
    return RetrievalSplitData(
        corpus=Dataset.from_list(
            [
                {"id": "d1", "title": "", "text": CALM},
                {"id": "d2", "title": "Weather", "text": STORM},
                {"id": "d3", "title": "", "text": CALM},
            ]
        ),
        queries=Dataset.from_list([{"id": "q1", "text": "blue lake"}, {"id": "q2", "text": "thunder storm"}]),
        relevant_docs={"q1": {"d1": 1, "d3": 1}, "q2": {"d2": 1}},
        top_ranked={"q1": ["d1", "d2", "d3"], "q2": ["d1", "d2"]} if ranked else None,
    )


def pair_rows(label: str, values: list[Any]) -> DatasetDict:
    texts = [CALM, STORM, "a calm lake", "wind"]
    others = ["calm blue lake", "a quiet room", CALM, "rain and wind"]
    return DatasetDict({"test": Dataset.from_dict({"sentence1": texts, "sentence2": others, label: values})})


def labelled_rows() -> DatasetDict:
    rows = Dataset.from_dict(
        {
            "text": [f"{CALM} {letter}" for letter in "abcdefghi"] + [f"{STORM} {letter}" for letter in "abcdefghi"],
            "label": [0] * 9 + [1] * 9,
        }
    )
    return DatasetDict({"train": rows, "test": rows})


ROWS: dict[str, Callable[[], Any]] = {
    "STS12": lambda: pair_rows("score", [4.0, 1.0, 3.0, 5.0]),
    "TwitterURLCorpus": lambda: DatasetDict(
        {"test": Dataset.from_dict({k: [v] for k, v in pair_rows("labels", [1, 0, 1, 1])["test"].to_dict().items()})}
    ),
    "Banking77Classification": labelled_rows,
    "TwentyNewsgroupsClustering": lambda: DatasetDict(
        {
            "test": Dataset.from_list(
                [{"sentences": [CALM, "calm lake", STORM, "storm wind"], "labels": ["a", "a", "b", "b"]}]
            )
        }
    ),
    "SummEval": lambda: DatasetDict(
        {
            "test": Dataset.from_dict(
                {
                    "text": ["x", "y"],
                    "human_summaries": [[CALM, "blue water"], [STORM, "rain"]],
                    "machine_summaries": [["calm lake", STORM, "a"], ["storm wind", CALM, "b"]],
                    "relevance": [[5.0, 1.0, 2.0], [4.0, 1.0, 3.0]],
                }
            )
        }
    ),
    "AskUbuntuDupQuestions": lambda: {"default": {"test": retrieval_rows(ranked=True)}},
    "ArguAna": lambda: {"default": {"test": retrieval_rows()}},
    "MSMARCO": lambda: {"default": {"dev": retrieval_rows()}},
    "CQADupstackRetrieval": lambda: {"default": {"test": retrieval_rows()}},
    "SciFact": lambda: {"default": {"test": retrieval_rows()}},
}
SYMMETRIC = {"STS12", "TwitterURLCorpus", "Banking77Classification", "TwentyNewsgroupsClustering", "SummEval"}


def in_memory(name: str) -> AbsTask:
    task = mteb_adapter.find_task(name)
    for part in parts_of(task) or [task]:
        part.dataset = ROWS[name]()
        part.data_loaded = True
    return task


@pytest.fixture(scope="module")
def all_types(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoggingEncoder, dict[str, Any], Path]:
    """One run over all seven task types, an aggregate, a dev split and a task that the table leaves out."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "model.safetensors").write_bytes(b"weights")
    table = {name: text for name, text in INSTRUCTIONS.items() if name != "SciFact"}
    encoder = LoggingEncoder(FakeModel(), [folder], table)  # type: ignore[arg-type]
    encoder.log = []
    return encoder, evaluate(encoder, [in_memory(name) for name in ROWS], folder / "results"), folder / "results"


def test_every_side_of_every_task_type_gets_its_instruction(all_types: Any) -> None:
    encoder, scores, _ = all_types
    assert set(scores) == set(ROWS)
    assert isinstance(encoder, EncoderProtocol)
    logged = {name: [entry for entry in encoder.log if entry[0] == name] for name in {e[0] for e in encoder.log}}
    parts = {name for name in logged if name.startswith("CQADupstack")}
    assert len(parts) == 12 and set(logged) - parts == set(ROWS) - {"CQADupstackRetrieval"}
    for name, entries in logged.items():
        sides = {prompt_type: instructions for _, prompt_type, instructions, _, _ in entries}
        if name in SYMMETRIC:
            assert sides == {None: {INSTRUCTIONS[name]}}, name
        elif name == "SciFact":
            own = mteb.get_task(name).metadata.prompt["query"]  # type: ignore[index]
            assert sides == {"query": {f"{own}:"}, "document": {""}}
        else:
            assert sides == {"query": {INSTRUCTIONS[name]}, "document": {""}}, name


def test_every_side_takes_its_form(all_types: Any) -> None:
    """Documents of retrieval and reranking are written as documents, every other text as a query."""
    encoder, _, _ = all_types
    assert [prompt_type for _, prompt_type, *_ in encoder.log].count("document") > 1
    for (name, prompt_type, *_), side in zip(encoder.log, encoder.model.sides, strict=True):
        assert side == ("document" if prompt_type == "document" else "query"), name


def test_equal_texts_are_encoded_once_and_returned_each(all_types: Any) -> None:
    encoder, _, _ = all_types
    assert [entry[3:] for entry in encoder.log if entry[:2] == ("ArguAna", "document")] == [(2, 3)]


def test_scores_are_plain_numbers_with_their_metric_and_file(all_types: Any) -> None:
    _, scores, results = all_types
    assert scores["MSMARCO"]["scores"] == {"dev": {"default": 1.0}}
    assert scores["ArguAna"]["metric"] == "ndcg_at_10" and scores["ArguAna"]["main_score"] == 1.0
    assert scores["CQADupstackRetrieval"]["main_score"] == 1.0
    assert scores["Banking77Classification"]["main_score"] == 1.0
    assert {scores[name]["metric"] for name in ("STS12", "SummEval")} == {"cosine_spearman"}
    for name, score in scores.items():
        assert type(score["main_score"]) is float and Path(score["result_file"]).is_relative_to(results)
        kept = json.loads(Path(score["result_file"]).read_text())
        assert kept["task_name"] == name
    json.dumps(scores)


def test_a_second_run_reads_the_results_and_encodes_nothing(all_types: Any) -> None:
    encoder, scores, results = all_types
    calls = len(encoder.log)
    again = evaluate(encoder, [in_memory(name) for name in ("STS12", "CQADupstackRetrieval")], results)
    assert len(encoder.log) == calls
    assert again["STS12"] == scores["STS12"]


def test_a_keyword_without_effect_is_refused(make_encoder: Callable[..., LoggingEncoder]) -> None:
    metadata = mteb.get_task("STS12").metadata
    with pytest.raises(UserError, match="no precision"):
        make_encoder().encode(
            DataLoader([]),  # type: ignore[arg-type]
            task_metadata=metadata,
            hf_split="test",
            hf_subset="default",
            precision="int8",
        )


# --- instructions ---


def test_the_table_covers_the_benchmark_and_the_parts_of_its_aggregate() -> None:
    names = set()
    for task in mteb.get_benchmark(mteb_adapter.BENCHMARK).tasks:
        names |= {task.metadata.name, *(part.metadata.name for part in parts_of(task))}
    assert names == set(load_instructions(TABLE)) and len(names) == 56 + 12
    assert all(text.endswith(":") and text == text.strip() for text in INSTRUCTIONS.values())
    assert "notcounterfactual" in INSTRUCTIONS["AmazonCounterfactualClassification"]
    assert "a user utterance" in INSTRUCTIONS["MassiveScenarioClassification"]
    assert "intent domain" in INSTRUCTIONS["MTOPDomainClassification"]


def test_a_task_without_instruction_is_said_once(
    make_encoder: Callable[..., LoggingEncoder], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = make_encoder({})
    metadata = mteb.get_task("STSBenchmark").metadata
    with caplog.at_level(logging.WARNING):
        assert encoder.instruction(metadata, None) == "Retrieve semantically similar text:"
        encoder.instruction(metadata, None)
    assert [record.message for record in caplog.records if record.name == mteb_adapter.__name__] == [
        'No instruction is given for task STSBenchmark: using mteb\'s, "Retrieve semantically similar text:"'
    ]


@pytest.mark.parametrize("exported", [False, True])
def test_an_instruction_that_the_model_was_trained_with_is_missed(
    exported: bool, checkpoint: Path, make_encoder: Callable[..., LoggingEncoder], caplog: pytest.LogCaptureFixture
) -> None:
    instructions = [["Given a name, find its text", False], ["", True]]
    run = {"data": [{"source": "docs", "rows": 1, "file": "docs.jsonl", "instructions": instructions}]}
    (checkpoint / "run.json").write_text(json.dumps({"stages": [run]} if exported else run))
    metadata = mteb.get_task("NFCorpus").metadata
    said = (
        'instruction  NFCorpus is scored without one that output/stage_I was trained with (1, such as "Given a name, '
        'find its text"); give --task_to_instructions_fp'
    )
    for table, times in (({"NFCorpus": "mine:"}, 0), ({}, 1)):
        encoder = make_encoder(table)
        for _ in range(2):
            encoder.instruction(metadata, None)
        assert [record.message for record in caplog.records].count(said) == times


def test_instructions_of_the_default_table_that_are_not_those_of_training_are_said_once(
    checkpoint: Path, make_encoder: Callable[..., LoggingEncoder], caplog: pytest.LogCaptureFixture
) -> None:
    tasks = {"NFCorpus": "Given a question, find it:", "SciFact": "Given a claim, find it:", "STS12": ""}
    encoder = make_encoder(tasks)
    encoder.say_foreign(tasks)  # nothing is known of its training
    run = {"data": [{"source": "docs", "rows": 1, "file": "d", "instructions": [["Given a claim, find it", False]]}]}
    (checkpoint / "run.json").write_text(json.dumps(run))
    encoder = make_encoder(tasks)
    encoder.say_foreign(["SciFact", "STS12", "Unknown"])
    assert not caplog.records
    encoder.say_foreign(tasks)
    (said,) = caplog.messages
    assert said.startswith(
        "instruction: 1 of 3 tasks have one that output/stage_I was not trained with, such as NFCorpus"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{oops", "not valid JSON"),
        ("[1]", "a JSON object is needed"),
        ('{"STS12": 1}', "a string"),
    ],
)
def test_a_bad_table_is_a_sentence(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "table.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=said):
        load_instructions(file)


# --- revision and name ---


def test_the_revision_follows_all_that_decides_a_score(
    make_encoder: Callable[..., LoggingEncoder], checkpoint: Path
) -> None:
    def revision(*args: Any, **settings: Any) -> str:
        return make_encoder(*args, **settings).mteb_model_meta.revision  # type: ignore[return-value]

    first = revision()
    assert revision() == first
    (checkpoint / "run.json").write_text('{"files": {}}')
    assert revision() == first, "a date in run.json is no other model"
    seen = {first, revision(max_length=128), revision({**INSTRUCTIONS, "STS12": "Other:"})}
    half = FakeModel().to(torch.bfloat16)
    seen.add(LLM2VecEncoder(half, [checkpoint], INSTRUCTIONS).mteb_model_meta.revision)  # type: ignore[arg-type]
    for file, content in (("config.json", b"{ }"), ("model.safetensors", b"trained"), ("tokenizer.json", b"{}")):
        (checkpoint / file).write_bytes(content)
        seen.add(revision())
    assert len(seen) == 7


def test_a_model_of_the_hub_is_known_by_its_commit(
    make_encoder: Callable[..., LoggingEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert revision_of("org/never-loaded") == "org/never-loaded"
    cached = "/cache/models--org--name/snapshots/0123abc/config.json"
    monkeypatch.setattr(chain, "try_to_load_from_cache", lambda *_, **__: cached)
    assert revision_of("org/name") == "0123abc"


def test_a_directory_without_weights_is_refused(checkpoint: Path, make_encoder: Callable[..., LoggingEncoder]) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors weights"):
        make_encoder()


def test_names_say_what_was_loaded_and_are_safe_for_files(checkpoint: Path) -> None:
    assert model_name(["meta-llama/Llama-3.2-1B"]) == "meta-llama/Llama-3.2-1B"
    assert model_name(["gpt2"]) == "local/gpt2"
    assert model_name([str(checkpoint), "some/adapter one"]) == "output/stage_I+some-adapter_one"
    assert len(model_name(["a/b"] + ["c/" + "d" * 90] * 3)) < 200


# --- data of one's own ---


def test_tasks_of_mteb_are_read_from_local_copies(tmp_path: Path, make_encoder: Callable[..., LoggingEncoder]) -> None:
    write_jsonl(tmp_path / "hub/mteb/sts12-sts/test.jsonl", pair_rows("score", [4.0, 1.0, 3.0, 5.0])["test"].to_list())
    write_hub_layout(tmp_path / "hub/mteb/scifact")
    massive = tmp_path / "hub/mteb/amazon_massive_intent"
    for split, rows in labelled_rows().items():
        write_jsonl(massive / f"{split}.jsonl", rows.to_list())
    write_readme(massive, [("en", "train", "train.jsonl"), ("en", "test", "test.jsonl")])
    tasks = load_tasks(["STS12", "SciFact", "MassiveIntentClassification"], tmp_path / "hub")
    scores = evaluate(make_encoder(), tasks, tmp_path / "results")
    assert scores["MassiveIntentClassification"]["scores"] == {"test": {"en": 1.0}}
    assert scores["SciFact"]["main_score"] == 1.0 and list(scores["STS12"]["scores"]) == ["test"]
    kept = json.loads(Path(scores["SciFact"]["result_file"]).read_text())
    assert kept["dataset_revision"].startswith("local-"), "a copy does not claim to be the hub's revision"


def test_the_parts_of_an_aggregate_are_read_from_local_copies(
    tmp_path: Path, make_encoder: Callable[..., LoggingEncoder]
) -> None:
    hub = tmp_path / "hub"
    with pytest.raises(
        UserError, match=r"CQADupstackRetrieval needs data .*cqadupstack-english.*cqadupstack-wordpress"
    ):
        load_tasks(["CQADupstackRetrieval"], hub)
    for part in mteb.get_task("CQADupstackRetrieval").metadata.tasks:
        write_hub_layout(hub / part.metadata.dataset["path"])
    (task,) = load_tasks(["CQADupstackRetrieval"], hub)
    encoder = make_encoder()
    assert evaluate(encoder, [task], tmp_path / "results")["CQADupstackRetrieval"]["main_score"] == 1.0
    assert {name for name, *_ in encoder.log} == {part.metadata.name for part in parts_of(task)}
    assert not any(part.data_loaded for part in mteb.get_task("CQADupstackRetrieval").metadata.tasks)


@pytest.mark.parametrize("write", [write_retrieval, write_hub_layout])
def test_a_folder_is_a_retrieval_task_of_its_own(
    tmp_path: Path, make_encoder: Callable[..., LoggingEncoder], write: Callable[[Path], None]
) -> None:
    write(tmp_path / "eval/MySet")
    tasks = load_tasks(["MySet"], tmp_path / "eval")
    encoder = make_encoder({"MySet": "Find it:"})
    scores = evaluate(encoder, tasks, tmp_path / "results")
    assert scores["MySet"]["metric"] == "ndcg_at_10" and scores["MySet"]["scores"] == {"test": {"default": 1.0}}
    assert encoder.log == [("MySet", "query", {"Find it:"}, 1, 1), ("MySet", "document", {""}, 2, 2)]
    assert make_encoder({}).instruction(tasks[0].metadata, PromptType.query) == "Retrieve text based on user query:"


@pytest.mark.parametrize("write", [write_retrieval, write_hub_layout])
def test_other_data_under_an_old_name_is_scored_anew(
    tmp_path: Path, make_encoder: Callable[..., LoggingEncoder], write: Callable[[Path], None]
) -> None:
    """In the hub's layout, too, which `datasets` caches by a folder's last name."""

    def score() -> tuple[float, int]:
        encoder = make_encoder()
        tasks = load_tasks(["MySet"], tmp_path / "eval")
        return evaluate(encoder, tasks, tmp_path / "results")["MySet"]["main_score"], len(encoder.log)

    write(tmp_path / "eval/MySet")
    assert score() == (1.0, 2)
    assert score() == (1.0, 0)
    write_jsonl(tmp_path / "eval/MySet/qrels/test.jsonl", [{"query-id": "q1", "corpus-id": "2", "score": 1}])
    changed, calls = score()
    assert changed < 1.0 and calls == 2
    (result,) = (tmp_path / "results").rglob("MySet.json")
    result.write_text(result.read_text()[:50])
    assert score() == (changed, 2), "a result that was cut short is made anew"


def test_every_model_is_given_the_same_samples(tmp_path: Path, make_encoder: Callable[..., LoggingEncoder]) -> None:
    """A task keeps its random generator: without a reset, the second model would be scored on other rows."""
    task = mteb.get_task("TwentyNewsgroupsClustering.v2")
    rows = [
        {"sentences": f"{CALM if i % 3 else STORM} {chr(97 + i % 26) * (i % 7)}", "labels": i % 3} for i in range(60)
    ]
    task.dataset = DatasetDict({"test": Dataset.from_list(rows)})
    task.data_loaded = True
    task.max_document_to_embed, task.max_fraction_of_documents_to_embed = 30, None  # type: ignore[attr-defined]
    scores = [
        evaluate(make_encoder(max_length=length), [task], tmp_path / "results")[task.metadata.name]["main_score"]
        for length in (64, 65)
    ]
    assert len(set(scores)) == 1


def bad_sets() -> Iterator[tuple[str, str, str]]:
    yield "corpus.jsonl", '{"_id": "1"}\n', r"corpus\.jsonl, line 1: text is missing"
    yield "queries.jsonl", '{"_id": "q1", "text": "a"}\n{', r"queries\.jsonl, line 2: not valid JSON"
    yield "queries.jsonl", '{"_id": "q9", "text": "a"}\n', "2 documents and 0 judged queries"
    yield (
        "corpus.jsonl",
        '{"_id": 1, "text": "a"}\n\n{"_id": 2, "text": null}\n',
        r"line 3: text is None; a string is needed",
    )
    yield "corpus.jsonl", '{"_id": 1, "text": "a", "title": 5}\n', r"line 1: title is 5; a string or null is needed"
    yield "corpus.jsonl", '{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n', r"line 2: the _id '1' is there twice"
    yield (
        "queries.jsonl",
        '{"_id": "q1", "text": ["a"]}\n',
        r"queries\.jsonl, line 1: text is \['a'\]; a string is needed",
    )
    for score in ("0.5", '"high"', "null", "NaN", "1e999", "2147483648", "-1e19"):  # of the last, trec_eval dies
        line = f'{{"query-id": "q1", "corpus-id": "1", "score": {score}}}\n'
        yield "qrels/test.jsonl", line, r"qrels/test\.jsonl, line 1: `score` must be a whole number, not "
    line = '{"query-id": "\\ud800", "corpus-id": "1", "score": 1}\n'
    yield "qrels/test.jsonl", line, "line 1: `query-id` holds half a surrogate pair"
    line = '{"query-id": "q1", "corpus-id": "1", "score": 0}\n'
    yield "qrels/test.jsonl", line, "no query with a relevant document: no score is above 0"


@pytest.mark.parametrize(("file", "content", "said"), bad_sets())
def test_a_bad_retrieval_set_is_a_sentence(tmp_path: Path, file: str, content: str, said: str) -> None:
    write_retrieval(tmp_path / "MySet")
    (tmp_path / "MySet" / file).write_text(content)
    with pytest.raises(UserError, match=said):
        load_tasks(["MySet"], tmp_path)


def test_blank_lines_and_other_spellings_of_a_whole_number_are_read(tmp_path: Path) -> None:
    write_retrieval(tmp_path / "MySet")
    for name in RETRIEVAL_FILES:
        file = tmp_path / "MySet" / name
        file.write_text(f"\n{file.read_text()}  \n\n".replace('"score": 1', '"score": 1.0'))
    found = retrieval_set_of(tmp_path / "MySet")
    assert found.relevant == {"q1": {"1": 1}} and len(found.corpus) == 2 and len(found.queries) == 1
    assert {type(row[key]) for row in found.corpus for key in ("id", "title", "text")} == {str}


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl"])
@pytest.mark.parametrize("key", ["_id", "text"])
def test_what_no_tokenizer_can_read_is_named_by_its_line(tmp_path: Path, file: str, key: str) -> None:
    write_retrieval(tmp_path / "MySet")
    row = json.dumps({"_id": "new", "text": "new", key: "a \ud83d b"})
    (tmp_path / "MySet" / file).write_text(f"{row}\n")
    with pytest.raises(UserError, match=rf"{file}, line 1: `{key}` holds half a surrogate pair"):
        retrieval_set_of(tmp_path / "MySet")


def test_an_incomplete_retrieval_set_names_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "MySet").mkdir()
    with pytest.raises(UserError, match=r"lacks corpus\.jsonl, queries\.jsonl, qrels/test\.jsonl"):
        load_tasks(["MySet"], tmp_path)


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"knows no task SciFacts \(nearest: SciFact"):
        load_tasks(["SciFacts"])
    with pytest.raises(UserError, match="nearest: subset15"):
        load_tasks(["subset51"])
    with pytest.raises(UserError, match=r"nearest: MTEB\(eng, v"):
        load_tasks(["MTEB(eng v2)"])
    with pytest.raises(UserError, match=f"no folder {tmp_path}/SciFacts"):
        load_tasks(["SciFacts"], tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(UserError, match="no folder"):
        load_tasks(["a/b"], tmp_path)


def test_an_unreachable_hub_names_the_data_and_the_way_out() -> None:
    with pytest.raises(UserError, match=r"SciFact: .* mteb/scifact .*<local_data_dir>/mteb/scifact"):
        load_tasks(["SciFact"])


# --- the script ---


def run_script(flags: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The script in this process, as it is started."""
    words = [str(SCRIPT), *(str(word) for pair in flags.items() for word in pair)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_prints_the_table(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {}

    def from_pretrained(base: str, **options: Any) -> FakeModel:
        given.update(options, base=base)
        return FakeModel()

    monkeypatch.setattr("llm2vec.llm2vec.LLM2Vec.from_pretrained", from_pretrained)
    write_retrieval(tmp_path / "eval/MySet")
    flags = {
        "--base_model_name_or_path": checkpoint,
        "--task_name": "MySet",
        "--task_to_instructions_fp": TABLE,
        "--local_data_dir": tmp_path / "eval",
        "--output_dir": tmp_path / "results",
        "--max_length": 128,
    }
    run_script(flags, monkeypatch)
    printed = capsys.readouterr().out
    assert "MySet, ndcg_at_10 x100" in printed and "default       100.00" in printed
    assert Path(printed.strip().splitlines()[-1].removeprefix("Results: ")).is_file()
    assert given["base"] == str(checkpoint) and given["max_length"] == 128 and given["torch_dtype"] == "bfloat16"
    assert given["peft_model_name_or_path"] is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--base_model_name_or_path": "no/such/model"}, "no model directory no/such/model"),
        ({"--peft_model_name_or_path": "./adapter"}, "no model directory ./adapter"),
        ({"--task_to_instructions_fp": "no.json"}, "no file of instructions no.json"),
        ({"--local_data_dir": "no/data"}, "no directory of local data no/data"),
        ({"--task_name": "STS12x"}, "nearest: STS12"),
        ({"--task_to_instructions_fp": __file__}, "not valid JSON"),
    ],
)
def test_the_script_ends_with_one_sentence(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, str],
    said: str,
) -> None:
    flags = {
        "--base_model_name_or_path": str(checkpoint),
        "--task_name": "STS12",
        "--task_to_instructions_fp": str(TABLE),
        "--output_dir": str(tmp_path / "results"),
        **changed,
    }
    with pytest.raises(SystemExit) as ended:
        run_script(flags, monkeypatch)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and said in printed.err and printed.err.count("\n") == 1
    assert not printed.out and not (tmp_path / "results").exists()
