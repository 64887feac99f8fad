"""Name and revision of an evaluated model: old results are found by these two only, so they must say everything.

mteb keeps a score under results/<name>/<revision>/. The revision here is a hash of whatever decides a score: weights,
tokenizer, settings, instructions. A path alone would let every local model collide with every other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from llm2vec.model.checkpoint import SETTINGS_FILE
from llm2vec.types import UserError

#: What decides a checkpoint's vectors, besides the settings. Not run.json: its dates would change the hash.
CHECKPOINT_FILES = ("*.safetensors", "*config.json", "tokenizer*")
#: The same for a sentence-transformers folder, at any depth (`1_Pooling/config.json`, `vocab.txt`).
MODULE_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
#: Found in a sentence-transformers model's repository, and in no other.
MODULES_FILE = "modules.json"


def model_name(paths: Sequence[str]) -> str:
    """A name of mteb's form "organisation/name" for a base model and its adapters.

    Args:
        paths: Directories or hub names, base model first. `output/stage_I` gives "output/stage_I", and a second one,
            `output/stage_II`, makes it "output/stage_I+output-stage_II".

    Returns:
        The name, of letters, digits and `._+-` on either side of the slash, so that it can name a folder.
    """
    steps = []
    for path in paths:
        parts = Path(path).resolve().parts if Path(path).is_dir() else Path(path).parts
        steps.append([_safe(part) for part in ("local", *parts)[-2:]])
    (organisation, base), *adapters = steps
    return f"{organisation}/{'+'.join([base, *('-'.join(adapter) for adapter in adapters)])[:150]}"


def hash_of(parts: Any) -> str:
    """A short hash of anything that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def checkpoint_revision(path: str) -> str:
    """Hash of a local checkpoint's files; for a model on the hub its commit, or its name if none is cached.

    Raises:
        UserError: A directory holds no safetensors weights.
    """
    if Path(path).is_dir():
        folder = Path(path)
        is_module_folder = (folder / MODULES_FILE).is_file()
        found = (
            [folder.rglob(p) for p in MODULE_FILES] if is_module_folder else [folder.glob(p) for p in CHECKPOINT_FILES]
        )
        files = {file for matches in found for file in matches if file.name != "run.json"}
        # sentence-transformers may still read older weights; a checkpoint of ours never has them.
        if not any(file.suffix in (".safetensors", ".bin") for file in files):
            raise UserError(f"The directory {path} holds no safetensors weights.")
        return files_hash(folder, files)
    for config in ("config.json", "adapter_config.json", MODULES_FILE):
        cached = try_to_load_from_cache(path, config)
        if isinstance(cached, str):
            return Path(cached).parent.name
    return path


def is_module_folder(path: str) -> bool:
    """Whether a directory holds a sentence-transformers model, and not one of ours."""
    return (Path(path) / MODULES_FILE).is_file() and not (Path(path) / SETTINGS_FILE).is_file()


def data_revision(folder: Path) -> str:
    """Hash of all files of a local data set."""
    return "local-" + files_hash(folder, {file for file in folder.rglob("*") if file.is_file()})


def files_hash(folder: Path, files: Iterable[Path]) -> str:
    """Hash of files below a folder: their names there, sizes and content."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)
