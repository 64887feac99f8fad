"""Upstream's paths beside `llm2vec.llm2vec`: its models, loss, data and names of experiments."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import MODELS, tiny_model, write_jsonl
from transformers import AutoModel

from llm2vec import models
from llm2vec.data.sources import e5_sources
from llm2vec.dataset.utils import load_dataset
from llm2vec.experiment_utils import generate_experiment_id, parse_experiment_id
from llm2vec.loss import HardNegativeNLLLoss, cos_sim
from llm2vec.loss.utils import load_loss
from llm2vec.model.backbone import hidden_states
from llm2vec.types import UserError

NAMES = {"llama": "Llama", "mistral": "Mistral", "gemma": "Gemma", "qwen2": "Qwen2"}


@pytest.mark.parametrize("family", NAMES)
def test_a_bimodel_is_the_family_s_model_with_attention_in_both_directions(family: str, tmp_path: Path) -> None:
    plain = tiny_model(family)
    bidirectional = getattr(models, f"{NAMES[family]}BiModel")(plain.config).eval()
    assert isinstance(bidirectional, MODELS[family][3])
    assert getattr(plain.config, "is_causal", True), "the caller's config stays causal"
    bidirectional.load_state_dict(plain.state_dict())
    ids, mask = torch.randint(3, 200, (2, 7)), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    with torch.no_grad():
        found = bidirectional(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = hidden_states(plain, "bidirectional", mask, input_ids=ids)
        causal = hidden_states(plain, "causal", mask, input_ids=ids)
    assert torch.equal(found[mask.bool()], expected[mask.bool()])
    assert not torch.allclose(found[:, 0], causal[:, 0])
    bidirectional.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(again[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", NAMES)
def test_a_model_for_mntp_has_a_head_and_hands_out_its_decoder(family: str) -> None:
    plain = tiny_model(family, True)
    model = getattr(models, f"{NAMES[family]}BiForMNTP")(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    ids = torch.randint(3, 200, (1, 6))
    with torch.no_grad():
        states = hidden_states(plain.base_model, "bidirectional", torch.ones_like(ids), input_ids=ids)
        assert torch.allclose(model(input_ids=ids).logits, plain.lm_head(states), atol=1e-6)
    assert model.get_model_for_peft() is model.model
    other = tiny_model(family)
    model.set_model_for_peft(other)
    assert model.model is other


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("with_negatives", [False, True])
def test_the_loss_is_the_mean_cross_entropy_over_scaled_cosines(with_negatives: bool) -> None:
    query, positive, negative = vectors(0, 3, 8), vectors(1, 3, 8), vectors(2, 6, 8)
    documents = [positive, negative] if with_negatives else [positive]
    expected = F.cross_entropy(
        50 * F.normalize(query, dim=-1) @ F.normalize(torch.cat(documents), dim=-1).T, torch.arange(3)
    )
    found = load_loss("HardNegativeNLLLoss", scale=50.0)(query, *documents)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for of_found, of_expected in zip(
        torch.autograd.grad(found, [query, *documents]), torch.autograd.grad(expected, [query, *documents]), strict=True
    ):
        assert torch.allclose(of_found, of_expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(cos_sim(query[0], positive), F.cosine_similarity(query[:1], positive)[None])


def test_another_loss_or_similarity_is_refused() -> None:
    with pytest.raises(UserError, match="'TripletLoss'; allowed: HardNegativeNLLLoss"):
        load_loss("TripletLoss")
    with pytest.raises(UserError, match="only cos_sim"):
        HardNegativeNLLLoss(similarity_fct=torch.dot)


def test_e5_samples_come_in_batches_of_one_source(tmp_path: Path) -> None:
    for source in e5_sources():
        write_jsonl(
            tmp_path / source.file,
            [{"query": f"q{i}", "positive": f"{source.name} {i}", "negative": f"n{i}"} for i in range(5)],
        )
    random.seed(0)
    samples = load_dataset("E5", split="train", file_path=tmp_path, effective_batch_size=2)
    assert len(samples) == 14 * 4
    texts = [samples[i].texts for i in range(len(samples))]
    of_rows = [text[1].removeprefix("!@#$%^&*()").split() for text in texts]
    assert all(one[0] == other[0] for one, other in zip(of_rows[::2], of_rows[1::2], strict=True))
    first = next(text for text, row in zip(texts, of_rows, strict=True) if row == ["nq", "1"])
    instruction = "Given a question, retrieve Wikipedia passages that answer the question"
    assert first == [f"{instruction}; !@#$%^&*()q1", "!@#$%^&*()nq 1", "!@#$%^&*()n1"] and samples[0].label == 1.0
    random.seed(0)
    again = load_dataset("E5", split="train", file_path=tmp_path, effective_batch_size=2)
    assert [again[i].texts for i in range(len(again))] == texts


def test_a_sentence_of_wiki1m_is_its_own_positive(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("One sentence.\n Another. \n", encoding="utf-8")
    samples = load_dataset("Wiki1M", file_path=tmp_path / "w.txt")
    assert [samples[i].texts for i in range(len(samples))] == [["One sentence."] * 2, ["Another."] * 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dataset_name": "NLI"}, "allowed: E5, Wiki1M"),
        ({"dataset_name": "Wiki1M", "split": "validation"}, "train split only"),
        ({"dataset_name": "Wiki1M", "file_path": "none.txt"}, "none.txt: cannot be read"),
    ],
)
def test_wrong_data_is_one_sentence(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_dataset(**arguments)


def test_an_experiment_s_name_tells_its_settings() -> None:
    name = generate_experiment_id("E5", "train", "Llama-3", "mean", 64, 512, True, 3, 42, 300, 2e-4, 16)
    assert name == "E5_train_m-Llama-3_p-mean_b-64_l-512_bidirectional-True_e-3_s-42_w-300_lr-0.0002_lora_r-16"
    expected = {
        "name": "E5_train", "model_name_or_path": "Llama-3", "pooling_mode": "mean", "train_batch_size": 64,
        "max_seq_length": 512, "bidirectional": True, "epochs": 3, "seed": 42, "warmup_steps": 300, "lr": 2e-4,
        "lora_r": 16,
    }  # fmt: skip
    assert parse_experiment_id(name) == expected
    assert parse_experiment_id(f"output/{name}/checkpoint-1000") == expected
    with pytest.raises(UserError, match="is no name"):
        parse_experiment_id("output")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["gliner.modeling.encoder", "gliclass.model"])
def test_programs_that_build_on_upstream_s_models_import(package: str) -> None:
    pytest.importorskip(package.split(".")[0])
    module = importlib.import_module(package)
    assert module.DECODER_MODEL_MAPPING["LlamaConfig"] is models.LlamaBiModel


@pytest.mark.slow
def test_gliner_s_encoder_over_a_decoder_builds_and_takes_a_step() -> None:
    encoder = pytest.importorskip("gliner.modeling.encoder")
    config = SimpleNamespace(
        encoder_config=tiny_model("llama").config, vocab_size=-1, _attn_implementation=None, fuse_layers=False
    )
    model = encoder.Transformer("tiny", config)
    assert isinstance(model.model, models.LlamaBiModel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, mask = torch.randint(3, 200, (2, 7)), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, attention_mask=mask)[mask.bool()].square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
