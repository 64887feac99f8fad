"""Published shapes of the bases that shipped configs start from, for what needs no weights: plans and simulations."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8}
_LLAMA_8B = LlamaConfig(
    **_LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
)  # fmt: skip
#: Part of a base's name -> its published shape, and how many parameters it is published to have.
SHAPES: dict[str, tuple[PretrainedConfig, int]] = {
    "Llama-3.2-1B": (
        LlamaConfig(
            **_LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "smollm2": (
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        ),
        134_515_008,
    ),
    "Llama-3.2-3B": (
        LlamaConfig(
            **_LLAMA3, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
            tie_word_embeddings=True,
        ),
        3_212_749_824,
    ),
    "Llama-3.1-8B": (_LLAMA_8B, 8_030_261_248),
    "Meta-Llama-3-8B": (_LLAMA_8B, 8_030_261_248),
    "Qwen2.5-1.5B": (
        Qwen2Config(
            vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
        1_543_714_304,
    ),
    "Qwen3-0.6B": (
        Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        ),
        596_049_920,
    ),
    "Mistral-7B": (
        MistralConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, sliding_window=None, tie_word_embeddings=False,
        ),
        7_241_732_096,
    ),
    "Sheared-LLaMA-1.3B": (
        LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
            num_key_value_heads=16, tie_word_embeddings=False,
        ),
        1_345_423_360,
    ),
    "quickstart": (
        LlamaConfig(
            vocab_size=4096, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, tie_word_embeddings=True,
        ),
        725_664,
    ),
}  # fmt: skip


def shape_for(text: str) -> str | None:
    """The first of the bases whose name stands in a text, such as a config's; None = none does."""
    return next((name for name in SHAPES if name in text), None)
