"""Numbers with honest error bars: paired bootstrap intervals and the Frechet distance between two sets of features.

Every interval is a percentile bootstrap (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13)
that resamples whole rows. A row is one prompt: hand in one value a prompt (average several images of a prompt first);
the interval then says how it would come out on other prompts of the same kind. Two solvers are compared by the
differences of the same rows, never by two intervals side by side.

Randomness is a `torch.Generator` on the CPU that the caller passes: equal seeds give equal intervals on every device.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

MINIMUM_RESAMPLES = 2000
CHUNK_ELEMENTS = 2**18  # numbers that a vectorised step may hold at once: 2 MiB of float64, which stay in a cache


class Interval(NamedTuple):
    """An estimate with the ends of its interval, in the unit of what was measured."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside: for a paired difference, whether the two differ at this confidence."""
        return self.low > 0 or self.high < 0


class FrechetResamples(NamedTuple):
    """A Frechet distance (>= 0) and its bootstrap replicates [R], float64."""

    estimate: float
    replicates: Tensor


def bootstrap_indices(count: int, generator: torch.Generator, resamples: int = MINIMUM_RESAMPLES) -> Tensor:
    """Rows to draw, with replacement: int32 [resamples, count]. Use ONE such tensor for everything that is paired.

    Raises ValueError for fewer than two rows (nothing can be said about their spread) or too few resamples.
    """
    if count < 2:
        raise ValueError(f"an interval needs at least 2 rows, not {count}")
    if resamples < MINIMUM_RESAMPLES:
        raise ValueError(f"a 95% interval needs at least {MINIMUM_RESAMPLES} resamples, not {resamples}")
    return torch.randint(count, (resamples, count), generator=generator, dtype=torch.int32)


def mean_interval(values: Tensor, indices: Tensor, confidence: float = 0.95) -> Interval:
    """Percentile bootstrap interval of the mean of `values` [N]; `indices` [R, N] come from `bootstrap_indices`.

    Raises ValueError where the values are not one finite number a row of `indices`.
    """
    rows = _finite_rows(values, indices)
    rows_a_chunk = max(1, CHUNK_ELEMENTS // indices.shape[1])
    means = torch.cat([rows[chunk].mean(dim=1) for chunk in indices.split(rows_a_chunk)])  # [R]
    low, high = _tails(means, confidence)
    return Interval(rows.mean().item(), low, high)


def paired_difference_interval(values: Tensor, baseline: Tensor, indices: Tensor, confidence: float = 0.95) -> Interval:
    """Interval of mean(values - baseline): in every row, `values` and `baseline` [N] share prompt and noise."""
    if values.shape != baseline.shape:
        raise ValueError(f"paired values need equal shapes, not {tuple(values.shape)} and {tuple(baseline.shape)}")
    return mean_interval(values.double() - baseline.double(), indices, confidence)


def tellable_difference(spread: float, count: int, confidence: float = 0.95, power: float = 0.8) -> float:
    """The smallest difference of means that `count` pairs tell from 0 with this power, where pairs spread so much.

    spread: standard deviation of the paired differences. (z_{1 - (1 - confidence) / 2} + z_power) spread / sqrt(count)
    (Cohen 1988, chapter 2).
    """
    normal = NormalDist()
    return (normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(power)) * spread / math.sqrt(count)


def pairs_needed(spread: float, difference: float, confidence: float = 0.95, power: float = 0.8) -> int:
    """How many pairs tell a difference from 0; see `tellable_difference`."""
    return max(2, math.ceil((tellable_difference(spread, 1, confidence, power) / difference) ** 2))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of two feature sets [N, D] and [M, D], each taken as a Gaussian (Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^{1/2} C2 C1^{1/2})^{1/2}), covariances with the divisor N - 1, in float64.
    With C1 = F1^T F1 and C2 = F2^T F2 the last trace is the sum of the singular values of F1 F2^T, so that
    rank-deficient covariances (N <= D) are no special case. It is >= 0, in squared feature units, and biased upwards
    for few rows: compare only distances made with equally many rows.
    """
    first, second = (_counted_moments(rows[None], torch.ones(1, len(rows))) for rows in _reduced(features, reference))
    return _gaussian_distances(first, second).item()


def frechet_resamples(features: Tensor, reference: Tensor, indices: Tensor) -> FrechetResamples:
    """Bootstrap of `frechet_distance` for paired sets, both [N, D]: row i of each belongs to the same prompt.

    Both sets are resampled by the same `indices` [R, N]; so are those of another solver, whose replicates may
    therefore be subtracted one by one (`frechet_difference_interval`). A replicate takes the eigenvalues of a matrix
    with min(U, D) rows, U the distinct rows that were drawn: some 0.63 N.
    """
    if features.shape != reference.shape:
        raise ValueError(f"paired sets need equal shapes, not {tuple(features.shape)} and {tuple(reference.shape)}")
    first, second = _reduced(features, reference)
    if indices.shape[1] != len(first):
        raise ValueError(f"the indices are for {indices.shape[1]} rows, the features have {len(first)}")
    ones = torch.ones(indices.shape)
    counts = torch.zeros(indices.shape).scatter_add_(1, indices.long(), ones)  # of each row, [R, N]
    distinct = (counts > 0).sum(dim=1)  # [R]
    replicates = torch.empty(len(indices), dtype=torch.float64)
    for number in distinct.unique().tolist():  # resamples with equally many distinct rows go together
        together = (distinct == number).nonzero().flatten()
        for chunk in together.split(max(1, CHUNK_ELEMENTS // (number * max(number, first.shape[1])))):
            drawn = counts[chunk].nonzero()[:, 1].view(len(chunk), number)
            often = counts[chunk].gather(1, drawn)
            moments = (_counted_moments(rows[drawn], often) for rows in (first, second))
            replicates[chunk] = _gaussian_distances(*moments)
    return FrechetResamples(frechet_distance(features, reference), replicates)


def frechet_interval(resamples: FrechetResamples, confidence: float = 0.95) -> Interval:
    """Interval of the expected Frechet distance AT THIS NUMBER OF ROWS.

    A resample repeats rows, so its distance is biased upwards once more and plain percentiles would miss the estimate
    itself. Only the spread of the replicates about their own mean is used, laid about the estimate; the ends stay
    >= 0. The small-sample bias is common to all sets of this size and is not part of the interval.
    """
    interval = _centred(resamples.estimate, resamples.replicates, confidence)
    return interval._replace(low=max(interval.low, 0.0), high=max(interval.high, interval.estimate))


def frechet_difference_interval(
    resamples: FrechetResamples, baseline: FrechetResamples, confidence: float = 0.95
) -> Interval:
    """Interval of the difference of two Frechet distances to the same reference, resampled with the same indices."""
    if resamples.replicates.shape != baseline.replicates.shape:
        raise ValueError("paired Frechet distances need replicates of the same indices")
    return _centred(resamples.estimate - baseline.estimate, resamples.replicates - baseline.replicates, confidence)


def _finite_rows(values: Tensor, indices: Tensor) -> Tensor:
    if values.ndim != 1 or len(values) != indices.shape[1]:
        raise ValueError(f"one value a row is needed: [{indices.shape[1]}], not {list(values.shape)}")
    rows = values.detach().double().cpu()
    if not rows.isfinite().all():
        raise ValueError(f"{int((~rows.isfinite()).sum())} of {len(rows)} values are not finite")
    return rows


def _tails(replicates: Tensor, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, not {confidence}")
    tail = (1 - confidence) / 2
    low, high = replicates.quantile(torch.tensor([tail, 1 - tail], dtype=replicates.dtype)).tolist()
    return low, high


def _centred(estimate: float, replicates: Tensor, confidence: float) -> Interval:
    low, high = _tails(replicates - replicates.mean(), confidence)
    return Interval(estimate, estimate + low, estimate + high)


def _reduced(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Check both sets and rotate them, exactly, into the space they span where that is smaller than D; float64, CPU."""
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"two sets [N, D] are needed, not {list(features.shape)} and {list(reference.shape)}")
    if min(len(features), len(reference)) < 2:
        raise ValueError("a covariance needs at least 2 rows in each set")
    both = torch.cat([features.detach().double().cpu(), reference.detach().double().cpu()])
    if not both.isfinite().all():
        raise ValueError("the features hold values that are not finite")
    both = both - both.mean(dim=0)  # a common shift changes no distance and keeps the sums below accurate
    if len(both) < both.shape[1]:
        basis, _ = torch.linalg.qr(both.mT)  # [D, N + M], orthonormal columns
        both = both @ basis
    return both[: len(features)], both[len(features) :]


class _Moments(NamedTuple):
    """Means [R, D] and factors F [R, U, D] of the covariances F^T F."""

    means: Tensor
    factors: Tensor


def _counted_moments(rows: Tensor, counts: Tensor) -> _Moments:
    """Moments of sets of `rows` [R, U, D], each row taken `counts` [R, U] times."""
    counts = counts.double()[:, :, None]
    total = counts.sum(dim=1, keepdim=True)  # [R, 1, 1]
    means = (counts * rows).sum(dim=1, keepdim=True) / total  # [R, 1, D]
    return _Moments(means[:, 0], (counts / (total - 1)).sqrt() * (rows - means))


def _gaussian_distances(first: _Moments, second: _Moments) -> Tensor:
    """Frechet distances [R] of Gaussians."""
    left = first.factors
    if left.shape[1] > left.shape[2]:  # F^T F = R^T R: what is left of the rows when they are rotated together
        left = torch.linalg.qr(left, mode="r").R
    crossed = left @ second.factors.mT  # [R, min(U, D), V]
    # Singular values by the eigenvalues of the smaller square: half the time, and good to 1e-8 of the largest.
    coupling = torch.linalg.eigvalsh(crossed @ crossed.mT).clamp(min=0).sqrt().sum(dim=1)
    traces = first.factors.square().sum(dim=(1, 2)) + second.factors.square().sum(dim=(1, 2))
    return ((first.means - second.means).square().sum(dim=1) + traces - 2 * coupling).clamp(min=0)
