"""The CLIP score (Hessel et al., arXiv 2104.08718) with OpenAI's CLIP ViT-L/14, as transformers stores it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from training.ppo.rewards.folder_scorer import FolderScorer
from training.ppo.rewards.named import NamedReward


class ClipScore(FolderScorer):
    """100 max(cosine, 0): what the image-captioning and text-to-image literature reports as the CLIP score."""

    reward_name = "clip_score"

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `FeatureScorer`: [N] in [0, 100]."""
        return 100 * self.cosine(features, prompts).clamp(min=0)


REWARD = NamedReward("clip", ClipScore)
