"""Speed and memory of training and encoding, side by side with the release's steps and with sentence-transformers.

    python -m benchmarks.benchmark                                 # what `make bench` runs: one thread, about an hour
    python -m benchmarks.benchmark --only stage_II,encode --rounds 9
    python -m benchmarks.benchmark --large --pool 8192 --plot docs/growth.svg --out bench.md
    python -m benchmarks.benchmark --base output/smollm2           # both stages' steps of a real model
    python -m benchmarks.benchmark --device cuda                   # one GPU, 1B shapes, bfloat16 autocast; prints MFU
    python -m benchmarks.benchmark --quick                         # does it run: tiny shapes, one round

The models are random Llamas, the texts random with the lengths of real queries and documents (lognormal; means of 24
and 170 tokens, at most 512), another batch every round. Every variant lives in a process of its own and they take
turns; what is compared is compared within a round, and the table shows the median and the extremes of the rounds. The
goals beside the figures are for one thread of a CPU, and for one H200.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks import sections
from benchmarks.growth import growth, growth_figure, growth_lines
from benchmarks.measure import Line, lines_table, surroundings, worker_environment
from benchmarks.pretexts import pretexts
from benchmarks.processes import process_lines, speed_over_processes
from benchmarks.sections import CPU, CUDA, LARGE, QUICK, Options
from llm2vec.cli import run_command
from llm2vec.types import UserError

SECTIONS = ("stage_I", "stage_II", "encode", "growth", "processes", "pretexts")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    usual = ",".join(SECTIONS[:-1])  # the last holds a model for each of twelve recipes at once
    parser.add_argument("--only", default=usual, help=f"some of {','.join(SECTIONS)} (all but the last)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, help="of the packed Stage I step at once; a bound on its memory")
    parser.add_argument("--large", action="store_true", help="more rows, Stage I with V = 128,000, too: needs 24 GB")
    parser.add_argument("--pool", type=int, help="memory of a gradient-cached step with so many queries; 8192: an hour")
    parser.add_argument("--base", help="folder of a real model built as Llama is: its training steps, on a CPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round, to see that everything runs")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    parser.add_argument("--plot", type=Path, help="draw how cost grows, as .svg or .png")
    args = parser.parse_args(argv)
    args.only = ["stage_I", "stage_II"] if args.base else args.only.split(",")
    if unknown := [name for name in args.only if name not in SECTIONS]:
        raise UserError(f"--only: {unknown[0]!r} is not known; allowed: {', '.join(SECTIONS)}.")
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device is {args.device!r}; allowed: cpu, cuda.")
    for option in ("rounds", "threads", "max_tokens", "pool"):
        if (number := getattr(args, option)) is not None and number < 1:
            raise UserError(f"--{option.replace('_', '-')} is {number}; give a number above 0.")
    if args.plot and ("growth" not in args.only or args.plot.suffix not in (".svg", ".png")):
        raise UserError("--plot draws what `--only growth` measures, into a file named .svg or .png.")
    return args


def main(argv: Sequence[str]) -> None:
    """Measure section after section and print the table."""
    args = parse_args(argv)
    where = surroundings(args.device, args.threads)
    os.environ.update(worker_environment(args.threads))  # the workers inherit it
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    plan = QUICK if args.quick else CUDA if args.device == "cuda" else LARGE if args.large else CPU
    if args.base:
        plan = sections.of_base(args.base)
    options = Options(args.device, 1 if args.quick else args.rounds, args.max_tokens)
    lines: list[Line] = []
    speeds: dict[int, list[float]] = {}
    if "stage_I" in args.only:
        lines += sections.stage_I(options, plan)
    if "stage_II" in args.only:
        lines += sections.stage_II(options, plan)
    if args.pool is not None:
        lines += sections.large_pool(options, plan, args.pool)
    if "encode" in args.only:
        lines += sections.encode(options, plan)
    if "growth" in args.only:
        points = growth(options, plan)
        lines += growth_lines(points)
    if "processes" in args.only:
        counts = [n for n in plan.processes if args.device == "cpu" or n <= torch.cuda.device_count()]
        on_cpu = args.device == "cpu"
        speeds = speed_over_processes(plan.shape, counts, rows=plan.growth_rows, rounds=options.rounds, on_cpu=on_cpu)
        lines += process_lines(speeds, plan.growth_rows)
    if "pretexts" in args.only:
        lines += pretexts(options, plan)
    if args.plot is not None:
        growth_figure(points, speeds).savefig(args.plot)
    text = f"{where}\n\n{plan.describe(options.rounds)}\n\n{lines_table(lines)}\n"
    print(text, end="")
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
