"""Files that start runs under torchrun, accelerate, Slurm and SkyPilot: their syntax, and what they call."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "train_configs/launch"
#: Stands for torchrun: says its arguments, and notes a SIGTERM as a run does, which saves and ends with 1 (torchrun's).
FAKE = """#!/usr/bin/env bash
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*"
[ -z "${WAITS:-}" ] && exit 3
trap 'echo saved; exit 1' TERM
echo waiting
for i in $(seq 200); do sleep 0.05; done
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "torchrun").write_text(FAKE)
    (tmp_path / "torchrun").chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "TORCH"))}
    return {**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "--standalone --nproc_per_node=1"),
        ({"CARDS": "8", "NODE_RANK": "0"}, "--standalone --nproc_per_node=8"),
        (
            {"CARDS": "8", "MACHINES": "2", "FIRST": "a"},
            "--nnodes=2 --rdzv_id=llm2vec --rdzv_backend=c10d --rdzv_endpoint=a:29500 --nproc_per_node=8",
        ),
        (
            {"CARDS": "8", "MACHINES": "2", "FIRST": "a", "NODE_RANK": "1", "PORT": "7"},
            "--nnodes=2 --node_rank=1 --master_addr=a --master_port=7 --nproc_per_node=8",
        ),
        ({"SLURM_JOB_ID": "5"}, "--standalone --nproc_per_node=1"),
    ],
)
def test_torchrun_is_called_for_each_size(given: dict[str, str], expected: str, environment: dict[str, str]) -> None:
    command = ["bash", str(LAUNCH / "torchrun.sh"), "stage-1", "my config.json"]
    done = subprocess.run(command, env={**environment, **given}, capture_output=True, text=True)
    assert done.stdout == f"600 {expected} -m llm2vec stage-1 my config.json\n" and done.returncode == 3, done.stderr


def test_two_machines_need_to_know_the_first(environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", str(LAUNCH / "torchrun.sh"), "stage-1", "x"],
        env={**environment, "MACHINES": "2"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "FIRST: is not set" in done.stderr


def test_slurm_stops_a_run_by_one_signal(environment: dict[str, str]) -> None:
    """SIGUSR1 goes to all processes, as Slurm sends it; torchrun alone gets a SIGTERM, and its exit code stays."""
    run = subprocess.Popen(
        ["bash", str(LAUNCH / "torchrun.sh"), "stage-1", "x"], env={**environment, "SLURM_JOB_ID": "5", "WAITS": "1"},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline().startswith("600 ") and run.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    os.killpg(run.pid, signal.SIGUSR1)
    assert run.communicate(timeout=20)[0] == "saved\n" and run.returncode == 1


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


def test_slurm_asks_for_one_task_a_machine() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8").splitlines()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", "\n".join(lines), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1" and asked["gpus-per-node"] == "8" and asked["signal"] == "USR1@900"
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:]), "Slurm stops reading there"


@pytest.mark.parametrize(("size", "machines", "processes"), [("1x1", 1, 1), ("1x8", 1, 8), ("2x8", 2, 16)])
def test_accelerate_reads_its_files(size: str, machines: int, processes: int) -> None:
    reader: Any = importlib.import_module("accelerate.commands.config.config_args")
    config = reader.load_config_from_file(str(LAUNCH / f"accelerate_{size}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert not config.fsdp_config and not config.deepspeed_config and config.mixed_precision == "no"


def test_skypilot_has_a_whole_task() -> None:
    task = read("skypilot.yaml")
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    assert (LAUNCH.parents[1] / task["envs"]["CONFIG"]).is_file()
    assert "train_configs/launch/torchrun.sh" in task["run"] and (LAUNCH / "torchrun.sh").is_file()
