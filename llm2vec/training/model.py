"""The model of a run: its base with merged adapters and a fresh one, its tokenizer, and how its texts become vectors.

Used by `stages`, by `run`, and by `planning.plan`, which puts the same together without weights.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from llm2vec.model.backbone import Backbone, attach_lora, load_backbone, load_tokenizer, make_room, parse_dtype
from llm2vec.model.chain import Chain, open_chain
from llm2vec.model.fused_layers import fuse, why_not
from llm2vec.model.packing import attention_dropout, checkpoint_contexts, compile_layers, inner_decoder, is_plain
from llm2vec.model.proofs import check_decoder
from llm2vec.model.settings import EncoderSettings, row_tokenizer, with_template
from llm2vec.objectives.head import check_head
from llm2vec.objectives.mntp import add_mask_token
from llm2vec.text.templates import add_template_tokens, leaves_join_open, template_named
from llm2vec.training.config import Config
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.types import UserError, in_one_sentence

logger = logging.getLogger(__name__)

#: There where the driver is loaded and its GPUs are handed to this process.
NVIDIA_DEVICE = Path("/dev/nvidiactl")


def prepare_device(config: Config) -> None:
    """Before anything asks for the device: how memory is handed out on a GPU; and that a GPU which is there is used. A
    `UserError` where torch finds no GPU, though this machine shows one to the process."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Each micro-batch has another number of tokens. Segments that grow leave no holes between their tensors.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if config.training.get("use_cpu") or is_hidden or torch.accelerator.is_available() or not NVIDIA_DEVICE.exists():
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for CPUs"
    raise UserError(
        f"this machine has an NVIDIA GPU, but torch {torch.__version__}, which {built}, finds none: install a torch "
        'for the CUDA that nvidia-smi shows, or a newer driver; or train on the CPU with "use_cpu": true.'
    )


def load_model(
    config: Config, device: torch.device, *, with_lm_head: bool
) -> tuple[Backbone, PreTrainedTokenizerBase, EncoderSettings]:
    """Base, merged adapters and, with `use_peft`, a fresh LoRA adapter; the tokenizer; how texts become vectors.

    Special tokens that the template adds and the base lacks are given to both; under LoRA their embeddings are trained
    too, and saved with the adapter. The adapter goes on the decoder; a head over it is frozen like the rest. A
    `UserError` where something is not found, does not fit, does not attend as asked, or contradicts the parent
    checkpoint.
    """
    set_seed(config.training.get("seed", 42))
    chain = open_chain(config.model_name_or_path, config.adapters)
    tokenizer, settings, new_tokens = open_tokenizer(config, chain)
    model = load_backbone(
        chain,
        dtype=config.torch_dtype,
        attn_implementation=config.attn_implementation,
        with_lm_head=with_lm_head,
        of_weights=_placed(config, chain, device),
    )
    if new_tokens:
        add_token_rows(model, new_tokens, config.training.get("seed", 42))  # type: ignore[arg-type]
        names = ", ".join(tokenizer.convert_ids_to_tokens(new_tokens))
        logger.info("added tokens: %s; they start at the mean of the other tokens' embeddings", names)
    if config.load_in is None:  # else it is there already, and may not be moved
        model.to(device)  # type: ignore[arg-type]  # FlashAttention cannot be probed on the CPU
    check_decoder(decoder_of(model), settings.attention)
    if with_lm_head:
        check_head(model)
    if config.checkpointing is not None:
        contexts = partial(checkpoint_contexts, decoder_of(model))
        with in_one_sentence(lambda why: f"gradient_checkpointing_kwargs: {why}"):
            enable_checkpointing(model, {**config.checkpointing, "context_fn": contexts})
    if config.use_peft:
        model = with_adapter(config, model, trained_tokens(config, tokenizer, settings, new_tokens))
    if config.compilation is not None:
        with in_one_sentence(lambda why: f"torch_compile: {why}"):
            compile_layers(model, **config.compilation)
    elif fuses(config, model, device.type):
        _fuse(config, model, device)
    return model, tokenizer, settings


def _placed(config: Config, chain: Chain, device: torch.device) -> dict[str, Any]:
    """transformers' keywords for where weights go, and for a base in 8 or 4 bits, the latter as QLoRA has them (NF4,
    quantised twice).

    Each tensor goes to its GPU as it is read: in host memory, all processes share the file's own pages. A `UserError`
    where it cannot be had here, or adapters would have to be merged into it.
    """
    if config.load_in is None:
        return {"device_map": {"": device}} if device.type == "cuda" else {}
    if device.type != "cuda":
        raise UserError(f"load_in is {config.load_in!r}, which needs an NVIDIA GPU, and there is none; take it out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"load_in is {config.load_in!r}, which needs bitsandbytes: pip install bitsandbytes.")
    if chain.adapters:
        raise UserError(f"load_in: {config.model_name_or_path} is an adapter, and merging it would round; export it.")
    half = torch.bfloat16 if config.training.get("bf16") else torch.float16 if config.training.get("fp16") else None
    four = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": half or parse_dtype(config.torch_dtype),
    }  # fmt: skip
    # In 8 bits it would say at every product that its inputs are rounded.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    quantised = BitsAndBytesConfig(**(four if config.load_in == "4bit" else {"load_in_8bit": True}))
    return {"quantization_config": quantised, "device_map": {"": device}}


def fuses(config: Config, model: Backbone, device_type: str) -> bool:
    """Whether a run is to fuse what its layers do besides their products; compiled layers are fused by the compiler."""
    return (
        config.fused_layers == "auto" and device_type == "cuda" and config.compilation is None
        and is_plain(model) and attention_dropout(model) == 0
    )  # fmt: skip


def _fuse(config: Config, model: Backbone, device: torch.device) -> None:
    """Fuse them if this machine can make the kernels; say which."""
    reason = why_not(device)
    if reason is not None:
        logger.warning("fused_layers: %s; layers run as transformers has them, which is slower.", reason)
        return
    fuse(inner_decoder(model))
    if config.training.get("bf16") or config.training.get("fp16"):
        for module in model.modules():
            if isinstance(module, LoraLayer):  # which would cast to float32 what autocast then casts back
                module.cast_input_dtype_enabled = False
    logger.info("layers      norms, rotary positions and gated products run fused (fused_layers)")


def open_tokenizer(config: Config, chain: Chain) -> tuple[PreTrainedTokenizerBase, EncoderSettings, list[int]]:
    """The tokenizer, how texts become vectors, and the ids of the tokens that the base lacks.

    The template, where the config names none, is the parent checkpoint's, and may be no other. Where another
    `instruction_join` than the parent's changes what a row of tokens is, it is said. A `UserError` where it is not
    found, contradicts the parent checkpoint, or cannot write the template.
    """
    tokenizer = load_tokenizer(chain.tokenizer_folder)
    parent = chain.folders[-1]
    recorded = parent.settings
    settings = with_template(encoder_settings(config, recorded, chain.adapters), tokenizer)
    join = recorded.get("instruction_join", settings.instruction_join)
    if join != settings.instruction_join and leaves_join_open(str(settings.template)):
        logger.warning(
            "instruction_join is %r, but %s was trained with %r: rows with an instruction are other tokens than there.",
            settings.instruction_join,
            parent.path,
            join,
        )
    new_tokens = add_template_tokens(tokenizer, str(settings.template))
    if config.mask_token_type == "mask":
        new_tokens += add_mask_token(tokenizer, config.mask_token_type)
    row_tokenizer(tokenizer, settings)  # a template the tokenizer cannot write is found before the weights load
    return tokenizer, settings, new_tokens


def encoder_settings(config: Config, recorded: dict[str, Any], merged: tuple[str, ...] = ()) -> EncoderSettings:
    """How a config's texts become vectors, given what its parent checkpoint has `recorded`, and the adapters below the
    run's own, if it trains one. A `UserError` where the parent was trained with another template."""
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
        parent_adapters=merged if config.use_peft else None,
    )


def trained_tokens(
    config: Config, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings, new_tokens: Sequence[int]
) -> Sequence[int]:
    """Ids whose embeddings an adapter trains: new ones, or all that the template adds, where they alone are trained.
    Without any there is nothing to train: a `UserError`."""
    if config.trainable != "tokens":
        return new_tokens
    vocabulary, added = tokenizer.get_vocab(), template_named(str(settings.template)).added_tokens
    if not added:
        raise UserError(f"trainable is 'tokens', but template {settings.template!r} adds none.")
    return [vocabulary[token] for token in added]


def with_adapter(config: Config, model: Backbone, tokens: Sequence[int]) -> Backbone:
    """The model with a fresh adapter on its decoder: LoRA, unless tokens alone are trained, and the embeddings of some
    tokens. All else is frozen."""
    lora: dict[str, Any] = {
        "r": config.lora_r, "alpha": config.lora_alpha or 2 * config.lora_r, "dropout": config.lora_dropout,
        "use_dora": config.use_dora, "use_rslora": config.use_rslora, "init": config.init_lora_weights,
    }  # fmt: skip
    modules: dict[str, Any] = {"modules": config.lora_modules} if config.lora_modules else {}
    if config.trainable == "tokens":
        modules = {"modules": ()}
    model.requires_grad_(False)
    decoder = decoder_of(model)
    adapted = attach_lora(decoder, **lora, **modules, new_tokens=tokens)  # type: ignore[arg-type]
    if decoder is model:
        return adapted
    setattr(model, model.base_model_prefix, adapted)
    return model


def decoder_of(model: Backbone) -> Backbone:
    """The model without a head, with an adapter if there is one."""
    has_head = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    return model.base_model if has_head else model  # type: ignore[return-value]


def part_to_save(model: Backbone) -> Backbone:
    """What of a trained model a checkpoint holds: its adapter if it has one, also below a head; else all of it."""
    decoder = decoder_of(model)
    return decoder if isinstance(decoder, PeftModel) else model


def autocast(args: TrainingArguments) -> torch.autocast:
    """The precision of the training steps."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(args.device.type, dtype, args.bf16 or args.fp16)


def plan_sharding(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Tell accelerate which modules FSDP2 gathers one at a time, and in which precision; nothing without `fsdp`.

    The decoder's layers are. What is left (embeddings, final norm, head) is gathered for the whole forward pass, as an
    objective reads those weights directly. A `UserError` where the model has no module of the class that is to be
    gathered by itself.
    """
    plan: dict[str, Any] | None = args.fsdp_plugin_args
    if plan is None:
        return
    names = plan.setdefault("transformer_cls_names_to_wrap", ",".join(sorted(model._no_split_modules or ())))
    missing = set(names.split(",")) - {type(module).__name__ for module in model.modules()}
    if missing:
        raise UserError(
            f"fsdp: {type(model).__name__} has no layers of class {min(missing)!r}; name theirs in fsdp_config as "
            "transformer_layer_cls_to_wrap."
        )
    # accelerate's own policy would sum gradients in half precision, and round the floats that go into the model: among
    # them the step's number of tokens, by which every loss is divided.
    plan["mixed_precision_policy"] = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if args.bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def set_attention_dropout(model: Any, probability: float) -> None:
    """Drop out attention weights in training with this probability, whatever the model's config says; the config itself
    is not changed. A `UserError` where the model's attention has no dropout to set."""
    attentions = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    if probability and not attentions:
        raise UserError(f"simcse_dropout: the attention of {type(model).__name__} has no dropout; set it to 0.")
    for attention in attentions:
        attention.attention_dropout = probability


def add_token_rows(model: PreTrainedModel, ids: Sequence[int], seed: int) -> None:
    """Give new tokens rows in the embedding, and in the head where the model has a separate one.

    A row starts as the mean of the rows before the new ones. Noise of a tenth of their spread, from `seed`, makes no
    two alike. The tables grow where they have no such rows yet.
    """
    make_room(model, ids)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in tables:
            weight: Tensor = table.weight  # type: ignore[assignment]
            spread_D, mean_D = torch.std_mean(weight[: min(ids)].float(), dim=0)
            noise_ND = torch.randn(len(ids), weight.shape[1], generator=generator).to(weight.device)
            weight[list(ids)] = (mean_D + 0.1 * spread_D * noise_ND).to(weight.dtype)
