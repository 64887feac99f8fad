"""A run in words: its model, rows, steps, tokens and weights, a line each, as said before the first step.

Said by `run` when it starts; `plan_report` says the same lines of a run that has not started.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn
from transformers import TrainingArguments

from llm2vec.data.collation import Collate
from llm2vec.model.settings import EncoderSettings
from llm2vec.processes import world_size
from llm2vec.train.config import Config
from llm2vec.train.rows import Rows, sample_of


class Schedule(NamedTuple):
    """Optimiser steps of a run.

    Attributes:
        steps: that are done.
        horizon: over which the learning rate is scheduled.
        an_epoch: that the rows make; None = not known.
    """

    steps: int
    horizon: int
    an_epoch: int | None


def schedule_of(config: Config, args: TrainingArguments, steps_per_epoch: int | None) -> Schedule | None:
    """How many steps; None where that depends on rows that are not there (`steps_per_epoch` is None)."""
    if args.max_steps > 0:
        horizon = args.max_steps
    elif steps_per_epoch is None:
        return None
    else:
        horizon = math.ceil(args.num_train_epochs * steps_per_epoch)
    return Schedule(min(horizon, config.stop_after_n_steps or horizon), horizon, steps_per_epoch)


def rows_a_step(args: TrainingArguments, num_processes: int) -> int:
    """Rows of an optimiser step."""
    return args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps


def steps_an_epoch(args: TrainingArguments, num_rows: int, num_processes: int) -> int:
    """Optimiser steps over rows of that number; those that fill no whole step make one more."""
    return math.ceil(num_rows / rows_a_step(args, num_processes))


def describe(
    config: Config,
    args: TrainingArguments,
    model: nn.Module,
    rows: Rows,
    collate: Collate,
    settings: EncoderSettings,
    steps_per_epoch: int,
    num_processes: int,
) -> list[str]:
    """What the run will do, line by line.

    Args:
        config: of the run.
        args: of the run.
        model: what is trained; its weights may be on the meta device.
        rows: the training rows.
        collate: makes them into batches.
        settings: how texts become vectors.
        steps_per_epoch: that the rows make.
        num_processes: that share a step.
    """
    return [
        describe_model(config, settings.template or "open"),
        f"data        {len(rows):,} rows of {len(rows.sources)} source(s): {', '.join(s.name for s in rows.sources)}",
        describe_steps(config, args, schedule_of(config, args, steps_per_epoch)),
        describe_rows(args, num_processes),
        f"tokens      {_tokens_per_step(rows, collate, rows_a_step(args, num_processes))}",
        *describe_weights(args, model),
        f"output      {config.output_dir}",
    ]


def describe_model(config: Config, template: str) -> str:
    """Where a run starts, and how a text becomes a vector."""
    return (
        f"model       {config.model_name_or_path}, {'bidirectional' if config.bidirectional else 'causal'} attention, "
        f"template {template}, pooling {config.pooling_mode}"
    )


def describe_steps(config: Config, args: TrainingArguments, schedule: Schedule | None) -> str:
    """How many steps, of what schedule."""
    if schedule is None:
        stop = "" if config.stop_after_n_steps is None else f"at most {config.stop_after_n_steps:,} of "
        return f"steps       {stop}{args.num_train_epochs:g} epoch(s) of rows that are not there to be counted"
    epoch = "" if schedule.an_epoch is None else f" ({schedule.an_epoch:,} an epoch)"
    return (
        f"steps       {schedule.steps:,} of a schedule over {schedule.horizon:,}{epoch}, "
        f"warm-up {args.get_warmup_steps(schedule.horizon):,}, learning rate {args.learning_rate:g}"
    )


def describe_rows(args: TrainingArguments, num_processes: int) -> str:
    """How the rows of a step are shared out."""
    return (
        f"rows        {rows_a_step(args, num_processes):,} a step: {args.per_device_train_batch_size} a process "
        f"x {num_processes} process(es) x {args.gradient_accumulation_steps} micro-batch(es)"
    )


def describe_weights(args: TrainingArguments, model: nn.Module) -> list[str]:
    """How many weights are trained, and in which precision."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    autocast = (
        "steps in bfloat16"
        if args.fsdp and args.bf16
        else "bf16 autocast"
        if args.bf16
        else "fp16 autocast"
        if args.fp16
        else "no autocast"
    )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return [
        f"trainable   {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        f"precision   {dtype} weights{' shared by the processes (FSDP2)' if args.fsdp else ''}, {autocast}",
    ]


def describe_negatives(config: Config, args: TrainingArguments, num_processes: int | None = None) -> str:
    """How many negatives a Stage II query sees, and where they come from; `num_processes` None = this run's."""
    processes = num_processes or world_size()
    at_once = args.per_device_train_batch_size * processes
    hard = at_once * config.num_hard_negatives
    line = (
        f"negatives   {at_once - 1 + hard:,} a query: {at_once - 1:,} in-batch positives and {hard:,} hard negatives, "
        f"from {processes} process(es); accumulation adds none"
    )
    if config.own_negatives_only:
        line += f"; queries of {', '.join(config.own_negatives_only)} see only their row's {config.num_hard_negatives}"
    return line


def _tokens_per_step(rows: Rows, collate: Collate, rows_per_step: int) -> str:
    """Mean tokens of a step and the share of texts cut, from a sample of rows."""
    sample = sample_of(rows)
    lengths = [len(row.ids) for row in collate.all_rows(sample)]
    per_row = sum(lengths) / len(sample)
    line = f"about {per_row * rows_per_step:,.0f} a step ({per_row:.0f} a row)"
    if collate.cut_at is None:
        return line
    return f"{line}; {sum(length >= collate.cut_at for length in lengths) / len(lengths):.1%} of the texts are cut"
