"""PickScore v1 (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14 tuned on choices of people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from training.ppo.rewards.folder_scorer import FolderScorer
from training.ppo.rewards.named import NamedReward, RewardFiles


class PickScore(FolderScorer):
    """Temperature times cosine, section 4 of the paper; two images of a prompt compare by the softmax of both."""

    reward_name = "pickscore"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [N, 3, H, W] in [0, 1] against their N prompts: [N] float32, some 18 to 24; NaN stays NaN."""
        return self.model.logit_scale.exp().float() * self.cosine(images, prompts)


def _load(files: RewardFiles, **scoring: Any) -> PickScore:
    return PickScore(files.weights.parent, tokenizer_folder=files.tokenizer, **scoring)


REWARD = NamedReward("pickscore", _load)
