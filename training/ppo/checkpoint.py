"""Checkpoints of the RL job: tensors and plain values only, written whole or not at all, read without running code."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import InputError
from solvers import EPDTable
from training.snapshot import write_atomically

FORMAT = 1
"""Number of the layout; a file with another one is refused."""

NAME = re.compile(r"policy-step(\d{6,})\.pt")
BEST_NAME = "policy-best.pt"
KEYS = frozenset({"format", "step", "trainer", "watch", "start", "table", "config", "config_hash"})
"""Of a checkpoint: the layout's number, completed steps, the states of trainer and held-out watch (None without one),
what the run started from, the policy's mean table, the configuration and its hash."""

TABLE_FIELDS = ("positions", "weights", "scale_dir", "scale_time")
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"policy-step{step:06d}.pt"


def best_path(folder: Path) -> Path:
    """Where the checkpoint with the best held-out reward lies."""
    return folder / BEST_NAME


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: to a temporary file, flushed to disk, renamed.

    Args:
        path: from `step_path` or `best_path`.
        state: the keys of `KEYS` but `format`; tensors, plain values, and lists and dicts of them.

    Raises:
        InputError: it cannot be written (a full disk); what was there before is untouched.
        ValueError: `state` lacks a key, or holds what `weights_only` loading would refuse.
    """
    state = {"format": FORMAT, **state}
    if state.keys() != KEYS:
        raise ValueError(f"a checkpoint holds {sorted(KEYS)}, not {sorted(state)}")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(buffer.getvalue()))
    if refused:
        raise ValueError(f"a checkpoint holds tensors and plain values only, not {refused}")
    write_atomically(path, buffer.getvalue())


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


def list_checkpoints(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, the largest step last."""
    found = [(int(match[1]), path) for path in folder.glob("policy-step*.pt") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with `weights_only=True`.

    Raises:
        InputError: missing, corrupt, or of another format; the message offers the readable checkpoint before it.
    """
    try:
        return _load(path)
    except InputError as error:
        raise InputError(f"{error}\n{_offer(path)}") from error


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such checkpoint") from None
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: the checkpoint is corrupt and cannot be read ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.keys() != KEYS:
        raise InputError(f"{path}: is no checkpoint of the RL job in format {FORMAT}")
    return state


def _offer(path: Path) -> str:
    for candidate in reversed(list_checkpoints(path.parent)):
        if candidate < path or not NAME.fullmatch(path.name):
            try:
                _load(candidate)
            except InputError:
                continue
            return f"The one before it can be read: go on from it with  --resume {candidate}"
    return f"There is no readable checkpoint before it in {path.parent}."


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint with the largest step.

    Raises:
        InputError: the folder holds none.
    """
    found = list_checkpoints(folder)
    if not found:
        raise InputError(f"{folder}: holds no policy-stepXXXXXX.pt: the run ended before its first checkpoint")
    return found[-1]
