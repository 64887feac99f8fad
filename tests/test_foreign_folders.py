"""Folders that somebody wrote to harm whoever opens them: every loader and every command refuses each in one sentence.

No payload runs, no foreign file is opened, nothing is allocated or matched that never ends. An audit hook sees what is
opened, imported, executed, unpickled and started meanwhile. The first test shows that it would.
"""

from __future__ import annotations

import dataclasses
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
from eval_stubs import evaluated, write_retrieval
from helpers import family_tokenizer, tiny_model, write_jsonl
from huggingface_hub import constants

from llm2vec import LLM2Vec
from llm2vec.choice import ModelChoice
from llm2vec.evaluation.models import load_encoder
from llm2vec.export.export import Export, export
from llm2vec.files import write_json
from llm2vec.model import backbone
from llm2vec.model.backbone import attach_lora, load_tokenizer
from llm2vec.model.chain import open_chain
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings
from llm2vec.model.vault import Folder, check_tokenizer, folder_at
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


def swollen(folder: Path) -> None:
    """A tokenizer that writes a text a million times as long."""
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 2
    change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})


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
    "tokenizer": (swollen, "times as long"),
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
    write_json(root / "base" / SETTINGS_FILE, dataclasses.asdict(SAMPLE))
    lora = attach_lora(tiny_model("llama", initializer_range=0.2), r=4, alpha=8, dropout=0.0)
    lora.active_peft_config.base_model_name_or_path = str(root / "base")
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(root / "adapter", lora, tokenizer, SAMPLE)
    (root / "adapter/run.json").unlink()
    shutil.copytree(root / "base", root / "stock")
    (root / "stock" / SETTINGS_FILE).unlink()
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
        return name if "/megatron/" in name and name.endswith((*PICKLES, ".py", ".pyc")) else None
    if event == "import":
        return str(arguments[0]) if str(arguments[0]).split(".")[0] in ("megatron", "evil_code", "payload") else None
    if event == "exec":
        name = getattr(arguments[0], "co_filename", "")
        return name if "/megatron/" in name else None
    if event == "pickle.find_class":
        return ".".join(map(str, arguments)) if "mkdir" in arguments or "Path" in arguments else None
    started = event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
    return str(arguments[0]) if started and "python" not in str(arguments[0]) else None
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


@pytest.mark.parametrize(
    "honest",
    [
        {"num_experts": 60, "shared_expert_intermediate_size": 5632},  # Qwen2-MoE
        {"moe_shared_expert_intermediate_size": 7688, "share_expert_dim": 1280},
        {"text_config": {"num_hidden_layers": 35, "vocab_size_per_layer_input": 262_144}},  # Gemma 3n
        {"num_experts": 16_384},  # Doge
    ],
    ids=lambda honest: "-".join(honest),
)
def test_widths_are_not_taken_for_numbers_of_modules(tmp_path: Path, honest: dict[str, Any]) -> None:
    """Figures of real models. Widths are held against the weights; what counts modules is refused here."""
    write_json(tmp_path / "config.json", honest)
    assert folder_at(str(tmp_path)).config == honest
    for counts in ({"num_local_experts": 10**6}, {"text_config": {"n_layer": 2000}}):
        write_json(tmp_path / "config.json", counts)
        with pytest.raises(UserError, match="which no model has"):
            folder_at(str(tmp_path))


def test_a_normalizer_of_another_form_is_left_to_its_library(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "base", tmp_path / "base")
    change(folder / "tokenizer.json", normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": 5})
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", MODELS)
def test_no_loader_opens_a_hostile_model(root: Path, tmp_path: Path, name: str) -> None:
    folder, word = hostile(root, "model", name), MODELS[name][1]
    refused(lambda: LLM2Vec.from_pretrained(str(folder)), folder, word)
    refused(lambda: load_encoder(evaluated(str(folder), device="cpu")), folder, word)
    refused(lambda: export(Export(ModelChoice(str(folder))), tmp_path / "out"), folder, word)
    if name != "tokenizer":  # which comes behind the pooling, of which this folder says nothing
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


# --- names on the hub ---

COMMIT = "0123456789" * 4


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Path]:
    """Puts a folder into the cache of the hub, where it is found offline; returns what stands for its name."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def put(folder: Path, name: str) -> Path:
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(COMMIT, encoding="utf-8")
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        for missing in {"config.json", "added_tokens.json"} - {file.name for file in folder.iterdir()}:
            (repository / ".no_exist" / COMMIT).mkdir(parents=True, exist_ok=True)
            (repository / ".no_exist" / COMMIT / missing).touch()  # as where it has been asked for
        return Path(name)

    return put


def test_honest_names_open_from_the_snapshot_that_was_looked_at(
    root: Path, cached: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    """The same commit's files for all parts; vectors are the folder's."""
    base, lora, stock = (str(cached(root / name, f"somebody/{name}")) for name in ("base", "adapter", "stock"))
    texts = ["who wrote it"]
    for here, there in (
        ((str(root / "base"), str(root / "adapter")), (base, lora)),
        ((str(root / "adapter"),), (lora,)),
    ):
        expected, found = (LLM2Vec.from_pretrained(*paths).encode(texts) for paths in (here, there))
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    chain = open_chain(base, [lora])
    assert {folder.commit for folder in chain.folders} == {COMMIT} and chain.folders[0].config is not None
    encoder = load_encoder(evaluated(stock, device="cpu"))
    assert encoder.mteb_model_meta.name == "somebody/stock"
    (tmp_path / "models--somebody--stock/snapshots" / COMMIT / "config.json").unlink()
    with pytest.raises(UserError, match="cannot load somebody/stock"):
        load_encoder(evaluated(stock, device="cpu"))


def test_a_tokenizer_is_that_of_the_commit_that_was_looked_at(
    root: Path, cached: Callable[[Path, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the repository moves on in between, to one that nobody has looked at."""
    honest = shutil.copytree(root / "base", tmp_path / "honest")
    name = str(cached(honest, "somebody/moves"))
    repository = tmp_path / "models--somebody--moves"
    later = shutil.copytree(honest, repository / "snapshots" / ("1" * 40))
    family_tokenizer("mistral").save_pretrained(later)

    def then_moves(folder: Folder) -> str | None:
        commit = check_tokenizer(folder)
        (repository / "refs/main").write_text("1" * 40, encoding="utf-8")
        return commit

    expected = load_tokenizer(str(honest)).get_vocab()
    monkeypatch.setattr(backbone, "check_tokenizer", then_moves)
    assert load_tokenizer(name).get_vocab() == expected
    assert load_tokenizer(name).get_vocab() != expected  # moved by the first call


def test_hostile_names_are_refused(root: Path, cached: Callable[[Path, str], Path]) -> None:
    """By the same sentences."""
    for of, name in (("model", "weights"), ("model", "index"), ("model", "kernel"), ("model", "wide")):
        foreign = cached(hostile(root, of, name), f"evil/{name}")
        refused(lambda path=str(foreign): LLM2Vec.from_pretrained(path), foreign, MODELS[name][1])  # type: ignore[misc]
    for name in ("module", "kind", "pattern"):
        foreign = cached(hostile(root, "adapter", name), f"evil/{name}")
        refused(lambda path=str(foreign): LLM2Vec.from_pretrained(path), foreign, ADAPTERS[name][1])  # type: ignore[misc]
    for name in ("keywords", "dense", "class", "folder"):
        foreign = cached(hostile(root, "stock", name), f"evil/stock-{name}")
        refused(lambda path=str(foreign): load_encoder(evaluated(path, device="cpu")), foreign, STOCK[name][1])  # type: ignore[misc]
    assert not (root / "was-here").exists()


# --- every command ---

# Runs in a process of its own: each command in turn, as from a shell, in the folder above the hostile one.
DRIVER = (
    HOOK
    + """
import contextlib, io, json, os, sys

seen = None
sys.addaudithook(lambda e, a: seen.append((e, name)) if seen is not None and (name := foreign(e, a)) else None)
from llm2vec.__main__ import start

sys.path.insert(0, "")
for name, folder, argv in json.load(sys.stdin):
    os.chdir(folder)
    sys.argv, out, seen = ["llm2vec", *argv], io.StringIO(), []
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            start()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    happened, seen = seen, None
    print("RESULT" + json.dumps([name, code, happened, out.getvalue()]), flush=True)
"""
)


def commands(root: Path, of: str, folder: Path, out: Path) -> dict[str, list[str]]:
    """Each command that opens a folder of this kind, as it is called."""
    base = str(root / "base")
    model = {"model": ["--model", str(folder)], "adapter": ["--model", base, "--peft", str(folder)]}
    place = {"model": str(folder), "adapter": f"{base}+{folder}", "stock": f"st:{folder}"}[of]
    score = ["eval", "--task_name", "own", "--local_data_dir", str(root / "sets"), "--output_dir", str(out / "results")]
    if of == "stock":
        score += ["--model", str(folder), "--device", "cpu"]
        ways = {f"verify {kind}": ["verify", f"{kind}:{folder}", f"ours:{base}"] for kind in ("st", "transformers")}
        called = {"eval": score, "eval --dry_run": [*score, "--dry_run"], **ways}
        if folder.parent.name == "weights":  # evaluates in a process of its own: a minute, so for one kind
            (out / "set/recipe").mkdir(parents=True)
            write_json(out / "set/shared.json", {"all": {"model_name_or_path": base}})
            options = {"tasks": ["own"], "local_data_dir": str(root / "sets"), "device": "cpu"}
            write_json(out / "set/evaluation.json", options)
            write_json(out / "set/recipe/evaluation.json", {"base_model_name_or_path": str(folder)})
            called["compare"] = ["compare", str(out / "set"), "--output_dir", str(out / "comparison")]
        return called
    called = {
        "eval": [*score, *model[of], "--device", "cpu"],
        "eval --dry_run": [*score, *model[of], "--device", "cpu", "--dry_run"],
        "verify": ["verify", place],
        "encode": ["encode", str(root / "texts.jsonl"), str(out / "vectors"), *model[of]],
        "search": ["search", "index", str(root / "texts.jsonl"), str(out / "index"), *model[of]],
        "reconstruct": ["reconstruct", place, "who wrote it"],
        "export": ["export", place, str(out / "export")],
    }
    for stage in ("stage-1", "stage-2", "lm", "mntp", "simcse"):
        keys: dict[str, Any] = {
            "output_dir": str(out / stage), "max_seq_length": 64, "max_steps": 1, "report_to": "none", "use_cpu": True,
            "per_device_train_batch_size": 2, "model_name_or_path": str(folder) if of == "model" else base,
        }  # fmt: skip
        if of == "adapter":
            keys["peft_model_name_or_path"] = str(folder)
        texts = stage in ("mntp", "simcse")
        keys["dataset_file_path"] = str(root / ("texts.txt" if texts else "data"))
        keys |= {"dataset_name": "Wiki1M"} if stage == "simcse" else {} if texts else {"sources": ["nq"]}
        write_json(out / f"{stage}.json", keys)
        called[stage] = [stage, str(out / f"{stage}.json")]
    called["plan"] = ["plan", str(out / "stage-1.json"), "--stage", "stage_I"]
    return called


@pytest.mark.slow
@pytest.mark.parametrize("of", KINDS)
def test_no_command_opens_a_hostile_folder(root: Path, tmp_path: Path, of: str) -> None:
    """Every kind and every command that reads folders of it: exit code 2 and one sentence; nothing foreign happens."""
    write_retrieval(root / "sets/own")
    write_jsonl(root / "texts.jsonl", [{"text": "who wrote it"}] * 8)
    (root / "texts.txt").write_text("who wrote it, and when was it written\n" * 64, encoding="utf-8")
    rows = [{"query": f"who wrote {i}", "positive": f"it was {i}", "negative": "nobody"} for i in range(16)]
    write_jsonl(root / "data/nq.jsonl", rows)
    cases = []
    for name in KINDS[of]:
        folder = hostile(root, of, name)
        out = tmp_path / name.replace(" ", "-")
        out.mkdir()
        for command, argv in commands(root, of, folder, out).items():
            cases.append((f"{name}, {command}", str(folder.parent), argv))
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(cases), capture_output=True, text=True, timeout=1800
    )
    results = [json.loads(line[6:]) for line in ended.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == len(cases), ended.stderr[-2000:]
    wrong = [result for result in results if not _is_refusal(of, *result)]
    assert not wrong, "\n".join(f"{name}: {code} {seen} {said[-400:]}" for name, code, seen, said in wrong)
    assert not (root / "was-here").exists() and not list(root.rglob("was-here"))


def _is_refusal(of: str, name: str, code: Any, seen: list[Any], said: str) -> bool:
    kind, _, command = name.rpartition(", ")
    lines = [line for line in said.splitlines() if line.startswith(("error: ", "not compared: "))]
    if command == "plan" and (of, kind) in PLANNED:  # a plan reads no weights
        return not seen and code in (0, 2)
    if command == "verify transformers":  # reads the model and its pooling, which may be honest
        return not seen and code in (1, 2) and "Traceback" not in said
    if command == "compare":  # says which run failed, and goes on with the others
        return not seen and code == 1 and KINDS[of][kind][1] in said
    said_what = bool(lines) and any(word in lines[-1] for word in (KINDS[of][kind][1], "holds no safetensors weights"))
    return not seen and code == 2 and said_what and "Traceback" not in said


#: What is wrong with weights is nothing to a plan, which reads none.
PLANNED = {("adapter", "pickles alone"), ("adapter", "rank")} | {
    ("model", name) for name in ("index", "index elsewhere", "pickles alone", "wide", "many tokens", "cut short")
}
