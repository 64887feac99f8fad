"""One model of several checkpoints: the mean of their weights, or slerp between two; then `verify`.

    llm2vec merge output/soup output/stage_II-seed42 output/stage_II-seed43 output/stage_II-seed44
    llm2vec merge output/late output/stage_II/checkpoint-80 output/stage_II/checkpoint-100 --weights 1 3
    llm2vec merge output/between output/stage_I output/stage_I+output/stage_II --how slerp

A model is a folder, or BASE+ADAPTER. Adapters are merged into their bases, so OUT is a full model, in float32: an
embedder, without a language model's head. Whether OUT gives the same vectors in every way of loading is printed as
`llm2vec verify` does, whose exit code it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from llm2vec import cli
from llm2vec.choice import ModelChoice
from llm2vec.types import MergeKind


def main(argv: Sequence[str]) -> int:
    """Merge, write, verify; returns the exit code."""
    parser = cli.parser("merge", __doc__)
    parser.add_argument("out", type=cli.path, metavar="OUT", help="folder to write; must not be there, or be empty")
    parser.add_argument("models", nargs="+", metavar="MODEL[+ADAPTER ...]", help="two or more; slerp takes two")
    parser.add_argument("--how", choices=get_args(MergeKind), default="mean", help="default: mean")
    parser.add_argument("--weights", type=float, nargs="+", help="of each model, in any scale (default: equal)")
    args = parser.parse_args(argv)
    from llm2vec.export.merging import write_merged  # with torch: seconds
    from llm2vec.verify.table import compare_ways

    write_merged([ModelChoice.parse(model) for model in args.models], args.how, args.weights, args.out)
    return compare_ways([str(args.out)], None, "float32", None, cli.Printer(as_json=False))
