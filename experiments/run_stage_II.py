r"""`llm2vec stage-2`: Stage II and the baseline, contrastive learning with LoRA.

    torchrun --nproc_per_node=8 experiments/run_stage_II.py \
        train_configs/stage_II/MetaLlama3.2_1b_stage1_2000steps_stage2.json
    torchrun --nproc_per_node=8 experiments/run_stage_II.py train_configs/baseline/MetaLlama3.2_1b_baseline_stage2.json
    python experiments/run_stage_II.py train_configs/quickstart/stage_II.json    # one process, CPU included
"""

from llm2vec.cli import run_command
from llm2vec.commands.train import stage_2

if __name__ == "__main__":
    run_command(stage_2)
