"""LLM2Vec models under mteb 2: the encoder, the tasks and the evaluation. The only module that imports mteb.

Used by `experiments/mteb_eval_custom.py`, or in process, with the tasks loaded once for any number of models:

    tasks = load_tasks(["SciFact", "MyOwnSet"], local_data_dir="cache/eval")
    encoder = LLM2VecEncoder(model, ["output/stage_I", "output/stage_II"], load_instructions(PATH))
    scores = evaluate(encoder, tasks, "results")        # {"SciFact": {"metric": "ndcg_at_10", "main_score": 0.7, ...}}
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import mteb
import numpy as np
from datasets import Dataset, get_dataset_config_names
from huggingface_hub import try_to_load_from_cache
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask, get_abstask_prompt
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.models_protocols import MTEBModels
from mteb.results import TaskResult
from mteb.types import Array, BatchedInput, EncodeKwargs, PromptType
from torch.utils.data import DataLoader

from llm2vec.checkpoint import resolve_chain
from llm2vec.llm2vec import LLM2Vec
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

#: The benchmark of the paper. Its tasks are taken as it defines them: English subsets, MSMARCO on dev.
BENCHMARK = "MTEB(eng, v1)"
#: What decides a checkpoint's vectors, besides the settings. Not run.json: its dates would change the hash.
CHECKPOINT_FILES = ("*.safetensors", "*config.json", "tokenizer*")
RETRIEVAL_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.jsonl")


class TaskScore(TypedDict):
    """The result of one task; scores run from 0 to 1 (correlations from -1)."""

    metric: str
    main_score: float
    scores: dict[str, dict[str, float]]
    result_file: str


class LLM2VecEncoder(AbsEncoder):
    """An `LLM2Vec` as an mteb 2 encoder (cosine similarity, float32).

    Queries of retrieval and reranking carry the task's instruction, their documents carry none, and in all other
    tasks every text carries it. (mteb's own rule would give it to the documents of all reranking tasks and of
    CQADupstack as well.)
    """

    def __init__(
        self, model: LLM2Vec, model_paths: Sequence[str | Path], task_to_instructions: Mapping[str, str]
    ) -> None:
        """Wrap a model.

        Args:
            model: The model.
            model_paths: Where it was loaded from: the base model, then its adapters in order. Directories or names
                on the hub. They give the model its name; the weights below them are part of the revision.
            task_to_instructions: Task name -> instruction. A task that is missing here is run with mteb's own
                instruction, and a warning.

        Raises:
            UserError: A directory of `model_paths` holds no safetensors weights.
        """
        self.model = model
        self.task_to_instructions = dict(task_to_instructions)
        self._fallbacks: dict[str, str] = {}
        paths = [str(path) for path in model_paths]
        chain = resolve_chain(paths[0], paths[1:])
        self.mteb_model_meta: ModelMeta = ModelMeta.create_empty(
            {
                "name": model_name(paths),
                "revision": self._revision([chain.base, *chain.adapters]),
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["LLM2Vec", "PyTorch"],
                "use_instructions": True,
            }
        )

    def _revision(self, paths: Sequence[str]) -> str:
        """Hash of all that decides a score, because mteb looks for old results by name and revision only."""
        parts = {
            "checkpoints": [_checkpoint_revision(path) for path in paths],
            "dtype": str(next(self.model.parameters()).dtype),
            # The adapters below are hashed with the checkpoints; where they lie does not matter.
            "settings": dataclasses.asdict(dataclasses.replace(self.model.settings, parent_adapters=None)),
            "instructions": self.task_to_instructions,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def instruction(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """The instruction that texts of one side of a task carry.

        Args:
            task_metadata: The task.
            prompt_type: query or document in retrieval and reranking, None in all other tasks.

        Returns:
            The instruction; empty for documents.
        """
        if prompt_type == PromptType.document:
            return ""
        name = task_metadata.name
        if name in self.task_to_instructions:
            return self.task_to_instructions[name]
        if name not in self._fallbacks:
            prompt = task_metadata.prompt
            own = (prompt.get("query") if isinstance(prompt, dict) else prompt) or get_abstask_prompt(name)
            # The closing colon is the convention of the released table.
            self._fallbacks[name] = f"{own.rstrip('.: ')}:" if own else ""
            logger.warning('No instruction is given for task %s: using mteb\'s, "%s"', name, self._fallbacks[name])
        return self._fallbacks[name]

    # The keywords are typed by mteb's protocol; what is not known here (precision) is refused, not swallowed.
    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Unpack[EncodeKwargs],
    ) -> Array:
        """Encode one side of a task; equal texts are encoded once.

        Args:
            inputs: Batches of dicts; the texts are under "text".
            task_metadata: The task, for its instruction.
            hf_split: Part of mteb's protocol; not used.
            hf_subset: Part of mteb's protocol; not used.
            prompt_type: Side of a retrieval or reranking task, None in other tasks.
            **kwargs: `batch_size`, texts a forward pass, default 32; `show_progress_bar`, default False.

        Returns:
            Vectors [N, D], a row for each input text in input order, not normalised.

        Raises:
            UserError: `kwargs` holds anything else.
        """
        if unknown := kwargs.keys() - {"batch_size", "show_progress_bar"}:
            raise UserError(f"LLM2VecEncoder has no {', '.join(sorted(unknown))}; take it out of encode_kwargs.")
        instruction = self.instruction(task_metadata, prompt_type)
        texts = [text for batch in inputs for text in batch["text"]]
        row_of_text = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        vectors: Array = self.model.encode(
            [[instruction, text] for text in row_of_text],
            batch_size=kwargs.get("batch_size", 32),
            show_progress_bar=kwargs.get("show_progress_bar", False),
        )
        return vectors[[row_of_text[text] for text in texts]]


def model_name(paths: Sequence[str]) -> str:
    """A name of mteb's form "organisation/name" for a base model and its adapters.

    Args:
        paths: Directories or hub names, base model first. `output/stage_I` gives "output/stage_I", and a second one,
            `output/stage_II`, makes it "output/stage_I+output-stage_II".

    Returns:
        The name, of letters, digits and `._+-` on either side of the slash, so that it can name a folder.
    """
    steps = []
    for path in paths:
        parts = Path(path).resolve().parts if Path(path).is_dir() else Path(path).parts
        steps.append([_safe(part) for part in ("local", *parts)[-2:]])
    (organisation, base), *adapters = steps
    return f"{organisation}/{'+'.join([base, *('-'.join(adapter) for adapter in adapters)])[:150]}"


def load_instructions(path: str | Path) -> dict[str, str]:
    """Read a table of instructions: one JSON object, task name -> instruction.

    Args:
        path: The file, for instance `test_configs/mteb/task_to_instructions.json`.

    Returns:
        The table.

    Raises:
        UserError: The file is missing, is not JSON or holds anything else.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the instructions {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"The instructions {path} are not valid JSON: {error}.") from error
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise UserError(f"The instructions {path} must be one JSON object, task name -> instruction (a string).")
    return table


def load_tasks(task_names: Sequence[str], local_data_dir: str | Path | None = None) -> list[AbsTask]:
    """Find tasks by name and read their data.

    A name of MTEB(eng, v1) gives the task as that benchmark defines it (English subset, MSMARCO on dev), any other
    name of mteb gives mteb's task, and the name of a folder in `local_data_dir` with a retrieval set in the hub's
    layout (or just corpus.jsonl, queries.jsonl and qrels/test.jsonl) gives a retrieval task of that name.

    Args:
        task_names: Names of tasks.
        local_data_dir: Where data sets are read from instead of the hub: a set lies under its hub path, say
            `mteb/scifact/`. Default: the hub.

    Returns:
        The tasks in the same order, data loaded; `evaluate` takes them again and again.

    Raises:
        UserError: A name is unknown, or a data set is missing, unreachable or malformed.
    """
    folder = None if local_data_dir is None else Path(local_data_dir)
    tasks = [_find_task(name, folder) for name in task_names]
    for task in tasks:
        for part in _parts(task) or [task]:
            _load_data(part)
    return tasks


def evaluate(
    model: MTEBModels,
    tasks: Iterable[AbsTask],
    output_dir: str | Path,
    *,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> dict[str, TaskScore]:
    """Score a model. Results that lie in `output_dir` already, for this revision and this data, are not made anew.

    Args:
        model: An `LLM2VecEncoder`, or any other model mteb takes.
        tasks: Tasks from `load_tasks`.
        output_dir: Root of the result files, `results/<model>/<revision>/<task>.json`.
        batch_size: Texts a forward pass.
        show_progress_bar: Whether progress is shown.

    Returns:
        Task name -> metric, mean main score, main score of each split and subset, and the result file.

    Note:
        mteb seeds the process's generators (`random`, numpy, torch) whenever it makes a task or scores one.
    """
    cache = ResultCache(output_dir)
    meta = model.mteb_model_meta
    scores: dict[str, TaskScore] = {}
    for task in tasks:
        for part in (task, *_parts(task)):
            # Some tasks draw samples from a generator they keep: a second model would be given other samples.
            part.rng_state, part.np_rng = random.Random(part.seed), np.random.default_rng(part.seed)
        result = mteb.evaluate(
            model,
            task,
            co2_tracker=False,
            cache=cache,
            overwrite_strategy="always" if _is_stale(cache, meta, task) else "only-missing",
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress_bar},
            show_progress_bar=show_progress_bar,
        )
        file = cache.get_task_result_path(task.metadata.name, meta)
        scores[task.metadata.name] = _task_score(task, result.task_results[0], file)
    return scores


def _task_score(task: AbsTask, result: TaskResult, file: Path) -> TaskScore:
    # Rounded as mteb rounds in its files, so that a score read back equals the score when it was made.
    scores = {
        split: {subset["hf_subset"]: round(float(subset["main_score"]), 6) for subset in subsets}
        for split, subsets in result.scores.items()
    }
    values = [score for subsets in scores.values() for score in subsets.values()]
    return {
        "metric": task.metadata.main_score,
        "main_score": sum(values) / len(values),
        "scores": scores,
        "result_file": str(file),
    }


def _is_stale(cache: ResultCache, meta: ModelMeta, task: AbsTask) -> bool:
    """Whether a kept result is of other data or cannot be read; mteb would return the one and fail on the other."""
    for part in (task, *_parts(task)):
        try:
            kept = cache.load_task_result(part.metadata.name, meta)
        except ValueError:
            logger.warning("The kept result of %s cannot be read and is made anew", part.metadata.name)
            return True
        if kept is not None and kept.dataset_revision != part.metadata.revision:
            return True
    return False


def _parts(task: AbsTask) -> list[AbsTask]:
    """The tasks an aggregate (CQADupstackRetrieval) is the mean of; none for any other task."""
    return task.metadata.tasks if isinstance(task, AbsTaskAggregate) else []


def _find_task(name: str, folder: Path | None) -> AbsTask:
    benchmark = {task.metadata.name: task for task in mteb.get_benchmark(BENCHMARK).tasks}
    try:
        task = mteb.get_task(name)
    except KeyError:
        return _own_retrieval(name, folder)
    if name in benchmark:
        task = mteb.get_task(name, eval_splits=benchmark[name].eval_splits, hf_subsets=benchmark[name].hf_subsets)
    if isinstance(task, AbsTaskAggregate):
        # mteb keeps one object a part for the whole process; ours get data of their own.
        task.metadata = task.metadata.model_copy(update={"tasks": [copy.copy(part) for part in task.metadata.tasks]})
    if folder is not None:
        _use_local_data(task, folder)
    return task


def _use_local_data(task: AbsTask, folder: Path) -> None:
    """Point a task at copies of its data sets. Their content makes the revision: nothing else can vouch for it."""
    leaves = _parts(task) or [task]
    copies = [folder / part.metadata.dataset["path"] for part in leaves]
    if missing := [str(path) for path in copies if not path.is_dir()]:
        raise UserError(f"Task {task.metadata.name} needs data that is not there: looked for {', '.join(missing)}.")
    for part, path in zip(leaves, copies, strict=True):
        _set_dataset(part, path=str(path.resolve()), revision=_local_revision(path))
        if part.fast_loading and set(part.hf_subsets) <= set(get_dataset_config_names(str(path.resolve()))):
            part.fast_loading = False  # it reads all languages at once, which a copy of one does not hold
    if isinstance(task, AbsTaskAggregate):
        _set_dataset(task, revision="+".join(part.metadata.revision for part in leaves))


def _set_dataset(task: AbsTask, **values: str) -> None:
    task.metadata = task.metadata.model_copy(update={"dataset": {**task.metadata.dataset, **values}})


def _load_data(task: AbsTask) -> None:
    path = task.metadata.dataset["path"]
    try:
        task.load_data()
    except Exception as error:
        # An unreachable hub, a missing file and rows of another form each raise a type of their own.
        reason = str(error).partition("\n")[0]
        advice = "" if Path(path).is_dir() else f"; without the hub, give a copy of it as <local_data_dir>/{path}"
        raise UserError(f"Task {task.metadata.name}: cannot load the data set {path} ({reason}){advice}.") from error


def _own_retrieval(name: str, folder: Path | None) -> AbsTask:
    """A retrieval task of the user's own, from the folder of its name."""
    source = (folder or Path()) / name
    if folder is None or source.parent != folder or not source.is_dir():
        raise UserError(_unknown_task(name, folder))

    class OwnRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description=f"Retrieval over {name}",
            type="Retrieval",
            dataset={"path": str(source.resolve()), "revision": _local_revision(source)},
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            prompt=AbsTaskRetrieval.abstask_prompt,
        )

    task = OwnRetrieval()
    readme = source / "README.md"
    if not (readme.is_file() and "configs:" in readme.read_text(encoding="utf-8")):
        task.dataset = {"default": {"test": _read_retrieval(source)}}
        task.data_loaded = True
    return task


def _unknown_task(name: str, folder: Path | None) -> str:
    known = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
    near = difflib.get_close_matches(name, known, n=3)
    said = f"mteb knows no task {name}" + (f" (nearest: {', '.join(near)})" if near else "")
    if folder is None:
        return f"{said}; a retrieval set of your own is read from <local_data_dir>/{name}."
    return f"{said}, and there is no folder {folder / name} with a retrieval set of your own."


def _read_retrieval(folder: Path) -> RetrievalSplitData:
    """Read corpus.jsonl (`_id`, `text`, perhaps `title`), queries.jsonl and qrels/test.jsonl."""
    if missing := [name for name in RETRIEVAL_FILES if not (folder / name).is_file()]:
        raise UserError(f"The retrieval set {folder} lacks {', '.join(missing)}.")
    documents, queries, judgements = (folder / name for name in RETRIEVAL_FILES)
    relevant: dict[str, dict[str, int]] = {}
    for row in _read_jsonl(judgements, ("query-id", "corpus-id", "score")):
        relevant.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(row["score"])
    # An absent title must be empty for mteb, not None.
    corpus = [
        {"id": str(row["_id"]), "title": row.get("title") or "", "text": row["text"]}
        for row in _read_jsonl(documents, ("_id", "text"))
    ]
    judged = [
        {"id": str(row["_id"]), "text": row["text"]}
        for row in _read_jsonl(queries, ("_id", "text"))
        if str(row["_id"]) in relevant
    ]
    if not corpus or not judged:
        raise UserError(f"The retrieval set {folder} has {len(corpus)} documents and {len(judged)} judged queries.")
    return RetrievalSplitData(
        corpus=Dataset.from_list(corpus), queries=Dataset.from_list(judged), relevant_docs=relevant, top_ranked=None
    )


def _read_jsonl(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from error
            if not isinstance(row, dict) or not row.keys() >= set(keys):
                raise UserError(f"{path}, line {number}: expected an object with the keys {', '.join(keys)}.")
            yield row


def _checkpoint_revision(path: str) -> str:
    """Hash of a local checkpoint's files; for a model on the hub its commit, or its name if none is cached."""
    if Path(path).is_dir():
        if not any(Path(path).glob("*.safetensors")):
            raise UserError(f"The directory {path} holds no safetensors weights.")
        return _files_hash(Path(path), {file for pattern in CHECKPOINT_FILES for file in Path(path).glob(pattern)})
    for config in ("config.json", "adapter_config.json"):
        cached = try_to_load_from_cache(path, config)
        if isinstance(cached, str):
            return Path(cached).parent.name
    return path


def _local_revision(folder: Path) -> str:
    return "local-" + _files_hash(folder, {file for file in folder.rglob("*") if file.is_file()})


def _files_hash(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)
