"""Ascent along the reward's own gradient, through decoder, solver and network.

The frozen network, the decoder and the reward are run by the very road that draws and scores images, and made again
call by call for the backward pass (`models.generate.recomputed`): the memory is that of one call. A prompt is drawn
once, by the one solver that the search has come to; Adam moves the free parameters (`training.parameters`) of what
ppo.train names. A gradient finds a reward's holes sooner than draws do: let a panel watch (logging.panel), and export
the step that it approves (--best).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from errors import InputError
from training.parameters import GRID, SolverParameters
from training.ppo.cold_start import trainable
from training.ppo.config import Config, PPOConfig
from training.ppo.rl_runner import RLRunner
from training.ppo.rollout import PromptStream, RolloutSource, Scores
from training.ppo.search.protocol import AdamSearch, reward_metrics
from training.solver import Solver


class RewardGradient(AdamSearch):
    """Adam on a solver's free parameters."""

    def __init__(
        self,
        policy: SolverParameters,
        source: RolloutSource[Any],
        prompts: PromptStream,
        settings: PPOConfig,
        *,
        learning_rate: float,
    ) -> None:
        """Move `policy` in place, by a step size that starts at `learning_rate`.

        `source` tries one solver on each prompt; its scores are differentiable in the solvers' numbers.
        """
        super().__init__(policy, source, prompts, settings, learning_rate, "cosine")

    def _step(self, number: int) -> dict[str, float]:
        """One batch of images, and one step of the optimizer.

        Raises:
            DivergenceError: too many rewards or their gradients are not finite, or the solver is none any more.
            InputError: the device's memory does not suffice.
        """
        numbers = self.policy.numbers()
        scores, slopes, kept = self._slopes(numbers)
        update = self._update(numbers, slopes)
        return {**reward_metrics(number, scores, 1), "dropped_groups": int((~kept).sum()), **update}

    def _slopes(self, numbers: Mapping[str, Tensor]) -> tuple[Scores, dict[str, Tensor], Tensor]:
        """The step's scores; the gradient of their mean in the learned numbers; the images [N] that it is made of.

        Every image has the numbers to itself, so that one whose gradient is not finite can be left out.
        """
        images = self.settings.rollout_batch_size
        own = {name: part.detach().repeat(images, *[1] * part.ndim).requires_grad_() for name, part in numbers.items()}
        table = self.policy.table(own)
        table = table if table.batch_size else table.expand(images)
        try:
            outcome = self.source.roll_out(table, self.prompts.take(images), self.completed_steps, own.get(GRID))
            scores = self.source.score(outcome)
            wanted = scores.rewards[scores.rewards.isfinite()].sum()
            gradients = torch.autograd.grad(wanted, list(own.values()), materialize_grads=True)
        except torch.OutOfMemoryError as error:
            raise InputError(
                "the device's memory does not suffice for a gradient: lower ppo.max_rows, ppo.decode_chunk_size and "
                "reward.batch_size"
            ) from error
        kept = torch.stack([part.flatten(1).isfinite().all(1) for part in gradients]).all(0) & scores.rewards.isfinite()
        self._require_enough(
            kept,
            "the rewards of {:.0%} of the images, or their gradients, are",
            "lower search.learning_rate, or use model.dtype=float32",
        )
        return scores, {name: part[kept].mean(0) for name, part in zip(own, gradients, strict=True)}, kept

    def _update(self, numbers: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> dict[str, float]:
        """A step of the optimizer, uphill."""
        rate = self._set_learning_rate()
        self.optimizer.zero_grad()
        torch.autograd.backward(list(numbers.values()), [-slopes[name] for name in numbers])
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self._require_solver("the table", "lower search.learning_rate")
        return {"learning_rate": rate, "gradient_norm": norm.item()}


def make_policy(solver: Solver, config: Config) -> SolverParameters:
    """The free parameters that are moved, at the start."""
    return SolverParameters(solver.table, solver.sigmas, trainable(solver.table, config.ppo.train))


def make_search(policy: SolverParameters, source: RLRunner, prompts: PromptStream, config: Config) -> RewardGradient:
    """Gradient ascent with ppo.rollout_batch_size images a step.

    Raises InputError for a reward without a gradient, and for a guidance that has none where it starts.
    """
    try:
        source.reward.require_gradient()
    except InputError as error:
        raise InputError(f"search.method=reward_gradient: {error}") from None
    doubles = source.denoiser.guidance.doubles
    if doubles and "guidance" in policy.learned and (policy.table().guidance == 1).any():
        raise InputError(
            "search.method=reward_gradient: ppo.train names guidance, and the start has a scale of exactly 1, at which "
            "the network is not asked without the prompt and there is no gradient: start at another, or leave it out"
        )
    return RewardGradient(policy, source, prompts, config.ppo, learning_rate=config.search.learning_rate)
