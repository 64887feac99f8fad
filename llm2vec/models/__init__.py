"""Upstream's bidirectional models, under upstream's names: transformers' own classes with `is_causal` off.

    from llm2vec.models import LlamaBiModel
    decoder = LlamaBiModel.from_pretrained("meta-llama/Llama-3.2-1B-Instruct")

`LLM2Vec` needs none of them. They are here for programs that build on upstream's, such as GLiNER and GLiClass.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import (
    GemmaForCausalLM,
    GemmaModel,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
)

__all__ = [
    "GemmaBiForMNTP", "GemmaBiModel", "LlamaBiForMNTP", "LlamaBiModel", "MistralBiForMNTP", "MistralBiModel",
    "Qwen2BiForMNTP", "Qwen2BiModel",
]  # fmt: skip


def bidirectional_class(config_class_name: str) -> Any:
    """Upstream's class for a config's name (`LlamaConfig` -> `LlamaBiModel`).

    A ValueError, as upstream's, for a family that has none here; `LLM2Vec` itself takes it all the same.
    """
    found = globals().get(f"{config_class_name.removesuffix('Config')}BiModel")
    if found is None:
        raise ValueError(f"{config_class_name} is not supported yet with bidirectional models.")
    return found


class _Bidirectional:
    """Makes a transformers model attend in both directions, and save that with its config."""

    def __init__(self, config: PretrainedConfig, *arguments: Any, **options: Any) -> None:
        config = copy.deepcopy(config)  # the caller's stays causal
        config.is_causal = False
        # Gemma has its own word for it beside `is_causal`; where a config has it, both say the same.
        if hasattr(config, "use_bidirectional_attention"):
            config.use_bidirectional_attention = True
        super().__init__(config, *arguments, **options)  # type: ignore[call-arg]


class _WithHead(_Bidirectional):
    """What upstream's MNTP script asks of a model with its head: the adapter goes on the decoder."""

    model: PreTrainedModel

    def get_model_for_peft(self) -> PreTrainedModel:
        """The decoder without its head."""
        return self.model

    def set_model_for_peft(self, model: PreTrainedModel) -> None:
        """Put the decoder, with an adapter on it, back under the head."""
        self.model = model

    def save_peft_model(self, path: str) -> None:
        """Save the adapter on the decoder."""
        self.model.save_pretrained(path)


class LlamaBiModel(_Bidirectional, LlamaModel):
    """Llama that attends in both directions."""


class MistralBiModel(_Bidirectional, MistralModel):
    """Mistral that attends in both directions."""


class GemmaBiModel(_Bidirectional, GemmaModel):
    """Gemma that attends in both directions."""


class Qwen2BiModel(_Bidirectional, Qwen2Model):
    """Qwen2 that attends in both directions."""


class LlamaBiForMNTP(_WithHead, LlamaForCausalLM):
    """The same with the language model's head."""


class MistralBiForMNTP(_WithHead, MistralForCausalLM):
    """The same with the language model's head."""


class GemmaBiForMNTP(_WithHead, GemmaForCausalLM):
    """The same with the language model's head."""


class Qwen2BiForMNTP(_WithHead, Qwen2ForCausalLM):
    """The same with the language model's head."""
