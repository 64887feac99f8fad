"""The GPU's branches, executed without one: on a device made of CPU memory that is checked as FlashAttention checks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from torch import version
from transformers import LlamaConfig

ROOT = Path(__file__).parents[2]
#: Functions that save and load; what they wait for is no step's.
BESIDE_STEPS = ("_write_files", "_save", "save", "train", "_load_optimizer_and_scheduler", "load")

pytestmark = pytest.mark.skipif(
    version.cuda is not None or shutil.which("g++") is None, reason="needs a torch without CUDA, g++"
)


def run(*arguments: str) -> str:
    """What python says of these arguments, in a process that asks for CUDA anew."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Any:
    """What `gpu_steps.py` found; it runs once, however many workers share the tests."""
    folder = tmp_path_factory.getbasetemp()
    file = (folder if worker_id == "master" else folder.parent) / "gpu_steps.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            file.write_text(run("tests/benchmarks/gpu_steps.py").splitlines()[-1], encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def test_kernels_take_what_they_are_given_and_give_what_they_must(found: Any) -> None:
    """Attention against float64, gradients of both stages, fused and not, against float32 text by text, cached
    gradients; a run that goes on ends with the same weights."""
    for part in [*found["parts"], found["training"]["part"]]:
        assert not part["error"], part["error"]
        assert part["figures"] and not [f for f in part["figures"] if f["passed"] is False]


@pytest.mark.parametrize(
    "stage",
    ["Stage I", "Stage II", "LM", "MNTP", "Stage I and LM", "Stage I, kl", "Stage I, bag", "Stage I, imitating"],
)
def test_the_host_does_not_wait_within_a_step(stage: str, found: Any) -> None:
    """A wait leaves the card idle while the host prepares what comes next."""
    step = found["steps"][stage]
    assert step["pieces"] >= 3 and not step["waits"]


def test_the_host_hardly_waits_between_steps(found: Any) -> None:
    """Twelve steps, each of them logged: its findings, its norm, its loss, its parts and its tokens are read."""
    waits = {what: n for what, n in found["training"]["waits"].items() if not what.endswith("libraries")}
    of_steps = {what: n for what, n in waits.items() if what.rsplit(" ", 1)[1] not in BESIDE_STEPS}
    assert 0 < sum(of_steps.values()) <= 12 * 5, of_steps


def test_the_kernel_that_trains_is_the_one_that_is_proven(found: Any) -> None:
    """With float32 weights it runs under autocast alone."""
    assert found["kernels_of_probe"] == 2  # once a layer


def test_an_embedder_attends_by_a_kernel_of_the_hub(found: Any) -> None:
    """Where it was asked for by name: in each layer, of padded rows (the proof at loading) and packed ones."""
    kernel = found["kernel_of_the_hub"]
    assert kernel["at_load"] == [4] * 3 + [1] * 6 + [2] * 3  # changed last tokens, two texts alone, and packed
    assert kernel["encoding"] == [4] * 3  # three texts and the prefix that they share
    assert kernel["lowest cosine"] > 0.999 and not kernel["told"], kernel
    assert kernel["refused"].endswith("flash-attn2 computes in half precision; set torch_dtype.")  # and not float32


def test_encoding_leaves_a_model_on_the_card_where_it_is(found: Any) -> None:
    """Eight processes that share a machine would else all end on its first card. Asked for, another device is taken."""
    assert found["where_encoding_computes"] == [["cuda:0"], ["cuda:1"], ["cuda:0"]]


def test_a_model_is_loaded_onto_its_device_and_not_by_way_of_the_host(found: Any) -> None:
    """So that eight processes of a machine do not hold eight copies in its memory."""
    loading = found["loading"]
    assert loading["devices"] == ["cuda:0"]
    assert loading["weights"] > 1.8e8 and loading["host"] < 0.6 * loading["weights"], loading


def test_a_process_computes_on_the_card_of_its_local_rank(found: Any) -> None:
    placement = found["placement"]
    assert (placement["device"], placement["rows"]) == ("cuda:3", 2)
    assert placement["chosen"] == ["cuda:3", "0", "3", "1", "cuda:5"]  # the last ones by turns, named, and on a CPU


def test_plan_and_simulation_agree(tmp_path: Path) -> None:
    """The plan's memory beside that of the step's own tensors: Stage I, with FSDP2, and Stage II, cached; vectors to
    imitate that are not there yet; and running text, whose rows one process of a machine would make before the others.
    """
    shape = LlamaConfig(
        vocab_size=16_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    shape.save_pretrained(tmp_path / "base")
    shared = {"template": "llama3", "dataset_file_path": "nowhere", "output_dir": str(tmp_path / "out"), "bf16": True}
    shared |= {"model_name_or_path": "base", "per_device_train_batch_size": 64, "tokens_per_microbatch": 8192}
    configs = {"stage_I": {"alpha": 0.2}, "sharded": {"alpha": 0.2, "fsdp": True}}
    configs["stage_II"] = {"use_peft": True, "loss_scale": 20.0}
    configs["imitating"] = {
        "bottleneck": "states", "template": "memory_4", "pooling_mode": "mean", "projection": "linear",
        "decoder": "frozen", "imitation_weight": 1.0, "teacher_vectors": "to come",
    }  # fmt: skip
    configs["mntp"] = {"dataset_name": "wikitext", "dataset_config_name": "wikitext-103-raw-v1", "template": None}
    configs["mntp"] |= {"dataset_file_path": None, "max_seq_length": 256}
    for name, keys in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(shared | keys), encoding="utf-8")
    files, out = [str(tmp_path / f"{name}.json") for name in configs], tmp_path / "found.json"
    arguments = ("--base", str(tmp_path / "base"), "--num_processes", "2", "--out", str(out))
    table = run("-m", "benchmarks.simulate", *files, *arguments)
    steps = list(json.loads(out.read_text(encoding="utf-8")).values())
    assert [step["pieces"] for step in steps] == [2, 2, 3, 2, 2]
    for step in steps:
        assert 0.95 < step["planned"] / step["peak"] < 1.15, step
        assert f"/{step['configs'][0].partition('/')[2]}`" in table
