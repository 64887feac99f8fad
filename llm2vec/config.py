"""One run = one flat JSON file. Reading it, checking it, and what its keys mean.

A key is one of ours (the fields of `Config`) or one of transformers' TrainingArguments. Anything else is an error
that names the nearest known key, and so are a wrong type, a value that is not allowed and two keys that contradict
each other; all of that is found before any weights load.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import logging
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import ParallelMode

from llm2vec.templates import TEMPLATES, leaves_join_open, segments_of
from llm2vec.types import POOLING_ALIASES, AttnImplementation, DtypeName, Reduction, SymmetricInstructions, UserError

logger = logging.getLogger(__name__)

Stage = Literal["stage_I", "stage_II", "lm"]

#: Keys of older TrainingArguments that changed nothing about a result: accepted, and said to be without effect.
WITHOUT_EFFECT = (
    "overwrite_output_dir", "logging_dir", "save_safetensors", "include_tokens_per_second", "past_index",
    "use_legacy_prediction_loop", "half_precision_backend", "fp16_backend", "use_ipex", "jit_mode_eval",
    "tpu_metrics_debug", "ray_scope", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
)  # fmt: skip

#: Keys of older TrainingArguments that did matter, and what to write instead.
REPLACED = {
    "warmup_ratio": "`warmup_steps` with a fraction below 1",
    "evaluation_strategy": "`eval_strategy`",
    "per_gpu_train_batch_size": "`per_device_train_batch_size`",
    "no_cuda": "`use_cpu`",
    "group_by_length": "`train_sampling_strategy` (and note that rows come in one-source blocks here)",
    "adafactor": '`optim`: "adafactor"',
    "fp16_opt_level": "`fp16`",
}

#: Recomputing activations, under transformers' old and new name.
CHECKPOINTING_KEYS = (
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs",
)  # fmt: skip

#: Compiling, which is done layer by layer where the model is loaded, not over the whole objective.
COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")

#: What `fsdp_config` may say.
FSDP_KEYS = ("version", "reshard_after_forward", "transformer_layer_cls_to_wrap")

#: What keys of TrainingArguments take, where their annotation says something else.
TYPES: dict[str, Any] = {"fsdp": Any}

#: Keys that only some stages read; elsewhere they would be ignored, so they are refused.
STAGE_KEYS: dict[str, tuple[Stage, ...]] = {
    "alpha": ("stage_I",),
    "reconstruct_instruction": ("stage_I",),
    "loss_scale": ("stage_II",),
    "num_hard_negatives": ("stage_II",),
    "examples_per_query": ("stage_II",),
}


@dataclass(frozen=True)
class Config:
    """The keys that are ours. What each default follows is in docs/fidelity.md.

    Attributes:
        model_name_or_path: base model: a folder (such as an earlier stage's `output_dir`) or a hub name.
        peft_model_name_or_path: adapters to merge into the base first, innermost first.
        bidirectional: attention of the embedding pass.
        pooling_mode: `last` (`eos_token`, `last_token`), `mean`, `weighted_mean`, `first` (`bos_token`).
        template: key of `templates.TEMPLATES`; None = inferred from the tokenizer, and said. The special tokens that
            it adds are given to a base that lacks them.
        instruction_join: between instruction and text, in the templates that leave it open; stored in the
            checkpoint, so evaluation uses the same.
        skip_instruction: leave the instruction out of mean pooling.
        max_seq_length: most tokens of a row, template included; only the text is cut.
        doc_max_length: most tokens of the text alone; None = as many as fit.
        torch_dtype: of the weights; None = float32. `bfloat16` without `bf16` is the release's pure bfloat16.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`.
        use_peft: LoRA instead of all parameters; None = on in Stage II, off elsewhere.
        lora_r: rank.
        lora_alpha: scale; None = twice the rank.
        lora_dropout: dropout before the adapter.
        lora_modules: modules that get an adapter; None = the seven projections of a layer.
        dataset_name: only "E5", the released archive's 14 sources.
        dataset_file_path: folder with the sources' files.
        sources: which sources to read; None = all of the table.
        sources_file: a JSON table of one's own sources in place of the released archive's.
        max_train_samples: most rows of each source; None = all.
        num_eval_rows: rows at the end of each source's file that are never trained on; with `eval_strategy`, the
            objective's figures on them are logged as `eval_...`.
        nano_beir: hub name or local folder of NanoBEIR (`sentence-transformers/NanoBEIR-en`); with `eval_strategy`,
            nDCG@10 on its 13 sets is logged as `eval_nano_...`; None = not.
        num_hard_negatives: hard negatives a row (Stage II).
        examples_per_query: most few-shot examples before a query, other rows of its micro-batch (Stage II); how many
            is drawn for each query, from 0 up.
        symmetric_instructions: `documented` puts Table 6's symmetric instructions on documents too, `as_released`
            on queries only.
        alpha: weight of EBQ2D in Stage I; 0 and 1 skip the unused pass.
        reconstruct_instruction: whether a query's instruction is a reconstruction target too.
        reduction: `token_mean` over the whole optimiser step, or the release's `micro_batch_mean`.
        loss_scale: 1 / temperature of Stage II.
        loss_class: only "HardNegativeNLLLoss".
        total_batch_size: rows of an optimiser step over all processes; None = what per-device batch, accumulation
            and processes give. When set, the accumulation follows from it.
        one_source_per: `step`: all rows of an optimiser step come from one source; `micro_batch`: all rows that the
            processes hold at once do, as in the release (the same without accumulation).
        stop_after_n_steps: end here although the schedule's horizon (`num_train_epochs` or `max_steps`) lies
            further; None = run to the horizon.
        experiment_id: a folder below `output_dir` to write to.
        training: the TrainingArguments keys, as written.
    """

    model_name_or_path: str
    peft_model_name_or_path: str | list[str] | None = None
    bidirectional: bool = False
    pooling_mode: str = "last"
    template: str | None = None
    instruction_join: str = "; "
    skip_instruction: bool = True
    max_seq_length: int = 512
    doc_max_length: int | None = None
    torch_dtype: DtypeName | None = None
    attn_implementation: AttnImplementation = "sdpa"
    use_peft: bool | None = None
    lora_r: int = 16
    lora_alpha: int | None = None
    lora_dropout: float = 0.05
    lora_modules: list[str] | None = None
    dataset_name: Literal["E5"] = "E5"
    dataset_file_path: str | None = None
    sources: list[str] | None = None
    sources_file: str | None = None
    max_train_samples: int | None = None
    num_eval_rows: int = 0
    nano_beir: str | None = None
    num_hard_negatives: int = 1
    examples_per_query: int = 0
    symmetric_instructions: SymmetricInstructions = "documented"
    alpha: float = 0.2
    reconstruct_instruction: bool = False
    reduction: Reduction = "token_mean"
    loss_scale: float = 20.0
    loss_class: Literal["HardNegativeNLLLoss"] = "HardNegativeNLLLoss"
    total_batch_size: int | None = None
    tokens_per_microbatch: int | None = None
    activation_memory_gb: float | None = None
    one_source_per: Literal["step", "micro_batch"] = "step"
    stop_after_n_steps: int | None = None
    experiment_id: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        """Where the run writes: `output_dir` as given, or the experiment's folder below it."""
        return Path(self.training["output_dir"], self.experiment_id or "")

    @property
    def checkpointing(self) -> dict[str, Any] | None:
        """Arguments of torch's activation checkpointing where it is on, else None."""
        old, old_arguments, new, new_arguments = (self.training.get(key) for key in CHECKPOINTING_KEYS)
        return (old_arguments or new_arguments or {"use_reentrant": False}) if old or new else None

    @property
    def compilation(self) -> dict[str, Any] | None:
        """Arguments of torch.compile where it is on, else None."""
        on, backend, mode = (self.training.get(key) for key in COMPILE_KEYS)
        return {"backend": backend or "inductor", "mode": mode} if on else None

    @property
    def adapters(self) -> list[str]:
        """Adapters to merge into the base, as a list."""
        given = self.peft_model_name_or_path
        return [given] if isinstance(given, str) else list(given or ())


def load_config(path: str | Path, stage: Stage) -> Config:
    """Read and check a run's JSON file.

    Args:
        path: the file.
        stage: which script reads it; decides `use_peft`'s default and which keys would have no effect.

    Raises:
        UserError: what is wrong, with file and key.
    """
    content = _read(Path(path))
    own = {f.name for f in dataclasses.fields(Config)} - {"training"}
    foreign = {f.name for f in dataclasses.fields(TrainingArguments)}
    values: dict[str, Any] = {"training": {}}
    for key, value in content.items():
        where = f"{path}: {key}"
        if key in WITHOUT_EFFECT and key not in foreign:
            logger.warning("%s: the current transformers has no such option; it has no effect.", where)
        elif key in REPLACED and key not in foreign:
            raise UserError(f"{where}: this option is gone; write {REPLACED[key]} instead.")
        elif key in own:
            _check_type(value, typing.get_type_hints(Config)[key], where)
            values[key] = value
        elif key in foreign:
            _check_type(value, TYPES.get(key) or typing.get_type_hints(TrainingArguments)[key], where)
            values["training"][key] = value
        else:
            nearest = difflib.get_close_matches(key, [*own, *foreign], n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise UserError(f"{path}: unknown key {key!r}{hint}")
    for required in ("model_name_or_path", "output_dir"):
        if not content.get(required):
            raise UserError(f"{path}: {required} must be set.")
    values.setdefault("use_peft", None)
    if values["use_peft"] is None:
        values["use_peft"] = stage == "stage_II"
    config = Config(**values)
    _check_values(config, content, stage, path)
    _check_template(config, content, path)
    _check_sharding(config, path)
    return config


def training_arguments(config: Config) -> TrainingArguments:
    """TrainingArguments of a run, with the accumulation that `total_batch_size` asks for.

    Raises:
        UserError: the total batch is no multiple of what the processes hold at once, or transformers refuses a value.
    """
    values = dict(config.training)
    values["output_dir"] = str(config.output_dir)
    values["remove_unused_columns"] = False  # rows are read by our collator, not by column
    values.setdefault("report_to", "tensorboard" if importlib.util.find_spec("tensorboard") else "none")
    values.setdefault("ddp_find_unused_parameters", False)
    # Without this, transformers starts several CPU processes that each believe to be alone.
    values.setdefault("use_cpu", not torch.accelerator.is_available())
    values.setdefault("dataloader_pin_memory", not values["use_cpu"])
    # Rows are tokenised beside the step; on a CPU that would take cores from it, and is too little to notice.
    values.setdefault("dataloader_num_workers", 0 if values["use_cpu"] else 2)
    for key in (*CHECKPOINTING_KEYS, *COMPILE_KEYS):
        values.pop(key, None)  # switched on where the model is loaded: the trainer sees the objective, not the model
    if config.total_batch_size is not None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
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
    try:
        args = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"training arguments: {str(error).strip().splitlines()[0]}") from error
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError("fsdp needs several processes; start with torchrun --nproc_per_node=N, or take fsdp out.")
    available = get_available_reporting_integrations()
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or ():
        if name not in ("none", "all", *available):
            choices = ", ".join(["none", *available])
            raise UserError(f"report_to: {name!r} is not installed here; install it, or choose from {choices}.")
    return args


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UserError(f"{path}: the config cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is needed, not a {type(content).__name__}.")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} is written twice")
        content[key] = value
    return content


def _check_values(config: Config, content: dict[str, Any], stage: Stage, path: str | Path) -> None:
    """Ranges, and keys that contradict each other."""

    def refuse(condition: bool, sentence: str) -> None:
        if condition:
            raise UserError(f"{path}: {sentence}")

    for key, stages in STAGE_KEYS.items():
        refuse(key in content and stage not in stages, f"{key} has no effect in {stage}; it belongs to {stages[0]}.")
    allowed = ", ".join(POOLING_ALIASES)
    refuse(config.pooling_mode not in POOLING_ALIASES, f"pooling_mode is {config.pooling_mode!r}; allowed: {allowed}.")
    refuse(
        config.template is not None and config.template not in TEMPLATES,
        f"template is {config.template!r}; allowed: {', '.join(TEMPLATES)}.",
    )
    refuse(not 0 <= config.alpha <= 1, f"alpha is {config.alpha}; it must lie between 0 and 1.")
    refuse(
        config.activation_memory_gb is not None and config.activation_memory_gb <= 0,
        f"activation_memory_gb is {config.activation_memory_gb}; it must be above 0.",
    )
    refuse(config.loss_scale <= 0, f"loss_scale is {config.loss_scale}; it must be above 0.")
    refuse(not 0 <= config.lora_dropout < 1, f"lora_dropout is {config.lora_dropout}; it must lie in [0, 1).")
    refuse(config.num_eval_rows < 0, f"num_eval_rows is {config.num_eval_rows}; 0 or more is needed.")
    refuse(config.num_hard_negatives < 0, f"num_hard_negatives is {config.num_hard_negatives}; 0 or more is needed.")
    for key in ("max_seq_length", "doc_max_length", "lora_r", "lora_alpha", "max_train_samples", "total_batch_size",
                "tokens_per_microbatch", "stop_after_n_steps", "per_device_train_batch_size",
                "gradient_accumulation_steps"):  # fmt: skip
        value = getattr(config, key, config.training.get(key))
        refuse(value is not None and value < 1, f"{key} is {value}; it must be above 0.")
    refuse(
        (config.tokens_per_microbatch or config.max_seq_length) < config.max_seq_length,
        f"tokens_per_microbatch is {config.tokens_per_microbatch}, less than the {config.max_seq_length} tokens that "
        "one text may have (max_seq_length).",
    )
    refuse(
        config.activation_memory_gb is not None
        and (config.tokens_per_microbatch is None or config.checkpointing is not None),
        "activation_memory_gb needs tokens_per_microbatch, and takes the place of gradient_checkpointing.",
    )
    checkpointing = config.checkpointing or {}
    refuse(
        bool(checkpointing.get("use_reentrant")),
        "use_reentrant: true is not supported; packed rows are recomputed by the other kind, so leave it out.",
    )
    for key in ("sources", "lora_modules"):
        refuse(getattr(config, key) == [], f"{key} is []; name at least one, or leave the key out for all.")
    horizon = config.training.get("max_steps", -1)
    refuse(
        0 < horizon < (config.stop_after_n_steps or 0),
        f"stop_after_n_steps is {config.stop_after_n_steps}, beyond the horizon of max_steps {horizon}.",
    )
    refuse(
        config.dataset_file_path is None and config.sources_file is None,
        "dataset_file_path must name the folder of the training files.",
    )
    refuse(
        config.total_batch_size is not None and "gradient_accumulation_steps" in content,
        "total_batch_size and gradient_accumulation_steps are both set; the second follows from the first.",
    )
    refuse(
        content.get("eval_strategy", "no") != "no" and not config.num_eval_rows,
        "eval_strategy is set, but num_eval_rows is 0; say how many rows of each source to hold out.",
    )
    refuse(
        config.nano_beir is not None and content.get("eval_strategy", "no") == "no",
        "nano_beir is set, but eval_strategy is not, so it would never run; set eval_strategy or leave nano_beir out.",
    )
    refuse(
        bool(content.get("resume_from_checkpoint")),
        "resume_from_checkpoint: a run cannot be resumed yet; start it again from step 0.",
    )
    refuse(
        stage != "stage_II" and bool(config.use_peft),
        f"use_peft: {stage} trains all parameters, the language-model head among them; LoRA belongs to stage_II.",
    )


def _check_template(config: Config, content: dict[str, Any], path: str | Path) -> None:
    """What the named template does not allow; an inferred one, or a parent checkpoint's, is checked at loading."""
    if config.examples_per_query < 0:
        raise UserError(f"{path}: examples_per_query is {config.examples_per_query}; 0 or more is needed.")
    if config.template is None:
        return
    try:
        segments_of(config.template, POOLING_ALIASES[config.pooling_mode])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if "instruction_join" in content and not leaves_join_open(config.template):
        raise UserError(
            f"{path}: instruction_join has no effect under template {config.template!r}, which fixes what stands "
            "between instruction and text; take it out."
        )
    if config.examples_per_query and not TEMPLATES[config.template].example:
        takers = ", ".join(name for name, template in TEMPLATES.items() if template.example)
        raise UserError(
            f"{path}: examples_per_query is {config.examples_per_query}, but template {config.template!r} has no "
            f"place for examples; templates that do: {takers}."
        )


def _check_sharding(config: Config, path: str | Path) -> None:
    """What FSDP cannot do here, or would do otherwise than written."""
    training = config.training
    fsdp, given = training.get("fsdp"), training.get("fsdp_config") or {}

    def refuse(condition: bool, sentence: str) -> None:
        if condition:
            raise UserError(f"{path}: {sentence}")

    refuse(
        not isinstance(fsdp, bool | None),
        f"fsdp is {fsdp!r}; write true, and what else there is to say in fsdp_config.",
    )
    if not fsdp:
        refuse("fsdp_config" in training, "fsdp_config has no effect without fsdp; set fsdp to true, or take it out.")
        return
    refuse(not isinstance(given, dict), f"fsdp_config is {given!r}; an object is needed.")
    unknown = next((key for key in given if key not in FSDP_KEYS), None)
    refuse(unknown is not None, f"fsdp_config: {unknown!r} is not supported; allowed: {', '.join(FSDP_KEYS)}.")
    refuse(given.get("version", 2) != 2, f"fsdp_config: version is {given.get('version')!r}; only FSDP2 is supported.")
    refuse(
        bool(config.use_peft),
        "fsdp with use_peft is not supported; LoRA trains a small share of the weights, so take fsdp out and every "
        "process holds the frozen base.",
    )
    refuse(
        config.nano_beir is not None,
        "nano_beir cannot run with fsdp, as processes encode sets of different sizes while each holds a share of the "
        "weights; take it out and evaluate the checkpoints instead.",
    )
    refuse(
        training.get("save_strategy", "steps") != "no" and not training.get("save_only_model"),
        "fsdp needs save_only_model: true, as the optimiser's state is not gathered and no run can be resumed yet.",
    )
    refuse(bool(training.get("load_best_model_at_end")), "load_best_model_at_end cannot be used with fsdp.")
    refuse(bool(training.get("fp16")), "fp16 cannot be used with fsdp; use bf16.")
    refuse(
        bool(training.get("bf16")) and config.torch_dtype not in (None, "float32"),
        f"torch_dtype is {config.torch_dtype!r}, but with fsdp bf16 means float32 weights and steps in bfloat16; leave "
        "torch_dtype or bf16 out.",
    )


def _check_type(value: Any, hint: Any, where: str) -> None:
    """Refuse a JSON value that does not have the annotated type; a whole number passes for a float."""
    if not _fits(value, hint):
        choices = [c for h in (typing.get_args(hint) or (hint,)) for c in _choices(h)] or _choices(hint)
        allowed = f"allowed: {', '.join(map(repr, choices))}" if choices else f"a {_name(hint)} is needed"
        raise UserError(f"{where} is {value!r}; {allowed}.")


def _choices(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else []


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    if hint in (bool, str):
        return isinstance(value, hint)
    # Enumerations and dictionaries of TrainingArguments: transformers itself knows what they may hold.
    return isinstance(value, str | dict | list)


def _name(hint: Any) -> str:
    names = {bool: "true or false", int: "whole number", float: "number", str: "string", type(None): "null"}
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return " or ".join(
        names.get(option, "list" if typing.get_origin(option) is list else "value") for option in options
    )
