"""A solver as free parameters: every value of them is a valid solver, so that an optimizer may move them at will.

What can be learned of a solver is declared once, in `PARTS`: for those who move it by gradient, for searches without
one, and for the policy that draws it (`training.ppo.cold_start`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraint_registry import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import AffineTransform, Transform
from torch.nn.utils import parameters_to_vector

from errors import InputError
from schedules import from_log_gaps, log_gaps
from solvers import COLUMNS, EPDTable

GRID = "grid"
"""What the noise levels are called where they are learned; the first and the last of them stay."""

LEAST_SHARE = 1e-12
"""A share is raised to this: one of 0 has no free parameter, and positions lie inside (0, 1), and grids descend."""


def _same(numbers: Tensor) -> Tensor:
    return numbers


@dataclass(frozen=True)
class Part:
    """What can be learned of a solver: a column of its table, or its grid.

    The K positions of an interval cut (0, 1) into K + 1 segments, and the noise levels cut the range of log sigma into
    S gaps: such shares are learned, not the places themselves.

    Attributes:
        name: the column's, or `GRID`.
        support: of a row of its numbers: shares that sum to 1 (simplex), positive, or real.
        by_interval: entries -> [S, n], the numbers that belong to each interval.
        rows: [..., S, n] -> [..., R, M], those of them that can vary, one value of the support a row, or a number.
        entries: (rows [..., R, M], the start's entries) -> entries.
    """

    name: str
    support: Constraint
    by_interval: Callable[[Tensor], Tensor] = _same
    rows: Callable[[Tensor], Tensor] = _same
    entries: Callable[[Tensor, Tensor], Tensor] = lambda rows, start: rows

    def free(self, num_intervals: int, num_points: int) -> int:
        """How many of its numbers can vary in a table of this shape: of one weight, which is always 1, none."""
        shape = (num_intervals + 1,) if self.name == GRID else _COLUMNS[self.name].shape(num_intervals, num_points)
        rows, numbers = self.rows(self.by_interval(torch.ones(shape))).shape[-2:]
        return rows * max(0, numbers - (self.support is constraints.simplex))


def segments_from_positions(positions: Tensor) -> Tensor:
    """Lengths [..., K+1] of the pieces into which the increasing positions [..., K] cut (0, 1)."""
    zero, one = torch.zeros_like(positions[..., :1]), torch.ones_like(positions[..., :1])
    return torch.diff(positions, prepend=zero, append=one)


def positions_from_segments(segments: Tensor) -> Tensor:
    """Positions [..., K]: the running sum of the segments [..., K+1] without the last, which is 1."""
    return segments[..., :-1].cumsum(-1)


def _lower(square: Tensor) -> Tensor:
    """The entries below the diagonal of [..., S, S] as one row [..., 1, S (S - 1) / 2]."""
    row, column = torch.tril_indices(*square.shape[-2:], offset=-1)
    return square[..., row, column].unsqueeze(-2)


def _from_lower(values: Tensor, start: Tensor) -> Tensor:
    """The inverse of `_lower`, zero elsewhere."""
    square = values.new_zeros(*values.shape[:-2], *start.shape[-2:])
    row, column = torch.tril_indices(*start.shape[-2:], offset=-1)
    square[..., row, column] = values.squeeze(-2)
    return square


_COLUMNS = {column.name: column for column in COLUMNS}

PARTS = {
    part.name: part
    for part in (
        Part(
            "positions",
            constraints.simplex,
            by_interval=segments_from_positions,
            entries=lambda segments, _: positions_from_segments(segments),
        ),
        Part("weights", constraints.simplex, by_interval=lambda weights: weights / weights.sum(-1, keepdim=True)),
        Part("scale_dir", constraints.positive),
        Part("scale_time", constraints.positive),
        Part("guidance", constraints.positive),
        Part("history", constraints.real, rows=_lower, entries=_from_lower),
        Part("direction_history", constraints.real, rows=_lower, entries=_from_lower),
        Part(
            GRID,
            constraints.simplex,
            by_interval=lambda sigmas: log_gaps(sigmas).unsqueeze(-1),
            rows=lambda gaps: gaps.transpose(-1, -2),
            entries=lambda gaps, sigmas: from_log_gaps(gaps.squeeze(-2), sigmas[-1].item(), sigmas[0].item()),
        ),
    )
}
"""All that can be learned of a solver, by name."""


def neutral_entries(name: str, table: EPDTable, guidance_scale: float | None = None) -> Tensor:
    """The entries of a column that change nothing in this table, float64; of guidance, the constant scale that holds.

    Raises InputError where there are none.
    """
    column = _COLUMNS[name]
    neutral = guidance_scale if column.neutral is None else column.neutral
    if neutral is None:
        raise InputError(f"{name} has no entry that changes nothing: say the constant scale that it begins at")
    return torch.full(column.shape(table.num_intervals, table.num_points), neutral, dtype=torch.float64)


def named_parts(text: str) -> tuple[str, ...]:
    """The parts that a text like `grid,history` names, in the order of `PARTS`, each once.

    Raises InputError for a name that is none.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise InputError(f"unknown column {name!r}; known are {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in names)


class SolverParameters(nn.Module):
    """Free parameters for the learned parts of one solver; all else stays what it is.

    At first the solver is the one that was given, to rounding. Parameters are float64, `free.<part>`; `table()` and
    `sigmas()` are differentiable in them. The buffer `base` [n] holds what they were at first.
    """

    def __init__(
        self,
        table: EPDTable,
        sigmas: Tensor | None,
        learned: Sequence[str],
        scale_bounds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Begin at a solver.

        Args:
            table: one table of S intervals, positions increasing where they are learned. A learned column that it has
                not begins at its neutral value; guidance has none, so a table must have it where it is learned.
            sigmas: the noise levels, [S + 1]; None where they are not known, and not learned.
            learned: of `PARTS`, those of which something can vary in such a table.
            scale_bounds: a for scale_dir or scale_time, whose scales then stay in (1 - a, 1 + a).
        """
        super().__init__()
        self._start = table.detach().to(device="cpu", dtype=torch.float64).columns()
        self._start |= {
            name: neutral_entries(name, table) for name in learned if name != GRID and name not in self._start
        }
        if sigmas is not None:
            self._start[GRID] = sigmas.detach().to(device="cpu", dtype=torch.float64)
        self._transforms: dict[str, Transform] = {}
        self.free = nn.ParameterDict()
        for name in learned:
            self._transforms[name] = _transform(PARTS[name], table.num_intervals, scale_bounds.get(name))
            self.free[name] = nn.Parameter(self.free_of(name, self._start[name]))
        self.base: Tensor
        self.register_buffer("base", parameters_to_vector(self.parameters()).detach().clone())

    @property
    def learned(self) -> tuple[str, ...]:
        """The learned parts."""
        return tuple(self._transforms)

    def free_of(self, name: str, entries: Tensor) -> Tensor:
        """The free numbers that make these entries of a learned part, one solver's or a batch's."""
        part = PARTS[name]
        return self._transforms[name].inv(_raised(part, part.rows(part.by_interval(entries))))

    def numbers(self) -> dict[str, Tensor]:
        """The entries of the learned parts, on the CPU."""
        made = {name: _raised(PARTS[name], self._transforms[name](free.cpu())) for name, free in self.free.items()}
        return {name: PARTS[name].entries(rows, self._start[name]) for name, rows in made.items()}

    def table(self, numbers: Mapping[str, Tensor] | None = None) -> EPDTable:
        """The table, float64 on the CPU; with other learned `numbers` than its own where some are given.

        Raises ValueError where the parameters have left the range of numbers.
        """
        entries = {**self._start, **(self.numbers() if numbers is None else numbers)}
        return EPDTable(**{name: part for name, part in entries.items() if name != GRID})

    def sigmas(self) -> Tensor:
        """The noise levels, float64 [S + 1]. Raises ValueError where the parameters have left the range of numbers."""
        levels = {**self._start, **self.numbers()}[GRID]
        if not (levels.diff() < 0).all():
            raise ValueError(f"the noise levels no longer descend: {levels.tolist()}")
        return levels

    @torch.no_grad()
    def mean(self) -> tuple[EPDTable, Tensor | None]:
        """The table, and where they are learned the noise levels, detached. Raises ValueError as they do."""
        return self.table(), self.sigmas() if GRID in self.learned else None


def _transform(part: Part, num_intervals: int, scale_bound: float | None) -> Transform:
    """From free numbers to rows of the part."""
    if part.support is constraints.real:
        # An optimizer's step moves all S entries of a row at once: divided by S it suits long rows and short ones.
        return AffineTransform(0.0, 1 / num_intervals)
    return biject_to(constraints.interval(1 - scale_bound, 1 + scale_bound) if scale_bound else part.support)


def _raised(part: Part, rows: Tensor) -> Tensor:
    """The rows, where they are shares each at least about `LEAST_SHARE`."""
    if part.support is not constraints.simplex:
        return rows
    raised = rows.clamp_min(LEAST_SHARE)
    return raised / raised.sum(-1, keepdim=True)
