"""The preference reward HPS v2.1 (Wu et al., arXiv 2306.09341), and any other CLIP in open_clip's checkpoint layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor
from transformers import CLIPModel

from errors import InputError
from models import asset_table, clip
from models.checkpoints import check_checkpoint
from models.loading import load_tokenizer, read_json
from training.ppo.rewards.batched import Scoring
from training.ppo.rewards.clip_scorer import FeatureScorer
from training.ppo.rewards.named import RewardFiles

DEFAULT_TOKENIZER = Path(__file__).resolve().parents[3] / "src" / "pipelines" / "sd15" / "tokenizer"

# The published files and the option of the command that fetches each. 986 million weights of 2 bytes.
_PUBLISHED = {asset.name: version for version, asset in asset_table.HPS.items()}


def find_reward_files(weights_path: str | Path, tokenizer_folder: str | Path | None = None) -> RewardFiles:
    """Find what belongs to a checkpoint, without loading it: a dry run needs no more.

    A JSON file of the same name beside the weights describes them: `{"model_cfg": {...}, "tokenizer": "folder"}`, with
    the configuration as in `models.clip` and the folder relative to the file; other keys are notes. Weights without one
    are taken for a ViT-H/14, as HPS is, with CLIP's own tokenizer.

    Args:
        weights_path: the checkpoint.
        tokenizer_folder: used instead of the tokenizer named above.

    Raises:
        InputError: weights, description or tokenizer are missing or malformed, or the weights are one version of HPS
            under the name of another; says which command fetches them.
    """
    weights = Path(weights_path)
    if not weights.is_file():
        raise InputError(_missing_weights(weights))
    check_checkpoint(weights)
    _check_version(weights)
    described = weights.with_suffix(".json")
    assumed = not described.is_file()
    if assumed:
        model_cfg, tokenizer = read_json(clip.VIT_H_14), DEFAULT_TOKENIZER
    else:
        model_cfg, tokenizer = _read_description(described)
    if tokenizer_folder is not None:
        tokenizer = Path(tokenizer_folder)
    check_tokenizer(weights, tokenizer)
    return RewardFiles(weights, model_cfg, tokenizer, assumed)


def check_tokenizer(weights: Path, folder: Path) -> None:
    """Raise `InputError` where the folder lacks the tokenizer's files; says which command fetches CLIP's own."""
    absent = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if absent and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"The tokenizer of the reward {weights} is missing: {folder} lacks {' and '.join(absent)} "
            "(about 1.6 MB together). CLIP's own, which reward.cache_dir=null takes, is fetched by: "
            "python -m models.assets fetch tokenizer"
        )


class RewardHPS(FeatureScorer):
    """Scores how well an image answers its prompt: the cosine similarity of CLIP's image and text features."""

    sees_whole = True

    def __init__(
        self, weights_path: str | Path, *, tokenizer_folder: str | Path | None = None, **scoring: Unpack[Scoring]
    ) -> None:
        """Load the checkpoint and its tokenizer.

        Args:
            weights_path: checkpoint in open_clip's layout; see `find_reward_files` for what belongs to it.
            tokenizer_folder: used instead of the checkpoint's own tokenizer.
            scoring: as `ClipScorer` takes it.

        Raises:
            InputError: a file is missing or malformed, the weights do not fit the described model, or there is too
                little memory.
        """
        files = find_reward_files(weights_path, tokenizer_folder)
        super().__init__(files.weights.stem, _load_model(files), load_tokenizer(files.tokenizer), **scoring)

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `FeatureScorer`: [N] in [-1, 1]. HPS v2.1 gives photographs some 0.2 to 0.35."""
        return self.cosine(features, prompts)


def _load_model(files: RewardFiles) -> CLIPModel:
    try:
        return clip.load_open_clip_checkpoint(files.weights, files.model_cfg)
    except InputError as error:
        if not files.assumed:
            raise
        described = files.weights.with_suffix(".json").name
        raise InputError(
            f"{error} Without a description ({described}) beside it, it was taken for a CLIP ViT-H/14."
        ) from None


def _check_version(weights: Path) -> None:
    """Refuse one version of HPS under the name of another: they differ in nothing but their numbers."""
    if weights.name not in _PUBLISHED:
        return
    found = asset_table.published_name(weights)
    if found not in (None, weights.name):
        raise InputError(
            f"{weights} is not what its name says: it is {found}. Move it away and fetch the right one: "
            f"python download_hpsv2_weights.py --version {_PUBLISHED[weights.name]}"
        )


def _read_description(path: Path) -> tuple[dict[str, Any], Path]:
    content = read_json(path)
    model_cfg, tokenizer = content.get("model_cfg"), content.get("tokenizer")
    if not isinstance(model_cfg, dict) or not isinstance(tokenizer, str):
        raise InputError(
            f'{path} must describe a reward as {{"model_cfg": {{...}}, "tokenizer": "folder relative to this file"}}.'
        )
    try:
        clip.clip_config(model_cfg)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return model_cfg, path.parent / tokenizer


def _missing_weights(path: Path) -> str:
    version = _PUBLISHED.get(path.name)
    if version is None:
        return (
            f"There are no reward weights at {path}. Name a checkpoint in open_clip's layout (reward.weights_path of a "
            "run, --reward of evaluate.py); HPS v2.1 is fetched by: python download_hpsv2_weights.py --version v2.1"
        )
    return (
        f"The reward weights {path} are missing ({path.name}, about 2 GB). "
        f"Fetch them: python download_hpsv2_weights.py --version {version}"
    )
