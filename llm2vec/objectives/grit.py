"""Contrastive learning and language modelling in one step, one model (GritLM's objective).

Source: Muennighoff et al. 2024, arXiv 2402.09906, section 2. The embedding pass attends as the settings say (there:
bidirectionally), the language-modelling pass causally, and

    loss = contrastive loss + lm_weight * language-modelling loss

Each is a mean over the whole optimiser step, of queries and of tokens, so the mix depends neither on the number of
processes nor on how the step is cut.
"""

from __future__ import annotations

from torch import Tensor, nn

from llm2vec.objectives.contrastive import ContrastiveLearning
from llm2vec.objectives.language_modelling import LanguageModelling
from llm2vec.types import Batch, Output


class ContrastiveLanguageModelling(nn.Module):
    """Both objectives over one model.

    Args:
        contrastive: over the decoder of `lm`'s model; it reads all sides but `text`.
        lm: reads the side `text`.
        lm_weight: of the language-modelling loss.
    """

    contrasts = True

    def __init__(self, contrastive: ContrastiveLearning, lm: LanguageModelling, lm_weight: float = 1.0) -> None:
        super().__init__()
        self.model = lm.model
        self.lm_weight = lm_weight
        # Not registered as modules: the model's weights would have three names.
        self._objectives = (contrastive, lm)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Queries, and target tokens of the side `text`."""
        contrastive, lm = self._objectives
        return {**contrastive.count(batch), **lm.count(batch)}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """The contrastive vectors and facts; `loss` and detached `loss_lm` of the rows' texts, if totals are given."""
        contrastive, lm = self._objectives
        # First the vectors, so that dropout draws the same for them with and without the text.
        vectors = contrastive({name: side for name, side in batch.items() if name != "text"}, totals)
        if not totals:
            return vectors
        parts = lm({"text": batch["text"]}, totals).parts
        return vectors._replace(parts={**parts, "loss": self.lm_weight * parts["loss"]})

    def contrast(self, vectors: dict[str, Tensor], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss parts between the vectors of all rows."""
        contrastive, _ = self._objectives
        return contrastive.contrast(vectors, totals)
