"""A request to a server with OpenAI's interface, such as vLLM's, text-embeddings-inference's or llama.cpp's."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from llm2vec.types import UserError

#: Seconds that a server may take to answer; the first request may have to wait for it to compile.
SECONDS_TO_ANSWER = 120.0


class Refusal(UserError):
    """A server's answer that is an HTTP error: its `code`, and what is `said`."""

    def __init__(self, place: str, code: int, text: bytes) -> None:
        self.code = code
        self.said = f"HTTP {code} {' '.join(text.decode('utf-8', 'replace').split())[:200]}".strip()
        super().__init__(f"{place} answers {self.said}")


def answer_of(place: str, body: dict[str, Any] | None = None, key: str | None = None) -> Any:
    """What a server answers, parsed: to a `body` that is sent as JSON (POST), with its `key`, or to nothing (GET).

    A `Refusal` where it answers with an HTTP error, a `UserError` where it does not answer, or not in JSON.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        request = urllib.request.Request(place, None if body is None else json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as answer:
            content = answer.read()
    except HTTPError as error:
        raise Refusal(place, error.code, error.read()) from None
    except (OSError, HTTPException, ValueError) as error:  # no such host, a timeout, cut short; no possible address
        raise UserError(f"{place} does not answer ({getattr(error, 'reason', None) or error}).") from None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{place} does not answer in JSON.") from None


def request_json(place: str, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
    """What `read` takes out of a server's answer, to which OPENAI_API_KEY is sent, if it is set; a `UserError` too
    where the answer has another form than it expects."""
    try:
        return read(answer_of(place, body, os.environ.get("OPENAI_API_KEY")))
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{place}: the answer is not of the form that OpenAI's interface has.") from error
