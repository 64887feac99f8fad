"""How the cost of a Stage I step grows with rows, lengths and vocabulary: its section of the table, and a figure.

    points = growth(Options(rounds=5), CPU)
    growth_figure(points, {}).savefig("growth.svg")

Run by `benchmarks/benchmark.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import variants
from benchmarks.inputs import Case
from benchmarks.measure import Line, Reading, Variant
from benchmarks.sections import Options, Sizes, measured, megabytes, peaks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class GrowthPoint(NamedTuple):
    """A variant's readings where `axis` stands at a value, everything else being as usual."""

    axis: str
    value: int
    variant: str
    readings: list[Reading]
    #: Of a step that was run for its memory; none if the process did not survive.
    memory: list[Reading]


def growth(options: Options, plan: Sizes) -> list[GrowthPoint]:
    """Stage I at growing numbers of rows, document lengths and vocabularies, packed and release-style."""
    precision = next(iter(plan.stage_I))[2]
    most = options.max_tokens or plan.stage_I_tokens
    usual = Case(plan.shape, plan.growth_rows, precision, options.device, options.rounds, max_tokens=most)
    points = []
    for axis, values in plan.growth.items():
        for value in values:
            if axis == "rows":
                case = replace(usual, rows=value)
            elif axis == "vocabulary":
                case = replace(usual, shape=replace(plan.shape, vocabulary=value))
            else:
                case = replace(usual, document_length=(value, 0.0))
            named = {
                "packed": Variant(variants.packed_stage_I, case),
                "release-style": Variant(variants.release_stage_I, case),
            }
            readings, _ = measured(f"Growth: {axis} {value:,}", named, options.rounds)
            memory, _ = peaks(named)
            points += [GrowthPoint(axis, value, name, readings[name], memory[name]) for name in named]
    return points


def growth_lines(points: Sequence[GrowthPoint]) -> list[Line]:
    """The points as lines of the table."""
    return [
        Line(
            f"Stage I, {point.variant}, {point.axis} {point.value:,}: tokens a second",
            [reading.speed for reading in point.readings],
            digits=0,
            note=megabytes({"": point.memory}, ""),
        )
        for point in points
    ]


def growth_figure(points: Sequence[GrowthPoint], over_processes: dict[int, list[float]]) -> Figure:
    """Above, tokens a second (median, and band from lowest to highest); below, peak memory above the weights.

    Args:
        points: a column for each of their axes.
        over_processes: number of processes -> tokens a second of all of them; empty = no such column.
    """
    # Here and not above: every worker imports what stands above, and matplotlib is large.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(point.axis for point in points))
    columns = len(axes_names) + bool(over_processes)
    figure = Figure(figsize=(4.2 * columns, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, columns, squeeze=False, sharex="col")
    for column, name in enumerate(axes_names):
        for variant, colour in (("packed", "#D55E00"), ("release-style", "#0072B2")):
            chosen = [p for p in points if p.axis == name and p.variant == variant and p.readings and p.memory]
            at = [p.value for p in chosen]
            speeds = [[reading.speed for reading in p.readings] for p in chosen]
            memory = [p.memory[0].memory / 1e6 for p in chosen]
            upper, lower = panels[0][column], panels[1][column]
            _draw_speeds(upper, at, speeds, colour, variant)
            lower.plot(at, memory, "o-", color=colour, markersize=4, label=variant)
        lower.set_xlabel(name)
    if over_processes:
        upper, lower = panels[0][-1], panels[1][-1]
        counts, speeds = list(over_processes), list(over_processes.values())
        _draw_speeds(upper, counts, speeds, "#D55E00", "packed, torchrun")
        alone = statistics.median(speeds[0]) / counts[0]
        upper.plot(counts, [alone * count for count in counts], "--", color="#888888", label="as many times one's")
        upper.set_xlabel("processes, as many rows each")
        upper.tick_params(labelbottom=True)
        upper.legend(frameon=False)
        lower.set_axis_off()
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("tokens a second")
    panels[1][0].set_ylabel("peak memory above the weights, MB")
    panels[0][0].legend(frameon=False)
    return figure


def _draw_speeds(axes: Axes, at: Sequence[int], speeds: Sequence[Sequence[float]], colour: str, label: str) -> None:
    axes.plot(at, [statistics.median(s) for s in speeds], "o-", color=colour, markersize=4, label=label)
    axes.fill_between(at, [min(s) for s in speeds], [max(s) for s in speeds], color=colour, alpha=0.15)
