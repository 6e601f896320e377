"""sample.py: one image a prompt and seed, the same in every batch, with its story; and what it refuses."""

from __future__ import annotations

import json
import pickle
import resource
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from errors import InputError
from files import only_writer
from models import load_denoiser
from models.backbone import Backbone
from models.pictures import to_pixels
from schedules import get_schedule
from scripts.verify_images import read_records
from solvers import SAMPLERS, EPDTable, epd_sampler, with_ipndm_history
from tests.by_hand import latents_by_hand
from tests.tiny_families import save_tiny_family
from tests.tiny_pipeline import save_tiny_pipeline, widen_decoder
from training import image_folder
from training.snapshot import save_snapshot
from training.solver import load_solver, network_dtype

TABLE = EPDTable(
    torch.tensor([[0.3, 0.7], [0.4, 0.8]], dtype=torch.float64),
    torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64),
)
METADATA = {
    "dataset_name": "ms_coco",
    "guidance_type": "cfg",
    "guidance_rate": 3.0,
    "schedule_type": "time_uniform",
    "schedule_rho": 2.0,
    "afs": True,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    run = tmp_path_factory.mktemp("exps") / "00004-tiny"
    return save_snapshot(run / "network-snapshot-000002", TABLE, METADATA)


def run(*arguments):
    return CliRunner().invoke(sample.main, [str(argument) for argument in arguments])


def pixels(folder):
    return {file.name: np.array(Image.open(file)) for file in folder.glob("*.png")}


def records(folder):
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def test_a_predictor_is_replayed_exactly(pipeline, predictor, tmp_path):
    result = run(
        "--predictor_path",
        predictor,
        "--model_path",
        pipeline,
        "--prompt",
        "a dog",
        "--seeds",
        "5",
        "--outdir",
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    denoiser = load_denoiser(pipeline, device="cpu", dtype=torch.float32)
    sigmas = get_schedule("time_uniform", 3, denoiser.sigma_min, denoiser.sigma_max, rho=2.0)
    latents = latents_by_hand(
        denoiser, ["a dog"], [5], lambda d, x, levels: epd_sampler(d, x, levels, TABLE, afs=True), sigmas, 3.0
    )
    assert f"wrote 1 image and images.jsonl to {tmp_path}" in result.output
    (image,) = pixels(tmp_path).values()
    np.testing.assert_array_equal(image, to_pixels(denoiser.decode(latents))[0])


def test_every_image_carries_its_story(pipeline, predictor, tmp_path):
    result = run(
        *("--predictor_path", predictor, "--model_path", pipeline, "--prompt", "a dog", "--prompt", "a Cat"),
        *("--seeds", "0-1", "--outdir", tmp_path),
    )
    assert result.exit_code == 0, result.output
    lines = records(tmp_path)
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("a dog", 0),
        ("a dog", 1),
        ("a Cat", 0),
        ("a Cat", 1),
    ]
    assert [line["file"] for line in lines][::3] == ["00000-a-dog-seed000000.png", "00001-a-cat-seed000001.png"]
    for line in lines:
        assert (line["parallel_evaluations"], line["total_evaluations"]) == (3, 5)  # 2 intervals of 1 + 2, AFS saves 1
        assert (line["schedule"], line["num_steps"], line["guidance"]) == ("time_uniform:2", 3, 3.0)
        assert line["predictor"] == str(predictor)
        assert len(line["predictor_sha256"]) == 64
        story = Image.open(tmp_path / line["file"]).text
        assert (story["prompt"], story["seed"], story["predictor"]) == (
            line["prompt"],
            str(line["seed"]),
            str(predictor),
        )


@pytest.mark.parametrize("solver", [("--solver", "dpmpp", "--num-steps", "4"), ("--predictor_path", None)])
def test_an_image_depends_neither_on_its_batch_nor_on_its_neighbours(pipeline, predictor, tmp_path, solver):
    solver = tuple(predictor if part is None else part for part in solver)
    common = (*solver, "--model_path", pipeline)
    many = ("--prompt", "a dog", "--prompt", "a cat", "--seeds", "0-2,9")
    for batch in (1, 3, 8):
        assert run(*common, *many, "--batch", batch, "--outdir", tmp_path / str(batch)).exit_code == 0
    one, three, eight = (pixels(tmp_path / str(batch)) for batch in (1, 3, 8))
    assert one.keys() == three.keys() == eight.keys()
    assert len(one) == 8
    for name, image in one.items():
        for other in (three[name], eight[name]):
            # Matrix products of another height may round in another order: one level of 255, here and there, at most.
            difference = np.abs(image.astype(int) - other)
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.01
    assert run(*common, "--prompt", "a dog", "--seeds", "9", "--outdir", tmp_path / "alone").exit_code == 0
    np.testing.assert_array_equal(
        pixels(tmp_path / "alone")["00000-a-dog-seed000009.png"], one["00000-a-dog-seed000009.png"]
    )
    distinct = {image.tobytes() for image in one.values()}
    assert len(distinct) == len(one)


def test_images_of_an_earlier_call_stay_as_they_are(pipeline, tmp_path):
    common = ("--model_path", pipeline, "--solver", "ddim", "--num-steps", "3", "--prompt", "a dog", "--seeds", "0-1")
    folders = [tmp_path / name for name in ("images", "images-2", "images-3")]
    assert run(*common, "--outdir", folders[0], "--guidance", "1").exit_code == 0
    before = {file.name: file.read_bytes() for file in folders[0].iterdir()}
    for folder in folders[1:]:
        result = run(*common, "--outdir", folders[0], "--guidance", "9", "--grid")
        assert result.exit_code == 0, result.output
        assert f"to {folder}\n" in result.output
    assert {file.name: file.read_bytes() for file in folders[0].iterdir()} == before
    after = pixels(folders[1])
    sheet = after.pop("grid.png")
    assert after.keys() == pixels(folders[0]).keys()
    assert {line["guidance"] for line in records(folders[1])} == {9.0}
    assert {file.suffix for file in folders[1].iterdir()} == {".png", ".jsonl"}
    for image in after.values():  # each image, enlarged eightfold, stands on the sheet
        enlarged = image.repeat(8, axis=0).repeat(8, axis=1)
        found = [left for left in range(sheet.shape[1] - 127) if (sheet[-136:-8, left : left + 128] == enlarged).all()]
        assert len(found) == 1


def test_a_disk_that_fills_up_leaves_whole_lines_and_images(pipeline, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    common = ("--model_path", pipeline, "--solver", "ddim", "--num-steps", 2, "--prompt", "a dog", "--device", "cpu")
    drawing = (*common, "--seeds", "0-11", "--batch", 4, "--outdir")
    assert run(*drawing, tmp_path / "whole").exit_code == 0
    sizes = [len(line) + 1 for line in (tmp_path / "whole" / "images.jsonl").read_bytes().splitlines()]
    largest = max(file.stat().st_size for file in (tmp_path / "whole").glob("*.png"))
    assert largest < sum(sizes[:8]) + 10  # so that it is the lines that are refused
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(sizes[:8]) + 10, limits[1]))
    try:
        result = run(*drawing, tmp_path / "short")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 2
    assert "images.jsonl: cannot be written" in result.output
    assert (tmp_path / "short" / "images.jsonl").read_bytes().count(b"\n") == len(records(tmp_path / "short")) == 8


def test_pairs_are_the_diagonal_of_prompts_and_seeds(pipeline, tmp_path):
    common = (
        "--model_path",
        pipeline,
        "--solver",
        "ddim",
        "--num-steps",
        "3",
        "--prompt",
        "a dog",
        "--prompt",
        "a cat",
    )
    assert run(*common, "--seeds", "3-4", "--outdir", tmp_path / "all").exit_code == 0
    assert run(*common, "--seeds", "3-4", "--pair", "--grid", "--outdir", tmp_path / "pairs").exit_code == 0
    every, paired = pixels(tmp_path / "all"), pixels(tmp_path / "pairs")
    assert paired.pop("grid.png").size
    assert [(line["prompt"], line["seed"]) for line in records(tmp_path / "pairs")] == [("a dog", 3), ("a cat", 4)]
    assert len(every) == 4
    assert len(paired) == 2
    # Another batch sums in another order: a unit of the last place of eight bits at most.
    assert all(np.abs(every[name].astype(int) - image).max() <= 1 for name, image in paired.items())
    message = refused(*common, "--seeds", "3", "--pair", "--outdir", tmp_path / "none")
    assert "--pair: 2 prompts and 1 seeds; give --seeds 0-1" in message


def test_after_an_interrupt_the_log_speaks_of_the_images_that_are_there(pipeline, tmp_path, monkeypatch):
    common = ("--model_path", pipeline, "--num-steps", "3", "--prompt", "a dog", "--seeds", "0-3", "--batch", "2")
    decode, calls = image_folder.decode, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(image_folder, "decode", interrupted)
    assert run(*common, "--outdir", tmp_path, "--solver", "heun").exit_code == 130
    assert [(line["seed"], line["solver"]) for line in records(tmp_path)] == [(0, "heun"), (1, "heun")]


def test_a_folder_that_another_process_draws_into_is_left_alone(pipeline, tmp_path):
    """Two logs in one file would each speak of half the images."""
    asked = ("--model_path", pipeline, "--solver", "ddim", "--num-steps", 2, "--prompt", "a", "--outdir", tmp_path)
    with only_writer(tmp_path):
        assert "another process is writing to it" in refused(*asked)
    assert not list(tmp_path.iterdir())
    assert run(*asked).exit_code == 0


def test_overrides_are_honoured_and_said(pipeline, predictor, tmp_path):
    common = ("--predictor_path", predictor, "--model_path", pipeline, "--prompt", "a dog", "--seeds", "0")
    result = run(*common, "--schedule", "discrete", "--guidance", "1", "--outdir", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"--model_path {pipeline} overrides the predictor's model, sd15" in result.output
    assert "--schedule discrete overrides the predictor's schedule, time_uniform:2" in result.output
    assert "--guidance 1 overrides the predictor's guidance, 3" in result.output
    assert (records(tmp_path)[0]["schedule"], records(tmp_path)[0]["guidance"]) == ("discrete", 1.0)
    same = run(
        *common, "--schedule", "time_uniform:2", "--guidance", "3", "--num-steps", "3", "--afs", "--outdir", tmp_path
    )
    assert same.exit_code == 0, same.output
    assert "--schedule" not in same.output
    assert "--guidance" not in same.output


def test_an_explosion_is_reported_and_black_pixels_are_no_crash(pipeline, tmp_path, monkeypatch):
    def exploding(denoise, x, sigmas, **_):
        return torch.where(torch.arange(len(x))[:, None, None, None] == 1, torch.nan, x)

    monkeypatch.setitem(SAMPLERS, "ddim", exploding)
    result = run(
        *("--model_path", pipeline, "--solver", "ddim", "--num-steps", "3", "--prompt", "a dog"),
        *("--seeds", "0-2", "--outdir", tmp_path),
    )
    assert result.exit_code == 0, result.output
    assert "1 of 3 images are not finite: the solver exploded" in result.output
    assert [line["finite"] for line in records(tmp_path)] == [True, False, True]


@pytest.mark.parametrize(("dtype", "overflows"), [("float16", True), ("bfloat16", False)])
def test_a_decoder_that_overflows_is_reported_and_its_images_are_marked(tmp_path, dtype, overflows):
    model = widen_decoder(save_tiny_pipeline(tmp_path / "model"))
    result = run(
        *("--model_path", model, "--solver", "ddim", "--num-steps", "3", "--prompt", "a dog"),
        *("--seeds", "0-1", "--dtype", dtype, "--device", "cpu", "--outdir", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    assert [line["finite"] for line in records(tmp_path / "out")] == [not overflows] * 2
    said = "2 of 2 images are not finite: the decoder overflowed in float16; use --dtype bfloat16 or float32"
    assert (said in result.output) == overflows


LINE_BREAKS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # for str.splitlines


def test_what_a_prompt_holds_is_read_back_from_the_record(pipeline, tmp_path):
    prompts = [f"a dog{character}a cat" for character in LINE_BREAKS]
    told = [word for prompt in prompts for word in ("--prompt", prompt)]
    asked = ("--model_path", pipeline, "--solver", "ddim", "--num-steps", "2", "--seeds", "0", "--outdir", tmp_path)
    result = run(*asked, *told)
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "images.jsonl").read_text(encoding="utf-8").splitlines()) == len(prompts)
    assert [prompt for _, prompt in read_records(tmp_path)] == prompts
    assert [Image.open(file).text["prompt"] for file, _ in read_records(tmp_path)] == prompts


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.output


CLASSICAL = ("--model_path", "shapes", "--solver", "ddim", "--num-steps", "3", "--prompt", "a dog")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a dog"), "--predictor_path is missing"),
        (("--prompt", "a dog", "--solver", "epd"), "--predictor_path is missing"),
        (("--prompt", "a dog", "--solver", "rk4"), "unknown solver 'rk4'; known are epd, ddim, heun"),
        (("--prompt", "a dog", "--solver", "ddim:2"), "ddim has no order"),
        (("--prompt", "a dog", "--solver", "dpmpp:4"), "the orders of dpmpp are 1, 2, 3"),
        (("--prompt", "a dog", "--solver", "ddim"), "--num-steps is missing"),
        (("--prompt", "a dog", "--solver", "ddim", "--num-steps", "3"), "--model_path is missing"),
        (("--prompt", "a dog", "--solver", "ddim", "--num-steps", "1"), "--num-steps"),
        ((*CLASSICAL, "--model_path", "shaps"), "Did you mean shapes?"),
        ((*CLASSICAL, "--schedule", "cosine"), "unknown schedule 'cosine'; known are polynomial"),
        ((*CLASSICAL, "--schedule", "logsnr:2"), "logsnr has no exponent rho"),
        ((*CLASSICAL, "--schedule", "discrete:x"), "write a number"),
        ((*CLASSICAL, "--schedule", "discrete:-1"), "positive and finite"),
        ((*CLASSICAL, "--schedule", "discrete@"), "the first noise level is ''; write a number, discrete@5"),
        ((*CLASSICAL, "--schedule", "polynomial:4@0"), "the first noise level is 0; it must be positive and finite"),
        ((*CLASSICAL[:-1], "a circle", "--schedule", "discrete@20"), "own sigma_max = 14.6146; got 20"),
        ((*CLASSICAL, "--seeds", "3-0"), "runs backwards"),
        ((*CLASSICAL, "--seeds", "0-400", "--grid"), "at most 400 images"),
        ((*CLASSICAL, "--device", "tpu"), "Unknown device 'tpu'"),
        ((*CLASSICAL, "--dtype", "int8"), "int8"),
        ((*CLASSICAL, "--color", "red"), "No such option"),
        ((*CLASSICAL, "--prompt-file", "none.csv"), "none.csv: there is no such prompt file"),
        (("--solver", "ddim", "--num-steps", "3", "--model_path", "shapes"), "nothing to draw"),
        (("--prompt", "a dog", "--predictor_path", "77"), "experiment 77: no folder"),
        (("--prompt", "a dog", "--predictor_path", "none.pkl"), "no such snapshot"),
    ],
)
def test_bad_input_gets_one_clear_message(arguments, message, tmp_path):
    assert message in " ".join(refused(*arguments, "--outdir", tmp_path / "out").split())
    assert not (tmp_path / "out").exists()


def test_a_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "prompts.csv").write_text("text\n")
    output = refused("--solver", "ddim", "--num-steps", "3", "--prompt-file", tmp_path / "prompts.csv")
    assert "holds no prompt" in output


def test_what_contradicts_the_predictor_is_refused(pipeline, predictor, tmp_path):
    common = (
        "--predictor_path",
        predictor,
        "--model_path",
        pipeline,
        "--prompt",
        "a dog",
        "--outdir",
        tmp_path / "out",
    )
    assert "whose table has 3 grid points" in refused(*common, "--num-steps", "4")
    assert "--solver heun takes no predictor" in refused(*common, "--solver", "heun")
    plain = save_snapshot(tmp_path / "network-snapshot-1", TABLE, {**METADATA, "afs": False})
    assert "--afs contradicts" in refused("--predictor_path", plain, "--prompt", "a dog", "--afs")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"dataset_name": None}, "does not say its dataset_name"),
        ({"dataset_name": "cifar10"}, "Model 'cifar10' is neither"),
        ({"dataset_name": 3}, "dataset_name is 3; it must be a text"),
        ({"sampler_stu": "heun"}, "only tables of the solver epd"),
        ({"sampler_stu": "ipndm", "max_order": 5}, "the orders of ipndm are 1, 2, 3, 4"),
        ({"backend": "sd3"}, "python -m models.assets fetch sd3"),
        ({"guidance_type": "uncond", "guidance_rate": 0.0}, "was made for an unconditional model"),
    ],
)
def test_a_predictor_that_cannot_be_used_is_refused(tmp_path, metadata, message):
    file = save_snapshot(tmp_path / "network-snapshot-1", TABLE, {**METADATA, **metadata})
    assert message in refused("--predictor_path", file, "--prompt", "a dog", "--outdir", tmp_path / "out")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"schedule_type": None}, "does not say its schedule_type"),
        ({"schedule_type": "cosine"}, "schedule_type is 'cosine'; known are"),
        ({"schedule_rho": "seven"}, "schedule_rho is 'seven'; it must be a number"),
        ({"schedule_rho": -1.0}, "rho must be positive"),
        ({"afs": "yes"}, "afs is 'yes'"),
        ({"backend": "flux"}, "was made for a model of the family flux"),
        ({"sigmas": [80.0, 3.0, 0.5]}, "its noise levels go from 80 to 0.5, those of "),
        ({"sigmas": [14.0, 3.0, 0.001]}, "its noise levels go from 14 to 0.001, those of "),
    ],
)
def test_a_predictor_whose_settings_make_no_sense_is_refused(pipeline, tmp_path, metadata, message):
    file = save_snapshot(tmp_path / "network-snapshot-1", TABLE, {**METADATA, **metadata})
    output = refused(
        "--predictor_path", file, "--model_path", pipeline, "--prompt", "a dog", "--outdir", tmp_path / "o"
    )
    assert message in output
    assert str(file.with_suffix("")) in output


def test_a_public_table_for_ipndm_runs_with_its_plug_in(pipeline, tmp_path):
    file = save_snapshot(
        tmp_path / "network-snapshot-1", TABLE, {**METADATA, "sampler_stu": "ipndm", "max_order": 2, "afs": False}
    )
    outcome = run("--predictor_path", file, "--model_path", pipeline, "--prompt", "a dog", "--seeds", "5",
                  "--outdir", tmp_path / "out")  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    denoiser = load_denoiser(pipeline, device="cpu", dtype=torch.float32)
    sigmas = get_schedule("time_uniform", 3, denoiser.sigma_min, denoiser.sigma_max, rho=2.0)
    table = with_ipndm_history(TABLE, 2)
    latents = latents_by_hand(
        denoiser, ["a dog"], [5], lambda d, x, levels: epd_sampler(d, x, levels, table), sigmas, 3.0
    )
    (image,) = pixels(tmp_path / "out").values()
    np.testing.assert_array_equal(image, to_pixels(denoiser.decode(latents))[0])


def test_a_predictor_with_a_payload_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "trace"

    class Payload:
        def __reduce__(self):
            return Path.touch, (trace,)

    file = tmp_path / "network-snapshot-1.pkl"
    file.write_bytes(pickle.dumps({"model": Payload()}))
    assert "refused" in refused("--predictor_path", file, "--prompt", "a dog")
    assert not trace.exists()


def test_prompts_that_the_model_cannot_take_are_refused(pipeline, tmp_path):
    arguments = ("--model_path", pipeline, "--solver", "ddim", "--num-steps", "3", "--outdir", tmp_path / "out")
    assert "it is empty" in refused(*arguments, "--prompt", " ")
    assert "tokens long" in refused(*arguments, "--prompt", "x" * 60)
    assert not (tmp_path / "out").exists()


def test_the_examples_of_the_help_are_understood(tmp_path):
    help_text = run("--help").output
    examples = [line.strip() for line in help_text.splitlines() if line.strip().startswith("python sample.py")]
    assert len(examples) == 2
    for example in examples:
        sample.main.make_context("sample.py", shlex.split(example)[2:])


@pytest.mark.skipif(not Path("src/shapes/unet").exists(), reason="the shapes weights are not there")
def test_the_first_example_of_the_help_runs(tmp_path):
    example = next(line for line in run("--help").output.splitlines() if "--model_path shapes" in line)
    result = run(*shlex.split(example)[2:], "--seeds", "0", "--outdir", tmp_path)
    assert result.exit_code == 0, result.output
    assert next(iter(pixels(tmp_path).values())).shape == (64, 64, 3)
    assert "colour" not in result.output
    refusal = refused("--model_path", "shapes", "--solver", "ddim", "--num-steps", "3", "--prompt", "a plaid zebra")
    assert "plaid, zebra" in refusal


def test_on_cuda_the_network_is_in_the_half_precision_that_the_solver_was_tuned_in(pipeline, predictor, tmp_path):
    cuda, usual = torch.device("cuda"), load_solver(predictor)
    file = save_snapshot(tmp_path / "network-snapshot-000001", TABLE, {**METADATA, "network_dtype": "bfloat16"})
    tuned = load_solver(file)
    said = []

    def dtype_for(model, *solvers, device=cuda):
        return network_dtype(None, model, device, solvers, said.append)

    told = {
        "float16, usual": (usual,),
        "bfloat16, as the solver was tuned in": (tuned, tuned),
        "float16, usual on": (tuned, usual),
    }
    for says, solvers in told.items():
        dtype = dtype_for(pipeline, *solvers)
        assert says in said.pop()
        assert says.startswith(str(dtype).removeprefix("torch."))
    assert dtype_for(pipeline, tuned, device=torch.device("cpu")) == torch.float32
    assert not said
    flux = save_tiny_family("flux", tmp_path / "flux")
    assert dtype_for(flux) == torch.bfloat16
    sd3 = save_tiny_family("sd3", tmp_path / "sd3")
    assert dtype_for(sd3) == torch.float16
    (weights,) = (sd3 / "transformer").glob("*.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    assert dtype_for(sd3) == torch.bfloat16
    broken = save_snapshot(tmp_path / "broken-000001", TABLE, {**METADATA, "network_dtype": "half"})
    with pytest.raises(InputError, match="network_dtype is 'half'; known are float32, "):
        load_solver(broken)


def test_the_network_is_compiled_for_the_rows_of_the_batch_alone(pipeline, predictor, tmp_path, monkeypatch):
    compiled = []

    def compile_network(denoiser, rows):
        compiled.append(rows)
        plain(denoiser, rows, backend="eager")

    plain = Backbone.compile_network
    monkeypatch.setattr(Backbone, "compile_network", compile_network)
    drawing = ["--predictor_path", predictor, "--model_path", pipeline, "--prompt", "a dog", "--batch", 2]
    for folder, options in (("compiled", ["--compile"]), ("plain", [])):
        result = run(*drawing, "--seeds", "0-2", "--outdir", tmp_path / folder, *options)
        assert result.exit_code == 0, result.output
    assert compiled == [{4, 8}]
    for name, image in pixels(tmp_path / "plain").items():
        assert np.abs(image.astype(int) - pixels(tmp_path / "compiled")[name]).max() <= 1


def test_an_unconditional_model_is_drawn_without_a_prompt(tmp_path):
    folder = save_tiny_family("ddpm", tmp_path / "cats")
    asked = ("--model_path", folder, "--solver", "ddim", "--num-steps", "4", "--seeds", "0-2")
    result = run(*asked, "--outdir", tmp_path / "images")
    assert result.exit_code == 0, result.output
    assert "3 evaluations in sequence, 3 in all, 3 network rows" in result.output
    assert [record["prompt"] for record in records(tmp_path / "images")] == [""] * 3
    assert {image.shape for image in pixels(tmp_path / "images").values()} == {(8, 8, 3)}
    for more, says in (
        (("--prompt", "a cat"), "Model cats is unconditional and takes no prompt: leave 'a cat' out."),
        (("--guidance", "3"), "Model cats has no guidance: its guidance scale must be 1 everywhere."),
    ):
        refused = run(*asked, *more, "--outdir", tmp_path / "more")
        assert (refused.exit_code, refused.output) == (2, f"Error: {says}\n")
        assert not (tmp_path / "more").exists()


def test_how_a_model_is_to_be_loaded_is_asked_for_or_taken_from_the_predictor(tmp_path):
    folder = save_tiny_family("sd3", tmp_path / "model")
    options = {"height": 24, "negative_prompt": "a cat", "without_t5": True}
    metadata = {**METADATA, "schedule_type": "flowmatch", "afs": False, "model_options": options}
    predictor = save_snapshot(tmp_path / "network-snapshot-000001", TABLE, metadata)
    drawing = ("--model_path", folder, "--prompt", "a dog", "--seeds", "0")
    table = ("--predictor_path", predictor)
    asked = ("--height", 24, "--negative-prompt", "a cat", "--without-t5")
    for name, arguments in {
        "taken": table,
        "asked": (*table, *asked),
        "changed": (*table, "--width", "24"),
        "classical": ("--solver", "ddim", "--num-steps", "3", *asked),
    }.items():
        result = run(*drawing, *arguments, "--outdir", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert ("width=24 overrides how the predictor's model was loaded, height=24" in result.output) == (
            name == "changed"
        )
    drawn = {name: next(iter(pixels(tmp_path / name).values())) for name in ("taken", "asked", "changed", "classical")}
    assert np.array_equal(drawn["taken"], drawn["asked"])
    assert [drawn[name].shape for name in drawn] == [(24, 16, 3), (24, 16, 3), (16, 24, 3), (24, 16, 3)]
    assert [records(tmp_path / name)[0]["model_options"] for name in drawn] == [
        options,
        options,
        {"width": 24},
        options,
    ]
    plain = run(*drawing, "--solver", "ddim", "--num-steps", "3", "--outdir", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    assert records(tmp_path / "plain")[0]["model_options"] is None
    refused = run(*drawing, "--solver", "ddim", "--num-steps", "3", "--lora", "none.safetensors:2")
    assert (refused.exit_code, refused.output) == (2, "Error: LoRA none.safetensors: there is no such file\n")
