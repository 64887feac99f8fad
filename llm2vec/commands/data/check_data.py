"""Look at training data before training on it: a table by source, and what test sets hold of it.

    llm2vec check-data cache/echo-data --tokenizer meta-llama/Llama-3.2-1B-Instruct
    llm2vec check-data my/folder --sources_file my_sources.json --test_sets mteb/nfcorpus mteb/sts12-sts

Every record is read by the rules of training, whatever form its file has. The files' hashes are recorded in
FOLDER/hashes.json at the first use and compared from then on. Exit code 1 if a record is bad or a file is empty or has
changed, 0 otherwise; 2 for a mistake in the command.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

from llm2vec import cli
from llm2vec.commands.data import add_source_flags, chosen_sources
from llm2vec.data.check import (
    OVERLAP_WORDS,
    CountTokens,
    SourceReport,
    TestTexts,
    check_source,
    language_of,
    record_hashes,
)
from llm2vec.table import Table
from llm2vec.types import CHARACTERS_A_TOKEN

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Check and print; returns the exit code."""
    parser = cli.parser("check-data", __doc__, prints_tables=True)
    add_source_flags(parser)
    parser.add_argument("--tokenizer", help="folder or hub name; default: tokens are guessed, 4 characters each")
    parser.add_argument("--max_length", type=cli.positive, default=512, help="where training cuts (default 512 tokens)")
    parser.add_argument("--test_sets", nargs="+", type=cli.path, default=[], help="folders of test sets to look for")
    args = parser.parse_args(argv)
    sources = chosen_sources(args)
    count_tokens = _token_counter(args.tokenizer)
    test_texts = TestTexts(args.test_sets) if args.test_sets else None
    reports = []
    for source in sources:
        logger.info("reading %s", source.file)
        reports.append(check_source(source, args.folder, count_tokens, test_texts))
    table = _table(reports, args.max_length)
    if args.json:  # on a terminal, the table is part of what is logged
        cli.Printer(args.json).table(table)
    lines = [table.text(), *_legend(args.max_length, guessed=args.tokenizer is None)]
    for source, report in zip(sources, reports, strict=True):
        notes = [f"{number:,} {what}" for what, number in report.left_out.items()]
        notes += [f"{report.beaten:,} rows score a negative above the positive"] * bool(report.beaten)
        notes += [f"licence: {source.licence}"] * bool(source.licence)
        lines += [f"{source.name}: {'; '.join(notes)}"] if notes else []
    if test_texts is not None:
        lines.append(f"rows that share a text, or {OVERLAP_WORDS} words in a row, with a test set:")
        for name, size in test_texts.sizes.items():
            shares = ((r.name, r.overlap[name], r.rows) for r in reports if r.overlap[name])
            found = [f"{source} {number:,} ({number / rows:.2%})" for source, number, rows in shares]
            lines.append(f"  {name} ({size:,} texts): {', '.join(found) or 'none'}")
    differing = record_hashes(reports, args.folder / "hashes.json")
    empty = [f"{report.name}: its file has no rows." for report in reports if not report.rows + report.bad]
    problems = [error for report in reports for error in report.errors] + empty + differing
    for line in lines + problems:
        logger.info("%s", line)
    return 1 if problems else 0


def _token_counter(name: str | None) -> CountTokens:
    """Tokens by a tokenizer, or guessed from characters."""
    if name is None:
        return lambda texts: [len(text) // CHARACTERS_A_TOKEN for text in texts]
    from llm2vec.model.backbone import load_tokenizer  # seconds to import, with torch

    tokenizer = load_tokenizer(name)
    return lambda texts: [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _table(reports: Sequence[SourceReport], max_length: int) -> Table:
    """A row a source."""
    header = ["source", "rows", "bad", "twice", "query+", "q=p", "p=n", "no neg", "query", "positive", "cut"]
    rows = []
    for report in reports:
        documents = report.tokens.get("positive", []) + report.tokens.get("negative", [])
        cut = sum(n > max_length for n in documents) / max(1, len(documents))
        counts = (
            report.rows, report.bad, report.duplicates, report.repeated_queries, report.query_is_positive,
            report.positive_is_negative, report.without_negative,
        )  # fmt: skip
        tokens = [report.tokens.get(side) for side in ("query", "positive")]
        medians = [f"{statistics.median(numbers):.0f}" if numbers else "-" for numbers in tokens]
        languages = "; ".join(_languages(report, side) for side in ("query", "positive"))
        rows.append([report.name, *(f"{count:,}" for count in counts), *medians, f"{cut:.1%}", languages])
    whole = [f"{sum(report.rows for report in reports):,}", f"{sum(report.bad for report in reports):,}"]
    rows.append(["all", *whole, *[""] * (len(header) - 2)])
    return Table([*header, "languages (query; positive)"], rows)


def _legend(max_length: int, guessed: bool) -> list[str]:
    """What the columns mean."""
    counted = "guessed from characters, 4 each" if guessed else "without the template's own"
    lines = [
        "bad: lines that training refuses; twice: query and positive seen before; query+: query seen before",
        "q=p, p=n: query and positive, positive and a negative are one text; no neg: no hard negative",
        f"query, positive: median tokens ({counted}); cut: documents of more than {max_length} of them; both and the "
        "languages from a sample",
    ]
    if language_of() is None:
        lines.append('languages: not looked at; pip install -e ".[data]"')
    return lines


def _languages(report: SourceReport, field: str) -> str:
    languages = report.languages.get(field)
    if not languages:
        return "-"
    shares = [(code, count / languages.total()) for code, count in languages.most_common(3)]
    return " ".join(f"{code} {share:.0%}" for code, share in shares if share >= 0.01)
