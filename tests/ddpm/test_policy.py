from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from errors import InputError
from tests.ddpm.tiny_ddpm import SCHEDULER, SHAPE, tiny_model, tiny_policy
from training.ddpm.policy import DDIMSteps, DenoisingPolicy, StepDistribution
from training.ddpm.rollout import roll_out, sample_images, seeds_of


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_every_step_is_the_ddim_step_of_diffusers(tmp_path, eta, clip):
    model = tiny_model(tmp_path / "ddpm", clip_sample=clip)
    policy = tiny_policy(model, 5, eta)
    scheduler = DDIMScheduler(**SCHEDULER | {"clip_sample": clip}, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(5)
    assert policy.steps.timesteps == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, *SHAPE, generator=generator) for _ in range(2))
    for step, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            ours = policy(x, step)
            output = model.network(x, timestep).sample
        theirs = scheduler.step(
            output, timestep, x, eta=eta, use_clipped_model_output=True, variance_noise=noise
        ).prev_sample
        torch.testing.assert_close(ours.sample(noise), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
def test_with_eta_one_and_all_steps_it_is_the_posterior_of_the_ddpm(tmp_path, clip):
    model = tiny_model(tmp_path / "ddpm", clip_sample=clip)
    policy = tiny_policy(model, SCHEDULER["num_train_timesteps"])
    scheduler = DDPMScheduler(**SCHEDULER | {"clip_sample": clip})
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for step in (0, 40, 98):
        timestep = policy.steps.timesteps[step]
        with torch.no_grad():
            ours, output = policy(x, step), model.network(x, timestep).sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        theirs = scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(1)).prev_sample
        torch.testing.assert_close(ours.sample(noise), theirs, rtol=1e-4, atol=1e-4)


def test_log_prob_and_kl_are_those_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    one, other, state = (torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    ours, second = StepDistribution(one, 0.7), StepDistribution(other, 0.7)
    theirs, their_second = torch.distributions.Normal(one, 0.7), torch.distributions.Normal(other, 0.7)
    torch.testing.assert_close(ours.log_prob(state), theirs.log_prob(state).sum((1, 2, 3)))
    torch.testing.assert_close(ours.kl(second), torch.distributions.kl_divergence(theirs, their_second).sum((1, 2, 3)))


def test_the_deviation_is_the_posterior_deviation_typed_in_by_hand():
    alphas = torch.tensor([0.9, 0.5], dtype=torch.float64)
    steps = DDIMSteps(alphas, 2, 1.0)
    assert steps.timesteps == [1, 0]
    # equation 16: (1 - 0.9) / (1 - 0.5) * (1 - 0.5 / 0.9)
    assert steps.deviations == pytest.approx([math.sqrt(0.2 * 4 / 9), 0.0])
    assert steps.num_actions == 1


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_what_the_network_predicts_does_not_matter(prediction):
    alphas = torch.linspace(0.99, 0.05, 50, dtype=torch.float64)
    steps = DDIMSteps(alphas, 5, 0.5)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, *SHAPE, generator=generator) for _ in range(2))
    alpha = steps.alphas[1]
    x = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise
    says = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * clean,
    }[prediction]

    class Network(nn.Module):
        def forward(self, _x, _timestep):
            return SimpleNamespace(sample=says)

    policy = DenoisingPolicy(Network(), SimpleNamespace(prediction_type=prediction, clip_range=None), steps)
    found = policy.clean_and_noise(x, 1)
    torch.testing.assert_close(found, (clean, noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 101])
def test_too_many_or_too_few_steps_are_refused(steps):
    with pytest.raises(InputError, match="100 training steps"):
        DDIMSteps(torch.linspace(0.99, 0.01, 100, dtype=torch.float64), steps, 1.0)


def test_eta_outside_its_range_is_refused():
    with pytest.raises(InputError, match=r"finetune\.eta=1\.5"):
        DDIMSteps(torch.linspace(0.99, 0.01, 100, dtype=torch.float64), 5, 1.5)


def test_without_randomness_there_are_no_actions_and_the_image_depends_on_its_start_alone(tmp_path):
    model = tiny_model(tmp_path / "ddpm")
    policy = tiny_policy(model, 4, 0.0)
    episodes = roll_out(policy, [1, 2])
    assert episodes.num_actions == 0
    assert episodes.states.shape == (1, 2, *SHAPE)


def test_an_image_depends_on_its_seed_alone(tmp_path):
    policy = tiny_policy(tiny_model(tmp_path / "ddpm"))
    whole = sample_images(policy, [3, 4, 5], 3)
    single = sample_images(policy, [4], 1)
    torch.testing.assert_close(whole[1:2], single, rtol=1e-5, atol=1e-5)
    assert torch.equal(policy.episode_noise([3, 4])[1:], policy.episode_noise([4]))


def test_a_rollout_keeps_every_state_with_its_probability(tmp_path):
    policy = tiny_policy(tiny_model(tmp_path / "ddpm"), 4)
    episodes = roll_out(policy, [1, 2, 3])
    assert episodes.states.shape == (4, 3, *SHAPE)
    assert torch.equal(episodes.states[0], policy.episode_noise([1, 2, 3])[:, 0])
    for action in range(episodes.num_actions):
        with torch.no_grad():
            again = policy(episodes.states[action], action).log_prob(episodes.states[action + 1])
        assert torch.equal(again, episodes.log_probs[action])
    with torch.no_grad():
        last = policy(episodes.states[-1], 3).mean
    torch.testing.assert_close(episodes.images, (last / 2 + 0.5).clamp(0, 1))


def test_streams_of_seeds_are_unrelated():
    named = [seeds_of("rollout", 0, 1, count=50), seeds_of("rollout", 0, 2, count=50), seeds_of("eval", 0, 1, count=50)]
    assert len({seed for seeds in named for seed in seeds}) == 150
    assert seeds_of("rollout", 0, 1, count=3) == named[0][:3]
