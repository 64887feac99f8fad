r"""Encode a whole corpus to Parquet files of vectors.

    llm2vec encode corpus.jsonl output/vectors --model output/stage_II/...
    llm2vec encode BeIR/scifact output/scifact --subset corpus --split corpus --id_column _id \
        --model ... --torch_dtype bfloat16 --dtype float16
    llm2vec encode run.json output/vectors --model ...
    llm2vec encode folder/of/parquet output/vectors --model ... --engine ray --num_workers 64

The third encodes all texts of a config's rows, as the keys `guide` and `teacher_vectors` of Stage II and
`teacher_vectors` of Stage I want them, into a folder of OUTPUT for each side and instruction. A model of
sentence-transformers puts its own prompts before texts, and no instruction.

Writes OUTPUT/part-00000.parquet, ... with `id` and `vector`, rows in the input's order, and OUTPUT/_manifest.json.
Started again with the same arguments, it does only what is missing; another model, setting or input is refused. Every
GPU of this machine gets a worker (without any: one process on the CPU); `--engine ray` uses a Ray cluster instead,
whose machines must all see OUTPUT and the model under the same path.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from llm2vec import cli
from llm2vec.choice import add_model_flags, chosen_model
from llm2vec.files import check_unicode, read_object, write_text
from llm2vec.types import TextSide, UserError, VectorDtype


def main(argv: Sequence[str]) -> None:
    """Encode what is not encoded yet, and say how long it took."""
    started = time.monotonic()
    parser = cli.parser("encode", __doc__)
    parser.add_argument("input", help=".jsonl or .parquet file, folder of such files, dataset on the hub, or run.json")
    parser.add_argument("output", type=cli.path, help="folder to write")
    add_model_flags(parser, torch_dtype=True)
    parser.add_argument("--side", choices=get_args(TextSide), help="what the texts are (document)")
    parser.add_argument("--instruction", default="", help="put before every text (none); of run.json, before queries")
    parser.add_argument("--text_column", help="(text)")
    parser.add_argument("--id_column", help="default: id; without such a column, rows are numbered from 0")
    parser.add_argument("--subset", help="of a dataset on the hub")
    parser.add_argument("--split", help="of a dataset on the hub (train)")
    parser.add_argument("--batch_size", type=cli.positive, default=32, help="rows of 128 tokens a forward pass (32)")
    parser.add_argument("--shard_rows", type=cli.positive, default=10_000, help="rows of a file (10000)")
    parser.add_argument("--dtype", choices=get_args(VectorDtype), default="float32", help="of the vectors (float32)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="who works: this machine (local)")
    parser.add_argument("--num_workers", type=cli.positive, help="default: one a GPU, or one")
    args = parser.parse_args(argv)
    from llm2vec.corpus.encoding import CorpusEncoding, encode_corpus, encode_locally  # with torch: seconds
    from llm2vec.corpus.ray import check_ray_installed, encode_on_ray
    from llm2vec.corpus.retrievers import is_foreign
    from llm2vec.corpus.rows import open_corpus

    check_unicode(args.instruction, "--instruction", "command line")
    check_unicode(str(args.output), "output", "command line")  # pyarrow writes to no other path
    if args.engine == "ray":
        check_ray_installed()
    encoder = chosen_model(args).resolved()
    has_prompts = is_foreign(encoder)
    if has_prompts and args.instruction:
        raise UserError(f"--instruction: {args.model} reads texts with prompts of its own; leave it out.")
    given_side: TextSide = args.side or "document"
    engine, rows = encode_on_ray if args.engine == "ray" else encode_locally, 0
    for corpus, folder, side, instruction in _of_run(args) if args.input.endswith(".json") else [
        (open_corpus(
            args.input, text_column=args.text_column or "text", id_column=args.id_column, subset=args.subset,
            split=args.split,
        ), args.output, given_side, args.instruction)
    ]:  # fmt: skip
        encoding = CorpusEncoding(
            corpus, folder.resolve(), encoder, encoder.revision(), side=side,
            instruction="" if has_prompts else instruction, shard_rows=args.shard_rows, dtype=args.dtype,
            batch_size=args.batch_size,
        )  # fmt: skip
        rows += encode_corpus(encoding, engine, args.num_workers)
    print(f"{args.output}: complete; {rows:,} rows encoded in {time.monotonic() - started:.0f} s", file=sys.stderr)


def _of_run(args: Any) -> Iterator[tuple[Any, Path, TextSide, str]]:
    """The texts of a run: of each side and instruction a corpus, and where its vectors go. A `UserError` where flags
    tell of other texts."""
    if given := [name for name in ("side", "text_column", "id_column", "subset", "split") if getattr(args, name)]:
        raise UserError(f"--{given[0]}: the texts of {args.input} have their own; leave it out.")
    from llm2vec.corpus.rows import Corpus
    from llm2vec.training.config.file import load_config
    from llm2vec.training.stages import open_data
    from llm2vec.training.vectors import all_rows, texts_to_encode

    config = load_config(args.input, "stage_I" if "imitation_weight" in read_object(Path(args.input)) else "stage_II")
    groups = texts_to_encode(all_rows(config, open_data(config)))
    for number, ((side, instruction), texts) in enumerate(sorted(groups.items())):
        file = args.output / f"{number:02d}.{side}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
        yield Corpus((file,)), file.with_suffix(""), side, instruction and (args.instruction or instruction)
