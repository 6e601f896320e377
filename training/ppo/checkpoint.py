"""Checkpoints of the RL job: what they hold, and the numbers of a solver as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from errors import InputError
from solvers import COLUMNS, EPDTable
from training.parameters import GRID
from training.ppo.cold_start import TRAINED
from training.runs.checkpoint import CheckpointFormat

KEYS = frozenset({"format", "step", "trainer", "watch", "start", "table", "config", "config_hash"})
"""Of a checkpoint: the layout's number, completed steps, the states of trainer and held-out watch (None without one),
what the run started from, the numbers of the policy's mean, the configuration and its hash."""

CHECKPOINT = CheckpointFormat("the RL job", 2, KEYS - {"format"})
save_checkpoint = CHECKPOINT.save

Numbers = Mapping[str, Tensor]
"""A solver's numbers by name: the columns of its table, and under `GRID` noise levels [S + 1]."""


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; see `CheckpointFormat.load`. The flags of earlier versions are read as `ppo.train`."""
    state = CHECKPOINT.load(path)
    ppo = state["config"].get("ppo")
    if isinstance(ppo, dict) and "train" not in ppo:
        scales = [scale for scale in ("scale_dir", "scale_time") if ppo.pop(f"train_{scale}", False) is True]
        ppo["train"] = [*TRAINED, *scales]
    return state


def table_to_plain(table: EPDTable, sigmas: Tensor | None = None) -> dict[str, Tensor]:
    """The numbers of a table, and of noise levels where there are some."""
    return table.columns() | ({} if sigmas is None else {GRID: sigmas})


def table_from_plain(numbers: Numbers) -> EPDTable:
    """The table of these numbers. Raises ValueError where they are none."""
    return EPDTable(**{column.name: numbers.get(column.name) for column in COLUMNS})


def require_equal(numbers: Numbers, expected: Numbers, tolerance: float, what: str) -> None:
    """Raise InputError, which names `what`, where a number is farther than `tolerance` from the expected one."""
    difference = largest_difference(numbers, expected)
    if not difference <= tolerance:
        raise InputError(
            f"{what} differs from its table by up to {difference:.3g}, and at most {tolerance:g} is allowed: "
            f"it would not replay what was trained, so it is not used"
        )


def largest_difference(numbers: Numbers, others: Numbers) -> float:
    """Largest absolute difference between the numbers of two solvers; infinite where parts or sizes differ."""
    shapes, theirs = ({name: part.shape for name, part in each.items()} for each in (numbers, others))
    if shapes != theirs:
        return float("inf")
    return max(float((part - others[name]).abs().max()) for name, part in numbers.items() if part.numel())
