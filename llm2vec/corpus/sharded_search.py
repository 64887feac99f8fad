"""Queries against a corpus of rows (`id`, `text`, ...): encoding block by block, searching, naming what was found.

Says to `search`, which knows vectors only, what the rows are. Knows no mteb: the adapter brings the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from datasets import Dataset
from torch import Tensor

from llm2vec.corpus.search import Similarity, blocks, from_keys, rerank, top_k
from llm2vec.files import json_hash
from llm2vec.types import UserError

Side = Literal["query", "document"]
Results = dict[str, dict[str, float]]


class CorpusSearch:
    """One search: its queries and its corpus. Equal queries are encoded and scored once.

    Args:
        place: Split and subset, so that a task's searches have different names.
        queries: Rows with `id`.
        query_texts: What the encoder reads of each query; by it, queries are equal or not.
        corpus: Rows with `id`.
        encode: Float32 vectors of rows, given their side.
        similarity: Scores [Q, N] of vectors.
    """

    def __init__(
        self,
        place: str,
        queries: Dataset,
        query_texts: list[str],
        corpus: Dataset,
        encode: Callable[[Dataset, Side], Tensor],
        similarity: Similarity,
    ) -> None:
        first_of_text: dict[str, int] = {}
        for position, text in enumerate(query_texts):
            first_of_text.setdefault(text, position)
        row_of_text = {text: row for row, text in enumerate(first_of_text)}
        self._names: list[str] = list(queries["id"])
        self._row_of_query = [row_of_text[text] for text in query_texts]
        self.corpus, self.encode, self.similarity = corpus, encode, similarity
        self._unique = queries.select(list(first_of_text.values()))
        #: Another one where hits would be others, as far as the queries' texts and the size of the corpus can tell.
        self.name = f"{place}/{len(corpus)}/{json_hash(list(first_of_text))}"

    def keys(self, k: int, shard: int = 0, num_shards: int = 1) -> Tensor:
        """Keys of the best k documents of one shard of the corpus, a row for each different query."""
        vectors_QD = self._query_vectors()
        ranges = blocks(len(self.corpus), shard, num_shards)
        documents = ((block.start, self._document_vectors(self.corpus, block)) for block in ranges)
        return top_k(vectors_QD, documents, self.similarity, k).cpu()

    def results(self, keys: Tensor) -> Results:
        """Query -> document -> score, of keys."""
        scores, numbers = (part.tolist() for part in from_keys(keys))
        found = sorted({number for row in numbers for number in row if number >= 0})
        # Only what was found is named: the names of all documents would grow with the corpus.
        names = dict(zip(found, self.corpus.select_columns("id")[found]["id"], strict=True))
        return {
            query: {names[n]: score for n, score in zip(numbers[row], scores[row], strict=True) if n >= 0}
            for query, row in zip(self._names, self._row_of_query, strict=True)
        }

    def rerank(self, top_ranked: Mapping[str, list[str]], k: int) -> Results:
        """Query -> document -> score, of the documents listed for each query; the vectors of all those are held.

        Raises:
            UserError: A listed document is not in the corpus.
        """
        listed = {document for query in self._names for document in top_ranked.get(query, ())}
        chosen = self.corpus.select([row for row, document in enumerate(self.corpus["id"]) if document in listed])
        results: Results = {query: {} for query in self._names}
        if not listed:
            return results
        row_of_document = {document: row for row, document in enumerate(chosen["id"])}
        if lost := listed - row_of_document.keys():
            raise UserError(f"The corpus lacks documents that are listed for reranking: {', '.join(sorted(lost)[:3])}.")
        documents_ND = torch.cat([self._document_vectors(chosen, block) for block in blocks(len(chosen))])
        pairs = sorted(zip(self._row_of_query, self._names, strict=True), key=lambda pair: pair[0])
        candidates = ((row, query, top_ranked[query]) for row, query in pairs if top_ranked.get(query))
        queries_QD = self._query_vectors()
        documents_ND = documents_ND.to(queries_QD.device)
        results.update(rerank(queries_QD, documents_ND, self.similarity, candidates, row_of_document, k))
        return results

    def _query_vectors(self) -> Tensor:
        vectors_QD = self.encode(self._unique, "query")
        return vectors_QD.cuda() if torch.cuda.is_available() else vectors_QD

    def _document_vectors(self, rows: Dataset, block: range) -> Tensor:
        # As rows in memory: datasets keeps what is computed from rows on disk in another file on disk.
        return self.encode(Dataset.from_dict(rows[block.start : block.stop]), "document")
