"""Who judges images: rewards, and the exact verifier of the shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from errors import InputError
from models import clip
from models.denoiser import Denoiser
from models.fingerprints import fingerprint
from models.registry import SHAPES_WORLD
from models.shapes import scenes, verify
from training.measuring import scoring
from training.measuring.evaluation import Judge
from training.measuring.scoring import scores_by
from training.ppo import reward_names, rewards
from training.ppo.rewards import Reward, find_reward_files, load_reward
from training.ppo.rewards.clip_scorer import FeatureScorer

JUDGES_CODE = (
    *(Path(module.__file__) for module in (clip, scenes, verify, scoring, reward_names)),
    *sorted(Path(rewards.__file__).parent.glob("*.py")),
    Path(__file__),
)
"""Files whose change may change what is said of an image, or what is true of a caption."""


class VerifierPanel:
    """The exact verifier of the shapes world as a judge: the share of the caption's parts that hold, in [0, 1]."""

    name = "verifier"
    reads_prompts = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, 64, 64] in [0, 1]."""
        return torch.tensor(
            [verify.verify(image.cpu(), prompt).score for image, prompt in zip(images, prompts, strict=True)]
        )

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """Nothing is: a caption is judged whole."""


def require_verifiable(denoiser: Denoiser) -> None:
    """Raise InputError where the verifier cannot judge what the model draws."""
    side = scenes.IMAGE_SIZE
    if denoiser.image_size != (side, side):
        height, width = denoiser.image_size
        raise InputError(
            f"the verifier judges images of {side} x {side} pixels, and model {denoiser.name} is to draw "
            f"{height} x {width}: leave height and width out"
        )


def require_readable(denoiser: Denoiser, readers: Sequence[str]) -> None:
    """Raise InputError where there are rewards, by name, that read prompts, and the model takes none."""
    if readers and not denoiser.takes_prompts:
        raise InputError(
            f"{', '.join(readers)} would read prompts, and model {denoiser.name} is unconditional: choose a reward "
            "that looks at the image alone, aesthetic or a function of yours, my_module:my_reward"
        )


def reward_fingerprint(reward: str | Path, tokenizer_folder: str | Path | None = None) -> str:
    """All that a reward's scores depend on, named as `find_reward_files` takes it."""
    return fingerprint([*find_reward_files(reward, tokenizer_folder).paths(), *JUDGES_CODE])


class RewardJudge:
    """A reward as a judge of an evaluation; the first of several is called `reward`, and keeps its image features."""

    def __init__(self, source: Path, reward: Reward, *, first: bool) -> None:
        """`source`: what `load_reward` loaded the reward by."""
        self.name = "reward" if first else reward.name
        self.features = "reward_features" if first else None
        self.fingerprint = f"{reward.name} {reward_fingerprint(source)}"
        self._reward = reward

    def judge(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores and, of the first, unit-length features. Raises InputError where a score is not finite."""
        features = None if self.features is None else self._reward.image_features(images)
        if features is not None and isinstance(self._reward, FeatureScorer):
            scores = self._reward.score_features(features, prompts)
        else:
            scores = scores_by(self._reward, images, prompts)
        if not scores.isfinite().all():
            raise InputError(
                f"the reward {self._reward.name} gives scores that are not finite for finite images: its weights are "
                "broken"
            )
        kept = {} if features is None else {self.features: functional.normalize(features, dim=1).cpu()}
        return {self.name: scores.double().cpu(), **kept}


def verifier_fingerprint() -> str:
    """All that the verifier's verdicts depend on."""
    return fingerprint(JUDGES_CODE)


class VerifierJudge:
    """The exact verifier of the shapes world as a judge of an evaluation: parts of a caption, and whole captions."""

    name, features = "verifier", None

    def __init__(self) -> None:
        """It has nothing to load."""
        self.fingerprint = verifier_fingerprint()

    def judge(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """By the names of `training.measuring.evaluation.METRICS`."""
        told = [verify.verify(image, prompt) for image, prompt in zip(images.cpu(), prompts, strict=True)]
        return {
            "verifier": torch.tensor([verdict.score for verdict in told]).double(),
            "verified": torch.tensor([verdict.correct for verdict in told]).double(),
        }


def judges_of(
    model: str, sources: Sequence[Path], denoiser: Denoiser, prompts: Sequence[str], batch: int
) -> list[Judge]:
    """What judges the images of a model: the rewards and, in the shapes world, the verifier.

    Raises:
        InputError: a reward's files are missing or malformed, it reads prompts where the model takes none, two have one
            name, or the verifier cannot judge a prompt or the images.
    """
    if model in SHAPES_WORLD:
        for prompt in prompts:
            scenes.parse(prompt)
        require_verifiable(denoiser)
    for source in sources:  # before gigabytes are read in vain
        find_reward_files(source)
    judges: list[Judge] = [VerifierJudge()] if model in SHAPES_WORLD else []
    for source in sources:
        reward = load_reward(source, device=denoiser.device, batch_size=batch)
        require_readable(denoiser, [reward.name] if reward.reads_prompts else [])
        reward.say_what_is_cut(prompts)
        judges.append(RewardJudge(source, reward, first=source is sources[0]))
    names = [judge.name for judge in judges]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two rewards are called {min(twice)}: rename one's file")
    return judges


def true_images(prompts: Sequence[str], seed: int, first: int = 0) -> Tensor:
    """Renderings [N, 3, 64, 64] of the captions, the first of which is number `first`: each with its own generator."""
    placed = enumerate((scenes.parse(prompt) for prompt in prompts), first)
    return torch.stack([scenes.render(scene, np.random.default_rng([seed, index])) for index, scene in placed])
