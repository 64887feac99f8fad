"""Plain next-token loss: what a base model is pre-trained with, and the equal-compute control to Stage I."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2vec.model.packing import packed_hidden_states
from llm2vec.objectives.losses import linear_cross_entropy
from llm2vec.text.batches import starts_of
from llm2vec.types import Batch, Output, TokenBatch


class LanguageModelling(nn.Module):
    """Next-token prediction over blocks of text.

    Args:
        model: decoder with its language-model head; all of it is trained.
    """

    contrasts = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Target tokens: every marked token but a text's first."""
        return {"lm": num_predicted(batch["text"])}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """`loss` and detached `loss_lm` of the side `text`, as shares of the step's token mean."""
        text = batch["text"]
        embeddings = self.model.get_input_embeddings()(text["input_ids"])
        states_ND = packed_hidden_states(self.model.base_model, "causal", text["lengths"], embeddings)
        loss = next_token_loss(states_ND, self.model.get_output_embeddings().weight, text, totals["lm"])
        return Output({"loss": loss, "loss_lm": loss.detach()}, {})


def next_token_loss(states_ND: Tensor, head_VD: Tensor, text: TokenBatch, total: Tensor) -> Tensor:
    """Sum over the target tokens of -log p given the state before each, divided by `total`.

    Args:
        states_ND: of all of the side's tokens, after the final norm.
        head_VD: the vocabulary projection.
        text: the side; what a target token is to be predicted as is its `labels`, or else the token itself.
        total: target tokens of the whole optimiser step.
    """
    target_N = _targets(text).nonzero()[:, 0]
    if not len(target_N):
        return states_ND.sum() * 0
    label_N = text.get("labels", text["input_ids"])[target_N]
    exact = torch.promote_types(states_ND.dtype, torch.float32)
    weight_N = (1 / total.to(target_N.device, exact)).expand(len(target_N))
    return linear_cross_entropy(states_ND[target_N - 1], head_VD, label_N, weight_N).loss


def num_predicted(text: TokenBatch) -> Tensor:
    """How many tokens of a side are predicted, as a float scalar."""
    return _targets(text).sum(dtype=torch.float32)


def _targets(text: TokenBatch) -> Tensor:
    """Which tokens [N] are predicted: the marked ones that have one before them in their text."""
    targets = text["target_mask"].clone()
    targets[starts_of(text["lengths"]).to(targets.device)] = False
    return targets
