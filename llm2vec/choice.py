"""Which embedder a script was given: a model, the adapters on it and the dtype of their weights, and a hash of it all.

The hash stands in what a script writes, so that vectors of different models never meet in one index or corpus.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from llm2vec.hub import find_file
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import DTYPES
from llm2vec.model.checkpoint import read_settings, resolve_chain
from llm2vec.model.revision import checkpoint_revision, hash_of
from llm2vec.model.settings import EncoderSettings
from llm2vec.types import UserError


@dataclass(frozen=True)
class EncoderChoice:
    """What `LLM2Vec.from_pretrained` is called with.

    Attributes:
        base: folder or hub name of a model, or of an adapter that records its base.
        adapters: folders or hub names of adapters on it, innermost first.
        torch_dtype: name of the weights' dtype, a key of `DTYPES`.
    """

    base: str
    adapters: tuple[str, ...] = ()
    torch_dtype: str = "float32"

    def resolved(self) -> EncoderChoice:
        """The same with the true base and every adapter spelled out, folders by their full path.

        Raises:
            UserError: something is not found, or does not belong together.
        """
        chain = resolve_chain(self.base, self.adapters)
        if find_file(chain.base, "config.json") is None:
            raise UserError(f"There is no model {chain.base}: no folder or hub repository with a config.json.")
        base, *adapters = (str(Path(p).resolve()) if Path(p).is_dir() else p for p in (chain.base, *chain.adapters))
        return dataclasses.replace(self, base=base, adapters=tuple(adapters))

    def revision(self) -> str:
        """A hash of all weights, tokenizers, settings and the dtype; of a hub repository its commit. Loads nothing.

        Raises:
            UserError: as `resolved`, or a folder holds no safetensors weights.
        """
        choice = self.resolved()
        checkpoints = [checkpoint_revision(path) for path in (choice.base, *choice.adapters)]
        return hash_of({"checkpoints": checkpoints, "torch_dtype": choice.torch_dtype})

    def settings(self) -> EncoderSettings:
        """What the checkpoint records of its settings; the template may still be open."""
        choice = self.resolved()
        outermost = choice.adapters[-1] if choice.adapters else choice.base
        return EncoderSettings(**(read_settings(outermost) or read_settings(choice.base)))

    def load(self) -> LLM2Vec:
        """The model.

        Raises:
            UserError: it cannot be loaded.
        """
        choice = self.resolved()
        return LLM2Vec.from_pretrained(choice.base, list(choice.adapters) or None, torch_dtype=choice.torch_dtype)


def add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--peft` and `--torch_dtype`, which `chosen_encoder` reads."""
    parser.add_argument("--model", required=True, help="folder or hub name of a model, or of an adapter")
    parser.add_argument("--peft", nargs="+", default=[], metavar="ADAPTER", help="adapters on it, innermost first")
    parser.add_argument("--torch_dtype", choices=list(DTYPES), default="float32", help="of the weights (float32)")


def chosen_encoder(args: argparse.Namespace) -> EncoderChoice:
    """The encoder that the flags name."""
    return EncoderChoice(args.model, tuple(args.peft), args.torch_dtype)
