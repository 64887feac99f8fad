"""`llm2vec stage-1`: Stage I, which trains every parameter to reconstruct texts from embeddings.

torchrun --nproc_per_node=8 experiments/run_stage_I.py train_configs/stage_I/MetaLlama3.2_1b_q2d_d2q.json
python experiments/run_stage_I.py train_configs/quickstart/stage_I.json      # one process, CPU included
"""

from llm2vec.cli import run_command
from llm2vec.commands.train import stage_1

if __name__ == "__main__":
    run_command(stage_1)
