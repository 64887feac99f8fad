"""The ledger: claims judged by hand-made numbers, and the committed page made again from the committed records."""

import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from llm2vec.compare.ledger import LEDGER_FILE, claims_table, write_ledger
from llm2vec.compare.record import TrialOutcome, read_record
from llm2vec.compare.table import by_seed, difference_of, difference_table
from llm2vec.files import write_json
from tests.helpers import write_jsonl

ROOT = Path(__file__).parents[2]


def trial(recipe: str, seed: int | None, score: float, early: float, loss: float) -> TrialOutcome:
    return TrialOutcome(recipe, seed, {"X": score}, along={0: {"X": 0.0}, 8: {"X": early}}, loss=loss)


def test_claims_are_judged_by_two_standard_errors() -> None:
    """Differences of two seeds d1, d2: their mean, and 2 s / sqrt(2) = |d1 - d2| on both sides of it."""
    outcomes = [
        trial("anchor", 1, 50.0, 30.0, 1.0),
        trial("anchor", 2, 52.0, 10.0, 1.5),
        trial("baseline", 1, 49.0, 20.0, 3.0),
        trial("baseline", 2, 50.0, 20.0, 3.0),
        trial("only_d2q", 1, 60.0, 0.0, 1.0),
        trial("only_d2q", 2, 61.0, 0.0, 1.0),
        TrialOutcome("only_q2d", 1, {}, failure="no luck"),
    ]
    table = claims_table(outcomes)
    assert table is not None
    rows = {(str(row[0]), str(row[1]).partition("(")[2]): row[2:5] for row in table.rows}
    assert rows[("Tables 1 and 3", "anchor over baseline)")] == ["yes", "+0.50 to +2.50", 1.5]
    assert rows[("Table 3", "anchor over only_d2q)")] == ["no", "-10.50 to -8.50", -9.5]
    assert rows[("Table 9, Figure 2", "anchor over baseline)")] == ["open", "-20.00 to +20.00", 0.0]
    assert rows[("Figure 4", "baseline over anchor)")] == ["yes", "+1.25 to +2.25", 1.75]
    assert not any("only_q2d" in claim for _, claim in rows), "what failed is not held against anything"


def test_one_seed_decides_by_its_queries_or_not_at_all() -> None:
    def one(recipe: str, lead: float, queries: int) -> TrialOutcome:
        of = {"X": {f"q{i}": 10.0 + lead + i % 3 for i in range(queries)}} if queries else {}
        return TrialOutcome(recipe, 42, {"X": 10.0 + lead}, queries=of)

    for queries, verdict in ((0, "open"), (30, "yes")):
        table = claims_table([one("anchor", 5.0, queries), one("baseline", 0.0, queries)])
        assert table is not None and table.rows[0][2] == verdict
    # The interval of one task's queries says nothing of the mean over two.
    both = [
        replace(one(*of, 30), scores={"X": 15.0, "STS12": sts})
        for *of, sts in (("anchor", 5.0, 1.0), ("baseline", 0.0, 9.0))
    ]
    table = claims_table(both)
    assert table is not None and table.rows[0][2:4] == ["open", "-"]


def test_a_seed_that_was_not_scored_on_its_way_leaves_those_that_were() -> None:
    scored = [trial("anchor", 1, 50.0, 30.0, 1.0), trial("baseline", 1, 49.0, 20.0, 3.0)]
    only_at_the_end = [TrialOutcome("anchor", 2, {"X": 51.0}), TrialOutcome("baseline", 2, {"X": 50.0})]
    table = claims_table([*scored, *only_at_the_end])
    assert table is not None
    assert ["Table 9, Figure 2", 10.0] in [[row[0], row[4]] for row in table.rows]


def write_record_of(folder: Path, recipe: str, score: float) -> None:
    entry = {"main_score": score, "hf_subset": "default", "languages": ["eng-Latn"]}
    content = {"dataset_revision": "d", "task_name": "STS12", "mteb_version": "2", "scores": {"test": [entry]}}
    (folder / "scores").mkdir(parents=True)
    write_json(folder / "scores/STS12.json", content)
    (folder / "1_stage_II").mkdir()
    write_json(folder / "1_stage_II/run.json", {"git_commit": "abc", "versions": {"torch": "2.13"}})
    write_jsonl(folder / "1_stage_II/log.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])


def test_the_page_says_where_each_record_is_from(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for recipe, score in (("anchor-seed1", 0.5), ("baseline-seed1", 0.4)):
        write_record_of(results / "small" / recipe, recipe, score)
    write_json(results / "small/record.json", {"facts": {"Run by": "A | B"}, "recipes": {"anchor": "stage_II"}})
    page = write_ledger(results, tmp_path / "docs").read_text(encoding="utf-8")
    assert (
        "## small" in page
        and "- Run by: A \\| B" in page
        and "- Commit: abc" in page
        and "- Versions: torch 2.13" in page
    )
    assert "SGPT-125M, NLI | 69.20" in page, "public scores for scale"
    assert (
        "| Tables 1 and 3 | Stage I and II beat Stage II alone (anchor over baseline) | open | - | 10.00 | 1.25 |"
        in page
    )


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="needs the repository's results")
def test_the_published_page_is_what_the_published_records_give(tmp_path: Path) -> None:
    made = write_ledger(ROOT / "results", tmp_path)
    published = ROOT / "docs/reproduce"
    assert made.read_bytes() == (published / LEDGER_FILE).read_bytes()
    assert {file.name for file in tmp_path.glob("*.png")} == {file.name for file in published.glob("ledger-*.png")}


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="needs the repository's results")
def test_the_labs_table_is_its_records() -> None:
    """Score, difference to Anchor with two standard errors, and effective rank, each a mean over seeds."""
    outcomes, _, facts, _ = read_record(ROOT / "results/lab-targets")
    differences = difference_table(outcomes, facts)
    assert differences is not None
    less = {row[0]: f"{row[2]:.1f} ({row[3]:.1f})" for row in differences.rows}
    measured = {}
    for recipe, of_seeds in by_seed(outcomes).items():
        score = f"{mean(mean(o.scores.values()) for o in of_seeds.values()):.1f}"
        ranks = [o.rank for o in of_seeds.values() if o.rank is not None]
        measured[recipe] = [score, less.get(recipe, ""), f"{mean(ranks):.1f}" if ranks else ""]
    page = (ROOT / "docs/lab.md").read_text(encoding="utf-8").partition("## What was found")[2]
    rows = [[cell.strip() for cell in line.split("|")] for line in re.findall(r"^\| `target_.*", page, re.M)]
    assert {row[1].strip("`"): row[3:6] for row in rows} == measured


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="needs the repository's results")
def test_the_labs_table_of_the_real_model_is_its_record() -> None:
    outcomes = by_seed(read_record(ROOT / "results/smollm2-135m")[0])
    page = (ROOT / "docs/lab.md").read_text(encoding="utf-8").partition("on a real model.**")[2]
    rows = [[cell.strip() for cell in line.split("|")] for line in re.findall(r"^\| `.*", page, re.M)]
    assert len(rows) == 5
    for _, name, _, seeds, score, less, _ in rows:
        of_seeds = outcomes[name.strip("`")]
        assert int(seeds) == len(of_seeds)
        assert score == f"{mean(mean(o.scores.values()) for o in of_seeds.values()):.1f}"
        found = difference_of(of_seeds, outcomes["anchor"])
        assert found is not None and found.queries is not None
        middle, low, high, *_ = found.queries
        assert less == ("" if name == "`anchor`" else f"{middle:.1f} ({low:.1f} to {high:.1f})")


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="needs the repository's results")
def test_the_readmes_scores_are_the_records() -> None:
    """Each row of its table of the real model, by its first word; a column a record."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| SmolLM2-135M.*\n\| --- .*\n((?:\|.*\n)+)", readme, re.M)
    assert rows is not None
    of = ((2, "embedder-smollm2-135m", ""), (3, "smollm2-135m", ""), (4, "smollm2-135m", "HeldOut"))
    for column, record, kind in of:
        shown = {re.findall(r"\w+", row)[0].lower(): row.split("|")[column].strip(" *") for row in rows[1].splitlines()}
        outcomes = by_seed(read_record(ROOT / "results" / record)[0])
        tasks = {task for task in next(iter(outcomes["baseline"].values())).scores if task.startswith(kind)}
        measured = {
            "the" if recipe == "base" else recipe: f"{mean(o.scores[t] for o in of_seeds.values() for t in tasks):.1f}"
            for recipe, of_seeds in outcomes.items()
            if all(tasks <= o.scores.keys() for o in of_seeds.values())
        }
        assert shown == {name: measured.get(name, "-") for name in ("bm25", "baseline", "control", "anchor", "the")}


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="needs the repository's results")
def test_what_the_readme_says_below_its_scores_is_the_record() -> None:
    outcomes = by_seed(read_record(ROOT / "results/smollm2-135m")[0])
    early = [f"{mean(outcomes[recipe][42].along[32].values()):.1f}" for recipe in ("anchor", "baseline")]
    leads = [difference_of(outcomes[recipe], outcomes["baseline"]) for recipe in ("anchor", "control")]
    points = [int(lead.tasks) for lead in leads if lead is not None]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"Anchor has {early[0]} and the baseline {early[1]}:" in readme
    means = {r: [mean(outcomes[r][seed].scores.values()) for seed in (42, 43, 44)] for r in ("anchor", "baseline")}
    first, second, third = (f"{a - b:.1f}" for a, b in zip(means["anchor"], means["baseline"], strict=True))
    ends = {r: [mean(outcomes[r][seed].scores.values()) > 70 for seed in (42, 43, 44)] for r in ("control", *means)}
    assert ends["baseline"] == [False] * 3 and ends["control"] == ends["anchor"] == [True, True, False]
    assert "control and Anchor do with the same two seeds of three" in readme
    assert f"it brings {points[0]} points in the mean of three seeds" in readme
    assert f"{first}, {second} and {third} (" in readme
    assert f"language modelling of the same texts already brings {points[1]} of them" in readme
