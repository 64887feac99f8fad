"""Slow, obvious versions of the losses, straight from the paper: one row, one token, one pair at a time.

Nothing is padded, batched or shared with the package but the tokenised rows. What a position may see is written
out as a mask of its own, so the package's attention flags are proved too. Meant for models made `exact`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from helpers import WORDS
from torch import Tensor, nn

from llm2vec.text.tokenization import Row
from llm2vec.types import Attention, Example, InstructedText, PoolingMode


def examples(num_rows: int, num_negatives: int = 0, seed: int = 0) -> list[Example]:
    """Ragged rows: texts of one to nine words, some without an instruction, some with one on the documents too."""
    generator = random.Random(seed)

    def text(most_words: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, most_words)))

    rows = []
    for i in range(num_rows):
        query_instruction = "" if i % 4 == 1 else "find the answer"
        document_instruction = "find it" if i % 4 == 2 else ""
        rows.append(
            Example(
                "words",
                InstructedText(query_instruction, text(5)),
                InstructedText(document_instruction, text(9)),
                tuple(InstructedText(document_instruction, text(7)) for _ in range(num_negatives)),
            )
        )
    return rows


def under_one_instruction(rows: Sequence[Example]) -> list[Example]:
    """The same rows with one instruction on all queries and another on all documents: long shared prefixes."""

    def ask(text: InstructedText, instruction: str) -> InstructedText:
        return text._replace(instruction=instruction)

    return [
        Example(
            row.source,
            ask(row.query, "find the answer"),
            ask(row.positive, "who wrote it"),
            tuple(ask(text, "who wrote it") for text in row.negatives),
        )
        for row in rows
    ]


def exact(model: nn.Module) -> nn.Module:
    """`model` in float64 throughout: norms and rotary positions of transformers' decoders compute in float32."""

    def norm(module: Any, gain_over_one: bool, states: Tensor) -> Tensor:
        epsilon = module.eps if gain_over_one else module.variance_epsilon
        gain = module.weight + 1 if gain_over_one else module.weight
        return states * torch.rsqrt((states * states).mean(dim=-1, keepdim=True) + epsilon) * gain

    def rotary(module: Any, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids.double().unsqueeze(-1) * module.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling

    for module in model.double().modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = partial(norm, module, name.startswith("Gemma"))
        elif name.endswith("RotaryEmbedding"):
            module.forward = partial(rotary, module)
    return model


class StageOne(NamedTuple):
    """Algorithm 1 over one optimiser step."""

    loss: Tensor
    q2d: Tensor
    d2q: Tensor


def states(decoder: Any, attention: Attention, *, ids: Sequence[int] = (), embeddings: Tensor | None = None) -> Tensor:
    """Final states [T, D] of one unpadded row, given as token ids or as embeddings [T, D]."""
    weight = decoder.get_input_embeddings().weight
    length = len(ids) if embeddings is None else len(embeddings)
    visible = torch.ones(length, length, dtype=torch.bool)
    if attention == "causal":
        for row in range(length):
            for column in range(row + 1, length):
                visible[row, column] = False
    forbidden = torch.finfo(weight.dtype).min
    mask = torch.zeros(length, length, dtype=weight.dtype).masked_fill(~visible, forbidden)
    inputs = {"input_ids": torch.tensor([ids])} if embeddings is None else {"inputs_embeds": embeddings[None]}
    return decoder(**inputs, attention_mask=mask[None, None], use_cache=False).last_hidden_state[0]


def embedding(decoder: Any, row: Row, attention: Attention = "causal", pooling_mode: PoolingMode = "last") -> Tensor:
    """Vector [D] of one row: its last pooled state, or the mean of all of them."""
    hidden = states(decoder, attention, ids=row.ids)
    pooled = [hidden[i] for i in range(len(row.ids)) if row.pooled[i]]
    if pooling_mode == "last":
        return pooled[-1]
    assert pooling_mode == "mean"
    return sum(pooled[1:], pooled[0]) / len(pooled)


def reconstruction_terms(
    model: Any,
    source: Row,
    goal: Row,
    attention: Attention = "causal",
    pooling_mode: PoolingMode = "last",
    project: Callable[[Tensor], Tensor] = lambda anchor_D: anchor_D,
) -> list[Tensor]:
    """-log p of each target token of `goal`, each from the anchor of `source` and the target tokens before it."""
    decoder = model.base_model
    anchor = project(embedding(decoder, source, attention, pooling_mode))
    tokens = [token for token, wanted in zip(goal.ids, goal.target, strict=True) if wanted]
    terms = []
    for position, token in enumerate(tokens):
        known = [decoder.get_input_embeddings()(torch.tensor(earlier)) for earlier in tokens[:position]]
        last_state = states(decoder, "causal", embeddings=torch.stack([anchor, *known]))[-1]
        logits = model.get_output_embeddings().weight @ last_state
        terms.append(torch.logsumexp(logits, dim=0) - logits[token])
    return terms


def stage_one(
    model: Any,
    step: Sequence[tuple[Row, Row]],
    alpha: float,
    attention: Attention = "causal",
    pooling_mode: PoolingMode = "last",
    project: Callable[[Tensor], Tensor] = lambda anchor_D: anchor_D,
) -> StageOne:
    """The loss of a step of (query, positive) rows: a mean over tokens in each direction, mixed by alpha."""
    q2d_terms: list[Tensor] = []
    d2q_terms: list[Tensor] = []
    for query, positive in step:
        q2d_terms += reconstruction_terms(model, query, positive, attention, pooling_mode, project)
        d2q_terms += reconstruction_terms(model, positive, query, attention, pooling_mode, project)
    q2d = sum(q2d_terms[1:], q2d_terms[0]) / len(q2d_terms)
    d2q = sum(d2q_terms[1:], d2q_terms[0]) / len(d2q_terms)
    return StageOne(alpha * q2d + (1 - alpha) * d2q, q2d, d2q)


def language_modelling(model: Any, rows: Sequence[Row]) -> Tensor:
    """Mean over the target tokens of all rows, but for a row's first, of -log p given the tokens before it."""
    terms: list[Tensor] = []
    for row in rows:
        for position in range(1, len(row.ids)):
            if row.target[position]:
                last_state = states(model.base_model, "causal", ids=row.ids[:position])[-1]
                logits = model.get_output_embeddings().weight @ last_state
                terms.append(torch.logsumexp(logits, dim=0) - logits[row.ids[position]])
    return sum(terms[1:], terms[0]) / len(terms)


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of two vectors."""
    return (left * right).sum() / ((left * left).sum().sqrt() * (right * right).sum().sqrt())


def info_nce(
    queries: Sequence[Tensor], positives: Sequence[Tensor], negatives: Sequence[Tensor], loss_scale: float
) -> Tensor:
    """Mean over queries of -log of the own positive's share among all positives and all negatives (Eq. 6)."""
    losses = []
    for i, query in enumerate(queries):
        weights = [torch.exp(loss_scale * cosine(query, document)) for document in [*positives, *negatives]]
        losses.append(-torch.log(weights[i] / sum(weights[1:], weights[0])))
    return sum(losses[1:], losses[0]) / len(losses)


def stage_two(
    decoder: Any,
    step: Sequence[tuple[Row, Row, Sequence[Row]]],
    loss_scale: float,
    attention: Attention = "causal",
    pooling_mode: PoolingMode = "last",
) -> Tensor:
    """InfoNCE of a step of (query, positive, negatives) rows that all see one another."""
    queries = [embedding(decoder, query, attention, pooling_mode) for query, _, _ in step]
    positives = [embedding(decoder, positive, attention, pooling_mode) for _, positive, _ in step]
    negatives = [embedding(decoder, row, attention, pooling_mode) for _, _, rows in step for row in rows]
    return info_nce(queries, positives, negatives, loss_scale)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Give every parameter random values, so that none of them is without effect."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every trainable parameter's gradient, by name; clears them. None of them may be missing."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad.clone()
            parameter.grad = None
    return found


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-9) -> None:
    """Each parameter's gradient differs by at most `relative` times its largest entry, which must not be zero."""
    assert actual.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        largest = gradient.abs().max()
        assert largest > 0, f"the gradient of {name} is zero, so equality would prove nothing"
        difference = (actual[name] - gradient).abs().max()
        assert difference <= relative * largest, f"{name}: {difference / largest:.1e} apart"


def self_reconstruction(
    model: Any,
    queries: Sequence[Row],
    documents: Sequence[Row],
    alpha: float,
    attention: Attention = "causal",
    pooling_mode: PoolingMode = "last",
) -> StageOne:
    """Every text rebuilt from its own anchor: a mean over the queries' tokens and one over the documents'."""
    means = []
    for rows in (queries, documents):
        terms = [t for row in rows for t in reconstruction_terms(model, row, row, attention, pooling_mode)]
        means.append(sum(terms[1:], terms[0]) / len(terms))
    return StageOne(alpha * means[0] + (1 - alpha) * means[1], *means)


def masked_next_token(model: Any, masked: Sequence[Row], originals: Sequence[Sequence[int]]) -> Tensor:
    """Mean over the chosen tokens of all rows of -log p of the token that stood there, from the state before it."""
    terms: list[Tensor] = []
    for row, ids in zip(masked, originals, strict=True):
        hidden = states(model.base_model, "bidirectional", ids=row.ids)
        for position, chosen in enumerate(row.target):
            if chosen:
                logits = model.get_output_embeddings().weight @ hidden[position - 1]
                terms.append(torch.logsumexp(logits, dim=0) - logits[ids[position]])
    return sum(terms[1:], terms[0]) / len(terms)


class TokenSets(NamedTuple):
    """The parts of a token-set step, each a mean."""

    lm: Tensor
    itself: Tensor
    following: Tensor


def block_loss(model: Any, block: Tensor, tokens: set[int]) -> Tensor:
    """-log of the share that each token of a set has in the softmax of its best score in the block, averaged."""
    head = model.get_output_embeddings().weight
    scores = torch.stack([torch.stack([head[v] @ state for state in block]).max() for v in range(len(head))])
    terms = [torch.logsumexp(scores, dim=0) - scores[token] for token in sorted(tokens)]
    return sum(terms[1:], terms[0]) / len(terms)


def token_sets(model: Any, pairs: Sequence[tuple[Row, Row, Row, Row]]) -> TokenSets:
    """A step of rows (query and block 1, query and block 2, document and block 1, document and block 2)."""

    def block(row: Row) -> Tensor:
        hidden = states(model.base_model, "causal", ids=row.ids)
        return torch.stack([hidden[i] for i in range(len(row.ids)) if row.pooled[i]])

    def tokens(row: Row) -> set[int]:
        return {token for token, wanted in zip(row.ids, row.target, strict=True) if wanted}

    itself, following = [], []
    for query_1, query_2, document_1, document_2 in pairs:
        itself += [block_loss(model, block(query_1), tokens(query_1))]
        itself += [block_loss(model, block(document_1), tokens(document_1))]
        following += [block_loss(model, block(query_2), tokens(document_2))]
        following += [block_loss(model, block(document_2), tokens(query_2))]
    lm = language_modelling(model, [row for pair in pairs for row in (pair[0], pair[2])])
    return TokenSets(lm, sum(itself[1:], itself[0]) / len(itself), sum(following[1:], following[0]) / len(following))
