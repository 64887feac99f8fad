"""The data set of a name, where upstream has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2vec.dataset.dataset import E5Data, Split, Wiki1M
from llm2vec.types import UserError


def load_dataset(
    dataset_name: str,
    split: Split = "train",
    file_path: str | Path | None = None,
    effective_batch_size: int = 32,
    shuffle_individual_datasets: bool = True,
) -> E5Data | Wiki1M:
    """A data set by its name; arguments as of `E5Data` and `Wiki1M`, whose files are taken where none is given."""
    files: dict[str, Any] = {} if file_path is None else {"file_path": file_path}
    if dataset_name == "Wiki1M":
        return Wiki1M(split=split, **files)
    if dataset_name != "E5":
        raise UserError(f"dataset_name is {dataset_name!r}; allowed: E5, Wiki1M.")
    return E5Data(
        split=split,
        effective_batch_size=effective_batch_size,
        shuffle_individual_datasets=shuffle_individual_datasets,
        **files,
    )
