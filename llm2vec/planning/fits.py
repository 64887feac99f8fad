"""What fits on which card: bases, ways to train them, and the longest documents that a card of so much memory takes.

Run by `llm2vec plan --bases`; the table in docs/guides/small_cards.md is what it prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm2vec.planning.gpus import Card
from llm2vec.planning.plan import Conditions, plan_of
from llm2vec.planning.words import FULL
from llm2vec.table import Table
from llm2vec.training.config import Config
from llm2vec.training.config.file import checked_config

#: Of the cards, in 10^9 bytes.
CARDS_GB = (8, 16, 24, 48, 80)
#: Tokens of a document, shortest first, and of the query that it answers.
TEXT_LENGTHS = (2048, 8192, 32768)
QUERY_LENGTH = 64
#: Ways to train, cheapest last: what it is called, and its keys.
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {"use_peft": False},
    "LoRA": {"torch_dtype": "bfloat16"},
    "LoRA over 4 bits": {"torch_dtype": "bfloat16", "load_in": "4bit"},
}


def table_of_cards(bases: Sequence[str]) -> Table:
    """The longest documents of Stage II that fit, in tokens, by base, way to train and card.

    One row goes through the model at a time (`tokens_per_microbatch`), in bfloat16 with every layer recomputed; of
    eight rows a step. A card counts as full at 90 %. A base whose shape can be had nowhere, or whose layers are not
    known, is a `UserError`.
    """
    rows = []
    for base in bases:
        for way, keys in WAYS.items():
            most = {length: bytes_at_most(base, length, keys) for length in TEXT_LENGTHS}
            fitting = [[length for length in TEXT_LENGTHS if most[length] <= FULL * 1e9 * gb] for gb in CARDS_GB]
            cells = [f"{max(lengths):,}" if lengths else None for lengths in fitting]
            rows.append([base.rstrip("/").rpartition("/")[2], way, *cells])
    return Table(["base", "trained", *(f"{gb} GB" for gb in CARDS_GB)], rows, "What fits", num_names=2)


def bytes_at_most(base: str, length: int, keys: dict[str, Any]) -> float:
    """Bytes that a GPU holds at once in Stage II, where one row, with a document of `length` tokens, goes through the
    model at a time; the config has `keys` beside those that are the same for all."""
    training = {
        "output_dir": "output/plan", "per_device_train_batch_size": 8, "bf16": True, "gradient_checkpointing": True,
        "max_steps": 1, "use_cpu": True,
    }  # fmt: skip
    config = Config(
        model_name_or_path=base, stage="stage_II", dataset_file_path="data", max_seq_length=length,
        tokens_per_microbatch=length, num_hard_negatives=0, training=training, **keys,
    )  # fmt: skip
    card = Card("card", max(CARDS_GB))
    plan = plan_of(checked_config(config), Conditions(card=card, tokens_query=QUERY_LENGTH, tokens_document=length))
    assert plan.memory is not None, "bases whose layers are not known are refused"
    return plan.memory.most
