"""NanoBEIR while training: 13 small retrieval sets through sentence-transformers' evaluator, shared out over the ranks.

A probe, not a result: several of its sets have siblings among the training sources (MSMARCO, NQ, HotpotQA, FEVER,
Quora). Needs sentence-transformers, which comes with the `eval` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator
from sentence_transformers.util import cos_sim

from llm2vec.distributed import sum_over_ranks
from llm2vec.files import read_object
from llm2vec.llm2vec import LLM2Vec
from llm2vec.processes import rank, world_size
from llm2vec.text.entries import INSTRUCTIONS_FILE
from llm2vec.types import in_one_sentence

_SETS = (
    "climatefever", "dbpedia", "fever", "fiqa2018", "hotpotqa", "msmarco", "nfcorpus", "nq", "quoraretrieval",
    "scidocs", "arguana", "scifact", "touche2020",
)  # fmt: skip
_OF_PAPER = {task.lower(): text.removesuffix(":") for task, text in read_object(INSTRUCTIONS_FILE).items()}
#: The sets, with the paper's instructions for the tasks that they are samples of (Table 13).
INSTRUCTIONS: dict[str, str] = {name: _OF_PAPER[name] for name in _SETS}


class NanoBeirProbe:
    """nDCG@10 of a model on NanoBEIR; every rank scores its share of the sets and all of them learn all scores.

    `dataset_id` is a hub name, or a local folder in the same layout; a set in it that cannot be read is a
    `UserError`. `names` say which of the 13 sets.
    """

    def __init__(
        self, model: LLM2Vec, dataset_id: str, names: Sequence[str], batch_size: int, device: torch.device
    ) -> None:
        self.model = _EvaluatedModel(model, device)
        self.names = list(names)
        self._share = self.names[rank() :: world_size()]
        self._evaluators: list[Any] = []
        if not self._share:
            return
        advice = "give a local copy in the hub's layout"
        # An unreachable hub, a missing folder, a missing column: each raises its own type.
        with in_one_sentence(lambda why: f"nano_beir: {dataset_id} cannot be read ({why}); {advice}."):
            self._evaluators = NanoBEIREvaluator(
                dataset_names=self._share,
                dataset_id=dataset_id,
                query_prompts={name: INSTRUCTIONS[name] for name in self._share},
                batch_size=batch_size,
                write_csv=False,
            ).evaluators

    def __call__(self) -> dict[str, float]:
        """nDCG@10 of each set, and their mean, on every rank."""
        scores = torch.zeros(len(self.names), device=self.model.device)
        for name, evaluator in zip(self._share, self._evaluators, strict=True):
            metrics = evaluator(self.model)
            scores[self.names.index(name)] = next(v for k, v in metrics.items() if k.endswith("cosine_ndcg@10"))
        values = sum_over_ranks(scores).tolist()
        figures = {f"nano_{name}_ndcg_at_10": value for name, value in zip(self.names, values, strict=True)}
        return {**figures, "nano_beir_ndcg_at_10": sum(values) / len(values)}


class _EvaluatedModel:
    """As much of a SentenceTransformer as its retrieval evaluator calls."""

    similarity_fn_name = "cosine"
    similarity = staticmethod(cos_sim)

    def __init__(self, model: LLM2Vec, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.model_card_data = self

    def encode_query(self, sentences: Sequence[str], **arguments: Any) -> Any:
        """Texts under the evaluator's prompt, which is the set's instruction."""
        pairs = [[arguments.get("prompt") or "", text] for text in sentences]
        batch_size = arguments.get("batch_size", 32)
        return self.model.encode(pairs, batch_size=batch_size, show_progress_bar=False, device=self.device)

    encode_document = encode_query

    def set_evaluation_metrics(self, *_: Any) -> None:
        """The evaluator's entry in a model card, which there is none of here."""
