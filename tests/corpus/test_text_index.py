"""Search in one's own texts: passages and where they stand, what is found, and what is refused."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file, save_file

from llm2vec.choice import ModelChoice
from llm2vec.corpus import search, text_index
from llm2vec.corpus.passages import cut_into_passages, read_passages
from llm2vec.corpus.queue import alone_in
from llm2vec.corpus.text_index import INDEX_FILE, TEXTS_FILE, VECTORS_FILE, TextIndex, build_index
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.settings import EncoderSettings
from llm2vec.types import UserError

SCRIPT = Path(__file__).parents[2] / "experiments/search.py"
TEXTS = [
    f"{first} {second} {third}"
    for first in ("hello", "who", "find")
    for second in ("red", "green", "blue")
    for third in ("world", "it")
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    model = LLM2Vec(tiny_model("llama", initializer_range=0.2), family_tokenizer("llama"), template="llama3")
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def made(model_folder: Path) -> Path:
    """A folder with a JSONL file of texts and an index of them."""
    rows = [{"id": f"t{number}", "title": "world" * (number % 2), "text": text} for number, text in enumerate(TEXTS)]
    file = write_jsonl(model_folder.parent / "made/texts.jsonl", rows)
    build_index(file, file.with_name("index"), ModelChoice(str(model_folder)))
    return file.parent


@pytest.fixture
def texts_file(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made / "texts.jsonl", tmp_path))


@pytest.fixture
def index(made: Path, texts_file: Path) -> TextIndex:
    return TextIndex(shutil.copytree(made / "index", texts_file.with_name("index")))


def embedded() -> list[str]:
    """What the model reads of each row."""
    return [("world " if number % 2 else "") + text for number, text in enumerate(TEXTS)]


def other_model(model_folder: Path, to: Path) -> Path:
    shutil.copytree(model_folder, to)
    weights = load_file(to / "model.safetensors")
    weights["norm.weight"] += 1e-3
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    (to / "run.json").unlink()
    return to


# --- passages ---


def test_paragraphs_stay_whole_as_long_as_they_fit() -> None:
    text = "one\ntwo\n\n\nthree\n\nfour four four\n"
    assert list(cut_into_passages(text, 14)) == [(1, "one\ntwo\n\nthree"), (7, "four four four")]
    assert list(cut_into_passages(text, 13)) == [(1, "one\ntwo"), (5, "three"), (7, "four four"), (7, "four")]
    assert list(cut_into_passages(text, 100)) == [(1, "one\ntwo\n\nthree\n\nfour four four")]


def test_a_long_paragraph_is_cut_between_lines_and_a_long_line_between_words() -> None:
    assert list(cut_into_passages("    aaa\n  bbb\n ccc\n", 13)) == [(1, "    aaa\n  bbb"), (3, " ccc")]
    assert list(cut_into_passages("\naa bb cc\ndd", 5)) == [(2, "aa bb"), (2, "cc\ndd")]
    assert list(cut_into_passages("abcdefgh", 3)) == [(1, "abc"), (1, "def"), (1, "gh")]


def test_there_is_no_passage_where_there_is_no_text() -> None:
    assert list(cut_into_passages("", 10)) == list(cut_into_passages("\n \n\t\n", 10)) == []


def test_nothing_is_lost_and_every_line_number_is_right() -> None:
    """Against the plain statement of what a passage is, on random texts."""
    random = np.random.default_rng(0)
    for most in (7, 20, 60):
        words = random.choice(["a", "bb", "ccc ccc", "dddddddddd", "", "", "  "], size=120)
        text = "\n".join(words)
        passages = list(cut_into_passages(text, most))
        assert "".join("".join(part.split()) for _, part in passages) == "".join(text.split())
        for line, part in passages:
            assert len(part) <= most and part.strip()
            assert part.split("\n")[0].strip() in text.split("\n")[line - 1]
        lines = [line for line, _ in passages]
        assert lines == sorted(lines)


def test_a_folder_is_read_in_order_without_what_is_hidden_or_no_text(tmp_path: Path, caplog: Any) -> None:
    for name in ("b.md", "a/z.py", "a/b.rst", "c.txt", ".git/x.md", "a/.venv/y.py", "d.json", "e.md~"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"\n\n{name}\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    passages = read_passages(tmp_path, 100)
    assert [p.where for p in passages] == ["a/b.rst:3", "a/z.py:3", "b.md:3", "c.txt:3"]
    assert [p.text for p in passages] == ["a/b.rst", "a/z.py", "b.md", "c.txt"]
    assert "1 files cannot be read or are not UTF-8 and are left out, such as" in caplog.text
    assert "latin.txt" in caplog.text


def test_a_link_to_nowhere_and_a_byte_order_mark_stop_nobody(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / ".#notes.md").symlink_to(tmp_path / "somebody@somewhere.1234")  # as Emacs marks a file that it edits
    (tmp_path / "notes.md").write_bytes(b"\xef\xbb\xbfhello\n")
    assert [(p.where, p.text) for p in read_passages(tmp_path, 100)] == [("notes.md:1", "hello")]
    assert "1 files cannot be read" in caplog.text and ".#notes.md" in caplog.text


def test_a_file_name_that_is_not_utf8_can_be_indexed(tmp_path: Path, model_folder: Path) -> None:
    source = tmp_path / "notes"
    source.mkdir()
    Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.md")).write_text("hello", encoding="utf-8")
    index = build_index(source, tmp_path / "index", ModelChoice(str(model_folder)))
    (hits,) = index.search(index.load_model(), ["hello"], 1)
    assert hits[0].passage.where == "caf?.md:1"


def test_rows_of_a_jsonl_file_have_a_place(tmp_path: Path) -> None:
    rows: list[Any] = [{"id": 7, "text": "x"}, {"_id": "d/7", "text": "y", "title": "T"}]
    rows += [{"text": "z", "title": None}, {"id": None, "text": ""}]
    passages = read_passages(write_jsonl(tmp_path / "rows.jsonl", rows), 1)
    assert [p.where for p in passages] == ["7", "d/7", "rows.jsonl:3", "rows.jsonl:4"]
    assert [p.embedded for p in passages] == ["x", "T y", "z", ""]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "rows.jsonl has no line."),
        ('{"text": "a"}\n{"text": 3}\n', "line 2: `text` must be a string, not a int."),
        ('{"text": "a", "title": []}\n{"text": "a", "title": ["b"]}\n', "line 2: `title` must be a string"),
        ('{"body": "a"}\n', "line 1: there is no `text`; there are body."),
        ('{"text": "a"\n', "line 1: not valid JSON"),
        ('["a"]\n', "line 1: a JSON object is needed, not a list."),
        ('{"text": "\\ud800"}\n', "line 1: half a surrogate pair"),
        ('{"id": "\\ud800", "text": "a"}\n', "line 1: half a surrogate pair"),
        ('{"id": ["a"], "text": "a"}\n', "line 1: `id` must be a string or a whole number, not a list."),
        ('{"_id": 1.5, "text": "a"}\n', "line 1: `_id` must be a string or a whole number, not a float."),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_passages(tmp_path / "rows.jsonl", 100)
    assert said in str(error.value)


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no text in a file that ends in \.md, \.py, \.rst, \.txt\."):
        read_passages(tmp_path, 100)
    with pytest.raises(UserError, match="There is no folder or file"):
        read_passages(tmp_path / "nothing", 100)
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match=r"a folder of text files or a \.jsonl file is needed"):
        read_passages(tmp_path / "a.csv", 100)


def test_passages_are_no_longer_than_what_the_model_reads() -> None:
    assert text_index.passage_characters(EncoderSettings(max_length=512)) == 1000
    assert text_index.passage_characters(EncoderSettings(max_length=64)) == 192
    assert text_index.passage_characters(EncoderSettings(max_length=512, doc_max_length=100)) == 300


# --- search ---


def test_hits_are_those_of_a_plain_loop(index: TextIndex, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every score by hand, in double precision, over vectors of one text at a time; blocks of 5 passages."""
    monkeypatch.setattr(search, "BLOCK", 5)
    model = LLM2Vec.from_pretrained(str(model_folder))

    def unit(entry: Any, side: Any) -> Any:
        vector = np.asarray(model.encode([entry], show_progress_bar=False, side=side)[0], dtype=np.float64)
        return vector / np.sqrt((vector**2).sum())

    documents = [unit(text, "document") for text in embedded()]
    queries = ["who wrote it", "red question"]
    found = index.search(index.load_model(), queries, 7, "find the answer")
    for query, hits in zip(queries, found, strict=True):
        vector = unit(["find the answer", query], "query")
        scores = [sum(a * b for a, b in zip(vector, document, strict=True)) for document in documents]
        best = sorted(range(len(TEXTS)), key=lambda number: -scores[number])[:7]
        assert [hit.passage.where for hit in hits] == [f"t{number}" for number in best]
        assert [hit.passage.embedded for hit in hits] == [embedded()[number] for number in best]
        np.testing.assert_allclose([hit.score for hit in hits], [scores[number] for number in best], atol=2e-6)


def test_a_small_index_gives_what_it_has_and_ties_go_to_the_earlier(tmp_path: Path, model_folder: Path) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in ("red", "hello", "red")])
    index = build_index(file, tmp_path / "index", ModelChoice(str(model_folder)))
    (hits,) = index.search(index.load_model(), ["red"], 10)
    assert sorted(hit.passage.where[-1] for hit in hits) == ["1", "2", "3"]
    assert index.search(index.load_model(), ["red"], 10**13) == [hits], "takes no more memory than the index has"
    red = [hit for hit in hits if hit.passage.text == "red"]
    assert [hit.passage.where for hit in red] == ["texts.jsonl:1", "texts.jsonl:3"] and red[0].score == red[1].score


def test_texts_come_back_as_they_were(tmp_path: Path, model_folder: Path) -> None:
    texts = ["é\n\u2028 zwei", "\n  c \n\n", "日本"]
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    index = build_index(file, tmp_path / "index", ModelChoice(str(model_folder)))
    (hits,) = index.search(index.load_model(), ["red"], 3)
    assert sorted(hit.passage.text for hit in hits) == sorted(texts)


def test_half_weights_are_stored_in_half(tmp_path: Path, texts_file: Path, model_folder: Path) -> None:
    index = build_index(texts_file, tmp_path / "half", ModelChoice(str(model_folder), torch_dtype="bfloat16"))
    stored = load_file(tmp_path / "half" / VECTORS_FILE)["vectors"]
    assert stored.dtype == torch.float16
    model = index.load_model()
    assert next(model.parameters()).dtype == torch.bfloat16
    direct = torch.nn.functional.normalize(model.encode(embedded(), show_progress_bar=False), dim=-1)
    torch.testing.assert_close(stored.float(), direct, rtol=2**-10, atol=1e-6)
    about = json.loads((tmp_path / "half" / INDEX_FILE).read_text(encoding="utf-8"))
    assert (about["dtype"], about["dimension"], about["passages"]) == ("float16", 32, len(TEXTS))


# --- which model ---


def test_an_adapter_is_part_of_the_model(tmp_path: Path, texts_file: Path, model_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = LLM2Vec.from_pretrained(str(model_folder))
    adapted = get_peft_model(model.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter = LLM2Vec(adapted, model.tokenizer, template="llama3", parent_adapters=[])
    adapter.save(tmp_path / "adapter")
    choice = ModelChoice(str(model_folder), (str(tmp_path / "adapter"),))
    assert choice.revision() != ModelChoice(str(model_folder)).revision()
    assert ModelChoice(str(tmp_path / "adapter")).revision() == choice.revision()  # it records its base
    index = build_index(texts_file, tmp_path / "index", choice)
    stored = load_file(tmp_path / "index" / VECTORS_FILE)["vectors"]
    direct = torch.nn.functional.normalize(adapter.eval().encode([TEXTS[0]], show_progress_bar=False), dim=-1)
    torch.testing.assert_close(stored[:1], direct, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="was made by another model"):
        index.load_model(ModelChoice(str(model_folder)))


def test_another_model_is_refused_and_a_moved_one_is_not(index: TextIndex, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was made by another model than .*/other is now"):
        index.load_model(ModelChoice(str(other_model(model_folder, tmp_path / "other"))))
    with pytest.raises(UserError, match="or another dtype of it"):
        index.load_model(ModelChoice(str(model_folder), torch_dtype="bfloat16"))
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    assert isinstance(index.load_model(ModelChoice(str(moved))), LLM2Vec)


def test_a_model_that_was_trained_further_is_refused(tmp_path: Path, texts_file: Path, model_folder: Path) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    index = build_index(texts_file, tmp_path / "index", ModelChoice(str(model)))
    changed = other_model(model_folder, tmp_path / "changed")
    shutil.copy(changed / "model.safetensors", model / "model.safetensors")
    (model / "run.json").unlink()
    with pytest.raises(UserError, match="make the index again"):
        index.load_model()


def test_changed_settings_are_another_model(tmp_path: Path, model_folder: Path) -> None:
    changed = shutil.copytree(model_folder, tmp_path / "changed")
    settings = json.loads((changed / "llm2vec_config.json").read_text(encoding="utf-8"))
    (changed / "llm2vec_config.json").write_text(json.dumps({**settings, "pooling_mode": "last"}), encoding="utf-8")
    (changed / "run.json").unlink()
    assert ModelChoice(str(changed)).revision() != ModelChoice(str(model_folder)).revision()


# --- the folder ---


@pytest.mark.parametrize("name", [TEXTS_FILE, VECTORS_FILE])
def test_an_index_that_was_cut_short_is_refused(index: TextIndex, name: str) -> None:
    file = index.folder / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"was cut short: {name} is not .* bytes long"):
        TextIndex(index.folder)
    file.unlink()
    with pytest.raises(UserError, match="was cut short"):
        TextIndex(index.folder)


def test_a_folder_that_is_no_index_is_refused_and_left_alone(
    tmp_path: Path, texts_file: Path, model_folder: Path
) -> None:
    with pytest.raises(UserError, match=r"is no index: it holds no index\.json"):
        TextIndex(tmp_path)
    with pytest.raises(UserError, match="is there and is no index"):
        build_index(texts_file, tmp_path, ModelChoice(str(model_folder)))
    assert [path.name for path in tmp_path.iterdir()] == [texts_file.name]


def test_an_index_is_replaced_whole_or_not_at_all(
    index: TextIndex, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in index.folder.iterdir()}
    file = write_jsonl(tmp_path / "new.jsonl", [{"text": "hello"}])
    write_json = text_index.write_json

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(text_index, "write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        build_index(file, index.folder, ModelChoice(str(model_folder)))
    assert {file.name: file.read_bytes() for file in index.folder.iterdir()} == before
    monkeypatch.setattr(text_index, "write_json", write_json)
    assert len(build_index(file, index.folder, ModelChoice(str(model_folder)))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"new.jsonl", "texts.jsonl", "index"}


def test_an_open_index_stays_what_it_was_when_it_is_replaced(
    index: TextIndex, tmp_path: Path, model_folder: Path
) -> None:
    """Vectors and texts belong together, also for a program that has it open."""
    model = index.load_model()
    before = index.search(model, ["find it"], 5)
    file = write_jsonl(tmp_path / "new.jsonl", [{"text": f"longer than the others before {i}"} for i in range(30)])
    build_index(file, index.folder, ModelChoice(str(model_folder)))
    assert index.search(model, ["find it"], 5) == before
    assert len(TextIndex(index.folder)) == 30


def test_two_processes_do_not_write_one_index(
    index: TextIndex, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused before it encodes anything, and does not disturb the first."""
    with alone_in(tmp_path / ".index.writing", "indexing"):
        (tmp_path / ".index.writing" / TEXTS_FILE).write_text("of the other process", encoding="utf-8")
        with monkeypatch.context() as patched, pytest.raises(UserError, match="another indexing is at work here"):
            patched.setattr(ModelChoice, "load", lambda _: pytest.fail("it encodes"))
            build_index(texts_file, index.folder, index.encoder)
        assert (tmp_path / ".index.writing" / TEXTS_FILE).read_text(encoding="utf-8") == "of the other process"
    (tmp_path / ".index.writing" / ".index.json.123").touch()  # of a process that was killed
    (index.folder / ".lock").touch()  # of another one
    assert len(build_index(texts_file, index.folder, index.encoder)) == len(TEXTS)
    assert {file.name for file in index.folder.iterdir()} == {INDEX_FILE, TEXTS_FILE, VECTORS_FILE}
    assert not (tmp_path / ".index.writing").exists()


def test_a_process_that_begins_when_another_ends_keeps_its_place(
    index: TextIndex, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the renaming of the new index and the end of the process that made it, the next one may begin."""
    place, rmtree = tmp_path / ".index.writing", shutil.rmtree

    def next_begins(path: Path, **options: Any) -> None:
        if path.name == ".index.before" and not place.exists() and (index.folder / INDEX_FILE).exists():
            place.mkdir()
            (place / ".lock").touch()
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", next_begins)
    build_index(texts_file, index.folder, index.encoder)
    assert (place / ".lock").is_file()


def test_a_place_that_cannot_be_written_is_said_before_anything_is_encoded(
    texts_file: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelChoice, "load", lambda _: pytest.fail("it encodes"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/\.index\.writing cannot be made or written to \(Not a directory\)"):
        build_index(texts_file, tmp_path / "file" / "index", ModelChoice(str(model_folder)))


@pytest.mark.parametrize(
    "about", [{"files": []}, {"files": {"x": 1}}, {"encoder": {}}, {"encoder": "base"}, {"revision": None}]
)
def test_an_index_json_of_another_form_is_refused(index: TextIndex, about: dict[str, Any]) -> None:
    file = index.folder / INDEX_FILE
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **about}), encoding="utf-8")
    with pytest.raises(UserError, match=r"is no index: its index\.json is another program's"):
        TextIndex(index.folder)


@pytest.mark.parametrize("command", ["query", "index"])
def test_an_index_comes_back_where_a_process_was_killed_between_the_renames(
    index: TextIndex, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    file = write_jsonl(tmp_path / "new.jsonl", [{"text": "hello"}])
    before, rename = len(index), Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == ".index.writing":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        build_index(file, index.folder, ModelChoice(str(model_folder)))
    assert not index.folder.exists()
    if command == "query":
        assert len(TextIndex(index.folder)) == before
        return
    with pytest.raises(UserError, match="no folder or file"):
        build_index(tmp_path / "nowhere", index.folder, ModelChoice(str(model_folder)))
    assert len(TextIndex(index.folder)) == before
    assert len(build_index(file, index.folder, ModelChoice(str(model_folder)))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"new.jsonl", "texts.jsonl", "index"}


@pytest.mark.parametrize("kept", ["notes.txt", VECTORS_FILE])
def test_another_programs_folder_with_an_index_json_is_left_alone(
    tmp_path: Path, texts_file: Path, model_folder: Path, kept: str
) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / INDEX_FILE).write_text('{"name": "site"}', encoding="utf-8")
    (folder / kept).write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match=r"is of no index|another program's"):
        build_index(texts_file, folder, ModelChoice(str(model_folder)))
    with pytest.raises(UserError, match=r"is no index: its index\.json is another program's"):
        TextIndex(folder)
    assert (folder / kept).read_text(encoding="utf-8") == "precious"


def test_what_was_put_into_an_index_is_not_removed_with_it(index: TextIndex, texts_file: Path) -> None:
    (index.folder / "notes.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds 'notes\.txt', which is of no index"):
        build_index(texts_file, index.folder, index.encoder)
    assert (index.folder / "notes.txt").is_file()


def test_an_index_that_was_cut_short_can_be_made_again(index: TextIndex, texts_file: Path) -> None:
    (index.folder / VECTORS_FILE).write_bytes(b"")
    with pytest.raises(UserError, match="make the index again"):
        TextIndex(index.folder)
    assert len(build_index(texts_file, index.folder, index.encoder)) == len(TEXTS)


# --- the script ---


def run(*arguments: object) -> None:
    runpy.run_path(str(SCRIPT))["main"]([str(argument) for argument in arguments])


def test_the_script_finds_lines_of_files(
    tmp_path: Path, model_folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("# hello\n\nwho wrote it\n" + "\n" + "red " * 249 + "\n", encoding="utf-8")
    run("index", tmp_path / "notes", tmp_path / "index", "--model", model_folder)
    assert capsys.readouterr().out == f"{tmp_path / 'index'}: 2 passages\n"
    monkeypatch.chdir(tmp_path)
    run("query", "index", "hello", "--top_k", 1)
    line = capsys.readouterr().out.splitlines()[0].split()
    assert -1 <= float(line[0]) <= 1 and line[1] in ("a.md:1", "a.md:5")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n  find it \n"))
    run("query", "index", "--instruction", "find the answer")
    asked = capsys.readouterr().out.strip().split("\n\n")
    assert [block.split("\n")[0] for block in asked] == ["hello", "find it"]
    assert all(len(block.split("\n")) == 3 for block in asked)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["query", "index", " "], "The query is empty."),
        (["query", "index", "\udcff"], "TEXT: half a surrogate pair in a text, or not UTF-8"),
        (["query", "index", "red", "--top_k", "0"], "--top_k is 0; give a number above 0."),
        (["query", "index", "red", "--peft", "x"], "--peft is given without --model"),
        (["query", "nowhere", "red"], "nowhere is no index"),
        (["index", "nowhere", "new", "--model", "MODEL"], "There is no folder or file nowhere."),
        (["index", "texts.jsonl", "new", "--model", "a/b/c"], "'a/b/c' is neither a folder nor the name"),
        (["index", "texts.jsonl", "new", "--model", "a/b"], "There is no model a/b"),
        (["demo"], "There is no model output/quickstart/anchor; run `make quickstart` first."),
    ],
)
def test_what_is_wrong_is_one_sentence(
    index: TextIndex, model_folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(index.folder.parent)
    with pytest.raises(UserError) as error:
        run(*[str(model_folder) if argument == "MODEL" else argument for argument in arguments])
    assert str(error.value).startswith(said)
    assert not Path("new").exists()


def test_no_query_at_all_is_said(index: TextIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n\n"))
    with pytest.raises(UserError, match="There is no query"):
        run("query", index.folder)


def test_control_characters_of_a_passage_do_not_reach_the_terminal(
    tmp_path: Path, model_folder: Path, capsys: Any
) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", [{"id": "a\x1b]0;b", "text": "red\x1b[2J\tworld"}])
    run("index", file, tmp_path / "index", "--model", model_folder)
    capsys.readouterr()
    run("query", tmp_path / "index", "red")
    line = capsys.readouterr().out
    assert "a\ufffd]0;b" in line and "red\ufffd[2J" in line and "\x1b" not in line and "\t" not in line


@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])  # as Python opens it, by the locale
def test_queries_that_are_not_utf8_are_named(index: TextIndex, monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    bad = io.TextIOWrapper(io.BytesIO(b"red\n\xff\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", bad)
    with pytest.raises(UserError, match="standard input, line 2: half a surrogate pair in a text, or not UTF-8"):
        run("query", index.folder)


def test_the_demo_indexes_docstrings_once(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "output/quickstart/anchor")
    Path("train_configs/quickstart").mkdir(parents=True)
    Path("train_configs/quickstart/sources.json").write_text('{"docstrings": {"instruction": "find"}}')
    body = "The answer is whatever the first caller of this method has put there before it was called again."
    Path("package").mkdir()
    for name in ("one", "two"):
        Path(f"package/{name}.py").write_text(f'def {name}():\n    """Wait for the {name}.\n\n    {name} {body}"""\n')
    script = runpy.run_path(str(SCRIPT))
    script["main"].__globals__["installed_roots"] = lambda: {"root": tmp_path / "package"}
    for _ in range(2):
        script["main"](["demo", "wait for the one"])
    captured = capsys.readouterr()
    assert captured.err.count("reading the docstrings") == 1
    lines = captured.out.splitlines()
    assert len(lines) == 4 and lines[:2] == lines[2:]
    assert {line.split()[1] for line in lines} == {"root/one.py:1", "root/two.py:1"}
    assert all(body[:40] in line for line in lines)
    Path("output/quickstart/docstring-index", VECTORS_FILE).write_bytes(b"")
    script["main"](["demo", "wait for the one"])
    assert capsys.readouterr().out.splitlines() == lines[:2], "an index that was cut short is made anew"
