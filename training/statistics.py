"""Numbers with honest error bars: paired bootstrap intervals and the Frechet distance between two sets of features.

Every interval is a percentile bootstrap (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13)
that resamples whole rows. A row is one prompt: hand in one value a prompt (average several images of a prompt first);
the interval then says how it would come out on other prompts of the same kind. Two solvers are compared by the
differences of the same rows, never by two intervals side by side.

Randomness is a `torch.Generator` on the CPU that the caller passes: equal seeds give equal intervals on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MINIMUM_RESAMPLES = 2000
CHUNK_ELEMENTS = 2**24  # numbers that a vectorised step may hold at once: 128 MiB of float64


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
    """Rows to draw, with replacement: int64 [resamples, count]. Use ONE such tensor for everything that is paired.

    Raises ValueError for fewer than two rows (nothing can be said about their spread) or too few resamples.
    """
    if count < 2:
        raise ValueError(f"an interval needs at least 2 rows, not {count}")
    if resamples < MINIMUM_RESAMPLES:
        raise ValueError(f"a 95% interval needs at least {MINIMUM_RESAMPLES} resamples, not {resamples}")
    return torch.randint(count, (resamples, count), generator=generator)


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


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of two feature sets [N, D] and [M, D], each taken as a Gaussian (Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^{1/2} C2 C1^{1/2})^{1/2}), covariances with the divisor N - 1. The root is
    taken by symmetric eigen-decomposition in float64, so rank-deficient covariances (N <= D) are no special case. It is
    >= 0, in squared feature units, and biased upwards for few rows: compare only distances made with equally many rows.
    """
    first, second = _reduced(features, reference)
    return _gaussian_distances(*_moments(first, _everything(first)), *_moments(second, _everything(second))).item()


def frechet_resamples(features: Tensor, reference: Tensor, indices: Tensor) -> FrechetResamples:
    """Bootstrap of `frechet_distance` for paired sets, both [N, D]: row i of each belongs to the same prompt.

    Both sets are resampled by the same `indices` [R, N]; so are those of another solver, whose replicates may
    therefore be subtracted one by one (`frechet_difference_interval`).
    """
    if features.shape != reference.shape:
        raise ValueError(f"paired sets need equal shapes, not {tuple(features.shape)} and {tuple(reference.shape)}")
    first, second = _reduced(features, reference)
    if indices.shape[1] != len(first):
        raise ValueError(f"the indices are for {indices.shape[1]} rows, the features have {len(first)}")
    count, width = first.shape
    counts = torch.zeros(len(indices), count, dtype=torch.float64)  # how often each row was drawn, [R, N]
    counts.scatter_add_(1, indices, torch.ones_like(indices, dtype=torch.float64))
    resamples_a_chunk = max(1, CHUNK_ELEMENTS // max(count * width, width * width))
    replicates = [
        _gaussian_distances(*_moments(first, chunk), *_moments(second, chunk))
        for chunk in counts.split(resamples_a_chunk)
    ]
    return FrechetResamples(frechet_distance(features, reference), torch.cat(replicates))


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


def _everything(features: Tensor) -> Tensor:
    return torch.ones(1, len(features), dtype=features.dtype)


def _moments(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Means [R, D] and covariances [R, D, D] of `features` [N, D], each row counted `counts` [R, N] times."""
    total = counts.sum(dim=1)  # [R]
    means = counts @ features / total[:, None]
    seconds = (counts[:, :, None] * features).mT @ features  # [R, D, D]
    centred = seconds - total[:, None, None] * means[:, :, None] * means[:, None, :]
    return means, centred / (total - 1)[:, None, None]


def _gaussian_distances(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Frechet distances [R] of Gaussians given by means [R, D] and covariances [R, D, D]."""
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT
    product = root @ covariance2 @ root
    coupling = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0).sqrt().sum(dim=1)
    traces = (covariance1 + covariance2).diagonal(dim1=1, dim2=2).sum(dim=1)
    return ((mean1 - mean2).square().sum(dim=1) + traces - 2 * coupling).clamp(min=0)
