"""The plots of a run, for TensorBoard and for the report; matplotlib figures that belong to no window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from solvers import COLUMNS, EPDTable

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


Drawn = tuple[str, Tensor, EPDTable]
"""A solver for a figure: its label, noise levels [S + 1], and table."""


def solver_figure(solver: Drawn, beside: Drawn | None = None) -> Figure:
    """A solver on the axis of noise levels: where it asks the network, with what weight and guidance, and its history.

    From above: ticks at the noise levels and discs at the points (area: weight; an interval without points has its disc
    where it starts); guidance of each evaluation, where a table has it; and the history as a matrix. `beside` is drawn
    hollow, without its history.
    """
    table = solver[2]
    histories = {name: entries for name, entries in table.columns().items() if name.endswith("history")}
    shown = [(solver, COLOURS[0], True), *([(beside, MUTED, False)] if beside else [])]
    guidances = [(drawn.guidance, filled) for (*_, drawn), _, filled in shown if drawn.guidance is not None]
    heights = [1.6, *([1.2] if guidances else []), *([2.2] if histories else [])]
    figure = Figure(figsize=(7.2, 0.6 + sum(heights)), layout="constrained")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    levels = rows[0].subplots()
    _plain(levels)
    for row, ((_, sigmas, drawn), colour, filled) in enumerate(shown):
        levels.hlines(row, sigmas[-1], sigmas[0], color=GRID, linewidth=2, zorder=1)
        levels.scatter(sigmas.tolist(), [row] * len(sigmas), marker="|", s=160, color=colour, zorder=2)
        where, weights = _points(sigmas, drawn)
        faces = {"facecolors": colour, "alpha": 0.65} if filled else {"facecolors": "none", "edgecolors": colour}
        levels.scatter(where, [row] * len(where), s=[MARKER_AREA * weight for weight in weights], zorder=3, **faces)
    levels.set_yticks(range(len(shown)), [label for (label, _, _), _, _ in shown])
    levels.set_ylim(len(shown) - 0.4, -0.6)
    levels.set_xscale("log")
    levels.invert_xaxis()
    levels.set_xlabel("noise level sigma (|: grid; discs: evaluations, area: weight)")
    if guidances:
        axes = rows[1].subplots()
        for guidance, filled in guidances:
            _draw_guidance(axes, guidance, filled)
    panels = rows[-1].subplots(1, len(histories), squeeze=False)[0] if histories else []
    for axes, (name, entries) in zip(panels, histories.items(), strict=True):
        reach = max(float(entries.abs().max()), 1e-6)
        axes.imshow(entries.tolist(), cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
        for row, column in entries.nonzero().tolist():
            entry = float(entries[row, column])
            colour = "white" if abs(entry) > 0.6 * reach else INK
            axes.text(
                column, row, f"{entry:.2g}", ha="center", va="center", fontsize=min(8, 100 / len(entries)), color=colour
            )
        axes.set_title(name.replace("_", " "), fontsize=9, color=INK)
        axes.set_xlabel("of interval", fontsize=9)
        axes.set_ylabel("in interval", fontsize=9)
        ticks = range(len(entries))
        axes.set_xticks(ticks, [tick + 1 for tick in ticks], fontsize=8)
        axes.set_yticks(ticks, [tick + 1 for tick in ticks], fontsize=8)
    return figure


def _points(sigmas: Tensor, table: EPDTable) -> tuple[list[float], list[float]]:
    """Noise levels of the points, and their weights; of the intervals' starts where there are none."""
    if table.num_points == 0:
        return sigmas[:-1].tolist(), [0.4] * table.num_intervals
    where = sigmas[1:, None] ** table.positions * sigmas[:-1, None] ** (1 - table.positions)
    return where.flatten().tolist(), table.weights.flatten().tolist()


def _draw_guidance(axes: Axes, guidance: Tensor, filled: bool) -> None:
    """Bars of the guidance scale [S, 1 + K], a group for each interval, its start first; hollow ones go unnamed."""
    _plain(axes)
    evaluations = guidance.shape[-1]
    for evaluation, colour in zip(range(evaluations), cycle(COLOURS), strict=False):
        offset = (evaluation - (evaluations - 1) / 2) * 0.8 / evaluations
        places = [interval + 1 + offset for interval in range(len(guidance))]
        label = "start" if evaluation == 0 else f"point {evaluation}"
        look = {"color": colour, "label": label} if filled else {"facecolor": "none", "edgecolor": INK}
        axes.bar(places, guidance[:, evaluation].tolist(), width=0.7 / evaluations, **look)
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=":")
    axes.set_xlabel("interval")
    axes.set_ylabel("guidance")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if filled and evaluations > 1:
        axes.legend(frameon=False, fontsize=7, ncols=evaluations, loc="lower right", bbox_to_anchor=(1, 1))


def movement_figure(steps: Sequence[int], history: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> Figure:
    """Each entry of the policy's mean over the steps.

    `history`: name of a column, or `grid` -> [n][S][entries]. One row of plots per name, one plot per interval.
    """
    intervals = len(next(iter(history.values()))[0])
    figure = Figure(figsize=(max(6.4, 2.2 * intervals), 1.9 * len(history)), layout="constrained")
    grid = figure.subplots(len(history), intervals, squeeze=False, sharex=True, sharey="row")
    for row, (name, tables) in enumerate(history.items()):
        grid[row][0].set_ylabel(name.replace("_", " "))
        for interval, axes in enumerate(grid[row]):
            _plain(axes)
            labels = entry_names(name, len(tables[0][interval]))
            for entry, (label, colour) in enumerate(zip(labels, cycle(COLOURS), strict=False)):
                values = [table[interval][entry] for table in tables]
                axes.plot(steps, values, color=colour, linewidth=1.5, label=label)
        if len(labels) > 1:
            grid[row][0].legend(frameon=False, fontsize=7)
    for interval in range(intervals):
        grid[0][interval].set_title(f"interval {interval + 1}", fontsize=9, color=INK)
        grid[-1][interval].set_xlabel("step")
        grid[-1][interval].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    return figure


def entry_names(name: str, count: int) -> list[str]:
    """For people: what the `count` entries are that a column, or the grid, has for each interval."""
    points = [f"point {point + 1}" for point in range(count)]
    per = {column.name: column.per for column in COLUMNS}.get(name)
    if per == "evaluation":
        return ["start", *points[:-1]]
    if per == "interval":
        return [f"of interval {interval + 1}" for interval in range(count)]
    return points if per == "point" else ["noise level at the end"]


def _plain(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.xaxis.label.set(size=9, color=INK)
    axes.yaxis.label.set(size=9, color=INK)
    for side in axes.spines.values():
        side.set_visible(False)
