"""An embedder of your own domain or language from a folder of raw texts, measured beside BM25 and its base.

    llm2vec adapt my_docs --base HuggingFaceTB/SmolLM2-135M-Instruct --output_dir output/adapted
    llm2vec adapt my_docs --base output/quickstart/base --server http://localhost:8000/v1 --name Qwen/Qwen3-8B

Every step is an ordinary command with a folder behind it; killed, the whole goes on where it was. Below --output_dir:

    data-*/pairs/     passages, and a query for each       llm2vec queries
    data-*/mined/     the same with hard negatives         llm2vec mine
    data-*/split-*/   rows to train on, queries held out   llm2vec hold-out
    set/, comparison/ configs, runs, scores                llm2vec compare
    model/            the best of what was trained         llm2vec export

Without a writer of queries (`--model`, `--anchors` or `--server`), the texts' own titles, headings and first sentences
are the queries. Trained are Stage II alone, and Stage II behind a pre-stage on the texts themselves.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm2vec import cli
from llm2vec.commands.data import parse_with_server
from llm2vec.quickstart.contest import base_folder, train_and_export, write_set
from llm2vec.types import UserError

#: Files of the stages of each pre-stage.
PRE_STAGES: dict[str, dict[str, dict[str, Any]]] = {
    "reconstruction": {"1_stage_I.json": {"target": "self"}, "2_stage_II.json": {}},
    "mntp": {
        "1_mntp.json": {},
        "2_stage_II.json": {"bidirectional": True, "pooling_mode": "mean"},
    },
}
#: Rows that a stage trains on. A base of a million parameters takes minutes for it, one of 135 million hours on a CPU.
ROWS = 3200
#: Rows of a step of Stage II.
STEP_ROWS = 32
#: Learning rates times the model's width: wide models want smaller ones, of all parameters and of Stage II's LoRA.
RATES = (0.1, 0.2)
#: Hard negatives that are mined for each pair: Stage II takes one, and the held-out queries' are documents to search.
NEGATIVES = 2


def main(argv: Sequence[str]) -> int:
    """Pairs, negatives, split, training, export; returns the exit code: 1 where a run failed."""
    started, args = time.monotonic(), _parse_args(argv)
    from llm2vec.files import alone_in, read_object

    out: Path = args.output_dir
    with alone_in(out, "adaptation") as lock:
        base = base_folder(args.base, out)
        rates = _rates(base)  # opens it, before anything is written for it
        split = _data(args)
        data = split.parent
        print("3/4 training and scores")
        instructions = read_object(split / "eval/instructions.json")
        (task, instruction), *_ = instructions.items()
        recipes: dict[str, dict[str, Any]] = {"baseline": {"1_stage_II.json": {}}}
        recipes |= {name: PRE_STAGES[name] for name in args.pre_stage}
        passages = {"dataset_file_path": str(data / "pairs/passages.jsonl"), "sources_file": None}
        if "mntp" in recipes:
            recipes["mntp"] = {**recipes["mntp"], "1_mntp.json": passages}
        write_set(out, base, task, split, args.rows, recipes, rates, STEP_ROWS)
        if train_and_export(out, lock, task, instruction, "4/4", partial(print, flush=True)) is None:
            return 1
    minutes = (time.monotonic() - started) / 60
    print(f"\nreport: {out / 'comparison/comparison.html'}    ({minutes:.0f} minutes)")
    print(f"next: llm2vec search index {args.folder} NEW_FOLDER --model {out / 'model'}")
    print(f'      llm2vec search query NEW_FOLDER "what you look for" --instruction {shlex.quote(instruction)}')
    return 0


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser("adapt", __doc__)
    parser.add_argument("folder", type=cli.path, metavar="DATA", help="folder of text files, or a .jsonl file")
    parser.add_argument("--base", required=True, help="of `llm2vec base`, a folder, or a hub name")
    parser.add_argument("--output_dir", type=cli.path, required=True, help="folder to write, outside DATA")
    writer = parser.add_mutually_exclusive_group()
    for flag, of in {"model": "a causal language model", "anchors": "a Stage I checkpoint"}.items():
        writer.add_argument(f"--{flag}", help=f"who writes the queries: {of}, as in `llm2vec queries`")
    parser.add_argument("--most", type=cli.positive, help="queries to write; default: one for each passage")
    parser.add_argument("--instruction", help="what a query asks for, in a sentence")
    parser.add_argument("--queries", type=cli.positive, default=200, help="held out to be scored on (200)")
    parser.add_argument(
        "--pre_stage", nargs="*", choices=list(PRE_STAGES), default=["reconstruction"],
        help="before Stage II, on the texts themselves; a recipe of each, or of none (reconstruction)",
    )  # fmt: skip
    parser.add_argument("--rows", type=cli.positive, default=ROWS, help=f"that a stage trains on ({ROWS:,})")
    args = parse_with_server(parser, writer, argv)
    if not args.folder.exists():
        raise UserError(f"{args.folder}: a folder of text files or a .jsonl file is needed.")
    if args.output_dir.resolve().is_relative_to(args.folder.resolve()):
        where = f"--output_dir: {args.output_dir} lies inside {args.folder}"
        raise UserError(f"{where}, so its reports would be texts of the next start; name a folder outside.")
    return args


def _data(args: argparse.Namespace) -> Path:
    """The folder of the split, made as far as it is not there; beside it lie its pairs and mined rows.

    Each is named by all that decides it: other texts or another writer leave no old pairs in use, and other queries to
    hold out, or another instruction, take no new pairs.
    """
    from llm2vec.commands.data import hold_out, mine, queries
    from llm2vec.data.held_out import TRAINED_FOR_ONE_HELD_OUT
    from llm2vec.files import json_hash, read_object, write_json

    asked = {flag: getattr(args, flag) for flag in ("model", "anchors", "server", "name", "most")}
    given = [f"--{flag}={value}" for flag, value in asked.items() if value is not None]
    if asked["model"] is asked["anchors"] is asked["server"] is None:
        given.append("--titles")
    data: Path = args.output_dir / f"data-{json_hash([_content_of(args.folder), given])[:8]}"
    pairs, mined = data / "pairs", data / "mined"
    split = data / f"split-{json_hash([args.queries, args.instruction])[:8]}"
    print("1/4 passages and queries", flush=True)
    if not (pairs / "sources.json").is_file():  # written last
        queries.main([str(args.folder), str(pairs), *given])
    fewest = args.queries * (1 + TRAINED_FOR_ONE_HELD_OUT)
    if (there := _lines_of(pairs / "pairs.jsonl")) < fewest:  # each is another query
        raise UserError(
            f"no source in {pairs} has the {fewest} different queries that holding out {args.queries} takes; "
            f"there are {there}: hold out fewer --queries, or give more texts."
        )
    print("2/4 hard negatives, and queries held out", flush=True)
    if not (mined / "report.json").is_file():  # written last
        table, passages = (str(pairs / name) for name in ("sources.json", "passages.jsonl"))
        flags = ["--sources_file", table, "--corpus", passages, "--model", "bm25", "--negatives", str(NEGATIVES)]
        mine.main([str(pairs), str(mined), *flags])
    if not (split / "eval/instructions.json").is_file():
        asked_for = {} if args.instruction is None else {"instruction": args.instruction}
        entries = read_object(mined / "sources.json").items()
        write_json(data / "sources.json", {name: {**entry, **asked_for} for name, entry in entries})
        flags = ["--sources_file", str(data / "sources.json"), "--queries", str(args.queries)]
        hold_out.main([str(mined), str(split), *flags])
    if (left := _lines_of(split / "train/pairs.jsonl")) < STEP_ROWS:
        raise UserError(
            f"{args.folder}: {left} pairs are left to train on, and a step takes {STEP_ROWS}; "
            "give more texts, or hold out fewer --queries."
        )
    return split


def _lines_of(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _content_of(source: Path) -> str:
    """A hash of the files that passages are made of."""
    from llm2vec.corpus.passages import text_files
    from llm2vec.files import files_hash

    files = text_files(source) if source.is_dir() else [source]
    return files_hash(source.parent, (file for file in files if file.is_file()))


def _rates(base: str) -> tuple[float, float]:
    """Learning rates for a base of this width."""
    from llm2vec.choice import ModelChoice

    config = ModelChoice(base).opened().folders[0].config or {}
    width = config.get("text_config", config).get("hidden_size")
    if not isinstance(width, int):
        raise UserError(f"{base}: its config.json has no hidden_size.")
    return round(RATES[0] / width, 6), round(RATES[1] / width, 6)
