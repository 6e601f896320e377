"""Training of the reward model and, on images of its own, of the judge that is never trained against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from errors import InputError
from models.randomness import derived_seed, generator_of
from training.ddpm.config import TrainRewardConfig
from training.ddpm.data import Shares, augmented, faded, to_unit, under_noise
from training.ddpm.reward_model import RealFakeClassifier, accuracy, calibration_error, new_classifier, smoothed_loss
from training.ddpm.rollout import seeds_of
from training.runs.checkpoint import load_optimizer

REWARD, JUDGE = "reward", "judge"
REWARD_METRICS: Mapping[str, str] = {
    "<model>/loss": "smoothed cross-entropy in nats, mean over the epoch's updates; <model> is reward or judge",
    "<model>/heldout_accuracy": "share of held-out images (real, fake, spoiled) on the right side of even odds",
    "<model>/heldout_cross_entropy": "cross-entropy in nats on them, without smoothing",
    "<model>/heldout_calibration_error": "expected calibration error on them, in [0, 1]; 0 is best",
}
"""Every metric of an epoch with its meaning."""


class RewardTrainer:
    """Trains both classifiers: equal recipes, different images, seeds and widths."""

    def __init__(
        self, real: Shares, fake: Shares, settings: TrainRewardConfig, *, seed: int, device: torch.device
    ) -> None:
        """Start with untrained classifiers.

        Args:
            real: images of label 1; under noise or faded their label is 0.
            fake: images of label 0.
            settings: section `train_reward` of the configuration.
            seed: of the weights, the order and the noise.
            device: where the classifiers are trained.
        """
        self.settings, self.seed, self.device = settings, seed, device
        size = tuple(real.reward.shape[-2:])
        widths = {REWARD: settings.width, JUDGE: settings.width + 8}
        seeds = seeds_of("classifiers", seed, count=2)
        self.classifiers: dict[str, RealFakeClassifier] = {
            name: new_classifier(size, width, its_seed).to(device)
            for (name, width), its_seed in zip(widths.items(), seeds, strict=True)
        }
        self._images = {REWARD: (real.reward, fake.reward), JUDGE: (real.judge, fake.judge)}
        self._noisy_share = settings.num_noise / settings.num_img
        generator = generator_of(derived_seed("held-out noise", seed))
        self._heldout = self._labelled(real.heldout, fake.heldout, generator)
        self._optimizers = {
            name: torch.optim.AdamW(model.parameters(), lr=settings.lr) for name, model in self.classifiers.items()
        }
        self.completed_steps = 0

    def step(self) -> dict[str, float]:
        """One pass over the images for each classifier; returns the metrics named in `REWARD_METRICS`.

        Raises:
            InputError: training diverged.
        """
        start = perf_counter()
        losses = {f"{name}/loss": self._train(name) for name in self.classifiers}
        self.completed_steps += 1
        heldout = {f"{name}/{key}": value for name in self.classifiers for key, value in self.heldout(name).items()}
        return {"step": self.completed_steps, **losses, **heldout, "seconds/step": perf_counter() - start}

    @torch.no_grad()
    def heldout(self, name: str) -> dict[str, float]:
        """How well a classifier does on images that neither was trained on.

        Raises:
            InputError: training diverged: what it says is no number.
        """
        images, labels = self._heldout
        model = self.classifiers[name].eval()
        log_odds = torch.cat([model(part.to(self.device)).cpu() for part in images.split(self.settings.batch_size)])
        if not log_odds.isfinite().all():
            raise InputError(
                f"epoch {self.completed_steps}: the {name} classifier gives log-odds that are not finite: the updates "
                "went too far; lower train_reward.lr"
            )
        return {
            "heldout_accuracy": accuracy(log_odds, labels),
            "heldout_cross_entropy": smoothed_loss(log_odds, labels, 0.0).item(),
            "heldout_calibration_error": calibration_error(log_odds, labels),
        }

    def chance(self) -> tuple[float, float]:
        """The held-out accuracy of always giving the more frequent label, and how far above it luck alone may lie.

        The latter is the normal approximation's one-sided 97.5% bound for that many images.
        """
        _, labels = self._heldout
        share = max(labels.double().mean().item(), 1 - labels.double().mean().item())
        return share, 1.96 * math.sqrt(share * (1 - share) / len(labels))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs, as tensors and plain values."""
        return {
            "completed_steps": self.completed_steps,
            "classifiers": {name: model.state_dict() for name, model in self.classifiers.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            InputError: the classifiers have other shapes.
        """
        try:
            for name, model in self.classifiers.items():
                model.load_state_dict(state["classifiers"][name])
                load_optimizer(self._optimizers[name], state["optimizers"][name])
        except RuntimeError as error:
            raise InputError(
                f"the checkpoint's classifiers have other shapes than train_reward.width says: {error}"
            ) from error
        self.completed_steps = state["completed_steps"]

    def _train(self, name: str) -> float:
        generator = generator_of(derived_seed(name, self.seed, self.completed_steps))
        images, labels = self._labelled(*self._images[name], generator)
        model, optimizer = self.classifiers[name].train(), self._optimizers[name]
        losses = []
        for rows in torch.randperm(len(labels), generator=generator).split(self.settings.batch_size):
            batch = augmented(images[rows], generator) if self.settings.augment else images[rows]
            log_odds = model(batch.to(self.device))
            loss = smoothed_loss(log_odds, labels[rows].to(self.device), self.settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def _labelled(self, real: Tensor, fake: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images [M, 3, H, W] in [0, 1] and labels [M], 1 for real, 0 for all else."""
        rows = torch.randint(len(real), (round(self._noisy_share * len(real)),), generator=generator)
        noisy, empty = to_unit(real[rows]).tensor_split(2)
        spoiled = (under_noise(noisy, generator), faded(empty, generator))
        labels = torch.zeros(len(real) + len(fake) + len(rows))
        labels[: len(real)] = 1.0
        return torch.cat([to_unit(real), to_unit(fake), *spoiled]), labels
