"""An encoder that searches by itself: mteb asks it for the hits, and the corpus streams by in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from llm2vec.corpus.search import CorpusSearch
from llm2vec.evaluation.mteb_adapter import batches_of, prompt_type_of
from llm2vec.types import TextSide, UserError


class StreamingSearch:
    """An encoder of one dense vector a text with mteb's search protocol on top: the corpus streams by in blocks.

    Only retrieval and reranking ask for the search; all other tasks see the encoder. Searches whose merged hits are
    `found` (by `jobs.search_shard`) are not made again.
    """

    def __init__(self, encoder: Any, found: Mapping[str, Tensor] | None = None) -> None:
        self.encoder = encoder
        self.found = found
        self.mteb_model_meta = encoder.mteb_model_meta
        self.encode = encoder.encode
        self.similarity = encoder.similarity
        self.similarity_pairwise = encoder.similarity_pairwise

    def index(
        self,
        corpus: Dataset,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: dict[str, Any],
        num_proc: int | None = None,
    ) -> None:
        """Keep the corpus; `search` encodes it."""
        self._corpus = corpus

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: dict[str, Any],
        top_ranked: dict[str, list[str]] | None = None,
        num_proc: int | None = None,
    ) -> dict[str, dict[str, float]]:
        """Query -> document -> score, of the best `top_k` documents or of those in `top_ranked`."""
        search = self.prepare(queries, self._corpus, task_metadata, hf_split, hf_subset, encode_kwargs)
        if top_ranked is not None:
            return search.rerank(top_ranked, top_k)
        if self.found is None:
            return search.results(search.keys(top_k))
        if search.name not in self.found:
            raise UserError(
                f"The data of {task_metadata.name} changed while it was searched; remove the queue and start again."
            )
        return search.results(self.found[search.name])

    def prepare(
        self,
        queries: Dataset,
        corpus: Dataset,
        task_metadata: Any,
        split: str,
        subset: str,
        encode_kwargs: dict[str, Any],
    ) -> CorpusSearch:
        """A search by this encoder; the encoder is told what mteb would tell it."""

        size = encode_kwargs.get("batch_size", 32)

        def encode(rows: Dataset, side: TextSide) -> Tensor:
            vectors = self.encoder.encode(
                batches_of(rows, task_metadata, side, size),
                task_metadata=task_metadata,
                hf_split=split,
                hf_subset=subset,
                prompt_type=prompt_type_of(side),
                **encode_kwargs,
            )
            return torch.as_tensor(vectors).to(_device_of(self.encoder), torch.float32)

        def similarity(queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
            return torch.as_tensor(self.encoder.similarity(queries_QD, documents_ND))

        texts = list(batches_of(queries, task_metadata, "query", size).dataset["text"])
        return CorpusSearch(f"{subset}/{split}", queries, texts, corpus, encode, similarity)


def _device_of(encoder: Any) -> torch.device:
    """Where an encoder's model computes, now that it has; of one that is not known here, a GPU if there is one."""
    model = getattr(encoder, "model", None)
    if isinstance(model, nn.Module):
        return next(model.parameters()).device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
