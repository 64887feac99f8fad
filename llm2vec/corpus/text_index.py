"""An index of one's own texts: their vectors, and exact search in them, block by block.

    vectors.safetensors   `vectors` [N, D] of unit length; `starts` [N + 1]: the byte on which each text's line begins
    texts.jsonl           a passage a line: `where`, `text`, `title`
    index.json            the model and its hash, the size of the other files

The folder is written aside and renamed. Vectors keep about as many bits as the model computes with: float32 for float32
weights, float16 (11 significant bits, where bfloat16 has 8) for the others.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import mmap
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm2vec.choice import ModelChoice
from llm2vec.corpus.passages import Passage, read_passages
from llm2vec.corpus.queue import LOCK_FILE, alone_in
from llm2vec.corpus.search import blocks, from_keys, top_k
from llm2vec.files import read_object, write_json
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.settings import EncoderSettings
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

VECTORS_FILE, TEXTS_FILE, INDEX_FILE = "vectors.safetensors", "texts.jsonl", "index.json"

#: A passage is at most so long. Much longer ones are about several things, which one vector tells apart badly.
MAX_PASSAGE_CHARACTERS = 1000
#: A token stands for at least about so many characters, in prose and in code.
CHARACTERS_A_TOKEN = 3


class Hit(NamedTuple):
    """A passage that was found, and its cosine similarity to the query."""

    score: float
    passage: Passage


class TextIndex:
    """An index that `build_index` has written.

    Attributes:
        folder: where it lies.
        encoder: the model that made it, as it was named then.
        revision: that model's hash.
    """

    def __init__(self, folder: Path) -> None:
        """Open an index; vectors and texts stay on disk, and are these even if the index is replaced meanwhile.

        Raises:
            UserError: there is none, or it was cut short.
        """
        self.folder = folder
        _restore(folder)
        if not (folder / INDEX_FILE).is_file():
            raise UserError(f"{folder} is no index: it holds no {INDEX_FILE}.")
        content = _read_about(folder)
        for name, size in content["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise UserError(f"{folder} was cut short: {name} is not {size:,} bytes long; make the index again.")
        encoder = content["encoder"]
        self.encoder = ModelChoice(encoder["base"], tuple(encoder["adapters"]), encoder["torch_dtype"])
        self.revision: str = content["revision"]
        with (folder / TEXTS_FILE).open("rb") as texts:
            self._texts = mmap.mmap(texts.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._vectors = safe_open(folder / VECTORS_FILE, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{folder / VECTORS_FILE} cannot be read ({error}); make the index again.") from error
        self._starts = self._vectors.get_tensor("starts")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def load_model(self, encoder: ModelChoice | None = None) -> LLM2Vec:
        """The model that made the index.

        Args:
            encoder: where it lies now; None = where it lay then.

        Raises:
            UserError: it is another one, or was trained further since.
        """
        encoder = encoder or self.encoder
        if encoder.revision() != self.revision:
            raise UserError(
                f"{self.folder} was made by another model than {' + '.join((encoder.base, *encoder.adapters))} is now "
                f"(or by other settings or another dtype of it), so vectors do not compare; make the index again."
            )
        return encoder.load()

    def search(self, model: LLM2Vec, queries: Sequence[str], k: int, instruction: str = "") -> list[list[Hit]]:
        """The best passages for each query, best first; among equal scores the earlier passage.

        Args:
            model: from `load_model`.
            queries: texts.
            k: how many passages a query; fewer where the index has fewer.
            instruction: put before the queries; empty = none.
        """
        entries = [[instruction, query] for query in queries] if instruction else list(queries)
        vectors_QD = _unit_vectors(model, entries, "query")
        if torch.cuda.is_available():
            vectors_QD = vectors_QD.cuda()
        k = min(k, len(self))
        keys = top_k(vectors_QD, self._blocks(), lambda q_QD, d_ND: q_QD @ d_ND.float().T, k).cpu()
        scores, numbers = (part.tolist() for part in from_keys(keys))
        return [
            [Hit(score, self._passage(number)) for score, number in zip(*row, strict=True)]
            for row in zip(scores, numbers, strict=True)
        ]

    def _passage(self, number: int) -> Passage:
        start, end = self._starts[number : number + 2].tolist()
        return Passage(**json.loads(self._texts[start:end]))

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        vectors = self._vectors.get_slice("vectors")
        for block in blocks(len(self)):
            yield block.start, vectors[block.start : block.stop]


def build_index(source: Path, folder: Path, encoder: ModelChoice, batch_size: int = 32) -> TextIndex:
    """Index a folder of text files or a JSONL file; an index that is there is replaced once the new one is whole.

    Args:
        source: as in `passages.read_passages`.
        folder: where the index goes.
        encoder: the model.
        batch_size: as in `LLM2Vec.encode`.

    Raises:
        UserError: `folder` is something else than an index, cannot be written or is being written by another process,
            or source or model cannot be read.
    """
    _restore(folder)
    _check_replaceable(folder)
    encoder = encoder.resolved()
    revision, settings = encoder.revision(), encoder.settings()
    passages = read_passages(source, passage_characters(settings))
    logger.info("%d passages of %s", len(passages), source)
    aside, _ = _places_aside(folder.resolve())
    with alone_in(aside, "indexing"):
        try:
            model = encoder.load()
            texts = [passage.embedded for passage in passages]
            vectors_ND = _unit_vectors(model, texts, "document", batch_size, progress=True)
            stored_ND = vectors_ND if encoder.torch_dtype == "float32" else vectors_ND.half()
            about = {
                "encoder": dataclasses.asdict(encoder),
                "revision": revision,
                "settings": dataclasses.asdict(model.settings),
                "source": str(source.resolve()),
                "passages": len(passages),
                "dimension": stored_ND.shape[1],
                "dtype": str(stored_ND.dtype).removeprefix("torch."),
            }
            _write(folder, stored_ND, passages, about)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return TextIndex(folder)


def passage_characters(settings: EncoderSettings) -> int:
    """Most characters of a passage: no more than the model surely reads."""
    tokens = min(settings.max_length, settings.doc_max_length or settings.max_length)
    return min(MAX_PASSAGE_CHARACTERS, CHARACTERS_A_TOKEN * tokens)


def _unit_vectors(
    model: LLM2Vec, entries: Sequence[Any], side: Any, batch_size: int = 32, progress: bool = False
) -> Tensor:
    vectors_ND = model.encode(entries, batch_size, show_progress_bar=progress, convert_to_tensor=True, side=side)
    assert isinstance(vectors_ND, Tensor)
    return F.normalize(vectors_ND, dim=-1)


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but an index: all that is in it will be removed."""
    if not folder.exists():
        return
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if INDEX_FILE not in names:
        raise UserError(f"{folder} is there and is no index; give a folder that is not there yet.")
    if other := sorted(names - {INDEX_FILE, TEXTS_FILE, VECTORS_FILE, LOCK_FILE}):
        raise UserError(f"{folder} holds {other[0]!r}, which is of no index; give a folder that is not there yet.")
    _read_about(folder)


def _read_about(folder: Path) -> dict[str, Any]:
    """What a folder's `index.json` says; other programs give files of theirs this name, too."""
    content = read_object(folder / INDEX_FILE)
    files, encoder = content.get("files"), content.get("encoder")
    if not (
        isinstance(content.get("revision"), str)
        and isinstance(files, dict) and files.keys() == {TEXTS_FILE, VECTORS_FILE}
        and isinstance(encoder, dict) and {"base", "adapters", "torch_dtype"} <= encoder.keys()
    ):  # fmt: skip
        raise UserError(f"{folder} is no index: its {INDEX_FILE} is another program's.")
    return content


def _places_aside(folder: Path) -> tuple[Path, Path]:
    """Where a new index is written, and where the old one waits while the new one takes its place."""
    return folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.before")


def _restore(folder: Path) -> None:
    """Put the old index back where a process was killed before the new one had its place."""
    folder = folder.resolve()
    if folder.exists():
        return
    _, before = _places_aside(folder)
    if (before / INDEX_FILE).is_file():
        before.rename(folder)


def _write(folder: Path, vectors_ND: Tensor, passages: Sequence[Passage], about: dict[str, Any]) -> None:
    """Write an index aside, where this process is alone, and put it where it belongs."""
    folder = folder.resolve()
    aside, before = _places_aside(folder)
    for file in aside.iterdir():  # of a process that was killed
        if file.name != LOCK_FILE:
            file.unlink()
    lines = [json.dumps(passage._asdict(), ensure_ascii=False).encode() + b"\n" for passage in passages]
    starts = torch.tensor([0, *map(len, lines)]).cumsum(0)
    (aside / TEXTS_FILE).write_bytes(b"".join(lines))
    save_file({"vectors": vectors_ND.contiguous(), "starts": starts}, aside / VECTORS_FILE)
    files = {name: (aside / name).stat().st_size for name in (TEXTS_FILE, VECTORS_FILE)}
    write_json(aside / INDEX_FILE, {**about, "files": files})
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    aside.rename(folder)  # with the lock, so that nobody else begins to write there before it has its new name
    (folder / LOCK_FILE).unlink()
    shutil.rmtree(before, ignore_errors=True)
