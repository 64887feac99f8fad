"""LLM2Vec's unsupervised stage, SimCSE (Gao et al. 2021, arXiv 2104.08821): a text's positive is the text itself under
other dropout, and all other texts of the batch are its negatives.

`dataset_file_path` is a text file, a sentence a line, or a folder of training rows, of which the documents are read.

torchrun --nproc_per_node=1 experiments/run_simcse.py train_configs/llm2vec/simcse/MetaLlama3.json
"""

import dataclasses
import sys

from llm2vec.data.collation import CollateSides
from llm2vec.model.backbone import set_attention_dropout
from llm2vec.model.settings import row_tokenizer
from llm2vec.objectives.contrastive import ContrastiveLearning, RowFacts
from llm2vec.train.config_file import load_config
from llm2vec.train.model import load_model
from llm2vec.train.resume import start_or_resume
from llm2vec.train.rows import open_texts
from llm2vec.train.run import config_path, describe_negatives, train, user_errors_in_one_sentence


def main() -> None:
    """Config, data, model, objective, training, saving."""
    config = dataclasses.replace(load_config(config_path(sys.argv), "simcse"), num_hard_negatives=0)
    args = start_or_resume(config)
    rows = open_texts(config)
    model, tokenizer, settings = load_model(config, args.device, with_lm_head=False)
    set_attention_dropout(model, config.simcse_dropout)
    objective = ContrastiveLearning(model, settings, config.loss_scale, matryoshka_dims=config.matryoshka_dims)
    facts = RowFacts(mask_false_negatives=config.mask_false_negatives)
    collate = CollateSides(row_tokenizer(tokenizer, settings), ("query", "positive"), facts=facts)
    train(config, args, objective, rows, collate, tokenizer, settings, [describe_negatives(config, args)])


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
