"""`LLM2Vec`: an embedding depends on its text alone, survives saving, and comes from exactly the adapters asked for."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import MODELS, family_tokenizer, tiny_model
from pandas import DataFrame
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers.util.quantization import quantize_embeddings
from torch import Tensor
from transformers import AutoModel, GPT2Config, GPT2Model, LlamaModel, PreTrainedModel

from llm2vec import LLM2Vec
from llm2vec.files import LOCK_FILE, alone_in
from llm2vec.model.backbone import attach_lora
from llm2vec.model.proofs import check_attention
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings
from llm2vec.text import entries
from llm2vec.text.batches import token_batches
from llm2vec.types import UserError

TEXTS: list[str | list[str]] = [
    "who wrote it",
    ["find the answer", "who wrote it"],
    "hello",
    ["find", "the red world, the green world and the blue world " * 3],
    ["", "red"],
    "the answer: question the user",
    ["find it", "Öl 東京"],
]


def save_base(folder: Path, **overrides: Any) -> str:
    """A Llama with its head and tokenizer, as base models come."""
    tiny_model("llama", True, **({"initializer_range": 0.2} | overrides)).save_pretrained(folder)
    family_tokenizer("llama").save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, model: PreTrainedModel, seed: int, settings: dict[str, Any] | None = None) -> str:
    """A LoRA adapter as training leaves it (B not zero), with or without our settings file."""
    adapted = attach_lora(model, r=4, alpha=8, dropout=0.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    if settings is not None:
        (folder / SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters of the base's inner model, without settings, as upstream's older ones."""
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(folder / name, AutoModel.from_pretrained(base), i) for i, name in enumerate("AB")]


def encode(model: LLM2Vec, texts: Sequence[Any] = TEXTS, **options: Any) -> Tensor:
    vectors = model.encode(texts, show_progress_bar=False, device="cpu", **options)
    assert isinstance(vectors, Tensor)
    return vectors


@torch.no_grad()
def padded(model: LLM2Vec, texts: Sequence[Any] = TEXTS) -> Tensor:
    """By the model's own attention over padded rows, where `encode` packs them."""
    return model(model.tokenize(texts))


def apart(left: Tensor, right: Tensor) -> float:
    """The largest difference of two sets of vectors."""
    return float((left - right).abs().max())


def merged_by_hand(base: str, adapters: Sequence[str]) -> LLM2Vec:
    """The base with each adapter's alpha / r * B A added to its weights, without peft."""
    model = AutoModel.from_pretrained(base)
    for folder in adapters:
        weights = load_file(Path(folder, "adapter_model.safetensors"))
        names = [name.removesuffix(".lora_A.weight") for name in weights if "lora_A" in name]
        assert len(names) == 14
        for name in names:
            module = model.get_submodule(name.removeprefix("base_model.model."))
            module.weight.data += 8 / 4 * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
    return LLM2Vec(model, family_tokenizer("llama"), attention="bidirectional")


# --- a text's embedding depends on the text alone ---


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", list(MODELS))
def test_neighbours_order_batch_size_and_padding_side_do_not_matter(
    family: str, attention: Any, implementation: str
) -> None:
    model = tiny_model(family, initializer_range=0.2)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    pooling_mode = "last" if attention == "causal" else "mean"
    embedder = LLM2Vec(model, family_tokenizer(family), pooling_mode, attention=attention)
    alone = torch.cat([encode(embedder, [text]) for text in TEXTS])
    assert min(apart(alone[i], alone[j]) for i in range(len(TEXTS)) for j in range(i)) > 0.01
    for batch_size in (1, 3, 32):
        assert apart(encode(embedder, batch_size=batch_size), alone) < 1e-5
    assert apart(encode(embedder, TEXTS[::-1]).flip(0), alone) < 1e-5
    assert apart(encode(embedder, TEXTS[:3]), alone[:3]) < 1e-5
    for embedder.tokenizer.padding_side in ("left", "right"):
        assert apart(padded(embedder), alone) < 1e-5


@pytest.mark.parametrize("family", list(MODELS))
def test_implementations_agree_and_attentions_differ(family: str) -> None:
    vectors = {}
    for implementation in ("eager", "sdpa"):
        for attention in ("causal", "bidirectional"):
            model = tiny_model(family, initializer_range=0.2)
            model.set_attn_implementation(implementation)
            embedder = LLM2Vec(model, family_tokenizer(family), attention=attention)
            vectors[implementation, attention] = padded(embedder)
            assert apart(encode(embedder), vectors[implementation, attention]) < 1e-5
    for attention in ("causal", "bidirectional"):
        assert apart(vectors["eager", attention], vectors["sdpa", attention]) < 1e-5
    assert apart(vectors["sdpa", "causal"], vectors["sdpa", "bidirectional"]) > 0.01


# --- the attention check ---


@pytest.mark.parametrize("family", list(MODELS))
@pytest.mark.parametrize(
    ("asked", "ignored"), [("bidirectional", True), ("causal", False)], ids=["always_causal", "always_bidirectional"]
)
def test_a_model_that_ignores_the_attention_flag_is_refused(family: str, asked: Any, ignored: bool) -> None:
    model = tiny_model(family)
    for attention in ("causal", "bidirectional"):
        check_attention(model, attention)
    obeys = model.forward

    def deaf(*arguments: Any, is_causal: bool, **keywords: Any) -> Any:
        return obeys(*arguments, is_causal=ignored, **keywords)

    model.forward = deaf
    with pytest.raises(UserError, match=f"attention: {asked} was asked for.*does not attend that way"):
        check_attention(model, asked)


def test_from_pretrained_checks_the_attention(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    obeys = LlamaModel.forward

    def deaf(self: LlamaModel, *arguments: Any, is_causal: bool = True, **keywords: Any) -> Any:
        return obeys(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaModel, "forward", deaf)
    with pytest.raises(UserError, match="bidirectional"):
        LLM2Vec.from_pretrained(base)
    with pytest.raises(UserError, match="cannot be laid end to end"):  # packed attention would not hear of it either
        LLM2Vec.from_pretrained(base, enable_bidirectional=False)


def test_the_check_leaves_dropout_and_mode_alone() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    check_attention(model, "causal")
    assert model.training


# --- saving and loading ---


SETTINGS: dict[str, Any] = {
    "pooling_mode": "last",
    "max_length": 48,
    "doc_max_length": 9,
    "skip_instruction": False,
    "template": "llama3",
    "instruction_join": "; ",
    "attention": "causal",
    "normalize": True,
}


def test_saving_and_loading_restores_settings_and_every_bit(base: str, tmp_path: Path) -> None:
    """Each setting differs from its default, and nothing is said at loading but the folder."""
    default = EncoderSettings()
    assert all(getattr(default, name) != value for name, value in SETTINGS.items() if name != "skip_instruction")
    model = LLM2Vec(AutoModel.from_pretrained(base), family_tokenizer("llama"), **SETTINGS).eval()
    vectors = encode(model)
    model.save(tmp_path / "saved")
    loaded = LLM2Vec.from_pretrained(str(tmp_path / "saved"))
    assert loaded.settings == model.settings == EncoderSettings(**SETTINGS)
    assert torch.equal(encode(loaded), vectors)
    assert not loaded.training


def test_two_may_not_save_into_one_folder(base: str, tmp_path: Path) -> None:
    model = LLM2Vec.from_pretrained(base)
    with alone_in(tmp_path, "save"), pytest.raises(UserError, match="another save is at work here"):
        model.save(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()


def test_what_the_call_says_wins_over_what_the_folder_says(base: str, tmp_path: Path) -> None:
    LLM2Vec(AutoModel.from_pretrained(base), family_tokenizer("llama"), **SETTINGS).save(tmp_path)
    loaded = LLM2Vec.from_pretrained(
        str(tmp_path),
        enable_bidirectional=True,
        pooling_mode="mean",
        max_length=20,
        doc_max_length=3,
        skip_instruction=True,
        template="plain",
        instruction_join=" ",
    )
    assert loaded.settings == EncoderSettings("mean", 20, 3, True, "plain", " ", "bidirectional", True, None)


def test_without_a_settings_file_upstreams_defaults_hold(base: str, tmp_path: Path) -> None:
    model = LLM2Vec.from_pretrained(base)
    assert model.settings == EncoderSettings("mean", 512, None, True, "llama3", " ", "bidirectional")
    model.save(tmp_path, save_config=False)
    assert not (tmp_path / SETTINGS_FILE).exists()
    assert torch.equal(encode(LLM2Vec.from_pretrained(str(tmp_path))), encode(model))


@pytest.mark.parametrize(
    ("written", "meant"), [("eos_token", "last"), ("last_token", "last"), ("bos_token", "first"), ("mean", "mean")]
)
def test_upstreams_names_of_pooling(base: str, written: str, meant: str) -> None:
    assert LLM2Vec.from_pretrained(base, pooling_mode=written).settings.pooling_mode == meant


def test_an_unknown_pooling_or_template_is_named(base: str) -> None:
    with pytest.raises(UserError, match=r"pooling_mode is 'middle'; allowed: .*mean"):
        LLM2Vec.from_pretrained(base, pooling_mode="middle")
    with pytest.raises(UserError, match="template is 'llama-3'; allowed: llama3"):
        LLM2Vec.from_pretrained(base, template="llama-3")


# --- adapters ---


def test_a_chain_equals_merging_by_hand(base: str, adapters: list[str]) -> None:
    """Base, A merged, B on top: as if both products had been added to the weights."""
    chained = LLM2Vec.from_pretrained(base, adapters)
    assert isinstance(chained.model, PeftModel)
    expected = encode(merged_by_hand(base, adapters))
    assert apart(encode(chained), expected) < 1e-5
    assert apart(encode(LLM2Vec.from_pretrained(base, adapters, merge_peft=True)), expected) < 1e-5
    for other in ([], adapters[:1], adapters[1:]):
        assert apart(encode(merged_by_hand(base, other)), expected) > 0.01


def test_an_adapter_folder_serves_as_the_base(base: str, adapters: list[str], tmp_path: Path) -> None:
    """Upstream's `-mntp` folders: the model they record lies below, even with a config.json in the folder."""
    expected = encode(LLM2Vec.from_pretrained(base, adapters))
    assert torch.equal(encode(LLM2Vec.from_pretrained(adapters[0], adapters[1])), expected)
    layout = save_adapter(tmp_path / "mntp", AutoModel.from_pretrained(base), seed=0)
    AutoModel.from_pretrained(base).config.save_pretrained(layout)
    family_tokenizer("llama").save_pretrained(layout)
    assert torch.equal(encode(LLM2Vec.from_pretrained(layout, adapters[1])), expected)
    alone = encode(LLM2Vec.from_pretrained(layout))
    assert torch.equal(alone, encode(LLM2Vec.from_pretrained(base, adapters[0])))


def test_merged_equals_unmerged(base: str, adapters: list[str]) -> None:
    unmerged = LLM2Vec.from_pretrained(base, adapters[0])
    merged = LLM2Vec.from_pretrained(base, adapters[0], merge_peft=True)
    assert isinstance(unmerged.model, PeftModel) and not isinstance(merged.model, PeftModel)
    assert apart(encode(merged), encode(unmerged)) < 1e-5
    assert apart(encode(merged), encode(LLM2Vec.from_pretrained(base))) > 0.01


@pytest.mark.parametrize("how", ["saved_alone", "saved_with_base", "merged_before"])
def test_a_saved_adapter_restores_the_chain_below_it(how: str, base: str, adapters: list[str], tmp_path: Path) -> None:
    model = LLM2Vec.from_pretrained(base, adapters, pooling_mode="last", instruction_join="; ")
    vectors = encode(model)
    model.save(tmp_path, merge_before_save=how == "merged_before")
    assert (tmp_path / "adapter_model.safetensors").exists() == (how != "merged_before")
    assert (tmp_path / "model.safetensors").exists() == (how == "merged_before")
    if how == "saved_with_base":
        loaded = LLM2Vec.from_pretrained(base, [adapters[0], str(tmp_path)])
    else:
        loaded = LLM2Vec.from_pretrained(str(tmp_path))
    assert loaded.settings == model.settings
    if how == "merged_before":
        assert loaded.settings.parent_adapters is None
        assert torch.equal(encode(loaded), encode(model))
        # Merging rounds each weight once more: relative to the vectors' size, which is about 3 here.
        assert apart(encode(loaded), vectors) < 1e-5 * float(vectors.abs().max())
    else:
        assert loaded.settings.parent_adapters == (adapters[0],)
        assert torch.equal(encode(loaded), vectors)


@pytest.mark.parametrize("given", [[], ["A", "A"]], ids=["none_listed", "too_many_listed"])
def test_an_adapter_without_its_parents_is_refused(
    given: list[str], base: str, adapters: list[str], tmp_path: Path
) -> None:
    LLM2Vec.from_pretrained(base, adapters).save(tmp_path)
    below = [adapters["AB".index(name)] for name in given]
    with pytest.raises(UserError, match=r"was trained on top of .*list those that it was trained on, innermost first"):
        LLM2Vec.from_pretrained(base, [*below, str(tmp_path)])


def test_a_dead_adapter_is_refused(base: str, tmp_path: Path) -> None:
    """A fresh LoRA adapter (B is zero) changes nothing, so whoever loads it is told."""
    attach_lora(AutoModel.from_pretrained(base), r=4, alpha=8, dropout=0.0).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="has no effect, every lora_B weight in it is zero"):
        LLM2Vec.from_pretrained(base, str(tmp_path))


def test_an_adapter_of_tokens_alone_is_taken(base: str, tmp_path: Path) -> None:
    """It has no lora_B that could be zero."""
    adapted = get_peft_model(AutoModel.from_pretrained(base), TrainableTokensConfig(token_indices=list(range(300))))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1)
    adapted.save_pretrained(str(tmp_path))
    texts = ["hello", "who wrote it", "red"]
    assert (
        apart(encode(LLM2Vec.from_pretrained(base, str(tmp_path)), texts), encode(LLM2Vec.from_pretrained(base), texts))
        > 0.01
    )


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_the_model_with_a_head_is_refused(base: str, tmp_path: Path) -> None:
    """Its keys name other modules, so it would stay at zero without a word."""
    adapter = save_adapter(tmp_path / "head", tiny_model("llama", True, initializer_range=0.2), seed=0)
    with pytest.raises(UserError, match=r"does not fit LlamaModel .*it was trained on another model class"):
        LLM2Vec.from_pretrained(base, adapter)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    "overrides", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}], ids=str
)
def test_an_adapter_of_another_shape_is_refused(base: str, tmp_path: Path, overrides: dict[str, int]) -> None:
    adapter = save_adapter(tmp_path / "other", tiny_model("llama", **overrides), seed=0)
    with pytest.raises(UserError, match=r"peft_model_name_or_path: .*other"):
        LLM2Vec.from_pretrained(base, adapter)


def test_a_folder_that_is_no_adapter_is_refused(base: str, tmp_path: Path) -> None:
    for wrong in (base, str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(UserError, match=re.escape(wrong)):
            LLM2Vec.from_pretrained(base, wrong)


# --- what encode takes and gives ---


@pytest.fixture(scope="module")
def model(base: str) -> LLM2Vec:
    return LLM2Vec.from_pretrained(base)


def test_tensor_by_default_numpy_on_request(model: LLM2Vec) -> None:
    tensor = encode(model)
    array = model.encode(TEXTS, show_progress_bar=False, device="cpu", convert_to_numpy=True)
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    assert np.array_equal(array, tensor.numpy())
    assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not tensor.requires_grad
    both = model.encode(TEXTS, show_progress_bar=False, device="cpu", convert_to_numpy=True, convert_to_tensor=True)
    assert isinstance(both, Tensor)


def test_no_texts_give_no_vectors(model: LLM2Vec) -> None:
    assert encode(model, []).shape == (0, 32)
    array = model.encode([], show_progress_bar=False, device="cpu", convert_to_numpy=True)
    assert isinstance(array, np.ndarray) and array.shape == (0, 32)


def test_one_string_is_a_list_of_one(model: LLM2Vec) -> None:
    assert torch.equal(encode(model, "who wrote it"), encode(model, ["who wrote it"]))


def test_an_empty_instruction_is_none(model: LLM2Vec) -> None:
    pair, text, instructed = encode(model, [["", "who wrote it"], "who wrote it", ["find", "who wrote it"]])
    assert apart(pair, text) < 1e-6
    assert apart(instructed, text) > 0.01


@pytest.mark.parametrize(
    "entry", [3, None, 2.5, ["only one"], ["a", "b", "c"], ["a", 2], ["a", None], {"a": 1, "b": 2}], ids=repr
)
def test_a_bad_entry_is_named(model: LLM2Vec, entry: Any) -> None:
    with pytest.raises(UserError, match=r"sentences\[1\] is .*; a string or an \[instruction, text\] pair is needed"):
        encode(model, ["fine", entry])


@pytest.mark.parametrize(
    "given",
    [{"id7": "who wrote it"}, {"who wrote it", "hello"}, frozenset(["hello"]), DataFrame({"text": ["red"]}), b"red"],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_list_of_texts_is_refused(model: LLM2Vec, given: Any) -> None:
    """Of a mapping, such as BEIR's queries, or a table, keys would be embedded; a set has no order."""
    for embed in (model.encode, model.encode_query, model.encode_document):
        with pytest.raises(UserError, match=r"^sentences is .*; strings or \[instruction, text\] pairs are needed\.$"):
            embed(given)
    texts = {"hello": 1, "red": 2}
    assert torch.equal(encode(model, texts.keys()), encode(model, ["hello", "red"]))  # type: ignore[arg-type]


def test_normalize_gives_unit_vectors(base: str, tmp_path: Path) -> None:
    plain = encode(LLM2Vec.from_pretrained(base))
    model = LLM2Vec(
        AutoModel.from_pretrained(base), family_tokenizer("llama"), attention="bidirectional", normalize=True
    )
    assert apart(encode(model), plain / plain.norm(dim=1, keepdim=True)) < 1e-6
    assert apart(encode(model).norm(dim=1), torch.ones(len(TEXTS))) < 1e-6
    assert float((plain.norm(dim=1) - 1).abs().min()) > 0.1


def test_vectors_are_normalised_on_request_whatever_the_settings_say(model: LLM2Vec, base: str) -> None:
    plain = encode(model)
    units = encode(model, normalize_embeddings=True)
    assert apart(units, torch.nn.functional.normalize(plain, dim=-1)) < 1e-6
    cut = encode(model, truncate_dim=8, normalize_embeddings=True)
    assert apart(cut.norm(dim=1), torch.ones(len(TEXTS))) < 1e-6
    unit = LLM2Vec(
        AutoModel.from_pretrained(base), family_tokenizer("llama"), attention="bidirectional", normalize=True
    )
    assert apart(encode(unit, normalize_embeddings=False), plain) < 1e-5


# --- what users of sentence-transformers reach for ---


def test_queries_and_documents_by_name(model: LLM2Vec) -> None:
    texts = ["who wrote it", "hello"]
    quiet: Any = {"show_progress_bar": False, "device": "cpu"}
    table = json.loads((Path(__file__).parents[1] / "test_configs/mteb/task_to_instructions.json").read_text("utf-8"))
    for instruction, found in (
        ("find", model.encode_query(texts, "find", **quiet)),
        ("", model.encode_query(texts, **quiet)),
        (table["NFCorpus"], model.encode_query(texts, task="NFCorpus", **quiet)),
    ):
        assert torch.equal(found, encode(model, [[instruction, text] for text in texts], side="query"))
    assert torch.equal(model.encode_document(texts, **quiet), encode(model, texts, side="document"))
    assert torch.equal(model.encode_query("hello", "find", **quiet), encode(model, [["find", "hello"]], side="query"))
    with pytest.raises(UserError, match=r"task is 'NFCorpsu', which has no instruction \(nearest: NFCorpus"):
        model.encode_query(texts, task="NFCorpsu")
    with pytest.raises(TypeError, match="batchsize"):
        model.encode_query(texts, batchsize=3)


def test_similarity_is_the_cosine_of_each_pair(model: LLM2Vec) -> None:
    vectors = encode(model)
    expected = torch.nn.functional.cosine_similarity(vectors[:2, None], vectors[None], dim=-1)
    assert apart(model.similarity(vectors[:2], vectors), expected) < 1e-6
    assert apart(model.similarity(vectors[:2].numpy(), vectors.half()), expected) < 1e-2


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precision_is_sentence_transformers_own(model: LLM2Vec, precision: Any) -> None:
    expected = quantize_embeddings(encode(model).numpy(), precision)
    found = model.encode(TEXTS, show_progress_bar=False, device="cpu", precision=precision)
    assert isinstance(found, np.ndarray) and found.dtype == expected.dtype and np.array_equal(found, expected)


def test_precision_is_looked_at_before_any_text(model: LLM2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits a night for a word that is misspelt, or a package that is not there."""
    passes: list[Any] = []
    handle = model.model.get_submodule("layers.0").register_forward_pre_hook(lambda *inputs: passes.append(inputs))
    with pytest.raises(UserError, match="precision is 'int4'; allowed: float32, int8"):
        encode(model, precision="int4")
    monkeypatch.setitem(sys.modules, "sentence_transformers.util.quantization", None)
    with pytest.raises(UserError, match="precision needs sentence-transformers"):
        encode(model, precision="int8")
    handle.remove()
    assert not passes


def test_a_generator_is_read_bit_by_bit(model: LLM2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the second part is read, the first has been embedded; no texts are no vectors."""
    monkeypatch.setattr(entries, "TEXTS_KEPT", 3)
    read: list[int] = []
    passes: list[int] = []
    handle = model.model.get_submodule("layers.0").register_forward_pre_hook(lambda *_: passes.append(len(read)))

    def texts() -> Iterator[Any]:
        for i, text in enumerate(TEXTS):
            read.append(i)
            yield text

    found = encode(model, texts())
    handle.remove()
    assert passes == [3, 6, 7]
    assert apart(found, encode(model)) < 1e-5
    assert encode(model, iter([])).shape == (0, 32)
    queries = model.encode_query((t for t in ("who", "it")), "find", show_progress_bar=False, device="cpu")
    assert torch.equal(queries, encode(model, [["find", "who"], ["find", "it"]]))


def test_pushing_uploads_what_save_writes(model: LLM2Vec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            assert (name, options) == ("me/mine", {"exist_ok": True, "private": True})
            return "https://hub/me/mine"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            shutil.copytree(folder_path, tmp_path / "there")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert model.push_to_hub("me/mine", private=True) == "https://hub/me/mine"
    assert torch.equal(encode(LLM2Vec.from_pretrained(tmp_path / "there")), encode(model))


def test_a_refused_push_names_no_folder_that_is_gone(model: LLM2Vec, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("not logged in")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    with pytest.raises(UserError) as refused:
        model.push_to_hub("me/mine")
    assert str(refused.value) == "the model could not be uploaded to me/mine: not logged in"


@pytest.mark.parametrize("given", ["false", "bidirectional", 2, []], ids=repr)
def test_a_wrong_enable_bidirectional_is_named(base: str, given: Any) -> None:
    with pytest.raises(UserError, match=rf"enable_bidirectional is {re.escape(repr(given))}; True, False or None"):
        LLM2Vec.from_pretrained(base, enable_bidirectional=given)


def test_a_family_that_counts_places_from_the_row_s_beginning_may_be_padded_on_the_left() -> None:
    """GPT-2 adds an embedding of the place; padding in front of a text does not shift it."""
    tokenizer = family_tokenizer("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4)
        model = LLM2Vec(GPT2Model(config).eval(), tokenizer, template="plain", attention="causal")
    for model.tokenizer.padding_side in ("right", "left"):
        assert apart(padded(model), encode(model)) < 1e-5


def test_encode_is_what_forward_of_tokenize_gives(model: LLM2Vec) -> None:
    """`encode` packs its rows and `forward` pads them, so they sum in another order."""
    assert apart(padded(model), encode(model)) < 1e-5


def test_a_text_that_is_given_twice_is_computed_once(model: LLM2Vec) -> None:
    """In whatever place and spelling; the same words under another instruction are another text."""
    seen: list[int] = []
    handle = model.model.get_submodule("layers.0").register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:-1].numel())
    )
    once = encode(model)
    twice = encode(model, [*TEXTS, *(["", text] if isinstance(text, str) else text for text in TEXTS)])
    handle.remove()
    assert len(seen) == 2 and seen[0] == seen[1]
    assert torch.equal(twice, torch.cat([once, once]))
    assert apart(once[0], once[1]) > 0.01


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_rows_is_refused(model: LLM2Vec, batch_size: int) -> None:
    with pytest.raises(UserError, match=f"batch_size is {batch_size}; give a number above 0"):
        encode(model, batch_size=batch_size)


@pytest.mark.parametrize("pooling_mode", ["mean", "last"])
def test_threads_may_share_a_model(pooling_mode: str) -> None:
    """A packed pass sets the model's attention while it runs, which no other thread's pass must see."""
    model = LLM2Vec(
        tiny_model("llama", num_hidden_layers=6), family_tokenizer("llama"), pooling_mode, attention="bidirectional"
    )
    calls: list[Callable[[], Tensor]] = [
        lambda: encode(model, ["hello world " * 40, "red " * 90]),
        lambda: encode(model, ["green " * 70, "blue world " * 25, "who"]),
        lambda: padded(model, ["the answer " * 30, "it"]),
    ]
    expected = [call() for call in calls]

    def largest_difference(i: int) -> float:
        return max(apart(calls[i](), expected[i]) for _ in range(25))

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(calls)) as threads:
            assert max(threads.map(largest_difference, range(len(calls)))) < 1e-5
    finally:
        sys.setswitchinterval(switching)


def test_encode_leaves_dropout_off(base: str) -> None:
    model = LLM2Vec(tiny_model("llama", attention_dropout=0.5), family_tokenizer("llama")).train()
    assert torch.equal(encode(model), encode(model))


# --- dtypes, names and upstream's calls ---


@pytest.mark.parametrize("keyword", ["torch_dtype", "dtype"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("float32", torch.float32),
        ("auto", torch.float32),
        (None, torch.float32),
    ],
)
def test_dtype_by_name_or_object(base: str, keyword: str, value: Any, expected: torch.dtype) -> None:
    model = LLM2Vec.from_pretrained(base, **{keyword: value})
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert encode(model, ["hello"]).dtype == torch.float32


def test_auto_is_the_stored_dtype(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "half", dtype=torch.bfloat16)
    assert LLM2Vec.from_pretrained(folder, torch_dtype="auto").model.dtype == torch.bfloat16


def test_an_unknown_dtype_is_named(base: str) -> None:
    with pytest.raises(UserError, match="torch_dtype is 'half'; allowed: auto, float32, bfloat16, float16"):
        LLM2Vec.from_pretrained(base, torch_dtype="half")


def test_upstreams_readme(base: str, adapters: list[str]) -> None:
    """The calls of LLM2Vec's own README, word for word but for the names."""
    l2v = LLM2Vec.from_pretrained(
        base,
        peft_model_name_or_path=adapters[0],
        device_map="cpu",
        torch_dtype=torch.bfloat16,
        merge_peft=True,
        pooling_mode="mean",
        max_length=512,
    )
    instruction = "Given a web search query, retrieve relevant passages that answer the query:"
    queries = [[instruction, "who wrote it"], [instruction, "the answer"]]
    q_reps = l2v.encode(queries)
    documents = ["hello world", "who wrote the answer", "red green blue"]
    d_reps = l2v.encode(documents)
    q_reps_norm = torch.nn.functional.normalize(q_reps, p=2, dim=1)
    d_reps_norm = torch.nn.functional.normalize(d_reps, p=2, dim=1)
    cos_sim = torch.mm(q_reps_norm, d_reps_norm.transpose(0, 1))
    assert cos_sim.shape == (2, 3)
    exact = LLM2Vec.from_pretrained(base, adapters[0], pooling_mode="mean")
    expected = torch.nn.functional.cosine_similarity(
        encode(exact, queries)[:, None], encode(exact, documents)[None], dim=-1
    )
    assert apart(cos_sim, expected) < 0.05  # bfloat16 keeps 8 bits


def test_upstreams_constructor(base: str) -> None:
    """A loaded model and tokenizer, as upstream's README wraps them after merging by hand."""
    l2v = LLM2Vec(AutoModel.from_pretrained(base), family_tokenizer("llama"), pooling_mode="mean", max_length=512)
    assert torch.equal(encode(l2v), encode(LLM2Vec.from_pretrained(base, enable_bidirectional=False)))


def test_a_constructor_that_is_told_no_attention_says_what_it_took(base: str, caplog: pytest.LogCaptureFixture) -> None:
    """Upstream's own models are bidirectional, so whoever wraps one by hand must hear that this is not."""
    model, tokenizer = AutoModel.from_pretrained(base), family_tokenizer("llama")
    assert LLM2Vec(model, tokenizer, template="plain").settings.attention == "causal"
    assert "attention: none is set, so it is causal" in caplog.text
    caplog.clear()
    LLM2Vec(model, tokenizer, template="plain", attention="causal")
    model.config.is_causal = False
    assert LLM2Vec(model, tokenizer, template="plain").settings.attention == "bidirectional"
    assert not caplog.text


@pytest.mark.filterwarnings("ignore:.*Already found a `peft_config` attribute")
def test_what_the_model_cards_of_upstream_build_can_be_saved(base: str, adapters: list[str], tmp_path: Path) -> None:
    """There transformers loads the first adapter, peft the same again; both remember it when it is long merged."""
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(adapters[0]), adapters[0]).merge_and_unload()
    l2v = LLM2Vec(PeftModel.from_pretrained(model, adapters[1]), family_tokenizer("llama"), attention="bidirectional")
    before = encode(l2v)
    l2v.save(tmp_path, merge_before_save=True)
    assert apart(encode(LLM2Vec.from_pretrained(tmp_path)), before) < 1e-5


def test_upstreams_order_of_arguments() -> None:
    names = list(inspect.signature(LLM2Vec.from_pretrained).parameters)
    assert names[:4] == ["base_model_name_or_path", "peft_model_name_or_path", "merge_peft", "enable_bidirectional"]


def test_hub_names_load_from_the_cache(
    base: str, adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base and adapters under hub names, offline, give what their folders give."""
    names = {"someone/base": base, "someone/adapter-a": adapters[0], "someone/adapter-b": adapters[1]}
    for name, folder in names.items():
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("0" * 40, encoding="utf-8")
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    loaded = LLM2Vec.from_pretrained("someone/base", ["someone/adapter-a", "someone/adapter-b"])
    assert torch.equal(encode(loaded), encode(LLM2Vec.from_pretrained(base, adapters)))


def test_missing_weights_are_never_random(base: str, tmp_path: Path) -> None:
    """A base that lacks a tensor is refused, and the tensor is named."""
    folder = Path(save_base(tmp_path / "gap"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the tensors .*layers\.1\.mlp\.up_proj\.weight"):
        LLM2Vec.from_pretrained(str(folder))


def test_token_batches_hold_every_row_once_and_keep_to_the_budget() -> None:
    """There is no padding, so real tokens count; a row over the budget goes alone."""
    batches = token_batches([3, 50, 2, 10, 9, 3], 20)
    assert batches == [[1], [3, 4], [0, 5, 2]]
    assert token_batches([4, 8, 4, 4], 20) == [[1, 0, 2, 3]]
    assert token_batches([], 20) == []


@pytest.mark.parametrize("normalize", [False, True])
def test_encode_cuts_then_normalises(normalize: bool) -> None:
    model = LLM2Vec(tiny_model("llama"), family_tokenizer("llama"), "last", normalize=normalize, template="llama3")
    texts = ["hello world", "who wrote it", "hello world"]
    whole, cut = (model.encode(texts, show_progress_bar=False, device="cpu", truncate_dim=d) for d in (None, 8))
    assert isinstance(whole, Tensor) and isinstance(cut, Tensor)
    assert (whole.shape, cut.shape) == ((3, 32), (3, 8))
    torch.testing.assert_close(cut, torch.nn.functional.normalize(whole[:, :8], dim=-1) if normalize else whole[:, :8])
    full = model.encode(texts, show_progress_bar=False, device="cpu", truncate_dim=32)
    assert isinstance(full, Tensor) and torch.equal(full, whole)
    for wrong in (0, 33, -1):
        with pytest.raises(UserError, match=f"truncate_dim is {wrong}; it must lie between 1 and the hidden size 32"):
            model.encode(texts, truncate_dim=wrong)
