"""Exact top-k search over a corpus that streams by in blocks of vectors.

Order of hits: the higher score first; among equal scores the earlier document of the corpus.

A hit is one int64 number, its key: the score's bits, made to sort as integers, above the document's number counted
down. No two hits of a query have the same key, so their top k has one answer only, in whatever order blocks are seen
and parts are merged. The blocks are fixed by the corpus alone, so that a document's batch, hence every bit of its
vector, does not depend on how many processes share the work.

    Q queries, N documents of a block, K hits kept, D dimensions
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llm2vec.types import UserError

#: Documents encoded at a time.
BLOCK = 4096
#: Queries scored against a block at a time: bounds the memory, whatever the number of queries.
QUERIES_AT_ONCE = 1024
#: Below every key of a hit: the place is free.
FREE = torch.iinfo(torch.int64).min
#: Documents a key can tell apart.
MAX_DOCUMENTS = 2**32

#: Scores [Q, N] of queries and documents.
Similarity = Callable[[Tensor, Tensor], Tensor]


def blocks(num_documents: int, shard: int = 0, num_shards: int = 1) -> list[range]:
    """The blocks, as ranges of document numbers, of a corpus that one of several shards, from 0, holds. Shards are
    equal to a block and in corpus order; those beyond the number of blocks are empty."""
    every = [range(first, min(first + BLOCK, num_documents)) for first in range(0, num_documents, BLOCK)]
    return every[len(every) * shard // num_shards : len(every) * (shard + 1) // num_shards]


def top_k(queries_QD: Tensor, documents: Iterable[tuple[int, Tensor]], similarity: Similarity, k: int) -> Tensor:
    """Keys [Q, K] of the best documents, best first; `FREE` where there are fewer. A score that is no number is a
    `UserError`.

    The documents come in blocks, each the number of its first and the vectors [N, D] of all. The work is done on the
    queries' device, and memory holds the queries, one block and the hits so far.
    """
    keys_QK = torch.full((len(queries_QD), k), FREE, dtype=torch.int64, device=queries_QD.device)
    for first, vectors in documents:
        vectors_ND = vectors.to(queries_QD.device)
        for start in range(0, len(queries_QD), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            found = to_keys(similarity(queries_QD[rows], vectors_ND), first)
            keys_QK[rows] = merge([keys_QK[rows], found], k)
    return keys_QK


def merge(parts: Sequence[Tensor], k: int) -> Tensor:
    """The best k of several sets of keys [Q, any] over different documents, best first."""
    return torch.cat(list(parts), dim=1).topk(k, dim=1).values


def to_keys(scores_QN: Tensor, first_document: int) -> Tensor:
    """Keys of the scores of consecutive documents; a score that is no number is a `UserError`."""
    if torch.isnan(scores_QN).any():
        raise UserError("The model gives vectors whose similarity is not a number (NaN).")
    assert first_document + scores_QN.shape[1] <= MAX_DOCUMENTS
    bits = (scores_QN.float() + 0.0).view(torch.int32)  # adding 0.0 makes -0.0 and 0.0 equal
    # As integers, negative floats sort the wrong way round until all bits but the sign are flipped.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    numbers = torch.arange(first_document, first_document + scores_QN.shape[1], device=scores_QN.device)
    return (ordered << 32) | (MAX_DOCUMENTS - 1 - numbers)


def from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and document numbers of keys; the number is -1 where a place is free."""
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    numbers = MAX_DOCUMENTS - 1 - (keys & (MAX_DOCUMENTS - 1))
    return scores, torch.where(keys == FREE, -1, numbers)


def hits_of(keys: Tensor) -> list[list[tuple[int, float]]]:
    """Of each row of keys, its hits as document numbers and scores; free places are left out."""
    scores, numbers = (part.tolist() for part in from_keys(keys))
    rows = zip(numbers, scores, strict=True)
    return [[(number, score) for number, score in zip(*row, strict=True) if number >= 0] for row in rows]


def rerank(
    queries_QD: Tensor,
    documents_ND: Tensor,
    similarity: Similarity,
    candidates: Iterable[tuple[int, str, Sequence[str]]],
    row_of_document: Mapping[str, int],
    k: int,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Of each of the `candidates` (row of a query's vector, the query's name, its documents' names; sorted by row), the
    name and the scores of the k best documents, among equal ones those listed first; one that is no number is a
    `UserError`.

    Many queries may share one vector (MindSmallReranking: 2.36 million queries, 37 thousand texts): each vector is
    scored once. `row_of_document` says where a document's vector stands.
    """
    first, scores_QN, at, row = 0, torch.empty(0), -1, []
    for query_row, query, names in candidates:
        while query_row >= first + len(scores_QN):
            first += len(scores_QN)
            scores_QN = similarity(queries_QD[first : first + QUERIES_AT_ONCE], documents_ND)
            if torch.isnan(scores_QN).any():
                raise UserError("The model gives vectors whose similarity is not a number (NaN).")
        if query_row != at:
            at, row = query_row, scores_QN[query_row - first].tolist()
        kept = names if len(names) <= k else sorted(names, key=lambda name: -row[row_of_document[name]])[:k]
        yield query, {name: row[row_of_document[name]] for name in kept}
