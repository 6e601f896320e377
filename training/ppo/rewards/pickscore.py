"""PickScore v1 (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14 tuned on choices of people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models import clip
from models.loading import load_tokenizer
from training.ppo.rewards.clip_scorer import ClipScorer


class PickScore(ClipScorer):
    """Temperature times cosine, section 4 of the paper; two images of a prompt compare by the softmax of both."""

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer_folder: Path,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        """Load config.json and model.safetensors, as transformers writes them; the rest as `ClipScorer` takes it.

        Raises:
            InputError: a file is missing or malformed, or there is too little memory.
        """
        super().__init__(
            "pickscore",
            clip.load_transformers_checkpoint(folder),
            load_tokenizer(tokenizer_folder),
            device=device,
            batch_size=batch_size,
            amp_dtype=amp_dtype,
        )
        self.temperature = self.model.logit_scale.exp().float()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [N, 3, H, W] in [0, 1] against their N prompts: [N] float32, some 18 to 24; NaN stays NaN."""
        return self.temperature * self.cosine(images, prompts)
