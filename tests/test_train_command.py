"""train.py on a tiny random pipeline: what it writes, what sample.py makes of it, how it resumes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import sample
import train
from models.registry import default_guidance_scale
from tests.tiny_pipeline import save_tiny_pipeline
from training.distillation import Refinement
from training.snapshot import find_snapshot, load_snapshot


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(train.main, [str(argument) for argument in arguments])


def small(pipeline, *more):
    return (
        *("--dataset_name", "tiny", "--model_path", pipeline, "--prompt-file", "prompts.txt"),
        *("--num_steps", 3, "--M", 1, "--trajectories", 4, "--batch", 2, "--total_kimg", 0.008, "--device", "cpu"),
        *more,
    )


def refusal(result):
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.output


def test_a_run_writes_its_folder_and_its_table_draws_images(pipeline, workplace):
    result = run(*small(pipeline, "--scale_dir", 0.05, "--guidance_rate", 3, "--afs", "True", "--target", "image"))
    assert result.exit_code == 0, result.output
    folder = workplace / "exps" / "00000-tiny-3-3-epd-dpm2-1-discrete-afs"
    assert sorted(file.name for file in folder.iterdir()) == [
        "network-snapshot-000000.json",
        "network-snapshot-000000.pkl",
        "network-snapshot-000008.json",
        "network-snapshot-000008.pkl",
        "stats.jsonl",
        "training_options.json",
    ]
    assert json.loads((folder / "training_options.json").read_text())["trajectories"] == 4
    table, metadata = load_snapshot(find_snapshot(0))
    assert (table.num_steps, table.num_points) == (3, 2)
    assert table.scale_dir is not None
    expected = {"dataset_name": "tiny", "M": 1, "afs": True, "guidance_rate": 3.0, "schedule_type": "discrete"}
    assert expected.items() <= metadata.items()
    assert metadata["sigma_max"] == pytest.approx(14.6, abs=0.1)

    drawn = CliRunner().invoke(
        sample.main,
        [
            "--predictor_path",
            "0",
            "--model_path",
            str(pipeline),
            "--prompt",
            "a dog",
            "--seeds",
            "0",
            "--outdir",
            "out",
        ],
    )
    assert drawn.exit_code == 0, drawn.output
    assert len(list((workplace / "out").glob("*.png"))) == 1


def test_init_only_writes_the_cold_start_without_any_model(workplace):
    for number in range(2):
        result = run("--dataset_name", "shapes", "--num_steps", 5, "--num_points", 3, "--init-only")
        assert result.exit_code == 0, result.output
        assert f"0000{number}-shapes-5-8-epd-dpm2-9-discrete" in result.output
    table, metadata = load_snapshot(find_snapshot(1))
    assert table.positions.flatten().tolist() == pytest.approx([0.05, 0.05 + 0.7 / 3, 0.05 + 1.4 / 3] * 4)
    assert table.weights.flatten().tolist() == pytest.approx([0.75, 0.125, 0.125] * 4)
    assert table.scale_dir is table.scale_time is None
    assert metadata["schedule_type"] == "discrete"
    assert (metadata["guidance_type"], metadata["guidance_rate"]) == ("cfg", default_guidance_scale("shapes"))
    result = run("--dataset_name", "shapes", "--num_steps", 5, "--guidance_rate", 1, "--init-only")
    assert result.exit_code == 0, result.output
    _, unguided = load_snapshot(find_snapshot(2))
    assert (unguided["guidance_type"], unguided["guidance_rate"]) == ("uncond", 1.0)


def test_a_dry_run_says_what_it_would_do_and_does_nothing(pipeline, workplace):
    result = run(*small(pipeline, "--dry-run"))
    assert result.exit_code == 0, result.output
    assert '"num_points": 2' in result.output
    # 4 trajectories: 4 teacher intervals of 2 evaluations; 3 searched: 2 intervals of 1 + 16 and of 1 + 2; then 8 and 2
    # go down 2 intervals of 1 + 2
    assert "teacher 32, search 120, refinement 48, held-out checks 12" in result.output
    assert [file.name for file in workplace.iterdir()] == ["prompts.txt"]


def test_an_interrupted_run_resumes_by_its_number_and_ends_in_the_same_table(pipeline, workplace, monkeypatch):
    assert run(*small(pipeline)).exit_code == 0
    whole = find_snapshot(0)
    step = Refinement.step

    def interrupted(refinement):
        if refinement.done == 2:
            raise KeyboardInterrupt
        return step(refinement)

    monkeypatch.setattr(Refinement, "step", interrupted)
    assert run(*small(pipeline)).exit_code == 130
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert "contradicts" in refusal(run("--resume", 1, "--lr", 0.5))
    result = run("--resume", 1, "--M", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    resumed = find_snapshot(1)
    assert resumed.name == whole.name == "network-snapshot-000008.pkl"
    assert resumed.with_suffix(".json").read_bytes() == whole.with_suffix(".json").read_bytes()
    assert (resumed.parent / "stats.jsonl").read_bytes() == (whole.parent / "stats.jsonl").read_bytes()
    assert "finished" in refusal(run("--resume", 1))


def test_a_run_whose_prompts_have_changed_is_not_resumed(pipeline, workplace, monkeypatch):
    def interrupted(refinement):
        raise KeyboardInterrupt

    monkeypatch.setattr(Refinement, "step", interrupted)
    assert run(*small(pipeline)).exit_code == 130
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    captions = Path("prompts.txt").read_text()
    Path("prompts.txt").write_text("something else\n")
    assert "belongs to other prompts" in refusal(run("--resume", 0, "--device", "cpu"))
    Path("prompts.txt").write_text(captions)
    (folder,) = Path("exps").iterdir()
    torch.save({"x": 1}, folder / "training-state.pt")
    assert "does not hold best, best_loss, refinement" in refusal(run("--resume", 0, "--device", "cpu"))


def test_a_first_table_without_a_finite_loss_is_an_error(pipeline, workplace, monkeypatch):
    monkeypatch.setattr(Refinement, "held_out_loss", lambda refinement: float("nan"))
    assert "the held-out loss of the first table is nan" in refusal(run(*small(pipeline)))


def test_an_untrained_table_is_finished_when_it_is_there(workplace):
    assert run("--dataset_name", "shapes", "--num_steps", 3, "--init-only").exit_code == 0
    before = find_snapshot(0).read_bytes()
    assert "finished" in refusal(run("--resume", 0))
    assert find_snapshot(0).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--dataset_name is missing"),
        (("--dataset_name", "../x", "--init-only"), "letters, digits and _ only"),
        (("--dataset_name", "tiny"), "--prompt-file is missing"),
        (("--dataset_name", "tiny", "--prompt-file", "prompts.txt"), "tiny"),
        (("--dataset_name", "tiny", "--prompt-file", "missing.txt"), "no such prompt file"),
        (("--dataset_name", "tiny", "--sampler_tea", "euler"), "'euler' is not one of"),
        (("--dataset_name", "tiny", "--init-only", "--total_kimg", "inf"), "inf is not a finite number"),
        (("--dataset_name", "tiny", "--init-only", "--guidance_rate", "nan"), "nan is not a finite number"),
        (("--resume", "x" * 300), "is no path"),
        (("--dataset_name", "tiny", "--schedule_type", "linear"), "'linear' is not one of"),
        (("--dataset_name", "tiny", "--num_steps", "1"), "num_steps"),
        (("--dataset_name", "tiny", "--scale_time", "1"), "scale_time"),
        (("--resume", "5"), "experiment 5: no folder"),
        (("--resume", "."), "no readable options of a distillation"),
    ],
)
def test_bad_input_is_refused_in_a_line(workplace, arguments, message):
    assert message in refusal(run(*arguments))
    assert [file.name for file in workplace.iterdir()] == ["prompts.txt"]


def test_prompts_that_the_model_cannot_take_are_named(pipeline, workplace):
    (workplace / "prompts.txt").write_text("a dog\n" + "a dog " * 40)
    assert "it is 160 tokens long" in refusal(run(*small(pipeline)))
    assert not (workplace / "exps").exists()
