"""Plain next-token training on the rows' text (query and positive as one text), every parameter.

It makes the quickstart's base model, and the equal-compute control to Stage I.

python experiments/run_lm.py train_configs/quickstart/pretrain.json
"""

import dataclasses
import sys

from llm2vec.data.collation import CollateSides
from llm2vec.model.settings import row_tokenizer
from llm2vec.objectives.language_modelling import LanguageModelling
from llm2vec.train.config_file import load_config
from llm2vec.train.model import load_model
from llm2vec.train.resume import start_or_resume
from llm2vec.train.rows import open_rows
from llm2vec.train.run import config_path, train, user_errors_in_one_sentence


def main() -> None:
    """Config, data, model, objective, training, saving."""
    config = load_config(config_path(sys.argv), "lm")
    args = start_or_resume(config)
    rows = open_rows(config, num_negatives=0)
    model, tokenizer, settings = load_model(config, args.device, with_lm_head=True)
    # Running text, no turn: the template that embeds is the model's own and goes into the checkpoint unchanged.
    collate = CollateSides(row_tokenizer(tokenizer, dataclasses.replace(settings, template="plain")), ("text",))
    train(config, args, LanguageModelling(model), rows, collate, tokenizer, settings)


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
