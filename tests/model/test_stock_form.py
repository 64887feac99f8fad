"""A stock tokenizer and prompts write the template's tokens, and stock sentence-transformers gives its vectors."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers import family_tokenizer, tiny_model
from mteb.models.abs_encoder import get_prompt_name
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import environment
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Gemma3TextConfig

from llm2vec import LLM2Vec
from llm2vec.model import stock_form
from llm2vec.model.backbone import attach_lora, load_tokenizer
from llm2vec.model.settings import set_attention
from llm2vec.model.stock_form import (
    STRAY_BLANK,
    StockForm,
    compare_text,
    possible_forms,
    probes,
    stock_model,
    write_form,
)
from llm2vec.text.templates import add_template_tokens
from llm2vec.types import InstructedText, UserError

INSTRUCTION = "find the answer"

#: `hello` and `who` take the blank before them into their first token, the others leave it alone.
JOINED = ["hello world", "who wrote it? Öl 東京 🙂", "the red world, the green world and the blue world " * 8]
ALONE = ["7 days", "Naïve café", "<|eot_id|> <s> </s> [INST] <|im_end|> <|im_start|>user", "\tdef f(x):\n  return x \n"]


def encoder(
    family: str,
    pooling_mode: str = "last",
    *,
    tokenizer: str | None = None,
    folder: Path | None = None,
    **settings: Any,
) -> LLM2Vec:
    """A random model with the tokenizer that its family gets when loaded from a folder."""
    own = family_tokenizer(tokenizer or family)
    model = tiny_model(family, tokenizer=own, initializer_range=0.2)
    if folder is not None:  # the library has a class of its own for Qwen2, whatever is saved
        model.config.save_pretrained(folder)
        own.save_pretrained(folder)
        own = load_tokenizer(str(folder))  # type: ignore[assignment]
    return LLM2Vec(model, own, pooling_mode, max_length=64, **settings).eval()


def by_llm2vec(model: LLM2Vec, instruction: str, texts: list[str], side: Any = None) -> Tensor:
    vectors = model.encode([[instruction, text] for text in texts], show_progress_bar=False, device="cpu", side=side)
    return torch.nn.functional.normalize(torch.as_tensor(vectors), dim=-1)


def by_stock(stock: SentenceTransformer, prompt: str, texts: list[str]) -> Tensor:
    vectors = stock.encode([text.strip() for text in texts], prompt=prompt, show_progress_bar=False)
    return torch.as_tensor(vectors)


def apart(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def stock_of(model: LLM2Vec, **instructions: str) -> tuple[StockForm, SentenceTransformer]:
    return stock_model(model.model, model.row_tokenizer, model.settings, instructions)


# --- equal to what the project itself computes ---


@pytest.mark.parametrize(
    ("family", "pooling_mode", "settings"),
    [
        ("llama", "last", {"attention": "causal"}),
        ("qwen2", "last", {"attention": "causal"}),
        ("qwen3", "last", {"attention": "bidirectional"}),
        ("mistral", "last", {"attention": "causal"}),
        ("mistral", "last", {"attention": "causal", "tokenizer": "mistral_v3"}),
        ("mistral", "last", {"attention": "causal", "tokenizer": "mistral_sentencepiece"}),
        ("gemma", "last", {"attention": "bidirectional"}),
        ("llama", "last", {"attention": "causal", "template": "plain"}),
        ("llama", "last", {"attention": "causal", "template": "e5_mistral"}),
        ("llama", "last", {"attention": "causal", "template": "qwen3_embedding"}),
        ("llama", "last", {"attention": "causal", "template": "repllama"}),
        ("llama", "mean", {"attention": "bidirectional", "instruction_join": "\n"}),
        ("qwen2", "mean", {"attention": "bidirectional", "instruction_join": "\n"}),
        ("gemma", "mean", {"attention": "causal", "instruction_join": "\n"}),
        ("llama", "mean", {"attention": "bidirectional", "template": "gritlm"}),
        ("qwen2", "mean", {"attention": "bidirectional", "skip_instruction": False}),
        ("mistral", "mean", {"attention": "bidirectional", "skip_instruction": False}),
        ("mistral", "weighted_mean", {"attention": "bidirectional", "skip_instruction": False}),
        ("llama", "first", {"attention": "bidirectional"}),
    ],
)
def test_vectors_equal(family: str, pooling_mode: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """With and without an instruction, cut and short, other scripts, control tokens written out; in mixed batches."""
    model = encoder(family, pooling_mode, folder=tmp_path, **settings)
    form, stock = stock_of(model)
    texts = [*JOINED, *ALONE]
    assert max(len(row.ids) for row in model.row_tokenizer.rows([InstructedText("", t) for t in texts])) == 64
    for side in model.row_tokenizer.sides:
        for instruction in ("", INSTRUCTION, "Given a 2nd question: "):
            ours = by_llm2vec(model, instruction, texts, side)
            assert apart(by_stock(stock, form.prompt(instruction, side), texts), ours) < 1e-5
    without = by_llm2vec(model, "", texts)
    assert apart(by_stock(stock, form.prompt("", "document"), texts), without) < 1e-5
    assert apart(torch.as_tensor(stock.encode([t.strip() for t in texts])), without) < 1e-5  # the default prompt
    assert min(apart(without[i], without[j]) for i in range(len(texts)) for j in range(i)) > 1e-3


def test_a_blank_that_joins_no_token_is_read_by_the_mean_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Exact where the text's first token holds the blank; else the mean has the blank's state in it, and no other."""
    model = encoder("llama", "mean", attention="bidirectional", instruction_join="; ")
    with caplog.at_level(logging.WARNING):
        form, stock = stock_of(model)
    assert STRAY_BLANK in caplog.messages
    assert apart(by_stock(stock, form.prompt(INSTRUCTION), JOINED), by_llm2vec(model, INSTRUCTION, JOINED)) < 1e-5
    for text in JOINED:
        assert not compare_text(stock, form, InstructedText(INSTRUCTION, text)).stray_blank
    for text in ALONE:
        assert compare_text(stock, form, InstructedText(INSTRUCTION, text)).stray_blank
        batch = model.tokenize([[INSTRUCTION, text.strip()]])
        first = int(batch["pool_mask"].int().argmax())
        assert model.tokenizer.decode(batch["input_ids"][0, first - 1]) == " "
        batch["pool_mask"][0, first - 1] = True
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model(batch), dim=-1)
        assert apart(by_stock(stock, form.prompt(INSTRUCTION), [text]), expected) < 1e-5


def test_nothing_is_said_where_all_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        stock_of(encoder("llama", attention="causal"))
        stock_of(encoder("llama", "mean", attention="causal", skip_instruction=False))
    assert STRAY_BLANK not in caplog.messages


# --- the files ---


def test_the_tokenizer_writes_the_whole_turn() -> None:
    """Hand-written ids: header and line break before, closing token behind, also where the text is cut."""
    model = encoder("llama", attention="causal")
    form, stock = stock_of(model)
    vocabulary = model.tokenizer.get_vocab()
    header = ["<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "ĊĊ"]
    expected = [vocabulary[token] for token in [*header, "hello", "Ġworld", "<|eot_id|>"]]
    assert stock.tokenizer("hello world")["input_ids"] == expected
    long = stock.tokenizer("hello world " * 64, truncation=True)["input_ids"]
    assert (len(long), long[:5], long[-1]) == (64, expected[:5], expected[-1])
    assert form.prompt("") == form.prompt("", "document") == ""
    assert form.prompt(INSTRUCTION) == f"{INSTRUCTION} "


def test_user_text_never_becomes_a_control_token() -> None:
    model = encoder("llama", attention="causal")
    _, stock = stock_of(model)
    ids = stock.tokenizer("<|eot_id|> <|begin_of_text|> <|start_header_id|>")["input_ids"]
    special = set(model.tokenizer.added_tokens_decoder)
    assert [position for position, i in enumerate(ids) if i in special] == [0, 1, 3, len(ids) - 1]


def test_prompts_are_found_by_mteb(tmp_path: Path) -> None:
    """Its rule gives queries and symmetric tasks the task's prompt, documents none."""
    _, stock = stock_of(encoder("llama", attention="causal"), NFCorpus=INSTRUCTION, STS12="find")
    retrieval = SimpleNamespace(name="NFCorpus", type="Retrieval")
    other = SimpleNamespace(name="STS12", type="STS")
    asked = [(retrieval, PromptType.query), (retrieval, PromptType.document), (other, None)]
    names = [get_prompt_name(stock.prompts, task, side) for task, side in asked]  # type: ignore[arg-type]
    assert [stock.prompts[name] for name in names] == [f"{INSTRUCTION} ", "", "find "]


def test_a_mean_without_instruction_has_prompts_for_every_text() -> None:
    _, stock = stock_of(encoder("llama", "mean", attention="bidirectional"), T=INSTRUCTION)
    bare, instructed = "\n\n", f"\n\n{INSTRUCTION} "
    assert stock.prompts == {"query": bare, "document": bare, "T": instructed, "T-document": bare}
    assert stock.default_prompt_name == "document"
    assert stock[1].include_prompt is False


def test_attention_keys() -> None:
    """Both words for bidirectional attention, except where the second means something else; none for causal."""
    config = tiny_model("llama").config
    set_attention(config, "causal")
    assert not hasattr(config, "is_causal") and not hasattr(config, "use_bidirectional_attention")
    set_attention(config, "bidirectional")
    assert (config.is_causal, config.use_bidirectional_attention) == (False, True)
    set_attention(config, "causal")
    assert (config.is_causal, config.use_bidirectional_attention) == (True, False)
    gemma3 = Gemma3TextConfig()
    before = gemma3.use_bidirectional_attention
    set_attention(gemma3, "bidirectional")
    assert (gemma3.is_causal, gemma3.use_bidirectional_attention) == (False, before)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_what_attends_in_both_directions_names_a_tokenizer_that_transformers_4_has_not(
    attention: Any, tmp_path: Path
) -> None:
    """It would attend causally without a word; as it has no class of this name, it stops. In 5 both names are one."""
    model = encoder("llama", "mean", attention=attention, instruction_join="\n")
    form = possible_forms(model.row_tokenizer, model.settings)[0]
    write_form(tmp_path, form, 32, attention, {})
    named = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["tokenizer_class"]
    assert named == {"causal": "PreTrainedTokenizerFast", "bidirectional": "TokenizersBackend"}[attention]
    assert transformers.TokenizersBackend is transformers.PreTrainedTokenizerFast
    (row,) = model.row_tokenizer.rows([InstructedText("", "who", "document")])
    assert AutoTokenizer.from_pretrained(tmp_path)(form.prompt("", "document") + "who")["input_ids"] == row.ids


# --- the live model ---


def test_weights_are_shared_and_training_reaches_both(tmp_path: Path) -> None:
    """A gradient step through sentence-transformers moves the embeddings of `LLM2Vec` alike."""
    model = encoder("llama", "mean", attention="bidirectional", instruction_join="\n")
    adapted = LLM2Vec(attach_lora(model.model, r=2, alpha=4, dropout=0.0), model.tokenizer, "mean", 64,
                      attention="bidirectional", instruction_join="\n")  # fmt: skip
    before = by_llm2vec(adapted, "", JOINED)
    stock = adapted.as_sentence_transformer({"T": INSTRUCTION})
    assert {p.data_ptr() for p in stock.parameters()} == {p.data_ptr() for p in adapted.parameters()}
    optimiser = torch.optim.SGD([p for p in stock.parameters() if p.requires_grad], lr=5.0)
    stock.train()
    for _ in range(2):  # B is zero at first, so A moves from the second step on
        features = stock.preprocess(["hello world", "who wrote it"], prompt=stock.prompts["T"])
        left, right = stock(features)["sentence_embedding"]
        optimiser.zero_grad()
        (left @ right).backward()
        optimiser.step()
    moved = by_llm2vec(adapted.eval(), "", JOINED)
    assert apart(before, moved) > 1e-3
    assert apart(by_stock(stock, stock.prompts["document"], JOINED), moved) < 1e-5


def test_the_live_model_can_be_saved_by_its_library(tmp_path: Path) -> None:
    model = encoder("llama", attention="bidirectional")
    stock = model.as_sentence_transformer()
    stock.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert apart(by_stock(again, "", JOINED), by_llm2vec(model, "", JOINED)) < 1e-5


def test_older_transformers_are_refused_by_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it matters: a causal model runs anywhere."""
    installed = environment.get_installed_version
    older = {"transformers": "5.1.0"}
    monkeypatch.setattr(environment, "get_installed_version", lambda name: older.get(name) or installed(name))
    for attention in ("bidirectional", "causal"):
        model = encoder("llama", attention=attention)
        folder = tmp_path / attention
        model.model.save_pretrained(folder)
        form, _ = stock_of(model)
        write_form(folder, form, 32, model.settings.attention, {})
        if attention == "causal":
            SentenceTransformer(str(folder), device="cpu")
        else:
            with pytest.raises(ImportError, match="ignore is_causal"):
                SentenceTransformer(str(folder), device="cpu")


# --- what cannot be said ---


def added(template: str, pooling_mode: str) -> LLM2Vec:
    tokenizer = family_tokenizer("llama")
    add_template_tokens(tokenizer, template)
    return LLM2Vec(tiny_model("llama", tokenizer=tokenizer), tokenizer, pooling_mode, template=template)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: encoder("llama", template="echo"), "writes the text twice"),
        (lambda: added("llara", "mean"), "ends queries and documents differently"),
        (lambda: added("bge_en_icl", "last"), "ends queries and documents differently"),
        (lambda: encoder("llama", "weighted_mean"), "weights a token by its place in the whole row"),
        (lambda: encoder("llama", doc_max_length=20), "knows one limit, that of the whole row"),
        (lambda: encoder("llama", "mean", template="plain"), "begins a text that has no instruction with"),
        (lambda: encoder("mistral", "mean", tokenizer="mistral_v3"), "begins a text that has no instruction with"),
        (lambda: encoder("mistral", "mean"), "allows for one special token there"),
    ],
)
def test_refusals_name_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make().as_sentence_transformer()


def test_a_tokenizer_that_drops_no_blanks_is_found_out(tmp_path: Path) -> None:
    """transformers rebuilds Qwen2's normaliser, so the count of an instruction's tokens is off by one."""
    model = encoder("qwen2", "mean", folder=tmp_path, attention="bidirectional")
    with pytest.raises(UserError, match="leaves 38 tokens out of the mean, not 37"):
        model.as_sentence_transformer()


def test_a_limit_that_never_binds_is_no_reason() -> None:
    model = encoder("llama", doc_max_length=58, attention="causal")
    _, stock = stock_of(model)
    assert apart(by_stock(stock, "", JOINED), by_llm2vec(model, "", JOINED)) < 1e-5


def test_probes_tell_wrong_forms() -> None:
    """Each part of a form matters to some probe: without it, a difference is found and named."""
    model = encoder("llama", attention="causal")
    good = possible_forms(model.row_tokenizer, model.settings)[0]
    for wrong in (
        dataclasses.replace(good, behind=()),
        dataclasses.replace(good, before=good.before[1:]),
        dataclasses.replace(good, written=""),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stock_form, "possible_forms", lambda *_, wrong=wrong: [wrong])
            with pytest.raises(UserError, match="becomes"):
                model.as_sentence_transformer()


def test_probes_have_both_sides_of_a_template() -> None:
    rows = encoder("llama", template="e5_mistral").row_tokenizer
    assert {text.side for text in probes(rows)} == {"query", "document"}
    assert json.dumps([text.text for text in probes(rows)])  # plain text, as it goes to probe_ids.json


def test_auto_classes_read_the_written_tokenizer(tmp_path: Path) -> None:
    """What AutoTokenizer makes of the folder, in the class it chooses, writes the same ids."""
    for family in ("llama", "qwen2", "mistral", "gemma"):
        folder = tmp_path / family
        model = encoder(family, folder=folder, attention="causal")
        form, _ = stock_of(model)
        write_form(folder, form, 32, "causal", {})
        assert AutoConfig.from_pretrained(folder).model_type == family
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [form.prompt(INSTRUCTION) + text.strip() for text in [*JOINED, *ALONE]]
        rows = model.row_tokenizer.rows([InstructedText(INSTRUCTION, text) for text in [*JOINED, *ALONE]])
        assert tokenizer(texts, truncation=True)["input_ids"] == [row.ids for row in rows]
        assert set(tokenizer(texts[0])) == {"input_ids", "attention_mask"}
