"""An exported folder gives the checkpoint's vectors where this project cannot be imported, and says nothing of here."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import pytest
import sentence_transformers
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from llm2vec import LLM2Vec
from llm2vec.choice import ModelChoice
from llm2vec.evaluation.provenance import RecordedRun, without_local_paths
from llm2vec.export import adapter as adapter_module
from llm2vec.export import export as export_module
from llm2vec.export import proof as proof_module
from llm2vec.export.export import Export, export
from llm2vec.export.model_card import _trained_with
from llm2vec.export.proof import Proof
from llm2vec.files import alone_in
from llm2vec.hub import upload
from llm2vec.model.backbone import attach_lora
from llm2vec.model.chain import mark_of
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.model.stock_form import stock_model
from llm2vec.reports.results import read_results
from llm2vec.text.probe_texts import probe_ids
from llm2vec.types import UserError

SCRIPT = Path(__file__).parents[2] / "experiments" / "export.py"
HUB_BASE = "somebody/base"
INSTRUCTION = "find the answer"
TEXTS = [
    "hello world",
    "who wrote it? Öl 東京 🙂",
    "the red world, the green world and the blue world " * 12,
    "7 days",
    "<|eot_id|> <s> </s> [INST] <|im_end|> <|im_start|>user <|begin_of_text|>",
]

#: What runs where the project cannot be imported: stock sentence-transformers, and the card's own snippet.
CLEAN = """
import json, os, re, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("llm2vec", "experiments", "helpers"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Blocked())
try:
    import llm2vec
    raise SystemExit("llm2vec could be imported")
except ImportError:
    pass

import numpy
from sentence_transformers import SentenceTransformer

cases, texts = json.loads(sys.stdin.read())
vectors = {}
for case in cases:
    os.chdir(case["parent"])
    stock = SentenceTransformer(case["name"], device="cpu")
    for which, prompt in case["prompts"].items():
        vectors[f"{case['key']}/stock/{which}"] = stock.encode(texts, prompt=prompt, batch_size=3)
    vectors[f"{case['key']}/default"] = stock.encode(texts)
    if case["snippet"] is not None:
        names = {}
        exec(case["snippet"], names)
        for which, prompt in case["prompts"].items():
            vectors[f"{case['key']}/snippet/{which}"] = names["embed"](texts, prompt=prompt).numpy()
        vectors[f"{case['key']}/snippet/default"] = names["embed"](texts).numpy()
numpy.savez(sys.argv[1], **vectors)
"""


class Case(NamedTuple):
    """A checkpoint, and whether it is an adapter."""

    family: str
    pooling_mode: str
    attention: str
    lora: bool
    settings: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    "llama_causal_last_full": Case("llama", "last", "causal", False),
    "llama_causal_last_lora": Case("llama", "last", "causal", True),
    "qwen2_causal_last_lora": Case("qwen2", "last", "causal", True),
    "mistral_causal_last_lora": Case("mistral", "last", "causal", True),
    "llama_bidirectional_mean_lora": Case("llama", "mean", "bidirectional", True, {"instruction_join": "\n"}),
    "qwen2_bidirectional_mean_full": Case("qwen2", "mean", "bidirectional", False, {"instruction_join": "\n"}),
    "mistral_bidirectional_mean_lora": Case("mistral", "mean", "bidirectional", True, {"skip_instruction": False}),
}


def save(folder: Path, case: Case, *, name: str = "it", run_config: Mapping[str, Any] = MappingProxyType({})) -> str:
    """A checkpoint of a case, its base beside it, as training writes them; returns its path.

    `run_config` is what the record of the base's run says beside paths.
    """
    tokenizer = family_tokenizer(case.family)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    template = {"llama": "llama3", "qwen2": "qwen2", "mistral": "mistral"}[case.family]
    settings = EncoderSettings(
        case.pooling_mode,  # type: ignore[arg-type]
        64,
        attention=case.attention,  # type: ignore[arg-type]
        template=template,
        **case.settings,
    )
    base = folder / f"{name}-base"
    run = record(folder, **run_config)
    save_checkpoint(base, tiny_model(case.family, True, initializer_range=0.2), tokenizer, settings, run)
    model = LLM2Vec.from_pretrained(str(base))
    if not case.lora:
        return str(base)
    adapted = attach_lora(model.model, r=4, alpha=8, dropout=0.0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    run = record(folder, model_name_or_path=str(base), stage="stage_II")
    run["probe_ids"] = probe_ids(row_tokenizer(model.tokenizer, settings))
    save_checkpoint(folder / name, adapted, model.tokenizer, settings, run)
    write_jsonl(
        folder / name / "log.jsonl", [{"step": 2, "loss": 3.0}, {"step": 10, "loss": 1.25}, {"step": 10, "x": 1}]
    )
    return str(folder / name)


def record(folder: Path, **config: Any) -> dict[str, Any]:
    """What a run records, local paths in many places."""
    config = {"model_name_or_path": "meta/base-model", "dataset_file_path": "cache/echo-data"} | config
    return {
        "config": {
            **config,
            "sources_file": str(folder / "sources.json"),
            "training": {"output_dir": "output/it", "learning_rate": 0.002},
        },
        "parent": {"model_name_or_path": config["model_name_or_path"], "marks": {str(folder / "it"): "abc"}},
        "data": [{"source": "nq", "rows": 1234, "file": f"{folder}/nq.jsonl", "sha256": "f00d"}],
        "git_commit": "abc",
    }


def apart(left: Any, right: Any) -> float:
    return float((torch.as_tensor(left) - torch.as_tensor(right)).abs().max())


def unit_vectors(model: LLM2Vec, instruction: str = "") -> Tensor:
    vectors = model.encode([[instruction, text] for text in TEXTS], show_progress_bar=False, device="cpu")
    return torch.nn.functional.normalize(torch.as_tensor(vectors), dim=-1)


class Exported(NamedTuple):
    """All cases' folders, the vectors that this project gives, and those of the clean process."""

    folders: dict[str, Path]
    proofs: dict[str, Proof]
    ours: dict[str, dict[str, Tensor]]
    theirs: Any


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """Every case exported in float32, the Llama adapters also by themselves, and embedded by one clean process."""
    root = tmp_path_factory.mktemp("exported")
    folders, proofs, ours, cases = {}, {}, {}, []
    for key, case in CASES.items():
        checkpoint = save(root / key, case)
        folders[key] = root / key / "out"
        by_itself = key == "llama_causal_last_lora"
        what = asked(checkpoint, dtype="float32", adapter=by_itself, base_id=HUB_BASE if by_itself else None)
        proofs[key] = export(what, folders[key])
        model = LLM2Vec.from_pretrained(checkpoint)
        form = stock_model(model.model, model.row_tokenizer, model.settings, {}).form
        prompts = {"bare": form.prompt("", "document"), "instructed": form.prompt(INSTRUCTION)}
        ours[key] = {"bare": unit_vectors(model), "instructed": unit_vectors(model, INSTRUCTION)}
        card = (folders[key] / "README.md").read_text(encoding="utf-8")
        snippet = snippet_of(card, "transformers")
        cases.append({"key": key, "parent": str(root / key), "name": "out", "prompts": prompts, "snippet": snippet})
        if by_itself:
            put_into_cache(root / "hub", HUB_BASE, root / key / "it-base")
            alone = {"key": "adapter", "parent": str(folders[key]), "name": "adapter", "snippet": None}
            cases.append(alone | {"prompts": prompts})
            ours["adapter"] = ours[key]
    environment = {"PATH": "", "HF_HUB_CACHE": str(root / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    vectors = root / "vectors.npz"
    result = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", CLEAN, str(vectors)],
        input=json.dumps([cases, TEXTS]),
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    yield Exported(folders, proofs, ours, np.load(vectors))


def put_into_cache(hub: Path, name: str, folder: Path) -> None:
    """A repository as the hub's client keeps it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folder)


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    return save(tmp_path, CASES["llama_causal_last_lora"])


# --- clients ---


def snippet_of(card: str, heading: str) -> str:
    return card.partition(f"### {heading}\n\n```python\n")[2].partition("```")[0]


class LangChainLike:
    """`langchain_huggingface.HuggingFaceEmbeddings`, as far as it shapes what it hands on."""

    def __init__(self, model_name: str, encode_kwargs: Any, query_encode_kwargs: Any) -> None:
        self.model = sentence_transformers.SentenceTransformer(model_name)
        self.documents, self.queries = encode_kwargs, query_encode_kwargs

    def embed_documents(self, texts: list[str]) -> Any:
        return self.model.encode([text.replace("\n", " ") for text in texts], **self.documents).tolist()

    def embed_query(self, text: str) -> Any:
        return self.model.encode([text.replace("\n", " ")], **self.queries)[0].tolist()


class LlamaIndexLike:
    """`llama_index.embeddings.huggingface.HuggingFaceEmbedding` alike: prompts named `query` and `text`, both empty."""

    def __init__(self, model_name: str) -> None:
        self._model = sentence_transformers.SentenceTransformer(model_name, prompts={"query": "", "text": ""})

    def get_text_embedding_batch(self, texts: list[str]) -> Any:
        return self._model.encode(texts, prompt_name="text", normalize_embeddings=True).tolist()

    def get_query_embedding(self, text: str) -> Any:
        return self._model.encode([text], prompt_name="query", normalize_embeddings=True)[0].tolist()


@pytest.mark.parametrize("key", ["llama_causal_last_lora", "llama_bidirectional_mean_lora"])
@pytest.mark.parametrize("client", ["LangChain", "LlamaIndex"])
def test_the_card_s_snippets_for_clients_give_the_vectors(
    client: str, key: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The instruction stands before the query alone, whatever the client does to its own arguments."""
    module = {"LangChain": "langchain_huggingface", "LlamaIndex": "llama_index.embeddings.huggingface"}[client]
    if importlib.util.find_spec(module.partition(".")[0]) is None:  # else the library itself
        for name in (module, *(module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1))):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        likeness = {"HuggingFaceEmbeddings": LangChainLike, "HuggingFaceEmbedding": LlamaIndexLike}
        vars(sys.modules[module]).update(likeness)
    folder = exported.folders[key]
    monkeypatch.chdir(folder.parent)  # the card names the folder by its last part
    found: dict[str, Any] = {}
    exec(snippet_of((folder / "README.md").read_text(encoding="utf-8"), client), found)
    model = LLM2Vec.from_pretrained(folder)
    quiet: Any = {"show_progress_bar": False, "device": "cpu"}
    query = model.encode([["Given a question, retrieve passages that answer it", "who wrote Emma?"]], **quiet)
    documents = ["Emma is a novel by Jane Austen.", "The emu is a large bird of Australia."]
    assert apart(found["query"], query[0]) < 1e-5
    assert apart(found["documents"], model.encode(documents, **quiet)) < 1e-5


# --- the vectors ---


@pytest.mark.parametrize("key", CASES)
def test_stock_sentence_transformers_gives_the_vectors(key: str, exported: Exported) -> None:
    """In a process without this project: with an instruction, without one, and by the default prompt."""
    for which in ("bare", "instructed"):
        assert apart(exported.theirs[f"{key}/stock/{which}"], exported.ours[key][which]) < 1e-5
    assert apart(exported.theirs[f"{key}/default"], exported.ours[key]["bare"]) < 1e-5
    assert apart(exported.ours[key]["bare"], exported.ours[key]["instructed"]) > 1e-3


@pytest.mark.parametrize("key", CASES)
def test_the_snippet_of_the_card_gives_the_vectors(key: str, exported: Exported) -> None:
    """By transformers alone, the code as printed."""
    for which in ("bare", "instructed"):
        assert apart(exported.theirs[f"{key}/snippet/{which}"], exported.ours[key][which]) < 1e-5
    assert apart(exported.theirs[f"{key}/snippet/default"], exported.ours[key]["bare"]) < 1e-5


def test_the_adapter_on_the_hubs_base_gives_the_vectors(exported: Exported) -> None:
    for which in ("bare", "instructed"):
        assert apart(exported.theirs[f"adapter/stock/{which}"], exported.ours["adapter"][which]) < 1e-5
    folder = exported.folders["llama_causal_last_lora"] / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["task_type"], config["base_model_name_or_path"]) == ("FEATURE_EXTRACTION", HUB_BASE)
    assert not (folder.parent / "base").exists() and not (folder / "README.md").exists()


@pytest.mark.parametrize("key", CASES)
def test_this_project_loads_the_folder_too(key: str, exported: Exported) -> None:
    model = LLM2Vec.from_pretrained(str(exported.folders[key]))
    assert model.settings.normalize
    vectors = model.encode([[INSTRUCTION, text] for text in TEXTS], show_progress_bar=False, device="cpu")
    assert apart(vectors, exported.ours[key]["instructed"]) < 1e-5
    assert exported.proofs[key].difference < 1e-5
    assert exported.proofs[key].rounding > 0.999999


# --- the files ---


@pytest.mark.parametrize("key", CASES)
def test_no_file_names_a_path_of_this_machine(key: str, exported: Exported) -> None:
    folder = exported.folders[key]
    root = str(folder.parent.parent).encode()
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert root not in content and b"cache/echo-data" not in content and b"output/it" not in content, file


def test_the_model_has_no_head_and_says_how_it_attends(exported: Exported) -> None:
    for key, case in CASES.items():
        folder = exported.folders[key]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == [
            {"llama": "LlamaModel", "qwen2": "Qwen2Model", "mistral": "MistralModel"}[case.family]
        ]
        attention = (config.get("is_causal"), config.get("use_bidirectional_attention"))
        assert attention == ((False, True) if case.attention == "bidirectional" else (None, None))
        stock = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        assert ("requirements" in stock) == (case.attention == "bidirectional")
        assert not any("lm_head" in name or "lora" in name for name in load_file(folder / "model.safetensors"))


def test_pooling_in_both_dialects(exported: Exported) -> None:
    """The first switch that is on is the pooling: old readers take it, whatever `include_prompt` says."""
    for key, case in CASES.items():
        pooling = json.loads((exported.folders[key] / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
        word, switch = {"last": ("lasttoken", "lasttoken"), "mean": ("mean", "mean_tokens")}[case.pooling_mode]
        assert pooling["pooling_mode"] == word
        assert next(name for name, value in pooling.items() if value is True) == f"pooling_mode_{switch}"
        modules = json.loads((exported.folders[key] / "modules.json").read_text(encoding="utf-8"))
        assert [module["type"].rpartition(".")[0] for module in modules] == ["sentence_transformers.models"] * 3


def test_records_say_where_the_model_is_from(exported: Exported) -> None:
    folder = exported.folders["llama_causal_last_lora"]
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    base, lora = run["stages"]
    assert (
        lora["config"]["model_name_or_path"] == "it-base" and base["config"]["model_name_or_path"] == "meta/base-model"
    )
    assert lora["data"] == [{"source": "nq", "rows": 1234, "file": "nq.jsonl", "sha256": "f00d"}]
    assert lora["parent"]["marks"] == {"it": "abc"}
    assert lora["versions"]["torch"] == torch.__version__
    for probe in json.loads((folder / "probe_ids.json").read_text(encoding="utf-8")):
        assert probe["input_ids"] and isinstance(probe["prompt"], str)
    (folder / "1_Pooling" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"1_Pooling/config\.json is 2 bytes long"):
        LLM2Vec.from_pretrained(str(folder))


def test_weights_are_rounded_once(adapter: str, tmp_path: Path) -> None:
    """bfloat16 of the float32 merge, not a merge in bfloat16; and the loss is measured."""
    proof = export(asked(adapter), tmp_path / "out")
    assert 0.99 < proof.rounding < 1 and proof.difference < 1e-5
    merged = LLM2Vec.from_pretrained(adapter, merge_peft=True).model.state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == merged.keys()
    for name, weight in stored.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, merged[name].to(torch.bfloat16), rtol=0, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_checkpoint_of_a_run_takes_the_runs_log_up_to_its_step(adapter: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Path(adapter).rename(run)
    (run / "checkpoint-5").mkdir()
    for file in run.iterdir():
        if file.is_file() and file.name != "log.jsonl":
            file.rename(run / "checkpoint-5" / file.name)
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 12, "lo')  # as a run leaves it that was killed
    export(asked(str(run / "checkpoint-5"), dtype="float32"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| logged | step 2 | step 2 |" in card


# --- the card ---


def test_the_card_has_front_matter_and_scores(adapter: str, tmp_path: Path) -> None:
    """As the hub's own reader finds them."""
    results = tmp_path / "results" / "m" / "r"
    results.mkdir(parents=True)
    scores = {"test": [{"hf_subset": "default", "main_score": 0.31234}]}
    result = {"task_name": "NFCorpus", "scores": scores, "mteb_version": "2.26.24", "dataset_revision": "abc"}
    (results / "NFCorpus.json").write_text(json.dumps(result), encoding="utf-8")
    instructions = {"NFCorpus": INSTRUCTION}
    what = asked(
        adapter,
        license="mit",
        results=read_results(results),
        instructions=instructions,
        repository="me/mine",
    )
    export(what, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    (score,) = card.data.eval_results or ()
    assert (score.task_name, score.metric_value, score.dataset_revision) == ("MTEB NFCorpus", 31.234, "abc")
    assert (card.data.license, card.data.base_model) == ("mit", "meta/base-model")
    assert card.data.pipeline_tag == "sentence-similarity"
    assert 'SentenceTransformer("me/mine")' in card.text and "vllm serve me/mine --runner pooling" in card.text
    assert "| NFCorpus | 31.23 |" in card.text and "| nq | 1,234 | `f00d` |" in card.text
    assert "| loss | 3.0000 | 1.2500 |" in card.text
    stock = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    assert stock["prompts"]["NFCorpus"] == f"{INSTRUCTION} "


def test_the_card_says_which_servers_cannot(exported: Exported) -> None:
    skips = (exported.folders["llama_bidirectional_mean_lora"] / "README.md").read_text(encoding="utf-8")
    assert "vllm serve" not in skips and "text-embeddings-router" not in skips
    assert skips.count("Not possible: ") == 2 and "sentence-transformers 5.4 or newer is needed" in skips
    whole = (exported.folders["mistral_bidirectional_mean_lora"] / "README.md").read_text(encoding="utf-8")
    assert '"pooling_type": "MEAN"' in whole and "--pooling mean" in whole and "is_causal: false" in whole
    last = (exported.folders["qwen2_causal_last_lora"] / "README.md").read_text(encoding="utf-8")
    assert '"pooling_type": "LAST"' in last and "--pooling last-token" in last and "is_causal" not in last


def test_settings_on_the_card_are_as_a_config_writes_them(tmp_path: Path) -> None:
    """A line break would end the table, and 0 is a value."""
    config = {"stage": "stage_I", "instruction_join": "\n", "alpha": 0.0, "template": "a|b", "bidirectional": False}
    checkpoint = save(tmp_path, CASES["llama_causal_last_full"], run_config=config)
    export(asked(checkpoint), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    rows = card.partition("### Stage I\n\n")[2].partition("\n\n")[0].splitlines()
    assert rows[2:5] == ["| `alpha` | `0.0` |", r'| `template` | `"a\|b"` |', r'| `instruction_join` | `"\n"` |']
    assert "bidirectional" not in "".join(rows)


@pytest.mark.parametrize(("stage", "heading"), [("lm", "### Language modelling\n"), (None, "### Run 1\n")])
def test_a_stage_is_a_heading_of_the_card(stage: str | None, heading: str, tmp_path: Path) -> None:
    export(
        asked(save(tmp_path, CASES["llama_causal_last_full"], run_config={"stage": stage})),
        tmp_path / "out",
    )
    assert heading in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


# --- where a model is from ---


def stages_of(checkpoint: str, out: Path) -> list[dict[str, Any]]:
    """The runs that an export records."""
    export(asked(checkpoint, dtype="float32"), out)
    stages: list[dict[str, Any]] = json.loads((out / "run.json").read_text(encoding="utf-8"))["stages"]
    return stages


def write_parent(checkpoint: Path, parent: str, mark: str) -> None:
    """Have a checkpoint say what it was trained from."""
    file = checkpoint / "run.json"
    run = json.loads(file.read_text(encoding="utf-8"))
    run["config"]["model_name_or_path"] = parent
    run["parent"] = {"model_name_or_path": parent, "marks": {parent: mark}}
    file.write_text(json.dumps(run), encoding="utf-8")


def test_an_export_hands_its_stages_on(tmp_path: Path) -> None:
    """Exported again, trained on, or saved again; a folder that no run wrote tells of none."""
    first = stages_of(save(tmp_path, CASES["llama_causal_last_lora"]), tmp_path / "first")
    assert len(first) == 2
    assert stages_of(str(tmp_path / "first"), tmp_path / "again") == first
    child = Path(save(tmp_path, CASES["llama_causal_last_full"], name="child"))
    write_parent(child, str(tmp_path / "first"), mark_of(str(tmp_path / "first")))
    *before, last = stages_of(str(child), tmp_path / "child-exported")
    assert before == first
    model = LLM2Vec.from_pretrained(str(child))
    model.save(tmp_path / "saved")
    assert stages_of(str(tmp_path / "saved"), tmp_path / "saved-exported") == [*first, last]
    model.runs = ()
    model.save(tmp_path / "bare")
    assert stages_of(str(tmp_path / "bare"), tmp_path / "bare-exported") == []
    assert "## Training" not in (tmp_path / "bare-exported" / "README.md").read_text(encoding="utf-8")


def test_a_parent_that_has_changed_is_no_parent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another run wrote there since; what it did is not how this model came to be."""
    case = CASES["llama_causal_last_full"]
    child, parent = (Path(save(tmp_path, case, name=name)) for name in ("child", "parent"))
    write_parent(child, str(parent), mark_of(str(parent)))
    assert len(stages_of(str(child), tmp_path / "same")) == 2
    assert "has changed since" not in caplog.text
    write_parent(child, str(parent), "0123456789abcdef")
    (stage,) = stages_of(str(child), tmp_path / "changed")
    assert stage["config"]["model_name_or_path"] == "parent-base"
    assert f"{parent} has changed since {child} was trained from it" in caplog.text


def test_a_model_trained_onto_itself_is_followed_once(tmp_path: Path) -> None:
    checkpoint = Path(save(tmp_path, CASES["llama_causal_last_full"]))
    write_parent(checkpoint, str(checkpoint), mark_of(str(checkpoint)))
    assert len(stages_of(str(checkpoint), tmp_path / "out")) == 1


def test_a_local_base_that_is_gone_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`output/base` has the form of one; the mark of a folder tells."""
    monkeypatch.chdir(tmp_path)
    checkpoint = Path(save(tmp_path, CASES["llama_causal_last_full"]))
    write_parent(checkpoint, "output/base", "0123456789abcdef")
    (stage,) = stages_of(str(checkpoint), tmp_path / "out")
    assert stage["parent"] == {"model_name_or_path": "base", "marks": {"base": "0123456789abcdef"}}
    assert stage["config"]["model_name_or_path"] == "base"
    assert "output/base" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    write_parent(checkpoint, "meta/base", "0123456789abcdef0123456789abcdef01234567")
    (stage,) = stages_of(str(checkpoint), tmp_path / "of_the_hub")
    assert stage["parent"]["model_name_or_path"] == "meta/base"
    assert "\nbase_model: meta/base\n" in (tmp_path / "of_the_hub" / "README.md").read_text(encoding="utf-8")


# --- refusals ---


def asked(checkpoint: str, **options: Any) -> Export:
    """What is to be exported, of a checkpoint's folder."""
    return Export(ModelChoice(checkpoint), **options)


def assert_refused(what: Export, out: Path, reason: str) -> None:
    """Asserts that an export is refused for this reason, and that nothing of it is left."""
    with pytest.raises(UserError, match=reason):
        export(what, out)
    left = [path.name for path in out.parent.iterdir() if path.name == out.name or path.name.startswith(f".{out.name}")]
    assert left in ([], [out.name])
    assert not out.is_dir() or [path.name for path in out.iterdir()] in ([], ["mine"])


def test_refuses_a_folder_with_something_in_it(adapter: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    assert_refused(asked(adapter), out, "is there already")
    (out / "mine").unlink()
    export(asked(adapter), out)
    assert (out / "model.safetensors").is_file(), "an empty one is taken"


def test_refuses_early_what_cannot_be_written(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything loads."""
    monkeypatch.setattr(export_module.LLM2Vec, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out could not be written \(Not a directory"):
        export(asked(adapter), tmp_path / "file" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert_refused(asked(adapter), tmp_path / "link", "link is there already")
    assert_refused(asked(adapter, repository="a b"), tmp_path / "out", "--push_to_hub: Repo id must use")


def test_a_card_asks_with_the_last_stages_instruction() -> None:
    runs = [
        RecordedRun({"data": [{"instructions": [[text, False]]} for text in of]}, []) for of in (["a"], ["", "b", "c"])
    ]
    assert _trained_with(runs) == "b" and _trained_with(runs[:1]) == "a" and _trained_with([]) == ""


def test_a_query_instruction_is_the_default_for_queries(adapter: str, tmp_path: Path) -> None:
    """As LangChain and `encode_query` ask for it; documents go without."""
    export(asked(adapter, dtype="float32", instructions={"query": "find it", "NQ": "answer it"}), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "find it" in card and "retrieve passages that answer" not in card, (
        "its snippets ask as the model was told to"
    )
    stock = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    ours = LLM2Vec.from_pretrained(adapter, torch_dtype=torch.float32)
    for instruction, vectors in (
        ("find it", stock.encode_query(["who wrote it"])),
        ("find it", stock.encode(["who wrote it"], prompt_name="query")),
        ("answer it", stock.encode(["who wrote it"], prompt_name="NQ")),
        ("", stock.encode_document(["who wrote it"])),
    ):
        exact = torch.as_tensor(ours.encode([[instruction, "who wrote it"]] if instruction else ["who wrote it"]))
        assert torch.cosine_similarity(torch.as_tensor(vectors), exact).item() == pytest.approx(1, abs=1e-5)


def test_refuses_instructions_that_would_replace_a_prompt(adapter: str, tmp_path: Path) -> None:
    for names in (("document",), ("NQ", "NQ-document"), ("NQ-document", "NQ")):
        what = asked(adapter, instructions=dict.fromkeys(names, "find it"))
        assert_refused(what, tmp_path / "out", f"instructions: '{names[-1]}' makes a second prompt of the name")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("stock_vectors", "differs from the checkpoint's by"),
        ("probe_ids", "renders this project's own template to other tokens"),
    ],
)
def test_leaves_nothing_where_the_proof_fails(
    broken: str, reason: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = getattr(proof_module, broken)
    calls: list[int] = []

    def wrong(*arguments: Any) -> Any:
        calls.append(1)
        value = real(*arguments)
        return value + 2e-5 if broken == "stock_vectors" else [*value, len(calls)]

    monkeypatch.setattr(proof_module, broken, wrong)
    assert_refused(asked(adapter), tmp_path / "out", reason)


def test_a_second_export_to_a_folder_is_refused_while_the_first_is_at_work(adapter: str, tmp_path: Path) -> None:
    """And what a killed one has left is no hindrance."""
    aside = tmp_path / ".out.writing"
    (aside / "out/adapter").mkdir(parents=True)
    with alone_in(aside, "export"), pytest.raises(UserError, match="another export is at work here"):
        export(asked(adapter), tmp_path / "out")
    export(asked(adapter), tmp_path / "out")
    assert (tmp_path / "out/modules.json").is_file() and not (tmp_path / "out/.lock").exists()
    assert not aside.exists()


def test_leaves_nothing_where_the_written_tokenizer_is_wrong(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is judged as it stands on the disk, not as it was meant."""
    real = export_module.write_form

    def forgetful(folder: Path, *arguments: Any) -> None:
        real(folder, *arguments)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["post_processor"] = None
        file.write_text(json.dumps(content), encoding="utf-8")

    monkeypatch.setattr(export_module, "write_form", forgetful)
    assert_refused(asked(adapter), tmp_path / "out", "renders otherwise: .* becomes")


def test_refuses_what_is_not_there(adapter: str, tmp_path: Path) -> None:
    for missing in ("nowhere", "nowhere/at-all", str(tmp_path / "nowhere")):
        assert_refused(asked(missing), tmp_path / "out", "nowhere")
        assert_refused(Export(ModelChoice(missing, (adapter,))), tmp_path / "out", "nowhere")


def test_refuses_what_has_no_stock_form(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, Case("mistral", "mean", "bidirectional", False))
    assert_refused(asked(checkpoint), tmp_path / "out", "allows for one special token there")
    limited = save(tmp_path, Case("llama", "last", "causal", False, {"doc_max_length": 20}), name="limited")
    assert_refused(asked(limited), tmp_path / "out", "knows one limit")
    export(asked(limited, doc_max_length=64), tmp_path / "out")


def test_refuses_adapters_that_nobody_could_load(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert_refused(
        asked(adapter, adapter=True),
        out,
        "is a local folder; export it, push it and name it by --base_id",
    )
    assert_refused(
        asked(adapter, adapter=True, base_id=str(tmp_path)),
        out,
        "the name of a repository on the hub is needed",
    )
    assert_refused(
        asked(adapter, adapter=True, base_id="no slash"),
        out,
        "the name of a repository on the hub is needed",
    )
    full = str(Path(adapter).with_name("it-base"))
    assert_refused(asked(full, adapter=True, base_id=HUB_BASE), out, "the checkpoint is a full model")
    bidirectional = save(tmp_path, CASES["llama_bidirectional_mean_lora"], name="both-ways")
    what = asked(bidirectional, dtype="float32", adapter=True, base_id=HUB_BASE)
    assert_refused(what, out, "the config of somebody/base could not be read")
    config = tiny_model("llama").config
    monkeypatch.setattr(adapter_module, "config_of", lambda *_: config)
    assert_refused(what, out, "does not say is_causal: false")
    config.is_causal = False
    export(what, out)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_two_adapters_are_merged_but_not_written_apart(adapter: str, tmp_path: Path) -> None:
    inner = LLM2Vec.from_pretrained(adapter)
    outer = attach_lora(inner.model.merge_and_unload(), r=2, alpha=4, dropout=0.0)  # type: ignore[operator]
    for name, parameter in outer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    settings = EncoderSettings("last", 64, attention="causal", template="llama3", parent_adapters=(adapter,))
    save_checkpoint(tmp_path / "outer", outer, inner.tokenizer, settings, record(tmp_path))
    base = str(Path(adapter).with_name("it-base"))
    file = tmp_path / "outer" / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    size = file.stat().st_size
    config["base_model_name_or_path"] = ""
    file.write_text(json.dumps(config).ljust(size), encoding="utf-8")
    chain = [adapter, str(tmp_path / "outer")]
    expected = unit_vectors(LLM2Vec.from_pretrained(base, chain))
    config["base_model_name_or_path"] = base
    file.write_text(json.dumps(config, indent=0), encoding="utf-8")
    (tmp_path / "outer" / "run.json").unlink()
    assert_refused(
        asked(str(tmp_path / "outer"), adapter=True, base_id=HUB_BASE),
        tmp_path / "out",
        "1 other adapter.s. merged",
    )
    export(asked(str(tmp_path / "outer"), dtype="float32"), tmp_path / "out")
    assert apart(unit_vectors(LLM2Vec.from_pretrained(str(tmp_path / "out"))), expected) < 1e-5


def test_an_adapter_whose_base_has_moved_takes_it_by_base(adapter: str, tmp_path: Path) -> None:
    base = Path(adapter).with_name("it-base")
    expected = unit_vectors(LLM2Vec.from_pretrained(adapter))
    base.rename(tmp_path / "moved")
    assert_refused(asked(adapter), tmp_path / "out", "it-base")
    export(Export(ModelChoice(str(tmp_path / "moved"), (adapter,)), dtype="float32"), tmp_path / "out")
    assert apart(unit_vectors(LLM2Vec.from_pretrained(str(tmp_path / "out"))), expected) < 1e-5


# --- paths, hub, command line ---


def test_local_paths_are_cut_and_hub_names_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "stage_I").mkdir(parents=True)
    value = {
        "model_name_or_path": "output/stage_I",
        "parent": ["meta-llama/Llama-3.2-1B", "/data/models/mine", "~/models/x", "./y/z"],
        "output_dir": "somewhere/else",
        "file": "cache/nq.jsonl",
        "rows": 3,
        "long": "x" * 5000,
        "marks": {"output/stage_I": "abc"},
        "training": {"hub_token": "hf_secret", "push_to_hub_token": "hf_secret", "seed": 1},
    }
    assert without_local_paths(value) == {
        "model_name_or_path": "stage_I",
        "parent": ["meta-llama/Llama-3.2-1B", "mine", "x", "z"],
        "output_dir": "else",
        "file": "nq.jsonl",
        "rows": 3,
        "long": "x" * 5000,
        "marks": {"stage_I": "abc"},
        "training": {"seed": 1},
    }


def test_push_makes_the_repository_and_uploads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repository: str, *, exist_ok: bool, private: bool) -> str:
            calls.append(("create", (repository, exist_ok, private)))
            return f"https://hub/{repository}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append(("upload", (repo_id, folder_path)))
            if repo_id == "me/refused":
                raise OSError("not logged in\nand more")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert upload(tmp_path, "me/mine") == "https://hub/me/mine"
    assert calls == [("create", ("me/mine", True, False)), ("upload", ("me/mine", tmp_path))]
    upload(tmp_path, "me/secret", private=True)
    assert calls[2] == ("create", ("me/secret", True, True))
    with pytest.raises(UserError, match=r"^the model could not be uploaded to me/refused: not logged in$"):
        upload(tmp_path, "me/refused")


def test_the_script(
    adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder, three figures; a mistake is one sentence and exit code 2."""
    words = [str(SCRIPT), adapter, str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*words, "--dtype", "float16"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"up to \d\.\de-\d\d \(float32\)\nstored in float16: lowest cosine .* 0\.9999\d+", printed)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {tmp_path / 'out'} is there already")
    assert isinstance(LLM2Vec.from_pretrained(adapter).model, PeftModel)  # the checkpoint is as it was
