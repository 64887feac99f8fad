"""Files of local folders and of the hub's repositories: one way to find them, with or without a network."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import constants
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]  # public, and not in its __all__

from llm2vec.types import UserError, first_line, in_one_sentence

logger = logging.getLogger(__name__)

#: Seconds in which the hub must answer, tried twice, where nobody waits for it.
SECONDS_FOR_THE_HUB = 5.0

#: What `asking_with` was given, for all who ask the hub meanwhile.
HUB_CLIENT: ContextVar[dict[str, Any]] = ContextVar("HUB_CLIENT", default={})  # noqa: B039  # nobody changes it

#: Whether the hub has still to be asked if it is there.
_asks_first: ContextVar[bool] = ContextVar("_asks_first", default=False)


def find_file(path: str, name: str, revision: str | None = None) -> str | None:
    """A file of a folder or hub repository, of its newest revision or the one given; None where it has none of that
    name, or the hub is out of reach. A `path` that can name neither is a `UserError`."""
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
            **HUB_CLIENT.get(),
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


# --- what callers of transformers say of the hub, and of loading ---


class LoadingKeywords(TypedDict, total=False):
    """Keywords of transformers that `LLM2Vec.from_pretrained` takes, too: of the hub, of weights, without effect."""

    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    revision: str | None  #: of the first argument
    quantization_config: Any  #: of bitsandbytes
    max_memory: Mapping[Any, Any] | None  #: with a device map
    offload_folder: str | Path | None
    low_cpu_mem_usage: bool | None
    use_cache: bool | None
    use_safetensors: bool | None
    trust_remote_code: bool | None


_OF_CLIENT = ("token", "cache_dir", "local_files_only")
_OF_WEIGHTS = ("quantization_config", "max_memory", "offload_folder")
#: Quantisation that loads without kernels from the hub.
QUANTISATION = ("bitsandbytes",)
#: Keywords without effect, and why they have none.
_WITHOUT_EFFECT = (
    ("low_cpu_mem_usage", "transformers always does so"),
    ("use_cache", "embedding reads no cache"),
    ("use_safetensors", "nothing else than safetensors is opened"),
    ("trust_remote_code", "the repository's own code is not needed and is not run"),
)
#: What took the place of keywords that were in use once.
_NOW = {
    "load_in_8bit": "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "load_in_4bit": "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
    "use_auth_token": "token",
}


def read_keywords(given: Mapping[str, Any], beside: Collection[str]) -> dict[str, Any]:
    """Those of a caller's further keywords that go to transformers with a model's weights; what has no effect is said.

    A TypeError where there is no such keyword, with the nearest, also among those `beside` it that the caller has
    anyway; a `UserError` where `quantization_config` is of another library than bitsandbytes.
    """
    for name in given.keys() - LoadingKeywords.__annotations__.keys():
        near = difflib.get_close_matches(name, [*beside, *LoadingKeywords.__annotations__], n=1)
        instead = f"; write {_NOW[name]}" if name in _NOW else f"; the nearest is {near[0]!r}" if near else ""
        raise TypeError(f"from_pretrained() has no argument {name!r}{instead}.")
    for name, reason in _WITHOUT_EFFECT:
        if given.get(name) is not None:
            logger.warning("%s has no effect: %s", name, reason)
    quantised: Any = given.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if quantised is not None and method not in QUANTISATION:
        raise UserError(f"quantization_config is of {method!r}; allowed: {', '.join(QUANTISATION)}.")
    return {name: given[name] for name in _OF_WEIGHTS if given.get(name) is not None}


@contextmanager
def asking_with(given: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts, `token`, `cache_dir` and `local_files_only` of `given` hold for all that is asked of the hub."""
    before = HUB_CLIENT.set({name: given[name] for name in _OF_CLIENT if given.get(name) is not None})
    try:
        yield
    finally:
        HUB_CLIENT.reset(before)


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder to the hub, making the repository, a `private` one or not, if it is not there; returns its
    address. A `UserError` where the hub refuses, or is out of reach."""
    from huggingface_hub import HfApi  # a second to import

    api = HfApi()
    # Not logged in, no such organisation, no connection: each raises a type of its own.
    with in_one_sentence(lambda why: f"the model could not be uploaded to {repository}: {why}"):
        address = api.create_repo(repository, exist_ok=True, private=private)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload exported embedder")
    return str(address)
