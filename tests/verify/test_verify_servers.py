"""`verify` compares servers, too: over HTTP, with and without token ids, and says what is wrong with an answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_jsonl
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from verify_folders import causal_reload, failures

from llm2vec.model.chain import RUN_FILE
from llm2vec.types import UserError
from llm2vec.verify.server import EmbeddingServer


class Stub:
    """An OpenAI-compatible server over a function from strings to vectors, with faults to be switched on.

    Attributes:
        embed: string -> vector.
        ids: string -> token ids; None = there is no `/tokenize`.
        style: of `/tokenize`: vllm or tei.
        models: what `/v1/models` lists; None = there is no such path.
        answer: replaces the whole body of `/v1/embeddings`, as status and bytes.
        most_characters: a longer text, or an empty one, is refused with HTTP 400.
        requests: bodies that arrived at `/v1/embeddings`.
    """

    def __init__(self, embed: Callable[[str], Tensor], ids: Callable[[str], list[int]] | None = None) -> None:
        self.embed = embed
        self.ids = ids
        self.style = "vllm"
        self.models: list[str] | None = ["stub"]
        self.answer: tuple[int, bytes] | None = None
        self.most_characters: int | None = None
        self.requests: list[dict[str, Any]] = []

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON (or bytes) of a request."""
        if path == "/v1/models" and self.models is not None:
            return 200, {"data": [{"id": name} for name in self.models]}
        if path == "/tokenize" and self.ids is not None and self.style == "vllm" and "prompt" in body:
            return 200, {"tokens": self.ids(body["prompt"]), "count": 0}
        if path == "/tokenize" and self.ids is not None and self.style == "tei" and "inputs" in body:
            return 200, [[{"id": token, "text": "", "special": False} for token in self.ids(body["inputs"])]]
        if path != "/v1/embeddings":
            return 404, {"error": "no such path"}
        self.requests.append(body)
        if self.answer is not None:
            return self.answer
        assert body["model"] in (self.models or ["model"])
        (text,) = body["input"]
        if self.most_characters is not None and not 0 < len(text) <= self.most_characters:
            return 400, {"error": "this text is not to my taste"}
        return 200, {"data": [{"object": "embedding", "index": 0, "embedding": self.embed(text).tolist()}]}


@pytest.fixture
def serve() -> Iterator[Callable[[Stub], str]]:
    """Start a stub; returns its URL."""
    servers = []

    def start(stub: Stub) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: dict[str, Any]) -> None:
                status, content = stub.respond(self.path, body)
                sent = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def engine(
    folder: Path,
    *,
    max_length: int = 64,
    edit: Callable[[list[int]], list[int]] = lambda ids: ids,
    pooled: Callable[[Tensor], Tensor] = lambda states_TD: states_TD[-1],
    before_norm: bool = False,
    **loading: Any,
) -> Stub:
    """A server of an exported folder, one text at a time, with the ids edited or the states pooled in its own way."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **loading)
    model = AutoModel.from_pretrained(folder)
    if before_norm:
        model.norm = torch.nn.Identity()

    def ids_of(text: str) -> list[int]:
        return edit(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])

    @torch.no_grad()
    def embed(text: str) -> Tensor:
        vector = pooled(model(input_ids=torch.tensor([ids_of(text)])).last_hidden_state[0])
        return vector / vector.norm()

    return Stub(embed, lambda text: edit(tokenizer(text)["input_ids"]))


@pytest.mark.parametrize("style", ["vllm", "tei", "none"])
def test_a_server_that_agrees_passes(made: Path, verify: Any, serve: Any, style: str) -> None:
    stub = engine(made / "exported")
    stub.style = style
    stub.models = None if style == "tei" else ["stub"]
    code, printed = verify(made / "adapter", f"{serve(stub)}/v1/")
    assert code == 0, printed
    row = next(line for line in printed.splitlines() if line.startswith("server"))
    assert ("not shown" if style == "none" else "equal") in row
    assert " 0.999 " in row  # a server does not say its precision
    assert len(stub.requests) == 13
    assert {request["encoding_format"] for request in stub.requests} == {"float"}


def test_a_server_may_be_the_reference(made: Path, damaged: Path, verify: Any, serve: Any) -> None:
    url = serve(engine(made / "exported"))
    code, printed = verify(url, made / "exported")
    assert code == 0, printed
    causal_reload(damaged)
    (damaged / RUN_FILE).unlink()  # its record of file sizes, by which the change would be refused at once
    code, printed = verify(url, f"st:{damaged}")
    assert code == 1
    assert failures(printed) == {"sentence-transformers": "attention"}


def test_a_server_of_another_model_is_caught(made: Path, verify: Any, serve: Any) -> None:
    stub = engine(made / "other")
    stub.style = "none"
    code, printed = verify(f"ours:{made / 'exported'}", serve(stub))
    assert code == 1
    assert failures(printed) == {"server": "weights or something else"}


def test_a_server_that_pools_otherwise_is_named(made: Path, verify: Any, serve: Any) -> None:
    code, printed = verify(
        made / "exported", serve(engine(made / "exported", pooled=lambda states: states.mean(dim=0)))
    )
    assert code == 1
    assert failures(printed) == {"server": "pooling"}
    assert "with mean pooling over every token, ours" in printed


def test_a_causal_server_is_named(made: Path, damaged: Path, verify: Any, serve: Any) -> None:
    causal_reload(damaged)
    code, printed = verify(f"ours:{made / 'exported'}", serve(engine(damaged)))
    assert code == 1
    assert failures(printed) == {"server": "attention"}


@pytest.mark.parametrize(
    ("cause", "fault"),
    [
        ("closing token", {"edit": lambda ids: ids[:-1]}),
        ("closing token", {"edit": lambda ids: [*ids, ids[-1]]}),
        ("template", {"edit": lambda ids: ids[1:]}),
        ("template", {"split_special_tokens": False}),
    ],
)
def test_a_server_that_writes_other_tokens_is_named(
    made: Path, verify: Any, serve: Any, cause: str, fault: dict[str, Any]
) -> None:
    """By the ids that it shows; without them, what it did with the text is not guessed at."""
    stub = engine(made / "exported", **fault)
    code, printed = verify(f"ours:{made / 'exported'}", serve(stub))
    assert code == 1, printed
    assert failures(printed) == {"server": cause}, printed
    assert "token ids: server http" in printed
    stub.style = "none"
    code, printed = verify(f"ours:{made / 'exported'}", serve(stub))
    assert code == 1, printed
    assert failures(printed) == {"server": "weights or something else"}, printed


def test_a_server_that_leaves_out_the_last_norm_is_named(made: Path, verify: Any, serve: Any) -> None:
    stub = engine(made / "exported", before_norm=True)
    code, printed = verify(f"ours:{made / 'exported'}", serve(stub))
    assert code == 1
    assert failures(printed) == {"server": "norm"}
    assert "with the states from before the last norm, ours" in printed


def test_two_servers_cannot_be_taken_apart(made: Path, tmp_path: Path, verify: Any, serve: Any) -> None:
    mean = engine(made / "exported", pooled=lambda states_TD: states_TD.mean(dim=0))
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "hello world"}])
    code, printed = verify(serve(engine(made / "exported")), serve(mean), "--texts", texts)
    assert code == 1
    assert "weights or something else: no side can be taken apart into its steps" in printed


def test_texts_that_a_server_refuses_are_said(made: Path, verify: Any, serve: Any) -> None:
    stub = engine(made / "exported")
    stub.most_characters = 200
    url = serve(stub)
    code, printed = verify(f"ours:{made / 'exported'}", url)
    assert code == 0, printed
    refused = [line for line in printed.splitlines() if "refuses the text" in line]
    assert [line.split("'")[1] for line in refused] == ["empty", "too long", "too long with instruction"]
    assert "not to my taste" in refused[0]
    stub.most_characters = 0
    code, printed = verify(f"ours:{made / 'exported'}", url)
    assert code == 2
    assert "refuses every text" in printed


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, b"<html>hello</html>"), "does not answer in JSON"),
        ((200, b"[]"), "without data[0].embedding"),
        ((200, b'{"data": []}'), "without data[0].embedding"),
        ((200, b'{"data": [{"embedding": "AAAA"}]}'), "without data[0].embedding"),
        ((200, b'{"data": [{"embedding": [1.0, NaN]}]}'), "empty or not finite"),
        ((200, b'{"data": [{"embedding": []}]}'), "empty or not finite"),
        ((404, b'{"error": "no such model"}'), "HTTP 404"),
        ((500, b""), "HTTP 500"),
    ],
)
def test_a_malformed_answer_is_one_sentence(
    made: Path, verify: Any, serve: Any, answer: tuple[int, bytes], words: str
) -> None:
    stub = engine(made / "exported")
    stub.answer = answer
    code, printed = verify(f"ours:{made / 'exported'}", f"padded:{made / 'exported'}", serve(stub))
    assert code == 2
    (line,) = [line for line in printed.splitlines() if line.startswith("not compared: ")]
    assert words in line
    assert printed.count(" ok") == 1  # the others are compared all the same


def test_a_refused_connection_is_said(made: Path, verify: Any) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_address[1]
    code, printed = verify(f"ours:{made / 'exported'}", f"http://127.0.0.1:{port}")
    assert code == 2
    assert f"not compared: http://127.0.0.1:{port}/v1/embeddings does not answer (" in printed
    with pytest.raises(UserError, match="does not answer"):
        verify(f"http://127.0.0.1:{port}", made / "exported")


def test_an_address_that_is_none_is_said() -> None:
    with pytest.raises(UserError, match=r"http://\[::1 is no address of a server"):
        EmbeddingServer("http://[::1")
    for address in ("localhost:8000", "server", "file:///etc/hosts", "http://"):
        with pytest.raises(UserError, match=f"{address} is no address of a server; it begins with http://"):
            EmbeddingServer(address)


def test_a_server_of_several_models_wants_a_name(made: Path, verify: Any, serve: Any) -> None:
    stub = engine(made / "exported")
    stub.models = ["one", "two"]
    url = serve(stub)
    code, printed = verify(f"ours:{made / 'exported'}", url)
    assert code == 2
    assert f"serves one, two; write the one that is meant as {url}#NAME" in printed
    code, printed = verify(f"ours:{made / 'exported'}", f"{url}#two")
    assert code == 0, printed
    assert stub.requests[-1]["model"] == "two"
