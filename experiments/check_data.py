"""`llm2vec check-data`: look at training data before training on it.

python experiments/check_data.py cache/echo-data --tokenizer meta-llama/Llama-3.2-1B-Instruct
python experiments/check_data.py my/folder --sources_file my_sources.json --test_sets mteb/nfcorpus mteb/sts12-sts
"""

from llm2vec.cli import run_command
from llm2vec.commands.data.check_data import main

if __name__ == "__main__":
    run_command(main)
