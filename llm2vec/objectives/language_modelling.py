"""Next-token loss, which base models are pre-trained with: alone (the equal-compute control to Stage I), or beside the
contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2vec.model.packed_attention import send
from llm2vec.model.packing import packed_hidden_states
from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.head import Head, language_head
from llm2vec.text.batches import starts_of
from llm2vec.types import Attention, Batch, Objective, Output, Pass, TextFacts, TokenBatch


class LanguageModelling(nn.Module, Objective):
    """Next-token prediction over blocks of text, by a decoder with its language-model head; all of it is trained."""

    model: PreTrainedModel
    name = "lm"  #: of its loss part
    attention: Attention = "causal"  #: of each text within itself

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def passes(self, batch: Batch) -> tuple[Pass, ...]:
        """One, of the side `text`."""
        text = batch["text"]
        return (Pass(tuple(text["lengths"]), self.attention, targets=sum(text["num_targets"])),)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Target tokens: every marked token but a text's first."""
        return {self.name: torch.tensor(float(sum(batch["text"]["num_predicted"])))}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """`loss` and detached `loss_lm` (or its own name) of the side `text`, as shares of the step's token mean."""
        text = batch["text"]
        embeddings = self.model.get_input_embeddings()(text["input_ids"])
        states_ND = packed_hidden_states(self.model.base_model, self.attention, text["lengths"], embeddings)
        loss = next_token_loss(states_ND, language_head(self.model), text, totals[self.name])
        return Output({"loss": loss, f"loss_{self.name}": loss.detach()}, {})


class ContrastiveLanguageModelling(nn.Module, Objective):
    """Next-token and contrastive loss in one step, over one model: GritLM's objective.

    Source: Muennighoff et al. 2024, arXiv 2402.09906, section 2.
    The embedding pass attends as the settings say (there: bidirectionally), the language-modelling pass causally, and

        loss = contrastive loss + lm_weight * language-modelling loss

    Each is a mean over the whole optimiser step, of queries and of tokens, so the mix depends neither on the number of
    processes nor on how the step is cut. `lm` reads the side `text`; `contrastive`, over the decoder of the same model,
    all others.
    """

    contrasts = True

    def __init__(self, contrastive: ContrastiveLearning, lm: LanguageModelling, lm_weight: float = 1.0) -> None:
        super().__init__()
        self.model = lm.model
        self.lm_weight = lm_weight
        # Not registered as modules: the model's weights would have three names.
        self._objectives = (contrastive, lm)

    def passes(self, batch: Batch) -> tuple[Pass, ...]:
        """The embedded texts, and the modelled ones."""
        contrastive, lm = self._objectives
        return *contrastive.passes(_embedded(batch)), *lm.passes(batch)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Queries, and target tokens of the side `text`."""
        contrastive, lm = self._objectives
        return {**contrastive.count(batch), **lm.count(batch)}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """The contrastive vectors and facts; `loss` and detached `loss_lm` of the rows' texts, if totals are given."""
        contrastive, lm = self._objectives
        # First the vectors, so that dropout draws the same for them with and without the text.
        vectors = contrastive(_embedded(batch), totals)
        if not totals:
            return vectors
        parts = lm({"text": batch["text"]}, totals).parts
        return vectors._replace(parts={**parts, "loss": self.lm_weight * parts["loss"]})

    def contrast(self, vectors: dict[str, Tensor], facts: TextFacts, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss parts between the vectors of all rows."""
        contrastive, _ = self._objectives
        return contrastive.contrast(vectors, facts, totals)


def next_token_loss(states_ND: Tensor, head: Head, text: TokenBatch, total: Tensor) -> Tensor:
    """Sum over the target tokens of -log p given the state before each, divided by `total`.

    Args:
        states_ND: of all of the side's tokens, after the final norm.
        head: over the states.
        text: the side; what a target token is to be predicted as is its `labels`, or else the token itself.
        total: target tokens of the whole optimiser step.
    """
    if not any(text["num_predicted"]):
        return states_ND.sum() * 0
    # How many there are is known, so no device is asked for it.
    (start_B,) = send([starts_of(text["lengths"])], states_ND.device)
    marked_N = text["target_mask"].index_fill(0, start_B, False)
    (target_N,) = marked_N.nonzero_static(size=sum(text["num_predicted"])).unbind(1)
    label_N = text.get("labels", text["input_ids"])[target_N]
    exact = torch.promote_types(states_ND.dtype, torch.float32)
    weight_N = (1 / total.to(target_N.device, exact)).expand(len(target_N))
    return head.cross_entropy(states_ND[target_N - 1], label_N, weight_N).loss


def _embedded(batch: Batch) -> Batch:
    return {name: side for name, side in batch.items() if name != "text"}
