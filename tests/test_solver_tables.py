"""Tables with every column, interval by interval, and the classical samplers as tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from schedules import from_log_gaps, get_schedule, log_gaps
from solvers import (
    COLUMNS,
    SAMPLERS,
    EPDSteps,
    EPDTable,
    classical_table,
    epd_sampler,
    network_evaluations,
    with_ipndm_history,
)
from tests import golden
from tests.analytic import Recorder
from tests.test_solvers import CASES, GOLDEN_SAMPLERS, OPTIONS, golden_problem, grid, mixture, noise, tensor

seeds = st.integers(0, 2**16)


def full_table(intervals: int, points: int, *, batch: int | None = None, seed: int = 0) -> EPDTable:
    """Every column that there is, all of them far from neutral."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)

    def uniform(name: str, low: float, high: float) -> Tensor:
        shape = next(column for column in COLUMNS if column.name == name).shape(intervals, points)
        return low + (high - low) * torch.rand(*lead, *shape, generator=generator, dtype=torch.float64)

    return EPDTable(
        uniform("positions", 0.05, 0.95),
        uniform("weights", -1, 1).softmax(-1),
        uniform("scale_dir", 0.9, 1.1),
        uniform("scale_time", 0.9, 1.1),
        uniform("guidance", 0, 3),
        uniform("history", -0.8, 0.4).tril(-1),
        uniform("direction_history", -0.8, 0.4).tril(-1),
    )


def grids(num_steps: int, batch: int) -> Tensor:
    """A grid of its own for each sample."""
    gaps = torch.rand(batch, num_steps - 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.2
    return from_log_gaps(gaps / gaps.sum(-1, keepdim=True), 0.02, 20.0)


def guided(x: Tensor, sigma: Tensor, guidance: Tensor) -> Tensor:
    """Twice the estimate less a constant, as one more condition would have it, and guidance between the two."""
    plain = mixture().denoise(x, sigma)
    return (plain + (guidance.reshape(-1, *[1] * (x.ndim - 1)) - 1) * (0.3 * plain - 0.1)).to(x)


def by_the_book(x: Tensor, sigmas: Tensor, table: EPDTable, afs: bool, denoise: Callable[..., Tensor]) -> Tensor:
    """The published rule for ONE sample x [1, ...], written out number by number."""
    r, w, o, s, g, h, q = (getattr(table, field.name).tolist() for field in fields(EPDTable))
    levels = sigmas.tolist()
    estimates: list[Tensor] = []
    directions: list[Tensor] = []
    for i in range(len(levels) - 1):
        a, b = levels[i], levels[i + 1]
        if afs and i == 0:
            estimate = x - a * x / math.sqrt(1 + a * a)
        else:
            estimate = denoise(x, tensor(a), tensor([g[i][0]]))
        mixed = (1 - sum(h[i])) * estimate + sum(h[i][j] * estimates[j] for j in range(i))
        plain = (x - mixed) / a
        direction = (1 - sum(q[i])) * plain + sum(q[i][j] * directions[j] for j in range(i))
        estimates.append(estimate)
        directions.append(plain)
        moved = x + (b - a) * direction if not r[i] else x
        for k in range(len(r[i])):
            tau = math.exp(r[i][k] * math.log(b) + (1 - r[i][k]) * math.log(a))
            point = x + (tau - a) * direction
            told, guidance = tensor(s[i][k] * tau), tensor([g[i][1 + k]])
            moved = moved + (b - a) * w[i][k] * o[i][k] * (point - denoise(point, told, guidance)) / tau
        x = moved
    return x


# --- The rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [0, 1, 3])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_table_with_every_column_is_the_written_rule(points: int, afs: bool, parallel: bool) -> None:
    """Each sample with a table and a grid of its own, as if it were alone."""
    x, sigmas, tables = noise() * 20, grids(5, 3), full_table(4, points, batch=3)
    result = epd_sampler(guided, x, sigmas, tables, afs=afs, parallel=parallel)
    for b in range(3):
        alone = by_the_book(x[b : b + 1], sigmas[b], tables.select(b), afs, guided)
        torch.testing.assert_close(result[b : b + 1], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [column.name for column in COLUMNS if column.neutral is not None])
def test_a_neutral_column_is_as_good_as_none(name: str) -> None:
    column = next(column for column in COLUMNS if column.name == name)
    x, sigmas, table = noise() * 20, grid(5), replace(full_table(4, 2), **{name: None})
    neutral = replace(table, **{name: torch.full(column.shape(4, 2), column.neutral, dtype=torch.float64)})
    expected = epd_sampler(guided, x, sigmas, table)
    torch.testing.assert_close(epd_sampler(guided, x, sigmas, neutral), expected, rtol=1e-13, atol=1e-13)
    other = epd_sampler(guided, x, sigmas, replace(table, **{name: full_table(4, 2).columns()[name]}))
    assert not torch.allclose(other, expected)


def test_without_points_a_plain_table_is_ddim() -> None:
    x, sigmas, none = noise() * 20, grid(6), torch.empty(5, 0, dtype=torch.float64)
    recorder = Recorder(mixture().denoise)
    result = epd_sampler(recorder, x, sigmas, EPDTable(none, none))
    torch.testing.assert_close(result, SAMPLERS["ddim"](mixture().denoise, x, sigmas), rtol=1e-13, atol=1e-13)
    assert recorder.rows == [3] * 5


def test_one_estimate_drawn_towards_an_earlier_one_by_hand() -> None:
    """Two intervals without points: D̄_1 = D_1 + h (D_0 - D_1), from levels 4, 2, 1 and estimates 8 and 6."""
    none, history = torch.empty(2, 0, dtype=torch.float64), tensor([[0, 0], [-0.5, 0]])
    result = epd_sampler(
        lambda x, sigma: torch.full_like(x, 8.0 if sigma == 4 else 6.0),
        tensor([[16.0]]),
        tensor([4.0, 2.0, 1.0]),
        EPDTable(none, none, history=history),
    )
    # x_1 = 16 - 2 (16 - 8)/4 = 12; D̄ = 6 - 0.5 (8 - 6) = 5; x_2 = 12 - (12 - 5)/2
    torch.testing.assert_close(result, tensor([[8.5]]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("parallel", [False, True])
def test_guidance_reaches_the_evaluation_that_it_is_for(parallel: bool) -> None:
    """The interval's start with entry 0, point k with entry 1 + k; rows sample-major; float64 on the CPU."""
    table, x, sigmas = full_table(2, 2, batch=3), noise().float() * 20, grid(3)
    recorder = Recorder(lambda x, sigma, guidance: 0.1 * x)
    epd_sampler(recorder, x, sigmas, table, parallel=parallel, denoise_to_zero=True)
    expected = []
    for i in range(2):
        expected.append(table.guidance[:, i, 0])
        of_points = table.guidance[:, i, 1:]
        expected.extend([of_points.flatten()] if parallel else of_points.T)
    expected.append(table.guidance[:, -1, 0])  # of the estimate at the end
    assert len(recorder.guidances) == len(recorder.rows) == len(expected)
    for found, wanted in zip(recorder.guidances, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("points", [0, 2])
@pytest.mark.parametrize("grid_of_each", [False, True])
def test_everything_asked_lies_on_the_device_of_x(points: int, grid_of_each: bool) -> None:
    """Table and grid stay where they are; a level for all rows is a number on the CPU, where all guidance is."""
    x = torch.empty(3, 2, 3, 3, device="meta")

    def denoise(x: Tensor, sigma: Tensor, guidance: Tensor) -> Tensor:
        assert (guidance.device, guidance.dtype) == (torch.device("cpu"), torch.float64)
        assert sigma.device == (x.device if sigma.ndim else torch.device("cpu"))
        return 0.1 * x

    sigmas = grids(4, 3) if grid_of_each else grid(4)
    for afs in (False, True):
        for table in (full_table(3, points), full_table(3, points, batch=3)):
            result = epd_sampler(denoise, x, sigmas, table, afs=afs, denoise_to_zero=True)
            assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device)


def test_a_table_without_guidance_asks_for_none() -> None:
    table = replace(full_table(2, 2), guidance=None)
    recorder = Recorder(mixture().denoise)
    epd_sampler(recorder, noise() * 20, grid(3), table, denoise_to_zero=True)
    assert recorder.guidances == []


def test_grids_of_samples_tell_the_network_the_level_of_each() -> None:
    sigmas, recorder = grids(3, 3), Recorder(mixture().denoise)
    epd_sampler(recorder, noise() * 20, sigmas, replace(full_table(2, 1), guidance=None), denoise_to_zero=True)
    for i, found in zip(range(3), recorder.sigmas[::2], strict=True):
        assert torch.equal(found, sigmas[:, i])


def test_one_grid_for_all_equals_the_same_grid_for_each() -> None:
    x, sigmas, table = noise() * 20, grid(5), full_table(4, 2)
    expected = epd_sampler(guided, x, sigmas, table, afs=True)
    each = epd_sampler(guided, x, sigmas.expand(3, -1), table, afs=True)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)


def test_float32_states_stay_float32_and_near() -> None:
    x, sigmas, tables = noise() * 20, grids(5, 3), full_table(4, 2, batch=3)
    found = epd_sampler(guided, x.float(), sigmas, tables.to(dtype=torch.float32))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), epd_sampler(guided, x, sigmas, tables), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("points", [0, 2])
@pytest.mark.parametrize("batch", [None, 2])
def test_gradients_of_grid_guidance_and_history(points: int, batch: int | None) -> None:
    """Against finite differences; from history at 0 too, where learning starts."""
    table, x = full_table(3, points, batch=batch), noise(2, (1, 2, 2))
    gaps = log_gaps(grid(4, high=3.0, low=0.3)).expand(batch or 1, -1).squeeze(0).clone()

    def rule(x: Tensor, sigma: Tensor, guidance: Tensor) -> Tensor:
        plain = mixture((1, 2, 2)).denoise(x, sigma)
        return plain + (guidance.reshape(-1, 1, 1, 1) - 1) * 0.3 * plain

    def solve(shares: Tensor, guidance: Tensor, history: Tensor, direction_history: Tensor) -> Tensor:
        history, direction_history = history.tril(-1), direction_history.tril(-1)
        changed = replace(table, guidance=guidance, history=history, direction_history=direction_history)
        return epd_sampler(rule, x * 3, from_log_gaps(shares.softmax(-1), 0.3, 3.0), changed)

    leaves = (gaps.log(), table.guidance.clone(), torch.zeros_like(table.history), table.direction_history.clone())
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(solve, leaves)
    gradient = torch.autograd.grad(solve(*leaves).sum(), leaves[2])[0]
    assert (gradient[..., 1, 0] != 0).all()
    assert (gradient[..., 2, :2] != 0).all()


# --- Interval by interval ------------------------------------------------------------------------------------


def test_steps_end_where_the_sampler_does() -> None:
    x, sigmas, table = noise() * 20, grid(4), full_table(3, 2)
    states: list[Tensor] = []
    epd_sampler(guided, x, sigmas, table, callback=lambda _, state: states.append(state))
    steps = EPDSteps(guided, table, sigmas, x, parallel=False)
    assert len(steps) == 3
    for i in range(3):
        x = steps.interval(i, x)
        torch.testing.assert_close(x, states[i + 1], rtol=1e-12, atol=1e-12)


def test_an_interval_passes_over_intervals_that_were_not_run() -> None:
    """From the middle of the grid: as a table whose history knows only what follows."""
    x, sigmas, table = noise() * 3, grid(6), full_table(5, 1)
    steps = EPDSteps(guided, table, sigmas, x)
    found = x
    for i in range(2, 5):
        found = steps.interval(i, found)
    rest = EPDTable(
        **{
            name: entries[2:, 2:] if name.endswith("history") else entries[2:]
            for name, entries in table.columns().items()
        }
    )
    torch.testing.assert_close(found, epd_sampler(guided, x, sigmas[2:], rest), rtol=1e-12, atol=1e-12)


def test_an_interval_run_again_forgets_what_it_was_before() -> None:
    x, sigmas, table = noise() * 20, grid(4), full_table(3, 1)
    steps = EPDSteps(guided, table, sigmas, x)
    for start in (2 * x, x):
        found = start
        for i in range(3):
            found = steps.interval(i, found)
    torch.testing.assert_close(found, epd_sampler(guided, x, sigmas, table), rtol=1e-12, atol=1e-12)


# --- Classical samplers as tables ----------------------------------------------------------------------------

MULTISTEP = [
    ("ddim", {}),
    *(("ipndm", {"max_order": order}) for order in (1, 2, 3, 4)),
    *(
        ("dpmpp", {"max_order": order, "predict_x0": x0, "lower_order_final": final})
        for order in (1, 2, 3)
        for x0 in (True, False)
        for final in (True, False)
    ),
]
TABLES = [*MULTISTEP, ("dpm2", {"r": 0.5})]
NAMES = [" ".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in TABLES]


@pytest.mark.parametrize(("sampler", "options"), TABLES, ids=NAMES)
@settings(max_examples=8, deadline=None)
@given(num_steps=st.integers(2, 21), seed=seeds, flow=st.booleans(), afs=st.booleans())
def test_classical_tables_are_the_samplers(
    sampler: str, options: dict[str, Any], num_steps: int, seed: int, flow: bool, afs: bool
) -> None:
    """Every state, on uneven grids: those of a real range, and of flow matching, from 1 down."""
    high, low = (1.0, 0.01) if flow else (80.0, 0.002)
    gaps = 0.05 + torch.rand(num_steps - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sigmas, x = from_log_gaps(gaps / gaps.sum(), low, high), noise(seed=seed) * high
    denoise = mixture().denoise_flow if flow else mixture().denoise
    states: dict[str, list[Tensor]] = {"sampler": [], "table": []}
    SAMPLERS[sampler](denoise, x, sigmas, afs=afs, callback=lambda _, state: states["sampler"].append(state), **options)
    epd_sampler(
        denoise,
        x,
        sigmas,
        classical_table(sampler, sigmas, **options),
        afs=afs,
        callback=lambda _, state: states["table"].append(state),
    )
    for found, expected in zip(states["table"], states["sampler"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("sampler", "options"), MULTISTEP, ids=NAMES[:-1])
def test_multistep_tables_have_no_points(sampler: str, options: dict[str, Any]) -> None:
    table = classical_table(sampler, grid(6), **options)
    assert (table.num_steps, table.num_points) == (6, 0)
    assert table.evaluations() == network_evaluations(sampler, 6)


def test_the_history_of_dpmpp_2m_by_hand() -> None:
    """Equal steps in log σ: r0 = 1, so D̄ = D + (D - D_1)/2 in every interval but the first and the last."""
    history = classical_table("dpmpp", get_schedule("logsnr", 6, 0.1, 10.0), max_order=2).history
    expected = torch.zeros(5, 5).double()
    for i in range(1, 4):
        expected[i, i - 1] = -0.5
    torch.testing.assert_close(history, expected, rtol=0, atol=1e-13)


def test_the_history_of_ipndm_reaches_back_to_the_start() -> None:
    """Order 2 on levels 4, 2, 1, 1/2: u_2 - u_1 is a step along D̄_1, which holds D_0."""
    history = classical_table("ipndm", tensor([4.0, 2.0, 1.0, 0.5]), max_order=2).history
    # t = 1/4, 1/2, 1: t_1 C_1 = 3/2 t_1 e_1 - 1/2 (t_0 e_0 + (t_1 - t_0) e_0); t_2 C_2 = 3/2 t_2 e_2
    # - 1/2 (t_1 e_1 + (t_2 - t_1) C_1) with C_1 = (-1/2, 3/2)
    torch.testing.assert_close(history, tensor([[0, 0, 0], [-0.5, 0, 0], [0.125, -0.625, 0]]), rtol=1e-14, atol=1e-15)


GOLDEN_TABLES = [
    case
    for case in CASES
    if GOLDEN_SAMPLERS[case["function"]] in ("ddim", "ipndm", "dpmpp", "dpm2")
    and case["table"] is None
    and case["kwargs"].get("r", 0.5) == 0.5
]


@pytest.mark.parametrize("case", GOLDEN_TABLES, ids=[case["case"] for case in GOLDEN_TABLES])
def test_golden_trajectories_of_classical_tables(case: dict[str, Any]) -> None:
    """To 1e-11 of the largest entry, as the samplers themselves."""
    denoise, start, sigmas = golden_problem(case)
    options = {option: case["kwargs"][option] for option in OPTIONS if option in case["kwargs"]}
    run = {option: options.pop(option) for option in ("afs", "denoise_to_zero") if option in options}
    table = classical_table(GOLDEN_SAMPLERS[case["function"]], sigmas, **options)
    states: list[Tensor] = []
    epd_sampler(denoise, start, sigmas, table, callback=lambda _, x: states.append(x), **run)
    expected = golden.tensor("solvers", f"{case['case']}__traj")
    for state, reference_state in zip(states, expected, strict=True):
        assert (state - reference_state).abs().max() <= 1e-11 * reference_state.abs().max()


def test_the_plug_in_for_ipndm_holds_adams_bashforth_coefficients() -> None:
    """The golden runs show that the sampler does with them what the published one does."""
    table = with_ipndm_history(replace(full_table(7, 2), direction_history=None), max_order=3)
    coefficients = table.direction_history
    assert coefficients[:2].tolist() == [[0] * 7, [-1 / 2, *[0] * 6]]
    assert coefficients[6].tolist() == [0, 0, 0, 0, 5 / 12, -16 / 12, 0]
    assert torch.equal(with_ipndm_history(table, 1).direction_history, torch.zeros(7, 7).double())
    assert with_ipndm_history(table.to(dtype=torch.float32)).direction_history.dtype == torch.float32
    with pytest.raises(ValueError, match="ipndm needs max_order"):
        with_ipndm_history(table, 0)


# --- Columns -------------------------------------------------------------------------------------------------


def test_every_field_of_a_table_is_a_declared_column() -> None:
    assert [column.name for column in COLUMNS] == [field.name for field in fields(EPDTable)]
    table = full_table(4, 2)
    assert list(table.columns()) == [column.name for column in COLUMNS]
    for column in COLUMNS:
        assert table.columns()[column.name].shape == column.shape(4, 2)
        assert column.optional == (column.name not in ("positions", "weights"))
    assert list(replace(table, history=None).columns()) == [c.name for c in COLUMNS if c.name != "history"]


@pytest.mark.parametrize("points", [0, 3])
def test_handling_a_table_keeps_every_column(points: int) -> None:
    table = full_table(4, points)
    for copy in (
        table.detach(),
        table.to(dtype=torch.float32).to(dtype=torch.float64),
        table.expand(2).select(1),
        EPDTable(**table.columns()),
    ):
        assert copy.num_points == points
        assert list(copy.columns()) == list(table.columns())
        for name, entries in table.columns().items():
            torch.testing.assert_close(copy.columns()[name], entries, rtol=1e-6, atol=0)


def test_a_column_without_a_batch_serves_all_samples() -> None:
    x, sigmas, one, many = noise() * 20, grid(4), full_table(3, 2), full_table(3, 2, batch=3, seed=1)
    mixed = replace(one, guidance=many.guidance)
    assert mixed.batch_size == 3
    assert mixed.history.shape == (3, 3, 3)
    found = epd_sampler(guided, x, sigmas, mixed)
    for b in range(3):
        alone = epd_sampler(guided, x[b : b + 1], sigmas, replace(one, guidance=many.guidance[b]))
        torch.testing.assert_close(found[b : b + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [None, 3])
def test_sorting_carries_guidance_along_and_leaves_history(batch: int | None) -> None:
    table, x, sigmas = full_table(3, 4, batch=batch), noise() * 20, grid(4)
    ordered, changed = table.sorted_by_position()
    assert changed.any()
    assert (ordered.positions.diff(dim=-1) > 0).all()
    assert torch.equal(ordered.guidance[..., 0], table.guidance[..., 0])
    assert torch.equal(ordered.history, table.history)
    expected = epd_sampler(guided, x, sigmas, table)
    torch.testing.assert_close(epd_sampler(guided, x, sigmas, ordered), expected, rtol=1e-11, atol=1e-11)
    assert not full_table(3, 0).sorted_by_position()[1].any()


# --- Counting evaluations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [0, 1, 3])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("plain", [(0, 3), (1, 2)])
def test_rows_count_an_evaluation_at_guidance_1_once(points: int, afs: bool, plain: tuple[int, int]) -> None:
    """Also where AFS leaves out the first one."""
    table = full_table(4, points)
    guidance = table.guidance.clone()
    guidance[plain, 0] = guidance[1, -1] = 1.0
    table = replace(table, guidance=guidance)
    recorder = Recorder(guided)
    epd_sampler(recorder, noise(1) * 20, grid(5), table, afs=afs)
    count = table.evaluations(afs=afs)
    rows = sum(1 if scale == 1 else 2 for called in recorder.guidances for scale in called.tolist())
    assert count == (len(recorder.rows), sum(recorder.rows), rows)


def test_rows_of_a_table_under_the_callers_guidance() -> None:
    table = replace(full_table(4, 2), guidance=None)
    assert table.evaluations(afs=True) == (7, 11, 11)
    assert table.evaluations(guidance_scale=3.0) == (8, 12, 24)
    with pytest.raises(ValueError, match="holds 3 tables"):
        table.expand(3).evaluations()


# --- Bad input -----------------------------------------------------------------------------------------------

HALF = torch.full((2, 2), 0.5)
NONE = torch.empty(2, 0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"history": torch.eye(2)}, r"history must be strictly lower triangular.*; entry \[0, 0\] is 1"),
        ({"history": tensor([[0, 0.5], [0, 0]]).float()}, r"history must be strictly lower.*; entry \[0, 1\] is 0.5"),
        ({"history": torch.zeros(2, 3)}, r"history has shape \[2, 3\], positions have \[2, 2\]: it must be \[2, 2\]"),
        ({"history": torch.full((2, 2), math.nan)}, r"history must be finite; entry \[0, 0\] is nan"),
        ({"direction_history": torch.ones(2, 2)}, r"direction_history must be strictly lower"),
        ({"guidance": torch.full((2, 3), -0.5)}, r"guidance must be at least 0; entry \[0, 0\] is -0.5"),
        ({"guidance": torch.full((2, 3), math.inf)}, r"guidance must be finite; entry \[0, 0\] is inf"),
        ({"guidance": HALF}, r"guidance has shape \[2, 2\], positions have \[2, 2\]: it must be \[2, 3\]"),
        ({"positions": NONE}, r"weights has shape \[2, 2\], positions have \[2, 0\]: it must be \[2, 0\]"),
        ({"guidance": torch.ones(3, 2, 3), "history": torch.zeros(4, 2, 2)}, "guidance holds 3 .*history holds 4"),
        ({"guidance": torch.ones(0, 2, 3)}, r"guidance has shape \[0, 2, 3\]"),
    ],
)
def test_refuses_a_column_that_breaks_its_rule(columns: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPDTable(**{"positions": HALF, "weights": HALF, **columns})


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([[2.0, 1.0, 0.5]], "sigmas hold 1 grids, x holds 3 samples"),
        ([[2.0, 1.0]] * 3, "table needs a grid of 3 points; sigmas has 2"),
        ([[2.0, 1.0, 0.5], [2.0, 1.0, 0.5], [2.0, 1.0, 1.0]], r"descend strictly; got \[2.0, 1.0, 1.0\]"),
        ([[2.0, 1.0, 0.5], [2.0, 1.0, 0.5], [2.0, 1.0, 0.0]], "finite and positive"),
    ],
)
def test_refuses_grids_of_samples(sigmas: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epd_sampler(None, noise(), tensor(sigmas), full_table(2, 1))


def test_classical_samplers_take_one_grid() -> None:
    with pytest.raises(ValueError, match="one grid"):
        SAMPLERS["ddim"](None, noise(), grid(4).expand(3, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heun", {}), "'heun' is no table; ddim, ipndm, dpmpp, dpm2 are"),
        (("ddim", {"max_order": 2}), "ddim has no option 'max_order' as a table; it has none"),
        (("dpm2", {"r": 0.3}), "dpm2 is a table at r = 0.5 alone.* got 0.3"),
        (("ipndm", {"max_order": 5}), r"ipndm needs max_order in \[1, 2, 3, 4\]; got 5"),
        (("dpmpp", {"max_order": 4}), r"dpmpp needs max_order in \[1, 2, 3\]; got 4"),
    ],
)
def test_refuses_what_is_no_classical_table(arguments: tuple[str, dict[str, Any]], message: str) -> None:
    sampler, options = arguments
    with pytest.raises(ValueError, match=message):
        classical_table(sampler, grid(5), **options)
