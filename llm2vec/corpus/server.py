"""A request to a server with OpenAI's interface, such as vLLM's or llama.cpp's."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable
from typing import Any

from llm2vec.files import parse_object
from llm2vec.types import UserError, first_line

#: Seconds that a server may take to answer.
SECONDS_TO_ANSWER = 120.0


def request_json(place: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Any]) -> Any:
    """What a server answers; OPENAI_API_KEY is sent, if it is set.

    Args:
        place: the address.
        body: what is asked, as JSON.
        read: takes what is wanted out of the answer.

    Raises:
        UserError: it does not answer, or otherwise than `read` expects.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(place, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as answer:
            content = answer.read()
    except (OSError, ValueError) as error:  # no such host, a refusal, a timeout; no possible address
        raise UserError(f"{place} does not answer ({first_line(error)}).") from error
    try:
        return read(parse_object(content, place))
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{place}: the answer is not of the form that OpenAI's interface has.") from error
