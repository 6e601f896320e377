"""A solver as free parameters: at first the solver that was given, and a solver whatever they become."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from errors import InputError
from solvers import COLUMNS, EPDTable, classical_table, epd_sampler
from training.parameters import PARTS, SolverParameters, named_parts

SIGMAS = torch.tensor([14.0, 3.0, 0.7, 0.03], dtype=torch.float64)


def full_table(points: int = 2) -> EPDTable:
    """Every column, three intervals, no entry at its neutral value."""
    draw = torch.Generator().manual_seed(0)

    def uniform(columns: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(3, columns, generator=draw, dtype=torch.float64)

    weights = uniform(points, 0.1, 1.0)
    return EPDTable(
        uniform(points, 0.1, 0.9).sort().values,
        weights / weights.sum(-1, keepdim=True),
        scale_dir=uniform(points, 0.8, 1.2),
        scale_time=uniform(points, 0.8, 1.2),
        guidance=uniform(1 + points, 1.0, 9.0),
        history=uniform(3, -1.0, 1.0).tril(-1),
        direction_history=uniform(3, -1.0, 1.0).tril(-1),
    )


def test_every_column_of_the_table_and_the_grid_can_be_learned() -> None:
    assert sorted(PARTS) == sorted(["grid", *(column.name for column in COLUMNS)])


@pytest.mark.parametrize("points", [0, 1, 3])
def test_at_first_the_solver_is_the_one_that_was_given(points: int) -> None:
    table = full_table(points)
    learned = [name for name in PARTS if PARTS[name].free(3, points)]
    parameters = SolverParameters(table, SIGMAS, learned)
    assert sorted(name for name, _ in parameters.named_parameters()) == sorted(f"free.{name}" for name in learned)
    for name, entries in parameters.table().columns().items():
        torch.testing.assert_close(entries, getattr(table, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parameters.sigmas(), SIGMAS, rtol=1e-12, atol=0)
    assert all(free.numel() == PARTS[name].free(3, points) for name, free in parameters.free.items())
    assert parameters.sigmas()[[0, -1]].equal(SIGMAS[[0, -1]])


@given(seed=st.integers(0, 2**31), points=st.integers(0, 3), spread=st.floats(0, 50))
def test_whatever_the_parameters_become_it_is_a_solver(seed: int, points: int, spread: float) -> None:
    learned = [name for name in PARTS if PARTS[name].free(3, points)]
    parameters = SolverParameters(full_table(points), SIGMAS, learned, {"scale_dir": 0.5})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for free in parameters.parameters():
            free.copy_(spread * torch.randn(free.shape, generator=generator, dtype=torch.float64))
    table, sigmas = parameters.table(), parameters.sigmas()  # the table checks itself
    assert (sigmas.diff() < 0).all()
    assert sigmas[[0, -1]].equal(SIGMAS[[0, -1]])
    if points:
        assert ((table.scale_dir - 1).abs() <= 0.5).all()


class End(torch.nn.Module):
    """Where a solver of these parameters ends."""

    def __init__(self, parameters: SolverParameters) -> None:
        super().__init__()
        self.solver = parameters
        self.x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def forward(self) -> Tensor:
        return epd_sampler(self.denoise, self.x, self.solver.sigmas(), self.solver.table())

    @staticmethod
    def denoise(x: Tensor, sigma: Tensor, guidance: Tensor) -> Tensor:
        return guidance.reshape(-1, 1) * x.tanh() / (1 + sigma.reshape(-1, 1))


@pytest.mark.parametrize("name", PARTS)
def test_a_column_alone_moves_and_its_gradient_is_right(name: str) -> None:
    table = full_table()
    parameters = SolverParameters(table, SIGMAS, [name])
    assert parameters.learned == (name,)
    end = End(parameters)

    def ends(free: Tensor) -> Tensor:
        return torch.func.functional_call(end, {f"solver.free.{name}": free}, ())

    free = parameters.free[name]
    assert torch.autograd.gradcheck(ends, free)
    (gradient,) = torch.autograd.grad(ends(free).sum(), free)
    assert gradient.abs().max() > 1e-3
    with torch.no_grad():
        free.add_(1 + torch.arange(free.numel()).reshape(free.shape))
    moved = {
        other for other, entries in table.columns().items() if not entries.equal(getattr(end.solver.table(), other))
    }
    assert moved == {name} - {"grid"}
    assert parameters.sigmas().equal(SIGMAS) == (name != "grid")


def test_what_the_table_lacks_begins_at_its_neutral_value() -> None:
    sigmas = SIGMAS
    ddim = classical_table("ddim", sigmas)
    assert SolverParameters(ddim, sigmas, ["history"]).table().history.equal(torch.zeros(3, 3).double())
    bare = replace(full_table(), scale_dir=None)
    parameters = SolverParameters(bare, sigmas, ["scale_dir"], {"scale_dir": 0.05})
    assert parameters.table().scale_dir.equal(torch.ones(3, 2).double())
    with torch.no_grad():
        parameters.free["scale_dir"].fill_(100.0)
    assert parameters.table().scale_dir.flatten().tolist() == pytest.approx([1.05] * 6)


@pytest.mark.parametrize(("name", "message"), [("grid", "no longer descend"), ("weights", "weights must be finite")])
def test_parameters_that_are_no_numbers_are_refused(name: str, message: str) -> None:
    parameters = SolverParameters(full_table(), SIGMAS, ["grid", "weights"])
    with torch.no_grad():
        parameters.free[name].fill_(torch.nan)
    with pytest.raises(ValueError, match=message):
        parameters.table(), parameters.sigmas()


def test_columns_are_named_in_any_order_and_kept_in_one() -> None:
    assert named_parts("history, grid,positions,grid") == ("positions", "history", "grid")


@pytest.mark.parametrize("text", ["", "grid,", "curvature", "Grid"])
def test_an_unknown_column_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(InputError, match=r"unknown column '.*'; known are positions, weights, scale_dir, .*, grid"):
        named_parts(text)
