"""`llm2vec compare`: a set of recipes on the same data, end to end: train, evaluate, one table.

python experiments/compare.py train_configs/comparison/quickstart --seeds 42 43        # what `make compare` runs
python experiments/compare.py train_configs/comparison/llama3.2_1b --processes 8
"""

from llm2vec.cli import run_command
from llm2vec.commands.compare import main

if __name__ == "__main__":
    run_command(main)
