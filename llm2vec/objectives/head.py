"""The language model's head: how states become logits, in every family that is served here.

    logits = softcap * tanh(scale * (states @ weight.T + bias) / softcap)

Most families multiply with a matrix and do no more. Phi has a bias, Granite divides by a number, Cohere multiplies by
one, Gemma 2 bends its logits under a bound. `check_head` proves at load that nothing else happens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec.model.backbone import hidden_states, one_pass
from llm2vec.model.proofs import probe_tokens, probing
from llm2vec.objectives.losses import CrossEntropy, linear_cross_entropy
from llm2vec.types import UserError


class Head(NamedTuple):
    """What turns states [..., D] into logits [..., V].

    Example:
        >>> language_head(model).cross_entropy(states_ND, target_N, weight_N).loss.backward()
    """

    weight_VD: Tensor  #: the vocabulary projection
    bias_V: Tensor | None = None  #: added to the product; None = nothing is
    scale: float = 1.0  #: factor of the sum
    softcap: float | None = None  #: bound of the scaled sum; None = there is none

    def logits(self, states: Tensor) -> Tensor:
        """All logits of some states, at once."""
        logits = states @ self.weight_VD.T
        logits = logits if self.bias_V is None else logits + self.bias_V
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cross_entropy(self, states_ND: Tensor, target_N: Tensor, term_weight_N: Tensor) -> CrossEntropy:
        """Sum over N of term_weight * -log softmax(logits)[target]; the logits are never all held."""
        return self._terms(states_ND, target_N, term_weight_N, None)

    def divergence(self, states_ND: Tensor, teacher_ND: Tensor, term_weight_N: Tensor) -> CrossEntropy:
        """Sum over N of term_weight * KL(softmax(logits of the teacher's states) || softmax(logits of the states))."""
        return self._terms(states_ND, None, term_weight_N, teacher_ND)

    def _terms(
        self, states_ND: Tensor, target_N: Tensor | None, term_weight_N: Tensor, teacher_ND: Tensor | None
    ) -> CrossEntropy:
        bias_V = self.bias_V
        if self.scale != 1:
            states_ND, bias_V = states_ND * self.scale, None if bias_V is None else bias_V * self.scale
            teacher_ND = None if teacher_ND is None else teacher_ND * self.scale
        return linear_cross_entropy(
            states_ND,
            self.weight_VD,
            target_N,
            term_weight_N,
            bias_V=bias_V,
            softcap=self.softcap,
            teacher_ND=teacher_ND,
        )


def language_head(model: Any) -> Head:
    """The head of a causal language model; its tensors are the model's own."""
    return head_of(model.get_output_embeddings(), model.config)


def head_of(projection: Any, config: Any) -> Head:
    """A vocabulary projection (a linear layer, or an embedding table that serves as one), and what a model of this
    config does besides."""
    divisor, factor = (getattr(config, name, None) for name in ("logits_scaling", "logit_scale"))
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(projection.weight, getattr(projection, "bias", None), (factor or 1.0) / (divisor or 1.0), softcap)


def check_head(model: Any) -> None:
    """Prove that the losses of a short text are those of the model's own logits.

    Each token is to be predicted, and at each place what the model holds for likeliest and for least likely: the ends
    show a scale and a bend best. A `UserError` where they are not; the model must be where it will run.
    """
    ids = probe_tokens(model, 8)
    rows = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    with probing(model) as exact:
        with one_pass(model):
            own_NV = model(**rows, is_causal=True, use_cache=False).logits[0, :-1].float()
        states_ND = hidden_states(model.base_model, "causal", rows["attention_mask"], input_ids=rows["input_ids"])[0]
        targets = (ids[1:], own_NV.argmax(dim=1), own_NV.argmin(dim=1))
        ones_N = torch.ones_like(ids[1:], dtype=torch.float32)
        found = [language_head(model).cross_entropy(states_ND[:-1], target, ones_N).terms for target in targets]
    expected = torch.stack([F.cross_entropy(own_NV, target, reduction="none") for target in targets])
    apart = (torch.stack(found) - expected).abs().max() / expected.max()
    if not apart <= (1e-3 if exact else 0.03):  # room for TF32, and for half precision, which rounds the own logits
        raise UserError(
            f"{type(model).__name__} makes its logits in a way that is not known here, so no objective that predicts "
            "tokens can train it; Stage II, which predicts none, can."
        )
