"""The keys of Stage I, by hand: whose text, what of a text, how it is told, by whose weights, and what is trained."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import family_tokenizer, tiny_model, write_jsonl
from torch import Tensor, nn

from llm2vec import LLM2Vec
from llm2vec.__main__ import main
from llm2vec.choice import ModelChoice
from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import LORA_MODULES, attach_lora
from llm2vec.model.packing import adapter_off, checkpoint_contexts
from llm2vec.model.settings import EncoderSettings, row_tokenizer
from llm2vec.objectives.losses import linear_cross_entropy
from llm2vec.objectives.negatives import RowFacts, hash_of
from llm2vec.probes.reconstruction import embed_rows, load_reconstructor, target_ids, text_of_side
from llm2vec.text import batches
from llm2vec.text.batches import cut_row, pack_rows
from llm2vec.text.templates import add_template_tokens
from llm2vec.text.tokenization import Row
from llm2vec.training.config.file import load_config
from llm2vec.training.log import LOG_FILE
from llm2vec.training.recomputation import enable_checkpointing
from llm2vec.training.step import backward_step, split_batch
from llm2vec.types import Example, InstructedText, UserError

ROWS = reference.examples(6)


@pytest.fixture(autouse=True)
def short_texts_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows here are a few words long."""
    monkeypatch.setattr(batches, "LEAST_PART", 2)


TEACHER_WIDTH = 5


def teacher_of(texts: Sequence[InstructedText]) -> Tensor:
    """Some vector of each text."""
    seeds = [hash_of(text) for text in texts]
    return torch.stack([torch.randn(TEACHER_WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class Made:
    """An objective in float64, the base that it began with, and what makes its batches."""

    def __init__(
        self,
        template: str = "memory_3",
        *,
        trainable: str = "full",
        attention: Any = "causal",
        pooling_mode: Any = "mean",
        model: dict[str, Any] | None = None,
        recomputes: bool = False,
        **keys: Any,
    ) -> None:
        torch.manual_seed(0)  # of the map that imitates
        tokenizer = family_tokenizer("llama")
        new = add_template_tokens(tokenizer, template)
        base: Any = tiny_model("llama", True, tokenizer=tokenizer, initializer_range=0.2, **(model or {}))
        self.base = reference.exact(copy.deepcopy(base)).requires_grad_(False)
        if trainable != "full":
            base.requires_grad_(False)
            modules = LORA_MODULES if trainable == "lora" else ()
            base.model = attach_lora(base.model, r=2, alpha=4, dropout=0.0, modules=modules, new_tokens=new)
            with torch.no_grad():
                for name, parameter in base.named_parameters():
                    if "lora_B" in name or "tokens_delta" in name:
                        nn.init.normal_(parameter, std=0.3)
        if recomputes:
            contexts = partial(checkpoint_contexts, base.base_model)
            enable_checkpointing(base, {"use_reentrant": False, "context_fn": contexts})
        self.settings = EncoderSettings(pooling_mode, 256, template=template, attention=attention)
        self.renderer = row_tokenizer(tokenizer, self.settings)
        checked = {"target": keys.get("target", "counterpart"), "bottleneck": keys.get("bottleneck", "vector")}
        BidirectionalReconstruction.check_rendering(self.renderer, checked)
        facts = RowFacts(teacher=teacher_of) if keys.get("imitation_weight") else None
        sides = BidirectionalReconstruction.sides_of(template, checked)
        self.collate = CollateSides(self.renderer, sides, seed=3, facts=facts)
        self.bos_id = tokenizer.bos_token_id
        of_itself = keys.get("decoder") == "frozen"
        self.has_bos = of_itself if keys.get("decoder_bos") is None else bool(keys["decoder_bos"])
        self.objective = BidirectionalReconstruction(
            reference.exact(base), self.settings, bos_id=self.bos_id, teacher_width=TEACHER_WIDTH, **keys
        )
        self.objective.train().double()

    def reference(self, rows: list[Example]) -> dict[str, Tensor]:
        """The loss and its parts, one row, one token and one word of the vocabulary at a time."""
        objective = self.objective
        sides = {side: self.collate.rows(rows, side) for side in self.collate.sides}
        parts: dict[str, Tensor] = {}
        loss = torch.zeros((), dtype=torch.float64)
        for direction, weight in objective.weighted.items():
            pairs = list(zip(sides[direction.source], sides[direction.goal], strict=True))
            terms = [term for source, goal in pairs for term in self._terms(source, goal)]
            parts[f"loss_{direction.name}"] = sum(terms[1:], terms[0]) / len(terms)
            scale = 0.05 if objective.target_loss == "bag" else 1.0
            loss = loss + scale * weight * parts[f"loss_{direction.name}"]
        if objective.lm_weight:
            read = {d.source.partition(":")[0]: d.source for d in reversed(objective.weighted)}
            modelled = [row for side in read.values() for row in sides[side]]
            parts["loss_lm"] = reference.language_modelling(objective.model, modelled)
            loss = loss + objective.lm_weight * parts["loss_lm"]
        if objective.imitation_weight:
            parts["loss_imitation"] = self._imitation(rows, sides)
            loss = loss + objective.imitation_weight * parts["loss_imitation"]
        return {"loss": loss, **parts}

    def _imitation(self, rows: list[Example], sides: dict[str, list[Row]]) -> Tensor:
        """Row by row and number by number: W mean(projected states) + b against the teacher's vector of the goal."""
        objective = self.objective
        total = torch.zeros((), dtype=torch.float64)
        for direction, weight in objective.weighted.items():
            for number, source in enumerate(sides[direction.source]):
                hidden = reference.states(objective.decoder, self.settings.attention, ids=source.ids)
                memory = [hidden[i] for i in range(len(source.ids)) if source.pooled[i]]
                if objective.bottleneck == "vector":
                    memory = [sum(memory[1:], memory[0]) / len(memory)]
                told = [objective.projection(state.unsqueeze(0))[0] for state in memory]
                mean = sum(told[1:], told[0]) / len(told)
                taught = teacher_of([getattr(rows[number], direction.goal.partition(":")[0])])[0].double()
                for w in range(TEACHER_WIDTH):
                    own = objective.imitation.weight[w] @ mean + objective.imitation.bias[w]
                    total = total + weight * (own - taught[w]) ** 2 / TEACHER_WIDTH / len(rows)
        return total

    def _terms(self, source: Row, goal: Row) -> list[Tensor]:
        objective = self.objective
        tokens = [token for token, wanted in zip(goal.ids, goal.target, strict=True) if wanted]
        if not tokens:
            return []
        hidden = reference.states(objective.decoder, self.settings.attention, ids=source.ids)
        memory = [hidden[i] for i in range(len(source.ids)) if source.pooled[i]]
        if objective.bottleneck == "vector":
            memory = [memory[-1] if self.settings.pooling_mode == "last" else sum(memory[1:], memory[0]) / len(memory)]
        if objective.target_loss == "bag":
            return [reference.block_loss(objective.model, torch.stack(memory), set(tokens))]
        whose = self.base if objective.frozen else objective.model
        table, head = whose.get_input_embeddings(), whose.get_output_embeddings().weight
        memory = [objective.projection(state.unsqueeze(0))[0] for state in memory]
        if self.has_bos:
            memory = [table(torch.tensor(self.bos_id)), *memory]
        end = max((i + 1 for i, wanted in enumerate(source.target) if wanted), default=len(source.ids))
        terms = []
        for position in range(len(tokens) + (objective.target_loss == "kl")):
            inputs = torch.stack([*memory, *(table(torch.tensor(token)) for token in tokens[:position])])
            logits = head @ reference.states(whose.base_model, "causal", embeddings=inputs)[-1]
            log_share = logits - torch.logsumexp(logits, dim=0)
            if objective.target_loss == "ce":
                terms.append(-log_share[tokens[position]])
                continue
            with torch.no_grad():
                taught = (
                    head @ reference.states(whose.base_model, "causal", ids=source.ids[:end] + tokens[:position])[-1]
                )
                expected = taught - torch.logsumexp(taught, dim=0)
            whole = [expected[v].exp() * (expected[v] - log_share[v]) for v in range(len(head))]
            terms.append(torch.stack(whole).sum())
        return terms


STATES = {"bottleneck": "states"}
FROZEN = {"decoder": "frozen"}
KL = {**STATES, **FROZEN, "target": "next", "target_loss": "kl"}
CASES: dict[str, dict[str, Any]] = {
    "states": STATES,
    "states behind a chat turn, bidirectional": {
        **STATES, "template": "llama3+memory_2", "attention": "bidirectional", "alpha": 0.5,
    },
    "states, projected": {**STATES, "projection": "scaled"},
    "a vector behind a BOS": {"template": "llama3", "pooling_mode": "last", "decoder_bos": True},
    "states behind a BOS, tied": {**STATES, "decoder_bos": True, "model": {"tie_word_embeddings": True}},
    "frozen, without a BOS": {**STATES, **FROZEN, "decoder_bos": False},
    "next": {"target": "next", "alpha": 0.5},
    "next, states of documents": {**STATES, "target": "next", "alpha": 0.0},
    "both": {**STATES, "target": "both", "alpha": 0.3},
    "frozen copy": {**STATES, **FROZEN, "target": "self"},
    "frozen copy, tied": {**FROZEN, "model": {"tie_word_embeddings": True}},
    "frozen below an adapter": {**STATES, **FROZEN, "trainable": "lora"},
    "shared with an adapter": {**STATES, "trainable": "lora", "target": "self"},
    "kl": {**KL, "alpha": 0.5},
    "kl below an adapter": {**KL, "trainable": "lora", "attention": "bidirectional"},
    "kl below an adapter, recomputed": {**KL, "trainable": "lora", "recomputes": True},
    "kl of the counterpart, one vector": {**FROZEN, "target_loss": "kl", "template": "llama3", "pooling_mode": "last"},
    "tokens": {**KL, "trainable": "tokens", "target_loss": "ce", "projection": "linear"},
    "gen": {
        **STATES, **FROZEN, "trainable": "tokens", "projection": "linear", "alpha": 1.0, "imitation_weight": 0.7,
    },
    "imitation of one vector": {"imitation_weight": 1.5},
    "bag of itself, and imitation": {
        **STATES, "target": "self", "target_loss": "bag", "alpha": 0.5, "imitation_weight": 1.0,
    },
    "bag of itself": {**STATES, "target": "self", "target_loss": "bag", "alpha": 0.5},
    "bag of one vector": {"target": "counterpart", "target_loss": "bag"},
    "llara": {
        **STATES, "template": "llara", "target": "both", "target_loss": "bag", "alpha": 0.5, "lm_weight": 1.0,
    },
    "language modelling beside": {"template": "llama3", "pooling_mode": "last", "lm_weight": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_loss_parts_and_every_gradient_equal_one_token_at_a_time(keys: dict[str, Any]) -> None:
    """In one pass, in a few micro-batches, and row by row."""
    made = Made(**keys)
    expected = made.reference(ROWS)
    expected["loss"].backward()
    gradients = reference.gradients(made.objective)
    batch = made.collate(ROWS)
    totals = made.objective.count(batch)
    half = sum(sum(side["lengths"]) for side in batch.values()) * 2 // 3
    for max_tokens in (None, half, 1):
        parts = backward_step(made.objective, batch, totals, max_tokens=max_tokens)
        assert parts.keys() == {*expected, "anchor_norm", "embedding_norm"}
        for name, value in expected.items():
            torch.testing.assert_close(parts[name], value.detach(), rtol=1e-9, atol=1e-13)
        reference.assert_same_gradients(reference.gradients(made.objective), gradients, 1e-8)
    assert 1 < len(split_batch(batch, half)) < len(ROWS) == len(split_batch(batch, 1))


def test_a_bos_must_be_a_token_of_the_tokenizer() -> None:
    made = Made("llama3", pooling_mode="last", decoder_bos=True)
    made.renderer.tokenizer.bos_token = None
    keys = {"bottleneck": "vector", "target": "counterpart", "decoder_bos": True}
    with pytest.raises(UserError, match="decoder_bos is true, but the tokenizer has no BOS token"):
        BidirectionalReconstruction.check_rendering(made.renderer, keys)


# --- bottleneck ---


def test_one_state_is_a_vector_to_the_last_digit() -> None:
    """Loss parts and every gradient."""
    found = []
    for bottleneck in ("vector", "states"):
        made = Made("memory_1", bottleneck=bottleneck)
        batch = made.collate(ROWS)
        parts = backward_step(made.objective, batch, made.objective.count(batch))
        found.append((parts, reference.gradients(made.objective)))
    for vector, states in zip(*found, strict=True):
        assert all(torch.equal(states[name], value) for name, value in vector.items())


@pytest.mark.parametrize("template", ["llama3", "plain", "echo"])
def test_states_need_a_block_of_one_length(template: str) -> None:
    with pytest.raises(
        UserError, match=rf"template '{template}' pools as many tokens as a text has; .*{template}\+mem"
    ):
        Made(template, **STATES)


# --- target: next ---


def test_a_cut_row_is_the_whole_row() -> None:
    """Its tokens before the cut, the template's behind, and the rest; at least so many on each side."""
    made = Made("llama3+memory_2", target="next")
    rows = made.renderer.rows([row.positive for row in ROWS])
    places = set()
    for row in rows:
        tokens = [token for token, wanted in zip(row.ids, row.target, strict=True) if wanted]
        for draw in range(40):
            prefix, rest = cut_row(row, (draw,))
            if len(tokens) < 4:
                assert prefix == row and not any(rest.target)
                continue
            kept = [token for token, wanted in zip(prefix.ids, prefix.target, strict=True) if wanted]
            assert kept + rest.ids == tokens and all(rest.target) and len(kept) >= 2 <= len(rest.ids)
            end = prefix.target.index(True) + len(kept)
            whole = Row(
                prefix.ids[:end] + rest.ids + prefix.ids[end:],
                prefix.pooled[:end] + [False] * len(rest.ids) + prefix.pooled[end:],
                prefix.target[:end] + rest.target + prefix.target[end:],
            )
            assert whole == row
            places.add((len(tokens), len(kept)))
    most = max(tokens for tokens, _ in places)
    assert {kept for tokens, kept in places if tokens == most} == set(range(2, most - 1))


def test_another_epoch_cuts_elsewhere_and_changes_no_other_row() -> None:
    made = Made(target="next")
    first = made.collate.rows(ROWS, "positive:prefix")
    again = [row._replace(draw=7) if i == 1 else row for i, row in enumerate(ROWS)]
    changed = [one != other for one, other in zip(first, made.collate.rows(again, "positive:prefix"), strict=True)]
    assert changed[0:1] + changed[2:] == [False] * (len(ROWS) - 1)
    draws = {tuple(made.collate.rows([ROWS[1]._replace(draw=d)], "positive:prefix")[0].ids) for d in range(30)}
    assert len(draws) > 1


@pytest.mark.parametrize("template", ["echo", "llara"])
def test_next_is_refused_where_a_text_stands_twice(template: str) -> None:
    with pytest.raises(UserError, match=f"target is 'next', which template '{template}' does not serve"):
        Made(template, target="next")


# --- target_loss: kl ---


def test_divergence_from_one_token_is_cross_entropy() -> None:
    """In its value and its gradient; the teacher gets none."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (5, 8))
    target = torch.tensor([3, 0, 7, 3, 1])
    term_weight = torch.rand(5, generator=generator, dtype=torch.float64)
    teacher = torch.linalg.solve(weight, 1e4 * torch.eye(8, dtype=torch.float64)[target].T).T.requires_grad_()
    found = []
    for goal, taught in ((target, None), (None, teacher)):
        states = hidden.clone().requires_grad_()
        loss = linear_cross_entropy(states, weight, goal, term_weight, 64, teacher_ND=taught).loss
        loss.backward()
        found.append((loss.detach(), states.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert teacher.grad is None


@pytest.mark.parametrize("block_rows", [1, 3, None])
@pytest.mark.parametrize("bent", [False, True])
def test_divergence_is_summed_over_the_whole_vocabulary(block_rows: int | None, bent: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, teacher, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (7, 7, 40))
    bias = torch.randn(40, generator=generator, dtype=torch.float64) if bent else None
    options: dict[str, Any] = {"bias_V": bias, "softcap": 2.0} if bent else {}
    term_weight = torch.rand(7, generator=generator, dtype=torch.float64)
    states, matrix = (tensor.clone().requires_grad_() for tensor in (hidden, weight))

    def log_shares(of: Tensor, by: Tensor) -> Tensor:
        logits = of @ by.T if bias is None else 2 * torch.tanh((of @ by.T + bias) / 2)
        return logits.log_softmax(dim=1)

    taught = log_shares(teacher, weight)
    expected = ((taught.exp() * (taught - log_shares(states, matrix))).sum(dim=1) * term_weight).sum()
    by_hand = torch.autograd.grad(expected, (states, matrix))
    found = linear_cross_entropy(states, matrix, None, term_weight, block_rows, teacher_ND=teacher, **options)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(found.loss, (states, matrix)), by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    assert torch.equal(found.hits, log_shares(hidden, weight).argmax(dim=1) == taught.argmax(dim=1))


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_divergence_is_nothing_where_the_memory_is_the_text(trainable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix's own embeddings in the memory's place: the student reads what the teacher reads."""
    made = Made(**KL, trainable=trainable, alpha=0.0)
    objective, words = made.objective, [40, 41, 42]
    source = Row([made.bos_id, *words, 1, 2], [False] * 4 + [True] * 2, [False, True, True, True, False, False])
    rest = Row([43, 44, 45, 46], [True] * 4, [True] * 4)
    batch = {
        "positive:prefix": pack_rows([source] * 2),
        "positive:rest": pack_rows([rest, rest._replace(ids=[47] * 4)]),
    }
    batch |= {"query:prefix": batch["positive:prefix"], "query:rest": batch["positive:rest"]}
    memory = made.base.get_input_embeddings()(torch.tensor([words] * 2)).detach().requires_grad_()
    other = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = []
    for told in (memory, other):
        monkeypatch.setattr(objective, "_encode", lambda *_, told=told: ({"positive:prefix": told}, None))
        parts = objective(batch, objective.count(batch)).parts
        parts["loss"].backward()
        losses.append(parts["loss_d2r"])
    assert abs(losses[0]) < 1e-12 < 0.01 < losses[1]
    assert memory.grad.abs().max() < 1e-12 < 1e-4 < other.grad.abs().max()


def test_the_teacher_and_the_frozen_weights_get_no_gradient() -> None:
    made = Made(**KL)
    batch = made.collate(ROWS)
    made.objective(batch, made.objective.count(batch)).parts["loss"].backward()
    (frozen,) = made.objective.copies
    assert all(weight.grad is None for weight in frozen.parameters())
    assert made.objective.model.get_output_embeddings().weight.grad is None  # nobody reads it


# --- decoder: frozen ---


def test_with_its_adapter_off_a_model_is_its_base() -> None:
    """To the last digit, and after it the adapter is on and trained as before."""
    made = Made(**KL, trainable="lora")
    decoder = made.objective.decoder
    trained = [name for name, weight in decoder.named_parameters() if weight.requires_grad]
    run: Callable[[Any], Tensor] = partial(reference.states, attention="causal", ids=[5, 6, 7])
    with torch.no_grad():
        before = run(decoder)
        with adapter_off(decoder):
            assert torch.equal(run(decoder), run(made.base.base_model))
        assert torch.equal(run(decoder), before) and not torch.equal(before, run(made.base.base_model))
    assert trained == [name for name, weight in decoder.named_parameters() if weight.requires_grad]


# --- as a stage ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and rows with texts that can be cut."""
    folder = tmp_path_factory.mktemp("pretexts")
    tiny_model("llama", True, initializer_range=0.2).save_pretrained(folder / "base")
    family_tokenizer("llama").save_pretrained(folder / "base")
    rows = [{"query": r.query.text, "positive": f"{r.positive.text} {r.query.text}"} for r in reference.examples(16)]
    write_jsonl(folder / "data/nq.jsonl", rows)
    return folder


def config_of(folder: Path, name: str, **keys: Any) -> Path:
    config = {
        "model_name_or_path": str(folder / "base"), "output_dir": str(folder / name), "sources": ["nq"],
        "dataset_file_path": str(folder / "data"), "max_seq_length": 192, "max_steps": 6, "pooling_mode": "mean",
        "per_device_train_batch_size": 16, "learning_rate": 5e-3, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "template": "memory_3", **keys,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / f"{name}.json"


STAGES: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": ({**KL, "trainable": "tokens", "projection": "linear"}, "loss_d2r"),
    "lora": ({**KL, "trainable": "lora"}, "loss_d2r"),
    "llara": (
        {**STATES, "template": "llara", "target": "both", "target_loss": "bag", "alpha": 0.5, "lm_weight": 1},
        "loss_d2q",
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage(name: str, folder: Path) -> None:
    """The loss falls, the folder embeds, and the next stage goes on from it; under `tokens` nothing else moves."""
    keys, figure = STAGES[name]
    main(["stage-1", str(config_of(folder, name, **keys))])
    log = [json.loads(line) for line in (folder / name / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    losses = [entry[figure] for entry in log if figure in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    model = LLM2Vec.from_pretrained(str(folder / name), merge_peft=True)
    assert model.encode(["hello"], show_progress_bar=False, device="cpu").isfinite().all()
    if name == "tokens":
        base = tiny_model("llama", True, initializer_range=0.2).state_dict()
        own = {key.removeprefix("model."): value for key, value in base.items()}
        ids = model.tokenizer.convert_tokens_to_ids([f"<memory_{i}>" for i in (1, 2, 3)])
        for key, value in model.model.state_dict().items():
            size = len(own[key]) if "embed" in key else None
            assert torch.equal(value[:size], own[key]), key
        assert (folder / name / "objective.safetensors").is_file() and min(ids) >= len(own["embed_tokens.weight"])
    if keys.get("decoder") == "frozen":
        assert_decoded_by_the_base(folder / name)
    beyond = {"model_name_or_path": str(folder / name), "max_steps": 1, "num_hard_negatives": 0, "loss_scale": 20}
    main(["stage-2", str(config_of(folder, f"{name}_2", template=keys.get("template", "memory_3"), **beyond))])


def assert_decoded_by_the_base(checkpoint: Path) -> None:
    """`reconstruct` scores and writes as what the run began with does, from the memory that the run learnt."""
    found, base = (
        load_reconstructor(ModelChoice(str(checkpoint), torch_dtype="float32")),
        tiny_model("llama", True, initializer_range=0.2),
    )
    text, goal = text_of_side("document", "hello world, red"), text_of_side("document", "who wrote it")
    source, target = found.tokenizer.rows([text, goal])
    table, ids = base.get_input_embeddings(), target_ids(target)
    with torch.no_grad():
        (memory_KD,) = embed_rows(found.objective, [source])
        bos = table(torch.tensor([found.tokenizer.tokenizer.bos_token_id]))
        inputs = torch.cat([bos, found.objective.projection(memory_KD), table(torch.tensor(ids[:-1]))])
        log_share = base(inputs_embeds=inputs[None]).logits[0].log_softmax(dim=1)[len(memory_KD) :]
    expected = [-log_share[i, token].item() for i, token in enumerate(ids)]
    assert [token.loss for token in found.score(text, goal)] == pytest.approx(expected, rel=1e-4)
    likeliest = found.tokenizer.tokenizer.decode([int(log_share[0].argmax())], skip_special_tokens=True)
    assert found.generate([text], 1) == [[likeliest.strip()]]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"target_loss": "kl", "target": "next"}, "decoder is 'shared', so the teacher would move"),
        ({"target_loss": "kl", "decoder": "frozen", "target": "self"}, "where its teacher copies"),
        ({"target_loss": "kl", "decoder": "frozen", "target": "both"}, "where its teacher copies"),
        ({"target_loss": "bag", "decoder": "frozen"}, "decoder has no effect under target_loss 'bag'"),
        ({"target_loss": "bag", "decoder_bos": False}, "decoder_bos has no effect under target_loss 'bag'"),
        ({"target_loss": "bag", "projection": "linear"}, "projection has no effect under target_loss 'bag'"),
        ({"trainable": "tokens"}, "trainable is 'tokens', but decoder is 'shared'"),
        ({"trainable": "tokens", "decoder": "frozen", "template": "llama3"}, "template 'llama3' adds none"),
        ({"target": "next", "reconstruct_instruction": True}, "has no effect under target 'next', which cuts"),
        ({"lm_weight": 1, "bidirectional": True}, "a token sees itself"),
        ({"imitation_weight": 1}, "imitation_weight and teacher_vectors go together"),
        ({"teacher_vectors": "v"}, "imitation_weight and teacher_vectors go together"),
        ({"imitation_weight": 1, "teacher_vectors": "v", "target": "next"}, "target 'next' cuts them anew"),
        ({"imitation_weight": 1, "teacher_vectors": "v", "fsdp": True}, "imitation_weight learns a map, which fsdp"),
        ({"use_peft": True}, "stage_I says what it trains by `trainable`"),
        ({"trainable": "lora", "use_peft": False}, "stage_I says what it trains by `trainable`"),
        ({"decoder": "frozen", "fsdp": True}, "decoder is 'frozen', of which every process would hold all"),
        ({"objective": "token_set"}, "objective 'token_set' is now made of keys"),
        ({"objective": "sets"}, "objective is 'sets'; allowed: 'reconstruction'"),
        ({"target": "other"}, "allowed: 'counterpart', 'self', 'both', 'next'"),
        ({"template": "memory_0"}, "template is 'memory_0'; allowed: llama3"),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(folder: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(config_of(folder, "refused", **keys), "stage_I")
    assert words in str(error.value)
