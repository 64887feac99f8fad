"""Which model: the base and the adapters on it, as a user names them, on every command line the same.

    --model PATH [--peft ADAPTER ...]     or, where a command takes it as an argument, MODEL[+ADAPTER ...]

`--base_model_name_or_path` and `--peft_model_name_or_path` are the release's names for the two. A path is a folder or a
name on the hub. Nothing here imports torch before a model is opened.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from llm2vec.files import json_hash
from llm2vec.types import DtypeName, UserError

if TYPE_CHECKING:
    from llm2vec.llm2vec import LLM2Vec
    from llm2vec.model.chain import Chain


@dataclass(frozen=True)
class ModelChoice:
    """A model, before anything of it is loaded.

    choice = ModelChoice("output/stage_I", ("output/stage_II",))
    choice.revision()                   # a hash of all that decides its vectors
    choice.load().encode(["a text"])
    """

    base: str  #: folder or hub name of a model, or of an adapter that records its base
    adapters: tuple[str, ...] = ()  #: folders or hub names of adapters on it, innermost first
    #: name of the weights' dtype; None = float32, and in an evaluation what suits the model.
    torch_dtype: str | None = None

    @classmethod
    def parse(cls, place: str) -> ModelChoice:
        """The model that MODEL[+ADAPTER ...] names; a folder may have a plus in its name."""
        base, *adapters = [place] if Path(place).exists() else place.split("+")
        return cls(base, tuple(adapters))

    @property
    def place(self) -> str:
        """The same in one word: MODEL[+ADAPTER ...]."""
        return "+".join((self.base, *self.adapters))

    def opened(self) -> Chain:
        """Its folders, opened; a `UserError` where one is not found, or they do not belong together."""
        from llm2vec.model.chain import open_chain

        chain = open_chain(self.base, self.adapters)
        if chain.folders[0].find("config.json") is None:
            raise UserError(f"There is no model {chain.base}: no folder or hub repository with a config.json.")
        return chain

    def resolved(self) -> ModelChoice:
        """The same, opened: the true base, every adapter and the dtype spelled out, folders by their full path."""
        paths = [folder.path for folder in self.opened().folders]
        base, *adapters = (str(Path(path).resolve()) if Path(path).is_dir() else path for path in paths)
        return ModelChoice(base, tuple(adapters), self.torch_dtype or "float32")

    def revision(self) -> str:
        """A hash of all weights, tokenizers, settings and the dtype; of a hub repository its commit. Loads nothing.

        It stands in what a command writes, so that vectors of different models never meet in one index or corpus. A
        folder without safetensors weights is a `UserError`.
        """
        from llm2vec.model.chain import revision_of

        checkpoints = [revision_of(folder.path) for folder in self.opened().folders]
        return json_hash({"checkpoints": checkpoints, "torch_dtype": self.torch_dtype or "float32"})

    def load(self) -> LLM2Vec:
        """The model; a `UserError` where it cannot be loaded."""
        from llm2vec.llm2vec import LLM2Vec

        return LLM2Vec.from_pretrained(self.opened(), torch_dtype=self.torch_dtype)


def add_model_flags(
    parser: argparse.ArgumentParser,
    *,
    positional: bool = False,
    required: bool = True,
    torch_dtype: bool = False,
    which: str = "folder or hub name of a model, or of an adapter",
) -> None:
    """Give a parser `--model` and `--peft`, and with `torch_dtype` `--torch_dtype`, too; `chosen_model` reads them.

    With `positional`, MODEL[+ADAPTER ...] may stand as an argument instead, in this place, and `chosen_model` refuses a
    command without a model; else the parser does, where one is `required`.
    """
    if positional:
        parser.add_argument("place", nargs="?", metavar="MODEL", help="model or adapter, or MODEL+ADAPTER")
    parser.add_argument(
        "--model", "--base_model_name_or_path", dest="model", metavar="MODEL", required=required and not positional,
        help=which,
    )  # fmt: skip
    parser.add_argument(
        "--peft", "--peft_model_name_or_path", dest="peft", nargs="+", default=[], metavar="ADAPTER",
        help="adapters on it, innermost first",
    )  # fmt: skip
    if torch_dtype:
        dtypes = [name for name in get_args(DtypeName) if name != "auto"]
        parser.add_argument("--torch_dtype", choices=dtypes, default="float32", help="of the weights (float32)")


def chosen_model(args: argparse.Namespace) -> ModelChoice:
    """The one model that a command line must name, with the dtype of its `--torch_dtype`, if it has that."""
    place: str | None = getattr(args, "place", None)
    if (place is None) == (args.model is None):
        raise UserError(
            "give a model: MODEL, or --model MODEL." if place is None else "give MODEL or --model, not both."
        )
    if place is None:
        choice = ModelChoice(args.model, tuple(args.peft))
    else:
        named = ModelChoice.parse(place)
        choice = dataclasses.replace(named, adapters=(*named.adapters, *args.peft))
    return dataclasses.replace(choice, torch_dtype=getattr(args, "torch_dtype", None))
