"""The pipelines that ask for all points at once: what the stock ones draw and can do, in fewer calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

from integrations.diffusers.pipeline_epd import (
    EPDStableDiffusion3Pipeline,
    EPDStableDiffusionPipeline,
    EPDStableDiffusionXLPipeline,
)
from models import load_denoiser
from models.generate import conditioned, initial_noise
from solvers import EPDTable, epd_sampler
from tests.test_diffusers_scheduler import (
    CPU,
    FLOW_SIGMAS,
    PROMPTS,
    SCALED_LINEAR,
    SEEDS,
    SIGMAS,
    TABLES,
    normed,
    played,
    scheduler_of,
    solver_of,
)
from tests.tiny_pipeline import save_tiny_pipeline
from tests.tiny_stock_pipelines import tiny_sd, tiny_sd3, tiny_xl

FAMILIES = {
    "Stable Diffusion": (tiny_sd, EPDStableDiffusionPipeline, SIGMAS, "epsilon"),
    "Stable Diffusion XL": (tiny_xl, EPDStableDiffusionXLPipeline, SIGMAS, "epsilon"),
    "Stable Diffusion 3": (tiny_sd3, EPDStableDiffusion3Pipeline, FLOW_SIGMAS, "flow_prediction"),
}
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A stock pipeline, ours with the same parts, and how to make the scheduler of a table for them."""
    make, ours, sigmas, prediction_type = FAMILIES[request.param]
    stock = make().to(dtype=torch.float64)
    pipe = ours(**stock.components)
    pipe.set_progress_bar_config(disable=True)

    def scheduler(table: EPDTable):
        return scheduler_of(
            table, sigmas, prediction_type=prediction_type, guidance_scale=3.0 if table.guidance is None else None
        )

    return stock, pipe, scheduler


@pytest.fixture
def stable_diffusion() -> EPDStableDiffusionPipeline:
    pipe = EPDStableDiffusionPipeline(**tiny_sd().to(dtype=torch.float64).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_of(TABLES["all columns"])
    return pipe


def drawn(pipe: Any, **arguments: Any) -> Any:
    noise = initial_noise(SEEDS, (4, 8, 8), device=CPU, dtype=torch.float64)
    return pipe(**{"prompt": PROMPTS, "latents": noise, "output_type": "latent", **SIZE, **arguments}).images


@pytest.mark.parametrize(
    "name", ["no points, history", "three points", "guidance", "all columns, no points", "all columns"]
)
def test_draws_what_the_stock_pipeline_draws_in_two_calls_an_interval(family, name: str) -> None:
    stock, pipe, scheduler = family
    table, calls = TABLES[name], []
    stock.scheduler = scheduler(table)
    expected = drawn(stock, **stock.scheduler.pipeline_arguments(), negative_prompt=["dog", ""])
    pipe.scheduler = scheduler(table)
    network = getattr(pipe, "unet", None) or pipe.transformer
    hook = network.register_forward_hook(lambda *_: calls.append(1))
    latents = drawn(pipe, negative_prompt=["dog", ""])
    hook.remove()
    assert len(calls) == table.evaluations().parallel
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_without_t5_is_loaded_without_being_told(tmp_path: Path) -> None:
    tiny_sd3().save_pretrained(tmp_path)
    pipe = EPDStableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert pipe.text_encoder_3 is pipe.tokenizer_3 is None


@pytest.mark.parametrize("name", ["all columns", "three points"])
def test_xl_draws_what_the_sampler_draws(name: str) -> None:
    pipe = EPDStableDiffusionXLPipeline(**tiny_xl().to(dtype=torch.float64).components)
    pipe.set_progress_bar_config(disable=True)
    table = TABLES[name]
    pipe.scheduler = scheduler_of(table)
    scale = None if table.guidance is not None else 2.5
    texts = pipe.encode_prompt(PROMPTS, num_images_per_prompt=1, negative_prompt="dog")  # with, without; and pooled
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16]], dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor, *guidance: Tensor) -> Tensor:
        each, sigma = len(x) // 2, sigma.expand(len(x)).view(-1, 1, 1, 1)
        told = 1000 * SCALED_LINEAR.time_of_sigma(sigma.flatten()) - 1
        by_text = [
            pipe.unet(
                x / (1 + sigma**2).sqrt(),
                told,
                text.repeat_interleave(each, 0),
                added_cond_kwargs={
                    "text_embeds": pooled.repeat_interleave(each, 0),
                    "time_ids": sizes.repeat(len(x), 1),
                },
            ).sample
            for text, pooled in ((texts[1], texts[3]), (texts[0], texts[2]))
        ]
        weight = guidance[0].view(-1, 1, 1, 1) if guidance else torch.full_like(sigma, scale)
        return x - sigma * torch.lerp(*by_text, weight)

    latents = drawn(pipe, negative_prompt="dog", **({} if scale is None else {"guidance_scale": scale}))
    with torch.no_grad():
        start = SIGMAS[0] * initial_noise(SEEDS, (4, 8, 8), device=CPU, dtype=torch.float64)
        ours = epd_sampler(denoise, start, SIGMAS, table)
    torch.testing.assert_close(latents, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_shapes_model_draws_what_sample_py_draws() -> None:
    denoiser = load_denoiser("shapes", device=CPU, dtype=torch.float32)
    pipe = EPDStableDiffusionPipeline.from_pretrained("src/shapes", dtype=torch.float32)
    pipe.unet = denoiser.network  # laid out alike: other layouts sum in another order
    pipe.set_progress_bar_config(disable=True)
    table = TABLES["all columns"]
    pipe.scheduler = scheduler_of(table)
    prompts = ["a large red star on a white background", "a small cyan ring on a black background"]
    noise = initial_noise(SEEDS, denoiser.latent_shape, device=CPU, dtype=torch.float32)
    latents = pipe(prompts, latents=noise, output_type="latent").images
    ours = solver_of(table).latents(denoiser, prompts, SEEDS)
    torch.testing.assert_close(latents, ours, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------ as the stock pipelines


def test_takes_what_stock_pipelines_take_and_gives_what_they_give(stable_diffusion) -> None:
    """Images a prompt, a generator each, negative prompts, every kind of output; arguments by position too."""
    stock = tiny_sd().to(dtype=torch.float64)
    stock.scheduler = scheduler_of(TABLES["all columns"])
    for output, more in (
        ("np", {}),
        ("pil", {}),
        ("pt", {"return_dict": False}),
        ("latent", {"guidance_rescale": 0.3}),
    ):
        images = []
        for pipe, arguments in ((stable_diffusion, {}), (stock, stock.scheduler.pipeline_arguments())):
            generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
            images.append(
                pipe(
                    PROMPTS,
                    16,
                    16,
                    negative_prompt=["dog", ""],
                    num_images_per_prompt=2,
                    generator=generators,
                    output_type=output,
                    **more,
                    **arguments,
                )[0]
            )
        mine, theirs = images
        assert type(mine) is type(theirs)
        assert len(mine) == len(theirs) == 4
        if output == "pil":
            mine, theirs = (np.stack([np.asarray(image, float) for image in each]) for each in images)
            assert np.abs(mine - theirs).max() <= 1
        else:
            assert np.abs(np.asarray(mine) - np.asarray(theirs)).max() < 1e-5


def test_callbacks_see_intervals_and_may_change_what_they_see(stable_diffusion) -> None:
    seen = []

    def look(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, pipe.num_timesteps, *tensors["latents"].shape, *tensors["prompt_embeds"].shape[:1]))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    wanted = ["latents", "prompt_embeds"]
    latents = drawn(stable_diffusion, callback_on_step_end=look, callback_on_step_end_tensor_inputs=wanted)
    assert seen == [(step, 3, 2, 4, 8, 8, 4) for step in range(3)]
    assert not latents.any()


def test_the_states_that_callbacks_see_are_the_samplers(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path)
    pipe = EPDStableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_of(TABLES["all columns"])
    states: list[Tensor] = []
    drawn(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: states.append(tensors["latents"]) or tensors)
    ours: list[Tensor] = []
    denoiser = load_denoiser(folder, device=CPU, dtype=torch.float64)
    with torch.no_grad():
        start = SIGMAS[0] * initial_noise(SEEDS, (4, 8, 8), device=CPU, dtype=torch.float64)
        denoise = conditioned(denoiser, denoiser.encode(PROMPTS))
        epd_sampler(denoise, start, SIGMAS, TABLES["all columns"], callback=lambda _, state: ours.append(state))
    ours[1:-1] = [normed(state, level) for state, level in zip(ours[1:-1], SIGMAS[1:-1], strict=True)]
    torch.testing.assert_close(torch.stack(states), torch.stack(ours[1:]), rtol=1e-5, atol=1e-5)


def test_diffusers_own_callbacks_work(stable_diffusion) -> None:
    """The cut-off ends guidance after two of the three intervals."""
    stable_diffusion.scheduler = scheduler_of(TABLES["three points"], guidance_scale=3.0)
    rows = []
    hook = stable_diffusion.unet.register_forward_hook(
        lambda module, args, kwargs, _: rows.append(len(args[0])), with_kwargs=True
    )
    noise = initial_noise(SEEDS[:1], (4, 8, 8), device=CPU, dtype=torch.float64)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    stable_diffusion(PROMPTS[0], latents=noise, output_type="latent", callback_on_step_end=cutoff, **SIZE)
    hook.remove()
    assert rows == [2, 6, 2, 6, 1, 3]


def test_the_progress_bar_moves_an_interval_at_a_time(stable_diffusion, capsys) -> None:
    stable_diffusion.set_progress_bar_config(disable=False, mininterval=0, miniters=1)
    drawn(stable_diffusion)
    shown = capsys.readouterr().err
    assert all(f"{done}/3" in shown for done in range(4))
    assert "4/3" not in shown


def test_a_call_at_guidance_1_does_not_ask_without_the_text(stable_diffusion) -> None:
    columns = TABLES["all columns"].columns()
    columns["guidance"] = torch.tensor([[3.0, 1.0, 1.0], [1.0, 1.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    stable_diffusion.scheduler = scheduler_of(EPDTable(**columns))
    rows: list[int] = []
    hook = stable_diffusion.unet.register_forward_hook(
        lambda module, args, kwargs, _: rows.append(len(args[0])), with_kwargs=True
    )
    latents = drawn(stable_diffusion, negative_prompt=["dog", "dog"])
    hook.remove()
    assert rows == [4, 4, 2, 8, 2, 4]
    stock = tiny_sd().to(dtype=torch.float64)
    torch.testing.assert_close(
        latents, played(stock, scheduler_of(EPDTable(**columns)), negative_prompt=["dog", "dog"]), rtol=1e-5, atol=1e-5
    )


def test_the_callers_guidance_goes_before_the_solvers_one_scale(stable_diffusion) -> None:
    stable_diffusion.scheduler = scheduler_of(TABLES["three points"], guidance_scale=3.0)
    usual, own = (drawn(stable_diffusion, **more) for more in ({}, {"guidance_scale": 3.0}))
    assert torch.equal(usual, own)
    assert not torch.equal(usual, drawn(stable_diffusion, guidance_scale=2.0))
    stable_diffusion.scheduler = scheduler_of(TABLES["three points"])
    assert torch.equal(drawn(stable_diffusion), drawn(stable_diffusion, guidance_scale=7.5))  # the stock pipeline's


# ---------------------------------------------------------------------------------------------------------- files


def test_loads_a_solver_from_a_folder(stable_diffusion, tmp_path: Path) -> None:
    scheduler_of(TABLES["no points, history"], guidance_scale=2.0).save_pretrained(tmp_path)
    stable_diffusion.load_solver(tmp_path)
    assert stable_diffusion.scheduler.config.history == TABLES["no points, history"].history.tolist()
    stock = tiny_sd().to(dtype=torch.float64)
    assert torch.equal(
        drawn(stable_diffusion), played(stock, scheduler_of(TABLES["no points, history"], guidance_scale=2.0))
    )


def test_a_saved_pipeline_loads_as_what_it_is(stable_diffusion, tmp_path: Path) -> None:
    before = drawn(stable_diffusion)
    stable_diffusion.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_epd", "EPDStableDiffusionPipeline"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float64)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded).__name__ == "EPDStableDiffusionPipeline"
    assert torch.equal(drawn(loaded), before)


# ------------------------------------------------------------------------------------------------ what is refused


def test_refuses_a_solver_for_another_kind_of_model(stable_diffusion, tmp_path: Path) -> None:
    scheduler_of(TABLES["one point"], prediction_type="v_prediction", beta_end=0.02).save_pretrained(tmp_path)
    message = "another kind of model: its beta_end is 0.02, and here 0.012; prediction_type is 'v_prediction', and here"
    with pytest.raises(ValueError, match=message):
        stable_diffusion.load_solver(tmp_path)
    stable_diffusion.load_solver(tmp_path, prediction_type="epsilon", beta_end=0.012)  # who knows better says so
    flow = EPDStableDiffusion3Pipeline(**tiny_sd3().components)
    with pytest.raises(ValueError, match="its network makes a v_prediction"):
        flow.load_solver(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 20}, "num_inference_steps must be 3, not 20"),
        ({"guidance_scale": 5.0}, "guidance_scale 5: the solver has one for each evaluation"),
        ({"output_type": "latent", "height": 13}, "have to be divisible by 8"),
    ],
)
def test_refuses_what_contradicts_the_solver(stable_diffusion, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(stable_diffusion, **arguments)
    assert not stable_diffusion.scheduler.points_at_once
    assert not stable_diffusion.unet._forward_pre_hooks


def test_refuses_to_draw_without_a_solver() -> None:
    pipe = EPDStableDiffusionPipeline(**tiny_sd().components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="scheduler is a EulerDiscreteScheduler: call load_solver first"):
        drawn(pipe)


def test_a_run_of_xl_may_end_where_an_interval_ends() -> None:
    pipe = EPDStableDiffusionXLPipeline(**tiny_xl().to(dtype=torch.float64).components)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_of(TABLES["one point"], guidance_scale=3.0)
    steps = pipe.scheduler.timesteps / 1000
    assert drawn(pipe, denoising_end=1 - float(steps[1:3].mean())).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="left early only where one ends"):
        drawn(pipe, denoising_end=1 - float(steps[2:4].mean()))


@pytest.mark.slow
def test_a_compiled_network_is_asked_for_all_points_too(stable_diffusion) -> None:
    expected = drawn(stable_diffusion)
    stable_diffusion.unet = torch.compile(stable_diffusion.unet, backend="eager")
    torch.testing.assert_close(drawn(stable_diffusion), expected)
