"""train.py on a tiny random pipeline: what it writes, what sample.py makes of it, how it resumes, what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import evaluate
import sample
import scripts.eval
import scripts.finetune
import scripts.image_statistics
import scripts.push_to_hub
import train
from files import only_writer
from models.registry import default_guidance_scale, load_denoiser
from tests.tiny_families import save_tiny_family
from tests.tiny_pipeline import save_tiny_pipeline
from training.distillation import Refinement
from training.snapshot import find_snapshot, load_snapshot
from training.solver import classical_solver, load_solver, parse_schedule

REPOSITORY = Path(__file__).resolve().parents[1]


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


def test_a_multistep_solver_is_distilled_and_draws_images(pipeline, workplace):
    """Without points: grid and history are learned, and what comes out is used as it stands."""
    result = run(*small(pipeline, "--num_points", 0, "--num_steps", 4))
    assert result.exit_code == 0, result.output
    folder = workplace / "exps" / "00000-tiny-4-3-epd-dpm2-1-discrete"
    assert sorted(file.name for file in folder.iterdir()) == [
        "network-snapshot-000000.json",
        "network-snapshot-000008.json",
        "stats.jsonl",
        "training_options.json",
    ]
    told = json.loads((folder / "training_options.json").read_text())
    assert (told["train"], told["start"]) == ("history,grid", "search")
    table, metadata = load_snapshot(find_snapshot(0))
    assert (table.num_points, len(metadata["sigmas"]), metadata["learned"]) == (0, 4, ["history", "grid"])
    drawn = CliRunner().invoke(
        sample.main,
        [*("--predictor_path", "0", "--model_path", str(pipeline), "--prompt", "a dog", "--outdir", "out")],
    )
    assert drawn.exit_code == 0, drawn.output
    record = json.loads((workplace / "out" / "images.jsonl").read_text().splitlines()[0])
    assert (record["schedule"], record["parallel_evaluations"]) == ("own", 3)


@pytest.mark.parametrize(
    ("arguments", "start", "learned"),
    [
        ((), "search", "positions,weights"),
        (("--scale_time", 0.1), "search", "positions,weights,scale_time"),
        (("--train", "weights, positions,grid"), "search", "positions,weights,grid"),
        (("--num_points", 1), "search", "positions"),
        (("--train", "positions"), "near_euler", "positions"),
        (("--start", "ipndm:2", "--train", "history"), "ipndm:2", "history"),
        (("--num_points", 0), "search", "history,grid"),
        (("--num_points", 0, "--train", "grid"), "ddim", "grid"),
        (("--num_points", 0, "--start", "dpmpp:2"), "dpmpp:2", "history,grid"),
        (("--num_points", 0, "--init-only"), "ddim", None),
        (("--init-only",), "near_euler", None),
    ],
)
def test_what_is_left_open_follows_from_the_rest(workplace, arguments, start, learned):
    said = run("--dataset_name", "tiny", "--prompt-file", "prompts.txt", *arguments, "--dry-run").output
    options = json.loads(said[: said.index("}") + 1])
    assert (options["start"], options["train"]) == (start, learned)


@pytest.mark.parametrize("init_only", [False, True])
def test_a_run_of_before_there_was_a_choice_is_what_it_was(workplace, init_only):
    """Its start was the search, or what --init-only wrote; and it learned what its bounds let it."""
    told = run("--dataset_name", "tiny", "--prompt-file", "prompts.txt", "--scale_dir", 0.05, "--dry-run").output
    options = {**json.loads(told[: told.index("}") + 1]), "init_only": init_only, "start": "near_euler"}
    del options["train"]
    for older in (options, {key: value for key, value in options.items() if key != "start"}):
        (workplace / "training_options.json").write_text(json.dumps(older))
        said = run("--resume", workplace, "--dry-run").output
        settled = json.loads(said[: said.index("}") + 1])
        assert settled["start"] == ("near_euler" if init_only else "search")
        assert settled["train"] == (None if init_only else "positions,weights,scale_dir")


def test_init_only_writes_the_cold_start_without_any_model(workplace):
    for number in range(2):
        result = run("--dataset_name", "shapes", "--num_steps", 5, "--num_points", 3, "--init-only")
        assert result.exit_code == 0, result.output
        assert f"0000{number}-shapes-5-8-epd-near_euler-discrete" in result.output
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
            os.kill(os.getpid(), signal.SIGTERM)
        return step(refinement)

    monkeypatch.setattr(Refinement, "step", interrupted)
    stopped = run(*small(pipeline))
    assert stopped.exit_code == 143
    assert "interrupted; go on: python train.py --resume exps/00001-" in stopped.output
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


def test_damaged_statistics_do_not_stop_a_resume(pipeline, workplace, monkeypatch):
    step = Refinement.step

    def interrupted(refinement):
        if refinement.done == 3:
            raise KeyboardInterrupt
        return step(refinement)

    with monkeypatch.context() as patch:
        patch.setattr(Refinement, "step", interrupted)
        assert run(*small(pipeline)).exit_code == 130
    (folder,) = Path("exps").iterdir()
    statistics = folder / "stats.jsonl"
    lines = statistics.read_bytes().splitlines(keepends=True)
    statistics.write_bytes(b"".join([lines[0], b"\xff\n\xff\n", *lines[2:]]))
    result = run("--resume", 0, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["update"] for line in statistics.read_text().splitlines()] == [0, 2, 3, 4]


def test_an_interrupt_says_what_can_be_typed(pipeline, workplace, monkeypatch):
    monkeypatch.setattr(Refinement, "step", lambda refinement: os.kill(os.getpid(), signal.SIGTERM))
    stopped = run(*small(pipeline), "--outdir", "my runs")
    assert "go on: python train.py --resume 'my runs/00000-" in stopped.output


def test_a_run_that_goes_on_elsewhere_is_not_resumed(pipeline, workplace, monkeypatch):
    def interrupted(refinement):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Refinement, "step", interrupted)
        assert run(*small(pipeline)).exit_code == 130
    (folder,) = Path("exps").iterdir()
    with only_writer(folder):
        assert "another process is writing to it" in refusal(run("--resume", 0, "--device", "cpu"))
    assert run("--resume", 0, "--device", "cpu").exit_code == 0


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
        (("--dataset_name", "nope", "--init-only"), "'nope' stands for no model; known are ms_coco, shapes, "),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--train", "positions", "--num_points", 0),
            "nothing of it can vary with --num_steps 4 and --num_points 0; history, d",
        ),
        (("--train", "guidance"), "whether another is better only a reward can say"),
        (("--train", "grid", "--start", "search"), "search finds positions and weights, which --train grid leaves out"),
        (
            ("--num_points", 0, "--train", "grid", "--start", "search"),
            "search finds history, which --train grid leaves",
        ),
        (
            ("--train", "positions,weights", "--scale_dir", 0.1),
            "give both, for example --scale_dir 0.05 and scale_dir in",
        ),
        (("--train", "positions,weights,scale_time"), "--scale_time 0: a scale is learned within its bound"),
        (("--num_points", 0, "--scale_dir", 0.1), "--train history,grid and --scale_dir 0.1: a scale is learned"),
        (
            ("--num_points", 0, "--num_steps", 2),
            "silent: nothing of it can vary with --num_steps 2 and --num_points 0; nothing",
        ),
        (("--init-only", "--train", "grid"), "--train grid: --init-only trains nothing"),
        (("--init-only", "--start", "search"), "--start search"),
        (("--sigma_max", 5), "--sigma_max 5: a teacher begins at the model's own"),
        (("--start", "dpm2"), "--start dpm2 needs --num_points 1, not 2"),
    ],
)
def test_what_cannot_be_learned_together_is_refused_in_a_line(workplace, arguments, message):
    said = refusal(run("--dataset_name", "tiny", "--prompt-file", "prompts.txt", *arguments))
    assert message in said
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert [file.name for file in workplace.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize("names", ["curvature", "grid,", ""])
def test_unknown_columns_are_refused_with_the_known_ones(workplace, names):
    said = refusal(run("--dataset_name", "tiny", "--prompt-file", "prompts.txt", "--train", names))
    known = "positions, weights, scale_dir, scale_time, guidance, history, direction_history, grid"
    assert f"unknown column {names.split(',')[-1]!r}; known are {known}" in said


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_points", 0, "--train positions,weights: nothing of it can vary with --num_steps 3 and --num_points 0"),
        ("train", "positions,curvature", "train: unknown column 'curvature'; known are positions, weights, scale_dir"),
        ("train", ["grid"], "train is ['grid'], which it cannot be"),
        ("start", "midpoint", "unknown solver 'midpoint'"),
        ("num_points", "2", "num_points is '2', which it cannot be"),
        ("num_points", 2.0, "num_points is 2.0, which it cannot be"),
        ("M", [[1, 2], [3]], "M is [[1, 2], [3]], which it cannot be"),
        ("afs", 0, "afs is 0, which it cannot be"),
        ("lr", math.nan, "lr is nan, which it cannot be"),
        ("schedule_rho", 10**400, "schedule_rho is 1000"),
        ("schedule_type", "linear", "schedule_type: 'linear' is not one of"),
        ("sampler_stu", "heun", "sampler_stu is 'heun', which it cannot be"),
        ("model_path", "a\0b", "model_path is 'a\\x00b', which it cannot be"),
        ("dataset_name", "../x", "letters, digits and _ only"),
        ("prompt_file", None, "--prompt-file is missing"),
        ("trajectories", 10**19, "trajectories: 10000000000000000000 is not in the range"),
        ("strange", 1, "no options of a distillation"),
    ],
)
def test_options_that_nobody_can_have_typed_are_refused(workplace, key, value, message):
    told = run("--dataset_name", "tiny", "--prompt-file", "prompts.txt", "--num_steps", 3, "--dry-run").output
    options = json.loads(told[: told.index("}") + 1])
    folder = workplace / "run"
    folder.mkdir()
    (folder / "training_options.json").write_text(json.dumps(options))
    assert run("--resume", folder, "--dry-run").exit_code == 0
    (folder / "training_options.json").write_text(json.dumps({**options, key: value}))
    said = refusal(run("--resume", folder, "--dry-run"))
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"[" * 30000, b"\xff\xfe{}", b"null", b" " * 10**6 + b"{}"])
def test_options_that_are_no_json_object_are_refused(workplace, content):
    (workplace / "training_options.json").write_bytes(content)
    said = refusal(run("--resume", workplace, "--dry-run"))
    assert "options of a distillation" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (train.main, ("--dataset_name", "shapes", "--init-only")),
        (sample.main, ("--model_path", "shapes", "--solver", "ddim", "--num-steps", "3", "--prompt", "a")),
        (scripts.finetune.main, ("--cfg", str(REPOSITORY / "configs" / "smoke.yaml"))),
        (scripts.eval.main, ("--cfg", str(REPOSITORY / "configs" / "smoke.yaml"))),
        (scripts.push_to_hub.main, ("run", "--repo", "owner/name")),
        (scripts.image_statistics.main, ("images",)),
    ],
)
def test_what_runs_in_one_process_is_not_run_in_several(workplace, monkeypatch, command, arguments):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refusal(CliRunner().invoke(command, arguments))
    assert said == "Error: torchrun started 2 processes of this command, which runs in one: start it once\n"
    assert [file.name for file in workplace.iterdir()] == ["prompts.txt"]


def test_an_evaluation_in_several_processes_is_told_of_them(workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refusal(CliRunner().invoke(evaluate.main, ("--model", "shapes")))
    assert said == "Error: torchrun started 2 processes of this command: add --num-devices 2\n"
    assert [file.name for file in workplace.iterdir()] == ["prompts.txt"]


def test_prompts_that_the_model_cannot_take_are_named(pipeline, workplace):
    (workplace / "prompts.txt").write_text("a dog\n" + "a dog " * 40)
    assert "it is 160 tokens long" in refusal(run(*small(pipeline)))
    assert not (workplace / "exps").exists()


def test_how_the_model_was_loaded_is_kept_and_older_files_do_not_say_it(pipeline, workplace):
    asked = ("--height", 24, "--negative-prompt", "a cat")
    result = run("--dataset_name", "tiny", "--model_path", pipeline, "--num_steps", 3, "--init-only", *asked)
    assert result.exit_code == 0, result.output
    (folder,) = (workplace / "exps").iterdir()
    _, metadata = load_snapshot(folder / "network-snapshot-000000.pkl")
    assert metadata["model_options"] == {"height": 24, "negative_prompt": "a cat"}
    file = folder / "training_options.json"
    told = json.loads(file.read_text())
    (folder / "network-snapshot-000000.json").unlink()
    assert "height=32 contradicts" in refusal(run("--resume", folder, "--height", 32))
    new = ("lora", "vae", "height", "width", "negative_prompt", "without_t5", "sigma_max")
    older = {key: told[key] for key in told if key not in new}
    file.write_text(json.dumps(older))
    result = run("--resume", folder)
    assert result.exit_code == 0, result.output
    assert "model_options" not in load_snapshot(folder / "network-snapshot-000000.pkl")[1]


def test_a_start_plays_the_classical_solver_from_the_noise_level_that_it_is_told_to_begin_at(pipeline, workplace):
    asked = ("--start", "dpmpp:2", "--num_points", 0, "--sigma_max", 5, "--guidance", 2)
    result = run("--dataset_name", "tiny", "--model_path", pipeline, "--num_steps", 4, "--init-only", *asked)
    assert result.exit_code == 0, result.output
    assert "-discrete-from5" in result.output
    denoiser = load_denoiser(pipeline, device="cpu", dtype=torch.float32)
    start = load_solver("0").on(denoiser)
    classical = classical_solver("dpmpp:2", 4, parse_schedule("discrete@5")).guided(2.0).on(denoiser)
    assert start.sigmas[0].item() == classical.sigmas[0].item() == pytest.approx(5)
    assert start.grid_name == classical.grid_name == "discrete@5"
    torch.testing.assert_close(*(one.latents(denoiser, ["a dog"], [0]) for one in (start, classical)))
    whole = classical_solver("dpmpp:2", 4, parse_schedule("discrete")).guided(2.0).on(denoiser)
    assert not torch.allclose(*(one.latents(denoiser, ["a dog"], [0]) for one in (start, whole)), atol=0.1)
    stored = replace(start, sigmas=None, schedule=whole.schedule, sigma_range=(None, whole.sigmas[0].float().item()))
    assert stored.on(denoiser).grid_name == "discrete"  # a model's largest level, which has been through float32


def test_a_start_is_guided_as_its_model_usually_is(workplace):
    for name, scale in (("sd3", 7.0), ("flux", 3.5)):
        model = save_tiny_family(name, workplace / name)
        result = run("--dataset_name", name, "--model_path", model, "--num_steps", 3, "--init-only")
        assert result.exit_code == 0, result.output
        (folder,) = (workplace / "exps").glob(f"*-{name}-*")
        assert load_snapshot(folder / "network-snapshot-000000.pkl")[1]["guidance_rate"] == scale


def test_a_table_of_another_family_is_refused_by_both_names(workplace):
    models = {name: save_tiny_family(name, workplace / name) for name in ("sd3", "flux")}
    shape = ("--num_steps", 3, "--num_points", 0, "--schedule_type", "flowmatch", "--height", 16, "--width", 16)
    start = ("--init-only", "--start", "ipndm")
    result = run("--dataset_name", "mine", "--model_path", models["sd3"], *shape, *start)
    assert result.exit_code == 0, result.output
    (folder,) = (workplace / "exps").iterdir()
    drawing = ("--predictor_path", folder, "--prompt", "a dog", "--seeds", "0", "--outdir", workplace / "out")
    for name, status in (("flux", 2), ("sd3", 0)):
        result = CliRunner().invoke(sample.main, [str(word) for word in (*drawing, "--model_path", models[name])])
        assert result.exit_code == status, result.output
        assert ("was made for a model of the family sd3, and flux is of the family flux" in result.output) == bool(
            status
        )
