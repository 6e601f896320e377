"""The arithmetic of PPO with leave-one-out baselines: pure functions of tensors, which know no table, model or reward.

Rewards and all that follows from them are prompt-major: the `group_size` samples of one prompt are neighbours.
Sources: PPO (Schulman et al., arXiv 1707.06347), RLOO (Ahmadian et al., arXiv 2402.14740), TPDM (arXiv 2412.01243).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from errors import InputError

Baseline = Literal["prompt", "mixed", "shrunk"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]

LARGEST_LOG_RATIO = 80.0
"""e^80 is the order of the largest float32, which is what plots are drawn with."""


class RewardVariances(NamedTuple):
    """Where the rewards' spread comes from.

    Attributes:
        within: mean over the groups of the unbiased variance inside a group: what the tables (and the noise) did.
        between: unbiased variance of the groups' means: mostly what the prompts did.
    """

    within: float
    between: float


def leave_one_out_advantages(rewards: Tensor, group_size: int, *, baseline: Baseline = "prompt") -> Tensor:
    """A_j = R_j - mean of the other k - 1 rewards of j's group (arXiv 2402.14740, section 3.3); A = R where k is 1.

    Args:
        rewards: [N], prompt-major; N a multiple of `group_size`.
        group_size: k, tables per prompt.
        baseline: `prompt` groups the k samples of one prompt. `mixed` groups samples j, j + N/k, j + 2N/k, ... as the
            public EPD implementation does: its groups mix prompts, the prompts' own spread enters; for ablation only.
            `shrunk` draws the baseline of `prompt` towards the mean of the other prompts' images, as James and Stein
            do, the more, the less the prompts' means differ beside the noise that they carry.

    Returns:
        [N] in the order of `rewards`.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise InputError(f"{len(rewards)} rewards cannot be split into groups of {group_size}")
    if group_size == 1:
        return rewards.clone()
    groups = rewards.view(group_size, -1).T if baseline == "mixed" else rewards.view(-1, group_size)
    advantages = groups - (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    if baseline == "shrunk" and len(groups) > 1:
        means, share = groups.mean(1, keepdim=True), _own_share(rewards, group_size)
        advantages = share * advantages + (1 - share) * (groups - (means.sum() - means) / (len(groups) - 1))
    return (advantages.T if baseline == "mixed" else advantages).reshape(-1)


def _own_share(rewards: Tensor, group_size: int) -> float:
    """Of the prompts' true spread in that of the means of k - 1 of their images, in [0, 1]: the variances' estimate."""
    within, between = reward_variances(rewards, group_size)
    between = max(0.0, between - within / group_size)
    noise = within / (group_size - 1)
    return between / (between + noise) if noise else 1.0


def normalize(advantages: Tensor) -> Tensor:
    """Zero mean and unit population standard deviation over the batch [N]; all zeros when they are all equal."""
    return (advantages - advantages.mean()) / advantages.std(correction=0).clamp(min=1e-8)


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's loss (arXiv 1707.06347, equation 7, negated): mean of max(-A r, -A clip(r, 1 - c, 1 + c)), r the ratio.

    That is -A min(r, 1 + c), or where A is negative -A max(r, 1 - c), c at most 1. The bound is put on log r: where it
    holds, r may be too large for a number, and the gradient is 0 all the same.
    """
    log_ratio = log_prob - old_log_prob
    least, most = torch.tensor([-clip_range, clip_range], dtype=torch.float64).log1p().tolist()  # c may be 1
    bounded = torch.where(advantages < 0, log_ratio.clamp(min=least), log_ratio.clamp(max=most))
    return (-advantages * bounded.exp()).mean()


def total_loss(policy_loss: Tensor, kl: Tensor, entropy: Tensor, *, kl_coef: float, entropy_coef: float) -> Tensor:
    """Policy loss + `kl_coef` * KL to the cold start - `entropy_coef` * entropy; a scalar."""
    return policy_loss + kl_coef * kl - entropy_coef * entropy


def clip_fraction(log_prob: Tensor, old_log_prob: Tensor, clip_range: float) -> float:
    """Share of samples whose probability ratio left [1 - c, 1 + c]."""
    return ((log_prob - old_log_prob).exp() - 1).abs().gt(clip_range).double().mean().item()


def approximate_kl(log_prob: Tensor, old_log_prob: Tensor) -> float:
    """KL(old || new) in nats from the old policy's samples: mean of r - 1 - log r, at least 0 (Schulman's k3).

    A log r above `LARGEST_LOG_RATIO` counts as that: the estimate, of no use by then, stays a number.
    """
    log_ratio = (log_prob - old_log_prob).clamp(max=LARGEST_LOG_RATIO)
    return (log_ratio.expm1() - log_ratio).mean().item()


def effective_sample_share(log_prob: Tensor, old_log_prob: Tensor) -> float:
    """Effective sample size of the importance weights over their number, (sum r)^2 / (N sum r^2), in (0, 1]."""
    log_ratio = log_prob - old_log_prob
    return math.exp((2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)).item()) / len(log_ratio)


def saturated_share(rewards: Tensor, group_size: int, tolerance: float = 1e-6) -> float:
    """Share of rewards in groups whose rewards are all equal within `tolerance`: they teach nothing about the table."""
    groups = rewards.view(-1, group_size)
    return (groups.amax(1) - groups.amin(1)).le(tolerance).double().mean().item()


def reward_variances(rewards: Tensor, group_size: int) -> RewardVariances:
    """Within-group and between-group variance of rewards [N]; 0 where a single sample or a single group leaves none."""
    groups = rewards.double().view(-1, group_size)
    within = groups.var(1).mean().item() if group_size > 1 else 0.0
    return RewardVariances(within, groups.mean(1).var().item() if len(groups) > 1 else 0.0)


def learning_rate(step: int, steps: int, start: float, schedule: LearningRateSchedule) -> float:
    """Learning rate of step 0, 1, ..., steps - 1: constant, or falling from `start` to 0 (reached after the last)."""
    progress = min(step / steps, 1.0)
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return start * factors[schedule]
