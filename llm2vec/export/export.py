"""A checkpoint as a plain folder that stock libraries load: merged weights, tokenizer, sentence-transformers' files.

    config.json, model.safetensors       the decoder without head, adapters merged in float32 and rounded once
    tokenizer.json, tokenizer_config     what the template writes around a text, by the post-processor
    modules.json, 1_Pooling/, 2_Normalize/, sentence_bert_config.json, config_sentence_transformers.json
    llm2vec_config.json                  so that `LLM2Vec.from_pretrained` gives the same unit vectors
    probe_ids.json, run.json, README.md  token ids to compare with, where the model is from, the card
    adapter/                             on demand: the LoRA adapter alone

The folder is written aside, loaded by stock sentence-transformers and compared with the checkpoint, and only then
renamed. Nothing in it names a path of this machine. Run by `experiments/export.py`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in its __all__
from peft import PeftModel, TaskType
from torch import Tensor
from transformers import AutoConfig

from llm2vec.choice import ModelChoice
from llm2vec.export.model_card import Facts, Stage, model_card
from llm2vec.files import write_json
from llm2vec.hub import find_file, local_folder
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import DTYPES, load_tokenizer
from llm2vec.model.chain import RUN_FILE, Chain, Folder, is_mark_of_folder, mark_of, open_chain, read_run
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings, row_tokenizer
from llm2vec.model.stock_form import StockForm, compare, probes, stock_model, stock_settings, write_form
from llm2vec.reports.results import Results
from llm2vec.text.tokenization import probe_ids
from llm2vec.train.log import LOG_FILE
from llm2vec.types import InstructedText, UserError, first_line

logger = logging.getLogger(__name__)

#: Most that a number of a unit vector may differ in float32.
TOLERANCE = 1e-5

#: Keys of a run's record that hold local paths, whatever they look like.
PATH_KEYS = (
    "output_dir", "logging_dir", "dataset_file_path", "sources_file", "file", "resume", "resume_from_checkpoint",
)  # fmt: skip

#: What of a checkpoint's `run.json` is of use in another folder.
RUN_KEYS = (
    "config", "num_processes", "gradient_accumulation_steps", "parent", "data", "step", "weights_of_step", "versions",
    "git_commit",
)  # fmt: skip


@dataclass(frozen=True)
class Export:
    """What to export, and how.

    Attributes:
        model: which model; the base of an adapter is given where it is not to be had under its recorded name.
        dtype: of the stored weights: `bfloat16`, `float16`, `float32`.
        doc_max_length: most tokens of a text, in place of the checkpoint's own limit.
        adapter: write the adapter alone, too.
        base_id: hub name of the base, `organisation/name` or `organisation/name@revision`.
        instructions: prompts to have by name: name (such as a task's) -> instruction.
        results: scores for the card.
        license: for the card, as the hub spells it.
        repository: hub name that the folder will have; None = the folder's own name.
    """

    model: ModelChoice
    dtype: str = "bfloat16"
    doc_max_length: int | None = None
    adapter: bool = False
    base_id: str | None = None
    instructions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    results: Results | None = None
    license: str | None = None
    repository: str | None = None


class Proof(NamedTuple):
    """How far stock libraries are from this project, over the probe texts.

    Attributes:
        difference: largest difference of a number of a unit vector, in float32.
        stray_difference: the same of texts whose mean reads the blank before them; None = there are none.
        rounding: lowest cosine between vectors by the stored weights and by float32 weights.
    """

    difference: float
    stray_difference: float | None
    rounding: float


def export(what: Export, out: Path) -> Proof:
    """Write a checkpoint to `out` for stock libraries, and prove that they give its vectors.

    Raises:
        UserError: something is missing or contradicts itself, the template or pooling cannot be said, the stock
            libraries give other tokens or vectors, or `out` cannot be written. Nothing is left in `out` then.
    """
    _check_repository(what.repository)
    _check_free(out)
    chain = open_chain(what.model.base, what.model.adapters)
    base_id = _base_id(what, chain)
    with _written_aside(out) as folder:
        model = LLM2Vec.from_pretrained(chain, doc_max_length=what.doc_max_length)
        form = stock_model(model.model, model.row_tokenizer, model.settings, what.instructions).form
        texts = probes(form.rows)
        exact = our_vectors(model, texts)
        if what.adapter:
            assert base_id is not None
            _write_adapter(folder / "adapter", model, form, what, chain.base, base_id)
            _prove_adapter(folder / "adapter", form, texts, exact, base_id)
        _merge(model)
        stored = _write_weights(folder, model, what.dtype, texts)
        settings, config = stock_settings(model.settings), model.model.config
        architecture = type(model.model).__name__
        num_parameters = sum(p.numel() for p in model.model.parameters())
        write_form(folder, form, config.hidden_size, settings.attention, what.instructions)
        write_json(folder / SETTINGS_FILE, dataclasses.asdict(settings))
        del model
        gc.collect()  # two models at once may be more than there is memory for
        proof = _prove(folder, form, settings, texts, exact, stored)
        stages = _stages(chain)
        facts = Facts(
            name=what.repository or out.resolve().name,
            form=form,
            settings=settings,
            architecture=architecture,
            num_parameters=num_parameters,
            hidden_size=config.hidden_size,
            dtype=what.dtype,
            adapter_base=base_id if what.adapter else None,
            base_model=(base_id or "").partition("@")[0] or _trained_from(chain, stages),
            license=what.license,
            stages=stages,
            results=what.results,
            **proof._asdict(),
        )
        _write_records(folder, form, facts)
    return proof


def our_vectors(model: LLM2Vec, texts: Sequence[InstructedText]) -> Tensor:
    """Unit vectors [N, D] of texts by `LLM2Vec.encode`."""
    by_side = {
        side: model.encode(
            [[t.instruction, t.text] for t in texts if t.side == side], show_progress_bar=False, side=side
        )
        for side in dict.fromkeys(text.side for text in texts)
    }
    rows = {side: iter(torch.as_tensor(vectors)) for side, vectors in by_side.items()}
    return torch.nn.functional.normalize(torch.stack([next(rows[text.side]) for text in texts]), dim=-1)


def stock_vectors(stock: Any, form: StockForm, texts: Sequence[InstructedText]) -> Tensor:
    """Unit vectors [N, D] of texts by a SentenceTransformer, the texts of a prompt in one batch."""
    prompts = [form.prompt(text.instruction, text.side) for text in texts]
    vectors: list[Tensor] = [torch.empty(0)] * len(texts)
    for prompt in dict.fromkeys(prompts):
        chosen = [i for i, own in enumerate(prompts) if own == prompt]
        encoded = stock.encode(
            [texts[i].text.strip() for i in chosen], prompt=prompt, convert_to_tensor=True, show_progress_bar=False
        )
        for i, vector in zip(chosen, encoded.float().cpu(), strict=True):
            vectors[i] = vector
    return torch.stack(vectors)


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub, making the repository if it is not there; returns its address.

    Raises:
        UserError: the hub refuses, or is out of reach.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload exported embedder")
    except Exception as error:  # not logged in, no such organisation, no connection: each a type of its own
        raise UserError(
            f"{folder} is written, but could not be uploaded to {repository}: {first_line(error)}"
        ) from error
    return str(address)


def _check_free(out: Path) -> None:
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; remove it or name another folder.")


@contextmanager
def _written_aside(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` at the end, or goes if anything fails.

    Raises:
        UserError: it cannot be written.
    """
    target = out.resolve()
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(target)  # over an empty folder, too
    except OSError as error:
        raise UserError(f"{out} could not be written ({error.strerror or first_line(error)}).") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _merge(model: LLM2Vec) -> None:
    if isinstance(model.model, PeftModel):
        model.model = model.model.merge_and_unload()


def _write_weights(folder: Path, model: LLM2Vec, dtype: str, texts: Sequence[InstructedText]) -> Tensor:
    """Write config and weights in a dtype; returns the vectors that the weights give as written, in float32."""
    _round(model, DTYPES[dtype])
    model.model.save_pretrained(str(folder))
    _round(model, torch.float32)
    return our_vectors(model, texts)


def _round(model: LLM2Vec, dtype: torch.dtype) -> None:
    for parameter in model.model.parameters():  # not the buffers: frequencies of positions are never stored
        parameter.data = parameter.data.to(dtype)


def _prove(
    folder: Path,
    form: StockForm,
    settings: EncoderSettings,
    texts: Sequence[InstructedText],
    exact: Tensor,
    stored: Tensor,
) -> Proof:
    """Load a written folder by stock sentence-transformers, in float32, and compare.

    Raises:
        UserError: tokens or vectors are others; says which.
    """
    if probe_ids(row_tokenizer(load_tokenizer(str(folder)), settings)) != probe_ids(form.rows):
        raise UserError("the exported tokenizer renders this project's own template to other tokens.")
    difference, stray = _compare(_load_stock(folder), form, texts, stored)
    rounding = float((exact * stored).sum(dim=-1).min())
    if torch.equal(exact, stored):
        rounding = 1.0
    return Proof(difference, stray, min(rounding, 1.0))


def _compare(
    stock: Any, form: StockForm, texts: Sequence[InstructedText], vectors: Tensor
) -> tuple[float, float | None]:
    compared = [compare(stock, form, text) for text in texts]
    for comparison in compared:
        if comparison.difference is not None:
            raise UserError(f"stock sentence-transformers renders otherwise: {comparison.difference}.")
    apart_N = (stock_vectors(stock, form, texts) - vectors).abs().amax(dim=-1)
    strays_N = torch.tensor([comparison.stray_blank for comparison in compared])
    difference, worst = float(apart_N[~strays_N].max()), int(apart_N.masked_fill(strays_N, -1).argmax())
    if not difference < TOLERANCE:
        text = texts[worst]
        raise UserError(
            f"the vector of {text.text.strip()[:40]!r} by stock sentence-transformers differs from the checkpoint's by "
            f"{difference:.2g}; {TOLERANCE:g} is allowed in float32."
        )
    return difference, float(apart_N[strays_N].max()) if strays_N.any() else None


def _load_stock(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer  # seconds to import, and an extra

    return SentenceTransformer(str(folder), model_kwargs={"dtype": torch.float32, "use_safetensors": True})


# --- the adapter alone ---


def _check_repository(name: str | None) -> None:
    """Refuse a name that the hub would, before anything is computed."""
    try:
        if name is not None:
            validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub: {first_line(error)}") from error


def _base_id(what: Export, chain: Chain) -> str | None:
    """The hub name of the base, checked as far as it can be before anything is computed."""
    base_id = what.base_id
    if base_id is None and local_folder(chain.base) is None:
        base_id = chain.base
    elif base_id and (Path(base_id).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", base_id)):
        raise UserError(
            f"--base_id is {base_id!r}; the name of a repository on the hub is needed, NAME/NAME[@REVISION]."
        )
    if not what.adapter:
        return base_id
    if len(chain.adapters) != 1:
        reason = (
            "the checkpoint is a full model"
            if not chain.adapters
            else f"its base has {len(chain.adapters) - 1} other adapter(s) merged into it, which nobody else has"
        )
        raise UserError(f"--adapter: {reason}; leave --adapter out.")
    if base_id is None:
        raise UserError(
            f"--adapter: the base {chain.base} is a local folder; export it, push it and name it by --base_id."
        )
    return base_id


def _write_adapter(folder: Path, model: LLM2Vec, form: StockForm, what: Export, base: str, base_id: str) -> None:
    """Write the adapter as a folder that sentence-transformers loads, for now over a stand-in for its base."""
    if model.settings.attention == "bidirectional":
        _check_bidirectional(base_id)
    adapted = model.model
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    write_form(folder, form, adapted.config.hidden_size, model.settings.attention, what.instructions)
    _link_base(folder.with_name("base"), base, adapted.config)
    _name_base(folder, str(folder.with_name("base")), None)


def _link_base(folder: Path, base: str, config: Any) -> None:
    """The base's own files under the config that the base has, or shall have, on the hub."""
    folder.mkdir()
    there = local_folder(base) or Path(find_file(base, "config.json") or "").parent
    for file in there.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config.save_pretrained(folder)


def _prove_adapter(folder: Path, form: StockForm, texts: Sequence[InstructedText], exact: Tensor, base_id: str) -> None:
    """Compare the adapter on its base with the checkpoint; then give the base its name on the hub."""
    _compare(_load_stock(folder), form, texts, exact)
    shutil.rmtree(folder.with_name("base"))
    name, _, revision = base_id.partition("@")
    _name_base(folder, name, revision or None)


def _name_base(folder: Path, base: str, revision: str | None) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": revision, "auto_mapping": None}
    config["task_type"] = TaskType.FEATURE_EXTRACTION.value
    write_json(file, config)


def _check_bidirectional(base_id: str) -> None:
    """Refuse a base that would be loaded causally: an adapter's folder cannot say how its base attends.

    Raises:
        UserError: the base's config is out of reach or says nothing of `is_causal: false`.
    """
    name, _, revision = base_id.partition("@")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or None, trust_remote_code=False)
        obeys = getattr(config, "is_causal", True) is False
    except Exception as error:  # hub out of reach, no such repository, no config
        raise UserError(f"--adapter: the config of {base_id} could not be read: {first_line(error)}") from error
    if not obeys:
        raise UserError(
            f"--adapter: this model attends bidirectionally, and the config.json of {base_id} does not say is_causal: "
            "false; an adapter's folder cannot say it, so the adapter would run causally and give other vectors "
            "without a warning. Export the base, push that and name it by --base_id, or leave --adapter out."
        )


# --- where a model is from ---


def _stages(chain: Chain) -> list[Stage]:
    """The runs that made a model, as far as they can be followed, the earliest first."""
    folders = [*reversed(chain.folders)]
    while (parent := _parent(folders[-1])) is not None and parent.path not in {folder.path for folder in folders}:
        folders.append(parent)
    return [stage for folder in reversed(folders) for stage in _recorded_stages(folder)]


def _parent(trained: Folder) -> Folder | None:
    """What a checkpoint's run started from; None where that is not recorded, not here, or no longer what it was."""
    parent = trained.run.get("parent", {})
    name: str | None = parent.get("model_name_or_path")
    run = {} if name is None else read_run(Path(name))
    if name is None or not run:
        return None
    found = mark_of(name)
    if parent.get("marks", {}).get(name, found) != found:
        logger.warning(
            "%s has changed since %s was trained from it; its run is left out of the records", name, trained.path
        )
        return None
    return Folder(name, run)


def _recorded_stages(folder: Folder) -> list[Stage]:
    """The run that wrote a checkpoint, or all those that an export lists; none where no run wrote it."""
    run = folder.run
    if "stages" in run:
        return [Stage(stage, []) for stage in run["stages"]]
    if "config" not in run:
        return []
    marks = run.get("parent", {}).get("marks", {})
    local = {name for name, mark in marks.items() if is_mark_of_folder(mark)}
    kept = {key: run[key] for key in RUN_KEYS if key in run}
    return [Stage(without_local_paths(kept, local), _log(Path(folder.path)))]


def _log(folder: Path) -> list[dict[str, Any]]:
    """A checkpoint's log: its own, or for a run's `checkpoint-N` the run's up to step N."""
    file, last = folder / LOG_FILE, None
    step = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    if step and not file.is_file():
        file, last = folder.resolve().parent / LOG_FILE, int(step.group(1))
    if not file.is_file():
        return []
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # cut short by what ended the run
            entries.append(json.loads(line))
    return [entry for entry in entries if last is None or entry.get("step", 0) <= last]


def _trained_from(chain: Chain, stages: Sequence[Stage]) -> str | None:
    """Hub name of the model that the first run started from."""
    names = [chain.base, *(stage.run.get("parent", {}).get("model_name_or_path") for stage in stages[:1])]
    return next((name for name in names if name and local_folder(name) is None and name.count("/") == 1), None)


def without_local_paths(value: Any, local: Collection[str] = (), key: str = "") -> Any:
    """A record with each local path in it, also as a key, cut to its last part; names on the hub stay whole.

    Args:
        value: the record.
        local: paths that are known to be local, even if nothing is there any more.
        key: whose value it is.
    """
    if isinstance(value, dict):
        return {_shortened(k, local, ""): without_local_paths(v, local, k) for k, v in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item, local, key) for item in value]
    return _shortened(value, local, key) if isinstance(value, str) else value


def _shortened(text: str, local: Collection[str], key: str) -> str:
    path = Path(text)
    try:
        is_local = (
            key in PATH_KEYS or text in local or path.is_absolute() or text.startswith(("~", ".")) or path.exists()
        )
    except (OSError, ValueError):  # too long for a path
        is_local = False
    return path.name if is_local else text


def _write_records(folder: Path, form: StockForm, facts: Facts) -> None:
    """Write probe ids, card, and `run.json` with all files' sizes, last."""
    texts = probes(form.rows)
    write_json(
        folder / "probe_ids.json",
        [
            {
                "side": text.side,
                "prompt": form.prompt(text.instruction, text.side),
                "text": text.text.strip(),
                "input_ids": row.ids,
            }
            for text, row in zip(texts, form.rows.rows(texts), strict=True)
        ],
    )
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "README.md")
    write_json(
        folder / RUN_FILE,
        {
            "stages": [stage.run for stage in facts.stages],
            "dtype": facts.dtype,
            "difference": facts.difference,
            "rounding": facts.rounding,
            "probe_ids": probe_ids(form.rows),
            "files": {f.relative_to(folder).as_posix(): f.stat().st_size for f in files},
        },
    )
