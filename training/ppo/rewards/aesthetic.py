"""The LAION aesthetic predictor v2: a stack of linear layers, without activations, on CLIP ViT-L/14's image features.

Published by C. Schuhmann as `sac+logos+ava1-l14-linearMSE.pth` (github.com/christophschuhmann/improved-aesthetic-
predictor), the layers under the names `layers.0`, `.2`, `.4`, `.6`, `.7`; what lies between them is dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional

from errors import InputError
from models.asset_table import CLIP
from models.checkpoints import read_state_dict
from training.ppo.rewards.batched import Scoring
from training.ppo.rewards.folder_scorer import FolderScorer
from training.ppo.rewards.named import NamedReward, RewardFiles

LAYERS = (0, 2, 4, 6, 7)
WIDTHS = (1024, 128, 64, 16, 1)


class AestheticScore(FolderScorer):
    """How much people are expected to like an image, about 1 to 10, whatever its prompt."""

    reward_name = "aesthetic"
    reads_prompts = False

    def __init__(self, files: RewardFiles, **scoring: Unpack[Scoring]) -> None:
        """Load the predictor and the CLIP model among its other files; the rest as `FolderScorer` takes it.

        Raises:
            InputError: a file is missing or malformed, they do not fit each other, or there is too little memory.
        """
        model = next(path for path in files.others if path.name == Path(CLIP[1].path).name)
        super().__init__(files._replace(weights=model), **scoring)
        weight, bias = read_head(files.weights, self.model.config.projection_dim)
        self.weight, self.bias = weight.to(self.device), bias.to(self.device)

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `FeatureScorer`; the prompts are not looked at."""
        return functional.normalize(features, dim=-1) @ self.weight + self.bias

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """Nothing is: no prompt is looked at."""


def read_head(path: Path, features: int) -> tuple[Tensor, Tensor]:
    """The predictor as the one linear map that its layers amount to: weight [features], bias [], float32.

    Raises:
        InputError: the file is missing or unreadable, or does not hold these layers, of these widths.
    """
    if not path.is_file():
        raise InputError(f"The aesthetic predictor {path} is missing: python -m models.assets fetch aesthetic")
    return linear_head(read_state_dict(path), features, str(path))


def linear_head(state: Mapping[str, Tensor], features: int, source: str) -> tuple[Tensor, Tensor]:
    """`read_head` of the layers themselves; `source` is what messages call them. ImageReward has the same ones.

    Raises:
        InputError: they are other layers, or of other widths.
    """
    widths = (features, *WIDTHS)
    expected = {}
    for index, layer in enumerate(LAYERS):
        expected[f"layers.{layer}.weight"] = (widths[index + 1], widths[index])
        expected[f"layers.{layer}.bias"] = (widths[index + 1],)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise InputError(
            f"{source} is no stack of linear layers for {features} features: {', '.join(wrong)} are missing, left "
            "over or of another shape."
        )
    # Composed in float64, as a product of matrices loses digits that the layers one after another do not.
    weight, bias = torch.eye(features, dtype=torch.float64), torch.zeros(features, dtype=torch.float64)
    for layer in LAYERS:
        matrix = state[f"layers.{layer}.weight"].double()
        weight, bias = matrix @ weight, matrix @ bias + state[f"layers.{layer}.bias"].double()
    return weight[0].float(), bias[0].float()


REWARD = NamedReward("aesthetic", AestheticScore)
