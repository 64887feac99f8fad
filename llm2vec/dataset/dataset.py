"""Samples of texts as upstream's training loops take them: the released archive's, and Wiki1M's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch.utils.data import Dataset

from llm2vec.data.lines import lines_of_text
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import e5_sources
from llm2vec.types import InstructedText, UserError, in_one_sentence

Split = Literal["train", "validation", "test"]


@dataclass
class DataSample:
    """A row of a data set."""

    id_: int
    query: str
    positive: str
    negative: str | None = None
    task_name: str | None = None


@dataclass
class TrainSample:
    """Texts that belong together, and a label."""

    guid: str = ""
    texts: Sequence[str] = ()
    label: int | float = 0


class E5Data(Dataset[TrainSample]):
    """The released training archive, a source a batch; instructions stand before a separator, as in upstream's texts.

    Python's `random` decides the order. Rows that fill no batch of their source are left out. A missing file, or a line
    that is no valid row, is a `UserError`.

    Args:
        dataset_name: not read.
        split: only `train` has samples.
        file_path: folder with the sources' files.
        effective_batch_size: rows of a batch over all processes.
        shuffle_individual_datasets: shuffle a source's rows before they are cut into batches.
        separator: between instruction and text. `LLM2Vec` here takes pairs instead: split the texts there.
    """

    def __init__(
        self,
        dataset_name: str = "E5",
        split: Split = "train",
        file_path: str | Path = "cache/echo-data",
        effective_batch_size: int = 32,
        shuffle_individual_datasets: bool = True,
        separator: str = "!@#$%^&*()",
    ) -> None:
        _check_split("E5Data", split)
        self.separator = separator
        self.rows = TrainingRows(Path(file_path), e5_sources(), symmetric_instructions="as_released")
        batches: list[list[int]] = []
        first = 0
        for size in self.rows.sizes:
            order = list(range(first, first + size))
            if shuffle_individual_datasets:
                random.shuffle(order)
            whole = size - size % effective_batch_size
            batches += [order[i : i + effective_batch_size] for i in range(0, whole, effective_batch_size)]
            first += size
        random.shuffle(batches)
        self.order = [index for batch in batches for index in batch]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> TrainSample:
        """Query, positive and negative of a row."""
        row = self.rows[self.order[index]]
        return TrainSample(texts=[self._text(text) for text in (row.query, row.positive, row.negatives[0])], label=1.0)

    def _text(self, text: InstructedText) -> str:
        return f"{text.instruction}; {self.separator}{text.text}" if text.instruction else self.separator + text.text


class Wiki1M(Dataset[TrainSample]):
    """A text file (`file_path`), a sentence a line; each is its own positive. `dataset_name` is not read, and only the
    `split` `train` has samples. A file that cannot be read is a `UserError`."""

    def __init__(
        self,
        dataset_name: str = "Wiki1M",
        split: Split = "train",
        file_path: str | Path = "cache/wiki1m_for_simcse.txt",
    ) -> None:
        _check_split("Wiki1M", split)
        with in_one_sentence(lambda why: f"{file_path}: cannot be read ({why}).", OSError):
            self.data = [text for _, text in lines_of_text(Path(file_path))]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> TrainSample:
        """A sentence, twice."""
        return TrainSample(texts=[self.data[index]] * 2, label=1.0)


def _check_split(name: str, split: str) -> None:
    if split != "train":
        raise UserError(f"split is {split!r}; {name} has a train split only.")
