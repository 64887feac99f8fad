"""A model's own answers to queries, as rows: who is asked what, and that a killed start goes on."""

from __future__ import annotations

import io
import json
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from helpers import family_tokenizer, tiny_model, write_jsonl

from llm2vec.choice import ModelChoice
from llm2vec.commands.data.answers import main
from llm2vec.corpus import writers
from llm2vec.corpus.server import Refusal, request_json
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import read_sources_file
from llm2vec.types import UserError

QUERIES = ["who is red?", "what is blue?", "who is red?", "where is green?"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four rows, of which two have one query."""
    rows = [{"query": query, "positive": f"a text {i}", "negative": "another"} for i, query in enumerate(QUERIES)]
    write_jsonl(tmp_path / "data/faq.jsonl", rows)
    table = {"faq": {"file": "faq.jsonl", "instruction": "Given a question, find it", "num_negatives": 1}}
    (tmp_path / "data/sources.json").write_text(json.dumps(table), encoding="utf-8")
    return tmp_path


def flags(folder: Path, *more: str) -> list[str]:
    data = folder / "data"
    return [str(data), str(folder / "out"), "--sources_file", str(data / "sources.json"), *more]


def test_answers_are_rows_and_a_killed_start_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server is asked the bare query, once each; what it does not answer is no row, what is cut off is one."""
    asked: list[Any] = []

    def request(place: str, body: dict[str, Any], read: Any) -> Any:
        query = body["messages"][0]["content"]
        if query == "where is green?" and len(asked) < 3:
            raise KeyboardInterrupt
        asked.append((place, query, body["max_tokens"]))
        content = " " if "blue" in query else f"  It is:\n{query}  "
        return read({"choices": [{"message": {"content": content}, "finish_reason": "length"}]})

    monkeypatch.setattr(writers, "request_json", request)
    monkeypatch.setattr(writers, "REQUESTS_AT_ONCE", 1)
    monkeypatch.setattr(writers, "PART_TEXTS", 2)
    server = flags(folder, "--server", "http://x/v1", "--name", "m", "--most_tokens", "7")
    with pytest.raises(KeyboardInterrupt):
        main(server)
    with pytest.raises(UserError, match="was written for other texts or by another writer"):
        main([*server[:-1], "8"])
    asked.append("a third")
    main(server)
    place = "http://x/v1/chat/completions"
    assert asked == [(place, QUERIES[0], 7), (place, QUERIES[1], 7), "a third", (place, QUERIES[3], 7)]
    assert "faq: 2 of 3 queries have an answer" in capsys.readouterr().out
    rows = TrainingRows(folder / "out", read_sources_file(folder / "out/sources.json"), num_negatives=1)
    found = [
        (row.query.instruction, row.query.text, row.positive.text, row.negatives)
        for row in map(rows.__getitem__, (0, 1))
    ]
    instruction = "Given a question, find it"
    assert found == [(instruction, query, f"It is:\n{query}", ()) for query in (QUERIES[0], QUERIES[3])]
    assert len(rows) == 2 and not (folder / "out/.answers").exists()


@pytest.mark.parametrize("code", [None, 400, 422, 500])
def test_a_server_is_asked_not_to_think(code: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it knows no such key; and what it leaves out is empty, not a word `None`."""
    asked: list[dict[str, Any]] = []

    def request(place: str, body: dict[str, Any], read: Any) -> Any:
        asked.append(body)
        if code is not None and "chat_template_kwargs" in body:
            raise Refusal(place, code, b"no such key")
        content = None if "blue" in body["messages"][0]["content"] else "an answer"
        return read({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})

    monkeypatch.setattr(writers, "request_json", request)
    monkeypatch.setattr(writers, "REQUESTS_AT_ONCE", 1)
    write = writers.write_by_server("http://x/v1", "m", writers.ANSWER)
    if code == 500:
        with pytest.raises(UserError, match="answers HTTP 500 no such key"):
            write(QUERIES[:1])
        return
    assert write(QUERIES[:2]) == ["an answer", ""]
    thinks = [body.get("chat_template_kwargs") for body in asked]
    assert thinks == ([{"enable_thinking": False}] * 2 if code is None else [{"enable_thinking": False}, None, None])


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the seconds that it names; but one that refuses for good, or is busy for long, ends it."""
    asked, waited = 0, list[float]()

    def urlopen(*_: Any, **__: Any) -> Any:
        nonlocal asked
        asked += 1
        if (code := codes.pop(0)) == 200:
            return io.BytesIO(b'{"a": 1}')
        headers = Message()
        headers["Retry-After"] = "7"
        raise TimeoutError("timed out") if code == 0 else HTTPError("x", code, "", headers, io.BytesIO(b"busy"))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr("time.sleep", waited.append)
    codes = [429, 503, 0, 200]
    assert request_json("http://x", {}, lambda answer: answer["a"]) == 1
    assert asked == 4 and waited[:2] == [7, 7] and waited[2] > 0
    for codes, said in (([401, 200], "answers HTTP 401"), ([503] * 9, "HTTP 503 busy"), ([0] * 9, "does not answer")):
        with pytest.raises(UserError, match=said):
            request_json("http://x", {}, lambda answer: answer)
        assert codes, "it is not asked for ever"


def test_a_text_that_a_server_refuses_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a filter of contents; a server that refuses every text is not asked on."""

    def request(place: str, body: dict[str, Any], read: Any) -> Any:
        if "blue" in body["messages"][0]["content"]:
            raise Refusal(place, 400, b"filtered")
        return read({"choices": [{"message": {"content": "an answer"}, "finish_reason": "stop"}]})

    monkeypatch.setattr(writers, "request_json", request)
    write = writers.write_by_server("http://x/v1", "m", writers.ANSWER)
    with pytest.raises(UserError, match="answers HTTP 400 filtered"):
        write(["blue", "blue too"])
    assert write(["blue", "red"]) == ["", "an answer"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "plain"], ids=["chat template", "none"])
def test_a_model_answers_the_same_however_it_is_batched(family: str, folder: Path) -> None:
    """Cut off at its most tokens, in a turn of the query alone where there are turns."""
    tokenizer = family_tokenizer(family)
    model = tiny_model("llama", True, tokenizer=tokenizer, initializer_range=0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write = writers.write_by_model(ModelChoice(str(folder / "model"), torch_dtype="float32"), writers.ANSWER)
    assert write(QUERIES) == [answer for query in QUERIES for answer in write([query])] and all(write(QUERIES))
    main(flags(folder, "--model", str(folder / "model"), "--most_tokens", "6"))
    lines = (folder / "out/faq.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["query"] for line in lines] == list(dict.fromkeys(QUERIES))


def test_mistakes_are_said(folder: Path) -> None:
    with pytest.raises(UserError, match="one of the arguments --model --server is required"):
        main(flags(folder))
    with pytest.raises(UserError, match="--server and --name go together"):
        main(flags(folder, "--server", "http://x/v1"))
