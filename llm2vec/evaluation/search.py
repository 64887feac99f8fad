"""An encoder that searches by itself: mteb asks it for the hits, and the corpus streams by in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from llm2vec.corpus.search import blocks, hits_of, rerank, top_k
from llm2vec.evaluation.mteb_adapter import batches_of, prompt_type_of
from llm2vec.files import json_hash
from llm2vec.model.backbone import default_device
from llm2vec.types import TextSide, UserError

#: Query -> document -> score.
Found = dict[str, dict[str, float]]


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
    ) -> Found:
        """Query -> document -> score, of the best `top_k` documents or of those in `top_ranked`."""
        search = CorpusSearch(self.encoder, queries, self._corpus, task_metadata, hf_split, hf_subset, encode_kwargs)
        if top_ranked is not None:
            return search.rerank(top_ranked, top_k)
        if self.found is None:
            return search.results(search.keys(top_k))
        if search.name not in self.found:
            raise UserError(
                f"The data of {task_metadata.name} changed while it was searched; remove the queue and start again."
            )
        return search.results(self.found[search.name])


class CorpusSearch:
    """One search by an encoder, which is told what mteb would tell it. Equal queries are encoded and scored once.

    Queries and corpus are rows with `id`. The `name` is another one where hits would be others, as far as the queries'
    texts and the size of the corpus can tell; a task's searches have different ones.
    """

    def __init__(
        self, encoder: Any, queries: Dataset, corpus: Dataset, task_metadata: Any, split: str, subset: str,
        encode_kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self._encoder, self._corpus, self._metadata = encoder, corpus, task_metadata
        self._how = {"task_metadata": task_metadata, "hf_split": split, "hf_subset": subset, **encode_kwargs}
        self._batch_size = encode_kwargs.get("batch_size", 32)
        texts = list(batches_of(queries, task_metadata, "query", self._batch_size).dataset["text"])
        first_of_text: dict[str, int] = {}
        for position, text in enumerate(texts):
            first_of_text.setdefault(text, position)
        row_of_text = {text: row for row, text in enumerate(first_of_text)}
        self._names: list[str] = list(queries["id"])
        self._row_of_query = [row_of_text[text] for text in texts]
        self._unique = queries.select(list(first_of_text.values()))
        self.name = f"{subset}/{split}/{len(corpus)}/{json_hash(list(first_of_text))}"

    def keys(self, k: int, shard: int = 0, num_shards: int = 1) -> Tensor:
        """Keys of the best k documents of one shard of the corpus, a row for each different query."""
        vectors_QD = self._encode(self._unique, "query")
        ranges = blocks(len(self._corpus), shard, num_shards)
        documents = ((block.start, self._document_vectors(self._corpus, block)) for block in ranges)
        return top_k(vectors_QD, documents, self._similarity, k).cpu()

    def results(self, keys: Tensor) -> Found:
        """Query -> document -> score, of keys."""
        hits = hits_of(keys)
        found = sorted({number for row in hits for number, _ in row})
        # Only what was found is named: the names of all documents would grow with the corpus.
        names = dict(zip(found, self._corpus.select_columns("id")[found]["id"], strict=True))
        return {
            query: {names[number]: score for number, score in hits[row]}
            for query, row in zip(self._names, self._row_of_query, strict=True)
        }

    def rerank(self, top_ranked: Mapping[str, list[str]], k: int) -> Found:
        """Query -> document -> score, of the documents listed for each query; the vectors of all those are held. A
        `UserError` where a listed document is not in the corpus."""
        listed = {document for query in self._names for document in top_ranked.get(query, ())}
        chosen = self._corpus.select([row for row, document in enumerate(self._corpus["id"]) if document in listed])
        results: Found = {query: {} for query in self._names}
        if not listed:
            return results
        row_of_document = {document: row for row, document in enumerate(chosen["id"])}
        if lost := listed - row_of_document.keys():
            raise UserError(f"The corpus lacks documents that are listed for reranking: {', '.join(sorted(lost)[:3])}.")
        documents_ND = torch.cat([self._document_vectors(chosen, block) for block in blocks(len(chosen))])
        pairs = sorted(zip(self._row_of_query, self._names, strict=True), key=lambda pair: pair[0])
        candidates = ((row, query, top_ranked[query]) for row, query in pairs if top_ranked.get(query))
        queries_QD = self._encode(self._unique, "query")
        documents_ND = documents_ND.to(queries_QD.device)
        results.update(rerank(queries_QD, documents_ND, self._similarity, candidates, row_of_document, k))
        return results

    def _document_vectors(self, rows: Dataset, block: range) -> Tensor:
        # As rows in memory: datasets keeps what is computed from rows on disk in another file on disk.
        return self._encode(Dataset.from_dict(rows[block.start : block.stop]), "document")

    def _encode(self, rows: Dataset, side: TextSide) -> Tensor:
        """Float32 vectors, where the model computes now that it has; of one not known here, on a GPU, if any."""
        batches = batches_of(rows, self._metadata, side, self._batch_size)
        vectors = self._encoder.encode(batches, prompt_type=prompt_type_of(side), **self._how)
        model = getattr(self._encoder, "model", None)
        device = next(model.parameters()).device if isinstance(model, nn.Module) else default_device()
        return torch.as_tensor(vectors).to(device, torch.float32)

    def _similarity(self, queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
        return torch.as_tensor(self._encoder.similarity(queries_QD, documents_ND))
