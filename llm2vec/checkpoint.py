"""What a checkpoint folder holds, how it is written, and how the next stage reads it.

    model.safetensors or adapter_model.safetensors, with config.json or adapter_config.json
    tokenizer files
    llm2vec_config.json   EncoderSettings: everything that decides a text's embedding beside the weights
    run.json              where it came from: resolved config, versions, parent, data; and the files with their sizes

Files are written aside and renamed one by one; a marker file stands in the folder meanwhile, so that a folder cut
short is refused instead of read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, get_args

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from llm2vec.backbone import Backbone, Chain, find_file, local_folder
from llm2vec.templates import segments_of
from llm2vec.types import POOLING_ALIASES, Attention, PoolingMode, UserError

SETTINGS_FILE = "llm2vec_config.json"
RUN_FILE = "run.json"
INCOMPLETE_MARKER = ".incomplete"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "llm2vec")


@dataclass(frozen=True)
class EncoderSettings:
    """How texts become vectors. The defaults are upstream LLM2Vec's, except `doc_max_length`.

    Attributes:
        pooling_mode: `last`, `mean`, `weighted_mean` or `first`.
        max_length: most tokens of a row, template included.
        doc_max_length: most tokens of the text alone; None = as many as fit (upstream: 400).
        skip_instruction: whether the instruction is left out of the pooled positions.
        template: key of `templates.TEMPLATES`; None = inferred from the tokenizer.
        instruction_join: what stands between instruction and text, in the templates that leave it open.
        attention: `causal` or `bidirectional`.
        normalize: whether `encode` returns unit vectors.
        parent_adapters: for an adapter checkpoint, the adapters merged into the base below it, innermost first.
    """

    pooling_mode: PoolingMode = "mean"
    max_length: int = 512
    doc_max_length: int | None = None
    skip_instruction: bool = True
    template: str | None = None
    instruction_join: str = " "
    attention: Attention = "bidirectional"
    normalize: bool = False
    parent_adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        mode = POOLING_ALIASES.get(self.pooling_mode) if isinstance(self.pooling_mode, str) else None
        if mode is None:
            raise UserError(f"pooling_mode is {self.pooling_mode!r}; allowed: {', '.join(POOLING_ALIASES)}.")
        object.__setattr__(self, "pooling_mode", mode)
        if self.template is not None:
            segments_of(self.template, mode)  # refuses an unknown one, and `last` where no closing token is written
        if self.attention not in get_args(Attention):
            raise UserError(f"attention is {self.attention!r}; allowed: {', '.join(get_args(Attention))}.")
        for name in ("max_length", "doc_max_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} is {value!r}; a whole number above 0 is needed.")
        for name in ("skip_instruction", "normalize"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name} is {getattr(self, name)!r}; true or false is needed.")
        if not isinstance(self.instruction_join, str):
            raise UserError(f"instruction_join is {self.instruction_join!r}; a string is needed.")
        if self.parent_adapters is not None:
            object.__setattr__(self, "parent_adapters", tuple(self.parent_adapters))


def read_settings(path: str) -> dict[str, Any]:
    """What a folder's or hub repository's `llm2vec_config.json` says; empty where there is none.

    Raises:
        UserError: the folder is cut short, or the file is no JSON object with known keys.
    """
    check_complete(path)
    file = find_file(path, SETTINGS_FILE)
    if file is None:
        return {}
    settings = _read_json(Path(file))
    known = [field.name for field in dataclasses.fields(EncoderSettings)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise UserError(f"{file}: unknown key {unknown[0]!r}; known: {', '.join(known)}.")
    return settings


def read_probe_ids(path: str) -> list[list[int]] | None:
    """The probe texts' token ids that a checkpoint folder's `run.json` holds, if any."""
    folder = local_folder(path)
    if folder is None or not (folder / RUN_FILE).is_file():
        return None
    recorded: list[list[int]] | None = _read_json(folder / RUN_FILE).get("probe_ids")
    return recorded


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
        UserError: others lie below an adapter than it was trained on. Loading it on them would give wrong embeddings
            and no other sign.
    """
    check_complete(base)
    chain = list(adapters)
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
    folder = local_folder(adapter)
    run = _read_json(folder / RUN_FILE) if folder is not None and (folder / RUN_FILE).is_file() else {}
    hashes = run.get("parent_weights") or ()
    if len(hashes) != len(paths):
        hashes = [None] * len(paths)
    return [_Parent(path, weights) for path, weights in zip(paths, hashes, strict=True)]


def _is_same_adapter(parent: _Parent, given: str) -> bool:
    weights = _hash_of_weights(given) if parent.weights is not None else None
    if weights is not None:
        return weights == parent.weights
    return Path(parent.path).name == Path(given).name


def _hash_of_weights(adapter: str) -> str | None:
    """SHA-256 of an adapter's weights file; None where it has none."""
    file = find_file(adapter, SAFETENSORS_WEIGHTS_NAME)
    if file is None:
        return None
    with Path(file).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _adapter_base(path: str) -> str | None:
    """The base that an adapter folder records, or None where `path` is no adapter."""
    try:
        if find_adapter_config_file(path) is None:
            return None
    except OSError:  # hub unreachable, or no such repository: loading the base itself will say so
        return None
    recorded = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not recorded:
        raise UserError(f"{path}: adapter_config.json names no base model; give the base and list this adapter.")
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
    if not (folder / RUN_FILE).is_file():
        return
    for name, size in _read_json(folder / RUN_FILE).get("files", {}).items():
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
    """Write a checkpoint into `folder`, over one that may be there; other files in it are left alone.

    Args:
        folder: made if missing.
        model: a full model, or a PeftModel of which only the adapter is written.
        tokenizer: written beside it.
        settings: go to `llm2vec_config.json`; None = not written (`save_config=False` of upstream).
        run: provenance for `run.json`; versions, git commit, file sizes and the hashes of the adapters below this one
            are added here.
        state: a full model's weights, where the model itself holds only a share of them (FSDP).
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        # peft would write the whole embedding beside the few rows of it that an adapter trains.
        adapter_only: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        model.save_pretrained(str(staging), state_dict=state, **adapter_only)
        tokenizer.save_pretrained(staging)
        # peft writes a model card about nothing; ours comes with the export.
        (staging / "README.md").unlink(missing_ok=True)
        if settings is not None:
            write_json(staging / SETTINGS_FILE, dataclasses.asdict(settings))
        sizes = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
        parents = {} if settings is None else {"parent_weights": _parent_weights(settings)}
        write_json(staging / RUN_FILE, {**(run or {}), **_environment(), **parents, "files": sizes})
        (folder / INCOMPLETE_MARKER).touch()
        for file in staging.iterdir():
            file.replace(folder / file.name)
        (folder / INCOMPLETE_MARKER).unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _parent_weights(settings: EncoderSettings) -> list[str | None]:
    hashes: list[str | None] = []
    for adapter in settings.parent_adapters or ():
        try:
            hashes.append(_hash_of_weights(adapter))
        except UserError:  # moved during training, which is no reason to lose what was trained
            hashes.append(None)
    return hashes


def write_json(file: Path, content: Any) -> None:
    """Write indented JSON, aside and renamed."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: a JSON object is needed, not a {type(content).__name__}.")
    return content


def _environment() -> dict[str, Any]:
    """Versions of what computed the weights, and the commit of this code where it is a git checkout."""
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
