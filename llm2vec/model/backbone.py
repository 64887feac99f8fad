"""The decoder under the embedder: load it, put adapters on it in order, run it causally or not.

No family has a class of its own here. Since transformers 5.2 every decoder takes `is_causal` per call. So one model
serves causal embedding, bidirectional embedding and generation. Whether it obeys is proven at load (`proofs`).
"""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from llm2vec.hub import HUB_CLIENT, local_folder
from llm2vec.model.chain import Chain
from llm2vec.model.packed_attention import load_kernel
from llm2vec.model.vault import (
    CONFIG_FILE,
    Folder,
    check_adapter_weights,
    check_modules,
    check_size,
    check_tokenizer,
    folder_at,
    model_below,
)
from llm2vec.types import Attention, LoraInit, UserError, first_line, in_one_sentence, needs_extra

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Backbone: TypeAlias = PreTrainedModel | PeftModel

#: Every projection of a Llama-like layer, as in the released recipe.
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: A weight of a numbered layer. A head is none, nor are the tables that older files hold.
_LAYER_WEIGHT = re.compile(r"\blayers\.\d+\..*\b(weight|bias)$")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Table of token embeddings -> the lock of its model. A model has one such table, with an adapter or a head or without.
_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()


def default_device() -> torch.device:
    """Where a model goes that nobody sends elsewhere: to a CUDA device, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ends_of(model: Any) -> list[int]:
    """The tokens with which a model ends what it generates."""
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


def load_backbone(
    chain: Chain,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    with_lm_head: bool = False,
    merge_last: bool = True,
    of_weights: Mapping[str, Any] = MappingProxyType({}),
) -> Backbone:
    """Load a base and put its adapters on, each merged before the next.

    Args:
        chain: base and adapters, as `open_chain` found them.
        dtype: of the weights; None = float32, "auto" = as stored.
        attn_implementation: as in `types.AttnImplementation`; None = the library's choice.
        with_lm_head: load the language model's head too (needed for reconstruction).
        merge_last: merge the outermost adapter as well; False leaves it as a PeftModel.
        of_weights: further keywords of transformers for the base: `device_map`, and those of `hub.read_keywords`.

    Raises:
        UserError: the base is not found, an adapter does not fit it, or an adapter has no effect.
    """
    model_class = AutoModelForCausalLM if with_lm_head else AutoModel
    how = {"dtype": parse_dtype(dtype), "attn_implementation": attn_implementation, "of_weights": of_weights}
    model = _load_base(model_class, chain.folders[0], **how)
    for number, adapter in enumerate(chain.folders[1:], start=1):
        # An adapter was trained on the decoder. Under a head it is merged into the decoder in place.
        wrapped = _apply_adapter(model, adapter, on_inner=with_lm_head)
        if number == len(chain.adapters) and not merge_last:
            return wrapped
        merged = wrapped.merge_and_unload()
        model = model if with_lm_head else merged
    return model


def _load_base(model_class: Any, folder: Folder, **how: Any) -> Any:
    """The weights of a folder, all of them, of a model of text alone. A tensor that it lacks would be random, so that
    is an error."""
    path = folder.path
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of a head that stays behind; what matters is checked below
    try:
        model, info = open_model(model_class, folder, **how)
    except UserError as error:
        raise UserError(f"model_name_or_path: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if model.config.get_text_config() is not model.config:
        raise UserError(
            f"model_name_or_path: {path!r} holds more than a text model ({type(model).__name__}); load it by "
            "transformers' AutoModel, save its text model (mostly `model.language_model.save_pretrained(FOLDER)`) and "
            "the tokenizer, and name that folder."
        )
    if info["missing_keys"]:
        raise UserError(
            f"model_name_or_path: {path!r} lacks {len(info['missing_keys'])} of the tensors that "
            f"{type(model).__name__} needs, such as {min(info['missing_keys'])}."
        )
    left_out = [name for name in info["unexpected_keys"] if _LAYER_WEIGHT.search(name)]
    if left_out:
        raise UserError(
            f"model_name_or_path: {path!r} holds {len(left_out)} tensors of layers that its config.json has no place "
            f"for, such as {min(left_out)}; without them it would be another model."
        )
    vars(model.config).pop("auto_map", None)  # as of the tokenizer
    return model


def attach_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    modules: Sequence[str] = LORA_MODULES,
    new_tokens: Sequence[int] = (),
    use_dora: bool = False,
    use_rslora: bool = False,
    init: LoraInit | None = None,
) -> PeftModel:
    """Put a fresh LoRA adapter on a model. Everything else is frozen; no bias is trained.

    Args:
        r: rank; `alpha` is the scale, `dropout` stands before the adapter.
        modules: what gets an adapter; empty = nothing does, and tokens alone are trained.
        new_tokens: ids whose embeddings are trained and saved with the adapter.
        use_dora: this, `use_rslora` and `init` (its `init_lora_weights`; None = the default) are peft's.

    Raises:
        UserError: the model has none of the named modules.
    """
    config: Any = TrainableTokensConfig(token_indices=list(new_tokens))
    if modules:
        config = LoraConfig(
            r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(modules), bias="none",
            trainable_token_indices=list(new_tokens) or None, use_dora=use_dora, use_rslora=use_rslora,
            init_lora_weights=init or True,
        )  # fmt: skip
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"lora_modules: {first_line(error)}") from error


def hidden_states(
    model: torch.nn.Module,
    attention: Attention,
    attention_mask: Tensor,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Last layer's states after the final norm, [B, T, D], from ids [B, T] or from embeddings [B, T, D]."""
    with one_pass(model):
        output = model(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False,
            is_causal=attention == "causal", **({} if position_ids is None else {"position_ids": position_ids}),
        )  # fmt: skip
    states: Tensor = output.last_hidden_state
    return states


def one_pass(model: Any) -> threading.RLock:
    """The lock to hold during a forward pass. A packed pass sets the model's attention, for all threads."""
    return _locks.setdefault(model.get_input_embeddings(), threading.RLock())


def make_room(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Grow a model's tables until they hold `ids`; the rows in between are the caller's to fill."""
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    if max(ids, default=0) >= embedding.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)


def _apply_adapter(model: PreTrainedModel, adapter: Folder, *, on_inner: bool) -> PeftModel:
    """Put a trained adapter on `model`, or on the decoder under its head (`on_inner`).

    An adapter that would do nothing is refused. The embedding grows where it brings tokens that the base lacks.
    """
    inner: PreTrainedModel = model.base_model if on_inner else model  # type: ignore[assignment]
    path = adapter.path
    # Not found, other shapes, cut short: peft raises many types.
    with in_one_sentence(lambda why: f"peft_model_name_or_path: {path!r} could not be put on the base: {why}"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that do not match, at length; that is checked below
            # Of LoRA's config, or of one of tokens alone.
            given = [(adapter.adapter or {}).get(key) for key in ("trainable_token_indices", "token_indices")]
            make_room(model, next((tokens for tokens in given if isinstance(tokens, list)), ()))
            wrapped = put_adapter(inner, adapter)
        saved = load_peft_weights(adapter.place, device="cpu")
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    unmatched = sorted(set(saved) ^ set(expected))
    if unmatched:
        raise UserError(
            f"peft_model_name_or_path: {path!r} does not fit {type(inner).__name__} (missing or unexpected adapter "
            f"keys, such as {unmatched[0]}), so it would have no effect; it was trained on another model class or base."
        )
    added = [weight for name, weight in saved.items() if "lora_B" in name]  # none, where only tokens were trained
    if added and not any(bool(weight.any()) for weight in added):
        raise UserError(f"peft_model_name_or_path: {path!r} has no effect, every lora_B weight in it is zero.")
    return wrapped


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    """A torch dtype from a dtype or its name, else a `UserError`; None means float32, "auto" stays."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype or torch.float32
    if dtype not in DTYPES:
        raise UserError(f"torch_dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def config_of(folder: Folder, revision: str | None = None) -> PretrainedConfig:
    """The config of a model, as the class that transformers has for it; a `UserError` where there is none. Of a
    repository it is taken at a revision; None = the one that was opened."""
    try:
        commit = revision or folder.commit
        config = AutoConfig.from_pretrained(folder.path, revision=commit, trust_remote_code=False, **HUB_CLIENT.get())
    except Exception as error:  # no such repository, no access to it, a class of its own: each has a type of its own
        raise UserError(f"{folder.path!r} could not be loaded: {first_line(error)}") from error
    if folder.config is None:
        raise UserError(f"{folder.path!r} could not be loaded: it had no {CONFIG_FILE} when it was opened.")
    return config


def load_tokenizer(where: Folder | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, which must have one. Without a padding token it pads with its EOS."""
    folder = folder_at(where) if isinstance(where, str) else where
    path, commit = folder.path, check_tokenizer(folder)  # says what is wrong with a name better than the library does
    try:
        hub = {"revision": commit or "main", **HUB_CLIENT.get()}
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **hub)  # left out, it would ask
    except Exception as error:  # each damaged file of tokenizer or config raises a type of its own
        raise UserError(f"{path}: no tokenizer could be loaded ({first_line(error)}).") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.init_kwargs.pop("auto_map", None)  # it names code that was not run, and would be saved with the tokenizer
    return tokenizer


def open_model(
    model_class: Any,
    folder: Folder,
    *,
    dtype: torch.dtype | str,
    attn_implementation: str | None = None,
    of_weights: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, dict[str, Any]]:
    """A full model, and transformers' account of keys that are missing, unexpected or of another shape.

    `model_class` is `AutoModel` or one of its relatives, `dtype` "auto" = as stored, `attn_implementation` None = what
    the config names, or the library's choice; `of_weights` are further keywords of transformers. A `UserError` where it
    cannot be loaded, or what it names may not be opened.
    """
    try:
        whole = folder if folder.adapter is None else model_below(folder)
        attention = _check_model(whole, model_class, attn_implementation)
        loaded: tuple[Any, dict[str, Any]] = model_class.from_pretrained(
            folder.path,
            revision=folder.commit,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            weights_only=True,
            trust_remote_code=False,  # left out, it would ask
            output_loading_info=True,
            **of_weights,
            **HUB_CLIENT.get(),
        )
    except UserError:
        raise
    except Exception as error:  # a cut weights file, an attention that the family lacks: each has a type of its own
        raise UserError(f"{folder.path!r} could not be loaded: {first_line(error)}") from error
    return loaded


def _check_model(folder: Folder, model_class: Any, asked: str | None) -> str | None:
    """Refuse a model whose files hold much less than its config describes; returns how it is to attend."""
    config = config_of(folder)
    attention = available_attention(asked or getattr(config, "_attn_implementation", None))
    with torch.device("meta"):
        described = model_class.from_config(config, attn_implementation=attention, trust_remote_code=False)
    check_size(folder, sum(weight.numel() for weight in described.parameters()))
    return attention


def available_attention(attn_implementation: str | None) -> str | None:
    """`attn_implementation`; or torch's own, with a warning, where FlashAttention was asked for and cannot run. A
    `UserError` where a kernel of the hub was asked for, and cannot run."""
    if attn_implementation is not None and "/" in attn_implementation:
        load_kernel(attn_implementation)
    if attn_implementation != "flash_attention_2":
        return attn_implementation
    if not torch.cuda.is_available():
        missing = "there is no CUDA device"
    elif importlib.util.find_spec("flash_attn") is None:
        missing = "the package flash-attn is not installed"
    else:
        return attn_implementation
    logger.warning("attn_implementation: flash_attention_2 was asked for, but %s; using sdpa (torch's own).", missing)
    return "sdpa"


def put_adapter(model: Any, folder: Folder) -> PeftModel:
    """A trained adapter on a model; raises a UserError without safetensors, and peft's errors where it does not fit."""
    check_adapter_weights(folder)
    return PeftModel.from_pretrained(model, folder.place)


def open_sentence_transformer(
    path: str,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    device: str | None = None,
) -> SentenceTransformer:
    """What sentence-transformers has written; of a repository, the files that may be opened are fetched first.

    `dtype` None = what the folder asks for, or as stored; `attn_implementation` is as in `open_model`; `device` None =
    the library's choice. A `UserError` where it cannot be loaded, what it names may not be opened, or
    sentence-transformers is not installed.
    """
    with needs_extra("sentence-transformers is not installed", "eval"):
        from sentence_transformers import SentenceTransformer  # seconds to import
    fetched = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        folder = local_folder(path) or Path(snapshot_download(path, allow_patterns=fetched))
        models, given = check_modules(folder, path)
        chosen = dtype or given.get("dtype") or given.get("torch_dtype") or "auto"
        options: dict[str, Any] = {"use_safetensors": True, "weights_only": True, "dtype": chosen}
        attention = attn_implementation or given.get("attn_implementation")
        for model in models:
            attention = _check_model(model, AutoModel, attention)
        if attention is not None:
            options["attn_implementation"] = attention
        return SentenceTransformer(str(folder), device=device, trust_remote_code=False, model_kwargs=options)
    except Exception as error:  # damaged files: what stock libraries raise for them has no common type
        raise UserError(f"sentence-transformers cannot load {path}: {first_line(error)}") from error
