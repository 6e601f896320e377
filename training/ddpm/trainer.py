"""PPO of a DDPM's weights: every denoising step is an action (DDPO, arXiv 2305.13301), the reward is the image's.

The gradient is accumulated call by call: the graph of one network call, one step of one micro-batch, is held at a time.
Micro-batches go through the network as they did in the rollout, so that before the first update every ratio is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from errors import InputError
from models.randomness import derived_seed, generator_of
from training.ddpm.config import FinetuneConfig
from training.ddpm.policy import DenoisingPolicy
from training.ddpm.rollout import Episodes, ImageReward, roll_out, seeds_of
from training.ppo import algorithm
from training.runs.checkpoint import load_optimizer

RUNNING_DECAY = 0.9  # of the running baseline, per epoch
SMALLEST_DEVIATION = 1e-8  # of rewards that are not taken for equal

METRICS: Mapping[str, str] = {
    "step": "number of this epoch, from 1",
    "images": "images rolled out since the start of the run",
    "reward_mean": "mean reward of the epoch's images",
    "reward_deviation": "standard deviation of the epoch's rewards",
    "policy_loss": "clipped surrogate, mean over the epoch's updates; summed over steps where each step is clipped",
    "kl": "KL(policy || starting DDPM) in nats, summed over the steps, mean over the updates; only with a KL weight",
    "gradient_norm": "Euclidean norm of the gradient before clipping, mean over the updates",
    "first_pass_ratio_error": "largest |ratio - 1| of any step before the first update: 0, or something is wrong",
    "clip_fraction": "share of ratios outside the clip range as an update finds them, mean over the updates; with one "
    "update an epoch 0",
    "approximate_kl": "KL(rollout policy || policy) in nats of one ratio's actions, likewise",
}
"""Every metric of an epoch with its meaning; beside these `seconds/rollout`, `seconds/update` and `seconds/step`."""


@dataclass(frozen=True)
class Gradient:
    """What one accumulation saw.

    Attributes:
        policy_loss: the surrogate, as minimised.
        kl: to the starting DDPM, nats summed over the steps; NaN where it has no weight and is not computed.
        log_probs: [A, n] float64 of the actions, by the policy as it was.
        old_log_probs: [A, n], by the policy that drew them.
    """

    policy_loss: float
    kl: float
    log_probs: Tensor
    old_log_probs: Tensor


def accumulate_gradient(
    policy: DenoisingPolicy,
    reference: DenoisingPolicy,
    groups: Sequence[Episodes],
    advantages: Sequence[Tensor],
    settings: FinetuneConfig,
) -> Gradient:
    """Add the gradient of the loss over groups of episodes to the parameters' `.grad`.

    The loss is the mean over episodes of the clipped surrogate - summed over steps with one ratio each, or of the whole
    trajectory's ratio - plus `kl_coef` times the KL divergence to `reference`, summed over the steps (DPOK, arXiv
    2305.16381, section 4.2: its gradient is taken at the states that were visited).

    Args:
        policy: its parameters get the gradient.
        reference: the starting DDPM; not called where `kl_coef` is 0.
        groups: micro-batches.
        advantages: [n] of each group's episodes.
        settings: `ratio`, `clip_eps`, `kl_coef`.
    """
    total = sum(len(values) for values in advantages)
    loss, kl = 0.0, 0.0
    seen: list[Tensor] = []
    for group, values in zip(groups, advantages, strict=True):
        share = len(values) / total
        weights = None
        if settings.ratio == "trajectory":
            surrogate, weights = _trajectory_weights(policy, group, values, settings.clip_eps)
            loss += share * surrogate
        log_probs = []
        for action in range(group.num_actions):
            before, after = group.states[action], group.states[action + 1]
            distribution = policy(before, action)
            log_prob = distribution.log_prob(after)
            if weights is None:
                part = algorithm.clipped_surrogate(log_prob, group.log_probs[action], values, settings.clip_eps)
                loss += share * part.item()
            else:
                part = (weights * log_prob).sum()
            if settings.kl_coef:
                with torch.no_grad():
                    start = reference(before, action)
                divergence = distribution.kl(start).mean()
                part = part + settings.kl_coef * divergence
                kl += share * divergence.item()
            (share * part).backward()
            log_probs.append(log_prob.detach())
        seen.append(torch.stack(log_probs))
    old = torch.cat([group.log_probs for group in groups], dim=1)
    return Gradient(loss, kl if settings.kl_coef else torch.nan, torch.cat(seen, dim=1), old)


def _trajectory_weights(
    policy: DenoisingPolicy, group: Episodes, advantages: Tensor, clip_range: float
) -> tuple[float, Tensor]:
    """The surrogate of whole trajectories, and its derivative [n] by each trajectory's log-probability.

    The derivative is the same for all steps of a trajectory, so with it known the steps can be taken one by one.
    """
    with torch.no_grad():
        steps = [
            policy(group.states[action], action).log_prob(group.states[action + 1])
            for action in range(group.num_actions)
        ]
    log_prob = torch.stack(steps).sum(0).requires_grad_()  # [n]
    loss = algorithm.clipped_surrogate(log_prob, group.log_probs.sum(0), advantages, clip_range)
    return loss.item(), torch.autograd.grad(loss, log_prob)[0]


class DDPMTrainer:
    """PPO with every denoising step as an action."""

    def __init__(
        self,
        policy: DenoisingPolicy,
        reference: DenoisingPolicy,
        reward: ImageReward,
        settings: FinetuneConfig,
        *,
        seed: int,
    ) -> None:
        """Train `policy`.

        Args:
            policy: the parameters of its network that require gradients are changed in place.
            reference: the starting DDPM, for the KL divergence.
            reward: of images [N, 3, H, W] in [0, 1].
            settings: section `finetune` of the configuration.
            seed: of the rollouts and of the order of the updates.
        """
        self.policy, self.reference, self.reward, self.settings = policy, reference, reward, settings
        self.seed = seed
        self.parameters = [weight for weight in policy.network.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        self.average: AveragedModel | None = None
        if settings.ema_decay:
            self.average = AveragedModel(policy.network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        self.running_reward: float | None = None
        self.completed_steps = 0

    @property
    def result(self) -> nn.Module:
        """The network to keep: the averaged one where there is one."""
        return self.policy.network if self.average is None else self.average.module

    def step(self) -> dict[str, float]:
        """One epoch: roll out, score, update; returns the metrics named in `METRICS`.

        Raises:
            InputError: rewards or gradients are not finite.
        """
        start = perf_counter()
        groups = self._roll_out()
        rolled_out = perf_counter()
        rewards = self._rewards(groups)
        update = self._update(groups, self._advantages(rewards))
        self.completed_steps += 1
        end = perf_counter()
        return {
            "step": self.completed_steps,
            "images": self.completed_steps * self.settings.episodes_per_epoch,
            "reward_mean": rewards.mean().item(),
            "reward_deviation": rewards.std(correction=0).item(),
            **update,
            "seconds/rollout": rolled_out - start,
            "seconds/update": end - rolled_out,
            "seconds/step": end - start,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs, as tensors and plain values; to be taken between steps."""
        return {
            "completed_steps": self.completed_steps,
            "network": self.policy.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "running_reward": self.running_reward,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            InputError: the state is of a network of another shape.
        """
        try:
            self.policy.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise InputError(
                "the checkpoint's network is another one than that of path.ddpm, which has changed since: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if (self.average is None) != (state["average"] is None):
            raise InputError(
                "finetune.ema_decay: a run is resumed with an average of its weights, or without, as it began"
            )
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.running_reward = None if state["running_reward"] is None else float(state["running_reward"])
        self.completed_steps = state["completed_steps"]

    def _roll_out(self) -> list[Episodes]:
        settings = self.settings
        seeds = seeds_of("rollout", self.seed, self.completed_steps, count=settings.episodes_per_epoch)
        return [
            roll_out(self.policy, seeds[start : start + settings.microbatch])
            for start in range(0, settings.episodes_per_epoch, settings.microbatch)
        ]

    @torch.no_grad()
    def _rewards(self, groups: Sequence[Episodes]) -> Tensor:
        """Rewards [N] float64 of all episodes, in their order."""
        rewards = torch.cat([self.reward(group.images) for group in groups]).to(self.policy.device, torch.float64)
        if not rewards.isfinite().all():
            raise InputError(
                f"epoch {self.completed_steps + 1}: {int((~rewards.isfinite()).sum())} of {len(rewards)} rewards are "
                "not finite: the update before went too far; lower finetune.lr, and resume from a "
                "checkpoint, if there is one"
            )
        return rewards

    def _advantages(self, rewards: Tensor) -> Tensor:
        """Rewards less the baseline, normalised in units of the rewards' deviation; zeros where all are equal."""
        match self.settings.baseline:
            case "leave_one_out":
                advantages = algorithm.leave_one_out_advantages(rewards, len(rewards))
            case "running":
                mean = rewards.mean().item()
                baseline = mean if self.running_reward is None else self.running_reward
                self.running_reward = RUNNING_DECAY * baseline + (1 - RUNNING_DECAY) * mean
                advantages = rewards - baseline
            case _:
                advantages = rewards
        deviation = rewards.std(correction=0)
        if deviation <= SMALLEST_DEVIATION:
            return torch.zeros_like(advantages)
        return advantages / deviation if self.settings.normalize_advantages else advantages

    def _update(self, groups: Sequence[Episodes], advantages: Tensor) -> dict[str, float]:
        settings = self.settings
        values = advantages.split(settings.microbatch)
        an_update = (settings.minibatch or settings.episodes_per_epoch) // settings.microbatch
        updates: list[dict[str, float]] = []
        for number in range(settings.passes):
            seed = derived_seed("order", self.seed, self.completed_steps, number)
            order = torch.randperm(len(groups), generator=generator_of(seed))
            for rows in order.split(an_update):
                updates.append(self._one_update([groups[row] for row in rows], [values[row] for row in rows]))
        means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        first = updates[0]["ratio_error"]
        del means["ratio_error"]
        return {**means, "first_pass_ratio_error": first}

    def _one_update(self, groups: Sequence[Episodes], advantages: Sequence[Tensor]) -> dict[str, float]:
        """One step of the optimizer."""
        settings = self.settings
        self.optimizer.zero_grad()
        gradient = accumulate_gradient(self.policy, self.reference, groups, advantages, settings)
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.grad_clip)
        if not norm.isfinite():
            raise InputError(
                f"epoch {self.completed_steps + 1}: the norm of the gradient is {norm.item()}: the update before went "
                "too far; lower finetune.lr or finetune.passes, and resume from a checkpoint, if there is one"
            )
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.policy.network)
        now, old = gradient.log_probs, gradient.old_log_probs
        ratio_error = (now - old).expm1().abs().max().item()
        if settings.ratio == "trajectory":
            now, old = now.sum(0), old.sum(0)
        kl = {"kl": gradient.kl} if settings.kl_coef else {}
        return {
            "policy_loss": gradient.policy_loss,
            **kl,
            "gradient_norm": norm.item(),
            "ratio_error": ratio_error,
            "clip_fraction": algorithm.clip_fraction(now, old, settings.clip_eps),
            "approximate_kl": algorithm.approximate_kl(now, old),
        }
