"""What a run needs of whatever looks for a better solver, step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers import EPDTable
from training.ppo import algorithm
from training.ppo.config import Config, PPOConfig
from training.ppo.rollout import DivergenceError, PromptStream, RolloutSource, Scores
from training.runs.checkpoint import load_optimizer
from training.solver import Solver


class Policy(Protocol):
    """What a search moves, a `torch.nn.Module`: it gives the solver that the search has come to."""

    def mean(self) -> tuple[EPDTable, Tensor | None]:
        """The mean table and, where they are trained, the mean noise levels: float64, detached, on the CPU.

        Raises ValueError where they are none any more.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Its parameters, and buffers that say where it began."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object:
        """Go on from what `state_dict` gave."""
        ...


class Search(ABC):
    """A search: its steps move a policy, by the rewards that a source gives solvers on prompts."""

    def __init__(self, policy: Policy, source: RolloutSource[Any], prompts: PromptStream) -> None:
        """Before the first step.

        Args:
            policy: changed in place.
            source: tries and rewards solvers.
            prompts: where each step's prompts come from.
        """
        self.policy, self.source, self.prompts = policy, source, prompts
        self.completed_steps = 0

    def step(self) -> dict[str, float]:
        """One rollout and what is made of it; returns metrics, at least those of `reward_metrics` and `seconds/...`.

        Raises `training.ppo.rollout.DivergenceError` where it cannot go on.
        """
        start = perf_counter()
        self.source.take_seconds()  # what others did with the source since the last step is not this step's
        metrics = self._step(self.completed_steps + 1)
        self.completed_steps += 1
        phases = {f"seconds/{phase}": spent for phase, spent in self.source.take_seconds().items()}
        return {**metrics, **phases, "seconds/step": perf_counter() - start}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs, as tensors and plain values; to be taken between steps.

        The tensors are the live ones: write them down, or copy them, before the next step.
        """
        return {
            "completed_steps": self.completed_steps,
            "policy": self.policy.state_dict(),
            "prompts": self.prompts.state_dict(),
            "source": self.source.state_dict(),
            **self._own_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken. Raises InputError for the state of other prompts or rewards."""
        self.prompts.load_state_dict(state["prompts"])
        self.source.load_state_dict(state["source"])
        self.policy.load_state_dict(state["policy"])
        self._load_own_state(state)
        self.completed_steps = state["completed_steps"]

    @abstractmethod
    def _step(self, number: int) -> dict[str, float]:
        """Make the step of this number, from 1; returns its metrics but for the times."""

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What the method adds to the state."""

    @abstractmethod
    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take it from the whole state."""

    def _diverged(self, why: str) -> DivergenceError:
        return DivergenceError(f"step {self.completed_steps + 1}: {why}, and resume from the last checkpoint")


class AdamSearch(Search):
    """A search whose policy Adam moves."""

    def __init__(
        self,
        policy: Policy,
        source: RolloutSource[Any],
        prompts: PromptStream,
        settings: PPOConfig,
        learning_rate: float,
        schedule: algorithm.LearningRateSchedule,
    ) -> None:
        """See `Search`; `settings` is section `ppo` of the configuration, `learning_rate` Adam's step size at first."""
        super().__init__(policy, source, prompts)
        self.settings = settings
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
        self._rate = learning_rate, schedule

    def _own_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        load_optimizer(self.optimizer, state["optimizer"])

    def _set_learning_rate(self) -> float:
        """That of this step by the schedule."""
        rate = algorithm.learning_rate(self.completed_steps, self.settings.steps, *self._rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _require_enough(self, kept: Tensor, which: str, remedy: str) -> None:
        """Raise DivergenceError where too few of the step's groups, or images, are `kept`, bool [n].

        `which`: are not finite, with a place for their share.
        """
        dropped, most = 1.0 - kept.double().mean().item(), self.settings.max_nonfinite_share
        if dropped > most or not kept.any():
            raise self._diverged(
                f"{which.format(dropped)} NaN or infinite, and ppo.max_nonfinite_share={most:g}: {remedy}"
            )

    def _require_solver(self, what: str, remedy: str) -> None:
        """Raise DivergenceError where what the policy has come to is no solver."""
        try:
            self.policy.mean()
        except ValueError as error:
            raise self._diverged(f"{what} is none any more ({error}): {remedy}") from error


class Method(Protocol):
    """A module of `training.ppo.search`, called as `search.method` has it."""

    def make_policy(self, solver: Solver, config: Config) -> Policy:
        """A policy whose mean is the solver; no model is needed, but the noise levels where the grid is trained."""
        ...

    def make_search(self, policy: Policy, source: RolloutSource[Any], prompts: PromptStream, config: Config) -> Search:
        """The search before its first step. Raises InputError where it cannot search with this source."""
        ...


def reward_metrics(step: int, scores: Scores, group_size: int) -> dict[str, float]:
    """Metrics of a step's rewards, by the names of `training.ppo.ppo_trainer.METRICS`.

    Args:
        step: its number, from 1; every step so far took as many images.
        scores: of its images, some finite; prompt-major groups of `group_size`.
        group_size: images on each prompt.
    """
    rewards, groups = scores.rewards.detach(), scores.rewards.detach().view(-1, group_size)
    whole = groups[groups.isfinite().all(1)]
    finite = rewards[rewards.isfinite()]
    within, between = algorithm.reward_variances(whole.flatten(), group_size) if len(whole) else (0.0, 0.0)
    return {
        "step": step,
        "images": step * len(rewards),
        "reward_mean": finite.mean().item(),
        "reward_min": finite.min().item(),
        "reward_max": finite.max().item(),
        **{f"reward/{name}": part[part.isfinite()].double().mean().item() for name, part in scores.parts.items()},
        "reward_within_variance": within,
        "reward_between_variance": between,
        "dropped_groups": len(groups) - len(whole),
    }
