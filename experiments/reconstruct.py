"""`llm2vec reconstruct`: write the text on the other side from a text's embedding alone, or score how much is there.

python experiments/reconstruct.py output/stage_I/... "who wrote Emma?" --from query
python experiments/reconstruct.py output/stage_I/... --score held_out.jsonl --instruction "Given a question, ..."
"""

from llm2vec.cli import run_command
from llm2vec.commands.models.reconstruct import main

if __name__ == "__main__":
    run_command(main)
