"""What the rewards share whose CLIP model lies in a folder, as transformers writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

from models import clip
from models.loading import load_tokenizer
from training.ppo.rewards.batched import Scoring
from training.ppo.rewards.clip_scorer import FeatureScorer
from training.ppo.rewards.named import RewardFiles


class FolderScorer(FeatureScorer):
    """A `FeatureScorer` that is read from a folder; `reward_name` is the name of its kind."""

    reward_name: ClassVar[str]

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer_folder: Path,
        **scoring: Unpack[Scoring],
    ) -> None:
        """Load config.json and model.safetensors; the rest as `ClipScorer` takes it.

        Raises:
            InputError: a file is missing or malformed, or there is too little memory.
        """
        super().__init__(
            self.reward_name,
            clip.load_transformers_checkpoint(folder),
            load_tokenizer(tokenizer_folder),
            **scoring,
        )

    @classmethod
    def load(cls, files: RewardFiles, **scoring: Any) -> Self:
        """See `NamedReward`: of a kind that its folder is all of."""
        return cls(files.weights.parent, tokenizer_folder=files.tokenizer, **scoring)
