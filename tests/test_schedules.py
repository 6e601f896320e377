"""The grids against reference numbers, their end points, and the models whose time they follow."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from schedules import SCHEDULES, from_log_gaps, get_schedule, log_gaps
from tests import golden


class DiscreteModel:
    """Stable Diffusion's time: log α is piecewise linear through 1000 training steps, step i at t = (i + 1)/1000."""

    time_min = 0.001

    def __init__(self) -> None:
        betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
        self.log_alpha = np.log(np.cumprod(1 - betas)) / 2

    def sigma_of_time(self, time: Tensor) -> Tensor:
        log_alpha = np.interp(time.numpy(), np.arange(1, 1001) / 1000, self.log_alpha)
        return torch.from_numpy(np.sqrt(np.expm1(-2 * log_alpha)))


@dataclass(frozen=True)
class FlowModel:
    """Flow matching with a shifted time: σ = shift · t / (1 + (shift - 1) t)."""

    shift: float
    time_min: float

    def sigma_of_time(self, time: Tensor) -> Tensor:
        return self.shift * time / (1 + (self.shift - 1) * time)


DISCRETE_RANGE = (0.029167158151720367, 14.614641229333643)
SD3 = FlowModel(3.0, 0.003 / 1.002)


def schedule_of(schedule_type: str, num_steps: int, **options: Any) -> Tensor:
    """Any schedule, over a range that suits it."""
    if schedule_type == "discrete":
        return get_schedule(schedule_type, num_steps, *DISCRETE_RANGE, denoiser=DiscreteModel(), **options)
    if schedule_type == "flowmatch":
        low = SD3.sigma_of_time(torch.tensor(SD3.time_min)).item()
        return get_schedule(schedule_type, num_steps, low, 1.0, denoiser=SD3, **options)
    return get_schedule(schedule_type, num_steps, 0.002, 80.0, **options)


# --- Reference numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [4, 6, 10, 11])
def test_golden_formula_schedules(num_steps: int) -> None:
    for rho in (1, 3, 7):
        # The peer reaches sigma_min through sigma_max + (sigma_min - sigma_max), which leaves it 11 digits.
        expected = golden.tensor("schedules", f"f64__polynomial_rho{rho}_n{num_steps}")
        torch.testing.assert_close(schedule_of("polynomial", num_steps, rho=rho), expected, rtol=1e-11, atol=0)
    expected = golden.tensor("schedules", f"f64__logsnr_n{num_steps}")
    torch.testing.assert_close(schedule_of("logsnr", num_steps), expected, rtol=1e-12, atol=0)
    for rho in (1, 2, 7):
        # The peer takes exp(z) - 1 at z = 4e-6, which leaves it 10 digits.
        expected = golden.tensor("schedules", f"f64__time_uniform_rho{rho}_n{num_steps}")
        torch.testing.assert_close(schedule_of("time_uniform", num_steps, rho=rho), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_steps", [4, 6, 10, 11, 21])
def test_golden_discrete_schedule(num_steps: int) -> None:
    expected = golden.tensor("schedules", f"f64__sd15_discrete_rho1_n{num_steps}")
    torch.testing.assert_close(schedule_of("discrete", num_steps, rho=1), expected, rtol=1e-12, atol=0)


def test_golden_bent_discrete_schedule() -> None:
    """The peer forgets the root of the largest time, which is 1 here."""
    expected = golden.tensor("schedules", "f64__sd15_discrete_rho2_n6_PEERQUIRK")
    torch.testing.assert_close(schedule_of("discrete", 6, rho=2), expected, rtol=1e-12, atol=0)


def test_golden_grid_of_a_published_run() -> None:
    expected = golden.tensor("schedules", "stored_rlepd00036_t_steps_n10").double()
    low, high = (golden.tensor("schedules", f"stored_rlepd00036_sigma_{end}").item() for end in ("min", "max"))
    sigmas = get_schedule("discrete", 10, low, high, rho=1, denoiser=DiscreteModel())
    torch.testing.assert_close(sigmas, expected, rtol=2e-5, atol=0)


# --- What must hold for every grid -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    schedule_type=st.sampled_from(SCHEDULES),
    num_steps=st.integers(2, 60),
    rho=st.floats(0.5, 12, allow_subnormal=False),
)
def test_grids_descend_in_float64_from_end_to_end(schedule_type: str, num_steps: int, rho: float) -> None:
    sigmas = schedule_of(schedule_type, num_steps, rho=rho)
    low, high = {"discrete": DISCRETE_RANGE, "flowmatch": (0.00892857142857, 1.0)}.get(schedule_type, (0.002, 80.0))
    assert (sigmas.dtype, sigmas.shape) == (torch.float64, (num_steps,))
    assert (sigmas.diff() < 0).all()
    assert sigmas[0].item() == pytest.approx(high, rel=1e-10)
    assert sigmas[-1].item() == pytest.approx(low, rel=1e-9)


def test_grids_by_hand() -> None:
    """Three points: the middle one by each formula, for a range of 1 to 16."""
    assert get_schedule("polynomial", 3, 1.0, 16.0, rho=1)[1].item() == pytest.approx(8.5)
    assert get_schedule("polynomial", 3, 1.0, 16.0, rho=2)[1].item() == pytest.approx(2.5**2)
    assert get_schedule("logsnr", 3, 1.0, 16.0)[1].item() == pytest.approx(4.0)
    discrete = schedule_of("discrete", 1000, rho=1)  # every training step once
    torch.testing.assert_close(discrete.flip(0), DiscreteModel().sigma_of_time(torch.arange(1, 1001).double() / 1000))


def test_time_uniform_is_a_variance_preserving_process() -> None:
    """log(σ² + 1) is a quadratic in t without constant term, for which three points on it decide the fourth."""
    sigmas = get_schedule("time_uniform", 5, 0.01, 50.0, rho=1)
    time = torch.linspace(1, 1e-3, 5, dtype=torch.float64)
    quotient = torch.log1p(sigmas**2) / time  # linear in t
    torch.testing.assert_close(quotient.diff(), quotient.diff()[0].expand(4), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule_type", ["polynomial", "time_uniform", "discrete"])
@pytest.mark.parametrize("rho", [5e-324, 1e-20, 1e-3, 1e14, 1e20, 1e300])
def test_an_exponent_beyond_float64_is_refused(schedule_type: str, rho: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"rho is {rho:g}: float64 cannot hold its powers")):
        schedule_of(schedule_type, 5, rho=rho)


@pytest.mark.parametrize("schedule_type", ["polynomial", "time_uniform", "discrete"])
@pytest.mark.parametrize("rho", [0.1, 100.0])
def test_the_exponents_that_the_message_proposes_have_grids(schedule_type: str, rho: float) -> None:
    assert (schedule_of(schedule_type, 1000, rho=rho).diff() < 0).all()


def test_rho_bends_discrete_time_towards_its_small_end() -> None:
    even, bent = schedule_of("discrete", 6, rho=1), schedule_of("discrete", 6, rho=3)
    assert (bent[1:-1] < even[1:-1]).all()
    torch.testing.assert_close(bent[[0, -1]], even[[0, -1]])


@pytest.mark.parametrize(("rho", "first"), [(1.0, 5.0), (2.0, 1.0), (1.0, 14.61)])
def test_a_schedule_of_the_model_s_time_begins_below_its_largest_level_where_told(rho: float, first: float) -> None:
    """Its times are still even in the rho-th root, from that of the first level on."""
    model = DiscreteModel()
    levels = get_schedule("discrete", 6, DISCRETE_RANGE[0], first, rho=rho, denoiser=model)
    assert levels[0].item() == pytest.approx(first, rel=1e-9)
    assert levels[-1].item() == pytest.approx(DISCRETE_RANGE[0], rel=1e-6)
    times = torch.linspace(model.time_min, 1, 100_001, dtype=torch.float64)
    found = times[torch.searchsorted(model.sigma_of_time(times), levels).clamp_max(100_000)]
    gaps = (found ** (1 / rho)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(5), rtol=1e-3, atol=0)


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_schedule("karras", 5, 0.1, 1.0), r"unknown schedule_type 'karras'; known: polynomial, logsnr"),
        (lambda: get_schedule("logsnr", 1, 0.1, 1.0), r"num_steps counts grid points, at least 2; got 1"),
        (lambda: get_schedule("logsnr", 5, 1.0, 0.1), r"0 < sigma_min < sigma_max; got 1.0 and 0.1"),
        (lambda: get_schedule("logsnr", 5, 0.0, 1.0), r"0 < sigma_min < sigma_max; got 0.0 and 1.0"),
        (lambda: get_schedule("logsnr", 5, 0.1, math.nan), r"0 < sigma_min < sigma_max; got 0.1 and nan"),
        (lambda: get_schedule("logsnr", 5, 0.1, math.inf), r"0 < sigma_min < sigma_max; got 0.1 and inf"),
        (lambda: get_schedule("polynomial", 5, 0.1, 1.0, rho=0.0), r"rho must be positive; got 0.0"),
        (lambda: get_schedule("discrete", 5, *DISCRETE_RANGE), r"the discrete schedule .* needs a denoiser"),
        (lambda: get_schedule("flowmatch", 5, 0.1, 1.0), r"the flowmatch schedule .* needs a denoiser"),
        (
            lambda: get_schedule("discrete", 5, 0.002, 80.0, denoiser=DiscreteModel()),
            r"discrete schedule has the model's own sigma_max = 14.6146; got 80",
        ),
        (
            lambda: get_schedule("discrete", 5, 0.002, DISCRETE_RANGE[1], denoiser=DiscreteModel()),
            r"discrete schedule has the model's own sigma_min = 0.0291672; got 0.002",
        ),
        (
            lambda: get_schedule("discrete", 5, DISCRETE_RANGE[0], 14.62, denoiser=DiscreteModel()),
            r"discrete schedule has the model's own sigma_max = 14.6146; got 14.62",
        ),
    ],
)
def test_refuses(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_log_gaps_by_hand() -> None:
    """8, 4, 1: a halving, and two of them."""
    gaps = log_gaps(torch.tensor([8.0, 4.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(gaps, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64), rtol=1e-15, atol=0)


@given(shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=20), low=st.floats(1e-3, 0.5))
def test_a_grid_and_its_log_gaps_say_the_same(shares: list[float], low: float) -> None:
    gaps = torch.tensor([shares, shares[::-1]], dtype=torch.float64)
    gaps = gaps / gaps.sum(-1, keepdim=True)
    grids = from_log_gaps(gaps, low, 80.0)
    assert (grids[:, 0] == 80.0).all()
    assert (grids[:, -1] == low).all()
    assert (grids.diff(dim=-1) < 0).all()
    torch.testing.assert_close(log_gaps(grids), gaps, rtol=1e-9, atol=1e-12)
    assert torch.equal(from_log_gaps(gaps[0], low, 80.0), grids[0])
