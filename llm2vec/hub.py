"""Files of local folders and of the hub's repositories: one way to find them, with or without a network."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]  # public, and not in its __all__

from llm2vec.types import UserError, first_line

logger = logging.getLogger(__name__)

#: Seconds in which the hub must answer, tried twice, where nobody waits for it.
SECONDS_FOR_THE_HUB = 5.0

#: Whether the hub has still to be asked if it is there.
_asks_first: ContextVar[bool] = ContextVar("_asks_first", default=False)


def find_file(path: str, name: str, revision: str | None = None) -> str | None:
    """A file of a folder or hub repository; None where it has none of that name, or the hub is out of reach.

    Args:
        path: folder or hub name.
        name: of the file.
        revision: of the repository; None = its newest.

    Raises:
        UserError: `path` is neither a folder nor a possible name of a repository.
    """
    if (folder := local_folder(path)) is not None:
        return str(folder / name) if (folder / name).is_file() else None
    if _asks_first.get():
        _asks_first.set(False)
        _go_offline_if_the_hub_is_silent()
    from transformers.utils.hub import cached_file  # half a second to import

    try:
        found: str | None = cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise UserError(f"{path!r} is neither a folder nor the name of a repository on the hub.") from error
    return found


@contextmanager
def without_waiting_for_the_hub() -> Iterator[None]:
    """While it lasts, a hub that is out of reach counts as offline (`HF_HUB_OFFLINE`), with a warning.

    The hub's client tries for half a minute for each file. That suits a run that loads a model, but not a command that
    looks at names. Here the hub is asked once whether it is there: when the first name comes up that is no folder's.
    """
    was_offline, outside = constants.HF_HUB_OFFLINE, _asks_first.set(not constants.HF_HUB_OFFLINE)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        _asks_first.reset(outside)


def _go_offline_if_the_hub_is_silent() -> None:
    try:
        http_backoff("HEAD", constants.ENDPOINT, max_retries=1, retry_on_status_codes=(), timeout=SECONDS_FOR_THE_HUB)
    except Exception as error:  # no route, no such host, a proxy's refusal, a timeout: the client has a type for each
        constants.HF_HUB_OFFLINE = True
        reason = first_line(error)
        logger.warning("%s does not answer (%s); only folders and cached files are found", constants.ENDPOINT, reason)


def local_folder(path: str) -> Path | None:
    """`path` as a folder on this machine, or None where it is a hub name."""
    return Path(path) if Path(path).is_dir() else None
