"""What an anchor tells: write the text on the other side from a text's embedding alone, or score how much is there.

    llm2vec reconstruct output/stage_I/... "who wrote Emma?" --from query
    llm2vec reconstruct output/stage_I/... "Emma is a novel." --from document --sample --num 3
    llm2vec reconstruct output/stage_I/... "Emma is a novel." --from document --target "who wrote Emma?"
    llm2vec reconstruct output/stage_I/... --score held_out.jsonl --instruction "Given a question, ..."

MODEL is a Stage I folder, or MODEL+ADAPTER; a Stage II folder alone brings along the base that it names. --score takes
training rows (.jsonl), or a folder with corpus.jsonl, queries.jsonl and qrels/test.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm2vec import cli
from llm2vec.choice import ModelChoice
from llm2vec.files import alone_beside
from llm2vec.types import Example, InstructedText, TextSide, UserError

if TYPE_CHECKING:
    from llm2vec.probes.reconstruction import Reconstructor

#: Flags that say something of a TEXT only, and of --score only.
_OF_TEXT = ("from", "target", "max_new_tokens", "sample", "temperature", "top_p", "num")
_OF_SCORE = ("num_rows", "output")


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line, and refuse what would have no effect."""
    parser = cli.parser("reconstruct", __doc__)
    parser.add_argument("model", type=ModelChoice.parse, metavar="MODEL", help="a checkpoint, or MODEL+ADAPTER")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="decode this text's anchor")
    parser.add_argument("--score", type=cli.path, metavar="ROWS", help="score the reconstruction of held-out rows")
    parser.add_argument("--from", choices=["query", "document"], help="what TEXT is (default: query)")
    parser.add_argument("--instruction", help="of the queries, as in training (default: none)")
    parser.add_argument("--target", help="the true counterpart of TEXT: score it token by token")
    parser.add_argument("--max_new_tokens", type=cli.positive, help="where a text ends at the latest (default: 32)")
    parser.add_argument("--sample", action="store_true", default=None, help="draw tokens (default: the likeliest)")
    parser.add_argument("--temperature", type=cli.positive_float, help="of --sample (default: 1.0)")
    parser.add_argument("--top_p", type=cli.positive_float, help="of --sample (default: 0.95)")
    parser.add_argument("--num", type=cli.positive, help="texts that --sample draws (default: 1)")
    parser.add_argument("--seed", type=int, default=42, help="of --sample and --score's random anchors (42)")
    parser.add_argument("--num_rows", type=cli.positive, help="most rows to --score (default: 256)")
    parser.add_argument("--output", type=cli.path, help="a JSON file for the figures of --score")
    parser.add_argument("--torch_dtype", choices=["auto", "float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a CUDA device where there is one)")
    args = parser.parse_args(argv)
    if (args.text is None) == (args.score is None):
        raise UserError("give one of TEXT and --score.")
    what, others = ("TEXT", _OF_SCORE) if args.score is None else ("--score", _OF_TEXT)
    if unused := [name for name in others if getattr(args, name) is not None]:
        raise UserError(f"--{unused[0]} has no effect with {what}.")
    if not args.sample and (unused := [n for n in ("temperature", "top_p", "num") if getattr(args, n) is not None]):
        raise UserError(f"--{unused[0]} has no effect without --sample.")
    if args.top_p is not None and args.top_p > 1:
        raise UserError(f"--top_p is {args.top_p:g}; above 0 and at most 1 is needed.")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; a number from 0 to {2**32 - 1} is needed.")
    if args.output is not None and args.output.exists():
        raise UserError(f"--output: {args.output} exists; remove it or choose another.")
    if args.output is not None and not args.output.parent.is_dir():
        raise UserError(f"--output: there is no folder {args.output.parent}.")
    for name, text in (("TEXT", args.text), ("--target", args.target)):
        if text is not None and not text.strip():
            raise UserError(f"{name} is empty.")
    return args


def main(argv: Sequence[str]) -> None:
    """Check what there is to read, load the checkpoint, and generate or score."""
    args = _parse_args(argv)
    with alone_beside(args.output, "reconstruct") if args.output else nullcontext():
        _reconstruct(args)


def _reconstruct(args: argparse.Namespace) -> None:
    rows = _held_out_rows(args.score, args.instruction, args.num_rows or 256) if args.score else ()
    from transformers import set_seed  # with torch: seconds

    from llm2vec.probes.reconstruction import load_reconstructor

    set_seed(args.seed)
    reconstructor = load_reconstructor(replace(args.model, torch_dtype=args.torch_dtype), args.device)
    if not args.score:
        return _write_text(args, reconstructor)
    from llm2vec.files import write_json
    from llm2vec.probes.reconstruction_probe import ReconstructionProbe, as_table

    figures = ReconstructionProbe(reconstructor.objective, reconstructor.tokenizer, rows, args.seed).figures()
    print(f"{args.model.place}: {len(rows)} rows of {args.score}, seed {args.seed}\n\n{as_table(figures)}")
    if args.output:
        origin = {"checkpoint": args.model.place, "data": str(args.score), "rows": len(rows), "seed": args.seed}
        write_json(args.output, {**origin, "figures": [figure._asdict() for figure in figures]})


def _write_text(args: argparse.Namespace, reconstructor: Reconstructor) -> None:
    """Print what stands behind a text's anchor, and how well each token of the true counterpart is predicted there."""
    from llm2vec.probes.reconstruction import Sampling, text_of_side

    side: TextSide = getattr(args, "from") or "query"
    instruction = args.instruction or ""
    text = text_of_side(side, args.text, instruction)
    sampling = Sampling(args.temperature or 1.0, args.top_p or 0.95, args.num or 1) if args.sample else None
    for generated in reconstructor.generate([text], args.max_new_tokens or 32, sampling)[0]:
        print(cli.plain(generated))
    if args.target is None:
        return
    other: TextSide = "document" if side == "query" else "query"
    goal = side if reconstructor.objective.directions[0].goal == "query" else other  # target `self`: the text itself
    tokens = reconstructor.score(text, text_of_side(goal, args.target, instruction))
    print("\n" + " ".join(f"{cli.plain(token.text.strip())}[{token.loss:.2f}]" for token in tokens))
    loss = sum(token.loss for token in tokens) / len(tokens)
    print(f"mean loss {loss:.3f} nats over {len(tokens)} tokens of the target")


def _held_out_rows(path: Path, instruction: str | None, most: int) -> Sequence[Example]:
    """The first of a file's training rows, or of a retrieval set's queries, each with its first relevant document."""
    from llm2vec.data.rows import TrainingRows
    from llm2vec.data.sources import Instruction, Source
    from llm2vec.evaluation.files import retrieval_set_of

    if instruction is None:
        sys.stderr.write("note: queries go without an instruction; a model trained with one needs --instruction.\n")
    if not path.is_dir():
        source = Source(path.stem, path.name, (Instruction(instruction or ""),))
        rows = TrainingRows(path.parent, [source], num_negatives=0, max_rows=most)
        return [rows[i] for i in range(len(rows))]
    retrieval = retrieval_set_of(path)
    documents = {row["id"]: f"{row['title']} {row['text']}".strip() for row in retrieval.corpus}
    pairs = []
    for query in retrieval.queries:
        relevant = [i for i, grade in retrieval.relevant[query["id"]].items() if grade > 0 and i in documents]
        if relevant:
            positive = InstructedText("", documents[relevant[0]], "document")
            pairs.append(Example(path.name, InstructedText(instruction or "", query["text"]), positive, ()))
    if not pairs:
        raise UserError(f"--score: {path} has no query with a relevant document.")
    return pairs[:most]
