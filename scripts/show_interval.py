"""Draw how a solver takes one interval: by points inside of it, or by what it recalls of an earlier answer.

Nothing is sketched: it is one coordinate of the world in closed form (`models.mixture`), its exact solution, and what
`solvers.epd_sampler` makes of it. The one free number of each table is the one that ends on the exact solution, which
is what distillation looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from errors import shows_input_errors
from files import replacing
from models.mixture import MixtureWorld
from solvers import EPDTable, epd_sampler
from training.ppo.figures import COLOURS, GRID, INK, MUTED

WORLD = MixtureWorld(coordinates=1, modes=2, scales=(1.0, 1.0), spread=0.15)
NOISE = 0.35  # of the start, in standard deviations
EARLIER, START, END = 1.6, 1.0, 0.5  # noise levels
POSITIONS = (0.35, 0.75)  # of the two points
RESOLUTION = 150  # dots an inch


class Solve(NamedTuple):
    """States at the grid's noise levels, and (noise level, state, slope) of each evaluation."""

    states: list[float]
    asked: list[tuple[float, float, float]]


def exact(sigma: float) -> float:
    """The solution's state at a noise level."""
    start = torch.full((1, 1, 1, 1), NOISE * WORLD.sigma_max, dtype=torch.float64)
    return WORLD.solution(start, WORLD.sigma_max, sigma).item()


def solve(sigmas: Sequence[float], table: EPDTable) -> Solve:
    """From the exact state at the first noise level, by `table`."""
    found = Solve([], [])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        estimate = WORLD.denoise(x, sigma)
        levels, states = sigma.expand(len(x)), x.flatten()
        slopes = (states - estimate.flatten()) / levels
        found.asked.extend(zip(levels.tolist(), states.tolist(), slopes.tolist(), strict=True))
        return estimate

    x = torch.full((1, 1, 1, 1), exact(sigmas[0]), dtype=torch.float64)
    grid = torch.tensor(sigmas, dtype=torch.float64)
    epd_sampler(denoise, x, grid, table, callback=lambda _, state: found.states.append(state.item()))
    return found


def with_points(weight: float) -> EPDTable:
    """One interval of two points; `weight` is that of the first."""
    return EPDTable(_numbers([POSITIONS]), _numbers([[weight, 1 - weight]]))


def with_history(entry: float) -> EPDTable:
    """Two intervals without points; by `entry` the second recalls the estimate of the first."""
    nothing = torch.zeros(2, 0, dtype=torch.float64)
    return EPDTable(nothing, nothing, history=_numbers([[0, 0], [entry, 0]]))


def _numbers(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def ending_exactly(sigmas: Sequence[float], table: Callable[[float], EPDTable]) -> float:
    """The number by which `table` ends on the exact solution; the end is linear in it."""
    at_zero, at_one = (solve(sigmas, table(number)).states[-1] for number in (0.0, 1.0))
    return (exact(sigmas[-1]) - at_zero) / (at_one - at_zero)


def interval_figure() -> Figure:
    """Both ways beside each other, each with what one evaluation at the start alone would do."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes in (left, right):
        _draw_exact(axes)

    weight = ending_exactly((START, END), with_points)
    states, ((_, _, slope), *points) = solve((START, END), with_points(weight))
    left.set_title(f"two points inside, weights {weight:.2f} and {1 - weight:.2f}", fontsize=10, color=INK)
    _draw_line(left, (START, END), (states[0], states[0] + (END - START) * slope), MUTED, "--")
    _draw_line(left, (START, END), states, COLOURS[0], "-")
    _draw_asked(left, [(START, states[0], slope)], COLOURS[0])
    _draw_asked(left, points, COLOURS[1])

    entry = ending_exactly((EARLIER, START, END), with_history)
    states, asked = solve((EARLIER, START, END), with_history(entry))
    slope = asked[1][2]
    right.set_title(f"no points, the earlier answer recalled with {entry:.2f}", fontsize=10, color=INK)
    _draw_line(right, (START, END), (states[1], states[1] + (END - START) * slope), MUTED, "--")
    _draw_line(right, (EARLIER, START, END), states, COLOURS[0], "-")
    _draw_asked(right, asked[1:], COLOURS[0])
    _draw_asked(right, asked[:1], COLOURS[1])

    left.set_ylabel("one number of the image", fontsize=9, color=INK)
    left.invert_xaxis()
    labels = {"exact solution": "black", "the solver": COLOURS[0], "by the start's evaluation alone": MUTED}
    handles = [left.plot([], [], color=colour, label=label)[0] for label, colour in labels.items()]
    handles += [left.scatter([], [], color=colour) for colour in COLOURS[:2]]
    names = [*labels, "the start's evaluation", "other evaluations"]
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _draw_exact(axes: Axes) -> None:
    levels = torch.linspace(EARLIER * 1.06, END * 0.8, 60).tolist()
    axes.plot(levels, [exact(level) for level in levels], color="black", linewidth=1)
    for level in (EARLIER, START, END):
        axes.axvline(level, color=GRID, linewidth=1, zorder=0)
    axes.set_xlabel("noise level sigma, from noise to image", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.set_frame_on(False)


def _draw_line(axes: Axes, sigmas: Sequence[float], states: Sequence[float], colour: str, style: str) -> None:
    axes.plot(sigmas, states, color=colour, linestyle=style, linewidth=1.8)
    axes.scatter(sigmas[-1:], states[-1:], marker="s", s=26, color=colour, zorder=4)


def _draw_asked(axes: Axes, asked: Sequence[tuple[float, float, float]], colour: str) -> None:
    """A disc where the network was asked, and a mark of the slope that its answer means."""
    for sigma, state, slope in asked:
        ends = (sigma + 0.09, sigma - 0.09)
        axes.plot(ends, [state + slope * (end - sigma) for end in ends], color=colour, linewidth=4, alpha=0.35)
        axes.scatter([sigma], [state], s=42, color=colour, zorder=5)


@click.command(context_settings={"show_default": True})
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("outputs/interval.png"),
    help="PNG to draw into.",
)
@shows_input_errors
def main(output: Path) -> None:
    """Draw how a solver takes one interval. Needs no model."""
    with replacing(output) as temporary:
        interval_figure().savefig(temporary, format="png", dpi=RESOLUTION)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
