"""How far stock libraries are from this project: vectors and tokens of probe texts by both, compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import load_tokenizer, open_sentence_transformer
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.model.stock_form import StockForm, compare_text
from llm2vec.text.probe_texts import probe_ids
from llm2vec.types import InstructedText, TextSide, UserError

#: Most that a number of a unit vector may differ in float32.
TOLERANCE = 1e-5


class Proof(NamedTuple):
    """How far stock libraries are from this project, over the probe texts."""

    difference: float  #: Largest difference of a number of a unit vector, in float32
    #: The same of texts whose mean reads the blank before them; None = there are none.
    stray_difference: float | None
    rounding: float  #: Lowest cosine between vectors by the stored weights and by float32 weights

    def sentences(self, folder: Path, dtype: str) -> list[str]:
        """The same in words, of what was exported to `folder`."""
        same = "stock sentence-transformers gives the checkpoint's vectors"
        said = [f"{folder}: {same} up to {self.difference:.1e} (float32)"]
        if self.stray_difference is not None:
            what = "under an instruction, where the mean reads the blank before a text"
            said.append(f"{what}, up to {self.stray_difference:.1e}")
        return [*said, f"stored in {dtype}: lowest cosine with the vectors by float32 weights {self.rounding:.7f}"]


def prove(
    folder: Path, form: StockForm, settings: EncoderSettings, texts: Sequence[InstructedText], exact: Tensor,
    stored: Tensor,
) -> Proof:  # fmt: skip
    """Load a written folder by stock sentence-transformers, in float32, and compare; other tokens are a `UserError`."""
    if probe_ids(row_tokenizer(load_tokenizer(str(folder)), settings)) != probe_ids(form.rows):
        raise UserError("the exported tokenizer renders this project's own template to other tokens.")
    stock = open_sentence_transformer(str(folder), dtype=torch.float32)
    difference, stray = compare_vectors(stock, form, texts, stored)
    rounding = 1.0 if torch.equal(exact, stored) else float((exact * stored).sum(dim=-1).min())
    return Proof(difference, stray, min(rounding, 1.0))


def compare_vectors(
    stock: Any, form: StockForm, texts: Sequence[InstructedText], vectors: Tensor
) -> tuple[float, float | None]:
    """Largest difference of a number from unit vectors [N, D]: of all texts but strays, and of strays.

    A stray is a text whose mean reads the blank before it, in stock libraries alone. A `UserError` where tokens are
    others, or a vector differs by `TOLERANCE` or more.
    """
    compared = [compare_text(stock, form, text) for text in texts]
    for comparison in compared:
        if comparison.difference is not None:
            raise UserError(f"stock sentence-transformers renders otherwise: {comparison.difference}.")
    prompts = [form.prompt(text.instruction, text.side) for text in texts]
    stock_ND = stock_vectors(stock, [text.text.strip() for text in texts], prompts)
    apart_N = (stock_ND - vectors).abs().amax(dim=-1)
    strays_N = torch.tensor([comparison.stray_blank for comparison in compared])
    difference, worst = float(apart_N[~strays_N].max()), int(apart_N.masked_fill(strays_N, -1).argmax())
    if not difference < TOLERANCE:
        text = texts[worst]
        raise UserError(
            f"the vector of {text.text.strip()[:40]!r} by stock sentence-transformers differs from the checkpoint's by "
            f"{difference:.2g}; {TOLERANCE:g} is allowed in float32."
        )
    return difference, float(apart_N[strays_N].max()) if strays_N.any() else None


def in_groups(keys: Sequence[str], embed: Callable[[Any, list[int]], Tensor]) -> Tensor:
    """Vectors [N, D], those of a key at once: `embed` takes it and the places that have it."""
    vectors: list[Tensor] = [torch.empty(0)] * len(keys)
    for key in dict.fromkeys(keys):
        chosen = [i for i, own in enumerate(keys) if own == key]
        for i, vector in zip(chosen, embed(key, chosen), strict=True):
            vectors[i] = vector
    return torch.stack(vectors)


def encode_texts(model: LLM2Vec, texts: Sequence[InstructedText]) -> Tensor:
    """Vectors [N, D] of texts by `LLM2Vec.encode`, float32 on the CPU, not normalised unless the model does."""

    def embed(side: TextSide, chosen: list[int]) -> Tensor:
        pairs = [[texts[i].instruction, texts[i].text] for i in chosen]
        return torch.as_tensor(model.encode(pairs, show_progress_bar=False, side=side)).float().cpu()

    return in_groups([text.side for text in texts], embed)


def stock_vectors(stock: Any, texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Vectors [N, D] of texts under their prompts by a SentenceTransformer, float32 on the CPU."""

    def embed(prompt: str, chosen: list[int]) -> Tensor:
        strings = [texts[i] for i in chosen]
        made: Tensor = stock.encode(strings, prompt=prompt, convert_to_tensor=True, show_progress_bar=False)
        return made.float().cpu()

    return in_groups(prompts, embed)
