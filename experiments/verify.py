"""`llm2vec verify`: whether a model gives the same vectors however it is loaded.

python experiments/verify.py output/stage_I+output/stage_II output/exported
python experiments/verify.py output/exported http://localhost:8000 --dtype bfloat16
"""

from llm2vec.cli import run_command
from llm2vec.commands.models.verify import main

if __name__ == "__main__":
    run_command(main)
