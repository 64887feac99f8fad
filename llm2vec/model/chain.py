"""A model as a chain of folders: a base and the adapters on it, each opened once, and what tells them from others.

    chain = open_chain("output/stage_I", ["output/stage_II"])
    chain.settings           # what the outermost folder records of how texts become vectors
    chain.tokenizer_folder   # where the tokenizer lies
    chain.folders[0].run     # what the base's run.json says

Whoever needs more of a folder takes it from here, instead of opening the folder again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from llm2vec.files import ORIGIN_FILE, files_hash, read_object, sha256
from llm2vec.hub import HUB_CLIENT, find_file, local_folder
from llm2vec.model.vault import ADAPTER_FILE, ADAPTER_WEIGHTS, MODULES_FILE, Folder, folder_at
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

#: The class that a checkpoint's `modules.json` names: sentence-transformers of any version has none such, and says so.
NO_STOCK_MODEL = "sentence_transformers.model, as this is a checkpoint of llm2vec: make one of it by `llm2vec export`"

RUN_FILE = "run.json"
INCOMPLETE_MARKER = ".incomplete"
#: What `run.json` says of a run, as far as it is read again; `save_checkpoint` and `provenance` write it.
_RECORD = {
    "config?": {
        "training?": dict, "stage?": (str, None), "use_peft?": (bool, None), "dataset_name?": (str, None),
        "stop_after_n_steps?": (int, None),
    },
    "parent?": {"model_name_or_path?": str, "marks?": {str: str}},
    "data?": [{"source": str, "rows": int, "file": str, "sha256?": (str, None), "instructions?": [[(str, bool)]]}],
    "num_processes?": int, "step?": int, "versions?": {str: str}, "files?": {str: int}, "probe_ids?": [[int]],
    "parent_weights?": [(str, None)],
}  # fmt: skip
#: An export lists the runs behind it.
_RUN = {**_RECORD, "stages?": [_RECORD]}

#: Bytes at the end of a weights file that tell it from others of its size.
TAIL_BYTES = 1 << 20
#: Hexadecimal digits of a folder's mark; a commit on the hub has 40.
DIGITS_OF_A_MARK = 16
#: Files of tokenizers of other kinds than `tokenizer.json`, or that older libraries wrote beside it.
_OTHER_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.model")
#: What decides a checkpoint's vectors, besides the settings. Not run.json: its dates would change the hash.
CHECKPOINT_FILES = ("*.safetensors", "*config.json", "tokenizer*", *_OTHER_TOKENIZER_FILES)
#: The same for a sentence-transformers folder, at any depth (`1_Pooling/config.json`, `vocab.txt`).
MODULE_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")


# --- one folder ---


def open_folder(path: str, revision: str | None = None) -> Folder:
    """Open a folder or a repository on the hub, at a revision or its newest; its weights are not read. A `UserError`
    where a file of it is missing or has another size than when it was written, so that it was cut short while it was
    written or copied; or its `run.json` cannot be read."""
    folder = Path(path)
    run = read_run(folder)
    opened = folder_at(path, run, revision)
    if INCOMPLETE_MARKER in (opened.names or ()):
        raise UserError(f"{folder}: this checkpoint was cut short while it was written; use an earlier one.")
    for name, size in run.get("files", {}).items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "missing" if actual is None else f"{actual} bytes long instead of {size}"
            raise UserError(f"{folder}: this checkpoint was cut short, or changed since: {name} is {found}.")
    return opened


def read_run(folder: Path) -> dict[str, Any]:
    """What a folder's `run.json` says; empty where there is none. One that no run has written is a `UserError`."""
    if not (folder / RUN_FILE).is_file():
        return {}
    return read_object(folder / RUN_FILE, shape=_RUN)


def origin_of(base: Path) -> dict[str, Any]:
    """`{"origin": ...}`, where a base's weights are from, as its folder says or its own `run.json`; else empty."""
    found = read_object(base / ORIGIN_FILE) if (base / ORIGIN_FILE).is_file() else read_run(base).get("origin")
    return {} if found is None else {"origin": found}


# --- a chain of them ---


@dataclass(frozen=True)
class Chain:
    """A base model and the adapters that go on it, opened."""

    base: str  #: folder or hub name of the model
    adapters: tuple[str, ...]  #: folders or hub names, innermost first
    folders: tuple[Folder, ...]  #: of the base, then of each adapter
    tokenizer_folder: Folder  #: where the tokenizer lies: the outermost folder, or else the base

    @cached_property
    def outermost(self) -> Folder:
        """The last adapter's folder, or the base's: the model's own, above those that it was made from."""
        return self.folders[-1]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the outermost folder that has settings says of them, as `Folder.settings`; empty where none has."""
        return next((folder.settings for folder in reversed(self.folders) if folder.settings), {})


def open_chain(base: str, adapters: Sequence[str] = (), revision: str | None = None) -> Chain:
    """Open what is loaded: the true base, then every adapter in order.

    A `base` that is itself an adapter (upstream's `...-mntp` repositories, or a Stage II folder) goes first among the
    adapters, on the base that it records. An adapter that says on top of which others it was trained must find those
    below it, in that order. They are told by their weights where those are recorded, so that a folder may be moved and
    renamed; else by their folders' names.

    Both are folders or hub names, the adapters innermost first; `revision` is the base's, where it is a repository,
    None = the newest. A `UserError` where a folder was cut short or cannot be read; an adapter is its own base; or
    others lie below it than in training, which would give wrong embeddings and no other sign.
    """
    names, opened = list(adapters), {base: open_folder(base, revision)}
    while True:
        if base in names:
            raise UserError(f"{base}: an adapter cannot be its own base; put the two into folders of their own.")
        recorded = _recorded_base(opened[base])
        if recorded is None:
            break
        names = [*(opened[base].settings.get("parent_adapters") or ()), base, *names]
        base = recorded
        opened[base] = open_folder(base)
    for i, name in enumerate(names):
        if name not in opened:
            opened[name] = open_folder(name)
        _check_parents(opened[name], names[:i])
    if names:
        _warn_of_another_base(opened[names[0]], opened[base])
    outermost = opened[(base, *names)[-1]]
    try:
        tokenizer_folder = opened[base] if outermost.find("tokenizer_config.json") is None else outermost
    except UserError:  # no possible name of a repository: whoever loads it says so
        tokenizer_folder = opened[base]
    return Chain(base, tuple(names), tuple(opened[name] for name in (base, *names)), tokenizer_folder)


def _recorded_base(folder: Folder) -> str | None:
    """The base that an adapter folder records, or None where it is no adapter's."""
    if folder.adapter is None:
        return None
    recorded = folder.adapter.get("base_model_name_or_path")
    if not recorded:
        raise UserError(f"{folder.path}: {ADAPTER_FILE} names no base model; give the base and list this adapter.")
    return str(recorded)


def _check_parents(adapter: Folder, below: Sequence[str]) -> None:
    """Refuse an adapter that was trained on top of others than lie below it; one that does not say is taken."""
    paths = adapter.settings.get("parent_adapters")
    if paths is None:
        return
    hashes = adapter.run.get("parent_weights") or ()
    if len(hashes) != len(paths):
        hashes = [None] * len(paths)
    if len(paths) != len(below) or not all(map(_is_same_adapter, paths, hashes, below)):
        raise UserError(
            f"peft_model_name_or_path: {adapter.path} was trained on top of {', '.join(paths) or 'no adapter'}, but "
            f"{', '.join(below) or 'no adapter'} would lie below it; list those that it was trained on, innermost "
            "first."
        )


def _is_same_adapter(path: str, weights: str | None, given: str) -> bool:
    """Whether `given` is the adapter that lay at `path` in training and had these weights, if they are recorded."""
    found = None if weights is None else adapter_hash(given)
    return Path(path).name == Path(given).name if found is None else found == weights


def _warn_of_another_base(adapter: Folder, base: Folder) -> None:
    """Say so where an adapter was trained on something else than what it is about to be put on."""
    parent = adapter.run.get("parent")
    if parent is None:
        return
    recorded = parent.get("marks", {}).get(parent.get("model_name_or_path"), "")
    found = base.commit or mark_of(base.path)
    if found != recorded and len(found) == len(recorded):  # a folder's and a commit's tell nothing of each other
        logger.warning(
            "%s was trained on %s, and %s is not the same: its weights, config or tokenizer differ",
            adapter.path, parent["model_name_or_path"], base.path,
        )  # fmt: skip


# --- what tells models apart ---


def mark_of(path: str) -> str:
    """What tells a model or adapter from others under the same name, without reading all of it; for `run.json`.

    Of a folder, a hash of its small files and of its weights' sizes and last bytes. Of a hub name, the commit in the
    local cache. Empty where there is neither.
    """
    folder = local_folder(path)
    if folder is None:
        return _cached_commit(path) or ""
    patterns = ("*config.json", "tokenizer*.json", "*.safetensors", *_OTHER_TOKENIZER_FILES)
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    return files_hash(folder, files, TAIL_BYTES)


def is_mark_of_folder(mark: str) -> bool:
    """Whether a mark is a folder's, and not a commit on the hub, which is longer."""
    return len(mark) == DIGITS_OF_A_MARK


def revision_of(path: str) -> str:
    """Hash of all that a folder's vectors depend on; of a model on the hub its commit, or its name if none is cached.

    mteb keeps a score under results/<name>/<revision>/ and finds an old one by these two alone, so every byte counts. A
    `UserError` where the folder holds no safetensors weights.
    """
    folder = local_folder(path)
    if folder is None:
        return _cached_commit(path) or path
    if is_stock(path):
        found = [file for pattern in MODULE_FILES for file in folder.rglob(pattern)]
    else:
        found = [file for pattern in CHECKPOINT_FILES for file in folder.glob(pattern)]
    files = {file for file in found if file.name != RUN_FILE}
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"The directory {path} holds no safetensors weights.")
    return files_hash(folder, sorted(files))


def is_stock(path: str) -> bool:
    """Whether a folder or repository is a sentence-transformers model; a `UserError` where it can be neither."""
    file = find_file(path, MODULES_FILE)
    return file is not None and NO_STOCK_MODEL not in Path(file).read_text(encoding="utf-8", errors="replace")


def adapter_hash(adapter: str) -> str | None:
    """SHA-256 of an adapter's weights, whatever lies beside them; None where it has none."""
    file = find_file(adapter, ADAPTER_WEIGHTS)
    return None if file is None else sha256(Path(file))


def _cached_commit(path: str) -> str | None:
    """The commit of a hub repository in the local cache; None where there is none, or for no name of a repository."""
    try:
        cache, names = HUB_CLIENT.get().get("cache_dir"), ("config.json", "adapter_config.json", MODULES_FILE)
        cached = [try_to_load_from_cache(path, name, cache_dir=cache) for name in names]
    except HFValidationError:
        return None
    return next((Path(file).parent.name for file in cached if isinstance(file, str)), None)


def model_name(paths: Sequence[str]) -> str:
    """A name of mteb's form "organisation/name" for a base model and its adapters, by their folders or hub names, such
    as "output/stage_I+output-stage_II". On either side of the slash stand letters, digits and `._+-`, so that it can
    name a folder."""
    steps = []
    for path in paths:
        parts = Path(path).resolve().parts if Path(path).is_dir() else Path(path).parts
        steps.append([re.sub(r"[^A-Za-z0-9.+-]+", "_", part) for part in ("local", *parts)[-2:]])
    (organisation, base), *adapters = steps
    return f"{organisation}/{'+'.join([base, *('-'.join(adapter) for adapter in adapters)])[:150]}"
