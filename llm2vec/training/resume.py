"""Going on after an interruption: from which checkpoint a run starts, and whether that is the run's own.

The key `resume` of a config decides:

    auto    (default) from the newest whole checkpoint in the run's output folder, from step 0 where there is none; a
            run that has finished ends at once, with exit code 0
    PATH    from that checkpoint
    never   from step 0; earlier checkpoints in the output folder are removed as the training begins

A checkpoint is the run's own where everything that decides the result is as it was: the keys of the config whose
`influence` is `result` (`config.Key`), the number of processes, the content of the data files and of stored vectors,
and what the run started from. Anything else is refused.
"""

from __future__ import annotations

import codecs
import dataclasses
import enum
import json
import logging
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2vec.data.reading import Reading
from llm2vec.data.tables import content_hash
from llm2vec.distributed import join_on_cpu, max_over_ranks
from llm2vec.files import alone_in, checked, read_object, remove
from llm2vec.model.chain import RUN_FILE, mark_of, open_folder, read_run
from llm2vec.model.checkpoint import SUMS_FILE, check_sums, environment
from llm2vec.processes import rank, wait_for_all, world_size
from llm2vec.training.config import KEYS, Config
from llm2vec.training.config.arguments import runs_on_cpu, training_arguments
from llm2vec.training.rows import sources_of, text_file_of
from llm2vec.types import RunEnds, UserError, in_one_sentence

logger = logging.getLogger(__name__)

#: What a checkpoint holds of a run beside its weights; without them it is a model only.
STATE_FILES = ("trainer_state.json", "scheduler.pt")

#: What the first of them says, as far as it is read here; transformers reads the rest.
STATE = {
    "global_step": int, "epoch": float, "max_steps": int, "num_train_epochs": int, "log_history": [{"step": int}],
    "best_metric": (float, None), "best_global_step": (int, None), "best_model_checkpoint": (str, None),
    "stateful_callbacks": {str: object},
}  # fmt: skip

#: What `run.json` says besides, where a run wrote it.
RECORD = {"config": {"training": dict, "model_name_or_path": str}}

#: In a checkpoint: a process's figures since the last entry of the log, its rank added to the name.
FIGURES_FILE = "figures.json"


def start_or_resume(config: Config, held: ExitStack) -> TrainingArguments:
    """A run's training arguments; `resume_from_checkpoint` in them names the checkpoint that it goes on from, if any.

    The run's output folder is `held`, so that no second run writes there. A `UserError` where the arguments are wrong,
    another run is at work there, or the checkpoint is another run's; `RunEnds` where the run has finished.
    """
    if runs_on_cpu(config):
        join_on_cpu(config.training.get("ddp_timeout", TrainingArguments.ddp_timeout))
    args = training_arguments(config)
    assert args.device is not None  # joins the processes
    wait_for_all()
    start: Path | None = None
    end: UserError | RunEnds | None = None
    if rank() == 0:  # files are read once, and all processes start from the same step
        try:
            check_writable(config.output_dir)
            held.enter_context(alone_in(config.output_dir, "run"))
            start = find_start(config)
        except (UserError, RunEnds) as caught:
            end = caught
    wait_for_all()  # sums over a large checkpoint take long
    # The first process alone says why.
    if ended := max_over_ranks(0 if end is None else 1 if isinstance(end, RunEnds) else 2):
        raise end or (RunEnds("", code=0, is_done=True) if ended == 1 else UserError(""))
    # The folder that was looked at, by the number in its name: a copy may name another step than its own.
    number = max_over_ranks(-1 if start is None else _number_of(start) if config.resume == "auto" else 0)
    if number >= 0:
        folder = checkpoint_folder(config.output_dir, number) if config.resume == "auto" else Path(config.resume)
        if max_over_ranks(int(not folder.is_dir())):
            raise UserError(f"resume: {folder} is not on every machine; copy it, or share the output folder.")
        args.resume_from_checkpoint = str(folder)
        args.eval_on_start = False  # has been done
        logger.info("resume      from step %s, %s", f"{step_of(folder):,}", folder)
    return args


def check_writable(folder: Path) -> None:
    """Say, by a `UserError`, before the training what every checkpoint would meet after it: that the output folder,
    which need not be there yet, cannot be written to."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    with in_one_sentence(lambda why: f"output_dir: {folder} cannot be written to ({why}).", OSError):
        tempfile.TemporaryFile(dir=place).close()


def find_start(config: Config) -> Path | None:
    """The checkpoint that a run goes on from; None = it starts at step 0. A `UserError` where there is one, but of
    another config, or the one that is named is not whole; `RunEnds` where the run has finished."""
    if config.resume == "never":
        return None
    if config.resume != "auto":
        named = Path(config.resume)
        if reason := why_unusable(named):
            raise UserError(f"resume: {reason}")
        _refuse_another_run(named, config)
        return named
    _end_if_finished(config)
    checkpoints = checkpoints_in(config.output_dir)
    for folder in reversed(checkpoints):
        reason = why_unusable(folder)
        if reason is None:
            _refuse_another_run(folder, config)
            return folder
        logger.warning("resume      %s It is left out.", reason)
    for folder in (*checkpoints, config.output_dir):
        if _holds_a_run(folder):
            _refuse_another_run(folder, config)  # or its weights would be written over
    if _holds_a_run(config.output_dir):
        logger.warning(
            "resume      %s holds this run's weights, but no checkpoint to go on from: it starts at step 0, and writes "
            "over them at its end", config.output_dir,
        )  # fmt: skip
    return None


def why_unusable(folder: Path) -> str | None:
    """Why no run can go on from a folder, as a sentence; None = one can."""
    if not folder.is_dir():
        return f"there is no folder {folder}."
    try:
        run = open_folder(str(folder)).run
        check_sums(folder)
        if not all((folder / name).is_file() for name in STATE_FILES):
            return f"{folder} holds weights only (save_only_model)."
        checked(run, RECORD, str(folder / RUN_FILE))
        step_of(folder)
    except UserError as error:
        return str(error)
    processes = run.get("num_processes", 1)
    if not all((folder / file_of_rank(FIGURES_FILE, i)).is_file() for i in range(processes)):
        return f"{folder} lacks the state of some processes, which saw another disk; share the output folder."
    return None


def _holds_a_run(folder: Path) -> bool:
    """Whether a training script wrote a folder, to its end."""
    try:
        return "config" in open_folder(str(folder)).run
    except UserError:
        return False


def _end_if_finished(config: Config) -> None:
    """Raise RunEnds where the output folder holds this run's last weights."""
    output = config.output_dir
    if not _holds_a_run(output):
        return
    recorded = checked(read_run(output), RECORD, str(output / RUN_FILE))
    if is_over(recorded, config.stop_after_n_steps) and not differences(recorded, config):
        at = f" at step {recorded['step']:,}" if "step" in recorded else ""
        raise RunEnds(
            f"{output} holds this run, which ended{at}; nothing is left to do. To train it again, choose another "
            'output_dir, or set "resume": "never".',
            code=0,
            is_done=True,
        )


def is_over(recorded: dict[str, Any], stop: int | None) -> bool:
    """Whether a run with this record in its `run.json`, empty where there is none, went as far as one with this
    `stop_after_n_steps` will; None = to the end of the schedule."""
    if "config" not in recorded:
        return False
    stopped_at = recorded["config"].get("stop_after_n_steps")
    return stopped_at == stop or (stop is not None and recorded.get("step", 0) >= stop)


def _refuse_another_run(folder: Path, config: Config) -> None:
    recorded = checked(read_run(folder), RECORD, str(folder / RUN_FILE))
    found = differences(recorded, config)
    if found:
        raise UserError(
            f"{folder} belongs to another run: {'; '.join(found)}. Choose another output_dir, or set "
            '"resume": "never" to start at step 0 and write over it.'
        )
    for key, before, now in _differing_keys(recorded["config"], config, "rounding"):
        logger.warning("resume      %s was %s, is %s: other rounding, and other draws of dropout", key, before, now)
    versions = environment()["versions"]
    for package, before in recorded.get("versions", {}).items():
        if versions.get(package) not in (before, None):
            logger.warning("resume      %s was %s, is %s: rounding may differ", package, before, versions[package])


def differences(recorded: dict[str, Any], config: Config) -> list[str]:
    """What decides the result and is not as it was when a checkpoint's `run.json` was written, in words."""
    found = [
        f"{key} is {before!r} there and {now!r} here"
        for key, before, now in _differing_keys(recorded["config"], config, "result")
    ]
    if recorded.get("num_processes", world_size()) != world_size():
        found.append(f"it ran in {recorded['num_processes']} process(es), not {world_size()}")
    found += _differing_sources(recorded.get("data", ()), config)
    hashes = dict(recorded.get("vectors", {}))  # an older record has none
    for data in recorded.get("data", ()):
        hashes |= {data["file"]: data["sha256"], **data.get("texts", {})}
    for name, before in hashes.items():
        if before is not None and (not Path(name).exists() or content_hash(Path(name)) != before):
            found.append(f"{name} has changed since")
    for path, mark in recorded.get("parent", {}).get("marks", {}).items():
        if mark != mark_of(path):
            found.append(f"{path} is not what it was")
    return found


def _differing_sources(recorded: Sequence[dict[str, Any]], config: Config) -> Iterator[str]:
    """What a table of sources says otherwise than when the rows were read: which sources, their files, instructions."""
    if config.hub_dataset is not None or text_file_of(config) is not None:
        return
    folder, sources = sources_of(config)
    before, today = [data["source"] for data in recorded], [source.name for source in sources]
    if before != today:
        yield f"the sources are {', '.join(before)} there and {', '.join(today)} here"
        return
    for data, source in zip(recorded, sources, strict=True):
        if data["file"] != str(source.place(folder)):
            yield f"source {source.name} is {data['file']} there and {source.place(folder)} here"
        reading = json.loads(json.dumps(source.located(folder).reading))
        if json.loads(json.dumps(Reading(*data.get("reading", reading)))) != reading:  # an older record has fewer
            yield f"source {source.name} is read otherwise (columns, split, negatives) than there"
        # Older records have no instructions; rows of texts alone have none of the table's.
        instructions = [list(instruction) for instruction in source.instructions]
        if config.stage not in ("simcse", "mntp") and data.get("instructions", instructions) != instructions:
            yield f"source {source.name} has another instruction, or puts it on other texts, than there"


def _differing_keys(recorded: dict[str, Any], config: Config, influence: str) -> Iterator[tuple[str, Any, Any]]:
    """Keys of an influence that have another value today, with both values, in the order of their names."""
    today = json.loads(json.dumps(dataclasses.asdict(config)))
    # What a config does not write is the default, and an older record's stage this one's.
    unwritten = {f.name: _default(f) for kind in (TrainingArguments, Config) for f in dataclasses.fields(kind)}
    then, now = (unwritten | {"stage": config.stage} | keys | keys["training"] for keys in (recorded, today))
    for key in sorted(KEYS):
        if KEYS[key].influence == influence and then[key] != now[key]:
            yield key, then[key], now[key]


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value.value if isinstance(value, enum.Enum) else value


# --- a run's checkpoints ---


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def file_of_rank(name: str, process: int) -> str:
    """`optimizer.pt` -> `optimizer_0.pt`."""
    return f"{Path(name).stem}_{process}{Path(name).suffix}"


def step_of(folder: Path) -> int:
    """The optimiser step of a checkpoint, by its own account."""
    file = folder / STATE_FILES[0]
    step: int = read_object(file, shape=STATE)["global_step"]
    if file.read_bytes().startswith(codecs.BOM_UTF8):  # which transformers' own reader does not take
        raise UserError(f"{file}: begins with a byte order mark; this file was not written by a run.")
    return step


def checkpoints_in(output_dir: Path, *, after: int = -1, up_to: float = math.inf) -> list[Path]:
    """A run's checkpoints, whole or not, by their steps, which are above `after` and at most `up_to`."""
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if after < _number_of(path) <= up_to]
    return sorted(found, key=_number_of)


def _number_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 where there is none, which is no checkpoint's."""
    number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() and number.isascii() and len(number) < 19 else -1


def last_checkpoint(output_dir: Path, step: int) -> str:
    """The newest checkpoint up to a step that was written to its end, in a sentence; its sums are not taken."""
    whole = [path for path in checkpoints_in(output_dir, up_to=step) if (path / SUMS_FILE).is_file()]
    return f"The last good checkpoint is {whole[-1]}." if whole else "There is no checkpoint yet."


def remove_checkpoints(output_dir: Path) -> None:
    """Make way for a run that starts anew."""
    for folder in checkpoints_in(output_dir):
        logger.info("resume      never: %s of an earlier run is removed", folder)
        remove(folder)


def command_to_resume() -> str:
    """The command line that started this run."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    started = ["python"] if processes is None else ["torchrun", f"--nproc_per_node={processes}"]
    program, *arguments = sys.argv
    is_command = Path(program).name in ("llm2vec", "__main__.py")  # the console script, or `python -m llm2vec`
    return shlex.join([*started, *(["-m", "llm2vec"] if is_command else [program]), *arguments])
