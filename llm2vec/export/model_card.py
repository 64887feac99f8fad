"""The model card of an exported folder: `README.md` with front matter, how to use it in four engines, where it is from.

Everything in it comes from the export's own facts: the stock form, `run.json`, `log.jsonl` and result files. The
transformers snippet is code that the tests run as printed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from llm2vec.model.settings import EncoderSettings
from llm2vec.model.stock_form import STRAY_BLANK, StockForm
from llm2vec.reports.results import Results
from llm2vec.train.config import KEYS

#: Stages as headings.
_HEADINGS = {
    "stage_I": "Stage I", "stage_II": "Stage II", "lm": "Language modelling", "mntp": "MNTP", "simcse": "SimCSE",
}  # fmt: skip

EXAMPLE_INSTRUCTION = "Given a question, retrieve passages that answer it"
EXAMPLE_QUERY = "who wrote Emma?"
EXAMPLE_DOCUMENTS = ("Emma is a novel by Jane Austen.", "The emu is a large bird of Australia.")


@dataclass(frozen=True)
class Stage:
    """One training run below a model: its `run.json`, without local paths, and its log."""

    run: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Facts:
    """What the card says of a model.

    Attributes:
        name: what its users load it by.
        form: the stock form.
        settings: how it embeds.
        architecture: class of the weights.
        num_parameters: of the weights.
        hidden_size: numbers of a vector.
        dtype: of the stored weights.
        adapter_base: hub name of the base that `adapter/` goes on; None = there is no such folder.
        base_model: hub name of what it was trained from, if known.
        license: as the hub spells it, if given.
        stages: training runs, the earliest first.
        results: scores of mteb tasks, if given.
        difference: largest difference of a number of a unit vector between stock libraries and this project.
        rounding: lowest cosine of a text's vector by the stored weights with the one by float32 weights.
        stray_difference: as `difference`, of texts whose mean reads the blank before them; None = there are none.
    """

    name: str
    form: StockForm
    settings: EncoderSettings
    architecture: str
    num_parameters: int
    hidden_size: int
    dtype: str
    adapter_base: str | None
    base_model: str | None
    license: str | None
    stages: Sequence[Stage]
    results: Results | None
    difference: float
    rounding: float
    stray_difference: float | None


def model_card(facts: Facts) -> str:
    """The text of `README.md`."""
    parts = [
        f"---\n{front_matter(facts).to_yaml()}\n---\n\n# {facts.name}",
        _introduction(facts),
        "## Use",
        _texts(facts),
        "### sentence-transformers\n\n" + _code("python", _sentence_transformers(facts)),
        "### transformers\n\n" + _code("python", transformers_snippet(facts)),
        _vllm(facts),
        _tei(facts),
        _adapter(facts),
        _training(facts),
        _scores(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: Facts) -> ModelCardData:
    """The metadata that the hub reads."""
    hub_datasets = {run.get("dataset_name") for run in (stage.run.get("config", {}) for stage in facts.stages)}
    results = facts.results
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
                dataset_revision=_revision(results.data_revisions.get(task)),
                metric_type="main_score",
                metric_value=round(score, 3),
            )
            for task, score in sorted(results.scores.items())
        ]
        if results
        else None,
    )


def transformers_snippet(facts: Facts) -> str:
    """Code that embeds texts by transformers alone, for this model's pooling."""
    form = facts.form
    prompt = form.prompt("", "document")
    pooling = {
        "last": ["    pooled = states[:, -1]  # rows are padded on the left"],
        "first": ["    pooled = states[:, 0]  # rows are padded on the right"],
        "mean": [
            '    weights = batch["attention_mask"][..., None].to(states.dtype)',
            *([] if form.include_prompt else [_skip_prompt(form)]),
            "    pooled = (states * weights).sum(1) / weights.sum(1)",
        ],
        "weighted_mean": [
            '    weights = (batch["attention_mask"] * batch["attention_mask"].cumsum(1))[..., None].to(states.dtype)',
            "    pooled = (states * weights).sum(1) / weights.sum(1)",
        ],
    }[form.pooling_mode]
    return "\n".join(
        [
            "import torch",
            "from transformers import AutoModel, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")',
            f'model = AutoModel.from_pretrained("{facts.name}").eval()',  # torch's mode without dropout
            "",
            "@torch.no_grad()",
            f"def embed(texts, prompt={prompt!r}):",
            "    texts = [prompt + text.strip() for text in texts]",
            '    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")',
            "    states = model(**batch).last_hidden_state",
            *pooling,
            "    return torch.nn.functional.normalize(pooled, dim=-1)",
            "",
            f"queries = embed([{EXAMPLE_QUERY!r}], prompt={form.prompt(EXAMPLE_INSTRUCTION)!r})",
            f"documents = embed({list(EXAMPLE_DOCUMENTS)!r})",
            "print(queries @ documents.T)",
        ]
    )


def _skip_prompt(form: StockForm) -> str:
    closing = f" - {len(form.behind)}" if form.behind else ""
    return f"    weights[:, : len(tokenizer(prompt).input_ids){closing}] = 0  # the prompt is not pooled over"


def _introduction(facts: Facts) -> str:
    settings, size = facts.settings, f"{facts.num_parameters / 1e9:.2f} billion" if facts.num_parameters > 1e8 else ""
    size = size or f"{facts.num_parameters / 1e6:.1f} million"
    pooled = {
        "last": "the closing token's state",
        "first": "the first token's state",
        "mean": "the mean of " + ("all tokens' states" if facts.form.include_prompt else "the text's tokens' states"),
        "weighted_mean": "a mean of all tokens' states that weights later ones more",
    }[settings.pooling_mode]
    made_from = (
        f", trained from [{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else ""
    )
    return (
        f"A text embedder of {size} parameters ({facts.architecture}, stored in {facts.dtype}){made_from}. "
        f"{settings.attention.capitalize()} attention; an embedding is {pooled}, {facts.hidden_size} numbers, of "
        f"length 1; texts are cut at {settings.max_length} tokens, template included. Similarity is the cosine."
    )


def _texts(facts: Facts) -> str:
    form, lines = facts.form, []
    instructed = form.prompt("INSTRUCTION")
    takes = form.prompt("INSTRUCTION") != form.prompt("")
    if takes:
        lines.append(
            f"A query carries an instruction; its prompt is `{instructed!r}`. Documents carry none, and in symmetric "
            "tasks both texts carry the same."
        )
    named = {name: prompt for name, prompt in form.prompts({}).items() if prompt}
    if named:
        spelled = ", ".join(f"`{name}` is `{prompt!r}`" for name, prompt in named.items())
        lines.append(f"Texts without an instruction have prompts as well: {spelled}.")
    lines.append(
        "The tokenizer writes what stands around prompt and text, and cuts the text alone. Strip texts of blanks at "
        "both ends. `probe_ids.json` holds texts and the token ids they must become."
    )
    if facts.settings.attention == "bidirectional":
        lines.append("transformers 5.2 or newer is needed: older versions ignore `is_causal: false` without a word.")
    if any(prompt != prompt.lstrip() for prompt in named.values()):
        lines.append("sentence-transformers 5.4 or newer is needed: older versions strip a prompt's line breaks.")
    if facts.stray_difference is not None:
        lines.append(
            f"{STRAY_BLANK} Measured on probe texts: numbers of unit vectors move by {facts.stray_difference:.1g}."
        )
    return "\n".join(lines)


def _sentence_transformers(facts: Facts) -> str:
    return "\n".join(
        [
            "from sentence_transformers import SentenceTransformer",
            "",
            f'model = SentenceTransformer("{facts.name}")',
            f"queries = model.encode_query([{EXAMPLE_QUERY!r}], prompt={facts.form.prompt(EXAMPLE_INSTRUCTION)!r})",
            f"documents = model.encode_document({list(EXAMPLE_DOCUMENTS)!r})",
            "print(model.similarity(queries, documents))",
        ]
    )


def _vllm(facts: Facts) -> str:
    pooling = _server_pooling(facts)
    if pooling is None:
        return _no_server("vLLM", facts)
    text = facts.form.prompt(EXAMPLE_INSTRUCTION) + EXAMPLE_QUERY
    lines = [
        "### vLLM\n",
        _code("bash", f"vllm serve {facts.name} --runner pooling"),
        "\nvLLM knows no prompts: the client writes them before the text. It refuses longer texts unless a request "
        "says `truncate_prompt_tokens: -1`.\n",
        _code(
            "python",
            f'client.embeddings.create(model="{facts.name}", input=[{text!r}], '
            'extra_body={"truncate_prompt_tokens": -1})',
        ),
        f'\nA version that does not read `1_Pooling` needs `--pooler-config \'{{"pooling_type": "{pooling}"}}\'`.',
    ]
    return "\n".join(lines + _attention_note(facts))


def _tei(facts: Facts) -> str:
    pooling = _server_pooling(facts)
    if pooling is None:
        return _no_server("text-embeddings-inference", facts)
    flag = {"LAST": "last-token", "CLS": "cls", "MEAN": "mean"}[pooling]
    lines = [
        "### text-embeddings-inference\n",
        _code("bash", f"text-embeddings-router --model-id {facts.name} --pooling {flag}"),
        "\nIt reads `tokenizer.json` alone, so control tokens written out in a text (`<|eot_id|>`) are read as such: "
        "take them out of untrusted texts. The prompts of `config_sentence_transformers.json` go by `prompt_name`.",
    ]
    return "\n".join(lines + _attention_note(facts))


def _server_pooling(facts: Facts) -> str | None:
    """vLLM's name of the pooling; None = servers have none that is the same."""
    if facts.form.pooling_mode == "mean":
        return "MEAN" if facts.form.include_prompt else None
    return {"last": "LAST", "first": "CLS"}.get(facts.form.pooling_mode)


def _no_server(engine: str, facts: Facts) -> str:
    what = (
        "leave the prompt out of a mean, which this model needs"
        if facts.form.pooling_mode == "mean"
        else "weight a mean by position, which this model needs"
    )
    return f"### {engine}\n\nNot possible: {engine} cannot {what}; it would give other vectors without a warning."


def _attention_note(facts: Facts) -> list[str]:
    if facts.settings.attention == "causal":
        return []
    return [
        "\nThis model attends bidirectionally (`is_causal: false`, `use_bidirectional_attention: true` in "
        "`config.json`). vLLM 0.32 was seen to obey for Llama, Qwen2, Qwen3 and Mistral; compare a few vectors with "
        "sentence-transformers before you trust another engine or family."
    ]


def _adapter(facts: Facts) -> str:
    if facts.adapter_base is None:
        return ""
    return (
        f"## Adapter\n\n`adapter/` holds the LoRA adapter alone, in float32, for `{facts.adapter_base}`. A copy of the "
        'folder loads by itself, base included: `SentenceTransformer("adapter")`. The folder above it holds the merged '
        "weights, which need no base."
    )


def _training(facts: Facts) -> str:
    if not facts.stages:
        return ""
    parts = ["## Training\n\nThe full configs, versions and hashes are in `run.json`."]
    for number, stage in enumerate(facts.stages, 1):
        config = stage.run.get("config", {})
        name = config.get("stage")
        parts.append(f"### {_HEADINGS.get(name, name or f'Run {number}')}")
        parts.append(_table(["setting", "value"], _settings(config)))
        logged = [entry for entry in stage.log if "loss" in entry]
        if logged:
            first, last = logged[0], logged[-1]
            losses = [
                [key, f"{first[key]:.4f}", f"{last[key]:.4f}"] for key in last if key in first and _is_figure(key)
            ]
            parts.append(_table(["logged", f"step {first['step']:,}", f"step {last['step']:,}"], losses))
        rows = [
            [str(d.get("source")), f"{d['rows']:,}", f"`{d['sha256']}`" if d.get("sha256") else "-"]
            for d in stage.run.get("data", [])
        ]
        if rows:
            parts.append(_table(["data", "rows", "SHA-256 of the file"], rows))
    return "\n\n".join(parts)


def _settings(config: Mapping[str, Any]) -> list[list[str]]:
    """The settings of a run that its stage reads, as table rows, each value as a config writes it."""
    values = {**config, **config.get("training", {})}
    unread = set() if config.get("use_peft") else {"lora_r", "lora_alpha"}
    unread |= {name for name, key in KEYS.items() if config.get("stage") not in (None, *key.stages)}
    off = (None, False)  # unlike 0, which equals False
    shown = [name for name, key in KEYS.items() if key.on_card and name not in unread]
    written = [name for name in shown if not any(values.get(name) is value for value in off)]
    return [[f"`{name}`", f"`{json.dumps(values[name], ensure_ascii=False)}`"] for name in written]


def _is_figure(key: str) -> bool:
    return key.startswith("loss") or key.endswith("accuracy")


def _scores(facts: Facts) -> str:
    checked = (
        f"Checked when this folder was written: token ids of probe texts, and their unit vectors by stock "
        f"sentence-transformers in float32, equal those of the training code up to {facts.difference:.1g}. Stored in "
        f"{facts.dtype}, a vector's cosine with the one by float32 weights is at least {facts.rounding:.6f}."
    )
    if facts.results is None:
        return f"## Evaluation\n\n{checked}"
    table = _table(["task", "main score x 100"], [[t, f"{s:.2f}"] for t, s in sorted(facts.results.scores.items())])
    versions = ", ".join(facts.results.mteb_versions)
    return f"## Evaluation\n\nmteb {versions}.\n\n{table}\n\n{checked}"


def _revision(revision: str | None) -> str | None:
    return revision if revision and revision != "None" else None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in cells] for cells in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *escaped])


def _code(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"
