"""Checkpoints of the RL job: what they hold, and tables as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from errors import InputError
from solvers import COLUMNS, EPDTable
from training.checkpoint import CheckpointFormat

KEYS = frozenset({"format", "step", "trainer", "watch", "start", "table", "config", "config_hash"})
"""Of a checkpoint: the layout's number, completed steps, the states of trainer and held-out watch (None without one),
what the run started from, the policy's mean table, the configuration and its hash."""

CHECKPOINT = CheckpointFormat("the RL job", 2, KEYS - {"format"})
save_checkpoint, load_checkpoint = CHECKPOINT.save, CHECKPOINT.load


def table_to_plain(table: EPDTable) -> dict[str, Tensor | None]:
    """A table's tensors by name."""
    return {column.name: getattr(table, column.name) for column in COLUMNS}


def table_from_plain(tensors: Mapping[str, Tensor | None]) -> EPDTable:
    """The inverse of `table_to_plain`. Raises ValueError where the tensors are no table."""
    return EPDTable(**{column.name: tensors[column.name] for column in COLUMNS})


def require_equal(table: EPDTable, expected: EPDTable, tolerance: float, what: str) -> None:
    """Raise InputError, which names `what`, where an entry is farther than `tolerance` from the expected table's."""
    difference = largest_difference(table, expected)
    if not difference <= tolerance:
        raise InputError(
            f"{what} differs from its table by up to {difference:.3g}, and at most {tolerance:g} is allowed: "
            f"it would not replay what was trained, so it is not used"
        )


def largest_difference(table: EPDTable, other: EPDTable) -> float:
    """Largest absolute difference of two tables' entries; infinite where only one has a column, or shapes differ."""
    mine, theirs = table.columns(), other.columns()
    if {name: entries.shape for name, entries in mine.items()} != {name: part.shape for name, part in theirs.items()}:
        return float("inf")
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine if mine[name].numel())
