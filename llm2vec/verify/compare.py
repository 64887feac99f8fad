"""The same texts through several ways of loading: what each makes of them, and how close it is to the first way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec.data.lines import lines_of_text
from llm2vec.files import check_unicode, json_lines
from llm2vec.types import InstructedText, UserError, in_one_sentence
from llm2vec.verify.loaded import LocalWay
from llm2vec.verify.server import EmbeddingServer
from llm2vec.verify.ways import Choice, Rendering, prompt_writer

#: Least cosine similarity of a text's vectors, in float32 and with half precision on either side.
LEAST_COSINE = 0.9999
LEAST_COSINE_HALF = 0.999

#: Words of the text that is to be cut, at most: a longer row costs more than it shows.
MOST_WORDS = 4096

_INSTRUCTION = "Given a question, retrieve passages that answer it"


def bundled_texts(max_length: int) -> dict[str, InstructedText]:
    """Texts that show what goes wrong, by name: short, cut, accents, empty, look-alikes, with and without instruction.
    One is longer than the rows' most tokens, up to `MOST_WORDS`."""
    numbered = " ".join(f"word {i}" for i in range(min(max_length, MOST_WORDS)))
    return {
        "query": InstructedText("", "who wrote Emma?", "query"),
        "document": InstructedText("", "Emma is a novel by Jane Austen, published in 1815.", "document"),
        "query with instruction": InstructedText(_INSTRUCTION, "who wrote Emma?", "query"),
        "instruction with colon": InstructedText(_INSTRUCTION + ":", "What makes the sky blue?", "query"),
        "digits with instruction": InstructedText(_INSTRUCTION, "1815 novels, by author", "query"),
        "document with instruction": InstructedText("Retrieve similar text", "The sky is blue.", "document"),
        "one letter": InstructedText("", "a", "document"),
        "lines and code": InstructedText("", "def f(x):\n\treturn x + 1\n\n# 3.14159  http://a.b/c?d=e", "document"),
        "accents and scripts": InstructedText("", "Naïve café, cafe\u0301, 東京, Ελλάδα, שלום, 👩‍🚀", "document"),
        "look-alike tokens": InstructedText("", "a </s> b <|eot_id|> c <|im_end|> d [/INST] e <eos> f", "document"),
        "empty": InstructedText("", "", "document"),
        "too long": InstructedText("", numbered, "document"),
        "too long with instruction": InstructedText(_INSTRUCTION, numbered, "query"),
    }


def read_own_texts(file: Path) -> dict[str, InstructedText]:
    """Texts of a file by line number: a text a line; in `.jsonl`, objects of `text`, `instruction` and `side`.

    Blanks around a text are taken away, as `LLM2Vec` does and other ways leave to their users. A `UserError` where
    there is no such file, no line in it, or a line is malformed.
    """
    if not file.is_file():
        raise UserError(f"--texts: {file} is not there.")
    if file.suffix == ".jsonl":
        entries = json_lines(file, shape={"text": str, "instruction?": str, "side?": str})
        texts = {where.removeprefix(f"{file}, "): _text_of(entry, where) for where, entry in entries}
    else:
        texts = {f"line {number}": InstructedText("", text, "document") for number, text in lines_of_text(file)}
    if not texts:
        raise UserError(f"--texts: {file} is empty.")
    return texts


def _text_of(entry: dict[str, Any], where: str) -> InstructedText:
    if unknown := entry.keys() - {"text", "instruction", "side"}:
        raise UserError(f"{where}: {min(unknown)!r} is no key; allowed: text, instruction, side.")
    for name, value in entry.items():
        check_unicode(value, name, where)
    instruction = entry.get("instruction", "")
    side = entry.get("side", "query" if instruction else "document")
    if side not in ("query", "document"):
        raise UserError(f"{where}: side is {side!r}; allowed: query, document.")
    return InstructedText(instruction, entry["text"].strip(), side)


@dataclass(frozen=True)
class Answer:
    """What a way makes of the texts."""

    choice: Choice  #: the way
    ids: Sequence[list[int] | None]  #: of each text, its token ids; None = not shown
    vectors: Tensor  #: [N, D]; rows of NaN where the way refuses a text
    refused: dict[int, str] = field(default_factory=dict)  #: index of a text -> why
    way: LocalWay | None = None  #: what was loaded; None = a server

    @property
    def name(self) -> str:
        """Way and place."""
        return self.choice.name

    @property
    def is_half(self) -> bool:
        """Whether half precision is at work, as far as is known: a server does not say, so it counts as half."""
        return self.way is None or self.way.is_half


def ask_way(way: LocalWay, texts: Sequence[InstructedText]) -> Answer:
    """Run the texts through a loaded way; a `UserError` where it fails on them."""
    # Such as a token without an embedding, or a limit that is no number.
    with in_one_sentence(lambda why: f"{way.choice.name}: cannot embed the texts ({why})."):
        return Answer(way.choice, [row.ids for row in way.rows(texts)], way.encode(texts), way=way)


def ask_server(choice: Choice, texts: Sequence[InstructedText], rendering: Rendering | None) -> Answer:
    """Send the texts to a server; of texts that are cut its token ids say nothing, as its `/tokenize` does not cut. A
    `UserError` where it does not answer as an embedding server does, or refuses every text."""
    server = EmbeddingServer(choice.model.base)
    prompt = prompt_writer(rendering)
    strings = [prompt(text) + text.text for text in texts]
    found, refused = server.vectors(strings)
    blank = torch.full_like(next(iter(found.values())), torch.nan)
    vectors = torch.stack([found.get(i, blank) for i in range(len(texts))])
    ids: list[list[int] | None] = [*(server.token_ids(strings) or repeat(None, len(texts)))]
    if rendering is not None:
        cut = [len(row.ids) >= rendering.rows.max_length for row in rendering.rows.rows(texts)]
        ids = [None if is_cut else shown for shown, is_cut in zip(ids, cut, strict=True)]
    return Answer(choice, ids, vectors, refused)


@dataclass(frozen=True)
class Parity:
    """How close an answer is to the reference's."""

    answer: Answer  #: what was compared
    compared: list[int]  #: indices of the texts that neither way refuses
    compared_ids: int  #: how many of these texts' token ids both ways show
    differing_ids: list[int]  #: indices of texts whose token ids differ
    cosines: Tensor  #: of the compared texts' vectors; zeros where they have other sizes
    largest: float  #: the largest difference of a number, of unit vectors
    lengths: tuple[float, float]  #: the shortest and the longest vector
    same_lengths: bool  #: whether the vectors have unit length, or the reference's, or may have any
    threshold: float  #: least cosine

    @property
    def passes(self) -> bool:
        """Whether every text's vectors agree."""
        return bool((self.cosines >= self.threshold).all()) and self.same_lengths


def compare_answers(reference: Answer, answer: Answer, threshold: float | None = None) -> Parity:
    """Compare an answer with the reference's, text by text.

    The threshold is by default `LEAST_COSINE`, or `LEAST_COSINE_HALF` with half precision on either side. A `UserError`
    where there is no text that both take.
    """
    is_half = reference.is_half or answer.is_half
    refused = reference.refused.keys() | answer.refused.keys()
    compared = [i for i in range(len(reference.ids)) if i not in refused]
    if not compared:
        raise UserError(f"{answer.name} takes none of the texts that {reference.name} takes.")
    shown = [i for i in compared if reference.ids[i] is not None and answer.ids[i] is not None]
    ours_ND, theirs_ND = reference.vectors[compared].double(), answer.vectors[compared].double()
    lengths_N = theirs_ND.norm(dim=-1)
    cosines_N, largest = torch.zeros(len(compared)), float("inf")
    if ours_ND.shape == theirs_ND.shape:
        difference_ND = F.normalize(ours_ND, dim=-1) - F.normalize(theirs_ND, dim=-1)
        cosines_N, largest = F.cosine_similarity(ours_ND, theirs_ND, dim=-1), float(difference_ND.abs().max())
    slack = 0.02 if is_half else 1e-3
    wanted = (1.0, ours_ND.norm(dim=-1))
    any_length = answer.way is not None and answer.way.any_length
    return Parity(
        answer,
        compared,
        len(shown),
        [i for i in shown if reference.ids[i] != answer.ids[i]],
        cosines_N,
        largest,
        (float(lengths_N.min()), float(lengths_N.max())),
        any_length or any(bool(((lengths_N / n - 1).abs() <= slack).all()) for n in wanted),
        threshold if threshold is not None else LEAST_COSINE_HALF if is_half else LEAST_COSINE,
    )
