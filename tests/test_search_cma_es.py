"""CMA-ES over tables: it finds a known optimum, its bookkeeping is exact, and its runs are runs like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks.search_cma_es import TableSearch, deviations, main, move_mean
from errors import InputError
from solvers import EPDTable
from training.parameters import GRID
from training.ppo.checkpoint import load_checkpoint, table_from_plain
from training.ppo.cold_start import DRAWN, TRAINED, prepare_table
from training.ppo.config import PPOConfig
from training.ppo.export_epd_predictor import main as export_command
from training.ppo.launch import main as launch_command
from training.ppo.policy import EPDParamPolicy
from training.ppo.rollout import DivergenceError, PromptStream, Scores
from training.ppo.tests.analytic import PROMPTS, QuadraticSource, cold_start_table
from training.ppo.tests.tiny_world import START, write_world
from training.runs.checkpoint import step_path
from training.runs.run_folder import RunFolder, read_metrics
from training.solver import load_solver

POPULATION = 8
TARGET = EPDTable(
    torch.tensor([[0.15, 0.6], [0.45, 0.8]], dtype=torch.float64),
    torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64),
)


def a_policy(train=TRAINED, **settings) -> EPDParamPolicy:
    table = prepare_table(cold_start_table(3), train, guidance_scale=7.5).table
    sigmas = torch.tensor([8.0, 3.0, 1.0, 0.2], dtype=torch.float64)
    return EPDParamPolicy(table, sigmas=sigmas, train=train, **({"concentration": 20.0} | settings))


def a_search(source=None, *, seed=0, policy=None) -> TableSearch:
    settings = PPOConfig(rollout_batch_size=2 * POPULATION, rloo_k=POPULATION, shared_noise=True)
    stream = PromptStream(PROMPTS, shuffle=True, seed=seed)
    source = source or QuadraticSource(TARGET, POPULATION)
    return TableSearch(
        policy or EPDParamPolicy(cold_start_table(), concentration=20.0),
        source,
        stream,
        settings,
        seed=seed,
        sigma0=1.0,
    )


def mean_of(search: TableSearch) -> torch.Tensor:
    table = search.policy().mean_table()
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


def test_the_spread_is_that_of_the_policys_draws():
    policy = a_policy(tuple(DRAWN), concentration=5000.0, grid_concentration=9000.0, scale_std=0.03, history_std=0.2)
    sample = policy().sample(20_000, torch.Generator().manual_seed(0))
    spread = policy.split(deviations(policy))
    for name, drawn in sample.drawn.items():
        if name in ("positions", "weights", GRID):
            ratios = drawn[..., :-1] - drawn[..., -1:]
            rows = spread[name].mT if name == GRID else spread[name]
            torch.testing.assert_close(rows[:, :-1], ratios.std(0), rtol=0.03, atol=0)
            assert (rows[:, -1] == 0).all()
            continue
        location, log_std = spread[name].chunk(2, dim=-1)
        assert (log_std == 0).all()
        if name.endswith("history"):
            assert (location.triu() == 0).all()
            location = location[[1, 2, 2], [0, 0, 1]][None]
        torch.testing.assert_close(location, drawn.std(0), rtol=0.03, atol=0)


def test_the_policy_holds_any_point_of_the_search():
    policy = a_policy(tuple(DRAWN))
    residual = torch.randn(policy.base.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    move_mean(policy, residual)
    found, wanted = policy(), policy.distribution(residual)
    for name, entries in wanted.mean_table().columns().items():
        assert torch.equal(getattr(found.mean_table(), name), entries)
    assert torch.equal(found.mean_sigmas(), wanted.mean_sigmas())
    long = EPDParamPolicy(cold_start_table(65), concentration=20.0)
    with pytest.raises(InputError, match="at most 64 intervals, this one has 65"):
        move_mean(long, torch.zeros_like(long.base))


class Noted(QuadraticSource):
    """Keeps what it is asked to try."""

    def roll_out(self, tables, prompts, step, sigmas=None):
        self.tried = tables, sigmas
        return super().roll_out(tables, prompts, step)


@pytest.mark.parametrize("train", [(GRID,), ("history", GRID), tuple(DRAWN)])
def test_every_candidate_is_tried_with_its_own_numbers(train):
    source = Noted(cold_start_table(3), POPULATION)
    search = a_search(source, policy=a_policy(train))
    search.step()
    tables, sigmas = source.tried
    assert len(sigmas) == tables.batch_size == 2 * POPULATION
    assert len(sigmas[:, 1].unique()) == POPULATION
    assert torch.equal(sigmas[:POPULATION], sigmas[POPULATION:])  # for the second prompt again
    if "history" in train:
        assert len(tables.history[:, 2, 1].unique()) == POPULATION
    assert search.policy().mean_sigmas()[1] != search.policy.start[GRID][1]


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
    resumed.load_state_dict({**state, "policy": {name: part.clone() for name, part in state["policy"].items()}})
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


def test_one_parameter_alone_is_refused():
    one = EPDTable(torch.tensor([[0.5]]).double(), torch.tensor([[1.0]]).double())
    with pytest.raises(InputError, match=r"at least two parameters, and ppo\.train leaves it 1"):
        a_search(policy=EPDParamPolicy(one, concentration=20.0))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("finished")
    result = run("--config", config, "--override", f"run.output_root={root}", "ppo.rollout_batch_size=16",
                 "ppo.minibatch_size=16", "ppo.steps=3")  # fmt: skip
    assert result.exit_code == 0, result.output
    # Two intervals of two points have 6 parameters, for which CMA-ES takes 4 + 3 log 6 = 9; 8 is what divides 16.
    assert "16 images a step: 2 prompts x 8 tables" in result.output
    assert "3 steps, 48 images in all" in result.output
    return RunFolder.open(next(root.iterdir()))


def test_a_search_writes_a_run(finished: RunFolder):
    rows = read_metrics(finished.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "heldout/reward" in row] == [0, 2, 3]
    assert rows[0]["heldout/reward_difference"] == 0.0
    assert torch.tensor(rows[0]["table"]["positions"]).allclose(START.positions.float(), atol=1e-6)
    assert rows[3]["table"] != rows[0]["table"]
    assert finished.report.stat().st_size > 10_000


def test_its_table_is_exported_like_any_other(finished: RunFolder):
    assert CliRunner().invoke(export_command, [str(finished.path)]).exit_code == 0
    exported = load_solver(finished.path).table
    state = load_checkpoint(step_path(finished.checkpoints, 3))
    torch.testing.assert_close(exported.positions, table_from_plain(state["table"]).positions, rtol=0, atol=0)


def test_it_goes_on_where_it_was_and_only_by_its_own_command(finished: RunFolder, tmp_path: Path):
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(finished.path, folder.path)
    last = step_path(folder.checkpoints, 3)
    last.unlink()
    refused = CliRunner().invoke(launch_command, ["--resume", str(folder.path)])
    assert refused.exit_code == 2
    assert "another kind of search" in refused.output
    result = run("--resume", folder.path)
    assert result.exit_code == 0, result.output
    again, before = (load_checkpoint(step_path(one.checkpoints, 3)) for one in (folder, finished))
    assert torch.equal(again["trainer"]["fitness"], before["trainer"]["fitness"])
    assert torch.equal(again["table"]["positions"], before["table"]["positions"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name the run's configuration"),
        (("--population", 3), "cannot be shared out among a population of 3"),
        (("--resume", ".", "--sigma0", 2), "a search's own settings"),
    ],
)
def test_bad_input_is_refused_in_a_line(config: Path, args: tuple, message: str):
    given = ("--config", config) if "--population" in args else ()
    result = run(*given, *args)
    assert result.exit_code == 2
    assert message in result.output
