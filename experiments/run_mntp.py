"""`llm2vec mntp`: LLM2Vec's first stage, masked next tokens.

torchrun --nproc_per_node=N experiments/run_mntp.py CONFIG.json
"""

from llm2vec.cli import run_command
from llm2vec.commands.train import mntp

if __name__ == "__main__":
    run_command(mntp)
