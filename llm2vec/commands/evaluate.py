r"""Score an embedding model on MTEB: one task, a set of tasks, or retrieval sets of your own.

    llm2vec eval \
        --model meta-llama/Llama-3.2-1B-Instruct --peft output/stage_II \
        --task_name STS16 \
        --task_to_instructions_fp test_configs/mteb/task_to_instructions.json \
        --output_dir results

    torchrun --nproc_per_node=8 -m llm2vec eval \
        --model output/stage_I --peft output/stage_II --tasks mteb56

--tasks takes names of tasks, subset15 (the paper's Table 8), mteb56, beir14 and names of mteb's benchmarks. The model
is one of ours, a sentence-transformers model or a name that mteb knows. Results lie under
OUTPUT_DIR/results/MODEL/REVISION/TASK.json; the revision is made from the weights, the settings and the instructions,
so that a second run reads an old score only where nothing has changed, and goes on where the first one ended. Without
the hub, --local_data_dir names a directory with copies of the data sets (`mteb/sts16-sts/`, ...) or with folders of
your own (`MySet/corpus.jsonl`, `queries.jsonl`, `qrels/test.jsonl`; --tasks MySet).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from llm2vec import cli
from llm2vec.choice import add_model_flags, chosen_model
from llm2vec.table import Cell, Table
from llm2vec.types import AttnImplementation, DtypeName, UserError


def main(argv: Sequence[str]) -> None:
    """Do the evaluation and print its table; a problem with a task is said after the others' scores."""
    parser = cli.parser("eval", __doc__, prints_tables=True)
    add_model_flags(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task_name", help="one task of mteb, or a folder in --local_data_dir")
    which.add_argument("--tasks", nargs="+", help="tasks, subset15, mteb56, beir14, benchmarks such as 'MTEB(eng, v2)'")
    parser.add_argument("--task_to_instructions_fp", help="default: the paper's for our models, none for others")
    parser.add_argument("--settings", help="an llm2vec_config.json: how our models read texts (default: their own)")
    parser.add_argument("--template", help="how our models' texts are written (default: the model's own)")
    parser.add_argument("--output_dir", default="results", help="for scores (results)")
    parser.add_argument("--local_data_dir", help="read data sets from here, not from the hub")
    parser.add_argument("--batch_size", type=cli.positive, default=32)
    parser.add_argument("--max_length", type=int, help="tokens a text is cut to (default: the model's own)")
    parser.add_argument(
        "--torch_dtype", choices=get_args(DtypeName), help="default: bfloat16 for our models, else the model's own"
    )
    parser.add_argument("--attn_implementation", choices=get_args(AttnImplementation))
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a CUDA device for each worker, if any)")
    parser.add_argument(
        "--workers", type=cli.positive, default=1, help="processes that share the tasks (torchrun: its ranks)"
    )
    parser.add_argument("--save_predictions", action="store_true", help="keep rankings, for llm2vec report")
    parser.add_argument(
        "--submission", metavar="ORG/NAME@COMMIT", help="write what the MTEB leaderboard takes, for an export of ours"
    )
    parser.add_argument("--dry_run", action="store_true", help="only say what it would cost")
    args = parser.parse_args(argv)
    out = cli.Printer(args.json)
    _check_paths(args)
    _check_submission(args)
    from llm2vec.evaluation.jobs import Request
    from llm2vec.evaluation.models import EvaluatedModel  # with torch and mteb: seconds
    from llm2vec.evaluation.run import dry_run, evaluate_all, expand
    from llm2vec.evaluation.submission import write_submission

    model = EvaluatedModel(
        chosen_model(args), instructions_file=args.task_to_instructions_fp, settings_file=args.settings,
        template=args.template, max_length=args.max_length, attn_implementation=args.attn_implementation,
        device=args.device, as_published=args.submission is not None,
    )  # fmt: skip
    tasks = expand(args.tasks or [args.task_name])
    request = Request(model, tasks, args.output_dir, args.local_data_dir, args.batch_size, args.save_predictions)
    if args.dry_run:
        costs = dry_run(request, args.workers)
        return out.table(costs, text=f"{costs.text()}\n{costs.note}")
    outcome = evaluate_all(request, args.workers)
    if outcome is None:  # the first rank has it
        return
    if outcome.scores:
        out.table(_score_table(outcome.scores), text=_score_text(outcome.scores))
    if outcome.problems:
        raise UserError(" ".join(outcome.problems))
    if args.submission is not None:
        name, _, commit = args.submission.partition("@")
        found = {task: request.find(task) for task in outcome.scores}
        draft = write_submission(found, outcome.scores, name, commit, Path(args.output_dir, "submission"))
        out.say(f"for the leaderboard: {draft.parent / 'results'}, and a draft of mteb's entry, {draft}")


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse what is not there before torch and mteb are imported."""
    for path in [args.model, *args.peft]:
        if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", path):
            raise UserError(f"There is no model directory {path}.")
    for file, what in ((args.task_to_instructions_fp, "instructions"), (args.settings, "settings")):
        if file is not None and not Path(file).is_file():
            raise UserError(f"There is no file of {what} {file}.")
    if args.local_data_dir is not None and not Path(args.local_data_dir).is_dir():
        raise UserError(f"There is no directory of local data {args.local_data_dir}.")


def _check_submission(args: argparse.Namespace) -> None:
    """Refuse what the leaderboard could not repeat: it runs a model as it is published, on the hub's data."""
    if args.submission is None:
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", args.submission):
        raise UserError(
            f"--submission is {args.submission!r}; give ORG/NAME@COMMIT, the 40 digits of a commit on the hub."
        )
    for flag in ("task_to_instructions_fp", "settings", "template", "max_length", "torch_dtype", "local_data_dir"):
        if getattr(args, flag) is not None:
            raise UserError(
                f"--{flag} cannot stand beside --submission: mteb runs the published model on the hub's data."
            )


def _score_table(scores: Mapping[str, Any]) -> Table:
    """A row a task, split and subset, x 100; the mean of a task has no split."""
    rows: list[list[Cell]] = []
    for task, result in scores.items():
        metric = result["metric"]
        rows.append([task, metric, None, None, round(100 * result["main_score"], 4)])
        for split, subsets in result["scores"].items():
            rows += [[task, metric, split, subset, round(100 * score, 4)] for subset, score in subsets.items()]
    return Table(["task", "metric", "split", "subset", "score"], rows, "Scores", "main scores x 100", num_names=4)


def _score_text(scores: Mapping[str, Any]) -> str:
    """A line a task; of a single task also its splits and subsets, and where they lie."""
    if len(scores) != 1:
        lines = [(task, result["metric"], 100 * result["main_score"]) for task, result in scores.items()]
        return "\n".join(f"{task:<42}{metric:<36}{score:8.2f}" for task, metric, score in lines)
    ((task, result),) = scores.items()
    of_subsets = [
        f"  {split:<12}{subset:<12}{100 * score:8.2f}"
        for split, subsets in result["scores"].items()
        for subset, score in subsets.items()
    ]
    mean = f"  {'mean':<24}{100 * result['main_score']:8.2f}"
    heading = f"\n{task}, {result['metric']} x100"
    return "\n".join([heading, *of_subsets, mean, f"Results: {result['result_file']}"])
