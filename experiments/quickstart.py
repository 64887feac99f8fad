"""The whole method, small, on real text that is already on the machine: about ten minutes on two CPU cores.

    python experiments/quickstart.py              # what `make quickstart` runs

Docstrings of the installed Python packages -> a tiny base model -> Stage I + Stage II (Anchor), Stage II alone
(baseline), plain language modelling + Stage II (equal-compute control) -> held-out docstring retrieval through mteb ->
a table here, and `output/quickstart/report.html`. Every stage is one of the ordinary commands with an ordinary config
from `train_configs/quickstart/`; their output goes to `output/quickstart/logs/`.
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llm2vec.cli import run_command
from llm2vec.compare.execution import has_ended, last_step
from llm2vec.compare.runs import STAGE_COMMANDS
from llm2vec.files import alone_in
from llm2vec.quickstart.docstrings import TRAIN_FILE
from llm2vec.training.config.file import load_config
from llm2vec.types import Stage, UserError

OUTPUT = Path("output/quickstart")
CONFIGS = Path("train_configs/quickstart")
CORPUS = Path("cache/docstrings")
TASK = "DocstringRetrieval"

#: Chains of (stage, config name) that start from the base model; two chains run at a time, one core each.
CHAINS: tuple[tuple[tuple[Stage, str], ...], ...] = (
    (("stage_I", "stage_I"), ("stage_II", "stage_II")),
    (("lm", "control_lm"), ("stage_II", "control")),
    (("stage_II", "baseline"),),
)
#: Stage II runs -> what each starts from, both folders below OUTPUT; their names are the report's, too.
STAGE_II = {"baseline": "base", "control": "control_lm", "anchor": "stage_I"}


def main(argv: Sequence[str]) -> None:
    """Corpus, base model, the three ways of training, evaluation, report."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        argv
    )  # there is nothing to choose
    with alone_in(OUTPUT, "quickstart"):
        make_all(time.monotonic(), os.cpu_count() or 1)


def make_all(started: float, threads: int) -> None:
    """The same, in a folder that no other quickstart writes to."""
    (OUTPUT / "logs").mkdir(exist_ok=True)
    print("1/4 corpus: docstrings of the standard library and the installed packages")
    run_script("make_docstrings.py", ["--output_dir", str(CORPUS)], threads)
    print("2/4 base model: tokenizer and a tiny Llama, pre-trained on the training part")
    make_base(threads)
    print("3/4 training: Stage I + II, baseline, control (two at a time)")
    with ThreadPoolExecutor(max_workers=2) as pool:
        for future in [pool.submit(train_chain, chain, max(1, threads // 2)) for chain in CHAINS]:
            future.result()
    print("4/4 evaluation and report")
    evaluate_and_report(started)


def make_base(threads: int) -> None:
    """The base model and the random one that it starts from, whose tokenizer is learnt from the same text."""
    if base_is_up_to_date():
        print(f"    {OUTPUT / 'base'} is there and was made from this config and this text: reused")
        return
    shutil.rmtree(OUTPUT / "init", ignore_errors=True)
    run_script("make_tiny_model.py", ["--output_dir", str(OUTPUT / "init")], threads)
    train("lm", "pretrain", max(1, threads // 2), processes=2)  # on so small a model faster than threads


def run_script(script: str, arguments: Sequence[str], threads: int) -> None:
    """Run one of the experiments' scripts in the foreground."""
    command = [sys.executable, str(Path("experiments", script)), *arguments]
    if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False).returncode:
        raise UserError(f"{script} failed; its own message stands above.")


def train_chain(chain: Sequence[tuple[Stage, str]], threads: int) -> None:
    """Run training commands one after the other."""
    for stage, name in chain:
        train(stage, name, threads)


def train(stage: Stage, name: str, threads: int, processes: int = 1) -> None:
    """Run a training command on a quickstart config, its output in a log file, its steps on a progress bar."""
    config_file, log = CONFIGS / f"{name}.json", OUTPUT / "logs" / f"{name}.log"
    config = load_config(config_file, stage)
    steps_file = config.output_dir / "log.jsonl"
    shutil.rmtree(config.output_dir, ignore_errors=True)  # checkpoints of an earlier quickstart
    num_steps = config.stop_after_n_steps or config.training["max_steps"]
    command = [sys.executable, "-m", "llm2vec", STAGE_COMMANDS[stage], str(config_file)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out, tqdm(total=num_steps, desc=f"    {name:<12}", unit="step") as bar:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while not has_ended(process):
            bar.update(last_step(steps_file) - bar.n)
        bar.update(last_step(steps_file) - bar.n)
    if process.returncode:
        raise UserError(
            f"llm2vec {STAGE_COMMANDS[stage]} {config_file} failed with exit code {process.returncode}; see {log}."
        )


def base_is_up_to_date() -> bool:
    """Whether the base model was trained with today's config on today's text."""
    try:
        run = json.loads((OUTPUT / "base" / "run.json").read_text(encoding="utf-8"))
        manifest = json.loads((CORPUS / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    config = json.loads(json.dumps(dataclasses.asdict(load_config(CONFIGS / "pretrain.json", "lm")), default=str))
    return bool(run["config"] == config and run["data"][0]["sha256"] == manifest["sha256"][TRAIN_FILE])


def evaluate_and_report(started: float) -> None:
    """Score BM25 and every checkpoint on the held-out docstrings, print the table, write the page."""
    import datasets
    import mteb  # seconds, so not before it is needed
    import torch
    import transformers

    from llm2vec.evaluation.scores import evaluate, load_tasks
    from llm2vec.reports.comparisons import EvaluatedRun
    from llm2vec.reports.evaluation import build_report
    from llm2vec.reports.paper import read_paper
    from llm2vec.reports.results import Results, read_results

    for library in ("mteb", "bm25s"):  # a page of lines for each checkpoint
        logging.getLogger(library).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much where cores are shared
    tasks = load_tasks([TASK], CORPUS / "eval")
    bm25 = evaluate(mteb.get_model("mteb/baseline-bm25s"), tasks, OUTPUT / "results")[TASK]
    along = {run: checkpoints_of(OUTPUT / run) for run in STAGE_II}
    folders = [OUTPUT / "base", OUTPUT / "stage_I", OUTPUT / "control_lm"]
    folders += [folder for checkpoints in along.values() for folder in checkpoints.values()]
    bar = tqdm(folders, desc="    scoring", unit="checkpoint")
    scored = {folder: score_checkpoint(folder, tasks) for folder in bar}
    results: dict[str, Results] = {"bm25": read_results(Path(bm25["result_file"]).parent)}
    results |= {name: scored[OUTPUT / name] for name in ("base", "stage_I", *STAGE_II)}
    for run, start in STAGE_II.items():
        steps = {0: OUTPUT / start, **along[run]}
        results |= {f"{run}@{step}": scored[folder] for step, folder in steps.items()}
    counts = json.loads((CORPUS / "manifest.json").read_text(encoding="utf-8"))["counts"]
    seed = load_config(CONFIGS / "stage_I.json", "stage_I").training["seed"]
    rows = f"{counts['training_rows']:,} training pairs; {counts['held_out']:,} held-out queries"
    report = build_report(
        [EvaluatedRun(name, of_run) for name, of_run in results.items()],
        read_paper(),
        None,
        {stage: OUTPUT / stage / "log.jsonl" for stage in ("stage_I", *STAGE_II)},
        title="Anchor Embedding, small: held-out docstring retrieval",
        note=f"nDCG@10; seed {seed}; {rows}.",
        facts={
            "Control": "as many further language-modelling steps as Stage I had, then Stage II",
            "Machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        },
    )
    page = report.write(OUTPUT / "report.html")
    print(f"\n{report.tables[0].text()}\n")
    print(*last_words({name: of_run.scores[TASK] for name, of_run in results.items()}), sep="\n")
    print(f"\nreport: {page}    ({(time.monotonic() - started) / 60:.1f} minutes)")


def last_words(scores: Mapping[str, float]) -> list[str]:
    """What was learnt, whoever is ahead, and what to try next.

    Args:
        scores: run -> nDCG@10 x 100.
    """
    order = sorted(STAGE_II, key=lambda run: -scores[run])
    listed = ", ".join(f"{run} {scores[run]:.1f}" for run in order)
    program = Path(sys.executable).with_name("llm2vec")
    here = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    command = str(here) if program.is_file() else f"{sys.executable} -m llm2vec"
    return [
        f"After Stage II: {listed}. One seed: a point more or less says little.",
        f"Stage I alone took the base from {scores['base']:.1f} to {scores['stage_I']:.1f}, without any contrast.",
        f"BM25 has {scores['bm25']:.1f}. 0.7 million parameters are a toy; the last line below makes a real model.",
        "",
        "Try next:",
        f'    {command} search demo "wait until a predicate becomes true"',
        f"    {command} export {OUTPUT / 'anchor'} {OUTPUT / 'exported'}",
        f"    {command} embedder",
    ]


def score_checkpoint(folder: Path, tasks: Sequence[Any]) -> Any:
    """Results of a checkpoint on the held-out docstrings."""
    from llm2vec.evaluation.mteb_adapter import LLM2VecEncoder
    from llm2vec.evaluation.scores import evaluate
    from llm2vec.llm2vec import LLM2Vec
    from llm2vec.reports.results import read_results

    instruction = json.loads((CONFIGS / "sources.json").read_text(encoding="utf-8"))["docstrings"]["instruction"]
    encoder = LLM2VecEncoder(LLM2Vec.from_pretrained(str(folder)), [folder], {TASK: instruction})
    score = evaluate(encoder, tasks, OUTPUT / "results", batch_size=64)[TASK]
    return read_results(Path(score["result_file"]).parent)


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """Optimiser step -> checkpoint of a Stage II run; the run's own folder is its last one."""
    config = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
    along = {int(path.name.partition("-")[2]): path for path in folder.glob("checkpoint-*")}
    return {**dict(sorted(along.items())), config["stop_after_n_steps"]: folder}


if __name__ == "__main__":
    run_command(main)
