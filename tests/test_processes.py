"""How noise was added: flow matching against the reference's grids, and against what it is for."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models.processes import FlowMatching
from schedules import get_schedule
from tests import golden

TOKENS = 4096  # of an image of 1024 x 1024 pixels
SD3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
FLUX = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
SCHEDULERS = {"sd3_512": SD3, "sd3_1024": SD3, "flux_1024": FLUX, "flux_1024_mu1p15": FLUX}


def process_of(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int = TOKENS) -> FlowMatching:
    return FlowMatching.from_scheduler_config(json.loads(scheduler.to_json_string()), "scheduler_config.json", tokens)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_grids_are_those_of_the_reference(name):
    process, prefix = process_of(SCHEDULERS[name]), f"f32__flowmatch_{name}_n"
    _, _, shift, mu, *_ = golden.arrays("schedules")[f"flowmatch_{name}_params"]
    assert process.shift == pytest.approx(shift if math.isnan(mu) else math.exp(mu), rel=1e-12)
    lengths = [int(key.removeprefix(prefix)) for key in golden.arrays("schedules") if key.startswith(prefix)]
    assert lengths
    for length in lengths:
        sigmas = get_schedule("flowmatch", length, process.sigma_min, process.sigma_max, denoiser=process)
        expected = golden.tensor("schedules", f"{prefix}{length}").double()
        torch.testing.assert_close(sigmas, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("tokens", [256, 1024, TOKENS])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_that_of_the_scheduler(tokens, kind):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    process = process_of(scheduler, tokens)
    mu = 0.5 + 0.65 * (tokens - 256) / (4096 - 256)
    times = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    scheduler.set_timesteps(sigmas=times.tolist(), mu=mu)
    torch.testing.assert_close(process.sigma_of_time(times), scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)


def test_the_first_level_is_1_to_the_last_bit():
    for shift in (1.0, 3.0, math.exp(1.15), 0.1, 1e6):
        process = FlowMatching(shift, 1000, 0.001)
        assert float(process.sigma_of_time(torch.ones(1, dtype=torch.float64))) == 1.0 == process.sigma_max


def test_an_exact_velocity_gives_back_the_clean_image_at_every_level():
    """At level 1 too, where x holds nothing of it."""
    process = process_of(SD3)
    clean, noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.7, 0.1, 1e-6], dtype=torch.float64)
    level = sigma[:, None, None, None]
    x = (1 - level) * clean + level * noise
    assert process.network_input(x, sigma) is x
    assert torch.equal(process.network_time(sigma), 1000 * sigma)
    torch.testing.assert_close(process.estimate(x, sigma, noise - clean), clean, rtol=0, atol=1e-12)
