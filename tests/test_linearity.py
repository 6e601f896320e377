"""The benchmark of an RL step's growth: its lines, and that each sweep asks for what it says."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from benchmarks import gpu_hour, linearity
from benchmarks.linearity import Line
from training.ppo.tests.tiny_world import write_world


@pytest.fixture
def tiny_model(tmp_path, monkeypatch) -> str:
    folder = write_world(tmp_path).parent
    monkeypatch.setitem(gpu_hour.REWARDS, str(folder / "model"), folder / "reward.pt")
    return str(folder / "model")


def test_a_line_is_found_and_what_bends_is_off_it():
    amounts = (8, 16, 24, 32)
    line = Line.through(amounts, [0.5 + 0.25 * amount for amount in amounts])
    assert line == pytest.approx((0.5, 0.25, 0.0))
    # The line nearest to squares at 1, 2, 3, 4 is 5 n - 5: off by 1 of 1, 1 of 4, 1 of 9 and 1 of 16.
    assert Line.through((1, 2, 3, 4), [1.0, 4.0, 9.0, 16.0]) == pytest.approx((-5, 5, 1.0))


def test_each_sweep_changes_one_amount_and_takes_that_many(tiny_model, monkeypatch):
    taken, forgotten = [], []
    made = linearity.trainer_of
    monkeypatch.setattr(gpu_hour, "forget_peak", lambda: forgotten.append(len(taken)))

    def counted(world, intervals, points, *, compiled):
        search = made(world, intervals, points, compiled=compiled)
        table = search.source.solver.table
        taken.append((world.size.images, table.num_intervals, table.num_points))
        return search

    monkeypatch.setattr(linearity, "trainer_of", counted)
    monkeypatch.setattr(linearity, "BASE", {"images": 4, "intervals": 2, "points": 1})
    monkeypatch.setattr(linearity, "SWEEPS", {"images": (4, 8), "intervals": (2, 3), "points": (1, 2)})
    arguments = ["--model", tiny_model, "--device", "cpu", "--repeats", "1"]
    result = CliRunner().invoke(linearity.main, arguments, catch_exceptions=False)
    assert forgotten == list(range(7))  # else what one place held would be shown of all after it
    assert taken[1:] == [(4, 2, 1), (8, 2, 1), (4, 2, 1), (4, 3, 1), (4, 2, 1), (4, 2, 2)]
    assert result.output.count("at most 0.0% off the line") == 3  # through two places there always is one
