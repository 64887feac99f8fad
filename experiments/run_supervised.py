"""LLM2Vec's supervised stage: Stage II, started with a configuration file of upstream LLM2Vec.

Its bidirectional attention, mean pooling and merged MNTP adapter are keys of that file, so training is
`run_stage_II.py`'s. One default is not upstream's and decides the loss, so it is said where the file leaves it out.

torchrun --nproc_per_node=8 experiments/run_supervised.py train_configs/llm2vec/supervised/MetaLlama3.json
"""

import logging
import sys
from pathlib import Path

from run_stage_II import main

from llm2vec.files import read_object
from llm2vec.train.config import Config
from llm2vec.train.run import config_path, user_errors_in_one_sentence

logger = logging.getLogger(__name__)


def say_loss_scale(config: Path) -> None:
    """Warn where a file counts on upstream's `loss_scale` of 50."""
    if config.is_file() and "loss_scale" not in read_object(config):
        logger.warning("loss_scale is left out and is %g here; upstream llm2vec's default is 50.", Config.loss_scale)


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        say_loss_scale(config_path(sys.argv))
        main()
