"""Anchor Embedding and LLM2Vec: train decoder language models into text embedders, and use them.

    from llm2vec import LLM2Vec
    model = LLM2Vec.from_pretrained(base_model, peft_model_name_or_path=adapter)
    vectors = model.encode([[instruction, query], ...])

    from llm2vec import Config, train
    model, figures = train(Config(...), rows)

Names are loaded when they are first used, so that what reads a file or prints its help loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm2vec.llm2vec import LLM2Vec
    from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction, LLM2Vec_q2d_d2q
    from llm2vec.training import train
    from llm2vec.training.config import Config

__version__ = "2.0.0"

__all__ = ["BidirectionalReconstruction", "Config", "LLM2Vec", "LLM2Vec_q2d_d2q", "train"]

#: Public name -> the module that defines it.
_HOMES = {
    "BidirectionalReconstruction": "llm2vec.llm2vec_q2d_d2q",
    "Config": "llm2vec.training.config",
    "LLM2Vec": "llm2vec.llm2vec",
    "LLM2Vec_q2d_d2q": "llm2vec.llm2vec_q2d_d2q",
    "train": "llm2vec.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
