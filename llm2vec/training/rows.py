"""The rows of a run: which files its config names, the rows they hold, and the order in which they are trained on.

Used by `stages`, by `run`, and by what says beforehand how a run will go (`planning`). Rows that a Python program hands
over become a file first (`table_of`), and are read as any other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from transformers import TrainingArguments

from llm2vec.data.blocks import TEXT_SUFFIXES, SourceTexts, TextBlocks, texts_of_file, texts_of_hub, texts_of_sources
from llm2vec.data.order import OneSourceBlocks
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source, e5_sources, read_sources_file, select_sources
from llm2vec.files import in_short, write_json
from llm2vec.training.config import Config
from llm2vec.types import CHARACTERS_A_TOKEN, UserError, in_one_sentence

logger = logging.getLogger(__name__)

Rows: TypeAlias = TrainingRows | TextBlocks

#: In the cache of `datasets`: rows that a Python program handed over.
ROWS_FOLDER = "llm2vec-rows"

#: Where upstream LLM2Vec's sentences for SimCSE are to be had.
WIKI1M_HINT = (
    "Wiki1M is the file wiki1m_for_simcse.txt of https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse"
)


def open_rows(config: Config, num_negatives: int) -> TrainingRows:
    """The training rows a config asks for; every line is checked."""
    folder, sources = sources_of(config)
    names = [source.name for source in sources]
    for name in config.own_negatives_only or ():
        if name not in names:
            raise UserError(f"own_negatives_only: {name!r} is not among the sources of this run: {', '.join(names)}.")
    for source in sources:
        alike = "label" in source.reading.roles and source.name not in (config.own_negatives_only or ())
        if alike and config.stage == "stage_II":
            logger.warning(
                "source %s: texts of one label stand in a batch as each other's negatives; name it in "
                "own_negatives_only", source.name,
            )  # fmt: skip
        if source.reading.num_negatives != 0 or not num_negatives:
            continue
        for key, is_set in (("own_negatives_only", source.name in (config.own_negatives_only or ())),
                            ("distillation_weight", config.distillation_weight)):  # fmt: skip
            if is_set:
                raise UserError(f"{key}: source {source.name!r} has no hard negatives (its num_negatives is 0).")
    return TrainingRows(
        folder,
        sources,
        num_negatives=num_negatives,
        symmetric_instructions=config.symmetric_instructions,
        max_rows=config.max_train_samples,
        num_held_out=config.num_eval_rows,
        with_scores=needs_scores(config),
        drawn_anew=config.target == "next",
    )


def table_of(rows: Iterable[Mapping[str, Any]], instruction: str) -> Path:
    """A `sources_file` of one source, for rows that are in no file yet.

    They are written to the cache of `datasets`, by a name that their content and the instruction make. So the same rows
    are the same file, whose table is not built again, and a run can go on with them. A `UserError` where a row is
    nothing that JSON can write, or the cache cannot be written to.
    """
    from datasets import config

    folder, digest = Path(config.HF_DATASETS_CACHE) / ROWS_FOLDER, hashlib.sha256(instruction.encode())
    number = 0
    with in_one_sentence(lambda why: f"HF_DATASETS_CACHE: {folder} cannot be written to ({why}).", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            written = Path(aside, "rows")
            with written.open("wb") as out:
                for number, row in enumerate(rows, start=1):
                    try:
                        line = f"{json.dumps(dict(row))}\n".encode()
                    except (TypeError, ValueError) as error:
                        found = f"{in_short(row)} is no row of text ({error})"
                        raise UserError(f"rows, row {number}: {found}; query, positive and negative are.") from error
                    digest.update(line)
                    out.write(line)
            if not number:
                raise UserError("rows: there are none.")
            file = folder / f"{digest.hexdigest()[:32]}.jsonl"
            if not file.exists():
                written.rename(file)
    write_json(file.with_suffix(".json"), {"rows": {"file": file.name, "instruction": instruction}})
    return file.with_suffix(".json")


def needs_scores(config: Config) -> bool:
    """Whether every row must bring scores of its documents."""
    return config.distillation_weight > 0 or config.cosent_weight > 0


def open_texts(config: Config) -> TrainingRows:
    """Texts without instruction, each its own positive: a text file's lines, or the documents of a config's rows."""
    if (file := text_file_of(config)) is not None:
        if not file.is_file():
            raise UserError(f"dataset_file_path: {file} is not there; {WIKI1M_HINT}.")
        folder, sources = file.parent, [Source(file.stem, file.name, ())]
    else:
        folder, sources = sources_of(config)
    bare = (Instruction("", symmetric=True),)  # so that both take the same form
    return TrainingRows(
        folder,
        [source._replace(instructions=bare) for source in sources],
        num_negatives=0,
        max_rows=config.max_train_samples,
        num_held_out=config.num_eval_rows,
        texts_alone=True,
    )


def open_running_text(config: Config) -> list[SourceTexts]:
    """The texts that a config wants cut into blocks: a text file's, a hub dataset's, or those of its rows."""
    if config.hub_dataset is not None:
        return [texts_of_hub(config.hub_dataset, config.dataset_config_name)]
    if (file := text_file_of(config)) is not None:
        return [texts_of_file(file)]
    return texts_of_sources(*sources_of(config))


def text_file_of(config: Config) -> Path | None:
    """The file of texts that a config names in the place of a table of sources, if it does."""
    file = Path(config.dataset_file_path or "")
    suffixes = {"simcse": (".txt",), "mntp": TEXT_SUFFIXES}.get(config.stage or "", ())
    return file if config.sources_file is None and file.suffix in suffixes else None


def sources_of(config: Config) -> tuple[Path, list[Source]]:
    """The folder of a config's rows, and what to read there."""
    sources = e5_sources() if config.sources_file is None else read_sources_file(Path(config.sources_file))
    folder = Path(config.dataset_file_path or Path(config.sources_file or "").parent)
    return folder, select_sources(sources, config.sources)


def sample_of(rows: Rows) -> list[Any]:
    """About 256 rows, evenly spaced."""
    return [rows[i] for i in range(0, len(rows), max(1, len(rows) // 256))]


def row_orders(
    config: Config, args: TrainingArguments, rows: Rows, num_processes: int
) -> tuple[OneSourceBlocks, tuple[Rows, OneSourceBlocks] | None]:
    """The order of the training rows; and, where evaluation is on, the held-out rows and theirs. A `UserError` where
    a source or its held-out rows do not fill one batch, or evaluation has no rows."""
    at_once = args.per_device_train_batch_size * num_processes
    block_size = at_once * (args.gradient_accumulation_steps if config.one_source_per == "step" else 1)
    own = [source.reading.batch_size for source in rows.sources]
    largest = max(number or block_size for number in own)
    if config.max_train_samples is not None and config.max_train_samples < largest:
        raise UserError(
            f"max_train_samples is {config.max_train_samples}, fewer than the {largest} rows of one batch; raise it "
            "or make the batch smaller."
        )
    sampler = OneSourceBlocks(
        rows,
        block_size,
        args.seed,
        # A mean over micro-batches, as the release takes it, depends on which rows share one: there, none is moved.
        num_ranks=num_processes if config.reduction == "token_mean" else 1,
        rows_a_rank=args.per_device_train_batch_size,
        max_characters=CHARACTERS_A_TOKEN * config.max_seq_length,
        weights=[source.reading.weight for source in rows.sources],
        temperature=config.source_temperature,
        own=own,
    )
    return sampler, _held_out(config, args, rows, at_once)


def _held_out(config: Config, args: TrainingArguments, rows: Rows, at_once: int) -> tuple[Rows, OneSourceBlocks] | None:
    """The held-out rows and their order, where evaluation is on; every rank holds equally many of each block."""
    if args.eval_strategy == "no":
        return None
    args.per_device_eval_batch_size = args.per_device_train_batch_size  # in-batch figures depend on it
    args.dataloader_drop_last = True
    held_out = rows.held_out()
    fewest = min(held_out.sizes)
    if fewest < at_once:
        found = f"the validation split of {config.hub_dataset} fills {fewest} blocks"
        raise UserError(
            f"{f'num_eval_rows is {fewest}' if config.num_eval_rows else found}, fewer than the {at_once} rows of an "
            "evaluation batch (per_device_train_batch_size on every process); hold more out by num_eval_rows, or make "
            "the batch smaller."
        )
    return held_out, OneSourceBlocks(held_out, at_once, args.seed)


def describe_left_out(rows: Rows) -> list[str]:
    """What the sources' tables left out of them, a line a source."""
    counts = zip(rows.sources, rows.left_out, strict=True) if isinstance(rows, TrainingRows) else ()
    return [
        f"left out    of {source.name}: {', '.join(f'{number:,} {what}' for what, number in left_out.items())}"
        for source, left_out in counts
        if left_out
    ]


def describe_mixture(order: OneSourceBlocks) -> list[str]:
    """What an epoch takes of each source, in whole steps; nothing of one source alone."""
    parts, is_plain = [], len(order.sizes) == 1
    for source, size, taken, filled in zip(order.rows.sources, order.sizes, order.taken, order.filled, strict=True):
        times = "" if taken == size // filled else f" ({taken * filled / size:.2f} times its rows)"
        own = "" if filled == order.block_size else f" in batches of {filled}"
        parts.append(f"{source.name} {taken * filled / order.num_rows:.1%}{times}{own}")
        is_plain = is_plain and not times and not own
    return [] if is_plain else [f"mixture     {', '.join(parts)} of an epoch's {order.num_rows:,} rows"]
