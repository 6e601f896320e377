"""Distances between sets of images by their features, as one number an image, so that they are told apart like means.

Each distance is a smooth function of the empirical distribution of its rows, and comes with its influence function
(Efron & Tibshirani 1993, chapter 22): what it would change by if a row weighed a little more. The values of a set are
the distance plus each row's influence. Their mean is the distance, the bootstrap interval of their mean is the
distance's to first order, and two solvers are compared by paired differences of values, row by row, as by any other
metric. A bootstrap of the distances themselves would take some thousand eigenvalue problems a solver.

torchmetrics has FID and KID too, and the tests hold these against it; but it gives no value an image, so no interval,
takes no statistics file, and draws KID's subsets from the global random state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024
CMMD_BANDWIDTH = 10.0
CMMD_SCALE = 1000.0

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Features [N, D] and [M, D] to [N, M]."""


class Gaussian(NamedTuple):
    """What a Fréchet distance knows of a set: mean [D] and covariance [D, D] with the divisor N - 1, both float64."""

    mean: Tensor
    covariance: Tensor


def gaussian_of(features: Tensor) -> Gaussian:
    """Mean and covariance of features [N, D], in float64, few rows at once.

    Raises ValueError for fewer than two rows, and for features that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 rows of features, not {list(features.shape)}")
    mean = torch.stack([rows.double().sum(0) for rows in features.split(ROWS_AT_ONCE)]).sum(0) / len(features)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for rows in features.split(ROWS_AT_ONCE):
        covariance.addmm_((centred := rows.double() - mean).mT, centred)
    if not covariance.isfinite().all():
        raise ValueError("the features hold values that are not finite")
    return Gaussian(mean, covariance / (len(features) - 1))


def frechet(first: Gaussian, second: Gaussian) -> float:
    """Fréchet distance of two Gaussians (Heusel et al., arXiv 1706.08500, eq. 6), >= 0, in squared feature units.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^{1/2} C2 C1^{1/2})^{1/2}. Biased upwards for few rows: compare only distances
    of equally many.
    """
    return _coupled_distance(first, second, _coupling(first, second)[1])


def _coupled_distance(first: Gaussian, second: Gaussian, coupling: Tensor) -> float:
    spread = first.covariance.trace() + second.covariance.trace() - 2 * coupling.trace()
    return max(((first.mean - second.mean).square().sum() + spread).item(), 0.0)


def frechet_values(features: Tensor, reference: Gaussian, own: Gaussian | None = None) -> Tensor:
    """Values [N], float64, of the Fréchet distance of features [N, D] to a Gaussian that stays as it is.

    The influence of x is 2 (m1 - m2)^T (x - m1) + (x - m1)^T (I - T) (x - m1), less its mean, with T the optimal
    transport map C1^{-1/2} (C1^{1/2} C2 C1^{1/2})^{1/2} C1^{-1/2} on what the rows span. own: `gaussian_of(features)`.
    """
    own = own or gaussian_of(features)
    root, coupling = _coupling(own, reference)
    influence = []
    for rows in features.split(ROWS_AT_ONCE):
        centred = rows.double() - own.mean
        whitened = centred @ root
        spread = centred.square().sum(1) - (whitened @ coupling * whitened).sum(1)
        # N / (N - 1): the covariance has the divisor N - 1.
        influence.append(2 * (centred @ (own.mean - reference.mean)) + spread * len(features) / (len(features) - 1))
    return _values(_coupled_distance(own, reference, coupling), torch.cat(influence))


def paired_frechet_values(features: Tensor, reference: Tensor) -> Tensor:
    """Values [N] of the Fréchet distance of two sets [N, D] whose rows i belong to the same prompt: drawn together."""
    if features.shape != reference.shape:
        raise ValueError(f"paired sets need equal shapes, not {[*features.shape]} and {[*reference.shape]}")
    first, second = gaussian_of(features), gaussian_of(reference)
    forth, back = frechet_values(features, second, first), frechet_values(reference, first, second)
    return forth + back - frechet(first, second)


def _coupling(first: Gaussian, second: Gaussian) -> tuple[Tensor, Tensor]:
    """W and M: W whitens by the first covariance, W^T C1 W = I [r, r], M = (W^T C1 C2 C1 W)^{1/2}; r is its rank.

    tr M is tr (C1 C2)^{1/2}, and W M W^T the optimal transport map. Directions that the first lacks are left out.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"two sets of features are needed, not of {len(first.mean)} and {len(second.mean)} numbers")
    levels, vectors = torch.linalg.eigh(first.covariance)
    kept = levels > levels[-1].clamp(min=0) * len(levels) * torch.finfo(levels.dtype).eps
    levels, vectors = levels[kept], vectors[:, kept]
    rooted = vectors * levels.sqrt()  # C1^{1/2}, but for a rotation
    crossed_levels, crossed = torch.linalg.eigh(rooted.mT @ second.covariance @ rooted)
    return vectors / levels.sqrt(), (crossed * crossed_levels.clamp(min=0).sqrt()) @ crossed.mT


def cubic_kernel(first: Tensor, second: Tensor) -> Tensor:
    """(x^T y / D + 1)^3, that of KID (Bińkowski et al., arXiv 1801.01401, eq. 4)."""
    return (first @ second.mT / first.shape[1] + 1) ** 3


def gaussian_kernel(first: Tensor, second: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 · 10^2)), that of CMMD (Jayasumana et al., arXiv 2401.09603, section 4)."""
    return (-torch.cdist(first, second).square() / (2 * CMMD_BANDWIDTH**2)).exp()


def kid_values(features: Tensor, reference: Tensor) -> Tensor:
    """Values [N] of KID: the unbiased squared MMD of all rows of [N, D] and [M, D] with `cubic_kernel`.

    The mean over random subsets that is commonly quoted estimates this number; here every row counts, and no chance.
    """
    return _mmd_values(features, reference, cubic_kernel, unbiased=True)


def cmmd_values(features: Tensor, reference: Tensor) -> Tensor:
    """Values [N] of CMMD: 1,000 times the squared MMD of unit-length CLIP features with `gaussian_kernel`.

    With the pairs of a row and itself, as the paper's code has it.
    """
    return CMMD_SCALE * _mmd_values(features, reference, gaussian_kernel, unbiased=False)


def _mmd_values(features: Tensor, reference: Tensor, kernel: Kernel, *, unbiased: bool) -> Tensor:
    if features.shape[1:] != reference.shape[1:] or min(len(features), len(reference)) < 2:
        raise ValueError(
            f"two sets [N, D] of at least 2 rows are needed, not {[*features.shape]}, {[*reference.shape]}"
        )
    own = _mean_kernel(features, features, kernel, without_itself=unbiased)
    across = _mean_kernel(features, reference, kernel, without_itself=False)
    theirs = _mean_kernel(reference, reference, kernel, without_itself=unbiased)
    return _values((own.mean() - 2 * across.mean() + theirs.mean()).item(), 2 * (own - across))


def _mean_kernel(features: Tensor, others: Tensor, kernel: Kernel, *, without_itself: bool) -> Tensor:
    """Mean kernel of each row with all rows of the other set [N], float64; of the same set, if wanted, but itself."""
    means = []
    for rows in features.split(ROWS_AT_ONCE):
        rows = rows.double()
        sums = sum(kernel(rows, columns.double()).sum(1) for columns in others.split(ROWS_AT_ONCE))
        itself = torch.cat([kernel(row[None], row[None])[0] for row in rows]) if without_itself else 0
        means.append((sums - itself) / (len(others) - without_itself))
    return torch.cat(means)


def _values(distance: float, influence: Tensor) -> Tensor:
    return distance + influence - influence.mean()
