"""A run before it starts: its schedule, the tokens of its rows, its model as shapes, and the memory that it takes.

Data and tokenizer are the run's own where they are at hand; where not, the lengths of texts are assumed. `words`
puts a plan into words. Run by `llm2vec plan`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, TrainingArguments

from llm2vec.data.collation import Collate, CollateSides, check_examples
from llm2vec.data.order import OneSourceBlocks
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import find_files
from llm2vec.files import read_object
from llm2vec.hub import find_file, without_waiting_for_the_hub
from llm2vec.model.backbone import Backbone, config_of, parse_dtype
from llm2vec.model.chain import open_chain
from llm2vec.model.packing import inner_decoder
from llm2vec.model.settings import EncoderSettings
from llm2vec.model.vault import folder_at
from llm2vec.planning.activations import BITS_OF_BASE, Numbers, is_known, reckoned_bytes
from llm2vec.planning.gpus import Card
from llm2vec.planning.memory import Memory, Step, memory_of
from llm2vec.planning.work import Sample, assumed, counted, useful_flops
from llm2vec.training.config import DATASET_NAMES, KEYS, Config
from llm2vec.training.config.arguments import training_arguments
from llm2vec.training.config.file import load_config
from llm2vec.training.model import (
    add_token_rows,
    decoder_of,
    encoder_settings,
    fuses,
    open_tokenizer,
    trained_tokens,
    with_adapter,
)
from llm2vec.training.recomputation import fit, tokens_run
from llm2vec.training.rows import Rows, open_running_text, row_orders, sources_of, text_file_of
from llm2vec.training.run import Schedule, rows_a_step, schedule_of, steps_an_epoch
from llm2vec.training.stages import cut, open_data, saved_settings, stage_parts
from llm2vec.types import Objective, Stage, UserError


@dataclass(frozen=True)
class Conditions:
    """What a config does not say."""

    num_processes: int = 1  #: that share the run
    card: Card | None = None  #: GPU of each process; None = a CPU
    utilisation: float = 0.4  #: share of the card's matrix peak that does useful work
    stage: Stage | None = None  #: whose script reads the config; None = as its keys tell
    #: model whose shape and tokenizer stand for those of a base that is not there yet.
    base: str | None = None
    #: of a row's query, template included, where rows or tokenizer are not at hand.
    tokens_query: int | None = None
    tokens_document: int | None = None  #: of each of its documents, likewise

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation is {self.utilisation:g}; it must lie above 0 and be at most 1.")
        if (self.tokens_query is None) != (self.tokens_document is None):
            raise UserError("--tokens_query and --tokens_document are given together.")


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts."""

    config: Config  #: as written
    args: TrainingArguments  #: that follow from it
    conditions: Conditions  #: what it does not say
    settings: EncoderSettings  #: how texts become vectors
    model: Any  #: in shapes only
    objective: Objective  #: over it
    numbers: Numbers  #: it computes with
    rows: Rows | None  #: training rows; None = not at hand
    collate: Collate | None  #: makes them into batches; None = lengths are assumed
    order: OneSourceBlocks | None  #: of the rows
    schedule: Schedule | None  #: steps; None = only the rows would tell
    assumption: str  #: what is assumed, and why; empty = nothing
    absent: tuple[str, ...]  #: adapters below the run's own that are not there yet
    all_rows: Sample  #: a sample over all sources
    by_source: tuple[Sample, ...]  #: one of each source
    memory: Memory | None = None  #: of a process; None = the model's layers are of another kind
    recomputation: str = ""  #: what is recomputed; empty = nothing
    num_recomputed: int = 0  #: how many layers are

    @property
    def steps(self) -> int | None:
        """How many steps the run has, or at most; None = not known."""
        return self.config.stop_after_n_steps if self.schedule is None else self.schedule.steps

    @property
    def rows_a_step(self) -> float:
        """Of all processes, in the mean."""
        places = rows_a_step(self.args, self.conditions.num_processes)
        return places if self.order is None else places * self.order.num_rows / len(self.order)

    @property
    def tokens_a_step(self) -> float:
        """Of all processes, in the mean."""
        return self.rows_a_step * float(np.mean(self.all_rows.tokens_of_rows))

    @property
    def flops_a_step(self) -> float:
        """Useful floating-point operations of all processes, in the mean."""
        share = self.rows_a_step / len(self.all_rows.tokens_of_rows)
        return share * useful_flops(self.model, self.all_rows.passes)


def make_plan(path: Path, conditions: Conditions) -> Plan:
    """Read a config and reckon what its run would be.

    Raises:
        UserError: what the run would refuse; or the base's shape, or the lengths of texts, can be had nowhere; or a
            family whose layers are not known.
    """
    return plan_of(load_config(path, conditions.stage or stage_of(path)), conditions)


def plan_of(config: Config, conditions: Conditions) -> Plan:
    """The same of a config that was read and checked."""
    args = training_arguments(config, conditions.num_processes)
    base = conditions.base or config.model_name_or_path
    with without_waiting_for_the_hub():
        absent = tuple(adapter for adapter in config.adapters if not _has(adapter, "adapter_config.json"))
        # Those that are not there yet are left out: merged, they change no shape.
        chain = open_chain(base, [adapter for adapter in config.adapters if adapter not in absent])
        shape = shape_of(chain.base)
        tokenizer, settings, new_tokens = None, encoder_settings(config, {}), list[int]()
        if _has(chain.tokenizer_folder.path, "tokenizer_config.json"):
            tokenizer, settings, new_tokens = open_tokenizer(config, chain)
    tokens = new_tokens if tokenizer is None else trained_tokens(config, tokenizer, settings, new_tokens)
    model = model_of_shapes(config, shape, new_tokens, tokens)
    if not hasattr(inner_decoder(model), "layers"):
        raise UserError(f"{chain.base}: a {shape.model_type} cannot be planned, its layers are not known here.")
    parts = stage_parts(config)
    objective = parts.objective(config, model, settings, tokenizer)
    missing = missing_data(config)
    rows: Rows | None = None
    if missing is None:
        opened = open_data(config)
        if tokenizer is not None:
            rows = cut(config, opened, tokenizer)
        elif isinstance(opened, TrainingRows):  # others are made of tokens
            rows = opened
    order = None if rows is None else row_orders(config, args, rows, conditions.num_processes)[0]
    collate = None
    if rows is not None and tokenizer is not None and conditions.tokens_query is None:
        collate = parts.collate(config, tokenizer, settings, args.seed)
        if isinstance(collate, CollateSides):
            check_examples(args, rows, collate)
    elif missing is None and tokenizer is None:
        missing = f"model_name_or_path: {chain.base!r} has no tokenizer that can be read here."
    assumption = ""
    if collate is not None and rows is not None:
        all_rows, *by_source = counted(objective, rows, collate)
    else:
        query, document = (
            min(tokens or 0, config.max_seq_length) for tokens in (conditions.tokens_query, conditions.tokens_document)
        )
        assumption = _assumption(config, conditions, missing, query, document)
        all_rows, *by_source = assumed(objective, settings, config, query, document)
    steps_per_epoch = None if order is None else steps_an_epoch(args, len(order), conditions.num_processes)
    kind = "cpu" if conditions.card is None else "cuda"
    numbers = Numbers.of(args, model, kind, fuses(config, model, kind), BITS_OF_BASE.get(config.load_in))
    plan = Plan(
        config=config, args=args, conditions=conditions, settings=saved_settings(config, settings), model=model,
        objective=objective, numbers=numbers, rows=rows, collate=collate, order=order,
        schedule=schedule_of(config, args, steps_per_epoch), assumption=assumption, absent=absent,
        all_rows=all_rows, by_source=tuple(by_source),
    )  # fmt: skip
    return plan if not is_known(model) else _with_memory(plan)


def stage_of(path: Path) -> Stage:
    """Which stage a config is for: the one it names, or by the keys that only some stages read; a `UserError` where it
    has none that tells."""
    try:
        keys = read_object(path)
    except UserError:
        return "stage_I"  # whatever the stage, reading the config says what is wrong
    if keys.get("stage") in get_args(Stage):
        return cast(Stage, keys["stage"])
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


def shape_of(base: str) -> PretrainedConfig:
    """A base's `config.json`; where it cannot be read, a `UserError` says what can be given instead."""
    try:
        return config_of(folder_at(base))
    except UserError as error:
        raise UserError(
            f"model_name_or_path: {base!r} has no config.json that can be read here ({error}); to plan without it, "
            "name a model of the same shape with --base, a folder or a hub name."
        ) from error


def model_of_shapes(
    config: Config, shape: PretrainedConfig, new_tokens: Sequence[int], trained: Sequence[int]
) -> Backbone:
    """The model that `training.model.load_model` would load, in training mode, but without weights (on the meta
    device). The base lacks the ids `new_tokens`, and an adapter trains the embeddings of those in `trained`. A
    `UserError` where the family cannot take the adapter.
    """
    dtype = parse_dtype(config.torch_dtype)
    model_class = AutoModelForCausalLM if stage_parts(config).kind(config).needs_head else AutoModel
    with torch.device("meta"):
        model = model_class.from_config(shape, dtype=getattr(shape, "dtype", None) if dtype == "auto" else dtype)
        if new_tokens:
            add_token_rows(model, new_tokens, 0)
        if config.use_peft:
            model = with_adapter(config, model, trained)
    model.train()
    return model


def missing_data(config: Config) -> str | None:
    """Why a config's rows cannot be read here, as a sentence; None = they are there. A source that its table has not
    is a `UserError`."""
    if config.hub_dataset is None and (file := text_file_of(config)) is not None:
        return None if file.is_file() else f"dataset_file_path: {file} is not there."
    place = sources_of(config) if config.hub_dataset is None else None
    try:
        if place is None:
            open_running_text(config)
        else:
            find_files(*place)
    except UserError as error:
        return str(error)
    return None


def _has(path: str, name: str) -> bool:
    try:
        return find_file(path, name) is not None
    except UserError:  # neither a folder nor the name of a repository: the output of a run that is still to come
        return False


def _assumption(config: Config, conditions: Conditions, missing: str | None, query: int, document: int) -> str:
    """What is assumed of the texts, and why; a `UserError` where nothing is, though it must be."""
    if stage_parts(config).rows == "blocks":  # which are full, whatever the texts
        return f"blocks of {config.max_seq_length} tokens"
    if conditions.tokens_query is None:
        raise UserError(
            f"{missing} To plan without, say how many tokens a row's texts have in the mean, template included: "
            "--tokens_query and --tokens_document."
        )
    given = f"{query} tokens a query and {document} a document"
    if (query, document) != (conditions.tokens_query, conditions.tokens_document):
        given += " (cut at max_seq_length)"
    return f"{given}, as rows or tokenizer are not at hand" if missing else f"{given}, as given"


def _with_memory(plan: Plan) -> Plan:
    """The plan with the memory of a process: that of the source whose texts take most."""
    num_layers = len(inner_decoder(plan.model).layers)
    number, said = (num_layers, f"all {num_layers} layers are recomputed") if plan.config.checkpointing else (0, "")
    bound, budget = plan.config.tokens_per_microbatch, plan.config.activation_memory_gb
    if bound is not None and budget is not None:
        a_token = []  # bytes that it keeps in all layers, and how often it goes through them
        for sample in plan.by_source:
            run = sum(tokens_run(plan.model, p, *plan.numbers.shares) for p in sample.passes if p.kind != "read")
            kept = reckoned_bytes(plan.model, plan.numbers, sample.passes)
            a_token.append((kept / sample.tokens, run / sample.tokens))
        number, said = fit(decoder_of(plan.model), *max(a_token), bound, budget, plan.numbers.stream)
    order, shares = plan.order, [plan.args.per_device_train_batch_size] * len(plan.by_source)
    if order is not None and len(shares) == len(order.filled):  # else lengths are assumed, the same for all sources
        shares = [filled // order.cells for filled in order.filled]
    steps = [_step_of(plan, sample, number, share) for sample, share in zip(plan.by_source, shares, strict=True)]
    accounts = [memory_of(plan.model, plan.args, plan.numbers, s, plan.conditions.num_processes) for s in steps]
    worst = max(accounts, key=lambda account: account.most)
    return dataclasses.replace(plan, memory=worst, recomputation=said, num_recomputed=number)


def _step_of(plan: Plan, sample: Sample, num_recomputed: int, share: int) -> Step:
    """What a process has in hand in a step over rows of one source, of which its `share` is so many."""
    longest = max(sample.tokens_of_rows)
    bound = max(plan.config.tokens_per_microbatch or math.inf, longest)  # a row is never cut in two
    most, mean = sample.tokens_of(share), share * float(np.mean(sample.tokens_of_rows))
    pieces = max(1, math.ceil(most / bound))
    # Pieces are balanced to a row. They fill the bound only where some step has just as many tokens as so many hold.
    is_filled = pieces > 1 and (pieces - 1) * bound > 2 * mean - most
    at_once = bound if is_filled else min(bound, most / pieces + (longest if pieces > 1 else 0.0))
    compared = None
    if plan.objective.contrasts:
        documents = share * plan.conditions.num_processes * (1 + plan.config.num_hard_negatives)
        compared = (share * (2 + plan.config.num_hard_negatives), documents)
    accumulates = pieces > 1 or plan.args.gradient_accumulation_steps > 1
    return Step(sample.passes, at_once / sample.tokens, num_recomputed, accumulates, compared)
