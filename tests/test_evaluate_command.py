"""evaluate.py on a tiny pipeline with a tiny reward: the numbers, what is kept, explosions, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

import evaluate
from errors import InputError
from files import only_writer
from models import clip, load_denoiser
from models.families.stable_diffusion import StableDiffusion
from models.generate import LATENT_LIMIT
from models.inception import Inception
from models.registry import SHAPES_WORLD
from models.shapes.scenes import captions
from schedules import get_schedule
from solvers import SAMPLERS, EPDTable
from tests.by_hand import latents_by_hand
from tests.plain_clip import write_letter_tokenizer
from tests.test_distances import scipy_frechet
from tests.tiny_inception import put_extractors
from tests.tiny_pipeline import save_tiny_pipeline, widen_decoder
from training.measuring.protocol import FOLDER, load_protocol
from training.ppo import panels
from training.ppo.rewards.reward_hps import RewardHPS
from training.snapshot import save_snapshot

PROMPTS = ["a dog", "a cat", "a red cow", "two owls", "one bee", "my ant"]
CLIP = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 55, "width": 16, "heads": 2, "layers": 1},
}
TABLE = EPDTable(
    torch.tensor([[0.3, 0.7], [0.4, 0.8]], dtype=torch.float64),
    torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64),
)
METADATA = {
    "dataset_name": "elsewhere",
    "guidance_type": "cfg",
    "guidance_rate": 3.0,
    "schedule_type": "discrete",
    "schedule_rho": 1.0,
}


STEPS = 12  # of the reference: the true 200 take too long for a test


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pipeline, reward, prompts, predictor: everything that the command reads."""
    root = tmp_path_factory.mktemp("world")
    save_tiny_pipeline(root / "pipeline")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        clip.save_open_clip_checkpoint(clip.new_clip(CLIP), root / "reward.pt")
    write_letter_tokenizer(root / "tokenizer")
    (root / "reward.json").write_text(json.dumps({"model_cfg": CLIP, "tokenizer": "tokenizer"}))
    (root / "prompts.csv").write_text("id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(PROMPTS)))
    save_snapshot(root / "exps" / "00002-tiny" / "network-snapshot-000001", TABLE, METADATA)
    return root


def run(world, outdir, *arguments, cache=None, base=("--solvers", "ddim,heun,dpmpp:2", "--nfe", "2,4")):
    usual = {"--reward": world / "reward.pt", "--prompt-file": world / "prompts.csv"}
    files = [part for option, file in usual.items() if option not in arguments for part in (option, file)]
    return CliRunner().invoke(
        evaluate.main,
        [
            str(argument)
            for argument in (
                *("--device", "cpu", "--model", world / "pipeline", "--exps", world / "exps", *files),
                *("--number", 6, "--seed", 3, "--batch", 4, "--guidance", 3),
                *("--schedules", "discrete,logsnr", "--outdir", outdir, "--cache", cache or outdir / "cache"),
                *("--reference-steps", STEPS),
                *(*base, *arguments),
            )
        ],
    )


WITH_EPD = ("--solvers", "epd,ddim,heun,dpmpp:2", "--nfe", "2,4", "--predictor_path", "2", "--baseline", "ddim@4")


@pytest.fixture(scope="module")
def evaluated(world):
    """The folder and the printed lines of one whole evaluation."""
    result = run(world, world / "out", base=WITH_EPD)
    assert result.exit_code == 0, result.output
    return world / "out", result.output


def results(folder):
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def test_the_tables_fit_a_terminal_and_say_what_the_report_says(evaluated):
    folder, printed = evaluated
    tables = printed[printed.index("\nsolver ") : printed.index("\nwrote ")].splitlines()
    assert max(map(len, tables)) <= 100
    assert "[low, high] is a 95% interval over prompts." in tables[-2]
    assert f"all of it on one page: {folder / 'index.html'}\n" in printed
    cells = {cell for line in tables for cell in re.split(r" {2,}", line.strip())}
    rows = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith(("| epd", "| heun"))]
    assert len(rows) >= 4
    assert all(set(filter(None, map(str.strip, row.split("|")))) <= cells for row in rows)


def test_the_numbers_are_those_of_the_definitions(world, evaluated):
    folder, _ = evaluated
    denoiser = load_denoiser(world / "pipeline", device="cpu", dtype=torch.float32)

    def latents(solver, steps, schedule, **options):
        low, high = denoiser.sigma_min, denoiser.sigma_max
        sigmas = get_schedule(schedule, steps + 1, low, high, rho=1.0, denoiser=denoiser)

        def solve(denoise, x, levels):
            return SAMPLERS[solver](denoise, x, levels, **options)

        return latents_by_hand(denoiser, PROMPTS, range(3, 9), solve, sigmas, 3.0)

    reference, fast = latents("dpmpp", STEPS, "discrete", max_order=2), latents("heun", 2, "logsnr")
    with torch.no_grad():
        images, true = denoiser.decode(fast), denoiser.decode(reference)
    expected = {
        "latent_rms": (fast - reference).square().mean(dim=(1, 2, 3)).sqrt().mean(),
        "pixel_rms": ((images * 255).round() - (true * 255).round()).square().mean(dim=(1, 2, 3)).sqrt().mean() / 255,
        "reward": RewardHPS(world / "reward.pt").score(images, PROMPTS).mean(),
    }
    for metric, value in expected.items():
        (line,) = [
            line
            for line in results(folder)
            if (line["label"], line["schedule"], line["num_steps"], line["metric"]) == ("heun", "logsnr", "3", metric)
        ]
        assert float(line["estimate"]) == pytest.approx(float(value), rel=1e-4)
        assert line["parallel_evaluations"] == line["total_evaluations"] == "4"


def test_every_solver_is_there_with_its_counts(evaluated):
    folder, _ = evaluated
    counted = {
        (line["label"], line["parallel_evaluations"], line["total_evaluations"], line["num_steps"])
        for line in results(folder)
    }
    assert counted == {
        ("epd-00002", "4", "6", "3"),
        *(("ddim", n, n, str(int(n) + 1)) for n in "24"),
        *(("heun", n, n, str(int(n) // 2 + 1)) for n in "24"),
        *(("dpmpp:2", n, n, str(int(n) + 1)) for n in "24"),
    }
    assert {line["metric"] for line in results(folder)} == {"reward", "frechet", "latent_rms", "pixel_rms"}
    report = (folder / "report.md").read_text()
    assert "| epd-00002 | 4 | 6 |" in report
    assert "## Paired differences to ddim@4" in report
    content = json.loads((folder / "results.json").read_text())
    assert content["settings"]["guidance"] == 3.0
    assert re.match(r"[0-9a-f]{40}(, and changes since)?$|no git", content["settings"]["commit"])
    assert content["reference"]["latent_rms"]["estimate"] == 0
    assert {path.name for path in folder.glob("*.png")} == {"metrics.png", "grid-nfe02.png", "grid-nfe04.png"}
    assert np.array(Image.open(folder / "grid-nfe04.png")).std() > 1


def test_the_bar_counts_what_the_network_is_asked_and_names_what_is_sampled(evaluated):
    _, output = evaluated
    for name in ("reference", "ddim logsnr, NFE 2", "epd-00002 discrete, NFE 4"):
        assert name in output
    done, expected = re.findall(r"(\d+)/(\d+) \[", output)[-1]
    assert done == expected
    # Of 6 prompts each: the reference, the table's 6, and three solvers with 2 and 4 evaluations at two schedules.
    assert int(expected) == 6 * (STEPS + 6 + 3 * 2 * (2 + 4))


def test_another_judge_needs_no_sampling(world, evaluated, tmp_path, monkeypatch):
    folder, _ = evaluated
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        clip.save_open_clip_checkpoint(clip.new_clip(CLIP), tmp_path / "reward.pt")
    (tmp_path / "tokenizer").symlink_to(world / "tokenizer")
    (tmp_path / "reward.json").symlink_to(world / "reward.json")
    monkeypatch.setattr(StableDiffusion, "denoise", None)
    result = run(
        world, tmp_path / "out", *WITH_EPD, "--reward", tmp_path / "reward.pt", cache=folder / "cache", base=()
    )
    assert result.exit_code == 0, result.output
    rewards = [
        [float(line["estimate"]) for line in results(where) if line["metric"] == "reward"]
        for where in (folder, tmp_path / "out")
    ]
    assert len(rewards[0]) == len(rewards[1])
    assert rewards[0] != pytest.approx(rewards[1], rel=1e-3)


def test_a_second_call_asks_the_model_nothing_and_finds_the_same(world, evaluated, monkeypatch):
    folder, _ = evaluated
    before = (folder / "results.csv").read_text()
    monkeypatch.setattr(StableDiffusion, "denoise", None)
    monkeypatch.setattr(RewardHPS, "image_features", None)
    result = run(world, world / "again", base=WITH_EPD, cache=folder / "cache")
    assert result.exit_code == 0, result.output
    assert (world / "again" / "results.csv").read_text() == before


@pytest.fixture
def calls(monkeypatch):
    """One entry for each time that the network is asked from now on."""
    calls = []
    denoise = StableDiffusion.denoise
    monkeypatch.setattr(StableDiffusion, "denoise", lambda *a, **k: (calls.append(1), denoise(*a, **k))[1])
    return calls


DDIM_2 = ("--solvers", "ddim", "--nfe", "2")
CALLS_OF_DDIM_2 = 2 * STEPS + 2 * 2 * 2  # two batches: the reference, and 2 evaluations at 2 schedules


def test_another_number_type_of_the_network_is_another_model(world, evaluated, tmp_path, calls):
    result = run(world, tmp_path, *DDIM_2, "--dtype", "bfloat16", cache=evaluated[0] / "cache")
    assert result.exit_code == 0, result.output
    assert len(calls) == CALLS_OF_DDIM_2
    rewards = [
        {
            line["schedule"]: float(line["estimate"])
            for line in results(folder)
            if (line["label"], line["num_steps"], line["metric"]) == ("ddim", "3", "reward")
        }
        for folder in (evaluated[0], tmp_path)
    ]
    assert rewards[0].keys() == rewards[1].keys()
    assert rewards[0] != rewards[1]


def test_what_a_backbone_names_as_its_code_counts(world, evaluated, tmp_path, calls, monkeypatch):
    (tmp_path / "backbone.py").write_text("changed")
    monkeypatch.setattr(StableDiffusion, "code", (tmp_path / "backbone.py",))
    for _ in range(2):
        result = run(world, tmp_path / "out", *DDIM_2, cache=evaluated[0] / "cache")
        assert result.exit_code == 0, result.output
    assert len(calls) == CALLS_OF_DDIM_2


def test_only_what_is_new_is_computed(world, evaluated, calls):
    folder, _ = evaluated
    result = run(world, world / "more", "--nfe", "2,3", cache=folder / "cache")
    assert result.exit_code == 0, result.output
    # ddim and dpmpp:2 in 3 evaluations, at 2 schedules, in 2 batches; heun cannot, the reference is there.
    assert len(calls) == 2 * 2 * 2 * 3
    assert "left out: heun cannot spend exactly 3 evaluations" in result.output


def test_a_folder_that_another_process_reports_to_is_left_alone(world, tmp_path):
    with only_writer(tmp_path):
        assert "another process is writing to it" in refused(run(world, tmp_path, cache=world / "out" / "cache"))
    assert not list(tmp_path.iterdir())


def test_the_batch_changes_nothing(world, evaluated):
    result = run(world, world / "batch", "--batch", "6", "--solvers", "ddim", "--nfe", "2", cache=world / "fresh")
    assert result.exit_code == 0, result.output
    key = ("label", "num_steps", "schedule", "metric")
    before = {tuple(line[part] for part in key): float(line["estimate"]) for line in results(evaluated[0])}
    lines = results(world / "batch")
    assert len(lines) == 2 * 4
    for line in lines:
        same = before[tuple(line[part] for part in key)]
        assert float(line["estimate"]) == pytest.approx(
            same, rel=1e-3 if line["metric"] == "frechet" else 1e-4, abs=1e-6
        )


def test_other_weights_are_another_model(world, evaluated, tmp_path, calls):
    other = tmp_path / "world"
    other.mkdir()
    save_tiny_pipeline(other / "pipeline", seed=7)
    for name in ("reward.pt", "reward.json", "prompts.csv", "tokenizer", "exps"):
        (other / name).symlink_to(world / name)
    result = run(other, tmp_path / "out", *DDIM_2, cache=evaluated[0] / "cache")
    assert result.exit_code == 0, result.output
    assert len(calls) == CALLS_OF_DDIM_2


def test_explosions_are_counted_and_scored(world, tmp_path, monkeypatch):
    def exploding(denoise, x, sigmas, **_):
        rows = torch.arange(len(x))[:, None, None, None]
        wild = torch.where(rows == 0, torch.nan, torch.where(rows == 1, torch.inf, 10 * LATENT_LIMIT))
        return torch.where(rows < 3, wild, denoise(x, sigmas[0]))

    monkeypatch.setitem(SAMPLERS, "ddim", exploding)
    result = run(world, tmp_path, "--solvers", "ddim", "--nfe", "2", "--batch", "6")
    assert result.exit_code == 0, result.output
    lines = results(tmp_path)
    assert {line["exploded"] for line in lines} == {"3"}
    assert all(np.isfinite(float(line["estimate"])) for line in lines)
    assert max(float(line["estimate"]) for line in lines if line["metric"] == "latent_rms") > LATENT_LIMIT / 4
    assert "  3/6\n" in result.output


def test_images_that_the_decoder_loses_are_counted_as_exploded(world, tmp_path):
    (tmp_path / "world").mkdir()
    widen_decoder(save_tiny_pipeline(tmp_path / "world" / "pipeline"))
    for name in ("reward.pt", "reward.json", "prompts.csv", "tokenizer", "exps"):
        (tmp_path / "world" / name).symlink_to(world / name)
    for dtype, count in (("float16", "6"), ("bfloat16", "0")):
        result = run(tmp_path / "world", tmp_path / dtype, "--solvers", "ddim", "--nfe", "2", "--dtype", dtype)
        assert result.exit_code == 0, result.output
        assert {line["exploded"] for line in results(tmp_path / dtype)} == {count}


def test_predictors_are_found_by_their_model(world, tmp_path):
    exps = tmp_path / "exps"
    here = {**METADATA, "dataset_name": str(world / "pipeline")}
    save_snapshot(exps / "00000-ours" / "network-snapshot-1", TABLE, here)
    save_snapshot(exps / "00001-other" / "network-snapshot-1", TABLE, METADATA)
    save_snapshot(exps / "00002-guided" / "network-snapshot-1", TABLE, {**here, "guidance_rate": 5.0})
    save_snapshot(exps / "00003-afs" / "network-snapshot-1", TABLE, {**here, "afs": True})
    (exps / "00004-broken").mkdir()
    (exps / "00004-broken" / "network-snapshot-1.pkl").write_bytes(b"\x80\x04")
    result = run(world, tmp_path / "out", "--exps", exps, "--solvers", "epd,ddim", "--nfe", "4")
    assert result.exit_code == 0, result.output
    guided = {line["label"]: line["guidance"] for line in results(tmp_path / "out")}
    assert guided == {"epd-00000": "3.0", "epd-00002": "5.0", "ddim": "3.0"}
    (said,) = [line for line in result.output.splitlines() if line.startswith("left out in")]
    for reason in ("epd-00003 (takes 3 parallel", "00004-broken (no table that can be read)"):
        assert reason in said
    assert "other" not in said


def test_schedule_and_guidance_are_chosen_on_other_prompts(world, tmp_path):
    """Each metric stands at the setting that is best for it there, whatever is best on the prompts that are scored."""
    options = ("--guidances", "1,3,9", "--solvers", "ddim", "--nfe", "2")
    (tmp_path / "validation.txt").write_text("\n".join(PROMPTS[3:]))
    everywhere = run(world, tmp_path / "all", *options, "--prompt-file", tmp_path / "validation.txt", "--number", 3)
    assert everywhere.exit_code == 0, everywhere.output
    tried = results(tmp_path / "all")
    assert {(line["schedule"], line["guidance"]) for line in tried} == {
        (schedule, scale) for schedule in ("discrete", "logsnr") for scale in ("1.0", "3.0", "9.0")
    }
    validated = run(
        world, tmp_path / "out", *options, "--validation-file", tmp_path / "validation.txt", "--validation-number", 3
    )
    assert validated.exit_code == 0, validated.output
    assert "6 settings of classical solvers on 3 prompts" in validated.output
    best = {line["metric"]: (line["schedule"], line["guidance"]) for line in tried if line["best"] == "True"}
    best = {"reward": best["reward"]}  # what needs a reference is not measured there
    chosen = {
        line["metric"]: (line["schedule"], line["guidance"])
        for line in results(tmp_path / "out") if line["metric"] == "reward"
    }  # fmt: skip
    assert chosen == best
    report = (tmp_path / "out" / "report.md").read_text()
    assert "that are best for it on the validation prompts (not measured there: Fréchet distance, latent RMS" in report
    assert "seeds 3 to 5; 3 of these prompts are scored, too" in report
    assert "3 of these prompts are scored, too, which favours the classical solvers" in validated.output


def test_a_baseline_at_equal_total_evaluations_is_measured(world, tmp_path):
    base = ("--solvers", "epd,ddim", "--nfe", "4", "--predictor_path", "2")
    result = run(world, tmp_path / "out", base=base)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    against = {
        (item["baseline"], item["baseline_entry"]["total_evaluations"])
        for item in content["differences"] if item["label"] == "epd-00002"
    }  # fmt: skip
    assert against == {("classical", 4), ("classical@total", 6)}
    named = run(world, tmp_path / "named", "--baseline", "ddim@total", base=base, cache=tmp_path / "out" / "cache")
    assert named.exit_code == 0, named.output
    differences = json.loads((tmp_path / "named" / "results.json").read_text())["differences"]
    assert {item["baseline_entry"]["total_evaluations"] for item in differences if item["label"] == "epd-00002"} == {6}


def refused(result):
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--solvers", "ddim,euler"), "unknown solver 'euler'; known are epd, ddim"),
        (("--solvers", "ddim,"), "--solvers 'ddim,': an entry is empty"),
        (("--solvers", "heun:2"), "heun has no order"),
        (("--nfe", "4,x"), "--nfe '4,x': write numbers"),
        (("--nfe", "0"), "--nfe '0': write numbers"),
        (("--solvers", "heun", "--nfe", "3"), "nothing to compare"),
        (("--schedules", "cosine"), "unknown schedule 'cosine'"),
        (("--schedules", "polynomial:0"), "must be positive"),
        (("--baseline", "ipndm"), "baseline 'ipndm'"),
        (("--baseline", "ddim@9"), "ddim is not compared at 9 evaluations: add 9 to --nfe"),
        (("--number", "7"), "has 6 different prompts, --number 7 asks for more"),
        (("--number", "1"), "--number"),
        (("--guidance", "nan"), "guidance"),
        (("--model", "shaps"), "Did you mean shapes?"),
        (("--reward", "none.pt"), "none.pt"),
        (("--prompt-file", "none.csv"), "none.csv: there is no such prompt file"),
        (("--predictor_path", "2"), "--solvers has no epd"),
        (("--solvers", "epd", "--predictor_path", "9"), "experiment 9: no folder"),
        (("--solvers", "epd", "--predictor_path", "2", "--nfe", "6"), "add 4 to --nfe"),
        (("--guidances", "1,x"), "--guidances '1,x': write numbers"),
        (("--guidances", "1,-2"), "--guidances '1,-2': every scale must be at least 0"),
        (("--validation-file", "none.csv"), "none.csv: there is no such prompt file"),
        (
            ("--solvers", "epd", "--predictor_path", "2", "--predictor_path", "2"),
            "several predictors are called epd-00002",
        ),
    ],
)
def test_bad_input_gets_one_clear_message(world, tmp_path, arguments, message):
    assert message in refused(run(world, tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


def test_prompts_that_the_model_cannot_take_are_refused(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:5], "x" * 60]))
    assert "tokens long" in refused(run(world, tmp_path / "out", "--prompt-file", tmp_path / "prompts.txt"))


@pytest.mark.parametrize("model", SHAPES_WORLD)
def test_what_the_verifier_cannot_judge_is_refused_before_anything_is_drawn(model, world):
    with pytest.raises(InputError, match="'a red' is no caption"):
        panels.judges_of(model, [world / "reward.pt"], None, [*captions("heldout", 2, 0), "a red"], 4)


def test_prompts_that_the_reward_cuts_are_said(world, tmp_path, caplog):
    short = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "context_length": 5}}
    clip.save_open_clip_checkpoint(clip.new_clip(short), tmp_path / "short.pt")
    (tmp_path / "short.json").write_text(json.dumps({"model_cfg": short, "tokenizer": str(world / "tokenizer")}))
    result = run(world, tmp_path / "out", "--reward", tmp_path / "short.pt", *DDIM_2)
    assert result.exit_code == 0, result.output
    said = [record.getMessage() for record in caplog.records]
    assert "reward short reads 3 tokens of a prompt: 6 of 6 prompts are longer and judged by these" in said
    assert any(one.startswith("reward short was taught no word of 6 of 6 prompts") for one in said)
    assert len(said) == 2


def test_true_images_of_shapes_pass_the_verifier_and_depend_on_their_own_seed_only():
    prompts = list(captions("heldout", 3, 0))
    images = panels.true_images(prompts, 11)
    assert images.shape == (3, 3, 64, 64)
    judge = panels.VerifierJudge()
    said = judge.judge(images, prompts)
    assert said["verifier"].tolist() == said["verified"].tolist() == [1, 1, 1]
    assert torch.equal(panels.true_images(prompts[:2], 11), images[:2])
    assert torch.equal(panels.true_images(prompts[1:], 11, 1), images[1:])
    wrong = judge.judge(torch.zeros(1, 3, 64, 64), prompts[:1])
    assert wrong["verified"] == 0
    assert wrong["verifier"] < 0.5


def test_the_examples_of_the_help_are_understood():
    help_text = CliRunner().invoke(evaluate.main, ["--help"]).output
    examples = [line.strip() for line in help_text.splitlines() if line.strip().startswith("python evaluate.py")]
    assert len(examples) == 4
    for example in examples:
        evaluate.main.make_context("evaluate.py", shlex.split(example)[2:])


@pytest.mark.skipif(
    not (Path("src/shapes/unet").exists() and evaluate.SHAPES_REWARD.exists()),
    reason="the shapes weights are not there",
)
def test_the_world_of_shapes_is_evaluated_with_its_verifier(tmp_path):
    result = CliRunner().invoke(
        evaluate.main,
        [
            *("--protocol", "shapes", "--solvers", "dpmpp:2", "--nfe", "20", "--schedules", "discrete"),
            *("--number", "4", "--validation-number", "2", "--guidances", "2,3", "--reference-steps", "20"),
            *("--outdir", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")),
        ],
    )
    assert result.exit_code == 0, result.output
    values = {line["metric"]: float(line["estimate"]) for line in results(tmp_path / "out")}
    assert values.keys() == {"reward", "verifier", "verified", "frechet", "latent_rms", "pixel_rms"}
    assert values["verifier"] > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Real images, several rewards, protocols, dry runs, several processes


@pytest.fixture
def real_images(monkeypatch, tmp_path):
    """A folder of real images, with small networks in the place of InceptionV3 and CLIP."""
    put_extractors(monkeypatch, tmp_path / "root")
    folder = tmp_path / "real"
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_distances_to_real_images_and_further_rewards_have_columns_and_differences(world, tmp_path, real_images):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        clip.save_open_clip_checkpoint(clip.new_clip(CLIP), tmp_path / "second.pt")
    (tmp_path / "second.json").write_text(json.dumps({"model_cfg": CLIP, "tokenizer": str(world / "tokenizer")}))
    result = run(
        world,
        tmp_path / "out",
        *("--solvers", "ddim,heun", "--nfe", "2", "--schedules", "discrete"),
        *("--reward", world / "reward.pt", "--reward", tmp_path / "second.pt"),
        *("--real", real_images, "--distances", "fid,kid,cmmd", "--resize", "legacy", "--baseline", "ddim"),
        *("--images", "--tell", "0.001", "--reference-steps", "0"),
    )
    assert result.exit_code == 0, result.output
    metrics = ["reward", "second", "fid_legacy", "kid_legacy", "cmmd"]
    assert [line["metric"] for line in results(tmp_path / "out") if line["label"] == "ddim"] == metrics
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [item["metric"] for item in content["differences"] if item["baseline"] == "ddim"] == metrics
    drawn = sorted((tmp_path / "out" / "images").glob("heun*/*.png"))
    assert len(drawn) == 6
    seen, true = (
        torch.cat([Inception("cpu", "legacy").features(read_pixels(file)) for file in files]).double().numpy()
        for files in (drawn, sorted(real_images.iterdir()))
    )
    (fid,) = [line for line in results(tmp_path / "out") if (line["label"], line["metric"]) == ("heun", "fid_legacy")]
    assert float(fid["estimate"]) == pytest.approx(scipy_frechet(seen, true), rel=1e-4)
    (second,) = [line for line in results(tmp_path / "out") if (line["label"], line["metric"]) == ("heun", "second")]
    images = torch.cat([read_pixels(file).float() / 255 for file in drawn])
    expected = RewardHPS(tmp_path / "second.pt").score(images, PROMPTS).mean()
    assert float(second["estimate"]) == pytest.approx(float(expected), abs=5e-3)  # of images rounded to 8 bits
    for said in ("5 images of 5 sizes", "FID of 5 images, fewer than 2,048", "to tell 0.001 takes", "FID, legacy"):
        assert said in result.output
    assert "reference (" not in (tmp_path / "out" / "report.md").read_text()


def read_pixels(file):
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).movedim(-1, 0)[None]


def test_prompts_are_taken_as_they_stand_where_they_are_paired(world, tmp_path):
    (tmp_path / "twice.txt").write_text("a dog\na dog\na cat\n")
    told = ("--prompt-file", tmp_path / "twice.txt", "--number", "3", "--reference-steps", "0", *DDIM_2)
    assert "2 different prompts" in refused(run(world, tmp_path / "out", *told))
    result = run(world, tmp_path / "out", *told, "--pair", "--images")
    assert result.exit_code == 0, result.output
    log = next((tmp_path / "out" / "images").glob("ddim-discrete*")) / "images.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(record["prompt"], record["seed"]) for record in records] == [("a dog", 3), ("a dog", 4), ("a cat", 5)]


@pytest.mark.parametrize("second", ["second.txt", "first.txt"])
def test_several_prompt_files_have_a_table_each(world, tmp_path, second):
    paths = tmp_path / "first.json", tmp_path / second
    paths[0].write_text(json.dumps(PROMPTS[:3]))
    paths[1].write_text("\n".join(PROMPTS[3:]))
    files = ("--prompt-file", paths[0], "--prompt-file", paths[1])
    result = run(world, tmp_path / "out", *files, "--number", "3", "--reference-steps", "0", *DDIM_2)
    assert result.exit_code == 0, result.output
    assert "preference reward by prompts" in result.output
    report = (tmp_path / "out" / "report.md").read_text()
    (whole,) = [line for line in results(tmp_path / "out") if (line["metric"], line["best"]) == ("reward", "True")]
    (row,) = [
        line for line in report.partition("by prompts")[2].partition("##")[0].splitlines() if line.startswith("| ddim")
    ]
    means = [float(cell.split("[")[0]) for cell in row.split("|")[3:5]]
    assert sum(means) / 2 == pytest.approx(float(whole["estimate"]), abs=2e-4)


def protocol(folder, content):
    path = folder / "protocol.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_protocol_is_its_options_and_its_published_figures_stand_beside_ours(world, tmp_path):
    figure = {"solver": "ddim", "nfe": 2, "metric": "reward", "value": 0.125, "source": "a paper, table 9"}
    options = {"solvers": ["ddim", "heun"], "nfe": 2, "reference-steps": 0, "schedules": "discrete", "seed": 9}
    path = protocol(tmp_path, {"about": "for a test", "options": options, "published": [figure]})
    # `run` says seed and schedules itself, and the command line has the last word
    result = run(world, tmp_path / "out", "--protocol", path, base=())
    assert result.exit_code == 0, result.output
    assert {line["label"] for line in results(tmp_path / "out")} == {"ddim", "heun"}
    assert {line["parallel_evaluations"] for line in results(tmp_path / "out")} == {"2"}
    report = (tmp_path / "out" / "report.md").read_text()
    (row,) = [line for line in report.splitlines() if line.startswith("| ddim | 2 |") and "published" in line]
    assert "(published: 0.125)" in row
    assert "published: ddim at 2 parallel evaluations, preference reward 0.125 (a paper, table 9)" in result.output
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["published"] == [figure]
    assert content["settings"]["protocol"] == "protocol: for a test"
    assert "seeds 3 to 8" in content["settings"]["prompts"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"option": {}}, "unknown key option; did you mean options?"),
        ({"options": {"solver": "ddim"}}, "unknown key options.solver; did you mean solvers?"),
        ({"options": {"nfe": {"a": 1}}}, "options.nfe is {'a': '1'}; write a value, or a list"),
        ({"options": {"nfe": "x"}}, "--nfe 'x': write numbers"),
        ({"options": {"tell": "x"}}, "Invalid value for '--tell'"),
        ({"published": [{"solver": "ddim", "nfe": 2, "metric": "reward", "value": 1.0}]}, "figure 1 has no source"),
        (
            {"published": [{"solver": "ddim", "nfe": 2, "metric": "reward", "value": "x", "source": "s"}]},
            "value is 'x', not a number",
        ),
        (
            {"published": [{"solver": "ddim", "nfe": 2, "metric": "reward", "value": 1.0, "source": " "}]},
            "figure 1 has no source",
        ),
        ([], "it must be keys with values"),
    ],
)
def test_protocols_that_cannot_be_used_get_one_clear_message(world, tmp_path, content, message):
    result = run(world, tmp_path / "out", "--protocol", protocol(tmp_path, content), base=())
    assert message in refused(result)
    assert ("Usage:" in result.output) == message.startswith("Invalid value")  # which click says
    assert not (tmp_path / "out").exists()


NESTED = "[" * 9_000 + "]" * 9_000
REPEATED = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 0}]\n" for n in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"options: {{nfe: {NESTED}}}", "it is nested too deeply"),
        (f"options: {{nfe: {'9' * 5_000}}}", "--nfe '999"),
        (REPEATED + "options: {nfe: *a11}", "has too many entries"),
        ("options: {nfe: 2, nfe: 4}", "the key nfe is there twice"),
        ("options: {nfe: !!int x}", "not a readable YAML file"),
        (f"published: [{{solver: ddim, nfe: {'9' * 5_000}, metric: reward, value: 1, source: s}}]", "nfe is '999"),
        ("published: [{solver: [ddim], nfe: 2, metric: reward, value: 1, source: s}]", "solver is ['ddim'], not a"),
        (
            "published: [{solver: ddim, nfe: 2, metric: reward, value: .nan, source: s}]",
            "value is '.nan', not a number",
        ),
        ("#" * 100_000, "it has more than 32768 bytes"),
        ("options: {nfe: 0b11}", "--nfe '0b11': write numbers"),
    ],
)
def test_a_protocol_of_any_content_ends_in_one_message(tmp_path, text, message):
    (tmp_path / "protocol.yaml").write_text(text)
    result = CliRunner().invoke(evaluate.main, ["--protocol", str(tmp_path / "protocol.yaml"), "--dry-run"])
    assert message in refused(result)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_captions_of_shapes_are_no_prompts_of_another_model(world, tmp_path, more):
    asked = ("--model", str(world / "pipeline"), "--outdir", str(tmp_path / "out"), *more)
    said = refused(CliRunner().invoke(evaluate.main, asked))
    assert "--prompt-file is missing" in said
    assert not (tmp_path / "out").exists()


def test_a_value_in_a_protocol_means_what_was_typed(tmp_path):
    (tmp_path / "protocol.yaml").write_text("options: {seed: 0012, nfe: [010], number: 1_0, guidance: 1:30, pair: yes}")
    read = load_protocol(str(tmp_path / "protocol.yaml"), ["seed", "nfe", "number", "guidance", "pair"]).options
    assert read == {"seed": "0012", "nfe": ["010"], "number": "1_0", "guidance": "1:30", "pair": "yes"}


def test_a_protocol_that_is_not_there_is_told_with_those_that_are(world, tmp_path):
    assert "known are" in refused(run(world, tmp_path / "out", "--protocol", "coco"))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_the_protocols_of_the_project_are_counted_and_say_what_is_missing(name):
    result = CliRunner().invoke(evaluate.main, ["--protocol", name, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "network rows" in result.output
    assert "GPU hours" in result.output
    assert "on each of" not in result.output
    assert result.output.endswith("nothing was drawn\n")
    if name != "shapes" and not Path("src/ms_coco").exists():
        assert "python -m models.assets fetch sd15" in result.output


def test_a_dry_run_counts_what_is_then_asked(world, tmp_path):
    told = ("--solvers", "ddim,heun", "--nfe", "4", "--schedules", "discrete", "--reference-steps", "10")
    dry = run(world, tmp_path / "out", *told, "--dry-run", base=())
    assert dry.exit_code == 0, dry.output
    # guided: two rows an evaluation, of two solvers of 4 evaluations and the reference of 10, for 6 prompts
    assert f"in all {6 * 2 * (4 + 4 + 10)} network rows" in dry.output
    assert "every file is there" in dry.output
    assert "nothing was drawn" in dry.output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_baseline_at_as_many_evaluations_in_all_and_says_what_is_left_out(world, tmp_path):
    told = ("--nfe", "4", "--schedules", "discrete", "--reference-steps", "0", "--dry-run")
    dry = run(world, tmp_path / "out", *told, "--solvers", "epd,ddim", "--predictor_path", "2", base=())
    assert dry.exit_code == 0, dry.output
    # guided, for 6 prompts: the table's 6 in all, 4 one after another, and ddim in 4 and in 6
    assert f"in all {6 * 2 * (6 + 4 + 6)} network rows" in dry.output
    bare = run(world, tmp_path / "out", *told, "--solvers", "epd,ddim", base=())
    assert f"in all {6 * 2 * 4} network rows" in bare.output
    assert f"no predictor for {world / 'pipeline'} in" in bare.output


def test_a_dry_run_refuses_a_baseline_that_would_be_refused(world, tmp_path):
    said = refused(run(world, tmp_path / "out", "--nfe", "4", "--dry-run", "--baseline", "huen", base=()))
    assert "'huen' is not compared here" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--distances", "fid"), "name them with --real"),
        (("--real", "none.npz"), "no such statistics file"),
        (
            ("--real", "none.npz", "--distances", "fid,kid", "--resize", "legacy"),
            "scripts.image_statistics FOLDER --distances fid,kid --resize legacy --out none.npz",
        ),
        (("--real", "none.npz", "--distances", "fud"), "unknown distance 'fud'"),
        (("--num-devices", "0"), "--num-devices"),
        (("--tell", "0"), "--tell"),
    ],
)
def test_what_is_asked_of_real_images_and_scale_is_checked_first(world, tmp_path, arguments, message):
    assert message in refused(run(world, tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(world, tmp_path):
    told = [
        str(part) for part in ("--solvers", "ddim,heun", "--nfe", "2", "--reference-steps", "10", "--device", "cpu")
    ]
    alone = run(world, tmp_path / "one", *told, base=())
    assert alone.exit_code == 0, alone.output
    script = "import evaluate, training.measuring.evaluation as one; one.PART = 2; evaluate.main()"
    (tmp_path / "two.py").write_text(script)
    arguments = [
        *("--model", world / "pipeline", "--reward", world / "reward.pt", "--exps", world / "exps"),
        *("--prompt-file", world / "prompts.csv", "--number", 6, "--seed", 3, "--batch", 4, "--guidance", 3),
        *("--schedules", "discrete,logsnr", "--outdir", tmp_path / "two", "--cache", tmp_path / "cache"),
        *(*told, "--num-devices", 2),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, tmp_path / "two.py", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    expected, found = (
        {
            (line["label"], line["schedule"], line["metric"]): float(line["estimate"])
            for line in results(tmp_path / part)
        }
        for part in ("one", "two")
    )
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert done.stdout.count("taking intervals") == 1
