"""What becomes of anchors in the decoding pass: whether position 0 is an attention sink, where all of them are alike.

    python -m benchmarks.attention_sink CHECKPOINT QUERIES.jsonl --instruction "Given a question, ..."

A row for the texts' anchors at position 0, one for the same anchors behind a BOS, and the same two for the texts' last
words. Of each: the mean cosine of two inputs, and behind some layers the mean norm of the states and the mean cosine of
two texts' states. The texts are the first 16 of a JSON lines file with the field `text`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llm2vec.choice import ModelChoice
from llm2vec.cli import run_command
from llm2vec.files import json_lines
from llm2vec.probes.reconstruction import Reconstructor, embed_rows, load_reconstructor, text_of_side
from llm2vec.table import Cell, Table
from llm2vec.types import InstructedText, UserError

NUM_TEXTS = 16


def alike(states_BD: Tensor) -> float:
    """Mean cosine of two different rows."""
    cosines = cosine_similarity(states_BD.unsqueeze(0), states_BD.unsqueeze(1), dim=-1)
    return float(cosines[~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)].mean())


@torch.no_grad()
def sink_table(found: Reconstructor, texts: Sequence[InstructedText], layers: Sequence[int]) -> Table:
    """A row for each kind of input and place."""
    model, tokenizer = found.objective.decoding_model.base_model, found.tokenizer.tokenizer
    embeddings = model.get_input_embeddings()
    words = [tokenizer(" " + text.text.split()[-1], add_special_tokens=False)["input_ids"][0] for text in texts]
    device = embeddings.weight.device
    inputs = {
        "anchors": embed_rows(found.objective, found.tokenizer.rows(texts))[:, -1:],
        "words": embeddings(torch.tensor(words, device=device)).unsqueeze(1),
    }
    if tokenizer.bos_token_id is None:
        raise UserError("the tokenizer has no BOS token, behind which to look.")
    bos = embeddings(torch.full((len(texts), 1), tokenizer.bos_token_id, device=device))
    rows: list[list[Cell]] = []
    for name, input_B1D in inputs.items():
        for place, before in (("at position 0", []), ("behind a BOS", [bos])):
            embedded = torch.cat([*before, input_B1D], dim=1)
            states = model(inputs_embeds=embedded, output_hidden_states=True).hidden_states
            of_layers = [states[layer][:, -1] for layer in layers]
            figures = [cell for of in of_layers for cell in (f"{of.norm(dim=-1).mean():,.0f}", f"{alike(of):.3f}")]
            rows.append([f"{name} {place}", f"{alike(input_B1D[:, 0]):.3f}", *figures])
    header = ["input", "cosine", *[name for layer in layers for name in (f"norm at {layer}", f"cosine at {layer}")]]
    return Table(header, rows)


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Stage I checkpoint")
    parser.add_argument("texts", type=Path, help="JSON lines with the field `text`")
    parser.add_argument("--instruction", default="", help="that stands before each text")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 20])
    args = parser.parse_args(argv)
    lines = [str(content["text"]) for _, content in json_lines(args.texts)][:NUM_TEXTS]
    texts = [text_of_side("query", line, args.instruction) for line in lines]
    found = load_reconstructor(ModelChoice(args.model, torch_dtype="float32"))
    number = found.objective.model.config.num_hidden_layers
    if wrong := [layer for layer in args.layers if not 0 <= layer <= number]:
        raise UserError(f"--layers: {wrong[0]} is none of the model's; give numbers from 0 (the inputs) to {number}.")
    print(sink_table(found, texts, args.layers).text())


if __name__ == "__main__":
    run_command(main)
