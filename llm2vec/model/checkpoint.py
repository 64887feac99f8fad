"""What a checkpoint folder holds, how it is written, and how the next stage reads it.

    model.safetensors or adapter_model.safetensors, with config.json or adapter_config.json
    tokenizer files
    llm2vec_config.json   EncoderSettings: everything that decides a text's embedding beside the weights
    run.json              where it came from: resolved config, step, versions, parent, data; and the files' sizes
    SHA256SUMS            in a run's `checkpoint-N` only: the sums of all files, in the form that `sha256sum -c` reads

Files are written aside and renamed one by one; a marker file stands in the folder meanwhile, so that a folder cut
short is refused instead of read. A `checkpoint-N`, which also holds what a run needs to go on (optimiser, schedule,
random numbers, log), is written as a whole beside its place and renamed; `SHA256SUMS` is its last file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm2vec.files import read_object, sha256, write_json
from llm2vec.hub import find_file, local_folder
from llm2vec.model.backbone import Backbone, Chain
from llm2vec.model.settings import EncoderSettings
from llm2vec.types import RunEnds, UserError, first_line

logger = logging.getLogger(__name__)

SETTINGS_FILE = "llm2vec_config.json"
RUN_FILE = "run.json"
SUMS_FILE = "SHA256SUMS"
INCOMPLETE_MARKER = ".incomplete"
WRITING_PREFIX = ".writing-"
#: Bytes at the end of a weights file that tell it from others of its size.
TAIL_BYTES = 1 << 20
#: Hexadecimal digits by which a folder's weights are told from others; a commit on the hub has 40.
DIGITS_OF_A_MARK = 16
#: Files that a loader takes for a folder's weights, or that say where to look for them.
WEIGHTS_FILES = (
    "adapter_config.json", "adapter_model*.safetensors", "model*.safetensors", "model.safetensors.index.json",
)  # fmt: skip
#: Keys of `run.json` that are read again, and what each holds.
RUN_TYPES = {
    "config": dict, "parent": dict, "files": dict, "data": list, "parent_weights": list, "probe_ids": list,
    "stages": list,
}  # fmt: skip
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "llm2vec")


def read_settings(path: str) -> dict[str, Any]:
    """What a folder's or hub repository's `llm2vec_config.json` says; empty where there is none.

    Raises:
        UserError: the folder is cut short, or the file is no JSON object of settings.
    """
    check_complete(path)
    file = find_file(path, SETTINGS_FILE)
    if file is None:
        return {}
    settings = read_object(Path(file))
    known = [field.name for field in dataclasses.fields(EncoderSettings)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise UserError(f"{file}: unknown key {unknown[0]!r}; known: {', '.join(known)}.")
    try:
        EncoderSettings(**settings)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return settings


def read_probe_ids(path: str) -> list[list[int]] | None:
    """The probe texts' token ids that a checkpoint folder's `run.json` holds, if any."""
    return _run_of(path).get("probe_ids")


def read_run(folder: Path) -> dict[str, Any]:
    """What a folder's `run.json` says.

    Raises:
        UserError: it is no JSON object, or a key of it holds something else than a run writes there.
    """
    run = read_object(folder / RUN_FILE)
    for key, kind in RUN_TYPES.items():
        if not isinstance(run.get(key, kind()), kind):
            needed = "an object" if kind is dict else "a list"
            raise UserError(f"{folder / RUN_FILE}: {key} is {run[key]!r}; {needed} is needed.")
    return run


def read_run_config(path: str) -> dict[str, Any]:
    """The resolved config that a checkpoint folder's `run.json` holds; empty where there is none."""
    recorded: dict[str, Any] = _run_of(path).get("config", {})
    return recorded


def _run_of(path: str) -> dict[str, Any]:
    """What a checkpoint's `run.json` says; empty where there is none, as for a name on the hub."""
    folder = local_folder(path)
    return {} if folder is None or not (folder / RUN_FILE).is_file() else read_run(folder)


def resolve_chain(base: str, adapters: Sequence[str]) -> Chain:
    """Spell out what is loaded: the true base, then every adapter in order.

    A `base` that is itself an adapter folder (upstream's `...-mntp` repositories, or one of our own Stage II folders)
    is replaced by the base it records and goes first among the adapters.

    Args:
        base: folder or hub name of a model or of an adapter.
        adapters: folders or hub names, innermost first.

    An adapter that says on top of which others it was trained must find those below it, in that order. They are told by
    their weights where those are recorded, so that a folder may be moved and renamed; else by their folders' names.

    Raises:
        UserError: others lie below an adapter than it was trained on, and loading it on them would give wrong
            embeddings and no other sign; or an adapter is its own base.
    """
    check_complete(base)
    chain = list(adapters)
    if base in chain:
        raise UserError(f"{base}: an adapter cannot be its own base; put the two into folders of their own.")
    if (recorded_base := _adapter_base(base)) is not None:
        chain = [*(read_settings(base).get("parent_adapters") or ()), base, *chain]
        return resolve_chain(recorded_base, chain)
    for position, adapter in enumerate(chain):
        parents = _read_parents(adapter)
        below = chain[:position]
        if parents is not None and (len(parents) != len(below) or not all(map(_is_same_adapter, parents, below))):
            trained_on = ", ".join(parent.path for parent in parents) or "no adapter"
            raise UserError(
                f"peft_model_name_or_path: {adapter} was trained on top of {trained_on}, but "
                f"{', '.join(below) or 'no adapter'} would lie below it; list those that it was trained on, innermost "
                "first."
            )
    if chain:
        _warn_of_another_base(chain[0], base)
    return Chain(base, tuple(chain))


class _Parent(NamedTuple):
    """An adapter below another one: where it lay in training, and the hash of its weights if that is recorded."""

    path: str
    weights: str | None


def _read_parents(adapter: str) -> list[_Parent] | None:
    """What an adapter was trained on top of, innermost first; None where it does not say."""
    paths = read_settings(adapter).get("parent_adapters")
    if paths is None:
        return None
    hashes = _run_of(adapter).get("parent_weights") or ()
    if len(hashes) != len(paths):
        hashes = [None] * len(paths)
    return [_Parent(path, weights) for path, weights in zip(paths, hashes, strict=True)]


def _is_same_adapter(parent: _Parent, given: str) -> bool:
    weights = _hash_of_weights(given) if parent.weights is not None else None
    if weights is not None:
        return weights == parent.weights
    return Path(parent.path).name == Path(given).name


def mark_of(path: str) -> str:
    """What tells a model's or adapter's weights from others under the same name, without reading all of them.

    Args:
        path: a folder: a hash of its small files, and of its weights files' sizes and last bytes; or a hub name: the
            commit in the local cache, or nothing. Nothing for what is neither, which loading it will say.
    """
    folder = local_folder(path)
    if folder is None:
        try:
            cached = [try_to_load_from_cache(path, name) for name in ("config.json", "adapter_config.json")]
        except HFValidationError:
            return ""
        return next((Path(file).parent.name for file in cached if isinstance(file, str)), "")
    digest = hashlib.sha256()
    for pattern in ("*config.json", "tokenizer*.json", "*.safetensors"):
        for file in sorted(folder.glob(pattern)):
            with file.open("rb") as content:
                size = content.seek(0, os.SEEK_END)
                content.seek(max(0, size - TAIL_BYTES) if file.suffix == ".safetensors" else 0)
                digest.update(f"{file.name} {size}\n".encode() + content.read())
    return digest.hexdigest()[:DIGITS_OF_A_MARK]


def is_mark_of_folder(mark: str) -> bool:
    """Whether a mark is a folder's, and not a commit on the hub, which is longer."""
    return len(mark) == DIGITS_OF_A_MARK


def _warn_of_another_base(adapter: str, base: str) -> None:
    """Say so where an adapter was trained on something else than what it is about to be put on."""
    parent = _run_of(adapter).get("parent")
    if parent is None:
        return
    recorded = parent.get("marks", {}).get(parent.get("model_name_or_path"), "")
    found = mark_of(base)
    if found != recorded and len(found) == len(recorded):  # a folder's and a commit's tell nothing of each other
        logger.warning(
            "%s was trained on %s, and %s is not the same: its weights, config or tokenizer differ",
            adapter, parent["model_name_or_path"], base,
        )  # fmt: skip


def _hash_of_weights(adapter: str) -> str | None:
    """SHA-256 of an adapter's weights file; None where it has none."""
    file = find_file(adapter, SAFETENSORS_WEIGHTS_NAME)
    return None if file is None else sha256(Path(file))


def _adapter_base(path: str) -> str | None:
    """The base that an adapter folder records, or None where `path` is no adapter."""
    try:
        if find_file(path, CONFIG_NAME) is None:
            return None
    except UserError:  # hub unreachable, or no such repository: loading the base itself will say so
        return None
    try:
        recorded = PeftConfig.from_pretrained(path).base_model_name_or_path
    except Exception as error:  # no JSON, no object, an unknown kind of adapter: each a type of its own
        raise UserError(f"{path}: its {CONFIG_NAME} cannot be read ({first_line(error)}).") from error
    if not recorded:
        raise UserError(f"{path}: {CONFIG_NAME} names no base model; give the base and list this adapter.")
    return str(recorded)


def check_complete(path: str) -> None:
    """Refuse a checkpoint folder that was cut short while it was written or copied.

    Raises:
        UserError: a file of it is missing or has another size than when it was written.
    """
    folder = local_folder(path)
    if folder is None:
        return
    if (folder / INCOMPLETE_MARKER).exists():
        raise UserError(f"{folder}: this checkpoint was cut short while it was written; use an earlier one.")
    for name, size in _run_of(path).get("files", {}).items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "missing" if actual is None else f"{actual} bytes long instead of {size}"
            raise UserError(f"{folder}: this checkpoint was cut short, or changed since: {name} is {found}.")


def save_checkpoint(
    folder: Path,
    model: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings | None,
    run: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint into `folder`, over one that may be there, whose weights go; other files in it are left alone.

    Args:
        folder: made if missing.
        model: a full model, or a PeftModel of which only the adapter is written.
        tokenizer: written beside it.
        settings: go to `llm2vec_config.json`; None = not written (`save_config=False` of upstream).
        run: provenance for `run.json`; versions, git commit, file sizes and the hashes of the adapters below this one
            are added here.
        state: a full model's weights, where the model itself holds only a share of them (FSDP); they are read back
            and compared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(f"{WRITING_PREFIX}*"):  # by a run that was killed here
        shutil.rmtree(abandoned, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=WRITING_PREFIX, dir=folder))
    try:
        # peft would write the whole embedding beside the few rows of it that an adapter trains.
        adapter_only: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        to_write = None if state is None else dict(state)  # which is emptied as it is written
        model.save_pretrained(str(staging), state_dict=to_write, **adapter_only)
        if state is not None:
            check_weights(staging, state)
        tokenizer.save_pretrained(staging)
        # peft writes a model card about nothing; ours comes with the export.
        (staging / "README.md").unlink(missing_ok=True)
        if settings is not None:
            write_json(staging / SETTINGS_FILE, dataclasses.asdict(settings))
        sizes = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
        parents = {} if settings is None else {"parent_weights": _parent_weights(settings)}
        write_json(staging / RUN_FILE, {**(run or {}), **environment(), **parents, "files": sizes})
        (folder / INCOMPLETE_MARKER).touch()
        for old in _weights_in(folder) if not _is_base_of(folder, model) else ():
            if not (staging / old.name).exists():  # an adapter's, a full model's, or a shard more: it would be loaded
                old.unlink()
        for file in staging.iterdir():
            file.replace(folder / file.name)
        (folder / INCOMPLETE_MARKER).unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _weights_in(folder: Path) -> list[Path]:
    return [file for pattern in WEIGHTS_FILES for file in folder.glob(pattern)]


def _is_base_of(folder: Path, model: Backbone) -> bool:
    """Whether a folder holds what the model is an adapter of."""
    base = model.active_peft_config.base_model_name_or_path if isinstance(model, PeftModel) else None
    return base is not None and folder.resolve() == Path(base).resolve()


@torch.no_grad()
def read_weights(folder: Path, model: Backbone) -> None:
    """Put a checkpoint's weights into the model that wrote it, or one built alike, bit by bit.

    Args:
        folder: what `save_checkpoint` wrote.
        model: a full model, or a PeftModel whose adapter it is; changed in place.

    Raises:
        UserError: the folder's tensors are not the model's, by name, shape or type.
    """
    if isinstance(model, PeftModel):
        saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        _check_names(folder, saved.keys() ^ own.keys())
        set_peft_model_state_dict(model, saved)
        return
    own = model.state_dict()
    read: set[int] = set()
    for name, tensor in _tensors(folder):
        weight = own.get(name)
        if weight is None or (weight.shape, weight.dtype) != (tensor.shape, tensor.dtype):
            _check_names(folder, {name})
        else:
            weight.copy_(tensor)
            read.add(weight.data_ptr())
    _check_names(folder, {name for name, weight in own.items() if weight.data_ptr() not in read})  # tied ones share it


def _check_names(folder: Path, differing: Set[str]) -> None:
    if differing:
        raise UserError(f"{folder}: the weights are not those of this model; {min(differing)} differs.")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """A full model's written weights, one at a time."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                yield name, tensors.get_tensor(name)


def check_weights(folder: Path, state: dict[str, Tensor]) -> None:
    """Read written weights back and compare them with what was to be written.

    Args:
        folder: a full model's.
        state: its weights; of those that are tied, one may stand for all.

    Raises:
        RunEnds: a tensor is missing or other than in memory, or holds a number that is not finite.
    """
    read: set[int] = set()
    for name, tensor in _tensors(folder):
        if not torch.isfinite(tensor).all():
            raise RunEnds(f"{folder}: {name} holds numbers that are not finite.", code=1)
        if name in state and torch.equal(tensor, state[name].cpu()):
            read.add(state[name].data_ptr())
    unread = {name for name, weight in state.items() if weight.data_ptr() not in read}
    if unread:
        raise RunEnds(f"{folder}: {min(unread)} was not written as it is in memory.", code=1)


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` over all files of a folder but hidden ones, last of all, when they have reached the disk."""
    files = sorted(_summed(folder))
    with ThreadPoolExecutor() as pool:  # a sum is taken outside the interpreter's lock
        sums = list(pool.map(_sum_on_disk, files))
    file = folder / SUMS_FILE
    file.write_text("".join(f"{s}  {f.name}\n" for f, s in zip(files, sums, strict=True)), encoding="utf-8")
    _sum_on_disk(file)


def check_sums(folder: Path) -> None:
    """Compare all files of a folder with its `SHA256SUMS`; hidden ones aside.

    Raises:
        UserError: there is none, or a file is missing, unknown or other than it was.
    """
    if not (folder / SUMS_FILE).is_file():
        raise UserError(f"{folder} has no {SUMS_FILE}, so it was cut short while it was written.")
    lines = (folder / SUMS_FILE).read_text(encoding="utf-8", errors="replace").split("\n")
    expected = {name: sum_ for sum_, _, name in (line.partition("  ") for line in lines if line)}
    files = _summed(folder)
    odd = sorted(expected.keys() ^ {file.name for file in files})
    if odd:
        raise UserError(f"{folder}: {odd[0]} is {'missing' if odd[0] in expected else f'not in {SUMS_FILE}'}.")
    with ThreadPoolExecutor() as pool:
        actual = dict(zip([file.name for file in files], pool.map(sha256, files), strict=True))
    changed = sorted(name for name in expected if expected[name] != actual[name])
    if changed:
        raise UserError(f"{folder}: {changed[0]} is not what was written, by its SHA-256.")


def _summed(folder: Path) -> list[Path]:
    """A network disk and a desktop leave hidden files of their own."""
    return [file for file in folder.iterdir() if not file.name.startswith(".") and file.name != SUMS_FILE]


def _sum_on_disk(file: Path) -> str:
    """SHA-256 of a file, after what was written has left memory."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
    return sha256(file)


def _parent_weights(settings: EncoderSettings) -> list[str | None]:
    hashes: list[str | None] = []
    for adapter in settings.parent_adapters or ():
        try:
            hashes.append(_hash_of_weights(adapter))
        except UserError:  # moved during training, which is no reason to lose what was trained
            hashes.append(None)
    return hashes


def environment() -> dict[str, Any]:
    """Versions of what computes the weights, and the commit of this code where it is a git checkout."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"versions": versions, "git_commit": commit}
