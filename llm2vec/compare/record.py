"""The record of a comparison: all that its tables are made of, as text and small enough to be kept beside the code.

    RECORD/record.json                          base, seeds, machine, what each recipe sets itself, a search's table
    RECORD/<recipe>[-seed<n>]/<n>_<stage>/      run.json and log.jsonl of each stage
    RECORD/<recipe>[-seed<n>]/scores/           mteb's result files
    RECORD/<recipe>[-seed<n>]/along/<step>/     those of the last stage's start and checkpoints
    RECORD/<recipe>[-seed<n>]/queries.json      task -> query -> nDCG@10 x 100, where rankings were kept

`llm2vec report RECORD` makes the tables again. Nothing of them is written down here but what was measured.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec.compare.runs import Trial
from llm2vec.files import COMPARISON_RECORD, read_object, write_json
from llm2vec.model.chain import RUN_FILE
from llm2vec.reports.logs import read_log
from llm2vec.reports.results import read_query_scores, read_results
from llm2vec.table import Table
from llm2vec.training.log import LOG_FILE
from llm2vec.types import UserError

_TRIAL = re.compile(r"(.+?)(?:-seed(\d+))?")
_STAGE = re.compile(r"\d+_\w+")
_TABLE = {"header": [str], "rows": [[(str, None)]], "title": str, "note": str}
_RECORD = {"facts": {str: str}, "recipes": {str: str}, "halving?": _TABLE}
RANK_KEY = "eval_effective_rank"


@dataclass(frozen=True)
class TrialOutcome:
    """What one recipe came to with one seed."""

    recipe: str
    seed: int | None  #: None without training
    scores: Mapping[str, float]  #: Task -> main score x 100; empty after a failure
    #: Of the training rows, over all stages, and the minutes of training; None where the logs do not say.
    tokens: float | None = None
    minutes: float | None = None
    failure: str | None = None  #: Why there is no score; None = there is
    along: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  #: Step of the last stage -> task -> score
    queries: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  #: Task -> query -> nDCG@10 x 100
    loss: float | None = None  #: The first that the last stage logged
    rank: float | None = None  #: The effective rank of held-out texts before the last stage, where it was logged
    steps: int = 0  #: Of the last stage


def write_record(
    folder: Path, trials: Sequence[Trial], failures: Mapping[str, str], own: Mapping[str, str],
    facts: Mapping[str, str], halving: Table | None = None,
) -> list[TrialOutcome]:  # fmt: skip
    """Write a record anew, of trials whose runs are all done or failed; returns what each trial came to, in order.

    Args:
        folder: what it held goes.
        failures: name of a run -> why it failed.
        own: recipe -> what it sets itself.
        facts: what else a reader should know.
        halving: the table of a search.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcomes = []
    for trial in trials:
        reason = next((failures[run.name] for run in trial.runs if run.name in failures), None)
        try:
            outcome = TrialOutcome(trial.recipe, trial.seed, {}, failure=reason) if reason else _write(folder, trial)
        except UserError as error:
            outcome = TrialOutcome(trial.recipe, trial.seed, {}, failure=str(error))
        outcomes.append(outcome)
    search = {} if halving is None else {"halving": {key: getattr(halving, key) for key in _TABLE}}
    write_json(folder / COMPARISON_RECORD, {"facts": dict(facts), "recipes": dict(own), **search})
    return outcomes


def read_record(folder: Path) -> tuple[list[TrialOutcome], dict[str, str], dict[str, str], Table | None]:
    """Trials by name, each recipe's own keys, the facts, and the table of a search: what `write_comparison` takes. A
    folder without trials is a `UserError`, as is a `record.json` that `write_record` would not have written."""
    content = read_object(folder / COMPARISON_RECORD, shape=_RECORD)
    search = Table(**{key: content["halving"][key] for key in _TABLE}) if "halving" in content else None
    if search is not None and any(len(row) != len(search.header) for row in search.rows):
        raise UserError(f"{folder / COMPARISON_RECORD}: halving: each row must have as many cells as the header.")
    found = [_read(path) for path in sorted(folder.iterdir()) if (path / "scores").is_dir()]
    if not found:
        raise UserError(f"{folder} holds no trials; expected <recipe>-seed<n>/scores/ beside {COMPARISON_RECORD}.")
    return found, content["recipes"], content["facts"], search


def _write(folder: Path, trial: Trial) -> TrialOutcome:
    """Copy what a trial's runs left."""
    own = folder / (trial.recipe if trial.seed is None else f"{trial.recipe}-seed{trial.seed}")
    for number, run in enumerate(trial.training, start=1):
        stage = own / f"{number}_{run.name.partition('-')[0]}"
        stage.mkdir(parents=True)
        for name in (RUN_FILE, LOG_FILE):
            shutil.copy2(run.folder / name, stage)
    final = read_results(trial.evaluation.folder)
    _copy_json(final.folder, own / "scores")
    for step, run in trial.along.items():
        _copy_json(read_results(run.folder).folder, own / "along" / str(step))
    rankings = trial.evaluation.folder / "predictions" / final.folder.parent.name / final.revision
    if rankings.is_dir():
        judged = {task: file for task, file in trial.judgements.items() if task in final.scores}
        found = {task: read_query_scores(rankings, task, file, final.scores[task]) for task, file in judged.items()}
        rounded = {task: {query: round(score, 3) for query, score in of.items()} for task, of in found.items()}
        write_json(own / "queries.json", rounded)
    return _read(own)


def _copy_json(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in sorted(source.glob("*.json")):
        shutil.copy2(file, target)


def _read(folder: Path) -> TrialOutcome:
    recipe, seed = _TRIAL.fullmatch(folder.name).groups()  # type: ignore[union-attr]  # matches every name
    stages = sorted(path for path in folder.iterdir() if _STAGE.fullmatch(path.name))
    logs = [read_log(stage / LOG_FILE) for stage in stages]
    costs = [_costs(log) for log in logs]
    checkpoints = sorted(int(path.name) for path in folder.glob("along/*"))
    queries = folder / "queries.json"
    before, last = [[], [], *logs][-2:]
    losses = [entry["loss"] for entry in last if "loss" in entry]
    ranks = [entry[RANK_KEY] for entry in before if RANK_KEY in entry]
    return TrialOutcome(
        recipe,
        None if seed is None else int(seed),
        read_results(folder / "scores").scores,
        _sum([tokens for tokens, _ in costs]),
        _sum([minutes for _, minutes in costs]),
        along={step: read_results(folder / "along" / str(step)).scores for step in checkpoints},
        queries=read_object(queries) if queries.is_file() else {},
        loss=losses[0] if losses else None,
        rank=ranks[-1] if ranks else None,
        steps=max((int(entry["step"]) for entry in last), default=0),
    )


def _costs(log: Sequence[Mapping[str, float]]) -> tuple[float | None, float | None]:
    """Tokens and minutes of a run; None where its log does not say.

    The time is that of the entries: the library's `train_runtime` is of the last start alone, where a run was killed
    and went on; it counts where there is no entry. The steps behind the last multiple of `logging_steps` have none:
    they are taken to be like the others.
    """
    counted = [entry for entry in log if "tokens_per_second" in entry]
    if not counted:
        return None, next((entry["train_runtime"] / 60 for entry in log if "train_runtime" in entry), None)
    share = max(entry["step"] for entry in log) / max(entry["step"] for entry in counted)
    seconds = [entry["tokens"] / (entry["tokens_per_second"] or 1) for entry in counted]  # 0 of 0: no time
    return sum(entry["tokens"] for entry in counted) * share, sum(seconds) / 60 * share


def _sum(values: Sequence[float | None]) -> float | None:
    """None where one is missing, or all are."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
