"""The table of what becomes of anchors in the decoding pass."""

from __future__ import annotations

import reference
import torch
from helpers import family_tokenizer, tiny_model

from benchmarks.attention_sink import alike, sink_table
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.probes.reconstruction import Reconstructor, text_of_side


def test_the_figures_are_those_of_the_decoding_pass() -> None:
    model, tokenizer = tiny_model("llama", True), family_tokenizer("llama")
    settings = EncoderSettings("last", 64, template="llama3", attention="causal")
    found = Reconstructor(BidirectionalReconstruction(model, settings), row_tokenizer(tokenizer, settings))
    texts = [text_of_side("query", text) for text in ("hello world", "who wrote it", "red")]
    table = sink_table(found, texts, [1, 2])
    assert table.header == ["input", "cosine", "norm at 1", "cosine at 1", "norm at 2", "cosine at 2"]
    assert [row[0] for row in table.rows] == [
        f"{kind} {place}" for kind in ("anchors", "words") for place in ("at position 0", "behind a BOS")
    ]
    with torch.no_grad():
        rows = found.tokenizer.rows(texts)
        anchors = torch.stack([reference.states(model.model, "causal", ids=row.ids)[-1] for row in rows])
        last = torch.stack([reference.states(model.model, "causal", embeddings=anchor[None])[-1] for anchor in anchors])
        bos = model.get_input_embeddings()(torch.tensor([tokenizer.bos_token_id]))
        behind = torch.stack(
            [reference.states(model.model, "causal", embeddings=torch.cat([bos, a[None]]))[-1] for a in anchors]
        )
    at_0, behind_bos = table.rows[:2]
    assert at_0[1] == behind_bos[1] == f"{alike(anchors):.3f}"
    assert at_0[4:] == [f"{last.norm(dim=-1).mean():,.0f}", f"{alike(last):.3f}"]
    assert behind_bos[4:] == [f"{behind.norm(dim=-1).mean():,.0f}", f"{alike(behind):.3f}"]


def test_alike_by_hand() -> None:
    assert alike(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])) == torch.tensor(2 * 2**0.5 / 2 / 3).item()
