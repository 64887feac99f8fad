"""The docstring corpus on small made-up source trees, and the tiny tokenizer and model."""

import hashlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llm2vec.quickstart import docstrings
from llm2vec.quickstart.docstrings import (
    EVAL_FOLDER,
    RECORD_FILE,
    TRAIN_FILE,
    Passage,
    is_held_out,
    read_docstrings,
    read_passages,
    source_files,
    split_docstring,
    training_rows,
    without_duplicates,
    write_corpus,
)
from llm2vec.quickstart.tiny import SPECIAL_TOKENS, tiny_llama, train_tokenizer
from llm2vec.types import UserError

FILLER = "is told at enough length here that the thresholds on the number of words let it pass without any doubt"


@pytest.fixture(autouse=True)
def hold_out_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough files for a handful of them."""
    monkeypatch.setattr(docstrings, "HELD_OUT_PER_MILLE", 300)


def docstring(topic: str) -> str:
    return f"The summary about {topic} number one.\n\n{topic.capitalize()} {FILLER}."


def module(*topics: str) -> str:
    functions = [f'def f_{topic}():\n    """{docstring(topic)}"""\n' for topic in topics]
    return "raise RuntimeError('imported')\n" + "\n".join(functions)


def write_tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def many_modules(count: int = 30) -> dict[str, str | bytes]:
    return {f"package{i % 3}/module{i}.py": module(f"apple{i}", f"berry{i}", f"cherry{i}") for i in range(count)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_read_docstrings_finds_every_kind_in_order_and_runs_nothing(tmp_path: Path) -> None:
    source = '''"""Module."""
raise SystemExit("executed")
class A:
    """Class."""
    async def m(self):
        """Method."""
        def inner():
            """Inner functions are left out."""
    def undocumented(self):
        pass
def f():
    r"""Function \\d."""
'''
    path = write_tree(tmp_path, {"m.py": source}) / "m.py"
    assert read_docstrings(path) == [(1, "Module."), (3, "Class."), (5, "Method."), (11, "Function \\d.")]


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (f"Return the mean of values.\n\nIt {FILLER}.", "Return the mean of values."),
        (f"Return the mean of values. It {FILLER}.", "Return the mean of values."),
        (f"Return the mean\n   of values\n\nIt {FILLER}.", "Return the mean of values"),
        (f"mean(x, dim=None) -> Tensor\n\nReturn the mean of values.\n\nIt {FILLER}.", "Return the mean of values."),
        (f"Return the mean, e.g. of values.\n\nIt {FILLER}.", "Return the mean, e.g. of values."),
        (f"Title of the page\n=================\n\nIt {FILLER}.", "Title of the page"),
    ],
)
def test_split_docstring(text: str, query: str) -> None:
    assert split_docstring(text) == (query, f"It {FILLER}.")


@pytest.mark.parametrize(
    "text",
    [
        f"Too short.\n\nIt {FILLER}.",
        "word " * 41 + f".\n\nIt {FILLER}.",
        "A summary of enough words.\n\nA short body.",
        "A summary of enough words.",
        f"A summary of enough words.\n\nAs said: a summary of  Enough words! It {FILLER}.",
        f"A summary of enough words.\n\nCopyright someone. It {FILLER}.",
        f"Args: one of the many arguments.\n\nIt {FILLER}.",
        "A summary of enough words.\n\n>>> " + "only code " * 20,
        "",
        "-----\n=====",
    ],
)
def test_split_docstring_refuses(text: str) -> None:
    assert split_docstring(text) is None


def test_body_ends_at_a_word_before_the_cap_and_before_code_examples() -> None:
    words = " ".join(f"word{i}" for i in range(200))
    pair = split_docstring(f"A summary of enough words.\n\n{words}")
    assert pair is not None
    assert len(pair[1]) <= docstrings.MOST_BODY_CHARACTERS < len(pair[1]) + len(" word100")
    assert words.startswith(pair[1] + " ")
    pair = split_docstring(f"A summary of enough words.\n\nIt {FILLER}.\n\nExamples\n--------\n>>> 1\n1\n")
    assert pair == ("A summary of enough words.", f"It {FILLER}")


def test_source_files_skip_tests_and_what_is_hidden_and_come_sorted(tmp_path: Path) -> None:
    names = ["b.py", "a/z.py", "a/tests/test_z.py", "site-packages/x.py", "a/_vendor/y.py", "a/data.txt"]
    names += [".tox/x.py", "a/.y.py"]
    roots = {
        "two": write_tree(tmp_path / "2", {"c.py": ""}),
        "one": write_tree(tmp_path / "1", dict.fromkeys(names, "")),
    }
    assert [name for name, _ in source_files(roots)] == ["one/a/z.py", "one/b.py", "two/c.py"]


def test_bad_files_are_skipped_and_counted(tmp_path: Path) -> None:
    quoted = b'"""Not closed'
    files = {"broken.py": quoted, "null.py": b'"""a"""\0', "latin.py": b'"""\xe9\xff"""', "good.py": module("apple")}
    passages, counts = read_passages(source_files({"r": write_tree(tmp_path, files)}))
    assert counts == {"files": 4, "unreadable_files": 3, "docstrings": 1, "passages": 1}
    assert [passage.file for passage in passages] == ["r/good.py"]


def test_declared_encoding_is_obeyed(tmp_path: Path) -> None:
    path = write_tree(tmp_path, {"m.py": '# -*- coding: latin-1 -*-\n"""Caf\xe9."""'.encode("latin-1")}) / "m.py"
    assert read_docstrings(path) == [(1, "Café.")]


def test_duplicates_of_query_or_of_body_start_are_dropped_after_normalisation() -> None:
    start = "x" * 60 + " " + "y" * 60
    passages = [
        Passage("a", 1, "Return the Value.", f"{start} one"),
        Passage("b", 1, "return  the value", "another body"),  # query of the first
        Passage("c", 1, "Another query", f"{start.upper()} two"),  # body of the first
        Passage("d", 1, "Third query", "Another, body!"),  # body of a dropped one
        Passage("e", 1, "Fourth query", "a body of its own"),
    ]
    assert [passage.file for passage in without_duplicates(passages)] == ["a", "e"]


def test_negative_is_the_next_body_of_the_same_file() -> None:
    passages = [Passage("a", i, f"q{i}", f"b{i}") for i in range(3)] + [Passage("lonely", 1, "q", "b")]
    rows = [tuple(row.values()) for row in training_rows(passages)]
    assert rows == [("q0", "b0", "b1"), ("q1", "b1", "b2"), ("q2", "b2", "b0")]


def test_write_corpus_layout_split_and_hashes(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "src", many_modules())
    manifest = write_corpus(tmp_path / "out", {"r": root})
    rows = read_lines(tmp_path / "out" / TRAIN_FILE)
    folder = tmp_path / "out" / EVAL_FOLDER
    corpus, queries = read_lines(folder / "corpus.jsonl"), read_lines(folder / "queries.jsonl")
    judgements = read_lines(folder / "qrels" / "test.jsonl")

    assert all(set(row) == {"query", "positive", "negative"} and row["positive"] != row["negative"] for row in rows)
    assert len(rows) == manifest["counts"]["training_rows"] and len(corpus) == manifest["counts"]["held_out"]
    assert len(rows) + len(corpus) == 90
    # each query names its topic, so its one relevant document can be told from the text
    text = {row["_id"]: row["text"] for row in [*corpus, *queries]}
    assert len(judgements) == len(queries) == len(corpus) == len(text) / 2
    for row in judgements:
        topic = text[row["query-id"]].split()[3]
        assert text[row["corpus-id"]].lower().startswith(topic + " ") and row["score"] == 1
    # nothing of a held-out file is trained on, and the split follows the file's name
    trained = {row[key] for row in rows for key in row}
    assert not trained & set(text.values())
    assert all(is_held_out(name[2:].rpartition(":")[0]) for name in text)
    assert "config_name: corpus" in (folder / "README.md").read_text()
    assert len(manifest["sha256"]) == 5
    for name, expected in manifest["sha256"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == expected


def test_corpus_depends_on_neither_place_nor_order_of_creation(tmp_path: Path) -> None:
    files = many_modules()
    first = write_corpus(tmp_path / "1", {"r": write_tree(tmp_path / "here", files)})
    elsewhere = write_tree(tmp_path / "there" / "deeper", dict(reversed(files.items())))
    assert write_corpus(tmp_path / "2", {"r": elsewhere}) == first


def test_corpus_is_reused_until_rules_packages_or_files_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="llm2vec.quickstart.docstrings")
    root, out = write_tree(tmp_path / "src", many_modules()), tmp_path / "out"
    first = write_corpus(out, {"r": root})
    assert "reused" not in caplog.text
    assert write_corpus(out, {"r": root}) == first and "reused" in caplog.text

    def is_made_again() -> bool:
        caplog.clear()
        write_corpus(out, {"r": root})
        return "reused" not in caplog.text

    (out / TRAIN_FILE).write_text("damaged")
    assert is_made_again() and not is_made_again()
    write_tree(root, {"some-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: some\nVersion: 1.0\n"})
    assert is_made_again() and not is_made_again()
    changed_rules = tmp_path / "docstrings.py"
    changed_rules.write_text("# another version")
    with monkeypatch.context() as patched:
        patched.setattr(docstrings, "__file__", str(changed_rules))
        assert is_made_again() and not is_made_again()
    assert not list(out.rglob(".*")) and (out / RECORD_FILE).is_file()


def test_a_broken_installation_has_no_name_and_stops_nobody(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "src", many_modules())
    write_tree(root, {"some-1.0.dist-info/METADATA": "Name: some\nVersion: 1.0\n", "~roken-1.0.dist-info/RECORD": ""})
    manifest = write_corpus(tmp_path / "out", {"r": root})
    assert manifest["made_from"]["distributions"] == {"some": "1.0"}


def test_users_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 training and 0 held-out rows"):
        write_corpus(tmp_path / "out", {"r": tmp_path})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be made \(File exists\)"):
        write_corpus(tmp_path / "file", {"r": tmp_path})
    with pytest.raises(UserError, match="vocab_size is 100"):
        train_tokenizer(["text"], vocab_size=100)


def small_model(seed: int = 1) -> LlamaForCausalLM:
    tokenizer = train_tokenizer([docstring("apple")], vocab_size=300)
    return tiny_llama(
        tokenizer, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_positions=32, seed=seed
    )


def test_tokenizer_round_trip_and_special_ids(tmp_path: Path) -> None:
    trained = train_tokenizer([docstring(f"apple{i}") for i in range(50)], vocab_size=400)
    trained.save_pretrained(tmp_path)
    for tokenizer in (trained, AutoTokenizer.from_pretrained(tmp_path)):
        assert 262 < len(tokenizer) <= 400
        assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(6))
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 4, 5)
        text = "Summary  of 1234567\n\té ☃ it's — {x: [1]} <|x|>"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text and not set(ids) & set(range(6))
        assert tokenizer(text).input_ids == [0, *ids]
        assert tokenizer("a<|eot_id|>b", add_special_tokens=False).input_ids[1] == 4
        pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1234567 it")]
        assert pieces == ["in", "Ġ", "123", "456", "7", "Ġit"]


def test_tiny_llama_is_seeded_tied_and_leaves_the_random_state(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    model = small_model()
    assert torch.equal(torch.random.get_rng_state(), state)
    same, other = small_model().state_dict(), small_model(seed=2).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.get_input_embeddings().weight, other["model.embed_tokens.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[0, 7, 4]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    with pytest.raises(UserError, match="hidden_size is 18"):
        tiny_llama(
            train_tokenizer(["a"], vocab_size=262),
            hidden_size=18,
            num_layers=1,
            num_heads=2,
            intermediate_size=8,
            max_positions=8,
            seed=0,
        )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", r"train\.jsonl, line 2: not valid JSON"),
        ("[1]", "line 2: a JSON object is needed"),
        ('{"query": "a"}', "line 2: a JSON object with a string `positive` is needed"),
        ('{"query": ["a"], "positive": "b"}', "line 2: a JSON object with a string `query` is needed"),
    ],
)
def test_a_malformed_training_row_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    (tmp_path / "train.jsonl").write_text('{"query": "a", "positive": "b"}\n' + line + "\n")
    script = str(Path(__file__).parents[2] / "experiments" / "make_tiny_model.py")
    flags = ["--train_file", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / "init")]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(script, run_name="__main__")
    assert exit_.value.code == 2 and re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "init").exists()


def test_make_tiny_model_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": f"query {i}", "positive": docstring(f"apple{i}")} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = str(Path(__file__).parents[2] / "experiments" / "make_tiny_model.py")
    flags = ["--train_file", str(tmp_path / "train.jsonl"), "--vocab_size", "300", "--hidden_size", "16"]
    flags += ["--num_heads", "2", "--output_dir", str(tmp_path / "deep" / "init")]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    runpy.run_path(script, run_name="__main__")
    assert "300 tokens" in capsys.readouterr().out and (tmp_path / "deep/init/model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["init"]
    monkeypatch.setattr(sys, "argv", [script, *flags, "--num_layers", "0"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(script, run_name="__main__")
    assert exit_.value.code == 2 and "--num_layers: is 0; give a number above 0." in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as exit_:  # a finished folder is never written over
        runpy.run_path(script, run_name="__main__")
    assert exit_.value.code == 2 and capsys.readouterr().err.startswith("error: ")
