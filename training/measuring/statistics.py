"""Numbers with honest error bars: paired bootstrap intervals, and what a number of pairs can tell.

Every interval is a percentile bootstrap (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13)
that resamples whole rows. A row is one prompt: hand in one value a prompt (average several images of a prompt first);
the interval then says how it would come out on other prompts of the same kind. Two solvers are compared by the
differences of the same rows, never by two intervals side by side.

Randomness is a `torch.Generator` on the CPU that the caller passes: equal seeds give equal intervals on every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

CONFIDENCE, POWER = 0.95, 0.8
RESAMPLES = 2000
CHUNK_ELEMENTS = 2**18  # numbers that a vectorised step may hold at once: 2 MiB of float64, which stay in a cache


class Interval(NamedTuple):
    """An estimate with the ends of its interval, in the unit of what was measured."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside: for a paired difference, whether the two differ at `CONFIDENCE`."""
        return self.low > 0 or self.high < 0

    def as_metrics(self, name: str) -> dict[str, float]:
        """The estimate under `name`, and its ends under `name_low` and `name_high`."""
        return dict(zip((name, f"{name}_low", f"{name}_high"), self, strict=True))

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float], name: str) -> Interval:
        """The inverse of `as_metrics`."""
        return cls(metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"])


def bootstrap_indices(count: int, generator: torch.Generator) -> Tensor:
    """Rows to draw, with replacement: int32 [RESAMPLES, count]. Use ONE such tensor for everything that is paired.

    Raises ValueError for fewer than two rows: nothing can be said about their spread.
    """
    if count < 2:
        raise ValueError(f"an interval needs at least 2 rows, not {count}")
    return torch.randint(count, (RESAMPLES, count), generator=generator, dtype=torch.int32)


def mean_interval(values: Tensor, indices: Tensor) -> Interval:
    """Percentile bootstrap interval of the mean of `values` [N]; `indices` [R, N] come from `bootstrap_indices`.

    Raises ValueError where the values are not one finite number a row of `indices`.
    """
    if values.ndim != 1 or len(values) != indices.shape[1]:
        raise ValueError(f"one value a row is needed: [{indices.shape[1]}], not {list(values.shape)}")
    rows = values.detach().double().cpu()
    if not rows.isfinite().all():
        raise ValueError(f"{int((~rows.isfinite()).sum())} of {len(rows)} values are not finite")
    rows_a_chunk = max(1, CHUNK_ELEMENTS // indices.shape[1])
    means = torch.cat([rows[chunk].mean(dim=1) for chunk in indices.split(rows_a_chunk)])  # [R]
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return Interval(rows.mean().item(), low, high)


def paired_difference_interval(values: Tensor, baseline: Tensor, indices: Tensor) -> Interval:
    """Interval of mean(values - baseline): in every row, `values` and `baseline` [N] share prompt and noise."""
    if values.shape != baseline.shape:
        raise ValueError(f"paired values need equal shapes, not {tuple(values.shape)} and {tuple(baseline.shape)}")
    return mean_interval(values.double() - baseline.double(), indices)


def tellable_difference(spread: float, count: int) -> float:
    """The smallest difference of means that `count` pairs tell from 0 with `POWER`, where pairs spread so much.

    spread: standard deviation of the paired differences. (z_{1 - (1 - confidence) / 2} + z_power) spread / sqrt(count)
    (Cohen 1988, chapter 2).
    """
    normal = NormalDist()
    return (normal.inv_cdf((1 + CONFIDENCE) / 2) + normal.inv_cdf(POWER)) * spread / math.sqrt(count)


def pairs_needed(spread: float, difference: float) -> int:
    """How many pairs tell a difference from 0; see `tellable_difference`."""
    return max(2, math.ceil((tellable_difference(spread, 1) / difference) ** 2))
