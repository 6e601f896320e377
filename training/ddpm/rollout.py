"""Episodes of the denoising policy: from pure noise to an image, every state kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from models.pictures import to_images
from models.randomness import derived_seed
from training.ddpm.policy import DenoisingPolicy

ImageReward = Callable[[Tensor], Tensor]
"""images [N, 3, H, W] in [0, 1] -> scores [N], higher is better."""


@dataclass(frozen=True)
class Episodes:
    """N episodes that went through the network together; to score them again in the same company repeats every bit.

    Attributes:
        states: [A + 1, N, C, H, W] float32, before each of the A actions and after the last.
        log_probs: [A, N] float64 of each action, by the policy that drew it.
        images: [N, 3, H, W] in [0, 1].
    """

    states: Tensor
    log_probs: Tensor
    images: Tensor

    @property
    def num_actions(self) -> int:
        """A."""
        return len(self.log_probs)


def seeds_of(stream: str, *numbers: int, count: int) -> list[int]:
    """`count` seeds in [0, 2^63): another stream or other numbers give unrelated ones."""
    return [derived_seed(stream, *numbers, index) for index in range(count)]


@torch.no_grad()
def roll_out(policy: DenoisingPolicy, seeds: Sequence[int]) -> Episodes:
    """One episode a seed, all in one batch."""
    noise = policy.episode_noise(seeds).to(policy.device)  # [N, S, C, H, W]
    x = noise[:, 0]
    states, log_probs = [x], []
    actions = policy.steps.num_actions
    for step in range(len(policy.steps)):
        distribution = policy(x, step)
        if step < actions:
            x = distribution.sample(noise[:, step + 1])
            states.append(x)
            log_probs.append(distribution.log_prob(x))
        else:
            x = distribution.mean
    chances = torch.stack(log_probs) if log_probs else torch.empty(0, len(seeds), dtype=torch.float64, device=x.device)
    return Episodes(torch.stack(states), chances, to_images(x))


@torch.no_grad()
def sample_images(policy: DenoisingPolicy, seeds: Sequence[int], batch_size: int, doing: str | None = None) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] on the CPU, one a seed, `batch_size` at a time.

    `doing`: what a progress bar says; None: there is none.
    """
    batches = [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]
    progress = tqdm(batches, desc=doing, unit="batch", disable=doing is None)
    return torch.cat([roll_out(policy, batch).images.cpu() for batch in progress])
