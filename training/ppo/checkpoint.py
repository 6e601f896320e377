"""Checkpoints of the RL job: what they hold, and tables as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from errors import InputError
from solvers import EPDTable
from training.checkpoint import CheckpointFormat

KEYS = frozenset({"format", "step", "trainer", "watch", "start", "table", "config", "config_hash"})
"""Of a checkpoint: the layout's number, completed steps, the states of trainer and held-out watch (None without one),
what the run started from, the policy's mean table, the configuration and its hash."""

CHECKPOINT = CheckpointFormat("the RL job", 2, KEYS - {"format"})
save_checkpoint, load_checkpoint = CHECKPOINT.save, CHECKPOINT.load

TABLE_FIELDS = ("positions", "weights", "scale_dir", "scale_time")


def table_to_plain(table: EPDTable) -> dict[str, Tensor | None]:
    """A table's tensors by name."""
    return {name: getattr(table, name) for name in TABLE_FIELDS}


def table_from_plain(tensors: Mapping[str, Tensor | None]) -> EPDTable:
    """The inverse of `table_to_plain`.

    Raises:
        InputError: the tensors are no table.
    """
    try:
        return EPDTable(*(tensors[name] for name in TABLE_FIELDS))
    except ValueError as error:
        raise InputError(f"the checkpoint holds no valid table: {error}") from error
