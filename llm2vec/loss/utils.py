"""The loss of a name, where upstream has it."""

from __future__ import annotations

from llm2vec.loss.HardNegativeNLLLoss import HardNegativeNLLLoss
from llm2vec.types import UserError


def load_loss(loss_class: str, *, scale: float = 20.0) -> HardNegativeNLLLoss:
    """The loss of a name; a `UserError` where there is none."""
    if loss_class != "HardNegativeNLLLoss":
        raise UserError(f"loss_class is {loss_class!r}; allowed: HardNegativeNLLLoss.")
    return HardNegativeNLLLoss(scale)
