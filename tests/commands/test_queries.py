"""Pairs from raw text: who writes the queries, which of them stay, and that a killed start goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import family_tokenizer, tiny_model
from transformers import LlamaForCausalLM

from llm2vec.choice import ModelChoice
from llm2vec.commands.data import queries
from llm2vec.commands.data.queries import main
from llm2vec.corpus import writers
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import read_sources_file
from llm2vec.types import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files of a paragraph each, one of them twice."""
    for i, word in enumerate(WORDS):
        (tmp_path / f"docs/{word}").mkdir(parents=True)
        (tmp_path / f"docs/{word}/a.md").write_text(f"The {word} of number{i} is long.\n", encoding="utf-8")
    (tmp_path / "docs/again.txt").write_text("The alpha of number0 is long.\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """Asks for a passage's second word; but of `delta` for another, of `omega` for nothing, and `gamma` it copies."""
    asked: list[Any] = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            word = body["messages"][0]["content"].split("\n\n")[1].split()[1]
            text = {"delta": "what is beta?", "omega": "\n", "gamma": "The gamma of"}.get(
                word, f'Question: "what is {word}?"\nI hope it helps.'
            )
            answer = json.dumps({"choices": [{"message": {"content": text}}]} if word != "sigma" else {}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None: ...

    httpd = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", asked
    httpd.shutdown()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_queries_that_lead_back_stay(
    folder: Path, server: tuple[str, list[Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = server
    flags = [str(folder / "docs"), str(folder / "out"), "--server", url, "--name", "m", "--keep_top", "1"]
    with pytest.raises(UserError, match="chat/completions: the answer is not of the form that OpenAI's interface has"):
        main(flags)
    (folder / "docs/sigma/a.md").unlink()
    with pytest.raises(UserError, match="holds what was written for other texts or by another writer; give"):
        main(flags)
    flags[1] = str(folder / "out2")
    monkeypatch.setattr(writers, "PART_TEXTS", 2)
    whole = queries._round_trip

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(queries, "_round_trip", killed)
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    assert whole is queries._round_trip
    asked.clear()
    main(flags)
    assert not asked, "what was written is not asked for again"
    assert lines(folder / "out2/pairs.jsonl") == [
        {"query": f"what is {word}?", "positive": f"The {word} of number{i} is long."}
        for i, word in enumerate(WORDS) if word in ("alpha", "beta")
    ]  # fmt: skip
    assert "5 passages, 5 queries written, 2 lead back and stay" in capsys.readouterr().out
    rows = TrainingRows(folder / "out2", read_sources_file(folder / "out2/sources.json"), num_negatives=1)
    assert len(rows) == 2 and rows[0].negatives == ()
    assert len(lines(folder / "out2/passages.jsonl")) == 5 and not (folder / "out2/.queries").exists()


@pytest.mark.parametrize("family", ["plain", "llama3"], ids=["none", "chat template"])
def test_a_model_reads_one_bos(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template writes it itself; a model without one is given its tokenizer's."""
    tokenizer = family_tokenizer(family)
    tiny_model("llama", True, tokenizer=tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    read: list[int] = []

    def generate(_: Any, input_ids: torch.Tensor, **__: Any) -> torch.Tensor:
        read.extend(input_ids[0].tolist())
        return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    writers.write_by_model(ModelChoice(str(tmp_path)), writers.QUERY)(["hello world"])
    assert read[0] == tokenizer.bos_token_id and read.count(tokenizer.bos_token_id) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "plain"], ids=["chat template", "none"])
def test_a_model_writes_the_same_however_it_is_batched(family: str, folder: Path) -> None:
    """Padding on the left changes nothing; a random model leads nowhere, which is said."""
    from llm2vec.corpus.writers import QUERY, write_by_model

    tokenizer = family_tokenizer(family)
    model = tiny_model("llama", True, tokenizer=tokenizer, initializer_range=0.2)
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 9))  # a random model seldom ends by itself
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write = write_by_model(ModelChoice(str(folder / "model"), torch_dtype="float32"), QUERY)
    texts = ["hello world", "who wrote the answer and the question of it", "red"]
    assert write(texts) == [query for text in texts for query in write([text])] and any(write(texts))
    with pytest.raises(UserError, match="no query of 6 leads back to its passage"):
        main([str(folder / "docs"), str(folder / "out"), "--model", str(folder / "model"), "--keep_top", "1"])


def test_a_writing_is_told_part_by_part_and_kept_by_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Hours of writing are not silent; and queries that another sentence asked for are not mixed in."""
    monkeypatch.setattr(writers, "PART_TEXTS", 2)
    caplog.set_level("INFO", "llm2vec")
    assert "in the language of the text" in writers.QUERY.turn("Der Hund bellt.")
    for _ in range(2):
        assert (
            writers.write_in_parts(lambda: lambda texts: texts, writers.QUERY, WORDS[:5], tmp_path / "w", {})
            == WORDS[:5]
        )
    assert caplog.messages == ["written for 2 of 5 texts", "written for 4 of 5 texts", "written for 5 of 5 texts"]
    other = writers.QUERY._replace(request="Ask something.")
    with pytest.raises(UserError, match="holds what was written for other texts or by another writer"):
        writers.write_in_parts(lambda: lambda texts: texts, other, WORDS[:5], tmp_path / "w", {})


def test_mistakes_are_said(folder: Path) -> None:
    out = str(folder / "out")
    (folder / "tables").mkdir()
    with pytest.raises(UserError, match=r"tables has no text: no line, or no text file \(\.md, \.py, \.rst, \.txt\)"):
        main([str(folder / "tables"), out, "--server", "http://127.0.0.1:9/v1", "--name", "m"])
    with pytest.raises(UserError, match="one of the arguments --model --anchors --titles --server is required"):
        main([str(folder / "docs"), out])
    with pytest.raises(UserError, match="--server and --name go together"):
        main([str(folder / "docs"), out, "--server", "http://x/v1"])
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1/chat/completions does not answer \("):
        main([str(folder / "docs"), out, "--server", "http://127.0.0.1:9/v1", "--name", "m"])
    with pytest.raises(UserError, match=r"a folder of text files or a \.jsonl file is needed"):
        main([str(folder / "none"), out, "--server", "http://127.0.0.1:9/v1", "--name", "m"])
