"""A set of recipes on the same data, end to end: train, evaluate, one table.

    python experiments/compare.py train_configs/comparison/quickstart --seeds 42 43        # what `make compare` runs
    python experiments/compare.py train_configs/comparison/llama3.2_1b --processes 8

The set is a folder of configs (`llm2vec/compare/runs.py` says which). A recipe's stages wait for each other; runs that
do not are done at the same time, `--workers` of them. What has been done and has not changed since is not done again.
A run that fails stops its own recipe only, and the exit code is then 1. Everything goes below --output_dir:

    runs/, evaluations/     checkpoints and scores, a folder a run
    configs/, logs/         the whole config and the output of each run
    comparison.html, .md, .json
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llm2vec.cli import user_errors_in_one_sentence
from llm2vec.compare.runs import (
    EVALUATION_SCRIPT,
    FINISHED_FILE,
    Planner,
    Run,
    Trial,
    clear,
    do_all,
    is_finished,
    read_set,
    unique_runs,
)
from llm2vec.compare.table import failure_lines, outcome_of, outcome_table, write_comparison
from llm2vec.corpus.queue import alone_in
from llm2vec.model.checkpoint import RUN_FILE
from llm2vec.types import UserError

SCRIPTS = Path(__file__).resolve().parent


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the set of configs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="each recipe is trained with each of them")
    parser.add_argument("--recipes", nargs="+", help="only these (default: all of the set)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one a GPU and process, or one a core)")
    parser.add_argument("--processes", type=int, default=1, help="of a training run, through torchrun")
    parser.add_argument("--output_dir", type=Path, help="default: output/comparison/ and the folder's name")
    args = parser.parse_args(argv)
    if args.workers is None:
        args.workers = max(1, (torch.cuda.device_count() or num_cores()) // max(1, args.processes))
    for option in ("workers", "processes"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}; give a number above 0.")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds are {' '.join(map(str, args.seeds))}; give each once.")
    args.output_dir = args.output_dir or Path("output/comparison", args.folder.resolve().name)
    return args


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(args: argparse.Namespace) -> tuple[Planner, list[Trial]]:
    """The trials that were asked for; every config is read, and nothing runs yet."""
    planner = Planner(read_set(args.folder), args.output_dir, args.processes)
    trials = planner.trials(args.seeds)
    known = sorted({trial.recipe for trial in trials})
    if unknown := [name for name in args.recipes or () if name not in known]:
        raise UserError(f"--recipes: there is no {unknown[0]!r}; there are {', '.join(known)}.")
    return planner, [trial for trial in trials if args.recipes is None or trial.recipe in args.recipes]


class Progress:
    """Runs scripts, their output in log files, and says how far it all is."""

    def __init__(self, args: argparse.Namespace, trials: Sequence[Trial], lock: int) -> None:
        self.args, self.lock = args, lock
        runs = unique_runs(trials)
        self.num_runs, self.num_ended = len(runs), 0
        self.recipes = {run.name: [t.recipe for t in trials if run in t.runs] for run in runs}
        self.logs = args.output_dir / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def do(self, run: Run, worker: int) -> None:
        """Do a run unless it has been done."""
        if is_finished(run):
            return self.say(run, "is there already")
        clear(run)
        started, log = time.monotonic(), self.logs / f"{run.name}.log"
        with log.open("w") as out:
            ended = subprocess.run(
                self.command(run),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment(worker),
                pass_fds=[self.lock],  # while it lives, no other comparison begins anew what it writes
                check=False,
            )
        if not ended.returncode and run.script != EVALUATION_SCRIPT and not (run.folder / RUN_FILE).is_file():
            self.say(run, f"was stopped; see {log}")
            raise UserError(f"{run.script} was stopped by a signal")
        if ended.returncode:
            self.say(run, f"failed; see {log}")
            raise UserError(f"{run.script} failed ({last_line(log)}); see {log}")
        (run.folder / FINISHED_FILE).touch()
        self.say(run, f"{(time.monotonic() - started) / 60:.1f} minutes")

    def command(self, run: Run) -> list[str]:
        """The run's command line; an evaluation starts its processes itself."""
        command, processes = [str(SCRIPTS / run.script), *run.arguments], self.args.processes
        if processes > 1 and run.script == EVALUATION_SCRIPT:
            command += ["--workers", str(processes)]
        elif processes > 1:
            command[:0] = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        return [sys.executable, *command]

    def environment(self, worker: int) -> dict[str, str]:
        """The worker's share of the machine."""
        threads = max(1, num_cores() // (self.args.workers * self.args.processes))
        settings = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        if devices := [device for device in visible.split(",") if device]:
            first = worker * self.args.processes
            own = [devices[i % len(devices)] for i in range(first, first + self.args.processes)]
            settings["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
        return {**os.environ, **settings}

    def say(self, run: Run, what: str) -> None:
        """One line on a run that has ended."""
        self.num_ended += 1
        whose = ", ".join(dict.fromkeys(self.recipes[run.name]))
        kind = run.name.rpartition("-")[0]
        print(f"[{self.num_ended:>3} of {self.num_runs}] {kind:<18} {whose}: {what}", flush=True)


def last_line(log: Path) -> str:
    """What a script said last; its own error message where there is one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
    return said.removeprefix("error: ")


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, run, report; returns the exit code."""
    started = time.monotonic()
    args = parse_args(argv)
    with alone_in(args.output_dir, "comparison, or a run of an earlier one,") as lock:
        return compare(args, started, lock)


def compare(args: argparse.Namespace, started: float, lock: int) -> int:
    """The same, for checked options and a held folder."""
    planner, trials = plan(args)
    runs = unique_runs(trials)
    num_recipes = len({trial.recipe for trial in trials})
    print(f"{len(trials)} trials of {num_recipes} recipes: {len(runs)} runs, {args.workers} at a time")
    failures = do_all(runs, Progress(args, trials, lock).do, args.workers)
    outcomes = [outcome_of(trial, failures) for trial in trials]
    facts = {
        "Base model": planner.recipes.shared["all"]["model_name_or_path"],
        "Seeds": ", ".join(map(str, args.seeds)),
        "Runs at a time": str(args.workers),
        "Processes of a training run": str(args.processes),
        "Machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs",
    }
    chosen = [recipe for recipe in planner.recipes.recipes if recipe.name in {t.recipe for t in trials}]
    report = write_comparison(args.output_dir, outcomes, chosen, facts)
    print("", outcome_table(outcomes).text(), "", *failure_lines(outcomes), sep="\n")
    print(f"report: {report}    ({(time.monotonic() - started) / 60:.1f} minutes)")
    return 1 if failure_lines(outcomes) else 0


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        raise SystemExit(main())
