"""What scores the documents of a corpus for queries, block by block: BM25, our models, sentence-transformers models.

What a retriever needs of the documents it keeps in files of the folder that it is given. So the corpus may be larger
than the memory, and what a killed start has finished is not made again.
"""

from __future__ import annotations

import logging
import shutil
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
from llm2vec.files import whole
from llm2vec.hub import find_file
from llm2vec.model.settings import SETTINGS_FILE
from llm2vec.model.vault import MODULES_FILE, folder_at, weights_of
from llm2vec.types import TextSide, UserError, first_line

#: The name of BM25, where others are names of models.
BM25 = "bm25"

#: Vectors [texts, D] of texts under an instruction; the last argument says whether they are queries.
Encode = Callable[[list[str], Instruction, bool], Tensor]


class Retriever(Protocol):
    """Scores of documents for queries; whoever scores higher is nearer.

    Attributes:
        revision: another one where the scores would be others.
    """

    revision: str

    def prepare(self, documents: Any, instruction: Instruction, folder: Path) -> None:
        """Make what is needed of all documents, a `datasets.Dataset` with `text`, as far as it is not there yet."""
        ...

    def scores(self, queries: list[str], instruction: Instruction, folder: Path) -> Iterator[tuple[int, Tensor]]:
        """The number of each block's first document, and the scores [Q, documents of the block]."""
        ...


def open_retriever(choice: ModelChoice) -> Retriever:
    """The retriever of a name: `bm25`, or a model's.

    Raises:
        UserError: it cannot be opened.
    """
    if choice.base == BM25:
        return LexicalRetriever()
    if find_file(choice.base, SETTINGS_FILE) is None and find_file(choice.base, MODULES_FILE) is not None:
        return DenseRetriever(*_sentence_transformer(choice.base))
    model = choice.load()

    def encode(texts: list[str], instruction: Instruction, is_query: bool) -> Tensor:
        alike = is_query or instruction.symmetric
        entries: Any = [[instruction.text, text] for text in texts] if alike and instruction.text else texts
        side: TextSide = "query" if alike else "document"
        return model.encode(entries, show_progress_bar=False, convert_to_tensor=True, side=side)  # type: ignore[return-value]

    return DenseRetriever(encode, choice.revision())


def _sentence_transformer(path: str) -> tuple[Encode, str]:
    """It reads queries and documents with prompts of its own."""
    from llm2vec.model.backbone import open_sentence_transformer
    from llm2vec.model.chain import revision_of

    try:
        model = open_sentence_transformer(path)
    except UserError:
        raise
    except Exception as error:  # damaged files: what stock libraries raise for them has no common type
        raise UserError(f"sentence-transformers cannot load {path}: {first_line(error)}") from error

    def encode(texts: list[str], instruction: Instruction, is_query: bool) -> Tensor:
        encode_side = model.encode_query if is_query else model.encode_document
        return encode_side(texts, show_progress_bar=False, convert_to_tensor=True)

    return encode, revision_of(path)


def open_reranker(path: str) -> tuple[Callable[[list[tuple[str, str]]], list[float]], str]:
    """What scores pairs of a query and a document, by a `CrossEncoder` or a server; and its revision.

    Args:
        path: folder or hub name; or an address up to `/v1`, `#` and the model's name there.

    Raises:
        UserError: it cannot be loaded, has no safetensors weights, or an address names no model.
    """
    if path.startswith(("http://", "https://")):
        return _reranking_server(path), path
    from llm2vec.model.chain import revision_of

    folder = folder_at(path)
    weights_of(folder)
    try:
        from sentence_transformers import CrossEncoder  # seconds to import, and an extra

        options = {"use_safetensors": True}
        model = CrossEncoder(path, revision=folder.commit, trust_remote_code=False, model_kwargs=options)
    except ImportError as error:
        raise UserError('a reranker needs sentence-transformers: pip install -e ".[eval]".') from error
    except Exception as error:  # damaged files: what stock libraries raise for them has no common type
        raise UserError(f"sentence-transformers cannot load {path}: {first_line(error)}") from error

    def rescore(pairs: list[tuple[str, str]]) -> list[float]:
        scores: list[float] = model.predict(pairs, show_progress_bar=False).tolist()
        return scores

    return rescore, revision_of(path)


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
    """Cosines of a model's vectors; those of `BLOCK` documents lie in a file.

    Args:
        encode: makes the vectors.
        revision: of the model.
    """

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
        return normalize(self._encode(list(texts), instruction, is_query).float(), dim=-1)


class LexicalRetriever:
    """BM25 (Lucene's form, k1 1.5, b 0.75) over words in lower case, without stemming or stop words of a language."""

    revision = "bm25s, lucene, k1 1.5, b 0.75"

    def __init__(self) -> None:
        self._opened: tuple[Path, Any] | None = None

    def prepare(self, documents: Any, instruction: Instruction, folder: Path) -> None:
        """Index the documents, if they are not."""
        bm25s = _bm25s()
        if (folder / "index").is_dir():
            return
        aside = folder / "index.writing"
        shutil.rmtree(aside, ignore_errors=True)
        index = bm25s.BM25()
        tokens = bm25s.tokenize(list(documents["text"]), stopwords=None, show_progress=False)
        index.index(tokens, show_progress=False)
        index.save(aside)
        aside.rename(folder / "index")

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
    try:
        import bm25s  # an extra
    except ImportError as error:
        raise UserError('BM25 needs bm25s: pip install -e ".[quickstart]".') from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index
    return bm25s
