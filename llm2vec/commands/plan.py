r"""What a run will be, before anything loads: schedule, tokens, negatives, memory by part, hours, disk, and warnings.

    llm2vec plan train_configs/stage_I/MetaLlama3.2_1b_q2d_d2q.json --num_processes 8 --card A100-80GB
    llm2vec plan my_config.json --card_memory_gb 48 --card_tflops 180 --utilisation 0.3
    llm2vec plan train_configs/stage_II/MetaLlama3.2_1b_stage1_2000steps_stage2.json \
        --base meta-llama/Llama-3.2-1B-Instruct --tokens_query 24 --tokens_document 170 --card H200
    llm2vec plan --bases HuggingFaceTB/SmolLM2-135M meta-llama/Llama-3.2-1B   # what fits on which card, a table

No weights are read: of the base, `config.json` and the tokenizer; of the data, everything is checked as the run would
(once, then cached), and a sample tokenised. Where data or tokenizer are not at hand, --tokens_query and
--tokens_document stand for them; where the base is not, as before a Stage II whose Stage I has not run, --base does.
Memory is reckoned for a GPU if one is named or found, else for this machine's CPU; on CPUs it was held against measured
runs (tests/planning/test_memory_plan.py), on GPUs it was not. Exit code 2 if the run would refuse its config, base or
data; what is wrong with its output folder is a warning, as the run may be for another machine. --json prints figures,
bytes by part and warnings, unrounded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from llm2vec import cli
from llm2vec.planning.gpus import CARDS, Card, card_here
from llm2vec.types import Stage, UserError


def main(argv: Sequence[str]) -> None:
    """Plan and print."""
    parser = cli.parser("plan", __doc__, prints_tables=True)
    parser.add_argument("config", type=cli.path, nargs="?")
    parser.add_argument("--bases", nargs="+", help="in place of a config: a table of what fits on which card")
    parser.add_argument("--stage", choices=get_args(Stage), help="which stage reads it; default: as its keys tell")
    parser.add_argument("--num_processes", type=cli.positive, default=1, help="GPUs of the run (default 1)")
    parser.add_argument("--card", help=f"one of {', '.join(CARDS)}")
    parser.add_argument("--card_memory_gb", type=cli.positive_float, help="instead of --card: its memory in GB")
    parser.add_argument("--card_tflops", type=cli.positive_float, help="and its dense peak in the run's precision")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of that peak (default 0.4)")
    parser.add_argument("--base", help="model of the same shape, in place of model_name_or_path")
    parser.add_argument("--tokens_query", type=cli.positive, help="mean tokens of a query, template included")
    parser.add_argument("--tokens_document", type=cli.positive, help="mean tokens of a document, template included")
    args = parser.parse_args(argv)
    out = cli.Printer(args.json)
    if (args.bases is None) == (args.config is None):
        raise UserError("a config is needed, or --bases for a table of what fits on which card.")
    if args.bases is not None:
        from llm2vec.planning.fits import table_of_cards

        table = table_of_cards(args.bases)
        return out.table(table, text=table.markdown())
    card = card_of(args)
    from llm2vec.planning.plan import Conditions, make_plan  # with torch: seconds
    from llm2vec.planning.words import report, tables_of

    conditions = Conditions(
        args.num_processes, card, args.utilisation, args.stage, args.base, args.tokens_query, args.tokens_document
    )
    plan = make_plan(args.config, conditions)
    out.say(*report(plan))
    for table in tables_of(plan) if args.json else ():
        out.table(table)


def card_of(args: argparse.Namespace) -> Card | None:
    """The GPU that the flags describe, or else this machine's; a `UserError` where they describe none, or two."""
    if args.card is not None:
        if args.card_memory_gb is not None or args.card_tflops is not None:
            raise UserError("--card says memory and speed; leave --card_memory_gb and --card_tflops out.")
        if args.card not in CARDS:
            raise UserError(f"--card {args.card!r} is not known; known: {', '.join(CARDS)}; or give --card_memory_gb.")
        return CARDS[args.card]
    if args.card_memory_gb is None:
        if args.card_tflops is not None:
            raise UserError("--card_tflops needs --card_memory_gb.")
        return card_here()
    return Card("card", args.card_memory_gb, *[args.card_tflops] * 3)  # one figure, in whichever precision the run has
