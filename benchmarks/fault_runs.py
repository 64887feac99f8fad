"""Training runs that things are done to: a tiny model and rows, a script started, watched, and compared at its end.

    bench = Bench(Path("output/faults"))
    config = bench.config("killed")
    process = start_run("run_stage_I.py", config)
    wait_for_step(process, config, 10)

Used by `faults.py`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm2vec.quickstart.tiny import tiny_llama, train_tokenizer
from llm2vec.training.log import LOG_FILE
from llm2vec.training.resume import checkpoints_in, why_unusable
from llm2vec.types import UserError

SCRIPTS = Path(__file__).parents[1] / "experiments"
NUM_STEPS = 40
SAVE_STEPS = 4
#: Figures that say how long something took.
TIMED = ("tokens_per_second", "waiting_for_data", "train_runtime", "train_samples_per_second", "train_steps_per_second")
#: A letter that one training row has, and no other.
RARE = "\N{EURO SIGN}"
#: How long to wait for a step or an end before the fault counts as a hang.
MOST_SECONDS = 3600.0


class Bench:
    """A folder with a base model and rows, and what runs in it are compared with.

    Args:
        folder: made anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_inputs(folder)
        self.undisturbed: dict[tuple[str, int], Path] = {}

    def config(self, name: str, **keys: Any) -> Path:
        """A config whose run writes to a folder of that name."""
        content = {
            "model_name_or_path": str(self.folder / "base"),
            "sources_file": str(self.folder / "sources.json"),
            "output_dir": str(self.folder / name),
            "template": "llama3",
            "max_seq_length": 64,
            "total_batch_size": 8,
            "tokens_per_microbatch": 256,
            "learning_rate": 1e-3,
            "max_steps": NUM_STEPS,
            "logging_steps": 1,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **keys,
        }
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(content, indent=2), encoding="utf-8")
        return file

    def whole(self, script: str, processes: int) -> Path:
        """The output of an undisturbed run, which is done once."""
        if (script, processes) not in self.undisturbed:
            name = f"undisturbed-{Path(script).stem}-{processes}"
            go_on(script, self.config(name), processes)
            self.undisturbed[script, processes] = self.folder / name
        return self.undisturbed[script, processes]


def write_inputs(folder: Path) -> None:
    """Rows of made-up words, one with a rare letter; a tokenizer and two models, for one of which that letter is no
    number."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(2, 8))) for _ in range(500)]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, most)))

    rows = [{"query": text(8), "positive": text(30), "negative": text(30)} for _ in range(8 * NUM_STEPS)]
    rows[100]["query"] += RARE
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    sources = {"rows": {"file": "rows.jsonl", "instruction": "find it"}}
    (folder / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    tokenizer = train_tokenizer((row["positive"] for row in rows), 2000)
    model = tiny_llama(
        tokenizer, hidden_size=256, num_layers=4, num_heads=4, intermediate_size=768, max_positions=128, seed=0
    )
    for name in ("base", "poisoned"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    weights = load_file(folder / "poisoned/model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer(RARE, add_special_tokens=False)["input_ids"]] = torch.nan
    save_file(weights, folder / "poisoned/model.safetensors", {"format": "pt"})


def start_run(script: str, config: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    """Start a script, what it says going to `<config>.log`."""
    command = [str(SCRIPTS / script), str(config)]
    if processes > 1:
        command[:0] = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(cache_of(config))}
    with config.with_suffix(".log").open("wb") as out:
        command = [sys.executable, *command]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **own})


def said(config: Path) -> str:
    """What the last run of a config said."""
    return config.with_suffix(".log").read_text(encoding="utf-8", errors="replace")


def go_on(script: str, config: Path, processes: int = 1) -> None:
    """Run a script to its end.

    Raises:
        UserError: it does not end well.
    """
    if code := start_run(script, config, processes).wait(MOST_SECONDS):
        raise UserError(f"{script} {config} ended with exit code {code}; see {config.with_suffix('.log')}.")


def output_of(config: Path) -> Path:
    """Where a config's run writes."""
    return config.with_suffix("")


def cache_of(config: Path) -> Path:
    """Where a config's run keeps its tables: not among the user's."""
    return config.parent / "cache"


def last_step(output: Path, since: float = 0.0) -> int:
    """The last step that a run has logged; 0 where nothing was written since a time, as a run that goes on keeps the
    log of its former life until it trains."""
    log = output / LOG_FILE
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() and log.stat().st_mtime > since else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for_step(process: subprocess.Popen[bytes], config: Path, step: int, since: float = 0.0) -> None:
    """Until a run has done a step, and logged it since a time.

    Raises:
        UserError: it ends before, or hangs.
    """
    until = time.monotonic() + MOST_SECONDS
    while last_step(output_of(config), since) < step:
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise UserError(f"{config}: no step {step}; see {config.with_suffix('.log')}.")
        time.sleep(0.02)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL, and wait until it is gone."""
    process.kill()
    process.wait()


def steps_lost(output: Path) -> int:
    """How many steps a run that has ended must do again."""
    return last_step(output) - step_to_go_on_from(output)


def step_to_go_on_from(output: Path) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    whole = [folder for folder in checkpoints_in(output) if why_unusable(folder) is None]
    return int(whole[-1].name.rpartition("-")[2]) if whole else 0


def is_equal(output: Path, expected: Path) -> str:
    """Whether two runs ended with the same weights and the same log but for its times."""
    weights, logs = [], []
    for folder in (output, expected):
        weights.append(load_file(next(folder.glob("*model.safetensors"))))
        lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
        logs.append([{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines])
    same = weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][n], w) for n, w in weights[1].items())
    return "yes" if same and logs[0] == logs[1] else "NO"


def is_saving(output: Path) -> bool:
    """Whether a checkpoint is being written, or was when the run ended."""
    return any(output.glob(".checkpoint-*"))
