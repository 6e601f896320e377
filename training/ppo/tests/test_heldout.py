"""The held-out watch: paired differences, the best table, suspected hacking, scores that are not finite, processes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import schedules
from errors import InputError
from models.shapes.scenes import captions, parse, render
from solvers import EPDTable
from training.measuring.evaluation import Store
from training.ppo.heldout import HELDOUT_METRICS, HeldoutJudge, HeldoutScores, HeldoutWatch, Kept
from training.ppo.panels import VerifierPanel, require_verifiable
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rl_runner import RLRunner, Shard
from training.ppo.rollout import DivergenceError
from training.ppo.tests.analytic import (
    PROMPTS,
    Brightness,
    GaussianDenoiser,
    brightness,
    cold_start_table,
    in_two_processes,
)
from training.solver import Solver

COUNT = 40
OTHER = EPDTable(
    torch.tensor([[0.1, 0.2], [0.1, 0.2]], dtype=torch.float64), torch.tensor([[0.9, 0.1]] * 2, dtype=torch.float64)
)


def scores(reward: Tensor, panel: Tensor | None = None) -> HeldoutScores:
    return HeldoutScores({"brightness": reward}, panel, torch.empty(0, 3, 2, 2))


def noise(seed: int, scale: float = 0.01) -> Tensor:
    """Spread around a mean of exactly 0."""
    values = torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))
    return scale * (values - values.mean())


def started(panel: bool = True) -> tuple[HeldoutWatch, Tensor]:
    watch, base = HeldoutWatch(brightness()), torch.linspace(0, 5, COUNT)  # prompts differ far more than tables do
    watch.observe(0, scores(base, base if panel else None))
    return watch, base


def source(shard: Shard | None = None) -> RLRunner:
    sigmas = schedules.get_schedule("logsnr", 3, GaussianDenoiser.sigma_min, GaussianDenoiser.sigma_max)
    solver = Solver("epd", "epd", 3, table=cold_start_table(), sigmas=sigmas).on(GaussianDenoiser())
    return RLRunner(GaussianDenoiser(), solver, brightness(), group_size=2, shared_noise=True, seed=0, shard=shard)


def judge(shard: Shard | None = None) -> HeldoutJudge:
    runner = source(shard)
    return HeldoutJudge(runner, Brightness(), PROMPTS[:5], first_seed=7, preview_count=2)


def test_the_classical_solver_beside_it_is_paired_and_outlives_a_checkpoint():
    watch, base = HeldoutWatch(brightness()), torch.linspace(0, 5, COUNT)
    lost = base + 0.5
    lost[3] = torch.nan
    watch.classical = ("ddim, discrete", scores(lost))
    watch.observe(0, scores(base))
    resumed = HeldoutWatch(brightness())
    resumed.load_state_dict(watch.state_dict(), COUNT)
    for seen in (watch, resumed):
        metrics = seen.observe(5, scores(base + 0.6))
        assert metrics["heldout/classical_difference"] == pytest.approx(0.1, abs=1e-6)
        assert metrics["heldout/classical"] == pytest.approx((lost.nansum() / (COUNT - 1)).item(), abs=1e-6)
        assert metrics["heldout/dropped"] == 0
    assert watch.mean_reward(watch.classical[1]) == pytest.approx(metrics["heldout/classical"])
    assert {name.removesuffix("_low").removesuffix("_high") for name in metrics} <= HELDOUT_METRICS.keys()


def test_the_panel_judges_the_classical_solver_too():
    watch, base = started()
    lost = base - 0.3
    lost[3] = torch.nan
    watch.classical = ("ddim, discrete", scores(base + 0.1, lost))
    metrics = watch.observe(5, scores(base + 0.6, base + noise(1)))
    assert metrics["heldout/classical_difference"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["heldout/classical_panel"] == pytest.approx((lost.nansum() / (COUNT - 1)).item(), abs=1e-6)
    paired = (base + noise(1) - lost)[lost.isfinite()].mean().item()
    assert metrics["heldout/classical_panel_difference"] == pytest.approx(paired, abs=1e-6)
    assert (
        metrics["heldout/classical_panel_difference_low"] < paired < metrics["heldout/classical_panel_difference_high"]
    )


def kept_judge(folder: Path, says: str = "", **settings) -> tuple[HeldoutJudge, list[int]]:
    """A run's judge, and the rows of the network's calls."""
    runner = source()
    settings = {"prompts": PROMPTS[:5], "first_seed": 7, "preview_count": 2} | settings
    kept = Kept(Store(folder, pytest.fail), lambda table, sigmas: {"run": says, "positions": table.positions.tolist()})
    return HeldoutJudge(runner, Brightness(), kept=kept, **settings), runner.denoiser.rows


def test_what_runs_have_in_common_is_judged_once(tmp_path: Path):
    (one, rows), (other, spared) = kept_judge(tmp_path), kept_judge(tmp_path)
    sigmas = schedules.get_schedule("logsnr", 3, 0.1, 10)
    for count in (9, None, 3):  # 9: of five prompts all
        found, again = one.judge_once(OTHER, count=count), other.judge_once(OTHER, count=count)
        plain = judge().judge(OTHER, count=count)
        for told in (found, again):
            assert torch.equal(told.parts["brightness"], plain.parts["brightness"])
            assert torch.equal(told.panel, plain.panel)
            assert torch.equal(told.previews, plain.previews[: 0 if count else 2])
    assert torch.equal(one.previews(OTHER, sigmas), other.previews(OTHER, sigmas))
    assert rows
    assert not spared
    other.judge(OTHER)  # of a table on the way
    assert spared


def test_what_runs_do_not_have_in_common_is_judged_anew(tmp_path: Path):
    kept_judge(tmp_path)[0].judge_once(OTHER)
    changes = ({"says": "another model"}, {"prompts": PROMPTS[1:6]}, {"first_seed": 8}, {"preview_count": 1})
    for changed in changes:
        anew, rows = kept_judge(tmp_path, **changed)
        anew.judge_once(OTHER)
        assert rows, changed
    anew, rows = kept_judge(tmp_path)
    anew.judge_once(cold_start_table())
    assert rows


def test_a_folder_that_takes_nothing_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("in the folder's place")
    scores = kept_judge(tmp_path / "file")[0].judge_once(OTHER)
    assert torch.equal(scores.panel, judge().judge(OTHER).panel)
    assert "held-out scores are not kept for other runs" in caplog.text


def test_differences_are_paired():
    watch, base = started()
    metrics = watch.observe(5, scores(base + 0.02 + noise(1), base + noise(2)))
    expected = (0.02 + noise(1)).mean().item()
    assert metrics["heldout/reward_difference"] == pytest.approx(expected, abs=1e-6)
    assert metrics["heldout/reward"] - metrics["heldout/reward_start"] == pytest.approx(expected, abs=1e-6)
    half_width = 1.96 * (0.01 / math.sqrt(COUNT))
    assert metrics["heldout/reward_difference_high"] == pytest.approx(expected + half_width, abs=0.3 * half_width)
    assert metrics["heldout/reward_difference_low"] == pytest.approx(expected - half_width, abs=0.3 * half_width)


def test_metrics_are_the_documented_ones():
    watch, base = started()
    watch.classical = ("ddim, discrete", scores(base, base))
    named = {name.removesuffix("_low").removesuffix("_high") for name in watch.observe(1, scores(base, base))}
    assert named == HELDOUT_METRICS.keys()
    watch, base = started(panel=False)
    assert not any("panel" in name for name in watch.observe(1, scores(base)))


@pytest.mark.parametrize(
    ("reward", "panel", "suspected"), [(0.05, -0.05, 1), (0.05, 0.05, 0), (-0.05, -0.05, 0), (0.05, 0.0, 0)]
)
def test_hacking_is_a_rising_reward_with_a_falling_panel(reward: float, panel: float, suspected: int):
    watch, base = started()
    metrics = watch.observe(3, scores(base + reward + noise(1), base + panel + noise(2)))
    assert metrics["heldout/suspected_reward_hacking"] == suspected


def test_best_is_the_highest_reward_that_the_panel_does_not_find_worse():
    watch, base = started()
    for step, reward, panel in ((1, 0.01, 0.0), (2, 0.05, -0.2), (3, 0.03, 0.1), (4, 0.02, 0.1)):
        metrics = watch.observe(step, scores(base + reward, base + panel + noise(step)))
    assert (watch.best_step, metrics["heldout/best_step"]) == (3, 3)


def test_a_worse_table_is_never_the_best():
    watch, base = started(panel=False)
    assert watch.observe(1, scores(base - 0.01))["heldout/best_step"] == 0


def test_images_without_finite_scores_are_left_out_and_counted():
    watch, base = started()
    broken = base + 0.1
    broken[3], broken[5] = torch.nan, torch.inf
    metrics = watch.observe(1, scores(broken, base))
    assert metrics["heldout/dropped"] == 2
    assert metrics["heldout/reward_difference"] == pytest.approx(0.1, abs=1e-6)
    with pytest.raises(DivergenceError, match="step 2: 40 of 40 held-out images"):
        watch.observe(2, scores(torch.full_like(base, torch.nan), base))


@pytest.mark.parametrize(("lost", "best_step"), [(1, 1), (20, 0)])
def test_a_table_that_loses_images_is_no_better_for_it(lost: int, best_step: int):
    watch, base = started()
    reward = base + 0.2
    reward[COUNT - lost :] = torch.nan  # 0.2 * 39 gained by the others, and 5 lost at most, or some 80
    assert watch.observe(1, scores(reward, base))["heldout/best_step"] == best_step


def test_scores_that_come_to_more_than_a_number_can_hold_are_left_out():
    parts = {"brightness": torch.linspace(0, 5, COUNT), "other": torch.linspace(0, 5, COUNT)}
    watch = HeldoutWatch(WeightedMix({name: (Brightness(), 1e300) for name in parts}))
    with pytest.raises(DivergenceError, match="of 40 held-out images have scores"):
        watch.observe(0, HeldoutScores(parts, None, torch.empty(0, 3, 2, 2)))


def test_resumed_watch_goes_on_as_if_never_stopped():
    watch, base = started()
    watch.observe(1, scores(base + 0.2, base))
    resumed = HeldoutWatch(brightness())
    resumed.load_state_dict(watch.state_dict(), COUNT)
    following = scores(base + 0.1 + noise(1), base + noise(2))
    assert resumed.observe(2, following) == watch.observe(2, following)
    assert resumed.best_step == 1


def test_both_tables_of_a_mix_are_combined_with_the_same_statistics():
    mix = WeightedMix({"one": (Brightness(), 1.0), "two": (Brightness(), 1.0)})
    watch, base = HeldoutWatch(mix), torch.linspace(0, 1, COUNT)
    watch.observe(0, HeldoutScores({"one": base, "two": base}, None, torch.empty(0)))
    mix.observe({"one": 3 + 2 * base, "two": 10 * base})  # training moves the statistics on
    metrics = watch.observe(1, HeldoutScores({"one": base + 0.1, "two": base + 0.1}, None, torch.empty(0)))
    deviation = base.std().item()
    assert metrics["heldout/reward_difference"] == pytest.approx(
        0.1 / (2 * deviation) + 0.1 / (10 * deviation), rel=1e-4
    )


def test_judging_is_repeatable_and_leaves_the_reward_alone():
    first, again = judge().judge(cold_start_table()), judge()
    again.judge(OTHER)
    repeated = again.judge(cold_start_table())
    assert torch.equal(first.parts["brightness"], repeated.parts["brightness"])
    assert torch.equal(first.panel, first.parts["brightness"])
    assert first.previews.shape == (2, 3, 2, 2)
    assert not torch.equal(first.parts["brightness"], again.judge(OTHER).parts["brightness"])
    runner = source()
    HeldoutJudge(runner, None, PROMPTS[:4], first_seed=0, preview_count=0).judge(OTHER)
    assert runner.reward.state_dict() == brightness().state_dict()


def test_processes_share_the_work_and_all_see_all_scores():
    whole = judge().judge(OTHER)
    for seen in in_two_processes(lambda shard: judge(shard).judge(OTHER)):
        # five prompts over two processes: the last one is filled up
        torch.testing.assert_close(seen.parts["brightness"], whole.parts["brightness"], rtol=0, atol=1e-6)
        torch.testing.assert_close(seen.panel, whole.panel, rtol=0, atol=1e-6)


def test_verifier_panel_scores_the_share_of_the_caption_that_holds():
    right, wrong = captions("train", 2, seed=0, numbers_of_objects=[1])
    image = render(parse(right), np.random.default_rng(0))
    graded = VerifierPanel().score(torch.stack([image, image]), [right, wrong])
    assert graded[0] == 1.0
    assert graded[1] < 1


def test_images_of_a_size_that_the_verifier_does_not_know_are_refused_before_they_are_drawn():
    with pytest.raises(InputError, match="judges images of 64 x 64 pixels, and model gaussian is to draw 2 x 2: leave"):
        require_verifiable(GaussianDenoiser())


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
