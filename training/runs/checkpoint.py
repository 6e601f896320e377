"""Checkpoints of every job: tensors and plain values only, written whole or not at all, read without running code."""

from __future__ import annotations

import io
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import InputError, first_line, is_too_little_memory
from files import move, unused, write_atomically
from models.checkpoints import UNREADABLE, load_archive

UNFIT = (AttributeError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError)
NAME = re.compile(r"policy-step(\d{6,})\.pt")
PLAIN_KEYS = {"step": int, "config": dict, "config_hash": str}
"""What the checkpoints of all jobs hold, and its type."""


@dataclass(frozen=True)
class CheckpointFormat:
    """The layout of one job's checkpoints.

    Attributes:
        job: its name, for messages.
        number: of the layout; a file with another one is refused.
        keys: what a checkpoint holds besides `format`; all of them, and nothing else.
    """

    job: str
    number: int
    keys: frozenset[str]

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint: to a temporary file, flushed to disk, renamed.

        Args:
            path: from `step_path` or `best_path`.
            state: every one of `keys`; tensors, plain values, and lists and dicts of them.

        Raises:
            InputError: it cannot be written (a full disk); what was there before is untouched.
            ValueError: `state` has other keys, or holds what `weights_only` loading would refuse.
        """
        if state.keys() != self.keys:
            raise ValueError(f"a checkpoint holds {sorted(self.keys)}, not {sorted(state)}")
        write_tensors(path, {"format": self.number, **state})

    def load(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint onto the CPU with `weights_only=True`.

        Raises:
            InputError: missing, corrupt, or of another format; the message offers the readable checkpoint before it.
        """
        try:
            return self._load(path)
        except InputError as error:
            raise InputError(f"{error}\n{self._offer(path)}") from error

    def _load(self, path: Path) -> dict[str, Any]:
        state = read_tensors(path, "checkpoint")
        whole = isinstance(state, dict) and state.keys() == self.keys | {"format"}
        if not whole or type(state["format"]) is not int or state["format"] != self.number:
            raise InputError(f"{path}: is no checkpoint of {self.job} in format {self.number}")
        for key, kind in PLAIN_KEYS.items():
            if type(state[key]) is not kind:
                raise InputError(f"{path}: {key} is a {type(state[key]).__name__}, not a {kind.__name__}")
        return state

    def _offer(self, path: Path) -> str:
        for candidate in reversed(list_checkpoints(path.parent)):
            if candidate < path or not NAME.fullmatch(path.name):
                try:
                    self._load(candidate)
                except InputError:
                    continue
                return f"The one before it can be read: go on from it with  --resume {shlex.quote(str(candidate))}"
        return f"There is no readable checkpoint before it in {path.parent}."


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all.

    Raises:
        InputError: it cannot be written; what was there before is untouched.
        ValueError: `state` holds what `weights_only` loading would refuse.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(buffer.getvalue()))
    if refused:
        raise ValueError(f"a checkpoint holds tensors and plain values only, not {refused}")
    write_atomically(path, buffer.getvalue())


def read_tensors(path: Path, kind: str) -> Any:
    """What `write_tensors` wrote, on the CPU, every byte held against its checksum; no code of the file is run.

    Raises:
        InputError: there is no such file, or it is corrupt; `kind` says what it should be.
    """
    try:
        return load_archive(path, mapped=False)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such {kind}") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: the {kind} is corrupt and cannot be read ({first_line(error)})") from error


@contextmanager
def fitting(what: Path | str, remedy: str = "go on from another checkpoint") -> Iterator[None]:
    """What trips over other types, keys or shapes than a state should have raises one InputError that names `what`."""
    try:
        yield
    except InputError:
        raise
    except UNFIT as error:
        if is_too_little_memory(error):
            raise
        said = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{what}: holds other things than it should ({said}); {remedy}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from the moments of an Adam or AdamW; its settings stay what they are.

    Raises:
        ValueError: they are not those of its parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state["state"].items():
        like = (parameters[number].shape, parameters[number].dtype)
        found = {name: (moment.shape, moment.dtype) for name, moment in moments.items()}
        if found != {"step": ((), torch.float32), "exp_avg": like, "exp_avg_sq": like}:
            raise ValueError(f"the optimizer's moments of parameter {number} are not such as it needs")
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"policy-step{step:06d}.pt"


def best_path(folder: Path) -> Path:
    """Where the checkpoint with the best held-out reward lies."""
    return folder / "policy-best.pt"


def _step_of(path: Path) -> float:
    """The step that a checkpoint was made after; infinite where it cannot be read: nothing can go on from it."""
    try:
        return read_tensors(path, "checkpoint")["step"]
    except (InputError, KeyError, TypeError):
        return math.inf


def set_aside(folder: Path, step: int) -> None:
    """Move the checkpoints after `step`, which a run makes again, to a new `before-resume-at-stepXXXXXX` in `folder`.

    So the newest and the best checkpoint are always those of the run that goes on.

    Raises:
        InputError: they cannot be moved.
    """
    later = [path for path in list_checkpoints(folder) if int(NAME.fullmatch(path.name)[1]) > step]
    best = best_path(folder)
    if best.exists() and _step_of(best) > step:
        later.append(best)
    aside = unused(folder / f"before-resume-at-step{step:06d}")
    try:
        for path in later:
            aside.mkdir(exist_ok=True)
            move(path, aside / path.name)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be moved ({error.strerror})") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, the largest step last."""
    found = [(int(match[1]), path) for path in folder.glob("policy-step*.pt") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint with the largest step.

    Raises:
        InputError: the folder holds none.
    """
    found = list_checkpoints(folder)
    if not found:
        raise InputError(f"{folder}: holds no policy-stepXXXXXX.pt: the run ended before its first checkpoint")
    return found[-1]
