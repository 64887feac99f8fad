r"""`llm2vec encode`: encode a whole corpus to Parquet files of vectors.

    python experiments/encode_corpus.py corpus.jsonl output/vectors --model output/stage_II/...
    python experiments/encode_corpus.py BeIR/scifact output/scifact --subset corpus --split corpus --id_column _id \
        --model ... --torch_dtype bfloat16 --dtype float16
"""

from llm2vec.cli import run_command
from llm2vec.commands.encode import main

if __name__ == "__main__":
    run_command(main)
