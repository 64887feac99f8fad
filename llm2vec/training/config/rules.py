"""Which keys of a run's config contradict each other. What one key may hold stands beside it, in `Config`.

A rule is a condition and the sentence for it. `file` reports the first sentence. Nothing here looks at weights
or data.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

from llm2vec.objectives.stage_one import STAGE_ONE, stage_one_objective
from llm2vec.text.templates import TEMPLATES, leaves_join_open, segments_of, template_named
from llm2vec.training.config import DATASET_NAMES, KEYS, LORA_STAGES, Config
from llm2vec.types import POOLING_ALIASES, UserError

#: What `fsdp_config` may say.
FSDP_KEYS = ("version", "reshard_after_forward", "transformer_layer_cls_to_wrap")

#: What an evaluation says of held-out rows by comparing each text with its positive.
IN_BATCH = ("loss", "loss_contrastive", "in_batch_accuracy")


def contradictions(config: Config, written: Container[str]) -> Iterator[str]:
    """What is wrong between a config's keys, of which the file names those that are `written`: that tells a default
    from a choice. The first sentence counts: what is asked after it may build on it."""
    yield from _in_the_run(config)
    yield from _in_the_rows(config, written)
    yield from _in_the_objective(config)
    if config.template is not None:  # an inferred one, or a parent checkpoint's, is checked at loading
        yield from _in_the_template(config, config.template, written)
    yield from _in_what_is_measured(config)
    yield from _in_sharding(config)


def _in_the_run(config: Config) -> Iterator[str]:
    """What is trained, where it goes, how long, and how much runs at once."""
    training, name, tokens = config.training, config.experiment_id, config.tokens_per_microbatch
    output = config.output_dir.resolve()
    for parent in (config.model_name_or_path, *config.adapters):
        place = Path(parent).resolve()
        below = place.relative_to(output).parts if place.is_relative_to(output) else None
        # A run replaces and removes checkpoints, too, whichever run wrote them.
        if below == () or (below and below[0].startswith("checkpoint-")):
            yield (
                f"output_dir is {config.output_dir}; in it lies {parent}, which the run starts from and would write "
                "over; name another folder."
            )
    if name and (Path(name).is_absolute() or ".." in Path(name).parts):
        yield f"experiment_id is {name!r}; the name of a folder below output_dir is needed."
    if not config.resume:
        yield "resume is ''; write auto, never, or a checkpoint's folder."
    if training.get("resume_from_checkpoint"):
        yield "resume_from_checkpoint: write `resume` instead: auto, never, or the checkpoint's folder."
    if config.stage == "stage_I" and config.use_peft != (config.trainable != "full"):
        yield "use_peft: stage_I says what it trains by `trainable`: full, lora or tokens; take it out."
    if config.use_peft and config.stage not in (*LORA_STAGES, "stage_I"):
        yield f"use_peft: {config.stage} trains all parameters, the head among them; LoRA belongs to stage_II."
    adapts = config.use_peft and config.trainable != "tokens"
    for key in ("use_dora", "use_rslora", "init_lora_weights", "load_in"):
        if getattr(config, key) and not adapts:
            yield f"{key} has no effect without a LoRA adapter (use_peft); take it out."
    if config.init_lora_weights == "orthogonal" and config.lora_r % 2:
        yield f"init_lora_weights is 'orthogonal', but lora_r is {config.lora_r}; an even one is needed."
    if config.load_in and config.adapters:
        yield "load_in is set, but merging peft_model_name_or_path would round it; export the merged model first."
    if config.load_in and config.compilation is not None:
        yield "load_in and torch_compile cannot be used together; take one of the two out."
    if config.load_in == "4bit" and config.torch_dtype == "auto" and not (training.get("bf16") or training.get("fp16")):
        yield "torch_dtype is 'auto', but load_in '4bit' computes in a type that must be named; set bf16, or name one."
    half = training.get("bf16") or training.get("fp16") or config.torch_dtype not in (None, "float32")
    if "/" in config.attn_implementation and not half:
        yield f"attn_implementation is {config.attn_implementation!r}, which computes in half precision; set bf16."
    if config.lora_modules == []:
        yield "lora_modules is []; name at least one, or leave the key out for all."
    horizon, epochs = training.get("max_steps", -1), training.get("num_train_epochs", 1)
    if 0 < horizon < (config.stop_after_n_steps or 0):
        yield f"stop_after_n_steps is {config.stop_after_n_steps}, beyond the horizon of max_steps {horizon}."
    if epochs <= 0 and horizon <= 0:
        yield f"num_train_epochs is {epochs}, so there is no step to do; it must be above 0, or max_steps must."
    if epochs > 1e6:
        yield f"num_train_epochs is {epochs:g}; at most 1,000,000 are possible."
    if config.total_batch_size is not None and "gradient_accumulation_steps" in training:
        yield "total_batch_size and gradient_accumulation_steps are both set; the second follows from the first."
    if tokens is not None and tokens < config.max_seq_length:
        yield (
            f"tokens_per_microbatch is {tokens}, less than the {config.max_seq_length} tokens that one text may have "
            "(max_seq_length)."
        )
    if config.activation_memory_gb is not None and (tokens is None or config.checkpointing is not None):
        yield "activation_memory_gb needs tokens_per_microbatch, and takes the place of gradient_checkpointing."
    if (config.checkpointing or {}).get("use_reentrant"):
        yield "use_reentrant: true is not supported; packed rows are recomputed by the other kind, so leave it out."


def _in_the_rows(config: Config, written: Container[str]) -> Iterator[str]:
    """Where rows come from. `hub_dataset` is mntp's alone, and a `.txt` file of lines simcse's and mntp's."""
    name, path = config.dataset_name, config.dataset_file_path
    given = [key for key in ("dataset_file_path", "sources_file", "sources") if getattr(config, key) is not None]
    if config.sources == []:
        yield "sources is []; name at least one, or leave the key out for all."
    if config.hub_dataset is None and path is None and config.sources_file is None:
        yield "dataset_file_path must name the folder of the training files."
    if config.hub_dataset is None and config.dataset_config_name is not None:
        yield "dataset_config_name has no effect without a hub dataset in dataset_name; take it out."
    if config.hub_dataset is not None and config.stage != "mntp":
        yield f"dataset_name is {name!r}; allowed: {', '.join(map(repr, DATASET_NAMES))}."
    if config.hub_dataset is not None and given:
        yield f"{given[0]} has no effect beside a hub dataset."
    if name == "Wiki1M" and config.stage != "simcse":
        yield "dataset_name is 'Wiki1M', which has no queries; it belongs to simcse."
    lines = str(path).endswith(".txt")
    if config.stage == "simcse" and "dataset_name" in written and (name == "Wiki1M") != lines:
        yield f"dataset_name is {name!r}, but dataset_file_path is {path}; Wiki1M is a .txt file, E5 a folder."
    if config.stage == "simcse" and lines and given[1:]:
        yield f"{given[1]} has no effect where dataset_file_path is a text file; take it out."


def _in_the_objective(config: Config) -> Iterator[str]:
    """What is predicted or compared."""
    if config.stage == "stage_I":
        if config.objective == "token_set":
            yield (
                "objective 'token_set' is now made of keys; write target_loss 'bag', target 'both', bottleneck "
                "'states', alpha 0.5 and lm_weight 1 in its place."
            )
        if config.objective not in STAGE_ONE:
            yield f"objective is {config.objective!r}; allowed: {', '.join(map(repr, STAGE_ONE))}."
        of_stage_one = [name for name, key in KEYS.items() if key.stages == ("stage_I",) and name != "objective"]
        read = stage_one_objective(config.objective).keys
        for key in (*of_stage_one, "lm_weight", "bidirectional"):
            if key not in read and getattr(config, key) != getattr(Config, key):
                yield f"{key} has no effect under objective {config.objective!r}; take it out."
        yield from _in_the_pretext(config)
    if config.stage == "mntp" and not config.bidirectional:
        yield "bidirectional is false, but mntp accustoms a model to bidirectional attention; take it out."
    if config.stage == "mntp" and config.max_seq_length < 2:
        yield "max_seq_length is 1, but a masked token is predicted from the one before it; 2 or more are needed."
    if config.stage == "simcse" and not config.simcse_dropout and not (config.use_peft and config.lora_dropout):
        yield "simcse_dropout is 0 and no other dropout is on, so a text and its positive would be the same vector."
    dims = config.matryoshka_dims
    if dims is not None and (min(dims, default=0) < 1 or len(set(dims)) < len(dims)):
        yield f"matryoshka_dims is {dims}; different sizes above 0 are needed."
    if config.own_negatives_only == []:
        yield "own_negatives_only is []; name at least one source, or leave the key out."
    directions = ["qd"] if config.directions is None else config.directions
    if "qd" not in directions or len({*directions}) < len(directions):
        yield f"directions is {directions}; 'qd' is needed, and each of 'dq', 'qq' and 'dd' is possible once."
    if config.partition == "per_direction" and {*directions} - {"qd", "dq"}:
        yield "partition is 'per_direction', but only 'qd' and 'dq' hold a positive; take the other directions out."
    if config.guide is None and (config.guide_margin or config.guide_margin_kind != "absolute"):
        yield "guide_margin has no effect without guide; set guide, or take it out."
    if config.hardness_of != "hard_negatives" and not config.hardness_weight:
        yield "hardness_of has no effect while hardness_weight is 0; set both, or take it out."
    if config.hardness_weight and config.hardness_of == "hard_negatives" and not config.num_hard_negatives:
        yield "hardness_weight concerns hard negatives, and num_hard_negatives is 0; set hardness_of to another kind."
    weights = ["contrastive_weight", "distillation_weight", "cosent_weight", "lm_weight"]
    if config.teacher_vectors is not None:
        weights += ["teacher_cosine_weight", "teacher_mse_weight", "teacher_similarity_weight"]
    if not any(getattr(config, key) for key in weights):
        yield (
            "contrastive_weight is 0, and so is the weight of every other term but those that only spread vectors out "
            "(gor_weight, gor_mean_weight); nothing would be learnt."
        )
    of_teachers = [name for name in KEYS if name.startswith("teacher_") and name != "teacher_vectors"]
    for key in of_teachers if config.teacher_vectors is None else ():
        if getattr(config, key) != getattr(Config, key):
            yield f"{key} has no effect without teacher_vectors; set both, or take it out."
    if config.teacher_vectors is not None and config.lm_weight and config.stage == "stage_II":
        yield "teacher_vectors and lm_weight cannot be used together; take one of the two out."
    if config.teacher_projection and not (config.teacher_cosine_weight or config.teacher_mse_weight):
        yield "teacher_projection has no effect while teacher_cosine_weight and teacher_mse_weight are 0; take it out."
    if config.teacher_projection and config.training.get("fsdp"):
        yield "teacher_projection is true, which fsdp would spread over processes and not save; take one out."
    for key in ("distillation_weight", "own_negatives_only", "teacher_similarity_weight"):
        if getattr(config, key) and not config.num_hard_negatives:
            yield f"{key} is set, but num_hard_negatives is 0, so a row has no documents to tell apart."


def _in_the_pretext(config: Config) -> Iterator[str]:
    """Which of Stage I's keys do not go together."""
    loss, target, frozen = config.target_loss, config.target, config.decoder == "frozen"
    if loss == "kl" and not frozen:
        yield "target_loss is 'kl', but decoder is 'shared', so the teacher would move with its student; use frozen."
    if loss == "kl" and target in ("self", "both"):
        yield f"target_loss is 'kl', but target is {target!r}, where its teacher copies; use next or counterpart."
    of_decoding = {
        "decoder": frozen, "decoder_bos": config.decoder_bos is not None, "projection": config.projection != "none",
        "reconstruction_probe": config.reconstruction_probe,
    }  # fmt: skip
    if loss == "bag" and any(of_decoding.values()):
        key = next(key for key, given in of_decoding.items() if given)
        yield f"{key} has no effect under target_loss 'bag', which decodes nothing; take it out."
    if (config.imitation_weight > 0) != (config.teacher_vectors is not None):
        yield "imitation_weight and teacher_vectors go together; set both, or take one out."
    if config.imitation_weight and target == "next":
        yield "imitation_weight needs vectors of the texts to tell, and target 'next' cuts them anew; take one out."
    if config.trainable == "tokens" and not frozen and loss != "bag":
        yield "trainable is 'tokens', but decoder is 'shared': nothing of it is trained, so set it to frozen."
    if target == "next" and config.reconstruct_instruction:
        yield "reconstruct_instruction has no effect under target 'next', which cuts the text alone; take it out."
    if config.lm_weight and config.bidirectional:
        yield "lm_weight reads the encoding pass, but bidirectional is true, where a token sees itself; take one out."


def _in_the_template(config: Config, template: str, written: Container[str]) -> Iterator[str]:
    """What a template does not allow."""
    try:
        segments_of(template, POOLING_ALIASES[config.pooling_mode])
    except UserError as error:
        yield str(error)
    if config.trainable == "tokens" and not template_named(template).added_tokens:
        yield f"trainable is 'tokens', but template {template!r} adds none; use {template}+memory_8 or the like."
    if "instruction_join" in written and not leaves_join_open(template):
        yield (
            f"instruction_join has no effect under template {template!r}, which fixes what stands between instruction "
            "and text; take it out."
        )
    if config.examples_per_query and not template_named(template).example:
        takers = ", ".join(name for name, template in TEMPLATES.items() if template.example)
        yield (
            f"examples_per_query is {config.examples_per_query}, but template {template!r} has no place for examples; "
            f"templates that do: {takers}."
        )


def _in_what_is_measured(config: Config) -> Iterator[str]:
    """Figures of evaluations that never come, or of rows that are not there."""
    evaluates = config.training.get("eval_strategy", "no") != "no"
    if evaluates and not config.num_eval_rows and config.hub_dataset is None:
        yield "eval_strategy is set, but num_eval_rows is 0; say how many rows of each source to hold out."
    if config.nano_beir is not None and not evaluates:
        yield "nano_beir is set, but eval_strategy is not, so it would never run; set both or leave nano_beir out."
    for key in ("embedding_diagnostics", "reconstruction_probe"):
        if getattr(config, key) and (not evaluates or config.num_eval_rows < 2):
            yield (
                f"{key} is true, but it is taken of held-out rows at evaluations; set eval_strategy, and num_eval_rows "
                "to 2 or more."
            )
    is_best_kept = config.training.get("load_best_model_at_end") or config.training.get("save_strategy") == "best"
    metric = config.training.get("metric_for_best_model") or "loss"
    if config.stage == "simcse" and is_best_kept and metric.removeprefix("eval_") in IN_BATCH:
        yield (
            f"metric_for_best_model is {metric!r}, which tells nothing in simcse, as an evaluation is without the "
            "dropout by which a text's two vectors differ; name a figure of nano_beir or embedding_diagnostics."
        )
    if config.training.get("eval_on_start") and not evaluates:
        yield "eval_on_start is true, but eval_strategy is not set, so there is nothing to evaluate on."


def _in_sharding(config: Config) -> Iterator[str]:
    """What FSDP cannot do here, or would do otherwise than written."""
    training = config.training
    fsdp, given = training.get("fsdp"), training.get("fsdp_config") or {}
    if not isinstance(fsdp, bool | None):
        yield f"fsdp is {fsdp!r}; write true, and what else there is to say in fsdp_config."
    if not fsdp:
        if "fsdp_config" in training:
            yield "fsdp_config has no effect without fsdp; set fsdp to true, or take it out."
        return
    if not isinstance(given, dict):
        yield f"fsdp_config is {given!r}; an object is needed."
    for key in given:
        if key not in FSDP_KEYS:
            yield f"fsdp_config: {key!r} is not supported; allowed: {', '.join(FSDP_KEYS)}."
    if given.get("version", 2) != 2:
        yield f"fsdp_config: version is {given['version']!r}; only FSDP2 is supported."
    if config.imitation_weight:
        yield "imitation_weight learns a map, which fsdp would spread over processes and not save; take one out."
    if config.projection == "linear":
        yield "projection is 'linear', which fsdp would spread over processes and not save; take one of the two out."
    if config.decoder == "frozen":
        yield "decoder is 'frozen', of which every process would hold all beside fsdp; take one of the two out."
    if config.load_in:
        yield "load_in cannot be used with fsdp, which would spread numbers that belong together; take one out."
    if config.trainable == "tokens":
        yield "trainable is 'tokens': fsdp cannot share out a few rows of the embeddings; take it out."
    for key in ("nano_beir", "embedding_diagnostics", "reconstruction_probe"):
        if getattr(config, key):
            yield (
                f"{key} cannot run with fsdp, as processes run different texts while each holds a share of the "
                "weights; take it out and measure the checkpoints instead."
            )
    if training.get("load_best_model_at_end"):
        yield "load_best_model_at_end cannot be used with fsdp."
    if training.get("fp16"):
        yield "fp16 cannot be used with fsdp; use bf16."
    if training.get("bf16") and config.torch_dtype not in (None, "float32"):
        yield (
            f"torch_dtype is {config.torch_dtype!r}, but with fsdp bf16 means float32 weights and steps in bfloat16; "
            "leave torch_dtype or bf16 out."
        )
