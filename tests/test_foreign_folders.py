"""Folders that somebody wrote to harm whoever opens them: every loader and every command refuses each in one sentence.

No payload runs, no foreign file is opened, nothing is allocated or matched that never ends. An audit hook sees what is
opened, imported, executed, unpickled and started meanwhile. The first test shows that it would.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_stubs import evaluated
from helpers import family_tokenizer, tiny_model

from llm2vec import LLM2Vec
from llm2vec.choice import ModelChoice
from llm2vec.evaluation.models import load_encoder
from llm2vec.export.export import Export, export
from llm2vec.files import write_json
from llm2vec.model.backbone import attach_lora
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.model.settings import EncoderSettings
from llm2vec.planning.plan import shape_of
from llm2vec.types import UserError
from llm2vec.verify.loaded import open_way
from llm2vec.verify.ways import Choice

MODULES = "sentence_transformers.models"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker, 0o777, True, True)


def change(file: Path, **keys: Any) -> None:
    """Put keys into a JSON object; None takes a key out."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_json(file, {key: value for key, value in (content | keys).items() if value is not None})


def config(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **keys)


def adapter(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "adapter_config.json", **keys)


def keywords(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "sentence_bert_config.json", **keys)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def module(path: str, kind: str) -> Callable[[Path], None]:
    """One more module in a sentence-transformers folder."""

    def add(folder: Path) -> None:
        listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        listed.append({"idx": len(listed), "name": str(len(listed)), "path": path, "type": kind})
        write_json(folder / "modules.json", listed)

    return add


def dense(folder: Path) -> None:
    """A layer whose weights are a pickle that torch would take."""
    module("2_Dense", f"{MODULES}.Dense")(folder)
    (folder / "2_Dense").mkdir()
    sizes = {"in_features": 32, "out_features": 32, "bias": False}
    write_json(folder / "2_Dense/config.json", sizes | {"activation_function": "torch.nn.modules.linear.Identity"})
    torch.save({"linear.weight": torch.eye(32)}, folder / "2_Dense/pytorch_model.bin")


def index(*names: str) -> Callable[[Path], None]:
    """An index in place of the weights."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        weights = {f"layer.{i}": name for i, name in enumerate(names)}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weights})

    return write


def together(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def all_of(folder: Path) -> None:
        for one in changes:
            one(folder)

    return all_of


#: What is done to a model, and a word of the sentence that refuses it.
MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (config(transformers_weights="adapter_model.bin"), "adapter_model.bin"),
    "weights elsewhere": (config(transformers_weights="../st/model.safetensors"), "../st/model.safetensors"),
    "index": (index("evil.bin"), "evil.bin"),
    "index elsewhere": (index("../st/model.safetensors"), "../st/model.safetensors"),
    "pickles alone": (without("model.safetensors"), "safetensors"),
    "kernel": (config(_attn_implementation="evil/kernel"), "evil/kernel"),
    "kernel of a part": (config(text_config={"attn_implementation": "evil/kernel"}), "evil/kernel"),
    "quantised": (config(quantization_config={"quant_method": "eetq"}), "eetq"),
    "class": (config(model_type="evil", auto_map={"AutoConfig": "evil_code.Evil"}), "custom code"),
    "deep": (config(num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "wide": (config(hidden_size=10**6), "weights"),
    "many tokens": (config(vocab_size=10**9), "weights"),
    "cut short": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 9), "model.safetensors"),
}  # fmt: skip
ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "module": (adapter(megatron_config={"a": 1}, megatron_core="megatron.payload"), "megatron_co"),
    "kind": (adapter(peft_type="XLORA", adapters={"0": "x"}), "XLORA"),
    "prompts": (adapter(peft_type="MULTITASK_PROMPT_TUNING", prompt_tuning_init_state_dict_path="evil.bin"), "MULTI"),
    "cache": (adapter(corda_config={"cache_file": "evil.bin"}), "corda_config"),
    "pattern": (adapter(target_modules="(.*.*)*x"), "(.*.*)*x"),
    "pattern of ranks": (adapter(rank_pattern={"(a|a)(a|a)(a|a)(a|a)x": 4}), "(a|a)"),
    "replication": (adapter(layer_replication=[[0, 2]] * 100_000), "layer_replication"),
    "rank": (adapter(r=10**9), "1000000000"),
    "token": (adapter(trainable_token_indices=[10**9]), "1000000000"),
    "pickles alone": (without("adapter_model.safetensors"), "adapter_model.safetensors"),
    "not an object": (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "object"),
}  # fmt: skip
UNSAFE = {"weights_only": False, "dtype": "auto"}
STOCK: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (
        together(config(dtype=None, transformers_weights="adapter_model.bin"), keywords(model_kwargs=UNSAFE)), "weights"
    ),
    "index": (together(config(dtype=None), index("evil.bin"), keywords(model_args=UNSAFE)), "weights_only"),
    "kernel": (keywords(model_kwargs={"attn_implementation": "evil/kernel"}), "evil/kernel"),
    "any kernel": (keywords(model_kwargs={"allow_all_kernels": True}), "allow_all_kernels"),
    "folder": (keywords(model_kwargs={"offload_folder": "was-here"}), "offload_folder"),
    "keywords": (keywords(model_kwargs=[1]), "model_kwargs"),
    "tokenizer": (keywords(tokenizer_name_or_path="evil/tokenizer"), "tokenizer_name_or_path"),
    "dense": (dense, "2_Dense"),
    "class": (module("", "evil_code.Evil"), "evil_code.Evil"),
    "class of the library": (module("", "sentence_transformers.SentenceTransformer"), "SentenceTransformer"),
    "path": (module("../base", f"{MODULES}.Transformer"), "../base"),
    "prompts": (lambda folder: change(folder / "config_sentence_transformers.json", prompts=[1]), "prompts"),
    "adapter": (
        lambda folder: write_json(folder / "adapter_config.json", {"peft_type": "LORA", "megatron_config": {"a": 1}}),
        "megatron_config",
    ),
    "pickles alone": (without("model.safetensors"), "safetensors"),
    "wide": (config(hidden_size=10**6), "weights"),
}  # fmt: skip
KINDS = {"model": MODELS, "adapter": ADAPTERS, "stock": STOCK}
SAMPLE = EncoderSettings("last", 64, template="llama3", attention="causal")


def plant(folder: Path, marker: Path) -> None:
    """Payloads that any of the names would find."""
    for name in ("pytorch_model.bin", "adapter_model.bin", "evil.bin", "training_args.bin"):
        torch.save({"weight": Payload(marker)}, folder / name)
    code = f"from pathlib import Path\nPath({str(marker)!r}).mkdir(exist_ok=True)\nclass Evil: pass\n"
    (folder / "evil_code.py").write_text(code, encoding="utf-8")
    (folder / "payload.py").write_text(code, encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter and a sentence-transformers folder as an honest author writes them, and data to use them."""
    root = tmp_path_factory.mktemp("foreign")
    tokenizer = family_tokenizer("llama")
    tokenizer.pad_token = tokenizer.eos_token
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    lora = attach_lora(tiny_model("llama", initializer_range=0.2), r=4, alpha=8, dropout=0.0)
    lora.active_peft_config.base_model_name_or_path = str(root / "base")
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(root / "adapter", lora, tokenizer, SAMPLE)
    (root / "adapter/run.json").unlink()
    shutil.copytree(root / "base", root / "stock")
    (root / "stock/1_Pooling").mkdir()
    write_json(root / "stock/1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    write_json(root / "stock/sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    write_json(root / "stock/modules.json", [])
    module("", f"{MODULES}.Transformer")(root / "stock")
    module("1_Pooling", f"{MODULES}.Pooling")(root / "stock")
    return root


def hostile(root: Path, of: str, name: str) -> Path:
    """A copy of the honest folder, changed; with payloads."""
    source = root / {"model": "base"}.get(of, of)
    folder = root / of / name.replace(" ", "-") / "megatron"
    if of == "adapter" or of == "stock":
        folder = root / f"evil-{of}" / name.replace(" ", "-") / "megatron"
    if not folder.exists():
        shutil.copytree(source, folder)
        KINDS[of][name][0](folder)
        plant(folder, root / "was-here")
    return folder


#: What happened while a hook watched: (event, name).
_seen: list[tuple[str, str]] | None = None
HOOK = '''
PICKLES = (".bin", ".pt", ".pth", ".pkl")

def foreign(event, arguments):
    """What of an audited event is of a foreign folder, or could only be a payload's."""
    if event == "open":
        name = str(arguments[0])
        return name if "megatron" in name and name.endswith((*PICKLES, ".py", ".pyc")) else None
    if event == "import":
        return str(arguments[0]) if str(arguments[0]).split(".")[0] in ("megatron", "evil_code", "payload") else None
    if event == "exec":
        name = getattr(arguments[0], "co_filename", "")
        return name if "megatron" in name else None
    if event == "pickle.find_class":
        return ".".join(map(str, arguments)) if "mkdir" in arguments or "Path" in arguments else None
    return str(arguments[0]) if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn") else None
'''
_hook: dict[str, Any] = {}
exec(compile(HOOK, __file__, "exec"), _hook)  # the same words that the other process reads


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and (name := _hook["foreign"](event, arguments)) is not None:
        _seen.append((event, name))


sys.addaudithook(_watch)


def refused(action: Callable[[], Any], folder: Path, word: str) -> None:
    """An action ends in a sentence that names the folder and what is wrong, and nothing foreign is touched."""
    global _seen
    _seen = []
    try:
        with pytest.raises(UserError) as error:
            action()
    finally:
        seen, _seen = _seen, None
    sentence = str(error.value)
    assert not seen and "\n" not in sentence and str(folder) in sentence and word in sentence, (seen, sentence)
    assert len(sentence) < 700


def test_the_payloads_would_act(root: Path, tmp_path: Path) -> None:
    """Or none of the tests here would mean anything; and the hook sees them."""
    global _seen
    folder = tmp_path / "megatron"
    folder.mkdir()
    plant(folder, tmp_path / "marker")
    _seen = []
    try:
        torch.load(folder / "evil.bin", weights_only=False)
        pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
        exec(compile((folder / "evil_code.py").read_text(), str(folder / "evil_code.py"), "exec"), {})
        subprocess.run(["true"], check=True)
    finally:
        seen, _seen = _seen, None
    assert {event for event, _ in seen} == {"open", "pickle.find_class", "exec", "subprocess.Popen"}
    assert (tmp_path / "marker").is_dir()


def test_the_honest_folders_open(root: Path) -> None:
    """So that each refusal is of what was changed."""
    base, adapter_folder, stock = (str(root / name) for name in ("base", "adapter", "stock"))
    LLM2Vec.from_pretrained(base, adapter_folder)
    load_encoder(evaluated(stock, device="cpu"))
    for kind in ("st", "transformers"):
        open_way(Choice(kind, ModelChoice(stock)), torch.float32, None)  # type: ignore[arg-type]
    assert shape_of(base).hidden_size == 32


@pytest.mark.parametrize("name", MODELS)
def test_no_loader_opens_a_hostile_model(root: Path, tmp_path: Path, name: str) -> None:
    folder, word = hostile(root, "model", name), MODELS[name][1]
    refused(lambda: LLM2Vec.from_pretrained(str(folder)), folder, word)
    refused(lambda: load_encoder(evaluated(str(folder), device="cpu")), folder, word)
    refused(lambda: export(Export(ModelChoice(str(folder))), tmp_path / "out"), folder, word)
    refused(lambda: open_way(Choice("transformers", ModelChoice(str(folder))), torch.float32, None), folder, word)
    assert not (root / "was-here").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_loader_opens_a_hostile_adapter(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, word, base = hostile(root, "adapter", name), ADAPTERS[name][1], str(root / "base")
    monkeypatch.syspath_prepend(folder.parent)  # as '' is, where Python starts beside it
    refused(lambda: LLM2Vec.from_pretrained(base, str(folder)), folder, word)
    refused(lambda: LLM2Vec.from_pretrained(str(folder)), folder, word)
    stock = Choice("transformers", ModelChoice(str(root / "stock"), (str(folder),)))
    refused(lambda: open_way(stock, torch.float32, None), folder, word)
    assert not (root / "was-here").exists()


@pytest.mark.parametrize("name", STOCK)
def test_no_loader_opens_a_hostile_sentence_transformer(
    root: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, word = hostile(root, "stock", name), STOCK[name][1]
    monkeypatch.chdir(tmp_path)
    refused(lambda: load_encoder(evaluated(str(folder), device="cpu")), folder, word)
    refused(lambda: load_encoder(evaluated(str(folder), torch_dtype="float32", device="cpu")), folder, word)
    refused(lambda: open_way(Choice("st", ModelChoice(str(folder))), torch.float32, None), folder, word)
    assert not (root / "was-here").exists() and not list(tmp_path.iterdir())
