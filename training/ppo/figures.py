"""The plots of a run, for TensorBoard and for the report; matplotlib figures that belong to no window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from solvers import EPDTable

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#2563a8", "#c2571a", "#2f855a", "#7b4ba3", "#b7791f")
MARKER_AREA = 420  # points^2 of a weight of 1


@dataclass(frozen=True)
class Curve:
    """A line over steps with an optional band: steps, values, and lower and upper ends, all [n]."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None


def curves_figure(
    curves: Sequence[Curve], ylabel: str, *, zero_line: bool = False, size: tuple[float, float]
) -> Figure:
    """Curves over steps in one plot, `size` in inches."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    if zero_line:
        axes.axhline(0, color=MUTED, linewidth=1)
    for curve, colour in zip(curves, cycle(COLOURS), strict=False):
        marker = "o" if len(curve.steps) <= 40 else None
        axes.plot(
            curve.steps, curve.values, color=colour, linewidth=1.6, marker=marker, markersize=3, label=curve.label
        )
        if curve.band is not None:
            axes.fill_between(curve.steps, *curve.band, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def table_figure(table: EPDTable, start: EPDTable) -> Figure:
    """Where each interval's K points lie and what they weigh, now (filled) and at the start (hollow).

    Both tables [S, K]; one row per interval, the position r in (0, 1) from its beginning to its end, a marker's area
    proportional to the weight.
    """
    intervals = table.positions.shape[0]
    figure = Figure(figsize=(6.4, 1.2 + 0.5 * intervals), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    rows = [[interval] * table.num_points for interval in range(1, intervals + 1)]
    for shown, style in (
        (start, {"facecolors": "none", "edgecolors": MUTED, "linewidths": 1.2, "label": "start"}),
        (table, {"facecolors": COLOURS[0], "edgecolors": "none", "alpha": 0.75, "label": "now"}),
    ):
        axes.scatter(shown.positions.cpu(), rows, s=MARKER_AREA * shown.weights.cpu().flatten(), **style)
    axes.set_xlim(0, 1)
    axes.set_ylim(intervals + 0.6, 0.4)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("position r in the interval (area: weight)")
    axes.set_ylabel("interval")
    legend = axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    return figure


def movement_figure(steps: Sequence[int], history: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> Figure:
    """Each entry of the mean table over the steps.

    `history`: name (positions, weights, ...) -> [n][S][K]. One row of plots per name, one plot per interval.
    """
    intervals = len(next(iter(history.values()))[0])
    figure = Figure(figsize=(max(6.4, 2.2 * intervals), 1.9 * len(history)), layout="constrained")
    grid = figure.subplots(len(history), intervals, squeeze=False, sharex=True, sharey="row")
    for row, (name, tables) in enumerate(history.items()):
        grid[row][0].set_ylabel(name.replace("_", " "))
        for interval, axes in enumerate(grid[row]):
            _plain(axes)
            for point, colour in zip(range(len(tables[0][interval])), cycle(COLOURS), strict=False):
                values = [table[interval][point] for table in tables]
                axes.plot(steps, values, color=colour, linewidth=1.5, label=f"point {point + 1}")
    for interval in range(intervals):
        grid[0][interval].set_title(f"interval {interval + 1}", fontsize=9, color=INK)
        grid[-1][interval].set_xlabel("step")
        grid[-1][interval].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    grid[0][0].legend(frameon=False, fontsize=7)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.xaxis.label.set(size=9, color=INK)
    axes.yaxis.label.set(size=9, color=INK)
    for side in axes.spines.values():
        side.set_visible(False)
