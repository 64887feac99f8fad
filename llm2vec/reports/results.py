"""Reading what mteb wrote: result folders to main scores, and kept predictions to scores of single queries.

A run's results are `results/<model>/<revision>/<Task>.json` below the output directory of the evaluation. Of tasks
with several splits or languages, those of MTEB(eng, v1) count: test (MSMARCO: dev) and English. All scores are x 100.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec.evaluation.files import read_judgements
from llm2vec.files import read_object
from llm2vec.types import UserError, needs_extra

AGGREGATE = "CQADupstackRetrieval"
_FORUMS = "Android English Gaming Gis Mathematica Physics Programmers Stats Tex Unix Webmasters Wordpress"
#: The 12 tasks whose mean is CQADupstackRetrieval.
PARTS = tuple(f"CQADupstack{forum}Retrieval" for forum in _FORUMS.split())

#: Tasks of MTEB(eng, v1) that come in several languages, and the subset that counts.
_ENGLISH = {
    "AmazonCounterfactualClassification": "en", "AmazonReviewsClassification": "en", "MTOPDomainClassification": "en",
    "MTOPIntentClassification": "en", "MassiveIntentClassification": "en", "MassiveScenarioClassification": "en",
    "STS17": "en-en", "STS22": "en",
}  # fmt: skip
#: Tasks in which a document may be the query itself and is then not counted as retrieved.
_IGNORE_IDENTICAL = frozenset({"ArguAna", "FEVER", "FiQA2018", "MSMARCO", "QuoraRetrieval"})
#: How far the mean over queries may lie from the recorded score, which mteb rounds to five digits.
_ROUNDING = 0.002


@dataclass(frozen=True)
class Results:
    """The scores of one revision of one model."""

    model: str  #: As mteb writes it
    revision: str  #: Name of `folder`, where the files lie
    folder: Path
    #: Task -> main score x 100; the parts of CQADupstackRetrieval count once, as their mean.
    scores: dict[str, float]
    problems: dict[str, str]  #: Task -> why its file or files give no score; such a task is missing
    data_revisions: dict[str, str]  #: Task -> revision of the data it was scored on
    mteb_versions: tuple[str, ...]


def read_results(folder: Path) -> Results:
    """Read the results of one model.

    `folder` is an output directory of the evaluation, its `results`, or the folder of a model or a revision in there.
    Without a result below it, or with those of several models or revisions, a `UserError`.
    """
    if not folder.is_dir():
        raise UserError(f"There is no results folder {folder}.")
    revision = _revision_folder(folder)
    scores: dict[str, float] = {}
    problems: dict[str, str] = {}
    data_revisions: dict[str, str] = {}
    versions: set[str] = set()
    for file in _result_files(revision):
        content = _read_json(file)
        try:
            scores[file.stem] = 100 * _main_score(file.stem, content)
        except ValueError as error:
            problems[file.stem] = f"{file.name} {error}"
            continue
        data_revisions[file.stem] = str(content.get("dataset_revision"))
        versions.add(str(content.get("mteb_version")))
    _count_parts_once(scores, problems, data_revisions)
    model = revision.parent.name.replace("__", "/", 1)
    return Results(model, revision.name, revision, scores, problems, data_revisions, tuple(sorted(versions)))


def read_query_scores(predictions: Path, task: str, qrels: Path, main_score: float) -> dict[str, float]:
    """nDCG@10 x 100 of each query of a retrieval task, from predictions that mteb kept.

    `predictions` is the `prediction_folder` of the evaluation, with `<task>_predictions.json`; `qrels` are
    judgements, JSON lines of query-id, corpus-id, score. The mean over queries must be the recorded `main_score` x
    100: else a `UserError`, as predictions, judgements and results do not belong together.
    """
    judged = read_judgements(qrels)
    relevant = {query: grades for query, grades in judged.items() if any(grade > 0 for grade in grades.values())}
    predicted = _read_predictions(predictions / f"{task}_predictions.json", task)
    if task in _IGNORE_IDENTICAL:
        predicted = {query: {d: score for d, score in of.items() if d != query} for query, of in predicted.items()}
    scores = {query: 100 * score for query, score in ndcg_at_10(predicted, relevant).items()}
    mean = statistics.fmean(scores.values()) if scores else math.nan
    if not abs(mean - main_score) <= _ROUNDING:
        raise UserError(
            f"{predictions}: over {len(scores)} queries, nDCG@10 of {task} is {mean:.3f} by {qrels}, but the result "
            f"file says {main_score:.3f}; give the predictions and the judgements of this very evaluation."
        )
    return scores


def ndcg_at_10(
    rankings: Mapping[str, Mapping[str, float]], relevant: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """nDCG@10, a fraction, of each query that has both a ranking and judgements, by trec_eval as mteb asks it.

    `rankings`: query -> document -> score of the model; `relevant`: query -> document -> grade, else 0. trec_eval's
    gain is the grade. It rounds scores to 32 bits and puts equal ones in falling order of document id.
    """
    with needs_extra("Scores of single queries need pytrec_eval", "eval"):
        from pytrec_eval import RelevanceEvaluator
    judged = {query: dict(documents) for query, documents in relevant.items() if query in rankings}
    scored = {query: {document: float(score) for document, score in rankings[query].items()} for query in judged}
    found = RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(scored)
    return {query: found[query]["ndcg_cut_10"] if query in found else 0.0 for query in judged}


def _revision_folder(folder: Path) -> Path:
    for pattern in (".", "*", "*/*", "results/*/*"):
        candidates = [folder] if pattern == "." else sorted(path for path in folder.glob(pattern) if path.is_dir())
        # A model's config.json lies in folders that look alike, so names are not enough.
        found = [
            path
            for path in candidates
            if ((files := _result_files(path)) and (path / "model_meta.json").is_file())
            or any({"task_name", "scores"} <= _read_json(file).keys() for file in files)
        ]
        if len(found) == 1:
            return found[0].resolve()
        if found:
            listed = "; ".join(f"{path} ({len(_result_files(path))} tasks)" for path in found)
            raise UserError(f"{folder} holds results of {len(found)} models or revisions; name one of them: {listed}.")
    raise UserError(f"{folder} holds no results; expected <Task>.json files, as in results/<model>/<revision>/.")


def _result_files(folder: Path) -> list[Path]:
    names = (path for path in folder.glob("*.json") if path.name != "model_meta.json")
    return sorted(path for path in names if not path.stem.endswith("_predictions"))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if the file is cut off or is no object."""
    with suppress(UserError):
        return read_object(path)
    return {}


def _main_score(task: str, content: Mapping[str, Any]) -> float:
    """Mean main score, a fraction, of the split and the subset that count.

    A ValueError where there is none; its message goes on after the file's name.
    """
    if not content:
        raise ValueError("is cut off or is not valid JSON")
    try:
        splits: dict[str, list[dict[str, Any]]] = content["scores"]
        names = ["dev"] if task == "MSMARCO" else ["test"] if "test" in splits else list(splits)
        found = {(e["hf_subset"], name): float(e["main_score"]) for name in names for e in splits.get(name, [])}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"is not a result of mteb ({error!r})") from None
    subset = _ENGLISH.get(task)
    values = [value for (name, _), value in found.items() if subset in (None, name)]
    if not values:
        raise ValueError(f"has no score of the split {' or '.join(names)}" + (f" in {subset}" if subset else ""))
    if not all(-1 <= value <= 1 for value in values):  # true for NaN, too
        raise ValueError(f"has a main_score that is not a fraction from -1 to 1: {', '.join(map(str, values))}")
    return statistics.fmean(values)


def _count_parts_once(scores: dict[str, float], problems: dict[str, str], data_revisions: dict[str, str]) -> None:
    """Put the 12 parts of CQADupstackRetrieval in its place, unless its own file is there.

    Its data are those of its parts, wherever all of them say theirs: of two runs, one may have the file alone.
    """
    parts = {task: scores.pop(task) for task in PARTS if task in scores}
    revisions = [data_revisions.pop(task) for task in PARTS if task in data_revisions]
    faults = [problems.pop(task) for task in PARTS if task in problems]
    if len(parts) == len(PARTS):
        data_revisions[AGGREGATE] = "+".join(revisions)
    if AGGREGATE in scores:
        return
    if len(parts) == len(PARTS):
        scores[AGGREGATE] = statistics.fmean(parts.values())
        problems.pop(AGGREGATE, None)
    elif parts or faults:
        missing = ", ".join(task for task in PARTS if task not in parts)
        said = [*([problems[AGGREGATE]] if AGGREGATE in problems else []), f"parts without a score: {missing}", *faults]
        problems[AGGREGATE] = "; ".join(said)


def _read_predictions(path: Path, task: str) -> dict[str, dict[str, float]]:
    """Query -> document -> score, of the one subset and split that was evaluated."""
    if not path.is_file():
        raise UserError(f"There are no predictions {path}; evaluate {task} with a prediction_folder to keep them.")
    subsets = {name: splits for name, splits in _read_json(path).items() if name != "mteb_model_meta"}
    found = [queries for splits in subsets.values() if isinstance(splits, dict) for queries in splits.values()]
    if len(found) != 1 or not isinstance(found[0], dict):
        raise UserError(f"{path}: expected rankings of one subset and one split, found {len(found)}.")
    for query, ranking in found[0].items():
        if not isinstance(ranking, dict) or not all(isinstance(score, int | float) for score in ranking.values()):
            raise UserError(f"{path}: expected a score for each document of the query {query!r}.")
    return found[0]
