"""What Stage I can train, by name. Nothing is loaded before it is named, so that checking a config loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from llm2vec.types import Objective

if TYPE_CHECKING:
    from llm2vec.text.tokenization import RowTokenizer

#: The names that a config may give as its `objective`, and their classes. A new objective is its own file and a line.
STAGE_ONE = {
    "reconstruction": "llm2vec.llm2vec_q2d_d2q.BidirectionalReconstruction",
}


class StageOneObjective(Objective, Protocol):
    """An objective over a query and a document: `class Mine(nn.Module, StageOneObjective)`.

    Its constructor takes the model and, where it names them, `settings` (how a text becomes a vector), `bos_id` (of the
    tokenizer) and `keys`.

    Attributes:
        sides: what it reads of a row (`CollateSides`), whatever the config.
        keys: of a config, those that decide something here, of the ones that Stage I alone reads and `bidirectional`;
            a config that sets another is refused.
    """

    sides: tuple[str, ...] = ("query", "positive")
    keys: tuple[str, ...] = ()

    if TYPE_CHECKING:

        def __init__(self, model: Any, **arguments: Any) -> None: ...

    @classmethod
    def sides_of(cls, template: str | None, keys: Mapping[str, Any]) -> tuple[str, ...]:
        """What it reads of a row, given the template, if it is known yet, and what the config says of its `keys`."""
        return cls.sides

    @classmethod
    def check_rendering(cls, tokenizer: RowTokenizer, keys: Mapping[str, Any]) -> None:
        """Refuse a template that does not serve; most objectives read any.

        Raises:
            UserError: says which one does.
        """
        return None


def stage_one_objective(name: str) -> type[StageOneObjective]:
    """The class of a name of `STAGE_ONE`."""
    module, _, class_name = STAGE_ONE[name].rpartition(".")
    found: type[StageOneObjective] = getattr(import_module(module), class_name)
    return found
