"""A run from its first line to its last checkpoint: say what will happen, train, stop or go on, save.

The scripts under `experiments/` open the rows (`run_rows`), load the model (`run_model`), choose a collator
(`collation`) and call `train`, so that each reads top to bottom.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from llm2vec.cli import user_errors_in_one_sentence as user_errors_in_one_sentence  # goes once nobody takes it here
from llm2vec.data.collation import Collate, CollateSides, check_examples
from llm2vec.data.tables import content_hash
from llm2vec.model.chain import mark_of
from llm2vec.model.checkpoint import read_weights, save_checkpoint
from llm2vec.model.recomputation import fit_activations
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.probes.diagnostics import DIAGNOSTICS_FILE
from llm2vec.processes import StopSignals, rank, world_size
from llm2vec.text.tokenization import probe_ids
from llm2vec.train.config import Config
from llm2vec.train.log import drop_entries_after
from llm2vec.train.model import autocast, decoder_of, part_to_save, plan_sharding
from llm2vec.train.resume import checkpoint_folder, checkpoints_in, command_to_resume, remove_checkpoints, step_of
from llm2vec.train.rows import Rows, row_orders
from llm2vec.train.run_probes import probes_of
from llm2vec.train.saving import model_weights
from llm2vec.train.trainer import EmbedderTrainer
from llm2vec.train.words import describe, steps_an_epoch
from llm2vec.types import RunEnds, UserError

logger = logging.getLogger(__name__)


def config_path(arguments: Sequence[str]) -> Path:
    """The script's one argument; `--help` prints the script's header.

    Raises:
        UserError: not exactly one argument.
    """
    if {"-h", "--help"} & {*arguments}:
        sys.stdout.write(f"{sys.modules['__main__'].__doc__}")
        raise SystemExit(0)
    if len(arguments) != 2:
        raise UserError(f"usage: torchrun --nproc_per_node=N {arguments[0]} CONFIG.json")
    return Path(arguments[1])


def train(
    config: Config,
    args: TrainingArguments,
    objective: nn.Module,
    rows: Rows,
    collate: Collate,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings,
    notes: Sequence[str] = (),
) -> None:
    """Say what the run will do (and `notes`), run it, and write the final checkpoint into `output_dir`."""
    if isinstance(collate, CollateSides):
        check_examples(args, rows, collate)
    sampler, held_out = row_orders(config, args, rows, world_size())
    steps_per_epoch = steps_an_epoch(args, len(sampler), world_size())
    for line in [
        *describe(config, args, objective, rows, collate, settings, steps_per_epoch, world_size()),
        *notes,
        *_fit_activations(config, args, objective, rows, collate),
    ]:
        logger.info(line)
    if args.dataloader_num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads do not survive the fork of a worker
    plan_sharding(args, objective.model)  # type: ignore[arg-type]
    ids = probe_ids(row_tokenizer(tokenizer, settings))
    run = provenance(config, args, rows, ids) if args.should_save else None

    def save_to(folder: Path, weights: dict[str, Tensor] | None) -> None:
        state = None if weights is None else model_weights(weights, objective.model)  # type: ignore[arg-type]
        at_step = {**(run or {}), "step": trainer.state.global_step}
        if trainer.weights_of_step is not None:
            at_step["weights_of_step"] = trainer.weights_of_step
        save_checkpoint(folder, part_to_save(objective.model), tokenizer, settings, at_step, state)  # type: ignore[arg-type]

    signals = StopSignals()
    trainer = EmbedderTrainer(
        objective,
        args,
        rows,
        collate,
        sampler,
        reduction=config.reduction,
        save_to=save_to,
        stop_after_n_steps=config.stop_after_n_steps,
        held_out=held_out,
        probes=probes_of(config, args, objective.model, tokenizer, settings, held_out and held_out[0]),
        max_tokens=config.tokens_per_microbatch,
        load_from=lambda folder: read_weights(folder, part_to_save(objective.model)),  # type: ignore[arg-type]
        place_of=rows.place,
        should_stop=lambda: signals.received is not None,
        max_skipped_steps=config.max_skipped_steps,
    )
    if rank() == 0:
        _make_way(config, args.resume_from_checkpoint)
    with signals:
        trainer.train(args.resume_from_checkpoint)
        if trainer.is_stopped:
            raise RunEnds(_stopped(config, trainer.state.global_step), code=0)
        trainer.save_last()
    logger.info("saved to %s", config.output_dir)


def _make_way(config: Config, start: str | None) -> None:
    """Take later steps' lines out of the diagnostics, and all checkpoints of a run that begins anew. Later ones than
    that which the config names stay, and are said: whoever goes back may still want them."""
    step = 0 if start is None else step_of(Path(start))
    if config.resume == "never":
        remove_checkpoints(config.output_dir)
    elif config.resume != "auto":
        for folder in checkpoints_in(config.output_dir, after=step):
            logger.warning("resume      %s, of a later step, stays until this run writes over it", folder)
    drop_entries_after(config.output_dir / DIAGNOSTICS_FILE, step)


def _stopped(config: Config, step: int) -> str:
    """What a run says that was asked to stop."""
    saved = checkpoint_folder(config.output_dir, step)
    command = command_to_resume()
    how = command if config.resume == "auto" else f'{command} with "resume": "{saved}"'
    return f"stopped after step {step:,}, saved to {saved}; to go on: {how}"


def _fit_activations(
    config: Config, args: TrainingArguments, objective: Any, rows: Rows, collate: Collate
) -> list[str]:
    """Hold the activations to the config's budget, if it has one; returns the line that says so."""
    if config.activation_memory_gb is None or config.tokens_per_microbatch is None:
        return []
    examples = [rows[i] for i in range(min(8, len(rows)))]
    small, large = (send_to_device(collate(part), args.device) for part in (examples[:1], examples))
    decoder = decoder_of(objective.model)
    with autocast(args):
        return [
            fit_activations(objective, decoder, small, large, config.tokens_per_microbatch, config.activation_memory_gb)
        ]


def provenance(config: Config, args: TrainingArguments, rows: Rows, ids: list[list[int]]) -> dict[str, Any]:
    """What goes to `run.json`: resolved config, layout, parent, data and probe ids."""
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
            {"source": s.name, "rows": n, "file": str(f), "sha256": content_hash(f) if f.is_file() else None}
            for s, n, f in zip(rows.sources, rows.sizes, rows.files, strict=True)
        ],
        "probe_ids": ids,
    }
