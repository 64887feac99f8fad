"""Look at training data before training on it: a table by source, and what test sets hold of it.

    python experiments/check_data.py cache/echo-data --tokenizer meta-llama/Llama-3.2-1B-Instruct
    python experiments/check_data.py my/folder --sources_file my_sources.json --test_sets mteb/nfcorpus mteb/sts12-sts

Every line is read by the rules of training. The files' hashes are recorded in FOLDER/hashes.json at the first use and
compared from then on. Exit code 1 if a line is bad or a file is empty or has changed, 0 otherwise; 2 for a mistake in
the command.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path

from llm2vec.cli import user_errors_in_one_sentence
from llm2vec.data.check import (
    OVERLAP_WORDS,
    CountTokens,
    SourceReport,
    TestTexts,
    check_source,
    language_of,
    record_hashes,
)
from llm2vec.data.sources import Source, archive_hint, e5_sources, read_sources_file, select_sources
from llm2vec.model.backbone import load_tokenizer
from llm2vec.train.rows import CHARACTERS_A_TOKEN
from llm2vec.types import UserError

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files lie")
    parser.add_argument("--sources_file", type=Path, help="table of one's own sources; default: the released archive's")
    parser.add_argument("--sources", nargs="+", help="only these")
    parser.add_argument("--tokenizer", help="folder or hub name; default: tokens are guessed, 4 characters each")
    parser.add_argument("--max_length", type=int, default=512, help="tokens at which training cuts (default 512)")
    parser.add_argument("--test_sets", nargs="+", type=Path, default=[], help="folders of test sets to look for")
    return parser.parse_args()


def main() -> int:
    """Check and print; returns the exit code."""
    arguments = parse_arguments()
    if arguments.max_length < 1:
        raise UserError(f"--max_length is {arguments.max_length}; it must be above 0.")
    table = e5_sources() if arguments.sources_file is None else read_sources_file(arguments.sources_file)
    sources = present(arguments.folder, select_sources(table, arguments.sources), arguments.sources)
    count_tokens = token_counter(arguments.tokenizer)
    test_texts = TestTexts(arguments.test_sets) if arguments.test_sets else None
    reports = []
    for source in sources:
        logger.info("reading %s", source.file)
        reports.append(check_source(source, arguments.folder, count_tokens, test_texts))
    for line in table_lines(reports, arguments.max_length, guessed=arguments.tokenizer is None):
        logger.info("%s", line)
    if test_texts is not None:
        for line in overlap_lines(reports, test_texts):
            logger.info("%s", line)
    differing = record_hashes(reports, arguments.folder / "hashes.json")
    empty = [f"{report.name}: its file has no rows." for report in reports if not report.rows + report.bad]
    problems = [error for report in reports for error in report.errors] + empty + differing
    for problem in problems:
        logger.info("%s", problem)
    return 1 if problems else 0


def present(folder: Path, sources: Sequence[Source], named: Sequence[str] | None) -> list[Source]:
    """The sources whose files are there; which are not is said, and refused where they were asked for by name."""
    there = [source for source in sources if (folder / source.file).is_file()]
    missing = ", ".join(source.file for source in sources if source not in there)
    if missing and (named or not there):
        raise UserError(f"{folder} lacks {missing}{archive_hint(sources)}.")
    if missing:
        logger.info("not there: %s", missing)
    return there


def token_counter(name: str | None) -> CountTokens:
    """Tokens by a tokenizer, or guessed from characters."""
    if name is None:
        return lambda texts: [len(text) // CHARACTERS_A_TOKEN for text in texts]
    tokenizer = load_tokenizer(name)
    return lambda texts: [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def table_lines(reports: Sequence[SourceReport], max_length: int, guessed: bool) -> list[str]:
    """A line a source, and what the columns mean."""
    lines = [
        f"{'source':24} {'rows':>10} {'bad':>6} {'twice':>7} {'query+':>7} {'q=p':>6} {'p=n':>6} {'no neg':>7} "
        f"{'query':>6} {'positive':>8} {'cut':>6}  languages (query; positive)"
    ]
    for report in reports:
        documents = report.tokens.get("positive", []) + report.tokens.get("negative", [])
        cut = sum(n > max_length for n in documents) / max(1, len(documents))
        lines.append(
            f"{report.name:24} {report.rows:>10,} {report.bad:>6,} {report.duplicates:>7,} "
            f"{report.repeated_queries:>7,} {report.query_is_positive:>6,} {report.positive_is_negative:>6,} "
            f"{report.without_negative:>7,} {_median(report, 'query'):>6} {_median(report, 'positive'):>8} "
            f"{cut:>6.1%}  {_languages(report, 'query')}; {_languages(report, 'positive')}"
        )
    tokens = "guessed from characters, 4 each" if guessed else "without the template's own"
    lines += [
        f"{'all':24} {sum(r.rows for r in reports):>10,} {sum(r.bad for r in reports):>6,}",
        "bad: lines that training refuses; twice: query and positive seen before; query+: query seen before",
        "q=p, p=n: query and positive, positive and a negative are one text; no neg: no hard negative",
        f"query, positive: median tokens ({tokens}); cut: documents of more than {max_length} of them; both and the "
        "languages from a sample",
    ]
    if language_of() is None:
        lines.append('languages: not looked at; pip install -e ".[data]"')
    return lines


def overlap_lines(reports: Sequence[SourceReport], test_texts: TestTexts) -> list[str]:
    """Rows of each source that a test set has a text of."""
    lines = [f"rows that share a text, or {OVERLAP_WORDS} words in a row, with a test set:"]
    for name, size in test_texts.sizes.items():
        found = ", ".join(
            f"{report.name} {report.overlap[name]:,} ({report.overlap[name] / report.rows:.2%})"
            for report in reports
            if report.overlap[name]
        )
        lines.append(f"  {name} ({size:,} texts): {found or 'none'}")
    return lines


def _median(report: SourceReport, field: str) -> str:
    counts = report.tokens.get(field)
    return f"{statistics.median(counts):.0f}" if counts else "-"


def _languages(report: SourceReport, field: str) -> str:
    languages = report.languages.get(field)
    if not languages:
        return "-"
    shares = [(code, count / languages.total()) for code, count in languages.most_common(3)]
    return " ".join(f"{code} {share:.0%}" for code, share in shares if share >= 0.01)


if __name__ == "__main__":
    with user_errors_in_one_sentence():
        code = main()
    raise SystemExit(code)
