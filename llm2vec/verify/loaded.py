"""An embedder loaded in one of the ways, so that texts can go through it and its parts can be exchanged.

`open_way(choice, torch.float32, rendering)` loads ours, sentence-transformers' or plain transformers'.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from llm2vec.export.proof import encode_texts, stock_vectors
from llm2vec.files import parse_json
from llm2vec.hub import find_file
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import (
    config_of,
    default_device,
    load_tokenizer,
    open_model,
    open_sentence_transformer,
    put_adapter,
)
from llm2vec.model.chain import is_stock, open_chain
from llm2vec.model.pooling import pool
from llm2vec.model.stock_form import POOLING, SWITCHES
from llm2vec.model.vault import MODULES_FILE, folder_at
from llm2vec.text.tokenization import Row
from llm2vec.types import Attention, InstructedText, PoolingMode, UserError, first_line
from llm2vec.verify.ways import Choice, Rendering, prompt_writer, read_json_of

POOLING_FILE = "1_Pooling/config.json"

#: Texts that go through a model at a time, padded to the longest of them.
BATCH_SIZE = 32

#: Our pooling modes by sentence-transformers' names.
_MODES = {name: mode for mode, name in POOLING.items()}


@dataclass(frozen=True)
class LocalWay:
    """A loaded embedder whose parts can be exchanged."""

    choice: Choice  #: what was asked for
    model: Any  #: decoder without head, plain or with an adapter
    tokenizer: PreTrainedTokenizerBase  #: its tokenizer
    #: vectors of texts as this way computes them, [N, D], on the CPU in float32.
    encode: Callable[[Sequence[InstructedText]], Tensor]
    rows: Callable[[Sequence[InstructedText]], list[Row]]  #: texts as token rows
    attention: Attention  #: as its settings or its config say
    pooling_mode: PoolingMode  #: how it pools
    max_length: int  #: most tokens of a row
    is_half: bool  #: whether its weights are, or were stored, in half precision
    #: whether its settings leave its vectors' lengths to whoever compares them.
    any_length: bool = False


def open_way(choice: Choice, dtype: torch.dtype, rendering: Rendering | None) -> LocalWay:
    """Load any way but a server, with weights of a dtype; `rendering` says what stands before a text. A `UserError`
    where it cannot be loaded in this way."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would warn of is what the comparison finds
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if choice.kind not in ("st", "transformers"):
                return _open_ours(choice, dtype)
            return (_open_st if choice.kind == "st" else _open_transformers)(choice, dtype, rendering)
    except UserError as error:
        raise UserError(f"{choice.name}: {error}") from error
    except Exception as error:  # damaged files: what stock libraries raise for them has no common type
        raise UserError(f"{choice.name}: cannot be loaded ({first_line(error)}).") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _open_ours(choice: Choice, dtype: torch.dtype) -> LocalWay:
    base, adapters = choice.model.base, choice.model.adapters or None
    loaded = LLM2Vec.from_pretrained(base, adapters, merge_peft=choice.kind == "merged", torch_dtype=dtype)
    loaded.to(default_device())

    @_in_batches
    @torch.no_grad()
    def padded(texts: Sequence[InstructedText]) -> Tensor:
        batch = {name: value.to(default_device()) for name, value in loaded.row_tokenizer(texts).items()}
        vectors = loaded(batch).float().cpu()
        return F.normalize(vectors, dim=-1) if loaded.settings.normalize else vectors

    settings = loaded.settings
    return LocalWay(
        choice, loaded.model, loaded.tokenizer, padded if choice.kind == "padded" else partial(encode_texts, loaded),
        loaded.row_tokenizer.rows, settings.attention, settings.pooling_mode, settings.max_length,
        _is_half(choice, dtype), any_length=not settings.normalize,
    )  # fmt: skip


def _open_st(choice: Choice, dtype: torch.dtype, rendering: Rendering | None) -> LocalWay:
    if choice.model.adapters:
        raise UserError("takes no adapter beside a base; give a folder that sentence-transformers has written.")
    loaded = open_sentence_transformer(choice.model.base, dtype=dtype, device=str(default_device()))
    loaded.eval()
    pooling = next((module for module in loaded if hasattr(module, "pooling_mode")), None)
    decoder = loaded.transformers_model
    if pooling is None or decoder is None:
        raise UserError(f"{MODULES_FILE} lists no transformer with a pooling behind it.")
    prompt = prompt_writer(rendering, loaded.tokenizer, loaded.prompts)

    def encode(texts: Sequence[InstructedText]) -> Tensor:
        return stock_vectors(loaded, [text.text for text in texts], list(map(prompt, texts)))

    def row(text: InstructedText) -> Row:
        features = loaded.preprocess([text.text], prompt=prompt(text))
        skipped = 0 if pooling.include_prompt else int(features.get("prompt_length") or 0)
        return _row(features["input_ids"][0].tolist(), skipped)

    longest = loaded.max_seq_length or loaded.tokenizer.model_max_length
    return LocalWay(
        choice, decoder, loaded.tokenizer, encode, lambda texts: list(map(row, texts)),
        _attention_of(decoder), _mode_named(pooling.pooling_mode), longest, _is_half(choice, dtype),
    )  # fmt: skip


def _open_transformers(choice: Choice, dtype: torch.dtype, rendering: Rendering | None) -> LocalWay:
    """AutoModel, AutoTokenizer, and what `1_Pooling` and `modules.json` say; adapters as plain peft puts them on."""
    base, adapters = choice.model.base, choice.model.adapters
    model, _ = open_model(AutoModel, folder_at(base), dtype=dtype)
    for adapter in adapters:
        model = put_adapter(model, folder_at(adapter))
        model = model if adapter == adapters[-1] else model.merge_and_unload()
    model.to(default_device()).eval()
    folder = next((path for path in (*reversed(adapters), base) if is_stock(path)), base)
    normalize = any(module.endswith("Normalize") for module in _read_modules(folder))
    tokenizer = load_tokenizer(folder)
    mode, with_prompt = _read_pooling(folder)
    module = read_json_of(folder, "sentence_bert_config.json") or {}
    # Where the tokenizer names no limit, sentence-transformers takes the model's.
    most = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length))
    own_length = module.get("max_seq_length") or most
    declared = read_json_of(folder, "config_sentence_transformers.json") or {}
    prompt = prompt_writer(rendering, tokenizer, declared.get("prompts") or {})

    @_in_batches
    @torch.no_grad()
    def encode(texts: Sequence[InstructedText]) -> Tensor:
        strings = [prompt(text) + text.text for text in texts]
        batch = tokenizer(strings, padding=True, truncation=True, max_length=own_length, return_tensors="pt")
        batch.pop("token_type_ids", None)
        mask = batch["attention_mask"].bool()
        mask &= mask.long().cumsum(dim=1) > torch.tensor([skipped(text) for text in texts]).unsqueeze(1)
        hidden = model(**batch.to(default_device())).last_hidden_state
        vectors = pool(hidden, mask.to(default_device()), mode).float().cpu()
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def skipped(text: InstructedText) -> int:
        """Tokens of the prompt, which are not pooled over; counted as sentence-transformers does."""
        if with_prompt or not prompt(text):
            return 0
        ids = tokenizer(prompt(text))["input_ids"]
        return len(ids) - (ids[-1] in tokenizer.all_special_ids)

    def row(text: InstructedText) -> Row:
        ids: list[int] = tokenizer(prompt(text) + text.text, truncation=True, max_length=own_length)["input_ids"]
        return _row(ids, skipped(text))

    return LocalWay(
        choice, model, tokenizer, encode, lambda texts: list(map(row, texts)),
        _attention_of(model), mode, own_length, _is_half(choice, dtype),
    )  # fmt: skip


def _row(ids: list[int], skipped: int) -> Row:
    """A row whose first tokens, the prompt's, may be left out of the mean."""
    return Row(ids, [i >= skipped for i in range(len(ids))], [False] * len(ids))


def _read_modules(folder: str) -> list[str]:
    """The classes that a folder's `modules.json` lists."""
    file = find_file(folder, MODULES_FILE)
    if file is None or not is_stock(folder):
        raise UserError(f"no {MODULES_FILE} of an export, so nothing says how the hidden states are pooled.")
    modules = parse_json(Path(file).read_bytes(), file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) and "type" in module for module in modules):
        raise UserError(f"{file}: a list of objects with a `type` is needed.")
    return [str(module["type"]) for module in modules]


def _read_pooling(folder: str) -> tuple[PoolingMode, bool]:
    """The pooling mode that a folder's `1_Pooling/config.json` says, and whether the prompt is pooled over."""
    config = read_json_of(folder, POOLING_FILE)
    if config is None:
        raise UserError(f"no {POOLING_FILE}, so nothing says how the hidden states are pooled.")
    flagged = [name for name, switch in SWITCHES.items() if config.get(switch)]
    written = config.get("pooling_mode")
    if written is not None and any(switch in config for switch in SWITCHES.values()) and flagged != [written]:
        raise UserError(
            f"{POOLING_FILE} says {written!r} by pooling_mode and {' and '.join(flagged) or 'nothing'} by its "
            "older keys; programs that read one or the other will pool differently."
        )
    mode = _mode_named(written or (flagged[0] if len(flagged) == 1 else flagged))
    return mode, bool(config.get("include_prompt", True))


def _mode_named(name: Any) -> PoolingMode:
    if not isinstance(name, str) or name not in _MODES:
        raise UserError(f"its pooling is {name!r}; this project knows {', '.join(_MODES)}.")
    return _MODES[name]


def _attention_of(model: Any) -> Attention:
    return "causal" if getattr(model.config, "is_causal", True) else "bidirectional"


def _in_batches(embed: Callable[[Sequence[InstructedText]], Tensor]) -> Callable[[Sequence[InstructedText]], Tensor]:
    """`embed`, called with `BATCH_SIZE` texts at a time."""

    def batched(texts: Sequence[InstructedText]) -> Tensor:
        return torch.cat([embed(texts[start : start + BATCH_SIZE]) for start in range(0, len(texts), BATCH_SIZE)])

    return batched


def _is_half(choice: Choice, dtype: torch.dtype) -> bool:
    is_model = find_file(choice.model.base, "config.json") is not None
    base = choice.model.base if is_model else open_chain(choice.model.base, choice.model.adapters).base
    stored = getattr(config_of(folder_at(base)), "dtype", None)
    return bool({dtype, stored} & {torch.bfloat16, torch.float16})
