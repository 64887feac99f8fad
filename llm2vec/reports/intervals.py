"""Two comparisons: a run with the paper (verdicts with a stated tolerance), and a run with another (an interval).

Everything is x 100. The interval comes from a paired bootstrap: what is drawn again, tasks or queries, is drawn for
both runs alike, so that what makes a task hard for both cancels. It knows nothing of the spread between training runs
of the same recipe, which only further seeds can show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm2vec.types import UserError

Verdict = Literal["within", "near", "off", "not judged"]

#: A score of one task may differ from the paper's by this much and be within; see `TOLERANCES`.
TASK_TOLERANCE = 2.0
TOLERANCES = (
    f"Within: at most {TASK_TOLERANCE:g} / sqrt(n) points from the paper, n being the number of tasks averaged "
    f"({TASK_TOLERANCE:.2f} for one task, {TASK_TOLERANCE / math.sqrt(15):.2f} for 15, "
    f"{TASK_TOLERANCE / math.sqrt(56):.2f} for 56). Near: at most twice that. Off: further away. Why these: from one "
    "of the paper's models to the next, the difference of Anchor and baseline on the same task varies by 2.0 points "
    "(standard deviation, Tables 14 and 15); that is the only spread the paper shows, as it gives one run a row, and "
    "independent deviations shrink with the root of their number. For the mean of 56, within is then just under a "
    "quarter of the smallest gain the paper reports (1.12), and near just under half of it: a run that is near still "
    "lies nearer to its own row than to the other."
)

NUM_RESAMPLES = 10_000
LEVEL = 0.95
#: With fewer tasks or queries a bootstrap interval is much too narrow, and none is given.
MIN_UNITS = 10
#: Resamples are drawn in batches of about this many numbers, so that 10,000 of many queries fit into memory.
_BATCH = 2_000_000


class Check(NamedTuple):
    """A measured value beside the paper's; either may be missing."""

    measured: float | None
    printed: float | None
    num_tasks: int
    #: Why the paper's value is not held against a run; empty where it is.
    doubt: str = ""

    @property
    def difference(self) -> float | None:
        """Measured minus printed."""
        return None if self.measured is None or self.printed is None else self.measured - self.printed

    @property
    def verdict(self) -> Verdict | None:
        """How far off; None where either value is missing."""
        if self.difference is None:
            return None
        if self.doubt:
            return "not judged"
        # The paper rounds to two decimals, and so is the difference: no verdict hangs on the digits behind.
        tolerance, distance = TASK_TOLERANCE / math.sqrt(self.num_tasks), round(abs(self.difference), 2)
        return "within" if distance <= tolerance else "near" if distance <= 2 * tolerance else "off"


class Interval(NamedTuple):
    """A difference of two runs and where it lies when the units are drawn again."""

    difference: float
    low: float
    high: float
    #: How many tasks or queries were drawn from.
    num_units: int
    #: How many of them the first run is ahead on.
    num_ahead: int

    def sentence(self, unit: str) -> str:
        """The interval in words."""
        return (
            f"{self.difference:+.2f}, {LEVEL:.0%} interval {self.low:+.2f} to {self.high:+.2f} (paired bootstrap over "
            f"{self.num_units:,} {unit}, {NUM_RESAMPLES:,} resamples); ahead on {self.num_ahead:,} of them"
        )


def paired_interval(*tasks: tuple[Mapping[str, float], Mapping[str, float]], seed: int = 0) -> Interval:
    """Difference of two runs, a mean over tasks, with units drawn again within each task; the tasks are fixed.

    Args:
        tasks: A pair each: unit (query) -> score of the first run, and of the second. A single pair has no tasks to
            keep apart: its units may be tasks, too.
        seed: Seed of the resampling.

    Returns:
        The mean over tasks of the first run's mean less the second's, and its percentile interval.

    Raises:
        UserError: The units of a pair differ, there are fewer than `MIN_UNITS`, or scipy is not there.

    Example:
        >>> paired_interval((anchor, baseline)).sentence("tasks")   # NFCorpus -> 35.0, ...
    """
    try:
        from scipy.stats import bootstrap  # comes with mteb
    except ImportError as error:
        raise UserError('An interval needs scipy: pip install -e ".[eval]".') from error
    differences = [_differences(first, second) for first, second in tasks]
    units = np.concatenate(differences)
    found = bootstrap(
        differences,
        _mean_of_means,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, _BATCH // len(units)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    difference = float(_mean_of_means(*differences))
    return Interval(difference, float(found.low), float(found.high), len(units), int((units > 0).sum()))


def _differences(first: Mapping[str, float], second: Mapping[str, float]) -> NDArray[np.float64]:
    if first.keys() != second.keys():
        alone = sorted(first.keys() ^ second.keys())
        raise UserError(f"Only one of the two runs has {', '.join(alone[:5])} ({len(alone)} in all).")
    if len(first) < MIN_UNITS:
        raise UserError(f"An interval needs {MIN_UNITS} or more tasks or queries, here there are {len(first)}.")
    return np.array([first[unit] - second[unit] for unit in sorted(first)], dtype=np.float64)


def _mean_of_means(*groups: NDArray[np.float64], axis: int = -1) -> Any:
    return np.mean([group.mean(axis=axis) for group in groups], axis=0)
