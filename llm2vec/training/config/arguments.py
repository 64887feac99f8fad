"""transformers' TrainingArguments of a run, from its config."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import ParallelMode

from llm2vec.training.config import DONE_AT_LOADING, Config
from llm2vec.types import UserError, in_one_sentence, lower_is_better


def of_arguments() -> AbstractContextManager[None]:
    """Around what the library makes of training arguments: what it refuses becomes a `UserError` of one sentence."""
    refusals = (ValueError, TypeError, ImportError, OSError)
    return in_one_sentence(lambda why: f"training arguments: {why}", refusals)


def runs_on_cpu(config: Config) -> bool:
    """Whether a run's device is the CPU: by its config, or since torch finds no other."""
    return bool(config.training.get("use_cpu")) or not torch.accelerator.is_available()


def training_arguments(config: Config, num_processes: int | None = None) -> TrainingArguments:
    """TrainingArguments of a run, with the accumulation that `total_batch_size` asks for. `num_processes` are those of
    a run that is only planned; None = those that torchrun started.

    A `UserError` where the total batch is no multiple of what the processes hold at once, or transformers refuses a
    value.
    """
    values = {key: value for key, value in config.training.items() if key not in DONE_AT_LOADING}
    values["output_dir"] = str(config.output_dir)
    values["remove_unused_columns"] = False  # rows are read by our collator, not by column
    values.setdefault("report_to", "tensorboard" if importlib.util.find_spec("tensorboard") else "none")
    values.setdefault("ddp_find_unused_parameters", False)
    # Without this, transformers starts several CPU processes that each believe to be alone.
    values["use_cpu"] = runs_on_cpu(config)
    values.setdefault("dataloader_pin_memory", not values["use_cpu"])
    # Rows are tokenised beside the step. On a CPU that would take cores from it, and is too little to notice.
    values.setdefault("dataloader_num_workers", 0 if values["use_cpu"] else 2)
    if config.total_batch_size is not None:
        processes = num_processes or int(os.environ.get("WORLD_SIZE", "1"))
        values.setdefault("per_device_train_batch_size", max(1, config.total_batch_size // processes))
        at_once = values["per_device_train_batch_size"] * processes
        if config.total_batch_size % at_once:
            raise UserError(
                f"total_batch_size is {config.total_batch_size}, no multiple of the {at_once} rows that {processes} "
                f"process(es) with per_device_train_batch_size {at_once // processes} hold at once."
            )
        values["gradient_accumulation_steps"] = config.total_batch_size // at_once
    if values.get("fsdp"):
        # Gradients that wait for the step's last micro-batch would lie whole on every process.
        values["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    if (metric := values.get("metric_for_best_model")) is not None and values.get("greater_is_better") is None:
        values["greater_is_better"] = not lower_is_better(str(metric))  # transformers asks for names that end in "loss"
    with of_arguments():
        args = TrainingArguments(**values)
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED and (num_processes or 1) == 1:
        raise UserError("fsdp needs several processes; start with torchrun --nproc_per_node=N, or take fsdp out.")
    available = get_available_reporting_integrations()
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or ():
        if name not in ("none", "all", *available):
            choices = ", ".join(["none", *available])
            raise UserError(f"report_to: {name!r} is not installed here; install it, or choose from {choices}.")
    return args
