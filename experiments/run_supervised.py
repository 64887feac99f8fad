"""`llm2vec supervised`: LLM2Vec's supervised stage, Stage II with a configuration file of upstream LLM2Vec.

torchrun --nproc_per_node=8 experiments/run_supervised.py train_configs/llm2vec/supervised/MetaLlama3.json
"""

from llm2vec.cli import run_command
from llm2vec.commands.train import supervised

if __name__ == "__main__":
    run_command(supervised)
