"""Sampling from a DDPM as a policy: every step of the stochastic DDIM draws its next state from a normal distribution.

DDIM with eta (arXiv 2010.02502, equations 12 and 16). The state is x_t, the action x_s for the next lower step s; the
distribution that is sampled from and the one that is scored are the same object, with DDIM's own mean and deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import InputError
from models.pixel_diffusion import PixelDiffusion
from models.randomness import generator_of


@dataclass(frozen=True)
class StepDistribution:
    """Normal(mean, deviation^2) of the next state.

    Attributes:
        mean: [N, C, H, W].
        deviation: of every number, > 0.
    """

    mean: Tensor
    deviation: float

    def sample(self, noise: Tensor) -> Tensor:
        """The draw that standard normal `noise` [N, C, H, W] stands for."""
        return self.mean + self.deviation * noise

    def log_prob(self, state: Tensor) -> Tensor:
        """Log density [N] in float64 of next states [N, C, H, W], summed over their numbers."""
        z = (state.double() - self.mean.double()).flatten(1) / self.deviation  # [N, C*H*W]
        constant = math.log(self.deviation) + 0.5 * math.log(2 * math.pi)
        return -0.5 * z.square().sum(1) - z.shape[1] * constant

    def kl(self, other: StepDistribution) -> Tensor:
        """KL(self || other) [N] in nats, float64; both have the same deviation."""
        difference = (self.mean.double() - other.mean.double()).flatten(1) / self.deviation
        return 0.5 * difference.square().sum(1)


class DDIMSteps:
    """The S steps of DDIM: which training steps are visited, and the deviation of each.

    The steps are spaced so that the first one is the last training step (`trailing`, arXiv 2305.08891, table 2). The
    last step ends in the clean image and has no deviation: the first S - 1 steps are actions.
    """

    def __init__(self, alphas_cumprod: Tensor, num_steps: int, eta: float) -> None:
        """`alphas_cumprod`: [T] float64, of the training steps.

        Raises:
            InputError: more steps than training steps, fewer than 2, or an eta outside [0, 1].
        """
        total = len(alphas_cumprod)
        if not 2 <= num_steps <= total:
            raise InputError(f"finetune.ddim_steps={num_steps}: the DDPM has {total} training steps; use 2 to {total}")
        if not 0 <= eta <= 1:
            raise InputError(f"finetune.eta={eta}: eta lies between 0 (deterministic) and 1 (as noisy as the DDPM)")
        self.timesteps: list[int] = [round(total - step * total / num_steps) - 1 for step in range(num_steps)]
        self.alphas: list[float] = [*(float(alphas_cumprod[t]) for t in self.timesteps), 1.0]
        self.deviations: list[float] = [
            eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))  # equation 16
            for now, after in zip(self.alphas, self.alphas[1:], strict=False)
        ]

    def __len__(self) -> int:
        """S."""
        return len(self.timesteps)

    @property
    def num_actions(self) -> int:
        """Steps with randomness in them: all but the last, or none where eta is 0."""
        return sum(deviation > 0 for deviation in self.deviations)


class DenoisingPolicy:
    """A network with the steps it is used in."""

    def __init__(self, network: nn.Module, model: PixelDiffusion, steps: DDIMSteps) -> None:
        """Use `network`, which may be `model.network` or a changed copy of it, as `model` says it is to be used."""
        self.network, self.model, self.steps = network, model, steps

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def clean_and_noise(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Estimates of the clean image x0 (clamped, where the model says so) and of the noise, [N, C, H, W] each.

        They always agree: x = sqrt(alpha) x0 + sqrt(1 - alpha) noise. So with eta 1 and all training steps the policy
        is the DDPM's own ancestral sampler.
        """
        alpha = self.steps.alphas[step]
        signal, spread = math.sqrt(alpha), math.sqrt(1 - alpha)
        output = self.network(x, self.steps.timesteps[step]).sample
        match self.model.prediction_type:
            case "epsilon":
                clean = (x - spread * output) / signal
            case "sample":
                clean = output
            case _:  # v_prediction, arXiv 2202.00512, appendix D
                clean = signal * x - spread * output
        if (reach := self.model.clip_range) is not None:
            clean = clean.clamp(-reach, reach)
        return clean, (x - signal * clean) / spread

    def __call__(self, x: Tensor, step: int) -> StepDistribution:
        """The distribution of the next state after x [N, C, H, W] at step 0, 1, ..., S - 1 (equation 12)."""
        clean, noise = self.clean_and_noise(x, step)
        after, deviation = self.steps.alphas[step + 1], self.steps.deviations[step]
        towards = math.sqrt(max(1 - after - deviation**2, 0.0))
        return StepDistribution(math.sqrt(after) * clean + towards * noise, deviation)

    def episode_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal noise [N, S, C, H, W] on the CPU: of each episode's start and of its S - 1 draws.

        Each row comes from a generator of its own, so that an episode depends on its seed alone, whatever the batch and
        the device.
        """
        size = (len(self.steps), 3, *self.model.image_size)
        return torch.stack([torch.randn(size, generator=generator_of(seed)) for seed in seeds])
