"""A run from its first line to its last checkpoint: say what will happen, train, stop or go on, save.

Who starts a run opens the rows (`rows`), loads the model (`model`), makes an objective and a collator, and calls
`train`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from llm2vec.data.collation import Collate, CollateSides, check_examples
from llm2vec.data.order import OneSourceBlocks
from llm2vec.data.rows import TrainingRows
from llm2vec.data.tables import content_hash, hash_of_read
from llm2vec.files import DIAGNOSTICS_FILE
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.chain import mark_of, origin_of, read_run
from llm2vec.model.checkpoint import read_beside, read_weights, save_checkpoint, weights_beside
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.probes.diagnostics import EmbeddingDiagnostics
from llm2vec.probes.reconstruction_probe import ReconstructionProbe
from llm2vec.processes import StopSignals, rank, wait_for_all, world_size
from llm2vec.text.probe_texts import probe_ids
from llm2vec.training.config import Config
from llm2vec.training.log import drop_entries_after
from llm2vec.training.model import autocast, decoder_of, part_to_save, plan_sharding
from llm2vec.training.recomputation import fit_activations
from llm2vec.training.resume import (
    checkpoint_folder,
    checkpoints_in,
    command_to_resume,
    differences,
    remove_checkpoints,
    step_of,
)
from llm2vec.training.rows import Rows, describe_left_out, describe_mixture, row_orders, sample_of
from llm2vec.training.saving import model_weights
from llm2vec.training.trainer import EmbedderTrainer
from llm2vec.training.vectors import folders_of_vectors
from llm2vec.types import Objective, RunEnds, UserError, needs_extra

logger = logging.getLogger(__name__)


def run_training(
    config: Config,
    args: TrainingArguments,
    objective: Objective,
    rows: Rows,
    collate: Collate,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Say what the run will do, run it, and write the last weights into `output_dir`, with tokenizer and settings.

    Where `args` name a checkpoint, it goes on from there (`resume.start_or_resume`). `callbacks` stand beside its own.

    Raises:
        UserError: rows, budget or arguments do not go together.
        RunEnds: the run was asked to stop, could not write, or diverged.
    """
    if isinstance(collate, CollateSides):
        check_examples(args, rows, collate)
    sampler, held_out = row_orders(config, args, rows, world_size())
    schedule = schedule_of(config, args, steps_an_epoch(args, len(sampler), world_size()))
    mean_rows = rows_a_step(args, world_size()) * sampler.num_rows / len(sampler)
    card = f", {torch.cuda.get_device_name(args.device)}" if args.device.type == "cuda" else ""
    template, tokens = settings.template or "open", describe_tokens(rows, collate, mean_rows)
    for line in [
        f"device      {args.device}{card}, torch {torch.__version__}",
        *describe(config, args, objective, template, describe_rows(rows, sampler), tokens, schedule, world_size()),
        *_fit_activations(config, args, objective, rows, collate),
    ]:
        logger.info(line)
    if args.dataloader_num_workers:
        # The tokenizer's threads do not survive the fork of a worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plan_sharding(args, objective.model)  # type: ignore[arg-type]
    # Gathered now, so that run.json tells what the run began with, whatever becomes of the files meanwhile.
    ids = probe_ids(row_tokenizer(tokenizer, settings))
    run = provenance(config, args, rows, ids) if args.should_save else None
    wait_for_all()  # which reads all data once more
    start = args.resume_from_checkpoint
    if run is not None and start is not None and (found := differences(read_run(Path(start)), config)):
        raise UserError(f"{start} was this run's, and something changed while it began: {'; '.join(found)}.")

    def save_to(folder: Path, weights: dict[str, Tensor] | None) -> None:
        part = part_to_save(objective.model)
        state = None if weights is None else model_weights(weights, objective.model, part)
        # `trainer` is bound below, before anything is saved.
        at_step = {**(run or {}), "step": trainer.state.global_step}
        if trainer.weights_of_step is not None:
            at_step["weights_of_step"] = trainer.weights_of_step
        save_checkpoint(folder, part, tokenizer, settings, at_step, state, beside)

    beside = weights_beside(objective)

    def load_from(folder: Path) -> None:
        read_weights(folder, part_to_save(objective.model))
        read_beside(folder, beside)

    signals = StopSignals()
    trainer = EmbedderTrainer(
        objective,
        args,
        config,
        rows,
        collate,
        sampler,
        save_to=save_to,
        load_from=load_from,
        held_out=held_out,
        probes=probes_of(config, args, objective, tokenizer, settings, held_out and held_out[0]),
        place_of=rows.place,
        should_stop=lambda: signals.received is not None,
        callbacks=callbacks,
    )
    if rank() == 0:
        _make_way(config, args.resume_from_checkpoint)
    # From here on the first signal no longer ends the process: the step is finished and saved.
    with signals:
        trainer.train(args.resume_from_checkpoint)
        if trainer.is_stopped:
            raise RunEnds(_stopped(config, trainer.state.global_step), code=0)
        trainer.save_last()
    logger.info("saved to %s", config.output_dir)


def _make_way(config: Config, start: str | None) -> None:
    """Remove what would pass for this run's: checkpoints of a run that starts over, and diagnostics of later steps.

    Where the config names a checkpoint to go back to, later ones stay and are said: somebody may still want them.
    """
    step = 0 if start is None else step_of(Path(start))
    if config.resume == "never":
        remove_checkpoints(config.output_dir)
    elif config.resume != "auto":
        for folder in checkpoints_in(config.output_dir, after=step):
            logger.warning("resume      %s, of a later step, stays until this run writes over it", folder)
    drop_entries_after(config.output_dir / DIAGNOSTICS_FILE, step)


def _stopped(config: Config, step: int) -> str:
    """What a run that was asked to stop says at its end."""
    saved = checkpoint_folder(config.output_dir, step)
    command = command_to_resume()
    how = command if config.resume == "auto" else f'{command} with "resume": "{saved}"'
    return f"stopped after step {step:,}, saved to {saved}; to go on: {how}"


def _fit_activations(
    config: Config, args: TrainingArguments, objective: Objective, rows: Rows, collate: Collate
) -> list[str]:
    """Recompute so many layers that the activations fit the config's budget, if it has one; the line that says so."""
    tokens, budget = config.tokens_per_microbatch, config.activation_memory_gb
    if tokens is None or budget is None:
        return []
    objective.model.train()  # it was loaded in evaluation mode, where no dropout keeps its mask
    batches, first = [], 0  # at two sizes, as what is kept grows with the tokens and has a part that does not
    for size in rows.sizes:
        examples = [rows[first + i] for i in range(min(8, size))]
        if len(examples) > 1:
            batches.append(tuple(send_to_device(collate(part), args.device) for part in (examples[:1], examples)))
        first += size
    if not batches:
        return []
    dtype = torch.bfloat16 if args.fsdp and args.bf16 else None  # of the steps' weights; they run without autocast
    with autocast(args) if dtype is None else nullcontext():
        return [fit_activations(objective, decoder_of(objective.model), batches, tokens, budget, dtype)]


def provenance(config: Config, args: TrainingArguments, rows: Rows, ids: list[list[int]]) -> dict[str, Any]:
    """What goes to `run.json`: resolved config, layout, parent, data, vectors and probe ids."""
    return {
        "config": dataclasses.asdict(config),
        "num_processes": world_size(),
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "parent": {
            "model_name_or_path": config.model_name_or_path,
            "adapters": config.adapters,
            "marks": {path: mark_of(path) for path in (config.model_name_or_path, *config.adapters)},
        },
        "data": [
            {
                "source": source.name,
                "instructions": source.instructions,
                "rows": size,
                "file": str(file),
                "sha256": hash_of_read(file, stamp) if file.exists() else None,
                "reading": source.reading,
                "texts": {str(place): content_hash(place) for place, _ in source.reading.texts if place.exists()},
            }
            for source, size, file, stamp in zip(rows.sources, rows.sizes, rows.files, rows.stamps, strict=True)
        ],
        "vectors": {folder: content_hash(Path(folder)) for folder in folders_of_vectors(config)},
        "probe_ids": ids,
        **origin_of(Path(config.model_name_or_path)),
    }


# --- what a run says at its start; a plan says the same of one that has not started ---


class Schedule(NamedTuple):
    """Optimiser steps of a run."""

    steps: int  #: that are done
    horizon: int  #: over which the learning rate is scheduled
    an_epoch: int | None  #: that the rows make; None = not known


def schedule_of(config: Config, args: TrainingArguments, steps_per_epoch: int | None) -> Schedule | None:
    """How many steps; None where that depends on rows that are not there (`steps_per_epoch` is None)."""
    horizon = args.max_steps  # which decides, where it is given
    if horizon <= 0:
        if steps_per_epoch is None:
            return None
        horizon = math.ceil(args.num_train_epochs * steps_per_epoch)
    return Schedule(min(horizon, config.stop_after_n_steps or horizon), horizon, steps_per_epoch)


def rows_a_step(args: TrainingArguments, num_processes: int) -> int:
    """Rows of an optimiser step."""
    return args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps


def steps_an_epoch(args: TrainingArguments, num_rows: int, num_processes: int) -> int:
    """Optimiser steps over so many rows; a rest that fills no whole step makes one more."""
    return math.ceil(num_rows / rows_a_step(args, num_processes))


def describe(
    config: Config,
    args: TrainingArguments,
    objective: Objective,
    template: str,
    rows: Sequence[str],
    tokens: str,
    schedule: Schedule | None,
    num_processes: int,
) -> list[str]:
    """What a run will do, line by line; the objective's weights may be on the meta device.

    `rows` are the lines that say which rows there are; `template` and `tokens` (how many a step has) are words. Without
    a `schedule`, only rows that are not there would tell it.
    """
    model, at_once = objective.model, args.per_device_train_batch_size * num_processes
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    half = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    steps = "steps in bfloat16" if args.bf16 and args.fsdp else f"{half} autocast"
    lines = [
        f"model       {config.model_name_or_path}, {'bidirectional' if config.bidirectional else 'causal'} attention, "
        f"template {template}, pooling {config.pooling_mode}",
        *rows,
        f"steps       {_steps(config, args, schedule)}",
        f"rows        {rows_a_step(args, num_processes):,} a step: {args.per_device_train_batch_size} a process "
        f"x {num_processes} process(es) x {args.gradient_accumulation_steps} micro-batch(es)",
        f"tokens      {tokens}",
        f"trainable   {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        f"precision   {dtype} weights{' shared by the processes (FSDP2)' if args.fsdp else ''}, {steps}",
        f"output      {config.output_dir}",
    ]
    if objective.contrasts:
        hard, own = at_once * config.num_hard_negatives, config.own_negatives_only
        lines.append(
            f"negatives   {at_once - 1 + hard:,} a query: {at_once - 1:,} in-batch positives and {hard:,} hard "
            f"negatives, from {num_processes} process(es); accumulation adds none"
            + (f"; queries of {', '.join(own)} see only their row's {config.num_hard_negatives}" if own else "")
        )
    return lines


def _steps(config: Config, args: TrainingArguments, schedule: Schedule | None) -> str:
    """How many steps, of what schedule."""
    if schedule is None:
        stop = "" if config.stop_after_n_steps is None else f"at most {config.stop_after_n_steps:,} of "
        return f"{stop}{args.num_train_epochs:g} epoch(s) of rows that are not there to be counted"
    epoch = "" if schedule.an_epoch is None else f" ({schedule.an_epoch:,} an epoch)"
    return (
        f"{schedule.steps:,} of a schedule over {schedule.horizon:,}{epoch}, "
        f"warm-up {args.get_warmup_steps(schedule.horizon):,}, learning rate {args.learning_rate:g}"
    )


def describe_rows(rows: Rows, order: OneSourceBlocks) -> list[str]:
    """Which rows there are."""
    names = ", ".join(source.name for source in rows.sources)
    data = f"data        {len(rows):,} rows of {len(rows.sources)} source(s): {names}"
    return [data, *describe_left_out(rows), *describe_mixture(order)]


def describe_tokens(rows: Rows, collate: Collate, rows_per_step: float) -> str:
    """Mean tokens of a step and the share of texts cut, from a sample of rows."""
    sample = sample_of(rows)
    lengths = [len(row.ids) for row in collate.all_rows(sample)]
    per_row = sum(lengths) / len(sample)
    line = f"about {per_row * rows_per_step:,.0f} a step ({per_row:.0f} a row)"
    if collate.cut_at is None:
        return line
    return f"{line}; {sum(length >= collate.cut_at for length in lengths) / len(lengths):.1%} of the texts are cut"


# --- what is measured at an evaluation, beside the objective's own figures on held-out rows ---


def probes_of(
    config: Config,
    args: TrainingArguments,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings,
    held_out: Rows | None,
) -> list[Callable[[int], dict[str, float]]]:
    """What else is measured of the model in training at an evaluation, where the config asks for it."""
    probes: list[Callable[[int], dict[str, float]]] = []
    if held_out is None:
        return probes
    encoder = LLM2Vec(decoder_of(cast(Any, objective.model)), tokenizer, **dataclasses.asdict(settings))
    if config.nano_beir is not None:
        with needs_extra("nano_beir needs sentence-transformers", "eval"):
            from llm2vec.probes.nano_beir import INSTRUCTIONS, NanoBeirProbe  # seconds to import
        size = args.per_device_eval_batch_size
        beir = NanoBeirProbe(encoder, config.nano_beir, list(INSTRUCTIONS), size, args.device)
        probes.append(lambda step: beir())
    if config.embedding_diagnostics:
        assert isinstance(held_out, TrainingRows), "the config allows it for rows of queries and documents only"
        file, goes_on = config.output_dir / DIAGNOSTICS_FILE, args.resume_from_checkpoint is not None
        probes.append(EmbeddingDiagnostics(encoder, held_out, args.device, file, goes_on=goes_on))
    if config.reconstruction_probe:
        renderer = row_tokenizer(tokenizer, settings, reconstruct_instruction=config.reconstruct_instruction)
        probe = ReconstructionProbe(cast(Any, objective), renderer, cast(Any, held_out))

        def reconstruction(step: int) -> dict[str, float]:
            with autocast(args):
                return probe()

        probes.append(reconstruction)
    return probes
