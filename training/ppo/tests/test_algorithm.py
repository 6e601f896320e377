"""The arithmetic of PPO against numbers typed in by hand and against the reference."""

import math
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from errors import InputError
from tests import golden
from training.ppo import algorithm


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=tolerance)


def test_leave_one_out_by_hand():
    # prompt 0: 1, 2, 6 -> 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2; prompt 1: 10, 10, 13
    rewards = tensor([1, 2, 6, 10, 10, 13])
    close(algorithm.leave_one_out_advantages(rewards, 3), [-3, -1.5, 4.5, -1.5, -1.5, 3])


def test_mixed_baseline_by_hand():
    # n/k = 2 columns: samples 0, 2, 4 = 1, 6, 10 and samples 1, 3, 5 = 2, 10, 13
    rewards = tensor([1, 2, 6, 10, 10, 13])
    close(algorithm.leave_one_out_advantages(rewards, 3, baseline="mixed"), [-7, -9.5, 0.5, 2.5, 6.5, 7])


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize(("baseline", "prefix", "raw"), [("prompt", "OWN", "loo_raw"), ("mixed", "PEER", "raw")])
def test_advantages_agree_with_the_reference(case, baseline, prefix, raw):
    rewards = golden.tensor("policy", f"adv_{case}__rewards")
    k = int(golden.tensor("policy", f"adv_{case}__k"))
    advantages = algorithm.leave_one_out_advantages(rewards, k, baseline=baseline)
    stored = golden.tensor("policy", f"adv_{case}__{prefix}_{raw}")
    torch.testing.assert_close(advantages, stored, rtol=0, atol=1e-12)
    normalized = golden.tensor("policy", f"adv_{case}__{prefix}_{raw.replace('raw', 'normalized')}")
    torch.testing.assert_close(algorithm.normalize(advantages), normalized, rtol=0, atol=1e-10)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 5), st.floats(-100, 100))
@settings(deadline=None, max_examples=50)
def test_an_offset_of_one_prompt_changes_no_advantage(seed, prompts, k, offset):
    rewards = torch.randn(prompts * k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    shifted = rewards.clone()
    shifted[:k] += offset
    advantages = algorithm.leave_one_out_advantages(rewards, k)
    torch.testing.assert_close(algorithm.leave_one_out_advantages(shifted, k), advantages, rtol=0, atol=1e-11)
    torch.testing.assert_close(advantages.view(prompts, k).sum(1), torch.zeros(prompts, dtype=torch.float64))


def test_shrunk_baseline_by_hand():
    """Means 2 and 7; within 5, between 12.5 - 5/2 = 10: 10 / (10 + 5) of the prompt's own, the rest of the other's."""
    rewards = torch.tensor([1.0, 3.0, 5.0, 9.0], dtype=torch.float64)
    close(algorithm.leave_one_out_advantages(rewards, 2, baseline="shrunk"), [-10 / 3, 0, -5 / 3, 5])


def test_the_shrunk_baseline_is_the_prompts_where_prompts_are_all_and_the_batchs_where_they_are_nothing():
    own = torch.tensor([0.0, 1.0, 1000.0, 1001.0], dtype=torch.float64)
    close(algorithm.leave_one_out_advantages(own, 2, baseline="shrunk"), [-1, 1, -1, 1], tolerance=2e-3)
    alike = torch.tensor([0.0, 4.0, 1.0, 3.0], dtype=torch.float64)  # both means are 2
    close(algorithm.leave_one_out_advantages(alike, 2, baseline="shrunk"), [-2, 2, -1, 1])
    for rewards in (torch.ones(4), own[:2]):  # without noise, or without another prompt
        plain = algorithm.leave_one_out_advantages(rewards, 2)
        assert torch.equal(algorithm.leave_one_out_advantages(rewards, 2, baseline="shrunk"), plain)


def test_the_mixed_baseline_lets_the_prompts_spread_in():
    rewards = tensor([0, 0, 0, 0, 5, 5, 5, 5])  # the tables made no difference at all
    close(algorithm.leave_one_out_advantages(rewards, 4), [0] * 8)
    assert algorithm.leave_one_out_advantages(rewards, 4, baseline="mixed").abs().min() > 1


def test_rewards_that_do_not_split_are_refused():
    with pytest.raises(InputError, match="7 rewards cannot be split into groups of 2"):
        algorithm.leave_one_out_advantages(torch.zeros(7), 2)


def test_normalize_by_hand():
    close(
        algorithm.normalize(tensor([1, 3, 5, 7])), [-3 / math.sqrt(5), -1 / math.sqrt(5), 1 / math.sqrt(5), 3 / 5**0.5]
    )
    close(algorithm.normalize(tensor([2, 2, 2])), [0, 0, 0])


def test_a_ratio_beyond_every_number_is_clipped_like_any_other():
    # e^800 and e^-800, clip 0.2: a ratio that its advantage wants no further counts 1.2 or 0.8 and has no gradient
    log_prob = tensor([800, 800, -800, 0]).requires_grad_()
    loss = algorithm.clipped_surrogate(log_prob, torch.zeros(4, dtype=torch.float64), tensor([1, 0, -1, 2]), 0.2)
    close(loss.detach(), (-1.2 + 0.0 + 0.8 - 2.0) / 4)
    loss.backward()
    close(log_prob.grad, [0, 0, 0, -2 / 4])


@given(st.integers(0, 10_000), st.floats(0.01, 1))
@example(0, 1.0)
@settings(deadline=None, max_examples=50)
def test_the_surrogate_and_its_gradient_are_those_of_the_paper(seed, clip_range):
    generator = torch.Generator().manual_seed(seed)
    new, old, advantages = torch.randn(3, 16, dtype=torch.float64, generator=generator)
    new.requires_grad_()
    ratio = (new - old).exp()
    expected = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()
    loss = algorithm.clipped_surrogate(new, old, advantages, clip_range)
    torch.testing.assert_close(loss, -expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(value, new)[0] for value in (loss, -expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_what_a_huge_ratio_is_measured_by_stays_a_number():
    log_ratio, zeros = tensor([800, 0, 0, 0]), torch.zeros(4, dtype=torch.float64)
    assert algorithm.approximate_kl(log_ratio, zeros) > 1e30
    assert math.isfinite(algorithm.approximate_kl(log_ratio, zeros))
    assert algorithm.clip_fraction(log_ratio, zeros, 0.2) == 0.25
    assert algorithm.effective_sample_share(log_ratio, zeros) == pytest.approx(0.25)


def test_clipped_surrogate_by_hand():
    # ratios 1.5, 1.5, 0.5, 0.5 with advantages +1, -1, +1, -1 and clip 0.2: -1.2, 1.5, -0.5, 0.8
    log_prob = tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    loss = algorithm.clipped_surrogate(log_prob, torch.zeros(4, dtype=torch.float64), tensor([1, -1, 1, -1]), 0.2)
    close(loss.detach(), 0.6 / 4)
    loss.backward()
    close(log_prob.grad, [0, 1.5 / 4, -0.5 / 4, 0])  # a clipped sample has no gradient, -A r otherwise


def test_total_loss_by_hand():
    loss = algorithm.total_loss(tensor(2.0), tensor(3.0), tensor(5.0), kl_coef=0.1, entropy_coef=0.01)
    close(loss, 2.0 + 0.3 - 0.05)


@pytest.mark.parametrize("case", ["ppo_u1", "ppo_u2"])
def test_surrogate_and_loss_agree_with_the_reference(case):
    values = {
        name: golden.tensor("policy", f"{case}__{name}")
        for name in ("new_log_prob", "old_log_prob", "advantages", "kl", "entropy", "policy_loss", "loss", "ratio")
    }
    clip, kl_coef, entropy_coef = golden.tensor("policy", f"{case}__hyper_clip_kl_entropy").tolist()
    policy_loss = algorithm.clipped_surrogate(
        values["new_log_prob"], values["old_log_prob"], values["advantages"], clip
    )
    loss = algorithm.total_loss(
        policy_loss, values["kl"], values["entropy"], kl_coef=kl_coef, entropy_coef=entropy_coef
    )
    torch.testing.assert_close(policy_loss, values["policy_loss"], rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, values["loss"], rtol=0, atol=1e-12)


def test_diagnostics_by_hand():
    old = torch.zeros(4, dtype=torch.float64)
    new = tensor([1.0, 2.0, 0.5, 1.1]).log()
    assert algorithm.clip_fraction(new, old, 0.2) == 0.5
    expected_kl = (0 + (1 - math.log(2)) + (-0.5 + math.log(2)) + (0.1 - math.log(1.1))) / 4
    assert algorithm.approximate_kl(new, old) == pytest.approx(expected_kl, abs=1e-12)
    assert algorithm.effective_sample_share(new, old) == pytest.approx(4.6**2 / (4 * (1 + 4 + 0.25 + 1.21)), abs=1e-12)


def test_diagnostics_before_any_update():
    log_prob = tensor([3.0, -700.0, 12.0])
    assert algorithm.clip_fraction(log_prob, log_prob, 0.2) == 0
    assert algorithm.approximate_kl(log_prob, log_prob) == 0
    assert algorithm.effective_sample_share(log_prob, log_prob) == pytest.approx(1, abs=1e-12)


def test_effective_sample_share_does_not_overflow():
    assert algorithm.effective_sample_share(tensor([2000.0, 0.0]), tensor([0.0, 0.0])) == pytest.approx(0.5)


def test_saturated_share_by_hand():
    rewards = tensor([1, 1, 0.3, 0.4, 1, 1 - 1e-8, 0, 1])
    assert algorithm.saturated_share(rewards, 2) == 0.5
    assert algorithm.saturated_share(rewards, 4) == 0


def test_reward_variances_by_hand():
    within, between = algorithm.reward_variances(tensor([1, 3, 10, 14]), 2)
    assert within == pytest.approx((2 + 8) / 2)
    assert between == pytest.approx(50)  # means 2 and 12
    assert algorithm.reward_variances(tensor([1, 3]), 2) == (2, 0)
    assert algorithm.reward_variances(tensor([1, 3]), 1) == (0, 2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [2, 2, 2, 2]), ("linear", [2, 1.5, 1, 0.5]), ("cosine", [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])],
)
def test_learning_rates_by_hand(schedule, expected):
    rates = [algorithm.learning_rate(step, 4, 2.0, schedule) for step in range(4)]
    assert rates == pytest.approx(expected, abs=1e-12)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
