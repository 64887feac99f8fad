"""Score an embedding model on MTEB: one task, a set of tasks, or retrieval sets of your own.

    python experiments/mteb_eval_custom.py \
        --base_model_name_or_path meta-llama/Llama-3.2-1B-Instruct \
        --peft_model_name_or_path output/stage_II \
        --task_name STS16 \
        --task_to_instructions_fp test_configs/mteb/task_to_instructions.json \
        --output_dir results

    torchrun --nproc_per_node=8 experiments/mteb_eval_custom.py \
        --base_model_name_or_path output/stage_I --peft_model_name_or_path output/stage_II --tasks mteb56

--tasks takes names of tasks, subset15 (the paper's Table 8), mteb56, beir14 and names of mteb's benchmarks. The model
is one of ours, a sentence-transformers model or a name that mteb knows. Results lie under
OUTPUT_DIR/results/MODEL/REVISION/TASK.json; the revision is made from the weights, the settings and the instructions,
so that a second run reads an old score only where nothing has changed, and goes on where the first one ended. Without
the hub, --local_data_dir names a directory with copies of the data sets (`mteb/sts16-sts/`, ...) or with folders of
your own (`MySet/corpus.jsonl`, `queries.jsonl`, `qrels/test.jsonl`; --tasks MySet).
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llm2vec.choice import add_model_flags, chosen_model


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Score an embedding model on MTEB.", allow_abbrev=False)
    add_model_flags(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task_name", help="one task of mteb, or a folder in --local_data_dir")
    which.add_argument("--tasks", nargs="+", help="tasks, subset15, mteb56, beir14, benchmarks such as 'MTEB(eng, v2)'")
    parser.add_argument("--task_to_instructions_fp", help="default: the paper's for our models, none for others")
    parser.add_argument("--template", help="how our models' texts are written (default: the model's own)")
    parser.add_argument("--output_dir", default="results")
    parser.add_argument("--local_data_dir", help="read data sets from here, not from the hub")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, help="tokens a text is cut to (default: the model's own)")
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    parser.add_argument("--torch_dtype", choices=dtypes, help="default: bfloat16 for our models, else the model's own")
    parser.add_argument("--attn_implementation", choices=["eager", "sdpa", "flash_attention_2"])
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a CUDA device for each worker, if any)")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the tasks (torchrun: its ranks)")
    parser.add_argument("--save_predictions", action="store_true", help="keep rankings, for experiments/report.py")
    parser.add_argument("--dry_run", action="store_true", help="only say what it would cost")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what is not there before torch and mteb are imported, which takes seconds."""
    for path in [args.model, *args.peft]:
        if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", path):
            fail(f"There is no model directory {path}.")
    if args.task_to_instructions_fp is not None and not Path(args.task_to_instructions_fp).is_file():
        fail(f"There is no file of instructions {args.task_to_instructions_fp}.")
    if args.local_data_dir is not None and not Path(args.local_data_dir).is_dir():
        fail(f"There is no directory of local data {args.local_data_dir}.")
    for option in ("workers", "batch_size"):
        if getattr(args, option) < 1:
            fail(f"--{option} is {getattr(args, option)}; a whole number above 0 is needed.")


def fail(sentence: object) -> NoReturn:
    """End with one sentence on stderr and exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def run(args: argparse.Namespace) -> None:
    """Do the evaluation and print its table; a problem with a task is said after the others' scores."""
    from llm2vec.evaluation.models import EvaluatedModel
    from llm2vec.evaluation.run import Request, dry_run, evaluate_all, expand
    from llm2vec.types import UserError

    model = EvaluatedModel(
        chosen_model(args),
        instructions_file=args.task_to_instructions_fp,
        template=args.template,
        max_length=args.max_length,
        attn_implementation=args.attn_implementation,
        device=args.device,
    )
    try:
        tasks = expand(args.tasks or [args.task_name])
        request = Request(model, tasks, args.output_dir, args.local_data_dir, args.batch_size, args.save_predictions)
        if args.dry_run:
            return print("\n".join(dry_run(request, args.workers)))
        outcome = evaluate_all(request, args.workers)
    except UserError as error:
        fail(error)
    if outcome is not None:  # the first rank's
        print_scores(outcome.scores)
        if outcome.problems:
            fail(" ".join(outcome.problems))


def print_scores(scores: Mapping[str, Any]) -> None:
    """A table of the scores; of a single task also its splits and subsets, and where they lie."""
    if len(scores) != 1:
        for task, result in scores.items():
            print(f"{task:<42}{result['metric']:<36}{100 * result['main_score']:8.2f}")
        return
    ((task, result),) = scores.items()
    print(f"\n{task}, {result['metric']} x100")
    for split, subsets in result["scores"].items():
        for subset, score in subsets.items():
            print(f"  {split:<12}{subset:<12}{100 * score:8.2f}")
    print(f"  {'mean':<24}{100 * result['main_score']:8.2f}")
    print(f"Results: {result['result_file']}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    check_args(args)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llm2vec").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    run(args)


if __name__ == "__main__":
    main()
