"""Whatever a config, a line of data, a checkpoint's files or a results folder hold: a right result, or one sentence.

Generated cases, 10,000 and more in the slow suite (a tenth of them by default). "Right" is decided by a second, simpler
reading of the same input written here, or by a property that must hold. The last test counts cases and sentences.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llm2vec import LLM2Vec
from llm2vec.data.lines import check_row, parse_line
from llm2vec.data.sources import read_sources_file
from llm2vec.evaluation.files import load_instructions, retrieval_set_of
from llm2vec.files import parse_json, parse_object
from llm2vec.model.chain import model_name, open_folder
from llm2vec.model.settings import EncoderSettings
from llm2vec.reports.results import read_results
from llm2vec.table import Table
from llm2vec.text.templates import TEMPLATES
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.training.config.file import load_config
from llm2vec.types import InstructedText, UserError
from tests.helpers import family_tokenizer, tiny_model

#: All in one process, as the last test counts what the others tried.
pytestmark = pytest.mark.xdist_group("hostile_input")

CASES: Counter[str] = Counter()
SENTENCES: Counter[str] = Counter()


def cases(slow: int) -> Callable[[Any], Any]:
    """A tenth of the cases by default, all of them with HOSTILE_CASES=all (the slow suite sets it)."""
    number = slow if os.environ.get("HOSTILE_CASES") == "all" else max(20, slow // 20)
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def outcome(name: str, function: Callable[[], Any]) -> Any:
    """What the function returns, or None for a UserError, whose sentence must be one line."""
    CASES[name] += 1
    try:
        return function()
    except UserError as error:
        sentence = str(error)
        assert "\n" not in sentence.strip(), sentence
        assert len(sentence) > 15
        # What the sentence quotes of the input is not what makes it another sentence.
        quoted = r"'.*'|\".*\"|\[.*\]|\{.*\}|\(.*\)|/\S+|[+-]?\d\S*|\b(None|True|False|nan|inf)\b"
        shape = re.sub(quoted, "_", sentence)[:70]
        SENTENCES[f"{name}: {shape}"] += 1
        return None


TEXT = st.text(max_size=30) | st.sampled_from(
    ["<|eot_id|>", "</s>", "\x00", "\ufeff", "é" * 50, "x" * 2000, " ", "\u2028", "NaN", "1e999", "{}", "日本語"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "query": TEXT | JSON,
        "positive": TEXT | JSON,
        "negative": TEXT | st.lists(TEXT, max_size=3) | JSON,
        "pos_score": st.floats() | JSON,
        "neg_scores": st.lists(st.floats() | JSON, max_size=3),
        "extra": JSON,
    },
)


def damaged(line: bytes, draw: Any) -> bytes:
    """A line with one of the things that happen to files."""
    kind = draw(st.sampled_from(["as it is", "bom", "crlf", "cut", "byte", "twice", "nul", "deep"]))
    place = draw(st.integers(0, max(0, len(line) - 1)))
    return {
        "as it is": line,
        "bom": b"\xef\xbb\xbf" + line,
        "crlf": line + b"\r\n",
        "cut": line[:place],
        "byte": line[:place] + bytes([draw(st.integers(0, 255))]) + line[place + 1 :],
        "twice": line[:-1] + b', "query": "again"}' if line.endswith(b"}") else line,
        "nul": line[:place] + b"\x00" + line[place:],
        "deep": b"[" * 5000 + line,
    }[kind]


@cases(4000)
@given(st.data(), ROW, st.integers(0, 2), st.booleans())
def test_rows(data: Any, row: dict[str, Any], negatives: int, scores: bool) -> None:
    line = damaged(json.dumps(row).encode(), data.draw)
    where = "rows.jsonl, line 3"
    parsed = outcome("training row", lambda: check_row(parse_object(line, where), negatives, where, scores))
    if parsed is None:
        return
    said = json.loads(line.decode("utf-8-sig"))
    assert line.count(b'"query"') == 1
    given_negatives = [said["negative"]] if isinstance(said.get("negative"), str) else said.get("negative", [])
    assert parsed["query"] == said["query"] and parsed["positive"] == said["positive"]
    assert parsed["negative"] == given_negatives[:negatives] and len(parsed["negative"]) == negatives
    for text in (parsed["query"], parsed["positive"], *parsed["negative"]):
        assert text.strip() and text.encode("utf-8")
    if scores:
        assert all(math.isfinite(score) for score in parsed["scores"]) and len(parsed["scores"]) == 1 + negatives


@cases(1000)
@given(st.binary(max_size=60))
def test_lines_of_text(line: bytes) -> None:
    parsed = outcome("line of text", lambda: parse_line(line, "wiki.txt, line 1"))
    assert parsed is None or parsed == line.decode("utf-8").strip()


@cases(1000)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_json(content: bytes) -> None:
    parsed = outcome("json", lambda: [parse_json(content, "file.json")])
    if parsed is not None:
        assert repr(parsed[0]) == repr(json.loads(content.decode("utf-8-sig")))


#: A config that is accepted, whose keys are then set to anything.
CONFIG = {"model_name_or_path": "base", "output_dir": "out", "dataset_file_path": "data", "total_batch_size": 8}
KEYS = st.sampled_from(
    [
        *CONFIG, "alpha", "bidirectional", "pooling_mode", "template", "max_seq_length", "learning_rate",
        "max_steps", "num_train_epochs", "warmup_steps", "save_steps", "save_only_model", "bf16", "torch_dtype",
        "seed", "sources", "gradient_checkpointing", "tokens_per_microbatch", "activation_memory_gb", "fsdp",
        "optim", "report_to", "resume", "logging_steps", "per_device_train_batch_size",
        "gradient_accumulation_steps", "use_peft", "lr_scheduler_type", "reduction", "one_source_per",
        "num_eval_rows", "eval_strategy", "eval_steps", "stop_after_n_steps", "target", "objective",
        "attn_implementation", "torch_compile", "instruction_join", "max_train_samples", "run_name",
    ]
)  # fmt: skip
VALUE = (
    JSON
    | st.integers(-3, 2000)
    | st.sampled_from(
        ["auto", "no", "steps", "last", "float32", "bfloat16", "adamw_torch", "linear", "..", "/", "none"]
    )
)


@cases(2000)
@given(st.dictionaries(KEYS, VALUE, min_size=1, max_size=3), st.sampled_from(["stage_I", "lm"]))
def test_configs(folder: Path, changes: dict[str, Any], stage: Any) -> None:
    file = folder / "run.json"
    file.write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    config = outcome("config", lambda: load_config(file, stage))
    if config is not None:
        for key in ("alpha", "max_seq_length", "template", "target"):
            if key in changes:
                assert getattr(config, key) == changes[key]


@cases(600)
@given(st.data())
def test_damaged_configs(folder: Path, data: Any) -> None:
    file = folder / "run.json"
    file.write_bytes(damaged(json.dumps({**CONFIG, "query": 1}).encode(), data.draw))
    assert outcome("config file", lambda: load_config(file, "stage_I")) is None  # `query` is no key


@cases(1000)
@given(
    st.dictionaries(
        st.sampled_from([*EncoderSettings.__dataclass_fields__, "unknown"]),
        JSON | st.sampled_from(["mean", "last", "causal", "plain", "llama3"]),
        max_size=4,
    )
)
def test_settings_files(folder: Path, content: dict[str, Any]) -> None:
    (folder / "llm2vec_config.json").write_text(json.dumps(content), encoding="utf-8")
    read = outcome("llm2vec_config.json", lambda: EncoderSettings(**open_folder(str(folder)).settings))
    if read is not None:
        assert read.max_length >= 1 and (read.template is None or read.template in TEMPLATES)


@cases(600)
@given(JSON | st.dictionaries(TEXT, st.dictionaries(st.sampled_from(["file", "instruction", "symmetric", "x"]), JSON)))
def test_sources_files(folder: Path, content: Any) -> None:
    file = folder / "sources.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    sources = outcome("sources file", lambda: read_sources_file(file))
    assert sources is None or [source.name for source in sources] == list(content)


@cases(400)
@given(JSON | st.dictionaries(TEXT, TEXT))
def test_instruction_tables(folder: Path, content: Any) -> None:
    file = folder / "instructions.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    table = outcome("instructions", lambda: load_instructions(file))
    assert table is None or table == content


@cases(300)
@given(
    st.lists(st.dictionaries(st.sampled_from(["_id", "text", "title"]), JSON), max_size=3), st.lists(JSON, max_size=2)
)
def test_retrieval_sets(folder: Path, documents: list[Any], judgements: list[Any]) -> None:
    (folder / "qrels").mkdir(exist_ok=True)
    for name, rows in (("corpus", documents), ("queries", documents), ("qrels/test", judgements)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = outcome("retrieval set", lambda: retrieval_set_of(folder))
    if found is not None:
        texts = [row["text"] for row in found.corpus]
        assert texts == [row["text"] for row in documents] and all(isinstance(text, str) for text in texts)
        assert {row["id"] for row in found.queries} <= found.relevant.keys()


@cases(300)
@given(st.dictionaries(st.sampled_from(["task_name", "scores", "dataset_revision", "mteb_version"]), JSON), st.data())
def test_result_files(folder: Path, content: dict[str, Any], data: Any) -> None:
    place = folder / "results" / "org__model" / "revision"
    place.mkdir(parents=True, exist_ok=True)
    (place / "NFCorpus.json").write_bytes(damaged(json.dumps(content).encode(), data.draw))
    results = outcome("results", lambda: read_results(folder))
    if results is not None:
        assert all(isinstance(score, float) for score in results.scores.values())


@cases(600)
@given(st.lists(TEXT.filter(bool), min_size=1, max_size=3))
def test_names_of_models_stay_in_their_folder(paths: list[str]) -> None:
    name = outcome("model name", lambda: model_name([path.replace("\x00", "")[:100] or "x" for path in paths]))
    organisation, _, model = name.partition("/")
    for part in (organisation, model):
        assert part and part.strip(".") and set(part) <= set(string.ascii_letters + string.digits + "._+-")


@pytest.mark.parametrize("family", ["llama3", "qwen2", "mistral", "gemma"])
@cases(150)
@given(text=TEXT | st.text("<|>/s_eotidinustrmaINST[]", max_size=60), instruction=st.text(max_size=20))
def test_texts_never_become_control_tokens(family: str, text: str, instruction: str) -> None:
    tokenizer = family_tokenizer(family)
    control = set(tokenizer.all_special_ids)
    rows = RowTokenizer(tokenizer, family, "last", 64)

    def specials(of: str, under: str) -> list[int]:
        return [i for i in rows.rows([InstructedText(under, of)])[0].ids if i in control]

    found = outcome("special tokens in texts", lambda: specials(text, instruction))
    if found is not None:
        assert found == specials("a", "")


@cases(100)
@given(TEXT)
def test_report_cells_are_escaped(text: str) -> None:
    CASES["report cell"] += 1
    html = Table([f"<i>{text}"], [[f"<script>{text}"]]).html()
    assert "<script>" not in html and "<i>" not in html


# --- weights ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small full model as a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = family_tokenizer("llama3")
    LLM2Vec(tiny_model("llama"), tokenizer, "last", template="llama3").save(folder)
    return folder


@cases(60)
@given(st.data())
def test_damaged_weights(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """A tensor of another shape, name or dtype, a cut file, other bytes: refused, or the weights as they are."""
    folder = tmp_path_factory.mktemp("damaged")
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "run.json").unlink()  # whose file sizes would give it away
    weights = folder / "model.safetensors"
    kind = data.draw(st.sampled_from(["shape", "name", "missing", "cut", "byte", "config"]))
    if kind in ("cut", "byte"):
        content = bytearray(weights.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1 if kind == "cut" else 400))
        weights.write_bytes(bytes(content[:place]) if kind == "cut" else _with_byte(content, place))
    elif kind == "config":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        key = data.draw(st.sampled_from(["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]))
        config[key] = data.draw(st.sampled_from([0, -1, 3, 10**9, "x", None]))
        if config[key] == 10**9:
            config[key] = 7  # a model of that size would only test the memory
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        tensors = load_file(weights)
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(name)
        if kind == "shape":
            tensors[name] = torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:])
        elif kind == "name":
            tensors[f"{name}.other"] = tensor
        save_file(tensors, weights, metadata={"format": "pt"})
    model = outcome("weights", lambda: LLM2Vec.from_pretrained(str(folder)))
    if model is not None:
        assert torch.isfinite(model.encode(["a text"], show_progress_bar=False)).all() or kind == "byte"


def _with_byte(content: bytearray, place: int) -> bytes:
    content[place] ^= 0x41
    return bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that the cases of one test share."""
    return tmp_path


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing of what the cases log is kept."""
    with contextlib.suppress(Exception):
        caplog.set_level("CRITICAL")
    yield


@pytest.mark.slow
def test_ten_thousand_cases() -> None:
    """Everything above with all its cases, in a process of its own; prints the counts."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", __file__, "-m", "not slow"]
    environment = {**os.environ, "HOSTILE_CASES": "all"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    counted = re.search(r"(\d+) cases, (\d+) distinct sentences", done.stdout)
    assert counted is not None
    assert int(counted[1]) >= 10_000


def test_zz_count() -> None:
    """The last test of the file: what ran before it."""
    lines = [f"\n{CASES.total()} cases, {len(SENTENCES)} distinct sentences"]
    for name, number in CASES.most_common():
        lines.append(f"  {number:6} {name}: {sum(s.startswith(name + ':') for s in SENTENCES)} sentences")
    sys.stdout.write("\n".join(lines) + "\n")
    assert CASES.total() > 200
