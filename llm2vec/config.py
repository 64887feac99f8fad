"""One run = one flat JSON file. Reading it, checking it, and what its keys mean.

A key is one of ours (the fields of `Config`) or one of transformers' TrainingArguments. Anything else is an error
that names the nearest known key, and so are a wrong type, a value that is not allowed and two keys that contradict
each other; all of that is found before any weights load.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
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

from llm2vec.json_text import read_object
from llm2vec.templates import TEMPLATES, leaves_join_open, segments_of
from llm2vec.types import (
    POOLING_ALIASES,
    AttnImplementation,
    DtypeName,
    MaskingScheme,
    MaskTokenType,
    ReconstructionTarget,
    Reduction,
    SymmetricInstructions,
    UserError,
)

logger = logging.getLogger(__name__)

Stage = Literal["stage_I", "stage_II", "lm", "simcse", "mntp"]

#: Stages that train a LoRA adapter unless told otherwise.
LORA_STAGES: tuple[Stage, ...] = ("stage_II", "simcse", "mntp")

#: Keys of older TrainingArguments that changed nothing about a result: accepted, and said to be without effect.
WITHOUT_EFFECT = (
    "overwrite_output_dir", "logging_dir", "save_safetensors", "include_tokens_per_second", "past_index",
    "use_legacy_prediction_loop", "half_precision_backend", "fp16_backend", "use_ipex", "jit_mode_eval",
    "tpu_metrics_debug", "ray_scope", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
)  # fmt: skip

#: Keys of older TrainingArguments that still mean what they meant, and their names today.
RENAMED = {"evaluation_strategy": "eval_strategy"}

#: Keys of older TrainingArguments that did matter, and what to write instead.
REPLACED = {
    "warmup_ratio": "`warmup_steps` with a fraction below 1",
    "per_gpu_train_batch_size": "`per_device_train_batch_size`",
    "no_cuda": "`use_cpu`",
    "group_by_length": "`train_sampling_strategy` (and note that rows come in one-source blocks here)",
    "adafactor": '`optim`: "adafactor"',
    "fp16_opt_level": "`fp16`",
}

#: What `dataset_name` says where it is no hub dataset.
DATASET_NAMES = ("E5", "Wiki1M")

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
    "objective": ("stage_I",),
    "target": ("stage_I",),
    "alpha": ("stage_I",),
    "reconstruct_instruction": ("stage_I",),
    "reconstruction_probe": ("stage_I",),
    "loss_scale": ("stage_II", "simcse"),
    "num_hard_negatives": ("stage_II",),
    "examples_per_query": ("stage_II",),
    "matryoshka_dims": ("stage_II", "simcse"),
    "mask_false_negatives": ("stage_II", "simcse"),
    "own_negatives_only": ("stage_II",),
    "distillation_weight": ("stage_II",),
    "lm_weight": ("stage_II",),
    "dataset_config_name": ("mntp",),
    "mask_token_type": ("mntp",),
    "mlm_probability": ("mntp",),
    "data_collator_type": ("mntp",),
    "simcse_dropout": ("simcse",),
    "embedding_diagnostics": ("stage_II", "stage_I", "lm", "simcse"),
}


@dataclass(frozen=True)
class Config:
    """The keys that are ours. What each default follows is in docs/fidelity.md.

    Attributes:
        model_name_or_path: base model: a folder (such as an earlier stage's `output_dir`) or a hub name.
        peft_model_name_or_path: adapters to merge into the base first, innermost first.
        bidirectional: attention of the embedding pass; always on in MNTP.
        pooling_mode: `last` (`eos_token`, `last_token`), `mean`, `weighted_mean`, `first` (`bos_token`). MNTP, which
            pools nothing, hands `mean` on where none is named.
        template: key of `templates.TEMPLATES`; None = inferred from the tokenizer, and said. The special tokens that
            it adds are given to a base that lacks them.
        instruction_join: between instruction and text, in the templates that leave it open; stored in the
            checkpoint, so evaluation uses the same.
        skip_instruction: leave the instruction out of mean pooling.
        max_seq_length: most tokens of a row, template included; only the text is cut.
        doc_max_length: most tokens of the text alone; None = as many as fit.
        torch_dtype: of the weights; None = float32. `bfloat16` without `bf16` is the release's pure bfloat16.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`.
        use_peft: LoRA instead of all parameters; None = on in Stage II, SimCSE and MNTP, off elsewhere.
        lora_r: rank.
        lora_alpha: scale; None = twice the rank.
        lora_dropout: dropout before the adapter.
        lora_modules: modules that get an adapter; None = the seven projections of a layer.
        dataset_name: "E5", the released archive's 14 sources; or "Wiki1M", a sentence a line, for SimCSE; or for
            MNTP a hub dataset with a column `text`.
        dataset_config_name: which of a hub dataset's configurations (MNTP).
        dataset_file_path: folder with the sources' files; for SimCSE also a `.txt` file; for MNTP also a `.txt` file,
            a text a line, or a `.jsonl` file of objects with `text`.
        sources: which sources to read; None = all of the table.
        sources_file: a JSON table of one's own sources in place of the released archive's.
        max_train_samples: most rows of each source; None = all.
        num_eval_rows: rows at the end of each source's file that are never trained on; with `eval_strategy`, the
            objective's figures on them are logged as `eval_...`.
        nano_beir: hub name or local folder of NanoBEIR (`sentence-transformers/NanoBEIR-en`); with `eval_strategy`,
            nDCG@10 on its 13 sets is logged as `eval_nano_...`; None = not.
        embedding_diagnostics: with `eval_strategy`, log alignment, uniformity, effective rank and cosines of the
            held-out rows' vectors as `eval_...`, by source too, and their histograms in `diagnostics.jsonl`.
        reconstruction_probe: with `eval_strategy`, log loss and token accuracy of the held-out rows' reconstructions
            as `eval_reconstruction_...`: from their own anchors, from another row's and from random ones (Stage I).
        num_hard_negatives: hard negatives a row (Stage II).
        examples_per_query: most few-shot examples before a query, other rows of its micro-batch (Stage II); how many
            is drawn for each query, from 0 up.
        symmetric_instructions: `documented` puts Table 6's symmetric instructions on documents too, `as_released`
            on queries only.
        objective: of Stage I: `reconstruction` through the anchor, or a `token_set` out of a block of added tokens.
        target: what an anchor reconstructs in Stage I: the `counterpart` of its text, or the text itself (`self`).
        alpha: weight of EBQ2D in Stage I, or of the queries under target `self`; 0 and 1 skip the unused pass.
        reconstruct_instruction: whether a query's instruction is a reconstruction target too.
        reduction: `token_mean` over the whole optimiser step, or the release's `micro_batch_mean`.
        loss_scale: 1 / temperature of Stage II and SimCSE.
        matryoshka_dims: the contrastive loss is the mean over the vectors cut to these sizes; None = not cut.
        mask_false_negatives: a document of the pool that has the text of a query's positive is no negative of it.
        own_negatives_only: sources whose queries are compared with their own row's documents only; None = no source.
        distillation_weight: of the term that imitates a teacher's scores of a row's own documents, which every row
            must hold then (`pos_score`, `neg_scores`).
        simcse_dropout: attention dropout of the base in SimCSE.
        lm_weight: of a causal language-modelling loss on the rows' own texts beside the contrastive one; 0 = none.
        mask_token_type: what stands for a masked token in MNTP where the tokenizer has no mask token of its own:
            `blank` (the token `_`), `eos`, or a new token `<mask>`.
        mlm_probability: how likely a token is chosen to be predicted in MNTP.
        data_collator_type: `default`: of the chosen tokens 80 % are masked, 10 % replaced by a random one and 10 %
            kept; `all_mask`: all are masked.
        loss_class: only "HardNegativeNLLLoss".
        total_batch_size: rows of an optimiser step over all processes; None = what per-device batch, accumulation
            and processes give. When set, the accumulation follows from it.
        one_source_per: `step`: all rows of an optimiser step come from one source; `micro_batch`: all rows that the
            processes hold at once do, as in the release (the same without accumulation).
        stop_after_n_steps: end here although the schedule's horizon (`num_train_epochs` or `max_steps`) lies
            further; None = run to the horizon.
        resume: `auto`: go on from the newest whole checkpoint in the output folder; `never`: start at step 0 and write
            over what is there; or a checkpoint's folder to go on from (`resume.py`).
        max_skipped_steps: a step whose loss or gradient is not finite is skipped; so many in a row end the run.
        experiment_id: a folder below `output_dir` to write to.
        stage: whose script reads the config; a file need not say.
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
    dataset_name: str = "E5"
    dataset_config_name: str | None = None
    dataset_file_path: str | None = None
    sources: list[str] | None = None
    sources_file: str | None = None
    max_train_samples: int | None = None
    num_eval_rows: int = 0
    nano_beir: str | None = None
    embedding_diagnostics: bool = False
    reconstruction_probe: bool = False
    num_hard_negatives: int = 1
    examples_per_query: int = 0
    symmetric_instructions: SymmetricInstructions = "documented"
    objective: Literal["reconstruction", "token_set"] = "reconstruction"
    target: ReconstructionTarget = "counterpart"
    alpha: float = 0.2
    reconstruct_instruction: bool = False
    reduction: Reduction = "token_mean"
    loss_scale: float = 20.0
    matryoshka_dims: list[int] | None = None
    mask_false_negatives: bool = False
    own_negatives_only: list[str] | None = None
    distillation_weight: float = 0.0
    simcse_dropout: float = 0.3
    lm_weight: float = 0.0
    mask_token_type: MaskTokenType = "blank"
    mlm_probability: float = 0.2
    data_collator_type: MaskingScheme = "default"
    loss_class: Literal["HardNegativeNLLLoss"] = "HardNegativeNLLLoss"
    total_batch_size: int | None = None
    tokens_per_microbatch: int | None = None
    activation_memory_gb: float | None = None
    one_source_per: Literal["step", "micro_batch"] = "step"
    stop_after_n_steps: int | None = None
    resume: str = "auto"
    max_skipped_steps: int = 5
    experiment_id: str | None = None
    stage: Stage | None = field(default=None, compare=False)
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
    def hub_dataset(self) -> str | None:
        """The hub dataset whose texts are read, if any."""
        return None if self.dataset_name in DATASET_NAMES else self.dataset_name

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
    content = _with_current_names(read_object(Path(path), str(path)), path)
    own = {f.name for f in dataclasses.fields(Config)} - {"training"}
    foreign = {f.name for f in dataclasses.fields(TrainingArguments)}
    values: dict[str, Any] = {"stage": stage, "training": {}}
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
    if stage == "mntp":
        values = {"bidirectional": True, "pooling_mode": "mean", **values}
    values.setdefault("use_peft", None)
    if values["use_peft"] is None:
        values["use_peft"] = stage in LORA_STAGES
    if values["stage"] != stage:
        raise UserError(f"{path}: stage is {values['stage']!r}, but the script that reads it is that of {stage}.")
    config = Config(**values)
    _check_values(config, content, stage, path)
    _check_contrastive(config, content, stage, path)
    _check_token_objectives(config, stage, path)
    _check_template(config, content, path)
    _check_sharding(config, path)
    return config


def training_arguments(config: Config, num_processes: int | None = None) -> TrainingArguments:
    """TrainingArguments of a run, with the accumulation that `total_batch_size` asks for.

    Args:
        config: of the run.
        num_processes: of a run that is only planned; None = those that torchrun started.

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
    try:
        args = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"training arguments: {str(error).strip().splitlines()[0]}") from error
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED and (num_processes or 1) == 1:
        raise UserError("fsdp needs several processes; start with torchrun --nproc_per_node=N, or take fsdp out.")
    available = get_available_reporting_integrations()
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or ():
        if name not in ("none", "all", *available):
            choices = ", ".join(["none", *available])
            raise UserError(f"report_to: {name!r} is not installed here; install it, or choose from {choices}.")
    return args


def _with_current_names(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The keys under the names that the current transformers gives them."""
    for key in content:
        if RENAMED.get(key) in content:
            raise UserError(f"{path}: {key} and {RENAMED[key]} are the same option; write it once.")
    return {RENAMED.get(key, key): value for key, value in content.items()}


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
                "tokens_per_microbatch", "stop_after_n_steps", "max_skipped_steps", "per_device_train_batch_size",
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
        config.dataset_file_path is None and config.sources_file is None and config.hub_dataset is None,
        "dataset_file_path must name the folder of the training files.",
    )
    refuse(
        config.total_batch_size is not None and "gradient_accumulation_steps" in content,
        "total_batch_size and gradient_accumulation_steps are both set; the second follows from the first.",
    )
    refuse(
        content.get("eval_strategy", "no") != "no" and not config.num_eval_rows and config.hub_dataset is None,
        "eval_strategy is set, but num_eval_rows is 0; say how many rows of each source to hold out.",
    )
    refuse(
        config.nano_beir is not None and content.get("eval_strategy", "no") == "no",
        "nano_beir is set, but eval_strategy is not, so it would never run; set eval_strategy or leave nano_beir out.",
    )
    refuse(
        config.embedding_diagnostics and (content.get("eval_strategy", "no") == "no" or config.num_eval_rows < 2),
        "embedding_diagnostics is true, but it is taken of held-out rows at evaluations; set eval_strategy, and "
        "num_eval_rows to 2 or more.",
    )
    refuse(
        config.reconstruction_probe and (content.get("eval_strategy", "no") == "no" or config.num_eval_rows < 2),
        "reconstruction_probe is true, but it is taken of held-out rows at evaluations; set eval_strategy, and "
        "num_eval_rows to 2 or more.",
    )
    refuse(
        bool(content.get("resume_from_checkpoint")),
        "resume_from_checkpoint: write `resume` instead: auto, never, or the checkpoint's folder.",
    )
    refuse(
        stage not in LORA_STAGES and bool(config.use_peft),
        f"use_peft: {stage} trains all parameters, the language-model head among them; LoRA belongs to stage_II.",
    )


def _check_token_objectives(config: Config, stage: Stage, path: str | Path) -> None:
    """The keys of objectives that predict tokens, and of the texts they are read from."""

    def refuse(condition: bool, sentence: str) -> None:
        if condition:
            raise UserError(f"{path}: {sentence}")

    for key in ("alpha", "target", "reconstruct_instruction", "reconstruction_probe"):
        changed = getattr(config, key) != getattr(Config, key)
        refuse(config.objective == "token_set" and changed, f"{key} has no effect under objective 'token_set'.")
    refuse(
        config.objective == "token_set" and config.bidirectional,
        "objective 'token_set' models the text as it reads it, so attention is causal; take bidirectional out.",
    )
    refuse(config.lm_weight < 0, f"lm_weight is {config.lm_weight}; 0 or more is needed.")
    probability = config.mlm_probability
    refuse(not 0 < probability <= 1, f"mlm_probability is {probability}; it must be above 0 and at most 1.")
    refuse(
        stage != "mntp" and config.hub_dataset is not None,
        f"dataset_name is {config.dataset_name!r}; allowed: {', '.join(map(repr, DATASET_NAMES))}.",
    )
    refuse(
        stage == "mntp" and not config.bidirectional,
        "bidirectional is false, but mntp accustoms a model to bidirectional attention; take it out.",
    )
    refuse(
        config.dataset_config_name is not None and config.hub_dataset is None,
        "dataset_config_name has no effect without a hub dataset in dataset_name; take it out.",
    )
    for key in ("dataset_file_path", "sources_file", "sources"):
        given = getattr(config, key) is not None
        refuse(config.hub_dataset is not None and given, f"{key} has no effect beside a hub dataset.")


def _check_contrastive(config: Config, content: dict[str, Any], stage: Stage, path: str | Path) -> None:
    """The contrastive stages' own keys."""

    def refuse(condition: bool, sentence: str) -> None:
        if condition:
            raise UserError(f"{path}: {sentence}")

    dims = config.matryoshka_dims
    refuse(
        dims is not None and (min(dims, default=0) < 1 or len(set(dims)) < len(dims)),
        f"matryoshka_dims is {dims}; different sizes above 0 are needed.",
    )
    refuse(config.distillation_weight < 0, f"distillation_weight is {config.distillation_weight}; 0 or more is needed.")
    refuse(config.own_negatives_only == [], "own_negatives_only is []; name at least one source, or leave the key out.")
    for key in ("distillation_weight", "own_negatives_only"):
        refuse(
            bool(getattr(config, key)) and not config.num_hard_negatives,
            f"{key} is set, but num_hard_negatives is 0, so a row has no documents to tell apart.",
        )
    refuse(not 0 <= config.simcse_dropout < 1, f"simcse_dropout is {config.simcse_dropout}; it must lie in [0, 1).")
    lines = str(config.dataset_file_path).endswith(".txt")
    if stage != "simcse":
        refuse(config.dataset_name == "Wiki1M", "dataset_name is 'Wiki1M', which has no queries; it belongs to simcse.")
        return
    refuse(
        not config.simcse_dropout and not (config.use_peft and config.lora_dropout),
        "simcse_dropout is 0 and no other dropout is on, so a text and its positive would be the same vector.",
    )
    refuse(
        "dataset_name" in content and (config.dataset_name == "Wiki1M") != lines,
        f"dataset_name is {config.dataset_name!r}, but dataset_file_path is {config.dataset_file_path}; Wiki1M is a "
        ".txt file, E5 a folder.",
    )
    for key in ("sources", "sources_file"):
        refuse(lines and key in content, f"{key} has no effect where dataset_file_path is a text file; take it out.")


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
        config.embedding_diagnostics,
        "embedding_diagnostics cannot run with fsdp, as processes encode different texts while each holds a share of "
        "the weights; take it out.",
    )
    refuse(
        config.reconstruction_probe,
        "reconstruction_probe cannot run with fsdp, as processes decode different texts while each holds a share of "
        "the weights; take it out and score the checkpoints instead.",
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
