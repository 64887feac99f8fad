"""Shows that a refactoring moved nothing: everything is run before and after it, and compared to the last bit.

    python -m benchmarks.unmoved record ../old_checkout before.json
    python -m benchmarks.unmoved record . after.json
    python -m benchmarks.unmoved compare before.json after.json     # a line per difference; exit code 1 if there is one

`record` makes tiny models and data, and runs CHECKOUT/experiments on them, in about two minutes: six steps of every
stage, by one process and by two; an export, an evaluation, an encoded corpus, an index, plans. Kept are a hash of each
tensor, the logs, the results, what was printed, a hash of each other file; left out are `DROPPED` and `NOT_HASHED`.

Make both recordings on the same machine, with the same libraries, by the same copy of this file. Each script runs in a
process that is forked from one with the libraries, but nothing of the package, imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

#: Keys that are no result, wherever they stand in a JSON file.
DROPPED = frozenset({
    "tokens_per_second", "waiting_for_data", "train_runtime", "train_samples_per_second", "train_steps_per_second",
    "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
    "_waited", "_seconds",  # of a checkpoint's figures_N.json
    "versions", "git_commit",  # of run.json
    # of mteb's results
    "version", "evaluation_phases", "evaluation_time", "kg_co2_emissions", "date", "mteb_version", "created_at",
})  # fmt: skip
#: Files that are not compared: the card's text, sums over run.json (which names versions), and a pickle of paths.
NOT_HASHED = ("README.md", "SHA256SUMS", "training_args.bin")
IMPORTED = ("torch", "transformers", "accelerate", "datasets", "peft", "sentence_transformers", "mteb")
WORDS = ("user", "hello", "find", "the", "answer", "who", "wrote", "it", "red", "green", "blue", "calm", "water")
SHARED: dict[str, Any] = {
    "model_name_or_path": "base", "sources_file": "sources.json", "max_seq_length": 64, "total_batch_size": 8,
    "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3,
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 7,
}  # fmt: skip
HELD_OUT = {"num_eval_rows": 16, "eval_strategy": "steps", "eval_steps": 3, "embedding_diagnostics": True}
OF_LINES = {"sources_file": None, "dataset_file_path": "lines.txt"}
OTHER = {"model_name_or_path": "other", "template": "plain"}
MEAN = {"bidirectional": True, "pooling_mode": "mean"}
#: Name -> script, and keys beside `SHARED`; what another starts from stands before it.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "mntp": ("run_mntp", {**OF_LINES, "lora_r": 4, "mlm_probability": 0.4}),
    "stage_I": ("run_stage_I", {**HELD_OUT, "alpha": 0.3, "reconstruction_probe": True}),
    "stage_I_self": ("run_stage_I", {**OTHER, "target": "self", "reconstruct_instruction": True}),
    "stage_II_cached": ("run_stage_II", {**HELD_OUT, "total_batch_size": 16, "tokens_per_microbatch": 80}),
    "stage_II_negatives": ("run_stage_II", {
        **OTHER, "num_hard_negatives": 2, "mask_false_negatives": True, "matryoshka_dims": [8, 16, 32],
        "symmetric_instructions": "as_released", "reduction": "micro_batch_mean",
    }),
    "stage_II_taught": ("run_stage_II", {
        "distillation_weight": 0.5, "own_negatives_only": ["second"], "one_source_per": "micro_batch",
        "per_device_train_batch_size": 4, "gradient_checkpointing": True,
    }),
    "stage_II_grit": ("run_stage_II", {"lm_weight": 0.5, "tokens_per_microbatch": 128}),
    "lm": ("run_lm", {}),
    "simcse": ("run_simcse", {**OF_LINES, **MEAN}),
    "supervised": ("run_supervised", {**MEAN, "peft_model_name_or_path": "out/mntp_x1"}),
}  # fmt: skip


class Start(NamedTuple):
    """One start of a script: its flags or the keys of its config, and whether what it prints is kept."""

    name: str
    script: str
    keys: dict[str, Any] | None = None
    flags: Sequence[str] = ()
    processes: int = 1
    printed: bool = False


def all_starts(root: Path) -> list[Start]:
    """Everything that is run, one after the other."""
    starts = [
        Start(f"{name}_x{processes}", script, SHARED | keys, processes=processes)
        for processes in (1, 2)
        for name, (script, keys) in RUNS.items()
    ]
    trained = "out/stage_II_cached_x1"
    scored = ("--base_model_name_or_path", "base", "--peft_model_name_or_path", trained,
              "--tasks", "STS12", "MySet", "--task_to_instructions_fp", "instructions.json", "--local_data_dir", "eval",
              "--output_dir", "out/evaluation", "--device", "cpu", "--save_predictions")  # fmt: skip
    model = ("--model", "base", "--peft", trained)
    starts += [
        Start("evaluation", "mteb_eval_custom", flags=scored),
        Start("export", "export", flags=(trained, "out/export"), printed=True),
        Start("corpus", "encode_corpus", flags=("corpus.jsonl", "out/corpus", *model)),
        Start("index", "search", flags=("index", "corpus.jsonl", "out/index", *model)),
        Start("query", "search", flags=("query", "out/index", "calm blue lake"), printed=True),
    ]
    rows = ("--num_processes", "8", "--base", "base", "--tokens_query", "24", "--tokens_document", "170")
    for plan in ("stage_I/MetaLlama3.2_1b_q2d_d2q", "baseline/MetaLlama3.2_1b_baseline_stage2"):
        flags = (str(root / f"train_configs/{plan}.json"), *rows, "--card", "H200")
        starts.append(Start(f"plan_{Path(plan).parent.name}", "plan", flags=flags, printed=True))
    return starts


def make_inputs(folder: Path) -> None:
    """All that the scripts read: two tiny models, training rows of two sources, lines, and a corpus with queries."""
    from llm2vec.quickstart.tiny import tiny_llama, train_tokenizer  # of this checkout: the recorded one gets files

    draw = random.Random(0)

    def text(most_words: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most_words)))

    def write(name: str, *rows: Any) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    tokenizer = train_tokenizer((f"{word} {word}" for word in WORDS for _ in range(9)), 400)
    for seed, name in enumerate(("base", "other")):
        sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "max_positions": 2048}
        tiny_llama(tokenizer, **sizes, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("first", "second"):
        rows = []
        for _ in range(48):  # some positives are the same text as others'
            row: dict[str, Any] = {"query": text(5), "positive": text(9) if draw.random() < 0.8 else "calm water"}
            row |= {"negative": [text(7), text(7)], "pos_score": draw.random()}
            rows.append(row | {"neg_scores": [draw.random(), draw.random()]})
        write(f"{name}.jsonl", *rows)
    second = {"file": "second.jsonl", "instruction": ["find it", "find the question"], "symmetric": True}
    write("sources.json", {"first": {"file": "first.jsonl", "instruction": "find the answer"}, "second": second})
    (folder / "lines.txt").write_text("".join(f"{text(12)}\n" for _ in range(160)), encoding="utf-8")
    texts = [f"{text(9)} {i}" for i in range(40)]
    write("corpus.jsonl", *({"id": f"d{i}", "text": text} for i, text in enumerate(texts)))
    write("eval/MySet/corpus.jsonl", *({"_id": f"d{i}", "text": text} for i, text in enumerate(texts)))
    write("eval/MySet/queries.jsonl", *({"_id": f"q{i}", "text": text(4)} for i in range(8)))
    judged = ({"query-id": f"q{i}", "corpus-id": f"d{draw.randrange(40)}", "score": 1} for i in range(8))
    write("eval/MySet/qrels/test.jsonl", *judged)
    pairs = ({"sentence1": text(6), "sentence2": text(6), "score": i % 5} for i in range(20))
    write("eval/mteb/sts12-sts/test.jsonl", *pairs)
    write("instructions.json", {"STS12": "find the answer", "MySet": "find it"})


def run_rank(start: Start, root: Path, flags: list[str], rank: int) -> None:
    """One process of a start, as `python experiments/SCRIPT.py` or a torchrun of two would be."""
    for stream, ending in enumerate(("out", "err"), start=1):
        os.dup2(os.open(f"said/{start.name}.{rank}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    script = root / "experiments" / f"{start.script}.py"
    sys.argv = [str(script), *flags]
    sys.path.insert(0, str(script.parent))
    if start.processes > 1:  # the environment and process group that torchrun would give
        import torch.distributed as dist

        own = {"WORLD_SIZE": start.processes, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": 0}
        os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "localhost"}
        meeting = f"file://{Path.cwd()}/said/{start.name}.meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=start.processes)
    runpy.run_path(str(script), run_name="__main__")


def run(start: Start, root: Path) -> list[int]:
    """Run the processes of a start; their exit codes."""
    flags = list(start.flags)
    if start.keys is not None:
        flags = [f"out/{start.name}.json"]
        Path(flags[0]).write_text(json.dumps({**start.keys, "output_dir": f"out/{start.name}"}), encoding="utf-8")
    process_of = multiprocessing.get_context("fork").Process
    processes = [process_of(target=run_rank, args=(start, root, flags, rank)) for rank in range(start.processes)]
    for process in processes:
        process.start()
    while alive := [process.sentinel for process in processes if process.is_alive()]:
        wait(alive, timeout=1)
        if any(process.exitcode for process in processes):  # as torchrun, which ends the others
            for process in processes:
                process.terminate()
    return [process.exitcode or 0 for process in processes]


def findings(start: Start, codes: list[int], names: dict[str, str]) -> dict[str, Any]:
    """What a start left: by kind and file, figures and hashes. `names` stands in for the paths of this machine."""
    said = {ending: Path(f"said/{start.name}.0.{ending}").read_text("utf-8", "replace") for ending in ("out", "err")}
    print(f"{start.name:<24}{'failed' if any(codes) else 'done'}", file=sys.stderr)
    if any(codes):
        print(said["err"][-2000:], file=sys.stderr)
        return {"failed": tidy([*map(str, codes), *said["err"].splitlines()[-12:]], names)}
    found: dict[str, Any] = {"exit": codes}
    if start.printed:
        found["printed"] = {line: "" for line in sorted(tidy(said["out"].splitlines(), names))}
    folder = Path("out", start.name)
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in NOT_HASHED):
        found[str(file.relative_to(folder))] = _content_of(file, names)
    return found


def _content_of(file: Path, names: dict[str, str]) -> Any:
    """A hash of each tensor; the content of a JSON file; of any other file, and of a tokenizer, a hash."""
    if file.suffix == ".safetensors":
        import torch
        from safetensors.torch import load_file

        raw = {name: (t, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in load_file(file).items()}
        return {name: f"{t.dtype} {list(t.shape)} {sha256(content).hexdigest()}" for name, (t, content) in raw.items()}
    if file.suffix not in (".json", ".jsonl") or file.name == "tokenizer.json":
        return sha256(file.read_bytes()).hexdigest()
    text = file.read_text(encoding="utf-8")
    return tidy(json.loads(text) if file.suffix == ".json" else list(map(json.loads, text.splitlines())), names)


def tidy(value: Any, names: dict[str, str]) -> Any:
    """A JSON value without `DROPPED` keys and without paths of this machine."""
    if isinstance(value, dict):
        return {tidy(k, names): tidy(v, names) for k, v in value.items() if k not in DROPPED}
    if isinstance(value, list):
        return [tidy(item, names) for item in value]
    if isinstance(value, str):
        for path, name in names.items():
            value = value.replace(path, name)
    return value


def record(root: Path, out: Path) -> int:
    """Record in a fresh folder, in a process that finds CHECKOUT's package and no other; its exit code."""
    with tempfile.TemporaryDirectory() as fresh:
        work = Path(fresh) / "unmoved"  # a result's name holds the name of the folder
        make_inputs(work)
        env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        env |= {
            "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{work}/cache", "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "record_here", str(root), str(out)]
        return subprocess.run(command, cwd=work, env=env).returncode


def record_here(root: Path, out: Path) -> int:
    """Run all scripts on the inputs in the current folder and write what they left; 1 if one failed."""
    for library in IMPORTED:
        importlib.import_module(library)
    package = importlib.util.find_spec("llm2vec")
    if package is None or not Path(str(package.origin)).is_relative_to(root):
        sys.exit(f"error: llm2vec is {package and package.origin}, not in {root}.")
    Path("said").mkdir()
    Path("out").mkdir()
    paths = {str(Path.cwd()): "WORK", str(root): "ROOT"}
    found = {start.name: findings(start, run(start, root), paths) for start in all_starts(root)}
    machine = {"machine": platform.platform(), **{name: sys.modules[name].__version__ for name in IMPORTED}}
    out.write_text(json.dumps({"machine": machine, "found": found}, indent=1), encoding="utf-8")
    return int(any("failed" in of_start for of_start in found.values()))


def compare_recordings(before: Path, after: Path) -> int:
    """Print a line for each difference, then a table of what was equal; 1 if anything was not."""
    old_side, new_side = (json.loads(file.read_text(encoding="utf-8")) for file in (before, after))
    if (one := old_side["machine"]) != (other := new_side["machine"]):
        print(f"note: other machines or libraries: {one} and {other}")
    rows = []
    for name in dict.fromkeys((*old_side["found"], *new_side["found"])):
        old, new = (_figures(side["found"].get(name, "not recorded"), name) for side in (old_side, new_side))
        apart = [where for where in dict.fromkeys((*old, *new)) if old.get(where) != new.get(where)]
        for where in apart:
            print(f"{where}: {old.get(where, 'nothing')} -> {new.get(where, 'nothing')}")
        verdict = f"{len(apart)} DIFFERENT" if apart else "FAILED IN BOTH" if f"{name} > failed" in old else "equal"
        rows.append(f"{name:<24}{len(old):>7,} figures and hashes  {verdict}")
    print(*rows, sep="\n")
    return int(not all(row.endswith("equal") for row in rows))


def _figures(value: Any, where: str) -> dict[str, str]:
    """Everything in a JSON value by where it stands; a list of plain values counts as one."""
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {where: json.dumps(value)}
    return {k: v for key, item in value.items() for k, v in _figures(item, f"{where} > {key}").items()}


def main() -> int:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare", "record_here"))  # record starts the last
    parser.add_argument("first", type=Path, metavar="CHECKOUT | BEFORE")
    parser.add_argument("second", type=Path, metavar="OUT | AFTER")
    options = parser.parse_args()
    command = {"record": record, "record_here": record_here, "compare": compare_recordings}[options.command]
    return command(options.first.resolve(), options.second.resolve())


if __name__ == "__main__":
    sys.exit(main())
