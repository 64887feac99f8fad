"""Stage II and the baseline: contrastive learning with LoRA, from a Stage I folder or from a bare base model.

With `lm_weight` above 0, a causal language-modelling loss on the rows' own texts goes with it.

torchrun --nproc_per_node=8 experiments/run_stage_II.py \
    train_configs/stage_II/MetaLlama3.2_1b_stage1_2000steps_stage2.json
torchrun --nproc_per_node=8 experiments/run_stage_II.py train_configs/baseline/MetaLlama3.2_1b_baseline_stage2.json
python experiments/run_stage_II.py train_configs/quickstart/stage_II.json    # one process, CPU included
"""

import dataclasses
import sys

from llm2vec.data.collation import CollateSides, Side
from llm2vec.model.settings import row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning, RowFacts
from llm2vec.objectives.language_modelling import ContrastiveLanguageModelling, LanguageModelling
from llm2vec.train.config_file import load_config
from llm2vec.train.model import decoder_of, load_model
from llm2vec.train.resume import start_or_resume
from llm2vec.train.rows import open_rows
from llm2vec.train.run import config_path, describe_negatives, train, user_errors_in_one_sentence


def main() -> None:
    """Config, data, model, objective, training, saving."""
    config = load_config(config_path(sys.argv), "stage_II")
    args = start_or_resume(config)
    rows = open_rows(config, num_negatives=config.num_hard_negatives)
    with_lm = config.lm_weight > 0
    model, tokenizer, settings = load_model(config, args.device, with_lm_head=with_lm)
    contrastive = ContrastiveLearning(
        decoder_of(model),
        settings,
        config.loss_scale,
        matryoshka_dims=config.matryoshka_dims,
        distillation_weight=config.distillation_weight,
    )
    objective = (
        ContrastiveLanguageModelling(contrastive, LanguageModelling(model), config.lm_weight)
        if with_lm
        else contrastive
    )
    facts = RowFacts(
        mask_false_negatives=config.mask_false_negatives,
        with_scores=config.distillation_weight > 0,
        own_negatives_only=frozenset(config.own_negatives_only or ()),
    )
    sides: list[Side] = ["query", "positive"]
    sides += ["negative"] if config.num_hard_negatives else []
    sides += ["text"] if with_lm else []
    running_text = dataclasses.replace(settings, template="plain", pooling_mode="mean")  # which closes no text
    collate = CollateSides(
        row_tokenizer(tokenizer, settings),
        tuple(sides),
        config.examples_per_query,
        args.seed,
        facts,
        row_tokenizer(tokenizer, running_text),
    )
    train(config, args, objective, rows, collate, tokenizer, settings, [describe_negatives(config, args)])


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
