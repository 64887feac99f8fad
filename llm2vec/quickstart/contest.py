"""A contest of recipes on one's own rows: their base and configs, their scores, and the best of them as a plain folder.

    OUT/base-NAME/     one of the known bases, fetched once
    OUT/set/           the configs, an ordinary comparison
    OUT/comparison/    its runs, scores and report
    OUT/model/         the best, for sentence-transformers

Run by `llm2vec embedder` and `llm2vec adapt`, which make the rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def base_folder(name: str, out: Path) -> str:
    """A folder or hub name to start from; one of the known bases is fetched once."""
    from llm2vec.quickstart.base import BASES, make_base

    if name not in BASES:
        return name
    folder = out / f"base-{name}"
    if not (folder / "config.json").is_file():
        make_base(name, folder)
    return str(folder)


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
        "settings": str(out / "set/reading.json"),
    }  # fmt: skip
    files: dict[str, Mapping[str, Any]] = {
        "shared.json": shared,
        "evaluation.json": evaluation,
        "bm25/evaluation.json": {
            "base_model_name_or_path": "mteb/baseline-bm25s", "task_to_instructions_fp": None, "torch_dtype": None,
            "max_length": None, "settings": None,
        },
        "reading.json": {"doc_max_length": ROW_TOKENS},  # all models read as much as the one that is exported
        "base/evaluation.json": {"base_model_name_or_path": base},
        **{f"{name}/{file}": keys for name, stages in recipes.items() for file, keys in stages.items()},
    }  # fmt: skip
    shutil.rmtree(out / "set", ignore_errors=True)  # of a start that asked for other recipes
    for name, content in files.items():
        file = out / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)


def train_and_export(
    out: Path, lock: int, task: str, instruction: str, part: str, say: Callable[[str], None]
) -> Path | None:
    """Do `out/set`, show its scores, and export the best of what was trained, as `task` decides, to `out/model`. The
    folder of the best; None where a run failed, which is then said.

    `lock` is the file descriptor of the lock on `out`, `instruction` the exported model's prompt of a query, `part` of
    the command is such as `3/4`, and `say` is told each line.
    """
    from llm2vec.choice import ModelChoice
    from llm2vec.compare.comparison import compare_recipes
    from llm2vec.compare.table import failure_lines, outcome_table
    from llm2vec.export.export import Export, export
    from llm2vec.hub import without_waiting_for_the_hub

    found = compare_recipes(out / "set", out / "comparison", seeds=[42], lock=lock, say=say, workers=1)
    say(f"\n{outcome_table(found.outcomes).text()}\n")
    if failed := failure_lines(found.outcomes):
        say("\n".join(failed))
        return None
    _, best = max(
        ((o.scores[task], trial) for trial, o in zip(found.trials, found.outcomes, strict=True) if trial.training),
        key=lambda pair: pair[0],
    )
    say(f"{part} export of {best.recipe}, the best of those that were trained here")
    trained = best.training[-1].folder
    shutil.rmtree(out / "model", ignore_errors=True)
    prompts = {"query": instruction}
    what = Export(ModelChoice(str(trained)), doc_max_length=ROW_TOKENS, instructions=prompts)
    with without_waiting_for_the_hub():
        proof = export(what, out / "model")
    say("\n".join(proof.sentences(out / "model", what.dtype)))
    return trained
