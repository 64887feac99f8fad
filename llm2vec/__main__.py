"""`llm2vec COMMAND ...`, and `python -m llm2vec COMMAND ...` where torchrun or a certain Python is to start it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from llm2vec import __version__
from llm2vec.cli import run_command
from llm2vec.types import UserError


class Command(NamedTuple):
    """One command."""

    module: str  #: of `llm2vec.commands`; loaded only when the command is asked for, as many load torch
    line: str  #: what it does
    function: str = "main"  #: of the module; takes the arguments and returns the exit code, None for 0


COMMANDS = {
    "stage-1": Command("train", "Stage I: reconstruct texts from vectors, all parameters", "stage_1"),
    "stage-2": Command("train", "Stage II and the baseline: contrastive learning with LoRA", "stage_2"),
    "lm": Command("train", "plain next-token training, the control to Stage I", "lm"),
    "mntp": Command("train", "LLM2Vec's first stage: masked next tokens", "mntp"),
    "simcse": Command("train", "LLM2Vec's unsupervised stage", "simcse"),
    "supervised": Command("train", "LLM2Vec's supervised stage, with upstream's configs", "supervised"),
    "plan": Command("plan", "what a run will be, before anything loads"),
    "eval": Command("evaluate", "score an embedding model on MTEB, or on retrieval sets of your own"),
    "encode": Command("encode", "encode a whole corpus to files of vectors"),
    "report": Command("report", "tables and figures of evaluated runs, the paper beside them"),
    "search": Command("search", "search in your own texts with a trained model"),
    "export": Command("models.export", "turn a checkpoint into a plain folder for other libraries"),
    "embedder": Command("embedder", "an embedder from a real language model, on your machine, in about an hour"),
    "adapt": Command("adapt", "an embedder of your domain from a folder of raw texts, end to end"),
    "base": Command("models.base", "fetch a small pretrained model, also where no hub is reached"),
    "merge": Command("models.merge", "one model of several checkpoints: mean or slerp of their weights"),
    "verify": Command("models.verify", "whether a model gives the same vectors however it is loaded"),
    "compare": Command("compare", "a set of recipes on the same data: train, evaluate, one table"),
    "reconstruct": Command("models.reconstruct", "write the other side's text from an anchor, or score what it tells"),
    "check-data": Command("data.check_data", "look at training data before training on it"),
    "hold-out": Command("data.hold_out", "split training data into rows to train on and queries to evaluate on"),
    "queries": Command("data.queries", "training pairs from raw text: passages, and a query written for each"),
    "answers": Command("data.answers", "a model's own answers to queries, as texts for Stage I to tell"),
    "mine": Command("data.mine", "hard negatives for training data: search, margin, reranker"),
    "schema": Command("schema", "print the JSON Schema of training configs, for editors"),
}


def help_text() -> str:
    """What `llm2vec --help` prints: a line a command."""
    width = max(map(len, COMMANDS))
    lines = [f"    {name:<{width}}  {command.line}" for name, command in COMMANDS.items()]
    more = ["llm2vec COMMAND --help says more; llm2vec --version.", "Begin with `llm2vec embedder`."]
    return "\n".join(["usage: llm2vec COMMAND ...", "", *lines, "", *more])


def main(argv: Sequence[str]) -> int | None:
    """Run one command; returns its exit code, None for 0. An unknown name is a `UserError`, with the nearest one."""
    name, *arguments = argv or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return None
    if name == "--version":
        print(f"llm2vec {__version__}")
        return None
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"there is no command {name!r}; {hint}llm2vec --help lists them.")
    command = COMMANDS[name]
    code: int | None = getattr(import_module(f"llm2vec.commands.{command.module}"), command.function)(arguments)
    return code


def start() -> None:
    """The console script `llm2vec`."""
    run_command(main)


if __name__ == "__main__":
    start()
