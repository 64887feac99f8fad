"""Other projects' clients over an export, by the snippets of the serving page: each where its package is installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import family_tokenizer, tiny_model

from llm2vec import LLM2Vec
from llm2vec.choice import ModelChoice
from llm2vec.export.export import Export, export
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.model.settings import EncoderSettings

PAGE = Path(__file__).parents[2] / "docs/guides/serve.md"
INSTRUCTION = "Given a summary, retrieve its description"
QUERY = "add an item to a list"
DOCUMENTS = ["Append object to the end of the list.", "Return the hash of the object."]
PACKAGES = {
    "LangChain": "langchain_huggingface",
    "LlamaIndex": "llama_index.embeddings.huggingface",
    "Haystack": "haystack_integrations.components.embedders.sentence_transformers",
    "Chroma": "chromadb",
    "Qdrant": "qdrant_client",
}


def snippet_of(client: str) -> str:
    found = re.search(rf"^### {client}\n+```python title=\"[^\"]*\"\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert found is not None, f"{PAGE.name} has no snippet for {client}"
    return found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `output/export` is a model with a default instruction for queries."""
    root = tmp_path_factory.mktemp("clients")
    tokenizer = family_tokenizer("llama")
    settings = EncoderSettings("last", 64, template="llama3")
    save_checkpoint(root / "it", tiny_model("llama", True, initializer_range=0.2), tokenizer, settings)
    export(
        Export(ModelChoice(str(root / "it")), "float32", instructions={"query": INSTRUCTION}), root / "output/export"
    )
    return root


def test_every_client_has_a_snippet_with_the_documents() -> None:
    for client in PACKAGES:
        snippet = snippet_of(client)
        compile(snippet, client, "exec")
        assert QUERY in snippet and all(text in snippet for text in DOCUMENTS) and "output/export" in snippet
    assert f'{{"query": "{INSTRUCTION}"}}' in PAGE.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("client", PACKAGES)
def test_a_client_gives_the_vectors(client: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instruction stands before the query alone, and what is nearest to the query here is nearest there."""
    parts = PACKAGES[client].split(".")
    for end in range(1, len(parts) + 1):
        if importlib.util.find_spec(".".join(parts[:end])) is None:
            pytest.skip(f"{PACKAGES[client]} is not installed")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    found: dict[str, Any] = {}
    exec(snippet_of(client), found)
    model: Any = LLM2Vec.from_pretrained(folder / "it")
    query, bare = model.encode([[INSTRUCTION, QUERY], ["", QUERY]], show_progress_bar=False)
    documents = model.encode(DOCUMENTS, show_progress_bar=False)

    def cosine(left: Any, right: torch.Tensor) -> float:
        return torch.cosine_similarity(torch.as_tensor(left, dtype=torch.float32), right, dim=-1).min().item()

    assert cosine(found["query"], query) > 0.9999 > cosine(found["query"], bare)
    assert cosine(found["documents"], documents) > 0.9999
    if "nearest" in found:
        assert found["nearest"] == DOCUMENTS[torch.cosine_similarity(query, documents).argmax()]
