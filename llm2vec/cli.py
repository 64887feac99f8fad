"""What all commands share: a user's mistake told in one sentence, what is logged, what is printed, and flags.

This loads no torch. Where a run of several processes needs more (to leave together, to speak once), torch is there
already; `llm2vec.processes` looks.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from llm2vec.files import as_path, file_error
from llm2vec.processes import is_first_process, is_of_lost_process, local_rank, rank, shut_down
from llm2vec.table import Table
from llm2vec.types import RunEnds, UserError, first_line

#: How long a process waits with what the first one of its machine may say for it. On a machine under load that one may
#: come to the same mistake many seconds later; once it has, torchrun ends the others within seconds.
SECONDS_BEHIND_THE_FIRST = 60.0
#: Set for a command, before the libraries that read them at their import: no progress bars of the hub, transformers and
#: datasets; a bar that is full leaves no line.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_LEAVE": ""}


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command on this process's arguments; ends the process where its exit code, None for 0, is not 0."""
    with user_errors_in_one_sentence():
        code = main(sys.argv[1:])
    if code:
        raise SystemExit(code)


@contextmanager
def user_errors_in_one_sentence() -> Iterator[None]:
    """Around a command: sets up logging first, and leaves the process group at the end.

    What ends a command early becomes an exit code: a `UserError`, printed as `error: ...`, 2; so does a file that
    cannot be read or written, whichever library says so; a `RunEnds` its own; Ctrl-C 130; a reader of standard output
    that went away 141. Where another process of the run is lost, this one ends with 1.
    """
    set_up_logging()
    _print_what_the_terminal_lacks()
    try:
        yield
        sys.stdout.flush()
        shut_down()
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would say it again at its end
        code = 128 + signal.SIGPIPE
    except UserError as error:
        _say_error(str(error))
        code = 2
    except RunEnds as end:
        _say_end(end)
        code = end.code
    except KeyboardInterrupt:  # where no run is under way, which would save first (`StopSignals`)
        _say_once("interrupted")
        code = 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, RuntimeError) and is_of_lost_process(error):
            _end_without_the_others(error)
        if (reason := file_error(error)) is None:
            raise
        _say_error(reason)
        code = 2
    else:
        return
    raise SystemExit(code)


def _print_what_the_terminal_lacks() -> None:
    """A letter that standard output cannot show is written as an escape, `\\xe9`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # of a program that this one runs in
                stream.reconfigure(errors="backslashreplace")


def set_up_logging() -> None:
    """What the package says goes to stderr, what libraries say from WARNING on; of all but the first process, errors.

    Where the root logger has handlers already, as in a notebook, they decide. Libraries' progress bars are off, unless
    the environment has LLM2VEC_VERBOSE=1.
    """
    if os.environ.get("LLM2VEC_VERBOSE", "0") in ("", "0"):
        for switch, value in QUIET.items():
            os.environ.setdefault(switch, value)
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING if is_first_process() else logging.ERROR, format="%(message)s")
        logging.getLogger("llm2vec").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # an unreachable hub is said in one sentence
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft uses its older names


def _say_error(text: str) -> None:
    """Print an error that this process met; most are met by all of them.

    The first process of a machine says it at once, and torchrun then ends the others, which wait; one that alone met it
    lives to say it. Without a text, another process has it.
    """
    if not text:
        return
    if local_rank() > 0:
        time.sleep(SECONDS_BEHIND_THE_FIRST)
    process = "" if is_first_process() else f"process {os.environ['RANK']}: "
    sys.stderr.write(f"error: {process}{text}\n")


def _say_end(end: RunEnds) -> None:
    """Print why a run is over; if all is well, leave together."""
    if end.code:
        _say_error(str(end))
    else:
        _say_once(str(end))
        shut_down()


def _say_once(text: str) -> None:
    if is_first_process():
        sys.stderr.write(f"{text}\n")


def _end_without_the_others(error: RuntimeError) -> NoReturn:
    """End where another process is lost: to leave the group in order would be to wait for it."""
    sys.stderr.write(f"error: process {rank()}: another process of the run ended or hangs ({first_line(error)}).\n")
    os._exit(1)


# --- what is printed ---


class Printer:
    """What a command prints. `as_json` (`--json`): each table is a line of JSON, and all else goes to standard error.

    Example:
        >>> Printer(as_json=True).table(Table(["Run", "Score"], [["anchor", 46.0]]))
        {"title": "", "rows": [{"Run": "anchor", "Score": 46.0}], "note": ""}
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def say(self, *lines: str) -> None:
        """Print lines."""
        print(*lines, sep="\n", file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def table(self, table: Table, text: str | None = None) -> None:
        """Print a table; `text` is how it looks on a terminal, where not as tables do."""
        if text is None:
            text = table.text()
        shown = json.dumps(table.record(), ensure_ascii=False) if self.as_json else text
        sys.stdout.write(f"{shown}\n")
        sys.stdout.flush()


# --- flags ---


def parser(command: str, doc: str | None, prints_tables: bool = False) -> argparse.ArgumentParser:
    """The parser of a command, named as behind `llm2vec`, to which it adds its flags; its module's docstring is the
    help. One that `prints_tables` takes `--json`, for its `Printer`."""
    made = _Parser(
        prog=f"llm2vec {command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if prints_tables:
        add_json_flag(made)
    return made


def add_json_flag(to: argparse.ArgumentParser) -> None:
    """`--json`, for a command, or one of its own commands, whose output is a table."""
    to.add_argument("--json", action="store_true", help="print each table as a line of JSON, all else to stderr")


class _Parser(argparse.ArgumentParser):
    """Tells a mistake as every other one is told, in one sentence and without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        flag, _, rest = message.removeprefix("argument ").partition(": ")
        if rest.startswith("is "):  # of `positive`: with the flag before it, a sentence
            raise UserError(f"{flag} {rest}")
        raise UserError(f"{message.removeprefix('argument ').rstrip('.')}; see {self.prog} --help.")


def positive(text: str) -> int:
    """A whole number above 0: `type=positive` of a flag."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; give a whole number above 0.") from None
    if not 0 < number < 2**63:
        raise argparse.ArgumentTypeError(f"is {number if number < 1 else 'too large'}; give a number above 0.")
    return number


def positive_float(text: str) -> float:
    """A finite number above 0: `type=positive_float` of a flag."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; give a number above 0.") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"is {number:g}; give a number above 0.")
    return number


def plain(text: str) -> str:
    """Text without the control characters that a terminal would obey; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def path(text: str) -> Path:
    """A file or folder, which need not be there: `type=path` of a flag."""
    try:
        return as_path(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
