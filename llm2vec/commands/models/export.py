r"""Turn a checkpoint into a plain folder for sentence-transformers, transformers, vLLM, text-embeddings-inference.

    llm2vec export output/stage_I/Llama-3.2-1B-Instruct-q2d-d2q exported/anchor-1b-stage1
    llm2vec export output/stage_II/Llama-3.2-1B-Instruct-stage1-2000steps-stage2 exported/anchor-1b \
        --task_to_instructions_fp test_configs/mteb/task_to_instructions.json --results results/anchor-1b

Adapters are merged in float32 and the weights rounded once. The folder is loaded by stock sentence-transformers and
compared with the checkpoint before it gets its name. `--adapter` adds the LoRA adapter alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from llm2vec import cli
from llm2vec.choice import ModelChoice, add_model_flags, chosen_model
from llm2vec.hub import upload, without_waiting_for_the_hub


def main(argv: Sequence[str]) -> None:
    """Export, prove, say what came of it, upload."""
    parser = cli.parser("export", __doc__)
    add_model_flags(parser, positional=True)
    parser.add_argument("out", type=cli.path, metavar="OUT", help="folder to write; must not be there, or be empty")
    parser.add_argument("--base", help="base of an adapter, where it is not to be had under its recorded name")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--doc_max_length", type=int, help="most tokens of a text, in place of the checkpoint's own")
    parser.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone, too, to OUT/adapter")
    parser.add_argument("--base_id", metavar="HUB_ID[@REVISION]", help="hub name of the base")
    prompts = "a prompt for each: name -> instruction; that of `query` is the default"
    parser.add_argument("--task_to_instructions_fp", metavar="FILE", help=prompts)
    parser.add_argument("--results", type=cli.path, metavar="FOLDER", help="mteb results for the card")
    parser.add_argument("--license", help="for the card, such as llama3.2")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload to this repository")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")
    args = parser.parse_args(argv)
    from llm2vec.evaluation.files import load_instructions  # with torch: seconds
    from llm2vec.export.export import Export, export
    from llm2vec.reports.results import read_results

    model = chosen_model(args)
    what = Export(
        model if args.base is None else ModelChoice(args.base, (model.base, *model.adapters)),
        dtype=args.dtype,
        doc_max_length=args.doc_max_length,
        adapter=args.adapter,
        base_id=args.base_id,
        instructions=load_instructions(args.task_to_instructions_fp) if args.task_to_instructions_fp else {},
        results=read_results(args.results) if args.results else None,
        license=args.license,
        repository=args.push_to_hub,
    )
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    with without_waiting_for_the_hub():
        proof = export(what, args.out)
    print(*proof.sentences(args.out, args.dtype), sep="\n")
    if args.push_to_hub:
        print(f"uploaded to {upload(args.out, args.push_to_hub, args.private)}")
