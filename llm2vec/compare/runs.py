"""Runs of the recipes of a set, and the order in which they can be done.

Each stage starts from the folder of the one before it, the first from the shared base. A run's folder is named by a
hash of all that decides it: its keys, seed and data, the run or base it starts from, and the number of processes where
a step has more rows with more of them (no `total_batch_size`). So a changed recipe runs again and an unchanged one does
not, and a stage that two recipes have in common is trained once.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm2vec.compare.recipes import SHARED_FILE, Recipe, RecipeSet, StageFile
from llm2vec.data.sources import find_files, table_file
from llm2vec.files import data_revision, files_hash, json_hash, whole_folder, write_json
from llm2vec.hub import find_file, without_waiting_for_the_hub
from llm2vec.model.chain import RUN_FILE, revision_of
from llm2vec.model.settings import SETTINGS_FILE
from llm2vec.model.vault import MODULES_FILE
from llm2vec.training.config import Config
from llm2vec.training.config.file import load_config
from llm2vec.training.model import encoder_settings
from llm2vec.training.resume import checkpoint_folder
from llm2vec.training.rows import sources_of, text_file_of
from llm2vec.training.vectors import folders_of_vectors
from llm2vec.types import Stage, UserError

#: Stage -> the command that trains it.
STAGE_COMMANDS: dict[Stage, str] = {
    "stage_I": "stage-1", "stage_II": "stage-2", "lm": "lm", "simcse": "simcse", "mntp": "mntp",
}  # fmt: skip
EVALUATION_COMMAND = "eval"
#: In a run's folder, once the run has ended well.
FINISHED_FILE = ".finished"


@dataclass(frozen=True)
class Run:
    """One start of a command; runs of the same name are the same run."""

    name: str
    command: str
    arguments: tuple[str, ...]
    folder: Path  #: What it writes
    parent: Run | None = None  #: The run it starts from, which must have ended well
    num_steps: int = 0  #: About how long it takes, beside other runs
    is_resumable: bool = False  #: Whether an interrupted run goes on from what lies in its folder
    save_steps: int = 0  #: Steps between a training run's checkpoints; 0 = it keeps none, or not all of them
    stop: int | None = None  #: A training run's `stop_after_n_steps`
    marker: str = FINISHED_FILE  #: In its folder, once it has ended well


@dataclass(frozen=True)
class Trial:
    """A recipe with one seed; without training there is no seed."""

    recipe: str
    seed: int | None
    training: tuple[Run, ...]
    evaluation: Run
    #: Step of the last stage -> evaluation of the model at that step, the last step left out.
    along: Mapping[int, Run] = field(default_factory=dict)
    #: Task -> file of judgements, of those tasks whose rankings are kept and that lie in a folder of their own.
    judgements: Mapping[str, Path] = field(default_factory=dict)

    @property
    def runs(self) -> tuple[Run, ...]:
        """All, in order."""
        return (*self.training, self.evaluation, *self.along.values())


@dataclass
class Planner:
    """Turns the recipes of a set into runs below one output folder, and writes the runs' configs."""

    recipe_set: RecipeSet
    output_dir: Path  #: `configs/`, `runs/` and `evaluations/` lie below it
    num_processes: int = 1  #: That share a step of training
    base: str = field(init=False)  #: What first stages start from
    base_revision: str = field(init=False)
    #: Of files, which many runs have in common.
    _hashes: dict[tuple[Path, ...], str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        named = str(self.recipe_set.shared["all"]["model_name_or_path"])
        if _is_local(named) and not Path(named).is_dir():
            raise UserError(f"{self.recipe_set.folder / SHARED_FILE}: there is no base model {named}.")
        if not _is_local(named):
            with without_waiting_for_the_hub():  # the commit is known of what has been asked for once
                find_file(named, "config.json")
        self.base_revision = revision_of(named)
        self.base = _bare_base(named, self.output_dir / f"base-{self.base_revision}")

    def trials(self, seeds: Sequence[int]) -> list[Trial]:
        """Every recipe with every seed. A `UserError` where a config is wrong, or data are not there."""
        planned = []
        for recipe in self.recipe_set.recipes:
            for seed in seeds if recipe.stages else [None]:
                training: list[Run] = []
                for stage in recipe.stages:
                    training.append(self._training(stage, seed, training[-1] if training else None))
                evaluation = self._evaluation(recipe.evaluation, training[-1] if training else None)
                along, judged = self._along(recipe, training), _judgements(recipe.evaluation)
                planned.append(Trial(recipe.name, seed, tuple(training), evaluation, along, judged))
        return planned

    def _along(self, recipe: Recipe, training: Sequence[Run]) -> dict[int, Run]:
        """Evaluations at the last stage's start and at its checkpoints."""
        if not training or not training[-1].save_steps or not self.recipe_set.along:
            return {}
        last, options = training[-1], {**recipe.evaluation, "tasks": list(self.recipe_set.along)}
        start = options if last.parent else {**options, **self._bare_start(last, recipe.stages[-1].stage)}
        saved = range(last.save_steps, last.num_steps, last.save_steps)
        checkpoints = {step: self._evaluation(options, last, checkpoint_folder(last.folder, step)) for step in saved}
        return {0: self._evaluation(start, last.parent), **checkpoints}

    def _bare_start(self, run: Run, stage: Stage) -> dict[str, str]:
        """Options that score the base as a first stage begins with it: the base alone says nothing of its reading."""
        settings = encoder_settings(load_config(Path(run.arguments[0]), stage), {})
        content = replace(settings, parent_adapters=None).written()
        file = self.output_dir / "configs" / f"settings-{json_hash(content)}.json"
        write_json(file, content)
        return {"base_model_name_or_path": self.base, "settings": str(file)}

    def _training(self, stage: StageFile, seed: int | None, parent: Run | None) -> Run:
        shared = self.recipe_set.shared
        own = {**shared["all"], **shared.get(stage.stage, {}), **stage.keys, "seed": seed}
        keys = {**own, "model_name_or_path": str(parent.folder if parent else self.base)}
        config = self._checked(keys, stage)
        del own["model_name_or_path"]
        start = parent.name if parent else self.base_revision
        decides: dict[str, Any] = {"stage": stage.stage, "keys": own, "start": start, "data": self._data_hashes(config)}
        if self.num_processes > 1 and config.total_batch_size is None:
            decides["processes"] = self.num_processes  # a step has that many times the rows
        name = f"{stage.stage}-seed{seed}-{json_hash(decides)}"
        folder, file = self.output_dir / "runs" / name, self.output_dir / "configs" / f"{name}.json"
        write_json(file, {**keys, "output_dir": str(folder)})
        num_steps = config.stop_after_n_steps or max(1, int(config.training.get("max_steps", 1)))
        saves = config.training.get("save_strategy", "steps") == "steps"
        keeps_all = saves and "save_total_limit" not in config.training
        return Run(
            name,
            STAGE_COMMANDS[stage.stage],
            (str(file),),
            folder,
            parent,
            num_steps,
            # A run that was halved has checkpoints of its rungs, whatever its config says.
            is_resumable=(saves or self.recipe_set.halving is not None) and config.resume == "auto",
            save_steps=config.training.get("save_steps", 500) if keeps_all else 0,
            stop=config.stop_after_n_steps,
        )

    def _checked(self, keys: dict[str, Any], stage: StageFile) -> Config:
        """The config that a run's keys make, read as the command will read it."""
        draft = self.output_dir / "configs" / "draft.json"
        draft.parent.mkdir(parents=True, exist_ok=True)
        write_json(draft, {**keys, "output_dir": str(self.output_dir)})
        try:
            return load_config(draft, stage.stage)
        except UserError as error:
            wrong = str(error).removeprefix(f"{draft}: ")
            raise UserError(f"{stage.file}, over {self.recipe_set.folder / SHARED_FILE}: {wrong}") from None
        finally:
            draft.unlink()

    def _data_hashes(self, config: Config) -> list[str]:
        """Of the content of all files that a run reads; a hub data set is known by its name."""
        if config.hub_dataset is not None:
            return [config.hub_dataset]
        if (file := text_file_of(config)) is not None:
            if not file.is_file():
                raise UserError(f"dataset_file_path: {file} is not there.")
            return [self._hash(file.parent, [file])]
        folder, sources = sources_of(config)
        texts = [place for source in sources for place, _ in source.located(folder).reading.texts]
        places = list(dict.fromkeys([*find_files(folder, sources), *texts]))
        files = [place for place in places if place.is_file()]
        places += map(Path, folders_of_vectors(config))
        others = [data_revision(place) if place.is_dir() else str(place) for place in places if place not in files]
        tables = [] if config.sources_file is None else [table_file(Path(config.sources_file))]
        return [self._hash(folder, files), *(self._hash(table.parent, [table]) for table in tables), *others]

    def _hash(self, folder: Path, files: Sequence[Path]) -> str:
        if tuple(files) not in self._hashes:
            self._hashes[tuple(files)] = files_hash(folder, sorted(files))
        return self._hashes[tuple(files)]

    def _evaluation(self, options: Mapping[str, Any], model: Run | None, checkpoint: Path | None = None) -> Run:
        """Of a training run, or of one of its checkpoints, or of the model that the options name."""
        options = dict(options)
        base = str(checkpoint or (model.folder if model else options.pop("base_model_name_or_path")))
        name = f"{model.name}{f' {checkpoint.name}' if checkpoint else ''}" if model else base
        how = {option: value for option, value in options.items() if option != "settings"}  # known by its content
        decides = {"model": name, "options": how, "files": _content_of(options)}
        if model is None and _is_local(base):
            if not Path(base).is_dir():
                raise UserError(f"there is no model {base} to be scored.")
            decides["model"] = revision_of(base)
        name = f"evaluation-{json_hash(decides)}"
        folder = self.output_dir / "evaluations" / name
        arguments = ["--base_model_name_or_path", base, "--output_dir", str(folder)]
        for option, value in options.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            arguments += [] if value is False else [f"--{option}", *map(str, values)]
        return Run(name, EVALUATION_COMMAND, tuple(arguments), folder, model, is_resumable=True)


def _is_local(model: str) -> bool:
    """Whether a name must be a folder: the hub's have one slash at most, and `output/...` are ours."""
    return Path(model).is_dir() or model.count("/") > 1 or model.startswith((".", "/"))


def _bare_base(base: str, copy: Path) -> str:
    """The base, or a copy of it without the settings that it was trained with, which recipes are to choose freely."""
    if not (Path(base) / SETTINGS_FILE).is_file():
        return base
    if not copy.is_dir():
        with whole_folder(copy) as aside:
            for file in Path(base).iterdir():
                if file.is_file() and file.name not in (SETTINGS_FILE, RUN_FILE, MODULES_FILE):
                    shutil.copy2(file, aside)
    return str(copy)


def _content_of(options: Mapping[str, Any]) -> dict[str, str]:
    """What decides scores beside the options themselves: the instructions, and retrieval sets of one's own."""
    content: dict[str, str] = {}
    for key, name in (("task_to_instructions_fp", "instructions"), ("settings", "settings")):
        if (file := options.get(key)) is not None:
            if not Path(file).is_file():
                raise UserError(f"{key}: {file} is not there.")
            content[name] = files_hash(Path(file).parent, [Path(file)])
    if (data := options.get("local_data_dir")) is not None:
        if not Path(data).is_dir():
            raise UserError(f"local_data_dir: there is no folder {data}.")
        own = [Path(data, task) for task in options["tasks"] if Path(data, task).is_dir()]
        content |= {folder.name: data_revision(folder) for folder in own}
    return content


def _judgements(options: Mapping[str, Any]) -> dict[str, Path]:
    """Of retrieval sets below `local_data_dir`, where rankings are kept."""
    folder = options.get("local_data_dir") if options.get("save_predictions") else None
    files = {task: Path(folder, task, "qrels/test.jsonl") for task in options["tasks"]} if folder else {}
    return {task: file for task, file in files.items() if file.is_file()}
