"""What an anchor tells: generate the text on the other side from a text's embedding alone, or score how much is there.

    python experiments/reconstruct.py output/stage_I/... "who wrote Emma?" --from query
    python experiments/reconstruct.py output/stage_I/... "Emma is a novel." --from document --sample --num 3
    python experiments/reconstruct.py output/stage_I/... "Emma is a novel." --from document --target "who wrote Emma?"
    python experiments/reconstruct.py output/stage_I/... --file corpus.jsonl --from document --output expanded.jsonl
    python experiments/reconstruct.py output/stage_I/... --score held_out.jsonl --instruction "Given a question, ..."

CHECKPOINT is a Stage I folder, or a Stage II folder, whose adapter goes on the base that it names. --file reads
objects with `query` or `positive`, as training rows have them, or `text`, and adds a list `generated`. --score takes
training rows, a folder with corpus.jsonl, queries.jsonl and qrels/test.jsonl, or a Stage I config with `num_eval_rows`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from llm2vec.cli import user_errors_in_one_sentence
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source
from llm2vec.evaluation.files import retrieval_set_of
from llm2vec.files import write_json
from llm2vec.probes.reconstruction import (
    Reconstructor,
    Sampling,
    expand_file,
    legend,
    load_reconstructor,
    printable,
    read_texts,
    render,
    written,
)
from llm2vec.probes.reconstruction_probe import ReconstructionProbe, as_json, as_table
from llm2vec.train.config_file import load_config
from llm2vec.train.rows import open_rows
from llm2vec.types import Example, InstructedText, UserError

#: Options that do nothing in some modes, with those in which they do something.
MODES = {
    "side": ("text", "file"), "max_new_tokens": ("text", "file"), "sample": ("text", "file"), "target": ("text",),
    "batch_size": ("file",), "output": ("file", "score"), "num_rows": ("score",), "seed": ("text", "file", "score"),
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what would have no effect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="decode this text's anchor")
    parser.add_argument("--file", type=Path, metavar="JSONL", help="decode the anchors of a file's texts")
    parser.add_argument("--score", type=Path, metavar="ROWS", help="score the reconstruction of held-out rows")
    parser.add_argument("--from", dest="side", choices=["query", "document"], help="what TEXT is (default: query)")
    parser.add_argument("--instruction", help="of the queries, as in training (default: none)")
    parser.add_argument("--target", help="the true counterpart of TEXT: score it token by token")
    parser.add_argument("--max_new_tokens", type=int, help="where a generated text ends at the latest (default: 32)")
    parser.add_argument("--sample", action="store_true", default=None, help="draw tokens (default: the likeliest)")
    parser.add_argument("--temperature", type=float, help="of --sample (default: 1.0)")
    parser.add_argument("--top_p", type=float, help="of --sample (default: 0.95)")
    parser.add_argument("--num", type=int, help="texts that --sample draws (default: 1)")
    parser.add_argument("--seed", type=int, help="of --sample and of --score's random anchors (default: 42)")
    parser.add_argument("--batch_size", type=int, help="texts of --file at once (default: 32)")
    parser.add_argument("--num_rows", type=int, help="most rows of a source to --score (default: 256)")
    parser.add_argument("--output", type=Path, help="what --file writes, or a JSON file for the figures of --score")
    parser.add_argument("--torch_dtype", choices=["auto", "float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a CUDA device where there is one)")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, have no effect or are out of range."""
    given = [name for name in ("text", "file", "score") if getattr(args, name) is not None]
    if len(given) != 1:
        raise UserError("give one of TEXT, --file and --score.")
    for name, modes in MODES.items():
        if getattr(args, name) is not None and given[0] not in modes:
            option = {"side": "from"}.get(name, name)
            raise UserError(f"--{option} has no effect with {'TEXT' if given == ['text'] else f'--{given[0]}'}.")
    for name in ("temperature", "top_p", "num"):
        if getattr(args, name) is not None and not args.sample:
            raise UserError(f"--{name} has no effect without --sample.")
    for name in ("max_new_tokens", "num", "batch_size", "num_rows", "temperature", "top_p"):
        value = getattr(args, name)
        if value is not None and (not 0 < value < float("inf") or (name == "top_p" and value > 1)):
            raise UserError(f"--{name} is {value:g}; above 0{' and at most 1' if name == 'top_p' else ''} is needed.")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; a number from 0 to {2**32 - 1} is needed.")
    if args.file is not None and args.output is None:
        raise UserError("--file needs --output, the file to write.")
    if args.output is not None and args.output.exists():
        raise UserError(f"--output: {args.output} exists; remove it or choose another.")
    if args.output is not None and not args.output.parent.is_dir():
        raise UserError(f"--output: there is no folder {args.output.parent}.")
    if args.text is not None and not args.text.strip():
        raise UserError("TEXT is empty.")
    if args.target is not None and not args.target.strip():
        raise UserError("--target is empty.")


def main() -> None:
    """Check what there is to read, load the checkpoint, and do one of three things."""
    args = parse_args()
    args.seed = 42 if args.seed is None else args.seed
    set_seed(args.seed)
    rows = read_rows(args) if args.score else ()
    if args.file and not sum(1 for _ in read_texts(args.file, args.side or "query")):
        raise UserError(f"--file: {args.file} is empty.")
    reconstructor = load_reconstructor(args.checkpoint, args.torch_dtype, args.device)
    if args.score:
        score(args, reconstructor, rows)
    else:
        generate(args, reconstructor)


def generate(args: argparse.Namespace, reconstructor: Reconstructor) -> None:
    """Decode one text's anchor, or those of a file."""
    side = args.side or "query"
    sampling = Sampling(args.temperature or 1.0, args.top_p or 0.95, args.num or 1) if args.sample else None

    def counterparts(texts: Sequence[str]) -> list[list[str]]:
        sources = [written(side, text, args.instruction or "") for text in texts]
        return reconstructor.generate(sources, args.max_new_tokens or 32, sampling)

    if args.file:
        expand_file(args.file, args.output, side, counterparts, args.batch_size or 32)
        return
    for text in counterparts([args.text])[0]:
        print(printable(text))
    if args.target is not None:
        score_target(args, reconstructor, side)


def score_target(args: argparse.Namespace, reconstructor: Reconstructor, side: Any) -> None:
    """Show how well each token of the true counterpart is predicted."""
    other = "document" if side == "query" else "query"
    goal = side if reconstructor.objective.directions[0].goal == "query" else other  # target `self`: the text itself
    instruction = args.instruction or ""
    tokens = reconstructor.score(written(side, args.text, instruction), written(goal, args.target, instruction))
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"\n{render(tokens, coloured)}")
    if coloured:
        print(f"\n{legend()}")
    loss = sum(token.loss for token in tokens) / len(tokens)
    print(f"mean loss {loss:.3f} nats over {len(tokens)} tokens of the target")


def read_rows(args: argparse.Namespace) -> Sequence[Example]:
    """The held-out rows to score, at most --num_rows of each source."""
    rows: Any
    if args.score.is_dir():
        rows = pairs_of(args.score, args.instruction or "")
    elif args.score.suffix == ".jsonl":
        source = Source(args.score.stem, args.score.name, (Instruction(args.instruction or ""),))
        rows = TrainingRows(args.score.parent, [source], num_negatives=0)
    elif args.instruction is not None:
        raise UserError("--instruction has no effect with a config, whose sources have their own.")
    else:
        config = load_config(args.score, "stage_I")
        if not config.num_eval_rows:
            raise UserError(
                f"{args.score}: num_eval_rows is 0, so every row is trained on; give held-out rows instead."
            )
        rows = open_rows(config, num_negatives=0).held_out()
    if not len(rows):
        raise UserError(f"--score: {args.score} has no query with a relevant document.")
    if args.instruction is None and args.score.suffix != ".json":
        sys.stderr.write("note: queries go without an instruction; a model trained with one needs --instruction.\n")
    kept: dict[str, list[Example]] = {}
    for i in range(len(rows)):
        row = rows[i]
        of_source = kept.setdefault(row.source, [])
        if len(of_source) < (args.num_rows or 256):
            of_source.append(row)
    return [row for of_source in kept.values() for row in of_source]


def pairs_of(folder: Path, instruction: str) -> list[Example]:
    """The queries of a retrieval set, each with its first relevant document."""
    retrieval = retrieval_set_of(folder)
    documents = {row["id"]: f"{row['title']} {row['text']}".strip() for row in retrieval.corpus}
    pairs = []
    for query in retrieval.queries:
        relevant = [i for i, grade in retrieval.relevant[query["id"]].items() if grade > 0 and i in documents]
        if relevant:
            positive = InstructedText("", documents[relevant[0]], "document")
            pairs.append(Example(folder.name, InstructedText(instruction, query["text"]), positive, ()))
    return pairs


def score(args: argparse.Namespace, reconstructor: Reconstructor, rows: Sequence[Example]) -> None:
    """Print the table of a held-out set, and write its figures."""
    figures = ReconstructionProbe(reconstructor.objective, reconstructor.tokenizer, rows, args.seed).figures()
    print(f"{args.checkpoint}: {len(rows)} rows of {args.score}, seed {args.seed}\n\n{as_table(figures)}")
    if args.output:
        origin = {"checkpoint": args.checkpoint, "data": str(args.score), "rows": len(rows), "seed": args.seed}
        write_json(args.output, {**origin, "figures": as_json(figures)})


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        main()
