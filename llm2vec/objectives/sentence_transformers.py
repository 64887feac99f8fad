"""Stage I as a loss for sentence-transformers' own trainer: bidirectional reconstruction of (query, document) columns.

    model = SentenceTransformer(modules=[Transformer("meta-llama/Llama-3.2-1B"), Pooling(2048, "lasttoken")])
    loss = BidirectionalReconstructionLoss(model)
    SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()

The anchor of a text is the embedding that the model gives it, so the model must end in its pooling, and for `lasttoken`
its tokenizer must append the closing token. Equal to `llm2vec_q2d_d2q` on the same token rows, whose module docstring
has the formulas. Two things are that trainer's: each direction is a mean over the tokens of one device's batch, not of
the whole optimiser step; and a prompt, which is no target, is counted in tokens of its own, so it should end in a line
break: a blank at its end joins the text's first word, which would then be no target either.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from llm2vec.model.backbone import hidden_states
from llm2vec.objectives.head import check_head, head_of
from llm2vec.types import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class BidirectionalReconstructionLoss(nn.Module):
    """alpha * CE(document from anchor(query)) + (1 - alpha) * CE(query from anchor(document)), paper section 3.1.

    Args:
        model: a decoder and its pooling; all of it that requires gradients is trained.
        lm_head: the decoder's language-model head, [hidden size -> vocabulary]; None = the embedding table, for
            decoders that share it. Its family's scale or cap of logits is read from the decoder's config. A head is
            trained too unless it is frozen, and is not saved with the model; the trainer does not average its gradient
            over processes, so freeze it where there are several.
        alpha: weight of the direction that starts at the query; with 0 or 1 the other one is not run.

    Raises:
        UserError: the model has modules behind its pooling, or a head of its own that was not given; its family makes
            its logits in a way that is not known here; or `alpha` is no share.
    """

    def __init__(self, model: SentenceTransformer, lm_head: nn.Linear | None = None, alpha: float = 0.2) -> None:
        super().__init__()
        modules = [type(module).__name__ for module in model]
        if modules != ["Transformer", "Pooling"]:
            raise UserError(
                f"model has the modules {', '.join(modules)}; an anchor is a decoder's state, so Transformer and "
                "Pooling are needed, and nothing behind them in this stage."
            )
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha is {alpha}; it must lie between 0 and 1.")
        decoder: Any = model.transformers_model
        if lm_head is None and not decoder.config.tie_word_embeddings:
            raise UserError(
                "lm_head: this decoder's head is not its embedding table; give the head, as in "
                "AutoModelForCausalLM.from_pretrained(...).lm_head."
            )
        _check_family(decoder, lm_head)
        self.model = model
        self.decoder = decoder
        self.lm_head = lm_head
        self.alpha = alpha
        self.special_ids = torch.tensor(sorted(model.tokenizer.all_special_ids))

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None) -> dict[str, Tensor]:
        """The weighted loss of each direction, `q2d` and `d2q`; the trainer, which tokenises the two columns, adds them
        up and logs both. There are no labels."""
        query, document = sentence_features
        directions = {"q2d": (self.alpha, query, document), "d2q": (1 - self.alpha, document, query)}
        return {
            name: weight * self.reconstruct(self.model(dict(source))["sentence_embedding"], goal)
            for name, (weight, source, goal) in directions.items()
            if weight > 0
        }

    def reconstruct(self, anchor_BD: Tensor, goal: dict[str, Any]) -> Tensor:
        """Mean cross-entropy of the goal's tokens, each predicted from its anchor and those before it; of none, 0."""
        rows = [ids[kept] for ids, kept in zip(goal["input_ids"], self.target_mask(goal), strict=True)]
        filled = [i for i, row in enumerate(rows) if len(row)]
        if not filled:
            return anchor_BD.sum() * 0
        target_N = torch.cat([rows[i] for i in filled])
        embedding = self.decoder.get_input_embeddings()
        # Position 0 holds the anchor and predicts the first token; the last one is not an input.
        inputs = [torch.cat([anchor_BD[i : i + 1].to(embedding.weight.dtype), embedding(rows[i][:-1])]) for i in filled]
        length_B = torch.tensor([len(rows[i]) for i in filled], device=target_N.device)
        inputs_BTD = pad_sequence(inputs, batch_first=True)
        mask_BT = torch.arange(inputs_BTD.shape[1], device=target_N.device) < length_B.unsqueeze(1)
        states_BTD = hidden_states(self.decoder, "causal", mask_BT.long(), inputs_embeds=inputs_BTD)
        head = head_of(embedding if self.lm_head is None else self.lm_head, self.decoder.config)
        exact = torch.promote_types(states_BTD.dtype, torch.float32)
        share_N = states_BTD.new_full(target_N.shape, 1 / len(target_N), dtype=exact)
        return head.cross_entropy(states_BTD[mask_BT], target_N, share_N).loss

    def target_mask(self, goal: dict[str, Any]) -> Tensor:
        """Which tokens [B, T] are reconstructed: neither padding nor special nor the trainer's prompt. Rows end to
        end, without padding, are a `UserError`."""
        if "attention_mask" not in goal:
            raise UserError("model[0].unpad_inputs: set it to False; this loss reads padded rows.")
        mask_BT = goal["attention_mask"].bool()
        prompt = torch.as_tensor(goal.get("prompt_length", 0), device=mask_BT.device).flatten()[0]
        is_special_BT = torch.isin(goal["input_ids"], self.special_ids.to(mask_BT.device))
        return mask_BT & (mask_BT.cumsum(dim=1) > prompt) & ~is_special_BT


def _check_family(decoder: Any, lm_head: nn.Linear | None) -> None:
    """Prove the head, or raise a `UserError`, by the whole model of the decoder's family, which is put together for
    that."""
    table = decoder.get_input_embeddings().weight
    try:
        with torch.device("meta"):
            whole: Any = AutoModelForCausalLM.from_config(decoder.config, trust_remote_code=False)
            head = nn.Linear(table.shape[1], table.shape[0], bias=False)
    except ValueError as error:
        raise UserError(f"model: {type(decoder).__name__} is no decoder of a causal language model.") from error
    head.weight = table
    # A head of the user's may stand elsewhere yet, or be of another precision.
    whole.set_output_embeddings(head if lm_head is None else copy.deepcopy(lm_head).to(table))
    setattr(whole, whole.base_model_prefix, decoder)
    check_head(whole)
