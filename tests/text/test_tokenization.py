"""Rows of tokens against lists written by hand: every template with its family's tokenizer, masks, cutting, padding."""

from __future__ import annotations

import random
import unicodedata
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import pytest
import torch
from helpers import FAMILIES, family_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from llm2vec.model.pooling import pool
from llm2vec.model.settings import EncoderSettings
from llm2vec.text.probe_texts import PROBE_TEXTS, probe_ids
from llm2vec.text.templates import TEMPLATES, bare_instruction, infer_template, segments_of
from llm2vec.text.tokenization import Row, RowTokenizer
from llm2vec.types import InstructedText, PoolingMode, TextSide, UserError


class Case(NamedTuple):
    """A template on a tokenizer: what stands before the content, what after, and what is added under `last` only.

    `blank` is what the first word of the content begins with: the blank that a text marker, or a SentencePiece-like
    vocabulary, puts before it.
    """

    template: str
    family: str
    header: list[str]
    suffix: list[str]
    last_only: list[str]
    blank: str


CASES = [
    Case(
        "llama3",
        "llama3",
        ["<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "ĊĊ"],
        ["<|eot_id|>"],
        [],
        "",
    ),
    Case("qwen2", "qwen2", ["<|im_start|>", "user", "Ċ"], ["<|im_end|>"], [], ""),
    Case("gemma", "gemma", ["<bos>", "<start_of_turn>", "user", "Ċ"], ["<end_of_turn>"], [], ""),
    Case("mistral", "mistral", ["<s>", "[", "INST", "]"], ["Ġ", "[", "/", "INST", "]"], ["</s>"], "Ġ"),
    Case("mistral", "mistral_v3", ["<s>", "[INST]"], ["[/INST]"], ["</s>"], ""),
    Case(
        "mistral",
        "mistral_sentencepiece",
        ["<s>", "▁", "[", "INST", "]"],
        ["▁", "[", "/", "INST", "]"],
        ["</s>"],
        "▁",
    ),
    Case("plain", "plain", ["<s>"], [], ["</s>"], ""),
    Case("plain", "qwen2", [], [], ["<|im_end|>"], ""),
    Case("plain", "mistral_sentencepiece", ["<s>"], [], ["</s>"], "▁"),
]
IDS = [f"{case.template}-{case.family}" for case in CASES]
all_cases = pytest.mark.parametrize("case", CASES, ids=IDS)
last_and_mean = pytest.mark.parametrize("pooling", ["last", "mean"])
with_and_without_instruction = pytest.mark.parametrize("instruction", ["", "find the answer"])

TRICKY_TEXTS = [
    "hello world",
    "  hello  world \n",
    "\n\n hello",
    "\thello\r\nworld\t",
    "Naïve café, 東京 1234567",
    "👩‍👩‍👧 e\u0301\u0323 \u202eabc ﬁ ½",
    "hello\n\n\nworld\n\tdef f(x): return x",
    "[ hello ]",
    "; hello",
    "x" * 40,
    "\u00a0hello\u3000",
    "...",
]


def row_tokenizer(case: Case, pooling: PoolingMode = "last", max_length: int = 64, **options: Any) -> RowTokenizer:
    return RowTokenizer(family_tokenizer(case.family), case.template, pooling, max_length, **options)


def row_of(tokenizer: RowTokenizer, text: str, instruction: str = "") -> Row:
    (row,) = tokenizer.rows([InstructedText(instruction, text)])
    return row


def tokens_of(tokenizer: RowTokenizer, row: Row) -> list[str]:
    return tokenizer.tokenizer.convert_ids_to_tokens(row.ids)


def hand_written(case: Case, instruction: str, pooling: str) -> tuple[list[str], str]:
    """Tokens of "hello world" (under "find the answer; ") and, token by token, what each is: h(eader),
    i(nstruction), t(ext) or s(uffix)."""
    blank = "▁" if "sentencepiece" in case.family else "Ġ"
    if instruction:
        body, kinds = [f"{case.blank}find", f"{blank}the", f"{blank}answer", ";", f"{blank}hello"], "iiiit"
    else:
        body, kinds = [f"{case.blank}hello"], "t"
    suffix = case.suffix + (case.last_only if pooling == "last" else [])
    tokens = [*case.header, *body, f"{blank}world", *suffix]
    return tokens, "h" * len(case.header) + kinds + "t" + "s" * len(suffix)


def marked(kinds: str, wanted: str) -> list[bool]:
    return [kind in wanted for kind in kinds]


# What a row is


@last_and_mean
@with_and_without_instruction
@all_cases
def test_row_equals_the_list_by_hand(case: Case, instruction: str, pooling: PoolingMode) -> None:
    """Token for token, with the closing EOS of `mistral` and `plain` under last pooling only."""
    tokenizer = row_tokenizer(case, pooling)
    row = row_of(tokenizer, "hello world", instruction)
    assert tokens_of(tokenizer, row) == hand_written(case, instruction, pooling)[0]


@pytest.mark.parametrize("pooling", ["weighted_mean", "first"])
@all_cases
def test_other_modes_write_the_row_of_mean(case: Case, pooling: PoolingMode) -> None:
    """Only `last` has a reader for the added EOS."""
    text = "hello world"
    assert row_of(row_tokenizer(case, pooling), text).ids == row_of(row_tokenizer(case, "mean"), text).ids


@pytest.mark.parametrize("text", TRICKY_TEXTS)
@with_and_without_instruction
@pytest.mark.parametrize("case", [c for c in CASES if c.template != "plain"], ids=[i for i in IDS if "plain" not in i])
def test_row_equals_the_chat_format_tokenised_in_one_go(case: Case, instruction: str, text: str) -> None:
    """The tokenizer's own chat format as one string, special tokens read from it, gives the same ids.

    Two differences are meant: Qwen's and Gemma's line break after the turn is left out, as the vector is the state
    at the closing token, and Mistral's EOS is added.
    """
    tokenizer = row_tokenizer(case, max_length=512)
    reference = family_tokenizer(case.family)
    content = f"{instruction}; {text.strip()}" if instruction else text.strip()
    turn = reference.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert isinstance(turn, str)
    expected = turn.removesuffix("\n") + "".join(case.last_only)
    assert row_of(tokenizer, text, instruction).ids == reference(expected, add_special_tokens=False)["input_ids"]


@all_cases
def test_random_texts_come_back_whole(case: Case) -> None:
    """The target tokens spell the text, whatever characters it has, and are nothing but the text."""
    tokenizer = row_tokenizer(case, max_length=10_000)
    generator = random.Random(0)
    alphabet = [*" \n\té東👩\u0301\u200d1[]/;<|>a", "hello"]
    texts = [*TRICKY_TEXTS, *("".join(generator.choices(alphabet, k=30)) for _ in range(100))]
    for text in texts:
        row = row_of(tokenizer, text)
        target = [i for i, is_target in zip(row.ids, row.target, strict=True) if is_target]
        decoded = tokenizer.tokenizer.decode(target, skip_special_tokens=False)
        expected = unicodedata.normalize("NFC", text) if case.family == "qwen2" else text
        assert decoded.removeprefix(" ") == expected.strip()


@all_cases
def test_blanks_around_text_and_instruction_do_not_matter(case: Case) -> None:
    tokenizer = row_tokenizer(case)
    clean = row_of(tokenizer, "hello world", "find the answer")
    assert row_of(tokenizer, " \n hello world\t\n", "  find the answer \n") == clean


@all_cases
def test_rows_do_not_depend_on_their_batch(case: Case) -> None:
    """Many texts at once give what each gives alone, in order; empty ones among them shift nothing."""
    tokenizer = row_tokenizer(case)
    texts = [InstructedText("find the answer" if i % 2 else "", text) for i, text in enumerate([*TRICKY_TEXTS, "", ""])]
    assert tokenizer.rows(texts) == [row_of(tokenizer, text.text, text.instruction) for text in texts]


@all_cases
def test_special_tokens_inside_a_text_stay_text(case: Case) -> None:
    """Nobody closes a turn from within a text or an instruction: a control id stands only where the template put it."""
    tokenizer = row_tokenizer(case, max_length=512)
    control = set(tokenizer.tokenizer.added_tokens_decoder)
    attack = "".join(token + " hello " + token for token in FAMILIES[case.family][0]) + "<s></s>[INST][/INST]"
    row = row_of(tokenizer, attack, f"find {attack} the")
    harmless = row_of(tokenizer, "hello", "find the")
    assert [i for i in row.ids if i in control] == [i for i in harmless.ids if i in control]
    target = [i for i, is_target in zip(row.ids, row.target, strict=True) if is_target]
    assert tokenizer.tokenizer.decode(target).strip() == attack


@all_cases
def test_closing_token_is_the_last_of_the_row(case: Case) -> None:
    """Under last pooling a single known id ends every row, and it alone decides the vector."""
    tokenizer = row_tokenizer(case)
    row = row_of(tokenizer, "hello world", "find the answer")
    assert tokenizer.closing_token_id is not None
    assert tokens_of(tokenizer, row)[-1] == [*case.suffix, *case.last_only][-1]
    assert row.ids[-1] == tokenizer.closing_token_id
    batch = tokenizer.pad([row])
    hidden_BTD = torch.arange(len(row.ids)).float().reshape(1, -1, 1)
    assert pool(hidden_BTD, batch["pool_mask"], "last").item() == len(row.ids) - 1


# Masks


@last_and_mean
@with_and_without_instruction
@all_cases
def test_pool_mask_leaves_header_and_instruction_out(case: Case, instruction: str, pooling: PoolingMode) -> None:
    tokenizer = row_tokenizer(case, pooling)
    row = row_of(tokenizer, "hello world", instruction)
    assert row.pooled == marked(hand_written(case, instruction, pooling)[1], "ts")


@pytest.mark.parametrize(("pooling", "skip"), [("mean", False), ("weighted_mean", False), ("first", True)])
@all_cases
def test_pool_mask_covers_the_row(case: Case, pooling: PoolingMode, skip: bool) -> None:
    """Without skip_instruction, and under first pooling whatever that key says."""
    tokenizer = row_tokenizer(case, pooling, skip_instruction=skip)
    row = row_of(tokenizer, "hello world", "find the answer")
    assert row.pooled == [True] * len(row.ids)


@last_and_mean
@with_and_without_instruction
@all_cases
def test_target_is_the_text_alone(case: Case, instruction: str, pooling: PoolingMode) -> None:
    """No header, instruction, suffix or closing token is reconstructed."""
    row = row_of(row_tokenizer(case, pooling), "hello world", instruction)
    assert row.target == marked(hand_written(case, instruction, pooling)[1], "t")


@with_and_without_instruction
@all_cases
def test_target_with_the_instruction(case: Case, instruction: str) -> None:
    """`reconstruct_instruction` adds the instruction and nothing else."""
    row = row_of(row_tokenizer(case, reconstruct_instruction=True), "hello world", instruction)
    assert row.target == marked(hand_written(case, instruction, "last")[1], "it")


def test_a_token_across_the_border_belongs_to_the_text() -> None:
    """With a blank join, one token may hold the instruction's end and the text's start."""
    tokenizer = row_tokenizer(CASES[0], instruction_join="")
    row = row_of(tokenizer, "lo world", "find hel")
    assert tokens_of(tokenizer, row)[5:-1] == ["find", "Ġhello", "Ġworld"]
    assert row.target == [*[False] * 6, True, True, False]


@last_and_mean
@with_and_without_instruction
@all_cases
def test_empty_text(case: Case, instruction: str, pooling: PoolingMode) -> None:
    """The row is the template around nothing: no target, and still at least one position to pool over."""
    tokenizer = row_tokenizer(case, pooling)
    row = row_of(tokenizer, " \n", instruction)
    suffix = case.suffix + (case.last_only if pooling == "last" else [])
    assert not any(row.target)
    assert any(row.pooled)
    if suffix:
        assert tokens_of(tokenizer, row)[-len(suffix) :] == suffix
        assert row.pooled == [*[False] * (len(row.ids) - len(suffix)), *[True] * len(suffix)]


@last_and_mean
@all_cases
def test_empty_text_has_a_finite_vector(case: Case, pooling: PoolingMode) -> None:
    """Evaluation sets hold empty documents; their vector must not be NaN."""
    tokenizer = row_tokenizer(case, pooling)
    batch = tokenizer([InstructedText("", ""), InstructedText("", "hello world")])
    vector_BD = pool(torch.ones(*batch["input_ids"].shape, 3), batch["pool_mask"], pooling)
    assert vector_BD.isfinite().all()


# Cutting


@last_and_mean
@with_and_without_instruction
@all_cases
def test_only_the_text_is_cut(case: Case, instruction: str, pooling: PoolingMode) -> None:
    """A very long text fills the row exactly; header, instruction, suffix and closing token are all still there."""
    tokenizer = row_tokenizer(case, pooling, max_length=24)
    row = row_of(tokenizer, "hello world " + "red green " * 2000, instruction)
    short, kinds = hand_written(case, instruction, pooling)
    num_text = 24 - sum(kind != "t" for kind in kinds)
    blank = "▁" if "sentencepiece" in case.family else "Ġ"
    before, after = kinds.index("t"), kinds.rindex("t") + 1
    text = [*short[before:after], *[f"{blank}red", f"{blank}green"] * 24][:num_text]
    assert tokens_of(tokenizer, row) == [*short[:before], *text, *short[after:]]
    assert row.pooled == marked(kinds[:before] + "t" * num_text + kinds[after:], "ts")
    assert row.target == marked(kinds[:before] + "t" * num_text + kinds[after:], "t")


@all_cases
def test_a_row_that_just_fits_is_whole(case: Case) -> None:
    """At max_length nothing is lost; one less costs the last text token and no other."""
    whole, kinds = hand_written(case, "find the answer", "last")
    fits = row_tokenizer(case, max_length=len(whole))
    assert tokens_of(fits, row_of(fits, "hello world", "find the answer")) == whole
    tight = row_tokenizer(case, max_length=len(whole) - 1)
    last_text = kinds.rindex("t")
    expected = [*whole[:last_text], *whole[last_text + 1 :]]
    assert tokens_of(tight, row_of(tight, "hello world", "find the answer")) == expected


@pytest.mark.parametrize(("limit", "num_text"), [(1, 1), (3, 3), (100, 9)])
def test_text_max_length_counts_text_tokens(limit: int, num_text: int) -> None:
    """It bounds the text alone; max_length (15 = 5 of the header, 9 of text, 1 closing) still bounds the row."""
    tokenizer = row_tokenizer(CASES[0], max_length=15, text_max_length=limit)
    row = row_of(tokenizer, "hello " * 50)
    assert sum(row.target) == num_text
    assert len(row.ids) == 6 + num_text
    assert row.ids[-1] == tokenizer.closing_token_id


@pytest.mark.parametrize("text", ["hello", "hello " * 1000, ""], ids=["short", "long", "empty"])
@last_and_mean
@all_cases
def test_an_instruction_that_leaves_no_room_is_an_error(case: Case, pooling: PoolingMode, text: str) -> None:
    """Instead of a row without text, or one beyond max_length."""
    tokenizer = row_tokenizer(case, pooling, max_length=16)
    with pytest.raises(UserError, match=r"max_length is 16.*'find find.*shorten the instruction"):
        row_of(tokenizer, text, "find " * 16)


def test_half_a_surrogate_pair_is_named() -> None:
    tokenizer = row_tokenizer(CASES[0])
    with pytest.raises(UserError, match=r"half a surrogate pair, or is not UTF-8: '.*hello \\ud83d world'"):
        tokenizer.rows([InstructedText("", text) for text in ("it", "hello \ud83d world", "\ud800")])


def test_no_row_is_longer_than_max_length() -> None:
    """Whatever instruction and text, unless they are refused."""
    tokenizer = row_tokenizer(CASES[3], max_length=20)
    for text in ("", "hello", "東京 " * 30):
        for length in range(12):
            try:
                assert len(row_of(tokenizer, text, "find " * length).ids) <= 20
            except UserError:
                assert length > 5


# Padding


@last_and_mean
@all_cases
def test_both_padding_sides_hold_the_same_rows(case: Case, pooling: PoolingMode) -> None:
    """Ids and masks of a row are the same on either side, and every mask is zero on the padding."""
    texts = [InstructedText("find the answer", "hello"), InstructedText("", "hello world " * 5), InstructedText("", "")]
    rows = row_tokenizer(case, pooling).rows(texts)
    length = max(len(row.ids) for row in rows)
    for side in ("right", "left"):
        tokenizer = row_tokenizer(case, pooling)
        tokenizer.tokenizer.padding_side = side
        batch = tokenizer(texts)
        assert {name: tuple(t.shape) for name, t in batch.items()} == dict.fromkeys(
            ("input_ids", "attention_mask", "pool_mask", "target_mask"), (3, length)
        )
        for i, row in enumerate(rows):
            n = len(row.ids)
            real = slice(0, n) if side == "right" else slice(length - n, length)
            padding = slice(n, length) if side == "right" else slice(0, length - n)
            assert batch["input_ids"][i, real].tolist() == row.ids
            assert batch["attention_mask"][i, real].tolist() == [1] * n
            assert batch["pool_mask"][i, real].tolist() == row.pooled
            assert batch["target_mask"][i, real].tolist() == row.target
            for mask in ("attention_mask", "pool_mask", "target_mask"):
                assert not batch[mask][i, padding].any()


def test_padding_uses_the_padding_token() -> None:
    """And 0, which every vocabulary has, where the tokenizer has none."""
    texts = [InstructedText("", "hello"), InstructedText("", "hello world")]
    with_pad, without = row_tokenizer(CASES[1]), row_tokenizer(CASES[0])
    assert with_pad.tokenizer.pad_token == "<|endoftext|>"
    assert with_pad(texts)["input_ids"][0, -1] == with_pad.tokenizer.pad_token_id
    assert without.tokenizer.pad_token is None
    assert without(texts)["input_ids"][0, -1] == 0


# Instructions


@pytest.mark.parametrize(
    ("instruction", "join", "expected"),
    [
        ("", "; ", ""),
        (" \n", "; ", ""),
        ("find it", "; ", "find it; "),
        (" find it ", "; ", "find it; "),
        ("find it:", "; ", "find it; "),
        ("find it;", ": ", "find it: "),
        ("find it: ", ": ", "find it: "),
        ("find it :;", ": ", "find it: "),
        ("find: it", ": ", "find: it: "),
        ("find it.", "; ", "find it.; "),
        ("find it?", ": ", "find it?: "),
        ("find it:", " ", "find it: "),
        ("find it:", "\n", "find it:\n"),
        ("find it:", "", "find it:"),
    ],
)
def test_joining_instruction_and_text(instruction: str, join: str, expected: str) -> None:
    """A join with punctuation replaces a closing colon or semicolon; a blank one leaves the instruction as it is."""
    assert bare_instruction(instruction, join) == expected.removesuffix(join)


@all_cases
def test_the_join_key_is_used(case: Case) -> None:
    """Training's table (no colon) and evaluation's (colon) give one row; another join gives another."""
    plain, colon = (
        row_of(row_tokenizer(case), "hello", instruction) for instruction in ("find the answer", "find the answer:")
    )
    assert plain == colon
    other = row_tokenizer(case, instruction_join=": ")
    row = row_of(other, "hello", "find the answer")
    assert tokens_of(other, row).count(":") == 1
    assert row.ids != plain.ids


# Which template


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("llama3", "llama3"),
        ("qwen2", "qwen2"),
        ("gemma", "gemma"),
        ("mistral", "mistral"),
        ("mistral_v3", "mistral"),
        ("mistral_sentencepiece", "mistral"),
        ("plain", "plain"),
    ],
)
def test_template_is_inferred_from_the_special_tokens(family: str, template: str) -> None:
    assert infer_template(family_tokenizer(family)) == template


@pytest.mark.parametrize("family", ["llama3", "qwen2", "gemma", "mistral_v3"])
def test_a_base_model_with_turn_tokens_gets_its_family(family: str) -> None:
    """The turn tokens decide, chat format or not: a family's base model has them too."""
    tokenizer = family_tokenizer(family)
    tokenizer.chat_template = None
    assert infer_template(tokenizer) == family.removesuffix("_v3")


def test_turn_tokens_of_two_families_are_not_guessed() -> None:
    tokenizer = family_tokenizer("llama3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(UserError, match=r"template: .*llama3 and qwen2.*set `template` to one of llama3, qwen2"):
        infer_template(tokenizer)


def test_an_unknown_chat_format_is_not_guessed() -> None:
    """Plain text would be wrong for an instruct model of a family we do not know."""
    tokenizer = family_tokenizer("plain")
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"template: .*unknown family.*set `template` to one of"):
        infer_template(tokenizer)


def test_half_a_family_is_no_family() -> None:
    """A stray <|im_end|> (some base models have it) makes no Qwen turn."""
    tokenizer = family_tokenizer("plain")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert infer_template(tokenizer) == "plain"


@pytest.mark.parametrize("instruction", ["find", "e\u0301e\u0301e\u0301 find", "e\u0301" * 20])
def test_masks_follow_a_text_that_the_tokenizer_rewrites(instruction: str) -> None:
    """Qwen's vocabulary joins accents to letters first, so what it counts is not what was written."""
    tokenizer = row_tokenizer(CASES[1], max_length=128, reconstruct_instruction=True)
    row = row_of(tokenizer, "e\u0301 hello", instruction)
    target = [i for i, is_target in zip(row.ids, row.target, strict=True) if is_target]
    expected = unicodedata.normalize("NFC", f"{instruction}; e\u0301 hello")
    assert tokenizer.tokenizer.decode(target) == expected
    text_only = row_of(row_tokenizer(CASES[1], max_length=128), "e\u0301 hello", instruction)
    target = [i for i, is_target in zip(text_only.ids, text_only.target, strict=True) if is_target]
    assert tokenizer.tokenizer.decode(target).strip() == "é hello"


def test_unknown_template_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=rf"template is 'llama2'; allowed: {', '.join(TEMPLATES)}, and with K"):
        segments_of("llama2", "last")


@pytest.mark.parametrize(
    ("template", "family", "missing"),
    [
        ("llama3", "qwen2", r"<\|start_header_id\|>"),
        ("qwen2", "llama3", r"<\|im_start\|>"),
        ("gemma", "plain", "<start_of_turn>"),
    ],
)
def test_a_template_the_tokenizer_cannot_write_is_an_error(template: str, family: str, missing: str) -> None:
    """Never a turn token spelled out in ordinary characters."""
    with pytest.raises(UserError, match=f"template '{template}' needs '{missing}', which the tokenizer does not have"):
        RowTokenizer(family_tokenizer(family), template, "last", 64)


@pytest.mark.parametrize("template", ["plain", "mistral"])
def test_last_pooling_needs_an_eos(template: str) -> None:
    """Without one the vector would be some text token's; mean pooling goes without."""
    tokenizer = family_tokenizer("plain")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        RowTokenizer(tokenizer, template, "last", 64)
    assert RowTokenizer(tokenizer, template, "mean", 64).closing_token_id is None


def test_a_slow_tokenizer_is_refused() -> None:
    """Without character offsets there are no masks."""
    slow: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(UserError, match="fast"):
        RowTokenizer(slow, "plain", "last", 64)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "gritlm"])
def test_every_template_but_one_ends_in_its_closing_token(name: str) -> None:
    """Under last pooling, on both sides."""
    for side in get_args(TextSide):
        closing = segments_of(name, "last", side)[-1]
        assert closing.kind in ("special", "eos") and closing.pooled


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_gives_way_is_the_text(name: str) -> None:
    """Nothing else is cut, and no copy of the text is kept whole."""
    for mode in set(get_args(PoolingMode)) - {"last"}:
        for side in get_args(TextSide):
            segments = segments_of(name, mode, side)
            assert [s.kind for s in segments if s.truncate] == [s.kind for s in segments if s.kind == "text"] != []


def test_last_pooling_needs_a_closing_token() -> None:
    """The state at the text's last token would be that of whatever word stands there."""
    for make in (
        lambda: RowTokenizer(family_tokenizer("plain"), "gritlm", "last", 64),
        lambda: EncoderSettings(template="gritlm", pooling_mode="last"),
        lambda: EncoderSettings(template="gritlm", pooling_mode="eos_token"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=r"^pooling_mode is 'last', but template 'gritlm' writes no closing token"):
            make()


# Probes


def test_probes_tell_templates_and_vocabularies_apart() -> None:
    """The ids stored with a checkpoint repeat, and change with template, join and vocabulary. Where rows are too short
    for a probe's instruction, which nobody else wrote, it says nothing."""

    def ids(template: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[list[int]]:
        return probe_ids(RowTokenizer(tokenizer, template, "last", 512, **options))

    reference = ids("llama3", family_tokenizer("llama3"))
    assert len(reference) == len(PROBE_TEXTS)
    assert ids("llama3", family_tokenizer("llama3")) == reference
    assert ids("plain", family_tokenizer("llama3")) != reference
    assert ids("llama3", family_tokenizer("llama3"), instruction_join=": ") != reference
    with_room, without = (
        probe_ids(RowTokenizer(family_tokenizer("llama3"), "llama3", "last", most)) for most in (512, 40)
    )
    assert without[0] == with_room[0] and with_room[1] and without[1] == []
    grown = family_tokenizer("llama3")
    grown.add_tokens([AddedToken("fox", special=False)])
    assert ids("llama3", grown) != reference
