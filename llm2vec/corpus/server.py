"""A request to a server with OpenAI's interface, such as vLLM's, text-embeddings-inference's or llama.cpp's."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from llm2vec.types import UserError

#: Seconds that a server may take to answer; the first request may have to wait for it to compile.
SECONDS_TO_ANSWER = 120.0
#: Seconds before a busy server is asked again, each time, where it names none; and the most that it may name.
SECONDS_TO_WAIT, MOST_SECONDS_TO_WAIT = (1, 5, 20), 60


class Refusal(UserError):
    """A server's answer that is an HTTP error: its `code`, what is `said`, and the seconds to wait that it names."""

    def __init__(self, place: str, code: int, text: bytes, retry_after: str = "") -> None:
        self.code = code
        self.seconds = min(int(retry_after), MOST_SECONDS_TO_WAIT) if retry_after.isdecimal() else None
        self.said = f"HTTP {code} {' '.join(text.decode('utf-8', 'replace').split())[:200]}".strip()
        super().__init__(f"{place} answers {self.said}")


class TimeIsUp(UserError):
    """A server that does not answer in time."""


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
        raise Refusal(place, error.code, error.read(), error.headers.get("Retry-After") or "") from None
    except (OSError, HTTPException, ValueError) as error:  # no such host, a timeout, cut short; no possible address
        reason = getattr(error, "reason", None) or error
        kind = TimeIsUp if isinstance(reason, TimeoutError) else UserError
        raise kind(f"{place} does not answer ({reason}).") from None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{place} does not answer in JSON.") from None


def request_json(place: str, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
    """What `read` takes out of a server's answer, to which OPENAI_API_KEY is sent, if it is set; a `UserError` too
    where the answer has another form than it expects. A server that is busy (HTTP 429, 5xx), or late, is asked
    again a few times."""
    waits = list(SECONDS_TO_WAIT)
    try:
        while True:
            try:
                return read(answer_of(place, body, os.environ.get("OPENAI_API_KEY")))
            except (Refusal, TimeIsUp) as error:
                is_busy = not isinstance(error, Refusal) or error.code == 429 or error.code >= 500
                if not waits or not is_busy:
                    raise
                named, seconds = getattr(error, "seconds", None), waits.pop(0)
                time.sleep(seconds if named is None else named)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{place}: the answer is not of the form that OpenAI's interface has.") from error
