"""An index of texts of one's own, to search in with the model that made it.

INDEX/texts.jsonl             passages: where each stands, its title, its text
INDEX/vectors.safetensors     their vectors; its header names the model and the texts' sum
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from llm2vec.choice import ModelChoice
from llm2vec.corpus.passages import PASSAGE_CHARACTERS, SUFFIXES, passages_of
from llm2vec.corpus.search import blocks, hits_of, top_k
from llm2vec.files import alone_in, parse_object, sha256, whole, write_text
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.settings import EncoderSettings
from llm2vec.types import TextSide, UserError, in_one_sentence

logger = logging.getLogger(__name__)

VECTORS_FILE, TEXTS_FILE = "vectors.safetensors", "texts.jsonl"
#: What the header of the vectors says: sums of the texts and of the vectors, and the model, as JSON, and its revision.
ABOUT = {"texts", "vectors", "revision", "model"}
MADE_BY = {"base": str, "adapters": [str], "torch_dtype": str}
#: A line of the texts.
PASSAGE = {"where": str, "title": str, "text": str}
#: A token stands for at least about so many, in prose and in code: so a passage is read to its end.
LEAST_CHARACTERS_A_TOKEN = 3


class Hit(NamedTuple):
    """A passage that was found: its cosine similarity, where it stands, its title (may be empty) and its text."""

    score: float
    where: str
    title: str
    text: str


def build_index(source: Path, folder: Path, choice: ModelChoice, batch_size: int = 32) -> int:
    """Index a folder of text files or a JSONL file; an index that is there is replaced. Returns the number of passages.

    Vectors keep about as many bits as the model computes with: float32 for float32 weights, float16 (11 significant
    bits, where bfloat16 has 8) for the others. A `UserError` where `folder` holds anything but an index or cannot be
    written, or source or model cannot be read.
    """
    if folder.exists() and not _may_be_index(folder):
        raise UserError(f"{folder} is there and is no index; give a folder that is not there yet.")
    with alone_in(folder, "indexing"):
        return _build_index(source, folder, choice, batch_size)


def _may_be_index(folder: Path) -> bool:
    """Whether a folder is an index, or empty, whatever hidden files a killed start has left."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else ["it is a file"]
    return any(name.lstrip(".").startswith(VECTORS_FILE) for name in names) or all(n.startswith(".") for n in names)


def _build_index(source: Path, folder: Path, choice: ModelChoice, batch_size: int) -> int:
    settings = EncoderSettings(**choice.opened().settings)
    choice = choice.resolved()
    tokens = min(settings.max_length, settings.doc_max_length or settings.max_length)
    rows = list(passages_of(source, min(PASSAGE_CHARACTERS, LEAST_CHARACTERS_A_TOKEN * tokens)))
    if not rows:
        raise UserError(f"{source} has no text: no line, or no text file ({', '.join(SUFFIXES)}) that holds any.")
    logger.info("%d passages of %s", len(rows), source)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    about = {
        "revision": choice.revision(),
        "model": json.dumps(asdict(choice)),
        "texts": hashlib.sha256(lines.encode()).hexdigest(),  # so that the files of two indexes never pass for one
    }
    texts = [f"{row['title']} {row['text']}".strip() for row in rows]  # as in an evaluation
    vectors_ND = _unit_vectors(choice.load(), texts, "document", batch_size).cpu().contiguous()
    stored_ND = vectors_ND if choice.torch_dtype == "float32" else vectors_ND.half()
    with in_one_sentence(lambda why: f"{folder} cannot be written to ({why}).", OSError):
        for aside in (*folder.glob(f".{VECTORS_FILE}.*"), *folder.glob(f".{TEXTS_FILE}.*")):  # a killed start's
            aside.unlink()
        with whole(folder / VECTORS_FILE) as aside:
            save_file({"vectors": stored_ND}, aside, metadata={**about, "vectors": _sum_of(stored_ND)})
            write_text(folder / TEXTS_FILE, lines)
    return len(rows)


class TextIndex:
    """An index that `build_index` has written. A `UserError` where there is none, or its files are cut short or of two
    indexes.

        index = TextIndex(Path("output/docs-index"))
        index.search(index.load_model(), ["which key is it when memory runs out"], k=3)
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / VECTORS_FILE).is_file() or not (folder / TEXTS_FILE).is_file():
            raise UserError(f"{folder} is no index: it does not hold both {VECTORS_FILE} and {TEXTS_FILE}.")
        where = f"{folder / VECTORS_FILE}"
        with (
            in_one_sentence(lambda why: f"{where} cannot be read ({why}); make the index again.", SafetensorError),
            safe_open(folder / VECTORS_FILE, framework="pt") as vectors,
        ):
            about = vectors.metadata() or {}
            if not about.keys() >= ABOUT:
                raise UserError(f"{where} is of another program or version; make the index again.")
            self._vectors_ND = vectors.get_tensor("vectors")
        if about["texts"] != sha256(folder / TEXTS_FILE):
            raise UserError(f"{folder}: the vectors are not of this {TEXTS_FILE}; make the index again.")
        self._lines = (folder / TEXTS_FILE).read_bytes().splitlines()
        if about["vectors"] != _sum_of(self._vectors_ND) or self._vectors_ND.shape[:-1] != (len(self._lines),):
            raise UserError(f"{where} is not what was written; make the index again.")
        made_by = parse_object(about["model"], where, MADE_BY)
        self.model = ModelChoice(made_by["base"], tuple(made_by["adapters"]), made_by["torch_dtype"])
        self.folder, self.revision = folder, about["revision"]

    def load_model(self, choice: ModelChoice | None = None) -> LLM2Vec:
        """The model that made the index, from where it lay then, or `choice`. A `UserError` where it is another one, or
        was trained further since."""
        choice = choice or self.model
        if choice.revision() != self.revision:
            raise UserError(
                f"{self.folder} was made by another model than {choice.place} is now (or by other settings or another "
                "dtype of it), so vectors do not compare; make the index again."
            )
        return choice.load()

    def search(self, model: LLM2Vec, queries: Sequence[str], k: int, instruction: str = "") -> list[list[Hit]]:
        """The k best passages for each query, or all; among equal scores the earlier one of the index first."""
        vectors_QD = _unit_vectors(model, [[instruction, query] for query in queries], "query")
        vectors_QD = vectors_QD.to(next(model.parameters()).device)  # which that has moved the model to
        ranges = blocks(len(self._lines))
        documents = ((block.start, self._vectors_ND[block.start : block.stop]) for block in ranges)
        keys = top_k(vectors_QD, documents, lambda q_QD, d_ND: q_QD @ d_ND.float().T, min(k, len(self._lines))).cpu()
        return [[Hit(score, **self._passage(number)) for number, score in hits] for hits in hits_of(keys)]

    def _passage(self, number: int) -> dict[str, str]:
        passage = parse_object(self._lines[number], f"{self.folder / TEXTS_FILE}, line {number + 1}", PASSAGE)
        return {key: passage[key] for key in PASSAGE}


def _sum_of(vectors_ND: Tensor) -> str:
    """SHA-256 of all numbers."""
    return hashlib.sha256(vectors_ND.flatten().view(torch.uint8).numpy().data).hexdigest()


def _unit_vectors(model: LLM2Vec, entries: list[str] | list[list[str]], side: TextSide, batch_size: int = 32) -> Tensor:
    progress = side == "document"
    vectors_ND = model.encode(entries, batch_size, show_progress_bar=progress, convert_to_tensor=True, side=side)
    return normalize(cast(Tensor, vectors_ND), dim=-1)
