"""The study of estimators: mirrored draws come from the policy, and a known gradient has its known ratio."""

from __future__ import annotations

import torch
from click.testing import CliRunner

from benchmarks.estimators import ESTIMATORS, main, mirrored, policies, ratio


def test_mirrored_draws_come_in_pairs_and_from_the_policy() -> None:
    for policy in policies().values():
        sample = mirrored(policy, 4000, torch.Generator().manual_seed(0))
        plain = policy().sample(4000, torch.Generator().manual_seed(1))
        for name, drawn in sample.drawn.items():
            torch.testing.assert_close(drawn.mean(0), plain.drawn[name].mean(0), rtol=0, atol=0.02)
            torch.testing.assert_close(drawn.std(0), plain.drawn[name].std(0), rtol=0.1, atol=1e-9)
            one, other = drawn.unflatten(0, (-1, 2)).unbind(1)
            assert ((one - one.mean(0)) * (other - other.mean(0))).mean(0).max() < 0


def test_the_ratio_is_that_of_known_noise() -> None:
    half = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = torch.tensor([3.0, 0.0, 4.0]).double() + 5 * torch.cat([half, -half])  # of mean [3, 0, 4] exactly
    weights = torch.ones(1, 8000, dtype=torch.float64)
    torch.testing.assert_close(ratio(gradients, weights), torch.tensor([25 / 75]).double(), rtol=0.05, atol=0)


def test_the_command_prints_a_row_for_each_estimator() -> None:
    result = CliRunner().invoke(main, ["--batches", "4"])
    assert result.exit_code == 0, result.output
    assert all(result.output.count(f"| {name} | ") == len(policies()) for name in ESTIMATORS)
