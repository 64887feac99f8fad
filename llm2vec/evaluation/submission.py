"""Results as the MTEB leaderboard takes them: under a model's published name and commit, with a draft of its entry.

    OUTPUT_DIR/submission/results/ORGANISATION__NAME/COMMIT/{Task.json, model_meta.json, run_settings.jsonl}
    OUTPUT_DIR/submission/NAME.py

The first are for github.com/embeddings-benchmark/results, whose layout is that of mteb's result cache; the second is
what goes to mteb itself. Nothing is sent. mteb is not imported here: only the adapter does that.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2vec.evaluation.files import parts_of
from llm2vec.evaluation.mteb_adapter import leaderboard_entry, result_file
from llm2vec.evaluation.scores import TaskScore
from llm2vec.files import whole, write_json, write_text
from llm2vec.types import in_one_sentence

#: The draft; what stands above the entry. Formatted with `name` and `open`, the fields to fill in.
_HEADER = '''"""A draft of mteb's entry for {name}, a file of mteb/models/model_implementations/.

To fill in: {open}.
training_datasets holds the sets that the sources in run.json were made from, by mteb's names, as far as they are known.
Complete it: also by sets behind data of your own, and behind texts that were generated.
"""

from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

'''
#: Fields that the leaderboard shows and nothing here can know.
_OPEN = (
    "license", "languages", "release_date", "adapted_from", "training_datasets", "public_training_code",
    "public_training_data", "citation",
)  # fmt: skip


def write_submission(
    tasks: Mapping[str, Any], scores: Mapping[str, TaskScore], name: str, commit: str, root: Path
) -> Path:
    """Write the results of one model for the leaderboard, copied to the byte, and the draft of its entry, whose path it
    returns.

    `tasks` are mteb's by name (of an aggregate, its parts are written too), `scores` those of one model and revision,
    `name` and `commit` those of the weights on the hub, `root` the folder `submission`. A `UserError` where mteb
    refuses what is known of the model.
    """
    source = Path(next(iter(scores.values()))["result_file"]).parent
    known = {
        "name": name,
        "revision": commit,
        "reference": f"https://huggingface.co/{name}",
        "open_weights": True,
        "framework": ["Sentence Transformers", "PyTorch", "safetensors"],
    }
    with in_one_sentence(lambda why: f"--submission: mteb refuses the entry of {name}: {why}", ValueError):
        entry = leaderboard_entry(source / "model_meta.json", known)
    parts = {part.metadata.name: part for task in tasks.values() for part in (task, *parts_of(task))}
    folder = result_file(entry, next(iter(parts.values())), root).parent
    folder.mkdir(parents=True, exist_ok=True)
    for task in parts:
        with whole(folder / f"{task}.json") as aside:
            shutil.copy(source / f"{task}.json", aside)
    sets = entry.training_datasets
    write_json(
        folder / "model_meta.json", entry.to_dict() | {"training_datasets": None if sets is None else sorted(sets)}
    )
    lines = (source / "run_settings.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["task"] in parts]
    write_text(folder / "run_settings.jsonl", "".join(f"{line}\n" for line in kept))
    left = ", ".join(field for field in _OPEN if not getattr(entry, field)) or "nothing"
    variable = re.sub(r"\W|^(?=\d)", "_", name.rpartition("/")[2])
    draft = root / f"{variable}.py"
    write_text(draft, f"{_HEADER.format(name=name, open=left)}{variable} = {entry.to_python()}\n")
    return draft
