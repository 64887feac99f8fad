"""What is tried: configs, rows, files that this project wrote, arguments, folders, disks, outputs, two at a time."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from llm2vec.__main__ import COMMANDS
from llm2vec.choice import ModelChoice
from llm2vec.llm2vec import LLM2Vec
from llm2vec.training.config import KEYS
from tests.attack.attack import Case, command, in_a_process
from tests.eval_stubs import write_retrieval
from tests.helpers import WORDS, family_tokenizer, tiny_model, write_jsonl

#: What stands where something else is expected.
ODD: list[Any] = [
    None, True, False, -1, 0, 3, 1.5, 2**31, 2**63, 10**400, -(10**400), 1e308, 1e-320, float("nan"), float("inf"), "",
    " ", "x", "x" * 5000, "\ud800", "a\x00b", "é" * 300, "a\nb", "..", "/proc/x", "/dev/null", "<|eot_id|>", [], [1],
    ["x"], [None], {}, {"a": 1}, [[[]]], {"x": {"y": []}}, ["x"] * 300,
]  # fmt: skip

#: Names that a path may have.
ODD_PATHS = [
    "x" * 300, "x/" * 3000, "a/" + "x" * 4096, "", ".", "..", "/proc/x", "/dev/null", "/dev/full", "/dev/zero/x",
    "dangling", "loop", "file", "file/below", "-x", "--", "a b", "a\nb", "*", "$(x)", "%s", "é", "\udcff", "~",
    "//", "file:///x", "http://127.0.0.1:9/x", "name/of/three", "nobody/nothing", "link", "empty", "nul\x00",
    "hidden/.x", "pipe",
]  # fmt: skip

TRAINED = ("model.safetensors", "adapter_model.safetensors")


def odd_value(draw: random.Random) -> Any:
    """One of `ODD`."""
    return copy.deepcopy(draw.choice(ODD))


def mutated(content: Any, draw: random.Random) -> tuple[str, Any]:
    """JSON with one thing in it changed, and what that is."""
    root = {"": copy.deepcopy(content)}
    places = list(_places(root))
    holder, key = draw.choice(places)
    kind = draw.choice(["value", "value", "value", "gone", "renamed", "added", "nested"])
    said = f"{kind} {key!r}"
    if kind == "value":
        holder[key] = odd_value(draw)
        said += f" -> {str(holder[key])[:30]!r}"
    elif kind == "nested":
        holder[key] = [holder[key]] if draw.random() < 0.5 else {"a": holder[key]}
    elif kind == "added" and isinstance(holder[key], dict):
        holder[key]["unknown"] = odd_value(draw)
    elif kind == "added" and isinstance(holder[key], list):
        holder[key].append(odd_value(draw))
    elif key != "":
        value = holder.pop(key)
        if kind == "renamed" and isinstance(holder, dict):
            holder[f"{key}_"] = value
    return said, root[""]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    for key in holder if isinstance(holder, dict) else range(min(len(holder), 5)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


def damaged(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A file with what happens to files, and what that is."""
    kind = draw.choice(["bit", "cut", "zeros", "empty", "bom", "binary", "twice", "deep", "latin", "tail"])
    place = draw.randrange(max(1, len(content)))
    flipped = bytes([content[place] ^ (1 << draw.randrange(8))]) if content else b""
    return f"{kind} at {place}", {
        "bit": content[:place] + flipped + content[place + 1 :],
        "cut": content[:place],
        "zeros": content[:place] + bytes(20) + content[place + 20 :],
        "empty": b"",
        "bom": b"\xef\xbb\xbf" + content,
        "binary": draw.randbytes(200),
        "twice": content + content,
        "deep": b"[" * 30_000 + content,
        "latin": content[:place] + b"\xff" + content[place:],
        "tail": content + b"x",
    }[kind]


def change_json(file: str, draw: random.Random) -> tuple[str, Callable[[Path], object]]:
    """Damage of a JSON file, or of a line of a JSONL file: its content, or its bytes."""
    seed = draw.random()

    def damage(folder: Path) -> object:
        own = random.Random(seed)
        content = (folder / file).read_bytes()
        if own.random() < 0.35:
            return (folder / file).write_bytes(damaged(content, own)[1])
        lines = content.decode().splitlines() if file.endswith("jsonl") else [content.decode()]
        chosen = own.randrange(len(lines))
        lines[chosen] = json.dumps(mutated(json.loads(lines[chosen]), own)[1])
        return (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return f"{file}, seed {seed:.6f}", damage


def change_bytes(file: str, draw: random.Random) -> tuple[str, Callable[[Path], object]]:
    """Damage of the bytes of a file."""
    seed = draw.random()
    return f"bytes of {file}, seed {seed:.6f}", lambda folder: (folder / file).write_bytes(
        damaged((folder / file).read_bytes(), random.Random(seed))[1]
    )


def own_cache(run: Callable[[Path], object]) -> Callable[[Path], object]:
    """With the tables in the case's folder."""

    def with_cache(folder: Path) -> object:
        datasets.config.HF_DATASETS_CACHE = folder.parent / "cache"
        return run(folder)

    return with_cache


def must_end_well(*argv: str, cwd: Path) -> str:
    """Run a command, and what it printed."""
    out = cwd.with_suffix(".printed")
    code = in_a_process(Case("", "", "", lambda folder: None, own_cache(command(*argv))), cwd, out)
    shutil.rmtree(cwd.parent / "cache", ignore_errors=True)
    assert code == 0, out.read_text()
    return out.read_text()


# --- inputs ---


#: What commands import when they run, beside their own modules.
IMPORTED = (
    "llm2vec.evaluation.run", "llm2vec.reports.evaluation", "llm2vec.export.export", "llm2vec.training.stages",
    "llm2vec.corpus.encoding", "llm2vec.planning.plan",
)  # fmt: skip


def make_inputs(folder: Path) -> Path:
    """Folders that cases copy; every path in them is relative to the folder."""
    for name, one in COMMANDS.items():  # so that no process has to import it
        if name not in ("base", "compare", "reconstruct", "verify"):
            importlib.import_module(f"llm2vec.commands.{one.module}")
    for module in IMPORTED:
        importlib.import_module(module)
    draw = random.Random(0)
    tokenizer = family_tokenizer("llama")
    rows = [
        {name: " ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for name in ("query", "positive", "negative")}
        for _ in range(40)
    ]
    for name in ("run", "run2"):
        tiny_model("llama", True, initializer_range=0.2).save_pretrained(folder / name / "base")
        tokenizer.save_pretrained(folder / name / "base")
        write_jsonl(folder / name / "words.jsonl", rows)
        _write(folder / name / "sources.json", {"words": {"file": "words.jsonl", "instruction": "find the answer"}})
        keys = {
            "model_name_or_path": "base", "sources_file": "sources.json", "output_dir": "out", "max_seq_length": 64,
            "total_batch_size": 8, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "save_steps": 2,
            "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        _write(folder / name / "config.json", keys)
    must_end_well("stage-1", "config.json", cwd=folder / "run2")
    (folder / "run2").rename(folder / "whole")
    shutil.copytree(folder / "whole", folder / "killed")
    shutil.rmtree(folder / "killed/out/checkpoint-4")
    for file in (folder / "killed/out").iterdir():
        if file.is_file() and file.name != "log.jsonl":
            file.unlink()
    for name in ("model", "corpus", "index", "eval"):
        model = LLM2Vec(tiny_model("llama", initializer_range=0.2), tokenizer, template="llama3")
        model.save(folder / name / "model")
        texts = [{"id": f"t{i}", "title": "world" * (i % 2), "text": row["positive"]} for i, row in enumerate(rows)]
        write_jsonl(folder / name / "texts.jsonl", texts)
    must_end_well("encode", "texts.jsonl", "vectors", "--model", "model", "--shard_rows", "10", cwd=folder / "corpus")
    shutil.copytree(folder / "corpus", folder / "half")
    (folder / "half/vectors/part-00002.parquet").unlink()
    must_end_well("search", "index", "texts.jsonl", "idx", "--model", str(folder / "index/model"), cwd=folder / "index")
    write_retrieval(folder / "eval/data/MySet")
    scores = {"main_score": 0.5, "hf_subset": "default", "languages": ["eng-Latn"]}
    for model in ("a", "b"):
        place = folder / f"report/{model}/results/org__{model}/rev"
        place.mkdir(parents=True)
        for task in ("SciFact", "NFCorpus"):
            result = {
                "task_name": task, "dataset_revision": "1", "mteb_version": "2.0", "scores": {"test": [scores]},
                "evaluation_time": 1.0, "kg_co2_emissions": None,
            }  # fmt: skip
            _write(place / f"{task}.json", result)
        meta = {"name": f"org/{model}", "revision": "rev"}
        _write(place / "model_meta.json", meta)
    shutil.copy(folder / "whole/out/log.jsonl", folder / "report/log.jsonl")
    return folder


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def weights_hash(folder: Path) -> str:
    """Of the weights that a run wrote."""
    file = next(folder / name for name in TRAINED if (folder / name).is_file())
    return hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in sorted(load_file(file).items()))).hexdigest()


# --- cases ---


def all_cases(inputs: Path) -> list[Case]:
    """All of them, the same at every start."""
    makers = (
        configs, rows, sources, resumes, models, corpora, indexes, reports, evaluations, encode_arguments, arguments,
        paths, disks, outputs, two_at_a_time, long_texts,
    )  # fmt: skip
    return [case for make in makers for case in make(inputs, random.Random(make.__name__))]


def _of_config(keys: dict[str, Any]) -> Callable[[Path], object]:
    def damage(folder: Path) -> object:
        file = folder / "config.json"
        return file.write_text(json.dumps(json.loads(file.read_text()) | keys), encoding="utf-8")

    return damage


def configs(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """Every key with odd values; those that are accepted train a step."""
    brief = {"max_steps": 1, "stop_after_n_steps": 1, "save_strategy": "no"}
    stages = {"stage-1": {}, "stage-2": {"lora_r": 2}, "lm": {}, "simcse": {"lora_r": 2}, "mntp": {"lora_r": 2}}
    for key in KEYS:
        for value in draw.sample(ODD, 4):
            if key in ("torch_compile", "torch_empty_cache_steps") and value is True:
                continue  # minutes
            stage = "stage-2" if key.startswith("lora") else draw.choice(list(stages))
            keys = {**brief, **stages[stage], key: value}
            run = own_cache(command(stage, "config.json"))
            yield Case("config", f"{stage}: {key}={str(value)[:40]!r}", "run", _of_config(keys), run, _is_trained)
    for _ in range(150):
        what, damage = change_json("config.json", draw)
        yield Case("config", what, "run", damage, own_cache(command("stage-1", "config.json")), _is_trained)


def _is_trained(folder: Path, printed: str) -> str | None:
    found = [file for name in TRAINED for file in folder.parent.rglob(name) if "base" not in file.parts]
    if not found and "nothing is left to do" not in printed:
        return "nothing was trained"
    finite = all(bool(tensor.isfinite().all()) for tensor in load_file(found[0]).values()) if found else True
    return None if finite else "weights that are not finite"


def rows(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """A line of the training data."""
    for i in range(300):
        what, damage = change_json("words.jsonl", draw)
        if i % 3:
            run = command("check-data", ".", "--sources_file", "sources.json")
            yield Case("rows", what, "run", damage, run, finds=True)
        else:
            run = own_cache(command("stage-2", "config.json"))
            brief = _of_config({"max_steps": 1, "stop_after_n_steps": 1, "save_strategy": "no", "lora_r": 2})
            yield Case("rows", what, "run", _both(damage, brief), run, _is_trained)


def _both(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [damage(folder) for damage in damages]


def sources(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """The table of sources, before a run and under one that goes on: then a change is refused."""
    for i in range(120):
        what, damage = change_json("sources.json", draw)
        folder = "run" if i % 2 else "killed"
        run = own_cache(command("stage-1", "config.json"))
        wrong = _as_undisturbed(inputs) if folder == "killed" else _is_trained
        yield Case("sources", f"{folder}: {what}", folder, damage, run, wrong)


def _as_undisturbed(inputs: Path) -> Callable[[Path, str], str | None]:
    expected = functools.cache(lambda: weights_hash(inputs / "whole/out"))
    return lambda folder, _: None if weights_hash(folder / "out") == expected() else "other weights"


def resumes(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """A checkpoint's files, as they are or with sums that fit; what a run starts from; what lies beside it."""
    own = inputs / "killed/out/checkpoint-2"
    names = sorted(file.name for file in own.iterdir() if file.name != "SHA256SUMS")
    run, same = own_cache(command("stage-1", "config.json")), _as_undisturbed(inputs)
    for i in range(240):
        name = draw.choice(names)
        place = f"out/checkpoint-2/{name}"
        what, damage = (change_json if name.endswith(".json") else change_bytes)(place, draw)
        fitting = i % 2 == 0
        # Weights and state whose sums fit are other ones: only what is no checkpoint can be noticed.
        right = same if not fitting else lambda folder, printed: None
        damage = _both(damage, _sum_up) if fitting else damage
        yield Case("resume", f"{what}{', sums fit' * fitting}", "killed", damage, run, right)
    for name in (
        "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model",
        "model.safetensors", "tokenizer.json", "config.json",
    ):  # fmt: skip
        for content in ("{}", "x"):
            damage = functools.partial(_write_to, name=f"base/{name}", content=content)
            yield Case("resume", f"another base/{name}", "killed", damage, run, same)
    for name, number in (("out/checkpoint-99", 99), ("out/checkpoint-1", 1), ("out/checkpoint-x", 0)):
        for flip in (False, True):
            damage = functools.partial(_copy_of_checkpoint, to=name, flip=flip)
            yield Case("resume", f"a copy as {name} ({number}), flipped {flip}", "killed", damage, run, same)
    for name in ("out/.checkpoint-9", "out/checkpoint-4", "out/log.jsonl", "out/diagnostics.jsonl", "out/.lock"):
        for kind in ("file", "folder", "dangling", "loop", "pipe"):
            damage = functools.partial(_odd_file, name=name, kind=kind)
            yield Case("resume", f"{name} is a {kind}", "killed", damage, run, same)
    for key in ("ignore_data_skip", "seed", "learning_rate", "template", "max_seq_length", "dataloader_num_workers"):
        for value in (True, 3, "llama3"):
            yield Case("resume", f"{key}={value}", "killed", _of_config({key: value}), run, same)


def _sum_up(folder: Path) -> None:
    """Sums that fit, whatever the files hold."""
    checkpoint = folder / "out/checkpoint-2"
    try:
        run = json.loads((checkpoint / "run.json").read_text())
        run["files"] = {name: (checkpoint / name).stat().st_size for name in run["files"]}
        (checkpoint / "run.json").write_text(json.dumps(run))
    except (ValueError, KeyError, TypeError, OSError, AttributeError):
        pass
    files = sorted(file for file in checkpoint.iterdir() if file.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))


def _write_to(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)


def _copy_of_checkpoint(folder: Path, to: str, flip: bool) -> None:
    shutil.copytree(folder / "out/checkpoint-2", folder / to)
    if flip:
        weights = folder / "out/checkpoint-2/model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-7] ^= 1
        weights.write_bytes(content)


def _odd_file(folder: Path, name: str, kind: str) -> None:
    place = folder / name
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    {
        "file": place.touch,
        "folder": place.mkdir,
        "dangling": lambda: place.symlink_to("nowhere"),
        "loop": lambda: place.symlink_to(place.name),
        "pipe": lambda: os.mkfifo(place),
    }[kind]()


def models(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """A file of a model's folder, which then encodes."""
    names = sorted(file.name for file in (inputs / "model/model").iterdir())
    for _ in range(300):
        name = draw.choice(names)
        what, damage = (change_json if name.endswith(".json") else change_bytes)(f"model/{name}", draw)
        run = command("encode", "texts.jsonl", "vectors", "--model", "model")
        yield Case("model", what, "model", damage, run, _has_finite_vectors)
    for row in range(5):
        damage = functools.partial(_nan_weights, row=row)
        run = command("search", "index", "texts.jsonl", "idx", "--model", "model")
        yield Case("model", f"NaN in row {row} of the embedding", "model", damage, run, _is_refused)


def _nan_weights(folder: Path, row: int) -> None:
    weights = load_file(folder / "model/model.safetensors")
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    ids = family_tokenizer("llama")(" ".join(texts), add_special_tokens=False)["input_ids"]
    weights["embed_tokens.weight"][sorted(set(ids), key=lambda one: (ids.count(one), one))[-1 - row]] = torch.nan
    save_file(weights, folder / "model/model.safetensors", {"format": "pt"})


def _is_refused(folder: Path, printed: str) -> str | None:
    return "it was not refused"


def _has_finite_vectors(folder: Path, printed: str) -> str | None:
    table = pq.read_table(folder / "vectors")
    numbers = table["vector"].combine_chunks().flatten().to_numpy()
    return None if len(table) == 40 and np.isfinite(numbers).all() else "vectors are missing or not finite"


def corpora(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """A corpus that is encoded in part, or whole; and its input."""
    run = command("encode", "texts.jsonl", "vectors", "--model", "model", "--shard_rows", "10")

    def same(folder: Path, printed: str) -> str | None:
        parts = {file.name: pq.read_table(file) for file in sorted((folder / "vectors").glob("part-*"))}
        expected = {file.name: pq.read_table(file) for file in sorted((inputs / "corpus/vectors").glob("part-*"))}
        return None if parts == expected else "other vectors"

    for _ in range(150):
        folder = draw.choice(["half", "corpus"])
        what, damage = change_json("vectors/_manifest.json", draw)
        yield Case("corpus", f"{folder}: {what}", folder, damage, run, same)
    for _ in range(100):
        folder = draw.choice(["half", "corpus"])
        what, damage = change_bytes(f"vectors/part-0000{draw.choice([0, 1, 3])}.parquet", draw)
        yield Case("corpus", f"{folder}: {what}", folder, damage, run, same)
    for name in ("vectors/._manifest.json.77", "vectors/.input", "vectors/.queue", "vectors/.part-00000.parquet.x"):
        for kind in ("file", "folder", "dangling"):
            damage = functools.partial(_odd_file, name=name, kind=kind)
            yield Case("corpus", f"{name} is a {kind}", "half", damage, run, same)
    damage = functools.partial(_only_aside, name="vectors")
    yield Case("corpus", "killed while the manifest was written", "half", damage, run, same)
    swap = functools.partial(_swapped, one="vectors/part-00000.parquet", other="vectors/part-00001.parquet")
    yield Case("corpus", "two parts swapped", "half", swap, run, same)
    for _ in range(80):
        what, damage = change_json("texts.jsonl", draw)
        fresh = command("encode", "texts.jsonl", "fresh", "--model", "model")
        yield Case("corpus", f"input: {what}", "model", damage, fresh)
    for kind in ("folder", "pipe", "dangling", "loop"):
        damage = functools.partial(_odd_file, name="texts.jsonl", kind=kind)
        fresh = command("encode", "texts.jsonl", "fresh", "--model", "model")
        yield Case("corpus", f"the input is a {kind}", "model", damage, fresh)


def _only_aside(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    (folder / name).mkdir()
    (folder / name / "._manifest.json.77").write_text("{")


def _swapped(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "aside")
    (folder / other).rename(folder / one)
    (folder / "aside").rename(folder / other)


def indexes(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """An index that is asked."""
    line = ["search", "query", "idx", "hello world", "--top_k", "3", "--model", "model"]
    query = command(*line)
    names = sorted(file.name for file in (inputs / "index/idx").iterdir())
    answer: list[str] = []

    def same(folder: Path, printed: str) -> str | None:
        answer[:] = answer or _hits(must_end_well(*line, cwd=inputs / "index"))
        return None if _hits(printed) == answer else "other hits"

    for _ in range(200):
        name = draw.choice(names)
        what, damage = (change_json if name.endswith("jsonl") else change_bytes)(f"idx/{name}", draw)
        yield Case("index", what, "index", damage, query, same)
    for _ in range(100):
        what, damage = _change_header("idx/vectors.safetensors", draw)
        yield Case("index", what, "index", damage, query, same)
    for kind in ("pipe", "dangling", "loop", "folder"):
        damage = _both(
            lambda folder: (folder / "notes").mkdir(), lambda folder: (folder / "notes/a.md").write_text("x")
        )
        odd = functools.partial(_odd_file, name="notes/odd.txt", kind=kind)
        run = command("search", "index", "notes", "new", "--model", "model")
        yield Case("index", f"a text is a {kind}", "index", _both(damage, odd), run)
    zero = _both(
        lambda folder: (folder / "notes").mkdir(), lambda folder: (folder / "notes/z.txt").symlink_to("/dev/zero")
    )
    run = command("search", "index", "notes", "new", "--model", "model")
    yield Case("index", "a text is /dev/zero", "index", zero, run)


def _hits(printed: str) -> list[str]:
    """The lines of hits, without progress bars and what is said besides."""
    return [line for line in printed.splitlines() if re.match(r" ?-?\d\.\d{4}  ", line)]


def _change_header(file: str, draw: random.Random) -> tuple[str, Callable[[Path], object]]:
    """Damage of what a safetensors file says of itself."""
    seed = draw.random()

    def damage(folder: Path) -> object:
        content = (folder / file).read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        said = json.dumps(mutated(header, random.Random(seed))[1]).encode()
        return (folder / file).write_bytes(len(said).to_bytes(8, "little") + said + content[8 + size :])

    return f"header of {file}, seed {seed:.6f}", damage


def reports(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """Results and logs of runs, in a report."""
    run = command(
        "report", "a", "b", "--names", "anchor", "baseline", "--losses", "anchor=log.jsonl", "--output_dir", "r"
    )
    files = [str(file.relative_to(inputs / "report")) for file in sorted((inputs / "report").rglob("*.json*"))]
    for _ in range(220):
        what, damage = change_json(draw.choice([*files, "log.jsonl", "log.jsonl"]), draw)
        yield Case("report", what, "report", damage, run)
    skipped = {"step": 3, "skipped": "the loss is not finite", "rows": {"words.jsonl": [1, 2]}}
    write = lambda folder: (folder / "log.jsonl").write_text(json.dumps(skipped) + "\n")  # noqa: E731
    yield Case("report", "the log of a run that skipped a step", "report", write, run, lambda *_: None)
    for value in ODD:
        entry = {"step": 1, "loss": value}
        write = functools.partial(_write_to, name="log.jsonl", content=json.dumps(entry) + "\n")
        yield Case("report", f"a loss of {str(value)[:30]!r}", "report", write, run)


def evaluations(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """A retrieval set of one's own."""
    run = own_cache(
        command("eval", "--model", "model", "--tasks", "MySet", "--local_data_dir", "data", "--output_dir", "o")
    )
    for _ in range(60):
        what, damage = change_json(f"data/MySet/{draw.choice(['corpus', 'queries', 'qrels/test'])}.jsonl", draw)
        yield Case("evaluation", what, "eval", damage, run)
    for score in (2**31, 2**63, 10**19, -(2**31), 10**6, 1.0, -1):
        row = {"query-id": "q1", "corpus-id": 1, "score": score}
        both = functools.partial(_judge_by, lines=[row, {**row, "corpus-id": 2, "score": 1}])
        yield Case("evaluation", f"a judgement of {score}", "eval", both, run)
    for key in ("query-id", "corpus-id"):
        row = {"query-id": "q1", "corpus-id": 1, "score": 1, key: "\ud800"}
        both = functools.partial(_judge_by, lines=[{"query-id": "q1", "corpus-id": 1, "score": 1}, row])
        yield Case("evaluation", f"half a surrogate pair as {key}", "eval", both, run)


def _judge_by(folder: Path, lines: list[Any]) -> None:
    (folder / "data/MySet/qrels/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def encode_arguments(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """`LLM2Vec.encode`, whatever it is given."""
    names = ("batch_size", "show_progress_bar", "convert_to_numpy", "device", "side", "truncate_dim")
    odd: list[Any] = [
        None, 1, 0, -1, 1.5, 4.0, "3", "cpu", "evil", "cuda", "cuda:99", "meta", "query", True, [], {}, 2**40, 10**400,
        float("nan"), torch.float32, object(), b"x", np.int64(4),
    ]  # fmt: skip
    sentences: list[Any] = [
        None, 1, "", [], [""], ["x", None], [["a"]], [["a", "b", "c"]], [["a", 1]], [1], {}, {"a": "b"}, b"x", [b"x"],
        np.array(["x"]), np.array([1]), np.array("x"), (x for x in ["a"]), object(), ["\ud800"], [["\ud800", "x"]],
        [True], ["a", ["b", "c"]], 1.5, [[], []], [["a", "b", 10**400]], "\x00", range(3), float,
    ]  # fmt: skip
    given: list[dict[str, Any]] = [{name: value} for name in names for value in odd]
    given += [{"sentences": one} for one in sentences]
    given += [{draw.choice(names): draw.choice(odd), draw.choice(names): draw.choice(odd)} for _ in range(60)]
    for one in given:
        what = ", ".join(f"{name}={str(value)[:30]!r}" for name, value in one.items())
        yield Case("encode", what, "model", lambda folder: None, functools.partial(_encode, given=one))


def _encode(folder: Path, given: dict[str, Any]) -> None:
    from llm2vec.cli import user_errors_in_one_sentence

    with user_errors_in_one_sentence():
        model = ModelChoice("model").load()
        plain = np.asarray(model.encode(["hello", "world"], show_progress_bar=False))
        found = np.asarray(model.encode(**{"sentences": ["hello", "world"], "show_progress_bar": False} | given))
        if "sentences" not in given:
            assert np.array_equal(found, plain[:, : found.shape[1]])


def arguments(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """A command line with an odd value of one flag, or an odd flag."""
    lines = {
        "index": ["search", "query", "idx", "hello", "--model", "model", "--top_k", "3", "--instruction", "find it"],
        "model": ["encode", "texts.jsonl", "v", "--model", "model", "--batch_size", "4", "--side", "query",
                  "--shard_rows", "10", "--dtype", "float16", "--instruction", "x", "--num_workers", "1"],
        "report": ["report", "a", "b", "--names", "anchor", "baseline", "--output_dir", "r"],
        "run": ["check-data", ".", "--sources_file", "sources.json"],
        "whole": ["plan", "config.json"],
    }  # fmt: skip
    values = [
        "", " ", "x", "0", "-1", "1.5", "1e999", "nan", "9" * 400, "x" * 5000, "a\nb", "é", "\udcff", "--", "-", "..",
        "/dev/null", "/proc/x", "[1]", "None", "true", "cuda:99", "*", "\x1b[31m",
    ]  # fmt: skip
    for folder, line in lines.items():
        for _ in range(60):
            changed = list(line)
            changed[draw.randrange(len(changed))] = draw.choice(values)
            if "\x00" in "".join(changed):
                continue
            yield Case("arguments", " ".join(changed)[:100], folder, lambda folder: None, own_cache(command(*changed)))


def paths(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """Odd names where a path is expected: in configs and on command lines."""
    keys = ("model_name_or_path", "peft_model_name_or_path", "sources_file", "dataset_file_path", "output_dir",
            "experiment_id", "resume", "nano_beir")  # fmt: skip
    brief = {"max_steps": 1, "stop_after_n_steps": 1, "save_strategy": "no"}
    for key in keys:
        for name in ODD_PATHS:
            if (key, name) == ("output_dir", "//"):
                continue
            keys_ = {
                **brief,
                key: name,
                **({"eval_strategy": "steps", "num_eval_rows": 8} if key == "nano_beir" else {}),
            }
            run = own_cache(command("stage-1", "config.json"))
            yield Case("paths", f"{key}={name[:40]!r}", "run", _both(_odd_files, _of_config(keys_)), run, _is_trained)
    lines = {
        "index": ["search", "query", "idx", "hello", "--model", "model"],
        "model": ["encode", "texts.jsonl", "v", "--model", "model"],
        "report": ["report", "a", "--output_dir", "r"],
        "run": ["stage-1", "config.json"],
    }
    for folder, line in lines.items():
        for place in range(1, len(line)):
            for name in ODD_PATHS:
                if line[place].startswith("-") or "\x00" in name or (folder, place, name) == ("index", 1, name):
                    continue
                changed = [*line[:place], name, *line[place + 1 :]]
                what = f"{line[0]}: {line[place]} is {name[:40]!r}"
                yield Case("paths", what, folder, _odd_files, own_cache(command(*changed)))


def _odd_files(folder: Path) -> None:
    kinds = {"pipe2": "pipe", "dangling": "dangling", "loop": "loop", "file": "file", "empty": "folder"}
    for name, kind in kinds.items():
        _odd_file(folder, name, kind)


def disks(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """No file may be longer than so many bytes, as on a disk that is full."""
    lines = {
        "killed": ["stage-1", "config.json"],
        "run": ["stage-1", "config.json"],
        "half": ["encode", "texts.jsonl", "vectors", "--model", "model", "--shard_rows", "10"],
        "model": ["encode", "texts.jsonl", "v", "--model", "model"],
        "index": ["search", "index", "texts.jsonl", "idx", "--model", "model"],
        "corpus": ["export", "model", "exported"],
        "report": ["report", "a", "b", "--names", "anchor", "baseline", "--output_dir", "r"],
    }
    for folder, line in lines.items():
        for size in (0, 100, 700, 2_000, 4_000, 8_000, 12_000, 20_000, 40_000, 60_000, 100_000):
            run = own_cache(_limited(command(*line), size))
            yield Case("disks", f"{line[0]}, {size:,} bytes", folder, lambda folder: None, run)


def _limited(run: Callable[[Path], object], size: int) -> Callable[[Path], object]:
    def limited(folder: Path) -> object:
        # What is said goes to a pipe, which has no length.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        reading, writing = os.pipe()
        own = [os.dup(number) for number in (1, 2)]
        copier = subprocess.Popen(["cat"], stdin=reading, stdout=own[0])
        os.close(reading)
        for number in (1, 2):
            os.dup2(writing, number)
        os.close(writing)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            return run(folder)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, before in zip((1, 2), own, strict=True):
                os.dup2(before, number)
            copier.wait()

    return limited


def outputs(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """Standard output that is closed, or knows ASCII alone."""
    lines = {
        "index": ["search", "query", "idx", "hello", "--model", "model"],
        "whole": ["plan", "config.json"],
        "run": ["check-data", ".", "--sources_file", "sources.json"],
        "report": ["report", "a", "b", "--names", "anchor", "baseline", "--output_dir", "r"],
        "model": ["encode", "texts.jsonl", "v", "--model", "model"],
    }
    for folder, line in lines.items():
        for how in ("closed", "ascii", "ascii with accents"):
            damage = _accents if how.endswith("accents") else lambda folder: None
            run = own_cache(_through(command(*line), how))
            yield Case("outputs", f"{line[0]}, {how}", folder, damage, run, finds=True)


def _accents(folder: Path) -> None:
    for name in ("idx/texts.jsonl", "words.jsonl", "texts.jsonl"):
        if (folder / name).is_file() and name != "idx/texts.jsonl":
            (folder / name).write_text((folder / name).read_text().replace("hello", "hélló →"), encoding="utf-8")
    if (folder / "sources.json").is_file():
        (folder / "sources.json").write_text((folder / "sources.json").read_text().replace('"words"', '"wörds"'))


def _through(run: Callable[[Path], object], how: str) -> Callable[[Path], object]:
    def through(folder: Path) -> object:
        if how == "closed":
            reading, writing = os.pipe()
            os.close(reading)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            sys.stdout = os.fdopen(writing, "w")
            os.dup2(writing, 1)
        else:
            sys.stdout = open(1, "w", encoding="ascii", errors="strict", closefd=False)  # noqa: SIM115
        try:
            return run(folder)
        except SystemExit as end:  # what a shell makes of SIGPIPE
            raise SystemExit(0 if end.code == 128 + signal.SIGPIPE else end.code) from None

    return through


def two_at_a_time(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """The same folder, by two that start one after the other: one ends in a sentence, or both are right."""
    same = _as_undisturbed(inputs)
    for pause in (0.0, 0.1, 0.3, 0.6, 1.0, 1.5):
        run = functools.partial(_twice, lines=[["stage-1", "config.json"]] * 2, pause=pause)
        yield Case("two", f"the same run, {pause} s apart", "run", lambda folder: None, own_cache(run), same)
        other = _both(lambda folder: shutil.copy(folder / "config.json", folder / "other.json"), _of_config({}), _other)
        run = functools.partial(_twice, lines=[["stage-1", "config.json"], ["stage-1", "other.json"]], pause=pause)
        yield Case("two", f"another run, {pause} s apart", "run", other, own_cache(run), same)
        line = ["search", "index", "texts.jsonl", "new", "--model", "model"]
        run = functools.partial(_twice, lines=[line, line], pause=pause, replaces=True)
        yield Case("two", f"an index, {pause} s apart", "model", lambda folder: None, run)


def _other(folder: Path) -> None:
    content = json.loads((folder / "other.json").read_text())
    (folder / "other.json").write_text(json.dumps({**content, "learning_rate": 5e-3}))


def _twice(folder: Path, lines: list[list[str]], pause: float, replaces: bool = False) -> None:
    """The first must end well, and the second in a sentence where it begins before the first has ended.

    Where the later one `replaces` what the other has made, both may end well: one may have overtaken the other while
    that was still loading libraries. What they leave must then answer.
    """
    first = os.fork()
    if not first:
        _start(lines[0], folder, "first")
    time.sleep(0.05 + pause)
    has_ended, status = os.waitpid(first, os.WNOHANG)
    second = os.fork()
    if not second:
        _start(lines[1], folder, "second")
    codes = [os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])]
    codes.insert(0, os.waitstatus_to_exitcode(status if has_ended else os.waitpid(first, 0)[1]))
    said = [(folder / f"{name}.txt").read_text() for name in ("first", "second")]
    sys.stdout.write("".join(said))
    if "Traceback" in "".join(said) or codes[0] != 0 or codes[1] not in (0, 2):
        raise RuntimeError(f"exit codes {codes}")
    if replaces:
        must_end_well("search", "query", "new", "hello", "--model", "model", cwd=folder)
    elif codes[1] == 0 and not has_ended and "nothing is left to do" not in said[1]:
        raise RuntimeError("both say that all went well")


def _start(line: list[str], folder: Path, name: str) -> None:
    code = 99
    try:
        out = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT)
        for number in (1, 2):
            os.dup2(out, number)
        command(*line)(folder)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def long_texts(inputs: Path, draw: random.Random) -> Iterator[Case]:
    """A text of some megabytes; as many tokens are read of it as of a shorter one."""
    kinds = {
        "words": "hello world ", "one word": "x", "digits": "7", "blanks": " ", "lines": "\n", "wide": "é",
        "mixed": "a,é 1\n",
    }  # fmt: skip
    for name, part in kinds.items():
        for size in (300_000, 5_000_000):
            run = functools.partial(_encode_long, text=part * (size // len(part)))
            yield Case("long texts", f"{name}, {size:,} characters", "model", lambda folder: None, run)


def _encode_long(folder: Path, text: str) -> None:
    model = ModelChoice("model").load()
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    signal.alarm(20)
    model.encode(["a", text], show_progress_bar=False)
