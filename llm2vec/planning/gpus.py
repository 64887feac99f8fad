"""GPUs: their memory and the makers' figures for dense matrix products, by which a plan reckons."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """A GPU."""

    name: str  #: as people call it
    #: in 10^9 bytes; cards have up to 7 % more, which CUDA itself and fragments take.
    memory_gb: float
    tflops: float | None = None  #: 10^12 operations a second in bfloat16; None = not known
    tflops_tf32: float | None = None  #: the same in TF32
    tflops_float32: float | None = None  #: the same in float32 without TF32


CARDS = {
    card.name: card
    for card in (
        Card("B200", 180, 2250, 1125, 80),
        Card("H200", 141, 989, 494.5, 67),
        Card("H100", 80, 989, 494.5, 67),
        Card("A100-80GB", 80, 312, 156, 19.5),
        Card("A100-40GB", 40, 312, 156, 19.5),
        Card("L40S", 48, 362, 181, 91.6),
        Card("L4", 24, 121, 60.5, 30.3),
        Card("RTX-4090", 24, 165, 82.6, 82.6),
    )
}


def card_here() -> Card | None:
    """This machine's GPU, if torch can use one; it is not known how fast it is."""
    import torch  # seconds, and who only asks which GPUs are known does not need it

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Card(found.name, found.total_memory / 1e9)
