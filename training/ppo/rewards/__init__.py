"""Rewards: what a run tries to raise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from errors import InputError
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rewards.protocol import Reward
from training.ppo.rewards.reward_hps import RewardFiles, RewardHPS, find_reward_files

__all__ = ["Reward", "RewardFiles", "RewardHPS", "WeightedMix", "build_reward", "find_reward_files"]


def build_reward(
    weights: Mapping[str, float],
    *,
    device: torch.device | str,
    batch_size: int,
    amp_dtype: torch.dtype | None = None,
    tokenizer_folder: str | Path | None = None,
) -> WeightedMix:
    """Load preference checkpoints and weigh them against each other; each goes by the name of its file.

    Args:
        weights: checkpoint -> its weight. One alone is not standardised, so that its mix is its raw score.
        device, batch_size, amp_dtype, tokenizer_folder: as `RewardHPS` takes them, the same for each checkpoint.

    Raises:
        InputError: a file is missing or malformed, or two checkpoints have the same name.
    """
    for path in weights:  # before gigabytes are read in vain
        find_reward_files(path, tokenizer_folder)
    names = [Path(path).stem for path in weights]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Rewards go by the names of their files, and two are called {', '.join(twice)}: rename one.")
    parts: dict[str, tuple[Reward, float]] = {}
    for path, weight in weights.items():
        reward = RewardHPS(
            path, device=device, batch_size=batch_size, amp_dtype=amp_dtype, tokenizer_folder=tokenizer_folder
        )
        parts[reward.name] = (reward, weight)
    return WeightedMix(parts)
