"""Bootstrap intervals and Frechet distances against closed forms, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.measuring.statistics import (
    Interval,
    bootstrap_indices,
    frechet_difference_interval,
    frechet_distance,
    frechet_interval,
    frechet_resamples,
    mean_interval,
    paired_difference_interval,
    pairs_needed,
    tellable_difference,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def scipy_frechet(a, b):
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_rows():
    values = normal(0, 2000)
    interval = mean_interval(values, bootstrap_indices(2000, seeded(1), resamples=4000))
    half = 1.959964 * values.std(unbiased=False).item() / math.sqrt(2000)
    assert interval.estimate == pytest.approx(values.mean().item(), abs=1e-12)
    assert interval.low == pytest.approx(values.mean().item() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean().item() + half, abs=0.05 * half)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    samples = normal(2, 300, 40).exp()  # skewed; true mean exp(1/2)
    indices = bootstrap_indices(40, seeded(3))
    covered = [(i := mean_interval(row, indices)).low <= math.exp(0.5) <= i.high for row in samples]
    assert 0.84 <= sum(covered) / len(covered) <= 0.98  # the percentile interval is a little short at 40 skewed rows


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    values = normal(4, 50)
    first, same, other = (mean_interval(values, bootstrap_indices(50, seeded(seed))) for seed in (5, 5, 6))
    assert first == same
    assert first != other


def test_pairing_removes_what_both_share():
    shared, gain = 100 * normal(7, 64), 0.1 + 0.01 * normal(8, 64)
    indices = bootstrap_indices(64, seeded(9))
    paired = paired_difference_interval(shared + gain, shared, indices)
    assert paired.estimate == pytest.approx(gain.mean().item(), abs=1e-9)
    assert paired.excludes_zero
    assert paired.high - paired.low < 0.01
    alone = mean_interval(shared + gain, indices)
    assert alone.high - alone.low > 10


def test_intervals_do_not_depend_on_the_chunks(monkeypatch):
    values, indices = normal(10, 30), bootstrap_indices(30, seeded(11))
    features, reference = normal(12, 30, 4), normal(13, 30, 4)
    whole = mean_interval(values, indices), frechet_resamples(features, reference, indices)
    monkeypatch.setattr("training.measuring.statistics.CHUNK_ELEMENTS", 1000)
    pieces = mean_interval(values, indices), frechet_resamples(features, reference, indices)
    assert pieces[0] == whole[0]
    torch.testing.assert_close(pieces[1].replicates, whole[1].replicates, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95.0])
def test_a_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval(normal(0, 4), bootstrap_indices(4, seeded(0)), confidence)


def test_what_no_interval_can_be_made_of_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows"):
        bootstrap_indices(1, seeded(0))
    with pytest.raises(ValueError, match="at least 2000 resamples"):
        bootstrap_indices(10, seeded(0), resamples=100)
    indices = bootstrap_indices(4, seeded(0))
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        mean_interval(torch.tensor([1.0, math.nan, 2.0, 3.0]), indices)
    with pytest.raises(ValueError, match="one value a row"):
        mean_interval(normal(0, 5), indices)
    with pytest.raises(ValueError, match="equal shapes"):
        paired_difference_interval(normal(0, 4), normal(0, 1), indices)


def test_a_difference_that_can_be_told_is_told_four_times_in_five():
    assert tellable_difference(2.0, 400) == pytest.approx((1.959964 + 0.841621) * 2 / 20, rel=1e-6)
    assert pairs_needed(2.0, tellable_difference(2.0, 400) * (1 + 1e-9)) == 400
    difference = tellable_difference(1.0, 100)
    indices = bootstrap_indices(100, seeded(50))
    told = [mean_interval(difference + normal(100 + run, 100), indices).excludes_zero for run in range(200)]
    assert 0.7 <= sum(told) / len(told) <= 0.9


def test_excludes_zero():
    assert Interval(1.0, 0.5, 1.5).excludes_zero
    assert Interval(-1.0, -1.5, -0.5).excludes_zero
    assert not Interval(1.0, -0.5, 2.5).excludes_zero


@pytest.mark.parametrize(("rows", "width"), [(200, 6), (7, 6)])
def test_the_frechet_distance_agrees_with_scipy(rows, width):
    a = normal(20, rows, width) @ normal(21, width, width)
    b = normal(22, rows, width) @ normal(23, width, width) + 0.5
    assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a.numpy(), b.numpy()), rel=1e-9)


def test_the_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    rows = normal(24, 4000, 3)
    white = (rows - rows.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(rows.T.cov())
    ).T  # mean 0, covariance I, exactly
    scale, shift = (
        torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64),
    )
    expected = (shift.square() + (scale - 1).square()).sum().item()
    assert frechet_distance(white * scale + shift, white) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 10_000))
def test_the_frechet_distance_is_symmetric_zero_on_itself_and_blind_to_rotation(rows, width, seed):
    a, b = normal(seed, rows, width), 2 * normal(seed + 1, rows, width) + 1
    rotation, _ = torch.linalg.qr(normal(seed + 2, width, width))
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-6)
    assert distance == pytest.approx(frechet_distance(a @ rotation, b @ rotation), rel=1e-6, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_fewer_rows_than_features_is_no_special_case():
    a, b = normal(25, 10, 64), normal(26, 10, 64) + 0.3
    wide = frechet_distance(torch.cat([a, torch.zeros(10, 200)], dim=1), torch.cat([b, torch.zeros(10, 200)], dim=1))
    assert wide == pytest.approx(frechet_distance(a, b), rel=1e-6)


@pytest.mark.parametrize("width", [5, 60])  # more distinct rows than features, and fewer
def test_replicates_are_the_distances_of_the_resampled_rows(width):
    a, b = normal(27, 25, width), 1.5 * normal(28, 25, width) + 0.4
    indices = bootstrap_indices(25, seeded(29))
    resamples = frechet_resamples(a, b, indices)
    for row in (0, 1, 1999):
        drawn_a, drawn_b = a[indices[row]].numpy(), b[indices[row]].numpy()
        # tr (C1 C2)^{1/2} by the eigenvalues of the product: other than sqrtm, it bears covariances without an inverse
        roots = np.sqrt(scipy.linalg.eigvals(np.cov(drawn_a.T) @ np.cov(drawn_b.T)).real.clip(min=0))
        traces = np.trace(np.cov(drawn_a.T) + np.cov(drawn_b.T))
        expected = np.sum((drawn_a.mean(0) - drawn_b.mean(0)) ** 2) + traces - 2 * roots.sum()
        assert resamples.replicates[row].item() == pytest.approx(expected, rel=1e-6 if width == 60 else 1e-9)


def test_the_frechet_interval_covers_the_expected_distance_at_its_number_of_rows():
    rows, width, runs = 50, 4, 120
    pairs = [(1.2 * normal(1000 + i, rows, width) + 0.3, normal(5000 + i, rows, width)) for i in range(runs)]
    expected = sum(frechet_distance(a, b) for a, b in pairs) / runs
    indices = bootstrap_indices(rows, seeded(30))
    intervals = [frechet_interval(frechet_resamples(a, b, indices)) for a, b in pairs]
    covered = sum(interval.low <= expected <= interval.high for interval in intervals)
    assert covered / runs >= 0.85
    assert all(0 <= interval.low <= interval.estimate <= interval.high for interval in intervals)


def test_the_frechet_interval_of_a_set_to_itself_is_nothing():
    features = normal(34, 20, 3)
    interval = frechet_interval(frechet_resamples(features, features, bootstrap_indices(20, seeded(35))))
    assert 0 <= interval.low < 1e-12  # rounding, which differs from machine to machine
    assert interval.low <= interval.estimate <= interval.high < 1e-6


def test_the_difference_of_frechet_distances_is_paired():
    reference, good = normal(31, 60, 4), normal(32, 60, 4)
    bad = good + 0.5
    indices = bootstrap_indices(60, seeded(33))
    first, second = frechet_resamples(bad, reference, indices), frechet_resamples(good, reference, indices)
    difference = frechet_difference_interval(first, second)
    assert difference.estimate == pytest.approx(frechet_distance(bad, reference) - frechet_distance(good, reference))
    assert difference.excludes_zero
    same = frechet_difference_interval(first, first)
    assert same == Interval(0.0, 0.0, 0.0)


def test_sets_that_do_not_fit_are_refused():
    indices = bootstrap_indices(5, seeded(0))
    with pytest.raises(ValueError, match="two sets"):
        frechet_distance(normal(0, 5, 3), normal(0, 5, 4))
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(normal(0, 1, 3), normal(0, 5, 3))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(normal(0, 5, 3) / 0, normal(0, 5, 3))
    with pytest.raises(ValueError, match="equal shapes"):
        frechet_resamples(normal(0, 4, 3), normal(0, 5, 3), indices)
    with pytest.raises(ValueError, match="indices are for 5 rows"):
        frechet_resamples(normal(0, 4, 3), normal(0, 4, 3), indices)
