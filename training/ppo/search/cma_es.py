"""CMA-ES over solvers (Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772).

A step is a generation. All its candidates are tried on the same prompts with the same noise; a candidate's fitness is
its mean reward over them. What is searched are the free parameters (`training.parameters`) of all that ppo.train names,
measured in standard deviations of the draws that PPO would begin with: with search.sigma0=1 the first candidates lie
about as far from the start as the solvers that PPO tries first. The result is the mean of the search distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cma
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from errors import InputError
from models.randomness import derived_seed, generator_of
from solvers import EPDTable
from training.parameters import GRID, SolverParameters
from training.ppo.cold_start import trainable
from training.ppo.config import Config
from training.ppo.rollout import DivergenceError, PromptStream, RolloutSource, Scores
from training.ppo.search import ppo
from training.ppo.search.protocol import Search, reward_metrics
from training.solver import Solver

DRAWS = 1024
"""Of the policy, from which its standard deviations are taken: known to some 2%."""


class Candidates(SolverParameters):
    """A solver's free parameters, and how far apart candidates are at first in each."""

    def __init__(self, solver: Solver, config: Config) -> None:
        """Begin at a solver."""
        super().__init__(solver.table, solver.sigmas, trainable(solver.table, config.ppo.train))
        sample = ppo.make_policy(solver, config)().sample(DRAWS, generator_of(derived_seed("spread of candidates")))
        drawn = {**sample.table().columns(), GRID: sample.sigmas()}
        spread = [self.free_of(name, drawn[name]).std(0).flatten() for name in self.learned]
        self.register_buffer("spread", torch.cat(spread))

    @torch.no_grad()
    def at(self, point: np.ndarray) -> tuple[EPDTable, Tensor | None]:
        """The solver at a point [n] of the search, 0 the start; it stays the mean until the next."""
        vector_to_parameters(self.base + self.spread * torch.from_numpy(point), self.parameters())
        return self.mean()


class CMAES(Search):
    """CMA-ES.

    Its draws come from a generator of its own, and what it is depends on the fitnesses that it was told alone: a
    checkpoint holds these, and a resumed search is told them again.
    """

    def __init__(self, policy: Candidates, source: RolloutSource[Any], prompts: PromptStream, config: Config) -> None:
        """Search around the policy's start.

        Args:
            policy: kept at the mean of the search distribution.
            source: tries `search.population` solvers on each prompt.
            prompts: where each generation's prompts come from.
            config: of it section `search`, `ppo.rollout_batch_size`, the images of a generation, and `run.seed`.

        Raises:
            InputError: there is but one parameter to search.
        """
        super().__init__(policy, source, prompts)
        self._population: int = config.search.population
        self._config = config
        self._told: list[list[float]] = []  # the fitnesses of each generation
        self._evolution = self._begin()

    def _step(self, number: int) -> dict[str, float]:
        """One generation.

        Raises:
            DivergenceError: no candidate's rewards are finite, or a candidate is no solver.
        """
        candidates = self._evolution.ask()
        scores = self._score(candidates)
        self._tell(candidates, self._fitness(scores.rewards).tolist())
        self._at(self._evolution.mean)
        return {**reward_metrics(number, scores, self._population), "step_size": float(self._evolution.sigma)}

    def _own_state(self) -> dict[str, Any]:
        return {"fitness": torch.tensor(self._told, dtype=torch.float64)}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._told = []
        self._evolution = self._begin()
        for fitness in state["fitness"].tolist():
            self._tell(self._evolution.ask(), fitness)

    def _begin(self) -> cma.CMAEvolutionStrategy:
        size = len(self.policy.base)
        if size < 2:
            raise InputError(f"CMA-ES needs at least two parameters, and ppo.train leaves it {size}: name more there")
        draw = np.random.default_rng(derived_seed("candidates", self._config.run.seed))
        options = {
            "popsize": self._population,
            "seed": np.nan,  # the global generator is neither seeded nor used
            "randn": lambda count, size: draw.standard_normal((count, size)),
            "verbose": -9,
            "verb_log": 0,
        }
        return cma.CMAEvolutionStrategy(np.zeros(size), self._config.search.sigma0, options)

    def _score(self, candidates: list[np.ndarray]) -> Scores:
        """Every candidate on each prompt of the generation, prompt-major."""
        tables, grids = zip(*map(self._at, candidates), strict=True)
        columns = {name: torch.stack([getattr(table, name) for table in tables]) for name in tables[0].columns()}
        prompts = self.prompts.take(self._config.ppo.rollout_batch_size // self._population)
        every = torch.arange(self._population).repeat(len(prompts))
        sigmas = None if grids[0] is None else torch.stack(grids)[every]
        outcome = self.source.roll_out(EPDTable(**columns).select(every), prompts, self.completed_steps, sigmas)
        return self.source.score(outcome)

    def _at(self, point: np.ndarray) -> tuple[EPDTable, Tensor | None]:
        """`policy.at`, where the point is a solver."""
        try:
            return self.policy.at(point)
        except ValueError as error:
            raise self._diverged(
                f"a candidate is no solver ({error}): the search went too far; lower search.sigma0"
            ) from error

    def _fitness(self, rewards: Tensor) -> Tensor:
        """Mean reward of each candidate [population]; one with a reward that is not finite is as good as the worst."""
        means = rewards.view(-1, self._population).mean(0)
        finite = means.isfinite()
        if not finite.any():
            raise DivergenceError(
                f"step {self.completed_steps + 1}: every candidate has rewards that are NaN or infinite: "
                f"start from a steadier table, or with a smaller search.sigma0"
            )
        return means.where(finite, means[finite].min())

    def _tell(self, candidates: list[np.ndarray], fitness: list[float]) -> None:
        self._evolution.tell(candidates, [-value for value in fitness])
        self._told.append(fitness)


make_policy, make_search = Candidates, CMAES
