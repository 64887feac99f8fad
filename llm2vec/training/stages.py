"""What each stage is made of, in one table, and a run of one from its config to its last checkpoint.

A plan (`planning.plan`) puts together the same parts over a model without weights.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase, TrainerCallback

from llm2vec.data.blocks import SourceTexts, open_blocks
from llm2vec.data.collation import Collate, CollateSides
from llm2vec.data.rows import TrainingRows
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.language_modelling import ContrastiveLanguageModelling, LanguageModelling
from llm2vec.objectives.mntp import MaskedNextTokenPrediction, mask_tokens
from llm2vec.objectives.negatives import ContrastiveKeys, RowFacts
from llm2vec.objectives.stage_one import StageOneObjective, stage_one_objective
from llm2vec.training.config import Config
from llm2vec.training.config.file import load_config
from llm2vec.training.model import decoder_of, load_model, prepare_device, set_attention_dropout
from llm2vec.training.resume import start_or_resume
from llm2vec.training.rows import Rows, needs_scores, open_rows, open_running_text, open_texts
from llm2vec.training.run import run_training
from llm2vec.training.vectors import check_vectors, stored_vectors
from llm2vec.types import Objective, Stage


class StageParts(NamedTuple):
    """What a stage puts together, by its config."""

    #: `pairs` of a query and its documents; `texts`, each its own positive; or `blocks` of running text
    rows: Literal["pairs", "texts", "blocks"]
    sides: Callable[[Config], tuple[str, ...]]  #: what the objective reads of a row
    #: the objective's class, by which a model is loaded with or without a head
    kind: Callable[[Config], type[Objective]]
    #: over a model, whose weights may be on the meta device; without a tokenizer (in a plan), one like it. Raises
    #: UserError: it does not fit the model
    objective: Callable[[Config, Any, EncoderSettings, PreTrainedTokenizerBase | None], Objective]
    #: makes rows into batches, given the tokenizer, how texts become vectors, and the run's seed. Raises
    #: UserError: the template does not serve the objective, or the tokenizer lacks a token it needs
    collate: Callable[[Config, PreTrainedTokenizerBase, EncoderSettings, int], Collate]


def train_stage(stage: Stage, path: Path) -> None:
    """Run a stage, from its config's file to its last checkpoint; go on where an earlier start of it was cut short.

    Raises:
        UserError: config, rows or model do not fit; found before the first step, most of it before weights load.
        RunEnds: there is nothing left to do, or the run was asked to stop, could not write, or diverged.
    """
    run_stage(load_config(path, stage))


def run_stage(config: Config, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """The same of a config that was read and checked, with callbacks of one's own beside the run's."""
    prepare_device(config)
    with ExitStack() as held:
        args = start_or_resume(config, held)
        parts = stage_parts(config)
        opened = open_data(config)
        check_vectors(config, opened)
        with_lm_head = parts.kind(config).needs_head
        model, tokenizer, settings = load_model(config, args.device, with_lm_head=with_lm_head)
        rows = cut(config, opened, tokenizer)
        collate = parts.collate(config, tokenizer, settings, args.seed)
        objective = parts.objective(config, model, settings, tokenizer)
        run_training(config, args, objective, rows, collate, tokenizer, saved_settings(config, settings), callbacks)


def stage_parts(config: Config) -> StageParts:
    """What the config's stage is made of."""
    assert config.stage is not None, "load_config names the stage"
    return STAGES[config.stage]


def open_data(config: Config) -> TrainingRows | list[SourceTexts]:
    """The stage's rows, every line of them checked, else a `UserError`; or texts that are still to be `cut` into
    blocks."""
    parts = stage_parts(config)
    if parts.rows == "blocks":
        return open_running_text(config)
    if parts.rows == "texts":
        return open_texts(config)
    return open_rows(config, config.num_hard_negatives if "negative" in parts.sides(config) else 0)


def cut(config: Config, opened: TrainingRows | list[SourceTexts], tokenizer: PreTrainedTokenizerBase) -> Rows:
    """What `open_data` gave, as rows."""
    if isinstance(opened, TrainingRows):
        return opened
    size, most, held_out = config.max_seq_length, config.max_train_samples, config.num_eval_rows
    return open_blocks(opened, tokenizer, size, max_rows=most, num_held_out=held_out)


def saved_settings(config: Config, settings: EncoderSettings) -> EncoderSettings:
    """How texts become vectors, as the checkpoint says it."""
    if stage_parts(config).rows != "blocks":
        return settings
    # Blocks are written by no template, so the next stage may choose any.
    return dataclasses.replace(settings, template=config.template)


# --- Stage I ---


def _stage_one(config: Config) -> type[StageOneObjective]:
    return stage_one_objective(config.objective)


def _read_keys(config: Config) -> dict[str, Any]:
    """What the config says of the keys that its objective reads."""
    return {key: getattr(config, key) for key in _stage_one(config).keys}


def _stage_one_objective(
    config: Config, model: Any, settings: EncoderSettings, tokenizer: PreTrainedTokenizerBase | None
) -> Objective:
    kind = _stage_one(config)
    bos_id = None if tokenizer is None else tokenizer.bos_token_id
    teacher = stored_vectors(config.teacher_vectors)
    width = None if teacher is None else teacher.width
    given = {"settings": settings, "bos_id": bos_id, "teacher_width": width, **_read_keys(config)}
    taken = inspect.signature(kind).parameters
    return kind(model, **{name: value for name, value in given.items() if name in taken})


def _stage_one_collate(
    config: Config, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings, seed: int
) -> Collate:
    renderer = row_tokenizer(tokenizer, settings, reconstruct_instruction=config.reconstruct_instruction)
    kind, keys = _stage_one(config), _read_keys(config)
    kind.check_rendering(renderer, keys)
    teacher = stored_vectors(config.teacher_vectors)
    facts = None if teacher is None else RowFacts(teacher=teacher)
    return CollateSides(renderer, kind.sides_of(renderer.template, keys), seed=seed, facts=facts)


# --- contrastive stages ---


def _contrastive_sides(config: Config) -> tuple[str, ...]:
    negative = ("negative",) if config.num_hard_negatives else ()
    return ("query", "positive", *negative, *(("text",) if config.lm_weight else ()))


def _contrastive(
    config: Config, model: Any, settings: EncoderSettings, tokenizer: PreTrainedTokenizerBase | None
) -> Objective:
    teacher = stored_vectors(config.teacher_vectors)
    contrastive = ContrastiveLearning(
        decoder_of(model),
        settings,
        config.loss_scale,
        matryoshka_dims=config.matryoshka_dims,
        distillation_weight=config.distillation_weight,
        how=ContrastiveKeys(**{key.name: getattr(config, key.name) for key in dataclasses.fields(ContrastiveKeys)}),
        teacher_width=None if teacher is None else teacher.width,
    )
    if not config.lm_weight:
        return contrastive
    return ContrastiveLanguageModelling(contrastive, LanguageModelling(model), config.lm_weight)


def _simcse(
    config: Config, model: Any, settings: EncoderSettings, tokenizer: PreTrainedTokenizerBase | None
) -> Objective:
    set_attention_dropout(model, config.simcse_dropout)  # which makes a text's two vectors differ
    return _contrastive(config, model, settings, tokenizer)


def _contrastive_collate(
    config: Config, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings, seed: int
) -> Collate:
    facts = RowFacts(
        mask_false_negatives=config.mask_false_negatives,
        with_scores=needs_scores(config),
        own_negatives_only=frozenset(config.own_negatives_only or ()),
        mask_known_positives=config.mask_known_positives,
        guide=stored_vectors(config.guide),
        teacher=stored_vectors(config.teacher_vectors),
    )
    return CollateSides(
        row_tokenizer(tokenizer, settings),
        _contrastive_sides(config),
        config.examples_per_query,
        seed,
        facts,
        row_tokenizer(tokenizer, _unclosed(settings)),
    )


# --- running text ---


def _running_text(config: Config, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings, seed: int) -> Collate:
    return CollateSides(row_tokenizer(tokenizer, _unclosed(settings)), ("text",))


def _unclosed(settings: EncoderSettings) -> EncoderSettings:
    # No turn, and no closing token, which no loss would read: the template that embeds is the model's own and goes into
    # the checkpoint unchanged.
    return dataclasses.replace(settings, template="plain", pooling_mode="mean")


def _masked(config: Config, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings, seed: int) -> Collate:
    return mask_tokens(tokenizer, config.mask_token_type, config.mlm_probability, config.data_collator_type, seed)


STAGES: dict[Stage, StageParts] = {
    "stage_I": StageParts(
        "pairs",
        lambda config: _stage_one(config).sides_of(config.template, _read_keys(config)),
        _stage_one,
        _stage_one_objective,
        _stage_one_collate,
    ),
    "stage_II": StageParts(
        "pairs",
        _contrastive_sides,
        lambda config: ContrastiveLanguageModelling if config.lm_weight else ContrastiveLearning,
        _contrastive,
        _contrastive_collate,
    ),
    "simcse": StageParts(
        "texts", _contrastive_sides, lambda config: ContrastiveLearning, _simcse, _contrastive_collate
    ),
    "lm": StageParts(
        "pairs",
        lambda config: ("text",),
        lambda config: LanguageModelling,
        lambda config, model, settings, tokenizer: LanguageModelling(model),
        _running_text,
    ),
    "mntp": StageParts(
        "blocks",
        lambda config: ("text",),
        lambda config: MaskedNextTokenPrediction,
        lambda config, model, settings, tokenizer: MaskedNextTokenPrediction(model),
        _masked,
    ),
}
