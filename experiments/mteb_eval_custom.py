r"""`llm2vec eval`: score an embedding model on MTEB, under the release's name and flags.

    python experiments/mteb_eval_custom.py \
        --base_model_name_or_path meta-llama/Llama-3.2-1B-Instruct \
        --peft_model_name_or_path output/stage_II \
        --task_name STS16 \
        --task_to_instructions_fp test_configs/mteb/task_to_instructions.json \
        --output_dir results
"""

from llm2vec.cli import run_command
from llm2vec.commands.evaluate import main

if __name__ == "__main__":
    run_command(main)
