"""What a learned grid and a learned history are worth without points: distillations in the closed-form world.

    python -m benchmarks.distilled_multistep

Prints a Markdown table: for each number of evaluations the distance to the exact solution, relative to its length, of
the best classical solver and of what `train.py` distils with `--num_points 0 --train grid`, `history` and
`grid,history`. Each entry's solver and schedule are chosen on noise of their own, and scored on other noise; neither
was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from torch import Tensor

from errors import shows_input_errors
from models.mixture import MixtureWorld
from models.randomness import derived_seed, generator_of
from train import main as train_command
from training.distillation_options import Options, settled
from training.distillation_run import distil, prepare
from training.solver import Schedule, Solver, classical_solvers, load_solver

WORLD = MixtureWorld()
SCHEDULES = (Schedule("polynomial", 7.0), Schedule("logsnr", 1.0), Schedule("time_uniform", 1.0))
LEARNED = ("grid", "history", "grid,history")
CLASSICAL = ("ddim", "heun", "dpm2", "dpmpp:2", "dpmpp:3", "ipndm:2", "ipndm:3", "ipndm:4")


@cache
def judged(purpose: str, count: int = 512) -> tuple[Tensor, Tensor]:
    """Standard normal noise and where the ODE takes it from sigma_max, both [count, N, 1, 1]."""
    noise = torch.randn(count, *WORLD.latent_shape, generator=generator_of(derived_seed("judged", purpose)))
    return noise, WORLD.solution(WORLD.sigma_max * noise, WORLD.sigma_max, WORLD.sigma_min)


@torch.no_grad()
def distance(solver: Solver, purpose: str = "score") -> float:
    """The mean over images of their distance to the solution, relative to the image's length."""
    noise, wanted = judged(purpose)
    found = solver.on(WORLD).solve(WORLD.denoise, noise)
    return float(((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).mean())


def classical(evaluations: int) -> list[Solver]:
    """Every classical solver that can spend so many evaluations, on every schedule."""
    return classical_solvers(CLASSICAL, [evaluations], SCHEDULES, note=lambda line: None)


def distilled(evaluations: int, train: str, schedule: Schedule, *, updates: int = 200, seed: int = 0) -> Solver:
    """What `train.py --num_points 0 --train ...` makes in this world, with its usual settings but `updates`."""
    asked = {
        "dataset_name": WORLD.name,
        "num_steps": evaluations + 1,
        "num_points": 0,
        "schedule_type": schedule.schedule_type,
        "schedule_rho": schedule.rho,
        "batch-gpu": 64,
        "total_kimg": 0.016 * updates,
        "train": train,
        "seed": seed,
    }
    usual = train_command.make_context("train", [f"--{option}={value}" for option, value in asked.items()]).params
    told = {field.name: usual[field.name] for field in fields(Options) if field.default is MISSING}
    options = Options(**told | settled(told))
    with TemporaryDirectory() as folder:
        lesson = prepare(options, WORLD, [""] * options.trajectories)
        return replace(load_solver(distil(Path(folder), options, WORLD, lesson)), label=str(schedule))


def best(solvers: Sequence[Solver]) -> str:
    """The distance and the name of the one that is nearest on the noise for choosing."""
    nearest = min(solvers, key=lambda solver: distance(solver, "choose"))
    name = nearest.label if nearest.origin else f"{nearest.label} {nearest.schedule}"
    return f"{distance(nearest):.4f} ({name})"


@click.command(context_settings={"show_default": True})
@click.option(
    "--evaluations",
    type=click.IntRange(2, 1000),
    multiple=True,
    default=(3, 4, 5, 6, 8),
    help="Of an image; for several, again.",
)
@click.option("--updates", type=click.IntRange(1, 10**6), default=200, help="Of each distillation.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Of the distillations.")
@shows_input_errors
def main(evaluations: tuple[int, ...], updates: int, seed: int) -> None:
    """Distance to the exact solution of classical and of distilled solvers at equal numbers of evaluations."""
    click.echo("| evaluations | best classical solver | " + " | ".join(f"learned {train}" for train in LEARNED) + " |")
    click.echo("|---" * (2 + len(LEARNED)) + "|")
    for count in evaluations:
        cells = [best(classical(count))]
        for train in LEARNED:
            cells.append(best([distilled(count, train, each, updates=updates, seed=seed) for each in SCHEDULES]))
        click.echo(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
