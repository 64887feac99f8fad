"""An embedder out of a real language model on your own machine, measured beside BM25 and what it was made from.

    llm2vec embedder                                                        # what `make embedder` runs
    llm2vec embedder --data my.jsonl --instruction "Given a question, find its answer" --output_dir output/mine
    llm2vec embedder --base HuggingFaceTB/SmolLM2-360M-Instruct --rows 20000

About an hour on two CPU cores with the defaults, minutes on a GPU; killed, it goes on where it was. It fetches
SmolLM2-135M, takes the docstrings of the installed Python packages or the rows of --data (`query`, `positive`,
`negative`; JSON lines, CSV, Parquet), holds queries out of them, and trains with and without Stage I. Below
--output_dir:

    model/              the best of what was trained, a plain sentence-transformers folder
    comparison/         scores, logs and runs of all that was trained; comparison.html
    index/              the held-out documents, to be searched
    base-NAME/, set/    what it was made from, and the configs; the data lie beside them
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llm2vec import cli
from llm2vec.quickstart.contest import ROWS_ON_CPU, ROWS_ON_GPU, base_folder, train_and_export, write_set
from llm2vec.types import UserError

#: What is asked at the end where the docstrings are the data.
DOCSTRING_QUERIES = (
    "wait until a predicate becomes true",
    "remove duplicate rows of a table",
    "how similar are two strings",
)


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser("embedder", __doc__)
    parser.add_argument("--base", default="smollm2-135m", help="of `llm2vec base`, a folder, or a hub name")
    parser.add_argument("--data", type=cli.path, metavar="FILE", help="your own rows (default: docstrings)")
    parser.add_argument("--instruction", help="what a query of --data asks for, in a sentence")
    parser.add_argument("--rows", type=cli.positive, help=f"of a stage (default {ROWS_ON_CPU:,}; GPU {ROWS_ON_GPU:,})")
    parser.add_argument("--queries", type=cli.positive, default=200, help="held out of --data (default 200)")
    parser.add_argument("--output_dir", type=cli.path, default=Path("output/embedder"))
    args = parser.parse_args(argv)
    if (args.data is None) != (args.instruction is None):
        raise UserError("--data and --instruction go together: the rows, and what a query asks for.")
    if args.data is not None and not args.data.is_file():
        raise UserError(f"--data: there is no file {args.data}.")
    return args


def main(argv: Sequence[str]) -> int:
    """Base, data, training, export, search; returns the exit code: 1 where a run failed."""
    started, args = time.monotonic(), _parse_args(argv)
    from llm2vec.files import alone_in, read_object

    out: Path = args.output_dir
    with alone_in(out, "embedder") as lock:
        print("1/4 base model and data")
        base = base_folder(args.base, out)
        task, texts = _data(args, out)
        print("2/4 training and scores")
        write_set(out, base, task, texts, args.rows)
        instruction = read_object(texts / "eval/instructions.json")[task]
        trained = train_and_export(out, lock, task, instruction, "3/4", partial(print, flush=True))
        if trained is None:
            return 1
        print("4/4 search")
        _search(trained, texts / "eval" / task, out / "index", instruction, None if args.data else DOCSTRING_QUERIES)
    print(f"\nreport: {out / 'comparison/comparison.html'}    ({(time.monotonic() - started) / 60:.0f} minutes)")
    print(f'next: llm2vec search query {out / "index"} "what you look for" --instruction {shlex.quote(instruction)}')
    print(f"      llm2vec search index FOLDER_OF_TEXTS NEW_FOLDER --model {trained}")
    print(f'      python -c "from sentence_transformers import SentenceTransformer as S; S({str(out / "model")!r})"')
    return 0


def _data(args: argparse.Namespace, out: Path) -> tuple[str, Path]:
    """The held-out task's name, and the folder of `train/`, `eval/` and `sources.json`."""
    from llm2vec.data.held_out import hold_out, set_name
    from llm2vec.data.sources import Instruction, Source
    from llm2vec.files import json_hash, sha256, write_json
    from llm2vec.quickstart.docstrings import EVAL_FOLDER, installed_roots, write_corpus

    if args.data is None:
        folder = out / "docstrings"
        write_corpus(folder, installed_roots())
        instruction, task = "Given a summary, retrieve its description", Path(EVAL_FOLDER).name
        write_json(folder / "sources.json", {"docstrings": {"file": "docstrings.jsonl", "instruction": instruction}})
        write_json(folder / "eval/instructions.json", {task: instruction})
    else:
        source = Source(args.data.stem, args.data.name, (Instruction(args.instruction),))
        decides = json_hash([sha256(args.data), source, args.queries])  # other rows are other data
        folder, task = out / f"data-{decides[:8]}", set_name(source)
        if not (folder / "eval/instructions.json").is_file():  # written last
            hold_out(args.data.parent, [source], folder, args.queries, seed=42)
    return task, folder


def _search(model: Path, task: Path, index: Path, instruction: str, queries: Sequence[str] | None) -> None:
    """Index the held-out documents, and print the five best of a few queries."""
    from llm2vec.choice import ModelChoice
    from llm2vec.corpus.index import TextIndex, build_index
    from llm2vec.files import json_lines

    asked = list(queries or [content["text"] for _, content in json_lines(task / "queries.jsonl")][:3])
    build_index(task / "corpus.jsonl", index, ModelChoice(str(model)))
    found = TextIndex(index)
    for query, hits in zip(asked, found.search(found.load_model(), asked, 5, instruction), strict=True):
        print(cli.plain(f"\n{query}"))
        for hit in hits:
            print(cli.plain(f"    {hit.score:.3f}  {' '.join(hit.text.split())[:100]}"))
