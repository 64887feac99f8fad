"""A stronger model's vectors: written by `encode`, found by text, refused where they do not fit the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl

from llm2vec import Config
from llm2vec import train as train_from_python
from llm2vec.commands import encode, train
from llm2vec.model.chain import RUN_FILE
from llm2vec.objectives.negatives import hash_of
from llm2vec.training.log import LOG_FILE
from llm2vec.training.vectors import StoredVectors, stored_vectors
from llm2vec.types import Example, InstructedText, UserError

TEXTS = [
    InstructedText("", "hello world"),
    InstructedText("find it", "hello world"),
    InstructedText("", "who wrote it"),
]


def write(folder: Path, vectors: dict[str, list[float]], model: str | None = "a", complete: bool = True) -> Path:
    """Vectors by id, and whose they are."""
    folder.mkdir(parents=True)
    width = len(next(iter(vectors.values())))
    flat = pa.array([number for vector in vectors.values() for number in vector], pa.float32())
    table = pa.table({"id": list(vectors), "vector": pa.FixedSizeListArray.from_arrays(flat, width)})
    pq.write_table(table, folder / "part-00000.parquet")
    if model is not None:
        content = {"settings": {"model": model}, "complete": complete}
        (folder / "_manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def ids(*texts: InstructedText) -> list[str]:
    return [f"{hash_of(text):016x}" for text in texts]


def test_vectors_are_found_by_instruction_and_text(tmp_path: Path) -> None:
    first, second, third = ids(*TEXTS)
    write(tmp_path / "v/0", {second: [1.0, 2.0], third: [3.0, 4.0]})
    write(tmp_path / "v/1", {first: [5.0, 6.0]}, model=None)
    vectors = StoredVectors(tmp_path / "v")
    assert vectors.width == 2
    assert torch.equal(
        vectors([TEXTS[2], TEXTS[0], TEXTS[1], TEXTS[2]]), torch.tensor([[3.0, 4], [5, 6], [1, 2], [3, 4]])
    )
    missing = InstructedText("find it", "who wrote it")
    assert vectors.missing([*TEXTS, missing]) == [missing]
    with pytest.raises(UserError, match="holds no vector of 'who wrote it'; encode"):
        vectors([missing])
    vectors.check([Example("a", TEXTS[1], TEXTS[0], (TEXTS[2],))])
    with pytest.raises(UserError, match="lacks the vectors of 2 of the run's texts, such as 'who wrote it'; encode"):
        vectors.check([Example("a", missing, TEXTS[0], (TEXTS[2], missing))])


def test_what_is_no_folder_of_one_models_vectors_is_refused(tmp_path: Path) -> None:
    first, second, _ = ids(*TEXTS)
    write(tmp_path / "width/0", {first: [1.0, 2.0]})
    write(tmp_path / "width/1", {second: [1.0, 2.0, 3.0]})
    write(tmp_path / "model/0", {first: [1.0, 2.0]})
    write(tmp_path / "model/1", {second: [1.0, 2.0]}, model="b")
    write(tmp_path / "begun/0", {first: [1.0, 2.0]}, complete=False)
    write(tmp_path / "names/0", {"row 7": [1.0, 2.0]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/part-00000.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "columns.parquet")
    (tmp_path / "columns").mkdir()
    (tmp_path / "columns.parquet").rename(tmp_path / "columns/a.parquet")
    expected = {
        "width": "hold vectors of another width each (2 and 3); encode anew",
        "model": "hold vectors of another model each (a and b); encode anew",
        "begun": "not all of it is encoded yet",
        "names": "the id 'row 7' is no hash of a text",
        "empty": "holds no Parquet files of vectors",
        "cut": "not a whole Parquet file",
        "columns": "the columns `id` and `vector`, of lists of one size, are needed",
    }
    for name, sentence in expected.items():
        with pytest.raises(UserError) as error:
            StoredVectors(tmp_path / name)
        assert sentence in str(error.value) and "\n" not in str(error.value)


ROOT = Path(__file__).parents[2]


def write_models_and_rows(tmp_path: Path) -> list[dict[str, str]]:
    """A base, a wider teacher, and a source; returns its rows."""
    for name, size in (("base", 32), ("teacher", 48)):
        tiny_model("llama", True, hidden_size=size, initializer_range=0.2).save_pretrained(tmp_path / name)
        family_tokenizer("llama").save_pretrained(tmp_path / name)
    words = ["red", "green", "blue", "black", "white", "one", "two", "three"]
    rows = [{"query": f"who is {word}", "positive": f"it is {word}", "negative": f"not {word}"} for word in words]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "sources.json").write_text(json.dumps({"a": {"file": "a.jsonl", "instruction": "find it"}}))
    return rows


def test_vectors_that_were_encoded_anew_are_read_anew(tmp_path: Path) -> None:
    """In one process, as a notebook trains twice; what did not change is opened once."""
    folder, (first, *_) = tmp_path / "v", ids(*TEXTS)
    for vector in ([1.0, 2.0], [3.0, 4.0]):
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, {first: vector})
        vectors = stored_vectors(str(folder))
        assert vectors is not None and vectors is stored_vectors(str(folder))
        assert vectors(TEXTS[:1]).tolist() == [vector]
    assert stored_vectors(None) is None and stored_vectors("self") is None


def test_vectors_that_were_encoded_anew_make_another_run(tmp_path: Path) -> None:
    """A guide's and a teacher's; a record from before they were in it goes on as ever."""
    rows = write_models_and_rows(tmp_path)
    names = ids(*(InstructedText("", text) for row in rows for text in row.values()))

    def encode_anew(name: str, seed: int) -> str:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        vectors = torch.randn(len(names), 32, generator=torch.Generator().manual_seed(seed)).tolist()
        return str(write(tmp_path / name, dict(zip(names, vectors, strict=True))))

    config = Config(
        str(tmp_path / "base"), stage="stage_II", lora_r=4, max_seq_length=64, guide=encode_anew("guide", 0),
        teacher_vectors=encode_anew("teacher_s", 1), training={
            "output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_train_batch_size": 8, "use_cpu": True,
            "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        },
    )  # fmt: skip
    _, figures = train_from_python(config, rows)
    file = tmp_path / "out" / RUN_FILE
    recorded = json.loads(file.read_text(encoding="utf-8"))
    for name, seed in (("guide", 0), ("teacher_s", 1)):
        encode_anew(name, seed + 2)
        with pytest.raises(UserError, match=f"belongs to another run: [^;]*{name} has changed since"):
            train_from_python(config, rows)
        encode_anew(name, seed)
        assert train_from_python(config, rows)[1] == figures
    encode_anew("guide", 2)
    file.write_text(json.dumps({key: value for key, value in recorded.items() if key != "vectors"}), encoding="utf-8")
    assert train_from_python(config, rows)[1] == figures


@pytest.mark.slow
def test_the_page_s_student_learns_by_its_teacher_alone(tmp_path: Path) -> None:
    """The recipe as a reader copies it, but for paths, size and length."""
    write_models_and_rows(tmp_path)
    page = (ROOT / "docs/guides/losses.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```json\n(.*?)^```$", page.partition("## A student by its teacher alone")[2], re.M | re.S)
    keys = json.loads(recipe)
    assert {"contrastive_weight", "teacher_vectors", "teacher_projection"} <= set(keys)
    keys |= {name: str(tmp_path / Path(keys[name]).name) for name in ("model_name_or_path", "teacher_vectors")}
    keys |= {
        "sources_file": str(tmp_path / "sources.json"), "output_dir": str(tmp_path / "out"), "max_steps": 12,
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "max_seq_length": 64, "tokens_per_microbatch": 64,
    }  # fmt: skip
    file = tmp_path / "student.json"
    file.write_text(json.dumps(keys), encoding="utf-8")
    encode.main([str(file), str(tmp_path / "vectors"), "--model", str(tmp_path / "teacher")])
    train.stage_2([str(file)])
    log = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    log = [entry for entry in log if "loss" in entry]
    assert len(log) == 12 and log[-1]["loss"] < 0.9 * log[0]["loss"]
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["loss_teacher_cosine"], abs=2e-4)  # the library rounds it
        assert "in_batch_accuracy" not in entry


@pytest.mark.slow
def test_a_run_is_guided_and_taught_by_what_encode_wrote(tmp_path: Path) -> None:
    """Vectors of a wider model; the projection is saved, and a text that was not encoded is refused."""
    rows = write_models_and_rows(tmp_path)
    config: dict[str, Any] = {
        "model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "out"),
        "sources_file": str(tmp_path / "sources.json"), "max_seq_length": 64, "per_device_train_batch_size": 8,
        "learning_rate": 1e-2, "lora_r": 4, "max_steps": 12, "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "tokens_per_microbatch": 128,
        "guide": str(tmp_path / "vectors"), "guide_margin": 0.05, "teacher_vectors": str(tmp_path / "vectors"),
        "teacher_projection": True, "teacher_mse_weight": 0.5, "teacher_similarity_weight": 0.1,
    }  # fmt: skip
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    encode.main([str(file), str(tmp_path / "vectors"), "--model", str(tmp_path / "teacher")])
    assert {path.parent.name for path in (tmp_path / "vectors").rglob("*.parquet")} == {"00.document", "01.query"}
    train.stage_2([str(file)])
    log = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    far = [entry["loss_teacher_cosine"] for entry in log if "loss_teacher_cosine" in entry]
    assert len(far) == 12 and far[-1] < 0.9 * far[0]
    assert all("masked_negatives" in entry for entry in log if "loss" in entry)
    assert list((tmp_path / "out").rglob("objective.safetensors"))
    write_jsonl(tmp_path / "a.jsonl", [*rows[:7], {**rows[7], "positive": "it is new"}])
    file.write_text(json.dumps(config | {"output_dir": str(tmp_path / "other")}), encoding="utf-8")
    with pytest.raises(UserError, match="lacks the vectors of 1 of the run's texts, such as 'it is new'"):
        train.stage_2([str(file)])
