"""What each stage's script puts together, before weights are there: objective, collator, rows, and a model of shapes.

The scripts (`experiments/run_*.py`) do the same with a loaded model; `tests/planning/test_plan.py` holds what both say
of a run side by side.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from llm2vec.data.blocks import TEXT_SUFFIXES, open_blocks
from llm2vec.data.collation import Collate, CollateSides, Side
from llm2vec.data.sources import find_files
from llm2vec.files import read_object
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import Backbone, add_token_rows, parse_dtype, set_attention_dropout
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.language_modelling import ContrastiveLanguageModelling, LanguageModelling
from llm2vec.objectives.mntp import MaskedNextTokenPrediction, mask_tokens
from llm2vec.objectives.token_set import CollateBlocks, TokenSetPrediction
from llm2vec.train.config import DATASET_NAMES, KEYS, Config
from llm2vec.train.model import decoder_of, with_adapter
from llm2vec.train.rows import Rows, open_rows, open_running_text, open_texts, sources_of
from llm2vec.types import Objective, Stage, UserError, first_line


def stage_of(path: Path) -> Stage:
    """Which script a config is for, by the keys that only some stages read.

    Raises:
        UserError: it has none that tells.
    """
    try:
        keys = read_object(path)
    except UserError:
        return "stage_I"  # whatever the stage, reading the config says what is wrong
    if keys.get("dataset_name", "E5") not in DATASET_NAMES:
        return "mntp"
    stages = set(get_args(Stage))
    for key in keys:
        stages &= set(KEYS[key].stages if key in KEYS else stages)
    if stages == {"stage_II", "simcse"}:  # of the two, one has files of its own
        stages = {"simcse" if keys.get("dataset_name") == "Wiki1M" else "stage_II"}
    if len(stages) != 1:
        choices = ", ".join(get_args(Stage))
        raise UserError(f"{path}: no key tells which script it is for; say it with --stage (one of {choices}).")
    return stages.pop()


def has_head(config: Config) -> bool:
    """Whether a run needs the language model's head."""
    return config.stage in ("stage_I", "lm", "mntp") or config.lm_weight > 0


def shape_of(base: str) -> PretrainedConfig:
    """A base's `config.json`.

    Raises:
        UserError: it cannot be read; says what can be given instead.
    """
    try:
        shape: PretrainedConfig = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path: {base!r} has no config.json that can be read here ({first_line(error)}); to plan "
            "without it, name a model of the same shape with --base, a folder or a hub name."
        ) from error
    return shape


def model_of_shapes(config: Config, shape: PretrainedConfig, new_tokens: list[int]) -> Backbone:
    """The model that `run_model.load_model` would load, in training mode, but without weights (on the meta device).

    Raises:
        UserError: a family that cannot take the adapter or the dropout.
    """
    dtype = parse_dtype(config.torch_dtype)
    model_class = AutoModelForCausalLM if has_head(config) else AutoModel
    with torch.device("meta"):
        model = model_class.from_config(shape, dtype=getattr(shape, "dtype", None) if dtype == "auto" else dtype)
        if new_tokens:
            add_token_rows(model, new_tokens, 0)
        if config.use_peft:
            model = with_adapter(config, model, new_tokens)
    if config.stage == "simcse":
        set_attention_dropout(model, config.simcse_dropout)
    model.train()
    return model


def objective_of(config: Config, model: Any, settings: EncoderSettings) -> Objective:
    """The stage's objective.

    Raises:
        UserError: it does not fit the model.
    """
    if config.stage == "stage_I" and config.objective == "token_set":
        return TokenSetPrediction(model)
    if config.stage == "stage_I":
        return BidirectionalReconstruction(model, settings, config.alpha, config.target)
    if config.stage == "lm":
        return LanguageModelling(model)
    if config.stage == "mntp":
        return MaskedNextTokenPrediction(model)
    contrastive = ContrastiveLearning(
        decoder_of(model),
        settings,
        config.loss_scale,
        matryoshka_dims=config.matryoshka_dims,
        distillation_weight=config.distillation_weight,
    )
    if config.lm_weight > 0:
        return ContrastiveLanguageModelling(contrastive, LanguageModelling(model), config.lm_weight)
    return contrastive


def collate_of(
    config: Config, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings
) -> Collate:
    """What makes the stage's rows into a batch.

    Raises:
        UserError: the template does not serve the objective, or the tokenizer lacks a token it needs.
    """
    if config.stage == "mntp":
        masking: Any = mask_tokens(
            tokenizer, config.mask_token_type, config.mlm_probability, config.data_collator_type, args.seed
        )
        return masking
    renderer = row_tokenizer(tokenizer, settings, reconstruct_instruction=config.reconstruct_instruction)
    if config.stage == "stage_I" and config.objective == "token_set":
        return CollateBlocks(renderer)
    if config.stage == "lm":
        return CollateSides(row_tokenizer(tokenizer, dataclasses.replace(settings, template="plain")), ("text",))
    running_text = row_tokenizer(tokenizer, dataclasses.replace(settings, template="plain", pooling_mode="mean"))
    return CollateSides(renderer, sides_of(config), config.examples_per_query, args.seed, text_tokenizer=running_text)


def sides_of(config: Config) -> tuple[Side, ...]:
    """The sides that the stage's objective reads of a row."""
    if config.stage == "lm":
        return ("text",)
    sides: list[Side] = ["query", "positive"]
    sides += ["negative"] if config.stage == "stage_II" and config.num_hard_negatives else []
    sides += ["text"] if config.lm_weight > 0 else []
    return tuple(sides)


def missing_data(config: Config) -> str | None:
    """Why a config's rows cannot be read here, as a sentence; None = they are there.

    Raises:
        UserError: the config names a source that its table does not have.
    """
    path = Path(config.dataset_file_path or "")
    if config.hub_dataset is None and config.sources_file is None and path.suffix in TEXT_SUFFIXES:
        return None if path.is_file() else f"dataset_file_path: {path} is not there."
    place = sources_of(config) if config.hub_dataset is None else None
    try:
        if place is None:
            open_running_text(config)
        else:
            find_files(*place)
    except UserError as error:
        return str(error)
    return None


def rows_of(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> Rows | None:
    """The stage's rows; None = they are made of tokens, and there is no tokenizer.

    Raises:
        UserError: as opening them for training.
    """
    if config.stage == "simcse":
        return open_texts(config)
    if config.stage != "mntp":
        return open_rows(config, config.num_hard_negatives if config.stage == "stage_II" else 0)
    if tokenizer is None:
        return None
    held_out = {"max_rows": config.max_train_samples, "num_held_out": config.num_eval_rows}
    return open_blocks(open_running_text(config), tokenizer, config.max_seq_length, **held_out)  # type: ignore[arg-type]
