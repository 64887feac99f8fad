"""What is measured of a model in training at an evaluation, beside the objective's own figures on held-out rows.

`run` hands the probes that the config asks for to the trainer, which calls each with the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from llm2vec.data.rows import TrainingRows
from llm2vec.llm2vec import LLM2Vec
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.probes.diagnostics import DIAGNOSTICS_FILE, EmbeddingDiagnostics
from llm2vec.probes.reconstruction_probe import ReconstructionProbe
from llm2vec.train.config import Config
from llm2vec.train.model import autocast, decoder_of
from llm2vec.train.rows import Rows
from llm2vec.types import UserError


def probes_of(
    config: Config,
    args: TrainingArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings,
    held_out: Rows | None,
) -> list[Callable[[int], dict[str, float]]]:
    """What else is measured of the model in training at an evaluation, where the config asks for it."""
    probes: list[Callable[[int], dict[str, float]]] = []
    if held_out is None:
        return probes
    encoder = LLM2Vec(decoder_of(model), tokenizer, **dataclasses.asdict(settings))
    if config.nano_beir is not None:
        probes.append(_nano_beir(encoder, config.nano_beir, args.per_device_eval_batch_size, args.device))
    if config.embedding_diagnostics:
        assert isinstance(held_out, TrainingRows), "the config allows it for rows of queries and documents only"
        file, goes_on = config.output_dir / DIAGNOSTICS_FILE, args.resume_from_checkpoint is not None
        probes.append(EmbeddingDiagnostics(encoder, held_out, args.device, file, goes_on=goes_on))
    if config.reconstruction_probe:
        probes.append(_reconstruction(config, args, model, tokenizer, settings, held_out))
    return probes


def _nano_beir(
    encoder: LLM2Vec, dataset_id: str, batch_size: int, device: torch.device
) -> Callable[[int], dict[str, float]]:
    """NanoBEIR over the model in training."""
    try:
        from llm2vec.probes.nano_beir import INSTRUCTIONS, NanoBeirProbe  # seconds to import, and an extra
    except ImportError as error:
        raise UserError('nano_beir needs sentence-transformers: pip install -e ".[eval]".') from error
    beir = NanoBeirProbe(encoder, dataset_id, list(INSTRUCTIONS), batch_size, device)
    return lambda step: beir()


def _reconstruction(
    config: Config,
    args: TrainingArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings,
    held_out: Any,
) -> Callable[[int], dict[str, float]]:
    """Reconstruction of the held-out rows by the model in training, in the precision of its steps."""
    renderer = row_tokenizer(tokenizer, settings, reconstruct_instruction=config.reconstruct_instruction)
    probe = ReconstructionProbe(BidirectionalReconstruction(model, settings, target=config.target), renderer, held_out)

    def figures(step: int) -> dict[str, float]:
        with autocast(args):
            return probe()

    return figures
