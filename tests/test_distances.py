"""Fréchet distance, KID and CMMD against scipy, torchmetrics, closed forms, plain loops and a brute-force bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from training.measuring import distances
from training.measuring.distances import (
    Gaussian,
    cmmd_values,
    frechet,
    frechet_values,
    gaussian_of,
    kid_values,
    paired_frechet_values,
)
from training.measuring.statistics import Interval, bootstrap_indices, paired_difference_interval


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_frechet(a, b):
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


def distance_of(first, second):
    return frechet(gaussian_of(first), gaussian_of(second))


def test_the_frechet_distance_agrees_with_scipys_formula():
    a = normal(1, 200, 12) @ normal(2, 12, 12)
    b = normal(3, 150, 12) @ normal(4, 12, 12) + 0.5
    assert distance_of(a, b) == pytest.approx(scipy_frechet(a.numpy(), b.numpy()), rel=1e-9)
    assert frechet_values(a, gaussian_of(b)).mean().item() == pytest.approx(distance_of(a, b), rel=1e-12)


def test_torchmetrics_finds_the_same():
    a, b = normal(5, 60, 6), 1.5 * normal(6, 60, 6) + 1
    metric = FrechetInceptionDistance(feature=nn.Identity(), input_img_size=(6,)).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=60)
    for rows, real in ((a, False), (b, True)):
        metric.update(rows, real=real)
        kernel.update(rows, real=real)
    assert distance_of(a, b) == pytest.approx(metric.compute().item(), rel=1e-6)
    assert kid_values(a, b).mean().item() == pytest.approx(kernel.compute()[0].item(), rel=1e-9)


def test_known_gaussians():
    scale, shift = torch.tensor([0.5, 2.0, 3.0]).double(), torch.tensor([1.0, -2.0, 0.0]).double()
    unit = Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    assert frechet(unit, unit) == pytest.approx(0, abs=1e-12)
    assert frechet(Gaussian(shift, torch.eye(3).double()), unit) == pytest.approx(5)
    wide = Gaussian(shift, scale.square().diag())
    assert frechet(wide, unit) == pytest.approx((shift.square() + (scale - 1).square()).sum().item(), rel=1e-12)


@pytest.mark.parametrize("rows", [2, 7])
def test_two_images_and_singular_covariances(rows):
    """Fewer rows than features: tr (C1 C2)^{1/2} by the singular values of the factors, which needs no inverse."""
    a, b = normal(7, rows, 40), normal(8, rows, 40) + 0.3
    factors = [(x - x.mean(0)) / math.sqrt(rows - 1) for x in (a, b)]
    coupling = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(factor.square().sum() for factor in factors)
    expected = ((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * coupling).item()
    assert distance_of(a, b) == pytest.approx(expected, rel=1e-6)
    assert distance_of(b, a) == pytest.approx(expected, rel=1e-6)
    assert distance_of(a, a) == pytest.approx(0, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 10_000))
def test_the_frechet_distance_is_symmetric_zero_on_itself_and_blind_to_rotation(rows, width, seed):
    a, b = normal(seed, rows, width), 2 * normal(seed + 1, rows, width) + 1
    rotation, _ = torch.linalg.qr(normal(seed + 2, width, width))
    distance = distance_of(a, b)
    assert distance == pytest.approx(distance_of(b, a), rel=1e-6, abs=1e-6)
    assert distance == pytest.approx(distance_of(a @ rotation, b @ rotation), rel=1e-6, abs=1e-6)
    assert distance_of(a, a) == pytest.approx(0.0, abs=1e-6)


def test_a_set_without_spread_has_the_distance_of_its_mean_and_all_spread_of_the_other():
    a, b = torch.ones(5, 3).double(), normal(18, 30, 3)
    expected = ((1 - b.mean(0)).square().sum() + b.T.cov().trace()).item()
    assert frechet_values(a, gaussian_of(b)).tolist() == pytest.approx([expected] * 5)


def test_equal_sets_are_at_distance_nothing_in_every_row():
    a = normal(9, 30, 4)
    assert paired_frechet_values(a, a).abs().max() < 1e-9
    assert frechet_values(a, gaussian_of(a)).abs().max() < 1e-9
    unit = nn.functional.normalize(a, dim=1)
    assert cmmd_values(unit, unit).abs().max() < 1e-9
    assert kid_values(a, a.flip(0)).mean() < 0  # unbiased, so below 0 where both sets are the same draw


@pytest.mark.parametrize(
    "values",
    [
        lambda a, b: frechet_values(a, gaussian_of(b)),
        kid_values,
        lambda a, b: cmmd_values(nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1)),
    ],
)
def test_few_rows_at_once_are_all_at_once(monkeypatch, values):
    a, b = normal(10, 50, 5), normal(11, 40, 5) + 0.2
    whole = values(a, b)
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 7)
    torch.testing.assert_close(values(a, b), whole, rtol=1e-10, atol=1e-12)


def test_kid_and_cmmd_are_their_definitions():
    a, b = normal(12, 9, 3), normal(13, 7, 3) + 0.4

    def cubic(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    own = np.mean([cubic(a[i], a[j]) for i in range(9) for j in range(9) if i != j])
    theirs = np.mean([cubic(b[i], b[j]) for i in range(7) for j in range(7) if i != j])
    across = np.mean([cubic(x, y) for x in a for y in b])
    assert kid_values(a, b).mean().item() == pytest.approx(own + theirs - 2 * across, rel=1e-10)

    def gauss(x, y):
        return math.exp(-float((x - y).square().sum()) / 200)

    expected = 1000 * (
        np.mean([gauss(x, y) for x in a for y in a])
        + np.mean([gauss(x, y) for x in b for y in b])
        - 2 * np.mean([gauss(x, y) for x in a for y in b])
    )
    assert cmmd_values(a, b).mean().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [3, 30])  # more rows than features, and fewer
def test_the_influence_is_what_a_little_more_weight_changes(width):
    a, b = normal(14, 20, width), 1.3 * normal(15, 20, width) + 0.5
    reference = gaussian_of(b)
    values = frechet_values(a, reference)

    def at(weights):
        mean = (weights[:, None] * a).sum(0)
        centred = a - mean
        return frechet(Gaussian(mean, (weights[:, None] * centred).T @ centred * 20 / 19), reference)

    def nudged(row, step):
        weights = torch.full((20,), (1 - step) / 20, dtype=torch.float64)
        weights[row] += step
        return at(weights)

    for row in (0, 7, 19):
        derivative = (nudged(row, 1e-5) - nudged(row, -1e-5)) / 2e-5
        assert (values[row] - values.mean()).item() == pytest.approx(derivative, rel=1e-4)


@pytest.mark.parametrize("name", ["frechet", "paired", "kid"])
def test_the_values_spread_as_a_bootstrap_by_brute_force(name):
    rows = 300
    a, b = 1.2 * normal(16, rows, 4) + 0.5, normal(17, rows, 4)
    reference = gaussian_of(b)
    values, at = {
        "frechet": (frechet_values(a, reference), lambda x, y: frechet(gaussian_of(x), reference)),
        "paired": (paired_frechet_values(a, b), distance_of),
        "kid": (kid_values(a, b), lambda x, y: kid_values(x, b).mean().item()),
    }[name]
    drawn = [torch.randint(rows, (rows,), generator=torch.Generator().manual_seed(seed)) for seed in range(300)]
    spread = np.std([at(a[chosen], b[chosen]) for chosen in drawn])
    assert values.std().item() / math.sqrt(rows) == pytest.approx(spread, rel=0.15)


def test_intervals_cover_the_expected_distance_about_as_often_as_they_say():
    rows, runs = 60, 200
    pairs = [(1.2 * normal(1000 + i, rows, 4) + 0.5, normal(5000 + i, rows, 4)) for i in range(runs)]
    found = [paired_frechet_values(a, b) for a, b in pairs]
    expected = np.mean([values.mean().item() for values in found])
    half = [1.96 * values.std().item() / math.sqrt(rows) for values in found]
    covered = [abs(values.mean().item() - expected) <= width for values, width in zip(found, half, strict=True)]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_the_difference_of_frechet_distances_is_paired():
    real, good = gaussian_of(normal(31, 60, 4)), normal(32, 60, 4)
    bad, indices = good + 0.5, bootstrap_indices(60, torch.Generator().manual_seed(33))
    first, second = frechet_values(bad, real), frechet_values(good, real)
    difference = paired_difference_interval(first, second, indices)
    assert difference.estimate == pytest.approx(frechet(gaussian_of(bad), real) - frechet(gaussian_of(good), real))
    assert difference.excludes_zero
    assert paired_difference_interval(first, first, indices) == Interval(0.0, 0.0, 0.0)


def test_sets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="of 3 and 4 numbers"):
        frechet(gaussian_of(normal(0, 5, 3)), gaussian_of(normal(0, 5, 4)))
    with pytest.raises(ValueError, match="at least 2 rows"):
        gaussian_of(normal(0, 1, 3))
    with pytest.raises(ValueError, match="not finite"):
        gaussian_of(normal(0, 5, 3) / 0)
    with pytest.raises(ValueError, match="two sets"):
        kid_values(normal(0, 5, 3), normal(0, 5, 4))
    with pytest.raises(ValueError, match="equal shapes"):
        paired_frechet_values(normal(0, 5, 3), normal(0, 6, 3))
