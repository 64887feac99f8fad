"""Upstream's contrastive loss, under upstream's paths.

from llm2vec.loss.utils import load_loss
loss = load_loss("HardNegativeNLLLoss", scale=50.0)(queries, positives, negatives)
"""

from llm2vec.loss.HardNegativeNLLLoss import HardNegativeNLLLoss
from llm2vec.loss.loss_utils import cos_sim
from llm2vec.loss.utils import load_loss

__all__ = ["HardNegativeNLLLoss", "cos_sim", "load_loss"]
