"""The command: dry run, a whole run, resume, interrupts, refusals, the shipped configurations."""

import errno
import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image, ImageChops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sample
import training.ppo.training_run as training_run
from errors import InputError
from files import only_writer
from models import clip, registry
from models.pictures import MARGIN, SMALLEST_CELL
from tests.tiny_families import save_tiny_family
from training.ppo import rewards
from training.ppo.assembly import build, make_fabric, prepare
from training.ppo.checkpoint import load_checkpoint
from training.ppo.config import load_config
from training.ppo.export_epd_predictor import main as export_command
from training.ppo.heldout import HeldoutWatch
from training.ppo.launch import main
from training.ppo.ppo_trainer import METRICS, PPOTrainer
from training.ppo.tests.tiny_world import CLIP, START, write_world
from training.runs.checkpoint import best_path, newest_checkpoint, step_path
from training.runs.command_line import spread
from training.runs.configuration import config_hash
from training.runs.run_folder import RunFolder, read_metrics
from training.snapshot import save_snapshot

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of four steps, never stopped."""
    root = tmp_path_factory.mktemp("finished")
    result = launch("--config", config, "--override", f"run.output_root={root}")
    assert result.exit_code == 0, result.output
    assert "before step 1: scoring classical solvers and the start on 6 held-out prompts" in result.output
    assert re.search(r"step 4 held out  reward -?\d\.\d+ \(start [+-]\d\.\d+ \[", result.output), result.output
    return only_run(root)


def launch(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def export_of(folder: RunFolder) -> Result:
    return CliRunner().invoke(export_command, [str(folder.path)])


def only_run(root: Path) -> RunFolder:
    (path,) = root.iterdir()
    return RunFolder.open(path)


def assert_same(one: object, other: object, where: str = "") -> None:
    """Equal to the last bit, tensors included."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def timeless(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith("seconds/")} for row in rows]


def test_override_takes_all_values_up_to_the_next_option():
    assert spread(["--override", "a=1", "b=2", "--device", "cpu", "--override=c=3", "d=4"]) == [
        *("--override", "a=1", "--override", "b=2", "--device", "cpu", "--override=c=3", "--override", "d=4")
    ]
    assert spread(["--dry-run", "stray"]) == ["--dry-run", "stray"]


def test_a_public_table_of_flow_matching_is_tuned_exported_and_replayed(config: Path, tmp_path: Path):
    """By the shipped configuration of its family, with a tiny model and reward in the place of the large ones."""
    metadata = {
        "dataset_name": "ms_coco",
        "backend": "sd3",
        "backend_config": {"resolution": 512},
        "guidance_type": "cfg",
        "guidance_rate": 4.5,
        "schedule_type": "flowmatch",
        "schedule_rho": 1.0,
    }
    table = save_snapshot(tmp_path / "table" / "network-snapshot-000001.pkl", START, metadata)
    model = save_tiny_family("sd3", tmp_path / "model")
    tiny = [f"data.predictor_snapshot={table}", f"data.prompt_csv={config.parent / 'train.csv'}"]
    tiny += [f"model.model_path={model}", "model.height=16", "model.width=16", "model.dtype=float32"]
    tiny += [
        f"reward.weights_path={config.parent / 'reward.pt'}",
        "ppo.steps=1",
        f"run.output_root={tmp_path / 'exps'}",
    ]
    tiny += ["ppo.rollout_batch_size=8", "ppo.minibatch_size=8"]
    shipped = "training/ppo/cfgs/sd3_512.yaml"
    result = launch("--config", shipped, "--device", "cpu", "--override", *tiny)
    assert result.exit_code == 0, result.output
    assert "model.height=16 by --override" in result.output
    folder = only_run(tmp_path / "exps")
    assert export_of(folder).exit_code == 0
    asked = ["--predictor_path", str(folder.path), "--prompt", "a", "--seeds", "0", "--outdir", str(tmp_path / "out")]
    drawn = CliRunner().invoke(sample.main, asked)
    assert drawn.exit_code == 0, drawn.output
    assert "3 grid points (flowmatch), guidance 4.5" in drawn.output
    with Image.open(next((tmp_path / "out").glob("*.png"))) as image:
        assert image.size == (16, 16)
    wrong = launch("--config", shipped, "--device", "cpu", "--override", *tiny, "model.backend=flux")
    assert wrong.exit_code == 2
    assert "was made for the family sd3: choose a table for flux" in wrong.output


def test_a_stray_argument_is_refused(config: Path):
    assert launch("--config", config, "--dry-run", "ppo.steps=3").exit_code == 2


def test_dry_run_says_what_a_step_costs_and_trains_nothing(config: Path):
    result = launch("--config", config, "--dry-run", "--override", "ppo.steps=5", "ppo.ppo_epochs=3", "--device", "cpu")
    assert result.exit_code == 0, result.output
    printed = result.output.split("\nnum_steps")[0]
    assert yaml.safe_load(printed)["ppo"]["steps"] == 5
    for fact in (
        "num_steps 3 (2 intervals), num_points 2",
        "4 network calls an image one after another, 12 network rows (6 evaluations, twice for guidance)",
        "8 images a step: 2 prompts x 4 tables",
        "96 network rows a step, 12 of them spared where a prompt's images begin alike",
        "6 updates a step",
        "5 steps, 40 images in all\nheld out: 6 images every 2 steps, and before step 1",
        "nothing was trained",
    ):
        assert fact in result.output
    assert not (config.parent / "exps").exists()


@pytest.mark.parametrize("name", ["no", "null", "00012", "a: #b", "'quoted'", "{x}", "🐟"])
def test_a_run_is_called_what_was_typed(config: Path, name: str):
    result = launch("--config", config, "--dry-run", "--run-name", name)
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.output.split("\nnum_steps")[0])["run"]["run_name"] == name


def test_a_dry_run_shows_what_it_can_before_it_says_what_is_missing(config: Path):
    gone = ("--config", config, "--dry-run", "--override", "reward.weights_path=none/HPS_v2.1.pt", "ppo.steps=7")
    result = launch(*gone)
    assert result.exit_code == 2
    assert "num_steps 3 (2 intervals), num_points 2" in result.output
    assert yaml.safe_load(result.output.split("\nnum_steps")[0])["ppo"]["steps"] == 7
    assert result.output.index("num_steps 3") < result.output.index("reward none/HPS_v2.1.pt")
    result = launch(*gone, "data.predictor_snapshot=none.pkl")
    assert result.exit_code == 2
    assert yaml.safe_load(result.output.split("\nError")[0])["ppo"]["steps"] == 7
    assert "none.pkl" in result.output


def test_a_dry_run_finds_a_name_that_no_folder_can_have(config: Path):
    result = launch("--config", config, "--dry-run", "--run-name", "a/b")
    assert result.exit_code == 2
    assert "run.run_name='a/b': it becomes a part of a folder's name" in result.output


def test_dry_run_without_guidance_counts_half(config: Path):
    result = launch(
        "--config", config, "--dry-run", "--override", "model.guidance_type=uncond", "model.guidance_rate=1"
    )
    assert "6 network rows (6 evaluations)" in result.output
    assert "note: model.guidance_type=uncond by --override" in result.output


def test_a_run_writes_its_folder(finished: RunFolder):
    rows = read_metrics(finished.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row.keys() >= METRICS.keys() for row in rows[1:])
    assert [row["step"] for row in rows if "heldout/reward" in row] == [0, 2, 4]
    assert {path.name for path in finished.checkpoints.iterdir()} - {"policy-best.pt"} == {
        "policy-step000002.pt",
        "policy-step000004.pt",
    }
    assert torch.tensor(rows[0]["table"]["positions"]).allclose(START.positions.float(), atol=1e-6)
    assert rows[0]["heldout/reward_difference"] == 0.0
    assert max(row["first_pass_ratio_error"] for row in rows[1:]) == 0.0
    assert finished.report.stat().st_size > 10_000


def test_a_run_that_is_told_the_least_takes_the_usual_prompts_and_does_not_evaluate(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = yaml.safe_load(config.read_text())
    del told["logging"]
    told["data"]["prompt_csv"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told))
    overrides = [f"run.output_root={tmp_path / 'exps'}", "ppo.steps=1"]
    prompts = config.parent / "train.csv"
    monkeypatch.setitem(registry.REGISTERED, "tiny", replace(registry.REGISTERED["shapes"], prompts=str(prompts)))
    result = launch("--config", tmp_path / "config.yaml", "--override", *overrides)
    assert result.exit_code == 0, result.output
    folder = only_run(tmp_path / "exps")
    assert load_config(folder.config).config.data.prompt_csv == str(prompts)
    (row,) = read_metrics(folder.metrics)
    assert row["step"] == 1
    assert not [name for name in row if name.startswith("heldout")]


def test_previews_tell_their_prompt_and_seed(finished: RunFolder):
    assert len(list(finished.samples.iterdir())) == (3 + 2) * 2  # two of them by other solvers
    with Image.open(finished.samples / "step000004-prompt01.png") as image:
        assert image.text == {"prompt": "v", "seed": "1", "step": "4"}
        assert image.size == (16, 16)


def test_replay_of_the_export_makes_the_images_of_the_run(finished: RunFolder, config: Path, tmp_path: Path):
    assert CliRunner().invoke(export_command, [str(finished.path)]).exit_code == 0
    wanted = ["--predictor_path", str(finished.path), "--prompt", "v", "--seeds", "1", "--outdir", str(tmp_path)]
    result = CliRunner().invoke(sample.main, [*wanted, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert f"on {config.parent / 'model'}" in result.output  # the run's own model, not what dataset_name stands for
    (replayed,) = tmp_path.glob("*.png")
    with Image.open(replayed) as image, Image.open(finished.samples / "step000004-prompt01.png") as preview:
        difference = ImageChops.difference(image.convert("RGB"), preview.convert("RGB"))
    assert max(high for _, high in difference.getextrema()) <= 1  # of 255: the batches differ


def test_tensorboard_has_scalars_table_and_previews(finished: RunFolder):
    events = EventAccumulator(str(finished.logs)).Reload()
    assert set(METRICS) - {"step"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("reward_mean")] == [1, 2, 3, 4]
    assert {"table", "held-out"} <= {name.split("/")[0] for name in events.Tags()["images"]}
    first, *later = events.Images("held-out")  # prompts in rows: the start alone, then the start and what is now
    assert {picture.width - first.width for picture in later} == {SMALLEST_CELL + MARGIN}
    assert {picture.height for picture in later} == {first.height}
    assert first.height > 2 * SMALLEST_CELL


def test_resolved_configuration_reads_back(finished: RunFolder):
    loaded = load_config(finished.config).config
    assert loaded.model.num_steps == 3
    assert config_hash(loaded) == load_checkpoint(step_path(finished.checkpoints, 4))["config_hash"]


def test_resumed_run_is_the_run_that_never_stopped(finished: RunFolder, copied: RunFolder):
    step_path(copied.checkpoints, 4).unlink()
    result = launch("--resume", copied.path)
    assert result.exit_code == 0, result.output
    assert "goes on after step 2" in result.output
    again = load_checkpoint(step_path(copied.checkpoints, 4))
    assert_same(again, load_checkpoint(step_path(finished.checkpoints, 4)))
    assert timeless(read_metrics(copied.metrics)) == timeless(read_metrics(finished.metrics))


def test_a_configuration_that_was_cut_off_does_not_change_the_run(copied: RunFolder):
    """At the end of a line it reads as one that leaves the rest at its defaults."""
    whole = copied.config.read_bytes()
    for kept in (0, whole.index(b"  rloo_k"), whole.index(b"logging:")):
        copied.config.write_bytes(whole[:kept])
        result = launch("--resume", step_path(copied.checkpoints, 2), "--dry-run")
        assert result.exit_code == 0, result.output
        assert yaml.safe_load(result.output.split("\nnum_steps")[0]) == yaml.safe_load(whole)
    copied.config.write_bytes(whole[: whole.index(b"rollout_batch_size: 8") + len(b"rollout_batch_size: ")])
    result = launch("--resume", copied.path, "--override", "ppo.steps=5")
    assert result.exit_code == 2
    assert "resolved_config.yaml: not a readable YAML file: its last line was cut off" in result.output


def test_a_run_longer_than_planned_says_what_changed_and_passes_over_what_is_damaged(copied: RunFolder):
    """A line of the log, and the best checkpoint, which is put aside."""
    lines = copied.metrics.read_bytes().splitlines(keepends=True)
    copied.metrics.write_bytes(b"".join([lines[0], lines[1], b"\0\0\xff\n", *lines[3:]]))
    best_path(copied.checkpoints).write_bytes(b"damaged")
    result = launch("--resume", copied.path, "--override", "ppo.steps=5")
    assert result.exit_code == 0, result.output
    assert "ppo.steps=5; it was 4 up to step 4" in result.output
    assert load_config(copied.config).config.ppo.steps == 5
    assert [row["step"] for row in read_metrics(copied.metrics)] == [0, 1, 3, 4, 5]
    assert (copied.checkpoints / "before-resume-at-step000004" / best_path(copied.checkpoints).name).exists()


def test_more_steps_than_planned_say_where_the_learning_rate_goes(finished: RunFolder):
    """A cosine over 4 steps ends at 0.00073 of 0.005; over 8 steps its second half begins at 0.0025."""
    result = launch("--resume", finished.path, "--dry-run", "--override", "ppo.steps=8")
    assert "note: the learning rate of step 5 is 0.0025; that of step 4 was 0.00073" in result.output
    one_before = step_path(finished.checkpoints, 2)
    for unchanged in ("ppo.steps=4", "ppo.clip_range=0.1"):
        result = launch("--resume", one_before, "--dry-run", "--override", unchanged)
        assert result.exit_code == 0, result.output
        assert "learning rate of" not in result.output


@pytest.mark.parametrize(
    "change",
    [
        "logging.eval_seed=77",
        "logging.eval_count=4",
        "logging.panel=null",
        "model.guidance_rate=1.5",
        "reward.weights_path=elsewhere/other.pt",
        "data.predictor_snapshot=0",
        "ppo.dirichlet_concentration=5",
        "ppo.train=[positions, weights, history]",
        "ppo.history_std=0.1",
        "run.seed=9",
    ],
)
def test_what_a_run_is_made_of_does_not_change_on_the_way(finished: RunFolder, change: str):
    """The checkpoint's held-out scores would be compared with those of other prompts, models or rewards."""
    result = launch("--resume", finished.path, "--override", "ppo.steps=5", change)
    assert result.exit_code == 2
    assert f"{change.split('=')[0]}=" in result.output
    assert "begin a new run" in result.output


def test_a_run_that_goes_back_leaves_nothing_of_the_other_way(copied: RunFolder):
    newest, best = step_path(copied.checkpoints, 4), best_path(copied.checkpoints)
    shutil.copy(newest, best)
    result = launch(
        "--resume", step_path(copied.checkpoints, 2), "--override", "ppo.steps=3", "logging.save_interval=9"
    )
    assert result.exit_code == 0, result.output
    assert newest_checkpoint(copied.checkpoints) == step_path(copied.checkpoints, 3)
    aside = copied.checkpoints / "before-resume-at-step000002"
    assert {newest.name, best.name} <= {path.name for path in aside.iterdir()}
    assert not best.exists() or load_checkpoint(best)["step"] <= 3
    assert "complete, 3 of 3 steps" in launch("--resume", copied.path).output


def test_resume_refuses(finished: RunFolder, config: Path, tmp_path: Path):
    assert "complete, 4 of 4 steps" in launch("--resume", finished.path).output
    fewer = launch("--resume", finished.path, "--override", "ppo.steps=1").output
    assert "for more of them: --override ppo.steps=8" in fewer
    assert "by --override only" in launch("--resume", finished.path, "--config", config).output
    assert "no folder of a run" in launch("--resume", tmp_path).output
    reshaped = launch("--resume", finished.path, "--override", "model.num_points=3", "ppo.steps=9")
    assert "cannot be changed" in reshaped.output
    assert reshaped.exit_code == 2


def test_corrupt_checkpoint_at_resume_names_it_and_the_one_before_works(copied: RunFolder):
    newest = step_path(copied.checkpoints, 4)
    newest.write_bytes(newest.read_bytes()[:1000])
    result = launch("--resume", copied.path)
    assert result.exit_code == 2
    assert "policy-step000004.pt: the checkpoint is corrupt" in result.output
    offered = result.output.split("--resume ")[1].split()[0]
    assert launch("--resume", offered, "--dry-run").exit_code == 0


def test_a_run_that_goes_on_elsewhere_is_not_resumed(copied: RunFolder):
    with only_writer(copied.path):
        result = launch("--resume", copied.path, "--override", "ppo.steps=5")
    assert result.exit_code == 2
    assert "another process is writing to it" in result.output
    assert len(read_metrics(copied.metrics)) == 5
    assert load_config(copied.config).config.ppo.steps == 4


OTHER_START = [[0.2, 0.5], [0.4, 0.8]]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("step", 2.5),
        ("format", torch.tensor([1, 2])),
        ("config", "x"),
        ("config.ppo", 3),
        ("start", None),
        ("start.metadata", 3),
        ("start.table.positions", None),
        ("start.table.positions", torch.tensor(OTHER_START).double()),
        ("start.table.weights", torch.zeros(2, 3, 4)),
        ("table.positions", torch.tensor(OTHER_START).double()),
        ("trainer", []),
        ("trainer.policy.base", torch.zeros(2, 5).double()),
        ("trainer.policy.hidden.weight", torch.zeros(2)),
        ("trainer.policy.output.bias", torch.full((5,), torch.nan).double()),
        ("trainer.completed_steps", 1),
        ("trainer.generator", torch.zeros(3)),
        ("trainer.optimizer.state", {0: {"step": 3}}),
        ("trainer.optimizer.state", {9: {}}),
        ("trainer.prompts.cursor", None),
        ("trainer.prompts.cursor", -8),
        ("trainer.source.reward.reward", {"count": None, "mean": 0.0, "squares": 0.0}),
        ("trainer.source.max_rows", "all"),
        ("watch", []),
        ("watch.start", None),
        ("watch.best.panel", torch.zeros(2)),
        ("watch.best.parts", {}),
    ],
)
def test_a_checkpoint_with_other_things_in_their_place_is_refused(copied: RunFolder, place: str, value: object):
    newest = step_path(copied.checkpoints, 4)
    state = torch.load(newest, weights_only=True)
    *parents, last = place.split(".") if "policy." not in place else ("trainer", "policy", place.split("policy.")[1])
    part = state
    for parent in parents:
        part = part[parent]
    assert last in part
    part[last] = value
    torch.save(state, newest)
    result = launch("--resume", copied.path, "--override", "ppo.steps=5")
    assert result.exit_code == 2, result.output
    assert sum(line.startswith("Error") for line in result.output.splitlines()) == 1
    assert newest.name in result.output or str(copied.path) in result.output
    assert len(read_metrics(copied.metrics)) == 5  # nothing was done


def test_a_start_that_the_policy_did_not_begin_at_is_refused(copied: RunFolder):
    newest = step_path(copied.checkpoints, 4)
    state = torch.load(newest, weights_only=True)
    for table in ("table", "snapshot_table"):
        state["start"][table]["positions"] = torch.tensor(OTHER_START).double()
    torch.save(state, newest)
    for result in (launch("--resume", copied.path, "--override", "ppo.steps=5"), export_of(copied)):
        assert result.exit_code == 2
        assert "did not begin at the table" in " ".join(result.output.split())


def test_other_prompts_at_resume_are_refused(copied: RunFolder, tmp_path: Path):
    (tmp_path / "other.csv").write_text("text\na\nb\n")
    result = launch("--resume", copied.path, "--override", f"data.prompt_csv={tmp_path / 'other.csv'}", "ppo.steps=6")
    assert result.exit_code == 2
    assert "trained with other prompts" in result.output
    assert len(read_metrics(copied.metrics)) == 5


@pytest.mark.parametrize(
    ("environment", "overrides", "remedy"),
    [
        ({"WORLD_SIZE": "2"}, [], "torchrun started 2 processes.*--override run.num_devices=2 run.num_nodes=1"),
        (
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            ["run.num_devices=8", "ppo.rollout_batch_size=32"],
            None,  # as many in all
        ),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, [], "--override run.num_devices=4 run.num_nodes=2"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, [], "srun started 3 processes.*--override run.num_devices=3 run.num_nodes=1"),
        ({"WORLD_SIZE": "1"}, [], None),
        ({"WORLD_SIZE": "2"}, ["run.num_devices=2"], None),
    ],
)
def test_processes_that_would_make_the_same_run_are_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, environment: dict, overrides: list[str], remedy: str | None
):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    result = launch("--config", config, "--dry-run", "--override", "run.device=cpu", *overrides)
    assert result.exit_code == (0 if remedy is None else 2), result.output
    if remedy is not None:
        assert re.fullmatch(f"Error: .*{remedy}\n", result.output)


@pytest.mark.slow
def test_two_processes_make_the_run_that_one_makes(config: Path, finished: RunFolder, tmp_path: Path):
    overrides = [f"run.output_root={tmp_path}", "run.num_devices=2"]
    command = [sys.executable, "-m", "training.ppo.launch", "--config", str(config), "--override", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # as many as here: sums depend on it
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, timeout=300)
    shared, alone = (load_checkpoint(step_path(run.checkpoints, 4)) for run in (only_run(tmp_path), finished))
    for name, tensor in alone["table"].items():
        torch.testing.assert_close(shared["table"][name], tensor, rtol=0, atol=1e-6)
    rows = [timeless(read_metrics(run.metrics)) for run in (only_run(tmp_path), finished)]
    for ours, theirs in zip(*rows, strict=True):
        for name, numbers in theirs.pop("table").items():
            torch.testing.assert_close(torch.tensor(ours["table"][name]), torch.tensor(numbers), rtol=0, atol=1e-6)
        del ours["table"]
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert torch.equal(shared["trainer"]["generator"], alone["trainer"]["generator"])


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_a_process_that_dies_ends_the_other_in_a_line_and_another_number_goes_on(
    config: Path, tmp_path: Path, first: bool
):
    told = [f"run.output_root={tmp_path / 'exps'}", "run.num_devices=2", "ppo.steps=1000", "logging.save_interval=1"]
    command = [sys.executable, "-m", "training.ppo.launch", "--config", str(config), "--override", *told]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "logging.eval_interval=0"], cwd=REPOSITORY, stdout=log, stderr=log)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        wait_until(lambda: list(tmp_path.glob("exps/*/checkpoints/policy-step000002.pt")), 300)
        other = int(children.read_text().split()[0])
        os.kill(process.pid if first else other, signal.SIGKILL)
        if first:
            process.wait()
            wait_until(lambda: not Path(f"/proc/{other}/exe").exists(), 60)
        else:
            process.wait(60)
    finally:
        process.kill()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert "another of the processes" in said or "terminated with code -9" in said or "the process that started" in said
    folder = only_run(tmp_path / "exps")
    step = load_checkpoint(newest_checkpoint(folder.checkpoints))["step"]
    result = launch("--resume", folder.path, "--override", f"ppo.steps={step + 1}", "run.num_devices=1")
    assert result.exit_code == 0, result.output
    assert load_checkpoint(step_path(folder.checkpoints, step + 1))["step"] == step + 1


def test_a_run_without_previews_draws_none(config: Path, tmp_path: Path):
    overrides = [f"run.output_root={tmp_path}", "ppo.steps=1", "logging.preview_prompts=0"]
    result = launch("--config", config, "--override", *overrides)
    assert result.exit_code == 0, result.output
    assert not list(only_run(tmp_path).samples.iterdir())


def test_processes_whose_policies_move_apart_end_before_a_checkpoint(config: Path, tmp_path: Path, monkeypatch):
    def gathered(run: training_run.TrainingRun, numbers: torch.Tensor) -> torch.Tensor:
        return torch.stack([numbers, numbers + 1e-9 if numbers.is_floating_point() else numbers])

    monkeypatch.setattr(training_run.TrainingRun, "_of_each_process", gathered)
    result = launch("--config", config, "--override", f"run.output_root={tmp_path}", "logging.eval_interval=0")
    assert result.exit_code == 2
    assert "step 2: the policies of the processes differ, by up to 1e-09" in result.output
    assert not list(tmp_path.glob("*/checkpoints/*"))


def wait_until(true: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_finishes_the_step_and_saves(
    config: Path, finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    step = PPOTrainer.step

    def interrupted_step(trainer: PPOTrainer) -> dict[str, float]:
        if trainer.completed_steps == 0:
            os.kill(os.getpid(), number)
        return step(trainer)

    monkeypatch.setattr(PPOTrainer, "step", interrupted_step)
    before = signal.getsignal(number)
    result = launch("--config", config, "--override", f"run.output_root={tmp_path}")
    assert result.exit_code == 128 + number, result.output
    assert signal.getsignal(number) == before
    folder = only_run(tmp_path)
    assert load_checkpoint(step_path(folder.checkpoints, 1))["step"] == 1
    monkeypatch.undo()
    assert launch("--resume", folder.path).exit_code == 0
    resumed, whole = (load_checkpoint(step_path(run.checkpoints, 4)) for run in (folder, finished))
    assert_same(resumed["trainer"], whole["trainer"])


def test_full_disk_costs_no_training(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save, refusals = training_run.save_checkpoint, []

    def full_for_a_while(path: Path, state: dict) -> None:
        if len(refusals) < 2:
            refusals.append(path.name)
            raise InputError(f"{path}: cannot be written ({os.strerror(errno.ENOSPC)})")
        save(path, state)

    monkeypatch.setattr(training_run, "save_checkpoint", full_for_a_while)
    result = launch(
        "--config", config, "--override", f"run.output_root={tmp_path}", "ppo.steps=3", "logging.save_interval=1",
        "logging.eval_interval=0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert refusals == ["policy-step000001.pt", "policy-step000002.pt"]
    assert load_checkpoint(step_path(only_run(tmp_path).checkpoints, 3))["step"] == 3


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_takes_nothing_any_more_ends_a_run_in_a_line(config: Path, tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # bytes of any one file, the configuration's are fewer
    try:
        result = launch("--config", config, "--override", f"run.output_root={tmp_path}", "ppo.steps=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 2, result.output
    assert "policy-step000002.pt: cannot be written (File too large)" in result.output


def test_disk_full_at_the_end_is_an_error(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, state: dict) -> None:
        raise InputError(f"{path}: cannot be written ({os.strerror(errno.ENOSPC)})")

    monkeypatch.setattr(training_run, "save_checkpoint", full)
    overrides = [f"run.output_root={tmp_path}", "ppo.steps=1", "logging.eval_interval=0"]
    result = launch("--config", config, "--override", *overrides)
    assert result.exit_code == 2
    assert "No space left on device" in result.output


def test_a_report_that_cannot_be_written_does_not_make_a_finished_run_fail(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(folder: RunFolder) -> Path:
        raise InputError(f"{folder.report}: cannot be written (No space left on device)")

    monkeypatch.setattr("training.ppo.launch.write_report", refuse)
    root = tmp_path / "my runs"
    result = launch("--config", config, "--override", f"run.output_root={root}", "ppo.steps=1")
    assert result.exit_code == 0, result.output
    folder = only_run(root)
    assert step_path(folder.checkpoints, 1).exists()
    assert f"to write it later: python -m training.ppo.report '{folder.path}'" in result.output
    assert f"export: python -m training.ppo.export_epd_predictor '{folder.path}'" in result.output


def test_rewards_that_are_not_finite_stop_the_run_with_one_message(config: Path, tmp_path: Path):
    weights = torch.load(config.parent / "reward.pt", weights_only=True)
    weights["state_dict"]["visual.proj"].fill_(torch.inf)
    torch.save(weights, config.parent / "broken.pt")
    shutil.copy(config.parent / "reward.json", config.parent / "broken.json")
    overrides = [f"run.output_root={tmp_path}", f"reward.weights_path={config.parent / 'broken.pt'}"]
    for extra, message in (("run.seed=1", "6 of 6 held-out images"), ("logging.eval_interval=0", "100% of the groups")):
        result = launch("--config", config, "--override", *overrides, extra)
        assert result.exit_code == 2
        assert message in result.output


def test_a_reward_that_raises_ends_the_run_in_a_line_and_what_is_saved_stays(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    score, calls = rewards.RewardHPS.score, []

    def broken(reward: rewards.RewardHPS, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyError("no such prompt")
        return score(reward, images, prompts)

    overrides = [f"run.output_root={tmp_path}", "logging.eval_interval=0"]
    with monkeypatch.context() as patch:
        patch.setattr(rewards.RewardHPS, "score", broken)
        result = launch("--config", config, "--override", *overrides)
    assert result.exit_code == 2
    assert (
        "Error: the reward reward failed on 8 images: KeyError: 'no such prompt' (test_launch.py, line" in result.output
    )
    folder = only_run(tmp_path)
    assert newest_checkpoint(folder.checkpoints) == step_path(folder.checkpoints, 2)
    assert launch("--resume", folder.path).exit_code == 0


def test_a_run_that_diverges_ends_in_a_line(config: Path, tmp_path: Path):
    overrides = [f"run.output_root={tmp_path}", "ppo.learning_rate=1", "ppo.ppo_epochs=3", "logging.eval_interval=0"]
    result = launch("--config", config, "--override", *overrides)
    assert result.exit_code == 2, result.exception
    assert "lower ppo.learning_rate" in result.output


def test_the_panel_may_be_a_reward_that_goes_by_a_name(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with torch.random.fork_rng(devices=[]):
        clip.new_clip(CLIP).save_pretrained(tmp_path / "weights" / "clip-vit-large-patch14")
    monkeypatch.setattr(rewards, "ROOT", tmp_path)
    monkeypatch.setattr(rewards, "DEFAULT_TOKENIZER", config.parent / "tokenizer")
    overrides = [f"run.output_root={tmp_path / 'exps'}", "ppo.steps=1", "logging.panel=clip_score"]
    result = launch("--config", config, "--override", *overrides)
    assert result.exit_code == 0, result.output
    folder = only_run(tmp_path / "exps")
    state = load_checkpoint(step_path(folder.checkpoints, 1))
    panel = state["watch"]["start"]["panel"]
    assert panel.shape == (6,)
    assert ((panel >= 0) & (panel <= 100)).all()  # a cosine in percent, not below 0 (Hessel et al., 2021)
    assert read_metrics(folder.metrics)[0]["heldout/panel"] == pytest.approx(panel.double().mean().item())


def test_hacking_stops_the_run_if_so_configured(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    observe = HeldoutWatch.observe
    monkeypatch.setattr(
        HeldoutWatch,
        "observe",
        lambda watch, step, scores: observe(watch, step, scores) | {"heldout/suspected_reward_hacking": int(step == 2)},
    )
    overrides = [f"run.output_root={tmp_path}", "logging.stop_on_reward_hacking=true"]
    result = launch("--config", config, "--override", *overrides)
    assert result.exit_code == 0, result.output
    assert "stopped for suspected reward hacking after step 2 of 4" in result.output
    assert step_path(only_run(tmp_path).checkpoints, 2).exists()


def test_everything_missing_is_named_at_once(config: Path, tmp_path: Path):
    overrides = [
        f"{key}={tmp_path / name}"
        for key, name in (
            ("data.predictor_snapshot", "none.pkl"),
            ("data.prompt_csv", "none.csv"),
            ("model.model_path", "none"),
            ("reward.weights_path", "none.pt"),
            ("logging.eval_prompts", "others.csv"),
            ("logging.panel", "panel.pt"),
        )
    ]
    result = launch("--config", config, "--dry-run", "--override", *overrides, "run.device=tpu")
    assert result.exit_code == 2
    for name in ("none.pkl", "none.csv", "none.pt", "others.csv", "panel.pt", "tpu"):
        assert name in result.output
    assert "cfgs/shapes.yaml" in result.output
    assert "Traceback" not in result.output


def test_held_out_prompts_must_be_held_out(config: Path, tmp_path: Path):
    (tmp_path / "heldout.csv").write_text("text\nu\na\nv\n")
    result = launch(
        "--config", config, "--dry-run", "--override", f"logging.eval_prompts={tmp_path / 'heldout.csv'}",
        "logging.eval_count=3",
    )  # fmt: skip
    assert "1 held-out prompts are also trained on, for example 'a'" in result.output
    result = launch("--config", config, "--dry-run", "--override", "logging.eval_count=7")
    assert "set it to 6" in result.output


def test_prompts_that_a_reward_cuts_are_said_once_for_the_whole_run(config: Path, tmp_path: Path, caplog):
    long = "a b c d e f g h i"
    (tmp_path / "train.csv").write_text("text\n" + "".join(f"{long} {letter}\n" for letter in "abcdefg"))
    (tmp_path / "heldout.csv").write_text(f"text\n{long} z\n" + "\n".join("vwxyz"))
    files = (f"data.prompt_csv={tmp_path / 'train.csv'}", f"logging.eval_prompts={tmp_path / 'heldout.csv'}")
    result = launch("--config", config, "--override", *files, f"run.output_root={tmp_path / 'exps'}", "ppo.steps=2")
    assert result.exit_code == 0, result.output
    said = [record.getMessage() for record in caplog.records if "tokens of a prompt" in record.getMessage()]
    assert said == [
        "reward reward reads 8 tokens of a prompt: 8 of 13 prompts are longer and judged by these",
        "reward panel reads 8 tokens of a prompt: 1 of 6 prompts are longer and judged by these",
    ]


def test_what_the_verifier_cannot_judge_is_said_before_anything_is_loaded(config: Path):
    result = launch("--config", config, "--dry-run", "--override", "logging.panel=verifier")
    assert result.exit_code == 2
    assert "logging.panel=verifier: 'u' is no caption of the shapes world" in " ".join(result.output.split())


def test_a_panel_that_does_not_fit_the_model_says_what_to_set_and_leaves_no_folder(config: Path, tmp_path: Path):
    (tmp_path / "shapes.csv").write_text(
        "text\na large red star on a white background\na small cyan ring on a black one\n"
    )
    asked = [f"logging.eval_prompts={tmp_path / 'shapes.csv'}", "logging.panel=verifier", "logging.eval_count=2"]
    asked += ["logging.preview_prompts=1", f"run.output_root={tmp_path / 'exps'}", "data.on_long_prompt=skip"]
    for dry in (["--dry-run"], []):
        result = launch("--config", config, *dry, "--override", *asked)
        assert result.exit_code == 2
        assert "for another model set logging.panel=null" in " ".join(result.output.split())
    assert not (tmp_path / "exps").exists()


def test_long_prompts_are_refused_or_skipped_before_anything_is_loaded(config: Path, tmp_path: Path, caplog):
    (tmp_path / "train.csv").write_text("text\nab\n" + "long prompts " * 4 + "\nabc\n")
    asked = ["--override", f"data.prompt_csv={tmp_path / 'train.csv'}"]
    result = launch("--config", config, "--dry-run", *asked)
    assert result.exit_code == 2
    told = " ".join(result.output.split())
    assert "prompt 2 ('long prompts long prompts long prompts long prompts'): it is 44 tokens long" in told
    assert "leave out those that are too long: data.on_long_prompt=skip" in told
    result = launch("--config", config, "--dry-run", *asked, "data.on_long_prompt=skip")
    assert result.exit_code == 0, result.output
    said = f"{tmp_path / 'train.csv'}: 1 of 3 prompts are too long for the model and left out"
    assert [record.message for record in caplog.records if "too long" in record.message] == [said]
    start = prepare(load_config(config, [*asked[1:], "data.on_long_prompt=skip", "logging.eval_interval=0"]))
    fabric = make_fabric(start.config)
    fabric.launch()
    assert build(start, fabric).trainer.prompts.prompts == ("ab", "abc")


def test_a_dry_run_passes_nothing_whose_weights_do_not_fit(config: Path, tmp_path: Path):
    shutil.copytree(config.parent / "model", tmp_path / "model")
    settings = tmp_path / "model" / "unet" / "config.json"
    settings.write_text(settings.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    result = launch("--config", config, "--dry-run", "--override", f"model.model_path={tmp_path / 'model'}")
    assert result.exit_code == 2
    assert "conv_in.weight" in result.output


def test_contradicted_snapshot_at_launch(config: Path, tmp_path: Path):
    changed = yaml.safe_load(config.read_text())
    changed["model"]["guidance_rate"] = 5.0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed))
    result = launch("--config", tmp_path / "config.yaml", "--dry-run")
    assert result.exit_code == 2
    assert "was made with 2.0" in result.output
    overridden = launch("--config", tmp_path / "config.yaml", "--dry-run", "--override", "model.guidance_rate=5.0")
    assert "note: model.guidance_rate=5.0 by --override" in overridden.output


def test_a_model_that_cannot_be_loaded_leaves_no_run_behind(config: Path, tmp_path: Path):
    torch.save({"lora_unet.lora_up.weight": torch.zeros(1)}, tmp_path / "other.ckpt")
    overrides = [f"run.output_root={tmp_path / 'exps'}", f"model.model_path={tmp_path / 'other.ckpt'}"]
    result = launch("--config", config, "--override", *overrides)
    assert result.exit_code == 2
    assert "it is a LoRA" in result.output
    assert not (tmp_path / "exps").exists()


def test_default_configuration_names_what_stable_diffusion_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)  # a folder without any asset
    monkeypatch.setattr("models.registry.SOURCE", tmp_path)
    result = launch("--dry-run")
    assert result.exit_code == 2
    for part in (
        "v1-5-pruned-emaonly.safetensors",
        "4,265,146,304 bytes",
        "python -m models.assets fetch sd15",
        "HPS_v2.1_compressed.pt",
        "MS-COCO_val2014_30k_captions.csv",
        "python -m models.assets fetch coco-prompts",
        "--config training/ppo/cfgs/shapes.yaml",
    ):
        assert part in result.output


def test_default_configuration_lacks_nothing_but_what_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("models.registry.SOURCE", tmp_path)
    result = launch("--dry-run", "--device", "cpu")
    assert result.exit_code == 2
    assert "num_steps 11 (10 intervals), num_points 2" in result.output
    faults = result.output.partition("cannot start:")[2].splitlines()
    missing = [line.removeprefix("  - ").partition(":")[0] for line in faults if line[:4] == "  - "]
    assert "model sd15" in missing
    assert set(missing) <= {
        "model sd15",
        "reward weights/HPS_v2.1_compressed.pt",
        "data.prompt_csv=src/prompts/MS-COCO_val2014_30k_captions.csv",
    }


@pytest.mark.integration
def test_shapes_configuration_on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asset):
    asset("src/shapes/model_index.json")
    monkeypatch.chdir(REPOSITORY)
    overrides = [f"run.output_root={tmp_path}", "ppo.steps=2", "logging.eval_count=8"]
    result = launch("--config", "training/ppo/cfgs/shapes.yaml", "--device", "cuda", "--override", *overrides)
    assert result.exit_code == 0, result.output


def test_the_network_is_compiled_for_the_rows_of_a_step(config: Path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    built = []
    for compiled in ("false", "true"):
        start = prepare(load_config(config, [f"model.compile={compiled}"]))
        built.append(build(start, make_fabric(start.config)).denoiser)
    assert [denoiser.network._compiled_call_impl is not None for denoiser in built] == [False, True]
    assert [denoiser._row_counts for denoiser in built] == [(), (16,)]  # eight images, twice for guidance


def test_a_network_that_cannot_be_compiled_is_said_before_anything_is_loaded(config: Path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = launch("--config", config, "--override", "model.compile=true")
    assert result.exit_code == 2
    assert "model.compile=true: torch.compile needs a compiler for cpu, and no-such-compiler is not" in result.output


def test_a_plot_leaves_nothing_to_be_collected(config: Path, tmp_path: Path):
    start = prepare(load_config(config))
    start = build(start, make_fabric(start.config)).start
    (tmp_path / "logs").mkdir()
    writer = training_run.RunWriter(RunFolder(tmp_path), start, None)
    writer.table_plot(0, start.table, start.solver.sigmas)  # what is loaded for the first has cycles, too
    gc.disable()
    try:
        writer.table_plot(1, start.table, start.solver.sigmas)
        assert gc.collect() < 100
    finally:
        gc.enable()


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
