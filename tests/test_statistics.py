"""Bootstrap intervals against closed forms and simulation."""

from __future__ import annotations

import math

import pytest
import torch

from training.measuring.statistics import (
    Interval,
    bootstrap_indices,
    mean_interval,
    paired_difference_interval,
    pairs_needed,
    tellable_difference,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_an_interval_is_three_metrics_and_back():
    interval = Interval(0.5, 0.25, 0.75)
    metrics = interval.as_metrics("gain")
    assert metrics == {"gain": 0.5, "gain_low": 0.25, "gain_high": 0.75}
    assert Interval.from_metrics(metrics, "gain") == interval


def test_the_interval_of_a_mean_is_the_normal_one_for_many_rows():
    values = normal(0, 2000)
    interval = mean_interval(values, bootstrap_indices(2000, seeded(1)))
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
    whole = mean_interval(values, indices)
    monkeypatch.setattr("training.measuring.statistics.CHUNK_ELEMENTS", 1000)
    assert mean_interval(values, indices) == whole


def test_what_no_interval_can_be_made_of_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows"):
        bootstrap_indices(1, seeded(0))
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
