r"""Encode a whole corpus to Parquet files of vectors.

    llm2vec encode corpus.jsonl output/vectors --model output/stage_II/...
    llm2vec encode BeIR/scifact output/scifact --subset corpus --split corpus --id_column _id \
        --model ... --torch_dtype bfloat16 --dtype float16
    llm2vec encode folder/of/parquet output/vectors --model ... --engine ray --num_workers 64

Writes OUTPUT/part-00000.parquet, ... with `id` and `vector`, rows in the input's order, and OUTPUT/_manifest.json.
Started again with the same arguments, it does only what is missing; another model, setting or input is refused. Every
GPU of this machine gets a worker (without any: one process on the CPU); `--engine ray` uses a Ray cluster instead,
whose machines must all see OUTPUT and the model under the same path.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import get_args

from llm2vec import cli
from llm2vec.choice import add_model_flags, chosen_model
from llm2vec.files import check_unicode
from llm2vec.types import TextSide, VectorDtype


def main(argv: Sequence[str]) -> None:
    """Encode what is not encoded yet, and say how long it took."""
    started = time.monotonic()
    parser = cli.parser("encode", __doc__)
    parser.add_argument("input", help=".jsonl or .parquet file, a folder of such files, or a dataset on the hub")
    parser.add_argument("output", type=cli.path, help="folder to write")
    add_model_flags(parser, torch_dtype=True)
    parser.add_argument("--side", choices=get_args(TextSide), default="document", help="what the texts are (document)")
    parser.add_argument("--instruction", default="", help="put before every text (none)")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--id_column", help="default: id; without such a column, rows are numbered from 0")
    parser.add_argument("--subset", help="of a dataset on the hub")
    parser.add_argument("--split", help="of a dataset on the hub (train)")
    parser.add_argument("--batch_size", type=cli.positive, default=32, help="rows of 128 tokens a forward pass (32)")
    parser.add_argument("--shard_rows", type=cli.positive, default=10_000, help="rows of a file (10000)")
    parser.add_argument("--dtype", choices=get_args(VectorDtype), default="float32", help="of the vectors (float32)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--num_workers", type=cli.positive, help="default: one a GPU, or one")
    args = parser.parse_args(argv)
    from llm2vec.corpus.encoding import CorpusEncoding, encode_corpus, encode_locally  # with torch: seconds
    from llm2vec.corpus.ray import check_ray_installed, encode_on_ray
    from llm2vec.corpus.rows import open_corpus

    check_unicode(args.instruction, "--instruction", "command line")
    if args.engine == "ray":
        check_ray_installed()
    encoder = chosen_model(args).resolved()
    corpus = open_corpus(
        args.input, text_column=args.text_column, id_column=args.id_column, subset=args.subset, split=args.split
    )
    encoding = CorpusEncoding(
        corpus, args.output.resolve(), encoder, encoder.revision(), side=args.side, instruction=args.instruction,
        shard_rows=args.shard_rows, dtype=args.dtype, batch_size=args.batch_size,
    )  # fmt: skip
    rows = encode_corpus(encoding, encode_on_ray if args.engine == "ray" else encode_locally, args.num_workers)
    print(f"{args.output}: complete; {rows:,} rows encoded in {time.monotonic() - started:.0f} s", file=sys.stderr)
