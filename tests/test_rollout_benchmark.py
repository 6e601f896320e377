"""The rollout benchmark: the plain path is the same computation, and what is counted is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.rollout import PlainPath, compare, main, make_work, network_flops, through_pillow
from models import clip, load_denoiser
from training.ppo.assembly import build, make_fabric, prepare
from training.ppo.config import load_config
from training.ppo.rewards import RewardHPS
from training.ppo.tests.tiny_world import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_both_paths_make_the_same_images_and_scores(world):
    start = prepare(load_config(world, ["logging.eval_interval=0"]))
    parts = build(start, make_fabric(start.config))
    runner = parts.trainer.source
    plain = PlainPath(
        runner,
        load_denoiser(world.parent / "model", device="cpu", dtype=torch.float32),
        RewardHPS(world.parent / "reward.pt"),
        torch.float32,
    )
    work = make_work(parts, 8)
    timings = compare(runner, plain, work, 2)
    assert len(timings.fast) == len(timings.plain) == 2
    assert timings.largest_difference < 1e-4
    images = runner.roll_out(work.tables, work.prompts, 0)
    seeds = [runner.noise_seed(0, group, member) for group in range(2) for member in range(4)]
    _, scores = plain(work, seeds)
    # Pillow rounds to 8 bits.
    torch.testing.assert_close(scores.double(), runner.score(images).rewards, rtol=0, atol=0.02)


def test_pillow_does_what_the_device_does_but_for_rounding():
    picture = (torch.rand(48, 40, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    ours = clip.preprocess(picture.movedim(-1, 0)[None] / 255, 16)[0]
    # One step of 8 bits, over the smallest of CLIP's deviations, for each of the two directions.
    torch.testing.assert_close(through_pillow(picture.numpy(), 16), ours, rtol=0, atol=2.2 / 255 / 0.26)


def test_flops_are_counted_for_both_halves_of_the_guidance(world):
    denoiser = load_denoiser(world.parent / "model", device="cpu", dtype=torch.float32)
    alone, guided = network_flops(denoiser, 1.0), network_flops(denoiser, 7.5)
    assert guided == 2 * alone
    # The first convolution alone: 8x8 pixels, 4 to 8 channels, 3x3; one multiply-add is two operations.
    assert alone > 2 * 8 * 8 * 4 * 8 * 9


def test_the_command_prints_the_figures(world):
    result = CliRunner().invoke(main, ["--config", str(world), "--images", "4", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    figures = ("4 images a step", "images/s", "plain over fast", "GFLOP an image", "peak memory", "network ", "update ")
    for figure in figures:
        assert figure in result.output
    refused = CliRunner().invoke(main, ["--config", str(world), "--images", "6"])
    assert refused.exit_code == 2
    assert "ppo.rollout_batch_size=6 is not a multiple of ppo.rloo_k=4" in refused.output


def test_a_network_that_cannot_be_compiled_is_said_before_anything_is_loaded(world, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = CliRunner().invoke(main, ["--config", str(world), "--override", "model.compile=true"])
    assert result.exit_code == 2
    assert "model.compile=true: torch.compile needs a compiler for cpu, and no-such-compiler is not" in result.output
