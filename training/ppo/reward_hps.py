"""The second, documented import path of `training.ppo.rewards.reward_hps`."""

from training.ppo.rewards.reward_hps import RewardHPS

__all__ = ["RewardHPS"]
