"""`llm2vec simcse`: LLM2Vec's unsupervised stage.

torchrun --nproc_per_node=1 experiments/run_simcse.py train_configs/llm2vec/simcse/MetaLlama3.json
"""

from llm2vec.cli import run_command
from llm2vec.commands.train import simcse

if __name__ == "__main__":
    run_command(simcse)
