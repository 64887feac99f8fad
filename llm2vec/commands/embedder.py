"""An embedder out of a real language model on your own machine, measured beside BM25 and what it was made from.

    llm2vec embedder                                                        # what `make embedder` runs
    llm2vec embedder --data my.jsonl --instruction "Given a question, find its answer" --output_dir output/mine
    llm2vec embedder --base HuggingFaceTB/SmolLM2-360M-Instruct --rows 20000

About an hour on two CPU cores with the defaults, minutes on a GPU; killed, it goes on where it was. It fetches
SmolLM2-135M, takes the docstrings of the installed Python packages or the rows of --data (JSON lines of `query`,
`positive` and `negative`), holds queries out of them, and trains with and without Stage I. Below --output_dir:

    model/              the best of what was trained, a plain sentence-transformers folder
    comparison/         scores, logs and runs of all that was trained; comparison.html
    index/              the held-out documents, to be searched
    base-NAME/, set/    what it was made from, and the configs; the data lie beside them
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm2vec import cli
from llm2vec.types import UserError

#: Rows of a step. Few, so that the steps are many: Stage II begins on a plateau that takes some 20 steps to leave. With
#: 32 rows on a CPU, and half as many steps of the same rows, the baseline had 56.2 in place of 64.0. A GPU has more
#: rows, and so more in a step; that number is chosen and not measured.
STAGE_I_ROWS, STAGE_II_ROWS, STAGE_II_ROWS_ON_GPU = 16, 16, 64
#: Rows that a stage trains on: about an hour for two CPU cores, minutes for a GPU.
ROWS_ON_CPU, ROWS_ON_GPU = 1536, 32_000

#: Tokens of Stage II at once on a CPU: more than a step's, so that no text is encoded twice. And of their activations,
#: GB; layers beyond that are computed again.
TOKENS_AT_ONCE, ACTIVATIONS = 16_384, 5
#: Most tokens of a row, and of its text in training. The embedder itself reads texts that fill the row.
ROW_TOKENS, TEXT_TOKENS = 128, 64

#: What is trained: Stage II without and with Stage I before it.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "baseline": {"1_stage_II.json": {}},
    "anchor": {"1_stage_I.json": {}, "2_stage_II.json": {}},
}

#: What is asked at the end where the docstrings are the data.
DOCSTRING_QUERIES = (
    "wait until a predicate becomes true",
    "remove duplicate rows of a table",
    "how similar are two strings",
)


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser("embedder", __doc__)
    parser.add_argument("--base", default="smollm2-135m", help="of `llm2vec base`, a folder, or a hub name")
    parser.add_argument("--data", type=cli.path, metavar="JSONL", help="your own rows (default: docstrings)")
    parser.add_argument("--instruction", help="what a query of --data asks for, in a sentence")
    parser.add_argument("--rows", type=cli.positive, help=f"of a stage (default {ROWS_ON_CPU:,}; GPU {ROWS_ON_GPU:,})")
    parser.add_argument("--queries", type=cli.positive, default=200, help="held out of --data (default 200)")
    parser.add_argument("--output_dir", type=cli.path, default=Path("output/embedder"))
    args = parser.parse_args(argv)
    if (args.data is None) != (args.instruction is None):
        raise UserError("--data and --instruction go together: the rows, and what a query asks for.")
    if args.data is not None and not args.data.is_file():
        raise UserError(f"--data: there is no file {args.data}.")
    return args


def main(argv: Sequence[str]) -> int:
    """Base, data, training, export, search; returns the exit code: 1 where a run failed."""
    started, args = time.monotonic(), _parse_args(argv)
    from llm2vec.files import alone_in, read_object

    out: Path = args.output_dir
    with alone_in(out, "embedder") as lock:
        print("1/4 base model and data")
        base = base_folder(args.base, out)
        task, texts = _data(args, out)
        print("2/4 training and scores")
        write_set(out, base, task, texts, args.rows)
        trained = train_and_export(out, lock, task, texts / "prompts.json", "3/4")
        if trained is None:
            return 1
        print("4/4 search")
        instruction = read_object(texts / "eval/instructions.json")[task]
        _search(trained, texts / "eval" / task, out / "index", instruction, None if args.data else DOCSTRING_QUERIES)
    print(f"\nreport: {out / 'comparison/comparison.html'}    ({(time.monotonic() - started) / 60:.0f} minutes)")
    print(f'next: llm2vec search query {out / "index"} "what you look for" --instruction {shlex.quote(instruction)}')
    print(f"      llm2vec search index FOLDER_OF_TEXTS NEW_FOLDER --model {trained}")
    print(f'      python -c "from sentence_transformers import SentenceTransformer as S; S({str(out / "model")!r})"')
    return 0


def base_folder(name: str, out: Path) -> str:
    """A folder or hub name to start from; one of the known bases is fetched once."""
    from llm2vec.quickstart.base import BASES, make_base

    if name not in BASES:
        return name
    folder = out / f"base-{name}"
    if not (folder / "config.json").is_file():
        make_base(name, folder)
    return str(folder)


def _data(args: argparse.Namespace, out: Path) -> tuple[str, Path]:
    """The held-out task's name, and the folder of `train/`, `eval/` and `sources.json`."""
    from llm2vec.data.held_out import hold_out, set_name
    from llm2vec.data.sources import Instruction, Source
    from llm2vec.files import json_hash, sha256, write_json
    from llm2vec.quickstart.docstrings import EVAL_FOLDER, installed_roots, write_corpus

    if args.data is None:
        folder = out / "docstrings"
        write_corpus(folder, installed_roots())
        instruction, task = "Given a summary, retrieve its description", Path(EVAL_FOLDER).name
        write_json(folder / "sources.json", {"docstrings": {"file": "docstrings.jsonl", "instruction": instruction}})
        write_json(folder / "eval/instructions.json", {task: instruction})
    else:
        instruction = args.instruction
        source = Source(args.data.stem, args.data.name, (Instruction(instruction),))
        decides = json_hash([sha256(args.data), source, args.queries])  # other rows are other data
        folder, task = out / f"data-{decides[:8]}", set_name(source)
        if not (folder / "eval/instructions.json").is_file():  # written last
            hold_out(args.data.parent, [source], folder, args.queries, seed=42)
    write_json(folder / "prompts.json", {"query": instruction})
    return task, folder


def write_set(
    out: Path,
    base: str,
    task: str,
    data: Path,
    rows: int | None,
    recipes: Mapping[str, Mapping[str, Any]] = RECIPES,
    rates: tuple[float, float] = (1e-4, 5e-4),
    rows_II: int | None = None,
) -> None:
    """The comparison's configs, into `out/set`: the recipes, the base as it is, and BM25.

    `data` has `train/`, `eval/` with the held-out `task`, and `sources.json`. A stage trains on so many `rows`, and a
    step of Stage II has `rows_II`; None = what suits the machine. `recipes`: name -> the files of its stages -> keys;
    `rates`: learning rates, of all parameters before Stage II and of Stage II.
    """
    import torch

    from llm2vec.files import write_json

    on_gpu = torch.cuda.is_available()
    rows = rows or (ROWS_ON_GPU if on_gpu else ROWS_ON_CPU)

    def stage(of_a_step: int, **keys: Any) -> dict[str, Any]:
        steps = max(4, rows // of_a_step)
        return {
            "max_steps": steps, "warmup_steps": steps // 10, "per_device_train_batch_size": of_a_step,
            "save_steps": -(-steps // 4), "save_total_limit": 1, "logging_steps": 2, **keys,
        }  # fmt: skip

    limit = {} if on_gpu else {"tokens_per_microbatch": TOKENS_AT_ONCE, "activation_memory_gb": ACTIVATIONS}
    rows_II = rows_II or (STAGE_II_ROWS_ON_GPU if on_gpu else STAGE_II_ROWS)
    before = stage(STAGE_I_ROWS, learning_rate=rates[0])
    # LoRA without dropout: in so few steps there is nothing to regularise, and each mask costs a CPU time and memory.
    shared = {
        "all": {
            "model_name_or_path": base, "dataset_file_path": str(data / "train"),
            "sources_file": str(data / "sources.json"), "max_seq_length": ROW_TOKENS,
            "doc_max_length": TEXT_TOKENS, "bf16": on_gpu, "report_to": "none", "disable_tqdm": True,
        },
        "stage_I": before,
        "mntp": {**before, "use_peft": False},
        "stage_II": stage(rows_II, learning_rate=rates[1], num_hard_negatives=1, lora_dropout=0.0, **limit),
    }  # fmt: skip
    evaluation = {
        "tasks": [task], "local_data_dir": str(data / "eval"), "torch_dtype": "float32", "max_length": ROW_TOKENS,
        "task_to_instructions_fp": str(data / "eval/instructions.json"), "save_predictions": True,
    }  # fmt: skip
    files: dict[str, Mapping[str, Any]] = {
        "shared.json": shared,
        "evaluation.json": evaluation,
        "bm25/evaluation.json": {
            "base_model_name_or_path": "mteb/baseline-bm25s", "task_to_instructions_fp": None, "torch_dtype": None,
            "max_length": None,
        },
        "base/evaluation.json": {"base_model_name_or_path": base},
        **{f"{name}/{file}": keys for name, stages in recipes.items() for file, keys in stages.items()},
    }  # fmt: skip
    shutil.rmtree(out / "set", ignore_errors=True)  # of a start that asked for other recipes
    for name, content in files.items():
        file = out / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)


def train_and_export(out: Path, lock: int, task: str, prompts: Path, part: str) -> Path | None:
    """Do `out/set`, show its scores, and export the best of what was trained, as `task` decides, to `out/model`. The
    folder of the best; None where a run failed, which is then said.

    `lock` is the file descriptor of the lock on `out`, `prompts` are the export's, and `part` of the command is such as
    `3/4`.
    """
    from llm2vec.compare.comparison import compare_recipes
    from llm2vec.compare.table import failure_lines, outcome_table

    found = compare_recipes(
        out / "set", out / "comparison", seeds=[42], lock=lock, say=partial(print, flush=True), workers=1
    )
    print("", outcome_table(found.outcomes).text(), "", sep="\n")
    if failed := failure_lines(found.outcomes):
        print(*failed, sep="\n")
        return None
    _, best = max(
        ((o.scores[task], trial) for trial, o in zip(found.trials, found.outcomes, strict=True) if trial.training),
        key=lambda pair: pair[0],
    )
    print(f"{part} export of {best.recipe}, the best of those that were trained here")
    trained = best.training[-1].folder
    _export(trained, out / "model", prompts)
    return trained


def _export(trained: Path, to: Path, prompts: Path) -> None:
    """Write a trained model as a plain folder, anew, with its prompts."""
    from llm2vec.commands.models import export

    shutil.rmtree(to, ignore_errors=True)
    flags = ["--doc_max_length", str(ROW_TOKENS), "--task_to_instructions_fp", str(prompts)]
    export.main([str(trained), str(to), *flags])


def _search(model: Path, task: Path, index: Path, instruction: str, queries: Sequence[str] | None) -> None:
    """Index the held-out documents, and print the five best of a few queries."""
    from llm2vec.choice import ModelChoice
    from llm2vec.corpus.index import TextIndex, build_index
    from llm2vec.files import json_lines

    asked = list(queries or [content["text"] for _, content in json_lines(task / "queries.jsonl")][:3])
    build_index(task / "corpus.jsonl", index, ModelChoice(str(model)))
    found = TextIndex(index)
    for query, hits in zip(asked, found.search(found.load_model(), asked, 5, instruction), strict=True):
        print(cli.plain(f"\n{query}"))
        for hit in hits:
            print(cli.plain(f"    {hit.score:.3f}  {' '.join(hit.text.split())[:100]}"))
