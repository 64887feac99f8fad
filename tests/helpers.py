"""Tokenizers and models small enough to build in memory, one of each family, and a writer of JSONL files.

The tokenizers have the special tokens, the BOS rule and the chat format of their family, over one small byte-level
vocabulary: the 256 bytes, the words of `WORDS` with and without the blank before them, and two line breaks. Every
other word falls apart into bytes, so expected token lists can be written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

WORDS = (
    "user", "hello", "world", "find", "the", "answer", "question", "who", "wrote", "it", "red", "green", "blue",
    "INST",
)  # fmt: skip

_LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
_QWEN2_CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}"
)
_MISTRAL_CHAT = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
_MISTRAL_V3_CHAT = "{{ bos_token }}{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"

#: Family -> special tokens, and the roles and chat format that transformers is told. As in the released
#: checkpoints: an instruct model's EOS closes a turn (Gemma's and Mistral's do not), Qwen has no BOS and joins accents
#: to their letters, and only Qwen and Gemma have a padding token. `mistral` writes [INST] as text, `mistral_v3` as
#: control tokens, `mistral_sentencepiece` as text over a vocabulary that puts a blank in front of every run.
FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "llama3": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": _LLAMA3_CHAT},
    ),
    "qwen2": (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": _QWEN2_CHAT},
    ),
    "gemma": (
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "chat_template": _GEMMA_CHAT,
        },
    ),
    "mistral": (
        ("<unk>", "<s>", "</s>"),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": _MISTRAL_CHAT},
    ),
    "mistral_v3": (
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": _MISTRAL_V3_CHAT},
    ),
    "mistral_sentencepiece": (
        ("<unk>", "<s>", "</s>"),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": _MISTRAL_CHAT},
    ),
    "plain": (("<s>", "</s>"), {"bos_token": "<s>", "eos_token": "</s>"}),
}

#: Model family -> the tokenizer family its vocabulary comes from, its configuration, with and without a head.
MODELS: dict[str, tuple[str, type[PretrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]] = {
    "llama": ("llama3", LlamaConfig, LlamaForCausalLM, LlamaModel),
    "mistral": ("mistral", MistralConfig, MistralForCausalLM, MistralModel),
    "qwen2": ("qwen2", Qwen2Config, Qwen2ForCausalLM, Qwen2Model),
    "qwen3": ("qwen2", Qwen3Config, Qwen3ForCausalLM, Qwen3Model),
    "gemma": ("gemma", GemmaConfig, GemmaForCausalLM, GemmaModel),
}


def family_tokenizer(family: str, blank_led: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of a family: a key of `FAMILIES`, or of `MODELS` for the one its tiny model fits.

    Words that are `blank_led` are one token behind a blank, and alone they fall apart.
    """
    family = family if family in FAMILIES else MODELS[family][0]
    special_tokens, arguments = FAMILIES[family]
    tokenizer = (_sentencepiece_bpe if family.endswith("sentencepiece") else _byte_level_bpe)(blank_led)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    bos = arguments.get("bos_token")
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=2048, **arguments
    )


def tiny_model(
    family: str,
    causal_lm: bool = False,
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A random decoder of a family (a key of `MODELS`) in evaluation mode; the global generator is left as it was.

    Args:
        family: `llama`, `mistral`, `qwen2`, `qwen3` or `gemma`.
        causal_lm: with the language-model head.
        dtype: of the weights.
        tokenizer: decides vocabulary size and special ids; None = the family's own.
        seed: of the weights.
        overrides: further fields of the model's configuration.
    """
    _, config_class, with_head, without_head = MODELS[family]
    tokenizer = tokenizer or family_tokenizer(family)
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = config_class(**(fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (with_head if causal_lm else without_head)(config)
    return model.to(dtype).eval()


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value a line, making the folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _byte_level_bpe(blank_led: tuple[str, ...]) -> Tokenizer:
    vocabulary, merges = _bpe(
        tuple(sorted(pre_tokenizers.ByteLevel.alphabet())), blank="Ġ", pairs=("ĊĊ",), blank_led=blank_led
    )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(blank_led: tuple[str, ...]) -> Tokenizer:
    """As Llama 2 and the first Mistral: `▁` for a blank, one put in front of every run, bytes for what is unknown."""
    letters = tuple(chr(code) for code in range(33, 127))
    vocabulary, merges = _bpe(
        (*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters), blank="▁", blank_led=blank_led
    )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@cache
def _bpe(
    alphabet: tuple[str, ...], blank: str, pairs: tuple[str, ...] = (), blank_led: tuple[str, ...] = ()
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges under which each of `WORDS`, with and without a blank before it, is one token.

    A word that is `blank_led` is one only behind a blank, as it shares no pair of letters with `WORDS`.
    """
    merges: list[tuple[str, str]] = []
    for word in (*pairs, *WORDS, *(blank + word for word in (*WORDS, *blank_led))):
        parts = list(word)
        for left, right in merges:  # what the merges so far make of it
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [left + right]
                i += 1
        while len(parts) > 1:  # then join what is left, from the left
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
    return {token: i for i, token in enumerate((*alphabet, *(a + b for a, b in merges)))}, merges
