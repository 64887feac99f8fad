"""What scores the documents of a corpus for queries, block by block: BM25, models, or, as a control, chance.

What a retriever needs of the documents it keeps in files of the folder that it is given. So the corpus may be larger
than the memory, and what a killed start has finished is not made again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llm2vec.choice import ModelChoice
from llm2vec.corpus.search import BLOCK
from llm2vec.corpus.server import request_json
from llm2vec.data.sources import Instruction
from llm2vec.files import json_hash, whole, whole_folder
from llm2vec.hub import find_file
from llm2vec.model.settings import SETTINGS_FILE
from llm2vec.model.vault import MODULES_FILE, folder_at, weights_of
from llm2vec.types import TextSide, UserError, in_one_sentence, needs_extra

#: The names of BM25 and of chance, where others are names of models.
BM25, RANDOM = "bm25", "random"
#: Texts whose vectors a rescoring embedder holds at most.
MOST_HELD = 50_000

#: Vectors [texts, D] of texts with an instruction before each (empty = none), as texts of a side.
Encode = Callable[[list[str], str, TextSide], Tensor]


class Retriever(Protocol):
    """Scores of documents for queries; whoever scores higher is nearer."""

    revision: str  #: another one where the scores would be others
    floor: float  #: a document that scores no more has nothing of the query

    def prepare(self, documents: Any, instruction: Instruction, folder: Path) -> None:
        """Make what is needed of all documents, a `datasets.Dataset` with `text`, as far as it is not there yet."""
        ...

    def scores(self, queries: list[str], instruction: Instruction, folder: Path) -> Iterator[tuple[int, Tensor]]:
        """The number of each block's first document, and the scores [Q, documents of the block]."""
        ...


def open_retriever(choice: ModelChoice) -> Retriever:
    """The retriever of a name: `bm25`, `random`, or a model's; a `UserError` where it cannot be opened."""
    if choice.base in (BM25, RANDOM):
        return LexicalRetriever() if choice.base == BM25 else RandomRetriever()
    return DenseRetriever(encoder_of(choice), choice.revision())


def is_foreign(choice: ModelChoice) -> bool:
    """Whether only sentence-transformers knows how a model makes its vectors."""
    there = find_file(choice.base, SETTINGS_FILE), find_file(choice.base, MODULES_FILE)
    return not choice.adapters and there[0] is None and there[1] is not None


def encoder_of(choice: ModelChoice, batch_size: int = 32) -> Encode:
    """What makes a model's vectors, in the weights' dtype; one that `is_foreign` puts prompts of its own before queries
    and documents, and no instruction. A `UserError` where it cannot be loaded."""
    if not is_foreign(choice):
        ours = choice.load()

        def encode(texts: list[str], instruction: str, side: TextSide) -> Tensor:
            entries: Any = [[instruction, text] for text in texts] if instruction else texts
            return ours.encode(entries, batch_size, show_progress_bar=False, convert_to_tensor=True, side=side)  # type: ignore[return-value]

        return encode
    from llm2vec.model.backbone import open_sentence_transformer

    model = open_sentence_transformer(choice.base, dtype=choice.torch_dtype)
    of_side = {"query": model.encode_query, "document": model.encode_document}
    how: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False, "convert_to_tensor": True}
    return lambda texts, _, side: of_side[side](texts, **how)


def open_reranker(path: str) -> tuple[Callable[[list[tuple[str, str]]], list[float]], str]:
    """What scores pairs of a query and a document: a `CrossEncoder`, a server, or the cosines of a stronger embedder of
    sentence-transformers; and its revision.

    `path` is a folder or hub name, or an address up to `/v1`, `#` and the model's name there. A `UserError` where it
    cannot be loaded, has no safetensors weights, or an address names no model.
    """
    if path.startswith(("http://", "https://")):
        return _reranking_server(path), path
    from llm2vec.model.chain import revision_of

    folder = folder_at(path)
    if folder.config is None:
        raise UserError(f"--rerank: there is no model {path}: no folder or hub repository with a config.json.")
    weights_of(folder)
    if (modules := find_file(path, MODULES_FILE)) is not None and b"Pooling" in Path(modules).read_bytes():
        return _cosines(encoder_of(ModelChoice(path))), revision_of(path)
    with needs_extra("a reranker needs sentence-transformers", "eval"):
        from sentence_transformers import CrossEncoder  # seconds to import
    options = {"use_safetensors": True}
    with in_one_sentence(lambda why: f"sentence-transformers cannot load {path}: {why}"):  # damaged files
        model = CrossEncoder(path, revision=folder.commit, trust_remote_code=False, model_kwargs=options)
    if model.num_labels != 1:
        raise UserError(f"--rerank: {path} gives a pair {model.num_labels} scores, one a label; a reranker gives one.")

    def rescore(pairs: list[tuple[str, str]]) -> list[float]:
        scores: list[float] = model.predict(pairs, show_progress_bar=False).tolist()
        return scores

    return rescore, revision_of(path)


def _cosines(encode: Encode) -> Callable[[list[tuple[str, str]]], list[float]]:
    """Of pairs, by an embedder; a document that many queries name is encoded once."""
    held: dict[str, Tensor] = {}

    def rescore(pairs: list[tuple[str, str]]) -> list[float]:
        if len(held) > MOST_HELD:
            held.clear()
        queries, new = ([*dict.fromkeys(texts)] for texts in zip(*pairs, strict=True))
        if new := [text for text in new if text not in held]:
            held.update(zip(new, normalize(encode(new, "", "document").float(), dim=-1), strict=True))
        vectors = dict(zip(queries, normalize(encode(queries, "", "query").float(), dim=-1), strict=True))
        # What is encoded together decides the last digits, and after a killed start that is something else.
        return [round(float(vectors[query] @ held[document]), 4) for query, document in pairs]

    return rescore


def _reranking_server(address: str) -> Callable[[list[tuple[str, str]]], list[float]]:
    url, _, model = address.partition("#")
    if not model:
        raise UserError(f"--rerank: {address} names no model; write ADDRESS/v1#MODEL.")

    def rescore(pairs: list[tuple[str, str]]) -> list[float]:
        def read(answer: dict[str, Any]) -> list[float]:
            found = {result["index"]: float(result["relevance_score"]) for result in answer["results"]}
            return [found[i] for i in range(len(pairs))]

        body = {"model": model, "query": pairs[0][0], "documents": [text for _, text in pairs]}
        scores: list[float] = request_json(f"{url.rstrip('/')}/rerank", body, read)
        return scores

    return rescore


class DenseRetriever:
    """Cosines of the vectors that a model of a `revision` makes; those of `BLOCK` documents lie in a file. The texts of
    a symmetric instruction are all queries."""

    floor = -math.inf

    def __init__(self, encode: Encode, revision: str) -> None:
        self.revision = revision
        self._encode = encode

    def prepare(self, documents: Any, instruction: Instruction, folder: Path) -> None:
        """Encode the blocks that are not there."""
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(documents), BLOCK):
            file = folder / f"vectors-{first:010d}.npy"
            if file.is_file():
                continue
            vectors_ND = self._unit(documents[first : first + BLOCK]["text"], instruction, False)
            with whole(file) as aside, aside.open("wb") as out:
                np.save(out, vectors_ND.cpu().numpy())

    def scores(self, queries: list[str], instruction: Instruction, folder: Path) -> Iterator[tuple[int, Tensor]]:
        """Cosines."""
        vectors_QD, first = self._unit(queries, instruction, True), 0
        for file in sorted(folder.glob("vectors-*.npy")):
            block_ND = torch.from_numpy(np.load(file)).to(vectors_QD.device)
            yield first, vectors_QD @ block_ND.T
            first += len(block_ND)

    def _unit(self, texts: Sequence[str], instruction: Instruction, is_query: bool) -> Tensor:
        side: TextSide = "query" if is_query or instruction.symmetric else "document"
        before = instruction.text if side == "query" else ""
        return normalize(self._encode(list(texts), before, side).float(), dim=-1)


class RandomRetriever:
    """Scores by chance, the same for the same query: the negatives that others are held against."""

    revision, floor = "random, PCG64", -math.inf

    def prepare(self, documents: Any, instruction: Instruction, folder: Path) -> None:
        """Note how many documents there are."""
        self._num_documents = len(documents)

    def scores(self, queries: list[str], instruction: Instruction, folder: Path) -> Iterator[tuple[int, Tensor]]:
        """Uniform in [0, 1)."""
        drawn = [np.random.default_rng(int(json_hash(q), 16)).random(self._num_documents, np.float32) for q in queries]
        scores_QN = torch.from_numpy(np.stack(drawn))
        for first in range(0, self._num_documents, BLOCK):
            yield first, scores_QN[:, first : first + BLOCK]


class LexicalRetriever:
    """BM25 (Lucene's form, k1 1.5, b 0.75) over words in lower case, without stemming or stop words of a language."""

    revision, floor = "bm25s, lucene, k1 1.5, b 0.75", 0.0

    def __init__(self) -> None:
        self._opened: tuple[Path, Any] | None = None

    def prepare(self, documents: Any, instruction: Instruction, folder: Path) -> None:
        """Index the documents, if they are not."""
        bm25s = _bm25s()
        if (folder / "index").is_dir():
            return
        index = bm25s.BM25()
        tokens = bm25s.tokenize(list(documents["text"]), stopwords=None, show_progress=False)
        index.index(tokens, show_progress=False)
        with whole_folder(folder / "index") as aside:
            index.save(aside)

    def scores(self, queries: list[str], instruction: Instruction, folder: Path) -> Iterator[tuple[int, Tensor]]:
        """BM25 of the documents, in blocks of as many as others have."""
        bm25s = _bm25s()
        if self._opened is None or self._opened[0] != folder:
            self._opened = folder, bm25s.BM25.load(folder / "index", mmap=True, load_vocab=True)
        index = self._opened[1]
        words = bm25s.tokenize(queries, stopwords=None, return_ids=False, show_progress=False)
        known = [[word for word in of_query if word in index.vocab_dict] for of_query in words]
        num_documents = index.scores["num_docs"]
        found = [index.get_scores(of_query) if of_query else np.zeros(num_documents, np.float32) for of_query in known]
        scores_QN = torch.from_numpy(np.stack(found))
        for first in range(0, num_documents, BLOCK):  # what is made of scores takes several times their memory
            yield first, scores_QN[:, first : first + BLOCK]


def _bm25s() -> Any:
    with needs_extra("BM25 needs bm25s", "quickstart"):
        import bm25s
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index
    return bm25s
