"""What a learned grid and a learned history are worth without points: distillations in the closed-form world.

    python -m benchmarks.distilled_multistep

Prints a Markdown table: for each number of evaluations the distance to the exact solution, relative to its length, of
the best classical solver and of what `train.py` distils with `--num_points 0 --train grid`, `history` and
`grid,history`. Each entry's solver and schedule are chosen on noise of their own, and scored on other noise; neither
was trained on.
"""

from __future__ import annotations

if __name__ == "__main__":
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import click
import torch
from torch import Tensor

from errors import shows_input_errors
from models.denoiser import Denoiser
from models.mixture import MixtureWorld
from models.randomness import derived_seed, generator_of
from schedules import get_schedule
from solvers import SAMPLERS, epd_sampler, network_evaluations, num_steps_for
from training.distillation_options import Options, settled
from training.distillation_run import distil, prepare
from training.sampling import parse_classical
from training.snapshot import GRID, load_snapshot

WORLD = MixtureWorld()
SCHEDULES = {"polynomial": 7.0, "logsnr": 1.0, "time_uniform": 1.0}
LEARNED = ("grid", "history", "grid,history")
CLASSICAL = ("ddim", "heun", "dpm2", "dpmpp:2", "dpmpp:3", "ipndm:2", "ipndm:3", "ipndm:4")

Solver = Callable[[Tensor], Tensor]
"""From noise at sigma_max to images."""


@cache
def judged(purpose: str, count: int = 512) -> tuple[Tensor, Tensor]:
    """Noise at sigma_max and where the ODE takes it, both [count, N, 1, 1]."""
    generator = generator_of(derived_seed(f"distilled multistep: {purpose}"))
    x = WORLD.sigma_max * torch.randn(count, *WORLD.latent_shape, generator=generator)
    return x, WORLD.solution(x, WORLD.sigma_max, WORLD.sigma_min)


@torch.no_grad()
def distance(solver: Solver, purpose: str = "score") -> float:
    """The mean over images of their distance to the solution, relative to the image's length."""
    x, wanted = judged(purpose)
    return float(((solver(x) - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).mean())


def grid(schedule: str, num_steps: int) -> Tensor:
    """A named schedule over the world's range."""
    return get_schedule(schedule, num_steps, WORLD.sigma_min, WORLD.sigma_max, rho=SCHEDULES[schedule])


def classical(evaluations: int) -> dict[str, Solver]:
    """Every classical solver that can spend so many evaluations, on every schedule."""
    found: dict[str, Solver] = {}
    for name in CLASSICAL:
        solver, order = parse_classical(name)
        if evaluations % network_evaluations(solver, 2).parallel == 0:
            for schedule in SCHEDULES:
                sigmas = grid(schedule, num_steps_for(solver, evaluations))
                options = {} if order is None else {"max_order": order}
                found[f"{name} {schedule}"] = partial(SAMPLERS[solver], WORLD.denoise, sigmas=sigmas, **options)
    return found


def distilled(evaluations: int, train: str, schedule: str, *, updates: int = 200, seed: int = 0) -> Solver:
    """What `train.py --num_points 0 --train ...` makes in this world, with its usual settings but `updates`."""
    told = {
        "dataset_name": WORLD.name,
        "model_path": None,
        "num_steps": evaluations + 1,
        "num_points": 0,
        "sampler_stu": "epd",
        "sampler_tea": "dpm2",
        "M": 9,
        "afs": False,
        "scale_dir": 0.0,
        "scale_time": 0.0,
        "guidance_rate": None,
        "schedule_type": schedule,
        "schedule_rho": SCHEDULES[schedule],
        "trajectories": 128,
        "batch": 16,
        "batch_gpu": 64,
        "total_kimg": 0.016 * updates,
        "lr": 0.1,
        "coslr": True,
        "target": "latent",
        "recompute": False,
        "seed": seed,
        "prompt_file": None,
        "init_only": False,
        "start": None,
        "train": train,
    }
    options, denoiser = Options(**told | settled(told)), cast(Denoiser, WORLD)
    with TemporaryDirectory() as folder:
        table, metadata = load_snapshot(
            distil(Path(folder), options, denoiser, prepare(options, denoiser, [""] * options.trajectories))
        )
    own = metadata.get(GRID)
    sigmas = grid(schedule, evaluations + 1) if own is None else torch.tensor(own, dtype=torch.float64)
    return partial(epd_sampler, WORLD.denoise, sigmas=sigmas, table=table)


def best(solvers: Mapping[str, Solver]) -> str:
    """The distance and the name of the one that is nearest on the noise for choosing."""
    name = min(solvers, key=lambda name: distance(solvers[name], "choose"))
    return f"{distance(solvers[name]):.4f} ({name})"


@click.command()
@click.option(
    "--evaluations",
    type=click.IntRange(2, 1000),
    multiple=True,
    default=(4, 5, 6, 8),
    show_default=True,
    help="Of an image; for several, again.",
)
@click.option("--updates", type=click.IntRange(1, 10**6), default=200, show_default=True, help="Of each distillation.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of the distillations.")
@shows_input_errors
def main(evaluations: tuple[int, ...], updates: int, seed: int) -> None:
    """Distance to the exact solution of classical and of distilled solvers at equal numbers of evaluations."""
    click.echo("| evaluations | best classical solver | " + " | ".join(f"learned {train}" for train in LEARNED) + " |")
    click.echo("|---" * (2 + len(LEARNED)) + "|")
    for count in evaluations:
        cells = [best(classical(count))]
        for train in LEARNED:
            cells.append(best({name: distilled(count, train, name, updates=updates, seed=seed) for name in SCHEDULES}))
        click.echo(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
