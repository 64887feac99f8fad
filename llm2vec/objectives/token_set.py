"""Token-set prediction out of a block of added tokens (LLaMA2Vec's objectives EBAE and EBAR, the LLARA code).

Source: Li et al. 2024, arXiv 2312.15503, section 3, in the form of its released code. A text is read twice, causally:
with a block of tokens behind it that asks for a summary (the template's document form), and with one that asks for
what follows (the query form). A block has to bring forth a set of tokens, in no order:

    score[v]    = max over the block's positions k of head(state[k])[v]
    loss of row = - mean over the different tokens v of the target of log softmax(score)[v]
    self        = EBAE: the first block's loss on the text's own tokens, mean over rows
    next        = EBAR: the second block's loss on the tokens of the text's counterpart, mean over rows
    loss        = lm + 0.05 * self + 0.05 * next, with lm the next-token loss of the text in its first reading

Both texts of a training row are read so, each the other's counterpart. The paper's own form has one token a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm2vec.model.packing import packed_hidden_states
from llm2vec.objectives.head import Head, language_head
from llm2vec.objectives.language_modelling import next_token_loss, num_predicted
from llm2vec.objectives.losses import BLOCK_ENTRIES, BLOCK_ENTRIES_CUDA
from llm2vec.objectives.stage_one import StageOneObjective
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import Batch, InstructedText, Output, Pass, TokenBatch, UserError


class TokenSetPrediction(nn.Module, StageOneObjective):
    """The loss over both readings of both texts of a row.

    Args:
        model: decoder with its language-model head; all of it is trained.
        self_weight: of the text's own tokens.
        next_weight: of its counterpart's.
        lm_weight: of the next-token loss.
    """

    model: PreTrainedModel
    sides = ("query:document", "query:query", "positive:document", "positive:query")

    def __init__(
        self, model: PreTrainedModel, self_weight: float = 0.05, next_weight: float = 0.05, lm_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.model = model
        self.weights = {"self": self_weight, "next": next_weight, "lm": lm_weight}

    @classmethod
    def check_rendering(cls, tokenizer: RowTokenizer) -> None:
        """Refuse a template whose two forms do not end in blocks of equal length, the only tokens pooled over."""
        texts = [InstructedText("", text, form) for text in ("a", "a b c d") for form in ("query", "document")]
        rows = tokenizer.rows(texts)
        if tokenizer.sides == ("query",) or len({sum(row.pooled) for row in rows}) > 1:
            raise UserError(
                f"objective is 'token_set', but template {tokenizer.template!r} has no block of tokens for each of its "
                "two forms that stands behind a text of any length; use template 'llara'."
            )

    def passes(self, batch: Batch) -> tuple[Pass, ...]:
        """One, of all readings; blocks and modelled texts are multiplied with the vocabulary."""
        blocks = sum(int(side["pool_mask"].sum()) for side in batch.values())
        modelled = sum(sum(batch[side]["num_targets"]) for side in _MODELLED)
        lengths = tuple(length for side in batch.values() for length in side["lengths"])
        return (Pass(lengths, "causal", targets=blocks + modelled),)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Rows with a target of either kind, and target tokens of the next-token loss."""
        rows = {name: 0 for name in ("self", "next")}
        for reading in _READINGS:
            rows[reading.loss] += sum(number > 0 for number in batch[reading.goal]["num_targets"])
        counts = {name: torch.tensor(float(number)) for name, number in rows.items()}
        return {**counts, "lm": torch.stack([num_predicted(batch[side]) for side in _MODELLED]).sum()}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """`loss` and detached `loss_self`, `loss_next` and `loss_lm`: these rows' shares of the step's means.

        Args:
            batch: the four sides, packed.
            totals: of each loss in the whole optimiser step.
        """
        embeddings = self.model.get_input_embeddings()(torch.cat([side["input_ids"] for side in batch.values()]))
        lengths = [length for side in batch.values() for length in side["lengths"]]
        states_ND = packed_hidden_states(self.model.base_model, "causal", lengths, embeddings)
        of_sides = states_ND.split([sum(side["lengths"]) for side in batch.values()])
        states = dict(zip(batch, of_sides, strict=True))
        head = language_head(self.model)
        losses = {
            "lm": torch.stack([next_token_loss(states[s], head, batch[s], totals["lm"]) for s in _MODELLED]).sum()
        }
        for name in ("self", "next"):
            readings = [reading for reading in _READINGS if reading.loss == name]
            blocks_RKD = torch.cat([_blocks(states[r.source], batch[r.source]) for r in readings])
            targets = [target for r in readings for target in _token_sets(batch[r.goal])]
            losses[name] = token_set_loss(blocks_RKD, head, targets, totals[name])
        loss = torch.stack([weight * losses[name] for name, weight in self.weights.items()]).sum()
        return Output({"loss": loss, **{f"loss_{name}": losses[name].detach() for name in self.weights}}, {})


def token_set_loss(
    block_RKD: Tensor, head: Head, targets: Sequence[Tensor], total: Tensor, block_rows: int | None = None
) -> Tensor:
    """Sum over R rows of a block's loss on its target, divided by `total`; rows without a target count nothing.

    The scores of only some rows' blocks are held at a time, in the forward pass and in the backward pass, which
    computes them again: they are few beside those of a next-token loss on the same texts.

    Args:
        block_RKD: states of the rows' blocks, K positions each.
        head: over the states.
        targets: for each row, the different tokens of its target.
        total: rows with a target in the whole optimiser step.
        block_rows: rows whose scores [rows, K, V] are held at once; None = as many as make a block of moderate size.
    """
    if block_rows is None:
        entries = BLOCK_ENTRIES_CUDA if block_RKD.device.type == "cuda" else BLOCK_ENTRIES
        block_rows = max(1, entries // (block_RKD.shape[1] * len(head.weight_VD)))
    share = 1 / total.to(block_RKD.device, torch.promote_types(block_RKD.dtype, torch.float32))
    losses = [
        checkpoint(
            _loss_of_rows,
            block_RKD[start : start + block_rows],
            head,
            targets[start : start + block_rows],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, len(block_RKD), block_rows)
    ]
    return torch.stack(losses).sum() * share


def _loss_of_rows(block_RKD: Tensor, head: Head, targets: Sequence[Tensor]) -> Tensor:
    """The sum of some rows' losses; the softmax is taken in float32 at least."""
    score_RV = head.logits(block_RKD).max(dim=1).values
    log_share_RV = score_RV.to(torch.promote_types(score_RV.dtype, torch.float32)).log_softmax(dim=1)
    terms = [-log_share_RV[row, target].mean() for row, target in enumerate(targets) if len(target)]
    return torch.stack(terms).sum() if terms else log_share_RV.sum() * 0


def _blocks(states_ND: Tensor, side: TokenBatch) -> Tensor:
    """States [R, K, D] of a side's pooled positions, as many in each row."""
    return states_ND[side["pool_mask"]].unflatten(0, (len(side["lengths"]), -1))


def _token_sets(side: TokenBatch) -> list[Tensor]:
    """For each row, the different tokens among its targets."""
    return [tokens.unique() for tokens in side["input_ids"][side["target_mask"]].split(side["num_targets"])]


class _Reading(NamedTuple):
    """A text with a block behind it, and the side whose text the block is to bring forth."""

    loss: str
    source: str
    goal: str


_READINGS = (
    _Reading("self", "query:document", "query:document"),
    _Reading("self", "positive:document", "positive:document"),
    _Reading("next", "query:query", "positive:document"),
    _Reading("next", "positive:query", "query:document"),
)
_MODELLED = ("query:document", "positive:document")
