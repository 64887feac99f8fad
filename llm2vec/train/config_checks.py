"""Which values of a run's config are allowed, and which of its keys contradict each other.

`config_file` calls `check_config` when it has read a file; nothing here looks at weights or data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from llm2vec.text.templates import TEMPLATES, leaves_join_open, segments_of
from llm2vec.train.config import DATASET_NAMES, LORA_STAGES, STAGE_KEYS, Config
from llm2vec.types import POOLING_ALIASES, Stage, UserError

#: Keys of TrainingArguments that the trainer here does not serve, and why; unless as they are where nobody writes them,
#: they would be ignored or break the run.
UNSUPPORTED = {
    "data_seed": "rows come in the order of `seed`",
    "train_sampling_strategy": "rows come in one-source blocks, in the order of `seed`",
    "label_smoothing_factor": "the losses are the objectives' own",
    "neftune_noise_alpha": "the objectives add no noise to embeddings",
    "use_liger_kernel": "models run by transformers' own code",
    "auto_find_batch_size": "the batch decides a query's negatives; `tokens_per_microbatch` bounds the memory",
    "accelerator_config": "it would share rows out otherwise than in one-source blocks",
    "deepspeed": "`fsdp` shares the weights out",
    "parallelism_config": "`fsdp` shares the weights out",
    "push_to_hub": "experiments/export.py uploads what was trained",
}

#: What `fsdp_config` may say.
FSDP_KEYS = ("version", "reshard_after_forward", "transformer_layer_cls_to_wrap")


def check_config(config: Config, content: dict[str, Any], stage: Stage, path: str | Path) -> None:
    """Refuse values that are out of range, have no effect, or contradict each other.

    Args:
        config: with its defaults filled in.
        content: the keys that the file names, which tells a default from a choice.
        stage: which script reads it.
        path: the file, for the message.

    Raises:
        UserError: what is wrong, with file and key.
    """
    _check_values(config, content, stage, path)
    _check_training(config, path)
    _check_contrastive(config, content, stage, path)
    _check_token_objectives(config, stage, path)
    _check_template(config, content, path)
    _check_sharding(config, path)


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
    below = Path(config.experiment_id or "")
    refuse(
        below.is_absolute() or ".." in below.parts,
        f"experiment_id is {config.experiment_id!r}; the name of a folder below output_dir is needed.",
    )
    refuse(
        config.output_dir.resolve() == Path(config.model_name_or_path).resolve(),
        f"output_dir is {config.output_dir}, which the run starts from and would write over; name another folder.",
    )
    refuse(not config.resume, "resume is ''; write auto, never, or a checkpoint's folder.")
    refuse(
        bool(content.get("resume_from_checkpoint")),
        "resume_from_checkpoint: write `resume` instead: auto, never, or the checkpoint's folder.",
    )
    refuse(
        stage not in LORA_STAGES and bool(config.use_peft),
        f"use_peft: {stage} trains all parameters, the language-model head among them; LoRA belongs to stage_II.",
    )


def _check_training(config: Config, path: str | Path) -> None:
    """The keys of TrainingArguments, of which transformers refuses some late and some never."""
    training = config.training

    def refuse(condition: bool, sentence: str) -> None:
        if condition:
            raise UserError(f"{path}: {sentence}")

    for key, reason in UNSUPPORTED.items():
        default = getattr(TrainingArguments, key, None)
        refuse(training.get(key, default) != default, f"{key} is not supported: {reason}; take it out.")
    seed = training.get("seed", 0)
    refuse(not 0 <= seed < 2**32, f"seed is {seed}; it must lie between 0 and {2**32 - 1}.")
    for key in ("learning_rate", "weight_decay"):
        value = training.get(key, 0)
        refuse(value < 0, f"{key} is {value}; 0 or more is needed.")
    epochs = training.get("num_train_epochs", 1)
    refuse(
        epochs <= 0 and training.get("max_steps", -1) <= 0,
        f"num_train_epochs is {epochs}, so there is no step to do; it must be above 0, or max_steps must.",
    )
    refuse(
        bool(training.get("eval_on_start")) and training.get("eval_strategy", "no") == "no",
        "eval_on_start is true, but eval_strategy is not set, so there is nothing to evaluate on.",
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
        stage == "mntp" and config.max_seq_length < 2,
        "max_seq_length is 1, but a masked token is predicted from the one before it; 2 or more are needed.",
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
        given = getattr(config, key) is not None
        refuse(lines and given, f"{key} has no effect where dataset_file_path is a text file; take it out.")


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
