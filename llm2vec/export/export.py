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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in its __all__
from peft import PeftModel
from torch.nn.functional import normalize

from llm2vec.choice import ModelChoice
from llm2vec.evaluation.provenance import recorded_runs, trained_from
from llm2vec.export.adapter import check_adapter, write_adapter
from llm2vec.export.model_card import Facts, model_card
from llm2vec.export.proof import Proof, encode_texts, prove
from llm2vec.files import alone_beside, whole_folder, write_json
from llm2vec.hub import local_folder
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import DTYPES
from llm2vec.model.chain import RUN_FILE, Chain, open_chain
from llm2vec.model.settings import SETTINGS_FILE
from llm2vec.model.stock_form import probes, stock_model, write_form
from llm2vec.reports.results import Results
from llm2vec.text.probe_texts import probe_ids
from llm2vec.types import UserError, in_one_sentence


@dataclass(frozen=True)
class Export:
    """What to export, and how.

    Example:
        >>> export(Export(ModelChoice("output/stage_II/anchor-1b"), license="llama3.2"), Path("exported/anchor-1b"))
    """

    #: The base of an adapter is given where it is not to be had under its recorded name.
    model: ModelChoice
    dtype: str = "bfloat16"  #: Of the stored weights: `bfloat16`, `float16`, `float32`
    #: Most tokens of a text, in place of the checkpoint's own limit.
    doc_max_length: int | None = None
    adapter: bool = False  #: Write the adapter alone, too
    #: Hub name of the base, `organisation/name` or `organisation/name@revision`.
    base_id: str | None = None
    #: Prompts to have by name: name (such as a task's) -> instruction.
    instructions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    results: Results | None = None  #: Scores for the card, and the license as the hub spells it
    license: str | None = None
    #: Hub name that the folder will have; None = the folder's own name.
    repository: str | None = None


def export(what: Export, out: Path) -> Proof:
    """Write a checkpoint to `out` for stock libraries, and prove that they give its vectors.

    A `UserError`, and nothing in `out`, where something is missing or contradicts itself, template or pooling cannot be
    said, the stock libraries give other tokens or vectors, or `out` cannot be written.
    """
    if what.repository is not None:  # a name that the hub would refuse, before anything is computed
        with in_one_sentence(lambda why: f"--push_to_hub: {why}", HFValidationError):
            validate_repo_id(what.repository)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; remove it or name another folder.")
    chain = open_chain(what.model.base, what.model.adapters)
    base_id = _base_id(what, chain)
    target = out.resolve()
    with (
        in_one_sentence(lambda why: f"{out} could not be written ({why}).", OSError),
        alone_beside(target, "export"),
        whole_folder(target) as folder,
    ):
        model = LLM2Vec.from_pretrained(chain, doc_max_length=what.doc_max_length, instruction_mask="offsets")
        form = stock_model(model.model, model.row_tokenizer, model.settings, what.instructions).form
        texts = probes(form.rows)
        exact = normalize(encode_texts(model, texts), dim=-1)
        if what.adapter:
            assert base_id is not None
            write_adapter(folder / "adapter", model, form, what.instructions, chain.base, base_id, texts, exact)
        if isinstance(model.model, PeftModel):
            model.model = model.model.merge_and_unload()
        _round(model, DTYPES[what.dtype])
        model.model.save_pretrained(str(folder))
        _round(model, torch.float32)
        stored = normalize(encode_texts(model, texts), dim=-1)
        config = model.model.config
        # The stock files ask for unit vectors, and the adapters are merged.
        settings = dataclasses.replace(model.settings, normalize=True, parent_adapters=None)
        write_form(folder, form, config.hidden_size, settings.attention, what.instructions)
        write_json(folder / SETTINGS_FILE, settings.written())
        runs = recorded_runs(chain.folders)
        facts = Facts(
            name=what.repository or target.name,
            form=form,
            settings=settings,
            architecture=type(model.model).__name__,
            num_parameters=sum(p.numel() for p in model.model.parameters()),
            hidden_size=config.hidden_size,
            dtype=what.dtype,
            adapter_base=base_id if what.adapter else None,
            base_model=(base_id or "").partition("@")[0] or trained_from(chain.base, runs),
            license=what.license or (runs[0].record.get("origin", {}).get("license") if runs else None),
            runs=runs,
            results=what.results,
            instruction=what.instructions.get("query", ""),
        )
        del model
        gc.collect()  # two models at once may be more than there is memory for
        proof = prove(folder, form, settings, texts, exact, stored)
        _write_records(folder, facts, proof)
    return proof


def _round(model: LLM2Vec, dtype: torch.dtype) -> None:
    for parameter in model.model.parameters():  # not the buffers: frequencies of positions are never stored
        parameter.data = parameter.data.to(dtype)


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


def _write_records(folder: Path, facts: Facts, proof: Proof) -> None:
    """Write probe ids, card, and `run.json` with all files' sizes, last."""
    form = facts.form
    texts = probes(form.rows)
    ids = [row.ids for row in form.rows.rows(texts)]
    prompts = [form.prompt(text.instruction, text.side) for text in texts]
    probed = [
        {"side": text.side, "prompt": prompt, "text": text.text.strip(), "input_ids": input_ids}
        for text, prompt, input_ids in zip(texts, prompts, ids, strict=True)
    ]
    write_json(folder / "probe_ids.json", probed)
    model_card(facts, proof).save(folder / "README.md")
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "README.md")
    record = {
        "stages": [run.record for run in facts.runs],
        "dtype": facts.dtype,
        "difference": proof.difference,
        "rounding": proof.rounding,
        "probe_ids": probe_ids(form.rows),
        "files": {f.relative_to(folder).as_posix(): f.stat().st_size for f in files},
    }
    write_json(folder / RUN_FILE, record)
