"""Train one stage from its config: `llm2vec stage-1`, `stage-2`, `lm`, `mntp`, `simcse` and `supervised`.

By several processes: `torchrun --nproc_per_node=N -m llm2vec STAGE CONFIG.json`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from llm2vec import cli
from llm2vec.files import read_object
from llm2vec.types import Stage, UserError

logger = logging.getLogger(__name__)


def stage_1(argv: Sequence[str]) -> None:
    """Stage I: train every parameter to reconstruct documents from query embeddings and queries from document
    embeddings.

    torchrun --nproc_per_node=8 -m llm2vec stage-1 train_configs/stage_I/MetaLlama3.2_1b_q2d_d2q.json
    llm2vec stage-1 train_configs/quickstart/stage_I.json      # one process, CPU included
    """
    _train("stage_I", _config("stage-1", stage_1, argv))


def stage_2(argv: Sequence[str]) -> None:
    """Stage II and the baseline: contrastive learning with LoRA, from a Stage I folder or from a bare base model.

    With `lm_weight` above 0, a causal language-modelling loss on the rows' own texts goes with it.

    torchrun --nproc_per_node=8 -m llm2vec stage-2 train_configs/stage_II/MetaLlama3.2_1b_stage1_2000steps_stage2.json
    torchrun --nproc_per_node=8 -m llm2vec stage-2 train_configs/baseline/MetaLlama3.2_1b_baseline_stage2.json
    llm2vec stage-2 train_configs/quickstart/stage_II.json     # one process, CPU included
    """
    _train("stage_II", _config("stage-2", stage_2, argv))


def lm(argv: Sequence[str]) -> None:
    """Plain next-token training on the rows' text (query and positive as one text), every parameter.

    It makes the quickstart's base model, and the equal-compute control to Stage I.

    llm2vec lm train_configs/quickstart/pretrain.json
    """
    _train("lm", _config("lm", lm, argv))


def mntp(argv: Sequence[str]) -> None:
    """LLM2Vec's first stage: a LoRA adapter that accustoms a decoder to bidirectional attention, by masked next tokens.

    It runs upstream LLM2Vec's configuration files as they are. The texts are a hub dataset's (`dataset_name`), a `.txt`
    or `.jsonl` file's (`dataset_file_path`), or those of training rows (`sources_file`).

    torchrun --nproc_per_node=N -m llm2vec mntp CONFIG.json
    """
    _train("mntp", _config("mntp", mntp, argv))


def simcse(argv: Sequence[str]) -> None:
    """LLM2Vec's unsupervised stage, SimCSE (Gao et al. 2021, arXiv 2104.08821): a text's positive is the text itself
    under other dropout, and all other texts of the batch are its negatives.

    `dataset_file_path` is a text file, a sentence a line, or a folder of training rows, of which the documents are
    read.

    torchrun --nproc_per_node=1 -m llm2vec simcse train_configs/llm2vec/simcse/MetaLlama3.json
    """
    _train("simcse", _config("simcse", simcse, argv))


def supervised(argv: Sequence[str]) -> None:
    """LLM2Vec's supervised stage: Stage II, started with a configuration file of upstream LLM2Vec.

    Its bidirectional attention, mean pooling and merged MNTP adapter are keys of that file, so training is that of
    stage-2. One default is not upstream's and decides the loss, so it is said where the file leaves it out.

    torchrun --nproc_per_node=8 -m llm2vec supervised train_configs/llm2vec/supervised/MetaLlama3.json
    """
    path = _config("supervised", supervised, argv)
    if path.is_file() and "loss_scale" not in read_object(path):
        from llm2vec.training.config import Config

        logger.warning("loss_scale is left out and is %g here; upstream llm2vec's default is 50.", Config.loss_scale)
    _train("stage_II", path)


def _config(command: str, function: Callable[[Sequence[str]], None], argv: Sequence[str]) -> Path:
    """A command's one argument; its function's docstring is its help. A `UserError` where there is not exactly one."""
    parser = cli.parser(command, inspect.getdoc(function))
    parser.usage = f"llm2vec {command} CONFIG.json"
    parser.add_argument("config", nargs="*", type=cli.path, help="the run's JSON file")
    paths: list[Path] = parser.parse_args(argv).config
    if len(paths) != 1:
        raise UserError(f"usage: torchrun --nproc_per_node=N -m llm2vec {command} CONFIG.json")
    return paths[0]


def _train(stage: Stage, path: Path) -> None:
    from llm2vec.training.stages import train_stage  # with torch: seconds, which --help does not wait for

    train_stage(stage, path)
