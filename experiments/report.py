r"""`llm2vec report`: tables and figures of evaluated runs, the paper beside them.

    python experiments/report.py results/anchor-1b results/baseline-1b --names anchor baseline \
        --paper_model LLaMA-3.2-1B-Instruct --output_dir output/report
"""

from llm2vec.cli import run_command
from llm2vec.commands.report import main

if __name__ == "__main__":
    run_command(main)
