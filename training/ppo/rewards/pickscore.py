"""PickScore v1 (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14 tuned on choices of people."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from training.ppo.rewards.folder_scorer import FolderScorer
from training.ppo.rewards.named import NamedReward


class PickScore(FolderScorer):
    """Temperature times cosine, section 4 of the paper; two images of a prompt compare by the softmax of both."""

    reward_name = "pickscore"

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `FeatureScorer`: [N], some 18 to 24."""
        return self.model.logit_scale.exp().float() * self.cosine(features, prompts)


REWARD = NamedReward("pickscore", PickScore)
