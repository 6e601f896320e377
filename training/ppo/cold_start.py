"""From a solver to the parameters of the policy around it, and back (design.md, section 3).

What the policy can draw is what can be learned (`training.parameters.PARTS`); from what, and how widely, says `DRAWN`.
A row of shares is the mean of a Dirichlet distribution, whose concentrations are c times it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from errors import InputError
from solvers import EPDTable
from training.parameters import GRID, PARTS, Part, neutral_entries
from training.ppo.distributions import Dirichlet, LogNormal, Normal

MINIMUM_SHARE = 1e-6
"""Least segment and least weight of a row: a Dirichlet distribution cannot have a mean with a component of 0."""

Family = type[Dirichlet] | type[Normal]

_FAMILIES: dict[Constraint, Family] = {
    constraints.simplex: Dirichlet,
    constraints.positive: LogNormal,
    constraints.real: Normal,
}


@dataclass(frozen=True)
class Drawn:
    """How the policy draws a part of the solver.

    Attributes:
        part: what can be learned of it (`training.parameters.PARTS`); `rows` of it are drawn.
        spread: the key in `ppo` that says how widely at first: a total concentration, or a standard deviation.
    """

    part: Part
    spread: str

    @property
    def name(self) -> str:
        """As `ppo.train` calls it."""
        return self.part.name

    @property
    def family(self) -> Family:
        """What its numbers are drawn from."""
        return _FAMILIES[self.part.support]

    def check(self, entries: Tensor) -> None:
        """Raise InputError where the family has no such mean."""
        numbers = self.part.by_interval(entries)
        if self.family.positive and (numbers <= 0).any():
            interval, number = (numbers <= 0).nonzero()[0].tolist()
            raise InputError(
                f"ppo.train names {self.name}, which is drawn in proportion to the start's, and in interval {interval} "
                f"it is {numbers[interval, number].item():.9g}: it must be above 0; leave it out, or start elsewhere"
            )

    def parameters(self, entries: Tensor, spread: float) -> Tensor:
        """The unconstrained parameters [S, blocks * n] of the distribution whose mean is these entries, in float64.

        Raises:
            InputError: there is none, or none so wide.
        """
        self.check(entries)
        try:
            return torch.cat(self.family.start(self.part.by_interval(entries), spread), dim=-1)
        except ValueError as error:
            raise InputError(f"ppo.{self.spread}={spread:g} is out of range for {self.name}: {error}") from None

    def distribution(self, base: Tensor, residual: Tensor) -> Dirichlet | Normal:
        """The distribution with the unconstrained parameters `base` [S, blocks * n], moved by `residual` [..., S, ...].

        A move of 1 is one unit of the family (`units`), so that one learning rate suits all parts.
        """
        starts, moves = (blocks.chunk(self.family.blocks, dim=-1) for blocks in (base, residual))
        units = self.family.units(*starts)
        moved = (start + unit * move for start, unit, move in zip(starts, units, moves, strict=True))
        return self.family.bounded(*(self.part.rows(block) for block in moved))


_SPREADS = {
    "positions": "dirichlet_concentration",
    "weights": "dirichlet_concentration",
    "scale_dir": "scale_std",
    "scale_time": "scale_std",
    "guidance": "guidance_std",
    "history": "history_std",
    "direction_history": "history_std",
    GRID: "grid_concentration",
}

DRAWN = {name: Drawn(part, _SPREADS[name]) for name, part in PARTS.items()}
"""All that the policy can draw, by name, in the order in which it is drawn. The first and the last noise level stay."""


TRAINED = ("positions", "weights")
"""What is trained where nothing else is said."""


@dataclass(frozen=True)
class ColdStart:
    """A table that a policy can be centred on, and what had to change for that.

    Attributes:
        table: float64 [S, K] on the CPU, with every column that is to be trained. Where these are trained: positions
            increasing, every segment and weight at least `MINIMUM_SHARE` (up to rounding), weights summing to 1.
        repairs: one line for each change, for the run's log and manifest; empty when the table was in order.
    """

    table: EPDTable
    repairs: tuple[str, ...]


def prepare_table(
    table: EPDTable, train: Collection[str] = TRAINED, *, guidance_scale: float | None = None
) -> ColdStart:
    """Put a table [S, K] in the order and inside the bounds that a policy needs, and say what changed.

    A column that is to be trained and missing is added at the entry that changes nothing: history 0, scales 1, guidance
    `guidance_scale`, the constant that the solver is used at. Where positions are trained, rows of them that do not
    increase are sorted with all that belongs to a point (the solver's sum over k is the same), and positions closer
    than `MINIMUM_SHARE` to a neighbour, to 0 or to 1 are moved apart by that much; where weights are trained, smaller
    ones are raised to it.

    Raises:
        InputError: a batch of tables, nothing to train in it, or a column that cannot be trained from where it starts.
    """
    if table.batch_size is not None:
        raise InputError(f"a policy starts from one table [S, K]; this is a batch of {table.batch_size}")
    table = table.detach().to(device="cpu", dtype=torch.float64)
    names = trainable(table, train)
    repairs = [
        f"ppo.train: {name} is left out, nothing of it can vary {_size_of(table)}"
        for name in DRAWN
        if name in train and name not in names
    ]
    missing = [name for name in names if name != GRID and name not in table.columns()]
    if "guidance" in missing and guidance_scale is None:
        raise InputError(
            "ppo.train names guidance, and the start says no scale for it to begin at: set model.guidance_rate"
        )
    added = {name: neutral_entries(name, table, guidance_scale) for name in missing}
    repairs += [
        f"{name} is new in the table and begins at {new[0, 0].item():g} everywhere" for name, new in added.items()
    ]
    table = replace(table, **added)
    if "positions" in names:
        table, reordered = table.sorted_by_position()
        positions = _space_out(table.positions)
        repairs += _lines(reordered, "positions were not increasing: sorted together with weights and scales")
        repairs += _lines(
            (positions != table.positions).any(-1), f"positions moved to keep every segment at least {MINIMUM_SHARE:g}"
        )
        table = replace(table, positions=positions)
    if "weights" in names:
        weights = table.weights.clamp(min=MINIMUM_SHARE)
        repairs += _lines(
            (weights != table.weights).any(-1), f"weights raised to {MINIMUM_SHARE:g}, the row normalised"
        )
        table = replace(table, weights=weights / weights.sum(-1, keepdim=True))
    for name, entries in table.columns().items():
        if name in names:
            DRAWN[name].check(entries)
    return ColdStart(table, tuple(repairs))


def trainable(table: EPDTable, train: Collection[str]) -> tuple[str, ...]:
    """Those of the names in `train` of which something can vary in such a table, in the order of `DRAWN`.

    Raises:
        InputError: a name is unknown, or there is nothing.
    """
    unknown = [name for name in train if name not in DRAWN]
    if unknown:
        raise InputError(f"ppo.train names {unknown[0]!r}; known are {', '.join(DRAWN)}")
    size = table.num_intervals, table.num_points
    able = [name for name, drawn in DRAWN.items() if drawn.part.free(*size)]
    names = tuple(name for name in able if name in train)
    if not names:
        raise InputError(
            f"ppo.train=[{', '.join(train)}]: nothing of it can vary {_size_of(table)}; name some of {', '.join(able)}"
        )
    return names


def _size_of(table: EPDTable) -> str:
    return f"in a table with num_steps {table.num_steps} and num_points {table.num_points}"


def _space_out(ordered: Tensor) -> Tensor:
    """Clip each position into [previous + MINIMUM_SHARE, 1 - MINIMUM_SHARE * (number of positions from here on)]."""
    points = ordered.shape[-1]
    columns: list[Tensor] = []
    previous = torch.zeros_like(ordered[..., 0])
    for column in range(points):
        highest = 1 - MINIMUM_SHARE * (points - column)
        previous = ordered[..., column].maximum(previous + MINIMUM_SHARE).clamp(max=highest)
        columns.append(previous)
    return torch.stack(columns, dim=-1)


def _lines(rows: Tensor, what: str) -> list[str]:
    return [f"table interval {row}: {what}" for row in rows.nonzero().flatten().tolist()]
