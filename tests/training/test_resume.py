"""A run that is killed and started again ends as if it had never been: weights and log, to the bit."""

from __future__ import annotations

import codecs
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import (
    Setup,
    assert_same_to_the_bit,
    kill_within,
    log_of,
    make_data,
    run,
    said,
    signal_within,
    weights_of,
)
from helpers import write_jsonl
from transformers import LlamaForCausalLM

from llm2vec import LLM2Vec, cli
from llm2vec.files import LOCK_FILE, alone_in
from llm2vec.model import checkpoint as checkpoint_module
from llm2vec.model.chain import RUN_FILE, mark_of, revision_of
from llm2vec.model.checkpoint import SUMS_FILE, check_sums
from llm2vec.training import model as run_model
from llm2vec.training import saving
from llm2vec.training.config import Config
from llm2vec.training.config.file import load_config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.resume import (
    checkpoints_in,
    command_to_resume,
    differences,
    find_start,
    step_of,
    why_unusable,
)
from llm2vec.training.trainer import EmbedderTrainer
from llm2vec.types import RunEnds, Stage, UserError

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file lie."""
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, Any]:
    """Keys of a run of 7 steps, 5 an epoch, with a checkpoint every second and an entry of the log every third."""
    return make_data(folder)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, keys: dict[str, Any]) -> Path:
    """Stage I in one process, all the way."""
    output = folder / "undisturbed"
    assert run("run_stage_I.py", output, keys) == [0]
    assert [path.name for path in checkpoints_in(output)] == [f"checkpoint-{step}" for step in (2, 4, 6, 7)]
    return output


@pytest.fixture(scope="module")
def killed(folder: Path, keys: dict[str, Any]) -> Path:
    """The same, killed in its fifth step; not to be changed."""
    output = folder / "killed"
    assert run("run_stage_I.py", output, keys, setup=kill_within(5)) == [KILLED]
    return output


@pytest.fixture
def cut(killed: Path, folder: Path) -> Path:
    """A copy of the killed run that may be changed."""
    output = folder / "cut"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(killed, output)
    return output


# --- to the bit ---

#: Script, further keys, processes.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "stage I, two processes, accumulation, recomputing": (
        "run_stage_I.py",
        {"per_device_train_batch_size": 2, "gradient_checkpointing": True, "tokens_per_microbatch": 64},
        2,
    ),
    "stage I, mean of micro-batches": (
        "run_stage_I.py",
        {"per_device_train_batch_size": 2, "reduction": "micro_batch_mean", "one_source_per": "micro_batch"},
        1,
    ),
    "stage I, a learnt projection": ("run_stage_I.py", {"projection": "linear"}, 1),
    "stage I, a frozen copy and texts cut anew": (
        "run_stage_I.py",
        {"target": "next", "decoder": "frozen", "target_loss": "kl", "template": "memory_2", "pooling_mode": "mean"},
        1,
    ),
    "stage I, tokens alone": (
        "run_stage_I.py",
        {"trainable": "tokens", "decoder": "frozen", "template": "memory_2", "pooling_mode": "mean"},
        1,
    ),
    "stage I, bfloat16 autocast": ("run_stage_I.py", {"bf16": True}, 1),
    "stage I, workers fetch the rows": ("run_stage_I.py", {"dataloader_num_workers": 1}, 1),
    "stage I, evaluation every epoch": (
        "run_stage_I.py",
        {"num_eval_rows": 8, "eval_strategy": "epoch", "save_steps": 4, "total_batch_size": 8},
        1,
    ),
    "stage I, token set": (
        "run_stage_I.py",
        {
            "template": "llara",
            "pooling_mode": "mean",
            "max_seq_length": 128,
            "bottleneck": "states",
            "target": "both",
            "target_loss": "bag",
            "alpha": 0.5,
            "lm_weight": 1.0,
        },
        1,
    ),
    "stage II, gradient caching": ("run_stage_II.py", {"tokens_per_microbatch": 64, "lora_dropout": 0.3}, 1),
    "stage II, two processes, gradient caching": (
        "run_stage_II.py",
        {"tokens_per_microbatch": 64, "lora_dropout": 0.3, "gradient_checkpointing": True},
        2,
    ),
    "stage II, all parameters, evaluation": (
        "run_stage_II.py",
        {
            "use_peft": False,
            "num_eval_rows": 8,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "embedding_diagnostics": True,
        },
        1,
    ),
    "stage II, language modelling beside": ("run_stage_II.py", {"lm_weight": 0.5, "lora_dropout": 0.3}, 1),
    "stage II, added tokens": ("run_stage_II.py", {"template": "gritlm", "pooling_mode": "mean"}, 1),
    "language modelling": ("run_lm.py", {"optim": "adamw_torch_fused"}, 1),
    "SimCSE": ("run_simcse.py", {}, 1),
    "MNTP, two processes": ("run_mntp.py", {"max_seq_length": 48, "lora_dropout": 0.3, "total_batch_size": 4}, 2),
    "adafactor": ("run_stage_I.py", {"optim": "adafactor"}, 1),
}
FAST = ("stage I, two processes, accumulation, recomputing", "stage II, two processes, gradient caching")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_killed_runs_end_as_the_undisturbed_one(case: str, folder: Path, keys: dict[str, Any]) -> None:
    """Killed in steps 2, 5, 6 and 7: before the first checkpoint, within the first epoch, and within the second."""
    script, further, processes = CASES[case]
    name = "".join(letter if letter.isalnum() else "-" for letter in case)
    whole, cut = folder / f"{name}-whole", folder / f"{name}-cut"
    assert run(script, whole, keys | further, processes) == [0] * processes, said(whole)
    for step in (2, 6, 7) if case in FAST else (2, 5, 6, 7):
        assert run(script, cut, keys | further, processes, kill_within(step)) == [KILLED] * processes
    assert run(script, cut, keys | further, processes) == [0] * processes
    assert "resume      from step" in said(cut)
    assert_same_to_the_bit(cut, whole)
    assert len({entry["loss"] for entry in log_of(whole) if "loss" in entry}) > 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("optimi") is None, reason="needs the extra bf16")
def test_bfloat16_weights_with_compensated_updates(folder: Path, keys: dict[str, Any]) -> None:
    """The compensation is state, too."""
    further = {
        "torch_dtype": "bfloat16",
        "optim": "stable_adamw",
        "optim_args": "kahan_sum=True",
        "learning_rate": 1e-3,
    }
    whole, cut = folder / "kahan-whole", folder / "kahan-cut"
    assert run("run_stage_I.py", whole, keys | further) == [0]
    assert run("run_stage_I.py", cut, keys | further, setup=kill_within(6)) == [KILLED]
    assert run("run_stage_I.py", cut, keys | further) == [0]
    assert {weight.dtype for weight in weights_of(cut).values()} == {torch.bfloat16}
    assert_same_to_the_bit(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_stage_I.py", "run_stage_II.py"], ids=["all weights", "LoRA"])
def test_weights_spread_over_processes(script: str, folder: Path, keys: dict[str, Any]) -> None:
    """FSDP2: each process writes and reads its share of the optimiser's state."""
    further = {"fsdp": True, "bf16": True}
    whole, cut = folder / f"fsdp-whole-{script}", folder / f"fsdp-cut-{script}"
    assert run(script, whole, keys | further, 2) == [0, 0]
    for step in (2, 6):
        assert run(script, cut, keys | further, 2, kill_within(step)) == [KILLED] * 2
    assert run(script, cut, keys | further, 2) == [0, 0]
    assert_same_to_the_bit(cut, whole)


def test_a_checkpoint_is_a_model_and_holds_all_bits(folder: Path, keys: dict[str, Any]) -> None:
    """Also where the steps are in bfloat16."""
    output = folder / "bits"
    assert run("run_stage_I.py", output, keys | {"bf16": True, "max_steps": 2}) == [0]
    for weight in weights_of(output / "checkpoint-2").values():
        assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    model = LLM2Vec.from_pretrained(str(output / "checkpoint-2"))
    assert model.encode(["hello world"], show_progress_bar=False).shape == (1, 32)


def test_the_log_has_each_step_once(cut: Path, keys: dict[str, Any], undisturbed: Path) -> None:
    """Lines of steps that are done again are gone, and so are lines that the kill cut short."""
    with (cut / LOG_FILE).open("a", encoding="utf-8") as log:
        log.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    assert run("run_stage_I.py", cut, keys) == [0]
    assert [entry["step"] for entry in log_of(cut)] == [3, 6, 7]
    assert_same_to_the_bit(cut, undisturbed)


def test_a_run_goes_on_where_its_stop_was_moved(cut: Path, keys: dict[str, Any], undisturbed: Path) -> None:
    """`stop_after_n_steps` decides no step, so a run may be made longer; made shorter, it is over."""
    assert run("run_stage_I.py", cut, keys | {"stop_after_n_steps": 4}) == [0]
    assert (cut / "model.safetensors").is_file() and json.loads((cut / RUN_FILE).read_text())["step"] == 4
    assert [entry["step"] for entry in log_of(cut)] == [3, 4]
    assert run("run_stage_I.py", cut, keys | {"stop_after_n_steps": 3}) == [0]
    assert "nothing is left to do" in said(cut)
    assert run("run_stage_I.py", cut, keys) == [0]
    assert_same_to_the_bit(cut, undisturbed)


def test_a_stop_that_was_moved_without_a_checkpoint_is_said(folder: Path, keys: dict[str, Any]) -> None:
    """The run starts at step 0, and its weights are there as long as it takes."""
    output = folder / "moved"
    further = {"save_strategy": "no"}
    assert run("run_stage_I.py", output, keys | further | {"stop_after_n_steps": 2}) == [0]
    assert "no checkpoint to go on from" not in said(output)
    assert run("run_stage_I.py", output, keys | further | {"stop_after_n_steps": 4}) == [0]
    assert f"{output} holds this run's weights, but no checkpoint to go on from: it starts at step 0" in said(output)


def test_the_record_names_the_step_of_the_best_weights(folder: Path, keys: dict[str, Any]) -> None:
    """Here the worst pass for the best, so that they are not the last."""
    output = folder / "best"
    further = {"num_eval_rows": 8, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6}
    further |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    assert run("run_stage_I.py", output, keys | further) == [0]
    losses = {entry["step"]: entry["eval_loss"] for entry in log_of(output) if "eval_loss" in entry}
    best = max(losses, key=losses.__getitem__)
    record = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    assert (record["step"], record["weights_of_step"]) == (6, best) and best < 6
    own, of_best = weights_of(output), weights_of(output / f"checkpoint-{best}")
    assert all(torch.equal(own[name], of_best[name]) for name in of_best)
    assert "weights_of_step" not in json.loads((output / "checkpoint-6" / RUN_FILE).read_text(encoding="utf-8"))


# --- killed while it writes ---


def kill_at(module: Any, name: str, call: int) -> Setup:
    """SIGKILL when a function of a module or class is called for the n-th time."""

    def setup(rank: int) -> None:
        original: Callable[..., Any] = getattr(module, name)
        calls = iter(range(1, 1000))

        def counted(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(module, name, counted)

    return setup


#: Where the save of step 4 is killed, and the step that the run then goes on from.
SAVING = {
    "before the weights": (checkpoint_module, "environment", 2, 2),
    "before the random numbers": (EmbedderTrainer, "_save_rng_state", 2, 2),
    "before the sums": (saving, "write_sums", 2, 2),
    "before older ones are removed": (saving.CheckpointWriter, "_remove_old", 2, 4),
    "in the last save, of the model alone": (checkpoint_module, "environment", 5, 7),
}


@pytest.mark.parametrize("where", SAVING)
def test_killed_while_saving(where: str, folder: Path, keys: dict[str, Any], undisturbed: Path) -> None:
    """The run goes on from the last checkpoint that was whole, and nothing of the other is left."""
    module, name, call, resumed = SAVING[where]
    output = folder / "saving"
    shutil.rmtree(output, ignore_errors=True)
    assert run("run_stage_I.py", output, keys | {"save_total_limit": 1}, setup=kill_at(module, name, call)) == [KILLED]
    assert run("run_stage_I.py", output, keys | {"save_total_limit": 1}) == [0]
    assert f"resume      from step {resumed}, " in said(output)
    assert_same_to_the_bit(output, undisturbed)
    left = sorted(path.name for path in output.iterdir() if path.is_dir())
    assert left == ["checkpoint-7"]


# --- damaged checkpoints ---


def truncate(file: Path) -> None:
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", SUMS_FILE]
)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_left_out(
    file: str, damage: Callable[[Path], None], cut: Path, keys: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    damage(cut / "checkpoint-4" / file)
    assert find_start(config_of(cut, keys)) == cut / "checkpoint-2"
    assert str(cut / "checkpoint-4") in caplog.text and "It is left out." in caplog.text


def test_a_byte_order_mark_before_the_state_is_refused(cut: Path) -> None:
    """Though its sum be right: transformers' own reader does not take it."""
    file = cut / "checkpoint-4/trainer_state.json"
    assert step_of(file.parent) == 4
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    with pytest.raises(UserError, match=r"checkpoint-4/trainer_state\.json: begins with a byte order mark"):
        step_of(file.parent)


def test_going_on_before_a_damaged_checkpoint(cut: Path, keys: dict[str, Any], undisturbed: Path) -> None:
    """It is written anew when its step comes; with a limit of one checkpoint, the good one is never the one to go."""
    flip_a_bit(cut / "checkpoint-4" / "optimizer.pt")
    further = {"save_total_limit": 1, "save_steps": 3}
    assert run("run_stage_I.py", cut, keys | further, setup=kill_within(4)) == [KILLED]
    assert why_unusable(cut / "checkpoint-3") is None
    flip_a_bit(cut / "checkpoint-3" / "optimizer.pt")
    flip_a_bit(cut / "checkpoint-3" / "optimizer.pt")  # as it was
    assert run("run_stage_I.py", cut, keys | further) == [0]
    assert "from step 3" in said(cut)
    assert_same_to_the_bit(cut, undisturbed)


def test_no_checkpoint_is_whole(cut: Path, keys: dict[str, Any], undisturbed: Path) -> None:
    """Then the run begins at step 0, and says why."""
    for checkpoint in checkpoints_in(cut):
        truncate(checkpoint / "optimizer.pt")
    assert run("run_stage_I.py", cut, keys) == [0]
    assert said(cut).count("It is left out.") == 2 and "from step" not in said(cut)
    assert_same_to_the_bit(cut, undisturbed)


def test_the_sums_are_those_of_sha256sum(undisturbed: Path) -> None:
    """All files have one, and the common tool reads them."""
    checkpoint = undisturbed / "checkpoint-4"
    listed = [line.split("  ")[1] for line in (checkpoint / SUMS_FILE).read_text().splitlines()]
    assert sorted(listed) == sorted(path.name for path in checkpoint.iterdir() if path.name != SUMS_FILE)
    assert os.system(f"cd {checkpoint} && sha256sum --check --quiet {SUMS_FILE}") == 0
    check_sums(checkpoint)


# --- a full disk ---


def full_from(save: int) -> Setup:
    """The disk is full from the n-th checkpoint's optimiser on: its file is cut, and the write fails."""

    def setup(rank: int) -> None:
        original = EmbedderTrainer._save_optimizer_and_scheduler
        calls = iter(range(1, 100))

        def fails(self: EmbedderTrainer, output_dir: str) -> None:
            original(self, output_dir)
            if next(calls) >= save and rank == 0:
                truncate(Path(output_dir, "optimizer.pt"))
                raise OSError(28, "No space left on device")

        EmbedderTrainer._save_optimizer_and_scheduler = fails  # type: ignore[method-assign]

    return setup


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    processes: int, folder: Path, keys: dict[str, Any], undisturbed: Path
) -> None:
    output = folder / f"full-{processes}"
    assert run("run_stage_I.py", output, keys, processes, full_from(2)) == [1] * processes
    message = said(output).splitlines()[-1]
    assert "No space left on device" in message and f"The last good checkpoint is {output / 'checkpoint-2'}" in message
    needed, free = (int(word.replace(",", "")) for word in message.split() if word[0].isdigit() and "," in word)
    written = sum(file.stat().st_size for file in (output / "checkpoint-2").iterdir() if file.suffix != ".json")
    assert needed == pytest.approx(written, rel=0.2) and abs(free - shutil.disk_usage(output).free) < 1e9
    assert [path.name for path in output.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert run("run_stage_I.py", output, keys, processes) == [0] * processes
    if processes == 1:
        assert_same_to_the_bit(output, undisturbed)


def full_at(module: Any, name: str, wanted: Callable[..., bool] = lambda *_, **__: True) -> Setup:
    """The disk is full where the first process calls a function of a module or class with arguments of interest."""

    def setup(rank: int) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def fails(*arguments: Any, **keywords: Any) -> Any:
            if rank == 0 and wanted(*arguments, **keywords):
                raise OSError(28, "No space left on device")
            return original(*arguments, **keywords)

        setattr(module, name, fails)

    return setup


def has_last_weights(model: Any, folder: str, **_: Any) -> bool:
    """Whether the weights are on their way into the output folder itself."""
    return not Path(folder).parent.name.startswith(".checkpoint-")


#: What cannot be written for want of room, and the last checkpoint then.
FULL = {
    "checkpoint-4": (full_at(Path, "mkdir", lambda path, **_: path.name == ".checkpoint-4"), 2),
    LOG_FILE: (full_at(Path, "open", lambda path, *mode, **_: path.name == LOG_FILE and mode == ("a",)), 2),
    f"{LOG_FILE} at the start": (full_at(Path, "write_text", lambda path, *_, **__: LOG_FILE in path.name), 0),
    "the last weights": (full_at(LlamaForCausalLM, "save_pretrained", has_last_weights), 7),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_said_in_a_sentence_wherever_it_is_met(
    what: str, folder: Path, keys: dict[str, Any], undisturbed: Path
) -> None:
    """With exit code 1; nothing is left half written, and the same command goes on."""
    setup, last = FULL[what]
    output = folder / f"no-room-{what.replace(' ', '-')}"
    assert run("run_stage_I.py", output, keys, setup=setup) == [1], said(output)
    message = said(output).splitlines()[-1]
    file = {"the last weights": output, f"{LOG_FILE} at the start": output / LOG_FILE}.get(what, output / what)
    assert message.startswith(f"error: {file} could not be written ([Errno 28] No space left on device"), message
    good = f"The last good checkpoint is {output / f'checkpoint-{last}'}." if last else "There is no checkpoint yet."
    assert message.endswith(good) and "Traceback" not in said(output)
    assert not list(output.glob(".checkpoint-*")) and not list(output.glob(".writing-*"))
    assert run("run_stage_I.py", output, keys) == [0]
    assert_same_to_the_bit(output, undisturbed)


def test_a_mistake_that_one_process_meets_is_said_by_it(folder: Path, keys: dict[str, Any]) -> None:
    """With its number; the other one sees that it is gone."""

    def setup(rank: int) -> None:
        def refuse(*arguments: Any, **keywords: Any) -> Any:
            raise UserError("model_name_or_path: there is no such folder on this machine.")

        if rank == 1:
            run_model.load_backbone = refuse

    output = folder / "one-alone"
    assert run("run_stage_II.py", output, keys, 2, setup) == [1, 2]
    last = said(output, 1).splitlines()[-1]
    assert last == "error: process 1: model_name_or_path: there is no such folder on this machine."
    assert said(output).splitlines()[-1].startswith("error: process 0: another process of the run ended")


def test_a_mistake_that_all_processes_meet_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the first of the machine, also where that one comes to it half a minute later; torchrun then ends the rest."""

    class Ended(BaseException):
        pass

    def sleep(seconds: float) -> None:
        if seconds > 30:
            raise Ended

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("llm2vec.cli.time.sleep", sleep)
    with pytest.raises(Ended), cli.user_errors_in_one_sentence():
        raise UserError("alpha is 2; it must lie between 0 and 1.")
    assert "error" not in capfd.readouterr().err


@pytest.mark.parametrize(("local_rank", "said"), [(0, "interrupted\n"), (1, "")])
def test_ctrl_c_outside_a_run_is_one_word(
    local_rank: int, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", str(local_rank))
    with pytest.raises(SystemExit) as end, cli.user_errors_in_one_sentence():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capfd.readouterr().err == said


# --- whose checkpoint ---


def config_of(output: Path, keys: dict[str, Any], stage: Stage = "stage_I") -> Config:
    file = output.with_suffix(".config.json")
    file.write_text(json.dumps({**keys, "output_dir": str(output)}), encoding="utf-8")
    return load_config(file, stage)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"learning_rate": 2e-2}, "learning_rate is 0.01 there and 0.02 here"),
        ({"seed": 43}, "seed is 42 there and 43 here"),
        ({"alpha": 0.3, "max_steps": 8}, "alpha is 0.2 there and 0.3 here; max_steps is 7 there and 8 here"),
        ({"optim": "sgd"}, "there and 'sgd' here"),
        ({"num_eval_rows": 4}, "num_eval_rows is 0 there and 4 here"),
    ],
    ids=str,
)
def test_another_config_is_refused(
    changed: dict[str, Any], difference: str, killed: Path, keys: dict[str, Any]
) -> None:
    """With both values of every key that differs."""
    with pytest.raises(UserError) as error:
        find_start(config_of(killed, keys | changed))
    assert difference in str(error.value) and 'set "resume": "never"' in str(error.value)


def test_another_stage_is_refused(killed: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="stage is 'stage_I' there and 'lm' here"):
        find_start(config_of(killed, keys, "lm"))


def test_another_number_of_processes_is_refused(killed: Path, keys: dict[str, Any]) -> None:
    """By all processes, with exit code 2; the checkpoints stay."""
    assert run("run_stage_I.py", killed, keys, 2) == [2, 2]
    assert "it ran in 1 process(es), not 2" in said(killed) and said(killed, 1).count("error") == 0
    assert why_unusable(killed / "checkpoint-4") is None


@pytest.mark.parametrize(
    "changed",
    [{}, {"save_steps": 3, "logging_steps": 1}, {"dataloader_num_workers": 2}, {"stop_after_n_steps": 5},
     {"optim": "adamw_torch_fused"}, {"warmup_steps": 0}],
    ids=str,
)  # fmt: skip
def test_keys_without_influence_and_defaults_written_out(
    changed: dict[str, Any], killed: Path, keys: dict[str, Any]
) -> None:
    assert find_start(config_of(killed, keys | changed)) == killed / "checkpoint-4"


def test_other_micro_batches_are_said(killed: Path, keys: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """They change no more than rounding, and a run that ran out of memory needs them."""
    assert find_start(config_of(killed, keys | {"tokens_per_microbatch": 64})) == killed / "checkpoint-4"
    assert "tokens_per_microbatch was None, is 64: other rounding" in caplog.text


def test_changed_data_and_changed_base_are_refused(cut: Path, keys: dict[str, Any], folder: Path) -> None:
    words, base = folder / "words.jsonl", folder / "base" / "model.safetensors"
    lines = words.read_text(encoding="utf-8")
    write_jsonl(words, [json.loads(line) for line in lines.splitlines()[:-1]])
    with pytest.raises(UserError, match=r"words\.jsonl has changed since"):
        find_start(config_of(cut, keys))
    words.write_text(lines, encoding="utf-8")
    flip_a_bit(base)
    with pytest.raises(UserError, match="base is not what it was"):
        find_start(config_of(cut, keys))
    flip_a_bit(base)
    assert find_start(config_of(cut, keys)) == cut / "checkpoint-4"


def test_a_mark_knows_the_files_that_make_a_model(folder: Path, keys: dict[str, Any]) -> None:
    """And not those that say where it is from; a hub name that is not in the cache has none."""
    copy = folder / "marked"
    shutil.copytree(folder / "base", copy)
    (copy / RUN_FILE).write_text("{}", encoding="utf-8")
    assert mark_of(str(copy)) == mark_of(str(folder / "base"))
    (copy / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert mark_of(str(copy)) != mark_of(str(folder / "base"))
    assert mark_of("nobody/nothing") == ""


def test_a_record_from_before_a_key_existed(killed: Path, keys: dict[str, Any]) -> None:
    """A key that it lacks had its default."""
    recorded = json.loads((killed / "checkpoint-4" / RUN_FILE).read_text(encoding="utf-8"))
    del recorded["config"]["stage"], recorded["config"]["max_skipped_steps"], recorded["config"]["alpha"]
    assert differences(recorded, config_of(killed, keys)) == []
    assert differences(recorded, config_of(killed, keys | {"alpha": 0.5})) == ["alpha is 0.2 there and 0.5 here"]


# --- what `resume` says ---


def test_a_finished_run_is_left_alone(undisturbed: Path, keys: dict[str, Any]) -> None:
    """Exit code 0, without training; but not where another config wants the folder."""
    before = (undisturbed / "model.safetensors").stat().st_mtime_ns
    assert run("run_stage_I.py", undisturbed, keys) == [0]
    assert "which ended at step 7; nothing is left to do" in said(undisturbed)
    assert (undisturbed / "model.safetensors").stat().st_mtime_ns == before
    assert run("run_stage_I.py", undisturbed, keys | {"alpha": 0.5}) == [2]
    assert "alpha is 0.2 there and 0.5 here" in said(undisturbed)


def test_a_finished_run_ends_two_processes(folder: Path, keys: dict[str, Any]) -> None:
    output = folder / "two"
    further = {"max_steps": 1, "save_strategy": "no"}
    assert run("run_stage_I.py", output, keys | further, 2) == [0, 0]
    assert run("run_stage_I.py", output, keys | further, 2) == [0, 0]
    assert "nothing is left to do" in said(output) and "error" not in said(output, 1)


def test_weights_alone_are_nothing_to_go_on_from(folder: Path, keys: dict[str, Any], undisturbed: Path) -> None:
    """`save_only_model`: the same config starts at step 0 and says why; another one would write over them."""
    output = folder / "weights"
    further = {"save_only_model": True}
    assert run("run_stage_I.py", output, keys | further, setup=kill_within(4)) == [KILLED]
    with pytest.raises(UserError, match=r"alpha is 0\.2 there and 0\.5 here"):
        find_start(config_of(output, keys | {"alpha": 0.5}))
    assert run("run_stage_I.py", output, keys | further) == [0]
    assert "holds weights only (save_only_model). It is left out." in said(output)
    assert_same_to_the_bit(output, undisturbed)


def test_never_starts_over_and_removes_what_was_there(cut: Path, keys: dict[str, Any]) -> None:
    further = {"resume": "never", "alpha": 0.5, "max_steps": 3}
    assert run("run_stage_I.py", cut, keys | further) == [0]
    assert "never: " in said(cut) and [path.name for path in checkpoints_in(cut)] == ["checkpoint-2", "checkpoint-3"]
    assert [entry["step"] for entry in log_of(cut)] == [3, 3]


def test_a_path_names_the_checkpoint(cut: Path, keys: dict[str, Any], folder: Path, undisturbed: Path) -> None:
    """Into another folder, too; what cannot be gone on from is refused."""
    output = folder / "elsewhere"
    named = keys | {"resume": str(cut / "checkpoint-2")}
    assert run("run_stage_I.py", output, named) == [0]
    assert f"from step 2, {cut / 'checkpoint-2'}" in said(output)
    assert_same_to_the_bit(output, undisturbed)
    truncate(cut / "checkpoint-2" / "optimizer.pt")
    for path, reason in [
        (cut / "checkpoint-2", r"resume: .*optimizer\.pt is not what was written, by its SHA-256"),
        (cut / "checkpoint-9", "resume: there is no folder .*checkpoint-9"),
        (folder / "base", f"resume: .*base has no {SUMS_FILE}"),
    ]:
        with pytest.raises(UserError, match=reason):
            find_start(config_of(output, keys | {"resume": str(path)}))
    with pytest.raises(UserError, match="max_steps is 7 there and 8 here"):
        find_start(config_of(output, keys | {"resume": str(cut / "checkpoint-4"), "max_steps": 8}))


def test_going_back_leaves_later_checkpoints_and_says_so(folder: Path, keys: dict[str, Any], undisturbed: Path) -> None:
    """They do not push out the run's own, and what it says and saves is its own; in the end they are written over."""
    output = folder / "back"
    shutil.copytree(undisturbed, output)
    back = keys | {"resume": str(output / "checkpoint-2"), "save_total_limit": 2}
    assert run("run_stage_I.py", output, back, setup=signal_within(5, signal.SIGTERM)) == [0]
    for later in (4, 6, 7):
        assert f"{output / f'checkpoint-{later}'}, of a later step, stays until this run writes over it" in said(output)
    assert [path.name for path in checkpoints_in(output)] == [f"checkpoint-{step}" for step in (4, 5, 6, 7)]
    stopped = f"stopped after step 5, saved to {output / 'checkpoint-5'}; to go on: "
    assert stopped in said(output) and said(output).endswith(f'with "resume": "{output / "checkpoint-5"}"\n')
    full = full_from(1)
    assert run("run_stage_I.py", output, back | {"resume": str(output / "checkpoint-5")}, setup=full) == [1]
    assert f"The last good checkpoint is {output / 'checkpoint-6'}." in said(output)  # the earlier one of this step
    assert run("run_stage_I.py", output, back | {"resume": str(output / "checkpoint-5")}) == [0]
    assert [path.name for path in checkpoints_in(output)] == ["checkpoint-6", "checkpoint-7"]
    assert_same_to_the_bit(output, undisturbed)


def test_a_finished_run_is_over_whatever_its_end_was(undisturbed: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(RunEnds) as end:
        find_start(config_of(undisturbed, keys))
    assert end.value.code == 0


@pytest.mark.parametrize(
    ("argv", "processes", "command"),
    [
        (["experiments/run_lm.py", "my config.json"], None, "python experiments/run_lm.py 'my config.json'"),
        (["experiments/run_lm.py", "c.json"], "2", "torchrun --nproc_per_node=2 experiments/run_lm.py c.json"),
        (["/usr/bin/llm2vec", "lm", "c.json"], None, "python -m llm2vec lm c.json"),
        (["/opt/llm2vec/__main__.py", "lm", "c.json"], "2", "torchrun --nproc_per_node=2 -m llm2vec lm c.json"),
    ],
)
def test_the_command_that_goes_on(
    argv: list[str], processes: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert command_to_resume() == command


# --- two runs, and what changes under a run ---


def test_a_second_run_into_a_folder_is_refused(folder: Path, keys: dict[str, Any]) -> None:
    """While the first one lives, whatever the second one's config says; both processes end. The first one goes on."""
    output = folder / "twice"
    with alone_in(output, "run"):
        for processes in (1, 2):
            assert run("run_stage_I.py", output, keys | {"alpha": 0.5}, processes) == [2] * processes
            assert f"{output}: another run is at work here" in said(output)
    assert run("run_stage_I.py", output, keys | {"max_steps": 1}) == [0]
    assert not (output / LOCK_FILE).exists()


def test_the_folder_that_is_used_is_the_one_that_was_looked_at(
    cut: Path, keys: dict[str, Any], undisturbed: Path
) -> None:
    """A whole copy under the name of another step, beside a damaged checkpoint under the right one."""
    shutil.copytree(cut / "checkpoint-4", cut / "checkpoint-99")
    flip_a_bit(cut / "checkpoint-4" / "model.safetensors")
    assert run("run_stage_I.py", cut, keys) == [0]
    assert f"from step 4, {cut / 'checkpoint-99'}" in said(cut)
    assert_same_to_the_bit(cut, undisturbed)


@pytest.mark.parametrize(
    ("table", "difference"),
    [
        ({"words": {"file": "words.jsonl", "instruction": "find an answer"}}, "words has another instruction"),
        (
            {"words": {"file": "words.jsonl", "instruction": "find the answer", "symmetric": True}},
            "words has another instruction, or puts it on other texts",
        ),
        ({"words": {"file": "copy.jsonl", "instruction": "find the answer"}}, r"source words is .*words\.jsonl there"),
        ({"other": {"file": "words.jsonl"}}, "the sources are words there and other here"),
        ({"words": {"file": "words.jsonl"}, "more": {"file": "copy.jsonl"}}, "words there and words, more here"),
    ],
    ids=str,
)
def test_a_changed_table_of_sources_is_refused(
    table: dict[str, Any], difference: str, cut: Path, undisturbed: Path, keys: dict[str, Any]
) -> None:
    """By a run that was cut short and by one that has finished."""
    file = Path(keys["sources_file"])
    before = file.read_text(encoding="utf-8")
    shutil.copy(file.with_name("words.jsonl"), file.with_name("copy.jsonl"))
    try:
        file.write_text(json.dumps(table), encoding="utf-8")
        for output in (cut, undisturbed):
            with pytest.raises(UserError, match=difference):
                find_start(config_of(output, keys))
    finally:
        file.write_text(before, encoding="utf-8")


def test_rows_that_were_replaced_while_the_model_loaded_are_noticed(folder: Path, keys: dict[str, Any]) -> None:
    """Else `run.json` would name the new file for the old one's rows."""
    output, words = folder / "replaced", folder / "words.jsonl"
    before = words.read_text(encoding="utf-8")

    def replace_rows(rank: int) -> None:
        load = run_model.load_backbone

        def late(*arguments: Any, **keywords: Any) -> Any:
            words.write_text(before.replace("a", "e"), encoding="utf-8")
            return load(*arguments, **keywords)

        run_model.load_backbone = late

    try:
        assert run("run_stage_I.py", output, keys, setup=replace_rows) == [2]
        assert "words.jsonl changed while it was read; start again" in said(output)
    finally:
        words.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model"])
def test_every_file_of_a_tokenizer_makes_another_model(name: str, folder: Path, keys: dict[str, Any]) -> None:
    copy = folder / f"with-{name}"
    shutil.copytree(folder / "base", copy)
    before = mark_of(str(copy)), revision_of(str(copy))
    (copy / name).write_text("{}", encoding="utf-8")
    after = mark_of(str(copy)), revision_of(str(copy))
    assert before[0] != after[0] and before[1] != after[1]


def test_rows_are_not_seen_twice(folder: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="ignore_data_skip is not supported: a run that goes on would train on rows"):
        config_of(folder / "skipping", keys | {"ignore_data_skip": True})
