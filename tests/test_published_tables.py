"""The published EPD tables on models of their own families: their noise levels, their size, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import sample
import train
from errors import InputError
from models import load_denoiser
from models.asset_table import EPD_TABLES
from models.options import ModelOptions
from schedules import FlowTime, get_schedule
from scripts.show_solver import levels_of
from solvers import EPDTable
from tests import golden
from tests.tiny_families import save_tiny_family
from training.snapshot import save_snapshot
from training.solver import classical_solver, load_solver, parse_schedule

TABLE = EPDTable(
    torch.tensor([[0.3, 0.7], [0.4, 0.8]], dtype=torch.float64),
    torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64),
)
# As the public code base says it of its tables.
FLUX = {
    "dataset_name": "ms_coco",
    "backend": "flux",
    "backend_config": {"resolution": 1024},
    "schedule_type": "flowmatch",
    "guidance_type": "cfg",
    "guidance_rate": 3.5,
    "sigma_min": 0.001,
    "sigma_max": 1.0,
    "flowmatch_mu": 1.15,
    "flowmatch_shift": 3.0,
}
SD3 = {**FLUX, "backend": "sd3", "sigma_min": 0.0029940119760479044, "flowmatch_mu": None, "flowmatch_shift": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: save_tiny_family(name, root / name) for name in ("sd3", "flux", "sdxl")}


def denoiser_of(folder: Path, **options: int):
    return load_denoiser(folder, device="cpu", dtype=torch.float32, options=ModelOptions(**options))


def snapshot(folder: Path, metadata: dict) -> Path:
    return save_snapshot(folder / "network-snapshot-000001", TABLE, metadata)


def run(*arguments):
    return CliRunner().invoke(sample.main, [str(argument) for argument in arguments])


# --- noise levels


@pytest.mark.parametrize(
    ("table", "family", "grid"),
    [
        ("flux-best", "flux", "flux_1024_mu1p15_n9"),
        ("sd3-512-best", "sd3", "sd3_512_n11"),
        ("sd3-1024-start", "sd3", "sd3_1024_n11"),
    ],
)
def test_golden_a_published_table_is_used_at_its_own_noise_levels(table, family, grid, folders):
    """On a model that draws other sizes too, whose dynamic shift would be another."""
    golden.table(table)
    solver = load_solver(golden.FOLDER / "tables" / f"{table}.json").on(
        denoiser_of(folders[family], height=16, width=16)
    )
    expected = golden.tensor("schedules", f"f32__flowmatch_{grid}").double()
    torch.testing.assert_close(solver.sigmas, expected, rtol=2e-6, atol=0)


def test_a_stored_mu_takes_the_place_of_the_models_shift(tmp_path, folders):
    denoiser = denoiser_of(folders["flux"], height=16, width=16)
    assert denoiser.process.shift < 2
    solver = load_solver(snapshot(tmp_path, FLUX)).on(denoiser)
    times = torch.tensor([1.0, 0.5005, 0.001], dtype=torch.float64)
    expected = math.exp(1.15) / (math.exp(1.15) + 1 / times - 1)
    torch.testing.assert_close(solver.sigmas, expected, rtol=1e-12, atol=0)


def test_a_least_level_may_be_said_as_a_time_or_as_a_level_and_no_other_is_taken(tmp_path, folders):
    denoiser = denoiser_of(folders["sd3"])
    expected = get_schedule("flowmatch", 3, denoiser.sigma_min, 1.0, denoiser=denoiser)
    for least in (denoiser.time_min, denoiser.sigma_min, None):
        solver = load_solver(snapshot(tmp_path, {**SD3, "sigma_min": least}))
        assert torch.equal(solver.on(denoiser).sigmas, expected)
    with pytest.raises(InputError, match=r"flowmatch schedule has the model's own sigma_min = 0.00892857; got 0.02"):
        load_solver(snapshot(tmp_path, {**SD3, "sigma_min": 0.02})).on(denoiser)


def test_another_schedule_spans_the_models_range_and_not_a_time(tmp_path, folders):
    denoiser = denoiser_of(folders["flux"], height=16, width=16)
    solver = load_solver(snapshot(tmp_path, FLUX)).on_schedule(parse_schedule("logsnr")).on(denoiser)
    assert float(solver.sigmas[-1]) == pytest.approx(denoiser.sigma_min)
    plain = load_solver(snapshot(tmp_path, FLUX)).on_schedule(parse_schedule("discrete")).on(denoiser)
    assert torch.equal(plain.sigmas, get_schedule("discrete", 3, denoiser.sigma_min, 1, rho=1, denoiser=denoiser))


def test_levels_that_a_file_alone_tells_are_drawn_as_flow_matching(tmp_path):
    levels, said = levels_of(load_solver(snapshot(tmp_path, FLUX)))
    assert levels[0] == 1
    assert levels[1] == FlowTime(math.exp(1.15), 0.001).sigma_of_time(torch.tensor(0.5005, dtype=torch.float64))
    assert said == "schedule flowmatch, shift 3.158"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"flowmatch_mu": 1e9}, "flowmatch_mu is 1000000000.0; its size must be at most 50"),
        ({"flowmatch_mu": "1.15"}, "flowmatch_mu is '1.15'; it must be a number"),
        ({"flowmatch_mu": None, "flowmatch_shift": -1}, "flowmatch_shift is -1.0; it must be positive"),
        ({"backend_config": {"resolution": "large"}}, "model_options is {'height': 'large', 'width': 'large'}"),
    ],
)
def test_a_file_that_says_no_shift_or_size_is_refused(tmp_path, said, message):
    with pytest.raises(InputError) as error:
        load_solver(snapshot(tmp_path, {**FLUX, **said}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- sizes


def test_the_size_is_that_of_the_table_on_its_own_model_and_the_models_own_on_another(tmp_path):
    solver = load_solver(snapshot(tmp_path, SD3))
    assert (solver.model, solver.options_for("sd3")) == ("sd3", ModelOptions(height=1024, width=1024))
    assert solver.options_for("elsewhere") == ModelOptions()
    ours = load_solver(snapshot(tmp_path, {**SD3, "model_options": {"height": 24}}))
    assert ours.options_for("elsewhere") == ModelOptions(height=24)
    older = load_solver(snapshot(tmp_path, {**SD3, "backend": "ldm"}))  # says 1024 of Stable Diffusion 1.5
    assert (older.model, older.model_options) == ("sd15", ModelOptions())


# --- the command


@pytest.mark.parametrize(("metadata", "family"), [(SD3, "sd3"), (FLUX, "flux")])
def test_a_table_of_a_family_draws_with_its_model(tmp_path, folders, metadata, family):
    predictor = snapshot(tmp_path, metadata)
    asked = ("--predictor_path", predictor, "--model_path", folders[family], "--prompt", "a dog", "--seeds", "0")
    size = ("--height", 16, "--width", 16) if family == "flux" else ()
    result = run(*asked, *size, "--outdir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "3 grid points (flowmatch), guidance 3.5" in result.output
    assert ("images of its own size; the predictor was made at height=1024 width=1024" in result.output) == (not size)
    assert json.loads((tmp_path / "out" / "images.jsonl").read_text())["finite"]


@pytest.mark.parametrize(("family", "other"), [("sd3", "flux"), ("flux", "sd3"), ("sd3", "sdxl")])
def test_a_table_on_a_model_of_another_family_is_refused_before_weights_are_read(
    tmp_path, folders, family, other, monkeypatch
):
    monkeypatch.setattr("sample.load_denoiser", lambda *_, **__: pytest.fail("it was loaded"))
    predictor = snapshot(tmp_path, {"sd3": SD3, "flux": FLUX}[family])
    result = run("--predictor_path", predictor, "--model_path", folders[other], "--prompt", "a dog")
    assert result.exit_code == 2
    assert f"was made for a model of the family {family}, and {other} is of the family {other}" in result.output


# --- AFS


def test_afs_is_refused_where_the_first_noise_level_is_1(tmp_path, folders, monkeypatch):
    denoiser, reason = denoiser_of(folders["sd3"]), r"AFS takes x / sqrt.*sd3 \(flow matching\) starts at 1"
    for solver in (
        classical_solver("ddim", 3, parse_schedule("flowmatch"), afs=True),
        replace(load_solver(snapshot(tmp_path, SD3)), afs=True),
    ):
        with pytest.raises(InputError, match=reason):
            solver.on(denoiser)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a dog\n" * 3)
    asked = ["--dataset_name", "tiny", "--model_path", str(folders["sd3"]), "--prompt-file", "prompts.txt"]
    small = ["--num_steps", "3", "--M", "1", "--trajectories", "2", "--schedule_type", "flowmatch", "--afs", "True"]
    result = CliRunner().invoke(train.main, [*asked, *small])
    assert result.exit_code == 2
    assert "AFS takes x / sqrt" in result.output
    assert not (tmp_path / "exps").exists()


# --- fetching (the commands are in test_assets.py)


def test_golden_the_sums_of_the_published_tables():
    golden.arrays("schedules")
    told = {
        entry["path"]: entry
        for name in golden.table_names()
        if not (name.startswith("rlepd"))
        for entry in [golden.table(name)["source"]]
    }
    assert {asset.path: (asset.size, asset.digest) for asset in EPD_TABLES} == {
        path: (entry["bytes"], f"sha256:{entry['sha256']}") for path, entry in told.items()
    }
    commits = {entry["commit"] for entry in told.values()}
    assert all(asset.source.split("/")[5] in commits for asset in EPD_TABLES)
