"""Who judges images beside the training reward: the exact verifier of the shapes world, and whole panels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from errors import InputError
from models import clip
from models.denoiser import Denoiser
from models.fingerprints import fingerprint
from models.shapes import scenes, verify
from training.measuring.evaluation import Panel
from training.ppo import rewards
from training.ppo.rewards import find_reward_files, load_reward

SHAPES = "shapes"
"""The model whose captions the verifier can read."""


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


def judging_panel(model: str, weights: Path, denoiser: Denoiser, prompts: Sequence[str], batch: int) -> Panel:
    """What judges the images of a model: the reward `weights` and, in the shapes world, the verifier.

    Raises:
        InputError: the reward's files are missing or malformed, it reads prompts where the model takes none, or the
            verifier cannot judge a prompt or the images.
    """
    if model == SHAPES:
        for prompt in prompts:
            scenes.parse(prompt)
        require_verifiable(denoiser)
    judged_by = find_reward_files(weights).paths()
    judged_by += [Path(clip.__file__), *sorted(Path(rewards.__file__).parent.glob("*.py"))]
    if model == SHAPES:
        judged_by += [Path(scenes.__file__), Path(verify.__file__)]
    reward = load_reward(weights, device=denoiser.device, batch_size=batch)
    require_readable(denoiser, [reward.name] if reward.reads_prompts else [])
    reward.say_what_is_cut(prompts)
    return Panel(reward, verified if model == SHAPES else None, fingerprint(judged_by))


def verified(image: Tensor, prompt: str) -> dict[str, float]:
    """What the verifier says of an image [3, 64, 64], by the names of `training.measuring.evaluation.METRICS`."""
    verdict = verify.verify(image, prompt)
    return {"verifier": verdict.score, "verified": float(verdict.correct)}


def true_images(prompts: Sequence[str], seed: int) -> Tensor:
    """Renderings [N, 3, 64, 64] of the captions, each placed by a generator of its own."""
    placed = enumerate(scenes.parse(prompt) for prompt in prompts)
    return torch.stack([scenes.render(scene, np.random.default_rng([seed, index])) for index, scene in placed])
