"""A client of OpenAI-compatible embedding servers (vLLM, text-embeddings-inference, llama.cpp): vectors and token ids.

EmbeddingServer("http://localhost:8000").vectors(["who wrote Emma?"])
EmbeddingServer("http://localhost:8000#name-of-the-model")    # for a server that serves several
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor, tensor

from llm2vec.corpus.server import Refusal, answer_of
from llm2vec.types import UserError

#: Answers that are about the text and not about the request: it is too long, or empty.
_REFUSALS = (400, 413, 422)


class EmbeddingServer:
    """A server's `/v1/embeddings`, and its `/tokenize` where it has one.

    The address is its base URL, with or without `/v1` or `/v1/embeddings`; behind a `#`, the name of the model. A
    `UserError` where it is no address, or the server serves several models and none was named.
    """

    def __init__(self, address: str) -> None:
        try:
            parts = urlsplit(address)
        except ValueError as error:  # a bracket of an IPv6 address is missing
            raise UserError(f"{address} is no address of a server ({error}).") from None
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{address} is no address of a server; it begins with http:// or https:// and a host.")
        url = address.partition("#")[0].rstrip("/")
        self.url = url.removesuffix("/embeddings").removesuffix("/v1").rstrip("/")
        self.model = parts.fragment or self._only_model()

    def vectors(self, texts: Sequence[str]) -> tuple[dict[int, Tensor], dict[int, str]]:
        """By index of the text: its vector, float32 [D]; and for the others, why the server refuses them. One request a
        text. A `UserError` where the server does not answer, answers something else, or refuses every text."""
        vectors: dict[int, Tensor] = {}
        refused: dict[int, str] = {}
        for i, text in enumerate(texts):
            body = {"model": self.model, "input": [text], "encoding_format": "float"}
            try:
                vectors[i] = self._vector(answer_of(f"{self.url}/v1/embeddings", body))
            except Refusal as error:
                if error.code not in _REFUSALS:
                    raise
                refused[i] = error.said
        if not vectors:
            raise UserError(f"{self.url} refuses every text: {refused[0]}")
        if len(sizes := sorted({len(vector) for vector in vectors.values()})) > 1:
            raise UserError(f"{self.url} answers with vectors of {' and of '.join(map(str, sizes))} numbers.")
        return vectors, refused

    def token_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Token ids of texts, special ones included, uncut; None where the server does not show them."""
        for key in ("prompt", "inputs"):  # vLLM, text-embeddings-inference
            try:
                bodies = [{"model": self.model, key: text} for text in texts]
                answers = [answer_of(f"{self.url}/tokenize", body) for body in bodies]
                if key == "prompt":
                    return [[int(token) for token in answer["tokens"]] for answer in answers]
                return [[int(token["id"]) for token in answer[0]] for answer in answers]
            except (UserError, KeyError, TypeError, ValueError, IndexError):
                continue
        return None

    def _only_model(self) -> str:
        """The name of the one model that the server lists; any name will do for a server without a list."""
        try:
            names = [str(entry["id"]) for entry in answer_of(f"{self.url}/v1/models")["data"]] or ["model"]
        except (UserError, KeyError, TypeError):
            return "model"
        if len(names) > 1:
            raise UserError(f"{self.url} serves {', '.join(names)}; write the one that is meant as {self.url}#NAME.")
        return names[0]

    def _vector(self, answer: Any) -> Tensor:
        try:
            (entry,) = answer["data"]
            numbers = [float(number) for number in entry["embedding"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.url}/v1/embeddings answers without data[0].embedding as a list of numbers; it is no "
                "OpenAI-compatible embedding server."
            ) from None
        if not numbers or not all(map(math.isfinite, numbers)):
            raise UserError(f"{self.url}/v1/embeddings answers with a vector that is empty or not finite.")
        return tensor(numbers)
