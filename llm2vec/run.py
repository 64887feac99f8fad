"""What the training scripts share: open the data, load the model, say what will happen, train, save.

The scripts under `experiments/` call these in order, so that each reads top to bottom.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from llm2vec.activation_memory import fit_activations
from llm2vec.backbone import (
    Backbone,
    add_token_rows,
    attach_lora,
    check_attention,
    enable_checkpointing,
    find_file,
    load_backbone,
    load_tokenizer,
)
from llm2vec.checkpoint import EncoderSettings, read_settings, resolve_chain, save_checkpoint
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
from llm2vec.distributed import shut_down, world_size
from llm2vec.few_shot import check_examples_fit, with_examples
from llm2vec.llm2vec import LLM2Vec, parse_dtype, row_tokenizer, with_template
from llm2vec.llm2vec_mntp import add_mask_token
from llm2vec.packing import checkpoint_contexts, compile_layers, pack_rows
from llm2vec.sharding import plan_sharding, state_of_model
from llm2vec.text_blocks import (
    TEXT_SUFFIXES,
    TextBlocks,
    Texts,
    texts_of_file,
    texts_of_hub,
    texts_of_sources,
)
from llm2vec.tokenization import Row, RowTokenizer, add_template_tokens, probe_ids
from llm2vec.trainer import EmbedderTrainer
from llm2vec.types import Batch, Example, InstructedText, UserError

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
    by the first process) and ends with exit code 2."""
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
    folder, sources = _sources(config)
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
        folder, sources = _sources(config)
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
    return texts_of_sources(*_sources(config))


def _sources(config: Config) -> tuple[Path, list[Source]]:
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

    Settings that a parent checkpoint recorded must agree with the config's where those change what a row of tokens
    is; the template, where the config names none, is the parent's.

    Raises:
        UserError: not found, does not fit, does not attend as asked, or contradicts the parent checkpoint.
    """
    set_seed(config.training.get("seed", 42))
    chain = resolve_chain(config.model_name_or_path, config.adapters)
    parent = chain.adapters[-1] if chain.adapters else chain.base
    tokenizer = load_tokenizer(parent if find_file(parent, "tokenizer_config.json") else chain.base)
    settings = with_template(_settings(config, read_settings(parent)), tokenizer)
    new_tokens = add_template_tokens(tokenizer, str(settings.template))
    new_tokens += add_mask_token(tokenizer, config.mask_token_type)
    row_tokenizer(tokenizer, settings)  # a template the tokenizer cannot write is found before the weights load
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
        lora = {"r": config.lora_r, "alpha": config.lora_alpha or 2 * config.lora_r, "dropout": config.lora_dropout}
        modules = {"modules": config.lora_modules} if config.lora_modules else {}
        model.requires_grad_(False)
        adapted = attach_lora(decoder_of(model), **lora, **modules, new_tokens=new_tokens)  # type: ignore[arg-type]
        if with_lm_head:
            setattr(model, model.base_model_prefix, adapted)
        else:
            model = adapted
        settings = dataclasses.replace(settings, parent_adapters=chain.adapters)
    if config.compilation is not None:
        compile_layers(model, **config.compilation)
    return model, tokenizer, settings


def decoder_of(model: Backbone) -> Backbone:
    """The model without a head, with an adapter if there is one."""
    has_head = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    return model.base_model if has_head else model  # type: ignore[return-value]


def _written(model: Backbone) -> Backbone:
    """What of a trained model a checkpoint holds: its adapter if it has one, also below a head; else all of it."""
    decoder = decoder_of(model)
    return decoder if isinstance(decoder, PeftModel) else model


def _settings(config: Config, recorded: dict[str, Any]) -> EncoderSettings:
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
        _check_examples(args, rows, collate)
    at_once = args.per_device_train_batch_size * world_size()
    per_step = at_once * args.gradient_accumulation_steps
    block_size = per_step if config.one_source_per == "step" else at_once
    # A mean over micro-batches, as the release takes it, depends on which rows share one: there, no rows are moved.
    num_ranks = world_size() if config.reduction == "token_mean" else 1
    sampler = OneSourceBlocks(
        rows,
        block_size,
        args.seed,
        num_ranks=num_ranks,
        rows_a_rank=args.per_device_train_batch_size,
        max_characters=CHARACTERS_A_TOKEN * config.max_seq_length,
    )
    for line in [
        *describe(config, args, objective, rows, collate, settings, len(sampler) // per_step),
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
        save_checkpoint(folder, _written(objective.model), tokenizer, settings, run, state)  # type: ignore[arg-type]

    trainer = EmbedderTrainer(
        objective,
        args,
        rows,
        collate,
        sampler,
        reduction=config.reduction,
        save_to=save_to,
        stop_after_n_steps=config.stop_after_n_steps,
        held_out=_held_out(args, rows, at_once),
        probe=_probe(config, args, objective.model, tokenizer, settings),
        max_tokens=config.tokens_per_microbatch,
    )
    trainer.train()
    trainer.save_model()
    logger.info("saved to %s", config.output_dir)


def _fit_activations(
    config: Config, args: TrainingArguments, objective: Any, rows: Rows, collate: Collate
) -> list[str]:
    """Hold the activations to the config's budget, if it has one; returns the line that says so."""
    if config.activation_memory_gb is None or config.tokens_per_microbatch is None:
        return []
    examples = [rows[i] for i in range(min(8, len(rows)))]
    small, large = (send_to_device(collate(part), args.device) for part in (examples[:1], examples))
    decoder = decoder_of(objective.model)
    with torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16, args.bf16 or args.fp16):
        return [
            fit_activations(objective, decoder, small, large, config.tokens_per_microbatch, config.activation_memory_gb)
        ]


def _held_out(args: TrainingArguments, rows: Rows, at_once: int) -> tuple[Rows, OneSourceBlocks] | None:
    """The held-out rows and their order, where evaluation is on; every rank holds equally many of each block."""
    if args.eval_strategy == "no":
        return None
    args.per_device_eval_batch_size = args.per_device_train_batch_size  # in-batch figures depend on it
    args.dataloader_drop_last = True
    held_out = rows.held_out()
    return held_out, OneSourceBlocks(held_out, at_once, args.seed)


def _probe(
    config: Config, args: TrainingArguments, model: Any, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings
) -> Callable[[], dict[str, float]] | None:
    """NanoBEIR over the model in training, where the config asks for it."""
    if config.nano_beir is None or args.eval_strategy == "no":
        return None
    try:
        from llm2vec.nano_beir import INSTRUCTIONS, NanoBeirProbe  # seconds to import, and an extra
    except ImportError as error:
        raise UserError('nano_beir needs sentence-transformers: pip install -e ".[eval]".') from error

    encoder = LLM2Vec(decoder_of(model), tokenizer, **dataclasses.asdict(settings))
    return NanoBeirProbe(encoder, config.nano_beir, list(INSTRUCTIONS), args.per_device_eval_batch_size, args.device)


def _check_examples(args: TrainingArguments, rows: Any, collate: CollateSides, num_sampled: int = 256) -> None:
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


def describe(
    config: Config,
    args: TrainingArguments,
    objective: nn.Module,
    rows: Rows,
    collate: Collate,
    settings: EncoderSettings,
    steps_per_epoch: int,
) -> list[str]:
    """What the run will do, line by line."""
    processes, accumulation = world_size(), args.gradient_accumulation_steps
    at_once = args.per_device_train_batch_size * processes
    horizon = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    steps = min(horizon, config.stop_after_n_steps or horizon)
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    total = sum(p.numel() for p in objective.parameters())
    autocast = (
        "steps in bfloat16"
        if args.fsdp and args.bf16
        else "bf16 autocast"
        if args.bf16
        else "fp16 autocast"
        if args.fp16
        else "no autocast"
    )
    dtype = str(next(objective.parameters()).dtype).removeprefix("torch.")
    return [
        f"model       {config.model_name_or_path}, {'bidirectional' if config.bidirectional else 'causal'} attention, "
        f"template {settings.template or 'open'}, pooling {config.pooling_mode}",
        f"data        {len(rows):,} rows of {len(rows.sources)} source(s): {', '.join(s.name for s in rows.sources)}",
        f"steps       {steps:,} of a schedule over {horizon:,} ({steps_per_epoch:,} an epoch), "
        f"warm-up {args.get_warmup_steps(horizon):,}, learning rate {args.learning_rate:g}",
        f"rows        {at_once * accumulation:,} a step: {args.per_device_train_batch_size} a process "
        f"x {processes} process(es) x {accumulation} micro-batch(es)",
        f"tokens      {_tokens_per_step(rows, collate, at_once * accumulation)}",
        f"trainable   {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        f"precision   {dtype} weights{' shared by the processes (FSDP2)' if args.fsdp else ''}, {autocast}",
        f"output      {config.output_dir}",
    ]


def describe_negatives(config: Config, args: TrainingArguments) -> str:
    """How many negatives a Stage II query sees, and where they come from."""
    at_once = args.per_device_train_batch_size * world_size()
    hard = at_once * config.num_hard_negatives
    line = (
        f"negatives   {at_once - 1 + hard:,} a query: {at_once - 1:,} in-batch positives and {hard:,} hard negatives, "
        f"from {world_size()} process(es); accumulation adds none"
    )
    if config.own_negatives_only:
        line += f"; queries of {', '.join(config.own_negatives_only)} see only their row's {config.num_hard_negatives}"
    return line


def _tokens_per_step(rows: Rows, collate: Collate, rows_per_step: int, num_sampled: int = 256) -> str:
    """Mean tokens of a step and the share of texts cut, from an evenly spaced sample of rows."""
    sample = [rows[i] for i in range(0, len(rows), max(1, len(rows) // num_sampled))]
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
        "parent": {"model_name_or_path": config.model_name_or_path, "adapters": config.adapters},
        "data": [
            {"source": s.name, "rows": n, "file": str(f), "sha256": _sha256(f) if f.is_file() else None}
            for s, n, f in zip(rows.sources, rows.sizes, rows.files, strict=True)
        ],
        "probe_ids": ids,
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
