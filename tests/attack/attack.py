"""Thousands of odd inputs for the commands: each must end well, with the right numbers, or in exactly one sentence.

    python -m tests.attack.attack                    # all cases, the table at the end
    python -m tests.attack.attack --share 0.1 --kinds index resume

A case is a folder that something is done to, and a command that is run there, in a process of its own (forked, so that
a crash, a hang or a full memory is one case's). It has held if the command ends with exit code 0 and what it made is
as it was without the damage, or with 1 or 2 and one line `error: ...`, and no traceback. `cases` says what is tried.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

#: What a case may take.
SECONDS, MEMORY = 60, 12 << 30


class Case(NamedTuple):
    """One thing that is tried.

    Attributes:
        kind: of the table.
        what: is done, in words.
        folder: name of the folder below the inputs that a copy is made of; empty = a new one.
        damage: does it, given the copy.
        run: ends as a command does; given the copy.
        wrong: what is wrong with an exit code of 0, if something is; given the copy and what was printed.
        finds: whether the command says by exit code 1 that it has found something.
    """

    kind: str
    what: str
    folder: str
    damage: Callable[[Path], object]
    run: Callable[[Path], object]
    wrong: Callable[[Path, str], str | None] = lambda folder, printed: None
    finds: bool = False


class Ending(NamedTuple):
    """How a case ended: whether it has held, and what it said, or what is wrong."""

    held: bool
    said: str


def command(*argv: object) -> Callable[[Path], object]:
    """A `llm2vec` command line, run in the case's folder."""

    def run(folder: Path) -> object:
        from llm2vec.__main__ import start

        sys.argv = ["llm2vec", *(str(one) for one in argv)]
        return start()

    return run


def ending(case: Case, inputs: Path) -> Ending:
    """Try a case."""
    work = Path(tempfile.mkdtemp(prefix="attack-"))
    folder, out = work / "here", work / "out"
    try:
        if case.folder:
            shutil.copytree(inputs / case.folder, folder, symlinks=True)
        else:
            folder.mkdir()
        code = in_a_process(case, folder, out)
        return _judge(case, folder, code, out.read_bytes().decode(errors="replace"))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def in_a_process(case: Case, folder: Path, out: Path) -> int | None:
    """Run a case in its folder: the exit code, a signal as a negative number; None after `SECONDS`."""
    child = os.fork()
    if not child:
        _be_the_process(case, folder, out)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _be_the_process(case: Case, folder: Path, out: Path) -> None:
    code = 99
    try:
        os.setpgid(0, 0)
        stream = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(stream, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115
        os.environ["HOME"] = str(folder.parent)
        os.chdir(folder)
        case.damage(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        case.run(folder)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                code = 99
        os._exit(code)


def _judge(case: Case, folder: Path, code: int | None, printed: str) -> Ending:
    errors = re.findall(r"(?:^|[\n\r\]])(error: [^\n]*)", printed)  # perhaps behind a progress bar
    if code is None:
        return Ending(False, f"no end within {SECONDS} s")
    if code < 0:
        return Ending(False, f"ended by {signal.Signals(-code).name}")
    if "Traceback (most recent call last)" in printed or code == 99:
        lines = [
            line for line in printed.strip().splitlines() if re.match(r"\w[\w.]*(Error|Exception|Warning)\b", line)
        ]
        return Ending(False, f"traceback: {(lines or printed.strip().splitlines() or ['?'])[-1][:100]}")
    if code == 0 or (code == 1 and case.finds):
        try:
            wrong = case.wrong(folder, printed)
        except Exception as error:
            wrong = f"what it made cannot be read ({type(error).__name__})"
        return Ending(wrong is None, "" if wrong is None else f"exit code 0, and {wrong}")
    if code in (1, 2) and len(errors) == 1:
        return Ending(True, errors[0])
    return Ending(False, f"exit code {code} and {len(errors)} sentences")


def shape(sentence: str) -> str:
    """A sentence without what it quotes of the input."""
    quoted = r"'.*'|\".*\"|\[.*\]|\{.*\}|\(.*\)|/\S+|[+-]?\d\S*|\b(None|True|False|nan|inf)\b"
    return re.sub(quoted, "_", sentence)[:80]


def attack(cases: Sequence[Case], inputs: Path, say: Callable[[str], object]) -> dict[str, tuple[int, int]]:
    """Try all cases and print the table; kind -> how many were tried, how many have held."""
    tried: Counter[str] = Counter()
    held: Counter[str] = Counter()
    sentences: defaultdict[str, set[str]] = defaultdict(set)
    failures: defaultdict[str, list[str]] = defaultdict(list)
    for case in cases:
        end = ending(case, inputs)
        tried[case.kind] += 1
        held[case.kind] += end.held
        if tried.total() % 100 == 0:
            sys.stderr.write(f"{tried.total():,} tried, {held.total():,} of them held\n")
        if end.held:
            sentences[case.kind] |= {shape(end.said)} - {""}
        else:
            failures[shape(end.said)].append(f"{case.kind}: {case.what[:150]}: {end.said}")
    say("| kind | tried | held | distinct sentences |\n| --- | --- | --- | --- |")
    for kind in tried:
        say(f"| {kind} | {tried[kind]:,} | {held[kind]:,} | {len(sentences[kind])} |")
    distinct = len(set().union(*sentences.values()))
    say(f"| all | {tried.total():,} | {held.total():,} | {distinct} |")
    for which in sorted(failures.values(), key=len, reverse=True):
        say(f"{len(which):5}  {which[0]}")
    return {kind: (tried[kind], held[kind]) for kind in tried}


def main(argv: Sequence[str]) -> int:
    """Make the inputs, try the cases, print; returns 1 where one has not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, evenly spaced (1)")
    parser.add_argument("--kinds", nargs="+", help="only these")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does: tests import each other by bare names
    from tests.attack.cases import all_cases, make_inputs

    with tempfile.TemporaryDirectory(prefix="attack-inputs-") as folder:
        inputs = make_inputs(Path(folder))
        chosen = list(sample(all_cases(inputs), args.share, args.kinds))
        counts = attack(chosen, inputs, lambda line: sys.stdout.write(f"{line}\n"))
    return int(any(held < tried for tried, held in counts.values()))


def sample(cases: Sequence[Case], share: float, kinds: Sequence[str] | None = None) -> Iterator[Case]:
    """Evenly spaced cases of some kinds."""
    taken = 0.0
    for case in cases:
        if kinds is None or case.kind in kinds:
            taken += share
            if taken >= 1:
                taken -= 1
                yield case


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
