"""The preference reward of the main job as the reward of images without prompts: one prompt for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from training.ddpm.config import DDPMConfig
from training.ddpm.rollout import ImageReward
from training.ppo.rewards import RewardHPS


def preference_reward(config: DDPMConfig, device: torch.device) -> ImageReward:
    """How well images show finetune.prompt, by the checkpoint at path.preference.

    Raises:
        InputError: the checkpoint is missing or malformed.
    """
    judge = RewardHPS(config.path.preference, device=device, batch_size=config.finetune.microbatch)

    def score(images: Tensor) -> Tensor:
        return judge.score(images, [config.finetune.prompt] * len(images))

    return score
