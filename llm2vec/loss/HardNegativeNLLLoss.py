"""Upstream's contrastive loss over `objectives.losses.info_nce`; the file has upstream's name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm2vec.distributed import gather_with_gradient, sum_over_ranks
from llm2vec.loss.loss_utils import cos_sim
from llm2vec.objectives.losses import info_nce, unit
from llm2vec.processes import rank, world_size
from llm2vec.types import UserError


class HardNegativeNLLLoss:
    """InfoNCE over cosines: each query against all positives and all hard negatives of all processes.

    `scale` is 1 / temperature: upstream's default here is 20, and 50 in its training script. Another
    `similarity_fct` than `cos_sim` is a `UserError`.
    """

    def __init__(self, scale: float = 20.0, similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim) -> None:
        if similarity_fct is not cos_sim:
            raise UserError("similarity_fct: only cos_sim is supported.")
        self.scale = scale

    def __call__(self, q_reps: Tensor, d_reps_pos: Tensor, d_reps_neg: Tensor | None = None) -> Tensor:
        """The mean loss over the queries of all processes, on every process.

        Args:
            q_reps: [B, D] queries; as many on every process.
            d_reps_pos: [B, D] their positives.
            d_reps_neg: [K * B, D] hard negatives; None = none.

        Returns:
            A scalar, the same on every process. Its gradient is meant for DistributedDataParallel, which takes the mean
            over processes: as upstream's, it is as many times that of the loss as there are processes.
        """
        own = d_reps_pos if d_reps_neg is None else torch.cat([d_reps_pos, d_reps_neg])
        pool_ND = gather_with_gradient(unit(own))
        label_B = rank() * len(own) + torch.arange(len(q_reps), device=q_reps.device)
        query_BD = unit(q_reps)
        weight_B = query_BD.new_full((len(query_BD),), 1 / (len(query_BD) * world_size()))
        loss = info_nce(query_BD, pool_ND, label_B, self.scale, weight_B).loss
        # The loss here is these queries' share. The others' has no gradient here: what it owes to these rows comes back
        # through the gathered pool.
        own_share = loss * world_size()
        return own_share + (sum_over_ranks(loss) - own_share.detach())
