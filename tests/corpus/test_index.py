"""Search in one's own texts: passages and where they stand, what is found, and what is refused."""

from __future__ import annotations

import io
import json
import os
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
from llm2vec.commands.search import main
from llm2vec.corpus import search
from llm2vec.corpus.index import TEXTS_FILE, VECTORS_FILE, TextIndex, build_index
from llm2vec.corpus.passages import _cut, passages_of
from llm2vec.files import alone_in
from llm2vec.llm2vec import LLM2Vec
from llm2vec.types import UserError

TEXTS = [
    f"{first} {second} {third}"
    for first in ("hello", "who", "find")
    for second in ("red", "green", "blue")
    for third in ("world", "it")
]


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


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
    assert list(_cut(text, 14)) == [(1, "one\ntwo\n\nthree"), (7, "four four four")]
    assert list(_cut(text, 13)) == [(1, "one\ntwo"), (5, "three"), (7, "four four"), (7, "four")]
    assert list(_cut(text, 100)) == [(1, "one\ntwo\n\nthree\n\nfour four four")]


def test_a_long_paragraph_is_cut_between_words() -> None:
    assert list(_cut("\naa bb cc\ndd", 5)) == [(2, "aa bb"), (2, "cc dd")]
    assert list(_cut("abcdefgh", 3)) == [(1, "abc"), (1, "def"), (1, "gh")]
    assert list(_cut("aa bb c\n\nd\n\ne", 5)) == [(1, "aa bb"), (1, "c\n\nd"), (5, "e")]


def test_there_is_no_passage_where_there_is_no_text() -> None:
    assert list(_cut("", 10)) == list(_cut("\n \n\t\n", 10)) == []


def test_nothing_is_lost_and_every_passage_begins_in_the_paragraph_of_its_line() -> None:
    """On random texts."""
    random = np.random.default_rng(0)
    for most in (7, 20, 60):
        words = random.choice(["a", "bb", "ccc ccc", "dddddddddd", "", "", "  "], size=120)
        text = "\n".join(words)
        passages = list(_cut(text, most))
        assert "".join("".join(part.split()) for _, part in passages) == "".join(text.split())
        for line, part in passages:
            assert len(part) <= most and part.strip()
            paragraph = [*text.split("\n")[line - 1 :], ""]
            paragraph = paragraph[: next(i for i, one in enumerate(paragraph) if not one.strip())]
            assert "".join(part.split("\n\n")[0].split()) in "".join("".join(paragraph).split())
        lines = [line for line, _ in passages]
        assert lines == sorted(lines)


def test_a_folder_is_read_in_order_without_what_is_hidden_or_no_text(tmp_path: Path, caplog: Any) -> None:
    for name in ("b.md", "a/z.py", "a/b.rst", "c.TXT", ".git/x.md", "a/.venv/y.py", "d.json", "e.md~"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"\n\n{name}\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    passages = list(passages_of(tmp_path, 100))
    assert [p["where"] for p in passages] == ["a/b.rst:3", "a/z.py:3", "b.md:3", "c.TXT:3"]
    assert [p["text"] for p in passages] == ["a/b.rst", "a/z.py", "b.md", "c.TXT"]
    assert caplog.messages == ["'latin.txt' cannot be read or is not UTF-8, and is left out"]


def test_a_link_to_nowhere_and_a_byte_order_mark_stop_nobody(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".#notes.md").symlink_to(tmp_path / "somebody@somewhere.1234")  # as Emacs marks a file that it edits
    (tmp_path / "notes.md").write_bytes(b"\xef\xbb\xbfhello\n")
    assert [(p["where"], p["text"]) for p in passages_of(tmp_path, 100)] == [("notes.md:1", "hello")]
    assert caplog.messages == ["'gone.md' cannot be read or is not UTF-8, and is left out"]


def test_a_file_name_that_is_not_utf8_can_be_indexed(tmp_path: Path, model_folder: Path, capsys: Any) -> None:
    source = tmp_path / "notes"
    source.mkdir()
    Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.md")).write_text("hello", encoding="utf-8")
    run("index", source, tmp_path / "index", "--model", model_folder)
    capsys.readouterr()
    run("query", tmp_path / "index", "hello")
    assert "caf\ufffd.md:1" in capsys.readouterr().out


def test_rows_of_a_jsonl_file_have_a_place(tmp_path: Path) -> None:
    rows: list[Any] = [{"id": 7, "text": "x"}, {"_id": "d/7", "text": "y", "title": "T"}]
    rows += [{"text": "z", "title": None}, {"id": None, "text": ""}]
    passages = [tuple(row.values()) for row in passages_of(write_jsonl(tmp_path / "rows.jsonl", rows), 1)]
    assert passages == [("7", "", "x"), ("d/7", "T", "y"), ("rows.jsonl:3", "", "z"), ("rows.jsonl:4", "", "")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": 3}\n', "line 2: `text` must be a string"),
        ('{"text": "a", "title": []}\n{"text": "a", "title": ["b"]}\n', "line 2: `text` must be a string, and `title`"),
        ('{"body": "a"}\n', "line 1: `text` must be a string"),
        ('{"text": "a"\n', "line 1: not valid JSON"),
        ('["a"]\n', "line 1: a JSON object is needed, not a list."),
        ('{"text": "\\ud800"}\n', "line 1: `text` holds half a surrogate pair"),
        ('{"id": "\\ud800", "text": "a"}\n', "line 1: `text` holds half a surrogate pair"),
        ('{"id": ["a"], "text": "a"}\n', "line 1: `id` must be a string or a whole number, not ['a']."),
        ('{"_id": 1.5, "text": "a"}\n', "line 1: `id` must be a string or a whole number, not 1.5."),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        list(passages_of(tmp_path / "rows.jsonl", 100))
    assert said in str(error.value)


def test_a_source_without_text_is_refused(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.csv").touch()
    for name, said in (
        ("empty", r"empty has no text: no line, or no text file \(\.md, \.py, \.rst, \.txt\) that holds any"),
        ("empty.jsonl", "has no text"),
        ("nothing", r"nothing: a folder of text files or a \.jsonl file is needed"),
        ("a.csv", r"a folder of text files or a \.jsonl file is needed"),
    ):
        with pytest.raises(UserError, match=said):
            build_index(tmp_path / name, tmp_path / "index", ModelChoice(str(model_folder)))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(("limits", "most"), [({}, 1000), ({"max_length": 64}, 192), ({"doc_max_length": 100}, 300)])
def test_passages_are_no_longer_than_what_the_model_reads(
    tmp_path: Path, model_folder: Path, limits: dict[str, int], most: int
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    settings = json.loads((model / "llm2vec_config.json").read_text(encoding="utf-8"))
    (model / "llm2vec_config.json").write_text(json.dumps({**settings, **limits}), encoding="utf-8")
    (model / "run.json").unlink()
    source = tmp_path / "notes"
    source.mkdir()
    (source / "a.txt").write_text("red " * 1000, encoding="utf-8")
    build_index(source, tmp_path / "index", ModelChoice(str(model)))
    texts = [json.loads(line)["text"] for line in (tmp_path / "index" / TEXTS_FILE).read_text().splitlines()]
    assert most - 4 <= max(map(len, texts)) <= most


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
        assert [hit.where for hit in hits] == [f"t{number}" for number in best]
        assert [f"{hit.title} {hit.text}".strip() for hit in hits] == [embedded()[number] for number in best]
        np.testing.assert_allclose([hit.score for hit in hits], [scores[number] for number in best], atol=2e-6)


def test_a_small_index_gives_what_it_has_and_ties_go_to_the_earlier(tmp_path: Path, model_folder: Path) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in ("red", "hello", "red")])
    build_index(file, tmp_path / "index", ModelChoice(str(model_folder)))
    index = TextIndex(tmp_path / "index")
    (hits,) = index.search(index.load_model(), ["red"], 10)
    assert sorted(hit.where[-1] for hit in hits) == ["1", "2", "3"]
    assert index.search(index.load_model(), ["red"], 10**13) == [hits], "takes no more memory than the index has"
    red = [hit for hit in hits if hit.text == "red"]
    assert [hit.where for hit in red] == ["texts.jsonl:1", "texts.jsonl:3"] and red[0].score == red[1].score


def test_a_model_on_the_cpu_searches_there(index: TextIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU."""
    model = index.load_model()
    expected = index.search(model, ["red"], 3)
    model.placed = True  # as with a device map
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert index.search(model, ["red"], 3) == expected


def test_texts_come_back_as_they_were(tmp_path: Path, model_folder: Path) -> None:
    texts = ["é\n\u2028 zwei", "\n  c \n\n", "日本"]
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    build_index(file, tmp_path / "index", ModelChoice(str(model_folder)))
    index = TextIndex(tmp_path / "index")
    (hits,) = index.search(index.load_model(), ["red"], 3)
    assert sorted(hit.text for hit in hits) == sorted(texts)


def test_half_weights_are_stored_in_half(tmp_path: Path, texts_file: Path, model_folder: Path) -> None:
    build_index(texts_file, tmp_path / "half", ModelChoice(str(model_folder), torch_dtype="bfloat16"))
    index = TextIndex(tmp_path / "half")
    stored = load_file(tmp_path / "half" / VECTORS_FILE)["vectors"]
    assert stored.dtype == torch.float16
    model = index.load_model()
    assert next(model.parameters()).dtype == torch.bfloat16
    direct = torch.nn.functional.normalize(model.encode(embedded(), show_progress_bar=False), dim=-1)
    torch.testing.assert_close(stored.float(), direct, rtol=2**-10, atol=1e-6)


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
    build_index(texts_file, tmp_path / "index", choice)
    index = TextIndex(tmp_path / "index")
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
    build_index(texts_file, tmp_path / "index", ModelChoice(str(model)))
    index = TextIndex(tmp_path / "index")
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
def test_an_index_that_was_cut_short_is_refused_and_can_be_made_again(
    index: TextIndex, texts_file: Path, name: str
) -> None:
    file = index.folder / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="make the index again"):
        TextIndex(index.folder)
    assert build_index(texts_file, index.folder, index.model) == len(TEXTS)
    TextIndex(index.folder)
    file.unlink()
    with pytest.raises(UserError, match=r"is no index: it does not hold both"):
        TextIndex(index.folder)


@pytest.mark.parametrize("kept", [TEXTS_FILE, VECTORS_FILE])
def test_files_of_two_indexes_are_not_taken_for_one(
    index: TextIndex, tmp_path: Path, model_folder: Path, kept: str
) -> None:
    """As after a start that was killed between the two, or beside another one; of as many texts as well."""
    file = write_jsonl(tmp_path / "new.jsonl", [{"text": "hello"} for _ in TEXTS])
    before = (index.folder / kept).read_bytes()
    build_index(file, index.folder, ModelChoice(str(model_folder)))
    (index.folder / kept).write_bytes(before)
    with pytest.raises(UserError, match=r"the vectors are not of this texts\.jsonl; make the index again"):
        TextIndex(index.folder)


def test_a_folder_that_is_no_index_is_refused_and_left_alone(
    tmp_path: Path, texts_file: Path, model_folder: Path
) -> None:
    with pytest.raises(UserError, match=r"is no index: it does not hold both"):
        TextIndex(tmp_path)
    before = texts_file.read_bytes()  # a file of an index's name
    for folder in (tmp_path, texts_file):
        with pytest.raises(UserError, match="is there and is no index"):
            build_index(texts_file, folder, ModelChoice(str(model_folder)))
    assert [path.name for path in tmp_path.iterdir()] == [texts_file.name] and texts_file.read_bytes() == before


def test_vectors_of_another_program_are_no_index(index: TextIndex) -> None:
    save_file({"vectors": torch.zeros(2, 2)}, index.folder / VECTORS_FILE)
    with pytest.raises(UserError, match="make the index again"):
        TextIndex(index.folder)


def test_an_index_is_replaced_and_nothing_is_left_behind(
    index: TextIndex, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "new.jsonl", [{"text": "hello"}])
    before = {file.name: file.read_bytes() for file in index.folder.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("llm2vec.corpus.index.write_text", fail)
        with pytest.raises(UserError, match=r"index cannot be written to \(No space left on device\)"):
            build_index(file, index.folder, ModelChoice(str(model_folder)))
    assert {file.name: file.read_bytes() for file in index.folder.iterdir()} == before
    assert build_index(file, index.folder, ModelChoice(str(model_folder))) == 1
    assert len(TextIndex(index.folder).search(index.load_model(), ["red"], 5)[0]) == 1
    assert {path.name for path in index.folder.iterdir()} == {VECTORS_FILE, TEXTS_FILE}


def test_a_second_start_is_refused_and_a_killed_one_is_no_hindrance(
    texts_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "held"
    with alone_in(folder, "indexing"):
        with pytest.raises(UserError, match="another indexing is at work here"):
            build_index(texts_file, folder, ModelChoice(str(model_folder)))
        (folder / f".{VECTORS_FILE}.123").touch()  # as a kill leaves it, beside the lock
    assert build_index(texts_file, folder, ModelChoice(str(model_folder))) > 0


def test_a_flipped_bit_of_a_vector_is_noticed(index: TextIndex) -> None:
    file = index.folder / VECTORS_FILE
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is not what was written; make the index again"):
        TextIndex(index.folder)


def test_a_kill_between_the_two_files_is_no_hindrance(texts_file: Path, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / f".{VECTORS_FILE}.77").touch()
    (folder / TEXTS_FILE).touch()
    assert build_index(texts_file, folder, ModelChoice(str(model_folder))) == len(TEXTS)
    assert {path.name for path in folder.iterdir()} == {VECTORS_FILE, TEXTS_FILE}


def test_a_pipe_or_a_device_among_the_texts_is_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "a.txt").write_text("hello", encoding="utf-8")
    assert [passage["text"] for passage in passages_of(tmp_path, 100)] == ["hello"]


def test_a_model_of_weights_that_are_no_numbers_is_refused(
    texts_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(model_folder, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    read = family_tokenizer("llama")(embedded()[0], add_special_tokens=False)["input_ids"]
    weights["embed_tokens.weight"][read[-1]] = torch.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"The vector of '.*' has a number that is not finite"):
        build_index(texts_file, tmp_path / "none", ModelChoice(str(damaged)))
    assert not (tmp_path / "none").exists()


# --- the command ---


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
        (["query", "index", "\udcff"], "command line: `TEXT` holds half a surrogate pair, or is not UTF-8"),
        (["query", "index", "red", "--top_k", "0"], "--top_k is 0; give a number above 0."),
        (["query", "index", "red", "--peft", "x"], "--peft is given without --model"),
        (["query", "nowhere", "red"], "nowhere is no index"),
        (["index", "nowhere", "new", "--model", "MODEL"], "nowhere: a folder of text files or a .jsonl file is needed"),
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
    with pytest.raises(UserError, match="standard input, line 2: `query` holds half a surrogate pair, or is not UTF-8"):
        run("query", index.folder)


def test_the_demo_indexes_held_out_docstrings_once(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "output/quickstart/anchor")
    Path("train_configs/quickstart").mkdir(parents=True)
    Path("train_configs/quickstart/sources.json").write_text('{"docstrings": {"instruction": "find"}}')
    rows = [{"_id": f"d/{name}.py:1", "title": "", "text": f"hello {name}"} for name in ("red", "green")]
    texts = write_jsonl(tmp_path / "cache/docstrings/eval/DocstringRetrieval/corpus.jsonl", rows)
    run("demo", "find it")
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines} == {"d/red.py:1", "d/green.py:1"}
    content = texts.read_bytes()
    texts.unlink()
    run("demo", "find it")
    assert capsys.readouterr().out.splitlines() == lines, "it is made once"
    texts.write_bytes(content)
    Path("output/quickstart/docstring-index", VECTORS_FILE).write_bytes(b"")
    run("demo", "find it")
    assert capsys.readouterr().out.splitlines() == lines, "an index that was cut short is made anew"
