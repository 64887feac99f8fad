"""Masked next-token prediction, by which a decoder learns to use bidirectional attention (LLM2Vec's first stage).

Source: BehnamGhader et al. 2024, arXiv 2404.05961, section 2.2. Attention is bidirectional, and a masked token is
predicted from the state before it, which is where the head has learnt to read it:

    loss = mean over the masked positions i of a step of -log softmax(head(state[i - 1]))[token[i]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from llm2vec.data.blocks import Block
from llm2vec.objectives.language_modelling import LanguageModelling
from llm2vec.text.batches import pack_rows
from llm2vec.text.tokenization import Row
from llm2vec.types import Batch, MaskingScheme, MaskTokenType, UserError

#: Shares of the chosen tokens that the mask replaces, and that any token of the vocabulary does; the rest stays (BERT,
#: arXiv 1810.04805).
SHARES: dict[MaskingScheme, tuple[float, float]] = {"default": (0.8, 0.1), "all_mask": (1.0, 0.0)}

#: What is written for a masked token, where it is no new one.
BLANK = "_"
#: What is added for a masked token.
ADDED_MASK = "<mask>"


class MaskedNextTokenPrediction(LanguageModelling):
    """The loss over blocks of text some of whose tokens are masked; their `labels` are the tokens as they were. Usually
    a LoRA adapter on the decoder is trained, and all else frozen."""

    name = "mntp"
    attention = "bidirectional"


@dataclass(frozen=True)
class MaskTokens:
    """Blocks of a micro-batch to its masked side `text`.

    Which tokens of a block are chosen depends on the seed, the epoch and the block alone, not on the processes, the
    workers or the batch. A block's first token is not chosen, as no state stands before it.
    """

    mask_id: int  #: what stands for a masked token
    vocabulary_size: int  #: random tokens are drawn below it
    spared: frozenset[int]  #: ids that are never chosen
    probability: float = 0.2  #: of each other token to be chosen
    scheme: MaskingScheme = "default"  #: what becomes of the chosen ones
    seed: int = 0  #: of the run

    @property
    def cut_at(self) -> None:
        """Blocks are not cut."""

    def __call__(self, blocks: list[Block]) -> Batch:
        """The masked blocks, packed; `target_mask` marks the chosen tokens, `labels` are the tokens as they were."""
        text = pack_rows([self.masked(block) for block in blocks])
        text["labels"] = torch.tensor([token for block in blocks for token in block.ids])
        return {"text": text}

    def all_rows(self, blocks: Sequence[Block]) -> list[Row]:
        """The masked blocks, row by row."""
        return [self.masked(block) for block in blocks]

    def masked(self, block: Block) -> Row:
        """One block with some of its tokens masked, and which were chosen."""
        ids = np.array(block.ids)
        generator = np.random.default_rng([self.seed, block.epoch, block.row])
        chosen = generator.random(len(ids)) < self.probability
        chosen[0] = False
        chosen &= ~np.isin(ids, list(self.spared))
        to_mask, to_random = SHARES[self.scheme]
        fate = generator.random(len(ids))
        random_ids = generator.integers(self.vocabulary_size, size=len(ids))
        ids = np.where(chosen & (fate < to_mask), self.mask_id, ids)
        ids = np.where(chosen & (fate >= to_mask) & (fate < to_mask + to_random), random_ids, ids)
        return Row(ids.tolist(), [True] * len(ids), chosen.tolist())


def mask_tokens(
    tokenizer: PreTrainedTokenizerBase,
    mask_token_type: MaskTokenType = "blank",
    probability: float = 0.2,
    scheme: MaskingScheme = "default",
    seed: int = 0,
) -> MaskTokens:
    """The masking that a tokenizer, which must have a token for it, and a config's keys describe; no special one is
    chosen."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return MaskTokens(
        mask_token_id(tokenizer, mask_token_type),
        len(tokenizer),
        frozenset(special | set(tokenizer.all_special_ids)),
        probability,
        scheme,
        seed,
    )


def mask_token_id(tokenizer: PreTrainedTokenizerBase, mask_token_type: MaskTokenType) -> int:
    """What stands for a masked token: the tokenizer's own mask token, or what the type says; else a `UserError`."""
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    found = {
        "blank": tokenizer.get_vocab().get(BLANK),
        "eos": tokenizer.eos_token_id,
        "mask": tokenizer.get_vocab().get(ADDED_MASK),
    }[mask_token_type]
    if found is None:
        raise UserError(f"mask_token_type is {mask_token_type!r}, but the tokenizer has no such token; choose another.")
    return int(found)


def add_mask_token(tokenizer: PreTrainedTokenizerBase, mask_token_type: MaskTokenType) -> list[int]:
    """Add a mask token where the type asks for a new one and the tokenizer has none; returns its id, or nothing. A
    `UserError` where the vocabulary has it as an ordinary token, which any text may contain."""
    if mask_token_type != "mask" or tokenizer.mask_token_id is not None:
        return []
    if ADDED_MASK in tokenizer.get_vocab():
        raise UserError(f"mask_token_type: the base's vocabulary has {ADDED_MASK!r} as an ordinary token; use 'blank'.")
    tokenizer.add_special_tokens({"mask_token": AddedToken(ADDED_MASK, special=True, normalized=False)})
    return [mask_token_id(tokenizer, mask_token_type)]
