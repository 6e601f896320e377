"""Rewards: what a run tries to raise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

from errors import InputError
from models.asset_table import BUNDLES, ROOT
from models.loading import read_json
from training.ppo.reward_names import FUNCTION, reward_name
from training.ppo.rewards import aesthetic, clip_score, image_reward, mps, pickscore, reward_hps
from training.ppo.rewards.batched import Scoring
from training.ppo.rewards.function import FunctionReward, find_function
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rewards.named import RewardFiles
from training.ppo.rewards.protocol import Reward
from training.ppo.rewards.reward_hps import DEFAULT_TOKENIZER, RewardHPS

__all__ = ["Reward", "RewardFiles", "RewardHPS", "WeightedMix", "build_reward", "find_reward_files", "load_reward"]

NAMED = {
    "pickscore": pickscore.REWARD,
    "clip_score": clip_score.REWARD,
    "aesthetic": aesthetic.REWARD,
    "imagereward": image_reward.REWARD,
    "mps": mps.REWARD,
}
"""Rewards that go by a name, a module each."""


def find_reward_files(reward: str | Path, tokenizer_folder: str | Path | None = None) -> RewardFiles:
    """Find what belongs to a reward, without loading it: a dry run needs no more.

    Args:
        reward: a name (of `NAMED`), `my_module:my_reward` (see `FunctionReward`) or a checkpoint in open_clip's layout.
        tokenizer_folder: used instead of the reward's own tokenizer, where that is CLIP's.

    Raises:
        InputError: files are missing or malformed, and it says which command fetches them; or there is no such
            function.
    """
    if str(reward) in NAMED:
        return _named_files(str(reward), tokenizer_folder)
    if FUNCTION.fullmatch(str(reward)):
        return find_function(str(reward))
    return reward_hps.find_reward_files(reward, tokenizer_folder)


def _named_files(name: str, tokenizer_folder: str | Path | None) -> RewardFiles:
    named = NAMED[name]
    files = tuple(ROOT / asset.path for asset in BUNDLES[named.bundle].files if asset.path.startswith("weights/"))
    absent = [str(path) for path in files if not path.is_file()]
    if absent:
        raise InputError(
            f"Reward {name} needs files that are not there: {', '.join(absent)}. "
            f"Fetch them:  python -m models.assets fetch {named.bundle}"
        )
    weights = next(path for path in files if path.suffix != ".json")
    config = next((path for path in files if path.suffix == ".json"), weights.with_suffix(".json"))
    tokenizer = DEFAULT_TOKENIZER if tokenizer_folder is None else Path(tokenizer_folder)
    if named.tokenizer is not None:
        tokenizer = ROOT / named.tokenizer
    reward_hps.check_tokenizer(weights, tokenizer)
    return RewardFiles(weights, read_json(config) if config.is_file() else {}, tokenizer, others=files)


def load_reward(
    reward: str | Path, *, tokenizer_folder: str | Path | None = None, **scoring: Unpack[Scoring]
) -> Reward:
    """Load one reward, named as `find_reward_files` takes it; the rest as `BatchedScorer` takes it.

    Raises:
        InputError: a file is missing or malformed, or there is no such function.
    """
    files = find_reward_files(reward, tokenizer_folder)
    if str(reward) in NAMED:
        return NAMED[str(reward)].load(files, **scoring)
    if FUNCTION.fullmatch(str(reward)):
        return FunctionReward(str(reward))
    return RewardHPS(reward, tokenizer_folder=tokenizer_folder, **scoring)


def build_reward(
    weights: Mapping[str, float], *, tokenizer_folder: str | Path | None = None, **scoring: Unpack[Scoring]
) -> WeightedMix:
    """Load rewards and weigh them against each other; each goes by its name, or by that of its file.

    Args:
        weights: reward, as `find_reward_files` takes it -> its weight. One alone is not standardised, so that its mix
            is its raw score.
        tokenizer_folder, scoring: as `load_reward` takes them, the same for each.

    Raises:
        InputError: a file is missing or malformed, or two rewards have the same name.
    """
    for reward in weights:  # before gigabytes are read in vain
        find_reward_files(reward, tokenizer_folder)
    names = [reward_name(reward) for reward in weights]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Rewards go by the names of their files, and two are called {', '.join(twice)}: rename one.")
    parts: dict[str, tuple[Reward, float]] = {}
    for name, weight in weights.items():
        reward = load_reward(name, tokenizer_folder=tokenizer_folder, **scoring)
        parts[reward.name] = (reward, weight)
    return WeightedMix(parts)
