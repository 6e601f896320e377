"""The scheduler for diffusers: in stock pipelines it makes the latents that `epd_sampler` makes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from integrations.diffusers.scheduling_epd import EPDScheduler
from models import load_denoiser
from models.generate import conditioned, initial_noise
from models.noise_levels import NoiseLevels
from solvers import COLUMNS, EPDSteps, EPDTable, classical_table, epd_sampler
from tests.test_solver_tables import full_table
from tests.tiny_pipeline import TEXT_WIDTH, save_tiny_pipeline
from tests.tiny_stock_pipelines import tiny_flux, tiny_sd, tiny_sd3
from training.solver import Solver

CPU = torch.device("cpu")
PROMPTS = ["red box", "a cat"]
SEEDS = [3, 1]
SIGMAS = torch.tensor([14.6, 3.0, 0.8, 0.1], dtype=torch.float64)
FLOW_SIGMAS = torch.tensor([1.0, 0.8, 0.4, 0.05], dtype=torch.float64)
SCALED_LINEAR = NoiseLevels(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
OPTIONAL = [column.name for column in COLUMNS if column.optional]


def with_columns(points: int, *names: str, intervals: int = 3) -> EPDTable:
    """Positions and weights, and of the other columns those that are named."""
    columns = full_table(intervals, points).columns()
    return EPDTable(**{name: columns[name] for name in ("positions", "weights", *names)})


TABLES = {
    "no points": with_columns(0),
    "no points, history": with_columns(0, "history"),
    "no points, guidance": with_columns(0, "guidance"),
    "one point": with_columns(1),
    "three points": with_columns(3),
    **{name: with_columns(2, name) for name in OPTIONAL},
    "all columns": with_columns(2, *OPTIONAL),
    "all columns, no points": with_columns(0, *OPTIONAL),
}


def solver_of(table: EPDTable, sigmas: Tensor = SIGMAS, *, guidance_scale: float | None = None) -> Solver:
    return Solver("epd", "epd", table.num_steps, table=table, sigmas=sigmas, guidance_scale=guidance_scale)


def scheduler_of(table: EPDTable, sigmas: Tensor = SIGMAS, **config: Any) -> EPDScheduler:
    columns = {name: entries.tolist() for name, entries in table.columns().items()}
    return EPDScheduler(sigmas=sigmas.tolist(), **columns, **config)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def stable_diffusion(request, tmp_path_factory):
    """Stock pipeline and our denoiser of one folder, in float64: the same numbers but for float32 timesteps."""
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("tiny"), prediction_type=request.param)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe, load_denoiser(folder, device=CPU, dtype=torch.float64)


def played(pipe: Any, scheduler: EPDScheduler, **arguments: Any) -> Tensor:
    """The latents that a pipeline ends at from the seeds' noise."""
    pipe.scheduler = scheduler
    noise = initial_noise(SEEDS, (4, 8, 8), device=CPU, dtype=torch.float64)
    return pipe(PROMPTS, latents=noise, output_type="latent", **{**scheduler.pipeline_arguments(), **arguments}).images


@pytest.mark.parametrize("name", TABLES)
def test_a_stock_pipeline_draws_what_the_sampler_draws(stable_diffusion, name: str) -> None:
    pipe, denoiser = stable_diffusion
    table = TABLES[name]
    scale = 3.0 if table.guidance is None else None
    scheduler = scheduler_of(table, guidance_scale=scale, prediction_type=denoiser.process.prediction)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents = played(pipe, scheduler)
    ours = solver_of(table, guidance_scale=scale).latents(denoiser, PROMPTS, SEEDS, dtype=torch.float64)
    torch.testing.assert_close(latents, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_shapes_model_draws_the_same_in_a_stock_pipeline() -> None:
    denoiser = load_denoiser("shapes", device=CPU, dtype=torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained("src/shapes", dtype=torch.float32)
    pipe.unet = denoiser.network  # laid out alike: other layouts sum in another order, which alone makes 5e-4
    pipe.set_progress_bar_config(disable=True)
    table = with_columns(2, *OPTIONAL, intervals=4)
    sigmas = SCALED_LINEAR.sigma_of_time(torch.linspace(1, 0.001, 5, dtype=torch.float64))
    prompts = ["a large red star on a white background", "a small cyan ring on a black background"]
    pipe.scheduler = scheduler_of(table, sigmas)
    noise = initial_noise(SEEDS, denoiser.latent_shape, device=CPU, dtype=torch.float32)
    latents = pipe(prompts, latents=noise, output_type="latent", **pipe.scheduler.pipeline_arguments()).images
    ours = solver_of(table, sigmas).latents(denoiser, prompts, SEEDS)
    torch.testing.assert_close(latents, ours, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------- flow matching


@pytest.mark.parametrize("name", TABLES)
def test_stable_diffusion_3_draws_what_the_sampler_draws(name: str) -> None:
    pipe, table = tiny_sd3().to(dtype=torch.float64), TABLES[name]
    embeddings, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, None, None, negative_prompt="dog")
    scale = 3.0 if table.guidance is None else None

    def denoise(x: Tensor, sigma: Tensor, *guidance: Tensor) -> Tensor:
        each = len(x) // len(PROMPTS)
        told = 1000 * sigma.expand(len(x))
        by_text = [
            pipe.transformer(x, text.repeat_interleave(each, 0), vector.repeat_interleave(each, 0), told).sample
            for text, vector in ((negative, negative_pooled), (embeddings, pooled))
        ]
        weight = (guidance[0] if guidance else torch.full((len(x),), scale)).view(-1, 1, 1, 1)
        return x - sigma.expand(len(x)).view(-1, 1, 1, 1) * torch.lerp(*by_text, weight.double())

    scheduler = scheduler_of(table, FLOW_SIGMAS, prediction_type="flow_prediction", guidance_scale=scale)
    with torch.no_grad():
        latents = played(pipe, scheduler, negative_prompt="dog", height=16, width=16, mu=1.3)
        noise = initial_noise(SEEDS, (4, 8, 8), device=CPU, dtype=torch.float64)
        ours = epd_sampler(denoise, noise, FLOW_SIGMAS, table)
    torch.testing.assert_close(latents, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["no points, history", "three points", "direction_history"])
def test_flux_passes_a_grid_and_a_shift_and_draws_what_the_sampler_draws(name: str) -> None:
    pipe, table = tiny_flux().to(dtype=torch.float64), TABLES[name]
    text, pooled = (torch.randn(2, *size, TEXT_WIDTH, dtype=torch.float64) for size in ((5,), ()))
    noise = torch.randn(2, 16, 16, dtype=torch.float64)  # [B, patches, channels]
    text_ids, image_ids = torch.zeros(5, 3), pipe._prepare_latent_image_ids(2, 4, 4, CPU, torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        each, told = len(x) // 2, sigma.expand(len(x))
        velocity = pipe.transformer(
            hidden_states=x,
            timestep=told,
            guidance=torch.full((len(x),), 3.5),
            pooled_projections=pooled.repeat_interleave(each, 0),
            encoder_hidden_states=text.repeat_interleave(each, 0),
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        return x - told.view(-1, 1, 1) * velocity

    pipe.scheduler = scheduler_of(table, FLOW_SIGMAS, prediction_type="flow_prediction")
    passed = []
    own = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda *args, **kwargs: passed.append(kwargs) or own(*args, **kwargs)
    arguments = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "guidance_scale": 3.5,
        "height": 16,
        "width": 16,
    }
    with torch.no_grad():
        ours = epd_sampler(denoise, noise, FLOW_SIGMAS, table)
        for sigmas in (None, FLOW_SIGMAS[:-1].tolist()):
            latents = pipe(
                **arguments, num_inference_steps=3, sigmas=sigmas, latents=noise, output_type="latent"
            ).images
            torch.testing.assert_close(latents, ours, rtol=1e-5, atol=1e-5)
    assert all("mu" in kwargs for kwargs in passed)
    own(sigmas=np.linspace(1, 1 / 3, 3), mu=0.7)  # other pipelines of its kind pass this
    assert len(pipe.scheduler.timesteps) == 3 * (1 + table.num_points)


def test_flow_matching_starts_from_noise_alone() -> None:
    with pytest.raises(ValueError, match=r"must start at 1 for flow matching.*got 0\.9"):
        scheduler_of(TABLES["no points"], FLOW_SIGMAS * 0.9, prediction_type="flow_prediction")


# ---------------------------------------------------------------------------------------------- diffusers' own rules


def drawn_by(scheduler: Any, start: Tensor, network: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    """The states that a scheduler goes through; `network` answers its call of a number."""
    states = [start]
    for number, timestep in enumerate(scheduler.timesteps):
        asked = scheduler.scale_model_input(states[-1], timestep)
        states.append(scheduler.step(network(asked, number), timestep, states[-1]).prev_sample)
    return states


def waves(asked: Tensor, number: int) -> Tensor:
    """A network's answer that depends on what it is asked, and when."""
    return (asked + 0.1 * number).sin()


def normed(state: Tensor, level: Tensor) -> Tensor:
    """x as pipelines hold it between two evaluations."""
    return state / (1 + level**2).sqrt()


def start_noise() -> Tensor:
    return initial_noise(SEEDS, (4, 8, 8), device=CPU, dtype=torch.float64)


def test_one_point_in_the_middle_is_kdpm2_but_for_its_last_step() -> None:
    theirs = KDPM2DiscreteScheduler(beta_schedule="scaled_linear")
    theirs.set_timesteps(6)
    levels = torch.cat([theirs.sigmas[:1], theirs.sigmas[1:-3:2]]).double()  # it ends at 0, and we at the level before
    ours = scheduler_of(classical_table("dpm2", levels), levels)
    states = drawn_by(theirs, start_noise() * theirs.init_noise_sigma, waves)[:11]
    mine = drawn_by(ours, start_noise() * ours.init_noise_sigma, waves)
    assert (ours.order, len(mine)) == (2, 11)
    states[:-1] = [normed(state, level) for state, level in zip(states, ours.sigmas[:-1], strict=False)]
    torch.testing.assert_close(torch.stack(mine), torch.stack(states), rtol=0, atol=1e-4)
    assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps[:10].tolist(), abs=1)  # log sigma, not log alpha


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_no_points_are_ddim(prediction_type: str) -> None:
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    theirs.set_timesteps(10)
    steps = torch.cat([theirs.timesteps, torch.tensor([0])])
    levels = SCALED_LINEAR.sigma_of_time((steps + 1.0) / 1000)
    ours = scheduler_of(classical_table("ddim", levels), levels, prediction_type=prediction_type)
    assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    mine = drawn_by(ours, start_noise(), waves)
    mine[-1] = normed(mine[-1], levels[-1])
    torch.testing.assert_close(
        torch.stack(mine), torch.stack(drawn_by(theirs, start_noise(), waves)), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_history_is_dpm_solver_multistep(order: int) -> None:
    theirs = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        solver_order=order,
        final_sigmas_type="sigma_min",
        lower_order_final=False,
        use_karras_sigmas=True,
    )
    theirs.set_timesteps(8)
    levels = theirs.sigmas[:-1].double()  # the last one stands there twice
    ours = scheduler_of(classical_table("dpmpp", levels, max_order=order, lower_order_final=False), levels)
    mine = drawn_by(ours, start_noise(), waves)
    mine[-1] = normed(mine[-1], levels[-1])
    states = drawn_by(theirs, start_noise(), waves)[: len(mine)]
    torch.testing.assert_close(torch.stack(mine), torch.stack(states), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ from an image


@pytest.mark.parametrize("name", ["no points, history", "three points", "all columns"])
@pytest.mark.parametrize("strength", [0.4, 0.7])
def test_an_image_is_changed_from_the_start_of_an_interval(stable_diffusion, name: str, strength: float) -> None:
    pipe, denoiser = stable_diffusion
    table, begin = TABLES[name], 3 - int(3 * strength)
    scale = 3.0 if table.guidance is None else None
    scheduler = scheduler_of(table, guidance_scale=scale, prediction_type=denoiser.process.prediction)
    image_pipe = StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    image_pipe.set_progress_bar_config(disable=True)
    image = torch.randn(2, 4, 8, 8, dtype=torch.float64)  # already latents
    latents = image_pipe(
        PROMPTS,
        image,
        strength,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **scheduler.pipeline_arguments(),
    ).images
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = image + SIGMAS[begin] * noise
    with torch.no_grad():
        steps = EPDSteps(conditioned(denoiser, denoiser.encode(PROMPTS, scale)), table, SIGMAS, x)
        for i in range(begin, 3):
            x = steps.interval(i, x)
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)


def test_a_run_begins_where_an_interval_begins() -> None:
    scheduler = scheduler_of(TABLES["three points"])
    with pytest.raises(ValueError, match=r"at one of its evaluations \[0, 4, 8\], not at 3"):
        scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="not at 12"):
        scheduler.set_begin_index(12)
    sample = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"can begin at the timesteps \[\d+.*\], where its intervals start"):
        scheduler.scale_model_input(sample, scheduler.timesteps[1])
    scheduler.step(sample, scheduler.timesteps[4], sample)
    assert scheduler.step_index == 5


def test_clean_latents_are_noised_to_the_level_of_the_timestep() -> None:
    clean, noise = torch.ones(2, 4, 8, 8), torch.full((2, 4, 8, 8), 3.0)
    scheduler = scheduler_of(TABLES["no points"])
    noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[1:2].repeat(2))
    assert torch.allclose(noisy, normed(torch.tensor(10.0), torch.tensor(3.0)))
    flow = scheduler_of(TABLES["no points"], FLOW_SIGMAS, prediction_type="flow_prediction")
    assert torch.allclose(flow.scale_noise(clean, flow.timesteps[1:2], noise), torch.tensor(2.6))  # 0.2 + 0.8 · 3


# --------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("given", [1.0, 3.0])
def test_a_pipeline_that_plays_at_one_guidance_is_refused_or_has_to_say_so(stable_diffusion, given: float) -> None:
    pipe, denoiser = stable_diffusion
    scheduler = scheduler_of(TABLES["guidance"], prediction_type=denoiser.process.prediction)
    with pytest.raises(ValueError, match=r"does not guide by it: call it with \*\*scheduler\.pipeline_arguments"):
        played(pipe, scheduler, guidance_scale=given)
    at_one = EPDScheduler.from_config(scheduler.config, guidance=None)
    plain = scheduler_of(with_columns(2), prediction_type=denoiser.process.prediction)
    assert torch.equal(*(played(pipe, each, guidance_scale=given) for each in (at_one, plain)))


def test_the_scale_is_followed_wherever_a_pipeline_keeps_it() -> None:
    """Those of control nets and adapters multiply by their argument, which no callback reaches."""
    scheduler = scheduler_of(TABLES["guidance"])
    guidance_scale = scheduler.pipeline_arguments()["guidance_scale"]
    assert guidance_scale > 1
    asked: list[float] = []

    def network(latents: Tensor, number: int) -> Tensor:
        asked.append((guidance_scale * torch.ones(1)).item())
        return latents

    drawn_by(scheduler, start_noise(), network)
    assert asked == pytest.approx(TABLES["guidance"].guidance.flatten().tolist())


def test_guidance_of_1_everywhere_asks_without_text_nowhere(stable_diffusion) -> None:
    pipe, denoiser = stable_diffusion
    table = EPDTable(**{**TABLES["no points"].columns(), "guidance": torch.ones(3, 1, dtype=torch.float64)})
    rows: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    played(pipe, scheduler_of(table, prediction_type=denoiser.process.prediction))
    played(pipe, scheduler_of(TABLES["no points"], guidance_scale=1.0, prediction_type=denoiser.process.prediction))
    hook.remove()
    assert rows == [2] * 6


def test_a_pipeline_whose_guidance_is_fixed_before_the_first_step_is_refused() -> None:
    pipe = tiny_flux()
    pipe.scheduler = scheduler_of(TABLES["no points, guidance"], FLOW_SIGMAS, prediction_type="flow_prediction")
    text, pooled = torch.randn(1, 5, TEXT_WIDTH), torch.randn(1, TEXT_WIDTH)
    with pytest.raises(ValueError, match="fixes its guidance before the first step, as FLUX's do"):
        pipe(
            prompt_embeds=text, pooled_prompt_embeds=pooled, height=16, width=16, **pipe.scheduler.pipeline_arguments()
        )


# --------------------------------------------------------------------------------------------------- numbers


def test_levels_may_repeat() -> None:
    """Both points are told the level of the interval's start: the run goes by its own counter."""
    positions = torch.full((3, 2), 0.5, dtype=torch.float64)
    told = (SIGMAS[:-1] / SIGMAS[1:]).sqrt()[:, None].expand(3, 2)
    table = EPDTable(positions, torch.full_like(positions, 0.5), scale_time=told.contiguous())
    scheduler = scheduler_of(table)
    assert len(scheduler.timesteps.unique()) == 3
    levels = SIGMAS[:-1].repeat_interleave(3)

    def network(asked: Tensor, number: int) -> Tensor:
        return (asked + levels[number]).cos()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.expand(len(x)).view(-1, 1, 1, 1)
        return x - sigma * (x / (1 + sigma**2).sqrt() + sigma).cos()

    noise = initial_noise(SEEDS, (4, 8, 8), device=CPU, dtype=torch.float64)
    states = drawn_by(scheduler, noise * scheduler.init_noise_sigma, network)
    torch.testing.assert_close(states[-1], epd_sampler(denoise, noise * SIGMAS[0], SIGMAS, table))


def test_half_precision_is_summed_in_float32() -> None:
    """64 answers that float16 could not tell from nothing beside what is there already."""
    points = torch.linspace(0.1, 0.9, 64, dtype=torch.float64)[None]
    table = EPDTable(points, torch.full_like(points, 1 / 64))
    scheduler = scheduler_of(table, torch.tensor([1.0, 0.5]), prediction_type="flow_prediction")
    start = torch.full((1, 1, 2, 2), 2048.0, dtype=torch.float16)
    answer = torch.full_like(start, -6.0)
    states = drawn_by(scheduler, start, lambda asked, number: answer)
    assert {state.dtype for state in states} == {torch.float16}
    assert states[-1].unique().tolist() == [2052.0]  # 2051 is between two numbers of float16, 2048 + 64 · 0 were 2048
    scheduler.set_timesteps(1)
    assert scheduler.scale_model_input(start, scheduler.timesteps[0]).dtype == torch.float16


def test_timesteps_are_those_of_the_model_between_its_own_and_beyond() -> None:
    levels = torch.tensor([20.0, 14.6146, 3.3, 0.02916, 0.01], dtype=torch.float64)
    ours = 1000 * SCALED_LINEAR.time_of_sigma(levels) - 1
    scheduler = scheduler_of(with_columns(0, intervals=4), levels)
    assert scheduler.timesteps.tolist() == pytest.approx(ours[:-1].tolist(), abs=1e-3)
    betas = torch.linspace(0.001, 0.02, 50, dtype=torch.float64)
    trained = scheduler_of(with_columns(0, intervals=4), levels, trained_betas=betas.tolist(), num_train_timesteps=50)
    expected = 50 * NoiseLevels(betas).time_of_sigma(levels) - 1
    assert trained.timesteps.tolist() == pytest.approx(expected[:-1].tolist(), abs=1e-3)


# --------------------------------------------------------------------------------------------------- files


def test_a_saved_scheduler_is_the_same_solver_and_brings_its_code(tmp_path: Path) -> None:
    scheduler = scheduler_of(TABLES["all columns"], prediction_type="v_prediction", num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scheduler_config.json", "scheduling_epd.py"]
    read = EPDScheduler.from_pretrained(tmp_path)
    content = json.loads((tmp_path / "scheduler_config.json").read_text())
    described = EPDScheduler.from_config({key: value for key, value in content.items() if not key.startswith("_")})
    for other in (read, described):
        assert {key: value for key, value in other.config.items() if key[0] != "_"} == {
            key: value for key, value in scheduler.config.items() if key[0] != "_"
        }
        assert torch.equal(other.timesteps, scheduler.timesteps)
    assert content["history"] == TABLES["all columns"].history.tolist()


def test_ddim_with_its_configuration_does_not_clip_latents(tmp_path: Path) -> None:
    """It would where nothing is said."""
    scheduler_of(TABLES["one point"]).save_pretrained(tmp_path)
    assert not DDIMScheduler.from_config(EPDScheduler.from_pretrained(tmp_path).config).config.clip_sample


def test_a_pipeline_saved_with_the_scheduler_loads_with_it(tmp_path: Path) -> None:
    pipe, scheduler = tiny_sd().to(dtype=torch.float64), scheduler_of(TABLES["all columns"])
    before = played(pipe, scheduler)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["scheduling_epd", "EPDScheduler"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float64)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionPipeline
    assert torch.equal(played(loaded, loaded.scheduler), before)


# --------------------------------------------------------------------------------------------------- what is refused

PLAIN = {"sigmas": [14.6, 3.0, 0.8, 0.1], "positions": [[0.5]] * 3, "weights": [[1.0]] * 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": None}, "holds no solver"),
        ({"afs": True}, "afs: .* without asking the network, and a pipeline asks it at every timestep"),
        ({"prediction_type": "sample"}, "'sample' is not known; known are epsilon, v_prediction, flow_prediction"),
        ({"sigmas": [1.0]}, "at least two positive numbers"),
        ({"sigmas": [3.0, 3.0, 0.8, 0.1]}, "each below the one before"),
        ({"sigmas": [3.0, 2.0, 0.8, 0.0]}, "positive numbers"),
        ({"weights": [[1.0]] * 2}, "weights must be 3 rows of 1 finite numbers"),
        ({"positions": [[0.5], [0.5], [0.5, 0.6]]}, "positions must be 3 rows"),
        ({"guidance": [[3.0]] * 3}, "guidance must be 3 rows of 2 finite numbers"),
        ({"history": [[0.0, float("nan"), 0.0]] * 3}, "history must be 3 rows of 3 finite numbers"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2' is not known"),
    ],
)
def test_refuses_what_is_no_solver(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPDScheduler(**{**PLAIN, **changes})


def test_a_stock_configuration_holds_no_solver() -> None:
    with pytest.raises(ValueError, match="holds no solver: it has no sigmas"):
        EPDScheduler.from_config(tiny_sd().scheduler.config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 20}, "has 3 intervals: num_inference_steps must be 3, not 20"),
        ({}, "must be 3, not None"),
        ({"sigmas": [14.6, 2.0, 0.8]}, r"sigmas of its own, \[14\.6, 3\.0, 0\.8\]: leave sigmas out"),
        ({"sigmas": [1.0, 2 / 3, 1 / 3]}, "sigmas of its own"),  # FLUX's; not of a variance-preserving model
        ({"timesteps": [999, 500, 1]}, "timesteps of its own"),
    ],
)
def test_refuses_another_grid_than_the_solvers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPDScheduler(**PLAIN).set_timesteps(**arguments)


def test_takes_its_own_grid() -> None:
    scheduler = EPDScheduler(**PLAIN)
    own = scheduler.timesteps.clone()
    for arguments in ({"timesteps": own.tolist()}, {"sigmas": PLAIN["sigmas"]}, {"sigmas": PLAIN["sigmas"][:-1]}):
        scheduler.set_timesteps(**arguments)
        assert torch.equal(scheduler.timesteps, own)


def test_a_finished_run_goes_no_further() -> None:
    scheduler = EPDScheduler(**PLAIN)
    sample = torch.zeros(1, 4, 8, 8)
    drawn_by(scheduler, sample, lambda asked, number: asked)
    with pytest.raises(ValueError, match="has come to its end"):
        scheduler.step(sample, scheduler.timesteps[-1], sample)
