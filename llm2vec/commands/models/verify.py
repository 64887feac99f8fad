"""Whether a model gives the same vectors however it is loaded; where not, which step differs.

    llm2vec verify output/stage_I+output/stage_II output/exported
    llm2vec verify output/exported http://localhost:8000 --dtype bfloat16

The same texts go through every way, and each is compared with the first: token ids, then vectors. A way is

    PATH                    a checkpoint (packed and padded), an adapter folder (the same, and merged) or an export
                            (ours, sentence-transformers, transformers)
    PATH+ADAPTER            an adapter on a base; further ones follow, innermost first
    KIND:PATH[+ADAPTER]     one way alone: ours, padded, merged, st (sentence-transformers) or transformers
    http://HOST:PORT        an OpenAI-compatible server (vLLM, text-embeddings-inference, llama.cpp); #MODEL behind it
                            where it serves several

Where a way differs, the first differing token is said. Then single changes are tried (template, closing token,
attention, pooling, adapter, norm), and the one that gives the other way's vectors is named.

The reference stays loaded while each other way is, so there must be room for two models. Exit code 0: all agree; 1: one
does not, and why is said; 2: one could not be asked, or the command is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from llm2vec import cli
from llm2vec.hub import without_waiting_for_the_hub
from llm2vec.types import UserError


def main(argv: Sequence[str]) -> int:
    """Ask the reference, then every other way; returns the exit code."""
    parser = cli.parser("verify", __doc__, prints_tables=True)
    parser.add_argument("ways", nargs="+", metavar="WAY", help="the first is the reference")
    parser.add_argument(
        "--texts", type=cli.path, help="a text a line, or .jsonl of text, instruction, side (default: own)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is loaded here")
    parser.add_argument("--threshold", type=float, help="least cosine (default: 0.9999; 0.999 with half precision)")
    args = parser.parse_args(argv)
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold}; a cosine above 0 and up to 1 is needed.")
    from transformers.utils import logging as transformers_logging  # with torch: seconds

    from llm2vec.verify.table import compare_ways

    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()  # such as of the text that is longer than a row
    with without_waiting_for_the_hub():
        return compare_ways(args.ways, args.texts, args.dtype, args.threshold, cli.Printer(args.json))
