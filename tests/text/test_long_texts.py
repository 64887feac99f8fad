"""Texts that are cut before they are tokenised become the same rows as whole ones."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import FAMILIES, family_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llm2vec.text import long_texts, tokenization
from llm2vec.text.long_texts import CHARACTERS_AT_ONCE, beginning_of, in_parts
from llm2vec.text.templates import infer_template
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import InstructedText

#: Parts that a text repeats: what tokenizers join most, or not at all, or group from the right.
PARTS = {
    "words": "hello world ", "one letter": "x", "digits": "7", "blanks and a word": " " * 60 + "a", "lines": "\n\na",
    "accents": "é", "combining": "e\u0301", "han": "東京", "emoji": "👩‍👩‍👧", "punctuation": "-=", "mixed": "a,é 1\n",
    "camel": "helloWorld", "special": "</s> <|eot_id|>", "zero width": "a\u200b", "nothing known": "\u0e01",
}  # fmt: skip


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of another kind than `FAMILIES`, trained on words of all lengths."""
    draw = random.Random(0)
    words = ["".join(draw.choices("helowrdtisabcnm", k=draw.randint(1, 12))) for _ in range(500)]
    words += [str(draw.randrange(10 ** draw.randint(1, 9))) for _ in range(500)]
    lines = [" ".join(draw.choices(words, k=20)) for _ in range(200)]
    unk: dict[str, Any] = {"special_tokens": ["<unk>", "</s>"]}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer: Any = trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", **unk)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))  # type: ignore[arg-type]
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=600, **unk)
    else:  # BPE over the whole text, or in pieces of which digits are grouped from the right
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=kind == "fused"))
        if kind == "grouped":
            pattern = Regex(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\s+(?!\S)|\s+|[^\s\p{N}]+")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
        trainer = trainers.BpeTrainer(vocab_size=600, **unk)
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", bos_token="</s>")


KINDS = (*FAMILIES, "unigram", "wordpiece", "whole", "grouped", "fused")


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return family_tokenizer(kind) if kind in FAMILIES else trained(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_that_of_the_whole_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every part alone, and for texts that go from one to another where the cut falls."""
    tokenizer = tokenizer_of(kind)
    rows = RowTokenizer(tokenizer, infer_template(tokenizer) if kind in FAMILIES else "plain", "last", 24)
    draw = random.Random(kind)
    texts = [(part * 8_000)[:8_000] for part in PARTS.values()]
    for _ in range(30):
        first, second = draw.sample(sorted(PARTS), 2)
        texts.append((PARTS[first] * 2_000)[: draw.randint(60, 900)] + (PARTS[second] * 8_000)[:8_000])
    entries = [InstructedText(instruction, text) for text in texts for instruction in ("", "find it")]
    monkeypatch.setattr(long_texts, "LONG", 1 << 40)
    whole = rows.rows(entries)
    monkeypatch.setattr(long_texts, "LONG", 100)
    monkeypatch.setattr(tokenization, "EXAMPLE_PART", 24)
    seen: list[int] = []

    def noted(*given: Any) -> str:
        seen.append(len(found := beginning_of(*given)))
        return found

    monkeypatch.setattr(tokenization, "beginning_of", noted)
    assert rows.rows(entries) == whole
    # Where a marker is ordinary text and stands behind the user's, that is left whole.
    assert kind.startswith("mistral") or sum(length < 7_000 for length in seen) > 20


def test_digits_that_are_grouped_from_the_right_are_left_whole() -> None:
    tokenizer = trained("grouped")
    text = "1234567890" * 15_000
    assert beginning_of(text, 0, 24, tokenizer) == text
    assert len(beginning_of("word " * 30_000, 0, 24, tokenizer)) < 1_000


def test_a_text_of_many_megabytes_takes_no_time() -> None:
    """And a batch of long ones goes through the tokenizer in parts."""
    rows = RowTokenizer(family_tokenizer("llama3"), "llama3", "last", 64)
    began = time.process_time()
    for part in ("hello world ", "x"):
        assert len(rows.rows([InstructedText("", part * 2_000_000)])[0].ids) == 64
    assert time.process_time() - began < 5
    sizes = [len(part) for part in in_parts(["x" * (CHARACTERS_AT_ONCE // 2)] * 5)]
    assert sum(sizes) == 5 and max(sizes) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2"])
def test_a_real_tokenizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's, where `llm2vec base` has fetched it: prose, code, and each of its longest tokens again and again."""
    folder = Path("output") / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no {folder}; llm2vec base smollm2-135m {folder}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = RowTokenizer(tokenizer, "plain", "mean", 64)
    by_length = sorted(tokenizer.get_vocab().values(), key=lambda token: len(tokenizer.decode([token])))
    parts = [tokenizer.decode([token]) for token in by_length[-150:]]
    parts += [*PARTS.values(), Path(__file__).read_text(encoding="utf-8")]
    entries = [InstructedText("", (part * 40_000)[:40_000]) for part in parts]
    monkeypatch.setattr(long_texts, "LONG", 1 << 40)
    whole = rows.rows(entries)
    monkeypatch.setattr(long_texts, "LONG", 100)
    monkeypatch.setattr(tokenization, "EXAMPLE_PART", 64)
    assert rows.rows(entries) == whole
