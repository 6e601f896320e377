"""Rewards: what a run tries to raise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from errors import InputError
from models.asset_table import BUNDLES, CLIP, ROOT
from models.loading import read_json
from training.ppo.rewards import reward_hps
from training.ppo.rewards.aesthetic import AestheticScore
from training.ppo.rewards.clip_score import ClipScore
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rewards.pickscore import PickScore
from training.ppo.rewards.protocol import Reward
from training.ppo.rewards.reward_hps import DEFAULT_TOKENIZER, RewardFiles, RewardHPS

__all__ = ["Reward", "RewardFiles", "RewardHPS", "WeightedMix", "build_reward", "find_reward_files", "load_reward"]

# Rewards that go by a name, and the assets that each needs.
NAMED = {"pickscore": "pickscore", "clip_score": "clip", "aesthetic": "aesthetic"}


def find_reward_files(reward: str | Path, tokenizer_folder: str | Path | None = None) -> RewardFiles:
    """Find what belongs to a reward, without loading it: a dry run needs no more.

    Args:
        reward: a name (`pickscore`, `clip_score`, `aesthetic`) or a checkpoint in open_clip's layout.
        tokenizer_folder: used instead of the reward's own tokenizer.

    Raises:
        InputError: files are missing or malformed; says which command fetches them.
    """
    if str(reward) not in NAMED:
        return reward_hps.find_reward_files(reward, tokenizer_folder)
    bundle = NAMED[str(reward)]
    files = [ROOT / asset.path for asset in BUNDLES[bundle].files if asset.path.startswith("weights/")]
    absent = [str(path) for path in files if not path.is_file()]
    if absent:
        raise InputError(
            f"Reward {reward} needs files that are not there: {', '.join(absent)}. "
            f"Fetch them:  python -m models.assets fetch {bundle}"
        )
    weights = next(path for path in files if path.suffix != ".json")
    config = next(path for path in files if path.suffix == ".json")
    tokenizer = DEFAULT_TOKENIZER if tokenizer_folder is None else Path(tokenizer_folder)
    reward_hps.check_tokenizer(weights, tokenizer)
    return RewardFiles(weights, read_json(config), tokenizer, assumed=False)


def load_reward(
    reward: str | Path,
    *,
    device: torch.device | str,
    batch_size: int,
    amp_dtype: torch.dtype | None = None,
    tokenizer_folder: str | Path | None = None,
) -> RewardHPS | PickScore | ClipScore | AestheticScore:
    """Load one reward, named as `find_reward_files` takes it; the rest as `ClipScorer` takes it.

    Raises:
        InputError: a file is missing or malformed.
    """
    files = find_reward_files(reward, tokenizer_folder)
    scoring = {"device": device, "batch_size": batch_size, "amp_dtype": amp_dtype}
    match str(reward):
        case "pickscore":
            return PickScore(files.weights.parent, tokenizer_folder=files.tokenizer, **scoring)
        case "clip_score":
            return ClipScore(files.weights.parent, tokenizer_folder=files.tokenizer, **scoring)
        case "aesthetic":
            clip_folder = (ROOT / CLIP[0].path).parent
            return AestheticScore(files.weights, clip_folder, tokenizer_folder=files.tokenizer, **scoring)
        case _:
            return RewardHPS(reward, tokenizer_folder=tokenizer_folder, **scoring)


def build_reward(
    weights: Mapping[str, float],
    *,
    device: torch.device | str,
    batch_size: int,
    amp_dtype: torch.dtype | None = None,
    tokenizer_folder: str | Path | None = None,
) -> WeightedMix:
    """Load rewards and weigh them against each other; each goes by its name, or by that of its file.

    Args:
        weights: reward, as `find_reward_files` takes it -> its weight. One alone is not standardised, so that its mix
            is its raw score.
        device, batch_size, amp_dtype, tokenizer_folder: as `load_reward` takes them, the same for each.

    Raises:
        InputError: a file is missing or malformed, or two rewards have the same name.
    """
    for reward in weights:  # before gigabytes are read in vain
        find_reward_files(reward, tokenizer_folder)
    names = [Path(path).stem for path in weights]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Rewards go by the names of their files, and two are called {', '.join(twice)}: rename one.")
    parts: dict[str, tuple[Reward, float]] = {}
    for name, weight in weights.items():
        reward = load_reward(
            name, device=device, batch_size=batch_size, amp_dtype=amp_dtype, tokenizer_folder=tokenizer_folder
        )
        parts[reward.name] = (reward, weight)
    return WeightedMix(parts)
