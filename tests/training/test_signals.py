"""A run that is asked to stop finishes its step and saves; a second signal ends it; a lost process ends the others."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Setup, assert_same_to_the_bit, log_of, make_data, run, said, signal_within

from llm2vec.processes import STOP_SIGNALS, StopSignals
from llm2vec.training import step, trainer
from llm2vec.training.log import LOG_FILE
from llm2vec.training.resume import checkpoints_in, why_unusable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file lie."""
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, Any]:
    """Keys of a run of 7 steps, 5 an epoch, that saves nothing before its end."""
    return make_data(folder) | {"save_strategy": "no"}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, keys: dict[str, Any]) -> Path:
    """Stage II in one process."""
    output = folder / "undisturbed"
    assert run("run_stage_II.py", output, keys) == [0]
    return output


def stop_and_go_on(output: Path, script: str, keys: dict[str, Any], setup: Setup, processes: int = 1) -> int:
    """Run until a signal ends it with exit code 0, then to the end; returns the step after which it stopped."""
    assert run(script, output, keys, processes, setup) == [0] * processes, said(output)
    assert not list(output.glob("*.safetensors"))  # the model of an unfinished run does not pass for its last one
    stopped = re.search(r"stopped after step (\d+), saved to (\S+checkpoint-\d+); to go on: (.*)", said(output))
    assert stopped is not None, said(output)
    assert [str(path) for path in checkpoints_in(output)] == [stopped[2]]
    command = shlex.split(stopped[3])
    assert (Path(command[-2]).name, command[-1]) == (script, str(output.with_suffix(".json")))
    assert run(script, output, keys, processes) == [0] * processes
    return int(stopped[1])


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_step_is_finished_and_the_run_goes_on_later(
    number: signal.Signals, folder: Path, keys: dict[str, Any], undisturbed: Path
) -> None:
    output = folder / number.name
    assert stop_and_go_on(output, "run_stage_II.py", keys, signal_within(3, number)) == 3
    assert_same_to_the_bit(output, undisturbed)


def test_all_processes_stop_after_the_same_step(folder: Path, keys: dict[str, Any]) -> None:
    """Though one alone is told."""
    whole, output = folder / "two-whole", folder / "two"
    assert run("run_stage_II.py", whole, keys, 2) == [0, 0]
    setup = signal_within(2, signal.SIGTERM, only_rank=1)
    assert stop_and_go_on(output, "run_stage_II.py", keys, setup, processes=2) == 2
    assert_same_to_the_bit(output, whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5])
def test_stopping_where_epochs_end_changes_nothing(step: int, folder: Path, keys: dict[str, Any]) -> None:
    """Within an epoch nothing is evaluated; at its end, the checkpoint comes after the evaluation."""
    further = {"num_eval_rows": 8, "eval_strategy": "epoch", "max_steps": 9}  # 4 steps an epoch
    whole, output = folder / f"epoch-whole-{step}", folder / f"epoch-{step}"
    assert run("run_stage_II.py", whole, keys | further) == [0]
    setup = signal_within(step, signal.SIGTERM)
    assert stop_and_go_on(output, "run_stage_II.py", keys | further, setup) == step
    assert sum("eval_loss" in entry for entry in log_of(whole)) == 3
    assert_same_to_the_bit(output, whole)


def test_even_where_checkpoints_hold_weights_only(folder: Path, keys: dict[str, Any], undisturbed: Path) -> None:
    """The checkpoint of a stop is there to go on from."""
    output = folder / "weights"
    further = {"save_strategy": "steps", "save_only_model": True, "save_steps": 100}
    assert stop_and_go_on(output, "run_stage_II.py", keys | further, signal_within(3, signal.SIGTERM)) == 3
    assert_same_to_the_bit(output, undisturbed)


def test_in_the_last_step_the_run_just_ends(folder: Path, keys: dict[str, Any], undisturbed: Path) -> None:
    output = folder / "last"
    assert run("run_stage_II.py", output, keys, setup=signal_within(7, signal.SIGTERM)) == [0]
    assert "stopped after" not in said(output) and not checkpoints_in(output)
    assert_same_to_the_bit(output, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(number: signal.Signals, code: int, folder: Path, keys: dict[str, Any]) -> None:
    output = folder / f"second-{code}"

    def setup(rank: int) -> None:
        signal_within(3, number)(rank)
        signal_within(3, number)(rank)

    assert run("run_stage_II.py", output, keys, setup=setup) == [code]
    assert not checkpoints_in(output)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_handler_that_cannot_be_put_back_gives_way_to_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a program in C had set, before it began to run Python in itself, is None to Python."""
    set_to: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_to.append(handler))
    with StopSignals() as signals:
        assert set_to == [signals._note] * len(STOP_SIGNALS)
    assert set_to[len(STOP_SIGNALS) :] == [signal.SIG_DFL] * len(STOP_SIGNALS)


def signal_group_within(module: Any, name: str) -> Setup:
    """SIGTERM to the process and its workers, as Ctrl-C and Slurm send it, once they fetch rows: when a function of a
    module is called for the first time."""

    def setup(rank: int) -> None:
        os.setpgid(0, 0)
        function = getattr(module, name)

        def signal_first(*arguments: Any, **keywords: Any) -> Any:
            setattr(module, name, function)
            os.killpg(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # a worker that is hit is found dead
            return function(*arguments, **keywords)

        setattr(module, name, signal_first)

    return setup


@pytest.mark.parametrize(
    ("module", "name"), [(trainer, "backward_step"), (step, "loss_parts")], ids=["training", "evaluating"]
)
def test_workers_outlive_a_signal_to_all_of_the_group(
    module: Any, name: str, folder: Path, keys: dict[str, Any]
) -> None:
    output = folder / f"group-{name}"
    further = {"dataloader_num_workers": 1, "num_eval_rows": 16, "eval_strategy": "steps", "eval_steps": 1}
    further |= {"per_device_train_batch_size": 2}  # so that rows are still to be fetched
    assert run("run_stage_II.py", output, keys | further, setup=signal_group_within(module, name)) == [0], said(output)
    assert "stopped after step" in said(output) and "exited unexpectedly" not in said(output)
    assert why_unusable(checkpoints_in(output)[-1]) is None


@pytest.mark.parametrize(("step", "evaluated"), [(3, "steps"), (4, "steps"), (6, "steps"), (8, "epoch")])
def test_where_only_the_best_is_saved_a_stop_is_saved_too(
    step: int, evaluated: str, folder: Path, keys: dict[str, Any]
) -> None:
    """Where nothing is evaluated, and where it is and is no better than before; an epoch has 4 steps."""
    output = folder / f"best-{step}"
    further = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "greater_is_better": True}
    further |= {"num_eval_rows": 8, "eval_strategy": evaluated, "eval_steps": 2, "max_steps": 9}
    setup = signal_within(step, signal.SIGTERM)
    assert run("run_stage_II.py", output, keys | further, setup=setup) == [0], said(output)
    measured = {entry["step"]: entry["eval_loss"] for entry in log_of(output) if "eval_loss" in entry}
    assert step == 3 or max(measured.values()) > measured[step]
    assert f"stopped after step {step}, saved to {output / f'checkpoint-{step}'}; to go on:" in said(output)
    assert why_unusable(output / f"checkpoint-{step}") is None


# --- lost processes ---


def lose(step: int, stop: signal.Signals) -> Setup:
    """The second process dies or freezes within a step."""
    return signal_within(step, stop, only_rank=1)


def test_a_dead_process_ends_the_other_with_one_line(folder: Path, keys: dict[str, Any]) -> None:
    output = folder / "dead"
    started = time.monotonic()
    assert run("run_stage_II.py", output, keys, 2, lose(3, signal.SIGKILL)) == [1, -signal.SIGKILL]
    assert time.monotonic() - started < 60
    last = said(output).splitlines()[-1]
    assert last.startswith("error: process 0: another process of the run ended or hangs")
    assert "Traceback" not in said(output)


# --- as users start it ---


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts; whatever is left of it at the end is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        yield process
    finally:
        for child in children_of(process):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes that a process has started, in their order."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def wait_for_step(output: Path, step: int, process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Until the log has an entry of the step."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        log = output / LOG_FILE
        if log.is_file() and f'"step": {step},' in log.read_text(encoding="utf-8"):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}")


@pytest.fixture(scope="module")
def long_run(folder: Path, keys: dict[str, Any]) -> tuple[Path, list[str]]:
    """Output folder and command of a run under torchrun that takes a while."""
    output, file = folder / "torchrun", folder / "torchrun.json"
    further = {"max_steps": 10_000, "logging_steps": 1, "dataloader_num_workers": 1, "output_dir": str(output)}
    file.write_text(json.dumps(keys | further), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return output, [*torchrun, str(ROOT / "experiments/run_stage_II.py"), str(file)]


def step_reached(output: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints_in(output)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_torchrun_passes_the_signal_on(number: signal.Signals, long_run: tuple[Path, list[str]]) -> None:
    """To all processes and their workers; each start goes on from where the one before stopped."""
    output, command = long_run
    before = step_reached(output)
    with started(command, output.with_suffix(".log")) as process:
        wait_for_step(output, before + 3, process)
        process.send_signal(number)
        assert process.wait(120) == 1  # torchrun's own code for a signal
    log = output.with_suffix(".log").read_text(encoding="utf-8")
    assert step_reached(output) >= before + 3 and why_unusable(checkpoints_in(output)[-1]) is None, log
    assert log.count("; to go on: torchrun --nproc_per_node=2") == 1
    assert "Unable to shutdown" not in log and "DataLoader worker" not in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "seconds"),
    [(signal.SIGKILL, 1800), (signal.SIGSTOP, 10)],
    ids=["dies", "freezes, and ddp_timeout is 10"],
)
def test_torchrun_and_a_lost_process(
    number: signal.Signals, seconds: int, folder: Path, long_run: tuple[Path, list[str]]
) -> None:
    """The other one ends, with one line."""
    output, file = folder / f"lost-{number.name}", folder / f"lost-{number.name}.json"
    config = json.loads(Path(long_run[1][-1]).read_text(encoding="utf-8"))
    config |= {"output_dir": str(output), "ddp_timeout": seconds}
    file.write_text(json.dumps(config), encoding="utf-8")
    with started([*long_run[1][:-1], str(file)], output.with_suffix(".log")) as process:
        wait_for_step(output, 3, process)
        os.kill(children_of(process)[-1], number)
        began = time.monotonic()
        assert process.wait(180) == 1
        assert time.monotonic() - began < 120  # the timeout, and 30 s that torchrun gives the frozen one
    log = output.with_suffix(".log").read_text(encoding="utf-8")
    assert log.count("another process of the run ended or hangs") == 1, log
