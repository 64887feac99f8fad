"""Rows in any form: each is read into the very rows of its JSONL twin, and what is wrong is said in one sentence."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file

from llm2vec.commands.data.answers import main as answers_command
from llm2vec.commands.data.check_data import main as check_data
from llm2vec.commands.data.mine import main as mine_command
from llm2vec.data.held_out import hold_out
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import KEYS_OF_SOURCE, READY_TABLES, entry_of, read_sources_file
from llm2vec.training.config.file import load_config
from llm2vec.training.resume import differences
from llm2vec.training.stages import train_stage
from llm2vec.types import Example, UserError

#: Texts that a reader may spoil: digits, "NA", line breaks, quotes, commas, tabs.
ROWS = [
    {"query": f"who wrote {i}", "positive": text, "negative": f"the red one, {i}"}
    for i, text in enumerate(["NA", "007", 'the "blue"\nanswer', "a\tb, c", "née 東京", "1e5", "null", "true"])
]


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def _write_gzip(file: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def _write_arrow(opened: Callable[..., Any]) -> Callable[[Path, list[dict[str, Any]]], None]:
    def write(file: Path, rows: list[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(rows)
        with opened(str(file), table.schema) as writer:
            writer.write_table(table)

    return write


def write_hub_layout(folder: Path, rows: list[dict[str, Any]], config: str = "default") -> None:
    """A repository of the hub: its card names the configurations' files, each cut in two."""
    (folder / config).mkdir(parents=True)
    for part, some in enumerate((rows[:3], rows[3:])):
        pq.write_table(pa.Table.from_pylist(some), folder / config / f"train-0000{part}-of-00002.parquet")
    card = folder / "README.md"
    others = card.read_text(encoding="utf-8").removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
    files = f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train-*\n"
    card.write_text(f"{others}{files}---\n", encoding="utf-8")


#: A form -> the name of its file, how it is written, and what its entry in the table says beside the file.
FORMS: dict[str, tuple[str, Callable[[Path, list[dict[str, Any]]], Any], dict[str, Any]]] = {
    "gzip": ("a.jsonl.gz", _write_gzip, {}),
    "parquet": ("a.parquet", lambda file, rows: pq.write_table(pa.Table.from_pylist(rows), file), {}),
    "csv": ("a.csv", _write_csv, {}),
    "tsv": ("a.tsv", _write_csv, {}),
    "arrow stream": ("a.arrow", _write_arrow(pa.ipc.new_stream), {}),
    "arrow file": ("a.arrow", _write_arrow(pa.ipc.new_file), {}),
    "saved": ("a", lambda file, rows: Dataset.from_list(rows).save_to_disk(file), {}),
    "saved split": ("a", lambda f, rows: DatasetDict({"x": Dataset.from_list(rows)}).save_to_disk(f), {"split": "x"}),
    "hub": ("some/name", lambda f, rows: write_hub_layout(f, rows, "pair"), {"hub": "some/name", "config": "pair"}),
}


def entry(file: str, **keys: Any) -> dict[str, Any]:
    return {**({} if "hub" in keys else {"file": file}), "instruction": ["find the answer", "same"], **keys}


def write_table(folder: Path, **entries: dict[str, Any]) -> Path:
    table = folder / "sources.json"
    table.write_text(json.dumps(entries), encoding="utf-8")
    return table


def read(folder: Path, num_negatives: int = 1, with_scores: bool = False, **entries: dict[str, Any]) -> TrainingRows:
    sources = read_sources_file(write_table(folder, **entries))
    return TrainingRows(folder, sources, num_negatives=num_negatives, with_scores=with_scores)


def texts(rows: TrainingRows) -> list[tuple[str, str, list[str]]]:
    examples = [rows[i] for i in range(len(rows))]
    return [(e.query.text, e.positive.text, [n.text for n in e.negatives]) for e in examples]


def write_form(folder: Path, form: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows in a form; returns the table's entry."""
    name, write, keys = FORMS[form]
    write(folder / name, rows)
    return entry(name, **keys)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_rows_of_its_twin(form: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    twin = read(tmp_path, a=entry("a.jsonl"))
    rows = read(tmp_path, a=write_form(tmp_path, form, ROWS))
    assert [rows[i] for i in range(len(rows))] == [twin[i] for i in range(len(twin))] and len(rows) == len(ROWS)
    assert [rows.place(i)[1] for i in range(len(rows))] == list(range(1, 9))


@pytest.mark.parametrize("form", FORMS)
def test_a_bad_row_is_named_in_every_form(form: str, tmp_path: Path) -> None:
    table = {"a": write_form(tmp_path, form, [*ROWS[:5], {**ROWS[5], "positive": " "}, *ROWS[6:]])}
    place = r"line 6" if form == "gzip" else r"row 6"
    with pytest.raises(UserError, match=rf"{place}: `positive` is empty"):
        read(tmp_path, **table)


def trained(folder: Path, stage: Any, table: Path, **keys: Any) -> dict[str, torch.Tensor]:
    """The weights that two steps over a table's sources make of the base in `folder`."""
    out = table.parent / "-".join(("out", *keys))
    config = {
        "model_name_or_path": str(folder / "base"), "sources_file": str(table), "output_dir": str(out),
        "max_seq_length": 32, "per_device_train_batch_size": 4, "max_steps": 2, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2, **keys,
    }  # fmt: skip
    (table.parent / "config.json").write_text(json.dumps(config), encoding="utf-8")
    train_stage(stage, table.parent / "config.json")
    (file,) = out.glob("*.safetensors")
    return dict(load_file(file))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a base model, and the rows as JSONL."""
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(tmp_path / "base")
    family_tokenizer("llama").save_pretrained(tmp_path / "base")
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    return tmp_path


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
def test_every_form_trains_the_same_weights(stage: Any, base: Path) -> None:
    """Bit for bit; with columns by names of their own, too."""
    twin = trained(base, stage, write_table(base, a=entry("a.jsonl")))
    renamed = [{"q": row["query"], "d": row["positive"], "n": row["negative"]} for row in ROWS]
    columns = {"columns": {"query": "q", "positive": "d", "negative": "n"}}
    for form in (*FORMS, "renamed"):
        folder = base / form
        folder.mkdir()
        of_form = write_form(folder, form, ROWS) if form in FORMS else write_form(folder, "parquet", renamed) | columns
        assert_equal(trained(base, stage, write_table(folder, a=of_form)), twin)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
def test_ids_train_the_same_weights_as_their_texts(stage: Any, base: Path) -> None:
    """Bit for bit; and a run does not go on with other texts behind the ids."""
    twin = trained(base, stage, write_table(base, a=entry("a.jsonl")))
    (base / "ids").mkdir()
    table = write_table(base / "ids", a=write_ids(base / "ids"))
    assert_equal(trained(base / "ids", stage, table, model_name_or_path=str(base / "base")), twin)
    recorded = json.loads((base / "ids/out-model_name_or_path/run.json").read_text(encoding="utf-8"))
    config = load_config(base / "ids/config.json", stage)
    assert differences(recorded, config) == []
    write_jsonl(base / "ids/corpus.jsonl", CORPUS[::-1])
    (found,) = differences(recorded, config)
    assert found.endswith("corpus.jsonl has changed since")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage_I", "stage_II"])
def test_a_batch_size_of_its_own_is_a_run_with_smaller_batches(
    stage: Any, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, in micro-batches and in pieces too; and a mixture goes on from a checkpoint as if never stopped."""
    pieces = {"tokens_per_microbatch": 64, "gradient_accumulation_steps": 2}
    for keys in ({}, pieces):
        small = trained(base, stage, write_table(base, a=entry("a.jsonl")), per_device_train_batch_size=2, **keys)
        own = entry("a.jsonl", batch_size=2 * keys.get("gradient_accumulation_steps", 1))
        assert_equal(trained(base, stage, write_table(base, a=own), **keys), small)
    write_jsonl(base / "b.jsonl", ROWS[:3])
    table = write_table(base, a=entry("a.jsonl"), b=entry("b.jsonl", batch_size=2))
    keys = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 1}
    whole = trained(base, stage, table, **keys)
    for stop in (2, 4):
        stopped = trained(base, stage, table, resume="auto", stop_after_n_steps=stop, **keys)
    assert any(not torch.equal(stopped[name], whole[name]) for name in whole)
    (base / "-".join(("out", "resume", "stop_after_n_steps", *keys))).rename(base / "-".join(("out", "resume", *keys)))
    caplog.set_level("INFO", logger="llm2vec")
    assert_equal(trained(base, stage, table, resume="auto", **keys), whole)
    assert "checkpoint-4" in caplog.text


@pytest.mark.slow
def test_a_source_without_negatives_trains_beside_others(base: Path) -> None:
    """Its batches are those of a run without hard negatives, bit for bit; two such sources are one mixture."""
    without = trained(base, "stage_II", write_table(base, a=entry("a.jsonl")), num_hard_negatives=0)
    (base / "b").mkdir()
    write_jsonl(base / "b/a.jsonl", ROWS)
    table = write_table(base / "b", a=entry("a.jsonl", num_negatives=0))
    assert_equal(trained(base, "stage_II", table), without)
    mixed = write_table(base, a=entry("a.jsonl", num_negatives=0), b=entry("a.jsonl"))
    keys = {"tokens_per_microbatch": 64, "one_source_per": "micro_batch", "gradient_accumulation_steps": 2}
    assert trained(base, "stage_II", mixed, **keys).keys() == without.keys()
    for key, value in (("distillation_weight", 1.0), ("own_negatives_only", ["a"])):
        with pytest.raises(UserError, match=rf"{key}: source 'a' has no hard negatives"):
            trained(base, "stage_II", mixed, **{key: value})


# What the columns are


def test_lists_of_positives_and_negatives(tmp_path: Path) -> None:
    """A positive makes a row; negatives may lie in several columns, and what is null is none."""
    rows = [{"q": "a", "pos": ["b", "c"], "n1": "x", "n2": None, "n3": "y"},
            {"q": "d", "pos": ["e"], "n1": "u", "n2": "v", "n3": None}]  # fmt: skip
    columns = {"query": "q", "positive": "pos", "negative": ["n1", "n2", "n3"]}
    write_form(tmp_path, "parquet", rows)
    found = read(tmp_path, 2, a=entry("a.parquet", columns=columns))
    assert texts(found) == [("a", "b", ["x", "y"]), ("a", "c", ["x", "y"]), ("d", "e", ["u", "v"])]
    assert [found.place(i) for i in range(3)] == [("a.parquet", 1), ("a.parquet", 1), ("a.parquet", 2)]


def test_rows_without_negatives_beside_others(tmp_path: Path) -> None:
    write_form(tmp_path, "csv", ROWS)
    columns = {"query": "query", "positive": "positive"}
    found = read(tmp_path, 1, a=entry("a.csv", columns=columns), b=entry("a.csv"), c=entry("a.csv", num_negatives=0))
    assert [len(found[i].negatives) for i in (0, 8, 16)] == [0, 1, 0]


def test_pairs_with_a_score(tmp_path: Path) -> None:
    rows = [{"s1": f"a{i}", "s2": f"b{i}", "score": score} for i, score in enumerate((0.2, 0.8, 0.5))]
    columns = {"query": "s1", "positive": "s2", "score": "score"}
    for form in ("csv", "parquet"):
        written = write_form(tmp_path, form, rows) | {"columns": columns}
        found = read(tmp_path, a={**written, "least_score": 0.5})
        assert texts(found) == [("a1", "b1", []), ("a2", "b2", [])]
        assert found.left_out == [{"pairs below least_score": 1}]
        assert [one.scores for one in map(read(tmp_path, 1, True, a=written).__getitem__, range(3))] == [
            (0.2,), (0.8,), (0.5,)
        ]  # fmt: skip
        with pytest.raises(UserError, match="source 'a': its pairs have a score, so its table must say by"):
            read(tmp_path, a=written)


def test_labelled_texts(tmp_path: Path) -> None:
    """A text's positive has its label, its negatives have not; a text alone under its label is left out."""
    rows = [{"text": f"{label} {i}", "label": label} for i in range(4) for label in ("cat", "dog")]
    rows += [{"text": "bird", "label": "bird"}, rows[0]]
    write_form(tmp_path, "parquet", rows)
    written = entry("a.parquet", columns={"text": "text", "label": "label"})
    found = read(tmp_path, 2, a=written)
    label = {row["text"]: row["label"] for row in rows}
    for query, positive, negatives in texts(found):
        assert label[positive] == label[query] and positive != query
        assert len(negatives) == 2 and all(label[text] != label[query] for text in negatives)
    assert sorted(row[0] for row in texts(found)) == sorted(row[1] for row in texts(found)) and len(found) == 8
    assert found.left_out == [{"texts that are alone under their label": 1, "texts that come twice": 1}]
    assert texts(read(tmp_path, 2, a=written)) == texts(found)
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 1}])
    with pytest.raises(UserError, match=r"one\.jsonl, line 1: there are no two labels"):
        read(tmp_path, a=entry(one.name, columns={"text": "text", "label": "label"}))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_negative_that_is_the_positive_is_dropped_and_counted(form: str, tmp_path: Path) -> None:
    """The next one takes its place; a row that has no other is left out. The released archive's stay."""
    triples = [("a", "b", ["b ", "c"]), ("d", "e", ["e"]), ("f", "g", ["h"])]
    rows = [dict(zip(("query", "positive", "negative"), triple, strict=True)) for triple in triples]
    if form == "jsonl":
        write_jsonl(tmp_path / "a.jsonl", rows)
    written = entry("a.jsonl") if form == "jsonl" else write_form(tmp_path, form, rows)
    for _ in range(2):  # built, then mapped
        found = read(tmp_path, a=written)
        assert texts(found) == [("a", "b", ["c"]), ("f", "g", ["h"])]
        assert found.left_out == [{"negatives that are their positive": 2, "rows that then had too few": 1}]
    assert [one[2] for one in texts(read(tmp_path, a={**written, "keep_equal_negatives": True}))] == [
        ["b "], ["e"], ["h"]
    ]  # fmt: skip


# Ready tables


@pytest.mark.parametrize("source", read_sources_file(Path("hub")), ids=lambda source: source.name)
def test_ready_tables_read_copies_in_the_layout_of_the_hub(source: Any, tmp_path: Path) -> None:
    """With the columns that the hub's data sets have; `hub` names the table."""
    names = [column for columns in source.reading.roles.values() for column in columns]
    rows = [{name: f"{name} {i}" for name in names} for i in range(8)]
    write_hub_layout(tmp_path / source.file, rows, source.reading.config or "pair")
    found = TrainingRows(tmp_path, [source], num_negatives=1)
    example: Example = found[7]
    assert len(found) == 8 and example.query.text == f"{names[0]} 7" and example.positive.text == f"{names[1]} 7"
    assert [text.text for text in example.negatives] == [f"{name} 7" for name in names[2:]]
    assert source.licence and example.query.instruction


def test_ready_tables_are_shipped_and_named() -> None:
    assert READY_TABLES["hub"].is_file()
    assert {source.file.partition("/")[0] for source in read_sources_file(Path("hub"))} == {"sentence-transformers"}


@pytest.mark.parametrize("source", read_sources_file(Path("nemotron")), ids=lambda source: source.name)
def test_the_table_of_nemotron_reads_a_copy_in_its_layout(source: Any, tmp_path: Path) -> None:
    """Rows and documents are configurations of one repository; documents are named by objects with an id."""
    rows = [
        {"question_id": f"q{i}", "question": f"who {i}", "corpus_id": "c", "pos_doc": [{"id": f"d{i}"}, {"id": "d9"}],
         "neg_doc": [{"id": "d8"}, {"id": "d7"}]}
        for i in range(4)
    ]  # fmt: skip
    documents = [{"id": f"d{i}", "text": f"document {i}"} for i in range(10)]
    write_hub_layout(tmp_path / source.file, rows, source.name)
    write_hub_layout(tmp_path / source.file, documents, f"{source.name}_corpus")
    found = TrainingRows(tmp_path, [source], num_negatives=2)
    answers = [("document 0", "who 0"), ("document 9", "who 0"), ("document 1", "who 1")]
    assert texts(found)[:3] == [(query, answer, ["document 8", "document 7"]) for answer, query in answers]
    assert len(found) == 8 and source.licence and source.reading.revision and found[0].query.instruction


# Texts behind ids

CORPUS = [{"_id": i, "title": "T" * (i % 2), "text": row["positive"]} for i, row in enumerate(ROWS)]
CORPUS += [{"_id": i + 8, "title": None, "text": row["negative"]} for i, row in enumerate(ROWS)]
DOCUMENTS = {"id": "_id", "text": "text"}


def write_ids(folder: Path, form: str = "jsonl", as_id: Callable[[int], Any] = str, **keys: Any) -> dict[str, Any]:
    """`ROWS` by the ids of their documents, whose texts are in a form; returns the table's entry."""
    rows = [{"query": row["query"], "positive": as_id(i), "negative": [as_id(i + 8)]} for i, row in enumerate(ROWS)]
    write_jsonl(folder / "ids.jsonl", rows)
    if form == "jsonl":
        write_jsonl(folder / "corpus.jsonl", CORPUS)
        documents = {"file": "corpus.jsonl"}
    else:
        (folder / "texts").mkdir()
        written = write_form(folder / "texts", form, CORPUS)
        name = "hub" if "hub" in written else "file"
        written = {key: value for key, value in written.items() if key != "instruction"}
        documents = {**written, name: f"texts/{written[name]}"}
    return entry("ids.jsonl", documents={**documents, **DOCUMENTS, **keys})


@pytest.mark.parametrize("form", ["jsonl", *FORMS])
def test_ids_are_read_as_the_texts_behind_them(form: str, tmp_path: Path) -> None:
    """Wherever these are; ids may be strings, numbers or objects with an id."""
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    twin = read(tmp_path, a=entry("a.jsonl"))
    ways = (str,) if form != "jsonl" else (str, int, lambda i: {"id": i, "score": 0.5})
    for way in ways:
        rows = read(tmp_path, a=write_ids(tmp_path, form, way))
        assert [rows[i] for i in range(len(rows))] == [twin[i] for i in range(len(twin))] and len(rows) == len(ROWS)


def test_a_retrieval_set_is_a_source(tmp_path: Path) -> None:
    """Judgements, queries and documents in BEIR's files; a title stands before its text."""
    (tmp_path / "qrels").mkdir()
    judged = [("q1", 1, 1), ("q1", 2, 0), ("q2", 3, 2)]
    _write_csv(
        tmp_path / "qrels/train.tsv", [{"query-id": q, "corpus-id": d, "score": score} for q, d, score in judged]
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(4)])
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    found = read(tmp_path, a=entry(
        "qrels/train.tsv", columns={"query": "query-id", "positive": "corpus-id", "score": "score"}, least_score=1,
        queries={"file": "queries.jsonl", "id": "_id"},
        documents={"file": "corpus.jsonl", "id": "_id", "text": ["title", "text"]},
    ))  # fmt: skip
    assert texts(found) == [("query 1", "T 007", []), ("query 2", "T a\tb, c", [])]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_id": 99}, r"ids\.jsonl, line 1: `negative` names the id '8', which .*corpus\.jsonl does not have\."),
        ({"_id": "1"}, r"corpus\.jsonl, line 9: the id '1' has another text above; an id can have one text\."),
        ({"text": " "}, r"line 1: `negative` names the id '8', whose text in .*corpus\.jsonl is empty\."),
        ({"text": None}, r"line 1: `negative` names the id '8', whose text in .*corpus\.jsonl is empty\."),
        ({"text": 3}, r"corpus\.jsonl, line 9: the text is of type int; a string is needed\."),
        ({"_id": 1.5}, r"corpus\.jsonl, line 9: 1\.5 under `id` is no id; a string or a whole number is needed\."),
    ],
    ids=str,
)
def test_a_wrong_document_is_said(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    written = write_ids(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [*CORPUS[:8], {**CORPUS[8], **changed}, *CORPUS[9:]])
    with pytest.raises(UserError, match=message):
        read(tmp_path, a=written)


def test_ids_that_are_none_and_columns_that_are_not_there_are_said(tmp_path: Path) -> None:
    for wrong in (None, {"_id": 3}, 2.5):
        with pytest.raises(UserError, match=r"line 1: .* under `positive` is no id; a string or a whole number"):
            read(tmp_path, a=write_ids(tmp_path, as_id=lambda i, wrong=wrong: wrong))  # type: ignore[misc]
    with pytest.raises(UserError, match=r"line 1: there is no column 'body', .* as the text; there are _id, title, te"):
        read(tmp_path, a=write_ids(tmp_path, text="body"))
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"lacks corpus\.jsonl"):
        read(tmp_path, a=entry("ids.jsonl", documents={"file": "corpus.jsonl", **DOCUMENTS}))


def test_an_id_that_comes_twice_with_one_text_is_one(tmp_path: Path) -> None:
    written = write_ids(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [*CORPUS, *CORPUS])
    assert len(read(tmp_path, a=written)) == len(ROWS)


def test_other_texts_behind_the_same_ids_are_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the cache of tables and by check-data."""
    caplog.set_level("INFO", logger="llm2vec")
    table = write_table(tmp_path, a=write_ids(tmp_path))
    (source,) = read_sources_file(table)
    for text, code in (("NA", 0), ("AN", 1)):
        write_jsonl(tmp_path / "corpus.jsonl", [{**CORPUS[0], "text": text}, *CORPUS[1:]])
        assert TrainingRows(tmp_path, [source])[0].positive.text == text
        assert check_data([str(tmp_path), "--sources_file", str(table)]) == code
    assert "a: changed since it was first checked" in caplog.text


def test_hold_outs_and_mined_rows_have_the_texts(tmp_path: Path) -> None:
    table = write_table(tmp_path, a=write_ids(tmp_path))
    hold_out(tmp_path, read_sources_file(table), tmp_path / "out", 1, seed=1)
    kept = TrainingRows(tmp_path / "out/train", read_sources_file(tmp_path / "out/sources.json"))
    assert len(kept) == 7 and {example[1] for example in texts(kept)} < {row["positive"] for row in ROWS}
    mine = [str(tmp_path), str(tmp_path / "mined"), "--sources_file", str(table), "--model", "random"]
    mine += ["--negatives", "2", "--relative_margin", "-9"]
    mine_command(mine)
    mined = TrainingRows(tmp_path / "mined", read_sources_file(tmp_path / "mined/sources.json"), num_negatives=2)
    assert {example[1] for example in texts(mined)} == {row["positive"] for row in ROWS}


def test_what_is_written_anew_keeps_what_its_entry_says(tmp_path: Path) -> None:
    """Each key stays in the entry of the rows that were written from a source's, or was followed in writing them."""
    followed = {
        "hub", "config", "split", "revision", "columns", "least_score", "max_rows", "positives", "documents", "queries"
    }  # fmt: skip
    kept = {
        "instruction": ["find", "seek"], "symmetric": [True, False], "num_negatives": 3, "keep_equal_negatives": True,
        "weight": 0.25, "batch_size": 4, "licence": "MIT",
    }  # fmt: skip
    assert {"file", *kept} | followed == set(KEYS_OF_SOURCE)
    (source,) = read_sources_file(write_table(tmp_path, a={"file": "a.csv", **kept}))
    assert entry_of(source, "b.jsonl") == {"file": "b.jsonl", **kept}
    (plain,) = read_sources_file(write_table(tmp_path, a={"file": "a.csv"}))
    (again,) = read_sources_file(write_table(tmp_path, a=entry_of(plain, "a.csv")))
    assert again == plain


# What is wrong


@pytest.mark.parametrize("command", [mine_command, answers_command])
@pytest.mark.parametrize("out", ["", "deeper"])
def test_what_is_read_is_not_written_over(command: Callable[[list[str]], Any], out: str, tmp_path: Path) -> None:
    """Neither in the data's own folder, nor where a source's file lies under the name of what is written."""
    for name in ("a", "deeper/b"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    table = write_table(tmp_path, a=entry("a.jsonl"), b=entry("deeper/b.jsonl"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    writer = ["--model", "random"] if command is mine_command else ["--server", "http://localhost:9/v1", "--name", "x"]
    with pytest.raises(UserError, match=f"{tmp_path / out}.* is read here, and would be written over; name another"):
        command([str(tmp_path), str(tmp_path / out), "--sources_file", str(table), *writer])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before


@pytest.mark.parametrize("name", ["BeIR/nq", "../x", "a\\b", ".hidden", ""])
def test_a_name_that_is_no_file_name_is_said(name: str, tmp_path: Path) -> None:
    """Rows of a source are written under its name."""
    with pytest.raises(UserError, match=r"the name of a source must not be empty, .*; files are named by it\."):
        read_sources_file(write_table(tmp_path, **{name: entry("a.jsonl")}))


def test_labelled_texts_are_checked_to_their_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="llm2vec")
    rows: list[dict[str, Any]] = [{"t": f"{label} {i}", "l": label} for i in range(3) for label in ("cat", "dog")]
    rows[2:2] = [{"t": " ", "l": "cat"}, {"l": "cat"}, {"t": "cat 7", "l": None}, {"t": 7, "l": "dog"}]
    for name, some in (("some", rows), ("none", rows[2:6])):
        write_jsonl(tmp_path / f"{name}.jsonl", some)
        table = write_table(tmp_path, a=entry(f"{name}.jsonl", columns={"text": "t", "label": "l"}))
        assert check_data([str(tmp_path), "--sources_file", str(table)]) == 1
    assert "some.jsonl, line 3: `text` is empty." in caplog.text
    assert "some.jsonl, line 4: there is no column 't'" in caplog.text
    found = [line.split()[:3] for line in caplog.text.splitlines() if line.startswith("a ")]
    assert found == [["a", "6", "4"], ["a", "0", "4"]] and "no two labels" not in caplog.text
    write_jsonl(tmp_path / "some.jsonl", rows[:1])
    table = write_table(tmp_path, a=entry("some.jsonl", columns={"text": "t", "label": "l"}))
    assert check_data([str(tmp_path), "--sources_file", str(table)]) == 1
    assert "some.jsonl, line 1: there are no two labels." in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"query": ["q", "r"], "positive": "d"}}, r"query names 2 columns \(q, r\); it can be one alone"),
        ({"columns": {"query": "q", "positive": "q"}}, "'q' is named twice; a column can have one role"),
        ({"columns": {"anchor": "q"}}, "'anchor' is no role of a column; known: query, positive, negative"),
        ({"columns": {"query": "q"}}, "columns must name query and positive, or text and label alone; it names query"),
        ({"columns": {"query": "q", "positive": 3}}, "positive must name a column or a list of them"),
        ({"columns": []}, "`columns` must be an object"),
        ({"least_score": 0.5}, "`least_score` must be a number, beside a `score` in columns"),
        ({"num_negatives": -1}, "`num_negatives` must be a whole number"),
        ({"config": "x"}, "`config` is for a data set of the hub"),
        ({"hub": "a/b", "file": "x"}, "or `hub` a data set"),
        ({"documents": "b.jsonl"}, "`documents` must be an object, such as"),
        ({"documents": {"file": "b.jsonl", "key": "id"}}, "documents: unknown key 'key'; known: file, hub, config"),
        ({"queries": {"id": "_id"}}, "queries: `file` must name a JSONL file"),
        ({"queries": {"file": "b", "config": "c"}}, "queries: `config` is for a data set of the hub"),
        ({"documents": {"file": "b.jsonl", "text": []}}, "documents: `id` must name a column, and `text` a column or"),
        ({"columns": {"text": "a", "label": "b"}, "documents": {"file": "b"}}, "labelled texts have no ids"),
    ],
    ids=str,
)
def test_a_wrong_entry_is_said(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"sources\.json, source 'a': .*{message}"):
        read_sources_file(write_table(tmp_path, a={"file": "a.csv", **keys}))


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    columns = {"query": "anchor", "positive": "positive"}
    written = write_form(tmp_path, "csv", ROWS) | {"columns": columns}
    with pytest.raises(UserError, match=r"a\.csv, row 1: there is no column 'anchor', .* there are query, positive, n"):
        read(tmp_path, a=written)
    rows = [{"id": "x", "text": "y"}]
    with pytest.raises(UserError, match=r"row 1: the field `query` is missing; there are id, text\."):
        read(tmp_path, a=write_form(tmp_path, "parquet", rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"query,positive\na,b,c\n", "row 1: 3 cells, but the header names 2 columns"),
        ("a.csv", b"query,query\na,b\n", "the header names the column 'query' twice"),
        ("a.csv", b'query,positive\n"a,b\n', "not valid CSV"),
        ("a.csv", b"query,positive\ncaf\xe9,b\n", "not valid UTF-8"),
        ("a.parquet", b"PAR1 no more", "not a whole Parquet file"),
        ("a.arrow", b"nothing", "not a whole Arrow file"),
        ("a.jsonl.gz", b"nothing", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"query": "a", "positive": "b"}\n' * 99, mtime=0)[:-9], "not a whole gzip file"),
    ],
)
def test_a_damaged_file_is_said(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read(tmp_path, 0, a=entry(name))


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the hub, offline; a split; a folder that is no data set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    offline = (
        r"'some/thing' could not be loaded from the hub \(.*\); a copy in the folder some/thing of the data's folder"
    )
    with pytest.raises(UserError, match=rf"sources_file: {offline}"):
        read(tmp_path, a={"hub": "some/thing"})
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict({"x": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match=r"splits: there is no split 'train'; there are x\."):
        read(tmp_path, a=entry("splits"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="lacks folder"):
        read(tmp_path, a=entry("folder"))
    with pytest.raises(UserError, match=r"nowhere is not a folder \(wanted: folder\)"):
        check_data([str(tmp_path / "nowhere"), "--sources_file", str(tmp_path / "sources.json")])


# What knows of no form


def test_checks_and_hold_outs_read_every_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="llm2vec")
    rows = [{"q": f"q{i}", "d": f"d{i}", "n": f"n{i}", "s": i / 50, "t": [0.9]} for i in range(50)]
    columns = {"query": "q", "positive": "d", "negative": "n", "pos_score": "s", "neg_scores": "t"}
    written = write_form(tmp_path, "saved", rows) | {"columns": columns, "licence": "CC0"}
    bad = [{"query": "a"}, {"query": "a", "positive": "b", "negative": "b"}]
    write_jsonl(tmp_path / "b.jsonl.gz.jsonl", bad)
    table = write_table(tmp_path, a=written, b=entry("b.jsonl.gz.jsonl"))
    assert check_data([str(tmp_path), "--sources_file", str(table), "--sources", "a"]) == 0
    assert "a: 45 rows score a negative above the positive; licence: CC0" in caplog.text
    assert check_data([str(tmp_path), "--sources_file", str(table), "--sources", "b"]) == 1
    assert "line 1: the field `positive` is missing; there are query." in caplog.text
    hold_out(tmp_path, read_sources_file(table)[:1], tmp_path / "out", 5, seed=1)
    (source,) = read_sources_file(tmp_path / "out/sources.json")
    kept = TrainingRows(tmp_path / "out/train", [source], with_scores=True)
    assert len(kept) == 45 and kept[0].scores[1] == 0.9 and kept[0].query.instruction == "find the answer"
