"""What the rewards share whose CLIP model lies in a folder, as transformers writes it."""

from __future__ import annotations

from typing import ClassVar, Unpack

from models import clip
from models.loading import load_tokenizer
from training.ppo.rewards.batched import Scoring
from training.ppo.rewards.clip_scorer import FeatureScorer
from training.ppo.rewards.named import RewardFiles


class FolderScorer(FeatureScorer):
    """A `FeatureScorer` that is read from a folder; `reward_name` is the name of its kind."""

    reward_name: ClassVar[str]

    def __init__(self, files: RewardFiles, **scoring: Unpack[Scoring]) -> None:
        """Load config.json and model.safetensors, where the weights are; the rest as `ClipScorer` takes it.

        Raises:
            InputError: a file is missing or malformed, or there is too little memory.
        """
        model = clip.load_transformers_checkpoint(files.weights.parent)
        super().__init__(self.reward_name, model, load_tokenizer(files.tokenizer), **scoring)
