"""LLM2Vec's supervised stage: Stage II, started with a configuration file of upstream LLM2Vec.

Its bidirectional attention, mean pooling and merged MNTP adapter are keys of that file, so nothing here differs from
`run_stage_II.py`.

torchrun --nproc_per_node=8 experiments/run_supervised.py train_configs/llm2vec/supervised/MetaLlama3.json
"""

from run_stage_II import main

from llm2vec.run import user_errors_in_one_sentence

if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
