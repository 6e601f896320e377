"""Does a world stand for Stable Diffusion? `python -m models.shapes.screen CANDIDATE`, before hours of training.

What decides which solver is best is how many independent decisions an image holds: with one or two the estimate D
jumps once from mean to answer, and DDIM is all but exact; with many, at every scale, paths bend and higher orders pay.
So a small network is trained on a candidate world for a fixed number of steps, and the classical solvers are compared
on it, each at its best of a few schedules: distance to many steps from the same noise, and verifier score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.generate import generate
from models.registry import load_denoiser
from models.shapes import scenes
from models.shapes.data import NUMBERS_OF_OBJECTS, PROBABILITIES, RenderedScenes
from models.shapes.tokenizer import build_tokenizer
from models.shapes.train_diffusion import build_scheduler, encode_images, save_pipeline, train
from models.shapes.training_loop import TrainingOptions
from models.shapes.verify import verify
from schedules import get_schedule
from solvers import SAMPLERS

SOLVERS: dict[str, tuple[Callable[..., Tensor], int]] = {  # with network evaluations an interval
    "ddim": (SAMPLERS["ddim"], 1),
    "heun": (SAMPLERS["heun"], 2),
    "dpm2": (SAMPLERS["dpm2"], 2),
    "dpmpp:2": (partial(SAMPLERS["dpmpp"], max_order=2), 1),
    "ipndm": (SAMPLERS["ipndm"], 1),
}
TRIED_SCHEDULES = (("polynomial", 7.0), ("polynomial", 4.0), ("discrete", 1.0))
BUDGETS = (3, 5, 8, 10, 20, 50)
REFERENCE_EVALUATIONS = 200


def _settled(scene: scenes.Scene, picture: scenes.Picture) -> tuple[scenes.Scene, scenes.Picture]:
    """As little open as can be: every object named in full, upright, on a plain background."""
    named = tuple(scenes.Group(1, *item) for item, _ in picture.items)[: scenes.MOST_GROUPS]
    items = tuple((item, replace(place, angle=0.0, phase=0.0)) for item, place in picture.items[: scenes.MOST_GROUPS])
    tones = np.full_like(picture.tones, 0.5)
    settled = scenes.Scene(named, scene.relation, "plain", picture.background)
    return settled, replace(picture, items=items, tones=tones, light=0.0)


def _open(scene: scenes.Scene, picture: scenes.Picture) -> tuple[scenes.Scene, scenes.Picture]:
    """The world as it is."""
    return scene, picture


def _plain(scene: scenes.Scene, picture: scenes.Picture) -> tuple[scenes.Scene, scenes.Picture]:
    """Numbers, attributes, places and rotations are open; backgrounds are plain."""
    return replace(scene, pattern="plain"), replace(picture, tones=np.full_like(picture.tones, 0.5))


CANDIDATES = {"open": _open, "plain": _plain, "settled": _settled}


def render_candidate(name: str, number: int, seed: int) -> RenderedScenes:
    """`number` scenes of a candidate world, as `render_scenes`."""
    random = np.random.default_rng(seed)
    images = np.empty((number, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), dtype=np.uint8)
    captions = []
    for index in range(number):
        scene = scenes.draw_scene(random, "train", int(random.choice(NUMBERS_OF_OBJECTS, p=PROBABILITIES)))
        scene, picture = CANDIDATES[name](scene, scenes.imagine(scene, random))
        images[index] = scenes.draw(picture)
        captions.append(scene.caption())
    return RenderedScenes(images, captions)


class Rung(NamedTuple):
    """One solver at one budget, at its best schedule for each number."""

    solver: str
    evaluations: int
    distance: float
    score: float


@torch.no_grad()
def ladder(
    folder: str, prompts: Sequence[str], guidance_scale: float, budgets: Sequence[int], device: str
) -> tuple[float, list[Rung]]:
    """The reference's verifier score, and every solver at every budget.

    Args:
        folder: of the pipeline, or a registered name.
        prompts: one image each, its seed the prompt's number.
        guidance_scale: of classifier-free guidance.
        budgets: network evaluations an image, before guidance.
        device: a torch device's name.
    """
    denoiser = load_denoiser(folder, device=device, dtype=torch.float32)
    seeds = list(range(len(prompts)))

    def images(sampler: Callable[..., Tensor], intervals: int, schedule: tuple[str, float]) -> tuple[Tensor, float]:
        name, rho = schedule
        sigmas = get_schedule(
            name, intervals + 1, denoiser.sigma_min, denoiser.sigma_max, rho=rho, denoiser=denoiser
        ).to(denoiser.device)
        latents = generate(
            denoiser, prompts, seeds, sampler, sigmas, guidance_scale=guidance_scale, batch_size=32, progress=False
        )
        decoded = denoiser.decode(latents)
        return latents, float(
            np.mean([verify(image, prompt).score for image, prompt in zip(decoded, prompts, strict=True)])
        )

    reference, reference_score = images(SOLVERS["dpmpp:2"][0], REFERENCE_EVALUATIONS, ("discrete", 1.0))
    rungs = []
    for evaluations in budgets:
        for solver, (sampler, each) in SOLVERS.items():
            if evaluations // each < 1:
                continue
            tried = [images(sampler, evaluations // each, schedule) for schedule in TRIED_SCHEDULES]
            distances = [(latents - reference).flatten(1).norm(dim=1).mean().item() for latents, _ in tried]
            size = reference.flatten(1).norm(dim=1).mean().item()
            rungs.append(Rung(solver, evaluations, min(distances) / size, max(score for _, score in tried)))
    return reference_score, rungs


def table(rungs: Sequence[Rung], reference_score: float) -> str:
    """A Markdown table: a row a budget, a column a solver, `distance / verifier score` in each cell."""
    lines = [f"| evaluations | {' | '.join(SOLVERS)} |", "|---" * (len(SOLVERS) + 1) + "|"]
    for evaluations in dict.fromkeys(rung.evaluations for rung in rungs):
        found = {rung.solver: rung for rung in rungs if rung.evaluations == evaluations}
        cells = [f"{found[name].distance:.3f} / {found[name].score:.3f}" if name in found else "" for name in SOLVERS]
        lines.append(f"| {evaluations} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"Reference ({REFERENCE_EVALUATIONS} evaluations): {reference_score:.3f}"])


@click.command(context_settings={"show_default": True})
@click.argument("candidate", type=click.Choice(list(CANDIDATES)))
@click.option("--steps", type=click.IntRange(min=1), default=3000, help="Of training, batch 32.")
@click.option("--images", type=click.IntRange(min=64), default=20_000, help="Scenes to train on.")
@click.option("--number", type=click.IntRange(min=1), default=48, help="Prompts the solvers are compared on.")
@click.option("--guidances", default="1,2,4", help="Guidance scales.")
@click.option("--vae", type=click.Path(path_type=Path, exists=True), default=Path("src/shapes/vae"))
@click.option("--scratch", type=click.Path(path_type=Path), default=Path("scratch/screen"))
@click.option("--seed", type=int, default=0)
@click.option("--device", default="cpu")
def main(
    candidate: str,
    steps: int,
    images: int,
    number: int,
    guidances: str,
    vae: Path,
    scratch: Path,
    seed: int,
    device: str,
) -> None:
    """Train a small network on a candidate world and print the ladder of solvers on it."""
    folder = scratch / candidate
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).to(device)
    rendered = render_candidate(candidate, images, seed)
    latents = encode_images(autoencoder, torch.from_numpy(rendered.images))
    options = TrainingOptions(steps, 5e-4, folder / "diffusion.pt")
    model = train(rendered.captions, latents, options, batch=32, seed=seed, device=device)
    save_pipeline(folder / "pipeline", model, autoencoder, build_tokenizer(), build_scheduler())
    prompts = render_candidate(candidate, number, seed + 1).captions
    for guidance in map(float, guidances.split(",")):
        reference_score, rungs = ladder(str(folder / "pipeline"), prompts, guidance, BUDGETS, device)
        click.echo(f"\n{candidate}, guidance {guidance:g}, distance to the reference / verifier score\n")
        click.echo(table(rungs, reference_score))


if __name__ == "__main__":
    main()
