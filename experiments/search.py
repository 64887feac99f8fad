"""`llm2vec search`: search in your own texts with a trained model.

python experiments/search.py index notes/ output/notes-index --model output/stage_II/...
python experiments/search.py query output/notes-index "when do we meet" --top_k 5
python experiments/search.py demo "wait until a predicate becomes true"    # after `make quickstart`
"""

from llm2vec.cli import run_command
from llm2vec.commands.search import main

if __name__ == "__main__":
    run_command(main)
