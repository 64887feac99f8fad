"""`llm2vec lm`: plain next-token training on the rows' text.

python experiments/run_lm.py train_configs/quickstart/pretrain.json
"""

from llm2vec.cli import run_command
from llm2vec.commands.train import lm

if __name__ == "__main__":
    run_command(lm)
