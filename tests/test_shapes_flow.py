"""The flow-matching model of the shapes world: its training, what it writes, and every command on it, untrained."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import AttentionProcessor
from torch import Tensor, nn

import evaluate
import sample
import train
from models import load_denoiser, registry
from models.denoiser import Conditioning
from models.generate import conditioned, decode
from models.latent_diffusion import LatentDiffusion
from models.shapes import train_flow
from models.shapes.scenes import captions
from models.shapes.tokenizer import build_tokenizer
from models.shapes.train_autoencoder import build_autoencoder
from models.shapes.train_flow import build_network, build_parts, noise_levels, save_flow_pipeline, taught
from models.shapes.training_loop import TrainingOptions, make_optimizers
from scripts.export_diffusers import main as export
from solvers import SAMPLERS
from training.ppo.config import METHODS
from training.ppo.launch import main as launch
from training.ppo.rewards import load_reward
from training.runs.run_folder import RunFolder, read_metrics
from training.solver import load_solver

NAME = "shapes_flow"
FIRST = Path("src/shapes").absolute()
REWARD = Path("weights/shapes_reward.pt").absolute()
PROMPTS = list(captions("heldout", 2, 0))


def run(command: object, *words: object) -> Result:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in the place of src/ that holds the model with random weights, in no part of which all are zero."""
    root = tmp_path_factory.mktemp("src")
    torch.manual_seed(0)
    parts = build_parts(build_tokenizer(), FIRST)
    for weight in parts["network"].parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.05)
    save_flow_pipeline(root / NAME, parts, build_autoencoder(), build_tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "SOURCE", root)
        yield root


# --- training


def test_an_untrained_network_answers_nothing_and_has_the_size_that_is_told():
    network = build_network()
    text = {"encoder_hidden_states": torch.randn(2, 33, 256), "pooled_projections": torch.randn(2, 256)}
    answer = network(torch.randn(2, 4, 16, 16), timestep=torch.tensor([1.0, 999.0]), **text).sample
    assert (answer.shape, answer.any()) == ((2, 4, 16, 16), False)
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(5.2e6, rel=0.01)


def test_the_text_encoder_of_the_first_model_is_taken_over():
    parts, first = build_parts(build_tokenizer(), FIRST), load_denoiser(FIRST, device="cpu", dtype=torch.float32)
    state = parts["text_encoder"].text_model.state_dict()
    torch.testing.assert_close(state, first.text_encoders[0].module.state_dict(), rtol=0, atol=0)


def test_the_teacher_s_velocity_leads_to_its_estimate():
    first, prompts = load_denoiser(FIRST, device="cpu", dtype=torch.float32), list(captions("heldout", 2, 0))
    clean, *noise = torch.randn(3, 2, 4, 16, 16)
    levels = torch.tensor([0.2, 2.0])
    sigma = levels / (1 + levels)
    noisy, velocity = taught(first, clean, sigma, first.encode(prompts, 1.0), torch.stack(noise))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(noisy[row], torch.lerp(clean[row], noise[0][row], sigma[row]), rtol=1e-4, atol=1e-4)
        estimate = conditioned(first, first.encode([prompt], 1.0))(noisy[[row]] * (1 + levels[row]), levels[row])
        torch.testing.assert_close(noisy[[row]] - sigma[row] * velocity[[row]], estimate, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", [10.0, 40.0])
def test_the_teacher_leads_to_the_mean_of_the_images_where_the_noise_is_more_than_it_knows(level):
    """Of normal images the best estimate is linear in x: what the taught velocities average to, at every level."""

    class OfNormalImages:
        sigma_max = 10.0

        def denoise(self, x: Tensor, sigma: Tensor, conditioning: None) -> Tensor:
            assert (sigma <= self.sigma_max).all()
            return (x / (1 + sigma.view(-1, 1, 1, 1) ** 2)).float()

    clean, *noise = torch.randn(3, 400_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((400_000,), level / (1 + level))
    noisy, velocity = taught(OfNormalImages(), clean, sigma, None, torch.stack(noise))
    assert noisy.var() == pytest.approx((1 + level**2) / (1 + level) ** 2, rel=0.01)
    estimate = noisy - sigma.view(-1, 1, 1, 1) * velocity
    slope = (estimate * noisy).mean() / noisy.square().mean()
    assert slope == pytest.approx((1 + level) / (1 + level**2), rel=0.05)


def test_noise_levels_are_logit_normal_but_for_a_quarter_that_is_even():
    levels = noise_levels(100_000, 0.03, torch.Generator().manual_seed(0))
    assert 0.03 <= levels.min() < levels.max() <= 1 - 1e-4
    below = 0.75 * torch.special.ndtr(torch.logit(torch.tensor(0.8)) - 0.5) + 0.25 * (0.8 - 0.03) / 0.97
    assert (levels < 0.8).float().mean() == pytest.approx(below.item(), abs=3e-3)


class KnowsTheImages(nn.Module):
    """A network that is right where every image is `clean` [4, 16, 16]: from there the velocity leads to the noise."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean = clean

    def set_attn_processor(self, processor: AttentionProcessor) -> None:
        pass

    def forward(self, noisy: Tensor, *, timestep: Tensor, **_: object) -> tuple[Tensor]:
        return ((noisy - self.clean) / (timestep / 1000).view(-1, 1, 1, 1),)


def of_scenes(
    teacher: object, clean: Tensor, sigma: Tensor, conditioning: Conditioning, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Without a teacher: the velocity from a scene to its noise."""
    assert isinstance(teacher, LatentDiffusion)
    assert teacher.sigma_min / (1 + teacher.sigma_min) <= sigma.min() < 0.2
    assert 0.8 < sigma.max() < 1
    return torch.lerp(clean, noise[0], sigma.view(-1, 1, 1, 1)), noise[0] - clean


def test_the_teacher_is_told_each_image_s_caption_or_none(tmp_path, monkeypatch):
    told: list[int] = []

    def of_numbered(teacher: LatentDiffusion, clean: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        known = teacher.encode([*PROMPTS, ""], 1.0).text["encoder_hidden_states"].flatten(1)
        read = rest[1].text["encoder_hidden_states"].float().flatten(1)
        distances = torch.cdist(read, known) / known[0].norm()
        assert distances.amin(1).max() < 0.02  # in half precision
        told.extend(distances.argmin(1).tolist())
        assert all(one in (row, len(PROMPTS)) for one, row in zip(told, clean[:, 0, 0, 0].tolist(), strict=True))
        return of_scenes(teacher, clean, *rest)

    monkeypatch.setattr(train_flow, "taught", of_numbered)
    monkeypatch.setattr(train_flow, "fit", lambda model, loss, options: loss(0))
    numbered = torch.arange(2.0).view(2, 1, 1, 1).expand(-1, 4, 16, 16)
    options = TrainingOptions(1, 1.0, tmp_path / "flow.pt")
    train_flow.train(PROMPTS, numbered, options, batch=64, seed=0, device="cpu", world=FIRST)
    assert set(told) == {0, 1, 2}


def test_the_loss_is_that_of_the_velocity(tmp_path, monkeypatch):
    clean = torch.randn(4, 16, 16)
    monkeypatch.setattr(train_flow, "build_network", lambda: KnowsTheImages(clean))
    monkeypatch.setattr(train_flow, "taught", of_scenes)
    monkeypatch.setattr(train_flow, "fit", lambda model, loss, options: found.append(loss(0)["loss"]))
    found: list[Tensor] = []
    options = TrainingOptions(1, 1.0, tmp_path / "flow.pt")
    for latents in (clean.expand(2, -1, -1, -1), torch.randn(2, 4, 16, 16)):
        train_flow.train(PROMPTS, latents, options, batch=64, seed=0, device="cpu", world=FIRST)
    assert found[0] < 1e-6
    assert found[1] > 1


def test_muon_moves_the_matrices_of_blocks_and_adamw_all_else(tmp_path):
    parts = build_parts(build_tokenizer(), FIRST)
    for muon, kinds in ((True, ["AdamW", "Muon"]), (False, ["AdamW"])):
        found = make_optimizers(parts, TrainingOptions(1, 1.0, tmp_path / "flow.pt", muon=muon))
        moved = [id(weight) for one in found for group in one.param_groups for weight in group["params"]]
        assert [type(one).__name__ for one in found] == kinds
        assert sorted(moved) == sorted(map(id, parts.parameters()))
        block = parts["network"].transformer_blocks[0].attn.to_q
        inside = {id(weight) for group in found[-1].param_groups for weight in group["params"]}
        assert (id(block.weight) in inside, id(block.bias) in inside) == (True, not muon)
        assert (id(parts["network"].proj_out.weight) in inside) == (not muon)


def test_a_checkpoint_of_another_optimiser_is_named(tmp_path):
    torch.save({"step": 1, "model": {}, "averaged": {}, "optimizer": {}}, tmp_path / "flow.pt")
    said = ("--images", "8", "--scratch", str(tmp_path), "--steps", "2", "--output", str(tmp_path / "model"))
    result = CliRunner().invoke(train_flow.main, said)
    assert (result.exit_code, result.exception.__class__) == (2, SystemExit), result.output
    assert f"{tmp_path / 'flow.pt'}: an earlier version wrote it" in result.output


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path):
    for name, runs in (("whole", [2]), ("resumed", [1, 2])):
        for steps in runs:
            told = ("--images", 8, "--batch", 2, "--learning-rate", 1, "--scratch", tmp_path / name, "--steps", steps)
            run(train_flow.main, *told, "--output", tmp_path / name / "model")
    whole, resumed = (
        load_denoiser(tmp_path / name / "model", device="cpu", dtype=torch.float32) for name in ("whole", "resumed")
    )
    assert whole.network.proj_out.weight.any()
    modules = [(one.network, *(encoder.module for encoder in one.text_encoders)) for one in (whole, resumed)]
    for one, other in zip(*modules, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_training_goes_on_from_a_pipeline_s_weights(source, tmp_path):
    told = ("--images", 8, "--batch", 2, "--learning-rate", 1e-12, "--scratch", tmp_path, "--steps", 1)
    run(train_flow.main, *told, "--start", source / NAME, "--output", tmp_path / "model")
    one, other = (load_denoiser(at, device="cpu", dtype=torch.float32) for at in (source / NAME, tmp_path / "model"))
    modules = [(model.network, *(encoder.module for encoder in model.text_encoders)) for model in (one, other)]
    for theirs, ours in zip(*modules, strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=2e-3, atol=1e-6)


def test_a_first_model_that_is_not_there_is_named(tmp_path):
    result = CliRunner().invoke(train_flow.main, ["--world", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert (result.exit_code, result.output) == (2, f"Error: {tmp_path / 'none' / 'vae' / 'config.json'} is missing.\n")


# --- what it writes


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_latents_are_those_of_the_stock_pipeline(scale, source):
    stock = StableDiffusion3Pipeline.from_pretrained(source / NAME, text_encoder_3=None, tokenizer_3=None)
    stock.set_progress_bar_config(disable=True)
    parts = (stock.transformer, stock.vae, stock.text_encoder, stock.text_encoder_2)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    ours = load_denoiser(NAME, device="cpu", dtype=torch.float32)
    assert (ours.latent_shape, ours.image_size) == ((4, 16, 16), (64, 64))
    start = torch.randn(2, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = stock(PROMPTS, latents=start, guidance_scale=scale, num_inference_steps=3, output_type="latent").images
    with torch.no_grad():
        denoise = conditioned(ours, ours.encode(PROMPTS, scale))
        drawn = SAMPLERS["ddim"](denoise, start, stock.scheduler.sigmas[:3].double(), denoise_to_zero=True)
    torch.testing.assert_close(drawn, theirs, rtol=1e-4, atol=1e-4)
    assert (drawn[0] - drawn[1] - start[0] + start[1]).abs().max() > 0.1  # it is no network that answers nothing


@torch.no_grad()
def test_the_shipped_weights_draw_what_is_asked_for():
    model = load_denoiser(str(Path("src", NAME).absolute()), device="cpu", dtype=torch.float32)
    reward = load_reward(REWARD, device="cpu", batch_size=16)
    asked = list(captions("heldout", 16, 1))
    images = decode(model, load_solver(10).on(model).latents(model, asked, range(16))).images
    own, others = (reward.score(images, prompts).mean().item() for prompts in (asked, asked[1:] + asked[:1]))
    assert own > 0.55 > 0.3 > others


# --- the commands


@pytest.fixture(scope="module")
def table(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a solver that was distilled for the model."""
    exps = tmp_path_factory.mktemp("exps")
    asked = ("--dataset_name", NAME, "--num_steps", 3, "--num_points", 0, "--train", "grid,history")
    small = ("--M", 1, "--trajectories", 4, "--batch", 2, "--total_kimg", 0.004, "--device", "cpu", "--outdir", exps)
    result = run(train.main, *asked, *small)
    assert "shapes_train.csv" in result.output
    (folder,) = exps.iterdir()
    return folder


def test_a_distilled_solver_draws(table, tmp_path):
    run(sample.main, "--predictor_path", table, "--prompt", PROMPTS[0], "--seeds", 0, "--outdir", tmp_path)
    assert len([*tmp_path.glob("*.png")]) == 1
    unknown = CliRunner().invoke(sample.main, ["--predictor_path", str(table), "--prompt", "a zebra"])
    assert "zebra" in unknown.output
    assert unknown.exit_code == 2


def test_its_export_says_how_the_stock_pipeline_is_told_of_no_t5(table, tmp_path):
    run(export, table, "--outdir", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f'{Path("src") / NAME}", custom_pipeline=solver' in card
    assert "text_encoder_3=None, tokenizer_3=None" in card


@pytest.mark.parametrize("method", METHODS)
def test_a_search_tunes_a_distilled_solver(method, table, tmp_path):
    overrides = [f"data.predictor_snapshot={table}", f"search.method={method}", f"run.output_root={tmp_path / 'exps'}"]
    overrides += ["ppo.steps=2", "ppo.rollout_batch_size=4", "ppo.minibatch_size=4", "ppo.ppo_epochs=1"]
    overrides += ["logging.eval_interval=0", "logging.panel=null"]
    run(launch, "--config", f"training/ppo/cfgs/{NAME}.yaml", "--device", "cpu", "--override", *overrides)
    (folder,) = (tmp_path / "exps").iterdir()
    first, last = read_metrics(RunFolder.open(folder).metrics)
    assert (first["step"], last["step"]) == (1, 2)
    assert all(first["table"][name] != last["table"][name] for name in ("grid", "guidance", "history"))


def test_its_images_are_measured_by_what_the_first_model_is(source, tmp_path):
    asked = ("--model", NAME, "--solvers", "ddim", "--nfe", 2, "--schedules", "discrete", "--number", 2)
    small = ("--validation-number", 2, "--reference-steps", 2, "--baseline", "classical", "--device", "cpu")
    run(evaluate.main, *asked, *small, "--outdir", tmp_path / "out", "--cache", tmp_path / "cache")
    with (tmp_path / "out" / "results.csv").open() as stream:
        metrics = {row["metric"] for row in csv.DictReader(stream)}
    assert {"reward", "verifier", "verified", "frechet"} <= metrics
