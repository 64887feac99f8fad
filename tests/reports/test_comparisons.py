"""Verdicts at their borders, and the paired bootstrap against what is known of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from llm2vec.reports.comparisons import LEVEL, MIN_UNITS, NUM_RESAMPLES, Check, Interval, paired_interval
from llm2vec.types import UserError


def units(values: Iterable[float]) -> dict[str, float]:
    return {f"u{i:04}": float(value) for i, value in enumerate(values)}


def compare_units(first: dict[str, float], second: dict[str, float], seed: int = 0) -> Interval:
    return paired_interval((first, second), seed=seed)


@pytest.mark.parametrize(
    ("difference", "num_tasks", "verdict"),
    [
        *[(0.0, 1, "within"), (2.0, 1, "within"), (-2.0, 1, "within"), (2.01, 1, "near"), (-4.0, 1, "near")],
        *[(4.01, 1, "off"), (-9.0, 1, "off"), (1.0, 4, "within"), (1.01, 4, "near"), (2.01, 4, "off")],
        *[(0.26, 56, "within"), (0.28, 56, "near"), (0.54, 56, "off")],
    ],
)
def test_verdicts(difference: float, num_tasks: int, verdict: str) -> None:
    assert Check(60 + difference, 60, num_tasks).verdict == verdict


def test_no_verdict_without_both_values_and_none_on_a_doubtful_one() -> None:
    assert Check(None, 60, 1).verdict is None and Check(60, None, 1).verdict is None
    assert Check(None, 60, 1).difference is None
    assert Check(99, 60, 1, "misprinted").verdict == "not judged" and Check(None, 60, 1, "misprinted").verdict is None


def test_a_constant_difference_has_no_spread() -> None:
    second = units(np.random.default_rng(3).normal(50, 20, 40))
    first = {unit: score + 1.5 for unit, score in second.items()}
    interval = compare_units(first, dict(reversed(second.items())))  # paired by name, whatever the order
    assert (interval.difference, interval.low, interval.high) == pytest.approx((1.5, 1.5, 1.5))
    assert (interval.num_units, interval.num_ahead) == (40, 40)


def test_the_interval_is_that_of_a_mean() -> None:
    """With many units the bootstrap interval is the normal one, mean -+ 1.96 sd / sqrt(n)."""
    differences = np.random.default_rng(0).normal(0.3, 2, 400)
    interval = compare_units(units(differences), units(np.zeros(400)))
    half = 1.96 * differences.std() / math.sqrt(400)
    assert interval.difference == pytest.approx(differences.mean())
    assert interval.low == pytest.approx(differences.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(differences.mean() + half, abs=0.05 * half)
    assert interval.num_ahead == (differences > 0).sum()


def test_the_interval_equals_a_plain_loop() -> None:
    differences = np.random.default_rng(1).exponential(1, 12)
    rng = np.random.default_rng(0)
    means = [np.mean([differences[i] for i in rng.integers(0, 12, 12)]) for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    interval = compare_units(units(differences), units(np.zeros(12)))
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_the_seed_is_its_own() -> None:
    first, second = units(np.random.default_rng(5).normal(1, 1, 30)), units(np.zeros(30))
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    assert compare_units(first, second) == compare_units(first, second)
    assert compare_units(first, second) != compare_units(first, second, seed=1)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_swapping_the_runs_mirrors_the_interval() -> None:
    first, second = units(np.random.default_rng(5).normal(1, 1, 30)), units(np.zeros(30))
    there, back = compare_units(first, second), compare_units(second, first)
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))


def test_queries_are_drawn_within_tasks_and_tasks_weigh_the_same() -> None:
    """Two tasks of different size: the mean of their means, and a spread of sqrt(v1/n1 + v2/n2) / 2."""
    rng = np.random.default_rng(2)
    small, large = rng.normal(3, 2, 100), rng.normal(0, 1, 900)
    pairs = [(units(values), units(np.zeros(len(values)))) for values in (small, large)]
    interval = paired_interval(*pairs)
    assert interval.difference == pytest.approx((small.mean() + large.mean()) / 2)
    half = 1.96 * math.sqrt(small.var() / 100 + large.var() / 900) / 2
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)
    assert interval.num_units == 1000


def test_many_queries_are_drawn_in_batches() -> None:
    interval = compare_units(units(np.random.default_rng(2).normal(1, 1, 3000)), units(np.zeros(3000)))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / math.sqrt(3000), rel=0.08)


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(UserError, match=r"Only one of the two runs has b, c \(2 in all\)"):
        compare_units({"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 2.0})
    with pytest.raises(UserError, match=f"needs {MIN_UNITS} or more tasks or queries, here there are 2"):
        compare_units({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0})


def test_the_sentence_states_everything() -> None:
    first, second = units([1.0] * 8 + [-1.0] * 2), units([0.0] * 10)
    sentence = compare_units(first, second).sentence("tasks")
    assert sentence.startswith("+0.60, 95% interval +")
    assert sentence.endswith("(paired bootstrap over 10 tasks, 10,000 resamples); ahead on 8 of them")
