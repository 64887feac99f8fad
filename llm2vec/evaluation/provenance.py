"""Where a model is from: the training runs behind it, as their `run.json` tells, without local paths."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec.files import read_object
from llm2vec.hub import local_folder
from llm2vec.model.chain import is_mark_of_folder, mark_of, read_run
from llm2vec.model.vault import Folder
from llm2vec.training.log import LOG_FILE

logger = logging.getLogger(__name__)

#: Source -> mteb's names of the sets that it was made from; it is enough to name one of mteb's versions of a set.
TRAINING_SETS = Path(__file__).with_name("training_sets.json")

#: Keys of a run's record that hold local paths, whatever they look like.
_PATH_KEYS = (
    "output_dir", "logging_dir", "dataset_file_path", "sources_file", "file", "resume", "resume_from_checkpoint",
)  # fmt: skip

#: How keys end under which older records may hold a secret.
_SECRET = ("hub_token", "api_key")

#: What of a checkpoint's `run.json` is of use in another folder.
_RUN_KEYS = (
    "config", "num_processes", "gradient_accumulation_steps", "parent", "data", "step", "weights_of_step", "versions",
    "git_commit", "origin",
)  # fmt: skip


@dataclass(frozen=True)
class RecordedRun:
    """One training run below a model: what of its `run.json` is of use elsewhere, and its log."""

    record: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]


def recorded_runs(opened: Sequence[Folder]) -> list[RecordedRun]:
    """The runs that made a model (`Chain.folders`) or an export, as far as they can be followed, the earliest first."""
    folders = [*reversed(opened)]
    while (parent := _parent(folders[-1])) is not None and parent.path not in {folder.path for folder in folders}:
        folders.append(parent)
    return [run for folder in reversed(folders) for run in _runs_of(folder)]


def _parent(trained: Folder) -> Folder | None:
    """What a checkpoint's run started from; None where that is not recorded, not here, or no longer what it was."""
    parent = trained.run.get("parent", {})
    name: str | None = parent.get("model_name_or_path")
    run = {} if name is None else read_run(Path(name))
    if name is None or not run:
        return None
    found = mark_of(name)
    if parent.get("marks", {}).get(name, found) != found:
        logger.warning(
            "%s has changed since %s was trained from it; its run is left out of the records", name, trained.path
        )
        return None
    return Folder(name, run)


def _runs_of(folder: Folder) -> list[RecordedRun]:
    """The run that wrote a checkpoint, or all that an export or a merged model lists; none where no run wrote it."""
    run = folder.run
    if "stages" in run:
        return [RecordedRun(_of_use_elsewhere(record), []) for record in run["stages"]]
    return [RecordedRun(_of_use_elsewhere(run), _log(Path(folder.path)))] if "config" in run else []


def _of_use_elsewhere(run: Mapping[str, Any]) -> dict[str, Any]:
    marks = run.get("parent", {}).get("marks", {})
    local = {name for name, mark in marks.items() if is_mark_of_folder(mark)}
    kept: dict[str, Any] = without_local_paths({key: run[key] for key in _RUN_KEYS if key in run}, local)
    return kept


def _log(folder: Path) -> list[dict[str, Any]]:
    """A checkpoint's log: its own, or for a run's `checkpoint-N` the run's up to step N."""
    file, last = folder / LOG_FILE, None
    step = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    if step and not file.is_file():
        file, last = folder.resolve().parent / LOG_FILE, int(step.group(1))
    if not file.is_file():
        return []
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # cut short by what ended the run
            entries.append(json.loads(line))
    return [entry for entry in entries if last is None or entry.get("step", 0) <= last]


def trained_from(base: str, runs: Sequence[RecordedRun]) -> str | None:
    """Hub name of the model that the first run started from; `base` is what a chain goes on."""
    origins = [run.record.get("origin", {}).get("model") for run in runs[:1]]
    names = [base, *(run.record.get("parent", {}).get("model_name_or_path") for run in runs[:1]), *origins]
    return next((name for name in names if name and local_folder(name) is None and name.count("/") == 1), None)


def training_sets(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """What the leaderboard asks about training data, as keywords of mteb's `ModelMeta`.

    `training_datasets`: mteb's names of the sets that the sources of the runs were made from; None where no run names a
    source. `public_training_data`: True where all sources are of the released archive or of the hub table, else None.
    """
    known = read_object(TRAINING_SETS)
    sources = {str(data.get("source")) for run in runs for data in run.record.get("data", [])}
    return {
        "training_datasets": {task for name in sources for task in known.get(name, [])} if sources else None,
        "public_training_data": True if sources and sources <= known.keys() else None,
    }


def without_local_paths(value: Any, local: Collection[str] = (), key: str = "") -> Any:
    """A record without tokens, and with each local path in it cut to its last part; names on the hub stay whole.

    `local` are paths that are known to be local, even if nothing is there any more; `key` is whose value it is.
    """
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.endswith(_SECRET)}
        return {_shortened(k, local, ""): without_local_paths(v, local, k) for k, v in kept.items()}
    if isinstance(value, list):
        return [without_local_paths(item, local, key) for item in value]
    return _shortened(value, local, key) if isinstance(value, str) else value


def _shortened(text: str, local: Collection[str], key: str) -> str:
    path = Path(text)
    try:
        is_local = (
            key in _PATH_KEYS or text in local or path.is_absolute() or text.startswith(("~", ".")) or path.exists()
        )
    except (OSError, ValueError):  # too long for a path
        is_local = False
    return path.name if is_local else text
