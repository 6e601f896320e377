"""The closed-form world: exact, quick, and with Stable Diffusion's order of solvers."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import distilled_multistep
from models.mixture import MixtureWorld
from schedules import get_schedule
from solvers import SAMPLERS, num_steps_for
from tests.analytic import GaussianMixture, Level, mixture_solution_1d
from training.solver import Schedule

WORLD = MixtureWorld()
GRIDS = {"polynomial": 7.0, "logsnr": 1.0, "time_uniform": 1.0}


def oracle(coordinate: int) -> GaussianMixture:
    """One coordinate of the world as a mixture on latents [1, 1, 1]."""
    means = WORLD.means[coordinate]
    count = len(means)
    std = WORLD.stds[coordinate]
    return GaussianMixture(means.reshape(count, 1, 1, 1), std.expand(count), torch.full((count,), 1 / count).double())


def start(count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return WORLD.sigma_max * torch.randn(count, *WORLD.latent_shape, generator=generator, dtype=torch.float64)


def grid(schedule: str, num_steps: int) -> Tensor:
    return get_schedule(schedule, num_steps, WORLD.sigma_min, WORLD.sigma_max, rho=GRIDS[schedule])


def solution(x: Tensor) -> Tensor:
    return WORLD.solution(x, WORLD.sigma_max, WORLD.sigma_min)


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean over images of their distance relative to the image's length."""
    return ((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).mean()


# --- Exactness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinate", [0, 20, 63])
@pytest.mark.parametrize("sigma", [0.002, 0.3, torch.linspace(0.01, 5, 8, dtype=torch.float64)])
def test_every_coordinate_is_a_mixture_of_its_own(coordinate: int, sigma: float | Tensor) -> None:
    x, sigma = start(8) / 40, torch.as_tensor(sigma, dtype=torch.float64)
    found = WORLD.denoise(x, sigma)[:, coordinate : coordinate + 1]
    expected = oracle(coordinate).denoise(x[:, coordinate : coordinate + 1], sigma)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert WORLD.denoise(x.float(), sigma).dtype == torch.float32


def test_data_have_the_moments_of_the_mixtures() -> None:
    data = WORLD.sample(40_000, torch.Generator().manual_seed(0)).flatten(1)
    assert data.shape == (40_000, 64)
    variance = WORLD.means.var(-1, correction=0) + WORLD.stds.squeeze(-1) ** 2
    assert ((data.mean(0) - WORLD.means.mean(-1)).abs() < 5 * (variance / len(data)).sqrt()).all()
    assert ((data.var(0) / variance - 1).abs() < 0.1).all()
    correlations = torch.corrcoef(data.T) - torch.eye(64)
    assert correlations.abs().max() < 5 / len(data) ** 0.5


def test_no_other_estimate_of_the_data_is_nearer() -> None:
    """The error of a posterior mean has no correlation with what it was made from."""
    generator = torch.Generator().manual_seed(0)
    data = WORLD.sample(10_000, generator)
    for sigma in (0.1, 1.0):
        x = data + sigma * torch.randn(data.shape, generator=generator, dtype=torch.float64)
        error = data - WORLD.denoise(x, torch.tensor(sigma))
        products = error * x.tanh()
        assert (products.mean(0).abs() < 5 * products.std(0) / len(x) ** 0.5).all()


def test_the_solution_is_that_of_every_coordinate_alone() -> None:
    x = start(16)
    found = solution(x)
    for coordinate in (0, 30, 63):
        part = slice(coordinate, coordinate + 1)
        alone = mixture_solution_1d(oracle(coordinate), x[:, part], Level(WORLD.sigma_max), Level(WORLD.sigma_min))
        torch.testing.assert_close(found[:, part], alone, rtol=1e-9, atol=1e-9)
    assert solution(x.float()).dtype == torch.float32


def test_a_thousand_steps_arrive_at_the_solution() -> None:
    x = start(16)
    found = SAMPLERS["dpmpp"](WORLD.denoise, x, grid("logsnr", 1001), max_order=2)
    assert distance(found, solution(x)) < 1e-4
    back = WORLD.solution(solution(x), WORLD.sigma_min, WORLD.sigma_max)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=0)


def test_a_world_of_other_sizes() -> None:
    small = MixtureWorld(3, 2, scales=(1.0, 1.0), spread=0.1, seed=5)
    assert small.sample(4, torch.Generator()).shape == (4, 3, 1, 1)
    torch.testing.assert_close(small.stds, torch.full((3, 1), 0.1).double())
    assert torch.equal(small.means, MixtureWorld(3, 2, scales=(1.0, 1.0), seed=5).means)
    assert not torch.equal(small.means, MixtureWorld(3, 2, scales=(1.0, 1.0), seed=6).means)


# --- Solvers on it -------------------------------------------------------------------------------------------


@cache
def judged(count: int = 512) -> tuple[Tensor, Tensor]:
    x = start(count, seed=1).float()
    return x, solution(x)


@cache
def best(sampler: str, evaluations: int, **options: int) -> float:
    """The distance to the solution on the best of the three grids."""
    x, wanted = judged()
    num_steps = num_steps_for(sampler, evaluations)
    return min(
        float(distance(SAMPLERS[sampler](WORLD.denoise, x, grid(schedule, num_steps), **options), wanted))
        for schedule in GRIDS
    )


def test_the_order_of_solvers_is_that_of_stable_diffusion() -> None:
    twenty = [best("ipndm", 20), best("dpmpp", 20, max_order=2), *(best(name, 20) for name in ("dpm2", "heun", "ddim"))]
    assert all(worse > 1.15 * better for better, worse in pairwise(twenty))
    assert max(best("ipndm", 5), best("dpmpp", 5, max_order=2)) < 0.8 * best("ddim", 5)
    assert best("ipndm", 8) < best("ddim", 20)


# --- What is distilled there ---------------------------------------------------------------------------------


@cache
def best_classical(evaluations: int) -> float:
    return min(distilled_multistep.distance(solver) for solver in distilled_multistep.classical(evaluations))


def distilled(evaluations: int, train: str, updates: int) -> float:
    schedule = Schedule("time_uniform", 1.0)
    return distilled_multistep.distance(distilled_multistep.distilled(evaluations, train, schedule, updates=updates))


@pytest.mark.parametrize(("evaluations", "ratio"), [(4, 0.8), (8, 0.65)])
def test_a_distilled_grid_and_history_beat_every_classical_solver(evaluations: int, ratio: float) -> None:
    """On noise that was not learned from, by a fifth to a third at least."""
    assert distilled(evaluations, "grid,history", 200) < ratio * best_classical(evaluations)


def test_a_distilled_history_alone_beats_every_classical_solver_and_a_grid_alone_ddim() -> None:
    assert distilled(4, "history", 20) < 0.85 * best_classical(4)
    assert best_classical(4) < distilled(4, "grid", 100) < 0.97 * best("ddim", 4)


def test_the_benchmark_prints_its_table() -> None:
    result = CliRunner().invoke(distilled_multistep.main, ["--evaluations", "2", "--updates", "1"])
    assert result.exit_code == 0, result.output
    header, _, row = result.stdout.splitlines()
    assert header.strip("| ").split(" | ") == [
        *("evaluations", "best classical solver", "learned grid", "learned history", "learned grid,history")
    ]
    count, *cells = (cell.split()[0] for cell in row.strip("| ").split(" | "))
    assert count == "2"
    assert all(0.1 < float(cell) < 1 for cell in cells)
