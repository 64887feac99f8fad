"""Stage I: bidirectional reconstruction through the anchor (EBQ2D and EBD2Q; paper section 3.1, Algorithm 1).

    anchor(x)   state of x's closing token, after the final norm                              [B, D]
    EBQ2D       [anchor(query) ; Embed(document)] -> decoder -> lm_head -> CE on the document
    EBD2Q       [anchor(document) ; Embed(query)] -> decoder -> lm_head -> CE on the query
    loss        alpha * CE_q2d + (1 - alpha) * CE_d2q                                         (Eq. 5)

With the target `self`, an anchor reconstructs its own text instead, [anchor(x) ; Embed(x)] -> x, named q2q for queries
and d2d for documents: the idea of RetroMAE (arXiv 2205.12035) and SimLM (arXiv 2207.02578), on a decoder and without
what they mask or discard.

The decoder sees the anchor at position 0, where a token's embedding would stand, and the text behind it: what it
knows of the other side, it knows from the anchor. Gradient flows through the anchors into the encoding pass.
`objectives/projection.py` has what else than the anchor itself may stand there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2vec.model.packing import packed_hidden_states
from llm2vec.model.pooling import embed, embedding_pass
from llm2vec.model.settings import EncoderSettings
from llm2vec.objectives.head import language_head
from llm2vec.objectives.projection import make_projection
from llm2vec.objectives.stage_one import StageOneObjective
from llm2vec.text.batches import starts_of
from llm2vec.types import AnchorProjection, Batch, Output, Pass, ReconstructionTarget


class BidirectionalReconstruction(nn.Module, StageOneObjective):
    """The Stage I objective over a causal language model.

    Args:
        model: decoder with its language-model head; all of it is trained.
        settings: how a text becomes its anchor.
        alpha: weight of the direction that starts at the query: EBQ2D; 0 is the paper's OnlyD2Q, 1 its OnlyQ2D, and
            then the other pass is not run.
        target: what an anchor is to reconstruct: the `counterpart` of its text, or the text `self`.
        projection: what an anchor becomes before the decoder sees it.
    """

    model: PreTrainedModel
    keys = ("alpha", "target", "projection", "reconstruct_instruction", "reconstruction_probe", "bidirectional")

    def __init__(
        self,
        model: PreTrainedModel,
        settings: EncoderSettings,
        alpha: float = 0.2,
        target: ReconstructionTarget = "counterpart",
        projection: AnchorProjection = "none",
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.directions = _DIRECTIONS[target]
        self.weights = (alpha, 1 - alpha)
        self.projection = make_projection(projection, model)

    @property
    def decoder(self) -> PreTrainedModel:
        """The model without its head."""
        decoder: PreTrainedModel = self.model.base_model  # type: ignore[assignment]
        return decoder

    @property
    def weighted(self) -> dict[_Direction, float]:
        """The directions that are run, and their weights."""
        return {d: weight for d, weight in zip(self.directions, self.weights, strict=True) if weight > 0}

    def passes(self, batch: Batch) -> tuple[Pass, ...]:
        """The texts that anchors are taken of, and the texts that are decoded from them."""
        sources = {direction.source: batch[direction.source] for direction in self.weighted}
        targets = tuple(n for direction in self.weighted for n in batch[direction.goal]["num_targets"] if n)
        encoded = embedding_pass(self.decoder, self.settings, sources)
        return encoded, Pass(targets, "causal", targets=sum(targets))

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Target tokens of each direction: those of the positive for q2d, of the query for d2q; and the anchors."""
        anchors = sum(len(batch[direction.source]["lengths"]) for direction in self.weighted)
        tokens = {d.name: sum(batch[d.goal]["num_targets"]) for d in self.directions}
        return {name: torch.tensor(float(number)) for name, number in {**tokens, "anchors": anchors}.items()}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """Loss parts of the sides `query` and `positive`.

        Args:
            batch: both sides, packed.
            totals: target tokens of each direction in the whole optimiser step.

        Returns:
            `loss`, and detached `loss_q2d` and `loss_d2q` (or `loss_q2q` and `loss_d2d`) where their direction has a
            weight: these rows' shares of the step's mean over tokens. Alike `anchor_norm` and `embedding_norm`, the
            mean lengths of the anchors, before they are projected, and of the target tokens' embeddings.
        """
        directions = self.weighted
        sources = {direction.source: batch[direction.source] for direction in directions}
        goals = [batch[direction.goal] for direction in directions]
        target_N = torch.cat([goal["input_ids"][goal["target_mask"]] for goal in goals])
        # One look-up for both passes, as its gradient is a table of the vocabulary's size.
        source_ids = torch.cat([side["input_ids"] for side in sources.values()])
        embeddings = self.model.get_input_embeddings()(torch.cat([source_ids, target_N]))
        source_embeddings, target_embeddings = embeddings.split([len(source_ids), len(target_N)])
        anchor_BD = torch.cat(list(embed(self.decoder, self.settings, sources, source_embeddings).values()))
        states_ND = self.decode(anchor_BD, target_embeddings, [n for goal in goals for n in goal["num_targets"]])
        sizes = [sum(goal["num_targets"]) for goal in goals]
        exact = torch.promote_types(states_ND.dtype, torch.float32)
        # Where the whole step has no target, a share of it is 0 and not 0 / 0.
        shares = [1 / totals[direction.name].to(states_ND.device, exact).clamp_min(1) for direction in directions]
        weight_N = torch.cat(
            [(w * share).expand(size) for w, share, size in zip(directions.values(), shares, sizes, strict=True)]
        )
        loss, terms_N, _ = language_head(self.model).cross_entropy(states_ND, target_N, weight_N)
        sums = [terms.sum() for terms in terms_N.split(sizes)]
        parts = {f"loss_{d.name}": total * s for d, total, s in zip(directions, sums, shares, strict=True)}
        of_targets = torch.stack([totals[direction.name] for direction in directions]).sum()
        for name, vectors, total in (
            ("anchor_norm", anchor_BD, totals["anchors"]),
            ("embedding_norm", target_embeddings, of_targets),
        ):
            norms = vectors.detach().to(exact).norm(dim=1).sum()
            parts[name] = norms / total.to(norms).clamp_min(1)
        return Output({"loss": loss, **parts}, {})

    def decode(self, anchor_BD: Tensor, target_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        """States [N, D] that predict each target token (Eq. 3 and 4).

        Position 0 of a row holds the anchor and predicts the first target token; the last one is not an input.

        Args:
            anchor_BD: one a row, not projected yet.
            target_ND: embeddings of the rows' target tokens, row after row.
            lengths: number of target tokens of each row.
        """
        prefix_BD = self.projection(anchor_BD).to(target_ND.dtype)
        if not any(lengths):  # nothing to predict: the pass is run all the same, as other processes run theirs
            return packed_hidden_states(self.decoder, "causal", [1], prefix_BD[:1])[:0]
        filled = torch.tensor([i for i, length in enumerate(lengths) if length], device=prefix_BD.device)
        lengths = [length for length in lengths if length]
        starts = starts_of(lengths).to(target_ND.device)
        shifted_ND = target_ND.roll(1, dims=0)
        inputs_ND = shifted_ND.index_copy(0, starts, prefix_BD[filled])
        # Generation is causal whatever the attention of the encoding pass.
        return packed_hidden_states(self.decoder, "causal", lengths, inputs_ND)


class _Direction(NamedTuple):
    """A reconstruction: whose anchor, whose text, and its name in the log."""

    name: str
    source: str
    goal: str


#: The two reconstructions of each target; the first is weighted by alpha.
_DIRECTIONS: dict[ReconstructionTarget, tuple[_Direction, _Direction]] = {
    "counterpart": (_Direction("q2d", "query", "positive"), _Direction("d2q", "positive", "query")),
    "self": (_Direction("q2q", "query", "query"), _Direction("d2d", "positive", "positive")),
}

#: The name under which the paper's release imports Stage I.
LLM2Vec_q2d_d2q = BidirectionalReconstruction
