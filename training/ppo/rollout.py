"""What the trainer knows of rollouts: prompts in, tables tried on them, rewards out. No model and no reward by name.

A step draws B prompts and k tables for each. All that belongs to its N = B * k samples is prompt-major: row b * k + j
is table j of prompt b.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from errors import InputError
from models.randomness import derived_seed, generator_of
from solvers import EPDTable


class DivergenceError(InputError, RuntimeError):
    """Training cannot go on: too many rewards, or an update, are not finite. The message says what to change."""


@dataclass(frozen=True)
class Scores:
    """What N samples were worth.

    Attributes:
        rewards: [N] float64 on the CPU, prompt-major; NaN or infinite where the image or its score was not finite.
        parts: raw scores [N] of each reward that went into it, by name.
    """

    rewards: Tensor
    parts: Mapping[str, Tensor]


Outcome = TypeVar("Outcome")
"""What a source makes of the tables, for example images; the trainer only hands it on to `score`."""


class RolloutSource(Protocol[Outcome]):
    """Tries tables on prompts. The trainer's only view of models, images and rewards."""

    def roll_out(self, tables: EPDTable, prompts: Sequence[str], step: int, sigmas: Tensor | None = None) -> Outcome:
        """Use tables [B * k, S, K] on B prompts; `step` (0, 1, ...) seeds whatever is random in it.

        `sigmas`: noise levels of each [B * k, S + 1]; None where they are not drawn.
        """
        ...

    def score(self, outcome: Outcome) -> Scores:
        """Reward the N = B * k samples of a rollout, in the order of its tables."""
        ...

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent by phase since this was last called."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        ...


class PromptStream:
    """Prompts without end: epoch after epoch in the list's order, or in a new order each epoch drawn from the seed."""

    def __init__(self, prompts: Sequence[str], *, shuffle: bool, seed: int) -> None:
        """Start at the first prompt of epoch 0.

        Raises:
            InputError: there are no prompts.
        """
        if not prompts:
            raise InputError("there are no prompts to train on: the prompt file is empty")
        self.prompts = tuple(prompts)
        self.shuffle = shuffle
        self.seed = seed
        self.cursor = 0  # prompts taken so far, over all epochs
        self.fingerprint = hashlib.sha256("\0".join(self.prompts).encode()).hexdigest()
        self._order: tuple[int, list[int]] = (-1, [])

    def take(self, number: int) -> tuple[str, ...]:
        """The next `number` prompts."""
        places = range(self.cursor, self.cursor + number)
        self.cursor += number
        return tuple(self.prompts[self._index(place)] for place in places)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and what the stream is made of."""
        return {"cursor": self.cursor, "seed": self.seed, "shuffle": self.shuffle, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a place that `state_dict` gave.

        Raises:
            InputError: the prompts, their order or the seed are not those of the checkpoint.
        """
        mine = self.state_dict()
        different = [name for name in ("fingerprint", "shuffle", "seed") if mine[name] != state[name]]
        if different:
            names = {"fingerprint": "prompts", "shuffle": "data.shuffle", "seed": "run.seed"}
            raise InputError(
                f"the checkpoint was trained with other {' and '.join(names[name] for name in different)}: "
                f"resume with the prompt file and the configuration of the run"
            )
        self.cursor = operator.index(state["cursor"])
        if self.cursor < 0:
            raise ValueError(f"the place in the prompts is {self.cursor}")

    def _index(self, place: int) -> int:
        epoch, position = divmod(place, len(self.prompts))
        if not self.shuffle:
            return position
        if self._order[0] != epoch:
            generator = generator_of(derived_seed("prompt order", self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.prompts), generator=generator).tolist())
        return self._order[1][position]
