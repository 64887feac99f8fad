"""Speed of encoding, side by side with sentence-transformers on the same weights and the same texts.

    python experiments/benchmark.py                     # what `make bench` runs; one thread, some minutes
    python experiments/benchmark.py --layers 2 --documents 32 --rounds 2

The model is a random Llama, the texts random words with the lengths of real queries and documents (lognormal; means of
about 24 and 170 tokens, at most 512). The two take turns within a round, and the ratio of their times in the same
round is what is reported: absolute times mean nothing on a shared machine.
"""

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerBase

from llm2vec import LLM2Vec
from llm2vec.tiny import train_tokenizer
from llm2vec.tokenization import render_instruction

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
BATCH_SIZE = 32


def main() -> None:
    """Make the model and the texts, time both libraries on each kind of text, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--queries", type=int, default=192)
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(3000)]
    tokenizer = train_tokenizer([f" {word}" for word in words], 8000)
    queries = [[INSTRUCTION, random_text(generator, words, 24, 12)] for _ in range(args.queries)]
    documents = [["", random_text(generator, words, 170, 90)] for _ in range(args.documents)]
    print(f"{args.layers} layers, width 512, float32, {args.threads} thread(s), batch size {BATCH_SIZE}, "
          f"{args.rounds} rounds\n{'texts':<26}{'tokens':>8}  {'times sentence-transformers (lowest, highest)':<48}"
          "lowest cosine")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = make_models(folder, tokenizer, args.layers)
        compare(f"{len(queries)} queries, instructed", ours, theirs, queries, args.rounds)
        compare(f"{len(documents)} documents", ours, theirs, documents, args.rounds)


def random_text(generator: random.Random, words: list[str], mean: float, deviation: float) -> str:
    """Random words, as many as a lognormal length of that mean and deviation says; nearly a token each."""
    variance = math.log(1 + (deviation / mean) ** 2)
    length = generator.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))
    return " ".join(generator.choices(words, k=max(3, min(480, round(length)))))


def make_models(
    folder: str, tokenizer: PreTrainedTokenizerBase, num_layers: int
) -> tuple[LLM2Vec, SentenceTransformer]:
    """The same random weights under both libraries."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ours = LLM2Vec.from_pretrained(
        folder, enable_bidirectional=False, pooling_mode="last", template="llama3", instruction_join="; "
    )
    transformer = Transformer(folder, max_seq_length=512)
    theirs = SentenceTransformer(modules=[transformer, Pooling(512, pooling_mode="lasttoken")], device="cpu")
    return ours, theirs


def compare(name: str, ours: LLM2Vec, theirs: SentenceTransformer, pairs: list[list[str]], rounds: int) -> None:
    """Time both in turns and print one line."""
    header = "<|start_header_id|>user<|end_header_id|>\n\n"
    rendered = [f"{header}{render_instruction(i, '; ')}{text}<|eot_id|>" for i, text in pairs]
    encode_ours = partial(ours.encode, pairs, batch_size=BATCH_SIZE, show_progress_bar=False)
    encode_theirs = partial(theirs.encode, rendered, batch_size=BATCH_SIZE, convert_to_tensor=True)
    cosine = torch.cosine_similarity(torch.as_tensor(encode_ours()), encode_theirs()).min()  # and a warm-up
    ratios = []
    for _ in range(rounds):
        seconds_ours, seconds_theirs = timed(encode_ours), timed(encode_theirs)
        ratios.append(seconds_theirs / seconds_ours)
    tokens = int(ours.tokenize(pairs)["attention_mask"].sum())
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
    print(f"{name:<26}{tokens:>8,}  {spread:<48}{cosine:.7f}")


def timed(function: Callable[[], Tensor]) -> float:
    """Seconds a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
