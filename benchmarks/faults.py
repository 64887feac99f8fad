"""What is left of a training run when something breaks: each fault is made to happen to a tiny model.

The table goes to docs/reliability.md.

    python -m benchmarks.faults                    # what `make faults` runs: about 15 minutes on two free cores
    python -m benchmarks.faults --kills 3 --docs_file /tmp/table.md

Runs are the ordinary scripts in processes of their own. A fault is followed by the same command again, and by a look
whether that ends as a run that nothing happened to: the same weights and the same log, to the bit.
"""

import argparse
import json
import os
import platform
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file

from benchmarks.fault_runs import (
    MOST_SECONDS,
    NUM_STEPS,
    SAVE_STEPS,
    Bench,
    cache_of,
    go_on,
    is_equal,
    is_saving,
    kill,
    output_of,
    said,
    start_run,
    step_to_go_on_from,
    steps_lost,
    wait_for_step,
)
from llm2vec.cli import run_command
from llm2vec.table import Table
from llm2vec.training.log import LOG_FILE
from llm2vec.training.resume import checkpoints_in
from llm2vec.types import UserError

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


class Aftermath(NamedTuple):
    """A line of the table: the fault, what the run did, how many steps had to be done again, and how it ended."""

    fault: str
    outcome: str
    steps_lost: str
    equal: str


# --- faults ---


def kills(bench: Bench, number: int) -> Aftermath:
    """SIGKILL at random moments, one life after the other, over as many runs as that takes; every fourth in a save."""
    script, draw = "run_stage_I.py", random.Random(1)
    lost: list[int] = []
    in_a_save = runs = 0
    equal: list[str] = []
    while len(lost) < number:
        runs += 1
        config = bench.config(f"killed-{runs}")
        output = output_of(config)
        while len(lost) < number:
            since, step = time.time(), step_to_go_on_from(output) + draw.randint(1, 7)
            process = start_run(script, config)
            wait_for_step(process, config, min(NUM_STEPS - 1, step), since)
            moment = time.monotonic() + draw.uniform(0.0, 0.3)
            in_save = len(lost) % 4 == 3
            while process.poll() is None and (time.monotonic() < moment or (in_save and not is_saving(output))):
                time.sleep(0.001)
            if process.poll() is not None:
                break  # it has ended
            kill(process)
            in_a_save += is_saving(output)
            lost.append(steps_lost(output))
        go_on(script, config)
        equal.append(is_equal(output, bench.whole(script, 1)))
    outcome = f"goes on from the last checkpoint; {in_a_save} kill(s) fell into a save; {runs} run(s)"
    worst = f"{sum(lost) / len(lost):.1f} on average, at most {max(lost)}"
    return Aftermath(f"SIGKILL at {number} random moments", outcome, worst, "yes" if set(equal) == {"yes"} else "NO")


def stopped(bench: Bench, number: signal.Signals, processes: int) -> Aftermath:
    """A signal that asks the run to stop."""
    script = "run_stage_II.py"
    config = bench.config(f"{number.name}-{processes}")
    process = start_run(script, config, processes)
    wait_for_step(process, config, 10)
    process.send_signal(number)
    code = process.wait(MOST_SECONDS)
    lost = steps_lost(output_of(config))
    if "stopped after step" not in said(config):
        raise UserError(f"{config}: {number.name} did not stop it in order; see {config.with_suffix('.log')}.")
    go_on(script, config, processes)
    who = "torchrun" if processes > 1 else "the process"
    return Aftermath(
        f"{number.name} to {who}, {processes} process(es)",
        f"finishes the step, saves, says how to go on; exit code {code}{' (torchrun)' if processes > 1 else ''}",
        str(lost),
        is_equal(output_of(config), bench.whole(script, processes)),
    )


def lost_process(bench: Bench, number: signal.Signals, timeout: int, what: str) -> Aftermath:
    """One of two processes dies or freezes."""
    script = "run_stage_II.py"
    config = bench.config(f"lost-{number.name}", ddp_timeout=timeout)
    process = start_run(script, config, 2)
    wait_for_step(process, config, 10)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), number)
    began = time.monotonic()
    code = process.wait(MOST_SECONDS)
    seconds = time.monotonic() - began
    lines = sum("another process of the run ended or hangs" in line for line in said(config).splitlines())
    lost = steps_lost(output_of(config))
    go_on(script, config, 2)
    outcome = f"the other one ends, in {lines} line(s) of its own; all is over after {seconds:.0f} s, exit code {code}"
    return Aftermath(what, outcome, str(lost), is_equal(output_of(config), bench.whole(script, 2)))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A disk of so many bytes under a folder; False where this user may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False)
    try:
        yield not mounted.returncode
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", str(folder)], check=True)


def full_disk(bench: Bench) -> Aftermath:
    """The disk is full in the second save; then it has room again."""
    script = "run_stage_I.py"
    whole = bench.whole(script, 1)
    checkpoint = sum(file.stat().st_size for file in checkpoints_in(whole)[-1].iterdir())
    config = bench.config("full")
    output = output_of(config)
    with small_disk(output, int(1.6 * checkpoint)) as mounted:
        # Without the right to mount: no file may be as long as the optimiser's state once a checkpoint is there.
        limit = (checkpoint // 2, resource.RLIM_INFINITY)
        process = start_run(script, config)
        if not mounted:
            wait_for_step(process, config, SAVE_STEPS + 1)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
        code = process.wait(MOST_SECONDS)
        lost = steps_lost(output)
        error = next(line for line in said(config).splitlines() if line.startswith("error: "))
        if "bytes, and" not in error or not step_to_go_on_from(output):
            raise UserError(f"{config}: the full disk was not said, or took the checkpoint: {error}")
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={8 * checkpoint}", str(output)], check=True)
        go_on(script, config)
        how = "a full disk (a small tmpfs)" if mounted else "a full disk (a limit on the length of files)"
        outcome = f"ends with exit code {code}, says how much room it needs and how much there is"
        return Aftermath(how, outcome, str(lost), is_equal(output, whole))


def damaged(
    bench: Bench, what: str, place: Literal["newest checkpoint", "cache"], damage: Callable[[Path], None]
) -> Aftermath:
    """After a kill, a file is damaged: the newest checkpoint's largest, or the cached tables of the training rows."""
    script = "run_stage_I.py"
    config = bench.config(f"{what} in the {place}".replace(" ", "-"))
    output = output_of(config)
    process = start_run(script, config)
    wait_for_step(process, config, 3 * SAVE_STEPS + 2)
    kill(process)
    if place == "cache":
        for file in cache_of(config).rglob("*.arrow"):
            damage(file)
        word, outcome = "is damaged: it is built anew", "says which table, builds it anew"
    else:
        damage(max(checkpoints_in(output)[-1].iterdir(), key=lambda file: file.stat().st_size))
        word, outcome = "It is left out.", "says which file, goes on from the checkpoint before"
    lost = steps_lost(output)
    go_on(script, config)
    if word not in said(config):
        raise UserError(f"{config}: nothing was said of the damaged {place}.")
    return Aftermath(f"{what} in the {place}", outcome, str(lost), is_equal(output, bench.whole(script, 1)))


def take_half(file: Path) -> None:
    """Take half of a file away."""
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    """Change one bit in the middle of a file."""
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        byte = content.read(1)[0]
        content.seek(-1, os.SEEK_CUR)
        content.write(bytes([byte ^ 1]))


def nan_batch(bench: Bench) -> list[Aftermath]:
    """One row makes its batch's loss no number; then every row does."""
    script, base = "run_stage_II.py", {"model_name_or_path": str(bench.folder / "poisoned")}
    whole, killed = bench.config("nan", **base), bench.config("nan-killed", **base)
    go_on(script, whole)
    log = [json.loads(line) for line in (output_of(whole) / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    skipped = [entry for entry in log if "skipped" in entry]
    named = sum(101 in entry["rows"]["rows.jsonl"] for entry in skipped)
    weights = load_file(output_of(whole) / "adapter_model.safetensors")
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise UserError(f"{whole}: the weights are not finite.")
    process = start_run(script, killed)
    wait_for_step(process, killed, min(NUM_STEPS - 4, skipped[0]["step"] + 2))
    kill(process)
    go_on(script, killed)
    outcome = f"skips {len(skipped)} step(s), {named} naming the row; weights are finite; the same, killed and gone on"
    rows = [
        Aftermath(
            "one row whose loss is no number", outcome, str(len(skipped)), is_equal(*map(output_of, (killed, whole)))
        )
    ]
    diverged = bench.config("diverged", learning_rate=1e30, max_grad_norm=0.0, lr_scheduler_type="constant")
    code = start_run(script, diverged).wait(MOST_SECONDS)
    error = next(line for line in said(diverged).splitlines() if line.startswith("error: "))
    rows.append(
        Aftermath("every loss is no number (learning rate 1e30)", f"exit code {code}: {without_paths(error)}", "-", "-")
    )
    return rows


def without_paths(error: str) -> str:
    """An error without the paths in it."""
    return " ".join(Path(word).name if "/" in word else word for word in error.removeprefix("error: ").split())


# --- the table ---


def write_table(file: Path, rows: Sequence[Aftermath], seconds: float) -> None:
    """Put the table between the markers of a document, or into a new file.

    Raises:
        UserError: the document has no markers.
    """
    header = ["fault", "what the run does", "steps lost", "ends as the undisturbed run"]
    lines = [
        Table(header, rows, num_names=4).markdown(),
        "",
        f"{NUM_STEPS} steps of 8 rows, a checkpoint every {SAVE_STEPS}; torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} CPU cores; {seconds / 60:.0f} minutes in all.",
    ]
    text = file.read_text(encoding="utf-8") if file.is_file() else f"{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise UserError(f"{file}: there is no {BEGIN} and {END} to write between.")
    before, rest = text.split(BEGIN, 1)
    table = "\n".join(lines)
    file.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """All faults, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output/faults"))
    parser.add_argument("--docs_file", type=Path, default=Path("docs/reliability.md"))
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args(argv)
    began = time.monotonic()
    bench = Bench(args.output_dir.resolve())
    rows: list[Aftermath] = []
    faults: list[Callable[[], Aftermath | list[Aftermath]]] = [
        lambda: kills(bench, args.kills),
        lambda: stopped(bench, signal.SIGTERM, 1),
        lambda: stopped(bench, signal.SIGINT, 1),
        lambda: stopped(bench, signal.SIGTERM, 2),
        lambda: lost_process(bench, signal.SIGKILL, 1800, "one of two processes dies"),
        lambda: lost_process(bench, signal.SIGSTOP, 10, "one of two processes freezes, ddp_timeout 10"),
        lambda: full_disk(bench),
        lambda: damaged(bench, "a truncated file", "newest checkpoint", take_half),
        lambda: damaged(bench, "a flipped bit", "newest checkpoint", flip_a_bit),
        lambda: damaged(bench, "a truncated table", "cache", take_half),
        lambda: nan_batch(bench),
    ]
    for fault in faults:
        found = fault()
        rows += found if isinstance(found, list) else [found]
        print(f"[{(time.monotonic() - began) / 60:4.1f} min] {rows[-1].fault}: {rows[-1].equal}", flush=True)
    write_table(args.docs_file, rows, time.monotonic() - began)
    print("", Table(Aftermath._fields, rows, num_names=2).text(), sep="\n")
    if any(row.equal == "NO" for row in rows):
        raise UserError("a run did not end as the undisturbed one; see the table.")


if __name__ == "__main__":
    run_command(main)
