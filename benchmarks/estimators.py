"""Which baseline and which draws make PPO's gradient least noisy at equal images, in the closed-form world.

    python -m benchmarks.estimators

At a fixed policy, that of a run's first step, the gradient is estimated again and again from batches of 32 images: 8
prompts (here 8 noises), 4 images each from the same noise. Its signal-to-noise ratio is the squared length of its mean
over the trace of its covariance: at twice the ratio half the images tell as much. Prints it as a Markdown table,
relative to the leave-one-out baseline of a prompt, with 95% bootstrap intervals over the batches, and beside it the
mean cosine with the gradient of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import click
import torch
from scipy.special import gammaincinv
from torch import Tensor

from models.mixture import MixtureWorld
from models.randomness import derived_seed, generator_of
from solvers import EPDTable, classical_table, epd_sampler
from training.measuring.statistics import bootstrap_indices
from training.ppo.algorithm import leave_one_out_advantages, reward_variances
from training.ppo.cold_start import prepare_table
from training.ppo.distributions import Dirichlet, Normal
from training.ppo.policy import EPDParamPolicy, TableSample
from training.solver import Schedule

WORLD = MixtureWorld()
PROMPTS, GROUP = 8, 4


class Pool(NamedTuple):
    """M batches: rewards [M, prompts, k] of the draws and [M, prompts] of the start, d log p / d parameters beside.

    scores: [M, prompts, k, D].
    """

    rewards: Tensor
    scores: Tensor
    start: Tensor

    def gradient(self, advantages: Tensor) -> Tensor:
        """The policy gradient of each batch, [M, D], by the samples that have an advantage."""
        return (advantages.unsqueeze(-1) * self.scores[:, :, : advantages.shape[-1]]).flatten(1, 2).mean(1)


def policies() -> dict[str, EPDParamPolicy]:
    """What is tuned, as a run would begin it."""
    multistep = Schedule("polynomial", 7.0).sigmas(6, WORLD)
    table = classical_table("dpmpp", multistep, max_order=2)
    points = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64).expand(2, 2)
    parallel = EPDTable(points, torch.full((2, 2), 0.5, dtype=torch.float64))
    tuned = {
        "5 evaluations, no points: grid, history": (table, multistep, ("grid", "history")),
        "4 parallel evaluations, 2 points: positions, weights": (
            parallel,
            Schedule("polynomial", 7.0).sigmas(3, WORLD),
            ("positions", "weights"),
        ),
    }
    return {
        name: EPDParamPolicy(prepare_table(start, train).table, sigmas=sigmas, train=train, concentration=100.0)
        for name, (start, sigmas, train) in tuned.items()
    }


@torch.no_grad()
def mirrored(policy: EPDParamPolicy, number: int, generator: torch.Generator) -> TableSample:
    """`number` draws of which every second mirrors the one before: each uniform number u by 1 - u."""

    def drawn(part: Dirichlet | Normal) -> Tensor:
        parameters = part.alpha if isinstance(part, Dirichlet) else part.loc
        half = torch.rand(number // 2, *parameters.shape, generator=generator, dtype=torch.float64)
        uniform = torch.stack([half, 1 - half], dim=1).flatten(0, 1)
        if isinstance(part, Normal):
            return part.loc + part.log_std.exp() * torch.special.ndtri(uniform)
        return torch.from_numpy(gammaincinv(part.alpha.numpy(), uniform.numpy())).log().log_softmax(-1)

    distribution = policy()
    return TableSample({name: drawn(part) for name, part in distribution.parts.items()}, distribution.start)


def pool(policy: EPDParamPolicy, batches: int, *, antithetic: bool) -> Pool:
    """Draw, solve and reward by the negative distance to the solution, relative to its length."""
    count = batches * PROMPTS
    generator = generator_of(derived_seed("estimators", antithetic))
    sample = mirrored(policy, count * GROUP, generator) if antithetic else policy().sample(count * GROUP, generator)
    noise = torch.randn(count, *WORLD.latent_shape, generator=generator_of(derived_seed("estimators", "noise")))
    x = WORLD.sigma_max * noise
    wanted = WORLD.solution(x, WORLD.sigma_max, WORLD.sigma_min)

    @torch.no_grad()
    def rewards(repeats: int, table: EPDTable, sigmas: Tensor) -> Tensor:
        found = epd_sampler(WORLD.denoise, x.repeat_interleave(repeats, 0), sigmas, table)
        target = wanted.repeat_interleave(repeats, 0)
        return -((found - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).double()

    table, sigmas = policy.mean()
    grid = (
        policy.start["grid"] if "grid" in policy.trained else Schedule("polynomial", 7.0).sigmas(table.num_steps, WORLD)
    )
    drawn = rewards(GROUP, sample.table(), grid if sigmas is None else sample.sigmas())
    residual = torch.zeros(count * GROUP, *policy.base.shape, dtype=torch.float64, requires_grad=True)
    (scores,) = torch.autograd.grad(policy.distribution(residual).log_prob(sample).sum(), residual)
    return Pool(
        drawn.view(batches, PROMPTS, GROUP),
        scores.flatten(1).view(batches, PROMPTS, GROUP, -1),
        rewards(1, table, grid).view(batches, PROMPTS),
    )


def by_prompt(pool: Pool) -> Tensor:
    """The mean of the prompt's other images."""
    return leave_one_out_advantages(pool.rewards.flatten(), GROUP).view_as(pool.rewards)


def by_batch(pool: Pool) -> Tensor:
    """The mean of all other images of the batch."""
    return leave_one_out_advantages(pool.rewards.flatten(), PROMPTS * GROUP).view_as(pool.rewards)


def shrunk(pool: Pool) -> Tensor:
    """James and Stein: between the two, by the variances of the batch."""
    told = [leave_one_out_advantages(batch.flatten(), GROUP, baseline="shrunk") for batch in pool.rewards]
    return torch.stack(told).view_as(pool.rewards)


def against_start(pool: Pool) -> Tensor:
    """The start on the same noise, in the place of one image, and the mean difference to it of the batch's others."""
    difference = pool.rewards[:, :, :-1] - pool.start.unsqueeze(-1)
    return leave_one_out_advantages(difference.flatten(), PROMPTS * (GROUP - 1)).view_as(difference)


def with_start(pool: Pool) -> Tensor:
    """The mean of the prompt's other images, one of which is the start's."""
    drawn = pool.rewards[:, :, :-1]
    return drawn - (drawn.sum(2, keepdim=True) - drawn + pool.start.unsqueeze(-1)) / (GROUP - 1)


def by_other_pairs(pool: Pool) -> Tensor:
    """The mean of the prompt's images without the mirror image."""
    pairs = pool.rewards.unflatten(2, (-1, 2)).mean(3)  # [M, prompts, k / 2]
    others = (pairs.sum(2, keepdim=True) - pairs) / (pairs.shape[2] - 1)
    return pool.rewards - others.repeat_interleave(2, 2)


Estimator = tuple[bool, Callable[[Pool], Tensor]]
ESTIMATORS: Mapping[str, Estimator] = {
    "prompt's other images": (False, by_prompt),
    "batch's other images": (False, by_batch),
    "James-Stein between the two": (False, shrunk),
    "start on the same noise": (False, against_start),
    "prompt's other images, one of them the start's": (False, with_start),
    "mirrored pairs, prompt's other images": (True, by_prompt),
    "mirrored pairs, prompt's other pairs": (True, by_other_pairs),
}


def ratio(gradients: Tensor, weights: Tensor) -> Tensor:
    """Signal-to-noise ratio of gradients [M, D], each as often as `weights` [R, M] say: [R].

    |mean|^2 without the mean's own noise, over the trace of the covariance.
    """
    count = weights.sum(1)
    length = (weights @ gradients / count[:, None]).square().sum(1)
    noise = (weights @ gradients.square().sum(1) / count - length) * count / (count - 1)
    return (length - noise / count) / noise


@click.command(context_settings={"show_default": True})
@click.option("--batches", type=click.IntRange(min=2), default=512, help="Of 32 images each.")
def main(batches: int) -> None:
    """Print the signal-to-noise ratio of PPO's gradient with each baseline, relative to the default one's."""
    for tuned, policy in policies().items():
        pools = {mirror: pool(policy, batches, antithetic=mirror) for mirror in (False, True)}
        within, between = reward_variances(pools[False].rewards.flatten(), GROUP)
        click.echo(f"\n{tuned}; reward variance within groups {within:.2g}, between {between:.2g}\n")
        click.echo("| baseline | signal to noise, relative | cosine |\n|---|---|---|")
        usual, once = pools[False].gradient(by_prompt(pools[False])), torch.ones(1, batches).double()
        drawn = bootstrap_indices(batches, generator_of(0)).long()
        weights = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
        for name, (mirror, advantages) in ESTIMATORS.items():
            found = pools[mirror].gradient(advantages(pools[mirror]))
            relative, resampled = (ratio(found, rows) / ratio(usual, rows) for rows in (once, weights))
            low, high = resampled.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
            cosine = torch.cosine_similarity(found, usual.mean(0, keepdim=True)).mean()
            click.echo(f"| {name} | {relative.item():.2f} [{low:.2f}, {high:.2f}] | {cosine:.3f} |")


if __name__ == "__main__":
    main()
