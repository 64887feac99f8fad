"""Make the quickstart's corpus from the docstrings of the installed Python packages; nothing is downloaded.

    python experiments/make_docstrings.py --output_dir cache/docstrings

Writes training pairs (`train/docstrings.jsonl`) and a held-out retrieval task (`eval/DocstringRetrieval/`).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from llm2vec.cli import run_command
from llm2vec.quickstart.docstrings import installed_roots, write_corpus


def main(argv: Sequence[str]) -> None:
    """Read the flags, write the corpus, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("cache/docstrings"), help="folder to write")
    flags = parser.parse_args(argv)
    started = time.perf_counter()
    manifest = write_corpus(flags.output_dir, installed_roots())
    for name, count in manifest["counts"].items():
        print(f"{name:>20} {count:>8,}")
    print(f"{flags.output_dir} is ready ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    run_command(main)
