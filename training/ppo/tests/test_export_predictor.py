"""Export: table -> policy mean -> export -> snapshot -> table; the files and their manifest; what is refused."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from integrations.diffusers.scheduling_epd import EPDScheduler
from models.registry import load_denoiser
from solvers import EPDTable
from training.ppo import export_epd_predictor
from training.ppo.assembly import Start, make_policy, prepare, start_from_snapshot, to_plain
from training.ppo.checkpoint import save_checkpoint, table_to_plain
from training.ppo.config import load_config
from training.ppo.export_epd_predictor import main, read_export, write_export
from training.ppo.policy import EPDParamPolicy
from training.ppo.tests.tiny_world import METADATA, START, write_world
from training.runs.checkpoint import best_path, step_path
from training.runs.configuration import config_hash
from training.runs.configuration import to_plain as config_to_plain
from training.runs.run_folder import MetricsLog, RunFolder
from training.snapshot import find_snapshot, load_snapshot, save_snapshot
from training.solver import NETWORK_DTYPE, Schedule, load_solver

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(config: Path, tmp_path: Path) -> RunFolder:
    """A run with checkpoints of the steps 2 and 4, and of step 2 as the best."""
    start = prepared(config)
    folder = RunFolder.create(tmp_path, "run", "")
    folder.config.write_text("run: {}\n")
    for step in (2, 4):
        save_checkpoint(step_path(folder.checkpoints, step), state_of(start, moved(start, seed=step), step))
        MetricsLog(folder.metrics).append({"step": step, "heldout/reward": step / 10})
    save_checkpoint(best_path(folder.checkpoints), state_of(start, moved(start, seed=2), 2))
    return folder


def prepared(config: Path, *overrides: str) -> Start:
    return prepare(load_config(config, overrides))


def moved(start: Start, seed: int, size: float = 0.3) -> EPDParamPolicy:
    """A policy whose mean is another table than the starting one."""
    policy, generator = make_policy(start), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.output.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return policy


def state_of(start: Start, policy: EPDParamPolicy, step: int) -> dict:
    with torch.no_grad():
        table = policy().mean_table()
    return {
        "step": step,
        "trainer": {"policy": policy.state_dict()},
        "watch": None,
        "start": to_plain(start),
        "table": table_to_plain(table),
        "config": config_to_plain(start.config),
        "config_hash": config_hash(start.config),
    }


def export(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def mean(policy: EPDParamPolicy) -> EPDTable:
    with torch.no_grad():
        return policy().mean_table()


def assert_tables_equal(table: EPDTable, expected: EPDTable, tolerance: float) -> None:
    assert table.columns().keys() == expected.columns().keys()
    for name, tensor in expected.columns().items():
        torch.testing.assert_close(getattr(table, name), tensor, rtol=0, atol=tolerance)


def test_untrained_policy_exports_its_starting_table(config: Path, tmp_path: Path):
    start = prepared(config)
    save_checkpoint(tmp_path / "policy-step000000.pt", state_of(start, make_policy(start), 0))
    exported = read_export(tmp_path / "policy-step000000.pt", CPU)
    assert_tables_equal(exported.table, start.snapshot.table, 1e-12)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), size=st.floats(0.0, 1.5), scales=st.booleans())
def test_round_trip_from_table_to_table(config: Path, tmp_path_factory, seed: int, size: float, scales: bool):
    tmp_path = tmp_path_factory.mktemp("round")
    start = prepared(config, *(["ppo.train=[positions, weights, scale_dir, scale_time]"] if scales else []))
    policy = moved(start, seed, size / 8)
    folder = RunFolder(tmp_path)
    save_checkpoint(tmp_path / "policy-step000007.pt", state_of(start, policy, 7))
    paths = write_export(folder, read_export(tmp_path / "policy-step000007.pt", CPU), manifest=False)
    assert_tables_equal(load_snapshot(paths[0])[0], mean(policy), 0.0)
    paths[1].unlink()  # the .json, whose numbers are exact
    assert_tables_equal(load_snapshot(paths[0])[0], mean(policy), 1e-6)


def test_default_is_the_largest_step(folder: RunFolder):
    result = export(folder.path)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.export.iterdir()) == [
        "diffusers",
        "export-manifest-step000004.json",
        "network-snapshot-export-step000004.json",
        "network-snapshot-export-step000004.pkl",
        "training_options-export-step000004.json",
    ]
    assert find_snapshot(folder.path).name == "network-snapshot-export-step000004.pkl"


def test_the_export_for_diffusers_is_the_same_solver_with_what_was_measured(folder: RunFolder):
    measured = {"heldout/reward": 0.4, "heldout/reward_start": 0.3, "heldout/reward_difference": 0.1}
    measured |= {"heldout/reward_difference_low": 0.05, "heldout/reward_difference_high": 0.15}
    for step in (2, 4):
        MetricsLog(folder.metrics).append({"step": step, **measured})
    export(folder.path, "--best")
    assert ", which the step was chosen by | start" in (folder.export / "diffusers" / "README.md").read_text()
    result = export(folder.path)
    assert result.output.splitlines()[-1] == str(folder.export / "diffusers")
    scheduler = EPDScheduler.from_pretrained(folder.export / "diffusers")
    exported = load_solver(folder.path)
    assert scheduler.config.positions == exported.table.positions.tolist()
    assert scheduler.config.guidance_scale == exported.guidance_scale == 2.0
    denoiser = load_denoiser(exported.model, device=CPU, dtype=torch.float32)
    assert scheduler.config.sigmas == exported.on(denoiser).sigmas.tolist()
    card = (folder.export / "diffusers" / "README.md").read_text()
    assert "| reward | 0.3000 | 0.4000 | +0.1000 [+0.0500, +0.1500] |" in card
    assert "chosen by" not in card


def test_a_table_is_exported_though_its_model_is_not_at_hand(config: Path, folder: RunFolder, monkeypatch):
    def gone(*_: object, **__: object) -> None:
        raise InputError("the model is not here")

    monkeypatch.setattr(export_epd_predictor, "load_denoiser", gone)
    result = export(folder.path)
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == f"{folder.export / 'diffusers'} is not written: the model is not here"
    assert find_snapshot(folder.path).is_file()


def test_best_and_named_checkpoints(folder: RunFolder):
    assert export(folder.path, "--best", "--no-manifest", "--no-diffusers").exit_code == 0
    assert {path.name[:7] for path in folder.export.iterdir()} == {"network", "trainin"}
    best = load_snapshot(folder.export / "network-snapshot-export-step000002.pkl")[0]
    assert export(folder.path, "--checkpoint", step_path(folder.checkpoints, 2)).exit_code == 0
    assert_tables_equal(load_snapshot(folder.export / "network-snapshot-export-step000002.pkl")[0], best, 0.0)
    named = "network-snapshot-export-step000002.pkl"
    (folder.export / named).unlink()
    relative = export(folder.path, "--checkpoint", "checkpoints/policy-step000002.pt")
    assert relative.exit_code == 0, relative.output
    assert (folder.export / named).exists()
    both = export(folder.path, "--best", "--checkpoint", step_path(folder.checkpoints, 2))
    assert both.exit_code == 2
    assert "give one of them" in both.output


def test_a_checkpoint_of_another_run_is_not_exported(folder: RunFolder, tmp_path: Path):
    other = tmp_path / "other" / "checkpoints"
    other.mkdir(parents=True)
    shutil.copy(step_path(folder.checkpoints, 4), other)
    result = export(folder.path, "--checkpoint", step_path(other, 4))
    assert result.exit_code == 2
    assert "is no checkpoint of" in result.output


def test_manifest_and_options_say_where_it_came_from(folder: RunFolder, config: Path):
    export(folder.path)
    manifest = json.loads((folder.export / "export-manifest-step000004.json").read_text())
    assert manifest["step"] == 4
    assert manifest["run"] == folder.path.name
    assert manifest["heldout"] == {"heldout/reward": 0.4}
    assert manifest["start"]["sha256"] == prepared(config).snapshot.origin.sha256
    assert len(manifest["files"]) == 3
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder.export / name).read_bytes()).hexdigest() == digest
    options = json.loads((folder.export / "training_options-export-step000004.json").read_text())
    assert options["config"]["ppo"]["rloo_k"] == 4
    assert options["predictor"].items() >= (METADATA | {"num_steps": 3, "num_points": 2}).items()


def test_export_says_the_settings_it_was_tuned_for_not_those_of_the_start(config: Path, tmp_path: Path):
    start = prepared(config, "model.guidance_rate=4.5", "model.schedule_type=polynomial")
    save_checkpoint(tmp_path / "policy-step000001.pt", state_of(start, moved(start, 1), 1))
    paths = write_export(RunFolder(tmp_path), read_export(tmp_path / "policy-step000001.pt", CPU), manifest=False)
    exported = load_solver(paths[0])
    assert exported.guidance_scale == 4.5
    assert exported.schedule == Schedule("polynomial", 7.0)


def test_export_says_the_half_precision_that_it_was_tuned_in(config: Path, tmp_path: Path):
    folder, told = RunFolder(tmp_path), []
    for number, dtype in enumerate(("float32", "bfloat16"), start=1):
        start = prepared(config, f"model.dtype={dtype}")
        save_checkpoint(tmp_path / "policy.pt", state_of(start, make_policy(start), number))
        paths = write_export(folder, read_export(tmp_path / "policy.pt", CPU), manifest=False)
        told.append(load_solver(paths[0]))
    assert [solver.tuned_in for solver in told] == [None, "bfloat16"]
    assert NETWORK_DTYPE not in told[0].origin.metadata
    again = load_config(config, [f"data.predictor_snapshot={told[1].origin.file}"])
    start = prepare(again)
    save_checkpoint(tmp_path / "policy.pt", state_of(start, make_policy(start), 3))
    paths = write_export(folder, read_export(tmp_path / "policy.pt", CPU), manifest=False)
    assert load_solver(paths[0]).tuned_in is None  # in float32 since


def test_a_shift_of_flow_matching_is_tuned_and_exported_with_its_table_and_left_with_its_schedule(config, tmp_path):
    told = {"flowmatch_mu": 1.15, "sigma_min": 0.001, "sigma_max": 1.0}
    file = tmp_path / "network-snapshot-000001.pkl"
    save_snapshot(file, START, {**METADATA, "schedule_type": "flowmatch", **told})
    for overrides, shift, expected in (
        ((), math.exp(1.15), told),
        (("model.schedule_type=logsnr",), None, dict.fromkeys(told)),
    ):
        start = start_from_snapshot(load_config(config, (f"data.predictor_snapshot={file}", *overrides)))
        assert start.solver.flow_shift == shift
        save_checkpoint(tmp_path / "policy-step000001.pt", state_of(start, moved(start, 1), 1))
        exported = read_export(tmp_path / "policy-step000001.pt", CPU)
        assert exported.start.solver.flow_shift == shift
        written = load_solver(write_export(RunFolder(tmp_path), exported, manifest=False)[0])
        assert {key: written.origin.metadata[key] for key in told} == expected
        assert written.flow_shift == shift


def test_reordered_start_is_told_in_the_manifest(config: Path, tmp_path: Path):
    unordered = EPDTable(
        torch.tensor([[0.6, 0.3], [0.4, 0.8]]).double(), torch.tensor([[0.7, 0.3], [0.5, 0.5]]).double()
    )
    save_snapshot(tmp_path / "network-snapshot-000001.pkl", unordered, METADATA)
    start = prepared(config, f"data.predictor_snapshot={tmp_path / 'network-snapshot-000001.pkl'}")
    folder = RunFolder.create(tmp_path, "run", "")
    save_checkpoint(step_path(folder.checkpoints, 0), state_of(start, make_policy(start), 0))
    MetricsLog(folder.metrics).append({"step": 0})
    exported = read_export(step_path(folder.checkpoints, 0), CPU)
    manifest = json.loads(write_export(folder, exported, manifest=True)[-1].read_text())
    assert manifest["start"]["notes"] == [
        "table interval 0: positions were not increasing: sorted together with weights and scales"
    ]
    torch.testing.assert_close(exported.table.weights[0], torch.tensor([0.3, 0.7]).double())


def test_policy_that_is_not_its_checkpoint_s_table_is_refused(folder: RunFolder, config: Path):
    start = prepared(config)
    forged = state_of(start, moved(start, 1), 9) | {"table": table_to_plain(start.table)}
    save_checkpoint(step_path(folder.checkpoints, 9), forged)
    result = export(folder.path)
    assert result.exit_code == 2
    assert "would not replay what was trained" in result.output
    assert not folder.export.exists()


def test_policy_that_is_no_table_is_refused(folder: RunFolder, config: Path):
    start = prepared(config)
    broken = state_of(start, moved(start, 1), 9)
    broken["trainer"]["policy"]["output.bias"][0] = torch.nan
    save_checkpoint(step_path(folder.checkpoints, 9), broken)
    result = export(folder.path)
    assert result.exit_code == 2
    assert "no valid table" in result.output
    assert not folder.export.exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("step", None),
        ("config_hash", torch.zeros(2)),
        ("start", []),
        ("start.snapshot_table.weights", "x"),
        ("start.metadata", {1: 2}),
        ("start.notes", 7),
        ("trainer", {}),
        ("trainer.policy", None),
        ("table", None),
        ("table.weights", torch.ones(2, 2).double()),
        ("table.grid", torch.ones(3).double()),
        ("start.table.grid", torch.ones(3).double()),
        ("start.table.grid", torch.tensor([9.0, 1.0]).double()),
        ("start.table.grid", [9.0, 4.0, 1.0]),
    ],
)
def test_a_checkpoint_with_other_things_in_their_place_is_not_exported(
    folder: RunFolder, config: Path, place: str, value: object
):
    start = prepared(config)
    state = part = state_of(start, moved(start, 1), 9)
    *parents, last = place.split(".")
    for parent in parents:
        part = part[parent]
    assert last in part or last == "grid"
    part[last] = value
    torch.save({"format": 2, **state}, step_path(folder.checkpoints, 9))
    result = export(folder.path)
    assert result.exit_code == 2, result.output
    assert "policy-step000009.pt" in result.output
    assert not folder.export.exists()


def test_a_best_checkpoint_that_a_resume_put_aside(config: Path, folder: RunFolder):
    best_path(folder.checkpoints).unlink()
    start = prepared(config)
    for best_step in (2, 3):
        state = state_of(start, moved(start, seed=4), 4) | {"watch": {"best_step": best_step}}
        save_checkpoint(step_path(folder.checkpoints, 4), state)
        result = export(folder.path, "--best", "--no-diffusers")
        assert ("export-step000002.json" in result.output) == (best_step == 2)
    assert "the best checkpoint, of step 3, was replaced by that of a later step" in result.output


def test_nothing_to_export(folder: RunFolder, tmp_path: Path):
    assert "no folder of a run" in export(tmp_path / "none").output
    best_path(folder.checkpoints).unlink()
    assert "no evaluation has beaten the starting table" in export(folder.path, "--best").output
    step_path(folder.checkpoints, 4).write_bytes(b"cut off")
    result = export(folder.path)
    assert "corrupt" in result.output
    assert "policy-step000002.pt" in result.output


def test_unknown_device_is_refused(folder: RunFolder):
    assert "Unknown device" in export(folder.path, "--device", "gpu").output
    with pytest.raises(InputError, match="float64"):
        read_export(step_path(folder.checkpoints, 4), torch.device("mps"))


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
