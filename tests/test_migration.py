"""Upstream LLM2Vec's calls on this package, on small models that stand under the published names in a hub cache.

The Python blocks of docs/migration.md run as they are written there, and what its tables say is asked of the code.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import family_tokenizer, tiny_model
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

import llm2vec.version
from llm2vec import LLM2Vec
from llm2vec.commands import train
from llm2vec.llm2vec import batch_to_device
from llm2vec.model.backbone import attach_lora
from llm2vec.model.pooling import pool
from llm2vec.model.proofs import check_attention
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings
from llm2vec.models import LlamaBiModel
from llm2vec.objectives.losses import info_nce
from llm2vec.training.config import Config
from llm2vec.training.config.arguments import training_arguments
from llm2vec.training.config.file import load_config
from llm2vec.types import Stage, UserError

PAGE = Path(__file__).parents[1] / "docs/migration.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)

HUB = "McGill-NLP/LLM2Vec-"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query:"
QUERIES = [
    [INSTRUCTION, "who wrote it"],
    [INSTRUCTION, "the answer: question the user"],
    [INSTRUCTION, "zap the world"],
    [INSTRUCTION, "lazy"],
]
#: Words of `QUERIES` that are one token behind a blank and several alone, as real vocabularies have them.
BLANK_LED = ("zap", "lazy")
#: What the code of upstream 0.2.3 pools over, and the vectors it makes of `made_up_states`: of the rows of
#: `recorded_rows`, by the tokenizers that stand under the published names here.
RECORDED = json.loads((Path(__file__).parent / "upstream_pooling.json").read_text(encoding="utf-8"))
DOCUMENTS = ["hello world", "who wrote the answer", "the red world, the green world and the blue world"]


class Family(NamedTuple):
    """A published family: names on the hub, what stands there here, and what upstream writes around a text."""

    base: str
    name: str
    model: str
    tokenizer: str
    before: str
    after: str


FAMILIES = {
    "llama3": Family(
        "meta-llama/Meta-Llama-3-8B-Instruct", "Meta-Llama-3-8B-Instruct", "llama", "llama3",
        "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>",
    ),
    "mistral": Family(
        "mistralai/Mistral-7B-Instruct-v0.2", "Mistral-7B-Instruct-v2", "mistral", "mistral_sentencepiece",
        "[INST] ", " [/INST]",
    ),
    "llama2": Family(
        "meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b-chat-hf", "llama", "mistral_sentencepiece", "[INST] ", " [/INST]"
    ),
    "sheared": Family("princeton-nlp/Sheared-LLaMA-1.3B", "Sheared-LLaMA", "llama", "plain", "", ""),
    "llama31": Family(
        "meta-llama/Meta-Llama-3.1-8B-Instruct", "Meta-Llama-31-8B-Instruct", "llama", "llama3", "", ""
    ),
}  # fmt: skip


def repository(cache: Path, name: str) -> Path:
    """The folder in which the hub library keeps the current files of a repository."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40, encoding="utf-8")
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def write_adapter(folder: Path, family: Family, model: PreTrainedModel, seed: int) -> None:
    """An adapter as upstream's scripts leave it: LoRA on the inner model, and no settings of ours."""
    adapted = attach_lora(model, r=4, alpha=8, dropout=0.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = family.base
    config["auto_mapping"] = {
        "base_model_class": "LlamaBiModel",
        "parent_library": "llm2vec.models.bidirectional_llama",
    }
    file.write_text(json.dumps(config), encoding="utf-8")


def publish(cache: Path, family: Family) -> None:
    """The base and its three adapters; the first of these holds a config too, and points at code of its own."""
    tokenizer = family_tokenizer(family.tokenizer, BLANK_LED)
    base = repository(cache, family.base)
    tiny_model(family.model, True, tokenizer=tokenizer, initializer_range=0.2).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for seed, suffix in enumerate(("mntp", "mntp-supervised", "mntp-unsup-simcse")):
        folder = repository(cache, f"{HUB}{family.name}-{suffix}")
        write_adapter(folder, family, AutoModel.from_pretrained(base), seed)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {"AutoModel": "modeling_llama_encoder.LlamaEncoderModel"}
        config["_name_or_path"] = family.base
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if suffix == "mntp":
            tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    for family in FAMILIES.values():
        publish(cache, family)
    return cache


@pytest.fixture(autouse=True)
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published names, to be had offline."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))


def names(family: str, suffix: str = "mntp-supervised") -> tuple[str, str]:
    """First and second argument of `from_pretrained`."""
    return f"{HUB}{FAMILIES[family].name}-mntp", f"{HUB}{FAMILIES[family].name}-{suffix}"


def encode(model: LLM2Vec, texts: Sequence[Any] = (*QUERIES, *DOCUMENTS), **options: Any) -> Tensor:
    vectors = model.encode(texts, show_progress_bar=False, device="cpu", **options)
    assert isinstance(vectors, Tensor)
    return vectors


def apart(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def pooled_as_upstream(family: Family, mode: str, instruction: str, text: str, hidden: Any) -> Tensor:
    """One embedding, by upstream's rule: the whole row as one string; pooled are as many of its last tokens as the text
    has with what closes it, or the first token, or the last."""
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    row = family.before + (f"{instruction.strip()} {text}" if instruction else text) + family.after
    state_TD = hidden(tokenizer(row, return_tensors="pt").input_ids)[0]
    if mode == "bos_token":
        return state_TD[0]
    if mode == "eos_token":
        return state_TD[-1]
    count = len(tokenizer(text + family.after, add_special_tokens=False).input_ids)
    weight_T = torch.ones(count) if mode == "mean" else torch.arange(1.0, count + 1)
    return (weight_T[:, None] * state_TD[-count:]).sum(dim=0) / weight_T.sum()


def bidirectional_chain(family: str) -> Any:
    """Ids to states, by transformers and peft alone: the base, both adapters merged, every position sees all others."""
    mntp, supervised = names(family)
    model = AutoModel.from_pretrained(FAMILIES[family].base)
    for adapter in (mntp, supervised):
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()

    def hidden(ids: Tensor) -> Tensor:
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])  # added to the logits: nothing is masked
        states: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states

    return hidden


def made_up_states(ids: Sequence[int]) -> Tensor:
    """States [T, 3] that differ by token and by place."""
    token_T, place_T = torch.tensor(ids).double(), torch.arange(len(ids)).double()
    return torch.stack([torch.sin(token_T * (k + 1) + place_T) for k in range(3)], dim=1)


# --- the page's own code ---


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, in order, as one program; then what its comments and sentences claim of the variables."""
    assert len(BLOCKS) == 7
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / "output/supervised/Meta-Llama-3-8B-Instruct/checkpoint-1000"
    family = FAMILIES["llama3"]
    write_adapter(trained, family, AutoModel.from_pretrained(family.base), seed=7)
    family_tokenizer(family.tokenizer).save_pretrained(trained)
    upstreams = {"pooling_mode": "weighted_mean", "max_length": 128, "doc_max_length": 400, "skip_instruction": True}
    (trained / SETTINGS_FILE).write_text(json.dumps(upstreams), encoding="utf-8")
    (trained / "training_args.bin").write_bytes(b"a pickle that nobody opens")

    page: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, page)

    assert page["similarity"].shape == (2, 2) and bool((page["similarity"].abs() < 1).all())
    assert page["l2v"].model.dtype == torch.bfloat16
    assert page["l2v"].settings == EncoderSettings(
        template="llama3", parent_adapters=(f"{HUB}Meta-Llama-3-8B-Instruct-mntp",), instruction_mask="counted"
    )
    assert page["llama31"].settings.template == "plain"
    assert page["mistral"].settings == EncoderSettings(
        template="mistral", doc_max_length=400, instruction_mask="counted"
    )
    assert not isinstance(page["mistral"].model, PeftModel)
    assert page["wrapped"].settings.attention == "bidirectional"
    vectors = page["vectors"].detach()
    expected = F.cross_entropy(50.0 * vectors[:2] @ vectors[2:].T, torch.arange(2))
    assert page["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    page["loss"].backward()
    assert page["model"].settings == page["again"].settings
    assert page["again"].settings == EncoderSettings(
        "weighted_mean", 128, 400, template="llama3", instruction_mask="counted"
    )
    assert torch.equal(encode(page["again"]), encode(page["model"]))
    adapter = encode(LLM2Vec.from_pretrained("converted/adapter"))
    assert apart(adapter, encode(page["model"])) < 1e-5 * float(adapter.abs().max())


def test_the_pages_constructor_is_from_pretrained() -> None:
    """A model loaded by hand and wrapped: bidirectional if said so, or if its config says it."""
    base = FAMILIES["llama3"].base
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = encode(LLM2Vec.from_pretrained(base))
    wrapped = LLM2Vec(AutoModel.from_pretrained(base), tokenizer, "mean", 512, attention="bidirectional")
    assert apart(encode(wrapped), expected) < 1e-6
    decoder = AutoModel.from_pretrained(base)
    causal = LLM2Vec(decoder, tokenizer)
    assert causal.settings.attention == "causal"
    assert apart(encode(causal), encode(LLM2Vec.from_pretrained(base, enable_bidirectional=False))) < 1e-6
    decoder.config.is_causal = False
    assert apart(encode(LLM2Vec(decoder, tokenizer)), expected) < 1e-6
    assert apart(encode(causal), expected) > 0.01


@pytest.mark.parametrize("family", ["llama3", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_config_takes_the_place_of_a_class(family: str, implementation: str) -> None:
    """What `LlamaBiModel` was for: a plain call in which the first position sees the last, with and without a head."""
    model = AutoModel.from_pretrained(FAMILIES[family].base, attn_implementation=implementation)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        causal = model(input_ids=ids).last_hidden_state
        model.config.is_causal = False
        both = model(input_ids=ids).last_hidden_state
    assert apart(causal[0, 0], causal[1, 0]) < 1e-6
    assert apart(both[0, 0], both[1, 0]) > 0.01
    check_attention(model, "bidirectional")


# --- embeddings ---


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "bos_token"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_embeddings_are_upstreams(family: str, mode: str) -> None:
    """Of published chains, under upstream's rules written out again."""
    template = "plain" if family == "llama31" else None
    vectors = encode(LLM2Vec.from_pretrained(*names(family), pooling_mode=mode, template=template))
    hidden = bidirectional_chain(family)
    with torch.no_grad():
        expected = [
            pooled_as_upstream(FAMILIES[family], mode, instruction, text, hidden)
            for instruction, text in [*QUERIES, *(("", text) for text in DOCUMENTS)]
        ]
    assert apart(vectors, torch.stack(expected)) < 1e-5 * float(vectors.abs().max())
    assert apart(vectors[0], vectors[1]) > 0.01 or mode == "bos_token"


@pytest.mark.parametrize("mode", ["mean", "weighted_mean"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_pooled_positions_are_those_that_upstreams_code_gave(family: str, mode: str) -> None:
    """Ids, number of pooled positions and vectors of a published folder are the recorded ones. Ours count otherwise."""
    template = "plain" if family == "llama31" else None
    model = LLM2Vec.from_pretrained(*names(family), pooling_mode=mode, template=template)
    assert len(RECORDED[family]) == len(QUERIES) + len(DOCUMENTS)
    for entry in RECORDED[family]:
        batch = model.tokenize([[entry["instruction"], entry["text"]]])
        assert batch["input_ids"][0].tolist() == entry["ids"]
        assert int(batch["pool_mask"].sum()) == entry["pooled"]
        vector = pool(made_up_states(entry["ids"])[None], batch["pool_mask"], model.pooling_mode)[0]
        torch.testing.assert_close(vector, torch.tensor(entry[mode]).double(), atol=1e-6, rtol=0)
    ours = LLM2Vec.from_pretrained(*names(family), pooling_mode=mode, template=template, instruction_mask="offsets")
    counts = [[int(m.tokenize([query])["pool_mask"].sum()) for query in QUERIES] for m in (model, ours)]
    assert (counts[0] == counts[1]) == FAMILIES[family].tokenizer.endswith("sentencepiece")
    assert counts[0][:2] == counts[1][:2]


def test_a_folder_of_ours_leaves_the_instruction_out_by_where_it_stands(tmp_path: Path) -> None:
    """A file with upstream's keys alone is upstream's, and so is an adapter without one; what we write says which."""
    published = LLM2Vec.from_pretrained(*names("llama3"))
    assert published.settings.instruction_mask == "counted"
    published.save(tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / SETTINGS_FILE).read_text(encoding="utf-8"))["instruction_mask"] == "counted"
    kept = LLM2Vec.from_pretrained(str(tmp_path / "kept"))
    assert kept.settings == published.settings and torch.equal(encode(kept), encode(published))

    with pytest.raises(UserError, match=r"instruction_mask is 'counted'.*with instruction_mask 'offsets'"):
        published.as_sentence_transformer()
    with pytest.raises(UserError, match="instruction_mask is 'x'; allowed: offsets, counted"):
        LLM2Vec.from_pretrained(*names("llama3"), instruction_mask="x")  # type: ignore[arg-type]

    base = FAMILIES["llama3"].base
    ours = LLM2Vec.from_pretrained(*names("llama3"), instruction_mask="offsets")
    assert apart(encode(ours, QUERIES[2:]), encode(published, QUERIES[2:])) > 0.01
    ours.save(tmp_path / "ours")
    assert "instruction_mask" not in json.loads((tmp_path / "ours" / SETTINGS_FILE).read_text(encoding="utf-8"))
    assert LLM2Vec.from_pretrained(str(tmp_path / "ours")).settings == ours.settings
    ours.save(tmp_path / "bare", save_config=False)
    for folder in (str(tmp_path / "bare"), base):  # an adapter of ours without settings, and a bare model
        assert LLM2Vec.from_pretrained(folder).settings.instruction_mask == "offsets"


def test_the_closing_token_of_llama3_is_upstreams() -> None:
    vectors = encode(LLM2Vec.from_pretrained(*names("llama3"), pooling_mode="eos_token"), DOCUMENTS)
    hidden = bidirectional_chain("llama3")
    with torch.no_grad():
        expected = [pooled_as_upstream(FAMILIES["llama3"], "eos_token", "", text, hidden) for text in DOCUMENTS]
    assert apart(vectors, torch.stack(expected)) < 1e-5 * float(vectors.abs().max())


def test_llama31_has_a_template_here_unless_told_otherwise() -> None:
    given, none = (LLM2Vec.from_pretrained(*names("llama31"), template=template) for template in (None, "plain"))
    assert given.settings.template == "llama3"
    assert apart(encode(given), encode(none)) > 0.01


@pytest.mark.parametrize("suffix", ["mntp-supervised", "mntp-unsup-simcse"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_published_chain_is_one_however_it_is_written(family: str, suffix: str) -> None:
    mntp, outer = names(family, suffix)
    first = LLM2Vec.from_pretrained(mntp, peft_model_name_or_path=outer)
    spelled_out = LLM2Vec.from_pretrained(FAMILIES[family].base, [mntp, outer])
    assert torch.equal(encode(first), encode(spelled_out))
    assert apart(encode(first), encode(LLM2Vec.from_pretrained(mntp))) > 0.01
    expected = {"mistral": "mistral", "llama2": "mistral", "sheared": "plain"}.get(family, "llama3")
    assert first.settings.template == expected


def test_an_adapter_as_first_argument_alone() -> None:
    """It stays one unless told otherwise; upstream merges it."""
    mntp = names("llama3")[0]
    kept, merged = (LLM2Vec.from_pretrained(mntp, merge_peft=merge) for merge in (False, True))
    assert isinstance(kept.model, PeftModel) and not isinstance(merged.model, PeftModel)
    assert apart(encode(kept), encode(merged)) < 1e-5


# --- what upstream's methods took, and what the tables say ---


def arguments(call: Any) -> list[str]:
    return [name for name in inspect.signature(call).parameters if name != "self"]


def test_arguments_have_upstreams_names_and_order() -> None:
    loading = arguments(LLM2Vec.from_pretrained)
    assert loading[:4] == ["base_model_name_or_path", "peft_model_name_or_path", "merge_peft", "enable_bidirectional"]
    encoder = ["pooling_mode", "max_length", "doc_max_length", "skip_instruction"]
    assert {*encoder, "torch_dtype", "device_map", "attn_implementation"} <= set(loading)
    assert arguments(LLM2Vec)[:6] == ["model", "tokenizer", *encoder]
    assert arguments(LLM2Vec.encode)[:6] == [
        "sentences", "batch_size", "show_progress_bar", "convert_to_numpy", "convert_to_tensor", "device",
    ]  # fmt: skip
    assert arguments(LLM2Vec.save) == ["output_path", "merge_before_save", "save_config"]


def test_encode_gives_what_upstream_gives() -> None:
    model = LLM2Vec.from_pretrained(*names("llama3"), device_map="cpu", torch_dtype=torch.bfloat16)
    vectors = model.encode(DOCUMENTS, batch_size=2)
    assert isinstance(vectors, Tensor) and vectors.dtype == torch.float32 and vectors.device.type == "cpu"
    assert apart(vectors.norm(dim=1), torch.ones(len(DOCUMENTS))) > 0.1
    assert np.asarray(vectors).shape == (len(DOCUMENTS), 32)
    array = model.encode(DOCUMENTS, show_progress_bar=False, convert_to_numpy=True)
    assert isinstance(array, np.ndarray) and array.dtype == np.float32


def test_the_entries_of_upstreams_examples() -> None:
    """A zero behind each pair, also of one pair alone; arrays. A third string or a fraction is still a mistake."""
    model = LLM2Vec.from_pretrained(*names("llama3"))
    expected = encode(model, QUERIES)
    assert torch.equal(encode(model, [[*query, 0] for query in QUERIES]), expected)
    assert torch.equal(encode(model, [(*query, np.int64(0)) for query in QUERIES]), expected)
    assert torch.equal(encode(model, np.array(QUERIES)), expected)
    assert torch.equal(encode(model, [[None, text] for text in DOCUMENTS]), encode(model, DOCUMENTS))
    alone = encode(model, [*QUERIES[0], 0])
    assert alone.shape == (1, 32) and torch.equal(alone, encode(model, QUERIES[:1]))
    assert torch.equal(model.tokenize([*QUERIES[0], 0])["input_ids"], model.tokenize(QUERIES[:1])["input_ids"])
    assert len(model.tokenize("who")["input_ids"]) == 1
    for wrong in (["a", "b", 0.5], ["a", "b", "c"], ["a", "b", 0, 0], ["a", "b", True], ["a", 0], ["a"], []):
        with pytest.raises(UserError, match="pair is needed"):
            encode(model, [wrong])


def test_folders_may_be_paths(tmp_path: Path) -> None:
    model = LLM2Vec.from_pretrained(*names("llama3"))
    model.save(tmp_path / "adapter")
    mntp = names("llama3")[0]
    for loaded in (
        LLM2Vec.from_pretrained(tmp_path / "adapter"),
        LLM2Vec.from_pretrained(mntp, tmp_path / "adapter"),
        LLM2Vec.from_pretrained(FAMILIES["llama3"].base, [mntp, tmp_path / "adapter"]),
    ):
        assert torch.equal(encode(loaded), encode(model))
        assert loaded.settings == model.settings


def test_upstreams_attributes_are_read_and_written() -> None:
    """As when the model is loaded with them; a value that may not be leaves all as it was."""
    settings: dict[str, Any] = {
        "pooling_mode": "eos_token", "max_length": 90, "doc_max_length": 3, "skip_instruction": False,
    }  # fmt: skip
    model = LLM2Vec.from_pretrained(*names("llama3"))
    for name, value in settings.items():
        before = encode(model)
        setattr(model, name, value)
        assert getattr(model, name) == {"eos_token": "last"}.get(value, value)
        assert (apart(encode(model), before) > 0.01) == (name in ("pooling_mode", "doc_max_length"))
    loaded = LLM2Vec.from_pretrained(*names("llama3"), **settings)
    assert loaded.settings == model.settings and torch.equal(encode(loaded), encode(model))
    with pytest.raises(UserError, match="max_length is 0"):
        model.max_length = 0
    assert model.max_length == 90 and model.config.hidden_size == 32
    with pytest.raises(AttributeError):
        model.config = model.config  # type: ignore[misc]


def test_rows_end_where_upstreams_callers_read_them() -> None:
    """They set the tokenizer's padding side to the left, assert it, and read the last position of each row."""
    model = LLM2Vec.from_pretrained(*names("llama3"), pooling_mode="last_token")
    assert model.tokenizer.padding_side == "left"
    batch = model.tokenize(DOCUMENTS)
    with torch.no_grad():
        last = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[
            :, -1
        ]
    assert apart(last, encode(model, DOCUMENTS)) < 1e-5
    model.tokenizer.padding_side = "right"
    assert model.tokenize(DOCUMENTS)["attention_mask"][:, 0].all()


def test_overridden_steps_are_used_by_encode() -> None:
    """`forward` with a head of its own, `tokenize` with its own idea of a text; each also under a side."""

    class Halved(LLM2Vec):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch)[:, ::2]

    class Lower(LLM2Vec):
        def tokenize(self, texts: Any, side: Any = None) -> dict[str, Tensor]:
            return super().tokenize([[instruction, text.lower()] for instruction, text in texts], side)

    plain = LLM2Vec.from_pretrained(*names("llama3"))
    halved, lower = (kind.from_pretrained(*names("llama3")) for kind in (Halved, Lower))
    for side in (None, "document"):
        assert apart(encode(halved, side=side), encode(plain, side=side)[:, ::2]) < 1e-5
        assert (
            apart(encode(lower, ["WHO WROTE", "Hello"], side=side), encode(plain, ["who wrote", "hello"], side=side))
            < 1e-5
        )
    assert encode(halved, truncate_dim=5).shape == (7, 5)
    assert encode(halved, batch_size=2).shape == (7, 16)


def test_a_tokenizers_own_batch_is_pooled_over_all_of_it() -> None:
    """Upstream's callers do so; where instructions are left out, nobody knows where they end."""
    whole = LLM2Vec.from_pretrained(*names("llama3"), skip_instruction=False)
    batch = whole.tokenize(["who wrote", "Hello"])
    made = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(whole(dict(made)), whole(dict(batch)))
        whole.skip_instruction = True
        with pytest.raises(UserError, match="the batch has no `pool_mask`"):
            whole(made)


@pytest.mark.parametrize(
    "step", ["prepare_for_tokenization", "_convert_to_str", "_skip_instruction", "get_pooling", "_encode"]
)
def test_an_override_that_nothing_calls_is_refused(step: str) -> None:
    with pytest.raises(UserError, match=f"Mine overrides {step}, which nothing here calls: .*docs/migration.md"):
        type("Mine", (LLM2Vec,), {step: lambda self, text: text})
    mixin = type("Mixin", (), {step: lambda self, text: text})
    with pytest.raises(UserError, match=f"Mine overrides {step}"):
        type("Mine", (mixin, LLM2Vec), {})
    with pytest.raises(AttributeError, match=f"LLM2Vec has no {step}: .*docs/migration.md"):
        getattr(LLM2Vec.from_pretrained(*names("llama3")), step)


def test_upstreams_smaller_names() -> None:
    assert llm2vec.version.__version__ == llm2vec.__version__
    moved = batch_to_device({"ids": torch.zeros(2), "text": "who"}, torch.device("meta"))
    assert moved["ids"].is_meta and moved["text"] == "who"
    assert LLM2Vec._get_model_class("LlamaConfig", enable_bidirectional=True) is LlamaBiModel
    assert LLM2Vec._get_model_class("LlamaConfig", enable_bidirectional=False) is AutoModel
    with pytest.raises(ValueError, match="T5Config is not supported"):
        LLM2Vec._get_model_class("T5Config", enable_bidirectional=True)
    model = LLM2Vec.from_pretrained(FAMILIES["llama3"].base)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.model.is_gradient_checkpointing
    rows = model.model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 3)
    assert model.model.get_input_embeddings().weight.shape[0] == rows + 3
    assert not hasattr(model, "no_such_name")


@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_a_model_with_a_device_map_is_not_moved(device_map: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLM2Vec.from_pretrained(*names("llama3"), device_map=device_map)
    moved: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model, "to", moved.append)
    model.encode(DOCUMENTS, show_progress_bar=False)
    assert moved == ([] if device_map else ["cuda"])


def test_answers_instead_of_accidents() -> None:
    model = LLM2Vec.from_pretrained(*names("llama3"), max_length=24)
    assert encode(model, "who").shape == (1, 32) and encode(model, []).shape == (0, 32)
    assert torch.equal(encode(model, ["  who wrote it\n"]), encode(model, ["who wrote it"]))
    with pytest.raises(UserError, match="max_length is 24"):
        encode(model, [["find " * 40, "who wrote it"]])


# --- what upstream hands on to transformers ---


@pytest.mark.parametrize("keyword", ["low_cpu_mem_usage", "use_cache", "use_safetensors", "trust_remote_code"])
def test_a_keyword_without_effect_is_taken_and_said(keyword: str, caplog: pytest.LogCaptureFixture) -> None:
    model = LLM2Vec.from_pretrained(*names("llama3"), **{keyword: True})
    assert [message for message in caplog.messages if message.startswith(f"{keyword} has no effect: ")]
    if keyword == "trust_remote_code":  # its config names modelling code, which is not even there
        assert "the repository's own code is not needed and is not run" in caplog.text
    assert torch.equal(encode(model), encode(LLM2Vec.from_pretrained(*names("llama3"))))


@pytest.mark.parametrize(
    ("keyword", "instead"),
    [
        ("poling_mode", "the nearest is 'pooling_mode'"),
        ("locl_files_only", "the nearest is 'local_files_only'"),
        ("load_in_8bit", r"write quantization_config=BitsAndBytesConfig\(load_in_8bit=True\)"),
        ("use_auth_token", "write token"),
        ("xyzzy", r"argument 'xyzzy'\.$"),
    ],
)
def test_an_unknown_keyword_is_refused_and_the_nearest_named(keyword: str, instead: str) -> None:
    with pytest.raises(TypeError, match=instead):
        LLM2Vec.from_pretrained(*names("llama3"), **{keyword: "x"})


def test_a_revision_and_another_cache_hold_for_all_files(tmp_path: Path) -> None:
    """Weights, config and tokenizer of the old commit; the newest has others of each. Adapters have their newest."""
    name, tokenizers = "nobody/two-commits", ("llama3", "mistral")
    newest = repository(tmp_path, name)
    for snapshot, tokenizer in zip((newest.with_name("1" * 40), newest), tokenizers, strict=True):
        own = family_tokenizer(tokenizer)
        tiny_model("llama", True, tokenizer=own, initializer_range=0.2, seed=len(tokenizer)).save_pretrained(snapshot)
        own.save_pretrained(snapshot)
    with pytest.raises(UserError):
        LLM2Vec.from_pretrained(name)
    options: Any = {"cache_dir": tmp_path, "local_files_only": True}
    for revision, tokenizer, snapshot in ((None, "mistral", newest), ("1" * 40, "llama3", newest.with_name("1" * 40))):
        model = LLM2Vec.from_pretrained(name, revision=revision, **options)
        assert model.settings.template == tokenizer
        assert torch.equal(encode(model), encode(LLM2Vec.from_pretrained(snapshot)))


def test_a_token_is_handed_to_all_who_ask_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    real = transformers.utils.hub.cached_files

    def cached_files(*arguments: Any, **keywords: Any) -> Any:
        given = inspect.signature(real).bind(*arguments, **keywords).arguments
        asked.extend((name, keywords.get("token")) for name in given["filenames"])
        return real(*arguments, **keywords)

    monkeypatch.setattr(transformers.utils.hub, "cached_files", cached_files)
    LLM2Vec.from_pretrained(*names("llama3"), token="hf_mine")
    assert {"config.json", "adapter_config.json", "tokenizer_config.json", SETTINGS_FILE} <= {name for name, _ in asked}
    assert {token for _, token in asked} == {"hf_mine"}
    asked.clear()
    LLM2Vec.from_pretrained(*names("llama3"))
    assert asked and {token for _, token in asked} == {None}


def test_quantisation_goes_to_transformers_by_bitsandbytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    real = AutoModel.from_pretrained

    def from_pretrained(*arguments: Any, quantization_config: Any = None, **keywords: Any) -> Any:
        given.append(quantization_config)  # the library itself may not be here
        return real(*arguments, **keywords)

    monkeypatch.setattr(AutoModel, "from_pretrained", from_pretrained)
    config = BitsAndBytesConfig(load_in_8bit=True)
    LLM2Vec.from_pretrained(*names("llama3"), quantization_config=config)
    assert given == [config]
    with pytest.raises(UserError, match="quantization_config is of 'mxfp4'; allowed: bitsandbytes"):
        LLM2Vec.from_pretrained(*names("llama3"), quantization_config={"quant_method": "mxfp4"})


def test_tokenize_and_pool_take_the_place_of_upstreams_steps() -> None:
    model = LLM2Vec.from_pretrained(*names("mistral"))
    model.tokenizer.padding_side = "right"  # else `forward` says where a row's text begins, and rounds otherwise
    batch = model.tokenize(QUERIES)
    assert set(batch) >= {"input_ids", "attention_mask", "pool_mask"}
    with torch.no_grad():
        states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        pooled = pool(states, batch["pool_mask"], model.settings.pooling_mode)
        assert torch.equal(pooled, model(batch))
    assert apart(pooled, encode(model, QUERIES)) < 1e-5
    marked = encode(model, ["who!@#$%^&*()wrote it"])  # upstream's separator, which is text here
    assert apart(marked, encode(model, ["wrote it"])) > 0.01


@pytest.mark.parametrize("how", ["loaded", "wrapped", "told causal"])
def test_the_decoder_by_itself_attends_as_encode_does(how: str) -> None:
    """Word tasks call `l2v.model(**inputs)`, which is bidirectional upstream; no argument of ours is needed for it."""
    base = FAMILIES["llama3"].base
    if how == "wrapped":
        decoder, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
        model = LLM2Vec(decoder, tokenizer, attention="bidirectional")
    else:
        model = LLM2Vec.from_pretrained(*names("llama3"), enable_bidirectional=how == "loaded")
    batch = model.tokenize([*QUERIES, *DOCUMENTS])
    with torch.no_grad():
        states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    expected = encode(model)
    cosine = F.cosine_similarity(pool(states, batch["pool_mask"], "mean"), expected)
    assert float(cosine.min()) > 0.999999
    assert getattr(model.config, "is_causal", True) == (how == "told causal")


def test_upstreams_loss() -> None:
    """Positives first, then hard negatives; the mean over the queries."""
    query, positive, negative = torch.randn(3, 4, 16)
    documents = torch.cat([positive, negative])
    logits = 20.0 * F.cosine_similarity(query[:, None], documents[None], dim=-1)
    expected = F.cross_entropy(logits, torch.arange(4))
    normal = F.normalize(query, dim=-1), F.normalize(documents, dim=-1)
    loss = info_nce(*normal, torch.arange(4), loss_scale=20.0, weight_B=torch.full((4,), 1 / 4)).loss
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


# --- upstream's training files ---

#: Keys and values of upstream's files for Meta-Llama-3-8B-Instruct and (MNTP) Qwen2.
SHARED = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "gradient_accumulation_steps": 1, "do_train": True,
    "overwrite_output_dir": True, "output_dir": "output/x", "save_steps": 200, "stop_after_n_steps": 1000,
    "lora_r": 16, "gradient_checkpointing": True, "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
}  # fmt: skip
CONTRASTIVE = {
    "peft_model_name_or_path": f"{HUB}Meta-Llama-3-8B-Instruct-mntp", "bidirectional": True, "pooling_mode": "mean",
    "remove_unused_columns": False, "disable_tqdm": False, "logging_steps": 50, "save_only_model": True, "seed": 42,
}  # fmt: skip
FILES: dict[Stage, dict[str, Any]] = {
    "mntp": SHARED | {
        "dataset_name": "wikitext", "dataset_config_name": "wikitext-103-raw-v1", "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32, "do_eval": True, "max_seq_length": 512, "mask_token_type": "blank",
        "data_collator_type": "default", "mlm_probability": 0.2, "evaluation_strategy": "steps", "eval_steps": 100,
        "dataloader_num_workers": 4, "dataloader_prefetch_factor": 2,
    },
    "simcse": SHARED | CONTRASTIVE | {
        "simcse_dropout": 0.3, "dataset_name": "Wiki1M", "dataset_file_path": "cache/wiki1m_for_simcse.txt",
        "learning_rate": 3e-5, "loss_scale": 20, "per_device_train_batch_size": 128, "max_seq_length": 128,
    },
    "stage_II": SHARED | CONTRASTIVE | {
        "dataset_name": "E5", "dataset_file_path": "cache/echo-data", "learning_rate": 2e-4, "num_train_epochs": 3,
        "warmup_steps": 300, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64,
        "max_seq_length": 512,
    },
}  # fmt: skip


@pytest.mark.parametrize("stage", list(FILES))
def test_upstreams_files_are_read_as_they_are(stage: Stage, tmp_path: Path) -> None:
    """Every key is taken over, but the one that has no effect and the one that has another name today."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(FILES[stage]), encoding="utf-8")
    config = load_config(file, stage)
    assert config.bidirectional and config.pooling_mode == "mean" and config.use_peft
    for key, value in FILES[stage].items():
        if key == "overwrite_output_dir":
            continue
        key = {"evaluation_strategy": "eval_strategy"}.get(key, key)
        assert (config.training[key] if key in config.training else getattr(config, key)) == value
    args = training_arguments(config)
    assert args.per_device_train_batch_size == FILES[stage]["per_device_train_batch_size"]


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("low_cpu_mem_usage", True, "no effect"),
        ("preprocessing_num_workers", 4, "no effect"),
        ("train_file", "texts.txt", "write `dataset_file_path`"),
        ("validation_split_percentage", 5, "write `num_eval_rows`"),
    ],
)
def test_keys_of_upstreams_mntp_script(
    key: str, value: Any, word: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which its files do not use and its users may: without effect and said, or refused with what replaces them."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(FILES["mntp"] | {key: value}), encoding="utf-8")
    try:
        load_config(file, "mntp")
    except UserError as error:
        caplog.handler.stream.write(str(error))
    assert f": {key}: " in caplog.text and word in caplog.text


def test_a_model_cards_example() -> None:
    """The lines of a published model's page, but for its own code, which transformers 5 cannot run."""
    mntp, supervised = names("mistral")
    tokenizer = AutoTokenizer.from_pretrained(mntp)
    model = AutoModel.from_pretrained(mntp, config=AutoConfig.from_pretrained(mntp), device_map="cpu")
    model = PeftModel.from_pretrained(model, mntp)
    model = model.merge_and_unload()
    model = PeftModel.from_pretrained(model, supervised)
    wrapped = LLM2Vec(model, tokenizer, pooling_mode="mean", max_length=512, attention="bidirectional")
    assert apart(encode(wrapped), encode(LLM2Vec.from_pretrained(mntp, supervised))) < 1e-5


def test_the_pages_defaults_are_the_configs() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Training")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`[^|]*\| [^|]+ \| ([^|:]+)[^|]*\|$", section, re.MULTILINE)
    said = {key: value.strip(" `") for key, value in rows}
    defaults = {name: getattr(Config, name) for name in said}
    assert len(said) == 6
    assert {
        name: {None: "none"}.get(value, f"{value:g}" if isinstance(value, float) else str(value))
        for name, value in defaults.items()
    } == said


@pytest.mark.parametrize(("keys", "said"), [({}, True), ({"loss_scale": 20}, False)])
def test_supervised_training_says_that_its_loss_scale_is_not_upstreams(
    keys: dict[str, Any], said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(train, "_train", lambda *stage_and_path: trained.append(stage_and_path))
    config = tmp_path / "supervised.json"
    config.write_text(json.dumps(keys), encoding="utf-8")
    caplog.set_level("WARNING", logger="llm2vec")
    train.supervised([str(config)])
    assert trained == [("stage_II", config)]
    words = f"loss_scale is left out and is {Config.loss_scale:g} here; upstream llm2vec's default is 50."
    assert (words in caplog.text) is said
