"""Data distributions with denoisers and probability-flow solutions in closed form: oracles for the samplers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from solvers import Denoise


class Level(NamedTuple):
    """How much of data and noise is in x = signal · x0 + sigma · noise; flow matching has signal = 1 - sigma."""

    sigma: float
    signal: float = 1.0


@dataclass(frozen=True)
class GaussianMixture:
    """Data x0 ~ Σ_j π_j N(μ_j, s_j² I) on latents of any shape [...].

    means [J, ...], stds [J], weights [J] (sum 1). Methods take x [N, ...] and sigma 0-dim or [N].
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] for x = x0 + sigma · noise."""
        return self._posterior_mean(x, torch.ones(()), sigma)

    def denoise_flow(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] for flow matching, x = (1 - sigma) · x0 + sigma · noise."""
        return self._posterior_mean(x, 1 - sigma, sigma)

    def _posterior_mean(self, x: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """For x = signal · x0 + sigma · noise."""
        columns = [1] * (self.means.ndim - 1)
        signal, sigma = (level.to(x).expand(len(x))[:, None] for level in (signal, sigma))  # [N, 1]
        variances = signal**2 * self.stds**2 + sigma**2  # [N, J]
        offsets = x[:, None] - signal.reshape(-1, 1, *columns) * self.means  # [N, J, ...]
        logits = self.weights.log() - offsets[0, 0].numel() / 2 * variances.log()
        posterior = (logits - offsets.square().flatten(2).sum(-1) / (2 * variances)).softmax(-1)  # [N, J]
        gain = (signal * self.stds**2 / variances).reshape(*variances.shape, *columns)
        return (posterior.reshape(*posterior.shape, *columns) * (self.means + gain * offsets)).sum(1)


def gaussian(mean: Tensor, std: float) -> GaussianMixture:
    """One Gaussian N(mean, std² I)."""
    return GaussianMixture(mean[None], torch.tensor([std], dtype=mean.dtype), torch.ones(1, dtype=mean.dtype))


def gaussian_solution(mean: Tensor, std: float, x: Tensor, start: float, end: float) -> Tensor:
    """Where the ODE takes x at noise level `start` by noise level `end`, for data N(mean, std² I).

    There D = (s² x + σ² μ)/(s² + σ²), so d(x - μ)/dσ = σ (x - μ)/(s² + σ²), and (x - μ)/sqrt(s² + σ²) stays constant.
    """
    return mean + (x - mean) * math.sqrt((std**2 + end**2) / (std**2 + start**2))


def mixture_solution_1d(mixture: GaussianMixture, x: Tensor, start: Level, end: Level) -> Tensor:
    """The same for a mixture in one dimension (latents [1, 1, 1]): x [N, 1, 1, 1] -> [N, 1, 1, 1].

    In one dimension the flow keeps the order of points and so their quantile: F_end(x_end) = F_start(x_start), with F
    the distribution function of signal · x0 + sigma · noise. Solved for x_end by bisection to the last bit.
    """
    quantile = _distribution_function(mixture, x, start)
    low, high = torch.full_like(x, -1e3), torch.full_like(x, 1e3)
    for _ in range(80):
        middle = (low + high) / 2
        below = _distribution_function(mixture, middle, end) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _distribution_function(mixture: GaussianMixture, x: Tensor, level: Level) -> Tensor:
    means = level.signal * mixture.means.flatten()
    standardized = (x[..., None] - means) / (level.signal**2 * mixture.stds**2 + level.sigma**2).sqrt()
    return (mixture.weights * torch.special.ndtr(standardized)).sum(-1)


@dataclass
class Recorder:
    """A denoiser that remembers how it was called."""

    denoise: Denoise
    rows: list[int] = field(default_factory=list)
    """Rows of each call."""
    sigmas: list[Tensor] = field(default_factory=list)
    """Noise levels of each call, as they were handed over."""
    guidances: list[Tensor] = field(default_factory=list)
    """Likewise of each call that had guidance."""

    def __call__(self, x: Tensor, sigma: Tensor, *guidance: Tensor) -> Tensor:
        """Denoise and take a note."""
        self.rows.append(len(x))
        self.sigmas.append(sigma.clone())
        self.guidances.extend(guidance)
        return self.denoise(x, sigma, *guidance)
