"""Asking a reward, which may be anybody's code, for its scores."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from errors import InputError, is_too_little_memory


class Scorer(Protocol):
    """What gives scores."""

    name: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] in [0, 1] with their N prompts."""
        ...


def scores_by(reward: Scorer, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`reward.score(images, prompts)`, [N].

    Raises:
        InputError: the reward raised something, or answered with something else.
    """
    try:
        scores = reward.score(images, prompts)
    except InputError:
        raise
    except Exception as error:
        if is_too_little_memory(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"the reward {reward.name} failed on {len(images)} images: {type(error).__name__}: {said} "
            f"({Path(place.filename).name}, line {place.lineno})"
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != (len(images),):
        found = [*scores.shape] if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"the reward {reward.name} gave {found} for {len(images)} images, not a tensor [{len(images)}]"
        )
    return scores
