"""LLM2Vec's first stage: a LoRA adapter that accustoms a decoder to bidirectional attention, by masked next tokens.

It runs upstream LLM2Vec's configuration files as they are. The texts are a hub dataset's (`dataset_name`), a `.txt` or
`.jsonl` file's (`dataset_file_path`), or those of training rows (`sources_file`).

torchrun --nproc_per_node=N experiments/run_mntp.py CONFIG.json
"""

import dataclasses
import sys

from llm2vec.data.blocks import open_blocks
from llm2vec.objectives.mntp import MaskedNextTokenPrediction, mask_tokens
from llm2vec.train.config_file import load_config
from llm2vec.train.model import load_model
from llm2vec.train.resume import start_or_resume
from llm2vec.train.rows import open_running_text
from llm2vec.train.run import config_path, train, user_errors_in_one_sentence


def main() -> None:
    """Config, texts, model, blocks, objective, training, saving."""
    config = load_config(config_path(sys.argv), "mntp")
    args = start_or_resume(config)
    texts = open_running_text(config)
    model, tokenizer, settings = load_model(config, args.device, with_lm_head=True)
    rows = open_blocks(
        texts,
        tokenizer,
        config.max_seq_length,
        max_rows=config.max_train_samples,
        num_held_out=config.num_eval_rows,
    )
    collate = mask_tokens(
        tokenizer, config.mask_token_type, config.mlm_probability, config.data_collator_type, args.seed
    )
    # Blocks are written by no template, so the next stage may choose any.
    settings = dataclasses.replace(settings, template=config.template)
    train(config, args, MaskedNextTokenPrediction(model), rows, collate, tokenizer, settings)


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
