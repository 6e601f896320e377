"""The guidance that a pipeline's own folder names is what every command samples with when nobody says another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import evaluate
import sample
import train
from errors import InputError
from models import load_denoiser
from models.latent_diffusion import LatentDiffusion
from models.registry import default_guidance_scale
from tests.tiny_pipeline import save_tiny_pipeline
from training.ppo.launch import main as launch
from training.ppo.rivals import GUIDANCES
from training.ppo.tests.tiny_world import METADATA, START, write_world
from training.snapshot import load_snapshot, save_snapshot

OWN, USUAL = 2.5, 7.5


def say(folder: Path, content: object) -> Path:
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return say(save_tiny_pipeline(tmp_path / "pipeline"), {"guidance_scale": OWN})


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> set[float]:
    """The guidance of every network call that is made from here on."""
    seen: set[float] = set()
    guided = LatentDiffusion._guided

    def watched(self, z, times, conditioning, scales, dtype):
        seen.update(scales.tolist())
        return guided(self, z, times, conditioning, scales, dtype)

    monkeypatch.setattr(LatentDiffusion, "_guided", watched)
    return seen


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"guidance_scale": 3}, 3.0),
        ({"guidance_scale": 0.0}, 0.0),
        ({"guidance_scale": 1e6}, 1e6),
        ({"guidance_scale": None, "max_length": 20}, USUAL),
        ({}, USUAL),
    ],
)
def test_the_folder_says_it_or_the_usual_scale_holds(pipeline, content, expected):
    say(pipeline, content)
    assert default_guidance_scale(str(pipeline)) == expected
    assert load_denoiser(pipeline, device="cpu", dtype=torch.float32).default_guidance_scale == expected


def test_without_the_file_or_the_model_the_usual_scale_holds(pipeline):
    (pipeline / "generation_config.json").unlink()
    assert default_guidance_scale(str(pipeline)) == USUAL
    assert load_denoiser(pipeline, device="cpu", dtype=torch.float32).default_guidance_scale == USUAL
    assert default_guidance_scale("sd15") == default_guidance_scale("nothing of that name") == USUAL


@pytest.mark.parametrize(
    "content",
    [
        '{"guidance_scale": NaN}',
        '{"guidance_scale": Infinity}',
        '{"guidance_scale": 1e999}',
        '{"guidance_scale": 1' + 400 * "0" + "}",
        {"guidance_scale": -1},
        {"guidance_scale": "3"},
        {"guidance_scale": True},
        {"guidance_scale": [3]},
    ],
)
def test_anything_but_a_finite_number_of_at_least_0_is_refused(pipeline, content):
    say(pipeline, content)
    for read in (default_guidance_scale, lambda spec: load_denoiser(spec, device="cpu", dtype=torch.float32)):
        with pytest.raises(InputError, match=r"generation_config\.json: guidance_scale .* finite number of at least 0"):
            read(str(pipeline))


@pytest.mark.parametrize("content", ["", "[3]", "{"])
def test_a_file_without_a_json_object_is_refused(pipeline, content):
    say(pipeline, content)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        default_guidance_scale(str(pipeline))


def test_sample_draws_with_it(pipeline, scales, tmp_path):
    common = ("--model_path", pipeline, "--solver", "ddim", "--num-steps", 3, "--prompt", "a dog", "--seeds", 0)
    output = run(sample.main, *common, "--outdir", tmp_path / "own")
    assert scales == {OWN}
    assert "guidance 2.5" in output
    run(sample.main, *common, "--outdir", tmp_path / "told", "--guidance", 4)
    assert scales == {OWN, 4.0}


def test_evaluate_compares_with_it(pipeline, scales, tmp_path, monkeypatch):
    monkeypatch.setattr("training.measuring.evaluation.REFERENCE_STEPS", 4)
    write_world(tmp_path / "world")
    (tmp_path / "prompts.csv").write_text("text\na\nb\n")
    run(
        evaluate.main,
        *("--model", pipeline, "--reward", tmp_path / "world" / "reward.pt", "--exps", tmp_path / "none"),
        *("--prompt-file", tmp_path / "prompts.csv", "--number", 2, "--solvers", "ddim", "--nfe", 2),
        *("--schedules", "discrete", "--outdir", tmp_path / "out", "--cache", tmp_path / "cache"),
    )
    assert scales == {OWN}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["guidance"] == OWN


def test_train_distils_with_it_and_writes_it_down(pipeline, scales, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    common = ("--dataset_name", "tiny", "--model_path", pipeline, "--num_steps", 3, "--outdir", tmp_path / "exps")
    run(train.main, *common, "--init-only")
    assert scales == set()
    small = ("--M", 1, "--trajectories", 4, "--batch", 2, "--total_kimg", 0.002, "--device", "cpu")
    run(train.main, *common, *small, "--prompt-file", tmp_path / "prompts.txt")
    assert scales == {OWN}
    snapshots = sorted((tmp_path / "exps").glob("*/network-snapshot-*.pkl"))
    assert len(snapshots) >= 2
    assert {load_snapshot(path)[1]["guidance_rate"] for path in snapshots} == {OWN}


def test_ppo_tunes_with_it_and_writes_it_down(scales, tmp_path):
    config = write_world(tmp_path)
    say(tmp_path / "model", {"guidance_scale": OWN})
    silent = {key: value for key, value in METADATA.items() if not key.startswith("guidance")}
    save_snapshot(tmp_path / "start" / "network-snapshot-000001.pkl", START, silent)
    output = run(launch, "--config", config, "--override", "ppo.steps=1")
    assert "guidance 2.5" in output
    assert scales == {share * OWN for share in GUIDANCES}  # all else, and what classical rivals are tried at besides
    [resolved] = (tmp_path / "exps").glob("*/configs/resolved_config.yaml")
    assert "guidance_rate: 2.5" in resolved.read_text()
