"""Every objective that predicts tokens computes the logits of the model's own forward pass, family by family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import family_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from llm2vec.data.blocks import Block
from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives import head
from llm2vec.objectives.head import Head, check_head
from llm2vec.objectives.language_modelling import LanguageModelling
from llm2vec.objectives.mntp import MaskedNextTokenPrediction, mask_tokens
from llm2vec.objectives.sentence_transformers import BidirectionalReconstructionLoss
from llm2vec.probes.reconstruction import score_targets, target_ids
from llm2vec.text.templates import add_template_tokens
from llm2vec.text.tokenization import Row
from llm2vec.training.config import Config
from llm2vec.training.model import load_model
from llm2vec.training.step import backward_step
from llm2vec.types import Batch, Objective, UserError

#: Families whose head does more than multiply, with a number that shows.
MORE: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"final_logit_softcapping": 3.0},
    "phi": {},
}
#: Families that multiply and do no more.
PLAIN = (
    "qwen2", "olmo2", "smollm3", "mistral", "ministral", "glm4", "helium", "phi3", "starcoder2", "hunyuan_v1_dense",
    "exaone4", "gemma3_text",
)  # fmt: skip
ROWS = reference.examples(3)
BLOCKS = [Block(list(range(20 + i, 32 + i)), 0, i) for i in range(3)]


class Double(TorchFunctionMode):
    """float64 where transformers' modules ask for float32: in norms, rotary positions and softmaxes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {name: torch.float64 if v is torch.float32 else v for name, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@pytest.fixture
def double() -> Iterator[None]:
    with Double():
        yield


def tiny(family: str, vocabulary: int = 300, **more: Any) -> Any:
    """A random causal language model whose layers, head and bias all matter."""
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = AutoConfig.for_model(family, **(fields | MORE.get(family, {}) | more))
    model = AutoModelForCausalLM.from_config(config)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model.eval()


def renderer_of(template: str, pooling_mode: Any = "last") -> Any:
    tokenizer = family_tokenizer("llama")
    add_template_tokens(tokenizer, "llara")  # one vocabulary for both templates
    return row_tokenizer(tokenizer, EncoderSettings(pooling_mode, 256, template=template, attention="causal"))


def mean_loss(logits: Sequence[Tensor], targets: Sequence[list[int]]) -> Tensor:
    return F.cross_entropy(torch.cat(list(logits)), torch.tensor([token for row in targets for token in row]))


def own_reconstruction(model: Any, sources: Sequence[Row], goals: Sequence[Row]) -> Tensor:
    logits = []
    for source, goal in zip(sources, goals, strict=True):
        anchor_1D = model.base_model(input_ids=torch.tensor([source.ids])).last_hidden_state[0, -1:]
        known_ND = model.get_input_embeddings()(torch.tensor(target_ids(goal)[:-1], dtype=torch.long))
        logits.append(model(inputs_embeds=torch.cat([anchor_1D, known_ND])[None]).logits[0])
    return mean_loss(logits, [target_ids(goal) for goal in goals])


def own_next_token(model: Any, rows: Sequence[Row], labels: Sequence[list[int]], is_causal: bool) -> Tensor:
    chosen = [[i for i in range(1, len(row.ids)) if row.target[i]] for row in rows]
    logits = [model(input_ids=torch.tensor([row.ids]), is_causal=is_causal).logits[0] for row in rows]
    before = [own[[i - 1 for i in places]] for own, places in zip(logits, chosen, strict=True)]
    return mean_loss(before, [[ids[i] for i in places] for ids, places in zip(labels, chosen, strict=True)])


def own_token_set(model: Any, sources: Sequence[Row], goals: Sequence[Row]) -> Tensor:
    terms = []
    for source, goal in zip(sources, goals, strict=True):
        score_V = model(input_ids=torch.tensor([source.ids])).logits[0, -8:].max(dim=0).values
        terms.append(-score_V.log_softmax(dim=0)[sorted(set(target_ids(goal)))].mean())
    return torch.stack(terms).mean()


def assert_equal(objective: Objective, batch: Batch, own: Tensor) -> None:
    """Value, and the gradient of every parameter, of the objective and of the loss by the model's own logits."""
    own.backward()
    expected = reference.gradients(objective.model)
    parts = backward_step(objective, batch, objective.count(batch))
    torch.testing.assert_close(parts["loss"], own.detach(), rtol=1e-9, atol=0)
    reference.assert_same_gradients(reference.gradients(objective.model), expected)


@pytest.mark.parametrize("family", [*MORE, *PLAIN])
def test_every_objective_has_the_models_own_logits(family: str, double: None) -> None:
    turns, sets = renderer_of("llama3"), renderer_of("llara", "mean")
    model = tiny(family, len(turns.tokenizer)).double()
    check_head(model)

    collate = CollateSides(turns, ("query", "positive"))
    queries, documents = (collate.rows(ROWS, side) for side in collate.sides)
    stage_one = BidirectionalReconstruction(model, EncoderSettings("last", attention="causal"))
    q2d, d2q = own_reconstruction(model, queries, documents), own_reconstruction(model, documents, queries)
    assert_equal(stage_one, collate(ROWS), 0.2 * q2d + 0.8 * d2q)

    texts = CollateSides(turns, ("text",))
    rows = texts.rows(ROWS, "text")
    assert_equal(LanguageModelling(model), texts(ROWS), own_next_token(model, rows, [r.ids for r in rows], True))

    mask = mask_tokens(turns.tokenizer, "eos", probability=0.5)
    own = own_next_token(model, mask.all_rows(BLOCKS), [list(block.ids) for block in BLOCKS], False)
    assert_equal(MaskedNextTokenPrediction(model), mask(BLOCKS), own)

    collate = CollateSides(sets, BidirectionalReconstruction.sides_of("llara", {"target": "both"}))
    first, third, second, fourth = (collate.rows(ROWS, side) for side in collate.sides)
    lm = own_next_token(model, [*first, *third], [row.ids for row in [*first, *third]], True)
    itself = own_token_set(model, [*first, *third], [*first, *third])
    following = own_token_set(model, [*second, *fourth], [*third, *first])
    settings = EncoderSettings("mean", template="llara", attention="causal")
    of_sets = BidirectionalReconstruction(
        model, settings, 0.5, "both", bottleneck="states", target_loss="bag", lm_weight=1.0
    )
    assert_equal(of_sets, collate(ROWS), lm + 0.05 * itself + 0.05 * following)

    with torch.no_grad():
        anchors = [model.base_model(input_ids=torch.tensor([row.ids])).last_hidden_state[0, -1] for row in queries]
        anchor_BD = torch.stack(anchors)
        found = score_targets(stage_one, anchor_BD, [target_ids(row) for row in documents]).terms.mean()
    torch.testing.assert_close(found, q2d.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", MORE)
def test_the_loss_for_sentence_transformers_has_them_too(family: str, double: None, tmp_path: Path) -> None:
    tokenizer = family_tokenizer("plain")  # it writes <s> before a text
    tokenizer.pad_token = "</s>"
    tiny(family, len(tokenizer)).double().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    sentences = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32, "lasttoken")], device="cpu")
    table = sentences.transformers_model.get_input_embeddings().weight
    lm_head: Any = None
    if not model.config.tie_word_embeddings:
        lm_head = nn.Linear(32, len(table), bias=family == "phi").double()
        lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    loss = BidirectionalReconstructionLoss(sentences, lm_head, alpha=0.2)
    texts = [row.query.text for row in ROWS], [row.positive.text for row in ROWS]
    parts = loss([sentences.preprocess(side) for side in texts], None)
    sum(parts.values()).backward()
    found = {f"model.{name}": p.grad for name, p in sentences.transformers_model.named_parameters()}
    if lm_head is not None:
        found |= {f"lm_head.{name}": p.grad for name, p in lm_head.named_parameters()}
    ids = [tokenizer(side)["input_ids"] for side in texts]
    queries, documents = ([Row(row, [], [False] + [True] * (len(row) - 1)) for row in side] for side in ids)
    q2d, d2q = own_reconstruction(model, queries, documents), own_reconstruction(model, documents, queries)
    torch.testing.assert_close(parts["q2d"], 0.2 * q2d, rtol=1e-9, atol=0)
    (0.2 * q2d + 0.8 * d2q).backward()
    reference.assert_same_gradients(found, reference.gradients(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MORE)
def test_the_proof_holds_and_sees_what_is_left_out(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family).to(dtype)
    check_head(model)
    assert not model.training
    monkeypatch.setattr(head, "head_of", lambda projection, config: Head(projection.weight))
    with pytest.raises(UserError, match="makes its logits in a way that is not known here"):
        check_head(model)


def test_a_family_with_other_logits_is_refused_where_tokens_are_predicted(tmp_path: Path) -> None:
    """HyperCLOVA X multiplies by what Granite divides by."""
    tokenizer = family_tokenizer("llama")
    tiny("hyperclovax", len(tokenizer), logits_scaling=4.0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = Config(str(tmp_path), template="llama3")
    load_model(config, torch.device("cpu"), with_lm_head=False)
    with pytest.raises(UserError, match=r"HyperCLOVAX.* makes its logits .* Stage II, which predicts none, can"):
        load_model(config, torch.device("cpu"), with_lm_head=True)
    sentences = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32, "lasttoken")], device="cpu")
    with pytest.raises(UserError, match="HyperCLOVAXForCausalLM makes its logits"):
        BidirectionalReconstructionLoss(sentences, nn.Linear(32, len(tokenizer), bias=False))
