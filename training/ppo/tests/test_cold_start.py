"""Tables to Dirichlet concentrations and back; what is repaired is reported."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from solvers import EPDTable, epd_sampler
from tests import golden
from training.ppo.cold_start import (
    MINIMUM_SHARE,
    concentrations_from_table,
    prepare_table,
    segments_from_positions,
    table_from_concentrations,
)


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_table(seed: int, intervals: int, points: int) -> EPDTable:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(4, intervals, points, generator=generator, dtype=torch.float64)
    return EPDTable(0.01 + 0.98 * draw[0], draw[1].softmax(-1), 0.5 + draw[2], 0.5 + draw[3])


def test_concentrations_of_a_table_by_hand():
    table = EPDTable(tensor([[0.25, 0.75]]), tensor([[0.4, 0.6]]))
    alpha = concentrations_from_table(table, 20.0)
    torch.testing.assert_close(alpha.positions, tensor([[5.0, 10.0, 5.0]]), rtol=0, atol=1e-12)
    torch.testing.assert_close(alpha.weights, tensor([[8.0, 12.0]]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sd15-distilled", "K3S6", "K2S5sc"])
@pytest.mark.parametrize("concentration", [10, 20, 200])
def test_concentrations_agree_with_the_reference(name, concentration):
    table = EPDTable(golden.tensor("policy", f"{name}__r").double(), golden.tensor("policy", f"{name}__w").double())
    alpha = concentrations_from_table(table, concentration)
    key = f"{name}__c{concentration}__"
    torch.testing.assert_close(alpha.positions, golden.tensor("policy", key + "alpha_pos"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alpha.weights, golden.tensor("policy", key + "alpha_weight"), rtol=1e-12, atol=1e-12)
    back = table_from_concentrations(alpha)
    torch.testing.assert_close(back.positions, golden.tensor("policy", key + "roundtrip_r"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back.weights, golden.tensor("policy", key + "roundtrip_w"), rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4), st.floats(0.1, 1000))
@settings(deadline=None, max_examples=50)
def test_table_to_concentrations_and_back(seed, intervals, points, concentration):
    table = prepare_table(random_table(seed, intervals, points)).table
    alpha = concentrations_from_table(table, concentration)
    back = table_from_concentrations(alpha, table.scale_dir, table.scale_time)
    torch.testing.assert_close(back.positions, table.positions, rtol=0, atol=1e-12)
    torch.testing.assert_close(back.weights, table.weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(alpha.positions.sum(-1), torch.full((intervals,), concentration, dtype=torch.float64))


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
    ours = concentrations_from_table(cold_start.table, concentration)
    for row in (0, 5, 6, 7, 8):  # 1 to 4 lie on the peer's threshold, decided there by rounding
        theirs = golden.tensor("policy", "degenerate__alpha_pos")[row]
        torch.testing.assert_close(ours.positions[row], theirs, rtol=1e-9, atol=1e-12)
    for row in (0, 1, 2, 3, 4, 6, 7, 8):
        theirs = golden.tensor("policy", "degenerate__alpha_weight")[row]
        torch.testing.assert_close(ours.weights[row], theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.weights[5], concentration * tensor([1.0, 1e-6]), rtol=1e-5, atol=0)
    assert [line for line in cold_start.repairs if "weights" in line] == [
        "table interval 5: weights raised to 1e-06, the row normalised"
    ]


def test_what_cannot_start_a_policy_is_refused():
    table = EPDTable(tensor([[0.7, 0.2]]), tensor([[0.5, 0.5]]))
    with pytest.raises(InputError, match=r"intervals \[0\]: segments between positions must be positive"):
        concentrations_from_table(table, 20.0)
    with pytest.raises(InputError, match="it must be above 0"):
        concentrations_from_table(prepare_table(table).table, 0.0)
    with pytest.raises(InputError, match="a batch of 3"):
        prepare_table(table.expand(3))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
