"""What the trainer knows of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """Judges images of prompts.

    name: for people and logs. reads_prompts: False where a score depends on the image alone.
    """

    name: str
    reads_prompts: bool

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [N, 3, H, W] in [0, 1] against their N prompts: [N] float32, raw, higher is better.

        A score may be NaN or infinite; the caller handles it.
        """
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """What sets of images [N, 3, H, W] in [0, 1] may be compared by: [N, D] float32."""
        ...

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """Warn in a line each, once for a whole job, of prompts that it cannot judge as they are.

        Those are too long for it, and judged by their beginning, or hold no word that it was taught.
        """
        ...
