"""Writes an archive of the released layout and size, of windows out of the standard library's source text.

    python tests/make_archive.py FOLDER --num_rows 1500000

1.5 M rows make 3.6 GB, as the released archive has. The lengths are spread as those of real rows are: queries of 100
characters in the mean, documents of 1,100, a few of them ten times as long.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

import numpy as np

from llm2vec.data.sources import e5_sources

#: Shares of the 14 sources, in their order: uneven, as the released ones are.
SHARES = (18, 6, 2, 7, 6, 2, 3, 24, 5, 6, 5, 6, 6, 4)
MEAN_CHARACTERS = {"query": 100, "positive": 1100, "negative": 1100}
#: Spread of the lengths' logarithm.
SIGMA = 0.6
ROWS_AT_ONCE = 10_000


def source_text(characters: int = 20_000_000) -> str:
    """Text enough that hardly two windows are alike."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    parts: list[str] = []
    total = 0
    for file in files:
        parts.append(" ".join(file.read_text(encoding="utf-8", errors="ignore").split()))
        total += len(parts[-1])
        if total > characters:
            break
    return " ".join(parts)


def write_archive(folder: Path, num_rows: int, seed: int = 0) -> list[Path]:
    """One JSONL file for each of the 14 sources; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text, generator = source_text(), np.random.default_rng(seed)
    files = []
    for source, share in zip(e5_sources(), SHARES, strict=True):
        files.append(folder / source.file)
        left = num_rows * share // sum(SHARES)
        with files[-1].open("w", encoding="utf-8") as out:
            while left > 0:
                rows = min(left, ROWS_AT_ONCE)
                columns = [_windows(text, rows, mean, generator) for mean in MEAN_CHARACTERS.values()]
                out.writelines(
                    f'{{"query": {query}, "positive": {positive}, "negative": [{negative}]}}\n'
                    for query, positive, negative in zip(*columns, strict=True)
                )
                left -= rows
    return files


def _windows(text: str, count: int, mean: int, generator: np.random.Generator) -> list[str]:
    """Random pieces of a text, as JSON strings."""
    lengths = generator.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, count).astype(np.int64) + 8
    starts = generator.integers(0, len(text) - 20 * mean, count)
    pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
    return [json.dumps(f"w {text[start : start + length]}", ensure_ascii=False) for start, length in pairs]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num_rows", type=int, default=1_500_000)
    arguments = parser.parse_args()
    write_archive(arguments.folder, arguments.num_rows)
