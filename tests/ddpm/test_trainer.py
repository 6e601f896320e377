from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from errors import InputError
from tests.ddpm.tiny_ddpm import SHAPE, tiny_model, tiny_policy
from training.ddpm.config import FinetuneConfig
from training.ddpm.networks import merged, trained_copy
from training.ddpm.policy import DenoisingPolicy
from training.ddpm.rollout import Episodes, roll_out
from training.ddpm.trainer import METRICS, DDPMTrainer, accumulate_gradient

SETTINGS = FinetuneConfig(
    lr=1e-3, ddim_steps=4, episodes_per_epoch=8, microbatch=4, eval_interval=0, grad_clip=1e9, clip_eps=0.2
)


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "ddpm")


def brightness(images):
    return images.mean((1, 2, 3))


def make_trainer(model, settings=SETTINGS, reward=brightness, seed=0):
    reference = tiny_policy(model, settings.ddim_steps, settings.eta)
    network = trained_copy(model.network, settings.lora_rank, seed)
    policy = DenoisingPolicy(network, model, reference.steps)
    return DDPMTrainer(policy, reference, reward, settings, seed=seed)


def moved(policy, model, scale=0.02):
    """The policy with its weights moved a little, so that ratios are not 1."""
    network = copy.deepcopy(policy.network).requires_grad_()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator).to(weight) * weight.abs().mean())
    return DenoisingPolicy(network, model, policy.steps)


def double(group):
    return Episodes(group.states.double(), group.log_probs, group.images)


def gradients(network):
    return torch.cat([weight.grad.flatten() for weight in network.parameters()])


def full_graph_loss(policy, reference, groups, advantages, settings):
    """The loss in one graph, written out without the trainer's parts."""
    losses = []
    for group, values in zip(groups, advantages, strict=True):
        steps = range(group.num_actions)
        now = torch.stack([policy(group.states[a], a).log_prob(group.states[a + 1]) for a in steps])
        old = group.log_probs
        if settings.ratio == "trajectory":
            now, old = now.sum(0, keepdim=True), old.sum(0, keepdim=True)
        ratio = (now - old).exp()
        clipped = ratio.clamp(1 - settings.clip_eps, 1 + settings.clip_eps)
        surrogate = -torch.minimum(ratio * values, clipped * values).sum(0)
        kl = torch.stack([policy(group.states[a], a).kl(reference(group.states[a], a)) for a in steps]).sum(0)
        losses.append(surrogate + settings.kl_coef * kl)
    return torch.cat(losses).mean()


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("ratio", ["step", "trajectory"])
def test_before_the_first_update_every_ratio_is_one(model, ratio, lora_rank):
    trainer = make_trainer(model, replace(SETTINGS, ratio=ratio, lora_rank=lora_rank, kl_coef=0.1))
    groups = [roll_out(trainer.policy, seeds) for seeds in ([1, 2, 3, 4], [5, 6, 7, 8])]
    advantages = [torch.ones(4, dtype=torch.float64)] * 2
    seen = accumulate_gradient(trainer.policy, trainer.reference, groups, advantages, trainer.settings)
    assert seen.log_probs.shape == (3, 8)
    assert (seen.log_probs - seen.old_log_probs).exp().sub(1).abs().max() <= 1e-6
    row = trainer.step()
    assert row["first_pass_ratio_error"] <= 1e-6
    assert row["kl"] == 0  # the policy still is the starting DDPM


@pytest.mark.parametrize("ratio", ["step", "trajectory"])
def test_the_gradient_is_the_score_function_gradient_by_finite_differences(model, ratio):
    """At the rollout's own weights: the derivative of -mean_n A_n sum_t log p(a_t | s_t) in random directions."""
    settings = replace(SETTINGS, ratio=ratio)
    reference = tiny_policy(model)
    network = copy.deepcopy(model.network).double().requires_grad_()
    policy = DenoisingPolicy(network, model, reference.steps)
    group = double(roll_out(reference, [1, 2, 3]))
    steps = range(group.num_actions)

    def log_probs():
        with torch.no_grad():
            return torch.stack([policy(group.states[a], a).log_prob(group.states[a + 1]) for a in steps])

    group = replace(group, log_probs=log_probs())
    advantages = torch.tensor([1.0, -0.4, -0.6], dtype=torch.float64)
    accumulate_gradient(policy, reference, [group], [advantages], settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = [torch.randn(weight.shape, generator=generator).double() for weight in network.parameters()]
        exact = sum((weight.grad * way).sum() for weight, way in zip(network.parameters(), direction, strict=True))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for weight, way in zip(network.parameters(), direction, strict=True):
                    weight.add_(sign * 1e-6 * way)
            values.append(-(advantages * log_probs().sum(0)).mean())
            with torch.no_grad():
                for weight, way in zip(network.parameters(), direction, strict=True):
                    weight.sub_(sign * 1e-6 * way)
        assert exact.item() == pytest.approx(((values[0] - values[1]) / 2e-6).item(), rel=1e-5)


@pytest.mark.parametrize("ratio", ["step", "trajectory"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_accumulated_gradient_is_that_of_the_full_graph(model, ratio, kl_coef):
    settings = replace(SETTINGS, ratio=ratio, kl_coef=kl_coef)
    reference = tiny_policy(model)
    groups = [double(roll_out(reference, seeds)) for seeds in ([1, 2], [3, 4])]
    advantages = [torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 0.5]).double()]
    policy = moved(reference, model)
    policy.network.double()
    start = DenoisingPolicy(copy.deepcopy(model.network).double(), model, reference.steps)
    seen = accumulate_gradient(policy, start, groups, advantages, settings)
    accumulated = gradients(policy.network)
    policy.network.zero_grad()
    loss = full_graph_loss(policy, start, groups, advantages, settings)
    loss.backward()
    whole = gradients(policy.network)
    assert (seen.log_probs - seen.old_log_probs).abs().max() > 1e-3  # ratios really moved
    assert whole.norm() > 0
    assert (accumulated - whole).norm() <= 1e-6 * whole.norm()
    total = seen.policy_loss + (kl_coef * seen.kl if kl_coef else 0.0)
    assert total == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("ratio", ["step", "trajectory"])
def test_how_episodes_are_grouped_does_not_change_the_gradient(model, ratio):
    settings = replace(SETTINGS, ratio=ratio)
    reference = tiny_policy(model)
    advantages = torch.linspace(-1, 1, 4).double()
    policy = moved(reference, model)
    found = []
    for size in (4, 2, 1):
        groups = [roll_out(reference, seeds.tolist()) for seeds in torch.arange(4).split(size)]
        policy.network.zero_grad()
        accumulate_gradient(policy, reference, groups, advantages.split(size), settings)
        found.append(gradients(policy.network))
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-3 * found[0].norm()  # float32 states differ in their last places


def test_clipped_steps_give_no_gradient(model):
    settings = replace(SETTINGS, clip_eps=1e-6)
    reference = tiny_policy(model)
    group = roll_out(reference, [1])
    policy = moved(reference, model)
    with torch.no_grad():
        now = torch.stack([policy(group.states[a], a).log_prob(group.states[a + 1]) for a in range(3)])
    # The ratios' own logarithms as signs: each step has gone further already than it is allowed to.
    for action in range(3):
        sign = (now[action] - group.log_probs[action]).sign()
        single = Episodes(group.states[action : action + 2], group.log_probs[action : action + 1], group.images)
        shifted = DenoisingPolicy(policy.network, model, _from(policy.steps, action))
        policy.network.zero_grad()
        accumulate_gradient(shifted, reference, [single], [sign], settings)
        assert gradients(policy.network).abs().max() == 0


def _from(steps, action):
    later = copy.copy(steps)
    later.timesteps, later.alphas, later.deviations = (
        steps.timesteps[action:],
        steps.alphas[action:],
        steps.deviations[action:],
    )
    return later


def test_training_raises_the_reward(model):
    trainer = make_trainer(model, replace(SETTINGS, lr=3e-3, episodes_per_epoch=16, microbatch=16))
    rewards = [trainer.step()["reward_mean"] for _ in range(8)]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.02


def test_a_kl_weight_holds_the_policy_near_its_start(model):
    def distance(kl_coef):
        trainer = make_trainer(model, replace(SETTINGS, lr=3e-3, kl_coef=kl_coef))
        for _ in range(4):
            row = trainer.step()
        return row["kl"]

    assert distance(1.0) < 0.5 * distance(1e-9)


@pytest.mark.parametrize(
    "changes",
    [{}, {"baseline": "running", "passes": 2, "minibatch": 4}, {"lora_rank": 2, "ema_decay": 0.5, "kl_coef": 0.1}],
)
def test_a_resumed_run_is_the_run_that_never_stopped(model, changes):
    settings = replace(SETTINGS, **changes)
    whole = make_trainer(model, settings)
    rows = [whole.step() for _ in range(3)]
    first = make_trainer(model, settings)
    first.step()
    state = copy.deepcopy(first.state_dict())
    resumed = make_trainer(model, settings)
    resumed.load_state_dict(state)
    again = [resumed.step() for _ in range(2)]
    for row, other in zip(rows[1:], again, strict=True):
        assert {k: v for k, v in row.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }
    for one, other in zip(whole.result.parameters(), resumed.result.parameters(), strict=True):
        assert torch.equal(one, other)


def test_every_metric_has_a_meaning(model):
    row = make_trainer(model, replace(SETTINGS, kl_coef=0.1)).step()
    assert {name for name in row if not name.startswith("seconds/")} == set(METRICS)


def test_the_starting_network_is_left_alone(model):
    before = copy.deepcopy(model.network.state_dict())
    trainer = make_trainer(model)
    trainer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    assert not all(torch.equal(value, before[name]) for name, value in trainer.result.state_dict().items())


def test_low_rank_additions_begin_as_nothing_and_merge_into_a_plain_network(model):
    network = trained_copy(model.network, 2, seed=0)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(x, 5).sample, model.network(x, 5).sample)
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        assert 0 < sum(weight.numel() for weight in trained) < sum(w.numel() for w in model.network.parameters()) / 2
        for weight in trained:
            weight.add_(0.1)
        plain = merged(network)
        assert plain.state_dict().keys() == model.network.state_dict().keys()
        torch.testing.assert_close(plain(x, 5).sample, network(x, 5).sample, rtol=1e-4, atol=1e-4)


def test_the_average_lags_behind_the_weights(model):
    trainer = make_trainer(model, replace(SETTINGS, ema_decay=0.9))
    weights = []
    for _ in range(3):
        trainer.step()
        weights.append(copy.deepcopy(trainer.policy.network.conv_in.weight))
    expected = 0.9 * (0.9 * weights[0] + 0.1 * weights[1]) + 0.1 * weights[2]
    torch.testing.assert_close(trainer.result.conv_in.weight, expected)


def test_equal_rewards_teach_nothing(model):
    trainer = make_trainer(model, reward=lambda images: torch.ones(len(images)))
    before = copy.deepcopy(trainer.policy.network.state_dict())
    assert trainer.step()["gradient_norm"] == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.network.state_dict().items())


@pytest.mark.parametrize(
    ("baseline", "expected"), [("leave_one_out", [-8 / 3, -4 / 3, 0, 4]), ("none", [1.0, 2.0, 3.0, 6.0])]
)
def test_advantages_typed_in_by_hand(model, baseline, expected):
    trainer = make_trainer(model, replace(SETTINGS, baseline=baseline))
    found = trainer._advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]).double())
    deviation = math.sqrt(3.5)  # of the rewards about their mean 3
    assert found.tolist() == pytest.approx([value / deviation for value in expected])
    raw = make_trainer(model, replace(SETTINGS, baseline=baseline, normalize_advantages=False))
    assert raw._advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]).double()).tolist() == pytest.approx(expected)


def test_the_running_baseline_is_the_mean_of_earlier_epochs(model):
    trainer = make_trainer(model, replace(SETTINGS, baseline="running"))
    rewards = torch.tensor([1.0, 3.0]).double()
    assert trainer._advantages(rewards).tolist() == [-1.0, 1.0]  # the first epoch's own mean, deviation 1
    assert trainer._advantages(rewards + 10).tolist() == [9.0, 11.0]
    assert trainer.running_reward == pytest.approx(0.9 * 2 + 0.1 * 12)


def test_rewards_that_are_not_finite_end_the_run(model):
    trainer = make_trainer(model, reward=lambda images: torch.full((len(images),), torch.nan))
    with pytest.raises(InputError, match="8 of 8 rewards are not finite"):
        trainer.step()
