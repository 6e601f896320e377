"""What the policy draws numbers from: rows of shares ~ Dirichlet, and single numbers ~ Normal or LogNormal.

All three hold their parameters as [..., R, M], R rows of M numbers, and are drawn and scored as a whole: a draw is
[n, R, M], its log-density [n]. Draws are kept in the coordinate in which they cannot be lost: a share or a scale in its
logarithm. All of it is float64: in float32, lgamma errs by up to 4e-4, which would go straight into PPO's ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from training.parameters import LEAST_SHARE

MINIMUM_ALPHA = 1e-5
"""Floor of every Dirichlet concentration."""

LOG_STD_BOUNDS = (-7.0, 2.0)
"""Bounds of the logarithm of every standard deviation."""


@dataclass(frozen=True)
class Dirichlet:
    """Rows of positive shares with sum 1, each ~ Dirichlet(alpha); drawn as their logarithms.

    Attributes:
        alpha: concentrations [..., R, M], at least `MINIMUM_ALPHA`.
    """

    alpha: Tensor

    blocks: ClassVar[int] = 1  # unconstrained parameters for each number: log alpha
    positive: ClassVar[bool] = True  # whether the means must be above 0

    @staticmethod
    def start(shares: Tensor, concentration: float) -> tuple[Tensor, ...]:
        """The unconstrained parameters of the mean `shares` with the total `concentration`, which must be in range."""
        least = shares.min().item()
        if concentration * least < MINIMUM_ALPHA:
            raise ValueError(
                f"times the least share of the start, {least:.1e}, it is below the floor {MINIMUM_ALPHA:g}: "
                f"raise it to {MINIMUM_ALPHA / least:.2g} or more"
            )
        return ((concentration * shares).log(),)

    @staticmethod
    def units(log_alpha: Tensor) -> tuple[Tensor | float, ...]:
        """How far a move of 1 goes: a factor e of a concentration."""
        return (1.0,)

    @classmethod
    def bounded(cls, log_alpha: Tensor) -> Dirichlet:
        """With these unconstrained parameters, brought inside the bounds."""
        return cls(log_alpha.exp().clamp(min=MINIMUM_ALPHA))

    @staticmethod
    def values(log_shares: Tensor) -> Tensor:
        """The shares that were drawn, at least `LEAST_SHARE` each."""
        return log_shares.clamp(min=math.log(LEAST_SHARE)).softmax(-1)

    def at_bounds(self) -> int:
        """How many parameters are held at a bound, where they get no gradient."""
        return int((self.alpha <= MINIMUM_ALPHA).sum())

    def mean(self) -> Tensor:
        """The mean shares, [..., R, M]."""
        return self.alpha / self.alpha.sum(-1, keepdim=True)

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """`number` draws as log-shares [number, R, M]; drawn on the generator's device, given on that of alpha."""
        return sample_log_dirichlet(_rows(self.alpha, number), generator)

    def log_prob(self, log_shares: Tensor) -> Tensor:
        """Log-density [n] of exp(`log_shares` [n, R, M])."""
        return dirichlet_log_prob(self.alpha, log_shares).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, [...]."""
        return dirichlet_entropy(self.alpha).sum(-1)

    def kl(self, other: Dirichlet) -> Tensor:
        """KL(self || other) in nats, [...]."""
        return dirichlet_kl(self.alpha, other.alpha).sum(-1)


@dataclass(frozen=True)
class Normal:
    """Independent numbers ~ Normal(loc, exp(log_std)); drawn as they are.

    Attributes:
        loc: [..., R, M].
        log_std: [..., R, M], inside `LOG_STD_BOUNDS`.
    """

    loc: Tensor
    log_std: Tensor

    blocks: ClassVar[int] = 2  # loc, log_std
    positive: ClassVar[bool] = False

    @staticmethod
    def start(mean: Tensor, std: float) -> tuple[Tensor, ...]:
        """The unconstrained parameters of this mean and standard deviation, which must be in range."""
        return mean, _log_std(mean, std)

    @staticmethod
    def units(loc: Tensor, log_std: Tensor) -> tuple[Tensor | float, ...]:
        """How far a move of 1 goes: one standard deviation of the location, a factor e of the deviation."""
        return log_std.exp(), 1.0

    @classmethod
    def bounded(cls, loc: Tensor, log_std: Tensor) -> Normal:
        """With these unconstrained parameters, brought inside the bounds."""
        return cls(loc, log_std.clamp(*LOG_STD_BOUNDS))

    @staticmethod
    def values(drawn: Tensor) -> Tensor:
        """The numbers that were drawn."""
        return drawn

    def at_bounds(self) -> int:
        """How many parameters are held at a bound, where they get no gradient."""
        low, high = LOG_STD_BOUNDS
        return int(((self.log_std <= low) | (self.log_std >= high)).sum())

    def mean(self) -> Tensor:
        """The mean numbers, [..., R, M]."""
        return self.loc

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """`number` draws [number, R, M]; drawn on the generator's device, given on that of the parameters."""
        loc, std = _rows(self.loc, number), _rows(self.log_std.exp(), number)
        noise = torch.randn(loc.shape, dtype=loc.dtype, device=generator.device, generator=generator)
        return loc + std * noise.to(loc.device)

    def log_prob(self, drawn: Tensor) -> Tensor:
        """Log-density [n] of `drawn` [n, R, M]."""
        return self._torch().log_prob(drawn).sum((-2, -1))

    def entropy(self) -> Tensor:
        """Differential entropy in nats, [...]."""
        return self._torch().entropy().sum((-2, -1))

    def kl(self, other: Normal) -> Tensor:
        """KL(self || other) in nats, [...]."""
        return torch.distributions.kl_divergence(self._torch(), other._torch()).sum((-2, -1))

    def _torch(self) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.loc, self.log_std.exp(), validate_args=False)


@dataclass(frozen=True)
class LogNormal(Normal):
    """Independent positive numbers whose logarithms are ~ Normal(loc, exp(log_std)); drawn as their logarithms.

    Its KL divergence is that of the logarithms: no change of coordinate moves it.
    """

    positive: ClassVar[bool] = True

    @staticmethod
    def start(mean: Tensor, std: float) -> tuple[Tensor, ...]:
        """The unconstrained parameters of this mean, and of `std`, the standard deviation of the logarithm."""
        log_std = _log_std(mean, std)  # first: the square of a std out of range may be no number
        return mean.log() - 0.5 * std**2, log_std

    @staticmethod
    def values(drawn: Tensor) -> Tensor:
        """The numbers that were drawn."""
        return drawn.exp()

    def mean(self) -> Tensor:
        """E = exp(loc + std^2 / 2), [..., R, M]."""
        return (self.loc + 0.5 * (2 * self.log_std).exp()).exp()

    def log_prob(self, drawn: Tensor) -> Tensor:
        """Log-density [n] of exp(`drawn` [n, R, M]): the normal's, less the logarithm of the Jacobian."""
        return super().log_prob(drawn) - drawn.sum((-2, -1))

    def entropy(self) -> Tensor:
        """Differential entropy in nats, [...]: the normal's, plus the mean of the logarithm of the Jacobian."""
        return super().entropy() + self.loc.sum((-2, -1))


def dirichlet_log_prob(alpha: Tensor, log_values: Tensor) -> Tensor:
    """Log-density of Dirichlet(alpha [..., M]) at exp(`log_values` [..., M]), summed to [...]."""
    log_normaliser = alpha.lgamma().sum(-1) - alpha.sum(-1).lgamma()
    return ((alpha - 1) * log_values).sum(-1) - log_normaliser


def dirichlet_entropy(alpha: Tensor) -> Tensor:
    """Differential entropy in nats of Dirichlet(alpha [..., M]), [...]."""
    total = alpha.sum(-1)
    log_normaliser = alpha.lgamma().sum(-1) - total.lgamma()
    return log_normaliser + (total - alpha.shape[-1]) * total.digamma() - ((alpha - 1) * alpha.digamma()).sum(-1)


def dirichlet_kl(alpha: Tensor, other: Tensor) -> Tensor:
    """KL(Dirichlet(alpha) || Dirichlet(other)) in nats; [..., M] to [...]."""
    total = alpha.sum(-1, keepdim=True)
    log_normalisers = (other.lgamma() - alpha.lgamma()).sum(-1) + total.squeeze(-1).lgamma() - other.sum(-1).lgamma()
    return log_normalisers + ((alpha - other) * (alpha.digamma() - total.digamma())).sum(-1)


def sample_log_dirichlet(alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Logarithm of one draw from Dirichlet(alpha [..., M]) per row: drawn on the generator's device, given on alpha's.

    Gamma(a) = Gamma(a + 1) * U^(1/a) (Marsaglia and Tsang, 2000, section 6), whose logarithm stays finite where the
    draw itself would underflow to 0; a Dirichlet draw is a vector of Gamma draws divided by its sum.
    """
    alpha_drawn = alpha.to(generator.device)
    # torch.distributions.Gamma draws by this very function but passes no generator on.
    log_boosted = torch._standard_gamma(alpha_drawn + 1, generator=generator).log()
    minus_log_uniform = torch.empty_like(alpha_drawn).exponential_(generator=generator)
    return (log_boosted - minus_log_uniform / alpha_drawn).log_softmax(-1).to(alpha.device)


def _rows(parameter: Tensor, number: int) -> Tensor:
    """One set of rows for each draw: [R, M] repeated to [number, R, M]; [number, R, M] as it is."""
    return parameter.expand(number, *parameter.shape[-2:])


def _log_std(like: Tensor, std: float) -> Tensor:
    low, high = LOG_STD_BOUNDS
    if not low < math.log(std) < high:
        raise ValueError(f"it must lie between {math.exp(low):.2g} and {math.exp(high):.2g}")
    return torch.full_like(like, math.log(std))
