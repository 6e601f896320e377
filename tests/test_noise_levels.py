"""The continuous noise levels against the reference numbers, their closed forms, and each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errors import InputError
from models.noise_levels import NoiseLevels
from tests import golden

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
LEVELS = NoiseLevels.from_scheduler_config(SD15, "test")


def reference(name: str) -> torch.Tensor:
    return golden.tensor("schedules", f"f64__sd15_{name}")


def close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=relative, atol=1e-12)


@pytest.mark.parametrize(("time", "sigma"), [("grid_t", "sigma_of_t"), ("extrap_t", "extrap_sigma_of_t")])
def test_sigma_of_time_agrees_with_the_reference(time, sigma):
    close(LEVELS.sigma_of_time(reference(time)), reference(sigma))


@pytest.mark.parametrize(("sigma", "time"), [("grid_sigma", "sigma_inv"), ("extrap_sigma", "extrap_sigma_inv")])
def test_time_of_sigma_agrees_with_the_reference(sigma, time):
    close(LEVELS.time_of_sigma(reference(sigma)), reference(time))


def test_the_ends_and_the_network_steps_agree_with_the_reference():
    assert LEVELS.sigma_min == pytest.approx(float(reference("sigma_min")), rel=1e-12)
    assert LEVELS.sigma_max == pytest.approx(float(reference("sigma_max")), rel=1e-12)
    close(1000 * LEVELS.time_of_sigma(reference("grid_sigma")) - 1, reference("c_noise"))
    sigmas = reference("discrete_rho1_n10")
    close(1000 * LEVELS.time_of_sigma(sigmas) - 1, reference("discrete_rho1_n10_c_noise"))


def test_at_the_training_steps_the_levels_are_those_of_the_betas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_squared = (1 - betas).cumprod(0)
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    close(LEVELS.sigma_of_time(times), ((1 - alpha_squared) / alpha_squared).sqrt())
    assert LEVELS.time_min == 0.001


def test_a_linear_schedule_and_stored_betas_are_read_too():
    linear = NoiseLevels.from_scheduler_config({**SD15, "beta_schedule": "linear", "num_train_timesteps": 3}, "test")
    betas = [0.00085, 0.006425, 0.012]
    stored = NoiseLevels.from_scheduler_config({**SD15, "trained_betas": betas}, "test")
    alpha_squared = math.prod(1 - beta for beta in betas)
    assert linear.sigma_max == pytest.approx(math.sqrt((1 - alpha_squared) / alpha_squared), rel=1e-12)
    assert stored.sigma_max == pytest.approx(linear.sigma_max, rel=1e-12)


@given(st.floats(1e-3, 100.0))
def test_the_two_maps_are_inverse_also_outside_the_table(sigma):
    level = torch.tensor(sigma, dtype=torch.float64)
    close(LEVELS.sigma_of_time(LEVELS.time_of_sigma(level)), level, relative=1e-8)


@given(st.lists(st.floats(0.0, 2.0), min_size=2, max_size=5, unique=True))
def test_sigma_never_falls_with_time_and_is_never_nan(times):
    sigmas = LEVELS.sigma_of_time(torch.tensor(sorted(times), dtype=torch.float64))
    assert bool((sigmas.diff() >= 0).all())


def test_both_maps_can_be_differentiated():
    times = torch.tensor([0.0321, 0.5004, 0.9876, 1.01], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LEVELS.sigma_of_time, times)
    sigmas = torch.tensor([0.01, 0.3, 2.0, 15.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LEVELS.time_of_sigma, sigmas)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rescale_betas_zero_snr": True}, "infinite"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"beta_end": 1.5}, "below 1"),
        ({"beta_start": "low"}, "no usable beta schedule"),
        ({"num_train_timesteps": 1}, "at least two"),
        ({"trained_betas": [0.1, float("nan")]}, "above 0"),
    ],
)
def test_schedules_that_cannot_be_used_are_explained(change, says):
    with pytest.raises(InputError, match=says) as error:
        NoiseLevels.from_scheduler_config({**SD15, **change}, "model/scheduler_config.json")
    assert "model/scheduler_config.json" in str(error.value)


def test_a_missing_key_is_named():
    with pytest.raises(InputError, match="beta_end"):
        NoiseLevels.from_scheduler_config({key: SD15[key] for key in SD15 if key != "beta_end"}, "here")
