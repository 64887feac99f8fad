"""The model card of an exported folder: `README.md` with front matter, how to use it in four engines, where it is from.

Everything in it comes from the export's own facts: the stock form, `run.json`, `log.jsonl` and result files. The text
is `card.md.jinja`; what is decided in Python stands here. The tests run the transformers snippet as printed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llm2vec.evaluation.provenance import RecordedRun
from llm2vec.export.proof import Proof
from llm2vec.model.settings import EncoderSettings
from llm2vec.model.stock_form import BIDIRECTIONAL_SINCE, STRAY_BLANK, StockForm
from llm2vec.reports.results import Results
from llm2vec.table import Table
from llm2vec.training.config import KEYS
from llm2vec.types import PoolingMode

#: Stages as headings.
_HEADINGS = {
    "stage_I": "Stage I", "stage_II": "Stage II", "lm": "Language modelling", "mntp": "MNTP", "simcse": "SimCSE",
}  # fmt: skip

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
#: What the snippets ask with, where neither the table nor the training names an instruction.
_INSTRUCTION = "Given a question, retrieve passages that answer it"
_QUERY = "who wrote Emma?"
_DOCUMENTS = ["Emma is a novel by Jane Austen.", "The emu is a large bird of Australia."]
#: Pooling modes in the words of vLLM and of text-embeddings-inference; others they have none for.
_SERVER_POOLING: dict[PoolingMode, tuple[str, str]] = {
    "last": ("LAST", "last-token"), "first": ("CLS", "cls"), "mean": ("MEAN", "mean"),
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What the card says of a model; None where it is not known, or there is no such thing."""

    name: str  #: What its users load it by
    form: StockForm
    settings: EncoderSettings
    architecture: str
    num_parameters: int
    hidden_size: int
    dtype: str  #: Of the stored weights
    #: Hub names: of the base that `adapter/` goes on, and of what the model was trained from.
    adapter_base: str | None
    base_model: str | None
    license: str | None
    runs: Sequence[RecordedRun]  #: The earliest first
    results: Results | None
    instruction: str = ""  #: The default of queries, as the exported table has it; empty = none


def model_card(facts: Facts, proof: Proof) -> ModelCard:
    """The card; `save` writes it as `README.md`."""
    form = facts.form
    prompts = {name: prompt for name, prompt in form.prompts({}).items() if prompt}
    # Servers know no mean that leaves the prompt out.
    served = form.include_prompt or form.pooling_mode in ("last", "first")
    return ModelCard.from_template(
        _front_matter(facts),
        template_path=str(_TEMPLATE),
        facts=facts,
        proof=proof,
        origin=facts.runs[0].record.get("origin", {}) if facts.runs else {},
        form=form,
        settings=facts.settings,
        prompts=prompts,
        strips_prompts=any(prompt != prompt.lstrip() for prompt in prompts.values()),
        bidirectional_since=BIDIRECTIONAL_SINCE,
        stray_blank=STRAY_BLANK,
        query=_QUERY,
        query_prompt=form.prompt(facts.instruction or _trained_with(facts.runs) or _INSTRUCTION),
        documents=_DOCUMENTS,
        server_pooling=_SERVER_POOLING.get(form.pooling_mode) if served else None,
        runs=[(_heading(run, number), _tables(run)) for number, run in enumerate(facts.runs, 1)],
        scores=facts.results and Table(["task", "main score x 100"], sorted(facts.results.scores.items())),
        repr=repr,
    )


def _trained_with(runs: Sequence[RecordedRun]) -> str:
    """The first instruction of the last run's rows; empty = none is recorded."""
    told = [text for run in runs[-1:] for of in run.record.get("data", []) for text, *_ in of.get("instructions", [])]
    return next(filter(None, told), "")


def _front_matter(facts: Facts) -> ModelCardData:
    """The metadata that the hub reads."""
    hub_datasets = {run.record.get("config", {}).get("dataset_name") for run in facts.runs}
    results = facts.results
    scores = sorted(results.scores.items()) if results else []
    revisions = results.data_revisions if results else {}
    return ModelCardData(
        base_model=facts.base_model,
        license=facts.license,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "transformers", "llm2vec"],
        datasets=sorted(name for name in hub_datasets if name and "/" in name) or None,
        model_name=facts.name.rpartition("/")[2] if results else None,
        eval_results=[
            EvalResult(
                task_type="sentence-similarity",
                task_name=f"MTEB {task}",
                dataset_type=f"mteb/{task}",
                dataset_name=f"MTEB {task}",
                dataset_revision=None if revisions.get(task) == "None" else revisions.get(task),
                metric_type="main_score",
                metric_value=round(score, 3),
            )
            for task, score in scores
        ]
        or None,
    )


def _heading(run: RecordedRun, number: int) -> str:
    stage = run.record.get("config", {}).get("stage")
    return _HEADINGS.get(stage, stage or f"Run {number}")


def _tables(run: RecordedRun) -> list[Table]:
    """A run's settings, its losses and accuracies at both ends of the log, and its data."""
    tables = [Table(["setting", "value"], _settings(run.record.get("config", {})), num_names=2)]
    logged = [entry for entry in run.log if "loss" in entry]
    if logged:
        first, last = logged[0], logged[-1]
        shown = [key for key in last if key in first and (key.startswith("loss") or key.endswith("accuracy"))]
        rows = [[key, f"{first[key]:.4f}", f"{last[key]:.4f}"] for key in shown]
        tables.append(Table(["logged", f"step {first['step']:,}", f"step {last['step']:,}"], rows))
    rows = [
        [str(data.get("source")), f"{data['rows']:,}", f"`{data['sha256']}`" if data.get("sha256") else "-"]
        for data in run.record.get("data", [])
    ]
    if rows:
        tables.append(Table(["data", "rows", "SHA-256 of the file"], rows, num_names=3))
    return tables


def _settings(config: Mapping[str, Any]) -> list[list[str]]:
    """The settings of a run that its stage reads, as table rows, each value as a config writes it."""
    values = {**config, **config.get("training", {})}
    unread = set() if config.get("use_peft") else {"lora_r", "lora_alpha"}
    unread |= {name for name, key in KEYS.items() if config.get("stage") not in (None, *key.stages)}
    off = (None, False)  # unlike 0, which equals False
    shown = [name for name, key in KEYS.items() if key.on_card and name not in unread]
    written = [name for name in shown if not any(values.get(name) is value for value in off)]
    return [[f"`{name}`", f"`{json.dumps(values[name], ensure_ascii=False)}`"] for name in written]
