"""The three commands, one after the other with one configuration, on a tiny DDPM; and what they say to bad input."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import scripts.eval
import scripts.finetune
import scripts.train_reward_model
from errors import InputError
from files import only_writer
from models import clip
from models.fingerprints import fingerprint
from models.pixel_diffusion import load_pixel_diffusion
from models.shapes.data import render_scenes
from scripts.preference import preference_reward
from tests.ddpm.tiny_ddpm import tiny_overrides, write_tiny_ddpm
from tests.plain_clip import write_letter_tokenizer
from training.ddpm.config import SCHEMA, judge_file, reward_file
from training.ddpm.jobs import heldout_real_images
from training.ddpm.reward_model import load_classifier
from training.ddpm.reward_training import RewardTrainer
from training.ddpm.run import EpochRun
from training.ddpm.trainer import DDPMTrainer
from training.ppo.tests.tiny_world import CLIP
from training.runs.checkpoint import newest_checkpoint
from training.runs.configuration import to_plain
from training.runs.run_folder import RunFolder, read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = str(REPOSITORY / "configs" / "smoke.yaml")
COMMANDS = {
    "train_reward_model": scripts.train_reward_model.main,
    "finetune": scripts.finetune.main,
    "eval": scripts.eval.main,
}


def call(command, *arguments):
    return CliRunner().invoke(COMMANDS[command], [str(argument) for argument in arguments])


def succeeds(command, *arguments):
    result = call(command, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fails(command, *arguments):
    result = call(command, *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


def smoke(folder, *more):
    return ("--cfg", SMOKE, "--override", *tiny_overrides(folder), *more)


def run_of(folder, command):
    (run,) = (folder / "runs").glob(f"*-{command}")
    return run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which the first two commands have come to their ends, and what they and the third said."""
    folder = tmp_path_factory.mktemp("done")
    write_tiny_ddpm(folder / "start")
    before = fingerprint([folder / "start"])
    said = [succeeds(command, *smoke(folder)) for command in COMMANDS]
    return folder, before, said


def test_each_command_reads_what_the_one_before_wrote(done):
    folder, before, said = done
    assert str(folder / "reward.pt") in said[0]
    assert str(folder / "tuned") in said[1]
    assert f"{folder / 'start'} -> {folder / 'tuned'}" in said[2]
    assert fingerprint([folder / "start"]) == before  # never overwritten
    start, tuned = (load_pixel_diffusion(str(folder / name)).network.state_dict() for name in ("start", "tuned"))
    assert start.keys() == tuned.keys()
    distance = sum((tuned[name] - start[name]).square().sum() for name in start).sqrt()
    whole = sum(value.square().sum() for value in start.values()).sqrt()
    assert 0 < distance < 0.1 * whole  # it began at path.ddpm and went a small way
    reward, judge = (
        load_classifier(folder / name, "", torch.device("cpu")) for name in ("reward.pt", "reward-judge.pt")
    )
    assert judge.width > reward.width


def test_the_numbers_are_written_for_people_and_for_programs(done):
    folder, _, said = done
    (row,) = read_metrics(run_of(folder, "eval") / "logs" / "metrics.jsonl")
    assert f"difference {row['heldout/judge_difference']:+.4f}" in said[2]
    with Image.open(run_of(folder, "eval") / "samples" / "before_after.png") as picture:
        assert picture.width > picture.height
    rows = read_metrics(run_of(folder, "finetune") / "logs" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["heldout/reward_difference"] == 0
    assert rows[1]["first_pass_ratio_error"] <= 1e-6
    for command in COMMANDS:
        assert list((run_of(folder, command) / "logs").glob("events.out.tfevents.*"))
    events = EventAccumulator(str(run_of(folder, "eval") / "logs")).Reload()
    assert events.Tags()["images"] == ["before and after"]
    assert events.Scalars("heldout/judge_difference")[0].value == pytest.approx(row["heldout/judge_difference"])
    page = RunFolder.open(run_of(folder, "eval")).report.read_text()
    assert f"difference {row['heldout/judge_difference']:+.4f}" in page
    assert page.count("<figcaption>fine-tuned</figcaption>") == page.count("<figcaption>a real image</figcaption>") > 1


def test_fakes_of_a_folder_stand_beside_what_was_drawn(done, tmp_path):
    folder, _, _ = done
    (tmp_path / "fakes").mkdir()
    for number in range(20):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "fakes" / f"{number}.png")
    own = (f"path.runs={tmp_path / 'runs'}", f"path.fake_img={tmp_path / 'fakes'}")
    succeeds("eval", *smoke(folder, *own))
    page = RunFolder.open(run_of(tmp_path, "eval")).report.read_text()
    fakes, real = (page.count(f"<figcaption>a {kind} image</figcaption>") for kind in ("fake", "real"))
    assert fakes == real > 1


def test_outputs_are_replaced_only_when_asked(done):
    folder, _, _ = done
    for command, output in (("train_reward_model", "reward.pt"), ("finetune", "tuned")):
        assert f"{folder / output}: exists already; --overwrite" in fails(command, *smoke(folder))


def test_nothing_but_an_output_of_the_same_kind_is_replaced(done, tmp_path):
    folder, _, _ = done
    album = tmp_path / "album"
    album.mkdir()
    (album / "photo.png").write_bytes(b"dear to someone")
    (tmp_path / "letter").write_text("dear to someone")
    for command, key, path, reason in (
        ("finetune", "finetune.save", album, "holds more than a DDPM (photo.png); it is never replaced"),
        ("finetune", "finetune.save", tmp_path / "letter", "is a file, and a folder is to be written there"),
        ("train_reward_model", "train_reward.save", album, "is a folder, and a file is to be written there"),
    ):
        said = fails(command, *smoke(folder, f"{key}={path}"), "--overwrite")
        assert reason in " ".join(said.split())
    assert (album / "photo.png").read_bytes() == b"dear to someone"
    assert (tmp_path / "letter").read_text() == "dear to someone"


def test_a_ddpm_with_another_noise_schedule_is_not_compared(done, tmp_path):
    folder, _, _ = done
    other = write_tiny_ddpm(tmp_path / "other", beta_end=0.05)
    assert "has another noise schedule than path.ddpm" in " ".join(
        fails("eval", *smoke(folder, f"finetune.save={other}")).split()
    )


def test_a_resumed_fine_tuning_ends_where_one_without_a_stop_does(done, tmp_path):
    folder, _, _ = done
    ways = {"whole": 2, "parts": 1}
    short = ("finetune.save_interval=1", "finetune.eval_interval=0", f"path.runs={tmp_path / 'runs'}")
    for name, epochs in ways.items():
        succeeds(
            "finetune", *smoke(folder, *short, f"finetune.save={tmp_path / name}", f"finetune.num_epochs={epochs}")
        )
    (stopped,) = (
        run for run in (tmp_path / "runs").iterdir() if not (run / "checkpoints" / "policy-step000002.pt").exists()
    )
    shutil.rmtree(tmp_path / "parts")  # as if writing it had failed: the last checkpoint is enough to do it again
    succeeds("finetune", "--resume", stopped)
    assert load_pixel_diffusion(str(tmp_path / "parts")).image_size == (8, 8)
    assert "exists already" in fails("finetune", "--resume", stopped, "--override", "finetune.num_epochs=2")
    assert "scripts.finetune" in fails("train_reward_model", "--resume", stopped)
    succeeds("finetune", "--resume", stopped, "--overwrite", "--override", "finetune.num_epochs=2")
    fewer = fails("finetune", "--resume", stopped, "--overwrite", "--override", "finetune.num_epochs=1")
    assert "has gone through 2 epochs" in fewer
    whole, parts = (load_pixel_diffusion(str(tmp_path / name)).network.state_dict() for name in ways)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [row["step"] for row in read_metrics(stopped / "logs" / "metrics.jsonl")] == [1, 2]


def test_a_run_that_goes_on_elsewhere_is_not_resumed(done):
    folder, _, _ = done
    run = run_of(folder, "finetune")
    with only_writer(run):
        assert "another process is writing to it" in fails("finetune", "--resume", run, "--overwrite")


def test_a_damaged_line_of_the_log_does_not_stop_a_resume(done, tmp_path):
    folder, _, _ = done
    run = tmp_path / "copy"
    shutil.copytree(run_of(folder, "finetune"), run)
    log = run / "logs" / "metrics.jsonl"
    log.write_bytes(b"\xff\n" + log.read_bytes())
    succeeds("finetune", "--resume", run, "--overwrite", "--override", f"finetune.save={tmp_path / 'tuned'}")
    assert [row["step"] for row in read_metrics(log)] == [0, 1, 2]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_no_training(done, tmp_path, monkeypatch):
    folder, _, _ = done
    own = (f"path.runs={tmp_path / 'runs'}", f"finetune.save={tmp_path / 'tuned'}", "finetune.save_interval=1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    step = DDPMTrainer.step

    def full_in_the_first_epoch(self):
        bytes_of_a_file = 1000 if self.completed_steps == 0 else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, limits[1]))
        if self.completed_steps == 1:
            assert not list((tmp_path / "runs").rglob("*.pt"))
        return step(self)

    monkeypatch.setattr(DDPMTrainer, "step", full_in_the_first_epoch)
    try:
        succeeds("finetune", *smoke(folder, *own, "finetune.eval_interval=1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (run,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["policy-step000002.pt"]
    assert [row["step"] for row in read_metrics(run / "logs" / "metrics.jsonl")] == [0, 1, 2]
    events = EventAccumulator(str(run / "logs")).Reload()
    assert [event.step for event in events.Scalars("reward_mean")] == [1, 2]


def test_what_somebody_else_wrote_while_a_run_trained_is_not_replaced(done, tmp_path, monkeypatch):
    folder, _, _ = done
    own = (f"path.runs={tmp_path / 'runs'}", f"finetune.save={tmp_path / 'tuned'}", "finetune.eval_interval=0")
    trained = EpochRun.run

    def overtaken(self):
        write_tiny_ddpm(tmp_path / "tuned")
        return trained(self)

    with monkeypatch.context() as patch:
        patch.setattr(EpochRun, "run", overtaken)
        said = " ".join(fails("finetune", *smoke(folder, *own)).split())
    assert "was written by somebody else while" in said
    theirs = fingerprint([tmp_path / "tuned"])
    (run,) = (tmp_path / "runs").iterdir()
    succeeds("finetune", "--resume", run, "--override", f"finetune.save={tmp_path / 'beside'}")
    assert fingerprint([tmp_path / "tuned"]) == theirs
    assert (tmp_path / "beside").is_dir()


@pytest.mark.parametrize(
    ("command", "place", "value"),
    [
        ("finetune", ("job",), torch.zeros(2)),
        ("finetune", ("step",), "1"),
        ("finetune", ("config", "finetune"), 3),
        ("finetune", ("trainer",), None),
        ("finetune", ("trainer", "network"), {}),
        ("finetune", ("trainer", "network"), 3),
        ("finetune", ("trainer", "optimizer", "state"), {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}),
        ("finetune", ("trainer", "running_reward"), "x"),
        ("finetune", ("trainer", "completed_steps"), 0),
        ("train_reward_model", ("trainer", "classifiers"), {}),
        ("train_reward_model", ("trainer", "optimizers", "reward"), {"state": [1]}),
    ],
)
def test_a_checkpoint_with_other_things_in_their_place_is_refused(done, tmp_path, command, place, value):
    run = Path(shutil.copytree(run_of(done[0], command), tmp_path / "run"))
    checkpoint = newest_checkpoint(run / "checkpoints")
    state = part = torch.load(checkpoint, weights_only=True)
    for parent in place[:-1]:
        part = part[parent]
    assert place[-1] in part
    part[place[-1]] = value
    torch.save(state, checkpoint)
    said = fails(command, "--resume", run, "--overwrite")
    assert str(run) in said.replace("\n", "")


def test_own_folders_of_images_are_used_as_they_are(done, tmp_path):
    folder, _, _ = done
    scenes = render_scenes("train", 40, 0, progress=False).images
    for kind in ("real", "fake"):
        (tmp_path / kind).mkdir()
    for index, pixels in enumerate(scenes):
        image = Image.fromarray(pixels)
        image.save(tmp_path / "real" / f"{index}.jpg")
        image.convert("L").resize((10, 7)).save(tmp_path / "fake" / f"{index}.png")
    (tmp_path / "fake" / "broken.png").write_bytes(b"\x89PNG")
    shutil.copy(tmp_path / "real" / "7.jpg", tmp_path / "real" / "7 (copy).jpg")
    own = (f"path.real_img={tmp_path / 'real'}", f"path.fake_img={tmp_path / 'fake'}")
    said = succeeds(
        "train_reward_model",
        *smoke(folder, *own, f"train_reward.save={tmp_path / 'own.pt'}", "train_reward.num_img=41"),
    )
    assert "path.real_img: 41 images of the 41" in said
    assert "path.real_img: 1 images are equal to others and are left out" in said
    assert "path.fake_img: 40 images of the 41" in said
    assert "1 files cannot be read and are skipped" in said
    assert said.count("resized to 8x8") == 2
    assert "40 images of mode L are converted to RGB" in said


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("finetune", "finetune.eta=0", "DDIM is then deterministic"),
        ("finetune", "finetune.episodes_per_epoch=0", "finetune.episodes_per_epoch=0 must be at least 2"),
        ("finetune", "finetune.lr=1e300", "finetune.lr=1e+300 must be at most 1e+30"),
        ("finetune", f"path.ddpm={'x' * 300}", "File name too long"),
        ("finetune", "finetune.ddim_steps=101", "the DDPM has 100 training steps; use 2 to 100"),
        ("finetune", "seed=9223372036854775808", "seed"),
        ("finetune", "path.rm=.", "the reward model's path . names no file"),
        ("finetune", "device=gpu", "Unknown device 'gpu'. Known: auto, cpu, cuda"),
        ("finetune", "finetune.microbatch=3", "does not divide the 4 images"),
        ("finetune", "finetune.epochs=3", "unknown key finetune.epochs; did you mean finetune.num_epochs?"),
        ("finetune", "path.rm=nowhere.pt", "path.rm=nowhere.pt: there is no such reward model"),
        ("finetune", "path.ddpm=no-one/nothing", "hf download no-one/nothing"),
        ("finetune", "finetune.reward=preference", "needs path.preference"),
        ("train_reward_model", "path.real_img=nowhere", "path.real_img=nowhere: there is no such folder"),
        ("train_reward_model", "path.rm=elsewhere.pt", "is not the path.rm=elsewhere.pt that finetune reads"),
        ("eval", "finetune.save=nowhere", "there is no fine-tuned DDPM"),
    ],
)
def test_bad_input_is_explained(done, tmp_path, command, change, message):
    folder, _, _ = done
    fresh = (
        f"finetune.save={tmp_path / 'new'}",
        f"train_reward.save={tmp_path / 'new.pt'}",
        f"path.rm={folder / 'reward.pt'}",
    )
    paths = fresh if command == "finetune" else fresh[:2]
    assert message in " ".join(fails(command, *smoke(folder, *paths, change)).split())


PUBLIC = """
seed: 42
device: 'gpu'
path:
  real_img: 'data/real'
  fake_img: 'data/fake'
  ddpm: null
  rm: 'rm.pt'
finetune:
  lr: 0.000001
  num_epochs: 1
  ddim_steps: 1
  eta: 0.5
  clip_eps: 0.2
  episodes_per_epoch: 1
  grad_clip: 1.0
  microbatch: 1
  save: true
train_reward:
  num_img: 2
  num_noise: 0
  batch_size: 2
  num_workers: 0
  lr: 0.0001
  label_smoothing: 0.05
  num_epochs: 1
  save: false
"""
"""Keys and values as public PPO of a DDPM has them; what is else in its two files runs as it is."""


def test_a_public_configuration_runs_once_the_lines_that_are_named_are_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("public.yaml").write_text(PUBLIC)
    said = fails("train_reward_model", "--cfg", "public.yaml")
    replaced = {
        "device=gpu": ("Did you mean cuda?", "device=cpu"),
        "path.ddpm=None": ("set path.ddpm=src/shapes_ddpm", f"path.ddpm={write_tiny_ddpm(tmp_path / 'start')}"),
        "finetune.save=true": ("set finetune.save=outputs/ddpm", "finetune.save=outputs/ddpm"),
        "train_reward.save=false": ("set train_reward.save=rm.pt", "train_reward.save=rm.pt"),
        "finetune.ddim_steps=1": ("must be at least 2", "finetune.ddim_steps=2"),
        "finetune.episodes_per_epoch=1": ("must be at least 2", "finetune.episodes_per_epoch=2"),
        "train_reward.num_img=2": ("must be at least 20", "train_reward.num_img=20"),
    }
    lines = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(lines) == len(replaced)
    for value, (remedy, _) in replaced.items():
        (line,) = [line for line in lines if f"{value}:" in line or f"{value} " in line]
        assert remedy in line
    for kind, seed in (("real", 0), ("fake", 1)):
        Path("data", kind).mkdir(parents=True)
        for index, pixels in enumerate(render_scenes("train", 20, seed, progress=False).images):
            Image.fromarray(pixels).save(f"data/{kind}/{index}.png")
    lines = [line for _, line in replaced.values()]
    for command in COMMANDS:
        succeeds(command, "--cfg", "public.yaml", "--override", *lines, "eval.num_img=8")
    assert Path("outputs/ddpm/unet").is_dir()


def test_a_run_never_saves_over_the_ddpm_it_starts_from(done):
    folder, _, _ = done
    for save in (folder / "start", folder / "start" / "unet", folder):
        assert "never overwritten" in fails("finetune", *smoke(folder, f"finetune.save={save}"), "--overwrite")
    weights = folder / "start" / "unet" / "diffusion_pytorch_model.safetensors"
    before = fingerprint([folder / "start"])
    for key in ("train_reward.save", "path.judge"):
        said = fails("train_reward_model", *smoke(folder, f"{key}={weights}"), "--overwrite")
        assert "never overwritten" in said
        alone = fails("train_reward_model", *smoke(folder, f"path.ddpm={weights}", f"{key}={weights}"), "--overwrite")
        assert "never overwritten" in alone
    assert fingerprint([folder / "start"]) == before


def test_a_ddpm_that_diverged_is_not_written(done, tmp_path):
    folder, _, _ = done
    runs = f"path.runs={tmp_path / 'runs'}"
    wild = (runs, "finetune.lr=1e30", "finetune.num_epochs=1", f"finetune.save={tmp_path / 'wild'}")
    for interval in (0, 1):
        said = fails("finetune", *smoke(folder, *wild, f"finetune.eval_interval={interval}"))
        assert "not finite: the DDPM has diverged" in " ".join(said.split())
        assert not (tmp_path / "wild").exists()


@pytest.mark.parametrize(("share", "warned"), [(1.0, True), (0.0, False)])
def test_a_reward_model_near_chance_is_not_saved_silently(done, tmp_path, monkeypatch, share, warned):
    monkeypatch.setattr(RewardTrainer, "chance", lambda trainer: (share, 0.05))
    folder, _, _ = done
    places = (f"train_reward.save={tmp_path / 'reward.pt'}", f"path.runs={tmp_path / 'runs'}")
    output = succeeds("train_reward_model", *smoke(folder, *places))
    assert ("WARNING: the reward classifier is near chance" in output) == warned


def test_a_reward_model_that_diverged_is_not_written(done, tmp_path):
    folder, _, _ = done
    wild = ("train_reward.lr=1e30", f"train_reward.save={tmp_path / 'wild.pt'}", f"path.runs={tmp_path / 'runs'}")
    said = " ".join(fails("train_reward_model", *smoke(folder, *wild)).split())
    assert "log-odds that are not finite: the updates went too far; lower train_reward.lr" in said
    assert not (tmp_path / "wild.pt").exists()


def test_a_run_goes_on_with_what_it_began_with(done, tmp_path):
    folder, _, _ = done
    run = run_of(folder, "finetune")
    other, judge = write_tiny_ddpm(tmp_path / "other", beta_end=0.05), folder / "reward-judge.pt"
    for change in (
        f"path.ddpm={other}",
        "seed=1",
        "finetune.lora_rank=2",
        "finetune.ddim_steps=4",
        "finetune.eta=0.5",
        f"train_reward.save={judge}",
    ):
        said = fails("finetune", "--resume", run, "--overwrite", "--override", change)
        assert "out, or begin a new run" in " ".join(said.split())
    succeeds("finetune", "--resume", run, "--overwrite", "--override", "finetune.lr=2e-4")


def test_an_interrupt_before_the_first_epoch_leaves_something_to_go_on_with(done, tmp_path, monkeypatch):
    folder, _, _ = done
    look = EpochRun._look

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return look(self)

    own = (f"path.runs={tmp_path / 'my runs'}", f"finetune.save={tmp_path / 'late'}")
    with monkeypatch.context() as patch:
        patch.setattr(EpochRun, "_look", interrupted)
        stopped = call("finetune", *smoke(folder, *own))
    assert stopped.exit_code == 130, stopped.output
    (run,) = (tmp_path / "my runs").iterdir()
    assert f"go on: python -m scripts.finetune --resume '{run}'" in stopped.output
    succeeds("finetune", "--resume", run)
    late, tuned = (
        load_pixel_diffusion(str(path)).network.state_dict() for path in (tmp_path / "late", folder / "tuned")
    )
    assert all(torch.equal(late[name], tuned[name]) for name in tuned)


def test_every_seed_holds_the_same_images_of_a_folder_out(tmp_path):
    """Or a reward model of one seed would have been trained on what another seed calls held out."""
    (tmp_path / "real").mkdir()
    for index in range(60):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "real" / f"{index}.png")

    def heldout(seed):
        own = (f"path.real_img={tmp_path / 'real'}", "train_reward.num_img=50", f"seed={seed}")
        return heldout_real_images(SCHEMA.load(SMOKE, own).config, (8, 8))

    assert torch.equal(heldout(0), heldout(1))


@pytest.mark.parametrize(
    ("reward", "message"),
    [("none.pt", "There are no reward weights"), ("pickscore", "python -m models.assets fetch pickscore")],
)
def test_a_reward_of_the_main_job_is_asked_for_its_files(done, tmp_path, reward, message):
    folder, _, _ = done
    asked = ("finetune.reward=preference", f"path.preference={reward}", "finetune.prompt='a red star'")
    output = fails("finetune", *smoke(folder, *asked, f"finetune.save={tmp_path / 'new'}"))
    assert message in output


def test_a_prompt_that_the_preference_reward_cuts_is_said(tmp_path, caplog):
    write_letter_tokenizer(tmp_path / "tokenizer")
    clip.save_open_clip_checkpoint(clip.new_clip(CLIP), tmp_path / "reward.pt")
    (tmp_path / "reward.json").write_text(json.dumps({"model_cfg": CLIP, "tokenizer": "tokenizer"}))
    finetune = {"reward": "preference", "prompt": "a b c d e f g h i"}
    values = {"finetune": finetune, "path": {"preference": str(tmp_path / "reward.pt")}}
    preference_reward(SCHEMA.build(values, "case.yaml").config, torch.device("cpu"))
    (record,) = caplog.records
    assert "reads 8 tokens of a prompt: 1 of 1 prompts" in record.getMessage()


def test_a_command_without_a_configuration_says_so():
    assert "--cfg is missing" in fails("eval")


@pytest.mark.parametrize("name", ["default", "smoke", "shapes"])
def test_the_shipped_configurations_have_no_faults(name):
    config = SCHEMA.load(REPOSITORY / "configs" / f"{name}.yaml").config
    assert reward_file(config) == Path(config.train_reward.save)
    assert judge_file(config) == reward_file(config).with_name(f"{reward_file(config).stem}-judge.pt")


@pytest.mark.parametrize("prompt", ["a \udcff", "a\0b", "...", "\ufeffa"])
def test_a_prompt_that_is_none_is_a_fault_of_the_configuration(prompt):
    values = {"finetune": {"reward": "preference", "prompt": prompt}, "path": {"preference": "reward.pt"}}
    with pytest.raises(InputError, match=r"finetune\.prompt=.*: (it )?(holds|begins)"):
        SCHEMA.build(values, "case.yaml")


@pytest.mark.parametrize(("real", "fake"), [("data", "data/fake"), ("data/real", "data"), ("data", "data/../data")])
def test_folders_of_real_and_fake_images_must_lie_apart(tmp_path, real, fake):
    values = {"path": {"real_img": str(tmp_path / real), "fake_img": str(tmp_path / fake)}}
    with pytest.raises(InputError, match=r"path\.real_img.*path\.fake_img.* overlap: .* real and as fake"):
        SCHEMA.build(values, "case.yaml")


def test_all_faults_of_a_configuration_are_told_at_once(tmp_path):
    (tmp_path / "bad.yaml").write_text("sed: 1\nfinetune: {lr: -1, eta: 0, ddim_steps: many}\nseed: 3\n")
    with pytest.raises(InputError) as caught:
        SCHEMA.load(tmp_path / "bad.yaml")
    message = str(caught.value)
    assert "4 faults" in message
    for part in ("unknown section sed; did you mean seed?", "finetune.lr=-1", "eta=0", "ddim_steps='many'"):
        assert part in message


def test_top_level_keys_and_overrides_are_read():
    config = SCHEMA.load(SMOKE, ["seed=5", "finetune.lr=3e-5"]).config
    assert (config.seed, config.finetune.lr) == (5, 3e-5)
    again = SCHEMA.build(json.loads(json.dumps(to_plain(config))), "again").config
    assert again == config
