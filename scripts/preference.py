"""The preference reward of the main job as the reward of images without prompts: one prompt for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from training.ddpm.config import DDPMConfig
from training.ddpm.rollout import ImageReward
from training.measuring.scoring import scores_by
from training.ppo.rewards import load_reward


def preference_reward(config: DDPMConfig, device: torch.device) -> ImageReward:
    """How well images show finetune.prompt, by the reward that path.preference names.

    Raises:
        InputError: its files are missing or malformed.
    """
    judge = load_reward(config.path.preference, device=device, batch_size=config.finetune.microbatch)
    judge.say_what_is_cut([config.finetune.prompt])

    def score(images: Tensor) -> Tensor:
        return scores_by(judge, images, [config.finetune.prompt] * len(images))

    return score
