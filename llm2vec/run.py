"""What the training scripts share: open the data, load the model, say what will happen, train, save.

The scripts under `experiments/` call these in order, so that each reads top to bottom.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from llm2vec.activation_memory import fit_activations
from llm2vec.backbone import (
    Backbone,
    Chain,
    add_token_rows,
    attach_lora,
    check_attention,
    enable_checkpointing,
    find_file,
    first_line,
    load_backbone,
    load_tokenizer,
)
from llm2vec.cached_tables import content_hash
from llm2vec.checkpoint import (
    EncoderSettings,
    mark_of,
    read_settings,
    read_weights,
    resolve_chain,
    save_checkpoint,
)
from llm2vec.config import Config
from llm2vec.data import (
    Instruction,
    OneSourceBlocks,
    Source,
    TrainingRows,
    e5_sources,
    read_sources_file,
    select_sources,
)
from llm2vec.diagnostics import DIAGNOSTICS_FILE, EmbeddingDiagnostics
from llm2vec.distributed import is_of_lost_process, rank, shut_down, world_size
from llm2vec.few_shot import check_examples_fit, with_examples
from llm2vec.llm2vec import LLM2Vec, parse_dtype, row_tokenizer, with_template
from llm2vec.llm2vec_mntp import add_mask_token
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.packing import checkpoint_contexts, compile_layers, pack_rows
from llm2vec.reconstruction_probe import ReconstructionProbe
from llm2vec.resume import command_to_resume, last_whole_checkpoint, remove_checkpoints, step_of
from llm2vec.sharding import plan_sharding, state_of_model
from llm2vec.signals import StopSignals
from llm2vec.text_blocks import (
    TEXT_SUFFIXES,
    TextBlocks,
    Texts,
    texts_of_file,
    texts_of_hub,
    texts_of_sources,
)
from llm2vec.tokenization import Row, RowTokenizer, add_template_tokens, probe_ids
from llm2vec.train_log import drop_entries_after
from llm2vec.trainer import EmbedderTrainer
from llm2vec.types import Batch, Example, InstructedText, RunEnds, UserError

logger = logging.getLogger(__name__)

Side = Literal["query", "positive", "negative", "text"]
Rows: TypeAlias = TrainingRows | TextBlocks

#: About how many characters of English a token stands for: only to guess which rows are long.
CHARACTERS_A_TOKEN = 4

#: Where upstream LLM2Vec's sentences for SimCSE are to be had.
WIKI1M_HINT = (
    "Wiki1M is the file wiki1m_for_simcse.txt of https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse"
)


@contextmanager
def user_errors_in_one_sentence() -> Iterator[None]:
    """Around a script's main: sets up logging and leaves the process group at the end; a UserError is printed (once,
    by the first process) and ends with exit code 2, a RunEnds with its own."""
    level = logging.INFO if _is_first_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft uses its older names
    try:
        yield
        shut_down()
    except UserError as error:
        if _is_first_process():
            sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except RunEnds as end:
        if _is_first_process():
            sys.stderr.write(f"{'error: ' * bool(end.code)}{end}\n")
        if end.code == 0:
            shut_down()
        raise SystemExit(end.code) from None
    except RuntimeError as error:
        if not is_of_lost_process(error):
            raise
        sys.stderr.write(f"error: process {rank()}: another process of the run ended or hangs ({first_line(error)}).\n")
        os._exit(1)  # leaving the group in order would wait for it


def config_path(arguments: Sequence[str]) -> Path:
    """The script's one argument.

    Raises:
        UserError: not exactly one argument.
    """
    if len(arguments) != 2:
        raise UserError(f"usage: torchrun --nproc_per_node=N {arguments[0]} CONFIG.json")
    return Path(arguments[1])


def open_rows(config: Config, num_negatives: int) -> TrainingRows:
    """The training rows a config asks for; every line is checked."""
    folder, sources = sources_of(config)
    names = [source.name for source in sources]
    for name in config.own_negatives_only or ():
        if name not in names:
            raise UserError(f"own_negatives_only: {name!r} is not among the sources of this run: {', '.join(names)}.")
    return TrainingRows(
        folder,
        sources,
        num_negatives=num_negatives,
        symmetric_instructions=config.symmetric_instructions,
        max_rows=config.max_train_samples,
        num_held_out=config.num_eval_rows,
        with_scores=config.distillation_weight > 0,
    )


def open_texts(config: Config) -> TrainingRows:
    """Texts without instruction, each its own positive: a text file's lines, or the documents of a config's rows."""
    file = Path(config.dataset_file_path or "")
    if file.suffix == ".txt":
        if not file.is_file():
            raise UserError(f"dataset_file_path: {file} is not there; {WIKI1M_HINT}.")
        folder, sources = file.parent, [Source(file.stem, file.name, ())]
    else:
        folder, sources = sources_of(config)
    bare = (Instruction("", symmetric=True),)  # so that both take the same form
    return TrainingRows(
        folder,
        [source._replace(instructions=bare) for source in sources],
        num_negatives=0,
        max_rows=config.max_train_samples,
        num_held_out=config.num_eval_rows,
        texts_alone=True,
    )


def open_running_text(config: Config) -> list[Texts]:
    """The texts that a config wants cut into blocks: a text file's, a hub dataset's, or those of its rows."""
    if config.hub_dataset is not None:
        return [texts_of_hub(config.hub_dataset, config.dataset_config_name)]
    if config.sources_file is None and Path(config.dataset_file_path or "").suffix in TEXT_SUFFIXES:
        return [texts_of_file(Path(config.dataset_file_path or ""))]
    return texts_of_sources(*sources_of(config))


def sources_of(config: Config) -> tuple[Path, list[Source]]:
    """The folder of a config's rows, and what to read there."""
    sources = e5_sources() if config.sources_file is None else read_sources_file(Path(config.sources_file))
    folder = Path(config.dataset_file_path or Path(config.sources_file or "").parent)
    return folder, select_sources(sources, config.sources)


def load_model(
    config: Config, device: torch.device, *, with_lm_head: bool
) -> tuple[Backbone, PreTrainedTokenizerBase, EncoderSettings]:
    """Base, merged adapters and, with `use_peft`, a fresh LoRA adapter; the tokenizer; how texts become vectors.

    Special tokens that the template adds and the base lacks are given to both; under LoRA their embeddings are trained
    too, and saved with the adapter. The adapter goes on the decoder; a head over it is frozen like the rest.

    Raises:
        UserError: not found, does not fit, does not attend as asked, or contradicts the parent checkpoint.
    """
    set_seed(config.training.get("seed", 42))
    chain = resolve_chain(config.model_name_or_path, config.adapters)
    tokenizer, settings, new_tokens = open_tokenizer(config, chain)
    model = load_backbone(
        chain,
        dtype=parse_dtype(config.torch_dtype),
        attn_implementation=config.attn_implementation,
        with_lm_head=with_lm_head,
    )
    if new_tokens:
        add_token_rows(model, new_tokens, config.training.get("seed", 42))  # type: ignore[arg-type]
        names = ", ".join(tokenizer.convert_ids_to_tokens(new_tokens))
        logger.info("added tokens: %s; they start at the mean of the other tokens' embeddings", names)
    model.to(device)  # type: ignore[arg-type]  # FlashAttention cannot be probed on the CPU
    check_attention(decoder_of(model), settings.attention)
    if config.checkpointing is not None:
        contexts = partial(checkpoint_contexts, decoder_of(model))
        enable_checkpointing(model, {**config.checkpointing, "context_fn": contexts})
    if config.use_peft:
        model = with_adapter(config, model, new_tokens)
        settings = dataclasses.replace(settings, parent_adapters=chain.adapters)
    if config.compilation is not None:
        compile_layers(model, **config.compilation)
    return model, tokenizer, settings


def open_tokenizer(config: Config, chain: Chain) -> tuple[PreTrainedTokenizerBase, EncoderSettings, list[int]]:
    """The tokenizer, how texts become vectors, and the ids of the tokens that the base lacks.

    Settings that a parent checkpoint recorded must agree with the config's where those change what a row of tokens
    is; the template, where the config names none, is the parent's.

    Raises:
        UserError: not found, contradicts the parent checkpoint, or a template that the tokenizer cannot write.
    """
    parent = chain.adapters[-1] if chain.adapters else chain.base
    tokenizer = load_tokenizer(parent if find_file(parent, "tokenizer_config.json") else chain.base)
    settings = with_template(encoder_settings(config, read_settings(parent)), tokenizer)
    new_tokens = add_template_tokens(tokenizer, str(settings.template))
    new_tokens += add_mask_token(tokenizer, config.mask_token_type)
    row_tokenizer(tokenizer, settings)  # a template the tokenizer cannot write is found before the weights load
    return tokenizer, settings, new_tokens


def with_adapter(config: Config, model: Backbone, new_tokens: Sequence[int]) -> Backbone:
    """The model with a fresh LoRA adapter on its decoder, all else frozen but the new tokens' embeddings."""
    lora = {"r": config.lora_r, "alpha": config.lora_alpha or 2 * config.lora_r, "dropout": config.lora_dropout}
    modules = {"modules": config.lora_modules} if config.lora_modules else {}
    model.requires_grad_(False)
    decoder = decoder_of(model)
    adapted = attach_lora(decoder, **lora, **modules, new_tokens=new_tokens)  # type: ignore[arg-type]
    if decoder is model:
        return adapted
    setattr(model, model.base_model_prefix, adapted)
    return model


def decoder_of(model: Backbone) -> Backbone:
    """The model without a head, with an adapter if there is one."""
    has_head = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    return model.base_model if has_head else model  # type: ignore[return-value]


def _written(model: Backbone) -> Backbone:
    """What of a trained model a checkpoint holds: its adapter if it has one, also below a head; else all of it."""
    decoder = decoder_of(model)
    return decoder if isinstance(decoder, PeftModel) else model


def encoder_settings(config: Config, recorded: dict[str, Any]) -> EncoderSettings:
    """How a config's texts become vectors; `recorded` is what its parent checkpoint says.

    Raises:
        UserError: the parent was trained with another template.
    """
    template = config.template or recorded.get("template")
    if recorded.get("template") not in (None, template):
        raise UserError(
            f"template is {config.template!r}, but {config.model_name_or_path} was trained with "
            f"{recorded['template']!r}; leave `template` out to go on with it."
        )
    return EncoderSettings(
        pooling_mode=config.pooling_mode,  # type: ignore[arg-type]
        max_length=config.max_seq_length,
        doc_max_length=config.doc_max_length,
        skip_instruction=config.skip_instruction,
        template=template,
        instruction_join=config.instruction_join,
        attention="bidirectional" if config.bidirectional else "causal",
    )


class Collate(Protocol):
    """What makes the rows of a micro-batch into a batch."""

    @property
    def cut_at(self) -> int | None:
        """The length to which longer rows are cut; None = none is cut."""
        ...

    def all_rows(self, examples: Sequence[Any]) -> list[Row]:
        """The tokenised rows of all sides."""
        ...

    def __call__(self, examples: list[Any]) -> Batch:
        """Each side as a TokenBatch."""
        ...


@dataclasses.dataclass(frozen=True)
class CollateSides:
    """Examples of a micro-batch to its tokenised sides.

    Attributes:
        tokenizer: renders the rows.
        sides: what the objective reads: query, positive, negative, or text (query and positive as one text).
        examples_per_query: most few-shot examples before a query.
        seed: of the run; decides which examples.
        facts: what else to tell of a side's texts, by name, each [texts]; None = nothing.
        text_tokenizer: renders the side `text` in place of `tokenizer`; None = it does not.
    """

    tokenizer: RowTokenizer
    sides: tuple[Side, ...]
    examples_per_query: int = 0
    seed: int = 0
    facts: Callable[[Sequence[Example], str], dict[str, Tensor]] | None = None
    text_tokenizer: RowTokenizer | None = None

    def __call__(self, examples: list[Example]) -> Batch:
        """Each side as a TokenBatch; K negatives a row become K * B rows, row by row."""
        batch: Batch = {side: pack_rows(self.rows(examples, side)) for side in self.sides}
        if self.facts is not None:
            for side, tokens in batch.items():
                tokens["facts"] = self.facts(examples, side)
        return batch

    @property
    def cut_at(self) -> int:
        """The length to which longer rows are cut."""
        return self.tokenizer.max_length

    def all_rows(self, examples: Sequence[Example]) -> list[Row]:
        """The tokenised texts of all sides."""
        return [row for side in self.sides for row in self.rows(examples, side)]

    def rows(self, examples: Sequence[Example], side: Side) -> list[Row]:
        """The tokenised texts of one side, in row order."""
        if side == "query" and self.examples_per_query:
            return self.tokenizer.rows(with_examples(examples, self.examples_per_query, self.seed))
        tokenizer = (self.text_tokenizer or self.tokenizer) if side == "text" else self.tokenizer
        return tokenizer.rows(self.texts(examples, side))

    @staticmethod
    def texts(examples: Sequence[Example], side: Side) -> list[InstructedText]:
        """The texts of one side, in row order."""
        if side == "negative":
            return [text for example in examples for text in example.negatives]
        if side == "text":
            return [InstructedText("", f"{e.query.text}\n\n{e.positive.text}") for e in examples]
        return [getattr(example, side) for example in examples]


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
    steps_per_epoch = len(sampler) // rows_a_step(args, world_size())
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
        state = None if weights is None else state_of_model(weights, objective.model)  # type: ignore[arg-type]
        at_step = {**(run or {}), "step": trainer.state.global_step}
        save_checkpoint(folder, _written(objective.model), tokenizer, settings, at_step, state)  # type: ignore[arg-type]

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
        probes=_probes(config, args, objective.model, tokenizer, settings, held_out and held_out[0]),
        max_tokens=config.tokens_per_microbatch,
        load_from=lambda folder: read_weights(folder, _written(objective.model)),  # type: ignore[arg-type]
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
        trainer.save_model()
    logger.info("saved to %s", config.output_dir)


def _make_way(config: Config, start: str | None) -> None:
    """Take out of the output folder what belongs to no step up to the one that the run starts from."""
    if config.resume == "never":
        remove_checkpoints(config.output_dir)
    drop_entries_after(config.output_dir / DIAGNOSTICS_FILE, 0 if start is None else step_of(Path(start)))


def _stopped(config: Config, step: int) -> str:
    """What a run says that was asked to stop."""
    saved = last_whole_checkpoint(config.output_dir)
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
    with _autocast(args):
        return [
            fit_activations(objective, decoder, small, large, config.tokens_per_microbatch, config.activation_memory_gb)
        ]


def _autocast(args: TrainingArguments) -> torch.autocast:
    """The precision of the training steps."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(args.device.type, dtype, args.bf16 or args.fp16)


def row_orders(
    config: Config, args: TrainingArguments, rows: Rows, num_processes: int
) -> tuple[OneSourceBlocks, tuple[Rows, OneSourceBlocks] | None]:
    """The order of the training rows; and, where evaluation is on, the held-out rows and theirs.

    Raises:
        UserError: a source does not fill one batch, or evaluation has no rows.
    """
    at_once = args.per_device_train_batch_size * num_processes
    block_size = at_once * (args.gradient_accumulation_steps if config.one_source_per == "step" else 1)
    sampler = OneSourceBlocks(
        rows,
        block_size,
        args.seed,
        # A mean over micro-batches, as the release takes it, depends on which rows share one: there, none is moved.
        num_ranks=num_processes if config.reduction == "token_mean" else 1,
        rows_a_rank=args.per_device_train_batch_size,
        max_characters=CHARACTERS_A_TOKEN * config.max_seq_length,
    )
    return sampler, _held_out(args, rows, at_once)


def _held_out(args: TrainingArguments, rows: Rows, at_once: int) -> tuple[Rows, OneSourceBlocks] | None:
    """The held-out rows and their order, where evaluation is on; every rank holds equally many of each block."""
    if args.eval_strategy == "no":
        return None
    args.per_device_eval_batch_size = args.per_device_train_batch_size  # in-batch figures depend on it
    args.dataloader_drop_last = True
    held_out = rows.held_out()
    return held_out, OneSourceBlocks(held_out, at_once, args.seed)


def _probes(
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
        from llm2vec.nano_beir import INSTRUCTIONS, NanoBeirProbe  # seconds to import, and an extra
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
        with _autocast(args):
            return probe()

    return figures


def check_examples(args: TrainingArguments, rows: Any, collate: CollateSides, num_sampled: int = 256) -> None:
    """Refuse few-shot examples that no query would ever get.

    Raises:
        UserError: a process holds one row at a time, or examples do not fit.
    """
    if not collate.examples_per_query:
        return
    if args.per_device_train_batch_size < 2:
        raise UserError(
            "examples_per_query: per_device_train_batch_size is 1, but examples are the other rows of a process's "
            "micro-batch; 2 or more are needed."
        )
    starts = range(0, len(rows) - 1, max(1, 2 * len(rows) // num_sampled))
    check_examples_fit([rows[i] for start in starts for i in (start, start + 1)], collate.tokenizer)


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


def sample_of(rows: Rows, num_sampled: int = 256) -> list[Any]:
    """About so many rows, evenly spaced."""
    return [rows[i] for i in range(0, len(rows), max(1, len(rows) // num_sampled))]


def _tokens_per_step(rows: Rows, collate: Collate, rows_per_step: int) -> str:
    """Mean tokens of a step and the share of texts cut, from a sample of rows."""
    sample = sample_of(rows)
    lengths = [len(row.ids) for row in collate.all_rows(sample)]
    per_row = sum(lengths) / len(sample)
    line = f"about {per_row * rows_per_step:,.0f} a step ({per_row:.0f} a row)"
    if collate.cut_at is None:
        return line
    return f"{line}; {sum(length >= collate.cut_at for length in lengths) / len(lengths):.1%} of the texts are cut"


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


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
