"""CMA-ES in the place of PPO: the same start, rollouts, images, held-out watch and files, another search.

    python -m benchmarks.search_cma_es --config training/ppo/cfgs/shapes.yaml --override run.seed=1

A step is a generation (Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772). All its candidates are
tried on the same prompts with the same noise; a candidate's fitness is its mean reward over them. A run takes
ppo.steps * ppo.rollout_batch_size images, as PPO does. Larger generations of the same budget: fewer steps of larger
batches, for example ppo.steps=15 ppo.rollout_batch_size=128 for 60 steps of 32.

What is searched are the parameters that move the mean of the PPO policy, of all that ppo.train names: the logarithms of
shares (segments, weights, gaps of the grid), the last of each row held (a common factor changes no mean), those of
scales and of guidance, and the entries of the history. They are measured in standard deviations of the policy's draws,
so that with --sigma0 1 the first candidates lie about as far from the start as the solvers that PPO tries first. The
result is the mean of the search distribution.

Needs the package cma, which the extra `test` brings.
"""

from __future__ import annotations

if __name__ == "__main__":
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

import dataclasses
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import cma
import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from errors import InputError, shows_input_errors
from models.randomness import derived_seed
from training.ppo import algorithm
from training.ppo.assembly import Parts, Start, build, prepare
from training.ppo.cold_start import DRAWN, trainable
from training.ppo.config import PPOConfig, load_config
from training.ppo.distributions import Dirichlet, Normal
from training.ppo.launch import Launch, resumed_job, train, with_options
from training.ppo.policy import HIDDEN_SIZE, EPDParamPolicy
from training.ppo.rollout import DivergenceError, PromptStream, RolloutSource, Scores
from training.runs.command_line import SeveralPairs

MODULE = "benchmarks.search_cma_es"
SIGMA0 = 1.0
SATURATED = 20.0  # its hyperbolic tangent is 1 in float64


def deviations(policy: EPDParamPolicy) -> Tensor:
    """How far a draw of the policy lies from its mean, in each column of its parameters: [S, P], 0 where not searched.

    To first order the logarithm of a Dirichlet component, less that of the last one, has the variance
    1 / alpha_i + 1 / alpha_last; what is drawn normally, itself or its logarithm, has its deviation as a parameter.
    """
    spread = torch.zeros_like(policy.base)
    cold_start = policy.cold_start().parts
    for name, block in policy.split(spread).items():
        part, moved = cold_start[name], block.chunk(cold_start[name].blocks, dim=-1)[0]  # [S, n]: what moves the mean
        places = DRAWN[name].part.rows(torch.arange(moved.numel()).view(moved.shape)).flatten()
        moved[places // moved.shape[1], places % moved.shape[1]] = _deviations(part).flatten()
    return spread


def _deviations(part: Dirichlet | Normal) -> Tensor:
    if isinstance(part, Normal):
        return part.log_std.exp()
    inverse = 1 / part.alpha
    return (inverse + inverse[..., -1:]).sqrt().index_fill(-1, torch.tensor(inverse.shape[-1] - 1), 0.0)


def move_mean(policy: EPDParamPolicy, residual: Tensor) -> None:
    """Set the policy's network so that its parameters are the cold start's plus `residual` [S, P], to the last bit.

    One hidden unit for each interval, saturated there and zero elsewhere, carries that interval's changes.

    Raises:
        InputError: the table has more intervals than the network has hidden units.
    """
    intervals = len(residual)
    if intervals > HIDDEN_SIZE:
        raise InputError(f"a policy can hold a table of at most {HIDDEN_SIZE} intervals, this one has {intervals}")
    with torch.no_grad():
        for part in policy.parameters():
            part.zero_()
        policy.hidden.weight[:intervals].fill_diagonal_(SATURATED)
        policy.output.weight[:, :intervals] = residual.T


class TableSearch:
    """CMA-ES over mean tables, a `training.ppo.ppo_trainer.Trainer`.

    Its draws come from a generator of its own, and what it is depends on the fitnesses that it was told alone: a
    checkpoint holds these, and a resumed search is told them again.
    """

    def __init__(
        self,
        policy: EPDParamPolicy,
        source: RolloutSource[Any],
        prompts: PromptStream,
        settings: PPOConfig,
        *,
        seed: int,
        sigma0: float,
    ) -> None:
        """Search around the policy's cold start.

        Args:
            policy: its mean is kept at that of the search; changed in place.
            source: tries `settings.rloo_k` tables, one population, on each prompt.
            prompts: where each generation's prompts come from.
            settings: section `ppo` of the configuration.
            seed: of the candidates.
            sigma0: standard deviation of the first candidates, in those of the policy's draws.

        Raises:
            InputError: there is but one parameter to search.
        """
        self.policy, self.source, self.prompts, self.settings = policy, source, prompts, settings
        self.completed_steps = 0
        self._deviations = deviations(policy)
        self._seed, self._sigma0 = seed, sigma0
        self._told: list[list[float]] = []  # the fitnesses of each generation
        self._evolution = self._begin()

    def step(self) -> dict[str, float]:
        """One generation; returns its metrics, of those in `ppo_trainer.METRICS` and `step_size`.

        Raises:
            DivergenceError: no candidate's rewards are finite.
        """
        start = perf_counter()
        self.source.take_seconds()  # what others did with the source since the last step is not this step's
        candidates = self._evolution.ask()
        scores = self._score(np.stack(candidates))
        fitness = self._fitness(scores.rewards)
        self._tell(candidates, fitness.tolist())
        move_mean(self.policy, self._residual(self._evolution.mean))
        return self._log(scores, perf_counter() - start)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs, as tensors and plain values."""
        return {
            "completed_steps": self.completed_steps,
            "policy": self.policy.state_dict(),
            "fitness": torch.tensor(self._told, dtype=torch.float64),
            "sigma0": self._sigma0,
            "prompts": self.prompts.state_dict(),
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            InputError: the state belongs to other prompts or other rewards.
        """
        self.prompts.load_state_dict(state["prompts"])
        self.source.load_state_dict(state["source"])
        self.policy.load_state_dict(state["policy"])
        self.completed_steps = state["completed_steps"]
        self._sigma0, self._told = state["sigma0"], []
        self._evolution = self._begin()
        for fitness in state["fitness"].tolist():
            self._tell(self._evolution.ask(), fitness)

    def _begin(self) -> cma.CMAEvolutionStrategy:
        size = int((self._deviations > 0).sum())
        if size < 2:
            raise InputError(f"CMA-ES needs at least two parameters, and ppo.train leaves it {size}: name more there")
        draw = np.random.default_rng(derived_seed("candidates", self._seed))
        options = {
            "popsize": self.settings.rloo_k,
            "seed": np.nan,  # the global generator is neither seeded nor used
            "randn": lambda count, size: draw.standard_normal((count, size)),
            "verbose": -9,
            "verb_log": 0,
        }
        return cma.CMAEvolutionStrategy(np.zeros(size), self._sigma0, options)

    def _residual(self, points: np.ndarray) -> Tensor:
        """Points [..., n] of the search as changes [..., S, P] of the policy's parameters."""
        residual = torch.zeros(*points.shape[:-1], *self._deviations.shape, dtype=self._deviations.dtype)
        searched = self._deviations > 0
        residual[..., searched] = torch.from_numpy(points) * self._deviations[searched]
        return residual

    @torch.no_grad()
    def _score(self, points: np.ndarray) -> Scores:
        """The means at points [population, n], each on every prompt of the generation, prompt-major."""
        population, means = self.settings.rloo_k, self.policy.distribution(self._residual(points))
        table, sigmas = means.mean_table(), means.mean_sigmas()
        table = table if table.batch_size else table.expand(population)
        prompts = self.prompts.take(self.settings.rollout_batch_size // population)
        every = torch.arange(population).repeat(len(prompts))
        sigmas = None if sigmas is None else sigmas[every]
        return self.source.score(self.source.roll_out(table.select(every), prompts, self.completed_steps, sigmas))

    def _fitness(self, rewards: Tensor) -> Tensor:
        """Mean reward of each candidate [population]; one with a reward that is not finite is as good as the worst."""
        means = rewards.view(-1, self.settings.rloo_k).mean(0)
        finite = means.isfinite()
        if not finite.any():
            raise DivergenceError(
                f"step {self.completed_steps + 1}: every candidate has rewards that are NaN or infinite: "
                f"start from a steadier table, or with a smaller --sigma0"
            )
        return means.where(finite, means[finite].min())

    def _tell(self, candidates: list[np.ndarray], fitness: list[float]) -> None:
        self._evolution.tell(candidates, [-value for value in fitness])
        self._told.append(fitness)

    def _log(self, scores: Scores, seconds: float) -> dict[str, float]:
        """Count the step as done, and gather its metrics."""
        self.completed_steps += 1
        population = self.settings.rloo_k
        whole = scores.rewards.view(-1, population)
        whole = whole[whole.isfinite().all(1)]  # prompts on which every candidate got a reward
        rewards = scores.rewards[scores.rewards.isfinite()]
        within, between = (
            algorithm.reward_variances(whole.flatten(), population) if len(whole) else (math.nan, math.nan)
        )
        return {
            "step": self.completed_steps,
            "images": self.completed_steps * self.settings.rollout_batch_size,
            "reward_mean": rewards.mean().item(),
            "reward_min": rewards.min().item(),
            "reward_max": rewards.max().item(),
            **{f"reward/{name}": part[part.isfinite()].double().mean().item() for name, part in scores.parts.items()},
            "reward_within_variance": within,
            "reward_between_variance": between,
            "dropped_groups": scores.rewards.numel() // population - len(whole),
            "step_size": float(self._evolution.sigma),
            **{f"seconds/{phase}": spent for phase, spent in self.source.take_seconds().items()},
            "seconds/step": seconds,
        }


def prepared_for_search(start: Start, population: int | None) -> Start:
    """The same start with the configuration of a search: one population on each prompt, with the same noise.

    `population`: None for the largest divisor of the images a step that is at most CMA-ES's own default,
    4 + 3 log n for n parameters.

    Raises:
        InputError: the images of a step cannot be shared out among such a population.
    """
    images = start.config.ppo.rollout_batch_size
    if population is None:
        table = start.table
        parameters = sum(
            DRAWN[name].part.free(table.num_intervals, table.num_points)
            for name in trainable(table, start.config.ppo.train)
        )
        largest = 4 + int(3 * math.log(max(parameters, 1)))
        population = max(size for size in range(1, largest + 1) if images % size == 0)
    if population < 2 or images % population:
        raise InputError(
            f"ppo.rollout_batch_size={images} images cannot be shared out among a population of {population}: "
            f"every candidate needs as many, and there must be two; change one of them"
        )
    ppo = dataclasses.replace(
        start.config.ppo, rloo_k=population, shared_noise=True, ppo_epochs=1, minibatch_size=images
    )
    return dataclasses.replace(start, config=dataclasses.replace(start.config, ppo=ppo))


def build_search(start: Start, fabric: Fabric, *, sigma0: float) -> Parts:
    """The objects of a run, with the search in the place of PPO."""
    parts = build(start, fabric)
    trainer = parts.trainer
    search = TableSearch(
        trainer.policy, trainer.source, trainer.prompts, start.config.ppo, seed=start.config.run.seed, sigma0=sigma0
    )
    return dataclasses.replace(parts, trainer=search)


@click.command(cls=SeveralPairs, context_settings={"max_content_width": 110})
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="A run's configuration.")
@click.option(
    "--override", "overrides", multiple=True, metavar="SECTION.KEY=VALUE ...", help="As for training.ppo.launch."
)
@click.option("--population", type=click.IntRange(min=2), help="Candidates a generation.  [at most CMA-ES's default]")
@click.option(
    "--sigma0",
    type=click.FloatRange(min=0, min_open=True),
    help=f"Spread of the first candidates, in the policy's standard deviations.  [default: {SIGMA0:g}]",
)
@click.option("--run-name", help="Last part of the run folder's name (run.run_name).")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a search.")
@click.option("--device", help="auto, cpu, cuda, cuda:N or mps (run.device).")
@shows_input_errors
def main(
    config_path: Path | None,
    overrides: tuple[str, ...],
    population: int | None,
    sigma0: float | None,
    run_name: str | None,
    resume: Path | None,
    device: str | None,
) -> None:
    """Search a solver table by CMA-ES, with the images and the files of a PPO run.

    \b
    python -m benchmarks.search_cma_es --config training/ppo/cfgs/shapes.yaml --override ppo.steps=20 run.seed=1
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    pairs = with_options(overrides, run_name, device)
    if resume is None:
        if config_path is None:
            raise InputError("name the run's configuration with --config, or a search to go on with by --resume")
        job = Launch(prepared_for_search(prepare(load_config(config_path, pairs)), population), None, None)
    elif (config_path, population, sigma0, run_name) != (None, None, None, None):
        raise InputError("--resume goes on with a search's own settings: change them by --override only")
    else:
        job = resumed_job(resume, pairs)
    train(job, partial(build_search, sigma0=sigma0 or SIGMA0), MODULE)


if __name__ == "__main__":
    main()
