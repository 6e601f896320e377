"""A solver as free parameters: every value of them is a valid solver, so that an optimizer may move them at will.

What can be learned are the columns of the table (`solvers.COLUMNS`) and `grid`, the noise levels between the first one
and the last. How a column's numbers are made of free ones is said here, once, for whoever moves them by gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from errors import InputError
from schedules import from_log_gaps, log_gaps
from solvers import COLUMNS, EPDTable

GRID = "grid"

# exp of this is far below what a float32 weight can show beside others that sum to 1.
SMALLEST_WEIGHT = 1e-30

# At its bound a scale's parameter is infinite: a bound that is chosen for a table leaves this factor of room, and is
# never narrower than SMALLEST_SCALE_BOUND.
SCALE_BOUND_ROOM = 1.5
SMALLEST_SCALE_BOUND = 0.01


class Parametrisation(NamedTuple):
    """How the numbers of a column are made of free ones, and the free ones that make given numbers."""

    numbers: Callable[[Tensor], Tensor]
    free: Callable[[Tensor], Tensor]


def bounded_scale(bound: float) -> Parametrisation:
    """Scales in (1 - a, 1 + a) for a bound a: 2 sigmoid(p / 2) a + (1 - a)."""
    return Parametrisation(
        lambda parameters: 2 * torch.sigmoid(0.5 * parameters) * bound + (1 - bound),
        lambda scale: 2 * torch.logit((scale - (1 - bound)) / (2 * bound)),
    )


POSITIONS = Parametrisation(Tensor.sigmoid, Tensor.logit)
WEIGHTS = Parametrisation(
    lambda parameters: parameters.softmax(-1), lambda weights: weights.clamp_min(SMALLEST_WEIGHT).log()
)
# An optimizer's step moves all S entries of a row at once: divided by S it suits long rows as well as short ones.
HISTORY = Parametrisation(
    lambda parameters: parameters.tril(-1) / parameters.shape[-1], lambda history: history * history.shape[-1]
)

_PARAMETRISATIONS: Mapping[str, Parametrisation] = {
    "positions": POSITIONS,
    "weights": WEIGHTS,
    GRID: WEIGHTS,  # of the shares of the intervals in log σ (schedules.log_gaps)
    "guidance": Parametrisation(Tensor.exp, Tensor.log),
    "history": HISTORY,
    "direction_history": HISTORY,
}
_SCALES = ("scale_dir", "scale_time")  # each has a bound of its own

LEARNABLE = (*_PARAMETRISATIONS, *_SCALES)
"""What can be learned, by name."""

_PER_POINT = tuple(column.name for column in COLUMNS if column.per == "point")


def learnable_columns(text: str) -> tuple[str, ...]:
    """The columns that a text like `grid,history` names, in the order of `LEARNABLE`, each once.

    Raises InputError for a name that is none.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in LEARNABLE:
            raise InputError(f"unknown column {name!r}; known are {', '.join(LEARNABLE)}")
    return tuple(name for name in LEARNABLE if name in names)


def of_points(columns: Sequence[str]) -> list[str]:
    """Those of the columns that belong to points: without points there is nothing to learn in them."""
    return [name for name in columns if name in _PER_POINT]


class SolverParameters(nn.Module):
    """Free parameters for the learned columns of one solver; the other columns stay what they are.

    At first the solver is the one that was given, to rounding. Parameters are float64, `free.<column>`; `table()` and
    `sigmas()` are differentiable in them.
    """

    def __init__(
        self,
        table: EPDTable,
        sigmas: Tensor,
        learned: Sequence[str],
        scale_bounds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Begin at a solver.

        Args:
            table: one table of S intervals. A learned column that it has not begins at its neutral value; guidance has
                none, so a table must have it where it is learned.
            sigmas: the noise levels, [S + 1]. The first and the last stay.
            learned: of `LEARNABLE`; columns of points need points.
            scale_bounds: for scale_dir and scale_time; widened where the table's scales need it.
        """
        super().__init__()
        self._table = table.detach().to(device="cpu", dtype=torch.float64)
        self._sigmas = sigmas.detach().to(device="cpu", dtype=torch.float64)
        self._kinds: dict[str, Parametrisation] = {}
        self.free = nn.ParameterDict()
        for name in learned:
            entries = log_gaps(self._sigmas) if name == GRID else _entries(self._table, name)
            bounded = name in _SCALES
            kind = bounded_scale(scale_bound(entries, scale_bounds.get(name))) if bounded else _PARAMETRISATIONS[name]
            self._kinds[name] = kind
            self.free[name] = nn.Parameter(kind.free(entries))

    @property
    def learned(self) -> tuple[str, ...]:
        """The learned columns."""
        return tuple(self._kinds)

    def table(self) -> EPDTable:
        """The table, float64 on the CPU. Raises ValueError where the parameters have left the range of numbers."""
        return replace(self._table, **{name: self._numbers(name) for name in self.learned if name != GRID})

    def sigmas(self) -> Tensor:
        """The noise levels, float64 [S + 1]. Raises ValueError where rounding leaves two of them equal."""
        if GRID not in self._kinds:
            return self._sigmas
        levels = from_log_gaps(self._numbers(GRID), self._sigmas[-1].item(), self._sigmas[0].item())
        if not (levels.diff() < 0).all():
            raise ValueError(f"the noise levels no longer descend: {levels.tolist()}")
        return levels

    def _numbers(self, name: str) -> Tensor:
        return self._kinds[name].numbers(self.free[name])


def scale_bound(scale: Tensor | None, wanted: object = None) -> float:
    """The wanted bound if every scale lies well inside it, otherwise one that is wide enough; 0 without scales."""
    if scale is None:
        return 0.0
    widest = float((scale.detach() - 1).abs().max())
    if isinstance(wanted, (int, float)) and wanted > 0 and widest <= 0.999 * wanted:
        return float(wanted)
    return max(SCALE_BOUND_ROOM * widest, SMALLEST_SCALE_BOUND)


def _entries(table: EPDTable, name: str) -> Tensor:
    """A column's numbers; its neutral ones where the table has none."""
    [column] = [column for column in COLUMNS if column.name == name]
    entries = getattr(table, name)
    if entries is not None:
        return entries
    return torch.full(column.shape(table.num_intervals, table.num_points), column.neutral, dtype=torch.float64)
