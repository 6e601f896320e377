"""A weighted sum of rewards whose scales have nothing to do with each other."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from errors import InputError
from training.measuring.scoring import scores_by
from training.ppo.rewards.protocol import Reward


@dataclass
class RunningMoments:
    """Mean and variance of everything seen so far, batch by batch (Chan, Golub and LeVeque 1979, parallel update)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def add(self, values: Tensor) -> None:
        """Take in the finite ones of `values` [N]."""
        values = values.detach()
        finite = values[values.isfinite()].double()
        if not len(finite):
            return
        mean, squares = float(finite.mean()), float(finite.var(correction=0)) * len(finite)
        total = self.count + len(finite)
        shift = mean - self.mean
        self.squares += squares + shift**2 * self.count * len(finite) / total
        self.mean += shift * len(finite) / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Standard deviation (N - 1 in the denominator); 1 where it is undefined or zero."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0


class WeightedMix:
    """Sum of standardised rewards: sum_i weight_i * (score_i - mean_i) / deviation_i.

    Mean and deviation are running ones, over every raw score handed to `observe` since the start of the run, so that
    the mix hardly depends on the batch and settles as the run goes on. They are part of a checkpoint (`state_dict`).
    Until something was observed, each batch is standardised by itself, or by what `combine` is told. A single reward is
    only weighted, not standardised.

    A trainer calls `raw_scores`, logs them, gathers them over processes, `observe`s them and `combine`s them. To
    compare two tables, combine the raw scores of both with the same statistics: `score` and `combine` never change
    them.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward, float]]) -> None:
        """Mix rewards.

        Args:
            parts: name -> (reward, weight).

        Raises:
            InputError: there is no part, or a weight is zero or not finite.
        """
        if not parts:
            raise InputError("A mix of rewards needs at least one.")
        for name, (_, weight) in parts.items():
            if not math.isfinite(weight) or weight == 0:
                raise InputError(f"The weight of the reward {name} must be a finite number other than 0, not {weight}.")
        self.name = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, (_, weight) in parts.items())
        self._parts = dict(parts)
        self._moments = {name: RunningMoments() for name in parts}

    def raw_scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score images [N, 3, H, W] in [0, 1] with each reward: name -> [N] float32. Raises InputError if one fails."""
        return {name: scores_by(reward, images, prompts) for name, (reward, _) in self._parts.items()}

    def readers(self) -> list[str]:
        """The names of those that read prompts."""
        return [name for name, (reward, _) in self._parts.items() if reward.reads_prompts]

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """See `Reward.say_what_is_cut`, for each reward."""
        for reward, _ in self._parts.values():
            reward.say_what_is_cut(prompts)

    def require_gradient(self) -> None:
        """Raise InputError for a reward whose scores carry no gradient to the images."""
        with torch.enable_grad():
            raw = self.raw_scores(torch.full((1, 3, 64, 64), 0.5, requires_grad=True), ["a picture"])
        if flat := [name for name, scores in raw.items() if not scores.requires_grad]:
            raise InputError(f"the scores of the reward {flat[0]} carry no gradient to the image: search without one")

    def observe(self, raw: Mapping[str, Tensor]) -> None:
        """Take raw scores, name -> [N], into the running statistics; NaN and infinite ones are left out."""
        for name, moments in self._moments.items():
            moments.add(raw[name])

    def combine(self, raw: Mapping[str, Tensor], unseen: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mix raw scores, name -> [N], into [N] float32. A sample with a NaN in one part is NaN.

        unseen: raw scores whose mean and deviation serve while nothing was observed; None: those of `raw` itself.
        """
        unseen = raw if unseen is None else unseen
        if len(self._parts) == 1:
            (name, (_, weight)), *_ = self._parts.items()
            return weight * raw[name]
        return torch.stack(
            [weight * self._standardised(name, raw[name], unseen[name]) for name, (_, weight) in self._parts.items()]
        ).sum(0)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mixed score of images [N, 3, H, W] in [0, 1] with N prompts: [N] float32."""
        return self.combine(self.raw_scores(images, prompts))

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the running statistics as plain numbers."""
        return {name: asdict(moments) for name, moments in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from statistics that `state_dict` gave.

        Raises:
            InputError: they belong to other rewards.
        """
        if state.keys() != self._moments.keys():
            raise InputError(
                f"The checkpoint's reward statistics are of {', '.join(state) or 'nothing'}, "
                f"the configured rewards are {', '.join(self._moments)}."
            )
        self._moments = {
            name: RunningMoments(operator.index(moments["count"]), float(moments["mean"]), float(moments["squares"]))
            for name, moments in state.items()
        }

    def _standardised(self, name: str, scores: Tensor, unseen: Tensor) -> Tensor:
        moments = self._moments[name]
        if moments.count == 0:
            moments = RunningMoments()
            moments.add(unseen)
        return ((scores.double() - moments.mean) / moments.deviation).float()
