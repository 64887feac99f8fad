"""The LoRA adapter of a checkpoint alone, for the hub's copy of its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel, TaskType
from torch import Tensor

from llm2vec.export.proof import compare_vectors
from llm2vec.files import write_json
from llm2vec.hub import find_file, local_folder
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import config_of, open_sentence_transformer
from llm2vec.model.chain import Chain
from llm2vec.model.stock_form import StockForm, write_form
from llm2vec.model.vault import folder_at
from llm2vec.types import InstructedText, UserError


def check_adapter(chain: Chain, base_id: str | None) -> str:
    """The hub name of an adapter's base; a `UserError` where the adapter alone is of no use to others: there is none,
    others are merged below it, or its base has no name on the hub."""
    if not chain.adapters:
        raise UserError("--adapter: the checkpoint is a full model; leave --adapter out.")
    if others := len(chain.adapters) - 1:
        reason = f"its base has {others} other adapter(s) merged into it, which nobody else has"
        raise UserError(f"--adapter: {reason}; leave --adapter out.")
    if base_id is None:
        raise UserError(
            f"--adapter: the base {chain.base} is a local folder; export it, push it and name it by --base_id."
        )
    return base_id


def write_adapter(
    folder: Path, model: LLM2Vec, form: StockForm, instructions: Mapping[str, str], base: str, base_id: str,
    texts: Sequence[InstructedText], exact: Tensor,
) -> None:  # fmt: skip
    """Write the adapter of a model that is not merged yet as a folder that sentence-transformers loads, and compare its
    vectors of texts with the checkpoint's, `exact` [N, D].

    Until then a stand-in for its base (`base`, a folder or hub name) lies beside it. A `UserError` where the hub's base
    (`base_id`, with its revision) would attend otherwise.
    """
    if model.settings.attention == "bidirectional":
        _check_bidirectional(base_id)
    adapted, stand_in = model.model, folder.with_name("base")
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    write_form(folder, form, adapted.config.hidden_size, model.settings.attention, instructions)
    # The base's own files under the config that the base has, or shall have, on the hub.
    stand_in.mkdir()
    there = local_folder(base) or Path(find_file(base, "config.json") or "").parent
    for file in there.iterdir():
        if file.is_file() and file.name != "config.json":
            (stand_in / file.name).symlink_to(file.resolve())
    adapted.config.save_pretrained(stand_in)
    _name_base(folder, str(stand_in), None)
    compare_vectors(open_sentence_transformer(str(folder), dtype=torch.float32), form, texts, exact)
    shutil.rmtree(stand_in)
    name, _, revision = base_id.partition("@")
    _name_base(folder, name, revision or None)


def _name_base(folder: Path, base: str, revision: str | None) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": revision, "auto_mapping": None}
    config["task_type"] = TaskType.FEATURE_EXTRACTION.value
    write_json(file, config)


def _check_bidirectional(base_id: str) -> None:
    """Refuse a base that would be loaded causally: an adapter's folder cannot say how its base attends."""
    name, _, revision = base_id.partition("@")
    try:
        obeys = getattr(config_of(folder_at(name), revision or None), "is_causal", True) is False
    except UserError as error:
        raise UserError(f"--adapter: the config of {base_id} could not be read: {error}") from error
    if not obeys:
        raise UserError(
            f"--adapter: this model attends bidirectionally, and the config.json of {base_id} does not say is_causal: "
            "false; an adapter's folder cannot say it, so the adapter would run causally and give other vectors "
            "without a warning. Export the base, push that and name it by --base_id, or leave --adapter out."
        )
