"""The picture of an interval: it is what the sampler makes, and ends on the exact solution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from scripts import show_interval
from scripts.show_interval import (
    EARLIER,
    END,
    START,
    WORLD,
    ending_exactly,
    exact,
    interval_figure,
    solve,
    with_history,
    with_points,
)
from solvers import EPDTable


@pytest.mark.parametrize(("sigmas", "table"), [((START, END), with_points), ((EARLIER, START, END), with_history)])
def test_the_number_that_is_drawn_ends_on_the_exact_solution(
    sigmas: tuple[float, ...], table: Callable[[float], EPDTable]
) -> None:
    number = ending_exactly(sigmas, table)
    assert solve(sigmas, table(number)).states[-1] == pytest.approx(exact(END), abs=1e-12)
    assert abs(solve(sigmas, table(0.0)).states[-1] - exact(END)) > 0.05


def test_slopes_are_those_of_the_exact_solution() -> None:
    (sigma, state, slope), *_ = solve((START, END), with_points(0.5)).asked
    assert (sigma, state) == (START, pytest.approx(exact(START)))
    assert slope == pytest.approx((exact(START + 1e-4) - exact(START - 1e-4)) / 2e-4, abs=1e-5)
    assert exact(WORLD.sigma_max) == pytest.approx(show_interval.NOISE * WORLD.sigma_max)


def test_both_pictures_meet_the_exact_solution_at_the_end(tmp_path: Path) -> None:
    for axes in interval_figure().axes:
        drawn = [point for group in axes.collections for point in group.get_offsets().tolist()]
        assert pytest.approx([END, exact(END)], abs=1e-12) in drawn
    result = CliRunner().invoke(show_interval.main, ["--output", str(tmp_path / "interval.png")])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "interval.png").width > 1000
