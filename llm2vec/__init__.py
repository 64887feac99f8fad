"""Anchor Embedding and LLM2Vec: train decoder language models into text embedders, and use them.

    from llm2vec import LLM2Vec
    model = LLM2Vec.from_pretrained(base_model, peft_model_name_or_path=adapter)
    vectors = model.encode([[instruction, query], ...])

Training, evaluation and reports start from the scripts in `experiments/`.
"""

from llm2vec.llm2vec import LLM2Vec
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction, LLM2Vec_q2d_d2q

__all__ = ["BidirectionalReconstruction", "LLM2Vec", "LLM2Vec_q2d_d2q"]
