"""What the space of embeddings looks like while training: how close, how spread, how many dimensions, by source.

A loss can fall while the vectors crowd into a narrow cone or into a few dimensions; these figures tell. All are taken
between unit vectors q, p, n of held-out queries, positives and hard negatives, each different text being one vector.
Documents are the positives alone, so that stages with and without hard negatives compare:

    alignment             mean |q - p|^2 over rows, which is 2 - 2 * cosine_positive; lower is closer
    uniformity_query      log mean exp(-2 |q - q'|^2) over pairs of queries; lower is more evenly spread
    uniformity_document   the same over pairs of documents
    effective_rank        exp of the entropy of the centred documents' singular values, divided by their sum
    anisotropy            mean cosine over pairs of documents; 0 where directions are even, 1 where all are one
    cosine_positive       mean cosine of a query and its positive
    cosine_hard_negative  mean cosine of a query and its hard negatives
    cosine_random         mean cosine of a query and another row's document
    beats_hard_negatives  share of rows whose positive is closer than each of the row's hard negatives
    recall_at_1           share of rows whose positive is closer than all other documents

Sources: alignment and uniformity, Wang and Isola 2020 (arXiv 2005.10242), with their alpha = 2 and t = 2; effective
rank, Roy and Vetterli 2007 (EUSIPCO); anisotropy, Ethayarajh 2019 (arXiv 1909.00512). `embedding_diagnostics: true`
logs them at each evaluation of a run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec.data.rows import TrainingRows
from llm2vec.distributed import sum_over_ranks
from llm2vec.llm2vec import LLM2Vec
from llm2vec.processes import rank, world_size
from llm2vec.types import InstructedText, RunEnds, TextSide

#: Equal bins of a histogram, over cosines from -1 to 1.
NUM_BINS = 100

#: Texts that a rank encodes at once. Blocks do not depend on the number of ranks, so neither does any vector's bits.
BLOCK_TEXTS = 64

#: Rows of a block of cosines.
BLOCK_ROWS = 512

#: Mean squared distance from the centre below which float32 vectors are one point: what is left is rounding.
ONE_POINT = 1e-12


class RowTexts(NamedTuple):
    """Which vectors are whose: places among the different texts' vectors."""

    query_B: Tensor  #: of each row's query
    positive_B: Tensor  #: of each row's positive
    negative_BK: Tensor  #: of each row's hard negatives; K may be 0

    def of(self, rows: slice) -> RowTexts:
        """Those of some rows."""
        return RowTexts(self.query_B[rows], self.positive_B[rows], self.negative_BK[rows])


class EmbeddingDiagnostics:
    """The figures of a model on held-out rows, over all of them and, where there are several sources, by source.

    Every rank encodes its share of the texts on `device`, which must know float64; all of them learn all figures. Of
    each source two rows are needed. Histograms go to `file`, a line a call; a resumed run (`goes_on`) adds to it,
    else the first call starts it anew.
    """

    def __init__(
        self, model: LLM2Vec, rows: TrainingRows, device: torch.device, file: Path, *, goes_on: bool = False
    ) -> None:
        self.model, self.device, self.file = model, device, file
        examples = [rows[i] for i in range(len(rows))]
        place: dict[InstructedText, int] = {}

        def places(texts: list[InstructedText]) -> list[int]:
            return [place.setdefault(text, len(place)) for text in texts]

        self._rows = RowTexts(
            torch.tensor(places([row.query for row in examples]), device=device),
            torch.tensor(places([row.positive for row in examples]), device=device),
            torch.tensor([places(list(row.negatives)) for row in examples], dtype=torch.long, device=device),
        )
        self._texts = list(place)
        of_side = {side: [i for i, text in enumerate(place) if text.side == side] for side in get_args(TextSide)}
        self._blocks = [
            (side, numbers[start : start + BLOCK_TEXTS])
            for side, numbers in of_side.items()
            for start in range(0, len(numbers), BLOCK_TEXTS)
        ]
        ends = np.cumsum(rows.sizes).tolist()
        places_of = zip(rows.sources, rows.sizes, ends, strict=True)
        self._sources = {source.name: slice(end - size, end) for source, size, end in places_of}
        self._file_mode = "a" if goes_on else "w"

    def __call__(self, step: int) -> dict[str, float]:
        """The figures under their names, those of a source as `name/source`; a line of histograms goes to the file."""
        vectors_ND = self._vectors()
        figures, of_all = measure(vectors_ND, self._rows)
        of_sources: dict[str, dict[str, list[int]]] = {}
        if len(self._sources) > 1:
            for source, rows in self._sources.items():
                own, of_sources[source] = measure(vectors_ND, self._rows.of(rows))
                figures |= {f"{name}/{source}": value for name, value in own.items()}
        if rank() == 0:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open(self._file_mode, encoding="utf-8") as out:
                    out.write(json.dumps({"step": step, "all": of_all, "sources": of_sources}) + "\n")
            except OSError as error:
                raise RunEnds(f"{self.file} could not be written ({error}).", code=1) from error
            self._file_mode = "a"
        return figures

    def _vectors(self) -> Tensor:
        """Unit vectors of the different texts, in float64; ranks encode in turns and add up what they have."""
        vectors_ND = torch.zeros(len(self._texts), self.model.model.config.hidden_size, device=self.device)
        for side, block in self._blocks[rank() :: world_size()]:
            texts = [[self._texts[i].instruction, self._texts[i].text] for i in block]
            encoded = self.model.encode(texts, show_progress_bar=False, device=self.device, side=side)
            vectors_ND[block] = torch.as_tensor(encoded).to(self.device)
        return F.normalize(sum_over_ranks(vectors_ND).double(), dim=-1)


def measure(vectors_ND: Tensor, rows: RowTexts) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Figures of some rows, from unit vectors of different texts; and histograms: counts of cosines in `NUM_BINS` equal
    bins from -1 to 1, of a query with its `positive`, its `hard_negative`s, and at `random` another row's document.

    Figures of pairs are left out where there are not two different texts to make one, those of hard negatives where
    rows have none. A comparison that ends level is lost. Pairs are never held all at once.
    """
    query_BD = vectors_ND[rows.query_B]
    positive_B = (query_BD * vectors_ND[rows.positive_B]).sum(dim=1)
    figures = {
        "alignment": float((query_BD - vectors_ND[rows.positive_B]).square().sum(dim=1).mean()),
        "cosine_positive": float(positive_B.mean()),
    }
    histograms = {"positive": histogram(positive_B)}
    if rows.negative_BK.shape[1]:
        negative_KB = torch.stack([(query_BD * vectors_ND[of_row_B]).sum(dim=1) for of_row_B in rows.negative_BK.T])
        figures["cosine_hard_negative"] = float(negative_KB.mean())
        figures["beats_hard_negatives"] = float((positive_B > negative_KB).all(dim=0).double().mean())
        histograms["hard_negative"] = histogram(negative_KB)
    queries_QD = vectors_ND[rows.query_B.unique()]
    documents, column_B = rows.positive_B.unique(return_inverse=True)
    documents_MD = vectors_ND[documents]
    if len(queries_QD) > 1:
        figures["uniformity_query"] = uniformity(queries_QD)
    if len(documents_MD) > 1:
        figures["uniformity_document"] = uniformity(documents_MD)
        figures["effective_rank"] = effective_rank(documents_MD)
        figures["anisotropy"] = mean_cosine(documents_MD)
        figures["cosine_random"], figures["recall_at_1"], histograms["random"] = _search(
            query_BD, documents_MD, column_B
        )
    return figures, histograms


def uniformity(unit_ND: Tensor) -> float:
    """log mean exp(-2 |x - y|^2) over pairs of different rows: from -4 or so for even directions to 0 for one point."""
    total = sum(float((4 * (block @ unit_ND.T) - 4).exp().sum()) for block in unit_ND.split(BLOCK_ROWS))
    num_rows = len(unit_ND)
    return math.log((total - num_rows) / (num_rows * (num_rows - 1)))  # a row's pair with itself adds exp(0)


def mean_cosine(unit_ND: Tensor) -> float:
    """Mean cosine over pairs of different rows, from the length of their sum."""
    num_rows = len(unit_ND)
    return (float(unit_ND.sum(dim=0).square().sum()) - num_rows) / (num_rows * (num_rows - 1))


def effective_rank(vectors_ND: Tensor) -> float:
    """exp of the entropy of the centred vectors' singular values over their sum: 1 to min(D, N - 1); 0 for one point.

    Singular values are the roots of the smaller Gram matrix's eigenvalues, many times as fast as a decomposition;
    those that rounding may have made are left out.
    """
    centred_ND = vectors_ND - vectors_ND.mean(dim=0)
    spread = centred_ND.square().sum(dim=1).mean()
    if not spread > ONE_POINT:
        return 0.0 if spread.isfinite() else math.nan
    small = centred_ND if len(centred_ND) < centred_ND.shape[1] else centred_ND.T
    squared = torch.linalg.eigvalsh(small @ small.T)
    rounding = len(squared) * torch.finfo(squared.dtype).eps * squared[-1]
    singular = squared[squared > rounding].sqrt()
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def histogram(cosines: Tensor) -> list[int]:
    """How many cosines, of any shape, lie in each of `NUM_BINS` equal bins from -1 to 1; what is no number, in none."""
    finite = cosines[cosines.isfinite()]
    bins = ((finite + 1) * (NUM_BINS / 2)).long().clamp(0, NUM_BINS - 1)
    return torch.bincount(bins, minlength=NUM_BINS).tolist()


def _search(query_BD: Tensor, documents_MD: Tensor, column_B: Tensor) -> tuple[float, float, list[int]]:
    """Of queries with all documents but their own (`column_B`): the mean cosine; the share of queries that are closer
    to their own; and the histogram."""
    total, hits = 0.0, 0
    counts = torch.zeros(NUM_BINS, dtype=torch.long)
    for rows in torch.arange(len(query_BD), device=query_BD.device).split(BLOCK_ROWS):
        cosine = query_BD[rows] @ documents_MD.T
        others = torch.ones_like(cosine, dtype=torch.bool).scatter(1, column_B[rows].unsqueeze(1), False)
        own = cosine[~others]
        hits += int((own > cosine.masked_fill(~others, -torch.inf).amax(dim=1)).sum())
        total += float(cosine.sum() - own.sum())
        counts += torch.tensor(histogram(cosine[others]))
    return total / (len(query_BD) * (len(documents_MD) - 1)), hits / len(query_BD), counts.tolist()
