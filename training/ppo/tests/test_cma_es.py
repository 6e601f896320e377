"""CMA-ES over solvers: it finds a known optimum, and its bookkeeping is exact. As a run: test_searches."""

from __future__ import annotations

import copy
import dataclasses
import sys

import numpy as np
import pytest
import torch

from errors import InputError
from solvers import EPDTable
from training.parameters import GRID, PARTS
from training.ppo.cold_start import DRAWN, TRAINED, prepare_table
from training.ppo.config import Config, PPOConfig, SearchConfig
from training.ppo.rollout import DivergenceError, PromptStream, Scores
from training.ppo.search import ppo
from training.ppo.search.cma_es import CMAES, Candidates, make_policy, make_search
from training.ppo.tests.analytic import PROMPTS, QuadraticSource, cold_start_table
from training.solver import Solver

POPULATION = 8
TARGET = EPDTable(
    torch.tensor([[0.15, 0.6], [0.45, 0.8]], dtype=torch.float64),
    torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64),
)
SIGMAS = torch.tensor([8.0, 3.0, 1.0, 0.2], dtype=torch.float64)


def configured(train=TRAINED, **ppo) -> Config:
    settings = PPOConfig(train=list(train), rollout_batch_size=2 * POPULATION, **ppo)
    return dataclasses.replace(Config(), ppo=settings, search=SearchConfig("cma_es", population=POPULATION))


def a_solver(train=TRAINED) -> Solver:
    table = prepare_table(cold_start_table(3), train, guidance_scale=7.5).table
    return Solver("start", "epd", 4, table=table, sigmas=SIGMAS)


def a_search(source=None, *, seed=0, policy=None, config=None) -> CMAES:
    config = config or configured()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
    policy = policy or make_policy(Solver("start", "epd", 3, table=cold_start_table()), config)
    stream = PromptStream(PROMPTS, shuffle=True, seed=seed)
    return make_search(policy, source or QuadraticSource(TARGET, POPULATION), stream, config)


def mean_of(search: CMAES) -> torch.Tensor:
    table, sigmas = search.policy.mean()
    assert sigmas is None
    return torch.cat([table.positions, table.weights])


# --- the search ------------------------------------------------------------------------------------------------------


def test_it_finds_the_optimum_of_a_quadratic_in_the_table():
    search = a_search()
    torch.testing.assert_close(mean_of(search), torch.cat([cold_start_table().positions, cold_start_table().weights]))
    for _ in range(80):
        row = search.step()
    torch.testing.assert_close(mean_of(search), torch.cat([TARGET.positions, TARGET.weights]), rtol=0, atol=2e-3)
    assert row["images"] == 80 * 2 * POPULATION
    assert row["step_size"] < 0.1


@pytest.mark.parametrize("name", DRAWN)
def test_the_spread_is_that_of_the_policys_draws(name):
    """A candidate one unit from the start in each parameter is as far off as draws are, to first order."""
    config = configured((name,), dirichlet_concentration=5000.0, grid_concentration=9000.0, history_std=0.2)
    solver = a_solver((name,))
    policy = make_policy(solver, config)
    sample = ppo.make_policy(solver, config)().sample(20_000, torch.Generator().manual_seed(5))
    drawn = sample.sigmas() if name == GRID else getattr(sample.table(), name)
    free, base = policy.free_of(name, drawn).flatten(1), policy.base
    assert len(policy.spread) == PARTS[name].free(3, 2) == len(base)
    torch.testing.assert_close(policy.spread, free.std(0), rtol=0.1, atol=0)
    torch.testing.assert_close(free.mean(0), base, rtol=0.05, atol=0.05)


def test_a_point_of_the_search_is_a_solver_and_0_is_the_start():
    policy = Candidates(a_solver(tuple(DRAWN)), configured(tuple(DRAWN)))
    table, sigmas = policy.at(np.zeros(len(policy.base)))
    for name, entries in a_solver(tuple(DRAWN)).table.columns().items():
        torch.testing.assert_close(getattr(table, name), entries, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sigmas, SIGMAS, rtol=1e-10, atol=0)
    moved, grid = policy.at(np.ones(len(policy.base)))
    assert not torch.equal(grid, sigmas)
    assert all(not torch.equal(part, getattr(table, name)) for name, part in moved.columns().items())
    assert torch.equal(policy.mean()[0].history, moved.history)


class Noted(QuadraticSource):
    """Keeps what it is asked to try."""

    def roll_out(self, tables, prompts, step, sigmas=None):
        self.tried = tables, sigmas
        return super().roll_out(tables, prompts, step)


@pytest.mark.parametrize("train", [(GRID,), ("history", GRID), tuple(DRAWN)])
def test_every_candidate_is_tried_with_its_own_numbers(train):
    source = Noted(cold_start_table(3), POPULATION)
    search = a_search(source, policy=make_policy(a_solver(train), configured(train)), config=configured(train))
    search.step()
    tables, sigmas = source.tried
    assert len(sigmas) == tables.batch_size == 2 * POPULATION
    assert len(sigmas[:, 1].unique()) == POPULATION
    assert torch.equal(sigmas[:POPULATION], sigmas[POPULATION:])  # for the second prompt again
    if "history" in train:
        assert len(tables.history[:, 2, 1].unique()) == POPULATION
    assert search.policy.mean()[1][1] != SIGMAS[1]


def test_it_is_the_same_again_and_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the generator that cma would use
    one, two, other = a_search(), a_search(), a_search(seed=1)
    for search in (one, two, other):
        search.step()
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(mean_of(one), mean_of(two))
    assert not torch.equal(mean_of(one), mean_of(other))


def test_a_resumed_search_is_the_search_that_never_stopped():
    whole = a_search()
    for _ in range(3):
        whole.step()
    state = whole.state_dict()
    resumed = a_search()
    resumed.load_state_dict(copy.deepcopy(state))
    for _ in range(2):
        rows = [{k: v for k, v in search.step().items() if not k.startswith("seconds")} for search in (whole, resumed)]
        assert rows[0] == rows[1]
    assert torch.equal(mean_of(whole), mean_of(resumed))


class Faulty(QuadraticSource):
    """Gives no finite reward to the tables that `broken` [population] names, on the first prompt alone."""

    def __init__(self, broken):
        super().__init__(TARGET, POPULATION)
        self.broken = torch.tensor(broken)

    def score(self, outcome):
        scores = super().score(outcome)
        scores.rewards[:POPULATION][self.broken] = torch.nan
        return Scores(scores.rewards, scores.parts)


def test_a_candidate_without_a_finite_reward_is_as_good_as_the_worst():
    search = a_search(Faulty([True] + [False] * (POPULATION - 1)))
    row = search.step()
    (fitness,) = search.state_dict()["fitness"]
    assert fitness[0] == fitness[1:].min()
    assert row["dropped_groups"] == 1
    assert np.isfinite(row["reward_mean"])
    with pytest.raises(DivergenceError, match="every candidate"):
        a_search(Faulty([True] * POPULATION)).step()


def test_a_candidate_that_is_no_solver_ends_the_search_in_a_line():
    config = configured((*TRAINED, "guidance"))
    config = dataclasses.replace(config, search=dataclasses.replace(config.search, sigma0=1e5))
    search = a_search(policy=make_policy(a_solver((*TRAINED, "guidance")), config), config=config)
    with pytest.raises(DivergenceError, match=r"step 1: a candidate is no solver .* lower search\.sigma0"):
        search.step()


def test_one_parameter_alone_is_refused():
    one = EPDTable(torch.tensor([[0.5]]).double(), torch.tensor([[1.0]]).double())
    config = configured(("positions",))
    with pytest.raises(InputError, match=r"at least two parameters, and ppo\.train leaves it 1"):
        a_search(policy=make_policy(Solver("one", "epd", 2, table=one), config), config=config)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
