"""A `Denoiser` in closed form that is as hard on solvers as a guided diffusion model: extrapolated mixtures.

Its prompts are class numbers, D = E[x0 | x] + g (E[x0 | x, class] - E[x0 | x]), the noise levels Stable Diffusion's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from errors import InputError
from models.denoiser import Conditioning, GuidanceKind
from models.noise_levels import NoiseLevels
from tests.analytic import GaussianMixture


class GuidedMixture:
    """Three classes of four Gaussians each, on latents [2, 4, 4]; follows models.denoiser.Denoiser."""

    name = backend = "guided-mixture"
    latent_shape = (2, 4, 4)
    image_size = (4, 4)
    guidance = GuidanceKind.CLASSIFIER_FREE
    takes_prompts = True
    default_guidance_scale = 7.5
    device = torch.device("cpu")
    dtype = torch.float32
    code = (Path(__file__),)

    def __init__(self, seed: int = 1) -> None:
        levels = NoiseLevels(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
        self.sigma_of_time, self.time_min = levels.sigma_of_time, levels.time_min
        self.sigma_min, self.sigma_max = levels.sigma_min, levels.sigma_max
        generator = torch.Generator().manual_seed(seed)
        centers = 0.5 * torch.randn(3, 1, *self.latent_shape, generator=generator)
        means = centers + 0.9 * torch.randn(3, 4, *self.latent_shape, generator=generator)  # [class, 4, C, H, W]
        self.classes = [_mixture(means[number]) for number in range(3)]
        self.all = _mixture(means.flatten(0, 1))
        self.evaluations = 0

    def validate_prompts(self, prompts: Sequence[str]) -> None:
        unknown = sorted({prompt for prompt in prompts if prompt not in ("0", "1", "2")})
        if unknown:
            raise InputError(f"unknown classes {unknown}")

    def too_long(self, prompt: str) -> bool:
        return False

    def check_guidance(self, scales: float | Tensor) -> None:
        """Any is taken."""

    def encode(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Conditioning:
        text = {"number": torch.tensor([int(prompt) for prompt in prompts])}
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        return Conditioning(len(prompts), text, None, scale)

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.evaluations += len(x)
        numbers = conditioning.rows(len(x))["number"]
        without = self.all.denoise(x, sigma)
        with_class = torch.stack([mixture.denoise(x, sigma) for mixture in self.classes])[numbers, range(len(x))]
        return without + conditioning.guidance_scale * (with_class - without)

    def decode(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        return torch.sigmoid(torch.cat([latents, latents.sum(1, keepdim=True)], dim=1)).float()


def _mixture(means: Tensor) -> GaussianMixture:
    count = len(means)
    return GaussianMixture(means, torch.full((count,), 0.25), torch.full((count,), 1 / count))
