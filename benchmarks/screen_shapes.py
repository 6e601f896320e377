"""Does a world stand for Stable Diffusion? `python -m benchmarks.screen_shapes CANDIDATE`, before hours of training.

What decides which solver is best is how many independent decisions an image holds: with one or two the estimate D
jumps once from mean to answer, and DDIM is all but exact; with many, at every scale, paths bend and higher orders pay.
So a small network is trained on a candidate world for a fixed number of steps, and the classical solvers are compared
on it, each at its best of a few schedules: distance to many steps from the same noise, and verifier score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from errors import InputError, shows_input_errors
from models.devices import resolve_device
from models.generate import decode
from models.loading import load_module
from models.registry import load_denoiser
from models.shapes import scenes
from models.shapes.data import RenderedScenes, as_drawn, render_scenes
from models.shapes.tokenizer import build_tokenizer
from models.shapes.train_diffusion import build_scheduler, encode_images, save_pipeline, train
from models.shapes.training_loop import TrainingOptions
from models.shapes.verify import verify
from solvers import network_evaluations
from training.solver import Schedule, classical_solver, parse_classical, parse_schedule

SOLVERS = ("ddim", "heun", "dpm2", "dpmpp:2", "ipndm")
TRIED_SCHEDULES = tuple(map(parse_schedule, ("polynomial:7", "polynomial:4", "discrete")))
REFERENCE, REFERENCE_SCHEDULE = "dpmpp:2", Schedule("discrete", 1.0)
BUDGETS = (3, 5, 8, 10, 20, 50)
REFERENCE_EVALUATIONS = 200


def settled(scene: scenes.Scene, picture: scenes.Picture) -> tuple[scenes.Scene, scenes.Picture]:
    """As little open as can be: at most three objects, each named in full, upright, on a plain background that is
    named. Places, and sizes within their class, stay open.
    """
    items = picture.items[: scenes.MOST_GROUPS]
    named = tuple(scenes.Group(1, *item) for item, _ in items)
    upright = tuple((item, replace(place, angle=0.0, phase=0.0)) for item, place in items)
    tones = np.full_like(picture.tones, 0.5)
    described = scenes.Scene(named, scene.relation, "plain", picture.background)
    return described, replace(picture, items=upright, tones=tones, light=0.0)


def plain(scene: scenes.Scene, picture: scenes.Picture) -> tuple[scenes.Scene, scenes.Picture]:
    """The world on plain backgrounds: numbers, attributes, places and rotations are open."""
    return replace(scene, pattern="plain"), replace(picture, tones=np.full_like(picture.tones, 0.5))


CANDIDATES = {"open": as_drawn, "plain": plain, "settled": settled}


def render_candidate(name: str, number: int, seed: int) -> RenderedScenes:
    """`number` scenes of a candidate world: those of `render_scenes`, and what the candidate makes of them."""
    return render_scenes("train", number, seed, variant=CANDIDATES[name])


class Rung(NamedTuple):
    """One solver at one budget, at its best schedule for each number.

    evaluations: of the network, before guidance. distance: mean over images of the latents' to the reference's, as a
    share of their mean length; infinite where they explode. score: the verifier's, in [0, 1].
    """

    solver: str
    evaluations: int
    distance: float
    score: float


@torch.no_grad()
def ladder(
    folder: str, prompts: Sequence[str], guidance_scale: float, budgets: Sequence[int], device: torch.device | str
) -> tuple[float, list[Rung]]:
    """The reference's verifier score, and every solver at every budget.

    Args:
        folder: of the pipeline, or a registered name.
        prompts: one image each, its seed the prompt's number.
        guidance_scale: of classifier-free guidance.
        budgets: network evaluations an image, before guidance.
        device: where to.
    """
    denoiser = load_denoiser(folder, device=device, dtype=torch.float32)

    def latents_and_score(name: str, num_steps: int, schedule: Schedule) -> tuple[Tensor, float]:
        solver = classical_solver(name, num_steps, schedule).guided(guidance_scale).on(denoiser)
        latents = solver.latents(denoiser, prompts, range(len(prompts)), batch_size=32)
        images = decode(denoiser, latents).images
        verdicts = [verify(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return latents.flatten(1), float(np.mean([verdict.score for verdict in verdicts]))

    reference, reference_score = latents_and_score(REFERENCE, REFERENCE_EVALUATIONS + 1, REFERENCE_SCHEDULE)
    length = reference.norm(dim=1).mean()
    rungs = []
    for evaluations in budgets:
        for solver in SOLVERS:
            sampler, _ = parse_classical(solver)
            each = network_evaluations(sampler, 2).parallel
            if evaluations < each:
                continue
            tried = [latents_and_score(solver, evaluations // each + 1, schedule) for schedule in TRIED_SCHEDULES]
            distances = [(latents - reference).norm(dim=1).mean() / length for latents, _ in tried]
            nearest = torch.stack(distances).nan_to_num(nan=math.inf, posinf=math.inf).min().item()
            rungs.append(Rung(solver, evaluations, nearest, max(score for _, score in tried)))
    return reference_score, rungs


def table(rungs: Sequence[Rung], reference_score: float) -> str:
    """A Markdown table: a row a budget, a column a solver, `distance / verifier score` in each cell."""
    lines = [f"| evaluations | {' | '.join(SOLVERS)} |", "|---" * (len(SOLVERS) + 1) + "|"]
    for evaluations in dict.fromkeys(rung.evaluations for rung in rungs):
        found = {rung.solver: rung for rung in rungs if rung.evaluations == evaluations}
        cells = [f"{found[name].distance:.3f} / {found[name].score:.3f}" if name in found else "" for name in SOLVERS]
        lines.append(f"| {evaluations} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Reference ({REFERENCE_EVALUATIONS} evaluations): {reference_score:.3f}"])


def parse_guidances(text: str) -> list[float]:
    """Guidance scales separated by commas. Raises InputError where one is no finite number of at least 0."""
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = [math.nan]
    if not all(0 <= scale < math.inf for scale in scales):
        raise InputError(f"--guidances {text!r}: write finite numbers of at least 0, separated by commas: 1,2,4")
    return scales


@click.command(context_settings={"show_default": True})
@click.argument("candidate", type=click.Choice(list(CANDIDATES)))
@click.option("--steps", type=click.IntRange(min=1), default=3000, help="Of training, batch 32.")
@click.option("--images", type=click.IntRange(min=64), default=20_000, help="Scenes to train on.")
@click.option("--number", type=click.IntRange(min=1), default=48, help="Prompts the solvers are compared on.")
@click.option("--guidances", default="1,2,4", help="Guidance scales.")
@click.option("--vae", type=click.Path(path_type=Path, exists=True), default=Path("src/shapes/vae"))
@click.option("--scratch", type=click.Path(path_type=Path), default=Path("scratch/screen"))
@click.option("--seed", type=click.IntRange(0, 2**32), default=0)
@click.option("--device", default="cpu", help="auto, cpu, cuda, cuda:N or mps.")
@shows_input_errors
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
    scales, folder, place = parse_guidances(guidances), scratch / candidate, resolve_device(device)
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder = load_module(AutoencoderKL, vae).to(place)
    rendered = render_candidate(candidate, images, seed)
    latents = encode_images(autoencoder, torch.from_numpy(rendered.images))
    begun = {"images": images, "vae": str(vae), "seed": seed}
    options = TrainingOptions(steps, 5e-4, folder / "diffusion.pt", begun)
    model = train(rendered.captions, latents, options, batch=32, seed=seed, device=place)
    save_pipeline(folder / "pipeline", model, autoencoder, build_tokenizer(), build_scheduler())
    prompts = render_candidate(candidate, number, seed + 1).captions
    for guidance in scales:
        reference_score, rungs = ladder(str(folder / "pipeline"), prompts, guidance, BUDGETS, place)
        click.echo(f"\n{candidate}, guidance {guidance:g}, distance to the reference / verifier score\n")
        click.echo(table(rungs, reference_score))


if __name__ == "__main__":
    main()
