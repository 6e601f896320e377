"""The search along the gradient: it is right, the ascent finds what there is, bad images are left out."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch

import schedules
from errors import InputError
from models.denoiser import GuidanceKind
from solvers import EPDTable
from training.parameters import GRID
from training.ppo.cold_start import DRAWN, prepare_table
from training.ppo.config import Config, PPOConfig, SearchConfig
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rl_runner import RLRunner
from training.ppo.rollout import DivergenceError, PromptStream, Scores
from training.ppo.search.reward_gradient import RewardGradient, make_policy, make_search
from training.ppo.tests.analytic import (
    PROMPTS,
    Brightness,
    GaussianDenoiser,
    QuadraticSource,
    brightness,
    cold_start_table,
)
from training.solver import Solver

SIGMAS = schedules.get_schedule("logsnr", 4, GaussianDenoiser.sigma_min, GaussianDenoiser.sigma_max)
IMAGES = 6
TARGET = EPDTable(
    torch.tensor([[0.15, 0.6], [0.45, 0.8]], dtype=torch.float64),
    torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64),
)


def configured(train, *, rate=0.05, **ppo) -> Config:
    settings = PPOConfig(**{"train": list(train), "rollout_batch_size": IMAGES, "steps": 40, **ppo})
    return dataclasses.replace(Config(), ppo=settings, search=SearchConfig("reward_gradient", learning_rate=rate))


def a_search(train=tuple(DRAWN), *, reward=None, denoiser=None, max_rows=None, scale=2.0, **settings) -> RewardGradient:
    """On the closed-form world."""
    config, denoiser = configured(train, **settings), denoiser or GaussianDenoiser()
    table = prepare_table(cold_start_table(3), train, guidance_scale=scale).table
    solver = Solver("start", "epd", 4, table=table, sigmas=SIGMAS).on(denoiser)
    source = RLRunner(
        denoiser,
        solver,
        reward or brightness(),
        group_size=1,
        shared_noise=True,
        seed=1,
        max_rows=max_rows,
        dtype=torch.float64,
    )
    stream = PromptStream(PROMPTS, shuffle=False, seed=0)
    return make_search(make_policy(solver, config), source, stream, config)


def rewards_at(search: RewardGradient) -> float:
    """Of the policy's mean, on the next step's prompts and noise."""
    table, sigmas = search.policy.mean()
    sigmas = None if sigmas is None else sigmas.expand(IMAGES, -1)
    prompts = PromptStream(PROMPTS, shuffle=False, seed=0).take(IMAGES)
    outcome = search.source.roll_out(table.expand(IMAGES), prompts, search.completed_steps, sigmas)
    return search.source.score(outcome).rewards.mean().item()


@pytest.mark.parametrize("max_rows", [None, 7])
def test_the_gradient_is_that_of_finite_differences_in_every_free_parameter(max_rows):
    search = a_search(max_rows=max_rows)
    numbers = search.policy.numbers()
    _, slopes, kept = search._slopes(numbers)
    assert kept.all()
    torch.autograd.backward(list(numbers.values()), [slopes[name] for name in numbers])
    assert set(search.policy.learned) == set(DRAWN)
    for name, free in search.policy.free.items():
        direction = torch.randn(free.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        values = []
        with torch.no_grad():
            start = free.clone()
            for sign in (1, -1):
                free.copy_(start + sign * 0.02 * direction)
                values.append(rewards_at(search))
            free.copy_(start)
        found = (free.grad * direction).sum().item()
        assert abs(found) > 1e-5, name
        assert found == pytest.approx((values[0] - values[1]) / 0.04, rel=0.01, abs=2e-6), name


def test_it_raises_the_reward_and_moves_what_it_trains():
    for train in (("grid",), ("history",), tuple(DRAWN)):
        search = a_search(train, rate=0.1)
        table, sigmas = search.policy.mean()
        before = rewards_at(search)
        rows = [search.step() for _ in range(20)]
        assert rows[-1]["images"] == 20 * IMAGES
        assert rows[0]["learning_rate"] == 0.1 > rows[-1]["learning_rate"]
        assert rewards_at(search) > before
        found, levels = search.policy.mean()
        moved = {name for name, part in found.columns().items() if not torch.equal(part, getattr(table, name))}
        assert moved | ({GRID} if levels is not None and not torch.equal(levels, sigmas) else set()) == set(train)


def test_it_finds_the_optimum_of_a_quadratic_in_the_table():
    config = configured(("positions", "weights"), rate=0.1, steps=200)
    policy = make_policy(Solver("start", "epd", 3, table=cold_start_table()), config)
    stream = PromptStream(PROMPTS, shuffle=True, seed=0)
    search = RewardGradient(policy, QuadraticSource(TARGET, 1), stream, config.ppo, learning_rate=0.1)
    for _ in range(200):
        search.step()
    table, _ = policy.mean()
    torch.testing.assert_close(table.positions, TARGET.positions, rtol=0, atol=2e-3)
    torch.testing.assert_close(table.weights, TARGET.weights, rtol=0, atol=2e-3)


def test_a_resumed_search_is_the_search_that_never_stopped():
    whole = a_search()
    for _ in range(3):
        whole.step()
    resumed = a_search()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for _ in range(2):
        rows = [{k: v for k, v in each.step().items() if not k.startswith("seconds")} for each in (whole, resumed)]
        assert rows[0] == rows[1]
    for name, free in whole.policy.state_dict().items():
        assert torch.equal(free, resumed.policy.state_dict()[name])


class Exploding(GaussianDenoiser):
    """Gives no numbers for the prompts whose mean is in the way."""

    def decode(self, latents, chunk_size=16):
        self.lost = (torch.arange(len(latents)) % 3 == 0)[:, None, None, None]
        return super().decode(latents, chunk_size).masked_fill(self.lost, torch.nan)


def test_images_that_are_no_numbers_are_left_out_of_the_gradient():
    search = a_search(("weights",), denoiser=Exploding())
    row = search.step()
    assert row["dropped_groups"] == 2
    assert all(free.isfinite().all() for free in search.policy.parameters())
    with pytest.raises(DivergenceError, match=r"step 1: the rewards of 33% of the images.*max_nonfinite_share=0\.2"):
        a_search(("weights",), denoiser=Exploding(), max_nonfinite_share=0.2).step()


class SteepSource(QuadraticSource):
    """The reward of the first image is finite, and its gradient is not."""

    def score(self, outcome):
        scores = super().score(outcome)
        steep = (outcome[0].positions[0, 0, 0] - outcome[0].positions[0, 0, 0].detach()).sqrt()
        return Scores(scores.rewards + torch.cat([steep[None], torch.zeros(IMAGES - 1)]), scores.parts)


def test_images_whose_gradient_is_not_finite_are_left_out():
    config = configured(("positions", "weights"))
    policy = make_policy(Solver("start", "epd", 3, table=cold_start_table()), config)
    stream = PromptStream(PROMPTS, shuffle=True, seed=0)
    search = RewardGradient(policy, SteepSource(TARGET, 1), stream, config.ppo, learning_rate=0.1)
    assert search.step()["dropped_groups"] == 1
    assert all(free.isfinite().all() for free in policy.parameters())


def test_too_wide_a_step_and_too_little_memory_are_told():
    with pytest.raises(DivergenceError, match="step 1: the table is none any more"):
        a_search(("history",), rate=float("inf")).step()
    search = a_search(("weights",))

    def full(*args):
        raise torch.OutOfMemoryError

    search.source.roll_out = full
    with pytest.raises(InputError, match=r"lower ppo\.max_rows"):
        search.step()


def test_a_guidance_without_a_gradient_is_refused():
    with pytest.raises(InputError, match="the start has a scale of exactly 1"):
        a_search(("guidance",), scale=1.0)


def test_a_guidance_that_the_network_is_told_has_a_gradient_everywhere():
    told = GaussianDenoiser()
    told.guidance = GuidanceKind.EMBEDDED
    search = a_search(("guidance",), scale=1.0, denoiser=told)
    search.step()
    assert (search.policy.mean()[0].guidance != 1).all()


class Flat(Brightness):
    name = "flat"

    def score(self, images, prompts):
        return images.detach().mean((1, 2, 3))


class Numpy(Brightness):
    name = "numpy"

    def score(self, images, prompts):
        return torch.from_numpy(images.numpy().mean((1, 2, 3)))


@pytest.mark.parametrize("judge", [Flat(), Numpy()])
def test_a_reward_without_a_gradient_is_refused_in_a_line(judge):
    with pytest.raises(InputError, match=f"^search.method=reward_gradient: .*reward {judge.name}.*") as caught:
        a_search(("weights",), reward=WeightedMix({"brightness": (Brightness(), 1.0), judge.name: (judge, 0.5)}))
    assert "\n" not in str(caught.value)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
