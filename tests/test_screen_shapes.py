"""The screening of candidate worlds: what each leaves open, the ladder of solvers, its table and its command line."""

import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import screen_shapes as screen
from benchmarks.screen_shapes import CANDIDATES, Rung, ladder, parse_guidances, render_candidate, table
from models import load_denoiser
from models.shapes import scenes
from models.shapes.data import render_scenes
from models.shapes.tokenizer import build_tokenizer
from models.shapes.train_autoencoder import build_autoencoder
from models.shapes.train_diffusion import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    build_scheduler,
    build_text_encoder,
    save_pipeline,
)
from models.shapes.verify import verify
from schedules import get_schedule
from solvers import SAMPLERS
from tests.by_hand import latents_by_hand
from tests.tiny_pipeline import tiny_unet
from training.solver import Schedule


def drawn(name, number=40):
    """Scenes and pictures of a candidate."""
    random = np.random.default_rng(0)
    for index in range(number):
        scene = scenes.draw_scene(random, "train", 1 + index % scenes.MOST_OBJECTS)
        yield CANDIDATES[name](scene, scenes.imagine(scene, random))


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_are_captions_of_their_pictures(name):
    for scene, picture in drawn(name):
        assert scenes.parse(scene.caption()) == scene
        groups = [group for group in scene.groups for _ in range(group.number)]
        assert all(group.admits(item) for group, (item, _) in zip(groups, picture.items, strict=True))
        assert scene.background in (None, picture.background)


def test_the_open_candidate_is_the_world_itself():
    ours, theirs = render_candidate("open", 5, 3), render_scenes("train", 5, 3, progress=False)
    assert ours.captions == theirs.captions
    assert np.array_equal(ours.images, theirs.images)


def test_the_plain_candidate_leaves_all_open_but_the_background():
    for (scene, picture), (before, whole) in zip(drawn("plain"), drawn("open"), strict=True):
        assert (scene.pattern, np.ptp(picture.tones)) == ("plain", 0)
        assert scene.groups == before.groups
        assert picture.items == whole.items


def test_the_settled_candidate_leaves_nothing_open_but_places_and_sizes():
    for scene, picture in drawn("settled"):
        assert 1 <= len(scene.groups) == len(picture.items) <= scenes.MOST_GROUPS
        for group, (item, place) in zip(scene.groups, picture.items, strict=True):
            assert group == scenes.Group(1, *item)
            assert (place.angle, place.phase) == (0, 0)
        assert scene.pattern == "plain"
        assert scene.background is not None
        assert (picture.light, np.ptp(picture.tones)) == (0, 0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of the world's own latents, text and images with a network of a few thousand random weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        channels = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
        network = tiny_unet(sample_size=16, cross_attention_dim=TEXT_WIDTH, **channels)
        model = nn.ModuleDict({"network": network, "text_encoder": build_text_encoder(tokenizer)})
        save_pipeline(folder, model, build_autoencoder(), tokenizer, build_scheduler())
    return str(folder)


PROMPTS = ["a red star on a background", "two small rings on a plain navy background"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(screen, "REFERENCE_EVALUATIONS", 4)
    monkeypatch.setattr(screen, "SOLVERS", ("ddim", "heun", "dpmpp:2"))
    monkeypatch.setattr(screen, "TRIED_SCHEDULES", (Schedule("discrete", 1.0), Schedule("polynomial", 7.0)))


@pytest.mark.usefixtures("small")
def test_the_ladder_measures_each_solver_at_its_best_schedule_against_the_reference(pipeline):
    reference_score, rungs = ladder(pipeline, PROMPTS, 2.0, (1, 4), "cpu")
    assert [rung.solver for rung in rungs if rung.evaluations == 1] == ["ddim", "dpmpp:2"]  # heun takes two
    found = {(rung.solver, rung.evaluations): rung for rung in rungs}
    assert [key for key, rung in found.items() if rung.distance == 0] == [("dpmpp:2", 4)]

    denoiser = load_denoiser(pipeline, device="cpu", dtype=torch.float32)

    def measured(solver, intervals, schedule, rho, **options):
        low, high = denoiser.sigma_min, denoiser.sigma_max
        sigmas = get_schedule(schedule, intervals + 1, low, high, rho=rho, denoiser=denoiser)
        latents = latents_by_hand(
            denoiser, PROMPTS, [0, 1], lambda d, x, levels: SAMPLERS[solver](d, x, levels, **options), sigmas, 2.0
        )
        score = np.mean(
            [verify(image, text).score for image, text in zip(denoiser.decode(latents), PROMPTS, strict=True)]
        )
        return latents.flatten(1), score

    target, score = measured("dpmpp", 4, "discrete", 1.0, max_order=2)
    assert reference_score == pytest.approx(score)
    heun = [measured("heun", 2, *schedule[:2]) for schedule in screen.TRIED_SCHEDULES]
    distances = [(latents - target).norm(dim=1).mean() / target.norm(dim=1).mean() for latents, _ in heun]
    assert found["heun", 4].distance == pytest.approx(float(min(distances)), rel=1e-4)
    assert found["heun", 4].score == pytest.approx(max(score for _, score in heun))


@pytest.mark.usefixtures("small")
def test_a_solver_that_explodes_is_infinitely_far(pipeline, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "ddim", lambda denoise, x, levels, **_: x * math.nan)
    _, rungs = ladder(pipeline, PROMPTS[:1], 1.0, (2,), "cpu")
    assert [rung.solver for rung in rungs if rung.distance == math.inf] == ["ddim"]


def test_the_table_has_a_row_for_each_budget_and_a_column_for_each_solver():
    rungs = [Rung("ddim", 1, 0.5, 0.25), Rung("ddim", 20, 0.1234, 0.9), Rung("heun", 20, math.inf, 0.0)]
    assert table(rungs, 0.95).splitlines() == [
        "| evaluations | ddim | heun | dpm2 | dpmpp:2 | ipndm |",
        "|---|---|---|---|---|---|",
        "| 1 | 0.500 / 0.250 |  |  |  |  |",
        "| 20 | 0.123 / 0.900 | inf / 0.000 |  |  |  |",
        "",
        "Reference (200 evaluations): 0.950",
    ]


def test_guidances_are_read_before_anything_is_trained(tmp_path):
    assert parse_guidances("1, 2.5,0") == [1.0, 2.5, 0.0]
    vae = tmp_path / "vae"
    vae.mkdir()
    for text in ("", "1,", "two", "-1", "nan", "inf", "1;2"):
        result = CliRunner().invoke(
            screen.main, ["open", f"--guidances={text}", "--vae", str(vae), "--scratch", str(tmp_path / "scratch")]
        )
        assert (result.exit_code, "--guidances" in result.output) == (2, True), result.output
    assert not (tmp_path / "scratch").exists()


def test_a_folder_without_an_autoencoder_is_refused_in_one_line(tmp_path):
    result = CliRunner().invoke(screen.main, ["open", "--vae", str(tmp_path), "--scratch", str(tmp_path / "scratch")])
    assert result.exit_code == 2
    assert "config.json is missing" in result.output


def test_the_command_trains_and_prints_a_ladder_for_each_guidance(tmp_path, monkeypatch):
    monkeypatch.setattr(screen, "BUDGETS", (2,))
    monkeypatch.setattr(screen, "REFERENCE_EVALUATIONS", 3)
    monkeypatch.setattr(screen, "TRIED_SCHEDULES", screen.TRIED_SCHEDULES[:1])
    build_autoencoder().save_pretrained(tmp_path / "vae")
    arguments = ["settled", "--steps", 1, "--images", 64, "--number", 1, "--guidances", "1,3"]
    paths = ["--vae", tmp_path / "vae", "--scratch", tmp_path / "scratch"]
    result = CliRunner().invoke(screen.main, [str(argument) for argument in (*arguments, *paths)])
    assert result.exit_code == 0, result.output
    assert result.output.count("| evaluations |") == 2
    assert "settled, guidance 3, distance to the reference / verifier score" in result.output
    assert (tmp_path / "scratch" / "settled" / "pipeline" / "model_index.json").is_file()
