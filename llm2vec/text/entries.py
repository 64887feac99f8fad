"""What a caller hands to an encoder, read in one place: texts or [instruction, text] pairs, sizes, a device."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from llm2vec.files import in_short, read_object
from llm2vec.types import InstructedText, Texts, TextSide, UserError, in_one_sentence

#: The paper's instructions. In a clone a link to `test_configs/mteb/`, where the release's commands name the file.
INSTRUCTIONS_FILE = Path(__file__).parents[1] / "evaluation/task_to_instructions.json"
#: Texts of a generator that `encode` keeps at a time.
TEXTS_KEPT = 1 << 14


def check_encoding(
    sentences: Any, batch_size: Any, device: Any, side: Any, truncate_dim: Any, hidden_size: int
) -> tuple[list[InstructedText], torch.device | None]:
    """The arguments of `LLM2Vec.encode`, read: its texts, and its device if one is named; else a `UserError`."""
    if not _is_whole(batch_size) or batch_size < 1:
        raise UserError(f"batch_size is {in_short(batch_size)}; give a number above 0.")
    if truncate_dim is not None and not (_is_whole(truncate_dim) and 1 <= truncate_dim <= hidden_size):
        allowed = f"it must lie between 1 and the hidden size {hidden_size}"
        raise UserError(f"truncate_dim is {in_short(truncate_dim)}; {allowed}.")
    if device is not None:
        named = in_short(device)
        # No device's name, no such device, a library without CUDA: a type each.
        with in_one_sentence(lambda why: f"device is {named}, which cannot be used here ({why})."):
            device = torch.device(device)
            torch.empty(1, device=device).cpu()  # refuses `meta`, and what is not there
    return as_instructed(sentences, side), device


def texts_at_once(sentences: Any) -> Iterator[Any]:
    """What `encode` was given: as a whole, or of a generator so many texts at a time that few are kept."""
    if not isinstance(sentences, Iterator):
        yield sentences
        return
    part = list(islice(sentences, TEXTS_KEPT))
    yield part
    while part := list(islice(sentences, TEXTS_KEPT)):
        yield part


def instruction_of(task: str) -> str:
    """The paper's instruction for a task of MTEB; a `UserError` with the nearest names where it has none."""
    known = read_object(INSTRUCTIONS_FILE)
    if task not in known:
        near = difflib.get_close_matches(task, known, n=3)
        nearest = f" (nearest: {', '.join(near)})" if near else ""
        raise UserError(f"task is {in_short(task)}, which has no instruction{nearest}; give the instruction itself.")
    return str(known[task])


def under(instruction: str, sentences: Any) -> Any:
    """Texts as [instruction, text] pairs; of a generator, a generator."""
    if not _is_list(sentences):
        return sentences  # for `encode` to refuse
    texts = [sentences] if isinstance(sentences, str) else sentences
    pairs = ([instruction, text] for text in texts)
    return pairs if isinstance(sentences, Iterator) else list(pairs)


def _is_list(sentences: Any) -> bool:
    """Whether they can be read one by one: of a mapping or a table that would be keys, and a set has no order."""
    unlike = isinstance(sentences, bytes | Mapping | set | frozenset) or hasattr(sentences, "columns")
    return isinstance(sentences, Iterable) and not unlike


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_instructed(texts: Texts, side: TextSide | None = None) -> list[InstructedText]:
    """Texts or [instruction, text] pairs as InstructedTexts; arguments as in `LLM2Vec.encode`, else a `UserError`."""
    if not isinstance(side, str | None) or side not in (None, *get_args(TextSide)):
        raise UserError(f"side is {in_short(side)}; allowed: {', '.join(get_args(TextSide))}, None.")
    texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
    if isinstance(texts, str) or (_is_pair(texts) and len(list(texts)) == 3):
        texts = [texts]  # type: ignore[list-item]  # one entry, of either kind
    if not _is_list(texts):
        given = f"a {type(texts).__name__}" if hasattr(texts, "columns") else in_short(texts)
        raise UserError(f"sentences is {given}; strings or [instruction, text] pairs are needed.")
    instructed = []
    entry: Any
    for i, entry in enumerate(texts):
        if isinstance(entry, str):
            instruction, text = "", entry
        elif _is_pair(entry):
            instruction, text = entry[0] or "", entry[1]
        else:
            raise UserError(f"sentences[{i}] is {in_short(entry)}; a string or an [instruction, text] pair is needed.")
        instructed.append(InstructedText(instruction, text, side or ("query" if instruction.strip() else "document")))
    return instructed


def _is_pair(entry: Any) -> bool:
    """Whether an entry is [instruction, text], or that and a whole number, which upstream's examples write there.

    None for an instruction is none, as upstream reads it.
    """
    if not isinstance(entry, list | tuple | np.ndarray) or len(entry) not in (2, 3):
        return False
    instruction, text, *number = entry
    return isinstance(instruction, str | None) and isinstance(text, str) and all(map(_is_whole, number))
