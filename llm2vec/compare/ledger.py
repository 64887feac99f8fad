"""The ledger: every published comparison on one page, beside what the paper claims.

    results/<name>/     a comparison's record, see `compare.record`
    ledger.md           made of all of them and of nothing else, by `llm2vec report results`
    ledger-<name>-*.png the same figures as on its own page

The claims, and scores of other models for scale, lie in `reports/data/ledger/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm2vec.compare.record import TrialOutcome, read_record
from llm2vec.compare.table import (
    Difference,
    along_picture,
    by_seed,
    difference_of,
    difference_table,
    outcome_table,
    rank_picture,
)
from llm2vec.files import COMPARISON_RECORD, read_object, whole, write_text
from llm2vec.model.chain import RUN_FILE
from llm2vec.reports.paper import PAPER_DATA
from llm2vec.table import Cell, Table, escape_markdown
from llm2vec.types import UserError

LEDGER_FILE = "ledger.md"
_INTRO = """# Ledger

What was measured with this code: each comparison with its machine, date and commit, and with the paper's claims one by
one. This page is made of the records in `results/` by

```bash
llm2vec report results --output_dir docs/reproduce
```

A record is text: logs, `run.json`, mteb's files, scores of single queries. To add yours, run `llm2vec compare` or
`llm2vec embedder`, copy the `record/` folder that it leaves to `results/<name>`, put your name into the facts of its
`record.json` (`"Run by": "..."`), make the page again, and open a pull request. Whoever is ahead, it is shown as it is.
"""
_CLAIMS_NOTE = (
    "Ours: difference of the mean over the tasks that both have, x 100 (of the loss: as it is). Interval: twice the "
    "standard error over seeds, which of two or three is no 95 %; of one seed, the 95 % interval over the queries, if "
    "all tasks are retrieval sets. Holds: yes or no, where the interval leaves 0 out, else open. The paper's gap: of a "
    "1B model, after 2,000 x 512 rows of Stage I."
)


def write_ledger(results: Path, output_dir: Path) -> Path:
    """Write the page and its figures, anew, of the records that lie in `results`; returns the page. A `UserError` where
    one cannot be read."""
    output_dir.mkdir(parents=True, exist_ok=True)
    blocks = [_INTRO.rstrip()]
    for file in sorted(results.glob(f"*/{COMPARISON_RECORD}")):
        outcomes, own, facts, _ = read_record(file.parent)
        blocks.append(f"## {escape_markdown(file.parent.name)}")
        known = {**facts, **_origin(file.parent)}
        blocks.append("\n".join(f"- {escape_markdown(name)}: {escape_markdown(text)}" for name, text in known.items()))
        keys = Table(["Recipe", "Stages and own keys"], list(own.items()), "What each recipe sets itself", num_names=2)
        shown = [outcome_table(outcomes), _context_table(outcomes), difference_table(outcomes, facts)]
        shown.append(claims_table(outcomes))
        for table in [table for table in [*shown, keys] if table is not None]:
            blocks += [f"### {table.title}", table.markdown(escape_markdown)]
            blocks += [escape_markdown(table.note)] if table.note else []
        for picture in filter(None, (along_picture(outcomes), rank_picture(outcomes))):
            name, said = f"ledger-{file.parent.name}-{picture.name}", escape_markdown(picture.caption)
            blocks.append(f"![{said}]({name})\n\n{said}")
            with whole(output_dir / name) as aside:
                aside.write_bytes(picture.png())
    write_text(output_dir / LEDGER_FILE, "\n\n".join(blocks) + "\n")
    return output_dir / LEDGER_FILE


def claims_table(outcomes: Sequence[TrialOutcome]) -> Table | None:
    """The paper's claims that a comparison has both sides of; None where it has none."""
    rows: list[list[Cell]] = []
    for claim in _data("claims")["claims"]:
        found = _difference(claim, outcomes)
        if found is not None:
            half = found.error
            interval = None if half is None else f"{found.tasks - half:+.2f} to {found.tasks + half:+.2f}"
            if half is None and found.queries is not None and found.of_all_tasks:
                interval = f"{found.queries.low:+.2f} to {found.queries.high:+.2f} (queries)"
            words = f"{claim['says']} ({claim['higher']} over {claim['lower']})"
            rows.append([claim["where"], words, found.verdict(), interval or "-", found.tasks, claim["gap"]])
    header = ["Paper", "Claim", "Holds", "Interval", "Ours", "Paper's"]
    return Table(header, rows, "The paper's claims at this size", _CLAIMS_NOTE, 4) if rows else None


def _difference(claim: Mapping[str, Any], outcomes: Sequence[TrialOutcome]) -> Difference | None:
    """The higher side less the lower one, of what the claim is about."""
    match claim.get("at"):
        case None:
            seen = list(outcomes)
        case "first checkpoint":  # step 0 is the start
            first = {id(o): next((s for step, s in sorted(o.along.items()) if step), {}) for o in outcomes}
            seen = [replace(outcome, scores=first[id(outcome)], queries={}) for outcome in outcomes]
        case "first loss":
            seen = [replace(o, scores={} if o.loss is None else {"loss": o.loss}, queries={}) for o in outcomes]
        case other:
            raise UserError(f"claims.json: unknown `at`: {other!r}.")
    scored = by_seed([outcome for outcome in seen if outcome.scores])
    return difference_of(scored.get(claim["higher"], {}), scored.get(claim["lower"], {}))


def _context_table(outcomes: Sequence[TrialOutcome]) -> Table | None:
    """Public scores on the tasks that a comparison has; None where there are none."""
    context = _data("context")
    tasks = dict.fromkeys(task for outcome in outcomes for task in outcome.scores)
    tasks_known = [task for task in tasks if any(task in scores for scores in context["models"].values())]
    rows: list[list[Cell]] = [[name, *map(scores.get, tasks_known)] for name, scores in context["models"].items()]
    return Table(["Model", *tasks_known], rows, "For scale", context["source"] + ".") if tasks_known else None


def _data(name: str) -> dict[str, Any]:
    return read_object(PAPER_DATA / "ledger" / f"{name}.json")


def _origin(record: Path) -> dict[str, str]:
    """Commits and versions that the runs of a record say."""
    runs = [read_object(file) for file in sorted(record.glob(f"*/*/{RUN_FILE}"))]
    commits = sorted({str(run["git_commit"])[:12] for run in runs if run.get("git_commit")})
    versions = sorted({f"{name} {version}" for run in runs for name, version in run.get("versions", {}).items()})
    origins = [run["origin"] for run in runs if run.get("origin")]
    bases = sorted({f"{origin['model']}, from {origin['from']}; weights {origin['weights']}" for origin in origins})
    found = {"The base is": ", ".join(bases), "Commit": ", ".join(commits), "Versions": ", ".join(versions)}
    return {name: text for name, text in found.items() if text}
