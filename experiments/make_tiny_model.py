"""Make the quickstart's model: a byte-level tokenizer learnt from a training file and a small random Llama.

    python experiments/make_tiny_model.py --train_file cache/docstrings/train/docstrings.jsonl \
        --output_dir output/quickstart/init

Writes a Hugging Face model folder; every run with the same file and flags writes the same weights.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm2vec.cli import positive, run_command
from llm2vec.files import json_lines, whole_folder
from llm2vec.quickstart.tiny import tiny_llama, train_tokenizer
from llm2vec.types import UserError


def main(argv: Sequence[str]) -> None:
    """Read the flags, learn the tokenizer, draw the weights, save both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", type=Path, default=Path("cache/docstrings/train/docstrings.jsonl"))
    parser.add_argument("--output_dir", type=Path, default=Path("output/quickstart/init"))
    parser.add_argument("--vocab_size", type=positive, default=4096)
    parser.add_argument("--hidden_size", type=positive, default=96)
    parser.add_argument("--num_layers", type=positive, default=3)
    parser.add_argument("--num_heads", type=positive, default=4)
    parser.add_argument("--intermediate_size", type=positive, default=256)
    parser.add_argument("--max_positions", type=positive, default=512)
    parser.add_argument("--seed", type=int, default=42)
    flags = parser.parse_args(argv)
    if not flags.train_file.is_file():
        raise UserError(f"{flags.train_file} does not exist: make it with experiments/make_docstrings.py first.")
    if flags.output_dir.exists():
        raise UserError(f"{flags.output_dir} exists: remove it or choose another --output_dir.")

    tokenizer = train_tokenizer(texts_of(flags.train_file), flags.vocab_size)
    model = tiny_llama(
        tokenizer,
        hidden_size=flags.hidden_size,
        num_layers=flags.num_layers,
        num_heads=flags.num_heads,
        intermediate_size=flags.intermediate_size,
        max_positions=flags.max_positions,
        seed=flags.seed,
    )
    with whole_folder(flags.output_dir) as aside:
        tokenizer.save_pretrained(aside)
        model.save_pretrained(aside)
    print(f"{flags.output_dir}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


def texts_of(file: Path) -> Iterator[str]:
    """The queries and positives of a file of training rows."""
    for where, row in json_lines(file):
        for key in ("query", "positive"):
            if not isinstance(row.get(key), str):
                raise UserError(f"{where}: a JSON object with a string `{key}` is needed.")
            yield row[key]


if __name__ == "__main__":
    run_command(main)
