"""Solvers to the parameters of distributions and back; what is repaired is reported."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from schedules import log_gaps
from solvers import COLUMNS, EPDTable, classical_table, epd_sampler
from tests import golden
from training.parameters import GRID, segments_from_positions
from training.ppo.cold_start import (
    DRAWN,
    MINIMUM_SHARE,
    TRAINED,
    prepare_table,
    trainable,
)


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_table(seed: int, intervals: int, points: int) -> EPDTable:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(4, intervals, points, generator=generator, dtype=torch.float64)
    return EPDTable(0.01 + 0.98 * draw[0], draw[1].softmax(-1), 0.5 + draw[2], 0.5 + draw[3])


def distribution_of(name: str, entries: torch.Tensor, spread: float):
    """The distribution whose mean these entries are."""
    parameters = DRAWN[name].parameters(entries, spread)
    return DRAWN[name].distribution(parameters, torch.zeros_like(parameters))


def back(name: str, entries: torch.Tensor, spread: float) -> torch.Tensor:
    """The entries that the mean of that distribution is."""
    return DRAWN[name].part.entries(distribution_of(name, entries, spread).mean(), entries)


def test_every_column_and_the_grid_are_declared():
    assert set(DRAWN) == {column.name for column in COLUMNS} | {GRID}


def test_concentrations_by_hand():
    alpha = distribution_of("positions", tensor([[0.25, 0.75]]), 20.0).alpha
    torch.testing.assert_close(alpha, tensor([[5.0, 10.0, 5.0]]), rtol=0, atol=1e-12)
    alpha = distribution_of("weights", tensor([[0.4, 0.6]]), 20.0).alpha
    torch.testing.assert_close(alpha, tensor([[8.0, 12.0]]), rtol=0, atol=1e-12)
    alpha = distribution_of(GRID, tensor([8.0, 4.0, 1.0, 0.5]), 40.0).alpha  # gaps of 1, 2 and 1 of 4 octaves
    torch.testing.assert_close(alpha, tensor([[10.0, 20.0, 10.0]]), rtol=0, atol=1e-12)


def test_locations_by_hand():
    guidance = distribution_of("guidance", tensor([[7.5, 1.0]]), 0.2)
    torch.testing.assert_close(guidance.loc, tensor([[7.5, 1.0]]).log() - 0.02, rtol=0, atol=1e-12)
    torch.testing.assert_close(guidance.log_std.exp(), tensor([[0.2, 0.2]]), rtol=0, atol=1e-12)
    history = distribution_of("history", tensor([[0.0, 0.0, 0.0], [-0.5, 0.0, 0.0], [0.25, 0.75, 0.0]]), 0.1)
    torch.testing.assert_close(history.loc, tensor([[-0.5, 0.25, 0.75]]), rtol=0, atol=0)
    torch.testing.assert_close(history.log_std.exp(), tensor([[0.1, 0.1, 0.1]]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sd15-distilled", "K3S6", "K2S5sc"])
@pytest.mark.parametrize("concentration", [10, 20, 200])
def test_concentrations_agree_with_the_reference(name, concentration):
    for column, short in (("positions", "pos"), ("weights", "weight")):
        entries = golden.tensor("policy", f"{name}__{short[0] if short[0] == 'w' else 'r'}").double()
        alpha = distribution_of(column, entries, concentration).alpha
        key = f"{name}__c{concentration}__"
        stored = golden.tensor("policy", key + f"alpha_{short}")
        torch.testing.assert_close(alpha, stored, rtol=1e-12, atol=1e-12)
        stored = golden.tensor("policy", key + f"roundtrip_{'w' if column == 'weights' else 'r'}")
        torch.testing.assert_close(back(column, entries, concentration), stored, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4), st.floats(0.1, 1000))
@settings(deadline=None, max_examples=50)
def test_to_concentrations_and_back(seed, intervals, points, concentration):
    table = prepare_table(random_table(seed, intervals, points)).table
    sigmas = (4 * torch.rand(intervals + 1, generator=torch.Generator().manual_seed(seed)).double()).cumsum(0)
    sigmas = (sigmas + 0.01).flip(0)
    for name, entries in (("positions", table.positions), ("weights", table.weights), (GRID, sigmas)):
        torch.testing.assert_close(back(name, entries, concentration), entries, rtol=1e-12, atol=1e-12)
        alpha = distribution_of(name, entries, concentration).alpha
        torch.testing.assert_close(alpha.sum(-1), torch.full_like(alpha[:, 0], concentration))
    assert log_gaps(sigmas).sum().item() == pytest.approx(1)


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_sorting_a_table_does_not_change_what_the_solver_does(seed, points):
    table = random_table(seed, 3, points)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sigmas = tensor([5.0, 2.0, 0.8, 0.1])

    def denoise(x, sigma):
        return x.tanh() / (1 + sigma.to(x).reshape(-1, 1, 1, 1))

    prepared = prepare_table(table).table
    assert (segments_from_positions(prepared.positions) > 0).all()
    torch.testing.assert_close(
        epd_sampler(denoise, x, sigmas, prepared), epd_sampler(denoise, x, sigmas, table), rtol=1e-4, atol=1e-4
    )


def test_a_table_in_order_is_left_alone():
    table = EPDTable(
        tensor([[0.2, 0.7], [0.3, 0.4]]), tensor([[0.5, 0.5], [0.1, 0.9]]), scale_dir=tensor([[1, 2], [3, 4]])
    )
    cold_start = prepare_table(table)
    assert cold_start.repairs == ()
    assert torch.equal(cold_start.table.positions, table.positions)
    torch.testing.assert_close(cold_start.table.weights, table.weights, rtol=0, atol=1e-15)
    assert torch.equal(cold_start.table.scale_dir, table.scale_dir)
    assert cold_start.table.scale_time is None


def test_a_disordered_row_is_sorted_with_its_weights_and_scales_and_reported():
    table = EPDTable(
        tensor([[0.2, 0.7], [0.6, 0.1]]),
        tensor([[0.5, 0.5], [0.3, 0.7]]),
        scale_dir=tensor([[1.0, 1.1], [1.2, 1.3]]),
        scale_time=tensor([[0.9, 0.8], [0.7, 0.6]]),
    )
    cold_start = prepare_table(table)
    assert cold_start.table.positions.tolist() == [[0.2, 0.7], [0.1, 0.6]]
    assert cold_start.table.weights.tolist() == [[0.5, 0.5], [0.7, 0.3]]
    assert cold_start.table.scale_dir.tolist() == [[1.0, 1.1], [1.3, 1.2]]
    assert cold_start.table.scale_time.tolist() == [[0.9, 0.8], [0.6, 0.7]]
    assert cold_start.repairs == (
        "table interval 1: positions were not increasing: sorted together with weights and scales",
    )


def test_coinciding_positions_and_zero_weights_are_moved_by_the_least_and_reported():
    cold_start = prepare_table(EPDTable(tensor([[0.5, 0.5], [0.2, 0.4]]), tensor([[0.5, 0.5], [0.0, 1.0]])))
    torch.testing.assert_close(cold_start.table.positions, tensor([[0.5, 0.5 + MINIMUM_SHARE], [0.2, 0.4]]))
    torch.testing.assert_close(cold_start.table.weights, tensor([[0.5, 0.5], [1e-6, 1.0]]), rtol=0, atol=2e-6)
    assert cold_start.table.weights[1, 0] > 9e-7
    assert len(cold_start.repairs) == 2
    assert "interval 0: positions moved" in cold_start.repairs[0]
    assert "interval 1: weights raised" in cold_start.repairs[1]


@pytest.mark.parametrize("name", ["sanitize_00036", "sanitize_synth"])
def test_ordering_agrees_with_the_reference(name):
    def stored(field):
        return golden.tensor("policy", f"{name}__{field}").double()

    has_scale = f"{name}__scale_dir_in" in golden.arrays("policy")
    # The reference also holds positions of exactly 0 and 1, which no table can have: they are brought just inside.
    cold_start = prepare_table(
        EPDTable(stored("r_in").clamp(1e-12, 1 - 1e-12), stored("w_in"), stored("scale_dir_in") if has_scale else None)
    )
    weights = stored("w_out")
    torch.testing.assert_close(cold_start.table.positions, stored("r_out"), rtol=0, atol=1e-12)
    torch.testing.assert_close(cold_start.table.weights, weights / weights.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    if has_scale:
        torch.testing.assert_close(cold_start.table.scale_dir, stored("scale_dir_out"), rtol=0, atol=1e-12)
    for field, what in (("reordered_rows", "not increasing"), ("adjusted_rows", "moved")):
        reported = [any(f"interval {row}:" in line and what in line for line in cold_start.repairs) for row in range(9)]
        assert reported == golden.tensor("policy", f"{name}__{field}").tolist()


def test_where_the_reference_falls_back_to_uniform_ours_stays_at_the_table():
    """The peer replaces a row with a zero weight by equal weights; here it is raised by 1e-6 and reported."""
    table = EPDTable(golden.tensor("policy", "degenerate__r"), golden.tensor("policy", "degenerate__w"))
    concentration = golden.tensor("policy", "degenerate__concentration").item()
    cold_start = prepare_table(table)
    ours = {name: distribution_of(name, getattr(cold_start.table, name), concentration).alpha for name in TRAINED}
    for row in (0, 5, 6, 7, 8):  # 1 to 4 lie on the peer's threshold, decided there by rounding
        theirs = golden.tensor("policy", "degenerate__alpha_pos")[row]
        torch.testing.assert_close(ours["positions"][row], theirs, rtol=1e-9, atol=1e-12)
    for row in (0, 1, 2, 3, 4, 6, 7, 8):
        theirs = golden.tensor("policy", "degenerate__alpha_weight")[row]
        torch.testing.assert_close(ours["weights"][row], theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["weights"][5], concentration * tensor([1.0, 1e-6]), rtol=1e-5, atol=0)
    assert [line for line in cold_start.repairs if "weights" in line] == [
        "table interval 5: weights raised to 1e-06, the row normalised"
    ]


def test_what_cannot_start_a_policy_is_refused():
    table = EPDTable(tensor([[0.7, 0.2]]), tensor([[0.5, 0.5]]))
    with pytest.raises(InputError, match=r"names positions, .* in interval 0 it is -0\.5: it must be above 0"):
        distribution_of("positions", table.positions, 20.0)
    with pytest.raises(InputError, match="a batch of 3"):
        prepare_table(table.expand(3))
    with pytest.raises(InputError, match=r"names 'sigmas'; known are positions, .*, grid"):
        prepare_table(table, ("sigmas",))
    with pytest.raises(InputError, match=r"names guidance, .* set model\.guidance_rate"):
        prepare_table(table, ("guidance",))
    for zero in (
        prepare_table(table, guidance_scale=0.0).table,
        replace(table, guidance=tensor([[7.5, 0.0, 1.0]])),
    ):
        with pytest.raises(InputError, match=r"names guidance, .* in interval 0 it is 0: it must be above 0; leave it"):
            prepare_table(zero, ("guidance",), guidance_scale=0.0)
    none = classical_table("ddim", tensor([4.0, 2.0, 1.0]))
    with pytest.raises(
        InputError, match=r"train=\[positions, weights\]: .* num_points 0; name some of guidance, history"
    ):
        prepare_table(none)


# --- columns that are to be trained -----------------------------------------------------------------------------------


def test_columns_that_the_start_lacks_begin_where_they_change_nothing():
    table = EPDTable(tensor([[0.2, 0.7], [0.3, 0.4]]), tensor([[0.5, 0.5], [0.1, 0.9]]))
    cold_start = prepare_table(table, tuple(DRAWN), guidance_scale=7.5)
    assert cold_start.repairs == (
        "scale_dir is new in the table and begins at 1 everywhere",
        "scale_time is new in the table and begins at 1 everywhere",
        "guidance is new in the table and begins at 7.5 everywhere",
        "history is new in the table and begins at 0 everywhere",
        "direction_history is new in the table and begins at 0 everywhere",
    )
    assert torch.equal(cold_start.table.guidance, torch.full((2, 3), 7.5).double())
    assert torch.equal(cold_start.table.history, torch.zeros(2, 2).double())
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = tensor([5.0, 2.0, 0.8])

    def denoise(x, sigma, guidance=None):
        guidance = torch.full_like(sigma.expand(len(x)), 7.5) if guidance is None else guidance
        return x.tanh() * guidance.to(x).reshape(-1, 1, 1, 1) / (1 + sigma.to(x).reshape(-1, 1, 1, 1))

    with_columns, without = (epd_sampler(denoise, x, sigmas, each) for each in (cold_start.table, table))
    torch.testing.assert_close(with_columns, without, rtol=0, atol=1e-14)


def test_columns_that_are_not_trained_stay_as_they_are():
    """Not even what a Dirichlet could not be centred on is changed."""
    table = EPDTable(
        tensor([[0.7, 0.2], [0.5, 0.5]]), tensor([[0.0, 1.0], [0.3, 0.7]]), guidance=tensor([[0.0, 1.0, 2.0]] * 2)
    )
    cold_start = prepare_table(table, ("history", GRID))
    assert cold_start.repairs == ("history is new in the table and begins at 0 everywhere",)
    for name, entries in table.columns().items():
        assert torch.equal(getattr(cold_start.table, name), entries)


def test_weights_alone_leave_the_points_where_they_are():
    table = EPDTable(tensor([[0.7, 0.2]]), tensor([[0.0, 1.0]]))
    cold_start = prepare_table(table, ("weights",))
    assert cold_start.table.positions.tolist() == [[0.7, 0.2]]
    assert cold_start.repairs == ("table interval 0: weights raised to 1e-06, the row normalised",)


def test_what_cannot_vary_is_said():
    one = EPDTable(tensor([[0.5]]), tensor([[1.0]]))
    size = "nothing of it can vary in a table with num_steps 2 and num_points 1"
    assert prepare_table(one, ("positions", "weights", "history", GRID)).repairs == (
        f"ppo.train: weights is left out, {size}",
        f"ppo.train: history is left out, {size}",
        f"ppo.train: grid is left out, {size}",
    )
    none = classical_table("ipndm", tensor([4.0, 2.0, 1.0]))
    assert trainable(none, tuple(DRAWN)) == ("guidance", "history", "direction_history", GRID)
    cold_start = prepare_table(none, tuple(DRAWN), guidance_scale=1.0)
    assert [line.split(" is left")[0] for line in cold_start.repairs if "left out" in line] == [
        f"ppo.train: {name}" for name in ("positions", "weights", "scale_dir", "scale_time")
    ]
    assert cold_start.table.scale_dir is None


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
