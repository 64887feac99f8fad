"""Score a model on one MTEB task, or on a retrieval set of your own.

    python experiments/mteb_eval_custom.py \
        --base_model_name_or_path meta-llama/Llama-3.2-1B-Instruct \
        --peft_model_name_or_path output/stage_II \
        --task_name STS16 \
        --task_to_instructions_fp test_configs/mteb/task_to_instructions.json \
        --output_dir results

Results lie under OUTPUT_DIR/results/MODEL/REVISION/TASK.json; the revision is made from the weights, the settings
and the instructions, so that a second run reads an old score only where nothing has changed. Without the hub,
--local_data_dir names a directory with copies of the data sets (`mteb/sts16-sts/`, ...) or with folders of your own
(`MySet/corpus.jsonl`, `queries.jsonl`, `qrels/test.jsonl`; --task_name MySet).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Score a model on one MTEB task.", allow_abbrev=False)
    parser.add_argument("--base_model_name_or_path", required=True, help="directory or hub name of the base model")
    parser.add_argument("--peft_model_name_or_path", nargs="+", default=[], help="adapters, in the order of loading")
    parser.add_argument("--task_name", required=True, help="one task of mteb, or a folder in --local_data_dir")
    parser.add_argument("--task_to_instructions_fp", default="test_configs/mteb/task_to_instructions.json")
    parser.add_argument("--output_dir", default="results")
    parser.add_argument("--local_data_dir", help="read data sets from here, not from the hub")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, help="tokens a text is cut to (default: the model's own)")
    parser.add_argument("--torch_dtype", choices=["auto", "bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--attn_implementation", choices=["eager", "sdpa", "flash_attention_2"])
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the model's own choice)")
    return parser.parse_args(argv)


def check_paths(args: argparse.Namespace) -> None:
    """Refuse what is not there before torch and mteb are imported, which takes seconds."""
    for path in [args.base_model_name_or_path, *args.peft_model_name_or_path]:
        if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", path):
            fail(f"There is no model directory {path}.")
    if not Path(args.task_to_instructions_fp).is_file():
        fail(f"There is no file of instructions {args.task_to_instructions_fp}.")
    if args.local_data_dir is not None and not Path(args.local_data_dir).is_dir():
        fail(f"There is no directory of local data {args.local_data_dir}.")


def fail(sentence: object) -> NoReturn:
    """End with one sentence on stderr and exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def run(args: argparse.Namespace) -> None:
    """Load the data, then the model, score it and print the table."""
    from llm2vec.llm2vec import LLM2Vec
    from llm2vec.mteb_adapter import LLM2VecEncoder, evaluate, load_instructions, load_tasks
    from llm2vec.types import UserError

    paths = [args.base_model_name_or_path, *args.peft_model_name_or_path]
    try:
        instructions = load_instructions(args.task_to_instructions_fp)
        tasks = load_tasks([args.task_name], args.local_data_dir)
        model = LLM2Vec.from_pretrained(
            args.base_model_name_or_path,
            peft_model_name_or_path=args.peft_model_name_or_path or None,
            max_length=args.max_length,
            torch_dtype=args.torch_dtype,
            attn_implementation=args.attn_implementation,
            device_map=args.device,
        )
        encoder = LLM2VecEncoder(model, paths, instructions)
        scores = evaluate(encoder, tasks, args.output_dir, batch_size=args.batch_size, show_progress_bar=True)
    except UserError as error:
        fail(error)

    for task, result in scores.items():
        print(f"\n{task}, {result['metric']} x100")
        for split, subsets in result["scores"].items():
            for subset, score in subsets.items():
                print(f"  {split:<12}{subset:<12}{100 * score:8.2f}")
        print(f"  {'mean':<24}{100 * result['main_score']:8.2f}")
        print(f"Results: {result['result_file']}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    check_paths(args)
    run(args)


if __name__ == "__main__":
    main()
