"""A world in closed form, for trying solvers and searches in seconds: independent Gaussian mixtures at many scales.

What decides the order of solvers is how many independent decisions an image holds, at how many scales. A product of one
mixture for each coordinate holds as many as it has coordinates, and has Stable Diffusion's order: with 20 evaluations
iPNDM is nearest to the solution, then DPM-Solver++ 2M, DPM-2, Heun's method and DDIM.

    world = MixtureWorld()
    x = world.sigma_max * torch.randn(256, *world.latent_shape)
    found = solvers.epd_sampler(world.denoise, x, sigmas, table)
    error = (found - world.solution(x, world.sigma_max, world.sigma_min)).norm()
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.denoiser import Conditioning, GuidanceKind
from models.randomness import generator_of

_FAR = 1e3  # no solution lies beyond


class MixtureWorld:
    """Data whose every coordinate n is an independent mixture x0_n ~ mean over j of N(μ_nj, s_n²), J modes each.

    The scales of the coordinates are evenly spaced in their logarithm; μ_nj ~ scale_n · N(0, 1) by `seed`, and
    s_n = spread · scale_n. Its interface is that of `models.denoiser.Denoiser` without pictures: latents are
    [B, N, 1, 1] = x0 + sigma · noise, and it answers every prompt alike.

    Args:
        coordinates: N.
        modes: J.
        scales: of the first coordinate and of the last.
        spread: standard deviation of a mode, in units of the coordinate's scale.
        seed: of the modes' means.
    """

    name = backend = "mixture"
    sigma_min, sigma_max = 0.01, 50.0
    image_size = (1, 1)
    guidance = GuidanceKind.NONE
    takes_prompts = False
    default_guidance_scale = 1.0
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self,
        coordinates: int = 64,
        modes: int = 6,
        *,
        scales: tuple[float, float] = (0.1, 4.0),
        spread: float = 0.05,
        seed: int = 0,
    ) -> None:
        """Draw the modes."""
        self.latent_shape = (coordinates, 1, 1)
        scale = torch.logspace(*map(math.log10, scales), coordinates, dtype=torch.float64)[:, None]
        drawn = torch.randn(coordinates, modes, generator=generator_of(seed), dtype=torch.float64)
        self.means, self.stds = scale * drawn, spread * scale  # [N, J], [N, 1]

    def validate_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse none."""

    def too_long(self, prompt: str) -> bool:
        """It reads none."""
        return False

    def check_guidance(self, scales: float | Tensor) -> None:
        """Take any: it changes nothing."""

    def encode(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Conditioning:
        """So many prompts: there is nothing to say, and nothing to guide."""
        return Conditioning(len(prompts), {}, None, self.default_guidance_scale)

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """E[x0 | x] for x [B, N, 1, 1] = x0 + sigma · noise, exactly; sigma 0-dim or [B]. Differentiable in both.

        With v = s² + σ²: the posterior of mode j is softmax_j(-(x - μ_j)² / 2v), its mean μ_j + (s²/v)(x - μ_j).
        """
        values, means, stds = x.flatten(2), self.means.to(x), self.stds.to(x)  # [B, N, 1], [N, J], [N, 1]
        variances = stds**2 + sigma.to(x).reshape(-1, 1, 1) ** 2  # [1 or B, N, 1]
        posterior = (-((values - means) ** 2) / (2 * variances)).softmax(-1)  # [B, N, J]
        mean = (posterior * means).sum(-1, keepdim=True)
        return (mean + stds**2 / variances * (values - mean)).view_as(x)

    def solution(self, x: Tensor, start: float, end: float) -> Tensor:
        """Where the ODE takes x [B, N, 1, 1] at noise level `start` by noise level `end`, exactly.

        In one dimension no path crosses another, so each coordinate keeps its quantile: F_end(x_end) = F_start(x), with
        F_σ the distribution function of x0 + σ · noise. Solved by bisection to float64's precision, for x within seven
        standard deviations.
        """
        values = x.double().flatten(2)  # [B, N, 1]
        quantile = self._distribution_function(values, start)
        low, high = torch.full_like(values, -_FAR), torch.full_like(values, _FAR)
        for _ in range(64):
            middle = (low + high) / 2
            below = self._distribution_function(middle, end) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).view_as(x).to(x)

    def _distribution_function(self, values: Tensor, sigma: float) -> Tensor:
        deviations = (self.stds**2 + sigma**2).sqrt()
        return torch.special.ndtr((values - self.means) / deviations).mean(-1, keepdim=True)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Exact data, float64 [count, N, 1, 1]."""
        coordinates, modes = self.means.shape
        chosen = torch.randint(modes, (coordinates, count), generator=generator)
        noise = torch.randn(coordinates, count, generator=generator, dtype=torch.float64)
        return (self.means.gather(1, chosen) + self.stds * noise).T[..., None, None]
