"""The CLIP score (Hessel et al., arXiv 2104.08718) with OpenAI's CLIP ViT-L/14, as transformers stores it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models import clip
from models.loading import load_tokenizer
from training.ppo.rewards.clip_scorer import ClipScorer


class ClipScore(ClipScorer):
    """100 max(cosine, 0): what the image-captioning and text-to-image literature reports as the CLIP score."""

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
            "clip_score",
            clip.load_transformers_checkpoint(folder),
            load_tokenizer(tokenizer_folder),
            device=device,
            batch_size=batch_size,
            amp_dtype=amp_dtype,
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [N, 3, H, W] in [0, 1] against their N prompts: [N] float32 in [0, 100]; NaN stays NaN."""
        return 100 * self.cosine(images, prompts).clamp(min=0)
