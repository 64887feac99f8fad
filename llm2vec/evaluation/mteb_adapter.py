"""Models and tasks under mteb 2: the encoder, the search, tasks by name, one run of one task. Only this imports mteb.

`scores` says what is run and what is kept; `run` and `jobs` share the work out.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard, Unpack

import mteb
from datasets import Dataset
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask, get_abstask_prompt
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.models_protocols import EncoderProtocol, MTEBModels, SearchProtocol
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper, SparseEncoderWrapper
from mteb.results import TaskResult
from mteb.types import Array, BatchedInput, EncodeKwargs, PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from llm2vec.evaluation.files import retrieval_set_of, use_local_data
from llm2vec.evaluation.provenance import recorded_runs, training_sets
from llm2vec.files import data_revision, json_hash
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.chain import model_name, open_chain, revision_of
from llm2vec.types import TextSide, UserError, in_one_sentence

logger = logging.getLogger(__name__)

#: The benchmark of the paper. Its tasks are taken as it defines them: English subsets, MSMARCO on dev.
BENCHMARK = "MTEB(eng, v1)"
#: Words that `evaluation.expand` takes for sets of tasks; here, so that a word misspelt is told the nearest.
TASK_SETS = ("subset15", "mteb56", "beir14")


# --- models ---


class LLM2VecEncoder(AbsEncoder):
    """An `LLM2Vec` as an mteb 2 encoder (cosine similarity, float32).

    Queries of retrieval and reranking carry the task's instruction, their documents carry none and take the template's
    document form, and in all other tasks every text carries it and is read as a query. (mteb's own rule would give it
    to the documents of all reranking tasks and of CQADupstack as well.)
    """

    def __init__(
        self, model: LLM2Vec, model_paths: Sequence[str | Path], task_to_instructions: Mapping[str, str]
    ) -> None:
        """Wrap a model that was loaded from `model_paths`, directories or names on the hub: the base model, then its
        adapters in order. They give it its name, and their weights are part of its revision; a directory without
        safetensors weights is a `UserError`. A task without an instruction is run with mteb's own, and a warning."""
        self.model = model
        self.task_to_instructions = dict(task_to_instructions)
        self._fallbacks: dict[str, str] = {}
        paths = [str(path) for path in model_paths]
        chain = open_chain(paths[0], paths[1:])
        runs = [run for folder in chain.folders for run in folder.run.get("stages", [folder.run])]
        pairs = [pair for run in runs for data in run.get("data", []) for pair in data.get("instructions", [])]
        self._trained_with = {text for pair in pairs for text in pair if isinstance(text, str) and text}
        self.mteb_model_meta: ModelMeta = ModelMeta.create_empty(
            {
                "name": model_name(paths),
                "revision": self._revision([chain.base, *chain.adapters]),
                "similarity_fn_name": ScoringFunction.COSINE,
                "max_tokens": model.settings.max_length,
                "framework": ["LLM2Vec", "PyTorch"],
                "use_instructions": True,
                **training_sets(recorded_runs(chain.folders)),
            }
        )

    def _revision(self, paths: Sequence[str]) -> str:
        return json_hash(
            {
                "checkpoints": [revision_of(path) for path in paths],
                "dtype": str(next(self.model.parameters()).dtype),
                # The adapters below are hashed with the checkpoints; where they lie does not matter.
                "settings": dataclasses.replace(self.model.settings, parent_adapters=None).written(),
                "instructions": self.task_to_instructions,
            }
        )

    def instruction(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """The instruction of one side of a task (None where it has no sides); empty for documents."""
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
            if self._trained_with - {self._fallbacks[name]}:  # a small model's score may fall to a third
                logger.warning(
                    'instruction  %s is scored without one that %s was trained with (%d, such as "%s"); '
                    "give --task_to_instructions_fp",
                    name, self.mteb_model_meta.name, len(self._trained_with), min(self._trained_with),
                )  # fmt: skip
        return self._fallbacks[name]

    def say_foreign(self, tasks: Iterable[str]) -> None:
        """Say which tasks have an instruction in the table that the model was not trained with; for a default table."""
        own = {text.rstrip(".:; ") for text in self._trained_with}
        given = {name: self.task_to_instructions.get(name, "") for name in tasks}
        foreign = [name for name, text in given.items() if text and text.rstrip(".:; ") not in own]
        if own and foreign:
            logger.warning(
                'instruction: %d of %d tasks have one that %s was not trained with, such as %s: "%s"; '
                'it was trained with %d, such as "%s". --task_to_instructions_fp gives others.',
                len(foreign), len(given), self.mteb_model_meta.name, foreign[0], given[foreign[0]], len(own), min(own),
            )  # fmt: skip

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

        `kwargs` may hold `batch_size`, texts a forward pass (32), and `show_progress_bar` (False); anything else is a
        `UserError`. Split and subset are not read. Returns vectors [N, D] in the order of the texts, not normalised.
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
            side="document" if prompt_type == PromptType.document else "query",
        )
        return vectors[[row_of_text[text] for text in texts]]


def wrap_sentence_transformer(model: SentenceTransformer, facts: Mapping[str, Any]) -> EncoderProtocol:
    """A sentence-transformers model with its own prompts; `facts` are values of its `ModelMeta`, name and revision."""
    wrapped = SentenceTransformerEncoderWrapper(model)
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update={"loader": None, **facts})
    return wrapped


def is_registered(name: str) -> bool:
    """Whether mteb has a model of that name."""
    return name in MODEL_REGISTRY


def registered_model(name: str, device: str | None) -> MTEBModels:
    """A model from mteb's registry; a `UserError` where mteb cannot load it here."""
    refusals = (ImportError, OSError, NotImplementedError, ValueError)
    with in_one_sentence(lambda why: f"mteb knows the model {name} but cannot load it: {why}", refusals):
        return mteb.get_model(name, device=device)


def encode_documents(model: MTEBModels, texts: list[str], batch_size: int) -> Array:
    """Vectors of texts as a retrieval task's documents, that is with no instruction."""
    if not is_dense(model):
        raise UserError(f"{model.mteb_model_meta.name} gives no vectors of texts.")
    return model.encode(
        DataLoader(Dataset.from_dict({"text": texts}), batch_size=batch_size),
        task_metadata=_defined_tasks(BENCHMARK)["NFCorpus"].metadata,
        hf_split="test",
        hf_subset="default",
        prompt_type=PromptType.document,
        batch_size=batch_size,
        show_progress_bar=False,
    )


def is_dense(model: MTEBModels) -> TypeGuard[EncoderProtocol]:
    """Whether a model gives one vector a text and leaves the search to us (BM25 and cross-encoders do not)."""
    return isinstance(model, EncoderProtocol) and not isinstance(model, SearchProtocol | SparseEncoderWrapper)


def batches_of(rows: Dataset, task_metadata: TaskMetadata, side: TextSide, size: int) -> Any:
    """What mteb would hand an encoder of some rows, as a DataLoader: titles and texts joined, prompts applied."""
    return create_dataloader(rows, task_metadata=task_metadata, prompt_type=PromptType(side), batch_size=size)


def prompt_type_of(side: TextSide) -> PromptType:
    """mteb's word for a side."""
    return PromptType(side)


# --- tasks ---


def benchmark_tasks(name: str) -> list[str] | None:
    """Names of the tasks of one of mteb's benchmarks; None if mteb has no such benchmark."""
    try:
        return [task.metadata.name for task in mteb.get_benchmark(name).tasks]
    except KeyError:
        return None


def descriptions() -> str:
    """Some thousand characters of English: what mteb says about the tasks of `BENCHMARK`."""
    return " ".join(task.metadata.description for task in _defined_tasks(BENCHMARK).values())


def find_task(name: str, local_data_dir: str | Path | None = None, benchmark: str = BENCHMARK) -> AbsTask:
    """Find a task by name; its data are not read, and mteb keeps no reference to it.

    A name of the benchmark gives the task as that benchmark defines it (MTEB(eng, v1): English subsets, MSMARCO on
    dev), any other name of mteb mteb's task, and that of a folder in `local_data_dir` with a retrieval set, in the
    hub's layout or just corpus.jsonl, queries.jsonl and qrels/test.jsonl, a retrieval task. With `local_data_dir` sets
    are read from there, each under its hub path, say `mteb/scifact/`, and not from the hub. An unknown name, or a set
    that is missing there, is a `UserError`.
    """
    folder = None if local_data_dir is None else Path(local_data_dir)
    defined = _defined_tasks(benchmark)
    try:
        task = mteb.get_task(name)
    except KeyError:
        return _own_task(name, folder)
    if name in defined:
        task = mteb.get_task(name, eval_splits=defined[name].eval_splits, hf_subsets=defined[name].hf_subsets)
    if isinstance(task, AbsTaskAggregate):
        # mteb keeps one object a part for the whole process; ours get data of their own.
        task.metadata = task.metadata.model_copy(update={"tasks": [copy.copy(part) for part in task.metadata.tasks]})
    if folder is not None:
        use_local_data(task, folder)
    return task


@functools.cache
def _defined_tasks(benchmark: str) -> dict[str, AbsTask]:
    return {task.metadata.name: task for task in mteb.get_benchmark(benchmark).tasks}


def _own_task(name: str, folder: Path | None) -> AbsTask:
    """A retrieval task of the user's own, from the folder of its name."""
    source = (folder or Path()) / name
    if folder is None or source.parent != folder or not source.is_dir():
        raise UserError(_unknown_task(name, folder))
    readme = source / "README.md"
    in_hub_layout = readme.is_file() and "configs:" in readme.read_text(encoding="utf-8")

    class OwnTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description=f"Retrieval over {name}",
            type="Retrieval",
            dataset={"path": str(source.resolve()), "revision": data_revision(source)},
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            prompt=AbsTaskRetrieval.abstask_prompt,
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            if in_hub_layout or self.data_loaded:
                return super().load_data(num_proc, **kwargs)
            corpus, queries, relevant = retrieval_set_of(source)
            split = RetrievalSplitData(
                corpus=Dataset.from_list(corpus),
                queries=Dataset.from_list(queries),
                relevant_docs=relevant,
                top_ranked=None,
            )
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return OwnTask()


@functools.cache
def _known_names() -> list[str]:
    tasks = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
    return [*tasks, *TASK_SETS, *(benchmark.name for benchmark in mteb.get_benchmarks())]


def _unknown_task(name: str, folder: Path | None) -> str:
    near = difflib.get_close_matches(name, _known_names(), n=3)
    said = f"mteb knows no task {name}" + (f" (nearest: {', '.join(near)})" if near else "")
    if folder is None:
        return f"{said}; a retrieval set of your own is read from <local_data_dir>/{name}."
    return f"{said}, and there is no folder {folder / name} with a retrieval set of your own."


# --- results ---


def run_task(
    model: MTEBModels | ModelMeta,
    task: AbsTask,
    output_dir: str | Path,
    overwrite: Literal["always", "only-missing", "only-cache"],
    *,
    encode_kwargs: EncodeKwargs | None = None,
    prediction_folder: Path | None = None,
) -> TaskResult:
    """Have mteb score a task and write the result to `output_dir`; `overwrite` is mteb's `overwrite_strategy`."""
    result = mteb.evaluate(
        model,
        task,
        co2_tracker=False,
        cache=ResultCache(output_dir),
        overwrite_strategy=overwrite,
        encode_kwargs=encode_kwargs,
        show_progress_bar=(encode_kwargs or {}).get("show_progress_bar", False),
        prediction_folder=prediction_folder,
    )
    return result.task_results[0]


def kept_result(meta: ModelMeta, task: AbsTask, output_dir: str | Path) -> TaskResult | None:
    """The result of a task in `output_dir`, of whatever data; None if there is none, ValueError or KeyError if it is
    torn."""
    return ResultCache(output_dir).load_task_result(task.metadata.name, meta)


def leaderboard_entry(meta_file: Path, facts: Mapping[str, Any]) -> ModelMeta:
    """What a `model_meta.json` says, with other facts, of a model that mteb loads by sentence-transformers."""
    kept = ModelMeta.model_validate_json_resolved(meta_file.read_bytes())
    return ModelMeta(**{**dict(kept), "loader": SentenceTransformerEncoderWrapper, **facts})


def result_file(meta: ModelMeta, task: AbsTask, output_dir: str | Path) -> Path:
    """Where the result of a task lies, or will."""
    return ResultCache(output_dir).get_task_result_path(task.metadata.name, meta)
