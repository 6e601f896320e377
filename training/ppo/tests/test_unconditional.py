"""An unconditional model with a reward that needs no prompt: distilled, tuned, exported, replayed, evaluated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import evaluate
import sample
import train
from tests.tiny_families import save_tiny_family
from training.ppo.export_epd_predictor import main as export
from training.ppo.launch import main as launch
from training.ppo.tests.tiny_world import write_world
from training.runs.run_folder import RunFolder, read_metrics
from training.snapshot import load_snapshot

REWARDS = """
def brightness(images, prompts):
    assert set(prompts) == {""}
    return images.mean(dim=(1, 2, 3))

def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2))
"""
REWARD, JUDGE = "mine_for_cats:brightness", "mine_for_cats:redness"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional")
    (folder / "mine_for_cats.py").write_text(REWARDS)
    save_tiny_family("ddpm", folder / "cats")
    write_world(folder / "world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start = run(train.main, *STARTS, "--init-only")
        assert start.exit_code == 0, start.output
        yield folder
    sys.modules.pop("mine_for_cats", None)


STARTS = ["--dataset_name", "cats", "--model_path", "cats", "--num_steps", "3"]
TUNING = [
    *("data.predictor_snapshot=0", "model.model_path=cats", f"reward.weights_path={REWARD}", "ppo.steps=2"),
    *("ppo.rollout_batch_size=8", "ppo.minibatch_size=8", "run.device=cpu", "run.output_root=runs"),
    *("logging.eval_interval=1", "logging.eval_count=4", f"logging.panel={JUDGE}"),
]


def run(command, *arguments: str) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def tuned(folder: Path, *overrides: str) -> Result:
    config = folder / "empty.yaml"
    config.write_text("{}\n")
    return run(launch, "--config", config, "--override", *TUNING, *overrides)


def test_it_is_tuned_exported_and_replayed(workplace):
    result = tuned(workplace)
    assert result.exit_code == 0, result.output
    (folder,) = Path("runs").iterdir()
    rows = read_metrics(RunFolder.open(folder).metrics)
    judged = [row for row in rows if "heldout/reward" in row]
    assert len(judged) == 3  # of the start too
    assert all(0 < row["heldout/panel"] < 1 for row in judged)
    assert rows[-1]["reward_within_variance"] > 0
    assert rows[-1]["reward_between_variance"] > 0  # the groups of a step have noise of their own
    exported = run(export, folder, "--no-diffusers")
    assert exported.exit_code == 0, exported.output
    drawn = run(sample.main, "--predictor_path", folder, "--seeds", "0-1", "--outdir", "images")
    assert drawn.exit_code == 0, drawn.output
    assert "guidance 1, an image takes 4 evaluations in sequence, 6 in all, 6 network rows" in drawn.output


def test_it_is_distilled(workplace):
    small = ("--M", "1", "--trajectories", "4", "--total_kimg", "0.004", "--batch", "2", "--outdir", "distilled")
    result = run(train.main, *STARTS, *small)
    assert result.exit_code == 0, result.output
    (folder,) = Path("distilled").iterdir()
    assert load_snapshot(max(folder.glob("*.json"), key=lambda path: path.stat().st_mtime))[1]["backend"] == "ddpm"


EVALUATING = ["--model", "cats", "--solvers", "epd,ddim", "--nfe", "4", "--number", "4", "--schedules", "discrete"]
EVALUATING += ["--baseline", "classical", "--outdir", "evaluation"]


def test_it_is_evaluated(workplace):
    result = run(evaluate.main, *EVALUATING, "--predictor_path", "0", "--reward", REWARD)
    assert result.exit_code == 0, result.output
    assert "2 solvers and the reference on 4 images without a prompt" in result.output
    report = json.loads(Path("evaluation/results.json").read_text())
    assert "4 images without a prompt, seeds 0 to 3" in json.dumps(report)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "--reward is missing: cats is unconditional"),
        (("--reward", "world/reward.pt"), "reward would read prompts, and model cats is unconditional"),
        (
            ("--reward", REWARD, "--prompt-file", "world/train.csv"),
            "--prompt-file world/train.csv: cats is unconditional",
        ),
        (("--reward", REWARD, "--guidance", "3"), "Model cats has no guidance"),
    ],
)
def test_what_an_evaluation_cannot_do_is_said_in_a_line(workplace, more, says):
    result = run(evaluate.main, *EVALUATING, *more)
    assert result.exit_code == 2
    assert f"Error: {says}" in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.prompt_csv=world/train.csv", "model cats is unconditional and takes no prompts: set the key to null"),
        ("reward.weights_path=world/reward.pt", "reward would read prompts, and model cats is unconditional"),
        ("logging.panel=world/panel.pt", "panel would read prompts, and model cats is unconditional"),
        ("model.guidance_rate=3", "Model cats has no guidance: its guidance scale must be 1 everywhere"),
    ],
)
def test_what_a_run_cannot_do_is_said_before_it_begins(workplace, override, says):
    more = ("model.guidance_type=cfg",) if "guidance" in override else ()
    result = tuned(workplace, override, *more, "run.output_root=refused")
    assert result.exit_code == 2
    assert says in result.output
    assert not Path("refused").exists()


def test_a_text_model_is_not_taken_for_one(workplace):
    result = tuned(workplace, "model.model_path=world/model", "logging.eval_interval=0", "logging.panel=null")
    assert result.exit_code == 2
    assert "data.prompt_csv is null and world/model is no model that has usual prompts" in result.output
