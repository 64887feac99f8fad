"""What an anchor becomes before it stands where a token's embedding would (`projection` of a Stage I config).

    none      the state itself, as in the paper
    scaled    the state at the length that the base's token embeddings have in the mean
    linear    W state + b, learnt; W begins as the identity, b as 0

A state after the final norm is much longer than an embedding. What a projection learns belongs to Stage I alone: its
checkpoints keep it in a file beside the model, and the next stage drops it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2vec.types import AnchorProjection


def make_projection(name: AnchorProjection, model: PreTrainedModel) -> nn.Module:
    """A module from anchors [B, D] to what is decoded from, [B, D]; on the model's device and in its type. Its
    embeddings are measured now, before training moves them."""
    if name == "none":
        return nn.Identity()
    table_VD: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    if name == "scaled":
        return Scaled(table_VD)
    size = table_VD.shape[1]
    learnt = nn.Linear(size, size, device=table_VD.device, dtype=table_VD.dtype)
    nn.init.eye_(learnt.weight)
    nn.init.zeros_(learnt.bias)
    return learnt


class Scaled(nn.Module):
    """Anchors at the mean length of a table of embeddings."""

    length: Tensor

    def __init__(self, table_VD: Tensor) -> None:
        super().__init__()
        self.register_buffer("length", table_VD.detach().norm(dim=1).mean())

    def forward(self, anchor_BD: Tensor) -> Tensor:
        """[B, D], each of that length."""
        return nn.functional.normalize(anchor_BD, dim=1) * self.length.to(anchor_BD.dtype)


class Imitation(nn.Linear):
    """A learnt map from the mean of a projected memory to where a teacher has the text that it is to tell."""

    def distances(self, mean_BD: Tensor, teacher_BW: Tensor) -> Tensor:
        """Mean squared difference [B] of each text's map and vector, in float32 at least."""
        with torch.autocast(mean_BD.device.type, enabled=False):
            mean_BD = mean_BD.to(torch.promote_types(mean_BD.dtype, torch.float32))
            own_BW = nn.functional.linear(mean_BD, self.weight.to(mean_BD), self.bias.to(mean_BD))
            return (own_BW - teacher_BW.to(own_BW)).square().mean(dim=1)
