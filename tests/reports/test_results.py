"""Reading result folders as mteb writes them, and predictions to scores of single queries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from llm2vec.reports.results import PARTS, ndcg_at_10, read_query_scores, read_results
from llm2vec.types import UserError

ENGLISH = {"STS17": "en-en", **dict.fromkeys(("STS22", "MTOPDomainClassification", "MTOPIntentClassification"), "en")}
ENGLISH |= dict.fromkeys(("MassiveIntentClassification", "MassiveScenarioClassification"), "en")
ENGLISH |= dict.fromkeys(("AmazonCounterfactualClassification", "AmazonReviewsClassification"), "en")


def result(task: str, splits: Mapping[str, Mapping[str, float]], data: str = "d1") -> str:
    """A result file's text; scores are fractions."""
    entries = {
        split: [
            {"main_score": score, "hf_subset": subset, "languages": ["eng-Latn"]} for subset, score in subsets.items()
        ]
        for split, subsets in splits.items()
    }
    return json.dumps({"dataset_revision": data, "task_name": task, "mteb_version": "2.26.24", "scores": entries})


def write_results(root: Path, scores: Mapping[str, float], name: str = "org__model", revision: str = "rev1") -> Path:
    """A folder as the evaluation leaves it, from scores x 100; returns the folder of the revision."""
    folder = root / "results" / name / revision
    folder.mkdir(parents=True)
    (folder / "model_meta.json").write_text('{"name": "org/model"}')
    (folder / "run_settings.jsonl").write_text("{}\n")
    for task, score in scores.items():
        split, subset = "dev" if task == "MSMARCO" else "test", ENGLISH.get(task, "default")
        (folder / f"{task}.json").write_text(result(task, {split: {subset: score / 100}}))
    return folder


def test_a_run_is_found_from_any_of_its_folders(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"NFCorpus": 31.25, "SICK-R": 70.5})
    for start in (tmp_path, tmp_path / "results", folder.parent, folder):
        results = read_results(start)
        assert results.scores == {"NFCorpus": pytest.approx(31.25), "SICK-R": pytest.approx(70.5)}
        assert (results.model, results.revision, results.folder) == ("org/model", "rev1", folder.resolve())
        assert results.data_revisions == {"NFCorpus": "d1", "SICK-R": "d1"} and results.mteb_versions == ("2.26.24",)
        assert results.problems == {}


def test_several_revisions_or_models_are_listed_not_mixed(tmp_path: Path) -> None:
    write_results(tmp_path, {"NFCorpus": 31.0}, revision="rev1")
    write_results(tmp_path, {"NFCorpus": 32.0, "SciFact": 70.0}, revision="rev2")
    with pytest.raises(
        UserError, match=r"2 models or revisions; name one of them: .*rev1 \(1 tasks\); .*rev2 \(2 tasks\)"
    ):
        read_results(tmp_path)
    assert read_results(tmp_path / "results" / "org__model" / "rev2").scores["NFCorpus"] == pytest.approx(32)
    write_results(tmp_path, {"NFCorpus": 33.0}, name="org__other")
    with pytest.raises(UserError, match="3 models or revisions"):
        read_results(tmp_path)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results folder .*nowhere"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds no results; expected <Task>"):
        read_results(tmp_path)


def test_a_truncated_file_is_said_and_missing(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"NFCorpus": 31.0, "SciFact": 70.0, "FEVER": 80.0, "STS12": 60.0, "STS13": 61.0})
    (folder / "FEVER.json").write_text((folder / "FEVER.json").read_text()[:70])
    (folder / "STS12.json").write_text("")
    (folder / "STS13.json").write_text('{"scores": [1]}')
    (folder / "SciFact.json").write_text(result("SciFact", {"test": {"default": 70.0}}))
    results = read_results(tmp_path)
    assert list(results.scores) == ["NFCorpus"] == list(results.data_revisions)
    assert results.problems["FEVER"] == "FEVER.json is cut off or is not valid JSON"
    assert results.problems["STS12"] == "STS12.json is cut off or is not valid JSON"
    assert results.problems["STS13"].startswith("STS13.json is not a result of mteb")
    assert results.problems["SciFact"] == "SciFact.json has a main_score that is not a fraction from -1 to 1: 70.0"


def test_nan_is_no_score(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"NFCorpus": 31.0})
    (folder / "STS12.json").write_text(result("STS12", {"test": {"default": math.nan}}))
    assert "not a fraction" in read_results(tmp_path).problems["STS12"]


def test_the_split_and_the_subset_of_the_benchmark_count(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {})
    files: dict[str, dict[str, dict[str, float]]] = {
        "MSMARCO": {"test": {"default": 0.7}, "dev": {"default": 0.4}},
        "STS17": {"test": {"en-en": 0.9, "en-ar": 0.1}},
        "AmazonCounterfactualClassification": {"test": {"en": 0.8, "en-ext": 0.2}, "validation": {"en": 0.1}},
        "Own": {"first": {"a": 0.1, "b": 0.3}, "second": {"a": 0.5, "b": 0.7}},
        "Touche2020": {"test": {}},
        "STS22": {"test": {"de": 0.5}},
    }
    for task, splits in files.items():
        (folder / f"{task}.json").write_text(result(task, splits))
    results = read_results(tmp_path)
    expected = {"MSMARCO": 40, "STS17": 90, "AmazonCounterfactualClassification": 80, "Own": 40}
    assert results.scores == {task: pytest.approx(score) for task, score in expected.items()}
    assert results.problems == {
        "Touche2020": "Touche2020.json has no score of the split test",
        "STS22": "STS22.json has no score of the split test in en",
    }
    (folder / "MSMARCO.json").write_text(result("MSMARCO", {"test": {"default": 0.7}}))
    assert read_results(tmp_path).problems["MSMARCO"] == "MSMARCO.json has no score of the split dev"


def test_cqadupstack_counts_once(tmp_path: Path) -> None:
    parts = {part: 30.0 + i for i, part in enumerate(PARTS)}
    assert len(PARTS) == 12
    write_results(tmp_path / "parts", parts)
    assert read_results(tmp_path / "parts").scores == {"CQADupstackRetrieval": pytest.approx(35.5)}
    write_results(tmp_path / "both", {**parts, "CQADupstackRetrieval": 35.4})
    assert read_results(tmp_path / "both").scores == {"CQADupstackRetrieval": pytest.approx(35.4)}
    data = [read_results(tmp_path / name).data_revisions for name in ("parts", "both")]
    assert data[0] == data[1] == {"CQADupstackRetrieval": "+".join(["d1"] * 12)}, "the same data, with and without it"
    write_results(tmp_path / "some", {part: parts[part] for part in PARTS[:10]})
    results = read_results(tmp_path / "some")
    missing = "parts without a score: CQADupstackWebmastersRetrieval, CQADupstackWordpressRetrieval"
    assert results.scores == {} and results.problems == {"CQADupstackRetrieval": missing}


def test_a_broken_aggregate_is_made_of_its_parts(tmp_path: Path) -> None:
    folder = write_results(tmp_path, dict.fromkeys(PARTS, 30.0))
    (folder / "CQADupstackRetrieval.json").write_text("{")
    results = read_results(tmp_path)
    assert results.scores == {"CQADupstackRetrieval": pytest.approx(30)} and results.problems == {}
    (folder / f"{PARTS[0]}.json").write_text("{")
    problem = read_results(tmp_path).problems["CQADupstackRetrieval"]
    assert "CQADupstackRetrieval.json is cut off" in problem and f"{PARTS[0]}.json is cut off" in problem


def ndcg(ranking: Mapping[str, float], relevant: Mapping[str, int]) -> float:
    return ndcg_at_10({"q": ranking, "not judged": {"a": 1.0}}, {"q": relevant, "not ranked": {"a": 1}})["q"]


def test_ndcg_by_hand() -> None:
    ranking = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1}
    gain, ideal = 2 / math.log2(3) + 1 / math.log2(5), 2 + 1 / math.log2(3)
    assert ndcg(ranking, {"b": 2, "d": 1, "a": 0}) == pytest.approx(gain / ideal)
    assert ndcg({}, {"b": 1}) == 0 == ndcg(ranking, {"z": 1})
    assert ndcg({"a": 0.5, "b": 0.5}, {"b": 1}) == 1  # of equal scores, the later id comes first
    assert ndcg({f"{i:02}": -i for i in range(11)}, {"10": 1}) == 0  # eleventh
    many = {f"{i:02}": 1 for i in range(30)}
    assert ndcg(dict.fromkeys(many, 0.5), many) == pytest.approx(1)


def test_ndcg_equals_a_plain_loop() -> None:
    """Ties, grades below 0, ids of several scripts: to 1e-9, for scores that 32 bits can hold."""
    rng = np.random.default_rng(0)
    rankings: dict[str, dict[str, float]] = {}
    relevant: dict[str, dict[str, int]] = {}
    for query in map(str, range(300)):
        documents = [f"{rng.choice(['d', 'é', '東'])}{i}" for i in range(rng.integers(1, 30))]
        rankings[query] = {document: float(rng.integers(0, 4)) / 4 for document in documents}
        relevant[query] = {document: int(rng.integers(-1, 4)) for document in documents[::3]} | {"z": 1}
    for query, found in ndcg_at_10(rankings, relevant).items():
        grades = relevant[query]
        top = sorted(rankings[query], key=lambda document: (rankings[query][document], document), reverse=True)
        gains = [max(grades.get(document, 0), 0) / math.log2(rank + 2) for rank, document in enumerate(top[:10])]
        best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:10]
        assert found == pytest.approx(sum(gains) / sum(g / math.log2(r + 2) for r, g in enumerate(best)), abs=1e-9)


def keep_predictions(folder: Path, task: str, rankings: Mapping[str, Mapping[str, float]]) -> None:
    content = {"mteb_model_meta": {"model_name": "m"}, "default": {"test": rankings}}
    (folder / f"{task}_predictions.json").write_text(json.dumps(content))


def write_qrels(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    lines = [json.dumps({"query-id": q, "corpus-id": d, "score": s}) for q, d, s in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_scores_of_single_queries(tmp_path: Path) -> None:
    keep_predictions(tmp_path, "Docs", {"q1": {"a": 2, "b": 1}, "q2": {"a": 2, "b": 1}, "q3": {"a": 1}})
    qrels = write_qrels(tmp_path / "test.jsonl", [("q1", "a", 1), ("q2", "b", 1), ("q3", "a", 0)])
    second = 100 / math.log2(3)
    scores = read_query_scores(tmp_path, "Docs", qrels, (100 + second) / 2)
    assert scores == {"q1": pytest.approx(100), "q2": pytest.approx(second)}  # q3 has nothing relevant
    with pytest.raises(UserError, match=r"over 2 queries, nDCG@10 of Docs is 81\.546 .* says 50\.000"):
        read_query_scores(tmp_path, "Docs", qrels, 50)


def test_a_document_that_is_the_query_is_left_out_where_mteb_does(tmp_path: Path) -> None:
    rankings = {"q": {"q": 3.0, "a": 2.0}}
    qrels = write_qrels(tmp_path / "qrels.jsonl", [("q", "a", 1)])
    keep_predictions(tmp_path, "ArguAna", rankings)
    keep_predictions(tmp_path, "SciFact", rankings)
    assert read_query_scores(tmp_path, "ArguAna", qrels, 100) == {"q": pytest.approx(100)}
    assert read_query_scores(tmp_path, "SciFact", qrels, 100 / math.log2(3)) == {"q": pytest.approx(100 / math.log2(3))}


def test_missing_and_broken_predictions_and_judgements_are_named(tmp_path: Path) -> None:
    qrels = write_qrels(tmp_path / "qrels.jsonl", [("q", "a", 1)])
    with pytest.raises(UserError, match=r"no predictions .*Docs_predictions\.json; evaluate Docs with"):
        read_query_scores(tmp_path, "Docs", qrels, 1)
    (tmp_path / "Docs_predictions.json").write_text('{"default": {"test"')
    with pytest.raises(UserError, match="expected rankings of one subset and one split, found 0"):
        read_query_scores(tmp_path, "Docs", qrels, 1)
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        read_query_scores(tmp_path, "Docs", tmp_path / "none.jsonl", 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"query-id": "q"\n', r"q\.jsonl, line 1: not valid JSON"),
        (b'\n{"query-id": "q", "corpus-id": "a", "score": 1.7}\n', r"line 2: `score` must be a whole number, .* 1\.7"),
        (b'{"query-id": "q", "corpus-id": "a", "score": 1}\n{"query-id": "q"}\n', "line 2: corpus-id is missing"),
    ],
)
def test_a_wrong_judgement_is_named_by_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_query_scores(tmp_path, "Docs", tmp_path / "q.jsonl", 1)


def test_predictions_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    qrels = write_qrels(tmp_path / "qrels.jsonl", [("q", "a", 1)])
    for ranking in (["a"], {"a": "high"}, None):
        (tmp_path / "Docs_predictions.json").write_text(json.dumps({"default": {"test": {"q": ranking}}}))
        with pytest.raises(UserError, match="expected a score for each document of the query 'q'"):
            read_query_scores(tmp_path, "Docs", qrels, 1)
