"""The samplers against reference numbers, closed-form solutions, orders of convergence and their symmetries."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from schedules import get_schedule
from solvers import SAMPLERS, EPDTable, epd_sampler, network_evaluations, num_steps_for, with_ipndm_history
from tests import golden
from tests.analytic import GaussianMixture, Level, Recorder, gaussian, gaussian_solution, mixture_solution_1d

CLASSICAL = [name for name in SAMPLERS if name != "epd"]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_table(
    intervals: int, points: int, *, batch: int | None = None, seed: int = 0, scales: bool = True
) -> EPDTable:
    generator = torch.Generator().manual_seed(seed)
    shape = (intervals, points) if batch is None else (batch, intervals, points)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    positions, weights = uniform(0.05, 0.95), uniform(-1, 1).softmax(-1)
    return EPDTable(positions, weights, *((uniform(0.9, 1.1), uniform(0.9, 1.1)) if scales else ()))


def midpoint_table(intervals: int) -> EPDTable:
    return EPDTable(torch.full((intervals, 1), 0.5).double(), torch.ones(intervals, 1).double())


def mixture(shape: tuple[int, ...] = (2, 3, 3)) -> GaussianMixture:
    means = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return GaussianMixture(means, tensor([0.3, 0.6, 0.9]), tensor([0.2, 0.3, 0.5]))


def noise(batch: int = 3, shape: tuple[int, ...] = (2, 3, 3), *, seed: int = 2) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(num_steps: int, *, high: float = 20.0, low: float = 0.02) -> Tensor:
    return get_schedule("polynomial", num_steps, low, high, rho=7)


# --- Reference numbers -----------------------------------------------------------------------------------

GOLDEN_SAMPLERS = {
    "epd_sampler": "epd",
    "epd_parallel_sampler": "epd",
    "ddim_sampler": "ddim",
    "heun_sampler": "heun",
    "dpm_sampler": "dpm2",  # with its default of one DPM-2 step per interval
    "dpm_sampler_2": "dpm2",
    "ipndm_sampler": "ipndm",
    "dpm_pp_sampler": "dpmpp",
}
OPTIONS = ("afs", "denoise_to_zero", "max_order", "predict_x0", "lower_order_final", "r")


def is_ours(case: dict[str, Any]) -> bool:
    """Left out: Heun down to zero, several DPM-2 steps in an interval, dynamic thresholding, and the case where the
    peer applies the analytical first step in every interval."""
    name, function = case["case"], case["function"]
    return function in GOLDEN_SAMPLERS and not (
        "inner_steps" in case["kwargs"] or "dynthr" in name or name == "dpm_afs_n11"
    )


CASES = [case for case in golden.solver_cases() if is_ours(case)]


def golden_table(name: str) -> EPDTable:
    fields = ("r", "w", "scale_dir", "scale_time")
    positions, weights, scale_dir, scale_time = (golden.tensor("solvers", f"table_{name}__{f}") for f in fields)
    if name.endswith("fcn"):
        scale_dir[-1] = 1  # the peer forces this; the stored table does not show it
    return EPDTable(positions, weights, scale_dir, scale_time)


def golden_problem(case: dict[str, Any]) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """The denoiser, the start and the grid of a run."""
    reference, flow = golden_mixture(), case["net"] == "gm_flow"
    sigmas = golden.tensor("solvers", f"{case['case']}__sigmas")
    start = golden.tensor("solvers", "latents") * (1 if flow else sigmas[0])
    return reference.denoise_flow if flow else reference.denoise, start, sigmas


def golden_mixture() -> GaussianMixture:
    return GaussianMixture(*(golden.tensor("solvers", f"gm_{field}") for field in ("means", "stds", "weights")))


@golden.needs_golden
def test_golden_cases_cover_every_sampler() -> None:
    assert len(CASES) == 171
    assert {GOLDEN_SAMPLERS[case["function"]] for case in CASES} == set(SAMPLERS)


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_golden_trajectory(case: dict[str, Any]) -> None:
    """Every state of every run to 1e-11 of the largest entry; the same number of calls and rows."""
    name = case["case"]
    denoise, start, sigmas = golden_problem(case)
    recorder = Recorder(denoise)
    options = {option: case["kwargs"][option] for option in OPTIONS if option in case["kwargs"]}
    sampler, arguments = GOLDEN_SAMPLERS[case["function"]], []
    if case["table"]:
        table, options["parallel"] = golden_table(case["table"]), case["function"] == "epd_parallel_sampler"
        if sampler == "ipndm":  # EPD's plug-in for it
            table = with_ipndm_history(table.to(dtype=torch.float64), options.pop("max_order"))
        sampler, arguments = "epd", [table]
    states: list[Tensor] = []

    result = SAMPLERS[sampler](recorder, start, sigmas, *arguments, callback=lambda _, x: states.append(x), **options)

    expected = golden.tensor("solvers", f"{name}__traj")
    assert len(states) == len(expected)
    # The peer keeps these tables in float32 and computes 1 - r in float32 too.
    tolerance = 3e-7 if name.endswith("adapter32") else 1e-11
    for state, reference_state in zip(states, expected, strict=True):
        assert (state - reference_state).abs().max() <= tolerance * reference_state.abs().max()
    assert torch.equal(result, states[-1])
    assert len(recorder.rows) == case["net_calls"]
    assert sum(recorder.rows) == case["evals_per_sample"] * len(start)


# The reference recorded noise levels for serial EPD with one table for all.
RECORDED = [case for case in CASES if case["function"] == "epd_sampler" and not case["table"].startswith("ps_")]


@pytest.mark.parametrize("case", RECORDED, ids=[case["case"] for case in RECORDED])
def test_golden_noise_levels_told_to_the_network(case: dict[str, Any]) -> None:
    name = case["case"]
    expected = golden.tensor("solvers", f"{name}__eval_sigma")[: case["net_calls"]]
    start = golden.tensor("solvers", "latents")
    recorder = Recorder(lambda x, sigma: x)
    options = {option: case["kwargs"][option] for option in OPTIONS if option in case["kwargs"]}
    table, sigmas = golden_table(case["table"]), golden.tensor("solvers", f"{name}__sigmas")
    epd_sampler(recorder, start, sigmas, table, parallel=False, **options)
    told = torch.stack([sigma.expand(len(start)) for sigma in recorder.sigmas])
    torch.testing.assert_close(told, expected, rtol=1e-12, atol=0)


@golden.needs_golden
def test_golden_denoisers() -> None:
    reference = golden_mixture()
    x, sigma, expected = (golden.tensor("solvers", f"probe_{field}") for field in ("x", "sigma", "D"))
    torch.testing.assert_close(reference.denoise(x, sigma), expected, rtol=1e-12, atol=1e-13)
    x, sigma, expected = (golden.tensor("solvers", f"probe_flow_{field}") for field in ("x", "t", "D"))
    torch.testing.assert_close(reference.denoise_flow(x, sigma), expected, rtol=1e-12, atol=1e-13)


# --- Closed-form solutions and orders of convergence -----------------------------------------------------

Solve = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]


def epd_of(make_table: Callable[[int], EPDTable]) -> Solve:
    return lambda denoise, x, sigmas: epd_sampler(denoise, x, sigmas, make_table(len(sigmas) - 1))


def classical(name: str, **options: Any) -> Solve:
    return lambda denoise, x, sigmas: SAMPLERS[name](denoise, x, sigmas, **options)


def thirds(intervals: int) -> EPDTable:
    return EPDTable(tensor([[1 / 3, 2 / 3]] * intervals), tensor([[0.5, 0.5]] * intervals))


# Multistep samplers start with an interval of order 1, whose error O(h²) stays: order 2 is the limit of all of them.
# What the higher ones are worth is shown below, by the functions that they integrate exactly.
ORDERS = {
    "ddim": (classical("ddim"), 1.0),
    "heun": (classical("heun"), 2.0),
    "dpm2": (classical("dpm2"), 2.0),
    "dpm2 r=0.3": (classical("dpm2", r=0.3), 2.0),
    "dpmpp 1M": (classical("dpmpp", max_order=1), 1.0),
    "dpmpp 2M": (classical("dpmpp", max_order=2, lower_order_final=False), 2.0),
    "dpmpp 2M final": (classical("dpmpp", max_order=2), 2.0),
    "dpmpp 2M noise": (classical("dpmpp", max_order=2, predict_x0=False, lower_order_final=False), 2.0),
    "dpmpp 3M": (classical("dpmpp", max_order=3, lower_order_final=False), 2.0),
    "ipndm 1": (classical("ipndm", max_order=1), 1.0),
    "ipndm 2": (classical("ipndm", max_order=2), 2.0),
    "ipndm 3": (classical("ipndm", max_order=3), 2.0),
    "ipndm 4": (classical("ipndm", max_order=4), 2.0),
    "epd midpoint": (epd_of(midpoint_table), 2.0),
    "epd thirds": (epd_of(thirds), 2.0),
    "epd off the middle": (epd_of(lambda s: EPDTable(tensor([[0.8]] * s), tensor([[1.0]] * s))), 1.0),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence_on_a_mixture(name: str) -> None:
    solve, order = ORDERS[name]
    data = GaussianMixture(tensor([-1.0, 0.5]).reshape(2, 1, 1, 1), tensor([0.5, 0.7]), tensor([0.4, 0.6]))
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).reshape(-1, 1, 1, 1)
    exact = mixture_solution_1d(data, x, Level(2.0), Level(0.2))
    coarse, fine = (
        (solve(data.denoise, x, get_schedule("logsnr", n + 1, 0.2, 2.0)) - exact).abs().max().item() for n in (64, 128)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm2", "epd thirds"])
def test_order_of_convergence_on_a_flow_matching_mixture(name: str) -> None:
    solve, order = ORDERS[name]
    data = GaussianMixture(tensor([-1.0, 0.5]).reshape(2, 1, 1, 1), tensor([0.5, 0.7]), tensor([0.4, 0.6]))
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).reshape(-1, 1, 1, 1)
    exact = mixture_solution_1d(data, x, Level(1.0, signal=0.0), Level(0.1, signal=0.9))
    coarse, fine = (
        (solve(data.denoise_flow, x, get_schedule("logsnr", n + 1, 0.1, 1.0)) - exact).abs().max().item()
        for n in (64, 128)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", ORDERS)
def test_converges_to_the_gaussian_solution(name: str) -> None:
    """On latents of several dimensions, over the range of a real schedule."""
    solve, order = ORDERS[name]
    mean, std = noise(1, seed=3)[0], 0.5
    sigmas = grid(201)
    x = noise() * sigmas[0]
    exact = gaussian_solution(mean, std, x, sigmas[0].item(), sigmas[-1].item())
    error = (solve(gaussian(mean, std).denoise, x, sigmas) - exact).abs().max()
    assert error < (0.1 if order == 1 else 2e-3)


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_ipndm_integrates_polynomials_of_its_order(max_order: int) -> None:
    """d(σ) = σ^(M-1) on equal steps: every interval with a full history is exact."""
    sigmas = torch.linspace(3, 1, 9, dtype=torch.float64)
    states: list[Tensor] = []
    SAMPLERS["ipndm"](
        lambda x, sigma: x - sigma * sigma ** (max_order - 1),
        tensor([0.7]),
        sigmas,
        max_order=max_order,
        callback=lambda _, x: states.append(x),
    )
    steps = torch.cat(states).diff()[max_order - 1 :]
    exact = (sigmas**max_order / max_order).diff()[max_order - 1 :]
    torch.testing.assert_close(steps, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("predict_x0", [True, False])
def test_dpmpp_3m_is_exact_where_the_estimate_is_linear_in_log_sigma(predict_x0: bool) -> None:
    """m(λ) = 1 - 2λ, λ = -log σ, on an uneven grid: every interval with a full history is exact.

    If m is D, dx/dλ = D - x has the solutions D - D' + C e^-λ; if m is d, dx/dλ = -e^-λ d has e^-λ (d + d') + C.
    """

    def m(sigma: Tensor) -> Tensor:
        return 1 + 2 * sigma.log()

    sigmas = grid(9, low=0.3, high=3.0)
    states: list[Tensor] = []
    SAMPLERS["dpmpp"](
        lambda x, sigma: m(sigma).expand(1) if predict_x0 else x - sigma * m(sigma),
        tensor([0.7]),
        sigmas,
        predict_x0=predict_x0,
        lower_order_final=False,
        callback=lambda _, x: states.append(x),
    )
    x = torch.cat(states)
    constant = (x - (m(sigmas) + 2)) / sigmas if predict_x0 else x - sigmas * (m(sigmas) - 2)
    assert not torch.isclose(constant[0], constant[2])
    torch.testing.assert_close(constant[2:], constant[2].expand(7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("max_order", "orders"), [(3, [1, 2, 3, 3, 2, 1]), (2, [1, 2, 2, 2, 2, 1])])
def test_dpmpp_ends_at_lower_order(max_order: int, orders: list[int]) -> None:
    """Whether an interval uses an estimate shows in the derivative of its result; the order is how many it uses."""
    estimates = [tensor([0.3 * i]).requires_grad_() for i in range(6)]
    queue = iter(estimates)
    states: list[Tensor] = []
    SAMPLERS["dpmpp"](
        lambda x, sigma: next(queue),
        tensor([1.0]),
        grid(7),
        max_order=max_order,
        callback=lambda _, x: states.append(x),
    )
    used = []
    for i, (before, after) in enumerate(pairwise(states)):
        factor = grid(7)[i + 1] / grid(7)[i]
        gradients = torch.autograd.grad(after - factor * before, estimates, retain_graph=True, allow_unused=True)
        used.append(sum(gradient is not None and bool(gradient.abs() > 1e-12) for gradient in gradients))
    assert used == orders


# --- What must hold for every sampler --------------------------------------------------------------------

num_steps = st.integers(2, 7)
seeds = st.integers(0, 2**16)


def run(name: str, denoise: Any, x: Tensor, sigmas: Tensor, *, seed: int = 0, **options: Any) -> Tensor:
    """Any sampler; `epd` with a random table without scales."""
    tables = [random_table(len(sigmas) - 1, 2, seed=seed, scales=False)] if name == "epd" else []
    return SAMPLERS[name](denoise, x, sigmas, *tables, **options)


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=15, deadline=None)
@given(num_steps=num_steps, seed=seeds)
def test_exact_for_a_single_data_point(name: str, num_steps: int, seed: int) -> None:
    """If all data is one point the trajectories are straight lines, which every sampler (and every table) follows."""
    point, sigmas = noise(1, seed=seed), grid(num_steps)
    x = point + noise(seed=seed + 1) * sigmas[0]
    result = run(name, lambda x, sigma: point.expand_as(x), x, sigmas, seed=seed)
    torch.testing.assert_close(result, point + (x - point) * sigmas[-1] / sigmas[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=10, deadline=None)
@given(num_steps=num_steps, seed=seeds, factor=st.floats(-3, 3))
def test_linear_in_x_for_a_linear_denoiser(name: str, num_steps: int, seed: int, factor: float) -> None:
    sigmas = grid(num_steps)
    denoise = gaussian(torch.zeros(2, 3, 3, dtype=torch.float64), 0.7).denoise
    x, y = noise(seed=seed) * sigmas[0], noise(seed=seed + 1) * sigmas[0]
    together = run(name, denoise, x + factor * y, sigmas, seed=seed)
    apart = run(name, denoise, x, sigmas, seed=seed) + factor * run(name, denoise, y, sigmas, seed=seed)
    torch.testing.assert_close(together, apart, rtol=1e-8, atol=1e-8 * apart.abs().max().item())


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=5, deadline=None)
@given(seed=seeds, order=st.permutations(range(4)))
def test_a_sample_does_not_see_its_batch(name: str, seed: int, order: list[int]) -> None:
    sigmas, x = grid(5), noise(4, seed=seed) * 20
    whole = run(name, mixture().denoise, x, sigmas, seed=seed)
    torch.testing.assert_close(
        run(name, mixture().denoise, x[order], sigmas, seed=seed), whole[order], rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(run(name, mixture().denoise, x[:1], sigmas, seed=seed), whole[:1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_stays_float32_and_near_float64(name: str) -> None:
    sigmas, x = grid(7), noise() * 20
    data = mixture()
    single = GaussianMixture(data.means.float(), data.stds.float(), data.weights.float())
    recorder = Recorder(single.denoise)
    result = run(name, recorder, x.float(), sigmas)
    exact = run(name, data.denoise, x, sigmas)
    assert result.dtype == torch.float32
    assert {sigma.dtype for sigma in recorder.sigmas} == {torch.float64}
    assert (result.double() - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_start_is_left_alone(name: str) -> None:
    sigmas, x = grid(4), noise() * 20
    before = x.clone()
    run(name, mixture().denoise, x, sigmas, afs=True, denoise_to_zero=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_values_on_the_device_are_never_read(name: str) -> None:
    """Tensors on the meta device have no values: reading one (a wait, on a GPU) would raise."""
    x = torch.empty(2, 3, 4, 4, device="meta")
    result = run(name, lambda x, sigma: 0.5 * x, x, grid(5), afs=True, denoise_to_zero=True)
    assert (result.shape, result.device.type) == (x.shape, "meta")


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_state_once(name: str) -> None:
    sigmas, x = grid(5), noise() * 20
    seen: list[tuple[int, Tensor]] = []
    result = run(name, mixture().denoise, x, sigmas, denoise_to_zero=True, callback=lambda *step: seen.append(step))
    assert [index for index, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(seen[0][1], x)
    assert torch.equal(seen[-2][1], run(name, mixture().denoise, x, sigmas))
    assert torch.equal(seen[-1][1], mixture().denoise(seen[-2][1], sigmas[-1]))
    assert torch.equal(seen[-1][1], result)


@pytest.mark.parametrize("name", SAMPLERS)
def test_analytical_first_step_is_a_network_that_answers_x_over_sqrt(name: str) -> None:
    sigmas, x = grid(5), noise() * 20
    denoise = mixture().denoise

    def told_the_answer(x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma * x / (1 + sigma**2).sqrt() if sigma.ndim == 0 and sigma == sigmas[0] else denoise(x, sigma)

    analytical = run(name, denoise, x, sigmas, afs=True)
    torch.testing.assert_close(analytical, run(name, told_the_answer, x, sigmas), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(analytical, run(name, denoise, x, sigmas))


# --- EPD -------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(num_steps=num_steps, points=st.integers(1, 4), per_sample=st.booleans(), afs=st.booleans(), seed=seeds)
def test_parallel_equals_sequential(num_steps: int, points: int, per_sample: bool, afs: bool, seed: int) -> None:
    sigmas, x = grid(num_steps), noise(seed=seed) * 20
    table = random_table(num_steps - 1, points, batch=3 if per_sample else None, seed=seed)
    parallel, sequential = Recorder(mixture().denoise), Recorder(mixture().denoise)
    together = epd_sampler(parallel, x, sigmas, table, afs=afs)
    one_by_one = epd_sampler(sequential, x, sigmas, table, afs=afs, parallel=False)
    torch.testing.assert_close(together, one_by_one, rtol=1e-10, atol=1e-10)
    assert parallel.rows == ([3, 3 * points] * (num_steps - 1))[afs:]
    assert sequential.rows == [3] * ((points + 1) * (num_steps - 1) - afs)


def test_rows_of_a_parallel_call_are_sample_major() -> None:
    """Row b·K + k is point k of sample b: in its noise level and in its state."""
    sigmas, x, table = grid(2), noise() * 20, random_table(1, 2, batch=3)
    calls: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((x, sigma))
        return 0.1 * x

    epd_sampler(denoise, x, sigmas, table)
    (_, first_level), (rows, told) = calls
    assert first_level.shape == ()
    assert told.shape == (6,)
    for b in range(3):
        for k in range(2):
            r = table.positions[b, 0, k]
            level = sigmas[1] ** r * sigmas[0] ** (1 - r)
            torch.testing.assert_close(told[b * 2 + k], table.scale_time[b, 0, k] * level)
            torch.testing.assert_close(rows[b * 2 + k], x[b] + (level - sigmas[0]) * 0.9 * x[b] / sigmas[0])


@pytest.mark.parametrize("parallel", [True, False])
def test_tables_per_sample_equal_separate_runs(parallel: bool) -> None:
    sigmas, x, tables = grid(5), noise() * 20, random_table(4, 3, batch=3)
    whole = epd_sampler(mixture().denoise, x, sigmas, tables, parallel=parallel, afs=True)
    for b in range(3):
        alone = epd_sampler(mixture().denoise, x[b : b + 1], sigmas, tables.select(b), parallel=parallel, afs=True)
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=1e-11, atol=1e-11)


def test_one_point_in_the_middle_is_dpm2() -> None:
    sigmas, x = grid(6), noise() * 20
    midpoint = epd_sampler(mixture().denoise, x, sigmas, midpoint_table(5))
    torch.testing.assert_close(midpoint, SAMPLERS["dpm2"](mixture().denoise, x, sigmas), rtol=1e-12, atol=1e-12)


def test_scales_do_what_they_say() -> None:
    """One interval by hand: scale_time reaches only the level told to the network, scale_dir only the direction."""
    table = EPDTable(tensor([[0.25, 0.5]]), tensor([[0.3, 0.7]]), tensor([[1.1, 0.9]]), tensor([[1.2, 0.8]]))
    sigmas = tensor([16.0, 1.0])
    result = epd_sampler(lambda x, sigma: sigma.reshape(-1, 1).expand_as(x), tensor([[32.0]]), sigmas, table)
    # d = (32 - 16)/16 = 1; levels 16^0.75 = 8 and 4; points 32 - 8 = 24 and 32 - 12 = 20; told 9.6 and 3.2
    directions = (24 - 9.6) / 8, (20 - 3.2) / 4
    expected = 32 - 15 * (0.3 * 1.1 * directions[0] + 0.7 * 0.9 * directions[1])
    torch.testing.assert_close(result, tensor([[expected]]), rtol=1e-13, atol=0)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, order=st.permutations(range(3)))
def test_points_have_no_order(seed: int, order: list[int]) -> None:
    sigmas, x, table = grid(4), noise() * 20, random_table(3, 3, seed=seed)
    shuffled = EPDTable(
        table.positions[:, order], table.weights[:, order], table.scale_dir[:, order], table.scale_time[:, order]
    )
    expected = epd_sampler(mixture().denoise, x, sigmas, table)
    torch.testing.assert_close(epd_sampler(mixture().denoise, x, sigmas, shuffled), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parallel", [True, False])
def test_gradients_of_table_and_state(parallel: bool) -> None:
    """Against finite differences, for everything that distillation learns."""
    sigmas = grid(3, high=3.0, low=0.3)
    table = random_table(2, 2, batch=2)
    leaves = [tensor.clone().requires_grad_() for tensor in (table.positions, table.scale_dir, table.scale_time)]
    logits = table.weights.log().requires_grad_()  # weights stay on the simplex under the differences
    x = noise(2, (1, 2, 2)).requires_grad_()

    def solve(positions: Tensor, logits: Tensor, scale_dir: Tensor, scale_time: Tensor, x: Tensor) -> Tensor:
        rows = EPDTable(positions, logits.softmax(-1), scale_dir, scale_time)
        return epd_sampler(mixture((1, 2, 2)).denoise, x, sigmas, rows, parallel=parallel)

    assert torch.autograd.gradcheck(solve, (leaves[0], logits, leaves[1], leaves[2], x))


def test_float32_table_receives_its_gradient() -> None:
    positions = torch.full((3, 2), 0.4, requires_grad=True)
    table = EPDTable(positions, torch.full((3, 2), 0.5))
    epd_sampler(mixture().denoise, noise() * 20, grid(4), table).square().sum().backward()
    assert positions.grad is not None
    assert positions.grad.dtype == torch.float32
    assert (positions.grad != 0).all()


# --- Counting evaluations --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("num_steps", [2, 5])
def test_evaluations_are_what_the_sampler_makes(name: str, afs: bool, num_steps: int) -> None:
    recorder = Recorder(mixture().denoise)
    run(name, recorder, noise(3) * 20, grid(num_steps), afs=afs)
    count = network_evaluations(name, num_steps, num_points=2 if name == "epd" else 1, afs=afs)
    assert (count.parallel, 3 * count.total) == (len(recorder.rows), sum(recorder.rows))
    if not afs:
        assert num_steps_for(name, count.parallel) == num_steps


def test_evaluations_by_hand() -> None:
    assert network_evaluations("epd", 4, num_points=2) == (6, 9, 9)
    assert network_evaluations("epd", 4, num_points=3, afs=True, guidance=7.5) == (5, 11, 22)
    assert network_evaluations("epd", 4, num_points=0) == (3, 3, 3)
    assert network_evaluations("dpmpp", 7, guidance=3) == (6, 6, 12)
    assert [num_steps_for("epd", nfe) for nfe in (4, 6, 8, 12, 20)] == [3, 4, 5, 7, 11]
    assert [num_steps_for("ddim", nfe) for nfe in (4, 6, 8, 12, 20)] == [5, 7, 9, 13, 21]


# --- Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: num_steps_for("heun", 5), r"heun cannot spend exactly 5 evaluations: it makes 2 in each interval"),
        (lambda: num_steps_for("ddim", 0), r"ddim cannot spend exactly 0 evaluations"),
        (lambda: num_steps_for("euler", 5), r"unknown sampler 'euler'; known: epd, ddim"),
        (lambda: network_evaluations("ddim", 1), r"num_steps .* at least 2; got 1"),
        (
            lambda: network_evaluations("ddim", 5, num_points=2),
            r"num_points must be 1, or with epd any number from 0; got 2 with ddim",
        ),
        (lambda: network_evaluations("heun", 4, num_points=0), r"num_points must be 1, .* got 0 with heun"),
        (lambda: network_evaluations("epd", 5, num_points=-1), r"num_points must be 1, .* got -1 with epd"),
        (lambda: run("dpm2", None, noise(), grid(3), r=0.0), r"dpm2 needs r in \(0, 1\]; got 0.0"),
        (lambda: run("ipndm", None, noise(), grid(3), max_order=5), r"ipndm needs max_order in \[1, 2, 3, 4\]; got 5"),
        (lambda: run("dpmpp", None, noise(), grid(3), max_order=0), r"dpmpp needs max_order in \[1, 2, 3\]; got 0"),
        (
            lambda: epd_sampler(None, noise(), grid(3), midpoint_table(3)),
            r"table needs a grid of 4 points; sigmas has 3",
        ),
        (
            lambda: epd_sampler(None, noise(2), grid(3), random_table(2, 2, batch=3)),
            r"table holds 3 samples, x holds 2",
        ),
    ],
)
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([[[2.0, 1.0]]], "at least 2 points"),
        ([2.0], "at least 2 points"),
        ([2.0, 0.0], "finite and positive"),
        ([math.inf, 1.0], "finite and positive"),
        ([2.0, math.nan], "finite and positive"),
        ([2.0, 2.0], "descend strictly"),
        ([1.0, 2.0], "descend strictly"),
    ],
)
def test_refuses_what_is_no_grid(name: str, sigmas: list[float], message: str) -> None:
    tables = [midpoint_table(1)] if name == "epd" else []
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name](lambda x, sigma: x, noise(), tensor(sigmas), *tables)


HALF = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": torch.full((2,), 0.5)}, r"positions must have shape \[S, K\] or \[B, S, K\].*got \[2\]"),
        ({"positions": torch.empty(0, 2)}, r"S and B at least 1; got \[0, 2\]"),
        ({"weights": torch.full((2, 3), 1 / 3)}, r"weights has shape \[2, 3\], positions .* must be \[2, 2\]"),
        ({"positions": HALF.half()}, r"positions must be float32 or float64; got torch.float16"),
        ({"weights": HALF.double()}, r"weights is torch.float64 on cpu, positions are torch.float32 on cpu"),
        (
            {"positions": torch.tensor([[0.5, 0.5], [0.5, math.nan]])},
            r"positions must be finite; entry \[1, 1\] is nan",
        ),
        (
            {"positions": torch.tensor([[0.5, 1.0], [0.5, 0.5]])},
            r"positions must lie inside \(0, 1\); entry \[0, 1\] is 1",
        ),
        (
            {"positions": torch.tensor([[0.0, 0.5], [0.5, 0.5]])},
            r"positions must lie inside \(0, 1\); entry \[0, 0\] is 0",
        ),
        ({"weights": torch.tensor([[0.5, 0.5], [1.5, -0.5]])}, r"weights must be at least 0; entry \[1, 1\] is -0.5"),
        (
            {"weights": torch.tensor([[0.5, 0.5], [0.5, 0.6]])},
            r"weights must sum to 1 over the points; entry \[1\] is 1.1",
        ),
        ({"scale_dir": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, r"scale_dir must be positive; entry \[0, 1\] is 0"),
        ({"scale_time": torch.full((2, 2), math.inf)}, r"scale_time must be finite; entry \[0, 0\] is inf"),
    ],
)
def test_refuses_what_is_no_table(fields: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPDTable(**{"positions": HALF, "weights": HALF, **fields})


# --- Tables ----------------------------------------------------------------------------------------------


def test_sizes_of_a_table() -> None:
    one, many = random_table(4, 3), random_table(4, 3, batch=5)
    for table in (one, many):
        assert (table.num_intervals, table.num_steps, table.num_points) == (4, 5, 3)
    assert (one.batch_size, many.batch_size) == (None, 5)


def test_expand_and_select_are_inverse() -> None:
    table = random_table(4, 3)
    expanded = table.expand(5)
    assert expanded.batch_size == 5
    assert torch.equal(expanded.select(2).weights, table.weights)
    many = random_table(4, 3, batch=5)
    assert torch.equal(many.select(slice(1, 3)).scale_time, many.scale_time[1:3])
    assert torch.equal(many.select(torch.tensor([4, 0])).positions, many.positions[[4, 0]])
    assert random_table(4, 3, scales=False).expand(2).scale_dir is None
    with pytest.raises(ValueError, match="already holds 5 tables"):
        many.expand(2)
    with pytest.raises(ValueError, match="no batch dimension"):
        table.select(0)


def test_to_keeps_the_graph_and_detach_cuts_it() -> None:
    positions = torch.full((2, 1), 0.3, requires_grad=True)
    table = EPDTable(positions, torch.ones(2, 1)).to(dtype=torch.float64)
    assert table.weights.dtype == torch.float64
    table.positions.sum().backward()
    assert torch.equal(positions.grad, torch.ones(2, 1))
    assert not table.detach().positions.requires_grad


def test_sorting_carries_everything_along() -> None:
    table = EPDTable(
        tensor([[0.2, 0.6, 0.9], [0.7, 0.1, 0.4]]),
        tensor([[0.2, 0.3, 0.5], [0.1, 0.2, 0.7]]),
        tensor([[1.0, 1.1, 1.2], [1.3, 1.4, 1.5]]),
    )
    ordered, changed = table.sorted_by_position()
    assert changed.tolist() == [False, True]
    assert ordered.positions.tolist() == [[0.2, 0.6, 0.9], [0.1, 0.4, 0.7]]
    assert ordered.weights.tolist() == [[0.2, 0.3, 0.5], [0.2, 0.7, 0.1]]
    assert ordered.scale_dir.tolist() == [[1.0, 1.1, 1.2], [1.4, 1.5, 1.3]]
    assert ordered.scale_time is None
    x, sigmas = noise() * 20, grid(3)
    expected = epd_sampler(mixture().denoise, x, sigmas, table)
    torch.testing.assert_close(epd_sampler(mixture().denoise, x, sigmas, ordered), expected, rtol=1e-12, atol=1e-12)
    assert not ordered.expand(2).sorted_by_position()[1].any()


def test_golden_unsorted_table_is_reported() -> None:
    published = golden.table("rlepd-00036-snapshot000005")
    _, changed = EPDTable(tensor(published["r"]), tensor(published["w"])).sorted_by_position()
    assert changed.nonzero().flatten().tolist() == [1, 3, 4, 6, 8]


@pytest.mark.parametrize("name", golden.table_names())
def test_golden_published_tables_are_tables(name: str) -> None:
    published = golden.table(name)
    table = EPDTable(tensor(published["r"]), tensor(published["w"]))
    assert (table.num_steps, table.num_points) == (published["num_steps"], published["num_points"])
