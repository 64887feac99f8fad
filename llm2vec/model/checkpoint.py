"""What a checkpoint folder holds, how it is written, and how a run reads its weights back.

    model.safetensors or adapter_model.safetensors, with config.json or adapter_config.json
    tokenizer files
    llm2vec_config.json   EncoderSettings: everything that decides a text's embedding beside the weights
    modules.json          stops sentence-transformers, which would write no template and pool at will, with a sentence
    run.json              where it came from: resolved config, step, versions, parent, data; and the files' sizes
    SHA256SUMS            in a run's `checkpoint-N` only: the sums of all files, in the form that `sha256sum -c` reads

Files are written aside and renamed one by one. A marker file stands in the folder meanwhile, so that a folder that was
cut short is refused instead of read. A `checkpoint-N` also holds what a run needs to go on: optimiser, schedule, random
numbers, log. It is written as a whole beside its place and then renamed; `SHA256SUMS` is its last file.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm2vec.files import sha256, write_json
from llm2vec.model.backbone import Backbone
from llm2vec.model.chain import INCOMPLETE_MARKER, NO_STOCK_MODEL, RUN_FILE, adapter_hash
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings, set_attention
from llm2vec.model.vault import MODULES_FILE
from llm2vec.types import UserError

SUMS_FILE = "SHA256SUMS"
WRITING_PREFIX = ".writing-"
#: What an objective learns beside the model, such as a projection of anchors.
BESIDE_FILE = "objective.safetensors"
#: Files that a loader takes for a folder's weights, or that say where to look for them.
WEIGHTS_FILES = (
    "adapter_config.json", "adapter_model*.safetensors", "model*.safetensors", "model.safetensors.index.json",
    BESIDE_FILE,
)  # fmt: skip
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "llm2vec")


def save_checkpoint(
    folder: Path,
    model: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings | None,
    run: Mapping[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint into `folder`. Weights that are there go, whatever their form; other files stay.

    Args:
        folder: made if missing.
        model: a full model, or a PeftModel of which only the adapter is written.
        tokenizer: written beside it.
        settings: go to `llm2vec_config.json`; None = not written (`save_config=False` of upstream).
        run: where it comes from, for `run.json`. Versions, git commit, file sizes and the hashes of the adapters below
            this one are added here.
        state: all weights, where the model itself holds only a share of them (FSDP).
        beside: what the objective learns beside the model, see `weights_beside`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(f"{WRITING_PREFIX}*"):  # by a run that was killed here
        shutil.rmtree(abandoned, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=WRITING_PREFIX, dir=folder))
    try:
        if settings is not None:  # other libraries read it there
            set_attention(model.config, settings.attention)
        # peft would write the whole embedding beside the few rows of it that an adapter trains.
        adapter_only: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        to_write = None if state is None else dict(state)  # transformers empties it as it writes
        model.save_pretrained(str(staging), state_dict=to_write, **adapter_only)
        # Of several chat templates, transformers would make a folder; in the config it reads them as well.
        tokenizer.save_pretrained(staging, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
        # peft writes a model card about nothing; ours comes with the export.
        (staging / "README.md").unlink(missing_ok=True)
        if beside:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in beside.items()}
            save_file(on_cpu, staging / BESIDE_FILE)
        if settings is not None:
            write_json(staging / SETTINGS_FILE, settings.written())
            write_json(staging / MODULES_FILE, [{"idx": 0, "name": "0", "path": "", "type": NO_STOCK_MODEL}])
        sizes = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
        parents = {} if settings is None else {"parent_weights": _parent_weights(settings)}
        # A record that is handed on keeps the versions that it has.
        write_json(staging / RUN_FILE, {**environment(), **(run or {}), **parents, "files": sizes})
        (folder / INCOMPLETE_MARKER).touch()
        weights = () if _is_base_of(folder, model) else chain.from_iterable(map(folder.glob, WEIGHTS_FILES))
        for old in list(weights):
            if not (staging / old.name).exists():  # of an adapter, a full model or one more shard: it would be loaded
                old.unlink()
        for file in staging.iterdir():
            file.replace(folder / file.name)
        (folder / INCOMPLETE_MARKER).unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def record_of(runs: Sequence[Mapping[str, Any]], is_adapter: bool) -> dict[str, Any]:
    """What a loaded model's own folder shall record of the training behind it.

    `runs` is what the folders record that it was loaded from, the base first. An adapter, or a model without any, has
    the outermost folder's record; a model with adapters merged into it lists all as `stages`. An adapter that has come
    since has none.
    """
    if len(runs) <= is_adapter:
        return {}
    if is_adapter or len(runs) == 1:
        return dict(runs[-1])
    stages = [run for folder in runs for run in folder.get("stages", [folder]) if "config" in run]
    of_folder = ("files", "probe_ids", "parent_weights")
    return {"stages": [{key: run[key] for key in run if key not in of_folder} for run in stages]}


def _is_base_of(folder: Path, model: Backbone) -> bool:
    """Whether a folder holds what the model is an adapter of."""
    base = model.active_peft_config.base_model_name_or_path if isinstance(model, PeftModel) else None
    return base is not None and folder.resolve() == Path(base).resolve()


@torch.no_grad()
def read_weights(folder: Path, model: Backbone) -> None:
    """Put the weights that `save_checkpoint` wrote into the model that wrote them, or one built alike, bit by bit; of a
    PeftModel, its adapter's. A `UserError` where the folder's tensors are not the model's, by name, shape or type."""
    if isinstance(model, PeftModel):
        saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        _check_names(folder, saved.keys() ^ own.keys())
        set_peft_model_state_dict(model, saved)
        return
    own = model.state_dict()
    read: set[int] = set()
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                weight, tensor = own.get(name), tensors.get_tensor(name)
                if weight is None or (weight.shape, weight.dtype) != (tensor.shape, tensor.dtype):
                    _check_names(folder, {name})
                else:
                    weight.copy_(tensor)
                    read.add(weight.data_ptr())
    _check_names(folder, {name for name, weight in own.items() if weight.data_ptr() not in read})  # tied ones share it


def weights_beside(objective: Any) -> dict[str, Tensor]:
    """Parameters and buffers of an objective that are not its model's, by name: what only its stage needs."""
    known = {id(tensor) for tensor in (*objective.model.parameters(), *objective.model.buffers())}
    found = (*objective.named_parameters(), *objective.named_buffers())
    return {name: tensor for name, tensor in found if id(tensor) not in known}


@torch.no_grad()
def read_beside(folder: Path, own: Mapping[str, Tensor], unread: str | None = None) -> None:
    """Put what `save_checkpoint` wrote of `weights_beside` back into these tensors; but nothing of the module
    `unread`. Others in the folder are a `UserError`."""
    saved = load_file(folder / BESIDE_FILE) if (folder / BESIDE_FILE).is_file() else {}
    _check_names(folder, {name for name in saved if name.partition(".")[0] != unread} ^ own.keys())
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _check_names(folder: Path, differing: Set[str]) -> None:
    if differing:
        raise UserError(f"{folder}: the weights are not those of this model; {min(differing)} differs.")


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` over all files of a folder but hidden ones, each once it has reached the disk."""
    files = sorted(_summed(folder))
    with ThreadPoolExecutor() as pool:  # a sum is taken outside the interpreter's lock
        sums = list(pool.map(_sum_on_disk, files))
    file = folder / SUMS_FILE
    file.write_text("".join(f"{s}  {f.name}\n" for f, s in zip(files, sums, strict=True)), encoding="utf-8")
    _sum_on_disk(file)


def check_sums(folder: Path) -> None:
    """Compare all files of a folder but hidden ones with its `SHA256SUMS`; a `UserError` where one is missing,
    unknown or not what it was."""
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
    """The files that are summed. Network disks and desktops leave hidden files of their own, which are not."""
    return [file for file in folder.iterdir() if not file.name.startswith(".") and file.name != SUMS_FILE]


def _sum_on_disk(file: Path) -> str:
    """SHA-256 of a file, taken once all that was written has left memory."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
    return sha256(file)


def _parent_weights(settings: EncoderSettings) -> list[str | None]:
    hashes: list[str | None] = []
    for adapter in settings.parent_adapters or ():
        try:
            hashes.append(adapter_hash(adapter))
        except UserError:  # it was moved during training, which is no reason to lose what was trained
            hashes.append(None)
    return hashes


def environment() -> dict[str, Any]:
    """Versions of what computes the weights, and the commit of this code where it is a git checkout."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    # The second word fails where git does not know this file: where another project's checkout has it installed.
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD", f"HEAD:./{Path(__file__).name}"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"versions": versions, "git_commit": commit}
