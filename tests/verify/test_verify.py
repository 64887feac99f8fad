"""`verify` passes what is the same in every way of loading, and names what is not, by its cause."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_jsonl
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from verify_folders import (
    BIDIRECTIONAL,
    causal_reload,
    change_json,
    failures,
    save_adapter,
    save_base,
    save_export,
)

from llm2vec.choice import ModelChoice
from llm2vec.model.chain import RUN_FILE
from llm2vec.model.settings import EncoderSettings
from llm2vec.text.tokenization import Row
from llm2vec.types import InstructedText, UserError
from llm2vec.verify.causes import find_cause, with_ids
from llm2vec.verify.compare import ask_way, bundled_texts, compare_answers, read_own_texts
from llm2vec.verify.loaded import open_way
from llm2vec.verify.ways import Choice, choices_of, read_json_of, rendering_of


@pytest.fixture(scope="module")
def half(made: Path) -> Path:
    """The export, stored in bfloat16."""
    return save_export(made / "half", str(made / "base"), str(made / "adapter"), "bfloat16")


# --- what is the same passes ---


def test_checkpoint_and_export_agree_in_every_way(made: Path, verify: Any) -> None:
    code, printed = verify(made / "adapter", made / "exported")
    assert code == 0, printed
    rows = [line for line in printed.splitlines() if line.endswith(" ok")]
    assert [row.split("  ")[0] for row in rows] == [
        "ours, padded", "ours, merged", "ours", "sentence-transformers", "transformers"
    ]  # fmt: skip
    assert all(" equal " in row and "1.000000" in row for row in rows)
    assert "FAIL" not in printed


def test_mean_pooling_without_the_instruction_agrees(made: Path, tmp_path: Path, verify: Any) -> None:
    """On texts that the tokenizer joins with the blank before them."""
    asked = [
        {"text": text, "instruction": i} for text in ("hello world", "who wrote it", "it " * 70) for i in ("", "find")
    ]
    texts = write_jsonl(tmp_path / "texts.jsonl", asked)
    code, printed = verify(made / "mean_base", made / "mean_exported", "--texts", texts)
    assert code == 0, printed
    assert "sentence-transformers and transformers do not apply" in printed
    assert printed.count(" ok") == 4


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("family", "template"),
    [("qwen2", "qwen2"), ("qwen3", "qwen3_embedding"), ("gemma", "gemma"), ("mistral", "mistral"), ("llama", "plain"),
     ("mistral", "e5_mistral"), ("mistral", "repllama")],
)  # fmt: skip
def test_families_and_templates_agree(tmp_path: Path, verify: Any, family: str, template: str, attention: Any) -> None:
    settings = EncoderSettings("last", 64, template=template, instruction_join=" ", attention=attention)
    base = save_base(tmp_path / "base", settings, family=family)
    code, printed = verify(base, save_export(tmp_path / "exported", base))
    assert code == 0, printed
    assert printed.count(" equal ") == 4


def test_a_blank_that_is_pooled_over_is_named(made: Path, tmp_path: Path, verify: Any) -> None:
    """A tokenizer has the last word on which token the blank behind an instruction belongs to."""
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "12 o'clock", "instruction": "find"}, {"text": "hello"}])
    code, printed = verify(made / "mean_base", made / "mean_exported", "--texts", texts)
    assert code == 1
    assert failures(printed) == {"sentence-transformers": "pooling", "transformers": "pooling"}


def test_the_reference_may_be_the_export(made: Path, verify: Any) -> None:
    code, printed = verify(
        f"st:{made / 'exported'}", f"{made / 'base'}+{made / 'adapter'}", f"ours:{made / 'exported'}"
    )
    assert code == 0, printed
    assert printed.startswith("reference: sentence-transformers ")


def test_a_folder_that_names_no_length_has_the_models(damaged: Path, verify: Any) -> None:
    """As older versions of sentence-transformers wrote them: both libraries' ways cut at the same place."""
    (damaged / RUN_FILE).unlink()
    change_json(damaged / "tokenizer_config.json", lambda config: config.pop("model_max_length") and None)
    change_json(damaged / "sentence_bert_config.json", lambda config: config.pop("max_seq_length", None) and None)
    most = read_json_of(str(damaged), "config.json")["max_position_embeddings"]
    for kind in ("st", "transformers"):
        way = open_way(Choice(kind, ModelChoice(str(damaged))), torch.float32, None)  # type: ignore[arg-type]
        assert way.max_length == most
        (row,) = way.rows([InstructedText("", "red " * (most + 10))])
        assert len(row.ids) == most
    code, printed = verify(f"st:{damaged}", f"transformers:{damaged}")
    assert code == 0, printed


def test_half_precision_is_held_to_its_own_threshold(made: Path, half: Path, verify: Any) -> None:
    code, printed = verify(made / "adapter", made / "exported", "--dtype", "bfloat16")
    assert code == 0, printed
    assert " 0.999 " in printed
    assert " 0.9999 " not in printed
    code, printed = verify(made / "adapter", half)
    assert code == 0, printed
    assert printed.count(" 0.999 ") == 3  # the export's, not those of the float32 checkpoint
    assert printed.count(" 0.9999 ") == 2


# --- what is not the same is named ---


def write_closing(folder: Path, closing: list[str]) -> None:
    """Replace the token that a tokenizer's post-processor closes a row with."""

    def change(content: dict[str, Any]) -> None:
        ids = {token["content"]: token["id"] for token in content["added_tokens"]}
        post = content["post_processor"]
        place = max(i for i, piece in enumerate(post["single"]) if "Sequence" in piece)
        post["single"] = [*post["single"][: place + 1], *({"SpecialToken": {"id": t, "type_id": 0}} for t in closing)]
        for token in closing:
            post["special_tokens"][token] = {"id": token, "ids": [ids[token]], "tokens": [token]}

    change_json(folder / "tokenizer.json", change)


def wrong_closing(folder: Path) -> None:
    write_closing(folder, ["<|end_of_text|>"])


def no_closing(folder: Path) -> None:
    write_closing(folder, [])


def closing_twice(folder: Path) -> None:
    write_closing(folder, ["<|eot_id|>", "<|eot_id|>"])


def no_opening(folder: Path) -> None:
    change_json(folder / "tokenizer.json", lambda content: content["post_processor"]["single"].pop(0) and None)


def mean_pooling(folder: Path) -> None:
    old = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}
    change_json(folder / "1_Pooling/config.json", lambda config: {**config, **old, "pooling_mode": "mean"})


def cls_pooling(folder: Path) -> None:
    old = {"pooling_mode_cls_token": True, "pooling_mode_lasttoken": False}
    change_json(folder / "1_Pooling/config.json", lambda config: {**config, **old, "pooling_mode": "cls"})


def no_normalize(folder: Path) -> None:
    change_json(folder / "modules.json", lambda modules: modules[:2])


def shorter_rows(folder: Path) -> None:
    change_json(folder / "sentence_bert_config.json", lambda config: {**config, "max_seq_length": 48})


def read_control_tokens(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", lambda config: {**config, "split_special_tokens": False})


def no_header(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        single = content["post_processor"]["single"]
        content["post_processor"]["single"] = [single[0], *single[-2:]]

    change_json(folder / "tokenizer.json", change)


DAMAGES = {
    wrong_closing: "closing token",
    no_closing: "closing token",
    closing_twice: "closing token",
    no_opening: "template",
    causal_reload: "attention",
    mean_pooling: "pooling",
    cls_pooling: "pooling",
    no_normalize: "norm",
    shorter_rows: "truncation",
    read_control_tokens: "template",
    no_header: "template",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_export_is_named_by_its_cause(
    made: Path, damaged: Path, verify: Any, damage: Callable[[Path], None]
) -> None:
    damage(damaged)
    code, printed = verify(f"ours:{made / 'exported'}", f"st:{damaged}", f"transformers:{damaged}")
    assert code == 1, printed
    named = failures(printed)
    assert set(named) == {"sentence-transformers", "transformers"}, printed
    assert set(named.values()) == {DAMAGES[damage]}, printed


@pytest.mark.parametrize("damage", [wrong_closing, causal_reload, mean_pooling], ids=lambda damage: damage.__name__)
def test_a_damaged_export_is_named_beside_its_checkpoint_too(
    made: Path, damaged: Path, verify: Any, damage: Callable[[Path], None]
) -> None:
    """The reference is an adapter in place, whose vectors are not normalised."""
    damage(damaged)
    code, printed = verify(made / "adapter", f"st:{damaged}")
    assert code == 1, printed
    assert failures(printed) == {"sentence-transformers": DAMAGES[damage]}


def test_two_faults_are_not_guessed_at(made: Path, damaged: Path, verify: Any) -> None:
    causal_reload(damaged)
    mean_pooling(damaged)
    code, printed = verify(f"ours:{made / 'exported'}", f"st:{damaged}")
    assert code == 1
    assert failures(printed) == {"sentence-transformers": "weights or something else"}
    assert "no single change explains it" in printed


def test_the_first_differing_token_is_said(made: Path, damaged: Path, verify: Any) -> None:
    wrong_closing(damaged)
    _, printed = verify(f"ours:{made / 'exported'}", f"st:{damaged}")
    at = len(AutoTokenizer.from_pretrained(made / "exported")("who wrote Emma?")["input_ids"]) - 1
    first = f"text 'query', position {at}: '<|end_of_text|>' instead of '<|eot_id|>', and 12 more text(s) differ"
    assert f"token ids: sentence-transformers {damaged}: {first}" in printed
    assert "13 of 13 differ" in printed
    no_header(damaged)
    _, printed = verify(f"ours:{made / 'exported'}", f"st:{damaged}")
    assert "text 'query', position 1: " in printed
    assert "instead of '<|start_header_id|>'" in printed


def test_an_adapter_that_was_never_merged_is_named(made: Path, tmp_path: Path, verify: Any) -> None:
    """The export is the base without it: what a merge of an adapter that did not load leaves."""
    save_export(tmp_path / "export", str(made / "base"))
    code, printed = verify(f"ours:{made / 'adapter'}", f"st:{tmp_path / 'export'}")
    assert code == 1
    assert failures(printed) == {"sentence-transformers": "adapter"}
    assert "with its adapter switched off, ours" in printed
    code, printed = verify(f"st:{tmp_path / 'export'}", f"ours:{made / 'adapter'}")
    assert failures(printed) == {"ours": "adapter"}


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_dead_adapter_is_named(made: Path, tmp_path: Path, verify: Any) -> None:
    """Trained on the model with its head, put on the model without: peft warns, and goes on with a fresh adapter."""
    other_class = save_adapter(tmp_path / "other_class", str(made / "base"), BIDIRECTIONAL, with_lm_head=True)
    stock_base = save_export(tmp_path / "export", str(made / "base"))
    bare = AutoModel.from_pretrained(stock_base)
    assert isinstance(PeftModel.from_pretrained(bare, other_class), PeftModel)  # no error there
    code, printed = verify(f"ours:{made / 'adapter'}", f"transformers:{stock_base}+{other_class}")
    assert code == 1
    assert failures(printed) == {"transformers": "adapter"}
    assert "dead: switching off the adapter of transformers" in printed
    code, printed = verify(f"ours:{made / 'adapter'}", f"transformers:{stock_base}+{made / 'adapter'}")
    assert code == 0, printed


def test_an_adapter_that_stock_libraries_load_over_a_causal_base_is_named(
    made: Path, tmp_path: Path, verify: Any
) -> None:
    """An adapter's folder cannot say how its base attends, and the base's does not, as one of another library."""
    folder, base = (shutil.copytree(made / name, tmp_path / name) for name in ("adapter", "base"))
    for copied in (folder, base):
        (copied / RUN_FILE).unlink()
    causal_reload(base)
    change_json(folder / "adapter_config.json", lambda c: c | {"base_model_name_or_path": str(base)})
    for name in ("1_Pooling", "2_Normalize"):
        shutil.copytree(made / "exported" / name, folder / name)
    names = ("modules.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in (*names, "config_sentence_transformers.json"):
        shutil.copy(made / "exported" / name, folder / name)
    code, printed = verify(folder)
    assert code == 1, printed
    assert printed.count(" ok") == 2  # padded and merged
    assert failures(printed) == {"sentence-transformers": "attention", "transformers": "attention"}


def test_other_weights_are_not_explained_away(made: Path, tmp_path: Path, verify: Any) -> None:
    code, printed = verify(f"ours:{made / 'exported'}", f"st:{made / 'other'}")
    assert code == 1
    assert failures(printed) == {"sentence-transformers": "weights or something else"}
    wider = save_export(tmp_path / "wide", save_base(tmp_path / "wide_base", BIDIRECTIONAL, hidden_size=64))
    code, printed = verify(f"ours:{made / 'exported'}", f"st:{wider}")
    assert code == 1
    assert "the vectors have 32 and 64 numbers" in printed


def test_what_goes_wrong_in_a_batch_alone_is_named(made: Path) -> None:
    """A way that reads the last column, where padding stands on the right."""
    choices = [choices_of(f"{kind}:{made / 'exported'}")[0][0] for kind in ("ours", "transformers")]
    rendering = rendering_of(choices)
    reference, way = (open_way(choice, torch.float32, rendering) for choice in choices)
    texts = bundled_texts(reference.max_length)

    @torch.no_grad()
    def last_column(asked: Sequence[Any]) -> Tensor:
        rows = way.rows(asked)
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
        mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
        return way.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]

    wrong = dataclasses.replace(way, encode=last_column)
    asked = list(texts.values())
    answer = ask_way(reference, asked)
    parity = compare_answers(answer, ask_way(wrong, asked))
    assert not parity.passes
    assert find_cause(answer, parity, asked).startswith("batching: ")


# --- input ---


def test_own_texts(made: Path, tmp_path: Path, verify: Any) -> None:
    lines = tmp_path / "texts.txt"
    lines.write_text("hello world\n who wrote it \n", encoding="utf-8")
    code, printed = verify(made / "base", "--texts", lines)
    assert code == 0, printed
    assert "2 texts" in printed
    rows = write_jsonl(
        tmp_path / "texts.jsonl", [{"text": "hello"}, {"text": "it", "instruction": "find", "side": "query"}]
    )
    assert verify(made / "base", "--texts", rows)[0] == 0
    for content, words in (
        ([{"txt": "hello"}], "line 1: text is missing"),
        ([{"text": "a", "txt": "b"}], "line 1: 'txt' is no key; allowed: text, instruction, side"),
        ([{"text": "a"}, {"text": 1}], "line 2: text is 1; a string is needed"),
        ([{"text": "a", "side": "left"}], "side is 'left'; allowed: query, document"),
        ([], "is empty"),
    ):
        with pytest.raises(UserError, match=words):
            verify(made / "base", "--texts", write_jsonl(rows, content))
    with pytest.raises(UserError, match="is not there"):
        verify(made / "base", "--texts", tmp_path / "none.txt")


def test_wrong_arguments_are_one_sentence(made: Path, tmp_path: Path, verify: Any) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([tmp_path / "nowhere"], "neither a folder nor"),
        ([tmp_path / "empty"], "is no folder or hub name with a config.json"),
        ([f"{made / 'base'}+{tmp_path / 'nowhere'}"], "neither a folder nor"),
        ([f"st:{made / 'exported'}"], "can be loaded in one way only"),
        ([made / "exported", "--threshold", "1.5"], "--threshold is 1.5"),
    ):
        with pytest.raises(UserError, match=words):
            verify(*arguments)
    with pytest.raises(UserError, match="--dtype: invalid choice: 'int8'"):
        verify(made / "base", "--dtype", "int8")


def test_a_named_way_that_does_not_apply_is_said(made: Path, damaged: Path, verify: Any) -> None:
    code, printed = verify(made / "base", f"transformers:{made / 'base'}")
    assert code == 2
    assert "not compared: transformers" in printed
    assert "no modules.json of an export, so nothing says how the hidden states are pooled" in printed
    code, printed = verify(f"ours:{made / 'exported'}", f"st:{made / 'exported'}+{made / 'adapter'}")
    assert code == 2
    assert "takes no adapter beside a base" in printed
    change_json(damaged / "1_Pooling/config.json", lambda config: {**config, "pooling_mode": "mean"})
    code, printed = verify(f"ours:{made / 'exported'}", f"transformers:{damaged}")
    assert code == 2
    assert "says 'mean' by pooling_mode and lasttoken by its older keys" in printed


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "could not be loaded ("),
        ("sentence_bert_config.json", b"[3]", "sentence_bert_config.json: a JSON object is needed, not a list"),
        ("1_Pooling/config.json", b"[]", "config.json: a JSON object is needed, not a list"),
        ("modules.json", b"[1]", "modules.json: a list of objects with a `type` is needed"),
        ("sentence_bert_config.json", b'{"max_seq_length": "x"}', "cannot embed the texts ("),
        ("config_sentence_transformers.json", b'{"prompts": 3}', "cannot embed the texts ("),
    ],
)
def test_a_folder_of_damaged_files_is_not_compared(
    file: str, content: bytes, words: str, made: Path, damaged: Path, verify: Any
) -> None:
    """Whatever stock libraries raise for them; the other ways are compared all the same."""
    (damaged / file).write_bytes(content)
    exported = made / "exported"
    code, printed = verify(f"ours:{exported}", f"st:{damaged}", f"transformers:{damaged}", f"st:{exported}")
    assert code == 2, printed
    stock, plain = [line for line in printed.splitlines() if line.startswith("not compared: ")]
    assert stock.startswith(f"not compared: sentence-transformers {damaged}: ") and file.rpartition("/")[2] in stock
    assert plain.startswith(f"not compared: transformers {damaged}: ") and words in plain
    assert printed.count(" ok") == 1


# --- parts ---


def test_a_damaged_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[{", encoding="utf-8")
    with pytest.raises(UserError, match=r"modules\.json: not valid JSON"):
        read_json_of(str(tmp_path), "modules.json")


def test_ids_take_over_the_pooled_positions_before_they_part() -> None:
    row = Row([1, 5, 6, 2], [False, True, True, False], [False] * 4)
    for ids, pooled in (
        ([1, 5, 6, 2], row.pooled),
        ([1, 5, 9, 9, 2], [False, True, True, True, True]),
        ([1, 5, 6], [False, True, True]),
        ([5, 6, 2], [True, True, True]),
        ([1], [True]),
    ):
        taken = with_ids(row, ids)
        assert taken is not None and (taken.ids, taken.pooled) == (ids, pooled)
    assert with_ids(row, None) is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"red\n\xff\n", r"a\.txt, line 2: not valid UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: `text` holds half a surrogate pair"),
        ("b.jsonl", b"\xff\n", r"b\.jsonl, line 1: not valid JSON"),
    ],
)
def test_texts_that_nothing_can_embed_are_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_own_texts(tmp_path / name)


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "red\u2028blue"}\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text("red\u2028blue\r\ngreen", encoding="utf-8")
    assert [text.text for text in read_own_texts(tmp_path / "a.jsonl").values()] == ["red\u2028blue"]
    assert [text.text for text in read_own_texts(tmp_path / "a.txt").values()] == ["red\u2028blue", "green"]
