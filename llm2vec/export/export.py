"""A checkpoint as a plain folder that stock libraries load: merged weights, tokenizer, sentence-transformers' files.

    config.json, model.safetensors       the decoder without head, adapters merged in float32 and rounded once
    tokenizer.json, tokenizer_config     what the template writes around a text, by the post-processor
    modules.json, 1_Pooling/, 2_Normalize/, sentence_bert_config.json, config_sentence_transformers.json
    llm2vec_config.json                  so that `LLM2Vec.from_pretrained` gives the same unit vectors
    probe_ids.json, run.json, README.md  token ids to compare with, where the model is from, the card
    adapter/                             on demand: the LoRA adapter alone

The folder is written aside, loaded by stock sentence-transformers and compared with the checkpoint, and only then
renamed. Nothing in it names a path of this machine. Run by `llm2vec export`.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in its __all__
from peft import PeftModel
from torch import Tensor

from llm2vec.choice import ModelChoice
from llm2vec.export.adapter import check_adapter, prove_adapter, write_adapter
from llm2vec.export.model_card import Facts, model_card
from llm2vec.export.proof import Proof, our_vectors, prove
from llm2vec.export.provenance import recorded_runs, trained_from
from llm2vec.files import write_json
from llm2vec.hub import local_folder
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import DTYPES
from llm2vec.model.chain import RUN_FILE, Chain, open_chain
from llm2vec.model.settings import SETTINGS_FILE
from llm2vec.model.stock_form import StockForm, probes, stock_model, write_form
from llm2vec.reports.results import Results
from llm2vec.text.tokenization import probe_ids
from llm2vec.types import InstructedText, UserError, first_line


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

    Example:
        >>> export(Export(ModelChoice("output/stage_II/anchor-1b"), license="llama3.2"), Path("exported/anchor-1b"))
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
            write_adapter(folder / "adapter", model, form, what.instructions, chain.base, base_id)
            prove_adapter(folder / "adapter", form, texts, exact, base_id)
        _merge(model)
        stored = _write_weights(folder, model, what.dtype, texts)
        config = model.model.config
        # The stock files ask for unit vectors, and the adapters are merged.
        settings = dataclasses.replace(model.settings, normalize=True, parent_adapters=None)
        architecture = type(model.model).__name__
        num_parameters = sum(p.numel() for p in model.model.parameters())
        write_form(folder, form, config.hidden_size, settings.attention, what.instructions)
        write_json(folder / SETTINGS_FILE, dataclasses.asdict(settings))
        del model
        gc.collect()  # two models at once may be more than there is memory for
        proof = prove(folder, form, settings, texts, exact, stored)
        runs = recorded_runs(chain)
        facts = Facts(
            name=what.repository or out.resolve().name,
            form=form,
            settings=settings,
            architecture=architecture,
            num_parameters=num_parameters,
            hidden_size=config.hidden_size,
            dtype=what.dtype,
            adapter_base=base_id if what.adapter else None,
            base_model=(base_id or "").partition("@")[0] or trained_from(chain, runs),
            license=what.license,
            runs=runs,
            results=what.results,
            **proof._asdict(),
        )
        _write_records(folder, form, facts)
    return proof


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
    return check_adapter(chain, base_id) if what.adapter else base_id


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
    model_card(facts).save(folder / "README.md")
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "README.md")
    write_json(
        folder / RUN_FILE,
        {
            "stages": [run.record for run in facts.runs],
            "dtype": facts.dtype,
            "difference": facts.difference,
            "rounding": facts.rounding,
            "probe_ids": probe_ids(form.rows),
            "files": {f.relative_to(folder).as_posix(): f.stat().st_size for f in files},
        },
    )
