"""Nothing that comes with a model or a data set is run: no pickle is opened, no Python file of a checkpoint imported.

Every planted file would make a marker if it were unpickled or imported; the first test shows that it would.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import pickle
import runpy
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from eval_stubs import evaluated
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file

from llm2vec import LLM2Vec
from llm2vec.choice import ModelChoice
from llm2vec.data.blocks import texts_of_hub
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Source, read_sources_file
from llm2vec.evaluation.models import kind_of, load_encoder
from llm2vec.export.export import Export, export
from llm2vec.files import write_json
from llm2vec.model.backbone import attach_lora, load_tokenizer
from llm2vec.model.chain import RUN_FILE
from llm2vec.model.checkpoint import SUMS_FILE, check_sums, save_checkpoint
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings
from llm2vec.types import UserError

ROOT = Path(__file__).parents[2]
SOURCES = [file for folder in ("llm2vec", "experiments") for file in sorted((ROOT / folder).rglob("*.py"))]

PICKLES = (
    "pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin",
    "rng_state.pth", "tokenizer.pkl", "vocab.pkl", "model.pt",
)  # fmt: skip
MODULES = ("modeling_evil", "configuration_evil", "tokenization_evil", "custom_st")
AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModel": "modeling_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker, 0o777, True, True)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What code from outside would make; it must not be there in the end."""
    yield tmp_path / "was-here"
    assert not (tmp_path / "was-here").exists()


#: Planted files that Python opened since the list was last emptied.
OPENED: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and Path(str(arguments[0])).name in (*PICKLES, *(f"{name}.py" for name in MODULES)):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks whether to run code where it is not told; whoever asks here fails."""

    def asked(prompt: str = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr(builtins, "input", asked)


def plant(folder: Path, marker: Path, pickles: tuple[str, ...] = PICKLES) -> None:
    """Pickles and Python files, and the entries of the configurations that name them."""
    for name in pickles:
        torch.save({"weight": Evil(marker)}, folder / name)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Evil(marker)))
    for name in MODULES:
        code = f"from pathlib import Path\nPath({str(marker)!r}).mkdir(exist_ok=True)\nclass Evil: pass\n"
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            change(folder / name, auto_map=AUTO_MAP)
    OPENED.clear()


def change(file: Path, **keys: Any) -> None:
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | keys)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model as somebody else writes it."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """An adapter on it, as somebody else writes it."""
    model = LLM2Vec.from_pretrained(str(base))
    adapted = attach_lora(model.model, r=4, alpha=8, dropout=0.0)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    save_checkpoint(tmp_path / "adapter", adapted, model.tokenizer, EncoderSettings(max_length=64, template="llama3"))
    (tmp_path / "adapter" / RUN_FILE).unlink()
    return tmp_path / "adapter"


def vectors(*arguments: Any) -> torch.Tensor:
    found = LLM2Vec.from_pretrained(*map(str, arguments)).encode(["who wrote it"], show_progress_bar=False)
    assert isinstance(found, torch.Tensor)
    return found


def test_the_planted_files_would_act(tmp_path: Path, base: Path) -> None:
    """Or none of the tests here would mean anything."""
    for i, name in enumerate(PICKLES):
        plant(base, tmp_path / f"pickle-{i}")
        load: Any = pickle.loads if name == "tokenizer.pkl" else torch.load
        load((base / name).read_bytes()) if load is pickle.loads else load(base / name, weights_only=False)
        assert (tmp_path / f"pickle-{i}").is_dir(), name
    for name in MODULES:
        plant(base, tmp_path / name)
        runpy.run_path(str(base / f"{name}.py"))
        assert (tmp_path / name).is_dir(), name


# --- our model ---


def test_what_lies_beside_the_weights_is_left_alone(base: Path, adapter: Path, marker: Path) -> None:
    """Pickles and code beside base and adapter: neither opened nor run, and the vectors are what they were."""
    expected = vectors(base, adapter)
    plant(base, marker)
    plant(adapter, marker)
    assert torch.equal(vectors(base, adapter), expected)
    assert torch.equal(vectors(adapter), expected)
    assert not OPENED


def test_a_base_of_pickles_is_refused(base: Path, marker: Path) -> None:
    (base / "model.safetensors").unlink()
    plant(base, marker)
    with pytest.raises(UserError, match=r"model_name_or_path: .*safetensors"):
        LLM2Vec.from_pretrained(str(base))
    assert not OPENED


def test_an_adapter_of_pickles_is_refused(base: Path, adapter: Path, marker: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    plant(adapter, marker)
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        LLM2Vec.from_pretrained(str(base), str(adapter))
    assert not OPENED


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_class_of_its_own_is_refused_unasked(base: Path, marker: Path, file: str) -> None:
    """A model type, or a tokenizer, that only the folder's own code knows: one sentence, nobody is asked."""
    plant(base, marker)
    if file == "config.json":
        change(base / file, model_type="evil", architectures=["Evil"])
        change(base / "tokenizer_config.json", auto_map={})
    else:
        (base / "tokenizer.json").unlink()
        change(base / file, tokenizer_class="Evil")
    with pytest.raises(UserError) as error:
        LLM2Vec.from_pretrained(str(base))
    assert str(base) in str(error.value) and "\n" not in str(error.value)
    assert not OPENED


# --- training ---


def run_stage(stage: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> None:
    """A short run in this process."""
    if not (folder / "data").is_dir():
        rows = [
            {"query": r.query.text, "positive": r.positive.text, "negative": r.negatives[0].text}
            for r in reference.examples(24, 1)
        ]
        write_jsonl(folder / "data/nq.jsonl", rows)
    values = {
        "model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "dataset_file_path": str(folder / "data"),
        "sources": ["nq"],
        "max_seq_length": 192,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | keys
    (folder / "run.json").write_text(json.dumps(values), encoding="utf-8")
    script = str(ROOT / f"experiments/run_{stage}.py")
    monkeypatch.setattr(sys, "argv", [script, str(folder / "run.json")])
    runpy.run_path(script, run_name="__main__")


def test_training_leaves_it_alone(tmp_path: Path, base: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of a run; what the run writes holds none of it."""
    plant(base, marker)
    run_stage("stage_I", tmp_path, monkeypatch, save_strategy="no")
    assert not OPENED
    assert not {file.name for file in (tmp_path / "out").iterdir()} & {*PICKLES, *(f"{name}.py" for name in MODULES)}


STATE = {
    "optimizer.pt": "optimizer.pt",
    "scheduler.pt": "scheduler.pt",
    "rng_state.pth": "rng_state.pth",
    "training_args.bin": None,
    "pytorch_model.bin": None,
}


def cut_back(output: Path) -> Path:
    """A finished run's folder as if it had been stopped at its second step; returns that checkpoint."""
    for file in [*output.glob("*.*"), *output.glob("checkpoint-3")]:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    return output / "checkpoint-2"


def sum_up(folder: Path) -> None:
    """Sums that fit, as whoever planted something would write them."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS_FILE)
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize("name", STATE)
def test_going_on_from_a_checkpoint_runs_none_of_it(
    tmp_path: Path, base: Path, marker: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Another state of the optimiser than was written is refused by its sum; one with a new sum by torch's own rules.

    What a checkpoint needs in none of its steps is not looked at."""
    run_stage("stage_I", tmp_path, monkeypatch)
    checkpoint = cut_back(tmp_path / "out")
    torch.save({"state": Evil(marker)}, checkpoint / name)
    with pytest.raises(UserError, match=name):
        check_sums(checkpoint)
    sum_up(checkpoint)
    if STATE[name] is None:
        run_stage("stage_I", tmp_path, monkeypatch)
        assert (tmp_path / "out/model.safetensors").is_file()
        return
    with pytest.raises(SystemExit) as ended:
        run_stage("stage_I", tmp_path, monkeypatch)
    assert ended.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and str(checkpoint) in sentence


# --- export and evaluation ---


@pytest.fixture
def exported(tmp_path: Path, base: Path, adapter: Path, marker: Path) -> Path:
    """The two as one folder, exported with planted files beside them, and without the record of its files' sizes."""
    plant(base, marker)
    plant(adapter, marker)
    export(Export(ModelChoice(str(base), (str(adapter),)), dtype="float32"), tmp_path / "exported")
    (tmp_path / "exported" / RUN_FILE).unlink()
    return tmp_path / "exported"


def test_export_leaves_it_alone(exported: Path) -> None:
    """Nor does the exported folder hold any of it, or name it."""
    assert not OPENED
    names = {file.name for file in exported.rglob("*")}
    assert not names & {*PICKLES, *(f"{name}.py" for name in MODULES)}
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (exported / name).read_text(encoding="utf-8")


def test_evaluation_leaves_it_alone(
    tmp_path: Path, base: Path, adapter: Path, exported: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base with an adapter, an exported folder, and the same for sentence-transformers. Bytes go into the revision,
    no more."""
    monkeypatch.setattr(torch, "load", None)
    table = tmp_path / "table.json"
    table.write_text('{"STS12": "find it"}', encoding="utf-8")
    plant(exported, marker)
    load_encoder(evaluated(str(base), (str(adapter),), instructions_file=str(table), device="cpu"))
    load_encoder(evaluated(str(exported), instructions_file=str(table), device="cpu"))
    (exported / SETTINGS_FILE).unlink()
    assert kind_of(evaluated(str(exported))) == "sentence-transformers"
    load_encoder(evaluated(str(exported), device="cpu"))
    assert not [file for file in OPENED if file.endswith(".py")]


def test_a_sentence_transformers_folder_of_pickles_is_refused(
    exported: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that torch would take for weights."""
    plant(exported, marker)
    torch.save(load_file(exported / "model.safetensors"), exported / "pytorch_model.bin")
    for name in ("model.safetensors", SETTINGS_FILE):
        (exported / name).unlink()
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match=r"sentence-transformers cannot load .*safetensors"):
        load_encoder(evaluated(str(exported), device="cpu"))


def test_a_module_of_its_own_is_refused(exported: Path, marker: Path) -> None:
    """`modules.json` names the class of each module; one that the folder brings along is not imported."""
    plant(exported, marker)
    (exported / SETTINGS_FILE).unlink()
    modules = json.loads((exported / "modules.json").read_text(encoding="utf-8"))
    modules[1]["type"] = "custom_st.Evil"
    write_json(exported / "modules.json", modules)
    with pytest.raises(UserError, match=r"sentence-transformers cannot load .*custom_st\.Evil"):
        load_encoder(evaluated(str(exported), device="cpu"))
    assert not [file for file in OPENED if file.endswith(".py")]


# --- the code itself ---

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {
    "os.system", "os.popen", "subprocess.getoutput", "yaml.load", "pandas.read_pickle", "pd.read_pickle",
    "importlib.import_module", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
HARMLESS = {"trust_remote_code": False, "allow_pickle": False, "shell": False, "weights_only": True}
#: Methods of transformers that ask whether to run code where they are not told.
MUST_BE_TOLD = ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoConfig", "model_class")


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What in a file could run code that is not its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if ast.unparse(node) != "from pickle import UnpicklingError":  # to catch it is no danger
                yield from (f"line {node.lineno}: imports {n}" for n in names if n.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in UNSAFE_BUILTINS | UNSAFE_CALLS:
                yield f"line {node.lineno}: {name}"
            for keyword, value in given.items():
                is_harmless = isinstance(value, ast.Constant) and value.value is HARMLESS.get(str(keyword))
                if keyword in HARMLESS and not is_harmless:
                    yield f"line {node.lineno}: {keyword}={ast.unparse(value)}"
            if name == "torch.load" and "weights_only" not in given:
                yield f"line {node.lineno}: torch.load"
            owner, _, method = name.rpartition(".")
            if method == "from_pretrained" and owner in MUST_BE_TOLD and "trust_remote_code" not in given:
                yield f"line {node.lineno}: {name} is not told trust_remote_code=False"
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if "trust_remote_code" in keys:
                yield f"line {node.lineno}: trust_remote_code in a dictionary"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_no_file_runs_what_is_not_its_own(file: Path) -> None:
    assert list(unsafe(ast.parse(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "eval(text)", "exec(code)", "torch.load(file)",
        "torch.load(file, weights_only=False)", "torch.load(file, weights_only=flag)", "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(path)", "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=ask)", "subprocess.run(line, shell=True)",
        "os.system(line)", "options = {'trust_remote_code': True}", "importlib.import_module(name)",
    ],
)  # fmt: skip
def test_the_search_finds(code: str) -> None:
    assert len(list(unsafe(ast.parse(code)))) == 1


#: What opens a folder by a library, and the one module that may; the quickstart's base is known by its name or its sum.
LOADERS = ("Auto", "PeftModel", "PeftConfig", "SentenceTransformer", "model_class")
MAY_LOAD = {"llm2vec/model/backbone.py", "llm2vec/quickstart/base.py"}


def test_one_module_calls_the_libraries_loaders() -> None:
    """It asks the vault first; a loader elsewhere would open what nobody has looked at."""
    callers = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            owner, _, method = ast.unparse(node.func).rpartition(".")
            of_folder = method == "from_pretrained" and owner.rpartition(".")[2].startswith(LOADERS)
            of_folder |= method == "SentenceTransformer" and bool(node.args)
            of_folder |= method in ("load_peft_weights", "snapshot_download")
            callers |= {file.relative_to(ROOT).as_posix()} if of_folder else set()
    assert callers == MAY_LOAD


# --- offline ---


def test_offline_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under HF_HUB_OFFLINE=1 a name that is not in the cache is one sentence, and no connection is tried."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(arguments)
        raise OSError("a connection was tried")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    name = "nobody-at-all/no-such-model"
    attempts = {
        "model": lambda: LLM2Vec.from_pretrained(name),
        "adapter": lambda: LLM2Vec.from_pretrained(name, f"{name}-adapter"),
        "tokenizer": lambda: load_tokenizer(name),
        "texts": lambda: texts_of_hub(name, None),
        "evaluation": lambda: load_encoder(evaluated(name)),
        "export": lambda: export(Export(ModelChoice(name)), tmp_path / "exported"),
    }
    for what, attempt in attempts.items():
        with pytest.raises(UserError) as error:
            attempt()
        assert name in str(error.value) and "\n" not in str(error.value), what
    assert not tried


# --- links and paths ---


def test_an_output_folder_that_is_a_link(
    tmp_path: Path, base: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything goes to where it points, and the link stays; a run goes on through it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    run_stage("stage_I", tmp_path, monkeypatch)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere/model.safetensors").is_file()
    whole = (tmp_path / "elsewhere/model.safetensors").read_bytes()
    cut_back(tmp_path / "out")
    run_stage("stage_I", tmp_path, monkeypatch)
    assert (tmp_path / "elsewhere/model.safetensors").read_bytes() == whole


def test_a_checkpoint_that_is_a_link_is_removed_and_not_what_it_points_at(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who moved a checkpoint to another disk keeps it."""
    run_stage("stage_I", tmp_path, monkeypatch)
    (tmp_path / "out/checkpoint-2").rename(tmp_path / "kept")
    (tmp_path / "out/checkpoint-2").symlink_to(tmp_path / "kept")
    before = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    run_stage("stage_I", tmp_path, monkeypatch, resume="never", learning_rate=2e-3)
    assert not (tmp_path / "out/checkpoint-2").is_symlink()
    assert {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()} == before


def test_weights_that_are_a_link_are_read_and_never_written_through(tmp_path: Path, base: Path) -> None:
    """As in the hub's cache. Saving over such a folder puts a file in the link's place."""
    expected = vectors(base)
    (base / "model.safetensors").rename(tmp_path / "blob")
    (base / "model.safetensors").symlink_to(tmp_path / "blob")
    assert torch.equal(vectors(base), expected)
    before = (tmp_path / "blob").read_bytes()
    settings = EncoderSettings(max_length=64, template="llama3")
    save_checkpoint(base, tiny_model("llama", True, seed=3), family_tokenizer("llama"), settings)
    assert not (base / "model.safetensors").is_symlink()
    assert (tmp_path / "blob").read_bytes() == before


def test_a_source_may_lie_anywhere(tmp_path: Path) -> None:
    """The table is the user's own, as the config is, and nothing is written there: `..` and absolute paths are taken
    as they stand."""
    row = [{"query": "q", "positive": "d", "negative": "n"}]
    absolute = write_jsonl(tmp_path / "far/a.jsonl", row)
    write_jsonl(tmp_path / "b.jsonl", row)
    table = tmp_path / "data/sources.json"
    write_jsonl(table, [{"a": {"file": str(absolute)}, "b": {"file": "../b.jsonl"}}])
    sources: list[Source] = read_sources_file(table)
    before = sorted(tmp_path.rglob("*"))
    assert len(TrainingRows(tmp_path / "data", sources)) == 2
    assert sorted(tmp_path.rglob("*")) == before
