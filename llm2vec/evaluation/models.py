"""Any embedding model for an evaluation: one of ours, a sentence-transformers model, a name in mteb's registry."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sentence_transformers import SentenceTransformer

from llm2vec.choice import ModelChoice
from llm2vec.evaluation.files import load_instructions
from llm2vec.evaluation.mteb_adapter import LLM2VecEncoder, is_registered, registered_model, wrap_sentence_transformer
from llm2vec.evaluation.provenance import recorded_runs, trained_from, training_sets
from llm2vec.files import json_hash
from llm2vec.hub import find_file
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import open_sentence_transformer, parse_dtype
from llm2vec.model.chain import model_name, read_run, revision_of
from llm2vec.model.settings import SETTINGS_FILE, read_settings
from llm2vec.model.vault import MODULES_FILE, Folder
from llm2vec.text.entries import INSTRUCTIONS_FILE
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

Kind = Literal["llm2vec", "sentence-transformers", "mteb"]

DTYPE = "bfloat16"
#: Settings that an evaluation may choose, beside the attention.
CHOSEN_SETTINGS = (
    "pooling_mode", "max_length", "doc_max_length", "skip_instruction", "template", "instruction_join",
)  # fmt: skip
#: Published chains: mteb's registry cannot load its own entries of this form, and they are two adapters each.
PUBLISHED = re.compile(r"(.+/LLM2Vec-.+-mntp)-(?:supervised|unsup-simcse)")
#: Upstream trained these without a template, as it had none for Llama 3.1; their tokenizer suggests `llama3`.
PUBLISHED_WITHOUT_TEMPLATE = re.compile(r".+/LLM2Vec-Meta-Llama-31-.+-mntp(?:-supervised|-unsup-simcse)?")


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to be scored, and how it is run."""

    model: ModelChoice  #: The model; no dtype = `DTYPE` for our models, the model's own for others
    #: Table of instructions; None = `INSTRUCTIONS_FILE` for our models, the model's own for others
    instructions_file: str | None = None
    #: How texts become vectors, for our models: an `llm2vec_config.json`, whose settings stand above the model's own
    settings_file: str | None = None
    template: str | None = None  #: Key of `templates.TEMPLATES`, likewise; None = as the settings say
    max_length: int | None = None  #: Tokens a text is cut to; None = the model's own
    attn_implementation: str | None = None  #: As in transformers
    device: str | None = None  #: Where it runs; None = the first CUDA device of the process where there is one
    #: An export of ours is run as mteb's leaderboard would: by sentence-transformers, with its prompts
    as_published: bool = False


def kind_of(asked: EvaluatedModel) -> Kind:
    """How a model is loaded: a name of mteb's registry by mteb, unless adapters are given; else by its files."""
    base = asked.model.base
    if asked.as_published:
        if asked.model.adapters or find_file(base, MODULES_FILE) is None:
            raise UserError(
                f"{base} is no model that sentence-transformers loads, which the leaderboard needs: "
                "export it with its table of instructions (llm2vec export) and score the export."
            )
        return "sentence-transformers"
    if asked.model.adapters or PUBLISHED.fullmatch(base):
        return "llm2vec"
    if not Path(base).is_dir() and is_registered(base):
        return "mteb"
    is_ours = find_file(base, SETTINGS_FILE) is not None or find_file(base, MODULES_FILE) is None
    return "llm2vec" if is_ours else "sentence-transformers"


def load_encoder(asked: EvaluatedModel) -> Any:
    """Load a model for `scores.evaluate`, and say how; a `UserError` where it or one of its options is of no use."""
    prompts = f"prompts of {asked.instructions_file}" if asked.instructions_file else "with its own prompts"
    load, how = {
        "llm2vec": (_llm2vec, "by this project"),
        "sentence-transformers": (_sentence_transformer, f"by sentence-transformers, {prompts}"),
        "mteb": (_registered, "by mteb's registry, with mteb's prompts"),
    }[kind_of(asked)]
    encoder = load(asked)
    meta = encoder.mteb_model_meta
    logger.info("Model: %s, loaded %s; revision %s", meta.name, how, meta.revision)
    return encoder


def _llm2vec(asked: EvaluatedModel) -> LLM2VecEncoder:
    instructions = load_instructions(asked.instructions_file or INSTRUCTIONS_FILE)
    base, adapters = asked.model.base, list(asked.model.adapters)
    if (published := PUBLISHED.fullmatch(base)) and not adapters:
        base, adapters = published.group(1), [base]
    is_without = PUBLISHED_WITHOUT_TEMPLATE.fullmatch([base, *adapters][-1])
    settings = {} if asked.settings_file is None else read_settings(Path(asked.settings_file))
    attention = settings.get("attention")
    chosen: dict[str, Any] = {name: settings.get(name) for name in CHOSEN_SETTINGS}
    chosen["template"] = asked.template or chosen["template"] or ("plain" if is_without else None)
    chosen["max_length"] = asked.max_length or chosen["max_length"]
    model = LLM2Vec.from_pretrained(
        base,
        peft_model_name_or_path=adapters or None,
        enable_bidirectional=None if attention is None else attention == "bidirectional",
        **chosen,
        torch_dtype=asked.model.torch_dtype or DTYPE,
        attn_implementation=asked.attn_implementation,
        device_map=asked.device,
    )
    return LLM2VecEncoder(model, [base, *adapters], instructions)


def _sentence_transformer(asked: EvaluatedModel) -> Any:
    for option in ("settings_file", "template"):
        if getattr(asked, option) is not None:
            who = "sentence-transformers decides how it is run"
            raise UserError(f"{option} has no effect on {asked.model.base}: {who}.")
    prompts = None if asked.instructions_file is None else load_instructions(asked.instructions_file)
    dtype = None if asked.model.torch_dtype is None else parse_dtype(asked.model.torch_dtype)
    model = open_sentence_transformer(
        asked.model.base, dtype=dtype, attn_implementation=asked.attn_implementation, device=asked.device
    )
    if asked.max_length is not None:
        model.max_seq_length = asked.max_length
    revision = json_hash(
        {
            "checkpoint": revision_of(asked.model.base),
            "dtype": str(next(model.parameters()).dtype),
            "max_length": model.max_seq_length,
            "prompts": prompts,
        }
    )
    if prompts and not any(model.prompts.values()):
        logger.warning(
            "instructions of %s are put before the texts of %s, which has no prompts of its own: "
            "unless it was trained with instructions, they lower its scores",
            asked.instructions_file, asked.model.base,
        )  # fmt: skip
    folder = Folder(asked.model.base, read_run(Path(asked.model.base)))
    runs, parameters = recorded_runs([folder]), list(model.parameters())
    facts = {
        "name": model_name([asked.model.base]),
        "revision": revision,
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "memory_usage_mb": round(sum(parameter.nbytes for parameter in parameters) / 2**20),
        "use_instructions": any(model.prompts.values()) or prompts is not None,
        **training_sets(runs),
    }
    if (origin := trained_from(asked.model.base, runs)) is not None:
        facts["adapted_from"] = origin
    encoder = wrap_sentence_transformer(model, facts)
    return encoder if prompts is None else PromptedEncoder(encoder, model, prompts)


def _registered(asked: EvaluatedModel) -> Any:
    given = {**vars(asked), "torch_dtype": asked.model.torch_dtype}
    options = "instructions_file", "settings_file", "template", "max_length", "torch_dtype", "attn_implementation"
    for option in options:
        if given[option] is not None:
            raise UserError(f"{option} has no effect on {asked.model.base}: mteb's registry decides how it is run.")
    return registered_model(asked.model.base, asked.device)


class PromptedEncoder:
    """A sentence-transformers model whose prompts come from a table (Instructor: one for each task).

    `prompts`: task name -> what is put before its texts, word for word; in retrieval and reranking that is before the
    queries, and `<task name>-document` may name a prompt for the documents. mteb's own encoder does the tasks that the
    table leaves out.
    """

    def __init__(self, encoder: Any, model: SentenceTransformer, prompts: Mapping[str, str]) -> None:
        self.encoder, self.model, self.prompts = encoder, model, prompts
        self.mteb_model_meta = encoder.mteb_model_meta
        self.similarity = encoder.similarity
        self.similarity_pairwise = encoder.similarity_pairwise
        self._said: set[str] = set()

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **rest: Any) -> Any:
        """Encode one side of a task, as mteb asks for it."""
        name = task_metadata.name
        if name not in self.prompts:
            if name not in self._said:
                logger.warning("No prompt is given for task %s: using the model's own, %s", name, self.model.prompts)
            self._said.add(name)
            return self.encoder.encode(inputs, task_metadata=task_metadata, prompt_type=prompt_type, **rest)
        texts = [text for batch in inputs for text in batch["text"]]
        options = {key: rest[key] for key in ("batch_size", "show_progress_bar") if key in rest}
        side = None if prompt_type is None else prompt_type.value
        if side == "document":
            return self.model.encode_document(texts, prompt=self.prompts.get(f"{name}-document", ""), **options)
        encode = self.model.encode if side is None else self.model.encode_query
        return encode(texts, prompt=self.prompts[name], **options)
