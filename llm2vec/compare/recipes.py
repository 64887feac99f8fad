"""Recipes to be compared, as a folder of configs holds them.

    FOLDER/shared.json                      what all recipes share: the keys of `all` stages (base model, data, batch)
                                            and those of single ones (`stage_I`, `stage_II`, ...); `recipes`: a folder
                                            with further recipes, which other sets may use, too; `sweep`: values to try;
                                            `reference`: the recipe that others are held against (`baseline`)
    FOLDER/evaluation.json                  options of `llm2vec eval`: tasks, data, ...; `along`: the tasks that
                                            checkpoints of the last stage are scored on too
    FOLDER/<recipe>/<n>_<stage>.json        the recipe's own keys, which go over the shared ones; stage after stage
    FOLDER/<recipe>/evaluation.json         options over the set's; alone, it names a model to be scored as it is

`"sweep": {"stage_II": {"learning_rate": [1e-4, 5e-4]}, "stage_I": {"alpha": [0.2, 0.5]}}` makes four of a recipe with
both stages, named `anchor,stage_II.learning_rate=0.0001,stage_I.alpha=0.2` and so on, and two of one without Stage I.
`"halving": {"metric": "eval_loss", "rungs": [0.25, 0.5], "factor": 2}` leaves half of them behind after a quarter of
the last stage's steps, and half of the rest after half of them (`compare.halving`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from llm2vec.files import read_object
from llm2vec.training.config.file import SCHEMA_KEY
from llm2vec.types import Stage, UserError, lower_is_better

SHARED_FILE = "shared.json"
EVALUATION_FILE = "evaluation.json"
#: Options of the evaluation; the model and where results go are decided here, unless a recipe only names a model.
EVALUATION_KEYS = (
    "tasks", "local_data_dir", "task_to_instructions_fp", "settings", "batch_size", "max_length", "torch_dtype",
    "attn_implementation", "device", "save_predictions",
)  # fmt: skip
#: The recipe that others are held against, where a set names none.
REFERENCE = "baseline"
#: Of the set alone: the tasks that a last stage's checkpoints are scored on too, and the model that it starts from.
ALONG_KEY = "along"
#: Keys of a run that follow from its place in the set.
DECIDED_KEYS = ("model_name_or_path", "peft_model_name_or_path", "output_dir", "experiment_id", "seed")
_STAGE_FILE = re.compile(r"(\d+)_(\w+)\.json")


class StageFile(NamedTuple):
    """One stage of a recipe, and the recipe's own keys."""

    stage: Stage
    keys: dict[str, Any]
    file: Path


@dataclass(frozen=True)
class Recipe:
    """One row of the comparison."""

    name: str
    stages: tuple[StageFile, ...]  #: In order; none where a model is only scored
    evaluation: dict[str, Any]  #: The set's options with the recipe's own over them


@dataclass(frozen=True)
class Halving:
    """How a sweep is searched by successive halving."""

    metric: str  #: A figure of the evaluations on held-out rows, as `log.jsonl` names it
    rungs: tuple[float, ...]  #: Shares of the last stage's steps, rising
    factor: int = 2  #: One in so many goes on, rounded up

    @property
    def lower_is_better(self) -> bool:
        """Whether the best figure is the lowest."""
        return lower_is_better(self.metric)


@dataclass(frozen=True)
class RecipeSet:
    """What a folder holds."""

    folder: Path
    shared: dict[str, dict[str, Any]]  #: `all` or a stage -> keys
    recipes: tuple[Recipe, ...]  #: In the order of their names
    along: tuple[str, ...]  #: Tasks that are scored along the last stage, too
    halving: Halving | None = None
    reference: str = REFERENCE  #: The recipe that others are held against


def read_set(folder: Path) -> RecipeSet:
    """Read a folder of configs; a file that is missing, malformed or misnamed is a `UserError`."""
    content = _read_keys(folder / SHARED_FILE)
    library, sweep = content.pop("recipes", None), content.pop("sweep", {})
    reference = content.pop("reference", REFERENCE)
    halving = _read_halving(folder / SHARED_FILE, content.pop("halving", None), bool(sweep))
    if not isinstance(library, str | None):
        raise UserError(f"{folder / SHARED_FILE}: recipes is {library!r}; it must name a folder.")
    for section, keys in content.items():
        if section not in ("all", *get_args(Stage)):
            allowed = ", ".join(["recipes", "reference", "sweep", "halving", "all", *get_args(Stage)])
            raise UserError(f"{folder / SHARED_FILE}: unknown section {section!r}; allowed: {allowed}.")
        if not isinstance(keys, dict):
            raise UserError(f"{folder / SHARED_FILE}: {section} must be an object of keys.")
        _refuse_decided(folder / SHARED_FILE, [key for key in keys if (section, key) != ("all", "model_name_or_path")])
    if not content.get("all", {}).get("model_name_or_path"):
        raise UserError(f"{folder / SHARED_FILE}: all.model_name_or_path must name the base model.")
    evaluation = read_object(folder / EVALUATION_FILE)
    along = evaluation.pop(ALONG_KEY, [])
    if not isinstance(along, list) or not set(along) <= set(evaluation.get("tasks", ())):
        raise UserError(f"{folder / EVALUATION_FILE}: {ALONG_KEY} must list some of the tasks.")
    found: dict[str, Path] = {}
    for parent in [folder / library, folder] if library is not None else [folder]:
        if not parent.is_dir():
            raise UserError(f"{folder / SHARED_FILE}: recipes names {parent}, and there is no such folder.")
        found |= {path.name: path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")}
    recipes = tuple(_read_recipe(found[name], evaluation) for name in sorted(found))
    if not recipes:
        raise UserError(f"{folder} holds no recipes; each is a folder of files such as 1_stage_II.json.")
    if reference != REFERENCE and reference not in found:
        raise UserError(f"{folder / SHARED_FILE}: reference is {reference!r}; a recipe of the set is needed.")
    swept = [variant for recipe in recipes for variant in _variants(folder / SHARED_FILE, sweep, recipe)]
    return RecipeSet(folder, content, tuple(swept), tuple(along), halving, reference)


def _read_halving(file: Path, content: object, has_sweep: bool) -> Halving | None:
    """What a set says of a search; None = every combination is trained to its end."""
    if content is None:
        return None
    keys = content if isinstance(content, dict) else {}
    metric, rungs, factor = keys.get("metric"), keys.get("rungs"), keys.get("factor", 2)
    if not keys or set(keys) - {"metric", "rungs", "factor"} or not has_sweep:
        raise UserError(f"{file}: halving must be an object of metric, rungs and factor, beside a sweep.")
    if not isinstance(metric, str) or not metric.startswith("eval_"):
        raise UserError(f"{file}: halving.metric is {metric!r}; name a figure of an evaluation, such as eval_loss.")
    shares = [share for share in rungs if type(share) is float and 0 < share < 1] if isinstance(rungs, list) else []
    if not shares or shares != rungs or shares != sorted(set(shares)):
        raise UserError(f"{file}: halving.rungs is {rungs!r}; shares of the steps are needed, such as [0.25, 0.5].")
    if type(factor) is not int or factor < 2:
        raise UserError(f"{file}: halving.factor is {factor!r}; a whole number above 1 is needed.")
    return Halving(metric, tuple(shares), factor)


def _read_recipe(folder: Path, evaluation: Mapping[str, Any]) -> Recipe:
    stages: dict[int, StageFile] = {}
    own: dict[str, Any] | None = None
    for file in sorted(folder.glob("*.json")):
        if file.name == EVALUATION_FILE:
            own = read_object(file)
            continue
        name = _STAGE_FILE.fullmatch(file.name)
        if name is None or name[2] not in get_args(Stage):
            raise UserError(f"{file}: the name must be <number>_<stage>.json; stages: {', '.join(get_args(Stage))}.")
        if int(name[1]) in stages:
            raise UserError(f"{file}: {stages[int(name[1])].file.name} has the same number.")
        keys = _read_keys(file)
        _refuse_decided(file, keys)
        stages[int(name[1])] = StageFile(name[2], keys, file)  # type: ignore[arg-type]
    if sorted(stages) != list(range(1, len(stages) + 1)):
        raise UserError(f"{folder}: the stages are numbered {sorted(stages)}; 1, 2, ... without a gap is needed.")
    options = {key: value for key, value in {**evaluation, **(own or {})}.items() if value is not None}
    if ("base_model_name_or_path" in options) == bool(stages):
        raise UserError(
            f"{folder}: a recipe has stages (1_<stage>.json) or an {EVALUATION_FILE} with base_model_name_or_path, "
            f"not {'both' if stages else 'neither'}."
        )
    if unknown := [key for key in options if key not in (*EVALUATION_KEYS, "base_model_name_or_path")]:
        allowed = ", ".join(EVALUATION_KEYS)
        raise UserError(f"{folder / EVALUATION_FILE}: unknown option {unknown[0]!r}; allowed: {allowed}.")
    for key in ("base_model_name_or_path", "local_data_dir", "task_to_instructions_fp", "settings"):
        if not isinstance(options.get(key, ""), str):
            raise UserError(f"{folder / EVALUATION_FILE}: {key} is {options[key]!r}; a string is needed.")
    tasks = options.get("tasks")
    if not (isinstance(tasks, list) and tasks and all(isinstance(task, str) for task in tasks)):
        raise UserError(f"{folder / EVALUATION_FILE}: tasks must list at least one task, here or in the set's file.")
    return Recipe(folder.name, tuple(stages[number] for number in sorted(stages)), options)


def _variants(file: Path, sweep: object, recipe: Recipe) -> list[Recipe]:
    """A recipe with each combination of the values to try that concern its stages."""
    sections = ("all", *get_args(Stage))
    if not isinstance(sweep, dict) or not all(isinstance(keys, dict) for keys in sweep.values()):
        raise UserError(f"{file}: sweep must be an object of sections, each an object of keys with the values to try.")
    if unknown := [section for section in sweep if section not in sections]:
        raise UserError(f"{file}: sweep has the unknown section {unknown[0]!r}; allowed: {', '.join(sections)}.")
    stages = {stage.stage for stage in recipe.stages}
    choices: list[list[tuple[str, str, Any]]] = []
    for section, key, values in [(section, *item) for section, keys in sweep.items() for item in keys.items()]:
        _refuse_decided(file, [key])
        if not isinstance(values, list) or not values or not all(map(_is_plain, values)):
            raise UserError(f"{file}: sweep.{section}.{key} is {values!r}; a list of numbers or words is needed.")
        if section in stages or (section == "all" and stages):
            choices.append([(section, key, value) for value in values])
    found = []
    for chosen in itertools.product(*choices):
        name = ",".join([recipe.name, *(f"{section}.{key}={value}" for section, key, value in chosen)])
        changed = [
            of._replace(keys=of.keys | {key: value for section, key, value in chosen if section in ("all", of.stage)})
            for of in recipe.stages
        ]
        found.append(replace(recipe, name=name, stages=tuple(changed)))
    return found


def _is_plain(value: object) -> bool:
    """Whether a value can stand in a recipe's name, and so in that of a folder."""
    return type(value) in (bool, int, float) or (isinstance(value, str) and bool(re.fullmatch(r"[\w.-]+", value)))


def _read_keys(file: Path) -> dict[str, Any]:
    """A file's content without what only editors read, which decides nothing of a run."""
    return {key: value for key, value in read_object(file).items() if key != SCHEMA_KEY}


def _refuse_decided(file: Path, keys: Iterable[str]) -> None:
    if decided := [key for key in keys if key in DECIDED_KEYS]:
        raise UserError(f"{file}: {decided[0]} follows from the set and cannot be given here.")
