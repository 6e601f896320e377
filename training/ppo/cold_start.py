"""From a solver table to the Dirichlet concentrations around it, and back (design.md, section 3).

The K positions of an interval cut (0, 1) into K+1 segments. Segments and weights both lie on a simplex, so a row of a
table is the mean of two Dirichlet distributions, of K+1 and of K components; their concentrations are c times it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError
from solvers import EPDTable

MINIMUM_SHARE = 1e-6
"""Least segment and least weight of a row: a Dirichlet distribution cannot have a mean with a component of 0."""


@dataclass(frozen=True)
class ColdStart:
    """A table that a Dirichlet policy can be centred on, and what had to change for that.

    Attributes:
        table: float64 [S, K] on the CPU; positions increasing, every segment and weight at least `MINIMUM_SHARE` (up to
            rounding), weights summing to 1.
        repairs: one line per changed row, for the run's log and manifest; empty when the table was in order.
    """

    table: EPDTable
    repairs: tuple[str, ...]


@dataclass(frozen=True)
class Concentrations:
    """Dirichlet concentrations per interval, positive: of the segments [..., S, K+1], of the weights [..., S, K]."""

    positions: Tensor
    weights: Tensor


def prepare_table(table: EPDTable) -> ColdStart:
    """Put a table [S, K] in the order and inside the bounds that a Dirichlet policy needs, and say what changed.

    Rows whose positions do not increase are sorted with their weights and scales: the solver's sum over k is the same.
    Positions closer than `MINIMUM_SHARE` to a neighbour, to 0 or to 1 are moved apart by that much, and smaller weights
    are raised to it.

    Raises:
        InputError: a batch of tables.
    """
    if table.batch_size is not None:
        raise InputError(f"a policy starts from one table [S, K]; this is a batch of {table.batch_size}")
    table = table.detach().to(device="cpu", dtype=torch.float64)
    ordered, reordered = table.sorted_by_position()
    positions = _space_out(ordered.positions)
    weights = ordered.weights.clamp(min=MINIMUM_SHARE)
    moved, raised = ((new != old).any(-1) for new, old in ((positions, ordered.positions), (weights, ordered.weights)))
    repairs = [
        *_lines(reordered, "positions were not increasing: sorted together with weights and scales"),
        *_lines(moved, f"positions moved to keep every segment at least {MINIMUM_SHARE:g}"),
        *_lines(raised, f"weights raised to {MINIMUM_SHARE:g}, the row normalised"),
    ]
    prepared = EPDTable(positions, weights / weights.sum(-1, keepdim=True), ordered.scale_dir, ordered.scale_time)
    return ColdStart(prepared, tuple(repairs))


def concentrations_from_table(table: EPDTable, concentration: float) -> Concentrations:
    """Dirichlet concentrations whose mean is the table: `concentration` times its segments and its weights, in float64.

    Args:
        table: positions increasing, as `prepare_table` leaves it; [S, K] or [B, S, K].
        concentration: the sum c of each Dirichlet's concentrations; the larger, the closer the draws stay to the table.

    Raises:
        InputError: `concentration` is not positive, or a segment or weight is not.
    """
    segments, weights = segments_from_positions(table.positions.double()), table.weights.double()
    if not concentration > 0:
        raise InputError(f"dirichlet concentration {concentration}: it must be above 0")
    for name, values in (("segments between positions", segments), ("weights", weights)):
        rows = (values <= 0).any(-1).nonzero()[:, -1].unique().tolist()
        if rows:
            raise InputError(
                f"table intervals {rows}: {name} must be positive; order the table with cold_start.prepare_table"
            )
    weights = weights / weights.sum(-1, keepdim=True)
    return Concentrations(positions=concentration * segments, weights=concentration * weights)


def table_from_concentrations(
    concentrations: Concentrations, scale_dir: Tensor | None = None, scale_time: Tensor | None = None
) -> EPDTable:
    """The Dirichlet means as a table; the inverse of `concentrations_from_table` for any concentration."""
    segments, weights = dirichlet_mean(concentrations.positions), dirichlet_mean(concentrations.weights)
    return EPDTable(positions_from_segments(segments), weights, scale_dir, scale_time)


def dirichlet_mean(alpha: Tensor) -> Tensor:
    """alpha [..., M] over its sum."""
    return alpha / alpha.sum(-1, keepdim=True)


def segments_from_positions(positions: Tensor) -> Tensor:
    """Lengths [..., K+1] of the pieces into which the increasing positions [..., K] cut (0, 1)."""
    zero, one = torch.zeros_like(positions[..., :1]), torch.ones_like(positions[..., :1])
    return torch.diff(positions, prepend=zero, append=one)


def positions_from_segments(segments: Tensor) -> Tensor:
    """Positions [..., K]: the running sum of the segments [..., K+1] without the last, which is 1."""
    return segments[..., :-1].cumsum(-1)


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
