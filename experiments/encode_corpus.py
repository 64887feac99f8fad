"""Encode a whole corpus to Parquet files of vectors.

    python experiments/encode_corpus.py corpus.jsonl output/vectors --model output/stage_II/...
    python experiments/encode_corpus.py BeIR/scifact output/scifact --subset corpus --split corpus --id_column _id \\
        --model ... --torch_dtype bfloat16 --dtype float16
    python experiments/encode_corpus.py folder/of/parquet output/vectors --model ... --engine ray --num_workers 64

Writes OUTPUT/part-00000.parquet, ... with `id` and `vector`, rows in the input's order, and OUTPUT/_manifest.json.
Started again with the same arguments, it does only what is missing; another model, setting or input is refused. Every
GPU of this machine gets a worker (without any: one process on the CPU); `--engine ray` uses a Ray cluster instead,
whose machines must all see OUTPUT and the model under the same path.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from llm2vec.choice import add_model_flags, chosen_model
from llm2vec.cli import user_errors_in_one_sentence
from llm2vec.corpus.encoding import CorpusEncoding, encode_corpus, encode_locally
from llm2vec.corpus.ray import check_ray_installed, encode_on_ray
from llm2vec.corpus.rows import check_unicode, open_corpus
from llm2vec.types import TextSide, UserError, VectorDtype

ENGINES = {"local": encode_locally, "ray": encode_on_ray}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help=".jsonl or .parquet file, a folder of such files, or a dataset on the hub")
    parser.add_argument("output", type=Path, help="folder to write")
    add_model_flags(parser, torch_dtype=True)
    parser.add_argument("--side", choices=get_args(TextSide), default="document", help="what the texts are (document)")
    parser.add_argument("--instruction", default="", help="put before every text (none)")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--id_column", help="default: id; without such a column, rows are numbered from 0")
    parser.add_argument("--subset", help="of a dataset on the hub")
    parser.add_argument("--split", help="of a dataset on the hub (train)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of 128 tokens a forward pass (32)")
    parser.add_argument("--shard_rows", type=int, default=10_000, help="rows of a file (10000)")
    parser.add_argument("--dtype", choices=get_args(VectorDtype), default="float32", help="of the vectors (float32)")
    parser.add_argument("--engine", choices=list(ENGINES), default="local")
    parser.add_argument("--num_workers", type=int, help="default: one a GPU, or one")
    args = parser.parse_args(argv)
    for option in ("batch_size", "shard_rows", "num_workers"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}; give a number above 0.")
    check_unicode(args.instruction, "--instruction")
    if args.engine == "ray":
        check_ray_installed()
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    started, args = time.monotonic(), parse_args(argv)
    encoder = chosen_model(args).resolved()
    corpus = open_corpus(
        args.input,
        text_column=args.text_column,
        id_column=args.id_column,
        subset=args.subset,
        split=args.split,
    )
    encoding = CorpusEncoding(
        corpus,
        args.output.resolve(),
        encoder,
        encoder.revision(),
        side=args.side,
        instruction=args.instruction,
        shard_rows=args.shard_rows,
        dtype=args.dtype,
        batch_size=args.batch_size,
    )
    rows = encode_corpus(encoding, ENGINES[args.engine], args.num_workers)
    print(f"{args.output}: complete; {rows:,} rows encoded in {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
