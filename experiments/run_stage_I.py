"""Stage I: train every parameter to reconstruct documents from query embeddings and queries from document embeddings.

torchrun --nproc_per_node=8 experiments/run_stage_I.py train_configs/stage_I/MetaLlama3.2_1b_q2d_d2q.json
python experiments/run_stage_I.py train_configs/quickstart/stage_I.json      # one process, CPU included
"""

import sys

from llm2vec.data.collation import CollateSides
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.settings import row_tokenizer
from llm2vec.objectives.token_set import CollateBlocks, TokenSetPrediction
from llm2vec.train.config_file import load_config
from llm2vec.train.model import load_model
from llm2vec.train.resume import start_or_resume
from llm2vec.train.rows import open_rows
from llm2vec.train.run import config_path, train, user_errors_in_one_sentence


def main() -> None:
    """Config, data, model, objective, training, saving."""
    config = load_config(config_path(sys.argv), "stage_I")
    args = start_or_resume(config)
    rows = open_rows(config, num_negatives=0)
    model, tokenizer, settings = load_model(config, args.device, with_lm_head=True)
    renderer = row_tokenizer(tokenizer, settings, reconstruct_instruction=config.reconstruct_instruction)
    if config.objective == "token_set":
        train(config, args, TokenSetPrediction(model), rows, CollateBlocks(renderer), tokenizer, settings)
        return
    objective = BidirectionalReconstruction(model, settings, config.alpha, config.target)
    train(config, args, objective, rows, CollateSides(renderer, ("query", "positive")), tokenizer, settings)


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
