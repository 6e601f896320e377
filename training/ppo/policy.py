"""The policy: a distribution over solver tables, centred on a cold-start table (design.md, section 3).

Per interval, K+1 segments ~ Dirichlet(alpha_pos) whose running sum is the positions, K weights ~
Dirichlet(alpha_weight), and, where they are trained, log scale_dir and log scale_time ~ Normal.
log alpha = log(c * cold-start mean) + the residual of a small network. All of it is float64: in float32, lgamma errs by
up to 4e-4, which would go straight into PPO's probability ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import InputError
from models.randomness import generator_of
from solvers import EPDTable
from training.ppo.cold_start import (
    Concentrations,
    concentrations_from_table,
    positions_from_segments,
    table_from_concentrations,
)

MINIMUM_ALPHA = 1e-5
"""Floor of every Dirichlet concentration."""

LOG_STD_BOUNDS = (-7.0, 2.0)
"""Bounds of the log standard deviation of log scale_dir and log scale_time."""

POSITION_MARGIN = 1e-12
"""How close to 0 or 1 a drawn position may come: a table's positions lie inside (0, 1), rounded sums may not."""

HIDDEN_SIZE = 64
"""Width of the residual network."""


@dataclass(frozen=True)
class LogNormal:
    """exp(Normal(loc, exp(log_std))), elementwise; both [..., S, K]."""

    loc: Tensor
    log_std: Tensor

    def mean(self) -> Tensor:
        """E = exp(loc + std^2 / 2)."""
        return (self.loc + 0.5 * (2 * self.log_std).exp()).exp()

    def log_prob(self, log_value: Tensor) -> Tensor:
        """Log-density of exp(`log_value`), elementwise: the normal's, less the Jacobian `log_value`."""
        standardised = (log_value - self.loc) / self.log_std.exp()
        return -0.5 * standardised**2 - self.log_std - 0.5 * math.log(2 * math.pi) - log_value

    def entropy(self) -> Tensor:
        """Differential entropy in nats, elementwise: the normal's, plus `loc`."""
        return 0.5 * (1 + math.log(2 * math.pi)) + self.log_std + self.loc

    def kl(self, other: LogNormal) -> Tensor:
        """KL(self || other) in nats, elementwise; equal to that of the two normals."""
        log_ratio = self.log_std - other.log_std
        shift = (self.loc - other.loc) / other.log_std.exp()
        return 0.5 * ((2 * log_ratio).exp() + shift**2 - 1) - log_ratio


@dataclass(frozen=True)
class TableSample:
    """n tables as they were drawn: in logarithms, because a segment may be too small for a float, its logarithm not.

    Attributes:
        log_segments: [n, S, K+1].
        log_weights: [n, S, K].
        log_scale_dir, log_scale_time: [n, S, K], or None where the table has no such scale.
    """

    log_segments: Tensor
    log_weights: Tensor
    log_scale_dir: Tensor | None
    log_scale_time: Tensor | None

    def __len__(self) -> int:
        """Number of tables."""
        return len(self.log_weights)

    def select(self, rows: Tensor) -> TableSample:
        """The tables named by `rows`: indices, or a mask [n]."""
        return TableSample(
            self.log_segments[rows],
            self.log_weights[rows],
            None if self.log_scale_dir is None else self.log_scale_dir[rows],
            None if self.log_scale_time is None else self.log_scale_time[rows],
        )

    def table(self) -> EPDTable:
        """The tables [n, S, K], float64, as the solver takes them."""
        return EPDTable(
            positions_from_segments(self.log_segments.exp()).clamp(POSITION_MARGIN, 1 - POSITION_MARGIN),
            self.log_weights.exp(),
            None if self.log_scale_dir is None else self.log_scale_dir.exp(),
            None if self.log_scale_time is None else self.log_scale_time.exp(),
        )


@dataclass(frozen=True)
class TableDistribution:
    """The distribution over tables: sampling and scoring share these parameters.

    Attributes:
        alpha_positions: Dirichlet concentrations of the segments, [S, K+1]; with context [N, S, K+1], one per row.
        alpha_weights: those of the weights, [S, K] or [N, S, K].
        scale_dir, scale_time: log-normal, or None where the scale is not trained.
        fixed_scale_dir, fixed_scale_time: as alpha_weights, the cold-start table's where not trained; None: no scale.
        at_bounds: how many parameters were held at `MINIMUM_ALPHA` or `LOG_STD_BOUNDS`; they get no gradient.
    """

    alpha_positions: Tensor
    alpha_weights: Tensor
    scale_dir: LogNormal | None
    scale_time: LogNormal | None
    fixed_scale_dir: Tensor | None
    fixed_scale_time: Tensor | None
    at_bounds: int

    @torch.no_grad()
    def sample(self, number: int, generator: torch.Generator) -> TableSample:
        """Draw `number` tables (with context: one per row, `number` rows).

        The draws happen on the generator's device, so a CPU generator gives the same tables wherever the policy lives.
        """
        return TableSample(
            sample_log_dirichlet(_rows(self.alpha_positions, number), generator),
            sample_log_dirichlet(_rows(self.alpha_weights, number), generator),
            self._sample_log_scale(self.scale_dir, self.fixed_scale_dir, number, generator),
            self._sample_log_scale(self.scale_time, self.fixed_scale_time, number, generator),
        )

    def log_prob(self, sample: TableSample) -> Tensor:
        """Log-density [n] of each table: the sum over its intervals, segments, weights and trained scales."""
        total = dirichlet_log_prob(self.alpha_positions, sample.log_segments)  # [n, S]
        total = total + dirichlet_log_prob(self.alpha_weights, sample.log_weights)
        for scale, log_value in ((self.scale_dir, sample.log_scale_dir), (self.scale_time, sample.log_scale_time)):
            if scale is not None and log_value is not None:
                total = total + scale.log_prob(log_value).sum(-1)
        return total.sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, summed over the intervals; a scalar, or [N] with context."""
        total = dirichlet_entropy(self.alpha_positions) + dirichlet_entropy(self.alpha_weights)  # [..., S]
        for scale in (self.scale_dir, self.scale_time):
            if scale is not None:
                total = total + scale.entropy().sum(-1)
        return total.sum(-1)

    def kl(self, other: TableDistribution) -> Tensor:
        """KL(self || other) in nats, summed over the intervals; a scalar, or [N] with context."""
        total = dirichlet_kl(self.alpha_positions, other.alpha_positions)  # [..., S]
        total = total + dirichlet_kl(self.alpha_weights, other.alpha_weights)
        for mine, theirs in ((self.scale_dir, other.scale_dir), (self.scale_time, other.scale_time)):
            if mine is not None and theirs is not None:
                total = total + mine.kl(theirs).sum(-1)
        return total.sum(-1)

    def mean_table(self) -> EPDTable:
        """The mean, a table [S, K] (with context [N, S, K]), float64, detached."""
        scale_dir = self.fixed_scale_dir if self.scale_dir is None else self.scale_dir.mean()
        scale_time = self.fixed_scale_time if self.scale_time is None else self.scale_time.mean()
        concentrations = Concentrations(self.alpha_positions, self.alpha_weights)
        return table_from_concentrations(concentrations, scale_dir, scale_time).detach()

    @staticmethod
    def _sample_log_scale(
        scale: LogNormal | None, fixed: Tensor | None, number: int, generator: torch.Generator
    ) -> Tensor | None:
        if scale is None:
            return None if fixed is None else _rows(fixed.log(), number)
        loc, std = _rows(scale.loc, number), _rows(scale.log_std.exp(), number)
        noise = torch.randn(loc.shape, dtype=loc.dtype, device=generator.device, generator=generator)
        return loc + std * noise.to(loc.device)


class EPDParamPolicy(nn.Module):
    """Distribution over tables around a cold-start table; before the first update its mean is that table exactly.

    The residual network maps the one-hot interval index, beside an optional context, through one tanh layer to the
    changes of all parameters of that interval; its last layer starts at zero. Everything is float64.
    """

    def __init__(
        self,
        table: EPDTable,
        *,
        concentration: float,
        train_scale_dir: bool = False,
        train_scale_time: bool = False,
        scale_std: float = 0.05,
        context_size: int = 0,
        seed: int = 0,
    ) -> None:
        """Centre the policy on a table.

        Args:
            table: the cold-start table [S, K], as `cold_start.prepare_table` leaves it.
            concentration: total concentration c of each Dirichlet at the cold start.
            train_scale_dir, train_scale_time: draw the scale too, log-normal around the table's (1 where it has none);
                a scale that is not trained stays as it is in the table.
            scale_std: standard deviation of the trained log scales at the cold start.
            context_size: length of the context vector that conditions the distribution; 0: unconditional.
            seed: of the network's first layer (its last layer is zero).

        Raises:
            InputError: the table is a batch or not ordered, or `concentration` or `scale_std` is out of range.
        """
        super().__init__()
        if table.batch_size is not None:
            raise InputError(f"a policy starts from one table [S, K]; this is a batch of {table.batch_size}")
        alpha = concentrations_from_table(table, concentration)
        least = min(alpha.positions.min().item(), alpha.weights.min().item())
        if least < MINIMUM_ALPHA:
            raise InputError(
                f"dirichlet concentration {concentration:g} times the table's least segment or weight is {least:.1e}, "
                f"below the floor {MINIMUM_ALPHA:g}: raise ppo.dirichlet_concentration to "
                f"{concentration * MINIMUM_ALPHA / least:.2g} or more"
            )
        if not LOG_STD_BOUNDS[0] < math.log(scale_std) < LOG_STD_BOUNDS[1]:
            raise InputError(f"scale_std {scale_std:g}: its logarithm must lie inside {LOG_STD_BOUNDS}")
        self.trains_scale_dir, self.trains_scale_time = train_scale_dir, train_scale_time
        self.context_size = context_size
        base = [alpha.positions.log(), alpha.weights.log()]
        if train_scale_dir:
            base += _log_normal_base(table.scale_dir, table.weights, scale_std)
        if train_scale_time:
            base += _log_normal_base(table.scale_time, table.weights, scale_std)
        self.sizes = [part.shape[-1] for part in base]
        self.base: Tensor  # [S, P]: log alpha_pos, log alpha_weight, then loc and log_std of each trained scale
        self.register_buffer("base", torch.cat(base, dim=-1))
        self.fixed_scale_dir: Tensor | None
        self.fixed_scale_time: Tensor | None
        self.register_buffer("fixed_scale_dir", None if train_scale_dir else _float64(table.scale_dir))
        self.register_buffer("fixed_scale_time", None if train_scale_time else _float64(table.scale_time))
        self.hidden = nn.utils.skip_init(
            nn.Linear, table.num_intervals + context_size, HIDDEN_SIZE, dtype=torch.float64
        )
        self.output = nn.utils.skip_init(nn.Linear, HIDDEN_SIZE, self.base.shape[-1], dtype=torch.float64)
        nn.init.normal_(self.hidden.weight, generator=generator_of(seed))
        for zero in (self.hidden.bias, self.output.weight, self.output.bias):
            nn.init.zeros_(zero)

    def forward(self, context: Tensor | None = None) -> TableDistribution:
        """The distribution; with `context` [N, context_size], one per row.

        Raises:
            ValueError: a context where the policy takes none, or none where it takes one, or of another size.
        """
        given = 0 if context is None else context.shape[-1]
        if given != self.context_size:
            raise ValueError(f"this policy takes a context of size {self.context_size}, and got {given}")
        intervals = len(self.base)
        features = torch.eye(intervals, dtype=self.base.dtype, device=self.base.device)  # [S, S]
        if context is not None:
            rows = len(context)
            repeated = context.to(self.base)[:, None].expand(rows, intervals, given)
            features = torch.cat([features.expand(rows, intervals, intervals), repeated], dim=-1)  # [N, S, S + context]
        return self.distribution(self.output(self.hidden(features).tanh()))

    def distribution(self, residual: Tensor) -> TableDistribution:
        """The distribution with `residual` [..., S, P] added to the cold start's parameters.

        The P columns: log alpha_pos (K+1), log alpha_weight (K), then per trained scale (dir before time) loc (K) and
        log_std (K).
        """
        parts = list((self.base + residual).split(self.sizes, dim=-1))
        alpha_positions, clamped_positions = _floored_alpha(parts[0])
        alpha_weights, clamped_weights = _floored_alpha(parts[1])
        scale_dir, clamped_dir = _bounded_log_normal(parts[2:4]) if self.trains_scale_dir else (None, 0)
        scale_time, clamped_time = _bounded_log_normal(parts[-2:]) if self.trains_scale_time else (None, 0)
        return TableDistribution(
            alpha_positions,
            alpha_weights,
            scale_dir,
            scale_time,
            *(
                None if fixed is None else fixed.expand_as(alpha_weights)
                for fixed in (self.fixed_scale_dir, self.fixed_scale_time)
            ),
            at_bounds=clamped_positions + clamped_weights + clamped_dir + clamped_time,
        )

    def cold_start(self) -> TableDistribution:
        """The distribution before the first update, the reference of the KL term."""
        return self.distribution(torch.zeros_like(self.base))


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
    """One row of parameters per table: [S, M] repeated to [number, S, M]; [number, S, M] as it is."""
    return parameter.expand(number, *parameter.shape[-2:])


def _float64(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().double().clone()


def _log_normal_base(scale: Tensor | None, like: Tensor, std: float) -> list[Tensor]:
    """Location and log standard deviation whose mean exp(loc + std^2/2) is the scale (1 where there is none)."""
    mean = torch.ones_like(like, dtype=torch.float64) if scale is None else scale.double()
    return [mean.log() - 0.5 * std**2, torch.full_like(mean, math.log(std))]


def _floored_alpha(log_alpha: Tensor) -> tuple[Tensor, int]:
    alpha = log_alpha.exp()
    return alpha.clamp(min=MINIMUM_ALPHA), int((alpha < MINIMUM_ALPHA).sum())


def _bounded_log_normal(parts: list[Tensor]) -> tuple[LogNormal, int]:
    loc, log_std = parts
    bounded = log_std.clamp(*LOG_STD_BOUNDS)
    return LogNormal(loc, bounded), int((bounded != log_std).sum())
