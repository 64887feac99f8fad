"""Stage II and the baseline: contrastive learning with LoRA, from a Stage I folder or from a bare base model.

torchrun --nproc_per_node=8 experiments/run_stage_II.py \
    train_configs/stage_II/MetaLlama3.2_1b_stage1_2000steps_stage2.json
torchrun --nproc_per_node=8 experiments/run_stage_II.py train_configs/baseline/MetaLlama3.2_1b_baseline_stage2.json
python experiments/run_stage_II.py train_configs/quickstart/stage_II.json    # one process, CPU included
"""

import sys

from llm2vec.config import load_config, training_arguments
from llm2vec.llm2vec import row_tokenizer
from llm2vec.llm2vec_contrastive import ContrastiveLearning
from llm2vec.run import (
    CollateSides,
    config_path,
    describe_negatives,
    load_model,
    open_rows,
    train,
    user_errors_in_one_sentence,
)


def main() -> None:
    """Config, data, model, objective, training, saving."""
    config = load_config(config_path(sys.argv), "stage_II")
    args = training_arguments(config)
    rows = open_rows(config, num_negatives=config.num_hard_negatives)
    model, tokenizer, settings = load_model(config, args.device, with_lm_head=False)
    objective = ContrastiveLearning(model, settings, config.loss_scale)
    sides = ("query", "positive", "negative") if config.num_hard_negatives else ("query", "positive")
    collate = CollateSides(row_tokenizer(tokenizer, settings), sides, config.examples_per_query, args.seed)
    train(config, args, objective, rows, collate, tokenizer, settings, [describe_negatives(config, args)])


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
