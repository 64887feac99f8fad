"""What the tests of the evaluation share: a model that counts letters, and small data sets in the layouts we read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from torch import Tensor, nn

from llm2vec.choice import ModelChoice
from llm2vec.model.settings import EncoderSettings

CALM = "calm blue water lake"
STORM = "storm wind rain thunder"


class FakeModel(nn.Module):
    """Stands in for an LLM2Vec: a text's vector counts its letters, so that alike texts are alike."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.settings = EncoderSettings(**settings)
        self.calls: list[list[list[str]]] = []
        self.sides: list[str | None] = []

    def encode(
        self,
        sentences: list[list[str]],
        batch_size: int = 32,
        show_progress_bar: bool = True,
        side: str | None = None,
    ) -> Tensor:
        self.calls.append(sentences)
        self.sides.append(side)
        counts = [[1.0 + text.lower().count(chr(letter)) for letter in range(97, 123)] for _, text in sentences]
        return torch.tensor(counts)


def make_sentence_transformer(folder: Path, seed: int = 0) -> Path:
    tiny_model("llama", seed=seed, initializer_range=0.2).save_pretrained(folder / "base")
    tokenizer = family_tokenizer("llama")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = None  # with one, sentence-transformers makes a prompt a turn of its own
    tokenizer.save_pretrained(folder / "base")
    transformer = Transformer(str(folder / "base"), max_seq_length=64)
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu", prompts={"query": "own: "})
    model.save(str(folder / "model"), create_model_card=False)
    return folder / "model"


def write_retrieval(folder: Path) -> None:
    write_jsonl(folder / "corpus.jsonl", [{"_id": 1, "title": None, "text": CALM}, {"_id": 2, "text": STORM}])
    write_jsonl(
        folder / "queries.jsonl", [{"_id": "q1", "text": "blue lake"}, {"_id": "unjudged", "text": "no answer"}]
    )
    write_jsonl(folder / "qrels/test.jsonl", [{"query-id": "q1", "corpus-id": 1, "score": 1}])


def write_hub_layout(folder: Path) -> None:
    write_retrieval(folder)
    write_jsonl(
        folder / "corpus.jsonl", [{"_id": "1", "title": "", "text": CALM}, {"_id": "2", "title": "", "text": STORM}]
    )
    files = [
        ("default", "test", "qrels/test.jsonl"),
        *((name, name, f"{name}.jsonl") for name in ("corpus", "queries")),
    ]
    write_readme(folder, files)


def write_readme(folder: Path, files: list[tuple[str, str, str]]) -> None:
    lines = ["---", "configs:"]
    for i, (config, split, path) in enumerate(files):
        if config not in {name for name, *_ in files[:i]}:
            lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def evaluated(base: str, adapters: tuple[str, ...] = (), torch_dtype: str | None = None, **options: Any) -> Any:
    """What `load_encoder` takes, of a model and the options given."""
    from llm2vec.evaluation.models import EvaluatedModel

    return EvaluatedModel(ModelChoice(base, adapters, torch_dtype), **options)
