r"""`llm2vec export`: turn a checkpoint into a plain folder for other libraries.

    python experiments/export.py output/stage_I/Llama-3.2-1B-Instruct-q2d-d2q exported/anchor-1b-stage1
    python experiments/export.py output/stage_II/Llama-3.2-1B-Instruct-stage1-2000steps-stage2 exported/anchor-1b \
        --task_to_instructions_fp test_configs/mteb/task_to_instructions.json --results results/anchor-1b
"""

from llm2vec.cli import run_command
from llm2vec.commands.models.export import main

if __name__ == "__main__":
    run_command(main)
