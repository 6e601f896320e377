"""What a run samples, rewards and is held to is what its files say: the joints between the parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from solvers import EPDTable
from tests.tiny_pipeline import save_tiny_pipeline
from training.ppo.assembly import Parts, build, make_fabric, prepare
from training.ppo.config import load_config
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rl_runner import Images
from training.ppo.tests.test_rl_runner import runner
from training.ppo.tests.tiny_world import METADATA, START, write_world
from training.snapshot import save_snapshot
from training.solver import load_solver

SOLVER = replace(
    START,
    scale_dir=torch.tensor([[1.1, 0.9], [1.0, 1.2]], dtype=torch.float64),
    scale_time=torch.tensor([[1.0, 0.8], [1.1, 0.9]], dtype=torch.float64),
)
SAYS = {
    **METADATA,
    "schedule_type": "polynomial",
    "schedule_rho": 3.0,
    "afs": True,
    "sigma_min": 0.2,
    "sigma_max": 9.0,
    "guidance_rate": 3.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def parts_of(world: Path, folder: Path, metadata: dict) -> tuple[Parts, EPDTable, Path]:
    file = save_snapshot(folder / "network-snapshot-000001", SOLVER, metadata)
    start = prepare(load_config(world, [f"data.predictor_snapshot={file}"]))
    fabric = make_fabric(start.config)
    fabric.launch()
    return build(start, fabric), start.table, file


@pytest.mark.parametrize(
    "says", [SAYS, {**SAYS, "afs": False}, {**SAYS, "sigma_max": 12.0}, {**SAYS, "guidance_rate": 1.5}]
)
def test_a_rollout_samples_the_solver_that_its_file_says(world: Path, tmp_path: Path, says: dict):
    """AFS, the file's own range of noise levels, exponent, guidance and scales: as sample.py takes them."""
    parts, table, file = parts_of(world, tmp_path, says)
    prompts, seeds = ["a", "b"], [3, 4]
    rolled = parts.trainer.source.sample_images(table, prompts, seeds)
    solver = load_solver(file).on(parts.denoiser)
    latents = solver.latents(parts.denoiser, prompts, seeds)
    torch.testing.assert_close(rolled.pixels, parts.denoiser.decode(latents), rtol=0, atol=1e-6)
    assert [solver.sigmas[0].item(), solver.sigmas[-1].item()] == pytest.approx([says["sigma_max"], says["sigma_min"]])


def test_each_of_these_settings_changes_the_image(world: Path, tmp_path: Path):
    """So that the test above could fail."""
    ranges = [{"sigma_max": 12.0}, {"sigma_min": 0.5}, {"schedule_rho": 5.0}]
    changes = [{}, {"afs": False}, *ranges, {"guidance_rate": 1.5}]
    images = []
    for number, change in enumerate(changes):
        parts, table, _ = parts_of(world, tmp_path / str(number), {**SAYS, **change})
        images.append(parts.trainer.source.sample_images(table, ["a"], [3]).pixels)
    for other in images[1:]:
        assert (other - images[0]).abs().max() > 1e-3


def test_scores_are_kept_under_all_that_they_depend_on(tmp_path: Path):
    """What says it changes with the model's weights, the rewards', and the solver's settings, and with nothing else."""
    world = write_world(tmp_path / "world")

    def described(*overrides: str, **says: object) -> dict:
        file = save_snapshot(tmp_path / "network-snapshot-000001", SOLVER, {**SAYS, **says})
        start = prepare(load_config(world, [f"data.predictor_snapshot={file}", *overrides]))
        fabric = make_fabric(start.config)
        fabric.launch()
        parts = build(start, fabric)
        return parts.judge._kept.described(parts.start.table, parts.start.solver.sigmas)

    first = described()
    assert described("run.seed=3", "ppo.steps=9", "ppo.learning_rate=0.1", "logging.preview_prompts=1") == first
    others = [described(**change) for change in ({"guidance_rate": 4.0}, {"sigma_max": 12.0}, {"afs": False})]
    others.append(described("logging.panel=null"))
    others.append(described(f"reward.weights_path={tmp_path / 'world' / 'panel.pt'}", "logging.panel=null"))
    save_tiny_pipeline(tmp_path / "world" / "model", seed=1)
    others.append(described())
    assert first not in others


def test_the_kl_term_is_of_the_policy_from_the_cold_start(world: Path, tmp_path: Path):
    """KL(policy || cold start), not the other way round."""
    trainer = parts_of(world, tmp_path, SAYS)[0].trainer
    with torch.no_grad():
        trainer.policy.output.bias.copy_(torch.linspace(-2, 0.5, len(trainer.policy.output.bias)))
    distribution, cold = trainer.policy(), trainer.policy.cold_start()
    here, back = distribution.kl(cold).item(), cold.kl(distribution).item()
    assert abs(here - back) > 0.1 * here
    sample = distribution.sample(4, torch.Generator().manual_seed(0))
    metrics = trainer._update_minibatch(sample, distribution.log_prob(sample).detach(), torch.ones(4))
    assert metrics["kl"] == pytest.approx(here)


class Numbers:
    """A reward that says what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.next = torch.zeros(0)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.next


def test_a_mix_knows_the_scores_that_it_combines():
    """The running moments take in a step's scores before they standardise them: both steps', not the first's."""
    one, two = Numbers("one"), Numbers("two")
    rolled = runner(reward=WeightedMix({"one": (one, 1.0), "two": (two, 2.0)}))
    steps = [torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([10.0, 11.0, 13.0, 20.0])]
    outcome = Images(torch.zeros(4, 3, 2, 2), ("a",) * 4, torch.ones(4, dtype=torch.bool))
    for scores in steps:
        one.next, two.next = scores, -(scores**2)
        rewards = rolled.score(outcome).rewards
    every = torch.cat(steps)
    expected = (steps[1] - every.mean()) / every.std()
    squares = -(every**2)
    expected = expected + 2 * (-(steps[1] ** 2) - squares.mean()) / squares.std()
    torch.testing.assert_close(rewards.float(), expected, rtol=1e-5, atol=1e-5)
