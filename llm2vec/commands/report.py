r"""Tables and figures of evaluated runs, the paper beside them.

    llm2vec report results/anchor-1b results/baseline-1b --names anchor baseline \
        --paper_model LLaMA-3.2-1B-Instruct --output_dir output/report

Each RESULTS is an --output_dir of `llm2vec eval`, or the folder of a model or a revision in there. Runs named
as in the paper's tables are compared with them: anchor, baseline, base (untrained), stage_I, only_d2q, only_q2d,
alpha_0.5, alpha_0.8, baseline_3000_steps, and anchor@25 for a checkpoint after 25 steps of Stage II. Differences are
taken from the run named baseline or, if there is none, from the last one.

The record of a comparison (`llm2vec compare`), given alone, is made into its tables again; a folder of such records
into the ledger: one page with all of them, beside the paper's claims.

--losses anchor=LOG.jsonl adds loss curves. --predictions, a folder a run, with --qrels NFCorpus=qrels/test.jsonl
compares runs query by query where mteb kept the rankings. Writes report.html, report.md, report.json and PNG figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm2vec import cli
from llm2vec.files import COMPARISON_RECORD, alone_in
from llm2vec.types import UserError

if TYPE_CHECKING:
    from llm2vec.reports.comparisons import EvaluatedRun


def main(argv: Sequence[str]) -> None:
    """Read, compare, print and write."""
    parser = cli.parser("report", __doc__, prints_tables=True)
    parser.add_argument("results", nargs="+", type=cli.path, metavar="RESULTS")
    parser.add_argument("--names", nargs="+", help="a name for each RESULTS (default: the models' own)")
    parser.add_argument("--paper_model", help="model of the paper to compare with, e.g. LLaMA-3.2-1B-Instruct")
    parser.add_argument("--losses", nargs="+", default=[], metavar="STAGE=LOG", help="training logs, log.jsonl")
    parser.add_argument("--predictions", nargs="+", type=cli.path, metavar="FOLDER", help="one for each RESULTS")
    parser.add_argument("--qrels", nargs="+", default=[], metavar="TASK=FILE", help="judgements for --predictions")
    parser.add_argument("--output_dir", type=cli.path, default=Path("output/report"), help="default: output/report")
    args = parser.parse_args(argv)
    out = cli.Printer(args.json)
    if len(args.results) == 1 and (args.results[0] / COMPARISON_RECORD).is_file():
        return _rebuild(args.results[0], args.output_dir, out)
    if len(args.results) == 1 and any(args.results[0].glob(f"*/{COMPARISON_RECORD}")):
        from llm2vec.compare.ledger import write_ledger

        with alone_in(args.output_dir, "report"):
            return out.say(f"ledger: {write_ledger(args.results[0], args.output_dir)}")
    from llm2vec.reports.evaluation import build_report  # with matplotlib: seconds
    from llm2vec.reports.paper import read_paper

    losses = _assignments(args.losses, "--losses")
    report = build_report(_read_runs(args), read_paper(), args.paper_model, losses)
    with alone_in(args.output_dir, "report"):
        page = report.write(args.output_dir / "report.html")
    out.say(*report.sentences or [""])
    for table in report.tables:
        out.say("")
        out.table(table, text=f"{table.title}\n{table.text()}\n{table.note}")
    out.say(f"\nreport: {page}")


def _rebuild(record: Path, output_dir: Path, out: cli.Printer) -> None:
    """The tables of a comparison, from its record."""
    from llm2vec.compare.record import read_record
    from llm2vec.compare.table import outcome_table, write_comparison

    outcomes, own, facts, halving = read_record(record)
    with alone_in(output_dir, "report"):
        page = write_comparison(output_dir, outcomes, own, facts, halving)
    for table in filter(None, [outcome_table(outcomes), halving]):
        out.table(table)
    out.say(f"\nreport: {page}")


def _assignments(values: Sequence[str], option: str) -> dict[str, Path]:
    """NAME=FILE arguments."""
    pairs = [value.partition("=") for value in values]
    if wrong := [value for value, (name, _, file) in zip(values, pairs, strict=True) if not (name and file)]:
        raise UserError(f"{option}: expected NAME=FILE, got {', '.join(wrong)}.")
    names = [name for name, _, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{option}: {', '.join(twice)} is given more than once.")
    return {name: Path(file) for name, _, file in pairs}


def _read_runs(args: argparse.Namespace) -> list[EvaluatedRun]:
    """Results, names, and scores of single queries where predictions were kept."""
    from llm2vec.reports.comparisons import EvaluatedRun
    from llm2vec.reports.results import read_query_scores, read_results

    qrels = _assignments(args.qrels, "--qrels")
    results = [read_results(folder) for folder in args.results]
    names = args.names or [result.model for result in results]
    predictions = args.predictions or [None] * len(results)
    for option, given in (("--names", names), ("--predictions", predictions)):
        if len(given) != len(results):
            raise UserError(f"{option}: {len(given)} given for {len(results)} RESULTS; give one for each.")
    if bool(qrels) != bool(args.predictions):
        raise UserError("--predictions and --qrels go together: rankings and what is relevant.")
    runs = []
    for name, result, folder in zip(names, results, predictions, strict=True):
        if missing := [task for task in qrels if task not in result.scores]:
            raise UserError(f"--qrels: {name} has no score of {', '.join(missing)}.")
        queries = {task: read_query_scores(folder, task, file, result.scores[task]) for task, file in qrels.items()}
        runs.append(EvaluatedRun(name, result, queries))
    return runs
