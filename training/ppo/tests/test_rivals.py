"""What stands beside a tuned solver: the best classical one of those tried, drawn as it itself would draw."""

import dataclasses

import pytest
import torch

import schedules
from errors import InputError
from solvers import EPDTable
from training.ppo import rivals
from training.ppo.heldout import HeldoutJudge, HeldoutScores, HeldoutWatch
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rivals import CLASSICAL, best_classical, reference_images
from training.ppo.rl_runner import RLRunner
from training.ppo.tests.analytic import PROMPTS, Brightness, GaussianDenoiser, brightness, cold_start_table
from training.solver import Schedule, Solver, classical_solver

DENOISER = GaussianDenoiser()
SIGMAS = schedules.get_schedule("logsnr", 3, DENOISER.sigma_min, DENOISER.sigma_max)
START = Solver("start", "epd", 3, table=cold_start_table(), sigmas=SIGMAS, guidance_scale=2.0).on(DENOISER)
GUIDED = dataclasses.replace(
    START,
    guidance_scale=None,
    table=dataclasses.replace(START.table, guidance=torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]]).double()),
)
SEEDS = range(7, 12)


def judge_of(start: Solver, reward: WeightedMix | None = None) -> HeldoutJudge:
    runner = RLRunner(DENOISER, start, reward or brightness(), group_size=2, shared_noise=True, seed=0)
    return HeldoutJudge(runner, None, PROMPTS[:5], first_seed=7, preview_count=2)


def drawn(solver: Solver, guidance: float = 2.0) -> torch.Tensor:
    """Images of the five prompts by the sampler itself."""
    settled = solver.guided(guidance).on(DENOISER)
    return DENOISER.decode(settled.latents(DENOISER, PROMPTS[:5], list(SEEDS)))


@pytest.mark.parametrize("start", [START, GUIDED], ids=["one guidance", "guidance by evaluation"])
def test_the_best_classical_solver_is_the_best_of_those_tried(monkeypatch: pytest.MonkeyPatch, start: Solver):
    monkeypatch.setattr("training.ppo.rivals.SCHEDULES", ("logsnr", "polynomial:5", "discrete"))  # the last suits none
    name, scores = best_classical(judge_of(start), HeldoutWatch(brightness()), start, DENOISER)
    tried = {
        f"{label}, {schedule}, guidance {guidance:.3g}": drawn(classical_solver(label, 7, schedule), guidance)
        for label in CLASSICAL
        for schedule in (Schedule("logsnr", 1.0), Schedule("polynomial", 5.0))
        for guidance in (2.0, 4 / 3, 1.0)
    }
    rewards = {label: Brightness().score(images, PROMPTS[:5]) for label, images in tried.items()}
    assert name == max(rewards, key=lambda label: rewards[label].mean())
    assert len({round(reward.mean().item(), 6) for reward in rewards.values()}) > 1
    torch.testing.assert_close(scores.parts["brightness"], rewards[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.previews, tried[name][:2], rtol=0, atol=1e-5)


def test_a_mix_of_rewards_tells_rivals_apart_before_the_first_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.ppo.rivals.SCHEDULES", ("logsnr", "polynomial:5"))
    mix = WeightedMix({"light": (Brightness(), 1.0), "dark": (Brightness(), -3.0)})
    alone, mixed = HeldoutWatch(WeightedMix({"dark": (Brightness(), -1.0)})), HeldoutWatch(mix)
    judge = judge_of(START, mix)
    expected, scores = best_classical(judge_of(START, alone._reward), alone, START, DENOISER)
    name, found = best_classical(judge, mixed, START, DENOISER)
    assert name == expected
    assert torch.equal(found.parts["dark"], scores.parts["dark"])
    mixed.classical = name, found
    start = judge.judge(START.table, SIGMAS)
    seen = mixed.observe(0, start)
    difference = (start.parts["light"] - found.parts["light"]).mean().item()
    assert seen["heldout/classical_difference"] * difference < 0  # the more light the worse


def test_the_best_few_are_compared_on_all_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.ppo.rivals.SCHEDULES", ("logsnr",))
    monkeypatch.setattr("training.ppo.rivals.CHOSEN_ON", 1)
    monkeypatch.setattr("training.ppo.rivals.GUIDANCES", (1.0,))

    class Turned(HeldoutWatch):
        """The second prompt's reward counts ten times."""

        def _combined(self, scores: HeldoutScores) -> torch.Tensor:
            return super()._combined(scores) * torch.tensor([1.0, 10, 1, 1, 1])[: len(scores.parts["brightness"])]

    rewards = {
        label: Brightness().score(drawn(classical_solver(label, 7, Schedule("logsnr", 1.0))), PROMPTS[:5])
        for label in CLASSICAL
    }
    best = max(rewards, key=lambda label: (rewards[label].sum() + 9 * rewards[label][1]).item())
    assert best != max(rewards, key=lambda label: rewards[label][0])
    name, _ = best_classical(judge_of(START), Turned(brightness()), START, DENOISER)
    assert name == f"{best}, logsnr, guidance 2"


def test_a_schedule_that_begins_lower_is_tried_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.ppo.rivals.SCHEDULES", ())
    monkeypatch.setattr("training.ppo.rivals.LOWER", ("logsnr", 1 / 4))
    name, scores = best_classical(judge_of(START), HeldoutWatch(brightness()), START, DENOISER)
    label, schedule, guidance = name.split(", ")
    assert schedule == f"logsnr@{DENOISER.sigma_max / 4:g}"
    images = drawn(classical_solver(label, 7, Schedule("logsnr", 1.0, DENOISER.sigma_max / 4)), float(guidance[9:]))
    torch.testing.assert_close(scores.previews, images[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("largest", [None, DENOISER.sigma_max / 2])
def test_the_starts_own_schedule_begins_where_the_start_does(monkeypatch: pytest.MonkeyPatch, largest: float | None):
    monkeypatch.setattr("training.ppo.rivals.SCHEDULES", ())
    monkeypatch.setattr("training.ppo.rivals.LOWER", ("polynomial", 1))
    start = dataclasses.replace(
        START, schedule=Schedule("logsnr", 1.0), sigmas=None, sigma_range=(DENOISER.sigma_min, largest)
    ).on(DENOISER)
    own = [solver for solver in rivals._solvers(start, DENOISER, 2) if solver.schedule.schedule_type == "logsnr"]
    assert len(own) == len(CLASSICAL)
    for solver in own:
        assert solver.schedule.first == largest
        torch.testing.assert_close(solver.sigmas, start.sigmas, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("largest", "firsts"), [(None, {None, DENOISER.sigma_max / 4}), (1.0, {None})])
def test_flow_matching_has_no_rival_that_begins_lower(monkeypatch: pytest.MonkeyPatch, largest: float | None, firsts):
    monkeypatch.setattr("training.ppo.rivals.SCHEDULES", ("logsnr",))
    monkeypatch.setattr("training.ppo.rivals.LOWER", ("logsnr", 1 / 4))
    if largest is not None:
        monkeypatch.setattr(GaussianDenoiser, "sigma_max", largest)
    assert {solver.schedule.first for solver in rivals._solvers(START, GaussianDenoiser(), 6)} == firsts


def test_rivals_of_a_start_without_guidance_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.ppo.rivals.SCHEDULES", ("logsnr",))
    start = dataclasses.replace(START, guidance_scale=1.0)
    name, _ = best_classical(judge_of(start), HeldoutWatch(brightness()), start, DENOISER)
    assert name.endswith(", guidance 1")


def test_the_reference_takes_fifty_evaluations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.ppo.rivals.SCHEDULES", ("logsnr",))
    expected = drawn(classical_solver("dpmpp:2", 51, Schedule("logsnr", 1.0)))[:2]
    torch.testing.assert_close(reference_images(judge_of(START), START, DENOISER), expected, rtol=0, atol=1e-5)


def test_a_start_that_leaves_an_evaluation_out_has_none_beside_it():
    start = dataclasses.replace(START, afs=True)
    assert best_classical(judge_of(START), HeldoutWatch(brightness()), start, DENOISER) is None
    assert reference_images(judge_of(START), start, DENOISER) is None


def test_an_unsettled_solver_draws_nothing():
    unsettled = Solver("start", "epd", 3, table=cold_start_table(), sigmas=SIGMAS)
    with pytest.raises(ValueError, match=r"not settled: solver\.on"):
        unsettled.latents(DENOISER, PROMPTS[:1], [0])
    with pytest.raises(InputError, match="leave the guidance out"):
        GUIDED.guided(2.0)


def test_scores_of_the_first_prompts_are_those_of_all():
    judge, table = judge_of(START), EPDTable(START.table.positions * 0.9, START.table.weights)
    few, all_of_them = judge.judge(table, count=3), judge.judge(table)
    torch.testing.assert_close(few.parts["brightness"], all_of_them.parts["brightness"][:3], rtol=0, atol=1e-6)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
