"""Stage I under sentence-transformers' trainer is our Stage I on the same rows, in value and in every gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from datasets import Dataset
from helpers import family_tokenizer, tiny_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.models import Normalize, Pooling, Transformer
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.sentence_transformers import BidirectionalReconstructionLoss
from llm2vec.text.batches import pack_rows
from llm2vec.types import Batch, InstructedText, UserError

ROWS = [(row.query.text, row.positive.text) for row in reference.examples(6)]


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """A base model's tokenizer that writes <s> before and </s> behind a text, as last-token pooling needs."""
    tokenizer = family_tokenizer("plain")
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=ids
    )
    tokenizer.pad_token = "</s>"
    return tokenizer


def save_base(folder: Path, family: str = "llama", **overrides: Any) -> str:
    tokenizer = closing_tokenizer()
    tiny_model(family, True, tokenizer=tokenizer, initializer_range=0.2, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def causal_lm(folder: str, family: str) -> PreTrainedModel:
    model: PreTrainedModel = type(tiny_model(family, True)).from_pretrained(folder)
    return model


def sentence_model(folder: str, *more: Any) -> SentenceTransformer:
    model = SentenceTransformer(
        modules=[Transformer(folder), Pooling(32, pooling_mode="lasttoken"), *more], device="cpu"
    )
    return model.train()


def features(model: SentenceTransformer, side: int, prompt: str | None = None) -> dict[str, Any]:
    return model.preprocess([row[side] for row in ROWS], prompt=prompt)


def packed_batch(tokenizer: PreTrainedTokenizerFast, instruction: str = "") -> tuple[EncoderSettings, Batch]:
    """The same rows by our own renderer: template `plain` under last pooling writes <s> text </s>."""
    settings = EncoderSettings(pooling_mode="last", attention="causal", template="plain", instruction_join="\n")
    renderer = row_tokenizer(tokenizer, settings)

    def side(column: int, instruction: str) -> Any:
        return pack_rows(renderer.rows([InstructedText(instruction, row[column]) for row in ROWS]))

    return settings, {"query": side(0, instruction), "positive": side(1, "")}


CASES: dict[str, tuple[str, bool, float, str, str]] = {
    "mix": ("llama", False, 0.2, "right", ""),
    "tied": ("llama", True, 0.2, "right", ""),
    "left_padding": ("qwen3", True, 0.2, "left", ""),
    "only_q2d": ("llama", False, 1.0, "right", ""),
    "only_d2q": ("mistral", False, 0.0, "right", ""),
    "prompt": ("llama", True, 0.5, "right", "find the answer"),
    "prompt_left": ("llama", True, 0.5, "left", "find the answer"),
}


@pytest.mark.parametrize(("family", "tied", "alpha", "padding_side", "prompt"), CASES.values(), ids=CASES)
def test_loss_and_every_gradient_are_stage_ones(
    family: str, tied: bool, alpha: float, padding_side: str, prompt: str, tmp_path: Path
) -> None:
    folder = save_base(tmp_path, family, tie_word_embeddings=tied)
    ours = reference.exact(causal_lm(folder, family))
    model = reference.exact(sentence_model(folder))
    model.tokenizer.padding_side = padding_side
    head = None if tied else copy.deepcopy(ours.lm_head)
    loss = BidirectionalReconstructionLoss(model, head, alpha)
    parts = loss([features(model, 0, prompt and f"{prompt}\n"), features(model, 1)], None)

    settings, batch = packed_batch(closing_tokenizer(), prompt)
    objective = BidirectionalReconstruction(ours, settings, alpha)
    expected = objective(batch, objective.count(batch)).parts
    assert set(parts) == {name.removeprefix("loss_") for name in expected if name.startswith("loss_")}
    for name, weight in (("q2d", alpha), ("d2q", 1 - alpha)):
        if name in parts:
            assert float(weight * expected[f"loss_{name}"]) > 0.1
            torch.testing.assert_close(parts[name].detach(), weight * expected[f"loss_{name}"], rtol=1e-9, atol=0)
    torch.stack(list(parts.values())).sum().backward()
    expected["loss"].backward()
    of_decoder = {f"model.{name}": p.grad for name, p in model.transformers_model.named_parameters()}
    if head is not None:
        of_decoder["lm_head.weight"] = head.weight.grad
    reference.assert_same_gradients(of_decoder, reference.gradients(ours))


def train(
    folder: str, output_dir: Path, **options: Any
) -> tuple[BidirectionalReconstructionLoss, list[dict[str, Any]]]:
    """A real run; what the trainer logged."""
    model = sentence_model(folder)
    tied = model.transformers_model.config.tie_word_embeddings
    loss = BidirectionalReconstructionLoss(model, None if tied else causal_lm(folder, "llama").lm_head)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output_dir), per_device_train_batch_size=3, learning_rate=1e-2, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, seed=1, **({"max_steps": 12} | options),
    )  # fmt: skip
    columns = {"query": [row[0] for row in ROWS], "document": [row[1] for row in ROWS]}
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss
    )
    trainer.train()
    return loss, [line for line in trainer.state.log_history if "loss" in line]


def test_the_trainer_learns_to_reconstruct(tmp_path: Path) -> None:
    """An untied head and the decoder both learn, the directions are logged, and the saved model embeds as trained."""
    folder = save_base(tmp_path / "base")
    before = causal_lm(folder, "llama")
    loss, log = train(folder, tmp_path / "out")
    assert len(log) == 12 and log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert {"q2d", "d2q"} <= set(log[0]) and log[0]["q2d"] + log[0]["d2q"] == pytest.approx(log[0]["loss"], rel=1e-3)
    assert loss.lm_head is not None and not torch.equal(loss.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(loss.decoder.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    loss.model.save_pretrained(str(tmp_path / "saved"))
    texts = [row[0] for row in ROWS]
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    trained: Tensor = loss.model.eval().encode(texts, convert_to_tensor=True)
    assert torch.allclose(loaded.encode(texts, convert_to_tensor=True), trained, atol=1e-6)


def test_activation_checkpointing_and_prompts_change_nothing_else(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", tie_word_embeddings=True)
    options: dict[str, Any] = {"max_steps": 3, "prompts": {"query": "find the answer\n"}}
    (kept, plain), (recomputing, recomputed) = (
        train(folder, tmp_path / "out", gradient_checkpointing=on, **options) for on in (False, True)
    )
    assert (kept.decoder.is_gradient_checkpointing, recomputing.decoder.is_gradient_checkpointing) == (False, True)
    for left, right in zip(plain, recomputed, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
    assert train(folder, tmp_path / "out", max_steps=1)[1][0]["loss"] != plain[0]["loss"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    untied, tied = (save_base(tmp_path / str(on), tie_word_embeddings=on) for on in (False, True))
    with pytest.raises(UserError, match=r"^lm_head: .*give the head"):
        BidirectionalReconstructionLoss(sentence_model(untied))
    with pytest.raises(UserError, match="modules Transformer, Pooling, Normalize"):
        BidirectionalReconstructionLoss(sentence_model(tied, Normalize()))
    with pytest.raises(UserError, match=r"alpha is 1\.5; it must lie between 0 and 1"):
        BidirectionalReconstructionLoss(sentence_model(tied), alpha=1.5)
    model = sentence_model(tied)
    loss = BidirectionalReconstructionLoss(model)
    goal = features(model, 1)
    del goal["attention_mask"]
    with pytest.raises(UserError, match="unpad_inputs"):
        loss.reconstruct(torch.zeros(len(ROWS), 32), goal)


def test_an_empty_text_is_no_target(tmp_path: Path) -> None:
    """Its row drops out, and the others are weighted as if it were not there."""
    model = sentence_model(save_base(tmp_path, tie_word_embeddings=True)).eval()
    loss = BidirectionalReconstructionLoss(model)
    anchor_BD = torch.randn(3, 32)
    with_empty = loss.reconstruct(anchor_BD, model.preprocess(["who wrote it", "", "the answer"]))
    without = loss.reconstruct(anchor_BD[[0, 2]], model.preprocess(["who wrote it", "the answer"]))
    torch.testing.assert_close(with_empty, without)


def test_a_batch_of_empty_texts_has_a_loss_of_zero(tmp_path: Path) -> None:
    model = sentence_model(save_base(tmp_path, tie_word_embeddings=True))
    parts = BidirectionalReconstructionLoss(model)([features(model, 0), model.preprocess([""] * len(ROWS))], None)
    assert parts["q2d"] == 0 and parts["d2q"] > 0
    torch.stack(list(parts.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.transformers_model.parameters())
