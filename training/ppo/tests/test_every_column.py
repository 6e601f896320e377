"""Runs that train all that there is, with points and without: from a start's file to the export, and on from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from models.registry import load_denoiser
from schedules import get_schedule
from solvers import classical_table
from training.parameters import GRID
from training.ppo.assembly import build, from_plain, make_fabric, policy_of, prepare
from training.ppo.checkpoint import load_checkpoint
from training.ppo.cold_start import DRAWN
from training.ppo.config import build_config, load_config
from training.ppo.export_epd_predictor import main as export_command
from training.ppo.tests.test_launch import assert_same, launch, timeless
from training.ppo.tests.tiny_world import METADATA, START, write_world
from training.runs.checkpoint import newest_checkpoint, step_path
from training.runs.run_folder import RunFolder, read_metrics
from training.snapshot import save_snapshot
from training.solver import load_solver

ALL = tuple(DRAWN)
EVERYTHING = [
    f"ppo.train=[{', '.join(ALL)}]",
    "ppo.guidance_std=0.3",
    "ppo.history_std=0.2",
    "ppo.scale_std=0.1",
    "ppo.grid_concentration=50",
    "ppo.kl_coef=0.001",
    "ppo.entropy_coef=0.001",
    "ppo.ppo_epochs=2",
]
WITHOUT_POINTS = {"guidance", "history", "direction_history", GRID}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world, with a start without points beside the usual one: three intervals of iPNDM."""
    path = write_world(tmp_path_factory.mktemp("world"))
    table = classical_table("ipndm", get_schedule("polynomial", 4, 0.1, 10.0))
    says = {**METADATA, "schedule_type": "polynomial", "schedule_rho": 7.0, "sigma_min": 0.1, "sigma_max": 10.0}
    save_snapshot(path.parent / "none" / "network-snapshot-000001.json", table, says)
    return path


def run_of(config: Path, root: Path, *overrides: str) -> RunFolder:
    result = launch("--config", config, "--override", f"run.output_root={root}", *overrides)
    assert result.exit_code == 0, result.output
    return RunFolder.open(next(root.iterdir()))


@pytest.fixture(scope="module", params=["points", "none"])
def finished(request: pytest.FixtureRequest, config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    start = [] if request.param == "points" else [f"data.predictor_snapshot={config.parent / 'none'}"]
    return run_of(config, tmp_path_factory.mktemp(request.param), *EVERYTHING, *start)


def trained_in(folder: RunFolder) -> set[str]:
    return WITHOUT_POINTS if load_config(folder.config).config.model.num_points == 0 else set(ALL)


def exported(folder: RunFolder) -> tuple[Path, str]:
    result = CliRunner().invoke(export_command, [str(folder.path)])
    assert result.exit_code == 0, result.output
    return folder.export / "network-snapshot-export-step000004.json", result.output


def test_it_begins_at_the_start_and_moves_all_that_it_trains(finished: RunFolder):
    rows = read_metrics(finished.metrics)
    start = load_checkpoint(step_path(finished.checkpoints, 2))["start"]["table"]
    trained = trained_in(finished)
    for name, first in rows[0]["table"].items():
        torch.testing.assert_close(torch.tensor(first).double(), start[name], rtol=0, atol=1e-6)
        assert (rows[4]["table"][name] != first) == (name in trained), name
    assert trained <= rows[0]["table"].keys()
    assert rows[0]["table"][GRID] == pytest.approx(start[GRID].tolist(), rel=1e-12)
    assert [rows[4]["table"][GRID][end] for end in (0, -1)] == [start[GRID][end].item() for end in (0, -1)]
    for row in rows[1:]:
        assert row["first_pass_ratio_error"] == 0
        assert row["kl"] > 0 or row["step"] == 1
        assert row["gradient_norm"] > 0


def test_a_resumed_run_is_the_run_that_never_stopped(finished: RunFolder, copied: RunFolder):
    step_path(copied.checkpoints, 4).unlink()
    result = launch("--resume", copied.path)
    assert result.exit_code == 0, result.output
    resumed, whole = (load_checkpoint(step_path(run.checkpoints, 4)) for run in (copied, finished))
    for part in ("trainer", "watch", "start", "table"):
        assert_same(resumed[part], whole[part])
    assert timeless(read_metrics(copied.metrics)) == timeless(read_metrics(finished.metrics))


def test_the_export_is_the_policys_mean_and_replays_as_the_run_samples_it(finished: RunFolder):
    path, said = exported(finished)
    assert not path.with_suffix(".pkl").exists()
    assert "no .pkl for the public EPD code, which has no place for the column guidance, the column history" in said
    manifest = json.loads((finished.export / "export-manifest-step000004.json").read_text())
    assert manifest["largest_difference_of_pkl"] is None
    assert set(manifest["files"]) == {path.name, "training_options-export-step000004.json"}
    checkpoint = newest_checkpoint(finished.checkpoints)
    state = load_checkpoint(checkpoint)
    start = from_plain(state["start"], build_config(state["config"], "checkpoint").config, checkpoint)
    table, sigmas = policy_of(start, state, checkpoint).mean()
    solver = load_solver(path)
    assert torch.equal(solver.sigmas, sigmas)
    assert solver.schedule is solver.guidance_scale is None
    for name, entries in table.columns().items():
        assert torch.equal(getattr(solver.table, name), entries), name
    parts = build(start, make_fabric(start.config))
    prompts, seeds = ["a", "b"], [3, 4]
    rolled = parts.trainer.source.sample_images(table, prompts, seeds, sigmas)
    latents = solver.on(parts.denoiser).latents(parts.denoiser, prompts, seeds)
    torch.testing.assert_close(rolled.pixels, parts.denoiser.decode(latents), rtol=0, atol=1e-6)
    untrained = parts.trainer.source.sample_images(table, prompts, seeds)
    assert (untrained.pixels - rolled.pixels).abs().max() > 1e-4  # so that the noise levels could be missed


def test_a_run_goes_on_from_another_s_export(finished: RunFolder, config: Path, tmp_path: Path):
    path, _ = exported(finished)
    again = run_of(config, tmp_path, *EVERYTHING, f"data.predictor_snapshot={path}", "ppo.steps=1")
    first = read_metrics(again.metrics)[0]["table"]
    solver = load_solver(path)
    assert first[GRID] == pytest.approx(solver.sigmas.tolist(), rel=1e-12)
    for name, entries in solver.table.columns().items():
        torch.testing.assert_close(torch.tensor(first[name]).double(), entries, rtol=0, atol=1e-6)
    settled = load_config(again.config).config.model
    assert (settled.schedule_type, settled.guidance_rate) == (None, None)


def test_held_out_images_are_those_of_the_mean_with_its_own_noise_levels(finished: RunFolder, config: Path):
    state = load_checkpoint(step_path(finished.checkpoints, 4))
    checkpoint = step_path(finished.checkpoints, 4)
    start = from_plain(state["start"], build_config(state["config"], "checkpoint").config, checkpoint)
    parts = build(start, make_fabric(start.config))
    scores = parts.judge.judge(*policy_of(start, state, checkpoint).mean())
    row = read_metrics(finished.metrics)[4]
    assert scores.parts["reward"].double().mean().item() == pytest.approx(row["heldout/reward"], abs=1e-6)
    elsewhere = parts.judge.judge(policy_of(start, state, checkpoint).mean()[0])
    assert (elsewhere.previews - scores.previews).abs().max() > 1e-5


def test_the_page_shows_every_part(finished: RunFolder):
    page = finished.report.read_text()
    for name in trained_in(finished):
        assert f"<th>{name.replace('_', ' ')}, interval</th>" in page
    assert "guidance by evaluation" in page
    grids = [row["table"][GRID] for row in read_metrics(finished.metrics)]
    for interval in range(1, len(grids[0])):  # the noise level that each of them ends at
        levels = f"{grids[0][interval]:.4f} &rarr; {grids[4][interval]:.4f}"
        assert f'<tr><td>{interval}</td><td class="number">{levels}</td></tr>' in page


def test_what_cannot_be_trained_is_said_at_the_start(config: Path):
    result = launch("--config", config, "--dry-run", "--override", *EVERYTHING,
                    f"data.predictor_snapshot={config.parent / 'none'}")  # fmt: skip
    assert result.exit_code == 0, result.output
    for name in set(ALL) - WITHOUT_POINTS:
        assert f"note: ppo.train: {name} is left out, nothing of it can vary" in result.output
    assert "note: guidance is new in the table and begins at 2 everywhere" in result.output
    assert "3 network calls an image one after another, 6 network rows" in result.output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.train=[guidance]", "model.guidance_rate=0"], "guidance, which is drawn in proportion to the start's"),
        (["ppo.train=[guidance]", "model.guidance_type=uncond"], "model.guidance_type=uncond is without any"),
        (["data.predictor_snapshot={none}"], "ppo.train=[positions, weights]: nothing of it can vary in a table"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(config: Path, overrides: list[str], message: str):
    overrides = [override.format(none=config.parent / "none") for override in overrides]
    result = launch("--config", config, "--dry-run", "--override", *overrides)
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split("Error: ")[1].split())
    assert message in said
    assert "Traceback" not in result.output
    assert said.count(" - ") == 1


def test_a_concentration_that_is_too_small_is_refused_in_a_line(config: Path, tmp_path: Path):
    overrides = [f"run.output_root={tmp_path / 'exps'}", "ppo.train=[grid]", "ppo.grid_concentration=1e-5"]
    result = launch("--config", config, "--override", *overrides)
    assert result.exit_code == 2
    assert "ppo.grid_concentration=1e-05 is out of range for grid" in result.output
    assert not (tmp_path / "exps").exists()


def test_checkpoints_of_earlier_versions_are_read(config: Path, tmp_path: Path):
    """They say train_scale_dir and train_scale_time, write columns that are not there as None, and have no grid."""
    folder = run_of(config, tmp_path, "ppo.train=[positions, weights, scale_time]")
    newest = newest_checkpoint(folder.checkpoints)
    state = torch.load(newest, weights_only=True)
    del state["start"]["table"][GRID]
    for table in (state["table"], state["start"]["table"], state["start"]["snapshot_table"]):
        table.setdefault("scale_dir", None)
    for key in ("train", "grid_concentration", "guidance_std", "history_std"):
        del state["config"]["ppo"][key]
    state["config"]["ppo"] |= {"train_scale_dir": False, "train_scale_time": True}
    torch.save(state, newest)
    path, _ = exported(folder)
    assert load_solver(path).table.scale_time is not None
    result = launch("--resume", folder.path, "--dry-run", "--override", "ppo.steps=6")
    assert result.exit_code == 0, result.output


def test_the_start_may_have_all_columns_and_train_two(config: Path, tmp_path: Path, finished: RunFolder):
    """Noise levels, guidance and history of its own stay as they are, in the rollouts and in the export."""
    path, _ = exported(finished)
    train = "[history]" if START.num_points != load_solver(path).table.num_points else "[positions, weights]"
    run = run_of(config, tmp_path, f"data.predictor_snapshot={path}", f"ppo.train={train}", "ppo.steps=4")
    before, after = load_solver(path), load_solver(exported(run)[0])
    assert torch.equal(after.sigmas, before.sigmas)
    denoiser = load_denoiser(config.parent / "model", device="cpu", dtype=torch.float32)
    assert after.on(denoiser).sigmas is after.sigmas
    for name, entries in before.table.columns().items():
        assert torch.equal(getattr(after.table, name), entries) == (name not in train), name
    start = prepare(load_config(config, [f"data.predictor_snapshot={path}", f"ppo.train={train}"]))
    assert torch.equal(build(start, make_fabric(start.config)).start.solver.sigmas, before.sigmas)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
