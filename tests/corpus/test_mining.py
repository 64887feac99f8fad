"""Mined negatives: the rules by hand and against sentence-transformers', a killed start, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers import family_tokenizer, tiny_model, write_jsonl
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import mine_hard_negatives
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from llm2vec.choice import ModelChoice
from llm2vec.commands.data.mine import main
from llm2vec.commands.encode import main as encode
from llm2vec.corpus import mining
from llm2vec.corpus.mining import Rules, mine
from llm2vec.corpus.retrievers import DenseRetriever, LexicalRetriever, RandomRetriever, open_reranker, open_retriever
from llm2vec.corpus.rows import open_corpus
from llm2vec.data.reading import Reading
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source, read_sources_file
from llm2vec.types import UserError

SOURCE = Source("a", "a.jsonl", (Instruction("find it"),))


def vector_of(text: str) -> torch.Tensor:
    """A direction that its text decides, alike where texts begin alike."""
    generator = torch.Generator().manual_seed(sum(map(ord, text[:2])))
    own = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(text)))
    return torch.randn(16, generator=generator) + 0.6 * torch.randn(16, generator=own)


class Vectors(DenseRetriever):
    """A retriever over `vector_of`; counts what it encodes."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        super().__init__(self._make, "vectors")

    def _make(self, texts: list[str], instruction: str, side: str) -> torch.Tensor:
        assert instruction == ("find it" if side == "query" else "")
        self.encoded += texts
        return torch.stack([vector_of(text) for text in texts])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 rows; two rows have one query, and so two positives."""
    letters = "abcdef" * 10
    rows = [{"query": f"{letters[min(i, 58)]}{min(i, 58)} who", "positive": f"{letters[i]}{i} doc"} for i in range(60)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    return tmp_path


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_rules_by_hand() -> None:
    """A margin is a share of the size of the positive's score, so it does not turn round below zero."""
    hits = [(1, 1.0), (2, 0.96), (3, 0.95), (4, 0.5)]
    assert [d for d, _ in Rules().chosen(hits, 1.0)] == [3, 4]
    assert [d for d, _ in Rules(absolute_margin=0.2).chosen(hits, 1.0)] == [4]
    assert [d for d, _ in Rules(relative_margin=None).chosen(hits, 0.1)] == [1, 2, 3, 4]
    assert [d for d, _ in Rules(most_score=0.955).chosen(hits, 2.0)] == [3, 4]
    assert [d for d, _ in Rules(relative_margin=0.5).chosen([(1, -0.9), (2, -1.5)], -1.0)] == [2]


@pytest.mark.parametrize(("relative", "absolute"), [(0.05, None), (None, 0.1), (0.3, 0.2)])
def test_sentence_transformers_mines_the_same(folder: Path, relative: Any, absolute: Any) -> None:
    """Where its miner fits: vectors in memory, rules without a reranker, three negatives of a row."""

    class Model(SentenceTransformer):
        def __init__(self) -> None:
            super().__init__(modules=[torch.nn.Identity()], device="cpu")

        def encode(self, inputs: list[str], **_: Any) -> Any:  # type: ignore[override]
            return torch.nn.functional.normalize(torch.stack([vector_of(text) for text in inputs]), dim=-1).numpy()

        encode_query = encode_document = encode  # type: ignore[assignment]

    rows = lines(folder / "a.jsonl")
    rules = Rules(negatives=3, depth=58, relative_margin=relative, absolute_margin=absolute)
    mine(SOURCE, folder, folder / "out", Vectors(), rules)
    ours = {(row["query"], row["positive"], *row["negative"]) for row in lines(folder / "out/a.jsonl")}
    theirs = mine_hard_negatives(
        Dataset.from_list(rows), Model(), range_max=58, num_negatives=3, relative_margin=relative,
        absolute_margin=absolute, output_format="n-tuple", verbose=False,
    )  # fmt: skip
    assert ours == {tuple(row.values()) for row in theirs} and len(ours) > 20


def test_all_positives_of_a_query_are_respected(folder: Path) -> None:
    """Those of other rows too; a reranker's scores decide and are written."""

    def rescore(pairs: list[tuple[str, str]]) -> list[float]:
        return [1.0 - int(text[1:].split()[0]) / 100 if text[0] == query[0] else 0.0 for query, text in pairs]

    rules = Rules(negatives=2, depth=30, relative_margin=0.0)
    report = mine(SOURCE, folder, folder / "out", Vectors(), rules, rescored_by="x", rescore=rescore)
    found = lines(folder / "out/a.jsonl")
    both = [row for row in found if row["query"] == "e58 who"]
    assert len(both) == 2 and all(not {"e58 doc", "f59 doc"} & set(row["negative"]) for row in both)
    for row in found:
        assert row["neg_scores"] == sorted(row["neg_scores"], reverse=True) and row["pos_score"] >= row["neg_scores"][0]
    assert report.mined == len(found) and report.rows == 60 and 0 < report.too_near < report.candidates


def test_mining_is_told_part_by_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mining, "PART_ROWS", 40)
    caplog.set_level("INFO", "llm2vec")
    mine(SOURCE, folder, folder / "out", Vectors(), Rules(negatives=3, depth=20))
    assert caplog.messages == [
        "a: 60 documents",
        "a: 40 of 60 rows have been looked at",
        "a: 60 of 60 rows have been looked at",
    ]


def test_a_killed_start_is_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors and parts that are there are not made again, and the file is the same to the byte."""
    monkeypatch.setattr(mining, "PART_ROWS", 16)
    monkeypatch.setattr("llm2vec.corpus.retrievers.BLOCK", 16)
    rules = Rules(negatives=3, depth=20)
    mine(SOURCE, folder, folder / "whole", Vectors(), rules)
    for killed_at in (10, 70, 100):  # while documents are encoded, in a later part
        out, retriever = folder / f"out{killed_at}", Vectors()

        def killed(texts: list[str], *_: Any, of: Vectors = retriever, at: int = killed_at) -> torch.Tensor:
            if len(of.encoded) >= at:
                raise KeyboardInterrupt
            return Vectors._make(of, texts, "find it", "query")

        retriever._encode = killed
        with pytest.raises(KeyboardInterrupt):
            mine(SOURCE, folder, out, retriever, rules)
        assert not (out / "a.jsonl").exists()
        second = Vectors()
        mine(SOURCE, folder, out, second, rules)
        assert (out / "a.jsonl").read_bytes() == (folder / "whole/a.jsonl").read_bytes()
        assert len(second.encoded) <= 120 - killed_at + 16
        left = [path.name for path in out.rglob("*") if path.is_file()]
        assert sorted(left) == ["a.jsonl", "report.json", "settings.json"]


def test_sources_that_are_done_are_not_mined_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, whose second source is killed; and only their reports are kept meanwhile."""
    (folder / "b.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    table = {name: {"file": f"{name}.jsonl", "instruction": "find it"} for name in "ab"}
    (folder / "t.json").write_text(json.dumps(table), encoding="utf-8")
    flags = ["--sources_file", str(folder / "t.json"), "--model", "vectors", "--negatives", "3"]
    first, second, whole = Vectors(), Vectors(), Vectors()
    prepare = DenseRetriever.prepare

    def killed(self: DenseRetriever, documents: Any, instruction: Instruction, work: Path) -> None:
        if self is first and work.name == "b":
            raise KeyboardInterrupt
        prepare(self, documents, instruction, work)

    monkeypatch.setattr(Vectors, "prepare", killed)
    for retriever, out in ((first, "out"), (second, "out"), (whole, "whole")):
        monkeypatch.setattr("llm2vec.corpus.retrievers.open_retriever", lambda _, one=retriever: one)
        if retriever is first:
            with pytest.raises(KeyboardInterrupt):
                main([str(folder), str(folder / out), *flags])
            kept = sorted(path.name for path in (folder / "out/.mining/a").iterdir())
            assert kept == ["report.json", "settings.json"]
        else:
            main([str(folder), str(folder / out), *flags])
    assert len(first.encoded) == len(second.encoded) == 120 and len(whole.encoded) == 240
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["a.jsonl", "b.jsonl", "report.json", "sources.json"]
    assert all((folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes() for name in names)


def test_parts_of_another_mining_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vectors, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mine(SOURCE, folder, folder / "out", Vectors(), Rules())
    with pytest.raises(UserError, match="holds a mining of a with other settings; give another folder"):
        mine(SOURCE, folder, folder / "out", Vectors(), Rules(negatives=2))


def test_bm25_over_a_corpus_beside_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command: a document with a query's words is its negative; what it writes is a table to train on."""
    rows = [{"query": f"red{i} green", "positive": f"red{i} green blue"} for i in range(8)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    documents = [{"id": str(i), "text": f"red{i} wrote a much longer answer of many other words"} for i in range(8)]
    write_jsonl(tmp_path / "corpus.jsonl", documents)
    (tmp_path / "t.json").write_text(json.dumps({"a": {"file": "a.jsonl", "instruction": "find it"}}), encoding="utf-8")
    flags = ["--sources_file", str(tmp_path / "t.json"), "--corpus", str(tmp_path / "corpus.jsonl")]
    main([str(tmp_path), str(tmp_path / "out"), *flags, "--model", "bm25", "--negatives", "1"])
    found = lines(tmp_path / "out/a.jsonl")
    assert [row["negative"] for row in found] == [[documents[i]["text"]] for i in range(8)]
    assert all(set(row) == {"query", "positive", "negative"} for row in found)
    (source,) = read_sources_file(tmp_path / "out/sources.json")
    assert source.instructions == (Instruction("find it"),) and source.reading.num_negatives is None
    (report,) = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["mined"] == report["rows"] == 8 and report["documents"] == 16
    said = capsys.readouterr().out
    assert "8 (100.0%)" in said and "+ red0 green blue" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jsonl", "report.json", "sources.json"]


def test_by_bm25_a_document_that_shares_no_word_is_no_candidate(tmp_path: Path) -> None:
    """The first of the file stood in for those that were missing, as hard negatives."""
    rows = [{"query": "red one", "positive": "red one two"}, {"query": "who", "positive": "blue"}]
    rows += [{"query": "green", "positive": "green red"}, {"query": "blue", "positive": "blue blue red"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    report = mine(SOURCE, tmp_path, tmp_path / "out", LexicalRetriever(), Rules(1, relative_margin=None))
    found = {row["query"]: row["negative"] for row in lines(tmp_path / "out/a.jsonl")}
    assert found.keys() == {"red one", "blue"} and found["blue"] == ["blue"]
    assert "red" in found["red one"][0] and report.candidates == 3


def test_what_cannot_be_mined_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match="source 'a': no row has enough negatives below its positive; ask for fewer by"):
        mine(SOURCE, folder, folder / "out", Vectors(), Rules(negatives=90))
    with pytest.raises(UserError, match="--skip: it must lie between 0 and --depth less --negatives"):
        main([str(folder), str(folder / "x"), "--model", "bm25", "--skip", "95"])
    (folder / "c.jsonl").write_text('{"id": "1"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"c\.jsonl, line 1: there is no column 'text'"):
        mine(SOURCE, folder, folder / "b", LexicalRetriever(), Rules(), corpus=open_corpus(str(folder / "c.jsonl")))


def test_a_server_reranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer may come in any order; an address must name a model."""
    asked = []

    def ask(place: str, body: dict[str, Any], read: Any) -> Any:
        asked.append((place, body))
        return read({"results": [{"index": 1, "relevance_score": 0.5}, {"index": 0, "relevance_score": 2}]})

    monkeypatch.setattr("llm2vec.corpus.retrievers.request_json", ask)
    rescore, revision = open_reranker("http://x/v1/#me/ranker")
    assert rescore([("q", "a"), ("q", "b")]) == [2.0, 0.5] and "me/ranker" in revision
    assert asked == [("http://x/v1/rerank", {"model": "me/ranker", "query": "q", "documents": ["a", "b"]})]
    with pytest.raises(UserError, match="http://x/v1 names no model"):
        open_reranker("http://x/v1")
    with pytest.raises(UserError, match="--rerank: there is no model /nowhere: no folder or hub repository"):
        open_reranker("/nowhere")


def test_a_classifier_of_several_labels_is_no_reranker(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("qwen2")
    reranker_of(3).save_pretrained(tmp_path / "nli")
    tokenizer.save_pretrained(tmp_path / "nli")
    with pytest.raises(UserError, match=r"--rerank: .*/nli gives a pair 3 scores, one a label; a reranker gives one"):
        open_reranker(str(tmp_path / "nli"))


def test_help_names_what_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "bm25, random, or a model or adapter" in " ".join(capsys.readouterr().out.split())


def reranker_of(num_labels: int) -> Qwen2ForSequenceClassification:
    """A random one."""
    tokenizer = family_tokenizer("qwen2")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_labels=num_labels, pad_token_id=tokenizer.pad_token_id,
        layer_types=["full_attention"],
    )  # fmt: skip
    return Qwen2ForSequenceClassification(config)


@pytest.mark.slow
def test_models_mine_and_rerank(folder: Path) -> None:
    """A checkpoint of ours and a reranker, by the command; a reranker without safetensors is refused."""
    tokenizer = family_tokenizer("qwen2")
    tiny_model("qwen2").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    reranker_of(1).save_pretrained(folder / "reranker")
    tokenizer.save_pretrained(folder / "reranker")
    (folder / "t.json").write_text(json.dumps({"a": {"file": "a.jsonl", "instruction": "find it"}}), encoding="utf-8")
    flags = ["--sources_file", str(folder / "t.json"), "--model", str(folder / "model"), "--negatives", "2"]
    flags += ["--depth", "9", "--relative_margin", "-9", "--rerank", str(folder / "reranker")]
    main([str(folder), str(folder / "out"), *flags])
    found = lines(folder / "out/a.jsonl")
    assert len(found) == 60 and all(len(row["neg_scores"]) == 2 and 0 < row["pos_score"] < 1 for row in found)
    sources = read_sources_file(folder / "out/sources.json")
    rows = TrainingRows(folder / "out", sources, num_negatives=2, with_scores=True)
    assert rows[0].scores == (found[0]["pos_score"], *found[0]["neg_scores"])
    (folder / "reranker/model.safetensors").rename(folder / "reranker/pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors are opened"):
        main([str(folder), str(folder / "out2"), *flags])


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    """A model that sentence-transformers wrote, whose vectors are means: no settings of ours tell of that."""
    tiny_model("qwen2").save_pretrained(tmp_path / "plain")
    family_tokenizer("qwen2").save_pretrained(tmp_path / "plain")
    transformer = Transformer(str(tmp_path / "plain"), max_seq_length=16)
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu", prompts={"query": "find: "})
    model.save(str(tmp_path / "stock"))
    return tmp_path / "stock"


@pytest.mark.slow
def test_an_embedder_of_sentence_transformers_encodes_mines_and_rescores_as_it_does_itself(
    folder: Path, embedder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher's vectors were those of a template and of the last token once."""
    stock = SentenceTransformer(str(embedder), device="cpu")
    texts = ["hello world", "red", "who wrote the answer"]
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    for side, vectors in (("document", stock.encode_document(texts)), ("query", stock.encode_query(texts))):
        encode([str(folder / "t.jsonl"), str(folder / side), "--model", str(embedder), "--side", side])
        found = pq.read_table(folder / side / "part-00000.parquet")["vector"].to_pylist()
        torch.testing.assert_close(torch.tensor(found), torch.from_numpy(vectors))
    rescore, _ = open_reranker(str(embedder))
    expected = stock.similarity(stock.encode_query(["red"]), stock.encode_document(texts))[0]
    assert rescore([("red", text) for text in texts]) == pytest.approx(expected.tolist(), abs=1e-4)
    monkeypatch.setattr(SentenceTransformer, "encode_document", lambda *_: pytest.fail("encoded twice"))
    assert len(rescore([("world", text) for text in texts])) == 3


def test_a_stock_embedder_has_the_dtype_and_batch_size_that_are_asked_for(folder: Path, embedder: Path) -> None:
    """Stored in bfloat16, as most large ones are, which numpy does not know; its own prompts stand in for ours."""
    SentenceTransformer(str(embedder), device="cpu").bfloat16().save(str(embedder))
    texts = ["hello world", "red", "who wrote the answer"]
    write_jsonl(folder / "t.jsonl", [{"text": text} for text in texts])
    source = str(folder / "t.jsonl")
    flags = ["--model", str(embedder), "--batch_size", "2"]
    sizes, forward = [], Transformer.forward

    def watched(self: Transformer, features: dict[str, Any], **options: Any) -> Any:
        sizes.append(len(features["input_ids"]))
        return forward(self, features, **options)

    for name in ("float32", "bfloat16"):
        choice = ModelChoice(str(embedder), torch_dtype=name)
        stock = SentenceTransformer(str(embedder), device="cpu", model_kwargs={"dtype": name})
        expected = stock.encode_document(texts, batch_size=2, convert_to_tensor=True).float()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Transformer, "forward", watched)
            encode([source, str(folder / name), *flags, "--torch_dtype", name])
        found = torch.tensor(pq.read_table(folder / name)["vector"].to_pylist())
        assert torch.equal(found, expected) and found.dtype == torch.float32
        documents = Dataset.from_dict({"text": texts})
        retriever = open_retriever(choice)
        retriever.prepare(documents, Instruction("find it"), folder / f"held-{name}")
        held = torch.from_numpy(np.load(folder / f"held-{name}/vectors-0000000000.npy"))
        assert torch.equal(
            held, torch.nn.functional.normalize(stock.encode_document(texts, convert_to_tensor=True).float())
        )
    assert sizes == [2, 1, 2, 1]
    with pytest.raises(UserError, match=f"--instruction: {embedder} reads texts with prompts of its own; leave it out"):
        encode([source, str(folder / "other"), *flags, "--instruction", "find it"])
    assert not (folder / "other").exists()


def test_chance_is_the_same_for_the_same_query(folder: Path) -> None:
    """In blocks of any size; all documents but the positives are as likely."""
    for name in ("one", "two"):
        mine(SOURCE, folder, folder / name, RandomRetriever(), Rules(negatives=1, relative_margin=None))
    assert (folder / "one/a.jsonl").read_bytes() == (folder / "two/a.jsonl").read_bytes()
    drawn = [row["negative"][0] for row in lines(folder / "one/a.jsonl")]
    assert len(drawn) == 60 and len(set(drawn)) > 25


def test_a_source_is_mined_up_to_its_cap(folder: Path) -> None:
    """`max_rows` of a table is that of training; what is mined of it was all rows."""
    report = mine(
        SOURCE._replace(reading=Reading(max_rows=7)), folder, folder / "out", RandomRetriever(), Rules(negatives=1)
    )
    assert (report.rows, report.documents) == (7, 7)
