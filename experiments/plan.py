r"""`llm2vec plan`: what a run will be, before anything loads.

    python experiments/plan.py train_configs/stage_I/MetaLlama3.2_1b_q2d_d2q.json --num_processes 8 --card A100-80GB
    python experiments/plan.py my_config.json --card_memory_gb 48 --card_tflops 180 --utilisation 0.3
    python experiments/plan.py train_configs/stage_II/MetaLlama3.2_1b_stage1_2000steps_stage2.json \
        --base meta-llama/Llama-3.2-1B-Instruct --tokens_query 24 --tokens_document 170 --card H200
"""

from llm2vec.cli import run_command
from llm2vec.commands.plan import main

if __name__ == "__main__":
    run_command(main)
