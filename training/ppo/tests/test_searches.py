"""The other searches by the same command: a run, its resumption, its export and its page, and what is refused.

Of PPO tests/test_launch.py and tests/test_every_column.py say all that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from models import load_denoiser
from training.ppo import assembly
from training.ppo.checkpoint import load_checkpoint, table_from_plain
from training.ppo.config import METHODS, load_config
from training.ppo.export_epd_predictor import main as export_command
from training.ppo.tests.test_launch import assert_same, launch, timeless
from training.ppo.tests.tiny_world import START, write_world
from training.runs.checkpoint import step_path
from training.runs.run_folder import RunFolder, read_metrics
from training.solver import load_solver

TRAIN = "ppo.train=[positions, weights, guidance, history, grid]"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", params=[method for method in METHODS if method != "ppo"])
def finished(request: pytest.FixtureRequest, config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp(request.param)
    overrides = (f"run.output_root={root}", f"search.method={request.param}", TRAIN, "ppo.rollout_batch_size=8")
    result = launch("--config", config, "--override", *overrides)
    assert result.exit_code == 0, result.output
    # 2 intervals of 2 points: 4 + 2 + 6 + 1 + 1 = 14 parameters, for which CMA-ES takes 4 + 3 log 14 = 11; 8 divides 8.
    prompts = {"cma_es": "1 prompts x 8", "reward_gradient": "8 prompts x 1"}[request.param]
    assert f"8 images a step: {prompts} tables" in result.output
    assert "4 steps, 32 images in all" in result.output
    return RunFolder.open(next(root.iterdir()))


def test_a_search_writes_a_run(finished: RunFolder):
    rows = read_metrics(finished.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "heldout/reward" in row] == [0, 2, 4]
    assert rows[0]["heldout/reward_difference"] == 0.0
    assert torch.tensor(rows[0]["table"]["positions"]).allclose(START.positions.float(), atol=1e-6)
    assert all(rows[4]["table"][name] != first for name, first in rows[0]["table"].items())
    assert finished.report.stat().st_size > 10_000


def test_its_solver_is_exported_and_replays_as_the_watch_drew_it(finished: RunFolder):
    assert CliRunner().invoke(export_command, [str(finished.path)]).exit_code == 0
    solver, state = load_solver(finished.path), load_checkpoint(step_path(finished.checkpoints, 4))
    for name, entries in table_from_plain(state["table"]).columns().items():
        assert torch.equal(getattr(solver.table, name), entries)
    assert torch.equal(solver.sigmas, state["table"]["grid"])
    config = load_config(finished.config).config
    denoiser = load_denoiser(config.model.model_path, device="cpu", dtype=torch.float32)
    reward = assembly.load_reward(config.reward.weights_path, device="cpu", batch_size=4)
    latents = solver.on(denoiser).latents(denoiser, list("uvwxyz"), range(6))
    scores = reward.score(denoiser.decode(latents), list("uvwxyz"))
    assert scores.mean().item() == pytest.approx(read_metrics(finished.metrics)[4]["heldout/reward"], abs=1e-5)


def test_a_resumed_run_is_the_run_that_never_stopped(finished: RunFolder, copied: RunFolder):
    step_path(copied.checkpoints, 4).unlink()
    result = launch("--resume", copied.path)
    assert result.exit_code == 0, result.output
    again, before = (load_checkpoint(step_path(one.checkpoints, 4)) for one in (copied, finished))
    for part in ("trainer", "watch", "start", "table"):
        assert_same(again[part], before[part])
    assert timeless(read_metrics(copied.metrics)) == timeless(read_metrics(finished.metrics))


def test_a_run_goes_on_with_its_own_method_alone(finished: RunFolder, copied: RunFolder):
    step_path(copied.checkpoints, 4).unlink()
    method = load_config(finished.config).config.search.method
    other = next(name for name in METHODS if name != method)
    result = launch("--resume", copied.path, "--override", f"search.method={other}")
    assert result.exit_code == 2
    assert f"search.method={other!r}" in result.output or f"search.method={other}" in result.output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.method=sgd"], "must be one of ppo, cma_es, reward_gradient"),
        (["search.method=cma_es", "search.population=3"], "is not a multiple of search.population=3"),
        (["search.method=cma_es", "ppo.rollout_batch_size=13"], "cannot be shared out among 2 to 9 candidates"),
        (["search.method=cma_es", "ppo.shared_noise=false"], "tries every candidate on the same noise"),
        (["search.method=reward_gradient", "run.num_devices=2"], "runs in one process"),
    ],
)
def test_bad_input_is_refused_in_a_line(config: Path, overrides: list[str], message: str, tmp_path: Path):
    result = launch("--config", config, "--override", f"run.output_root={tmp_path}", *overrides)
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_term_of_the_loss_that_another_search_has_not_is_named(config: Path, method: str):
    asked = ("ppo.kl_coef=0.1", "ppo.rollout_batch_size=8", f"search.method={method}")
    result = launch("--config", config, "--dry-run", "--override", *asked)
    assert result.exit_code == 0, result.output
    said = f"note: ppo.kl_coef=0.1 does nothing: search.method={method} has no such term"
    assert (said in result.output) == (method != "ppo")
    assert "entropy_coef=0 does nothing" not in result.output


def test_a_package_that_is_not_there_is_named(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    monkeypatch.delitem(sys.modules, "training.ppo.search.cma_es", raising=False)
    result = launch("--config", config, "--dry-run", "--override", "search.method=cma_es")
    assert result.exit_code == 2
    assert "search.method=cma_es needs the package cma: pip install cma" in result.output


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
