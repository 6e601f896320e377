"""How a reward that goes by a name is declared: each in a module of its own, which calls it `REWARD`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from training.ppo.rewards.protocol import Reward


class RewardFiles(NamedTuple):
    """What a reward is made of.

    weights: its checkpoint, or the source of a function. model_cfg: its description, as far as it has one. tokenizer:
    a folder, None where no text is read in tokens. assumed: no description lay beside the weights: they are taken for
    a ViT-H/14. others: further files that it reads.
    """

    weights: Path
    model_cfg: dict[str, Any]
    tokenizer: Path | None
    assumed: bool = False
    others: tuple[Path, ...] = ()

    def paths(self) -> list[Path]:
        """All that a score depends on, beside the code of this package."""
        named = [self.weights, self.weights.with_suffix(".json"), *self.others, self.tokenizer]
        return [path for path in dict.fromkeys(named) if path is not None and path.exists()]


@dataclass(frozen=True)
class NamedReward:
    """A reward that goes by a name.

    bundle: of `models.assets`, that fetches it. load: the files, and `device`, `batch_size`, `amp_dtype` by name -> the
    reward. tokenizer: its folder below the repository's root; None is CLIP's own, or the one that the user names.
    """

    bundle: str
    load: Callable[..., Reward]
    tokenizer: str | None = None
