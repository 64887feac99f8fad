"""A training run: its config, stages, trainer and step; and the door to it from Python.

    from llm2vec import Config, train
    model, figures = train(Config(...), rows)

The commands lead to the same run (`stages`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llm2vec.files import json_lines
from llm2vec.processes import rank_zero_first
from llm2vec.types import RunEnds, UserError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llm2vec.llm2vec import LLM2Vec
    from llm2vec.training.config import Config


class Trained(NamedTuple):
    """What `train` returns.

    Attributes:
        model: as it was saved in the output folder.
        figures: the entries of the run's log: `step`, `loss`, `learning_rate`, `eval_...` and more, in order.
    """

    model: LLM2Vec
    figures: list[dict[str, Any]]


def train(
    config: Config,
    rows: Iterable[Mapping[str, Any]] | None = None,
    *,
    instruction: str = "",
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train one stage as its command does: same checks, same steps, same files, same weights. It goes on where an
    earlier call was cut short, and where nothing is left to do it returns what is there.

        config = Config(
            stage="stage_II", model_name_or_path="base", training={"output_dir": "output/mine", "max_steps": 100}
        )
        model, figures = train(config, [{"query": "red", "positive": "a colour", "negative": "a taste"}, ...])

    Args:
        config: of the run: `stage`, and the keys of a file. transformers' are its `training`.
        rows: a `datasets.Dataset`, or anything else that yields rows of `query`, `positive` and `negative`; checked as
            the rows of a file are. They are written to the cache of `datasets`. None = those that the config names.
        instruction: that the queries of `rows` stand under.
        callbacks: transformers' `TrainerCallback`, beside the run's own.

    Raises:
        UserError: config, rows or model do not fit.
        RunEnds: the run was asked to stop, could not write, or diverged.
    """
    from llm2vec.llm2vec import LLM2Vec
    from llm2vec.training.config.file import checked_config
    from llm2vec.training.log import LOG_FILE
    from llm2vec.training.rows import table_of
    from llm2vec.training.stages import run_stage  # all with torch: seconds, which `import llm2vec` does not wait for

    if rows is not None:
        for key in ("dataset_file_path", "sources_file", "sources"):
            if getattr(config, key) is not None:
                raise UserError(f"Config: {key} says where rows are, and rows are given too; leave one of them out.")
        config = dataclasses.replace(config, sources_file=str(table_of(rows, instruction)))
    elif instruction:
        raise UserError("instruction is that of the rows that are given, and none are; it stands in sources_file.")
    config = checked_config(config)
    try:
        run_stage(config, callbacks)
    except RunEnds as end:
        if not end.is_done:
            raise
    log = config.output_dir / LOG_FILE
    with rank_zero_first():  # which has written it all
        figures = [entry for _, entry in json_lines(log)] if log.is_file() else []
        return Trained(LLM2Vec.from_pretrained(config.output_dir), figures)
