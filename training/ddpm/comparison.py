"""Is a fine-tuned DDPM better than its start? The same seeds for both, judged by what was never trained on.

A training reward that rises while the judge falls, or while the images move away from the real ones, is reward hacking.
The judge alone does not see all of it: it was trained on the same kinds of images as the reward model, and every image
is judged by itself, so that both may like a DDPM that always draws the same. The Frechet distance sees whole sets, in
features that no training made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errors import InputError
from training.ddpm.policy import DenoisingPolicy
from training.ddpm.rollout import ImageReward, sample_images
from training.measuring.distances import frechet_values, gaussian_of
from training.measuring.statistics import Interval, bootstrap_indices, paired_difference_interval

THUMBNAIL = 4  # pixels

COMPARISON_METRICS: Mapping[str, str] = {
    "heldout/reward": "mean training reward of the fine-tuned DDPM's images",
    "heldout/judge": "mean log-odds of being real, by the judge that is never trained against",
    "heldout/frechet": "Frechet distance to real images, of thumbnails of 4x4 pixels in [0, 1]; equally many of each",
    "heldout/frechet_images": "how many of each: the distance is biased upwards for few",
    "heldout/reward_real": "the same of real images: to go beyond is to go away from them",
    "heldout/judge_real": "the same of real images",
    "heldout/<each>_start": "the same of the DDPM that the run started from, with the same seeds",
    "heldout/<each>_difference": "the difference of the two, with a 95% bootstrap interval over seeds (_low, _high)",
    "heldout/suspected_reward_hacking": "1 where the reward's interval lies above 0 and the judge's below or the "
    "distance's above, else 0",
}
"""Every metric of a comparison with its meaning."""


@dataclass(frozen=True)
class Judged:
    """Images of one DDPM, or real ones.

    Attributes:
        images: [N, 3, H, W] in [0, 1], on the CPU; of a DDPM: row i of seed i.
        reward: [N], the training reward.
        judge: [N], log-odds of being real by the judge.
        thumbnails: [N, 48].
    """

    images: Tensor
    reward: Tensor
    judge: Tensor
    thumbnails: Tensor


def thumbnails_of(images: Tensor) -> Tensor:
    """Means [N, 3 * 4 * 4] over equal parts of images [N, 3, H, W]: colours and where they are, no detail."""
    return functional.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)


def distances_to(real: Tensor, features: Tensor) -> Tensor:
    """Values [n] of the Frechet distance to real images, of features [M, D] and [N, D]: the first n of each.

    n is the smaller of M and N: the distance is biased upwards for few, and so comes from equally many.
    """
    number = min(len(real), len(features))
    return frechet_values(features[:number], gaussian_of(real[:number]))


def require_finite(values: Tensor, what: str) -> None:
    """Raise `InputError` where `values` [N, ...], named `what`, are not all finite."""
    finite = values.isfinite().reshape(len(values), -1).all(1)
    if not finite.all():
        raise InputError(
            f"{int((~finite).sum())} of {len(values)} {what} are not finite: the DDPM has diverged; fine-tune with a "
            "lower finetune.lr"
        )


class Comparison:
    """Judges DDPMs on fixed seeds, against the one that was first."""

    def __init__(
        self,
        reward: ImageReward,
        judge: ImageReward,
        real: Tensor,
        *,
        seeds: list[int],
        batch_size: int,
        start: DenoisingPolicy,
    ) -> None:
        """Judge the starting DDPM.

        Args:
            reward: the training reward.
            judge: never trained against.
            real: [M, 3, H, W] in [0, 1], real images that nothing was trained on.
            seeds: one image each.
            batch_size: images at once.
            start: the DDPM that the others are compared with; all models are where it is.
        """
        self._reward, self._judge, self._seeds = reward, judge, seeds
        self._batch_size, self._device = batch_size, start.device
        self.real = self._rated(real)
        self.start = self.judged(start)

    def judged(self, policy: DenoisingPolicy) -> Judged:
        """Draw and judge the images of a DDPM."""
        return self._rated(sample_images(policy, self._seeds, self._batch_size))

    def against_start(self, now: Judged) -> dict[str, float]:
        """`COMPARISON_METRICS` of the images of a later DDPM."""
        generator = torch.Generator().manual_seed(0)
        indices = bootstrap_indices(len(now.reward), generator)
        reward = paired_difference_interval(now.reward, self.start.reward, indices)
        judge = paired_difference_interval(now.judge, self.start.judge, indices)
        after, before = (distances_to(self.real.thumbnails, one.thumbnails) for one in (now, self.start))
        number = len(after)
        frechet = paired_difference_interval(after, before, bootstrap_indices(number, generator))
        hacking = reward.low > 0 and (judge.high < 0 or frechet.low > 0)
        return {
            **_described("reward", now.reward.mean().item(), self.start.reward.mean().item(), reward),
            **_described("judge", now.judge.mean().item(), self.start.judge.mean().item(), judge),
            **_described("frechet", after.mean().item(), before.mean().item(), frechet),
            "heldout/frechet_images": number,
            "heldout/reward_real": self.real.reward.mean().item(),
            "heldout/judge_real": self.real.judge.mean().item(),
            "heldout/suspected_reward_hacking": float(hacking),
        }

    @torch.no_grad()
    def _rated(self, images: Tensor) -> Judged:
        """Judge images [N, 3, H, W] in [0, 1].

        Raises:
            InputError: images or scores are not finite.
        """
        require_finite(images, "images")
        parts = [part.to(self._device) for part in images.split(self._batch_size)]
        reward, judge = (torch.cat([rate(part).cpu() for part in parts]) for rate in (self._reward, self._judge))
        require_finite(reward, "rewards")
        require_finite(judge, "ratings of the judge")
        return Judged(images, reward, judge, thumbnails_of(images))


def _described(name: str, now: float, start: float, difference: Interval) -> dict[str, float]:
    return {
        f"heldout/{name}": now,
        f"heldout/{name}_start": start,
        **difference.as_metrics(f"heldout/{name}_difference"),
    }


def comparison_lines(metrics: Mapping[str, float]) -> list[str]:
    """For people: a line for each measure, and a warning where there is one."""
    names = {
        "reward": f"training reward (of real images {metrics['heldout/reward_real']:.4f})",
        "judge": f"judge, never trained against (of real images {metrics['heldout/judge_real']:.4f})",
        "frechet": f"Frechet distance to {metrics['heldout/frechet_images']:.0f} real images (lower is better)",
    }
    lines = []
    for name, words in names.items():
        start, now = metrics[f"heldout/{name}_start"], metrics[f"heldout/{name}"]
        difference, low, high = Interval.from_metrics(metrics, f"heldout/{name}_difference")
        lines.append(f"{words}: {start:.4f} -> {now:.4f}, difference {difference:+.4f} [{low:+.4f}, {high:+.4f}]")
    if metrics["heldout/suspected_reward_hacking"]:
        lines.append(
            "SUSPECTED REWARD HACKING: the training reward rises while the judge or the distance says worse; "
            "a larger finetune.kl_coef holds the DDPM closer to its start"
        )
    return lines
