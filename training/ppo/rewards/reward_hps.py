"""The preference reward HPS v2.1 (Wu et al., arXiv 2306.09341), and any other CLIP in open_clip's checkpoint layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel

from errors import InputError
from models import asset_table, clip
from models.loading import load_tokenizer, read_json

DEFAULT_TOKENIZER = Path(__file__).resolve().parents[3] / "src" / "pipelines" / "sd15" / "tokenizer"

# The published files and the option of the command that fetches each. 986 million weights of 2 bytes.
_PUBLISHED = {asset.name: version for version, asset in asset_table.HPS.items()}


class RewardFiles(NamedTuple):
    """What a reward is made of."""

    weights: Path
    model_cfg: dict[str, Any]
    tokenizer: Path
    assumed: bool  # no description lay beside the weights: they are taken for a ViT-H/14


def find_reward_files(weights_path: str | Path, tokenizer_folder: str | Path | None = None) -> RewardFiles:
    """Find what belongs to a checkpoint, without loading it: a dry run needs no more.

    A JSON file of the same name beside the weights describes them: `{"model_cfg": {...}, "tokenizer": "folder"}`, with
    the configuration as in `models.clip` and the folder relative to the file; other keys are notes. Weights without one
    are taken for a ViT-H/14, as HPS is, with CLIP's own tokenizer.

    Args:
        weights_path: the checkpoint.
        tokenizer_folder: used instead of the tokenizer named above.

    Raises:
        InputError: weights, description or tokenizer are missing or malformed; says which command fetches them.
    """
    weights = Path(weights_path)
    if not weights.is_file():
        raise InputError(_missing_weights(weights))
    described = weights.with_suffix(".json")
    assumed = not described.is_file()
    if assumed:
        model_cfg, tokenizer = read_json(clip.VIT_H_14), DEFAULT_TOKENIZER
    else:
        model_cfg, tokenizer = _read_description(described)
    if tokenizer_folder is not None:
        tokenizer = Path(tokenizer_folder)
    absent = [name for name in ("vocab.json", "merges.txt") if not (tokenizer / name).is_file()]
    if absent and not (tokenizer / "tokenizer.json").is_file():
        raise InputError(
            f"The tokenizer of the reward {weights} is missing: {tokenizer} lacks {' and '.join(absent)} "
            "(about 1.6 MB together). CLIP's own is fetched by: python -m models.assets fetch sd15"
        )
    return RewardFiles(weights, model_cfg, tokenizer, assumed)


class RewardHPS:
    """Scores how well an image answers its prompt: the cosine similarity of CLIP's image and text features.

    The model is frozen and never asked for gradients. Text features are kept, one per distinct prompt.
    """

    def __init__(
        self,
        weights_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        amp_dtype: torch.dtype | None = None,
        tokenizer_folder: str | Path | None = None,
    ) -> None:
        """Load the checkpoint and its tokenizer.

        Args:
            weights_path: checkpoint in open_clip's layout; see `find_reward_files` for what belongs to it.
            device: where the model runs.
            batch_size: images, or texts, in one forward pass.
            amp_dtype: float16 or bfloat16 for mixed precision (torch's autocast); None for float32.
            tokenizer_folder: used instead of the checkpoint's own tokenizer.

        Raises:
            InputError: a file is missing or malformed, or the weights do not fit the described model.
        """
        files = find_reward_files(weights_path, tokenizer_folder)
        self.name = files.weights.stem
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.amp_dtype = amp_dtype
        self.tokenizer = load_tokenizer(files.tokenizer)
        self.model = _load_model(files).requires_grad_(False)
        end, expected_end = self.tokenizer.eos_token_id, self.model.config.text_config.eos_token_id
        if end != expected_end:
            raise InputError(
                f"The tokenizer in {files.tokenizer} does not belong to {files.weights}: its end-of-text token is "
                f"number {end}, the model's vocabulary ends with number {expected_end}."
            )
        if amp_dtype is not None:
            _hold_products_in(self.model, amp_dtype)
        self.model.to(self.device)
        self._text_features: dict[str, Tensor] = {}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image against its own prompt.

        A non-finite pixel, or a half-precision overflow, gives that image the score NaN. It is returned as it is: only
        the caller knows which samples must go with it.

        Args:
            images: [N, 3, H, W], N > 0, RGB in [0, 1], any floating-point type, on any device.
            prompts: N texts.

        Returns:
            [N] float32 in [-1, 1], on the reward's device. HPS v2.1 gives photographs some 0.2 to 0.35.

        Raises:
            ValueError: the numbers of images and prompts differ, or the images are no [N, 3, H, W] of floats.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        image_features = functional.normalize(self.image_features(images), dim=-1)
        text_features = functional.normalize(self.text_features(prompts), dim=-1)
        return (image_features * text_features).sum(dim=-1)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Embed images [N, 3, H, W] in [0, 1]: [N, D] float32, projected but not normalised, on the reward's device."""
        if not images.is_floating_point():
            raise ValueError(f"images must be floating-point numbers in [0, 1], not {images.dtype}")
        size = self.model.config.vision_config.image_size
        features = []
        for chunk in images.split(self.batch_size):
            pixels = clip.preprocess(chunk.to(self.device, non_blocking=True), size)
            with self._autocast():
                features.append(clip.image_features(self.model, pixels).float())
        return torch.cat(features)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embed texts: [N, D] float32, projected but not normalised, on the reward's device."""
        unseen = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_features]
        length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(unseen), self.batch_size):
            chunk = unseen[start : start + self.batch_size]
            tokens = clip.tokenize(self.tokenizer, chunk, length).to(self.device)
            with self._autocast():
                features = clip.text_features(self.model, tokens).float()
            self._text_features |= dict(zip(chunk, features, strict=True))
        return torch.stack([self._text_features[prompt] for prompt in prompts])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)


def _load_model(files: RewardFiles) -> CLIPModel:
    _check_version(files.weights)
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


def _hold_products_in(model: CLIPModel, dtype: torch.dtype) -> None:
    """Keep the weights of matrix products in autocast's type, to which it would otherwise cast them in each call."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


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
            f"There are no reward weights at {path}. Set reward.weights_path to a checkpoint in open_clip's layout; "
            "HPS v2.1 is fetched by: python download_hpsv2_weights.py --version v2.1"
        )
    return (
        f"The reward weights {path} are missing ({path.name}, about 2 GB). "
        f"Fetch them: python download_hpsv2_weights.py --version {version}"
    )
